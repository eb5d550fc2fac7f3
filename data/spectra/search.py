"""What a trained model is for: spectra for a list of molecules, and molecules for a measured spectrum."""
import json
import time
from pathlib import Path

import numpy as np
import torch

from common import fail
from data.spectra.features import featurise, join, read_smiles
from data.spectra.metrics import COSINES, weigh
from data.spectra.msp import Bad, read_msp, to_bins, write_msp
from data.spectra.tables import Molecules, read_molecules


def speed(predict, smiles, bins):
    """Milliseconds per molecule on one CPU thread, from SMILES to spectrum -> dict for batches of 1 and of 256."""
    threads, found = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    for size in (1, 256):
        some = (smiles * (size // len(smiles) + 1))[:max(size, min(len(smiles), 32))]
        times = []
        for start in [0, *range(0, len(some) - size + 1, size)]:        # the first one warms up
            since = time.perf_counter()
            made = [featurise(read_smiles(one)) for one in some[start:start + size]]
            predict(Molecules(join(made), bins), np.arange(size))
            times.append((time.perf_counter() - since) / size * 1000)
        found[f"ms per molecule, batch {size}, one thread"] = float(np.median(times[1:]))
    torch.set_num_threads(threads)
    return found


def candidates_in(path, flag, bins):
    """A file of SMILES -> featurised molecules below the model's heaviest mass, their names, what was left out."""
    if not path:
        fail(f"--{flag} FILE: a file with a SMILES per line")
    made, names, bad = read_molecules(path)
    heavy = [i for i, one in enumerate(made) if one["mass"][0] >= bins]
    bad += [{"line": None, "reason": f"heavier than {bins - 1} Da", "text": names[i][:80]} for i in heavy]
    kept = [i for i in range(len(made)) if i not in set(heavy)]
    if not kept:
        fail(f"--{flag} {path}: none of its {len(names) + len(bad)} lines is a molecule of at most {bins - 1} Da")
    return [made[i] for i in kept], [names[i] for i in kept], bad


def write_predictions(smiles, out, predict, bins, batch_size, model, device):
    """`sample`: an MSP file of predicted spectra, base peak 999, peaks from .1 % of it on."""
    made, names, bad = candidates_in(smiles, "smiles", bins)
    out, molecules = Path(out), Molecules(join(made), bins, device)
    if out.is_dir():
        fail(f"--out {out} is a folder: name a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", encoding="utf-8") as file:
        for rows in np.split(np.arange(len(made)), range(batch_size, len(made), batch_size)):
            for row, spectrum in zip(rows, predict(molecules, rows).numpy() * 999):
                text, _, name = names[row].partition(" ")
                mz = np.flatnonzero(spectrum >= 0.999)
                write_msp(file, {"Name": name.strip() or text, "SMILES": text, "MW": int(molecules.mass[row]),
                                 "Comments": f"predicted by {model}"}, mz, spectrum[mz])
    rejected = out.with_name(f"{out.stem}.rejected.jsonl")
    rejected.write_text("".join(json.dumps(row) + "\n" for row in bad), encoding="utf-8")
    print(f"{out}: {len(made):,} spectra; {len(bad):,} lines left out" + f", listed in {rejected}" * bool(bad))


def rank_candidates(msp, candidates, predict, bins, top, window, device):
    """`rank`: for each measured spectrum the candidates whose predictions are nearest by weighted cosine."""
    if not msp or not Path(msp).is_file():
        fail(f"--msp {msp or 'FILE'}: measured spectra to find; there is no such file")
    made, names, bad = candidates_in(candidates, "candidates", bins)
    molecules = Molecules(join(made), bins, device)
    library = weigh(predict(molecules, np.arange(len(made))), *COSINES["weighted"])
    print(f"{len(made):,} candidates" + f"; {len(bad):,} lines left out" * bool(bad))
    for record in read_msp(msp):
        if isinstance(record, Bad):
            print(f"{msp} line {record.line}: left out, {record.reason}")
            continue
        spectrum = torch.zeros(1, bins)
        places, values = to_bins(record.mz, record.intensity, bins)
        spectrum[0, places.astype(np.int64)] = torch.from_numpy(values)
        score = (weigh(spectrum, *COSINES["weighted"]) @ library.T)[0].numpy()
        if window:
            score = np.where(np.abs(molecules.mass - mass_of(record, msp)) <= window, score, -np.inf)
        order = np.argsort(-score, kind="stable")[:top]
        print(f"\n{record.fields['name']} ({np.isfinite(score).sum():,} candidates)")
        for place, row in enumerate(order[np.isfinite(score[order])], 1):
            print(f"{place:4d}  {score[row]:.4f}  {names[row]}")


def mass_of(record, msp):
    """The nominal mass that a measured record states."""
    try:
        return float(record.fields["mw"])
    except (KeyError, ValueError):
        fail(f"{msp} line {record.line}: no MW: in the record, which --window needs; leave the flag out")
