"""
Anomalous sessions from log keys: LogBERT, a small masked encoder that has only ever seen normal sessions.

python train_logbert.py                               # no flags: builds a demo set, trains, evaluates; minutes on a CPU
python train_logbert.py --dry_run                     # everything once, in seconds
python data/logs/prepare.py --input HDFS.log --format hdfs --name hdfs && python train_logbert.py --data_name hdfs
torchrun --nproc_per_node=8 train_logbert.py --data_name hdfs --run_name big                        # eight GPUs
torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 train_logbert.py --data_name hdfs
python train_logbert.py --resume --run_name big       # goes on, bit for bit, from the newest checkpoint
python train_logbert.py eval --run_name big           # the table of detectors beside the floors
python train_logbert.py score --run_name big --input new.log --out scores.csv   # raw lines in, verdicts and reasons out

DIST, keys, NEXT (B, T) -> embedding + position (B, T, D) -> n_layer x [attention, GELU MLP] -> logits (B, T, K), h_DIST
Asked for: masked keys, and what follows a prefix, a key or the end. Two views: ordered, and bag, where all keys share
one position, so that only their numbers are seen. Score of a session: the largest -log p, each key masked alone.

What used to break here                                       and what stops it
  a home-made LayerNorm whose gradient reaches 1e6              nn.LayerNorm, before each sublayer
  -1e9 as mask overflows float16, a row may be all masked       a boolean mask, and DIST is always visible
  one NaN weight, then every batch skipped in silence           guard.step; more than max_skips stop the run
  a centre that is recomputed, on which all h_DIST collapse     set_centre, once; spread is logged
  threshold, g and mask ratio chosen on the test labels         thresholds of held-out normal sessions, before the test
  a random mask at test time                                    surprise: every key in turn, of each distinct session

Guo, Yuan, Wu 2021 (LogBERT, arXiv 2103.04475; equations 3, 4). Landauer et al. 2023 on what such benchmarks measure.
"""
import csv
import dataclasses
import functools
import itertools
import json
import math
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

from common import (RING, Guard, NonFinite, agree, autocast, cast, every, fail, finish, float32_island, global_rows,
                    launch, listen, local_rows, pick_dtype, rank, seed_step, unwrap, world_size, wrap_ddp)
from data.files import check_ids, check_rows, demo_set, or_fail, reading, whole_file
from data.logs import metrics
from runs import (Run, checkpoints, complete, load_newest, load_tensors, model_tensors, parse_flags, read_file, restore,
                  save_checkpoint, steps_in, trained, write_file)

# B rows (sessions), T positions: DIST, the keys, perhaps NEXT; K classes: EOS and the log keys of train; D width


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
    batch_size: int = 64  # rows per process and micro-batch
    grad_accum: int = 1  # micro-batches per optimizer step
    max_epochs: int = 50  # passes over the training rows
    max_steps: int = 0  # optimizer steps; 0: as max_epochs says
    learning_rate: float = 2e-3  # after the warm-up
    min_lr: float = 0.02  # at the end of the cosine, as a share of learning_rate
    warmup_steps: int = 50  # of linear warm-up
    weight_decay: float = 0.01  # on matrices and embeddings, not on biases and norms
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.999  # of AdamW
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
    n_layer: int = 2  # encoder blocks
    n_head: int = 4  # attention heads
    n_embd: int = 64  # width
    dropout: float = 0.0  # in embedding, attention and residual branches; counting wants none
    view: str = "both"  # what is taught: ordered sessions, bag (one position for all keys), or both by turns
    mask_min: float = 0.0  # least share of masked keys in a row, drawn between this and mask_max; one at least
    mask_max: float = 0.5  # largest share; LogBERT's is .65 for HDFS, .5 else
    next_share: float = 0.3  # rows that are a prefix and ask what follows, a key or the end; 0: plain LogBERT
    count_power: float = 0.0  # a sequence that occurs c times is shown in proportion to c ** this; 1: as it occurs
    use_gaps: bool = False  # also read the seconds between lines
    mask_weight: float = 1.0  # of the masked log-key loss
    vhm_weight: float = 0.0  # of the hypersphere loss; LogBERT's is .1
    vhm_ramp_steps: int = 0  # steps over which vhm_weight grows to its full size once it is on
    init_gain: float = 0.0  # xavier_normal with this gain, as the fix record's .1; 0: normal, sd .02, embeddings .1
    warmup_init: float = 0.0  # learning rate from which the warm-up rises
    top_g: int = 6  # a key that is not among the g likeliest is a miss
    quantile: float = 0.998  # of held-out normal sessions' scores, the threshold but for the margin
    margin: float = 0.5  # nats on top of it, for the few held-out sessions that set it
    detector: str = ""  # whose verdict counts: bag, ordered, both or others of the table; empty: as view


CPU = {}                                            # the sizes above suit a CPU as well
DRY = dict(batch_size=16, max_steps=20, warmup_steps=5, n_layer=1, n_head=2, n_embd=32, eval_every=10, save_every=10)
ALIASES = {"epochs": "max_epochs", "lr": "learning_rate", "data_name": "data_dir=data/logs/{}"}
FIXED = ("data_dir", "n_layer", "n_head", "n_embd", "view", "use_gaps", "next_share")      # a resume keeps them


# ------------------------------------------------------------------------------------------------------------ data
PAD, MASK, DIST, NEXT, UNK, EOS, FIRST_KEY = range(7)       # then the keys of train, by frequency; class = id - EOS
PASSES = 128                                        # rows per scored session: longer ones mask several keys together
VIEWS = {"bag": ("bag",), "ordered": ("ordered",), "both": ("bag", "ordered")}


class Session(NamedTuple):
    ids: np.ndarray  # (len,) int64, of the vocabulary
    gaps: np.ndarray  # (len,) float32, log(1 + seconds since the line before)


@dataclass(eq=False)
class Data:
    meta: dict  # of the data set: templates, n_train_keys, kinds, test_normals, parser, ..., and ids, of the sessions
    keys: np.ndarray  # (sum of lengths,) uint16, indices into the templates
    table: np.ndarray  # (sum of lengths,) int64, the same as ids of the vocabulary
    gaps: np.ndarray  # (sum of lengths,) float32, as in Session; 0 if the set has no times
    start: np.ndarray  # (sessions,) int64, where a session begins
    length: np.ndarray  # (sessions,) int64, its keys
    labels: np.ndarray  # (sessions,) int8: 0 normal, -1 unknown, k an anomaly of kind k - 1
    unique: np.ndarray  # (sessions,) int32, which distinct sequence of keys it is
    rows: dict  # split -> (sessions of the split,) int64
    device: torch.device  # where batches go

    @functools.cached_property
    def about(self):
        """What a model must know of the data: templates (of which the first n_keys, in the order of their ids, occur in
        train), block, the positions it needs, unseen, -log p of a key that N training keys lack, p = 1 / (N + 1)."""
        length = self.length[self.rows["train"]]
        return {"templates": self.meta["templates"], "n_keys": self.meta["n_train_keys"], "parser": self.meta["parser"],
                "block": int(length.max()) + 2, "unseen": math.log(int(length.sum()) + 1)}

    def session(self, row):
        place = slice(self.start[row], self.start[row] + self.length[row])
        return Session(self.table[place], self.gaps[place])


def to_ids(keys, n_keys):
    """Indices into the templates (-1: fits none of them) -> ids of the vocabulary; what train never had is UNK."""
    keys = np.asarray(keys, np.int64)
    return np.where((keys >= 0) & (keys < n_keys), keys + FIRST_KEY, UNK)


def load_data(config, device="cpu"):
    """data_dir -> Data; without data_dir the demo set, which rank 0 builds if it is not there yet."""
    demo = ("demo600", device, "--limit", "600") if config.dry_run else ("demo", device)
    folder = Path(config.data_dir) if config.data_dir else demo_set("logs", *demo)
    with reading(folder, "logs/prepare.py --input FILE"):
        meta = json.loads((folder / "meta.json").read_text())
        keys, offsets, labels, unique, split = (np.load(folder / f"{name}.npy") for name in (
            "keys", "offsets", "labels", "unique", "split"))
        meta["ids"] = (folder / "sessions.txt").read_text(encoding="utf-8").split("\n")
        gaps = np.load(folder / "gaps.npy") if meta["has_gaps"] else np.zeros(len(keys), np.float32)
        check_rows(offsets, keys, n=len(split), most=len(meta["templates"]))
        for name, array, most in (("split", split, len(meta["splits"])), ("unique", unique, 2 ** 31),
                                  ("labels", labels, len(meta["kinds"]) + 1)):
            check_ids(name, array, most, -1 if name == "labels" else 0, (len(meta["ids"]) - 1,))
        if gaps.shape != keys.shape or not ((gaps >= 0) & (gaps < np.inf)).all():
            raise ValueError("the gaps are not as many seconds as there are keys")
        rows, table = {name: np.flatnonzero(split == i) for i, name in enumerate(meta["splits"])}, to_ids(
            keys, meta["n_train_keys"])
    if not len(rows.get("train", [])) or not len(rows.get("val", [])):
        fail(f"--data_dir {folder}: no rows in the train or the val split")
    if config.use_gaps and not meta["has_gaps"]:
        fail(f"--use_gaps: {folder} has no times; leave the flag out")
    return Data(meta, keys, table, np.log1p(gaps), offsets[:-1], np.diff(offsets), labels, unique, rows,
                torch.device(device))


@functools.lru_cache(maxsize=2)
def drawn_rows(data, split, power):
    """What an epoch shows: as many rows as the split has, each distinct sequence in proportion to its count ** power.
    A few sequences make up most of a log. Shown as often as they occur, they leave the model unsure of what the rare
    ones have in common with them, and rare normal sessions score like anomalies."""
    rows = data.rows[split][np.argsort(data.unique[data.rows[split]], kind="stable")]
    _, first, counts = np.unique(data.unique[rows], return_index=True, return_counts=True)
    share = np.cumsum(counts ** power)
    chosen = np.searchsorted(share / share[-1], (np.arange(len(rows)) + 0.5) / len(rows))
    turn = np.arange(len(rows)) - np.searchsorted(chosen, chosen)       # equal sessions take turns
    return rows[first[chosen] + turn % counts[chosen]]


WINDOW = 4                                          # global batches that are sorted by length together


@functools.lru_cache(maxsize=2)
def bucketed_rows(data, split, global_batch, seed, window, power):
    """The rows of the window-th run of WINDOW global batches, (WINDOW, global_batch), each batch of similar lengths."""
    rows = drawn_rows(data, split, power)
    size = max(1, min(WINDOW, len(rows) // global_batch))
    taken = rows[global_rows(len(rows), size * global_batch, seed, window)]
    batches = taken[np.argsort(data.length[taken], kind="stable")].reshape(size, global_batch)
    return np.random.default_rng([seed, window]).permutation(batches)


def pad(sessions):
    """List of Session -> ids (B, T) int64, PAD where a session is over, gaps (B, T) float32, length (B,) int64."""
    length = np.array([len(ids) for ids, _ in sessions])
    inside = np.arange(length.max()) < length[:, None]
    ids, gaps = np.full(inside.shape, PAD), np.zeros(inside.shape, np.float32)
    ids[inside], gaps[inside] = (np.concatenate(parts) for parts in zip(*sessions))
    return ids, gaps, length


def draw_questions(length, config, seed):
    """What is asked of sessions of these lengths (B,) -> masked (B, T) bool; prefix (B,) int64, how many keys a row
    shows before it asks for the next, -1 where it does not; bag (B,) bool. Masked rows have prefix -1."""
    rng, (B, T) = np.random.default_rng(seed), (len(length), int(length.max()))
    bag = {"ordered": np.zeros(B, bool), "bag": np.ones(B, bool), "both": rng.random(B) < 0.5}[config.view]
    prefix = np.where(rng.random(B) < 0.3, length, rng.integers(1, length + 1))     # often enough the answer is the end
    prefix = np.where(rng.random(B) < config.next_share, prefix, -1)
    share = rng.uniform(config.mask_min, config.mask_max, (B, 1))
    dice = np.where(np.arange(T) < length[:, None], rng.random((B, T)), np.inf)
    masked = (dice < share) | (dice == dice.min(1, keepdims=True))
    return masked & (prefix < 0)[:, None], prefix, bag


def make_batch(sessions, masked, prefix, bag, use_gaps):
    """Sessions and their questions -> dict of tokens (B, T + 2) int64, bag (B,) bool, gaps (B, T + 2) float32, and of N
    questions asked (N,) int64, their places in the flattened tokens, and targets (N,) int64, classes."""
    (keys, gaps, length), row, place = pad(sessions), np.flatnonzero(prefix >= 0), prefix[prefix >= 0]
    masked, edges = masked[:, :keys.shape[1]] & (keys >= EOS), ((0, 0), (1, 1))        # UNK has no class
    shown = np.arange(keys.shape[1]) < np.where(prefix >= 0, prefix, length)[:, None]
    tokens, answer = np.pad(np.where(masked, MASK, keys) * shown, edges), np.pad(keys * masked, edges)     # PAD is 0
    follows = np.pad(keys, edges)[row, place + 1]
    answer[row, place + 1] = np.where(follows == PAD, EOS, follows)
    tokens[:, 0], tokens[row, place + 1] = DIST, NEXT
    asked = np.flatnonzero(answer >= EOS)
    gaps = {"gaps": np.pad(gaps * shown, edges)} if use_gaps else {}
    return {"tokens": tokens, "asked": asked, "targets": answer.flat[asked] - EOS, "bag": bag} | gaps


def get_batch(data, split, step, config, micro=0):
    """This rank's micro-batch of a step: make_batch, with count (questions) and rows of the whole step, all ranks."""
    global_batch = config.batch_size * config.grad_accum * world_size()
    size = max(1, min(WINDOW, len(data.rows[split]) // global_batch))
    rows = bucketed_rows(data, split, global_batch, config.seed, step // size, config.count_power)[step % size]
    masked, prefix, bag = draw_questions(data.length[rows], config, [config.seed, step])
    mine = local_rows(np.arange(global_batch), micro, config.grad_accum)
    sessions = [data.session(row) for row in rows[mine]]
    batch = make_batch(sessions, masked[mine], prefix[mine], bag[mine], config.use_gaps)
    return cast(batch, data.device) | {"count": int(masked.sum() + (prefix >= 0).sum()), "rows": global_batch}


# ----------------------------------------------------------------------------------------------------------- model
class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.norm1, self.norm2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.qkv, self.out = nn.Linear(config.n_embd, 3 * config.n_embd), nn.Linear(config.n_embd, config.n_embd)
        self.up, self.down = nn.Linear(config.n_embd, 4 * config.n_embd), nn.Linear(4 * config.n_embd, config.n_embd)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, visible, places):
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)
        if T <= 128 and (q.device.type, q.dtype) == ("cpu", torch.float32):
            scores = (q * (D // self.n_head) ** -0.5) @ k.mT    # rows this short are slower in SDPA's kernel for a CPU
            scores += torch.zeros(visible.shape).masked_fill(~visible, -math.inf)
            heads = F.dropout(scores.softmax(-1), self.dropout, self.training) @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, visible, self.dropout * self.training)
        heads = heads.transpose(1, 2).reshape(B, T, D)
        if places is not None:                      # (N,): of these alone, -> (N, D)
            x, heads = x.flatten(0, 1)[places], heads.flatten(0, 1)[places]
        x = x + self.drop(self.out(heads))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class LogBERT(nn.Module):
    """Pre-LN encoder; about 0.1 M parameters at 2 layers of width 64. A bag row has one position for all its keys, so
    that only their multiset is seen; positions past the longest training session share the last one."""
    def __init__(self, config, about):
        super().__init__()
        self.about = {"config": dataclasses.asdict(config), "data": about}      # what load_model needs
        self.templates, self.n_keys, self.unseen = about["templates"], about["n_keys"], about["unseen"]
        self.block, ids = about["block"], FIRST_KEY + self.n_keys
        self.token, self.position = nn.Embedding(ids, config.n_embd), nn.Embedding(self.block + 1, config.n_embd)
        self.gap = nn.Linear(1, config.n_embd) if config.use_gaps else None
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm, self.head = nn.LayerNorm(config.n_embd), nn.Linear(config.n_embd, ids - EOS)
        self.register_buffer("centre", torch.zeros(config.n_embd)), self.register_buffer("since", torch.zeros(()))
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02 if config.init_gain else 0.1)
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
                if config.init_gain:
                    nn.init.xavier_normal_(module.weight, gain=config.init_gain)

    def forward(self, tokens, bag, asked, gaps=None):
        """tokens, bag, asked, gaps as make_batch has them -> (logits (N, K), h_DIST (B, D), its norm fixed)."""
        B, T = tokens.shape
        place = torch.arange(T, device=tokens.device).clamp(max=self.block - 1)
        x = self.token(tokens) + self.position(torch.where(bag[:, None], self.block, place))
        if self.gap is not None:                    # a bag has no order and so no gaps
            x = x + self.gap((gaps * ~bag[:, None])[..., None])
        visible = (tokens != PAD)[:, None, None, :]     # DIST always is, so that no row of the softmax is empty
        x, places = self.drop(x), torch.cat([asked, torch.arange(0, B * T, T, device=asked.device)])
        for i, block in enumerate(self.blocks, 1):      # the last one computes what is asked for, and DIST
            x = block(x, visible, places if i == len(self.blocks) else None)
        x = self.norm(x)
        return self.head(x[:-B]), F.layer_norm(x[-B:].float(), x.shape[-1:])


def load_model(path, device="cpu"):
    """best.safetensors, or an event's model.safetensors -> LogBERT in eval mode. Raises ValueError if it is damaged."""
    tensors, body = read_file(path)
    if "next_share" not in body["about"]["config"]:
        raise ValueError(f"{path} is of another script")
    model = LogBERT(Config(**body["about"]["config"]), body["about"]["data"])
    load_tensors(model, tensors, path)
    return model.to(device).eval()


# ------------------------------------------------------------------------------------------------------------ loss
def compute_loss(model, batch, step, config):
    """-> (loss, parts): sums over this micro-batch divided by the whole step's counts; 0-dim float32.

    mlkp: cross-entropy of the questions, masked keys and what follows a prefix; vhm: the squared distance of h_DIST to
    the centre per dimension (Guo, Yuan, Wu 2021, equations 3 and 4, the latter without the root and with / D)."""
    logits, h_dist = model(batch["tokens"], batch["bag"], batch["asked"], batch.get("gaps"))
    with float32_island(logits):
        mlkp = F.cross_entropy(logits.float(), batch["targets"], reduction="sum") / batch["count"]
        loss, parts = config.mask_weight * mlkp, {"mlkp": mlkp}
        if config.vhm_weight:
            grown = ((step + 1 - unwrap(model).since) / max(1, config.vhm_ramp_steps)).clamp(0, 1)
            vhm = (h_dist - unwrap(model).centre).square().mean(-1).sum() / batch["rows"]
            loss, parts = loss + config.vhm_weight * grown * vhm, parts | {"vhm": vhm}
        return loss, parts


@torch.no_grad()
def distances(model, sessions, config):
    """h_DIST (len(sessions), D) float32 on the CPU, as bags unless only order is taught. Leaves model in eval mode."""
    model, rows = model.eval(), []
    for some in (sessions[i:i + 256] for i in range(0, len(sessions), 256)):
        masked, whole = np.zeros((len(some), max(len(session.ids) for session in some)), bool), np.full(len(some), -1)
        batch = make_batch(some, masked, whole, np.full(len(some), config.view != "ordered"), config.use_gaps)
        batch = cast(batch, model.centre.device)
        rows.append(model(batch["tokens"], batch["bag"], batch["asked"], batch.get("gaps"))[1].cpu())
    return torch.cat([torch.zeros(0, len(model.centre)), *rows])


def set_centre(model, data, config, step=0):
    """Fix the hypersphere's centre, the mean of h_DIST over the training rows (all ranks), and the step since when."""
    rows = data.rows["train"]
    total = distances(model, [data.session(row) for row in rows[rank()::world_size()]], config).sum(0).to(data.device)
    if world_size() > 1:
        dist.all_reduce(total)
    model.centre.copy_(total / len(rows)), model.since.fill_(step)


# ---------------------------------------------------------------------------------------------- evaluation, samples
@torch.no_grad()
def evaluate(model, data, config, split="val"):
    """Losses of a split over the same questions each time, equal on all ranks -> dict of floats: loss; mlkp, which
    chooses checkpoints; with a hypersphere vhm and spread, the mean standard deviation of h_DIST: near 0, collapsed."""
    model, device = unwrap(model), data.device
    rows = data.rows[split][np.argsort(data.length[data.rows[split]], kind="stable")]
    was_training, sums = model.training, torch.zeros(2, device=device)
    model.eval()
    for i in range(rank() * 256, len(rows), world_size() * 256):
        some = rows[i:i + 256]
        questions = draw_questions(data.length[some], config, [config.seed, 0, i])
        batch = cast(make_batch([data.session(row) for row in some], *questions, config.use_gaps), device)
        with autocast(device, pick_dtype(config.dtype, device)[0]):
            _, parts = compute_loss(model, batch | {"count": 1, "rows": 1}, 0, config)
        sums += torch.stack([parts["mlkp"], parts["mlkp"].new_tensor(len(batch["targets"]))])
    if world_size() > 1:
        dist.all_reduce(sums)
    h_dist = distances(model, [data.session(row) for row in rows if config.vhm_weight], config)
    model.train(was_training)
    mlkp = float(sums[0] / sums[1].clamp(min=1))
    if not config.vhm_weight:
        return {"loss": config.mask_weight * mlkp, "mlkp": mlkp}
    vhm = float((h_dist - model.centre.cpu()).square().mean())
    return {"loss": config.mask_weight * mlkp + config.vhm_weight * vhm, "mlkp": mlkp, "vhm": vhm,
            "spread": float(h_dist.std(0, correction=0).mean())}


def ask_each(sessions, bag):
    """All questions to a few sessions -> (tokens, gaps (R, T + 2), row, column, target class, owner (Q,)). Each key is
    masked alone (over PASSES keys: every PASSES-th with it), with bag one for all its equals; at last come the ends."""
    (keys, gaps, length), B = pad([(np.sort(ids), gaps) for ids, gaps in sessions] if bag else sessions), len(sessions)
    asked = keys != PAD
    if bag:
        asked[:, 1:] &= keys[:, 1:] != keys[:, :-1]
    owner, place = np.nonzero(asked)
    passes = np.minimum(asked.sum(1), PASSES)
    turn = (asked.cumsum(1) - 1)[owner, place] % passes[owner]
    source = np.concatenate([np.repeat(np.arange(B), passes), np.arange(B)])    # session of each row
    tokens = np.pad(keys[source], ((0, 0), (1, 1)), constant_values=PAD)
    tokens[:, 0] = DIST
    row = np.concatenate([(np.cumsum(passes) - passes)[owner] + turn, passes.sum() + np.arange(B)])
    column, ends = np.concatenate([place, length]) + 1, np.arange(len(row)) >= len(owner)
    tokens[row, column] = np.where(ends, NEXT, MASK)
    target = np.concatenate([keys[owner, place], np.full(B, EOS)]) - EOS
    return tokens, np.pad(gaps[source], ((0, 0), (1, 1))), row, column, target, np.concatenate([owner, np.arange(B)])


@torch.no_grad()
def surprise(model, sessions, bag, tokens_at_once=32768):
    """How unlikely each key of each session is, and at last the end -> list of (len + 1, 4) float64: -log p in nats,
    rounded to 1e-4 since equal rows of different batches differ in the last bits; how many classes are likelier; the id
    of the likeliest; its -log p. With bag too the answers stand where the keys stand: equal keys share one."""
    device, length = model.head.weight.device, np.array([len(session.ids) for session in sessions])
    order, done, answers = np.argsort(length, kind="stable"), 0, [None] * len(sessions)
    while done < len(order):
        ahead = length[order[done:done + 4096]]     # the shortest ones left; together they are padded to the longest
        cost = (np.minimum(ahead, PASSES) + 1) * (ahead + 2) * np.arange(1, len(ahead) + 1)
        some = order[done:done + max(1, np.searchsorted(cost, tokens_at_once))]
        done += len(some)
        tokens, gaps, row, column, target, owner = ask_each([sessions[i] for i in some], bag)
        answer, size = np.empty((len(row), 4)), max(1, tokens_at_once // tokens.shape[1])
        for a in range(0, len(tokens), size):       # one turn, but for a long session
            now = np.flatnonzero((row >= a) & (row < a + size))
            x, g, r, c, t = cast((tokens[a:a + size], gaps[a:a + size], row[now] - a, column[now], target[now]), device)
            logits, _ = model(x, torch.full((len(x),), bag, device=device), r * x.shape[1] + c, g)
            logp = logits.float().log_softmax(-1)
            mine, (best, likeliest) = logp.gather(1, t.clamp(min=0)[:, None]), logp.max(1)
            mine = torch.where(t[:, None] < 0, -math.inf, mine)         # UNK has no class: all others are likelier
            found = [-mine[:, 0], (logp > mine).sum(1), likeliest + EOS, -best]
            answer[now] = torch.stack([part.float() for part in found], 1).cpu().numpy()
        answer[:, 0] = metrics.round_scores(np.where(target < 0, model.unseen, answer[:, 0]))
        for i, session in enumerate(some):
            mine, ids = answer[owner == i], sessions[session].ids
            which = np.unique(ids, return_inverse=True)[1] if bag else np.arange(len(ids))
            answers[session] = mine[[*which, -1]]
    return answers


def score_sessions(model, sessions, config):
    """Detectors' scores of sessions, each the higher the more anomalous -> dict name -> (n,) float64. Per view taught:
    its name, the largest -log p over keys (in a bag distinct ones) and end; top 2, the sum of the two largest; misses,
    how many are not among the top_g likeliest. both: the larger of the views'. distance: of h_DIST to the centre."""
    scores, views = {}, VIEWS[config.view]
    for view in views:
        asked, which = sessions, range(len(sessions))
        if view == "bag":                           # equal multisets are asked once
            bags = {np.sort(session.ids).tobytes(): session for session in sessions}
            place = {bag: i for i, bag in enumerate(bags)}
            asked, which = list(bags.values()), [place[np.sort(session.ids).tobytes()] for session in sessions]
        table = np.zeros((len(asked), 3))
        for i, (session, answer) in enumerate(zip(asked, surprise(model, asked, view == "bag"))):
            if view == "bag":
                answer = answer[[*np.unique(session.ids, return_index=True)[1], -1]]
            answer = answer if config.next_share else answer[:-1]       # plain LogBERT knows no end
            worst = np.sort(answer[:, 0])[::-1]
            table[i] = worst[0], worst[:2].sum(), (answer[:, 1] >= config.top_g).sum()
        scores |= dict(zip((view, f"{view} top 2", f"{view} misses"), table[which].T))
    if len(views) > 1:
        scores["both"] = np.maximum(scores["bag"], scores["ordered"])
    if config.vhm_weight:
        squares = (distances(model, sessions, config) - model.centre.cpu()).square()
        scores["distance"] = metrics.round_scores(squares.sum(1).numpy())
    return scores


def explain(model, session, texts, config):
    """What raised a session's score -> one line: which key where, how likely it is, what was expected instead."""
    views = [view for view in VIEWS[config.view] if config.detector.startswith(view)] or VIEWS[config.view]
    answers = {view: surprise(model, [session], view == "bag")[0][:None if config.next_share else -1] for view in views}
    view = max(answers, key=lambda view: answers[view][:, 0].max())
    place = int(answers[view][:, 0].argmax())
    nll, _, likeliest, best = answers[view][place]
    what, n = "the end, after", len(texts)
    if place < n:
        where = f"{(session.ids == session.ids[place]).sum()} of" if view == "bag" else f"number {place + 1} of"
        what = f"{texts[place]!r}{' (never seen in training)' * int(session.ids[place] == UNK)}, {where}"
    expected = "the end" if likeliest == EOS else repr(model.templates[int(likeliest) - FIRST_KEY])
    return f"{what} {n} keys: p {math.exp(-nll):.1e}, expected {expected} with p {math.exp(-best):.2f}"


def judges(model, data, config):
    """What metrics.py asks of a model: score(rows) -> dict detector -> (n,), and explain(row, texts) -> str."""
    return (lambda rows: score_sessions(model, [data.session(row) for row in rows], config),
            lambda row, texts: explain(model, data.session(row), texts, config))


# --------------------------------------------------------------------------------------------------- training loop
def lr_at(step, max_steps, config):
    """Linear warm-up, then a cosine down to the share min_lr: a function of the step, so there is nothing to save."""
    if step < config.warmup_steps:
        return config.warmup_init + (config.learning_rate - config.warmup_init) * (step + 1) / config.warmup_steps
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
        config = dataclasses.replace(config, run_name=time.strftime("logbert_%Y%m%d_%H%M%S", now))
    data = load_data(config, device)
    raw_model = LogBERT(config, data.about).to(device)
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
            if saved[1]["about"]["data"] != data.about:
                fail(f"--data_dir {config.data_dir}: its log keys or longest row are not the checkpoint's")
            restore(raw_model, optimizer, *saved)
            start, best = saved[1]["step"], saved[1]["best"]
    elif agree(len(checkpoints(folder)), device):
        fail(f"{folder} already holds checkpoints: --resume goes on from them, another --run_name starts anew")
    if start > max_steps:
        fail(f"the newest checkpoint is of step {start}, beyond --max_steps {max_steps}: nothing to do")

    run = Run(config, start, {"max_steps": max_steps, "steps_per_epoch": steps_per_epoch, "global_batch": global_batch})
    if config.vhm_weight and not raw_model.centre.any():        # with a resume too: what was best had no hypersphere
        set_centre(raw_model, data, config, start)
        best = math.inf
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
    run.log(f"{config.run_name}: {size:,} parameters, {str(dtype)[6:]} ({reason}), {rows:,} sessions, batch "
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
                    run.progress(step, max_steps, stats, lr_at(step - 1, max_steps, config), global_batch, "sessions")
                if last or every(step, config.eval_every):
                    scores = evaluate(model, data, config, "val")
                    run.log(f"epoch {math.ceil(step / steps_per_epoch)} || TRAIN_Loss:{stats['loss']:.4f} ||VAL_Loss:"
                            f"{scores['loss']:.4f}", shown=False)
                    run.log(f"step {step:,} validation: " + "  ".join(f"{name} {x:.4f}" for name, x in scores.items()))
                    run.measure(step, "val", **scores)
                    run.curves()
                    if scores["mlkp"] < best:        # never true of a NaN
                        best = scores["mlkp"]
                        if run.main:
                            tensors = model_tensors(raw_model)
                            write_file(folder / "best.safetensors", tensors, {"about": raw_model.about, "step": step})
                if every(step, config.sample_every) and run.main:
                    metrics.write_samples(folder / f"samples/step-{step:08d}.txt", data, data.rows["val"][:500],
                                          *judges(raw_model.eval(), data, config), config.detector)
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
        run.log(f"stopped by a signal; go on with: python train_logbert.py --resume --run_name {config.run_name}")
        return {"step": step, "best": best}
    listen(False)                                   # all is saved: from here on Ctrl-C may end the program
    agree(0, device)                                # best.safetensors is there
    judged = judges(load_model(folder / "best.safetensors", device), data, config)
    table = metrics.report(data, *judged, config, folder, run.log) if run.main else {}
    agree(0, device)                                # the others wait for the samples
    return {"step": step, "best": best, "table": table}


# ------------------------------------------------------------------------------------------------------------ main
@dataclass
class ScoreFlags:
    run_name: str = ""  # whose best.safetensors and thresholds.json
    out_dir: str = "out"  # where runs are
    input: str = ""  # log of the kind that was trained on, .gz too; - reads standard input
    out: str = "scores.csv"  # where to write: one row per session, those still open at the end in order of their start
    session_timeout: float = 0.0  # seconds after its last line at which a session ends; 0: as the data set was prepared
    detector: str = ""  # whose verdict counts; empty: the run's own
    batch_size: int = 512  # sessions scored at once
    device: str = "auto"  # auto, cuda, mps, cpu


@dataclass
class EvalFlags:
    run_name: str = ""  # whose best.safetensors
    out_dir: str = "out"  # where runs are
    data_dir: str = ""  # prepared data; empty: the run's own
    detector: str = ""  # whose verdict counts; empty: the run's own
    quantile: float = -1.0  # of held-out scores; -1: the run's own. Rewrites thresholds.json, by which score flags
    margin: float = -1.0  # nats on top of it; -1: the run's own. The same
    device: str = "auto"  # auto, cuda, mps, cpu


def open_run(flags, device):
    """-> the run's folder, its best model, its Config with what the flags say instead."""
    folder = trained(flags.out_dir, flags.run_name)
    model = or_fail(load_model, folder / "best.safetensors", device)
    names = "data_dir", "detector", "quantile", "margin"
    given = {name: x for name, x in vars(flags).items() if name in names and x not in ("", -1)}
    config = Config(**model.about["config"] | given | {"resume": False})
    return folder, model, settle(config, {*vars(config)})


def main_eval(argv):
    flags, _ = parse_flags(EvalFlags, argv, "The table of a trained model beside the floors.")
    device = launch(flags.device)
    folder, model, config = open_run(flags, device)
    data = load_data(config, device)
    if data.about != model.about["data"]:
        fail(f"--data_dir {config.data_dir}: its log keys or its training sessions are not the model's")
    if rank() == 0:
        metrics.report(data, *judges(model, data, config), config, folder)
    finish()


def main_score(argv):
    from data.logs.prepare import LogReader
    flags, _ = parse_flags(ScoreFlags, argv, "Score the sessions of a new log.")
    folder, model, config = open_run(flags, launch(flags.device))
    if not flags.input or flags.batch_size < 1 or Path(flags.input).resolve() == Path(flags.out).resolve():
        fail("--input FILE is the log to score (- for standard input), --out another file; --batch_size is above 0")
    timeout = {"session_timeout": flags.session_timeout} if flags.session_timeout else {}
    reader, flagged = LogReader(model.about["data"]["parser"] | timeout, model.templates), []
    read = reader.sessions(flags.input)
    some = list(itertools.islice(read, flags.batch_size))       # before an older --out is touched
    if not some or config.use_gaps and not reader.has_times:
        fail(f"--input {flags.input}: no session, or no times although the model reads them; {dict(reader.counts)}")
    try:
        limit = float(json.loads((folder / "thresholds.json").read_text())["thresholds"][config.detector])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        fail(f"{error!r:.200}: train_logbert.py eval --run_name {flags.run_name} writes thresholds.json")
    with whole_file(Path(flags.out)) as file:
        writer = csv.writer(file)
        writer.writerow(["session", "first_line", "keys", "unseen", "score", "threshold", "verdict", "explanation"])
        while some:
            sessions = [Session(to_ids(one.keys, model.n_keys), np.log1p(np.float32(one.gaps))) for one in some]
            for one, session, score in zip(some, sessions, score_sessions(model, sessions, config)[config.detector]):
                texts = [model.templates[key] if key >= 0 else one.unknown[i] for i, key in enumerate(one.keys)]
                flagged.append(score > limit)
                verdict = ("anomaly", explain(model, session, texts, config)) if score > limit else ("normal", "")
                writer.writerow([one.id, one.first_line, len(texts), sum(session.ids == UNK), score, limit, *verdict])
            some = list(itertools.islice(read, flags.batch_size))
    print(f"{flags.out}: {len(flagged):,} sessions, {sum(flagged):,} anomalous ({config.detector} > {limit:.4f})"
          + "".join(f"; {name} {n:,}" for name, n in reader.counts.items()))


def settle(config, given):
    """Fill in what the flags left open and refuse what cannot work for this model -> Config"""
    config = complete(config, given, CPU, DRY, FIXED)
    if config.n_embd % config.n_head:
        fail(f"--n_embd {config.n_embd} is not a multiple of --n_head {config.n_head}")
    for name in ("dropout", "mask_min", "mask_max", "next_share", "quantile", "count_power"):
        if not 0 <= getattr(config, name) <= 1 - (name == "dropout") * 1e-9:
            fail(f"--{name} {getattr(config, name)}: must be in 0 ... 1, a dropout below 1")
    for name in ("mask_weight", "vhm_weight", "vhm_ramp_steps", "init_gain", "warmup_init", "top_g", "margin"):
        if getattr(config, name) < 0:
            fail(f"--{name} {getattr(config, name)}: must not be below 0")
    if config.mask_min > config.mask_max or config.mask_weight + config.vhm_weight == 0:
        fail(f"--mask_min {config.mask_min}: mask_min not above mask_max; --mask_weight {config.mask_weight}: not 0")
    views = VIEWS.get(config.view, ("",))
    known = [view + name for view in views for name in ("", " top 2", " misses")]
    known += ["both"] * (config.view == "both") + ["distance"] * (config.vhm_weight > 0)
    config = dataclasses.replace(config, detector=config.detector or config.view)
    for name, choices in {"view": VIEWS, "detector": known}.items():
        if getattr(config, name) not in choices:
            fail(f"--{name} {getattr(config, name)}: one of {', '.join(choices)}")
    return config


def main(argv):
    if argv[:1] in (["eval"], ["score"], ["sample"]):
        return (main_eval if argv[0] == "eval" else main_score)(argv[1:])
    config, given = parse_flags(Config, argv, __doc__, ALIASES)
    try:
        train(settle(config, given))
    except NonFinite as error:
        print(error, file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    main(sys.argv[1:])
