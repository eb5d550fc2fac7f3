"""What the tests of train_distill.py share: a small set of text, tiny models, runs in this process and in real ones.

Not a test file. As a program it is train_distill.py with faults, as python tests/distill_tools.py FAULT:STEPS:RANK
[flags]: see arm().
"""
import json
import math
import os
import re
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import train_distill  # noqa: E402
from data.text import prepare, report  # noqa: E402
from data.text.tokens import Bytes  # noqa: E402
from edl_tools import assert_same_bits, flags_of, last_checkpoint, metrics_of, weights_of  # noqa: E402
from runs import read_file, steps_in  # noqa: E402

SMALL = train_distill.DEMO | train_distill.DRY | dict(              # whole, so that no process fills in a preset
    device="cpu", student="tiny", teacher_size="tiny", teacher_epochs=0, compare=0, learning_rate=3e-3, log_every=0,
    eval_every=0, save_every=0, dry_run=True, train_rows=0, temperature=3.0, alpha=0.5)
LLAMA = {"model_type": "llama", "vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "hidden_act": "silu",
         "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "vocab_size": 257, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512}

SCRIPTS = ["train_distill.py", "common.py", "runs.py", "autopsy.py", "data/files.py", "data/weights.py",
           *[f"data/text/{path.name}" for path in (ROOT / "data/text").glob("*.py")]]
BLOCKED = ["matplotlib", "scipy", "pandas", "sklearn", "drain3", "transformers", "tokenizers", "wandb", "rdkit", "trl"]


# ------------------------------------------------------------------------------------------------------- in process
def build_set(folder, limit=120, seed=0):
    """A demo set of bytes in folder/set -> its path; of 120 rows 106 train, 7 val and 7 test, 124 to 165 positions."""
    words = f"--demo --limit {limit} --seed {seed} --name set --out_dir".split()
    return prepare.main([*words, str(folder)])


def write_set(folder, rows, tokenizer=None, name="mine"):
    """A set of (instruction, response), two thirds train's and then val's, or of whole dicts -> folder/name."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row if isinstance(row, dict) else
            dict(instruction=row[0], response=row[1], split="train" if 3 * i < 2 * len(rows) else "val")
            for i, row in enumerate(rows)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--tokenizer", str(tokenizer)] if tokenizer else []
    return prepare.main(["--input", str(folder / f"{name}.jsonl"), "--name", name, "--out_dir", str(folder), *more])


def random_model(raw=LLAMA, seed=0, std=0.3, **fields):
    """A Decoder in eval mode whose weights are far from their start: no flat logits, no bias of 0."""
    torch.manual_seed(seed)
    model = train_distill.Decoder(raw, **fields).eval()
    for p in model.parameters():
        nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, std)
    return model


def write_model(folder, raw=LLAMA, seed=0, std=0.3, tokenizer=Bytes()):
    """A random model as a Hugging Face folder -> its path."""
    train_distill.save_hf(random_model(raw, seed, std), folder)
    tokenizer.save(folder)
    return folder


def small_config(**fields):
    """A Config of SMALL and the fields, after settle()."""
    config = train_distill.Config(**SMALL | {name: str(x) if isinstance(x, Path) else x for name, x in fields.items()})
    return train_distill.settle(config, {*vars(config)} - ({"dtype"} - {*fields}))


def fields_of(data_dir, folder, fields):
    return dict(data_dir=str(data_dir), out_dir=str(Path(folder).parent), run_name=Path(folder).name) | fields


def with_signals(function, *arguments):
    """The function's answer; signal handlers are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return function(*arguments)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_here(data_dir, folder, **fields):
    """Train in this process -> train()'s answer; without phase and teacher a chain, see run_training."""
    return with_signals(train_distill.train, small_config(**fields_of(data_dir, folder, fields)))


def main_here(*words):
    """main() in this process."""
    with_signals(train_distill.main, [str(word) for word in words])


def main_stops(data_dir, folder, **fields):
    """main() of a run that must end with code 3."""
    with pytest.raises(SystemExit) as stop:
        main_here(*training("", folder, data_dir=data_dir, **fields)[1:])
    assert stop.value.code == 3


def quicken(patch):
    """No pictures and no texts, each of which takes as long as a hundred steps; real processes have them all."""
    patch.setattr(train_distill.Run, "curves", lambda run: None)
    patch.setattr(report, "completions", lambda *_, **__: None)
    patch.setattr(report, "draw_comparison", lambda *_: None)


# ----------------------------------------------------------------------------------------------------- what runs leave
def strict(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def rows_of(folder, split="train"):
    return [row for row in metrics_of(folder) if row["split"] == split]


ROWS = ["test CE", "test perplexity", "val CE", "test KL to the teacher", "choices acc", "choices acc_norm"]


def table_in(text):
    return re.findall(rf"^(?:{'|'.join(ROWS)})  .*$", text, re.M)


def assert_same_run(folder, straight, steps=20):
    """Two finished runs ended alike, bit for bit, and folder's metrics have no step twice."""
    step, tensors, body = last_checkpoint(folder)
    _, wanted, wanted_body = last_checkpoint(straight)
    assert step == steps and not list(folder.glob("*.tmp.*"))
    assert_same_bits(tensors, wanted)
    assert (body["best"], body["guard"]) == (wanted_body["best"], wanted_body["guard"])
    assert_same_bits(read_file(folder / "best.safetensors")[0], read_file(straight / "best.safetensors")[0])
    rows, wanted_rows = metrics_of(folder), metrics_of(straight)
    assert max(Counter((row["step"], row["split"]) for row in rows).values()) == 1
    assert [row for row in rows if row["split"] == "val"] == [row for row in wanted_rows if row["split"] == "val"]
    one, other = (strict(path / "eval.json") | {"run_name": "", "teacher": ""} for path in (folder, straight))
    assert one == other


# ------------------------------------------------------------------------------- in the two processes of the fixture
def run_in_pair(data_dir, folder, fault, fields):
    """A whole run inside the pair -> ("done", answer) or ("stopped", message), and the checksum of the weights."""
    patch = pytest.MonkeyPatch()
    quicken(patch)
    seen = arm(fault, patch)
    try:
        config = small_config(**fields_of(data_dir, folder, fields))
        answer = "done", train_distill.run_training(config, torch.device("cpu"))
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
    fields = dict(out_dir=folder.parent, run_name=folder.name) | SMALL | fields
    return [*([Path(__file__), fault] if fault else [ROOT / "train_distill.py"]), *flags_of(**fields)]


def arm(faults, patch):
    """Let train_distill meet faults, "kind:steps:rank kind:steps:rank:-teacher" -> [model] later. steps: as in
    --skip_steps; a fourth part: only in a run whose name ends so, as a chain has several. patch: a pytest.MonkeyPatch.

    kill, term, int: the process gets that signal in the middle of the step; kill-in-save: SIGKILL when the checkpoint
    of the step is written but not yet renamed; nan-loss; inf-loss; nan-gradient: behind a finite loss; nan-weight: in
    the embedding; nan-student, nan-teacher: in what that model says of one position, before the loss; nan-kd, nan-ce:
    in that part and the loss."""
    compute_loss, ask_teacher, seen = train_distill.compute_loss, train_distill.ask_teacher, []
    forward, replace = train_distill.Decoder.forward, os.replace
    signals = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
    parts = [[*fault.split(":"), ""][:4] for fault in faults.split()]
    wanted = [(kind, steps_in(steps), int(rank), run) for kind, steps, rank, run in parts]
    now = set()                                     # faults of the step that is under way

    def faulty_loss(model, batch, step, config):
        if not torch.is_grad_enabled():
            return compute_loss(model, batch, step, config)
        now.clear()
        now.update(kind for kind, steps, rank, run in wanted
                   if step in steps and common.rank() == rank and config.run_name.endswith(run))
        inside = train_distill.unwrap(model)
        seen[:] = [inside]
        for kind in now & {*signals}:
            os.kill(os.getpid(), signals[kind])
        if "nan-weight" in now:
            inside.token.weight.data[40, 3] = math.nan
        loss, parts = compute_loss(model, batch, step, config)
        if "nan-gradient" in now:
            loss.register_hook(lambda gradient: gradient * math.nan)
        if now & {"nan-loss", "inf-loss"}:
            loss = loss * (math.nan if "nan-loss" in now else math.inf)
        for name in [name for name in ("kd", "ce") if f"nan-{name}" in now and name in parts]:
            loss, parts = loss * math.nan, parts | {name: parts[name] * math.nan}
        now.clear()
        return loss, parts

    def faulty_answer(batch, config):
        taught = ask_teacher(batch, config)
        if "nan-teacher" in now and taught:
            for name in {"h", "log_p", "teacher_logits"} & {*taught}:
                taught[name] = taught[name].index_fill(0, torch.tensor([0]), math.nan)
        return taught

    def faulty_forward(model, tokens, head=True, past=None):
        y = forward(model, tokens, head, past)
        return y * math.nan if "nan-student" in now and seen and model is seen[0] else y

    def faulty_replace(source, target):
        if any(f"step-{step:08d}" in str(target) and common.rank() == rank and Path(target).parent.name.endswith(run)
               for kind, steps, rank, run in wanted for step in steps if kind == "kill-in-save"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    patch.setattr(train_distill, "compute_loss", faulty_loss)
    patch.setattr(train_distill, "ask_teacher", faulty_answer)
    patch.setattr(train_distill.Decoder, "forward", faulty_forward)
    patch.setattr(os, "replace", faulty_replace)
    return seen


if __name__ == "__main__":
    last_model = arm(sys.argv[1], pytest.MonkeyPatch())
    try:
        train_distill.main(sys.argv[2:])
    finally:
        print(f"weights {weights_of(last_model[0]):08x}" if last_model else "no step was taken", flush=True)
