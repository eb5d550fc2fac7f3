"""One row of a data set of scenes: what it says is checked, its picture read, scaled and cut, its boxes move along.

What nobody can say how to read (which frame, which way up, which value is white) is refused, not guessed."""
import unicodedata
import warnings
from typing import NamedTuple

import numpy as np

from data.files import check_ids
from data.scenes import demo

SMALLEST = 64                                       # pixels: a smaller picture is no training data, unless --size is
SPLITS = ["train", "val", "test"]
SYNONYMS = {"training": "train", "validation": "val", "valid": "val"}
KEYS = {"image_path", "caption", "objects", "split"}
UNITS = {"unit": 1, "thousand": 1000, "pixels": None}            # what a box's edges are counted in; None: the picture


class Bad(NamedTuple):
    """A row that is left out, or one of its boxes."""
    number: int                                     # of the line, or the image's id
    box: int                                        # which of the row's objects; -1: the whole row
    reason: str
    text: str
    detail: str = ""


class Row(NamedTuple):
    number: int
    image_path: str                                 # as the source has it
    caption: str
    objects: list                                   # of (which, phrase, four numbers as the source has them)
    split: str                                      # "": by hash
    bad: list                                       # of Bad: boxes that are left out already
    notes: list                                     # what is strange but kept


class Placed(NamedTuple):
    """A row and its picture as they are trained on."""
    row: Row
    pixels: np.ndarray                              # (S, S, 3) uint8
    boxes: list                                     # of (phrase, [x0, y0, x1, y1] in 0..1 of the pixels)
    bad: list
    notes: list
    time_ids: list                                  # original height, width, crop top, left, target height, width


class Refused(ValueError):
    """reason, detail: why a picture is left out."""


def plain_text(text):
    """A caption or phrase as it is stored and looked up: runs of blanks are one space, letters are composed (NFC)."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def read_object(which, entry, number):
    """-> (which, phrase, four numbers) or Bad."""
    entry = entry if isinstance(entry, dict) else {"bbox": entry}
    phrase, box = entry.get("name", entry.get("phrase")), entry.get("bbox")
    if not isinstance(phrase, str) or not phrase.strip():
        return Bad(number, which, "empty phrase", repr(phrase), repr(box))
    # so many digits that float() fails are no place in a picture either; a NaN is not below anything
    if not isinstance(box, list) or len(box) != 4 or not all(type(x) in (int, float) and -1e9 < x < 1e9 for x in box):
        return Bad(number, which, "box is not four finite numbers", phrase, repr(box))
    return which, plain_text(phrase), box


def read_row(number, row):
    """dict as in a line of --input -> Row or Bad."""
    def bad(reason, detail=""):
        return Bad(number, -1, reason, str(row.get("image_path", "")) if isinstance(row, dict) else "", detail)
    if not isinstance(row, dict):
        return bad("not a JSON object", f"a {type(row).__name__}")
    path, caption, objects, split = (row.get(key) for key in ("image_path", "caption", "objects", "split"))
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        return bad("no image_path", repr(path))
    if not isinstance(caption, str) or not caption.strip():
        return bad("no caption", repr(caption))
    if not isinstance(objects, list):
        return bad("objects is not a list", repr(objects))
    name = split.strip().lower() if isinstance(split, str) else split
    name = "" if split is None else SYNONYMS.get(name, name) if isinstance(name, str) else name
    if name not in ("", *SPLITS) or split == "":
        return bad("unknown split", repr(split))
    found = [read_object(which, entry, number) for which, entry in enumerate(objects)]
    rejected, kept = ([item for item in found if isinstance(item, Bad) is wrong] for wrong in (True, False))
    try:
        "".join([path, caption, *(phrase for _, phrase, _ in kept)]).encode()
    except UnicodeEncodeError:                      # "\ud800" is JSON, but no text
        return bad("half of a surrogate pair")
    notes = [f"unknown key {key[:40]!r}" for key in sorted(set(row) - KEYS)]         # half a pair cannot be printed
    return Row(number, path, plain_text(caption), kept, name, rejected, notes)


def check_arrays(table, meta):
    """ValueError unless the arrays of a prepared set, by name, are of n rows and what they point at is there."""
    n, slots, toy = len(table["split"]), meta["slots"], meta["kind"] == "toy"
    captions, phrases, boxes = len(table["contexts"]), len(table["phrases"]), table["boxes"]
    check_ids("split", table["split"], 256, 0, (n,))
    check_ids("phrase", table["phrase"], phrases, -1, (n, slots))
    check_ids("caption", table["caption"], captions, 0, (n,))
    if [table[name].dtype for name in ("phrase", "caption")] != [np.int32] * 2:
        raise ValueError("phrase or caption is not int32")
    if boxes.shape != (n, slots, 4) or boxes.dtype != np.float32 or not ((boxes >= 0) & (boxes <= 1)).all():
        raise ValueError(f"boxes {list(boxes.shape)} are not {n} x {slots} within 0 ... 1")
    if toy:
        forms = {"labels": (n, demo.SIZE, demo.SIZE), "colours": (n, slots), "kinds": (n, slots)}
        forms |= {name: table[name].shape[:2] for name in ("contexts", "phrases")}
        for (name, form), known in zip(forms.items(), (demo.PALETTE, demo.COLOURS, demo.SHAPES, *[demo.WORDS] * 2)):
            check_ids(name, table[name], len(known), 0, form)
        return
    if not isinstance(meta["base"], dict):
        raise ValueError("meta.json does not say which base it is of")
    for name, form in {"latents": (n, 4), "contexts": (captions, 3), "phrases": (phrases, 2), "time_ids": (n, 2),
                       "pooled": (captions, 2)}.items():
        array = table.get(name)
        if array is not None and ((len(array), array.ndim) != form or 0 in array.shape or array.dtype.kind != "f"
                                  or not array.dtype.isnative):
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, not {form[0]} rows of {form[1]} dimensions")


def open_picture(path, least):
    """-> (RGB picture, list of notes). Refused: what cannot be read, or what nobody can say how to read."""
    from PIL import Image
    try:
        if not path.is_file():
            raise Refused("image missing", path.name)
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):       # refused, too
            picture = Image.open(path)
        frames, turned = getattr(picture, "n_frames", 1), picture.getexif().get(0x0112, 1) not in (0, 1)
        if picture.format != "MPO" and frames > 1:  # a phone's MPO has a preview or a second eye's view behind
            raise Refused("animated", f"{frames} frames: which of them the boxes fit, nobody says")
        if turned:
            raise Refused("EXIF orientation turns it", "boxes of the turned picture or of the stored one? turn it, and "
                          "take the tag out")
        if min(picture.size) < least:
            raise Refused(f"smaller than {least} pixels", "{} x {}".format(*picture.size))
        picture.load()
        with picture:
            return to_rgb(picture)
    except Refused:
        raise
    except Exception as error:                      # each format of Pillow raises its own types on damaged files
        raise Refused("image cannot be read", f"{type(error).__name__}: {error}") from None


def to_rgb(picture):
    """A loaded picture of any mode -> (RGB picture, list of notes)."""
    from PIL import Image
    mode, notes = picture.mode, []
    if mode in ("I", "F"):                          # 32 bits a pixel
        raise Refused("image cannot be read", f"mode {mode}: nobody says which value is white")
    if mode.startswith("I;16"):                     # convert() would clip at 255
        values = (np.asarray(picture) / 257).round().astype(np.uint8)
        return Image.fromarray(values).convert("RGB"), ["16-bit scaled to 8"]
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        if picture.getextrema()[3][0] < 255:
            white = Image.new("RGBA", picture.size, "white")
            picture, notes = Image.alpha_composite(white, picture), ["transparency on white"]
    kinds = {"1": "grey", "L": "grey", "LA": "grey", "P": "palette", "PA": "palette", "CMYK": "CMYK"}
    return picture.convert("RGB"), notes + [note for key, note in kinds.items() if key == mode]


def fit(picture, size, aspect):
    """-> (pixels (size, size, 3) uint8, view: left, top, right, bottom of what they show in the picture's own pixels).

    crop: the middle square; stretch: all; pad: all, with white beside it, so the view is larger than the picture."""
    from PIL import Image
    width, height = picture.size
    if aspect == "pad":
        scale = size / max(width, height)
        inner = [max(1, round(side * scale)) for side in (width, height)]
        at = [(size - side) // 2 for side in inner]
        square = Image.new("RGB", (size, size), "white")
        square.paste(picture.resize(inner, Image.LANCZOS), at)
        x, y = width / inner[0], height / inner[1]
        return np.asarray(square), (-at[0] * x, -at[1] * y, (size - at[0]) * x, (size - at[1]) * y)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    view = (left, top, left + side, top + side) if aspect == "crop" else (0, 0, width, height)
    return np.asarray(picture.resize((size, size), Image.LANCZOS, box=view)), view


def read_box(box, width, height, units, form):
    """Four numbers of the source -> [x0, y0, x1, y1] in pixels of the picture, inside it. Refused."""
    x0, y0, x1, y1 = box if form == "xyxy" else (box[0], box[1], box[0] + box[2], box[1] + box[3])
    if x1 <= x0 or y1 <= y0:
        raise Refused("inverted box", f"{box}" + "; is it xywh?" * (form == "xyxy"))

    def outside(units):
        """By how many times what rounding explains, per edge."""
        x, y = (width, height) if units == "pixels" else [UNITS[units]] * 2
        loose = [max(whole / side, 0.002 * whole) for whole, side in ((x, width), (y, height))]
        return max(-x0 / loose[0], -y0 / loose[1], (x1 - x) / loose[0], (y1 - y) / loose[1])
    if outside(units) > 1 + 1e-6:
        fits = [other for other in UNITS if outside(other) <= 1]
        raise Refused("box outside", f"{box} in {units}, picture {width} x {height}" + (
            f"; it would fit --boxes {' or '.join(fits)}" if fits else ""))
    x, y = (1, 1) if units == "pixels" else (width / UNITS[units], height / UNITS[units])
    inside = [min(max(edge, 0), side) for edge, side in zip((x0 * x, y0 * y, x1 * x, y1 * y), (width, height) * 2)]
    if area(inside) < 1e-6:                         # pixels: nothing is left to divide by
        raise Refused("box without area", f"{box} in {units}")
    return inside


def move(box, view):
    """xyxy in the picture's pixels -> (xyxy in 0..1 of the view, clipped; share of the box that is left)."""
    left, top, right, bottom = view
    moved = [(edge - (top, left)[i % 2 == 0]) / (bottom - top, right - left)[i % 2 == 0] for i, edge in enumerate(box)]
    inside = [min(max(edge, 0.0), 1.0) for edge in moved]
    return inside, area(inside) / area(moved)


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def place(row, root, options):
    """A worker's job: Row -> Placed, or list of Bad, the last of which is the row."""
    def bad(reason, detail="", box=-1, text=row.image_path):
        return Bad(row.number, box, reason, text, detail)
    try:
        picture, notes = open_picture(root / row.image_path, min(SMALLEST, options.size))
        (width, height), (pixels, view) = picture.size, fit(picture, options.size, options.aspect)
    except Refused as error:
        return [bad(*error.args)]
    except Exception as error:                      # no memory to scale it, say; the others go on
        return [bad("image cannot be read", f"{type(error).__name__}: {error}")]
    kept, dropped = [], []
    for which, phrase, numbers in row.objects:
        try:
            box, left = move(read_box(numbers, width, height, options.boxes, options.box_format), view)
            if left < options.min_visible:
                raise Refused("too little of the box is left", f"{left:.2f} after --aspect {options.aspect}")
            if not options.min_area <= area(box) <= options.max_area:
                reason = "box too small" if area(box) < options.min_area else "box too large"
                raise Refused(reason, f"{area(box):.4f} of the picture")
            kept.append((which, phrase, box))
        except Refused as error:
            reason, detail = error.args
            hint = "; is it --boxes unit?" if options.boxes != "unit" and max(numbers) <= 1 else ""
            dropped.append(bad(reason, detail + hint, which, phrase))
    largest = sorted(kept, key=lambda item: -area(item[2]))
    for which, phrase, box in sorted(largest[options.slots:]):
        dropped.append(bad("more boxes than slots", f"{area(box):.4f} of the picture", which, phrase))
    kept = sorted(largest[:options.slots])
    dropped = sorted(row.bad + dropped)
    if not kept:
        return [*dropped, bad("no objects", f"{len(dropped)} boxes are left out")]
    notes = row.notes + notes + ["smaller than --size, enlarged"] * (min(width, height) < options.size)
    crop = [0, 0]
    if options.aspect == "crop":
        crop = [round(edge * options.size / (view[2] - view[0])) for edge in (view[1], view[0])]
    return Placed(row, pixels, [(phrase, box) for _, phrase, box in kept], dropped, notes,
                  [height, width, *crop, options.size, options.size])
