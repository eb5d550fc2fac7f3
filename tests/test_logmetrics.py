"""data/logs/metrics.py: thresholds, detection scores and floors against loops over every single session, written out
here; small cases worked out by hand; and that no floor looks at the test.
"""
import math
import random
import sys
import warnings
from collections import Counter

import numpy as np
import pytest

from data.logs.metrics import PCA, detection, draw_scores, floors, quantile_threshold, round_scores

NAMES = ["unseen event", "unseen event or length", "unseen 2-gram", "unseen 3-gram", "unseen count vector",
         "PCA on idf counts", "2-gram LM"]
LOOK_UPS, FITTED = NAMES[:5], NAMES[5:]


def repeated(rows, counts):
    return [row for row, count in zip(rows, counts) for _ in range(int(count))]


# ----------------------------------------------------------------------------------------------------------- thresholds
@pytest.mark.parametrize("q", [0, 0.3, 0.5, 0.9, 0.995, 0.998, 1])
def test_the_quantile_is_numpys_on_repeated_scores(q):
    rng = np.random.default_rng(0)
    for n in [1, 1, 2, 3, 5, 20, 100] * 5:
        scores = rng.integers(-6, 6, n) / 3 + rng.normal(0, 1e-7, n)       # many ties, but for the last bits
        counts = rng.integers(1, 30, n).astype(np.float64)
        wanted = np.quantile(np.repeat(np.round(scores, 4), counts.astype(int)), q, method="higher")
        found = quantile_threshold(scores, counts, q)
        assert found == wanted and type(found) is float


def test_the_quantile_by_hand():
    scores, counts = [2, 0, 1], np.array([2.0, 1.0, 7.0])                  # sorted: 0, then 1 seven times, then 2, 2
    found = [quantile_threshold(scores, counts, q) for q in (0, 0.1, 0.11, 0.77, 0.78, 0.8, 1)]
    assert found == [0, 1, 1, 1, 2, 2, 2]                                  # .1 * 9 = .9 goes up to rank 1
    assert quantile_threshold([3.5], np.ones(1), 0.5) == 3.5


def test_rows_that_stand_for_nobody_set_no_threshold():
    assert quantile_threshold([-5, 1, 9], np.array([0.0, 3.0, 0.0]), 1) == 1
    assert quantile_threshold([-5, 1, 9], np.array([0.0, 3.0, 0.0]), 0) == 1
    for counts in ([1, -1], [1, 0.5], [1, math.nan]):
        with pytest.raises(AssertionError, match="no numbers of sessions"):
            quantile_threshold([1, 2], np.array(counts), 1)


def test_last_bits_flag_nobody():
    assert 0.1 + 0.2 > 0.3
    threshold = quantile_threshold([0.3], np.ones(1), 1)
    assert not round_scores([0.1 + 0.2])[0] > threshold and round_scores([0.30006])[0] > threshold
    assert quantile_threshold([1.23456], np.ones(1), 1) == 1.2346          # the threshold itself is rounded too
    rounded = round_scores(np.array([0.1, 2.00004, -1.00006], np.float32))
    assert rounded.dtype == np.float64 and rounded.tolist() == [0.1, 2.0, -1.0001]


def test_no_threshold_from_nothing_or_from_non_finite_scores():
    with pytest.raises(ValueError, match="0 rows of scores stand for 0 sessions"):
        quantile_threshold([], np.zeros(0), 0.9)
    with pytest.raises(ValueError, match="2 rows of scores stand for 0 sessions"):
        quantile_threshold([1, 2], np.zeros(2), 0.9)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=rf"2 of 4 scores are not finite, the first one is row 1: {bad}"):
            quantile_threshold([1, bad, 3, bad], np.ones(4), 0.1)
    for q, scores in ((1.5, [1]), (-0.1, [1]), (math.nan, [1]), (0.5, [1, 2])):
        with pytest.raises(AssertionError):
            quantile_threshold(scores, np.ones(1), q)


# ------------------------------------------------------------------------------------------------------------ detection
def count_sessions(flagged, anomaly, counts, lengths):
    """The same scores from a loop over every session."""
    def scores(sessions):
        cells = Counter((bool(flag), bool(label)) for flag, label, _ in sessions)
        hit, false, missed, passed = cells[True, True], cells[True, False], cells[False, True], cells[False, False]
        precision = hit / (hit + false) if hit + false else math.nan
        recall = hit / (hit + missed) if hit + missed else math.nan
        f1 = math.nan if math.isnan(recall) else 2 * precision * recall / (precision + recall) if hit else 0.0
        return {"P": precision, "R": recall, "F1": f1, "FPR": false / (false + passed) if false + passed else math.nan}
    rows = list(zip(flagged, anomaly, lengths))
    every = repeated(rows, counts)
    return scores(every) | {"F1 len>=10": scores([row for row in every if row[2] >= 10])["F1"],
                            "F1 unique": scores(rows)["F1"]}


@pytest.mark.parametrize("seed", range(40))
def test_detection_counts_sessions(seed):
    rng = np.random.default_rng(seed)
    n = seed % 12                                                          # so few rows that some sets are empty
    flagged, anomaly = rng.random(n) < seed % 5 / 4, rng.random(n) < seed % 3 / 2
    counts, lengths = rng.integers(1, 9, n).astype(np.float64), rng.integers(8, 13, n)
    found = detection(flagged, anomaly, counts, lengths)
    assert list(found) == ["P", "R", "F1", "FPR", "F1 len>=10", "F1 unique"]
    assert all(type(value) is float for value in found.values())
    assert found == pytest.approx(count_sessions(flagged, anomaly, counts, lengths), abs=1e-12, nan_ok=True)


def test_detection_by_hand():
    rows = np.array([  # flagged, anomaly, count, length
        (1, 1, 6, 20), (1, 0, 2, 20), (0, 1, 3, 10), (0, 0, 88, 15), (1, 1, 4, 9), (1, 0, 1, 2)])
    found = detection(rows[:, 0] == 1, rows[:, 1] == 1, rows[:, 2].astype(np.float64), rows[:, 3])
    assert found == pytest.approx({
        "P": 10 / 13, "R": 10 / 13, "F1": 10 / 13, "FPR": 3 / 91,
        "F1 len>=10": 2 * 6 / (2 * 6 + 2 + 3),                             # without the last two rows
        "F1 unique": 2 * 2 / (2 * 2 + 2 + 1)})


@pytest.mark.parametrize("flag, label, wanted", [                          # P, R, F1, FPR
    (False, False, (math.nan, math.nan, math.nan, 0)), (True, False, (0, math.nan, math.nan, 1)),
    (False, True, (math.nan, 0, 0, math.nan)), (True, True, (1, 1, 1, math.nan))])
def test_one_kind_of_session_only(flag, label, wanted):
    for n in (1, 3):
        found = detection(np.full(n, flag), np.full(n, label), np.full(n, 2.0), np.arange(n) + 1)
        assert list(found.values())[:4] == pytest.approx(wanted, nan_ok=True)
        assert math.isnan(found["F1 len>=10"]) and found["F1 unique"] == pytest.approx(wanted[2], nan_ok=True)


def test_anomalies_that_nothing_finds_give_f1_0():
    for flag in (False, True):
        found = detection(np.array([False, flag]), np.array([True, False]), np.ones(2), np.array([10, 10]))
        assert found["R"] == found["F1"] == found["F1 len>=10"] == found["F1 unique"] == 0
    assert all(map(math.isnan, detection(np.zeros(0, bool), np.zeros(0, bool), np.zeros(0), np.zeros(0, int)).values()))


def test_a_sample_of_normals_is_scaled_by_a_factor_on_their_counts():
    """The protocol of notes/logbert.md: the false-positive rate of the sample times the number of all normals."""
    rng = np.random.default_rng(3)
    n, everyone = 400, 330027
    flagged, anomaly = rng.random(n) < 0.3, rng.random(n) < 0.6
    counts, lengths = rng.integers(1, 50, n).astype(np.float64), np.where(anomaly, rng.integers(2, 30, n), 13)
    factor = everyone / counts[~anomaly].sum()
    found = detection(flagged, anomaly, np.where(anomaly, counts, counts * factor), lengths)
    rate = counts[flagged & ~anomaly].sum() / counts[~anomaly].sum()
    for name, rows in (("F1", anomaly), ("F1 len>=10", anomaly & (lengths >= 10))):
        hit, missed = counts[rows & flagged].sum(), counts[rows & ~flagged].sum()
        assert found[name] == pytest.approx(2 * hit / (2 * hit + rate * everyone + missed), rel=1e-12)
    assert found["FPR"] == pytest.approx(rate, rel=1e-12)
    assert found["F1 unique"] == detection(flagged, anomaly, counts, lengths)["F1 unique"]


def test_detection_refuses_what_is_no_flag():
    with pytest.raises(AssertionError):
        detection(np.array([1, 0]), np.array([True, False]), np.ones(2), np.ones(2))
    with pytest.raises(AssertionError):
        detection(np.array([True, False]), np.array([True, False]), np.ones(1), np.ones(2))


# --------------------------------------------------------------------------------------------------------------- floors
def made_up(seed):
    """fit, hold and test: distinct rows and counts, with keys that only hold (7) or only the test (8, 90) has."""
    rng = random.Random(seed)

    def some(n, keys, most):
        rows = sorted({tuple(rng.choices(keys, [1 / (key + 1) for key in keys], k=rng.randint(2, most)))
                       for _ in range(n)})
        return rows, np.array([rng.randint(1, 9) for _ in rows], np.float64)
    fit, hold = some(60, range(7), 6), some(25, range(8), 7)
    test = [(0,), (8,), (90, 90), (0,) * 30, (7, 7), *fit[0][:3], *hold[0][:3], *some(40, [*range(9), 90], 9)[0]]
    return *fit, *hold, test


def one_by_one(fit, hold, test, quantile):
    """The floors with each session standing there as often as it occurred, no counts."""
    train = fit + hold

    def grams(session, n):
        padded = ["start"] * (n - 1) + list(session) + ["end"]
        return [tuple(padded[i:i + n]) for i in range(len(padded) - n + 1)]

    def unseen(rows, pieces):
        known = {piece for session in train for piece in pieces(session)}
        return [sum(piece not in known for piece in pieces(session)) for session in rows]
    events = unseen(test, list)
    low, high = min(map(len, train)), max(map(len, train))
    found = {"unseen event": events,
             "unseen event or length": [new + (len(s) < low or len(s) > high) for new, s in zip(events, test)],
             "unseen 2-gram": unseen(test, lambda s: grams(s, 2)), "unseen 3-gram": unseen(test, lambda s: grams(s, 3)),
             "unseen count vector": unseen(test, lambda s: [frozenset(Counter(s).items())])}
    found = {name: (scores, 0) for name, scores in found.items()}

    every = sorted({key for session in train + test for key in session})
    bag = lambda rows: np.array([[session.count(key) for key in every] for session in rows], np.float64)
    idf = np.log(len(fit) / np.maximum((bag(fit) > 0).sum(0), 1))
    mean = (bag(fit) * idf).mean(0)
    _, size, axes = np.linalg.svd(bag(fit) * idf - mean)
    kept = next(k for k in range(1, 99) if (size[:k] ** 2).sum() >= 0.95 * (size ** 2).sum())
    def error(rows):
        return sum(((bag(rows) * idf - mean) @ axis) ** 2 for axis in axes[kept:])

    pairs = Counter(pair for session in fit for pair in grams(session, 2))
    before = Counter(pair[0] for session in fit for pair in grams(session, 2))
    outcomes = len({key for session in fit for key in session}) + 2
    def surprise(rows):
        nll = lambda a, b: -math.log((pairs[a, b] + 0.01) / (before[a] + 0.01 * outcomes))
        return [max(nll(*pair) for pair in grams(session, 2)) for session in rows]
    for name, score in (("PCA on idf counts", error), ("2-gram LM", surprise)):
        found[name] = score(test), np.quantile(np.round(score(hold), 4), quantile, method="higher")
    return found


@pytest.mark.parametrize("seed, quantile", [(0, 0.9), (1, 0.5), (2, 1.0), (3, 0.75)])
def test_floors_are_those_of_every_single_session(seed, quantile):
    fit, fit_counts, hold, hold_counts, test = made_up(seed)
    found = floors(fit, fit_counts, hold, hold_counts, test, quantile)
    wanted = one_by_one(repeated(fit, fit_counts), repeated(hold, hold_counts), test, quantile)
    assert list(found) == NAMES
    for name, (scores, threshold) in found.items():
        assert scores.dtype == np.float64 and scores.shape == (len(test),) and type(threshold) is float
        assert scores == pytest.approx(np.array(wanted[name][0], float), rel=1e-9, abs=1e-9), name
        assert threshold == pytest.approx(wanted[name][1], abs=1.01e-4 if name in FITTED else 0), name
        flags = round_scores(scores) > threshold
        assert 0 < flags.sum() < len(flags), name


def test_floors_by_hand():
    fit, fit_counts, hold = [(1, 2, 3), (1, 2, 2, 3)], np.array([4.0, 1.0]), [(1, 3)]
    test = [(1, 2, 3), (1,), (2, 1, 3), (1, 9, 9, 9, 3), (3, 1)]
    found = floors(fit, fit_counts, hold, np.ones(1), test, 0.5)
    assert {name: found[name][0].tolist() for name in LOOK_UPS} == {
        "unseen event": [0, 0, 0, 3, 0],
        "unseen event or length": [0, 1, 0, 4, 0],                         # hold's shortest has 2, fit's longest 4
        "unseen 2-gram": [0, 1, 2, 4, 3],                                  # (2, 1, 3): start 2, 2 1; 1 3 is hold's
        "unseen 3-gram": [0, 1, 3, 5, 3],
        "unseen count vector": [0, 1, 0, 1, 0]}                            # (3, 1) is hold's (1, 3) by counts
    assert [found[name][1] for name in LOOK_UPS] == [0.0] * 5
    never = math.log((5 + 0.05) / 0.01)                                    # after start, 1 and 3: each 5 times in fit
    scores, threshold = found["2-gram LM"]
    assert scores.tolist() == pytest.approx([math.log(6.05 / 5.01), never, math.log(6.05 / 0.01), never, never])
    assert threshold == round(never, 4)                                    # 1 -> 3, which fit lacks


def test_pca_by_hand():
    """Key 1 is in every session: weight 0. Key 2 is then all the variance, and so the plane: nothing known errs."""
    model = PCA([(1,), (1, 2), (1, 2, 2)], np.array([2.0, 1.0, 1.0]))
    scores = model.scores([(1, 1, 1, 1), (2,) * 9, (7,), (1, 7, 7, 8)])
    assert scores == pytest.approx(np.log(4) ** 2 * np.array([0, 0, 1, 4 + 1]), abs=1e-12)
    # keys 2 and 3 in one of 100 sessions each: their variances are as the squares of how often they occur there
    for often, kept in ((8, 2), (9, 1)):                                   # 64 / 68 = 94.1 %, 81 / 85 = 95.3 %
        model = PCA([(1,), (1,) + (2,) * often, (1, 3, 3)], np.array([98.0, 1.0, 1.0]))
        assert model.plane.shape == (3, kept) and abs(model.plane[1, 0]) > 0.99
        assert (model.scores([(1, 3, 3)])[0] > 1) == (kept == 1)


def test_a_single_session_and_an_empty_test():
    found = floors([(4,)], np.ones(1), [(4,)], np.ones(1), [(4,), (5,), (4, 4)], 0.998)
    wanted = {"unseen event": [0, 1, 0], "unseen event or length": [0, 1, 1], "unseen 2-gram": [0, 2, 1],
              "unseen 3-gram": [0, 2, 2], "unseen count vector": [0, 1, 1],
              "PCA on idf counts": [0, 0, 0]}                              # one session: no idf, no variance
    assert {name: found[name][0].tolist() for name in NAMES[:6]} == wanted
    lm = found["2-gram LM"]
    assert lm[0].tolist() == pytest.approx([math.log(1.03 / 1.01), math.log(103), math.log(103)])
    assert (round_scores(lm[0]) > lm[1]).tolist() == [False, True, True]
    empty = floors([(4,)], np.ones(1), [(4,)], np.ones(1), [], 0.998)
    assert list(empty) == NAMES and all(scores.shape == (0,) for scores, _ in empty.values())
    assert [threshold for _, threshold in empty.values()] == [threshold for _, threshold in found.values()]


def test_no_floor_without_training_or_hold_out():
    with pytest.raises(AssertionError, match="no row to fit"):
        floors([], np.zeros(0), [(1,)], np.ones(1), [(1,)], 0.9)
    with pytest.raises(ValueError, match="no threshold"):
        floors([(1,)], np.ones(1), [], np.zeros(0), [(1,)], 0.9)


def test_no_floor_looks_at_the_test():
    fit, fit_counts, hold, hold_counts, test = made_up(5)
    found = floors(fit, fit_counts, hold, hold_counts, test, 0.95)
    order = np.random.default_rng(0).permutation(len(test))
    shuffled = floors(fit, fit_counts, hold, hold_counts, [test[i] for i in order], 0.95)
    other = [*test[:9], (1000,) * 200, (5,), (6, 5, 4, 3, 2, 1, 0)]
    changed = floors(fit, fit_counts, hold, hold_counts, other, 0.95)
    for name in NAMES:
        assert found[name][1] == shuffled[name][1] == changed[name][1], name
        assert shuffled[name][0] == pytest.approx(found[name][0][order], rel=1e-12, abs=1e-12), name
        assert changed[name][0][:9] == pytest.approx(found[name][0][:9], rel=1e-12, abs=1e-12), name


def test_what_has_a_threshold_is_fitted_without_the_hold_out():
    fit, fit_counts, hold, hold_counts, test = made_up(6)
    found = floors(fit, fit_counts, hold, hold_counts, test, 0.5)
    fewer = floors(fit, fit_counts, hold[3:], hold_counts[3:], test, 0.5)
    refitted = floors(fit, fit_counts[::-1].copy(), hold, hold_counts, test, 0.5)
    for name in FITTED:
        assert (fewer[name][0] == found[name][0]).all()
        assert (refitted[name][0] != found[name][0]).any()                 # fit's counts weigh in the model
    for name in LOOK_UPS:
        assert (refitted[name][0] == found[name][0]).all()
    assert (fewer["unseen count vector"][0] > found["unseen count vector"][0]).any()    # look-ups know hold


def test_the_threshold_is_the_quantile_of_the_hold_out_by_its_counts():
    fit, fit_counts, hold, _, _ = made_up(7)
    for i in range(len(hold)):
        crowd = np.where(np.arange(len(hold)) == i, 1e6, 1)                # nearly everybody has row i
        found = floors(fit, fit_counts, hold, crowd, hold, 0.5)
        assert all(found[name][1] == round_scores(found[name][0])[i] for name in FITTED)
        assert all(found[name][1] == 0 and not found[name][0].any() for name in LOOK_UPS)


# -------------------------------------------------------------------------------------------------------------- picture
def drawn(path, monkeypatch, *arguments):
    """The picture's axes; a warning is an error."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    kept, save = [], figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_scores(path, *arguments)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 5000
    return kept[-1].axes[0]


def test_the_picture_shows_counts_and_the_threshold(tmp_path, monkeypatch):
    scores, anomaly = np.array([0.0, 1.0, 1.0, 2.0, np.inf]), np.array([False, False, True, True, True])
    axes = drawn(tmp_path / "s.png", monkeypatch, scores, anomaly, np.array([1e5, 20, 3, 4, 7]), 2.5, "bags")
    normal, anomalous = axes.containers
    assert [bar.get_height() for bar in normal if bar.get_height()] == [1e5, 20]
    assert [bar.get_height() for bar in anomalous if bar.get_height()] == [3, 4]
    edges = [[bar.get_x() for bar in bars] for bars in (normal, anomalous)]
    assert edges[0] == edges[1] and abs(min(edges[0])) < 1e-9 and len(edges[0]) > 20
    assert axes.get_yscale() == "log" and axes.get_title() == "bags"
    assert list(axes.lines[0].get_xdata()) == [2.5, 2.5] and axes.get_xlim()[1] > 2.5
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(labels) == ["anomalous: 14 sessions, 7 not finite", "normal: 100,020 sessions", "threshold 2.5"]


@pytest.mark.parametrize("scores, anomaly", [
    ([], []), ([1.0], [True]), ([1.0, 1.0], [False, False]), ([np.nan], [True]),
    (np.float32([1, 1.0000001]), [True, False])])                          # too close for 60 bins between them
def test_a_picture_of_little(tmp_path, monkeypatch, scores, anomaly):
    drawn(tmp_path / "s.png", monkeypatch, np.array(scores), np.array(anomaly, bool), np.ones(len(scores)), 1.0, "few")


def test_without_matplotlib_there_is_one_line_and_no_picture(tmp_path, monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    draw_scores(tmp_path / "scores.png", np.ones(2), np.array([True, False]), np.ones(2), 0.5, "none")
    assert capsys.readouterr().out == "no scores.png: pip install matplotlib\n" and not list(tmp_path.iterdir())
