"""Diffusers folders: what small reference models compute (tests/fixtures/make_scenes.py), what moves it, what is
refused, what is written; where diffusers is installed, random models both ways.
"""
import dataclasses
import inspect
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import train_adapter as models
from data.scenes import diffusers_folder as folders
from data.scenes import encoders
from data.scenes.diffusers_folder import GATED, read_adapter, schedule_of, unet_shape, write_adapter, write_unet
from train_adapter import load_schedule, load_text_encoder, load_unet, load_vae

FIXTURES = Path(__file__).parent / "fixtures" / "scenes"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
REFERENCE = {name: load_file(FIXTURES / name / "ref.safetensors") for name in NAMES}
CLOSE = 1e-5
LOAD = {"unet": load_unet, "vae": load_vae, "text_encoder": load_text_encoder, "scheduler": load_schedule}


def layout_of(ref, null=False):
    return {key: ref[key] * (not null) for key in ("boxes", "phrases", "masks")} if "boxes" in ref else {}


def added_of(ref):
    return {"added": {key: ref[key] for key in ("text_embeds", "time_ids")}} if "text_embeds" in ref else {}


def sample(unet, schedule, ref):
    alphas, x, added = models.alphas_of(schedule), ref["noise"], added_of(ref)
    context = torch.cat([torch.zeros_like(ref["context"]), ref["context"]])
    if added:
        added = {"added": {key: torch.cat([value, value]) for key, value in added["added"].items()}}
    twice = {key: torch.cat([value * (key != "masks"), value]) for key, value in layout_of(ref).items()}
    for i, time in enumerate(models.ddim_timesteps(schedule, 5)):
        out = unet(torch.cat([x, x]), torch.tensor(time), context, **added, **(twice if i < 3 else {}))
        plain, told = out.chunk(2)
        x = models.ddim_step(schedule, alphas, x, plain + 3 * (told - plain), time, 5)
    return x


@torch.no_grad()
def outputs(part, model, ref, unet=None):
    """All that the reference has of this part, by the names it has there."""
    if part == "text_encoder":
        return dict(zip(("last_hidden_state", "pooled"), model(ref["ids"])))
    if part == "vae":
        return dict(zip(("mean", "logvar"), model.encode(ref["image"]))) | {"decoded": model.decode(ref["latent"])}
    if part == "scheduler":
        return {"alphas": models.alphas_of(model), "sampled": sample(unet, model, ref),
                "ddim_timesteps": torch.tensor(models.ddim_timesteps(model, 5))}
    given = ref["latents"], ref["timesteps"], ref["context"]
    found = {"prediction": model(*given, **added_of(ref))}
    if "boxes" in ref:
        found |= {"prediction_layout": model(*given, **layout_of(ref)),
                  "prediction_null": model(*given, **layout_of(ref, null=True))}
    return found


def distance(name, part, folder=None, change=None):
    """Largest difference from the reference, relative where numbers are above 1, of a part that `change` changed."""
    folder = folder or FIXTURES / name
    model = LOAD[part](folder)
    if change:
        model = change(model) or model
    unet = load_unet(folder) if part == "scheduler" else None
    found, ref = outputs(part, model, REFERENCE[name], unet), REFERENCE[name]
    if any(found[key].shape != ref[key].shape for key in found):
        return math.inf
    return max(float((found[key] - ref[key]).abs().max() / max(1.0, ref[key].abs().max())) for key in found)


@pytest.fixture
def copy(tmp_path):
    """copy(name, part, **keys of its config) -> a fixture's folder that may be changed."""
    def make(name, part="unet", **keys):
        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(FIXTURES / name, folder)
        path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
        return folder
    return make


def change(folder, file, **tensors):
    """Replace tensors of a safetensors file, with __ for the dots of a name; None removes one."""
    stored = load_file(folder / file) | {name.replace("__", "."): t for name, t in tensors.items()}
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, folder / file)
    return folder


# ------------------------------------------------------------------------------------------------------------ outputs
PARTS = [(name, path.name) for name in NAMES for path in sorted((FIXTURES / name).iterdir()) if path.name in LOAD]


@pytest.mark.parametrize("name, part", PARTS)
def test_outputs_of_the_reference(name, part):
    assert distance(name, part) < CLOSE
    assert part == "scheduler" or distance(name, part, FIXTURES / name / part) < CLOSE


def train(unet, ref):
    adapter = unet.adapter()
    for parameter in adapter.values():
        parameter.requires_grad_()
    optimizer, losses = torch.optim.AdamW(adapter.values(), lr=1e-3, weight_decay=0.0), []
    for _ in range(3):
        out = unet(ref["latents"], ref["timesteps"], ref["context"], **layout_of(ref))
        losses.append(F.mse_loss(out, ref["noise"]))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    gates = [adapter[key].detach() for key in sorted(adapter) if "alpha_" in key]
    return torch.stack(losses).detach(), torch.stack(gates)


def test_three_steps_of_training_of_the_reference():
    ref, unet = REFERENCE["gligen"], load_unet(FIXTURES / "gligen")
    frozen = {key: value.clone() for key, value in unet.state_dict().items() if not GATED.search(key)}
    losses, gates = train(unet, ref)
    assert (losses - ref["losses"]).abs().max() < CLOSE and (gates - ref["gates"]).abs().max() < CLOSE
    assert losses[2] < losses[0] and all(torch.equal(unet.state_dict()[key], value) for key, value in frozen.items())


CONFIGS = {                                         # what is got wrong: fixture, part, keys of its config
    "count of heads is their width": ("sd1", "unet", {"attention_head_dim": 2}),
    "heads in the wrong order": ("sd2", "unet", {"attention_head_dim": [4, 2]}),
    "eps of resnets": ("sd2", "unet", {"norm_eps": 1e-5}), "eps of resnets of SD1": ("sd1", "unet", {"norm_eps": 1e-6}),
    "groups": ("sd1", "unet", {"norm_num_groups": 8}), "sines first": ("sd1", "unet", {"flip_sin_to_cos": False}),
    "cosines first": ("sd2", "unet", {"flip_sin_to_cos": True}), "frequency shift": ("sd2", "unet", {"freq_shift": 0}),
    "activation of text": ("sd1", "text_encoder", {"hidden_act": "gelu"}),
    "activation of text of SD2": ("sd2", "text_encoder", {"hidden_act": "quick_gelu"}),
    "heads of text": ("sd1", "text_encoder", {"num_attention_heads": 4}),
    "eps of text": ("sd2", "text_encoder", {"layer_norm_eps": 1e-5}),
    "end token": ("sd2", "text_encoder", {"eos_token_id": 2}),
    "old end token": ("sd1", "text_encoder", {"eos_token_id": 1}),
    "groups of the VAE": ("sd1", "vae", {"norm_num_groups": 8}),
    "linear betas": ("sd1", "scheduler", {"beta_schedule": "linear"}),
    "scaled betas": ("kolors", "scheduler", {"beta_schedule": "scaled_linear"}),
    "last alpha": ("sd1", "scheduler", {"set_alpha_to_one": True}),
    "offset": ("sd1", "scheduler", {"steps_offset": 0}), "count of timesteps": ("kolors", "scheduler", {
        "num_train_timesteps": 1000}), "clipping": ("gligen", "scheduler", {"clip_sample": False}),
    "range of clipping": ("gligen", "scheduler", {"clip_sample_range": 1.0}),
    **{f"prediction of {name}": (name, "scheduler", {"prediction_type": other}) for name, other in (
        ("sd1", "v_prediction"), ("sd2", "epsilon"), ("gligen", "epsilon"), ("kolors", "sample"))},
    **{f"spacing of {name}": (name, "scheduler", {"timestep_spacing": other}) for name, other in (
        ("sd1", "trailing"), ("sd2", "leading"), ("kolors", "leading"), ("sd2", "linspace"))}}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_got_wrong_moves_the_outputs(copy, what):
    name, part, keys = CONFIGS[what]
    assert distance(name, part, copy(name, part, **keys)) > 1e-3


def each(kind, **attributes):
    """A change: sets attributes of all modules of that class; `inner__name` for one inside."""
    def make(model):
        found = [module for module in model.modules() if isinstance(module, kind)]
        assert found
        for module in found:
            for path, value in attributes.items():
                *inside, last = path.split("__")
                owner = module
                for name in inside:
                    owner = getattr(owner, name)
                assert hasattr(owner, last)
                setattr(owner, last, value(owner) if inspect.isfunction(value) else value)
    return make


def tensors(pattern, make):
    """A change: tensors whose name contains `pattern` become make(tensor)."""
    def changed(model):
        found = {name: tensor for name, tensor in model.named_parameters() if pattern in name}
        assert found
        for tensor in found.values():
            tensor.data = make(tensor.data)
    return changed


def forward(kind, function):
    """A change: another forward for all modules of that class."""
    def make(model):
        for module in (module for module in model.modules() if isinstance(module, kind)):
            module.forward = function.__get__(module)
    return make


def geglu_swapped(self, x):
    gate, value = self.proj(x).chunk(2, -1)
    return value * F.gelu(gate)


def fuser_last(self, x, context, layout, mask):
    x = x + self.attn1(self.norm1(x))
    x = x + self.attn2(self.norm2(x), context)
    x = x if layout is None else self.fuser(x, layout, mask)
    return x + self.ff(self.norm3(x))


def fuser_without_its_norm(self, x, layout, mask):
    both = torch.cat([self.norm1(x), self.linear(layout.tokens)], 1)
    x = x + self.alpha_attn.tanh() * self.attn(both)[:, :x.shape[1]]
    return x + self.alpha_dense.tanh() * self.ff(self.norm2(x))


def swap_gates(model):
    for module in model.modules():
        if isinstance(module, models.Fuser):
            module.alpha_attn, module.alpha_dense = module.alpha_dense, module.alpha_attn


def columns(order):
    """Of position_net's first layer: the last 64 in another order, from (frequency, sin or cos, xyxy)."""
    inner = torch.arange(64).view(8, 2, 4).permute(order).flatten()
    return tensors("position_net.linears.0.weight", lambda t: torch.cat([t[:, :-64], t[:, -64:][:, inner]], 1))


def padded_before(self, x):
    return self.conv(F.pad(x, (1, 0, 1, 0)))


def smooth(self, x, size=None):
    return self.conv(F.interpolate(x, size=size or [2 * n for n in x.shape[-2:]], mode="bilinear"))


def uncausal(self, x):
    h, p = self.layer_norm1(x), self.self_attn
    x = x + p["out_proj"](models.attend(p["q_proj"](h), p["k_proj"](h), p["v_proj"](h), self.heads))
    h = self.mlp["fc1"](self.layer_norm2(x))
    return x + self.mlp["fc2"](h * torch.sigmoid(1.702 * h))


def half_turn(tensor):
    return tensor.roll(len(tensor) // 2, 0)


CODE = {                                            # what is got wrong: fixture, part, change of the model
    "value and gate": ("sd1", "unet", forward(models.GEGLU, geglu_swapped)),
    "eps of the transformer's norm": ("gligen", "unet", each(models.Transformer, norm__eps=1e-5)),
    "bilinear upsampling": ("sd1", "unet", forward(models.Up, smooth)),
    "padding of downsampling": ("sd1", "unet", forward(models.Down, padded_before)),
    "cross-attention's norm": ("sd1", "unet", each(models.Block, norm2=lambda block: block.norm1)),
    "sizes before text": ("kolors", "unet", tensors("add_embedding.linear_1.weight", lambda t: t.roll(20, 1))),
    "no projection of the text": ("kolors", "unet", tensors("encoder_hid_proj.bias", torch.zeros_like)),
    "sizes all one": ("kolors", "unet", tensors("add_embedding.linear_2.bias", torch.zeros_like)),
    "fuser after cross-attention": ("gligen", "unet", forward(models.Block, fuser_last)),
    "tokens not normed": ("gligen", "unet", forward(models.Fuser, fuser_without_its_norm)),
    "gates not squashed": ("gligen", "unet", tensors("alpha_", lambda t: t.clamp(-0.9, 0.9).atanh())),
    "gates swapped": ("gligen", "unet", swap_gates),
    "gates shut": ("gligen", "unet", tensors("alpha_", torch.zeros_like)),
    "gate of attention shut": ("gligen", "unet", tensors("alpha_attn", torch.zeros_like)),
    "norm of the branch": ("gligen", "unet", each(models.UNet, rms_norm=True)),
    "box mask": ("gligen", "unet", each(models.UNet, box_mask=True)),
    "coordinates before frequencies": ("gligen", "unet", columns((2, 1, 0))),
    "sin and cos before frequencies": ("gligen", "unet", columns((1, 0, 2))),
    "cosine before sine": ("gligen", "unet", tensors("position_net.linears.0.weight", lambda t: torch.cat(
        [t[:, :-64], t[:, -64:].view(-1, 8, 2, 4).flip(2).flatten(1)], 1))),
    "phrase after box": ("gligen", "unet", tensors("position_net.linears.0.weight", lambda t: t.roll(64, 1))),
    "null phrase": ("gligen", "unet", tensors("null_positive", torch.zeros_like)),
    "null box": ("gligen", "unet", tensors("null_position_", torch.zeros_like)),
    "padding of the VAE": ("sd1", "vae", forward(models.Down, padded_before)),
    "eps of the VAE": ("sd1", "vae", each(models.Resnet, norm1__eps=1e-5, norm2__eps=1e-5)),
    "eps of the VAE's attention": ("sd1", "vae", each(encoders.VAEAttention, group_norm__eps=1e-5)),
    "old names of attention": ("sd1", "vae", tensors("attentions.0.to_q.weight", lambda t: t.T.contiguous())),
    "mean and variance": ("sd1", "vae", tensors("quant_conv", half_turn)),
    "attention over what is to come": ("sd1", "text_encoder", forward(encoders.TextLayer, uncausal)),
    "positions": ("sd1", "text_encoder", tensors("position_embedding", lambda t: t.roll(1, 0))),
    "last norm": ("sd1", "text_encoder", tensors("final_layer_norm.weight", torch.ones_like))}


@pytest.mark.parametrize("what", CODE)
def test_a_convention_got_wrong_moves_the_outputs(what):
    name, part, changed = CODE[what]
    assert distance(name, part, change=changed) > 1e-3


def geglu_by_tanh(self, x):
    value, gate = self.proj(x).chunk(2, -1)
    return value * F.gelu(gate, approximate="tanh")


def test_the_other_gelu_is_far_from_close():        # the two are nowhere further apart than 5e-4
    assert distance("kolors", "unet", change=forward(models.GEGLU, geglu_by_tanh)) > 20 * CLOSE


def test_log_variances_are_clamped():
    vae, image = load_vae(FIXTURES / "sd1"), REFERENCE["sd1"]["image"]
    vae.quant_conv.bias.data[4:] = torch.tensor([1e3, 25, -1e3, -40])
    assert vae.encode(image)[1].amax((0, 2, 3)).tolist() == [20, 20, -30, -30]


# ------------------------------------------------------------------------------------------------------------ adapter
def run(unet, ref=REFERENCE["sd1"], **layout):
    return unet(ref["latents"], ref["timesteps"], ref["context"], **layout)


LAYOUT = layout_of(REFERENCE["gligen"])


def test_a_fresh_adapter_changes_nothing_and_learns():
    torch.manual_seed(0)
    unet, base = load_unet(FIXTURES / "sd1", adapter=True), load_unet(FIXTURES / "sd1")
    assert torch.equal(run(unet, **LAYOUT), run(base)) and torch.equal(run(unet), run(base))
    assert not any(parameter.requires_grad for parameter in unet.parameters()) and not unet.training
    assert unet.state_dict().keys() - base.state_dict().keys() == unet.adapter().keys()
    assert all(torch.equal(unet.state_dict()[key], value) for key, value in base.state_dict().items())
    adapter = unet.adapter()
    for parameter in adapter.values():
        parameter.requires_grad_()
    run(unet, **LAYOUT).square().mean().backward()
    assert all((parameter.grad.abs().max() > 0) == ("alpha_" in key) for key, parameter in adapter.items())
    tokens = unet.position_net(LAYOUT["boxes"], LAYOUT["phrases"], *[torch.ones(2, 3)] * 2)
    assert tokens.std(1).mean() > 0.5               # boxes can be told apart
    torch.manual_seed(0)
    again = load_unet(FIXTURES / "sd1", adapter=True).state_dict()
    assert all(torch.equal(again[key], value) for key, value in unet.state_dict().items())


def test_what_a_mask_of_boxes_hides():
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.3, 0.0, 1.0, 1.0]]])
    layout = models.Layout(None, boxes, torch.tensor([[1.0, 0.0]]), 1.0, True, False)
    mask = layout.mask(2, 4)
    assert mask.shape == (1, 1, 8, 10) and mask[..., :8].all() and mask[..., 9].all()        # cells and the null token
    assert mask[0, 0, :, 8].tolist() == [True, True, False, False] + [False] * 4
    assert layout.mask(2, 4) is mask
    unet = load_unet(FIXTURES / "gligen")
    unet.box_mask = True
    ref, empty = REFERENCE["gligen"], {**LAYOUT, "boxes": torch.full((2, 3, 4), 0.5)}
    other = {**empty, "phrases": torch.where(LAYOUT["masks"][..., None] > 0, 7.0, LAYOUT["phrases"])}
    assert torch.equal(run(unet, ref, **empty), run(unet, ref, **other))     # seen by no cell
    unet.box_mask = False
    assert not torch.equal(run(unet, ref, **empty), run(unet, ref, **other))


def test_masks_of_boxes_and_phrases_apart():
    unet, ref = load_unet(FIXTURES / "gligen"), REFERENCE["gligen"]
    masks = LAYOUT["masks"]
    both = run(unet, ref, **LAYOUT | {"masks": torch.stack([masks, masks], -1)})
    dropped = run(unet, ref, **LAYOUT | {"masks": torch.stack([masks, 0 * masks], -1)})
    null = run(unet, ref, **LAYOUT | {"masks": 0 * masks})
    assert torch.equal(both, run(unet, ref, **LAYOUT)) and (dropped - both).abs().max() > 1e-3
    assert (dropped - null).abs().max() > 1e-3
    assert torch.equal(run(unet, ref, boxes=LAYOUT["boxes"], phrases=LAYOUT["phrases"]),
                       run(unet, ref, **LAYOUT | {"masks": torch.ones(2, 3)}))
    assert torch.equal(run(unet, ref, **LAYOUT, scale=0.0), run(unet, ref))
    half = run(unet, ref, **LAYOUT, scale=torch.tensor(0.5))
    assert torch.equal(half, run(unet, ref, **LAYOUT, scale=0.5)) and (half - both).abs().max() > 1e-3


def test_shared_fusers_are_written_for_each_block(tmp_path):
    torch.manual_seed(0)
    unet = load_unet(FIXTURES / "sd1", adapter=True)
    alone = sum(parameter.numel() for parameter in unet.adapter().values())
    models.share_fusers(unet)
    for parameter in unet.adapter().values():
        parameter.data += 0.1
    assert sum(parameter.numel() for parameter in unet.adapter().values()) < 0.9 * alone
    write_adapter(tmp_path / "adapter.safetensors", unet.state_dict())
    again = load_unet(FIXTURES / "sd1", adapter=tmp_path / "adapter.safetensors")
    assert torch.equal(run(unet, **LAYOUT), run(again, **LAYOUT))


def test_calls_that_are_refused():
    plain, sized, gated = (load_unet(FIXTURES / name) for name in ("sd1", "kolors", "gligen"))
    with pytest.raises(ValueError, match="gated layers"):
        run(plain, **LAYOUT)
    with pytest.raises(ValueError, match="boxes and phrases go together"):
        run(gated, phrases=LAYOUT["phrases"])
    with pytest.raises(ValueError, match="takes no added"):
        run(plain, added={})
    ref = REFERENCE["kolors"]
    with pytest.raises(ValueError, match="needs added"):
        run(sized, ref)
    with pytest.raises(ValueError, match="60 numbers a row, not 68"):
        run(sized, ref, added={"text_embeds": ref["text_embeds"], "time_ids": ref["time_ids"][:, :5]})
    with pytest.raises(ValueError, match="13 text tokens.*12 positions"):
        load_text_encoder(FIXTURES / "sd1")(torch.zeros(1, 13, dtype=torch.long))
    schedule = load_schedule(FIXTURES / "sd1")
    for steps in (1001, 1000):                      # the offset of 1 would be timestep 1000
        with pytest.raises(ValueError, match=f"{steps} sampling steps"):
            models.ddim_timesteps(schedule, steps)
    with pytest.raises(ValueError, match="force_upcast"):
        load_vae(FIXTURES / "sd1", torch.float16)


def test_targets_and_their_inverse():
    clean, noise, alpha = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0.9, 0.5, 0.1])
    noisy = models.add_noise(clean, noise, alpha)
    for kind in ("epsilon", "v_prediction", "sample"):
        target = models.target_of(clean, noise, alpha, kind)
        for found, wanted in zip(models.clean_and_noise(noisy, target, alpha.view(-1, 1, 1, 1), kind), (clean, noise)):
            assert (found - wanted).abs().max() < CLOSE


# ------------------------------------------------------------------------------------------------------------ configs
def refused(part, folder, *culprits, **options):
    with pytest.raises(ValueError) as caught:
        LOAD[part](folder, **options)
    text = str(caught.value)
    assert "\n" not in text and all(culprit in text for culprit in (str(folder), *culprits)), text


REFUSED = [                                         # part, keys of its config, what must be named
    *(("unet", {key: value}, f"{key} {value!r} supported") for key, value in {
        "center_input_sample": True, "only_cross_attention": True, "dual_cross_attention": True, "act_fn": "gelu",
        "class_embed_type": "projection", "num_class_embeds": 1000, "resnet_time_scale_shift": "scale_shift",
        "resnet_skip_time_act": True, "resnet_out_scale_factor": 1.5, "time_embedding_type": "fourier",
        "time_embedding_dim": 64, "time_embedding_act_fn": "silu", "timestep_post_act": "silu", "conv_in_kernel": 1,
        "time_cond_proj_dim": 256, "conv_out_kernel": 1, "class_embeddings_concat": True, "downsample_padding": 0,
        "mid_block_only_cross_attention": True, "cross_attention_norm": "layer_norm", "mid_block_scale_factor": 2,
        "addition_embed_type": "image", "encoder_hid_dim_type": "ip_image_proj", "attention_type": "gated-text-image",
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "num_attention_heads": 8,
        "reverse_transformer_layers_per_block": [1, 1]}.items()),
    *(("unet", {key: value}, f"{key} {value!r:.60}")
      for key in ("norm_num_groups", "cross_attention_dim", "in_channels")
      for value in (0, -4, "4", 4.0, True, None, [4], 10 ** 12)),
    *(("unet", {key: value}, f"{key} {value!r:.60}") for key in (
        "layers_per_block", "attention_head_dim", "transformer_layers_per_block", "block_out_channels")
      for value in (0, [1], "1", [1, 1, 1, 1], [1, 2, None], [1, [2], 1])),
    ("unet", {"down_block_types": ["CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"]}, "AttnDownBlock2D are"),
    ("unet", {"up_block_types": ["UpBlock2D", "SimpleCrossAttnUpBlock2D", "UpBlock2D"]}, "SimpleCrossAttnUpBlock2D"),
    ("unet", {"down_block_types": ["DownBlock2D"]}, "down_block_types 1 3"),
    ("unet", {"down_block_types": None}, "down_block_types None"), ("unet", {"down_block_types": [{}] * 3}, "{}"),
    ("unet", {"in_channels": 9}, "in_channels 9 out_channels 4"), ("unet", {"out_channels": 8}, "out_channels 8"),
    ("unet", {"attention_head_dim": 5}, "attention_head_dim 16 by 5"),
    ("unet", {"norm_num_groups": 5}, "norm_num_groups 5"),
    ("unet", {"norm_eps": 0}, "norm_eps 0"), ("unet", {"norm_eps": math.nan}, "norm_eps nan"),
    ("unet", {"freq_shift": -1}, "freq_shift -1"), ("unet", {"freq_shift": 8}, "freq_shift 8"),
    ("unet", {"flip_sin_to_cos": 1}, "flip_sin_to_cos 1"),
    ("unet", {"layers_per_block": 1000}, "layers_per_block 1000"),
    ("unet", {"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim"),
    ("unet", {"addition_embed_type": "text_time"}, "addition_time_embed_dim"),
    ("unet", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config float32"),
    ("unet", {"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel UNet2DConditionModel"),
    ("unet", {"_class_name": "AutoencoderKL"}, "AutoencoderKL UNet2DConditionModel"),
    ("vae", {"_class_name": "AsymmetricAutoencoderKL"}, "AsymmetricAutoencoderKL"),
    ("vae", {"shift_factor": 0.1}, "shift_factor 0.1"), ("vae", {"latents_mean": [0.0] * 4}, "latents_mean"),
    ("vae", {"mid_block_add_attention": False}, "mid_block_add_attention"),
    ("vae", {"latent_channels": 0}, "latent_channels 0"),
    ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "AttnDownEncoderBlock2D"),
    ("vae", {"scaling_factor": 0}, "scaling_factor 0"), ("vae", {"act_fn": "relu"}, "act_fn relu"),
    ("text_encoder", {"model_type": "t5"}, "'t5' CLIPTextModel prepare.py"),
    ("text_encoder", {"architectures": ["CLIPTextModelWithProjection"]}, "CLIPTextModelWithProjection"),
    ("text_encoder", {"architectures": ["ChatGLMModel"]}, "ChatGLMModel"),
    ("text_encoder", {"hidden_act": "relu"}, "hidden_act relu"),
    ("text_encoder", {"hidden_size": 25}, "hidden_size 25"),
    ("text_encoder", {"eos_token_id": [2]}, "eos_token_id [2]"),
    ("text_encoder", {"layer_norm_eps": "x"}, "layer_norm_eps 'x'"),
    *(("scheduler", {key: value}, f"{key} {value!r} supported") for key, value in {
        "prediction_type": "flow_prediction", "beta_schedule": "squaredcos_cap_v2", "trained_betas": [0.1],
        "thresholding": True, "rescale_betas_zero_snr": True, "timestep_spacing": "log"}.items()),
    ("scheduler", {"prediction_type": None}, "prediction_type None"), ("scheduler", {"beta_end": 0}, "beta_end 0"),
    ("scheduler", {"beta_start": 0.5}, "beta_start 0.5 beta_end"), ("scheduler", {"beta_end": 1.0}, "beta_end 1.0"),
    ("scheduler", {"steps_offset": 0.5}, "steps_offset 0.5"),
    ("scheduler", {"set_alpha_to_one": 0}, "set_alpha_to_one 0"),
    ("scheduler", {"num_train_timesteps": 10 ** 7}, "num_train_timesteps 10000000"),
    ("scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler DDIMScheduler")]


@pytest.mark.parametrize("part, keys, culprits", REFUSED, ids=lambda value: str(value)[:50])
def test_configs_that_are_refused_by_name(copy, part, keys, culprits):
    refused(part, copy("sd1", part, **keys), *culprits.split())


WEIRD = [None, True, False, 0, -1, 3, 2 ** 30, 10 ** 12, 0.5, 1e-40, 1e300, math.nan, "x", [], [1], [1, 2], [None] * 2,
         {}, [[1], [2]], [2 ** 30] * 2]


@pytest.mark.parametrize("name, part", [
    ("kolors", "unet"), ("sd1", "vae"), ("sd1", "text_encoder"), ("sd1", "scheduler")])
def test_any_value_of_any_key_is_read_or_refused_in_one_line(name, part):
    raw = json.loads(next((FIXTURES / name / part).glob("*config.json")).read_text())
    make, build = {"unet": (folders.unet_shape, models.UNet), "vae": (folders.vae_shape, encoders.VAE),
                   "text_encoder": (folders.text_shape, models.CLIPText),
                   "scheduler": (schedule_of, models.alphas_of)}[part]
    for key in (*folders.DEFAULTS[part], *folders.ONLY[part], "_use_default_values"):
        for value in WEIRD:
            try:
                shape = make(raw | {key: value}, "here")
            except ValueError as error:
                assert str(error).startswith("here: ") and "\n" not in str(error)
            else:
                with torch.device("cpu" if part == "scheduler" else "meta"):
                    build(shape)


@pytest.mark.parametrize("name, part, keys", [
    ("sd1", "unet", {"only_cross_attention": None, "class_embeddings_concat": None, "upcast_attention": True}),
    ("sd1", "unet", {"act_fn": "swish", "dropout": 0.1, "sample_size": 96, "_diffusers_version": "0.2.2"}),
    ("sd1", "unet", {"layers_per_block": [1, 1, 1], "attention_head_dim": [4, 4, 4]}),
    ("kolors", "unet", {"encoder_hid_dim_type": None}), ("sd1", "vae", {"scaling_factor": 1, "force_upcast": None}),
    ("sd1", "text_encoder", {"architectures": None, "projection_dim": 7, "torch_dtype": "float16"}),
    ("sd1", "scheduler", {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 2, "use_karras_sigmas": True}),
    ("sd1", "scheduler", {"thresholding": None, "timestep_spacing": "linspace",
                          "_use_default_values": ["timestep_spacing"]})])
def test_keys_that_change_nothing(copy, name, part, keys):
    assert distance(name, part, copy(name, part, **keys)) < CLOSE


def test_absent_keys_mean_what_the_libraries_mean():
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    classes = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL,
               "scheduler": diffusers.DDIMScheduler, "text_encoder": transformers.CLIPTextConfig}
    for part, kind in classes.items():
        known = inspect.signature(kind.__init__).parameters
        absent = {key: values[0] for key, values in folders.ONLY[part].items()} | folders.DEFAULTS[part]
        for key, value in absent.items():
            found = getattr(kind(), key) if part == "text_encoder" else known[key].default
            if key != "clip_sample":                # what diffusers' pipelines set it to
                assert (list(found) if isinstance(found, tuple) else found) == value or not found and not value, key


def test_shapes_of_published_models():
    """Counts of parameters, as published: SD 1.5, SD 2.1, SDXL, and GLIGEN's layers on SD 1.4."""
    def count(raw):
        with torch.device("meta"):
            unet = models.UNet(unet_shape(raw))
        return sum(p.numel() for p in unet.parameters()), sum(p.numel() for p in unet.adapter().values())
    sd1, sdxl = {"cross_attention_dim": 768}, {
        "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True, "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"]}
    assert count(sd1) == (859_520_964, 0) and count(sdxl) == (2_567_463_684, 0)
    sd2 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
    assert count(sd2) == (865_910_724, 0)
    assert 205e6 < count(sd1 | {"attention_type": "gated"})[1] < 213e6


# -------------------------------------------------------------------------------------------------------------- files
def test_folders_that_are_refused(copy, tmp_path):
    for part in LOAD:
        refused(part, tmp_path / "nowhere", "scheduler_config.json" if part == "scheduler" else "config.json", part)
    for file in ("adapter_config.json", "pytorch_lora_weights.safetensors"):
        folder = copy("sd1")
        (folder / "unet" / file).write_text("{}")
        refused("unet", folder, "LoRA", file, "fuse_lora")
    for text in ('{"_class_name": 1', "[]", "7", "\xff", "[" * 100_000, ""):
        folder = copy("sd1")
        (folder / "vae" / "config.json").write_bytes(text.encode("latin-1"))
        refused("vae", folder, "config.json")
    folder = copy("gligen")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "model.safetensors")
    refused("unet", folder, "no weights", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", ".fp16")


FILES = [("gligen", "unet", "diffusion_pytorch_model.safetensors"), ("sd2", "unet", "diffusion_pytorch_model.bin"),
         ("sd1", "unet", "diffusion_pytorch_model-00002-of-00002.safetensors"),
         ("sd1", "text_encoder", "model.safetensors"), ("kolors", "unet", "diffusion_pytorch_model.fp16.safetensors")]


@pytest.mark.parametrize("name, part, file", FILES)
def test_damaged_files_are_named(copy, name, part, file):
    whole = (FIXTURES / name / part / file).read_bytes()
    for blob in (whole[:-1], whole[:len(whole) // 2], b"", b"\0" * 100):
        folder = copy(name)
        (folder / part / file).write_bytes(blob)
        refused(part, folder, file)
    (folder / part / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(part, folder, file, "git lfs pull")


class Code:
    def __reduce__(self):
        return print, ("code that was run",)


@pytest.mark.parametrize("content", [Code(), {"a": Code()}, [torch.zeros(2)], {"a": 1}])
def test_a_bin_that_is_more_than_tensors_is_refused_and_not_run(copy, capsys, content):
    folder = copy("sd2")
    torch.save(content, folder / "unet" / "diffusion_pytorch_model.bin")
    refused("unet", folder, "diffusion_pytorch_model.bin")
    assert "code that was run" not in capsys.readouterr().out


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b", "", "gone", "a\\b", 7])
def test_an_index_names_files_of_its_folder(copy, file):
    folder = copy("sd1")
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["conv_in.weight"] = file
    index.write_text(json.dumps(table))
    refused("unet", folder, "index.json", repr(str(file))[1:-1])


# ------------------------------------------------------------------------------------------------------------ tensors
def test_each_tensor_that_does_not_fit_is_named(copy):
    file, block = "unet/diffusion_pytorch_model.safetensors", "down_blocks.0.attentions.0.transformer_blocks.0"
    refused("unet", change(copy("gligen"), file, conv_in__weight=None, **{f"{block}.fuser.alpha_attn": None}),
            f"2 missing: conv_in.weight [16, 4, 3, 3], {block}.fuser.alpha_attn []")
    refused("unet", change(copy("gligen"), file, **{f"{block}.attn1.to_q.bias": torch.zeros(16)}),
            f"1 unexpected: {block}.attn1.to_q.bias [16]")
    refused("unet", change(copy("gligen"), file, conv_in__bias=torch.zeros(17)),
            "1 of another shape: conv_in.bias [17] instead of [16]")
    refused("unet", copy("gligen", attention_type="default"), "unexpected", "fuser", "more")
    refused("unet", copy("sd1", attention_type="gated"), "missing", "position_net")
    refused("unet", change(copy("gligen"), file, **{f"{block}.fuser.alpha_attn": None}), "1 missing", adapter=True)
    refused("unet", copy("gligen", use_linear_projection=True), "proj_in.weight [16, 16, 1, 1] instead of [16, 16]")
    refused("unet", change(copy("gligen"), file, **{f"{block}.attn1.to_q.lora_A.weight": torch.zeros(4, 16)}), "LoRA")
    refused("unet", change(copy("gligen"), file, conv_in__weight=torch.zeros(16, 4, 3, 3, dtype=torch.int8)),
            "conv_in.weight", "quantised")
    refused("vae", copy("sd2", "vae", use_quant_conv=True), "2 missing: quant_conv.weight [8, 8, 1, 1], quant_conv.b")
    refused("text_encoder", copy("sd1", "text_encoder", vocab_size=98), "token_embedding.weight [99, 24] instead of")


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
def test_weights_that_are_not_finite_are_named(copy, value):
    file = "text_encoder/model.safetensors"
    name = "text_model.encoder.layers.1.mlp.fc1.weight"
    tensor = load_file(FIXTURES / "sd1" / file)[name].float()
    tensor[3, 4] = value
    folder = change(copy("sd1"), file, **{name: tensor})
    refused("text_encoder", folder, "encoder.layers.1.mlp.fc1.weight (1 of 960 values)", "float16", dtype=torch.float16)
    if value == 1e6:
        load_text_encoder(folder, torch.bfloat16)


def test_old_buffers_and_double_precision(copy):
    folder = copy("sd1")
    file = folder / "text_encoder" / "model.safetensors"
    stored = {key.removeprefix("text_model."): tensor.double() for key, tensor in load_file(file).items()}
    save_file(stored | {"embeddings.position_ids": torch.arange(12)[None]}, file)
    assert distance("sd1", "text_encoder", folder) < CLOSE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_adapter_is_float32_whatever_the_base(dtype):
    for name in ("gligen", "sd1"):
        unet = load_unet(FIXTURES / name, dtype, adapter=True)
        adapter = unet.adapter()
        for key, parameter in unet.named_parameters():
            assert parameter.dtype == (torch.float32 if key in adapter else dtype), key
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert run(load_unet(FIXTURES / "gligen", torch.bfloat16), **LAYOUT).isfinite().all()


# -------------------------------------------------------------------------------------------------------------- write
def test_an_adapter_comes_back_bit_for_bit(tmp_path):
    unet = load_unet(FIXTURES / "gligen")
    path = tmp_path / "new" / "adapter.safetensors"
    write_adapter(path, unet.state_dict())
    assert load_file(path).keys() == unet.adapter().keys() and [p.name for p in path.parent.iterdir()] == [path.name]
    fresh = load_unet(FIXTURES / "gligen")
    for parameter in fresh.adapter().values():
        parameter.data.zero_()
    for source in (path, FIXTURES / "gligen", FIXTURES / "gligen" / "unet"):
        found = read_adapter(source, fresh.state_dict())
        assert found.keys() == unet.adapter().keys()
        assert all(torch.equal(found[key], value) for key, value in unet.adapter().items())
    for bad, culprit in ((FIXTURES / "sd1", "no GLIGEN layers"), (tmp_path / "gone", "no weights")):
        with pytest.raises(ValueError, match=culprit):
            read_adapter(bad, unet.state_dict())
    with pytest.raises(ValueError, match="missing.*down_blocks.1.attentions.0"):       # of a wider base
        load_unet(FIXTURES / "sd1", adapter=path)
    change(tmp_path, "new/adapter.safetensors", conv_in__bias=torch.zeros(16))
    with pytest.raises(ValueError, match="unexpected: conv_in.bias"):
        read_adapter(path, unet.state_dict())


def test_nothing_is_written_that_is_not_finite_or_not_whole(tmp_path, monkeypatch):
    unet, path = load_unet(FIXTURES / "gligen"), tmp_path / "adapter.safetensors"
    write_adapter(path, unet.state_dict())
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError("No space left on device")))
        with pytest.raises(OSError):
            write_adapter(path, unet.state_dict())
    unet.position_net.null_position_feature.data[3] = math.nan
    for write in (lambda: write_adapter(path, unet.state_dict()),
                  lambda: write_unet(tmp_path / "unet", unet.raw, unet.state_dict())):
        with pytest.raises(ValueError, match="not finite: position_net.null_position_feature"):
            write()
    with pytest.raises(ValueError, match="no GLIGEN layers"):
        write_adapter(path, load_unet(FIXTURES / "sd1").state_dict())
    assert before == path.read_bytes() and [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", NAMES)
def test_a_unet_comes_back_bit_for_bit(name, tmp_path):
    unet = load_unet(FIXTURES / name, adapter=name == "sd1")
    write_unet(tmp_path / "unet", unet.raw, unet.state_dict())
    again = load_unet(tmp_path)
    assert again.shape == unet.shape and again.state_dict().keys() == unet.state_dict().keys()
    assert all(torch.equal(again.state_dict()[key], value) for key, value in unet.state_dict().items())


# ------------------------------------------------------------------------------------------------- with the reference
LIVE = {"SD1": dict(layers_per_block=2, block_out_channels=[8, 16, 16, 24], attention_head_dim=2, norm_num_groups=4,
                    cross_attention_dim=12, sample_size=11),
        "XL": dict(block_out_channels=[8, 16], attention_head_dim=[2, 4], norm_num_groups=4, cross_attention_dim=12,
                   down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], transformer_layers_per_block=[1, 3],
                   up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], use_linear_projection=True, sample_size=11,
                   addition_embed_type="text_time", addition_time_embed_dim=6,
                   projection_class_embeddings_input_dim=20)}


def shake(model, seed=3):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", LIVE)
def test_unets_against_the_library_both_ways(kind, gated, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    theirs = shake(diffusers.UNet2DConditionModel(**LIVE[kind], attention_type="gated" if gated else "default"))
    theirs.save_pretrained(tmp_path / "theirs")
    x, t, context = torch.randn(2, 4, 11, 13), torch.tensor([3, 977]), torch.randn(2, 6, 12)
    boxes = torch.tensor([0.1, 0.2, 0.6, 0.9]).repeat(2, 3, 1) * torch.rand(2, 3, 1)
    layout = {"boxes": boxes, "phrases": torch.randn(2, 3, 12), "masks": torch.tensor([[1.0, 0, 1], [1, 1, 0]])}
    sizes = {"text_embeds": torch.randn(2, 8), "time_ids": torch.tensor([[64.0, 3], [9, 12]])} if kind == "XL" else None

    def wanted(model):
        args = {"boxes": boxes, "masks": layout["masks"], "positive_embeddings": layout["phrases"]}
        return model(x, t, encoder_hidden_states=context, added_cond_kwargs=sizes, cross_attention_kwargs={
            "gligen": args} if gated else None).sample

    with torch.no_grad():
        unet, out = load_unet(tmp_path / "theirs"), wanted(theirs)
        given = layout if gated else {}
        assert out.std() > 0.05 and (unet(x, t, context, added=sizes, **given) - out).abs().max() < CLOSE
        shake(unet, 4)
        write_unet(tmp_path / "ours", unet.raw, unet.state_dict())
        opened, found = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
        ours = unet(x, t, context, added=sizes, **given)
        assert (ours - wanted(opened.eval())).abs().max() < CLOSE and (ours - out).abs().max() > 1e-3


def test_an_adapter_opens_in_the_library(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    unet = load_unet(FIXTURES / "gligen")
    write_adapter(tmp_path / "adapter.safetensors", unet.state_dict())
    base = {key: value for key, value in unet.state_dict().items() if not GATED.search(key)}
    theirs = diffusers.UNet2DConditionModel.from_config(dict(unet.raw, attention_type="gated")).eval()
    theirs.load_state_dict(base | load_file(tmp_path / "adapter.safetensors"))
    ref, args = REFERENCE["gligen"], layout_of(REFERENCE["gligen"])
    out = theirs(ref["latents"], ref["timesteps"], encoder_hidden_states=ref["context"], cross_attention_kwargs={
        "gligen": {"boxes": args["boxes"], "masks": args["masks"], "positive_embeddings": args["phrases"]}}).sample
    assert (out - ref["prediction_layout"]).abs().max() < CLOSE


def test_vae_text_and_schedulers_against_the_library(tmp_path):
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    theirs = shake(diffusers.AutoencoderKL(
        block_out_channels=[8, 16, 16], down_block_types=["DownEncoderBlock2D"] * 3, layers_per_block=2,
        norm_num_groups=4, up_block_types=["UpDecoderBlock2D"] * 3, latent_channels=3, use_post_quant_conv=False))
    theirs.save_pretrained(tmp_path / "vae")
    image, latent, ours = torch.randn(2, 3, 20, 28), torch.randn(2, 3, 5, 7), load_vae(tmp_path)
    with torch.no_grad():
        wanted, (mean, logvar) = theirs.encode(image).latent_dist, ours.encode(image)
        assert (mean - wanted.mean).abs().max() < CLOSE and (logvar - wanted.logvar).abs().max() < CLOSE
        assert (ours.decode(latent) - theirs.decode(latent).sample).abs().max() < CLOSE
    for act, eos in (("quick_gelu", 2), ("gelu", 5)):
        text = shake(transformers.CLIPTextModel(transformers.CLIPTextConfig(
            vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=9, hidden_act=act, eos_token_id=eos, bos_token_id=0, pad_token_id=1)))
        text.save_pretrained(tmp_path / "text_encoder")
        ids = torch.randint(0, 61, (3, 9))
        with torch.no_grad():
            out, (hidden, pooled) = text(input_ids=ids), load_text_encoder(tmp_path)(ids)
        for found, wanted in ((hidden, out.last_hidden_state), (pooled, out.pooler_output)):
            assert (found - wanted).abs().max() < CLOSE
    x, prediction = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    for kind in ("epsilon", "v_prediction", "sample"):
        for spacing in ("leading", "trailing", "linspace"):
            for one, clip, offset in ((True, False, 0), (False, True, 1)):
                scheduler = diffusers.DDIMScheduler(
                    prediction_type=kind, timestep_spacing=spacing, set_alpha_to_one=one, clip_sample=clip,
                    steps_offset=offset, beta_schedule="scaled_linear")
                schedule = schedule_of(json.loads(scheduler.to_json_string()))
                alphas = models.alphas_of(schedule)
                for steps in (1, 7, 50, 333, 999):
                    scheduler.set_timesteps(steps)
                    assert (times := models.ddim_timesteps(schedule, steps)) == scheduler.timesteps.tolist()
                    for time in {times[0], times[len(times) // 2], times[-1]}:
                        wanted = scheduler.step(prediction, time, x).prev_sample
                        found = models.ddim_step(schedule, alphas, x, prediction, time, steps)
                        assert torch.allclose(found, wanted, rtol=1e-5, atol=CLOSE)


def test_shapes_are_frozen():
    for part, shape in (("unet", folders.UNetShape), ("vae", folders.VAEShape), ("text_encoder", folders.TextShape)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            LOAD[part](FIXTURES / "sd1").shape.groups = 1
