"""data/molecules/metrics.py: every metric against brute force (RDKit's own functions pair by pair, loops, small cases
by hand), the n-gram model against a dictionary written out by hand, the pictures and the table.
"""
import itertools
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from edl_tools import write_data
from PIL import Image
from rdkit import Chem, DataStructs
from rdkit.Chem import QED, Crippen, Descriptors
from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator
from rdkit.Chem.Scaffolds import MurckoScaffold

import train_edl
from data.molecules import metrics
from data.molecules.metrics import (NGram, Reference, aupr, auroc, canonical, describe, draw_curves, draw_grid, ece,
                                    on_target, roc, same_lengths, selective, table_lines,
                                    target_grid)

TRAIN = ["CCO", "CCN", "CCCO", "OCC", "CC(=O)O", "c1ccccc1", "CCOC", "CCO"]
VAL = ["CCOCC", "NCCO", "CC=O", "c1ccccc1O", "N"]                # with n-grams that TRAIN lacks
DRUGS = ["CC(=O)Oc1ccccc1C(=O)O", "Cn1cnc2c1c(=O)n(C)c(=O)n2C", "CC(C)Cc1ccc(C(C)C(=O)O)cc1", "CC(=O)Nc1ccc(O)cc1",
         "c1ccc(-n2cnc3ccccc32)cc1", "O=C(Cc1ccccc1)NCc1ccccc1", "C[C@H](N)C(=O)N1CCC[C@@H]1C(=O)O", "CCO"]
MADE = ["O=C(CCc1ccccc1)NCc1ccccc1", "Cn1cnc2c1c(=O)[nH]c(=O)n2C", "OCC", "CCO", "Cc1ccc(-n2cnc3ccccc32)cc1", "C",
        "O=C(Cc1ccccc1)NCc1ccc(F)cc1", "CC(=O)Oc1ccccc1C(=O)O"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_data(tmp_path_factory.mktemp("ngram") / "set", TRAIN, VAL)
    return train_edl.load_data(train_edl.Config(data_dir=str(folder)))


class Brute:
    """The same model as a dictionary: every n-gram of every order is counted, 1 / K is smoothed upwards."""
    def __init__(self, data, order, w=4.0):
        self.data, self.order, self.w, self.K = data, order, w, len(data.vocab)
        grams = [gram for smiles in TRAIN for gram in self.grams(smiles)]
        self.counts = [Counter(gram[-k:] for gram in grams) for k in range(1, order + 1)]
        self.contexts = [Counter() for _ in self.counts]
        for counts, contexts in zip(self.counts, self.contexts):
            for gram, n in counts.items():
                contexts[gram[:-1]] += n

    def grams(self, smiles):
        """The last `order` tokens up to each target, EOS too; BOS again and again in front."""
        tokens = ["<bos>"] * self.order + train_edl.tokenize(smiles) + ["<eos>"]
        return [tuple(tokens[i - self.order + 1:i + 1]) for i in range(self.order, len(tokens))]

    def probability(self, gram):
        p = 1 / self.K
        for k in range(1, self.order + 1):
            seen, context = self.counts[k - 1][gram[-k:]], self.contexts[k - 1][gram[-k:-1]]
            p = (seen + self.w * p) / (context + self.w)
        return p

    def nll(self, smiles):
        return float(np.mean([-math.log(self.probability(gram)) for text in smiles for gram in self.grams(text)]))


@pytest.mark.parametrize("order", [1, 2, 3, 6])
def test_ngram_is_the_dictionary_model(data, order):
    model, brute = NGram(data, order), Brute(data, order)
    assert model.nll(data, "train") == pytest.approx(brute.nll(TRAIN), rel=1e-12)
    assert model.nll(data, "val") == pytest.approx(brute.nll(VAL), rel=1e-12)
    for context in itertools.islice(itertools.product(["<bos>", "C", "O", "<eos>"], repeat=order - 1), 70):
        grams = [(*context, token) for token in data.vocab]
        digits = np.array([[data.vocab.index(token) for token in gram] for gram in grams], np.int64)
        codes = [sum(digits[:, -1 - lag] * len(data.vocab) ** lag for lag in range(k)) for k in range(1, order + 1)]
        p = model.probability(codes)
        assert p == pytest.approx([brute.probability(gram) for gram in grams], rel=1e-12)
        assert p.sum() == pytest.approx(1, abs=1e-12) and (p > 0).all()


def test_the_unigram_is_the_smoothed_relative_frequency(data):
    model = NGram(data, 1)
    counts = Counter(token for smiles in TRAIN for token in [*train_edl.tokenize(smiles), "<eos>"])
    total, K = sum(counts.values()), len(data.vocab)
    wanted = [(counts[token] + 4.0 / K) / (total + 4.0) for token in data.vocab]
    assert model.probability([np.arange(K)]) == pytest.approx(wanted, rel=1e-12)


def test_ngram_samples_follow_the_seed_and_the_probabilities(data):
    model = NGram(data, 3)
    made = model.generate(4000, seed=1)
    assert made == model.generate(4000, seed=1) and made != model.generate(4000, seed=2)
    brute = Brute(data, 3)
    first = Counter((train_edl.tokenize(text) or ["<eos>"])[0] for text in made)
    chance = {token: brute.probability(("<bos>", "<bos>", token)) for token in data.vocab[1:]}  # never BOS
    for token, p in chance.items():
        p = p / sum(chance.values())
        assert abs(first[token] / len(made) - p) < 5 * math.sqrt(p * (1 - p) / len(made)), token
    assert max(len(train_edl.tokenize(text)) for text in made) <= data.block


def test_too_long_an_ngram_is_refused(data):
    with pytest.raises(AssertionError, match="order 40"):
        NGram(data, 40)


# --------------------------------------------------------------------------------------------------- shares of samples
def test_canonical():
    assert canonical("") is None and canonical("C1CC") is None and canonical("C(") is None
    assert canonical("OCC") == canonical("C(O)C") == "CCO"


def test_shares_of_a_list_made_by_hand():
    made = ["CCO", "OCC", "CCN", "", "C1CC", "c1ccccc1", "CCO"]        # 5 valid, 3 different, CCO known
    found = describe(made, {"CCO", "CCCC"})
    assert found["n"] == 7 and found["valid"] == pytest.approx(5 / 7)
    assert found["unique"] == pytest.approx(3 / 5) and found["novel"] == pytest.approx(2 / 3)
    assert describe(made, set())["novel"] == 1 and describe(made, {"CCO", "CCN", "c1ccccc1"})["novel"] == 0
    same = {"n": 3, "valid": 1, "unique": 1 / 3, "novel": 0, "intdiv": 0, "intdiv2": 0}
    assert describe(["CCO"] * 3, {"CCO"}) == same


@pytest.mark.parametrize("made", [[], ["", "C1CC"]])
def test_shares_of_nothing_valid(made):
    found = describe(made, {"CCO"})
    assert (found["n"], found["valid"], found["unique"], found["novel"]) == (len(made), 0, 0, 0)
    assert found.keys() == {"n", "valid", "unique", "novel"}
    assert describe(made, {"CCO"}, Reference(["CCO"])) == found


def test_unique_at_k_is_of_the_first_k_valid_ones():
    made = ["C(", *[f"[{i % 900 + 1}CH4]" for i in range(1000)], *["N"] * 500]
    assert describe(made, set())["unique@1000"] == 0.9 and "unique@10000" not in describe(made, set())
    assert "unique@1000" not in describe(made[:1000], set())           # 999 valid


def test_internal_diversity_is_rdkits_tanimoto_over_all_pairs():
    smiles = ["CCO", "CCN", "c1ccccc1", "CC(=O)Oc1ccccc1C(=O)O", "Cn1cnc2c1c(=O)n(C)c(=O)n2C", "CCO", "C"]
    morgan = GetMorganGenerator(radius=2, fpSize=1024)
    prints = [morgan.GetFingerprint(Chem.MolFromSmiles(text)) for text in smiles]
    pairs = [similarity for one in prints for similarity in DataStructs.BulkTanimotoSimilarity(one, prints)]
    found = describe(smiles + ["C1CC"], set())
    assert found["intdiv"] == pytest.approx(1 - np.mean(pairs), abs=1e-6)
    assert found["intdiv2"] == pytest.approx(1 - math.sqrt(np.mean(np.square(pairs))), abs=1e-6)


# ------------------------------------------------------------------------------------------- against held-out molecules
def molecules(smiles):
    return [Chem.MolFromSmiles(text) for text in smiles]


def brute_cosine(one, other):
    keys = {*one, *other}
    dot, square, squares = (sum(a[key] * b[key] for key in keys) for a, b in ((one, other), (one, one), (other, other)))
    return dot / math.sqrt(square * squares)


def brute_w1(one, other):
    """The mean difference of the quantile functions, on samples repeated up to the same size."""
    return float(np.abs(np.sort(np.repeat(one, len(other))) - np.sort(np.repeat(other, len(one)))).mean())


def test_comparisons_with_a_reference_are_brute_force_over_rdkit():
    found = describe(MADE + ["C1CC"], set(), Reference(DRUGS))
    morgan = GetMorganGenerator(radius=2, fpSize=1024)
    prints = [[morgan.GetFingerprint(molecule) for molecule in molecules(side)] for side in (MADE, DRUGS)]
    best = [max(DataStructs.TanimotoSimilarity(one, other) for other in prints[1]) for one in prints[0]]
    assert found["snn"] == pytest.approx(np.mean(best), abs=1e-6) and best[2] == best[7] == 1

    fragments = [Counter(), Counter()]
    scaffolds = [Counter(), Counter()]
    for side, counts, rings in zip((MADE, DRUGS), fragments, scaffolds):
        for molecule in molecules(side):
            counts.update(Chem.MolToSmiles(Chem.FragmentOnBRICSBonds(molecule)).split("."))
            scaffold = MurckoScaffold.GetScaffoldForMol(molecule)
            if len(Chem.GetSSSR(scaffold)) >= 2:
                rings[Chem.MolToSmiles(scaffold)] += 1
    assert found["frag"] == pytest.approx(brute_cosine(*fragments), rel=1e-12) and 0 < found["frag"] < 1
    assert found["scaf"] == pytest.approx(brute_cosine(*scaffolds), rel=1e-12) and 0 < found["scaf"] < 1

    functions = {"logp": Crippen.MolLogP, "qed": QED.qed, "weight": Descriptors.MolWt,
                 "sas": metrics.sascorer().calculateScore}
    for name, f in functions.items():
        assert found[f"w1_{name}"] == pytest.approx(brute_w1(*([f(m) for m in molecules(s)] for s in (MADE, DRUGS))))
        assert found[f"w1_{name}"] > 0


def test_a_set_is_like_itself_and_duplicates_count():
    found = describe(DRUGS[::-1], set(), Reference(DRUGS))
    same = {"snn": 1, "frag": 1, "scaf": 1, "w1_logp": 0, "w1_sas": 0, "w1_qed": 0, "w1_weight": 0}
    assert {name: found[name] for name in same} == pytest.approx(same, abs=1e-6)
    twice = describe(["CCO", "CCO", "CCC"], set(), Reference(["CCO", "C"]))
    once = describe(["CCO", "CCC"], set(), Reference(["CCO", "C"]))
    assert twice["snn"] == pytest.approx((2 * 1 + once["snn"] * 2 - 1) / 3, abs=1e-6)
    assert "scaf" not in once and once["frag"] > 0                     # no rings: nothing to compare


def test_a_scaffold_of_one_ring_is_not_counted():
    found = describe(["Cc1ccccc1", "c1ccc2ccccc2c1"], set(), Reference(["Oc1ccccc1", "Cc1ccc2ccccc2c1"]))
    assert found["scaf"] == 1
    assert "scaf" not in describe(["Cc1ccccc1"], set(), Reference(["Oc1ccccc1"]))


@pytest.mark.parametrize("smiles", [[], ["CCO", "C1CC"], [""]])
def test_a_reference_is_of_valid_molecules(smiles):
    with pytest.raises(ValueError, match=f"of {len(smiles)} reference SMILES"):
        Reference(smiles)


@pytest.mark.parametrize("sizes", [(1, 1), (7, 5), (64, 64), (200, 33)])
def test_wasserstein(sizes):
    rng = np.random.default_rng(sum(sizes))
    one, other = rng.normal(size=sizes[0]), rng.normal(1, 2, size=sizes[1]).round(1)       # with ties
    found = metrics.wasserstein(one, other)
    assert found == pytest.approx(brute_w1(one, other)) and found == pytest.approx(metrics.wasserstein(other, one))
    grid = np.linspace(-12, 12, 40_001)
    F, G = ((side <= grid[:, None]).mean(1) for side in (one, other))
    assert found == pytest.approx(np.abs(F - G).sum() * (grid[1] - grid[0]), abs=1e-2)


def test_wasserstein_by_hand():
    assert metrics.wasserstein(np.array([0.0]), np.array([3.0])) == 3
    assert metrics.wasserstein(np.array([0.0, 1.0]), np.array([0.5])) == 0.5
    assert metrics.wasserstein(np.array([1.0, 1.0, 1.0]), np.array([1.0])) == 0
    assert metrics.wasserstein(np.array([0.0, 0.0, 3.0]), np.array([0.0])) == 1


def test_nearest_in_chunks_is_nearest_at_once():
    rng = np.random.default_rng(0)
    bits, others = ((rng.random((n, 1024)) < 0.05).astype(np.uint8) for n in (23, 41))
    assert (metrics.nearest(bits, others, chunk=7) == metrics.nearest(bits, others)).all()
    assert (metrics.nearest(bits, others) == metrics.tanimoto(bits, others).max(1)).all()


def test_frechet_distance():
    def normal(mu, variances):
        turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
        return {"mu": turn @ mu, "sigma": turn @ np.diag(variances) @ turn.T}
    one, other = normal([1.0, 2, 3], [1.0, 4, 0]), normal([1.0, 0, 3], [9.0, 1, 0])
    assert metrics.frechet(one, other) == pytest.approx(4 + (1 - 3) ** 2 + (2 - 1) ** 2)   # they share their axes
    assert metrics.frechet(one, one) == pytest.approx(0, abs=1e-9)


def test_fcd_is_there_with_fcd_torch_alone(monkeypatch):
    class FCD:
        def __init__(self, canonize):
            assert not canonize

        def precalc(self, smiles):
            assert all(text == canonical(text) for text in smiles)
            counts = np.array([[text.count("C"), text.count("O")] for text in smiles], float)
            return {"mu": counts.mean(0), "sigma": np.cov(counts.T)}
    monkeypatch.setitem(sys.modules, "fcd_torch", SimpleNamespace(FCD=FCD))
    reference = Reference(["CCO", "CCC", "OCCO"])
    assert describe(["OCC", "CCC", "OCCO"], set(), reference)["fcd"] == pytest.approx(0, abs=1e-9)
    assert describe(["CCCO", "CCCC", "OCCCO"], set(), reference)["fcd"] == pytest.approx(1)       # one carbon more
    assert "fcd" not in describe(["CCO"], set(), reference)
    assert "fcd" not in describe(["CCO", "C"], set(), Reference(["CCO"]))
    monkeypatch.setitem(sys.modules, "fcd_torch", None)
    assert "fcd" not in describe(["CCO", "C"], set(), Reference(["CCO", "CC"]))


def test_metrics_needs_neither_the_script_nor_prepare():
    """train_edl imports metrics, and prepare imports both."""
    code = ("import sys; sys.modules.update(dict.fromkeys(['train_edl', 'prepare', 'data.molecules.prepare']));"
            "import data.molecules.metrics as m; print(m.describe(['CCO'], set(), m.Reference(['CCO']))['snn'])")
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert run.stdout == "1.0\n", run.stderr


# ----------------------------------------------------------------------------------------------------------- conditions
def test_properties_on_target_by_hand():
    groups = [{"values": {"logp": 1.0, "tpsa": 30.0}, "scaffold": None, "smiles": ["CCO", "CCCC", "C1CC", "CCN"]},
              {"values": {"logp": 3.0}, "scaffold": None, "smiles": ["c1ccccc1", "CCCCCC"]},
              {"values": {"logp": 2.0, "qed": 0.5}, "scaffold": None, "smiles": ["CCOC", "("]},
              {"values": {"sas": 2.0}, "scaffold": None, "smiles": ["", "C("]}]
    found = on_target(groups)
    logp = [[Crippen.MolLogP(m) for m in molecules(s)] for s in (["CCO", "CCCC", "CCN"], ["c1ccccc1", "CCCCCC"],
                                                                 ["CCOC"])]
    off = [abs(value - target) for values, target in zip(logp, (1, 3, 2)) for value in values]
    assert found.pop("valid") == 6 / 10
    assert found.pop("mad_logp") == pytest.approx(sum(off) / 6)
    spread = [math.sqrt(sum((v - sum(x) / len(x)) ** 2 for v in x) / len(x)) for x in logp[:2]]
    assert found.pop("sd_logp") == pytest.approx(sum(spread) / 2)       # the third group has one molecule: no spread
    tpsa = [Descriptors.TPSA(m) for m in molecules(["CCO", "CCCC", "CCN"])]
    assert found.pop("mad_tpsa") == pytest.approx(np.mean([abs(value - 30) for value in tpsa]))
    assert found.pop("sd_tpsa") == pytest.approx(np.std(tpsa))
    assert found.pop("mad_qed") == pytest.approx(abs(QED.qed(Chem.MolFromSmiles("CCOC")) - 0.5))
    assert not found                                                    # nothing valid was made for sas


def test_scaffolds_on_target_by_hand():
    made = ["Cc1ccccc1", "OCC(c1ccccc1)F", "Cc1ccncc1", "CCO", "("]
    groups = [{"values": {}, "scaffold": "c1ccccc1", "smiles": made},
              {"values": {}, "scaffold": "", "smiles": ["CCO", "Cc1ccccc1"]},
              {"values": {}, "scaffold": None, "smiles": ["CCO"]}]
    found = on_target(groups)
    morgan = GetMorganGenerator(radius=2, fpSize=1024)
    near = DataStructs.TanimotoSimilarity(*[morgan.GetFingerprint(m) for m in molecules(["c1ccccc1", "c1ccncc1"])])
    assert 0 < near < 0.8
    assert found == pytest.approx({"valid": 7 / 8, "scaffold_match": 3 / 6, "scaffold_over_0.8": 3 / 6,
                                   "scaffold_similarity": (1 + 1 + near + 0 + 1 + 0) / 6}, abs=1e-6)


def test_a_scaffold_is_the_same_however_it_is_written():
    group = {"values": {}, "scaffold": "C1=CC=CC=C1", "smiles": ["Cc1ccccc1"]}
    assert on_target([group])["scaffold_match"] == 1
    for scaffold in metrics.SCAFFOLDS:
        assert MurckoScaffold.MurckoScaffoldSmiles(scaffold) == scaffold          # what a molecule of them is read as
        found = on_target([{"values": {}, "scaffold": scaffold, "smiles": [scaffold, *metrics.SCAFFOLDS]}])
        assert found["scaffold_match"] == found["scaffold_over_0.8"] == 2 / 6


@pytest.mark.parametrize("groups", [[], [{"values": {"logp": 1.0}, "scaffold": "", "smiles": ["(", ""]}]])
def test_nothing_valid_is_on_target(groups):
    assert on_target(groups) == {"valid": 0}


def test_target_grid():
    assert target_grid(["qed"]) == [{"qed": 0.6}, {"qed": 0.725}, {"qed": 0.85}]
    assert target_grid(["sas", "logp"]) == [{"sas": 2.0, "logp": 1.0}, {"sas": 2.0, "logp": 3.0},
                                            {"sas": 3.5, "logp": 1.0}, {"sas": 3.5, "logp": 3.0}]
    assert len(target_grid(["tpsa", "logp", "sas"])) == len(set(map(str, target_grid(["tpsa", "logp", "sas"])))) == 8
    assert metrics.TARGETS.keys() == metrics.PROPERTIES.keys()


# ------------------------------------------------------------------------------- scores that should tell bad from good
@pytest.fixture(params=[(1, 12, 0), (2, 40, 1), (3, 60, 7), (4, 31, 2)], ids=str)
def scored(request):
    """Scores rounded so that many tie, and a class that goes with them."""
    seed, n, digits = request.param
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=n).round(digits)
    positive = rng.random(n) < 1 / (1 + np.exp(-scores))
    assert 0 < positive.sum() < n
    return scores, positive


def test_auroc_over_all_pairs(scored):
    scores, positive = scored
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert auroc(scores, positive) == pytest.approx(np.mean(pairs), rel=1e-12)
    assert auroc(-scores, positive) == pytest.approx(1 - np.mean(pairs), rel=1e-12)


def test_aupr_over_all_thresholds(scored):
    scores, positive = scored
    total = before = 0
    for threshold in sorted(set(scores), reverse=True):
        chosen = scores >= threshold
        hits = sum(positive[chosen])
        total, before = total + (hits - before) / sum(positive) * hits / sum(chosen), hits
    assert aupr(scores, positive) == pytest.approx(total, rel=1e-12)


def test_roc_over_all_thresholds(scored):
    scores, positive = scored
    false, true = roc(scores, positive)
    assert false[0] == true[0] == 0 and len(false) == len(true) == len(set(scores)) + 1
    for i, threshold in enumerate(sorted(set(scores), reverse=True)):
        assert false[i + 1] == pytest.approx(np.mean(scores[~positive] >= threshold), rel=1e-12)
        assert true[i + 1] == pytest.approx(np.mean(scores[positive] >= threshold), rel=1e-12)
    area = sum((x2 - x1) * (y1 + y2) / 2 for x1, x2, y1, y2 in zip(false, false[1:], true, true[1:]))
    assert area == pytest.approx(auroc(scores, positive), rel=1e-12)


def test_scores_as_in_scikit_learn(scored):
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, positive = scored
    assert auroc(scores, positive) == pytest.approx(sklearn.roc_auc_score(positive, scores))
    assert aupr(scores, positive) == pytest.approx(sklearn.average_precision_score(positive, scores))


def test_scores_by_hand():
    assert auroc([1, 2, 3], [False, False, True]) == 1 and aupr([1, 2, 3], [False, False, True]) == 1
    assert auroc([3, 2, 1], [False, False, True]) == 0 and aupr([3, 2, 1], [False, False, True]) == 1 / 3
    assert auroc([5] * 4, [True, False, False, True]) == aupr([5] * 4, [True, False, False, True]) == 0.5
    assert [side.tolist() for side in roc([5, 5], [True, False])] == [[0, 1], [0, 1]]


def test_scores_with_an_empty_class():
    for scores, positive in ([1.0, 2], [True, True]), ([1.0, 2], [False, False]), ([], []):
        assert math.isnan(auroc(scores, positive))
        false, true = roc(scores, positive)
        assert np.isnan(true).all() == (not any(positive)) and np.isnan(false).all() == (all(positive))
    assert aupr([1.0, 2], [True, True]) == 1 and math.isnan(aupr([1.0], [False])) and math.isnan(aupr([], []))


@pytest.mark.parametrize("judge", [auroc, aupr, roc, selective, ece])
def test_scores_that_are_not_finite_are_refused_and_counted(judge):
    with pytest.raises(ValueError, match="3 of 4 scores are not finite"):
        judge([math.nan, 0.2, math.inf, -math.inf], [True, False, True, False])
    with pytest.raises(AssertionError):
        judge([0.1, 0.2], [True])


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_ece_by_a_loop(bins):
    rng = np.random.default_rng(bins)
    confidence = np.concatenate([rng.random(200), np.arange(1, bins + 1) / bins, [0.0]])       # on the edges too
    correct = rng.random(len(confidence)) < confidence
    total = 0
    for i in range(bins):
        inside = [(c, hit) for c, hit in zip(confidence, correct) if i / bins < c <= (i + 1) / bins or i == c == 0]
        if inside:
            total += abs(sum(c for c, _ in inside) - sum(hit for _, hit in inside)) / len(confidence)
    assert ece(confidence, correct, bins) == pytest.approx(total, rel=1e-9)


def test_ece_by_hand():
    assert ece([0.9] * 10, [True] * 9 + [False]) == pytest.approx(0, abs=1e-12)
    assert ece([1.0, 1.0], [True, False]) == 0.5 and ece([0.0], [True]) == 1 and math.isnan(ece([], []))
    assert ece([0.8, 0.2], [False, True], bins=2) == pytest.approx(0.8) and ece([0.8, 0.2], [False, True], bins=1) == 0
    with pytest.raises(AssertionError, match="confidence"):
        ece([97.0], [True])


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_selective_is_the_mean_over_the_orders_of_ties(n):
    rng = np.random.default_rng(n)
    scores, good = rng.integers(0, 3, n), rng.random(n) < 0.5
    orders = [order for order in itertools.permutations(range(n)) if all(np.diff(scores[list(order)]) >= 0)]
    shares = [[np.mean(good[list(order[:k])]) for k in range(1, n + 1)] for order in orders]
    coverage, share = selective(scores, good)
    np.testing.assert_allclose(coverage, [k / n for k in range(1, n + 1)])
    np.testing.assert_allclose(share, np.mean(shares, 0), rtol=1e-12)


def test_selective_by_hand():
    coverage, share = selective([3.0, 1.0, 2.0, 1.0], [False, True, False, False])
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1] and share.tolist() == [0.5, 0.5, pytest.approx(1 / 3), 0.25]
    assert [side.tolist() for side in selective([], [])] == [[], []]


def test_same_lengths():
    rng = np.random.default_rng(0)
    lengths, others = rng.integers(20, 40, 300), rng.integers(30, 60, 90)
    i, j = same_lengths(lengths, others)
    assert (lengths[i] == others[j]).all() and len(set(i)) == len(i) and len(set(j)) == len(j)
    assert Counter(lengths[i].tolist()) == Counter(lengths.tolist()) & Counter(others.tolist())
    assert all((a == b).all() for a, b in zip((i, j), same_lengths(lengths, others, seed=0)))
    assert not np.array_equal(i, same_lengths(lengths, others, seed=1)[0])
    for one, other in ([1, 2], [3]), ([], [3]), ([], []):
        assert [side.tolist() for side in same_lengths(one, other)] == [[], []]
        assert all(np.arange(5)[side].shape == (0,) for side in same_lengths(one, other))


# ------------------------------------------------------------------------------------------------------------ picture
@pytest.mark.parametrize("n", [1, 5, 60])
def test_the_grid_of_molecules_is_a_picture(tmp_path, n):
    made = [{"smiles": "C" * (i % 9 + 1) + "O", "nll": i / 7, "epistemic": 1 / (i + 1)} for i in range(n)]
    draw_grid(tmp_path / "grid.png", made + [{"smiles": "C1CC", "nll": 0.0, "epistemic": 0.0}])
    with Image.open(tmp_path / "grid.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.size == (6 * 240, 200 * math.ceil(min(n, 24) / 6))
        assert len(set(picture.convert("L").tobytes())) > 2             # not blank


def test_a_plain_model_is_drawn_by_its_nll_and_nothing_valid_draws_nothing(tmp_path):
    draw_grid(tmp_path / "plain.png", [{"smiles": "CCO", "nll": 0.3}])
    assert (tmp_path / "plain.png").stat().st_size > 0
    draw_grid(tmp_path / "none.png", [{"smiles": "C1CC", "nll": 0.3}])
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("n", [1, 3])
def test_curves_are_a_picture(tmp_path, n):
    panels = {f"panel {i}": {"a": ([0, 1], [0, i]), "b": (np.arange(3), np.array([1, np.nan, 2]))} for i in range(n)}
    draw_curves(tmp_path / "curves.png", panels, "coverage", "valid")
    with Image.open(tmp_path / "curves.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.size == (500 * n, 400)
        assert len(set(picture.convert("L").tobytes())) > 2


def test_no_curves_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    draw_curves(tmp_path / "curves.png", {"panel": {"a": ([0], [0])}}, "x", "y")
    assert not (tmp_path / "curves.png").exists()


# -------------------------------------------------------------------------------------------------------------- table
def test_table():
    columns = {"none": {"n": None, "more": 1}, "MolGPT": {"n": 1000, "valid": 0.98765, "snn": np.float64(0.5)},
               "a longer name": {"valid": 1.0, "w1_weight": 123.45678, "n": np.int64(20)}}
    assert table_lines(columns) == [                # the rows of the first of the longest columns come first
        "                 none      MolGPT  a longer name",
        "n                   -        1000             20",
        "valid               -      0.9877         1.0000",
        "snn                 -      0.5000              -",
        "more                1           -              -",
        "w1_weight           -           -       123.4568"]
