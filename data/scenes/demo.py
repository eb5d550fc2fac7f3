"""The demo set: 32 x 32 pictures of one to three shapes, whose boxes, masks and captions are exact.

Each object of a picture has a colour of its own, so that any picture, drawn or generated, tells by its nearest colours
where each object is: grounding is measured without a detector."""
import functools

import numpy as np

# n rows, N = 3 slots for objects, S = 32 pixels a side, K tries to place them
SIZE, SLOTS, SIDES, TRIES = 32, 3, (8, 14), 40
PALETTE = np.array([[.93, .93, .9], [.85, .15, .15], [.15, .65, .2], [.15, .3, .85], [.9, .75, .1]], np.float32)
COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle")
WORDS = ("<pad>", "<start>", "a", "and", *COLOURS, *SHAPES, "<end>")         # <end> has the largest id: pooled there
ID = {word: i for i, word in enumerate(WORDS)}
LENGTH = 14                                         # <start> a red circle and a ... triangle <end>: at most 13
SPLITS = {"train": 24000, "val": 96, "test": 96}


def shape_masks(kinds, boxes):
    """kinds (...) of SHAPES, boxes (..., 4) xyxy in pixels -> bool (..., S, S)"""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) + 0.5
    x0, y0, x1, y1 = (boxes[..., i, None, None].astype(np.float32) for i in range(4))
    u, v = (2 * x - x0 - x1) / (x1 - x0), (2 * y - y0 - y1) / (y1 - y0)      # -1..1 inside
    square = (np.abs(u) < 1) & (np.abs(v) < 1)
    kinds = np.asarray(kinds)[..., None, None]
    return square & np.where(kinds == 0, u * u + v * v <= 1, (kinds == 1) | (2 * np.abs(u) <= v + 1))


def touch(a, b):
    """Boxes (..., 4) in pixels: less than a pixel apart?"""
    return (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) > -1).all(-1)


def draw(n, rng):
    """-> dict of labels (n, S, S) uint8 into PALETTE, boxes (n, N, 4) float32 xyxy in 0..1, present (n, N) float32,
    colours and kinds (n, N), captions (n, LENGTH) and phrases (n, N, 5), ids of WORDS."""
    side = rng.integers(SIDES[0], SIDES[1] + 1, (n, TRIES, SLOTS, 2))
    corner = (rng.random(side.shape) * (SIZE + 1 - side)).astype(int)
    boxes = np.concatenate([corner, corner + side], -1)
    two = ~touch(boxes[:, :, 0], boxes[:, :, 1])
    three = two & ~touch(boxes[:, :, 0], boxes[:, :, 2]) & ~touch(boxes[:, :, 1], boxes[:, :, 2])
    count = rng.integers(1, SLOTS + 1, n)
    count = np.where((count == 3) & ~three.any(1), 2, count)
    fits = np.select([count[:, None] == 3, count[:, None] == 2], [three, two], np.ones_like(two))
    boxes = boxes[np.arange(n), fits.argmax(1)]
    colours = rng.random((n, len(COLOURS))).argsort(1)[:, :SLOTS]
    kinds = rng.integers(0, len(SHAPES), (n, SLOTS))
    present = np.arange(SLOTS) < count[:, None]
    masks = shape_masks(kinds, boxes) & present[..., None, None]             # they do not overlap
    labels = (masks * (1 + colours)[..., None, None]).sum(1).astype(np.uint8)
    phrases = np.stack([np.full_like(colours, ID["<start>"]), np.full_like(colours, ID["a"]), ID[COLOURS[0]] + colours,
                        ID[SHAPES[0]] + kinds, np.full_like(colours, ID["<end>"])], -1)
    captions = np.zeros((n, LENGTH), np.int64)
    for row in range(n):
        ids = [ID["<start>"]]
        for i in rng.permutation(count[row]):
            ids += [ID["and"]] * (len(ids) > 1) + phrases[row, i, 1:4].tolist()
        captions[row, :len(ids) + 1] = [*ids, ID["<end>"]]
    return {"labels": labels, "boxes": (boxes / SIZE).astype(np.float32), "present": present.astype(np.float32),
            "colours": colours, "kinds": kinds, "captions": captions, "phrases": phrases}


@functools.lru_cache(maxsize=1)
def scenes(train=SPLITS["train"]):
    """-> (arrays of all rows, dict of split -> its rows), always the same; the held-out ones whatever the others."""
    sizes = SPLITS | {"train": train}
    parts = []
    for seed, (split, n) in enumerate(sizes.items()):
        rng = np.random.default_rng([11, seed])
        parts += [draw(min(2000, n - i), rng) for i in range(0, n, 2000)]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    ends = np.cumsum(list(sizes.values()))
    return arrays, {split: np.arange(end - n, end) for (split, n), end in zip(sizes.items(), ends)}


def text(ids):
    return " ".join(word for word in (WORDS[i] for i in ids) if word[0] != "<")
