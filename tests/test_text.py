"""Text: which rows are refused and why, where a prompt ends, what two tokenizers share, and the demo's physics."""
import functools
import gzip
import hashlib
import itertools
import json
import math
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data.text import demo, prepare
from data.text.tokens import END, PROMPT, Bytes, Tokenizer, load_tokenizer, shared_size

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data" / "text" / "prepare.py"
CORPUS = ["the quick brown fox jumps over the lazy dog", "def f(x):\n    return x",
          "Gr\u00f6\u00dfe und \u4e2d\u6587 100 times", PROMPT.format("How far is it?") + "ten times as far" + END] * 3

def row(instruction="What is it?", response="It is a fox.", **more):
    return json.dumps({"instruction": instruction, "response": response} | more)

def rows(n=30, first=0):
    """n good rows, enough that some are train's by their hash."""
    return [row(f"Question {k}?", f"Answer {k}.") for k in range(first, first + n)]

def load(folder):
    lines = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
             for name in ("mc", "rejected")}
    arrays = {path.stem: np.load(path, allow_pickle=False) for path in folder.glob("*.npy")}
    meta = json.loads((folder / "meta.json").read_text())
    ids = [arrays["tokens"][a:b].tolist() for a, b in zip(arrays["offsets"], arrays["offsets"][1:])]
    return SimpleNamespace(folder=folder, meta=meta, ids=ids, splits=[meta["splits"][k] for k in arrays["split"]],
                           **lines, **arrays)

def build(tmp_path, lines, *flags, name="set"):
    path = tmp_path / f"{name}.jsonl"
    path.write_bytes(lines if isinstance(lines, bytes) else ("\n".join(lines) + "\n").encode())
    return load(prepare.main(["--input", str(path), "--name", name, "--out_dir", str(tmp_path / "out"),
                              *map(str, flags)]))

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

# --------------------------------------------------------------------------------------------- tokenizers made to order
def save(folder, inner, eos=None, **files):
    """A tokenizer of the library and its files -> folder; files: what further .json hold."""
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    if eos:
        files["tokenizer_config"] = {"eos_token": eos}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder

def byte_level(size=320, specials=("<|endoftext|>",)):
    """As GPT-2's: byte-level BPE, whose offsets leave out the blanks unless it is told not to."""
    t = pytest.importorskip("tokenizers")
    inner = t.Tokenizer(t.models.BPE())
    inner.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = t.decoders.ByteLevel()
    inner.train_from_iterator(CORPUS, t.trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), show_progress=False,
        initial_alphabet=t.pre_tokenizers.ByteLevel.alphabet()))
    inner.post_processor = t.processors.ByteLevel(trim_offsets=True)
    return inner

def metaspace():
    """As Llama 2's: blanks become a sign of their own, unknown characters bytes, and <s> stands in front."""
    t = pytest.importorskip("tokenizers")
    trained = t.Tokenizer(t.models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = t.pre_tokenizers.Metaspace()
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trained.train_from_iterator(CORPUS[:1], t.trainers.BpeTrainer(vocab_size=330, special_tokens=specials,
                                                                  show_progress=False))
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    inner = t.Tokenizer(t.models.BPE(vocab=model["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True))
    inner.normalizer = t.normalizers.Sequence([t.normalizers.Prepend("\u2581"), t.normalizers.Replace(" ", "\u2581")])
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.post_processor = t.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    inner.decoder = t.decoders.Sequence([t.decoders.Replace("\u2581", " "), t.decoders.ByteFallback(),
                                         t.decoders.Fuse(), t.decoders.Strip(" ", 1, 0)])
    return inner

def words(*known, unknown=None):
    """Whole words only."""
    t = pytest.importorskip("tokenizers")
    known = [*([unknown] if unknown else []), "#", "Instruction", "Response", "End", ":", *known]
    inner = t.Tokenizer(t.models.WordLevel({word: i for i, word in enumerate(known)}, unknown or "<none>"))
    inner.pre_tokenizer = t.pre_tokenizers.Sequence([t.pre_tokenizers.Whitespace(), t.pre_tokenizers.Punctuation()])
    return inner

def edited(inner, change):
    """The tokenizer after change(dict of its JSON)."""
    parts = json.loads(inner.to_str())
    change(parts)
    return Tokenizer(json.dumps(parts))

# ----------------------------------------------------------------------------------------------------- rows, one by one
@pytest.mark.parametrize("line, reason, detail", [
    ("{", "not JSON", "Expecting property name"), ("[" * 100_000, "not JSON", "recursion"),
    ('{"a": ' + "9" * 5000 + "}", "not JSON", "digits"), ("[1]", "not a JSON object", "a list"),
    ("null", "not a JSON object", "a NoneType"), ("", "empty line", ""), ("  \t", "empty line", ""),
    ('{"response": "x"}', "no instruction", ""), ('{"instruction": "x"}', "no response", ""),
    (row(response=None), "no response", ""), (row(instruction=None), "no instruction", ""),
    (row(instruction=5), "instruction is no text", "a int"), (row(response=["x"]), "response is no text", "a list"),
    (row(instruction=" \n"), "empty instruction", ""), (row(response=""), "empty response", ""),
    (row("Question 3?", "Answer 3."), "duplicate", "first on line 4"),
    (row("Question 3?", "Answer 3.", split="val", other=1), "duplicate", "first on line 4"),
    (row(response="x" * 1_000_000), "line over 1,000,000 bytes", ""),
    (b'{"instruction": "\xff", "response": "x"}', "not UTF-8", "byte 18"),
    ('{"instruction": "\\ud800", "response": "x"}', "half of a surrogate pair", "character 1"),
    (row(options=["a", "\ud800"], answer=0), "half of a surrogate pair", ""),
    (row(split="dev"), "unknown split", "'dev'"), (row(split=""), "unknown split", "''"),
    (row(split=1), "unknown split", "1"), (row(split=["val"]), "unknown split", "['val']"),
    *((row(options=options, answer=0), "options are not two or more different texts", "")
      for options in ("ab", [], ["a"], ["a", "a"], ["a", 1], ["a", ""], {"a": "b"})),
    *((row(options=["a", "b"], answer=answer), "answer is no option", repr(answer))
      for answer in (2, -1, "c", True, 0.0, None)),
    (row(options=["a", "b"]), "answer is no option", "there is none"), (row(answer=1), "answer without options", "")])
def test_a_bad_row_says_why_and_leaves_the_others_alone(tmp_path, line, reason, detail):
    good = [text.encode() for text in rows()]
    line = line if isinstance(line, bytes) else line.encode()
    result = build(tmp_path, b"\n".join(good[:10] + [line] + good[10:]) + b"\n")
    assert len(result.rejected) == 1 and result.meta["counts"]["rejected"] == {reason: 1}
    found = result.rejected[0]
    assert found["line"] == 11 and found["reason"] == reason and detail in found.get("detail", ""), found
    assert result.meta["counts"]["read"] == 31 and len(result.ids) == result.meta["counts"]["kept"] == 30
    assert [Bytes().decode(ids) for ids in result.ids] == [
        PROMPT.format(f"Question {k}?") + f"Answer {k}." + END for k in range(30)]

def test_what_is_strange_but_kept_is_counted_and_told(tmp_path, capsys):
    result = build(tmp_path, rows() + [row("a", "b", input="c", id=5), row("ab", "c", input=""), row("a", "bc"),
                                       row("c", "d", split="train"), row("c", "e", split="test")])
    assert result.meta["counts"]["notes"] == {"instruction in two splits": 1, "unknown key id": 1,
                                              "unknown key input": 2}
    assert "unknown key input 2" in capsys.readouterr().out and not result.rejected and len(result.ids) == 35

@pytest.mark.parametrize("lines", [["{"] * 3, [row("a", "b", split="test")] * 2, ["[", *rows(1)], []])
def test_nothing_left_says_why(tmp_path, refuse, lines):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines))
    error = refuse("--input", path, "--name", "set")
    assert "not enough" in error and ("not JSON" in error or "duplicate 1" in error or "of 0 rows" in error)

# --------------------------------------------------------------------------------------------------------------- splits
def test_splits_by_name_else_by_hash_of_the_instruction(tmp_path):
    names = {"train": "train", "Training": "train", "val": "val", "validation": "val", "VALID": "val",
             "test": "test"}
    result = build(tmp_path, [row(f"q {k}", "x", split=name) for k, name in enumerate(names)] + rows(400))
    assert result.splits[:6] == list(names.values()) and result.split.dtype == np.uint8
    for k, split in enumerate(result.splits[6:]):
        share = int(hashlib.sha1(f"Question {k}?".encode()).hexdigest()[:16], 16) / 2**64
        assert split == ("train" if share < 0.9 else "val" if share < 0.95 else "test")
    assert result.meta["counts"]["by_split"] == Counter(result.splits)

def test_an_empty_val_is_cut_from_train_by_whole_instructions(tmp_path, capsys):
    lines = [row(f"q {k // 2}", str(k), split="train") for k in range(80)]
    result = build(tmp_path, lines)
    assert "val was empty: 4 train rows" in capsys.readouterr().out
    assert result.meta["counts"]["val_cut_from_train"] == 4
    lowest = sorted(range(40), key=lambda k: hashlib.sha1(f"q {k}".encode()).hexdigest())[:2]
    assert {k // 2 for k, split in enumerate(result.splits) if split == "val"} == set(lowest)

# ------------------------------------------------------------------------------------------------ arrays and boundaries
def test_arrays_of_bytes(tmp_path):
    texts = [("What?", "That."), ("Gr\u00f6\u00dfe?", "\U0001f600 \u4e2d\n\n### End\n"), ("{} {i}", "\n{r}"),
             ("### Response:\nx", " \u00e9 ")]
    result = build(tmp_path, [row(*pair) for pair in texts] + rows())
    for (instruction, response), ids, n in zip(texts, result.ids, result.prompt):
        prompt = PROMPT.format("@").replace("@", instruction).encode()
        assert bytes(ids[:n]) == prompt and bytes(ids[n:-1]) == (response + END).encode() and ids[-1] == 256
    types = {"tokens": "uint16", "offsets": "int64", "prompt": "int32", "split": "uint8"}
    assert {name: str(getattr(result, name).dtype) for name in types} == types
    assert result.offsets[0] == 0 and result.offsets[-1] == len(result.tokens) and len(result.prompt) == 34
    meta = result.meta
    assert (meta["splits"], meta["source"]) == (["train", "val", "test"], "set.jsonl") and meta["format"] == 1
    assert (meta["tokenizer"], meta["size"], meta["eos"]) == ("bytes", 257, 256) and "/" not in json.dumps(meta)
    assert meta["longest"] == max(map(len, result.ids)) and meta["fingerprint"] == Bytes.fingerprint
    assert meta["sha256"] == hashlib.sha256((tmp_path / "set.jsonl").read_bytes()).hexdigest()
    assert type(load_tokenizer(result.folder)) is Bytes

def test_questions_of_val_and_test(tmp_path):
    options = ["one", "two", "three"]
    lines = [row("a", "two, because", split="val", options=options, answer=1),
             row("b", None, split="test", options=options, answer="three"),
             json.dumps({"instruction": "c", "split": "train", "options": options, "answer": 0})]
    result = build(tmp_path, lines + rows())
    assert result.mc == [{"split": "val", "prompt": PROMPT.format("a"), "options": options, "answer": 1},
                         {"split": "test", "prompt": PROMPT.format("b"), "options": options, "answer": 2}]
    assert [Bytes().decode(ids) for ids in result.ids[1:3]] == [PROMPT.format("b") + "three" + END,
                                                                PROMPT.format("c") + "one" + END]
    assert result.meta["counts"]["questions"] == {"val": 1, "test": 1}

TEXTS = [("the fox", "the dog"), (" leading and trailing ", " dog "), ("Gr\u00f6\u00dfe", "\u4e2d\u6587 \U0001f600!"),
         ("a\n\n", "\n\n b"), ("x", "7"), ("### Response:\n", "### Response:\n"), ("tab\t", "\r\n\tdog"),
         ("long " * 300, "dog " * 300)]

@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_the_tokens_after_the_prompt_are_the_response(tmp_path, make):
    folder = save(tmp_path / "hf", make(), "</s>" if make is metaspace else "<|endoftext|>")
    tokenizer = load_tokenizer(folder)
    result = build(tmp_path, [row(*pair) for pair in TEXTS] + rows(), "--tokenizer", folder)
    assert not result.rejected and result.tokens.dtype == np.uint16
    for (instruction, response), ids, n in zip(TEXTS, result.ids, result.prompt):
        assert ids[-1] == tokenizer.eos and ids.count(tokenizer.eos) == 1 and n < len(ids) - 1
        assert tokenizer.inner.decode(ids[:n]) == PROMPT.format(instruction)
        assert tokenizer.inner.decode(ids) == PROMPT.format(instruction) + response + END
        assert tokenizer.encode(PROMPT.format(instruction) + response + END)[0] == ids[:-1]
        assert (ids[0] == 1) == (make is metaspace)                    # <s>, which is the prompt's
    copy = load_tokenizer(result.folder)
    assert (copy.fingerprint, copy.eos, copy.size) == (tokenizer.fingerprint, tokenizer.eos, tokenizer.size)
    assert result.meta["fingerprint"] == copy.fingerprint and result.meta["eos"] == copy.eos

def test_a_token_over_the_boundary_is_the_responses_and_is_counted(tmp_path):
    inner = byte_level()
    t = pytest.importorskip("tokenizers")
    inner.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.add_tokens([":\nQ"])
    folder = save(tmp_path / "hf", inner, "<|endoftext|>")
    result = build(tmp_path, [row("a", "Quick"), row("a", "quick")] + rows(), "--tokenizer", folder)
    assert result.meta["counts"]["notes"] == {"a token is half prompt, half response": 1}
    texts = [load_tokenizer(folder).decode(ids[n:]) for ids, n in zip(result.ids, result.prompt)]
    assert texts[0] == ":\nQuick" + END + "<|endoftext|>" and texts[1] == "quick" + END + "<|endoftext|>"

def test_truncation_and_padding_of_a_tokenizer_are_off(tmp_path):
    inner = byte_level()
    inner.enable_truncation(8)
    inner.enable_padding(length=500)
    folder = save(tmp_path / "hf", inner, "<|endoftext|>")
    result = build(tmp_path, [row("long " * 100, "dog " * 100)] + rows(), "--tokenizer", folder)
    assert load_tokenizer(folder).decode(result.ids[0][:-1]) == PROMPT.format("long " * 100) + "dog " * 100 + END
    assert max(map(len, result.ids[1:])) < 100 and load_tokenizer(folder).fingerprint == Tokenizer(
        byte_level().to_str()).fingerprint

def test_an_eos_of_the_tokenizers_own_is_not_doubled_and_one_in_a_text_is_noted(tmp_path):
    t, inner = pytest.importorskip("tokenizers"), byte_level()
    inner.post_processor = t.processors.TemplateProcessing("$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    result = build(tmp_path, rows(), "--tokenizer", save(tmp_path / "hf", inner, "<|endoftext|>"))
    assert all(ids[-1] == 0 and ids.count(0) == 1 for ids in result.ids) and not result.meta["counts"]["notes"]
    special = build(tmp_path, [row("a", "b <|endoftext|> c")] + rows(), "--tokenizer", tmp_path / "hf")
    assert special.meta["counts"]["notes"] == {"special token in the text": 1} and special.ids[0].count(0) == 2

def test_what_a_tokenizer_loses_is_told(tmp_path):
    lines = [row("a fox", "dog"), row("a fox", "cat"), row("a cat", "dog fox")]
    lines += [row("dog " * k, "fox") for k in range(1, 20)]
    failing = build(tmp_path, lines, "--tokenizer", save(tmp_path / "failing", words("fox", "dog", "a")))
    assert [(bad["line"], bad["reason"]) for bad in failing.rejected] == [(k, "tokenizer error") for k in (2, 3)]
    assert "UNK" in failing.rejected[0]["detail"] and failing.meta["eos"] is None
    unknown = build(tmp_path, lines, "--tokenizer", save(tmp_path / "unknown", words("fox", "dog", "a", unknown="?")))
    assert not unknown.rejected
    assert unknown.meta["counts"]["notes"] == {"decodes to another text": 22, "unknown token": 2}
    t = pytest.importorskip("tokenizers")
    letters = sorted(set("".join(map(str, [PROMPT, END, *lines]))))
    silent = t.Tokenizer(t.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    silent.pre_tokenizer = t.pre_tokenizers.Whitespace()
    lines.append(row("a", "zzz"))
    result = build(tmp_path, lines, "--tokenizer", save(tmp_path / "silent", silent))
    assert [(bad["line"], bad["reason"]) for bad in result.rejected] == [(23, "response has no tokens")]

def test_offsets_that_do_not_fit_the_text_are_refused(tmp_path, monkeypatch, capsys):
    t = pytest.importorskip("tokenizers")
    silent = t.Tokenizer(t.models.BPE({letter: i for i, letter in enumerate("#IRE:nstruciopdgfxa")}, []))
    with pytest.raises(SystemExit):                 # blanks vanish, and the library counts the rest from there
        build(tmp_path, rows(), "--tokenizer", save(tmp_path / "silent", silent))
    assert "rejected: offsets do not fit the text 30" in capsys.readouterr().err
    monkeypatch.setattr(Bytes, "encode", lambda self, text: (list(text.encode()), [
        (i, i + 1) for i in sorted(range(len(text)), key=lambda i: 9 if i == 7 and "Question" not in text else i)]))
    result = build(tmp_path, [row("a", "b"), *rows()])
    assert [(bad["line"], bad["reason"]) for bad in result.rejected] == [(1, "offsets do not fit the text")]

# ------------------------------------------------------------------------------------------------------- load_tokenizer
@pytest.mark.parametrize("files, expected", [
    ({"tokenizer_config": {"eos_token": "<b>"}, "config": {"eos_token_id": 0}}, 1),
    ({"tokenizer_config": {"eos_token": {"content": "<b>", "special": True}}}, 1),
    ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": 0}}, 0),
    ({"config": {"eos_token_id": [1, 0]}}, 1), ({"generation_config": {"eos_token_id": 1}}, 1),
    ({"config": {"eos_token_id": None}, "generation_config": {"eos_token_id": [0]}}, 0),
    ({"config": {}}, None), ({"config": {"eos_token_id": []}}, None)])
def test_eos(tmp_path, files, expected):
    folder = save(tmp_path, byte_level(specials=("<a>", "<b>")), **files)
    (tmp_path / "copy").mkdir()
    load_tokenizer(folder).save(tmp_path / "copy")
    assert load_tokenizer(folder).eos == load_tokenizer(tmp_path / "copy").eos == expected

@pytest.mark.parametrize("files, word", [
    ({"tokenizer_config": {"eos_token": "<nowhere>"}}, "'<nowhere>' is not in"),
    ({"tokenizer_config": [1]}, "no JSON object"), ({"config": {"eos_token_id": 50256}}, "50256 is no id"),
    ({"tokenizer": {"a": 1}}, "it has no model"),
    ({"tokenizer": {"model": {"type": "Strange"}}}, "cannot read it"), ({"tokenizer": "x"}, "no JSON object")])
def test_what_load_tokenizer_refuses(tmp_path, files, word):
    with pytest.raises(ValueError, match=re.escape(word)):
        load_tokenizer(save(tmp_path, byte_level(), **files))

def test_folders_without_a_tokenizer_json(tmp_path, refuse):
    with pytest.raises(ValueError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").write_text("")
    assert type(load_tokenizer(tmp_path)) is Bytes
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    error = refuse("--demo", "--tokenizer", tmp_path)
    assert "vocab.json, merges.txt but no tokenizer.json" in error and "save_pretrained" in error

# ------------------------------------------------------------------------------------------------------- two tokenizers
def swap(parts, a, b):
    vocab = parts["model"]["vocab"]
    names = {i: name for name, i in vocab.items()}
    vocab[names[a]], vocab[names[b]] = b, a

def test_a_tokenizer_is_like_itself_whatever_the_form_of_its_file():
    inner = byte_level()
    one = Tokenizer(inner.to_str())
    def reorder(parts):
        parts["model"] = dict(sorted(parts["model"].items(), reverse=True))
        parts["model"]["vocab"] = dict(sorted(parts["model"]["vocab"].items()))
        parts["model"]["merges"] = [" ".join(pair) for pair in parts["model"]["merges"]]
    other = edited(inner, reorder)
    assert one.text != other.text and one.fingerprint == other.fingerprint
    assert shared_size(one, other) == one.size == 320 and shared_size(Bytes(), Bytes()) == 257
    assert one.fingerprint != edited(inner, lambda parts: swap(parts, 5, 9)).fingerprint
    assert one.fingerprint != edited(inner, lambda parts: parts.update(normalizer={"type": "NFC"})).fingerprint
    assert one.fingerprint != Tokenizer(metaspace().to_str()).fingerprint

def test_equal_sizes_with_two_ids_swapped_are_refused():
    inner = byte_level()
    one, other = Tokenizer(inner.to_str()), edited(inner, lambda parts: swap(parts, 300, 310))
    assert one.size == other.size
    with pytest.raises(ValueError) as caught:
        shared_size(one, other, ("big", "little"))
    text = str(caught.value)
    assert text.startswith("big and little have different tokenizers: 2 of 320 ids differ, as 300: ")
    assert repr(one.vocab[300]) in text and repr(one.vocab[310]) in text
    with pytest.raises(ValueError, match="4 of 320 ids differ") as caught:
        shared_size(one, edited(inner, lambda parts: (swap(parts, 300, 310), swap(parts, 5, 9))))
    assert len(re.findall(r"\d+: '", str(caught.value))) == 3          # examples, not four

def test_merges_and_what_a_probe_shows_are_compared():
    inner = byte_level()
    one = Tokenizer(inner.to_str())
    def merge(parts):
        merges = parts["model"]["merges"]
        merges[1], merges[2] = merges[2], merges[1]
    with pytest.raises(ValueError, match=r"2 of \d+ merges differ, as 1: "):
        shared_size(one, edited(inner, merge))
    with pytest.raises(ValueError, match=r"merges differ, as \d+: .* and None"):
        shared_size(one, edited(inner, lambda parts: parts["model"]["merges"].pop()))
    before = json.loads(inner.to_str())["pre_tokenizer"]
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, before]}
    for change in ({"normalizer": {"type": "Lowercase"}}, {"normalizer": {"type": "NFC"}}, {"pre_tokenizer": digits},
                   {"pre_tokenizer": before | {"add_prefix_space": True}}):
        with pytest.raises(ValueError, match=r"\[.* \.\.\. and \["):
            shared_size(one, edited(inner, lambda parts: parts.update(change)))
    t, bos = pytest.importorskip("tokenizers"), byte_level()
    bos.post_processor = t.processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    with pytest.raises(ValueError, match="different tokenizers"):
        shared_size(one, Tokenizer(bos.to_str()))

def test_further_ids_at_the_end_are_allowed():
    small, large = byte_level(), byte_level()
    large.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    large.add_tokens(["<think>"])
    small, large = Tokenizer(small.to_str()), Tokenizer(large.to_str())
    assert (small.size, large.size) == (320, 323)
    assert shared_size(small, large) == shared_size(large, small) == 320
    with pytest.raises(ValueError, match="257 of 257 ids differ"):
        shared_size(Bytes(), small)
    with pytest.raises(ValueError, match="ids differ"):
        shared_size(small, Tokenizer(metaspace().to_str()))

def test_scores_of_a_unigram_model_are_compared():
    t = pytest.importorskip("tokenizers")
    pieces = [("<unk>", 0.0), *((letter, -5.0) for letter in "abcdefgh "), ("ab", -2.0), ("bc", -3.0)]
    one, other = (t.Tokenizer(t.models.Unigram(pieces[:-1] + [("bc", score)], unk_id=0)) for score in (-3.0, -1.0))
    one, other = Tokenizer(one.to_str()), Tokenizer(other.to_str())
    assert shared_size(one, one) == 12 and one.unknown == 0
    with pytest.raises(ValueError, match="1 of 12 scores differ, as 11: "):
        shared_size(one, other)

# ----------------------------------------------------------------------------------------------- files, limit, old sets
def test_gzipped_input_with_other_line_ends_gives_the_same(tmp_path):
    plain = build(tmp_path, rows(), name="plain")
    text = "\ufeff" + "\r\n".join(rows())                           # and no end of line at the end
    zipped = build(tmp_path, gzip.compress(text.encode()), name="zipped")
    assert plain.ids == zipped.ids and plain.splits == zipped.splits and not zipped.rejected

def test_limit_is_a_seeded_sample_in_the_order_of_the_file(tmp_path):
    runs = [build(tmp_path, rows(90), "--limit", 40, "--seed", seed, "--force") for seed in (0, 0, 1)]
    asked = [[int(re.search(rb"Question (\d+)", bytes(ids[:-1]))[1]) for ids in run.ids] for run in runs]
    assert asked[0] == asked[1] == sorted(asked[0]) != asked[2]
    assert len(asked[0]) == runs[0].meta["counts"]["read"] == 40
    assert len(build(tmp_path, rows(90), "--limit", 91, "--force").ids) == 90

def test_more_rows_than_are_encoded_at_once(tmp_path, monkeypatch):
    lines = [*rows(20), "{", *rows(9, 20), row("Question 3?", "Answer 3."), *rows(20, 29)]
    one = contents(build(tmp_path, lines, name="set").folder)
    monkeypatch.setattr(prepare, "CHUNK", 7)
    assert contents(build(tmp_path, lines, "--force", name="set").folder) == one
    assert [json.loads(line)["line"] for line in one["rejected.jsonl"].splitlines()] == [21, 31]

def test_a_finished_set_is_left_alone_and_a_change_is_noticed(tmp_path, capsys):
    folder, lines = tmp_path / "out" / "set", rows()

    def rebuilt(content, *flags):
        before = (folder / "split.npy").stat().st_ino
        capsys.readouterr()
        build(tmp_path, content, *flags)
        same = "already there" in capsys.readouterr().out
        assert same == ((folder / "split.npy").stat().st_ino == before)
        return not same

    build(tmp_path, lines)
    assert not rebuilt(lines) and rebuilt(lines, "--force") and rebuilt(lines[:-1]) and rebuilt(lines)
    assert rebuilt(lines, "--seed", 1) and rebuilt(lines, "--limit", 20) and rebuilt(lines)
    hf = save(tmp_path / "hf", byte_level(), "<|endoftext|>")
    assert rebuilt(lines, "--tokenizer", hf) and not rebuilt(lines, "--tokenizer", hf)
    (hf / "tokenizer.json").write_text(json.dumps(json.loads((hf / "tokenizer.json").read_text()), indent=3))
    assert not rebuilt(lines, "--tokenizer", hf)
    (hf / "tokenizer_config.json").write_text("{}")
    assert rebuilt(lines, "--tokenizer", hf) and rebuilt(lines)
    for damage in (lambda: (folder / "prompt.npy").unlink(), lambda: (folder / "meta.json").write_text("{"),
                   lambda: (folder / "mc.jsonl").unlink()):
        damage()
        assert rebuilt(lines)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"format": 0}))
    assert rebuilt(lines)

def test_a_failed_run_leaves_the_old_set_and_no_litter(tmp_path, capsys):
    before = contents(build(tmp_path, rows()).folder)
    with pytest.raises(SystemExit):
        build(tmp_path, ["{"])
    assert contents(tmp_path / "out" / "set") == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["set"]
    (tmp_path / "out" / "mine").mkdir()
    with pytest.raises(SystemExit):
        build(tmp_path, rows(), name="mine")
    assert "no data set" in capsys.readouterr().err and not list((tmp_path / "out" / "mine").iterdir())

KILLED = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import numpy as np
from data.text import prepare
save = np.save
def slow(path, *rest, **more):
    save(path, *rest, **more)
    if path.name == "prompt.npy":
        print("half", flush=True)
        time.sleep(60)
np.save = slow
prepare.main(sys.argv[1:])
"""

@pytest.mark.parametrize("old", [False, True])
def test_a_kill_while_writing_leaves_nothing_half(tmp_path, old):
    before = contents(build(tmp_path, rows(40)).folder) if old else None
    (tmp_path / "in.jsonl").write_text("\n".join(rows()))
    command = [sys.executable, "-c", KILLED, str(ROOT), "--input", str(tmp_path / "in.jsonl"), "--name", "set",
               "--out_dir", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"half\n"
        assert list((tmp_path / "out").glob(".set.*.new/*.npy"))       # it was at work
        process.send_signal(signal.SIGKILL)
    folder = tmp_path / "out" / "set"
    assert contents(folder) == before if old else not folder.exists()
    result = load(prepare.main([*command[4:]]))
    assert len(result.ids) == 30

# --------------------------------------------------------------------------------------------------------- command line
@pytest.mark.parametrize("flags, word", [
    ("--input no.jsonl --name x", "no file no.jsonl"), ("--name x", "--input"), ("--input no.jsonl", "--name"),
    ("--demo --input x", "not allowed with"), ("--demo --name ../x", "plain folder name"),
    ("--demo --limit 2", "--limit 2"), ("--demo --limit 12001", "--limit 12001"),
    ("--input x --name x --limit 0", "--limit 0"),
    ("--demo --tokenizer nowhere", "nowhere: no such folder"), ("--demo --seed x", "--seed")])
def test_wrong_flags_end_in_one_line(refuse, flags, word):
    assert word in refuse(*flags.split())

def test_as_a_command(tmp_path):
    def call(*arguments):
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    missing = call("--input", "missing.jsonl", "--name", "set", "--out_dir", "out")
    assert missing.returncode == 2 and missing.stdout == "" and not (tmp_path / "out").exists()
    assert re.fullmatch("error: --input: there is no file missing.jsonl.*\n", missing.stderr)
    (tmp_path / "in.jsonl").write_text("\n".join(["{", "[]", *rows()]))
    good = call("--input", "in.jsonl", "--name", "set", "--out-dir", "out")
    assert good.returncode == 0 and good.stderr == "", good.stderr
    assert "32 rows read, 30 kept" in good.stdout and "not JSON 1, not a JSON object 1" in good.stdout

BLOCKED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
sys.modules["tokenizers"] = None
from data.text import prepare
prepare.main(["--demo", "--limit", "60", "--out_dir", sys.argv[1]])
prepare.main(["--demo", "--out_dir", sys.argv[1], "--name", "other", "--tokenizer", sys.argv[1]])
"""

def test_the_demo_needs_no_library_of_tokenizers(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    done = subprocess.run([sys.executable, "-c", BLOCKED, str(ROOT), str(tmp_path)], capture_output=True, text=True)
    assert len(load(tmp_path / "demo").ids) == 60 and not (tmp_path / "other").exists()
    assert done.returncode == 2 and "pip install tokenizers" in done.stderr and done.stderr.count("\n") == 1

# ------------------------------------------------------------------------------------------------------------- the demo
@functools.cache
def number(text, values=()):
    """The value of E = m v^2 / 2 for values, a tuple of pairs, or of (1/4)^(1/2); a blank multiplies."""
    text = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", text.split("= ")[-1].replace("^", "**"))
    return eval(text, {"sqrt": math.sqrt, "pi": math.pi} | dict(values))

VARIABLES = {(variable.quantity, variable.name): variable for variable in demo.read_formulas()}
QUANTITY, NAME = ("|".join({re.escape(pair[k]) for pair in VARIABLES}) for k in (0, 1))

def combination(asked):
    """An instruction of the demo -> (Variable, factor)."""
    times = re.search(r"doubled|tripled|halved|(multiplied by|made|divided by|cut to 1/) ?(\d+)", asked)
    factor = {"doubled": 2, "tripled": 3, "halved": 0.5}.get(times[0]) or (
        float(times[2]) if times[1] in ("multiplied by", "made") else 1 / float(times[2]))
    quantity, = re.findall(rf"the ({QUANTITY})[ ?]", asked)
    name, = re.findall(rf"[Tt]he ({NAME}) is", asked)
    return VARIABLES[quantity, name], factor

def test_the_exponents_are_those_of_the_formulas():
    variables = demo.read_formulas()
    assert len({variable.quantity for variable in variables}) >= 25
    assert {variable.exponent for variable in variables} == set(demo.EXPONENTS)
    names = [(variable.quantity, variable.name) for variable in variables]
    assert len(names) == len(set(names))
    for variable in variables:
        symbols = set(re.findall(r"\b[A-Za-z]\b", variable.formula.split("=")[1]))
        values = {symbol: 1.3 + 0.2 * k for k, symbol in enumerate(sorted(symbols))}
        assert variable.symbol in symbols
        for factor in demo.FACTORS:
            changed = values | {variable.symbol: values[variable.symbol] * float(factor)}
            ratio, one = (number(variable.formula, tuple(of.items())) for of in (changed, values))
            ratio /= one
            left, right = demo.option(factor, variable.exponent).split(" = ")
            assert number(left) == pytest.approx(ratio) and number(right) == pytest.approx(ratio), variable
    most = Counter(variable.exponent for variable in variables).most_common(1)[0][1]
    assert most < 0.25 * len(variables)             # so that the most frequent exponent is no good guess

def test_rows_of_the_demo():
    rows = demo.demo_rows()
    for entry in rows:
        variable, factor = combination(entry["instruction"])
        options, right = entry["options"], entry["options"][entry["answer"]]
        assert len(options) == len(set(options)) == 8 and entry["response"].startswith(right + "\n")
        assert not any(a != b and a.startswith(b) for a in options for b in options)
        value = factor ** float(variable.exponent)
        assert [option for option in options if math.isclose(number(option), value)] == [right]
    positions = Counter(entry["answer"] for entry in rows)
    sd = math.sqrt(len(rows) * 1 / 8 * 7 / 8)
    assert set(positions) == set(range(8)) and all(abs(n - len(rows) / 8) < 4 * sd for n in positions.values())
    texts = [PROMPT.format(entry["instruction"]) + entry["response"] + END for entry in rows]
    assert "".join(texts).isascii() and len(set(texts)) == len(texts) == demo.DEMO_ROWS
    assert 120 < np.mean([len(text) for text in texts]) < 200 and max(map(len, texts)) < 256
    reasons = {}
    for entry in rows:
        reasons.setdefault(entry["instruction"], set()).add(entry["response"])
    assert np.mean([len(found) for found in reasons.values()]) > 1.5     # one question, several answers that are right

def test_no_combination_is_in_two_splits_and_each_can_be_composed():
    where, rows = {}, demo.demo_rows()
    assert Counter(entry["split"] for entry in rows) == {"train": 6_000, "val": 400, "test": 400}
    for entry in rows:
        where.setdefault(combination(entry["instruction"]), set()).add(entry["split"])
    assert all(len(splits) == 1 for splits in where.values())
    for seed in range(20):
        splits = demo.split_combinations(random.Random(seed))
        assert [len(splits[name]) for name in ("train", "val", "test")] == [416, 52, 52]
        assert len(set(itertools.chain(*splits.values()))) == 520
        known = Counter(key for variable, factor in splits["train"] for key in (variable, (variable.exponent, factor)))
        for variable, factor in splits["val"] + splits["test"]:
            assert min(known[variable], known[variable.exponent, factor]) >= 2

def test_the_demo_is_the_same_for_the_same_seed():
    assert demo.demo_rows(200) == demo.demo_rows(200) != demo.demo_rows(200, seed=1)
    for n in (3, 17, 100, demo.MOST_ROWS):
        rows = demo.demo_rows(n)
        assert len(rows) == n == len({(entry["instruction"], entry["response"]) for entry in rows})
        assert {entry["split"] for entry in rows} == {"train", "val", "test"}
    for n in (2, demo.MOST_ROWS + 1):
        with pytest.raises(ValueError, match=f"--limit {n}"):
            demo.demo_rows(n)

def test_the_set_of_the_demo(tmp_path, capsys):
    flags = ["--demo", "--limit", "300", "--out_dir", str(tmp_path)]
    result = load(prepare.main(flags))
    rows = demo.demo_rows(300)
    assert result.splits == [entry["split"] for entry in rows] and result.meta["source"] == "demo"
    assert [Bytes().decode(ids) for ids in result.ids] == [
        PROMPT.format(entry["instruction"]) + entry["response"] + END for entry in rows]
    assert result.mc == [{"split": entry["split"], "prompt": PROMPT.format(entry["instruction"]), "options":
                          entry["options"], "answer": entry["answer"]} for entry in rows if entry["split"] != "train"]
    assert not result.rejected and not result.meta["counts"]["notes"]
    before = contents(tmp_path / "demo")
    prepare.main(flags)
    assert "already there" in capsys.readouterr().out
    prepare.main([*flags, "--force"])
    assert contents(tmp_path / "demo") == before and [path.name for path in tmp_path.iterdir()] == ["demo"]
