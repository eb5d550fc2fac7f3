"""Texts of scenes. CLIP's tokenizer: ids that transformers gives too, what is cut and padded, what is refused. What a
text encoder or a file of embeddings says of the texts, and what is wrong with it, before any picture is encoded."""
import hashlib
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_scenes import BASE, FIXTURES, build, entries, entry, rectangle, replace, saved, write_rows

from data.scenes import prepare
from data.scenes.tokens import load_tokenizer

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


# --------------------------------------------------------------------------------------------------------- embeddings
def embeddings(path, texts, width=24, **more):
    tensors = {"context": torch.randn(len(texts), 5, width, generator=torch.Generator().manual_seed(1))} | more
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    path.with_suffix(".json").write_text(json.dumps(texts))
    return path


ALL = ["red box", "a cat 0", "", "a cat 1", "a cat 2"]


def numbers(n, width, seed=2):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def test_embeddings_of_a_file_stand_for_the_text_encoder(tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(BASE, base, ignore=shutil.ignore_patterns("text_encoder", "tokenizer"))
    pooled, phrases = numbers(5, 24), numbers(5, 24, 3)
    path = embeddings(tmp_path / "e.safetensors", ALL, pooled=pooled)
    result = build(tmp_path, entries(4), "--embeddings", path, base=base)
    context = load_file(path)["context"].half().numpy()
    assert result.texts["captions"] == ["", "a cat 0", "a cat 1", "a cat 2"]
    assert np.array_equal(result.contexts, context[[2, 1, 3, 4]]) and result.meta["caption_tokens"] == 5
    assert np.array_equal(result.phrases, pooled.half().numpy()[[0]]) and not (result.folder / "pooled.npy").exists()
    assert result.meta["base"]["text_encoder"] == hashlib.sha256(path.read_bytes()).hexdigest()
    embeddings(path, ALL, pooled=pooled, phrases=phrases)
    with pytest.raises(SystemExit):
        build(tmp_path, entries(4), "--embeddings", path, base=base, force=False)
    assert "(what differs: texts)" in capsys.readouterr().err
    other = build(tmp_path, entries(4), "--embeddings", path, base=base)
    assert np.array_equal(other.phrases, phrases.half().numpy()[[0]])
    path.with_suffix(".json").write_text(json.dumps(ALL[::-1]))
    other = build(tmp_path, entries(4), "--embeddings", path, base=base)
    assert np.array_equal(other.phrases, phrases.half().numpy()[[4]]) and other.meta["base"]["embeddings"] is True
    path.with_suffix(".json").write_text(json.dumps(ALL))
    values = load_file(path)["context"]
    values[0] = torch.nan                           # what a phrase would be as a caption nobody asks
    embeddings(path, ALL, context=values, phrases=phrases)
    assert np.isfinite(build(tmp_path, entries(4), "--embeddings", path, base=base).contexts).all()


@pytest.mark.parametrize("make, word", [
    (lambda path: embeddings(path, ALL[:2] + ["x"], phrases=numbers(3, 24)),
     "e.safetensors lacks 3 of 5 texts: '', 'a cat 1', 'a cat 2'"),
    (lambda path: embeddings(path, ["y"], phrases=numbers(1, 24)),
     "lacks 5 of 5 texts: '', 'a cat 0', 'a cat 1' and 2 more"),
    (lambda path: embeddings(path, ALL), "neither a tensor phrases nor pooled"),
    (lambda path: embeddings(path, ALL, context=None, phrases=numbers(5, 24)), "has no tensor context, only phrases"),
    (lambda path: embeddings(path, ALL, phrases=numbers(4, 24)),
     "phrases is [4, 24], not of 2 dimensions, the first of them 5"),
    (lambda path: embeddings(path, ALL, context=numbers(5, 24), phrases=numbers(5, 24)),
     "context is [5, 24], not of 3 dimensions"),
    (lambda path: embeddings(path, ALL, 23, phrases=numbers(5, 24)),
     "e.safetensors has context of width 23, the UNet takes 24"),
    (lambda path: embeddings(path, ALL, phrases=numbers(5, 25)), "has phrases of width 25, the UNet takes 24"),
    (lambda path: embeddings(path, ALL[:4] + ["a cat 1 "], phrases=numbers(5, 24)), "e.json: 1 texts are there twice"),
    (lambda path: embeddings(path, ALL, phrases=numbers(5, 24)).with_suffix(".json").write_text("{}"),
     "e.json holds no list of texts"),
    (lambda path: embeddings(path, ALL, phrases=numbers(5, 24)).with_suffix(".json").unlink(), "e.json cannot be read"),
    (lambda path: path.write_text("x"), "e.json cannot be read"),
    (lambda path: embeddings(path, ALL, phrases=numbers(5, 24) * 1e6),
     "the phrases of 'red box' is not finite in float16"),
    (lambda path: embeddings(path, ALL, context=torch.eye(5)[..., None].expand(5, 5, 24) / (torch.arange(5) != 3)[
        :, None, None], phrases=numbers(5, 24)), "the context of 'a cat 1' is not finite in float16")])
def test_embeddings_that_do_not_fit(tmp_path, refuse, monkeypatch, make, word):
    monkeypatch.setattr(prepare, "encode_pictures", None)            # all of it is said before the pictures
    make(path := tmp_path / "e.safetensors")
    rows = write_rows(tmp_path, entries(4))
    assert word in refuse("--base", BASE, "--input", rows, "--boxes", "unit", "--name", "x", "--embeddings", path,
                          "--workers", 1)


def test_a_damaged_text_encoder_is_told_before_the_pictures(tmp_path, refuse, monkeypatch):
    monkeypatch.setattr(prepare, "encode_pictures", None)
    shutil.copytree(BASE, base := tmp_path / "base")
    tensors = load_file(path := base / "text_encoder" / "model.safetensors")
    name = sorted(tensors)[-1]
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    rows = write_rows(tmp_path, entries(3))
    error = refuse("--base", base, "--input", rows, "--boxes", "unit", "--name", "x", "--workers", 1)
    assert "1 missing: " in error and str(path.parent) in error


def test_a_base_shaped_as_sdxl(tmp_path, refuse):
    base = tmp_path / "base"
    shutil.copytree(FIXTURES / "kolors", base)      # encoder_hid_proj takes 28, text_embeds 20, attention sees 24
    shutil.copytree(BASE / "vae", base / "vae")
    saved(tmp_path / "raw" / "1.png", rectangle(64, 36, (0, 0, 9, 9)))
    path = write_rows(tmp_path, entries(4))
    given = ["--base", base, "--input", path, "--boxes", "unit", "--name", "x", "--workers", 1]
    assert "takes pooled text" in refuse(*given) and "--embeddings" in refuse(*given)
    file = embeddings(tmp_path / "e.safetensors", ALL, 28, phrases=numbers(5, 24))
    assert "has pooled of width none at all, the UNet takes 20" in refuse(*given, "--embeddings", file)
    embeddings(file, ALL, 28, pooled=numbers(5, 20))
    assert "has phrases of width 20, the UNet takes 24" in refuse(*given, "--embeddings", file)
    embeddings(file, ALL, 24, pooled=numbers(5, 20), phrases=numbers(5, 24))
    assert "has context of width 24, the UNet takes 28" in refuse(*given, "--embeddings", file)
    embeddings(file, ALL, 28, pooled=numbers(5, 20) * 1e6, phrases=numbers(5, 24))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "encode_pictures", None)
        assert "the pooled of '' is not finite in float16" in refuse(*given, "--embeddings", file)
    embeddings(file, ALL, 28, pooled=numbers(5, 20), phrases=numbers(5, 24, 3))
    result = build(tmp_path, path, "--embeddings", file, base=base)
    assert result.contexts.shape == (4, 5, 28) and result.phrases.shape == (1, 24)
    assert np.array_equal(result.pooled, numbers(5, 20).half().numpy()[[2, 1, 3, 4]])
    assert result.pooled.dtype == np.float16
    # of 64 x 36 at 18 / 36, (64 - 36) / 2 / 2 = 7 columns are cut on the left; of 30 x 24 at 18 / 24, 3 * 0.75
    assert result.time_ids.dtype == np.float32
    assert result.time_ids[:2].tolist() == [[24, 30, 0, 2, 18, 18], [36, 64, 0, 7, 18, 18]]
    tall = build(tmp_path, path, "--embeddings", file, "--aspect", "pad", base=base)
    assert tall.time_ids[1].tolist() == [36, 64, 0, 0, 18, 18]


def test_blanks_and_accents_of_captions_and_phrases_are_made_plain(tmp_path):
    spelt = ["a  caf\u00e9\n", " a cafe\u0301", "a\u00a0caf\u00e9"]
    rows = [entry(k, text, [{"name": text, "bbox": [0.3, 0.25, 0.7, 0.75]}], split="train" if k else "val")
            for k, text in enumerate(spelt)]
    for flags in ([], ["--embeddings", embeddings(tmp_path / "e.safetensors", ["", spelt[1]], phrases=numbers(2, 24))]):
        result = build(tmp_path, rows, *flags)
        assert result.texts == {"captions": ["", "a caf\u00e9"], "phrases": ["a caf\u00e9"]}
        assert result.caption.tolist() == [1, 1, 1] and result.phrase[:, 0].tolist() == [0, 0, 0]
    assert len(build(tmp_path, [rows[0], rows[1] | {"image_path": "./0.png"}, rows[2]]).latents) == 2


def test_a_text_encoder_of_fewer_positions_shortens_the_captions(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    path = base / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 5}))
    path = base / "text_encoder" / "model.safetensors"
    save_file({name: (tensor[:5] if "position_embedding" in name else tensor).contiguous()
               for name, tensor in load_file(path).items()}, path)
    result = build(tmp_path, entries(4), base=base)
    assert result.contexts.shape[1] == result.meta["caption_tokens"] == 5 and not result.meta["counts"]["notes"]
