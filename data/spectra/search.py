"""A trained model at work: its table (eval), spectra of listed molecules (sample), molecules of a spectrum (rank).

The functions are given the module of the script, which cannot be imported by name when it runs as a program."""
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import fail, finish, launch, rank
from data.files import or_fail, whole_file
from data.spectra import metrics
from data.spectra.features import featurise, join, read_smiles
from data.spectra.metrics import COSINES, weigh
from data.spectra.msp import Bad, read_msp, to_bins, write_msp
from data.spectra.tables import Molecules, read_molecules
from runs import finite_number, parse_flags, trained


@dataclass
class SampleFlags:
    run_name: str = ""  # whose best.safetensors
    out_dir: str = "out"  # where runs are
    smiles: str = ""  # a file with a SMILES per line, perhaps a name after it
    out: str = "predicted.msp"  # where to write; what fails is listed beside it in .rejected.jsonl
    batch_size: int = 256  # molecules predicted at once
    device: str = "auto"  # auto, cuda, mps, cpu


@dataclass
class RankFlags:
    run_name: str = ""  # whose best.safetensors
    out_dir: str = "out"  # where runs are
    msp: str = ""  # measured spectra to find
    candidates: str = ""  # a file with a SMILES per line, perhaps a name after it
    top: int = 10  # candidates shown per spectrum
    window: float = 0.0  # only candidates so near to the spectrum's MW:, in Da; 0: all
    device: str = "auto"  # auto, cuda, mps, cpu


@dataclass
class EvalFlags:
    run_name: str = ""  # whose best.safetensors
    out_dir: str = "out"  # where runs are
    data_dir: str = ""  # prepared data; empty: the run's own
    split: str = "test"  # train, val or test
    beside: str = ""  # other runs to show beside it, as its teacher: names, separated by commas
    device: str = "auto"  # auto, cuda, mps, cpu


def open_run(script, flags, name, device):
    """-> the best model of the run of that name."""
    model = or_fail(script.load_model, trained(flags.out_dir, name) / "best.safetensors", device)
    if isinstance(model, script.Bonds):
        fail(f"--run_name {name} was trained with --phase pretrain and knows no spectra")
    return model


def speed(script, model, smiles):
    """Milliseconds per molecule on one CPU thread, from SMILES to spectrum -> dict for batches of 1 and of 256."""
    threads, model, found = torch.get_num_threads(), copy.deepcopy(model).cpu(), {}
    with_graph = not isinstance(model, script.Student)
    torch.set_num_threads(1)
    for size in (1, 256):
        some = (smiles * (size // len(smiles) + 1))[:max(size, min(len(smiles), 32))]
        times = []
        for start in [0, *range(0, len(some) - size + 1, size), 0, 0]:  # the first one warms up
            since = time.perf_counter()
            made = [featurise(read_smiles(one), with_graph) for one in some[start:start + size]]
            script.predict(model, Molecules(join(made), model.about["bins"]), np.arange(size))
            times.append((time.perf_counter() - since) / size * 1000)
        found[f"ms per molecule, batch {size}, one thread"] = float(np.median(times[1:]))
    torch.set_num_threads(threads)
    return found


def table(script, model, data, folder, log=print, stem="final", beside={}, split="test"):
    """metrics.report of a split (val if it is empty) -> its dict; with the time it takes and how experts are used."""
    split = split if len(data.rows.get(split, [])) else "val"
    extra = speed(script, model, [data.smiles(row) for row in data.rows[split][:256]])
    if isinstance(model, script.Student):
        extra |= {f"share of expert {i}, in training": share for i, share in enumerate(model.usage.tolist())}
    ask = {name: lambda rows, one=one: script.predict(one, data.molecules, rows) for name, one in beside.items()}
    return metrics.report(data, lambda rows: script.predict(model, data.molecules, rows), split, folder, log, extra,
                          stem, ask)


def main_eval(script, argv):
    flags, _ = parse_flags(EvalFlags, argv, "The table of a trained model beside the baselines.")
    device = launch(flags.device)
    names = dict.fromkeys([flags.run_name, *filter(None, flags.beside.split(","))])
    models = {name: open_run(script, flags, name, device) for name in names}
    model = models[flags.run_name]
    given = {"smiles": ""} | ({"data_dir": flags.data_dir} if flags.data_dir else {})
    config = script.Config(**model.about["config"] | given)
    data = script.load_data(config, device)
    for name, other in models.items():
        if other.about["bins"] != data.molecules.bins:
            fail(f"--data_dir {config.data_dir or '(demo)'}: its --max_mz is not that of {name}")
    del models[flags.run_name]
    if flags.split not in ("train", "val", "test") or {"model", "1-NN", "replicate"} & {*models}:
        fail(f"--split {flags.split}: train, val or test; a run beside may not be called model, 1-NN or replicate")
    if rank() == 0:
        table(script, model, data, Path(flags.out_dir) / flags.run_name, print, "eval", models, flags.split)
    finish()


def candidates_in(path, flag, script, model):
    """A file of SMILES -> featurised molecules below the model's heaviest mass, their lines, what was left out."""
    bins = model.about["bins"]
    if not path:
        fail(f"--{flag} FILE: a file with a SMILES per line")
    made, names, bad = read_molecules(path, not isinstance(model, script.Student), bins - 1)
    if not made:
        fail(f"--{flag} {path}: none of its {len(bad)} lines is a molecule of at most {bins - 1} Da")
    return made, names, bad


def main_sample(script, argv):
    flags, _ = parse_flags(SampleFlags, argv, "Predict the spectra of a list of molecules: an MSP file, base peak 999.")
    device = launch(flags.device)
    model = open_run(script, flags, flags.run_name, device)
    if flags.batch_size < 1:
        fail(f"--batch_size {flags.batch_size}: must be above 0")
    made, names, bad = candidates_in(flags.smiles, "smiles", script, model)
    out, molecules = Path(flags.out), Molecules(join(made), model.about["bins"], device)
    if out.is_dir() or out.resolve() == Path(flags.smiles).resolve():
        fail(f"--out {out} is {'a folder' if out.is_dir() else 'what --smiles reads'}: name a file of its own")
    with whole_file(out) as file:
        for rows in np.split(np.arange(len(made)), range(flags.batch_size, len(made), flags.batch_size)):
            for row, spectrum in zip(rows, script.predict(model, molecules, rows).numpy() * 999):
                text, *name = names[row].split(None, 1)
                mz = np.flatnonzero(spectrum >= 0.999)
                if not len(mz):
                    bad.append({"line": None, "reason": "no peak was predicted", "text": names[row][:80]})
                    continue
                write_msp(file, {"Name": (name or [text])[0], "SMILES": text, "MW": int(molecules.mass[row]),
                                 "Comments": f"predicted by {flags.run_name}"}, mz, spectrum[mz])
    written = len(made) - sum(row["line"] is None for row in bad)
    rejected = out.with_name(f"{out.stem}.rejected.jsonl")
    rejected.write_text("".join(json.dumps(row) + "\n" for row in bad), encoding="utf-8")
    print(f"{out}: {written:,} spectra; {len(bad):,} lines left out" + f", listed in {rejected}" * bool(bad))


def main_rank(script, argv):
    flags, _ = parse_flags(RankFlags, argv, "Rank candidate molecules by how well they explain measured spectra.")
    device = launch(flags.device)
    model = open_run(script, flags, flags.run_name, device)
    if not flags.msp or not Path(flags.msp).is_file():
        fail(f"--msp {flags.msp or 'FILE'}: measured spectra to find; there is no such file")
    if flags.top < 1 or flags.window < 0:
        fail(f"--top {flags.top} must be above 0, --window {flags.window} not below 0")
    made, names, bad = candidates_in(flags.candidates, "candidates", script, model)
    molecules = Molecules(join(made), model.about["bins"], device)
    library = weigh(script.predict(model, molecules, np.arange(len(made))), *COSINES["weighted"])
    print(f"{len(made):,} candidates" + f"; {len(bad):,} lines left out" * bool(bad))
    for record in read_msp(flags.msp):
        if isinstance(record, Bad):
            print(f"{flags.msp} line {record.line}: left out, {record.reason}")
            continue
        places, values = to_bins(record.mz, record.intensity, model.about["bins"])
        spectrum = torch.zeros(1, model.about["bins"])
        spectrum[0, places.astype(np.int64)] = torch.from_numpy(values)
        score = (weigh(spectrum, *COSINES["weighted"]) @ library.T)[0].numpy()
        if flags.window:
            score[np.abs(molecules.mass - stated_mass(record, flags.msp)) > flags.window] = -np.inf
        order = [row for row in np.argsort(-score, kind="stable")[:flags.top] if np.isfinite(score[row])]
        print(f"\n{record.fields['name']} ({np.isfinite(score).sum():,} candidates)")
        for place, row in enumerate(order, 1):
            print(f"{place:4d}  {score[row]:.4f}  {names[row]}")


def stated_mass(record, msp):
    try:
        return finite_number(record.fields["mw"])
    except (KeyError, ValueError):
        fail(f"{msp} line {record.line}: no MW: in the record, which --window needs; leave the flag out")


VERBS = {"eval": main_eval, "sample": main_sample, "rank": main_rank}
