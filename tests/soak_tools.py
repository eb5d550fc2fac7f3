"""Any of the five scripts with NaN and Inf: python tests/soak_tools.py train_edl "nan-loss:17:0 inf-input:3:1" [flags].

Not a test file: test_soak.py starts it, kills it and goes on with --resume.
"""
import importlib
import sys
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_hook

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import common  # noqa: E402

KINDS = [f"{value}-{where}" for value in ("nan", "inf") for where in ("input", "loss", "gradient")]


def arm(script, faults):
    """Let the script meet faults, "kind:step:rank kind:step:rank", in each phase: KINDS, where input is what the first
    layer makes of it (of tokens, their vectors), and gradient is one behind a finite loss."""
    compute_loss = script.compute_loss
    parts = [fault.split(":") for fault in faults.split()]
    wanted = {(int(step), int(rank)): kind.split("-") for kind, step, rank in parts}

    def faulty_loss(model, batch, step, config):
        value, where = wanted.get((step, common.rank()), ("1", "")) if torch.is_grad_enabled() else ("1", "")
        layers = []

        def spoil(module, inputs, out):
            layers.append(module)
            return out * float(value) if len(layers) == 1 else None
        hook = register_module_forward_hook(spoil) if where == "input" else None
        try:
            loss, parts = compute_loss(model, batch, step, config)
        finally:
            if hook:
                hook.remove()
        if where == "gradient":
            loss.register_hook(lambda gradient: gradient * float(value))
        return loss * float(value) if where == "loss" else loss, parts
    script.compute_loss = faulty_loss


if __name__ == "__main__":
    script = importlib.import_module(sys.argv[1])
    arm(script, sys.argv[2])
    script.main(sys.argv[3:])
