"""What data sets need: lines, workers, progress, checksums, whole folders, the demo set, given files, JSON, tables."""
import contextlib
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

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

def raw_lines(path, most):
    """Yield (line number, bytes without the line end) of a plain or gzipped file, or of standard input for "-"; fails
    on damaged gzip data. Of a line at most `most` + 2 bytes are kept and the rest is skipped: an endless one costs no
    memory, and one that is too long can be told."""
    number = 0
    try:
        with sys.stdin.buffer if str(path) == "-" else open(path, "rb") as raw:
            zipped = raw.peek(2)[:2] == b"\x1f\x8b"                  # the content decides, not the name
            file = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if zipped else raw
            while line := file.readline(most + 2):
                number += 1
                rest = line
                while rest and not rest.endswith(b"\n"):
                    rest = file.readline(1 << 20)
                yield number, (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).rstrip(b"\r\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        fail(f"{path}: the gzip data is cut off or damaged after line {number:,} ({error}): get the file again")
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror or error}")

def in_order(function, jobs, workers):
    """Yield function(job) for each job, in their order, from `workers` processes; few jobs are under way at once."""
    if workers == 1:
        yield from map(function, jobs)
        return
    method = "fork" if sys.platform == "linux" else None             # elsewhere the platform's own default
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method),
                               signal.signal, (signal.SIGINT, signal.SIG_IGN))      # Ctrl-C is for the main process
    waiting = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(function, job))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        fail("a worker process died (out of memory?): try again with --workers 1")
    finally:
        pool.shutdown(cancel_futures=True)

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

@contextlib.contextmanager
def whole_file(path):
    """Write into the text file that this gives; it then takes the place of `path`. What goes wrong leaves an older one
    alone. A link or what is no file, as /dev/stdout, is written to as it stands."""
    direct = path.is_symlink() or path.exists() and not path.is_file()
    new = path if direct else path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(new, "w", newline="", encoding="utf-8") as file:
            yield file
        new.replace(path)                           # a path that is its own replacement stays
    except OSError as error:
        fail(f"--out {path} cannot be written: {error.strerror or error}")
    finally:
        if not direct:
            new.unlink(missing_ok=True)

def demo_set(kind, name, device, *flags):
    """The folder data/kind/name, for a script that was given no data; rank 0 builds it if it is not there yet."""
    folder = Path(__file__).parent / kind / name
    there = (folder / "meta.json").exists()
    return made_set(kind, name, device, "--demo", *flags, why="no --data_dir, so building a demo set, once", skip=there)

def made_set(kind, name, device, *flags, why="preparing the data, once for each file and tokenizer", skip=False):
    """The folder data/kind/name, which rank 0 has prepare.py make with these flags."""
    folder = Path(__file__).parent / kind / name
    if rank() == 0 and not skip:
        command = [sys.executable, str(folder.with_name("prepare.py")), *flags, "--name", name]
        print(f"{why}: python {' '.join(command[1:])}", flush=True)
        if subprocess.run(command).returncode:
            fail("the data set could not be built, see above")
    agree(0, device)                                # the others wait
    return folder

def given_file(flag, *paths):
    """fail() unless each path is empty, or is there and no pickle."""
    for path in paths:
        if path.endswith((".pt", ".pth", ".bin", ".ckpt", ".pkl")):
            fail(f"--{flag} {path}: a pickle may run code when it is loaded. Its tensors become safetensors by: python "
                 f"-c \"import torch, safetensors.torch as s; s.save_file(torch.load('{path}', weights_only=True), "
                 "'weights.safetensors')\"; whether they fit is another question: the script names what does not")
        if path and not os.path.isfile(path):              # which is false, too, for a name that is too long
            fail(f"--{flag} {path}: no such file" + "; a run has out/NAME/best.safetensors" * (flag != "smiles"))

def write_json(path, found):
    """Strict JSON: NaN and Inf become null -> what the file holds."""
    found = json.loads(json.dumps(found), parse_constant=lambda name: None)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found

def aligned(rows):
    """Lists of str of one length -> lines; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([f"{row[0]:{widths[0]}}", *(f"{text:>{width}}" for text, width in zip(row[1:], widths[1:]))])
            for row in rows]

@contextlib.contextmanager
def reading(folder, words):
    """A prepared set is read in this; whatever is wrong with it ends in fail(), with the words that make another."""
    try:
        yield
    except Exception as error:                      # a damaged array or meta.json has any type, shape and value
        told = str(error) if isinstance(error, OSError) else repr(error)    # the one names its file, the other its kind
        fail(f"--data_dir {folder}: {told:.300}; make one with python data/{words} --name N")

def check_ids(name, array, most, least=0, shape=None):
    """ValueError unless an array, of this shape if one is given, has whole numbers from `least` to below `most`."""
    dtype, shape = array.dtype, shape or array.shape
    if dtype.kind not in "iu" or not dtype.isnative or array.shape != shape or array.size and not (
            least <= array.min() and array.max() < most):
        raise ValueError(f"{name}, {dtype} {list(array.shape)}, is not {list(shape)} numbers in {least}..{most - 1}")

def check_rows(offsets, *arrays, n=None, most=None):
    """ValueError unless offsets (n + 1,) int64 cut each array into n rows, of ids below `most` if that is given."""
    if offsets.dtype != np.int64 or offsets.ndim != 1 or n not in (None, len(offsets) - 1) or not len(offsets) or (
            offsets[0] or (np.diff(offsets) < 0).any()):
        raise ValueError("the offsets do not go from 0 upwards, one for each row")
    for array in arrays:
        if len(array) != offsets[-1]:
            raise ValueError(f"{len(array):,} entries where the offsets end at {offsets[-1]:,}")
        if most is not None:
            check_ids("an array of ids", array, most, 0, (int(offsets[-1]),))

def or_fail(function, *arguments):
    """What the function returns; a ValueError of it ends in fail()."""
    try:
        return function(*arguments)
    except ValueError as error:
        fail(error)
