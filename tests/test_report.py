"""Molecules made to measure and what is said of them: data with properties and scaffolds, the model that reads them,
its samples, and data/molecules/report.py with the verbs eval and sample. What holds without conditions is in
test_edl.py and test_run_edl.py, the metrics themselves are in test_metrics.py.
"""
import contextlib
import csv
import json
import re
import shutil
import types
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from edl_tools import (ROOT, assert_same_bits, last_checkpoint, one_line, small_config, small_model, smiles_of, start,
                       start_pair, train_here, wait, write_data)
from PIL import Image
from rdkit import Chem
from rdkit.Chem.Scaffolds import MurckoScaffold

import common
import train_edl
from data import files
from data.molecules import metrics, prepare, report
from runs import read_file
from train_edl import (BOS, EOS, Config, compute_loss, evaluate, generate, get_batch, get_rows, load_data, load_model,
                       log_evidence, tokenize)

BOTH = dict(props="tpsa,logp", scaffold=True)                           # the file has logp,sas,tpsa,qed
FIELDS = pytest.mark.parametrize("fields", [BOTH, dict(props="tpsa,logp"), dict(scaffold=True), {}],
                                 ids=["both", "properties", "scaffold", "none"])
TOY = [(0, "Cc1ccccc1", "c1ccccc1", (2.0, 0.0)), (0, "CCO", "", (-0.5, 20.25)), (0, "OC1CC1", "C1CC1", (0.25, 20.25)),
       (0, "NCc1ccccc1", "c1ccccc1", (1.0, 26.0)), (0, "CC(C)C", "C1CCCCCCCCC1", (2.25, 0)),  # split, SMILES, scaffold,
       (1, "CCC1CC1", "C1CC1", (2.0, 0.0)), (2, "CCN", "", (0.0, 26.0))]                    # (logp, tpsa)

def write_set(folder, rows, names=("logp", "tpsa"), vocab=None):
    """A prepared set of rows like TOY's, ascending by split -> its path."""
    split, smiles, scaffolds, props = zip(*rows)
    scaffolds, props = [tokenize(scaffold) for scaffold in scaffolds], np.array(props, np.float32)
    vocab = vocab or [*train_edl.SPECIALS, *sorted(set(sum([*map(tokenize, smiles), *scaffolds], [])))]
    write_data(folder, *[[text for i, text in zip(split, smiles) if i == k] for k in range(3)], vocab=vocab)
    ids = [vocab.index(token) for scaffold in scaffolds for token in scaffold]
    np.save(folder / "scaffold_tokens.npy", np.array(ids, np.uint8))
    np.save(folder / "scaffold_offsets.npy", np.cumsum([0, *map(len, scaffolds)]).astype(np.int64))
    np.save(folder / "props.npy", props)
    train, meta = props[np.array(split) == 0].astype(float), json.loads((folder / "meta.json").read_text())
    meta["props"] = {name: {"mean": x.mean(), "std": x.std() or 1.0} for name, x in zip(names, train.T)}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder

def build(folder, name, limit, *flags):
    words = f"--demo --limit {limit} --name {name} --out_dir {folder} --workers 1"
    return prepare.main([*words.split(), *flags])

@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """120 demo molecules with conditions; 70 are for training, 20 for validation and 30 for the test."""
    folder = build(tmp_path_factory.mktemp("asked"), "asked", 120, "--props", "logp,sas,tpsa,qed", "--scaffold")
    np.save(folder / "split.npy", np.repeat(np.arange(3, dtype=np.uint8), [70, 20, 30]))
    return folder

@pytest.fixture(scope="module")
def data(asked):
    return load_data(Config(data_dir=str(asked), **BOTH))

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("toy") / "set", TOY)

def reader(data, **fields):
    """A random model far from flat that reads the conditions of the data."""
    model = small_model(data.vocab, data.block, **fields)
    if model.prop_names:
        model.stats.copy_(data.stats)
        torch.nn.init.normal_(model.prop.bias, std=0.5)
    return model

@pytest.fixture(scope="module")
def model(data):
    return reader(data, **BOTH)

@pytest.fixture
def refused(capsys):
    """refused(function, ...) -> the one line on stderr, after the exit code was found to be 2."""
    def call(function, *arguments, **more):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            function(*arguments, **more)
        assert stop.value.code == 2
        return one_line(capsys.readouterr().err)
    return call

def scaffold_of(data, row):
    return data.table[data.start[row]:data.start[row] + data.prefix[row]].tolist()

def ids_of(data, smiles):
    return [data.vocab.index(token) for token in tokenize(smiles)]

def measured(folder):
    """eval.json; anything that is not strict JSON fails the test."""
    return json.loads((folder / "eval.json").read_text(), parse_constant=pytest.fail)


# ----------------------------------------------------------------------------------------------------------------- data
@FIELDS
def test_a_row_is_scaffold_bos_tokens_eos(toy, fields):
    data, place = load_data(Config(data_dir=str(toy), **fields)), 0
    for row, (_, smiles, scaffold, props) in enumerate(TOY):
        prefix = ids_of(data, scaffold) if "scaffold" in fields else []
        wanted = [*prefix, BOS, *ids_of(data, smiles), EOS]
        assert data.start[row] == place and data.table[place:place + len(wanted)].tolist() == wanted
        assert (data.prefix[row], data.length[row]) == (len(prefix), len(wanted) - len(prefix) - 1)
        assert smiles_of(data, row) == smiles
        assert "props" not in fields or data.props[row].tolist() == [*reversed(props)]
        place += len(wanted)
    assert data.block == (12 if "scaffold" in fields else 11)           # one scaffold is longer than all molecules
    assert place == len(data.table) and (data.props is None) == (data.stats is None) == ("props" not in fields)

def test_a_prepared_set_as_rdkit_sees_it(data, asked):
    plain, stats = load_data(Config(data_dir=str(asked))), json.loads((asked / "meta.json").read_text())["props"]
    for row in range(120):
        molecule = Chem.MolFromSmiles(smiles_of(data, row))
        scaffold = "".join(data.vocab[i] for i in scaffold_of(data, row))
        assert (smiles_of(data, row) == smiles_of(plain, row)
                and scaffold == MurckoScaffold.MurckoScaffoldSmiles(mol=molecule))
        wanted = [metrics.PROPERTIES[name](molecule) for name in ("tpsa", "logp")]
        assert data.props[row].tolist() == pytest.approx(wanted, rel=1e-6)
    wanted = [[stats[name][x] for name in ("tpsa", "logp")] for x in ("mean", "std")]
    assert torch.equal(data.stats, torch.tensor(wanted)) and data.props.dtype == torch.float32
    assert data.block == max(len(tokenize(smiles_of(data, row))) for row in range(120)) + 1

def test_targets_are_the_molecules_and_their_ends(toy, data):
    for data, rows in (load_data(Config(data_dir=str(toy), **BOTH)), np.arange(5)), (data, np.arange(70)):
        batch = get_rows(data, rows)
        assert batch["tokens"].shape[1] == max(data.prefix[row] + data.length[row] for row in rows)
        for i, row in enumerate(rows):
            prefix, own = scaffold_of(data, row), ids_of(data, smiles_of(data, row))
            size = len(prefix) + len(own) + 1
            assert batch["tokens"][i, :size].tolist() == [*prefix, BOS, *own]
            assert batch["mask"][i].nonzero()[:, 0].tolist() == [*range(len(prefix), size)]
            assert batch["targets"][i][batch["mask"][i]].tolist() == [*own, EOS]
            assert batch["begin"][i] == len(prefix) and torch.equal(batch["props"][i], data.props[row])
            assert (batch["tokens"][i, size:] == data.table[data.start[row]]).all()         # pads: no other row's

@pytest.mark.parametrize("ranks, accum", [(1, 1), (1, 4), (2, 2)])
def test_micro_batches_keep_their_conditions_and_count_all_targets(data, monkeypatch, ranks, accum):
    whole = get_batch(data, "train", 3, small_config(batch_size=16))
    config, parts = small_config(batch_size=16 // ranks // accum, grad_accum=accum), []
    for rank in range(ranks):
        for module in (train_edl, common):
            monkeypatch.setattr(module, "world_size", lambda: ranks)
            monkeypatch.setattr(module, "rank", lambda: rank)
        parts += [get_batch(data, "train", 3, config, micro) for micro in range(accum)]
    assert {part["count"] for part in parts} == {whole["count"]} == {sum(int(part["mask"].sum()) for part in parts)}
    for name in ("begin", "props"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])

def test_batches_are_of_similar_whole_lengths(data):
    batches = [(data.prefix + data.length)[rows] for rows in train_edl.bucketed_rows(data, "train", 16, 0, 0)]
    batches.sort(key=min)
    assert len(batches) == 4 and all(one.max() <= other.min() for one, other in zip(batches, batches[1:]))

def test_fewer_training_rows_are_some_of_more(asked, data):
    few, more, other, all_rows = (load_data(Config(data_dir=str(asked), train_rows=n, seed=seed)).rows
                                  for n, seed in ((10, 0), (30, 0), (10, 1), (1000, 0)))
    assert [len(set(x["train"])) for x in (few, more, other, all_rows)] == [10, 30, 10, 70]
    assert set(few["train"]) < set(more["train"]) < set(data.rows["train"]) and set(few["train"]) != set(other["train"])
    assert all(np.array_equal(few[name], data.rows[name]) for name in ("val", "test"))

def test_a_set_without_what_is_asked_for_is_refused(tmp_path, toy, refused):
    plain = write_data(tmp_path / "plain", ["CCO"], ["CO"])
    for folder, fields, missing in ((toy, dict(props="logp,qed,sas"), "qed, sas"), (toy, dict(props="mass"), "mass"),
                                    (plain, BOTH, "tpsa, logp, scaffold"), (plain, dict(scaffold=True), "scaffold")):
        said = refused(load_data, Config(data_dir=str(folder), **fields))
        assert f"{folder} holds no {missing}:" in said and "--props logp,sas,tpsa,qed --scaffold" in said

@pytest.mark.parametrize("dry_run", [True, False])
def test_the_demo_set_with_conditions_has_a_name_of_its_own(tmp_path, monkeypatch, dry_run):
    commands = []

    def run(command):                               # what demo_set() starts; here smaller, and not in the repository
        commands.append(command[2:])
        more = command[command.index("--props"):][:3] if "--props" in command else []
        build(tmp_path / "molecules", command[command.index("--name") + 1], 30, *more)
        return types.SimpleNamespace(returncode=0)
    monkeypatch.setattr(files, "__file__", str(tmp_path / "files.py"))
    monkeypatch.setattr(files.subprocess, "run", run)
    found = [load_data(Config(dry_run=dry_run, **fields)) for fields in ({}, BOTH, dict(scaffold=True), {})]
    name, limit = ("demo500", ["--limit", "500"]) if dry_run else ("demo", [])
    more = ["--props", "logp,sas,tpsa,qed", "--scaffold"]
    assert commands == [["--demo", *limit, "--name", name], ["--demo", *more, *limit, "--name", f"{name}_conditions"]]
    assert [x.props is None for x in found] == [True, False, True, True]


# ---------------------------------------------------------------------------------------------------------------- model
@torch.no_grad()
@FIELDS
def test_what_goes_into_the_first_block(toy, fields):
    """Position by position, from the weights; and their names."""
    data = load_data(Config(data_dir=str(toy), **fields))
    model, batch, seen = reader(data, **fields), get_rows(data, np.arange(5)), []
    names = [name for name in model.state_dict() if not name.startswith("blocks.")]
    assert sorted(names) == sorted(["token.weight", "position.weight", "norm.weight", "norm.bias", "head.weight"]
        + ["part.weight"] * ("scaffold" in fields) + ["prop.weight", "prop.bias", "stats"] * ("props" in fields))
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    ask(model, batch)
    for row in range(5):
        prefix = int(data.prefix[row])
        for t in range(prefix + int(data.length[row])):
            wanted = model.token.weight[batch["tokens"][row, t]] + model.position.weight[t - prefix * (t >= prefix)]
            if model.scaffold:
                wanted = wanted + model.part.weight[int(t >= prefix)]
            if model.prop_names and t == prefix:
                z = (data.props[row].double() - data.stats[0]) / data.stats[1]
                wanted = wanted + (model.prop.weight.double() @ z + model.prop.bias)
            assert (seen[0][row, t] - wanted).abs().max() < 2e-6, (row, t)

def ask(model, batch, **others):
    batch = batch | others
    return model(batch["tokens"], None, batch["begin"], batch.get("props"))

@torch.no_grad()
@FIELDS
def test_step_by_step_with_a_cache_is_the_full_forward_of_a_row_alone_and_of_a_batch(asked, fields):
    data = load_data(Config(data_dir=str(asked), **fields))
    model, rows = reader(data, **fields), data.rows["train"][:12]
    batch = get_rows(data, rows)
    full = ask(model, batch)
    assert full.std() > 0.5 and (len(set(data.prefix[rows])) > 4 or not model.scaffold)
    for i, row in enumerate(rows):
        one, begin = get_rows(data, rows[i:i + 1]), int(data.prefix[row])
        more, size = (one["begin"], one.get("props")), begin + int(data.length[row])
        cache = model.cache(1, size)
        parts = [model(one["tokens"][:, :begin + 1], (cache, 0), *more)]
        parts += [model(one["tokens"][:, t:t + 1], (cache, t), *more) for t in range(begin + 1, size)]
        alone = ask(model, one)
        assert alone.shape[1] == size and (torch.cat(parts, 1) - alone).abs().max() < 1e-5
        assert (alone[0] - full[i, :size]).abs().max() < 1e-5

@torch.no_grad()
def test_conditions_matter_and_nothing_looks_ahead(data, model):
    batch = get_rows(data, data.rows["train"][:8])
    full, begin, rows = ask(model, batch), batch["begin"], torch.arange(8)

    def moved(**others):
        return (ask(model, batch, **others) - full).abs().amax(-1) > 1e-4
    for column in range(2):
        now = moved(props=batch["props"] + torch.eye(2)[column])
        assert torch.equal(now.int().argmax(1), begin)
    for where in (0 * begin, begin - 1, begin + 3):
        other = batch["tokens"].clone()
        other[rows, where] = (other[rows, where] - 1) % (len(data.vocab) - 2) + 2
        now = moved(tokens=other)                   # from there on, and what a scaffold's token moves is the molecule
        assert torch.equal(now.int().argmax(1), where) and now[rows, where.maximum(begin)].all()

@torch.no_grad()
def test_the_unit_of_a_property_changes_nothing(data):
    model, batch, scale = reader(data, **BOTH), get_rows(data, data.rows["train"][:8]), torch.tensor([1000.0, 1e-3])
    before = ask(model, batch)
    model.stats.mul_(scale)
    assert (ask(model, batch, props=batch["props"] * scale) - before).abs().max() < 1e-5
    assert (ask(model, batch) - before).abs().max() > 0.1

def test_bfloat16_is_finite_and_near(data):
    model, batch, config = reader(data, **BOTH), get_batch(data, "train", 0, small_config()), small_config()
    batch["props"] = batch["props"] * 50                                # far from all that was seen
    wanted = compute_loss(model, batch, 0, config)[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = compute_loss(model, batch, 0, config)
    loss.backward()
    assert loss.item() == pytest.approx(wanted, rel=0.05) and all(x.isfinite() for x in parts.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------- training
STRAIGHT = dict(max_steps=12, dropout=0.2, keep=0, save_every=5, **BOTH)

@pytest.fixture(scope="module")
def straight(asked, tmp_path_factory):
    """12 steps of a conditional model without interruption."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train_here(asked, folder, **STRAIGHT)
    return folder

def test_an_interrupted_conditional_run_goes_on_to_the_same_bits(asked, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    for step in (10, 12):
        (tmp_path / f"run/step-{step:08d}.safetensors").unlink()
    train_here(asked, tmp_path / "run", resume=True, **STRAIGHT)
    assert (tmp_path / "run/train.log").read_text().count("resumed at 5") == 1
    assert_same_bits(last_checkpoint(tmp_path / "run")[1], last_checkpoint(straight)[1])

def test_the_stats_are_in_the_checkpoint_and_in_the_best_model(data, straight):
    model = load_model(straight / "best.safetensors")                   # reads no data
    assert torch.equal(model.stats, data.stats) and (model.prop_names, model.scaffold) == (["tpsa", "logp"], True)
    assert torch.equal(last_checkpoint(straight)[1]["model.stats"], data.stats)

def test_conditions_are_kept_by_a_resume(straight, refused):
    words = ["--resume", "--run_name", straight.name, "--out_dir", str(straight.parent), "--device", "cpu"]
    for more in (["--props", "logp"], ["--no_scaffold"], ["--train_rows", "5"]):
        assert f"--{more[0].removeprefix('--no_').removeprefix('--')} is " in refused(train_edl.main, words + more)

def test_one_process_two_processes_and_micro_batches_take_the_same_steps(asked, tmp_path):
    """1 x 16, 2 x 8 and 1 x 4 x 4; a single validation row, so that rank 1 has nothing to evaluate."""
    folder = shutil.copytree(asked, tmp_path / "asked")
    np.save(folder / "split.npy", np.repeat(np.arange(3, dtype=np.uint8), [110, 1, 9]))
    fields = dict(max_steps=6, warmup_steps=1, save_every=1, keep=0, **BOTH)
    ends = wait(*start_pair("", tmp_path / "two", data_dir=folder, batch_size=8, **fields))
    assert [end.code for end in ends] == [0, 0], ends[0].err + ends[1].err
    train_here(folder, tmp_path / "one", batch_size=16, **fields)
    train_here(folder, tmp_path / "micro", batch_size=4, grad_accum=4, **fields)
    before = read_file(tmp_path / "one/step-00000001.safetensors")[0]
    one, two, micro = (last_checkpoint(tmp_path / name)[1] for name in ("one", "two", "micro"))
    assert all((one[name] - before[name]).abs().max() > 5e-3 for name in ("model.prop.weight", "model.part.weight"))
    for other in (two, micro):
        for name, tensor in one.items():
            if name.startswith("model."):                               # a key's bias has no gradient but rounding
                assert (other[name] - tensor).abs().max() < (1e-3 if name.endswith("qkv.bias") else 1e-5), name
    tables = [measured(tmp_path / name)["table"] for name in ("one", "two", "micro")]
    nll = [next(iter(table.values()))["val NLL"] for table in tables]
    assert nll == pytest.approx([nll[0]] * 3, rel=1e-5) and tables[1]["val rows"]["n"] == 1

@pytest.mark.parametrize("rows", [1, 2, 20])
def test_ranks_share_an_evaluation_row_by_row(data, model, monkeypatch, rows):
    config, taken, passes = small_config(**BOTH), [], train_edl.passes
    whole = evaluate(model, data, config, "val", rows)
    assert list(whole) == ["loss", "nll", "vacuity", "total", "aleatoric", "epistemic"]
    monkeypatch.setattr(train_edl, "passes", lambda *a: (taken.append(a[2].tolist()), passes(*a))[1])
    monkeypatch.setattr(train_edl, "world_size", lambda: 2)
    monkeypatch.setattr(train_edl.dist, "all_reduce", lambda total: None)               # the test adds up itself
    shares = []
    for rank in range(2):
        monkeypatch.setattr(train_edl, "rank", lambda: rank)
        shares.append(evaluate(model, data, config, "val", rows))
    assert [*map(len, taken)] == [(rows + 1) // 2, rows // 2] and len({*taken[0], *taken[1]}) == rows
    assert {*taken[0], *taken[1]} <= set(data.rows["val"].tolist()) and taken[0] != data.rows["val"][:rows:2].tolist()
    assert {name: shares[0][name] + shares[1][name] for name in whole} == pytest.approx(whole, rel=1e-6)


# -------------------------------------------------------------------------------------------------------------- samples
WISH = dict(props="logp", scaffold=True)
WISHES = [(scaffold, (logp, 60.0), smiles) for scaffold, low, high in (
    ("c1ccccc1", "Cc1ccccc1", "NCCCc1ccccc1"), ("C1CC1", "OC1CC1", "CCCCC1CC1"), ("", "CCO", "NCCCCCN"))
    for logp, smiles in ((1.0, low), (3.0, high))]

@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run of a small model of molecules that their property and scaffold decide -> (model, data, config)."""
    rows = [(split, smiles, scaffold, props) for split in (0, 1) for scaffold, props, smiles in WISHES]
    folder = tmp_path_factory.mktemp("wishes")
    train_here(write_set(folder / "set", rows), folder / "out/wish", max_steps=400, batch_size=18, learning_rate=5e-3,
               warmup_steps=20, **WISH)
    model = load_model(folder / "out/wish/best.safetensors")
    config = Config(**model.about["config"])
    return model, load_data(config), config

def test_each_wish_gets_its_molecule(learned):
    """Molecules of a batch differ in length, so that some rows end before others; 8 divides neither 5 nor 100."""
    model, data, _ = learned
    for scaffold in "c1ccccc1", "C1CC1", "":
        wanted, props = {logp: x for ring, (logp, _), x in WISHES if ring == scaffold}, [1.0, 3.0, 3.0, 1.0, 3.0] * 20
        made = generate(model, 100, 1.0, 0, (), 2, 8, torch.tensor(props)[:, None], ids_of(data, scaffold))
        hits = Counter(logp for logp, molecule in zip(props, made) if molecule["smiles"] == wanted[logp])
        assert hits[1.0] >= 36 and hits[3.0] >= 54, (scaffold, hits)    # of 40 and 60

def test_the_same_seed_gives_the_same_molecules(data, model):
    def draw(props=[60.0, 2.0], scaffold=scaffold_of(data, 5)):
        return generate(model, 11, seed=3, batch_size=4, props=props, scaffold=scaffold)
    made = draw()
    assert made == draw() == draw(torch.tensor([[60.0, 2.0]] * 11), [scaffold_of(data, 5)] * 11)
    for other in draw([60.0, 3.0]), draw([90.0, 2.0]), draw(scaffold=scaffold_of(data, 6)), draw(scaffold=[]):
        assert other != made

def test_conditions_of_each_row_are_as_if_it_were_alone(data, model):
    """Greedily, so that no other row's chance comes in."""
    rows = [row for row in data.rows["train"] if data.prefix[row] == np.median(data.prefix)][:5]
    scaffolds, props = [scaffold_of(data, row) for row in rows], data.props[rows]
    made = generate(model, len(rows), top_k=1, batch_size=2, props=props, scaffold=scaffolds)
    alone = [generate(model, 1, top_k=1, props=one, scaffold=scaffold)[0] for one, scaffold in zip(props, scaffolds)]
    assert len(rows) > 3 and len({m["smiles"] for m in made}) > 3
    for one, other in zip(made, alone):
        assert one["smiles"] == other["smiles"] and one["nll"] == pytest.approx(other["nll"], abs=1e-5)

@torch.no_grad()
@pytest.mark.parametrize("fields", [BOTH, BOTH | dict(use_edl=False), dict(props="logp"), dict(scaffold=True)],
                         ids=["both", "plain", "p", "s"])
@pytest.mark.parametrize("prompt, temperature", [("", 1.0), ("CC", 0.5)])
def test_scores_of_a_sample_are_those_of_the_full_forward(asked, fields, prompt, temperature):
    data = load_data(Config(data_dir=str(asked), props=fields.get("props", ""), scaffold="scaffold" in fields))
    model, prompt, props = reader(data, **fields), ids_of(data, prompt), None
    if model.prop_names:
        props = torch.tensor([[40.0, 1.0], [90.0, 3.0], [60.0, -2.0]] * 4)[:, -len(model.prop_names):]
    scaffold = scaffold_of(data, 7) if model.scaffold else []
    for i, molecule in enumerate(generate(model, 12, temperature, 0, prompt, 1, 5, props, scaffold)):
        ids, count = ids_of(data, molecule["smiles"]) + [EOS] * molecule["finished"], molecule["tokens"]
        assert ids[:len(prompt)] == prompt and count == len(ids) - len(prompt)
        tokens, begin = torch.tensor([[*scaffold, BOS, *ids[:-1]]]), torch.tensor([len(scaffold)])
        logits = model(tokens, None, begin, None if props is None else props[i:i + 1])[0, -count:]
        log_e = log_evidence(logits, model.evidence)
        wanted = {"nll": F.cross_entropy(log_e, torch.tensor(ids[-count:]), reduction="none")}
        wanted |= {"total": torch.distributions.Categorical(logits=log_e).entropy()} if model.evidence == "none" else {
            "vacuity": len(data.vocab) / (1 + log_e.exp()).sum(-1)}
        for name, values in wanted.items():
            assert molecule[name] == pytest.approx(values.mean().item(), abs=1e-4), name
            assert molecule[f"max_{name}"] == pytest.approx(values.max().item(), abs=1e-4), name


# --------------------------------------------------------------------------------------------- report.py piece by piece
@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"edl_evidence": "softplus"}, {"use_edl": False}], ids=["exp", "soft", "plain"])
def test_scores_of_rows_are_those_of_each_row_alone(data, fields):
    model, rows = reader(data, **BOTH | fields), data.rows["train"][[5, 60, 3, 17, 40, 41, 2]]
    found = report.score(train_edl, model, data, rows)
    means, K = report.by_row(found), len(data.vocab)
    assert sorted(set(found["row"])) == sorted(rows) and len({len(x) for x in found.values()}) == 1
    for i, row in enumerate(sorted(rows)):
        one = get_rows(data, np.array([row]))
        logits = ask(model, one)[0][one["mask"][0]].double()
        targets = torch.tensor([*ids_of(data, smiles_of(data, row)), EOS])
        e = {"exp": logits.clamp(-15, 15).exp(), "softplus": F.softplus(logits), "none": logits.exp()}[model.evidence]
        p, y = e / e.sum(-1, keepdim=True), F.one_hot(targets, K)
        alpha = 1 + e
        wanted = {"nll": -(p * y).sum(-1).log(), "confidence": p.amax(-1), "correct": p.argmax(-1) == targets,
                  "brier": ((p - y) ** 2).sum(-1)}
        mean = p if model.evidence == "none" else alpha / alpha.sum(-1, keepdim=True)
        wanted["total"] = -(mean * mean.log()).sum(-1)
        wanted |= {} if model.evidence == "none" else {"vacuity": K / alpha.sum(-1)}
        for name, values in wanted.items():
            there = found[name][found["row"] == row]                    # in the order of the targets
            assert there == pytest.approx(values.numpy(), abs=1e-4 if name == "nll" else 1e-5), name
            if name not in ("confidence", "correct", "brier"):
                assert means[name][i] == pytest.approx(there.astype(float).mean(), rel=1e-6)
                assert means[f"max_{name}"][i] == there.max()
    names = ["nll", "total"] if model.evidence == "none" else ["nll", *train_edl.UNCERTAINTY]
    assert list(means) == [x for name in names for x in (name, f"max_{name}")]

def test_translation_maps_what_it_can_and_counts_the_others(toy, tmp_path):
    data = load_data(Config(data_dir=str(toy), scaffold=True))          # knows no I, and 12 positions
    rows = [(0, "CCC", "C1CC1"), (0, "CIC", ""), (0, "C" * 12, ""), (0, "CCO", ""), (1, "CN", "CI"),
            (1, "NC", "C" * 13), (1, "OCC", "C" * 12), (1, "C" * 11, ""), (2, "CCIICCCCCCCCCCCC", "")]
    vocab = [*train_edl.SPECIALS, "I", "c", "N", "C", "1", "O"]         # in another order
    far = load_data(Config(data_dir=str(write_set(tmp_path / "far", [(*row, (0, 0)) for row in rows], vocab=vocab)),
                           scaffold=True))
    found, left_out = report.translate(far, data, {"CCO", "CIC"})
    assert left_out == {"tokens the model does not know": 3, "longer than the model": 2, "known from training": 2}
    assert found.rows["far"].tolist() == [0, 7] and not far.canonical   # OCC is CCO, which is known
    for row in found.rows["far"]:
        assert smiles_of(found, row) == smiles_of(far, row) == rows[row][1]
        assert "".join(data.vocab[i] for i in scaffold_of(found, row)) == rows[row][2]
        one = get_rows(found, np.array([row]))
        assert one["targets"][0][one["mask"][0]].tolist() == [*ids_of(data, rows[row][1]), EOS]
        assert one["tokens"][0, found.prefix[row]] == BOS
    assert data.block == 12 and smiles_of(far, 1) == "CIC"                  # the far set itself is as it was

def test_molecules_are_asked_for_like_those_of_training_rows(data, toy):
    def asked(data, n, seed, **how):
        """What generate() is asked for by generate_like(): lists of n, seed, props, scaffold and the rest."""
        def note(model, n, seed, props, scaffold, **how):
            calls.append((n, seed, props, scaffold, how))
            return [None] * n
        calls, script = [], types.SimpleNamespace(get_rows=get_rows, generate=note)
        assert len(report.generate_like(script, None, data, n, seed, **how)) == n
        return list(zip(*calls))

    def pairs(props, scaffolds):
        return [(*wish, *ring) for one in zip(props, scaffolds) for wish, ring in zip(*(x.tolist() for x in one))]
    number, seeds, *found, how = asked(data, 50, 4, top_k=3)
    rows = np.random.default_rng(4).choice(data.rows["train"], 50)
    assert Counter(pairs(*found)) == Counter((*data.props[row].tolist(), *scaffold_of(data, row)) for row in rows)
    assert number == tuple(map(len, found[0])) == tuple(map(len, found[1])) and how == ({"top_k": 3},) * len(how)
    assert len(set(seeds)) == len(seeds) > 5
    assert pairs(*asked(data, 50, 4)[2:4]) == pairs(*found) != pairs(*asked(data, 50, 5)[2:4])
    (n,), (seed,), (props,), (scaffold,), _ = asked(load_data(Config(data_dir=str(toy))), 7, 9)
    assert (n, seed, props, scaffold.shape) == (7, 9, None, (7, 0))

def test_the_groups_of_a_model(data, model):
    def found(**fields):
        fields = dict(prop_names=[], scaffold=False, block=50, vocab=data.vocab) | fields
        groups, left_out = report.conditions(train_edl, types.SimpleNamespace(**fields))
        unread.append(left_out)
        return [tuple(group.values()) for group in groups]
    unread, rings, ids = [], metrics.SCAFFOLDS, {scaffold: ids_of(data, scaffold) for scaffold in metrics.SCAFFOLDS}
    grid = [{"tpsa": tpsa, "logp": logp} for tpsa in (30, 90) for logp in (1, 3)]
    assert [tuple(group.values()) for group in report.conditions(train_edl, model)[0]] == [
        (values, ring, ids[ring]) for ring in rings for values in grid]
    kept = [ring for ring in rings if "[nH]" not in ring and len(ids[ring]) <= 24]
    assert len(kept) == 3 and 24 in [len(ids[ring]) for ring in kept]
    some = found(prop_names=["qed"], scaffold=True, block=24, vocab=[x for x in data.vocab if x != "[nH]"])
    assert [ring for _, ring, _ in some] == [ring for ring in kept for _ in range(3)]
    assert unread == [[ring for ring in rings if ring not in kept]]
    assert found(prop_names=["qed"]) == [({"qed": value}, None, []) for value in (0.6, 0.725, 0.85)]
    assert found(scaffold=True) == [({}, ring, ids[ring]) for ring in rings] and found() == []

@pytest.mark.parametrize("text, values", [
    ("logp=2,tpsa=60", [60, 2]), ("tpsa=60,logp=2", [60, 2]), (" logp = -1.5 , tpsa = +60. ", [60, -1.5]),
    ("logp=.5,tpsa=-0", [0, 0.5]), ("logp=2,,tpsa=60,", [60, 2])])
def test_wishes_that_can_be_read(text, values):
    found = report.read_condition(["tpsa", "logp"], False, text, "")
    assert [*found["values"].items()] == [*zip(("tpsa", "logp"), values)] and found["scaffold"] is None

@pytest.mark.parametrize("smiles, scaffold, said", [
    ("c1ccccc1", "c1ccccc1", ""), ("C1=CC=CC=C1", "c1ccccc1", ""), ("none", "", ""),
    ("Cc1ccccc1", "c1ccccc1", "is c1ccccc1"), ("CCO", "", "is none: acyclic"),
    ("OC1CC[C@H](c2ccccc2)C1", "c1ccc(C2CCCC2)cc1", "is c1ccc(C2CCCC2)cc1")])
def test_scaffolds_that_can_be_read(capsys, smiles, scaffold, said):
    assert report.read_condition([], True, "", smiles) == {"values": {}, "scaffold": scaffold}
    told = capsys.readouterr().out
    assert told.count("\n") == bool(said) and said in told and (smiles in told or not said)

@pytest.mark.parametrize("names, with_scaffold, values, scaffold, said", [
    (["logp", "qed"], False, "", "", "--prop_values (missing): the model was trained with logp, qed: give a number for "
     "each, as logp=2,qed=0.725"), (["logp"], False, "logp=2,qed=1", "", "with logp: give"),
    (["logp"], False, "qed=1", "", "with logp: give"), (["logp", "qed"], False, "logp=2", "", "with logp, qed"),
    (["logp"], False, "logp", "", "with logp"), (["logp"], False, "logp=", "", "with logp"),
    (["logp"], False, "logp=nan", "", "logp=nan"), (["logp"], False, "logp=inf", "", "logp=inf"),
    (["logp"], False, "logp=1e5", "", "logp=1e5"), (["logp"], False, "logp=" + "9" * 400, "", "with logp"),
    ([], False, "logp=1", "", "trained without properties"), ([], False, "", "c1ccccc1", "trained without scaffolds"),
    ([], False, "", "none", "without scaffolds"), ([], True, "", "", "with scaffolds: give one, or the word none"),
    ([], True, "", "C1CC", "RDKit cannot read it"), ([], True, "", "what?", "RDKit cannot read it")])
def test_wishes_that_no_model_of_these_can_meet(refused, names, with_scaffold, values, scaffold, said):
    assert said in refused(report.read_condition, names, with_scaffold, values, scaffold)


# ------------------------------------------------------------------------------------------------------- whole reports
def reported(models, folder, *arguments, **fields):
    """report() of {name: (model, data, config)} -> (its answer, eval.json, what it said)"""
    said = []
    table = report.report(train_edl, models, folder, *arguments, log=said.append, **fields)
    return table, measured(folder), "\n".join(said)

def test_the_report_of_a_conditional_model(learned, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SCAFFOLDS", ("c1ccccc1", "C1CC1", "c1ccsc1"))          # the last one it cannot read
    model, data, config = learned
    table, found, said = reported({"wish": learned}, tmp_path, 60)
    groups = [{"values": {"logp": logp}, "scaffold": scaffold} for logp in (1.0, 2.0, 3.0)
              for scaffold in ("c1ccccc1", "C1CC1")]
    for group in groups:
        made = generate(model, 11, seed=0, props=[group["values"]["logp"]], scaffold=ids_of(data, group["scaffold"]))
        group["smiles"] = [molecule["smiles"] for molecule in made]
    wanted = metrics.on_target(groups)
    wanted["valid_asked"] = wanted.pop("valid")
    assert found["table"] == table and list(table) == ["wish", "6-gram", "unigram", "val rows"]
    assert {name: table["wish"][name] for name in wanted} == pytest.approx(wanted)
    assert wanted["scaffold_match"] > 0.6 and {"mad_logp", "sd_logp"} < wanted.keys()
    assert table["wish"]["val NLL"] == pytest.approx(evaluate(model, data, config)["nll"], rel=1e-6)
    others = metrics.on_target([group | {"smiles": [smiles for *_, smiles in WISHES]} for group in groups])
    assert {name: table["val rows"][name] for name in others if name != "valid"} == pytest.approx(
        {name: value for name, value in others.items() if name != "valid"})
    assert wanted.keys() <= table["6-gram"].keys() and "valid_asked" in table["unigram"]
    assert re.search(r"^scaffold_match +[01]\.\d{4} ", said, re.M) and "novel" in table["wish"]

def test_rows_of_another_kind_are_compared_at_equal_lengths(learned, tmp_path, monkeypatch):
    """The AUROC of nll over all pairs of a far and a held-out row."""
    model, data, _ = learned
    texts = (0, "COC"), (0, "OOO"), (0, "CCO"), (0, "CON"), (1, "CCCCC"), (2, "OCCCCCC")                # CCO is known
    write_set(tmp_path / "far", [(split, text, "", (len(text) / 3, 0)) for split, text in texts])
    picked, beside, same_lengths, tell_apart = [], [], report.same_lengths, report.tell_apart
    monkeypatch.setattr(report, "same_lengths", lambda *a: (picked.append(same_lengths(*a)), picked[-1])[1])
    monkeypatch.setattr(report, "tell_apart", lambda *a: (beside.append(a), tell_apart(*a))[1])
    _, found, said = reported({"wish": learned}, tmp_path, 40, far_dir=str(tmp_path / "far"))
    ((i, j),), (both, strange) = picked, beside[-1]                     # the first one is of its own invalid samples
    far, _ = report.translate(load_data(Config(data_dir=str(tmp_path / "far"), **WISH)), data, {"CCO"})
    assert list(found["left out of far_dir"].values()) == [0, 0, 1, 3] and strange.sum() == 2
    nll = [[report.score(train_edl, model, x, rows[k:k + 1])["nll"].mean() for k in range(2)] for x, rows in (
        (data, data.rows["val"][i]), (far, far.rows["far"][j]))]
    assert sorted(data.length[data.rows["val"][i]]) == sorted(far.length[far.rows["far"][j]]) == [4, 8]
    for scores, which in zip(nll, (~strange, strange)):
        assert sorted(both["nll"][which]) == pytest.approx(sorted(scores), abs=1e-6)
    wins = [float(b > a) + (b == a) / 2 for a in nll[0] for b in nll[1]]
    assert found["tell apart"]["wish far"]["nll"]["AUROC"] == pytest.approx(np.mean(wins))
    assert f"far: 2 of {tmp_path / 'far'} and as many val rows of the same lengths; left out: 0 tokens" in said

@pytest.mark.parametrize("why", ["2 known from training", "2 without a held-out row of its length"])
def test_a_far_set_that_has_nothing_to_compare_is_refused(learned, tmp_path, refused, why):
    write_set(tmp_path / "far", [(k, "CCO" if "known" in why else "CCOC", "", (0, 0)) for k in (0, 1)])
    said = refused(reported, {"wish": learned}, tmp_path, 10, far_dir=str(tmp_path / "far"))
    assert f"{tmp_path / 'far'}: none of its 2 molecules" in said and why in said

@pytest.mark.parametrize("name", ["vacuity", "nll"])
def test_a_nan_does_not_get_into_the_json(learned, tmp_path, monkeypatch, name):
    score, nan = report.score, lambda found: {name: np.where(found["row"] == 6, np.nan, found[name])}
    monkeypatch.setattr(report, "score", lambda *a: (found := score(*a)) | nan(found))
    with contextlib.suppress(ValueError):                               # a refusal is as good
        report.report(train_edl, {"wish": learned}, tmp_path, 10)
    assert "NaN" not in ((tmp_path / "eval.json").read_text() if (tmp_path / "eval.json").exists() else "")


# --------------------------------------------------------------------------------------------------- eval and sample
@pytest.fixture(scope="module")
def far(asked, data, tmp_path_factory):
    """Twelve test rows written backwards, which no training row is; and five that are left out."""
    smiles = ["".join(reversed(tokenize(smiles_of(data, row)))) for row in data.rows["test"][:12]]
    rows = [(0, text, "", (2.0,)) for text in smiles] + [(1, smiles_of(data, row), "", (1.0,)) for row in (0, 33)]
    rows += [(1, "CCI", "", (0.0,)), (1, "C" * 80, "", (9.0,)), (2, "CCO", "C" * 80, (0.0,))]
    return write_set(tmp_path_factory.mktemp("far") / "set", rows, names=("logp",))

@pytest.fixture(scope="module")
def runs(asked, tmp_path_factory):
    """Three dry runs, evidential, plain and conditional -> the folder of them."""
    out = tmp_path_factory.mktemp("runs") / "out"
    words = f"--dry_run --device cpu --data_dir {asked} --out_dir {out} --run_name "
    for more in "a", "b --no_edl", "c --props logp --scaffold --train_rows 60":
        train_edl.main((words + more).split())
    return out

def evaluated(out, name, *more):
    """eval in this process -> eval.json"""
    words = f"eval --out_dir {out} --device cpu --num_samples 40 --run_name {name}"
    train_edl.main([*words.split(), *map(str, more)])
    return measured(out / name)

def test_eval_of_two_runs_beside_a_far_set(runs, far):
    words = f"eval --run_name a --beside b,a --far_dir {far} --out_dir {runs} --device cpu --num_samples 40"
    end, = wait(start(ROOT / "train_edl.py", *words.split(), cwd=runs.parent))
    assert (end.code, end.err) == (0, ""), end.err
    both, columns = measured(runs / "a"), ["a", "b", "6-gram", "unigram", "val rows"]
    apart, kept = both["tell apart"], both["share at 10 ... 100 % kept"]
    assert list(both["table"]) == columns and re.search("^ +" + " +".join(columns) + "$", end.out, re.M)
    assert [x for x in apart if "far" in x] == ["a far", "b far"] and re.search("a far .*b far$", end.out, re.M)
    assert list(apart["b far"]) == ["nll", "max_nll", "total", "max_total"] and len(apart["a far"]) == 10
    assert all(0 <= pair[x] <= 1 for of in apart.values() for pair in of.values() for x in ("AUROC", "AUPR"))
    left_out = {"tokens the model does not know": 1, "longer than the model": 1, "known from training": 2,
                "without a held-out row of its length": 1}
    assert both["left out of far_dir"] == left_out and (both["n"], both["far_dir"]) == (40, str(far))
    assert f"far: 12 of {far} and as many test rows of the same lengths; left out: 1 tokens" in end.out
    assert "mean vacuity" in both["table"]["a"] and "mean vacuity" not in both["table"]["b"]
    for name in "selective.png", "roc.png":
        with Image.open(runs / "a/samples" / name) as picture:
            assert picture.format == "PNG" and picture.size[0] > 300
    assert set(kept) == {"valid", "valid and novel"} and {len(x) for of in kept.values() for x in of.values()} == {10}
    for name in "ab":                                                   # what each run gives alone
        alone = evaluated(runs, name, "--far_dir", far)
        assert alone["table"][name] == both["table"][name] and list(alone["table"]) == [name, *columns[2:]]
        assert alone["tell apart"] == {title: of for title, of in apart.items() if title.startswith(f"{name} ")}

def test_eval_of_a_conditional_run(runs, far, asked):
    alone, data = evaluated(runs, "c", "--far_dir", far), load_data(Config(data_dir=str(asked), train_rows=60))
    table, known = alone["table"], sum(row in data.rows["train"] for row in (0, 33))
    assert [*alone["left out of far_dir"].values()][:3] == [1, 2, known]
    rows = [Chem.MolFromSmiles(smiles_of(data, row)) for row in data.rows["val"]]
    logp = np.array([metrics.PROPERTIES["logp"](molecule) for molecule in rows])
    wanted = {"mad_logp": np.abs(logp[:, None] - [1, 2, 3]).mean(), "sd_logp": logp.std(), "valid_asked": 1}
    assert {name: table["val rows"][name] for name in wanted} == pytest.approx(wanted)
    assert "scaffold_match" in table["val rows"] and all("valid_asked" in column for column in table.values())
    both = evaluated(runs, "c", "--beside", "a", "--far_dir", far)["table"]
    assert both["c"] == table["c"] and both["a"]["valid_asked"] == both["a"]["valid"]   # as they are, by c's wishes
    other = evaluated(runs, "a", "--beside", "c")["table"]
    assert not [name for name in other["c"] if "target" in name or "mad" in name]
    assert other["c"] == {name: table["c"][name] for name in other["c"]}

def test_a_far_set_without_the_conditions_is_refused(runs, tmp_path, refused):
    plain = write_data(tmp_path / "plain", ["CCO"], ["CO"])
    said = refused(evaluated, runs, "c", "--far_dir", plain)
    assert str(plain) in said and "holds no logp, scaffold" in said
    assert "nowhere" in refused(evaluated, runs, "a", "--far_dir", tmp_path / "nowhere")

def draw(runs, name, path, *more):
    train_edl.main([*f"sample --run_name {name} --out_dir {runs} --device cpu --out {path}".split(), *more])

def test_samples_made_to_measure(runs, tmp_path, capsys):
    words = "--num_samples 9 --prop_values logp=-1.5 --scaffold_smiles Cc1ccccc1 --prompt CC --batch_size 4"
    draw(runs, "c", tmp_path / "some.csv", *words.split())
    said, model = capsys.readouterr().out, load_model(runs / "c/best.safetensors")
    assert "its Bemis-Murcko scaffold is c1ccccc1" in said and re.search(r"some.csv: n 9, valid \d", said)
    how = dict(prompt=ids_of(model, "CC"), batch_size=4, props=[-1.5], scaffold=ids_of(model, "c1ccccc1"))
    made = generate(model, 9, **how)
    with open(tmp_path / "some.csv", newline="") as file:
        rows = [(row["smiles"], float(row["nll"])) for row in csv.DictReader(file)]
    assert rows == [(molecule["smiles"], molecule["nll"]) for molecule in made]
    assert made != generate(model, 9, **how | dict(scaffold=[]))

def test_the_program_says_how_near_the_samples_are(learned, tmp_path):
    """In a process of its own, with a model that makes valid ones."""
    words = f"sample --run_name wish --out_dir {learned[2].out_dir} --device cpu --num_samples 30 --scaffold_smiles"
    end, = wait(start(ROOT / "train_edl.py", *words.split(), "none", "--prop_values", " logp = 3.0 ", cwd=tmp_path))
    assert (end.code, end.err) == (0, "")
    smiles = [line.split(",")[0] for line in (tmp_path / "samples.csv").read_text().splitlines()[1:]]
    assert len(smiles) == 30 and smiles.count("NCCCCCN") >= 25
    molecules = [molecule for molecule in map(Chem.MolFromSmiles, smiles) if molecule and molecule.GetNumAtoms()]
    mad = np.mean([abs(metrics.PROPERTIES["logp"](molecule) - 3) for molecule in molecules])
    assert re.match(f"samples.csv: n 30, .*mad_logp {mad:.4g}, sd_logp .*scaffold_match .* temperature 1.0$", end.out)

@pytest.mark.parametrize("name, words, said", [
    ("c", "--scaffold_smiles none", "--prop_values (missing)"), ("c", "--prop_values logp=2", "--scaffold_smiles"),
    ("c", "--prop_values mass=2 --scaffold_smiles none", "mass=2"), ("a", "--prop_values logp=2", "without prop"),
    ("a", "--scaffold_smiles c1ccccc1", "without scaff"), ("c", "--prop_values logp=2 --scaffold_smiles C1CP1", "'P'"),
    ("c", "--prop_values logp=2 --scaffold_smiles C1CC", "RDKit"), ("c", "--prop_values logp=x", "logp=x"),
    ("c", "--prop_values logp=2 --scaffold_smiles C1" + "C" * 90 + "1", "tokens, the longest molecule")])
def test_samples_that_cannot_be_drawn(runs, refused, tmp_path, name, words, said):
    assert said in refused(draw, runs, name, tmp_path / "none.csv", *words.split())
    assert not (tmp_path / "none.csv").exists()

@pytest.mark.parametrize("test_rows", [0, 30])
def test_runs_of_other_data_are_refused(runs, asked, data, tmp_path, refused, test_rows):
    smiles = [smiles_of(data, row) for row in range(120)]
    other = write_data(tmp_path / "other", smiles[60:], smiles[:30], smiles[30:30 + test_rows], vocab=data.vocab)
    train_here(other, runs / f"d{test_rows}", max_steps=1)
    said = refused(evaluated, runs, "a", "--beside", f"d{test_rows}")
    assert f"d{test_rows} has other held-out rows than a" in said
