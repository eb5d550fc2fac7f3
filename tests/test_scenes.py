"""Scenes: which rows, pictures and boxes are refused and why, where boxes go when a picture is cut, and that the arrays
are what VAE and text encoder say."""
import gzip
import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data.scenes import demo, pictures, prepare
from data.scenes.diffusers_folder import part_sha256
from data.scenes.encoders import load_text_encoder, load_vae
from data.scenes.pictures import Refused, fit, move, open_picture, read_box
from data.scenes.tokens import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data" / "scenes" / "prepare.py"
FIXTURES = Path(__file__).parent / "fixtures" / "scenes"
BASE = FIXTURES / "sd1"                             # latents of 9 x 9, a VAE that halves: 18 pixels a side


# ------------------------------------------------------------------------------------------------------------- helpers
def paint(path, width=30, height=24, mode="RGB", seed=None):
    rng = np.random.default_rng(len(path.name) if seed is None else seed)
    noise = rng.integers(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def entry(k, caption=None, objects=None, **more):
    """A good row on picture k.png of 30 x 24, whose box is given in 0..1."""
    objects = [{"name": "red box", "bbox": [0.3, 0.25, 0.7, 0.75]}] if objects is None else objects
    return {"image_path": f"{k}.png", "caption": caption or f"a cat {k % 3}", "objects": objects} | more


def entries(n=6, **more):
    return [entry(k, split="train" if k else "val", **more) for k in range(n)]


def load(folder):
    lines = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
             for name in ("rejected", "pictures") if (folder / f"{name}.jsonl").exists()}
    arrays = {path.stem: np.load(path, allow_pickle=False) for path in folder.glob("*.npy")}
    texts = json.loads((folder / "texts.json").read_text()) if (folder / "texts.json").exists() else {}
    return SimpleNamespace(folder=folder, meta=json.loads((folder / "meta.json").read_text()), texts=texts, **lines,
                           **arrays)


def write_rows(tmp_path, rows):
    """JSON lines beside their pictures, which are painted unless they are there."""
    path = tmp_path / "raw" / "in.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    for row in rows:
        name = row.get("image_path") if isinstance(row, dict) else None
        if isinstance(name, str) and re.fullmatch(r"\d+\.png", name) and not (path.parent / name).exists():
            paint(path.parent / name, seed=int(name[:-4]))
    return path


def build(tmp_path, rows, *flags, name="set", base=BASE, boxes="unit", force=True):
    path = rows if isinstance(rows, Path) else write_rows(tmp_path, rows)
    return load(prepare.main(["--base", str(base), "--input", str(path), "--boxes", boxes, "--name", name, "--out_dir",
                              str(tmp_path / "out"), "--workers", "1", "--device", "cpu", *["--force"] * force,
                              *map(str, flags)]))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def replace(name, old, new):
    def change(folder):
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")
    return change


# --------------------------------------------------------------------------------------------- pictures and their boxes
def rectangle(width, height, box, colour=(255, 0, 0)):
    """Red on blue; box in whole pixels."""
    pixels = np.full((height, width, 3), (0, 0, 255), np.uint8)
    pixels[box[1]:box[3], box[0]:box[2]] = colour
    return Image.fromarray(pixels)


@pytest.mark.parametrize("aspect, width, height, box, moved, left", [
    ("crop", 400, 200, (150, 40, 250, 140), (0.25, 0.2, 0.75, 0.7), 1),          # 100 pixels are cut on either side
    ("crop", 200, 400, (40, 150, 140, 250), (0.2, 0.25, 0.7, 0.75), 1),
    ("crop", 400, 200, (50, 0, 200, 200), (0, 0, 0.5, 1), 100 / 150),
    ("crop", 400, 200, (20, 0, 140, 200), (0, 0, 0.2, 1), 40 / 120), ("crop", 400, 200, (0, 50, 90, 90), None, 0),
    ("crop", 201, 100, (50, 10, 100, 60), (0, 0.1, 0.5, 0.6), 1),                 # 50 are cut on the left, 51 right
    ("pad", 400, 200, (100, 0, 300, 200), (0.25, 0.25, 0.75, 0.75), 1),
    ("pad", 200, 400, (0, 100, 200, 200), (0.25, 0.25, 0.75, 0.5), 1),
    ("pad", 400, 200, (0, 100, 400, 200), (0, 0.5, 1, 0.75), 1),
    ("stretch", 400, 200, (100, 50, 300, 100), (0.25, 0.25, 0.75, 0.5), 1),
    ("stretch", 120, 360, (30, 90, 60, 180), (0.25, 0.25, 0.5, 0.5), 1)])
def test_a_box_moves_with_what_it_is_around(aspect, width, height, box, moved, left):
    pixels, view = fit(rectangle(width, height, box), 80, aspect)
    assert pixels.shape == (80, 80, 3) and pixels.dtype == np.uint8
    found, share = move([float(x) for x in box], view)
    assert share == pytest.approx(left)
    red = (pixels[..., 0] > 128) & (pixels[..., 2] < 128)
    if moved is None:
        assert not red.any()
        return
    assert found == pytest.approx(moved, abs=1e-6)
    ys, xs = np.nonzero(red)
    assert np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / 80 == pytest.approx(moved, abs=1.01 / 80)


@pytest.mark.parametrize("aspect", ["crop", "pad", "stretch"])
def test_boxes_of_odd_sizes_stay_on_their_objects(aspect):
    rng = np.random.default_rng(5)
    for _ in range(40):
        width, height = map(int, rng.integers(90, 700, 2))
        side = min(width, height)
        x, y = (width - side) // 2 + side // 4, (height - side) // 2 + side // 5
        box = (x, y, x + side // 2, y + side // 3)
        pixels, view = fit(rectangle(width, height, box), 96, aspect)
        found, share = move([float(edge) for edge in box], view)
        ys, xs = np.nonzero((pixels[..., 0] > 128) & (pixels[..., 2] < 128))
        drawn = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert share == pytest.approx(1) and np.abs(drawn - np.array(found) * 96).max() <= 0.75


def test_padding_is_white_and_beside():
    pixels, view = fit(rectangle(40, 20, (0, 0, 0, 0)), 16, "pad")
    assert (pixels[:4] == 255).all() and (pixels[12:] == 255).all() and (pixels[4:12] == (0, 0, 255)).all()
    assert view == (0, -10, 40, 30)
    assert fit(rectangle(1000, 3, (0, 0, 0, 0)), 16, "pad")[0].shape == (16, 16, 3)   # one row of pixels is left


@pytest.mark.parametrize("box, units, form, wanted", [
    ([0.1, 0.2, 0.5, 0.6], "unit", "xyxy", [20, 20, 100, 60]),
    ([100, 200, 500, 600], "thousand", "xyxy", [20, 20, 100, 60]),
    ([20, 20, 100, 60], "pixels", "xyxy", [20, 20, 100, 60]), ([20, 20, 80, 40], "pixels", "xywh", [20, 20, 100, 60]),
    ([0.1, 0.2, 0.4, 0.4], "unit", "xywh", [20, 20, 100, 60]), ([-1, -1, 201, 101], "pixels", "xyxy", [0, 0, 200, 100]),
    ([-0.005, -0.01, 1.005, 1.01], "unit", "xyxy", [0, 0, 200, 100]),
    ([0, 0, 1005, 1010], "thousand", "xyxy", [0, 0, 200, 100]),
    ([0, 0, 201.1, 50], "pixels", "xyxy", "box outside"), ([0, 0, 1.006, 1], "unit", "xyxy", "box outside"),
    ([0, -1.1, 50, 50], "pixels", "xyxy", "box outside"), ([-6, 0, 500, 500], "thousand", "xyxy", "box outside"),
    ([-1, 0, 0, 50], "pixels", "xyxy", "box without area"), ([0.5, 0.5, 0.5 + 1e-12, 1], "unit", "xyxy",
                                                             "box without area"),
    ([50, 50, 40, 60], "pixels", "xyxy", "inverted box"), ([50, 50, 50, 60], "pixels", "xyxy", "inverted box"),
    ([50, 50, -10, 60], "pixels", "xywh", "inverted box"), ([50, 60, 60, 60], "pixels", "xyxy", "inverted box")])
def test_read_box(box, units, form, wanted):
    if isinstance(wanted, list):
        assert read_box(box, 200, 100, units, form) == pytest.approx(wanted)
        return
    with pytest.raises(Refused) as caught:
        read_box(box, 200, 100, units, form)
    assert caught.value.args[0] == wanted and str(box) in caught.value.args[1]


def test_in_a_large_picture_two_thousandths_are_rounding_too():
    assert read_box([0, 0, 4007, 10], 4000, 3000, "pixels", "xyxy") == [0, 0, 4000, 10]
    with pytest.raises(Refused):
        read_box([0, 0, 4009, 10], 4000, 3000, "pixels", "xyxy")


@pytest.mark.parametrize("box, units, hint", [
    ([10, 10, 90, 90], "unit", "--boxes thousand or pixels"), ([10, 10, 900, 900], "unit", "--boxes thousand"),
    ([10, 10, 150, 90], "unit", "--boxes thousand or pixels"), ([10, 10, 500, 500], "pixels", "--boxes thousand"),
    ([10, 10, 5000, 500], "pixels", None)])
def test_an_outside_box_says_which_units_would_fit(box, units, hint):
    with pytest.raises(Refused) as caught:
        read_box(box, 200, 100, units, "xyxy")
    assert caught.value.args[1].endswith(hint) if hint else "--boxes" not in caught.value.args[1]


def saved(path, picture, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)
    return path


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


RAMP = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
HALF = np.full((64, 64, 4), (200, 0, 0, 128), np.uint8)
CLEAR = HALF * np.array([1, 1, 1, 0], np.uint8)


@pytest.mark.parametrize("name, picture, options, pixel, notes", [
    ("a.png", Image.new("L", (64, 64), 77), {}, (77, 77, 77), ["grey"]),
    ("a.png", Image.new("1", (64, 64), 1), {}, (255, 255, 255), ["grey"]),
    ("a.jpg", Image.new("CMYK", (64, 64), (255, 0, 0, 0)), {"quality": 100}, (0, 255, 255), ["CMYK"]),
    ("a.tif", Image.new("CMYK", (64, 64), (0, 255, 255, 0)), {}, (255, 0, 0), ["CMYK"]),
    ("a.png", Image.new("RGB", (64, 64), (10, 200, 30)).quantize(4), {}, (10, 200, 30), ["palette"]),
    ("a.gif", Image.new("RGB", (64, 64), (10, 200, 30)), {}, (10, 200, 30), ["palette"]),
    ("a.png", Image.fromarray(HALF), {}, (227, 127, 127), ["transparency on white"]),
    ("a.png", Image.new("RGBA", (64, 64), (1, 2, 3, 255)), {}, (1, 2, 3), []),
    ("a.png", Image.new("LA", (64, 64), (9, 0)), {}, (255, 255, 255), ["transparency on white", "grey"]),
    ("a.gif", Image.fromarray(CLEAR), {}, (255, 255, 255), ["transparency on white", "palette"]),
    ("a.png", Image.new("RGB", (64, 64), (4, 5, 6)), {"transparency": (4, 5, 6)}, (255, 255, 255),
     ["transparency on white"]),
    ("a.jpg", Image.new("RGB", (64, 64), (90, 90, 90)), {"exif": exif(1)}, (90, 90, 90), []),
    ("a.webp", Image.new("RGB", (64, 64), (90, 90, 90)), {"lossless": True}, (90, 90, 90), [])])
def test_pictures_of_other_kinds_are_converted(tmp_path, name, picture, options, pixel, notes):
    found, told = open_picture(saved(tmp_path / name, picture, **options), 64)
    assert (found.mode, found.size, told) == ("RGB", (64, 64), notes)
    assert np.asarray(found)[5, 5].tolist() == pytest.approx(pixel, abs=2)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_are_scaled_not_clipped(tmp_path, name):
    found, told = open_picture(saved(tmp_path / name, Image.fromarray(RAMP)), 64)
    assert told == ["16-bit scaled to 8"] and (np.asarray(found)[..., 1] == np.round(RAMP / 257)).all()
    assert len(np.unique(np.asarray(found))) == 256


def cut_off(path):
    data = paint(path, 64, 64).read_bytes()
    path.write_bytes(data[:len(data) // 2])


@pytest.mark.parametrize("name, make, reason, detail", [
    ("a.png", lambda path: None, "image missing", "a.png"), ("a.png", Path.mkdir, "image missing", ""),
    ("a.png", lambda path: path.write_text("<html>"), "image cannot be read", "UnidentifiedImageError"),
    ("a.png", lambda path: path.write_bytes(b""), "image cannot be read", ""),
    ("a.png", cut_off, "image cannot be read", ""),
    ("a.jpg", cut_off, "image cannot be read", "truncated"),
    ("a.png", lambda path: paint(path, 1, 1), "smaller than 64 pixels", "1 x 1"),
    ("a.png", lambda path: paint(path, 63, 500), "smaller than 64 pixels", "63 x 500"),
    ("a.gif", lambda path: saved(path, rectangle(64, 64, (0, 0, 9, 9)), save_all=True, append_images=[
        rectangle(64, 64, (9, 9, 20, 20))]), "animated", "2 frames"),
    ("a.jpg", lambda path: saved(path, rectangle(80, 64, (0, 0, 9, 9)), exif=exif(6)), "EXIF orientation turns it", ""),
    ("a.tif", lambda path: saved(path, Image.fromarray(RAMP.astype(np.float32))), "image cannot be read", "mode F"),
    *(("a.tif", lambda path, k=k: saved(path, Image.fromarray((RAMP * k).astype(np.int32))), "image cannot be read",
       "mode I") for k in (9, 1, 1 / 257))])
def test_a_picture_is_refused(tmp_path, name, make, reason, detail):
    make(tmp_path / name)
    with pytest.raises(Refused) as caught:
        open_picture(tmp_path / name, 64)
    assert caught.value.args[0] == reason and detail in caught.value.args[1]


def test_a_picture_that_may_be_a_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)             # at once as many again Pillow itself refuses
    with pytest.raises(Refused, match="DecompressionBombWarning: Image size .4096 pixels"):
        open_picture(paint(tmp_path / "a.png", 64, 64), 64)


# ---------------------------------------------------------------------------------------------------------- whole sets
def test_the_arrays_are_what_vae_and_text_encoder_say(tmp_path):
    rows = [entry(0, "a red cat", [{"name": "cat", "bbox": [0.2, 0, 0.6, 0.5]},
                                   {"phrase": " box ", "bbox": [0.5, 0.5, 0.9, 1]}]),
            entry(1, "a dog", [{"name": "box", "bbox": [0.3, 0.25, 0.7, 0.75]}]), entry(2, " a red cat"),
            entry(3, "the blue box, and green blue boxes")]
    rows = [row | {"split": split} for row, split in zip(rows, ("train", " Valid ", "test", "training"))]
    result = build(tmp_path, rows, "--slots", 4, "--batch_size", 3)
    types = {"latents": ("float16", (4, 4, 9, 9)), "contexts": ("float16", (4, 12, 24)),
             "phrases": ("float16", (3, 24)),
             "boxes": ("float32", (4, 4, 4)), "phrase": ("int32", (4, 4)), "caption": ("int32", (4,)),
             "split": ("uint8", (4,))}
    assert {name: (str(getattr(result, name).dtype), getattr(result, name).shape) for name in types} == types
    assert set(types) == {path.stem for path in result.folder.glob("*.npy")} == set(result.meta["arrays"])
    assert result.split.tolist() == [0, 1, 2, 0] and result.meta["splits"] == ["train", "val", "test"]
    assert result.texts == {"captions": ["", "a red cat", "a dog", "the blue box, and green blue boxes"],
                            "phrases": ["cat", "box", "red box"]}
    assert result.caption.tolist() == [1, 2, 1, 3]
    assert result.phrase.tolist() == [[0, 1, -1, -1], [1, -1, -1, -1], [2, -1, -1, -1], [2, -1, -1, -1]]
    # of 30 x 24 the middle 24 are left: x becomes (30 x - 3) / 24
    assert result.boxes[0] == pytest.approx(np.array([[0.125, 0, 0.625, 0.5], [0.5, 0.5, 1, 1], [0] * 4, [0] * 4]))
    assert result.boxes[1, 0] == pytest.approx(np.array([0.25, 0.25, 0.75, 0.75]))
    vae, text, tokenizer = load_vae(BASE), load_text_encoder(BASE), load_tokenizer(BASE)
    pixels = np.stack([fit(Image.open(tmp_path / "raw" / f"{k}.png"), 18, "crop")[0] for k in range(4)])
    with torch.no_grad():
        mean, _ = vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
        context, phrase = (text(torch.from_numpy(tokenizer(result.texts[name])[0])) for name in ("captions", "phrases"))
    for found, wanted in ((result.latents, mean * 0.2), (result.contexts, context[0]), (result.phrases, phrase[1])):
        assert np.abs(found - wanted.numpy()).max() < 2e-3 * max(1, np.abs(found).max()) and found.std() > 0.05
    meta = result.meta
    assert (meta["format"], meta["kind"], meta["source"]) == (1, "latents", "in.jsonl")
    assert (meta["size"], meta["slots"]) == ([18, 18], 4)
    assert (meta["scaling_factor"], meta["caption_tokens"]) == (0.2, 12) and "/" not in json.dumps(meta)
    assert meta["sha256"] == hashlib.sha256((tmp_path / "raw" / "in.jsonl").read_bytes()).hexdigest()
    assert meta["base"] == {part: part_sha256(BASE, part) for part in ("vae", "text_encoder")} | {"embeddings": False}
    assert meta["counts"]["notes"] == {"caption cut to 12 tokens": 1} and not result.rejected
    assert result.pictures[1] == {"row": 1, "image_path": "1.png", "caption": "a dog", "objects": [
        {"name": "box", "bbox": [0.25, 0.25, 0.75, 0.75]}]}


def test_size_aspect_and_dtype_are_flags(tmp_path):
    big = build(tmp_path, entries(3), "--size", 24, "--aspect", "pad", name="big")
    assert big.latents.shape == (3, 4, 12, 12) and big.meta["size"] == [24, 24]
    assert big.boxes[0, 0] == pytest.approx(np.array([0.3, (0.25 * 19 + 2) / 24, 0.7, (0.75 * 19 + 2) / 24]))
    assert big.meta["counts"]["notes"] == {}
    whole = build(tmp_path, entries(3), "--aspect", "stretch", name="whole")
    assert whole.boxes[0, 0] == pytest.approx(np.array([0.3, 0.25, 0.7, 0.75]))
    paint(tmp_path / "raw" / "70.png", 70, 66)
    large = build(tmp_path, [*entries(3), entry(70, split="train")], "--size", 80, name="large")
    assert large.meta["counts"]["notes"] == {"smaller than --size, enlarged": 1} and len(large.latents) == 1
    half = build(tmp_path, entries(3), "--aspect", "stretch", "--dtype", "bfloat16", name="half")
    difference = np.abs(half.latents.astype(float) - whole.latents).max()
    assert 0 < difference < 0.05 * np.abs(whole.latents).max() + 0.05


OBJECT = {"name": "cat", "bbox": [0.3, 0.3, 0.7, 0.7]}


@pytest.mark.parametrize("row, reason, detail", [
    ("{", "broken JSON", "Expecting"), ("[" * 100_000, "broken JSON", "recursion"),
    ('{"a": ' + "9" * 5000 + "}", "broken JSON", ""),
    ("", "empty line", ""), ("[1]", "not a JSON object", "a list"),
    ('{"a": "' + "x" * 1_000_000 + '"}', "line over 1,000,000 bytes", ""),
    (entry(1) | {"image_path": None}, "no image_path", "None"), (entry(1) | {"image_path": 5}, "no image_path", "5"),
    (entry(1) | {"image_path": "no.png"}, "image missing", "no.png"),
    (entry(1) | {"image_path": "\0"}, "no image_path", ""),
    (entry(1) | {"image_path": "in.jsonl"}, "image cannot be read", ""),
    (entry(1) | {"image_path": "x" * 5000}, "image cannot be read", "too long"),
    (entry(1) | {"caption": " "}, "no caption", "' '"), (entry(1) | {"caption": 3}, "no caption", "3"),
    ({"image_path": "1.png", "objects": [OBJECT]}, "no caption", "None"),
    (entry(1) | {"caption": ["a"]}, "no caption", ""),
    (entry(1) | {"objects": {}}, "objects is not a list", "{}"),
    (entry(1) | {"objects": None}, "objects is not a list", ""),
    (entry(1, objects=[]), "no objects", "0 boxes"), (entry(1, "a \ud800"), "half of a surrogate pair", ""),
    (entry(1, objects=[OBJECT | {"name": "\ud800"}]), "half of a surrogate pair", ""),
    (entry(1, split="dev"), "unknown split", "'dev'"), (entry(1, split=1), "unknown split", "1"),
    (entry(0, split="val"), "duplicate", "first at 1")], ids=lambda value: str(value)[:40])
def test_a_bad_row_says_why_and_leaves_the_others_alone(tmp_path, row, reason, detail):
    good = entries()
    result = build(tmp_path, good[:3] + [row] + good[3:])
    assert result.meta["counts"]["rejected"] == {reason: 1} and not result.meta["counts"]["rejected_boxes"]
    assert len(result.rejected) == 1 and result.rejected[0]["line"] == 4 and result.rejected[0]["reason"] == reason
    assert detail in result.rejected[0].get("detail", "")
    assert [row["image_path"] for row in result.pictures] == [f"{k}.png" for k in range(6)]
    assert len(result.latents) == len(result.boxes) == result.meta["counts"]["kept"] == 6
    assert result.meta["counts"]["read"] == 7


@pytest.mark.parametrize("other, reason, detail", [
    ({"name": "", "bbox": [0, 0, 1, 1]}, "empty phrase", "''"), ({"bbox": [0, 0, 1, 1]}, "empty phrase", "None"),
    ({"name": 7, "bbox": [0, 0, 1, 1]}, "empty phrase", "7"), ([0, 0, 1, 1], "empty phrase", ""),
    *((OBJECT | {"bbox": box}, "box is not four finite numbers", "")
      for box in (None, [0, 0, 1], [0, 0, 1, 1, 1], [0, 0, 1, "1"], [0, 0, 1, True], [0, 0, 1, float("nan")],
                  [0, 0, float("inf"), 1], [0, 0, 1, 10 ** 400], "0011", {"x": 1})),
    (OBJECT | {"bbox": [0.7, 0.3, 0.3, 0.7]}, "inverted box", "is it xywh?"),
    (OBJECT | {"bbox": [3, 3, 12, 12]}, "box outside", "--boxes thousand or pixels"),
    (OBJECT | {"bbox": [0.5, 0.5, 0.55, 0.55]}, "box too small", "0.0031 of the picture"),
    (OBJECT | {"bbox": [0, 0, 0.17, 1]}, "too little of the box is left", "0.41")])
def test_a_bad_box_is_dropped_alone(tmp_path, other, reason, detail):
    result = build(tmp_path, [*entries(3), entry(3, objects=[OBJECT, other, OBJECT | {"name": "dog"}], split="test")])
    assert result.meta["counts"]["rejected"] == {} and result.meta["counts"]["rejected_boxes"] == {reason: 1}
    assert [(bad["line"], bad["box"], bad["reason"]) for bad in result.rejected] == [(4, 1, reason)]
    assert detail in result.rejected[0]["text"] + result.rejected[0].get("detail", "")
    assert [result.texts["phrases"][k] for k in result.phrase[3] if k >= 0] == ["cat", "dog"]
    assert result.boxes[3, :2] == pytest.approx(np.array([[0.25, 0.3, 0.75, 0.7]] * 2))
    assert not result.boxes[3, 2:].any()
    assert result.meta["counts"]["boxes"] == 5
    alone = build(tmp_path, [*entries(3), entry(3, objects=[other])], "--force")
    assert [(bad["reason"], "box" in bad) for bad in alone.rejected] == [("no objects", False), (reason, True)]
    assert len(alone.boxes) == 3


def test_area_slots_and_visibility(tmp_path):
    sides = (0.3, 0.5, 0.2, 0.4, 0.1)
    row = entry(9, objects=[{"name": f"cat {k}", "bbox": [0.2, 0.2, 0.2 + 0.8 * side, 0.2 + side]}
                            for k, side in enumerate(sides)])

    def names(result):
        return [result.texts["phrases"][k] for k in result.phrase[-1] if k >= 0]
    rows = [*entries(3), row]
    result = build(tmp_path, rows, "--slots", 3)
    assert names(result) == ["cat 0", "cat 1", "cat 3"]              # the largest, in their own order
    assert [(bad["box"], bad["reason"]) for bad in result.rejected] == [(k, "more boxes than slots") for k in (2, 4)]
    assert names(build(tmp_path, rows, "--min_area", 0.04)) == ["cat 0", "cat 1", "cat 2", "cat 3"]
    assert names(build(tmp_path, rows, "--max_area", 0.1)) == ["cat 0", "cat 2", "cat 4"]
    edge = entry(9, objects=[{"name": "cat", "bbox": [0, 0.2, 0.2, 0.8]}])           # half of it is cut off
    assert names(build(tmp_path, [*entries(3), edge], "--min_visible", 0.49)) == ["cat"]
    assert len(build(tmp_path, [*entries(3), edge], "--min_visible", 0.51).boxes) == 3
    twice = build(tmp_path, [*entries(3), entry(9, objects=[OBJECT, OBJECT])])
    assert names(twice) == ["cat", "cat"] and not twice.rejected


def test_units_and_forms_of_boxes_give_the_same(tmp_path):
    unit = [0.3, 0.25, 0.7, 0.75]
    ways = {("unit", "xyxy"): unit, ("thousand", "xyxy"): [300, 250, 700, 750], ("pixels", "xyxy"): [9, 6, 21, 18],
            ("pixels", "xywh"): [9, 6, 12, 12], ("unit", "xywh"): [0.3, 0.25, 0.4, 0.5]}
    found = [build(tmp_path, entries(3, objects=[{"name": "cat", "bbox": box}]), "--box_format", form, "--force",
                   boxes=units)
             for (units, form), box in ways.items()]
    for result in found:
        assert result.boxes[0, 0] == pytest.approx(np.array([0.25, 0.25, 0.75, 0.75]))
    wrong = build(tmp_path, [*entries(1, objects=[{"name": "cat", "bbox": [5, 5, 20, 20]}]),
                             *entries(3, objects=[{"name": "cat", "bbox": unit}])[1:],
                             entry(7, objects=[{"name": "cat", "bbox": [9, 6, 21, 18]}], split="train")],
                             boxes="pixels")
    assert "is it --boxes unit?" in wrong.rejected[1]["detail"]
    assert wrong.meta["counts"]["rejected"] == {"no objects": 2}


def test_unreadable_pictures_are_counted_never_replaced(tmp_path, capsys):
    rows = entries(12)
    path = write_rows(tmp_path, rows)
    for k in range(3, 9):
        (path.parent / f"{k}.png").unlink()
    paint(path.parent / "9.png", 17, 90)
    (path.parent / "10.png").write_text("no")
    result = build(tmp_path, path)
    assert result.meta["counts"]["rejected"] == {"image cannot be read": 1, "image missing": 6,
                                                 "smaller than 18 pixels": 1}
    assert [bad["line"] for bad in result.rejected] == list(range(4, 12))
    assert [row["image_path"] for row in result.pictures] == ["0.png", "1.png", "2.png", "11.png"]
    assert len(result.latents) == 4
    out = capsys.readouterr().out
    assert "12 rows read, 4 kept" in out and "most often because: image missing" in out
    fresh = build(tmp_path, [rows[k] for k in (0, 1, 2, 11)], name="fresh")
    assert (result.latents == fresh.latents).all() and "most often" not in capsys.readouterr().out


@pytest.mark.parametrize("step", ["to_rgb", "fit"])
def test_a_picture_that_cannot_be_converted_is_one_picture(tmp_path, monkeypatch, step):
    calls, whole = iter(range(9)), getattr(pictures, step)

    def failing(*arguments):
        if next(calls) == 2:
            raise MemoryError("no room")
        return whole(*arguments)
    monkeypatch.setattr(pictures, step, failing)
    result = build(tmp_path, entries(5))
    assert [(bad["line"], bad["reason"], bad["detail"]) for bad in result.rejected] == [
        (3, "image cannot be read", "MemoryError: no room")]
    assert len(result.latents) == 4


def test_an_unknown_key_that_is_no_text_is_counted(tmp_path, capsys):
    result = build(tmp_path, [*entries(3), entry(3, split="test") | {"\ud800": 1, "id": 2}])
    assert result.meta["counts"]["notes"] == {r"unknown key '\ud800'": 1, "unknown key 'id'": 1}
    assert r"unknown key '\ud800' 1" in capsys.readouterr().out


def test_a_full_memory_says_batch_size(tmp_path, refuse, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    def load(*arguments):
        vae = load_vae(*arguments)
        vae.encode = full
        return vae
    monkeypatch.setattr(prepare, "load_vae", load)
    given = ["--base", BASE, "--input", write_rows(tmp_path, entries(3)), "--boxes", "unit", "--name", "x"]
    assert "--batch_size 8 is too much" in refuse(*given, "--workers", 1)


@pytest.mark.parametrize("name", ["latents", "contexts", "phrases"])
def test_a_full_disk_ends_in_one_line(tmp_path, refuse, monkeypatch, name):
    append = prepare.Growing.append

    def full(file, values):
        if file.file.name.endswith(f"{name}.npy"):
            raise OSError(28, "No space left on device")
        append(file, values)
    monkeypatch.setattr(prepare.Growing, "append", full)
    given = ["--base", BASE, "--input", write_rows(tmp_path, entries(3)), "--boxes", "unit", "--name", "x"]
    assert re.search("cannot write .*No space left", refuse(*given, "--workers", 1))


def test_latents_that_leave_float16_are_refused(tmp_path, monkeypatch):
    def overflowing(*arguments):
        vae = load_vae(*arguments)
        encode = vae.encode
        vae.encode = lambda image: [part * torch.where(image[:, :1, :1, :1] > 0.99, 1e9, 1) for part in encode(image)]
        return vae
    monkeypatch.setattr(prepare, "load_vae", overflowing)
    path = write_rows(tmp_path, entries(5))
    saved(path.parent / "2.png", Image.new("RGB", (30, 24), "white"))
    result = build(tmp_path, path, "--batch_size", 4)
    assert [(bad["line"], bad["reason"]) for bad in result.rejected] == [(3, "latents are not finite in float16")]
    assert np.isfinite(result.latents).all()
    assert [row["image_path"] for row in result.pictures] == [f"{k}.png" for k in (0, 1, 3, 4)]


def test_the_images_may_be_elsewhere_and_the_rows_gzipped(tmp_path):
    plain = build(tmp_path, entries(4))
    shutil.copytree(tmp_path / "raw", tmp_path / "there")
    text = (tmp_path / "raw" / "in.jsonl").read_text()
    for picture in (tmp_path / "raw").glob("*.png"):
        picture.unlink()
    text = text.replace("\n", "\r\n").replace("1.png", str(tmp_path / "there/1.png"))
    (zipped := tmp_path / "rows.gz").write_bytes(gzip.compress(("\ufeff" + text).encode()))
    result = build(tmp_path, zipped, "--images", tmp_path / "there", name="zipped")
    assert (plain.latents == result.latents).all() and (plain.boxes == result.boxes).all()


# ---------------------------------------------------------------------------------------------------------------- COCO
def coco(tmp_path, rows, **more):
    """The same content as the rows, whose boxes are in 0..1 of 30 x 24, in COCO's two files."""
    names = sorted({item["name"] for row in rows for item in row["objects"]})
    instances = {"images": [{"id": 100 - k, "file_name": row["image_path"]} for k, row in enumerate(rows)],
                 "categories": [{"id": 7 + k, "name": name} for k, name in enumerate(names)], "annotations": []}
    captions = {"annotations": []}
    for k, row in enumerate(rows):
        for item in row["objects"]:
            x0, y0, x1, y1 = (edge * side for edge, side in zip(item["bbox"], (30, 24, 30, 24)))
            instances["annotations"].append({
                "id": len(instances["annotations"]), "image_id": 100 - k, "iscrowd": 0,
                "category_id": 7 + names.index(item["name"]),
                "bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": [[1.0, 2.0]]})
        captions["annotations"] += [{"id": 500 + k, "image_id": 100 - k, "caption": "another"},
                                    {"id": 300 - k, "image_id": 100 - k, "caption": row["caption"]}]
    for name, content in (("instances", instances), ("captions", captions)):
        more.get(name, lambda content: None)(content)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return ["--coco", tmp_path / "instances.json", "--captions", tmp_path / "captions.json", "--images",
            tmp_path / "raw"]


def build_coco(tmp_path, flags, *more):
    return load(prepare.main(["--base", str(BASE), *map(str, flags), "--name", "coco", "--out_dir",
                              str(tmp_path / "out"), "--workers", "1", *map(str, more)]))


def many(n=24):
    return [entry(k, objects=[{"name": f"cat {i}", "bbox": [0.25, 0.25, 0.75, 0.5 + 0.125 * i]}
                              for i in range(k % 3 + 1)])
            for k in range(n)]


def test_coco_and_json_lines_give_the_same(tmp_path, capsys):
    rows = many()
    lines, other = build(tmp_path, rows), build_coco(tmp_path, coco(tmp_path, rows))
    for name in lines.meta["arrays"]:
        one, two = getattr(lines, name), getattr(other, name)
        assert np.array_equal(one, two) if name != "boxes" else np.abs(one - two).max() < 1e-6, name
    assert lines.texts == other.texts and len(set(lines.split)) > 1 and not other.rejected
    with pytest.raises(SystemExit):                 # other captions alone are another set
        build_coco(tmp_path, coco(tmp_path, [row | {"caption": "a red box"} for row in rows]))
    assert "24 pictures of instances.json already (what differs: captions)" in capsys.readouterr().err


def test_what_coco_leaves_out(tmp_path):
    def crowd(content):
        content["annotations"][0]["iscrowd"] = 1
        content["annotations"][1]["image_id"] = 12345
        content["annotations"][3]["category_id"] = 99

    def silent(content):
        del content["annotations"][8:10]
        content["annotations"][3]["caption"], content["annotations"][5]["caption"] = " ", None
    write_rows(tmp_path, rows := many(8))
    result = build_coco(tmp_path, coco(tmp_path, rows, instances=crowd, captions=silent))
    # rows have 1, 2, 3, 1, 2, 3, 1, 2 boxes
    assert result.meta["counts"]["notes"] == {"annotation of an unknown image": 1, "crowd left out": 1}
    assert [(bad["image"], bad["reason"]) for bad in result.rejected] == [
        (96, "no caption"), (98, "empty phrase"), (100, "no objects")]
    assert sorted(np.bincount(np.nonzero(result.phrase >= 0)[0]).tolist()) == sorted([1, 2, 1, 3, 1, 2])
    assert [row["caption"] for row in result.pictures] == ["another"] * 2 + [f"a cat {k % 3}" for k in (3, 5, 6, 7)]


@pytest.mark.parametrize("change, word", [
    ({"instances": lambda content: content.pop("categories")},
     "instances.json is no such file of COCO: it has no list 'categories'"),
    ({"captions": lambda content: content.update(annotations={})}, "captions.json is no such file of COCO"),
    ({"instances": lambda content: content["images"].append({"id": 1})}, "lacks one of id, file_name"),
    ({"instances": lambda content: content["annotations"].append({"id": 1, "image_id": 1})},
     "lacks one of id, image_id"),
    ({"captions": lambda content: content["annotations"].append({"id": 1, "image_id": 1})}, "captions.json: {"),
    ({"instances": lambda content: content["images"].append(content["images"][0])},
     "the image id 100 is there twice"),
    *(({"instances": lambda content, part=part, key=key, odd=odd: content[part][0].update({key: odd})},
       f"instances.json: the {key} of {{") for odd in ([1], {}, "7", None, 7.0) for part, key in (
           ("images", "id"), ("annotations", "image_id"), ("annotations", "category_id"), ("categories", "id"))),
    *(({"captions": lambda content, key=key, odd=odd: content["annotations"][0].update({key: odd})},
       f"captions.json: the {key} of {{") for odd in ([1], {}, "7", None) for key in ("id", "image_id"))])
def test_wrong_files_of_coco(tmp_path, refuse, change, word):
    (tmp_path / "raw").mkdir()
    assert word in refuse("--base", BASE, *coco(tmp_path, many(2), **change), "--name", "x")


# -------------------------------------------------------------------------------------------------------------- splits
def test_splits_by_name_else_by_hash_of_the_picture():
    rows = [prepare.read_row(k, entry(k, f"caption {k % 2}")) for k in range(400)] * 2
    split, moved = prepare.assign_splits(rows)
    for row, k in zip(rows, split):
        share = int(hashlib.sha1(row.image_path.encode()).hexdigest()[:16], 16) / 2**64
        assert k == (0 if share < 0.9 else 1 if share < 0.95 else 2)
    assert moved == 0 and (np.bincount(split) > 10).all()
    named = [row._replace(split=name) for row, name in zip(rows, ["train", "val", "test"])]
    assert prepare.assign_splits(named)[0].tolist() == [0, 1, 2]


def test_a_picture_is_in_one_split_however_its_path_is_spelt():
    spelt = [[f"{k}.png", f"./{k}.png", f"a/..//{k}.png"] for k in range(120)]
    rows = [prepare.read_row(0, entry(0, f"caption {way}") | {"image_path": paths[way]})
            for way in range(3) for paths in spelt]
    split = prepare.assign_splits(rows)[0].reshape(3, 120)
    assert (split == split[0]).all() and len(set(split[0])) == 3
    for said in ("train", "val", "test"):           # the split of one row is that of its picture's others
        named = [row._replace(split=said) if 120 <= i < 150 else row for i, row in enumerate(rows)]
        again = prepare.assign_splits(named)[0].reshape(3, 120)
        assert (again[:, :30] == prepare.SPLITS.index(said)).all() and (again[:, 30:] == split[:, 30:]).all()
    kept, rejected = prepare.collect_rows([rows[0], rows[120], rows[0]._replace(number=1, image_path=spelt[0][1])])
    assert len(kept) == 2 and rejected[0].reason == "duplicate"


def test_an_empty_val_is_cut_from_train_by_whole_pictures(tmp_path, capsys):
    rows = [prepare.read_row(k, entry(k // 2, f"caption {k}", split="train")) for k in range(80)]
    split, moved = prepare.assign_splits(rows)
    lowest = sorted(range(40), key=lambda k: hashlib.sha1(f"{k}.png".encode()).hexdigest())[:2]
    assert moved == 4 and {rows[k].image_path for k in np.flatnonzero(split == 1)} == {f"{k}.png" for k in lowest}
    result = build(tmp_path, [entry(k, split="train") for k in range(3)])
    assert result.meta["counts"]["by_split"] == {"train": 2, "val": 1, "test": 0}
    assert result.meta["counts"]["val_cut_from_train"] == 1
    assert "val was empty: 1 train rows" in capsys.readouterr().out


def test_limit_is_a_seeded_sample_in_the_order_of_the_source(tmp_path):
    rows = many(20)
    runs = [build(tmp_path, rows, "--limit", 8, "--seed", seed, "--force") for seed in (0, 0, 1)]
    asked = [[int(row["image_path"][:-4]) for row in run.pictures] for run in runs]
    assert asked[0] == asked[1] == sorted(asked[0]) != asked[2] and len(asked[0]) == runs[0].meta["counts"]["read"] == 8
    assert [k - 1 for k in sorted(random.Random(0).sample(range(1, 21), 8))] == asked[0]
    flags = coco(tmp_path, rows, instances=lambda content: content["annotations"][0].update(iscrowd=1))
    result = build_coco(tmp_path, flags, "--limit", 8)
    assert len(result.pictures) == 8 and result.meta["counts"]["notes"] == {"crowd left out, in the whole file": 1}


# ----------------------------------------------------------------------------------------------------------- old sets
def test_any_number_of_workers_and_any_batch_of_pictures_give_the_same_bytes(tmp_path):
    rows = many(23)[:20] + ["{"] + many(23)[20:]
    one = contents(build(tmp_path, rows).folder)
    again = contents(build(tmp_path, rows, "--workers", 2, "--force").folder)
    assert one == again and len(one) == 11 and json.loads(one["rejected.jsonl"])["line"] == 21
    other, latents = build(tmp_path, rows, "--batch_size", 3), np.load(io.BytesIO(one["latents.npy"]))
    assert np.abs(latents.astype(float) - other.latents).max() < 1e-3 and other.latents.std() > 0.05


def test_latents_can_be_memory_mapped(tmp_path):
    file = prepare.Growing(tmp_path / "x.npy", np.float16, (2, 3))
    blocks = [np.random.default_rng(k).random((n, 2, 3)).astype(np.float16) for k, n in enumerate((1, 0, 9, 12345))]
    for block in blocks:
        file.append(block)
    file.close()
    found = np.load(tmp_path / "x.npy", mmap_mode="r", allow_pickle=False)
    assert isinstance(found, np.memmap) and np.array_equal(found, np.concatenate(blocks))


def test_a_finished_set_is_left_alone_and_a_change_is_noticed(tmp_path, capsys):
    folder, base = tmp_path / "out" / "set", tmp_path / "base"
    shutil.copytree(BASE, base)

    def asked(rows=None, *flags, force=False):
        """left, built or, if it is refused, what differs."""
        before = (folder / "split.npy").stat().st_ino if (folder / "split.npy").exists() else None
        capsys.readouterr()
        try:
            build(tmp_path, rows or entries(4), *flags, base=base, force=force)
            result = "left" if "already there" in capsys.readouterr().out else "built"
        except SystemExit:
            result = re.search(r"4 pictures of in.jsonl already \(what differs: (.*)\): --", capsys.readouterr().err)[1]
        assert (result == "built") == ((folder / "split.npy").stat().st_ino != before)
        return result

    def built_again():
        return (asked(force=True), asked()) == ("built", "left")
    assert asked() == "built" and asked() == "left" and built_again()
    assert asked(None, "--workers", 2, "--batch_size", 2) == "left"
    shutil.copytree(tmp_path / "raw", tmp_path / "there")
    for flags in (["--slots", 5], ["--aspect", "pad"], ["--min_area", 0.01], ["--size", 20], ["--images",
                                                                                              tmp_path / "there"]):
        assert asked(None, *flags) == flags[0][2:]
    assert asked(entries(3)) == "input" and asked(entries(3), "--slots", 5) == "input, slots" and asked() == "left"
    for part, word, change in (("vae", "base", {"scaling_factor": 0.3}), ("text_encoder", "texts", {
            "layer_norm_eps": 1e-3})):
        config = json.loads((base / part / "config.json").read_text())
        (base / part / "config.json").write_text(json.dumps(config | change))
        assert asked() == word and built_again()
        path, = (base / part).glob("*.safetensors")
        save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path)
        assert asked() == word and built_again()
    replace("tokenizer/tokenizer_config.json", '"model_max_length": 12', '"model_max_length": 9')(base)
    assert asked() == "texts" and built_again() and load(folder).contexts.shape[1] == 9
    for damage in (lambda: (folder / "latents.npy").unlink(), lambda: (folder / "meta.json").write_text("{"),
                   lambda: (folder / "texts.json").unlink(), lambda: replace("meta.json", '"format": 1', '"format": 0')(
                       folder)):
        damage()
        assert asked() == "built"
    (folder / "latents.npy").unlink()               # nothing is lost by another set in its place
    assert asked(entries(3)) == "built"


def test_a_failed_run_leaves_the_old_set_and_no_litter(tmp_path, capsys):
    before = contents(build(tmp_path, entries(3)).folder)
    with pytest.raises(SystemExit):
        build(tmp_path, [entry(0) | {"image_path": "no.png"}])
    assert "no row is left for training; rejected: image missing 1 (no.png)" in capsys.readouterr().err
    assert contents(tmp_path / "out" / "set") == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["set"]
    with pytest.raises(SystemExit):
        build(tmp_path, [entry(k, split="test") for k in range(3)])
    assert "no row is left for training (3 for val and test)" in capsys.readouterr().err
    (tmp_path / "out" / "mine").mkdir()
    with pytest.raises(SystemExit):
        build(tmp_path, entries(3), name="mine")
    assert "no data set" in capsys.readouterr().err and not list((tmp_path / "out" / "mine").iterdir())


# -------------------------------------------------------------------------------------------------------- command line
@pytest.mark.parametrize("flags, word", [
    ("--base B --input no.jsonl --name x", "--boxes is missing"),
    ("--input no.jsonl --boxes unit --name x", "--base is missing"),
    ("--base B --input no.jsonl --boxes unit --name x", "no file no.jsonl"),
    ("--base B --boxes unit --name x", "--input"),
    ("--base B --input x --boxes percent --name x", "--boxes"), ("--base B --input x --boxes unit", "--name (missing)"),
    ("--base B --input x --boxes unit --name ../x", "plain folder name"), ("--demo --base B", "leave out --base"),
    ("--demo --input x", "not allowed with"), ("--demo --limit 192", "--limit 192"),
    ("--demo --boxes unit", "leave out --boxes"),
    ("--base B --coco x --images . --name x", "--coco needs --captions"),
    ("--base B --coco x --captions y --name x", "needs --images"),
    ("--base B --coco x --captions y --images . --boxes unit --name x", "--boxes: boxes of COCO are xywh in pixels"),
    ("--base B --input x --captions y --boxes unit --name x", "--captions belongs to --coco"),
    ("--base B --input x --boxes unit --name x --dtype float16", "float16 many a VAE overflows"),
    ("--base B --input x --boxes unit --name x --min_area 2", "--min_area 2.0"),
    ("--base B --input x --boxes unit --name x --slots 0", "--slots 0"),
    ("--base B --input x --boxes unit --name x --images no", "no folder no"),
    ("--base B --input x --boxes unit --name x --size 19", "--size 19: the VAE divides by 2"),
    ("--base B --input x --boxes unit --name x --embeddings no", "--embeddings: there is no file no"),
    ("--base nowhere --input x --boxes unit --name x", "nowhere has no config.json"),
    ("--base B --input x --boxes unit --name x --device tpu", "--device tpu")])
def test_wrong_flags_end_in_one_line(tmp_path, refuse, monkeypatch, flags, word):
    write_rows(tmp_path, entries(3)).rename(tmp_path / "raw" / "x")
    monkeypatch.chdir(tmp_path / "raw")
    assert word in refuse(*[str(BASE) if flag == "B" else flag for flag in flags.split()])


@pytest.mark.parametrize("part, change, word", [
    ("unet", {"sample_size": None}, "sample_size is None, so say --size PIXELS"),
    ("unet", {"sample_size": [9, 7]}, "sample_size is [9, 7]"),
    ("vae", {"latent_channels": 8}, "a VAE of 3 colours and 8 channels of latents does not fit a UNet of 4"),
    ("unet", {"cross_attention_dim": 32}, "the text encoder has context of width 24, the UNet takes 32"),
    ("text_encoder", {"vocab_size": 90}, "the tokenizer has ids up to 98, the text encoder knows 90"),
    ("vae", {"scaling_factor": "x"}, "scaling_factor"),
    ("text_encoder", {"model_type": "t5"}, "give its embeddings as a file")])
def test_a_base_that_does_not_fit(tmp_path, refuse, part, change, word):
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    path = base / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert word in refuse("--base", base, "--input", write_rows(tmp_path, entries(3)), "--boxes", "unit", "--name", "x")


def test_as_a_command(tmp_path):
    def call(*arguments):
        return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True,
                              cwd=tmp_path)

    given = ["--base", BASE, "--name", "set", "--out-dir", "out", "--workers", 2]
    missing = call(*given, "--input", "missing.jsonl", "--boxes", "unit")
    assert missing.returncode == 2 and missing.stdout == "" and not (tmp_path / "out").exists()
    assert re.fullmatch("error: --input: there is no file missing.jsonl.*\n", missing.stderr)
    write_rows(tmp_path, ["{", *entries(5)])
    good = call(*given, "--input", "raw/in.jsonl", "--boxes", "unit")
    assert good.returncode == 0 and good.stderr == "", good.stderr
    assert "6 rows read, 5 kept" in good.stdout and "broken JSON 1" in good.stdout


# ---------------------------------------------------------------------------------------------------------------- demo
def test_the_demo_set(tmp_path, capsys):
    folder = prepare.main(["--demo", "--limit", "400", "--out_dir", str(tmp_path)])
    result, (table, rows) = load(folder), demo.scenes(208)
    assert folder.name == "demo" and result.meta["kind"] == "toy" and result.meta["slots"] == 3
    assert np.bincount(result.split).tolist() == [208, 96, 96]
    assert result.meta["counts"]["by_split"] == {"train": 208, "val": 96, "test": 96}
    for k, name in enumerate(("train", "val", "test")):
        assert (np.flatnonzero(result.split == k) == rows[name]).all()
    assert np.array_equal(result.labels, table["labels"]) and np.array_equal(result.colours, table["colours"])
    assert {name: str(getattr(result, name).dtype) for name in result.meta["arrays"]} == {
        "labels": "uint8", "colours": "int64", "kinds": "int64", "boxes": "float32", "phrase": "int32",
        "caption": "int32",
        "split": "uint8", "contexts": "int64", "phrases": "int64"}
    assert (result.contexts.shape, result.phrases.shape, result.boxes.shape) == ((401, 14), (12, 5), (400, 3, 4))
    assert result.contexts[0].tolist() == [demo.ID["<start>"], demo.ID["<end>"]] + [0] * 12
    there = result.phrase >= 0
    assert np.array_equal(there, table["present"] > 0) and not result.boxes[~there].any()
    assert (np.diff(there.astype(int)) <= 0).all()
    assert np.array_equal(result.boxes[there], table["boxes"][there])
    for i in range(400):                            # a caption names what the phrases of its boxes say
        said = demo.text(result.contexts[result.caption[i]])
        assert sorted(said.split(" and ")) == sorted(demo.text(result.phrases[k]) for k in result.phrase[i] if k >= 0)
    colour, shape = divmod(result.phrase[0, 0], 3)
    assert demo.text(result.phrases[result.phrase[0, 0]]) == f"a {demo.COLOURS[colour]} {demo.SHAPES[shape]}"
    assert (colour, shape) == (result.colours[0, 0], result.kinds[0, 0])
    before = contents(folder)
    prepare.main(["--demo", "--limit", "400", "--out_dir", str(tmp_path)])
    assert "already there" in capsys.readouterr().out
    assert contents(prepare.main(["--demo", "--limit", "400", "--out_dir", str(tmp_path), "--force"])) == before
    assert len(load(prepare.main(["--demo", "--limit", "401", "--out_dir", str(tmp_path)])).labels) == 401
