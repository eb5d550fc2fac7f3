"""A molecule as numbers: fingerprints, graph, nominal mass, split. prepare.py and train_student.py share them."""
import hashlib

import numpy as np
from rdkit import Chem
from rdkit.Chem import rdFingerprintGenerator

ECFP_BITS, COUNT_BITS = 4096, 2048
N_FEATURES = ECFP_BITS + COUNT_BITS
ELEMENTS = ("C", "H", "B", "N", "O", "F", "Si", "P", "S", "Cl", "Ge", "As", "Se", "Br", "Sn", "Te", "I")    # or other
HYBRIDISATIONS = tuple(getattr(Chem.HybridizationType, name) for name in ("SP", "SP2", "SP3", "SP3D"))
BOND_TYPES = tuple(getattr(Chem.BondType, name) for name in ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC"))
ATOM_SIZES = (18, 7, 5, 5, 5, 2, 6)  # element, degree, charge + 2, hydrogens, hybridisation, aromatic, smallest ring
BOND_SIZES = (4, 2)  # type, in a ring

_table = Chem.GetPeriodicTable()
_ecfp = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=ECFP_BITS)
_counts = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=COUNT_BITS)


def read_smiles(smiles):
    """SMILES -> RDKit molecule. Raises ValueError that says what is wrong with it."""
    molecule = Chem.MolFromSmiles(smiles) if smiles.isascii() else None     # RDKit reads CC of "CCé"
    if molecule is None or not molecule.GetNumAtoms():
        raise ValueError("RDKit cannot read the structure")
    return molecule


def mass_number(atom):
    """Of its most abundant isotope, or the one that is stated, and of the hydrogens that go with it."""
    return (atom.GetIsotope() or _table.GetMostCommonIsotope(atom.GetAtomicNum())) + atom.GetTotalNumHs()


def nominal_mass(molecule):
    return sum(mass_number(atom) for atom in molecule.GetAtoms())


def fingerprint(molecule):
    """-> index (nnz,) uint16 in 0 ... N_FEATURES - 1, sorted, and count (nnz,) uint8, at least 1.

    First ECFP4 (Morgan, radius 2) as bits, then Morgan counts; tables.Molecules makes log1p of these."""
    bits = np.array(_ecfp.GetFingerprint(molecule).GetOnBits(), np.uint16)
    counts = sorted(_counts.GetCountFingerprint(molecule).GetNonzeroElements().items())
    index, count = np.array(counts, np.int64).reshape(-1, 2).T
    return (np.concatenate([bits, (index + ECFP_BITS).astype(np.uint16)]),
            np.concatenate([np.ones(len(bits), np.uint8), count.clip(max=255).astype(np.uint8)]))


def _place(value, choices):
    return choices.index(value) if value in choices else len(choices)


def graph(molecule):
    """-> atoms (A, 7) uint8, categories as ATOM_SIZES counts them, and bonds (E, 4) uint8: begin, end, type, in a ring.

    Hydrogens are counted on their atoms unless they are written as atoms. E may be 0."""
    rings = molecule.GetRingInfo()
    atoms = [[_place(atom.GetSymbol(), ELEMENTS), min(atom.GetDegree(), 6), min(max(atom.GetFormalCharge(), -2), 2) + 2,
              min(atom.GetTotalNumHs(), 4), _place(atom.GetHybridization(), HYBRIDISATIONS), int(atom.GetIsAromatic()),
              min(max(rings.MinAtomRingSize(atom.GetIdx()) - 2, 0), 5)] for atom in molecule.GetAtoms()]
    bonds = [[bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), min(_place(bond.GetBondType(), BOND_TYPES), 3),
              int(bond.IsInRing())] for bond in molecule.GetBonds()]
    return np.array(atoms, np.uint8), np.array(bonds, np.uint8).reshape(-1, 4)


def fragments(molecule, limit=128):
    """-> kind (F,) uint8 and member (F, A) bool: sets of atoms that a few broken bonds leave together, each set once.

    Kind 0 is the whole molecule; 1 a side of an acyclic bond; 2 a side of two bonds of one ring (of 8 atoms at most);
    3 what a set of kind 1 shares with another one. The first `limit`, in this order. Hydrogens go with their atoms."""
    n, bonds = molecule.GetNumAtoms(), [(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in molecule.GetBonds()]
    near, whole = [0] * n, (1 << n) - 1             # sets of atoms are the bits of an int
    for i, j in bonds:
        near[i] |= 1 << j
        near[j] |= 1 << i

    def reach(start, inside):
        found = front = start
        while front:
            step = 0
            while front:
                low = front & -front
                step |= near[low.bit_length() - 1]
                front ^= low
            front = step & inside & ~found
            found |= front
        return found

    rings = molecule.GetRingInfo()
    sides = []
    for index, (i, j) in enumerate(bonds):
        if not rings.NumBondRings(index):
            near[i] ^= 1 << j                       # the bond breaks, seen from i
            side = reach(1 << i, whole & ~(1 << j))
            near[i] ^= 1 << j
            sides += [side, whole & ~side]
    acyclic = len(sides)
    for ring in rings.AtomRings():
        if len(ring) > 8:
            continue
        ring_set, hanging = sum(1 << i for i in ring), []
        left = whole & ~ring_set
        while left:
            part = reach(left & -left, left)
            left &= ~part
            touched = sum(1 << i for i in ring if near[i] & part)
            hanging.append((part, touched))
        beside = zip(ring[-1:] + ring, ring, ring[1:] + ring[:1])
        links = [near[i] & ring_set & ~(1 << a | 1 << b) for a, i, b in beside]         # bonds across the ring
        for start in range(len(ring)):
            for size in range(1, len(ring) - start):
                arc = sum(1 << i for i in ring[start:start + size])
                crossing = any(touched & arc and touched & ~arc for _, touched in hanging)
                if not crossing and not any(links[k] & ~arc for k in range(start, start + size)):
                    side = arc | sum(part for part, touched in hanging if touched & arc)
                    sides += [side, whole & ~side]
    kinds = {whole: 0}
    for place, side in enumerate(sides):
        kinds.setdefault(side, 1 if place < acyclic else 2)
    for first in range(acyclic):
        for side in sides[first + 1:]:
            if len(kinds) >= limit:
                break
            if sides[first] & side:
                kinds.setdefault(sides[first] & side, 3)
    kinds = dict(list(kinds.items())[:limit])
    width = (n + 7) // 8
    packed = np.frombuffer(b"".join(atoms.to_bytes(width, "little") for atoms in kinds), np.uint8).reshape(-1, width)
    return np.array([*kinds.values()], np.uint8), np.unpackbits(packed, axis=1, bitorder="little")[:, :n].astype(bool)


def featurise(molecule, with_graph=True):
    """-> dict of the arrays of one molecule, as the functions above give them; join() puts those of many together.

    Without its graph: what a student reads, in half of the time. Raises ValueError over 255 atoms. Which fragments
    stand within the limit depends on the order of the atoms: featurise what canonical SMILES say."""
    if molecule.GetNumAtoms() > 255:
        raise ValueError("more than 255 atoms")     # a byte names each
    (fp_index, fp_count), (kind, member) = fingerprint(molecule), fragments(molecule)
    masses = np.array([mass_number(atom) for atom in molecule.GetAtoms()])
    arrays = {"mass": masses.sum(keepdims=True).astype(np.int16), "fp_index": fp_index, "fp_count": fp_count,
              "fragment_kind": kind, "fragment_mass": (member @ masses).astype(np.int16)}
    if with_graph:
        atoms, bonds = graph(molecule)
        broken = member[:, bonds[:, 0]] ^ member[:, bonds[:, 1]]        # (F, E)
        arrays |= {"atoms": atoms, "bonds": bonds, "fragment_size": member.sum(1).astype(np.uint8),
                   "fragment_atoms": np.nonzero(member)[1].astype(np.uint8),
                   "fragment_broken": broken.sum(1).astype(np.uint8),
                   "broken_bonds": np.nonzero(broken)[1].astype(np.uint16)}
    return arrays


def recipe():
    """What becomes of one molecule, as a hash: arrays made by another version of this file are noticed by it."""
    arrays = featurise(read_smiles("CC(=O)Nc1ccc(C#N)c(Br)c1C1CCCN1"))
    return hashlib.sha1(b"".join(name.encode() + array.tobytes() for name, array in arrays.items())).hexdigest()[:12]


OFFSETS = {"fp": "fp_index", "atom": "atoms", "bond": "bonds", "fragment": "fragment_kind", "member": "fragment_atoms",
           "broken": "broken_bonds"}


def join(molecules):
    """A list of featurise()'s answers -> dict of arrays back to back, each with its *_offsets (n + 1,) int64."""
    arrays = {name: np.concatenate([one[name] for one in molecules]) for name in molecules[0]}
    return arrays | {f"{name}_offsets": np.cumsum([0, *(len(one[of]) for one in molecules)])
                     for name, of in OFFSETS.items() if of in arrays}


def block1_of(smiles):
    """SMILES -> first block of its InChIKey, formula and bonds; empty if there is none."""
    return Chem.MolToInchiKey(read_smiles(smiles))[:14]


def split_of(block1):
    """First block of an InChIKey -> train, val or test (80, 10, 10 %), the same everywhere: spectra of one molecule,
    stereoisomers too, stay together."""
    share = int(hashlib.sha1(block1.encode()).hexdigest()[:8], 16) % 100
    return "train" if share < 80 else "val" if share < 90 else "test"
