"""Mass spectra: an MSP file and its structures, or a demo library built offline -> the arrays train_student.py reads.

    python data/spectra/prepare.py --demo                                         # 2,500 made-up molecules
    python data/spectra/prepare.py --msp FILE --name mine                         # SMILES: or InChI: in each block
    python data/spectra/prepare.py --msp FILE --mol_dir FOLDER --name mine        # or ID<id>.MOL by the block's ID:
    python data/spectra/prepare.py --msp FILE --sdf FILE --name mine --max_mz 800 # or an SDF with data fields ID

All files may be gzipped. A spectrum counts as its molecule's: spectra of one molecule, stereoisomers too, are in one
split. A record without a structure that can be read is left out, and so is all else that is wrong; it is counted by
reason and listed with its line number in rejected.jsonl. data/README.md describes the arrays.
"""
import argparse
import csv
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rdkit
from rdkit import Chem, rdBase

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import fail  # noqa: E402
from data.files import file_sha256, in_order, whole_folder, with_progress  # noqa: E402
from data.spectra.demo import DEMO_RECIPE, DEMO_ROWS, write_demo  # noqa: E402
from data.spectra.features import featurise, join, nominal_mass, read_smiles, recipe, split_of  # noqa: E402
from data.spectra.msp import Bad, Record, decode, nominal, read_lines, read_msp, to_bins  # noqa: E402

CHUNK = 200                                        # records per job of a worker process
FORMAT = 1                                         # raised when other arrays come out, to build old sets anew
SPLITS = ["train", "val", "test"]
MAX_ATOMS = 255                                    # a bond names its atoms in a byte
BEYOND, MAX_BEYOND = 5, 0.02                       # share of the ion current above M + BEYOND and the isotopes
ISOTOPE = 3.0                                      # %: rarer ones do not count there
NAME = re.compile(rb"\s*name\s*:", re.I)

class Kept(NamedTuple):
    line: int
    id: str
    name: str
    block1: str                                    # of the InChIKey: formula and bonds, without stereo and isotopes
    smiles: str                                    # canonical
    mass: int
    peaks: tuple[np.ndarray, np.ndarray]           # bin uint16, value float32
    features: dict[str, np.ndarray] | None         # as in features.py
    notes: list[str]
    license: str

# ---------------------------------------------------------------------------------------------------------- structures
def plain_id(text):
    """ID5, id5 and 5 are one id."""
    return re.sub(r"(?i)^id", "", text.strip()).strip()

def index_folder(folder):
    """A folder of ID<id>.MOL, in any case -> dict from id to Path, sorted by file name."""
    try:
        files = sorted(path for path in folder.iterdir() if re.fullmatch(r"(?i)id.+\.mol", path.name))
    except OSError as error:
        fail(f"--mol_dir {folder} cannot be read: {error.strerror or error}")
    table = {plain_id(path.stem): path for path in files}
    if len(table) < len(files):
        twice = next(path for path in files if table[plain_id(path.stem)] != path)
        fail(f"{folder}: {twice.name} and {table[plain_id(twice.stem)].name} name one ID: move one of them away")
    return table or fail(f"--mol_dir {folder} holds no file such as ID1.MOL")

def index_sdf(path):
    """An SDF, plain or gzipped -> dict from id to mol block (str), held in memory but not parsed.

    The id is the data field ID, else the title. One that has two different blocks is None: nobody knows which."""
    table, block, id, wanted, inside = {}, [], "", False, True

    def close():
        key = plain_id(id or (block[0] if block else ""))
        if key:
            text = "\n".join(block) + "\n"
            table[key] = text if table.get(key, text) == text else None

    for _, line in read_lines(path):
        text = decode(line)
        if text.startswith("$$$$"):
            close()
            block, id, wanted, inside = [], "", False, True
        elif text.startswith(">"):
            inside, wanted = False, not id and "<id>" in text.lower()
        elif inside:
            block.append(text)
            inside = not text.startswith("M  END")
        elif wanted:
            id, wanted = text.strip(), False
    close()                                         # of a file that ends without $$$$
    return table or fail(f"{path} holds no structure with an ID: expected a data field ID, or ID1 or 1 as the title")

def find_structure(record, table):
    """-> (record, kind, structure) or Bad; kind is smiles, inchi or mol, the structure a str or the Path of a file."""
    for kind in ("smiles", "inchi"):
        if (text := record.fields.get(kind, "")).upper() not in ("", "N/A"):
            return record, kind, text
    id = plain_id(record.fields.get("id", ""))
    if table.get(id):
        return record, "mol", table[id]
    reason = "no ID: to look it up by" if not id else f"two for ID {id}" if id in table else f"none for ID {id}"
    return Bad(record.line, "no structure", record.fields["name"], reason if table else "no SMILES: or InChI:")

def read_structure(kind, structure):
    """-> RDKit molecule. Raises ValueError: what cannot be read is never replaced."""
    if kind == "smiles":
        if not structure.isascii() or len(structure.split()) > 1:    # RDKit reads "CCé" and "CC O" as CC
            raise ValueError("not a SMILES string alone")
        return read_smiles(structure)
    if isinstance(structure, Path):
        structure = decode(structure.read_bytes())
    molecule = Chem.MolFromInchi(structure) if kind == "inchi" else Chem.MolFromMolBlock(structure)
    if molecule is None or not molecule.GetNumAtoms():
        raise ValueError("RDKit cannot read the structure")
    return molecule

# --------------------------------------------------------------------------------------------------------- one spectrum
@functools.cache
def isotope_span(element):
    """Atomic number -> how far the heaviest of its frequent isotopes lies above the most frequent: Cl 2, C 0."""
    table = Chem.GetPeriodicTable()
    usual = table.GetMostCommonIsotope(element)
    return max(k for k in range(12) if k == 0 or table.GetAbundanceForIsotope(element, usual + k) >= ISOTOPE)

def read_spectrum(record, kind, structure, max_mz):
    """Record and its structure -> Kept or Bad."""
    def bad(reason, detail=""):
        return Bad(record.line, reason, record.fields["name"], detail)
    try:
        molecule = read_structure(kind, structure)
    except (ValueError, OSError) as error:
        return bad("structure cannot be read", f"{structure if kind != 'mol' else 'mol block'}: {error}")
    smiles = Chem.MolToSmiles(molecule)
    if "." in smiles:
        return bad("several components", smiles)
    molecule = read_smiles(smiles)                  # so that molecules.csv tells all that the arrays hold
    if molecule.GetNumAtoms() > MAX_ATOMS:
        return bad(f"more than {MAX_ATOMS} atoms", str(molecule.GetNumAtoms()))
    mass = nominal_mass(molecule)
    if mass > max_mz:
        return bad("heavier than max_mz", str(mass))
    key = Chem.MolToInchiKey(molecule)
    if not key:
        return bad("no InChIKey", smiles)
    # By its isotopes hexachlorobenzene shows M + 6 and M + 8; far above M it is the spectrum of another molecule
    limit = mass + BEYOND + sum(isotope_span(atom.GetAtomicNum()) for atom in molecule.GetAtoms())
    intensity = record.intensity / record.intensity.max()            # or the sum might be infinite
    beyond = intensity[nominal(record.mz) > limit].sum() / intensity.sum()
    if beyond > MAX_BEYOND:
        return bad("ion current above the molecule's mass", f"{beyond:.1%} above {limit}, M is {mass}")
    peaks = to_bins(record.mz, record.intensity, max_mz + 1)
    if not len(peaks[0]):
        return bad("no peaks up to max_mz")
    notes, stated = [], record.fields.get("mw", "")
    if re.fullmatch(r"\d{1,6}(\.\d*)?", stated) and int(nominal(float(stated))) != mass:
        notes.append("MW differs from the nominal mass")
    if (stated := record.fields.get("inchikey", "")).upper() not in ("", "N/A") and stated[:14] != key[:14]:
        notes.append("InChIKey differs from that of the structure")
    return Kept(record.line, plain_id(record.fields.get("id", "")), record.fields["name"], key[:14],
                smiles, mass, peaks, featurise(molecule), notes, record.fields.get("license", ""))

def read_chunk(jobs, max_mz):
    """A worker's job: list of Bad or (Record, kind, structure) -> list of Bad or Kept, in the same order."""
    results = []
    with rdBase.BlockLogs():
        for job in jobs:
            try:
                results.append(job if isinstance(job, Bad) else read_spectrum(*job, max_mz))
            except (RuntimeError, ValueError, ArithmeticError) as error:     # one strange molecule must not end the run
                results.append(Bad(job[0].line, "RDKit error", job[0].fields["name"], str(error)))
    return results

# ------------------------------------------------------------------------------------ all spectra: molecules and splits
def find_jobs(path, table, chosen):
    """Yield Bad or (Record, kind, structure) for the records that begin on the chosen lines; None chooses all."""
    first_line = {}
    for record in read_msp(path):
        if chosen is not None and record.line not in chosen:
            continue
        if isinstance(record, Record):
            id = plain_id(record.fields.get("id", ""))
            if id and first_line.setdefault(id, record.line) != record.line:
                record = Bad(record.line, "duplicate ID", record.fields["name"],
                             f"{id}, first on line {first_line[id]}")
            else:
                record = find_structure(record, table)
        yield record

def collect(results):
    """Kept and Bad in file order -> (list of Kept, one per molecule; list of Kept, one per spectrum; list of int, the
    molecule of each spectrum; list of Bad)."""
    molecules, index, first_line, spectra, owner, rejected = [], {}, {}, [], [], []
    for row in results:
        if isinstance(row, Kept):
            bins, values = (part.tobytes() for part in row.peaks)
            key = hashlib.sha1(row.block1.encode() + bins + values).digest()
            first = molecules[index[row.block1]] if row.block1 in index else row
            if first.mass != row.mass:              # isotopes and charges, which the first block does not tell apart
                row = Bad(row.line, "another mass than the first structure of the molecule", row.name,
                          f"{row.mass}, {first.mass} on line {first.line}")
            elif first_line.setdefault(key, row.line) != row.line:
                row = Bad(row.line, "duplicate spectrum", row.name, f"first on line {first_line[key]}")
        if isinstance(row, Bad):
            rejected.append(row)
            continue
        if row.block1 not in index:
            index[row.block1] = len(molecules)
            molecules.append(row)
        owner.append(index[row.block1])
        spectra.append(row._replace(features=None))   # the molecule has them
    return molecules, spectra, owner, rejected

def assign_splits(block1s):
    """-> (list of str, one per molecule; how many were moved from train to an empty val, those of lowest hash)."""
    splits = list(map(split_of, block1s))
    train = [i for i, split in enumerate(splits) if split == "train"]
    train.sort(key=lambda i: hashlib.sha1(block1s[i].encode()).digest())
    moved = [] if "val" in splits else train[:max(1, round(0.1 * len(train)))]
    for i in moved:
        splits[i] = "val"
    return splits, len(moved)

# ------------------------------------------------------------------------------------------------------------- writing
def build(path, source, table, settings, options, folder):
    """The spectra of an MSP file -> the finished data set in `folder`, and a summary on the terminal."""
    start = time.monotonic()
    lines = [number for number, line in read_lines(path) if NAME.match(line)]
    if not lines:
        fail(f"{path} holds no spectrum: expected MSP text, where a line `Name: ...` opens each record")
    chosen = None
    if not options.demo and options.limit and options.limit < len(lines):
        chosen = set(random.Random(options.seed).sample(lines, options.limit))
    total = len(chosen or lines)
    jobs = find_jobs(path, table, chosen)
    chunks = iter(lambda: list(itertools.islice(jobs, CHUNK)), [])
    results = in_order(functools.partial(read_chunk, max_mz=options.max_mz), chunks,
                       min(options.workers, math.ceil(total / CHUNK)))
    results = with_progress(itertools.chain.from_iterable(results), total, "spectra")
    molecules, spectra, owner, rejected = collect(results)
    splits, moved = assign_splits([row.block1 for row in molecules])
    reasons = Counter(row.reason for row in rejected)
    if "train" not in splits:
        fail(f"{source}: none of its {total:,} spectra is left for training, of {len(molecules):,} molecules kept; "
             f"rejected: {', '.join(f'{reason} {n:,}' for reason, n in reasons.most_common(4)) or 'none'}")

    split = np.array([SPLITS.index(name) for name in splits], np.uint8)
    arrays = join([row.features for row in molecules]) | {
        "split": split, "molecule": np.array(owner, np.int32),
        "peak_bin": np.concatenate([row.peaks[0] for row in spectra]),
        "peak_value": np.concatenate([row.peaks[1] for row in spectra]),
        "peak_offsets": np.cumsum([0, *(len(row.peaks[0]) for row in spectra)])}

    def by_split(rows):
        return dict(zip(SPLITS, np.bincount(rows, minlength=len(SPLITS)).tolist()))

    def counted(names):
        return dict(sorted(Counter(names).items()))

    counts = {"read": len(spectra) + len(rejected), "kept": len(spectra), "molecules": len(molecules),
              "by_split": by_split(split), "spectra_by_split": by_split(split[owner]), "val_cut_from_train": moved,
              "rejected": dict(sorted(reasons.items())),
              "notes": counted(note for row in spectra for note in row.notes)}
    meta = {"format": FORMAT, "name": folder.name, "source": source, "sha256": options.sha256, "options": settings,
            "bins": options.max_mz + 1, "splits": SPLITS, "counts": counts,
            "licenses": counted(row.license for row in spectra if row.license), "arrays": sorted(arrays),
            "rdkit": rdkit.__version__}
    tables = {"molecules.csv": [("block1", "smiles"), *((row.block1, row.smiles) for row in molecules)],
              "spectra.csv": [("id", "name", "line"), *((row.id, row.name, row.line) for row in spectra)]}
    with whole_folder(folder) as new:
        for name, values in arrays.items():
            np.save(new / f"{name}.npy", values, allow_pickle=False)
        for name, rows in tables.items():
            with open(new / name, "w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
        with open(new / "rejected.jsonl", "w", encoding="utf-8") as file:
            for row in rejected:
                entry = {"line": row.line, "reason": row.reason, "text": row.text[:80]}
                file.write(json.dumps(entry | ({"detail": row.detail[:200]} if row.detail else {})) + "\n")
        (new / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    summary(folder, meta, time.monotonic() - start)

def summary(folder, meta, seconds):
    def listed(numbers):
        return ", ".join(f"{name} {n:,}" for name, n in numbers.items()) or "none"

    counts = meta["counts"]
    print(f"{folder}: {counts['read']:,} spectra read, {counts['kept']:,} of {counts['molecules']:,} molecules kept in "
          f"{seconds:.1f} s")
    print(f"  molecules   {listed(counts['by_split'])}")
    if counts["val_cut_from_train"]:
        print(f"              val was empty: {counts['val_cut_from_train']:,} train molecules moved, chosen by hash")
    print(f"  spectra     {listed(counts['spectra_by_split'])}")
    print(f"  rejected    {listed(counts['rejected'])}")
    print(f"  notes       {listed(counts['notes'])}")
    if meta["licenses"]:
        print(f"  licenses    {listed(meta['licenses'])}: what is trained on these spectra is bound by them too")

def already_there(folder, sha256, settings):
    """True if the folder holds a whole set of this source and these options; fails if it holds something else."""
    if not folder.exists():
        return False
    if not (folder / "meta.json").is_file():
        fail(f"{folder} exists and is no data set: move it away or choose another --name")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        same = meta["format"] == FORMAT and meta["options"] == settings and sha256 in (None, meta["sha256"])
        names = [f"{name}.npy" for name in meta["arrays"]] + ["molecules.csv", "spectra.csv", "rejected.jsonl"]
        return same and all((folder / name).is_file() for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):     # damaged: built again
        return False

# ---------------------------------------------------------------------------------------------------------------- main
def build_demo(settings, options, folder):
    raw = folder.with_name(f".{folder.name}.{os.getpid()}.msp")
    try:
        raw.parent.mkdir(parents=True, exist_ok=True)
        write_demo(raw, options.limit or DEMO_ROWS, options.seed)
        options.sha256 = file_sha256(raw)           # and now as if the file had come from elsewhere
        build(raw, "demo", {}, settings, options, folder)
    except OSError as error:
        fail(f"cannot write {raw}: {error}")
    finally:
        raw.unlink(missing_ok=True)

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (see --help)")
    source, join = (parser.add_mutually_exclusive_group(required=required) for required in (True, False))

    def flag(name, help, group=parser, **kind):
        group.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), help=help, **kind)

    flag("msp", "spectra as MSP text, also gzipped", source, type=Path)
    flag("demo", f"build a library offline ({DEMO_ROWS:,} molecules, or --limit)", source, action="store_true")
    flag("mol_dir", "folder of ID<id>.MOL, for blocks without SMILES: or InChI:", join, type=Path)
    flag("sdf", "structures with the data field ID, also gzipped, for such blocks", join, type=Path)
    flag("name", "the data set is written to <out_dir>/<name>/ (default with --demo: demo)")
    flag("max_mz", "leave out heavier molecules and the peaks above (default: 500)", type=int, default=500)
    flag("limit", "use a random sample of so many records (seeded)", type=int)
    flag("workers", "processes (default: one per core)", type=int, default=os.cpu_count() or 1)
    flag("seed", "of --limit and --demo (default: 0)", type=int, default=0)
    flag("out_dir", "(default: the folder of this script)", type=Path, default=Path(__file__).resolve().parent)
    flag("force", "build the set even if it is already there", action="store_true")
    options = parser.parse_args(argv)

    options.name = options.name or ("demo" if options.demo else "")
    if not re.fullmatch(r"\w[\w.+-]*", options.name):
        fail(f"--name {options.name or '(missing)'}: give the data set a plain folder name, such as --name massbank")
    for name, most in (("limit", 10**9), ("workers", 10**4), ("max_mz", 30_000)):
        if (value := getattr(options, name)) is not None and not 1 <= value <= most:
            fail(f"--{name} {value}: must be a number from 1 to {most}")
    if options.demo and (options.mol_dir or options.sdf):
        fail("--demo brings its own structures: leave out --mol_dir and --sdf")
    return options

def main(argv=None):
    """Build the data set that the command line asks for -> its folder (Path)."""
    options = parse(argv)
    folder = options.out_dir / options.name
    settings = {name: getattr(options, name) for name in ("limit", "max_mz", "seed")} | {"features": recipe()}
    settings |= {"demo": DEMO_RECIPE} if options.demo else {}
    for name in ("msp", "sdf"):
        path = getattr(options, name)
        if path and not path.is_file():
            fail(f"--{name}: there is no file {path}" + (", but --demo builds a library" if name == "msp" else ""))
    table = {}
    options.sha256 = options.msp and file_sha256(options.msp)
    if options.sdf:
        settings["sdf"] = file_sha256(options.sdf)
    if options.mol_dir:                             # small, so what is in the files tells whether they are the same
        table = index_folder(options.mol_dir)
        sums = "".join(f"{path.name} {file_sha256(path)}\n" for path in table.values())
        settings["mol_dir"] = hashlib.sha256(sums.encode()).hexdigest()
    if already_there(folder, options.sha256, settings) and not options.force:
        print(f"{folder}: already there (--force builds it again)")
        return folder
    try:
        if options.demo:
            build_demo(settings, options, folder)
        else:
            table = index_sdf(options.sdf) if options.sdf else table
            build(options.msp, options.msp.name, table, settings, options, folder)
    except KeyboardInterrupt:
        print("interrupted: nothing was changed", file=sys.stderr)
        raise SystemExit(130) from None
    return folder

if __name__ == "__main__":
    main()
