"""What each data set needs: progress, checksums, a folder that appears only when it is complete, the demo set."""
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from common import agree, fail, rank

def with_progress(items, total, unit):
    """Yield the items and say how far it is: redrawn in place on a terminal, else a line every ten seconds."""
    terminal, start = sys.stdout.isatty(), time.monotonic()
    shown = start
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown >= (0.2 if terminal else 10):
            shown, rate = now, done / (now - start)
            text = f"{done:,} of {total:,} {unit}, {rate:,.0f}/s, {max(total - done, 0) / rate:,.0f} s left"
            print(f"{text}\033[K" if terminal else text, end="\r" if terminal else "\n", flush=True)
    if terminal:
        print("\033[K", end="", flush=True)

def file_sha256(path):
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror or error}")

@contextlib.contextmanager
def whole_folder(folder):
    """Fill the folder that this gives; it is then renamed into place. What goes wrong leaves an older one alone."""
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{age}") for age in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except OSError as error:
        fail(f"cannot write {folder}: {error}")
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

def demo_set(kind, name, device, *flags):
    """The folder data/kind/name, for a script that was given no data; rank 0 builds it if it is not there yet."""
    folder = Path(__file__).parent / kind / name
    if rank() == 0 and not (folder / "meta.json").exists():
        command = [sys.executable, str(folder.with_name("prepare.py")), "--demo", "--name", name, *flags]
        print(f"no --data_dir, so building a demo set, once: python {' '.join(command[1:])}", flush=True)
        if subprocess.run(command).returncode:
            fail("the demo set could not be built, see above")
    agree(0, device)                                # the others wait
    return folder

def given_file(flag, *paths):
    """fail() unless each path is empty, or is there and no pickle."""
    for path in paths:
        if path.endswith((".pt", ".pth", ".bin", ".ckpt", ".pkl")):
            fail(f"--{flag} {path}: a pickle may run code when it is loaded. Its tensors become safetensors by: python "
                 f"-c \"import torch, safetensors.torch as s; s.save_file(torch.load('{path}', weights_only=True), "
                 "'weights.safetensors')\"; whether they fit is another question: the script names what does not")
        if path and not Path(path).is_file():
            fail(f"--{flag} {path}: no such file" + "; a run has out/NAME/best.safetensors" * (flag != "smiles"))

def or_fail(function, *arguments):
    """What the function returns; a ValueError of it ends in fail()."""
    try:
        return function(*arguments)
    except ValueError as error:
        fail(error)
