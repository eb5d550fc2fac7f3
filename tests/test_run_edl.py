"""train_edl.py as a whole: runs in real processes that are killed, stopped, restarted and fed with faults; the files
they leave, the verbs sample and eval, and what is refused. All on the 500 molecules of a dry run, one or two processes.
"""
import json
import math
import os
import re
import shutil
import signal
from collections import Counter

import pytest
import torch
from edl_tools import (ROOT, arm, assert_same_bits, build_demo, finite, flags_of, last_checkpoint, metrics_of, one_line,
                       small_model, start, start_pair, train_here, training, wait, write_data)
from PIL import Image

import train_edl
from runs import checkpoints, load_tensors, read_file

SCRIPTS = ["train_edl.py", "common.py", "runs.py", "autopsy.py", "data/files.py", "data/molecules/prepare.py",
           "data/molecules/metrics.py", "data/molecules/report.py"]
RUN = dict(max_steps=20, dropout=0.2, save_every=5, eval_every=10, log_every=5, keep=0)     # what is interrupted below


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def undo(monkeypatch):
    """What arm() replaces in this process comes back after the test."""
    for module, name in (train_edl, "compute_loss"), (train_edl, "get_batch"), (os, "replace"):
        monkeypatch.setattr(module, name, getattr(module, name))


@pytest.fixture
def refused(capsys):
    """refused(words...) -> the one line on stderr of train_edl.main(words), after its exit code was found to be 2."""
    def call(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train_edl.main([str(word) for word in words])
        assert stop.value.code == 2
        return one_line(capsys.readouterr().err)
    return call


# -------------------------------------------------------------------------------------------------------- the dry run
@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Fresh copies of the script's files, without any data, and a dry run in each -> the folders and what was said.

    The second has but torch, numpy, rdkit and safetensors, and no git either."""
    homes, runs = [tmp_path_factory.mktemp(name) for name in ("all", "bare")], []
    for home, env in zip(homes, ({}, {"PYTHONPATH": "blocked", "PATH": ""})):
        for name in SCRIPTS:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, home / name)
        (home / "blocked").mkdir()
        (home / "blocked/sitecustomize.py").write_text(
            "import sys\nsys.modules.update(dict.fromkeys(['matplotlib', 'tokenizers', 'drain3', 'wandb']))\n")
        runs.append(start("train_edl.py", "--dry_run", "--device", "cpu", "--run_name", "first", cwd=home, **env))
    return list(zip(homes, wait(*runs)))


def test_a_dry_run_leaves_everything(dry):
    home, end = dry[0]
    folder = home / "out/first"
    assert end.code == 0 and "error" not in end.err and "Traceback" not in end.err
    assert (home / "data/molecules/demo500/meta.json").exists()         # no data were there
    assert (folder / "train.pid").read_text().strip().isdigit()
    with Image.open(folder / "curves.png") as picture:
        picture.load()
    assert [path.name for path in checkpoints(folder)] == ["step-00000010.safetensors", "step-00000020.safetensors"]
    assert finite(read_file(checkpoints(folder)[-1])[0]) and finite(read_file(folder / "best.safetensors")[0])
    rows = (folder / "samples/final.csv").read_text().splitlines()
    scores = ["nll", *train_edl.UNCERTAINTY]
    assert rows[0].split(",") == ["smiles", "valid", "tokens", "finished", *scores, *(f"max_{x}" for x in scores)]
    assert len(rows) == 33
    assert any(row.split(",")[1] == "True" for row in rows) == (folder / "samples/final.png").exists()


def test_the_log_has_the_guides_three_lines(dry):
    log = (dry[0][0] / "out/first/train.log").read_text()
    steps = re.findall(r"^epoch (\d+) iter (\d+): train loss \d+\.\d{4}\. lr \d\.\d{3}e[+-]\d+$", log, re.M)
    assert steps == [("1", "5"), ("1", "10"), ("1", "15"), ("1", "20")]
    assert len(re.findall(r"^test loss: \d+\.\d{4}$", log, re.M)) == 2
    assert re.findall(r"^Saving at epoch (\d+)$", log, re.M) == ["1", "1"]
    said = dry[0][1].out
    assert re.search(r"^first: \d\d,\d{3} parameters", log) and "train loss" not in said
    assert re.search(r"^step 20/20 100.0% \| loss \d.*grad norm.*\| lr .*\| skipped 0 \| .* molecules/s", said, re.M)


def test_measurements_are_strict_json(dry):
    folder = dry[0][0] / "out/first"
    rows = metrics_of(folder)
    assert [(row["step"], row["split"]) for row in rows] == [(5, "train"), (10, "train"), (10, "val"), (15, "train"),
                                                            (20, "train"), (20, "val")]
    assert set(rows[0]) == {"step", "split", "loss", "parts", "grad_norm", "lr", "skipped", "molecules_per_s"}
    assert set(rows[2]) == {"step", "split", "nll", "loss", *train_edl.UNCERTAINTY}
    table = json.loads((folder / "eval.json").read_text(), parse_constant=pytest.fail)["table"]
    assert list(table) == ["first", "6-gram", "unigram", "val rows"]
    assert table["first"]["val NLL"] == pytest.approx(rows[-1]["nll"], rel=1e-5) and table["val rows"]["valid"] == 1
    about = json.loads((folder / "config.json").read_text(), parse_constant=pytest.fail)
    derived = about["derived"]
    assert derived["max_steps"] == 20 and derived["global_batch"] == 16 and about["world_size"] == 1
    assert derived["steps_per_epoch"] * 16 in range(400, 500)
    assert set(about["config"]) == set(vars(train_edl.Config()))


def test_it_runs_with_four_packages_and_without_git(dry):
    (home, end), (full, _) = dry[1], dry[0]
    assert end.code == 0 and "Traceback" not in end.err, end.err
    assert end.out.count("no curves.png") == 1 and "matplotlib" in end.out
    assert not (home / "out/first/curves.png").exists() and (home / "out/first/best.safetensors").exists()
    assert_same_bits(last_checkpoint(home / "out/first")[1], last_checkpoint(full / "out/first")[1])


def test_the_last_line_of_a_run_names_only_what_is_there(dry):
    for home, end in dry:
        line = next(line for line in end.out.splitlines() if line.startswith("done: "))
        for name in ("samples/final.png", "samples/final.csv", "curves.png", "best.safetensors", "eval.json"):
            assert (home / "out/first" / name).exists() or name not in line


def test_the_best_model_loads_in_three_lines(dry):
    folder = dry[0][0] / "out/first"
    from train_edl import generate, load_model
    model = load_model(folder / "best.safetensors")
    made = generate(model, 10)
    assert len(made) == 10 and not model.training
    assert model.vocab[:2] == train_edl.SPECIALS and model.about["config"]["n_embd"] == 32


def test_a_runs_config_repeats_the_run(dry, data, tmp_path):
    folder = dry[0][0] / "out/first"
    train_edl.main(["--config", str(folder / "config.json"), "--out_dir", str(tmp_path), "--data_dir", str(data)])
    step, tensors, body = last_checkpoint(tmp_path / "first")
    assert_same_bits(tensors, last_checkpoint(folder)[1])
    changed = {"out_dir", "data_dir"}
    before = json.loads((folder / "config.json").read_text())["config"]
    assert step == 20 and {name for name in before if body["config"][name] != before[name]} == changed


def test_importing_the_script_does_nothing(tmp_path):
    code = ("import sys, random, signal, torch; before = torch.get_rng_state(), signal.getsignal(signal.SIGTERM)\n"
            f"sys.path.insert(0, {str(ROOT)!r}); import train_edl\n"
            "assert not torch.distributed.is_initialized() and signal.getsignal(signal.SIGTERM) == before[1]\n"
            "assert torch.equal(torch.get_rng_state(), before[0])\n"
            "assert not {'matplotlib', 'wandb', 'autopsy', 'tokenizers'} & set(sys.modules)\n")
    end, = wait(start("-c", code, cwd=tmp_path))
    assert (end.code, end.out, end.err) == (0, "", "") and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- sample and eval
@pytest.fixture(scope="module")
def verbs(dry, data, tmp_path_factory):
    """A sample and an eval of the dry run, as processes."""
    home, work = dry[0][0], tmp_path_factory.mktemp("verbs")
    shutil.copytree(home / "out", work / "out")
    return work, wait(*[start(home / "train_edl.py", *words.split(), "--run_name", "first", "--device", "cpu", cwd=work)
                        for words in ("sample --num_samples 33 --prompt CC --out some.csv",
                                      "eval --num_samples 20 --seed 5 --temperature 0.8")])


def test_sample(verbs, capsys):
    work, (end, _) = verbs
    assert (end.code, end.err) == (0, "") and re.match(r"some.csv: n 33, valid \d.*temperature 1", end.out)
    rows = (work / "some.csv").read_text().splitlines()[1:]
    assert len(rows) == 33 and all(row.startswith("CC") for row in rows)
    command = f"sample --device cpu --run_name first --out_dir {work}/out --out {work}/other.csv "
    train_edl.main((command + "--num_samples 33 --prompt CC").split())
    assert (work / "other.csv").read_text() == (work / "some.csv").read_text()
    train_edl.main((command + "--num_samples 7 --seed 3 --top_k 4 --batch_size 3").split())
    assert len((work / "other.csv").read_text().splitlines()) == 8


def test_eval(verbs, dry):
    work, (_, end) = verbs
    assert (end.code, end.err) == (0, "")
    assert re.search(r"^val NLL +\d\.\d{4} +\d\.\d{4} ", end.out, re.M) and "temperature 0.8" in end.out
    found, before = (json.loads((home / "out/first/eval.json").read_text()) for home in (work, dry[0][0]))
    assert (found["n"], found["temperature"], found["seed"]) == (20, 0.8, 5)
    for name in ("val NLL", "test NLL", "ECE", "Brier"):                # do not depend on the sampling
        assert found["table"]["first"][name] == before["table"]["first"][name]
    assert len((work / "out/first/samples/eval.csv").read_text().splitlines()) == 21


@pytest.mark.parametrize("words, said", [
    ("--prompt CCI", "'I'"), ("--prompt C!", "character 2 ('!')"), ("--num_samples 0", "--num_samples"),
    ("--prompt " + "C" * 300, "has 300 tokens"), ("--temperature 0", "--temperature"), ("--top_k -1", "--top_k"),
    ("--run_name nobody", "there is first"), ("--temperature nan", "--temperature"), ("--batch_size 0", "--batch_size"),
    ("--numsamples 3", "did you mean --num_samples?"), ("--seed -1", "--seed"), ("--device abacus", "--device abacus")])
def test_samples_that_cannot_be_drawn(dry, refused, tmp_path, words, said):
    assert said in refused("sample", "--run_name", "first", "--out_dir", dry[0][0] / "out", "--device", "cpu", "--out",
                           tmp_path / "none.csv", *words.split())
    assert not (tmp_path / "none.csv").exists()


@pytest.mark.parametrize("damage", ["a bit", "the end", "the start"])
def test_a_damaged_model_is_named(dry, refused, tmp_path, damage):
    blob = bytearray((dry[0][0] / "out/first/best.safetensors").read_bytes())
    if damage == "a bit":
        blob[len(blob) // 2] ^= 1
    blob = {"a bit": blob, "the end": blob[:-100], "the start": b"torch" + blob}[damage]
    (tmp_path / "first").mkdir()
    (tmp_path / "first/best.safetensors").write_bytes(blob)
    for verb in ("sample", "eval"):
        assert "best.safetensors" in refused(verb, "--run_name", "first", "--out_dir", tmp_path, "--device", "cpu")


def test_other_data_are_no_data_for_a_model(dry, refused, tmp_path):
    words = ["eval", "--run_name", "first", "--out_dir", dry[0][0] / "out", "--device", "cpu", "--data_dir"]
    assert "vocabulary" in refused(*words, write_data(tmp_path / "other", ["CCI"], ["P"]))
    vocab = train_edl.load_model(dry[0][0] / "out/first/best.safetensors").vocab
    assert "longest row" in refused(*words, write_data(tmp_path / "long", ["C" * 300], ["C"], vocab=vocab))
    assert "nowhere" in refused(*words, tmp_path / "nowhere")


# -------------------------------------------------------------------------------------------------- stop and go on
@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """20 steps without interruption."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train_here(data, folder, **RUN)
    return folder


FAULTS = {"kill:13:0": (-9, [5, 10]), "kill-in-save:10:0": (-9, [5]),       # exit code, steps of the checkpoints
          "term:7:0": (0, [5, 8]), "int:12:0": (0, [5, 10, 13])}


@pytest.fixture(scope="module")
def interrupted(data, tmp_path_factory):
    """FAULT -> (folder, how it ended), of 20 steps each that a signal cuts short; two processes at a time."""
    folders, ends = {fault: tmp_path_factory.mktemp("cut") / "run" for fault in FAULTS}, []
    for pair in list(FAULTS)[:2], list(FAULTS)[2:]:
        commands = [training(fault, folders[fault], data_dir=data, **RUN) for fault in pair]
        ends += wait(*[start(*command, cwd=folders[fault].parent) for command, fault in zip(commands, pair)])
    return {fault: (folders[fault], end) for fault, end in zip(FAULTS, ends)}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_interrupted_run_goes_on_to_the_same_bits(interrupted, straight, data, tmp_path, fault):
    kept, end = interrupted[fault]
    code, steps = FAULTS[fault]
    shutil.copytree(kept, tmp_path / "run")
    folder = tmp_path / "run"
    assert (end.code, [int(path.stem[5:]) for path in checkpoints(folder)]) == (code, steps), end.err
    assert bool(list(folder.glob("*.tmp.*"))) == (fault == "kill-in-save:10:0")
    assert (f"--resume --run_name {folder.name}" in end.out) == (code == 0) and "Traceback" not in end.err
    command = ["--resume", "--run_name", "run", "--out_dir", tmp_path, "--device", "cpu"]
    if fault == "kill:13:0":                                            # one of them in a process of its own
        again, = wait(start(ROOT / "train_edl.py", *command, cwd=tmp_path))
        assert again.code == 0 and "resumed at 10" in again.out, again.err
    else:
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        train_edl.main([str(word) for word in command])
        for number, handler in before.items():
            signal.signal(number, handler)
    step, tensors, body = last_checkpoint(folder)
    _, wanted, wanted_body = last_checkpoint(straight)
    assert step == 20 and not list(folder.glob("*.tmp.*"))
    assert_same_bits(tensors, wanted)
    assert (body["best"], body["guard"]) == (wanted_body["best"], wanted_body["guard"])
    assert_same_bits(read_file(folder / "best.safetensors")[0], read_file(straight / "best.safetensors")[0])
    rows, wanted_rows = metrics_of(folder), metrics_of(straight)
    assert max(Counter((row["step"], row["split"]) for row in rows).values()) == 1
    assert [row for row in rows if row["split"] == "val"] == [row for row in wanted_rows if row["split"] == "val"]
    evals = [json.loads((run / "eval.json").read_text())["table"]["run"] for run in (folder, straight)]
    assert evals[0]["val NLL"] == evals[1]["val NLL"]


def test_a_signal_before_the_first_step_is_obeyed(data, straight, tmp_path, monkeypatch):
    load_data = train_edl.load_data

    def stop_then_load(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return load_data(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(train_edl, "load_data", stop_then_load)
        assert train_here(data, tmp_path / "run", **RUN)["step"] == 0
    assert [path.stem for path in checkpoints(tmp_path / "run")] == ["step-00000000"]
    assert train_here(data, tmp_path / "run", resume=True, **RUN)["step"] == 20
    assert_same_bits(last_checkpoint(tmp_path / "run")[1], last_checkpoint(straight)[1])


def test_a_finished_run_can_go_further(data, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    train_here(data, tmp_path / "run", resume=True, **RUN | dict(max_steps=25))
    step, tensors, _ = last_checkpoint(tmp_path / "run")
    assert step == 25 and tensors["opt.token.weight.step"] == 25
    assert [row["step"] for row in metrics_of(tmp_path / "run") if row["split"] == "train"] == [5, 10, 15, 20, 25]


def test_a_resume_remembers_the_best(data, tmp_path, monkeypatch):
    nll = 1.5                                                           # better than what comes after the resume
    monkeypatch.setattr(train_edl, "evaluate", lambda *a: {"nll": nll, "loss": 0.0})
    train_here(data, tmp_path / "run", max_steps=4)
    before, nll = (tmp_path / "run/best.safetensors").read_bytes(), 2.0
    assert train_here(data, tmp_path / "run", max_steps=8, resume=True)["best"] == 1.5
    assert (tmp_path / "run/best.safetensors").read_bytes() == before and last_checkpoint(tmp_path / "run")[0] == 8


def test_a_damaged_checkpoint_is_passed_over(data, straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "run")
    newest = checkpoints(tmp_path / "run")[-1]
    newest.write_bytes(newest.read_bytes()[:-50])
    capsys.readouterr()
    train_here(data, tmp_path / "run", resume=True, **RUN)
    said = capsys.readouterr().out
    assert "passed over a damaged checkpoint" in said and newest.name in said and "resumed at 15" in said
    assert_same_bits(last_checkpoint(tmp_path / "run")[1], last_checkpoint(straight)[1])


# ----------------------------------------------------------------------------------------------------- two processes
@pytest.fixture(scope="module")
def straight_pair(data, tmp_path_factory):
    """20 steps on two processes without interruption, with a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("straight_pair") / "run"
    ends = wait(*start_pair("", folder, data_dir=data, **RUN | dict(save_every=1)))
    assert [end.code for end in ends] == [0, 0], ends[0].err + ends[1].err
    assert ends[1].out == ""                                            # only rank 0 talks
    return folder


def at_step(folder, step):
    return read_file(folder / f"step-{step:08d}.safetensors")[0]


def test_torchrun_starts_a_killed_worker_again(data, straight_pair, tmp_path):
    """kill -9 of one worker in the middle of a step: torchrun ends the other, starts both again, --resume goes on.

    The variable keeps the new workers from reading the addresses of the dead ones (pytorch issue 135712)."""
    command = training("kill:13:1", tmp_path / "run", data_dir=data, resume=True, **RUN)
    end, = wait(start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3", *command,
                      cwd=tmp_path, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))
    assert end.code == 0, end.err
    assert "resumed at 10" in end.out and "exitcode: -9" in end.err
    assert_same_bits(last_checkpoint(tmp_path / "run")[1], at_step(straight_pair, 20))
    assert max(Counter((row["step"], row["split"]) for row in metrics_of(tmp_path / "run")).values()) == 1


def test_a_signal_to_one_of_two_stops_both(data, straight_pair, tmp_path):
    """Rank 1 is told at step 7, rank 0 learns of it at the next poll, at step 10: both save the same and end well."""
    ends = wait(*start_pair("term:7:1", tmp_path / "run", data_dir=data, **RUN))
    assert [end.code for end in ends] == [0, 0], ends[0].err + ends[1].err
    assert last_checkpoint(tmp_path / "run")[0] == 10 and "stopped by a signal" in ends[0].out
    assert_same_bits(last_checkpoint(tmp_path / "run")[1], at_step(straight_pair, 10))
    assert len({end.out.splitlines()[-1] for end in ends}) == 1 and ends[0].out.splitlines()[-1].startswith("weights ")


def test_one_process_two_processes_and_micro_batches_take_the_same_steps(data, tmp_path):
    """1 x 32, 2 x 16 and 1 x 8 x 4 without dropout. Weights move by about 0.01; they differ by rounding alone."""
    fields = dict(max_steps=6, warmup_steps=1, save_every=1, keep=0)
    ends = wait(*start_pair("", tmp_path / "two", data_dir=data, batch_size=16, **fields))
    assert [end.code for end in ends] == [0, 0], ends[0].err + ends[1].err
    train_here(data, tmp_path / "one", batch_size=32, **fields)
    train_here(data, tmp_path / "micro", batch_size=8, grad_accum=4, **fields)
    before = at_step(tmp_path / "one", 1)
    one, two, micro = (at_step(tmp_path / name, 6) for name in ("one", "two", "micro"))
    assert max((one[name] - before[name]).abs().max() for name in one if name.startswith("model.")) > 5e-3
    for other in (two, micro):
        for name, tensor in one.items():
            if name.startswith("model."):                               # a key's bias has no gradient but rounding
                assert (other[name] - tensor).abs().max() < (1e-3 if name.endswith("qkv.bias") else 1e-5), name
    one, two, micro = (json.loads((tmp_path / name / "eval.json").read_text())["table"][name]["val NLL"]
                       for name in ("one", "two", "micro"))
    assert one == pytest.approx(two, rel=1e-5) and one == pytest.approx(micro, rel=1e-5)    # all ranks evaluate


def test_a_bad_batch_on_one_rank_is_skipped_by_both(data, tmp_path):
    ends = wait(*start_pair("nan-loss:3:1", tmp_path / "run", data_dir=data, max_steps=6, log_every=1))
    assert [end.code for end in ends] == [0, 0], ends[0].err + ends[1].err
    assert len({end.out.splitlines()[-1] for end in ends}) == 1 and ends[0].out.splitlines()[-1].startswith("weights ")
    rows = [row for row in metrics_of(tmp_path / "run") if row["split"] == "train"]
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert [row["loss"] is None for row in rows] == [False, False, False, True, False, False]
    assert re.search(r"step 3: NaN detected BEFORE backward: loss of rank\(s\) \[1\] is nan", ends[0].out)
    assert [path.name for path in (tmp_path / "run/autopsy").iterdir()] == ["step-00000003-rank1"]
    _, tensors, _ = last_checkpoint(tmp_path / "run")
    assert finite(tensors) and tensors["opt.token.weight.step"] == 5


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """--on_nonfinite stop with two faults: an empty batch on rank 1 of two, a NaN in a weight of a single process."""
    pair, single = [tmp_path_factory.mktemp(name) / "run" for name in ("pair", "single")]
    fields = RUN | dict(data_dir=data, on_nonfinite="stop")
    ends = wait(*start_pair("no-targets:7:1", pair, **fields))
    ends += wait(start(*training("nan-weight:7:0", single, **fields), cwd=single.parent))
    events = [pair / "autopsy/step-00000007-rank1", single / "autopsy/step-00000007-rank0"]
    replays = wait(*[start(ROOT / "autopsy.py", event, cwd=event.parent) for event in events])
    return pair, single, ends, events, replays


def test_a_run_that_must_stop_ends_all_processes_with_code_3(stopped):
    pair, single, ends, events, _ = stopped
    assert [end.code for end in ends] == [3, 3, 3], "".join(end.err for end in ends)
    for end in ends:
        assert "STOPPED before step 7" in end.err and "--skip_steps 7" in end.err and "Traceback" not in end.err
    for event in events:
        assert {path.name for path in event.iterdir()} == {"report.txt", "model.safetensors", "batch.safetensors"}


def test_the_autopsy_names_the_cause_and_can_be_replayed(stopped):
    *_, events, replays = stopped
    reports = [(event / "report.txt").read_text() for event in events]
    assert "Inf BORN in forward: div" in reports[0] and "at train_edl.py:" in reports[0]
    for text in ("parameter token.weight already holds NaN", "NaN CAME IN with: parameter token.weight"):
        assert text in reports[1]
    for report, replay in zip(reports, replays):
        assert replay.code == 0, replay.err
        said, again = ([line for line in text.splitlines() if re.search("BORN|CAME IN|replayed|path to", line)]
                       for text in (report, replay.out))
        assert said == again and len(said) >= 3 and "did NOT reproduce" not in replay.out


def test_nothing_finite_is_lost_and_nothing_else_is_kept(stopped, straight_pair, straight, data, tmp_path):
    pair, single, *_ = stopped
    step, tensors, body = last_checkpoint(pair)                         # a bad batch: the weights before it are kept
    assert step == 7 and body["guard"]["skips"]["loss"] == 1
    assert_same_bits(tensors, at_step(straight_pair, 7))
    assert last_checkpoint(single)[0] == 5                              # a bad weight: what was saved before it is kept
    assert not list(single.glob("step-00000007*"))                      # the autopsy holds the bad one
    assert all(finite(read_file(path)[0]) for path in [*checkpoints(single), *checkpoints(pair)])
    shutil.copytree(single, tmp_path / "run")
    train_here(data, tmp_path / "run", resume=True, **RUN)              # without the fault
    assert_same_bits(last_checkpoint(tmp_path / "run")[1], last_checkpoint(straight)[1])


# -------------------------------------------------------------------------------------------- other ways through a run
def test_a_skipped_step_is_a_step_never_taken(data, tmp_path, undo):
    train_here(data, tmp_path / "without", max_steps=8, skip_steps="3", dropout=0.1)
    arm("nan-loss", 3, 0)
    train_here(data, tmp_path / "skipped", max_steps=8, dropout=0.1)
    assert_same_bits(last_checkpoint(tmp_path / "skipped")[1], last_checkpoint(tmp_path / "without")[1])


def test_steps_can_be_passed_over_on_purpose(data, tmp_path, monkeypatch):
    taken, compute_loss = [], train_edl.compute_loss
    monkeypatch.setattr(train_edl, "compute_loss", lambda *a: (taken.append(a[2]), compute_loss(*a))[1])
    train_here(data, tmp_path / "run", max_steps=8, skip_steps="3,5-6", log_every=1)
    assert taken == [0, 1, 2, 4, 7]
    step, tensors, body = last_checkpoint(tmp_path / "run")
    assert step == 8 and tensors["opt.token.weight.step"] == 5 and sum(body["guard"]["skips"].values()) == 0
    assert [row["step"] for row in metrics_of(tmp_path / "run") if row["split"] == "train"] == [1, 2, 3, 5, 8]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("use_edl", [True, False])
def test_low_precision(data, tmp_path, dtype, use_edl):
    answer = train_here(data, tmp_path / "run", max_steps=25, batch_size=16, dtype=dtype, use_edl=use_edl,
                        edl_kl_weight=0.01, eval_every=5, log_every=1)
    _, tensors, _ = last_checkpoint(tmp_path / "run")
    assert finite(tensors) and all(tensor.dtype == torch.float32 for tensor in tensors.values())
    nll = [row["nll"] for row in metrics_of(tmp_path / "run") if row["split"] == "val"]
    assert nll[-1] == answer["best"] < nll[0] - 0.1 < math.log(23)
    skips = last_checkpoint(tmp_path / "run")[2]["guard"]["skips"]
    assert skips["output"] == skips["loss"] == skips["gradient"] == 0


@pytest.mark.parametrize("fields", [dict(edl_loss_type="mse", edl_evidence="softplus", edl_kl_weight=1.0),
                                    dict(use_edl=False)], ids=["original", "plain"])
def test_the_original_recipe_and_the_plain_model(data, tmp_path, fields):
    train_here(data, tmp_path / "run", max_steps=4, log_every=2, sample_every=2, **fields)
    rows = metrics_of(tmp_path / "run")
    assert list(rows[0]["parts"]) == (["risk", "kl", "nll", "vacuity"] if fields.get("use_edl", True) else ["nll"])
    samples = [path.name for path in sorted((tmp_path / "run/samples").glob("*.csv"))]
    assert samples == ["final.csv", "step-00000002.csv", "step-00000004.csv"]
    header = (tmp_path / "run/samples/final.csv").read_text().splitlines()[0]
    assert ("vacuity" in header) == fields.get("use_edl", True)


def test_a_look_at_samples_changes_nothing(data, tmp_path):
    train_here(data, tmp_path / "with", max_steps=6, sample_every=2, eval_every=3, dropout=0.2)
    train_here(data, tmp_path / "without", max_steps=6, dropout=0.2)
    assert_same_bits(last_checkpoint(tmp_path / "with")[1], last_checkpoint(tmp_path / "without")[1])


def test_a_run_without_a_name_gets_one_by_the_time(data, tmp_path):
    train_here(data, tmp_path / "ignored", max_steps=1, run_name="")
    folder, = tmp_path.iterdir()
    assert re.fullmatch(r"edl_molgpt_\d{8}_\d{6}", folder.name) and (folder / "best.safetensors").exists()


def test_a_set_without_test_rows_and_with_few_others(tmp_path):
    data = write_data(tmp_path / "set", ["C", "CC", "CCO"], ["CN"])
    answer = train_here(data, tmp_path / "run", max_steps=3)
    assert list(answer["table"]) == ["run", "6-gram", "unigram", "val rows"]
    assert "val NLL" in answer["table"]["run"] and "test NLL" not in answer["table"]["run"]
    assert "snn" not in answer["table"]["val rows"]                     # they would be compared with themselves


# --------------------------------------------------------------------------------------------------------- refusals
def test_an_existing_run_is_not_overwritten(straight, data):
    """As a process: one line, exit code 2, nothing changed."""
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    command = flags_of(run_name=straight.name, out_dir=straight.parent, data_dir=data, device="cpu", dry_run=True)
    end, = wait(start(ROOT / "train_edl.py", *command, cwd=straight.parent))
    assert end.code == 2 and "--resume" in one_line(end.err)
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*")} == before


def test_a_resume_keeps_the_model_and_the_data(straight, refused, tmp_path):
    words = ["--resume", "--run_name", straight.name, "--out_dir", straight.parent, "--device", "cpu"]
    others = {"n_layer": 3, "n_embd": 64, "n_head": 4, "edl_evidence": "softplus", "data_dir": tmp_path}
    for flag, value in others.items():
        assert f"--{flag} is " in refused(*words, f"--{flag}", value)
    assert "--use_edl is True" in refused(*words, "--no_edl")
    assert "beyond --max_steps 7" in refused(*words, "--max_steps", 7)


def test_a_resume_needs_a_name(straight, refused):
    assert f"there is {straight.name}" in refused("--resume", "--out_dir", straight.parent)


@pytest.mark.parametrize("words, said", [
    ("--learning_rat 1", "did you mean --learning_rate?"), ("--batch-siz 3", "did you mean --batch-size?"),
    ("--data_dir no/where", "--data_dir no/where"), ("--batch_size many", "--batch_size"), ("gpt", "unknown flag gpt"),
    ("--skip_steps 3-x", "--skip_steps 3-x"), ("--dtype float8", "--dtype float8"), ("--dropout inf", "--dropout"),
    ("--device abacus", "--device abacus"), ("--config no.json", "--config no.json"), ("--max_steps -3", "--max_steps"),
    ("--seed -1", "--seed -1")])
def test_bad_flags_are_refused(data, refused, tmp_path, words, said):
    valid = ["--device", "cpu", "--dry_run", "--max_steps", 1, "--data_dir", data, "--out_dir", tmp_path / "out"]
    assert said in refused(*valid, *words.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["other tokens", "more tokens", "longer rows"])
def test_data_that_changed_under_a_run_are_refused(refused, tmp_path, change):
    """The same --data_dir, made anew with another vocabulary or other lengths: no checkpoint could go on with that."""
    data = write_data(tmp_path / "set", ["CCO", "CCN"], ["CO"])
    train_here(data, tmp_path / "run", max_steps=2, save_every=1)
    other = {"other tokens": ["CCO", "CCF"], "more tokens": ["CCO", "CCNF"], "longer rows": ["CCO", "CCNO"]}[change]
    write_data(tmp_path / "set", other, ["CO"])
    assert "--data_dir" in refused("--resume", "--run_name", "run", "--out_dir", tmp_path, "--max_steps", 4)


def test_a_model_of_another_shape_is_named(dry):
    tensors, body = read_file(dry[0][0] / "out/first/best.safetensors")
    with pytest.raises(ValueError, match="token.weight"):
        load_tensors(small_model(["a"] * 5, 51), tensors, "best.safetensors")
