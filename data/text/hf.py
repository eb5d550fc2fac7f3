"""Language models in Hugging Face layout: config.json and weights of GPT-2, Llama, Mistral, Qwen2 and Qwen3.

What else would change a model's numbers (another rope, a sliding window, an adapter, quantised weights) is refused by
its name: a model that is read a little wrong still writes sentences."""
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from data.weights import (UNQUANTISED, Fields, bad_values, check_fit, open_weights, refuse_bad, refuse_to_write,
                          replace_file, whole)

LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048,
         "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0}
QWEN = LLAMA | {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "sliding_window": 4096,
                "max_position_embeddings": 32768, "use_sliding_window": False, "max_window_layers": 28}
DEFAULTS = {                                        # what an absent key means to the library
    "gpt2": {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
             "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
             "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    "llama": LLAMA | {"attention_bias": False, "mlp_bias": False},
    "mistral": LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
                        "sliding_window": 4096},
    "qwen2": QWEN, "qwen3": QWEN | {"head_dim": 128, "attention_bias": False}}
CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
           "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
KINDS = {name: kind for kind, full in CLASSES.items() for name in (full, re.sub("LMHead|ForCausalLM", "", full),
                                                                 full.replace("ForCausalLM", "Model"))}
ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"} | dict.fromkeys(
    ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh")
FILES = {".safetensors": "model", ".bin": "pytorch_model"}
PREFIX = {"gpt2": "transformer.", "llama": "model."}             # which a model saved without its head lacks
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")       # stored by old versions, made anew by all
SMALL = LLAMA | {"model_type": "llama", "num_attention_heads": 4, "max_position_embeddings": 512, "vocab_size": None,
                 "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None}   # the tokenizer's to fill in
SIZES = {"tiny": SMALL | dict(hidden_size=64, num_hidden_layers=2, num_key_value_heads=2, intermediate_size=176),
         "small": SMALL | dict(hidden_size=96, num_hidden_layers=3, num_key_value_heads=4, intermediate_size=264)}
SIZES |= {name: DEFAULTS["gpt2"] | {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads}
          for name, width, layers, heads in (("gpt2", 768, 12, 12), ("gpt2-medium", 1024, 24, 16),
                                             ("gpt2-large", 1280, 36, 20), ("gpt2-xl", 1600, 48, 25))}

@dataclass(frozen=True)
class Shape:
    """All of a config.json that decides a model's numbers."""
    kind: str                                       # gpt2, or llama for llama, mistral, qwen2 and qwen3
    vocab_size: int
    n_positions: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    eps: float
    activation: str                                 # gelu (erf), gelu_tanh, relu, silu
    tied: bool                                      # the head is the token embedding
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    scale_by_layer: bool                            # attention scores of layer i, from 0, divided by i + 1
    rope: tuple                                     # () or (default|linear|llama3, theta, factor, low, high, original)

# -------------------------------------------------------------------------------------------------------- config.json
def model_type(raw, source="config.json"):
    """gpt2, llama, mistral, qwen2 or qwen3; from `architectures` where `model_type` is absent."""
    fields, names = Fields(raw, source), raw.get("architectures") or []
    names = [str(name) for name in (names if isinstance(names, list) else [names])]
    kind = str(raw.get("model_type") or KINDS.get(*names[:1] or [""], *names[:1]))
    if kind not in CLASSES:
        fields.refuse(f"model_type {kind!r:.60} is not supported; {', '.join(CLASSES)} are")
    if other := [name for name in names if KINDS.get(name) != kind]:
        fields.refuse(f"architectures names {other[0]!r:.60}, not the language model: save it as {CLASSES[kind]}")
    return kind

def shape_of(raw, source="config.json"):
    """The dict of a config.json -> Shape. ValueError names the key that is not supported, and `source`."""
    kind = model_type(raw, source)
    fields = Fields(DEFAULTS[kind] | raw, source)
    raw, take, refuse = fields.raw, fields.take, fields.refuse
    vocab_size, tied = take("vocab_size"), take("tie_word_embeddings", bool)
    if kind == "gpt2":
        width, layers, heads, n_positions = map(take, ("n_embd", "n_layer", "n_head", "n_positions"))
        hidden = 4 * width if raw["n_inner"] is None else take("n_inner")
        if width % heads or layers > 4096:
            refuse(f"n_embd {width} is not divisible by n_head {heads}, or n_layer {layers} is above 4096")
        if take("add_cross_attention", bool) or not take("scale_attn_weights", bool):
            refuse("add_cross_attention true and scale_attn_weights false are not supported")
        return Shape(kind, vocab_size, n_positions, width, layers, heads, heads, width // heads, hidden,
                     take("layer_norm_epsilon", float), fields.choose("activation_function", ACTIVATIONS), tied, True,
                     True, True, False, take("scale_attn_by_inverse_layer_idx", bool), ())

    width, layers, heads, n_positions, hidden = map(take, (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "intermediate_size"))
    kv_heads = heads if raw["num_key_value_heads"] is None else take("num_key_value_heads")
    head_dim = width / heads if raw["head_dim"] is None else take("head_dim")
    if heads % kv_heads or layers > 4096:
        refuse(f"num_attention_heads {heads} must be divisible by num_key_value_heads {kv_heads}, or num_hidden_layers "
               f"{layers} is above 4096")
    if head_dim % 2:                                # rope turns pairs of dimensions
        refuse(f"head_dim {head_dim} must be even; where it is absent it is hidden_size / num_attention_heads")
    _refuse_window(fields, kind, layers, n_positions)
    bias = kind in ("llama", "qwen3") and take("attention_bias", bool)
    return Shape("llama", vocab_size, n_positions, width, layers, heads, kv_heads, int(head_dim), hidden,
                 take("rms_norm_eps", float), fields.choose("hidden_act", ACTIVATIONS), tied, bias or kind == "qwen2",
                 bias, kind == "llama" and take("mlp_bias", bool), kind == "qwen3", False, _rope(fields, n_positions))

def _refuse_window(fields, kind, layers, n_positions):
    """Attention within a window is not built here; one as long as the longest sequence changes nothing."""
    window, types = fields.raw.get("sliding_window"), fields.raw.get("layer_types")
    if kind == "llama" or kind != "mistral" and not fields.take("use_sliding_window", bool):
        window = None
    if types is None or kind == "mistral" and window is not None:            # there it is whatever layer_types says
        late = window is not None and (kind == "mistral" or fields.take("max_window_layers") < layers)
        types = ["sliding_attention"] * late
    if not isinstance(types, list) or set(map(str, types)) - {"full_attention", "sliding_attention"}:
        fields.refuse(f"layer_types {types!r:.60} is not supported; full_attention alone is")
    if "sliding_attention" in types and (window is None or fields.take("sliding_window") < n_positions):
        fields.refuse(f"sliding_window {window} with sliding_attention is not supported; if no text is longer than "
                      f"that, set max_position_embeddings {n_positions} to it")

def _rope(fields, n_positions):
    """-> (kind, theta, factor, low, high, original). Newer versions keep all of it in one object."""
    own = "original_max_position_embeddings"
    key = "rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters"
    inner = fields.raw.get(key) or {}
    kind = inner.get("rope_type", inner.get("type", "default")) if isinstance(inner, dict) else inner
    if kind not in ("default", "linear", "llama3") or any(isinstance(value, dict) for value in inner.values()):
        fields.refuse(f"{key}: rope type {kind!r:.60} is not supported (default, linear, llama3 are) nor one per layer")
    last = {own: fields.raw[own]} if own in fields.raw else {}               # here the outer one counts
    rope = Fields({own: n_positions} | fields.raw | inner | last, f"{fields.where}: {key}")
    if rope.raw.get("partial_rotary_factor") not in (None, 1):
        rope.refuse(f"partial_rotary_factor {rope.raw['partial_rotary_factor']!r:.60} is not supported; 1 is")
    theta, factor = rope.take("rope_theta", float), 1.0 if kind == "default" else rope.take("factor", float)
    if kind != "llama3":
        return kind, theta, factor, 0.0, 1.0, 0      # all is divided by the factor
    low, high = rope.take("low_freq_factor", float), rope.take("high_freq_factor", float)
    if high <= low:
        rope.refuse(f"high_freq_factor {high} must be above low_freq_factor {low}")
    return kind, theta, factor, low, high, rope.take(own)

def rope_frequencies(shape):
    """Radians per position of each pair of dimensions -> (head_dim / 2,) float32, the fastest first.

    llama3 (of Llama 3.1's release): what turns fewer than `low` times within the original context is slowed down by the
    factor, what turns more than `high` times is kept, and between the two frequencies are blended."""
    _, theta, factor, low, high, original = shape.rope
    frequency = theta ** -(torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim)
    kept = ((original * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return (frequency * (kept + (1 - kept) / factor)).float()

# --------------------------------------------------------------------------------------------------------------- files
def read_config(folder):
    """-> the dict of folder/config.json. ValueError: none there, damaged, a LoRA adapter, quantised weights."""
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds a LoRA adapter (adapter_config.json) without its base: load it with peft, "
                         "merge it into the base with merge_and_unload() and save that; or remove adapter_config.json")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json, so it is no model in Hugging Face layout")
    raw = whole(folder / "config.json")
    if raw.get("quantization_config"):
        raise ValueError(f"{folder / 'config.json'} has a quantization_config: {UNQUANTISED}")
    return raw

# ------------------------------------------------------------------------------------------------------------- weights
def layout(shape):
    """Shape -> dict of our name -> (parts, columns, transposed), where one of our tensors comes from.

    parts: (Hugging Face's name, rows), one below the other in ours; columns: () for biases and norms, else (inputs,);
    transposed: stored as (inputs, rows), as GPT-2 does. Ours are (rows, inputs), like nn.Linear's."""
    D, H, K, F = shape.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.hidden
    gpt2, prefix, places = shape.kind == "gpt2", PREFIX[shape.kind], {}
    def add(ours, inside, theirs, rows, columns=(), bias=False):
        """theirs: Hugging Face's names without `inside` before and .weight or .bias behind; rows: of each"""
        for end, wide in (("weight", columns), ("bias", ()))[:1 + bias]:
            named = [(f"{inside}{name}.{end}", n) for name, n in zip(theirs.split(), rows, strict=True)]
            places[f"{ours}.{end}"] = named, wide, gpt2 and bool(wide) and ours.startswith("blocks")
    add("token", prefix, "wte" if gpt2 else "embed_tokens", [shape.vocab_size], (D,))
    if gpt2:
        add("position", prefix, "wpe", [shape.n_positions], (D,))
        block = [("norm1", "ln_1", [D], (), True), ("qkv", "attn.c_attn", [3 * D], (D,), True),
                 ("out", "attn.c_proj", [D], (D,), True), ("norm2", "ln_2", [D], (), True),
                 ("up", "mlp.c_fc", [F], (D,), True), ("down", "mlp.c_proj", [D], (F,), True)]
    else:
        block = [("norm1", "input_layernorm", [D]), ("norm2", "post_attention_layernorm", [D]),
                 ("qkv", "self_attn.q_proj self_attn.k_proj self_attn.v_proj", [H, K, K], (D,), shape.qkv_bias),
                 ("out", "self_attn.o_proj", [D], (H,), shape.out_bias),
                 ("up", "mlp.gate_proj mlp.up_proj", [F, F], (D,), shape.mlp_bias),
                 ("down", "mlp.down_proj", [D], (F,), shape.mlp_bias)]
        block += [(name, f"self_attn.{name}", [shape.head_dim]) for name in ("q_norm", "k_norm") if shape.qk_norm]
    for i in range(shape.layers):
        for ours, *theirs in block:
            add(f"blocks.{i}.{ours}", f"{prefix}{'h' if gpt2 else 'layers'}.{i}.", *theirs)
    add("norm", prefix, "ln_f" if gpt2 else "norm", [D], (), gpt2)
    if not shape.tied:
        add("head", "", "lm_head", [shape.vocab_size], (D,))
    return places

def _fit(folder, shape, places):
    """What open_weights gives, by the full names; ValueError unless the tensors are those of `places`."""
    full, prefix = {}, PREFIX[shape.kind]
    for name, tensor in open_weights(folder, FILES).items():
        if not BUFFERS.search(f".{name}"):
            full[name if name.startswith((prefix, "lm_head.")) else prefix + name] = tensor
    wanted = {name: (*columns, rows) if transposed else (rows, *columns)
              for parts, columns, transposed in places.values() for name, rows in parts}
    check_fit(folder, full, wanted, {"lm_head.weight"})      # in a tied model that is looked at later
    return full

def read_weights(folder, shape, dtype=torch.float32):
    """-> dict of our name -> tensor, contiguous, of `dtype`, in memory of its own; one stored tensor is read at a time.

    ValueError: files missing, damaged or quantised, tensors that are not those of `shape`, or not finite."""
    places, tensors, bad = layout(shape), {}, []
    stored = _fit(Path(folder), shape, places)
    for ours, (parts, columns, transposed) in places.items():
        tensors[ours] = torch.empty(sum(rows for _, rows in parts), *columns, dtype=dtype)
        for (name, _), into in zip(parts, tensors[ours].split([rows for _, rows in parts])):
            found = stored[name][2]()
            into.copy_(found.T if transposed else found)
            bad += bad_values(name, into)           # as stored, or in the smaller range of `dtype`
    refuse_bad(folder, dtype, bad)
    head, token = (stored.get(name) for name in ("lm_head.weight", places["token.weight"][0][0][0]))
    if shape.tied and head and not torch.equal(head[2](), token[2]()):
        raise ValueError(f"{folder}: lm_head.weight differs from the embedding though tie_word_embeddings is true; set "
                         "that to false in config.json to keep this head, or remove the tensor")
    return tensors

def write_folder(folder, raw, shape, tensors):
    """config.json and model.safetensors in float32, which the library opens as the model that `raw` describes.

    tensors: like those of read_weights; the vocabulary is as long as they say. Each file replaces an older one when it
    is whole and on the disk. ValueError if a tensor is not finite, OSError if it cannot be written."""
    folder, kind, vocab_size, files = Path(folder), model_type(raw), len(tensors["token.weight"]), {}
    places = layout(replace(shape, vocab_size=vocab_size))
    assert places.keys() == tensors.keys(), places.keys() ^ tensors.keys()
    refuse_to_write(folder, tensors)
    for ours, (parts, _, transposed) in places.items():
        split = tensors[ours].detach().cpu().float().split([rows for _, rows in parts])
        files |= {name: (part.T if transposed else part).contiguous() for (name, _), part in zip(parts, split)}
    config = {key: value for key, value in raw.items() if key not in ("auto_map", "dtype")} | {
        "model_type": kind, "architectures": [CLASSES[kind]], "vocab_size": vocab_size, "torch_dtype": "float32"}
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "model.safetensors", lambda path: save_file(files, path, {"format": "pt"}))
    replace_file(folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
