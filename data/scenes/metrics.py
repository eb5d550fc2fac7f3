"""Does a picture hold its objects where the boxes say? Exact scores of the toy, where colours tell objects apart."""
import numpy as np

from data.scenes.demo import PALETTE, SIZE, shape_masks

COLUMNS = ("acc50", "miou", "coverage", "presence", "shape")


def labels_of(images):
    """images (B, 3, S, S) in -1..1 -> (B, S, S), the nearest colour of PALETTE per pixel"""
    pixels = (images.float().cpu().numpy() / 2 + 0.5).clip(0, 1)
    return ((pixels[:, None] - PALETTE[None, :, :, None, None]) ** 2).sum(2).argmin(1)


def iou(a, b):
    side = (np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(0)
    both = side.prod()
    return both / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both)


def tight_box(found, least):
    """The box (4,) around the rows and columns of a mask (S, S) with `least` pixels or more, so that with 2 a stray one
    makes no edge; None if there are none."""
    ys, xs = (np.flatnonzero(found.sum(axis) >= least) for axis in (1, 0))
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], np.float32) if len(xs) and len(ys) else None


def score(labels, boxes, present, colours, kinds):
    """labels (B, S, S) into PALETTE, the others as demo.draw makes them (arrays) -> dict of means over objects.

    acc50: share whose colour's tight box overlaps theirs with IoU >= .5; miou: that IoU; coverage: share of the
    object's pixels with its colour; presence: share with 12 pixels of its colour or more; shape: share whose mask in
    the tight box is nearest to the right one of three templates. n: objects; without any the means are NaN."""
    total, n = dict.fromkeys(COLUMNS, 0.0), 0
    for row, i in zip(*np.nonzero(present)):
        n, found, box = n + 1, labels[row] == 1 + colours[row, i], boxes[row, i] * SIZE
        asked = shape_masks(kinds[row, i], box)
        total["coverage"] += (found & asked).sum() / asked.sum()
        tight, whole = (tight_box(found, least) for least in (2, 1))
        if found.sum() < 12 or tight is None:
            continue
        overlap, likeness = iou(tight, box), np.zeros(3)
        for around in (tight, whole):               # the tip of a triangle is a pixel wide
            templates = shape_masks(np.arange(3), np.tile(around, (3, 1)))
            likeness = np.maximum(likeness, (found & templates).sum((1, 2)) / (found | templates).sum((1, 2)))
        total["presence"] += 1
        total["miou"] += overlap
        total["acc50"] += overlap >= 0.5
        total["shape"] += likeness.argmax() == kinds[row, i]
    return {name: float(x) / n if n else float("nan") for name, x in total.items()} | {"n": n}
