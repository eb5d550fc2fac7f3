"""What the tests of train_logbert.py share: hand-made logs, tiny models, runs in this process and in real ones.

Not a test file. As a program it is train_logbert.py with faults, as python tests/logbert_tools.py FAULT:STEPS:RANK
[flags]: see arm().
"""
import json
import math
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import train_logbert  # noqa: E402
from edl_tools import flags_of, weights_of  # noqa: E402
from runs import steps_in  # noqa: E402
from train_logbert import FIRST_KEY, Session  # noqa: E402

SMALL = train_logbert.CPU | train_logbert.DRY | dict(               # whole, so that no process fills in a preset
    device="cpu", n_layer=2, n_head=2, n_embd=16, batch_size=8, log_every=0, eval_every=0, save_every=0, dry_run=True)


# ------------------------------------------------------------------------------------------------------- hand-made data
def write_data(folder, train, val, test=(), labels=None, gaps=None, n_train_keys=None, test_normals=0, kinds=None):
    """A prepared set of sessions, each a list of keys, as data/README.md describes it -> its path.

    labels: of the test sessions, 0 each if missing; gaps: seconds, a list per session, of all three splits in turn."""
    sessions = [tuple(session) for session in (*train, *val, *test)]
    n_train_keys = n_train_keys or 1 + max(key for session in train for key in session)
    templates = [f"event {key}" for key in range(max(n_train_keys, 1 + max(map(max, sessions))))]
    number = {session: i for i, session in enumerate(dict.fromkeys(sessions))}
    labels = [0] * (len(train) + len(val)) + list(labels or [0] * len(test))
    arrays = {"keys": np.array([key for session in sessions for key in session], np.uint16),
              "offsets": np.cumsum([0, *map(len, sessions)]).astype(np.int64), "labels": np.array(labels, np.int8),
              "split": np.repeat(np.arange(3, dtype=np.uint8), [len(train), len(val), len(test)]),
              "unique": np.array([number[session] for session in sessions], np.int32)}
    if gaps:
        arrays["gaps"] = np.array([x for session in gaps for x in session], np.float32)
    meta = {"format": 1, "name": folder.name, "templates": templates, "n_train_keys": n_train_keys,
            "kinds": kinds or ["anomaly"], "splits": ["train", "val", "test"], "longest": max(map(len, sessions)),
            "has_gaps": bool(gaps), "test_normals": test_normals, "parser": {}, "counts": {}}
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    (folder / "sessions.txt").write_text("".join(f"s{i}\n" for i in range(len(sessions))))
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def life(rng):
    """A normal session: 0 opens, each of 2 or 3 workers does 1 2 3, in any interleaving, then perhaps 4 5, or 4."""
    workers = int(rng.integers(2, 4))
    chains, session = [[1, 2, 3] for _ in range(workers)], [0]
    while any(chains):
        chain = chains[rng.choice([i for i, chain in enumerate(chains) if chain])]
        session.append(chain.pop(0))
    return session + [[], [4, 5], [4]][rng.integers(3)]


def write_lives(folder, n_train=60, n_val=20, n_test=20, seed=0, times=False):
    """A set of life()s; every other test session lacks a 2, has a key that train has not, or is cut short."""
    rng = np.random.default_rng(seed)
    train, val, test = ([life(rng) for _ in range(n)] for n in (n_train, n_val, n_test))
    for i in range(0, n_test, 2):
        session = test[i]
        test[i] = [session[:session.index(2)] + session[session.index(2) + 1:], session + [6], session[:2]][i // 2 % 3]
    gaps = [[0.0, *rng.exponential(5, len(session) - 1)] for session in (*train, *val, *test)] if times else None
    return write_data(folder, train, val, test, [(i + 1) % 2 for i in range(n_test)], gaps, n_train_keys=6)


def sessions_of(*keys, n_keys=6, gaps=None):
    """Lists of keys -> list of Session; keys from n_keys on are UNK."""
    ids = [train_logbert.to_ids(one, n_keys) for one in keys]
    gaps = gaps or [np.zeros(len(one)) for one in keys]
    return [Session(one, np.asarray(gap, np.float32)) for one, gap in zip(ids, gaps)]


def about(n_keys=6, block=20, lines=100):
    """What load_data would say of a training set of n_keys keys, `lines` lines, sessions of up to block - 2 keys."""
    return {"templates": [f"event {key}" for key in range(n_keys + 2)], "n_keys": n_keys, "parser": {}, "block": block,
            "unseen": math.log(lines + 1)}


# ------------------------------------------------------------------------------------------------------- in process
def small_config(**fields):
    config = train_logbert.Config(**SMALL | fields)
    return train_logbert.settle(config, {*vars(config)})


IGNORE = -100                                       # in targets_of: nothing is asked here


def targets_of(batch):
    """The questions of a batch as classes at their places, (B, T) int64, IGNORE elsewhere."""
    targets = torch.full_like(torch.as_tensor(batch["tokens"]), IGNORE)
    targets.view(-1)[batch["asked"]] = torch.as_tensor(batch["targets"])
    return targets


def everywhere(model, tokens, bag, gaps=None):
    """-> (logits (B, T, K), h_DIST (B, D)), with each place asked."""
    logits, h_dist = model(tokens, bag, torch.arange(tokens.numel()), gaps)
    return logits.view(*tokens.shape, -1), h_dist


def small_model(about, seed=0, scale=4.0, **fields):
    """A random model in eval mode; its weights are `scale` times as wide as at the start, its logits far from flat."""
    torch.manual_seed(seed)
    model = train_logbert.LogBERT(small_config(**fields), about)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def train_here(data_dir, folder, **fields):
    """Train in this process -> train()'s answer; the run is in folder. Signal handlers are put back."""
    fields = dict(data_dir=str(data_dir), out_dir=str(folder.parent), run_name=folder.name) | fields
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return train_logbert.train(small_config(**fields))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------- in the two processes of the fixture
def batch_and_gradient(folder, step, double, fields):
    """This rank's micro-batches of a step, the loss of all ranks, the gradients under DDP."""
    config, data = small_config(**fields), None
    data = train_logbert.load_data(train_logbert.Config(data_dir=str(folder)))
    model = small_model(data.about, **fields).train()
    model.centre.normal_(generator=torch.Generator().manual_seed(5))
    model = model.double() if double else model
    wrapped, total, batches = common.wrap_ddp(model, torch.device("cpu")), torch.zeros(()), []
    for micro in range(config.grad_accum):
        batch = train_logbert.get_batch(data, "train", step, config, micro)
        batch = common.cast(batch, torch.device("cpu"), torch.float64 if double else None)
        if hasattr(wrapped, "require_backward_grad_sync"):
            wrapped.require_backward_grad_sync = micro == config.grad_accum - 1
        loss, _ = train_logbert.compute_loss(wrapped, batch, step, config)
        (loss * common.world_size()).backward()
        total, batches = total + loss.detach(), [*batches, batch]
    if common.world_size() > 1:
        torch.distributed.all_reduce(total)
    return batches, float(total), {name: p.grad for name, p in model.named_parameters()}


def centre_of(folder, fields):
    """The centre that set_centre finds."""
    data = train_logbert.load_data(train_logbert.Config(data_dir=str(folder)))
    model = small_model(data.about, **fields).train()
    train_logbert.set_centre(model, data, small_config(**fields))
    return model.centre


def losses_of(folder, fields):
    data = train_logbert.load_data(train_logbert.Config(data_dir=str(folder)))
    return train_logbert.evaluate(small_model(data.about, **fields), data, small_config(**fields))


def run_in_pair(data_dir, folder, fault, fields):
    """A whole run inside the pair -> ("done", answer) or ("stopped", message) and the weights' checksum."""
    fields = dict(data_dir=str(data_dir), out_dir=str(Path(folder).parent), run_name=Path(folder).name) | fields
    places = (train_logbert, "compute_loss"), (train_logbert, "get_batch"), (os, "replace")
    before, seen = [getattr(*place) for place in places], arm(fault)
    try:
        answer = "done", train_logbert.run_training(small_config(**fields), torch.device("cpu"))
    except common.NonFinite as error:
        answer = "stopped", str(error)
    finally:
        for place, function in zip(places, before):
            setattr(*place, function)
    return *answer, weights_of(seen[0])


# -------------------------------------------------------------------------------------------------- in real processes
def training(fault, folder, **fields):
    """The command that trains into folder, with faults as arm() knows them or '' for the plain script."""
    fields = dict(out_dir=folder.parent, run_name=folder.name) | SMALL | fields
    return [*([Path(__file__), fault] if fault else [ROOT / "train_logbert.py"]), *flags_of(**fields)]


class AtRandom:
    """Steps, of which a share is drawn, the same on each rank and in each run."""
    def __init__(self, kind, share):
        self.kind, self.share = kind, float(share.rstrip("%")) / 100

    def __contains__(self, step):
        return random.Random(f"{self.kind} {step}").random() < self.share

    def __iter__(self):
        return iter(())                             # no list of them; kill-in-save wants one


def arm(faults):
    """Let train_logbert meet faults, "kind:steps:rank kind:steps:rank" -> [model] later. steps: as in --skip_steps, or
    1% for that share of all steps, drawn at random.

    kill, term: the process gets that signal in the middle of the step; kill-in-save: SIGKILL when the checkpoint of the
    step is written but not yet renamed; nan-loss; inf-loss; nan-gradient: behind a finite loss; nan-weight; nan-gap: in
    the input of a model that reads gaps; no-targets: the batch's count is 0."""
    compute_loss, get_batch, replace, seen = train_logbert.compute_loss, train_logbert.get_batch, os.replace, []
    parts = [fault.split(":") for fault in faults.split()]
    wanted = [(kind, AtRandom(kind, steps) if "%" in steps else steps_in(steps), int(rank))
              for kind, steps, rank in parts]
    numbers = {"kill": signal.SIGKILL, "term": signal.SIGTERM}

    def here(step):
        return {kind for kind, steps, rank in wanted if step in steps and common.rank() == rank}

    def faulty_loss(model, batch, step, config):
        if not torch.is_grad_enabled():
            return compute_loss(model, batch, step, config)
        now, inside = here(step), train_logbert.unwrap(model)
        seen[:] = [inside]
        for kind in now & set(numbers):
            os.kill(os.getpid(), numbers[kind])
        if "nan-weight" in now:
            inside.token.weight.data[FIRST_KEY, 3] = math.nan
        loss, parts = compute_loss(model, batch, step, config)
        if "nan-gradient" in now:
            loss.register_hook(lambda gradient: gradient * math.nan)
        if now & {"nan-loss", "inf-loss"}:
            loss = loss * (math.nan if "nan-loss" in now else math.inf)
        return loss, parts

    def faulty_batch(data, split, step, config, micro=0):
        batch, now = get_batch(data, split, step, config, micro), here(step)
        if "nan-gap" in now:
            batch["gaps"][0, 1] = math.nan
        return batch | {"count": 0} if "no-targets" in now else batch

    def faulty_replace(source, target):
        if any(f"step-{step:08d}" in str(target) for kind, steps, _ in wanted for step in steps if kind[-4:] == "save"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    train_logbert.compute_loss, train_logbert.get_batch, os.replace = faulty_loss, faulty_batch, faulty_replace
    return seen


if __name__ == "__main__":
    last_model = arm(sys.argv[1])
    try:
        train_logbert.main(sys.argv[2:])
    finally:
        print(f"weights {weights_of(last_model[0]):08x}" if last_model else "no step was taken", flush=True)
