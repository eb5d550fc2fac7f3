"""What the tests of train_edl.py share: hand-made data, tiny models, runs in this process and in real ones.

Not a test file. As a program it is train_edl.py with a fault, python tests/edl_tools.py FAULT:STEP:RANK [flags]: see
arm().
"""
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import train_edl  # noqa: E402
from data.molecules.report import strings  # noqa: E402
from runs import checkpoints, read_file  # noqa: E402

SMALL = train_edl.CPU | train_edl.DRY | dict(                       # whole, so that no process fills in a preset
    device="cpu", n_layer=2, n_head=2, n_embd=32, batch_size=8, dropout=0.0, learning_rate=2e-3, min_lr=0.1,
    warmup_steps=2, log_every=0, eval_every=0, save_every=0, dry_run=True)      # a dry run draws only 32 samples


# ------------------------------------------------------------------------------------------------------- in process
def build_demo(folder):
    """The --dry_run demo set (500 molecules) in folder/demo500 -> its path."""
    from data.molecules import prepare
    return prepare.main(["--demo", "--limit", "500", "--name", "demo500", "--out_dir", str(folder), "--workers", "1"])



def smiles_of(data, row):
    return strings(data, np.array([row]))[0]

def write_data(folder, train, val, test=(), vocab=None):
    """A prepared set of SMILES strings, as data/README.md describes it -> its path."""
    rows = [train_edl.tokenize(smiles) for smiles in (*train, *val, *test)]
    vocab = vocab or [*train_edl.SPECIALS, *sorted({token for row in rows for token in row})]
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "tokens.npy", np.array([vocab.index(token) for row in rows for token in row], np.uint8))
    np.save(folder / "offsets.npy", np.cumsum([0, *map(len, rows)]).astype(np.int64))
    np.save(folder / "split.npy", np.repeat(np.arange(3, dtype=np.uint8), [len(train), len(val), len(test)]))
    meta = {"vocab": vocab, "splits": ["train", "val", "test"], "canonical": False}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def small_config(**fields):
    return train_edl.Config(**SMALL | fields)


def small_model(vocab, block, seed=0, scale=10.0, **fields):
    """A random model in eval mode; its weights are `scale` times as wide as at the start, its logits far from flat."""
    torch.manual_seed(seed)
    model = train_edl.MolGPT(small_config(**fields), vocab, block)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model.eval()


def train_here(data_dir, folder, **fields):
    """Train in this process -> train()'s answer; the run is in folder. Signal handlers are put back."""
    fields = dict(data_dir=str(data_dir), out_dir=str(folder.parent), run_name=folder.name) | fields
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return train_edl.train(small_config(**fields))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_checkpoint(folder):
    """(step, tensors, body) of the newest checkpoint."""
    tensors, body = read_file(checkpoints(folder)[-1])
    return body["step"], tensors, body


def assert_same_bits(tensors, others):
    assert tensors.keys() == others.keys()
    different = [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])]
    assert not different, f"{len(different)} of {len(tensors)} tensors differ, as {different[:3]}"


def metrics_of(folder):
    """metrics.jsonl as a list of dicts; anything that is not strict JSON raises."""
    def refuse(word):
        raise ValueError(f"{word} is no JSON")
    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------- in real processes
@dataclasses.dataclass
class Ended:
    code: int
    out: str
    err: str


def flags_of(**fields):
    """dict(n_layer=2, use_edl=False) -> ['--n_layer', '2', '--no_use_edl']"""
    words = {True: "--{}", False: "--no_{}"}
    return [text for name, value in fields.items() for text in (
        [words[value].format(name)] if isinstance(value, bool) else [f"--{name}", str(value)])]


def start(*command, cwd, **env):
    """A process of this Python, one thread, no GPU."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"} | env
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def wait(*processes, timeout=180):
    """-> what each process said, in their order. One that hangs fails the test, and none is left behind."""
    try:
        ends = [process.communicate(timeout=timeout) for process in processes]
        return [Ended(process.returncode, *end) for process, end in zip(processes, ends)]
    finally:
        for process in processes:
            if process.poll() is None:              # torchrun ends its workers itself when it is told to
                process.terminate()
                process.communicate(timeout=60)


def training(fault, folder, **fields):
    """The command that trains into folder, with a fault as arm() knows it or '' for the plain script."""
    fields = dict(out_dir=folder.parent, run_name=folder.name) | SMALL | fields
    return [*([Path(__file__), fault] if fault else [ROOT / "train_edl.py"]), *flags_of(**fields)]


def start_pair(fault, folder, training=training, **fields):
    """Two processes of one run, as torchrun would start them: but each one's exit code can be seen."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [start(*training(fault, folder, **fields), cwd=folder.parent, RANK=str(rank), LOCAL_RANK=str(rank),
                  WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(2)]


def finite(tensors):
    return all(tensor.isfinite().all() for tensor in tensors.values())


def one_line(error):
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error, error
    return error


def weights_of(model):
    """One number over every bit of the parameters."""
    value = 0
    for parameter in model.parameters():
        value = zlib.crc32(parameter.detach().contiguous().numpy().tobytes(), value)
    return value


def arm(fault, at, on):
    """Let train_edl meet a fault at step `at` on rank `on`; after a restart by torchrun it does not come back.

    kill, term, int: the process gets that signal in the middle of the step; kill-in-save: SIGKILL when the checkpoint
    of step `at` is written but not yet renamed; nan-loss; nan-weight; no-targets: the batch's count is 0."""
    compute_loss, get_batch, replace, seen = train_edl.compute_loss, train_edl.get_batch, os.replace, []
    numbers = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}

    def here(step):
        return step == at and train_edl.rank() == on and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def faulty_loss(model, batch, step, config):
        model_inside = train_edl.unwrap(model)
        seen[:] = [model_inside]
        if here(step) and fault in numbers:
            os.kill(os.getpid(), numbers[fault])
        if here(step) and fault == "nan-weight":
            model_inside.token.weight.data[4, 3] = float("nan")
        loss, parts = compute_loss(model, batch, step, config)
        return (loss * float("nan"), parts) if here(step) and fault == "nan-loss" else (loss, parts)

    def faulty_batch(data, split, step, config, micro=0):
        batch = get_batch(data, split, step, config, micro)
        return batch | {"count": 0} if here(step) and fault == "no-targets" else batch

    def faulty_replace(source, target):
        if fault == "kill-in-save" and f"step-{at:08d}" in str(target):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    train_edl.compute_loss, train_edl.get_batch, os.replace = faulty_loss, faulty_batch, faulty_replace
    return seen


if __name__ == "__main__":
    kind, when, where = sys.argv[1].split(":")
    last_model = arm(kind, int(when), int(where))
    try:
        train_edl.main(sys.argv[2:])
    finally:
        print(f"weights {weights_of(last_model[0]):08x}" if last_model else "no step was taken", flush=True)
