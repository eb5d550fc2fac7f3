"""Molecules: a file of SMILES, or a demo set built offline -> the token arrays that train_edl.py reads.

    python data/molecules/prepare.py --demo                                                # 24,000 drug-like molecules
    python data/molecules/prepare.py --input moses.csv.gz --name moses
    python data/molecules/prepare.py --input zinc.csv --name zinc --limit 20000 --props logp,sas,tpsa,qed --scaffold
    python data/molecules/prepare.py --url URL --sha256 HEX --name moses                   # download, verify, prepare

Reads .csv (a column SMILES, in any case) and .smi or .txt (one SMILES per line, a name may follow), each also gzipped.
A row is one line. Splits come from --split_column, else a column FOLD, else SPLIT, else a hash of the canonical SMILES
(90/5/5). Every row that is left out is counted by reason and listed with its line number in rejected.jsonl.
data/README.md describes the arrays.
"""
import argparse
import csv
import functools
import hashlib
import http.client
import itertools
import json
import math
import os
import random
import re
import sys
import time
import urllib.parse
import urllib.request
from array import array
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rdkit
from rdkit import Chem, rdBase
from rdkit.Chem import Crippen, Descriptors, rdMolDescriptors

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import fail  # noqa: E402
from data.files import file_sha256, in_order, raw_lines, whole_folder, with_progress  # noqa: E402
from data.molecules.metrics import PROPERTIES, murcko, sascorer  # noqa: E402
from train_edl import SPECIALS, tokenize  # noqa: E402

MAX_LINE = 10_000                                  # characters; a longer line is no molecule to learn from
CHUNK = 1000                                       # rows per job of a worker process
SYNONYMS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
EXTENSIONS = (".csv", ".smi", ".txt")              # each may be followed by .gz

class Row(NamedTuple):
    line: int                                      # 1-based line of the input file
    smiles: str
    split: str | None                              # None: by the hash

class Rejected(NamedTuple):
    line: int
    reason: str                                    # what is counted
    text: str
    detail: str = ""

class Kept(NamedTuple):
    line: int
    split: str
    identity: int                                  # first 64 bits of the sha1 of the canonical SMILES
    tokens: list[str]
    scaffold: list[str]                            # tokens; none for an acyclic molecule or without --scaffold
    props: list[float]

# ------------------------------------------------------------------------------------------------------ reading a file
read_lines = functools.partial(raw_lines, most=MAX_LINE)

def base_name(name):
    """The lower-case file name without .gz; fails unless its extension is a known one."""
    base = name.lower().removesuffix(".gz")
    if not base.endswith(EXTENSIONS):
        fail(f"{name}: unknown kind of file; expected {', '.join(EXTENSIONS)}, or one of these with .gz")
    return base

class Layout(NamedTuple):
    last: int                                      # last line that is not blank
    first: int = 1                                 # line of the first row
    width: int = 0                                 # columns; 0 for .smi and .txt
    smiles: int = 0                                # column index
    split: int | None = None                       # column index

def read_layout(path, options):
    """One pass over the whole file -> Layout. What is wrong with the file as a whole is said here, before any work."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        fail(f"{path} is a Git-LFS pointer, not the data: run `git lfs pull` where it was cloned, then try again")
    header, last = b"", 0
    for number, line in read_lines(path):
        if number <= 20 and b"\0" in line:
            fail(f"{path}: line {number} contains NUL bytes, so this is no UTF-8 text file")
        if number == 1:
            header = line
            if b"\r" in line:
                fail(f"{path}: its lines end in lone carriage returns; convert them to newlines (tr '\\r' '\\n')")
        if line.strip():
            last = number
    layout = Layout(last)
    if base_name(path.name).endswith(".csv") and last:
        layout = read_header(path, last, header.decode("utf-8", "replace"), options)
    elif options.smiles_column or options.split_column:
        fail(f"{path} has no columns: --smiles_column and --split_column are for .csv files")
    if last < layout.first:
        fail(f"{path} is empty" if not start else f"{path} has no rows")
    return layout

def read_header(path, last, header, options):
    """The first line of a .csv (str) -> Layout."""
    columns = next(csv.reader([header[:MAX_LINE]]), [])
    index = {column.strip().lower(): i for i, column in reversed(list(enumerate(columns)))}

    def find(flag, wanted):
        if wanted.lower() not in index:
            fail(f"{path} has no column {wanted!r}, only {', '.join(columns)[:200]}: name the right one with --{flag}")
        return index[wanted.lower()]

    smiles = find("smiles_column", options.smiles_column or "smiles")
    split = index.get("fold", index.get("split"))
    if options.split_column:
        split = find("split_column", options.split_column)
    return Layout(last, 2, len(columns), smiles, split)

def read_rows(path, layout, options):
    """Yield a Row or a Rejected for each row, or for a seeded sample of --limit rows, in the order of the file."""
    lines = range(layout.first, layout.last + 1)
    if options.limit and options.limit < len(lines):
        lines = set(random.Random(options.seed).sample(lines, options.limit))
    for number, line in read_lines(path):
        if number in lines:
            yield read_row(number, line, layout)

def read_row(number, line, layout):
    text = line.decode("utf-8", "backslashreplace")
    if len(line) > MAX_LINE:
        return Rejected(number, f"line over {MAX_LINE} characters", text)
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Rejected(number, "not UTF-8", text, f"byte {error.start + 1}")
    if not text.strip():
        return Rejected(number, "empty", text)
    if "\r" in text:                                # what follows would pass for the name of the molecule
        return Rejected(number, "carriage return within the line", text)
    if not layout.width:
        return Row(number, text.split()[0], None)
    try:
        fields = next(csv.reader([text], strict=True))
    except csv.Error as error:
        return Rejected(number, "wrong number of columns", text, str(error))
    if len(fields) != layout.width:
        return Rejected(number, "wrong number of columns", text, f"{len(fields)} instead of {layout.width}")
    smiles, split = fields[layout.smiles].strip(), None if layout.split is None else fields[layout.split].strip()
    if smiles == "" or split == "":
        return Rejected(number, "no split" if smiles else "empty", text)
    return Row(number, smiles, split)

# -------------------------------------------------------------------------------------------------------- one molecule
def read_molecule(row, options):
    """Row -> Kept or Rejected; `options` has keep_smiles, max_tokens, props (list of names) and scaffold."""
    molecule = Chem.MolFromSmiles(row.smiles)
    if molecule is None:
        return Rejected(row.line, "not parsed by RDKit", row.smiles)
    canonical = Chem.MolToSmiles(molecule)
    if "." in canonical:
        return Rejected(row.line, "salt or mixture", row.smiles)
    scaffold = murcko(molecule) if options.scaffold else ""
    smiles = row.smiles if options.keep_smiles else canonical
    try:
        tokenize(row.smiles)                       # in any case: RDKit ignores strange characters at the end ("CCé")
        tokens, scaffold = tokenize(smiles), tokenize(scaffold)
    except ValueError as error:
        return Rejected(row.line, "unknown token", row.smiles, str(error))
    assert "".join(tokens) == smiles, (tokens, smiles)
    if max(len(tokens), len(scaffold)) > options.max_tokens:
        return Rejected(row.line, f"too long (> {options.max_tokens} tokens)", row.smiles, f"{len(tokens)} tokens")
    props = [float(PROPERTIES[name](molecule)) for name in options.props]
    if not all(map(math.isfinite, props)):
        raise ValueError(f"{','.join(options.props)} = {props}")
    identity = int.from_bytes(hashlib.sha1(canonical.encode()).digest()[:8], "big")
    split = row.split or ("train" if identity < 0.90 * 2**64 else "val" if identity < 0.95 * 2**64 else "test")
    return Kept(row.line, SYNONYMS.get(split.lower(), split), identity, tokens, scaffold, props)

def read_chunk(rows, options):
    """A worker's job: list of Row or Rejected -> list of Kept or Rejected, in the same order."""
    results = []
    with rdBase.BlockLogs():
        for row in rows:
            try:
                results.append(row if isinstance(row, Rejected) else read_molecule(row, options))
            except (RuntimeError, ValueError, ArithmeticError) as error:     # one strange molecule must not end the run
                results.append(Rejected(row.line, "RDKit error", row.smiles, str(error)))
    return results

# -------------------------------------------------------------------------------- all rows: columns, vocabulary, splits
def collect(results, options):
    """Kept and Rejected in file order -> (table, names of the tokens, names of the splits, list of Rejected).

    table: dict of arrays with an entry per kept row: `line`, `identity` and `size` (n,), `split` (n,) an index into the
    names, `props` (n, P); and `tokens` (T,) with `offsets` (n + 1,), where the first `size` tokens of a row are the
    molecule and the others its scaffold.
    """
    token_ids, split_ids, first_line, rejected = {}, {}, {}, []
    line, identity, size, split, props = array("q"), array("Q"), array("q"), array("B"), array("f")
    tokens, offsets = array("H"), array("q", [0])
    for row in results:
        if isinstance(row, Kept):
            first = first_line.setdefault(row.identity, row.line)
            if first != row.line:
                row = Rejected(row.line, "duplicate", "".join(row.tokens), f"first on line {first}")
        if isinstance(row, Rejected):
            rejected.append(row)
            continue
        line.append(row.line)
        identity.append(row.identity)
        size.append(len(row.tokens))
        split.append(split_ids.setdefault(row.split, len(split_ids)))
        props.extend(row.props)
        tokens.extend([token_ids.setdefault(token, len(token_ids)) for token in row.tokens + row.scaffold])
        offsets.append(len(tokens))
        if len(split_ids) > 250 or len(token_ids) > 32_000:
            fail(f"{len(split_ids)} different splits and {len(token_ids):,} different tokens by line {row.line:,}: are "
                 "these the right columns? (--split_column, --smiles_column)")
    table = {"line": line, "identity": identity, "size": size, "split": split, "tokens": tokens, "offsets": offsets}
    table = {name: np.array(column) for name, column in table.items()}
    table["props"] = np.array(props).reshape(len(line), len(options.props))
    return table, list(token_ids), list(split_ids), rejected

def tokens_of(table, rows):
    """The ids of all tokens of the rows for which rows (n,) bool is true."""
    return table["tokens"][np.repeat(rows, np.diff(table["offsets"]))]

def order_splits(table, names):
    """Renumber the splits: train, val, test, then the others by name -> names. cut_val fills val where it is empty."""
    ordered = ["train", "val"] + ["test"] * ("test" in names) + sorted(set(names) - {"train", "val", "test"})
    table["split"] = np.array([ordered.index(name) for name in names], np.uint8)[table["split"]]
    return ordered

def build_vocabulary(table, names):
    """Renumber the tokens -> (table, vocabulary, list of Rejected).

    The vocabulary is SPECIALS and the sorted tokens of the train rows. What a model never sees in training it cannot
    say: rows of the other splits that use further tokens are rejected.
    """
    seen = np.zeros(len(names), bool)
    seen[tokens_of(table, table["split"] == 0)] = True
    known = np.ones(len(table["split"]), bool)
    known[np.searchsorted(table["offsets"], np.flatnonzero(~seen[table["tokens"]]), side="right") - 1] = False
    rejected = []
    for row in np.flatnonzero(~known).tolist():
        ids = table["tokens"][slice(*table["offsets"][row:row + 2])].tolist()
        rejected.append(Rejected(int(table["line"][row]), "token not in the training vocabulary",
                                 "".join(names[i] for i in ids[:table["size"][row]]),
                                 " ".join(sorted({names[i] for i in ids if not seen[i]}))))
    vocabulary = SPECIALS + sorted(itertools.compress(names, seen))
    position = {name: i for i, name in enumerate(vocabulary)}
    new_id = np.array([position.get(name, 0) for name in names], np.uint8 if len(vocabulary) <= 256 else np.uint16)
    kept = {name: column[known] for name, column in table.items() if name not in ("tokens", "offsets")}
    kept["tokens"] = new_id[tokens_of(table, known)]
    kept["offsets"] = np.concatenate([[0], np.cumsum(np.diff(table["offsets"])[known])])
    return kept, vocabulary, rejected

def cut_val(table, vocabulary, source):
    """Fill an empty val split with 2 % of the train rows (1 .. 10,000), those of lowest hash -> how many.

    A row stays in train if it is the last one there to use some token: the vocabulary must not lose any.
    """
    train = table["split"] == 0
    wanted = min(max(1, round(0.02 * train.sum())), 10_000)
    left = np.bincount(tokens_of(table, train), minlength=len(vocabulary))
    cut = []
    rows = np.flatnonzero(train)
    for row in rows[np.argsort(table["identity"][rows])].tolist():
        used = np.bincount(table["tokens"][slice(*table["offsets"][row:row + 2])], minlength=len(vocabulary))
        if (left > used)[used > 0].all():
            left -= used
            cut.append(row)
            if len(cut) == wanted:
                break
    if not cut:
        fail(f"{source} has no validation rows, and none of the {train.sum()} training rows can be spared for them")
    table["split"][cut] = 1
    return len(cut)

# ------------------------------------------------------------------------------------------------------------- writing
def build(rows, total, source, settings, options, folder):
    """`total` Row or Rejected in file order -> the finished data set in `folder`, and a summary on the terminal."""
    start = time.monotonic()
    rows = iter(rows)
    jobs = iter(lambda: list(itertools.islice(rows, CHUNK)), [])
    workers = min(options.workers, math.ceil(total / CHUNK))
    results = in_order(functools.partial(read_chunk, options=options), jobs, workers)
    results = with_progress(itertools.chain.from_iterable(results), total, "molecules")
    table, names, splits, rejected = collect(results, options)
    if "train" not in splits:
        reasons = Counter(row.reason for row in rejected).most_common(4)
        fail(f"{source}: none of its {total:,} rows is left for training; splits: {', '.join(splits) or 'none'}; "
             f"rejected: {', '.join(f'{reason} {n:,}' for reason, n in reasons) or 'none'}")
    splits = order_splits(table, splits)
    table, vocabulary, strangers = build_vocabulary(table, names)
    moved = 0 if (table["split"] == 1).any() else cut_val(table, vocabulary, source)

    size, scaffold_size = table["size"], np.diff(table["offsets"]) - table["size"]
    is_molecule = np.repeat(np.tile([True, False], len(size)), np.stack([size, scaffold_size], 1).ravel())
    arrays = {"tokens": table["tokens"][is_molecule], "offsets": np.concatenate([[0], np.cumsum(size)]),
              "split": table["split"]}
    if options.props:
        arrays["props"] = table["props"]
    if options.scaffold:
        arrays["scaffold_tokens"] = table["tokens"][~is_molecule]
        arrays["scaffold_offsets"] = np.concatenate([[0], np.cumsum(scaffold_size)])

    rejected = sorted(rejected + strangers)
    counts = {"read": total, "kept": len(size),
              "by_split": dict(zip(splits, np.bincount(table["split"], minlength=len(splits)).tolist())),
              "val_cut_from_train": moved,
              "rejected": dict(sorted(Counter(row.reason for row in rejected).items()))}
    train = table["props"][table["split"] == 0].astype(np.float64)
    meta = {"format": 1, "name": folder.name, "source": source, "sha256": options.sha256, "options": settings,
            "canonical": not options.keep_smiles, "counts": counts, "vocab": vocabulary, "splits": splits,
            "longest": int(size.max()), "mean_tokens": round(float(size.mean()), 4),
            "longest_scaffold": int(scaffold_size.max()),
            # a constant property has std 1 here: standardised it is 0 and not NaN
            "props": {name: {"mean": float(column.mean()), "std": float(column.std()) or 1.0}
                      for name, column in zip(options.props, train.T)},
            "rdkit": rdkit.__version__}
    save(folder, arrays, meta, rejected)
    summary(folder, meta, time.monotonic() - start)

def summary(folder, meta, seconds):
    counts = meta["counts"]
    print(f"{folder}: {counts['read']:,} rows read, {counts['kept']:,} kept in {seconds:.1f} s")
    print("  splits      " + ", ".join(f"{name} {n:,}" for name, n in counts["by_split"].items()))
    if counts["val_cut_from_train"]:
        print(f"              val was empty: {counts['val_cut_from_train']:,} train rows moved there, chosen by hash")
    print("  rejected    " + (", ".join(f"{reason} {n:,}" for reason, n in counts["rejected"].items()) or "none"))
    print(f"  vocabulary  {len(meta['vocab'])} with {' '.join(SPECIALS)}")
    print(f"  tokens      {meta['mean_tokens']:.2f} in the mean, {meta['longest']} at most")

def save(folder, arrays, meta, rejected):
    with whole_folder(folder) as new:
        for name, values in arrays.items():
            np.save(new / f"{name}.npy", values, allow_pickle=False)
        with open(new / "rejected.jsonl", "w", encoding="utf-8") as file:
            for row in rejected:
                entry = {"line": row.line, "reason": row.reason, "text": row.text[:80]}
                file.write(json.dumps(entry | ({"detail": row.detail} if row.detail else {})) + "\n")
        (new / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")

def already_there(folder, sha256, settings):
    """True if the folder holds a whole set of this source and these options; fails if it holds something else."""
    if not folder.exists():
        return False
    if not (folder / "meta.json").is_file():
        fail(f"{folder} exists and is no data set: move it away or choose another --name")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        same = meta["options"] == settings and sha256 in (None, meta["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):     # damaged: built again
        return False
    names = ["tokens", "offsets", "split"] + ["props"] * bool(settings["props"])
    names += ["scaffold_tokens", "scaffold_offsets"] * settings["scaffold"]
    return same and all((folder / f"{name}.npy").is_file() for name in names)

def url_name(url):
    return urllib.parse.unquote(urllib.parse.urlparse(url).path).rpartition("/")[2]

def download(url, sha256, folder):
    """Fetch a file into `folder`, unless it is there -> its path; what has another sha256 is not kept."""
    target = folder / f"{sha256[:12]}-{url_name(url)}"
    if target.exists() and file_sha256(target) == sha256:
        return target
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as response, open(part, "wb") as file:
            total = math.ceil(int(response.headers.get("Content-Length") or 0) / 2**20)
            for block in with_progress(iter(lambda: response.read(2**20), b""), total, "MiB"):
                file.write(block)
        actual = file_sha256(part)
        if actual != sha256:
            fail(f"{url}: expected sha256 {sha256}, actual {actual} ({part.stat().st_size:,} bytes): not kept")
        part.replace(target)
    except (OSError, ValueError, http.client.HTTPException) as error:
        fail(f"cannot download {url}: {error}")
    finally:
        part.unlink(missing_ok=True)
    return target

# ------------------------------------------------------------------------------------------------------------ demo set
# Molecules as a chemist might join them from stock: ring systems, linkers and end groups, the frequent ones first.
# "_" stands behind an atom where a bond can be made.
RINGS = """
    c1_c_c_c_c_c1_  n1c_c_c_c_c1_  N1_CCN_CC1  N1_CCOCC1  N1_CCC_CC1  n1_ncc_c1  N1_CCC_C1  s1c_c_c_c1  C1_CC1
    c1_c_c_c2OCOc2c1_  n1c_nc_cc1_  N1_CCCC1  C1_CCCCC1  C1_CCCC1  o1c_c_cc1  s1c_ncc1_  o1nc_cc1_  C1_CCN_CC1
    n1_cncc1_  N1_CCCCC1  o1c_nnc1_  C1_CCOCC1  C1_CCCO1  n1_ccc2ccc_cc12  N1_CCc2ccc_cc12  N1_CCc2ccc_cc2C1
    C1_COc2ccccc2O1  N1_CC_C1  O=C1CCCN1_  n1c_ccc2ccccc12  s1c_nc2ccc_cc12  n1nc_ccc1_  n1ccnc_c1  o1nc_nc1_
    O=c1ccccn1_  N1_CCCCCC1  C1_COC1  C1_CCC1  O=C1NCc2ccc_cc12  N1_CCCc2ccccc12  n1_cnc2ccccc12  C1_CCc2ccccc12
    O=c1ccc2ccc_cc2o1  n1_nncc1_  s1c_c_c2ccccc12  o1c_cc2ccccc12  o1nc2ccccc2c1_  s1c_nnc1_  O=C1NC(=O)CC1_
    N1_CCSCC1  n1_ncc2ccccc12  n1c_nc2ccccc2c1_  O=C1COc2ccc_cc2N1  N1_CCN_CCC1  N1_CC2(C1)CCOCC2  N1_CCCC1C_
    c1_cn2ccccc2n1  N1_Cc2ccccc2C1  O=C1CCc2cc_ccc2N1  C1_CC2CCC1C2  O=S1(=O)CCC_C1  N1_CCOc2ccccc2C1
    C1_CCSCC1  n1_ccc2cccnc12
""".split()
LINKERS = """
    C_(=O)N_  C_NC_=O  C__  S_(=O)(=O)N_  O_C_  C__=O  N__  C_C_  O_CC(=O)N_  S__(=O)=O  C_CNC_=O  N_C(=O)N_  O__
    C_C(=O)N_  C_(=O)N_C  S_CC(=O)N_  N_C_  C_CC_=O  S_C_  C_CC(=O)N_  N_CCNC_=O
""".split()
ENDS = """
    C_  F_  O_C  Cl_  C_C  C_(F)(F)F  C_#N  C_(C)C  C_(N)=O  C_OC  O_CC  N_C(C)=O  Br_  N_(C)C  S_(C)(=O)=O  O_
    C_(C)=O  C_(=O)OC  C_CC  O_C(F)F  C_CO  S_C  S_(N)(=O)=O  C_(=O)NC  N_  N_S(C)(=O)=O  C_(C)(C)C
""".split()
# What random joining makes and a chemist would not: N-O and the like, N-C-O, N-C-F, N-CN, C(=O)-C(=O)
UNLIKELY = [Chem.MolFromSmarts(smarts) for smarts in (
    "[#7,#8,S&X2,F,Cl,Br]-!@[#7,#8,S&X2]", "[#7,#8,S&X2]-!@[CX4]-[#7,#8,S&X2,Cl,Br]", "[#7]-!@[CX4]-F", "[#7]-!@C#N",
    "[#6,S](=O)-!@[#6,S]=O")]
DEMO_ROWS, DEMO_JOB = 24_000, 250
DEMO_RECIPE = 1                                    # raised when other molecules come out, to build old sets anew
HYDROGEN = 1.008

def write_fragment(pieces, bonds):
    """A fragment as SMILES: at each place a ring-closure mark such as "%10", or a hydrogen where the mark is ""."""
    text = ""
    for piece, bond in zip(pieces, bonds):
        text += piece + bond if bond else re.sub(r"n(\d?)$", r"[nH]\1", piece)      # aromatic N must show its hydrogen
    return text + pieces[-1]

@functools.cache
def shelf(name):
    """-> list of (pieces of SMILES text between the places, weight without hydrogen there), list of frequencies."""
    fragments = []
    for text in {"rings": RINGS, "linkers": LINKERS, "ends": ENDS}[name]:
        pieces = text.split("_")
        molecule = Chem.MolFromSmiles(write_fragment(pieces, ["([H])"] * (len(pieces) - 1)))
        fragments.append((pieces, Descriptors.MolWt(molecule) - HYDROGEN * (len(pieces) - 1)))
    return fragments, [1 / (rank + 2) for rank in range(len(fragments))]

def draw_smiles(rng):
    """Two or three rings, perhaps linkers between them, and end groups -> SMILES, or None if too light or too heavy."""
    parts, bonds, total = [], [], 0.0
    links = [["linkers", "rings"] if rng.random() < 0.75 else ["rings"] for _ in range(rng.choice((1, 1, 1, 2)))]
    for name in ["rings", *itertools.chain(*links), *["ends"] * rng.choice((0, 1, 1, 1, 2, 2))]:
        pieces, weight = rng.choices(*shelf(name))[0]
        parts.append(pieces)
        bonds.append([""] * (len(pieces) - 1))
        total += weight + HYDROGEN * len(bonds[-1])
        targets = bonds[:-1] if name == "ends" else bonds[-2:-1]     # a chain, then end groups anywhere on it
        free = [(bond, place) for bond in targets for place, mark in enumerate(bond) if not mark]
        if free:                                    # two atoms with the same ring-closure mark are bonded
            bond, place = rng.choice(free)
            bond[place] = bonds[-1][rng.randrange(len(bonds[-1]))] = f"%{9 + len(parts)}"
            total -= 2 * HYDROGEN
        elif len(parts) > 1:
            return None
    # The weight is known before the molecule is built, and most candidates fall here
    return ".".join(map(write_fragment, parts, bonds)) if 250 <= total <= 350 else None

def draw_molecules(job, seed):
    """A worker's job -> DEMO_JOB canonical SMILES within the limits of MOSES (weight, rotatable bonds, logP)."""
    rng, found = random.Random(f"{seed} {job}"), []
    while len(found) < DEMO_JOB:
        smiles = draw_smiles(rng)
        molecule = smiles and Chem.MolFromSmiles(smiles)
        if (molecule and rdMolDescriptors.CalcNumRotatableBonds(molecule) <= 7
                and not any(map(molecule.HasSubstructMatch, UNLIKELY)) and Crippen.MolLogP(molecule) <= 3.5):
            found.append(Chem.MolToSmiles(molecule))
    return found

def demo_molecules(n, seed, workers):
    """n distinct canonical SMILES; the same for any number of workers, and the first of a longer list."""
    found, total = {}, math.ceil(n / DEMO_JOB)
    jobs = in_order(functools.partial(draw_molecules, seed=seed), itertools.count(), min(workers, total))
    for batch in with_progress(jobs, total, f"batches of {DEMO_JOB} demo molecules"):
        found.update(dict.fromkeys(batch))
        if len(found) >= n:
            jobs.close()
            return list(found)[:n]

# ---------------------------------------------------------------------------------------------------------------- main
class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (see --help)")

def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)

    def flag(name, help, group=parser, **kind):
        group.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), help=help, **kind)

    flag("input", "a .csv, .smi or .txt file, also gzipped", source, type=Path)
    flag("url", "where to download such a file; needs --sha256", source)
    flag("demo", f"build molecules offline ({DEMO_ROWS:,}, or --limit)", source, action="store_true")
    flag("name", "the data set is written to <out_dir>/<name>/ (default with --demo: demo)")
    flag("sha256", "what the file must have")
    flag("limit", "use a random sample of so many rows (seeded)", type=int)
    flag("split_column", "the column that names the split (default: FOLD, else SPLIT, else by hash)")
    flag("smiles_column", "the column of the molecules (default: SMILES)")
    flag("props", f"comma-separated, of {','.join(PROPERTIES)}", default="")
    flag("scaffold", "also the Bemis-Murcko scaffold of each molecule", action="store_true")
    flag("keep_smiles", "keep the SMILES as written instead of RDKit's canonical form", action="store_true")
    flag("max_tokens", "leave out longer molecules (default: 128)", type=int, default=128)
    flag("workers", "processes (default: one per core)", type=int, default=os.cpu_count() or 1)
    flag("seed", "of --limit and --demo (default: 0)", type=int, default=0)
    flag("out_dir", "(default: the folder of this script)", type=Path, default=Path(__file__).resolve().parent)
    flag("force", "build the set even if it is already there", action="store_true")
    options = parser.parse_args(argv)

    options.name = options.name or ("demo" if options.demo else "")
    if not re.fullmatch(r"\w[\w.+-]*", options.name):
        fail(f"--name {options.name or '(missing)'}: give the data set a plain folder name, such as --name moses")
    for name in ("limit", "max_tokens", "workers"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            fail(f"--{name} {getattr(options, name)}: must be at least 1")
    options.props = [name.strip() for name in options.props.split(",") if name.strip()]
    unknown = [name for name in options.props if name not in PROPERTIES]
    if unknown or len(set(options.props)) < len(options.props):
        fail(f"--props {','.join(options.props)}: choose from {', '.join(PROPERTIES)}, each once")
    if "sas" in options.props:
        sascorer()                                  # here, because a worker could not tell the user
    if options.demo and (options.split_column or options.smiles_column or options.sha256):
        fail("--demo reads no file: leave out --split_column, --smiles_column and --sha256")
    if options.url and not options.sha256:
        fail("--url needs --sha256, so that what was downloaded can be verified")
    options.sha256 = options.sha256 and options.sha256.lower()
    return options

def main(argv=None):
    """Build the data set that the command line asks for -> its folder (Path)."""
    options = parse(argv)
    folder = options.out_dir / options.name
    settings = {name: getattr(options, name) for name in ("limit", "split_column", "smiles_column", "props", "scaffold",
                                                          "keep_smiles", "max_tokens", "seed")}
    if options.demo:
        settings["demo"] = DEMO_RECIPE
    else:
        base_name(options.input.name if options.input else url_name(options.url))
    if options.input:
        if not options.input.is_file():
            fail(f"there is no file {options.input}: name a .csv, .smi or .txt file, or build molecules with --demo")
        actual = file_sha256(options.input)
        if options.sha256 not in (None, actual):
            fail(f"{options.input}: expected sha256 {options.sha256}, actual {actual}")
        options.sha256 = actual
    if already_there(folder, options.sha256, settings) and not options.force:
        print(f"{folder}: already there (--force builds it again)")
        return folder
    try:
        if options.demo:
            molecules = demo_molecules(options.limit or DEMO_ROWS, options.seed, options.workers)
            options.sha256 = hashlib.sha256("\n".join(molecules).encode()).hexdigest()
            rows = (Row(line, smiles, None) for line, smiles in enumerate(molecules, 1))
            build(rows, len(molecules), "demo", settings, options, folder)
        else:
            path = options.input or download(options.url, options.sha256, options.out_dir / ".downloads")
            layout = read_layout(path, options)
            total = layout.last - layout.first + 1
            build(read_rows(path, layout, options), min(total, options.limit or total),
                  path.name if options.input else url_name(options.url), settings, options, folder)
    except KeyboardInterrupt:
        print("interrupted: nothing was changed", file=sys.stderr)
        raise SystemExit(130) from None
    return folder

if __name__ == "__main__":
    main()
