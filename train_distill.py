"""
Small language models from large ones: knowledge distillation of causal decoders, read from Hugging Face folders.

python train_distill.py                               # no flags: demo set, a teacher, students with and without it
python train_distill.py --dry_run                     # everything once, in seconds
python train_distill.py --phase teacher --run_name tutor && python train_distill.py --teacher out/tutor/hf
python train_distill.py --teacher-model DIR --student-model-name gpt2 --data-path mine.jsonl --epochs 3 --dry-run
python train_distill.py --teacher DIR --student DIR --data_dir mine.jsonl --teacher_dtype bfloat16 --cache_teacher 64
torchrun --nproc_per_node=8 train_distill.py --teacher DIR --student DIR --data_dir mine.jsonl      # eight GPUs
python train_distill.py --resume --run_name pupil     # goes on from the newest checkpoint, on a CPU bit for bit
python train_distill.py eval --run_name pupil --eval_mc questions.jsonl      # perplexity, KL to the teacher, choices
python train_distill.py sample --run_name pupil --instruction "What is kinetic energy?"

tokens (B, T) -> token (+ position) embedding (B, T, D) -> layers x [causal attention, MLP] -> norm -> h (B, T, D)
h of the N supervised positions, student's and teacher's -> chunks of logits (C, V) -> loss, dh (N, D), dW (V, D)

What used to break here                                       and what stops it
  a KL summed over tokens and pads but divided by rows: 300x    one mask and one count for both parts of the loss
  logits (B, T, V) in float32, five times: out of memory        ChunkedLoss: closed-form gradient, chunk by chunk
  accumulation that multiplies the gradient                     count: supervised tokens of the whole step, all ranks
  vocabularies of equal size that mean other tokens             shared_size compares them id by id
  padding with the end token, so that no end is learnt          the mask comes from lengths
  half-precision weights under a loss scale                     float32 weights; a teacher alone may be stored in less
  NaN weights, a missing tensor, an adapter without its base    load_hf refuses them by name, before training

Hinton, Vinyals, Dean 2015 (distillation, arXiv 1503.02531). Agarwal et al. 2024 (GKD: generalised Jensen-Shannon
divergence, arXiv 2306.13649, eq. 1). Hsu et al. 2024 (Liger: chunked losses, arXiv 2410.10989).
"""
import contextlib
import dataclasses
import functools
import gc
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common import (DTYPES, RING, Guard, NonFinite, agree, autocast, every, fail, finish, float32_island, global_rows,
                    launch, listen, local_rows, pick_dtype, rank, seed_step, unwrap, world_size, wrap_ddp)
from data.files import or_fail
from data.text import hf, report
from data.text.cache import cached_teacher
from data.text.hf import SIZES, read_weights, rope_frequencies, shape_of, write_folder
from data.text.tables import TAUGHT, find_folder, get_rows, packed, read_folder, share, shortest
from data.text.tokens import load_tokenizer as read_tokenizer
from runs import (Run, checkpoints, complete, load_newest, load_tensors, model_tensors, parse_flags, read_config,
                  read_file, restore, resume_config, save_checkpoint, steps_in, write_file, write_whole)

# B rows, T positions, N supervised positions of a batch, C of a chunk, V vocabulary, D width, H heads


# ---------------------------------------------------------------------------------------------------------- config
@dataclass
class Config:
    # common to all scripts
    run_name: str = ""  # folder in out_dir; empty: made from the time
    out_dir: str = "out"  # where runs are written
    data_dir: str = ""  # prepared data; empty: the demo set, built if missing
    seed: int = 0  # of weights, row order and dropout
    device: str = "auto"  # auto, cuda, mps, cpu
    dtype: str = "float32"  # of the autocast: auto, float32, bfloat16, float16
    compile: bool = False  # torch.compile the model
    batch_size: int = 2  # rows per process and micro-batch
    grad_accum: int = 1  # micro-batches per optimizer step
    max_epochs: int = 3  # passes over the training rows
    max_steps: int = 0  # optimizer steps; 0: as max_epochs says
    learning_rate: float = 2e-5  # after the warm-up
    min_lr: float = 0.0  # at the end of the cosine, as a share of learning_rate
    warmup_steps: int = 0  # of linear warm-up
    weight_decay: float = 0.01  # on matrices and embeddings, not on biases and norms
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.999  # of AdamW
    grad_clip: float = 1.0  # largest global gradient norm; 0: off
    on_nonfinite: str = "stop"  # skip the step, or stop the run
    max_skips: int = 10  # more in a row, or in total more than max(this, 1 % of the steps), stop the run
    skip_steps: str = ""  # steps to pass over, as 17,40-45
    eval_every: int = 500  # steps between validations; 0: only at the end
    save_every: int = 500  # steps between checkpoints; 0: only at the end
    keep: int = 3  # newest checkpoints that stay; 0: all
    sample_every: int = 0  # steps between looks at samples; 0: only at the end
    log_every: int = 10  # steps between progress lines; 0: none
    resume: bool = False  # go on from the newest checkpoint of run_name
    dry_run: bool = False  # a tiny model and few steps: does everything run?
    wandb: str = ""  # offline or online; empty: off
    # this script
    phase: str = ""  # teacher or student; empty: the student, and before it a teacher if none is given
    teacher: str = ""  # Hugging Face folder of the model that teaches
    student: str = "tiny"  # Hugging Face folder, or a size to start from random weights: tiny, small, gpt2 ...
    teacher_size: str = "small"  # the same for what --phase teacher trains
    teacher_epochs: int = 0  # max_epochs of the teacher that is trained first when phase is empty; 0: the same
    teacher_dtype: str = "float32"  # in which the teacher is held: float32, bfloat16, float16
    cache_teacher: int = 0  # ask the teacher once and keep so many of its likeliest tokens; 0: ask it at every step
    temperature: float = 3.0  # of the distillation, by which both models' logits are divided
    alpha: float = 0.5  # share of the distillation in the loss; the rest is cross-entropy
    divergence: str = "forward"  # forward: KL(teacher || student); reverse: KL(student || teacher); jsd: beta's
    beta: float = 0.5  # of jsd: the teacher's share of the mixture
    kd_reduction: str = "token"  # token: mean over supervised tokens; batchmean: the original's sum over all / rows
    train_on_prompt: bool = False  # learn the instructions too
    max_length: int = 512  # tokens of a row, the rest is cut off
    train_rows: int = 0  # a student learns from so many of the training rows, drawn with the seed; 0: from all
    warmup_ratio: float = 0.1  # of the steps, where --warmup_steps is 0
    dropout: float = 0.0  # of the student, in embedding, attention and residual branches
    eval_rows: int = 1000  # validation rows looked at during training; 0: all
    compare: int = 0  # train so many students with the teacher and as many without, and show them side by side
    fp16: bool = False  # the original's flag: --dtype float16 on a GPU, float32 on a CPU

    @property
    def model(self):                                # folder or size of what is trained
        return self.teacher_size if self.phase == "teacher" else self.student


DEMO = dict(batch_size=16, max_epochs=40, teacher_epochs=3, train_rows=300, learning_rate=4e-3, weight_decay=0.1,
            temperature=1.0, alpha=0.9, max_length=320, eval_every=125, log_every=125, compare=3)
DRY = dict(batch_size=2, max_steps=5, eval_every=5, save_every=5, log_every=1, compare=1, eval_rows=32)
ALIASES = {"epochs": "max_epochs", "lr": "learning_rate", "data_name": "data_dir=data/text/{}",
           "data_path": "data_dir", "teacher_model": "teacher", "student_model_name": "student"}
FIXED = ("data_dir", "phase", "teacher", "student", "teacher_size", "train_on_prompt", "train_rows", "compare",
         "seed")                                    # a resume keeps them; max_length is in the checksum of the rows


# ------------------------------------------------------------------------------------------------------------ data
def load_tokenizer(folder):
    """The tokenizer of a Hugging Face folder, or bytes if it has none; what it cannot read ends in fail()."""
    return or_fail(read_tokenizer, Path(folder))


def load_data(config, device="cpu"):
    """data_dir -> Data on the device; without it the demo set; a file of JSON lines is prepared once, by rank 0."""
    holders = [name for name in (config.model, config.teacher) if name and (Path(name) / "config.json").exists()]
    folder = find_folder(config, holders, device)
    data = or_fail(read_folder, folder, config.max_length, config.train_on_prompt, device)
    if config.train_rows and config.phase == "student":
        data.keep(config.train_rows, config.seed)
    return or_fail(share, data, holders, config.model)


WINDOW = 4                                          # global batches that are sorted by length together


@functools.lru_cache(maxsize=2)
def bucketed_rows(data, split, global_batch, seed, window, size):
    """The rows of the window-th run of `size` global batches, (size, global_batch), each batch of similar lengths."""
    rows = data.rows[split]
    taken = rows[global_rows(len(rows), size * global_batch, seed, window)]
    batches = taken[np.argsort(data.length[taken], kind="stable")].reshape(size, global_batch)
    return np.random.default_rng([seed, window]).permutation(batches)


def get_batch(data, split, step, config, micro=0):
    """This rank's micro-batch of a step: get_rows, with count (supervised positions of the whole step, all ranks) and
    rows (its rows)."""
    global_batch = config.batch_size * config.grad_accum * world_size()
    size = max(1, min(WINDOW, len(data.rows[split]) // global_batch // 4))      # else an epoch's batches would repeat
    rows = bucketed_rows(data, split, global_batch, config.seed, step // size, size)[step % size]
    return get_rows(data, local_rows(rows, micro, config.grad_accum), 0, config.kd_reduction == "batchmean") | {
        "count": int(data.asked[rows].sum()), "rows": global_batch, "micro": micro}


# ----------------------------------------------------------------------------------------------------------- model
ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh"), "relu": F.relu,
               "silu": F.silu}


@functools.lru_cache(maxsize=8)
def turns(shape, n, device):
    """-> (cos, sin), each (n, d), of the angles of n positions, in float32 whatever the model is held in."""
    angle = torch.outer(torch.arange(n, dtype=torch.float32), rope_frequencies(shape))
    return angle.cos().repeat(1, 2).to(device), torch.cat([-angle.sin(), angle.sin()], 1).to(device)


def rotate(x, turn):
    """x (B, H, T, d), turn (cos, sin), each (T, d) -> x turned (Su et al. 2021); entry i goes with entry i + d / 2."""
    return torch.addcmul(x * turn[0], x.roll(x.shape[-1] // 2, -1), turn[1])


class Block(nn.Module):
    def __init__(self, shape, layer, dropout):
        super().__init__()
        D, d, norm = shape.width, shape.head_dim, nn.LayerNorm if shape.kind == "gpt2" else nn.RMSNorm
        self.shape, self.dropout, self.drop = shape, dropout, nn.Dropout(dropout)
        self.scale = d ** -0.5 / (layer + 1 if shape.scale_by_layer else 1)
        self.norm1, self.norm2 = norm(D, shape.eps), norm(D, shape.eps)
        self.qkv = nn.Linear(D, (shape.heads + 2 * shape.kv_heads) * d, bias=shape.qkv_bias)
        if shape.qk_norm:
            self.q_norm, self.k_norm = norm(d, shape.eps), norm(d, shape.eps)
        self.out = nn.Linear(shape.heads * d, D, bias=shape.out_bias)
        self.up = nn.Linear(D, shape.hidden * (1 if shape.kind == "gpt2" else 2), bias=shape.mlp_bias)
        self.down = nn.Linear(shape.hidden, D, bias=shape.mlp_bias)
        self.activation = ACTIVATIONS[shape.activation]

    def forward(self, x, turn=None, past=None):
        (B, T, _), H, K = x.shape, self.shape.heads, self.shape.kv_heads
        qkv = self.qkv(self.norm1(x)).view(B, T, H + 2 * K, -1).transpose(1, 2)
        q, k, v = qkv.split((H, K, K), 1)                                       # (B, H or K, T, d)
        if self.shape.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = rotate(q, turn).type_as(v), rotate(k, turn).type_as(v)
        if past is not None:                        # [k, v] of the positions before, grown in place
            k, v = past[:] = [torch.cat(pair, 2) for pair in zip(past, (k, v))] if past else [k, v]
        k, v = (y if K == H else y.repeat_interleave(H // K, 1) for y in (k, v))
        S, dropout, mask = k.shape[2], self.dropout if self.training else 0.0, None
        if 1 < T < S:                               # several new positions after the past ones
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, T == S, scale=self.scale)
        x = x + self.drop(self.out(y.transpose(1, 2).reshape(B, T, -1)))
        gate, *up = self.up(self.norm2(x)).split(self.shape.hidden, -1)         # GPT-2 has the first alone
        y = self.activation(gate) * up[0] if up else self.activation(gate)
        return x + self.drop(self.down(y))


class Decoder(nn.Module):
    """GPT-2, Llama, Mistral, Qwen2 or Qwen3, as the Hugging Face config `raw` says, with random weights: load_hf fills
    in others. vocab: ids in use, the first ones of a padded vocabulary."""
    def __init__(self, raw, dropout=0.0, vocab=0):
        super().__init__()
        self.raw, self.shape = raw, shape_of(raw)
        shape, self.vocab, self.drop = self.shape, vocab or self.shape.vocab_size, nn.Dropout(dropout)
        self.token = nn.Embedding(shape.vocab_size, shape.width)
        if not shape.rope:
            self.position = nn.Embedding(shape.n_positions, shape.width)
        self.blocks = nn.ModuleList(Block(shape, layer, dropout) for layer in range(shape.layers))
        self.norm = (nn.LayerNorm if shape.kind == "gpt2" else nn.RMSNorm)(shape.width, shape.eps)
        if not shape.tied:
            self.head = nn.Linear(shape.width, shape.vocab_size, bias=False)
        for name, p in self.named_parameters():     # GPT-2's: the ends of residual branches smaller
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * shape.layers) if "out." in name or "down." in name else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def head_weight(self):
        return self.token.weight if self.shape.tied else self.head.weight

    def forward(self, tokens, head=True, past=None):
        """tokens (B, T) int64 -> logits (B, T, V) float32, without head h (B, T, D) for ChunkedLoss. past: to decode
        step by step, a list per layer, empty at first."""
        seen, x = past[0][0].shape[2] if past and past[0] else 0, self.token(tokens)
        place = slice(seen, seen + tokens.shape[1])
        if place.stop > self.shape.n_positions:
            raise ValueError(f"{place.stop} positions, and the model has {self.shape.n_positions}")
        turn = None
        if self.shape.rope:                         # tables of some more positions serve other lengths too
            turn = [table[place] for table in turns(self.shape, -(-place.stop // 256) * 256, tokens.device)]
        else:
            x = x + self.position.weight[place]
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            x = block(x, turn, None if past is None else past[i])
        x = self.norm(x)
        return widen(F.linear(x, self.head_weight)) if head else x


def load_hf(folder, device="cpu", dtype=torch.float32, dropout=0.0, vocab=0):
    """A Hugging Face folder -> Decoder in eval mode, its weights in dtype. What is missing, unexpected, mis-shaped, not
    finite or not supported is named and ends in fail()."""
    raw = or_fail(hf.read_config, Path(folder))
    shape = or_fail(shape_of, raw, f"{folder}/config.json")
    tensors = or_fail(read_weights, Path(folder), shape, dtype)
    with torch.device("meta"):                      # so that the weights are there once
        model = Decoder(raw, dropout, vocab)
    model.load_state_dict(tensors, assign=True)
    return model.to(device).eval()


def save_hf(model, folder):
    """Write the Decoder as a Hugging Face folder, float32, that load_hf and transformers open."""
    model = unwrap(model)
    write_folder(Path(folder), model.raw, model.shape, model_tensors(model))


def build_model(config, vocab, tokenizer=None):
    """The phase's model: a Hugging Face folder, or a size with random weights. about is what load_model needs."""
    if (Path(config.model) / "config.json").exists():
        model = load_hf(config.model, "cpu", torch.float32, config.dropout, vocab)
    else:
        own = {"vocab_size": getattr(tokenizer, "size", vocab), "eos_token_id": getattr(tokenizer, "eos", None)}
        model = Decoder(SIZES[config.model] | {"bos_token_id": None} | own, config.dropout, vocab)
    model.about = {"config": dataclasses.asdict(config), "raw": model.raw, "vocab": vocab}
    return model


def load_model(path, device="cpu"):
    """best.safetensors, or an event's model.safetensors -> Decoder in eval mode. Raises ValueError if it is damaged."""
    tensors, body = read_file(path)
    about = body["about"]
    if "teacher_size" not in about["config"]:
        raise ValueError(f"{path} is of another script")
    model = Decoder(about["raw"], about["config"]["dropout"], about["vocab"])
    load_tensors(model, tensors, path)
    model.about = about
    return model.to(device).eval()


# ------------------------------------------------------------------------------------------------------------ loss
CHUNK = {"cpu": 1 << 22, "cuda": 1 << 26}           # logits made at once; five float32 tensors of that size may live
PARTS = ("student_logits", "teacher_logits", "kd", "ce", "teacher_ce")  # in the order in which they are made


def widen(x):
    """To float32 at least: losses are computed in it."""
    return x if x.dtype == torch.float64 else x.float()


def compare(log_p, log_q, divergence, beta):
    """log p of the teacher, log q of the student (C, V), both used up -> D (C,) in nats, dD/dz (C, V), q = softmax(z).

    forward KL(p || q); reverse KL(q || p); jsd, with m = beta p + (1 - beta) q: beta KL(p || m) + (1 - beta) KL(q || m)
    (Agarwal et al. 2024, eq. 1)."""
    if divergence == "forward":
        value, p, q = log_p - log_q, log_p.exp_(), log_q.exp_()
        return value.mul_(p).sum(1), q.sub_(p)
    inner, value, share = log_q - log_p, 0.0, 1.0
    if divergence == "jsd":
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        inner, share = log_q - log_m, 1 - beta
        value = beta * log_m.neg_().add_(log_p).mul_(log_p.exp_()).sum(1)
    q = log_q.exp_()
    mean = (q * inner).sum(1)
    return value + share * mean, inner.sub_(mean[:, None]).mul_(q).mul_(share)


def remembered(taught, some, log_q):
    """log p (C, V) of a cached teacher: its likeliest tokens top (N, K) with log_p (N, K), and tail (N,), the log of
    what all others have together. That is spread over them as the student spreads its own: so the values and gradients
    of all divergences are exactly those of K + 1 classes."""
    top, log_p, tail = (taught[name][some] for name in TAUGHT[:3])
    if top.shape[1] == log_q.shape[1]:
        return torch.empty_like(log_q).scatter_(1, top.long(), log_p.to(log_q))
    rest = log_q.scatter(1, top.long(), -math.inf).logsumexp(1)
    return (log_q + (tail - rest)[:, None]).scatter_(1, top.long(), log_p.to(log_q))


def largest(logits):
    """(C, V) -> the largest |logit| of each position (C,); NaN stays NaN."""
    low, high = logits.aminmax(dim=1)
    return torch.maximum(high, -low)


class Mix(NamedTuple):
    """What is added up, see ChunkedLoss."""
    vocab: int
    scale: float = 1.0  # of all sums and gradients: 1 / count
    alpha: float = 0.0  # share of the distillation
    temperature: float = 1.0
    divergence: str = "forward"
    beta: float = 0.5
    kd_weight: float = 1.0  # of the distillation at each of the N positions


class ChunkedLoss(torch.autograd.Function):
    """scale * sum over N positions of alpha kd_weight T^2 D(p || q) + (1 - alpha) asked CE; never holds logits (N, V).

    Of a chunk of C positions the logits s are made, then the closed form of the gradient (Hinton et al. 2015, section
    2), where q = softmax(z), z = s / T,
        ds = alpha kd_weight T dD/dz + (1 - alpha) asked (softmax(s) - onehot)
    and at once dh = ds W and dW += ds^T h; nothing else is kept. In float32 at least, products in autocast's dtype.

    apply(h (N, D), weight (>= V, D), targets (N,) int64, asked (N,), taught, mix) -> the loss and PARTS, 0-dim and
    scaled: student_logits and teacher_logits are the largest |logit| of a position, kd has its T^2. taught: {} without
    a teacher, its h (N, D') and weight (>= V, D'), or what remembered() wants. Only the loss has a gradient."""
    @staticmethod
    def forward(ctx, h, weight, targets, asked, taught, mix):
        device, T, needed = h.device.type, mix.temperature, ctx.needs_input_grad[0]
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):
            x, W = (y.to(low or weight.dtype) for y in (h, weight[:mix.vocab]))
            if "weight" in taught:                  # a teacher that is held in less computes in that
                taught_x, taught_W = taught["h"], taught["weight"][:mix.vocab]
                if low and taught_W.dtype == torch.float32:
                    taught_x, taught_W = taught_x.to(low), taught_W.to(low)
            dh, dW = (torch.empty_like(x, dtype=h.dtype), torch.zeros_like(weight)) if needed else (None, None)
            ctx.grads, total = (dh, dW, mix.scale), widen(x.new_zeros(len(PARTS)))
            chunk = max(1, CHUNK.get(device, 1 << 24) // mix.vocab)
            for some in (slice(i, i + chunk) for i in range(0, len(h), chunk)):
                s, target, here = widen(F.linear(x[some], W)), targets[some, None], asked[some]
                lse, kd, ds, teacher_ce, teacher_logits = s.logsumexp(1, keepdim=True), *here.new_zeros(4, 1)
                ce, student_logits = (lse - s.gather(1, target))[:, 0], largest(s)
                if "weight" in taught:
                    t = widen(F.linear(taught_x[some], taught_W)).to(s.dtype)
                    teacher_ce, teacher_logits = (t.logsumexp(1, keepdim=True) - t.gather(1, target))[:, 0], largest(t)
                    log_p = t.div_(T).log_softmax(1)
                    del t                           # before the next tensor of its size is made
                    kd, ds = compare(log_p, (s / T).log_softmax(1), mix.divergence, mix.beta)
                elif taught:
                    teacher_ce, teacher_logits = (taught[name][some] for name in TAUGHT[3:])
                    log_q = (s / T).log_softmax(1)
                    kd, ds = compare(remembered(taught, some, log_q), log_q, mix.divergence, mix.beta)
                total += torch.stack([(here * student_logits).sum(), (here * teacher_logits).sum(),
                                      mix.kd_weight * T ** 2 * kd.sum(), (here * ce).sum(), (here * teacher_ce).sum()])
                if needed:
                    q = s.sub_(lse).exp_()          # of temperature 1, in place of the logits
                    q.scatter_add_(1, target, -torch.ones_like(q[:, :1])).mul_((1 - mix.alpha) * here[:, None])
                    ds = q.add_(ds, alpha=mix.alpha * mix.kd_weight * T) if mix.alpha else q
                    dh[some] = ds.to(x.dtype) @ W
                    if dW.dtype == x.dtype:
                        dW[:mix.vocab].addmm_(ds.T, x[some])
                    else:
                        dW[:mix.vocab] += ds.to(x.dtype).T @ x[some]
        total = total * mix.scale
        loss = (mix.alpha * total[2] if taught else 0.0) + (1 - mix.alpha) * total[3]
        ctx.mark_non_differentiable(total)
        return loss, total

    @staticmethod
    def backward(ctx, g, _):
        (dh, dW, scale), ctx.grads = ctx.grads, (None,) * 3             # in place: there is no second backward
        return dh.mul_(g * scale), dW.mul_(g * scale), None, None, None, None


def as_held(teacher):
    """Context in which a teacher that is held in less computes in that, whatever autocast says."""
    weight = teacher.head_weight
    return contextlib.nullcontext() if weight.dtype == torch.float32 else float32_island(weight)


@functools.lru_cache(maxsize=1)
def frozen_teacher(folder, dtype, device):
    return load_hf(folder, device, DTYPES[dtype]).requires_grad_(False)


def ask_teacher(batch, config):
    """What ChunkedLoss wants to know of the teacher: from the batch if it is cached, else the teacher is asked now."""
    if "top" in batch:
        return {name: batch[name] for name in TAUGHT}
    if not config.teacher:
        return {}
    teacher = frozen_teacher(config.teacher, config.teacher_dtype, str(batch["tokens"].device))
    with torch.no_grad(), as_held(teacher):
        h = teacher(batch["tokens"], False).flatten(0, 1)[batch["place"]]
    return {"h": h, "weight": teacher.head_weight}


def compute_loss(model, batch, step, config):
    """-> (loss, parts): sums over this micro-batch divided by the whole step's count; 0-dim float32."""
    raw_model, h = unwrap(model), model(batch["tokens"], False).flatten(0, 1)[batch["place"]]
    taught = ask_teacher(batch, config) if config.alpha else {}
    kd_weight = batch["count"] / batch["rows"] if config.kd_reduction == "batchmean" else 1.0
    mix = Mix(raw_model.vocab, 1 / batch["count"], config.alpha if taught else 0.0, config.temperature,
              config.divergence, config.beta, kd_weight)
    loss, total = ChunkedLoss.apply(h, raw_model.head_weight, batch["targets"], batch["asked"], taught, mix)
    parts = {name: value for name, value in zip(PARTS, total) if taught or name in ("student_logits", "ce")}
    if step < 5 and model.training and rank() == 0:
        report.tell(step, batch, parts, config, raw_model.vocab)
    return loss, parts


# ---------------------------------------------------------------------------------------------- evaluation, samples
@torch.no_grad()
def evaluate(model, data, config, split="val", max_rows=0):
    """Means over the supervised positions of a split (of max_rows of its rows, always the same; 0: all) -> dict, equal
    on all ranks: loss, the training's with token means; ce of the model, nats per token, which chooses checkpoints; of
    a student also kl to the teacher at T = 1, and teacher_ce."""
    model, device, rows = unwrap(model), data.table.device, data.rows[split]
    rows = np.random.default_rng(0).permutation(rows)[:max_rows] if max_rows else rows
    was_training, dtype, total = model.training, pick_dtype(config.dtype, device)[0], torch.zeros(2, 5).double()
    cached, data = data.cache, dataclasses.replace(data, cache=None)    # that one is of training rows, at another T
    model.eval()
    for some in packed(data, rows[rank()::world_size()]):
        batch = get_rows(data, some)
        with autocast(device, dtype):
            h = model(batch["tokens"], False).flatten(0, 1)[batch["place"]]
            taught = ask_teacher(batch, config)
            for i, T in enumerate((1.0, config.temperature)):
                mix = Mix(model.vocab, 1.0, 0.0, T, config.divergence if i else "forward", config.beta)
                if i == 0 or (T, config.divergence) != (1.0, "forward"):        # else it is the same
                    values = ChunkedLoss.apply(h, model.head_weight, batch["targets"], batch["asked"], taught, mix)[1]
                total[i] += values.cpu()
    model.train(was_training)
    if world_size() > 1:
        total = total.to(device)
        dist.all_reduce(total)
    if cached:                                      # the teacher is asked so seldom that it need not stay
        frozen_teacher.cache_clear()
    at_1, at_T = (dict(zip(PARTS, row)) for row in (total / data.asked[rows].sum()).tolist())
    if not config.teacher:
        return {"loss": at_1["ce"], "ce": at_1["ce"]}
    return {"loss": config.alpha * at_T["kd"] + (1 - config.alpha) * at_1["ce"], "ce": at_1["ce"], "kl": at_1["kd"],
            "teacher_ce": at_1["teacher_ce"]}


@torch.no_grad()
def generate(model, prompt, most, temperature=1.0, top_k=0, seed=0, end=None):
    """Draw one continuation of prompt (token ids) with a KV cache -> list of at most `most` ids, ended by the id `end`,
    which is not in it. temperature 0: always the likeliest token."""
    device, made, past = model.token.weight.device, [], [[] for _ in model.blocks]
    generator, x = torch.Generator(device).manual_seed(seed), torch.tensor([list(prompt)], device=device)
    for _ in range(min(most, model.shape.n_positions - len(prompt))):
        logits = model(x, True, past)[0, -1, :model.vocab]
        if top_k:
            logits = logits.masked_fill(logits < logits.topk(min(top_k, len(logits)))[0][-1], -math.inf)
        weight = (logits / (temperature or 1.0)).softmax(0)
        x = weight.argmax().view(1, 1) if not temperature else torch.multinomial(weight, 1, generator=generator)[None]
        if int(x) == end:
            break
        made.append(int(x))
    return made


# --------------------------------------------------------------------------------------------------- training loop
def lr_at(step, max_steps, config):
    """Linear warm-up, then a cosine down to the share min_lr: a function of the step, so there is nothing to save."""
    warmup = config.warmup_steps or max(1, int(config.warmup_ratio * max_steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    return config.learning_rate * (config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


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
    """A teacher if none is given, its student, and before it the students to compare with; or the teacher alone."""
    if not config.run_name:
        now = time.localtime(agree(int(time.time()), device))
        config = dataclasses.replace(config, run_name=time.strftime("distill_%Y%m%d_%H%M%S", now))
    name, chain, asked = config.run_name, [], vars(config)
    if config.phase != "teacher":
        if not config.teacher:
            first = dataclasses.replace(config, phase="teacher", run_name=f"{name}-teacher", compare=0)
            chain.append(dataclasses.replace(first, max_epochs=config.teacher_epochs or config.max_epochs))
            config = dataclasses.replace(config, teacher=str(Path(config.out_dir) / first.run_name / "hf"))
        config = dataclasses.replace(config, phase="student")
        for i in range(config.compare):             # from equal weights, on equal rows, for as many steps
            one = dataclasses.replace(config, seed=config.seed + i, compare=0)
            chain.append(dataclasses.replace(one, alpha=0.0, run_name=f"{name}-ce{i}"))
            chain += [dataclasses.replace(one, run_name=f"{name}-kd{i}")] * (i > 0)
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
    if config.compare and rank() == 0 and config.phase == "student":
        done["comparison"] = report.comparison(config)
    return done


def run_phase(config, device, name):
    """One run of its own folder; name: of the run that it is a phase of."""
    frozen_teacher.cache_clear(), bucketed_rows.cache_clear(), gc.collect()     # the phase before lets go of its own
    folder, data = Path(config.out_dir) / config.run_name, load_data(config, device)
    if config.teacher:                              # what is wrong with it is said now
        frozen_teacher(config.teacher, config.teacher_dtype, str(device))
    torch.manual_seed(config.seed)
    raw_model = build_model(config, data.vocab, data.tokenizer).to(device)
    raw_model.about["rows"] = data.key
    if config.cache_teacher and config.teacher and config.alpha:
        data.cache = cached_teacher(sys.modules[__name__], config, data)
        frozen_teacher.cache_clear()                # a validation brings it back
    matrices, vectors = ([p for p in raw_model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors}],
                                  weight_decay=0.0, betas=(config.beta1, config.beta2), fused=True)
    global_batch = config.batch_size * config.grad_accum * world_size()
    steps_per_epoch = len(data.rows["train"]) / global_batch
    max_steps = config.max_steps or math.ceil(config.max_epochs * steps_per_epoch)
    skip_steps, (dtype, reason) = steps_in(config.skip_steps), pick_dtype(config.dtype, device)

    start, best, saved = 0, math.inf, None
    if config.resume:
        saved = load_newest(folder, device)
        if saved:                                   # of a phase that settle() has not seen: refuse what does not fit
            resume_config(config, {*FIXED} - {"teacher"}, saved[1]["config"], FIXED)
            if [saved[1]["about"][key] for key in ("vocab", "rows")] != [data.vocab, data.key]:
                fail(f"--data_dir, --max_length {config.max_length}: rows or vocabulary are not the checkpoint's")
            restore(raw_model, optimizer, *saved)
            start, best = saved[1]["step"], saved[1]["best"]
    if start > max_steps:
        fail(f"the newest checkpoint is of step {start}, beyond --max_steps {max_steps}: nothing to do")

    run = Run(config, start, {"max_steps": max_steps, "steps_per_epoch": steps_per_epoch, "global_batch": global_batch})
    for block in raw_model.blocks if config.compile else ():
        block.compile(dynamic=True)                 # rows have many lengths
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
    tokens = global_batch * data.length[data.rows["train"]].mean()      # of a step, on average; pads do not count
    run.log(f"{config.run_name}: {size:,} parameters, {str(dtype)[6:]} ({reason}), {rows:,} rows, batch "
            f"{config.batch_size} x {world_size()} {device.type} x {config.grad_accum} = {global_batch}, {max_steps:,} "
            f"steps" + f", resumed at {start:,}" * (start > 0))
    warmup = config.warmup_steps or max(1, int(config.warmup_ratio * max_steps))
    run.log(f"""Training Configuration:
  Learning rate: {config.learning_rate}   Max gradient norm: {config.grad_clip}
  Warmup steps: {warmup} ({warmup / max_steps:.0%} of {max_steps} total steps)
  Temperature: {config.temperature}   Alpha: {config.alpha if config.teacher else 0}   Divergence: {config.divergence}
  FP16: {dtype == torch.float16}   Device: {device}   Teacher: {config.teacher or "none"}
  {config.phase.title()}: {config.model} ({"a folder" if Path(config.model).is_dir() else "a size, random weights"})""")
    try:
        for step in range(start, max_steps + 1):    # one extra turn, so that the last state is evaluated and saved
            last, stop = step == max_steps, guard.stop_requested

            # once in a while: the guard's only host read, validation on all ranks, a look at some samples, a checkpoint
            intervals = config.log_every, config.eval_every, config.save_every, config.sample_every
            if last or stop or every(step, RING, *intervals):
                stats = guard.poll()
                stop = guard.stop_requested         # read once: a signal may come at any line
                if stats["steps"]:
                    run.progress(step, max_steps, stats, lr_at(step - 1, max_steps, config), tokens, "tokens")
                if last or every(step, config.eval_every):
                    scores = evaluate(model, data, config, "val", config.eval_rows)
                    run.log(f"step {step:,} validation: " + "  ".join(f"{name} {x:.4f}" for name, x in scores.items()))
                    run.measure(step, "val", **scores)
                    run.curves()
                    if config.alpha and scores.get("teacher_ce", -math.inf) >= scores["ce"]:
                        run.log(f"warning: the teacher's cross-entropy {scores['teacher_ce']:.4f} is no better than "
                                f"the student's {scores['ce']:.4f}: it has little to teach; train it on these first")
                    if scores["ce"] < best:         # never true of a NaN
                        best = scores["ce"]
                        if run.main:
                            tensors = model_tensors(raw_model)
                            write_file(folder / "best.safetensors", tensors, {"about": raw_model.about, "step": step})
                if every(step, config.sample_every) and run.main:
                    path = folder / f"samples/step-{step:08d}.txt"
                    report.completions(sys.modules[__name__], raw_model.eval(), data, path)
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
        run.log(f"stopped by a signal; go on with: python train_distill.py --resume --run_name {name}")
        return {"step": step, "best": best, "stopped": True}
    listen(False)                                   # all is saved: from here on Ctrl-C may end the program
    agree(0, device)                                # best.safetensors is there
    best_model = or_fail(load_model, folder / "best.safetensors", device)
    if run.main:
        save_hf(best_model, folder / "hf")
        data.tokenizer.save(folder / "hf")
    scores = {split: evaluate(best_model, data, config, split) for split in ("val", "test") if len(data.rows[split])}
    table = report.table(sys.modules[__name__], best_model, data, config, scores, folder, run.log) if run.main else {}
    agree(0, device)                                # the others wait for hf/ and the table
    return {"step": step, "best": best, "table": table, "stopped": stop}


# ------------------------------------------------------------------------------------------------------------ main
def settle(config, given):
    """Fill in what the flags left open and refuse what cannot work for this model -> Config"""
    say = print if os.environ.get("RANK", "0") == "0" else lambda text: None
    demo, dry = (x | ({"compare": 0} if config.phase or config.teacher else {}) for x in (DEMO, DRY))
    folder, filled = Path(config.out_dir) / config.run_name, given
    if config.resume and config.run_name and not checkpoints(folder) and (folder / "config.json").exists():
        asked = read_config(str(folder / "config.json"), Config.__dataclass_fields__)   # of a chain that was stopped
        config, filled = resume_config(config, given, asked, FIXED), given | {*asked}
    elif not config.data_dir:                       # before complete(), so that a resume keeps what it had
        demo |= {"max_epochs": demo["teacher_epochs"]} if config.phase == "teacher" else {}
        demo = {name: x for name, x in demo.items() if name not in given}
        config = dataclasses.replace(config, **demo)
        if not config.resume:
            say("demo set: " + " ".join(f"--{name} {x}" for name, x in demo.items()))
    config = complete(config, filled, {}, dry, FIXED)
    if config.fp16 and "dtype" not in given:
        cuda = config.device != "cpu" and torch.cuda.is_available()
        config = dataclasses.replace(config, dtype="float16" if cuda else "float32")
        say(f"--fp16: --dtype {config.dtype}" + ", since there is no GPU" * (not cuda))
    low = dict.fromkeys(("temperature", "max_epochs", "max_length"), 1e-3) | dict.fromkeys(("alpha", "beta", "dropout",
        "warmup_ratio", "teacher_epochs", "train_rows", "cache_teacher", "eval_rows", "compare"), 0)
    for name, least in low.items():
        most, value = 1 if name in ("alpha", "beta", "warmup_ratio", "dropout") else math.inf, getattr(config, name)
        if not least <= value <= most:
            fail(f"--{name} {value}: must be {'above' if least else 'at least'} 0" + ", at most 1" * (most == 1))
    for name, choices in {"phase": ("", "teacher", "student"), "teacher_dtype": [*DTYPES], "kd_reduction": (
            "token", "batchmean"), "divergence": ("forward", "reverse", "jsd")}.items():
        if getattr(config, name) not in choices:
            fail(f"--{name} {getattr(config, name)}: one of {', '.join(filter(None, choices))}")
    if config.phase == "student" and not config.teacher or config.phase == "teacher" and config.teacher:
        fail(f"--phase {config.phase}: a student needs --teacher DIR, and a teacher has none")
    if config.divergence == "jsd" and config.beta in (0, 1) or config.dropout == 1:
        fail("--beta 0 and 1 make --divergence jsd 0: use forward or reverse; --dropout must be below 1")
    if config.cache_teacher and config.kd_reduction == "batchmean":
        fail("--cache_teacher holds supervised positions alone, --kd_reduction batchmean wants all")
    return dataclasses.replace(config, max_length=shortest(config, say))


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
