"""What holds for the whole repository: lines and files a reader can hold, commands in texts that parse, no pickle."""
import re
import shlex
from pathlib import Path

import pytest

import train_edl
from data.molecules import prepare
from runs import parse_flags

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {"out", "venv", ".venv"}
SOURCES = sorted(path for path in ROOT.rglob("*.py") if not ELSEWHERE & set(path.relative_to(ROOT).parts))
BUDGET = {"train_edl.py": 750, "common.py": 350, "runs.py": 350, "autopsy.py": 220}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_fit(path):
    lines = path.read_text().splitlines()
    assert not [f"{path.name}:{i}" for i, line in enumerate(lines, 1) if len(line) > 120]
    assert len(lines) <= BUDGET.get(path.name, 900)


@pytest.mark.parametrize("path", [path for path in SOURCES if "tests" not in path.parts], ids=lambda path: path.name)
def test_no_pickle(path):
    assert not re.search(r"\bpickle\b|torch\.save|torch\.load|allow_pickle=True|all_gather_object|broadcast_object",
                         re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.S))


def commands():
    """Each command of README.md, data/README.md and the docstrings that runs something of ours."""
    texts = [(ROOT / name).read_text() for name in ("README.md", "data/README.md")]
    texts += [train_edl.__doc__, prepare.__doc__]
    for text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s+#.*", "", line.strip())
            if re.match(r"(python|torchrun|pip install)\b", line):
                yield from (part.strip() for part in line.split("&&") if ".py" in part)


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_commands_in_the_texts_parse(command):
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[script]).is_file()
    arguments = words[script + 1:]
    if words[script] == "data/molecules/prepare.py":
        if "--help" not in arguments:
            prepare.parse(arguments)
    elif words[script] == "train_edl.py":
        verb = {"eval": train_edl.EvalFlags, "sample": train_edl.SampleFlags}.get(arguments[0] if arguments else "")
        if "--help" not in arguments:
            arguments, aliases = (arguments[1:], {}) if verb else (arguments, train_edl.ALIASES)
            parse_flags(verb or train_edl.Config, arguments, "", aliases)


def test_the_texts_name_commands():
    assert len(set(commands())) > 15
