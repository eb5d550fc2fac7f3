"""CLIP's tokenizer: ids that transformers gives too, what is cut and padded, what is refused."""
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from data.scenes.tokens import load_tokenizer

BASE = Path(__file__).parent / "fixtures" / "scenes" / "sd1"
START, END = "<|startoftext|>", "<|endoftext|>"


def test_the_tokenizer_of_the_fixture_gives_what_transformers_gave():
    texts, wanted = zip(*json.loads((BASE / "tokenizer" / "golden.json").read_text()))
    for folder in (BASE, BASE / "tokenizer"):
        ids, cut = load_tokenizer(folder)(texts)
        assert ids.dtype == np.int64 and ids.tolist() == list(wanted)
        assert [text for text, was in zip(texts, cut) if was] == ["green" * 3]
    assert len(set(map(tuple, ids.tolist()))) == len(texts) - 1                  # that one letter nobody knows
    tokenizer = load_tokenizer(BASE)
    assert (tokenizer.length, tokenizer.size, tokenizer.start, tokenizer.end, tokenizer.pad) == (12, 99, 97, 98, 98)
    short, cut = tokenizer(["a red cat", "a red"], 4)
    assert short.tolist() == [[97, 26, 58, 98], [97, 26, 58, 98]] and cut == [True, False]


def clip_folder(folder, config=None, special=None):
    """CLIP's 512 symbols for bytes, in its order, and some merges."""
    alphabet = sorted(pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("'", "s</w>"), ("t", "h"), ("th", "e</w>"), ("\u00c3", "\u00a9</w>"),
              ("l", "l</w>"), ("!", "!</w>"), ("\u00e4", "\u00b8"), ("o", "o")]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    default = {"bos_token": START, "eos_token": {"__type": "AddedToken", "content": END}, "unk_token": END,
               "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77} | default | (config or {})))
    if special:
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


TEXTS = ["", "The cat's here!", "the  cat\tTHE\n\nCAT ", "it's he'll I'M we've don't y'all 'tis",
         "3.14159 = 2^10 + 7,000",
         "Gr\u00f6\u00dfe na\u00efve caf\u00e9 cafe\u0301 \u00c9T\u00c9 \u0130stanbul",
         "\U0001f600\U0001f468\u200d\U0001f469 ok!! !!",
         "\u4e2d\u6587\u5b57 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0627\u0644 \u65e5\u672c \u0e01\u0e34",
         "a-b_c/d\\e (f) [g] {h} \"i\" #j @k $5 50% & ~", "A\u00a0B\u3000C \ufb01 \u00bd \u2460 x\u00b2",
         f"a {START} b{END}c", "<|ENDOFTEXT|> <s>", "word " * 90, "!" * 200, " ! "]


@pytest.mark.parametrize("config, special", [
    ({}, None), ({}, {"pad_token": "!"}), ({"model_max_length": 9}, {"pad_token": {"content": "!"}}),
    ({"pad_token": "!", "model_max_length": 10**30}, None), ({"added_tokens_decoder": {}}, {"pad_token": "!"})])
def test_the_same_ids_as_transformers(tmp_path, config, special):
    transformers = pytest.importorskip("transformers")
    folder = clip_folder(tmp_path / "tokenizer", config, special)
    theirs, ours = transformers.CLIPTokenizer.from_pretrained(folder), load_tokenizer(tmp_path)
    wanted = theirs(TEXTS, padding="max_length", truncation=True, max_length=ours.length)["input_ids"]
    whole = [len(ids) for ids in theirs(TEXTS)["input_ids"]]
    ids, cut = ours(TEXTS)
    assert ours.length == min(77, config.get("model_max_length", 77)) and ids.shape == (len(TEXTS), ours.length)
    for text, one, other in zip(TEXTS, ids.tolist(), wanted):
        assert one == other, text
    assert cut == [n > ours.length for n in whole] and sum(cut) >= 2


def test_a_tokenizer_json_alone_and_the_pad_token_of_sd2(tmp_path):
    plain = load_tokenizer(clip_folder(tmp_path / "plain"))
    other = load_tokenizer(clip_folder(tmp_path / "sd2", special={"pad_token": "!"}))
    one, two = (tokenizer(["cat!"], 6)[0] for tokenizer in (plain, other))
    assert one.tolist() == [[522, 513, 256, 523, 523, 523]]          # "!" at the end of a word, then padding
    assert two.tolist() == [[522, 513, 0, 523, 0, 0]]
    plain.inner.save(str(tmp_path / "tokenizer.json"))
    again = load_tokenizer(tmp_path)
    assert again(TEXTS)[0].tolist() == plain(TEXTS)[0].tolist() and again.fingerprint == plain.fingerprint
    assert len({plain.fingerprint, other.fingerprint, load_tokenizer(BASE).fingerprint}) == 3


def replace(name, old, new):
    def change(folder):
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")
    return change


@pytest.mark.parametrize("change, word", [
    (lambda folder: (folder / "merges.txt").unlink(), r"merges.txt cannot be read"),
    (lambda folder: (folder / "vocab.json").unlink(), "neither vocab.json and merges.txt nor tokenizer.json"),
    (lambda folder: (folder / "vocab.json").write_text("[1]"), "vocab.json is cut off, damaged or of another kind"),
    (replace("vocab.json", '"cat</w>": 513', '"cat</w>": "x"'), "vocab.json: the id of 'cat</w>' is 'x'"),
    (replace("vocab.json", '"cat</w>": 513', '"cat</w>": 5'), "vocab.json: 524 tokens share 523 ids"),
    (replace("vocab.json", '"cat</w>"', '"hat</w>"'), "vocab.json lacks 'cat</w>', which a merge of 'ca' and 't</w>'"),
    (replace("vocab.json", START, "<s>"), "vocab.json lacks '<|startoftext|>', the bos_token"),
    (replace("merges.txt", "ca t</w>", "ca t </w>"), "merges.txt, line 3: 'ca t </w>' is no merge"),
    (replace("tokenizer_config.json", "77", '"long"'), "tokenizer_config.json: model_max_length is 'long'"),
    (lambda folder: ((folder / "vocab.json").unlink(), (folder / "tokenizer.json").write_text('{"model": {"type": '
     '"Unigram", "vocab": []}}')), "tokenizer.json is no tokenizer of CLIP")])
def test_what_is_wrong_with_a_tokenizer_is_named(tmp_path, change, word):
    folder = clip_folder(tmp_path / "tokenizer")
    load_tokenizer(tmp_path)
    change(folder)
    with pytest.raises(ValueError, match=re.escape(word)):
        load_tokenizer(tmp_path)


def test_without_the_library_tokenizers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="vocab.json: .* pip install tokenizers"):
        load_tokenizer(BASE)
