"""data/molecules/metrics.py: the n-gram model against a dictionary written out by hand, the metrics against RDKit's own
functions pair by pair, and the picture of molecules.
"""
import itertools
import math
from collections import Counter

import numpy as np
import pytest
from edl_tools import write_data
from PIL import Image
from rdkit import Chem, DataStructs
from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator

import train_edl
from data.molecules.metrics import NGram, canonical, describe, draw_grid, internal_diversity

TRAIN = ["CCO", "CCN", "CCCO", "OCC", "CC(=O)O", "c1ccccc1", "CCOC", "CCO"]
VAL = ["CCOCC", "NCCO", "CC=O", "c1ccccc1O", "N"]                # with n-grams that TRAIN lacks


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
    assert describe(["CCO"] * 3, {"CCO"}) == {"n": 3, "valid": 1, "unique": 1 / 3, "novel": 0, "intdiv": 0}


@pytest.mark.parametrize("made", [[], ["", "C1CC"]])
def test_shares_of_nothing_valid(made):
    found = describe(made, {"CCO"})
    assert (found["n"], found["valid"], found["unique"], found["novel"]) == (len(made), 0, 0, 0)
    assert "intdiv" not in found


def test_internal_diversity_is_rdkits_tanimoto_over_all_pairs():
    smiles = ["CCO", "CCN", "c1ccccc1", "CC(=O)Oc1ccccc1C(=O)O", "Cn1cnc2c1c(=O)n(C)c(=O)n2C", "CCO", "C"]
    morgan = GetMorganGenerator(radius=2, fpSize=1024)
    prints = [morgan.GetFingerprint(Chem.MolFromSmiles(text)) for text in smiles]
    pairs = [similarity for one in prints for similarity in DataStructs.BulkTanimotoSimilarity(one, prints)]
    assert internal_diversity(smiles) == pytest.approx(1 - np.mean(pairs), abs=1e-6)
    assert describe(smiles + ["C1CC"], set())["intdiv"] == pytest.approx(1 - np.mean(pairs), abs=1e-6)


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
