"""train_distill.py as a whole: a teacher, its student and those to compare with, in real processes that are killed,
stopped and fed with faults; the files they leave, the verbs eval and sample, and what is refused. On small demo sets.
"""
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from distill_tools import (BLOCKED, GPT2, LLAMA, ROOT, ROWS, arm, assert_same_run, build_set, copy_scripts, main_here,
                           main_stops, quicken, random_model, rows_of, run_in_pair, strict, table_in, train_here,
                           training, write_model, write_set)
from edl_tools import assert_same_bits, finite, last_checkpoint, metrics_of, one_line, start, start_pair, wait

import autopsy
import train_distill
from data.text import report
from data.text.tables import packed, read_folder
from runs import checkpoints, read_file, write_file

RUN = dict(batch_size=4, max_steps=20, save_every=5, eval_every=10, log_every=5, keep=0)    # what is interrupted below
TOKENS = "kinetic energy speed doubled mass"


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
    assert re.search(r"^  Phase: student, of tiny   Teacher: out/distill_\d+_\d+-teacher/hf$", out, re.M)
    assert out.count("  Warmup steps: 1 (20% of 5 total steps)") == 3 and out.count("  FP16: False   Device: ") == 3
    assert "  Learning rate: 0.003   Max gradient norm: 1.0\n" in out
    assert "  Temperature: 3.0   Alpha: 0.5   Divergence: forward\n" in out
    first = re.search(r"^first forward: student logits (\[2, \d+, 257\]), teacher logits (\[.*\]), T 3.0, alpha 0.5; made "
                      r"for (\d+) supervised positions, in chunks$", out, re.M)
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
        assert float(loss) == pytest.approx(0.5 * float(kd) + 0.5 * float(ce), abs=2e-4)
    assert re.search(r"^ +teacher +KD \+ CE +CE alone +difference +5-gram +unigram$", out, re.M)
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
    assert [final.count(text) for text in ("### Instruction:\n", "### Response:\n--- test row ", "--- model\n")] == [8] * 3
    assert len(set(re.findall(r"--- test row (\d+)\n\S", final))) == 8 and "### End" not in final
    found, about, rows = (strict(folder / "eval.json"), strict(folder / "config.json"), metrics_of(folder))
    assert about["commit"] == "" and set(about["config"]) == set(vars(train_distill.Config()))
    assert (about["derived"]["max_steps"], about["config"]["phase"]) == (5, "teacher" if more == "-teacher" else "student")
    kinds = {"teacher"} if more == "-teacher" else set()
    assert set(found["table"]) == {"model", "teacher", "5-gram", "unigram"} - kinds == set(found["choices"])
    assert found["rows"] == {"val": 18, "test": 18} and found["choices"]["model"]["n"] == 18
    assert found["table"]["model"]["test perplexity"] == pytest.approx(math.exp(found["table"]["model"]["test CE"]))
    assert [(row["step"], row["split"]) for row in rows] == [*((step, "train") for step in range(1, 6)), (5, "val")]
    assert set(rows[-1]) == {"step", "split", "loss", "ce"} | (set() if kinds else {"kl", "teacher_ce"})
    assert rows[-1]["ce"] == found["scores"]["val"]["ce"]               # best is the last


@pytest.mark.parametrize("more", ["", "-teacher", "-ce0"])
def test_the_hugging_face_folder_is_the_best_model(dry_runs, more):
    folder, tokens = dry_runs[more], torch.randint(0, 257, (2, 33), generator=torch.Generator().manual_seed(0))
    model = train_distill.load_hf(folder / "hf")
    with torch.no_grad():
        assert torch.equal(model(tokens), train_distill.load_model(folder / "best.safetensors")(tokens))
    assert_same_bits(dict(model.named_parameters()), read_file(folder / "best.safetensors")[0])


def test_transformers_opens_the_folder(dry_runs):
    transformers = pytest.importorskip("transformers")
    tokens = torch.randint(0, 257, (2, 33), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(dry_runs[""] / "hf").eval()
    with torch.no_grad():
        assert (theirs(tokens).logits - train_distill.load_hf(dry_runs[""] / "hf")(tokens)).abs().max() < 2e-4


def test_the_comparison_is_of_equal_steps_and_weights(dry_runs):
    found = strict(dry_runs[""] / "comparison.json")
    assert found["runs"] == {"KD + CE": [dry_runs[""].name], "CE alone": [dry_runs["-ce0"].name]}
    assert found["steps"] == {"KD + CE": [5], "CE alone": [5]} and found["seeds"] == [0]
    with_it, without = (strict(dry_runs[more] / "eval.json")["table"]["model"] for more in ("", "-ce0"))
    for row in ROWS:
        one = found["rows"][row]
        assert (one["KD + CE"]["values"], one["CE alone"]["values"]) == ([with_it[row]], [without[row]])
        assert one["difference"]["mean"] == pytest.approx(with_it[row] - without[row])
    first = [rows_of(dry_runs[more])[0] for more in ("", "-ce0")]       # the same weights meet the same rows
    assert first[0]["parts"]["ce"] == pytest.approx(first[1]["parts"]["ce"], abs=1e-6) == first[1]["loss"]


def test_importing_the_script_does_nothing(tmp_path):
    code = ("import sys, signal, torch; before = torch.get_rng_state(), signal.getsignal(signal.SIGTERM)\n"
            f"sys.path.insert(0, {str(ROOT)!r}); import train_distill\n"
            "assert not torch.distributed.is_initialized() and signal.getsignal(signal.SIGTERM) == before[1]\n"
            "assert torch.equal(torch.get_rng_state(), before[0])\n"
            f"assert not {{*{BLOCKED}, 'autopsy'}} & set(sys.modules)\n")
    end, = wait(start("-c", code, cwd=tmp_path))
    assert (end.code, end.out, end.err) == (0, "", "") and not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------- the original's command
def test_the_originals_command(tmp_path):
    """Dashes, a file of JSON lines, a model called gpt2 in the working directory."""
    copy_scripts(tmp_path)
    write_model(tmp_path / "teacher", LLAMA)
    write_model(tmp_path / "gpt2", GPT2)
    rows = [{"instruction": f"What is {i} plus {i}?", "response": f"It is {2 * i}."} for i in range(60)]
    (tmp_path / "quantumbench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "no JSON\n")
    words = ("--teacher-model teacher --student-model-name gpt2 --data-path quantumbench.jsonl --epochs 1 --batch-size 2 "
             "--learning-rate 2e-5 --dry-run --fp16")
    end, = wait(start("train_distill.py", *words.split(), cwd=tmp_path))
    assert end.code == 0 and "Traceback" not in end.err, end.err
    assert "--fp16: --dtype float32, since there is no GPU\n" in end.out
    assert "  Learning rate: 2e-05 " in end.out and "  Phase: student, of gpt2   Teacher: teacher\n" in end.out
    assert "  Warmup steps: 1 (20% of 5 total steps)\n" in end.out and "  FP16: False   Device: cpu\n" in end.out
    assert "not JSON 1" in end.out and (tmp_path / "data/text/quantumbench-bytes/rejected.jsonl").exists()
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
    assert re.search(r"tiny\b.*random weights", said), said


# ------------------------------------------------------------------------------------------------------------- phases
def test_each_way_learns(straight):
    for way, folder in straight.items():
        ce = [row["parts"]["ce"] for row in rows_of(folder)]
        assert ce[-1] < 0.9 * ce[0] and finite(last_checkpoint(folder)[1]), way
        assert [path.name for path in checkpoints(folder)] == [f"step-{step:08d}.safetensors" for step in (5, 10, 15, 20)]
    parts = {way: list(rows_of(folder)[0]["parts"]) for way, folder in straight.items()}
    assert parts == {"teacher": ["student_logits", "ce"]} | dict.fromkeys(
        ("student", "accum", "cached"), ["student_logits", "teacher_logits", "kd", "ce", "teacher_ce"])


def test_a_finished_run_can_go_further(straight, tmp_path):
    shutil.copytree(straight["student"], tmp_path / "run")
    resume(tmp_path / "run", "--max_steps", 25)
    step, tensors, _ = last_checkpoint(tmp_path / "run")
    assert step == 25 and tensors["opt.token.weight.step"] == 25
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [5, 10, 15, 20, 25]


def test_a_runs_config_repeats_the_run(straight, tmp_path):
    for way in ("teacher", "cached"):
        main_here("--config", straight[way] / "config.json", "--out_dir", tmp_path)
        assert_same_run(tmp_path / way, straight[way])


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
    assert [(configs[name]["alpha"], configs[name]["seed"]) for name in RUNS[1:]] == [(0, 0), (0, 1), (0.5, 1), (0.5, 0)]
    assert {configs[name]["teacher"] for name in RUNS[1:]} == {str(chain.parent / "run-teacher/hf")}
    found = strict(chain / "comparison.json")
    assert found["runs"] == {"KD + CE": ["run", "run-kd1"], "CE alone": ["run-ce0", "run-ce1"]}
    one = found["rows"]["val CE"]
    assert one["difference"]["values"] == pytest.approx(np.subtract(one["KD + CE"]["values"], one["CE alone"]["values"]))
    assert one["difference"]["sd"] > 0 and found["steps"] == {"KD + CE": [20, 20], "CE alone": [20, 20]}


def test_a_chain_killed_in_each_phase_goes_on_to_the_same_bits(data, chain, tmp_path, capsys):
    """Real processes with equal flags: kill -9 while the teacher's checkpoint is written, in the middle of a step of a
    student without it, SIGTERM there, kill -9 in the last student."""
    folder, fields = tmp_path / "run", dict(data_dir=data, compare=2, **RUN)
    for fault, last, name in (("kill-in-save:10:0:-teacher", 5, "run-teacher"), ("kill:13:0:-ce0", 10, "run-ce0"),
                              ("term:17:0:-ce0", 18, "run-ce0"), ("kill:7:0:run", 5, "run")):
        more = {} if name == "run-teacher" else {"resume": True}
        end, = wait(start(*training(fault, folder, **fields, **more), cwd=tmp_path))
        assert end.code == (0 if "term" in fault else -9) and "Traceback" not in end.err, end.err
        assert last_checkpoint(tmp_path / name)[0] == last
        if fault.startswith("term"):
            assert end.out.count("stopped by a signal; go on with: ") == 1
        if fault.startswith("kill-in-save"):
            assert list((tmp_path / name).glob("*.tmp.*"))
    main_here(*training("", folder, resume=True, **fields)[1:])
    for name in RUNS:
        assert_same_run(tmp_path / name, chain.parent / name, 18 if False else 20)
    assert strict(folder / "comparison.json") == strict(chain / "comparison.json")
    assert {path.name for path in tmp_path.iterdir()} == {*RUNS}


def test_the_command_that_a_stopped_chain_prints_goes_on_with_that_run_alone(data, tmp_path, capsys):
    fields = dict(data_dir=data, compare=1, **RUN | dict(max_steps=4, log_every=2, save_every=2, eval_every=0))
    with pytest.MonkeyPatch.context() as patch:
        arm("term:1:0:-ce0", patch)
        main_here(*training("", tmp_path / "run", **fields)[1:])
    said = re.search(r"go on with: python train_distill.py (.*)$", capsys.readouterr().out, re.M)[1]
    assert "--run_name run-ce0" in said and not (tmp_path / "run").exists()
    main_here(*said.split(), "--out_dir", tmp_path, "--device", "cpu")
    assert last_checkpoint(tmp_path / "run-ce0")[0] == 4
    assert {path.name for path in tmp_path.iterdir()} == {"run-teacher", "run-ce0"}
    assert not (tmp_path / "run-ce0/comparison.json").exists()


FAULTS = {"kill-in-save:10:0": [5], "kill:13:0": [5, 10], "term:7:0": [5, 8], "int:11:0": [5, 10, 12]}


@pytest.mark.parametrize("way, fault", [("accum", "kill:13:0"), ("cached", "kill-in-save:10:0"), ("accum", "int:11:0"),
                                        ("cached", "term:7:0"), ("teacher", "term:7:0")])
def test_an_interrupted_run_goes_on_to_the_same_bits(ways, straight, tmp_path, capsys, way, fault):
    folder = tmp_path / "run"
    if fault.startswith("kill"):
        end, = wait(start(*training(fault, folder, **RUN | ways[way]), cwd=tmp_path))
        assert end.code == -9 and "Traceback" not in end.err, end.err
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
    """From outside, as soon as the file that it writes last before the table is there."""
    folder = tmp_path / "run"
    process = start(*training("", folder, **RUN | ways["student"]), cwd=tmp_path)
    try:
        while process.poll() is None and not (folder / "step-00000015.safetensors").exists():
            pass
    finally:
        process.kill()
    end, = wait(process)
    assert end.code == -9 and len(checkpoints(folder)) >= 3
    resume(folder)
    assert_same_run(folder, straight["student"])


def test_a_damaged_checkpoint_is_passed_over(straight, tmp_path, capsys):
    shutil.copytree(straight["student"], tmp_path / "run")
    newest = checkpoints(tmp_path / "run")[-1]
    newest.write_bytes(newest.read_bytes()[:-50])
    resume(tmp_path / "run")
    said = capsys.readouterr().out
    assert "passed over a damaged checkpoint" in said and newest.name in said and "resumed at 15" in said
    assert_same_run(tmp_path / "run", straight["student"])


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


def test_ranks_that_share_the_asking_cache_the_same(ways, data, pair, tmp_path):
    """And the cache that two processes made is good for one."""
    fields = ways["cached"] | dict(cache_teacher=6, batch_size=2, max_steps=3)
    both_done(pair, "", tmp_path / "two", "", fields)
    folder, = data.glob("teacher-*-6")
    shutil.copytree(folder, tmp_path / "cache")
    train_here(folder=tmp_path / "again", **fields | dict(batch_size=4))
    shutil.rmtree(folder)
    train_here(folder=tmp_path / "one", **fields | dict(batch_size=4))
    assert_same_run(tmp_path / "again", tmp_path / "one", 3)
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in (tmp_path / "cache").iterdir()} and len(names) == 6
    found = read_folder(data, 320, False, "cpu")
    for name in names - {"meta.json"}:
        ours, theirs = np.load(folder / name), np.load(tmp_path / "cache" / name)
        assert np.array_equal(ours, theirs) and len(ours) == found.asked[found.rows["train"]].sum(), name
    assert not list(data.glob(".teacher*"))


def test_a_cache_of_another_teacher_is_refused(ways, data, tutor, refused, tmp_path):
    shutil.copytree(tutor, tmp_path / "tutor/hf")
    words = training("", tmp_path / "run", **ways["cached"] | dict(teacher=tmp_path / "tutor/hf", cache_teacher=5))[1:]
    main_here(*words)
    folder, = data.glob("teacher-*-5")
    model = train_distill.load_hf(tmp_path / "tutor/hf")
    model.norm.weight.data += 0.5
    train_distill.save_hf(model, tmp_path / "tutor/hf")
    said = refused(*words, "--run_name", "other")
    assert f"{folder} is stale, made with another teacher; delete it" in said
    assert "another temperature" in refused(*training("", tmp_path / "warm", **ways["cached"] | dict(temperature=2.0))[1:])


def test_all_tokens_cached_are_the_teacher_online(ways, tmp_path):
    fields = ways["student"] | dict(batch_size=4, max_steps=4, eval_every=0)
    train_here(folder=tmp_path / "online", **fields)
    train_here(folder=tmp_path / "cached", **fields | dict(cache_teacher=257))
    one, other = (rows_of(tmp_path / name, "val")[-1] for name in ("online", "cached"))
    assert one == pytest.approx(other, rel=1e-4)


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
@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    """A teacher whose weights are finite, but not its logits."""
    model = random_model(LLAMA)
    model.norm.weight.data.fill_(3e38)
    folder = tmp_path_factory.mktemp("huge") / "huge"
    train_distill.save_hf(model, folder)
    return str(folder)


STOPS = {"nan-student": "output, student_logits, kd, ce", "nan-teacher": "loss, teacher_logits, kd, teacher_ce",
         "nan-kd": "loss, kd", "nan-ce": "loss, ce", "nan-loss": "loss", "inf-loss": "loss", "nan-gradient": "gradient",
         "nan-weight": "output, student_logits, kd, ce"}


@pytest.fixture(scope="module")
def stopped(ways, tmp_path_factory):
    """--on_nonfinite stop, the default -> fault: folder of a run that met it in step 7, what was said."""
    home = tmp_path_factory.mktemp("stopped")
    for fault in STOPS:
        with pytest.MonkeyPatch.context() as patch:
            arm(f"{fault}:7:0", patch)
            main_stops(folder=home / fault, **RUN | ways["accum" if fault == "nan-ce" else "student"])
    return {fault: home / fault for fault in STOPS}


@pytest.mark.parametrize("fault", STOPS)
def test_the_first_bad_step_stops_the_run(stopped, ways, straight, tmp_path, fault):
    folder = stopped[fault]
    value = "inf" if fault == "inf-loss" else "nan"
    line = re.search(r"^step 7: .*$", (folder / "train.log").read_text(), re.M)[0]
    assert f"({STOPS[fault]})" in line and f" is {value} " in line
    event, step = folder / "autopsy/step-00000007-rank0", 5 if fault == "nan-weight" else 7
    assert {path.name for path in event.iterdir()} == {"report.txt", "model.safetensors", "batch.safetensors"}
    assert last_checkpoint(folder)[0] == step and not list(folder.glob("*.nonfinite"))
    assert all(finite(read_file(path)[0]) for path in checkpoints(folder)) and not (folder / "eval.json").exists()
    shutil.copytree(folder, tmp_path / "run")
    resume(tmp_path / "run")                        # without the fault
    wanted = last_checkpoint(straight["accum" if fault == "nan-ce" else "student"])[1]
    assert_same_bits(last_checkpoint(tmp_path / "run")[1], wanted)


@pytest.mark.parametrize("fault", ["nan-student", "nan-teacher", "nan-ce", "nan-gradient", "nan-weight"])
def test_the_message_says_step_value_cause_and_what_to_try(ways, tmp_path, monkeypatch, capsys, fault):
    arm(f"{fault}:2:0", monkeypatch)
    main_stops(folder=tmp_path / "run", **ways["student"] | dict(batch_size=4, log_every=4, max_steps=8))
    said = capsys.readouterr().err
    if fault == "nan-weight":
        assert "STOPPED before step 2: non-finite output, student_logits" in said and "ALREADY non-finite" in said
    else:
        assert f"STOPPED before step 2: non-finite {STOPS[fault]} at step 2, nan; none of it touched" in said
    assert "What to try:" in said and all(f"  {i}. " in said for i in range(1, 6)) and "Traceback" not in said
    assert "at step 2" in said and f"kept: python autopsy.py {tmp_path / 'run/autopsy/step-00000002-rank0'}" in said


def test_a_teacher_that_overflows_is_named_and_replayed(ways, huge, tmp_path, capsys):
    """In a real process too; under skip it ends after max_skips."""
    fields = RUN | ways["student"] | dict(teacher=huge)
    main_stops(folder=tmp_path / "run", **fields)
    said = capsys.readouterr()
    assert re.search(r"STOPPED before step 0: non-finite loss, teacher_logits, kd, teacher_ce at step 0, (nan|inf)", said.err)
    step, tensors, _ = last_checkpoint(tmp_path / "run")
    assert step == 0 and finite(tensors)
    event = tmp_path / "run/autopsy/step-00000000-rank0"
    report_there = (event / "report.txt").read_text()
    end, = wait(start(ROOT / "autopsy.py", event, cwd=tmp_path))
    assert end.code == 0 and "did NOT reproduce" not in end.out, end.err
    assert re.search(r"(NaN|Inf) BORN in forward: .*\n.*\n +at train_distill.py:", end.out)
    lines = [[line for line in text.splitlines() if re.search("BORN|CAME IN|replayed|path to", line)]
             for text in (report_there, end.out)]
    assert lines[0] == lines[1] and len(lines[0]) >= 3
    main_stops(folder=tmp_path / "skip", **fields | dict(on_nonfinite="skip", max_skips=3))
    assert "5 non-finite steps in a row" in capsys.readouterr().err


def test_a_bad_weight_is_named_by_the_autopsy(stopped, capsys):
    capsys.readouterr()
    autopsy.main(stopped["nan-weight"] / "autopsy/step-00000007-rank0")
    out = capsys.readouterr().out
    assert "parameter token.weight already holds NaN, 1/16448" in out and "CAME IN with: parameter token.weight" in out


@pytest.mark.parametrize("way", ["accum", "cached"])
def test_a_skipped_step_is_a_step_never_taken_and_counted(ways, tmp_path, monkeypatch, way):
    fields = RUN | ways[way] | dict(max_steps=9, on_nonfinite="skip", log_every=3)
    train_here(folder=tmp_path / "without", skip_steps="1,3,5-7", **fields)
    arm("nan-ce:1:0 nan-loss:3:0 nan-teacher:5:0 nan-gradient:6:0 nan-student:7:0", monkeypatch)
    train_here(folder=tmp_path / "skipped", **fields)
    _, tensors, body = last_checkpoint(tmp_path / "skipped")
    assert_same_bits(tensors, last_checkpoint(tmp_path / "without")[1])
    assert body["guard"]["skips"] == {"output": 1, "loss": 3, "gradient": 1, "float16 overflow": 0}
    assert [row["skipped"] for row in rows_of(tmp_path / "skipped")] == [1, 3, 5]
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
    found, wanted = (strict(folder / "eval.json")["scores"]["val"] for folder in (tmp_path / "run", straight["student"]))
    same = way not in ("train_on_prompt",)          # the teacher's numbers do not depend on the student
    assert (found["teacher_ce"] == pytest.approx(wanted["teacher_ce"], rel=5e-3)) == same
    train_distill.load_hf(tmp_path / "run/hf")


def test_a_teacher_that_is_no_better_is_said(straight, tmp_path, capsys, data):
    weak = write_model(tmp_path / "weak")           # random weights
    train_here(data, tmp_path / "run", phase="student", teacher=weak, student=straight["student"] / "hf", max_steps=2,
               learning_rate=1e-4)
    one = rows_of(tmp_path / "run", "val")[0]
    assert one["teacher_ce"] > one["ce"] and re.search(
        rf"^warning: the teacher's cross-entropy {one['teacher_ce']:.4f} is no better than the student's {one['ce']:.4f}",
        capsys.readouterr().out, re.M)
    assert not any("warning" in (straight[way] / "train.log").read_text() for way in ("student", "teacher"))


def test_a_look_at_samples_changes_nothing(ways, tmp_path, monkeypatch):
    train_here(folder=tmp_path / "without", **RUN | ways["accum"] | dict(max_steps=6))
    monkeypatch.setattr(report, "completions", COMPLETIONS)
    monkeypatch.setattr(train_distill, "generate", lambda model, ids, most, *a, **k: ids[:5] if not model.training else 0)
    train_here(folder=tmp_path / "with", **RUN | ways["accum"] | dict(max_steps=6, sample_every=2, eval_every=3))
    assert_same_bits(last_checkpoint(tmp_path / "with")[1], last_checkpoint(tmp_path / "without")[1])
    names = sorted(path.name for path in (tmp_path / "with/samples").iterdir())
    assert names == ["final.txt"] + [f"step-{step:08d}.txt" for step in (2, 4, 6)]
    text = (tmp_path / "with/samples/step-00000004.txt").read_text()
    assert text.count("--- model\n### I") == 7 == len(set(re.findall(r"--- val row (\d+)", text)))


COMPLETIONS = report.completions                    # before quicken()


def test_rows_are_cut_and_left_out_by_the_context(data, tutor, tmp_path, capsys):
    found = read_folder(data, 512, False, "cpu")
    capsys.readouterr()
    prompts, lengths = np.load(data / "prompt.npy"), np.diff(np.load(data / "offsets.npy"))
    most = int(np.median(prompts))
    full = int((prompts >= most).sum())
    train_here(data, tmp_path / "run", phase="student", teacher=tutor, max_length=most, max_steps=1)
    assert f"{data}: {full} rows left out, their prompts fill --max_length {most}; {(lengths > most).sum() - full} rows " \
        "cut to it\n" in capsys.readouterr().out
    kept = read_folder(data, most, False, "cpu")
    assert 0 < full < len(prompts) == sum(map(len, found.rows.values()))
    assert sum(map(len, kept.rows.values())) == len(prompts) - full
    about = strict(tmp_path / "run/config.json")["derived"]
    assert about["steps_per_epoch"] == len(kept.rows["train"]) / 2


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
    other = build_set(tmp_path / "other", limit=60, seed=5)
    shutil.copytree(straight["student"], tmp_path / "student")
    evaluated(capsys, "--run_name", "student", "--out_dir", tmp_path, "--data_dir", other, "--split", "train")
    assert strict(tmp_path / "student/eval-train.json")["rows"] == {"train": 52}
    assert strict(tmp_path / "student/eval.json") == wanted


def test_eval_on_questions_of_a_file(straight, tmp_path, capsys):
    shutil.copytree(straight["student"], tmp_path / "student")
    rows = [{"instruction": f"Speed {i}?", "options": [f"{i} m/s", "no speed", "5 km"], "answer": i % 3} for i in range(9)]
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


def test_the_size_of_batches_changes_no_evaluation(straight, tmp_path, capsys, monkeypatch):
    shutil.copytree(straight["student"], tmp_path / "student")
    before = strict(tmp_path / "student/eval.json")["scores"]
    for most in (1, 500):
        monkeypatch.setattr(train_distill, "packed", lambda data, rows: packed(data, rows, most))
        evaluated(capsys, "--run_name", "student", "--out_dir", tmp_path)
        found = strict(tmp_path / "student/eval.json")["scores"]
        for split, one in before.items():
            assert found[split] == pytest.approx(one, rel=2e-6)


def test_eval_without_its_teacher(data, tmp_path, capsys):
    write_model(tmp_path / "gone")
    train_here(data, tmp_path / "run", phase="student", teacher=tmp_path / "gone", max_steps=1)
    shutil.rmtree(tmp_path / "gone")
    out = evaluated(capsys, "--run_name", "run", "--out_dir", tmp_path)
    assert f"without the run's teacher: {tmp_path / 'gone'} is gone" in out
    assert set(strict(tmp_path / "run/eval.json")["table"]) == {"model", "5-gram", "unigram"}


def sample(*words):
    main_here("sample", "--device", "cpu", "--max_tokens", 12, *words)


def test_samples_of_a_run_and_of_a_folder(straight, tmp_path, capsys):
    (tmp_path / "ask.txt").write_text("What is the speed?\n\n  \nHow heavy is it?\n")
    sources = [["--run_name", "student", "--out_dir", straight["student"].parent], ["--model", straight["student"] / "hf"]]
    found = []
    for source in sources:
        out = tmp_path / "answers.jsonl"
        sample(*source, "--prompts", tmp_path / "ask.txt", "--num_samples", 3, "--out", out, "--seed", 7)
        assert f"{out}: 6 answers" in capsys.readouterr().out
        found.append([json.loads(line) for line in out.read_text().splitlines()])
    assert found[0] == found[1] and [row["seed"] for row in found[0]] == [7, 8, 9] * 2
    assert [row["instruction"] for row in found[0]] == ["What is the speed?"] * 3 + ["How heavy is it?"] * 3
    assert len({row["response"] for row in found[0]}) == 6
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
    model = train_distill.load_hf(found["nan"])
    tensors, path = train_distill.model_tensors(model), found["nan"] / "model.safetensors"
    blob, value = path.read_bytes(), tensors["norm.weight"][3]
    place = blob.index(tensors["norm.weight"].detach().numpy().tobytes()) + 12
    assert np.frombuffer(blob[place:place + 4], np.float32)[0] == value.item()
    path.write_bytes(blob[:place] + np.float32(np.nan).tobytes() + blob[place + 4:])
    return found


def valid(data, folder):
    return ["--device", "cpu", "--dry_run", "--max_steps", 1, "--data_dir", data, "--out_dir", folder]


@pytest.mark.parametrize("words, said", [
    ("--learning_rat 1", "did you mean --learning_rate?"), ("--student-mode tiny", "did you mean --student"),
    ("words", "unknown flag words"), ("--batch_size many", "--batch_size"), ("--batch_size 0", "--batch_size 0"),
    ("--phase student", "--phase student: a student needs --teacher DIR"), ("--phase both", "one of teacher, student"),
    ("--phase teacher --teacher {tutor}", "--phase teacher: a student needs --teacher DIR, and a teacher has none"),
    ("--teacher no/where", "--teacher no/where: no such folder"), ("--teacher gpt2", "--teacher gpt2: no such folder"),
    ("--student nobody", "--student nobody: no such folder, and not one of tiny, small, gpt2"),
    ("--teacher_size nobody", "--teacher_size nobody: no such folder, and not one of tiny, small, gpt2"),
    ("--teacher {adapter}", "adapter holds a LoRA adapter"), ("--student {adapter}", "adapter holds a LoRA adapter"),
    ("--teacher {empty}", "empty has no config.json"), ("--teacher {quantised}", "quantization_config"),
    ("--divergence x", "--divergence x: one of forward, reverse, jsd"), ("--divergence jsd --beta 1", "--beta 0 and 1"),
    ("--divergence jsd --beta 0", "--beta 0 and 1"), ("--beta 1.5", "--beta 1.5"), ("--alpha 2", "--alpha 2"),
    ("--alpha -0.1", "--alpha -0.1"), ("--alpha nan", "--alpha"), ("--temperature 0", "--temperature 0"),
    ("--temperature -1", "--temperature -1"), ("--temperature inf", "--temperature"), ("--dropout 1", "--dropout"),
    ("--kd_reduction mean", "--kd_reduction mean: one of token, batchmean"), ("--teacher_dtype int8", "--teacher_dtype"),
    ("--cache_teacher 8 --kd_reduction batchmean", "--cache_teacher"), ("--cache_teacher -1", "--cache_teacher -1"),
    ("--max_length 0", "--max_length 0"), ("--max_epochs 0", "--max_epochs 0"), ("--compare -1", "--compare -1"),
    ("--warmup_ratio 2", "--warmup_ratio 2"), ("--eval_rows -1", "--eval_rows -1"), ("--seed -1", "--seed -1"),
    ("--data_dir no/where", "--data_dir no/where"), ("--data-path no.jsonl", "--data_dir no.jsonl"),
    ("--teacher {short}", "no rows in the train or the val split"), ("--max_length 40", "no rows in the train or the val"),
    ("--student {small}", "has 200 rows of embeddings, its tokenizer 257 ids"), ("--dtype float8", "--dtype"),
    ("--device abacus", "--device abacus"), ("--skip_steps 3-x", "--skip_steps 3-x"),
    ("--on_nonfinite pray", "skip, stop"), ("--resume", "--resume needs --run_name"), ("--config no.json", "no.json")])
def test_bad_flags_are_refused(data, tutor, folders, refused, tmp_path, words, said):
    more = [] if re.search("--teacher(_size)? |--phase", words) else ["--phase", "student", "--teacher", tutor]
    assert said in refused(*valid(data, tmp_path / "out"), *more, *words.format(tutor=tutor, **folders).split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, said", [
    ("cut", "model.safetensors is cut off, damaged"), ("nan", "not finite in float32: model.norm.weight (1 of 64 values)"),
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


def test_a_file_without_a_good_row_and_one_with_an_odd_name(tutor, tmp_path, capfd):
    (tmp_path / "bad.jsonl").write_text('no JSON\n{"instruction": "alone"}\n')
    with pytest.raises(SystemExit) as stop:
        main_here("--device", "cpu", "--teacher", tutor, "--data_path", tmp_path / "bad.jsonl", "--out_dir", tmp_path / "o")
    lines = capfd.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 2 and not (tmp_path / "o").exists()
    assert "bad.jsonl" in lines[0] and "not JSON 1, no response 1" in lines[0] and "could not be built" in lines[1]


def test_a_file_whose_name_has_a_blank_can_be_given(tutor, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(train_distill, "made_set", lambda kind, name, *_: made.append(name) or train_distill.fail("here"))
    for name in ("my own data.jsonl", "mine.jsonl.gz"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(SystemExit):
            main_here("--device", "cpu", "--teacher", tutor, "--data_path", tmp_path / name, "--out_dir", tmp_path / "o")
    assert all(re.fullmatch(r"\w[\w.+-]*", name) for name in made) and len(made) == 2, made     # as prepare.py wants it


def test_another_tokenizer_is_refused(data, tutor, refused, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator([TOKENS], tokenizers.trainers.BpeTrainer(
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
    assert train_distill.load_tokenizer(tmp_path / "run/hf").fingerprint == train_distill.load_tokenizer(folder).fingerprint
    assert "different tokenizers: " in refused(*valid(mine, tmp_path / "out"), "--student", folder, "--teacher", tutor)


def test_an_existing_run_is_not_overwritten(ways, straight, refused):
    for way in ("teacher", "student"):
        before = {path: path.stat().st_mtime_ns for path in straight[way].rglob("*")}
        assert "already holds checkpoints: --resume" in refused(*training("", straight[way], **RUN | ways[way])[1:])
        assert {path: path.stat().st_mtime_ns for path in straight[way].rglob("*")} == before


def test_a_resume_keeps_the_model_and_the_data(straight, tutor, refused, tmp_path):
    words = ["--resume", "--run_name", "student", "--out_dir", straight["student"].parent, "--device", "cpu"]
    others = {"teacher": straight["teacher"] / "hf", "student": "small", "max_length": 100, "data_dir": tmp_path,
              "phase": "teacher", "seed": 2, "compare": 2}
    for flag, value in others.items():
        assert f"--{flag} is " in refused(*words, f"--{flag}", value)
    assert "--train_on_prompt is False" in refused(*words, "--train_on_prompt")
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
    ("eval", "--run_name student --teacher no/where", "no/where"), ("eval", "--run_nam x", "did you mean --run_name"),
    ("sample", "--run_name nobody --instruction x", "there is accum"), ("sample", "--run_name student", "--instruction"),
    ("sample", "--run_name student --instruction x --num_samples 0", "--num_samples 0"),
    ("sample", "--run_name student --instruction x --temperature -1", "--temperature -1"),
    ("sample", "--run_name student --prompts no.txt", "--prompts no.txt cannot be read"),
    ("sample", "--run_name student --instruction x --out {out}", "cannot be written"),
    ("sample", "--model {short} --instruction " + "x" * 60, "instruction 1 has 1"),
    ("sample", "--run_name student --instruction x --device abacus", "--device abacus")])
def test_what_the_verbs_refuse(straight, tutor, folders, refused, tmp_path, verb, words, said):
    (tmp_path / "bad.jsonl").write_text("nothing\n")
    words = words.format(tutor=tutor, bad=tmp_path / "bad.jsonl", out=tmp_path, **folders).split()
    assert said in refused(verb, "--device", "cpu", "--out_dir", straight["student"].parent, *words)
