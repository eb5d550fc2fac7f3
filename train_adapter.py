"""
Boxes with phrases steer a frozen text-to-image model: a zero-init gated spatial adapter (GLIGEN), trained alone.

python train_adapter.py                               # no flags: toy scenes, a frozen base, its adapter, the table
python train_adapter.py --dry_run                     # everything once, in seconds
python train_adapter.py --phase base --run_name tiny && python train_adapter.py --base out/tiny
python train_adapter.py --base DIR --data_name coco --run_name boxes      # a diffusers folder, see data/README.md
torchrun --nproc_per_node=8 train_adapter.py --base DIR --data_name coco --run_name boxes          # eight GPUs
torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 train_adapter.py --base DIR
python train_adapter.py --resume --run_name boxes     # goes on from the newest checkpoint, on a CPU bit for bit
python train_adapter.py eval --run_name boxes         # gates, gaps, pairs of samples, the gate-scale table of a toy
python train_adapter.py sample --run_name boxes --layout layout.json --gate_scale 0,0.5,1

Without flags, 4 minutes on 2 CPU cores: acc50 (objects where their box says) .88 at scale 1, .04 of the base.

latents (B, C, H, W) + noise, text (B, L, D), boxes (B, N, 4), phrases (B, N, P) -> frozen UNet with a fuser between
self- and cross-attention of each block: x += s tanh(a1) attn([x; boxes]); x += s tanh(a2) ff(x) -> noise or latents

What used to break here                                       and what stops it
  gate 0 and a zero output: all gradients 0 for ever            check_alive: one backward before the first step
  float16 parameters: gates stall at .25                        Adapter: what is trained is float32
  padded layouts that still inject                              null tokens are learned, and no mask row is empty
  guidance whose unconditional half has the boxes               generate: empty caption and null layout together
  a loss that says nothing                                      evaluate: fixed noise, the gap to shuffled boxes
  means of signed gates that cancel                             gates_of: |tanh| per layer
  whole models in each checkpoint                               the base hangs outside; its hash is in the file

Li et al. 2023 (GLIGEN, arXiv 2301.07093, eq. 5 and 8). Rombach et al. 2022 (latent diffusion, arXiv 2112.10752). Song
et al. 2021 (DDIM, arXiv 2010.02502, eq. 12). Salimans, Ho 2022 (v-prediction, arXiv 2202.00512). Ho, Salimans 2022
(classifier-free guidance, arXiv 2207.12598).
"""
import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common import (DTYPES, RING, Guard, NonFinite, agree, autocast, cast, every, fail, finish, global_rows, launch,
                    listen, local_rows, pick_dtype, rank, seed_step, unwrap, world_size, wrap_ddp)
from data.files import demo_set, file_sha256, or_fail
from data.scenes import demo, pictures, report
from data.scenes.diffusers_folder import (GATED, Schedule, TextShape, adapter_flags, load_part, part_sha256,
                                          read_adapter, read_config, schedule_of, write_adapter)
from data.scenes.encoders import CLIPText, Down, Level, Resnet, Up, attend, load_text_encoder, load_vae  # noqa: F401
from runs import (Run, checkpoints, complete, load_newest, load_tensors, model_tensors, parse_flags,
                  read_config as read_flags, read_file, restore, resume_config, save_checkpoint, steps_in, write_file,
                  write_whole)

# B rows, N boxes, L text tokens, H x W cells of a level, T = H * W cells as tokens, D width, S pixels a side


# ---------------------------------------------------------------------------------------------------------- config
@dataclass
class Config:
    # common to all scripts
    run_name: str = ""  # folder in out_dir; empty: made from the time
    out_dir: str = "out"  # where runs are written
    data_dir: str = ""  # prepared data; empty: the demo set, built if missing
    seed: int = 0  # of weights, row order and dropout
    device: str = "auto"  # auto, cuda, mps, cpu
    dtype: str = "auto"  # of the autocast: auto, float32, bfloat16, float16
    compile: bool = False  # torch.compile the model
    batch_size: int = 2  # rows per process and micro-batch
    grad_accum: int = 1  # micro-batches per optimizer step
    max_epochs: int = 1  # passes over the training rows
    max_steps: int = 0  # optimizer steps; 0: as max_epochs says
    learning_rate: float = 1e-4  # after the warm-up
    min_lr: float = 0.0  # at the end of the cosine, as a share of learning_rate
    warmup_steps: int = 40  # of linear warm-up
    weight_decay: float = 0.0  # on matrices and embeddings, not on biases and norms
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.99  # of AdamW
    grad_clip: float = 1.0  # largest global gradient norm; 0: off
    on_nonfinite: str = "skip"  # skip the step, or stop the run
    max_skips: int = 10  # more in a row, or in total more than max(this, 1 % of the steps), stop the run
    skip_steps: str = ""  # steps to pass over, as 17,40-45
    eval_every: int = 2000  # steps between validations; 0: only at the end
    save_every: int = 2000  # steps between checkpoints; 0: only at the end
    keep: int = 0  # newest checkpoints that stay; 0: all
    sample_every: int = 2000  # steps between looks at samples; 0: only at the end
    log_every: int = 50  # steps between progress lines; 0: none
    resume: bool = False  # go on from the newest checkpoint of run_name
    dry_run: bool = False  # a tiny model and few steps: does everything run?
    wandb: str = ""  # offline or online; empty: off
    # this script
    phase: str = ""  # base or adapter; empty: the adapter, and before it a toy base if none is given
    base: str = ""  # the frozen model: a diffusers folder, or the run of a toy base
    base_dtype: str = "float32"  # in which it is held: float32, bfloat16, float16
    base_steps: int = 700  # of the toy base that is trained first when phase is empty
    adapter: str = ""  # gated weights to start from: a diffusers folder with GLIGEN layers, or a final.safetensors
    decay: str = "constant"  # of the learning rate: constant, cosine, late (linear to 0 over the last half)
    gate_lr: float = 5.0  # the gates' learning rate, as a multiple
    phrase_dropout: float = 0.1  # share of boxes without their phrase
    layout_dropout: float = 0.1  # share of rows without boxes, for guidance
    caption_dropout: float = 0.1  # share of rows with the empty caption, for guidance
    scale_min: float = 0.5  # of what the gated layers add, drawn for each step
    scale_max: float = 1.0  # its upper end
    box_mask: bool = False  # a cell sees a box's token only if its centre lies in the box; GLIGEN's are without
    rms_norm: bool = False  # normalise what the gated attention adds, so that its root mean square is the gate
    share_fusers: bool = False  # one gated layer for all blocks of a width: far fewer parameters
    t_bias: str = ""  # cubic: draw noisy timesteps more often; empty: uniform
    width: int = 64  # of the toy base
    depth: int = 4  # its blocks
    patch: int = 4  # pixels a side of its tokens
    guidance: float = 7.5  # classifier-free, of samples
    sample_steps: int = 50  # of DDIM
    beta: float = 1.0  # share of the sampling steps, from the noisy end, that have the adapter
    eval_rows: int = 200  # held-out rows looked at; 0: all


DEMO = dict(batch_size=32, max_steps=650, learning_rate=2e-3, decay="late", box_mask=True, rms_norm=True, width=96,
            eval_every=50, save_every=325, keep=2, sample_every=0, guidance=2.0, sample_steps=12)
DRY = dict(batch_size=4, max_steps=4, base_steps=4, eval_every=2, save_every=2, log_every=1, eval_rows=8,
           sample_steps=2)
ALIASES = {"epochs": "max_epochs", "lr": "learning_rate", "data_name": "data_dir=data/scenes/{}"}
FORM = ("box_mask", "rms_norm")                     # of the adapter: weights fit these alone
FIXED = ("data_dir", "phase", "base", "seed", "box_mask", "rms_norm", "share_fusers", "width", "depth", "patch",
         "adapter", "base_dtype")                   # a resume keeps them


# ------------------------------------------------------------------------------------------------------------ data
@dataclass(eq=False)
class Data:
    """What data/scenes/prepare.py wrote. A toy's arrays are on the device; latents and texts are read from the disk
    when they are asked for; phrase, caption and split stay numpy arrays in any case."""
    folder: Path
    meta: dict
    table: dict                                     # name -> (n, ...) array or tensor
    rows: dict                                      # split -> int64 of its rows
    device: torch.device
    key: str                                        # checksum of meta.json

    @property
    def toy(self):
        return self.meta["kind"] == "toy"

    def some(self, split, most=0):
        """-> rows of a split, int64, in order; at most so many, always the same; 0: all"""
        rows = self.rows[split]
        return np.sort(np.random.default_rng(0).permutation(rows)[:most]) if 0 < most < len(rows) else rows

    def take(self, name, rows):
        """-> the rows of an array on the device, floats as float32"""
        array = self.table[name]
        if torch.is_tensor(array):
            return array[cast(rows, array.device)]
        return cast(np.ascontiguousarray(array[rows]), self.device, torch.float32)


def load_data(config, device="cpu"):
    """data_dir -> Data; without it the demo set of toy scenes."""
    folder = Path(config.data_dir) if config.data_dir else demo_set("scenes", "demo", device)
    return or_fail(read_folder, folder, torch.device(device))


def read_folder(folder, device):
    """ValueError: not a folder that data/scenes/prepare.py has finished."""
    try:
        meta, table = json.loads((folder / "meta.json").read_text(encoding="utf-8")), {}
        needed = {"toy": ("labels", "colours", "kinds"), "latents": ("latents",)}[meta["kind"]]
        for name in ("boxes", "phrase", "caption", "split", "contexts", "phrases", *needed):
            table[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
        for name in ("pooled", "time_ids") if (folder / "pooled.npy").exists() else ():
            table[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
        pictures.check_arrays(table, meta)
        rows = {name: np.flatnonzero(table["split"] == i) for i, name in enumerate(meta["splits"])}
        for name in {*table} - {"phrase", "caption", "split"} if meta["kind"] == "toy" else ():
            table[name] = torch.from_numpy(np.array(table[name])).to(device)
    except Exception as error:                      # a damaged array or meta.json has any type, shape and value
        raise ValueError(f"--data_dir {folder}: no prepared scenes ({error!r:.100}); python data/scenes/prepare.py "
                         "--help tells how to make some") from None
    if not len(rows.get("train", [])) or not len(rows.get("val", [])):
        raise ValueError(f"--data_dir {folder}: no rows to train on, or none to validate on")
    return Data(folder, meta, table, rows, device, file_sha256(folder / "meta.json"))


def get_rows(data, rows):
    """-> dict of clean (B, C, H, W), context, boxes, phrases, masks (B, N, 2): box and phrase apart, empty: the empty
    caption, (1, ...) like context; of latents for an SDXL-shaped UNet also pooled, empty_pooled and time_ids."""
    phrase, caption = data.table["phrase"][rows], data.table["caption"][rows]
    batch = {"context": data.take("contexts", caption), "empty": data.take("contexts", np.zeros(1, np.int64)),
             "boxes": data.take("boxes", rows), "phrases": data.take("phrases", phrase.clip(min=0).ravel())}
    batch["phrases"] = batch["phrases"].unflatten(0, phrase.shape)
    batch["masks"] = cast((phrase >= 0).astype(np.float32), data.device)[..., None].repeat(1, 1, 2)
    if data.toy:
        palette = cast(demo.PALETTE * 2 - 1, data.device)
        return batch | {"clean": palette[data.take("labels", rows).long()].permute(0, 3, 1, 2)}
    if "pooled" in data.table:
        batch |= {"pooled": data.take("pooled", caption), "empty_pooled": data.take("pooled", np.zeros(1, np.int64)),
                  "time_ids": data.take("time_ids", rows)}
    return batch | {"clean": data.take("latents", rows)}


def get_batch(data, split, step, config, micro=0):
    """This rank's micro-batch of a step: get_rows with noise, `when` in 0..1 (the share of the timesteps, 1 the
    noisiest), dropouts, scale of the step and count (rows of the whole step, all ranks). What is drawn belongs to a row
    of the global batch, whoever takes it."""
    count = config.batch_size * config.grad_accum * world_size()
    place = local_rows(np.arange(count), micro, config.grad_accum)
    batch = get_rows(data, data.rows[split][global_rows(len(data.rows[split]), count, config.seed, step)[place]])
    start = np.random.default_rng([config.seed, step])
    scale, seeds = start.random(), start.integers(2 ** 31, size=count)       # a seed for every row, whoever takes it

    def draw(row):
        generator = torch.Generator().manual_seed(int(seeds[row]))
        return torch.rand(3 + data.meta["slots"], generator=generator), torch.randn(
            batch["clean"].shape[1:], generator=generator)
    uniform, noise = (torch.stack(list(x)) for x in zip(*map(draw, place)))
    when, no_caption, no_layout, no_phrase = cast(uniform, data.device).split((1, 1, 1, data.meta["slots"]), 1)
    batch |= {"when": 1 - when[:, 0] ** 3 if config.t_bias else when[:, 0], "noise": cast(noise, data.device)}
    for name, empty in (("context", "empty"), ("pooled", "empty_pooled")):
        if name in batch:
            gone = (no_caption < config.caption_dropout).view(-1, *[1] * (batch[name].dim() - 1))
            batch[name] = torch.where(gone, batch[empty], batch[name])
    kept = torch.stack([torch.ones_like(no_phrase), (no_phrase >= config.phrase_dropout).float()], -1)
    batch["masks"] = batch["masks"] * kept * (no_layout >= config.layout_dropout).float()[..., None]
    scale = torch.tensor(config.scale_min + (config.scale_max - config.scale_min) * scale, dtype=torch.float32)
    return batch | {"scale": cast(scale, data.device), "count": count}


# ----------------------------------------------------------------------------------------------------------- model
# ---- layers of transformer blocks
def sinusoids(values, width, cos_first, shift):
    """(B,) numbers -> (B, width): cosines and sines of slower and slower waves, in float32."""
    rate = torch.exp(-math.log(10000) * torch.arange(width // 2, device=values.device) / (width // 2 - shift))
    angle = values.float()[:, None] * rate
    return torch.cat([angle.cos(), angle.sin()] if cos_first else [angle.sin(), angle.cos()], -1)


class Attention(nn.Module):
    def __init__(self, width, heads, context=None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context or width, width, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x, context=None, mask=None, more=None):
        """more (B, N, D): what x sees beside itself"""
        context = x if context is None else context
        k, v = self.to_k(context), self.to_v(context)
        if more is not None:
            k, v = torch.cat([k, self.to_k(more)], 1), torch.cat([v, self.to_v(more)], 1)
        return self.to_out[0](attend(self.to_q(x), k, v, self.heads, mask))


class Gated(torch.autograd.Function):
    """wide (..., 2n) = [value, gate] -> value * gelu(gate), (..., n). It keeps `wide` alone, the widest tensor of a
    block, where autograd keeps as much again."""
    @staticmethod
    def forward(ctx, wide):
        ctx.save_for_backward(wide)
        value, gate = wide.chunk(2, -1)
        return value * F.gelu(gate)

    @staticmethod
    def backward(ctx, up):
        value, gate = ctx.saved_tensors[0].chunk(2, -1)
        return torch.cat([up * F.gelu(gate), torch.ops.aten.gelu_backward(up * value, gate)], -1)


class GEGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x):
        return Gated.apply(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width), nn.Identity(), nn.Linear(4 * width, width))      # [1]: their dropout

    def forward(self, x):
        return self.net(x)


class TwoLinear(nn.Module):                         # of embedded timesteps, or of pooled text and sizes
    def __init__(self, inputs, width):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(inputs, width), nn.Linear(width, width)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


# ---- the adapter
@dataclass
class Layout:
    """The boxes of a batch as the fusers see them."""
    tokens: torch.Tensor                            # (B, N, D)
    boxes: torch.Tensor                             # (B, N, 4) xyxy in 0..1
    present: torch.Tensor                           # (B, N), 0: a null token
    scale: object                                   # of what the fusers add: a number or a 0-dim tensor
    box_mask: bool
    rms_norm: bool
    masks: dict = field(default_factory=dict)       # per resolution, made once for all layers

    def mask(self, H, W):
        """-> (B, 1, T, T + N), True: cell t sees token s; None: all see all.

        It sees all cells, a box's token if its centre lies in the box, and null tokens always: no row is empty."""
        if not self.box_mask:
            return None
        if (H, W) not in self.masks:
            y, x = ((torch.arange(n, device=self.boxes.device) + 0.5) / n for n in (H, W))
            x, y = x.repeat(H)[:, None], y.repeat_interleave(W)[:, None]     # (T, 1)
            x0, y0, x1, y1 = self.boxes.float()[:, None].unbind(-1)          # (B, 1, N)
            seen = (x > x0) & (x < x1) & (y > y0) & (y < y1) | (self.present[:, None] == 0)
            self.masks[H, W] = torch.cat([seen.new_ones(len(seen), H * W, H * W), seen], -1)[:, None]
        return self.masks[H, W]


class PositionNet(nn.Module):
    """Boxes and the embeddings of their phrases -> grounding tokens (GLIGEN, eq. 5)."""
    def __init__(self, phrase, width, frequencies=8):
        super().__init__()
        self.frequencies = frequencies
        self.linears = nn.Sequential(nn.Linear(phrase + 8 * frequencies, 512), nn.SiLU(), nn.Linear(512, 512),
                                     nn.SiLU(), nn.Linear(512, width))
        self.null_positive_feature = nn.Parameter(torch.zeros(phrase))
        self.null_position_feature = nn.Parameter(torch.zeros(8 * frequencies))

    def forward(self, boxes, phrases, has_box, has_phrase):
        """boxes (B, N, 4), phrases (B, N, P), has_box and has_phrase (B, N) of 0 and 1 -> (B, N, D)"""
        rate = 100 ** (torch.arange(self.frequencies, device=boxes.device) / self.frequencies)
        angle = boxes[..., None, :] * rate.to(boxes.dtype)[:, None]                             # (B, N, 8, 4)
        waves = torch.stack([angle.sin(), angle.cos()], -2).flatten(-3)
        has_box, has_phrase = has_box[..., None], has_phrase[..., None]
        waves = waves * has_box + (1 - has_box) * self.null_position_feature
        phrases = phrases * has_phrase + (1 - has_phrase) * self.null_positive_feature
        return self.linears(torch.cat([phrases, waves], -1))


class Fuser(nn.Module):
    """Gated self-attention over cells and grounding tokens (GLIGEN, eq. 8). Gates of 0: it adds nothing, exactly."""
    def __init__(self, width, heads, context):
        super().__init__()
        self.linear, self.attn, self.ff = nn.Linear(context, width), Attention(width, heads), FeedForward(width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.alpha_attn, self.alpha_dense = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    @property
    def opened(self):
        return bool(self.alpha_attn or self.alpha_dense)

    def forward(self, x, layout, mask):
        tokens = self.linear(layout.tokens).to(x.dtype)      # keys and values; what they would ask is thrown away
        branch = self.attn(self.norm1(x), mask=mask, more=self.norm1(tokens))
        if layout.rms_norm:
            branch = F.rms_norm(branch, branch.shape[-1:]).to(x.dtype)       # autocast makes it float32 on a GPU
        x = x + layout.scale * self.alpha_attn.tanh() * branch
        return x + layout.scale * self.alpha_dense.tanh() * self.ff(self.norm2(x))


def reset_adapter(unet):
    """Fresh gated layers: gates 0 and all else random, as one zero per branch leaves a gradient and two do not."""
    for adapter in [unet.position_net] + [module for module in unet.modules() if isinstance(module, Fuser)]:
        for module in adapter.to_empty(device="cpu").modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for parameter in (p for name, p in adapter.named_parameters() if name.startswith(("alpha_", "null_"))):
            nn.init.zeros_(parameter)
    for module in unet.position_net.linears:        # by default all boxes' tokens are nearly the same
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)


def share_fusers(unet):
    """One fuser for all blocks of a width and count of heads: far fewer parameters, and still diffusers' file.
    ValueError: they have been trained apart."""
    first = {}
    for block in [module for module in unet.modules() if isinstance(module, Block)]:
        kept = first.setdefault((block.norm1.normalized_shape, block.attn1.heads), block.fuser)
        pairs = zip(kept.parameters(), block.fuser.parameters())
        if (kept.opened or block.fuser.opened) and not all(torch.equal(*pair) for pair in pairs):
            raise ValueError("--share_fusers: the gated layers of one width differ, as they were trained apart")
        block.fuser = kept


# ---- the UNet of Stable Diffusion 1 and 2, SDXL and Kolors
class Block(nn.Module):
    def __init__(self, width, heads, context, gated):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = Attention(width, heads), Attention(width, heads, context)
        self.ff = FeedForward(width)
        if gated:
            self.fuser = Fuser(width, heads, context)

    def forward(self, x, context, layout, mask):
        x = x + self.attn1(self.norm1(x))
        if layout is not None:
            x = self.fuser(x, layout, mask)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


def project(layer, x):
    """A linear layer, or a 1x1 convolution as one: a convolution keeps its input even where its weight is frozen."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


class Transformer(nn.Module):
    def __init__(self, width, heads, depth, shape):
        super().__init__()
        self.norm = nn.GroupNorm(shape.groups, width, eps=1e-6)
        self.proj_in, self.proj_out = (nn.Linear(width, width) if shape.linear else nn.Conv2d(width, width, 1)
                                       for _ in range(2))
        self.transformer_blocks = nn.ModuleList(Block(width, heads, shape.context, shape.gated) for _ in range(depth))

    def forward(self, x, context, layout):
        H, W = x.shape[-2:]
        mask = None if layout is None else layout.mask(H, W)
        h = project(self.proj_in, self.norm(x).flatten(2).transpose(1, 2).contiguous())         # (B, T, D)
        for block in self.transformer_blocks:
            h = block(h, context, layout, mask)
        return x + project(self.proj_out, h).transpose(1, 2).unflatten(2, (H, W))


class UNet(nn.Module):
    """UNet2DConditionModel. box_mask and rms_norm, of its gated layers, may be set at any time."""
    def __init__(self, shape, raw=None):
        super().__init__()
        self.shape, self.raw, self.box_mask, self.rms_norm = shape, raw, False, False
        s, widths, time = shape, shape.widths, 4 * shape.widths[0]

        def resnet(inputs, width):
            return Resnet(inputs, width, s.groups, s.eps, time)

        def attentions(level, depth, count):
            return [Transformer(widths[level], s.heads[level], depth, s) for _ in range(count if depth else 0)]

        self.conv_in = nn.Conv2d(s.channels, widths[0], 3, padding=1)
        self.time_embedding = TwoLinear(widths[0], time)
        if s.text:
            self.encoder_hid_proj = nn.Linear(s.text, s.context)
        if s.added:
            self.add_embedding = TwoLinear(s.added, time)
        if s.gated:
            self.position_net = PositionNet(s.context, s.context)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        width, skips, last = widths[0], [widths[0]], len(widths) - 1
        for i, count in enumerate(s.layers):
            inputs = [width] + [widths[i]] * (count - 1)
            width = widths[i]
            self.down_blocks.append(Level([resnet(n, width) for n in inputs], attentions(i, s.down[i], count),
                                          down=[Down(width, 1)] * (i < last)))
            skips += [width] * (count + (i < last))
        self.mid_block = Level([resnet(width, width) for _ in range(2)], attentions(last, s.middle, 1))
        for i in reversed(range(len(widths))):
            inputs = [n + skips.pop() for n in [width] + [widths[i]] * s.layers[i]]
            width = widths[i]
            self.up_blocks.append(Level([resnet(n, width) for n in inputs], attentions(i, s.up[i], s.layers[i] + 1),
                                        up=[Up(width)] * (i > 0)))
        self.conv_norm_out = nn.GroupNorm(s.groups, width, s.eps)
        self.conv_out = nn.Conv2d(width, s.channels, 3, padding=1)

    def forward(self, latents, timesteps, context, boxes=None, phrases=None, masks=None, added=None, scale=1.0):
        """-> the prediction, like latents.

        latents (B, C, H, W); timesteps () or (B,); context (B, L, D), before encoder_hid_proj if there is one;
        boxes (B, N, 4) xyxy in 0..1, phrases (B, N, P), masks (B, N): 1 for a box, 0 for a null token, or (B, N, 2):
        box and phrase apart. Without boxes the fusers are skipped. added: SDXL's text_embeds (B, E), time_ids (B, K).
        scale: of what the fusers add, a number or a 0-dim tensor.

        ValueError: boxes without gated layers, phrases without boxes, `added` absent, too much or of another width."""
        layout, time = self.layout(boxes, phrases, masks, scale), self.embed_time(latents, timesteps, added)
        if self.shape.text:
            context = self.encoder_hid_proj(context)
        x = self.conv_in(latents)
        skips = [x]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = level.step(i, x, time, context, layout)
                skips.append(x)
            for down in level.downsamplers:
                x = down(x)
                skips.append(x)
        x = self.mid_block.steps(x, time, context, layout)
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = level.step(i, torch.cat([x, skips.pop()], 1), time, context, layout)
            for up in level.upsamplers:
                x = up(x, skips[-1].shape[-2:])     # odd sizes were halved upwards
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def embed_time(self, latents, timesteps, added):
        s = self.shape
        waves = sinusoids(timesteps.expand(len(latents)), s.widths[0], s.cos_first, s.freq_shift)
        time = self.time_embedding(waves.to(latents.dtype))
        if bool(s.added) != (added is not None):
            raise ValueError(f"this UNet {'needs' if s.added else 'takes no'} added=dict(text_embeds=, time_ids=)")
        if added is not None:
            sizes = sinusoids(added["time_ids"].flatten(), s.added_time, s.cos_first, s.freq_shift)
            given = torch.cat([added["text_embeds"], sizes.view(len(latents), -1).to(latents.dtype)], -1)
            if given.shape[-1] != s.added:
                raise ValueError(f"text_embeds and time_ids make {given.shape[-1]} numbers a row, not {s.added}: width "
                                 f"of text_embeds + {s.added_time} x count of time_ids")
            time = time + self.add_embedding(given.to(latents.dtype))
        return time

    def layout(self, boxes, phrases, masks, scale):
        if (boxes is None) != (phrases is None) or boxes is None and masks is not None:
            raise ValueError("boxes and phrases go together, and masks with them; for a null layout give masks of 0")
        if boxes is None:
            return None
        if not self.shape.gated:
            raise ValueError("boxes need gated layers, which this UNet lacks: load_unet(..., adapter=True) adds them")
        if getattr(self.shape, "text", 0) == phrases.shape[-1]:
            phrases = self.encoder_hid_proj(phrases)         # Kolors: from the text encoder's width to that of the UNet
        masks = boxes.new_ones(boxes.shape[:2]) if masks is None else masks.to(boxes.dtype)
        has_box, has_phrase = masks.unbind(-1) if masks.dim() == 3 else (masks, masks)
        tokens = self.position_net(boxes, phrases, has_box, has_phrase)
        return Layout(tokens, boxes, has_box, scale, self.box_mask, self.rms_norm)

    def adapter(self):
        """-> dict of name -> parameter of the gated layers, all else being the frozen base."""
        return {name: parameter for name, parameter in self.named_parameters() if GATED.search(name)}


# ---- noise
def alphas_of(schedule):
    """-> (timesteps,) float32, share of the signal's variance that is left: the product of 1 - beta"""
    root = schedule.beta_schedule == "scaled_linear"
    start, end = (beta ** 0.5 if root else beta for beta in (schedule.beta_start, schedule.beta_end))
    beta = torch.linspace(start, end, schedule.timesteps)
    return torch.cumprod(1 - (beta ** 2 if root else beta), 0)


def add_noise(clean, noise, alpha):
    """alpha (B,): alphas of the drawn timesteps -> the noisy latents, like clean (B, ...)"""
    alpha = alpha.view(-1, *[1] * (clean.dim() - 1))
    return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


def target_of(clean, noise, alpha, prediction_type):
    """What the UNet is trained to predict, like clean."""
    alpha = alpha.view(-1, *[1] * (clean.dim() - 1))
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    return {"epsilon": noise, "sample": clean, "v_prediction": velocity}[prediction_type]


def clean_and_noise(noisy, prediction, alpha, prediction_type):
    """A prediction at a timestep of that alpha -> (clean, noise), both like noisy"""
    signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
    if prediction_type == "epsilon":
        return (noisy - sigma * prediction) / signal, prediction
    if prediction_type == "sample":
        return prediction, (noisy - signal * prediction) / sigma
    return signal * noisy - sigma * prediction, signal * prediction + sigma * noisy


def ddim_timesteps(schedule, steps):
    """-> list of `steps` timesteps, from noise to image. ValueError if there are not that many."""
    T = schedule.timesteps
    if schedule.spacing == "linspace":
        times = torch.linspace(0, T - 1, steps, dtype=torch.float64).round().long().tolist()[::-1]
    elif schedule.spacing == "trailing":
        times = [round(T - i * T / steps) - 1 for i in range(steps)]
    else:
        times = [i * (T // steps) + schedule.offset for i in range(steps)][::-1]
    if not 0 < steps <= T or times[0] >= T:
        raise ValueError(f"{steps} sampling steps do not fit {T} timesteps with steps_offset {schedule.offset}: ask "
                         "for fewer, and at least 1")
    return times


def ddim_step(schedule, alphas, noisy, prediction, time, steps):
    """One step of `steps` from timestep `time` towards the image, without fresh noise (DDIM, eq. 12 with sigma 0)."""
    before = time - schedule.timesteps // steps
    last = alphas.new_ones(()) if schedule.last_alpha_one else alphas[0]
    alpha = alphas[before] if before >= 0 else last
    clean, noise = clean_and_noise(noisy, prediction, alphas[time], schedule.prediction_type)
    if schedule.clip:
        clean = clean.clamp(-schedule.clip, schedule.clip)
    return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


# ---- the toy
TOY_SCHEDULE = Schedule(timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                        prediction_type="sample", spacing="trailing", offset=0, last_alpha_one=True, clip=1.0)


class ToyBlock(Block):
    """A transformer block of a UNet, with a convolution before it and the time in it."""
    def __init__(self, width, heads, gated):
        super().__init__(width, heads, width, gated)
        self.conv, self.shift = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Linear(width, 3 * width)
        nn.init.zeros_(self.shift.weight), nn.init.zeros_(self.shift.bias)

    def forward(self, x, context, time, layout, mask):
        n = math.isqrt(x.shape[1])
        x = x + self.conv(x.transpose(1, 2).unflatten(2, (n, n))).flatten(2).transpose(1, 2)
        shift = self.shift(F.silu(time))[:, None].chunk(3, -1)
        x = x + self.attn1(self.norm1(x) + shift[0])
        if layout is not None:
            x = self.fuser(x, layout, mask)
        x = x + self.attn2(self.norm2(x) + shift[1], context)
        return x + self.ff(self.norm3(x) + shift[2])


def cell_waves(n, width):
    """-> (1, n * n, width): sines and cosines of each cell's place"""
    rate = math.pi / 2 * 2 ** torch.linspace(0, math.log2(n), width // 4)
    angle = (torch.arange(n)[:, None] + 0.5) / n * rate
    waves = torch.cat([angle.sin(), angle.cos()], 1)                                            # (n, width / 2)
    return torch.cat([waves[:, None].expand(n, n, -1), waves[None].expand(n, n, -1)], -1).flatten(0, 1)[None] * 0.5


class ToyBase(nn.Module):
    """A text-to-image model in pixels that is called as a UNet is, or with ids instead of context and phrases."""
    layout, adapter = UNet.layout, UNet.adapter

    def __init__(self, width, depth, patch, gated=False, heads=4):
        super().__init__()
        self.shape, self.width, self.patch = SimpleNamespace(gated=gated), width, patch
        self.box_mask, self.rms_norm, self.schedule = False, False, TOY_SCHEDULE
        self.text = CLIPText(TextShape(len(demo.WORDS), demo.LENGTH, width, 1, heads, 3 * width, "gelu", 1e-5,
                                       demo.ID["<end>"]))
        pixels = 3 * patch * patch
        self.proj_in, self.place = nn.Linear(pixels, width), nn.Parameter(cell_waves(demo.SIZE // patch, width))
        self.time_embedding = TwoLinear(width, width)
        self.blocks = nn.ModuleList(ToyBlock(width, heads, gated) for _ in range(depth))
        self.norm_out, self.proj_out = nn.LayerNorm(width), nn.Linear(width, pixels)
        nn.init.zeros_(self.proj_out.weight), nn.init.zeros_(self.proj_out.bias)
        if gated:
            self.position_net = PositionNet(width, width)

    def forward(self, pixels, times, context, boxes=None, phrases=None, masks=None, added=None, scale=1.0):
        """pixels (B, 3, S, S), times (B,), context (B, L) ids, boxes (B, N, 4), phrases (B, N, 5) ids, masks (B, N) or
        (B, N, 2) -> the clean picture (B, 3, S, S). added: nothing here."""
        context, n = self.text(context)[0], pixels.shape[-1] // self.patch
        if phrases is not None:
            phrases = self.text(phrases.flatten(0, 1))[1].unflatten(0, phrases.shape[:2])
        layout = self.layout(boxes, phrases, masks, scale)
        x = self.proj_in(F.pixel_unshuffle(pixels, self.patch).flatten(2).transpose(1, 2)) + self.place
        time = self.time_embedding(sinusoids(times, self.width, True, 0).to(x.dtype))
        mask = None if layout is None else layout.mask(n, n)
        for block in self.blocks:
            x = block(x, context, time, layout, mask)
        x = self.proj_out(self.norm_out(x)).transpose(1, 2).unflatten(2, (n, n))
        return F.pixel_shuffle(x, self.patch)


class Adapter(nn.Module):
    """The gated layers of a frozen base, under the base's names for them: all that is trained and saved. They are
    float32 whatever the base is, as small steps vanish in less."""
    def __init__(self, base):
        super().__init__()
        self.frozen = (base.requires_grad_(False).eval(),)      # in a tuple: no sub-module, so in no checkpoint
        for name, module in base.named_modules():
            if isinstance(module, (Fuser, PositionNet)):
                *path, last = name.split(".")
                holder = self
                for part in path:
                    if not hasattr(holder, part):
                        holder.add_module(part, nn.Module())
                    holder = getattr(holder, part)
                holder.add_module(last, module.float().requires_grad_(True))

    @property
    def base(self):
        return self.frozen[0]

    def forward(self, *given):
        return self.base(*given)

    @property
    def fusers(self):
        return [module for module in self.base.modules() if isinstance(module, Fuser)]


def load_unet(folder, dtype=torch.float32, adapter=False):
    """folder: a diffusers model, or its unet folder -> UNet, frozen, in eval mode, on the CPU, of `dtype`.

    adapter: True: with gated layers, fresh (by torch's generator) if the folder has none; or the path of some, as
    read_adapter takes it. They are float32 whatever `dtype`: with another one call the UNet under autocast. ValueError
    names the file, and the key or tensor."""
    change = {"gated": True, "fresh": reset_adapter} if adapter else {}
    unet = load_part(UNet, "unet", folder, dtype, **change)
    if adapter not in (True, False):
        unet.load_state_dict(read_adapter(adapter, unet.state_dict()), strict=False)
    return unet


def load_schedule(folder):
    """folder: a diffusers model, or its scheduler folder -> Schedule. ValueError."""
    folder, raw = read_config(folder, "scheduler")
    return schedule_of(raw, str(folder / "scheduler_config.json"))


def load_toy(folder):
    """folder: of the run of a toy base -> ToyBase, with fresh gated layers. ValueError."""
    tensors, body = read_file(folder / "best.safetensors")
    config = body["about"]["config"]
    if config.get("phase") != "base":
        raise ValueError(f"--base {folder}: not the run of a base; python train_adapter.py --phase base makes one")
    model = ToyBase(config["width"], config["depth"], config["patch"], gated=True)
    reset_adapter(model)
    load_tensors(model, tensors | {name: x for name, x in model_tensors(model).items() if GATED.search(name)}, folder)
    return model


def load_base(config):
    """--base -> (the frozen model with gated layers, sha256 of what makes its numbers). ValueError."""
    folder = Path(config.base)
    if os.path.exists(folder / "best.safetensors"):
        if config.base_dtype != "float32":
            raise ValueError(f"--base_dtype {config.base_dtype}: a toy base is held in float32")
        model, sha256 = load_toy(folder), file_sha256(folder / "best.safetensors")
        if config.adapter:
            model.load_state_dict(read_adapter(config.adapter, model.state_dict()), strict=False)
    elif os.path.isdir(folder):
        model = load_unet(folder, DTYPES[config.base_dtype], config.adapter or True)
        model.schedule = load_schedule(folder)
        sha256 = hashlib.sha256(repr((part_sha256(folder, "unet"), model.schedule)).encode()).hexdigest()
    else:
        raise ValueError(f"--base {folder}: no such folder; give a diffusers model, or the run of a toy base")
    return model, sha256


def build_model(config, device="cpu"):
    """The phase's model on the device. about is what load_model needs."""
    about = {"config": dataclasses.asdict(config)}
    if config.phase == "base":
        model = ToyBase(config.width, config.depth, config.patch)
    else:
        base, about["base_sha256"] = or_fail(load_base, config)
        for name, value in or_fail(adapter_flags, config.adapter).items():
            if name in FORM and value != str(getattr(config, name)):
                fail(f"--adapter {config.adapter} was trained with --{name} {value}: the same here, or it does not fit")
        base.box_mask, base.rms_norm = config.box_mask, config.rms_norm
        if config.share_fusers:
            or_fail(share_fusers, base)
        for module in base.modules():               # sums over many numbers: in float32 whatever the base is held in
            if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
                module.float()
        model = Adapter(base.to(device))
    model.about = about
    return model.to(device)


def load_model(path, device="cpu", base=""):
    """best.safetensors or a checkpoint of a toy base or an adapter -> in eval mode. base: where its base is now; empty:
    where it was. Raises ValueError."""
    tensors, body = read_file(path)
    about = body["about"]
    if "gate_lr" not in about["config"]:
        raise ValueError(f"{path} is of another script")
    about["config"] |= {"base": base} if base else {}
    model = build_model(Config(**about["config"] | {"adapter": ""}), device)
    if model.about.get("base_sha256") != about.get("base_sha256"):
        raise ValueError(f"{path} was trained on another base than {about['config']['base']} is now")
    inside = {name.removeprefix("model."): x for name, x in tensors.items() if not name.startswith("opt.")}
    load_tensors(model, inside, path)
    model.about = about
    return model.eval()


def check_data(data, model):
    """Refuse prepared data that were not made for this base: fail()."""
    base = getattr(model, "base", model)
    if data.toy != isinstance(base, ToyBase):
        fail(f"--data_dir {data.folder} holds {'toy scenes' if data.toy else 'latents'}: a toy base needs the former, "
             "a diffusers folder the latter")
    if data.toy:
        return
    shape = base.shape
    wanted = {"latents": shape.channels, "contexts": shape.text or shape.context, "phrases": shape.context}
    found = {"latents": data.table["latents"].shape[1]} | {
        name: data.table[name].shape[-1] for name in ("contexts", "phrases")}
    if found["phrases"] == shape.text:              # projected as the captions are
        wanted["phrases"] = shape.text
    if found != wanted or ("pooled" in data.table) != bool(shape.added):
        fail(f"--data_dir {data.folder}: channels and widths are {found}, with{'out' * ('pooled' not in data.table)} "
             f"pooled, but the base wants {wanted}, with{'out' * (not shape.added)}: prepare the data with this --base")
    folder, made = Path(model.about["config"]["base"]), data.meta["base"]
    for part in ("vae", "text_encoder")[:1 if made.get("embeddings") else 2]:
        if (folder / part).is_dir() and or_fail(part_sha256, folder, part) != made[part]:
            fail(f"--data_dir {data.folder} was prepared with another {part} than that of --base {folder}")


def check_alive(model, data, config, dtype=torch.float32):
    """Refuse an adapter that cannot learn: parameters in less than float32, or no gradient at all. dtype: of the
    autocast. Ends in fail()."""
    low = [name for name, p in model.named_parameters() if p.dtype != torch.float32]
    if low:
        fail(f"{low[0]} and {len(low) - 1} others are not float32: steps of {config.learning_rate:g} vanish in them")
    with autocast(data.device, dtype):
        loss = compute_loss(model, get_batch(data, "val", 0, config), 0, config)[0]
    loss.backward()
    dead = not any(p.grad is not None and p.grad.any() for p in model.parameters())
    model.zero_grad(set_to_none=True)
    if dead:
        fail("dead adapter: every gradient is exactly 0 and would stay so; gates and output layers are both zero. "
             "Start one of the two at random")


# ------------------------------------------------------------------------------------------------------------ loss
@functools.lru_cache(maxsize=4)
def alphas_on(schedule, device):
    return alphas_of(schedule).to(device)


def predict(model, noisy, times, batch, boxes="boxes", scale=1.0):
    """The model's prediction for a batch as get_rows makes it; boxes: the batch's name for them, "" without layout."""
    layout = (batch[boxes], batch["phrases"], batch["masks"]) if boxes else (None, None, None)
    added = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]} if "pooled" in batch else None
    return model(noisy, times, batch["context"], *layout, added, scale)


def errors(model, batch, boxes="boxes"):
    """-> squared error of the prediction per row (B,), float32, and alpha (B,) of its time"""
    raw_model = unwrap(model)
    base, adapter = getattr(raw_model, "base", raw_model), isinstance(raw_model, Adapter)
    times = (batch["when"] * base.schedule.timesteps).long().clamp(max=base.schedule.timesteps - 1)
    alpha = alphas_on(base.schedule, times.device)[times]
    noisy = add_noise(batch["clean"], batch["noise"], alpha)
    out = predict(model, noisy, times, batch, boxes if adapter else "", batch.get("scale", 1.0))
    target = target_of(batch["clean"], batch["noise"], alpha, base.schedule.prediction_type)
    return (out.float() - target).square().flatten(1).mean(1), alpha


def compute_loss(model, batch, step, config):
    """-> (loss, parts): sums over this micro-batch divided by the whole step's rows; 0-dim float32. parts: the error of
    the noisier half of the timesteps and of the others, which add up to the plain one."""
    error, alpha = errors(model, batch)
    weight = 1 / (1 - alpha).clamp(min=0.2) if config.phase == "base" else torch.ones_like(alpha)
    high = (batch["when"] >= 0.5).float()
    return (weight * error).sum() / batch["count"], {"high_t": (high * error).sum() / batch["count"],
                                                     "low_t": ((1 - high) * error).sum() / batch["count"]}


# ---------------------------------------------------------------------------------------------- evaluation, samples
TIMES = (200, 500, 800)                             # thousandths of the timesteps


def fixed_batch(data, rows, at):
    """get_rows with one time, thousandths, and noise that belongs to row and time, whatever else is looked at"""
    batch = get_rows(data, rows)
    noise = torch.stack([torch.randn(batch["clean"].shape[1:], generator=torch.Generator().manual_seed(
        at + 1000 * int(row))) for row in rows])
    return batch | {"noise": cast(noise, data.device), "when": torch.full((len(rows),), at / 1000, device=data.device)}


@torch.no_grad()
def evaluate(model, data, config, split="val", max_rows=0):
    """Means over a split's rows at fixed times and noise -> dict, equal on all ranks: loss, the plain error over all
    TIMES, which chooses checkpoints; of an adapter at each time the gap: by how much another row's boxes are worse."""
    model = unwrap(model)
    rows, dtype = data.some(split, max_rows), pick_dtype(config.dtype, data.device)[0]
    adapter, was_training, total = isinstance(model, Adapter), model.training, torch.zeros(len(TIMES), 3)
    model.eval()
    other = report.other_boxes(data.table["phrase"][rows] >= 0)
    most = 96 if data.toy else config.batch_size
    for i, at in enumerate(TIMES):
        for some in np.split(np.arange(len(rows)), range(most, len(rows), most))[rank()::world_size()]:
            batch, moved = fixed_batch(data, rows[some], at), torch.from_numpy(other[some] != some)
            batch["other"] = data.take("boxes", rows[other[some]])
            with autocast(data.device, dtype):
                right = errors(model, batch)[0].cpu()
                wrong = errors(model, batch, "other")[0].cpu() if adapter else right
            total[i] += torch.stack([right.sum(), (wrong - right)[moved].sum(), moved.sum()])
    model.train(was_training)
    if world_size() > 1:
        total = total.to(data.device)
        dist.all_reduce(total)
    right, gap, moved = total.double().cpu().unbind(1)
    scores = {f"mse_{at}": (x / len(rows)).item() for at, x in zip(TIMES, right)}
    scores = {"loss": sum(scores.values()) / len(TIMES)} | scores
    return scores | ({f"gap_{at}": (x / n).item() for at, x, n in zip(TIMES, gap, moved) if n} if adapter else {})


def gates_of(model, data, config):
    """At the middle of the timesteps, of a few validation rows -> dict of lists, one number per gated layer: attn and
    dense: |tanh| of its gates; ratio: what it adds / what it is given, norms; grad: of the loss by its gates."""
    model = unwrap(model)
    ratio = {fuser: [] for fuser in model.fusers}   # by layer: they run in another order, and a shared one often
    hooks = [fuser.register_forward_hook(lambda own, given, out: ratio[own].append(
        ((out - given[0]).norm() / given[0].norm()).detach())) for fuser in ratio]
    was_training, alphas = model.training, [x for fuser in model.fusers for x in (fuser.alpha_attn, fuser.alpha_dense)]
    rows = data.rows["val"][:32 if data.toy else config.batch_size]
    with autocast(data.device, pick_dtype(config.dtype, data.device)[0]):
        error = errors(model.eval(), fixed_batch(data, rows, 500))[0].mean()
    grads = torch.stack(torch.autograd.grad(error, alphas)).view(-1, 2).norm(dim=1).tolist()
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    attn, dense = torch.stack(alphas).detach().tanh().abs().view(-1, 2).T.tolist()
    return {"attn": attn, "dense": dense, "ratio": [max(x).item() for x in ratio.values()], "grad": grads}


@torch.no_grad()
def generate(model, batch, config, scale=1.0, boxes="boxes", seed=7):
    """Draw what a batch as of get_rows asks for by DDIM -> (B, C, H, W), pictures of a toy, else latents. scale: of the
    adapter. boxes: the batch's name for them, "" without the adapter. The unconditional half has the empty caption and
    the null layout, or guidance would push away from the boxes too."""
    model = unwrap(model)
    base = getattr(model, "base", model)
    schedule, (B, device) = base.schedule, (len(batch["clean"]), batch["clean"].device)
    alphas = alphas_on(schedule, device)
    x = torch.randn(batch["clean"].shape, generator=torch.Generator().manual_seed(seed)).to(device)
    both = {name: torch.cat([value, value]) for name, value in batch.items() if len(value) == B}
    both["context"] = torch.cat([batch["empty"].expand_as(batch["context"]), batch["context"]])
    both["masks"] = torch.cat([torch.zeros_like(batch["masks"]), batch["masks"]])
    if "pooled" in batch:
        both["pooled"] = torch.cat([batch["empty_pooled"].expand_as(batch["pooled"]), batch["pooled"]])
    grounded = int(config.beta * config.sample_steps)
    for i, at in enumerate(ddim_timesteps(schedule, config.sample_steps)):
        times, now = torch.full((2 * B,), at, device=device), boxes if i < grounded else ""
        with autocast(device, pick_dtype(config.dtype, device)[0]):
            empty, asked = predict(model, torch.cat([x, x]), times, both, now, scale).float().chunk(2)
        out = empty + config.guidance * (asked - empty)
        if schedule.clip and schedule.prediction_type == "sample":
            out = out.clamp(-schedule.clip, schedule.clip)      # before the noise is told from it
        x = ddim_step(schedule, alphas, x, out, at, config.sample_steps)
    return x


@torch.no_grad()
def identity(model, data, config):
    """-> the largest |difference| that the adapter makes: exactly 0.0 before the first step"""
    batch, last = fixed_batch(data, data.rows["val"][:8], 1), model.base.schedule.timesteps - 1
    noisy, times = batch["noise"], torch.linspace(0, last, len(batch["noise"]), device=data.device).long()
    with autocast(data.device, pick_dtype(config.dtype, data.device)[0]):
        return (predict(model, noisy, times, batch) - predict(model, noisy, times, batch, "")).abs().max()


# --------------------------------------------------------------------------------------------------- training loop
def lr_at(step, max_steps, config):
    """Linear warm-up, then as --decay says: a function of the step, so there is nothing to save."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    left = 1 - min(1.0, step / max_steps)
    share = {"constant": 1.0, "cosine": 0.5 * (1 - math.cos(math.pi * left)), "late": min(1.0, 2 * left)}[config.decay]
    return config.learning_rate * (config.min_lr + (1 - config.min_lr) * share)


def make_optimizer(model, config):
    """AdamW with weight decay on matrices alone, and gates that learn --gate_lr times as fast."""
    gates, matrices, vectors = [], [], []
    for key, p in model.named_parameters():
        (gates if "fuser.alpha_" in key else matrices if p.dim() > 1 else vectors).append(p)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors}]
    groups += [{"params": gates, "times": config.gate_lr}] if gates else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, lr=config.learning_rate,
                                  betas=(config.beta1, config.beta2), fused=True)

    def lift_gates(optimizer, *_):                  # the loop gives all groups one learning rate before each step
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group.get("times", 1.0)
    optimizer.register_step_pre_hook(lift_gates)
    return optimizer


def train(config):
    """Train, evaluate, sample; under torchrun every process calls this -> dict of final metrics. Raises NonFinite."""
    device = launch(config.device)
    listen()
    try:
        return run_training(config, device)
    finally:
        listen(False)
        finish()


def run_training(config, device):
    """A base if none is given, then the adapter; or the base alone."""
    if not config.run_name:
        now = time.localtime(agree(int(time.time()), device))
        config = dataclasses.replace(config, run_name=time.strftime("adapter_%Y%m%d_%H%M%S", now))
    name, chain, asked = config.run_name, [], vars(config)
    if config.phase != "base":
        if not config.base:
            if not load_data(config, device).toy:   # said now, and not when a base was trained
                fail(f"--data_dir {config.data_dir} holds latents: a toy base needs toy scenes; give --base DIR")
            first = dataclasses.replace(config, phase="base", run_name=f"{name}-base", max_steps=config.base_steps)
            chain.append(dataclasses.replace(first, decay="cosine", box_mask=False, rms_norm=False, adapter="",
                                             share_fusers=False))
            config = dataclasses.replace(config, base=str(Path(config.out_dir) / first.run_name))
        config = dataclasses.replace(config, phase="adapter")
    for one in (*chain, config):
        folder = Path(config.out_dir) / one.run_name
        if not config.resume and agree(len(checkpoints(folder)), device):
            fail(f"{folder} already holds checkpoints: --resume goes on from them, another --run_name starts anew")
    if chain and rank() == 0:                       # what a resume must know before the last phase has a checkpoint
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.json", json.dumps({"config": asked}, indent=1).encode())
    for one in (*chain, config):
        listen()                                    # again: the phase before is over
        done = run_phase(one, device, name)
        if done["stopped"] and ("table" not in done or one is not config):
            return done
    return done


def run_phase(config, device, name):
    """One run of its own folder; name: of the run that it is a phase of."""
    folder, data, adapter = Path(config.out_dir) / config.run_name, load_data(config, device), config.phase == "adapter"
    torch.manual_seed(config.seed)
    resumed = config.resume and checkpoints(folder)          # whose adapter takes the place of --adapter's
    raw_model = build_model(dataclasses.replace(config, adapter="") if resumed else config, device)
    raw_model.about |= {"config": dataclasses.asdict(config), "data": data.key}
    check_data(data, raw_model)
    or_fail(ddim_timesteps, getattr(raw_model, "base", raw_model).schedule, config.sample_steps)     # said now
    optimizer = make_optimizer(raw_model, config)
    global_batch = config.batch_size * config.grad_accum * world_size()
    steps_per_epoch = len(data.rows["train"]) / global_batch
    max_steps = config.max_steps or math.ceil(config.max_epochs * steps_per_epoch)
    skip_steps, (dtype, reason) = steps_in(config.skip_steps), pick_dtype(config.dtype, device)

    start, best, saved = 0, math.inf, None
    if config.resume:
        saved = load_newest(folder, device)
        if saved:                                   # of a phase that settle() has not seen: refuse what does not fit
            resume_config(config, {*FIXED} - {"base"}, saved[1]["config"], FIXED)
            if saved[1]["about"].get("base_sha256") != raw_model.about.get("base_sha256"):
                fail(f"--base {config.base}: not the base that the checkpoint was trained on")
            if saved[1]["about"]["data"] != data.key:
                fail(f"--data_dir {data.folder}: not the data that the checkpoint was trained on")
            restore(raw_model, optimizer, *saved)
            start, best = saved[1]["step"], saved[1]["best"]
    if start > max_steps:
        fail(f"the newest checkpoint is of step {start}, beyond --max_steps {max_steps}: nothing to do")

    run = Run(config, start, {"max_steps": max_steps, "steps_per_epoch": steps_per_epoch, "global_batch": global_batch})
    model = wrap_ddp(raw_model, device).train()

    def examine(step, now):                         # the guard calls it once, for the first bad step of a run
        import autopsy
        def loss_of(batch):
            with autocast(device, dtype):
                return compute_loss(raw_model, batch, step, config)[0]
        autopsy.examine(Path(__file__).stem, run, raw_model, config, dtype, step, now,
                        lambda micro: get_batch(data, "train", step, config, micro), loss_of)

    guard = Guard(model, optimizer, config.grad_clip, config.on_nonfinite, config.max_skips,
                  fp16=dtype == torch.float16, examine=examine, log=run.log)
    if saved:
        guard.load_state_dict(saved[1]["guard"])

    def save(step):
        if run.main:
            body = {"about": raw_model.about, "config": vars(config), "best": best, "guard": guard.state_dict()}
            run.log(f"saved {save_checkpoint(folder, step, raw_model, optimizer, body, config.keep)}")

    size, rows = sum(p.numel() for p in raw_model.parameters()), len(data.rows["train"])
    run.log(f"{config.run_name}: {size:,} parameters, {str(dtype)[6:]} ({reason}), {rows:,} pictures, batch "
            f"{config.batch_size} x {world_size()} {device.type} x {config.grad_accum} = {global_batch}, {max_steps:,} "
            f"steps" + f", resumed at {start:,}" * (start > 0))
    if adapter:
        frozen = sum(p.numel() for p in raw_model.base.parameters() if not p.requires_grad)
        run.log(f"base {config.base}: {frozen:,} parameters, frozen, sha256 {raw_model.about['base_sha256'][:12]}")
        check_alive(raw_model, data, config, dtype)
        if not any(fuser.opened for fuser in raw_model.fusers):
            difference = float(identity(raw_model, data, config))
            run.log(f"identity at init: max |difference| = {difference}")
            if not math.isfinite(difference):
                fail(f"--base {config.base}: its predictions are not finite in {str(dtype)[6:]}; try another --dtype")
            assert difference == 0.0
    if config.compile:                              # after the identity: two graphs round differently
        (raw_model.base if adapter else raw_model).compile()
    try:
        for step in range(start, max_steps + 1):    # one extra turn, so that the last state is evaluated and saved
            last, stop = step == max_steps, guard.stop_requested

            # once in a while: the guard's only host read, validation on all ranks, a look at some samples, a checkpoint
            intervals = config.log_every, config.eval_every, config.save_every, config.sample_every
            if last or stop or every(step, RING, *intervals):
                stats = guard.poll()
                stop = guard.stop_requested         # read once: a signal may come at any line
                if stats["steps"]:
                    run.progress(step, max_steps, stats, lr_at(step - 1, max_steps, config), global_batch, "images")
                if last or every(step, config.eval_every):
                    scores = evaluate(model, data, config, "val", config.eval_rows)
                    run.log(f"step {step:,} validation: " + "  ".join(f"{name} {x:.4f}" for name, x in scores.items()))
                    gates = {"gates": gates_of(raw_model, data, config)} if adapter else {}
                    run.measure(step, "val", **scores, **gates)
                    run.curves()
                    if adapter:
                        report.tell_gates(run, gates["gates"], step)
                    if scores["loss"] < best:       # never true of a NaN
                        best = scores["loss"]
                        if run.main:
                            tensors = model_tensors(raw_model)
                            write_file(folder / "best.safetensors", tensors, {"about": raw_model.about, "step": step})
                if every(step, config.sample_every) and run.main:
                    path = folder / f"samples/step-{step:08d}.png"
                    report.pairs(sys.modules[__name__], raw_model.eval(), data, config, path, log=run.log)
                    raw_model.train()
                if last or stop or every(step, config.save_every):
                    save(step)
                run.resume_clock()
            if last or stop:
                break
            if step in skip_steps:                  # alike on all ranks
                continue

            # ---------------- one optimizer step ----------------
            lr = lr_at(step, max_steps, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for micro in range(config.grad_accum):
                seed_step(config.seed, step, rank(), micro)
                batch = get_batch(data, "train", step, config, micro)
                guard.sync_gradients(micro == config.grad_accum - 1)
                with autocast(device, dtype):
                    loss, parts = compute_loss(model, batch, step, config)
                guard.backward(loss, parts)
            guard.step(step)
    except NonFinite as error:
        if error.intact:
            save(error.step)
        raise
    if not last:
        run.log(f"stopped by a signal; go on with: python train_adapter.py --resume --run_name {name}")
        return {"step": step, "best": best, "stopped": True}
    listen(False)                                   # all is saved: from here on Ctrl-C may end the program
    agree(0, device)                                # best.safetensors is there
    load_tensors(raw_model, or_fail(read_file, folder / "best.safetensors")[0])      # a second base may not fit
    best_model, table = raw_model.eval(), {}
    if run.main and adapter:
        write_adapter(folder / "final.safetensors", best_model.base.state_dict(),
                      **{name: getattr(config, name) for name in FORM})
    scores = evaluate(best_model, data, config, report.split_of(data), config.eval_rows)
    if run.main:
        table = report.table(sys.modules[__name__], best_model, data, config, folder, log=run.log, scores=scores)
    agree(0, device)                                # the others wait for the table
    return {"step": step, "best": best, "table": table, "stopped": stop}


# ------------------------------------------------------------------------------------------------------------ main
def settle(config, given):
    """Fill in what the flags left open and refuse what cannot work for this model -> Config"""
    say = print if os.environ.get("RANK", "0") == "0" else lambda text: None
    folder, filled = Path(config.out_dir) / config.run_name, given
    if config.resume and config.run_name and not checkpoints(folder) and (folder / "config.json").exists():
        asked = read_flags(str(folder / "config.json"), Config.__dataclass_fields__)    # of a chain that was stopped
        config, filled = resume_config(config, given, asked, FIXED), given | {*asked}
    elif not config.data_dir:                       # before complete(), so that a resume keeps what it had
        own = DEMO | ({"max_steps": config.base_steps, "decay": "cosine"} if config.phase == "base" else {})
        own = {name: x for name, x in own.items() if name not in given}
        config = dataclasses.replace(config, **own)
        if not config.resume:
            say("demo set: " + " ".join(f"--{name} {x}" for name, x in own.items()))
    config = complete(config, filled, {}, DRY, FIXED)
    low = dict.fromkeys(("max_epochs", "width", "depth", "sample_steps", "base_steps"), 1) | dict.fromkeys((
        "phrase_dropout", "layout_dropout", "caption_dropout", "scale_min", "scale_max", "gate_lr", "guidance",
        "eval_rows", "max_steps", "beta"), 0)
    for name, least in low.items():
        most, value = 1 if name.endswith("dropout") or name == "beta" else math.inf, getattr(config, name)
        if not least <= value <= most:
            fail(f"--{name} {value}: must be at least {least}" + ", at most 1" * (most == 1))
    for name, choices in {"phase": ("", "base", "adapter"), "decay": ("constant", "cosine", "late"),
                          "t_bias": ("", "cubic"), "patch": (2, 4, 8), "base_dtype": (*DTYPES,),
                          "dtype": ("auto", *DTYPES)}.items():
        if getattr(config, name) not in choices:
            fail(f"--{name} {getattr(config, name)}: one of {', '.join(str(x) for x in choices if x)}")
    if config.scale_min > config.scale_max or config.width % 8:
        fail("--scale_min must not be above --scale_max, and --width must be a multiple of 8")
    if not config.scale_max or not config.gate_lr and not config.adapter:
        fail("--gate_lr and --scale_max must be above 0: gates that start at 0 would stay there")
    if config.adapter and not config.base:
        fail(f"--adapter {config.adapter}: gated weights belong to a base; give its --base DIR too")
    if config.base_dtype not in ("float32", config.dtype):
        fail(f"--base_dtype {config.base_dtype}: needs --dtype {config.base_dtype} too, in which it can compute")
    if config.phase == "adapter" and not config.base or config.phase == "base" and config.base:
        fail(f"--phase {config.phase}: an adapter needs --base DIR, and a base has none")
    return config


def main(argv):
    if argv[:1] and argv[0] in report.VERBS:
        return report.VERBS[argv[0]](sys.modules[__name__], argv[1:])
    config, given = parse_flags(Config, argv, __doc__, ALIASES)
    try:
        train(settle(config, given))
    except NonFinite as error:
        print(error, file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    main(sys.argv[1:])
