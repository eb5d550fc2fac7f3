"""What only evaluates: cosines, library search, peak overlap, what to compare with, mirror plots.

Everything here works on spectra (n, bins): torch float32, bin j is m/z j, linear intensities, base peak 1. `data` is
what train_student.load_data returns, rows are int64 indices of its molecules."""
import json
from pathlib import Path

import numpy as np
import torch

from data.molecules.metrics import table_lines

COSINES = {"cosine": (0, 1), "weighted": (1, 0.5), "stein": (3, 0.6)}  # powers of m/z, intensity; Stein and Scott 1994
TIE = 1e-6                                         # above float32 noise: one spectrum twice in a library is a tie
WINDOW = 5                                         # Da
MOST = 4096                                        # molecules of a split that a report looks at
CEILING = 100                                      # molecules measured twice: of fewer there is no ceiling of a split


def weigh(spectra, mass_power, intensity_power):
    """Intensities (n, bins) >= 0 -> (n, bins) rows of m/z^mass_power * intensity^intensity_power, each of length 1.

    An empty spectrum stays zero. Raises ValueError on intensities that are negative or not finite."""
    bad = ~((spectra >= 0) & spectra.isfinite()).all(1)
    if bad.any():
        raise ValueError(f"{int(bad.sum())} of {len(bad)} spectra have intensities that are negative or not finite, "
                         f"the first one is row {int(bad.nonzero()[0])}")
    smallest = torch.finfo(spectra.dtype).tiny
    spectra = spectra / spectra.amax(1, keepdim=True).clamp(min=smallest)      # a square must not underflow
    weighed = torch.arange(spectra.shape[1], dtype=spectra.dtype) ** mass_power * spectra ** intensity_power
    return weighed / weighed.norm(dim=1, keepdim=True).clamp(min=smallest)


def library_ranks(queries, library, truth, query_mass, library_mass, window=None, drop=None, chunk=512):
    """Where the right entry of a library stands for each query, by cosine -> ranks (Q,) float64, 1 is best.

    queries (Q, bins), library (L, bins): what weigh() returned; truth (Q,) the right entries; masses in Da, (Q,) and
    (L,). Entries whose cosine is the right one's within TIE share the average of their ranks. Candidates are all
    entries, or those with a mass within window of the query's, less entry drop (Q,) (-1: none), and always the right
    one."""
    truth = torch.as_tensor(truth)
    query_mass, library_mass = torch.as_tensor(query_mass), torch.as_tensor(library_mass)
    ranks = np.empty(len(queries))
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        cosine = queries[part] @ library.T
        place = torch.arange(len(cosine)), truth[part]
        right = cosine[place][:, None].clone()
        if window is not None:
            cosine[(library_mass - query_mass[part, None]).abs() > window] = -2
        if drop is not None:
            dropped = torch.as_tensor(drop)[part]
            cosine[place[0][dropped >= 0], dropped[dropped >= 0]] = -2
        cosine[place] = right[:, 0]
        better, as_good = (cosine > right + TIE).sum(1), (~(cosine < right - TIE)).sum(1)    # NaN ties with all
        ranks[part] = (better + as_good + 1).numpy() / 2
    return ranks


def recall(ranks, k):
    """Share of the ranks up to k."""
    return float(np.mean(np.asarray(ranks) <= k))


def largest(spectra, k):
    """The k (n,) largest peaks of each row as bool (n, bins); of equal ones the lower m/z. A bin of 0 is no peak."""
    values, order = spectra.sort(dim=1, descending=True, stable=True)
    chosen = (torch.arange(spectra.shape[1]) < k[:, None]) & (values > 0)
    return torch.zeros_like(chosen).scatter(1, order, chosen)


def peak_overlap(pred, true, k):
    """Mean share of the k largest true peaks that are among the k largest predicted ones; where a spectrum has fewer
    true peaks, k is their number."""
    k = (true > 0).sum(1).clamp(1, k)
    return float(((largest(pred, k) & largest(true, k)).sum(1) / k).mean())


def describe(pred, rows, measured, mass, drop=None):
    """All numbers of predicted spectra (k, bins) of molecules rows (k,) -> dict name -> number.

    measured (n, bins): one spectrum per molecule of all splits, the library; mass (n,) Da. drop (k,): a molecule that
    is no candidate for each of them, because pred is a copy of it (-1: none).
    The three mean cosines with the molecule's own measured spectrum; R@k, the share of right entries among the k first,
    by weighted cosine. A: the predicted spectrum searches the measured library. N: the measured spectrum searches the
    library in which the predictions stand for these molecules (NEIMS, Wei et al. 2019). +-5 Da: among candidates of
    about the right mass. peaks@k: peak_overlap(). overlap_all10: the shared ones of the 10 largest peaks / 10 always,
    so that a spectrum with fewer than 10 peaks cannot reach 1; elsewhere this has been called Recall@10, which it is
    not."""
    true, numbers = measured[rows], {"n": len(rows)}
    for name, powers in COSINES.items():
        numbers[name] = float((weigh(pred, *powers) * weigh(true, *powers)).sum(1).mean())
    library, query = weigh(measured, *COSINES["weighted"]), weigh(pred, *COSINES["weighted"])
    replaced = library.clone()
    replaced[rows] = query
    for protocol, queries, entries in ("A", query, library), ("N", library[rows], replaced):
        ranks = library_ranks(queries, entries, rows, mass[rows], mass, None, drop)
        numbers |= {f"{protocol} R@{k}": recall(ranks, k) for k in (1, 5, 10)}
        ranks = library_ranks(queries, entries, rows, mass[rows], mass, WINDOW, drop)
        numbers[f"{protocol} R@10 +-{WINDOW} Da"] = recall(ranks, 10)
    numbers |= {f"peaks@{k}": peak_overlap(pred, true, k) for k in (5, 10, 20)}
    ten = torch.full((len(rows),), 10)
    numbers["overlap_all10"] = float((largest(pred, ten) & largest(true, ten)).sum(1).float().mean() / 10)
    return numbers


# ------------------------------------------------------------------------------------------------ what to compare with
def nearest(data, rows, chunk=1024):
    """1-NN: the measured spectrum of the most similar training molecule, by Tanimoto of ECFP4 bits; the first one if
    several are. Never the molecule itself -> spectra (k, bins), which molecules they are of (k,) int64."""
    bits, train = data.bits(rows), data.rows["train"]
    assert len(train), "no training molecule to copy from"
    best, copied = np.full(len(rows), -np.inf), np.zeros(len(rows), np.int64)
    for start in range(0, len(train), chunk):
        others = train[start:start + chunk]
        theirs = data.bits(others)
        common = bits @ theirs.T
        similar = (common / (bits.sum(1)[:, None] + theirs.sum(1) - common).clamp(min=1)).numpy()
        similar[rows[:, None] == others] = -np.inf
        found = similar.argmax(1)
        value = similar[np.arange(len(rows)), found]
        copied[value > best] = others[found[value > best]]
        best = np.maximum(best, value)
    return data.measured()[copied], copied


def ceiling(data, split):
    """Molecules measured twice -> their rows (r,), the second spectra (r, bins), the split they are of: the asked one,
    or "all" if it has under CEILING of them."""
    rows, spectra = data.replicates()
    inside = np.isin(rows, data.rows[split])
    if inside.sum() >= CEILING:
        return rows[inside], spectra[torch.from_numpy(inside)], split
    return rows, spectra, "all"


# ------------------------------------------------------------------------------------------------------- table, picture
def report(data, predict, split, folder, log=print, extra={}, stem="final", beside={}):
    """The table of a split: the model, others beside it, 1-NN, a second measurement -> dict of all its numbers.

    predict and the values of beside: function rows (k,) -> spectra (k, bins). extra: further numbers of the model by
    name. Writes eval.json and samples/<stem>.png in folder; the molecules of the picture are always the same."""
    rows, measured, mass, columns = data.rows[split], data.measured(), data.mass, {}
    folder = Path(folder)
    if len(rows) > MOST:                            # of a large library searches would take hours
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:MOST])
    if not len(rows):
        log(f"no {split} molecules to evaluate on")
        return {}
    spectra = {name: function(rows).float().cpu() for name, function in {"model": predict, **beside}.items()}
    for name, pred in spectra.items():
        columns[name] = describe(pred, rows, measured, mass)
    if len(data.rows["train"]):
        copies, copied = nearest(data, rows)
        columns["1-NN"] = describe(copies, rows, measured, mass, copied)
    twice, second, of = ceiling(data, split)
    if len(twice):
        columns["replicate"] = describe(second, twice, measured, mass)
    for line in table_lines(columns):
        log(line)
    log(f"{split} molecules, R@k by weighted cosine in a library of {len(measured):,}; A: predicted spectra search it,")
    log("N: measured ones search it with the predicted ones in it")
    log(f"replicate: a second measured spectrum as the prediction, {len(twice):,} molecules of {of}" if len(twice) else
        "no replicate column: no molecule was measured twice")
    for name, value in extra.items():
        log(f"{name} {value:.4g}")
    about = {"split": split, "library": len(measured), "replicates_of": of, "columns": columns, "extra": {**extra}}
    about = json.loads(json.dumps(about), parse_constant=lambda name: None)            # NaN and Inf become null
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    (folder / "eval.json").write_text(json.dumps(about, indent=1))
    mirror_some(folder / f"samples/{stem}.png", data, predict, split, log)
    return about


def mirror_some(path, data, predict, split, log=print):
    """Mirror plots of nine molecules of a split, always the same, with their weighted cosine."""
    rows = np.sort(np.random.default_rng(0).permutation(data.rows[split])[:9])
    true, pred, pairs = data.measured()[rows], predict(rows).float().cpu(), []
    cosines = (weigh(true, *COSINES["weighted"]) * weigh(pred, *COSINES["weighted"])).sum(1).tolist()
    for row, cosine, up, down in zip(rows, cosines, true, pred):
        smiles = data.smiles(row)
        pairs.append((f"{cosine:.3f}  {smiles if len(smiles) <= 40 else smiles[:39] + '…'}", up, down))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    mirror(path, pairs, log)


def mirror(path, pairs, log=print):
    """A PNG of (title, measured (bins,), predicted (bins,)) pairs, three in a row: measured up, predicted down, each
    with its base peak 1. Without matplotlib it says so and writes nothing."""
    try:
        from matplotlib.figure import Figure        # not pyplot: no backend to choose, nothing global to close
    except ImportError:
        log(f"no {Path(path).name}: pip install matplotlib")
        return
    height = -(-len(pairs) // 3)
    figure = Figure(figsize=(15, 3 * height), layout="constrained")
    places = list(figure.subplots(height, 3, squeeze=False).flat)
    for axes, (title, measured, predicted) in zip(places, pairs):
        for spectrum, sign, color in (measured, 1, "black"), (predicted, -1, "tab:red"):
            spectrum = np.asarray(spectrum, np.float64)
            mass = np.flatnonzero(spectrum)
            axes.vlines(mass, 0, sign * spectrum[mass] / max(spectrum.max(), 1e-12), color=color, linewidth=1)
        axes.axhline(0, color="grey", linewidth=0.5)
        axes.set(ylim=(-1.05, 1.05), xlabel="m/z")
        axes.set_title(title, fontsize=9, parse_math=False)
    for axes in places[len(pairs):]:
        axes.set_axis_off()
    figure.savefig(path, format="png", dpi=80)
