"""The guards of common.py: one fault at a time is put into a real training run, in one process and in two.

Every check is a function of the module `common`, so that the same checks can be run against deliberately broken guards
(MUTANTS at the end): a check that no breakage turns red would prove nothing.
"""
import copy
import functools
import json
import math
import os
import signal
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import common as real_common
from runs import newest, save_checkpoint
from tiny import (BAD, CLASSES, CLIP, FEATURES, MAX_SKIPS, POLL, ROWS, STEPS, compute_loss, fingerprint, line_of,
                  make_batch, make_net, train)

CPU = torch.device("cpu")

# ---------------------------------------------------------------------------------------------------- the fault matrix
SITES = {                                           # site -> what the autopsy must say about it
    "input NaN": ("at entry: batch['x'] already holds NaN, 1/128", "NaN CAME IN with: batch['x']"),
    "activation NaN": ("NaN BORN in forward: index_fill", "module middle\n", line_of("activation NaN")),
    "activation Inf": ("Inf BORN in forward: index_fill", "module middle\n", line_of("activation Inf")),
    "loss NaN": ("NaN BORN in forward: mul", line_of("loss NaN")),
    "loss Inf": ("Inf BORN in forward: add", line_of("loss Inf")),
    "gradient NaN": ("NaN BORN in backward: index_fill", line_of("gradient")),
    "gradient Inf": ("Inf BORN in backward: index_fill", line_of("gradient")),
    "huge gradient": (),                            # each element is finite, only their norm is not
    "sqrt(0) in backward": ("Inf BORN in backward: div", "SqrtBackward0", line_of("sqrt(0) in backward")),
    "-inf logit on a label": ("Inf BORN in forward: index_fill", "module (root)", line_of("-inf logit on a label")),
    "NaN data for ever": ("NaN CAME IN with: batch['x']",),
    "parameter NaN": ("at entry: parameter middle.linear.weight", "NaN CAME IN with: parameter middle.linear.weight"),
    "optimizer state NaN": ("NaN CAME IN with: parameter middle.linear.weight",),
    "float16 overflow": (),
}
IN_BACKWARD = {"gradient NaN", "gradient Inf", "huge gradient", "sqrt(0) in backward", "float16 overflow"}
CELLS = [(site, precision, policy) for site in SITES for precision in ("float32", "bfloat16", "float16")
         for policy in ("skip", "stop") if site != "float16 overflow" or precision == "float16"]


@functools.lru_cache(maxsize=None)
def reference(precision, accum=1, fused=True, **how):
    """The outcome of a healthy run under the real guard: with step BAD omitted, or until some step."""
    return train(real_common, precision=precision, accum=accum, fused=fused, **how)


def check_cell(common, site, precision, policy, accum=1, fused=True, everywhere=False):
    """Train with one fault and compare everything that the guard promises."""
    found = train(common, site, precision, policy, accum, fused, everywhere)
    here = everywhere or real_common.rank() == real_common.world_size() - 1
    healthy = functools.partial(reference, precision, accum, fused)
    cause = "gradient" if site in IN_BACKWARD else "loss" if site in ("loss NaN", "loss Inf") else "output"
    scale = 65536.0 if precision == "float16" else 1.0
    skips, expected, examined = {cause: 1}, {}, 1
    if precision == "float16" and site in IN_BACKWARD:      # cannot be told from an overflow: skip it, halve the scale
        expected = {"error_step": None, "state": healthy(omit=True, halve=True)["state"], "total": 1}
        skips, scale, examined = {"float16 overflow": 1}, 32768.0, 0
    elif site in ("parameter NaN", "optimizer state NaN"):  # nothing to save: the next poll must end it
        first = BAD + (site == "optimizer state NaN")       # the first step whose loss shows it
        expected = {"error_step": first if policy == "stop" else 2 * POLL, "polled": 2 * POLL}
        skips = {cause: 1 if policy == "stop" else 2 * POLL - first}
        before = healthy(until=first)["state"]              # trained on all ranks, wanted by the healthy ones
        if here:
            assert_never_a_checkpoint(found["net"], found["optimizer"])
        else:
            expected["state"] = before
        assert policy == "stop" or "ALREADY non-finite" in found["error"], found["error"]
    elif site == "NaN data for ever" and policy == "skip":
        skips = {cause: MAX_SKIPS + 1}
        expected = {"error_step": 3 * POLL, "polled": 3 * POLL, "state": healthy(until=BAD)["state"]}
    elif policy == "skip":
        expected = {"error_step": None, "state": healthy(omit=True)["state"], "total": 1, "polled": STEPS}
    else:
        expected = {"error_step": BAD, "state": healthy(until=BAD)["state"], "polled": 2 * POLL}
    expected |= {"skips": {"output": 0, "loss": 0, "gradient": 0, "float16 overflow": 0} | skips, "scale": scale}
    got = {key: found[key] for key in expected}
    assert got == expected, f"{site} {precision} {policy}\nfound    {got}\nexpected {expected}\n{found['error']}"
    assert_told(found, site, everywhere)
    assert len(found["reports"]) == examined, found["reports"]
    for phrase in SITES[site] if here and examined else ():
        assert phrase in found["reports"][0], f"{phrase!r} is not in\n{found['reports'][0]}"
    if not here and examined:
        assert "did NOT reproduce" in found["reports"][0], found["reports"][0]


def assert_told(found, site, everywhere):
    """The log names step, kind and ranks; the reported means are those of the accepted steps."""
    first = BAD + (site == "optimizer state NaN")
    ranks = list(range(real_common.world_size()))
    bad_ranks = ranks if everywhere else ranks[-1:]
    where = "AFTER backward" if site in IN_BACKWARD else f"BEFORE backward: loss of rank(s) {bad_ranks}"
    said = next(text for text in found["said"] if "detected" in text)
    assert said.startswith(f"step {first}: ") and where in said, said
    for stats in found["history"]:
        assert math.isfinite(stats["loss"]) or stats["steps"] == 0, found["history"]


def assert_never_a_checkpoint(net, optimizer):
    with tempfile.TemporaryDirectory() as folder:
        path = save_checkpoint(folder, BAD, net, optimizer, {}, keep=1)
        assert path.name == f"step-{BAD:08d}.safetensors.nonfinite" and path.exists(), path
        assert newest(folder) is None


@pytest.mark.parametrize("site,precision,policy", CELLS)
def test_fault_in_one_process(site, precision, policy):
    check_cell(real_common, site, precision, policy)


@pytest.mark.parametrize("site,precision,policy", CELLS)
def test_fault_on_the_last_of_two_ranks(pair, site, precision, policy):
    pair.run(check_cell_here, site, precision, policy)


@pytest.mark.parametrize("policy", ["skip", "stop"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("site", ["input NaN", "loss Inf", "gradient Inf"])
def test_fault_on_both_ranks_at_once(pair, site, precision, policy):
    pair.run(check_cell_here, site, precision, policy, 1, True, True)


@pytest.mark.parametrize("site", ["input NaN", "loss Inf", "sqrt(0) in backward"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_bad_micro_batch_in_the_middle(pair, site, precision, policy):
    check_cell(real_common, site, precision, policy, accum=3)
    pair.run(check_cell_here, site, precision, policy, 3)


@pytest.mark.parametrize("site", [site for site in SITES if site != "float16 overflow"])
@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_fault_with_an_optimizer_that_cannot_skip(site, policy):
    check_cell(real_common, site, "float32", policy, fused=False)
    check_cell(real_common, site, "float16", policy, fused=False)


def check_cell_here(*arguments):
    check_cell(real_common, *arguments)


# ------------------------------------------------------------------------------------------- a healthy run is untouched
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_guard_changes_no_bit_of_a_healthy_run_below_the_clip(precision):
    def run(guarded):
        net = make_net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, fused=True)
        guard = real_common.Guard(net, optimizer, clip=1e3)
        for step in range(STEPS):
            real_common.seed_step(0, step, 0)
            with real_common.autocast(CPU, real_common.DTYPES[precision]):
                loss, parts = compute_loss(net, make_batch(step))
            if guarded:
                guard.backward(loss, parts)
                guard.step(step)
            else:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return fingerprint(net, optimizer)
    assert run(guarded=True) == run(guarded=False)


def check_clip(common, fused=True):
    """With plain gradient descent the update is the gradient: it must be the one that clip_grad_norm_ leaves."""
    def update(clip, factor, guarded):
        net = make_net(dropout=0.0)
        before = copy.deepcopy(net.state_dict())
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0, fused=fused)
        loss = compute_loss(net, make_batch())[0] * factor
        if guarded:
            guard = common.Guard(net, optimizer, clip, log=lambda text: None)
            guard.backward(loss)
            guard.step(0)
            norm = guard.poll()["grad_norm"]
        else:
            loss.backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), clip or math.inf).item()
            optimizer.step()
        return torch.cat([(p.detach() - before[name]).flatten() for name, p in net.named_parameters()]), norm
    for clip, factor in ((1.0, 100.0), (1.0, 0.01), (0.25, 1.0), (0.0, 100.0)):
        (ours, norm), (theirs, their_norm) = update(clip, factor, True), update(clip, factor, False)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)      # float32 rounding of weights about 1
        assert norm == pytest.approx(their_norm, rel=1e-6), "the reported norm is the one before the clip"
        assert clip == 0 or ours.norm() <= clip * 1.00001


@pytest.mark.parametrize("fused", [True, False])
def test_clip_is_that_of_clip_grad_norm(fused):
    check_clip(real_common, fused)


# ------------------------------------------------------------------------------------------------------- no host reads
class HostReads(TorchFunctionMode):
    """Counts what makes the host wait for the device: .item(), float(), `if tensor`, .tolist(), .cpu(), .numpy()."""
    class Scalars(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.count += operation._schema.name in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero")
            return operation(*args, **(kwargs or {}))

    def __enter__(self):
        self.count, self.scalars = 0, self.Scalars()
        self.scalars.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.scalars.__exit__(*error)
        self.count += self.scalars.count

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy)
        return function(*args, **(kwargs or {}))


def count_host_reads(common, precision, policy="skip", optimizer_class=torch.optim.AdamW, fused=True):
    """-> reads of three optimizer steps, one of them bad, and of the poll after them."""
    net = make_net()
    optimizer = optimizer_class(net.parameters(), lr=0.01, fused=fused)
    guard = common.Guard(net, optimizer, CLIP, policy, fp16=precision == "float16", log=lambda text: None)
    in_steps = 0
    for step in range(3):
        for micro in range(2):
            with common.autocast(CPU, common.DTYPES[precision]):
                loss, parts = compute_loss(net, make_batch(step, fault="loss NaN" if step == 2 else ""))
            with HostReads() as reads:
                guard.backward(loss, parts)
            in_steps += reads.count
        with HostReads() as reads:
            guard.step(step)
        in_steps += reads.count
    with HostReads() as reads:
        try:
            guard.poll()
        except common.NonFinite:
            pass
    return in_steps, reads.count


def check_host_reads(common, precision, policy):
    assert count_host_reads(common, precision, policy) == (0, 1)


@pytest.mark.parametrize("policy", ["skip", "stop"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_steps_read_nothing_and_a_poll_reads_once(precision, policy):
    check_host_reads(real_common, precision, policy)


def test_fallback_reads_once_a_step():
    plain = torch.optim.SGD                          # AdamW without `fused` reads its own step counters on top
    assert count_host_reads(real_common, "float32", "skip", plain, fused=False) == (3, 1)


@pytest.mark.parametrize("read", [torch.Tensor.item, float, bool, int, torch.Tensor.tolist, torch.Tensor.cpu])
def test_the_counter_of_host_reads_counts(read):
    with HostReads() as reads:
        read(torch.ones(()) + 1)
    assert reads.count == 1


# -------------------------------------------------------------------------------------------------------------- canary
class IgnoresFoundInf(torch.optim.AdamW):
    def step(self, closure=None):
        self.found_inf = torch.zeros_like(self.found_inf)
        return super().step(closure)


class IgnoresGradScale(torch.optim.AdamW):
    def step(self, closure=None):
        self.grad_scale = torch.ones_like(self.grad_scale)
        return super().step(closure)


def check_canary(common, optimizer_class, works, options):
    """An optimizer that does not obey is found out, said so, and a bad step still leaves the weights alone."""
    net, said = make_net(), []
    optimizer = optimizer_class(net.parameters(), lr=0.01, **options)
    guard = common.Guard(net, optimizer, log=said.append)
    assert bool(guard.on_device) == works
    assert ["cannot skip" in text and optimizer_class.__name__ in text for text in said] == [True] * (not works)
    if issubclass(optimizer_class, (IgnoresFoundInf, IgnoresGradScale)):
        return                                      # their step() wants what only the fast path sets
    before = copy.deepcopy(net.state_dict())
    for step, fault in enumerate(["loss NaN", ""]):
        guard.backward(compute_loss(net, make_batch(fault=fault))[0])
        guard.step(step)
        moved = [name for name, parameter in net.named_parameters() if not torch.equal(parameter, before[name])]
        assert len(moved) == (0 if fault else len(list(net.parameters()))), moved


@pytest.mark.parametrize("optimizer_class,works,options", [
    (torch.optim.AdamW, True, {"fused": True}), (torch.optim.Adam, True, {"fused": True}),
    (torch.optim.SGD, True, {"fused": True, "momentum": 0.9}), (torch.optim.AdamW, False, {}),
    (torch.optim.AdamW, False, {"foreach": True}), (torch.optim.RMSprop, False, {}),
    (IgnoresFoundInf, False, {"fused": True}), (IgnoresGradScale, False, {"fused": True})])
def test_canary(optimizer_class, works, options):
    check_canary(real_common, optimizer_class, works, options)


# -------------------------------------------------------------------------------------------------- counts and limits
def drive(common, pattern, resume=None, first=0, **options):
    """Steps of a three-weight model, one per letter: `.` healthy, `x` loss NaN, `o` gradient Inf -> (guard, stopped).

    stopped: None, or the step before which the guard stopped the run. It is polled every seven steps and at the end."""
    weights = nn.Parameter(torch.ones(3))
    guard = common.Guard(None, torch.optim.SGD([weights], lr=0.01, fused=True), log=lambda text: None, **options)
    if resume:
        guard.load_state_dict(json.loads(json.dumps(resume)))
    try:
        for step, letter in enumerate(pattern, first):
            value = weights * 1.0
            if letter == "o":
                value.register_hook(lambda gradient: gradient * math.inf)
            guard.backward(value.sum() * (math.nan if letter == "x" else 1.0))
            guard.step(step)
            if step % 7 == 6:
                guard.poll()
        guard.poll()
    except common.NonFinite as error:
        assert f"STOPPED before step {error.step}:" in str(error)
        return guard, error.step
    finally:
        assert weights.isfinite().all()
    return guard, None


def spaced(*bad):
    """400 steps, bad ones at these places."""
    return "".join("x" if step in bad else "." for step in range(400))


def check_limits(common):
    cases = [("..xxx..", 3, "skip", None), ("..xxxx..", 3, "skip", 7), ("xxx.x", 3, "skip", 5),
             ("x.x.x.x.", 3, "skip", 7), ("......xx", 1, "skip", 8), ("oooo", 3, "skip", 4), ("..x..", 0, "skip", 5),
             (".....", 0, "skip", None), ("..x..", 9, "stop", 2), ("..o..", 9, "stop", 2),
             (spaced(50, 150, 250), 2, "skip", 252), (spaced(50, 150, 310), 2, "skip", None),
             (spaced(50, 150, 310, 320), 2, "skip", 322)]
    for pattern, max_skips, policy, expected in cases:
        guard, stopped = drive(common, pattern, max_skips=max_skips, policy=policy)
        assert stopped == expected, (pattern, max_skips, policy, stopped)
        if stopped is None:
            assert sum(guard.skips.values()) == pattern.count("x") + pattern.count("o")


def check_in_a_row(common):
    """More than max_skips in a row stop the run even where 1 % of the steps allows more in total."""
    resume = {"scale": 1.0, "healthy": 0.0, "skips": {"output": 0, "loss": 0, "gradient": 0, "float16 overflow": 0},
              "seen": 10000, "in_a_row": 0}
    assert drive(common, "xxx.xxx.", resume, max_skips=3)[1] is None
    assert drive(common, "xxx.xxxx", resume, max_skips=3)[1] == 8


def check_overflow(common):
    """Overflows halve the scale down to 1 and are no bad steps; at 1 they are."""
    guard, stopped = drive(common, "o" * 16, fp16=True, max_skips=0)
    assert (stopped, float(guard.scale), guard.skips["float16 overflow"]) == (None, 1.0, 16)
    guard, stopped = drive(common, "o" * 17 + ".", fp16=True, max_skips=0)
    assert (stopped, float(guard.scale), guard.skips["gradient"]) == (18, 1.0, 1)
    assert drive(common, "o" * 17 + ".", fp16=True, policy="stop")[1] == 16, "at scale 1 it is no overflow any more"
    guard, stopped = drive(common, "x" * 5 + "." * 5, fp16=True)
    assert stopped is None and float(guard.scale) == 65536.0, "bad data say nothing about the scale"
    resume = guard.state_dict() | {"scale": 1024.0, "healthy": 1995.0}
    assert float(drive(common, "....", resume, fp16=True)[0].scale) == 1024.0
    assert float(drive(common, ".....", resume, fp16=True)[0].scale) == 2048.0
    assert float(drive(common, "...o....", resume, fp16=True)[0].scale) == 512.0, "an overflow starts the count anew"
    assert float(drive(common, ".....", resume | {"scale": 65536.0}, fp16=True)[0].scale) == 65536.0


def check_resume(common):
    """Counts and scale go on where a checkpoint left them, through JSON."""
    guard, _ = drive(common, ".oxx", fp16=True, max_skips=3)
    state = guard.state_dict()
    assert (state["scale"], state["healthy"], state["seen"], state["in_a_row"]) == (32768.0, 0.0, 4, 2)
    assert drive(common, "xx", state, first=4, fp16=True, max_skips=3)[1] == 6, "two and two are four in a row"
    resumed, stopped = drive(common, "x.", state, first=4, fp16=True, max_skips=3)
    assert stopped is None and resumed.skips == {"output": 0, "loss": 3, "gradient": 0, "float16 overflow": 1}
    assert (resumed.seen, resumed.in_a_row, float(resumed.scale)) == (6, 0, 32768.0)
    assert state["skips"] == {"output": 0, "loss": 2, "gradient": 0, "float16 overflow": 1}, "not shared with the guard"


def check_causes(common):
    """Output, loss and gradient are told apart, step by step; a look in eval mode and a replay blame no later step."""
    net, seen = make_net(dropout=0.0), []

    def look(fault, training=True):
        net.train(training)
        return compute_loss(net, make_batch(fault=fault))[0]
    guard = common.Guard(net, torch.optim.SGD(net.parameters(), lr=0.01, fused=True), log=lambda text: None,
                         examine=lambda step, now: (seen.append(step), look("input NaN")))
    for step, fault in enumerate(["input NaN", "loss NaN", "input NaN", "", "gradient NaN", "loss NaN"]):
        look("input NaN", training=False)
        guard.backward(look(fault))
        guard.step(step)
        if step in (0, 4):
            guard.poll()
    guard.poll()
    assert guard.skips == {"output": 2, "loss": 2, "gradient": 1, "float16 overflow": 0} and seen == [0]


def check_report(common):
    """Means over the accepted steps, sums over micro-batches, from poll to poll."""
    weight = nn.Parameter(torch.tensor([2.0]))
    guard = common.Guard(None, torch.optim.SGD([weight], lr=0.0, fused=True), log=lambda text: None)

    def steps(numbers, bad=None):
        for step in numbers:
            for factor in (step + 1, 10 * (step + 1)):      # loss 22 (step + 1), gradient 11 (step + 1)
                loss = (weight * factor * (math.nan if step == bad and factor < 10 else 1)).sum()
                guard.backward(loss, {"double": 2 * loss.detach(), "one": torch.tensor(0.5, dtype=torch.float64)})
            guard.step(step)
        return guard.poll()
    expected = {"steps": 3, "loss": 44.0, "parts": {"double": 88.0, "one": 1.0}, "grad_norm": 22.0, "skipped": 1}
    assert steps(range(3), bad=1) == expected
    expected = {"steps": 2, "loss": 99.0, "parts": {"double": 198.0, "one": 1.0}, "grad_norm": 49.5, "skipped": 1}
    assert steps(range(3, 5)) == expected
    empty = guard.poll()
    assert empty["steps"] == 0 and empty["skipped"] == 1 and math.isnan(empty["loss"])


@pytest.mark.parametrize("check", [check_limits, check_in_a_row, check_overflow, check_resume, check_causes,
                                   check_report],
                         ids=lambda check: check.__name__)
def test_counts(check):
    check(real_common)


def check_loss_must_be_float32(common):
    weight = nn.Parameter(torch.ones(2))
    guard = common.Guard(None, torch.optim.SGD([weight], lr=0.1, fused=True))
    for loss in (weight.sum().bfloat16(), weight.sum().double(), weight * 1.0):
        with pytest.raises(AssertionError, match="0-dim float32"):
            guard.backward(loss)
    guard.backward(weight.sum(), {"a": torch.ones(())})
    with pytest.raises(AssertionError, match="parts keep their names"):
        guard.backward(weight.sum(), {"b": torch.ones(())})


def test_the_loss_must_be_float32_and_parts_keep_their_names():
    check_loss_must_be_float32(real_common)


def test_the_flag_of_a_step_is_fit_for_torch_where():
    """0-dim float32, exactly 1.0 or 0.0: followers (EMA, centres) use torch.where(bad.bool(), old, new)."""
    weight = nn.Parameter(torch.ones(2))
    guard = real_common.Guard(None, torch.optim.SGD([weight], lr=0.1, fused=True))
    flags = []
    for factor in (1.0, math.nan, 1.0):
        guard.backward((weight * factor).sum())
        flags.append(guard.step(len(flags)))
    assert [flag.item() for flag in flags] == [0.0, 1.0, 0.0]
    assert all(flag.dtype == torch.float32 and flag.dim() == 0 for flag in flags)
    assert weight.grad is None


# -------------------------------------------------------------------------------------------------------- two processes
def check_deferral(common):
    """Of three micro-batches only the last all-reduces, and the sum is that of an all-reduce each time."""
    def gradients(defer):
        net, calls = make_net(dropout=0.0), []
        model = common.wrap_ddp(net, CPU)
        net.calls += 100 * common.rank()

        def count(state, bucket):
            calls.append(bucket.index())
            return dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future().then(
                lambda future: future.value()[0])
        model.register_comm_hook(None, count)
        guard = common.Guard(model, torch.optim.SGD(net.parameters(), lr=0.1, fused=True))
        for micro in range(3):
            guard.sync_gradients(micro == 2 or not defer)
            loss, parts = compute_loss(model, make_batch(0, common.rank(), micro, count=6 * ROWS))
            guard.backward(loss)
        return calls, torch.cat([parameter.grad.flatten().clone() for parameter in net.parameters()]), float(net.calls)
    (deferred, ours, forwards), (always, theirs, _) = gradients(True), gradients(False)
    assert len(always) == 3 * len(deferred) > 0, (deferred, always)
    assert forwards == 3 + 100 * common.rank(), "buffers stay each rank's own: those of rank 0 may be the bad ones"
    torch.testing.assert_close(ours, theirs)


def check_split(common, accum):
    """Ragged rows over a global count: any split of 64 rows gives the step that plain torch takes on all 64 at once."""
    tokens, rows_in_all, batch, generator = 6, 200, 64, torch.Generator().manual_seed(5)
    x = torch.randn(rows_in_all, tokens, FEATURES, generator=generator)
    labels = torch.randint(0, CLASSES, (rows_in_all, tokens), generator=generator)
    lengths = torch.randint(1, tokens + 1, (rows_in_all,), generator=generator)
    labels[torch.arange(tokens) >= lengths[:, None]] = -100

    def loss_of(model, rows, count):
        logits = model(x[rows])
        return F.cross_entropy(logits.flatten(0, 1), labels[rows].flatten(), reduction="sum", ignore_index=-100) / count

    def start():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(FEATURES, 16), nn.GELU(), nn.Linear(16, CLASSES))
        return net, torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9, fused=True)
    plain, optimizer = start()
    losses, norms = [], []
    for step in range(5):
        rows = real_common.global_rows(rows_in_all, batch, 0, step)
        loss = loss_of(plain, rows, lengths[rows].sum())
        loss.backward()
        losses.append(loss.item())
        norms.append(nn.utils.get_total_norm([parameter.grad for parameter in plain.parameters()]).item())
        optimizer.step()
        optimizer.zero_grad()
    net, optimizer = start()
    model = common.wrap_ddp(net, CPU)
    guard = common.Guard(model, optimizer, clip=0.0)
    for step in range(5):
        rows = common.global_rows(rows_in_all, batch, 0, step)
        for micro in range(accum):
            guard.sync_gradients(micro == accum - 1)
            mine = common.local_rows(rows, micro, accum)
            assert len(mine) == batch // accum // common.world_size()
            guard.backward(loss_of(model, mine, lengths[rows].sum()))
        guard.step(step)
    stats = guard.poll()
    for parameter, expected in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)
    assert stats["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert stats["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-5)


def check_ranks_that_drift_apart(common):
    """One weight of the last rank is off: the poll tells both ranks."""
    net = make_net()
    model = common.wrap_ddp(net, CPU)
    guard = common.Guard(model, torch.optim.SGD(net.parameters(), lr=0.1, fused=True))
    guard.poll()
    if common.rank() == 1:
        net.last.bias.data[0] += 0.01
    with pytest.raises(common.NonFinite, match="ranks hold DIFFERENT weights"):
        guard.poll()


def check_signal_reaches_all(common):
    """SIGTERM to one rank only; both go on until a poll has told both."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    common.listen()
    net = make_net()
    guard = common.Guard(common.wrap_ddp(net, CPU), torch.optim.SGD(net.parameters(), lr=0.1, fused=True))
    try:
        guard.poll()
        assert not guard.stop_requested
        if common.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        alone = guard.stop_requested                # no assert before both have polled: the other rank would hang
        guard.poll()
        assert not alone and guard.stop_requested
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers):
            signal.signal(number, handler)
        common._signals.clear()


def call(check, *arguments):
    """In a worker: a check of this file against the real guard."""
    return globals()[check](real_common, *arguments)


@pytest.mark.parametrize("check", ["check_deferral", "check_ranks_that_drift_apart", "check_signal_reaches_all"])
def test_two_ranks(pair, check):
    pair.run(call, check)


@pytest.mark.parametrize("accum", [1, 2, 4])
def test_every_split_of_a_batch_is_the_same_step(pair, accum):
    check_split(real_common, accum)                 # 1 x 64, 2 x 32, 4 x 16
    pair.run(call, "check_split", accum)            # 2 processes x 32, 2 x 2 x 16, 2 x 4 x 8


def agree_and_slice(rows):
    assert real_common.agree(7 + real_common.rank(), CPU) == 7
    return [real_common.local_rows(rows, micro, 2).tolist() for micro in range(2)]


def test_two_ranks_agree_and_share_out_the_rows(pair):
    rows = np.arange(12) * 10
    first, second = pair.run(agree_and_slice, rows)
    assert first + second == [[0, 10, 20], [30, 40, 50], [60, 70, 80], [90, 100, 110]]
    assert real_common.agree(7, CPU) == 7 and real_common.local_rows(rows, 1, 2).tolist() == [60, 70, 80, 90, 100, 110]


# --------------------------------------------------------------------------------------------------------- determinism
def check_seeds(common):
    """Neighbours in any argument draw other numbers; the same arguments the same ones."""
    def draw(*place):
        common.seed_step(*place)
        return tuple(torch.rand(4).tolist())
    places = [(seed, step, rank, micro) for seed in (0, 1, 2**32, 2**32 + 1, 2**40) for step in (0, 1, 2, 1000)
              for rank in (0, 1, 2) for micro in (0, 1, 2)]
    drawn = [draw(*place) for place in places]
    assert len(set(drawn)) == len(places)
    assert [draw(*place) for place in reversed(places)] == drawn[::-1]
    assert draw(3, 4, 5) == draw(3, 4, 5, 0)


def check_rows(common):
    for n_rows, batch in ((100, 10), (103, 8), (64, 64), (5, 16), (1, 4)):
        epochs = 3
        steps = -(-n_rows * epochs // batch)
        stream = np.concatenate([common.global_rows(n_rows, batch, 7, step) for step in range(steps)])
        assert stream.dtype == np.int64 and len(stream) == steps * batch
        orders = stream[:n_rows * epochs].reshape(epochs, n_rows)
        assert (np.sort(orders, axis=1) == np.arange(n_rows)).all(), "each epoch is a permutation"
        if n_rows > 50:
            assert (orders[0] != orders[1]).any() and (orders[0] != np.arange(n_rows)).any()
            assert (common.global_rows(n_rows, batch, 8, 0) != stream[:batch]).any(), "the seed counts"
    before = common.global_rows(103, 8, 7, 12)      # steps 12 and 13 lie across the end of the first epoch
    common.global_rows(103, 8, 7, 500), common.global_rows(50, 8, 1, 3)
    assert (common.global_rows(103, 8, 7, 12) == before).all(), "a function of seed and step, not of history"


def test_random_streams():
    check_seeds(real_common)


def test_row_order():
    check_rows(real_common)


def test_every():
    assert [step for step in range(13) if real_common.every(step, 4)] == [4, 8, 12]
    assert [step for step in range(13) if real_common.every(step, 0, 6)] == [6, 12]
    assert not real_common.every(5, 0)


# ------------------------------------------------------------------------------------------------- precision and launch
def check_cast(common):
    ints, floats = torch.arange(3), torch.ones(3, dtype=torch.float64)
    tree = {"tensors": [ints, floats], "arrays": (np.ones(2, np.float32), np.arange(2, dtype=np.int32)),
            "mask": floats.bool(), "n": 3, "s": "x"}
    out = common.cast(tree, CPU, torch.bfloat16)
    assert [t.dtype for t in out["tensors"]] == [torch.int64, torch.bfloat16] and isinstance(out["tensors"], list)
    assert [t.dtype for t in out["arrays"]] == [torch.bfloat16, torch.int32] and isinstance(out["arrays"], tuple)
    assert (out["n"], out["s"], out["mask"].dtype, floats.dtype) == (3, "x", torch.bool, torch.float64)
    assert common.cast(tree, CPU)["tensors"][1].dtype == torch.float64, "without a dtype only the place changes"


def test_cast():
    check_cast(real_common)


def test_float32_island_under_autocast():
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with real_common.autocast(CPU, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        with real_common.float32_island(x):
            assert layer(x).dtype == torch.float32 and (x @ x.T).dtype == torch.float32
        assert layer(x).dtype == torch.bfloat16
    with real_common.autocast(CPU, torch.float32):
        assert layer(x).dtype == torch.float32


def test_dtype_and_device():
    assert real_common.pick_dtype("bfloat16", CPU) == (torch.bfloat16, "as asked")
    assert real_common.pick_dtype("auto", CPU)[0] == torch.float32
    assert real_common.launch("cpu") == CPU and not dist.is_initialized()
    assert (real_common.rank(), real_common.world_size()) == (0, 1)
    net = make_net()
    assert real_common.wrap_ddp(net, CPU) is net and real_common.unwrap(net) is net
    real_common.finish()


@pytest.mark.parametrize("call", [lambda: real_common.pick_dtype("bf16", CPU), lambda: real_common.launch("gpu"),
                                  lambda: real_common.launch("cuda:x"), lambda: real_common.launch("")])
def test_a_wrong_dtype_or_device_is_one_line_and_exit_2(call, capsys):
    with pytest.raises(SystemExit) as stop:
        call()
    output = capsys.readouterr()
    assert (stop.value.code, output.out, output.err.count("\n")) == (2, "", 1) and output.err.startswith("error: --d")


# ------------------------------------------------------------------------------------------------------------- signals
@pytest.fixture
def listening():
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    real_common.listen()
    yield functools.partial(os.kill, os.getpid())
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers):
        signal.signal(number, handler)
    real_common._signals.clear()


def test_sigterm_ends_the_loop_and_not_the_step(listening):
    weight, done = nn.Parameter(torch.ones(2)), []
    guard = real_common.Guard(None, torch.optim.SGD([weight], lr=0.1, fused=True))
    for step in range(10):
        if guard.stop_requested:
            break
        guard.backward(weight.sum())
        if step == 3:
            listening(signal.SIGTERM)
        guard.step(step)
        done.append(step)
    assert done == [0, 1, 2, 3] and guard.poll()["steps"] == 4 and guard.stop_requested


def test_only_the_third_ctrl_c_kills(listening):
    guard = real_common.Guard(None, torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, fused=True))
    assert not guard.stop_requested
    listening(signal.SIGINT)
    listening(signal.SIGINT)                        # torchrun passes it on, and so does the terminal
    assert guard.stop_requested
    with pytest.raises(KeyboardInterrupt):
        listening(signal.SIGINT)
    real_common.listen()
    assert not guard.stop_requested, "a second run in the same process starts anew"
    real_common.listen(False)
    with pytest.raises(KeyboardInterrupt):
        listening(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and not guard.stop_requested


# ---------------------------------------------------------------------------------------------------- broken on purpose
def cell(site, precision="float32", policy="skip", **how):
    return "check_cell", {"site": site, "precision": precision, "policy": policy} | how


def other(check, **how):
    return f"check_{check}", how


BACKWARD = "(loss * (self.scale * world_size() + poison)).backward()"
BAD_NORM = "bad = counted = (norm - norm).ne(0).float()"
LATCH = "self.latch = torch.maximum(self.latch, counted)"
LIMIT = "if self.in_a_row > self.max_skips or total > max(self.max_skips, 0.01 * self.seen):"
SEED = "repr((seed, step, rank, micro))"
MUTANTS = {                                         # name: (text of common.py, what stands there instead, who sees it)
    "isnan for isfinite on the loss":
        ("poison = value - value", "poison = torch.where(value.isnan(), value, 0.0)", cell("loss Inf")),
    "isnan for isfinite on the norm": (BAD_NORM, "bad = counted = norm.isnan().float()", cell("huge gradient")),
    "found_inf is 2.0": (BAD_NORM, f"{BAD_NORM} * 2", cell("input NaN")),
    "found_inf is never set": ("grad_scale = skipped, divisor", "grad_scale = skipped * 0, divisor", cell("input NaN")),
    "no poison": (BACKWARD, "(loss * (self.scale * world_size())).backward()", cell("loss Inf")),
    "poison by where(ok, loss, loss * nan)":
        (BACKWARD, "torch.where(poison == 0, loss, loss * math.nan).backward()", cell("input NaN")),
    "a bad loss is set to zero": (BACKWARD, "torch.where(poison == 0, loss, 0.0).backward()", cell("loss Inf")),
    "a bad loss is multiplied by zero":
        ("poison = value - value", "poison = -(value - value).ne(0).float()", cell("loss Inf")),
    "no zero_grad": ("self.optimizer.zero_grad(set_to_none=True)", "pass", cell("input NaN")),
    "no latch": (LATCH, "pass", cell("input NaN", policy="stop")),
    "no latch for gradients": (LATCH, f"{LATCH[:-1]} * row[LOSS_BAD])", cell("gradient NaN", policy="stop")),
    "stop only skips": ('if counted and self.policy == "stop":', "if False:", cell("input NaN", policy="stop")),
    "the limit never raises": (LIMIT, "if False:", cell("NaN data for ever")),
    "no limit in a row": (LIMIT, LIMIT.replace("self.in_a_row > self.max_skips or ", ""), other("in_a_row")),
    "no limit in total": (LIMIT, "if self.in_a_row > self.max_skips:", other("limits")),
    "no 1 % of the steps":
        (LIMIT, LIMIT.replace("max(self.max_skips, 0.01 * self.seen)", "self.max_skips"), other("limits")),
    "the count in a row is never reset": ("            self.in_a_row = 0\n", "", other("resume")),
    "non-finite weights go unnoticed":
        ("damage if np.isfinite(norms).all() else", "damage if True else", cell("optimizer state NaN")),
    "clip before the check":
        ("        norm = get_total_norm(grads, ", "        torch.nn.utils.clip_grad_norm_(self.params, self.clip)\n"
         "        norm = get_total_norm(grads, ", cell("huge gradient")),
    "no clip": ("if self.clip else self.scale\n", "if False else self.scale\n", other("clip")),
    "clip = 0 clips": ("if self.clip else self.scale\n", "if True else self.scale\n", other("clip")),
    "float16: bad data halve the scale":
        ("0.5 * bad * (1 - loss_bad)", "0.5 * bad", cell("input NaN", "float16")),
    "float16: an overflow counts as bad":
        ("counted = bad * torch.maximum(", "counted = bad + 0 * torch.maximum(",
         cell("float16 overflow", "float16", "stop")),
    "float16: no overflow counts as bad":
        ("torch.maximum(loss_bad, self.scale.le(1.0).float())", "loss_bad", other("overflow")),
    "float16: the limit counts overflows": (' - self.skips["float16 overflow"]', "", other("overflow")),
    "float16: the norm is not unscaled": (".float() / self.scale", ".float()", cell("input NaN", "float16")),
    "float16: the update is not unscaled":
        ("divisor = self.scale * (norm", "divisor = (norm", cell("input NaN", "float16")),
    "float16: the scale has no floor": (".clamp(1.0, 65536.0)", ".clamp(max=65536.0)", other("overflow")),
    "float16: the scale never grows": ("* (1 + grow)", "", other("overflow")),
    "float16: an overflow does not restart the growth":
        ("torch.where(bad > 0, 0.0, self.healthy + 1)", "self.healthy + 1", other("overflow")),
    "float16: the scale is not resumed": ('torch.tensor([state["scale"], ', "torch.tensor([65536.0, ", other("resume")),
    "the skips are not resumed": ('dict(state["skips"])', "self.skips", other("resume")),
    "the report knows the last micro-batch only": ("row[:NORM] += torch", "row[:NORM] = torch", other("report")),
    "the report has parts of the last micro-batch": ("row[PARTS:] += torch", "row[PARTS:] = torch", other("report")),
    "skipped steps count in the means": ("ring[:, good].sum", "ring.sum", other("report")),
    "the ring is not zeroed": ("self.ring.zero_()", "pass", other("report")),
    "the output is not looked at": ("model.register_forward_hook(self._look)", "pass", cell("input NaN")),
    "an output is blamed for ever":
        ("self.output.ne(0).float()])\n        self.output = self.nothing\n", "self.output.ne(0).float()])\n",
         other("causes")),
    "an evaluation is blamed": ("if model.training and torch.is_grad_enabled():", "if True:", other("causes")),
    "a replay is blamed": ("            self.output = self.nothing              #", "            #", other("causes")),
    "a host read slips in": ("        self.steps.append(step)", "        self.steps.append(step), bool(skipped)",
                             other("host_reads", precision="float32", policy="skip")),
    "no canary": (" and self._canary()", "",
                  other("canary", optimizer_class=IgnoresFoundInf, works=False, options={"fused": True})),
    "the canary looks at found_inf only":
        (" and update(2.0, 0.0, 2.0) == update(1.0, 0.0, 1.0) != [1.0, 1.0]", "",
         other("canary", optimizer_class=IgnoresGradScale, works=False, options={"fused": True})),
    "the canary looks at grad_scale only":
        ("update(math.nan, 1.0, 1.0) == [1.0, 1.0] and ", "",
         other("canary", optimizer_class=IgnoresFoundInf, works=False, options={"fused": True})),
    "the loss may be bfloat16": ("assert loss.dtype == torch.float32 and ", "assert ", other("loss_must_be_float32")),
    "the seed knows no rank": (SEED, "repr((seed, step, micro))", other("seeds")),
    "the seed knows no micro-batch": (SEED, "repr((seed, step, rank))", other("seeds")),
    "the seed loses its high bits": (SEED, "repr((seed % 2**32, step, rank, micro))", other("seeds")),
    "every epoch in the same order": ("default_rng([seed, epoch])", "default_rng([seed])", other("rows")),
    "cast touches integers": ("dtype if dtype and tree.is_floating_point() else None", "dtype", other("cast")),
}
MUTANTS_OF_TWO = {
    "SUM for MAX": ("dist.all_reduce(loss_bad, op=dist.ReduceOp.MAX)", "dist.all_reduce(loss_bad)",
                    cell("input NaN", "float16", "stop", everywhere=True)),
    "each rank decides alone":
        ("skipped = torch.maximum(bad, self.latch)", "skipped = row[LOSS_BAD].clamp(max=1.0)", cell("input NaN")),
    "float16: each rank has its own scale":
        ("            if world_size() > 1:\n                dist.all_reduce(loss_bad",
         "            if False:\n                dist.all_reduce(loss_bad", cell("input NaN", "float16")),
    "no poison": MUTANTS["no poison"],
    "no zero_grad": MUTANTS["no zero_grad"],
    "no latch": MUTANTS["no latch"],
    "found_inf is 2.0": MUTANTS["found_inf is 2.0"],
    "DDP's mean is not undone":
        ("(self.scale * world_size() + poison)", "(self.scale + poison)", other("split", accum=1)),
    "the reported loss is a rank's mean": ("ring[:, good].sum(0)", "ring[:, good].mean(0)", other("split", accum=1)),
    "all ranks get the same rows": ("[rank(), micro]", "[0, micro]", other("split", accum=1)),
    "gradients are reduced for each micro-batch":
        ("self.model.require_backward_grad_sync = now", "pass", other("deferral")),
    "buffers are broadcast": ("{buffers: False}", "{buffers: True}", other("deferral")),
    "ranks may drift apart":
        ('"" if (norms == norms[0]).all() else', '"" if True else', other("ranks_that_drift_apart")),
    "a signal stays on its rank": ("bool(table[:, -1].any())", "bool(table[rank(), -1])", other("signal_reaches_all")),
    "a signal stops its rank alone":
        ("(world_size() == 1 and bool(_signals))", "bool(_signals)", other("signal_reaches_all")),
}


def mutant_of_common(text, instead):
    """common.py with one text replaced, as a module of its own."""
    source = Path(real_common.__file__).read_text()
    assert source.count(text) == 1, f"{source.count(text)} places hold {text!r}: bring the mutant up to date"
    module = types.ModuleType("mutant_of_common")
    module.__file__ = real_common.__file__
    exec(compile(source.replace(text, instead), "mutant_of_common.py", "exec"), module.__dict__)
    return module


def turns_red(text, instead, witness):
    mutant, (check, arguments) = mutant_of_common(text, instead), witness
    try:
        globals()[check](mutant, **arguments)
    except (AssertionError, pytest.fail.Exception):
        return True
    return False


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_guard_is_found_out(name):
    assert turns_red(*MUTANTS[name])


@pytest.mark.parametrize("name", MUTANTS_OF_TWO)
def test_a_broken_guard_is_found_out_by_two_ranks(pair, name):
    assert any(pair.run(turns_red, *MUTANTS_OF_TWO[name]))
