"""train_distill.py as a whole: a teacher, its student and those to compare with, in real processes that are killed,
stopped and fed with faults; the files they leave, the verbs eval and sample, and what is refused. On small demo sets.
"""
import json
import math
import multiprocessing
import random
import re
import shutil
import time

import numpy as np
import pytest
import torch
from distill_tools import (GPT2, LLAMA, arm, assert_same_run, build_set, copy_scripts, main_here, main_stops, quicken,
                           random_model, rows_of, run_in_pair, strict, table_in, train_here, training, write_model,
                           write_set)
from edl_tools import assert_same_bits, finite, last_checkpoint, metrics_of, one_line, start, start_pair, wait
from safetensors.torch import load_file, save_file

import autopsy
import train_distill
from data.text import report, tables
from data.text.tables import read_folder
from runs import checkpoints, read_file, write_file

RUN = dict(batch_size=4, max_steps=20, save_every=5, eval_every=10, log_every=5, keep=0)    # what is interrupted below


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_set(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        yield


@pytest.fixture(scope="module")
def tutor(data, tmp_path_factory):
    """The hf folder of a teacher that has learnt a little."""
    folder = tmp_path_factory.mktemp("tutor") / "tutor"
    train_here(data, folder, phase="teacher", **RUN | dict(max_steps=60, save_every=0))
    return str(folder / "hf")


@pytest.fixture(scope="module")
def ways(data, tutor):
    """What is interrupted below: the fields of a teacher, of students."""
    student = dict(data_dir=str(data), phase="student", teacher=tutor)
    return {"teacher": dict(data_dir=str(data), phase="teacher"), "student": student,
            "accum": student | dict(grad_accum=2, batch_size=2, dropout=0.1), "cached": student | dict(cache_teacher=8)}


@pytest.fixture(scope="module")
def straight(ways, tmp_path_factory):
    """20 steps of each without interruption -> way: folder."""
    home = tmp_path_factory.mktemp("straight")
    for way, fields in ways.items():
        train_here(folder=home / way, **RUN | fields)
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


def in_child(fault, folder, **fields):
    """main() of a run that meets the fault, in a process of its own -> that process, which is under way."""
    def target():
        arm(fault, pytest.MonkeyPatch())
        main_here(*training("", folder, **fields)[1:])
    process = multiprocessing.get_context("fork").Process(target=target, daemon=True)
    process.start()
    return process


def ended(process):
    """-> its exit code, below 0 for a signal."""
    process.join(60)
    return process.exitcode


def resume(folder, *words):
    main_here("--resume", "--run_name", folder.name, "--out_dir", folder.parent, "--device", "cpu", *words)


# -------------------------------------------------------------------------------------------------------- the dry run
@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """A fresh copy of the script's files, without data, git and all packages but four, and a dry run without other
    flags in it -> the folder of its runs, what was said."""
    home = tmp_path_factory.mktemp("bare")
    copy_scripts(home)
    end, = wait(start("train_distill.py", "--dry_run", cwd=home, PYTHONPATH="blocked", PATH=""))
    assert end.code == 0 and "error" not in end.err and "Traceback" not in end.err, end.err
    return home / "out", end


@pytest.fixture(scope="module")
def dry_runs(dry):
    """-> {"": the student's folder, "-teacher": ..., "-ce0": ...}"""
    name = min((path.name for path in dry[0].iterdir()), key=len)
    return {more: dry[0] / f"{name}{more}" for more in ("", "-teacher", "-ce0")}


def test_a_dry_run_tells_what_it_does(dry, dry_runs):
    out = dry[1].out
    assert len(re.findall(r"^Training Configuration:$", out, re.M)) == 3
    assert out.count("  Warmup steps: 1 (20% of 5 total steps)\n") == 3 == out.count("  FP16: False   Device: ")
    for said in ("Learning rate: 0.004 ", "Max gradient norm: 1.0\n", "Temperature: 1.0 ", "Alpha: 0.9 "):
        assert re.search(f"^  .*{re.escape(said)}", out, re.M), said
    first = re.search(r"^first forward: student logits (\[2, \d+, 257\]), teacher logits (\[.*\]), T 1.0, alpha 0.9; "
                      r".*\b(\d+) supervised positions", out, re.M)
    assert first[1] == first[2] and int(first[3]) > 20
    number = r"(\d+\.\d{4})"
    for step in range(5):                           # of the teacher, the student without it, the student with it
        for more, n in (("teacher_logits X  kd X  ce X  teacher_ce X", 1), ("ce X", 2)):
            line = f"^step {step} micro-batch 0: student_logits X  {more}$".replace("X", number)
            assert len(re.findall(line, out, re.M)) == n, line
    log = (dry_runs[""] / "train.log").read_text()
    parts = f"loss {number} student_logits {number} teacher_logits {number} kd {number} ce {number} teacher_ce {number}"
    lines = re.findall(rf"^step \d/5 \d+\.0% \| {parts} \| grad norm .*\| lr .*\| skipped 0 \| .*tokens/s", log, re.M)
    assert len(lines) == 5
    for loss, _, _, kd, ce, _ in lines:             # what is added up, one denominator
        assert float(loss) == pytest.approx(0.9 * float(kd) + 0.1 * float(ce), abs=2e-4)
    assert re.search(r"^ +teacher +KD \+ CE +CE alone +difference +5-gram +unigram$", out, re.M)
    ce = re.findall(rf"^step 0 micro-batch 0: .*  ce {number}\b", out, re.M)
    assert ce[2] == ce[1] != ce[0]                  # the same weights meet the same rows, with a teacher and without
    assert len(table_in(out)) == 5 + 6 + 6 + 6 and "5 steps each\n" in out
    assert len(table_in(log)) == 6 and "18 questions of test, chance 0.1250" in log


@pytest.mark.parametrize("more", ["", "-teacher", "-ce0"])
def test_a_dry_run_leaves_everything(dry, dry_runs, more):
    folder = dry_runs[more]
    assert len(list(dry[0].iterdir())) == 3
    names = {"config.json", "train.log", "train.pid", "metrics.jsonl", "best.safetensors", "eval.json", "hf", "samples",
             "step-00000005.safetensors"} | ({"comparison.json"} if not more else set())
    assert {path.name for path in folder.iterdir()} == names            # no picture: matplotlib is blocked
    assert "no curves.png: pip install matplotlib" in (folder / "train.log").read_text()
    assert {path.name for path in (folder / "hf").iterdir()} == {"config.json", "model.safetensors"}
    final = (folder / "samples/final.txt").read_text()
    for text in ("### Instruction:\n", "### Response:\n--- test row ", "--- model\n"):
        assert final.count(text) == 8
    assert len(set(re.findall(r"--- test row (\d+)\n\S", final))) == 8 and "### End" not in final
    found, about, rows = strict(folder / "eval.json"), strict(folder / "config.json"), metrics_of(folder)
    assert about["commit"] == "" and set(about["config"]) == set(vars(train_distill.Config()))
    assert about["config"]["phase"] == ("teacher" if more == "-teacher" else "student")
    kinds = {"teacher"} if more == "-teacher" else set()
    assert set(found["table"]) == {"model", "teacher", "5-gram", "unigram"} - kinds == set(found["choices"])
    assert found["rows"] == {"val": 18, "test": 18} and found["choices"]["model"]["n"] == 18
    assert found["table"]["model"]["test perplexity"] == pytest.approx(math.exp(found["table"]["model"]["test CE"]))
    assert [(row["step"], row["split"]) for row in rows] == [*((step, "train") for step in range(1, 6)), (5, "val")]
    assert set(rows[-1]) == {"step", "split", "loss", "ce"} | (set() if kinds else {"kl", "teacher_ce"})
    assert rows[-1]["ce"] == pytest.approx(found["scores"]["val"]["ce"], rel=1e-6)      # best is the last


@pytest.mark.parametrize("more", ["", "-teacher", "-ce0"])
def test_the_hugging_face_folder_is_the_best_model(dry_runs, more):
    folder, tokens = dry_runs[more], torch.randint(0, 257, (2, 33), generator=torch.Generator().manual_seed(0))
    model = train_distill.load_hf(folder / "hf")
    with torch.no_grad():
        assert torch.equal(model(tokens), train_distill.load_model(folder / "best.safetensors")(tokens))
    assert_same_bits(dict(model.named_parameters()), read_file(folder / "best.safetensors")[0])


def test_transformers_opens_the_folder(dry_runs):
    transformers, tokens = pytest.importorskip("transformers"), torch.arange(66).view(2, 33)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(dry_runs[""] / "hf").eval()
    with torch.no_grad():
        assert (theirs(tokens).logits - train_distill.load_hf(dry_runs[""] / "hf")(tokens)).abs().max() < 2e-4


# --------------------------------------------------------------------------------------------- the original's command
def test_the_originals_command(tmp_path):
    """Dashes, a file of JSON lines, a model called gpt2 in the working directory."""
    copy_scripts(tmp_path)
    write_model(tmp_path / "teacher", LLAMA)
    write_model(tmp_path / "gpt2", GPT2)
    rows = [{"instruction": f"What is {i} plus {i}?", "response": f"It is {2 * i}."} for i in range(60)]
    (tmp_path / "quantumbench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "no JSON\n")
    words = ("--teacher-model teacher --student-model-name gpt2 --data-path quantumbench.jsonl --epochs 1 "
             "--batch-size 2 --learning-rate 2e-5 --dry-run --fp16")
    end, = wait(start("train_distill.py", *words.split(), cwd=tmp_path))
    assert end.code == 0 and "Traceback" not in end.err, end.err
    out = end.out
    assert "--fp16: --dtype float32, since there is no GPU\n" in out
    assert "  Learning rate: 2e-05 " in out and re.search(r"\bgpt2\b", out) and "teacher logits [2, " in out
    assert "  Warmup steps: 1 (20% of 5 total steps)\n" in out and "  FP16: False   Device: cpu" in out
    assert "not JSON 1" in out and len(list(tmp_path.glob("data/text/quantumbench-*/rejected.jsonl"))) == 1
    (folder,) = (tmp_path / "out").iterdir()        # a teacher is given: no other runs
    assert [path.name for path in checkpoints(folder)] == ["step-00000005.safetensors"]
    assert [(row["step"], row["split"]) for row in metrics_of(folder)][-2:] == [(5, "train"), (5, "val")]
    assert strict(folder / "hf/config.json")["model_type"] == "gpt2"
    one, other = (train_distill.load_hf(path).position.weight for path in (tmp_path / "gpt2", folder / "hf"))
    assert 0 < (one - other).abs().max() < 3e-4     # 5 steps of at most 2e-5 from the model that was given


def test_a_size_starts_from_random_weights_and_says_so(data, tutor, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)                     # where no folder is called tiny
    main_here(*"--student-model-name tiny --epochs 1 --max-steps 1 --run-name run --device cpu --teacher-model".split(),
              tutor, "--data-path", data)
    folder, said = tmp_path / "out/run", capsys.readouterr().out
    config = strict(folder / "config.json")["config"]
    assert (config["max_epochs"], config["learning_rate"], config["alpha"], config["temperature"], config["grad_clip"],
            config["max_length"], config["on_nonfinite"]) == (1, 2e-5, 0.5, 3.0, 1.0, 512, "stop")
    assert strict(folder / "hf/config.json")["hidden_size"] == 64
    assert re.search(r"tiny\b.*random", said), said


# -------------------------------------------------------------------------------------------------- stop and go on
@pytest.fixture(scope="module")
def chain(data, tmp_path_factory):
    """A teacher, two students with it and two without, never interrupted -> the folder of the last one."""
    folder = tmp_path_factory.mktemp("chain") / "run"
    train_here(data, folder, compare=2, **RUN)
    return folder


RUNS = ("run-teacher", "run-ce0", "run-ce1", "run-kd1", "run")


def test_a_chain_makes_its_runs_from_equal_weights_on_equal_rows(chain):
    assert {path.name for path in chain.parent.iterdir()} == {*RUNS}
    configs = {name: strict(chain.parent / name / "config.json")["config"] for name in RUNS}
    assert [(configs[name]["alpha"], configs[name]["seed"]) for name in RUNS[1:]] == [
        (0, 0), (0, 1), (0.5, 1), (0.5, 0)]
    assert {configs[name]["teacher"] for name in RUNS[1:]} == {str(chain.parent / "run-teacher/hf")}
    found = strict(chain / "comparison.json")
    assert found["runs"] == {"KD + CE": ["run", "run-kd1"], "CE alone": ["run-ce0", "run-ce1"]}
    one = found["rows"]["val CE"]
    with_it, without = (np.array(one[group]["values"]) for group in ("KD + CE", "CE alone"))
    assert one["difference"]["values"] == pytest.approx(list(with_it - without))
    assert with_it[0] == strict(chain / "eval.json")["table"]["model"]["val CE"]
    assert one["difference"]["sd"] > 0 and found["steps"] == {"KD + CE": [20, 20], "CE alone": [20, 20]}


def test_a_chain_killed_in_each_phase_goes_on_to_the_same_bits(data, chain, tmp_path):
    """With equal flags: kill -9 while the teacher's checkpoint is written and in the middle of a step of a student
    without it, SIGTERM there, kill -9 in the last student."""
    folder, fields = tmp_path / "run", dict(data_dir=data, compare=2, **RUN)
    for fault, last, name in (("kill-in-save:10:0:-teacher", 5, "run-teacher"), ("kill:13:0:-ce0", 10, "run-ce0"),
                              ("term:17:0:-ce0", 18, "run-ce0"), ("kill:7:0:run", 5, "run")):
        more = {} if name == "run-teacher" else {"resume": True}
        assert ended(in_child(fault, folder, **fields, **more)) == (0 if "term" in fault else -9)
        assert last_checkpoint(tmp_path / name)[0] == last
        assert bool(list((tmp_path / name).glob("*.tmp.*"))) == fault.startswith("kill-in-save")
    assert "stopped by a signal; go on with: " in (tmp_path / "run-ce0/train.log").read_text()
    main_here(*training("", folder, resume=True, **fields)[1:])
    for name in RUNS:
        assert_same_run(tmp_path / name, chain.parent / name)
    assert strict(folder / "comparison.json") == strict(chain / "comparison.json")
    assert {path.name for path in tmp_path.iterdir()} == {*RUNS}


def test_the_command_that_a_stopped_chain_prints_goes_on_with_the_chain(data, tmp_path, capsys):
    """Only config.json of the last run knows then what was asked for."""
    fields = dict(data_dir=data, compare=1, **RUN | dict(max_steps=4, log_every=2, save_every=2, eval_every=0))
    with pytest.MonkeyPatch.context() as patch:
        arm("term:1:0:-ce0", patch)
        main_here(*training("", tmp_path / "run", **fields)[1:])
    said = re.search(r"go on with: python train_distill.py (.*)$", capsys.readouterr().out, re.M)[1]
    assert said == "--resume --run_name run" and not checkpoints(tmp_path / "run")
    with pytest.raises(SystemExit):
        main_here(*said.split(), "--out_dir", tmp_path, "--seed", 9)
    assert "--seed is 0 in the checkpoint, not 9" in capsys.readouterr().err
    main_here(*said.split(), "--out_dir", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run-teacher", "run-ce0", "run"}
    assert [last_checkpoint(path)[0] for path in tmp_path.iterdir()] == [4, 4, 4]
    assert strict(tmp_path / "run/comparison.json")["steps"] == {"KD + CE": [4], "CE alone": [4]}


FAULTS = {"kill-in-save:10:0": [5], "kill:13:0": [5, 10], "term:7:0": [5, 8], "int:11:0": [5, 10, 12]}


@pytest.mark.parametrize("way, fault", [("accum", "kill:13:0"), ("cached", "kill-in-save:10:0"), ("accum", "int:11:0"),
                                        ("cached", "term:7:0"), ("teacher", "term:7:0")])
def test_an_interrupted_run_goes_on_to_the_same_bits(ways, straight, tmp_path, capsys, way, fault):
    folder = tmp_path / "run"
    if fault.startswith("kill"):
        assert ended(in_child(fault, folder, **RUN | ways[way])) == -9
    else:                                                               # as main() returns, the exit code is 0
        with pytest.MonkeyPatch.context() as patch:
            arm(fault, patch)
            main_here(*training("", folder, **RUN | ways[way])[1:])
        assert "go on with: python train_distill.py --resume --run_name run\n" in capsys.readouterr().out
        assert not (folder / "eval.json").exists()
    assert [int(path.stem[5:]) for path in checkpoints(folder)] == FAULTS[fault]
    resume(folder)
    assert f"resumed at {FAULTS[fault][-1]}" in capsys.readouterr().out
    assert_same_run(folder, straight[way])


def test_a_process_killed_at_any_moment_goes_on_to_the_same_bits(ways, straight, tmp_path):
    """Eight times, from outside, 0 to 0.3 seconds after a start."""
    folder, seconds, fields = tmp_path / "run", random.Random(0), RUN | ways["accum"]
    for k in range(8):
        process = in_child("", folder, **fields, resume=True)
        time.sleep(seconds.uniform(0, 0.3))
        process.kill()
        assert ended(process) in (-9, 0)
    main_here(*training("", folder, **fields, resume=True)[1:])
    assert_same_run(folder, straight["accum"])


def test_the_best_checkpoint_has_the_lowest_cross_entropy_and_no_nan_wins(ways, tmp_path, monkeypatch):
    """Five evaluations; the loss would choose others; a resume remembers."""
    ce, loss = iter([math.nan, 0.9, 0.4, math.nan, 0.6]), iter([0.1, 5.0, 4.0, math.nan, 0.2])
    monkeypatch.setattr(train_distill, "evaluate", lambda *a: {"loss": next(loss, 0.0), "ce": next(ce, 0.5)})
    folder, fields = tmp_path / "run", ways["teacher"] | dict(batch_size=4, eval_every=2, save_every=2, keep=0)
    assert train_here(folder=folder, max_steps=10, **fields)["best"] == 0.4
    at_6, body_6 = read_file(folder / "step-00000006.safetensors")
    wanted = {name[len("model."):]: x for name, x in at_6.items() if name.startswith("model.")}
    assert_same_bits(read_file(folder / "best.safetensors")[0], wanted)
    assert_same_bits(dict(train_distill.load_hf(folder / "hf").named_parameters()), wanted)
    assert body_6["best"] == 0.4 and train_here(folder=folder, max_steps=14, resume=True, **fields)["best"] == 0.4
    assert_same_bits(read_file(folder / "best.safetensors")[0], wanted)


# ----------------------------------------------------------------------------------------------------- two processes
def both_done(pair, *arguments):
    """run_in_pair() of a run without an end before its time -> rank 0's answer."""
    (first, answer, state), (second, _, other) = pair.run(run_in_pair, *arguments)
    assert (first, second) == ("done", "done") and state == other, answer
    return answer


def test_a_killed_pair_goes_on_to_the_same_bits(ways, pair, tmp_path):
    """kill -9 of rank 1 in the middle of step 13; the resume is from step 10."""
    folder, fields = tmp_path / "run", RUN | ways["student"] | dict(batch_size=2)
    ends = wait(*start_pair("kill:13:1", folder, training, **fields))
    assert ends[1].code == -9 and ends[0].code not in (0, None) and ends[1].out == ""       # only rank 0 talks
    assert [int(path.stem[5:]) for path in checkpoints(folder)] == [5, 10]
    both_done(pair, "", folder, "", fields | dict(resume=True))
    both_done(pair, "", tmp_path / "straight", "", fields)
    assert_same_run(folder, tmp_path / "straight")


def test_a_signal_on_one_rank_stops_both_and_the_run_goes_on(ways, pair, tmp_path):
    fields = RUN | ways["accum"]
    both_done(pair, "", tmp_path / "straight", "", fields)
    assert both_done(pair, "", tmp_path / "run", "term:6:1", fields)["step"] == 10
    assert [int(path.stem[5:]) for path in checkpoints(tmp_path / "run")] == [5, 10]
    both_done(pair, "", tmp_path / "run", "", fields | dict(resume=True))
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_one_process_two_processes_and_micro_batches_take_the_same_steps(ways, pair, tmp_path):
    """1 x 4, 2 x 2 and 1 x 2 x 2. Weights differ by rounding alone, which Adam makes larger where a gradient is 0."""
    fields = ways["student"] | dict(max_steps=6, eval_every=2, log_every=1, learning_rate=1e-3)
    both_done(pair, "", tmp_path / "two", "", fields | dict(batch_size=2))
    train_here(folder=tmp_path / "one", batch_size=4, **fields)
    train_here(folder=tmp_path / "micro", batch_size=2, grad_accum=2, **fields)
    one, two, micro = (metrics_of(tmp_path / name) for name in ("one", "two", "micro"))
    for rows in (two, micro):
        for row, wanted in zip(rows, one, strict=True):
            for name in {"loss", "ce", "kl", "teacher_ce", "grad_norm"} & wanted.keys():
                assert row[name] == pytest.approx(wanted[name], rel=2e-4), (row["step"], name)
            assert row.get("parts", {}) == pytest.approx(wanted.get("parts", {}), rel=2e-4)
    assert one[-1]["ce"] < one[2]["ce"] - 0.1
    tensors = [last_checkpoint(tmp_path / name)[1] for name in ("one", "two", "micro")]
    for other in tensors[1:]:
        for name in (name for name in other if name.startswith("model.")):
            assert (other[name] - tensors[0][name]).abs().mean() < 2e-5, name


def test_ranks_that_share_the_asking_train_the_same_student(ways, data, pair, tmp_path):
    """The cache that two processes made is good for one, and as the one that one made."""
    fields = ways["cached"] | dict(cache_teacher=6, max_steps=3, eval_every=1)
    both_done(pair, "", tmp_path / "two", "", fields | dict(batch_size=2))
    folder, = data.glob("teacher-*-6")
    train_here(folder=tmp_path / "again", **fields | dict(batch_size=4))
    shutil.rmtree(folder)
    train_here(folder=tmp_path / "one", **fields | dict(batch_size=4))
    assert_same_run(tmp_path / "again", tmp_path / "one", 3)
    one, two = (rows_of(tmp_path / name, "val")[-1] for name in ("one", "two"))
    assert one["ce"] == pytest.approx(two["ce"], rel=1e-4) and not list(data.glob(".teacher*"))


def test_a_chain_with_a_comparison_on_two_processes(data, pair, tmp_path):
    fields = dict(compare=1, batch_size=2, max_steps=4, log_every=2)
    answer = both_done(pair, data, tmp_path / "run", "", fields)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run-teacher", "run-ce0"}
    train_here(data, tmp_path / "one/run", **fields | dict(batch_size=4))
    one, two = (strict(home / "run/comparison.json") for home in (tmp_path / "one", tmp_path))
    assert two == answer["comparison"] and two["steps"] == {"KD + CE": [4], "CE alone": [4]}
    for row in ("test CE", "val CE", "test KL to the teacher"):
        for group in ("KD + CE", "CE alone"):
            assert two["rows"][row][group]["mean"] == pytest.approx(one["rows"][row][group]["mean"], rel=1e-3)


def test_bad_batches_on_one_rank_are_skipped_by_both(ways, pair, tmp_path):
    faults = "nan-kd:3:1 nan-gradient:5:1 nan-teacher:7:1 nan-ce:8:1 inf-loss:11:1 nan-student:13:1"
    fields = RUN | ways["student"] | dict(batch_size=2, on_nonfinite="skip")
    assert both_done(pair, "", tmp_path / "run", faults, fields)["step"] == 20
    _, tensors, body = last_checkpoint(tmp_path / "run")
    assert finite(tensors) and tensors["opt.token.weight.step"] == 14
    assert body["guard"]["skips"] == {"output": 1, "loss": 4, "gradient": 1, "float16 overflow": 0}
    assert rows_of(tmp_path / "run")[-1]["skipped"] == 6
    assert all(row["loss"] is not None for row in metrics_of(tmp_path / "run"))
    log = (tmp_path / "run/train.log").read_text()
    for step, said in {3: "loss, kd", 5: "gradient", 7: "loss, teacher_logits, kd", 8: "loss, ce", 11: "loss",
                       13: "output, student_logits, kd, ce"}.items():
        assert re.search(rf"^step {step}: (NaN|Inf) detected .*\({said}\b", log, re.M), said
    both_done(pair, "", tmp_path / "without", "", fields | dict(skip_steps="3,5,7-8,11,13"))
    assert_same_bits(tensors, last_checkpoint(tmp_path / "without")[1])


def test_both_ranks_stop_at_what_one_of_them_meets(ways, pair, tmp_path):
    fields = RUN | ways["student"] | dict(batch_size=2)
    for name, kind, said in (("kd", "nan-kd", "loss, kd"), ("gradient", "nan-gradient", "gradient")):
        (first, message, state), (second, other, same) = pair.run(
            run_in_pair, "", tmp_path / name, f"{kind}:7:1", fields)
        assert (first, second) == ("stopped", "stopped") and message == other and state == same
        assert f"STOPPED before step 7: non-finite {said} at step 7, nan" in message
        step, tensors, _ = last_checkpoint(tmp_path / name)
        assert step == 7 and finite(tensors) and tensors["opt.token.weight.step"] == 7
        assert [path.name for path in (tmp_path / name / "autopsy").iterdir()][-1].startswith("step-00000007-rank")


# ------------------------------------------------------------------------------------------------------ bad numbers
STOPS = {"nan-student": "output, student_logits, kd, ce", "nan-teacher": "loss, teacher_logits, kd, teacher_ce",
         "nan-kd": "loss, kd", "nan-ce": "loss, ce", "nan-loss": "loss", "inf-loss": "loss", "nan-gradient": "gradient",
         "nan-weight": "output, student_logits, kd, ce"}


@pytest.mark.parametrize("fault", STOPS)
def test_the_first_bad_step_stops_the_run(ways, straight, tmp_path, monkeypatch, capsys, fault):
    """By default. It says the step, the value, which part was the first, what to try; weights are those before it."""
    folder, way = tmp_path / "run", "accum" if fault == "nan-ce" else "student"
    arm(f"{fault}:7:0", monkeypatch)
    main_stops(folder=folder, **RUN | ways[way])
    said, value = capsys.readouterr(), "inf" if fault == "inf-loss" else "nan"
    assert f"STOPPED before step 7: non-finite {STOPS[fault]} at step 7, {value}; " in said.err
    assert ("none of it touched the weights" in said.err) == (fault != "nan-weight") != ("ALREADY" in said.err)
    assert "What to try:" in said.err and all(f"  {i}. " in said.err for i in range(1, 6))
    assert f"is {value} ({STOPS[fault]})" in re.search("^step 7: .*$", (folder / "train.log").read_text(), re.M)[0]
    event, step = folder / "autopsy/step-00000007-rank0", 5 if fault == "nan-weight" else 7
    assert f"kept: python autopsy.py {event}" in said.err and "Traceback" not in said.err
    assert {path.name for path in event.iterdir()} == {"report.txt", "model.safetensors", "batch.safetensors"}
    assert last_checkpoint(folder)[0] == step and not list(folder.glob("*.nonfinite"))
    assert all(finite(read_file(path)[0]) for path in checkpoints(folder)) and not (folder / "eval.json").exists()
    monkeypatch.undo()
    if fault in ("nan-ce", "nan-teacher", "nan-gradient", "nan-weight"):            # now without the fault
        resume(folder)
        assert_same_bits(last_checkpoint(folder)[1], last_checkpoint(straight[way])[1])
    if fault == "nan-weight":
        capsys.readouterr()
        autopsy.main(event)
        out = capsys.readouterr().out
        assert "parameter token.weight already holds NaN, 1/16448" in out
        assert "NaN CAME IN with: parameter token.weight" in out


@pytest.fixture(scope="module")
def huge(ways, tmp_path_factory):
    """The fields of a student whose teacher has finite weights, but not logits."""
    model, folder = random_model(LLAMA), tmp_path_factory.mktemp("huge") / "huge"
    model.norm.weight.data.fill_(3e38)
    train_distill.save_hf(model, folder)
    return RUN | ways["student"] | dict(teacher=str(folder))


def test_a_teacher_that_overflows_is_named(huge, tmp_path, capsys):
    main_stops(folder=tmp_path / "run", **huge)
    assert re.search(r"STOPPED before step 0: non-finite loss, teacher_logits, kd, teacher_ce at step 0, (nan|inf)",
                     capsys.readouterr().err)
    step, tensors, _ = last_checkpoint(tmp_path / "run")
    assert step == 0 and finite(tensors)
    said = (tmp_path / "run/autopsy/step-00000000-rank0/report.txt").read_text()
    assert re.search(r"(NaN|Inf) BORN in forward: .*\n.*\n +at train_distill.py:\d+, in forward", said)
    main_stops(folder=tmp_path / "skip", **huge | dict(on_nonfinite="skip", max_skips=3))
    assert "4 non-finite steps in a row" in capsys.readouterr().err


def test_an_event_with_a_teacher_is_replayed_by_a_fresh_process(huge, tmp_path, capsys):
    main_stops(folder=tmp_path / "run", **huge)
    event = tmp_path / "run/autopsy/step-00000000-rank0"
    train_distill.frozen_teacher.cache_clear()      # which a fresh process has not asked yet
    capsys.readouterr()
    autopsy.main(event)
    said, again = ([line for line in text.splitlines() if re.search("BORN|CAME IN|replayed|path to", line)]
                   for text in ((event / "report.txt").read_text(), capsys.readouterr().out))
    assert said == again and len(said) >= 3


@pytest.mark.parametrize("way", ["accum", "cached"])
def test_a_skipped_step_is_a_step_never_taken_and_counted(ways, tmp_path, monkeypatch, way):
    fields = RUN | ways[way] | dict(max_steps=9, on_nonfinite="skip", log_every=3)
    train_here(folder=tmp_path / "without", skip_steps="1,3,5-7", **fields)
    arm("nan-ce:1:0 nan-loss:3:0 nan-teacher:5:0 nan-gradient:6:0 nan-student:7:0", monkeypatch)
    train_here(folder=tmp_path / "skipped", **fields)
    _, tensors, body = last_checkpoint(tmp_path / "skipped")
    assert_same_bits(tensors, last_checkpoint(tmp_path / "without")[1])
    assert body["guard"]["skips"] == {"output": 1, "loss": 3, "gradient": 1, "float16 overflow": 0}
    assert [(row["step"], row["skipped"]) for row in rows_of(tmp_path / "skipped")] == [(3, 1), (5, 2), (6, 3), (9, 5)]
    assert (tmp_path / "skipped/eval.json").exists() and finite(tensors)


# -------------------------------------------------------------------------------------------- other ways through a run
WAYS = {"train_on_prompt": True, "divergence reverse": "reverse", "divergence jsd": "jsd", "teacher_dtype": "bfloat16",
        "dropout": 0.1, "dtype": "bfloat16", "kd_reduction": "batchmean", "alpha": 1.0, "grad_accum": 3}


@pytest.mark.parametrize("way", WAYS)
def test_other_ways(ways, straight, tmp_path, way):
    fields = RUN | ways["student"] | {way.split()[0]: WAYS[way]} | dict(save_every=0)
    answer = train_here(folder=tmp_path / "run", **fields)
    _, tensors, body = last_checkpoint(tmp_path / "run")
    usual = last_checkpoint(straight["student"])[1]
    assert finite(tensors) and sum(body["guard"]["skips"].values()) == 0 and answer["step"] == 20
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert not torch.equal(tensors["model.token.weight"], usual["model.token.weight"])
    ce = [row["parts"]["ce"] for row in rows_of(tmp_path / "run")]
    assert ce[-1] < 0.95 * ce[0]
    found, wanted = (strict(folder / "eval.json")["scores"]["val"]["teacher_ce"] for folder in (
        tmp_path / "run", straight["student"]))
    assert (found == pytest.approx(wanted, rel=5e-3)) == (way != "train_on_prompt")     # which is of other positions
    train_distill.load_hf(tmp_path / "run/hf")


def test_a_teacher_that_is_no_better_is_said(straight, tmp_path, capsys, data):
    weak = write_model(tmp_path / "weak")           # random weights
    train_here(data, tmp_path / "run", phase="student", teacher=weak, student=straight["student"] / "hf", max_steps=2,
               learning_rate=1e-4)
    one = rows_of(tmp_path / "run", "val")[0]
    theirs, ours = f"{one['teacher_ce']:.4f}", f"{one['ce']:.4f}"
    said = f"warning: the teacher's cross-entropy {theirs} is no better than the student's {ours}"
    assert one["teacher_ce"] > one["ce"] and f"\n{said}" in capsys.readouterr().out
    assert not any("warning" in (straight[way] / "train.log").read_text() for way in ("student", "teacher"))


def test_a_look_at_samples_changes_nothing(ways, tmp_path, monkeypatch):
    train_here(folder=tmp_path / "without", **RUN | ways["accum"] | dict(max_steps=6))
    monkeypatch.setattr(report, "completions", COMPLETIONS)
    monkeypatch.setattr(train_distill, "generate", lambda model, ids, *_, **__: 0 if model.training else ids[:5])
    train_here(folder=tmp_path / "with", **RUN | ways["accum"] | dict(max_steps=6, sample_every=2, eval_every=3))
    assert_same_bits(last_checkpoint(tmp_path / "with")[1], last_checkpoint(tmp_path / "without")[1])
    names = sorted(path.name for path in (tmp_path / "with/samples").iterdir())
    assert names == ["final.txt"] + [f"step-{step:08d}.txt" for step in (2, 4, 6)]
    text = (tmp_path / "with/samples/step-00000004.txt").read_text()
    assert text.count("--- model\n### I") == 7 == len(set(re.findall(r"--- val row (\d+)", text)))


COMPLETIONS = report.completions                    # before quicken()


def test_rows_are_cut_and_left_out_by_the_context(data, tutor, tmp_path, capsys):
    prompts, lengths = np.load(data / "prompt.npy"), np.diff(np.load(data / "offsets.npy"))
    most = int(np.median(prompts))
    full, cut = (prompts >= most).sum(), ((lengths > most) & (prompts < most)).sum()
    train_here(data, tmp_path / "run", phase="student", teacher=tutor, max_length=most, max_steps=1)
    said = f"{data}: {full} rows left out, their prompts fill --max_length {most}; {cut} rows cut to it\n"
    kept = read_folder(data, most, False, "cpu").rows
    assert said in capsys.readouterr().out and 0 < full and sum(map(len, kept.values())) == len(prompts) - full
    assert strict(tmp_path / "run/config.json")["derived"]["steps_per_epoch"] == len(kept["train"]) / 2


@pytest.mark.parametrize("flag", ["student", "teacher"])
def test_a_context_shorter_than_asked_is_said(data, tutor, tmp_path, capsys, flag):
    short = write_model(tmp_path / "short", GPT2 | {"n_positions": 150})
    fields = dict(phase="student", teacher=tutor, max_steps=1) | {flag: short}
    train_here(data, tmp_path / "run", max_length=320, **fields)
    said = capsys.readouterr().out
    assert f"--max_length 150: {short} has no more positions\n" in said and "rows cut to it" in said
    assert strict(tmp_path / "run/config.json")["config"]["max_length"] == 150


def test_a_model_that_is_not_there_limits_no_length(tmp_path, data):
    """Neither --teacher_size of a student's phase, nor --student of a teacher's; the default ones have 512."""
    long = write_model(tmp_path / "long", LLAMA | {"max_position_embeddings": 700})
    for name, fields in {"pupil": dict(phase="student", teacher=long, student=long),
                         "tutor": dict(phase="teacher", teacher_size=long)}.items():
        train_here(data, tmp_path / name, max_steps=1, max_length=700, **fields)
        assert strict(tmp_path / name / "config.json")["config"]["max_length"] == 700


# ------------------------------------------------------------------------------------------------------ eval and sample
def evaluated(capsys, *words):
    """eval -> what it prints."""
    capsys.readouterr()
    main_here("eval", "--device", "cpu", *words)
    return capsys.readouterr().out


@pytest.mark.parametrize("way", ["teacher", "student", "cached"])
def test_eval_prints_what_training_did_twice(straight, tmp_path, capsys, way):
    shutil.copytree(straight[way], tmp_path / way)
    wanted, before = table_in((straight[way] / "train.log").read_text()), strict(straight[way] / "eval.json")
    for _ in range(2):
        out = evaluated(capsys, "--run_name", way, "--out_dir", tmp_path)
        assert table_in(out) == wanted and len(wanted) == (5 if way == "teacher" else 6)
        assert strict(tmp_path / way / "eval.json") == before


def test_eval_of_a_folder_and_of_other_data(straight, tutor, data, tmp_path, capsys):
    wanted = strict(straight["student"] / "eval.json")
    out = evaluated(capsys, "--model", straight["student"] / "hf", "--teacher", tutor, "--out_dir", tmp_path,
                    "--data_dir", data)
    folder = tmp_path / "eval-student-hf"
    found = strict(folder / "eval-test.json")
    assert found["table"]["model"] == pytest.approx(wanted["table"]["model"]) and f"{folder}/eval-test.json" in out


def test_eval_on_questions_of_a_file(straight, tmp_path, capsys):
    shutil.copytree(straight["student"], tmp_path / "student")
    rows = [{"instruction": f"Speed {i}?", "options": [f"{i} m/s", "no speed", "5"], "answer": i % 3} for i in range(9)]
    rows.append({"prompt": "It goes as ", "options": ["v^2", "v^3"], "answer": "v^2"})
    (tmp_path / "mc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = evaluated(capsys, "--run_name", "student", "--out_dir", tmp_path, "--eval_mc", tmp_path / "mc.jsonl")
    found = strict(tmp_path / "student/eval-test.json")
    assert set(found["choices"]) == {"model", "teacher", "5-gram", "unigram"}
    assert {one["n"] for one in found["choices"].values()} == {10}
    assert found["choices"]["model"]["chance"] == pytest.approx((9 / 3 + 1 / 2) / 10)
    assert "choices: 10 questions of the file, chance 0.3500" in out
    low, high = found["choices"]["model"]["acc_interval"]
    assert 0 <= low <= found["choices"]["model"]["acc"] <= high <= 1


def sample(*words):
    main_here("sample", "--device", "cpu", "--max_tokens", 12, *words)


def test_samples_of_a_run_and_of_a_folder(straight, tmp_path, capsys):
    (tmp_path / "ask.txt").write_text("What is the speed?\n\n  \nHow heavy is it?\n")
    folder, found = straight["student"], []
    sources = [["--run_name", "student", "--out_dir", folder.parent], ["--model", folder / "hf"]]
    for source in sources:
        out = tmp_path / "answers.jsonl"
        sample(*source, "--prompts", tmp_path / "ask.txt", "--num_samples", 3, "--out", out, "--seed", 7)
        assert f"{out}: 6 answers" in capsys.readouterr().out
        found.append([json.loads(line) for line in out.read_text().splitlines()])
    assert found[0] == found[1] and [row["seed"] for row in found[0]] == [7, 8, 9] * 2
    assert [row["instruction"] for row in found[0]] == ["What is the speed?"] * 3 + ["How heavy is it?"] * 3
    assert len({row["response"] for row in found[0][:3]}) == 3
    said = []
    for seed in (1, 2):                             # greedy: the seed says nothing
        sample(*sources[0], "--instruction", "What is the speed?", "--temperature", 0, "--seed", seed)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].startswith("### Instruction:\nWhat is the speed?\n\n### Response:\n")


# ----------------------------------------------------------------------------------------------------------- refusals
@pytest.fixture(scope="module")
def folders(tutor, tmp_path_factory):
    """name: a folder that is no good as a model, for one reason each."""
    home = tmp_path_factory.mktemp("folders")
    found = {name: home / name for name in ("adapter", "empty", "cut", "nan", "small", "quantised", "short")}
    for name, folder in found.items():
        if name in ("cut", "nan"):
            shutil.copytree(tutor, folder)
        elif name in ("small", "short"):
            write_model(folder, LLAMA | ({"vocab_size": 200} if name == "small" else {"max_position_embeddings": 40}))
        else:
            folder.mkdir()
    (found["adapter"] / "adapter_config.json").write_text("{}")
    (found["quantised"] / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": {"bits": 4}}))
    path = found["cut"] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    tensors = load_file(found["nan"] / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, found["nan"] / "model.safetensors", {"format": "pt"})
    return found


def valid(data, folder):
    return ["--device", "cpu", "--dry_run", "--max_steps", 1, "--data_dir", data, "--out_dir", folder]


@pytest.mark.parametrize("words, said", [
    ("--learning_rat 1", "did you mean --learning_rate?"), ("words", "unknown flag words"),
    ("--phase student", "--phase student: a student needs --teacher DIR"), ("--phase both", "one of teacher, student"),
    ("--phase teacher --teacher {tutor}", "--phase teacher: a student needs --teacher DIR, and a teacher has none"),
    ("--teacher no/where", "--teacher no/where: no such folder"), ("--teacher gpt2", "--teacher gpt2: no such folder"),
    ("--student nobody", "--student nobody: no such folder, and not one of tiny, small, gpt2"),
    ("--phase teacher --teacher_size nobody", "--teacher_size nobody: no such folder, and not one of tiny, small"),
    ("--teacher {adapter}", "adapter holds a LoRA adapter"), ("--student {adapter}", "adapter holds a LoRA adapter"),
    ("--teacher {empty}", "empty has no config.json"), ("--teacher {quantised}", "quantization_config"),
    ("--divergence x", "--divergence x: one of forward, reverse, jsd"), ("--divergence jsd --beta 1", "--beta 0 and 1"),
    ("--divergence jsd --beta 0", "--beta 0 and 1"), ("--beta 1.5", "--beta 1.5"), ("--alpha 2", "--alpha 2"),
    ("--alpha nan", "--alpha"), ("--temperature 0", "--temperature 0"), ("--dropout 1", "--dropout"),
    ("--kd_reduction mean", "one of token, batchmean"), ("--teacher_dtype int8", "--teacher_dtype int8"),
    ("--cache_teacher 8 --kd_reduction batchmean", "--cache_teacher"), ("--cache_teacher -1", "--cache_teacher -1"),
    ("--max_length 0", "--max_length 0"), ("--max_epochs 0", "--max_epochs 0"), ("--compare -1", "--compare -1"),
    ("--data_dir no/where", "--data_dir no/where"), ("--data-path no.jsonl", "--data_dir no.jsonl"),
    ("--teacher {short}", "no rows in the train or the val split"), ("--max_length 40", "no rows in the train or the"),
    ("--student {small}", "has 200 rows of embeddings, its tokenizer 257 ids"), ("--dtype float8", "--dtype"),
    ("--on_nonfinite pray", "skip, stop"), ("--resume", "--resume needs --run_name")])
def test_bad_flags_are_refused(data, tutor, folders, refused, tmp_path, words, said):
    more = [] if re.search("--teacher(_size)? |--phase", words) else ["--phase", "student", "--teacher", tutor]
    assert said in refused(*valid(data, tmp_path / "out"), *more, *words.format(tutor=tutor, **folders).split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, said", [
    ("cut", "model.safetensors is cut off, damaged"), ("nan", "not finite in float32: model.norm.weight (1 of 64"),
    ("small", "200")])
@pytest.mark.parametrize("alpha", [0.5, 0.0])
def test_a_bad_teacher_is_named_before_a_step_is_taken(data, folders, tmp_path, capsys, name, said, alpha):
    """Also where it only evaluates, as beside a student without it."""
    with pytest.MonkeyPatch.context() as patch:
        taken = []
        patch.setattr(train_distill.Guard, "step", lambda guard, step: taken.append(step))
        with pytest.raises(SystemExit) as stop:
            main_here(*valid(data, tmp_path / "out"), "--teacher", folders[name], "--alpha", alpha)
    assert stop.value.code == 2 and not taken
    assert said in one_line(capsys.readouterr().err)


def test_a_file_without_a_good_row(tutor, tmp_path, capfd):
    (tmp_path / "bad.jsonl").write_text('no JSON\n{"instruction": "alone"}\n')
    with pytest.raises(SystemExit) as stop:
        main_here("--device", "cpu", "--teacher", tutor, "--data_path", tmp_path / "bad.jsonl", "--out_dir", tmp_path)
    lines = capfd.readouterr().err.splitlines()     # of prepare.py, and of the script
    assert stop.value.code == 2 and len(lines) == 2 and [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
    assert "bad.jsonl" in lines[0] and "not JSON 1, no response 1" in lines[0] and "could not be built" in lines[1]


def test_a_file_may_have_any_name(tutor, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(tables, "made_set", lambda _, name, *__: made.append(name) or train_distill.fail("here"))
    for name in ("my own data.jsonl", "mine.jsonl.gz"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(SystemExit):
            main_here("--device", "cpu", "--teacher", tutor, "--data_path", tmp_path / name, "--out_dir", tmp_path)
    assert len(made) == 2 and all(re.fullmatch(r"\w[\w.+-]*", name) for name in made), made     # as prepare.py wants it


def test_another_tokenizer_is_refused(data, tutor, refused, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(["kinetic energy speed doubled"], tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["[UNK]"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    folder = write_model(tmp_path / "bpe", LLAMA | {"vocab_size": 300})
    made.save(str(folder / "tokenizer.json"))
    words = valid(data, tmp_path / "out")
    said = refused(*words, "--teacher", tutor, "--student", folder)
    assert f"--data_dir {data} was prepared with another tokenizer than {folder}'s" in said and "prepare.py" in said
    said = refused(*words, "--teacher", folder)
    assert "different tokenizers: " in said and str(folder) in said
    mine = write_set(tmp_path / "mine", [(f"Say {i}", f"kinetic energy {i}") for i in range(12)], folder)
    train_here(mine, tmp_path / "run", phase="student", teacher=folder, student=folder, max_steps=2)
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in (tmp_path / "run/hf").iterdir()}
    one, other = map(train_distill.load_tokenizer, (tmp_path / "run/hf", folder))
    assert one.fingerprint == other.fingerprint
    assert "different tokenizers: " in refused(*valid(mine, tmp_path / "out"), "--student", folder, "--teacher", tutor)


def test_an_existing_run_is_not_overwritten(ways, straight, refused):
    for way in ("teacher", "student"):
        before = {path: path.stat().st_mtime_ns for path in straight[way].rglob("*")}
        assert "already holds checkpoints: --resume" in refused(*training("", straight[way], **RUN | ways[way])[1:])
        assert {path: path.stat().st_mtime_ns for path in straight[way].rglob("*")} == before


def test_a_resume_keeps_the_model_and_the_data(straight, tutor, refused, tmp_path):
    words = ["--resume", "--run_name", "student", "--out_dir", straight["student"].parent, "--device", "cpu"]
    others = {"teacher": straight["teacher"] / "hf", "student": "small", "data_dir": tmp_path, "phase": "teacher",
              "seed": 2, "compare": 2}
    for flag, value in others.items():
        assert f"--{flag} is " in refused(*words, f"--{flag}", value)
    assert "--train_on_prompt is False" in refused(*words, "--train_on_prompt")
    assert "--max_length 100: rows or vocabulary are not the checkpoint's" in refused(*words, "--max_length", 100)
    assert "beyond --max_steps 7" in refused(*words, "--max_steps", 7)
    assert "there is accum, cached, student, teacher" in refused("--resume", "--out_dir", straight["student"].parent)
    tensors, body = read_file(checkpoints(straight["student"])[-1])
    (tmp_path / "other").mkdir()
    write_file(tmp_path / "other/step-00000020.safetensors", tensors, body | {"config": {"run_name": "x", "n_embd": 4}})
    assert "other is a run of another script, with --n_embd" in refused(
        "--resume", "--run_name", "other", "--out_dir", tmp_path, "--device", "cpu")


@pytest.mark.parametrize("verb, words, said", [
    ("eval", "--run_name nobody", "there is accum, cached, student, teacher"), ("eval", "--model no/where", "no/where"),
    ("eval", "--model {adapter}", "LoRA adapter"), ("eval", "--run_name student --split tes", "train, val or test"),
    ("eval", "", "give --run_name NAME"), ("eval", "--run_name student --model {tutor}", "give --run_name NAME"),
    ("eval", "--run_name student --data_dir no/where", "--data_dir no/where"),
    ("eval", "--run_name student --eval_mc no.jsonl", "no.jsonl cannot be read"),
    ("eval", "--run_name student --eval_mc {bad}", "1 bad lines: 1 (not JSON)"),
    ("eval", "--run_name student --teacher no/where", "no/where"),
    ("sample", "--run_name nobody --instruction x", "there is accum"), ("sample", "--run_name student", "give --instr"),
    ("sample", "--run_name student --instruction x --num_samples 0", "--num_samples 0"),
    ("sample", "--run_name student --instruction x --temperature -1", "--temperature -1"),
    ("sample", "--run_name student --prompts no.txt", "--prompts no.txt cannot be read"),
    ("sample", "--run_name student --instruction x --out {out}", "cannot be written"),
    ("sample", "--model {short} --instruction 01234567890123", "has 47 tokens, the highest id is 117; the")])
def test_what_the_verbs_refuse(straight, tutor, folders, refused, tmp_path, verb, words, said):
    (tmp_path / "bad.jsonl").write_text("nothing\n")
    words = words.format(tutor=tutor, bad=tmp_path / "bad.jsonl", out=tmp_path, **folders).split()
    assert said in refused(verb, "--device", "cpu", "--out_dir", straight["student"].parent, *words)
