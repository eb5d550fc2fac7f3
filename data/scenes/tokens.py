"""CLIP's tokenizer, lower-case byte-level BPE whose words end in </w>, of a diffusers folder.

    load_tokenizer(folder)(["a red circle"]) -> ids (1, 77): start, a, red, circle, end, padding ...; [False]
"""
import hashlib
import json
from pathlib import Path

import numpy as np

from data.weights import whole

LONGEST = 77                                        # positions of every CLIP text encoder
START, END = "<|startoftext|>", "<|endoftext|>"
# what a text is cut into before BPE: either special token, an ending after an apostrophe, letters, one digit, the rest
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
NAMES = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}


class Tokenizer:
    """vocab: dict token -> id; merges: list of (left, right); special: dict like NAMES. Raises ValueError."""

    def __init__(self, vocab, merges, special, length=LONGEST):
        try:
            import tokenizers as t
        except ImportError:
            raise ValueError("captions are cut into tokens by the library tokenizers: pip install tokenizers") from None
        try:
            model = t.models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="</w>",
                                 fuse_unk=False, unk_token=special["unk_token"])
        except Exception as error:                  # the library raises nothing more special
            raise ValueError(f"the library tokenizers cannot use vocabulary and merges: {error}") from None
        self.inner = t.Tokenizer(model)
        self.inner.normalizer = t.normalizers.Sequence([
            t.normalizers.NFC(), t.normalizers.Replace(t.Regex(r"\s+"), " "), t.normalizers.Lowercase()])
        self.inner.pre_tokenizer = t.pre_tokenizers.Sequence([
            t.pre_tokenizers.Split(t.Regex(PIECES), "removed", invert=True),
            t.pre_tokenizers.ByteLevel(add_prefix_space=False)])
        # the pad token too is found inside a text: SD2's is "!", and "look!" ends in id 0 there
        self.inner.add_special_tokens(list(dict.fromkeys(special.values())))
        self.start, self.end, self.unknown, self.pad = (vocab[special[name]] for name in NAMES)
        self.size, self.length = max(vocab.values()) + 1, length
        decisive = json.dumps([sorted(vocab.items()), merges, special, length])
        self.fingerprint = hashlib.sha256(decisive.encode()).hexdigest()

    def __call__(self, texts, length=None):
        """list of str -> ids (B, length) int64, list of B bools: was it cut? length: self.length, or what is given."""
        length = length or self.length
        assert length >= 2, length
        ids, cut = np.full((len(texts), length), self.pad, np.int64), []
        for row, found in enumerate(self.inner.encode_batch(list(texts), add_special_tokens=False)):
            kept = [self.start, *found.ids[:length - 2], self.end]
            ids[row, :len(kept)] = kept
            cut.append(len(found.ids) > length - 2)
        return ids, cut


def read_merges(path):
    """merges.txt -> list of (left, right). Raises ValueError."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    merges = []
    for number, line in enumerate(lines, 1):
        pair = tuple(line.rstrip("\r").split(" "))
        if number == 1 and line.startswith("#version") or line.strip() == "":
            continue
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"{path}, line {number}: {line!r:.60} is no merge of two tokens")
        merges.append(pair)
    return merges


def read_vocabulary(folder):
    """-> (dict token -> id, list of merges, the file's path) of vocab.json and merges.txt, else of tokenizer.json."""
    path = folder / "vocab.json"
    if path.is_file():
        vocab, merges = whole(path), read_merges(folder / "merges.txt")
    elif (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        parts = whole(path)
        model = parts.get("model") if isinstance(parts.get("model"), dict) else {}
        if model.get("end_of_word_suffix") != "</w>" or not isinstance(model.get("vocab"), dict):
            raise ValueError(f"{path} is no tokenizer of CLIP: its model is no BPE whose words end in </w>")
        added, merges = parts.get("added_tokens") or [], model.get("merges")
        if not isinstance(merges, list) or not isinstance(added, list) or not all(
                isinstance(token, dict) and isinstance(token.get("content"), str) for token in added):
            raise ValueError(f"{path} has no list of merges, or of added_tokens")
        vocab = {token["content"]: token.get("id") for token in added} | model["vocab"]
        merges = [tuple(pair.split(" ")) if isinstance(pair, str) else pair for pair in merges]
        if odd := [pair for pair in merges if not isinstance(pair, (tuple, list)) or [*map(type, pair)] != [str, str]]:
            raise ValueError(f"{path}: {odd[0]!r:.60} is no merge of two tokens")
        merges = [*map(tuple, merges)]
    else:
        others = sorted(item.name for item in folder.glob("*.model"))
        raise ValueError(f"{folder} has neither vocab.json and merges.txt nor tokenizer.json"
                         + (f", but {others[0]}: no tokenizer of CLIP" if others else ""))
    if bad := [token for token, i in vocab.items() if type(i) is not int or i < 0]:
        raise ValueError(f"{path}: the id of {bad[0]!r:.60} is {vocab[bad[0]]!r:.60}, not a whole number from 0")
    if not vocab or len(set(vocab.values())) < len(vocab):
        raise ValueError(f"{path}: {len(vocab):,} tokens share {len(set(vocab.values())):,} ids")
    for left, right in merges:
        if missing := [token for token in (left, right, left + right) if token not in vocab]:
            raise ValueError(f"{path} lacks {missing[0]!r:.60}, which a merge of {left!r:.60} and {right!r:.60} needs")
    return vocab, merges, path


def optional(path):
    return whole(path) if path.is_file() else {}


def load_tokenizer(folder):
    """folder: a diffusers model, or its tokenizer folder -> Tokenizer. ValueError names the file and what is wrong."""
    folder = Path(folder)
    folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    vocab, merges, path = read_vocabulary(folder)
    config = optional(folder / "tokenizer_config.json")
    older = {} if "added_tokens_decoder" in config else optional(folder / "special_tokens_map.json")
    special = {}
    for name, default in NAMES.items():
        token = older.get(name) or config.get(name) or default
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str) or token not in vocab:
            raise ValueError(f"{path} lacks {token!r:.60}, the {name}")
        special[name] = token
    length = config.get("model_max_length") or LONGEST
    if type(length) not in (int, float) or not 2 <= length:          # 1e30 stands for "any"
        raise ValueError(f"{folder / 'tokenizer_config.json'}: model_max_length is {length!r:.60}, not at least 2")
    try:
        return Tokenizer(vocab, merges, special, int(min(length, LONGEST)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
