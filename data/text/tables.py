"""Prepared text as tensors: all rows in one table of token ids, batches of any rows of it."""
import functools
import json
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import cast, fail, rank
from data.files import check_ids, check_rows, demo_set, file_sha256, made_set, or_fail, reading
from data.text.hf import SIZES, read_config, shape_of
from data.text.tokens import Bytes, load_tokenizer, shared_size

TAUGHT = ("top", "log_p", "tail", "teacher_ce", "teacher_logits")       # what a cache holds of each position


@dataclass(eq=False)
class Data:
    """All rows as one table of token ids: instruction, response, end. Position t of a row asks for its token t + 1."""
    table: torch.Tensor  # (all tokens,) int32, on the device
    start: np.ndarray  # (rows,) int64, where a row begins in the table
    length: np.ndarray  # (rows,) int64, positions of a row
    first: np.ndarray  # (rows,) int64, the first position that is supervised
    rows: dict  # split -> (rows of the split,) int64
    vocab: int  # ids that both tokenizers can emit
    tokenizer: object  # the student's
    folder: Path  # where the data lie
    key: int = 0  # checksum of all that decides which rows these are
    cache: dict | None = None  # what the teacher said at the train split's supervised positions, see cached_teacher

    @functools.cached_property
    def asked(self):
        """Supervised positions of each row, (rows,) int64."""
        return self.length - self.first

    def keep(self, n, seed):
        """Leave n of the training rows, drawn with the seed."""
        self.rows["train"] = np.sort(np.random.default_rng(seed).permutation(self.rows["train"])[:n])


def find_folder(config, holders, device):
    """The prepared folder that data_dir means: the demo set for none, a JSON-lines file's own, which rank 0 makes once
    for each content and tokenizer."""
    folder = Path(config.data_dir)
    if not config.data_dir:
        return demo_set("text", "demo300" if config.dry_run else "demo", device, *["--limit", "300"] * config.dry_run)
    if not os.path.exists(folder):
        fail(f"--data_dir {folder}: no such file of JSON lines, and no prepared folder")
    if folder.is_dir():
        return folder
    tokenizer = or_fail(load_tokenizer, Path(holders[0])) if holders else None
    key = f"{file_sha256(folder)[:8]}-{tokenizer.fingerprint[:8] if holders else 'bytes'}"
    name = (re.sub(r"\W", "_", folder.name.split(".")[0]) or "rows") + f"-{key}"
    more = ["--tokenizer", holders[0]] if holders else []
    return made_set("text", name, device, "--input", config.data_dir, *more)


def read_folder(folder, max_length, train_on_prompt, device):
    """A folder by prepare.py -> Data. What is wrong with it ends in fail()."""
    with reading(folder, "text/prepare.py --input FILE"):
        meta = json.loads((folder / "meta.json").read_text())
        tokens, offsets, prompt, split = (np.load(folder / f"{name}.npy") for name in (
            "tokens", "offsets", "prompt", "split"))
        check_rows(offsets, tokens, n=len(split), most=2 ** 31)
        check_ids("prompt", prompt, 2 ** 31, shape=split.shape)
        check_ids("split", split, len(meta["splits"]))
        tokenizer, splits = load_tokenizer(folder), [*meta["splits"]]
    length = np.minimum(np.diff(offsets), max_length) - 1
    first = np.maximum(prompt.astype(np.int64) - 1, 0)
    full, cut = first >= length, np.diff(offsets) > max_length
    if rank() == 0 and (full.any() or cut.any()):
        print(f"{folder}: {full.sum():,} rows left out, their prompts fill --max_length {max_length}; "
              f"{(cut & ~full).sum():,} rows cut to it", flush=True)
    rows = {name: np.flatnonzero((split == i) & ~full) for i, name in enumerate(splits)}
    if not len(rows.get("train", [])) or not len(rows.get("val", [])):
        raise ValueError(f"--data_dir {folder}: no rows in the train or the val split")
    first, key = np.zeros_like(first) if train_on_prompt else first, 0
    for array in (tokens, offsets, length, first, split):
        key = zlib.crc32(np.ascontiguousarray(array).data, key)
    return Data(torch.from_numpy(tokens.astype(np.int32)).to(device), offsets[:-1], length, first, rows,
                tokenizer.size, tokenizer, folder, key)


def shortest(config, say):
    """max_length, or less if one of the models to come has fewer positions; one that is not there ends in fail()."""
    used = ["teacher"] * bool(config.teacher) + ["student"] * (config.phase != "teacher")
    least = config.max_length
    for flag in used + ["teacher_size"] * (not config.teacher):
        name = getattr(config, flag)
        if not os.path.isdir(name) and (flag == "teacher" or name not in SIZES):
            fail(f"--{flag} {name}: no such folder" + f", and not one of {', '.join(SIZES)}" * (flag != "teacher"))
        raw = or_fail(read_config, Path(name)) if os.path.isdir(name) else SIZES[name] | {"vocab_size": 1}
        positions = or_fail(shape_of, raw, name).n_positions
        if positions < least:
            least = positions
            say(f"--max_length {least}: {name} has no more positions")
    return least


def share(data, holders, model):
    """Cut data.vocab to the ids that all have: the tokenizers of the data and of the Hugging Face folders in holders,
    of which `model` is what is trained. Raises ValueError where ids mean different tokens or have no embedding."""
    for holder in holders:
        other, rows = load_tokenizer(Path(holder)), shape_of(read_config(Path(holder)), holder).vocab_size
        if holder == model and other.fingerprint != data.tokenizer.fingerprint:
            raise ValueError(f"--data_dir {data.folder} was prepared with another tokenizer than {holder}'s: make it "
                             f"again with python data/text/prepare.py --input FILE --name N --tokenizer {holder}")
        if isinstance(data.tokenizer, Bytes) != isinstance(other, Bytes):
            raise ValueError(f"{data.folder} and {holder} have different tokenizers: one is of bytes; give rows for "
                             "it, as --data_path FILE.jsonl")
        data.vocab = min(data.vocab, shared_size(other, data.tokenizer, (holder, str(data.folder))))
        if rows < data.vocab:
            raise ValueError(f"{holder} has {rows:,} rows of embeddings, its tokenizer {data.vocab:,} ids")
    if (most := int(data.table.max())) >= data.vocab:
        raise ValueError(f"--data_dir {data.folder}: id {most:,} is in its rows, the models share {data.vocab:,} ids")
    return data


def get_rows(data, rows, length=0, everywhere=False):
    """-> dict on the table's device: tokens (B, T) int64, T the longest row's positions or `length`; place (N,) int64,
    which of the B T positions are supervised (everywhere: all of them, for batchmean); targets (N,) int64; asked (N,)
    float32, 1 if supervised; and, where the teacher is cached, what it said at each of the N."""
    device, start, end, first = data.table.device, data.start[rows], data.length[rows], data.first[rows]
    T = max(length, int(end.max()))
    begin, stop = (0 * first, 0 * end + T) if everywhere else (first, end)
    n = stop - begin
    row = np.repeat(np.arange(len(rows)), n)        # of each of the N; all this on the host, so that nothing waits
    t = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n) + begin[row]
    asked = ((t >= first[row]) & (t < end[row])).astype(np.float32)
    token = start[:, None] + np.minimum(np.arange(T), end[:, None] - 1)         # pads repeat a row's last token
    target = start[row] + np.minimum(t, end[row] - 1) + 1
    batch = {"tokens": data.table[cast(token, device)].long(), "targets": data.table[cast(target, device)].long(),
             "place": cast(row * T + t, device), "asked": cast(asked, device)}
    if data.cache and not everywhere:
        spot = data.cache["begin"][rows][row] + t - first[row]
        batch |= {name: cast(data.cache[name][spot], device) for name in TAUGHT}
    return batch


def packed(data, rows, most=8192):
    """Rows in batches of similar length, of at most so many positions each."""
    rows, batches = rows[np.argsort(data.length[rows], kind="stable")[::-1]], []
    while len(rows):
        n = max(1, most // int(data.length[rows[0]]))
        batches.append(rows[:n])
        rows = rows[n:]
    return batches
