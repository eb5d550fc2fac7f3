"""Each command of README.md, docs/, data/README.md and the docstrings: it parses, and it runs.

By default a training command runs in small, with --dry_run, in this process, on data of the kind that it names. With
-m slow the commands that a newcomer types first run as they are written, in a clone of the repository.
"""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from distill_tools import write_model
from test_house import ROOT, SCRIPTS

import bench
import figure
from data.logs import prepare as logs
from data.molecules import prepare as molecules
from data.scenes import prepare as scenes
from data.scenes import report as scene_report
from data.spectra import prepare as spectra
from data.spectra import search
from data.text import prepare as texts
from data.text import report
from runs import parse_flags

PREPARE = {"data/molecules/prepare.py": molecules, "data/spectra/prepare.py": spectra, "data/text/prepare.py": texts,
           "data/scenes/prepare.py": scenes, "data/logs/prepare.py": logs}
# where the flags of a script's verbs are, if not in the script
VERBS = {"train_student.py": search, "train_distill.py": report, "train_adapter.py": scene_report}
TEXTS = [ROOT / "README.md", ROOT / "data/README.md", *sorted((ROOT / "docs").glob("*.md"))]
STARTS = r"(?:[A-Z_]+=\S+ )*(python|torchrun)\b"


def commands(paths=TEXTS, modules=(*SCRIPTS.values(), *PREPARE.values(), bench, figure)):
    """-> the commands that run something of ours, in order, without what is set before them."""
    found = []
    for text in [path.read_text() for path in paths] + [module.__doc__ for module in modules]:
        for line in text.replace("\\\n", " ").splitlines():
            parts = re.sub(r"\s+#.*", "", line.strip()).split("&&") + re.findall(r"`([^`]+)`", line)
            found += [re.sub(r"^([A-Z_]+=\S+ )+", "", part.strip()) for part in parts
                      if re.match(STARTS, part.strip()) and ".py" in part]
    return list(dict.fromkeys(found))


def split(command):
    """-> the script, its arguments"""
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[place], words[place + 1:]


COMMANDS = [command for command in commands() if split(command)[0] != "train_sensor.py"]     # test_copy.py makes that


def test_the_texts_name_commands():
    assert len(COMMANDS) > 80 and {split(command)[0] for command in COMMANDS} >= {*SCRIPTS, *PREPARE, "bench.py"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_the_texts_parse(command):
    script, arguments = split(command)
    assert (ROOT / script).is_file()
    if script in PREPARE and "--help" not in arguments:
        PREPARE[script].parse(["/dev/null" if word == "FILE" else word for word in arguments])
    elif script in SCRIPTS:
        module, verb = SCRIPTS[script], arguments[0].capitalize() if arguments else ""
        verbs = VERBS.get(script, module)
        if hasattr(verbs, f"{verb}Flags"):
            parse_flags(getattr(verbs, f"{verb}Flags"), arguments[1:])
        else:
            parse_flags(module.Config, arguments, "", module.ALIASES)
    elif script == "bench.py":                      # its names are parts of rows' names
        assert all(any(word in row for row in bench.ROWS) for word in arguments if not word.startswith("-")
                   and word != "DIR")


# ---------------------------------------------------------------------------------------------------- run in small
# what the texts call a data set, a folder or a file, and what it is here: made by home()
SETS = {"molecules": ("moses",), "spectra": ("mine", "massbank"), "logs": ("hdfs",)}
SIZES = (r"--(max_steps|max_epochs|epochs|base_steps|n_layer|n_embd|width|blocks|batch.size|(eval|save|log)_every) \S+"
         r"|--(compile|dry.run)\b")                 # what a dry run has its own of, or cannot
LATER = {"--phase": 0, "--init": 1, "--teacher": 1, "--base": 1}        # these need what others leave


def trainings(script):
    """Training commands of a script, each kind once whatever its run and data are called; others need the first."""
    kinds = {}
    for command in COMMANDS:
        name, arguments = split(command)
        if name == script and (not arguments or arguments[0].startswith("-")) and "--resume" not in arguments:
            words = re.sub(SIZES, "", shlex.join(arguments))
            kinds.setdefault(re.sub(r"--(run_name|data_name|seed) \S+| ", "", words), shlex.split(words))
    return sorted(kinds.values(), key=lambda words: max([LATER.get(word, 0) for word in words], default=0))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with one for each script, where what the commands name is: prepared sets, in small, files, models."""
    folder = tmp_path_factory.mktemp("home")
    for kind, names in SETS.items():
        more = {"molecules": ["--limit", "300", "--props", "logp,sas,tpsa,qed", "--scaffold"],
                "spectra": ["--limit", "300"], "logs": ["--limit", "400"]}[kind]
        made = PREPARE[f"data/{kind}/prepare.py"].main(["--demo", *more, "--out_dir", str(folder / "data" / kind)])
        for name in names:
            (made.parent / name).symlink_to(made)
    (folder / "more.smi").write_text("\n".join("C" * i + end for i in range(3, 23) for end in ("O", "N", "c1ccccc1")))
    rows = [{"instruction": f"What is {i} and {i}?", "response": f"It is {2 * i}."} for i in range(60)]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_model(folder / "DIR")                     # a Llama that reads bytes
    for script in SCRIPTS:
        (folder / script).mkdir()
        for name in ("data", "more.smi", "mine.jsonl", "DIR"):
            (folder / script / name).symlink_to(folder / name)
    return folder


@pytest.mark.parametrize("script, words", [(script, words) for script in SCRIPTS for words in trainings(script)],
                         ids=lambda part: part if isinstance(part, str) else " ".join(part)[:80])
def test_training_commands_run_in_small(script, words, home, monkeypatch, capsys):
    if script == "train_adapter.py" and "DIR" in words:
        pytest.skip("needs the folder of a diffusion model: test_run_adapter.py trains on one")
    monkeypatch.chdir(home / script)
    out = Path("out")
    for name in re.findall(r"out/(\w[\w-]*)/", " ".join(words)):           # tutor0, tutor1 are other seeds of tutor
        if not (out / name).exists():
            seed = next(run for run in out.iterdir() if run.name.strip("012") == name.strip("012"))
            (out / name).symlink_to(seed.resolve())
    words = ["tiny" if word == "gpt2" else word for word in words]          # 124 M parameters, for a dry run
    words = words if "--run_name" in words else [*words, "--run_name", f"run{len([*out.glob('*')])}"]
    run = out / words[words.index("--run_name") + 1]
    shutil.rmtree(run, ignore_errors=True)
    SCRIPTS[script].main([*words, "--dry_run", "--device", "cpu"])
    assert (run / "best.safetensors").exists() and "skipped 0" in capsys.readouterr().out


def test_break_them_yourself(tmp_path):
    """README's snippet, run as it stands, says what README says, lines of the sources included."""
    text = (ROOT / "README.md").read_text().split("Break them yourself.")[1]
    snippet, told = (re.search(fence, text, re.S)[1] for fence in (r"```python\n(.*?)```", r"```\n(step 7.*?)```"))
    (tmp_path / "broken.py").write_text(snippet)
    done = subprocess.run([sys.executable, "broken.py"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    said = [line.rstrip() for line in (done.stdout + done.stderr).splitlines()]
    for line in told.splitlines():
        line = re.sub(r"(loss = \d\.\d).*", r"\1", line.split("  ...")[0].rstrip())      # digits are a machine's own
        assert any(found.startswith(line) for found in said), line


# ------------------------------------------------------------------------------------------------------- as written
NEEDS = {"eight GPUs": "nproc_per_node=8", "several nodes": "--nnodes", "a file of yours": r"FILE|FOLDER|readings\.csv",
         "a prepared set": r"--data_name|--name (moses|mine)", "ten minutes": r"bench\.py"}


@pytest.mark.slow
def test_readme_as_written(tmp_path):
    """All commands of README.md, in their order, in a fresh copy, but for those that need what is named above."""
    home = tmp_path / "finite"
    shutil.copytree(ROOT, home, ignore=lambda folder, names: {name for name in names if name in (
        "out", ".git", "__pycache__") or Path(folder).parent.name == "data" and Path(folder, name).is_dir()})
    ran = 0
    for command in commands([ROOT / "README.md"], ()):
        missing = [need for need, pattern in NEEDS.items() if re.search(pattern, command)]
        print(command, f": needs {', '.join(missing)}" if missing else "", flush=True)
        if not missing:
            words = [sys.executable if word == "python" else word for word in shlex.split(command)]
            done = subprocess.run(words, cwd=home, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            ran += 1
    assert ran >= 10
