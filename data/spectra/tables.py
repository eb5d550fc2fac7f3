"""Molecules and spectra as tables on the device, from which batches are cut; data/README.md describes the arrays."""
import copy
import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rdkit import Chem, rdBase

from common import cast, fail, rank
from data.files import check_ids, check_rows
from data.spectra.features import (ATOM_SIZES, BOND_SIZES, ECFP_BITS, N_FEATURES, block1_of, featurise, join,
                                   read_smiles, recipe)

MASKED = 8  # the kind of a bond that is hidden; the others are 2 * type + whether it is in a ring


class Ragged:
    """Rows of different lengths back to back: columns on the device, offsets (rows + 1,) int64 on the host."""
    def __init__(self, offsets, *columns, device="cpu"):
        check_rows(offsets, *columns)
        self.offsets, self.columns, self.device = offsets, cast(columns, torch.device(device)), torch.device(device)

    def take(self, rows):
        """rows (k,) int64 -> owner (n,) int64, which of the k an entry belongs to; begin (k,), each one's first entry;
        and the entries of each column, on the device, integers as int64."""
        length = self.offsets[rows + 1] - self.offsets[rows]
        begin = np.cumsum(length) - length
        owner = np.repeat(np.arange(len(rows)), length)
        place = np.arange(len(owner)) + (self.offsets[rows] - begin)[owner]
        owner, begin, place = cast((owner, begin, place), self.device)
        taken = [column[place] for column in self.columns]
        return owner, begin, *(x if x.is_floating_point() else x.long() for x in taken)

    def with_more(self, other):
        """-> these rows and then the other's."""
        offsets = np.concatenate([self.offsets, self.offsets[-1] + other.offsets[1:]])
        return Ragged(offsets, *map(torch.cat, zip(self.columns, other.columns)), device=self.device)


class Molecules:
    """What is known of molecules before any spectrum: features.join()'s arrays as tables on the device. Without graphs
    inputs() serves students alone."""
    def __init__(self, arrays, bins, device="cpu"):
        self.n, self.bins, self.device = len(arrays["mass"]), bins, torch.device(device)
        self.mass = arrays["mass"].astype(np.int64)             # (n,) nominal mass
        self.on_device = cast(self.mass, self.device)
        index, count = arrays["fp_index"].astype(np.int16), arrays["fp_count"].astype(np.float32)
        value = np.where(index < ECFP_BITS, 1, np.log1p(count)).astype(np.float32)
        self.fingerprint = Ragged(arrays["fp_offsets"], index, value, device=device)
        offsets, kind, mass = (arrays[f"fragment_{name}"] for name in ("offsets", "kind", "mass"))
        self.fragments = Ragged(offsets, kind, mass, device=device)
        if "atoms" in arrays:
            self.atoms = Ragged(arrays["atom_offsets"], arrays["atoms"], device=device)
            self.bonds = Ragged(arrays["bond_offsets"], arrays["bonds"], device=device)
            nth = np.arange(len(kind)) - np.repeat(offsets[:-1], np.diff(offsets))      # in its molecule
            nth = nth.astype(np.int16)              # as small as may be: most of a data set's memory
            members = np.repeat(nth, arrays["fragment_size"]), arrays["fragment_atoms"]
            broken = np.repeat(nth, arrays["fragment_broken"]), arrays["broken_bonds"].astype(np.int16)
            self.members = Ragged(arrays["member_offsets"], *members, device=device)
            self.broken = Ragged(arrays["broken_offsets"], *broken, device=device)

    def with_more(self, other):
        """-> these molecules and then the other's."""
        both = copy.copy(self)
        both.n, both.mass = self.n + other.n, np.concatenate([self.mass, other.mass])
        both.on_device = torch.cat([self.on_device, other.on_device])
        for name, table in vars(self).items():
            if isinstance(table, Ragged):
                setattr(both, name, table.with_more(getattr(other, name)))
        return both

    def inputs(self, rows, graph):
        """rows (B,) int64 -> dict of tensors on the device that a student reads, with graph also what a teacher does.

        mass (B,) int64; fp_index, fp_value (n,), fp_begin (B,); fragments (B, 3, Z) float32, log(1 + number of
        fragments) of each kind and mass. Graph: atoms (A, 7) int64, atom_owner (A,); edges (2, 2E) int64, each bond
        both ways, edge_kind (2E,) int64; fragment_kind, fragment_mass, fragment_owner (F,); members (2, n): fragment,
        atom; broken (2, n): fragment, bond that it breaks, a column of edges."""
        _, begin, index, value = self.fingerprint.take(rows)
        owner, fragment_begin, kind, mass = self.fragments.take(rows)
        shown = (kind > 0) & (mass < self.bins)
        cell = torch.where(shown, (owner * 3 + kind - 1) * self.bins + mass, 0)
        counts = mass.new_zeros(len(rows) * 3 * self.bins, dtype=torch.float32).index_add(0, cell, shown.float())
        batch = {"mass": self.on_device[cast(rows, self.device)], "fp_index": index, "fp_value": value,
                 "fp_begin": begin, "fragments": counts.view(len(rows), 3, self.bins).log1p()}
        if graph:
            atom_owner, atom_begin, atoms = self.atoms.take(rows)
            bond_owner, bond_begin, bonds = self.bonds.take(rows)
            ends = (bonds[:, :2] + atom_begin[bond_owner][:, None]).T
            member_owner, _, nth, atom = self.members.take(rows)
            members = torch.stack([nth + fragment_begin[member_owner], atom + atom_begin[member_owner]])
            broken_owner, _, broken_nth, bond = self.broken.take(rows)
            broken = torch.stack([broken_nth + fragment_begin[broken_owner], bond + bond_begin[broken_owner]])
            batch |= {"broken": broken, "atoms": atoms, "atom_owner": atom_owner,
                      "edges": torch.cat([ends, ends.flip(0)], 1), "fragment_kind": kind, "fragment_mass": mass,
                      "edge_kind": (bonds[:, 2] * 2 + bonds[:, 3]).repeat(2),
                      "fragment_owner": owner, "members": members}
        return batch

    def hide_bonds(self, rows, mine, rng):
        """Hide 15 % of the bonds of all molecules of a step, at least one of each -> inputs of those at the places mine
        of rows, with asked (Q,), the bonds to guess, their kinds (Q,), and count, how many the whole step asks for."""
        owner = np.repeat(np.arange(len(rows)), self.bonds.offsets[rows + 1] - self.bonds.offsets[rows])
        dice, lowest = rng.random(len(owner)), np.full(len(rows), np.inf)
        np.minimum.at(lowest, owner, dice)
        hidden = (dice < 0.15) | (dice == lowest[owner])
        batch, asked = self.inputs(rows[mine], True), cast(np.flatnonzero(hidden[np.isin(owner, mine)]), self.device)
        edge_kind = batch["edge_kind"]
        both = torch.cat([asked, asked + len(edge_kind) // 2])
        return batch | {"asked": asked, "kinds": edge_kind[asked], "count": max(1, int(hidden.sum())),
                        "edge_kind": edge_kind.index_fill(0, both, MASKED)}


@dataclass(eq=False)
class Data:
    meta: dict  # of the data set
    molecules: Molecules
    molecule: np.ndarray  # (spectra,) int64, whose each spectrum is
    peaks: Ragged  # of each spectrum: bin int64, intensity float32, base peak 1; m/z * sqrt(it), of unit length
    rows: dict  # split -> (molecules of the split,) int64
    spectra: dict  # split -> (their spectra,) int64
    first: np.ndarray  # (molecules,) int64, the first spectrum of each, which stands for it in a library
    names: list  # (molecules,) first block of the InChIKey, SMILES
    taught: dict = None  # what the teachers say of each molecule: see ask_teachers

    @property
    def mass(self):
        """(molecules of the data set,) int64"""
        return self.molecules.mass[:len(self.first)]

    def with_more(self, path):
        """-> also molecules without a spectrum, a SMILES per line, as rows to train on; none that the set holds."""
        made, names, bad = read_molecules(path, True, self.molecules.bins - 1)
        known, kept = {block1 for block1, _ in self.names}, []
        for one, name in zip(made, names):
            block1 = block1_of(name.split()[0])
            if block1 and block1 not in known:
                known.add(block1)
                kept.append((one, (block1, name.split()[0])))
        reasons = Counter(row["reason"] for row in bad)
        reasons["known already, or without an InChIKey"] = len(made) - len(kept)
        told = "; left out: " + (", ".join(f"{reason} {n:,}" for reason, n in reasons.items() if n) or "none")
        if not kept:
            fail(f"--smiles {path}: no molecule to add{told}")
        if rank() == 0:
            print(f"--smiles {path}: {len(kept):,} molecules{told}", flush=True)
        new, device = np.arange(len(kept)), self.molecules.device
        nothing = Ragged(np.zeros(len(kept) + 1, np.int64), *(x[:0] for x in self.peaks.columns), device=device)
        molecules = Molecules(join([one for one, _ in kept]), self.molecules.bins, device)
        return replace(
            self, molecules=self.molecules.with_more(molecules), names=self.names + [name for _, name in kept],
            spectra=self.spectra | {"train": np.concatenate([self.spectra["train"], len(self.molecule) + new])},
            molecule=np.concatenate([self.molecule, len(self.names) + new]), peaks=self.peaks.with_more(nothing))

    def pool(self, phase):
        """split -> what an epoch passes over: the spectra, or to pretrain the molecules."""
        return self.rows if phase == "pretrain" else self.spectra

    def dense(self, spectra, weighed=False):
        """spectra (k,) int64 -> (k, Z) float32 intensities, base peak 1, on the device; weighed: unit rows of
        m/z * sqrt(intensity), as library searches compare them, with no look at the cells that hold nothing."""
        owner, _, place, *values = self.peaks.take(spectra)
        value = values[weighed]
        out = value.new_zeros(len(spectra) * self.molecules.bins)
        return out.index_put((owner * self.molecules.bins + place,), value).view(len(spectra), self.molecules.bins)

    def measured(self):
        return self.dense(self.first).cpu()

    def replicates(self):
        """-> molecules (r,) that have a second spectrum, and that spectrum (r, Z)."""
        others = np.setdiff1d(np.flatnonzero(self.molecule < len(self.first)), self.first)
        molecules, place = np.unique(self.molecule[others], return_index=True)
        return molecules, self.dense(others[place]).cpu()

    def bits(self, rows):
        owner, _, index, _ = self.molecules.fingerprint.take(rows)
        bits = index.new_zeros(len(rows), N_FEATURES, dtype=torch.float32).index_put(
            (owner, index), index.new_ones((), dtype=torch.float32))
        return bits[:, :ECFP_BITS].cpu()

    def smiles(self, row):
        return self.names[row][1]


def read_molecules(path, with_graph=True, max_mass=math.inf):
    """A file with a SMILES per line, perhaps a name after it -> list of featurise()'s answers, their lines, and what
    could not be read or is too heavy as dicts of line, reason, text."""
    made, names, bad = [], [], []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path} cannot be read: {error}")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                with rdBase.BlockLogs():
                    same = Chem.MolToSmiles(read_smiles(line.split()[0]))       # as prepare.py reads it: any spelling
                    if "." in same:
                        raise ValueError("several components")
                    one = featurise(read_smiles(same), with_graph)
                if one["mass"][0] > max_mass:
                    raise ValueError(f"heavier than {max_mass} Da")
                made.append(one)
                names.append(line.strip())
            except (ValueError, OverflowError, RuntimeError) as error:
                bad.append({"line": number, "reason": str(error), "text": line[:80]})
    return made, names, bad


def check_arrays(array, meta, names):
    """ValueError unless the arrays are of one set, and what they point at is there."""
    n, value = len(array["mass"]), array["peak_value"]
    if len(names) != n or {len(name) for name in names} != {2} or not ((value >= 0) & (value < np.inf)).all():
        raise ValueError("molecules.csv is not a table of all molecules, or peak_value has no intensities")
    check_rows(array["peak_offsets"], array["peak_bin"], value, n=len(array["molecule"]))
    for name in ("fp", "fragment", "atom", "bond", "member", "broken"):
        check_rows(array[f"{name}_offsets"], n=n)
    for name, most in {"peak_bin": meta["bins"], "fp_index": N_FEATURES, "fp_count": 256, "mass": 2 ** 31,
                       "fragment_kind": 4, "fragment_mass": 2 ** 31}.items():
        check_ids(name, array[name], most)
    check_ids("molecule", array["molecule"], n, 0, (array["molecule"].size,))
    if len(np.unique(array["molecule"])) < n:
        raise ValueError("there are molecules without a spectrum")
    check_ids("split", array["split"], len(meta["splits"]), 0, (n,))
    for name, sizes in {"atoms": ATOM_SIZES, "bonds": (256, 256, *BOND_SIZES)}.items():
        check_ids(name, array[name], 256)
        if not (array[name] < np.array(sizes)).all():
            raise ValueError(f"{name} has categories that there are not")
    for name, owner, of in (("fragment_atoms", "member", "atom"), ("broken_bonds", "broken", "bond"),
                            ("bonds", "bond", "atom")):
        ends, there = (np.diff(array[f"{x}_offsets"]) for x in (owner, of))
        ids = array[name][:, :2] if name == "bonds" else array[name][:, None]
        check_ids(name, ids, 256)
        if not (ids < np.repeat(there, ends)[:, None]).all():
            raise ValueError(f"{name} has numbers above those of its molecule's {of}s")


def read_folder(folder, device="cpu"):
    """What prepare.py wrote -> Data. Raises OSError, ValueError, KeyError or IndexError for what is no such folder."""
    meta = json.loads((folder / "meta.json").read_text())
    if meta["options"]["features"] != recipe():
        raise ValueError("made by another version of data/spectra/features.py, to be made again with --force")
    array = {name: np.load(folder / f"{name}.npy") for name in meta["arrays"]}
    names = [tuple(line.split(",")) for line in (folder / "molecules.csv").read_text().splitlines()[1:]]
    check_arrays(array, meta, names)
    offsets, bins, value = (array[f"peak_{name}"] for name in ("offsets", "bin", "value"))
    owner, weighed = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)), bins * np.sqrt(value)
    weighed /= np.sqrt(np.bincount(owner, weighed.astype(float) ** 2)).clip(1e-6).astype(np.float32)[owner]
    peaks = Ragged(offsets, bins.astype(np.int32), value, weighed, device=device)
    molecule, split = array["molecule"].astype(np.int64), array["split"]
    rows, spectra = ({name: np.flatnonzero(of == i) for i, name in enumerate(meta["splits"])}
                     for of in (split, split[molecule]))
    return Data(meta, Molecules(array, meta["bins"], device), molecule, peaks, rows, spectra,
                np.unique(molecule, return_index=True)[1], names)


def read_list(path, device="cpu"):
    """A SMILES per line -> Data without spectra, to learn from molecules alone; every tenth one is for validation."""
    made, names, bad = read_molecules(path)
    block1s = [block1_of(name.split()[0]) for name in names]
    first = sorted({block1: i for i, block1 in reversed([*enumerate(block1s)])}.values())    # of a molecule, no twice
    made, names = [made[i] for i in first], [names[i] for i in first]
    if len(made) < 20:
        fail(f"{path}: {len(made)} molecules that RDKit can read, {len(bad)} that it cannot; 20 are needed")
    if rank() == 0:
        print(f"{path}: {len(made):,} molecules, {len(bad):,} lines left out", flush=True)
    rows = {"train": np.flatnonzero(np.arange(len(made)) % 10), "val": np.arange(0, len(made), 10)}
    names, every = [("", name.split()[0]) for name in names], np.arange(len(made))
    return Data({}, Molecules(join(made), 1, device), every, None, rows, rows, every, names)
