"""What only evaluates: molecules against held-out ones (the metrics of MOSES, Polykovskiy et al. 2020), against the
conditions that they were asked for, scores that should tell bad from good, n-gram baselines, pictures and a table."""
import functools
import itertools
import sys
from collections import Counter
from numbers import Integral
from pathlib import Path

import numpy as np
from rdkit import Chem, DataStructs, RDConfig, RDLogger
from rdkit.Chem import QED, Crippen, Descriptors, Draw, rdMolDescriptors
from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator
from rdkit.Chem.Scaffolds import MurckoScaffold

from common import fail

MORGAN = GetMorganGenerator(radius=2, fpSize=1024)


# ------------------------------------------------------------------------------------------------------ one molecule
@functools.cache
def sascorer():
    """The synthetic accessibility score of Ertl and Schuffenhauer (2009), which RDKit ships in its Contrib folder."""
    sys.path.append(str(Path(RDConfig.RDContribDir) / "SA_Score"))
    try:
        import sascorer as module
    except ImportError:
        fail("this RDKit comes without Contrib/SA_Score, which sas needs: pip install rdkit, or leave sas out")
    return module


PROPERTIES = {
    "logp": Crippen.MolLogP,                                         # octanol/water, Crippen
    "sas": lambda molecule: sascorer().calculateScore(molecule),     # 1 (easy to make) .. 10
    "tpsa": rdMolDescriptors.CalcTPSA,                               # polar surface area, square angstrom
    "qed": QED.qed,                                                  # drug-likeness, 0 .. 1
}
COMPARED = {name: PROPERTIES[name] for name in ("logp", "sas", "qed")} | {"weight": Descriptors.MolWt}     # g / mol


def parse(smiles):
    """SMILES -> RDKit molecule, or None for what is not a molecule (the empty string too)."""
    RDLogger.DisableLog("rdApp.*")                  # invalid samples are counted, not told one by one
    return Chem.MolFromSmiles(smiles) if smiles else None


def canonical(smiles):
    """RDKit's canonical SMILES, or None for what is not a molecule (the empty string too)."""
    molecule = parse(smiles)
    return None if molecule is None else Chem.MolToSmiles(molecule)


def murcko(molecule):
    """-> SMILES of its Bemis-Murcko scaffold without stereo marks, "" of an acyclic one."""
    return MurckoScaffold.MurckoScaffoldSmiles(mol=molecule)


# -------------------------------------------------------------------------------------------- samples against a set
def fingerprints(molecules):
    """List of molecules -> (n, 1024) uint8 of 0 and 1: Morgan, radius 2."""
    return np.array([MORGAN.GetFingerprintAsNumPy(molecule) for molecule in molecules], np.uint8).reshape(-1, 1024)


def tanimoto(bits, others):
    """(n, 1024) and (m, 1024) of 0 and 1 -> (n, m) float32: shared bits / bits of either."""
    bits, others = bits.astype(np.float32), others.astype(np.float32)
    both = bits @ others.T
    return both / np.maximum(bits.sum(1)[:, None] + others.sum(1) - both, 1)


def nearest(bits, others, chunk=2048):
    """For each row of bits the highest Tanimoto similarity to a row of others -> (n,) float32; chunk bounds memory."""
    best = np.zeros(len(bits), np.float32)
    for i, j in itertools.product(range(0, len(bits), chunk), range(0, len(others), chunk)):
        best[i:i + chunk] = np.maximum(best[i:i + chunk], tanimoto(bits[i:i + chunk], others[j:j + chunk]).max(1))
    return best


def brics_fragments(molecule):
    """-> SMILES of the pieces between the bonds that BRICS cuts (Degen et al. 2008)."""
    return Chem.MolToSmiles(Chem.FragmentOnBRICSBonds(molecule)).split(".")


def ring_scaffolds(molecule):
    """-> the Bemis-Murcko scaffold as MOSES counts it, stereo marks kept: [SMILES], or [] with fewer than two rings."""
    scaffold = MurckoScaffold.GetScaffoldForMol(molecule)
    return [Chem.MolToSmiles(scaffold)] if scaffold.GetRingInfo().NumRings() >= 2 else []


def count(function, molecules):
    """Counter of all that function(molecule) lists."""
    return Counter(itertools.chain.from_iterable(map(function, molecules)))


def cosine(counts, others):
    """Two Counters -> cosine similarity in 0 .. 1, or None if one is empty."""
    lengths = [sum(n * n for n in one.values()) ** 0.5 for one in (counts, others)]
    return sum(n * others[key] for key, n in counts.items()) / (lengths[0] * lengths[1]) if all(lengths) else None


def wasserstein(values, others):
    """1-Wasserstein distance between two samples (n,) and (m,): the integral of |F - G| over their step functions."""
    edges = np.sort(np.concatenate([values, others]))
    F, G = (np.searchsorted(np.sort(one), edges[:-1], side="right") / len(one) for one in (values, others))
    return float((np.abs(F - G) * np.diff(edges)).sum())


def frechet(one, other):
    """Frechet distance of two normal distributions, dicts of mu (d,) and sigma (d, d) (Dowson and Landau 1982).

    The trace of (S1 S2)^1/2 is taken from the symmetric S1^1/2 S2 S1^1/2, whose eigenvalues are real."""
    values, vectors = np.linalg.eigh(one["sigma"])
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ other["sigma"] @ root).clip(min=0)).sum()
    distance = ((one["mu"] - other["mu"]) ** 2).sum() + np.trace(one["sigma"] + other["sigma"]) - 2 * shared
    return max(0.0, float(distance))                # rounding may take it below 0


class Reference:
    """Held-out molecules in the form that compare() needs, made once from a list of valid SMILES (else ValueError).

    bits (n, 1024); fragments, scaffolds: Counters; properties: dict of (n,) by name of COMPARED. With fcd_torch and
    two molecules also chemnet, the mean and covariance of ChemNet's activations, else None."""
    def __init__(self, smiles):
        molecules = [parse(s) for s in smiles]
        wrong = [s for s, molecule in zip(smiles, molecules) if molecule is None]
        if wrong or not molecules:
            raise ValueError(f"{len(wrong)} of {len(smiles)} reference SMILES are not valid: {wrong[:3]}")
        self.bits = fingerprints(molecules)
        self.fragments, self.scaffolds = count(brics_fragments, molecules), count(ring_scaffolds, molecules)
        self.properties = {name: np.array([f(m) for m in molecules]) for name, f in COMPARED.items()}
        try:
            from fcd_torch import FCD
        except ImportError:
            self.fcd = self.chemnet = None
        else:
            self.fcd = FCD(canonize=False)                                # compare() hands it canonical SMILES
            self.chemnet = self.activations(map(Chem.MolToSmiles, molecules))

    def activations(self, smiles):
        smiles = list(smiles)
        return self.fcd.precalc(smiles) if self.fcd and len(smiles) > 1 else None

    def compare(self, molecules, bits):
        """List of molecules, at least one, and their fingerprints -> dict as in describe()."""
        frag = cosine(count(brics_fragments, molecules), self.fragments)
        scaf = cosine(count(ring_scaffolds, molecules), self.scaffolds)
        result = {"snn": float(nearest(bits, self.bits).mean()), "frag": frag, "scaf": scaf}
        for name, f in COMPARED.items():
            result[f"w1_{name}"] = wasserstein(np.array([f(m) for m in molecules]), self.properties[name])
        made = self.chemnet and self.activations(map(Chem.MolToSmiles, molecules))
        result["fcd"] = frechet(made, self.chemnet) if made else None
        return {name: value for name, value in result.items() if value is not None}


def describe(smiles, known, reference=None):
    """List of SMILES, the set of canonical training SMILES and perhaps a Reference -> dict of n, shares and distances.

    valid: parsed by RDKit and not empty; unique: among the valid; unique@1000, unique@10000: among the first so many
    valid ones, only where there are so many; novel: of the unique, those not in known; intdiv: 1 - mean T over all
    pairs of the first 2,000 valid ones, self included, where T is the Tanimoto similarity (Morgan, radius 2, 1024
    bits); intdiv2: 1 - sqrt(mean T^2) over the same pairs, as in MOSES's paper. Its code takes all valid ones, and for
    intdiv2 the mean over molecules of the root of each one's mean T^2, which makes it a little higher (by 0.001).

    With a reference, over all valid ones, duplicates too: snn, mean of the highest T to a reference molecule; frag and
    scaf, cosine of the counts of BRICS fragments and of Bemis-Murcko scaffolds with two rings or more (no key if one
    side has none); w1_logp, w1_sas, w1_qed, w1_weight, 1-Wasserstein distances; fcd, if fcd_torch is installed and
    both sides have two molecules (Preuer et al. 2018). These are MOSES's definitions, but its reference has 176,074
    molecules and its sample 30,000: with a smaller reference snn falls, with fewer of either scaf falls and fcd grows.
    If nothing is valid, there are only n, valid, unique and novel."""
    molecules = [molecule for molecule in map(parse, smiles) if molecule is not None]
    valid = list(map(Chem.MolToSmiles, molecules))
    unique = set(valid)
    result = {"n": len(smiles), "valid": len(valid) / max(len(smiles), 1), "unique": len(unique) / max(len(valid), 1)}
    result |= {f"unique@{k}": len(set(valid[:k])) / k for k in (1000, 10000) if len(valid) >= k}
    result["novel"] = len(unique - known) / max(len(unique), 1)
    if valid:
        bits = fingerprints(molecules)
        T = tanimoto(bits[:2000], bits[:2000])
        result |= {"intdiv": float(1 - T.mean()), "intdiv2": float(1 - np.sqrt((T * T).mean()))}
    return result | (reference.compare(molecules, bits) if reference and valid else {})


# ------------------------------------------------------------------------------------------------------- conditions
# MolGPT's generate.py for MOSES (Bagal et al. 2022): the values it asks for one by one, and its scaffolds
TARGETS = {"qed": (0.6, 0.725, 0.85), "sas": (2.0, 2.75, 3.5), "logp": (1.0, 2.0, 3.0), "tpsa": (30.0, 60.0, 90.0)}
SCAFFOLDS = ("O=C(Cc1ccccc1)NCc1ccccc1", "c1cnc2[nH]ccc2c1", "c1ccc(-c2ccnnc2)cc1", "c1ccc(-n2cnc3ccccc32)cc1",
             "O=C(c1cc[nH]c1)N1CCN(c2ccccc2)CC1")


def target_grid(names):
    """Names of TARGETS -> list of dicts {name: target}: one name's three values; of several, all combinations of the
    lowest and the highest value of each. MolGPT's generate.py used such corners, for example sas x logp =
    {2, 3.5} x {1, 3}; but beside another property it took tpsa as 40 and 80, and logp with tpsa alone as 2 and 4."""
    values = [TARGETS[name] if len(names) == 1 else (TARGETS[name][0], TARGETS[name][-1]) for name in names]
    return [dict(zip(names, corner)) for corner in itertools.product(*values)]


def compare_scaffolds(one, other):
    """Two SMILES -> (whether they are the same, Tanimoto similarity); "" is the scaffold of every acyclic molecule."""
    molecules = parse(one), parse(other)
    if None in molecules:
        return one == other, float(one == other)
    same = len(set(map(Chem.MolToSmiles, molecules))) == 1
    return same, DataStructs.TanimotoSimilarity(*map(MORGAN.GetFingerprint, molecules))


def on_target(groups):
    """How well molecules meet what they were asked for -> dict of floats.

    groups: list of dicts of values {property: target}, scaffold (SMILES without stereo marks, "" for acyclic; None: not
    asked for) and smiles (what was generated). valid: share of all. For each property p of any group, over the groups
    that have it: mad_p, mean |p - target| over all their valid molecules; sd_p, the standard deviation of p within a
    group (population), averaged over the groups with at least two valid ones. Over the valid molecules of groups with
    a scaffold: scaffold_match, share whose Bemis-Murcko scaffold, as prepare.py writes it, is the group's;
    scaffold_similarity, mean Tanimoto similarity of the two (Morgan, radius 2, 1024 bits); scaffold_over_0.8, share
    above 0.8. A mean over nothing is left out.

    MolGPT's get_metrics.py (Bagal et al. 2022, table 3) takes the same MAD over the valid molecules of all conditions.
    But its SD is that of |p - target|, its scaffold similarity is of RDKit's path fingerprints, and with scaffolds it
    keeps only the molecules above 0.8 and multiplies validity by their share."""
    made = [[molecule for molecule in map(parse, group["smiles"]) if molecule is not None] for group in groups]
    result = {"valid": sum(map(len, made)) / max(sum(len(group["smiles"]) for group in groups), 1)}
    for name in dict.fromkeys(name for group in groups for name in group["values"]):
        found = [(group["values"][name], np.array([PROPERTIES[name](molecule) for molecule in molecules]))
                 for group, molecules in zip(groups, made) if molecules and name in group["values"]]
        if found:
            result[f"mad_{name}"] = float(np.concatenate([np.abs(p - target) for target, p in found]).mean())
        spread = [p.std() for _, p in found if len(p) > 1]
        if spread:
            result[f"sd_{name}"] = float(np.mean(spread))
    found = [compare_scaffolds(murcko(molecule), group["scaffold"])
             for group, molecules in zip(groups, made) if group["scaffold"] is not None for molecule in molecules]
    if found:
        same, similarity = np.array(found).T                             # (n,) each
        result |= {"scaffold_match": float(same.mean()), "scaffold_similarity": float(similarity.mean()),
                   "scaffold_over_0.8": float((similarity > 0.8).mean())}
    return result


# --------------------------------------------------------------------------- scores that should tell bad from good
def finite(scores):
    """-> float64 array. Raises ValueError with the number of scores that are not finite, if any."""
    scores = np.asarray(scores, np.float64)
    wrong = int((~np.isfinite(scores)).sum())
    if wrong:
        raise ValueError(f"{wrong} of {scores.size} scores are not finite")
    return scores


def tally(scores, positive):
    """Scores (n,) and bool (n,) -> for each distinct score, the highest first: number of positives, of negatives."""
    scores, positive = finite(scores), np.asarray(positive, bool)
    assert scores.shape == positive.shape and scores.ndim == 1, (scores.shape, positive.shape)
    values, place = np.unique(-scores, return_inverse=True)
    return [np.bincount(place, weights, len(values)) for weights in (positive, ~positive)]


def auroc(scores, positive):
    """Scores (n,) and bool (n,) -> probability that a positive scores higher than a negative, where a tie counts half;
    nan if one class is empty. Raises ValueError if a score is not finite."""
    P, N = tally(scores, positive)
    if not P.any() or not N.any():
        return float("nan")
    return float((N * (P.cumsum() - P / 2)).sum() / (P.sum() * N.sum()))


def aupr(scores, positive):
    """Scores (n,) and bool (n,) -> average precision: the sum over distinct scores, from the highest, of the recall
    gained times the precision so far; nan without positives. Raises ValueError if a score is not finite."""
    P, N = tally(scores, positive)
    return float((P * P.cumsum() / (P + N).cumsum()).sum() / P.sum()) if P.any() else float("nan")


def roc(scores, positive):
    """Scores (n,) and bool (n,) -> (false positive rate, true positive rate), each (distinct scores + 1,) from 0 to 1;
    the rate of an empty class is nan. Raises ValueError if a score is not finite."""
    P, N = (np.concatenate([[0], number.cumsum()]) for number in tally(scores, positive))
    return tuple(one / one[-1] if one[-1] else np.full(len(one), np.nan) for one in (N, P))


def ece(confidence, correct, bins=15):
    """Confidence (n,) in 0 .. 1 and bool (n,) -> expected calibration error: |mean confidence - accuracy| averaged over
    bins of equal width, open on the left, by their share of the rows (Guo et al. 2017, eq. 3); nan without rows.
    Raises ValueError if a confidence is not finite."""
    confidence, correct = finite(confidence), np.asarray(correct, bool)
    assert confidence.shape == correct.shape and confidence.ndim == 1, (confidence.shape, correct.shape)
    assert not len(confidence) or -1e-6 < confidence.min() and confidence.max() < 1 + 1e-6, "a confidence is in 0 .. 1"
    place = np.searchsorted(np.linspace(0, 1, bins + 1), confidence).clip(1, bins) - 1
    gap = np.bincount(place, confidence - correct, bins)
    return float(np.abs(gap).sum() / len(confidence)) if len(confidence) else float("nan")


def same_lengths(lengths, others, seed=0):
    """Two (n,) and (m,) of int -> index arrays (i, j) of equal length with lengths[i] == others[j]: of every length as
    many as the smaller side has, drawn without replacement. So a score cannot tell the two sets apart by length."""
    rng, lengths, others = np.random.default_rng(seed), np.asarray(lengths), np.asarray(others)
    picked = [np.empty((2, 0), np.int64)]
    for length in np.intersect1d(lengths, others):
        sides = [rng.permutation(np.flatnonzero(side == length)) for side in (lengths, others)]
        picked.append(np.stack([side[:min(map(len, sides))] for side in sides]))
    return tuple(np.concatenate(picked, 1))


def selective(scores, good):
    """Scores (n,) and bool (n,) -> (coverage, share), each (n,): k / n and the share of good among the k rows of lowest
    score, for k = 1 .. n. Among ties it is the mean over their orders, so that the order of rows does not matter.
    Raises ValueError if a score is not finite."""
    G, B = (number[::-1] for number in tally(scores, good))
    number = (G + B).astype(int)
    k = np.arange(1, number.sum() + 1)
    return k / max(len(k), 1), np.repeat(G / number, number).cumsum() / k


# --------------------------------------------------------------------------------------------- pictures and a table
def draw_grid(path, made, n=24):
    """A PNG of n valid ones of the molecules `made` (dicts of smiles and scores), from the surest to the least sure."""
    score = "epistemic" if "epistemic" in made[0] else "nll"
    valid = sorted([m for m in made if canonical(m["smiles"])], key=lambda m: m[score])
    if valid:
        shown = [valid[i] for i in np.linspace(0, len(valid) - 1, min(n, len(valid))).astype(int)]
        legends = [f"{score} {m[score]:.2e}" + (f"  nll {m['nll']:.2f}" if score != "nll" else "") for m in shown]
        molecules = [Chem.MolFromSmiles(m["smiles"]) for m in shown]
        Draw.MolsToGridImage(molecules, molsPerRow=6, subImgSize=(240, 200), legends=legends).save(path)


def draw_curves(path, panels, x_label, y_label):
    """{title: {label: (x, y)}} -> one PNG, a panel per title side by side. No file without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels.items()):
        for label, (x, y) in curves.items():
            axis.plot(x, y, label=label)
        axis.set(title=title, xlabel=x_label, ylabel=y_label)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def table_lines(columns):
    """{name: {metric: number}} -> list of lines: the names, then one line per metric with one cell per name ("-" where
    the column lacks it), first those of the column that has most."""
    def cell(value):
        return "-" if value is None else f"{value:d}" if isinstance(value, Integral) else f"{value:.4f}"
    longest = max(columns.values(), key=len)
    rows = [["", *columns]]
    for metric in dict.fromkeys(metric for values in (longest, *columns.values()) for metric in values):
        rows.append([metric, *(cell(values.get(metric)) for values in columns.values())])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [f"{row[0]:{widths[0]}}" + "".join(f"  {text:>{max(10, width)}}" for text, width in zip(row[1:], widths[1:]))
            for row in rows]


# -------------------------------------------------------------------------------------------------- n-gram baselines
class NGram:
    """Token n-gram model of the training rows; order 1 is the unigram.

    Each order is smoothed by the one below it: p_k(t | c) = (count(c t) + w p_{k-1}(t | c')) / (count(c) + w), with
    p_0 = 1 / K (MacKay and Peto 1995). data: what train_edl.load_data returns."""
    def __init__(self, data, order, w=4.0):
        self.table, self.vocab, self.block = data.table.cpu().numpy(), data.vocab, data.block
        self.order, self.w = order, w
        self.bos, self.eos, self.K = data.vocab.index("<bos>"), data.vocab.index("<eos>"), len(data.vocab)
        assert self.K ** order < 2 ** 62, f"order {order} is too high for a vocabulary of {self.K}"
        self.counts, self.contexts = [], []
        for code in self.codes(data, data.rows["train"]):
            self.counts.append(np.unique(code, return_counts=True))
            self.contexts.append(np.unique(code // self.K, return_counts=True))

    def codes(self, data, rows):
        """Yield for each order k the last k tokens up to each target as digits of an int64; before BOS stands BOS."""
        start, length = (data.start + data.prefix)[rows], data.length[rows]     # a scaffold in front is not read
        first = np.repeat(start, length)
        place = first + 1 + np.arange(length.sum()) - np.repeat(length.cumsum() - length, length)
        code = np.zeros(len(place), np.int64)
        for lag in range(self.order):
            code = code + self.table[np.maximum(place - lag, first)] * np.int64(self.K) ** lag
            yield code

    def probability(self, codes):
        """Codes per order -> probability of their last digit's token after the other digits'."""
        def look_up(known, code):
            values, counts = known
            i = np.searchsorted(values, code).clip(max=len(values) - 1)
            return np.where(values[i] == code, counts[i], 0)
        p = 1 / self.K
        for known, contexts, code in zip(self.counts, self.contexts, codes):
            p = (look_up(known, code) + self.w * p) / (look_up(contexts, code // self.K) + self.w)
        return p

    def nll(self, data, split):
        """Nats per token of a split, EOS included."""
        rows = data.rows[split]
        return float(-np.log(self.probability(self.codes(data, rows))).mean())

    def generate(self, n, seed=0):
        """-> list of n SMILES."""
        rng, ended = np.random.default_rng(seed), np.zeros(n, bool)
        ids = np.full((n, self.order + self.block), self.bos)          # enough BOS in front for the longest context
        for t in range(self.order, ids.shape[1]):
            digits = [ids[:, t - lag] * np.int64(self.K) ** lag for lag in range(1, self.order)]
            contexts = np.cumsum([np.zeros(n, np.int64), *digits], 0)
            p = self.probability(contexts[:, :, None] + np.arange(self.K))
            p[:, self.bos] = 0
            edges = p.cumsum(1) / p.sum(1, keepdims=True)
            ids[:, t] = np.where(ended, self.eos, (rng.random((n, 1)) > edges).sum(1).clip(max=self.K - 1))
            ended |= ids[:, t] == self.eos
        return ["".join(self.vocab[i] for i in row if i != self.eos) for row in ids[:, self.order:].tolist()]
