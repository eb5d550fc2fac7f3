"""What the tests of train_student.py share: a small set of spectra, tiny models, runs in this process and in real ones.

Not a test file. As a program it is train_student.py with faults, as python tests/student_tools.py FAULT:STEPS:RANK
[flags]: see arm().
"""
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import train_student  # noqa: E402
from data.spectra import prepare  # noqa: E402
from data.spectra.msp import read_msp  # noqa: E402
from edl_tools import assert_same_bits, flags_of, last_checkpoint, metrics_of  # noqa: E402
from runs import model_tensors, read_file, steps_in  # noqa: E402

SMALL = train_student.CPU | train_student.DRY | dict(               # whole, so that no process fills in a preset
    device="cpu", width=16, gnn_width=8, gnn_layers=1, batch_size=8, log_every=0, eval_every=0, save_every=0,
    dry_run=True)
STATE = ("bias", "usage", "balance")                                # of a student: what follow() moves


SCRIPTS = ["train_student.py", "train_edl.py", "common.py", "runs.py", "autopsy.py", "data/files.py",
           *[f"data/spectra/{path.name}" for path in (ROOT / "data/spectra").glob("*.py")],
           *[f"data/molecules/{path.name}" for path in (ROOT / "data/molecules").glob("*.py")]]
BLOCKED = ["matplotlib", "scipy", "pandas", "sklearn", "drain3", "transformers", "tokenizers", "wandb", "matchms",
           "torch_geometric"]


# ------------------------------------------------------------------------------------------------------- in process
def build_set(folder, limit=420, max_mz=160, seed=0):
    """A demo library in folder/set -> its path; of the defaults 77 light molecules, 15 of them measured twice."""
    words = f"--demo --limit {limit} --max_mz {max_mz} --seed {seed} --workers 1 --name set --out_dir".split()
    return prepare.main([*words, str(folder)])


def small_config(**fields):
    config = train_student.Config(**SMALL | fields)
    return train_student.settle(config, {*vars(config)})


def train_here(data_dir, folder, **fields):
    """Train in this process -> train()'s answer; the run is in folder. Signal handlers are put back."""
    fields = dict(data_dir=str(data_dir), out_dir=str(folder.parent), run_name=folder.name) | fields
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return train_student.train(small_config(**fields))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main_here(*words):
    """main() of a run in this process; signal handlers are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        train_student.main([str(word) for word in words])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main_stops(folder, **fields):
    """main() of a run that must end with code 3."""
    with pytest.raises(SystemExit) as stop:
        main_here(*training("", folder, **fields)[1:])
    assert stop.value.code == 3


def quicken(patch):
    """No pictures and no stopwatch, each of which takes as long as ten steps; real processes have them all."""
    patch.setattr(train_student.Run, "curves", lambda run: None)
    patch.setattr(train_student.metrics, "mirror", lambda *_: None)
    patch.setattr(train_student.search, "speed", lambda *_: {})


def state_of(model):
    """One number over every bit of what a file would hold: parameters, and a student's bias and usage."""
    value = 0
    for tensor in model_tensors(model).values():
        value = zlib.crc32(tensor.detach().contiguous().numpy().tobytes(), value)
    return value


# ----------------------------------------------------------------------------------------------------- what runs leave
def strict(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def train_rows(folder):
    return [row for row in metrics_of(folder) if row["split"] == "train"]


def expert_state(folder):
    return {name: last_checkpoint(folder)[1][f"model.{name}"] for name in STATE}


ROWS = ["n", "cosine", "weighted", "stein", "A R@1", "A R@5", "A R@10", "A R@10 +-5 Da", "N R@1", "N R@5", "N R@10",
        "N R@10 +-5 Da", "peaks@5", "peaks@10", "peaks@20", "overlap_all10"]


def table_in(text):
    return re.findall(rf"^(?:{'|'.join(map(re.escape, ROWS))}) .*\d$", text, re.M)


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
    assert strict(folder / "eval.json")["columns"] == strict(straight / "eval.json")["columns"]


# --------------------------------------------------------------------------------------------------- sample and rank
LIST = ["CCO ethanol", "c1ccccc1  benzene, aromatic", "CC(C)=O", "no molecule", "", "CCC=O propanal", "C1CC ring",
        "CCCCCCCCCCCCCCCCCCCCCCCC tetracosane", "CCN(CC)CC", "C", "[He]"]
GOOD = {"CCO": "ethanol", "c1ccccc1": "benzene, aromatic", "CC(C)=O": "CC(C)=O", "CCC=O": "propanal",
        "CCN(CC)CC": "CCN(CC)CC", "C": "C", "[He]": "[He]"}


def sample(folder, smiles, out, *words):
    main_here("sample", "--run_name", folder.name, "--out_dir", folder.parent, "--device", "cpu", "--smiles", smiles,
              "--out", out, *words)
    return list(read_msp(out))


def rank(folder, msp, candidates, capsys, *words):
    """-> {query: (number of candidates, list of (score, line))}, the lines before the first query."""
    capsys.readouterr()
    main_here("rank", "--run_name", folder.name, "--out_dir", folder.parent, "--device", "cpu", "--msp", msp,
              "--candidates", candidates, *words)
    found, head = {}, []
    for line in capsys.readouterr().out.splitlines():
        if title := re.fullmatch(r"(.+) \((\d+) candidates\)", line):
            found[title[1]] = int(title[2]), []
        elif row := re.fullmatch(r" +(\d+)  (\d\.\d{4}|-inf)  (.+)", line):
            rows = found[[*found][-1]][1]
            rows.append((float(row[2]), row[3]))
            assert int(row[1]) == len(rows)
        elif line:
            head.append(line)
    return found, head


# ------------------------------------------------------------------------------- in the two processes of the fixture
def run_in_pair(data_dir, folder, fault, fields):
    """A whole run inside the pair -> ("done", answer) or ("stopped", message), and the checksum of the model."""
    fields = dict(data_dir=str(data_dir), out_dir=str(Path(folder).parent), run_name=Path(folder).name) | fields
    patch = pytest.MonkeyPatch()
    quicken(patch)
    seen = arm(fault, patch)
    try:
        answer = "done", train_student.run_training(small_config(**fields), torch.device("cpu"))
    except common.NonFinite as error:
        answer = "stopped", str(error)
    finally:
        patch.undo()
    return *answer, state_of(seen[0])


def tables_of(data_dir, teacher, fields):
    """What ask_teachers returns on this rank."""
    config = small_config(data_dir=str(data_dir), teacher=str(teacher), phase="student", **fields)
    return train_student.ask_teachers(config, train_student.load_data(config))


# -------------------------------------------------------------------------------------------------- in real processes
def copy_scripts(home):
    """The script and what it imports, for a fresh start; with home/blocked in PYTHONPATH no other package is there."""
    for name in SCRIPTS:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, home / name)
    (home / "blocked").mkdir()
    (home / "blocked/sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({BLOCKED}))\n")


def training(fault, folder, **fields):
    """The command that trains into folder, with faults as arm() knows them or '' for the plain script."""
    fields = dict(out_dir=folder.parent, run_name=folder.name) | SMALL | fields
    return [*([Path(__file__), fault] if fault else [ROOT / "train_student.py"]), *flags_of(**fields)]


class AtRandom:
    """Steps, of which a share is drawn, the same on each rank and in each run."""
    def __init__(self, kind, share):
        self.kind, self.share = kind, float(share.rstrip("%")) / 100

    def __contains__(self, step):
        return random.Random(f"{self.kind} {step}").random() < self.share

    def __iter__(self):
        return iter(())                             # no list of them; kill-in-save wants one


def struck(kinds, steps):
    """The steps that AtRandom meets with 1 % -> a set for each kind; of two kinds at one step the first one counts."""
    found = []
    for kind in kinds:
        found.append({step for step in range(steps) if step in AtRandom(kind, "1%")} - set().union(*found))
    return found


def arm(faults, patch):
    """Let train_student meet faults, "kind:steps:rank kind:steps:rank" -> [model] later. steps: as in --skip_steps, or
    1% for that share of all steps, drawn at random. patch: a pytest.MonkeyPatch.

    kill, term: the process gets that signal in the middle of the step; term-student: only in the student's phase;
    kill-in-save: SIGKILL when the checkpoint of the step is written but not yet renamed; nan-loss; inf-loss;
    nan-gradient: behind a finite loss; nan-weight: in the head; nan-input: in the fingerprint; no-rows: the batch's
    count is 0."""
    compute_loss, get_batch, replace, seen = train_student.compute_loss, train_student.get_batch, os.replace, []
    parts = [fault.split(":") for fault in faults.split()]
    wanted = [(kind, AtRandom(kind, steps) if "%" in steps else steps_in(steps), int(rank))
              for kind, steps, rank in parts]

    def here(step):
        return {kind for kind, steps, rank in wanted if step in steps and common.rank() == rank}

    def faulty_loss(model, batch, step, config):
        if not torch.is_grad_enabled():
            return compute_loss(model, batch, step, config)
        now, inside = here(step), train_student.unwrap(model)
        seen[:] = [inside]
        if "kill" in now:
            os.kill(os.getpid(), signal.SIGKILL)
        if "term" in now or "term-student" in now and config.phase == "student":
            os.kill(os.getpid(), signal.SIGTERM)
        if "nan-weight" in now:
            inside.head.forward_axis.weight.data[40, 3] = math.nan
        loss, parts = compute_loss(model, batch, step, config)
        if "nan-gradient" in now:
            loss.register_hook(lambda gradient: gradient * math.nan)
        if now & {"nan-loss", "inf-loss"}:
            loss = loss * (math.nan if "nan-loss" in now else math.inf)
        return loss, parts

    def faulty_batch(data, split, step, config, micro=0):
        batch, now = get_batch(data, split, step, config, micro), here(step)
        if "nan-input" in now:
            batch["fp_value"][3] = math.nan
        return batch | {"count": 0} if "no-rows" in now else batch

    def faulty_replace(source, target):
        if any(f"step-{step:08d}" in str(target) for kind, steps, _ in wanted for step in steps if kind[-4:] == "save"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    patch.setattr(train_student, "compute_loss", faulty_loss)
    patch.setattr(train_student, "get_batch", faulty_batch)
    patch.setattr(os, "replace", faulty_replace)
    return seen


if __name__ == "__main__":
    last_model = arm(sys.argv[1], pytest.MonkeyPatch())
    try:
        train_student.main(sys.argv[2:])
    finally:
        print(f"state {state_of(last_model[0]):08x}" if last_model else "no step was taken", flush=True)
