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
from rdkit.Chem.Scaffolds import MurckoScaffold

from common import fail
from data.molecules.metrics import (SCAFFOLDS, TARGETS, NGram, Reference, auroc, aupr, canonical, describe, draw_curves,
                                    draw_grid, ece, on_target, parse, roc, same_lengths, selective, table_lines,
                                    target_grid)

# `script` is the module of train_edl.py, which imports this one: as a program it goes by another name
SHOWN = ("nll", "total", "vacuity", "epistemic")    # scores of the plots, as means over a molecule's tokens


def murcko(smiles):
    """The Bemis-Murcko scaffold as prepare.py writes it, "" of an acyclic molecule, None of what is no molecule."""
    molecule = parse(smiles)
    return None if molecule is None else MurckoScaffold.MurckoScaffoldSmiles(mol=molecule)


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
        fail("--scaffold_smiles: the model was trained " + ("with scaffolds: give one, or none for an acyclic molecule"
                                                           if with_scaffold else "without scaffolds"))
    scaffold = None if not with_scaffold else "" if scaffold_smiles == "none" else murcko(scaffold_smiles)
    if with_scaffold and scaffold is None:
        fail(f"--scaffold_smiles {scaffold_smiles}: RDKit cannot read it")
    if with_scaffold and scaffold != canonical(scaffold_smiles) and scaffold_smiles != "none":
        print(f"--scaffold_smiles {scaffold_smiles}: its Bemis-Murcko scaffold is {scaffold or 'none, it is acyclic'}")
    return {"values": {name: given[name] for name in names}, "scaffold": scaffold}


def conditions(script, model):
    """The groups that a conditional model is asked for: target_grid of its properties x SCAFFOLDS -> list of dicts of
    values, scaffold (None without) and ids, the scaffold's tokens; none for an unconditional model."""
    if not (model.prop_names or model.scaffold):
        return []
    groups = [{"values": values, "scaffold": scaffold} for values in target_grid(model.prop_names) or [{}]
              for scaffold in (SCAFFOLDS if model.scaffold else [None])]
    for group in groups:
        group["ids"] = [model.vocab.index(token) if token in model.vocab else -1
                        for token in script.tokenize(group["scaffold"] or "")]
    return [group for group in groups if min(group["ids"], default=0) >= 0 and len(group["ids"]) <= model.block]


def generate_like(script, model, data, n, seed=0, **how):
    """generate() n molecules, each under the conditions, if the model has any, of a training row drawn by the seed."""
    rows, made = np.random.default_rng(seed).choice(data.rows["train"], n), []
    for size in np.unique(data.prefix[rows]):       # those with scaffolds of one length together
        batch = script.get_rows(data, rows[data.prefix[rows] == size])
        made += script.generate(model, len(batch["tokens"]), seed=seed + int(size), props=batch.get("props"),
                                scaffold=batch["tokens"][:, :size], **how)
    return made


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
    split "far" holds the rows that a model of `data` can read and that are not among the known SMILES."""
    new = np.array([data.vocab.index(token) if token in data.vocab else -1 for token in far.vocab])
    ids = new[far.table.cpu().numpy()]
    unknown = np.logical_or.reduceat(ids < 0, far.start)
    long = ~unknown & (np.maximum(far.length, far.prefix) > data.block)
    seen = np.array([not (unknown[row] or long[row]) and far.smiles(row) in known for row in range(len(far.start))])
    rows = np.flatnonzero(~(unknown | long | seen))
    table = torch.from_numpy(ids.clip(min=0).astype(np.int16)).to(far.table.device)
    left_out = {"tokens the model does not know": unknown, "longer than the model": long, "known from training": seen}
    return dataclasses.replace(far, table=table, vocab=data.vocab, rows={"far": rows}), {
        reason: int(where.sum()) for reason, where in left_out.items()}


def far_beside(script, model, data, config, far_dir, known, near, seed):
    """The molecules of far_dir beside held-out rows (near: by_row's answer and their lengths), equally many at each
    length -> (scores of both, which are far, how many were left out and why)."""
    far = script.load_data(dataclasses.replace(config, data_dir=far_dir, train_rows=0), data.table.device)
    far, left_out = translate(far, data, known)
    rows = far.rows["far"]
    i, j = map(np.sort, same_lengths(near["length"], far.length[rows], seed))        # as by_row orders them
    strange = by_row(score(script, model, far, rows[j]))
    both = {name: np.concatenate([near[name][i], strange[name]]) for name in strange}
    return both, np.arange(2 * len(i)) >= len(i), left_out


def tell_apart(scores, bad):
    """How well each score (higher: stranger) finds the bad molecules -> {score: {"AUROC", "AUPR", "roc"}}, none if all
    of them are bad or none is."""
    if bad.all() or not bad.any():
        return {}
    return {name: {"AUROC": auroc(x, bad), "AUPR": aupr(x, bad), "roc": roc(x, bad)} for name, x in scores.items()}


def report(script, models, folder, n, temperature=1.0, top_k=0, seed=0, far_dir="", log=print):
    """Measure models, {name: (model, data, config)}, the first of them the run in folder -> dict of the table's columns
    (empty but on rank 0), each a dict of metrics; n-gram models and held-out rows stand beside them.

    A second table tells how well each score finds a model's own invalid samples and the molecules of far_dir, prepared
    ones of another kind, beside held-out rows of the same lengths. Writes eval.json and, in samples/, final.csv,
    final.png, selective.png, roc.png. All ranks share the likelihood of the validation rows, rank 0 does the rest."""
    nll = {name: script.evaluate(model, data, config, "val")["nll"] for name, (model, data, config) in models.items()}
    if script.rank() > 0:
        return {}
    first, data, _ = next(iter(models.values()))
    split = "test" if len(data.rows.get("test", [])) else "val"
    reference = Reference([data.smiles(row) for row in data.rows[split]])
    groups, how = conditions(script, first), {"temperature": temperature, "top_k": top_k}
    table, apart, kept, left_out = {}, {}, {"valid": {}, "valid and novel": {}}, {}

    @functools.cache
    def known_to(data):                             # canonical SMILES of its training rows
        smiles = [data.smiles(row) for row in data.rows["train"]]
        return set(smiles if data.canonical else map(canonical, smiles))

    def on_groups(drawn):                           # drawn(group) -> list of SMILES
        found = on_target([group | {"smiles": drawn(group)} for group in groups]) if groups else {}
        return {"valid_on_target" if name == "valid" else name: value for name, value in found.items()}

    for name, (model, own, config) in models.items():
        scores, made = score(script, model, own, own.rows[split]), generate_like(script, model, own, n, seed, **how)
        near, smiles = by_row(scores), [molecule["smiles"] for molecule in made]
        table[name] = {"val NLL": nll[name], f"{split} NLL": float(scores["nll"].mean()),
                       "ECE": ece(scores["confidence"], scores["correct"]), "Brier": float(scores["brier"].mean())}
        table[name] |= {f"mean {x}": float(scores[x].mean()) for x in script.UNCERTAINTY if x in scores}
        table[name] |= describe(smiles, known_to(own), reference)
        same = [model.prop_names, model.scaffold] == [first.prop_names, first.scaffold]
        table[name] |= on_groups(lambda group: smiles if not same else [molecule["smiles"] for molecule in
            script.generate(model, n // len(groups) + 1, seed=seed, props=[*group["values"].values()] or None,
                            scaffold=group["ids"], **how)])

        valid = np.array([canonical(x) is not None for x in smiles])
        novel = valid & np.array([canonical(x) not in known_to(own) for x in smiles])
        drawn = {x: np.array([molecule[x] for molecule in made]) for x in near}
        for title, good in ("valid", valid), ("valid and novel", novel):
            kept[title] |= {f"{name} {x}": selective(drawn[x], good) for x in SHOWN if x in near}
        apart[f"{name} invalid"] = tell_apart(drawn, ~valid)
        if far_dir:
            near["length"] = own.length[own.rows[split]]
            both, far, left_out = far_beside(script, model, own, config, far_dir, known_to(data), near, seed)
            apart[f"{name} far"] = tell_apart(both, far)
        if model is first:
            write_csv(folder / "samples/final.csv", made)
            draw_grid(folder / "samples/final.png", made)
    for name, order in ("6-gram", 6), ("unigram", 1):
        ngram = NGram(data, order)
        smiles = ngram.generate(n, seed)
        table[name] = {f"{x} NLL": ngram.nll(data, x) for x in dict.fromkeys(("val", split))}
        table[name] |= describe(smiles, known_to(data), reference) | on_groups(lambda group: smiles)
    smiles = [data.smiles(row) for row in np.random.default_rng(seed).permutation(data.rows["val"])[:n]]
    table["val rows"] = describe(smiles, known_to(data), reference) | on_groups(lambda group: smiles)

    log(f"{n} samples each at temperature {temperature}, top_k {top_k}, seed {seed}; NLL in nats per token; "
        f"snn to w1_* are beside {len(data.rows[split]):,} {split} rows")
    for line in table_lines(table):
        log(line)
    apart = {title: found for title, found in apart.items() if found}
    if apart:
        log("AUROC of each score, as mean and as highest of a molecule's tokens")
        for line in table_lines({title: {x: of["AUROC"] for x, of in found.items()} for title, found in apart.items()}):
            log(line)
    if far_dir:
        log(f"far: {far.sum():,} of {far_dir} and as many {split} rows of the same lengths; left out: "
            + ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()))
    draw_curves(folder / "samples/selective.png", kept, "share of the samples kept, surest first", "share of the kept")
    curves = {what: {f"{title.removesuffix(what)}{x}": of.pop("roc") for title, found in apart.items()
                     if title.endswith(what) for x, of in found.items() if x in SHOWN} for what in ("invalid", "far")}
    if apart:
        draw_curves(folder / "samples/roc.png", {what: found for what, found in curves.items() if found},
                    "false positive rate", "true positive rate")
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
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["smiles", "valid", *list(made[0])[1:]])
        writer.writeheader()
        writer.writerows(m | {"valid": canonical(m["smiles"]) is not None} for m in made)
