"""Scenes: pictures with boxes and a caption, or the toy's drawn offline -> the arrays that train_adapter.py reads.

    python data/scenes/prepare.py --demo                                     # 24,192 pictures of circles and squares
    python data/scenes/prepare.py --base DIR --input FILE --boxes unit --name mine --images FOLDER
    python data/scenes/prepare.py --base DIR --coco instances.json --captions captions.json --images FOLDER --name coco
    python data/scenes/prepare.py --base DIR --input FILE --boxes pixels --embeddings texts.safetensors --name kolors

--base is a model in diffusers layout: its VAE makes the latents, its text encoder the embeddings, both once. A line of
--input is {"image_path": ..., "caption": ..., "objects": [{"name": ..., "bbox": [x0, y0, x1, y1]}]}, perhaps with
"split"; the file may be gzipped. A row or box that is wrong is left out, counted by reason and listed in
rejected.jsonl; no picture is ever replaced by another. data/README.md describes the arrays.
"""
import argparse
import functools
import hashlib
import json
import os
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import DTYPES, fail, launch  # noqa: E402
from data.files import (file_sha256, in_order, or_fail, raw_lines, whole_folder, with_progress,  # noqa: E402
                        write_json)
from data.scenes import demo  # noqa: E402
from data.scenes.diffusers_folder import read_config, text_shape, unet_shape, vae_shape, part_sha256  # noqa: E402
from data.scenes.encoders import load_text_encoder, load_vae  # noqa: E402
from data.scenes.pictures import SPLITS, UNITS, Bad, Row, place, plain_text, read_row  # noqa: E402
from data.scenes.tokens import load_tokenizer  # noqa: E402
from data.weights import listed, open_safetensors, whole  # noqa: E402

# n rows, N slots for boxes, S pixels a side, U captions, V phrases, L tokens, D width of the text, P of a phrase
FORMAT = 1                                          # raised when other arrays come out, to build old sets anew
MAX_LINE = 1_000_000                                # bytes
SIZES = 6                                           # numbers in a row of time_ids
HELD_OUT = demo.SPLITS["val"] + demo.SPLITS["test"]              # of the toy


# --------------------------------------------------------------------------------------------------------------- rows
def read_lines(path, chosen):
    """Yield Row or Bad for the chosen line numbers of a file; None chooses all."""
    for number, line in raw_lines(path, MAX_LINE):
        if chosen is not None and number not in chosen:
            continue
        text, reason, detail = line[:400].decode("utf-8", "backslashreplace"), "", ""
        try:
            if len(line) > MAX_LINE:
                reason = f"line over {MAX_LINE:,} bytes"
            elif not line.strip():
                reason = "empty line"
            else:
                row = read_row(number, json.loads(line.decode("utf-8")))
        except UnicodeDecodeError as error:
            reason, detail = "not UTF-8", f"byte {error.start + 1}"
        except (ValueError, RecursionError) as error:        # a number of 5,000 digits, or 10,000 brackets
            reason, detail = "broken JSON", str(error)
        yield Bad(number, -1, reason, text, detail) if reason else row


def read_coco(instances, captions):
    """COCO's two files -> (list of (image id, dict as in a line of --input), Counter of notes). ValueError.

    Crowds are left out; the caption is the one of lowest annotation id that is not blank."""
    def load(path, keys):
        def slim(entry):                            # outlines are most of the file
            entry.pop("segmentation", None)
            return entry
        found = whole(path, lambda path: json.loads(path.read_bytes(), object_hook=slim))
        for key in keys:
            if not isinstance(found, dict) or not isinstance(found.get(key), list):
                raise ValueError(f"{path} is no such file of COCO: it has no list {key!r}")
        return [found[key] for key in keys]

    def table(entries, path, *keys):
        for entry in entries:
            if not isinstance(entry, dict) or {*keys} - {*entry}:
                raise ValueError(f"{path}: {json.dumps(entry)!s:.80} lacks one of {', '.join(keys)}")
            if odd := [key for key in keys if key.endswith("id") and type(entry[key]) is not int]:
                raise ValueError(f"{path}: the {odd[0]} of {json.dumps(entry)!s:.80} is no whole number")
        return entries
    images, boxes, categories = load(instances, ("images", "annotations", "categories"))
    said, = load(captions, ("annotations",))
    names = {entry["id"]: entry["name"] for entry in table(categories, instances, "id", "name")}
    rows, notes = {}, Counter()
    for entry in table(images, instances, "id", "file_name"):
        if entry["id"] in rows:
            raise ValueError(f"{instances}: the image id {entry['id']!r:.40} is there twice")
        rows[entry["id"]] = {"image_path": entry["file_name"], "caption": None, "objects": []}
    for entry in table(boxes, instances, "id", "image_id", "category_id", "bbox"):
        if entry.get("iscrowd"):
            notes["crowd left out"] += 1
        elif entry["image_id"] not in rows:
            notes["annotation of an unknown image"] += 1
        else:
            rows[entry["image_id"]]["objects"].append({"name": names.get(entry["category_id"]), "bbox": entry["bbox"]})
    for entry in sorted(table(said, captions, "id", "image_id", "caption"), key=lambda entry: entry["id"]):
        row, text = rows.get(entry["image_id"]), entry["caption"]
        if row and row["caption"] is None and isinstance(text, str) and text.strip():
            row["caption"] = text
    return list(rows.items()), notes


def collect_rows(found):
    """Row and Bad in the order of the source -> (list of Row, list of Bad); a row that was there already is Bad."""
    rows, rejected, first = [], [], {}
    for row in found:
        if isinstance(row, Row):
            content = [os.path.normpath(row.image_path), row.caption, row.objects]
            key = hashlib.sha1(json.dumps(content).encode()).digest()
            if first.setdefault(key, row.number) == row.number:
                rows.append(row)
                continue
            row = Bad(row.number, -1, "duplicate", row.image_path, f"first at {first[key]}")
        rejected.append(row)
    return rows, rejected


def assign_splits(rows):
    """list of Row -> (uint8 array of indices into SPLITS, how many rows were moved from train to an empty val).

    A picture, however its path is spelt, is in one split, unless the source says otherwise."""
    pictures = [os.path.normpath(row.image_path) for row in rows]
    said = {path: row.split for path, row in zip(reversed(pictures), reversed(rows)) if row.split}     # the first stays
    shares = [int.from_bytes(hashlib.sha1(path.encode()).digest()[:8], "big") / 2**64 for path in pictures]
    names = [row.split or said.get(path) or ("train" if share < 0.90 else "val" if share < 0.95 else "test")
             for row, path, share in zip(rows, pictures, shares)]
    moved, train = 0, sorted({share for share, name in zip(shares, names) if name == "train"})
    if "val" not in names and len(train) > 1:
        cut = set(train[:max(1, round(0.05 * len(train)))])
        for i, share in enumerate(shares):
            if names[i] == "train" and share in cut:
                names[i], moved = "val", moved + 1
    return np.array([SPLITS.index(name) for name in names], np.uint8), moved


# --------------------------------------------------------------------------------------------------------- embeddings
class Clip:
    """The text encoder of the base: texts -> what it says of them."""

    def __init__(self, base, options):
        self.tokenizer, (folder, raw) = load_tokenizer(base), read_config(base, "text_encoder")
        shape = text_shape(raw, str(folder / "config.json"))
        self.source = f"the text encoder of {base}"
        self.sha256, self.batch, self.length = part_sha256(base, "text_encoder"), options.batch_size, min(
            self.tokenizer.length, shape.positions)
        if self.tokenizer.size > shape.vocab_size:
            raise ValueError(f"{base}: the tokenizer has ids up to {self.tokenizer.size - 1:,}, the text encoder knows "
                             f"{shape.vocab_size:,}: they are of two models")
        self.widths = {"context": shape.width, "phrases": shape.width}
        self.fingerprint = f"{self.sha256} {shape} {self.tokenizer.fingerprint}"
        self.load = functools.partial(load_text_encoder, base, DTYPES[options.dtype])

    def ready(self, device, wanted):
        """To be called first of all: ends the program if what `wanted`, {kind: list of texts}, needs is bad."""
        self.device, self.model = device, or_fail(self.load).to(device)

    def absent(self, texts):
        return []

    @torch.no_grad()
    def embed(self, texts, kind):
        """-> (float32 tensor (B, L, D) for kind context, (B, P) for phrases; how many of the texts were cut)."""
        ids, cut = self.tokenizer(texts, self.length)
        hidden, pooled = self.model(torch.from_numpy(ids).to(self.device))
        return (hidden if kind == "context" else pooled).float().cpu(), sum(cut)


class Stored:
    """Embeddings that were made elsewhere: tensors in a safetensors file, the texts in a list in FILE.json beside."""

    def __init__(self, path, options):
        texts = whole(path.with_suffix(".json"), lambda path: json.loads(path.read_bytes()))
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path.with_suffix('.json')} holds no list of texts")
        self.tensors = whole(path, open_safetensors)
        if "context" not in self.tensors:
            raise ValueError(f"{path} has no tensor context, only {listed(sorted(self.tensors)) or 'none'}")
        if "phrases" not in self.tensors:           # a mean over the context would be another thing, and nobody asked
            if "pooled" not in self.tensors:
                raise ValueError(f"{path} has neither a tensor phrases nor pooled: what stands for a phrase?")
            self.tensors["phrases"] = self.tensors["pooled"]
        for name in self.tensors.keys() & {"context", "pooled", "phrases"}:
            shape, dims = self.tensors[name][0], 3 if name == "context" else 2
            if len(shape) != dims or shape[0] != len(texts) or 0 in shape:
                raise ValueError(f"{path}: {name} is {list(shape)}, not of {dims} dimensions, the first of them "
                                 f"{len(texts):,}, as many as {path.with_suffix('.json').name} has texts")
        self.places = {plain_text(text): i for i, text in enumerate(texts)}
        if len(self.places) < len(texts):
            raise ValueError(f"{path.with_suffix('.json')}: {len(texts) - len(self.places):,} texts are there twice, "
                             "blanks aside")
        self.source = f"--embeddings {path}"
        self.sha256, self.batch, self.length = file_sha256(path), options.batch_size, self.tensors["context"][0][1]
        self.fingerprint = f"{self.sha256} {file_sha256(path.with_suffix('.json'))}"
        self.widths = {name: self.tensors[name][0][-1] for name in ("context", "phrases", "pooled")
                       if name in self.tensors}
        self.read = functools.lru_cache(maxsize=1)(lambda name: self.tensors[name][2]())

    def ready(self, device, wanted):
        for kind, texts in wanted.items():
            for _ in embedded(texts, self, kind):   # which ends the program at the first that is not finite
                pass

    def absent(self, texts):
        return [text for text in texts if text not in self.places]

    def embed(self, texts, kind):
        return self.read(kind)[[self.places[text] for text in texts]].float(), 0


def embedded(texts, encoder, kind):
    """Yield (float16 embeddings, how many of the texts were cut), batch by batch. fail() if not finite."""
    for i in with_progress(range(0, len(texts), encoder.batch), -(-len(texts) // encoder.batch), "batches of texts"):
        values, cut = encoder.embed(texts[i:i + encoder.batch], kind)
        values = values.half().numpy()
        if not (good := np.isfinite(values.reshape(len(values), -1)).all(1)).all():
            fail(f"{encoder.source}: the {kind} of {texts[i + int(good.argmin())]!r:.60} is not finite in float16")
        yield values, cut


def write_texts(path, texts, encoder, kind):
    """The embeddings of texts -> a float16 .npy; how many of the texts were cut."""
    file, total = None, 0
    for values, cut in embedded(texts, encoder, kind):
        file, total = file or Growing(path, np.float16, values.shape[1:]), total + cut
        file.append(values)
    file.close()
    return total


class Growing:
    """A .npy file whose first axis is known only at the end: numpy leaves room for that in the header. Unlike a mapped
    file it says when the disk is full."""

    def __init__(self, path, dtype, shape):
        self.file, self.dtype, self.shape, self.n = open(path, "wb+"), np.dtype(dtype), shape, 0
        self.header()
        self.begin = self.file.tell()

    def header(self):
        np.lib.format.write_array_header_1_0(self.file, {
            "descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.n, *self.shape)})

    def append(self, values):
        assert values.dtype == self.dtype and values.shape[1:] == self.shape, (values.dtype, values.shape)
        self.file.write(values.tobytes())
        self.n += len(values)

    def close(self):
        self.file.seek(0)
        self.header()
        assert self.file.tell() == self.begin, self.file.tell()
        self.file.close()


# ------------------------------------------------------------------------------------------------------------ writing
@torch.no_grad()
def encode_pictures(placed, vae, path, options, device):
    """Placed and lists of Bad -> (list of Placed without pixels, list of Bad); writes the latents of the former."""
    shape, factor = vae.shape, 2 ** (len(vae.shape.widths) - 1)
    file = Growing(path, np.float16, (shape.latent, options.size // factor, options.size // factor))
    kept, rejected, batch = [], [], []

    def flush():
        pixels = torch.from_numpy(np.stack([item.pixels for item in batch])).to(device).permute(0, 3, 1, 2)
        mean, _ = vae.encode((pixels.float() / 127.5 - 1).to(DTYPES[options.dtype]))
        latents = (mean.float() * shape.scaling_factor).half().cpu().numpy()
        good = np.isfinite(latents).all((1, 2, 3))
        file.append(latents[good])
        for item, fine in zip(batch, good):
            if fine:
                kept.append(item._replace(pixels=None))
                rejected.extend(item.bad)
            else:
                rejected.append(Bad(item.row.number, -1, "latents are not finite in float16", item.row.image_path))
        batch.clear()
    for item in placed:
        if isinstance(item, list):
            rejected += item
            continue
        batch.append(item)
        if len(batch) == options.batch_size:
            flush()
    if batch:
        flush()
    file.close()
    return kept, rejected


def layout_of(kept, slots):
    """list of Placed -> (boxes (n, N, 4) float32, phrase (n, N) int32, caption (n,) int32, captions, phrases)."""
    captions, phrases = {"": 0}, {}
    boxes, phrase = np.zeros((len(kept), slots, 4), np.float32), np.full((len(kept), slots), -1, np.int32)
    for i, item in enumerate(kept):
        captions.setdefault(item.row.caption, len(captions))
        for k, (name, box) in enumerate(item.boxes):
            boxes[i, k], phrase[i, k] = box, phrases.setdefault(name, len(phrases))
    return boxes, phrase, np.array([captions[item.row.caption] for item in kept], np.int32), [*captions], [*phrases]


def nothing_left(source, rejected, moved=""):
    reasons = Counter(bad.reason for bad in rejected).most_common(4)
    fail(f"{source}: no row is left for training{moved}; rejected: "
         + (", ".join(f"{reason} {n:,}" for reason, n in reasons) or "none")
         + next((f" ({bad.detail:.120})" for bad in rejected if bad.reason == reasons[0][0] and bad.detail), ""))


def build(rows, rejected, notes, base, encoder, settings, options, folder):
    """list of Row -> the finished data set in `folder`, and a summary on the terminal."""
    start, read, source = time.monotonic(), len(rows) + len(rejected), (options.coco or options.input).name
    wanted = {"context": [*dict.fromkeys(["", *(row.caption for row in rows)])],
              "phrases": [*dict.fromkeys(name for row in rows for _, name, _ in row.objects)]}
    texts = dict.fromkeys(wanted["context"] + wanted["phrases"])
    if absent := encoder.absent(texts):
        fail(f"--embeddings {options.embeddings.name} lacks {len(absent):,} of {len(texts):,} texts: "
             f"{listed([repr(text) for text in absent], 3)}")
    if not rows:
        nothing_left(source, rejected)
    device = launch(options.device)
    encoder.ready(device, wanted | ({"pooled": wanted["context"]} if base["added"] else {}))
    vae = or_fail(load_vae, options.base, DTYPES[options.dtype]).to(device)
    job = functools.partial(place, root=options.images or options.input.parent, options=options)
    with whole_folder(folder) as new:
        placed = with_progress(in_order(job, rows, min(options.workers, len(rows))), len(rows), "pictures")
        kept, bad = encode_pictures(placed, vae, new / "latents.npy", options, device)
        rejected = sorted(rejected + bad)
        split, moved = assign_splits([item.row for item in kept])
        by_split = dict(zip(SPLITS, np.bincount(split, minlength=len(SPLITS)).tolist()))
        if not by_split["train"]:
            nothing_left(source, rejected, f" ({len(kept):,} for val and test)" if kept else "")
        boxes, phrase, caption, captions, phrases = layout_of(kept, options.slots)
        arrays = {"boxes": boxes, "phrase": phrase, "caption": caption, "split": split}
        if base["added"]:
            arrays["time_ids"] = np.array([item.time_ids for item in kept], np.float32)
            write_texts(new / "pooled.npy", captions, encoder, "pooled")
        for name, values in arrays.items():
            np.save(new / f"{name}.npy", values, allow_pickle=False)
        cut = {"caption": write_texts(new / "contexts.npy", captions, encoder, "context"),
               "phrase": write_texts(new / "phrases.npy", phrases, encoder, "phrases")}
        notes = notes + Counter(note for item in kept for note in item.notes) + Counter(
            {f"{what} cut to {encoder.length} tokens": n for what, n in cut.items()})
        by_reason = [Counter(bad.reason for bad in rejected if (bad.box < 0) is row) for row in (True, False)]
        counts = {"read": read, "kept": len(kept), "by_split": by_split, "val_cut_from_train": moved,
                  "boxes": int((phrase >= 0).sum()), "captions": len(captions), "phrases": len(phrases),
                  **{name: dict(sorted(table.items())) for name, table in (
                      ("rejected", by_reason[0]), ("rejected_boxes", by_reason[1]), ("notes", +notes))}}
        meta = {"format": FORMAT, "kind": "latents", "name": folder.name, "source": source, "sha256": options.sha256,
                "options": settings, "counts": counts, "splits": SPLITS, "slots": options.slots,
                "size": [options.size, options.size], "base": {
                    "vae": base["vae"], "text_encoder": encoder.sha256, "embeddings": bool(options.embeddings)},
                "scaling_factor": vae.shape.scaling_factor, "caption_tokens": encoder.length,
                "arrays": sorted(path.stem for path in new.glob("*.npy"))}
        write_json(new / "texts.json", {"captions": captions, "phrases": phrases})
        write_lines(new / "rejected.jsonl", (
            {"image" if options.coco else "line": bad.number, "reason": bad.reason, "text": bad.text[:80]}
            | ({"box": bad.box} if bad.box >= 0 else {}) | ({"detail": bad.detail[:200]} if bad.detail else {})
            for bad in rejected))
        write_lines(new / "pictures.jsonl", (
            {"row": i, "image_path": item.row.image_path, "caption": item.row.caption,
             "objects": [{"name": name, "bbox": [round(float(edge), 6) for edge in boxes[i, k]]}
                         for k, (name, _) in enumerate(item.boxes)]} for i, item in enumerate(kept)))
        write_json(new / "meta.json", meta)
    summary(folder, meta, time.monotonic() - start)


def write_lines(path, entries):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


def summary(folder, meta, seconds):
    def told(numbers):
        shown = sorted(numbers.items(), key=lambda pair: -pair[1])[:12]
        return (", ".join(f"{name} {n:,}" for name, n in shown) or "none") + " ..." * (len(numbers) > len(shown))

    counts = meta["counts"]
    print(f"{folder}: {counts['read']:,} rows read, {counts['kept']:,} kept in {seconds:.1f} s")
    print("  splits      " + ", ".join(f"{name} {n:,}" for name, n in counts["by_split"].items()))
    if counts["val_cut_from_train"]:
        print(f"              val was empty: {counts['val_cut_from_train']:,} train rows moved there, chosen by hash")
    print(f"  boxes       {counts['boxes']:,} with {counts['phrases']:,} phrases; {counts['captions']:,} captions")
    if meta["kind"] == "latents":
        print(f"  rejected    {told(counts['rejected'])}")
        print(f"  boxes       left out: {told(counts['rejected_boxes'])}")
        print(f"  notes       {told(counts['notes'])}")
    if sum(counts["rejected"].values()) > counts["read"] / 2:
        reason = max(counts["rejected"], key=counts["rejected"].get)
        print(f"most rows are left out, most often because: {reason}; see {folder / 'rejected.jsonl'}")


def already_there(folder, sha256, settings, force):
    """True if the folder holds a whole set of this source and these options. What is damaged, and a toy's set of other
    options, is built anew; latents of anything else, which may have taken hours, only with force, else this fails."""
    if not folder.exists():
        return False
    if not (folder / "meta.json").is_file():
        fail(f"{folder} exists and is no data set: move it away or choose another --name")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        found, asked = meta["options"] | {"input": meta["sha256"]}, settings | {"input": sha256}
        odd = sorted(key for key in found | asked if found.get(key) != asked.get(key))
        told = f"{meta['counts']['kept']:,} pictures of {meta['source']}"
        names = [f"{name}.npy" for name in meta["arrays"]]
        names += ["texts.json", "rejected.jsonl", "pictures.jsonl"] * (meta["kind"] == "latents")
        there = all((folder / name).is_file() for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):     # damaged: built again
        return False
    if there and odd and meta["kind"] == "latents" and not force:
        fail(f"{folder} holds {told} already (what differs: {listed(odd)}): --force replaces them, another --name "
             "keeps them")
    return there and not odd and meta.get("format") == FORMAT and not force


# --------------------------------------------------------------------------------------------------------------- main
def build_demo(settings, options, folder):
    """The toy's scenes, whose captions and phrases are ids of demo.WORDS."""
    start = time.monotonic()
    table, rows = demo.scenes((options.limit or sum(demo.SPLITS.values())) - HELD_OUT)
    n, present = len(table["labels"]), table["present"] > 0
    split = np.concatenate([np.full(len(rows[name]), SPLITS.index(name), np.uint8) for name in SPLITS])
    empty = np.zeros((1, demo.LENGTH), np.int64)
    empty[0, :2] = demo.ID["<start>"], demo.ID["<end>"]
    phrases = [[demo.ID[word] for word in ("<start>", "a", colour, shape, "<end>")]
               for colour in demo.COLOURS for shape in demo.SHAPES]
    arrays = {"labels": table["labels"], "colours": table["colours"], "kinds": table["kinds"], "split": split,
              "boxes": np.where(present[..., None], table["boxes"], np.float32(0)),
              "phrase": np.where(present, table["colours"] * len(demo.SHAPES) + table["kinds"], -1).astype(np.int32),
              "caption": np.arange(1, n + 1, dtype=np.int32),
              "contexts": np.concatenate([empty, table["captions"]]), "phrases": np.array(phrases, np.int64)}
    counts = {"read": n, "kept": n, "by_split": {name: len(rows[name]) for name in SPLITS}, "val_cut_from_train": 0,
              "boxes": int(present.sum()), "captions": n + 1, "phrases": len(phrases), "rejected": {}, "notes": {}}
    meta = {"format": FORMAT, "kind": "toy", "name": folder.name, "source": "demo", "sha256": options.sha256,
            "options": settings, "counts": counts, "splits": SPLITS, "slots": demo.SLOTS,
            "size": [demo.SIZE, demo.SIZE], "caption_tokens": demo.LENGTH, "arrays": sorted(arrays)}
    with whole_folder(folder) as new:
        for name, values in arrays.items():
            np.save(new / f"{name}.npy", values, allow_pickle=False)
        write_json(new / "meta.json", meta)
    summary(folder, meta, time.monotonic() - start)


def read_base(options):
    """What the base asks of a data set -> (dict, encoder); sets options.size. ValueError says what does not fit."""
    (unet_folder, unet_raw), (vae_folder, vae_raw) = (read_config(options.base, part) for part in ("unet", "vae"))
    unet = unet_shape(unet_raw, str(unet_folder / "config.json"))
    vae = vae_shape(vae_raw, str(vae_folder / "config.json"))
    if vae.latent != unet.channels or vae.in_channels != 3:
        raise ValueError(f"{options.base}: a VAE of {vae.in_channels} colours and {vae.latent} channels of latents "
                         f"does not fit a UNet of {unet.channels}")
    factor, cells = 2 ** (len(vae.widths) - 1), unet_raw.get("sample_size")
    if options.size is None and (type(cells) is not int or cells < 1):
        raise ValueError(f"{unet_folder / 'config.json'}: sample_size is {cells!r:.40}, so say --size PIXELS")
    options.size = options.size or cells * factor
    if options.size % factor:
        raise ValueError(f"--size {options.size}: the VAE divides by {factor}, so take a multiple of that")
    pooled = unet.added - SIZES * unet.added_time
    if unet.added and not options.embeddings:
        raise ValueError(f"{options.base}: this UNet, like SDXL's, takes pooled text besides the context, which one "
                         "text encoder does not give: make the embeddings with the model's own, and say --embeddings "
                         "FILE")
    encoder = Stored(options.embeddings, options) if options.embeddings else Clip(options.base, options)
    source = options.embeddings.name if options.embeddings else "the text encoder"
    fits = {"context": [unet.text or unet.context], "phrases": [unet.context] + [unet.text] * (unet.text > 0)}
    for name, widths in (fits | ({"pooled": [pooled]} if unet.added else {})).items():
        if encoder.widths.get(name) not in widths:
            raise ValueError(f"{options.base}: {source} has {name} of width {encoder.widths.get(name, 'none at all')}, "
                             f"the UNet takes {' or '.join(map(str, widths))}")
    return {"vae": part_sha256(options.base, "vae"), "shape": str(vae), "added": bool(unet.added)}, encoder


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (see --help)")
    source = parser.add_mutually_exclusive_group(required=True)

    def flag(name, help, group=parser, **kind):
        group.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), help=help, **kind)

    flag("input", "JSON lines, also gzipped", source, type=Path)
    flag("coco", "COCO's instances as JSON", source, type=Path)
    flag("demo", "draw the toy's scenes offline", source, action="store_true")
    flag("base", "folder of a model in diffusers layout", type=Path)
    flag("captions", "COCO's captions as JSON", type=Path)
    flag("images", "folder of the pictures (default: that of --input)", type=Path)
    flag("boxes", "what edges are counted in: unit (0..1), thousand (0..1000), pixels", choices=UNITS)
    flag("box_format", "xyxy: two corners; xywh: corner, width, height (default: xyxy; COCO: xywh)",
         choices=("xyxy", "xywh"))
    flag("name", "the data set is written to <out_dir>/<name>/ (default with --demo: demo)")
    flag("aspect", "crop: the middle square; pad: white beside; stretch (default: crop)", default="crop",
         choices=("crop", "pad", "stretch"))
    flag("size", "pixels a side (default: the UNet's own)", type=int)
    flag("min_visible", "drop a box of which less is left (default: 0.5)", type=float, default=0.5)
    flag("min_area", "drop a box that is less of the picture (default: 0.005)", type=float, default=0.005)
    flag("max_area", "drop a box that is more of the picture (default: 1)", type=float, default=1.0)
    flag("slots", "boxes per picture; of more the largest stay (default: 30)", type=int, default=30)
    flag("embeddings", "safetensors with context, pooled, phrases of the texts in FILE.json beside it", type=Path)
    flag("device", "auto, cuda, mps, cpu (default: auto)", default="auto")
    flag("dtype", "of VAE and text encoder: float32, bfloat16 (default: float32)", default="float32")
    flag("batch_size", "pictures or texts that are encoded at once (default: 8)", type=int, default=8)
    flag("limit", "use a random sample of so many rows (seeded)", type=int)
    flag("workers", "processes that read pictures (default: one per core)", type=int, default=os.cpu_count() or 1)
    flag("seed", "of --limit (default: 0)", type=int, default=0)
    flag("out_dir", "(default: the folder of this script)", type=Path, default=Path(__file__).resolve().parent)
    flag("force", "build the set even if it, or another one, is already there", action="store_true")
    options = parser.parse_args(argv)

    options.name = options.name or ("demo" if options.demo else "")
    if not re.fullmatch(r"\w[\w.+-]*", options.name):
        fail(f"--name {options.name or '(missing)'}: give the data set a plain folder name, such as --name mine")
    for name, least, most in (("limit", HELD_OUT + 1 if options.demo else 1, 10**9), ("workers", 1, 10**4),
                              ("batch_size", 1, 10**4), ("slots", 1, 10**4), ("size", 1, 10**5)):
        if (value := getattr(options, name)) is not None and not least <= value <= most:
            fail(f"--{name} {value}: must be a number from {least} to {most}")
    for name in ("min_visible", "min_area", "max_area"):
        if not 0 <= getattr(options, name) <= 1:
            fail(f"--{name} {getattr(options, name)}: must be a share from 0 to 1")
    of_pictures = ("base", "captions", "images", "boxes", "box_format", "embeddings")
    given = [name for name in of_pictures if getattr(options, name)]
    if options.demo and given:
        fail(f"--demo draws its own scenes and needs no model: leave out --{given[0]}")
    if not options.demo:
        check_source(options, given)
    return options


def check_source(options, given):
    if options.dtype not in ("float32", "bfloat16"):
        fail(f"--dtype {options.dtype}: float32 or bfloat16" + "; in float16 many a VAE overflows" * (
            options.dtype == "float16"))
    if not options.base:
        fail("--base is missing: the folder of a model in diffusers layout, whose VAE makes the latents")
    if options.coco:
        if missing := [name for name in ("captions", "images") if name not in given]:
            fail(f"--coco needs --{missing[0]}")
        if wrong := [name for name in ("boxes", "box_format") if name in given]:
            fail(f"--{wrong[0]}: boxes of COCO are xywh in pixels, leave it out")
        options.boxes, options.box_format = "pixels", "xywh"
    elif "captions" in given:
        fail("--captions belongs to --coco; in JSON lines each row has its caption")
    elif not options.boxes:
        fail("--boxes is missing: say what the boxes are counted in, unit (0..1), thousand (0..1000) or pixels")
    options.box_format = options.box_format or "xyxy"


def read_source(options):
    """-> (list of Row, list of Bad, Counter of notes), of a seeded sample if there is a limit."""
    notes, sample = Counter(), random.Random(options.seed).sample
    if options.coco:
        found, notes = or_fail(read_coco, options.coco, options.captions)
        if options.limit and options.limit < len(found):
            found = [found[i] for i in sorted(sample(range(len(found)), options.limit))]
            notes = Counter({f"{note}, in the whole file": n for note, n in notes.items()})
        return *collect_rows(read_row(*pair) for pair in found), notes
    total, chosen = sum(1 for _ in raw_lines(options.input, MAX_LINE)), None
    if options.limit and options.limit < total:
        chosen = set(sample(range(1, total + 1), options.limit))
    return *collect_rows(read_lines(options.input, chosen)), notes


def main(argv=None):
    """Build the data set that the command line asks for -> its folder (Path)."""
    options = parse(argv)
    folder = options.out_dir / options.name
    if options.demo:
        settings, options.sha256 = {"limit": options.limit}, file_sha256(Path(demo.__file__))
    else:
        for name in ("input", "coco", "captions", "embeddings"):
            if (path := getattr(options, name)) and not path.is_file():
                fail(f"--{name}: there is no file {path}" + ", but --demo draws a set" * (name == "input"))
        if options.images and not options.images.is_dir():
            fail(f"--images: there is no folder {options.images}")
        base, encoder = or_fail(read_base, options)
        options.sha256 = file_sha256(options.coco or options.input)
        settings = {name: getattr(options, name) for name in (
            "boxes", "box_format", "aspect", "size", "min_visible", "min_area", "max_area", "slots", "dtype", "limit",
            "seed")} | {"captions": options.captions and file_sha256(options.captions)}
        # where the pictures are and what the models are made of, as one number: no path gets into a data set
        root = (options.images or options.input.parent).resolve()
        settings["images"] = hashlib.sha256(str(root).encode()).hexdigest()[:16]
        settings["base"] = hashlib.sha256(str(base).encode()).hexdigest()
        settings["texts"] = hashlib.sha256(encoder.fingerprint.encode()).hexdigest()
    if already_there(folder, options.sha256, settings, options.force):
        print(f"{folder}: already there (--force builds it again)")
        return folder
    try:
        if options.demo:
            build_demo(settings, options, folder)
        else:
            build(*read_source(options), base, encoder, settings, options, folder)
    except KeyboardInterrupt:
        print("interrupted: nothing was changed", file=sys.stderr)
        raise SystemExit(130) from None
    except torch.OutOfMemoryError:
        fail(f"the memory of --device {options.device} is full: --batch_size {options.batch_size} is too much for it")
    return folder


if __name__ == "__main__":
    main()
