"""
Electron-ionisation mass spectra from molecules: a graph network teaches a mixture of experts that reads fingerprints.

python train_student.py                               # no flags: builds a demo set, trains both, evaluates; minutes
python train_student.py --dry_run                     # everything once, in seconds
python data/spectra/prepare.py --msp FILE --name mine && python train_student.py --data_name mine --run_name big
python train_student.py --data_name mine --phase teacher --run_name tutor
python train_student.py --data_name mine --teacher out/tutor/best.safetensors --run_name pupil
torchrun --nproc_per_node=8 train_student.py --data_name mine --teacher out/tutor/best.safetensors  # eight GPUs
python train_student.py --resume --run_name pupil     # goes on from the newest checkpoint, on a CPU bit for bit
python train_student.py eval --run_name pupil --beside tutor    # all metrics, beside another run and the baselines
python train_student.py sample --run_name pupil --smiles FILE --out predicted.msp
python train_student.py rank --run_name pupil --msp FILE --candidates FILE      # which molecule is it?
python train_student.py --phase pretrain --run_name bonds && python train_student.py --init out/bonds/best.safetensors

Student: fingerprint (B, 6144), nominal mass M -> trunk (B, D) -> router -> 2 of 4 experts (B, D) -> head (B, M/Z)
Head: peaks counted from 0, peaks counted from M + 5 downwards, a gate between them, and fragments' masses, shifted
Teacher: atoms (A, G) -> GINE layers -> fragments' scores; pooled, with the fingerprint -> trunk -> the same head

What used to break here                                       and what stops it
  a head that knows no mass: library R@10 .3 in place of .8     Head counts from the molecular mass too
  a soft loss in which the temperature cancels out              T^2 KL(p || q) of tempered spectra, in float32
  balancing bias ignored, or moved by a skipped batch           Student.follow: torch.where(bad, old, new)
  GradNorm on unweighted norms, weights run away                weighted norms, weights clamped
  MC dropout through train() moves BatchNorm                    no BatchNorm; only nn.Dropout is switched on
  a molecule without bonds, attention that overflows            segment sums, softmax with the maximum taken off

Wei et al. 2019 (NEIMS, ACS Cent. Sci. 5, 700). Hu et al. 2020 (GINE, arXiv 1905.12265). Fedus et al. 2021 (Switch,
arXiv 2101.03961, eq. 4 to 6). Wang et al. 2024 (balancing without a loss, arXiv 2408.15664).
"""
import dataclasses
import math
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
from data.files import demo_set, given_file, or_fail, reading
from data.spectra import metrics, search
from data.spectra.features import ATOM_SIZES, N_FEATURES
from data.spectra.tables import MASKED, read_folder, read_list
from runs import (Run, checkpoints, complete, load_newest, load_tensors, model_tensors, newest, parse_flags, read_file,
                  restore, resume_config, save_checkpoint, steps_in, write_file)

# B rows (spectra), A atoms and F fragments of a batch's molecules, G width of an atom, D width, Z bins (m/z), E experts
RIVALS, BEYOND, SHIFTS = 2048, 5, 11  # spectra to choose from, bins above M for isotopes and around a fragment's mass


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
    batch_size: int = 64  # rows per process and micro-batch
    grad_accum: int = 1  # micro-batches per optimizer step
    max_epochs: int = 15  # passes over the training rows
    max_steps: int = 0  # optimizer steps; 0: as max_epochs says
    learning_rate: float = 1e-3  # after the warm-up
    min_lr: float = 0.001  # at the end of the cosine, as a share of learning_rate
    warmup_steps: int = 150  # of linear warm-up
    weight_decay: float = 0.01  # on matrices and embeddings, not on biases and norms
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.999  # of AdamW
    grad_clip: float = 1.0  # largest global gradient norm; 0: off
    on_nonfinite: str = "skip"  # skip the step, or stop the run
    max_skips: int = 10  # more in a row, or in total more than max(this, 1 % of the steps), stop the run
    skip_steps: str = ""  # steps to pass over, as 17,40-45
    eval_every: int = 300  # steps between validations; 0: only at the end
    save_every: int = 500  # steps between checkpoints; 0: only at the end
    keep: int = 3  # newest checkpoints that stay; 0: all
    sample_every: int = 0  # steps between looks at samples; 0: only at the end
    log_every: int = 100  # steps between progress lines; 0: none
    resume: bool = False  # go on from the newest checkpoint of run_name
    dry_run: bool = False  # a tiny model and few steps: does everything run?
    wandb: str = ""  # offline or online; empty: off
    # this script
    phase: str = ""  # pretrain, teacher or student; empty: the student, and before it a teacher if none is given
    teacher: str = ""  # best.safetensors of a teacher, or of several with commas between: their mean teaches
    teacher_epochs: int = 15  # max_epochs of the teacher that is trained first when phase is empty
    init: str = ""  # best.safetensors of --phase pretrain: where a teacher's atoms begin
    smiles: str = ""  # a file with a SMILES per line: for --phase pretrain; for a student, explained by its teachers
    width: int = 512  # of trunk and experts
    blocks: int = 3  # residual blocks of each expert, and of the teacher's trunk
    experts: int = 4  # of the student
    top_k: int = 2  # experts that a row uses
    gnn_width: int = 128  # of the teacher's atoms
    gnn_layers: int = 4  # of the teacher
    dropout: float = 0.25  # in the residual blocks, and a third of it in the graph layers
    input_dropout: float = 0.2  # of the fingerprint's entries
    use_anchor: bool = True  # count peaks from the molecular mass too; off: the original's head
    use_fragments: bool = True  # read the masses of the molecule's fragments; off: fingerprints alone
    hard_weight: float = 0.5  # of 1 - weighted cosine to the measured spectrum; without a teacher it is 1
    soft_weight: float = 0.5  # of T^2 KL to the teacher's spectrum
    feature_weight: float = 0.05  # of 1 - cosine to the teacher's features
    rank_weight: float = 0.02  # of the cross-entropy of finding the measured spectrum among others
    balance_weight: float = 0.01  # of the Switch loss on the router
    bias_rate: float = 1e-3  # by which an expert's bias moves a step; 0: no bias
    bias_in_weights: bool = False  # let the bias into the mixing weights too, as the original's fix does
    temperature: float = 4.0  # of the soft loss at the start; a cosine leads to
    temperature_end: float = 1.0  # the one at the end
    passes: int = 30  # of the teachers with dropout on, for the mean and spread of what they say; 0: one each without
    use_gradnorm: bool = False  # make the gradients of hard, soft and feature loss equal, whatever their weights
    lds_sigma: float = 0.0  # in bins: smooth the measured spectra; the original's is 1.5; 0: off


CPU = dict(passes=8)
DRY = dict(batch_size=16, max_steps=20, warmup_steps=5, width=32, blocks=1, gnn_width=16, gnn_layers=2, passes=2,
           eval_every=10, save_every=10, log_every=5)
ALIASES = {"epochs": "max_epochs", "lr": "learning_rate", "data_name": "data_dir=data/spectra/{}"}
FIXED = ("data_dir", "phase", "teacher", "init", "smiles", "width", "blocks", "experts", "top_k", "gnn_width",
         "gnn_layers", "use_anchor", "use_fragments", "passes", "seed")     # a resume keeps them


# ------------------------------------------------------------------------------------------------------------ data
def load_data(config, device="cpu"):
    """data_dir -> Data on the device; without data_dir the demo set, which rank 0 builds if it is not there yet."""
    if config.smiles and config.phase == "pretrain":
        return read_list(config.smiles, device)
    demo = ("demo300", device, "--limit", "300") if config.dry_run else ("demo", device)
    folder = Path(config.data_dir) if config.data_dir else demo_set("spectra", *demo)
    with reading(folder, "spectra/prepare.py --msp FILE"):
        data = read_folder(folder, device)
    if not len(data.rows.get("train", [])) or not len(data.rows.get("val", [])):
        fail(f"--data_dir {folder}: no rows in the train or the val split")
    return data.with_more(config.smiles) if config.smiles and config.phase == "student" else data


def get_batch(data, split, step, config, micro=0):
    """This rank's micro-batch of a step: Molecules.inputs, with target (B, Z) float32 = sqrt(intensity), count (rows of
    the whole step, all ranks), temperature, along a cosine, and what the phase needs: rival spectra (R, Z) and
    which of them are_own (B, R) bool; taught (B, Z), confidence (B,), feature (B, .) by the teachers; asked bonds."""
    global_batch, pool = config.batch_size * config.grad_accum * world_size(), data.pool(config.phase)[split]
    rows = pool[global_rows(len(pool), global_batch, config.seed, step)]
    mine = local_rows(np.arange(global_batch), micro, config.grad_accum)
    rng, device = np.random.default_rng([config.seed, step]), data.molecules.device
    if config.phase == "pretrain":
        return data.molecules.hide_bonds(rows, mine, rng)
    molecules, epochs = data.molecule[rows[mine]], step * global_batch / len(pool)
    progress = min(1.0, step / config.max_steps if config.max_steps else epochs / config.max_epochs)
    warm = (1 + math.cos(math.pi * progress)) / 2
    batch = data.molecules.inputs(molecules, config.phase == "teacher") | {
        "target": data.dense(rows[mine]).sqrt(), "count": global_batch, "micro": micro,
        "temperature": warm * config.temperature + (1 - warm) * config.temperature_end}
    if config.rank_weight:
        rivals = rng.permutation(data.rows["train"])[:RIVALS]
        batch |= {"rivals": data.dense(data.first[rivals], True),
                  "are_own": cast(molecules[:, None] == rivals, device)}
    if data.taught:
        batch |= {name: table[cast(molecules, device)].float() for name, table in data.taught.items()}
    return batch


# ----------------------------------------------------------------------------------------------------------- model
class Fingerprint(nn.Module):
    """A linear layer of the fingerprint that touches only its entries: some 100 of 6144."""
    def __init__(self, config):
        super().__init__()
        self.weight = nn.EmbeddingBag(N_FEATURES, config.width, mode="sum")
        self.bias, self.dropout = nn.Parameter(torch.zeros(config.width)), config.input_dropout
        nn.init.uniform_(self.weight.weight, -N_FEATURES ** -0.5, N_FEATURES ** -0.5)

    def forward(self, batch):
        value = F.dropout(batch["fp_value"], self.dropout, self.training)
        return self.weight(batch["fp_index"], batch["fp_begin"], per_sample_weights=value) + self.bias


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(config.width), nn.Dropout(config.dropout)
        self.up, self.down = nn.Linear(config.width, config.width // 2), nn.Linear(config.width // 2, config.width)

    def forward(self, x):
        return x + self.down(self.drop(F.gelu(self.up(self.norm(x)))))


class Head(nn.Module):
    """Width D -> (B, Z) float32 >= 0, square roots of intensities, mass-anchored as NEIMS's (Wei et al. 2019).

    y_j = g_j f_j + (1 - g_j) r_(M + 5 - j), where r counts neutral losses; 0 at m/z 0 and above M + 5. To it come the
    masses of the fragments, each kind under 11 shifts, weighted by what h says and by a constant of the place."""
    def __init__(self, config, bins):
        super().__init__()
        self.config, self.forward_axis = config, nn.Linear(config.width, bins)
        if config.use_anchor:
            self.reverse_axis, self.gate = nn.Linear(config.width, bins), nn.Linear(config.width, bins)
        if config.use_fragments:
            self.shifts = nn.Linear(config.width, 3 * SHIFTS)
            self.place = nn.Parameter(torch.zeros(3 * SHIFTS, bins))
            nn.init.zeros_(self.shifts.weight), nn.init.zeros_(self.shifts.bias)

    def forward(self, h, mass, fragments, scores=None):
        """h (B, D), mass (B,) int64, fragments (B, 3, Z); scores (B, Z) are added before the ReLU."""
        y = self.forward_axis(h)
        bin = torch.arange(y.shape[1], device=y.device)
        mirrored = mass[:, None] + BEYOND - bin
        if self.config.use_anchor:
            gate = self.gate(h).sigmoid()
            y = gate * y + (1 - gate) * self.reverse_axis(h).gather(1, mirrored.clamp(0, y.shape[1] - 1))
        if self.config.use_fragments:
            shifted = F.pad(fragments, (SHIFTS // 2,) * 2).unfold(2, y.shape[1], 1).flatten(1, 2)    # (B, 33, Z)
            y = y + ((self.shifts(h)[:, :, None] + self.place) * shifted).sum(1)
        y = y.float() if scores is None else y.float() + scores
        return y.relu() * ((mirrored >= 0) & (bin > 0))                 # the loss has no weight at m/z 0


class Student(nn.Module):
    """Fingerprint -> trunk -> top_k of the experts, chosen by logits + bias and mixed by a softmax of the chosen logits
    alone -> Head; 7.4 M parameters at width 512 with 4 experts of 3 blocks. The bias moves in follow() (Wang et al.).

    All experts compute all rows: at these sizes that is faster than sorting rows, and nothing waits for the host."""
    def __init__(self, config, bins, features=0):
        super().__init__()
        self.config, E = config, config.experts
        self.fingerprint, self.trunk, self.norm = Fingerprint(config), Block(config), nn.LayerNorm(config.width)
        self.experts = nn.ModuleList(nn.Sequential(*(Block(config) for _ in range(config.blocks))) for _ in range(E))
        self.router, self.head = nn.Parameter(1e-3 * torch.randn(E, config.width)), Head(config, bins)
        self.projector = nn.Linear(config.width, features) if features else None
        self.register_buffer("bias", torch.zeros(E)), self.register_buffer("usage", torch.full((E,), 1 / E))
        self.register_buffer("balance", torch.ones(3))                  # GradNorm's factors of hard, soft, feature
        # seen in each micro-batch, for follow(): written and not added, so that a replay of one leaves nothing behind
        self.register_buffer("chosen", torch.zeros(config.grad_accum, E), persistent=False)
        self.register_buffer("squares", torch.zeros(config.grad_accum, 3), persistent=False)

    def forward(self, batch):
        """-> y (B, Z) float32, h (B, D), p (B, E) float32 probabilities of the router, load (E,), rows per expert."""
        h = self.trunk(self.fingerprint(batch))
        with float32_island(h):
            logits = F.linear(F.layer_norm(h.float(), h.shape[-1:]), self.router)
            chosen = (logits.detach() + self.bias).topk(self.config.top_k).indices
            mixed = logits + self.bias if self.config.bias_in_weights else logits
            weights = torch.zeros_like(logits).scatter(1, chosen, mixed.gather(1, chosen).softmax(1))
            load = torch.zeros_like(logits).scatter(1, chosen, 1.0).sum(0)     # one_hot would ask the host
        if self.training:
            self.chosen[batch["micro"]] = load
        h = F.gelu(self.norm(sum(weights[:, i:i + 1] * expert(h) for i, expert in enumerate(self.experts))))
        return self.head(h, batch["mass"], batch["fragments"]), h, logits.softmax(1), load

    @torch.no_grad()
    def follow(self, bad):
        """Move what no gradient moves, unless the step was skipped: expert bias and usage, GradNorm's factors."""
        seen = torch.cat([self.chosen.sum(0), self.squares.sum(0)])
        if world_size() > 1:
            dist.all_reduce(seen)
        load, norm = seen[:-3] / seen[:-3].sum(), seen[-3:].sqrt() * self.balance
        wanted = (self.balance * (norm.mean() / norm.clamp(min=1e-12)) ** 0.1).clamp(0.1, 10)
        after = {"bias": self.bias + self.config.bias_rate * (1 / len(load) - load).sign(),
                 "usage": 0.9 * self.usage + 0.1 * load,
                 "balance": 3 * wanted / wanted.sum() if self.config.use_gradnorm else self.balance}
        for name, new in after.items():
            old = getattr(self, name)
            old.copy_(torch.where(bad.bool(), old, new))


class GINE(nn.Module):
    """h_i + MLP((1 + eps) n_i + sum over bonds ij of ReLU(n_j + e_ij)), n = LayerNorm(h): Hu et al. 2020, with the norm
    before and a residual around. atoms h (A, G), edges (2, 2E) from, to, edge_kind (2E,) -> (A, G)."""
    def __init__(self, config):
        super().__init__()
        G = config.gnn_width
        self.norm, self.bond, self.eps = nn.LayerNorm(G), nn.Embedding(MASKED + 1, G), nn.Parameter(torch.zeros(()))
        self.up, self.down, self.drop = nn.Linear(G, 2 * G), nn.Linear(2 * G, G), nn.Dropout(config.dropout / 3)

    def forward(self, h, edges, edge_kind):
        n = self.norm(h)
        message = F.relu(n[edges[0]] + self.bond(edge_kind))
        total = (1 + self.eps) * n + torch.zeros_like(n).index_add(0, edges[1], message)
        return h + self.down(self.drop(F.gelu(self.up(total))))


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(size, config.gnn_width) for size in ATOM_SIZES)
        layers = (GINE(config) for _ in range(config.gnn_layers))
        self.layers, self.norm = nn.ModuleList(layers), nn.LayerNorm(config.gnn_width)

    def forward(self, batch):
        h = sum(embed(column) for embed, column in zip(self.embed, batch["atoms"].T))
        for layer in self.layers:
            h = layer(h, batch["edges"], batch["edge_kind"])
        return self.norm(h)


def pool(h, score, owner, n):
    """Atoms (A, G), their attention logits (A,), owner (A,) in 0 ... n - 1 -> (n, 3 G): mean, maximum, attention."""
    with float32_island(h):
        h, score = h.float(), score.float()
        number = h.new_zeros(n).index_add(0, owner, h.new_ones(len(h)))[:, None]
        top = score.new_full((n,), -math.inf).scatter_reduce(0, owner, score, "amax").detach()
        weight = (score - top[owner]).exp()
        weight = weight / weight.new_zeros(n).index_add(0, owner, weight)[owner]
        mean = h.new_zeros(n, h.shape[1]).index_add(0, owner, h) / number
        most = h.new_full((n, h.shape[1]), -math.inf).scatter_reduce(0, owner[:, None].expand_as(h), h, "amax")
        return torch.cat([mean, most, h.new_zeros(n, h.shape[1]).index_add(0, owner, h * weight[:, None])], 1)


class Fragments(nn.Module):
    """Scores of each fragment, from the atoms inside, outside and at the broken bonds -> what they add to (B, Z)."""
    def __init__(self, config):
        super().__init__()
        G = config.gnn_width
        self.inside, self.outside, self.ends = nn.Linear(G, G), nn.Linear(G, G, False), nn.Linear(G, G)
        self.whole, self.bond = nn.Linear(config.width, G, False), nn.Embedding(MASKED, G)
        self.kind, self.norm, self.drop = nn.Embedding(4, G), nn.LayerNorm(G), nn.Dropout(config.dropout / 3)
        self.up, self.down = nn.Linear(G, G), nn.Linear(G, SHIFTS)

    def forward(self, atoms, h, batch, bins):
        owner, (fragment, atom), (breaker, bond) = batch["fragment_owner"], batch["members"], batch["broken"]
        ends = batch["edges"][:, :batch["edges"].shape[1] // 2]         # each bond once
        bonds = self.ends(atoms[ends[0]] + atoms[ends[1]]).float() + self.bond(batch["edge_kind"][:ends.shape[1]])
        inside = atoms.new_zeros(len(owner), atoms.shape[1]).index_add(0, fragment, atoms[atom])
        everything = atoms.new_zeros(len(h), atoms.shape[1]).index_add(0, batch["atom_owner"], atoms)
        x = self.inside(inside) + self.outside(everything[owner] - inside) + self.whole(h)[owner]
        x = x.float().index_add(0, breaker, bonds[bond])
        x = self.drop(F.gelu(self.norm(x + self.kind(batch["fragment_kind"]))))
        scores = self.down(F.gelu(self.up(x))).float()                          # (F, SHIFTS)
        place = batch["fragment_mass"][:, None] + torch.arange(SHIFTS, device=owner.device) - SHIFTS // 2
        shown = (place >= 0) & (place < bins)
        place = torch.where(shown, owner[:, None] * bins + place, 0)
        return scores.new_zeros(len(h) * bins).index_add(0, place.flatten(), (scores * shown).flatten()).view(-1, bins)


class Teacher(nn.Module):
    """Graph and fingerprint -> (y (B, Z) float32, features (B, D)); 5 M parameters. No BatchNorm: its statistics would
    move with skipped steps, and under dropout at rest."""
    def __init__(self, config, bins, features=0):
        super().__init__()
        self.bins, self.encoder, self.fingerprint = bins, Encoder(config), Fingerprint(config)
        self.attention, self.pooled = nn.Linear(config.gnn_width, 1), nn.Linear(3 * config.gnn_width, config.width)
        self.trunk = nn.Sequential(*(Block(config) for _ in range(config.blocks)))
        self.norm, self.head = nn.LayerNorm(config.width), Head(config, bins)
        self.fragments = Fragments(config) if config.use_fragments else None

    def forward(self, batch):
        atoms, n = self.encoder(batch), len(batch["mass"])
        pooled = pool(atoms, self.attention(atoms)[:, 0], batch["atom_owner"], n)
        h = F.gelu(self.norm(self.trunk(self.pooled(pooled) + self.fingerprint(batch))))
        scores = self.fragments(atoms, h, batch, self.bins) if self.fragments else None
        return self.head(h, batch["mass"], batch["fragments"], scores), h


class Bonds(nn.Module):
    """--phase pretrain: the kinds of hidden bonds from the atoms at their ends -> logits (Q, MASKED), atoms (A, G)."""
    def __init__(self, config, bins, features=0):
        super().__init__()
        self.encoder, self.out = Encoder(config), nn.Linear(config.gnn_width, MASKED)

    def forward(self, batch):
        atoms, (one, other) = self.encoder(batch), batch["edges"][:, batch["asked"]]
        return self.out(atoms[one] + atoms[other]), atoms


def build_model(config, bins, features=0):
    """The phase's model; features: width of what its teachers give (0: no teacher). about is what load_model needs."""
    model = {"pretrain": Bonds, "teacher": Teacher, "student": Student}[config.phase](config, bins, features)
    model.about = {"config": dataclasses.asdict(config), "bins": bins, "features": features}
    if config.phase == "teacher" and config.init:
        start = or_fail(load_model, config.init)
        if isinstance(start, Student):
            fail(f"--init {config.init} is a student: it has no graph; --phase pretrain makes what is wanted here")
        or_fail(load_tensors, model.encoder, model_tensors(start.encoder), f"--init {config.init}")
    return model


def load_model(path, device="cpu"):
    """best.safetensors, or an event's model.safetensors -> model in eval mode. Raises ValueError if it is damaged."""
    tensors, body = read_file(path)
    about = body["about"]
    if "experts" not in about["config"]:
        raise ValueError(f"{path} is of another script")
    model = build_model(Config(**about["config"] | {"init": ""}), about["bins"], about["features"])
    load_tensors(model, tensors, path)
    return model.to(device).eval()


# ------------------------------------------------------------------------------------------------------------ loss
class LDS(nn.Module):
    """Smoothing along m/z by a Gaussian of 7 taps (Yang et al. 2021): (B, Z) of any dtype and device -> the same. A
    measured spectrum keeps a cosine of .72 to itself: hence off by default."""
    def __init__(self, sigma, taps=7):
        super().__init__()
        self.register_buffer("kernel", (-0.5 * (torch.arange(taps) - taps // 2).square() / sigma ** 2).softmax(0))

    def forward(self, x):
        return F.conv1d(x[:, None], self.kernel.to(x)[None, None], padding=len(self.kernel) // 2)[:, 0]


def weigh(root):
    """Square roots of intensities (B, Z) -> unit rows of m/z * sqrt(intensity), the weighting of library searches."""
    return F.normalize(root * torch.arange(root.shape[1], device=root.device), dim=1, eps=1e-6)


def temper(root, T):
    """Square roots of intensities (B, Z) >= 0 -> log of the normalised spectrum to the power 1 / T, log p (B, Z).

    Scaled to a base peak of 1, with .1 % of it added, so that absent peaks stay finite."""
    intensity = (root / root.amax(1, keepdim=True).clamp(min=1e-6)).square()
    return ((intensity + 1e-3).log() / T).log_softmax(1)


def soft_loss(root, taught, T):
    """T^2 KL(p || q) of tempered spectra (B, Z) -> (B,) float32 in nats; p the teacher's (Hinton et al. 2015)."""
    p = temper(taught, T)
    return T ** 2 * (p.exp() * (p - temper(root, T))).sum(1)


def rank_loss(found, own, rivals, are_own):
    """Cross-entropy of finding the measured spectrum by cosine / .05: unit rows found, own (B, Z), rivals (R, Z), of
    which those that are_own (B, R), of the same molecule, do not count -> (B,) float32."""
    wrong = (found @ rivals.T).masked_fill(are_own, -math.inf)
    return -(torch.cat([(found * own).sum(1, keepdim=True), wrong], 1) / 0.05).log_softmax(1)[:, 0]


def compute_loss(model, batch, step, config):
    """-> (loss, parts): sums over this micro-batch divided by the whole step's count; 0-dim float32."""
    if config.phase == "pretrain":
        logits, _ = model(batch)
        with float32_island(logits):
            loss = F.cross_entropy(logits.float(), batch["kinds"], reduction="sum") / batch["count"]
            right = (logits.argmax(1) == batch["kinds"]).sum() / batch["count"]
        return loss, {"accuracy": right}
    y, h, *routing = model(batch)
    with float32_island(y):
        target, known = batch["target"], batch["target"].amax(1)        # 1; 0 where only teachers know, see --smiles
        smooth = LDS(config.lds_sigma)(target.square()).sqrt() if config.lds_sigma else target
        found, own, mean = weigh(y), weigh(smooth), (lambda rows: rows.sum() / batch["count"])
        parts, weights = {"hard": mean(known * (1 - (found * own).sum(1)))}, {
            "hard": config.hard_weight if "taught" in batch else 1.0, "rank": config.rank_weight,
            "soft": config.soft_weight, "feature": config.feature_weight}
        if config.rank_weight:
            parts["rank"] = mean(known * rank_loss(found, weigh(target), batch["rivals"], batch["are_own"]))
        if "taught" in batch:
            parts["soft"] = mean(batch["confidence"] * soft_loss(y, batch["taught"], batch["temperature"]))
            features = unwrap(model).projector(h).float()
            parts["feature"] = mean(1 - F.cosine_similarity(features, batch["feature"], eps=1e-6))
            if config.use_gradnorm:
                weights = balanced(unwrap(model), parts, weights, h, batch["micro"])
        loss = sum(weights[name] * part for name, part in parts.items())
        if routing:
            p, load = routing                       # usage instead of this batch's load: so the sum is over rows alone
            switch = len(load) * mean(p @ unwrap(model).usage)
            parts |= {"switch": switch} | {f"expert{i}": share / (config.top_k * batch["count"])
                                           for i, share in enumerate(load)}
            loss = loss + config.balance_weight * switch
        return loss, parts


def balanced(model, parts, weights, h, micro):
    """GradNorm (Chen et al. 2018) with what cured it: norms of the *weighted* gradients, at h, and clamped factors.
    Leaves the squares for Student.follow -> weights with the present factors in."""
    names = "hard", "soft", "feature"
    if model.training:
        grads = [torch.autograd.grad(weights[name] * parts[name], h, retain_graph=True)[0] for name in names]
        model.squares[micro] = torch.stack([grad.float().square().sum() for grad in grads])
    return weights | {name: weights[name] * factor for name, factor in zip(names, model.balance)}


# ---------------------------------------------------------------------------------------------- evaluation, samples
@torch.no_grad()
def predict(model, molecules, rows, dtype=torch.float32):
    """rows (k,) int64 of Molecules -> (k, Z) float32 intensities on the CPU, base peak 1. In eval mode."""
    made, graph = [torch.zeros(0, molecules.bins)], not isinstance(model, Student)
    for some in np.split(rows, range(256, len(rows), 256)):
        with autocast(molecules.device, dtype):
            root = model(molecules.inputs(some, graph))[0]
        made.append((root / root.amax(1, keepdim=True).clamp(min=1e-9)).square().cpu())
    return torch.cat(made)


@torch.no_grad()
def evaluate(model, data, config, split="val"):
    """Over a split (2,048 of it at most), equal on all ranks -> dict: loss, 1 - weighted cosine; recall@10, the library
    search of protocol A; error, loss + 1 - recall@10, which chooses checkpoints: recall alone is noise among some
    hundred molecules. Of hidden bonds when config.phase is pretrain."""
    model, rows = unwrap(model), data.rows[split][:2048]
    was_training = model.training
    model.eval()
    mine, device = np.arange(rank(), len(rows), world_size()), data.molecules.device
    if config.phase == "pretrain":
        batch = data.molecules.hide_bonds(rows, np.arange(len(rows)), np.random.default_rng(0))
        loss, parts = compute_loss(model, batch, 0, config)
        model.train(was_training)
        return {"loss": float(loss), "error": 1 - float(parts["accuracy"])}
    made = torch.zeros(len(rows), data.molecules.bins, device=device)
    made[mine] = predict(model, data.molecules, rows[mine], pick_dtype(config.dtype, device)[0]).to(device)
    model.train(was_training)
    if world_size() > 1:
        dist.all_reduce(made)
    found, library = weigh(made.sqrt()).cpu(), weigh(data.measured().sqrt())
    recall = metrics.recall(metrics.library_ranks(found, library, rows, data.mass[rows], data.mass), 10)
    loss = float(1 - (found * library[rows]).sum(1).mean())
    return {"loss": loss, "recall@10": recall, "error": 1 - recall + loss}


def dropout_on(model, on=True):
    """Switch dropout alone: train() would do more, and a teacher must stay as it is."""
    for module in model.modules():
        if isinstance(module, (nn.Dropout, Fingerprint)):
            module.training = on


@torch.no_grad()
def ask_teachers(config, data):
    """What the teachers say of the training molecules, asked once a run -> dict of tables over all molecules, on the
    device: taught (n, Z) float16, the mean square root of intensity, base peak 1; feature (n, .) float16; confidence
    (n,) float32, of mean 1 over the training molecules, the share of their spectra that the passes under dropout have
    in common, |mean|^2 / (|mean|^2 + |sd|^2). The ranks share the work; the answer is the same on all."""
    rows, device = np.unique(data.molecule[data.spectra["train"]]), data.molecules.device
    paths = config.teacher.split(",")
    teachers = [or_fail(load_model, path, device) for path in paths]
    for path, teacher in zip(paths, teachers):
        if not isinstance(teacher, Teacher) or teacher.about["bins"] != data.molecules.bins:
            fail(f"--teacher {path}: no teacher of {data.molecules.bins} bins; --phase teacher on these data makes one")
    width = sum(one.about["config"]["width"] for one in teachers)
    passes = len(teachers) * max(1, math.ceil(config.passes / len(teachers)))
    mean, square, feature = (torch.zeros(data.molecules.n, z, device=device) for z in (data.molecules.bins, 1, width))
    for number, some in enumerate(np.split(rows, range(256, len(rows), 256))):
        if number % world_size() == rank():
            batch = data.molecules.inputs(some, True)
            feature[some] = torch.cat([teacher(batch)[1].float() for teacher in teachers], 1)
            for turn in range(passes):
                teacher = teachers[turn % len(teachers)]
                dropout_on(teacher, config.passes > 0)
                seed_step(config.seed, number, 0, turn)
                root = teacher(batch)[0]
                root = root / root.amax(1, keepdim=True).clamp(min=1e-6)
                mean[some] += root / passes
                square[some] += root.square().sum(1, keepdim=True) / passes
                dropout_on(teacher, False)
    for table in (mean, square, feature):
        if world_size() > 1:
            dist.all_reduce(table)
    confidence = mean.square().sum(1) / square[:, 0].clamp(min=1e-12)
    if rank() == 0:
        print(f"{len(teachers)} teacher(s) asked about {len(rows):,} molecules, {config.passes} passes", flush=True)
    return {"taught": mean.half(), "feature": feature.half(), "confidence": confidence / confidence[rows].mean()}


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
    """The phase that was asked for; without one a teacher, if none is given, and then its student."""
    if not config.run_name:
        now = time.localtime(agree(int(time.time()), device))
        config = dataclasses.replace(config, run_name=time.strftime("student_%Y%m%d_%H%M%S", now))
    if not config.phase and not config.teacher:
        first = dataclasses.replace(config, phase="teacher", run_name=f"{config.run_name}-teacher",
                                    max_epochs=config.teacher_epochs)
        if config.resume and (saved := newest(Path(config.out_dir) / first.run_name)):
            first = resume_config(first, {*FIXED, "resume"}, saved[2]["config"], FIXED)
        done = run_phase(first, device)
        if "table" not in done:                     # stopped by a signal
            return done
        best = Path(config.out_dir) / first.run_name / "best.safetensors"
        config = dataclasses.replace(config, teacher=str(best), init="")
        listen()                                    # again: the teacher's phase is over
    return run_phase(dataclasses.replace(config, phase=config.phase or "student"), device)


def run_phase(config, device):
    folder = Path(config.out_dir) / config.run_name
    if not config.resume and agree(len(checkpoints(folder)), device):
        fail(f"{folder} already holds checkpoints: --resume goes on from them, another --run_name starts anew")
    data = load_data(config, device)
    if config.teacher:
        data.taught = ask_teachers(config, data)
    features = data.taught["feature"].shape[1] if data.taught else 0
    torch.manual_seed(config.seed)                  # here: the teachers' dropout has moved it
    raw_model = build_model(config, data.molecules.bins, features).to(device)
    matrices, vectors = ([p for p in raw_model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors}],
                                  weight_decay=0.0, betas=(config.beta1, config.beta2), fused=True)
    global_batch = config.batch_size * config.grad_accum * world_size()
    steps_per_epoch = len(data.pool(config.phase)["train"]) / global_batch
    max_steps = config.max_steps or math.ceil(config.max_epochs * steps_per_epoch)
    skip_steps, (dtype, reason) = steps_in(config.skip_steps), pick_dtype(config.dtype, device)

    start, best, saved = 0, math.inf, None
    if config.resume:
        saved = load_newest(folder, device)
        if saved:
            if saved[1]["about"]["bins"] != data.molecules.bins:
                fail(f"--data_dir {config.data_dir or '(demo)'}: its --max_mz is not the checkpoint's")
            restore(raw_model, optimizer, *saved)
            start, best = saved[1]["step"], saved[1]["best"]
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

    size, rows = sum(p.numel() for p in raw_model.parameters()), len(data.pool(config.phase)["train"])
    run.log(f"{config.run_name}: {size:,} parameters, {str(dtype)[6:]} ({reason}), {rows:,} spectra, batch "
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
                    run.progress(step, max_steps, stats, lr_at(step - 1, max_steps, config), global_batch, "spectra")
                    if shares := [x for name, x in stats["parts"].items() if name.startswith("expert")]:
                        run.log(f"MaxVio {max(shares) * len(shares) - 1:.3f}" + "; an expert is hardly used, raise "
                                "--balance_weight" * (min(shares) < 0.02))
                if last or every(step, config.eval_every):
                    scores = evaluate(model, data, config, "val")
                    run.log(f"step {step:,} validation: " + "  ".join(f"{name} {x:.4f}" for name, x in scores.items()))
                    run.measure(step, "val", **scores)
                    run.curves()
                    if scores["error"] < best:      # never true of a NaN
                        best = scores["error"]
                        if run.main:
                            tensors = model_tensors(raw_model)
                            write_file(folder / "best.safetensors", tensors, {"about": raw_model.about, "step": step})
                if every(step, config.sample_every) and run.main and config.phase != "pretrain":
                    metrics.mirror_some(folder / f"samples/step-{step:08d}.png", data,
                                        lambda rows: predict(raw_model.eval(), data.molecules, rows), "val", run.log)
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
            bad = guard.step(step)
            if config.phase == "student":
                raw_model.follow(bad)               # expert bias and usage: only if the step was taken
    except NonFinite as error:
        if error.intact:
            save(error.step)
        raise
    if not last:
        run.log(f"stopped by a signal; go on with: python train_student.py --resume --run_name {config.run_name}")
        return {"step": step, "best": best}
    listen(False)                                   # all is saved: from here on Ctrl-C may end the program
    agree(0, device)                                # best.safetensors is there
    best_model = or_fail(load_model, folder / "best.safetensors", device)
    shown = run.main and config.phase != "pretrain"
    table = search.table(sys.modules[__name__], best_model, data, folder, run.log) if shown else {}
    agree(0, device)                                # the others wait for the samples
    return {"step": step, "best": best, "table": table}


# ------------------------------------------------------------------------------------------------------------ main
def settle(config, given):
    """Fill in what the flags left open and refuse what cannot work for this model -> Config"""
    config = complete(config, given, CPU, DRY, FIXED)
    low = dict.fromkeys(("width", "blocks", "experts", "top_k", "gnn_width", "gnn_layers", "max_epochs",
                         "teacher_epochs", "temperature", "temperature_end"), 1e-3)
    low |= {name: 0 for name in vars(config) if name.endswith(("_weight", "dropout", "bias_rate", "sigma", "passes"))}
    for name, least in low.items():
        if not least <= getattr(config, name) < (1 if name.endswith("dropout") else math.inf):
            fail(f"--{name} {getattr(config, name)}: must be {'above' if least else 'at least'} 0, a dropout below 1")
    if config.phase not in ("", "pretrain", "teacher", "student") or config.top_k > config.experts:
        fail(f"--phase {config.phase}: pretrain, teacher or student; --top_k {config.top_k}: not above --experts")
    taught, parts = config.teacher or not config.phase, (config.hard_weight, config.soft_weight, config.feature_weight)
    useless = {"teacher": config.phase in ("pretrain", "teacher"), "smiles": not taught and config.phase != "pretrain",
               "init": config.teacher or config.phase in ("pretrain", "student"),
               "use_gradnorm": not taught or config.compile or 0 in parts}
    for name in [name for name in useless if useless[name] and getattr(config, name)]:
        fail(f"--{name}: not with this --phase; or there is no --teacher, a weight of 0, or --compile in its way")
    given_file("init", config.init), given_file("smiles", config.smiles)
    given_file("teacher", *config.teacher.split(","))
    return config


def main(argv):
    if argv[:1] and argv[0] in search.VERBS:
        return search.VERBS[argv[0]](sys.modules[__name__], argv[1:])
    config, given = parse_flags(Config, argv, __doc__, ALIASES)
    try:
        train(settle(config, given))
    except NonFinite as error:
        print(error, file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    main(sys.argv[1:])
