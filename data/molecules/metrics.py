"""What only evaluates: the metrics of MOSES (Polykovskiy et al. 2020), n-gram baselines, a picture of molecules."""
import numpy as np
from rdkit import Chem, RDLogger
from rdkit.Chem import Draw
from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator


def canonical(smiles):
    """RDKit's canonical SMILES, or None for what is not a molecule (the empty string too)."""
    RDLogger.DisableLog("rdApp.*")                  # invalid samples are counted, not told one by one
    molecule = Chem.MolFromSmiles(smiles) if smiles else None
    return None if molecule is None else Chem.MolToSmiles(molecule)


def describe(smiles, known):
    """List of SMILES and the set of canonical training SMILES -> dict of n and shares; no intdiv if none is valid.

    valid: parsed by RDKit; unique: among the valid; novel: of the unique, those not in known; intdiv: 1 - mean Tanimoto
    similarity over all pairs of the first 2,000 valid ones, self included as in MOSES (Morgan, radius 2, 1024 bits)."""
    valid = [s for s in map(canonical, smiles) if s]
    unique = set(valid)
    result = {"n": len(smiles), "valid": len(valid) / max(len(smiles), 1), "unique": len(unique) / max(len(valid), 1),
              "novel": len(unique - known) / max(len(unique), 1)}
    return result | {"intdiv": internal_diversity(valid[:2000])} if valid else result


def internal_diversity(smiles):
    morgan = GetMorganGenerator(radius=2, fpSize=1024)
    bits = np.array([morgan.GetFingerprintAsNumPy(Chem.MolFromSmiles(s)) for s in smiles], np.float32)
    both, size = bits @ bits.T, bits.sum(1)
    return float(1 - (both / np.maximum(size[:, None] + size - both, 1)).mean())


def draw_grid(path, made, n=24):
    """A PNG of n valid ones of the molecules `made` (dicts of smiles and scores), from the surest to the least sure."""
    score = "epistemic" if "epistemic" in made[0] else "nll"
    valid = sorted([m for m in made if canonical(m["smiles"])], key=lambda m: m[score])
    if valid:
        shown = [valid[i] for i in np.linspace(0, len(valid) - 1, min(n, len(valid))).astype(int)]
        legends = [f"{score} {m[score]:.2e}" + (f"  nll {m['nll']:.2f}" if score != "nll" else "") for m in shown]
        molecules = [Chem.MolFromSmiles(m["smiles"]) for m in shown]
        Draw.MolsToGridImage(molecules, molsPerRow=6, subImgSize=(240, 200), legends=legends).save(path)


class NGram:
    """Token n-gram model of the training rows; order 1 is the unigram.

    Each order is smoothed by the one below it: p_k(t | c) = (count(c t) + w p_{k-1}(t | c')) / (count(c) + w), with
    p_0 = 1 / K (MacKay and Peto 1995). data: what train_edl.load_data returns."""
    def __init__(self, data, order, w=4.0):
        self.table, self.vocab, self.block = data.table.cpu().numpy(), data.vocab, data.block
        self.order, self.w = order, w
        self.bos, self.eos, self.K = data.vocab.index("<bos>"), data.vocab.index("<eos>"), len(data.vocab)
        assert self.K ** order < 2 ** 62, f"order {order} is too high for a vocabulary of {self.K}"
        codes = self.codes(data.start[data.rows["train"]], data.length[data.rows["train"]])
        self.counts = [np.unique(code, return_counts=True) for code in codes]
        self.contexts = [np.unique(code // self.K, return_counts=True) for code in codes]

    def codes(self, start, length):
        """For each order k: the last k tokens up to each target as the digits of one int64; before BOS stands BOS."""
        first = np.repeat(start, length)
        place = first + 1 + np.arange(length.sum()) - np.repeat(length.cumsum() - length, length)
        digits = [self.table[np.maximum(place - lag, first)] * np.int64(self.K) ** lag for lag in range(self.order)]
        return list(np.cumsum(digits, 0))

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
        return float(-np.log(self.probability(self.codes(data.start[rows], data.length[rows]))).mean())

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
