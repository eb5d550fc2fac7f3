"""
Side by side: each script against what a user would run instead, interleaved in one process, on the same data.

python bench.py                                       # all rows, a few minutes on a CPU -> a table in Markdown
python bench.py guard "logbert train"                 # the rows whose names hold one of these words
python bench.py --full                                # 15 pairs of runs instead of 5
python bench.py --gpu                                 # the same rows on cuda
pip install transformers drain3                       # the peers; without one, its row has no ratio and says so

A row times a piece of our work, then one of the peer's, ours again ..., after one untimed piece of each. A ratio is
made of neighbours only, so that what else the machine does falls on both; its median stands before its range over the
pairs, and a rate is a median too. Whoever adds a row writes a function and gives it a name in ROWS.
"""
import argparse
import functools
import importlib
import itertools
import os
import random
import re
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}     # or torch's profiler talks into the table

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

import train_logbert as logbert  # noqa: E402
from common import RING, Guard, autocast, every, fail, pick_dtype, seed_step  # noqa: E402
from data.logs.prepare import LogReader  # noqa: E402

IGNORE = -100                                       # transformers' label of what is not asked

# A side is a function that does a piece of work and answers how much, in the unit of its row

# ------------------------------------------------------------------------------------------------------- measuring
class Row(NamedTuple):
    unit: str  # of the rates, as sessions/s
    goal: str  # of the ratio, or of our rate
    peer: str  # the package that the other side needs; empty: none
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
        return f"not installed: pip install {row.peer}"
    mine, other = row.rates
    values, text = (100 * (other / mine - 1), "{:+.1f} % ({:+.1f} ... {:+.1f})") if row.percent else \
        (mine / other, "{:.1f}x ({:.1f} ... {:.1f})")
    return text.format(np.median(values), values.min(), values.max())

def line(name, row):
    """A row -> its line of the Markdown table."""
    mine, other = [*(f"{np.median(rate):,.0f}" for rate in row.rates), "-"][:2]
    memory = " / ".join(f"{peak / 1e6:.1f} MB" for peak in row.memory) or "-"
    return f"| {name} | {mine} | {other} | {row.unit} | {ratio(row)} | {row.goal} | {memory} | {row.compared} |"

# ---------------------------------------------------------------------------------------------------- train_logbert
def logbert_steps(device, config, steps, guarded=True):
    """-> a side: `steps` optimizer steps as train_logbert takes them; guarded=False: and nothing looks at them."""
    torch.manual_seed(config.seed)
    data = logbert.load_data(config, device)        # each side its own, or one would find what the other has sorted
    model = logbert.LogBERT(config, data.about).to(device).train()
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors}],
                                  weight_decay=0.0, betas=(config.beta1, config.beta2), fused=True)
    guard = Guard(model, optimizer, config.grad_clip) if guarded else None
    dtype, turns = pick_dtype(config.dtype, device)[0], itertools.count()

    def side():
        for step in itertools.islice(turns, steps):
            if guard and every(step, RING, config.log_every):
                guard.poll()
            for group in optimizer.param_groups:
                group["lr"] = logbert.lr_at(step, 10_000, config)
            seed_step(config.seed, step, 0)
            batch = logbert.get_batch(data, "train", step, config)
            with autocast(device, dtype):
                loss, parts = logbert.compute_loss(model, batch, step, config)
            if guard:
                guard.backward(loss, parts)
                guard.step(step)
            else:
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
                optimizer.step()
                optimizer.zero_grad()
        return steps * config.batch_size
    return side

def logbert_guard(device, pairs, config=logbert.Config(), steps=logbert.WINDOW, turns=30):
    sides = [logbert_steps(device, config, steps, guarded) for guarded in (True, False)]
    return Row("sessions/s", "<= +1 %", "", measure(device, pairs, sides, turns), peak_memory(device, sides),
               "the whole step with the guard; with backward, clip_grad_norm_ and the same fused AdamW alone", True)

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

class MaskedAtRandom(list):
    """Sessions, lists of ids, that are masked in Python when they are asked for, as LogBERT's own data set does."""
    def __getitem__(self, i):
        keys, share = super().__getitem__(i), random.uniform(0, 0.5)
        return masked(keys, {place for place in range(len(keys)) if random.random() < share})

def padded(rows, length=0):
    """List of (tokens, labels) -> two (B, T) int64, padded to length, or to the longest of them, as LogBERT does."""
    length = length or max(len(tokens) for tokens, _ in rows)
    return [torch.tensor([row + [fill] * (length - len(row)) for row in column])
            for column, fill in zip(zip(*rows), (logbert.PAD, IGNORE))]

def bert_steps(transformers, device, config, steps, length):
    """-> a side: `steps` optimizer steps of a plain loop around transformers' BERT; length: see padded."""
    data = logbert.load_data(config, device)
    model, dtype = bert(transformers, config, data).train(), pick_dtype(config.dtype, device)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    loader = DataLoader(MaskedAtRandom(data.session(row).ids.tolist() for row in data.rows["train"]),
                        config.batch_size, shuffle=True, drop_last=True,
                        collate_fn=functools.partial(padded, length=length))
    batches = (batch for _ in itertools.count() for batch in loader)        # epoch after epoch

    def side():
        total = 0.0
        for tokens, labels in itertools.islice(batches, steps):
            tokens, labels = tokens.to(device), labels.to(device)
            with autocast(device, dtype):
                loss = model(input_ids=tokens, attention_mask=tokens != logbert.PAD, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            total += loss.item()
        return steps * config.batch_size
    return side

def logbert_train(device, pairs, config=logbert.Config(), steps=2 * logbert.WINDOW, turns=10, length=0):
    transformers = peer("transformers")
    sides = [logbert_steps(device, config, steps),
             bert_steps(transformers, device, config, steps, length) if transformers else None]
    return Row("sessions/s", ">= 3x", "transformers", measure(device, pairs, sides, turns), peak_memory(device, sides),
               f"optimizer steps of {config.batch_size} sessions with their batches; transformers BertForMaskedLM, "
               f"masks in Python, DataLoader, shuffled, padded to {length or 'the longest of a batch'}, AdamW, "
               "loss.item()")

def logbert_score(device, pairs, view, config=logbert.Config(), sample=100):
    config, transformers = logbert.Config(**vars(config) | {"view": view}), peer("transformers")
    data = logbert.load_data(config, device)
    torch.manual_seed(config.seed)
    model, rows = logbert.LogBERT(config, data.about).to(device).eval(), data.rows["test"]
    drawn = [data.session(row).ids.tolist() for row in np.random.default_rng(0).permutation(rows)[:sample]]
    other = bert(transformers, config, data).eval() if transformers else None

    def distinct():                                 # as eval does
        _, first, which = np.unique(data.unique[rows], return_index=True, return_inverse=True)
        sessions = [data.session(row) for row in rows[first]]
        return len(logbert.score_sessions(model, sessions, config)[view][which])

    def each():
        answers = logbert.surprise(model, [data.session(row) for row in rows[:len(rows) // 4]], view == "bag")
        return len([answer[:, 0].max() for answer in answers])

    @torch.no_grad()
    def plain():
        asked = [masked(keys, {place}) for keys in drawn for place in range(len(keys))]
        owner, nll = np.repeat(np.arange(len(drawn)), [len(keys) for keys in drawn]), []
        for tokens, labels in DataLoader(asked, 64, collate_fn=padded):
            tokens, here = tokens.to(device), labels != IGNORE      # one place in each row
            logp = other(input_ids=tokens, attention_mask=tokens != logbert.PAD).logits.log_softmax(-1).cpu()
            nll += (-logp[here].gather(1, labels[here][:, None])[:, 0]).tolist()
        scores = np.full(len(drawn), -np.inf)
        np.maximum.at(scores, owner, nll)
        return len(scores)

    sides = [distinct, plain if transformers else None]
    *rates, alone = measure(device, pairs, [*sides, each])
    without = f"{np.median(alone):,.0f}" + (f", {np.median(alone / rates[1]):.1f}x" if transformers else "")
    return Row("sessions/s", ">= 10x", "transformers", np.array(rates), peak_memory(device, sides),
               f"the {len(rows):,} test sessions, equal {'multisets' if view == 'bag' else 'sequences'} once (each for "
               f"itself: {without}); transformers BertForMaskedLM, {len(drawn)} of them drawn with a seed, keys masked "
               "in turn, DataLoader, 64 rows at once")

def logs_prepare(device, pairs, config=logbert.Config(), lines=200_000, sample=20_000):
    drain3, meta = peer("drain3"), logbert.load_data(config).meta
    log = Path(logbert.__file__).parent / "data/logs" / meta["name"] / "new.log"
    new = log.read_text().splitlines(keepends=True)
    copies = (text.replace("blk_", f"blk_{i}") for i in itertools.count(1) for text in new)     # each time new sessions
    with tempfile.TemporaryDirectory() as folder:
        path, texts = Path(folder) / "raw.log", list(itertools.islice(copies, lines))
        path.write_text("".join(texts))

        def read():
            keys = sum(len(session.keys) for session in LogReader(meta["parser"], meta["templates"]).sessions(path))
            assert keys == lines, f"{keys:,} keys of {lines:,} lines"
            return keys

        def mine():
            from drain3.template_miner_config import TemplateMinerConfig
            miner, header = drain3.TemplateMiner(config=TemplateMinerConfig()), re.compile(meta["parser"]["header"])
            for text in texts[:sample]:
                miner.add_log_message(header.match(text)["content"])
            return min(sample, lines)

        rates = measure(device, pairs, [read, mine if drain3 else None])
    return Row("lines/s", ">= 50,000 lines/s", "drain3", rates, [],
               f"{lines:,} raw lines of known templates to sessions of keys and gaps; drain3 TemplateMiner on the "
               f"contents of {sample:,} lines in memory, no sessions")

# ------------------------------------------------------------------------------------------------------------- main
ROWS = {
    "train_logbert train": logbert_train,
    "train_logbert train, peer padded to 512": lambda device, pairs: logbert_train(device, pairs, steps=4, turns=1,
                                                                                   length=512),
    "train_logbert score, bag view": lambda device, pairs: logbert_score(device, pairs, "bag"),
    "train_logbert score, ordered view": lambda device, pairs: logbert_score(device, pairs, "ordered"),
    "train_logbert guard on / off": logbert_guard,
    "data/logs prepare": logs_prepare,
}

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="rows whose names hold one of these; none: all")
    parser.add_argument("--full", action="store_true", help="15 pairs instead of 5")
    parser.add_argument("--gpu", action="store_true", help="on cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: %(default)s)")
    flags = parser.parse_args(argv)
    chosen = [name for name in ROWS if not flags.names or any(word in name for word in flags.names)]
    if not chosen or flags.threads < 1:
        fail(f"--threads must be above 0, and each name a part of one of these: {', '.join(ROWS)}")
    if flags.gpu and not torch.cuda.is_available():
        fail("--gpu: torch sees no CUDA device here; leave the flag out to measure the CPU")
    torch.set_num_threads(flags.threads)
    device, pairs = torch.device("cuda" if flags.gpu else "cpu"), 15 if flags.full else 5
    where = f"{torch.cuda.get_device_name()}, {time.strftime('%Y-%m-%d')}" if flags.gpu else "CPU"
    found = [f"{name} {module.__version__}" for name in ("torch", "transformers") if (module := peer(name))]
    print(f"{where}, torch threads: {flags.threads}, {', '.join(found)}; medians of {pairs} pairs (range)\n\n"
          "| row | ours | peer | unit | ratio | goal | peak of tensors, ours / peer | what was compared |\n"
          "|---|---|---|---|---|---|---|---|", flush=True)
    for name in chosen:
        print(line(name, ROWS[name](device, pairs)), flush=True)

if __name__ == "__main__":
    main()
