"""docs/copy.md, done as it says: its blocks take the place of sections of train_edl.py, and what comes out is run."""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from edl_tools import assert_same_bits, last_checkpoint

ROOT = Path(__file__).resolve().parents[1]
FILES = ("common.py", "runs.py", "autopsy.py")      # what a copied script needs beside it, the README says


def blocks():
    """What a block of docs/copy.md replaces, as its first line says -> its text."""
    text = (ROOT / "docs/copy.md").read_text()
    return dict(re.findall(r"```python\n# ([^\n]+)\n(.*?)```", text, re.S))


def assembled():
    """train_edl.py with the blocks in their places -> the text of train_sensor.py"""
    text, found = (ROOT / "train_edl.py").read_text(), blocks()
    sections = re.split(r"(?m)^(# -{20,} .*\n)", text)          # head, banner, section, banner, section ...
    for name in ("data", "model", "loss", "evaluation, samples", "main"):
        place = next(i for i, part in enumerate(sections) if part.startswith("# -") and part.endswith(f" {name}\n"))
        sections[place + 1] = found.pop(name) + "\n\n" * (name != "main")
    sections[0] = found.pop("docstring") + sections[0].split('"""\n', 2)[2]
    sections[2] = sections[2].split("    # this script\n")[0] + "    # this script\n" + found.pop(
        'config, from "# this script" on') + "\n\n"
    text = "".join(sections)
    lines, = (found.pop(name) for name in list(found) if name.startswith("lines: "))
    for old, new in ast.literal_eval(lines):
        assert old in text, old
        text = text.replace(old, new)
    assert not found                                # each block had its place
    return text


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the copy and what it needs beside it."""
    folder = tmp_path_factory.mktemp("copy")
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    (folder / "train_sensor.py").write_text(assembled())
    return folder


def run(home, *flags, code=0, script="train_sensor.py"):
    done = subprocess.run([sys.executable, script, "--dry_run", "--device", "cpu", *flags], cwd=home, text=True,
                          capture_output=True)
    assert done.returncode == code, done.stderr
    return done


def test_the_copy_learns_and_resumes_bit_for_bit(home):
    more = "--batch_size", "32", "--learning_rate", "1e-2", "--window", "24"
    whole = run(home, "--run_name", "whole", "--max_steps", "300", *more)
    assert "windows/s" in whole.stdout and "molecule" not in whole.stdout + whole.stderr
    rows = [json.loads(line) for line in (home / "out/whole/metrics.jsonl").read_text().splitlines()]
    val = [row for row in rows if row["split"] == "val"]
    assert val[-1]["loss"] < 0.9 * val[-1]["persistence"]       # better than that nothing changes
    run(home, "--run_name", "parts", "--max_steps", "300", *more)
    for path in sorted((home / "out/parts").glob("step-*"))[1:]:
        path.unlink()                               # as if it had been killed after its first save
    run(home, "--run_name", "parts", "--resume")
    ends = [last_checkpoint(home / f"out/{name}")[1] for name in ("whole", "parts")]
    assert_same_bits(*ends)


def test_the_copy_stays_finite(home):
    """The faults that break other scripts, put into this one's loss."""
    (home / "broken.py").write_text("""
import math, sys, train_sensor
healthy = train_sensor.compute_loss
def broken(model, batch, step, config):
    loss, parts = healthy(model, batch, step, config)
    return (loss * math.nan if step == 7 else loss), parts
train_sensor.compute_loss = broken
train_sensor.main(sys.argv[1:])
""")
    done = run(home, "--run_name", "broken", script="broken.py")
    assert "step 7: NaN detected BEFORE backward" in done.stdout and "=== AUTOPSY step 7" in done.stderr
    assert all(tensor.isfinite().all() for tensor in last_checkpoint(home / "out/broken")[1].values())
    run(home, "--run_name", "stopped", "--on_nonfinite", "stop", script="broken.py", code=3)


def test_the_copy_reads_a_file_and_refuses_what_is_none(home):
    lines = ["a,b,c"] + [f"{i % 7},{i % 11}.5,{-i % 13}" for i in range(400)]
    (home / "readings.csv").write_text("\n".join(lines))
    run(home, "--run_name", "file", "--data_dir", "readings.csv", "--window", "16")
    for text in "\n".join(lines[:20]), "\n".join([*lines[:300], "1,two,3"]), "\n".join([*lines, "1,nan,3"]), "":
        (home / "bad.csv").write_text(text)
        error = run(home, "--run_name", "bad", "--data_dir", "bad.csv", "--window", "16", code=2).stderr
        assert error.startswith("error: --data_dir bad.csv") and error.count("\n") == 1, error


def test_the_copy_keeps_what_is_common(home):
    """Common flags and the optimizer step are those of train_edl.py to the letter."""
    one, other = ((home / "train_sensor.py").read_text(), (ROOT / "train_edl.py").read_text())
    for start, end in (("# common to all scripts", "# this script"), ("# ---------------- one opti", "if not last:")):
        assert one.split(start)[1].split(end)[0] == other.split(start)[1].split(end)[0]
