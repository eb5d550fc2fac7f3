"""
Side by side: each script against what a user would run instead, interleaved in one process, on the same data.

python bench.py                                       # all rows, some minutes on a CPU -> a table in Markdown
python bench.py guard "logbert train"                 # the rows whose names hold one of these words
python bench.py --full                                # 15 pairs of runs instead of 5
python bench.py --molecules DIR                       # a prepared set instead of the demo set
python bench.py --gpu                                 # the same rows on cuda
python bench.py --gpu --dry_run                       # does it all run? tiny, in seconds, without a GPU too
pip install diffusers transformers accelerate         # the peers; a row without its own says so, no ratio

A row times a piece of our work and one of the peer's, in turns, after one untimed piece of each. A ratio is made of
neighbours only, so that what else the machine does falls on both; its median stands before its range over the pairs,
and a rate is a median too. The floor of our piece is the time of its products at the rate of one large product, and of
what all other operations read and write at the rate of a large copy; both rates are measured first. Whoever adds a row
writes a function and gives it a name in ROWS.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib.util
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
from types import SimpleNamespace
from typing import NamedTuple

# or torch's profiler, the peers and two_workers talk into the table
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error",
               "DIFFUSERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402

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

# ------------------------------------------------------------------------------------------------------- measuring
# A side is a function that does a piece of work and answers how much, in the unit of its row
class Row(NamedTuple):
    unit: str  # of the rates, as sessions/s
    goal: str  # of the ratio, or of our rate
    peer: str  # the package that the other side needs; empty: a second device, if anything
    rates: np.ndarray  # (1, pairs) ours, or (2, pairs) ours and the peer's
    seen: SimpleNamespace | None  # see look; None: not told
    compared: str  # what with what
    percent: bool = False  # say what ours takes longer, instead of how many times as fast it is

def peer(name):
    """The module of a package that a row compares with, None if it is not installed."""
    return importlib.import_module(name) if importlib.util.find_spec(name) else None

def measure(device, pairs, sides, turns=1):
    """Rates of the sides that are not None, (sides, pairs). A pair adds up `turns` turns, each of every side once, by
    turns forwards and backwards: many short ones share what disturbs them better than few long ones."""
    sides, wait = [side for side in sides if side], torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for side in sides:
        side()
    done = np.zeros((2, len(sides), pairs))         # work, seconds
    for pair, turn in itertools.product(range(pairs), range(turns)):
        for i in range(len(sides))[::-1 if (pair * turns + turn) % 2 else 1]:
            wait()
            start = time.perf_counter()
            work = sides[i]()
            wait()
            done[:, i, pair] += work, time.perf_counter() - start
    return done[0] / done[1]

aten = torch.ops.aten
FLOPS = flop_registry | {aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
    aten._scaled_dot_product_flash_attention], aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward]}
PICK = {aten.index, aten.index_select, aten.gather, aten.embedding, aten._embedding_bag}    # read some of a table
READS = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select}            # the host waits for these

class Cost(TorchDispatchMode):
    """What runs under it: flops of its products, bytes that its other operations move, how often the host reads."""
    flops = moved = reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, op = func(*args, **(kwargs or {})), func.overloadpacket
        self.reads += op in READS
        if op in FLOPS:
            self.flops += FLOPS[op](*args, **(kwargs or {}), out_val=out)
        elif not func.is_view and op is not aten.detach:
            written = [given for given, one in zip(args, func._schema.arguments) if one.is_write] or out
            tensors = tree_leaves((written, out if op in PICK else args))
            self.moved += sum(tensor.nbytes for tensor in tensors if torch.is_tensor(tensor))
        return out

@functools.cache
def ceilings(device, dtype):
    """-> FLOP/s of one large product in this dtype, bytes/s of a large copy, read and written."""
    n, m = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 26)
    a, x, y = torch.randn(n, n, device=device, dtype=dtype), *torch.rand(2, m, device=device)     # written
    rates = measure(device, 5, [lambda: 2 * n ** 3 * len([a @ a for _ in range(8)]), lambda: 2 * y.copy_(x).nbytes])
    return np.median(rates, 1).tolist()

def look(device, sides, floor=True):
    """Run each side once more -> memory, bytes of tensors that each holds at most, above what lay there before
    (weights, optimizer state); longest, where ours spends most time; its work, and with floor its Cost. One process
    runs all sides, so that its own peak would tell nothing; numpy is not counted."""
    sides, cuda, seen = [side for side in sides if side], device.type == "cuda", SimpleNamespace(memory=[], work=0)
    for side in sides[::-1]:
        before = torch.cuda.memory_allocated() if cuda else 0
        torch.cuda.reset_peak_memory_stats() if cuda else None
        with torch.profiler.profile(profile_memory=not cuda) as found:
            side()
        events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        seen.memory.insert(0, torch.cuda.max_memory_allocated() - before if cuda else
                           max(itertools.accumulate(event.nbytes() for event in events), default=0))
    spent = {event.key.removeprefix("aten::")[:24]: event.self_device_time_total if cuda else event.self_cpu_time_total
             for event in found.key_averages()}
    seen.longest = ", ".join(f"{name} {spent[name] / max(1, sum(spent.values())):.0%}"
                             for name in sorted(spent, key=spent.get)[:-4:-1])
    with Cost() if floor else contextlib.nullcontext() as seen.cost:
        seen.work = sides[0]() if floor else 0
    return seen

def ratio(row):
    """What stands in the table: median and range of the pairs' own ratios."""
    if len(row.rates) < 2:
        return f"not installed: pip install {row.peer}" if row.peer else "needs two devices"
    mine, other = row.rates
    values, text = (100 * (other / mine - 1), "{:+.1f} % ({:+.1f} ... {:+.1f})") if row.percent else \
        (mine / other, "{:.1f}x ({:.1f} ... {:.1f})")
    return text.format(np.median(values), values.min(), values.max())

PEAKS = {"H100 80GB HBM3": 989e12, "H200$": 989e12, "A100": 312e12}     # of these names, in dense bfloat16 FLOP/s
def floor(row, device, dtype):
    """How many times its floor our side takes, what the floor is made of, and the MFU on a GPU that is known -> str"""
    if not row.seen or not row.seen.cost:
        return "-"
    cost, spent = row.seen.cost, row.seen.work / np.median(row.rates[0])
    products, copies = (x / rate for x, rate in zip((cost.flops, cost.moved), ceilings(device, dtype)))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    mfu = [f"; MFU {cost.flops / spent / peak:.1%}" for known, peak in PEAKS.items() if re.search(known, name)]
    return (f"{spent / (products + copies):.1f}x, {products / (products + copies):.0%} of it products; "
            f"{row.seen.longest}{''.join(mfu)}")

def line(name, row, above="-"):
    """A row, and what floor() says of it -> its line of the Markdown table."""
    mine, other = [*(f"{np.median(rate):,.0f}" for rate in row.rates), "-"][:2]
    memory = " / ".join(f"{peak / 1e6:.1f} MB" for peak in row.seen.memory) if row.seen else "-"
    return f"| {' | '.join((name, mine, other, row.unit, ratio(row), row.goal, memory, above, row.compared))} |"

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

def guard_cost(device, pairs, config, script, unit, steps=4, turns=0, data=None):
    if script is distill and data is None:
        with distill_models(device, config) as (data, config):
            return guard_cost(device, pairs, config, script, unit, 2, turns or 3, data)
    turns = turns or {adapter: 3, student: 10}.get(script, 30)
    sides = [our_steps(script, device, config, steps, guarded, data=data) for guarded in (True, False)]
    rates, seen = measure(device, pairs, sides, turns), look(device, sides)
    return Row(unit, "<= +1 %", "", rates, seen, "the whole step with the guard; with backward, clip_grad_norm_ and "
               f"the same fused AdamW alone. In {steps} steps the host reads the device {seen.cost.reads} times", True)

def growth(device, pairs, config, script, kind, unit, steps=4, turns=3, sizes=(500, 2000, 8000)):
    """The same steps on 16 times the rows, and how long prepare.py takes for 1, 4 and 16 times."""
    with tempfile.TemporaryDirectory() as folder:
        sides, spent = [], []
        for size in map(str, sizes):
            start = time.perf_counter()
            subprocess.run([sys.executable, Path(__file__).parent / f"data/{kind}/prepare.py", "--demo", "--limit",
                            size, "--name", size, "--out_dir", folder], check=True, stdout=sys.stderr)
            spent.append(f"{int(size):,} rows in {time.perf_counter() - start:.1f} s, "
                         f"{sum(file.stat().st_size for file in Path(folder, size).iterdir()) / 1e6:.2f} MB")
            here = dataclasses.replace(config, data_dir=f"{folder}/{size}")
            sides.append(our_steps(script, device, here, steps, data=script.load_data(here, device)))
    sides = [sides[-1], sides[0]]
    rates, seen = measure(device, pairs, sides, turns), look(device, sides)
    return Row(unit, "constant", "", rates, seen, f"optimizer steps of {config.batch_size} on {sizes[-1]:,} rows; on "
               f"{sizes[0]:,}. prepare.py, its start-up too, and its files: {'; '.join(spent)}", True)

IGNORE = -100                                       # transformers' label of what is not asked
def padded(rows, pad=logbert.PAD):
    """List of (tokens, labels) -> two (B, T) int64, padded to the longest of them."""
    length = max(len(tokens) for tokens, _ in rows)
    return [torch.tensor([row + [fill] * (length - len(row)) for row in column])
            for column, fill in zip(zip(*rows), (pad, IGNORE))]

def token_loss(made, pad=logbert.PAD):
    """For plain_steps: the loss of a model of transformers; and a collate_fn, where made(row) -> tokens, labels."""
    def loss_of(model, tokens, labels):
        logits = model(input_ids=tokens, attention_mask=tokens != pad).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return loss_of, lambda rows: padded([made(row) for row in rows], pad)

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
def edl_train(device, pairs, config, steps=edl.WINDOW, turns=5):
    transformers, data = peer("transformers"), edl.load_data(config, device)
    table, own = data.table.cpu().numpy(), data.rows["train"]
    rows = [table[start:start + n + 1] for start, n in zip(data.start[own].tolist(), data.length[own].tolist())]
    sides = [our_steps(edl, device, config, steps), transformers and plain_steps(
        device, config, gpt2(transformers, config, data, device), rows, steps, *token_loss(next_tokens, edl.EOS))]
    rates = measure(device, pairs, sides, turns)
    return Row("molecules/s", ">= 1.6x", "transformers", rates, look(device, sides),
               f"optimizer steps of {config.batch_size} molecules with their batches, evidential head and guard; "
               f"transformers GPT2LMHeadModel padded to the longest of a batch, {PLAIN}. Computed: "
               f"{MOSES / np.median(rates[0]):,.0f} s for the {MOSES:,} molecules of MOSES")

def edl_sample(device, pairs, config, steps=300, n=256):
    transformers, data = peer("transformers"), edl.load_data(config, device)
    model, other = new_model(edl, config, data, device), transformers and gpt2(transformers, config, data, device)
    our_steps(edl, device, config, steps, model=model)()            # or no molecule would end
    for each in filter(None, (model, other)):
        copy_weights(model, each.eval()) if each is other else each.eval()

    def plain():
        start = torch.full((n, 1), edl.BOS, device=device)
        drawn = other.generate(start, attention_mask=torch.ones_like(start), do_sample=True, use_cache=True, top_k=0,
                               top_p=1.0, temperature=1.0, max_new_tokens=data.block)
        return len(["".join(data.vocab[i] for i in ids if i > edl.EOS) for ids in drawn.tolist()])
    sides = [lambda: len(list(edl.generate(model, n, batch_size=n))), plain if transformers else None]
    return Row("molecules/s", ">= 3x", "transformers", measure(device, pairs, sides), look(device, sides),
               f"{n} SMILES drawn at once with a KV cache, ours with NLL and uncertainties; transformers "
               f"GPT2LMHeadModel.generate with the same weights, those of {steps} steps")

def edl_head(device, pairs, config, steps=edl.WINDOW, turns=5):
    sides = [our_steps(edl, device, edl.Config(**vars(config) | {"use_edl": on}), steps) for on in (True, False)]
    return Row("molecules/s", "<= +5 %", "", measure(device, pairs, sides, turns), look(device, sides),
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
    return Row("molecules/s", ">= 1.8x", "", rates, None, f"optimizer steps of {config.batch_size} molecules each in "
               "two processes under DDP; in one alone; one thread each")

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

def logbert_train(device, pairs, config, steps=2 * logbert.WINDOW, turns=10):
    transformers, data = peer("transformers"), logbert.load_data(config, device)
    rows = [data.session(row).ids.tolist() for row in data.rows["train"]]
    sides = [our_steps(logbert, device, config, steps), transformers and plain_steps(
        device, config, bert(transformers, config, data), rows, steps, *token_loss(masked_at_random))]
    return Row("sessions/s", ">= 3x", "transformers", measure(device, pairs, sides, turns), look(device, sides),
               f"optimizer steps of {config.batch_size} sessions with their batches and guard; transformers "
               f"BertForMaskedLM, masks in Python, padded to the longest of a batch, {PLAIN}")

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
    return Row("sessions/s", ">= 10x", "transformers", measure(device, pairs, sides), look(device, sides),
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
    return Row("spectra/s", ">= 2x", "", measure(device, pairs, sides, turns), look(device, sides),
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
    rates, seen = measure(device, pairs, sides, turns), look(device, sides)
    return Row("molecules/s", "<= 1 ms per molecule", "", rates, seen,
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
               measure(device, pairs, sides, turns), look(device, sides, not compiled),
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
    return Row("images/s", ">= 1.5x", "", measure(device, pairs, sides, turns), look(device, sides),
               f"the first row's steps; the same, and pictures of {pixels} through a VAE of widths {widths}, captions "
               f"of 77 tokens and 4 phrases of 8 a row through a CLIP of {layers} layers {D} wide each time")

# ---------------------------------------------------------------------------------------------------- train_distill
def distill_rows(device, config):
    """The rows, with GPT-2's 50257 ids however few of them they use -> Data"""
    own = dataclasses.replace(config, student="tiny", teacher="")   # a set's tokenizer is not that of random models
    data = distill.load_data(own, device)
    rows = np.random.default_rng(0).permutation(data.rows["train"])
    return dataclasses.replace(data, vocab=max(1000 if config.dry_run else 50257, data.vocab), rows={"train": rows})

GPT2S = {"dry": ((16, 1, 2), (32, 2, 2)), "cpu": ((256, 4, 4), (384, 6, 6)),     # width, layers, heads of the student
         "cuda": ((768, 12, 12), (1280, 36, 20))}   # and of its teacher; GPT-2 and GPT-2 large
@contextlib.contextmanager
def distill_models(device, config):
    """-> distill_rows, and the Config of a GPT-2 and its teacher, of random weights, in two folders beside them."""
    data = distill_rows(device, config)
    sizes = GPT2S["dry" if config.dry_run else device.type]
    with tempfile.TemporaryDirectory() as folder:
        for seed, (name, (width, layers, heads)) in enumerate(zip(("student", "teacher"), sizes)):
            torch.manual_seed(seed)
            raw = dict(model_type="gpt2", vocab_size=data.vocab, n_positions=config.max_length, n_embd=width,
                       n_layer=layers, n_head=heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
            distill.save_hf(distill.Decoder(raw), f"{folder}/{name}")
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

def trainer_steps(device, config, data, steps):
    """-> a side: `steps` optimizer steps of transformers' Trainer with original_loss, on our batches, padded to their
    longest. Its start-up is 2 to 6 % of two such steps."""
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
        tokens, labels = padded(rows, -1)
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

def distill_train(device, pairs, config, steps=2, turns=1):
    there = peer("accelerate") and peer("transformers")
    with distill_models(device, config) as (data, config):
        sides = [our_steps(distill, device, config, steps, data=data),
                 trainer_steps(device, config, data, steps) if there else None]
        rates, seen = measure(device, pairs, sides, turns), look(device, sides)
    tokens = data.length[data.rows["train"]].mean()         # of a row
    seen.work *= tokens
    return Row("tokens/s, without pads", ">= 1.5x", "transformers accelerate", rates * tokens, seen,
               f"optimizer steps of {config.batch_size} rows, {data.asked[data.rows['train']].mean() / tokens:.0%} of "
               f"their tokens supervised, GPT-2s of {data.vocab:,} ids, guard; transformers Trainer, {steps} steps a "
               "piece, KL of all positions, the same weights and batches, padded to their longest")

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
    rates, seen = measure(device, pairs, sides), look(device, sides)
    seen.memory = memory = [peak - 4 * (W.numel() + h.numel()) for peak in seen.memory]
    return Row("positions/s", "memory <= .1x", "", rates, seen,
               f"loss and backward of {n} supervised positions of {B} x {T}, widths {widths[0]} and {widths[1]}: "
               f"{memory[0] / 2 ** 20:,.0f} MiB; logits (B, T, V) of both models, the same formula as the Trainer's: "
               f"{memory[1] / 2 ** 20:,.0f} MiB; both above weights and inputs and without the gradients of these")

# ------------------------------------------------------------------------------------------------------------- main
TINY = dict(steps=1, turns=1)
ROWS = {                                            # a function, what it is told, and what else in a dry run
    "train_edl train": (edl_train, {}, TINY),
    "train_edl sample": (edl_sample, {}, dict(steps=2, n=8)),
    "train_edl evidential head on / off": (edl_head, {}, TINY),
    "train_edl two processes / one": (edl_pair, {}, TINY),
    "train_student train": (student_train, {}, TINY),
    "train_student predict": (student_predict, {}, dict(n=8, turns=1)),
    "train_distill train": (distill_train, {}, TINY),
    "train_distill loss, V 50257": (distill_loss, dict(vocab=50257, B=2), dict(vocab=499, T=20)),
    "train_distill loss, V 151936": (distill_loss, dict(vocab=151936, B=1), dict(vocab=499, T=20)),
    "train_adapter step": (adapter_step, {}, TINY),
    "train_adapter step, both compiled": (adapter_step, dict(compiled=True), TINY),      # with --gpu
    "train_adapter step, latents and texts cached": (adapter_cached, {}, TINY),
    "train_logbert train": (logbert_train, {}, TINY),
    "train_logbert score, bag view": (logbert_score, dict(view="bag"), dict(sample=3)),
    "train_logbert score, ordered view": (logbert_score, dict(view="ordered"), dict(sample=3)),
}
SETS = {"train_edl": (edl, "molecules", "molecules/s"), "train_student": (student, "spectra", "spectra/s"),
        "train_distill": (distill, "text", "rows/s"), "train_adapter": (adapter, "scenes", "images/s"),
        "train_logbert": (logbert, "logs", "sessions/s")}       # script, kind of data, unit
for _name, (_script, _kind, _unit) in SETS.items():
    about = dict(script=_script, unit=_unit)
    ROWS |= {f"{_name} guard on / off": (guard_cost, about, TINY), f"{_name} 16x / 1x the rows": (
        growth, about | dict(kind=_kind), TINY | dict(sizes=(200, 210)))}
ROWS = dict(sorted(ROWS.items(), key=lambda row: [*SETS].index(row[0].split()[0])))
CHANGED = {student: {"phase": "student"}, distill: {"phase": "student", "batch_size": 4},
           adapter: adapter.DEMO | {"phase": "adapter"}}

def settings(script, device, dry_run, data_dir=""):
    """The script's own Config on this device; without a teacher, or as for a user's own models."""
    large = script is distill and device.type == "cuda"
    return script.Config(**(getattr(script, "CPU", {}) if device.type == "cpu" else {}) | CHANGED.get(script, {})
                         | (dict(dtype="bfloat16", batch_size=64) if large else {})
                         | (script.DRY | {"dry_run": True} if dry_run else {}), data_dir=data_dir)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="rows whose names hold one of these; none: all")
    parser.add_argument("--full", action="store_true", help="15 pairs instead of 5")
    parser.add_argument("--gpu", action="store_true", help="on cuda")
    parser.add_argument("--dry_run", action="store_true", help="1 pair of tiny sizes: does every row run?")
    for name, (_, flag, _) in SETS.items():
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
          "| row | ours | peer | unit | ratio | goal | peak of tensors, ours / peer | ours to its floor; longest | "
          "what was compared |\n" + "|---" * 9 + "|", flush=True)
    for name in chosen:
        row, more, tiny = ROWS[name]
        script, flag, _ = SETS[name.split()[0]]
        config = settings(script, device, flags.dry_run, getattr(flags, flag))
        torch.set_num_threads(flags.threads)                    # the row before may have changed that
        with contextlib.redirect_stdout(sys.stderr):            # what the scripts say is no line of the table
            done = row(device, pairs, config, **more | (tiny if flags.dry_run else {}))
            above = floor(done, device, pick_dtype(config.dtype, device)[0])
        print(line(name, done, above), flush=True)

if __name__ == "__main__":
    main()
