"""train_adapter.py as a whole: a toy's base and its adapter, an adapter of a diffusers folder, in real processes that
are killed, stopped and fed with faults; the files they leave, and what is refused. On a few scenes and latents.
"""
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_tools import (SD1, arm, assert_same_run, build_set, copy_scripts, main_here, main_stops, quicken, rows_of,
                           run_in_pair, small_config, strict, train_here, training, write_latents)
from edl_tools import assert_same_bits, finite, last_checkpoint, metrics_of, one_line, start, wait, weights_of
from safetensors.torch import load_file, save_file

import autopsy
import train_adapter
from data.scenes import report
from data.scenes.diffusers_folder import GATED, part_sha256
from runs import checkpoints, read_file, write_file

RUN = dict(batch_size=4, max_steps=20, save_every=5, eval_every=10, log_every=5, keep=0)    # what is interrupted below


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_set(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return write_latents(tmp_path_factory.mktemp("latents") / "mine")


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        yield


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    """The run of a base that has learnt a little."""
    folder = tmp_path_factory.mktemp("base") / "toy"
    train_here(folder, data_dir=data, phase="base", **RUN | dict(max_steps=60, save_every=0))
    return folder


@pytest.fixture(scope="module")
def ways(data, latents, base):
    """What is interrupted below: the fields of a base, of adapters."""
    adapter = dict(data_dir=str(data), phase="adapter", base=str(base))
    return {"base": dict(data_dir=str(data), phase="base"), "adapter": adapter,
            "accum": adapter | dict(grad_accum=2, batch_size=2),
            "latents": dict(data_dir=str(latents), phase="adapter", base=str(SD1), batch_size=2)}


@pytest.fixture(scope="module")
def straight(ways, tmp_path_factory):
    """20 steps of each without interruption -> way: folder."""
    home = tmp_path_factory.mktemp("straight")
    for way, fields in ways.items():
        train_here(home / way, **RUN | fields)
    return {way: home / way for way in ways}


@pytest.fixture
def refused(capsys):
    """refused(words...) -> the one line on stderr of main(words), after its exit code was found to be 2."""
    def call(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main_here(*words)
        assert stop.value.code == 2
        return one_line(capsys.readouterr().err)
    return call


def in_child(fault, folder, env={}, whole=False, **fields):
    """main() of a run that meets the fault, in a process of its own -> that process, which is under way. whole: with
    the table and the pictures."""
    def target():
        os.environ |= env
        seen, patch = arm(fault, pytest.MonkeyPatch()), pytest.MonkeyPatch()
        for name, function in WHOLE.items() if whole else ():
            patch.setattr(report, name, function)
        try:
            main_here(*training("", folder, **fields)[1:])
        finally:
            print(f"weights {weights_of(seen[0]):08x}\n" if seen else "no step\n", end="", flush=True)   # one write
    process = multiprocessing.get_context("fork").Process(target=target, daemon=True)
    process.start()
    return process


def in_children(fault, folder, **more):
    """Two processes of one run, as torchrun would start them, to their ends -> their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [ended(process) for process in [in_child(fault, folder, {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        **more) for rank in range(2)]]


def ended(process):
    """-> its exit code, below 0 for a signal."""
    process.join(60)
    return process.exitcode


WHOLE = {name: getattr(report, name) for name in ("table", "pairs", "gate_curves")}         # before quicken()


def resume(folder, *words):
    main_here("--resume", "--run_name", folder.name, "--out_dir", folder.parent, "--device", "cpu", *words)


def steps_of(folder):
    return [int(path.stem[5:]) for path in checkpoints(folder)]


def model_of(tensors):
    return {name.removeprefix("model."): x for name, x in tensors.items() if name.startswith("model.")}


def taken(tensors):
    """The steps that the optimizer has counted for its parameters."""
    return {float(x) for name, x in tensors.items() if name.endswith(".step")}


def gates_in(tensors):
    return {name: x for name, x in model_of(tensors).items() if ".alpha_" in name}


# -------------------------------------------------------------------------------------------------------- the dry run
@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """A fresh copy of the script's files, without data, git and all packages but four, and a dry run without other
    flags in it -> the folder of its runs, what was said."""
    home = tmp_path_factory.mktemp("bare")
    copy_scripts(home)
    end, = wait(start("train_adapter.py", "--dry_run", cwd=home, PYTHONPATH="blocked", PATH=""))
    assert end.code == 0 and "error:" not in end.err and "Traceback" not in end.err, end.err
    return home / "out", end


def test_a_dry_run_tells_what_it_does(dry):
    out = dry[1].out
    assert out.startswith("demo set: --batch_size ") and "\ndry run: " in out and "so building a demo set, once" in out
    name = min((path.name for path in dry[0].iterdir()), key=len)
    assert re.search(rf"^base out/{name}-base: [\d,]+ parameters, frozen, sha256 [0-9a-f]{{12}}$", out, re.M)
    assert "\nidentity at init: max |difference| = 0.0\n" in out
    parts = re.findall(r"^step \d/4 \d+\.0% \| loss (\d\.\d{4}) high_t (\d\.\d{4}) low_t (\d\.\d{4}) \| grad norm .*"
                       r"\| lr .*\| skipped 0 \| .*images/s", out, re.M)
    assert len(parts) == 8
    for loss, high, low in parts[4:]:               # the base's loss is weighted
        assert float(loss) == pytest.approx(float(high) + float(low), abs=2e-4)
    scores = r"loss \d\.\d{4}  mse_200 \S+  mse_500 \S+  mse_800 \S+"
    assert len(re.findall(f"^step [24] validation: {scores}$", out, re.M)) == 2
    assert len(re.findall(rf"^step [24] validation: {scores}  gap_200 \S+  gap_500 \S+  gap_800 \S+$", out, re.M)) == 2
    for row in ("truth", "base", "scale 0", "scale 0.5", "scale 1", "scale 1, shuffled boxes"):
        assert re.search(rf"^{row}  +(\d\.\d{{3}} *){{5}}$", out, re.M), row


@pytest.mark.parametrize("more", ["", "-base"])
def test_a_dry_run_leaves_everything(dry, more):
    name = min((path.name for path in dry[0].iterdir()), key=len)
    assert {path.name for path in dry[0].iterdir()} == {name, f"{name}-base"}
    folder = dry[0] / f"{name}{more}"
    names = {"config.json", "train.log", "train.pid", "metrics.jsonl", "best.safetensors", "eval.json", "samples",
             "step-00000002.safetensors", "step-00000004.safetensors"} | ({"final.safetensors"} if not more else set())
    assert {path.name for path in folder.iterdir()} == names            # no curves: matplotlib is blocked
    assert "no curves.png: pip install matplotlib" in (folder / "train.log").read_text()
    assert (folder / "samples/final.png").stat().st_size > 2000
    found, about, rows = strict(folder / "eval.json"), strict(folder / "config.json"), metrics_of(folder)
    assert about["commit"] == "" and set(about["config"]) == set(vars(train_adapter.Config()))
    assert about["config"]["phase"] == (more[1:] or "adapter")
    assert about["config"]["base"] == ("" if more else f"out/{name}-base")
    assert [(row["step"], row["split"]) for row in rows] == [(1, "train"), (2, "train"), (2, "val"), (3, "train"),
                                                             (4, "train"), (4, "val")]
    assert rows[0]["parts"].keys() == {"high_t", "low_t"} and rows[0]["skipped"] == 0
    columns = {"truth", "base"} | (set() if more else {
        "truth with other boxes", "scale 1, shuffled boxes", *(f"scale {scale:g}" for scale in report.SCALES)})
    assert set(found["table"]) == columns and found["rows"] == 8 and found["split"] == "test"
    assert found["table"]["truth"]["acc50"] == 1.0 and found["scores"].keys() >= {"loss", "mse_200", "mse_800"}
    if not more:                                    # the scale multiplies what the adapter adds, so 0 is the base
        assert found["table"]["scale 0"] == found["table"]["base"]
        assert [one["layer"] for one in found["layers"]] == [f"blocks.{i}" for i in range(4)]
        assert all(0 < one["attn"] < 0.01 and 0 < one["dense"] < 0.01 for one in found["layers"])
        assert len(rows[-1]["gates"]["attn"]) == 4
        stored = load_file(folder / "final.safetensors")
        assert_same_bits(stored, read_file(folder / "best.safetensors")[0])


# -------------------------------------------------------------------------------------------------- stop and go on
FAULTS = {"kill-in-save:10:0": [5], "kill:13:0": [5, 10], "term:7:0": [5, 8], "int:11:0": [5, 10, 12]}


@pytest.mark.parametrize("way, fault", [("base", "term:7:0"), ("adapter", "kill-in-save:10:0"), ("accum", "kill:13:0"),
                                        ("accum", "int:11:0"), ("latents", "kill:13:0"), ("latents", "term:7:0")])
def test_an_interrupted_run_goes_on_to_the_same_bits(ways, straight, tmp_path, capsys, way, fault):
    folder = tmp_path / "run"
    if fault.startswith("kill"):
        assert ended(in_child(fault, folder, **RUN | ways[way])) == -9
        assert bool(list(folder.glob("*.tmp.*"))) == fault.startswith("kill-in-save")
    else:                                                               # as main() returns, the exit code is 0
        with pytest.MonkeyPatch.context() as patch:
            arm(fault, patch)
            main_here(*training("", folder, **RUN | ways[way])[1:])
        assert "go on with: python train_adapter.py --resume --run_name run\n" in capsys.readouterr().out
        assert not (folder / "final.safetensors").exists()
    assert steps_of(folder) == FAULTS[fault]
    resume(folder)
    assert f"resumed at {FAULTS[fault][-1]}" in capsys.readouterr().out
    assert_same_run(folder, straight[way])


def test_a_process_killed_at_any_moment_goes_on_to_the_same_bits(ways, straight, tmp_path):
    """Eight times, from outside, 0 to 0.4 seconds after a start."""
    folder, seconds, fields = tmp_path / "run", random.Random(0), RUN | ways["accum"]
    for k in range(8):
        process = in_child("", folder, **fields, resume=True)
        time.sleep(seconds.uniform(0, 0.4))
        process.kill()
        assert ended(process) in (-9, 0)
    main_here(*training("", folder, **fields, resume=True)[1:])
    assert_same_run(folder, straight["accum"])


def test_a_larger_max_steps_extends_a_run_exactly(ways, straight, tmp_path):
    """The learning rate is constant by default, and no step depends on how many there are."""
    for way in ("adapter", "latents"):
        train_here(tmp_path / way, **RUN | ways[way] | dict(max_steps=10))
        assert steps_of(tmp_path / way) == [5, 10] and (tmp_path / way / "final.safetensors").exists()
        resume(tmp_path / way, "--max_steps", 20)
        assert_same_run(tmp_path / way, straight[way])
    for decay in ("cosine", "late"):
        train_here(tmp_path / decay, **RUN | ways["adapter"] | dict(max_steps=10, decay=decay))
        lr = rows_of(tmp_path / decay)[-1]["lr"]
        assert 0 < lr < 0.25 * 5e-3                 # of step 9 of 10


def test_a_resume_takes_the_newest_whole_checkpoint_by_its_step(ways, straight, tmp_path, capsys):
    """Not by its time; a damaged one is named and passed over."""
    folder = tmp_path / "adapter"
    shutil.copytree(straight["adapter"], folder)
    for k, step in enumerate((20, 15, 10, 5)):      # the older its step, the newer the file
        os.utime(folder / f"step-{step:08d}.safetensors", (2e9 + k, 2e9 + k))
    newest = folder / "step-00000020.safetensors"
    blob = bytearray(newest.read_bytes())
    blob[len(blob) // 2] ^= 4
    newest.write_bytes(blob)
    (folder / "step-00000015.safetensors").write_bytes((folder / "step-00000015.safetensors").read_bytes()[:-100])
    main_here("--resume", "--run_name", "adapter", "--out_dir", tmp_path)
    said = capsys.readouterr().out
    assert f"passed over a damaged checkpoint: {newest}" in said and "step-00000015.safetensors is not a whole" in said
    assert "resumed at 10\n" in said
    assert_same_run(folder, straight["adapter"])


CHAIN = RUN | dict(base_steps=10, max_steps=10)


@pytest.fixture(scope="module")
def chain(data, tmp_path_factory):
    """A base and its adapter, never interrupted -> the folder of the latter."""
    folder = tmp_path_factory.mktemp("chain") / "run"
    train_here(folder, data_dir=data, **CHAIN)
    return folder


def test_a_chain_makes_a_base_and_its_adapter(chain):
    assert {path.name for path in chain.parent.iterdir()} == {"run", "run-base"}
    config, first = (strict(folder / "config.json")["config"] for folder in (chain, chain.with_name("run-base")))
    assert (config["phase"], config["base"]) == ("adapter", str(chain.with_name("run-base")))
    assert (first["phase"], first["base"], first["decay"], first["max_steps"]) == ("base", "", "cosine", 10)
    assert_same_bits(load_file(chain / "final.safetensors"), read_file(chain / "best.safetensors")[0])
    assert not chain.with_name("run-base").joinpath("final.safetensors").exists()


@pytest.mark.parametrize("fault, at", [("kill:7:0:-base", 5), ("kill-in-save:5:0:-base", 0), ("term:7:0:-base", 8),
                                       ("kill:3:0:run", 10), ("term:7:0:run", 10)])
def test_a_chain_that_is_stopped_goes_on_with_two_flags(data, chain, tmp_path, capsys, fault, at):
    """What it was asked for stands in the last run's config.json before that run has a checkpoint."""
    folder, first = tmp_path / "run", tmp_path / "run-base"
    assert ended(in_child(fault, folder, data_dir=data, **CHAIN)) == (0 if fault.startswith("term") else -9)
    assert max([0, *steps_of(first)]) == at
    if fault.startswith("term"):
        log = ((first if fault.endswith("-base") else folder) / "train.log").read_text()
        assert log.endswith("stopped by a signal; go on with: python train_adapter.py --resume --run_name run\n")
    main_here("--resume", "--run_name", "run", "--out_dir", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run-base"}
    assert_same_run(folder, chain, 10)
    assert_same_run(first, chain.with_name("run-base"), 10)


def test_a_resumed_chain_keeps_what_was_asked(data, tmp_path, refused):
    with pytest.MonkeyPatch.context() as patch:
        arm("term:2:0:-base", patch)
        main_here(*training("", tmp_path / "run", data_dir=data, **CHAIN)[1:])
    words = ["--resume", "--run_name", "run", "--out_dir", tmp_path, "--device", "cpu"]
    assert "--seed is 0 in the checkpoint, not 9" in refused(*words, "--seed", 9)
    assert "--width is 16 in the checkpoint, not 32" in refused(*words, "--width", 32)
    assert "--base is '' in the checkpoint" in refused(*words, "--base", SD1)
    assert not checkpoints(tmp_path / "run") and steps_of(tmp_path / "run-base") == [3]


def test_the_best_checkpoint_has_the_lowest_loss_and_no_nan_wins(ways, tmp_path, monkeypatch):
    """Five evaluations; a resume remembers; final.safetensors is the best model."""
    loss = iter([math.nan, 0.9, 0.4, math.nan, 0.6])
    monkeypatch.setattr(train_adapter, "evaluate", lambda *a, **k: {"loss": next(loss, 0.5)})
    folder, fields = tmp_path / "run", ways["adapter"] | dict(batch_size=4, eval_every=2, save_every=2, keep=0)
    assert train_here(folder, max_steps=10, **fields)["best"] == 0.4
    at_6, body_6 = read_file(folder / "step-00000006.safetensors")
    for path in ("best", "final"):
        assert_same_bits(load_file(folder / f"{path}.safetensors"), model_of(at_6))
    assert body_6["best"] == 0.4 and train_here(folder, max_steps=14, resume=True, **fields)["best"] == 0.4
    assert_same_bits(read_file(folder / "best.safetensors")[0], model_of(at_6))
    assert None in [row["loss"] for row in rows_of(folder, "val")]


def test_a_look_at_samples_changes_nothing(ways, tmp_path, monkeypatch):
    train_here(tmp_path / "without", **RUN | ways["adapter"] | dict(max_steps=6))
    monkeypatch.setattr(report, "pairs", WHOLE["pairs"])
    train_here(tmp_path / "with", **RUN | ways["adapter"] | dict(max_steps=6, sample_every=2, eval_every=3,
                                                                log_every=1))
    assert_same_bits(last_checkpoint(tmp_path / "with")[1], last_checkpoint(tmp_path / "without")[1])
    names = sorted(path.name for path in (tmp_path / "with/samples").iterdir())
    assert names == [f"step-{step:08d}.png" for step in (2, 4, 6)]


# ----------------------------------------------------------------------------------------------------- two processes
def both_done(pair, *arguments):
    """run_in_pair() of a run without an end before its time -> rank 0's answer."""
    (first, answer, state), (second, _, other) = pair.run(run_in_pair, *arguments)
    assert (first, second) == ("done", "done") and state == other, answer
    return answer


def test_a_killed_pair_goes_on_to_the_same_bits(ways, pair, tmp_path, capfd):
    """kill -9 of rank 1 in the middle of step 13; two processes, with table and pictures, do what is left."""
    folder, fields = tmp_path / "run", RUN | ways["adapter"] | dict(batch_size=2)
    first, second = in_children("kill:13:1", folder, **fields)
    assert second == -9 and first not in (0, None) and steps_of(folder) == [5, 10]
    both_done(pair, tmp_path / "straight", "", fields)
    capfd.readouterr()
    assert in_children("", folder, whole=True, **fields, resume=True) == [0, 0]
    out = capfd.readouterr().out
    assert out.count("resumed at 10") == 1 == out.count("\nscale 1, shuffled boxes ")     # only rank 0 talks
    found = re.findall("weights ([0-9a-f]{8})", out)
    assert len(found) == 2 and len({*found}) == 1
    assert_same_run(folder, tmp_path / "straight")
    assert strict(folder / "eval.json")["step"] == 20 and (folder / "samples/final.png").exists()


def test_a_signal_on_one_rank_stops_both_and_the_run_goes_on(ways, pair, tmp_path):
    fields = RUN | ways["accum"]
    both_done(pair, tmp_path / "straight", "", fields)
    assert both_done(pair, tmp_path / "run", "term:6:1", fields)["step"] == 10
    assert steps_of(tmp_path / "run") == [5, 10]
    both_done(pair, tmp_path / "run", "", fields | dict(resume=True))
    assert_same_run(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("way", ["base", "adapter", "latents"])
def test_one_process_two_processes_and_micro_batches_take_the_same_steps(ways, pair, tmp_path, way):
    """1 x 8, 2 x 4 and 2 processes x 4. Weights differ by rounding alone, which Adam makes larger where a gradient is
    0 but for that."""
    fields = ways[way] | dict(max_steps=4, save_every=1, log_every=1, eval_every=2, keep=0, learning_rate=1e-3)
    both_done(pair, tmp_path / "two", "", fields | dict(batch_size=4))
    train_here(tmp_path / "one", **fields | dict(batch_size=8))
    train_here(tmp_path / "micro", **fields | dict(batch_size=4, grad_accum=2))
    before = model_of(read_file(tmp_path / "one/step-00000001.safetensors")[0])
    one, two, micro = (model_of(last_checkpoint(tmp_path / name)[1]) for name in ("one", "two", "micro"))
    assert max((one[name] - before[name]).abs().max() for name in one) > 3e-3
    for other in (two, micro):
        for name, tensor in one.items():
            assert (other[name] - tensor).abs().mean() < 1e-6, name
            assert (other[name] - tensor).abs().max() < 2e-4, name
    losses, *others = (metrics_of(tmp_path / name) for name in ("one", "two", "micro"))
    for rows in others:
        for row, wanted in zip(rows, losses, strict=True):
            for name in {"loss", "grad_norm", "mse_500"} & wanted.keys():
                assert row[name] == pytest.approx(wanted[name], rel=1e-4), (row["step"], name)
            assert row.get("parts", {}) == pytest.approx(wanted.get("parts", {}), rel=1e-4)


def test_what_two_ranks_saved_one_goes_on_with(ways, straight, pair, tmp_path):
    """And to where one would have come alone, but for rounding."""
    folder, fields = tmp_path / "run", RUN | ways["adapter"]
    both_done(pair, folder, "", fields | dict(batch_size=2, max_steps=10))
    assert strict(folder / "config.json")["world_size"] == 2
    resume(folder, "--batch_size", 4, "--max_steps", 20)
    assert strict(folder / "config.json")["world_size"] == 1 and steps_of(folder) == [5, 10, 15, 20]
    one, wanted = (model_of(last_checkpoint(path)[1]) for path in (folder, straight["adapter"]))
    assert max((one[name] - wanted[name]).abs().mean() for name in one) < 1e-5
    assert [row["loss"] for row in rows_of(folder)] == pytest.approx(
        [row["loss"] for row in rows_of(straight["adapter"])], rel=1e-4)


BAD = "nan-loss:3:1 nan-gradient:5:1 nan-output:7:1 inf-loss:11:1 nan-input:13:1"


def test_bad_batches_on_one_rank_are_skipped_by_both(ways, pair, tmp_path):
    """Skipped is as never taken: not a weight, a moment or a gate knows of it."""
    fields = RUN | ways["adapter"] | dict(batch_size=2)
    assert both_done(pair, tmp_path / "run", BAD, fields)["step"] == 20
    _, tensors, body = last_checkpoint(tmp_path / "run")
    assert finite(tensors) and taken(tensors) == {15.0}
    assert body["guard"]["skips"] == {"output": 2, "loss": 2, "gradient": 1, "float16 overflow": 0}
    assert rows_of(tmp_path / "run")[-1]["skipped"] == 5
    assert all(row["loss"] is not None for row in metrics_of(tmp_path / "run"))
    log = (tmp_path / "run/train.log").read_text()
    for step, said in {3: "loss", 5: "gradient", 7: "output, (high|low)_t", 11: "loss", 13: "output, "}.items():
        assert re.search(rf"^step {step}: (NaN|Inf) detected .*\({said}", log, re.M), said
    both_done(pair, tmp_path / "without", "", fields | dict(skip_steps="3,5,7,11,13"))
    assert_same_bits(tensors, last_checkpoint(tmp_path / "without")[1])


def test_both_ranks_stop_at_what_one_of_them_meets(ways, tmp_path, capfd):
    """In two processes, with their exit codes; the event is replayed from its files."""
    folder = tmp_path / "run"
    capfd.readouterr()
    assert in_children("nan-input:7:1", folder, **RUN | ways["adapter"] | dict(
        batch_size=2, on_nonfinite="stop")) == [3, 3]
    out, err = capfd.readouterr()
    assert err.count("STOPPED before step 7: non-finite output, ") == 2 and "Traceback" not in err
    found = re.findall("weights ([0-9a-f]{8})", out)
    assert len(found) == 2 and len({*found}) == 1
    step, tensors, _ = last_checkpoint(folder)
    assert step == 7 and finite(tensors) and taken(tensors) == {7.0}
    event, = (folder / "autopsy").iterdir()
    assert event.name == "step-00000007-rank1" and f"kept: python autopsy.py {event}" in err
    autopsy.main(event)
    out = capfd.readouterr().out
    assert "batch['clean'] already holds NaN" in out and "NaN CAME IN with: batch['clean']" in out
    assert "=== AUTOPSY step 7 rank 1 micro-batch 0" in out and " -> mul -> " in out


# ------------------------------------------------------------------------------------------------------ bad numbers
STOPS = {"nan-output": "output, ", "nan-input": "output, ", "nan-loss": "loss", "inf-loss": "loss",
         "nan-gradient": "gradient", "nan-weight": "output, "}


@pytest.mark.parametrize("fault", STOPS)
def test_the_first_bad_step_stops_the_run(ways, straight, tmp_path, monkeypatch, capsys, fault):
    """Where that was asked for. It says the step, the value, what to try; weights are those from before it."""
    folder, way = tmp_path / "run", "latents" if fault == "nan-loss" else "accum"
    arm(f"{fault}:7:0", monkeypatch)
    main_stops(folder, **RUN | ways[way] | dict(on_nonfinite="stop"))
    said, value = capsys.readouterr(), "inf" if fault == "inf-loss" else "nan"
    assert re.search(f"STOPPED before step 7: non-finite {STOPS[fault]}.* at step 7, {value}; ", said.err)
    assert ("none of it touched the weights" in said.err) == (fault != "nan-weight") != ("ALREADY" in said.err)
    assert "What to try:" in said.err and all(f"  {i}. " in said.err for i in range(1, 6))
    event, step = folder / "autopsy/step-00000007-rank0", 5 if fault == "nan-weight" else 7
    assert f"kept: python autopsy.py {event}" in said.err and "Traceback" not in said.err
    assert {path.name for path in event.iterdir()} == {"report.txt", "model.safetensors", "batch.safetensors"}
    assert last_checkpoint(folder)[0] == step and not list(folder.glob("*.nonfinite"))
    assert all(finite(read_file(path)[0]) for path in checkpoints(folder)) and not (folder / "eval.json").exists()
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        if fault in ("nan-gradient", "nan-weight"):                     # now without the fault
            resume(folder)
            assert_same_bits(last_checkpoint(folder)[1], last_checkpoint(straight[way])[1])
    if fault == "nan-weight":
        capsys.readouterr()
        autopsy.main(event)
        out = capsys.readouterr().out
        assert "NaN CAME IN with: parameter " in out and re.search("at entry: parameter .* already holds NaN", out)


@pytest.fixture(scope="module")
def huge(ways, straight, tmp_path_factory):
    """The fields of an adapter that starts from finite weights which overflow in its feed-forward."""
    path = tmp_path_factory.mktemp("huge") / "huge.safetensors"
    tensors = load_file(straight["adapter"] / "final.safetensors")
    for name in ("0.proj.bias", "2.weight"):        # 1e16 cubed; their own norm still fits
        tensors[f"blocks.0.fuser.ff.net.{name}"].fill_(1e16)
    save_file(tensors, path, {"format": "pt"})
    return RUN | ways["adapter"] | dict(adapter=str(path))


def test_an_operation_that_overflows_is_named_and_replayed_by_a_fresh_process(huge, tmp_path, capsys):
    main_stops(tmp_path / "run", **huge | dict(on_nonfinite="stop"))
    assert "STOPPED before step 0: non-finite output, " in capsys.readouterr().err
    step, tensors, _ = last_checkpoint(tmp_path / "run")
    event = tmp_path / "run/autopsy/step-00000000-rank0"
    assert step == 0 and finite(tensors)
    end, = wait(start(autopsy.__file__, event, cwd=tmp_path))
    assert end.code == 0 and "Traceback" not in end.err, end.err
    said, again = ([line for line in text.splitlines() if re.search("BORN|CAME IN|replayed|path to|  at ", line)]
                   for text in ((event / "report.txt").read_text(), end.out))
    assert said == again and len(said) >= 4
    assert re.search(r"(NaN|Inf) BORN in forward: (addmm|mm|linear|bmm).* module .*blocks\.0\.fuser\.ff\.net\.2$",
                     end.out, re.M) and re.search(r"^ +at train_adapter.py:\d+, in forward", end.out, re.M), end.out


def test_more_bad_steps_than_allowed_stop_the_run(huge, ways, tmp_path, monkeypatch, capsys):
    main_stops(tmp_path / "huge", **huge | dict(max_skips=3))
    assert "4 non-finite steps in a row" in capsys.readouterr().err and last_checkpoint(tmp_path / "huge")[0] == 5
    arm("nan-loss:2,4,6,8,9:0", monkeypatch)        # not in a row
    main_stops(tmp_path / "run", **RUN | ways["adapter"] | dict(max_skips=4))
    assert re.search(r"2 non-finite steps in a row, 5 of \d+ in total", capsys.readouterr().err)
    step, tensors, _ = last_checkpoint(tmp_path / "run")
    assert finite(tensors) and taken(tensors) == {float(step - 5)}


def test_a_base_that_overflows_is_told_in_a_line(base, ways, tmp_path, capsys):
    """As a model in float16 may: before or at the first step, but not by an assertion."""
    shutil.copytree(base, tmp_path / "toy")
    tensors, body = read_file(base / "best.safetensors")
    tensors["norm_out.weight"].fill_(3e38)
    write_file(tmp_path / "toy/best.safetensors", tensors, body)
    with pytest.raises(SystemExit) as stop:
        main_here(*training("", tmp_path / "run", **RUN | ways["adapter"] | dict(base=tmp_path / "toy"))[1:])
    assert stop.value.code in (2, 3) and re.search("finite|overflow|nan|inf", capsys.readouterr().err)


def test_a_skipped_step_is_a_step_never_taken_and_counted(ways, tmp_path, monkeypatch):
    fields = RUN | ways["accum"] | dict(max_steps=9, log_every=3)
    train_here(tmp_path / "without", skip_steps="1,3,5-7", **fields)
    arm("nan-input:1:0 nan-loss:3:0 inf-loss:5:0 nan-gradient:6:0 nan-output:7:0", monkeypatch)
    train_here(tmp_path / "skipped", **fields)
    _, tensors, body = last_checkpoint(tmp_path / "skipped")
    assert_same_bits(tensors, last_checkpoint(tmp_path / "without")[1])
    assert all(x != 0 for x in gates_in(tensors).values()) and finite(tensors)
    assert body["guard"]["skips"] == {"output": 2, "loss": 2, "gradient": 1, "float16 overflow": 0}
    assert [(row["step"], row["skipped"]) for row in rows_of(tmp_path / "skipped")] == [(3, 1), (5, 2), (6, 3), (9, 5)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["adapter", "base"])
def test_200_steps_with_faults_stay_finite(ways, tmp_path, monkeypatch, dtype, way):
    """NaN in the input, the loss and the gradient, each at 1 % of the steps, drawn at random."""
    steps = random.Random(7).sample(range(1, 200), 6)
    faults = [f"{kind}:{steps[i]},{steps[i + 1]}:0" for i, kind in zip((0, 2, 4), ("nan-input", "nan-loss",
                                                                                  "nan-gradient"))]
    seen = arm(" ".join(faults), monkeypatch)
    fields = ways[way] | dict(dtype=dtype, max_steps=200, log_every=50, batch_size=4)
    assert train_here(tmp_path / "run", **fields)["step"] == 200
    _, tensors, body = last_checkpoint(tmp_path / "run")
    assert body["guard"]["skips"] == {"output": 2, "loss": 2, "gradient": 2, "float16 overflow": 0}
    assert finite(tensors) and all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert taken(tensors) == {194.0}
    assert all(p.dtype == torch.float32 for p in seen[0].parameters())
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["skipped"] == 6 and all(row["loss"] < 3 for row in rows)
    if way == "adapter":
        assert all(0.05 < x.abs() < 3 for x in gates_in(tensors).values())
    else:
        assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


# ---------------------------------------------------------------------------------------------- what a checkpoint holds
def test_a_checkpoint_holds_the_adapter_and_its_optimizer_alone(ways, straight):
    for way in ("adapter", "latents"):
        _, tensors, body = last_checkpoint(straight[way])
        model = train_adapter.load_model(straight[way] / "best.safetensors")
        trained = dict(model.named_parameters())
        assert {*model_of(tensors)} == {*trained} == {name for name in model.base.state_dict() if GATED.search(name)}
        assert {*tensors} == {f"model.{name}" for name in trained} | {
            f"opt.{name}.{kind}" for name in trained for kind in ("exp_avg", "exp_avg_sq", "step")}
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
        frozen = {name: p for name, p in model.base.named_parameters() if name not in trained}
        assert len(frozen) > 20 and not any(p.requires_grad for p in frozen.values()) and not model.training
        count, rest = (4 * sum(p.numel() for p in some.values()) for some in (trained, frozen))       # in bytes
        assert checkpoints(straight[way])[-1].stat().st_size < 3 * count + 0.6 * rest
        assert (straight[way] / "final.safetensors").stat().st_size < count + 0.6 * rest
        assert body["config"]["base"] == ways[way]["base"] and body["config"]["learning_rate"] == 5e-3
    toy, real = (last_checkpoint(straight[way])[2]["about"]["base_sha256"] for way in ("adapter", "latents"))
    toy_file = Path(ways["adapter"]["base"]) / "best.safetensors"
    assert toy == hashlib.sha256(toy_file.read_bytes()).hexdigest() and real != part_sha256(SD1, "unet")
    assert "base_sha256" not in last_checkpoint(straight["base"])[2]["about"]


def test_a_model_opens_in_three_lines(straight, latents):
    model = train_adapter.load_model(straight["latents"] / "best.safetensors")
    batch = train_adapter.get_rows(train_adapter.load_data(small_config(data_dir=latents, base=SD1)), np.arange(3))
    out = train_adapter.predict(model, batch["clean"], torch.full((3,), 500), batch)
    assert out.shape == batch["clean"].shape and out.isfinite().all() and len(model.fusers) == 7
    assert_same_bits(dict(model.named_parameters()), read_file(straight["latents"] / "best.safetensors")[0])
    assert isinstance(train_adapter.load_model(straight["base"] / "best.safetensors"), train_adapter.ToyBase)


@pytest.mark.parametrize("share", [False, True])
def test_the_final_file_opens_on_its_base(ways, straight, latents, tmp_path, share):
    """In load_unet, and as --adapter of another run: the same predictions, to the bit."""
    folder = straight["latents"]
    if share:
        folder = tmp_path / "shared"
        train_here(folder, **RUN | ways["latents"] | dict(share_fusers=True, max_steps=3))
    model = train_adapter.load_model(folder / "best.safetensors")
    assert len(model.fusers) == (2 if share else 7)                     # widths, or blocks
    unet = train_adapter.load_unet(SD1, adapter=folder / "final.safetensors")
    unet.box_mask, unet.rms_norm = True, True
    again = train_adapter.build_model(small_config(**ways["latents"] | dict(adapter=folder / "final.safetensors")))
    batch = train_adapter.get_rows(train_adapter.load_data(small_config(data_dir=latents, base=SD1)), np.arange(4))
    with torch.no_grad():
        given = batch["clean"], torch.tensor([1, 300, 600, 999]), batch
        wanted, plain = train_adapter.predict(model, *given), train_adapter.predict(model, *given, boxes="")
        assert torch.equal(train_adapter.predict(unet, *given), wanted) and not torch.equal(wanted, plain)
        assert torch.equal(train_adapter.predict(again, *given), wanted)
        assert torch.equal(train_adapter.load_unet(SD1)(*given[:2], batch["context"]), plain)


def other_base(base, folder):
    """A copy of a base whose last weight is another."""
    shutil.copytree(base, folder)
    path = sorted(folder.rglob("*.safetensors"))[-1] if (folder / "unet").exists() else folder / "best.safetensors"
    if (folder / "unet").exists():
        path = sorted((folder / "unet").glob("*.safetensors"))[-1]
        tensors = load_file(path)
    else:
        tensors, body = read_file(path)
    name = sorted(tensors)[-1]
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, path) if (folder / "unet").exists() else write_file(path, tensors, body)


@pytest.mark.parametrize("way", ["adapter", "latents"])
def test_another_base_or_other_data_are_refused(ways, refused, tmp_path, way):
    (tmp_path / "out").mkdir()
    base, data, folder = tmp_path / "base", tmp_path / "data", tmp_path / "out/run"
    shutil.copytree(ways[way]["base"], base)
    shutil.copytree(ways[way]["data_dir"], data)
    train_here(folder, **RUN | ways[way] | dict(base=base, data_dir=data, max_steps=2))
    words = ["--resume", "--run_name", "run", "--out_dir", folder.parent, "--max_steps", 3]
    meta = (data / "meta.json").read_text()
    (data / "meta.json").write_text(json.dumps(json.loads(meta) | {"source": "elsewhere"}))
    assert f"--data_dir {data}: not the data that the checkpoint was trained on" in refused(*words)
    (data / "meta.json").write_text(meta)
    shutil.rmtree(base)
    other_base(ways[way]["base"], base)
    assert f"--base {base}: not the base that the checkpoint was trained on" in refused(*words)
    with pytest.raises(ValueError, match="was trained on another base than .*base is now"):
        train_adapter.load_model(folder / "best.safetensors")
    shutil.rmtree(base)
    assert f"--base {base}: no such folder" in refused(*words)
    shutil.copytree(ways[way]["base"], base)
    main_here(*words)
    assert steps_of(folder) == [2, 3]


# -------------------------------------------------------------------------------------------- other ways through a run
WAYS = {"box_mask": False, "rms_norm": False, "t_bias": "cubic", "decay": "late", "dtype": "bfloat16",
        "grad_clip": 1e-3, "layout_dropout": 1.0, "gate_lr": 20.0, "scale_min": 1.0, "grad_accum": 3,
        "share_fusers": True}


@pytest.mark.parametrize("way", WAYS)
def test_other_ways(ways, straight, tmp_path, way):
    usual = "latents" if way == "share_fusers" else "adapter"
    answer = train_here(tmp_path / "run", **RUN | ways[usual] | {way: WAYS[way]} | dict(save_every=0))
    _, tensors, body = last_checkpoint(tmp_path / "run")
    wanted = last_checkpoint(straight[usual])[1]
    assert finite(tensors) and sum(body["guard"]["skips"].values()) == 0 and answer["step"] == 20
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert all(x != 0 for x in gates_in(tensors).values())
    assert any(not torch.equal(x, wanted[name]) for name, x in tensors.items())
    train_adapter.load_model(tmp_path / "run/best.safetensors")
    if way == "layout_dropout":                     # boxes are never seen, so they have no gradient to learn by
        nulls = {name: x for name, x in tensors.items() if name.startswith("model.position_net.null_")}
        assert len(nulls) == 2 and all(x.any() for x in nulls.values())


def test_a_base_in_bfloat16(ways, refused, tmp_path):
    """What is trained is float32 all the same, and a resume goes on to the same bits."""
    fields = RUN | ways["latents"] | dict(base_dtype="bfloat16", max_steps=4, save_every=2)
    words = training("", tmp_path / "no", **fields)[1:]
    assert "--base_dtype bfloat16: needs --dtype bfloat16 too" in refused(*words)
    assert "--base_dtype bfloat16: needs --dtype bfloat16 too" in refused(*words, "--dtype", "float32")
    assert not (tmp_path / "no").exists()
    train_here(tmp_path / "run", dtype="bfloat16", **fields)
    train_here(tmp_path / "two", dtype="bfloat16", **fields | dict(max_steps=2))
    resume(tmp_path / "two", "--max_steps", 4)
    tensors = last_checkpoint(tmp_path / "run")[1]
    assert_same_bits(tensors, last_checkpoint(tmp_path / "two")[1])
    assert finite(tensors) and all(x.dtype == torch.float32 for x in tensors.values())
    model = train_adapter.load_model(tmp_path / "run/best.safetensors")
    assert model.base.conv_in.weight.dtype == torch.bfloat16 and all(x != 0 for x in gates_in(tensors).values())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# ----------------------------------------------------------------------------------------------------------- refusals
def valid(folder):
    return ["--device", "cpu", "--dry_run", "--max_steps", 1, "--out_dir", folder, "--width", 16, "--depth", 1,
            "--patch", 8]


@pytest.fixture(scope="module")
def bad(ways, straight, latents, tmp_path_factory):
    """name: what is no good as a base, as data or as an adapter, for one reason each."""
    home = tmp_path_factory.mktemp("bad")
    write_latents(home / "channels", channels=3), write_latents(home / "context", context=32)
    write_latents(home / "phrase", phrase=16), write_latents(home / "pooled")
    write_latents(home / "vae", vae="0" * 64)
    for name in ("pooled", "time_ids"):
        np.save(home / f"pooled/{name}.npy", np.zeros((24, 6), np.float16))
    shutil.copytree(latents, home / "train")
    np.save(home / "train/split.npy", np.full(24, 2, np.uint8))
    (home / "empty").mkdir()
    tensors = load_file(straight["adapter"] / "final.safetensors")
    save_file({name: x for name, x in tensors.items() if "alpha_dense" not in name}, home / "less.safetensors")
    save_file(tensors | {"blocks.0.fuser.alpha_attn": torch.tensor(math.nan)}, home / "nan.safetensors")
    (home / "cut.safetensors").write_bytes((straight["adapter"] / "final.safetensors").read_bytes()[:-100])
    return {"home": home, "toy": ways["adapter"]["base"], "scenes": ways["adapter"]["data_dir"], "sd1": SD1,
            "latents": latents, "adapter": straight["adapter"]} | {path.stem: path for path in home.iterdir()}


@pytest.mark.parametrize("words, said", [
    ("--learning_rat 1", "did you mean --learning_rate?"), ("words", "unknown flag words"),
    ("--phase both", "--phase both: one of base, adapter"), ("--decay x", "--decay x: one of constant, cosine, late"),
    ("--phase adapter", "--phase adapter: an adapter needs --base DIR"),
    ("--phase base --base {toy}", "--phase base: an adapter needs --base DIR, and a base has none"),
    ("--base no/where", "--base no/where: no such folder"), ("--base {less}", "no such folder"),
    ("--base {empty}", "empty has no config.json"), ("--base {adapter}", "adapter: not the run of a base"),
    ("--base {toy} --data_dir {latents}", "holds latents: a toy base needs"),
    ("--base {sd1} --data_dir {scenes}", "holds toy scenes: a toy base needs"),
    ("--base {sd1} --data_dir {channels}", "{'latents': 3,"), ("--base {sd1} --data_dir {pooled}", "pooled"),
    ("--base {sd1} --data_dir {context}", "'contexts': 32"), ("--base {sd1} --data_dir {phrase}", "'phrases': 16"),
    ("--base {sd1} --data_dir {vae}", "was prepared with another vae than that of"),
    ("--base {sd1} --data_dir {train}", "no rows to train on, or none to validate on"),
    ("--phase base --data_dir no/where", "--data_dir no/where: no prepared scenes"),
    ("--phase base --data_dir {empty}", "no prepared scenes"), ("--phase base --dtype float8", "--dtype float8"),
    ("--phase base --data_dir {latents}", "holds latents: a toy base needs"),
    ("--t_bias x", "--t_bias x: one of cubic"), ("--patch 3", "--patch 3: one of 2, 4, 8"),
    ("--base_dtype int8", "--base_dtype int8: one of float32"),
    ("--scale_min 1 --scale_max 0.5", "--scale_min must not be above --scale_max"),
    ("--scale_min -1", "--scale_min -1"),
    ("--beta 2", "--beta 2.0: must be at least 0, at most 1"), ("--beta -0.1", "--beta -0.1"),
    ("--width -8", "--width -8: must be at least 1"), ("--width 0", "--width 0"), ("--depth 0", "--depth 0"),
    ("--width 12", "--width must be a multiple of 8"), ("--gate_lr -1", "--gate_lr -1"),
    ("--phrase_dropout 1.5", "--phrase_dropout 1.5: must be at least 0, at most 1"),
    ("--layout_dropout -1", "--layout_dropout"), ("--caption_dropout nan", "--caption_dropout"),
    ("--guidance -1", "--guidance -1"), ("--sample_steps 0", "--sample_steps 0"), ("--eval_rows -1", "--eval_rows -1"),
    ("--base_steps -1", "--base_steps -1"), ("--max_epochs 0", "--max_epochs 0"), ("--batch_size 0", "--batch_size 0"),
    ("--learning_rate 0", "--learning_rate 0"), ("--on_nonfinite pray", "skip, stop"),
    ("--skip_steps x", "--skip_steps x: write steps as"),
    ("--base {toy} --adapter no/where", "no/where"), ("--base {toy} --adapter {cut}", "cut.safetensors"),
    ("--base {toy} --adapter {less}", "blocks.0.fuser.alpha_dense"),
    ("--base {sd1} --adapter {less}", "less.safetensors"),
    ("--base {toy} --adapter {nan}", "not finite"), ("--base {toy} --adapter {adapter}", "adapter"),
    ("--phase base --max_steps -1", "--max_steps -1"), ("--resume", "--resume needs --run_name")])
def test_bad_flags_are_refused(bad, refused, tmp_path, words, said):
    data = [] if "--data_dir" in words else ["--data_dir", bad["latents" if "{sd1}" in words else "scenes"]]
    assert said in refused(*valid(tmp_path / "out"), *data, *words.format(**bad).split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words, said", [
    ("--data_dir no/where", "--data_dir no/where"), ("--data_dir {latents}", "holds latents: a toy base needs"),
    ("--dtype float8", "--dtype float8"), ("--max_steps -1", "--max_steps -1"), ("--adapter no/where", "no/where"),
    ("--adapter {cut}", "cut.safetensors")])
def test_a_chain_is_refused_before_it_begins(bad, refused, tmp_path, words, said):
    """Not when its base was trained, and without a config.json that a resume would take."""
    data = [] if "--data_dir" in words else ["--data_dir", bad["scenes"]]
    assert said in refused(*valid(tmp_path / "out"), *data, *words.format(**bad).split())
    assert sorted(path.name for path in tmp_path.rglob("*")) == []


def test_a_dead_adapter_is_refused(bad, straight, refused, tmp_path):
    """Gates and what they gate both zero: no gradient would ever leave 0. One of the two alone is fine."""
    tensors = load_file(straight["adapter"] / "final.safetensors")
    outputs = [f"blocks.0.fuser.{name}" for name in ("attn.to_out.0.weight", "attn.to_out.0.bias", "ff.net.2.weight",
                                                     "ff.net.2.bias")]
    gates = [name for name in tensors if ".alpha_" in name]
    words = [*valid(tmp_path / "out"), "--data_dir", bad["scenes"], "--base", bad["toy"]]
    for name, zeros in {"dead": gates + outputs, "gates": gates, "outputs": outputs}.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors | {name: torch.zeros_like(tensors[name]) for name in zeros}, path)
        more = ["--adapter", path, "--run_name", name]
        if name == "dead":
            assert "dead adapter: every gradient is exactly 0" in refused(*words, *more)
        else:
            main_here(*words, *more)
        assert steps_of(tmp_path / f"out/{name}") == ([] if name == "dead" else [1])


def test_an_existing_run_is_not_overwritten(ways, straight, chain, data, refused):
    for folder, fields in ((straight["base"], ways["base"]), (straight["latents"], ways["latents"]),
                           (chain, dict(data_dir=data))):
        before = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}
        assert "already holds checkpoints: --resume" in refused(*training("", folder, **RUN | fields)[1:])
        assert {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")} == before


def test_a_resume_keeps_the_model_and_the_data(straight, base, refused, tmp_path):
    home = straight["adapter"].parent
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    words = ["--resume", "--run_name", "adapter", "--out_dir", home, "--device", "cpu"]
    others = {"data_dir": tmp_path, "phase": "base", "base": SD1, "seed": 2, "width": 32, "depth": 2, "patch": 4,
              "adapter": straight["adapter"] / "final.safetensors", "base_dtype": "bfloat16"}
    for flag, value in others.items():
        assert f"--{flag} is " in refused(*words, f"--{flag}", value)
    for flag in ("no_box_mask", "no_rms_norm", "share_fusers"):
        assert f"--{flag.removeprefix('no_')} is " in refused(*words, f"--{flag}")
    assert {*others, "box_mask", "rms_norm", "share_fusers"} == {*train_adapter.FIXED}
    assert "beyond --max_steps 7" in refused(*words, "--max_steps", 7)
    assert "there is accum, adapter, base, latents" in refused("--resume", "--out_dir", home)
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before
    tensors, body = read_file(checkpoints(straight["adapter"])[-1])
    (tmp_path / "other").mkdir()
    write_file(tmp_path / "other/step-00000020.safetensors", tensors, body | {"config": {"run_name": "x", "n_embd": 4}})
    assert "other is a run of another script, with --n_embd" in refused(
        "--resume", "--run_name", "other", "--out_dir", tmp_path, "--device", "cpu")


# -------------------------------------------------------------------------------------------------------------- alarms
def alarms_of(folder):
    """-> list of (step, warning) in train.log"""
    found, step = [], 0
    for line in (folder / "train.log").read_text().splitlines():
        step = int(said[1].replace(",", "")) if (said := re.match(r"step ([\d,]+) validation: ", line)) else step
        found += [(step, line)] if line.startswith("warning: ") else []
    return found


@pytest.mark.parametrize("gate_lr", [1e-9, 5.0])
def test_gates_that_stay_shut_are_told_after_1000_steps(ways, tmp_path, gate_lr):
    """A checkpoint whose step is moved to 998 goes on over the 1000th, where it may warn for the first time."""
    folder, fields = tmp_path / "run", ways["adapter"] | dict(gate_lr=gate_lr, eval_rows=8)
    train_here(folder, max_steps=10, **fields)
    assert alarms_of(folder) == []
    tensors, body = read_file(folder / "step-00000010.safetensors")
    write_file(folder / "step-00000998.safetensors", tensors, body | {"step": 998})
    resume(folder, "--max_steps", 1001, "--eval_every", 1)
    found, wanted = alarms_of(folder), [1000, 1001] if gate_lr < 1 else []
    assert [step for step, line in found if "collapse" in line] == wanted
    assert all("--gate_lr" in line for _, line in found)
    assert (max(map(abs, gates_in(last_checkpoint(folder)[1]).values())) < 1e-6) == (gate_lr < 1)


def test_gates_that_are_wide_open_are_told_at_once(straight, ways, tmp_path):
    for way, value in (("adapter", 3.0), ("latents", -3.0)):
        tensors = load_file(straight[way] / "final.safetensors")
        gate = sorted(name for name in tensors if ".alpha_" in name)[-1]
        save_file(tensors | {gate: torch.tensor(value)}, tmp_path / "wide.safetensors")
        train_here(tmp_path / way, **ways[way] | dict(adapter=tmp_path / "wide.safetensors", max_steps=3, eval_every=1,
                                                       learning_rate=1e-5))
        found = alarms_of(tmp_path / way)
        assert [step for step, _ in found] == [1, 2, 3]
        assert all(re.search(r"over-activation: \|tanh\| up to (1\.00|0\.99)", line) for _, line in found)
