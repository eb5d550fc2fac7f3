"""train_student.py as a whole: teachers, students and both in a chain, in real processes that are killed, stopped and
fed with faults; the files they leave, the verbs eval, sample and rank, and what is refused. On small demo libraries.
"""
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from edl_tools import assert_same_bits, finite, last_checkpoint, metrics_of, one_line, start, start_pair, wait
from PIL import Image
from student_tools import (BLOCKED, GOOD, LIST, ROOT, ROWS, arm, assert_same_run, build_set, copy_scripts, expert_state,
                           main_here, main_stops, quicken, rank, run_in_pair, sample, small_config, strict, struck,
                           table_in, tables_of, train_here, train_rows, training)

import autopsy
import train_student
from data.spectra.features import featurise, join, nominal_mass, read_smiles
from data.spectra.msp import Bad
from data.spectra.tables import Molecules, read_folder
from runs import checkpoints, read_file

RUN = dict(max_steps=20, save_every=5, eval_every=10, log_every=5, keep=0)              # what is interrupted below
EXPERTS = ["switch", "expert0", "expert1", "expert2", "expert3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_set(tmp_path_factory.mktemp("light"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """More than 256 training molecules, which teachers are asked about at once, and masses to 500."""
    folder = build_set(tmp_path_factory.mktemp("wide"), limit=400, max_mz=500)
    assert len(read_folder(folder).rows["train"]) > 256
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        yield


@pytest.fixture
def refused(capsys):
    """refused(words...) -> the one line on stderr of main(words), after its exit code was found to be 2."""
    def call(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train_student.main([str(word) for word in words])
        assert stop.value.code == 2
        return one_line(capsys.readouterr().err)
    return call


# -------------------------------------------------------------------------------------------------------- the dry run
@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Fresh copies of the script's files, without any data, and a dry run in each -> the folders and what was said.

    The second has but torch, numpy, rdkit and safetensors, and no git; to save time it gets the data of the first."""
    homes, runs = [tmp_path_factory.mktemp(name) for name in ("all", "bare")], []
    for home, env in zip(homes, ({}, {"PYTHONPATH": "blocked", "PATH": ""})):
        copy_scripts(home)
        runs += wait(start("train_student.py", "--dry_run", "--device", "cpu", "--run_name", "first", cwd=home, **env))
        if home == homes[0]:
            shutil.copytree(home / "data/spectra/demo300", homes[1] / "data/spectra/demo300")
    return list(zip(homes, runs))


@pytest.mark.parametrize("name, kind", [("first-teacher", train_student.Teacher), ("first", train_student.Student)])
def test_a_dry_run_leaves_everything(dry, name, kind):
    home, end = dry[0]
    folder = home / "out" / name
    assert end.code == 0 and "error" not in end.err and "Traceback" not in end.err, end.err
    assert (home / "data/spectra/demo300/meta.json").exists()           # no data were there
    assert {path.name for path in (home / "out").iterdir()} == {"first", "first-teacher"}
    assert (folder / "train.pid").read_text().strip().isdigit()
    for picture in ("curves.png", "samples/final.png"):
        with Image.open(folder / picture) as image:
            image.load()
    assert [path.name for path in checkpoints(folder)] == ["step-00000010.safetensors", "step-00000020.safetensors"]
    assert finite(read_file(checkpoints(folder)[-1])[0]) and finite(read_file(folder / "best.safetensors")[0])
    model = train_student.load_model(folder / "best.safetensors")
    assert type(model) is kind and not model.training and model.about["config"]["width"] == 32


def test_the_log_tells_how_experts_are_used(dry):
    home, end = dry[0]
    teacher, student = ((home / "out" / name / "train.log").read_text() for name in ("first-teacher", "first"))
    assert re.search(r"^first: \d{3},\d{3} parameters, float32.* 273 spectra, batch 16 x 1 cpu x 1 = 16", student, re.M)
    assert len(re.findall(r"^MaxVio \d\.\d{3}", student, re.M)) == 4 and "MaxVio" not in teacher
    assert len(re.findall(r"^share of expert \d, in training 0\.\d+$", student, re.M)) == 4 and "expert" not in teacher
    assert "1 teacher(s) asked about 240 molecules, 2 passes" in end.out
    line = r"^step 20/20 100.0% \| loss \d.* hard .* rank .* soft .* feature .* switch .* expert0 .* expert3 .*\| " \
           r"grad norm .*\| lr .*\| skipped 0 \| .*spectra/s"
    assert re.search(line, student, re.M)
    assert all(re.search(rf"^{re.escape(row)} +\d", text, re.M) for row in ROWS for text in (teacher, student))


def test_measurements_are_strict_json(dry):
    for name, more in ("first-teacher", []), ("first", ["soft", "feature", *EXPERTS]):
        folder = dry[0][0] / "out" / name
        rows = metrics_of(folder)
        assert [(row["step"], row["split"]) for row in rows] == [
            *((step, "train") for step in (5, 10)), (10, "val"), *((step, "train") for step in (15, 20)), (20, "val")]
        assert set(rows[0]) == {"step", "split", "loss", "parts", "grad_norm", "lr", "skipped", "spectra_per_s"}
        assert list(rows[0]["parts"]) == ["hard", "rank", *more]
        assert set(rows[2]) == {"step", "split", "loss", "recall@10", "error"}
        assert rows[2]["error"] == pytest.approx(1 - rows[2]["recall@10"] + rows[2]["loss"])
        if more:
            shares = [[row["parts"][f"expert{i}"] for i in range(4)] for row in rows if row["split"] == "train"]
            assert all(sum(row) == pytest.approx(1) for row in shares)
        found, about = (strict(folder / f"{name}.json") for name in ("eval", "config"))
        assert list(found["columns"]) == ["model", "1-NN", "replicate"]
        assert all(list(column) == ROWS for column in found["columns"].values())
        assert (found["split"], found["library"], found["columns"]["model"]["n"]) == ("test", 300, 30)
        usage = [value for key, value in found["extra"].items() if key.startswith("share of expert")]
        assert sum(usage) == pytest.approx(1) if more else usage == []
        assert all(found["extra"][f"ms per molecule, batch {size}, one thread"] > 0 for size in (1, 256))
        assert about["derived"]["max_steps"] == 20 and about["world_size"] == 1
        assert set(about["config"]) == set(vars(train_student.Config()))
    assert (about["config"]["phase"], about["config"]["teacher"]) == ("student", "out/first-teacher/best.safetensors")


def test_it_runs_with_four_packages_and_without_git(dry):
    (home, end), (full, _) = dry[1], dry[0]
    assert end.code == 0 and "Traceback" not in end.err, end.err
    assert end.out.count("no curves.png") == 2 and end.out.count("no final.png: pip install matplotlib") == 2
    assert strict(home / "out/first/config.json")["commit"] == "" and not (home / "out/first/curves.png").exists()
    for name in ("first-teacher", "first"):
        assert_same_bits(last_checkpoint(home / "out" / name)[1], last_checkpoint(full / "out" / name)[1])
        one, other = (strict(folder / "out" / name / "eval.json")["columns"] for folder in (home, full))
        assert one == other


def test_importing_the_script_does_nothing(tmp_path):
    code = ("import sys, signal, torch; before = torch.get_rng_state(), signal.getsignal(signal.SIGTERM)\n"
            f"sys.path.insert(0, {str(ROOT)!r}); import train_student\n"
            "assert not torch.distributed.is_initialized() and signal.getsignal(signal.SIGTERM) == before[1]\n"
            "assert torch.equal(torch.get_rng_state(), before[0])\n"
            f"assert not {{*{BLOCKED}, 'autopsy'}} & set(sys.modules)\n")
    end, = wait(start("-c", code, cwd=tmp_path))
    assert (end.code, end.out, end.err) == (0, "", "") and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- phases
@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """20 steps of each without interruption -> phase: folder; the teacher is the student's."""
    home = tmp_path_factory.mktemp("straight")
    folders = {name: home / name for name in ("teacher", "student", "alone", "pretrain")}
    train_here(data, folders["teacher"], phase="teacher", **RUN)
    train_here(data, folders["student"], teacher=str(folders["teacher"] / "best.safetensors"), **RUN)
    train_here(data, folders["alone"], phase="student", **RUN)
    train_here(data, folders["pretrain"], phase="pretrain", **RUN | dict(max_steps=80, log_every=20))
    return folders


@pytest.fixture(scope="module")
def best(straight):
    return str(straight["teacher"] / "best.safetensors")


@pytest.fixture(scope="module")
def phases(data, best):
    """What the tests below run: the fields of a teacher, of its student."""
    return {"teacher": dict(data_dir=str(data), phase="teacher"),
            "student": dict(data_dir=str(data), phase="student", teacher=best)}


def test_each_phase_learns(straight):
    for phase, folder in straight.items():
        losses = [row["loss"] for row in train_rows(folder)]
        assert losses[-1] < 0.95 * losses[0] and finite(last_checkpoint(folder)[1]), phase
        assert strict(folder / "config.json")["config"]["phase"] == {"alone": "student"}.get(phase, phase)
        assert (folder / "eval.json").exists() == (phase != "pretrain")
    parts = {phase: list(train_rows(folder)[0]["parts"]) for phase, folder in straight.items()}
    assert parts == {"teacher": ["hard", "rank"], "student": ["hard", "rank", "soft", "feature", *EXPERTS],
                     "alone": ["hard", "rank", *EXPERTS], "pretrain": ["accuracy"]}
    assert not torch.equal(expert_state(straight["student"])["usage"], expert_state(straight["alone"])["usage"])


def test_the_bias_and_the_usage_follow_the_steps(straight):
    """20 steps of 1e-3 each way, so the bias is a multiple of it; they are in best too."""
    tensors = last_checkpoint(straight["student"])[1]
    moved = tensors["model.bias"] / 1e-3
    assert (moved.round() - moved).abs().max() < 1e-3 and 0 < moved.abs().max() < 20.5 and tensors["model.usage"].sum(
        ).item() == pytest.approx(1, abs=1e-5)
    assert tensors["model.usage"].std() > 1e-3
    assert {"bias", "usage", "balance"} <= set(read_file(straight["student"] / "best.safetensors")[0])


@pytest.fixture(scope="module")
def tutors(data, tmp_path_factory):
    """Two teachers without dropout, whose every pass is the same."""
    folders = [tmp_path_factory.mktemp("tutors") / name for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        train_here(data, folder, phase="teacher", max_steps=4, seed=seed, dropout=0.0, input_dropout=0.0)
    return [str(folder / "best.safetensors") for folder in folders]


def test_two_teachers_teach_their_mean(data, tutors, tmp_path, capsys):
    both = ",".join(tutors)
    train_here(data, tmp_path / "run", teacher=both, max_steps=4)
    assert "2 teacher(s) asked about 58 molecules, 2 passes" in capsys.readouterr().out
    tensors = last_checkpoint(tmp_path / "run")[1]
    assert tensors["model.projector.weight"].shape == (32, 16) and finite(tensors)
    one, other, mean = (tables_of(data, path, dict(passes=2)) for path in (*tutors, both))
    assert ((one["taught"].float() + other["taught"].float()) / 2 - mean["taught"].float()).abs().max() < 2e-3
    assert torch.equal(torch.cat([one["feature"], other["feature"]], 1), mean["feature"])
    assert (one["taught"].float() - other["taught"].float()).abs().max() > 0.1


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_all_teachers_are_heard_however_many_passes(data, tutors, passes):
    one, two = (tables_of(data, ",".join(paths), dict(passes=passes))["taught"].float()
                for paths in (tutors, tutors[::-1]))
    assert (one - two).abs().max() < 2e-3


def test_pretraining_on_data_and_on_a_list_and_a_teacher_that_begins_there(data, straight, tmp_path, capsys):
    found = read_folder(data)
    names = [found.smiles(row) for row in range(40)]
    (tmp_path / "list.smi").write_text("\n".join([*names[:30], "not a molecule", "", *names[30:40]]) + "\n")
    train_here("", tmp_path / "listed", phase="pretrain", smiles=str(tmp_path / "list.smi"), max_steps=10, eval_every=5)
    assert "40 molecules, 1 lines left out" in capsys.readouterr().out
    assert set(metrics_of(tmp_path / "listed")[-1]) == {"step", "split", "loss", "error"}
    for folder in (straight["pretrain"], tmp_path / "listed"):
        start = str(folder / "best.safetensors")
        train_here(data, tmp_path / "run", phase="teacher", init=start, max_steps=1, learning_rate=1e-12)
        tensors = last_checkpoint(tmp_path / "run")[1]
        for name, tensor in read_file(start)[0].items():
            if name.startswith("encoder."):
                assert (tensors[f"model.{name}"] - tensor).abs().max() < 1e-9, name
        shutil.rmtree(tmp_path / "run")


def test_a_student_learns_more_molecules_from_its_teachers(data, best, tmp_path, capsys, monkeypatch):
    known = read_folder(data).smiles(0)
    (tmp_path / "more.smi").write_text(f"{known} known\nCCCCCCN\nno molecule\nCCN.Cl\nOCCCCCN x\n{'C' * 30}\nNCCCCCC\n")
    fields = dict(teacher=best, smiles=str(tmp_path / "more.smi"), save_every=5, max_steps=20, keep=0)
    train_here(data, tmp_path / "straight", **fields)
    said = capsys.readouterr().out
    assert "2 molecules; left out: RDKit cannot read the structure 1, several components 1, heavier than 160 Da 1, " \
        "known already, or without an InChIKey 2\n" in said
    assert "asked about 60 molecules" in said and "72 spectra" in said
    arm("nan-loss:7:0", monkeypatch)
    main_stops(tmp_path / "run", data_dir=data, on_nonfinite="stop", **fields)
    monkeypatch.undo()
    monkeypatch.setattr(train_student.search, "speed", lambda *_: {})
    main_here("--resume", "--run_name", "run", "--out_dir", tmp_path, "--device", "cpu")
    assert_same_bits(last_checkpoint(tmp_path / "run")[1], last_checkpoint(tmp_path / "straight")[1])
    assert strict(tmp_path / "run/eval.json")["library"] == 77 and finite(last_checkpoint(tmp_path / "run")[1])


def test_the_guides_command_with_a_json_config(data, best, straight, tmp_path):
    """--config FILE --teacher FILE --device cpu."""
    fields = vars(small_config(data_dir=str(data), **RUN)) | {"out_dir": str(tmp_path), "run_name": "run"}
    fields = {name: value for name, value in fields.items() if name not in ("device", "teacher", "phase")}
    (tmp_path / "mine.json").write_text(json.dumps(fields))
    main_here("--config", tmp_path / "mine.json", "--teacher", best, "--device", "cpu")
    assert_same_run(tmp_path / "run", straight["student"])


def test_a_runs_config_repeats_the_run(straight, tmp_path):
    for phase in ("teacher", "student"):
        main_here("--config", straight[phase] / "config.json", "--out_dir", tmp_path)
        assert_same_run(tmp_path / phase, straight[phase])


# -------------------------------------------------------------------------------------------------- stop and go on
FAULTS = {"kill-in-save:10:0": [5], "kill:13:0": [5, 10], "term:7:0": [5, 8]}    # steps of the checkpoints that stay


@pytest.mark.parametrize("phase, fault", [("teacher", "kill-in-save:10:0"), ("student", "kill:13:0"),
                                          ("teacher", "term:7:0"), ("student", "term:7:0")])
def test_an_interrupted_run_goes_on_to_the_same_bits(phases, straight, tmp_path, capsys, phase, fault):
    """kill -9 while a checkpoint is written and in the middle of a step, in real processes, and SIGTERM."""
    folder = tmp_path / "run"
    if fault.startswith("kill"):
        end, = wait(start(*training(fault, folder, **phases[phase], **RUN), cwd=tmp_path))
        assert end.code == -9 and "Traceback" not in end.err, end.err
    else:                                                               # as main() returns, the exit code is 0
        with pytest.MonkeyPatch.context() as patch:
            arm(fault, patch)
            main_here(*training("", folder, **phases[phase], **RUN)[1:])
        assert "go on with: python train_student.py --resume --run_name run" in capsys.readouterr().out
    assert [int(path.stem[5:]) for path in checkpoints(folder)] == FAULTS[fault]
    assert bool(list(folder.glob("*.tmp.*"))) == (fault == "kill-in-save:10:0")
    main_here("--resume", "--run_name", "run", "--out_dir", tmp_path, "--device", "cpu")
    assert f"resumed at {FAULTS[fault][-1]}" in capsys.readouterr().out
    assert_same_run(folder, straight[phase])


def test_a_signal_in_the_teachers_phase_stops_the_chain(data, straight, tmp_path, capsys):
    """It says how to go on; the whole chain goes on too, to the bits of a teacher and a student one by one."""
    words = training("", tmp_path / "run", data_dir=data, teacher_epochs=99, **RUN)[1:]
    with pytest.MonkeyPatch.context() as patch:
        arm("term:7:0", patch)
        main_here(*words)
    said = capsys.readouterr().out
    assert "python train_student.py --resume --run_name run-teacher" in said and "teacher(s) asked" not in said
    assert not (tmp_path / "run").exists() and last_checkpoint(tmp_path / "run-teacher")[0] == 8
    shutil.copytree(tmp_path / "run-teacher", tmp_path / "other/run-teacher")
    main_here("--resume", "--run_name", "run-teacher", "--out_dir", tmp_path / "other", "--device", "cpu")
    assert_same_run(tmp_path / "other/run-teacher", straight["teacher"])
    with pytest.raises(SystemExit):                 # not on other data, and not with another model
        main_here(*words, "--resume", "--gnn_width", 12)
    assert "--gnn_width is 8 in the checkpoint" in capsys.readouterr().err
    main_here(*words, "--resume")
    assert_same_run(tmp_path / "run-teacher", straight["teacher"])
    assert_same_run(tmp_path / "run", straight["student"])


def test_a_signal_in_the_students_phase_of_a_chain_saves_and_stops(data, straight, tmp_path):
    end, = wait(start(*training("term-student:7:0", tmp_path / "run", data_dir=data, **RUN), cwd=tmp_path))
    assert end.code == 0 and "go on with: python train_student.py --resume --run_name run\n" in end.out, end.err
    assert [int(path.stem[5:]) for path in checkpoints(tmp_path / "run")] == [5, 8]
    main_here("--resume", "--run_name", "run", "--out_dir", tmp_path, "--device", "cpu")
    assert_same_run(tmp_path / "run", straight["student"])


@pytest.mark.parametrize("phase", ["teacher", "student"])
def test_a_finished_run_can_go_further(phases, straight, tmp_path, phase):
    shutil.copytree(straight[phase], tmp_path / "run")
    before = expert_state(tmp_path / "run") if phase == "student" else {}
    train_here(folder=tmp_path / "run", resume=True, **phases[phase], **RUN | dict(max_steps=25))
    step, tensors, _ = last_checkpoint(tmp_path / "run")
    assert step == 25 and tensors["opt.head.place.step"] == 25
    assert [row["step"] for row in train_rows(tmp_path / "run")] == [5, 10, 15, 20, 25]
    assert not before or not torch.equal(before["usage"], tensors["model.usage"])


def test_a_damaged_checkpoint_is_passed_over(phases, straight, tmp_path, capsys):
    shutil.copytree(straight["student"], tmp_path / "run")
    newest = checkpoints(tmp_path / "run")[-1]
    newest.write_bytes(newest.read_bytes()[:-50])
    train_here(folder=tmp_path / "run", resume=True, **phases["student"], **RUN)
    said = capsys.readouterr().out
    assert "passed over a damaged checkpoint" in said and newest.name in said and "resumed at 15" in said
    assert_same_run(tmp_path / "run", straight["student"])


def test_the_best_checkpoint_has_the_lowest_error_and_no_nan_wins(phases, tmp_path, monkeypatch):
    """Five evaluations; the loss would choose others; a resume remembers."""
    error, loss = iter([math.nan, 0.9, 0.4, math.nan, 0.6]), iter([0.1, 5.0, 4.0, math.nan, 0.2])
    monkeypatch.setattr(train_student, "evaluate", lambda *a: {"loss": next(loss, 0.0), "error": next(error, 0.5)})
    folder, fields = tmp_path / "run", phases["student"] | dict(eval_every=2, save_every=2, keep=0)
    assert train_here(folder=folder, max_steps=10, **fields)["best"] == 0.4
    at_6, body_6 = read_file(folder / "step-00000006.safetensors")
    wanted = {name[len("model."):]: x for name, x in at_6.items() if name.startswith("model.")}
    assert_same_bits(read_file(folder / "best.safetensors")[0], wanted)
    assert body_6["best"] == 0.4 and train_here(folder=folder, max_steps=14, resume=True, **fields)["best"] == 0.4
    assert_same_bits(read_file(folder / "best.safetensors")[0], wanted)


# ----------------------------------------------------------------------------------------------------- two processes
@pytest.fixture(scope="module")
def straight_pair(phases, pair, tmp_path_factory):
    """20 steps on two processes without interruption -> phase: folder."""
    home = tmp_path_factory.mktemp("straight_pair")
    for phase, fields in phases.items():
        (_, first, state), (_, second, other) = pair.run(run_in_pair, "", home / phase, "", RUN | fields)
        assert first["step"] == second["step"] == 20 and state == other
    return {phase: home / phase for phase in phases}


def test_a_killed_pair_goes_on_to_the_same_bits(phases, pair, straight_pair, tmp_path):
    """kill -9 of rank 1 in the middle of step 13; the resume is from step 10."""
    folder = tmp_path / "run"
    ends = wait(*start_pair("kill:13:1", folder, training, **phases["student"], **RUN))
    assert ends[1].code == -9 and ends[0].code not in (0, None) and ends[1].out == ""       # only rank 0 talks
    assert [int(path.stem[5:]) for path in checkpoints(folder)] == [5, 10]
    answers = pair.run(run_in_pair, "", folder, "", RUN | phases["student"] | dict(resume=True))
    assert answers[0][2] == answers[1][2]
    assert_same_run(folder, straight_pair["student"])


@pytest.mark.parametrize("phase", ["teacher", "student"])
def test_one_process_two_processes_and_micro_batches_take_the_same_steps(phases, pair, tmp_path, phase):
    """1 x 16, 2 x 8 and 1 x 4 x 4 without dropout. Weights move by about 0.01; they differ by rounding alone."""
    fields = phases[phase] | dict(max_steps=6, warmup_steps=1, save_every=1, keep=0, dropout=0.0, input_dropout=0.0,
                                  passes=0)
    (_, _, state), (_, _, other) = pair.run(run_in_pair, "", tmp_path / "two", "", fields | dict(batch_size=8))
    assert state == other
    train_here(folder=tmp_path / "one", batch_size=16, **fields)
    train_here(folder=tmp_path / "micro", batch_size=4, grad_accum=4, **fields)
    before = read_file(tmp_path / "one/step-00000001.safetensors")[0]
    one, two, micro = (last_checkpoint(tmp_path / name)[1] for name in ("one", "two", "micro"))
    assert max((one[name] - before[name]).abs().max() for name in one if name.startswith("model.")) > 3e-3
    for other in (two, micro):
        for name, tensor in one.items():
            if name.startswith("model."):
                limit = 2e-3 if name.endswith("attention.bias") else 2e-5       # which has no gradient but rounding
                assert (other[name] - tensor).abs().max() < limit, name
        assert phase == "teacher" or torch.equal(other["model.bias"], one["model.bias"])
    losses = [metrics_of(tmp_path / name)[-1]["loss"] for name in ("one", "two", "micro")]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)       # of the validation: all ranks take part


@pytest.fixture(scope="module")
def wide_tutor(wide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide_tutor") / "tutor"
    train_here(wide, folder, phase="teacher", max_steps=2)
    return str(folder / "best.safetensors")


def test_ranks_that_share_the_asking_know_the_same(wide, wide_tutor, pair):
    """More than 256 molecules, so that rank 1 asks about some; dropout is a function of the molecules, not the rank."""
    alone = tables_of(wide, wide_tutor, dict(passes=2))
    for tables in pair.run(tables_of, wide, wide_tutor, dict(passes=2)):
        assert tables.keys() == alone.keys() == {"taught", "feature", "confidence"}
        assert_same_bits(tables, alone)
    data = read_folder(wide)
    train, others = data.rows["train"], np.concatenate([data.rows["val"], data.rows["test"]])
    assert alone["taught"].dtype == alone["feature"].dtype == torch.float16 and finite(alone)
    assert not any(table[others].any() for table in alone.values())     # nobody asks about the rest
    confidence = alone["confidence"][train]
    assert confidence.mean().item() == pytest.approx(1, abs=1e-5) and confidence.std() > 0


def test_a_student_starts_from_the_same_weights_on_any_number_of_processes(wide, wide_tutor, pair, tmp_path):
    fields = dict(phase="student", teacher=wide_tutor, passes=0, max_steps=1, learning_rate=1e-12)
    pair.run(run_in_pair, wide, tmp_path / "two", "", fields | dict(batch_size=4))
    train_here(wide, tmp_path / "one", **fields)
    one, two = (last_checkpoint(tmp_path / name)[1]["model.head.forward_axis.weight"] for name in ("one", "two"))
    assert (one - two).abs().max() < 1e-6


def test_bad_batches_on_one_rank_are_skipped_by_both(phases, pair, tmp_path):
    """NaN in the input, the loss and the gradient, each at 1 % of the steps of the last rank, drawn at random."""
    steps, kinds = 220, ("nan-input", "nan-loss", "nan-gradient")
    causes = dict(zip(("output", "loss", "gradient"), struck(kinds, steps)))
    assert all(causes.values())
    folder, fields = tmp_path / "run", dict(max_steps=steps, log_every=20, eval_every=100, max_skips=40)
    (first, answer, state), (second, _, other) = pair.run(
        run_in_pair, "", folder, " ".join(f"{kind}:1%:1" for kind in kinds), phases["student"] | fields)
    assert first == second == "done" and answer["step"] == steps and state == other
    _, tensors, body = last_checkpoint(folder)
    skipped = sum(map(len, causes.values()))
    assert finite(tensors) and tensors["opt.router.step"] == steps - skipped
    assert body["guard"]["skips"] == {cause: len(at) for cause, at in causes.items()} | {"float16 overflow": 0}
    assert train_rows(folder)[-1]["skipped"] == skipped and all(row["loss"] is not None for row in metrics_of(folder))
    assert 0 < tensors["model.bias"].abs().max() <= 1.001e-3 * (steps - skipped)
    assert tensors["model.usage"].sum().item() == pytest.approx(1, abs=1e-4)
    log = (folder / "train.log").read_text()
    for cause, at in causes.items():
        for step in at:
            assert re.search(rf"^step {step}: NaN detected .*\({cause}\b", log, re.M)
    events = [path.name for path in (folder / "autopsy").iterdir()]
    assert events == [f"step-{min(set.union(*causes.values())):08d}-rank1"]
    assert {path.name for path in folder.iterdir()} >= {"best.safetensors", "eval.json"}


# ------------------------------------------------------------------------------------------------------ bad numbers
def test_an_epoch_of_bad_batches_divides_by_nothing(phases, tmp_path, monkeypatch):
    """The original's seventh defect. 70 spectra in batches of 8: the whole first epoch, and one batch more."""
    arm("nan-loss:0-8:0", monkeypatch)
    answer = train_here(folder=tmp_path / "run", max_steps=27, log_every=9, eval_every=9, **phases["student"])
    rows = metrics_of(tmp_path / "run")
    assert [row["loss"] is None for row in rows if row["split"] == "train"] == [True, False, False]
    assert all(row["loss"] is not None for row in rows if row["split"] == "val") and 0 < answer["best"] < 2
    _, tensors, body = last_checkpoint(tmp_path / "run")
    assert finite(tensors) and tensors["opt.router.step"] == 18 and body["guard"]["skips"]["loss"] == 9


@pytest.mark.parametrize("phase, fault, step, said", [
    ("student", "nan-loss:0-99:0", 0, "6 non-finite steps in a row"),
    ("teacher", "nan-gradient:4-99:0", 4, "6 non-finite steps in a row"),
    ("student", "nan-weight:7:0", 5, "weights are ALREADY non-finite")])
def test_what_never_ends_stops_with_code_3(phases, tmp_path, monkeypatch, capsys, phase, fault, step, said):
    arm(fault, monkeypatch)
    main_stops(tmp_path / "run", max_skips=5, **phases[phase], **RUN | dict(save_every=5 if "weight" in fault else 0))
    error = capsys.readouterr().err
    assert said in error and "What to try" in error and "Traceback" not in error
    _, tensors, _ = last_checkpoint(tmp_path / "run")
    assert all(finite(read_file(path)[0]) for path in checkpoints(tmp_path / "run"))
    assert tensors["opt.head.place.step"] == step
    assert not (tmp_path / "run/eval.json").exists()


STOPS = {("student", "nan-input:7:0"): ["NaN CAME IN with: batch", "fp_value"],
         ("student", "no-rows:7:0"): ["Inf BORN in forward: div", "at train_student.py:"],
         ("student", "nan-weight:7:0"): ["parameter head.forward_axis.weight already holds NaN",
                                         "NaN CAME IN with: parameter head.forward_axis.weight"],
         ("teacher", "nan-input:7:0"): ["NaN CAME IN with: batch", "fp_value"]}


@pytest.fixture(scope="module")
def stopped(phases, tmp_path_factory):
    """--on_nonfinite stop -> (phase, fault): folder, its event."""
    folders = {key: tmp_path_factory.mktemp("stopped") / "run" for key in STOPS}
    for (phase, fault), folder in folders.items():
        with pytest.MonkeyPatch.context() as patch:
            arm(fault, patch)
            main_stops(folder, on_nonfinite="stop", **phases[phase], **RUN)
    return {key: (folder, folder / "autopsy/step-00000007-rank0") for key, folder in folders.items()}


@pytest.mark.parametrize("key", STOPS, ids=" ".join)
def test_the_autopsy_names_the_cause_and_can_be_replayed(stopped, capsys, key):
    _, event = stopped[key]
    assert {path.name for path in event.iterdir()} == {"report.txt", "model.safetensors", "batch.safetensors"}
    report = (event / "report.txt").read_text()
    assert all(text in report for text in STOPS[key]), report
    capsys.readouterr()
    autopsy.main(event)
    out = capsys.readouterr().out
    said, again = ([line for line in text.splitlines() if re.search("BORN|CAME IN|replayed|path to", line)]
                   for text in (report, out))
    assert said == again and len(said) >= 3 and "did NOT reproduce" not in out


def test_a_stopped_run_goes_on_to_the_same_bits(stopped, straight, phases, tmp_path):
    for (phase, fault), (folder, _) in stopped.items():
        assert last_checkpoint(folder)[0] == (5 if "weight" in fault else 7)
        assert all(finite(read_file(path)[0]) for path in checkpoints(folder)) and not list(folder.glob("*.nonfinite"))
        if "input" in fault:
            shutil.copytree(folder, tmp_path / phase)
            train_here(folder=tmp_path / phase, resume=True, **phases[phase], **RUN)        # without the fault
            assert_same_bits(last_checkpoint(tmp_path / phase)[1], last_checkpoint(straight[phase])[1])


@pytest.mark.parametrize("more", [{}, {"use_gradnorm": True, "grad_accum": 2}])
def test_a_skipped_step_is_a_step_never_taken(phases, tmp_path, monkeypatch, more):
    """Of weights, expert bias and usage, and GradNorm's factors."""
    fields = phases["student"] | more | dict(max_steps=9)
    train_here(folder=tmp_path / "without", skip_steps="3,5-7", **fields)
    arm("nan-loss:3:0 inf-loss:5:0 nan-gradient:6:0 nan-input:7:0", monkeypatch)
    train_here(folder=tmp_path / "skipped", **fields)
    assert_same_bits(last_checkpoint(tmp_path / "skipped")[1], last_checkpoint(tmp_path / "without")[1])


# -------------------------------------------------------------------------------------------- other ways through a run
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("phase", ["teacher", "student"])
def test_low_precision(phases, tmp_path, phase, dtype):
    train_here(folder=tmp_path / "run", **phases[phase], **RUN | dict(max_steps=30, dtype=dtype))
    _, tensors, body = last_checkpoint(tmp_path / "run")
    assert finite(tensors) and all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert body["guard"]["skips"]["output"] == body["guard"]["skips"]["loss"] == body["guard"]["skips"]["gradient"] == 0
    losses = [row["loss"] for row in train_rows(tmp_path / "run")]
    assert losses[-1] < 0.95 * losses[0]


WAYS = {"use_gradnorm": True, "lds_sigma": 1.5, "use_anchor": False, "use_fragments": False, "rank_weight": 0.0,
        "experts": 2}


@pytest.mark.parametrize("flag", WAYS)
def test_other_ways(phases, straight, tmp_path, flag):
    fields = {flag: WAYS[flag]} | ({"top_k": 1} if flag == "experts" else {})
    answer = train_here(folder=tmp_path / "run", **phases["student"], **RUN | fields)
    _, tensors, body = last_checkpoint(tmp_path / "run")
    usual, parts = last_checkpoint(straight["student"])[1], train_rows(tmp_path / "run")[0]["parts"]
    assert finite(tensors) and sum(body["guard"]["skips"].values()) == 0 and answer["step"] == 20
    assert not torch.equal(tensors["model.head.forward_axis.weight"], usual["model.head.forward_axis.weight"])
    assert ("rank" in parts) == (flag != "rank_weight")
    assert ("model.head.gate.weight" in tensors) == (flag != "use_anchor")
    assert ("model.head.place" in tensors) == (flag != "use_fragments")
    assert len(tensors["model.usage"]) == (2 if flag == "experts" else 4)
    balance = tensors["model.balance"]
    assert balance.sum().item() == pytest.approx(3, abs=1e-4)
    assert (balance.std() > 1e-3) == (flag == "use_gradnorm")
    train_student.load_model(tmp_path / "run/best.safetensors")


def test_the_bias_is_in_the_mixing_weights_only_if_asked(phases, tmp_path):
    for name in ("yes", "no"):                      # of three, so that the two chosen do not always have the same bias
        fields = phases["student"] | dict(bias_in_weights=name == "yes", bias_rate=0.05, experts=3, max_steps=4)
        train_here(folder=tmp_path / name, **fields)
    one, other = (last_checkpoint(tmp_path / name)[1]["model.router"] for name in ("yes", "no"))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("phase", ["teacher", "student"])
def test_a_look_at_samples_changes_nothing(phases, tmp_path, monkeypatch, phase):
    monkeypatch.setattr(train_student.metrics, "mirror", lambda path, pairs, log: path.write_text(f"{len(pairs)}"))
    train_here(folder=tmp_path / "with", max_steps=6, sample_every=2, eval_every=3, **phases[phase])
    train_here(folder=tmp_path / "without", max_steps=6, **phases[phase])
    assert_same_bits(last_checkpoint(tmp_path / "with")[1], last_checkpoint(tmp_path / "without")[1])
    names = sorted(path.name for path in (tmp_path / "with/samples").iterdir())
    assert names == ["final.png"] + [f"step-{step:08d}.png" for step in (2, 4, 6)]
    assert {path.read_text() for path in (tmp_path / "with/samples").iterdir()} == {"9"}


def test_a_run_without_a_name_gets_one_by_the_time(data, tmp_path):
    train_here(data, tmp_path / "ignored", max_steps=1, run_name="")
    teacher, student = sorted(tmp_path.iterdir(), key=lambda path: "teacher" not in path.name)
    assert re.fullmatch(r"student_\d{8}_\d{6}", student.name) and teacher.name == f"{student.name}-teacher"
    assert strict(student / "config.json")["config"]["teacher"] == str(teacher / "best.safetensors")


def test_150_epochs_stay_finite_and_come_to_use_all_experts(phases, tmp_path):
    """The guide's number of epochs, in which 5 steps are an epoch. The bias moves by 1e-3 a step, so that the experts'
    shares are 1/4 each only after some hundred steps; at the start one of them is hardly used."""
    train_here(folder=tmp_path / "run", **phases["student"], max_epochs=150, max_steps=0, batch_size=14, log_every=5,
               max_skips=0)
    rows = train_rows(tmp_path / "run")
    assert len(rows) == 150 and rows[-1]["skipped"] == 0 and all(row["loss"] is not None for row in rows)
    assert finite(last_checkpoint(tmp_path / "run")[1]) and rows[-1]["loss"] < 0.2 * rows[0]["loss"]
    shares = np.array([[row["parts"][f"expert{i}"] for i in range(4)] for row in rows])
    assert np.abs(shares.sum(1) - 1).max() < 1e-5
    assert 0.20 <= shares[100:].min() and shares[100:].max() <= 0.30
    assert np.abs(shares[:5] - 0.25).mean() > 3 * np.abs(shares[-5:] - 0.25).mean()


# ------------------------------------------------------------------------------------------------- sample and rank
@pytest.fixture(scope="module")
def sampled(straight, tmp_path_factory):
    """phase: the records of LIST as predicted by it, and the file they are in."""
    home = tmp_path_factory.mktemp("sampled")
    (home / "list.smi").write_text("\n".join(LIST) + "\n")
    return {phase: (sample(straight[phase], home / "list.smi", home / f"{phase}.msp"), home / f"{phase}.msp")
            for phase in ("student", "teacher")}


@pytest.mark.parametrize("phase", ["student", "teacher"])
def test_samples_are_spectra_that_a_reader_reads(sampled, straight, phase):
    records, path = sampled[phase]
    assert {record.fields["smiles"]: record.fields["name"] for record in records} == GOOD
    data = Molecules(join([featurise(read_smiles(text)) for text in GOOD]), 161)
    wanted = train_student.predict(train_student.load_model(straight[phase] / "best.safetensors"), data, np.arange(7))
    for record, spectrum in zip(records, wanted.numpy() * 999):
        assert not isinstance(record, Bad) and int(record.fields["mw"]) == nominal_mass(read_smiles(
            record.fields["smiles"]))
        assert record.intensity.max() == 999 and record.intensity.min() >= 0.99 and len(record.mz) > 0
        assert record.mz.max() <= int(record.fields["mw"]) + 5 and record.mz.min() > 0
        kept = np.flatnonzero(spectrum >= 0.999)
        assert np.array_equal(record.mz, kept) and np.abs(record.intensity - spectrum[kept]).max() < 0.00501
        assert f"predicted by {phase}" in record.fields["comments"]
    assert any(value % 1 for record in records for value in record.intensity)                   # no rounded peaks


def test_what_failed_is_listed_and_counted(straight, tmp_path, capsys):
    (tmp_path / "list.smi").write_text("\n".join(LIST) + "\n")
    records = sample(straight["student"], tmp_path / "list.smi", tmp_path / "new/x.msp")
    assert f"{len(records)} spectra; 3 lines left out, listed in {tmp_path / 'new/x.rejected.jsonl'}" in \
        capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "new/x.rejected.jsonl").read_text().splitlines()]
    assert {(row["text"], row["reason"]) for row in rows} == {
        ("no molecule", "RDKit cannot read the structure"), ("C1CC ring", "RDKit cannot read the structure"),
        ("CCCCCCCCCCCCCCCCCCCCCCCC tetracosane", "heavier than 160 Da")}
    assert {row["line"] for row in rows} >= {4, 7}


def test_a_molecule_that_is_too_heavy_is_listed_with_its_line(sampled):
    rejected = sampled["student"][1].with_name("student.rejected.jsonl")
    rows = {row["text"].split()[0]: row["line"] for row in map(json.loads, rejected.read_text().splitlines())}
    assert rows["CCCCCCCCCCCCCCCCCCCCCCCC"] == 8


def test_lines_that_are_no_molecules_are_counted(straight, refused, tmp_path):
    (tmp_path / "bad.smi").write_text("nothing here\n\nCCCCCCCCCCCCCCCCCCCCCCCCCCC\n")
    assert "none of its 2 lines" in refused("sample", "--run_name", "student", "--out_dir", straight["student"].parent,
                                            "--device", "cpu", "--smiles", tmp_path / "bad.smi")


def test_molecules_at_once_change_no_answer(sampled, straight, tmp_path):
    for phase, (records, path) in sampled.items():
        for size in (1, 3):
            others = sample(straight[phase], path.with_name("list.smi"), tmp_path / "x.msp", "--batch_size", size)
            assert [record.fields for record in others] == [record.fields for record in records]
            for one, other in zip(records, others):                     # but for rounding edges
                assert np.array_equal(one.mz, other.mz) and np.abs(one.intensity - other.intensity).max() < 0.0101


def test_matchms_reads_the_samples(sampled):
    importing = pytest.importorskip("matchms.importing")
    records, path = sampled["student"]
    for record, spectrum in zip(records, importing.load_from_msp(str(path)), strict=True):
        assert np.array_equal(spectrum.peaks.mz, record.mz)
        assert np.allclose(spectrum.peaks.intensities, record.intensity)
        assert spectrum.get("smiles") == record.fields["smiles"]


@pytest.mark.parametrize("phase", ["student", "teacher"])
def test_the_models_own_prediction_finds_its_molecule(sampled, straight, capsys, phase):
    records, path = sampled[phase]
    found, head = rank(straight[phase], path, path.with_name("list.smi"), capsys, "--top", 5)
    assert head == ["7 candidates; 3 lines left out"] and len(found) == 7
    lines = {line.split()[0]: " ".join(line.split()) for line in LIST if line}
    for record in records:
        number, rows = found[record.fields["name"]]
        scores = [score for score, _ in rows]
        assert number == 7 and len(rows) == 5 and scores == sorted(scores, reverse=True) and scores[0] > 0.999
        assert " ".join(rows[0][1].split()) == lines[record.fields["smiles"]] or scores[1] == scores[0]
    assert sum(rows[0][0] > rows[1][0] for _, rows in found.values()) >= 6


def test_a_window_leaves_candidates_of_about_the_mass(sampled, straight, capsys):
    records, path = sampled["student"]
    found, _ = rank(straight["student"], path, path.with_name("list.smi"), capsys, "--window", 12.5)
    mass = {record.fields["name"]: int(record.fields["mw"]) for record in records}
    of = {record.fields["smiles"]: int(record.fields["mw"]) for record in records}
    for name, (number, rows) in found.items():
        near = {smiles for smiles in of if abs(of[smiles] - mass[name]) <= 12.5}
        assert number == len(rows) == len(near) and {line.split()[0] for _, line in rows} == near
    assert {number for number, _ in found.values()} == {1, 2, 3}


def test_bad_queries_are_named_and_masses_are_needed_for_a_window(sampled, straight, capsys, refused, tmp_path):
    path = sampled["student"][1]
    good = "Name: {}\n{}Num Peaks: 2\n31 999\n46 200\n\n"
    text = good.format("first", "MW: 46\n") + "Name: broken\nNum Peaks: 3\n31 999\n\n" + good.format("no mass", "")
    (tmp_path / "some.msp").write_text(text)
    found, head = rank(straight["student"], tmp_path / "some.msp", path.with_name("list.smi"), capsys)
    assert [*found] == ["first", "no mass"] and len(head) == 2
    assert re.search(r"some.msp line 7: left out, number of peaks differs", head[1])
    words = ["rank", "--run_name", "student", "--out_dir", straight["student"].parent, "--device", "cpu", "--msp",
             tmp_path / "some.msp", "--candidates", path.with_name("list.smi"), "--window", 3]
    assert "line 11: no MW: in the record, which --window needs" in refused(*words)


# ----------------------------------------------------------------------------------------------------------------- eval
@pytest.mark.parametrize("phase", ["teacher", "student"])
def test_eval_prints_what_training_did_twice(straight, tmp_path, capsys, phase):
    shutil.copytree(straight[phase], tmp_path / "run")
    wanted, before = table_in((straight[phase] / "train.log").read_text()), strict(straight[phase] / "eval.json")
    for _ in range(2):
        capsys.readouterr()
        train_student.main(["eval", "--run_name", "run", "--out_dir", str(tmp_path), "--device", "cpu"])
        assert table_in(capsys.readouterr().out) == wanted and len(wanted) == len(ROWS)
        assert strict(tmp_path / "run/eval.json") == before


def test_eval_beside_other_runs(straight, tmp_path, capsys):
    for phase in ("teacher", "student", "alone"):
        shutil.copytree(straight[phase], tmp_path / phase)
    command = ["eval", "--out_dir", str(tmp_path), "--device", "cpu", "--run_name"]
    train_student.main([*command, "student", "--beside", "teacher,alone"])
    columns = strict(tmp_path / "student/eval.json")["columns"]
    assert list(columns) == ["model", "teacher", "alone", "1-NN", "replicate"]
    for phase in ("teacher", "alone"):
        assert columns[phase] == strict(straight[phase] / "eval.json")["columns"]["model"]
    assert re.search(r"^ +model +teacher +alone +1-NN +replicate$", capsys.readouterr().out, re.M)


def test_eval_on_other_data(straight, wide, refused, tmp_path):
    words = ["eval", "--run_name", "student", "--out_dir", straight["student"].parent, "--device", "cpu"]
    assert "its --max_mz is not that of student" in refused(*words, "--data_dir", wide)
    assert "nowhere" in refused(*words, "--data_dir", tmp_path / "nowhere")


# --------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("end", ["pt", "pth", "ckpt"])
@pytest.mark.parametrize("flag", ["teacher", "init"])
def test_a_pickle_is_refused_with_the_line_that_converts_it(refused, tmp_path, flag, end):
    path = tmp_path / f"best_finetune_teacher.{end}"
    path.write_bytes(b"PK\3\4")
    said = refused("--device", "cpu", "--out_dir", tmp_path / "out", f"--{flag}", path)
    assert "python -c" in said and f"torch.load('{path}', weights_only=True)" in said and "safetensors" in said
    assert not (tmp_path / "out").exists()
    (tmp_path / "config.yaml").write_text("batch_size: 32\n")
    assert "yaml.safe_load" in refused("--config", tmp_path / "config.yaml", f"--{flag}", path, "--device", "cpu")


def test_a_file_that_is_no_teacher_of_these_data(data, straight, wide, best, refused, tmp_path):
    words = training("", tmp_path / "run", data_dir=data)[1:]
    for phase in ("student", "pretrain"):
        assert "no teacher of 161 bins" in refused(*words, "--teacher", straight[phase] / "best.safetensors")
    assert "no such file" in refused(*words, "--teacher", tmp_path / "best.safetensors")
    assert "no such file" in refused(*words, "--teacher", f"{best},{tmp_path / 'best.safetensors'}")
    blob = bytearray(Path(best).read_bytes())
    blob[len(blob) // 2] ^= 1
    (tmp_path / "a.safetensors").write_bytes(blob)
    (tmp_path / "b.safetensors").write_bytes(blob[:-100])
    for name in ("a", "b"):
        assert f"{name}.safetensors" in refused(*words, "--teacher", tmp_path / f"{name}.safetensors")
    words = training("", tmp_path / "run", data_dir=wide)[1:]
    assert "no teacher of 501 bins" in refused(*words, "--teacher", best)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("phase, more", [("alone", ()), ("pretrain", ("--gnn_width", 12))])
def test_an_init_that_does_not_fit(data, straight, refused, tmp_path, phase, more):
    words = training("", tmp_path / "run", data_dir=data, phase="teacher")[1:]
    assert "--init" in refused(*words, "--init", straight[phase] / "best.safetensors", *more)


def test_an_existing_run_is_not_overwritten(data, straight, refused):
    for phase in ("teacher", "pretrain"):
        before = {path: path.stat().st_mtime_ns for path in straight[phase].rglob("*")}
        assert "--resume" in refused(*training("", straight[phase], data_dir=data, phase=phase)[1:])
        assert {path: path.stat().st_mtime_ns for path in straight[phase].rglob("*")} == before


def test_a_resume_keeps_the_model_and_the_data(straight, best, refused, tmp_path):
    words = ["--resume", "--run_name", "student", "--out_dir", straight["student"].parent, "--device", "cpu"]
    others = {"width": 32, "experts": 5, "top_k": 1, "blocks": 2, "phase": "teacher", "data_dir": tmp_path, "passes": 3,
              "teacher": f"{best},{best}", "seed": 2}
    for flag, value in others.items():
        assert f"--{flag} is " in refused(*words, f"--{flag}", value)
    for flag in ("use_anchor", "use_fragments"):
        assert f"--{flag} is True" in refused(*words, f"--no_{flag}")
    assert "beyond --max_steps 7" in refused(*words, "--max_steps", 7)
    assert "there is alone, pretrain, student, teacher" in refused("--resume", "--out_dir", straight["student"].parent)



@pytest.mark.parametrize("words, said", [
    ("--phase finetune", "pretrain, teacher or student"), ("--top_k 5", "not above --experts"),
    ("--top_k 0", "--top_k"), ("--use_gradnorm --compile", "--compile in its way"),
    ("--experts 0", "--experts 0"), ("--width 0", "--width 0"), ("--dropout 1", "--dropout"),
    ("--input_dropout -0.1", "--input_dropout"), ("--hard_weight -1", "--hard_weight"), ("--passes -1", "--passes"),
    ("--balance_weight inf", "--balance_weight"), ("--temperature 0", "--temperature"), ("--lds_sigma -1", "--lds"),
    ("--bias_rate -1", "--bias_rate"), ("--temperature_end 0", "--temperature_end"), ("--gnn_layers 0", "--gnn_layers"),
    ("--phase student --use_gradnorm", "--use_gradnorm: not with"),
    ("--phase student --init x.st", "--init: not with"), ("--use_gradnorm --feature_weight 0", "a weight of 0"),
    ("--phase student --smiles x.smi", "--smiles: not with"),
    ("--phase pretrain --smiles no.smi", "no.smi"), ("--smiles no.smi", "no.smi"),
    ("--data_dir no/where", "--data_dir no/where"),
    ("--teacher no.safetensors", "no such file"), ("--init no.safetensors", "no such file"),
    ("--learning_rat 1", "did you mean --learning_rate?"), ("--batch_size many", "--batch_size"),
    ("molecule", "unknown flag molecule"), ("--skip_steps 3-x", "--skip_steps 3-x"), ("--dtype float8", "--dtype"),
    ("--device abacus", "--device abacus"), ("--config no.json", "--config no.json"), ("--max_steps -3", "--max_steps"),
    ("--seed -1", "--seed -1"), ("--batch_size 0", "--batch_size 0"), ("--on_nonfinite pray", "skip, stop"),
    ("--resume", "--resume needs --run_name")])
def test_bad_flags_are_refused(data, refused, tmp_path, words, said):
    valid = ["--device", "cpu", "--dry_run", "--max_steps", 1, "--data_dir", data, "--out_dir", tmp_path / "out"]
    assert said in refused(*valid, *words.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb, words, said", [
    ("sample", "--run_name nobody", "there is alone, pretrain, stu"), ("sample", "--batch_size 0", "--batch_size 0"),
    ("sample", "--smiles", "expected one argument"), ("sample", "--smiles no.smi", "no.smi cannot be read"),
    ("sample", "--smile x", "did you mean --smiles"), ("sample", "--out {out}", "is a folder"),
    ("sample", "--out {smi}", "is what --smiles reads"),
    ("sample", "--run_name pretrain", "knows no spectra"), ("sample", "--smiles {bad}", "lines is a molecule"),
    ("rank", "--msp no.msp", "no.msp"), ("rank", "--candidates no.smi", "no.smi cannot be read"),
    ("rank", "--candidates {bad}", "is a molecule of at most 160 Da"), ("rank", "--windo 5", "did you mean --window"),
    ("eval", "--beside nobody", "there is alone"), ("eval", "--run_name pretrain", "knows no spectra"),
    ("eval", "--beside pretrain", "knows no spectra"), ("eval", "--device abacus", "--device abacus")])
def test_what_the_verbs_refuse(straight, sampled, refused, tmp_path, verb, words, said):
    path = sampled["student"][1]
    (tmp_path / "bad.smi").write_text("nothing here\n\nCCCCCCCCCCCCCCCCCCCCCCCCCCC\n")
    files = {"sample": ["--smiles", path.with_name("list.smi"), "--out", tmp_path / "x.msp"], "eval": [],
             "rank": ["--msp", path, "--candidates", path.with_name("list.smi")]}[verb]
    valid = [verb, "--run_name", "student", "--out_dir", straight["student"].parent, "--device", "cpu", *files]
    assert said in refused(*valid, *words.format(out=tmp_path, bad=tmp_path / "bad.smi",
                                                    smi=path.with_name("list.smi")).split())
    assert not (tmp_path / "x.msp").exists()
