"""data/molecules/prepare.py: what it keeps, what it rejects and why, and that bad input ends in one clear line."""
import gzip
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rdkit import Chem, RDConfig
from rdkit.Chem import QED, Crippen, Descriptors, rdMolDescriptors
from rdkit.Chem.Scaffolds import MurckoScaffold

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data" / "molecules" / "prepare.py"
# A name of its own, because every data set has a prepare.py; in sys.modules, because workers look it up there
spec = importlib.util.spec_from_file_location("prepare_molecules", SCRIPT)
prepare = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)

SMILES = ["CCO", "CCN", "CCOC", "CCCO", "CCCN", "CCCC", "COCCO", "NCCO", "CNCCO", "c1ccccc1", "Cc1ccccc1", "c1ccncc1"]


def load(folder):
    """A finished set as text: .smiles, .scaffolds and .split are lists, one entry per row."""
    meta = json.loads((folder / "meta.json").read_text())
    arrays = {path.stem: np.load(path, allow_pickle=False) for path in folder.glob("*.npy")}

    def texts(prefix):
        tokens, offsets = arrays[prefix + "tokens"], arrays[prefix + "offsets"]
        assert offsets.dtype == np.int64 and offsets[0] == 0 and offsets[-1] == len(tokens)
        return ["".join(meta["vocab"][i] for i in tokens[a:b]) for a, b in zip(offsets, offsets[1:])]

    return SimpleNamespace(
        meta=meta, arrays=arrays, smiles=texts(""),
        scaffolds=texts("scaffold_") if "scaffold_tokens" in arrays else None,
        split=[meta["splits"][i] for i in arrays["split"]],
        rejected=[json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()])


def build(tmp_path, content, *flags, file="in.csv", name="set"):
    """Write a file, run main on it in this process -> the finished set."""
    path = tmp_path / file
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return load(prepare.main(
        ["--input", str(path), "--name", name, "--out_dir", str(tmp_path / "out"), "--workers", "1", *flags]))


def csv_text(rows, header="SMILES,SPLIT"):
    return "\n".join([header, *rows]) + "\n"


def all_train(smiles):
    return csv_text([f"{text},train" for text in smiles])


def chains(n):
    """n different molecules from few tokens."""
    return [f"{'C' * (i % 20 + 1)}O{'C' * (i // 20)}N" for i in range(n)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def refuse(tmp_path, capsys):
    """refuse(*arguments) -> the one line on stderr; checks the exit code and that nothing was written."""
    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            prepare.main([*map(str, arguments), "--out_dir", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        assert [path for path in tmp_path.glob("out/*") if path.name != ".downloads"] == []
        return error
    return call


@pytest.fixture
def refuse_file(tmp_path, refuse):
    def call(content, *flags, file="in.csv"):
        (tmp_path / file).write_bytes(content.encode() if isinstance(content, str) else content)
        return refuse("--input", tmp_path / file, "--name", "set", "--workers", "1", *flags)
    return call


# ------------------------------------------------------------------------------------------------------ what is written
def test_rows_are_the_canonical_smiles_in_the_order_of_the_input(tmp_path):
    written = ["OCC", "c1ccccc1C(=O)NC", "C/C=C\\C", "BrCCCl", "C[C@H](N)C(=O)O", "[NH3+]CC(=O)[O-]", "C%12CCCCC%12",
               "CCBr"]
    result = build(tmp_path, all_train(written))
    assert result.smiles == [Chem.CanonSmiles(text) for text in written]
    vocabulary = result.meta["vocab"]
    assert vocabulary[:2] == ["<bos>", "<eos>"] and vocabulary[2:] == sorted(vocabulary[2:])
    assert {"Br", "Cl", "[NH3+]", "[C@H]", "\\"} <= set(vocabulary)
    assert result.arrays["tokens"].dtype == result.arrays["split"].dtype == np.uint8
    sizes = np.diff(result.arrays["offsets"])
    assert result.meta["longest"] == sizes.max() and result.meta["mean_tokens"] == pytest.approx(sizes.mean(), abs=1e-3)
    assert result.meta["counts"]["read"] == result.meta["counts"]["kept"] == len(written)
    assert result.meta["source"] == "in.csv" and str(tmp_path) not in json.dumps(result.meta)
    assert result.meta["sha256"] == hashlib.sha256((tmp_path / "in.csv").read_bytes()).hexdigest()


def test_backslash_is_not_dropped(tmp_path):
    result = build(tmp_path, all_train(["C/C=C\\C", "C/C=C/C", "CC=CC", "C/C=C\\CC"]), "--keep_smiles")
    assert result.smiles == ["C/C=C\\C", "C/C=C/C", "CC=CC", "C/C=C\\CC"] and not result.meta["canonical"]


def test_keep_smiles_still_finds_duplicates(tmp_path):
    result = build(tmp_path, all_train(["OCC", "OCCC", "CCO", "OCCCC"]), "--keep-smiles")
    assert result.smiles == ["OCC", "OCCC", "OCCCC"]
    assert result.rejected == [{"line": 4, "reason": "duplicate", "text": "CCO", "detail": "first on line 2"}]


def test_plain_lists_of_smiles(tmp_path):
    lines = [f"{text}\tname {i}" for i, text in enumerate(chains(60))]
    result = build(tmp_path, "\n".join(lines), file="in.smi")
    assert result.smiles and set(result.smiles) <= {Chem.CanonSmiles(text) for text in chains(60)}
    assert len(result.smiles) + len(result.rejected) == 60
    again = build(tmp_path, gzip.compress("\n".join(lines).encode()), file="in.txt.gz", name="zipped")
    assert again.smiles == result.smiles


def test_gzip_is_known_by_its_content(tmp_path):
    plain = build(tmp_path, all_train(SMILES))
    assert build(tmp_path, gzip.compress(all_train(SMILES).encode()), name="zipped").smiles == plain.smiles
    assert build(tmp_path, all_train(SMILES), file="in.csv.gz", name="named").smiles == plain.smiles


def test_crlf_bom_quotes_and_other_columns(tmp_path):
    rows = [f'"a, ""b""", {text} ,Train' for text in SMILES]
    canonical = [Chem.CanonSmiles(text) for text in SMILES]
    assert build(tmp_path, csv_text(rows, "id,smiles,Split").replace("\n", "\r\n")).smiles == canonical
    assert build(tmp_path, "\ufeff" + all_train(SMILES).replace("\n", "\r\n"), name="bom").smiles == canonical
    listed = build(tmp_path, "\ufeff" + "\r\n".join(chains(30)), file="in.smi", name="listed")
    assert not [row for row in listed.rejected if row["reason"] != "token not in the training vocabulary"]
    named = csv_text([f"x,{text}" for text in SMILES], "id,mol")
    assert len(build(tmp_path, named, "--smiles-column", "MOL", name="named").smiles) == len(SMILES)


def test_more_than_256_tokens_are_uint16(tmp_path):
    written = [f"[CH3:{i}]C" for i in range(1, 301)] + SMILES
    result = build(tmp_path, all_train(written))
    assert result.arrays["tokens"].dtype == np.uint16 and len(result.meta["vocab"]) > 300
    assert result.smiles == [Chem.CanonSmiles(text) for text in written]
    # the rows moved to val are none of those that alone have their token
    assert not [text for text, split in zip(result.smiles, result.split) if split == "val" and ":" in text]


def test_properties_are_those_of_rdkit(tmp_path):
    sys.path.append(os.path.join(RDConfig.RDContribDir, "SA_Score"))
    import sascorer
    written = ["CC(=O)Oc1ccccc1C(=O)O", "Cn1cnc2c1c(=O)n(C)c(=O)n2C", "CC(C)Cc1ccc(C(C)C(=O)O)cc1", "CCO", "c1ccccc1"]
    rows = [f"{text},{'val' if i == 3 else 'train'}" for i, text in enumerate(written)]
    result = build(tmp_path, csv_text(rows), "--props", "qed,logp,sas,tpsa")
    functions = {"qed": QED.qed, "logp": Crippen.MolLogP, "sas": sascorer.calculateScore,
                 "tpsa": rdMolDescriptors.CalcTPSA}
    expected = np.array([[f(Chem.MolFromSmiles(text)) for f in functions.values()] for text in written])
    assert result.arrays["props"].dtype == np.float32 and list(result.meta["props"]) == ["qed", "logp", "sas", "tpsa"]
    np.testing.assert_allclose(result.arrays["props"], expected, rtol=1e-5)
    train = expected[[0, 1, 2, 4]]                   # the constants come from train alone
    for name, column in zip(functions, train.T):
        assert result.meta["props"][name] == pytest.approx({"mean": column.mean(), "std": column.std()}, rel=1e-5)


def test_a_constant_property_can_be_standardised(tmp_path):
    result = build(tmp_path, all_train(["CC", "CCC", "CCCC", "CCCCC"]), "--props", "tpsa")
    assert result.meta["props"]["tpsa"] == {"mean": 0.0, "std": 1.0}


def test_scaffolds(tmp_path):
    written = ["CC(=O)Nc1ccccc1", "CCO", "Cc1ccc(C2CCNCC2)cc1", "CCCCCC", "C[C@@H]1CCC[C@H](C2CC2)C1", "Oc1ccccc1"]
    result = build(tmp_path, all_train(written), "--scaffold")
    assert result.smiles == [Chem.CanonSmiles(text) for text in written]
    assert result.scaffolds == [MurckoScaffold.MurckoScaffoldSmiles(text) for text in written]
    assert result.scaffolds[1] == result.scaffolds[3] == "" and result.scaffolds[2] != result.smiles[2]
    assert result.meta["longest_scaffold"] == np.diff(result.arrays["scaffold_offsets"]).max() > 5
    assert result.arrays["scaffold_tokens"].dtype == np.uint8


# --------------------------------------------------------------------------------------------------------------- splits
def test_fold_before_split_before_hash_and_the_flag_before_all(tmp_path):
    rows = [f"{text},{'test' if i % 4 else 'train'},{'valid' if i % 3 == 0 else 'Training'},{'x' if i % 2 else 'train'}"
            for i, text in enumerate(chains(12))]
    everything = csv_text(rows, "SMILES,SPLIT,FOLD,mine")
    result = build(tmp_path, everything)
    assert result.split == ["val" if i % 3 == 0 else "train" for i in range(12)]
    assert result.meta["splits"] == ["train", "val"]
    chosen = build(tmp_path, everything, "--split_column", "mine", name="chosen")
    assert chosen.meta["splits"] == ["train", "val", "x"] and chosen.split[1::2] == ["x"] * 6
    split = build(tmp_path, everything.replace("FOLD", "other"), name="split")
    assert [name != "test" for name in split.split] == [i % 4 == 0 for i in range(12)]


def test_other_names_are_splits_of_their_own(tmp_path):
    names = ["train", "validation", "test", "test_scaffolds", "a"]
    rows = [f"{text},{names[i % 5]}" for i, text in enumerate(chains(50))]
    result = build(tmp_path, csv_text(rows))
    assert result.meta["splits"] == ["train", "val", "test", "a", "test_scaffolds"]
    assert result.split == [{"validation": "val"}.get(names[i % 5], names[i % 5]) for i in range(50)]
    assert result.meta["counts"]["by_split"] == dict.fromkeys(result.meta["splits"], 10)


def test_hash_split_is_a_function_of_the_canonical_smiles(tmp_path):
    written = chains(400)
    result = build(tmp_path, csv_text(written, "SMILES"))
    for smiles, split in zip(result.smiles, result.split):
        share = int(hashlib.sha1(smiles.encode()).hexdigest()[:16], 16) / 2**64
        assert split == ("train" if share < 0.9 else "val" if share < 0.95 else "test")
    assert 340 < result.split.count("train") < 380 and result.split.count("val") > 5 < result.split.count("test")
    shuffled = build(tmp_path, csv_text(written[::-1], "SMILES"), name="shuffled")
    assert dict(zip(shuffled.smiles, shuffled.split)) == dict(zip(result.smiles, result.split))


def test_an_empty_val_is_cut_from_train(tmp_path, capsys):
    result = build(tmp_path, all_train(chains(200)))
    assert "4 train rows moved" in capsys.readouterr().out
    assert result.split.count("val") == result.meta["counts"]["val_cut_from_train"] == 4
    hashes = {text: hashlib.sha1(text.encode()).hexdigest() for text in result.smiles}
    chosen = {text for text, split in zip(result.smiles, result.split) if split == "val"}
    assert chosen == set(sorted(result.smiles, key=hashes.get)[:4])
    assert build(tmp_path, csv_text(["CCO,train", "CCN,train", "CCON,train"]), name="tiny").split.count("val") == 1
    given = build(tmp_path, csv_text(["CCO,train", "CCC,val"]), name="given")
    assert given.meta["counts"]["val_cut_from_train"] == 0


# ------------------------------------------------------------------------------------------------------- rejected rows
def test_every_reason_is_counted_and_listed_with_its_line(tmp_path):
    lines = [
        "SMILES,SPLIT", "CCO,train", "C1CC,train", "CCO.CN,train", "OCC,train", "", ",train", "CCN", "CCN,train,x",
        b"CC\xff,train", "C" * 10_001 + ",train", "C" * 130 + ",train", "CC\u00e9,train", "CCF,", "[SiH3]C,test",
        '"CCO,train', "[He],valid", "CCBr,valid", "CCCBr,train", "CCCCCl,train", "", ""]
    content = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n"
    result = build(tmp_path, content)
    expected = {3: "not parsed by RDKit", 4: "salt or mixture", 5: "duplicate", 6: "empty", 7: "empty",
                8: "wrong number of columns", 9: "wrong number of columns", 10: "not UTF-8",
                11: "line over 10000 characters", 12: "too long (> 128 tokens)", 13: "unknown token", 14: "no split",
                15: "token not in the training vocabulary", 16: "wrong number of columns",
                17: "token not in the training vocabulary"}
    assert {row["line"]: row["reason"] for row in result.rejected} == expected
    assert result.smiles == ["CCO", "CCBr", "CCCBr", "CCCCCl"] and result.split == ["train", "val", "train", "train"]
    counts = result.meta["counts"]
    assert counts["read"] == 19 and counts["kept"] == 4 and sum(counts["rejected"].values()) == 15
    assert result.meta["vocab"] == ["<bos>", "<eos>", "Br", "C", "Cl", "O"]
    assert counts["rejected"] == {reason: list(expected.values()).count(reason) for reason in set(expected.values())}
    by_line = {row["line"]: row for row in result.rejected}
    assert by_line[5]["detail"] == "first on line 2" and by_line[15]["detail"] == "[SiH3]"
    assert by_line[9]["detail"] == "3 instead of 2" and by_line[10]["text"] == "CC\\xff,train"
    assert len(by_line[11]["text"]) == 80 and "'\u00e9'" in by_line[13]["detail"]


def test_an_open_quote_does_not_swallow_the_next_rows(tmp_path):
    result = build(tmp_path, csv_text(['"CCO', "CCCO", "CCCCO", "CCCCCO", '"CCCCCCO"'], "smiles"))
    assert [(row["line"], row["reason"]) for row in result.rejected] == [(2, "wrong number of columns")]
    assert result.smiles == ["CCCO", "CCCCO", "CCCCCO", "CCCCCCO"]


def test_max_tokens_counts_tokens_and_not_characters(tmp_path):
    result = build(tmp_path, all_train(["BrCCBr", "CCCCC", "ClCCCCl", "CCCC", "ClCCBr", "CCC"]), "--max_tokens", "4")
    assert result.smiles == ["BrCCBr", "CCCC", "ClCCBr", "CCC"]
    assert [row["reason"] for row in result.rejected] == ["too long (> 4 tokens)"] * 2


def test_strange_rows_deep_in_a_file_do_not_end_the_run(tmp_path, monkeypatch):
    lines = chains(30) + ["CC\0O", "CCO |m:1|", "[Fe", "garbage!", "CC{}", "CCS\rCCP"]
    result = build(tmp_path, "\n".join(lines).encode(), file="in.smi")
    assert [row["line"] for row in result.rejected if row["line"] > 30] == [31, 33, 34, 35, 36]
    assert "CCO" in result.smiles and "CCS" not in result.smiles

    def broken(molecule):
        if molecule.GetNumAtoms() == 3:
            raise RuntimeError("Invariant Violation")
        return 1.0
    monkeypatch.setitem(prepare.PROPERTIES, "logp", broken)
    result = build(tmp_path, all_train(["CCO", "CCCO", "CCCCO", "OCCCCCC"]), "--props", "logp", name="props")
    assert result.rejected == [{"line": 2, "reason": "RDKit error", "text": "CCO", "detail": "Invariant Violation"}]
    monkeypatch.setitem(prepare.PROPERTIES, "logp", lambda molecule: float("nan" if molecule.GetNumAtoms() == 3 else 1))
    assert build(tmp_path, all_train(["CCO", "CCCO", "CCCCO"]), "--props", "logp", name="nan").rejected[0]["line"] == 2


def test_ten_megabytes_without_a_line_end_cost_nothing(tmp_path):
    path = tmp_path / "in.smi"
    path.write_bytes(b"CCO\n" + b"C" * 10_000_000 + b"\nCCN\nCCON\nCCCO\nCCCN\n")
    tracemalloc.start()
    lines = list(prepare.read_lines(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [number for number, _ in lines] == [1, 2, 3, 4, 5, 6] and peak < 4_000_000
    rejected = build(tmp_path, path.read_bytes(), file="in.smi").rejected
    assert [(row["line"], row["reason"]) for row in rejected if row["line"] == 2] == [(2, "line over 10000 characters")]


# ----------------------------------------------------------------------------------------------------------- bad input
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:49fe\nsize 67916778\n"


@pytest.mark.parametrize("content, file, flags, words", [
    (b"", "in.csv", [], "is empty"),
    (b"\n\n", "in.csv", [], "no rows"),
    (b"\nCCO\n", "in.csv", [], "no column 'smiles'"),
    (b"\n \n", "in.smi", [], "no rows"),
    (gzip.compress(b""), "in.csv.gz", [], "no rows"),
    (b"SMILES,SPLIT\n", "in.csv", [], "no rows"),
    (b"mol,id\nCCO,1\n", "in.csv", [], "only mol, id: name the right one with --smiles_column"),
    (b"SMILES\nCCO\n", "in.csv", ["--split_column", "set"], "no column 'set', only SMILES"),
    (b"SMILES\nCCO\n", "in.csv", ["--smiles_column", "m"], "no column 'm'"),
    (b"CCO\n", "in.smi", ["--split_column", "set"], "no columns"),
    (LFS, "in.csv", [], "git lfs pull"),
    (LFS, "in.csv.gz", [], "git lfs pull"),
    (b"\x89PNG\0\0\0\1" * 500, "in.csv", [], "NUL bytes"),
    (gzip.compress(b"\0\1" * 5000), "in.smi.gz", [], "NUL bytes"),
    (b"what is this?\nno molecules!\n" * 20, "in.smi", [], "not parsed by RDKit 40"),
    (b"SMILES,SPLIT\nCCO,test\nCCN,val\n", "in.csv", [], "none of its 2 rows is left for training; splits: test, val"),
    (b"SMILES,SPLIT\nCCO,train\n", "in.csv", [], "no validation rows"),
    (b"SMILES,SPLIT\rCCO,train\rCCN,train\r", "in.csv", [], "carriage returns"),
    (b"CCO\rCCN\rCCCO\r" * 9000, "in.smi", [], "carriage returns"),
    (b"CCO\n", "in.xlsx", [], "unknown kind of file"),
    (b"CCO\n", "in.smi", ["--limit", "0"], "--limit 0: must be at least 1"),
    (b"CCO\n", "in.smi", ["--limit", "-5"], "--limit -5"),
    (b"CCO\n", "in.smi", ["--limit", "many"], "invalid int"),
    (b"CCO\n", "in.smi", ["--props", "logp,weight"], "choose from logp, sas, tpsa, qed"),
    (b"CCO\n", "in.smi", ["--what"], "--what"),
    (b"CCO\n", "in.smi", ["--sha256", "ab12"], "expected sha256 ab12"),
    (b"CCO\n", "in.smi", ["--name", "../set"], "plain folder name"),
    ("SMILES,ID\n" + "".join(f"{'C' * (i % 90 + 1)}O{'C' * (i // 90)},{i}\n" for i in range(300)), "in.csv",
     ["--split_column", "ID"], "different splits"),
])
def test_bad_input_ends_in_one_line(refuse_file, content, file, flags, words):
    assert words in refuse_file(content, *flags, file=file)


def test_damaged_gzip_says_how_far_it_got(refuse_file):
    noise = np.random.default_rng(0).integers(0, 2, 40_000)
    whole = gzip.compress("".join("CN"[i] + "\n" * (j % 20 == 19) for j, i in enumerate(noise)).encode())
    message = refuse_file(whole[:len(whole) // 2], file="in.smi.gz")
    assert "cut off or damaged after line" in message and int(message.split("after line ")[1].split(" ")[0]) > 100
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    assert "cut off or damaged after line" in refuse_file(bytes(damaged), file="in.smi.gz")


def test_missing_file_and_missing_arguments(refuse, tmp_path):
    assert "there is no file" in refuse("--input", tmp_path / "none.csv", "--name", "set")
    (tmp_path / "in.smi").write_text("CCO\n")
    assert "--name" in refuse("--input", tmp_path / "in.smi")
    assert "--input --url --demo" in refuse("--name", "set")
    assert "not allowed with" in refuse("--demo", "--input", tmp_path / "in.smi")
    assert "--sha256" in refuse("--url", "https://example.org/x.csv", "--name", "set")


def test_the_command_line_prints_no_traceback(tmp_path):
    command = [sys.executable, SCRIPT, "--input", "none.csv", "--name", "set", "--out-dir", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1 and "none.csv" in run.stderr
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------ repeated, parallel, broken
def test_the_number_of_workers_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 17)
    rows = chains(150) + ["C1CC", "", "CCO.O"] + chains(150)[::-1] + ["[SiH3]C"] * 2 + ["CCCCCCCCCF"]
    text = csv_text(rows, "SMILES")
    build(tmp_path, text, "--scaffold", "--props", "logp", name="one")
    build(tmp_path, text, "--scaffold", "--props", "logp", "--workers", "2", name="two")
    one, two = contents(tmp_path / "out" / "one"), contents(tmp_path / "out" / "two")
    one["meta.json"] = one["meta.json"].replace(b'"one"', b'"two"')
    assert one == two and len(one) == 8 and len(one["rejected.jsonl"].splitlines()) >= 153


def test_a_dead_worker_is_reported(tmp_path, monkeypatch, refuse):
    monkeypatch.setattr(prepare, "CHUNK", 10)
    monkeypatch.setattr(prepare, "read_molecule", lambda row, options: os._exit(1))
    (tmp_path / "in.smi").write_text("\n".join(chains(50)))
    assert "a worker process died" in refuse("--input", tmp_path / "in.smi", "--name", "set", "--workers", "2")


def test_the_same_command_does_nothing_and_force_gives_the_same_bytes(tmp_path, capsys):
    text = csv_text(chains(50), "SMILES")
    build(tmp_path, text)
    before, folder = contents(tmp_path / "out" / "set"), tmp_path / "out" / "set"
    inode = folder.stat().st_ino
    capsys.readouterr()
    build(tmp_path, text)
    assert "already there" in capsys.readouterr().out and folder.stat().st_ino == inode
    build(tmp_path, text, "--force")
    assert folder.stat().st_ino != inode and contents(folder) == before
    assert build(tmp_path, text, "--max_tokens", "20").meta["options"]["max_tokens"] == 20          # other options
    assert len(build(tmp_path, csv_text(chains(60), "SMILES"), "--max_tokens", "20").smiles) > 45   # another source
    (folder / "tokens.npy").unlink()                 # no complete set
    assert len(build(tmp_path, csv_text(chains(60), "SMILES"), "--max_tokens", "20").smiles) > 45
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["set"]


def test_a_failed_run_leaves_the_old_set_alone(tmp_path, monkeypatch):
    build(tmp_path, csv_text(chains(50), "SMILES"))
    folder = tmp_path / "out" / "set"
    before = contents(folder)

    def stops_with(code, text=csv_text(chains(70), "SMILES")):
        with pytest.raises(SystemExit) as stop:
            build(tmp_path, text)
        assert stop.value.code == code and contents(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == ["set"]
    stops_with(2, "SMILES\nnonsense\n")

    save, saved = np.save, []
    for error, code in ((KeyboardInterrupt, 130), (OSError(28, "No space left on device"), 2)):
        def fails_at_the_second(path, *arguments, **keywords):
            saved.append(path)
            if len(saved) % 2 == 0:
                raise error
            save(path, *arguments, **keywords)
        with monkeypatch.context() as patch:
            patch.setattr(np, "save", fails_at_the_second)
            stops_with(code)

    rename, renamed = Path.rename, []
    def fails_to_move_in(self, target):
        renamed.append(target)
        if len(renamed) == 2:                        # after the old set was moved aside
            raise OSError("no")
        return rename(self, target)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails_to_move_in)
        stops_with(2)


def test_a_killed_run_leaves_the_old_set_alone(tmp_path):
    build(tmp_path, csv_text(chains(50), "SMILES"))
    folder = tmp_path / "out" / "set"
    before = contents(folder)
    command = [str(SCRIPT), "--input", str(tmp_path / "in.csv"), "--name", "set", "--force",
               "--out_dir", str(tmp_path / "out")]
    code = ("import os, runpy, sys, numpy\n"
            "numpy.save = lambda path, *rest, **more: 'split' in path.name and os.kill(os.getpid(), 9)\n"
            f"sys.argv = {command}\nrunpy.run_path(sys.argv[0], run_name='__main__')")
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert contents(folder) == before
    assert len(build(tmp_path, csv_text(chains(70), "SMILES")).smiles) > 60


def test_a_folder_that_is_no_data_set_is_not_touched(tmp_path):
    (tmp_path / "out" / "set").mkdir(parents=True)
    (tmp_path / "out" / "set" / "thesis.txt").write_text("three years of work")
    with pytest.raises(SystemExit) as stop:
        build(tmp_path, csv_text(SMILES, "SMILES"), "--force")
    assert stop.value.code == 2 and contents(tmp_path / "out" / "set") == {"thesis.txt": b"three years of work"}


def test_limit_is_a_seeded_sample_in_file_order(tmp_path):
    written = chains(300)
    first = build(tmp_path, all_train(written), "--limit", "40")
    again = build(tmp_path, all_train(written), "--limit", "40", name="again")
    other = build(tmp_path, all_train(written), "--limit", "40", "--seed", "1", name="other")
    assert first.smiles == again.smiles != other.smiles and len(first.smiles) == first.meta["counts"]["read"] == 40
    places = [[Chem.CanonSmiles(text) for text in written].index(text) for text in first.smiles]
    assert places == sorted(places) and places[-1] > 200
    assert len(build(tmp_path, all_train(written), "--limit", "1000", name="all").smiles) == 300


# ------------------------------------------------------------------------------------------------------------ downloads
def test_url_with_checksum(tmp_path, refuse):
    path = tmp_path / "molecules.csv.gz"
    path.write_bytes(gzip.compress(all_train(SMILES).encode()))
    right, wrong = hashlib.sha256(path.read_bytes()).hexdigest(), "0" * 64
    message = refuse("--url", path.as_uri(), "--sha256", wrong, "--name", "set")
    assert f"expected sha256 {wrong}, actual {right}" in message
    assert not list((tmp_path / "out" / ".downloads").iterdir())
    assert "cannot download" in refuse("--url", (tmp_path / "none.csv").as_uri(), "--sha256", wrong, "--name", "set")
    assert "cannot download" in refuse("--url", "gopher:/none.csv", "--sha256", wrong, "--name", "set")
    assert "unknown kind" in refuse("--url", "https://example.org/page", "--sha256", wrong, "--name", "set")
    command = ["--url", path.as_uri(), "--sha256", right.upper(), "--name", "set", "--out_dir", str(tmp_path / "out")]
    result = load(prepare.main(command))
    assert result.smiles == [Chem.CanonSmiles(text) for text in SMILES]
    assert result.meta["source"] == "molecules.csv.gz" and result.meta["sha256"] == right
    path.unlink()                                    # the verified copy is used again
    assert load(prepare.main([*command, "--limit", "5"])).meta["counts"]["read"] == 5


# ------------------------------------------------------------------------------------------------------------- demo set
@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    command = ["--demo", "--limit", "500", "--name", "demo500", "--workers", "1"]
    return load(prepare.main([*command, "--out_dir", str(out)]))


def test_demo_molecules_keep_the_limits_of_moses(demo):
    assert len(demo.smiles) == len(set(demo.smiles)) == 500 and not demo.rejected
    for smiles in demo.smiles:
        molecule = Chem.MolFromSmiles(smiles)
        assert Chem.MolToSmiles(molecule) == smiles and "." not in smiles
        assert 250 <= Descriptors.MolWt(molecule) <= 350, smiles
        assert rdMolDescriptors.CalcNumRotatableBonds(molecule) <= 7 and Crippen.MolLogP(molecule) <= 3.5, smiles
        assert {atom.GetSymbol() for atom in molecule.GetAtoms()} <= set("C N S O F Cl Br".split()), smiles
        assert not any(atom.GetFormalCharge() or atom.GetNumRadicalElectrons() for atom in molecule.GetAtoms()), smiles
        rings = molecule.GetRingInfo()
        assert 2 <= rings.NumRings() and max(map(len, rings.AtomRings())) <= 8, smiles


def test_demo_is_diverse(demo):
    fill = prepare.write_fragment
    rings = {Chem.CanonSmiles(fill(text.split("_"), [""] * text.count("_"))) for text in prepare.RINGS}
    assert len(rings) >= 60
    scaffolds = {MurckoScaffold.MurckoScaffoldSmiles(smiles) for smiles in demo.smiles}
    assert len(scaffolds) > 400
    assert {"Br", "Cl", "[nH]", "#", "s", "o", "4"} <= set(demo.meta["vocab"])
    assert set(demo.split) == {"train", "val", "test"} and demo.split.count("train") > 420


def test_demo_depends_on_the_seed_only(demo, tmp_path):
    def first(*flags):
        return load(prepare.main(["--demo", "--limit", "260", "--out_dir", str(tmp_path), "--force", *flags])).smiles
    assert first("--workers", "2") == first("--workers", "1") == demo.smiles[:260]
    assert first("--seed", "1") != demo.smiles[:260]


def test_demo_from_any_folder_on_the_command_line(demo, tmp_path):
    command = [sys.executable, SCRIPT, "--demo", "--limit", "60", "--out_dir", "here"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0 and run.stderr == "" and "60 rows read" in run.stdout
    result = load(tmp_path / "here" / "demo")
    # in so small a train split some token may be missing
    assert sorted(result.smiles + [row["text"] for row in result.rejected]) == sorted(demo.smiles[:60])
    assert result.meta["source"] == "demo" and result.meta["sha256"]
