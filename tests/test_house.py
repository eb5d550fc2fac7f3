"""What holds for the whole repository: lines and files a reader can hold, no pickle, scripts that stay alike."""
import re
from pathlib import Path

import pytest

import train_adapter
import train_distill
import train_edl
import train_logbert
import train_student

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {"out", "venv", ".venv"}
SOURCES = sorted(path for path in ROOT.rglob("*.py") if not ELSEWHERE & set(path.relative_to(ROOT).parts))
SCRIPTS = {"train_edl.py": train_edl, "train_student.py": train_student, "train_distill.py": train_distill,
           "train_adapter.py": train_adapter, "train_logbert.py": train_logbert}
BUDGET = dict.fromkeys(SCRIPTS, 750) | {"train_adapter.py": 1200, "bench.py": 800, "common.py": 350, "runs.py": 365,
                                        "autopsy.py": 220}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_fit(path):
    lines = path.read_text().splitlines()
    assert not [f"{path.name}:{i}" for i, line in enumerate(lines, 1) if len(line) > 120]
    assert len(lines) <= BUDGET.get(path.name, 900)


@pytest.mark.parametrize("path", [path for path in SOURCES if "tests" not in path.parts], ids=lambda path: path.name)
def test_no_pickle(path):
    assert not re.search(r"\bpickle\b|torch\.save|torch\.load|allow_pickle=True|all_gather_object|broadcast_object",
                         re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.S))


def test_links_in_the_texts_lead_somewhere():
    texts = [ROOT / "README.md", ROOT / "data/README.md", *(ROOT / "docs").glob("*.md")]
    links = [(path, link) for path in texts for link in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text())]
    assert len(links) > 15 and not [(path.name, link) for path, link in links if not (path.parent / link).exists()]


# ------------------------------------------------------------------------------------------------- siblings stay alike
def common_fields(text):
    """(name, type, help) of the flags that all scripts share, in order; the defaults are each script's own."""
    block = text.split("# common to all scripts\n")[1].split("    # this script\n")[0]
    return re.findall(r"^    (\w+): (\w+) = .*?  # (.*)$", block, re.M)


def between(text, start, end):
    assert text.count(start) == 1 and end in text.split(start)[1], (start, end)
    return text.split(start)[1].split(end)[0]


FOLLOW = """            bad = guard.step(step)
            if config.phase == "student":
                raw_model.follow(bad)               # expert bias and usage: only if the step was taken
"""


def kept_alike(name, text):
    """What is the same in all scripts, by what it is called."""
    text = text.replace(name, "train_x.py")
    if name == "train_student.py":                  # what no gradient moves is moved by the step too
        assert text.count(FOLLOW) == 1
        text = text.replace(FOLLOW, "            guard.step(step)\n")
    loop = between(text, "    guard = Guard(", "        for step in range(start, max_steps + 1):")
    return {
        "common flags": common_fields(text),
        "banners": re.findall(r"^# -{20,} (.*)$", text, re.M),
        "train()": between(text, "def train(config):\n", "\n\n\n"),
        "optimizer step": between(text, "            # ---------------- one optimizer step ----------------\n",
                                  "    if not last:\n"),
        "autopsy": between(text, "    def examine(step, now):", "    guard = Guard("),
        "guard": loop.split("    size, rows = ")[0],
        "poll": between(text, "            # once in a while:", "                if stats[\"steps\"]:"),
        "save and break": between(text, "                if last or stop or every(step, config.save_every):\n",
                                  "            # ---------------- one optimizer step")}


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "train_edl.py"])
def test_scripts_are_alike_where_they_mean_the_same(name):
    one, other = (kept_alike(script, (ROOT / script).read_text()) for script in ("train_edl.py", name))
    assert len(one["common flags"]) == 29 and len(one["banners"]) == 7
    for what in one:
        assert one[what] == other[what], what


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_common_flag_has_one_help(name):
    """--help is made of the same comments, so a flag reads the same wherever it stands."""
    fields = [field for field, _, _ in common_fields((ROOT / name).read_text())]
    assert fields == list(SCRIPTS[name].Config.__dataclass_fields__)[:len(fields)]
