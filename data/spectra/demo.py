"""The demo library: made-up small molecules and a rule that breaks them, written as MSP text and read like any other.

A molecule is a core (a ring, or a carbon with two or three arms) with tails of carbon runs, links and an end group.

The rule is a caricature of electron ionisation, not physics. An ion is a set of heavy atoms with their hydrogens, and
hydrogens more or less (shift). It starts as the whole molecule with abundance 1. An ion keeps K / (K + sum of the rates
of its channels) of what reaches it and passes the rest on in proportion to the rates, until less than FAINT arrives.
* K is 1 for the molecule and 9 for its fragments, + 12 per aromatic ring and 3 per other ring that is whole in it.
* Channel cleavage, of each acyclic single bond: bond_rate() says how fast, and either side keeps the charge in
  proportion to stability() * bulk() of what this ion has of it; SHIFTS gives its hydrogen shift, of -3 to 2 in all.
* Channel McLafferty, of the acyclic C-C bond next but one to a C=O, if its far end has a carbon with a hydrogen: the
  carbonyl's side gains it and keeps the charge.
* Channel loss, LOSSES: H2O from alcohols, HX from halides, HCN from nitriles and pyridine-like rings, CO from phenols
  and ring ketones, C2H2 from aromatic rings, C2H4 from saturated rings (opposite a double bond, retro-Diels-Alder, six
  times as fast), H beside N or an aromatic ring; and H2 from ions that are all alkyl.
What an ion keeps shows at its nominal mass and up to 4 above it, by the isotopes 13C, 33S, 34S, 37Cl and 81Br.

A record adds noise: each peak times exp(normal * sd), a trace of air and water, nothing below 1 % of the base peak. A
second record of a molecule has more of it, and lacks some small peaks."""
import functools
import heapq
import math
import random
from collections import defaultdict

from rdkit import Chem, rdBase

from data.spectra.features import nominal_mass

DEMO_ROWS = 2500                                   # molecules
DEMO_RECIPE = 1                                    # raised when another library comes out: prepare.py rebuilds old sets
LIGHTEST, HEAVIEST = 60, 350                       # Da, nominal
REPLICATES = 0.15                                  # share of the molecules that have a second record
NOISE, REPLICATE_NOISE = 0.1, 0.3                  # sd of the logarithm of an intensity
SMALL, SMALL_LOST = 0.05, 0.3                      # peaks of a second record below that are lost with that probability
CUT = 0.01                                         # of the base peak
FAINT = 0.01                                       # of the molecular ion: breaks no further
TRACE = 2e-4                                       # a channel that carries less is left out
AIR = (18, 28, 32, 44)                             # m/z

# (_) is a place for a tail, or for nothing
CORES = ("C(_)(_)", "C(_)(_)(_)", "c1(_)c(_)cc(_)cc1", "c1(_)ccc(_)cc1", "C1(_)CCC(_)CC1", "n1c(_)ccc(_)c1",
         "C1(_)C(_)CCC1", "O=C1C(_)CCC(_)C1", "N1(_)CCC(_)CC1", "s1c(_)ccc1(_)", "o1c(_)ccc1(_)", "C1(_)=CCC(_)CC1",
         "c1(_)ccc2cc(_)ccc2c1", "O1C(_)CCC1", "N1(_)CCOCC1", "c1(_)ncc(_)cn1", "O=C1C(_)CCC1", "n1(_)cc(_)cc1",
         "C1(_)CCC2CC(_)CCC2C1", "c1(_)ccc2nc(_)ccc2c1", "n1(_)cc(_)nc1", "O=C1OC(_)CCC1", "c1(_)ccc2CC(_)CCc2c1")
RUNS = ("C", "CC", "", "CCC", "CCCC", "C(C)", "CC(C)", "CCCCCC", "C(C)(C)", "C(CC)")
LINKS = ("O", "C(=O)", "C(=O)O", "N", "OC(=O)", "S", "C=C", "C(=O)N", "N(C)", "NC(=O)")
ENDS = ("C", "O", "Cl", "OC", "N", "Br", "C(C)C", "C(C)=O", "C#N", "c5ccccc5", "F", "N(C)C", "C(=O)OC", "C(C)(C)C",
        "C(=O)O", "SC", "C=C", "C5CCCCC5", "C(F)(F)F", "I", "NC(C)=O", "C5CC5", "c5ccncc5", "c5ccc(Cl)cc5", "S")
UNLIKELY = [Chem.MolFromSmarts(text) for text in (
    "[N,O,S,F,Cl,Br,I]~[N,O,S,F,Cl,Br,I]", "[N,O,S,Cl,Br,I]-[CX4]-[N,O,S,F,Cl,Br,I]", "C(=O)[F,Cl,Br,I]",
    "[N,O,S,F,Cl,Br,I]C=[C,N]", "[OH]C(=O)[N,O,S]", "C(=O)C=O", "[N,O,S]C(=O)[O,S]", "n-[N,O,S,F,Cl,Br,I]")]


# ------------------------------------------------------------------------------------------------------------ molecules
def ranked(rng, choices):
    """The first choices are the most frequent ones, as 1 / (rank + 3)."""
    return rng.choices(choices, [1 / (rank + 3) for rank in range(len(choices))])[0]


def draw_smiles(rng):
    pieces = ranked(rng, CORES).split("(_)")
    arms = rng.sample(range(len(pieces) - 1), min(len(pieces) - 1, rng.choice((1, 2, 2, 3))))
    for place in arms:
        links = "".join(ranked(rng, RUNS) + ranked(rng, LINKS) for _ in range(rng.choice((0, 0, 1, 1, 2))))
        pieces[place] += f"({links}{ranked(rng, RUNS)}{ranked(rng, ENDS)})"
    return "".join(pieces)


def draw_molecules(n, rng):
    """-> list of n molecules of LIGHTEST to HEAVIEST Da; no two have the same first block of the InChIKey."""
    found = {}
    with rdBase.BlockLogs():                        # some drafts are no molecules
        while len(found) < n:
            molecule = Chem.MolFromSmiles(draw_smiles(rng))
            if (molecule and LIGHTEST <= nominal_mass(molecule) <= HEAVIEST
                    and not any(map(molecule.HasSubstructMatch, UNLIKELY))):
                found.setdefault(Chem.MolToInchiKey(molecule)[:14], molecule)
    return list(found.values())


# ------------------------------------------------------------------------------------------------------------- the rule
BOND_RATES = {"CC": 1, "CN": 1, "CO": 1.5, "CS": 2, "CF": 0.2, "CCl": 4, "BrC": 10, "CI": 20}
ALPHA = {"N": 10, "S": 5, "O": 4}                  # added to the rate of a bond whose carbon bears such an atom
BESIDE = {"N": 12, "S": 6, "O": 5}                 # a cation's stability is so many times that of a hydrocarbon
BARE = {"N": 0.5, "S": 0.3, "O": 0.1}              # stability where the charge is on that atom itself; halogens 0.05
SHIFTS = {"carbon": ((-1, 0.12), (0, 0.8), (1, 0.08)),             # of C-C bonds
          "from hetero": ((-1, 0.35), (0, 0.6), (1, 0.05)),        # of the carbon side of other bonds
          "hetero": ((-1, 0.05), (0, 0.5), (1, 0.45))}             # of the other side
ISOTOPES = {"C": (1, 0.0108), "S": (1, 0.0079, 0.0447), "Cl": (1, 0, 0.32), "Br": (1, 0, 0.973)}    # by mass above


def doubly_bonded(atom, symbol):
    """Is a C=symbol carbon, outside of aromatic rings."""
    return atom.GetSymbol() == "C" and any(
        bond.GetBondTypeAsDouble() == 2 and bond.GetOtherAtom(atom).GetSymbol() == symbol for bond in atom.GetBonds())


def bond_rate(one, other):
    """How fast the single bond between two atoms breaks.

    BOND_RATES by element; at either end + 6 for C=O, + ALPHA for a carbon that bears N, S or O, + 8 for a benzylic and
    + 4 for an allylic one, + 0.7 per branch. * 0.15 at each aromatic atom, * 0.4 for the loss of a methyl group."""
    rate = BOND_RATES.get("".join(sorted((one.GetSymbol(), other.GetSymbol()))), 1)
    for atom, beyond in ((one, other), (other, one)):
        if atom.GetSymbol() != "C" or atom.GetIsAromatic():
            continue
        near = [neighbour for neighbour in atom.GetNeighbors() if neighbour.GetIdx() != beyond.GetIdx()]
        if doubly_bonded(atom, "O"):
            rate += 6
        else:
            rate += max([ALPHA.get(neighbour.GetSymbol(), 0) for neighbour in near], default=0)
        rate += 8 * any(neighbour.GetIsAromatic() for neighbour in near)
        rate += 4 * any(doubly_bonded(neighbour, "C") for neighbour in near) + 0.7 * max(len(near) - 1, 0)
    for atom in (one, other):
        methyl = atom.GetSymbol() == "C" and atom.GetDegree() == 1
        rate *= (0.15 if atom.GetIsAromatic() else 1) * (0.4 if methyl else 1)
    return rate


def stability(atom, beyond):
    """Of the cation at an atom once its bond to `beyond` is gone.

    For carbon 0.05, 0.5, 1, 2 with 0 to 3 carbons left, times the largest of: 12 beside N, 10 beside an aromatic atom,
    6 beside S, 5 beside O, 4 beside a double bond. 4 for C=O with a carbon left, 0.1 without; 1.5 for an aromatic
    carbon; BARE elsewhere."""
    if atom.GetSymbol() != "C":
        return BARE.get(atom.GetSymbol(), 0.05)
    near = [neighbour for neighbour in atom.GetNeighbors() if neighbour.GetIdx() != beyond.GetIdx()]
    carbons = sum(neighbour.GetSymbol() == "C" for neighbour in near)
    if atom.GetIsAromatic():
        return 1.5
    if doubly_bonded(atom, "O"):
        return 4 if carbons else 0.1
    best = max([max(BESIDE.get(neighbour.GetSymbol(), 1), 10 * neighbour.GetIsAromatic(),
                    4 * doubly_bonded(neighbour, "C")) for neighbour in near], default=1)
    return best * (0.05, 0.5, 1, 2)[carbons]


def bulk(side):
    """What the number of heavy atoms adds to a side's stability: a single one hardly ever keeps the charge."""
    return side.bit_count() ** 0.5 - 0.98


def bits(atoms):
    return sum({1 << atom for atom in atoms})


def side(atom, beyond):
    """Bits of the atoms on the atom's side of its acyclic bond to `beyond`."""
    seen, todo = {atom.GetIdx(), beyond.GetIdx()}, [atom]
    while todo:
        for neighbour in todo.pop().GetNeighbors():
            if neighbour.GetIdx() not in seen:
                seen.add(neighbour.GetIdx())
                todo.append(neighbour)
    return bits(seen - {beyond.GetIdx()})


def cleavages(molecule):
    """-> list of (both atoms of the bond, charged side, lost side, rate, stability of both sides, shifts), sets of
    atoms as bits; each bond stands there twice."""
    found = []
    for bond in molecule.GetBonds():
        if bond.IsInRing() or bond.GetBondTypeAsDouble() != 1:
            continue
        ends = bond.GetBeginAtom(), bond.GetEndAtom()
        both, rate = bits(atom.GetIdx() for atom in ends), bond_rate(*ends)
        sides, stable = ([function(*order) for order in (ends, ends[::-1])] for function in (side, stability))
        symbols = [atom.GetSymbol() for atom in ends]
        for i in (0, 1):
            kind = "hetero" if symbols[i] != "C" else "carbon" if symbols[1 - i] == "C" else "from hetero"
            found.append((both, sides[i], sides[1 - i], rate, stable[i], stable[1 - i], SHIFTS[kind]))
    for match in molecule.GetSubstructMatches(MCLAFFERTY, uniquify=False):
        alpha, beta = (molecule.GetAtomWithIdx(i) for i in match[2:4])
        found.append((bits(match), side(alpha, beta), side(beta, alpha), 6, 1, 0, ((1, 1),)))
    return found


MCLAFFERTY = Chem.MolFromSmarts("O=C[CX4]-;!@[CX4]~[#6;!H0]")
LOSSES = [(Chem.MolFromSmarts(text), lost, shift, rate) for text, lost, shift, rate in (
    ("[OH][CX4][#6;!H0]", 1, -1, 8), ("F[CX4][#6;!H0]", 1, -1, 3), ("Cl[CX4][#6;!H0]", 1, -1, 5),
    ("Br[CX4][#6;!H0]", 1, -1, 3), ("I[CX4][#6;!H0]", 1, -1, 2), ("N#C[#6;!H0]", 2, -1, 1.5), ("[nX2][cH]", 2, 0, 1.5),
    ("[OH]c", 2, 1, 1), ("O=[C;R]", 2, 0, 1.5), ("[cH][cH]", 2, 0, 0.5), ("[CH2;R]@[CH2;R]", 2, 0, 0.7),
    ("[CH2;R]1@[CH2;R]@[C;R]@[C;R]=[C;R]@[C;R]1", 2, 0, 3.5), ("[CX4;!H0;$(Cc),$(CN)]", 0, -1, 1))]


def losses(molecule):
    """-> list of (atoms lost, none if it is a hydrogen; all atoms that must be there; hydrogen shift; rate), as bits.

    The first `lost` atoms of a LOSSES pattern go; its rate is shared by the places where it fits."""
    found = []
    for pattern, lost, shift, rate in LOSSES:
        places = {(bits(match[:lost]), bits(match))
                  for match in molecule.GetSubstructMatches(pattern, uniquify=False)}
        found += [(gone, whole, shift, rate / len(places)) for gone, whole in sorted(places)]
    return found


@functools.cache
def isotopes(*counts):
    """Numbers of C, S, Cl and Br atoms -> shares of the ions at 0 ... 4 above the nominal mass, which sum to 1."""
    pattern = [1.0, 0, 0, 0, 0]
    for shares, count in zip(ISOTOPES.values(), counts):
        for _ in range(count):
            pattern = [sum(share * pattern[i - j] for j, share in enumerate(shares) if i >= j) for i in range(5)]
    return [share / sum(pattern) for share in pattern]


def fragment(molecule):
    """RDKit molecule -> {m/z: intensity}: nominal masses, the rule's own intensities with base peak 1, no noise."""
    atoms, table = list(molecule.GetAtoms()), Chem.GetPeriodicTable()
    heavy = [table.GetMostCommonIsotope(atom.GetAtomicNum()) for atom in atoms]
    hydrogens = [atom.GetTotalNumHs() for atom in atoms]
    elements = [bits(atom.GetIdx() for atom in atoms if atom.GetSymbol() == symbol) for symbol in ISOTOPES]
    not_alkyl = bits(atom.GetIdx() for atom in atoms if atom.IsInRing() or atom.GetSymbol() != "C")
    rings = [(bits(ring), 12 if all(atoms[i].GetIsAromatic() for i in ring) else 3)
             for ring in molecule.GetRingInfo().AtomRings()]
    cuts, lost, whole = cleavages(molecule), losses(molecule), (1 << len(atoms)) - 1

    @functools.cache
    def weigh(ion):
        """-> nominal mass of a set of atoms, its hydrogens, its isotopes."""
        inside = [i for i in range(len(atoms)) if ion >> i & 1]
        hydrogen = sum([hydrogens[i] for i in inside])
        pattern = isotopes(*[(ion & element).bit_count() for element in elements])
        return sum([heavy[i] for i in inside]) + hydrogen, hydrogen, pattern

    def channels(ion, shift):
        """-> K, list of (ion that is left, hydrogen shift, rate)."""
        found = []
        for both, charged, gone, rate, stable, rival, shifts in cuts:
            if both & ion == both:
                one, other = stable * bulk(charged & ion), rival * bulk(gone & ion)
                found += [(charged & ion, step, rate * share * one / (one + other)) for step, share in shifts]
        # a hydrogen alone, or two, leave only an ion that lacks none
        found += [(ion & ~gone, step, rate) for gone, needed, step, rate in lost
                  if needed & ion == needed and ion != gone and (gone or shift >= 0)]
        if shift >= 0 and not ion & not_alkyl and ion & (ion - 1):
            found.append((ion, -2, 1.5))
        return (1 if ion == whole else 9) + sum(worth for ring, worth in rings if ring & ion == ring), found

    peaks, waiting, queue = defaultdict(float), {(whole, 0): 1.0}, [(-weigh(whole)[0], whole, 0)]
    while queue:                                    # the heaviest first: all that can reach it has
        mass, ion, shift = heapq.heappop(queue)
        abundance = waiting.pop((ion, shift))
        K, found = channels(ion, shift) if abundance >= FAINT else (1, ())
        total = K + sum(rate for *_, rate in found)
        for i, share in enumerate(weigh(ion)[2]):
            peaks[i - mass] += abundance * K / total * share
        for left, step, rate in found:
            if (arrives := abundance * rate / total) >= TRACE:
                weight, hydrogen, _ = weigh(left)
                key = left, min(max(shift + step, -3, -hydrogen), 2)
                if key not in waiting:
                    heapq.heappush(queue, (-weight - key[1], *key))
                waiting[key] = waiting.get(key, 0) + arrives
    base = max(peaks.values())
    return {mass: peak / base for mass, peak in sorted(peaks.items()) if peak > 0}


# -------------------------------------------------------------------------------------------------------------- records
def observe(ideal, rng, sd, lost):
    """{m/z: intensity} -> list of (m/z, whole intensity, the largest 999): what one measurement shows of it.

    sd: of the logarithm; lost: the probability that a peak below SMALL of the base peak is missed."""
    seen = {mass: peak * math.exp(rng.gauss(0, sd)) for mass, peak in ideal.items()
            if peak >= SMALL or rng.random() >= lost}
    for mass in AIR:
        seen[mass] = seen.get(mass, 0) + rng.uniform(0, 0.025)
    base = max(seen.values())
    return [(mass, round(999 * peak / base)) for mass, peak in sorted(seen.items()) if peak >= CUT * base]


def write_demo(path, n=DEMO_ROWS, seed=0):
    """An MSP file of n molecules at path, one record each and a second one of REPLICATES of them; the same for the same
    n and seed."""
    rng, record = random.Random(f"{DEMO_RECIPE} {seed}"), 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for number, molecule in enumerate(draw_molecules(n, rng), 1):
            ideal = fragment(molecule)
            for sd, lost in [(NOISE, 0), (REPLICATE_NOISE, SMALL_LOST)][:1 + (rng.random() < REPLICATES)]:
                record += 1
                peaks = observe(ideal, rng, sd, lost)
                file.write(f"Name: demo molecule {number}\nSMILES: {Chem.MolToSmiles(molecule)}\nID: {record}\n"
                           f"MW: {nominal_mass(molecule)}\nNum Peaks: {len(peaks)}\n"
                           + "".join(f"{mass} {peak}\n" for mass, peak in peaks) + "\n")
