"""A tiny classifier that stands in for a training script, the faults that break it, and two processes to run it in.

Not a test file: test_common.py trains it under the guard, test_autopsy.py dissects it, test_runs.py saves it. A line
that an autopsy must name ends in a comment `# HERE: <fault>`; line_of(fault) finds it.
"""
import hashlib
import importlib
import math
import multiprocessing
import os
import socket
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import common as real_common
from autopsy import dissect
from runs import load_tensors, read_file

FEATURES, WIDTH, CLASSES, ROWS = 8, 32, 5, 16


@dataclass
class Config:
    run_name: str = "tiny"                          # folder under out_dir
    out_dir: str = "out"                            # where runs go
    data_dir: str = "data/tiny/demo"                # arrays to train on
    wandb: str = ""                                 # offline or online; empty = off
    seed: int = 0                                   # of data order and dropout
    grad_accum: int = 1                             # micro-batches per optimizer step
    learning_rate: float = 0.01                     # peak, reached after 10% of the steps
    dropout: float = 0.1                            # share of hidden units
    use_norm: bool = True                           # LayerNorm after the first layer
    verbose: bool = False                           # say more


# ------------------------------------------------------------------------------------------------ model with faults
class Middle(nn.Module):
    """A hidden layer, (B, WIDTH) -> (B, WIDTH), where most faults strike."""
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden, fault):
        hidden = self.linear(hidden)                                            # HERE: gradient
        row = torch.tensor([1])
        if fault == "activation NaN":
            hidden = hidden.index_fill(0, row, math.nan)                        # HERE: activation NaN
        elif fault == "activation Inf":
            hidden = hidden.index_fill(0, row, math.inf)                        # HERE: activation Inf
        elif fault == "gradient NaN":
            hidden.register_hook(lambda g: g.index_fill(0, row, math.nan))
        elif fault == "gradient Inf":
            hidden.register_hook(lambda g: g.index_fill(0, row, math.inf))
        elif fault == "huge gradient":                                          # finite, but its square is not
            hidden.register_hook(lambda g: g * 1e30)
        elif fault == "sqrt(0) in backward":
            distance = (hidden - hidden.detach()).square().sum(-1, keepdim=True)
            hidden = hidden + distance.sqrt()                                   # HERE: sqrt(0) in backward
        elif fault == "masked attention row":
            scores = (hidden @ hidden.T).float().masked_fill(torch.arange(len(hidden)) >= 0, -math.inf)
            hidden = scores.softmax(-1) @ hidden.float()                        # HERE: masked attention row
        elif fault == "log(0)":
            hidden = hidden + (hidden * 0).square().log()                       # HERE: log(0)
        elif fault == "log(0) after a causal mask":
            mask = torch.ones(len(hidden), len(hidden)).triu(1).bool()
            scores = (hidden @ hidden.T).float().masked_fill(mask, -math.inf)
            hidden = scores.softmax(-1) @ hidden.float()
            hidden = hidden + (hidden * 0).square().log()                       # HERE: log(0) after a causal mask
        elif fault == "log(0) in place":
            hidden = hidden.clone().mul_(0)
            hidden.log_()                                                       # HERE: log(0) in place
        elif fault == "Inf behind a clamp":             # the loss does not see it, the gradient does: 0 * Inf
            hidden = (hidden + 1000).exp()                                      # HERE: Inf behind a clamp
            hidden = hidden.clamp(max=9.0)
        elif fault == "float16 cast":
            hidden = (hidden.float() * 1e6).half().float()                      # HERE: float16 cast
        elif fault == "exception inside":
            torch.linalg.cholesky(-torch.eye(2))                                # a solver that gives up raises
        return hidden


class Net(nn.Module):
    """(B, FEATURES) -> logits (B, CLASSES) float32. `fault` names what shall go wrong on the way."""
    def __init__(self, dropout=0.1):
        super().__init__()
        self.about = {"dropout": dropout}
        self.first, self.norm = nn.Linear(FEATURES, WIDTH), nn.LayerNorm(WIDTH)
        self.middle, self.last, self.dropout = Middle(), nn.Linear(WIDTH, CLASSES), nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros(()))          # moved in place by each forward
        self.register_buffer("center", torch.zeros(WIDTH))      # replaced by each forward

    def forward(self, x, labels, fault=""):
        self.calls += 1
        self.center = 0.9 * self.center + 0.1 * self.first.bias.detach()
        hidden = self.dropout(F.gelu(self.norm(self.first(x))))
        try:
            hidden = self.middle(hidden, fault)
        except torch.linalg.LinAlgError:
            hidden = (hidden * 0).log()                                         # HERE: exception inside
        logits = self.last(F.gelu(hidden)).float()
        if fault == "-inf logit on a label":
            logits = logits.index_fill(1, labels[:1], -math.inf)                # HERE: -inf logit on a label
        return logits


def compute_loss(model, batch, step=0, config=None):
    """batch: x (B, FEATURES), labels (B,), count of rows in the whole optimizer step, fault -> 0-dim float32, parts."""
    fault = batch.get("fault", "")
    logits = model(batch["x"], batch["labels"], fault)
    loss = F.cross_entropy(logits, batch["labels"], reduction="sum") / batch["count"]
    parts = {"half": loss.detach() / 2}
    if fault == "loss NaN":
        loss = loss * math.nan                                                  # HERE: loss NaN
    elif fault == "loss Inf":
        loss = loss + math.inf                                                  # HERE: loss Inf
    elif fault == "float16 overflow":
        loss = loss * 1e4
    elif fault == "0/0 by a batch weight":
        loss = loss * (batch["weight"] / batch["weight"].sum()).mean()          # HERE: 0/0 by a batch weight
    return loss, parts


def load_model(path):
    tensors, body = read_file(path)
    model = Net(**body["about"])
    load_tensors(model, tensors, path)
    return model


def line_of(fault):
    """'tiny.py:68' of the line that is marked with this fault."""
    lines = Path(__file__).read_text().splitlines()
    return f"tiny.py:{1 + next(k for k, line in enumerate(lines) if line.endswith(f'# HERE: {fault}'))},"


def make_net(dropout=0.1):
    torch.manual_seed(0)
    return Net(dropout)


def make_batch(step=0, rank=0, micro=0, count=ROWS, fault=""):
    """A batch that is a function of its place. Faults in the data are put in here."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
    batch = {"x": torch.randn(ROWS, FEATURES, generator=generator), "count": count, "fault": fault,
             "labels": torch.randint(0, CLASSES, (ROWS,), generator=generator)}
    if fault in ("input NaN", "NaN data for ever"):
        batch["x"][2, 3] = math.nan
    if fault == "0/0 by a batch weight":
        batch["weight"] = torch.zeros(ROWS)
    return batch


# ---------------------------------------------------------------------------------------------- training with faults
STEPS, BAD, POLL, MAX_SKIPS, CLIP = 12, 4, 3, 3, 0.5


def fingerprint(net, optimizer):
    """One hash over every bit of the parameters and of the optimizer's state."""
    digest = hashlib.sha256()
    for parameter in net.parameters():
        state = optimizer.state[parameter]
        for tensor in (parameter.detach(), *(state[key] for key in sorted(state))):
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def train(common, site="", precision="float32", policy="skip", accum=1, fused=True, everywhere=False, omit=False,
          halve=False, until=STEPS):
    """STEPS optimizer steps under the guard of `common`, with a fault at step BAD on the last rank -> outcome, a dict.

    everywhere: the fault strikes every rank. omit: step BAD never happens. halve: instead, float16's scale halves.
    With accum > 1 the fault sits in one micro-batch in the middle."""
    net = make_net()
    device = torch.device("cpu")
    model = common.wrap_ddp(net, device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1, fused=fused)
    rank, ranks, reports, said, history = common.rank(), common.world_size(), [], [], []
    here = everywhere or rank == ranks - 1

    def batch_of(step, micro):
        struck = here and micro == accum // 2 and (step == BAD or step > BAD and site == "NaN data for ever")
        return make_batch(step, rank, micro, ROWS * accum * ranks, site if struck else "")

    def loss_of(model, batch, step, micro):
        common.seed_step(0, step, rank, micro)
        with common.autocast(device, common.DTYPES[precision]):
            return compute_loss(model, batch)

    def examine(step, now):
        micro = accum // 2
        batch = batch_of(step, micro)
        reports.append(dissect(net, lambda: loss_of(net, batch, step, micro)[0], batch, f"step {step}")[0])

    guard = common.Guard(model, optimizer, CLIP, policy, MAX_SKIPS, precision == "float16", examine, said.append)
    result = {"error": "", "error_step": None, "before": None, "total": 0}
    try:
        for step in range(until):
            if step == BAD:
                result["before"] = fingerprint(net, optimizer)
                if omit:
                    guard.scale = guard.scale * (0.5 if halve else 1.0)
                    continue
                if here and site == "parameter NaN":
                    net.middle.linear.weight.data[1, 1] = math.nan
                if here and site == "optimizer state NaN":
                    optimizer.state[net.middle.linear.weight]["exp_avg"][1, 1] = math.nan
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / STEPS)         # the schedule goes on over a skip
            for micro in range(accum):
                guard.sync_gradients(micro == accum - 1)
                loss, parts = loss_of(model, batch_of(step, micro), step, micro)
                guard.backward(loss, parts)
            guard.step(step)
            if (step + 1) % POLL == 0:
                result["polled"] = step + 1
                history.append(guard.poll())
        history.append(guard.poll())
        result["total"] = history[-1]["skipped"]
    except common.NonFinite as error:
        result |= {"error": str(error), "error_step": error.step}
    return result | {"state": fingerprint(net, optimizer), "skips": guard.skips, "scale": float(guard.scale),
                     "reports": reports, "said": said, "history": history, "net": net, "optimizer": optimizer}


# --------------------------------------------------------------------------------------------------- two processes
def _serve(rank, port, pipe):
    """Rank `rank` of a Pair: call what comes through the pipe until it closes."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    real_common.launch("cpu")
    assert (real_common.rank(), real_common.world_size()) == (rank, 2)
    while True:
        module, function, arguments = pipe.recv()
        if module is None:
            break
        try:
            pipe.send((True, getattr(importlib.import_module(module), function)(*arguments)))
        except BaseException:
            pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
    real_common.finish()


class Pair:
    """Two gloo processes that stay up between tests, since each takes seconds to import torch.

    A call that fails or hangs takes them down; the next one starts fresh ones, so that no test leaves a half-finished
    collective to another."""
    def __init__(self):
        self.workers = []

    def start(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        for rank in range(2):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(rank, port, theirs), daemon=True)
            worker.start()
            theirs.close()
            self.workers.append((worker, ours))

    def run(self, function, *arguments, timeout=60):
        if not self.workers:
            self.start()
        for _, pipe in self.workers:
            pipe.send((function.__module__, function.__name__, arguments))
        answers = []
        for rank, (_, pipe) in enumerate(self.workers):
            try:
                answers.append(pipe.recv() if pipe.poll(timeout if not answers or answers[0][0] else 5) else
                               (False, f"rank {rank} hangs"))
            except EOFError:
                answers.append((False, f"rank {rank} died"))
        if not all(fine for fine, _ in answers):
            for worker, _ in self.workers:
                worker.kill()
            self.workers = []
        assert all(fine for fine, _ in answers), "\n".join(text for fine, text in answers if not fine)
        return [value for _, value in answers]

    def close(self):
        for _, pipe in self.workers:
            pipe.send((None, None, None))
        for worker, _ in self.workers:
            worker.join(10)
            worker.kill()
        self.workers = []
