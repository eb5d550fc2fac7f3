"""What the tests of train_adapter.py share: a few scenes, latents of a diffusers fixture, runs in this process and in
real ones.

Not a test file. As a program it is train_adapter.py with faults, as python tests/adapter_tools.py FAULT:STEPS:RANK
[flags]: see arm().
"""
import json
import math
import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import train_adapter  # noqa: E402
from data.scenes import prepare, report  # noqa: E402
from data.scenes.diffusers_folder import part_sha256  # noqa: E402
from edl_tools import assert_same_bits, flags_of, last_checkpoint, metrics_of, weights_of  # noqa: E402
from runs import read_file, steps_in  # noqa: E402

SD1 = ROOT / "tests/fixtures/scenes/sd1"            # a UNet of 4 channels and texts of width 24, epsilon
SMALL = train_adapter.DRY | dict(                   # whole, so that no process fills in a preset
    device="cpu", width=16, depth=1, patch=8, warmup_steps=2, learning_rate=5e-3, box_mask=True, rms_norm=True,
    log_every=0, eval_every=0, save_every=0, dry_run=True)

SCRIPTS = ["train_adapter.py", "common.py", "runs.py", "autopsy.py", "data/files.py", "data/weights.py",
           *[f"data/scenes/{path.name}" for path in (ROOT / "data/scenes").glob("*.py")]]
BLOCKED = ["matplotlib", "scipy", "pandas", "sklearn", "drain3", "transformers", "tokenizers", "wandb", "diffusers",
           "accelerate", "torchvision"]


# ------------------------------------------------------------------------------------------------------- in process
def build_set(folder, limit=312):
    """A demo set in folder/set -> its path; of 312 rows 120 train, 96 val and 96 test."""
    prepare.main(["--demo", "--limit", str(limit), "--name", "set", "--out_dir", str(folder)])
    return folder / "set"


def write_latents(folder, n=24, channels=4, context=24, phrase=24, vae="", seed=0):
    """A set of kind latents as data/README.md describes it, drawn at random, 2 slots -> its path; of 24 rows 16 train,
    4 val and 4 test. vae: sha256 of the VAE that made them; empty: that of SD1."""
    rng, slots, texts = np.random.default_rng(seed), 2, 7
    corner, side = rng.random((n, slots, 2)) * 0.5, 0.2 + rng.random((n, slots, 2)) * 0.3
    objects = np.arange(slots) < rng.integers(1, slots + 1, (n, 1))
    boxes = np.where(objects[..., None], np.concatenate([corner, corner + side], -1), 0)
    arrays = {"latents": rng.standard_normal((n, channels, 8, 8)).astype(np.float16),
              "boxes": boxes.astype(np.float32),
              "phrase": np.where(objects, rng.integers(0, 5, (n, slots)), -1).astype(np.int32),
              "caption": rng.integers(1, texts, n).astype(np.int32),
              "split": np.clip(np.arange(n) % 6 - 3, 0, 2).astype(np.uint8),
              "contexts": rng.standard_normal((texts, 6, context)).astype(np.float16),
              "phrases": rng.standard_normal((5, phrase)).astype(np.float16)}
    folder.mkdir(parents=True)
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values, allow_pickle=False)
    (folder / "meta.json").write_text(json.dumps({
        "format": 1, "kind": "latents", "name": folder.name, "source": f"seed {seed}", "sha256": "", "options": {},
        "counts": {}, "splits": ["train", "val", "test"], "slots": slots, "size": [64, 64], "scaling_factor": 0.18215,
        "base": {"vae": vae or part_sha256(SD1, "vae"), "embeddings": True}, "caption_tokens": 6,
        "arrays": sorted(arrays)}))
    return folder


def small_config(**fields):
    """A Config of SMALL and the fields, after settle()."""
    fields = SMALL | {name: str(x) if isinstance(x, Path) else x for name, x in fields.items()}
    return train_adapter.settle(train_adapter.Config(**fields), {*fields})


def fields_of(folder, fields):
    return dict(out_dir=str(Path(folder).parent), run_name=Path(folder).name) | fields


def with_signals(function, *arguments):
    """The function's answer; signal handlers are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return function(*arguments)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_here(folder, **fields):
    """Train in this process -> train()'s answer; without phase and base a chain, see run_training."""
    return with_signals(train_adapter.train, small_config(**fields_of(folder, fields)))


def main_here(*words):
    """main() in this process."""
    with_signals(train_adapter.main, [str(word) for word in words])


def main_stops(folder, **fields):
    """main() of a run that must end with code 3."""
    with pytest.raises(SystemExit) as stop:
        main_here(*training("", folder, **fields)[1:])
    assert stop.value.code == 3


def quicken(patch):
    """No pictures and no table, which take as long as a hundred steps; real processes have them all."""
    patch.setattr(train_adapter.Run, "curves", lambda run: None)
    patch.setattr(report, "gate_curves", lambda run: None)
    patch.setattr(report, "pairs", lambda *_, **__: {})
    patch.setattr(report, "table", lambda *_, **__: {})


# ----------------------------------------------------------------------------------------------------- what runs leave
def strict(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def rows_of(folder, split="train"):
    return [row for row in metrics_of(folder) if row["split"] == split]


def assert_same_run(folder, straight, steps=20):
    """Two finished runs ended alike, bit for bit, and folder's metrics have no step twice."""
    step, tensors, body = last_checkpoint(folder)
    _, wanted, wanted_body = last_checkpoint(straight)
    assert step == steps and not list(folder.glob("*.tmp.*"))
    assert_same_bits(tensors, wanted)
    assert (body["best"], body["guard"]) == (wanted_body["best"], wanted_body["guard"])
    assert_same_bits(read_file(folder / "best.safetensors")[0], read_file(straight / "best.safetensors")[0])
    assert [(path / "final.safetensors").exists() for path in (folder, straight)] in ([True] * 2, [False] * 2)
    if (straight / "final.safetensors").exists():
        assert_same_bits(*(load_file(path / "final.safetensors") for path in (folder, straight)))
    rows, wanted_rows = metrics_of(folder), metrics_of(straight)
    assert max(Counter((row["step"], row["split"]) for row in rows).values()) == 1
    assert [row for row in rows if row["split"] == "val"] == [row for row in wanted_rows if row["split"] == "val"]


# ------------------------------------------------------------------------------- in the two processes of the fixture
def run_in_pair(folder, fault, fields):
    """A whole run inside the pair -> ("done", answer) or ("stopped", message), and the checksum of the weights."""
    patch = pytest.MonkeyPatch()
    quicken(patch)
    seen = arm(fault, patch)
    try:
        answer = "done", train_adapter.run_training(small_config(**fields_of(folder, fields)), torch.device("cpu"))
    except common.NonFinite as error:
        answer = "stopped", str(error)
    finally:
        patch.undo()
    return *answer, weights_of(seen[0])


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
    fields = SMALL | fields_of(folder, fields)
    return [*([Path(__file__), fault] if fault else [ROOT / "train_adapter.py"]), *flags_of(**fields)]


def arm(faults, patch):
    """Let train_adapter meet faults, "kind:steps:rank kind:steps:rank:-base" -> [model] later. steps: as in
    --skip_steps; a fourth part: only in a run whose name ends so, as a chain has two. patch: a pytest.MonkeyPatch.

    kill, term, int: the process gets that signal in the middle of the step; kill-in-save: SIGKILL when the checkpoint
    of the step is written but not yet renamed; nan-loss; inf-loss; nan-gradient: behind a finite loss; nan-input: in
    the picture or latents of the batch's first row; nan-output: in what the model says; nan-weight: in what is trained
    last. From step 1 on: the check before the first step takes a loss of step 0."""
    compute_loss, get_batch, replace, seen = train_adapter.compute_loss, train_adapter.get_batch, os.replace, []
    models = {kind: kind.forward for kind in (train_adapter.Adapter, train_adapter.ToyBase)}
    signals = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
    parts = [[*fault.split(":"), ""][:4] for fault in faults.split()]
    wanted = [(kind, steps_in(steps), int(rank), run) for kind, steps, rank, run in parts]
    now = set()                                     # faults of the loss that is under way

    def here(step, config):
        return {kind for kind, steps, rank, run in wanted
                if step in steps and common.rank() == rank and config.run_name.endswith(run)}

    def faulty_loss(model, batch, step, config):
        now.clear()
        now.update(here(step, config))
        inside = train_adapter.unwrap(model)
        seen[:] = [inside]
        for kind in now & {*signals}:
            os.kill(os.getpid(), signals[kind])
        if "nan-weight" in now:
            [*inside.parameters()][-1].data[..., 0] = math.nan
        loss, parts = compute_loss(model, batch, step, config)
        if "nan-gradient" in now:
            loss.register_hook(lambda gradient: gradient * math.nan)
        if now & {"nan-loss", "inf-loss"}:
            loss = loss * (math.nan if "nan-loss" in now else math.inf)
        now.clear()
        return loss, parts

    def faulty_batch(data, split, step, config, micro=0):
        batch = get_batch(data, split, step, config, micro)
        if "nan-input" in here(step, config):
            batch["clean"] = batch["clean"].index_fill(0, torch.tensor([0]), math.nan)
        return batch

    def faulty_forward(model, *given):
        out = models[type(model)](model, *given)
        return out * math.nan if "nan-output" in now and seen and model is seen[0] else out

    def faulty_replace(source, target):
        if any(f"step-{step:08d}" in str(target) and common.rank() == rank and Path(target).parent.name.endswith(run)
               for kind, steps, rank, run in wanted for step in steps if kind == "kill-in-save"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    patch.setattr(train_adapter, "compute_loss", faulty_loss)
    patch.setattr(train_adapter, "get_batch", faulty_batch)
    for kind in models:
        patch.setattr(kind, "forward", faulty_forward)
    patch.setattr(os, "replace", faulty_replace)
    return seen


if __name__ == "__main__":
    last_model = arm(sys.argv[1], pytest.MonkeyPatch())
    try:
        train_adapter.main(sys.argv[2:])
    finally:
        print(f"weights {weights_of(last_model[0]):08x}" if last_model else "no step was taken", flush=True)
