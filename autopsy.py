"""What went non-finite, where and why: replays one bad batch and names the operation that bore the first Inf/NaN.

python autopsy.py out/<run>/autopsy/<event>     replays one that a run has kept

Imported only after a fault. Every aten operation of one forward and backward is looked at for non-finite output and its
non-finite inputs are remembered, so that the way from the loss (or a bad gradient) back to the birth can be walked. A
mask of -inf raises no alarm: only births on that way are told.
"""
import importlib
import json
import re
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import DTYPES, autocast, cast, fail, rank, seed_step
from runs import model_tensors, read_file, write_file


def kind(tensor):
    """'' if finite, else 'NaN' or 'Inf' (NaN if both)."""
    if not (torch.is_tensor(tensor) and tensor.is_floating_point() and tensor.numel()) or tensor.isfinite().all():
        return ""
    return "NaN" if tensor.isnan().any() else "Inf"


def share(tensor):
    """'12/64 of float32[2, 32]': how many elements are non-finite."""
    return f"{int((~tensor.isfinite()).sum())}/{tensor.numel()} of {str(tensor.dtype)[6:]}{list(tensor.shape)}"


def own_frame(frames):
    """The innermost stack line that is neither torch's nor this file's."""
    own = [frame for frame in frames if str(Path(torch.__file__).parent) not in frame and __file__ not in frame]
    found = re.match(r'\s*File "(.*)", line (\d+), in (\S+)\s*(.*)', own[-1], re.S) if own else None
    line = found[4].strip().split("\n")[0] if found else ""
    return f"{Path(found[1]).name}:{found[2]}, in {found[3]} |  {line}" if found else ""


class Trace(TorchDispatchMode):
    """Remembers each operation with a non-finite output as an event: what, where, from which inputs."""
    def __init__(self, names):
        super().__init__()
        self.names = names                         # data_ptr -> 'parameter x', 'buffer y', 'batch z'
        self.bad, self.modules, self.phase, self.asleep = {}, [], "forward", False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.asleep:                            # our own looking must not be traced
            return operation(*args, **kwargs)
        self.asleep = True
        try:
            return self.look(operation, args, kwargs)
        finally:                                   # a solver may raise, and its caller go on
            self.asleep = False

    def look(self, operation, args, kwargs):
        inputs = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t) and t.is_floating_point() and t.numel()]
        before = [(t, kind(t)) for t in inputs]    # now: the operation may work in place
        ranges = "; ".join(self.describe(t, k) for t, k in before)
        out = operation(*args, **kwargs)
        for tensor in tree_leaves(out):
            if kind(tensor):
                self.remember(operation, tensor, before, ranges)
        return out

    def describe(self, tensor, kind):
        name = self.names.get(tensor.data_ptr(), "")
        if kind:
            return f"{name}{list(tensor.shape)} holds {kind}"
        largest, zeros = float(tensor.detach().abs().max()), int((tensor == 0).sum())
        return f"{name}{list(tensor.shape)} max|.|={largest:.3g}" + (f" zeros={zeros}" if zeros else "")

    def remember(self, operation, tensor, before, ranges):
        now = kind(tensor)
        node = torch._C._current_autograd_node() if self.phase == "backward" else None
        frames = node.metadata.get("traceback_", []) if node else traceback.format_stack()
        module = f"module {self.modules[-1]}" if self.modules else ""
        event = {"what": str(operation).removeprefix("aten."), "short": operation._schema.name.removeprefix("aten::"),
                 "kind": now, "share": share(tensor), "inputs": ranges, "site": own_frame(frames),
                 "born": not any(k == now for _, k in before),   # NaN out of Inf is a birth too
                 "parents": [self.source(t, k) for t, k in before if k], "phase": self.phase,
                 "where": f"autograd node {node.name()}" if node else module}
        self.bad[id(tensor)] = (event, tensor)     # holding the tensor keeps its id from being used again

    def source(self, tensor, kind):
        """The event that made this non-finite input; one that no operation made came in from outside."""
        if id(tensor) in self.bad:
            return self.bad[id(tensor)][0]
        name = self.names.get(tensor.data_ptr(), "a tensor from outside the replay").strip()
        return {"what": name, "short": name, "kind": kind, "share": share(tensor), "born": True, "parents": [],
                "phase": "", "inputs": "", "site": "", "where": ""}


def dissect(model, replay, batch, header):
    """Replay once -> (report, was anything non-finite?). Leaves gradients, buffers and weights as they were.

    replay() -> loss, made from batch (dict of tensors and numbers) with the RNG set inside."""
    named = [(f"parameter {n}", p) for n, p in model.named_parameters()] + [(f"buffer {n}", b) for n, b in
             model.named_buffers()] + [(f"batch['{n}']", t) for n, t in batch.items() if torch.is_tensor(t)]
    lines = [f"=== AUTOPSY {header}"]
    for name, t in named:
        if kind(t):
            lines.append(f"  at entry: {name} already holds {kind(t)}, {share(t)}")
        elif t.is_floating_point() and t.numel() and float(t.detach().abs().max()) > 1e6:
            lines.append(f"  at entry: {name} is finite but huge, max|.|={float(t.detach().abs().max()):.3g}")
    trace = Trace({t.data_ptr(): name + " " for name, t in named})
    buffers = [(module, name, buffer, buffer.clone()) for module in model.modules()
               for name, buffer in module.named_buffers(recurse=False)]
    hooks = []
    for name, module in model.named_modules():
        hooks += [module.register_forward_pre_hook(lambda m, i, name=name or "(root)": trace.modules.append(name)),
                  module.register_forward_hook(lambda m, i, o: trace.modules.pop() and None, always_call=True)]
    try:
        with torch.autograd.set_detect_anomaly(True, check_nan=False), trace, torch.enable_grad():
            loss = replay()
            trace.phase, gradients = "backward", []
            if not kind(loss):
                wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
                gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
        for module, name, buffer, saved in buffers:     # moved in place or replaced
            module._buffers[name] = buffer.copy_(saved)
    sick = loss if kind(loss) else next((g for g in gradients if kind(g)), None)
    lines.append(f"  replayed loss = {float(loss.detach()):.6g} " + (
        "(non-finite in FORWARD)" if kind(loss) else "(finite: looking in BACKWARD)"))
    if sick is None:
        largest, name = max((float(g.abs().max()), name) for name, g in zip(wanted, gradients) if g is not None)
        if largest > 1e15:                         # squares of such numbers no longer fit a float32
            lines.append(f"  every gradient is finite, but their norm overflows: {name} has max|.|={largest:.3g}")
            return "\n".join(lines), True
        lines.append("  did NOT reproduce, loss and gradients are finite: weights that have moved on, a kernel that "
                     "varies from run to run, a fault of compiled code only, or the hardware")
        return "\n".join(lines), False
    chain, event = [], trace.source(sick, kind(sick))
    while event and event not in chain:
        chain.append(event)
        event = next(iter(sorted(event["parents"], key=lambda parent: parent["kind"] != "NaN")), None)
    for event in reversed([event for event in chain if event["born"]]):
        birth = f"{event['kind']} BORN in {event['phase']}" if event["phase"] else f"{event['kind']} CAME IN with"
        lines.append(f"  {birth}: {event['what']}  [{event['share']}]  {event['where']}".rstrip())
        lines += [f"      inputs: {event['inputs']}"] if event["inputs"] else []
        lines += [f"      at {event['site']}"] if event["site"] else []
    path = " -> ".join(event["short"] for event in reversed(chain))
    path = path if len(path) < 300 else f"{path[:140]} ... {path[-140:]}"
    return "\n".join(lines + [f"  path to {'loss' if kind(loss) else 'gradient'}: {path}"]), True


def examine(script, run, model, config, dtype, step, now, batch_of, loss_of):
    """The guard's examine(), on every rank: dissect this rank's micro-batches of a step, tell of and keep the bad one.

    batch_of(micro) -> dict of tensors and numbers; loss_of(batch) -> loss. The weights are from before step now."""
    try:
        for micro in range(config.grad_accum):
            batch = batch_of(micro)
            def replay():
                seed_step(config.seed, step, rank(), micro)
                return loss_of(batch)
            report, found = dissect(model, replay, batch, f"step {step} rank {rank()} micro-batch {micro}")
            if found:
                break
    except Exception:                              # a helper must not take the run down: its own failure is a finding
        report, found, batch = f"=== AUTOPSY of step {step} failed itself:\n{traceback.format_exc()}", False, {}
    anyone = torch.tensor(float(found), device=next(model.parameters()).device)
    if dist.is_initialized():
        dist.all_reduce(anyone, op=dist.ReduceOp.MAX)
    if not found and (anyone or rank() > 0):
        return
    age = "exactly those of the step" if now == step else f"a little newer than the step, from before step {now}"
    report += f"\n  weights: {age}"
    folder = run.folder / "autopsy" / f"step-{step:08d}-rank{rank()}"
    kept = f"kept: python autopsy.py {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.txt").write_text(report + "\n")
        write_file(folder / "model.safetensors", model_tensors(model), {"about": model.about})
        write_file(folder / "batch.safetensors", {k: v for k, v in batch.items() if torch.is_tensor(v)}, {
            "script": script, "step": step, "rank": rank(), "micro": micro, "config": vars(config),
            "dtype": str(dtype)[6:], "numbers": {k: v for k, v in batch.items() if not torch.is_tensor(v)}})
    except OSError as error:                       # a full disk
        kept = f"could not be kept: {error}"
    print(f"{report}\n  {kept}", file=sys.stderr, flush=True)


def main(folder):
    """Replay a kept event and print its report."""
    try:
        tensors, event = read_file(Path(folder) / "batch.safetensors")
    except ValueError as error:
        fail(f"{error}; give the folder of an event: python autopsy.py out/<run>/autopsy/<event>")
    script = importlib.import_module(event["script"])
    device, config = torch.device("cpu"), script.Config(**event["config"])
    model = script.load_model(Path(folder) / "model.safetensors").train()
    batch = cast(tensors, device) | event["numbers"]
    def replay():
        seed_step(config.seed, event["step"], event["rank"], event["micro"])
        with autocast(device, DTYPES[event["dtype"]]):
            return script.compute_loss(model, batch, event["step"], config)[0]
    with torch.no_grad():                           # what is loaded at its first use, as a teacher, is no part of it
        replay()
    print(dissect(model, replay, batch, f"step {event['step']} rank {event['rank']} micro-batch {event['micro']}")[0])


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else fail("python autopsy.py out/<run>/autopsy/<event>")
