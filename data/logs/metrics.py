"""What only evaluates: thresholds, detection scores, the floors (detectors without a neural net), a picture of scores.

Everything here works on distinct rows. `sequences` is a list of tuples of int (log keys), `counts` a float64 array (n,)
of how many sessions each row stands for; a factor on the counts of the normals scales a sample of them up to the full
set. No score and no threshold depends on the test's labels or on its other rows."""
import json
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np

START, END = "<start>", "<end>"                     # no int, so never equal to a key


def round_scores(scores):
    """To 1e-4, float64: equal bags of keys scored in different batches differ in the last bits, and a session that ties
    with the held-out one that set the threshold must not be flagged for that."""
    return np.round(np.asarray(scores, np.float64), 4)


def quantile_threshold(scores, counts, q):
    """The weighted quantile of rounded scores; a session is flagged if round_scores(score) > threshold.

    scores (n,), counts (n,) whole numbers, q in 0..1 -> float: np.quantile(np.repeat(round_scores(scores), counts), q,
    method="higher"), without repeating. "higher", so that the threshold is a score that a normal session really had.
    Raises ValueError on a score that is not finite and on no sessions at all."""
    scores, counts = round_scores(scores), np.asarray(counts, np.float64)
    assert 0 <= q <= 1 and scores.shape == counts.shape and scores.ndim == 1, (q, scores.shape, counts.shape)
    assert (counts >= 0).all() and (counts == counts.round()).all(), "counts that are no numbers of sessions"
    if not counts.sum() > 0:
        raise ValueError(f"no threshold: {len(scores)} rows of scores stand for {counts.sum():g} sessions")
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise ValueError(f"no threshold: {len(bad)} of {len(scores)} scores are not finite, the first one is "
                         f"row {bad[0]}: {scores[bad[0]]}")
    order = np.argsort(scores, kind="stable")
    upto = counts[order].cumsum()                   # sessions up to and with this row
    rank = math.ceil(q * (upto[-1] - 1))            # from 0, among the repeated scores
    return float(scores[order[np.searchsorted(upto, rank, side="right")]])


def distinct(sequence, anomalous):
    """Which distinct sequence each session is, int (n,), and is it anomalous, bool (n,) -> (index of one session of
    each pair of the two, counts float64)."""
    code = sequence.astype(np.int64) * 2 + anomalous
    _, index, counts = np.unique(code, return_index=True, return_counts=True)
    return index, counts.astype(np.float64)


def detection(flagged, anomaly, counts, lengths):
    """How well flags find anomalies -> dict of float, shares 0..1; what is undefined is nan.

    flagged, anomaly bool (n,), counts float64 (n,), lengths int (n,) in keys. The rows are distinct (sequence, label)
    pairs: the same sequence may stand there twice, once as normal and once as anomalous.
    P, R, F1 = 2PR / (P + R) and FPR = flagged normals / normals are weighted by counts. "F1 len>=10" leaves out the
    sessions under 10 keys, as LogBERT (Guo et al. 2021) does in its test; "F1 unique" counts each row once."""
    flagged, anomaly, counts, lengths = map(np.asarray, (flagged, anomaly, counts, lengths))
    assert flagged.dtype == anomaly.dtype == bool, (flagged.dtype, anomaly.dtype)      # ~ of an int is no negation
    assert flagged.shape == anomaly.shape == counts.shape == lengths.shape, \
        (flagged.shape, anomaly.shape, counts.shape, lengths.shape)

    def rates(weight):
        share = lambda part, whole: float(part / whole) if whole > 0 else math.nan
        hit, false, missed = (float(weight[rows].sum()) for rows in (flagged & anomaly, flagged & ~anomaly,
                                                                     ~flagged & anomaly))
        return {"P": share(hit, hit + false), "R": share(hit, hit + missed),
                "F1": share(2 * hit, 2 * hit + false + missed) if hit + missed > 0 else math.nan,
                "FPR": share(false, weight[~anomaly].sum())}
    return rates(counts) | {"F1 len>=10": rates(counts * (lengths >= 10))["F1"],
                            "F1 unique": rates((counts > 0).astype(np.float64))["F1"]}


# ----------------------------------------------------------------------------------------------------------- the floors
def floors(fit, fit_counts, hold, hold_counts, test, quantile):
    """What LogBERT has to beat -> dict of name: (scores of the test rows float64 (n_test,), threshold float).

    fit, hold: the training normals, hold being those kept out for thresholds; test: the rows to score; each a list of
    tuples of int. quantile in 0..1. A row is flagged if round_scores(score) > threshold.
    A look-up fits nothing that could be overfitted, so it knows fit and hold, and flags whatever neither has: its score
    counts what is unseen, its threshold is 0. PCA and the 2-gram LM know fit, their threshold is hold's quantile.
    Raises ValueError if hold is empty."""
    assert len(fit), "no row to fit the floors on"
    train = [*fit, *hold]
    keys, bags = {key for s in train for key in s}, {tuple(sorted(s)) for s in train}
    shortest, longest = min(map(len, train)), max(map(len, train))

    new_keys = np.array([sum(key not in keys for key in s) for s in test], np.float64)
    new_length = np.array([not shortest <= len(s) <= longest for s in test], np.float64)
    found = {"unseen event": (new_keys, 0.0), "unseen event or length": (new_keys + new_length, 0.0)}
    for n in (2, 3):
        known = {gram for s in train for gram in ngrams(s, n)}
        new_grams = [sum(gram not in known for gram in ngrams(s, n)) for s in test]
        found[f"unseen {n}-gram"] = np.array(new_grams, np.float64), 0.0
    new_bag = [tuple(sorted(s)) not in bags for s in test]
    found["unseen count vector"] = np.array(new_bag, np.float64), 0.0
    for name, model in ("PCA on idf counts", PCA(fit, fit_counts)), ("2-gram LM", BigramLM(fit, fit_counts)):
        found[name] = model.scores(test), quantile_threshold(model.scores(hold), hold_counts, quantile)
    return found


def ngrams(sequence, n):
    """Each key and the end with the n - 1 before it -> list of len(sequence) + 1 tuples."""
    padded = (*[START] * (n - 1), *sequence, END)
    return [padded[i:i + n] for i in range(len(sequence) + 1)]


class PCA:
    """Squared distance of a session's idf-weighted key counts from the plane that holds 95 % of the normals' variance.

    Xu et al. 2009 (SOSP) as in loglizer: weight log(N / sessions with the key), centred, squared prediction error."""
    def __init__(self, sequences, counts, variance=0.95):
        counts = np.asarray(counts, np.float64)
        self.column = {key: i for i, key in enumerate(sorted({key for s in sequences for key in s}))}
        bags = self.bags(sequences)
        self.idf = np.log(counts.sum() / (counts @ (bags > 0)))
        # a key that no session has: the idf of one that a single session has, the largest there can be
        self.idf_unseen = math.log(counts.sum())
        self.mean = counts @ (bags * self.idf) / counts.sum()
        centred = bags * self.idf - self.mean
        values, vectors = np.linalg.eigh(centred.T @ (counts[:, None] * centred))       # values ascend
        values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
        kept = np.searchsorted(values.cumsum(), variance * values.sum()) + 1
        self.plane = vectors[:, :kept]                                                  # (keys of fit, kept)

    def bags(self, sequences):
        """Counts of the keys that have a column, float64 (n, keys of fit)."""
        bags = np.zeros((len(sequences), len(self.column)))
        for bag, sequence in zip(bags, sequences):
            for key in sequence:
                if key in self.column:
                    bag[self.column[key]] += 1
        return bags

    def scores(self, sequences):
        """-> float64 (n,). Unseen keys have mean 0 and stand at right angles to the plane, so they only add."""
        centred = self.bags(sequences) * self.idf - self.mean
        error = ((centred - centred @ self.plane @ self.plane.T) ** 2).sum(1)
        unseen = [sum(n * n for key, n in Counter(s).items() if key not in self.column) for s in sequences]
        return error + self.idf_unseen ** 2 * np.array(unseen, np.float64)


class BigramLM:
    """-log p(key | key before) with additive smoothing, (count + w) / (count of the key before + w V).

    V: the keys of fit, the end, and one more that stands for whatever fit lacks."""
    def __init__(self, sequences, counts, w=0.01):
        self.pairs, self.before, self.w = Counter(), Counter(), w
        for sequence, count in zip(sequences, counts):
            for pair in ngrams(sequence, 2):
                self.pairs[pair] += count
                self.before[pair[0]] += count
        self.V = len({key for s in sequences for key in s}) + 2

    def nll(self, pair):
        return -math.log((self.pairs[pair] + self.w) / (self.before[pair[0]] + self.w * self.V))

    def scores(self, sequences):
        """The most surprising transition of each session, start and end included -> float64 (n,), nats."""
        return np.array([max(map(self.nll, ngrams(s, 2))) for s in sequences], np.float64)


# ------------------------------------------------------------------------------------------------------ table, picture
NATS = "bag", "bag top 2", "ordered", "ordered top 2", "both"           # detectors whose scores are -log p
TIE = 2e-4                                         # two rounding steps: equal sessions may differ by one


def report(data, score, explain, config, folder, log=print):
    """The table of a run, the model's detectors beside the floors -> dict of all its numbers.

    data: of train_logbert.load_data; score(rows) -> dict detector -> scores (n,); explain(row, texts) -> str.
    Thresholds are the config.quantile of the held-out sessions' scores, for -log p with config.margin on top, and are
    written down before a test row is read. Writes thresholds.json, eval.json, samples/final.txt, samples/scores.png."""
    def of(split):
        """One row of each (key sequence, anomalous or not), of test only those with a label, and counts; or all."""
        rows = data.rows[split][(data.labels[data.rows[split]] >= 0) | (split != "test")]
        index, counts = distinct(data.unique[rows], data.labels[rows] > 0)
        return (rows, np.ones(len(rows))) if config.use_gaps else (rows[index], counts)

    def tuples(rows):
        """Of the keys themselves: a look-up may tell unseen ones apart."""
        return [tuple(data.keys[data.start[row]:data.start[row] + data.length[row]].tolist()) for row in rows]

    (fit, fit_counts), (held, held_counts) = of("train"), of("val")
    thresholds = {name: quantile_threshold(scores, held_counts, config.quantile) + config.margin * (name in NATS) + TIE
                  for name, scores in score(held).items()}
    about = {"quantile": config.quantile, "margin": config.margin, "held_out": int(held_counts.sum()),
             "thresholds": thresholds}
    (folder / "thresholds.json").write_text(json.dumps(about, indent=1))
    (rows, counts), start = of("test"), time.perf_counter()
    if not len(rows):
        log(f"no labelled test sessions; the thresholds of {about['held_out']:,} sessions are in thresholds.json")
        return {}
    scores, labels = score(rows), data.labels[rows]
    seconds = time.perf_counter() - start
    found = floors(tuples(fit), fit_counts, tuples(held), held_counts, tuples(rows), config.quantile)
    known = list(found)
    found |= {name: (values, thresholds[name]) for name, values in scores.items()}
    table = compare(found, labels, data.meta["kinds"], counts, data.length[rows], data.meta["test_normals"])
    show(table, known, config.detector, log)
    log(f"{int(counts.sum()):,} test sessions, {int(counts[labels > 0].sum()):,} anomalous, {len(rows):,} distinct, "
        f"scored in {seconds:.1f} s; thresholds: quantile {config.quantile} of {about['held_out']:,} held-out normal "
        f"sessions, of -log p + {config.margin}")
    values, threshold = found[config.detector]
    if config.detector in NATS and threshold >= data.about["unseen"]:
        log(f"a key that was never seen in training scores {data.about['unseen']:.2f} and raises no alarm by itself: "
            "held-out sessions hold such keys too, or the training set is small")
    if about["held_out"] * (1 - config.quantile) < 1:
        log(f"of so few held-out sessions the quantile {config.quantile} is the largest score: a threshold by chance")
    write_samples(folder / "samples/final.txt", data, rows, lambda rows: scores, explain, config.detector)
    draw_scores(folder / "samples/scores.png", values, labels > 0, counts, threshold, config.detector)
    plain = json.dumps(about | {"seconds": seconds, "table": table})    # NaN and Inf become null
    (folder / "eval.json").write_text(json.dumps(json.loads(plain, parse_constant=lambda name: None), indent=1))
    return table


def write_samples(path, data, rows, score, explain, detector, n=10):
    """The n most anomalous of some rows by a detector, in words: why, and all their lines. Of a distance there is no
    why: the least likely key is told."""
    path.parent.mkdir(exist_ok=True)
    scores, names = score(rows)[detector], ["normal", *data.meta["kinds"], "unknown"]       # label -1 is the last
    with open(path, "w", encoding="utf-8") as file:
        for i in np.argsort(-scores, kind="stable")[:n]:
            keys = data.keys[data.start[rows[i]]:data.start[rows[i]] + data.length[rows[i]]]
            texts = [data.meta["templates"][key] for key in keys]
            label = names[data.labels[rows[i]]]
            file.write(f"{data.meta['ids'][rows[i]]}: {detector} {scores[i]:.2f}, labelled {label}\n"
                       f"  {explain(rows[i], texts)}\n")
            file.writelines(f"  {k:4d}  {text}\n" for k, text in enumerate(texts, 1))


def compare(found, labels, kinds, counts, lengths, normals=0):
    """name -> (scores (n,), threshold) of all detectors -> dict name -> detection(), threshold and recall by kind.

    labels int (n,): 0 normal, k an anomaly of kinds[k - 1]. normals > 0: how many normal sessions the ones here stand
    for; their counts are scaled to it."""
    anomaly, weight, table = labels > 0, counts.astype(np.float64), {}
    if normals and not anomaly.all():
        weight[~anomaly] *= normals / weight[~anomaly].sum()
    for name, (scores, threshold) in found.items():
        flagged = round_scores(scores) > threshold
        table[name] = detection(flagged, anomaly, weight, lengths) | {"threshold": threshold}
        for k, kind in enumerate(kinds if len(kinds) > 1 else [], 1):
            n = counts[labels == k].sum()
            table[name][kind] = float(counts[flagged & (labels == k)].sum() / n) if n else math.nan
    return table


def show(table, floor_names, chosen, log=print):
    """Log compare()'s table, a star at the chosen detector, and a warning if a floor has the better F1."""
    columns = list(table[chosen])
    log(f"{'':24}" + "".join(f"{column:>13}" for column in columns))
    for name, row in table.items():
        log(f"{name:22}{' *'[name == chosen]} " + "".join(f"{row[column]:13.4f}" for column in columns))
    best = max(floor_names, key=lambda name: np.nan_to_num(table[name]["F1"]))
    if table[best]["F1"] > table[chosen]["F1"]:
        log(f"WARNING: the floor {best!r} does better than {chosen!r}, F1 {table[best]['F1']:.4f} against "
            f"{table[chosen]['F1']:.4f}: a look-up is all this log needs, or the model has not learned enough")


def draw_scores(path, scores, anomaly, counts, threshold, title):
    """A PNG: histograms of the normal and the anomalous sessions' scores, log y axis, a line at the threshold.

    scores, counts float (n,), anomaly bool (n,). Scores that are not finite have no place on the axis: the label says
    how many sessions that leaves out. Without matplotlib it says so and writes nothing."""
    try:
        from matplotlib.figure import Figure        # not pyplot: no backend to choose, nothing global to close
    except ImportError:
        print(f"no {Path(path).name}: pip install matplotlib")
        return
    scores, anomaly, counts = round_scores(scores), np.asarray(anomaly), np.asarray(counts)
    finite = np.isfinite(scores)
    bins = np.histogram_bin_edges(scores[finite], 60)       # for both; numpy refuses scores that differ in last bits
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, rows in ("normal", ~anomaly), ("anomalous", anomaly):
        lost = counts[rows & ~finite].sum()
        label = f"{name}: {counts[rows].sum():,.0f} sessions" + (f", {lost:,.0f} not finite" if lost else "")
        axes.hist(scores[rows & finite], bins, weights=counts[rows & finite], alpha=0.6, label=label)
    axes.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.4g}")
    if counts[finite].sum() > 0:                    # a log axis of nothing is a warning
        axes.set_yscale("log", nonpositive="clip")
    axes.set(xlabel="score", ylabel="sessions", title=title)
    axes.legend()
    figure.savefig(path, format="png", dpi=100)
