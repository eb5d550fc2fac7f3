"""What only a GPU can show of the guard: no host sync, a working canary, a bad step that touches nothing.

Skipped without CUDA; python -m pytest tests/test_cuda.py needs neither rdkit nor data.
"""
import math

import pytest
import torch
import torch.nn as nn

from common import Guard, autocast, launch, pick_dtype

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def case(request):
    """A small model with its optimizer, guard and a function that makes the loss, on the GPU."""
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    guard = Guard(model, optimizer, fp16=request.param == "float16")
    dtype, _ = pick_dtype(request.param, device)
    x, y = torch.randn(16, 32, device=device), torch.randint(0, 8, (16,), device=device)

    def loss():
        with autocast(device, dtype):
            logits = model(x)
        return nn.functional.cross_entropy(logits.float(), y)
    return model, optimizer, guard, loss


def test_backward_and_step_do_not_wait_for_the_gpu(case):
    model, optimizer, guard, loss = case
    for step in range(3):                           # the first steps allocate state
        guard.backward(loss())
        guard.step(step)
    guard.poll()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3, 10):
            guard.backward(loss())
            guard.step(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert guard.poll()["steps"] == 7 and guard.on_device


def test_a_bad_step_touches_nothing(case):
    model, optimizer, guard, loss = case
    guard.backward(loss())
    guard.step(0)

    def tensors():
        return [t for p in model.parameters() for t in (p, *optimizer.state[p].values())]
    before = [t.clone() for t in tensors()]
    guard.backward(loss() * math.nan)
    assert guard.step(1).item() == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(), strict=True))
    assert guard.poll()["skipped"] == 1


def test_auto_is_cuda():
    assert launch("auto").type == "cuda"
