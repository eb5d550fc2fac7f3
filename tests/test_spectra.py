"""data/spectra: what msp.py reads and refuses, where prepare.py finds structures, what it leaves out and why."""
import csv
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import AllChem, rdFingerprintGenerator

from data.spectra import features, prepare
from data.spectra.msp import MAX_LINE, Bad, Record, nominal, read_msp, read_peaks, to_bins, write_msp

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data" / "spectra" / "prepare.py"
SMILES = ["CCO", "CCN", "CCOC", "CCCO", "CCCN", "CCCC", "COCCO", "NCCO", "CNCCO", "c1ccccc1", "Cc1ccccc1", "c1ccncc1"]


def block(smiles="", peaks="15 100\n27 50", name="x", count=None, **fields):
    """One record as text; peaks is a str of lines."""
    fields = ({"SMILES": smiles} if smiles else {}) | fields
    n = len(peaks.splitlines()) if count is None else count
    fields = {"Name": name, **fields, "Num Peaks": n}
    return "".join(f"{key}: {value}\n" for key, value in fields.items()) + peaks + "\n\n"


def fillers(n=4):
    """Records of molecules of the train split, without IDs, so that a set can be built around what a test is about."""
    ethers = ["C" * k + "OCCOC" for k in range(1, 20)]
    train = [text for text in ethers if features.split_of(block1(text)) == "train"]
    return "".join(block(text, name="filler") for text in train[:n])


def block1(smiles):
    return Chem.MolToInchiKey(Chem.MolFromSmiles(smiles))[:14]


def read(tmp_path, content):
    path = tmp_path / "in.msp"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_msp(path))


def peaks_of(record):
    assert isinstance(record, Record), record
    assert record.mz.dtype == record.intensity.dtype == np.float64
    return list(zip(record.mz.tolist(), record.intensity.tolist()))


def load(folder):
    meta = json.loads((folder / "meta.json").read_text())
    arrays = {path.stem: np.load(path, allow_pickle=False) for path in folder.glob("*.npy")}
    tables = {name: list(csv.DictReader((folder / f"{name}.csv").open(newline="")))
              for name in ("molecules", "spectra")}
    rejected = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    ends = arrays["peak_offsets"]
    peaks = [dict(zip(arrays["peak_bin"][a:b].tolist(), arrays["peak_value"][a:b].tolist()))
             for a, b in zip(ends, ends[1:])]
    smiles = [row["smiles"] for row in tables["molecules"]]
    return SimpleNamespace(meta=meta, rejected=rejected, peaks=peaks, smiles=smiles,
                           of=[smiles[i] for i in arrays["molecule"]], **tables, **arrays)


def build(tmp_path, content, *flags, name="set"):
    path = tmp_path / f"{name}.msp"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return load(prepare.main(["--msp", str(path), "--name", name, "--out_dir", str(tmp_path / "out"), "--workers", "1",
                              *map(str, flags)]))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -------------------------------------------------------------------------------------------------------- reading peaks
@pytest.mark.parametrize("text, expected", [
    ("41 15", [(41, 15)]), ("41\t15", [(41, 15)]), ("41,15", [(41, 15)]), ("  41 , 15 ", [(41, 15)]),
    ("41 15; 42 100;", [(41, 15), (42, 100)]), ("41 15;42 100;43 7", [(41, 15), (42, 100), (43, 7)]),
    ("41,15; 42,100", [(41, 15), (42, 100)]), ("(41,15)(42,100)", [(41, 15), (42, 100)]),
    ("( 41 15) ( 42 100)", [(41, 15), (42, 100)]), ("41 15 42 100", [(41, 15), (42, 100)]),
    ('41 15 "C3H5+; 12 ppm"', [(41, 15)]), ('41 15 "a" ; 42 100 "b 1"', [(41, 15), (42, 100)]),
    ('41 15 "open 42 100', [(41, 15)]), ("41 15 C3H5", [(41, 15)]), ("41 15 # base peak", [(41, 15)]),
    ("41 15 0.5", [(41, 15)]), ("41 15 1 2 3", [(41, 15)]), ("41 15 2 isotopes", [(41, 15)]),
    ("41 15 (M+)", [(41, 15)]), ("41.0391 1.5e+03", [(41.0391, 1500)]), ("4.1E1 .5", [(41, 0.5)])])
def test_dialects_of_peaks(text, expected):
    assert read_peaks(text) == expected


@pytest.mark.parametrize("text", ["41", "abc", "41 x", "x 41", "4l 15", "41 15; 42", "41 15; 4x 20", "41;15", "1_0 5",
                                  "4.1.2 5"])
def test_what_is_no_line_of_peaks_raises(text):
    with pytest.raises(ValueError):
        read_peaks(text)


def test_records_in_every_shape(tmp_path):
    text = ("\n\nName: first: a\nSMILES: CCO\nsmiles: CCC\nnum peaks: 2\n41 10\n42 20\n\n\n\n"
            "NAME:second\nDB#: 5\nNumPeaks: 3\n41 10; 42 20;\n43 30\n"              # no blank line before the next
            "name : third\nNum Peaks: 1\n\n50 1\n\n"                                # a blank line before the peaks
            "Name: fourth\nNUM PEAKS: 2\n41 1\n\n42 2\n"                            # and one among them
            "Name: fifth\n41 10\n42 20")                                            # no Num Peaks, no end of line
    for content in (text, text.replace("\n", "\r\n"), "\ufeff" + text.lstrip("\n"), text.replace("\n\n", "\n \t\n")):
        records = read(tmp_path, content)
        assert [record.fields["name"] for record in records] == ["first: a", "second", "third", "fourth", "fifth"]
        assert [peaks_of(record) for record in records] == [
            [(41, 10), (42, 20)], [(41, 10), (42, 20), (43, 30)], [(50, 1)], [(41, 1), (42, 2)], [(41, 10), (42, 20)]]
        assert records[0].fields == {"name": "first: a", "smiles": "CCO", "num peaks": "2"}
        assert records[1].fields == {"name": "second", "db#": "5", "num peaks": "3"}
    assert [record.line for record in read(tmp_path, text)] == [3, 12, 17, 22, 27]
    assert [peaks_of(record) for record in read(tmp_path, gzip.compress(text.encode()))] == [
        peaks_of(record) for record in records]


@pytest.mark.parametrize("lines, reason, detail", [
    ("Num Peaks: 0", "no peaks", ""), ("MW: 46", "no peaks", ""), ("Num Peaks: 2", "no peaks", ""),
    ("Num Peaks: 3\n41 10\n42 20", "number of peaks differs from Num Peaks", "2, stated 3"),
    ("Num Peaks: 1\n41 10\n42 20", "number of peaks differs from Num Peaks", "2, stated 1"),
    ("Num Peaks: many\n41 10", "number of peaks differs from Num Peaks", "1, stated many"),
    ("Num Peaks: 2\n41 10\n42 -20", "negative or non-finite peak", "42 -20"),
    ("Num Peaks: 2\n-41 10\n42 20", "negative or non-finite peak", "-41 10"),
    ("Num Peaks: 2\n41 nan\n42 20", "negative or non-finite peak", "41 nan"),
    ("Num Peaks: 2\n41 10\nnan 20", "negative or non-finite peak", "nan 20"),
    ("Num Peaks: 2\n41 10\n42 1e999", "negative or non-finite peak", "42 inf"),
    ("Num Peaks: 2\n41 0\n42 0.0", "all intensities are zero", ""),
    ("Num Peaks: 2\n41 10\n42", "unreadable peak line", "line 7: '42'"),
    ("Num Peaks: 2\n41 10\nC3H5 20", "unreadable peak line", "line 7: 'C3H5 20'")])
def test_bad_blocks_say_why_and_leave_the_others_alone(tmp_path, lines, reason, detail):
    good = "Name: good\nNum Peaks: 1\n41 10\n"
    for end in ("\n\n", "\n"):
        found = read(tmp_path, good + "Name: bad\n" + lines + end + good)
        assert found[1] == Bad(4, reason, "bad", detail)
        assert len(found) == 3 and peaks_of(found[0]) == peaks_of(found[2]) == [(41, 10)]


def test_blocks_without_a_name(tmp_path):
    found = read(tmp_path, "SMILES: CCO\nNum Peaks: 1\n41 10\n\n" + block("C") + "MW: 5\n41 3\n\n" + block("CC"))
    assert [type(one) for one in found] == [Bad, Record, Bad, Record]
    assert found[0] == Bad(1, "block without a name", "SMILES: CCO") and found[2].line == 11
    # a block that is short of peaks must not take over the next one's fields
    found = read(tmp_path, "Name: a\nNum Peaks: 2\n41 10\n\nSMILES: CCO\nNum Peaks: 1\n41 10\n\n" + block("CC"))
    assert [one.reason for one in found[:2]] == ["number of peaks differs from Num Peaks", "block without a name"]
    assert found[2].fields["smiles"] == "CC"


def test_bytes_that_are_not_utf_8(tmp_path):
    first, second = read(tmp_path, b"Name: caf\xe9\nNum Peaks: 1\n41 1\n\nName: caf\xc3\xa9\nNum Peaks: 1\n41 1\n")
    assert first.fields["name"] == second.fields["name"] == "caf\u00e9"


def test_a_line_of_ten_megabytes_costs_no_memory(tmp_path):
    path = tmp_path / "in.msp"
    good = b"Name: good\nNum Peaks: 1\n41 10\n\n"
    with open(path, "wb") as file:
        file.write(good + b"Name: long\nNum Peaks: 1\n41 10 " + b"x" * 10_000_000 + b"\n\n" + good)
        file.write(b"Name: " + b"y" * 10_000_000 + b"\nNum Peaks: 1\n41 10\n\n" + good + b"z" * 10_000_000)
    tracemalloc.start()
    found = list(read_msp(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [type(one) for one in found] == [Record, Bad, Record, Bad, Record, Bad] and peak < 8_000_000
    assert found[1] == Bad(5, f"line over {MAX_LINE} bytes", "long", "line 7")
    assert found[3].reason == found[1].reason and found[3].text == "y" * 80
    assert found[5].reason == "block without a name" and len(found[5].text) == 80


@pytest.mark.parametrize("content, word", [
    (gzip.compress(block("CCO").encode() * 500)[:-20], "damaged"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs"),
    (b"Name: x\rNum Peaks: 1\r41 1\r", "carriage returns"), ("Name: x\n".encode("utf-16-le"), "NUL"),
    (b"", "no spectrum"), (b"smiles,mass\nCCO,46\n", "no spectrum")])
def test_files_that_are_no_library_end_in_one_line(tmp_path, refuse, content, word):
    path = tmp_path / "in.msp.gz"
    path.write_bytes(content)
    error = refuse("--msp", path, "--name", "set", "--workers", 1)
    assert word in error and "in.msp.gz" in error


# -------------------------------------------------------------------------------------------------------- writing, bins
def test_what_is_written_is_read_back(tmp_path):
    rng, file = np.random.default_rng(0), io.StringIO()
    spectra = [(rng.uniform(1, 500, 30).round(4), rng.uniform(0.01, 999, 30).round(2)), ([41, 42], [999.0, 1e-9]),
               ([0], [1e6])]
    for i, (mz, intensity) in enumerate(spectra):
        write_msp(file, {"Name": f"a: {i}\n", "SMILES": "C#N", "ID": i}, mz, intensity)
    assert "Name: a: 1\nSMILES: C#N\nID: 1\nNum Peaks: 2\n41 999\n42 0\n\n" in file.getvalue()
    found = read(tmp_path, file.getvalue())
    assert [record.fields["id"] for record in found] == ["0", "1", "2"] and found[0].fields["name"] == "a: 0"
    for record, (mz, intensity) in zip(found, spectra):
        np.testing.assert_array_equal(record.mz, mz)
        np.testing.assert_allclose(record.intensity, intensity, atol=0.005)
    np.testing.assert_array_equal(found[0].intensity, spectra[0][1])


@pytest.mark.parametrize("fields, mz, intensity", [
    ({"SMILES": "C"}, [1], [1]), ({"Name": "x"}, [1, 2], [1]), ({"Name": "x"}, [], []), ({"Name": "x"}, [1], [0]),
    ({"Name": "x"}, [1], [np.nan]), ({"Name": "x"}, [-1], [1]), ({"Name": "x"}, [1, 2], [-1, 1]),
    ({"Name": "x"}, [np.inf], [1]), ({"Name": "x", "Num Peaks": 1}, [1], [1]), ({"Name": "x", "a:b": 1}, [1], [1]),
    ({"Name": "x", "name": "y"}, [1], [1]), ({"Name": "x", "1": 1}, [1], [1])])
def test_what_could_not_be_read_back_is_not_written(fields, mz, intensity):
    file = io.StringIO()
    with pytest.raises(ValueError):
        write_msp(file, fields, mz, intensity)
    assert file.getvalue() == ""


def test_bins_against_a_loop():
    rng = np.random.default_rng(1)
    for bins in (1, 60, 501):
        for _ in range(20):
            mz, intensity = rng.uniform(0, 120, 80).round(1), rng.choice([0, 1, 2.5, 1e3, 7e-4], 80)
            mz[:5] = 0.5, 1.5, 2.5, bins - 0.5, bins - 0.51           # halves go up
            expected = {}
            for m, value in zip(mz, intensity):
                k = int(m + 0.5)
                if k < bins and value > 0:
                    expected[k] = expected.get(k, 0) + value
            index, value = to_bins(mz, intensity, bins)
            assert index.dtype == np.uint16 and value.dtype == np.float32
            assert index.tolist() == sorted(expected)
            if expected:
                top = max(expected.values())
                np.testing.assert_allclose(value, [expected[k] / top for k in sorted(expected)], rtol=1e-6)
                assert value.max() == 1


def test_bins_of_extreme_peaks():
    index, value = to_bins([41, 41.2, 42, 1e300], [1e308, 1e308, 1e308, 5], 501)
    assert index.tolist() == [41, 42] and value.tolist() == [1, 0.5]
    assert [part.tolist() for part in to_bins([41, 42], [1, 1e-60], 501)] == [[41], [1]]
    assert [len(part) for part in to_bins([600], [1], 501)] == [0, 0]
    assert [part.tolist() for part in to_bins([41, 600], [1e-300, 1e300], 501)] == [[41], [1]]    # cut, then scaled
    assert nominal([40.5, 41.5, 41.49]).tolist() == [41, 42, 41]


# ----------------------------------------------------------------------------------------------------------- structures
def mol_block(smiles, title=""):
    molecule = Chem.MolFromSmiles(smiles)
    AllChem.Compute2DCoords(molecule)
    molecule.SetProp("_Name", title)
    return Chem.MolToMolBlock(molecule)


def test_structures_in_the_block(tmp_path):
    text = (block("OCC", name="a") + block(InChI="InChI=1S/CH4/h1H4", name="b", peaks="16 1")
            + block("CCN", InChI="InChI=1S/CH4/h1H4", name="c") + block("N/A", InChI="InChI=1S/C3H8/c1-3-2/h3H2,1-2H3"))
    result = build(tmp_path, text + fillers())
    assert result.of[:4] == ["CCO", "C", "CCN", "CCC"]
    assert [row["name"] for row in result.spectra[:4]] == ["a", "b", "c", "x"]
    assert result.mass[:4].tolist() == [46, 16, 45, 44]


def test_structures_from_a_folder_in_any_case(tmp_path):
    folder = tmp_path / "mols"
    folder.mkdir()
    files = {"ID1.MOL": "CCO", "id2.mol": "CCN", "Id3.Mol": "CCC", "ID4.MOL": "CCCC", "ID6.MOL": "C"}
    for name, smiles in files.items():
        (folder / name).write_text(mol_block(smiles))
    (folder / "ID5.MOL").write_text("nothing\n")
    (folder / "notes.txt").write_text("")
    text = "".join(block(ID=i, name=f"n{i}") for i in (1, 2, "ID3", 5, 7)) + block("CCOC", ID=4) + block(name="none")
    result = build(tmp_path, text + fillers(), "--mol_dir", folder)
    assert result.of[:4] == ["CCO", "CCN", "CCC", "CCOC"]            # the block's own structure comes first
    assert [row["id"] for row in result.spectra[:4]] == ["1", "2", "3", "4"]
    assert [(row["reason"], row["text"], row["detail"]) for row in result.rejected] == [
        ("structure cannot be read", "n5", "mol block: RDKit cannot read the structure"),
        ("no structure", "n7", "none for ID 7"), ("no structure", "none", "no ID: to look it up by")]


@pytest.mark.parametrize("zipped", [False, True])
def test_structures_from_an_sdf(tmp_path, zipped):
    entries = [mol_block("CCO", "ID1"), mol_block("CCN", "2"),
               mol_block("CCC", "a name") + "> 25 <ID> (3)\n3\n\n> <X>\n9\n\n",
               mol_block("CCCC", "ID99") + ">  <id>\n4\n\n", mol_block("CC", "8"), mol_block("CCCl", "8"),
               mol_block("CS", "9"), mol_block("CS", "9"), mol_block("CCBr", "ID5").rstrip("\n")]
    content = "$$$$\n".join(entries).replace("\n", "\r\n").encode()  # and no $$$$ at the end
    path = tmp_path / "structures.sdf"
    path.write_bytes(gzip.compress(content) if zipped else content)
    text = "".join(block(ID=i) for i in (1, 2, 3, 4, 5, 8, 9, 99))
    result = build(tmp_path, text + fillers(), "--sdf", path)
    assert result.of[:6] == ["CCO", "CCN", "CCC", "CCCC", "CCBr", "CS"]
    assert [(row["reason"], row["detail"]) for row in result.rejected] == [
        ("no structure", "two for ID 8"), ("no structure", "none for ID 99")]
    assert result.meta["options"]["sdf"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("smiles", ["C1CC", "CC\u00e9", "CC O", "foo", "c1cccc1", "CC{}", "C(C)(C)(C)(C)C"])
def test_a_structure_that_cannot_be_read_never_becomes_another(tmp_path, smiles):
    folder = tmp_path / "mols"
    folder.mkdir()
    (folder / "ID1.MOL").write_text(mol_block("CCCCCC"))              # it is not looked up either
    result = build(tmp_path, block(smiles, name="bad", ID=1) + fillers(), "--mol_dir", folder)
    assert [row["reason"] for row in result.rejected] == ["structure cannot be read"] and len(result.spectra) == 4
    assert result.rejected[0]["detail"].startswith(smiles) and "bad" not in [row["name"] for row in result.spectra]
    assert not {"CC", "CCCCCC", "C"} & set(result.smiles) and result.meta["counts"]["kept"] == 4


def test_places_without_structures_end_in_one_line(tmp_path, refuse):
    path = tmp_path / "in.msp"
    path.write_text(block("CCO"))
    (tmp_path / "empty").mkdir()
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("ID1.MOL", "id1.mol"):
        (twice / name).write_text(mol_block("C"))
    start = ("--msp", path, "--name", "set")
    assert "no file such as ID1.MOL" in refuse(*start, "--mol_dir", tmp_path / "empty")
    assert "ID1.MOL" in refuse(*start, "--mol_dir", twice)
    assert "cannot be read" in refuse(*start, "--mol_dir", tmp_path / "no")
    assert "--sdf: there is no file" in refuse(*start, "--sdf", tmp_path / "no.sdf")
    (tmp_path / "a.sdf").write_text("\n\n\n$$$$\n")
    assert "no structure with an ID" in refuse(*start, "--sdf", tmp_path / "a.sdf")


# ------------------------------------------------------------------------------------------------------------- rejected
def test_every_reason_is_counted_and_listed_with_its_line(tmp_path):
    records = [
        (None, block("CCO", name="first", ID=1)), ("duplicate ID", block("CCCO", ID=1)),
        ("no structure", block(name="none")), ("structure cannot be read", block("C1CC")),
        ("several components", block("CCN.Cl")),
        ("heavier than max_mz", block("C" * 28 + "F")), ("more than 255 atoms", block("C" * 256)),
        ("no InChIKey", block("C*")),
        ("ion current above the molecule's mass", block("CCC", "44 90\n50 10")), (None, block("CCC", "44 990\n50 10")),
        ("duplicate spectrum", block("OCC", "15.2 200\n27 60\n27.1 40", ID=2)),
        (None, block("OCC", "15 100\n27 51", ID=3)),
        ("no peaks up to max_mz", block("O" + "C" * 27, "401 1")), ("no peaks", block("CCCC", "", count=0)),
        ("another mass than the first structure of the molecule", block("[2H]CCO", "15 9")),
        ("negative or non-finite peak", block("CCCC", "15 -1")), ("all intensities are zero", block("CCCC", "15 0")),
        ("unreadable peak line", block("CCCC", "15 x")),
        ("number of peaks differs from Num Peaks", block("CCCC", count=5))]
    result = build(tmp_path, "".join(text for _, text in records) + fillers(), "--max_mz", "400")
    line, expected = 1, {}
    for reason, text in records:
        if reason:
            expected[line] = reason
        line += text.count("\n")
    assert {row["line"]: row["reason"] for row in result.rejected} == expected
    assert [row["line"] for row in result.rejected] == sorted(expected)
    assert result.meta["counts"]["rejected"] == {reason: 1 for reason in sorted(expected.values())}
    counts = result.meta["counts"]
    assert counts["read"] == len(records) + 4
    assert counts["kept"] == len(result.spectra) == counts["read"] - len(expected)
    by_reason = {row["reason"]: row for row in result.rejected}
    assert by_reason["duplicate spectrum"]["detail"] == "first on line 1"
    assert by_reason["duplicate ID"]["detail"] == "1, first on line 1"
    assert by_reason["heavier than max_mz"]["detail"] == "412" and by_reason["no structure"]["text"] == "none"
    assert by_reason["ion current above the molecule's mass"]["detail"] == "10.0% above 49, M is 44"


def test_the_mass_limit_is_inclusive(tmp_path):
    result = build(tmp_path, block("C" * 20, "15 1\n282 2\n283 9") + block("C" * 21) + fillers(), "--max_mz", "282")
    assert result.meta["bins"] == 283 and result.of[0] == "C" * 20 and result.peaks[0] == {15: 0.5, 282: 1.0}
    assert [row["reason"] for row in result.rejected] == ["heavier than max_mz"]


def test_isotopes_above_the_mass_are_the_molecules_own(tmp_path):
    pattern = "282 51\n284 100\n286 80\n288 35\n290 8"               # of six chlorine atoms
    chlorinated = "Clc1c(Cl)c(Cl)c(Cl)c(Cl)c1Cl"
    result = build(tmp_path, block(chlorinated, pattern) + block("C" * 20, pattern) + fillers())
    assert result.of[0] == chlorinated and result.mass[0] == 282 and sorted(result.peaks[0]) == [*range(282, 291, 2)]
    assert [row["reason"] for row in result.rejected] == ["ion current above the molecule's mass"]
    spans = {"C": 0, "H": 0, "N": 0, "O": 0, "F": 0, "Si": 2, "S": 2, "Cl": 2, "Br": 2, "Se": 2, "Sn": 4, "I": 0}
    table = Chem.GetPeriodicTable()
    assert {name: prepare.isotope_span(table.GetAtomicNumber(name)) for name in spans} == spans


def test_notes_count_what_does_not_fit_but_is_kept(tmp_path):
    text = (block("CCO", MW=46, InChIKey=Chem.MolToInchiKey(Chem.MolFromSmiles("CCO"))) + block("CCN", MW=46, name="y")
            + block("CCC", InChIKey="LFQSCWFLJHTTHZ-UHFFFAOYSA-N")
            + block("C[C@H](N)C(=O)O", InChIKey="QNAYBMKLOCPYGJ-UHFFFAOYSA-N")       # without stereo: no note
            + block("CCCC", MW="n/a", InChIKey="N/A", License="CC0"))
    result = build(tmp_path, text + fillers())
    assert result.meta["counts"]["notes"] == {"InChIKey differs from that of the structure": 1,
                                              "MW differs from the nominal mass": 1}
    assert not result.rejected and result.meta["licenses"] == {"CC0": 1}


# ---------------------------------------------------------------------------------------------------- splits and arrays
def test_no_molecule_is_in_two_splits(tmp_path):
    stereo = ["C[C@H](N)C(=O)O", "C[C@@H](N)C(=O)O", "CC(N)C(=O)O", "C/C=C/C", "C/C=C\\C", "CC=CC"]
    molecules = stereo + SMILES + ["C" * n + "O" for n in range(5, 30)]
    text = "".join(block(smiles, f"15 100\n27 {k}") for k, smiles in enumerate(molecules * 3, 1))
    result = build(tmp_path, text)
    splits = {}
    for smiles, molecule in zip(molecules * 3, result.molecule, strict=True):
        assert result.molecules[molecule]["block1"] == block1(smiles)
        splits.setdefault(block1(smiles), set()).add(result.meta["splits"][result.split[molecule]])
    assert len(splits) == len(result.molecules) == len(molecules) - 4
    for key, found in splits.items():
        share = int(hashlib.sha1(key.encode()).hexdigest()[:8], 16) % 100
        assert found == {"train" if share < 80 else "val" if share < 90 else "test"}
    assert set.union(*splits.values()) == {"train", "val", "test"}
    assert result.molecule[:6].tolist() == [0, 0, 0, 1, 1, 1]
    # the first structure speaks for the molecule
    assert result.smiles[:2] == [Chem.CanonSmiles(stereo[0]), Chem.CanonSmiles(stereo[3])]


def test_an_empty_val_is_cut_from_train_by_hash(tmp_path, capsys):
    train = [text for text in ["C" * n + "N" for n in range(1, 40)] if features.split_of(block1(text)) == "train"]
    assert len(train) >= 25
    result = build(tmp_path, "".join(map(block, train[:25])), "--max_mz", 1000)
    assert "val was empty: 2 train molecules" in capsys.readouterr().out
    chosen = {text for text, split in zip(result.smiles, result.split) if split == 1}
    lowest = sorted(train[:25], key=lambda text: hashlib.sha1(block1(text).encode()).hexdigest())[:2]
    assert chosen == set(lowest) and result.meta["counts"]["by_split"] == {"train": 23, "val": 2, "test": 0}
    tiny = build(tmp_path, "".join(map(block, train[:2])), name="tiny")
    assert tiny.meta["counts"]["by_split"] == {"train": 1, "val": 1, "test": 0}


def test_nothing_left_for_train_says_why(tmp_path, refuse):
    path = tmp_path / "in.msp"
    train = next(text for text in SMILES if features.split_of(block1(text)) == "train")
    for text in (block("C1CC") * 2 + block("CC.C"), block(train) + block("C1CC") * 2):
        path.write_text(text)
        error = refuse("--msp", path, "--name", "set", "--workers", 1)
        assert "left for training" in error and "structure cannot be read 2" in error


def test_arrays_describe_the_molecules_and_spectra(tmp_path):
    smiles = ["C", "[Xe]", "CCO", "c1ccncc1Br", "O=S(=O)(O)c1ccc(C#N)cc1", "CCO", "[Na+]"]
    spectra = ["16 1", "132 9", "31 100\n45 50.5\n46 25", "157 10\n159 9", "183 2\n182.7 2", "31 100\n46 1", "23 1"]
    result = build(tmp_path, "".join(map(block, smiles, spectra)) + fillers())
    assert result.molecule[:7].tolist() == [0, 1, 2, 3, 4, 2, 5] and result.smiles[:2] == ["C", "[Xe]"]
    assert result.peaks[2] == pytest.approx({31: 1.0, 45: 0.505, 46: 0.25})
    assert result.peaks[4] == {183: 1.0} and result.mass[:5].tolist() == [16, 132, 46, 157, 183]
    for i, text in enumerate(result.smiles):
        molecule = Chem.MolFromSmiles(text)
        index, count = features.fingerprint(molecule)
        atoms, bonds = features.graph(molecule)
        place = slice(*result.fp_offsets[i:i + 2])
        np.testing.assert_array_equal(result.fp_index[place], index)
        np.testing.assert_array_equal(result.fp_count[place], count)
        np.testing.assert_array_equal(result.atoms[slice(*result.atom_offsets[i:i + 2])], atoms)
        np.testing.assert_array_equal(result.bonds[slice(*result.bond_offsets[i:i + 2])], bonds)
        assert result.mass[i] == features.nominal_mass(molecule) and len(atoms) == molecule.GetNumAtoms()
    types = {"mass": "int16", "split": "uint8", "fp_index": "uint16", "fp_count": "uint8", "fp_offsets": "int64",
             "atoms": "uint8", "atom_offsets": "int64", "bonds": "uint8", "bond_offsets": "int64", "molecule": "int32",
             "peak_bin": "uint16", "peak_value": "float32", "peak_offsets": "int64"}
    assert {name: str(getattr(result, name).dtype) for name in types} == types
    assert result.bonds.shape[1:] == (4,) and result.bond_offsets[2] == 0
    for name, of in {"fp": "fp_index", "atom": "atoms", "bond": "bonds", "peak": "peak_bin"}.items():
        offsets, rows = getattr(result, f"{name}_offsets"), getattr(result, of)
        assert offsets[0] == 0 and offsets[-1] == len(rows) and (np.diff(offsets) >= 0).all()
    meta = result.meta
    assert meta["format"] == 1 and meta["bins"] == 501 and meta["splits"] == ["train", "val", "test"]
    assert meta["source"] == "set.msp" and str(tmp_path) not in json.dumps(meta)
    assert meta["sha256"] == hashlib.sha256((tmp_path / "set.msp").read_bytes()).hexdigest()
    assert sum(meta["counts"]["spectra_by_split"].values()) == len(result.spectra) == meta["counts"]["kept"]


def test_a_set_without_any_bond(tmp_path):
    result = build(tmp_path, "".join(map(block, ["C", "N", "O", "[Ar]", "S", "[Xe]", "[He]", "P"], ["4 1"] * 8)))
    assert result.bonds.shape == (0, 4) and result.bond_offsets.tolist() == [0] * 9 and result.atoms.shape[0] == 8


# --------------------------------------------------------------------------------------------- workers, limit, old sets
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 7)
    path = tmp_path / "in.msp"
    path.write_text("".join(block("C" * n + end, f"15 100\n27 {n}")
                            for n in range(1, 25) for end in ("O", "", "1CC", "N")) + fillers())
    folders = [prepare.main(["--msp", str(path), "--name", "set", "--out_dir", str(tmp_path / n), "--workers", n])
               for n in "12"]
    one, two = map(contents, folders)
    assert one == two and b"structure cannot be read" in one["rejected.jsonl"]


def test_limit_is_a_seeded_sample_in_the_order_of_the_file(tmp_path):
    text = "".join(block("C" * n + "O", name=str(n)) for n in range(1, 31))
    runs = [build(tmp_path, text, "--limit", 12, "--seed", seed, "--force") for seed in (0, 0, 1)]
    names = [[int(row["name"]) for row in result.spectra] for result in runs]
    assert names[0] == names[1] == sorted(names[0]) != names[2] and len(names[0]) == 12
    assert runs[0].meta["counts"]["read"] == 12
    assert len(build(tmp_path, text, "--limit", 99, "--force").spectra) == 30


def test_a_finished_set_is_left_alone_and_a_changed_input_is_noticed(tmp_path, capsys, monkeypatch):
    folder, mols = tmp_path / "out" / "set", tmp_path / "mols"
    mols.mkdir()
    (mols / "ID1.MOL").write_text(mol_block("CCCCO"))
    text = fillers() + block(ID=1)
    flags = ["--mol_dir", mols]

    def rebuilt(content, *flags):
        before = (folder / "mass.npy").stat().st_ino
        capsys.readouterr()
        build(tmp_path, content, *flags)
        same = "already there" in capsys.readouterr().out
        assert same == ((folder / "mass.npy").stat().st_ino == before)
        return not same

    build(tmp_path, text, *flags)
    assert not rebuilt(text, *flags) and rebuilt(text, *flags, "--force")
    assert rebuilt(text.replace("15 100", "15 99"), *flags) and rebuilt(text, *flags)
    assert rebuilt(text, *flags, "--max_mz", "300") and rebuilt(text, *flags)
    changed = mol_block("CCCCN")
    (mols / "ID1.MOL").write_text(changed)                            # as long as before
    assert len(changed) == len(mol_block("CCCCO")) and rebuilt(text, *flags)
    assert load(folder).of[-1] == "CCCCN" and not rebuilt(text, *flags)
    (folder / "bonds.npy").unlink()
    assert rebuilt(text, *flags)
    (folder / "meta.json").write_text("{")
    assert rebuilt(text, *flags)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"format": 0}))
    assert rebuilt(text, *flags)
    old = features.featurise
    monkeypatch.setattr(features, "featurise", lambda molecule: old(molecule) | {"new": np.zeros(1)})
    monkeypatch.setattr(prepare, "join", lambda rows: {"mass": np.concatenate([row["mass"] for row in rows])})
    assert rebuilt(text, *flags) and not rebuilt(text, *flags)       # features.py changed


def test_a_failed_run_leaves_the_old_set_and_no_litter(tmp_path):
    build(tmp_path, fillers())
    before = contents(tmp_path / "out" / "set")
    with pytest.raises(SystemExit):
        build(tmp_path, block("C1CC"))
    assert contents(tmp_path / "out" / "set") == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["set"]


def test_demo(tmp_path, capsys):
    flags = ["--demo", "--limit", "30", "--out_dir", str(tmp_path), "--workers", "1"]
    result = load(prepare.main(flags))
    assert len(result.molecules) == 30 < len(result.spectra)
    assert not result.rejected and not result.meta["counts"]["notes"]
    assert result.meta["source"] == "demo" and [path.name for path in tmp_path.iterdir()] == ["demo"]
    before = contents(tmp_path / "demo")
    prepare.main(flags)
    assert "already there" in capsys.readouterr().out
    prepare.main([*flags, "--force"])
    assert contents(tmp_path / "demo") == before


# --------------------------------------------------------------------------------------------------------- command line
@pytest.mark.parametrize("flags, word", [
    ("--msp no.msp --name x", "no file no.msp"), ("--name x", "--msp"), ("--msp no.msp", "--name"),
    ("--demo --sdf no.sdf", "--demo"), ("--msp no.msp --name ../x", "plain folder name"),
    ("--msp no.msp --name x --sdf a --mol_dir b", "not allowed with"), ("--demo --limit 0", "--limit 0"),
    ("--demo --max_mz 40000", "--max_mz 40000"), ("--demo --workers x", "--workers")])
def test_wrong_flags_end_in_one_line(refuse, flags, word):
    assert word in refuse(*flags.split())


def test_a_folder_that_is_no_data_set_is_not_touched(tmp_path, capsys):
    (tmp_path / "out" / "set").mkdir(parents=True)
    (tmp_path / "out" / "set" / "mine.txt").write_text("precious")
    with pytest.raises(SystemExit):
        build(tmp_path, fillers())
    assert "no data set" in capsys.readouterr().err
    assert (tmp_path / "out" / "set" / "mine.txt").read_text() == "precious"


def test_as_a_command(tmp_path):
    def call(*arguments):
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    missing = call("--msp", "missing.msp", "--name", "set", "--out_dir", "out")
    assert missing.returncode == 2 and missing.stdout == "" and not (tmp_path / "out").exists()
    assert missing.stderr.startswith("error: ") and missing.stderr.count("\n") == 1 and "missing.msp" in missing.stderr
    (tmp_path / "in.msp").write_text(block("C1CC") + block("CCN.Cl") + fillers())
    good = call("--msp", "in.msp", "--name", "set", "--out-dir", "out")
    assert good.returncode == 0 and good.stderr == "", good.stderr    # nothing of what RDKit says about C1CC
    assert "6 spectra read, 4 of 4 molecules kept" in good.stdout
    assert "several components 1, structure cannot be read 1" in good.stdout


# ---------------------------------------------------------------------------------------------------------- features.py
@pytest.mark.parametrize("smiles, mass", [
    ("C", 16), ("CCO", 46), ("c1ccccc1", 78), ("CBr", 94), ("BrCCBr", 186), ("C[Sn](C)(C)C", 180),
    ("[2H]C([2H])([2H])[2H]", 20),
    ("[13CH4]", 17), ("[81Br]C", 96), ("ClC(Cl)(Cl)Cl", 152), ("C[Si](C)(C)C", 88), ("[Xe]", 132), ("C[Se]C", 110),
    ("B(O)(O)O", 62), ("CI", 142), ("[Na+]", 23), ("[H][H]", 2), ("O=[N+]([O-])c1ccc2ccc3cccc4ccc1c2c34", 247)])
def test_nominal_mass(smiles, mass):
    assert features.nominal_mass(features.read_smiles(smiles)) == mass


@pytest.mark.parametrize("smiles", ["C", "[Xe]", "CC(=O)Oc1ccccc1C(=O)O", "C" * 300, "Cn1cnc2c1c(=O)n(C)c(=O)n2C"])
def test_fingerprint_is_that_of_rdkit(smiles):
    molecule = features.read_smiles(smiles)
    index, count = features.fingerprint(molecule)
    assert index.dtype == np.uint16 and count.dtype == np.uint8 and count.min() >= 1
    assert (np.diff(index.astype(int)) > 0).all()
    dense = np.zeros(features.N_FEATURES, int)
    dense[index] = count
    bits = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=4096).GetFingerprintAsNumPy(molecule)
    counts = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048).GetCountFingerprintAsNumPy(molecule)
    np.testing.assert_array_equal(dense[:4096], bits)
    np.testing.assert_array_equal(dense[4096:], np.minimum(counts.astype(int), 255))


def test_graph():
    atoms, bonds = features.graph(features.read_smiles("C"))
    assert atoms[:, :7].tolist() == [[0, 0, 2, 4, 2, 0, 0]] and atoms.dtype == np.uint8
    assert bonds.shape == (0, 4) and bonds.dtype == np.uint8
    atoms, bonds = features.graph(features.read_smiles("Clc1ccc[nH]1"))
    element = features.ELEMENTS.index
    assert atoms[:, 0].tolist() == [element("Cl"), *[element("C")] * 4, element("N")]
    assert atoms[:, 1].tolist() == [1, 3, 2, 2, 2, 2] and atoms[:, 3].tolist() == [0, 0, 1, 1, 1, 1]
    assert atoms[:, 5].tolist() == [0, 1, 1, 1, 1, 1] and atoms[:, 6].tolist() == [0, 3, 3, 3, 3, 3]
    assert bonds.tolist() == [[0, 1, 0, 0], [1, 2, 3, 1], [2, 3, 3, 1], [3, 4, 3, 1], [4, 5, 3, 1], [5, 1, 3, 1]]
    for smiles in ("[Xe]", "C[N+](C)(C)C", "[Fe-4]", "S(F)(F)(F)(F)(F)F", "C1CC1", "C1" + "C" * 20 + "1", "[O-]C=O"):
        atoms, bonds = features.graph(features.read_smiles(smiles))
        assert (atoms[:, :7] < features.ATOM_SIZES).all() and (bonds[:, 2:] < features.BOND_SIZES).all(), smiles
        assert (bonds[:, :2] < len(atoms)).all()


def test_what_read_smiles_refuses():
    for text in ("", "C1CC", "foo", "c1cccc1"):
        with pytest.raises(ValueError):
            features.read_smiles(text)
