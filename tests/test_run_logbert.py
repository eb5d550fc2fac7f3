"""train_logbert.py as a whole: runs in real processes that are killed, stopped and fed with faults; the files they
leave, the verbs eval and score, and what is refused. On hand-made sessions and the demo log of a dry run.
"""
import csv
import gzip
import json
import math
import os
import re
import shutil
import signal
from collections import Counter

import pytest
import torch
from edl_tools import assert_same_bits, finite, last_checkpoint, metrics_of, one_line, start, start_pair, wait
from logbert_tools import ROOT, arm, run_in_pair, small_config, train_here, training, write_data, write_lives
from PIL import Image

import autopsy
import train_logbert
from runs import checkpoints, read_file, write_file

SCRIPTS = ["train_logbert.py", "common.py", "runs.py", "autopsy.py", "data/files.py",
           *[f"data/logs/{path.name}" for path in (ROOT / "data/logs").glob("*.py")]]
RUN = dict(max_steps=20, dropout=0.2, use_gaps=True, vhm_weight=0.1, vhm_ramp_steps=15, save_every=5, eval_every=10,
           log_every=5, keep=0)                                         # what is interrupted below
DETECTORS = ["bag", "bag top 2", "bag misses", "ordered", "ordered top 2", "ordered misses", "both"]
FLOORS = ["unseen event", "unseen event or length", "unseen 2-gram", "unseen 3-gram", "unseen count vector",
          "PCA on idf counts", "2-gram LM"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lives(tmp_path_factory.mktemp("lives") / "set", times=True)


@pytest.fixture(scope="module", autouse=True)
def no_curves():
    """A picture takes as long as ten steps; processes draw them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_logbert.Run, "curves", lambda run: None)
        yield


@pytest.fixture
def undo(monkeypatch):
    """What arm() replaces in this process comes back after the test."""
    for module, name in (train_logbert, "compute_loss"), (train_logbert, "get_batch"), (os, "replace"):
        monkeypatch.setattr(module, name, getattr(module, name))


@pytest.fixture
def refused(capsys):
    """refused(words...) -> the one line on stderr of main(words), after its exit code was found to be 2."""
    def call(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train_logbert.main([str(word) for word in words])
        assert stop.value.code == 2
        return one_line(capsys.readouterr().err)
    return call


def strict(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


# -------------------------------------------------------------------------------------------------------- the dry run
@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Fresh copies of the script's files, without any data, and a dry run in each -> the folders and what was said.

    The second has but torch, numpy and safetensors, and no git either; to save time it gets the data of the first."""
    homes, runs = [tmp_path_factory.mktemp(name) for name in ("all", "bare")], []
    for home, env in zip(homes, ({}, {"PYTHONPATH": "blocked", "PATH": ""})):
        for name in SCRIPTS:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, home / name)
        (home / "blocked").mkdir()
        (home / "blocked/sitecustomize.py").write_text(
            "import sys\nsys.modules.update(dict.fromkeys(['matplotlib', 'tokenizers', 'drain3', 'wandb', 'rdkit']))\n")
        run = start("train_logbert.py", "--dry_run", "--device", "cpu", "--run_name", "first", cwd=home, **env)
        runs += wait(run)
        if home == homes[0]:
            shutil.copytree(home / "data/logs/demo600", homes[1] / "data/logs/demo600")
    return list(zip(homes, runs))


def test_a_dry_run_leaves_everything(dry):
    home, end = dry[0]
    folder = home / "out/first"
    assert end.code == 0 and "error" not in end.err and "Traceback" not in end.err, end.err
    assert (home / "data/logs/demo600/meta.json").exists()              # no data were there
    assert (folder / "train.pid").read_text().strip().isdigit()
    for name in ("curves.png", "samples/scores.png"):
        with Image.open(folder / name) as picture:
            picture.load()
    assert [path.name for path in checkpoints(folder)] == ["step-00000010.safetensors", "step-00000020.safetensors"]
    assert finite(read_file(checkpoints(folder)[-1])[0]) and finite(read_file(folder / "best.safetensors")[0])
    model = train_logbert.load_model(folder / "best.safetensors")
    assert not model.training and model.about["config"]["n_embd"] == 32


def test_the_log_has_the_records_epoch_line(dry):
    log = (dry[0][0] / "out/first/train.log").read_text()
    lines = re.findall(r"^epoch (\d+) \|\| TRAIN_Loss:(\d\.\d{4}) \|\|VAL_Loss:(\d\.\d{4})$", log, re.M)
    assert [line[0] for line in lines] == ["1", "2"] and lines[1][2] < lines[0][2]
    assert "|| TRAIN_Loss" not in dry[0][1].out and re.search(r"^first: \d\d,\d{3} parameters, float32", log)
    assert re.search(r"^step 20/20 100.0% \| loss \d.*mlkp.*grad norm.*\| lr .*\| skipped 0 \| .*sessions/s", log, re.M)


def test_measurements_are_strict_json(dry):
    folder = dry[0][0] / "out/first"
    rows = metrics_of(folder)
    assert [(row["step"], row["split"]) for row in rows] == [(10, "train"), (10, "val"), (20, "train"), (20, "val")]
    assert set(rows[0]) == {"step", "split", "loss", "parts", "grad_norm", "lr", "skipped", "sessions_per_s"}
    assert set(rows[1]) == {"step", "split", "loss", "mlkp"} and rows[0]["parts"].keys() == {"mlkp"}
    found, limits, about = (strict(folder / f"{name}.json") for name in ("eval", "thresholds", "config"))
    assert list(found["table"]) == FLOORS + DETECTORS and list(limits["thresholds"]) == DETECTORS
    assert limits["thresholds"] == found["thresholds"] == {name: found["table"][name]["threshold"] for name in limits[
        "thresholds"]}
    assert (limits["quantile"], limits["margin"]) == (0.998, 0.5) and limits["held_out"] > 50
    assert set(found["table"]["bag"]) >= {"P", "R", "F1", "FPR", "F1 len>=10", "F1 unique", "unseen key", "early end"}
    assert about["derived"]["max_steps"] == 20 and about["derived"]["global_batch"] == 16 and about["world_size"] == 1
    assert set(about["config"]) == set(vars(train_logbert.Config()))


def test_the_samples_name_keys_places_and_what_was_expected(dry):
    blocks = re.split(r"^(?=blk_)", (dry[0][0] / "out/first/samples/final.txt").read_text(), flags=re.M)[1:]
    assert len(blocks) == 10
    scores = [float(re.match(r"blk_\d+: both (\d+\.\d\d), labelled \w", block)[1]) for block in blocks]
    assert scores == sorted(scores, reverse=True)
    for block in blocks:
        _, reason, *lines = block.splitlines()
        assert [int(line.split()[0]) for line in lines] == list(range(1, len(lines) + 1))
        why = re.fullmatch(r"  ('.+'|the end)( \(never seen in training\))?, "
                           r"(?:(\d+) of|number \d+ of|after) (\d+) keys: "
                           r"p \d\.\de-?\+?\d\d, expected ('.+'|the end) with p \d\.\d\d", reason)
        assert why and int(why[4]) == len(lines), reason
        if why[3] and not why[2]:                                       # all unseen keys are one to the model
            assert sum(line.endswith(f"  {why[1][1:-1]}") for line in lines) == int(why[3])
    assert "(never seen in training)" in blocks[0] and "labelled unseen key" in blocks[0]


def test_a_floor_that_wins_is_told(dry):
    end, table = dry[0][1], strict(dry[0][0] / "out/first/eval.json")["table"]
    best = max(FLOORS, key=lambda name: table[name]["F1"] or 0)
    warned = f"WARNING: the floor {best!r} does better than 'both'" in end.out
    assert (table[best]["F1"] > table["both"]["F1"]) == warned
    assert re.search(r"^both +\* ", end.out, re.M)


def test_it_runs_with_three_packages_and_without_git(dry):
    (home, end), (full, _) = dry[1], dry[0]
    assert end.code == 0 and "Traceback" not in end.err, end.err
    assert end.out.count("no curves.png") == 1 and "no scores.png: pip install matplotlib" in end.out
    assert not (home / "out/first/curves.png").exists() and (home / "out/first/samples/final.txt").exists()
    assert_same_bits(last_checkpoint(home / "out/first")[1], last_checkpoint(full / "out/first")[1])
    for name in ("thresholds.json", "samples/final.txt"):
        assert (home / "out/first" / name).read_text() == (full / "out/first" / name).read_text()


def test_importing_the_script_does_nothing(tmp_path):
    code = ("import sys, signal, torch; before = torch.get_rng_state(), signal.getsignal(signal.SIGTERM)\n"
            f"sys.path.insert(0, {str(ROOT)!r}); import train_logbert\n"
            "assert not torch.distributed.is_initialized() and signal.getsignal(signal.SIGTERM) == before[1]\n"
            "assert torch.equal(torch.get_rng_state(), before[0])\n"
            "assert not {'matplotlib', 'wandb', 'autopsy', 'drain3', 'rdkit'} & set(sys.modules)\n")
    end, = wait(start("-c", code, cwd=tmp_path))
    assert (end.code, end.out, end.err) == (0, "", "") and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------- score
@pytest.fixture(scope="module")
def trained(dry, tmp_path_factory):
    """(folder of a short training on the demo log, the first part of new.log, its lines)."""
    folder, home = tmp_path_factory.mktemp("trained") / "run", dry[0][0] / "data/logs/demo600"
    train_here(home, folder, max_steps=60, batch_size=16, n_embd=32)
    lines, log = (home / "new.log").read_text().splitlines()[:2000], folder.parent / "new.log"
    log.write_text("\n".join(lines) + "\n")
    return folder, log, lines


def score(folder, source, out, *words):
    command = ["score", "--run_name", folder.name, "--out_dir", folder.parent, "--device", "cpu", "--input", source,
               "--out", out, *words]
    train_logbert.main([str(word) for word in command])
    with open(out, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def scored(trained, tmp_path_factory):
    folder, log, _ = trained
    return score(folder, log, tmp_path_factory.mktemp("scored") / "scores.csv")


def test_a_log_has_a_row_per_session_and_a_verdict(trained, scored):
    folder, _, lines = trained
    ids = [re.search(r"\bblk_\d+", line)[0] for line in lines]
    assert list(scored[0]) == "session first_line keys unseen score threshold verdict explanation".split()
    assert {row["session"]: int(row["keys"]) for row in scored} == Counter(ids) and len(scored) == len(set(ids)) > 80
    assert all(ids.index(row["session"]) + 1 == int(row["first_line"]) for row in scored)
    limit = strict(folder / "thresholds.json")["thresholds"]["bag"]
    for row in scored:
        assert float(row["threshold"]) == limit and row["verdict"] in ("normal", "anomaly")
        assert (float(row["score"]) > limit) == (row["verdict"] == "anomaly") == bool(row["explanation"])
        if int(row["unseen"]):                                          # WARN and ERROR lines were never trained on
            assert row["verdict"] == "anomaly" and "(never seen in training)" in row["explanation"]
    assert {row["verdict"] for row in scored} == {"normal", "anomaly"}
    assert {row["session"] for row in scored if int(row["unseen"])} == {
        block for block, line in zip(ids, lines) if re.search(" (WARN|ERROR) ", line)} != set()


def test_lines_of_no_template_are_counted_and_flagged(trained, scored, tmp_path):
    folder, _, lines = trained
    normal = next(row for row in scored if row["verdict"] == "normal")
    stamp = " ".join(lines[-1].split()[:2])
    more = [f"{stamp} FATAL names.Table: the moon fell on {normal['session']} twice",
            f"{stamp} FATAL names.Table: and again, {normal['session']}", f"{stamp} INFO names.Table: no block here"]
    (tmp_path / "more.log").write_text("\n".join(lines + more) + "\n")
    found = {row["session"]: row for row in score(folder, tmp_path / "more.log", tmp_path / "more.csv")}
    row = found.pop(normal["session"])
    assert int(row["unseen"]) == 2 and int(row["keys"]) == int(normal["keys"]) + 2 and row["verdict"] == "anomaly"
    assert "moon" in row["explanation"] and "(never seen in training)" in row["explanation"]
    unseen = read_file(folder / "best.safetensors")[1]["about"]["data"]["unseen"]
    assert float(row["score"]) == pytest.approx(unseen, abs=1e-4)
    assert found == {row["session"]: row for row in scored if row["session"] != normal["session"]}


def test_sessions_at_once_zipped_piped_and_sampled_score_the_same(trained, scored, tmp_path, monkeypatch, capsys):
    folder, log, _ = trained
    out = tmp_path / "other.csv"
    alone = score(folder, log, out, "--batch_size", 1)
    assert [[row[name] for name in ("session", "keys", "unseen", "verdict")] for row in alone] == \
        [[row[name] for name in ("session", "keys", "unseen", "verdict")] for row in scored]
    differences = [abs(float(a["score"]) - float(b["score"])) for a, b in zip(alone, scored)]
    assert max(differences) < 1.01e-4 and sum(x > 0 for x in differences) < 4       # but for rounding edges
    (tmp_path / "new.gz").write_bytes(gzip.compress(log.read_bytes()))
    assert score(folder, tmp_path / "new.gz", out) == scored
    capsys.readouterr()
    with open(log) as file:
        monkeypatch.setattr("sys.stdin", file)
        words = f"sample --run_name run --out_dir {folder.parent} --device cpu --input - --out {out}"
        train_logbert.main(words.split())
    with open(out, newline="") as file:
        assert list(csv.DictReader(file)) == scored
    flagged = sum(row["verdict"] == "anomaly" for row in scored)
    assert f"{out}: {len(scored)} sessions, {flagged} anomalous (both > " in capsys.readouterr().out


def test_another_detectors_verdict(trained, tmp_path):
    folder, log, _ = trained
    rows = score(folder, log, tmp_path / "x.csv", "--detector", "ordered top 2")
    assert float(rows[0]["threshold"]) == strict(folder / "thresholds.json")["thresholds"]["ordered top 2"]


def test_gaps_of_a_new_log_are_read(trained, dry, tmp_path):
    """Every line at the same time: other scores, if the model reads gaps."""
    _, log, lines = trained
    still = [re.sub(r"^\S+ \S+", "2024-06-21 00:00:00", line) for line in lines]
    for name, some in ("new.log", lines), ("still.log", still):
        (tmp_path / name).write_text("\n".join(some[:500]) + "\n")
    for use_gaps in (True, False):
        train_here(dry[0][0] / "data/logs/demo600", tmp_path / "run", max_steps=2, view="ordered", use_gaps=use_gaps)
        moving, still = ({row["session"]: float(row["score"]) for row in score(tmp_path / "run", tmp_path / name,
                          tmp_path / "x.csv")} for name in ("new.log", "still.log"))
        assert moving.keys() == still.keys() and len(moving) > 10
        moved = [abs(moving[session] - still[session]) for session in moving]
        assert max(moved) > 1e-3 if use_gaps else max(moved) == 0
        shutil.rmtree(tmp_path / "run")


@pytest.fixture
def cannot_score(trained, refused, tmp_path):
    """cannot_score(flag=value, ...) -> the one line of a score that has these flags instead of good ones."""
    folder, log, _ = trained

    def call(**fields):
        fields = dict(run_name="run", out_dir=folder.parent, input=log, out=tmp_path / "x.csv", device="cpu") | fields
        return refused("score", *[word for name, value in fields.items() for word in (f"--{name}", value)])
    return call


def test_what_cannot_be_scored(trained, cannot_score, tmp_path):
    folder = trained[0]
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run/thresholds.json").unlink()
    said = cannot_score(out_dir=tmp_path)
    assert "thresholds.json" in said and "train_logbert.py eval --run_name run" in said
    assert "there is run" in cannot_score(run_name="nobody") and "none yet" in cannot_score(out_dir=tmp_path / "no")
    assert "no.log" in cannot_score(input=tmp_path / "no.log") and "--input" in cannot_score(input="")
    assert "--batch_size" in cannot_score(batch_size=0) and "--detector" in cannot_score(detector="distance")
    assert "--detector" in cannot_score(detector="distance") and "did you mean --input" in cannot_score(inpt="x")
    (tmp_path / "other.log").write_text("a line of another kind\n" * 30)
    assert "other.log" in cannot_score(input=tmp_path / "other.log")
    (tmp_path / "empty.log").write_text("")
    assert "empty.log" in cannot_score(input=tmp_path / "empty.log")
    (tmp_path / "run/thresholds.json").write_text("{")
    assert "thresholds.json" in cannot_score(out_dir=tmp_path)


def test_a_score_that_fails_leaves_the_older_file_alone(cannot_score, tmp_path):
    (tmp_path / "x.csv").write_text("yesterday's\n")
    cannot_score(input="")
    assert "--out another file" in cannot_score(input=tmp_path / "x.csv")
    cannot_score(input=tmp_path / "no.log")
    cannot_score(detector="distance")
    assert (tmp_path / "x.csv").read_text() == "yesterday's\n"


def test_a_model_of_another_script_is_named(trained, refused, tmp_path):
    tensors, body = read_file(trained[0] / "best.safetensors")
    (tmp_path / "run").mkdir()
    write_file(tmp_path / "run/best.safetensors", tensors, body | {"about": {"config": {"edl_evidence": "exp"}}})
    assert "is of another script" in refused("eval", "--run_name", "run", "--out_dir", tmp_path, "--device", "cpu")


@pytest.mark.parametrize("damage", ["a bit", "the end", "the start"])
def test_a_damaged_model_is_named(trained, cannot_score, refused, tmp_path, damage):
    blob = bytearray((trained[0] / "best.safetensors").read_bytes())
    if damage == "a bit":
        blob[len(blob) // 2] ^= 1
    blob = {"a bit": blob, "the end": blob[:-100], "the start": b"torch" + blob}[damage]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/best.safetensors").write_bytes(blob)
    assert "best.safetensors" in cannot_score(out_dir=tmp_path)
    assert "best.safetensors" in refused("eval", "--run_name", "run", "--out_dir", tmp_path, "--device", "cpu")


def test_other_data_are_no_data_for_a_model(trained, refused, tmp_path):
    words = ["eval", "--run_name", "run", "--out_dir", trained[0].parent, "--device", "cpu", "--data_dir"]
    assert "are not the model's" in refused(*words, write_lives(tmp_path / "other"))
    assert "nowhere" in refused(*words, tmp_path / "nowhere")


# -------------------------------------------------------------------------------------------------- stop and go on
@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """20 steps without interruption."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train_here(data, folder, **RUN)
    return folder


FAULTS = {"kill-in-save:10:0": [5], "term:7:0": [5, 8]}                  # steps of the checkpoints that stay


def assert_same_run(folder, straight):
    step, tensors, body = last_checkpoint(folder)
    _, wanted, wanted_body = last_checkpoint(straight)
    assert step == 20 and not list(folder.glob("*.tmp.*"))
    assert_same_bits(tensors, wanted)
    assert (body["best"], body["guard"]) == (wanted_body["best"], wanted_body["guard"])
    assert_same_bits(read_file(folder / "best.safetensors")[0], read_file(straight / "best.safetensors")[0])
    rows, wanted_rows = metrics_of(folder), metrics_of(straight)
    assert max(Counter((row["step"], row["split"]) for row in rows).values()) == 1
    assert [row for row in rows if row["split"] == "val"] == [row for row in wanted_rows if row["split"] == "val"]
    for name in ("thresholds.json", "samples/final.txt"):
        assert (folder / name).read_text() == (straight / name).read_text()


def main_here(*words):
    """main() of a run in this process; signal handlers are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        train_logbert.main([str(word) for word in words])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("fault", FAULTS)
def test_an_interrupted_run_goes_on_to_the_same_bits(data, straight, tmp_path, capsys, undo, fault):
    """kill -9 while a checkpoint is written, and SIGTERM. kill -9 in the middle of a step is below, with two ranks."""
    folder = tmp_path / "run"
    if fault.startswith("kill"):
        end, = wait(start(*training(fault, folder, data_dir=data, **RUN), cwd=tmp_path))
        assert end.code == -9 and "Traceback" not in end.err
    else:                                                               # as main() returns, the exit code is 0
        with pytest.MonkeyPatch.context() as patch:
            for module, name in (train_logbert, "compute_loss"), (train_logbert, "get_batch"):
                patch.setattr(module, name, getattr(module, name))
            arm(fault)
            main_here(*training("", folder, data_dir=data, **RUN)[1:])
        assert "go on with: python train_logbert.py --resume --run_name run" in capsys.readouterr().out
    assert [int(path.stem[5:]) for path in checkpoints(folder)] == FAULTS[fault]
    assert bool(list(folder.glob("*.tmp.*"))) == (fault == "kill-in-save:10:0")
    main_here("--resume", "--run_name", "run", "--out_dir", tmp_path, "--device", "cpu")
    assert f"resumed at {FAULTS[fault][-1]}" in capsys.readouterr().out
    assert_same_run(folder, straight)


def test_the_centre_is_set_once(straight, data):
    """Defect 8: the mean under the first weights, the same bits in every checkpoint and over a resume (above)."""
    torch.manual_seed(0)
    found = train_logbert.load_data(train_logbert.Config(data_dir=str(data)))
    model = train_logbert.LogBERT(small_config(**RUN), found.about)
    train_logbert.set_centre(model, found, small_config(**RUN))
    kept = [read_file(path)[0]["model.centre"] for path in checkpoints(straight)]
    assert len(kept) == 4 and all(torch.equal(centre, model.centre) for centre in kept) and model.centre.norm() > 0.1
    assert torch.equal(train_logbert.load_model(straight / "best.safetensors").centre, model.centre)
    weights = [read_file(path)[0]["model.token.weight"] for path in checkpoints(straight)]
    assert not torch.equal(weights[0], weights[-1])
    assert "distance" in strict(straight / "eval.json")["table"]
    rows = metrics_of(straight)
    assert all(row["spread"] > 1e-4 and row["vhm"] > 0 for row in rows if row["split"] == "val")
    assert all(set(row["parts"]) == {"mlkp", "vhm"} for row in rows if row["split"] == "train")


def test_a_resume_can_bring_the_hypersphere_back(data, tmp_path):
    """As the fix record plans. A centre of zeros would be as far from every h_DIST, and the loss have no gradient."""
    train_here(data, tmp_path / "run", max_steps=3)
    train_here(data, tmp_path / "run", max_steps=6, resume=True, vhm_weight=0.1, learning_rate=1e-12)
    _, tensors, _ = last_checkpoint(tmp_path / "run")
    assert tensors["model.centre"].norm() > 0.1 and tensors["model.since"] == 3
    best = train_logbert.load_model(tmp_path / "run/best.safetensors")  # also if nothing got better since
    assert best.centre.norm() > 0.1 and best.about["config"]["vhm_weight"] == 0.1
    train_logbert.main(["eval", "--run_name", "run", "--out_dir", str(tmp_path), "--device", "cpu", "--detector",
                        "distance"])
    assert strict(tmp_path / "run/eval.json")["thresholds"]["distance"] < 60    # 64 were all of h_DIST from 0


@pytest.mark.parametrize("vhm_weight", [0.01, 0.1])
def test_the_hypersphere_trains(data, tmp_path, vhm_weight):
    train_here(data, tmp_path / "run", max_steps=40, eval_every=10, vhm_weight=vhm_weight, mask_weight=0.9)
    _, tensors, body = last_checkpoint(tmp_path / "run")
    assert finite(tensors) and sum(body["guard"]["skips"].values()) == 0
    rows = [row for row in metrics_of(tmp_path / "run") if row["split"] == "val"]
    assert all(row["loss"] == pytest.approx(0.9 * row["mlkp"] + vhm_weight * row["vhm"], rel=1e-6) for row in rows)
    assert rows[-1]["mlkp"] < rows[0]["mlkp"] and "distance" in strict(tmp_path / "run/eval.json")["table"]


def test_a_finished_run_can_go_further(data, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    train_here(data, tmp_path / "run", resume=True, **RUN | dict(max_steps=25))
    step, tensors, _ = last_checkpoint(tmp_path / "run")
    assert step == 25 and tensors["opt.token.weight.step"] == 25
    assert [row["step"] for row in metrics_of(tmp_path / "run") if row["split"] == "train"] == [5, 10, 15, 20, 25]


def test_a_damaged_checkpoint_is_passed_over(data, straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "run")
    newest = checkpoints(tmp_path / "run")[-1]
    newest.write_bytes(newest.read_bytes()[:-50])
    capsys.readouterr()
    train_here(data, tmp_path / "run", resume=True, **RUN)
    said = capsys.readouterr().out
    assert "passed over a damaged checkpoint" in said and newest.name in said and "resumed at 15" in said
    assert_same_bits(last_checkpoint(tmp_path / "run")[1], last_checkpoint(straight)[1])


def test_the_best_checkpoint_has_the_lowest_mlkp_and_no_nan_wins(data, tmp_path, monkeypatch):
    """Defect 15. Five evaluations; the loss, which holds the hypersphere, would choose others; a resume remembers."""
    mlkp, loss = iter([math.nan, 2.0, 1.5, math.nan, 1.8]), iter([0.1, 5.0, 4.0, math.nan, 0.2])
    monkeypatch.setattr(train_logbert, "evaluate", lambda *a: {"mlkp": next(mlkp, 1.7), "loss": next(loss, 0.0)})
    folder = tmp_path / "run"
    fields = dict(eval_every=2, save_every=2, keep=0)
    assert train_here(data, folder, max_steps=10, **fields)["best"] == 1.5
    at_6, body_6 = read_file(folder / "step-00000006.safetensors")
    wanted = {name[len("model."):]: x for name, x in at_6.items() if name.startswith("model.")}
    assert_same_bits(read_file(folder / "best.safetensors")[0], wanted)
    assert body_6["best"] == 1.5 and train_here(data, folder, max_steps=14, resume=True, **fields)["best"] == 1.5
    assert_same_bits(read_file(folder / "best.safetensors")[0], wanted)


# ----------------------------------------------------------------------------------------------------------------- eval
def table_in(text):
    """The lines of the table: a detector's name, perhaps a star, numbers."""
    return re.findall(r"^(?:unseen|PCA|2-gram|bag|ordered|both|distance).* \d\.\d{4} .*$", text, re.M)


def test_eval_prints_what_training_did_twice(straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "run")
    command = ["eval", "--run_name", "run", "--out_dir", str(tmp_path), "--device", "cpu"]
    wanted, before = table_in((straight / "train.log").read_text()), strict(straight / "eval.json")
    (tmp_path / "run/thresholds.json").unlink()
    for _ in range(2):
        capsys.readouterr()
        train_logbert.main(command)
        assert table_in(capsys.readouterr().out) == wanted and len(wanted) == 15
        assert {**strict(tmp_path / "run/eval.json"), "seconds": 0} == {**before, "seconds": 0}
        for name in ("thresholds.json", "samples/final.txt"):
            assert (tmp_path / "run" / name).read_text() == (straight / name).read_text()
    train_logbert.main([*command, "--quantile", "0", "--margin", "1.5", "--detector", "ordered"])
    found = strict(tmp_path / "run/eval.json")
    assert (found["quantile"], found["margin"]) == (0, 1.5)
    assert re.search(r"^ordered +\* ", capsys.readouterr().out, re.M)
    train_logbert.main([*command, "--margin", "0"])
    lowest, highest = found["thresholds"], strict(tmp_path / "run/thresholds.json")["thresholds"]
    for name, threshold in before["thresholds"].items():                # only -log p has a margin
        margin = 0.0 if "misses" in name or name == "distance" else 0.5
        assert threshold - highest[name] == pytest.approx(margin, abs=1e-9)
        assert lowest[name] - 3 * margin < highest[name], name


def test_a_runs_config_repeats_the_run(straight, tmp_path):
    train_logbert.main(["--config", str(straight / "config.json"), "--out_dir", str(tmp_path)])
    assert_same_run(tmp_path / "run", straight)


# ----------------------------------------------------------------------------------------------------- two processes
@pytest.fixture(scope="module")
def straight_pair(data, pair, tmp_path_factory):
    """20 steps on two processes without interruption."""
    folder = tmp_path_factory.mktemp("straight_pair") / "run"
    (_, first, weights), (_, _, others) = pair.run(run_in_pair, data, folder, "", RUN)
    assert first["step"] == 20 and weights == others
    return folder


def test_a_killed_pair_goes_on_to_the_same_bits(data, pair, straight_pair, tmp_path):
    """kill -9 of rank 1 in the middle of step 13; the resume is from step 10."""
    folder = tmp_path / "run"
    ends = wait(*start_pair("kill:13:1", folder, training, data_dir=data, **RUN))
    assert ends[1].code == -9 and ends[0].code not in (0, None) and ends[1].out == ""       # only rank 0 talks
    assert [int(path.stem[5:]) for path in checkpoints(folder)] == [5, 10]
    pair.run(run_in_pair, data, folder, "", RUN | dict(resume=True))
    assert_same_run(folder, straight_pair)


def test_one_process_two_processes_and_micro_batches_take_the_same_steps(data, pair, tmp_path):
    """1 x 16, 2 x 8 and 1 x 4 x 4 without dropout. Weights move by about 0.01; they differ by rounding alone."""
    fields = dict(max_steps=6, warmup_steps=1, save_every=1, keep=0, vhm_weight=0.1, use_gaps=True)
    pair.run(run_in_pair, data, tmp_path / "two", "", fields | dict(batch_size=8))
    train_here(data, tmp_path / "one", batch_size=16, **fields)
    train_here(data, tmp_path / "micro", batch_size=4, grad_accum=4, **fields)
    before = read_file(tmp_path / "one/step-00000001.safetensors")[0]
    one, two, micro = (last_checkpoint(tmp_path / name)[1] for name in ("one", "two", "micro"))
    assert max((one[name] - before[name]).abs().max() for name in one if name.startswith("model.")) > 5e-3
    for other in (two, micro):
        for name, tensor in one.items():
            if name.startswith("model."):                               # a key's bias has no gradient but rounding
                assert (other[name] - tensor).abs().max() < (2e-3 if name.endswith("qkv.bias") else 1e-5), name
    losses = [metrics_of(tmp_path / name)[-1]["loss"] for name in ("one", "two", "micro")]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)       # of the validation: all ranks take part


def test_bad_batches_on_one_rank_are_skipped_by_both(data, pair, tmp_path):
    """NaN in the loss, the input and the gradient, and an infinite loss, at several steps of the last rank."""
    faults = "nan-loss:0,2:1 nan-gap:4:1 nan-gradient:9,10:1 inf-loss:13:1 no-targets:15:1"
    folder, fields = tmp_path / "run", RUN | dict(log_every=1)
    (first, answer, weights), (second, _, others) = pair.run(run_in_pair, data, folder, faults, fields)
    assert first == second == "done" and answer["step"] == 20 and weights == others
    _, tensors, body = last_checkpoint(folder)
    assert finite(tensors) and tensors["opt.token.weight.step"] == 13
    assert body["guard"]["skips"] == {"output": 1, "loss": 4, "gradient": 2, "float16 overflow": 0}
    rows = [row for row in metrics_of(folder) if row["split"] == "train"]
    skipped = [0, *[row["skipped"] for row in rows]]
    assert [i for i in range(20) if skipped[i + 1] > skipped[i]] == [0, 2, 4, 9, 10, 13, 15]
    assert [row["step"] - 1 for row in rows if row["loss"] is None] == [0, 2, 4, 9, 10, 13, 15]
    log = (folder / "train.log").read_text()
    assert re.search(r"step 2: NaN detected BEFORE backward: loss of rank\(s\) \[1\] is nan \(loss\)", log)
    assert re.search(r"step 4: NaN .*\(output\b", log) and re.search(r"step 9: NaN detected AFTER backward", log)
    assert re.search(r"step 13: Inf detected BEFORE", log)
    assert [path.name for path in (folder / "autopsy").iterdir()] == ["step-00000000-rank1"]
    assert {path.name for path in folder.iterdir()} >= {"best.safetensors", "eval.json", "thresholds.json"}


def test_a_bad_rank_for_ever_stops_both(data, pair, tmp_path):
    """Defect 15: skipped in silence for ever."""
    answers = pair.run(run_in_pair, data, tmp_path / "run", "nan-loss:5-99:1", RUN | dict(max_skips=3, max_steps=40))
    assert [answer[0] for answer in answers] == ["stopped"] * 2 and answers[0][2] == answers[1][2]
    assert "4 non-finite steps in a row" in answers[0][1]
    step, tensors, body = last_checkpoint(tmp_path / "run")
    assert finite(tensors) and tensors["opt.token.weight.step"] == 5
    assert not list((tmp_path / "run").glob("*.nonfinite"))


# ------------------------------------------------------------------------------------------------------ bad numbers
def test_a_bad_first_batch_and_a_bad_epoch_end_well(data, tmp_path, undo):
    """Defect 15: the running loss of a bad batch 0 is undefined; an epoch of bad batches divides by zero."""
    arm("nan-loss:0-7:0")                                               # 60 rows in batches of 8: the whole first epoch
    answer = train_here(data, tmp_path / "run", max_steps=24, log_every=4, eval_every=8)
    rows = metrics_of(tmp_path / "run")
    assert [row["loss"] is None for row in rows if row["split"] == "train"] == [True, True, False, False, False, False]
    log = (tmp_path / "run/train.log").read_text()
    assert "epoch 2 || TRAIN_Loss:nan ||VAL_Loss:" in log and 0 < answer["best"] < 2.2
    step, tensors, body = last_checkpoint(tmp_path / "run")
    assert finite(tensors) and tensors["opt.token.weight.step"] == 16 and body["guard"]["skips"]["loss"] == 8


def main_stops(folder, **fields):
    """main() of a run that must end with code 3."""
    with pytest.raises(SystemExit) as stop:
        main_here(*training("", folder, **fields)[1:])
    assert stop.value.code == 3


@pytest.mark.parametrize("fault, step, said", [
    ("nan-loss:0-99:0", 0, "6 non-finite steps in a row"), ("nan-gradient:4-99:0", 4, "6 non-finite steps in a row"),
    ("nan-weight:7:0", 5, "weights are ALREADY non-finite")])
def test_what_never_ends_stops_with_code_3(data, tmp_path, undo, capsys, fault, step, said):
    """Defect 15: all-bad epochs and a NaN in a weight, after which every batch is bad."""
    arm(fault)
    main_stops(tmp_path / "run", data_dir=data, max_skips=5, **RUN | dict(save_every=5 if "weight" in fault else 0))
    error = capsys.readouterr().err
    assert said in error and "What to try" in error and "Traceback" not in error
    _, tensors, _ = last_checkpoint(tmp_path / "run")
    assert all(finite(read_file(path)[0]) for path in checkpoints(tmp_path / "run"))
    assert tensors["opt.token.weight.step"] == step
    assert not (tmp_path / "run/eval.json").exists()


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """--on_nonfinite stop with a NaN in the input, a count of 0 and a NaN in a weight -> folders, events, replays."""
    folders, patch = {}, pytest.MonkeyPatch()
    for fault in ("nan-gap:7:0", "no-targets:7:0", "nan-weight:7:0"):
        for module, name in (train_logbert, "compute_loss"), (train_logbert, "get_batch"), (os, "replace"):
            patch.setattr(module, name, getattr(module, name))
        folders[fault] = tmp_path_factory.mktemp("stopped") / "run"
        arm(fault)
        main_stops(folders[fault], data_dir=data, on_nonfinite="stop", **RUN)
        patch.undo()
    return {fault: (folder, folder / "autopsy/step-00000007-rank0") for fault, folder in folders.items()}


@pytest.mark.parametrize("fault, cause", [
    ("nan-gap:7:0", ["NaN CAME IN with: batch", "gaps"]),
    ("no-targets:7:0", ["Inf BORN in forward: div", "at train_logbert.py:"]),
    ("nan-weight:7:0", ["parameter token.weight already holds NaN", "NaN CAME IN with: parameter token.weight"])])
def test_the_autopsy_names_the_cause_and_can_be_replayed(stopped, capsys, fault, cause):
    _, event = stopped[fault]
    assert {path.name for path in event.iterdir()} == {"report.txt", "model.safetensors", "batch.safetensors"}
    report = (event / "report.txt").read_text()
    assert all(text in report for text in cause), report
    capsys.readouterr()
    if fault == "nan-gap:7:0":                                          # one of them as the command that is printed
        replay, = wait(start(ROOT / "autopsy.py", event, cwd=event.parent))
        assert replay.code == 0, replay.err
        out = replay.out
    else:
        autopsy.main(event)
        out = capsys.readouterr().out
    said, again = ([line for line in text.splitlines() if re.search("BORN|CAME IN|replayed|path to", line)]
                   for text in (report, out))
    assert said == again and len(said) >= 3 and "did NOT reproduce" not in out


def test_a_stopped_run_goes_on_to_the_same_bits(stopped, straight, data, tmp_path):
    for fault, (folder, _) in stopped.items():
        step, tensors, body = last_checkpoint(folder)
        assert step == (5 if "weight" in fault else 7)
        assert all(finite(read_file(path)[0]) for path in checkpoints(folder))
        assert not list(folder.glob("*.nonfinite"))
    shutil.copytree(folder, tmp_path / "run")
    train_here(data, tmp_path / "run", resume=True, **RUN)              # without the fault
    assert_same_bits(last_checkpoint(tmp_path / "run")[1], last_checkpoint(straight)[1])


def test_a_skipped_step_is_a_step_never_taken(data, tmp_path, undo):
    train_here(data, tmp_path / "without", max_steps=8, skip_steps="3,5-6", dropout=0.1)
    arm("nan-loss:3:0 inf-loss:5:0 nan-gradient:6:0")
    train_here(data, tmp_path / "skipped", max_steps=8, dropout=0.1)
    assert_same_bits(last_checkpoint(tmp_path / "skipped")[1], last_checkpoint(tmp_path / "without")[1])


# -------------------------------------------------------------------------------------------- other ways through a run
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(data, tmp_path, dtype):
    train_here(data, tmp_path / "run", **RUN | dict(max_steps=40, dtype=dtype, dropout=0.0))
    _, tensors, body = last_checkpoint(tmp_path / "run")
    assert finite(tensors) and all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert body["guard"]["skips"]["output"] == body["guard"]["skips"]["loss"] == body["guard"]["skips"]["gradient"] == 0
    mlkp = [row["mlkp"] for row in metrics_of(tmp_path / "run") if row["split"] == "val"]
    assert mlkp[-1] < mlkp[0] - 0.05


@pytest.mark.parametrize("view, next_share", [("ordered", 0.0), ("bag", 0.3)])
def test_plain_logbert_and_a_single_view(data, tmp_path, view, next_share):
    train_here(data, tmp_path / "run", max_steps=4, view=view, next_share=next_share, mask_min=0.65, mask_max=0.65)
    table = strict(tmp_path / "run/eval.json")["table"]
    assert list(table) == FLOORS + [view, f"{view} top 2", f"{view} misses"]


def test_a_look_at_samples_changes_nothing(data, tmp_path):
    train_here(data, tmp_path / "with", max_steps=6, sample_every=2, eval_every=3, dropout=0.2)
    train_here(data, tmp_path / "without", max_steps=6, dropout=0.2)
    assert_same_bits(last_checkpoint(tmp_path / "with")[1], last_checkpoint(tmp_path / "without")[1])
    names = sorted(path.name for path in (tmp_path / "with/samples").glob("*.txt"))
    assert names == ["final.txt"] + [f"step-{step:08d}.txt" for step in (2, 4, 6)]


def test_a_run_without_a_name_gets_one_by_the_time(data, tmp_path):
    train_here(data, tmp_path / "ignored", max_steps=1, run_name="")
    folder, = tmp_path.iterdir()
    assert re.fullmatch(r"logbert_\d{8}_\d{6}", folder.name) and (folder / "best.safetensors").exists()


def test_a_set_without_test_rows_and_with_few_others(tmp_path):
    data = write_data(tmp_path / "set", [[0, 1], [0, 1, 1], [1]], [[0, 1]])
    assert train_here(data, tmp_path / "run", max_steps=3)["table"] == {}
    assert list(strict(tmp_path / "run/thresholds.json")["thresholds"]) == DETECTORS
    assert not (tmp_path / "run/eval.json").exists()


# --------------------------------------------------------------------------------------------------------- refusals
def test_an_existing_run_is_not_overwritten(straight, data, refused):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    assert "--resume" in refused(*training("", straight, data_dir=data)[1:])
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*")} == before


def test_a_resume_keeps_the_model_and_the_data(straight, refused, tmp_path):
    words = ["--resume", "--run_name", straight.name, "--out_dir", straight.parent, "--device", "cpu"]
    others = {"n_layer": 3, "n_embd": 64, "n_head": 4, "view": "bag", "next_share": 0.1, "data_dir": tmp_path}
    for flag, value in others.items():
        assert f"--{flag} is " in refused(*words, f"--{flag}", value)
    assert "--use_gaps is True" in refused(*words, "--no_use_gaps")
    assert "beyond --max_steps 7" in refused(*words, "--max_steps", 7)
    assert f"there is {straight.name}" in refused("--resume", "--out_dir", straight.parent)


@pytest.mark.parametrize("change", ["another key", "longer", "more lines"])
def test_data_that_changed_under_a_run_are_refused(refused, tmp_path, change):
    """The same --data_dir, made anew: no checkpoint could go on with that."""
    data = write_data(tmp_path / "set", [[0, 1, 2], [0, 1]], [[0]])
    train_here(data, tmp_path / "run", max_steps=2, save_every=1)
    train = {"another key": [[0, 1, 3], [0, 1]], "longer": [[0, 1, 2, 2], [0]], "more lines": [[0, 1, 2]] * 2}[change]
    write_data(tmp_path / "set", train, [[0]])
    assert "--data_dir" in refused("--resume", "--run_name", "run", "--out_dir", tmp_path, "--max_steps", 4)


@pytest.mark.parametrize("words, said", [
    ("--view sideways", "bag, ordered, both"), ("--view bag --detector ordered", "bag, bag top 2, bag misses"),
    ("--detector distance", "--detector distance"), ("--mask_min .6 --mask_max .5", "mask_min not above mask_max"),
    ("--quantile 1.5", "--quantile 1.5"), ("--quantile -1", "--quantile -1"), ("--next_share 2", "--next_share"),
    ("--n_embd 30 --n_head 4", "not a multiple of --n_head 4"), ("--n_head 0", "--n_head 0"),
    ("--data_dir no/where", "--data_dir no/where"), ("--mask_weight 0", "--mask_weight 0"),
    ("--vhm_weight -1", "--vhm_weight -1"), ("--dropout 1", "--dropout"), ("--dropout inf", "--dropout"),
    ("--learning_rat 1", "did you mean --learning_rate?"), ("--batch_size many", "--batch_size"),
    ("bert", "unknown flag bert"), ("--skip_steps 3-x", "--skip_steps 3-x"), ("--dtype float8", "--dtype float8"),
    ("--device abacus", "--device abacus"), ("--config no.json", "--config no.json"), ("--max_steps -3", "--max_steps"),
    ("--seed -1", "--seed -1"), ("--batch_size 0", "--batch_size 0"), ("--on_nonfinite pray", "skip, stop"),
    ("--resume", "--resume needs --run_name")])
def test_bad_flags_are_refused(data, refused, tmp_path, words, said):
    valid = ["--device", "cpu", "--dry_run", "--max_steps", 1, "--data_dir", data, "--out_dir", tmp_path / "out"]
    assert said in refused(*valid, *words.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", ["--beta1 2", "--warmup_steps -1", "--margin -1", "--init_gain -1",
                                   "--vhm_ramp_steps -5", "--count_power -99", "--count_power 1000"])
def test_more_flags_that_cannot_work(data, refused, tmp_path, words):
    valid = ["--device", "cpu", "--dry_run", "--max_steps", 1, "--data_dir", data, "--out_dir", tmp_path / "out"]
    assert words.split()[0] in refused(*valid, *words.split())


def test_held_out_sessions_of_unseen_keys_alone(tmp_path):
    data = write_data(tmp_path / "set", [[0, 1], [1, 0]], [[3], [2, 3]], [[0, 1]], n_train_keys=2)
    try:
        train_here(data, tmp_path / "run", max_steps=2, next_share=0.0)
    except SystemExit as stop:
        assert stop.code == 2
    else:
        assert (tmp_path / "run/thresholds.json").exists()


def test_gaps_without_times_are_refused(refused, tmp_path):
    data = write_lives(tmp_path / "set", times=False)
    assert "--use_gaps" in refused("--dry_run", "--device", "cpu", "--data_dir", data, "--out_dir", tmp_path / "out",
                                   "--use_gaps")


def test_a_refusal_of_a_process_is_one_line(data, tmp_path):
    end, = wait(start(ROOT / "train_logbert.py", "--view", "sideways", "--data_dir", data, cwd=tmp_path))
    assert end.code == 2 and "--view sideways" in one_line(end.err)
