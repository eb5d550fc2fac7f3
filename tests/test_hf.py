"""Hugging Face folders: logits of small reference models (tests/fixtures/make_hf.py) and what moves them, what is
refused, what is written; where transformers is installed, random models both ways.
"""
import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_distill
from data.text import hf
from data.text.hf import SIZES, read_config, read_weights, rope_frequencies, shape_of, write_folder

FIXTURES = Path(__file__).parent / "fixtures" / "hf"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
CLOSE = 2e-5                                        # the GELU kinds are further apart than 2e-4


def logits_of(folder, x, V):
    with torch.no_grad():
        return train_distill.load_hf(folder)(x)[..., :V]


def reference(name):
    ref = load_file(FIXTURES / name / "ref.safetensors")
    return ref["input_ids"], ref["logits"]


def distance(name, folder):
    """Largest difference between the logits of the reference and of a folder."""
    x, logits = reference(name)
    return float((logits_of(folder, x, logits.shape[-1]) - logits).abs().max())


def read(folder, dtype=torch.float32):
    raw = read_config(folder)
    return raw, read_weights(folder, shape_of(raw), dtype)


@pytest.fixture
def copy(tmp_path):
    """copy(name, **keys of config.json) -> a fixture's folder that may be changed."""
    def make(name, **keys):
        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(FIXTURES / name, folder)
        raw = json.loads((folder / "config.json").read_text()) | keys
        (folder / "config.json").write_text(json.dumps(raw))
        return folder
    return make


def change(folder, **tensors):
    """Replace tensors of model.safetensors, with __ for the dots of a name; None removes one."""
    stored = load_file(folder / "model.safetensors") | {name.replace("__", "."): t for name, t in tensors.items()}
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, folder / "model.safetensors")
    return folder


# ------------------------------------------------------------------------------------------------------------- logits
@pytest.mark.parametrize("name", NAMES)
def test_logits_of_the_reference(name):
    x, logits = reference(name)
    assert logits.shape == (*x.shape, 97) and logits.abs().max() > 3 and distance(name, FIXTURES / name) < CLOSE


def fill(pattern, value=0.0):
    return lambda tensors, shape: {name: torch.full_like(t, value) for name, t in tensors.items() if pattern in name}


def interleave(tensors, shape):
    """q and k as if rope turned neighbours, not halves."""
    order = torch.arange(shape.head_dim).view(2, -1).T.flatten()
    rows = torch.arange((shape.heads + 2 * shape.kv_heads) * shape.head_dim)
    turned = rows.view(-1, shape.head_dim)[:, order].flatten()
    rows = torch.where(rows < (shape.heads + shape.kv_heads) * shape.head_dim, turned, rows)
    return {name: tensor[rows] for name, tensor in tensors.items() if ".qkv." in name}


def tile(tensors, shape):
    """Query heads in the order in which repeating k and v as a whole would give them their keys."""
    heads = torch.arange(shape.heads).view(shape.kv_heads, -1).T.flatten()
    inside = torch.arange(shape.heads * shape.head_dim).view(shape.heads, -1)[heads].flatten()
    changed = {}
    for name, tensor in tensors.items():
        if ".qkv." in name:
            changed[name] = torch.cat([tensor[inside], tensor[len(inside):]])
        if ".out.weight" in name:
            changed[name] = tensor[:, inside]
    return changed


MUTATIONS = {                                       # what is got wrong: fixture, keys of config.json, tensors
    "GELU by erf": ("gpt2_tanh", {"activation_function": "gelu"}, None),
    "GELU by tanh": ("gpt2_erf", {"activation_function": "gelu_new"}, None),
    "LayerNorm eps": ("gpt2_erf", {"layer_norm_epsilon": 1e-5}, None),
    "RMSNorm eps": ("mistral", {"rms_norm_eps": 1e-3}, None),
    "scale by layer": ("gpt2_erf", {"scale_attn_by_inverse_layer_idx": False}, None),
    "tied head of gpt2": ("gpt2_erf", {"tie_word_embeddings": True}, None),
    "tied head of llama": ("llama_mha", {"tie_word_embeddings": True}, None),
    "rope theta": ("mistral", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, None),
    "older rope theta": ("qwen2", {"rope_theta": 1e4}, None),
    "linear rope dropped": ("llama_linear", {"rope_scaling": None}, None),
    "llama3 rope dropped": ("llama3_gqa", {"rope_parameters": None}, None),
    "llama3 rope as linear": ("llama3_gqa", {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, None),
    "q and k norm dropped": ("qwen3", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, None),
    "weights of q norm": ("qwen3", {}, fill("q_norm", 1.0)), "weights of k norm": ("qwen3", {}, fill("k_norm", 1.0)),
    "weights of the norms": ("qwen3", {}, fill("norm1", 1.0)), "gate and up": ("llama_mha", {}, lambda tensors, shape: {
        name: torch.cat(t.chunk(2)[::-1]) for name, t in tensors.items() if ".up." in name}),
    "square c_proj transposed": ("gpt2_tanh", {}, lambda tensors, shape: {
        name: t.T.contiguous() for name, t in tensors.items() if ".out.weight" in name}),
    "positions": ("gpt2_tanh", {}, fill("position")),
    "interleaved rope": ("llama_mha", {}, interleave), "interleaved rope, gqa": ("mistral", {}, interleave),
    "tiled k and v": ("llama3_gqa", {}, tile), "tiled k and v of mistral": ("mistral", {}, tile),
    **{f"{part} bias of {name}": (name, {}, fill(f"{part}.bias")) for name, parts in {
        "gpt2_tanh": "qkv out up down norm1 norm2 norm", "llama3_gqa": "qkv out up down", "qwen2": "qkv"}.items()
        for part in parts.split()}}


@pytest.mark.parametrize("what", MUTATIONS)
def test_what_is_got_wrong_moves_the_logits(what, tmp_path):
    name, keys, mutate = MUTATIONS[what]
    raw, tensors = read(FIXTURES / name)
    changed = mutate(tensors, shape_of(raw)) if mutate else {}
    assert bool(changed) == bool(mutate) and all(changed[key].shape == tensors[key].shape for key in changed)
    tensors |= changed
    shape = shape_of(raw | keys)
    write_folder(tmp_path, raw | keys, shape, {key: tensors[key] for key in hf.layout(shape)})
    assert distance(name, tmp_path) > 1e-3


# -------------------------------------------------------------------------------------------------------- config.json
def test_absent_keys_mean_what_the_library_means():
    for kind, numbers in {"gpt2": (50257, 1024, 768, 12, 12, 12, 64, 3072, 1e-5, "gelu_tanh", True),
                          "llama": (32000, 2048, 4096, 32, 32, 32, 128, 11008, 1e-6, "silu", False),
                          "mistral": (32000, 4096, 4096, 32, 32, 8, 128, 14336, 1e-6, "silu", False),
                          "qwen2": (151936, 32768, 4096, 32, 32, 32, 128, 22016, 1e-6, "silu", False),
                          "qwen3": (151936, 32768, 4096, 32, 32, 32, 128, 22016, 1e-6, "silu", False)}.items():
        raw = {"model_type": kind} | ({"max_position_embeddings": 4096} if kind == "mistral" else {})
        shape = shape_of(raw)
        assert dataclasses.astuple(shape)[1:12] == numbers
        assert shape.rope == (() if kind == "gpt2" else ("default", 10000.0, 1.0, 0.0, 1.0, 0))
        assert (shape.qkv_bias, shape.out_bias, shape.mlp_bias, shape.qk_norm) == (
            kind in ("gpt2", "qwen2"), kind == "gpt2", kind == "gpt2", kind == "qwen3")
        for name in hf.KINDS:
            if hf.KINDS[name] == kind:
                assert shape_of(raw | {"architectures": [name]}) == shape
                assert shape_of(raw | {"architectures": [name], "model_type": None}) == shape
    small = {"hidden_size": 64, "num_attention_heads": 4}
    assert shape_of({"model_type": "qwen3", **small, "num_key_value_heads": 2}).head_dim == 128
    small |= {"num_key_value_heads": None, "sliding_window": None}
    assert shape_of({"model_type": "mistral", **small}).kv_heads == 4


def test_where_rope_stands():
    def rope(**keys):
        return shape_of({"model_type": "llama", "max_position_embeddings": 99} | keys).rope
    llama3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 64}
    for inner in ({"rope_type": "linear", "factor": 2}, {"type": "linear", "factor": 2}):
        for key in ("rope_scaling", "rope_parameters"):
            assert rope(**{key: inner}, rope_theta=5) == rope(**{key: inner | {"rope_theta": 5.0}}, rope_theta=7) == (
                "linear", 5.0, 2.0, 0.0, 1.0, 0)
    assert rope(rope_scaling=llama3 | {"rope_type": "llama3"}) == ("llama3", 1e4, 8.0, 1.0, 4.0, 64)
    assert rope(rope_scaling=llama3 | {"rope_type": "llama3"}, original_max_position_embeddings=32)[5] == 32
    del llama3["original_max_position_embeddings"]
    assert rope(rope_scaling=llama3 | {"rope_type": "llama3"})[5] == 99


def test_frequencies_of_rope_against_a_loop():
    for kind in ("default", "linear", "llama3"):
        rope = {"type": kind, "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "rope_theta": 5e5}
        shape = shape_of({"model_type": "llama", "head_dim": 64, "rope_scaling": rope, "max_position_embeddings": 8192})
        wanted = []
        for i in range(32):
            f = 5e5 ** (-2 * i / 64)
            wave = 2 * math.pi / f
            if kind == "linear" or kind == "llama3" and wave > 8192 / 1:
                f /= 8
            elif kind == "llama3" and wave >= 8192 / 4:
                smooth = (8192 / wave - 1) / (4 - 1)
                f = (1 - smooth) * f / 8 + smooth * f
            wanted.append(f)
        found = rope_frequencies(shape)
        assert found.dtype == torch.float32 and found.tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    shape = shape_of(SIZES[name] | {"vocab_size": SIZES[name]["vocab_size"] or 257})
    count = sum(sum(rows for _, rows in parts) * math.prod(columns) for parts, columns, _ in hf.layout(shape).values())
    assert count == {"tiny": 108_928, "small": 364_032, "gpt2": 124_439_808, "gpt2-medium": 354_823_168,
                     "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}[name] and shape.tied


def refused(folder, capsys, *culprits, dtype=torch.float32):
    """ValueError here, and through load_hf one line on stderr and exit code 2; all that must be named is named."""
    with pytest.raises(ValueError) as caught:
        read_weights(folder, shape_of(read_config(folder), f"{folder}/config.json"), dtype)
    text = str(caught.value)
    assert all(culprit in text for culprit in (str(folder), *culprits)), text
    with pytest.raises(SystemExit) as ended:
        train_distill.load_hf(folder, dtype=dtype)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and error.strip().removeprefix("error: ") == text


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
REFUSED = [                                         # fixture, keys of config.json, what must be named
    ("llama_mha", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config float32"),
    *(("llama_mha", {key: {"rope_type": kind, "factor": 4.0}}, f"{key} {kind} llama3")
      for key in ("rope_scaling", "rope_parameters") for kind in ("yarn", "dynamic", "longrope", "su", "mrope")),
    ("llama_mha", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"), ("qwen3", {"rope_scaling": YARN}, "yarn"),
    ("llama_mha", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters type of layer"),
    ("llama_mha", {"rope_scaling": [4.0]}, "rope_scaling"),
    ("llama_mha", {"rope_scaling": {"type": []}}, "rope type []"),
    ("llama_mha", {"rope_scaling": {"type": "linear"}}, "factor is None"),
    ("llama_mha", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
    ("llama_mha", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor low_freq_factor"),
    ("llama_mha", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": "x"}},
     "original_max_position_embeddings 'x'"),
    ("llama_mha", {"rope_theta": "1e4"}, "rope_theta '1e4'"), ("llama_mha", {"rope_theta": None}, "rope_theta None"),
    ("llama_mha", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("mistral", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
     "partial_rotary_factor 0.25"),
    ("mistral", {"sliding_window": 64}, "sliding_window 64 max_position_embeddings 128"),
    ("mistral", {"sliding_window": 64, "layer_types": ["full_attention"] * 2}, "sliding_window 64"),
    ("mistral", {"layer_types": ["sliding_attention"] * 2}, "sliding_window None"),
    ("mistral", {"sliding_window": "no"}, "sliding_window 'no'"),
    ("mistral", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types chunked_attention"),
    *((name, {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1, "layer_types": types},
       "sliding_window 64") for name in ("qwen2", "qwen3") for types in (None, ["sliding_attention"])),
    ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "sliding_attention"),
    ("qwen2", {"layer_types": 3}, "layer_types 3"), ("qwen2", {"use_sliding_window": "no"}, "use_sliding_window 'no'"),
    *(("llama_mha", {"model_type": kind}, f"model_type '{kind}' gpt2 qwen3")
      for kind in ("gemma", "gemma2", "phi", "phi3", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_neo", "", 7)
      if kind),
    ("llama_mha", {"model_type": None, "architectures": ["GemmaForCausalLM"]}, "model_type 'GemmaForCausalLM'"),
    ("llama_mha", {"model_type": None, "architectures": None}, "model_type"),
    ("llama_mha", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequence LlamaForCausalLM"),
    ("llama_mha", {"architectures": ["MistralForCausalLM"]}, "architectures 'MistralForCausalLM'"),
    ("llama_mha", {"architectures": [{}]}, "architectures"), ("llama_mha", {"architectures": 7}, "architectures"),
    ("gpt2_tanh", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2_tanh", {"add_cross_attention": True}, "add_cross_attention"),
    ("gpt2_tanh", {"n_head": 5}, "n_embd 32 n_head 5"), ("gpt2_tanh", {"n_inner": 0}, "n_inner is 0"),
    ("gpt2_tanh", {"activation_function": "quick_gelu"}, "activation_function quick_gelu gelu_new"),
    ("gpt2_tanh", {"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon -1e-05"),
    ("gpt2_tanh", {"tie_word_embeddings": None}, "tie_word_embeddings None"),
    ("gpt2_tanh", {"scale_attn_by_inverse_layer_idx": 1}, "scale_attn_by_inverse_layer_idx is 1"),
    ("llama_mha", {"hidden_act": "gelu_10"}, "hidden_act gelu_10 silu"),
    ("llama_mha", {"hidden_act": []}, "hidden_act []"),
    ("llama_mha", {"num_key_value_heads": 3}, "num_attention_heads 4 num_key_value_heads 3"),
    ("llama_mha", {"num_attention_heads": 5, "num_key_value_heads": None, "head_dim": None}, "hidden_size 6.4"),
    ("llama_mha", {"head_dim": 7}, "head_dim 7"), ("llama_mha", {"mlp_bias": "false"}, "mlp_bias 'false'"),
    *(("llama_mha", {key: value}, f"{key} {value!r}") for key in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "head_dim") for value in (0, -1, "32", 32.0, True, 10 ** 12)),
    *(("llama_mha", {"rms_norm_eps": value}, "rms_norm_eps") for value in (0, "1e-6", math.nan, math.inf, 10 ** 400)),
    *(("gpt2_tanh", {key: 0}, f"{key} 0") for key in ("n_embd", "n_layer", "n_head", "n_positions", "vocab_size"))]


@pytest.mark.parametrize("name, keys, culprits", REFUSED, ids=lambda value: str(value)[:50])
def test_configs_that_are_refused_by_name(copy, capsys, name, keys, culprits):
    refused(copy(name, **keys), capsys, *culprits.split())


@pytest.mark.parametrize("name, keys", [
    ("llama_mha", {"rope_scaling": None, "sliding_window": 4, "use_sliding_window": True}),
    ("mistral", {"sliding_window": 128}), ("qwen2", {"sliding_window": 4}), ("qwen3", {"quantization_config": None}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "layer_types": None}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 128, "layer_types": ["sliding_attention"] * 2}),
    ("gpt2_tanh", {"reorder_and_upcast_attn": True}), ("gpt2_tanh", {"activation_function": "gelu_fast"}),
    ("llama_mha", {"hidden_act": "swish", "partial_rotary_factor": 1.0, "rope_parameters": {"rope_type": "default"}})])
def test_keys_that_change_nothing(copy, name, keys):
    assert distance(name, copy(name, **keys)) < CLOSE


# -------------------------------------------------------------------------------------------------------------- files
def test_folders_that_are_refused(copy, tmp_path, capsys):
    refused(tmp_path / "nowhere", capsys, "config.json")
    folder = copy("llama_mha")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, capsys, "LoRA", "adapter_config.json", "merge_and_unload")
    (folder / "config.json").unlink()
    refused(folder, capsys, "LoRA", "without its base")
    for text in ('{"model_type": "llama"', "[]", "7", "\xff", "[" * 100_000, ""):
        folder = copy("llama_mha")
        (folder / "config.json").write_bytes(text.encode("latin-1"))
        refused(folder, capsys, "config.json")
    folder = copy("llama_mha")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    refused(folder, capsys, "no weights", "model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("name, file", [
    ("llama_mha", "model.safetensors"), ("gpt2_bin", "pytorch_model.bin"),
    ("llama_linear", "model-00002-of-00002.safetensors"), ("llama_half", "pytorch_model-00001-of-00002.bin")])
def test_damaged_files_are_named(copy, capsys, name, file):
    whole = (FIXTURES / name / file).read_bytes()
    for blob in (whole[:-1], whole[:len(whole) // 2], whole[:5], b"", b"\0" * 100, b"\xff" * len(whole)):
        folder = copy(name)
        (folder / file).write_bytes(blob)
        refused(folder, capsys, file)
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(folder, capsys, file, "git lfs pull")
    (folder / file).unlink()
    refused(folder, capsys, "pytorch_model.bin" if name == "gpt2_bin" else file)


class Code:
    def __reduce__(self):
        return print, ("code that was run",)


@pytest.mark.parametrize("content", [Code(), {"a": Code()}, [torch.zeros(2)], {"model": {}}, {"a": 1}])
def test_a_bin_that_is_more_than_tensors_is_refused_and_not_run(copy, capsys, content):
    folder = copy("gpt2_bin")
    torch.save(content, folder / "pytorch_model.bin")
    refused(folder, capsys, "pytorch_model.bin")
    assert "code that was run" not in capsys.readouterr().out


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b", "..", "", "gone", "a\\b", "x\n", 7])
def test_an_index_names_files_of_its_folder(copy, capsys, file):
    folder = copy("llama_linear")
    shutil.copy(FIXTURES / "llama_mha" / "model.safetensors", folder.parent)
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.norm.weight"] = file
    index.write_text(json.dumps(table))
    refused(folder, capsys, "index.json", repr(str(file))[1:-1])
    for text in ("{}", '{"weight_map": 3}', "[", '{"weight_map": {}}'):
        index.write_text(text)
        refused(folder, capsys, "missing" if text == '{"weight_map": {}}' else "index.json")


# ------------------------------------------------------------------------------------------------------------ tensors
def test_each_tensor_that_does_not_fit_is_named(copy, capsys):
    layer = "model.layers.0.self_attn.q_proj"
    refused(change(copy("llama_mha"), **{f"{layer}.weight": None, "model.norm.weight": None}), capsys,
            f"2 missing: {layer}.weight [32, 32], model.norm.weight [32]")
    refused(change(copy("llama_mha"), **{f"{layer}.bias": torch.zeros(32), "score.weight": torch.zeros(2, 32)}), capsys,
            f"2 unexpected: {layer}.bias [32], model.score.weight [2, 32]")
    shapes = {f"{layer}.weight": torch.zeros(32, 31), "model.norm.weight": torch.zeros(1, 32)}
    refused(change(copy("llama_mha"), **shapes), capsys, f"2 of another shape: {layer}.weight [32, 31] instead of [32,",
            "model.norm.weight [1, 32] instead of [32]")
    refused(change(copy("gpt2_tanh"), transformer__h__1__mlp__c_fc__weight=torch.zeros(128, 32), wte=torch.zeros(2)),
            capsys, "transformer.h.1.mlp.c_fc.weight [128, 32] instead of [32, 128]", "unexpected: transformer.wte [2]")
    refused(copy("llama_mha", vocab_size=98), capsys, "embed_tokens.weight [97, 32] instead of [98, 32]", "lm_head")
    refused(copy("llama_mha", num_hidden_layers=4), capsys, "18 missing", "model.layers.2.input_layernorm.weight",
            "and 10 more")
    refused(copy("llama_mha", num_hidden_layers=1), capsys, "9 unexpected", "and 1 more")
    refused(copy("qwen3", model_type="llama", architectures=[]), capsys, "4 unexpected", "self_attn.q_norm.weight [16]")
    refused(change(copy("llama_mha"), lm_head__weight=None), capsys, "1 missing: lm_head.weight [97, 32]")
    refused(copy("gpt2_erf", tie_word_embeddings=True), capsys, "lm_head.weight differs", "tie_word_embeddings")


def test_an_equal_head_in_a_tied_model_is_fine(copy):
    embedding = load_file(FIXTURES / "qwen3" / "model.safetensors")["model.embed_tokens.weight"]
    assert distance("qwen3", change(copy("qwen3"), lm_head__weight=embedding.clone())) < CLOSE
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        read(change(copy("qwen3"), lm_head__weight=embedding[:-1].clone()))


def test_prefixes_buffers_and_double_precision(copy):
    for name, prefix in (("gpt2_tanh", "transformer."), ("qwen3", "model."), ("llama_mha", "model.")):
        folder = copy(name)
        tensors = {key.removeprefix(prefix): t.double() for key, t in load_file(folder / "model.safetensors").items()}
        tensors |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8)} if name == "gpt2_tanh" else {
            "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        save_file(tensors, folder / "model.safetensors")
        assert distance(name, folder) < CLOSE
        (folder / "model.safetensors").unlink()     # torch before 1.6
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        assert distance(name, folder) < CLOSE


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_not_floats_are_quantised(copy, capsys, dtype):
    name = "model.layers.1.mlp.up_proj.weight"
    refused(change(copy("llama_mha"), **{name: torch.ones(56, 32).to(dtype)}), capsys, name, "quantised")
    folder = copy("gpt2_bin")
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save(tensors | {"wte.weight": tensors["wte.weight"].to(dtype)}, folder / "pytorch_model.bin")
    refused(folder, capsys, "transformer.wte.weight", "quantised")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named(copy, capsys, value):
    stored = load_file(FIXTURES / "llama_mha" / "model.safetensors")
    name, other = "model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight"
    stored[name][3, 4] = stored[other][5] = value
    refused(change(copy("llama_mha"), **{name: stored[name], other: stored[other]}), capsys,
            f"{name} (1 of 1,024 values)", f"{other} (32 of 1,792 values)")
    stored[name][3, 4] = 1e6
    folder = change(copy("llama_mha"), **{name: stored[name]})
    refused(folder, capsys, f"{name} (1 of 1,024 values)", "float16", dtype=torch.float16)
    read(folder, torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_of_the_dtype_and_alone_in_memory(name, dtype):
    (_, tensors), (_, again) = read(FIXTURES / name, dtype), read(FIXTURES / name, dtype)
    for key, tensor in tensors.items():
        assert tensor.dtype == dtype and tensor.is_contiguous() and torch.equal(tensor, again[key])
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        tensor.fill_(7)                             # neither in the file
    assert all(torch.equal(tensor, again[key]) for key, tensor in read(FIXTURES / name, dtype)[1].items())


# -------------------------------------------------------------------------------------------------------------- write
@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_comes_back_bit_for_bit(name, tmp_path):
    model = train_distill.load_hf(FIXTURES / name)
    train_distill.save_hf(model, tmp_path / "new")
    again = train_distill.load_hf(tmp_path / "new")
    assert again.shape == model.shape and model.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    x, logits = reference(name)
    assert torch.equal(logits_of(tmp_path / "new", x, 97), logits_of(FIXTURES / name, x, 97))
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"config.json", "model.safetensors"}
    raw = read_config(tmp_path / "new")
    found, source = ({key: t.shape for path in folder.glob("model*.safetensors") for key, t in load_file(path).items()}
                     for folder in (tmp_path / "new", FIXTURES / name))
    assert raw["torch_dtype"] == "float32" and raw["architectures"] == [hf.CLASSES[raw["model_type"]]]
    assert (found == source or not source) and ("lm_head.weight" in found) != model.shape.tied


def test_a_folder_is_replaced_whole_or_not_at_all(copy, tmp_path, monkeypatch):
    folder = copy("qwen2", auto_map={"AutoModel": "code.Model"}, dtype="bfloat16")
    raw, tensors = read(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="blocks.0.out.weight"):
        write_folder(folder, raw, shape_of(raw), tensors | {"blocks.0.out.weight": torch.full((32, 32), math.nan)})
    for broken in ({key: tensors[key] for key in tensors if key != "norm.weight"}, tensors | {"more": torch.ones(2)}):
        with pytest.raises(AssertionError):
            write_folder(folder, raw, shape_of(raw), broken)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError("No space left on device")))
        with pytest.raises(OSError):
            write_folder(folder, raw, shape_of(raw), tensors)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    cut = {key: tensor[:97].clone() if key == "token.weight" else tensor for key, tensor in tensors.items()}
    write_folder(folder, raw, shape_of(raw), cut)
    new = read_config(folder)
    assert new["vocab_size"] == 97 and new.keys() == raw.keys() - {"auto_map", "dtype"}
    assert distance("qwen2", folder) < CLOSE


# ------------------------------------------------------------------------------------------------- with the reference
FIELDS = dict(vocab_size=61, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, intermediate_size=72,
              num_key_value_heads=3, max_position_embeddings=64, bos_token_id=None, eos_token_id=None)
LIVE = {"GPT2": dict(vocab_size=61, n_embd=48, n_layer=3, n_head=6, n_positions=64, bos_token_id=None,
                     eos_token_id=None),
        "Llama": FIELDS | dict(attention_bias=True), "Mistral": FIELDS | dict(sliding_window=64, head_dim=10),
        "Qwen2": FIELDS | dict(tie_word_embeddings=True), "Qwen3": FIELDS | dict(head_dim=12, attention_bias=True)}


@pytest.mark.parametrize("kind", LIVE)
def test_against_the_library_both_ways(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**LIVE[kind])
    theirs = getattr(transformers, f"{kind}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}")(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(float("norm" in name or "ln_" in name), 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    x = torch.randint(0, 61, (2, 40))
    with torch.no_grad():
        wanted = theirs(input_ids=x).logits
    assert wanted.abs().max() > 1 and (logits_of(tmp_path / "theirs", x, 61) - wanted).abs().max() < CLOSE
    model = train_distill.load_hf(tmp_path / "theirs")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    train_distill.save_hf(model, tmp_path / "ours")
    opened, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(opened) is type(theirs) and opened.dtype == torch.float32
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    with torch.no_grad():
        assert (model(x) - opened.eval()(input_ids=x).logits).abs().max() < CLOSE


@pytest.mark.parametrize("kind", hf.CLASSES)
def test_defaults_against_the_library(kind):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, hf.CLASSES[kind].replace("LMHeadModel", "Config").replace("ForCausalLM", "Config"))()
    for key, value in hf.DEFAULTS[kind].items():
        found = config.rope_parameters[key] if key == "rope_theta" else getattr(config, key, None)
        if key == "sliding_window" and kind.startswith("qwen"):              # theirs is None until it is in use
            found = type(config)(use_sliding_window=True).sliding_window
        derived = {"num_key_value_heads": config.num_attention_heads, "head_dim": 128}.get(key)
        assert found == value or value is None and found == derived, key
