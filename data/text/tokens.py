"""Tokenizers of language models: a tokenizer.json by the library `tokenizers`, or bytes where there is none.

Both kinds have size (the highest id + 1), eos (int or None), vocab (dict id -> token), fingerprint (hex sha256 of what
decides the ids), encode, encode_batch, decode, decode_batch and save.
"""
import hashlib
import json
from pathlib import Path

PROMPT, END = "### Instruction:\n{}\n\n### Response:\n", "\n\n### End\n"
PROBES = ["", PROMPT.format("How far?") + "9 times" + END, "  two  blanks\tand a tab \n\n\n new lines\r\n",
          "don't we'll I'M", "3.14159 1,000,000 2026-01-31 0x1F 1e-5 50%",
          "def f(x):\n    return {'a': [x ** 2, -x]}  # why?\n",
          "Gr\u00f6\u00dfe na\u00efve \u0395\u03bb\u03bb \u0440\u0443\u0441 \u4e2d\u6587\u5b57 \u65e5\u672c\u8a9e "
          "\u0627\u0644 \U0001f600\U0001f468\u200d\U0001f469 \u00bd \u221a2 \u2264 \ufb01",
          "e\u0301 \u00e9 \u212b \uff21 A\u00a0B\u3000C",
          "CamelCase snake_case UPPER a-b a/b user@host.org https://x.y/z?q=1",
          "<s></s><pad><unk><|endoftext|><|im_start|><|im_end|>"]
OTHERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt",
          "tiktoken.model", "qwen.tiktoken", "tokenizer_config.json")

class Bytes:
    """Ids 0 to 255 are the bytes of UTF-8, 256 ends a text."""
    size, eos, specials, unknown = 257, 256, frozenset([256]), None
    vocab = {i: f"<0x{i:02X}>" for i in range(256)} | {256: "<eos>"}
    fingerprint = hashlib.sha256(b"bytes 256 eos 256").hexdigest()
    name = "bytes"

    def encode(self, text):
        """str -> (list of ids, list of (start, end) in characters)."""
        if text.isascii():
            return list(text.encode()), [(i, i + 1) for i in range(len(text))]
        return list(text.encode()), [(i, i + 1) for i, letter in enumerate(text) for _ in letter.encode()]

    def encode_batch(self, texts):
        return list(map(self.encode, texts))

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def decode_batch(self, rows):
        return list(map(self.decode, rows))

    def save(self, folder):
        pass                                        # a folder without a tokenizer means bytes

class Tokenizer:
    """A tokenizer.json, given as text. What it says about cutting and padding is switched off."""
    name = "tokenizer.json"

    def __init__(self, text, eos=None, config=None):
        """eos: id, or None. config: dict, what tokenizer_config.json holds. Raises ValueError."""
        try:
            import tokenizers
        except ImportError:
            raise ValueError("a tokenizer.json needs the library tokenizers: pip install tokenizers") from None
        parts = json.loads(text)
        untrimmed(parts.get("post_processor"))
        try:
            self.inner = tokenizers.Tokenizer.from_str(json.dumps(parts))
        except Exception as error:                  # the library raises nothing more special
            raise ValueError(f"the library tokenizers cannot read it: {error}") from None
        self.inner.no_truncation()
        self.inner.no_padding()
        self.text, self.config, self.eos = text, dict(config or {}), eos
        self.vocab = {i: token for token, i in self.inner.get_vocab(with_added_tokens=True).items()}
        self.size = max(self.vocab, default=-1) + 1
        if self.size > 2 ** 24:                     # the library counts up to it, whether or not these are there
            raise ValueError(f"it has an id {self.size - 1:,}, but {len(self.vocab):,} tokens")
        self.parts = json.loads(self.inner.to_str())                 # as the library writes it
        added = self.parts["added_tokens"]
        self.specials = frozenset(token["id"] for token in added if token["special"])
        unknown = self.parts["model"].get("unk_token")
        self.unknown = self.inner.token_to_id(unknown) if unknown else self.parts["model"].get("unk_id")
        decisive = {name: value for name, value in self.parts.items() if name not in ("version", "decoder")}
        self.fingerprint = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def encode(self, text):
        """str -> (list of ids, list of (start, end) in characters); (0, 0) is what the tokenizer itself adds."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        try:
            return [(row.ids, row.offsets) for row in self.inner.encode_batch(texts)]
        except Exception as error:                  # such as an unknown word where no token stands for these
            raise ValueError(f"the tokenizer fails: {error}") from None

    def decode(self, ids):
        return self.inner.decode(list(ids), skip_special_tokens=False)

    def decode_batch(self, rows):
        return self.inner.decode_batch([list(ids) for ids in rows], skip_special_tokens=False)

    def save(self, folder):
        config = self.config | ({} if self.eos is None else {"eos_token": self.vocab[self.eos]})
        (Path(folder) / "tokenizer.json").write_text(self.text, encoding="utf-8", newline="\n")
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

def untrimmed(processor):
    """Switch off trim_offsets in a post-processor: a token is to own its blanks and line ends, or nobody would."""
    if isinstance(processor, dict):
        if "trim_offsets" in processor:
            processor["trim_offsets"] = False
        for part in processor.get("processors", ()):
            untrimmed(part)

def read_json(path):
    """A JSON object from a file, {} if there is none. Raises ValueError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found

def load_tokenizer(folder):
    """The tokenizer of a Hugging Face folder, or of a prepared data set; Bytes if it has none. Raises ValueError."""
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not path.is_file():
        if found := [name for name in OTHERS if (folder / name).exists()]:
            raise ValueError(f"{folder} has {', '.join(found)} but no tokenizer.json; make one: python -c \"from "
                             f"transformers import AutoTokenizer as A; A.from_pretrained('{folder}')"
                             f".save_pretrained('{folder}')\"")
        return Bytes()
    config, read = read_json(folder / "tokenizer_config.json"), read_json(path)
    if not isinstance(read.get("model"), dict):
        raise ValueError(f"{path} is no tokenizer: it has no model")
    try:
        found = Tokenizer(path.read_text(encoding="utf-8"), None, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    token = config.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None:
        found.eos = next((i for i, known in found.vocab.items() if known == token), None)
        if found.eos is None:
            raise ValueError(f"{folder}/tokenizer_config.json: the eos_token {token!r} is not in tokenizer.json")
        return found
    for name in ("config.json", "generation_config.json"):
        eos = read_json(folder / name).get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) and eos else eos
        if eos is not None and eos != []:
            if type(eos) is not int or eos not in found.vocab:
                raise ValueError(f"{folder / name}: the eos_token_id {eos!r} is no id of tokenizer.json, which has "
                                 f"{found.size:,}")
            found.eos = eos
            return found
    return found

def differing(what, one, other, names):
    """Raise ValueError if two lists of equal length differ: in how many places, and three of them."""
    places = [i for i, (a, b) in enumerate(zip(one, other)) if a != b]
    if places:
        shown = ", ".join(f"{i}: {one[i]!r} and {other[i]!r}" for i in places[:3])
        raise ValueError(f"{names[0]} and {names[1]} have different tokenizers: {len(places):,} of {len(one):,} {what} "
                         f"differ, as {shown}")

def shared_size(one, other, names=("teacher", "student")):
    """How many ids two tokenizers share: all below mean the same token in both, and both encode alike.

    Further ids at the end of one of them are allowed. Raises ValueError: how many ids or merges differ, which text is
    encoded differently."""
    n = min(one.size, other.size)
    differing("ids", *([tokenizer.vocab.get(i) for i in range(n)] for tokenizer in (one, other)), names)
    if isinstance(one, Bytes) or isinstance(other, Bytes):
        if type(one) is not type(other):
            raise ValueError(f"{names[0]} and {names[1]} have different tokenizers: {one.name} and {other.name}")
        return n
    first, second = one.parts["model"], other.parts["model"]
    if first["type"] != second["type"]:
        raise ValueError(f"{names[0]} and {names[1]} have different tokenizers: {first['type']} and {second['type']}")
    for what, key in (("merges", "merges"), ("scores", "vocab" if first["type"] == "Unigram" else "")):
        lists = [model.get(key) or [] for model in (first, second)]
        m = max(map(len, lists)) if key == "merges" else min(map(len, lists))
        differing(what, *(rows[:m] + [None] * (m - len(rows)) for rows in lists), names)
    for probe in PROBES:
        a, b = (tokenizer.encode(probe)[0] for tokenizer in (one, other))
        # where only one has a token for <|im_end|>, that text is not encoded alike, and need not be
        if a != b and max(a + b, default=0) < n:
            raise ValueError(f"{names[0]} and {names[1]} have different tokenizers: {probe[:40]!r} is {a[:8]} ... and "
                             f"{b[:8]} ...")
    return n
