"""The guards all scripts share: launch, determinism, precision, the non-finite guard, stop signals.

Nothing here knows a model. What a reader needs to understand a system stands in its script; here stands only what could
corrupt a run silently if it were copied. Weights and optimizer state are float32; autocast is the only low precision.
"""
import functools
import hashlib
import inspect
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_leaves

class NonFinite(RuntimeError):
    """The run must stop, with exit code 3. If intact, the weights are good and are those from before `step`."""
    def __init__(self, message, step, intact=True, bad=None):
        bad = step if bad is None else bad          # what may be passed over: with "skip" it lies before the stop
        super().__init__(f"""STOPPED before step {step}: {message}. What to try:
  1. the autopsy in the run's folder: it names the operation where the first Inf or NaN was born
  2. a lower --learning_rate or a longer --warmup_steps, with --resume
  3. --dtype float32    4. a smaller --grad_clip    5. --skip_steps {bad} with --resume, if only that batch is bad""")
        self.step, self.intact = step, intact

def fail(message):
    """End the program because of what the user gave it: one line on stderr, exit code 2."""
    print("error:", *str(message).splitlines(), file=sys.stderr, flush=True)
    raise SystemExit(2)

# ---------------------------------------------------------------------------------------------------------- launch
def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1

def launch(name="auto"):
    """Join the process group that torchrun announces, if it does -> torch.device of this process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name) or name.startswith("cuda") and not torch.cuda.is_available():
        fail(f"--device {name}: not here; leave the flag out, or say --device cpu")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device

def finish():
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.1)                             # gloo's threads drop their tensors; Python's end would abort them

def agree(value, device):
    """Rank 0's integer, on every rank; to those that ignore it a barrier."""
    tensor = torch.tensor([value], dtype=torch.int64, device=device)
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return int(tensor)

def wrap_ddp(model, device):
    """The model under DDP, or itself when alone. Buffers are not broadcast: they follow accepted steps on all ranks."""
    if world_size() == 1:
        return model
    known = inspect.signature(DistributedDataParallel.__init__).parameters         # torch 2.13 renamed one
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, ids, gradient_as_bucket_view=True, **{buffers: False})

def unwrap(model):
    """The module under DDP and torch.compile, so that `module.` and `_orig_mod.` never reach a file."""
    model = getattr(model, "module", model)
    return getattr(model, "_orig_mod", model)

# ----------------------------------------------------------------------------------------------------- determinism
def seed_step(seed, step, rank, micro=0):
    """Make dropout and noise a function of (seed, step, rank, micro-batch) and not of history: so resume is exact.

    Hashed to 32 bits, because the CPU generator ignores the rest of a longer seed."""
    value = int.from_bytes(hashlib.blake2b(repr((seed, step, rank, micro)).encode(), digest_size=4).digest(), "little")
    torch.default_generator.manual_seed(value)      # what torch.manual_seed does too, 250 times slower
    if torch.cuda.is_available():
        torch.cuda.manual_seed(value)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(value)

@functools.lru_cache(maxsize=2)
def _epoch_order(n_rows, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n_rows)

def global_rows(n_rows, global_batch, seed, step):
    """Rows of a step's global batch, int64 (global_batch,): each epoch a permutation, epochs joined without a gap."""
    place = np.arange(step * global_batch, (step + 1) * global_batch)
    return np.concatenate([_epoch_order(n_rows, seed, int(epoch))[place[place // n_rows == epoch] % n_rows]
                           for epoch in np.unique(place // n_rows)])

def local_rows(rows, micro, grad_accum):
    """This rank's micro-batch of a global batch: (global_batch,) -> (global_batch / world_size / grad_accum,)."""
    return rows.reshape(world_size(), grad_accum, -1)[rank(), micro]

def every(step, *intervals):
    """Is one of the intervals, in steps, over? Never at step 0; an interval of 0 is off."""
    return step > 0 and any(n > 0 and step % n == 0 for n in intervals)

# ------------------------------------------------------------------------------------------------------- precision
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

def pick_dtype(name, device):
    """--dtype -> (dtype of the autocast, the reason to print)."""
    if name != "auto":
        return (DTYPES[name], "as asked") if name in DTYPES else fail(f"--dtype {name}: auto, {', '.join(DTYPES)}")
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, f"{torch.cuda.get_device_name(device)} computes in it"
    return torch.float32, "on a CPU small models gain nothing from less" if device.type == "cpu" else "no bfloat16 here"

def autocast(device, dtype):
    """Context for the forward; changes nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

def float32_island(tensor):
    """Context without autocast, for softmax, log, lgamma, digamma and KL of tensors cast by .float()."""
    return torch.autocast(tensor.device.type, enabled=False)

def cast(tree, device, dtype=None):
    """Move every tensor or array of a dict, list or tuple to the device; floating ones to dtype too. Numbers pass."""
    if isinstance(tree, dict):
        return {key: cast(value, device, dtype) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(cast(value, device, dtype) for value in tree)
    tree = torch.from_numpy(tree) if isinstance(tree, np.ndarray) else tree
    if not torch.is_tensor(tree):
        return tree
    tree = tree.pin_memory() if tree.device.type == "cpu" and device.type == "cuda" else tree   # the copy overlaps
    return tree.to(device, dtype if dtype and tree.is_floating_point() else None, non_blocking=True)

# ----------------------------------------------------------------------------------------------------------- guard
RING = 1024                                         # steps the device remembers; polled before it is full
LOSS, LOSS_BAD, OUTPUT_BAD, NORM, SKIPPED, COUNTED, PARTS = range(7)    # columns of the ring

class Guard:
    """Keeps non-finite losses and gradients away from the weights, alike on all ranks, without a host read per step.

    per micro-batch: guard.sync_gradients(last); forward; guard.backward(loss, parts)
    bad = guard.step(step)   0-dim float32 on the device, 1.0 = skipped; followers use torch.where(bad.bool(), old, new)
    stats = guard.poll()     now and then: the only host read, one gather; raises NonFinite on every rank together

    policy "skip": a bad step changes nothing; more than max_skips in a row, or more in total than max(max_skips, 1 % of
    the steps), stop the run. policy "stop": the first bad step freezes the weights until poll raises.
    float16: finite losses with a non-finite norm are an overflow: skipped, scale halved (floor 1), not counted.
    examine(step, now), the autopsy: called on every rank for the first bad step; the weights are from before step now.
    """
    def __init__(self, model, optimizer, clip=1.0, policy="skip", max_skips=10, fp16=False, examine=None, log=print):
        assert policy in ("skip", "stop"), policy
        self.model, self.optimizer, self.clip, self.policy, self.max_skips = model, optimizer, clip, policy, max_skips
        self.fp16, self.examine, self.log = fp16, examine, log
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = self.params[0].device
        start = torch.tensor([65536.0 if fp16 else 1.0, 0.0, 0.0], device=self.device)
        self.scale, self.healthy, self.latch = start.unbind()
        self.nothing = self.output = torch.zeros((), device=self.device)
        if model is not None:
            model.register_forward_hook(self._look)
        self.ring, self.steps, self.names = None, [], []
        self.skips = {"output": 0, "loss": 0, "gradient": 0, "float16 overflow": 0}
        self.seen, self.in_a_row, self.after, self.told_to_stop = 0, 0, 0, False
        self.on_device = optimizer.defaults.get("fused") and self._canary()
        if not self.on_device:
            log(f"guard: this {type(optimizer).__name__} cannot skip on {self.device}: one host read a step instead")

    def _canary(self):
        """Prove on this device that found_inf = 1.0 skips the update and that grad_scale divides the gradient."""
        def update(gradient, found_inf, grad_scale):
            p = torch.nn.Parameter(torch.ones(2, device=self.device))
            p.grad = torch.full_like(p, gradient)
            eps = {} if isinstance(self.optimizer, torch.optim.SGD) else {"eps": 1.0}   # a small one hides the scale
            trial = type(self.optimizer)([p], lr=0.5, fused=True, **eps)
            trial.found_inf, trial.grad_scale = torch.tensor([found_inf, grad_scale], device=self.device).unbind()
            trial.step()
            return p.tolist()
        return update(math.nan, 1.0, 1.0) == [1.0, 1.0] and update(2.0, 0.0, 2.0) == update(1.0, 0.0, 1.0) != [1.0, 1.0]

    def _look(self, model, inputs, output):
        """A forward hook: is the output finite? Only for the count of causes: loss and gradient decide."""
        if model.training and torch.is_grad_enabled():
            for tensor in tree_leaves(output):
                if torch.is_tensor(tensor) and tensor.is_floating_point():
                    total = tensor.detach().sum(dtype=torch.float32)
                    self.output = self.output + (total - total)

    def sync_gradients(self, now):
        """Say before the forward whether its backward all-reduces: said after it, DDP never syncs."""
        if isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = now

    def backward(self, loss, parts={}):
        """loss: 0-dim float32, this micro-batch's sum / the whole optimizer step's count; parts: dict of such tensors.

        l - l is 0 for a finite loss, else NaN: a bad loss makes every gradient NaN, and DDP's own all-reduce tells the
        other ranks. DDP averages over ranks although the count is global already: hence the world size."""
        assert loss.dtype == torch.float32 and loss.dim() == 0, f"loss must be 0-dim float32: {loss.dtype} {loss.shape}"
        value = loss.detach()
        poison = value - value
        (loss * (self.scale * world_size() + poison)).backward()
        if self.ring is None:
            self.names, self.ring = list(parts), torch.zeros(RING, PARTS + len(parts), device=self.device)
        assert list(parts) == self.names, f"parts keep their names: {self.names}, now {list(parts)}"
        row = self.ring[len(self.steps)]
        row[:NORM] += torch.stack([value, poison.ne(0).float(), self.output.ne(0).float()])
        self.output = self.nothing
        if parts:
            row[PARTS:] += torch.stack([part.detach().float() for part in parts.values()])

    def step(self, step):
        """Norm -> skip or clip -> fused update -> zero_grad; nothing is read by the host."""
        grads = [p.grad for p in self.params if p.grad is not None]
        row = self.ring[len(self.steps)]
        norm = get_total_norm(grads, foreach=True).float() / self.scale
        bad = counted = (norm - norm).ne(0).float()     # exactly 1.0 or 0.0: the optimizer obeys nothing else
        if self.fp16:                                   # whose loss was bad tells bad data from overflow, on all ranks
            loss_bad = row[LOSS_BAD].clamp(max=1.0)
            if world_size() > 1:
                dist.all_reduce(loss_bad, op=dist.ReduceOp.MAX)
            counted = bad * torch.maximum(loss_bad, self.scale.le(1.0).float())
        if self.policy == "stop":
            self.latch = torch.maximum(self.latch, counted)
        skipped = torch.maximum(bad, self.latch)
        divisor = self.scale * (norm / self.clip).clamp(min=1.0) if self.clip else self.scale
        if self.on_device:
            self.optimizer.found_inf, self.optimizer.grad_scale = skipped, divisor
            self.optimizer.step()
        elif skipped.item() == 0:
            torch._foreach_div_(grads, divisor)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        row[NORM:PARTS] = torch.stack([norm, skipped, counted])
        if self.fp16:                                   # GradScaler's rule with a floor; bad data leave the scale alone
            self.healthy = torch.where(bad > 0, 0.0, self.healthy + 1)
            grow = self.healthy.ge(2000).float()
            self.scale = (self.scale * (1 - 0.5 * bad * (1 - loss_bad)) * (1 + grow)).clamp(1.0, 65536.0)
            self.healthy = self.healthy * (1 - grow)
        self.steps.append(step)
        return skipped

    @property
    def stop_requested(self):
        """SIGTERM or Ctrl-C came: known at once when alone, with several ranks when a poll has told them all."""
        return self.told_to_stop or (world_size() == 1 and bool(_signals))

    def poll(self):
        """Read the ring -> dict of steps, loss, parts, grad_norm (means over accepted steps) and skipped (total).

        Raises NonFinite when the policy says so, when weights are non-finite, or when ranks hold different ones."""
        weight_norm = get_total_norm([p.detach() for p in self.params], foreach=True).float()
        steps, self.steps, width = self.steps, [], PARTS + len(self.names)
        rows = self.ring[:len(steps)].flatten() if steps else weight_norm.new_empty(0)
        mine = torch.cat([rows, weight_norm.view(1), weight_norm.new_full((1,), float(len(_signals) > 0))])
        table = mine.new_empty(world_size() * len(mine))
        dist.all_gather_into_tensor(table, mine) if dist.is_initialized() else table.copy_(mine)
        table = np.array(table.tolist()).reshape(world_size(), -1)      # the one host read
        ring, norms = table[:, :-2].reshape(world_size(), len(steps), width), table[:, -2]
        if steps:
            self.ring.zero_()
        self.told_to_stop = bool(table[:, -1].any())
        self.after = steps[-1] + 1 if steps else self.after
        damage = "" if (norms == norms[0]).all() else f"ranks hold DIFFERENT weights, norms {norms.tolist()}"
        damage = damage if np.isfinite(norms).all() else f"weights are ALREADY non-finite, norms {norms.tolist()}"
        good = [k for k in range(len(steps)) if self._account(steps[k], ring[:, k], damage)]
        if damage:
            raise NonFinite(damage, self.after, intact=False)
        total = ring[:, good].sum(0).mean(0) if good else np.full(width, math.nan)   # a rank holds its share of a loss
        total = total.tolist()
        return {"steps": len(steps), "loss": total[LOSS], "parts": dict(zip(self.names, total[PARTS:])),
                "grad_norm": total[NORM] / world_size(), "skipped": sum(self.skips.values())}

    def _account(self, step, row, damage):
        """Count and tell one step, from its ring row on every rank (world_size, width) -> was it taken?"""
        self.seen += 1
        if not row[0, SKIPPED]:
            self.in_a_row = 0
            return True
        ranks, counted = np.flatnonzero(row[:, LOSS_BAD]).tolist(), row[0, COUNTED]
        cause = "float16 overflow" if not counted else "output" if row[:, OUTPUT_BAD].any() else "loss" if ranks else \
            "gradient"
        self.skips[cause] += 1
        self.in_a_row += int(counted)
        total = sum(self.skips.values()) - self.skips["float16 overflow"]
        parts = [name for name, column in zip(self.names, row[:, PARTS:].T) if not np.isfinite(column).all()]
        told = ", ".join([cause, *parts])           # the parts in the order in which the loss made them
        value, where = (row[ranks[0], LOSS], f"BEFORE backward: loss of rank(s) {ranks}") if ranks else \
            (row[0, NORM], "AFTER backward: gradient norm")
        self.log(f"step {step}: {'NaN' if math.isnan(value) else 'Inf'} detected {where} is {value} ({told}); "
                 f"step skipped, {self.in_a_row} in a row, {total} in total")
        if counted and self.examine:
            self.examine, examine = None, self.examine
            examine(step, step if self.policy == "stop" else self.after)
            self.output = self.nothing              # the replay's was looked at too
        good = "none of it touched the weights"
        if counted and self.policy == "stop":
            raise NonFinite(f"non-finite {told} at step {step}, {value}; {damage or good}", step, intact=not damage)
        if self.in_a_row > self.max_skips or total > max(self.max_skips, 0.01 * self.seen):
            raise NonFinite(f"{self.in_a_row} non-finite steps in a row, {total} of {self.seen} in total {self.skips}; "
                            f"{damage or good}", self.after, intact=not damage, bad=step)
        return False

    def state_dict(self):
        return {"scale": float(self.scale), "healthy": float(self.healthy), "skips": self.skips, "seen": self.seen,
                "in_a_row": self.in_a_row}

    def load_state_dict(self, state):
        self.scale, self.healthy = torch.tensor([state["scale"], state["healthy"]], device=self.device).unbind()
        self.skips, self.seen, self.in_a_row = dict(state["skips"]), state["seen"], state["in_a_row"]

# ---------------------------------------------------------------------------------------------------- stop signals
_signals = []                                       # received so far; a poll tells all ranks, the loop saves and ends

def listen(on=True):
    """From now on SIGTERM and Ctrl-C mean: save and stop. torchrun may pass Ctrl-C on twice: only the third kills."""
    def remember(number, frame):
        _signals.append(number)
        if _signals.count(signal.SIGINT) >= 3:
            raise KeyboardInterrupt
        os.write(2, b"\nsaving and stopping at the next poll; Ctrl-C three times ends at once\n")   # print may not here
    _signals.clear()
    signal.signal(signal.SIGTERM, remember if on else signal.SIG_DFL)
    signal.signal(signal.SIGINT, remember if on else signal.default_int_handler)
