"""Text: instructions and responses, or a demo set built offline -> the tokens that train_distill.py reads.

    python data/text/prepare.py --demo                                       # 6,800 questions on formulas of physics
    python data/text/prepare.py --input FILE --name mine                     # JSON lines; tokens are bytes
    python data/text/prepare.py --input FILE --name mine --tokenizer FOLDER  # that of a Hugging Face model

A row is {"instruction": ..., "response": ...}, perhaps with "split"; with "options" and "answer" it is a question of
multiple choice, and the response may be left out. The file may be gzipped. A row that is wrong is left out, counted by
reason and listed with its line number in rejected.jsonl. data/README.md describes the arrays.
"""
import argparse
import hashlib
import itertools
import json
import os
import random
import re
import sys
import time
from array import array
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import fail  # noqa: E402
from data.files import file_sha256, or_fail, raw_lines, whole_folder, with_progress  # noqa: E402
from data.text.demo import DEMO_RECIPE, DEMO_ROWS, MOST_ROWS, demo_rows  # noqa: E402
from data.text.tokens import END, PROMPT, Bytes, load_tokenizer  # noqa: E402

CHUNK = 1_000                                      # rows that are encoded at once
MAX_LINE = 1_000_000                               # bytes
FORMAT = 1                                         # raised when other arrays come out, to build old sets anew
SPLITS = ["train", "val", "test"]
SYNONYMS = {"training": "train", "validation": "val", "valid": "val"}
KEYS = {"instruction", "response", "split", "options", "answer"}
ARRAYS = ("tokens", "offsets", "prompt", "split")

class Row(NamedTuple):
    line: int
    instruction: str
    response: str
    split: str                                     # "": by hash
    options: list[str]                             # [] unless it is a question of multiple choice
    answer: int                                    # index into the options
    identity: int                                  # 64 bits of the instruction's hash
    unknown: list[str]                             # keys that mean nothing here

class Bad(NamedTuple):
    line: int
    reason: str
    text: str
    detail: str = ""

class Encoded(NamedTuple):
    ids: list[int]
    n_prompt: int                                  # how many of them, from the first, are the prompt's
    notes: list[str]                               # what is strange but kept

# ------------------------------------------------------------------------------------------------------------ one line
def read_row(number, line):
    """Line (bytes) -> Row or Bad."""
    text = line[:400].decode("utf-8", "backslashreplace")

    def bad(reason, detail=""):
        return Bad(number, reason, text, detail)
    if len(line) > MAX_LINE:
        return bad(f"line over {MAX_LINE:,} bytes")
    if not line.strip():
        return bad("empty line")
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return bad("not UTF-8", f"byte {error.start + 1}")
    except (ValueError, RecursionError) as error:   # a number of 5,000 digits, or 10,000 brackets
        return bad("not JSON", str(error))
    if not isinstance(row, dict):
        return bad("not a JSON object", f"a {type(row).__name__}")
    options, answer = row.get("options"), row.get("answer")
    if options is None and answer is not None:
        return bad("answer without options")
    if options is not None:
        if not isinstance(options, list) or len(options) < 2 or not all(
                isinstance(option, str) and option.strip() for option in options) or len(set(options)) < len(options):
            return bad("options are not two or more different texts")
        answer = options.index(answer) if isinstance(answer, str) and answer in options else answer
        if type(answer) is not int or not 0 <= answer < len(options):
            return bad("answer is no option", repr(answer) if "answer" in row else "there is none")
        row = row if row.get("response") is not None else row | {"response": options[answer]}
    for key in ("instruction", "response"):
        if row.get(key) is None:
            return bad(f"no {key}")
        if not isinstance(row[key], str):
            return bad(f"{key} is no text", f"a {type(row[key]).__name__}")
        if not row[key].strip():
            return bad(f"empty {key}")
    split = row.get("split")
    name = split.strip().lower() if isinstance(split, str) else split
    name = "" if split is None else SYNONYMS.get(name, name) if isinstance(name, str) else name
    if name not in ("", *SPLITS) or split == "":
        return bad("unknown split", repr(split))
    try:
        "".join([row["instruction"], row["response"], *(options or [])]).encode()
    except UnicodeEncodeError as error:             # "\ud800" is JSON, but no text
        return bad("half of a surrogate pair", f"character {error.start + 1}")
    identity = int.from_bytes(hashlib.sha1(row["instruction"].encode()).digest()[:8], "big")
    return Row(number, row["instruction"], row["response"], name, options or [], answer if options else -1, identity,
               sorted(set(row) - KEYS))

def read_rows(path, chosen):
    """Yield Row or Bad for the chosen line numbers of a file; None chooses all. A second row that says the same is
    Bad."""
    first_line = {}
    for number, line in raw_lines(path, MAX_LINE):
        if chosen is not None and number not in chosen:
            continue
        row = read_row(number, line)
        if isinstance(row, Row):
            key = hashlib.sha1(json.dumps([row.instruction, row.response]).encode()).digest()
            first = first_line.setdefault(key, number)
            if first != number:
                row = Bad(number, "duplicate", row.instruction, f"first on line {first:,}")
        yield row

# ------------------------------------------------------------------------------------------------------------- encoding
def encode(rows, tokenizer):
    """list of Row -> list of Encoded or Bad. The prompt ends where the first token begins that has any character of
    the response, by the offsets in the encoding of the whole text."""
    texts = [PROMPT.format(row.instruction) + row.response + END for row in rows]
    found = []
    try:
        encoded = tokenizer.encode_batch(texts)
    except ValueError as error:                     # which row it was, it does not say
        return ([result for row in rows for result in encode([row], tokenizer)] if len(rows) > 1 else
                [Bad(rows[0].line, "tokenizer error", rows[0].instruction, str(error))])
    decoded = tokenizer.decode_batch([[i for i, (start, end) in zip(*pair) if end > start] for pair in encoded])
    for row, text, (ids, offsets), back in zip(rows, texts, encoded, decoded):
        begin = len(PROMPT.format(row.instruction))
        n_prompt = next((k for k, (start, end) in enumerate(offsets) if end > begin and end > start), len(ids))
        spans = [span for span in offsets if span[1] > span[0]]
        if spans != sorted(spans) or text[spans[-1][1] if spans else 0:].strip():
            found.append(Bad(row.line, "offsets do not fit the text", row.instruction,
                             "the tokenizer moves or drops characters"))
            continue
        if n_prompt == len(ids) or offsets[n_prompt][0] >= begin + len(row.response):
            found.append(Bad(row.line, "response has no tokens", row.instruction, repr(row.response[:40])))
            continue
        inside = {i for i, (start, end) in zip(ids, offsets) if end > start}
        notes = [note for note, true in (
            ("a token is half prompt, half response", offsets[n_prompt][0] < begin),
            ("special token in the text", not inside.isdisjoint(tokenizer.specials)),
            ("unknown token", tokenizer.unknown in inside),
            ("decodes to another text", back.strip() != text.strip())) if true]
        ids = ids + [tokenizer.eos] * (tokenizer.eos is not None and ids[-1] != tokenizer.eos)
        found.append(Encoded(ids, n_prompt, notes))
    return found

def assign_splits(rows):
    """list of Row -> (uint8 array of indices into SPLITS, how many rows were moved from train to an empty val)."""
    names = [row.split or ("train" if row.identity < 0.90 * 2**64 else "val" if row.identity < 0.95 * 2**64 else "test")
             for row in rows]
    moved = 0
    if "val" not in names:
        train = sorted({row.identity for row, name in zip(rows, names) if name == "train"})
        cut = set(train[:max(1, round(0.05 * len(train)))])          # whole instructions, those of lowest hash
        for i, row in enumerate(rows):
            if names[i] == "train" and row.identity in cut:
                names[i], moved = "val", moved + 1
    return np.array([SPLITS.index(name) for name in names], np.uint8), moved

# ------------------------------------------------------------------------------------------------------------- writing
def collect(path, chosen, total, tokenizer):
    """-> (list of Row, tokens, offsets, prompt: arrays as they are written, Counter of notes, list of Bad)."""
    kept, rejected, notes = [], [], Counter()
    tokens, offsets, prompt = array("i"), array("q", [0]), array("i")
    rows = with_progress(read_rows(path, chosen), total, "rows")
    while chunk := list(itertools.islice(rows, CHUNK)):
        rejected += [row for row in chunk if isinstance(row, Bad)]
        chunk = [row for row in chunk if isinstance(row, Row)]
        for row, result in zip(chunk, encode(chunk, tokenizer)):
            if isinstance(result, Bad):
                rejected.append(result)
                continue
            kept.append(row._replace(response="", instruction=row.instruction if row.options else ""))   # in the tokens
            tokens.extend(result.ids)
            offsets.append(len(tokens))
            prompt.append(result.n_prompt)
            notes.update(result.notes)
            notes.update(f"unknown key {key[:40].encode(errors='backslashreplace').decode()}" for key in row.unknown)
    dtype = np.uint16 if tokenizer.size <= 2**16 else np.int32
    return (kept, np.array(tokens, np.int32).astype(dtype), np.array(offsets, np.int64), np.array(prompt, np.int32),
            notes, sorted(rejected))

def build(path, source, tokenizer, settings, options, folder):
    """The rows of a file -> the finished data set in `folder`, and a summary on the terminal."""
    start = time.monotonic()
    total, chosen = sum(1 for _ in raw_lines(path, MAX_LINE)), None
    if not options.demo and options.limit and options.limit < total:
        chosen = set(random.Random(options.seed).sample(range(1, total + 1), options.limit))
    rows, tokens, offsets, prompt, notes, rejected = collect(path, chosen, len(chosen or range(total)), tokenizer)
    split, moved = assign_splits(rows)
    reasons = Counter(row.reason for row in rejected)
    by_split = dict(zip(SPLITS, np.bincount(split, minlength=len(SPLITS)).tolist()))
    if not (by_split["train"] and by_split["val"]):
        hint = "" if rows else '; expected lines such as {"instruction": "...", "response": "..."}'
        told = ", ".join(f"{reason} {n:,}" for reason, n in reasons.most_common(4)) or "none"
        fail(f"{source}: of {len(rows) + len(rejected):,} rows {len(rows):,} are left, which is not enough for train "
             f"and val; rejected: {told}{hint}")
    places = {}
    for row, k in zip(rows, split.tolist()):
        places[row.identity] = places.get(row.identity, 0) | 1 << k
    if twice := sum(mask not in (1, 2, 4) for mask in places.values()):
        notes["instruction in two splits"] = twice
    questions = [{"split": SPLITS[k], "prompt": PROMPT.format(row.instruction), "options": row.options,
                  "answer": row.answer} for row, k in zip(rows, split.tolist()) if row.options and k]
    sizes = np.diff(offsets)
    counts = {"read": len(rows) + len(rejected), "kept": len(rows), "by_split": by_split, "val_cut_from_train": moved,
              "tokens": len(tokens), "response_tokens": int(len(tokens) - prompt.sum(dtype=np.int64)),
              "questions": dict(Counter(question["split"] for question in questions)),
              "rejected": dict(sorted(reasons.items())), "notes": dict(sorted(notes.items()))}
    meta = {"format": FORMAT, "name": folder.name, "source": source, "sha256": options.sha256, "options": settings,
            "counts": counts, "splits": SPLITS, "longest": int(sizes.max()),
            "mean_tokens": round(float(sizes.mean()), 4), "template": PROMPT.format("{i}") + "{r}" + END,
            "tokenizer": tokenizer.name, "size": tokenizer.size, "fingerprint": tokenizer.fingerprint,
            "eos": tokenizer.eos}
    with whole_folder(folder) as new:
        for name, values in zip(ARRAYS, (tokens, offsets, prompt, split)):
            np.save(new / f"{name}.npy", values, allow_pickle=False)
        write_lines(new / "mc.jsonl", questions)
        write_lines(new / "rejected.jsonl", (
            {"line": row.line, "reason": row.reason, "text": row.text[:80]}
            | ({"detail": row.detail[:200]} if row.detail else {}) for row in rejected))
        tokenizer.save(new)
        (new / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    summary(folder, meta, time.monotonic() - start)

def write_lines(path, entries):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)

def summary(folder, meta, seconds):
    def listed(numbers):
        shown = sorted(numbers.items(), key=lambda pair: -pair[1])[:12]      # a file may have a thousand unknown keys
        return (", ".join(f"{name} {n:,}" for name, n in shown) or "none") + " ..." * (len(numbers) > len(shown))

    counts = meta["counts"]
    print(f"{folder}: {counts['read']:,} rows read, {counts['kept']:,} kept in {seconds:.1f} s")
    print("  splits      " + ", ".join(f"{name} {n:,}" for name, n in counts["by_split"].items()))
    if counts["val_cut_from_train"]:
        print(f"              val was empty: {counts['val_cut_from_train']:,} train rows moved there, chosen by hash")
    print(f"  questions   {listed(counts['questions'])}")
    print(f"  rejected    {listed(counts['rejected'])}")
    print(f"  notes       {listed(counts['notes'])}")
    print(f"  tokenizer   {meta['tokenizer']}, {meta['size']:,} ids, "
          + ("no end of text" if meta["eos"] is None else f"end of text {meta['eos']}"))
    print(f"  tokens      {counts['tokens']:,}, of which {counts['response_tokens']:,} in responses; "
          f"{meta['mean_tokens']:.1f} a row in the mean, {meta['longest']:,} at most")

def already_there(folder, sha256, settings, tokenizer):
    """True if the folder holds a whole set of this source and these options; fails if it holds something else."""
    if not folder.exists():
        return False
    if not (folder / "meta.json").is_file():
        fail(f"{folder} exists and is no data set: move it away or choose another --name")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        same = meta["format"] == FORMAT and meta["options"] == settings and sha256 in (None, meta["sha256"])
        same = same and load_tokenizer(folder).fingerprint == tokenizer.fingerprint
        names = [f"{name}.npy" for name in ARRAYS] + ["mc.jsonl", "rejected.jsonl"]
        return same and all((folder / name).is_file() for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):     # damaged: built again
        return False

# ---------------------------------------------------------------------------------------------------------------- main
def build_demo(tokenizer, settings, options, folder):
    raw = folder.with_name(f".{folder.name}.{os.getpid()}.jsonl")
    try:
        raw.parent.mkdir(parents=True, exist_ok=True)
        write_lines(raw, demo_rows(options.limit or DEMO_ROWS, options.seed))
        options.sha256 = file_sha256(raw)           # and now as if the file had come from elsewhere
        build(raw, "demo", tokenizer, settings, options, folder)
    except OSError as error:
        fail(f"cannot write {raw}: {error}")
    finally:
        raw.unlink(missing_ok=True)

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (see --help)")
    source = parser.add_mutually_exclusive_group(required=True)

    def flag(name, help, group=parser, **kind):
        group.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), help=help, **kind)

    flag("input", "JSON lines, also gzipped", source, type=Path)
    flag("demo", f"build a set offline ({DEMO_ROWS:,} rows, or --limit)", source, action="store_true")
    flag("name", "the data set is written to <out_dir>/<name>/ (default with --demo: demo)")
    flag("tokenizer", "Hugging Face folder with a tokenizer.json; without one in it: bytes (default: bytes)", type=Path)
    flag("limit", "use a random sample of so many lines (seeded)", type=int)
    flag("seed", "of --limit and --demo (default: 0)", type=int, default=0)
    flag("out_dir", "(default: the folder of this script)", type=Path, default=Path(__file__).resolve().parent)
    flag("force", "build the set even if it is already there", action="store_true")
    options = parser.parse_args(argv)

    options.name = options.name or ("demo" if options.demo else "")
    if not re.fullmatch(r"\w[\w.+-]*", options.name):
        fail(f"--name {options.name or '(missing)'}: give the data set a plain folder name, such as --name mine")
    least, most = (3, MOST_ROWS) if options.demo else (1, 10**9)
    if options.limit is not None and not least <= options.limit <= most:
        fail(f"--limit {options.limit}: must be a number from {least} to {most}")
    return options

def main(argv=None):
    """Build the data set that the command line asks for -> its folder (Path)."""
    options = parse(argv)
    folder = options.out_dir / options.name
    if options.input and not options.input.is_file():
        fail(f"--input: there is no file {options.input}, but --demo builds a set")
    tokenizer = or_fail(load_tokenizer, options.tokenizer) if options.tokenizer else Bytes()
    settings = {"limit": options.limit, "seed": options.seed, "tokenizer": tokenizer.fingerprint, "eos": tokenizer.eos}
    settings |= {"demo": DEMO_RECIPE} if options.demo else {}
    options.sha256 = options.input and file_sha256(options.input)
    if already_there(folder, options.sha256, settings, tokenizer) and not options.force:
        print(f"{folder}: already there (--force builds it again)")
        return folder
    try:
        if options.demo:
            build_demo(tokenizer, settings, options, folder)
        else:
            build(options.input, options.input.name, tokenizer, settings, options, folder)
    except KeyboardInterrupt:
        print("interrupted: nothing was changed", file=sys.stderr)
        raise SystemExit(130) from None
    return folder

if __name__ == "__main__":
    main()
