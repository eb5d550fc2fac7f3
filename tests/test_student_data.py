"""What train_student.py reads: fragments and molecules as tables, spectra, hidden bonds, batches, against loops. The
models are in test_student.py.
"""
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from test_student import ODD, close, data, folder, model_of, molecules_of, settings, with_teacher  # noqa: F401

import common
import train_student
from data.spectra import tables
from data.spectra.features import ECFP_BITS, OFFSETS, featurise, fragments, join, mass_number, nominal_mass, read_smiles
from data.spectra.tables import MASKED, Molecules, Ragged, read_folder, read_list, read_molecules
from train_student import RIVALS, Config, evaluate, get_batch, weigh

SHAPES = ("C", "[Xe]", "CC", "CCO", "CC(C)(C)C", "C=C", "C#N", "CCOC(C)=O", "NCC(=O)O", "C1CC1", "C1CCC1", "C1CCCCC1",
          "C1CCCCCC1", "C1CCCCCCC1", "C1CCCCCCCC1", "C1CCCCCCCCCCC1", "CC1CCCCCCCCC1", "c1ccccc1", "Cc1ccccc1",
          "Cc1ccncc1", "c1ccc2ccccc2c1", "c1ccc2cc3ccccc3cc2c1", "c1cc2ccc3cccc4ccc(c1)c2c34", "C1CC2CCC1C2",
          "C1CC2CCC1CC2", "CC1(C)C2CCC1(C)C(=O)C2", "C1C2CC3CC1CC(C2)C3", "C1CCC2(CC1)OCCO2", "C1CC12CC2",
          "C12C3C4C1C2C34", "C1CC2CCCCC2C1", "O=C1CCC2CCCCC12", "C1CCCCC1C1CCCC1", "Clc1ccc(Cl)cc1",
          "CN1CCC[C@H]1c1cccnc1", "C1=CC2C=CC1C2", "Cn1cnc2c1c(=O)n(C)c(=O)n2C", "CC(C)CCCC(C)CCO",
          "C1CCCCCCCCC1CC1CC1", "c1ccc(-c2ccccc2)cc1", "C12CC1C2", "OC12CCC(CC1)C2CBr")


# ------------------------------------------------------------------------------------------------------ fragments, join
def parts_of(n, bonds):
    """Connected parts by union-find -> set of frozensets."""
    parent = list(range(n))

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i
    for i, j in bonds:
        parent[root(i)] = root(j)
    return {frozenset(i for i in range(n) if root(i) == top) for top in map(root, range(n))}


def all_fragments(molecule):
    """Every bond and every pair of bonds of a ring broken, one after another -> dict from atoms to kind."""
    n, bonds = molecule.GetNumAtoms(), [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in molecule.GetBonds()]
    kinds, sides, rings = {frozenset(range(n)): 0}, [], []
    for bond in bonds:
        sides += [part for part in parts_of(n, set(bonds) - {bond}) if len(part) < n]
    for ring in molecule.GetRingInfo().BondRings():
        for pair in itertools.combinations(ring if len(ring) <= 8 else (), 2):
            left = [bond for i, bond in enumerate(bonds) if i not in pair]
            rings += [part for part in parts_of(n, left) if len(part) < n]
    for kind, found in (1, sides), (2, rings):
        for part in found:
            kinds.setdefault(part, kind)
    for one in set(sides):
        for other in {*sides, *rings}:
            if one & other:
                kinds.setdefault(one & other, 3)
    return kinds


@pytest.mark.parametrize("smiles", SHAPES)
def test_fragments_against_all_bonds_broken_one_after_another(smiles):
    molecule = read_smiles(smiles)
    kind, member = fragments(molecule, limit=10**6)
    wanted = all_fragments(molecule)
    found = {frozenset(np.flatnonzero(row).tolist()): int(k) for k, row in zip(kind, member)}
    assert found == wanted and len(found) == len(kind) and (np.diff(kind.astype(int)) >= 0).all()
    assert kind.dtype == np.uint8 and member.dtype == bool and member[0].all()
    for limit in (1, 2, 5, 20, 128):
        few, some = fragments(molecule, limit)
        np.testing.assert_array_equal(few, kind[:limit])
        np.testing.assert_array_equal(some, member[:limit])


@pytest.mark.parametrize("one, other", [("CC(=O)Oc1ccccc1C(=O)O", "O=C(O)c1ccccc1OC(C)=O"),
                                        ("Cn1cnc2c1c(=O)n(C)c(=O)n2C", "O=c1c2c(ncn2C)n(C)c(=O)n1C")])
def test_a_molecule_is_the_same_however_it_is_written(one, other, tmp_path):
    (tmp_path / "list.smi").write_text(f"{one}\n{other}\n")
    made, *_ = read_molecules(tmp_path / "list.smi")
    table = Molecules(join(made), 250).inputs(np.arange(2), False)["fragments"]
    assert torch.equal(*table)


def test_join_puts_molecules_back_to_back():
    made = [featurise(read_smiles(smiles)) for smiles in ODD]
    arrays = join(made)
    for name, of in OFFSETS.items():
        ends = arrays[f"{name}_offsets"]
        assert len(ends) == len(ODD) + 1 and ends[0] == 0 and ends[-1] == len(arrays[of])
        for one, begin, end in zip(made, ends, ends[1:]):
            np.testing.assert_array_equal(arrays[of][begin:end], one[of])
    for smiles, one in zip(ODD, made):
        molecule = read_smiles(smiles)
        kind, member = fragments(molecule)
        ends = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in molecule.GetBonds()]
        atoms = np.split(one["fragment_atoms"], np.cumsum(one["fragment_size"].astype(int)))[:-1]
        broken = np.split(one["broken_bonds"], np.cumsum(one["fragment_broken"].astype(int)))[:-1]
        assert len(kind) == len(atoms) == len(broken) == len(one["fragment_kind"])
        for inside, some, bonds in zip(member, atoms, broken):
            assert some.tolist() == np.flatnonzero(inside).tolist()
            assert bonds.tolist() == [k for k, (i, j) in enumerate(ends) if inside[i] != inside[j]]
        assert one["mass"] == nominal_mass(molecule)


def test_what_is_too_large_for_a_byte_is_refused_as_unreadable(tmp_path):
    path = tmp_path / "list.smi"
    path.write_text("\n".join(["C" * n for n in range(1, 25)] + ["C" * 255, "C" * 256, "C" * 257, ".".join("C" * 300)]))
    assert len(read_list(path).mass) == 25


def test_molecules_without_a_spectrum_are_rows_to_train_on(data, tmp_path):
    path, n, known = tmp_path / "list.smi", len(data.mass), data.smiles(3)
    path.write_text("\n".join(["OC1CC2CCC1C2 one", "nonsense", known, "C1C2CCC(C2)C1O", "[Xe]", "C" * 100, "C12CC1C2"]))
    more = data.with_more(str(path))
    new = [more.smiles(n + i) for i in range(3)]
    assert new == ["OC1CC2CCC1C2", "[Xe]", "C12CC1C2"] and more.molecules.n == n + 3 and len(more.mass) == n
    assert more.spectra["train"].tolist() == [*data.spectra["train"], *(len(data.molecule) + i for i in range(3))]
    assert more.molecule[-3:].tolist() == [n, n + 1, n + 2] and more.rows is data.rows
    assert all(more.spectra[name] is data.spectra[name] for name in ("val", "test"))
    found, own = more.molecules.inputs(np.array([2, n, n + 2, 5]), True), molecules_of(*new, bins=data.molecules.bins)
    here, there = data.molecules.inputs(np.array([2, 5]), True), own.inputs(np.array([0, 2]), True)
    for name in ("mass", "fragments"):
        assert torch.equal(found[name][[0, 3]], here[name]) and torch.equal(found[name][[1, 2]], there[name])
    assert torch.equal(found["atoms"][found["atom_owner"] == 1], there["atoms"][there["atom_owner"] == 0])
    assert (more.dense(np.array([len(data.molecule) + 1])) == 0).all() and torch.equal(more.measured(), data.measured())
    assert all(torch.equal(*pair) for pair in zip(map(torch.as_tensor, more.replicates()),
                                                  map(torch.as_tensor, data.replicates())))


def test_ragged_rows_against_a_loop():
    rng = np.random.default_rng(0)
    lengths = [3, 0, 2, 5, 0, 1]
    offsets, column = np.cumsum([0, *lengths]), rng.integers(99, size=11)
    table = Ragged(offsets, column, column.astype(np.float32) / 2)
    for rows in ([4, 3, 3, 0], [1], [5, 4, 2, 0, 1], []):
        owner, begin, values, halves = table.take(np.array(rows, int))
        wanted = [(k, column[i]) for k, row in enumerate(rows) for i in range(offsets[row], offsets[row + 1])]
        assert list(zip(owner.tolist(), values.tolist())) == wanted and (halves * 2 == values).all()
        assert begin.tolist() == [sum(lengths[row] for row in rows[:k]) for k in range(len(rows))]


def test_inputs_against_a_loop_over_molecules():
    molecules, rows, bins = molecules_of(*ODD, bins=100), [4, 0, 6, 4, 1, 3], 100
    batch = molecules.inputs(np.array(rows), True)
    light = molecules.inputs(np.array(rows), False)
    assert light.keys() == {"mass", "fp_index", "fp_value", "fp_begin", "fragments"}
    assert all(torch.equal(light[name], batch[name]) for name in light)
    begin, first_atom, first_bond, n_bonds, first_fragment = 0, 0, 0, batch["edges"].shape[1] // 2, 0
    for b, row in enumerate(rows):
        molecule, one = read_smiles(ODD[row]), featurise(read_smiles(ODD[row]))
        assert batch["mass"][b] == nominal_mass(molecule) and batch["fp_begin"][b] == begin
        size = len(one["fp_index"])
        assert batch["fp_index"][begin:begin + size].tolist() == one["fp_index"].tolist()
        logs = [1.0 if i < ECFP_BITS else math.log1p(c) for i, c in zip(one["fp_index"], one["fp_count"].tolist())]
        assert batch["fp_value"][begin:begin + size].tolist() == pytest.approx(logs, rel=1e-6)    # log1p: defect 8
        begin += size

        n, bonds = molecule.GetNumAtoms(), one["bonds"]
        assert batch["atoms"][first_atom:first_atom + n].tolist() == one["atoms"][:, :7].tolist()
        assert batch["atom_owner"][first_atom:first_atom + n].tolist() == [b] * n
        for k, (i, j, kind, ring) in enumerate(bonds.tolist(), first_bond):
            assert batch["edges"][:, k].tolist() == [i + first_atom, j + first_atom]
            assert batch["edges"][:, k + n_bonds].tolist() == [j + first_atom, i + first_atom]
            assert batch["edge_kind"][[k, k + n_bonds]].tolist() == [2 * kind + ring] * 2

        kind, member = fragments(molecule)
        mass = [sum(mass_number(molecule.GetAtomWithIdx(int(i))) for i in np.flatnonzero(inside)) for inside in member]
        here = slice(first_fragment, first_fragment + len(kind))
        assert batch["fragment_kind"][here].tolist() == kind.tolist() and batch["fragment_mass"][here].tolist() == mass
        assert (batch["fragment_owner"][here] == b).all() and mass[0] == nominal_mass(molecule)
        counts = np.zeros((3, bins))
        for k, m in zip(kind, mass):
            if k and m < bins:
                counts[k - 1, m] += 1
        close(batch["fragments"][b].double(), torch.from_numpy(np.log1p(counts)), 1e-6)
        for f, inside in enumerate(member, first_fragment):
            assert batch["members"][1][batch["members"][0] == f].tolist() == [
                i + first_atom for i in np.flatnonzero(inside)]
            assert batch["broken"][1][batch["broken"][0] == f].tolist() == [
                k for k, (i, j) in enumerate(bonds[:, :2].tolist(), first_bond) if inside[i] != inside[j]]
        first_atom, first_bond, first_fragment = first_atom + n, first_bond + len(bonds), first_fragment + len(kind)
    assert (begin, first_atom, first_bond) == (len(batch["fp_index"]), len(batch["atoms"]), n_bonds)


def test_spectra_bits_and_replicates_against_the_files(data, folder):
    bins, array = data.molecules.bins, {path.stem: np.load(path) for path in folder.glob("*.npy")}
    ends, rows = array["peak_offsets"], np.array([5, 0, 5, 17])
    dense = data.dense(rows)
    assert dense.dtype == torch.float32 and dense.shape == (4, bins) and (dense.amax(1) == 1).all()
    for row, spectrum in zip(rows, dense):
        wanted = torch.zeros(bins)
        for place, value in zip(*(array[name][ends[row]:ends[row + 1]] for name in ("peak_bin", "peak_value"))):
            wanted[int(place)] = float(value)
        assert torch.equal(spectrum, wanted)
    of = array["molecule"].tolist()
    assert torch.equal(data.measured(), data.dense(np.array([of.index(i) for i in range(len(data.mass))])))
    twice, second = data.replicates()
    assert twice.tolist() == [i for i in range(len(data.mass)) if of.count(i) > 1] and len(twice) > 3
    assert torch.equal(second, data.dense(np.array([of.index(i, of.index(i) + 1) for i in twice.tolist()])))
    for row, bits in zip((3, 8), data.bits(np.array([3, 8]))):
        on = [i for i in featurise(read_smiles(data.smiles(row)))["fp_index"].tolist() if i < ECFP_BITS]
        assert bits.shape == (ECFP_BITS,) and bits.nonzero()[:, 0].tolist() == on and bits.max() == 1
    for i, name in enumerate(("train", "val", "test")):
        assert data.rows[name].tolist() == np.flatnonzero(array["split"] == i).tolist()
        assert data.spectra[name].tolist() == [k for k, molecule in enumerate(of) if array["split"][molecule] == i]
    assert data.pool("pretrain") is data.rows and data.pool("teacher") is data.pool("student") is data.spectra


# --------------------------------------------------------------------------------------------- hidden bonds, batches
def test_hidden_bonds(data):
    molecules, n = data.molecules, len(data.mass)
    rows, total, hidden = np.random.default_rng(0).permutation(n), 0, 0
    whole = molecules.hide_bonds(rows, np.arange(n), np.random.default_rng(7))
    plain = molecules.inputs(rows, True)
    E = plain["edges"].shape[1] // 2
    asked = whole["asked"]
    assert whole["count"] == len(asked) == len(set(asked.tolist())) and asked.max() < E
    assert torch.equal(whole["kinds"], plain["edge_kind"][asked]) and whole["kinds"].max() < MASKED
    masked = torch.cat([asked, asked + E])
    assert sorted(masked.tolist()) == (whole["edge_kind"] == MASKED).nonzero()[:, 0].tolist()
    left = np.setdiff1d(np.arange(2 * E), masked)
    assert torch.equal(whole["edge_kind"][left], plain["edge_kind"][left])
    assert all(torch.equal(whole[name], plain[name]) for name in plain if name != "edge_kind")
    owner = plain["atom_owner"][plain["edges"][0, :E]]
    per_molecule = torch.bincount(owner[asked], minlength=n)
    assert (per_molecule >= 1).all() and 0.13 < len(asked) / E < 0.25
    for part in np.split(np.arange(n), [5, n // 2]):                    # of the ranks: alike hidden, one count
        some = molecules.hide_bonds(rows, part, np.random.default_rng(7))
        own = torch.isin(owner[asked], torch.from_numpy(part))
        assert some["count"] == whole["count"] and torch.equal(some["kinds"], whole["kinds"][own])
        total, hidden = total + len(some["asked"]), hidden + int((some["edge_kind"] == MASKED).sum())
    assert total == whole["count"] and hidden == 2 * total


def test_about_15_percent_of_the_bonds_of_large_molecules_are_hidden():
    molecules = molecules_of(*["C" * 200] * 20)
    batch = molecules.hide_bonds(np.arange(20), np.arange(20), np.random.default_rng(0))
    assert len(batch["asked"]) / (199 * 20) == pytest.approx(0.15, abs=0.02)


def test_a_list_of_molecules_has_every_tenth_for_validation(tmp_path):
    path = tmp_path / "list.smi"
    path.write_text("\n".join([*("C" * n + " name" for n in range(1, 26)), "", "nonsense", "[Xe]"]))
    data = read_list(path)
    assert data.rows["val"].tolist() == [0, 10, 20] and len(data.rows["train"]) == 23 and data.molecules.mass[25] == 132
    config = settings(phase="pretrain", batch_size=8)
    assert get_batch(data, "train", 0, config)["atoms"].shape[1] == 7 and evaluate(
        model_of("pretrain", 1), data, config)["loss"] > 0


@pytest.mark.parametrize("phase, taught", [("teacher", False), ("student", False), ("student", True)])
def test_one_batch_carries_all_that_a_step_needs(data, phase, taught):
    data = with_teacher(data) if taught else data
    config, Z, n = settings(phase=phase, batch_size=6, grad_accum=2), data.molecules.bins, len(data.rows["train"])
    batch = get_batch(data, "train", 2, config, 1)
    order = common.global_rows(len(data.spectra["train"]), 12, config.seed, 2)
    spectra_rows = data.spectra["train"][order[6:]]
    molecules = data.molecule[spectra_rows]
    plain = data.molecules.inputs(molecules, phase == "teacher")
    wanted = {"target", "count", "micro", "temperature", "rivals", "are_own"}
    assert batch.keys() == plain.keys() | wanted | ({"taught", "feature", "confidence"} if taught else set())
    assert ("atoms" in batch) == (phase == "teacher") and all(torch.equal(batch[name], plain[name]) for name in plain)
    assert torch.equal(batch["target"], data.dense(spectra_rows).sqrt()) and batch["target"].dtype == torch.float32
    assert (batch["count"], batch["micro"]) == (12, 1)
    assert batch["rivals"].shape == (n, Z) and n < RIVALS and batch["are_own"].dtype == torch.bool
    library = weigh(data.measured().sqrt())         # as compute_loss weighs what it compares them with
    close = dict(rtol=0, atol=1e-6)
    torch.testing.assert_close(batch["rivals"].sum(1).sort()[0], library[data.rows["train"]].sum(1).sort()[0],
                               rtol=1e-6, atol=0)
    for row, own in zip(molecules, batch["are_own"]):
        torch.testing.assert_close(batch["rivals"][own], library[row][None], **close)
    if taught:
        for name in ("taught", "feature", "confidence"):
            assert batch[name].dtype == torch.float32 and torch.equal(batch[name], data.taught[name][molecules].float())
    assert "rivals" not in get_batch(data, "train", 2, dataclasses.replace(config, rank_weight=0.0))


def test_a_library_without_replicates_has_none(data):
    first = [rows[np.isin(rows, data.first)] for rows in data.spectra.values()]
    molecule = data.molecule[np.sort(np.concatenate(first))]
    alone = dataclasses.replace(data, molecule=molecule, first=np.arange(len(data.first)))
    molecules, spectra = alone.replicates()
    assert len(molecules) == 0 and spectra.shape == (0, data.molecules.bins)
    assert data.dense(np.zeros(0, np.int64)).shape == (0, data.molecules.bins)


def rows_of(folder, phase, batch_size, grad_accum, step):
    data, config = read_folder(folder), settings(phase=phase, batch_size=batch_size, grad_accum=grad_accum)
    batches = [get_batch(data, "train", step, config, micro) for micro in range(grad_accum)]
    return [(batch["mass"], batch["fp_index"], batch.get("target"), batch.get("kinds"), batch["count"],
             batch.get("rivals")) for batch in batches]


@pytest.mark.parametrize("phase", ["pretrain", "student"])
def test_batches_are_a_function_of_seed_and_step_and_tile_the_global_batch(folder, data, pair, phase):
    whole, = rows_of(folder, phase, 12, 1, 5)
    torch.manual_seed(99), np.random.seed(99)
    shares = {"again": rows_of(folder, phase, 12, 1, 5), "micro": rows_of(folder, phase, 3, 4, 5),
              "ranks": sum(pair.run(rows_of, folder, phase, 6, 1, 5), []),
              "both": sum(pair.run(rows_of, folder, phase, 3, 2, 5), [])}
    for name, parts in shares.items():
        for k in range(4):
            if whole[k] is not None:
                assert torch.equal(torch.cat([part[k] for part in parts]), whole[k]), (name, k)
        assert all(part[4] == whole[4] for part in parts)
        assert whole[5] is None or all(torch.equal(part[5], whole[5]) for part in parts)
    assert not torch.equal(rows_of(folder, phase, 12, 1, 6)[0][0], whole[0])
    other = get_batch(data, "train", 5, settings(phase=phase, batch_size=12, seed=1))
    assert not torch.equal(other["mass"], whole[0])
    n = len(data.pool(phase)["train"])
    config = settings(phase=phase, batch_size=1, rank_weight=0.0)
    epoch = [get_batch(data, "train", step, config)["mass"] for step in range(n)]
    assert sorted(torch.cat(epoch).tolist()) == sorted(data.mass[
        data.rows["train"] if phase == "pretrain" else data.molecule[data.spectra["train"]]].tolist())


def test_the_temperature_falls_along_a_cosine(data):
    n = len(data.spectra["train"])
    for fields, length in (dict(max_steps=40), 40), (dict(max_steps=0, max_epochs=3), 3 * n / 8):
        config = settings(batch_size=8, rank_weight=0.0, **fields)
        for step in (0, 1, 7, int(length) // 2, int(length) - 1, int(length) + 1, 10 * int(length)):
            wanted = 1 + 3 * (1 + math.cos(math.pi * min(1, step / length))) / 2
            assert get_batch(data, "train", step, config)["temperature"] == pytest.approx(wanted, rel=1e-9)
    assert (Config.temperature, Config.temperature_end) == (4.0, 1.0)


def test_arrays_of_another_version_are_refused(folder, monkeypatch, capsys):
    monkeypatch.setattr(tables, "recipe", lambda: "another")
    with pytest.raises(SystemExit):
        train_student.load_data(train_student.Config(data_dir=str(folder)))
    assert "made by another version of data/spectra/features.py" in capsys.readouterr().err


def test_a_list_has_each_molecule_once_and_no_salts(tmp_path):
    path = tmp_path / "list.smi"
    path.write_text("\n".join(["OCC", "CCO ethanol", "CCN.Cl", *("C" * n for n in range(4, 30)), "C(CCC)"]))
    data = read_list(path)
    assert data.molecules.n == 27 and data.names[0] == ("", "OCC")
