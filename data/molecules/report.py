"""The report at the end of a training and of `eval`: one table, one JSON, two plots, from the metrics in metrics.py."""
import csv
import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import numpy as np
import torch

from common import fail, finish
from data.molecules.metrics import (SCAFFOLDS, TARGETS, NGram, Reference, auroc, aupr, canonical, describe, draw_curves,
                                    draw_grid, ece, murcko, on_target, parse, roc, same_lengths, selective, table_lines,
                                    target_grid)

# `script` is the module of train_edl.py, which imports this one: as a program it goes by another name
SHOWN = ("nll", "total", "vacuity", "epistemic")    # scores of the plots, as means over a molecule's tokens


def read_condition(names, with_scaffold, prop_values, scaffold_smiles):
    """What sample's flags ask of a model trained with the properties `names` and with scaffolds or not -> dict of
    values, {name: float}, and scaffold (SMILES; "" is acyclic; None without scaffolds). A misfit ends in fail()."""
    given = {}
    for part in filter(None, prop_values.split(",")):
        name, _, value = part.partition("=")
        given[name.strip()] = float(value) if re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)\s*", value) else math.nan
    if set(given) != set(names) or not all(map(math.isfinite, given.values())):
        wanted = "give a number for each, as " + ",".join(f"{name}={TARGETS[name][1]:g}" for name in names)
        fail(f"--prop_values {prop_values or '(missing)'}: the model was trained "
             + (f"with {', '.join(names)}: {wanted}" if names else "without properties"))
    if bool(scaffold_smiles) != with_scaffold:
        fail("--scaffold_smiles: the model was trained " + (
            "with scaffolds: give one, or the word none (acyclic)" if with_scaffold else "without scaffolds"))
    scaffold = "" if with_scaffold else None
    if scaffold_smiles not in ("", "none"):
        if parse(scaffold_smiles) is None:
            fail(f"--scaffold_smiles {scaffold_smiles}: RDKit cannot read it")
        scaffold = murcko(parse(scaffold_smiles))
        if scaffold != canonical(scaffold_smiles):
            print(f"--scaffold_smiles {scaffold_smiles}: its Bemis-Murcko scaffold is {scaffold or 'none: acyclic'}")
    return {"values": {name: given[name] for name in names}, "scaffold": scaffold}


def token_ids(script, model, flag, smiles):
    """The ids of a SMILES string that a flag gave; fail() if the model cannot read it."""
    try:
        tokens = script.tokenize(smiles)
    except ValueError as error:
        fail(f"--{flag}: {error}")
    for token in tokens:
        if token not in model.vocab:
            fail(f"--{flag}: the model has never seen {token!r}, only {' '.join(model.vocab[2:])}")
    if len(tokens) >= model.block:
        fail(f"--{flag} has {len(tokens)} tokens, the longest molecule of the model {model.block - 1}")
    return [model.vocab.index(token) for token in tokens]


def conditions(script, model):
    """What a conditional model is asked for: target_grid of its properties x SCAFFOLDS -> (list of dicts of values,
    scaffold (None without) and ids, the scaffold's tokens; the scaffolds left out, which it cannot read)."""
    groups, left_out = [], []
    for scaffold in (SCAFFOLDS if model.scaffold else [None]) if model.prop_names or model.scaffold else []:
        ids = [model.vocab.index(token) if token in model.vocab else -1 for token in script.tokenize(scaffold or "")]
        if min(ids, default=0) < 0 or len(ids) > model.block:
            left_out.append(scaffold)
        else:
            groups += [{"values": values, "scaffold": scaffold, "ids": ids} for values in target_grid(model.prop_names)]
    return groups, left_out


def generate_like(script, model, data, n, seed=0, **how):
    """generate() n molecules, each under the conditions, if the model has any, of a training row drawn by the seed."""
    rows, made = np.random.default_rng(seed).choice(data.rows["train"], n), []
    for size in np.unique(data.prefix[rows]):       # those with scaffolds of one length together
        batch = script.get_rows(data, rows[data.prefix[rows] == size])
        made += script.generate(model, len(batch["tokens"]), seed=seed + int(size), props=batch.get("props"),
                                scaffold=batch["tokens"][:, :size], **how)
    return [made[i] for i in np.argsort(np.argsort(data.prefix[rows], kind="stable"))]     # as the rows were drawn


def strings(data, rows):
    """Rows -> list of SMILES, without a look at the device for each."""
    table, begin = data.table.cpu().numpy(), data.start[rows] + data.prefix[rows] + 1
    return ["".join(data.vocab[i] for i in table[first:first + size - 1].tolist())
            for first, size in zip(begin.tolist(), data.length[rows].tolist())]


@torch.no_grad()
def score(script, model, data, rows):
    """What the model thinks of each target of the rows -> dict of (targets,) numpy arrays: row; those of token_scores;
    confidence (the highest probability), correct (was it the target's?), brier (sum of squares of p - y)."""
    found = {}
    for some, batch, logits in script.passes(model, data, rows):
        mask, row = batch["mask"], torch.from_numpy(some).to(logits.device)
        targets, log_e = batch["targets"][mask], script.log_evidence(logits[mask], model.evidence)
        p, now = log_e.softmax(-1), script.token_scores(log_e, targets, model.evidence != "none")
        now |= {"row": row[mask.nonzero()[:, 0]], "confidence": p.amax(-1), "correct": p.argmax(-1) == targets,
                "brier": (p * p).sum(-1) - 2 * p.gather(-1, targets[:, None])[:, 0] + 1}
        for name, x in now.items():
            found.setdefault(name, []).append(x.cpu().numpy())
    return {name: np.concatenate(x) for name, x in found.items()}


def by_row(found):
    """score()'s answer -> dict of the mean and the max_ of each score over each row's targets, rows ascending."""
    order = np.argsort(found["row"], kind="stable")
    first = np.flatnonzero(np.diff(found["row"][order], prepend=-1))
    count, result = np.diff(first, append=len(order)), {}
    for name in found:
        if name not in ("row", "confidence", "correct", "brier"):
            result[name] = np.add.reduceat(found[name][order].astype(np.float64), first) / count
            result[f"max_{name}"] = np.maximum.reduceat(found[name][order], first)
    return result


def translate(far, data, known):
    """Data of other molecules, in a vocabulary of their own -> (the same in data's, counts of what was left out). Its
    split "far" holds the rows that a model of `data` can read and that are not among the known canonical SMILES."""
    new = np.array([data.vocab.index(token) if token in data.vocab else -1 for token in far.vocab])
    ids = new[far.table.cpu().numpy()]
    unknown = np.logical_or.reduceat(ids < 0, far.start)
    long = ~unknown & (np.maximum(far.length, far.prefix) > data.block)
    smiles = strings(far, np.arange(len(far.start)))
    seen = ~unknown & ~long & np.array([(x if far.canonical else canonical(x)) in known for x in smiles])
    table = torch.from_numpy(ids.clip(min=0).astype(np.int16)).to(far.table.device)
    left_out = {"tokens the model does not know": unknown, "longer than the model": long, "known from training": seen}
    rows = np.flatnonzero(~(unknown | long | seen))
    return dataclasses.replace(far, table=table, vocab=data.vocab, rows={"far": rows}), {
        reason: int(where.sum()) for reason, where in left_out.items()}


def load_far(script, data, config, far_dir, known, held, seed):
    """The molecules of far_dir for a model of `data`, and the held-out rows to set beside them: equally many at each
    length -> (Data, its rows, places in held, counts of what was left out). fail() if there are none."""
    far = script.load_data(dataclasses.replace(config, data_dir=far_dir, train_rows=0), data.table.device)
    total, (far, left_out) = len(far.start), translate(far, data, known)
    rows = far.rows["far"]
    i, j = map(np.sort, same_lengths(data.length[held], far.length[rows], seed))     # as by_row orders them
    left_out["without a held-out row of its length"] = len(rows) - len(j)
    if not len(i):
        fail(f"--far_dir {far_dir}: none of its {total:,} molecules can be used; left out: "
             + ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()))
    return far, rows[j], i, left_out


def tell_apart(scores, bad):
    """How well each score (higher: stranger) finds the bad molecules -> {score: {"AUROC", "AUPR", "roc"}}, none if all
    of them are bad or none is."""
    if bad.all() or not bad.any():
        return {}
    return {name: {"AUROC": auroc(x, bad), "AUPR": aupr(x, bad), "roc": roc(x, bad)} for name, x in scores.items()}


def report(script, models, folder, n, temperature=1.0, top_k=0, seed=0, far_dir="", stem="final", log=print):
    """Measure models, {name: (model, data, config)}, the first of them the run in folder -> dict of the table's columns
    (empty but on rank 0), each a dict of metrics; n-gram models and held-out rows stand beside them.

    A second table tells how well each score finds a model's own invalid samples, of whatever length, and the molecules
    of far_dir, prepared ones of another kind, beside held-out rows of the same lengths. Writes eval.json and, in
    samples/, stem.csv, stem.png, selective.png, roc.png. All ranks share the likelihood of the validation rows and end
    their process group; rank 0 does the rest, which may outlast a collective's timeout."""
    _, data, _ = next(iter(models.values()))
    split = "test" if len(data.rows.get("test", [])) else "val"
    nll = {name: {"val NLL": script.evaluate(model, own, dataclasses.replace(config, dtype="float32"), "val")["nll"]}
           for name, (model, own, config) in models.items()} if split == "test" else dict.fromkeys(models, {})
    main = script.rank() == 0
    finish()
    if not main:
        return {}
    first, real = next(iter(models)), strings(data, data.rows[split])
    groups, unread = conditions(script, models[first][0])
    how, table, apart, kept = {"temperature": temperature, "top_k": top_k}, {}, {}, {"valid": {}, "valid and novel": {}}

    @functools.cache
    def known_to(data):                             # canonical SMILES of its training rows
        smiles = strings(data, data.rows["train"])
        return set(smiles if data.canonical else map(canonical, smiles))

    def on_groups(drawn):                           # drawn(group) -> list of SMILES
        found = on_target([group | {"smiles": drawn(group)} for group in groups]) if groups else {}
        return {"valid_asked" if name == "valid" else name: value for name, value in found.items()}

    far, left_out = {}, {}
    for name, (model, own, config) in models.items():           # what cannot be is said before the work begins
        if strings(own, own.rows.get(split, [])) != real:
            fail(f"{name} has other held-out rows than {first}: --data_dir DIR names one set for all")
        if far_dir:
            *far[name], left_out = load_far(script, own, config, far_dir, known_to(data), own.rows[split], seed)
    reference = Reference(real)
    for name, (model, own, config) in models.items():
        scores, made = score(script, model, own, own.rows[split]), generate_like(script, model, own, n, seed, **how)
        near, smiles = by_row(scores), [molecule["smiles"] for molecule in made]
        table[name] = nll[name] | {f"{split} NLL": float(scores["nll"].mean()), "Brier": float(scores["brier"].mean()),
                                   "ECE": ece(scores["confidence"], scores["correct"])}
        table[name] |= {f"mean {x}": float(scores[x].mean()) for x in script.UNCERTAINTY if x in scores}
        table[name] |= describe(smiles, known_to(own), reference)
        same = (model.prop_names, model.scaffold) == (models[first][0].prop_names, models[first][0].scaffold)
        table[name] |= on_groups(lambda group: smiles if not same else [molecule["smiles"] for molecule in
            script.generate(model, n // len(groups) + 1, seed=seed, props=[*group["values"].values()] or None,
                            scaffold=group["ids"], **how)])

        written = [canonical(x) for x in smiles]
        valid = np.array([x is not None for x in written])
        novel = valid & np.array([x not in known_to(own) for x in written])
        drawn = {x: np.array([molecule[x] for molecule in made]) for x in near}
        for title, good in ("valid", valid), ("valid and novel", novel):
            kept[title] |= {f"{name} {x}": selective(drawn[x], good) for x in SHOWN if x in near}
        apart[f"{name} invalid"] = tell_apart(drawn, ~valid)
        if far_dir:
            others, rows, beside = far[name]
            strange = by_row(score(script, model, others, rows))
            both = {x: np.concatenate([near[x][beside], strange[x]]) for x in near}
            apart[f"{name} far"] = tell_apart(both, np.arange(2 * len(rows)) >= len(rows))
        if name == first:
            write_csv(folder / f"samples/{stem}.csv", made)
            draw_grid(folder / f"samples/{stem}.png", made)
    high = min(6, int(62 / math.log2(len(data.vocab))))
    for name, order in (f"{high}-gram", high), ("unigram", 1):
        ngram = NGram(data, order)
        smiles = ngram.generate(n, seed)
        table[name] = {f"{x} NLL": ngram.nll(data, x) for x in dict.fromkeys(("val", split))}
        table[name] |= describe(smiles, known_to(data), reference) | on_groups(lambda group: smiles)
    smiles = strings(data, np.random.default_rng(seed).permutation(data.rows["val"])[:n])
    table["val rows"] = describe(smiles, known_to(data), reference if split == "test" else None)
    table["val rows"] |= on_groups(lambda group: smiles)

    table = {name: {x: value if math.isfinite(value) else None for x, value in column.items()}
             for name, column in table.items()}     # "-" in the table, null in the JSON
    log(f"{n} samples each at temperature {temperature}, top_k {top_k}, seed {seed}; NLL in nats per token; "
        f"snn to w1_* are beside {len(real):,} {split} rows")
    if groups:
        log("A model with conditions is told those of each row, and draws under those of random training rows; but "
            "valid_asked, mad_*, sd_*, scaffold_* are of draws for targets" + "".join(f"; not {x}" for x in unread))
    for line in table_lines(table):
        log(line)
    apart = {title: found for title, found in apart.items() if found}
    if apart:
        log("AUROC of each score, as mean and as highest of a molecule's tokens")
        for line in table_lines({title: {x: of["AUROC"] for x, of in found.items()} for title, found in apart.items()}):
            log(line)
    if far_dir:
        log(f"far: {len(rows):,} of {far_dir} and as many {split} rows of the same lengths; left out: "
            + ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()))
    draw_curves(folder / "samples/selective.png", kept, "share of the samples kept, surest first", "share of the kept")
    curves = {}
    for title, found in apart.items():
        name, what = title.rsplit(maxsplit=1)
        curves.setdefault(what, {}).update({f"{name} {x}": found[x]["roc"] for x in SHOWN if x in found})
    if curves:
        draw_curves(folder / "samples/roc.png", curves, "false positive rate", "true positive rate")
    tenths = {title: {label: np.interp(np.linspace(0.1, 1, 10), *curve).tolist() for label, curve in of.items()}
              for title, of in kept.items()}
    about = how | {"n": n, "seed": seed, "far_dir": far_dir, "left out of far_dir": left_out, "table": table,
                   "tell apart": {title: {x: {"AUROC": of["AUROC"], "AUPR": of["AUPR"]} for x, of in found.items()}
                                  for title, found in apart.items()}, "share at 10 ... 100 % kept": tenths}
    (folder / "eval.json").write_text(json.dumps(about, indent=1))
    return table


def summary(made, wanted):
    """What generate() made, and read_condition() had asked for -> str of the metrics that need no training rows."""
    smiles = [molecule["smiles"] for molecule in made]
    found = describe(smiles, set()) | (on_target([wanted | {"smiles": smiles}]) if wanted["values"] or
                                       wanted["scaffold"] is not None else {})
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items() if name != "novel")


def write_csv(path, made):
    """One row per molecule: smiles, valid, and whatever else generate() says of it."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["smiles", "valid", *list(made[0])[1:]])
            writer.writeheader()
            writer.writerows(m | {"valid": canonical(m["smiles"]) is not None} for m in made)
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror}")
