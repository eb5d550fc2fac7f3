"""
Molecules from molecules: MolGPT, a small GPT over SMILES tokens, with an evidential (Dirichlet) head.

python train_edl.py                                   # no flags: builds a demo set, trains, samples; minutes on a CPU
python train_edl.py --dry_run                         # everything once, in seconds
python data/molecules/prepare.py --input moses.csv --name moses && python train_edl.py --data_name moses
torchrun --nproc_per_node=8 train_edl.py --data_name moses --run_name big                           # eight GPUs
torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 train_edl.py --data_name moses
python train_edl.py --resume --run_name big           # goes on, bit for bit, from the newest checkpoint
python train_edl.py eval --run_name big --beside plain    # all metrics, beside another run, n-gram models and real rows
python train_edl.py sample --run_name big --num_samples 1000 --out molecules.csv
python train_edl.py --data_name moses --props logp,tpsa --scaffold --run_name wish    # molecules made to measure
python train_edl.py sample --run_name wish --prop_values logp=2,tpsa=60 --scaffold_smiles c1ccc(-c2ccnnc2)cc1
python train_edl.py --edl_loss_type mse --edl_evidence softplus --edl_kl_weight 1     # the original recipe, to compare

[scaffold | BOS + properties | molecule] (B, T) -> embedding + position (B, T, D) -> n_layer x [causal attention, GELU
MLP] -> logits (B, T, K) -> evidence e = exp or softplus -> Dirichlet alpha = e + 1, S = sum alpha, vacuity K / S

What used to break here                                       and what stops it
  lgamma and digamma in bfloat16: a KL off by 100x, negative    float32 islands, and a dirichlet_kl without cancellation
  evidence exp(o) that overflows                                logits clamped at 15
  KL at full weight, which flattens the language model          --edl_kl_weight 0; checkpoints are chosen by NLL alone
  a bad batch that one rank skips while the others wait         guard.backward and guard.step: one decision for all
  tokens drawn from alpha / S: K / S of uniform noise in each   tokens drawn from e / sum e
  no BOS, no EOS, no resume, a hard-coded vocabulary            all of it is in the data and in the checkpoint

Bagal et al. 2022 (MolGPT, J. Chem. Inf. Model. 62, 2064). Sensoy, Kaplan, Kandemir 2018 (evidential deep learning,
arXiv 1806.01768; equations 3-5 below). Polykovskiy et al. 2020 (MOSES, Front. Pharmacol. 11, 565644).
"""
import dataclasses
import functools
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common import (RING, Guard, NonFinite, agree, autocast, cast, every, fail, finish, float32_island, global_rows,
                    launch, listen, local_rows, pick_dtype, rank, seed_step, unwrap, world_size, wrap_ddp)
from data.files import check_ids, check_rows, demo_set, or_fail, reading
from data.molecules.report import generate_like, read_condition, report, summary, token_ids, write_csv
from runs import (Run, checkpoints, complete, load_newest, load_tensors, model_tensors, parse_flags, read_file, restore,
                  save_checkpoint, steps_in, trained, write_file)

# B rows (molecules), T positions, N = B T positions of a batch, K tokens of the vocabulary (classes), D width, H heads


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
    batch_size: int = 512  # rows per process and micro-batch
    grad_accum: int = 1  # micro-batches per optimizer step
    max_epochs: int = 20  # passes over the training rows
    max_steps: int = 0  # optimizer steps; 0: as max_epochs says
    learning_rate: float = 6e-4  # after the warm-up
    min_lr: float = 0.1  # at the end of the cosine, as a share of learning_rate
    warmup_steps: int = 300  # of linear warm-up
    weight_decay: float = 0.1  # on matrices and embeddings, not on biases and norms
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    grad_clip: float = 1.0  # largest global gradient norm; 0: off
    on_nonfinite: str = "skip"  # skip the step, or stop the run
    max_skips: int = 10  # more in a row, or in total more than max(this, 1 % of the steps), stop the run
    skip_steps: str = ""  # steps to pass over, as 17,40-45
    eval_every: int = 500  # steps between validations; 0: only at the end
    save_every: int = 500  # steps between checkpoints; 0: only at the end
    keep: int = 3  # newest checkpoints that stay; 0: all
    sample_every: int = 0  # steps between looks at samples; 0: only at the end
    log_every: int = 100  # steps between progress lines; 0: none
    resume: bool = False  # go on from the newest checkpoint of run_name
    dry_run: bool = False  # a tiny model and few steps: does everything run?
    wandb: str = ""  # offline or online; empty: off
    # this script
    n_layer: int = 8  # decoder blocks
    n_head: int = 8  # attention heads
    n_embd: int = 256  # width
    dropout: float = 0.1  # in embedding, attention and residual branches
    use_edl: bool = True  # evidential head; --no_edl is the plain language model
    edl_loss_type: str = "digamma"  # log: Type-II likelihood; digamma: Bayes risk of cross-entropy; mse: of squares
    edl_evidence: str = "exp"  # exp or softplus of the logits
    edl_kl_weight: float = 0.0  # of the KL to the uniform Dirichlet; the original's is 1
    edl_annealing_step: float = 10.0  # epochs over which the KL's weight grows to its full size
    props: str = ""  # condition on these properties, as logp,tpsa: those that the data were prepared with
    scaffold: bool = False  # condition on the Bemis-Murcko scaffold
    train_rows: int = 0  # learn from so many training rows, drawn with the seed; 0: from all
    eval_rows: int = 4000  # validation rows looked at during training; 0: all
    gpu_ids: str = ""  # visible GPUs, as 0,1
    num_gpus: int = 0  # refuse to start with another number of processes; 0: any

    @property
    def prop_names(self):
        return list(dict.fromkeys(name.strip() for name in self.props.split(",") if name.strip()))


CPU = dict(batch_size=16, max_epochs=7, learning_rate=2e-3, min_lr=0.02, warmup_steps=200, n_layer=4, n_head=4,
           n_embd=128, dropout=0.0, eval_every=1000, save_every=1000, log_every=200, eval_rows=1000)
DRY = dict(batch_size=16, max_steps=20, warmup_steps=5, n_layer=2, n_head=2, n_embd=32, eval_every=10, save_every=10,
           log_every=5)
ALIASES = {"epochs": "max_epochs", "lr": "learning_rate", "data_name": "data_dir=data/molecules/{}",
           "no_edl": "use_edl=False", "wandb_online": "wandb=online"}
FIXED = ("data_dir", "n_layer", "n_head", "n_embd", "use_edl", "edl_loss_type", "edl_evidence", "props", "scaffold",
         "train_rows", "seed")                      # a resume keeps them


# ------------------------------------------------------------------------------------------------------------ data
SMILES_TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|[BCNOSPFI]|[bcnosp]|[().=#\-+\\/:~@?>*$]|%[0-9]{2}|[0-9]")
BOS, EOS = 0, 1
SPECIALS = ["<bos>", "<eos>"]  # ids 0 and 1 of every vocabulary


def tokenize(smiles):
    """Split a SMILES string into tokens, a list of str whose concatenation is the string again.

    Raises ValueError naming the first character that is no SMILES token: findall alone would drop it silently."""
    tokens = SMILES_TOKEN.findall(smiles)
    if "".join(tokens) != smiles:
        position = re.match(f"(?:{SMILES_TOKEN.pattern})*", smiles).end()
        raise ValueError(f"character {position + 1} ({smiles[position]!r}) of {smiles[:60]!r} is no SMILES token")
    return tokens


@dataclass(eq=False)
class Data:
    """All rows as one table of token ids; a row is its scaffold's tokens (only with --scaffold), BOS, its own, EOS."""
    table: torch.Tensor  # (all tokens,) uint8 or int16, on the device
    start: np.ndarray  # (rows,) int64, where a row begins in the table
    prefix: np.ndarray  # (rows,) int64, tokens before its BOS
    length: np.ndarray  # (rows,) int64, targets of a row: its tokens and EOS
    props: torch.Tensor | None  # (rows, P) float32, what --props names, in its own units, on the device
    stats: torch.Tensor | None  # (2, P) float32, mean and standard deviation of all training rows
    rows: dict  # split -> (rows of the split,) int64
    block: int  # positions that a model of them needs: scaffold and molecule count their own
    vocab: list  # K tokens
    canonical: bool  # are the SMILES RDKit's canonical ones?


def load_data(config, device="cpu"):
    """data_dir -> Data on the device; without data_dir the demo set, which rank 0 builds if it is not there yet."""
    names, more = config.prop_names, ["--props", "logp,sas,tpsa,qed", "--scaffold"]
    more = (more if names or config.scaffold else []) + (["--limit", "500"] if config.dry_run else [])
    name = ("demo500" if config.dry_run else "demo") + "_conditions" * ("--props" in more)
    folder = Path(config.data_dir) if config.data_dir else demo_set("molecules", name, device, *more)
    with reading(folder, "molecules/prepare.py --input FILE"):
        meta = {"canonical": False} | json.loads((folder / "meta.json").read_text())       # unless it says so
        missing = [name for name in names if name not in meta.get("props", {})]
        missing += ["scaffold"] if config.scaffold and not (folder / "scaffold_tokens.npy").exists() else []
        if missing:
            fail(f"--data_dir {folder} holds no {', '.join(missing)}: make it again with python data/molecules/"
                 "prepare.py --input FILE --name N --props logp,sas,tpsa,qed --scaffold --force")
        kinds = ["tokens", "offsets"] + ["scaffold_tokens", "scaffold_offsets"] * config.scaffold
        array = {kind: np.load(folder / f"{kind}.npy", mmap_mode="r") for kind in [*kinds, "split"]}
        props, stats, n = np.load(folder / "props.npy").astype(np.float32) if names else None, None, len(array["split"])
        for kind in kinds[::2]:
            check_rows(array[kind.replace("tokens", "offsets")], array[kind], n=n, most=len(meta["vocab"]))
        check_ids("split", array["split"], len(meta["splits"]), 0, (n,))
        rows = {name: np.flatnonzero(array["split"] == i) for i, name in enumerate(meta["splits"])}
        if names:
            props = torch.from_numpy(props.reshape(n, -1)[:, [[*meta["props"]].index(x) for x in names]]).to(device)
            stats = torch.tensor([[meta["props"][name][x] for name in names] for x in ("mean", "std")])
    if not len(rows.get("train", [])) or not len(rows.get("val", [])):
        fail(f"--data_dir {folder}: no rows in the train or the val split")
    if config.train_rows:                           # fewer rows are some of those that more rows would be
        rows["train"] = np.sort(np.random.default_rng(config.seed).permutation(rows["train"])[:config.train_rows])
    tokens, own, one = array["tokens"], np.diff(array["offsets"]), np.ones(len(array["split"]), np.int64)
    prefix = np.diff(array["scaffold_offsets"]) if config.scaffold else 0 * one
    kind = np.repeat(np.tile(np.arange(4, dtype=np.uint8), len(one)), np.stack([prefix, one, own, one], 1).ravel())
    table = np.empty(len(kind), np.uint8 if tokens.dtype == np.uint8 else np.int16)
    for i, ids in enumerate((array.get("scaffold_tokens", []), BOS, tokens, EOS)):
        table[kind == i] = ids
    return Data(torch.from_numpy(table).to(device), np.cumsum(prefix + own + 2) - (prefix + own + 2), prefix, own + 1,
                props, stats, rows, int(max(own.max() + 1, prefix.max())), meta["vocab"], meta["canonical"])


WINDOW = 4                                          # global batches that are sorted by length together


@functools.lru_cache(maxsize=2)
def bucketed_rows(data, split, global_batch, seed, window):
    """The rows of the window-th run of WINDOW global batches, (WINDOW, global_batch), each batch of similar lengths.

    Sorting spares the pads, a fifth of all positions, on all ranks alike; the batches then come in random order."""
    rows = data.rows[split]
    size = max(1, min(WINDOW, len(rows) // global_batch))
    taken = rows[global_rows(len(rows), size * global_batch, seed, window)]
    batches = taken[np.argsort(data.prefix[taken] + data.length[taken], kind="stable")].reshape(size, global_batch)
    return np.random.default_rng([seed, window]).permutation(batches)


def get_rows(data, rows):
    """-> dict of tensors on the table's device, where T is the longest row's length: tokens, targets (B, T) int64; mask
    (B, T) bool, which targets are the molecule's or its EOS; begin (B,) int64, where BOS stands; with --props props."""
    device = data.table.device
    start, begin, length = (cast(x[rows], device)[:, None] for x in (data.start, data.prefix, data.length))
    t = torch.arange(int((data.prefix[rows] + data.length[rows]).max()), device=device)
    inside = t < begin + length
    index = torch.where(inside, start + t, start)
    batch = {"tokens": data.table[index].long(), "targets": data.table[index + 1].long(),
             "mask": inside & (t >= begin), "begin": begin[:, 0]}
    return batch if data.props is None else batch | {"props": data.props[cast(rows, device)]}


def get_batch(data, split, step, config, micro=0):
    """This rank's micro-batch of a step: get_rows, with count (targets of the whole step, all ranks) and epoch."""
    global_batch = config.batch_size * config.grad_accum * world_size()
    size = max(1, min(WINDOW, len(data.rows[split]) // global_batch))
    rows = bucketed_rows(data, split, global_batch, config.seed, step // size)[step % size]
    return get_rows(data, local_rows(rows, micro, config.grad_accum)) | {
        "count": int(data.length[rows].sum()), "epoch": step * global_batch / len(data.rows[split])}


# ----------------------------------------------------------------------------------------------------------- model
class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.out = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, past=None):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)   # (B, H, T, D / H)
        if past is not None:                        # k and v of the positions before, where these are put too
            cache, seen = past
            cache[:, :, :, seen:seen + T] = torch.stack([k, v])
            k, v = cache[:, :, :, :seen + T]
        if past is None and T <= 128 and (q.device.type, q.dtype) == ("cpu", torch.float32):
            scores = (q * (D // self.n_head) ** -0.5) @ k.mT    # rows this short are slower in SDPA's kernel for a CPU
            scores += torch.full((T, T), -math.inf).triu(1)
            x = F.dropout(scores.softmax(-1), self.dropout, self.training) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=self.dropout * self.training)
        return self.out(x.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attention = Attention(config)
        self.up, self.down = nn.Linear(config.n_embd, 4 * config.n_embd), nn.Linear(4 * config.n_embd, config.n_embd)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, past=None):
        x = x + self.drop(self.attention(self.norm1(x), past))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class MolGPT(nn.Module):
    """Pre-LN decoder with learned positions and an untied head; 6.35 M parameters at 8 layers of width 256 on MOSES.

    [scaffold tokens | BOS | molecule], causal over all. Properties, standardised by stats (2, P), are added at BOS."""
    def __init__(self, config, vocab, block, stats=None):
        super().__init__()
        self.about = {"config": dataclasses.asdict(config), "vocab": vocab, "block": block}     # what load_model needs
        self.vocab, self.block, self.evidence = vocab, block, config.edl_evidence if config.use_edl else "none"
        self.prop_names, self.scaffold = config.prop_names, config.scaffold
        self.token, self.position = nn.Embedding(len(vocab), config.n_embd), nn.Embedding(block, config.n_embd)
        if self.scaffold:
            self.part = nn.Embedding(2, config.n_embd)      # of a scaffold, of a molecule
        if self.prop_names:
            self.prop = nn.Linear(len(self.prop_names), config.n_embd)
            self.register_buffer("stats", torch.ones(2, len(self.prop_names)) if stats is None else stats)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm, self.head = nn.LayerNorm(config.n_embd), nn.Linear(config.n_embd, len(vocab), bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens, past=None, begin=None, props=None):
        """tokens (B, T) int64 -> logits (B, T, K). past: to decode step by step, a cache() and how much of it was seen.

        begin (B,) or (1,) int64: where BOS stands, for a model with scaffolds; props (B, P): for one with properties"""
        seen = past[1] if past else 0
        x = self.token(tokens)
        if self.scaffold:                           # scaffold and molecule count their own positions
            t = torch.arange(seen, seen + tokens.shape[1], device=tokens.device) - begin[:, None]
            place = torch.where(t < 0, t + begin[:, None], t).clamp(max=self.block - 1)     # pads may lie beyond
            x = x + self.position(place) + self.part((t >= 0).long())
        else:
            x = x + self.position.weight[seen:seen + tokens.shape[1]]
        if self.prop_names:
            standardised = (props - self.stats[0]) / self.stats[1]
            x = x + (tokens == BOS)[:, :, None] * self.prop(standardised)[:, None]
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            x = block(x, (past[0][i], seen) if past else None)
        return self.head(self.norm(x))

    def cache(self, rows, positions):
        """Room for keys and values of so many rows and positions: (n_layer, 2, rows, H, positions, D / H)"""
        D, H = self.token.weight.shape[1], self.blocks[0].attention.n_head
        return self.token.weight.new_empty(len(self.blocks), 2, rows, H, positions, D // H)


def load_model(path, device="cpu"):
    """best.safetensors, or an event's model.safetensors -> MolGPT in eval mode. Raises ValueError if it is damaged."""
    tensors, body = read_file(path)
    about = body["about"]
    if "edl_evidence" not in about["config"]:
        raise ValueError(f"{path} is of another script")
    model = MolGPT(Config(**about["config"]), about["vocab"], about["block"])
    load_tensors(model, tensors, path)
    return model.to(device).eval()


# ------------------------------------------------------------------------------------------------------------ loss
def log_evidence(logits, evidence):
    """Logits (..., K) -> log e, float32, the logits of the token distribution e / sum e. 'none' is a plain softmax."""
    logits = logits.float()
    if evidence == "softplus":
        return F.softplus(logits).clamp(min=1e-30).log()
    return logits.clamp(-15, 15) if evidence == "exp" else logits


def lgamma_part(x):
    """lgamma(x) - (x - 1) digamma(x) + x for x >= 1: grows like log(x) / 2, so that sums of it cancel nothing."""
    near, far = x.clamp(max=12), x.clamp(min=12)
    r = 1 / far                                     # Stirling's series of both functions, exact to 4e-8 from 12 on
    series = 0.5 * far.log() + 0.5 * math.log(2 * math.pi) + 0.5 - r / 3 - r ** 2 / 12 - r ** 3 / 90 + r ** 4 / 120
    return torch.where(x < 12, near.lgamma() - (near - 1) * near.digamma() + near, series)


def dirichlet_kl(alpha):
    """KL(Dirichlet(alpha) || Dirichlet(1, ..., 1)): alpha (N, K) float32, >= 1 -> (N,) >= 0 in nats.

    lnG(S) - lnG(K) - sum lnG(alpha) + sum (alpha - 1)(psi(alpha) - psi(S)), regrouped by lgamma_part. As it stands here
    the terms of order alpha log(alpha) cancel, and at alpha = 3e6 half of a float32's value would be rounding."""
    K, S = alpha.shape[-1], alpha.sum(-1)
    return (lgamma_part(S) + (K - 1) * S.digamma() - math.lgamma(K) - lgamma_part(alpha).sum(-1)).clamp(min=0)


def edl_loss(logits, targets, kind, evidence, kl_weight, mask=None, count=None):
    """Evidential loss of logits (N, K) for targets (N,) int64 -> (loss, parts), all 0-dim float32.

    kind: 'log' Type-II maximum likelihood (Sensoy et al. eq. 3), 'digamma' Bayes risk of the cross-entropy (eq. 4),
    'mse' Bayes risk of the squared error (eq. 5). kl_weight: of the KL to the uniform Dirichlet after the target's
    evidence is taken out (None: no KL). mask (N,) bool: which rows count; their sum is divided by count, by default
    their number. parts: nll (nats, of e / sum e) and vacuity K / S, with a KL also risk and kl; likewise divided."""
    with float32_island(logits):
        log_e = log_evidence(logits, evidence)
        alpha = 1 + (F.softplus(logits.float()) if evidence == "softplus" else log_e.exp())
        S, alpha_c = alpha.sum(-1), alpha.gather(-1, targets[:, None])[:, 0]
        if kind == "log":
            risk = S.log() - alpha_c.log()
        elif kind == "digamma":
            risk = S.digamma() - alpha_c.digamma()
        else:
            assert kind == "mse", kind
            p_square = ((alpha / S[:, None]) ** 2).sum(-1)
            risk = p_square - 2 * alpha_c / S + 1 + (1 - p_square) / (S + 1)
        mask = torch.ones_like(risk) if mask is None else mask.float()
        mean = (lambda x: (x * mask).sum() / (mask.sum() if count is None else count))
        loss, parts = mean(risk), {}
        if kl_weight is not None:
            without_target = alpha.scatter(-1, targets[:, None], 1.0)
            kl = mean(dirichlet_kl(without_target))
            loss, parts = loss + kl_weight * kl, {"risk": loss, "kl": kl}
        with torch.no_grad():
            nll = F.cross_entropy(log_e, targets, reduction="none")
            parts |= {"nll": mean(nll), "vacuity": mean(alpha.shape[-1] / S)}
        return loss, parts


def digamma_part(x):
    """digamma(x + 1) - log(x) for x >= 1: falls from .42 to 0 like 1 / 2x, to full relative precision."""
    near, r = x.clamp(max=12), 1 / x.clamp(min=12)
    return torch.where(x < 12, (near + 1).digamma() - near.log(), r / 2 - r ** 2 / 12 + r ** 4 / 120)


def uncertainty(alpha):
    """Dirichlet alpha (..., K) float32 -> dict of (...,) float32: vacuity K / S in (0, 1]; total, the entropy of
    p = alpha / S; aleatoric, the expected entropy; epistemic = total - aleatoric >= 0, the mutual information (nats).

    epistemic is summed by itself, since the two entropies cancel where evidence is large: sum p (g(alpha) - g(S)) with
    g = digamma_part. What some call total uncertainty is the vacuity here."""
    S = alpha.sum(-1, keepdim=True)
    p = alpha / S
    total = -(p * p.log()).sum(-1)
    aleatoric = (p * ((S + 1).digamma() - (alpha + 1).digamma())).sum(-1)
    return {"vacuity": alpha.shape[-1] / S[..., 0], "total": total, "aleatoric": aleatoric,
            "epistemic": (p * (digamma_part(alpha) - digamma_part(S))).sum(-1).clamp(min=0)}


def compute_loss(model, batch, step, config):
    """-> (loss, parts): sums over this micro-batch's targets divided by the whole step's count; 0-dim float32."""
    logits = model(batch["tokens"], None, batch["begin"], batch.get("props")).flatten(0, 1)      # (N, K)
    targets, mask = batch["targets"].flatten(), batch["mask"].flatten()
    if config.use_edl:
        grown = min(1.0, batch["epoch"] / config.edl_annealing_step) if config.edl_annealing_step else 1.0
        kl_weight = config.edl_kl_weight * grown if config.edl_kl_weight else None
        return edl_loss(logits, targets, config.edl_loss_type, config.edl_evidence, kl_weight, mask, batch["count"])
    with float32_island(logits):
        loss = (F.cross_entropy(logits.float(), targets, reduction="none") * mask).sum() / batch["count"]
        return loss, {"nll": loss}


# ---------------------------------------------------------------------------------------------- evaluation, samples
UNCERTAINTY = ("vacuity", "total", "aleatoric", "epistemic")


def token_scores(log_e, targets, evidential):
    """log_e (..., K), targets (...,) int64 -> dict of (...,) float32 >= 0: nll, UNCERTAINTY (of a softmax, total)."""
    log_p = log_e.log_softmax(-1)
    scores = {"nll": -log_p.gather(-1, targets[..., None])[..., 0]}
    return scores | (uncertainty(1 + log_e.exp()) if evidential else {"total": -(log_p.exp() * log_p).sum(-1)})


def passes(model, data, rows, dtype=torch.float32):
    """Yield (rows, batch, logits (B, T, K) float32) of these rows, 256 of similar length at a time."""
    rows = rows[np.argsort(data.prefix[rows] + data.length[rows], kind="stable")]
    for i in range(0, len(rows), 256):
        batch = get_rows(data, rows[i:i + 256])
        with autocast(data.table.device, dtype):
            logits = model(batch["tokens"], None, batch["begin"], batch.get("props")).float()
        yield rows[i:i + 256], batch, logits


@torch.no_grad()
def evaluate(model, data, config, split="val", max_rows=0):
    """Means over the targets of a split (of max_rows of its rows, always the same; 0: all) -> dict, equal on all ranks.

    nll: nats per token of e / sum e, which chooses checkpoints; loss: without KL; and the others of token_scores."""
    model, device, rows = unwrap(model), data.table.device, data.rows[split]
    rows = np.random.default_rng(0).permutation(rows)[:max_rows] if max_rows else rows
    names = ("loss", "nll", *(UNCERTAINTY if config.use_edl else ("total",)))
    was_training, sums = model.training, [torch.zeros(len(names), device=device)]
    model.eval()
    for _, batch, logits in passes(model, data, rows[rank()::world_size()], pick_dtype(config.dtype, device)[0]):
        logits, targets = logits[batch["mask"]], batch["targets"][batch["mask"]]            # (N, K), (N,)
        scores = token_scores(log_evidence(logits, model.evidence), targets, config.use_edl)
        loss = edl_loss(logits, targets, config.edl_loss_type, config.edl_evidence, None, count=1)[0] \
            if config.use_edl else scores["nll"].sum()
        sums.append(torch.stack([loss, *(scores[name].sum() for name in names[1:])]))
    model.train(was_training)
    total = torch.stack(sums).cpu().double().sum(0)
    if world_size() > 1:
        total = total.to(device)
        dist.all_reduce(total)
    return dict(zip(names, (total / float(data.length[rows].sum())).tolist()))


@torch.no_grad()
def generate(model, n, temperature=1.0, top_k=0, prompt=(), seed=0, batch_size=512, props=None, scaffold=()):
    """Draw n molecules with a KV cache -> list of dicts of smiles, tokens, finished, and of each of token_scores the
    mean over the tokens drawn (EOS too) and, as max_, the highest.

    prompt: token ids that all start with. nll is the model's own, whatever the temperature. The same n, seed and
    batch_size give the same molecules. props: (P,) or (n, P) floats in their own units, for a model with properties;
    scaffold: token ids, (L,) or (n, L), for one with scaffolds."""
    device, made, evidential = model.head.weight.device, [], model.evidence != "none"
    names, text = ("nll", *UNCERTAINTY) if evidential else ("nll", "total"), "".join(model.vocab[i] for i in prompt)
    generator = torch.Generator(device).manual_seed(seed)
    scaffold = torch.as_tensor(scaffold, dtype=torch.long, device=device).expand(n, -1)
    start = torch.cat([scaffold, torch.tensor([BOS, *prompt], device=device).expand(n, -1)], 1)
    begin = torch.tensor([scaffold.shape[1]], device=device)
    props = None if props is None else torch.as_tensor(props, dtype=torch.float32, device=device).expand(n, -1)
    for rows in torch.arange(n, device=device).split(batch_size):
        x, alive, seen = start[rows], torch.arange(len(rows), device=device), 0
        cache = model.cache(len(rows), start.shape[1] + model.block)
        drawn = torch.full((len(rows), model.block - len(prompt)), EOS, device=device)
        said = torch.zeros(*drawn.shape, len(model.vocab), device=device)       # log e of each token, to be scored
        for t in range(drawn.shape[1]):
            given = begin, None if props is None else props[rows[alive]]
            logits = model(x, (cache[:, :, :len(alive)], seen), *given)[:, -1]      # (alive, K)
            said[alive, t] = log_e = log_evidence(logits, model.evidence)
            weight = (log_e / temperature).index_fill(1, torch.tensor([BOS], device=device), -math.inf)
            if top_k:
                weight = weight.masked_fill(weight < weight.topk(min(top_k, weight.shape[1]))[0][:, -1:], -math.inf)
            token = torch.multinomial(weight.softmax(-1), 1, generator=generator)
            drawn[alive, t], going, seen = token[:, 0], token[:, 0] != EOS, seen + x.shape[1]
            if not (left := int(going.sum())):
                break
            # the last rows that go on move to where rows have ended: so they stay packed, and few are copied
            ended, last = (~going[:left]).nonzero()[:, 0], left + going[left:].nonzero()[:, 0]
            for table in (alive, token, cache[:, :, :, :, :seen].transpose(0, 2)):
                table[ended] = table[last]
            alive, x = alive[:left], token[:left]
        count = (1 + (drawn != EOS).sum(1)).clamp(max=drawn.shape[1])
        scores = torch.stack([*token_scores(said, drawn, evidential).values()], 2)      # (rows, T, scores), all >= 0
        scores *= (torch.arange(drawn.shape[1], device=device) < count[:, None])[..., None]
        values = torch.cat([scores.sum(1) / count[:, None], scores.amax(1)], 1).tolist()
        for ids, length, value in zip(drawn.tolist(), count.tolist(), values):
            finished = ids[length - 1] == EOS
            made.append({"smiles": text + "".join(model.vocab[i] for i in ids[:length - finished]), "tokens": length,
                         "finished": finished} | dict(zip([*names, *(f"max_{name}" for name in names)], value)))
    return made


# --------------------------------------------------------------------------------------------------- training loop
def lr_at(step, max_steps, config):
    """Linear warm-up, then a cosine down to the share min_lr: a function of the step, so there is nothing to save."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
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
    torch.manual_seed(config.seed)
    if not config.run_name:
        now = time.localtime(agree(int(time.time()), device))
        config = dataclasses.replace(config, run_name=time.strftime("edl_molgpt_%Y%m%d_%H%M%S", now))
    data = load_data(config, device)
    raw_model = MolGPT(config, data.vocab, data.block, data.stats).to(device)
    matrices, vectors = ([p for p in raw_model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors}],
                                  weight_decay=0.0, betas=(config.beta1, config.beta2), fused=True)
    global_batch = config.batch_size * config.grad_accum * world_size()
    steps_per_epoch = len(data.rows["train"]) / global_batch
    max_steps = config.max_steps or math.ceil(config.max_epochs * steps_per_epoch)
    skip_steps, (dtype, reason) = steps_in(config.skip_steps), pick_dtype(config.dtype, device)

    start, best, saved, folder = 0, math.inf, None, Path(config.out_dir) / config.run_name
    if config.resume:
        saved = load_newest(folder, device)
        if saved:
            if [saved[1]["about"][key] for key in ("vocab", "block")] != [data.vocab, data.block]:
                fail(f"--data_dir {config.data_dir or '(demo)'}: its vocabulary or longest row is not the checkpoint's")
            restore(raw_model, optimizer, *saved)
            start, best = saved[1]["step"], saved[1]["best"]
    elif agree(len(checkpoints(folder)), device):
        fail(f"{folder} already holds checkpoints: --resume goes on from them, another --run_name starts anew")
    if start > max_steps:
        fail(f"the newest checkpoint is of step {start}, beyond --max_steps {max_steps}: nothing to do")

    run = Run(config, start, {"max_steps": max_steps, "steps_per_epoch": steps_per_epoch, "global_batch": global_batch})
    model = wrap_ddp(torch.compile(raw_model) if config.compile else raw_model, device).train()

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
    run.log(f"{config.run_name}: {size:,} parameters, {str(dtype)[6:]} ({reason}), {rows:,} molecules, batch "
            f"{config.batch_size} x {world_size()} {device.type} x {config.grad_accum} = {global_batch}, {max_steps:,} "
            f"steps" + f", resumed at {start:,}" * (start > 0))
    try:
        for step in range(start, max_steps + 1):    # one extra turn, so that the last state is evaluated and saved
            last, stop = step == max_steps, guard.stop_requested

            # once in a while: the guard's only host read, validation on all ranks, a look at some samples, a checkpoint
            intervals = config.log_every, config.eval_every, config.save_every, config.sample_every
            if last or stop or every(step, RING, *intervals):
                stats = guard.poll()
                stop = guard.stop_requested         # read once: a signal may come at any line
                if stats["steps"]:
                    epoch, lr = int((step - 1) / steps_per_epoch), lr_at(step - 1, max_steps, config)
                    run.progress(step, max_steps, stats, lr, global_batch, "molecules")
                    run.log(f"epoch {epoch + 1} iter {step - math.ceil(epoch * steps_per_epoch)}: train loss "
                            f"{stats['loss']:.4f}. lr {lr:.3e}", shown=False)
                if last or every(step, config.eval_every):
                    scores = evaluate(model, data, config, "val", config.eval_rows)
                    run.log(f"test loss: {scores['loss']:.4f}", shown=False)
                    run.log(f"step {step:,} validation: " + "  ".join(f"{name} {x:.4f}" for name, x in scores.items()))
                    run.measure(step, "val", **scores)
                    run.curves()
                    if scores["nll"] < best:        # never true of a NaN
                        best = scores["nll"]
                        run.log(f"Saving at epoch {math.ceil(step / steps_per_epoch)}", shown=False)
                        if run.main:
                            tensors = model_tensors(raw_model)
                            write_file(folder / "best.safetensors", tensors, {"about": raw_model.about, "step": step})
                if every(step, config.sample_every) and run.main:
                    made = generate_like(sys.modules[__name__], raw_model.eval(), data, 64, config.seed)
                    write_csv(folder / f"samples/step-{step:08d}.csv", made)
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
        run.log(f"stopped by a signal; go on with: python train_edl.py --resume --run_name {config.run_name}")
        return {"step": step, "best": best}
    listen(False)                                   # all is saved: from here on Ctrl-C may end the program
    agree(0, device)                                # best.safetensors is there
    best_model = load_model(folder / "best.safetensors", device)
    table = report(sys.modules[__name__], {config.run_name: (best_model, data, config)}, folder,
                   32 if config.dry_run else 1000, log=run.log)
    files = ("samples/final.png", "curves.png", "best.safetensors", "eval.json")
    run.log(f"done: {folder} holds {', '.join(x for x in files if (folder / x).exists())}. More molecules:\n"
            f"python train_edl.py sample --run_name {config.run_name} --num_samples 1000")
    return {"step": step, "best": best, "table": table}


# ------------------------------------------------------------------------------------------------------------ main
@dataclass
class SampleFlags:
    run_name: str = ""  # whose best.safetensors
    out_dir: str = "out"  # where runs are
    num_samples: int = 100  # molecules to draw
    temperature: float = 1.0  # below 1: nearer to the most likely
    top_k: int = 0  # draw from the k most likely tokens; 0: from all
    prompt: str = ""  # SMILES that every molecule starts with; C is how the original starts
    prop_values: str = ""  # as logp=2,tpsa=60: a value for each property that the model was trained with
    scaffold_smiles: str = ""  # for a model trained with scaffolds; the word none: an acyclic molecule
    out: str = "samples.csv"  # where to write
    seed: int = 0  # of the drawing
    batch_size: int = 512  # molecules drawn at once
    device: str = "auto"  # auto, cuda, mps, cpu


@dataclass
class EvalFlags:
    run_name: str = ""  # whose best.safetensors
    out_dir: str = "out"  # where runs are
    data_dir: str = ""  # prepared data; empty: the run's own
    beside: str = ""  # other runs to show beside it, as a --no_edl one: names, separated by commas
    far_dir: str = ""  # prepared molecules of another kind, which the model should find strange
    num_samples: int = 1000  # molecules to draw
    temperature: float = 1.0  # below 1: nearer to the most likely
    top_k: int = 0  # draw from the k most likely tokens; 0: from all
    seed: int = 0  # of the drawing
    device: str = "auto"  # auto, cuda, mps, cpu


def open_run(flags, name, device):
    """-> the best model of the run of that name."""
    low, zero = min(flags.num_samples, getattr(flags, "batch_size", 1)), min(flags.top_k, flags.seed)
    if low < 1 or flags.temperature < 1e-3 or zero < 0 or flags.seed >= 2 ** 63:
        fail("--num_samples, --batch_size must be above 0, --temperature at least .001, --top_k and --seed not below 0")
    return or_fail(load_model, trained(flags.out_dir, name) / "best.safetensors", device)


def main_sample(argv):
    flags, _ = parse_flags(SampleFlags, argv, "Draw molecules from a trained model.")
    model = open_run(flags, flags.run_name, launch(flags.device))
    wanted = read_condition(model.prop_names, model.scaffold, flags.prop_values, flags.scaffold_smiles)
    script = sys.modules[__name__]
    prompt = token_ids(script, model, "prompt", flags.prompt)
    scaffold = token_ids(script, model, "scaffold_smiles", wanted["scaffold"] or "")
    if Path(flags.out).is_dir():
        fail(f"--out {flags.out} is a folder: name a file")
    made = generate(model, flags.num_samples, flags.temperature, flags.top_k, prompt, flags.seed, flags.batch_size,
                    [*wanted["values"].values()] or None, scaffold)
    write_csv(flags.out, made)
    print(f"{flags.out}: {summary(made, wanted)} at temperature {flags.temperature}")


def main_eval(argv):
    flags, _ = parse_flags(EvalFlags, argv, "The table of metrics of a trained model.")
    device, models = launch(flags.device), {}
    for name in dict.fromkeys([flags.run_name, *filter(None, flags.beside.split(","))]):
        model = open_run(flags, name, device)
        config = Config(**model.about["config"] | ({"data_dir": flags.data_dir} if flags.data_dir else {}))
        data = load_data(config, device)
        if data.vocab != model.vocab or data.block > model.block:
            fail(f"--data_dir {config.data_dir or '(demo)'}: its vocabulary or longest row is not that of {name}")
        models[name] = model, data, config
    report(sys.modules[__name__], models, Path(flags.out_dir) / flags.run_name, flags.num_samples, flags.temperature,
           flags.top_k, flags.seed, flags.far_dir, "eval")


def settle(config, given):
    """Fill in what the flags left open and refuse what cannot work for this model -> Config"""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if config.gpu_ids:
        os.environ["CUDA_VISIBLE_DEVICES"] = config.gpu_ids
    if config.num_gpus not in (0, world):
        fail(f"--num_gpus {config.num_gpus}, but {world} process(es): start it with "
             f"torchrun --nproc_per_node={config.num_gpus} train_edl.py")
    config = complete(config, given, CPU, DRY, FIXED)
    for name in ("dropout", "train_rows", "eval_rows", "edl_kl_weight", "edl_annealing_step"):
        if not 0 <= getattr(config, name) < (1 if name == "dropout" else math.inf):
            fail(f"--{name} {getattr(config, name)}: must not be below 0, --dropout below 1")
    if config.n_embd % config.n_head:
        fail(f"--n_embd {config.n_embd} is not a multiple of --n_head {config.n_head}")
    for name, choices in {"edl_loss_type": ("log", "digamma", "mse"), "edl_evidence": ("exp", "softplus")}.items():
        if getattr(config, name) not in choices:
            fail(f"--{name} {getattr(config, name)}: one of {', '.join(choices)}")
    return config


def main(argv):
    if argv[:1] in (["sample"], ["eval"]):
        return (main_sample if argv[0] == "sample" else main_eval)(argv[1:])
    config, given = parse_flags(Config, argv, __doc__, ALIASES)
    try:
        train(settle(config, given))
    except NonFinite as error:
        print(error, file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    main(sys.argv[1:])
