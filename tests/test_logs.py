"""data/logs/prepare.py: which lines become which keys and sessions, what is left out, and how bad input ends."""
import csv
import gc
import gzip
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data" / "logs" / "prepare.py"
# A name of its own, because every data set has a prepare.py
spec = importlib.util.spec_from_file_location("prepare_logs", SCRIPT)
prepare = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)

TEMPLATES = "1\t<*>Receiving block <*> src: <*>\n2\tReceived block <*> of size <*>\n3\tDeleting block <*> file <*>\n"
HEADER = r"(?P<time>\d+) (?P<content>.*)"


def load(folder):
    """A finished set: .sessions is a list of (id, split, label, texts of its keys)."""
    meta = json.loads((folder / "meta.json").read_text())
    arrays = {path.stem: np.load(path, allow_pickle=False) for path in folder.glob("*.npy")}
    offsets, ids = arrays["offsets"].tolist(), (folder / "sessions.txt").read_text().split("\n")[:-1]
    texts = [meta["templates"][key] for key in arrays["keys"].tolist()]
    sequences = [texts[a:b] for a, b in zip(offsets, offsets[1:])]
    sessions = list(zip(ids, [meta["splits"][i] for i in arrays["split"]], arrays["labels"].tolist(), sequences))
    assert len(ids) == len(offsets) - 1 == len(sessions) == len(arrays["unique"]) and offsets[-1] == len(texts)
    rejected = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    return SimpleNamespace(meta=meta, arrays=arrays, ids=ids, texts=sequences, sessions=sessions, rejected=rejected,
                           counts=meta["counts"], folder=folder)


def write(path, content):
    content = "".join(f"{line}\n" for line in content) if isinstance(content, (list, tuple)) else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def build(tmp_path, content, *flags, file="in.log", name="set"):
    path = write(tmp_path / file, content)
    command = ["--input", path, "--name", name, "--out_dir", tmp_path / "out", *flags]
    return load(prepare.main(list(map(str, command))))


def keyed(*names, time=None):
    """Sequences of keys, one per session, as lines of a raw log: every key is a line `time id key`."""
    return [f"{i if time is None else time} s{row:03d} {key}" for i, (row, key) in enumerate(
        (row, key) for row, keys in enumerate(names) for key in keys.split())]


PLAIN = ("--header", HEADER, "--session", r"^\d+ (s\d+)", "--time_format", "epoch")


def read(result, path):
    """What `score` does -> list of Session."""
    reader = prepare.LogReader(result.meta["parser"], result.meta["templates"])
    return list(reader.sessions(path)), reader


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
        assert not list(tmp_path.glob("out/*")) and not list(tmp_path.glob("out/.*"))
        return error
    return call


@pytest.fixture
def refuse_file(tmp_path, refuse):
    def call(content, *flags, file="in.log"):
        return refuse("--input", write(tmp_path / file, content), "--name", "set", *flags)
    return call


# --------------------------------------------------------------------------------------------------- key sequences
def test_three_files_of_sequences(tmp_path):
    train = write(tmp_path / "train.txt", ["5 5 22", "5", "", "0,5 22", "22 5 9"] * 4)
    normal = write(tmp_path / "normal.csv", ["a,5 22", "b,5 22"])
    abnormal = write(tmp_path / "bad.csv.gz", gzip.compress(b"x,5\ny,7 7 7\n"))
    command = ["--train", train, "--test_normal", normal, "--test_abnormal", abnormal, "--test_normals", 1000, "--name",
               "set", "--out_dir", tmp_path / "out"]
    result = load(prepare.main(list(map(str, command))))
    assert [row[1:3] for row in result.sessions[16:]] == [("test", 0)] * 2 + [("test", 1)] * 2
    assert result.ids[:2] + result.ids[16:] == ["train:1", "train:2", "a", "b", "x", "y"]
    # sessions of one or two keys stay, in train as in test
    assert result.texts[:2] + result.texts[16:] == [["5", "5", "22"], ["5"], ["5", "22"], ["5", "22"], ["5"], ["7"] * 3]
    assert result.counts["by_split"] == {"train": 13, "val": 3, "test": 4}
    assert result.counts["rejected"] == {"empty line": 4} and result.rejected[0]["line"] == 3
    assert result.rejected[0]["file"] == "train"
    assert result.meta["test_normals"] == 1000 and result.meta["parser"] == {} and not result.meta["has_gaps"]
    assert result.meta["templates"] == ["5", "22", "9", "7"] and result.meta["n_train_keys"] == 3
    assert "gaps" not in result.arrays and result.meta["longest"] == 3
    assert {name: array.dtype.name for name, array in result.arrays.items()} == {
        "keys": "uint16", "offsets": "int64", "labels": "int8", "split": "uint8", "unique": "int32"}
    assert result.arrays["unique"][:5].tolist() == [0, 1, 2, 3, 0] and result.arrays["unique"][-2] == 1
    again, reader = read(result, normal)
    assert [row.keys for row in again] == [[0, 1], [0, 1]] and again[0].id == "a" and not again[0].unknown
    (strange,), _ = read(result, write(tmp_path / "new.txt", "5 77 22\n"))
    assert strange.keys == [0, -1, 1] and strange.unknown == {1: "77"}


def test_labelled_sequences_are_cut_in_the_order_of_time(tmp_path):
    rows = [f"{'Anomaly' if i % 5 == 4 else 'normal'},{i} 1 2" for i in range(50)]
    result = build(tmp_path, ["label,keys", *rows])
    assert result.counts["by_label"] == {"train": {"normal": 16}, "val": {"normal": 4},
                                         "test": {"normal": 20, "anomaly": 5}}
    first = [int(keys[0]) for keys in result.texts]
    assert first == sorted(first) and min(row[1] == "test" for row in result.sessions[20:])
    assert result.counts["rejected"] == {"anomaly in the training period": 5} and result.rejected[0]["line"] == 6
    assert result.meta["kinds"] == ["anomaly"]
    ids = build(tmp_path, [f"{i},1 2" for i in range(50)], name="ids")           # 0 and 1 are ids here
    assert ids.ids == [str(i) for i in range(50)] and set(ids.arrays["labels"]) == {-1}
    assert len(build(tmp_path, b"a\n" + b"b\rc,1 2\n" * 20, name="returns").ids) == 21
    rows = [f"{'-' if i % 2 else 'ANOMALY'},1 2 3" for i in range(20)]
    assert build(tmp_path, rows, "--train_share", "1", name="train").counts["by_split"]["test"] == 0


def test_templates_give_words_to_ready_made_keys(tmp_path):
    path = write(tmp_path / "templates.csv", 'EventId,EventTemplate\nE5,"Receiving, <*>"\nE9,Never seen\n')
    result = build(tmp_path, ["5 6 5", "5"] * 10, "--templates", str(path))
    assert result.meta["templates"] == ["E5: Receiving, <*>", "6", "E9: Never seen"]
    (row,), _ = read(result, write(tmp_path / "new.txt", "E5 5 6 9 8\n"))
    assert row.keys == [0, 0, 1, 2, -1]


def test_events_as_csv(tmp_path):
    rows = [f'{i},{"Anomaly" if i // 2 == 15 else "Normal"},blk_{i // 2},E{i % 2},"Word{i % 2}, <*>"'
            for i in range(40)]
    result = build(tmp_path, ["Timestamp,Label,BlockId,EventId,EventTemplate", *rows, "1,2"], file="in.csv")
    assert result.ids == [f"blk_{i}" for i in range(20)] and result.texts[0] == ["E0: Word0, <*>", "E1: Word1, <*>"]
    assert result.arrays["gaps"].tolist()[:4] == [0, 1, 0, 1]
    assert result.arrays["labels"].tolist() == [0] * 15 + [1] + [0] * 4
    assert result.counts["rejected"] == {"wrong number of columns": 1}
    sessions, _ = read(result, tmp_path / "in.csv")
    assert [row.keys for row in sessions] == [[0, 1]] * 20
    named = build(tmp_path, ["session,key", *(f"s{i // 2},read: {'ab'[i % 2]}" for i in range(40)), "s30,E5: x"],
                  name="named", file="named.csv")
    templates = named.meta["templates"]             # no words behind a number: the key's own name
    assert sorted(templates) == ["E5: x", "read: a", "read: b"]
    sessions, reader = read(named, tmp_path / "named.csv")
    assert [[templates[key] for key in row.keys] for row in sessions] == [["read: a", "read: b"]] * 20 + [["E5: x"]]
    (tmp_path / "foreign.csv").write_text("session,key\ns1,read: c\n")
    sessions, reader = read(named, tmp_path / "foreign.csv")
    assert sessions[0].keys == [-1] and reader.counts["log key that is not in the data set"] == 1
    iso = [f"2024-01-01T00:00:{i:02d},s{i // 4},1" for i in range(40)]
    bad = ["noon,s9,1", "2024-01-01T00:00:50,,1", "2024-01-01T00:00:50,s9,"]
    result = build(tmp_path, ["time,session,key", *iso, *bad], name="iso")
    assert result.arrays["gaps"].max() == 1
    assert result.counts["rejected"] == {"no session, key, time or label": 3}


# ------------------------------------------------------------------------------------------------------------- raw logs
def hdfs(blocks, start=0):
    lines = []
    for i, block in enumerate(blocks, start):
        stamp = f"081109 20{i // 60 % 60:02d}{i % 60:02d} {i} INFO dfs.DataNode$X:"
        lines += [f"{stamp} Receiving block {block} src: /10.250.19.{i % 200}:54106 dest: /10.0.0.1:50010",
                  f"{stamp} Received block {block} of size {i * 1000} from /10.250.14.224",
                  f"{stamp} Deleting block {block} file /mnt/hadoop/dfs/data/current/subdir{i % 64}/{block}"]
    return lines


def test_hdfs(tmp_path):
    lines = hdfs([f"blk_-{i}77" for i in range(40)])
    lines.insert(3, "081109 200000 1 INFO dfs.FSName: BLOCK* ask 10.0.0.1:5 to delete  blk_-077 blk_-177 blk_-077")
    lines.insert(4, "081109 200000 1 INFO dfs.FSNamesystem: nothing to name here")
    lines.insert(5, "java.io.IOException: a stack trace")
    given = ("--templates", str(write(tmp_path / "templates.tsv", TEMPLATES)))
    rows = ["BlockId,Label", "blk_-3077,Anomaly", "blk_-99,Normal", "blk_-177,Anomaly"]
    labels = write(tmp_path / "labels.csv", rows)
    result = build(tmp_path, lines, "--format", "hdfs", "--labels", str(labels), *given)
    assert result.ids == ["blk_-077", *[f"blk_-{i}77" for i in range(2, 40)]] and result.arrays["gaps"].max() == 0
    assert result.counts["rejected"] == {"anomaly in the training period": 1, "does not fit the header": 1,
                                         "no session id": 1}
    assert result.counts["label without a session"] == 1 and result.counts["session without a label"] == 38
    assert result.arrays["labels"].tolist() == [-1] * 29 + [1] + [-1] * 9
    one, two, three = [line.split("\t")[1] for line in TEMPLATES.splitlines()]
    unknown = "<unknown> BLOCK* ask <*> to delete <*>"
    assert result.texts[0] == [one, two, three, unknown] and result.texts[5] == [one, two, three]
    assert result.meta["n_train_keys"] == 4 and result.meta["templates"][3] == unknown
    found = build(tmp_path, lines, "--format", "hdfs", name="found")
    assert found.meta["parser"]["templates"] == "found" and len(found.meta["templates"]) == 4
    assert found.texts[0][:3] == ["Receiving block <*> src: <*> dest: <*>", "Received block <*> of size <*> from <*>",
                                  "Deleting block <*> file <*>"]
    for each in (result, found):                    # score reads the file as the preparation did
        sessions, reader = read(each, tmp_path / "in.log")
        same = {row.id: [each.meta["templates"][key] for key in row.keys] for row in sessions}
        assert [same[id] for id in each.ids] == each.texts
        assert reader.counts["no session id"] == 1 and sessions[0].first_line == 1 and sessions[1].first_line == 4
    new = ["081109 200000 1 INFO dfs.X: Receiving block blk_1 src: /1.2.3.4:5 dest: /4.3.2.1:5",
           "081109 200007 1 INFO dfs.X: disk 17 of blk_1 is on fire"]
    (row,), _ = read(found, write(tmp_path / "new.log", new))
    assert row.keys[1] == -1 and row.unknown == {1: "disk <*> of <*> is on fire"} and row.gaps == [0.0, 7.0]
    assert found.meta["templates"][row.keys[0]].startswith("Receiving") and row.label == -1


def bgl(n, alerts=()):
    contents = ["instruction cache parity error corrected", "generating core.12"]
    return [f"{'APPREAD' if i in alerts else '-'} {1117838570 + i} 2005.06.03 R02-M1 2005-06-03-15.42.50.67 R02-M1 "
            f"RAS KERNEL INFO {contents[i % 2]}" for i in range(n)]


def test_bgl_like_lines_carry_their_label(tmp_path):
    result = build(tmp_path, bgl(2050, (5, 1730, 1790, 2049)), "--format", "bgl", file="in.gz")
    assert result.ids[0] == "line-101" and len(result.ids) == 20 and result.texts[-1][1].startswith("instruction")
    assert result.arrays["labels"].tolist() == [0] * 16 + [1, 0, 0, 1]           # a window is anomalous with any alert
    assert result.counts["rejected"] == {"anomaly in the training period": 1, "window over a cut": 1}
    assert [len(keys) for keys in result.texts[-2:]] == [100, 25]                # cut at line 1,025
    once = build(tmp_path, bgl(1234), "--format", "bgl", "--train_share", "1", name="once")
    sessions, _ = read(once, tmp_path / "in.log")
    assert [[once.meta["templates"][key] for key in row.keys] for row in sessions] == once.texts and len(sessions) == 13
    assert {row.label for row in sessions} == {0}
    thunder = [f"- {1131566461 + i} 2005.11.09 dn228 Nov 9 12:01:01 dn228/dn228 crond(pam_unix)[{i}]: session closed "
               "for user x" for i in range(100)] + ["- 1131566999 2005.11.09 tb Nov 9 12:10:43 x@tb no component here"]
    result = build(tmp_path, thunder, "--format", "thunderbird", "--window", "10", name="thunder")
    assert result.texts[0] == ["session closed for user x"] * 10 and result.texts[-1] == ["no component here"]


@pytest.mark.parametrize("window, step", [(43, 20), (30, 30), (10, 1)])
def test_no_line_is_in_two_splits(tmp_path, window, step):
    """Overlapping windows that are shuffled into train and test share most of their lines."""
    lines = [f"message number {'abcdefghij'[i % 10]}{i}" for i in range(1000)]
    result = build(tmp_path, lines, "--window", str(window), "--step", str(step))
    first = [int(id.removeprefix("line-")) for id in result.ids]
    where = {}
    for start, (_, split, _, texts) in zip(first, result.sessions):
        assert len(texts) <= window and (len(texts) == window or start + len(texts) == 1001)
        for line in range(start, start + len(texts)):
            assert where.setdefault(line, split) == split
    if (500 - window) % step == 0:                  # the last window is whole, and so holds every line of the others
        assert {len(texts) for texts in result.texts} == {window}
    assert {where[1], where[1000]} == {"train", "test"} and max(line for line in where if where[line] != "test") <= 500
    if step < window:                               # val is the last fifth of the training period
        assert {split for line, split in where.items() if line <= 400} == {"train"}
        assert {split for line, split in where.items() if 400 < line <= 500} == {"val"}
        assert min(line for line in where if where[line] == "test") == 501
    assert result.counts["rejected"]["window over a cut"] == sum(
        1 for cut, start in ([(400, 0), (500, 400)] if step < window else [(500, 0)])
        for line in range(start, cut, step) if line + window > cut)


def test_windows_of_seconds(tmp_path):
    times = [0, 1, 9, 10, 35, 34, 36, 50, 59.5] + list(range(60, 160))
    lines = [f"{time} event" for time in times]
    result = build(tmp_path, lines, "--header", r"(?P<time>\S+) (?P<content>.*)", "--window_seconds", "10",
                   "--max_keys", "8", "--val_share", "0.3")
    assert [len(keys) for keys in result.texts[:7]] == [3, 1, 3, 2, 8, 2, 8]
    assert result.arrays["gaps"][:7].tolist() == [0, 1, 8, 0, 0, 0, 2]
    assert result.counts["clock going backwards, gap 0"] == 1
    assert {row.id: row.keys for row in read(result, tmp_path / "in.log")[0]}["line-10"] == [0] * 8


def test_timeout_and_longest_session(tmp_path):
    lines = ["0 a x", "1 b x", "5 a x", "100 b x", "101 a x", "102 a x", "300 a x", "301 c x"] + [
        f"{400 + i} d{i // 4} x" for i in range(40)]
    flags = ("--header", HEADER, "--session", r"^\d+ (\w+)", "--time_format", "epoch", "--session_timeout", "50",
             "--max_keys", "3")
    result = build(tmp_path, lines, *flags)
    assert result.ids[:6] == ["a", "b", "b#2", "a#2", "a#3", "c"] and result.ids[6:9] == ["d0", "d0+2", "d1"]
    assert [len(keys) for keys in result.texts[:9]] == [2, 1, 1, 2, 1, 1, 3, 1, 3]
    assert result.counts["reopened"] == 3 and result.counts["cut at max_keys"] == 10 and result.counts["evicted"] == 6
    assert result.arrays["gaps"][:4].tolist() == [0, 5, 0, 0]
    sessions, reader = read(result, tmp_path / "in.log")
    assert [row.id for row in sessions[:4]] == ["b", "a", "b#2", "a#2"]          # in the order in which they close
    labels = write(tmp_path / "labels.csv", ["d0,1", "d9,Anomaly", "a,0", "b,-"])
    again = build(tmp_path, lines, *flags, "--labels", str(labels), name="again")
    assert dict(zip(again.ids, again.arrays["labels"].tolist()))["a#3"] == 0
    assert again.arrays["labels"].tolist()[-2:] == [1, 1]


def test_memory_is_bounded_by_the_open_sessions(tmp_path):
    def lines():
        for i in range(60_000):
            yield f"{i} INFO s{i // 6} step {i % 6} took {i} ms at /a/b/c{i}\n"
    path = tmp_path / "long.log"
    with open(path, "w") as file:
        file.writelines(lines())
    parser = prepare.parse(["--input", "x", "--name", "x", "--header", HEADER, "--session", r" (s\d+) ",
                            "--time_format", "epoch", "--session_timeout", "30", "--templates", "x"]).parser
    templates, n = ["INFO <*> step <*> took <*> ms at <*>"], 0
    tracemalloc.start()
    for session in prepare.LogReader(parser, templates).sessions(path):     # nothing waits for the end of the file
        n += 1
        assert len(session.keys) == 6 and session.unknown == {}
        if n == 100:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert n == 10_000
    assert peak < 2.5e6, peak                       # ids that a timeout has closed, and cached lines; 5.4e6 without one
    for n, _ in enumerate(prepare.LogReader(parser, templates).sessions(path)):
        if n % 2000 == 0:                           # the list of all objects is large itself, so not in the loop above
            assert sum(type(thing) is prepare.Open for thing in gc.get_objects()) < 15


def test_standard_input(tmp_path):
    result = build(tmp_path, hdfs([f"blk_{i}" for i in range(20)]), "--format", "hdfs")
    code = ("import sys; sys.path.insert(0, 'data/logs'); import json, prepare; "
            f"meta = json.load(open({str(result.folder / 'meta.json')!r})); "
            "print([row.keys for row in prepare.LogReader(meta['parser'], meta['templates']).sessions('-')])")
    expected = [row.keys for row in read(result, tmp_path / "in.log")[0]]
    assert len(expected) == 20 and set(map(len, expected)) == {3}
    for data in ((tmp_path / "in.log").read_bytes(), gzip.compress((tmp_path / "in.log").read_bytes())):
        run = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, cwd=ROOT)
        assert run.returncode == 0 and json.loads(run.stdout) == expected, run


# ------------------------------------------------------------------------------------------------------------- log keys
def test_the_most_specific_template_wins():
    match = prepare.Matcher(["<*>", "Received block <*>", "Received block <*> of size <*>", "node<*>.x is up",
                             "a<*>b<*>c", "<*>tail", "exact", "code 404 in <*>", "code <*> in <*>"], prepare.MASKS)
    expected = {"Received block 7": 1, "Received block 7 of size 12": 2, "Received block 8 of size ": 1, "exact": 6,
                "node17.y is up": 0, "abc": 4, "aXbYc": 4, "acb": 0, "some tail": 5, "node17.x is up": 3, "exactly": 0,
                "code 404 in f": 7, "code 403 in f": 8, "code 4040 in f": 8, "  Received   block 7 ": 1, "": 0}
    assert {text: match(text) for text in expected} == expected
    assert prepare.Matcher(["ab<*>ba"])("aba") == -1 and prepare.Matcher(["a<*>"])("b") == -1
    words = prepare.Matcher(["<*> is up", "node <*> up"], prepare.MASKS, found=True)
    assert [words(text) for text in ("x is up", "node is up", "a b is up")] == [0, 1, -1]


def test_the_cache_gives_the_same_answers():
    rng = random.Random(0)
    words = ["a", "b1", "404", "405", "blk_7", "x=5", "x=", "<*>", "n<*>", "<*>5", "0x1f", "10.0.0.1:80"]
    for found in (False, True):
        for _ in range(60):
            templates = [" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(6)]
            templates = [text for text in dict.fromkeys(templates)]
            match = prepare.Matcher(templates, prepare.MASKS, found)
            for _ in range(60):
                text = " ".join(rng.choices(words[:7] + ["n12", "n5", "15", "16"], k=rng.randint(1, 4)))
                fresh = prepare.Matcher(templates, prepare.MASKS, found)
                assert match(text) == match(text) == fresh(text), (templates, text)
                if not found and match(text) >= 0:  # a regular expression says the same
                    pattern = ".*".join(map(re.escape, templates[match(text)].split("<*>")))
                    assert re.fullmatch(pattern, text)


def test_session_ids_in_a_message_are_wildcards(tmp_path):
    lines = [f"job-{'abcdefghij'[i % 10]}{'xyz'[i // 10]} {'started' if i % 2 else 'ended'}" for i in range(30)]
    assert build(tmp_path, lines * 2, "--session", r"job-\w+").meta["templates"] == ["<*> ended", "<*> started"]


def test_matching_is_linear():
    match = prepare.Matcher(["a<*>" * 12 + "!"])
    assert match("a" * 9_000) == -1                 # a regular expression would take for ever


def test_unknown_lines_get_templates_of_their_own_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_UNKNOWN", 3)
    lines = keyed(*["known n7", "what", "who 12", "who 13", "when", "where", "why"] * 6)
    given = ("--templates", str(write(tmp_path / "templates.txt", ["s<*> known"])))
    result = build(tmp_path, lines, *PLAIN, *given)
    assert sorted(result.meta["templates"]) == sorted(
        ["s<*> known"] + [f"<unknown> s00{i} {text}" for i, text in ((0, "n7"), (1, "what"), (2, "who"))] + ["<other>"])
    assert result.counts["line that matches no template"] == len(lines) - 6
    sessions, _ = read(result, tmp_path / "in.log")
    same = {row.id: [result.meta["templates"][key] for key in row.keys] for row in sessions}
    assert [same[id] for id in result.ids] == result.texts
    other = result.meta["templates"].index("<other>")
    assert [row.unknown for row in sessions if row.id == "s004"] == [{0: "s004 when"}] and sessions[4].keys == [other]
    few = {"templates": ["s<*> known", "<unknown> s000 n7"], "parser": result.meta["parser"]}
    path = write(tmp_path / "new.log", ["1 s000 known", "2 s000 n7", "3 s000 n8"])
    (row,), reader = read(SimpleNamespace(meta=few), path)
    assert row.keys == [0, 1, -1] and row.unknown == {2: "s000 n8"}
    assert reader.counts["line that matches no template"] == 1


# ------------------------------------------------------------------------------------------------------------ bad input
def test_damaged_lines_are_counted(tmp_path):
    lines = [line.encode() for line in keyed(*["a b"] * 30)]
    lines[21:21] = [b"", b"   ", b"30 s001 \xff\xfe caf\xe9", b"31 s001 a\0\0b", b"32 s001 " + b"x" * 1_000_000,
                    "33 s001 h\u00e9".encode()]
    result = build(tmp_path, b"\xef\xbb\xbf" + b"\r\n".join(lines), *PLAIN)
    assert result.counts["rejected"] == {"empty line": 2} and result.counts["lines"] == 66
    assert result.counts["long line, cut off"] == result.counts["NUL bytes, taken out"] == 1
    assert result.counts["undecodable bytes, replaced"] == 1
    assert any("caf\ufffd" in text for text in result.meta["templates"]) and result.ids[0] == "s000"
    assert [len(keys) for keys in result.texts[:3]] == [2, 6, 2]


def test_clock_going_backwards(tmp_path):
    lines = ["10 s0 a", "5 s0 a", "8 s0 a", *keyed(*["a b"] * 10)[2:]]
    result = build(tmp_path, lines, *PLAIN)
    assert result.arrays["gaps"][:3].tolist() == [0, 0, 3] and result.counts["clock going backwards, gap 0"] == 1
    back = [f"{time} s{i} a" for i, time in enumerate([1000, 1001, 5, 6, 2000, 2001, 2002, 2003])]
    assert build(tmp_path, back, *PLAIN, "--session_timeout", "500", name="back").counts["evicted"] == 4
    back = ["1000 s0 a", "5 s1 a", "1100 s0 a", "1101 s2 a", "1102 s1 a", "1103 s3 a", "1104 s4 a"]
    assert "evicted" not in build(tmp_path, back, *PLAIN, "--session_timeout", "500", name="step").counts


def test_bad_files_end_in_one_line(tmp_path, refuse, refuse_file):
    assert "NUL bytes" in refuse_file(os.urandom(50) + b"\0" * 10 + b"\n", "--format", "hdfs")
    assert "NUL bytes" in refuse_file("\n".join(hdfs(["blk_1"])).encode("utf-16"), "--format", "hdfs")
    assert "in.log is empty" in refuse_file("", "--format", "hdfs")
    assert "in.log is empty" in refuse_file("")
    assert "no session is left; left out: empty line 3" in refuse_file("\n\n\n", "--format", "bgl")
    zipped = gzip.compress("\n".join(hdfs([f"blk_{i}" for i in range(1000)])).encode())
    assert "cut off or damaged" in refuse_file(zipped[:-200], "--format", "hdfs")
    assert "cut off or damaged" in refuse_file(zipped[:500] + b"xxxx" + zipped[504:], "--format", "hdfs")
    assert "cannot be read" in refuse("--input", tmp_path / "none.log", "--name", "set")
    assert "cannot be read" in refuse("--input", tmp_path, "--name", "set", "--format", "hdfs")
    message = refuse_file(bgl(20) + hdfs(["blk_1"]) * 3, "--format", "hdfs")
    assert "20 of 29 lines do not fit, first line 1: '- 1117838570" in message and "--header is" in message
    assert "--time_format is '%H'" in refuse_file(bgl(20), "--format", "bgl", "--time_format", "%H")
    assert "no session id 20" in refuse_file(["nothing"] * 20, "--session", r"blk_\d+")
    assert "is no log key; for a raw log give its --format" in refuse_file(hdfs(["blk_1"] * 9))
    assert "over half" in refuse_file(["1,", "2, ", "3,4"])
    assert "no training session is left of 1" in refuse_file(["1 2 3"])
    assert "no validation session is left of 2" in refuse_file(["1 2 3"] * 2)
    assert "no test session" in refuse_file(["0,1"] * 2, "--train_share", "0.9")
    assert "no training session is left of 20" in refuse_file(["1,5 5"] * 20)


def test_bad_labels_and_templates(tmp_path, refuse_file):
    lines = hdfs([f"blk_{i}" for i in range(20)])
    def with_file(flag, content):
        return refuse_file(lines, "--format", "hdfs", flag, write(tmp_path / "other.csv", content))
    message = with_file("--labels", "BlockId,Label\nblk_99,Normal\nblk_98,Anomaly\n")
    assert "none of its 2 ids, such as 'blk_99'" in message and "'blk_0'" in message
    assert "line 2 gives no label" in with_file("--labels", "BlockId,Label\nblk_1,perhaps\n")
    assert "line 1 gives no label" in with_file("--labels", "\x7fELF")
    assert "holds no labels" in with_file("--labels", "BlockId,Label\n")
    assert "other.csv is empty" in with_file("--templates", "")
    assert "holds 0 templates" in with_file("--templates", "\n\n")


def test_too_many_templates(tmp_path, refuse_file, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_TEMPLATES", 50)
    lines = [f"1 s1 {word}" for word in (a + b for a in "abcdefghij" for b in "klmnopqrst")]
    assert "more than 50 templates" in refuse_file(lines, *PLAIN[2:4], "--header", r"\S+ \S+ (?P<content>.*)")
    assert "more than 50 different log keys" in refuse_file([" ".join(lines[i].split()[2] for i in range(60))])


@pytest.mark.parametrize("flags, message", [
    ("--format windows", "choose from hdfs, bgl, thunderbird, generic"), ("--format generic", "what is a session?"),
    ("--session (a)(b)", "at most one group"), ("--session a*", "empty text"), ("--session (", "no regular expression"),
    ("--header .* --window 5", "(?P<content>"), ("--window 5 --step 6", "lines would be lost"),
    ("--window 0", "--window 0"), ("--window 5 --session x", "what is a session?"),
    ("--window_seconds 5", "need a group (?P<time>"), ("--window 5 --session_timeout 5", "need a group"),
    ("--format bgl --labels x", "leave out --labels"), ("--train_share 0", "--train_share 0.0"),
    ("--train_share nan", "--train_share nan"), ("--val_share 1", "from 1e-06 to 0.999"), ("--limit 0", "--limit 0"),
    ("--seed -1", "--seed -1"), ("--test_normals 5", "--test_normals"), ("--nonsense", "--help"),
    ("--test_normal x", "belong together"), ("--max_keys x", "--help"), ("--name a/b", "plain folder name")])
def test_bad_flags(refuse, flags, message):
    assert message in refuse("--input", "x", "--name", "set", *flags.split())


def test_bad_flags_without_input(refuse):
    assert "--window: only with --input" in refuse("--demo", "--window", "5")
    assert "--templates: only with --input" in refuse("--demo", "--templates", "x")
    assert "one of the arguments" in refuse("--name", "set")


def test_without_drain3(tmp_path, refuse_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "drain3.drain", None)
    monkeypatch.setitem(sys.modules, "drain3", None)
    given = ("--templates", str(write(tmp_path / "templates.tsv", TEMPLATES)))
    assert build(tmp_path, hdfs([f"blk_{i}" for i in range(9)]), "--format", "hdfs", *given).meta["n_train_keys"] == 3
    prepare.main(["--demo", "--limit", "60", "--out_dir", str(tmp_path / "out")])
    shutil.rmtree(tmp_path / "out")
    assert "--templates" in refuse_file(hdfs(["blk_1"]), "--format", "hdfs")


def test_lists_of_what_is_left_out_are_capped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "MAX_LISTED", 5)
    result = build(tmp_path, ["", "x:"] * 9 + ["1 2"] * 30)
    assert result.counts["rejected"] == {"empty line": 9, "no log keys": 9} and len(result.rejected) == 10
    assert [row["line"] for row in result.rejected] == list(range(1, 11))
    assert "listed: 5 a reason" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ the same command, the disk
def test_the_same_input_gives_the_same_bytes(tmp_path, capsys):
    lines = keyed(*["a b c", "b a", "a 12 c 7"] * 20)
    flags = (*PLAIN, "--limit", "40")
    first, folder = build(tmp_path, lines, *flags), tmp_path / "out" / "set"
    before, inode = contents(folder), folder.stat().st_ino
    assert first.counts["left out by --limit"] == 20 and sorted(first.ids) == first.ids
    assert not any(b"\x93NUMPY" not in data for name, data in before.items() if name.endswith(".npy"))
    assert str(tmp_path) not in before["meta.json"].decode()
    assert first.meta["sha256"] == hashlib.sha256((tmp_path / "in.log").read_bytes()).hexdigest()
    capsys.readouterr()
    build(tmp_path, lines, *flags)
    assert "already there" in capsys.readouterr().out and folder.stat().st_ino == inode
    build(tmp_path, lines, *flags, "--force")
    assert folder.stat().st_ino != inode and contents(folder) == before
    assert build(tmp_path, lines, *flags, "--seed", "1").arrays["split"].tolist() != first.arrays["split"].tolist()
    assert len(build(tmp_path, lines[:-50], *flags, "--seed", "1").ids) < 45     # another source
    (folder / "keys.npy").unlink()                  # no complete set
    build(tmp_path, lines[:-50], *flags, "--seed", "1")
    assert (folder / "keys.npy").exists() and [path.name for path in (tmp_path / "out").iterdir()] == ["set"]


def test_what_goes_wrong_leaves_the_old_set_alone(tmp_path, monkeypatch):
    build(tmp_path, ["1 2 3"] * 20)
    folder = tmp_path / "out" / "set"
    before = contents(folder)
    for error, code in ((KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)):
        with monkeypatch.context() as patch:
            patch.setattr(np, "save", lambda *_, **__: (_ for _ in ()).throw(error))
            with pytest.raises(SystemExit) as stop:
                build(tmp_path, ["1 2"] * 20)
        assert stop.value.code == code and contents(folder) == before and len(list(folder.parent.iterdir())) == 1
    command = [str(SCRIPT), "--input", str(tmp_path / "in.log"), "--name", "set", "--out_dir", str(tmp_path / "out")]
    code = ("import os, runpy, sys, numpy\n"
            "numpy.save = lambda path, *rest, **more: 'split' in path.name and os.kill(os.getpid(), 9)\n"
            f"sys.argv = {command}\nrunpy.run_path(sys.argv[0], run_name='__main__')")
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL and contents(folder) == before
    (tmp_path / "out" / "thesis").mkdir()
    write(tmp_path / "out" / "thesis" / "x.txt", "three years of work")
    with pytest.raises(SystemExit) as stop:
        build(tmp_path, ["1 2"] * 20, "--force", name="thesis")
    assert stop.value.code == 2 and list(contents(tmp_path / "out" / "thesis")) == ["x.txt"]


# ------------------------------------------------------------------------------------------------------------- demo set
LETTERS = {re.sub(r"\{\w+\}", "<*>", event.partition(": ")[2]): letter for letter, event in prepare.DEMO_EVENTS.items()}


def possible(text):
    """Can the block store's life cycle make this sequence? A parser of its own, not the one that draws the sessions."""
    def takes_turns(steps, chain):                  # some copies of the chain, interleaved
        counts = [0] * len(chain)
        for letter in steps:
            i = chain.find(letter)
            counts[i] += 1
            if i < 0 or i and counts[i] > counts[i - 1]:
                return None
        return counts[0] if len(set(counts)) == 1 else None
    parts = re.fullmatch(r"a([rcs]+)([dvwktxrcslpu]*)(?:q([ei]*))?", text)
    for end in range(2, len(parts[1]) + 1) if parts else ():
        nodes, life = takes_turns(parts[1][:end], "rcs"), parts[1][end:] + parts[2]
        steps = re.fullmatch("(ktxrcs|lpu)*", re.sub("[dvw]", "", life))
        if nodes in (2, 3, 4) and steps:
            gone = takes_turns(parts[3], "ei") if parts[3] is not None else None
            if parts[3] is None or gone == nodes + life.count("k"):
                return True
    return False


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return load(prepare.main(["--demo", "--limit", "1500", "--out_dir", str(tmp_path_factory.mktemp("demo"))]))


def letters(demo, keys):
    return "".join(LETTERS[demo.meta["templates"][key]] for key in keys)


def test_demo_sessions_keep_the_grammar_and_anomalies_break_it(demo):
    kinds, normal = ["normal", *demo.meta["kinds"]], Counter()
    for _, split, label, texts in demo.sessions:
        text = "".join(LETTERS[key] for key in texts)
        assert possible(text) == (label == 0), (text, kinds[label])
        tied = Counter(text)
        unseen = any(letter in "123456" for letter in text)
        assert unseen == (kinds[label] == "unseen key")
        if kinds[label] == "wrong order":           # as many lines of each kind as in a normal session
            assert tied["r"] == tied["c"] == tied["s"] and tied["k"] == tied["t"] == tied["x"]
            assert tied["l"] == tied["p"] == tied["u"] and tied["e"] == tied["i"] == tied["q"] * tied["r"]
        if kinds[label] == "missing step":          # one more line makes it possible again
            assert any(possible(text[:i] + letter + text[i:]) for i in range(len(text) + 1) for letter in "rcsktxlpuei")
        if kinds[label] == "extra step":
            assert any(possible(text[:i] + text[i + 1:]) for i in range(len(text)))
        if kinds[label] == "early end":
            assert len(text) >= 3 and (tied["e"] < tied["r"] or tied["i"] < tied["r"])
        if label == 0:
            normal[len(text)] += 1
        assert split == "test" or label == 0
    lengths = np.array(list(normal.elements()))
    assert 7 <= lengths.min() and lengths.max() < 60 and 15 < lengths.mean() < 25
    assert demo.counts["by_label"]["test"] | {"normal": 0} == dict.fromkeys(demo.meta["kinds"], 6) | {"normal": 0}
    assert demo.counts["rejected"] == {"anomaly in the training period": 8}
    assert demo.meta["kinds"] == list(prepare.DEMO_KINDS) and demo.meta["has_gaps"] and demo.arrays["gaps"].max() > 100
    assert demo.meta["n_train_keys"] == 16 and len(demo.meta["templates"]) == 22


def test_demo_counts_are_numerous(demo):
    """A look-up of the training sessions' keys must raise false alarms, or nothing would be left to learn."""
    bags = [(split, label, tuple(sorted(texts))) for _, split, label, texts in demo.sessions]
    seen = {bag for split, _, bag in bags if split == "train"}
    alarms = np.mean([bag not in seen for split, label, bag in bags if split == "test" and label == 0])
    assert 0.05 < alarms < 0.3, alarms              # fewer with the 8,000 sessions of the whole demo set


def test_demo_new_log_is_read_like_the_set(demo):
    sessions, reader = read(demo, demo.folder / "new.log")
    rows = {row["session"]: row for row in csv.DictReader((demo.folder / "new_labels.csv").read_text().splitlines())}
    assert len(sessions) == len(rows) == 300 and not set(rows) & set(demo.ids)
    assert Counter(row["label"] for row in rows.values()) == {"0": 270, "1": 30}
    for row in sessions:
        assert possible(letters(demo, row.keys)) == (rows[row.id]["label"] == "0") and not row.unknown
        assert len(row.gaps) == len(row.keys) and row.gaps[0] == 0 and min(row.gaps) >= 0
    assert sorted(row.first_line for row in sessions) == [row.first_line for row in sessions]
    lines = (demo.folder / "new.log").read_text().splitlines()
    assert lines == sorted(lines, key=lambda line: line[:19])
    ids = [re.search(r"blk_\d+", line)[0] for line in lines]
    assert sum(a != b for a, b in zip(ids, ids[1:])) > len(ids) / 2              # as in a real log: interleaved


def test_demo_depends_on_the_seed_only(demo, tmp_path):
    command = [sys.executable, SCRIPT, "--demo", "--limit", "60", "--out_dir", "here"]
    environment = os.environ | {"PYTHONHASHSEED": "5"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0 and run.stderr == "" and "60 sessions kept" in run.stdout, run
    again = load(prepare.main(["--demo", "--limit", "60", "--out_dir", str(tmp_path), "--name", "demo"]))
    assert contents(again.folder) == contents(tmp_path / "here" / "demo")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["demo"]
    command = ["--demo", "--limit", "60", "--seed", "1", "--name", "other", "--out_dir", str(tmp_path)]
    other = load(prepare.main(command))
    assert other.texts != again.texts
