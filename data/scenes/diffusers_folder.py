"""Parts of a diffusers folder: config and weights of a UNet, AutoencoderKL and CLIP text encoder, and the scheduler.

What else would change a model's numbers (another block, another activation, quantised weights, a LoRA without its base)
is refused by its name: a model that is read a little wrong still paints pictures. Tensors keep diffusers' own names."""
import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from data.files import file_sha256
from data.weights import (UNQUANTISED, Fields, bad_values, check_fit, listed, open_safetensors, open_weights,
                          refuse_bad, refuse_to_write, replace_file, weight_files, whole)

DEFAULTS = {                                        # what an absent key means to the libraries
    "unet": {"in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
             "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "norm_num_groups": 32,
             "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "norm_eps": 1e-5, "attention_head_dim": 8,
             "cross_attention_dim": 1280, "transformer_layers_per_block": 1, "use_linear_projection": False,
             "flip_sin_to_cos": True, "freq_shift": 0, "attention_type": "default", "encoder_hid_dim": None,
             "encoder_hid_dim_type": None, "addition_embed_type": None, "addition_time_embed_dim": None,
             "projection_class_embeddings_input_dim": None},
    "vae": {"in_channels": 3, "out_channels": 3, "block_out_channels": [64], "down_block_types": ["DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D"], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 32,
            "scaling_factor": 0.18215, "force_upcast": True, "use_quant_conv": True, "use_post_quant_conv": True},
    "text_encoder": {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
                     "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
                     "layer_norm_eps": 1e-5, "eos_token_id": 49407},
    "scheduler": {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
                  "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 0,
                  "set_alpha_to_one": True, "clip_sample": False, "clip_sample_range": 1.0}}
ONLY = {                                            # keys of which few values are built here; the first: if absent
    "unet": {"center_input_sample": (False,), "mid_block_type": ("UNetMidBlock2DCrossAttn",), "conv_in_kernel": (3,),
             "only_cross_attention": (False,), "mid_block_scale_factor": (1,), "downsample_padding": (1,),
             "reverse_transformer_layers_per_block": (None,), "num_attention_heads": (None,),
             "dual_cross_attention": (False,), "class_embed_type": (None,), "num_class_embeds": (None,),
             "resnet_time_scale_shift": ("default",), "resnet_skip_time_act": (False,), "resnet_out_scale_factor": (1,),
             "time_embedding_type": ("positional",), "time_embedding_dim": (None,), "time_embedding_act_fn": (None,),
             "timestep_post_act": (None,), "time_cond_proj_dim": (None,), "act_fn": ("silu", "swish"),
             "conv_out_kernel": (3,), "class_embeddings_concat": (False,), "cross_attention_norm": (None,),
             "mid_block_only_cross_attention": (None, False), "addition_embed_type": (None, "text_time"),
             "encoder_hid_dim_type": (None, "text_proj"), "attention_type": ("default", "gated")},
    "vae": {"act_fn": ("silu", "swish"), "shift_factor": (None,), "latents_mean": (None,), "latents_std": (None,),
            "mid_block_add_attention": (True,)},
    "text_encoder": {"hidden_act": ("quick_gelu", "gelu")},
    "scheduler": {"trained_betas": (None,), "thresholding": (False,), "rescale_betas_zero_snr": (False,),
                  "beta_schedule": ("linear", "scaled_linear"), "timestep_spacing": ("leading", "trailing", "linspace"),
                  "prediction_type": ("epsilon", "v_prediction", "sample")}}
CLASSES = {
    "unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",), "text_encoder": ("CLIPTextModel",),
    # all of them noise by the same alphas; sampling is DDIM's whichever is named
    "scheduler": tuple(f"{name}Scheduler" for name in (
        "DDIM DDPM PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete HeunDiscrete DPMSolverMultistep "
        "DPMSolverSinglestep KDPM2Discrete KDPM2AncestralDiscrete UniPCMultistep DEISMultistep").split())}
ADVICE = {"text_encoder": "; give its embeddings as a file (data/scenes/prepare.py) and leave this part out"}
GATED = re.compile(r"^position_net\.|\.fuser\.")    # tensors of a GLIGEN adapter, by diffusers' names
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}      # of a VAE before 0.18

@dataclass(frozen=True)
class UNetShape:
    """All of a unet/config.json that decides the numbers. Levels go from the finest to the coarsest."""
    channels: int                                   # of the latents and of the prediction
    widths: tuple                                   # per level
    layers: tuple                                   # resnets per level on the way down; one more on the way up
    heads: tuple                                    # per level
    down: tuple                                     # transformer blocks after each resnet, per level; 0: no attention
    up: tuple                                       # the same on the way up, from the finest level too
    middle: int
    groups: int
    eps: float
    context: int                                    # width of the text that attention sees
    text: int                                       # width of the text that is given, if a projection comes first; or 0
    added: int                                      # width of pooled text and embedded sizes together (SDXL); or 0
    added_time: int                                 # width of each embedded size; or 0
    linear: bool                                    # projections around the transformer: linear instead of 1x1 conv
    cos_first: bool                                 # in the embedding of timesteps
    freq_shift: float
    gated: bool                                     # has GLIGEN layers

@dataclass(frozen=True)
class VAEShape:
    """All of a vae/config.json that decides the numbers, and what latents are multiplied with."""
    in_channels: int
    out_channels: int
    latent: int
    widths: tuple
    layers: int
    groups: int
    quant_conv: bool
    post_quant_conv: bool
    scaling_factor: float
    force_upcast: bool                              # its activations leave float16's range

@dataclass(frozen=True)
class TextShape:
    """All of a text_encoder/config.json that decides the numbers."""
    vocab_size: int
    positions: int
    width: int
    layers: int
    heads: int
    hidden: int
    activation: str                                 # quick_gelu, gelu
    eps: float
    eos: int                                        # 2 in old files, which means: pool at the largest id

@dataclass(frozen=True)
class Schedule:
    """All of a scheduler_config.json that decides alphas, the training target and DDIM's steps."""
    timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str                              # linear, scaled_linear
    prediction_type: str                            # epsilon, v_prediction, sample
    spacing: str                                    # leading, trailing, linspace
    offset: int
    last_alpha_one: bool                            # before the first timestep nothing is noise
    clip: float                                     # range of the predicted clean sample; 0: not clipped

# ------------------------------------------------------------------------------------------------------------- configs
def find(folder, part):
    """The folder of a part, given the whole model's folder or the part's own."""
    inside = Path(folder) / part
    return inside if inside.is_dir() else Path(folder)

def read_config(folder, part):
    """part: unet, vae, text_encoder, scheduler -> (its folder, dict of its config). ValueError says what is wrong."""
    folder = find(folder, part)
    path = folder / ("scheduler_config.json" if part == "scheduler" else "config.json")
    if lora := [name for name in ("adapter_config.json", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
                if (folder / name).exists()]:
        raise ValueError(f"{folder} holds a LoRA ({lora[0]}): fuse it into its base in diffusers (load_lora_weights, "
                         f"fuse_lora, save_pretrained) and give that folder; or remove {lora[0]}")
    if not path.is_file():
        raise ValueError(f"{folder} has no {path.name}, so it is no {part} of a model in diffusers layout")
    raw = whole(path)
    if raw.get("quantization_config"):
        raise ValueError(f"{path} has a quantization_config: {UNQUANTISED}")
    names = raw.get("architectures") or CLASSES[part]
    name = raw.get("_class_name") or (names[0] if isinstance(names, (list, tuple)) else names)
    if part == "text_encoder" and raw.get("model_type", "clip_text_model") != "clip_text_model":
        name = raw["model_type"]
    if name not in CLASSES[part]:
        raise ValueError(f"{path} is of a {name!r:.60}, which is not supported as {part}; {', '.join(CLASSES[part])} "
                         f"{'are' if len(CLASSES[part]) > 1 else 'is'}{ADVICE.get(part, '')}")
    return folder, raw

def _fields(raw, source, part):
    """Fields of a config with its defaults filled in; refuses what is not built here."""
    unset = raw.get("_use_default_values")          # written, but not chosen: means nothing to another class
    given = {key: value for key, value in raw.items() if not isinstance(unset, list) or key not in unset}
    given |= {key: False for key, value in DEFAULTS[part].items() if type(value) is bool and given.get(key, 0) is None}
    fields = Fields(DEFAULTS[part] | given, source)
    for key, values in ONLY[part].items():
        value = fields.raw.get(key, values[0])
        if not (value in values or value is None and not values[0]):
            fields.refuse(f"{key} is {value!r:.60}, which is not supported; {' or '.join(map(repr, values))} is")
    return fields

def _levels(fields, key, count):
    """A whole number above 0 for each level, from one for all or a list."""
    value = fields.raw[key]
    values = value if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count or any(type(item) is not int or not 0 < item < 2 ** 20 for item in values):
        fields.refuse(f"{key} is {value!r:.60}, not a whole number from 1 to 1,048,575 or a list of {count}")
    return tuple(values)

def _kinds(fields, key, known, count):
    """Per level, whether a block has attention; `known` block types -> bool."""
    kinds = fields.raw[key] if isinstance(fields.raw[key], (list, tuple)) else [fields.raw[key]]
    if other := [kind for kind in kinds if str(kind) not in known]:
        fields.refuse(f"{key}: {other[0]!r:.60} is not supported; {', '.join(known)} are")
    if len(kinds) != count:
        fields.refuse(f"{key} lists {len(kinds)} blocks, block_out_channels {count}")
    return [known[str(kind)] for kind in kinds]

def _widths(fields):
    widths = fields.raw["block_out_channels"]
    if not isinstance(widths, (list, tuple)) or not 0 < len(widths) < 9:
        fields.refuse(f"block_out_channels is {widths!r:.60}, not a list of 1 to 8 whole numbers")
    widths, groups = _levels(fields, "block_out_channels", len(widths)), fields.take("norm_num_groups")
    if any(width % groups for width in widths):
        fields.refuse(f"block_out_channels {list(widths)} are not all divisible by norm_num_groups {groups}")
    return widths, groups

def _natural(fields, key):
    """A number of at least 0, whole or not."""
    value = fields.raw[key]
    return value if type(value) in (int, float) and 0 <= value < 1e6 else fields.refuse(
        f"{key} is {value!r:.60}, not a number of at least 0")

def unet_shape(raw, source="unet/config.json"):
    """The dict of a unet/config.json -> UNetShape. ValueError names the key that is not supported, and `source`."""
    fields = _fields(raw, source, "unet")
    take, refuse, (widths, groups) = fields.take, fields.refuse, _widths(fields)
    count, channels, kind = len(widths), take("in_channels"), fields.raw["encoder_hid_dim_type"]
    if channels != take("out_channels"):            # inpainting, edits, learnt variances
        refuse(f"in_channels {channels} and out_channels {fields.raw['out_channels']} differ: this UNet sees or "
               "predicts more than the noisy latents; use the text-to-image model")
    layers, depth = _levels(fields, "layers_per_block", count), _levels(fields, "transformer_layers_per_block", count)
    heads = _levels(fields, "attention_head_dim", count)            # so called; they are counts of heads
    if bad := [f"{width} by {n}" for width, n in zip(widths, heads) if width % n]:
        refuse(f"block_out_channels is not divisible by attention_head_dim, which counts heads: {', '.join(bad)}")
    if max(*layers, *depth) > 256 or widths[0] % 2:
        refuse(f"layers_per_block {layers} or transformer_layers_per_block {depth} is above 256, or the first of "
               f"block_out_channels {widths[0]} is odd")
    down = _kinds(fields, "down_block_types", {"DownBlock2D": False, "CrossAttnDownBlock2D": True}, count)
    up = _kinds(fields, "up_block_types", {"UpBlock2D": False, "CrossAttnUpBlock2D": True}, count)[::-1]
    added = fields.raw["addition_embed_type"] == "text_time"
    shift = _natural(fields, "freq_shift")
    if shift >= widths[0] // 2 or added and (shift >= take("addition_time_embed_dim") // 2
                                             or take("addition_time_embed_dim") % 2):
        refuse(f"freq_shift {shift} or addition_time_embed_dim does not fit the embedding of timesteps")
    if kind and fields.raw["encoder_hid_dim"] is None:
        refuse("encoder_hid_dim_type 'text_proj' needs encoder_hid_dim, which is absent")
    return UNetShape(
        channels, widths, layers, heads, tuple(n * has for n, has in zip(depth, down)),
        tuple(n * has for n, has in zip(depth, up)), depth[-1], groups, take("norm_eps", float),
        take("cross_attention_dim"), 0 if fields.raw["encoder_hid_dim"] is None else take("encoder_hid_dim"),
        take("projection_class_embeddings_input_dim") if added else 0, take("addition_time_embed_dim") if added else 0,
        take("use_linear_projection", bool), take("flip_sin_to_cos", bool), shift,
        fields.raw["attention_type"] == "gated")

def vae_shape(raw, source="vae/config.json"):
    """The dict of a vae/config.json -> VAEShape. ValueError names the key that is not supported, and `source`."""
    fields = _fields(raw, source, "vae")
    take, (widths, groups) = fields.take, _widths(fields)
    _kinds(fields, "down_block_types", {"DownEncoderBlock2D": False}, len(widths))
    _kinds(fields, "up_block_types", {"UpDecoderBlock2D": False}, len(widths))
    if take("layers_per_block") > 256 or take("latent_channels") > 4096:
        fields.refuse("layers_per_block is above 256, or latent_channels above 4,096")
    return VAEShape(take("in_channels"), take("out_channels"), take("latent_channels"), widths,
                    take("layers_per_block"), groups, take("use_quant_conv", bool), take("use_post_quant_conv", bool),
                    take("scaling_factor", float), take("force_upcast", bool))

def text_shape(raw, source="text_encoder/config.json"):
    """The dict of a text_encoder/config.json -> TextShape. ValueError names the key that is not supported."""
    fields = _fields(raw, source, "text_encoder")
    take = fields.take
    width, heads, layers = take("hidden_size"), take("num_attention_heads"), take("num_hidden_layers")
    if width % heads or layers > 256:
        fields.refuse(f"hidden_size {width} is not divisible by num_attention_heads {heads}, or num_hidden_layers "
                      f"{layers} is above 256")
    return TextShape(take("vocab_size"), take("max_position_embeddings"), width, layers, heads,
                     take("intermediate_size"), fields.raw["hidden_act"], take("layer_norm_eps", float),
                     take("eos_token_id"))

def schedule_of(raw, source="scheduler/scheduler_config.json"):
    """The dict of a scheduler_config.json -> Schedule. ValueError names the key that is not supported, and `source`.

    An absent clip_sample is false, not true as in the class: latents leave -1..1, and diffusers' pipelines say so."""
    fields = _fields(raw, source, "scheduler")
    take, offset = fields.take, _natural(fields, "steps_offset")
    start, end, steps = take("beta_start", float), take("beta_end", float), take("num_train_timesteps")
    if not start <= end < 1 or steps > 10 ** 6 or offset != int(offset):
        fields.refuse(f"beta_start {start} must not be above beta_end {end}, that be below 1, num_train_timesteps "
                      f"{steps} at most 1,000,000 and steps_offset {offset} whole")
    return Schedule(steps, start, end, fields.raw["beta_schedule"], fields.raw["prediction_type"],
                    fields.raw["timestep_spacing"], int(offset), take("set_alpha_to_one", bool),
                    take("clip_sample_range", float) if take("clip_sample", bool) else 0.0)

SHAPES = {"unet": unet_shape, "vae": vae_shape, "text_encoder": text_shape}

# ------------------------------------------------------------------------------------------------------------- weights
VARIANTS = ("", ".fp16", ".bf16")

def _stems(part):
    stems = {".safetensors": "model", ".bin": "pytorch_model"}
    return stems if part == "text_encoder" else dict.fromkeys(stems, "diffusion_pytorch_model")

def _open(folder, part):
    return open_weights(folder, _stems(part), VARIANTS)

def part_sha256(folder, part):
    """The checksum of what makes a part's numbers: its files of weights as they lie there, its shape."""
    folder, raw = read_config(folder, part)
    sums = [file_sha256(path) for path in weight_files(folder, _stems(part), VARIANTS)[0]]
    return hashlib.sha256(repr((sums, SHAPES[part](raw))).encode()).hexdigest()

def _own_name(name, part):
    """The name that the module has; older versions of the libraries wrote some differently."""
    if part == "text_encoder":
        return name.removeprefix("text_model.")
    if part == "vae" and (match := re.fullmatch(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(\w+)", name)):
        return f"{match[1]}.{OLD_ATTENTION[match[2]]}.{match[3]}"
    return name

def _check(source, stored, wanted):
    if lora := [name for name in stored if "lora_" in name or ".lora." in name]:
        raise ValueError(f"{source}: {listed(lora, 3)}: a LoRA that is not merged; fuse_lora() in diffusers, then save")
    check_fit(source, stored, {name: tuple(tensor.shape) for name, tensor in wanted.items()})

def _read(source, stored, dtype):
    """-> dict of name -> tensor in memory of its own; a GLIGEN adapter's stay float32. ValueError: not finite."""
    tensors, bad = {}, []
    for name, (shape, _, read) in stored.items():
        tensors[name] = torch.empty(shape, dtype=torch.float32 if GATED.search(name) else dtype)
        tensors[name].copy_(read())
        bad += bad_values(name, tensors[name])      # as stored, or in the smaller range of `dtype`
    refuse_bad(source, dtype, bad)
    return tensors

def read_weights(folder, part, wanted, dtype=torch.float32, fresh=False):
    """-> dict of diffusers' name -> tensor of `dtype`.

    wanted: a module's state_dict, on the meta device or not. fresh: the adapter's tensors may be absent, all or none.
    ValueError: files missing, damaged or quantised, tensors that are not those of `wanted`, or not finite."""
    stored = {_own_name(name, part): tensor for name, tensor in _open(folder, part).items()
              if not name.endswith("position_ids")}          # a buffer that old versions stored
    if fresh and not any(map(GATED.search, stored)):
        wanted = {name: tensor for name, tensor in wanted.items() if not GATED.search(name)}
    _check(folder, stored, wanted)
    return _read(folder, stored, dtype)

def load_part(build, part, folder, dtype=torch.float32, fresh=None, **change):
    """-> build(shape, config) with the part's weights of `dtype`, frozen, in eval mode, on the CPU.

    change: fields of the shape that are not the folder's. fresh: function that draws the weights of gated layers, if
    the folder may be without them. ValueError names the file, and the key or tensor."""
    folder, raw = read_config(folder, part)
    shape = replace(SHAPES[part](raw, str(folder / "config.json")), **change)
    with torch.device("meta"):                      # no memory and no random numbers for what is read anyway
        model = build(shape, raw)
    tensors = read_weights(folder, part, model.state_dict(), dtype, fresh is not None)
    if fresh and not any(map(GATED.search, tensors)):
        fresh(model)
    model.load_state_dict(tensors, strict=False, assign=True)                # what must be there was checked by name
    assert not any(parameter.is_meta for parameter in model.parameters())
    return model.eval().requires_grad_(False)

# ------------------------------------------------------------------------------------------------------------- adapter
def read_adapter(path, wanted):
    """-> the adapter's tensors, float32, of a .safetensors file or of a folder of a UNet with GLIGEN layers.

    wanted: the UNet's state_dict. ValueError names what is missing, unexpected, of another shape or not finite."""
    path = Path(path)
    stored = whole(path, open_safetensors) if path.is_file() else _open(find(path, "unet"), "unet")
    if path.is_dir():                               # the frozen part of that folder is not wanted here
        stored = {name: tensor for name, tensor in stored.items() if GATED.search(name)}
    if not stored:
        raise ValueError(f"{path} has no GLIGEN layers (position_net, fuser): it is a base, not an adapter")
    _check(path, stored, {name: tensor for name, tensor in wanted.items() if GATED.search(name)})
    return _read(path, stored, torch.float32)

def _writable(path, tensors):
    refuse_to_write(path, tensors)
    return {                                        # clones: a shared layer is one tensor here and several in the file
        name: tensor.detach().cpu().float().contiguous().clone() for name, tensor in tensors.items()}

def adapter_flags(path):
    """-> dict of the flags that write_adapter was told, str; {} of a file or folder of another's."""
    if not Path(path).is_file():
        return {}
    with whole(path, lambda path: safe_open(path, "pt")) as file:
        return {name: value for name, value in (file.metadata() or {}).items() if name != "format"}

def write_adapter(path, tensors, **flags):
    """The adapter's tensors out of a UNet's state_dict, float32, under diffusers' names, in one safetensors file.
    flags: what else it was trained with; whoever loads it must set the same, and diffusers knows none of them.

    In diffusers: UNet2DConditionModel.from_config(dict(base.config, attention_type="gated")), then load_state_dict of
    the base and of this file. ValueError if a tensor is not finite or none is an adapter's; OSError."""
    path, tensors = Path(path), {name: tensor for name, tensor in tensors.items() if GATED.search(name)}
    if not tensors:
        raise ValueError(f"{path} is not written: this UNet has no GLIGEN layers")
    tensors = _writable(path, tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"format": "pt"} | {name: str(value) for name, value in flags.items()}
    replace_file(path, lambda temporary: save_file(tensors, temporary, about))

def write_unet(folder, raw, tensors):
    """config.json and weights, base and adapter, float32: a unet folder that diffusers opens as a GLIGEN model."""
    folder, gated = Path(folder), any(map(GATED.search, tensors))
    tensors = _writable(folder, tensors)
    config = raw | {"_class_name": "UNet2DConditionModel", "attention_type": "gated" if gated else "default"}
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "diffusion_pytorch_model.safetensors",
                 lambda path: save_file(tensors, path, {"format": "pt"}))
    replace_file(folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
