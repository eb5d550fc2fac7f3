"""
Side by side: each script against what a user would run instead, interleaved in one process, on the same data.

python bench.py                                       # all rows, a few minutes on a CPU -> a table in Markdown
python bench.py guard "logbert train"                 # the rows whose names hold one of these words
python bench.py --full                                # 15 pairs of runs instead of 5
python bench.py --molecules DIR --spectra DIR --text DIR --scenes DIR     # prepared sets instead of the demo sets
python bench.py --gpu                                 # the same rows on cuda
python bench.py --gpu --dry_run                       # does it all run? tiny, in seconds, without a GPU too
pip install diffusers transformers accelerate         # the peers; a row without its own says so, no ratio

A row times a piece of our work, then one of the peer's, ours again ..., after one untimed piece of each. A ratio is
made of neighbours only, so that what else the machine does falls on both; its median stands before its range over the
pairs, and a rate is a median too. Whoever adds a row writes a function and gives it a name in ROWS.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

# or torch's profiler, the peers and two_workers talk into the table
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error",
               "DIFFUSERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

import train_adapter as adapter  # noqa: E402
import train_distill as distill  # noqa: E402
import train_edl as edl  # noqa: E402
import train_logbert as logbert  # noqa: E402
import train_student as student  # noqa: E402
from common import (RING, Guard, autocast, every, fail, finish, launch, pick_dtype, rank, seed_step,  # noqa: E402
                    unwrap, wrap_ddp)
from data.scenes.diffusers_folder import GATED, text_shape, unet_shape, vae_shape  # noqa: E402
from data.scenes.encoders import VAE, CLIPText  # noqa: E402
from data.spectra import features  # noqa: E402
from data.spectra.tables import Molecules  # noqa: E402
from data.text.cache import cached_teacher  # noqa: E402

# ------------------------------------------------------------------------------------------------------- measuring
# A side is a function that does a piece of work and answers how much, in the unit of its row
class Row(NamedTuple):
    unit: str  # of the rates, as sessions/s
    goal: str  # of the ratio, or of our rate
    peer: str  # the package that the other side needs; empty: a second device, if anything
    rates: np.ndarray  # (1, pairs) ours, or (2, pairs) ours and the peer's
    memory: list  # bytes per side, see peak_memory; empty: not told
    compared: str  # what with what
    percent: bool = False  # say what ours takes longer, instead of how many times as fast it is

def peer(name):
    """The module of a package that a row compares with, None if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None

def measure(device, pairs, sides, turns=1):
    """Rates of the sides that are not None, (sides, pairs). A pair adds up `turns` turns, each of every side once:
    many short ones share what disturbs them better than few long ones."""
    sides, wait = [side for side in sides if side], torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for side in sides:
        side()
    done = np.zeros((2, len(sides), pairs))         # work, seconds
    for pair, _, (i, side) in itertools.product(range(pairs), range(turns), enumerate(sides)):
        wait()
        start = time.perf_counter()
        work = side()
        wait()
        done[:, i, pair] += work, time.perf_counter() - start
    return done[0] / done[1]

def peak_memory(device, sides):
    """Bytes of tensors that a piece of each side's work holds at most, above what lay there before (weights, optimizer
    state) -> list. One process runs all sides, so that its own peak would tell nothing; numpy is not counted."""
    peaks = []
    for side in filter(None, sides):
        if device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            side()
            peaks.append(torch.cuda.max_memory_allocated() - before)
        else:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
                side()
            events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
            events.sort(key=lambda event: event.start_ns())
            peaks.append(max(itertools.accumulate(event.nbytes() for event in events), default=0))
    return peaks

def ratio(row):
    """What stands in the table: median and range of the pairs' own ratios."""
    if len(row.rates) < 2:
        return f"not installed: pip install {row.peer}" if row.peer else "needs two devices"
    mine, other = row.rates
    values, text = (100 * (other / mine - 1), "{:+.1f} % ({:+.1f} ... {:+.1f})") if row.percent else \
        (mine / other, "{:.1f}x ({:.1f} ... {:.1f})")
    return text.format(np.median(values), values.min(), values.max())

def line(name, row):
    """A row -> its line of the Markdown table."""
    mine, other = [*(f"{np.median(rate):,.0f}" for rate in row.rates), "-"][:2]
    memory = " / ".join(f"{peak / 1e6:.1f} MB" for peak in row.memory) or "-"
    return f"| {name} | {mine} | {other} | {row.unit} | {ratio(row)} | {row.goal} | {memory} | {row.compared} |"

# ---------------------------------------------------------------------------------------------------- optimizer steps
def new_model(script, config, data, device):
    """The script's model, as it starts."""
    torch.manual_seed(config.seed)
    return (script.MolGPT(config, data.vocab, data.block) if script is edl else
            script.LogBERT(config, data.about) if script is logbert else
            new_adapter(config, data) if script is adapter else
            script.build_model(config, data.vocab if script is distill else data.molecules.bins)).to(device)

def plain_step(model, optimizer, loss, config):
    """What follows on a loss where nothing is looked at."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    if hasattr(model, "follow"):                    # a Student's, which moves what no gradient moves
        model.follow(torch.zeros((), device=loss.device))

FIRST = 5                                           # the step a side begins with: those before, train_distill prints
def our_steps(script, device, config, steps, guarded=True, model=None, data=None):
    """-> a side: `steps` optimizer steps as the script takes them; guarded=False: and nothing looks at them."""
    data = copy.copy(data) if data else script.load_data(config, device)    # its own: lookups of rows are remembered
    model = wrap_ddp(new_model(script, config, data, device) if model is None else model, device).train()
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors}],
                                  weight_decay=0.0, betas=(config.beta1, config.beta2), fused=True)
    guard = Guard(model, optimizer, config.grad_clip) if guarded else None
    dtype, turns = pick_dtype(config.dtype, device)[0], itertools.count(FIRST)
    follow = getattr(unwrap(model), "follow", lambda bad: None)     # see plain_step

    def side():
        for step in itertools.islice(turns, steps):
            if guard and every(step, RING, config.log_every):
                guard.poll()
            for group in optimizer.param_groups:
                group["lr"] = script.lr_at(step, 10_000, config)
            seed_step(config.seed, step, rank())
            batch = script.get_batch(data, "train", step, config)
            with autocast(device, dtype):
                loss, parts = script.compute_loss(model, batch, step, config)
            if guard:
                guard.backward(loss, parts)
                follow(guard.step(step))
            else:
                plain_step(model, optimizer, loss, config)
        return steps * config.batch_size
    return side

def guard_cost(device, pairs, config, script, unit, steps=4, turns=30, data=None):
    sides = [our_steps(script, device, config, steps, guarded, data=data) for guarded in (True, False)]
    return Row(unit, "<= +1 %", "", measure(device, pairs, sides, turns), peak_memory(device, sides),
               "the whole step with the guard; with backward, clip_grad_norm_ and the same fused AdamW alone", True)

IGNORE = -100                                       # transformers' label of what is not asked
def padded(rows, length=0, pad=logbert.PAD):
    """List of (tokens, labels) -> two (B, T) int64, padded to length, or to the longest of them, as LogBERT does."""
    length = length or max(len(tokens) for tokens, _ in rows)
    return [torch.tensor([row + [fill] * (length - len(row)) for row in column])
            for column, fill in zip(zip(*rows), (pad, IGNORE))]

def token_loss(made, length, pad=logbert.PAD):
    """For plain_steps: the loss of a model of transformers; and a collate_fn, where made(row) -> tokens, labels."""
    def loss_of(model, tokens, labels):
        logits = model(input_ids=tokens, attention_mask=tokens != pad).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return loss_of, lambda rows: padded([made(row) for row in rows], length, pad)

PLAIN = "DataLoader, shuffled, AdamW, clip_grad_norm_, loss.item()"     # what plain_steps is, in the table
def plain_steps(device, config, model, rows, steps, loss_of, collate=None):
    """-> a side: `steps` optimizer steps of a plain loop; loss_of(model, the columns of a batch of rows)."""
    if len(rows) < config.batch_size:
        fail(f"{config.data_dir or 'demo'}: {len(rows)} training rows do not fill a batch of {config.batch_size}")
    model, dtype = model.train(), pick_dtype(config.dtype, device)[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.learning_rate)
    loader = DataLoader(rows, config.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    batches = (batch for _ in itertools.count() for batch in loader)        # epoch after epoch

    def side():
        for batch in itertools.islice(batches, steps):
            batch = [column.to(device) for column in batch]
            with autocast(device, dtype):
                loss = loss_of(model, *batch)
            plain_step(model, optimizer, loss, config)
            loss.item()                             # to be logged
        return steps * config.batch_size
    return side

# -------------------------------------------------------------------------------------------------------- train_edl
def gpt2(transformers, config, data, device):
    """transformers' GPT-2 of the size of our model, its head untied as ours is."""
    torch.manual_seed(config.seed)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(data.vocab), n_positions=data.block, n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, activation_function="gelu", resid_pdrop=config.dropout, embd_pdrop=config.dropout,
        attn_pdrop=config.dropout, bos_token_id=edl.BOS, eos_token_id=edl.EOS, pad_token_id=edl.EOS,
        tie_word_embeddings=False)).to(device)

@torch.no_grad()
def copy_weights(model, other):
    """Those of a MolGPT into a GPT-2 of its size, whose linear layers lie transposed."""
    names = {"token": "wte", "position": "wpe", "blocks": "h", "norm1": "ln_1", "attention": "attn", "qkv": "c_attn",
             "out": "c_proj", "norm2": "ln_2", "up": "mlp.c_fc", "down": "mlp.c_proj", "norm": "ln_f"}
    for name, mine in model.named_parameters():
        path = ".".join(names.get(part, part) for part in name.split("."))
        its = other.lm_head.weight if name == "head.weight" else other.transformer.get_parameter(path)
        its.copy_(mine.T if ".c_" in path and mine.dim() > 1 else mine)

def next_tokens(ids):
    """A molecule, an array of BOS, tokens and EOS -> what is read, what is asked (lists)"""
    return ids[:-1].tolist(), ids[1:].tolist()

MOSES = 1_584_663                                   # molecules of its train split
PEAKS = {"H100 80GB HBM3": 989e12, "H200$": 989e12, "A100": 312e12}     # of these names, in dense bfloat16 FLOP/s
def mfu(device, rate, *models):
    """FLOP/s of so many tokens/s through a model in training, and its teacher, as a share of the device's."""
    sizes = [(each, sum(p.numel() for p in model.parameters())) for each, model in zip((6, 2), models)]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = next((peak for known, peak in PEAKS.items() if re.search(known, name)), None)
    share = f"{rate * sum(each * n for each, n in sizes) / peak:.1%}" if peak else "-"      # not known
    return f"; MFU {share} ({' + '.join(f'{each} x {n:,}' for each, n in sizes)} parameters x tokens/s)"

def utilization(config, data, rate, device):
    """What else is known of a GPU that trains on so many molecules/s."""
    share = mfu(device, rate * data.length[data.rows["train"]].mean(), new_model(edl, config, data, device))
    return f"{share}; computed: {MOSES / rate:,.0f} s for {MOSES:,} molecules"

def edl_train(device, pairs, config, steps=edl.WINDOW, turns=5, longest=False):
    transformers, data = peer("transformers"), edl.load_data(config, device)
    table, length = data.table.cpu().numpy(), data.block if longest else 0
    starts, lengths = (column[data.rows["train"]].tolist() for column in (data.start, data.length))
    rows = [table[start:start + n + 1] for start, n in zip(starts, lengths)]
    sides, loss_of = [our_steps(edl, device, config, steps)], token_loss(next_tokens, length, edl.EOS)
    if transformers:
        sides.append(plain_steps(device, config, gpt2(transformers, config, data, device), rows, steps, *loss_of))
    rates = measure(device, pairs, sides, turns)
    more = utilization(config, data, np.median(rates[0]), device) if device.type == "cuda" or config.dry_run else ""
    return Row("molecules/s", ">= 1.6x", "transformers", rates, peak_memory(device, sides),
               f"optimizer steps of {config.batch_size} molecules with their batches, evidential head and guard; "
               f"transformers GPT2LMHeadModel padded to {length or 'the longest of a batch'}, {PLAIN}{more}")

def edl_sample(device, pairs, config, steps=300, n=256):
    transformers, data = peer("transformers"), edl.load_data(config, device)
    model = new_model(edl, config, data, device)
    our_steps(edl, device, config, steps, model=model)()            # or no molecule would end
    model.eval()
    if transformers:
        other = gpt2(transformers, config, data, device).eval()
        copy_weights(model, other)

    def plain():
        start = torch.full((n, 1), edl.BOS, device=device)
        drawn = other.generate(start, attention_mask=torch.ones_like(start), do_sample=True, use_cache=True, top_k=0,
                               top_p=1.0, temperature=1.0, max_new_tokens=data.block)
        return len(["".join(data.vocab[i] for i in ids if i > edl.EOS) for ids in drawn.tolist()])
    sides = [lambda: len(list(edl.generate(model, n, batch_size=n))), plain if transformers else None]
    return Row("molecules/s", ">= 3x", "transformers", measure(device, pairs, sides), peak_memory(device, sides),
               f"{n} SMILES drawn at once with a KV cache, ours with NLL and uncertainties; transformers "
               f"GPT2LMHeadModel.generate with the same weights, those of {steps} steps")

def edl_head(device, pairs, config, steps=edl.WINDOW, turns=5):
    sides = [our_steps(edl, device, edl.Config(**vars(config) | {"use_edl": on}), steps) for on in (True, False)]
    return Row("molecules/s", "<= +5 %", "", measure(device, pairs, sides, turns), peak_memory(device, sides),
               f"optimizer steps of {config.batch_size} molecules with the evidential head; with a plain softmax", True)

@contextlib.contextmanager
def two_workers(device, config, steps):
    """-> a side: both of two processes under DDP, started as torchrun would, take `steps` steps."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        about = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")
    command = [sys.executable, __file__, "--worker", json.dumps([device.type, vars(config), steps])]
    workers = [subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ
                                | about | dict(OMP_NUM_THREADS="1", RANK=str(i), LOCAL_RANK=str(i))) for i in range(2)]

    def side():
        for worker in workers:
            print(file=worker.stdin, flush=True)
        return sum(int(worker.stdout.readline()) for worker in workers)
    try:
        yield side
    finally:
        for worker in workers:                      # they hold nothing that is worth saving
            worker.kill()
            worker.communicate()

def work(kind, config, steps):
    """One of two_workers: each line on stdin asks for a piece of work; its end, as when the parent is gone, ends us."""
    device = launch(kind)
    side = our_steps(edl, device, edl.Config(**config), steps)
    for _ in sys.stdin:
        done = side()
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(done, flush=True)
    finish()

def edl_pair(device, pairs, config, steps=edl.WINDOW, turns=5):
    torch.set_num_threads(1)
    one, single = our_steps(edl, device, config, steps), device.type == "cuda" and torch.cuda.device_count() < 2
    with contextlib.nullcontext() if single else two_workers(device, config, steps) as two:
        rates = measure(device, pairs, [two, one], turns)
    return Row("molecules/s", ">= 1.8x", "", rates, [], f"optimizer steps of {config.batch_size} molecules each in two "
               "processes under DDP; in one alone; one thread each")

# ---------------------------------------------------------------------------------------------------- train_logbert
def bert(transformers, config, data):
    """transformers' BERT of the size of our model; 512 positions, as LogBERT has them."""
    torch.manual_seed(config.seed)
    return transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=logbert.FIRST_KEY + data.about["n_keys"], hidden_size=config.n_embd,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, intermediate_size=4 * config.n_embd,
        max_position_embeddings=512, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).to(data.device)

def masked(keys, places):
    """A list of ids and where it is masked -> tokens, labels (lists)"""
    tokens = [logbert.MASK if place in places else key for place, key in enumerate(keys)]
    labels = [key if place in places else IGNORE for place, key in enumerate(keys)]
    return [logbert.DIST] + tokens, [IGNORE] + labels

def masked_at_random(keys):
    """As LogBERT's own data set does, in Python whenever a session is drawn."""
    share = random.uniform(0, 0.5)
    return masked(keys, {place for place in range(len(keys)) if random.random() < share})

def logbert_train(device, pairs, config, steps=2 * logbert.WINDOW, turns=10, length=0):
    transformers, data = peer("transformers"), logbert.load_data(config, device)
    rows = [data.session(row).ids.tolist() for row in data.rows["train"]]
    sides, loss_of = [our_steps(logbert, device, config, steps)], token_loss(masked_at_random, length)
    if transformers:
        sides.append(plain_steps(device, config, bert(transformers, config, data), rows, steps, *loss_of))
    return Row("sessions/s", ">= 3x", "transformers", measure(device, pairs, sides, turns), peak_memory(device, sides),
               f"optimizer steps of {config.batch_size} sessions with their batches; transformers BertForMaskedLM, "
               f"masks in Python, padded to {length or 'the longest of a batch'}, {PLAIN}")

def logbert_score(device, pairs, config, view, sample=100):
    config, transformers = logbert.Config(**vars(config) | {"view": view}), peer("transformers")
    data = logbert.load_data(config, device)
    model, rows = new_model(logbert, config, data, device).eval(), data.rows["test"]
    drawn = [data.session(row).ids.tolist() for row in np.random.default_rng(0).permutation(rows)[:sample]]
    other = bert(transformers, config, data).eval() if transformers else None

    def distinct():                                 # as eval does
        _, first, which = np.unique(data.unique[rows], return_index=True, return_inverse=True)
        sessions = [data.session(row) for row in rows[first]]
        return len(logbert.score_sessions(model, sessions, config)[view][which])

    @torch.no_grad()
    def plain():
        asked = [masked(keys, {place}) for keys in drawn for place in range(len(keys))]
        first, nll = np.cumsum([0] + [len(keys) for keys in drawn[:-1]]), []
        for tokens, labels in DataLoader(asked, 64, collate_fn=padded):
            tokens, here = tokens.to(device), labels != IGNORE      # one place in each row
            logp = other(input_ids=tokens, attention_mask=tokens != logbert.PAD).logits.log_softmax(-1).cpu()
            nll += (-logp[here].gather(1, labels[here][:, None])[:, 0]).tolist()
        return len(np.maximum.reduceat(nll, first))     # each session's worst key
    sides = [distinct, plain if transformers else None]
    return Row("sessions/s", ">= 10x", "transformers", measure(device, pairs, sides), peak_memory(device, sides),
               f"the {len(rows):,} test sessions, equal {'multisets' if view == 'bag' else 'sequences'} once; "
               f"transformers BertForMaskedLM, {len(drawn)} of them drawn with a seed, keys masked "
               "in turn, DataLoader, 64 rows at once")

# ---------------------------------------------------------------------------------------------------- train_student
@torch.no_grad()
def dense_student(model):
    """A Student -> the same with the fingerprint's layer as one would write it first: all 6144 entries of a row."""
    other, old = copy.deepcopy(model), model.fingerprint
    other.fingerprint = new = torch.nn.Linear(*old.weight.weight.shape).to(old.bias.device).train(model.training)
    new.register_forward_pre_hook(lambda new, batch: F.dropout(batch[0]["fingerprint"], old.dropout, new.training))
    new.weight.copy_(old.weight.weight.T), new.bias.copy_(old.bias)
    return other

MORGAN = [GetMorganGenerator(radius=2, fpSize=size) for size in (features.ECFP_BITS, features.COUNT_BITS)]
def dense_rows(smiles, bins):
    """What a plain data set holds of k molecules -> fingerprint (k, 6144), mass (k,), fragments (k, 3, bins)."""
    rows = []
    for molecule in map(features.read_smiles, smiles):
        bits, counts = MORGAN[0].GetFingerprintAsNumPy(molecule), MORGAN[1].GetCountFingerprintAsNumPy(molecule)
        masses = np.array([features.mass_number(atom) for atom in molecule.GetAtoms()])
        (kind, member), histogram = features.fragments(molecule), np.zeros((3, bins), np.float32)
        mass = member @ masses
        shown = (kind > 0) & (mass < bins)
        np.add.at(histogram, (kind[shown] - 1, mass[shown]), 1)
        rows.append((np.concatenate([bits, np.log1p(counts)], dtype=np.float32), masses.sum(), np.log1p(histogram)))
    return [torch.from_numpy(np.stack(column)) for column in zip(*rows)]

def student_train(device, pairs, config, steps=4, turns=5, most=4_000):
    data = student.load_data(config)                # a plain data set stays on the host; its library does not
    spectra, pool = np.random.default_rng(0).permutation(data.spectra["train"])[:most], data.rows["train"]
    owner, bins = data.molecule[spectra], data.molecules.bins
    rows = TensorDataset(*dense_rows(map(data.smiles, owner), bins), data.dense(spectra).sqrt(), torch.tensor(owner))
    library, whose = data.dense(data.first[pool], True).to(device), torch.from_numpy(pool).to(device)
    def loss_of(model, fingerprint, mass, fragments, target, owner):
        drawn = torch.randperm(len(library), device=device)[:student.RIVALS]
        batch = {"fingerprint": fingerprint, "mass": mass, "fragments": fragments, "target": target, "micro": 0,
                 "rivals": library[drawn], "are_own": owner[:, None] == whose[drawn], "count": len(mass)}
        return student.compute_loss(model, batch, 0, config)[0]
    sides = [our_steps(student, device, config, steps),
             plain_steps(device, config, dense_student(new_model(student, config, data, device)), rows, steps, loss_of)]
    return Row("spectra/s", ">= 1x", "", measure(device, pairs, sides, turns), peak_memory(device, sides),
               f"optimizer steps of {config.batch_size} spectra with their batches and guard, no teacher; the same "
               f"model and loss in plain PyTorch, nn.Linear on dense rows, {len(rows):,} in memory, {PLAIN}")

def student_predict(device, pairs, config, n=256, turns=2):
    data = student.load_data(config, device)
    smiles = [data.smiles(row) for row in np.resize(data.rows["train"], n)]
    model, bins = new_model(student, config, data, device).eval(), data.molecules.bins
    other = dense_student(model)
    def mine():
        made = features.join([features.featurise(features.read_smiles(one), False) for one in smiles])
        return student.predict(model, Molecules(made, bins, device), np.arange(n))

    @torch.no_grad()
    def plain():
        columns = (column.to(device) for column in dense_rows(smiles, bins))
        root = other(dict(zip(("fingerprint", "mass", "fragments"), columns)))[0]
        return (root / root.amax(1, keepdim=True).clamp(min=1e-9)).square().cpu()
    torch.set_num_threads(1)
    torch.testing.assert_close(mine(), plain(), rtol=0, atol=1e-3)
    sides = [lambda: len(mine()), lambda: len(plain())]
    rates, memory = measure(device, pairs, sides, turns), peak_memory(device, sides)
    return Row("molecules/s", "<= 1 ms per molecule", "", rates, memory,
               f"SMILES to spectra, {n} at once, one thread, {1000 / np.median(rates[0]):.2f} ms each; RDKit's "
               "fingerprints as dense rows, the same fragments, the same model with nn.Linear")

# ---------------------------------------------------------------------------------------------------- train_adapter
# widths, text and heads of the UNet; VAE; layers and ids of the text encoder; pixels; rows. cuda: Stable Diffusion 1.5
SCENES = {"dry": ((32, 32), 32, 2, (32, 32), 1, 99, 16, 2),
          "cpu": ((64, 128, 128), 128, 2, (32, 64, 128, 128), 4, 9999, 256, 2),
          "cuda": ((320, 640, 1280, 1280), 768, 8, (128, 256, 512, 512), 12, 49408, 512, 8)}
def random_scenes(config, device, n=64):
    """-> the rows' Config, and Data of random latents and embeddings as prepare.py caches them, 1 to 8 boxes a row."""
    _, D, _, widths, *_, pixels, batch_size = SCENES["dry" if config.dry_run else device.type]
    draw, side = np.random.default_rng(0), pixels // 2 ** (len(widths) - 1)
    shapes = {"latents": (n, 4, side, side), "contexts": (n + 1, 77, D), "phrases": (80, D)}
    table = {name: draw.standard_normal(shape, np.float32).astype(np.float16) for name, shape in shapes.items()}
    (corner, size), there = draw.random((2, n, 8, 2), np.float32) / 2, np.arange(8) < draw.integers(1, 9, (n, 1))
    table |= {"boxes": np.concatenate([corner, corner + size], -1) * there[..., None], "caption": np.arange(1, n + 1),
              "phrase": np.where(there, draw.integers(80, size=(n, 8)), -1)}
    data = adapter.Data(Path(), {"kind": "latents", "slots": 8, "base": {}}, table, {"train": np.arange(n)}, device, "")
    return dataclasses.replace(config, box_mask=False, rms_norm=False, batch_size=batch_size), data

def new_adapter(config, data):
    """Gated layers on a frozen model of random weights for these rows: the toy's, or one as of Stable Diffusion 1."""
    widths, D, heads, *_ = SCENES["dry" if config.dry_run else data.device.type]
    raw = {"block_out_channels": widths, "cross_attention_dim": D, "attention_head_dim": heads,
           "down_block_types": ["CrossAttnDownBlock2D"] * (len(widths) - 1) + ["DownBlock2D"],
           "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (len(widths) - 1), "attention_type": "gated"}
    if data.toy:
        base = adapter.ToyBase(config.width, config.depth, config.patch, True)
        base.proj_out.reset_parameters()            # it starts at 0, and with it all gradients
    else:
        base = adapter.UNet(unet_shape(raw), raw)
        base.schedule = dataclasses.replace(adapter.TOY_SCHEDULE, prediction_type="epsilon")
    base.box_mask, base.rms_norm = config.box_mask, config.rms_norm
    adapter.reset_adapter(base)
    for fuser in (model := adapter.Adapter(base)).fusers:   # open, so that a difference shows
        fuser.alpha_attn.data.fill_(0.5), fuser.alpha_dense.data.fill_(-0.5)
    return model

def adapter_step(device, pairs, config, steps=1, turns=2, compiled=False):
    diffusers, (config, data) = peer("diffusers"), random_scenes(config, device)
    model, rows = new_model(adapter, config, data, device), adapter.get_rows(data, data.rows["train"])
    columns = [*(rows[name] for name in ("clean", "context", "boxes", "phrases")), rows["masks"][..., 0]]
    sides, unets = [our_steps(adapter, device, config, steps, model=model, data=data)], [model.base]
    if diffusers:
        unets.append(other := diffusers.UNet2DConditionModel(**model.base.raw).to(device))
        other.load_state_dict(model.base.state_dict())
        for name, parameter in other.named_parameters():
            parameter.requires_grad_(bool(GATED.search(name)))
        ddpm = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)

        def loss_of(unet, latents, context, boxes, phrases, masks):
            noise, times = torch.randn_like(latents), torch.randint(1000, latents.shape[:1], device=device)
            layout = {"gligen": {"boxes": boxes, "positive_embeddings": phrases, "masks": masks}}
            noisy = ddpm.add_noise(latents, noise, times)
            return F.mse_loss(unet(noisy, times, context, cross_attention_kwargs=layout).sample.float(), noise)
        sides.append(plain_steps(device, config, other, TensorDataset(*(x.cpu() for x in columns)), steps, loss_of))
    for unet in unets if compiled else []:          # its C++ for a CPU takes minutes, so a dry run only traces
        unet.compile(backend="inductor" if device.type == "cuda" else "eager")
    trained, frozen = (sum(p.numel() for p in model.base.parameters() if p.requires_grad == is_it) for is_it in (1, 0))
    return Row("images/s", ">= 1.2x" if compiled else ">= 1.0x, memory <= .8x", "diffusers",
               measure(device, pairs, sides, turns), peak_memory(device, sides),
               f"optimizer steps of {config.batch_size} cached latents {data.table['latents'].shape[1:]}, {trained:,} "
               f"trained and {frozen:,} frozen parameters{', both compiled' * compiled}, guard; diffusers UNet with "
               f"gated layers of the same weights, {PLAIN}")

def adapter_cached(device, pairs, config, steps=1, turns=2):
    _, D, _, widths, layers, vocab, pixels, n = SCENES["dry" if config.dry_run else device.type]
    config, data = random_scenes(config, device)
    cached, dtype = our_steps(adapter, device, config, steps, data=data), pick_dtype(config.dtype, device)[0]
    vae = VAE(dataclasses.replace(vae_shape({"layers_per_block": 2}), widths=widths))
    text = CLIPText(text_shape({"vocab_size": vocab, "hidden_size": D, "num_hidden_layers": layers}))
    for part in vae, text:
        part.eval().requires_grad_(False).to(device, dtype)
    pictures = torch.randn(n, 3, pixels, pixels, device=device, dtype=dtype)
    captions, phrases = (torch.randint(vocab, shape, device=device) for shape in ((n, 77), (4 * n, 8)))

    def encoding():
        for _ in range(steps):
            with torch.no_grad():
                vae.encode(pictures), text(captions), text(phrases)
        return cached()
    sides = [cached, encoding]
    return Row("images/s", ">= 1.5x", "", measure(device, pairs, sides, turns), peak_memory(device, sides),
               f"the first row's steps; the same, and pictures of {pixels} through a VAE of widths {widths}, captions "
               f"of 77 tokens and 4 phrases of 8 a row through a CLIP of {layers} layers {D} wide each time")

# ---------------------------------------------------------------------------------------------------- train_distill
def distill_rows(device, config, full=False, most=0):
    """The rows, at most so many, with GPT-2's 50257 ids however few of them they use; full: 64 rows of random tokens
    that fill max_length, the whole of them supervised -> Data"""
    vocab, n, length = 1000 if config.dry_run else 50257, 64, config.max_length
    own = dataclasses.replace(config, student="tiny", teacher="")   # a set's tokenizer is not that of random models
    data, draw = distill.load_data(own, device), np.random.default_rng(0)
    if full:
        table = torch.from_numpy(draw.integers(vocab, size=n * length, dtype=np.int32)).to(device)
        data = dataclasses.replace(data, table=table, start=np.arange(n) * length, length=np.full(n, length - 1),
                                   first=np.zeros(n, np.int64), rows={"train": np.arange(n)})
    rows = draw.permutation(data.rows["train"])
    return dataclasses.replace(data, vocab=max(vocab, data.vocab), rows={"train": rows[:most or None]})

GPT2S = {"dry": ((16, 1, 2), (32, 2, 2)), "cpu": ((256, 4, 4), (384, 6, 6)),     # width, layers, heads of the student
         "cuda": ((768, 12, 12), (1280, 36, 20))}   # and of its teacher; GPT-2 and GPT-2 large
@contextlib.contextmanager
def distill_models(device, config, full=False, most=0):
    """-> distill_rows, and the Config of a GPT-2 and its teacher, of random weights, in two folders beside them."""
    data = distill_rows(device, config, full, most)
    sizes = GPT2S["dry" if config.dry_run else device.type]
    with tempfile.TemporaryDirectory() as folder:
        for seed, (name, (width, layers, heads)) in enumerate(zip(("student", "teacher"), sizes)):
            torch.manual_seed(seed)
            raw = dict(model_type="gpt2", vocab_size=data.vocab, n_positions=config.max_length, n_embd=width,
                       n_layer=layers, n_head=heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
            distill.save_hf(distill.Decoder(raw), f"{folder}/{name}")
        data.folder = Path(folder)                  # for the cache too
        yield data, dataclasses.replace(config, student=f"{folder}/student", teacher=f"{folder}/teacher")

def original_loss(logits, teacher_logits, ce, config):
    """As one writes it first: the divergence is a sum over tokens and pads, divided by rows."""
    T = config.temperature
    kd = F.kl_div(F.log_softmax(logits / T, dim=-1), F.softmax(teacher_logits / T, dim=-1), reduction="batchmean")
    return config.alpha * kd * T ** 2 + (1 - config.alpha) * ce

def labelled(data, rows):
    """Their tokens and, where they are supervised, labels, as transformers' models shift them -> list of two lists."""
    tokens = [data.table[start:start + n + 1].tolist() for start, n in zip(data.start[rows], data.length[rows])]
    return [(ids, [IGNORE] * (first + 1) + ids[first + 1:]) for ids, first in zip(tokens, data.first[rows].tolist())]

def taken(data, step, config):
    """The rows that get_batch takes at a step, (batch_size,)."""
    n, size = config.batch_size, max(1, min(distill.WINDOW, len(data.rows["train"]) // config.batch_size // 4))
    return distill.bucketed_rows(data, "train", n, config.seed, step // size, size)[step % size]

def trainer_steps(device, config, data, steps, length=0):
    """-> a side: `steps` optimizer steps of transformers' Trainer with original_loss, on our batches, padded to length,
    or to their longest. Its start-up is 1 to 3 % of four such steps."""
    import transformers
    transformers.utils.logging.disable_progress_bar()
    model, teacher = (transformers.AutoModelForCausalLM.from_pretrained(folder).to(device)
                      for folder in (config.student, config.teacher))
    teacher.eval().requires_grad_(False)
    data, dtype, turns = copy.copy(data), pick_dtype(config.dtype, device)[0], itertools.count(FIRST)

    class Distiller(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            with torch.no_grad(), autocast(device, dtype):
                taught = teacher(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            return original_loss(outputs.logits, taught.logits, outputs.loss, config)

    def collate(rows):
        tokens, labels = padded(rows, length, -1)
        return {"input_ids": tokens.clamp(min=0), "labels": labels, "attention_mask": (tokens >= 0).long()}

    arguments = transformers.TrainingArguments(
        str(Path(config.student).with_name("trainer")), per_device_train_batch_size=config.batch_size, max_steps=steps,
        learning_rate=config.learning_rate, max_grad_norm=config.grad_clip, bf16=dtype == torch.bfloat16,
        use_cpu=device.type == "cpu", train_sampling_strategy="sequential", remove_unused_columns=False, report_to=[],
        disable_tqdm=True, save_strategy="no", logging_strategy="no")
    arguments._n_gpu = min(1, arguments.n_gpu)      # or it would take all GPUs of the machine
    trainer = Distiller(model, arguments, collate)
    trainer.remove_callback(transformers.PrinterCallback)

    def side():
        trainer.train_dataset = [row for step in itertools.islice(turns, steps)
                                 for row in labelled(data, taken(data, step, config))]
        trainer.train()
        return steps * config.batch_size
    return side

def distill_train(device, pairs, config, steps=4, turns=1, longest=False, cached=False, full=None):
    full = device.type == "cuda" and not longest if full is None else full      # a GPU's MFU is that of full rows
    length, there = 0 if longest else config.max_length, peer("accelerate") and peer("transformers")
    with distill_models(device, config, full, 96 * cached) as (data, config):
        if cached:
            config = dataclasses.replace(config, cache_teacher=64)
            data = dataclasses.replace(data, cache=cached_teacher(distill, config, data))
        sides = [our_steps(distill, device, config, steps, data=data),
                 trainer_steps(device, config, data, steps, length) if there else None]
        rates = measure(device, pairs, sides, turns) * data.length[data.rows["train"]].mean()
        memory, more = peak_memory(device, sides), ""
        if device.type == "cuda" or config.dry_run:
            models = [distill.load_hf(folder, device) for folder in (config.student, config.teacher)]
            more = mfu(device, np.median(rates[0]), *models)
    share = data.asked[data.rows["train"]].sum() / data.length[data.rows["train"]].sum()
    rows = f"rows of {config.max_length} random tokens" if full else f"rows, {share:.0%} of their tokens supervised"
    return Row("tokens/s, without pads", ">= 2x" if cached else ">= 1x" if longest else ">= 1.5x",
               "transformers accelerate", rates, memory,
               f"optimizer steps of {config.batch_size} {rows}, GPT-2s of {data.vocab:,} ids, teacher "
               f"{'cached, 64 a token' if cached else 'asked each time'}, guard; transformers Trainer, {steps} "
               f"step{'s' * (steps > 1)} a piece, KL of all positions, the same weights and batches, padded to "
               f"{length or 'their longest'}{more}")

def distill_loss(device, pairs, config, vocab, B, T=512, widths=(768, 1280)):
    torch.manual_seed(0)
    (h, taught_h), (W, taught_W) = ([torch.randn(n, width, device=device) / scale for width in widths]
                                    for n, scale in ((B * T, 1), (vocab, 50)))
    h.requires_grad_(), W.requires_grad_()
    targets = torch.randint(vocab, (B * T,), device=device)
    asked = (torch.arange(T, device=device) < int(0.6 * T)).repeat(B)       # and 40 % padding
    place, n = asked.nonzero()[:, 0], int(asked.sum())
    mix = distill.Mix(vocab, 1 / n, config.alpha, config.temperature)

    def chunked():
        taught = {"h": taught_h[place], "weight": taught_W}
        return distill.ChunkedLoss.apply(h[place], W, targets[place], asked[place].float(), taught, mix)[0]

    def whole():
        logits, taught = ((x @ weight.T).view(B, T, vocab) for x, weight in ((h, W), (taught_h, taught_W)))
        ce = F.cross_entropy(logits.flatten(0, 1), targets.where(asked, IGNORE))
        return original_loss(logits, taught, ce, config)

    def side(loss_of):
        loss_of().backward()
        h.grad = W.grad = None
        return n
    sides = [functools.partial(side, loss_of) for loss_of in (chunked, whole)]
    rates, peaks = measure(device, pairs, sides), peak_memory(device, sides)
    memory = [peak - 4 * (W.numel() + h.numel()) for peak in peaks]
    return Row("positions/s", "<= 100 MiB on a CPU", "", rates, memory,
               f"loss and backward of {n} supervised positions of {B} x {T}, widths {widths[0]} and {widths[1]}: "
               f"{memory[0] / 2 ** 20:,.0f} MiB; logits (B, T, V) of both models, the same formula as the Trainer's: "
               f"{memory[1] / 2 ** 20:,.0f} MiB; both above weights and inputs and without the gradients of these")

def distill_guard(device, pairs, config, steps=2, turns=3):
    with distill_models(device, config) as (data, config):
        return guard_cost(device, pairs, config, distill, "rows/s", steps, turns, data)

# ------------------------------------------------------------------------------------------------------------- main
TINY = dict(steps=1, turns=1)
ROWS = {                                            # a function, what it is told, and what else in a dry run
    "train_edl train": (edl_train, {}, TINY),
    "train_edl train, peer padded to the longest row": (edl_train, dict(longest=True, turns=3), TINY),
    "train_edl sample": (edl_sample, {}, dict(steps=2, n=8)),
    "train_edl evidential head on / off": (edl_head, {}, TINY),
    "train_edl guard on / off": (guard_cost, dict(script=edl, unit="molecules/s"), TINY),
    "train_edl two processes / one": (edl_pair, {}, TINY),
    "train_logbert train": (logbert_train, {}, TINY),
    "train_logbert train, peer padded to 512": (logbert_train, dict(steps=4, turns=1, length=512), dict(steps=1)),
    "train_logbert score, bag view": (logbert_score, dict(view="bag"), dict(sample=3)),
    "train_logbert score, ordered view": (logbert_score, dict(view="ordered"), dict(sample=3)),
    "train_logbert guard on / off": (guard_cost, dict(script=logbert, unit="sessions/s"), TINY),
    "train_student train": (student_train, {}, TINY),
    "train_student predict": (student_predict, {}, dict(n=8, turns=1)),
    "train_student guard on / off": (guard_cost, dict(script=student, unit="spectra/s", turns=5), TINY),
    "train_distill train": (distill_train, dict(steps=2), TINY | dict(full=True)),
    "train_distill train, peer padded to its longest": (distill_train, dict(longest=True), TINY),
    "train_distill train, teacher cached": (distill_train, dict(longest=True, cached=True), TINY),
    "train_distill loss memory, V 50257": (distill_loss, dict(vocab=50257, B=2), dict(vocab=499, T=20)),
    "train_distill loss memory, V 151936": (distill_loss, dict(vocab=151936, B=1), dict(vocab=499, T=20)),
    "train_distill guard on / off": (distill_guard, {}, TINY),
    "train_adapter step": (adapter_step, {}, TINY),
    "train_adapter step, both compiled": (adapter_step, dict(compiled=True), TINY),      # with --gpu
    "train_adapter step, latents and texts cached": (adapter_cached, {}, TINY),
    "train_adapter guard on / off": (guard_cost, dict(script=adapter, unit="images/s", turns=5), TINY),
}
SCRIPTS = {"train_edl": (edl, "molecules"), "train_student": (student, "spectra"), "train_distill": (distill, "text"),
           "train_adapter": (adapter, "scenes")}
CHANGED = {student: {"phase": "student"}, distill: {"phase": "student", "batch_size": 4},
           adapter: adapter.DEMO | {"phase": "adapter"}}

def settings(script, device, dry_run, data_dir=""):
    """The script's own Config on this device; without a teacher, or as for a user's own models."""
    large = script is distill and device.type == "cuda"
    return script.Config(**(getattr(script, "CPU", {}) if device.type == "cpu" else {}) | CHANGED.get(script, {})
                         | (dict(dtype="bfloat16", batch_size=8, max_length=1024) if large else {})
                         | (script.DRY | {"dry_run": True} if dry_run else {}), data_dir=data_dir)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="rows whose names hold one of these; none: all")
    parser.add_argument("--full", action="store_true", help="15 pairs instead of 5")
    parser.add_argument("--gpu", action="store_true", help="on cuda")
    parser.add_argument("--dry_run", action="store_true", help="1 pair of tiny sizes: does every row run?")
    for name, (_, flag) in SCRIPTS.items():
        parser.add_argument(f"--{flag}", default="", help=f"prepared set of {name}'s rows; empty: the demo set")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)         # see two_workers
    flags = parser.parse_args(argv)
    if flags.worker:
        return work(*json.loads(flags.worker))
    chosen = [name for name in ROWS if (flags.gpu or "compiled" not in name)
              and (not flags.names or any(word in name for word in flags.names))]
    if not chosen or flags.threads < 1:
        fail(f"--threads must be above 0, and each name a part of one of these: {', '.join(ROWS)}")
    cuda = flags.gpu and torch.cuda.is_available()
    if flags.gpu and not cuda:
        if not flags.dry_run:
            fail("--gpu: torch sees no CUDA device here; leave the flag out to measure the CPU")
        print("--gpu --dry_run: torch sees no CUDA device here, so the same code runs on the CPU")
    device, pairs = torch.device("cuda" if cuda else "cpu"), 1 if flags.dry_run else 15 if flags.full else 5
    where = f"{torch.cuda.get_device_name()}, {time.strftime('%Y-%m-%d')}" if cuda else "CPU"
    names = "torch", "diffusers", "transformers", "accelerate"
    found = [f"{name} {it.__version__}" for name in names if (it := peer(name))]
    print(f"{where}, torch threads: {flags.threads}, {', '.join(found)}; medians of {pairs} pairs (range)\n\n"
          "| row | ours | peer | unit | ratio | goal | peak of tensors, ours / peer | what was compared |\n"
          "|---|---|---|---|---|---|---|---|", flush=True)
    for name in chosen:
        row, more, tiny = ROWS[name]
        script, flag = SCRIPTS.get(name.split()[0], (logbert, ""))
        config = settings(script, device, flags.dry_run, getattr(flags, flag, ""))
        torch.set_num_threads(flags.threads)                    # the row before may have changed that
        with contextlib.redirect_stdout(sys.stderr):            # what the scripts say is no line of the table
            done = row(device, pairs, config, **more | (tiny if flags.dry_run else {}))
        print(line(name, done), flush=True)

if __name__ == "__main__":
    main()
