"""What a teacher says at the supervised positions of the train split, asked once and kept on disk beside the data."""
import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import agree, autocast, fail, pick_dtype, rank, world_size
from data.files import file_sha256

KINDS = {"top": np.int32, "log_p": np.float32, "tail": np.float32, "teacher_ce": np.float32,
         "teacher_logits": np.float32}


def key_of(config, data):
    """All that decides what the teacher would say, and where."""
    files = sorted(path for path in Path(config.teacher).iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
    rows = hashlib.sha256()
    for array in (data.table.cpu().numpy(), data.start, data.length, data.first, data.rows["train"]):
        rows.update(np.ascontiguousarray(array).data)
    return {"teacher": {path.name: file_sha256(path) for path in files}, "rows": rows.hexdigest(), "vocab": data.vocab,
            "K": min(config.cache_teacher, data.vocab), "temperature": config.temperature,
            "teacher_dtype": config.teacher_dtype, "dtype": str(pick_dtype(config.dtype, data.table.device)[0])}


@torch.no_grad()
def cached_teacher(script, config, data):
    """-> what Data.cache wants: begin (rows,) int64, where a row's positions are, and memory-mapped arrays of them, the
    likeliest tokens top (n, K) with log_p (n, K) at T, tail (n,), the log of all others' sum at T, teacher_ce (n,), its
    cross-entropy at T = 1, and teacher_logits (n,), its largest |logit|. The ranks share the work. A folder that was
    made with something else ends in fail()."""
    rows, device, dtype = np.sort(data.rows["train"]), data.table.device, pick_dtype(config.dtype, data.table.device)[0]
    K, begin = min(config.cache_teacher, data.vocab), np.zeros(len(data.length), np.int64)
    begin[rows] = np.cumsum(data.asked[rows]) - data.asked[rows]
    few = [str(config.train_rows), str(config.seed)] * (config.train_rows > 0)      # each seed's are others
    folder = data.folder / "-".join(["teacher", *Path(config.teacher).resolve().parts[-2:], str(K), *few])
    there = (folder / "meta.json").exists()
    new = folder.with_name(f".{folder.name}.{agree(os.getpid(), device)}.new")      # others may be at it too
    if rank() == 0:
        key = key_of(config, data)
        found = json.loads((folder / "meta.json").read_text()) if there else key
        if wrong := [name for name in key if found.get(name) != key[name]]:
            fail(f"--cache_teacher: {folder} is stale, made with another {', '.join(wrong)}; delete it to ask again")
    if not agree(there, device):
        n = int(data.asked[rows].sum())
        if rank() == 0:
            need = n * (8 * K + 12)
            if need > (free := shutil.disk_usage(data.folder).free):
                fail(f"--cache_teacher {K}: {n:,} positions need {need / 1e9:.1f} GB, and {data.folder} has "
                     f"{free / 1e9:.1f}")
            print(f"asking the teacher about {n:,} positions, {need / 1e6:,.0f} MB", flush=True)
            shutil.rmtree(new, ignore_errors=True)  # in a container numbers of processes come again
            new.mkdir()
            for name, kind in KINDS.items():
                shape = (n, K) if name in ("top", "log_p") else (n,)
                np.lib.format.open_memmap(new / f"{name}.npy", "w+", kind, shape).flush()
        agree(0, device)
        out = {name: np.load(new / f"{name}.npy", mmap_mode="r+") for name in KINDS}
        teacher = script.frozen_teacher(config.teacher, config.teacher_dtype, str(device))
        start = shown = time.monotonic()
        batches = script.packed(data, rows)
        for done, some in enumerate(batches):
            if done % world_size() == rank():
                batch = script.get_rows(data, some)
                with autocast(device, dtype), script.as_held(teacher):
                    h = teacher(batch["tokens"], False).flatten(0, 1)[batch["place"]]
                    spot = np.concatenate([np.arange(begin[row], begin[row] + data.asked[row]) for row in some])
                    for i in range(0, len(spot), size := max(1, (1 << 22) // data.vocab)):
                        logits = script.widen(F.linear(h[i:i + size], teacher.head_weight[:data.vocab]))
                        for name, values in told(script, logits, batch["targets"][i:i + size], config, K).items():
                            out[name][spot[i:i + size]] = values.cpu().numpy()
            if rank() == 0 and time.monotonic() - shown > 10:
                shown = time.monotonic()
                print(f"teacher asked: {done + 1:,} of {len(batches):,} batches, {shown - start:,.0f} s", flush=True)
        for array in out.values():
            array.flush()
        agree(0, device)                            # all ranks have written
        if rank() == 0:
            (new / "meta.json").write_text(json.dumps(key))
            for old in folder.parent.glob(f".{folder.name}.*.new"):
                if old != new and not alive(old):   # left over by a process that was killed
                    shutil.rmtree(old, ignore_errors=True)
            if (folder / "meta.json").exists():     # another run was faster
                shutil.rmtree(new)
            else:
                shutil.rmtree(folder, ignore_errors=True)
                new.rename(folder)
            print(f"the teacher's {K} likeliest tokens at {n:,} positions: {folder}", flush=True)
        agree(0, device)
    return {"begin": begin} | {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in KINDS}


def alive(folder):
    """Is the process at work that makes this .new folder?"""
    try:
        os.kill(int(folder.name.split(".")[-2]), 0)
    except (ValueError, ProcessLookupError):
        return False
    except OSError:                                 # somebody else's
        pass
    return True


def told(script, logits, targets, config, K):
    """Logits (C, V) float32 -> name -> what is kept of each position."""
    log_p = (logits / config.temperature).log_softmax(1)
    best, top = log_p.topk(K, 1)
    return {"top": top, "log_p": best, "tail": log_p.scatter(1, top, -math.inf).logsumexp(1),
            "teacher_ce": F.cross_entropy(logits, targets, reduction="none"),
            "teacher_logits": script.largest(logits)}
