"""Runs that are killed for an hour: python -m pytest tests -m slow; SOAK_MINUTES, 60 if not set, are for all scripts.

Each trains a tiny model, with NaN and Inf at random steps, in one process and in two, and is killed at random moments,
again and again, until nothing is left to do. What it leaves must be what a run that nobody touched leaves, bit for bit.
"""
import contextlib
import os
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from types import SimpleNamespace

import adapter_tools
import conftest
import distill_tools
import edl_tools
import logbert_tools
import pytest
import soak_tools
import student_tools
from edl_tools import assert_same_bits, finite, flags_of, last_checkpoint, metrics_of, start, start_pair, wait

from runs import checkpoints, read_file

MINUTES = float(os.environ.get("SOAK_MINUTES", 60))
LEAST = 5 if MINUTES >= 60 else 2                   # kills of a script in one process, and as many in two
PATIENCE = 1800                                     # seconds; only what hangs takes so long
RUN = dict(save_every=10, eval_every=100, log_every=25, keep=3, max_skips=99, on_nonfinite="skip")
# what makes the data in a folder, the flags, the steps of each phase, the phases' folders
SCRIPTS = {
    "train_edl": (edl_tools.build_demo, edl_tools.SMALL | dict(dropout=0.2), 600, ["run"]),
    "train_student": (student_tools.build_set, student_tools.SMALL, 300, ["run-teacher", "run"]),
    "train_distill": (distill_tools.build_set, distill_tools.SMALL | dict(batch_size=4, dropout=0.1), 200,
                      ["run-teacher", "run"]),
    "train_adapter": (adapter_tools.build_set, adapter_tools.SMALL | dict(base_steps=300), 300, ["run-base", "run"]),
    "train_logbert": (lambda folder: logbert_tools.write_lives(folder / "set", times=True), logbert_tools.SMALL | dict(
        dropout=0.2, use_gaps=True, vhm_weight=0.1, vhm_ramp_steps=400), 600, ["run"])}


# ----------------------------------------------------------------------------------------------------------- processes
def begin(script, faults, folder, world, fields, again=False):
    """The processes of a run, under way. A last phase that has a checkpoint needs no other flags to go on."""
    fields = {} if again and checkpoints(folder) else fields | RUN
    words = flags_of(**fields | dict(run_name=folder.name, out_dir=folder.parent, resume=again))
    command = [soak_tools.__file__, script, faults, *words]
    folder.parent.mkdir(exist_ok=True)
    return [start(*command, cwd=folder.parent)] if world == 1 else start_pair("", folder, lambda *_, **__: command)


def finish(processes):
    ends = wait(*processes, timeout=PATIENCE)
    assert [end.code for end in ends] == [0] * len(ends), "\n".join(end.err[-3000:] for end in ends)


def pause(process, seconds):
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=seconds)        # a full pipe would stop it


def strike(processes, home, seconds, chance):
    """SIGKILL to one process or to all, one time in four right after the start, else after the first save, a random
    time later, half of the time while a file is being written; the others are told to stop, as torchrun does -> False
    if one of them has come to its end before."""
    def saved():
        return sum(log.read_text().count("\nsaved ") for log in home.glob("*/train.log"))
    early, old, until = chance.random() < 0.25, saved(), time.monotonic() + PATIENCE
    while not early and saved() == old and all(process.poll() is None for process in processes):
        pause(processes[0], 0.05)
        assert time.monotonic() < until, "it hangs"
    pause(processes[0], chance.uniform(0, 0.3 * seconds))
    old, until = {*home.glob("*/*.tmp.*")}, time.monotonic() + chance.choice([0, 5])
    while time.monotonic() < until and not {*home.glob("*/*.tmp.*")} - old:
        time.sleep(0.0005)                          # a file is written in milliseconds
    if any(process.poll() is not None for process in processes):
        return False
    for process in chance.choice([processes, *[[process] for process in processes]]):
        process.kill()
    for process in processes:
        process.terminate()
    wait(*processes, timeout=PATIENCE)
    return True


# ----------------------------------------------------------------------------------------------------- what runs leave
def assert_nothing_is_lost(folder):
    """Of the saves that train.log tells of, each is there or as many as stay are newer; files are whole, values finite;
    each start was from what was saved last."""
    there, best = checkpoints(folder), folder / "best.safetensors"
    for path in [*there, *[best] * best.exists()]:
        assert finite(read_file(path)[0]), path     # read_file raises at a wrong checksum
    assert not list(folder.glob("*.nonfinite"))
    log = (folder / "train.log").read_text() if (folder / "train.log").exists() else ""
    last = 0
    for said, begun in re.findall(r"^(?:saved .*/step-(\d+)\.safetensors|\S+: [\d,]+ parameters, .* steps"
                                  r"(?:, resumed at ([\d,]+))?)$", log, re.M):
        step = int((said or begun).replace(",", "") or 0)
        assert step >= last, f"{folder}: saved at {last}, and then a start from {step}"
        assert not said or folder / f"step-{said}.safetensors" in there or \
            sum(path.name > f"step-{said}.safetensors" for path in there) >= RUN["keep"], f"{folder}: {step} is lost"
        last = step


def measured(folder):
    return [{name: x for name, x in row.items() if not name.endswith("_per_s")} for row in metrics_of(folder)]


def assert_same_run(folder, straight, steps):
    (step, tensors, body), (_, wanted, wanted_body) = last_checkpoint(folder), last_checkpoint(straight)
    assert step == steps and any(name.startswith("opt.") for name in tensors)
    assert_same_bits(tensors, wanted)
    assert (body["best"], body["guard"]) == (wanted_body["best"], wanted_body["guard"])
    assert_same_bits(read_file(folder / "best.safetensors")[0], read_file(straight / "best.safetensors")[0])
    assert measured(folder) == measured(straight)
    assert [path.name for path in checkpoints(folder)] == [path.name for path in checkpoints(straight)]
    assert not [path for path in folder.glob("*.tmp.*") if path.name[0] != "."]


# ------------------------------------------------------------------------------------------------------------ the soak
@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_killed_at_any_moment_loses_nothing(script, tmp_path, capsys):
    make, fields, steps, phases = SCRIPTS[script]
    began, count = time.monotonic(), Counter()
    (tmp_path / "data").mkdir()
    fields = fields | dict(data_dir=make(tmp_path / "data"), max_steps=steps)
    for world in (1, 2):
        chance, kills, straight = random.Random(f"{script} {world}"), 0, tmp_path / f"straight{world}"
        at = chance.sample(range(1, steps), 2 * len(soak_tools.KINDS))
        faults = " ".join(f"{kind}:{step}:{chance.randrange(world)}" for kind, step in zip(2 * soak_tools.KINDS, at))
        since = time.monotonic()
        finish(begin(script, faults, straight / "run", world, fields))
        for phase in phases:
            assert_nothing_is_lost(straight / phase)
            assert sum(last_checkpoint(straight / phase)[2]["guard"]["skips"].values()) == len(at)
        seconds, until = time.monotonic() - since, began + 60 * MINUTES / len(SCRIPTS) * world / 2
        while time.monotonic() < until or kills < LEAST:
            home = tmp_path / f"killed{world}"
            processes = begin(script, faults, home / "run", world, fields)
            while (time.monotonic() < until or kills < LEAST) and strike(processes, home, seconds, chance):
                for phase in phases:
                    assert_nothing_is_lost(home / phase)
                kills += 1
                count["resumes"] += any(checkpoints(home / phase) for phase in phases)
                processes = begin(script, faults, home / "run", world, fields, again=True)
            finish(processes)
            for phase in phases:
                assert_nothing_is_lost(home / phase)
                assert_same_run(home / phase, straight / phase, steps)
            count.update(runs=1, steps=steps * len(phases), skipped=len(at) * len(phases))
            shutil.rmtree(home)
        count["kills"] += kills
    with capsys.disabled():
        print(f"\n{script}.py: {count['kills']} kills, {count['resumes']} resumes, {count['runs']} runs to the end of "
              f"{count['steps']:,} steps, {count['skipped']} skipped, {time.monotonic() - began:.0f} s")


@pytest.mark.parametrize("words,left", [("", ["quick"]), ("slow", ["slow", "quick"]), ("not slow", ["slow", "quick"])])
def test_slow_tests_are_left_out_unless_m_speaks_of_them(words, left):
    items = [SimpleNamespace(name=name, get_closest_marker=[name].__contains__) for name in ("slow", "quick")]
    out = []
    config = SimpleNamespace(option=SimpleNamespace(markexpr=words),
                             hook=SimpleNamespace(pytest_deselected=lambda items: out.extend(items)))
    conftest.pytest_collection_modifyitems(config, items)
    assert [item.name for item in items] == left and len(items) + len(out) == 2
