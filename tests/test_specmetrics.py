"""data/spectra/metrics.py against loops over single spectra and small libraries worked out by hand, and
data/spectra/demo.py: what its rule does to single molecules, and what its files hold.
"""
import json
import math
import random
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from rdkit import Chem

from data.spectra import demo, metrics
from data.spectra.features import ECFP_BITS, fingerprint, nominal_mass
from data.spectra.metrics import (COSINES, ceiling, describe, library_ranks, mirror, nearest, peak_overlap, recall,
                                  report, weigh)


def random_spectra(rng, n, bins=30, peaks=8):
    spectra = np.zeros((n, bins), np.float32)
    for row in spectra:
        row[rng.choice(bins - 1, peaks, replace=False) + 1] = rng.random(peaks) + 0.01
        row /= row.max()
    return torch.from_numpy(spectra)


class Fake:
    """What the script hands over: 60 molecules of which 10 are val, 14 test; some were measured twice."""
    def __init__(self, n=60, seed=0, twice=range(0, 60, 3)):
        rng = np.random.default_rng(seed)
        self.spectra, self.mass = random_spectra(rng, n), rng.integers(100, 120, n)
        order = rng.permutation(n)
        self.rows = {"val": order[:10], "test": order[10:24], "train": order[24:]}
        self.fingerprints = torch.from_numpy((rng.random((n, 4096)) < 0.01).astype(np.float32))
        self.twice = np.array([*twice], np.int64), random_spectra(rng, len(twice))

    def measured(self):
        return self.spectra

    def replicates(self):
        return self.twice

    def bits(self, rows):
        return self.fingerprints[rows]

    def smiles(self, row):
        return "C" * (int(row) + 1)


# -------------------------------------------------------------------------------------------------------------- cosines
@pytest.mark.parametrize("powers", [*COSINES.values(), (2, 0.25)])
def test_cosines_against_loops(powers):
    one, other = (random_spectra(np.random.default_rng(seed), 5) for seed in (0, 1))
    found = (weigh(one, *powers) @ weigh(other, *powers).T).numpy()
    for i, a in enumerate(one.tolist()):
        for j, b in enumerate(other.tolist()):
            a_w, b_w = ([m ** powers[0] * (x ** powers[1] if x else 0) for m, x in enumerate(s)] for s in (a, b))
            wanted = sum(x * y for x, y in zip(a_w, b_w)) / math.sqrt(sum(x * x for x in a_w) * sum(y * y for y in b_w))
            assert found[i, j] == pytest.approx(wanted, abs=1e-6)


def test_the_powers_are_the_published_ones():
    assert COSINES == {"cosine": (0, 1), "weighted": (1, 0.5), "stein": (3, 0.6)}
    assert weigh(torch.tensor([[0, 0.25, 0, 1]]), 1, 0.5).tolist()[0] == pytest.approx(
        [0, 0.5 / math.sqrt(9.25), 0, 3 / math.sqrt(9.25)])


@pytest.mark.parametrize("powers", COSINES.values())
def test_empty_and_tiny_spectra_weigh_without_nan(powers):
    spectra = torch.zeros(3, 501)
    spectra[1, 400], spectra[2, 3:6] = 1e-37, 1.0
    norms = weigh(spectra, *powers).norm(dim=1)
    assert norms.tolist() == pytest.approx([0, 1, 1], abs=1e-5)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_what_is_no_intensity_is_an_error(value):
    spectra = torch.ones(4, 6)
    spectra[2, 3] = spectra[3, 3] = value
    with pytest.raises(ValueError, match="2 of 4 spectra .* the first one is row 2"):
        weigh(spectra, 1, 0.5)


# ---------------------------------------------------------------------------------------------------------------- ranks
def loop_ranks(queries, library, truth, query_mass, library_mass, window, drop):
    ranks = []
    for q, query in enumerate(queries.double()):
        right, better, equal = float(query @ library[truth[q]].double()), 0, 0
        for c, entry in enumerate(library.double()):
            if c != truth[q] and (window is not None and abs(library_mass[c] - query_mass[q]) > window
                                  or drop is not None and drop[q] == c):
                continue
            cosine = float(query @ entry)
            better, equal = better + (cosine > right + 1e-6), equal + (abs(cosine - right) <= 1e-6)
        ranks.append(better + (equal + 1) / 2)
    return ranks


@pytest.mark.parametrize("window", [None, 0, 3])
@pytest.mark.parametrize("dropping", [False, True])
def test_ranks_against_loops(window, dropping):
    rng = np.random.default_rng(1)
    library = weigh(random_spectra(rng, 40), 1, 0.5)[rng.integers(0, 25, 40)]              # many entries twice
    mass, truth = rng.integers(100, 110, 40), rng.integers(0, 40, 17)
    queries = weigh(random_spectra(rng, 17), 1, 0.5)
    queries[:5], queries[5] = library[truth[:5]], 0
    drop = np.where(rng.random(17) < 0.7, rng.integers(0, 40, 17), -1) if dropping else None
    query_mass = mass[truth] + (np.arange(17) == 3) * 50                                   # the right one is outside
    wanted = loop_ranks(queries, library, truth, query_mass, mass, window, drop)
    assert len({rank % 1 for rank in wanted}) == 2
    for chunk in (4, 17, 512):
        found = library_ranks(queries, library, truth, query_mass, mass, window, drop, chunk)
        assert found.dtype == np.float64 and found.tolist() == wanted


def test_ranks_by_hand():
    library = torch.eye(5)[[0, 1, 2, 2, 3]]
    mass = np.array([100, 105, 106, 100, 100])
    query = torch.tensor([[0.8, 0.4, 0.4, 0.2, 0]])

    def rank(truth, **kwargs):
        return library_ranks(query, library, np.array([truth]), np.array([100]), mass, **kwargs)[0]
    assert [rank(truth) for truth in range(5)] == [1, 3, 3, 3, 5]
    assert [rank(truth, window=5) for truth in range(5)] == [1, 2.5, 3, 2.5, 4]            # 2 counts only for itself
    assert [rank(4, drop=np.array([entry])) for entry in (-1, 0, 3, 4)] == [5, 4, 4, 5]
    assert rank(1, drop=np.array([2]), window=5) == 2.5 and rank(3, drop=np.array([1]), window=5) == 2


def test_last_bits_rank_nothing():
    library = torch.tensor([[0.6, 0.8], [0.6, 0.8000001], [0.6, 0.7999999], [0.6, 0.8001]])
    found = [library_ranks(torch.eye(2)[1:], library, np.array([i]), np.array([9]), np.full(4, 9))[0] for i in range(4)]
    assert len({*library[:3, 1].tolist()}) == 3 and found == [3, 3, 3, 1]


def test_nothing_predicted_ranks_in_the_middle_or_last():
    library = weigh(torch.rand(9, 20) + 0.1, 1, 0.5)
    truth, mass = np.array([4]), np.full(9, 100)
    assert library_ranks(torch.zeros(1, 20), library, truth, mass[truth], mass)[0] == 5    # of 9 alike
    library[4] = 0
    assert library_ranks(library[:1], library, truth, mass[truth], mass)[0] == 9


def test_recall():
    ranks = np.array([1, 1.5, 2, 10, 10.5, 11])
    assert [recall(ranks, k) for k in (1, 2, 10, 11)] == [1 / 6, 1 / 2, 4 / 6, 1] and type(recall(ranks, 1)) is float


# --------------------------------------------------------------------------------------------------------- peak overlap
def loop_overlap(pred, true, k):
    shares = []
    for p, t in zip(pred.tolist(), true.tolist()):
        top = [[m for m in sorted(range(len(s)), key=lambda m: (-s[m], m)) if s[m] > 0] for s in (p, t)]
        most = min(k, len(top[1]))
        shares.append(len({*top[0][:most]} & {*top[1][:most]}) / most)
    return np.mean(shares)


@pytest.mark.parametrize("k", [1, 5, 10, 20, 99])
def test_peak_overlap_against_loops(k):
    rng = np.random.default_rng(2)
    true = torch.cat([random_spectra(rng, 6, peaks=n) for n in (3, 9, 16)])
    pred = torch.cat([random_spectra(rng, 6, peaks=n) for n in (4, 12, 25)])
    true, pred = true.mul(4).ceil() / 4, pred.mul(4).ceil() / 4                            # many peaks of one height
    assert peak_overlap(pred, true, k) == pytest.approx(loop_overlap(pred, true, k))
    assert peak_overlap(true, true, k) == 1


def test_peak_overlap_by_hand():
    true = torch.tensor([[0, 1, 0, 0.5, 0, 0.2]])
    assert peak_overlap(torch.tensor([[0, 1, 0.9, 0.8, 0.7, 0]]), true, 10) == pytest.approx(2 / 3)    # 3 of 4 count
    assert peak_overlap(torch.tensor([[0, 0, 0, 1.0, 0, 0]]), true, 10) == pytest.approx(1 / 3)
    assert peak_overlap(torch.zeros(1, 6), true, 10) == 0                                  # bins of 0 are no peaks


# ------------------------------------------------------------------------------------------------------------ protocols
def from_weighed(rows, bins=16):
    """{m/z: m/z * sqrt(intensity)} -> intensities, so that the weighted cosines are easy to see."""
    spectra = torch.zeros(len(rows), bins)
    for spectrum, row in zip(spectra, rows):
        for mass, value in row.items():
            spectrum[mass] = (value / mass) ** 2
    return spectra


def test_protocols_by_hand():
    """14 molecules, each with one peak of its own: molecule i at m/z i + 1."""
    measured, mass = from_weighed([{i + 1: 1} for i in range(14)]), np.full(14, 200)
    mass[2:5] = 300
    pred = from_weighed([{1: 1} | {i: i for i in range(2, 8)},                             # A: 6 others are better
                         {1: 5, 2: 2}])                                                    # A: molecule 0 is better
    found = describe(pred, np.array([0, 1]), measured, mass)
    assert found["n"] == 2
    assert [found[f"A R@{k}"] for k in (1, 5, 10)] == [0, 0.5, 1] and found["A R@10 +-5 Da"] == 1
    # m/z 1 is in prediction 0 with 1 / sqrt(140), in prediction 1 with 5 / sqrt(29); m/z 2 with 2 / 11.8 and 2 / 5.4
    assert [found[f"N R@{k}"] for k in (1, 5, 10)] == [0.5, 1, 1] and found["N R@10 +-5 Da"] == 1
    assert found["weighted"] == pytest.approx((1 / math.sqrt(140) + 2 / math.sqrt(29)) / 2, abs=1e-6)
    assert found["peaks@5"] == found["peaks@20"] == 0.5                                    # k is 1: one true peak
    assert found["overlap_all10"] == pytest.approx(0.1)                                    # one shared peak, / 10

    # twelve others are better, three of them too heavy
    last = from_weighed([{1: 1} | {i: i for i in range(2, 14)}])
    found = describe(last, np.array([0]), measured, mass)
    assert found["A R@10"] == 0 and found["A R@10 +-5 Da"] == 1 and found["N R@1"] == 1
    for drop, wanted in ((-1, 0), (1, 0.5)):                                               # 10 better, or 9 and a drop
        two = from_weighed([{1: 1} | {i: i for i in range(2, 12)}, {2: 1}])
        found = describe(two, np.array([0, 1]), measured, mass, np.array([drop, 0]))
        assert found["A R@10"] == 0.5 + wanted
        most = from_weighed([{1: 1} | {i: i for i in range(2, 15)}])                       # 13, 10 of about its mass
        assert describe(most, np.array([0]), measured, mass, np.array([drop]))["A R@10 +-5 Da"] == 2 * wanted
    drop = np.array([1, 0])                                                                # N leaves them out as well
    assert describe(pred, np.array([0, 1]), measured, mass, drop)["N R@1"] == 1


def test_describe_against_loops():
    data, rng = Fake(), np.random.default_rng(3)
    rows = data.rows["test"]
    pred = (data.measured()[rows] + 2 * random_spectra(rng, len(rows))) / 3
    found = describe(pred, rows, data.measured(), data.mass)
    library, query = weigh(data.measured(), 1, 0.5), weigh(pred, 1, 0.5)
    replaced = library.clone()
    replaced[rows] = query
    for name, queries, entries in ("A", query, library), ("N", library[rows], replaced):
        for suffix, window in ("", None), (" +-5 Da", 5):
            ranks = loop_ranks(queries, entries, rows, data.mass[rows], data.mass, window, None)
            assert found[f"{name} R@10{suffix}"] == np.mean(np.array(ranks) <= 10)
        assert 0 < found[f"{name} R@1"] < 1
    for name, powers in COSINES.items():
        assert found[name] == pytest.approx(torch.cosine_similarity(
            weigh(pred, *powers), weigh(data.measured()[rows], *powers)).mean().item(), abs=1e-6)
    assert describe(data.measured()[rows], rows, data.measured(), data.mass)["N R@1"] == 1


# ------------------------------------------------------------------------------------------------ what to compare with
def test_nearest_is_the_most_similar_training_molecule():
    data = Fake()
    data.fingerprints[data.rows["test"][1]] = data.fingerprints[data.rows["test"][0]]      # a twin, but no candidate
    data.fingerprints[data.rows["test"][2]] = 0                                            # similar to nobody
    data.fingerprints[data.rows["train"][9]] = data.fingerprints[data.rows["train"][4]]    # two alike: the first
    data.fingerprints[data.rows["test"][3]] = data.fingerprints[data.rows["train"][4]]
    rows = np.concatenate([data.rows["test"], data.rows["train"][:3]])
    sets = [{*row.nonzero().ravel().tolist()} for row in data.fingerprints]
    wanted = [max((other for other in data.rows["train"] if other != row), key=lambda other:
                  len(sets[row] & sets[other]) / max(1, len(sets[row] | sets[other]))) for row in rows]
    for chunk in (5, 1024):
        spectra, copied = nearest(data, rows, chunk)
        assert copied.tolist() == wanted and torch.equal(spectra, data.measured()[wanted])
    assert not {*copied.tolist()} & {*data.rows["test"].tolist(), *data.rows["val"].tolist()}
    assert (copied != rows).all()


def test_a_copied_molecule_does_not_stand_in_its_own_way(tmp_path):
    data = Fake()
    row, copied = data.rows["test"][0], data.rows["train"][0]
    data.rows["test"] = data.rows["test"][:1]
    data.fingerprints[row] = data.fingerprints[copied]
    data.spectra[row] = data.spectra[copied] * 0.9 + data.spectra[data.rows["val"][0]] * 0.01
    found = report(data, lambda rows: data.measured()[[copied]], "test", tmp_path, print)["columns"]
    assert found["1-NN"]["A R@1"] == found["1-NN"]["N R@1"] == 1
    assert found["model"]["A R@1"] == 0 and found["model"]["weighted"] == found["1-NN"]["weighted"]


def test_the_ceiling_is_of_the_split_if_it_has_enough():
    data = Fake(n=400, twice=range(0, 400, 2))
    data.rows = {"train": np.arange(100), "val": np.arange(100, 199), "test": np.arange(199, 400)}
    rows, spectra, of = ceiling(data, "test")
    assert of == "test" and rows.tolist() == [*range(200, 400, 2)]
    assert torch.equal(spectra, data.twice[1][100:])
    data.rows["test"] = np.arange(201, 400)                                                # one less: 99 of them
    rows, spectra, of = ceiling(data, "test")
    assert of == "all" and rows.tolist() == [*range(0, 400, 2)] and torch.equal(spectra, data.twice[1])


# --------------------------------------------------------------------------------------------------------------- report
def finite(value):
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    return value is None or isinstance(value, str) or math.isfinite(value)


def strict(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_report(tmp_path):
    data, lines = Fake(), []
    found = report(data, lambda rows: data.measured()[rows] * 0.5, "test", tmp_path, lines.append,
                   {"usage 0": 0.25, "ms": math.nan}, "best", {"zeros": lambda rows: torch.zeros(len(rows), 30)})
    assert list(found["columns"]) == ["model", "zeros", "1-NN", "replicate"] and finite(found)
    assert found == strict((tmp_path / "eval.json").read_text())
    assert found["columns"]["model"]["weighted"] == pytest.approx(1, abs=1e-5)
    assert found["columns"]["model"]["A R@1"] == 1 and found["columns"]["model"]["n"] == 14
    zeros = found["columns"]["zeros"]
    assert {zeros[name] for name in zeros if name != "n" and "Da" not in name} == {0}      # 60 alike: rank 30.5
    assert found["columns"]["replicate"]["n"] == 20 and found["replicates_of"] == "all"
    assert found["extra"] == {"usage 0": 0.25, "ms": None} and found["library"] == 60 and found["split"] == "test"
    assert lines[0].split() == ["model", "zeros", "1-NN", "replicate"]
    assert lines[1].split() == ["n", "14", "14", "14", "20"]
    assert len({len(line) for line in lines[:17]}) == 1 and "usage 0 0.25" in lines[17:]
    assert any("20 molecules of all" in line for line in lines)
    assert (tmp_path / "samples/best.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["best.png"]


def test_the_replicate_column_is_of_the_molecules_measured_twice(tmp_path):
    data = Fake()
    rows, _ = data.twice
    data.twice = rows, data.measured()[rows].clone()
    found = report(data, lambda rows: torch.zeros(len(rows), 30), "val", tmp_path)["columns"]["replicate"]
    assert found["weighted"] == pytest.approx(1, abs=1e-5)
    assert found["A R@1"] == found["N R@1"] == found["peaks@10"] == 1
    data.twice = rows, data.measured()[rows + 1 - 2 * (rows % 2)].clone()                  # of their neighbours
    found = report(data, lambda rows: torch.zeros(len(rows), 30), "val", tmp_path)["columns"]["replicate"]
    assert found["weighted"] < 0.9 and found["A R@1"] < 0.2


def test_report_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    data, lines = Fake(), []
    found = report(data, lambda rows: data.measured()[rows], "test", tmp_path, lines.append)
    assert found == strict((tmp_path / "eval.json").read_text())
    assert lines[-1] == "no final.png: pip install matplotlib" and not list((tmp_path / "samples").iterdir())


def test_report_of_little(tmp_path):
    data, lines = Fake(twice=[]), []
    data.rows["test"] = data.rows["test"][:1]
    found = report(data, lambda rows: data.measured()[rows], "test", tmp_path / "new", lines.append)
    assert list(found["columns"]) == ["model", "1-NN"] and found["replicates_of"] == "all"
    assert any("no molecule was measured twice" in line for line in lines)
    data.rows["test"] = data.rows["test"][:0]
    assert report(data, lambda rows: 1 / 0, "test", tmp_path / "none", lines.append) == {}
    assert lines[-1] == "no test molecules to evaluate on" and not (tmp_path / "none").exists()


def test_pairs_of_the_picture(tmp_path, monkeypatch):
    """The same molecules for every model, with their own spectra, cosine and SMILES."""
    data, seen = Fake(), []
    monkeypatch.setattr("data.spectra.metrics.mirror", lambda path, pairs, log: seen.append(pairs))
    report(data, lambda rows: data.measured()[rows], "test", tmp_path)
    report(data, lambda rows: data.measured()[rows].flip(1), "test", tmp_path)
    for same, flipped in zip(*seen, strict=True):
        text = same[0].split()[1]
        row = len(text) - 1 if len(text) < 40 else None
        assert same[0].startswith("1.000 ") and not flipped[0].startswith("1.000 ") and len(text) <= 40
        assert torch.equal(same[1], same[2]) and torch.equal(same[1], flipped[1])
        assert row is None or torch.equal(same[1], data.measured()[row]) and row in data.rows["test"]
        assert row is not None or text == "C" * 39 + "…"
    assert len(seen[0]) == 9 and {len(pair[0].split()[1]) < 40 for pair in seen[0]} == {True, False}


@pytest.mark.parametrize("n", [1, 3, 7])
def test_mirror(tmp_path, n, monkeypatch):
    from matplotlib.figure import Figure
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    up, down = torch.zeros(20), torch.zeros(20)
    up[[3, 7]], down[5] = torch.tensor([1, 0.5]), 0.1
    mirror(tmp_path / "x.png", [(f"C$C{i}$", up, down) for i in range(n)] [:-1] + [("none", up, torch.zeros(20))])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    shown = [axes for axes in figures[0].axes if axes.axison]
    assert len(shown) == n and [axes.get_title() for axes in shown][-1] == "none"
    if n > 1:
        lines = [collection.get_segments() for collection in shown[0].collections]
        assert [[segment[1].tolist() for segment in half] for half in lines] == [[[3, 1], [7, 0.5]], [[5, -1]]]


# ----------------------------------------------------------------------------------------------------- the demo's rule
def spectrum(smiles):
    return demo.fragment(Chem.MolFromSmiles(smiles))


@pytest.mark.parametrize("smiles, above, wanted", [
    ("Clc1ccccc1", 2, 0.32), ("Brc1ccccc1", 2, 0.973), ("Clc1ccc(Cl)cc1", 2, 0.64), ("Clc1ccc(Cl)cc1", 4, 0.32 ** 2),
    ("Brc1ccc(Br)cc1", 2, 2 * 0.973), ("Brc1ccc(Br)cc1", 4, 0.973 ** 2), ("CCCc1ccccc1", 1, 9 * 0.0108),
    ("CCCc1ccccc1", 2, 36 * 0.0108 ** 2), ("c1ccsc1", 2, 0.0447), ("BrCCc1ccccc1", 2, 0.973)])
def test_isotopes_of_the_molecular_ion(smiles, above, wanted):
    found, mass = spectrum(smiles), nominal_mass(Chem.MolFromSmiles(smiles))
    assert found[mass + above] / found[mass] == pytest.approx(wanted, abs=0.006)


def test_isotope_shares():
    assert demo.isotopes(0, 0, 0, 0) == [1, 0, 0, 0, 0]
    assert sum(demo.isotopes(20, 1, 3, 3)) == pytest.approx(1)
    assert demo.isotopes(1, 0, 0, 0)[:2] == pytest.approx([1 / 1.0108, 0.0108 / 1.0108])


@pytest.mark.parametrize("smiles, mass, without", [
    ("CCCCCCO", 102 - 18, "CCCOCCC"), ("CCCCCCCl", 120 - 36, "Clc1ccccc1CC"), ("CCCCCCBr", 164 - 80, "Brc1ccccc1"),
    ("Oc1ccccc1", 94 - 28, "Cc1ccccc1"), ("c1ccncc1", 79 - 27, "C1CCNCC1"), ("CCCCC(C)=O", 58, "CC(=O)C(C)(C)C"),
    ("CCCc1ccccc1", 91, "CCCC1CCCCC1"), ("C1=CCCCC1", 82 - 28, "c1ccccc1"), ("CCCCCN", 30, "CCCCCC")])
def test_losses_and_favoured_ions(smiles, mass, without):
    """A peak that the rule promises, and that the other molecule lacks at the same loss, or at the same m/z."""
    found, other = spectrum(smiles), spectrum(without)
    lost = nominal_mass(Chem.MolFromSmiles(without)) - (nominal_mass(Chem.MolFromSmiles(smiles)) - mass)
    elsewhere = other.get(mass if mass in (58, 91, 30) else lost, 0)
    assert found[mass] > 0.05 and found[mass] > 3 * elsewhere


def test_losses_take_a_hydrogen_along():
    for smiles, mass in ("CCCCCCO", 102 - 18), ("CCCCCCCl", 120 - 36), ("CCCCCF", 90 - 20):
        found = spectrum(smiles)
        assert found[mass] > 2 * found[mass + 1]


def test_rings_open_opposite_a_double_bond():
    alkene, alkane = spectrum("C1=CCCCC1"), spectrum("C1CCCCC1")
    assert alkene[54] / alkene[82] > 3 * alkane[56] / alkane[84] > 0


def test_aromatic_molecules_survive_and_weak_bonds_do_not():
    def survival(smiles):
        found = spectrum(smiles)
        return found[nominal_mass(Chem.MolFromSmiles(smiles))] / sum(found.values())
    assert survival("c1ccc2ccccc2c1") > 0.7 > survival("CCCc1ccccc1") > survival("CCCCCCCCI")
    assert survival("CC1CCCCC1") > 2 * survival("CCCCCCC") and survival("CCCCCCCCI") < 0.05


def test_charge_goes_where_it_is_stable():
    benzyl, iminium = spectrum("CCCCCCc1ccccc1"), spectrum("CCN(CC)CC")
    assert benzyl[91] > 5 * benzyl.get(71, 0)
    assert iminium[86] == 1 and iminium[86] > 5 * iminium[15]


def test_no_hydrogens_are_invented():
    for smiles in ("C", "CC", "FC(F)(F)C(F)(F)F", "BrBr", "c1ccncc1", "N#CC#N", "O=C=O", "ClC(Cl)(Cl)Cl"):
        found, mass = spectrum(smiles), nominal_mass(Chem.MolFromSmiles(smiles))
        assert max(found.values()) == 1 and max(found) <= mass + 4 and min(found) >= 12
    assert {*spectrum("C")} == {16, 17}


def test_observe():
    ideal = {50: 1.0, 51: 0.5, 60: 0.03, 70: 0.009}
    still = dict(demo.observe(ideal, random.Random(0), 0, 0))
    assert still[50] == 999 and still[51] == 500 and still[60] == 30 and 70 not in still
    assert set(still) - {50, 51, 60} <= set(demo.AIR)
    draws = [dict(demo.observe(ideal, random.Random(seed), 0.3, 0.5)) for seed in range(400)]
    assert all(max(draw.values()) == 999 and min(draw.values()) >= 10 for draw in draws)
    assert 120 < sum(60 in draw for draw in draws) < 280                                   # lost half of the time
    ratios = [math.log(draw[51] / draw[50]) for draw in draws]
    assert np.mean(ratios) == pytest.approx(math.log(0.5), abs=0.08)
    assert np.std(ratios) == pytest.approx(0.3 * math.sqrt(2), rel=0.15)


# ---------------------------------------------------------------------------------------------------- the demo's files
N = 250


def parse(text):
    """-> list of (dict of fields, {m/z: intensity})"""
    records = []
    for block in text.strip().split("\n\n"):
        lines = block.split("\n")
        fields = dict(line.split(": ") for line in lines if ":" in line)
        peaks = [tuple(map(int, line.split())) for line in lines if ":" not in line]
        assert len(peaks) == int(fields["Num Peaks"]) == len(dict(peaks)) and peaks == sorted(peaks)
        assert lines[-len(peaks) - 1].startswith("Num Peaks")
        records.append((fields, dict(peaks)))
    return records


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "demo.msp"
    demo.write_demo(path, N, 3)
    return parse(path.read_text())


def test_the_demo_is_the_same_for_the_same_seed(tmp_path):
    files = []
    for i, (n, seed) in enumerate([(12, 0), (12, 0), (12, 1)]):
        random.seed(i)                                                                     # of no effect
        demo.write_demo(tmp_path / f"{i}.msp", n, seed)
        files.append((tmp_path / f"{i}.msp").read_bytes())
    assert files[0] == files[1] != files[2] and b"\r" not in files[0]


def test_records(library):
    assert [fields["ID"] for fields, _ in library] == [str(i) for i in range(1, len(library) + 1)]
    for fields, peaks in library:
        molecule = Chem.MolFromSmiles(fields["SMILES"])
        mass = nominal_mass(molecule)
        assert int(fields["MW"]) == mass and 60 <= mass <= 350
        assert max(peaks.values()) == 999 and min(peaks.values()) >= 10
        assert 12 <= min(peaks) and max(peaks) <= mass + 4
    assert demo.DEMO_ROWS == 2500 and type(demo.DEMO_RECIPE) is int


def test_molecules_stand_there_once_and_some_have_a_replicate(library):
    smiles = [fields["SMILES"] for fields, _ in library]
    blocks = {text: Chem.MolToInchiKey(Chem.MolFromSmiles(text))[:14] for text in smiles}
    assert len(blocks) == len({*blocks.values()}) == N
    counts = Counter(smiles)
    assert {*counts.values()} == {1, 2} and 0.08 * N < sum(n == 2 for n in counts.values()) < 0.22 * N
    for (one, peaks), (other, second) in zip(library, library[1:]):
        if one["SMILES"] == other["SMILES"]:
            assert peaks != second and one["Name"] == other["Name"]


def test_molecules_are_varied(library):
    molecules = [Chem.MolFromSmiles(fields["SMILES"]) for fields, _ in library]
    for text in ("[OX2H]", "[CX3](=O)[#6]", "C(=O)O", "[NX3]", "Cl", "Br", "F", "S", "c1ccccc1", "C#N", "n", "[CX4;R]"):
        assert any(molecule.HasSubstructMatch(Chem.MolFromSmarts(text)) for molecule in molecules), text
    assert any(not molecule.GetRingInfo().NumRings() for molecule in molecules)
    masses = [nominal_mass(molecule) for molecule in molecules]
    assert min(masses) < 110 and max(masses) > 290
    assert not any(molecule.HasSubstructMatch(Chem.MolFromSmarts("[O,S]-[O,S,F,Cl,Br,I]")) for molecule in molecules)


def test_a_neighbour_is_no_replicate(library):
    """The demo leaves something to learn: the most similar molecule's spectrum is far worse than a second one."""
    first, second, data = {}, {}, Fake()
    for fields, peaks in library:
        (second if fields["SMILES"] in first else first)[fields["SMILES"]] = peaks

    def dense(tables):
        spectra = torch.zeros(len(tables), 501)
        for spectrum, peaks in zip(spectra, tables):
            spectrum[[*peaks]] = torch.tensor([*peaks.values()]) / 999
        return spectra
    data.spectra, data.fingerprints = dense([*first.values()]), torch.zeros(N, 4096)
    for row, smiles in zip(data.fingerprints, first):
        index, _ = fingerprint(Chem.MolFromSmiles(smiles))
        row[index[index < ECFP_BITS].astype(np.int64)] = 1
    data.mass = np.array([nominal_mass(Chem.MolFromSmiles(smiles)) for smiles in first])
    data.rows = {"train": np.arange(60, N), "test": np.arange(60)}
    copies, copied = nearest(data, data.rows["test"])
    neighbour = describe(copies, data.rows["test"], data.spectra, data.mass, copied)
    rows = np.array([i for i, smiles in enumerate(first) if smiles in second])
    replicate = describe(dense([*second.values()]), rows, data.spectra, data.mass)
    assert 0.1 < neighbour["weighted"] < 0.6 and 0.9 < replicate["weighted"] < 0.995
    assert neighbour["A R@1"] < 0.3 and replicate["A R@1"] > 0.9


def test_a_prediction_of_nan_finds_nothing():
    library = metrics.weigh(torch.eye(5)[1:].repeat_interleave(3, 0), 1, 0.5)
    query = library[[0, 4]].clone()
    query[1] = float("nan")
    ranks = metrics.library_ranks(query, library, np.array([0, 4]), np.array([9, 9]), np.full(12, 9))
    assert ranks.tolist() == [2.0, 6.5]


def test_a_report_looks_at_so_many_molecules_and_no_more(monkeypatch, tmp_path):
    data = Fake()
    monkeypatch.setattr(metrics, "MOST", 2)
    found = metrics.report(data, lambda rows: data.measured()[rows], "test", tmp_path, log=lambda line: None)
    assert found["columns"]["model"]["n"] == 2 < len(data.rows["test"])
