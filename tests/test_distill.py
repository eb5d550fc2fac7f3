"""train_distill.py piece by piece, against slow loops in float64: the loss and its gradient, cached teachers, batches,
accumulation and ranks, the decoder, evaluation; and the original's defects. Whole runs: test_run_distill.py.
"""
import dataclasses
import functools
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distill_tools import GPT2, LLAMA, ROOT, main_here, random_model, small_config, write_model, write_set
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import train_distill as script
from data.text.cache import cached_teacher, told
from data.text.tables import packed, read_folder
from runs import model_tensors, parse_flags, write_file
from train_distill import (CHUNK, ChunkedLoss, Config, Mix, build_model, compare, compute_loss, evaluate, generate,
                           get_batch, get_rows, load_data, load_hf, load_model, lr_at, save_hf, settle)

CPU = torch.device("cpu")
DIVERGENCES = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.1)]
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": False}
LLAMA3 = LLAMA | {"num_key_value_heads": 1, "rope_scaling": {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64}}
KINDS = {"gpt2": GPT2, "gpt2 scaled": GPT2 | {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
         "llama": LLAMA, "llama3": LLAMA3, "qwen2": LLAMA | {"model_type": "qwen2"}, "qwen3": QWEN3}

# ---------------------------------------------------------------------------------------------------------------- tools
def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def close(found, wanted, tolerance=1e-12):
    found, wanted = torch.as_tensor(found).double(), torch.as_tensor(wanted).double()
    assert found.shape == wanted.shape and found.isfinite().all()
    assert (found - wanted).abs().max() <= tolerance * max(1e-3, wanted.abs().max()), (found - wanted).abs().max()

def divergence(log_p, log_q, kind, beta):
    """Of each position, as the papers write it."""
    def kl(one, other):
        return (one.exp() * (one - other)).sum(-1)
    if kind != "jsd":
        return kl(log_p, log_q) if kind == "forward" else kl(log_q, log_p)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)

def naive(s, log_p, targets, asked, mix):
    """The loss and its kd and ce from all logits s (N, V) at once, and the teacher's log p at T."""
    kd = divergence(log_p, (s / mix.temperature).log_softmax(-1), mix.divergence, mix.beta)
    kd = mix.scale * mix.kd_weight * mix.temperature ** 2 * kd.sum()
    ce = mix.scale * (asked * F.cross_entropy(s, targets, reduction="none")).sum()
    return mix.alpha * kd + (1 - mix.alpha) * ce, kd, ce

@pytest.fixture
def chunk(monkeypatch):
    """chunk(n, V): n positions at once."""
    return lambda n, V: monkeypatch.setitem(CHUNK, "cpu", n * V)

WORDS = "mass speed force is two three doubled grows \u00e9t\u00e9 \u00bd".split()

@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """36 rows of bytes of many lengths; 24 are train's, 12 val's."""
    rng = np.random.default_rng(0)
    return write_set(tmp_path_factory.mktemp("text"), [(" ".join([f"{i}", *rng.choice(WORDS, rng.integers(1, 8))]),
                     " ".join(rng.choice(WORDS, rng.integers(1, 9)))) for i in range(36)])

@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Hugging Face folders of random models: a teacher of another width and kind, a student, one with a head."""
    home, raws = tmp_path_factory.mktemp("models"), (GPT2 | {"n_embd": 24}, LLAMA, QWEN3)
    return [str(write_model(home / f"{i}", raw, i + 1)) for i, raw in enumerate(raws)]

@pytest.fixture(scope="module")
def data(folder):
    return read_folder(folder, 320, False, CPU)

@pytest.fixture
def own(folder, tmp_path):
    """A copy of the data, for a test that leaves caches in it."""
    return shutil.copytree(folder, tmp_path / "own")

def config_of(folder, models, **fields):
    """Of a student beside its teacher."""
    return small_config(**dict(data_dir=folder, teacher=models[0], student=models[fields.pop("which", 1)], seed=3,
                               phase="student", batch_size=8, max_length=320) | fields)

def gradient_of(folder, models, fields, double, length=0):
    """One optimizer step's loss, its parts and gradient by way of the guard, under DDP where there are ranks.

    double: in float64, the teacher too. length: pad to it instead of to the longest row of each micro-batch."""
    patch, config = pytest.MonkeyPatch(), config_of(folder, models, **fields)
    if double:
        patch.setitem(common.DTYPES, "float32", torch.float64)
    script.frozen_teacher.cache_clear()
    data = load_data(config)
    if config.cache_teacher:
        data.cache = cached_teacher(script, config, data)
    patch.setattr(script, "get_rows", lambda data, rows, _, everywhere: get_rows(data, rows, length, everywhere))
    raw_model = build_model(config, data.vocab)
    raw_model = (raw_model.double() if double else raw_model).train()
    model = common.wrap_ddp(raw_model, CPU)
    guard, total = common.Guard(model, torch.optim.SGD(raw_model.parameters()), log=str), 0
    for micro in range(config.grad_accum):
        guard.sync_gradients(micro == config.grad_accum - 1)
        loss, parts = compute_loss(model, get_batch(data, "train", 7, config, micro), 7, config)
        assert loss.dtype == (torch.float64 if double else torch.float32) and loss.dim() == 0
        guard.backward(loss.float(), parts)
        total = total + torch.stack([loss.detach(), *parts.values()])
    if common.world_size() > 1:
        torch.distributed.all_reduce(total)
    patch.undo()
    script.frozen_teacher.cache_clear()
    return total, {name: p.grad.clone() for name, p in raw_model.named_parameters()}

def assert_same_step(found, wanted, tolerance):
    close(found[0], wanted[0], tolerance)
    assert found[1].keys() == wanted[1].keys()
    scale = max(gradient.abs().max() for gradient in wanted[1].values())
    for name, gradient in wanted[1].items():
        assert gradient.abs().max() > 0 and (found[1][name] - gradient).abs().max() <= tolerance * scale, name

def refused(capsys, function, *arguments):
    """The one line on stderr of what ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error

# ------------------------------------------------------------------------------------------------------------- the loss
def problem(N=11, D=5, V=19, padded=23, dtype=torch.float64):
    """h, weight, targets, asked, what the teacher says: its own width, its own number of padded rows."""
    h, weight, t, teacher_weight = (3 * noise(*shape, seed=i).to(dtype) for i, shape in enumerate((
        (N, D), (padded, D), (N, 7), (V + 1, 7))))
    asked = torch.tensor([1., 1, 0] * N)[:N]
    return h, weight / 2, torch.arange(N) * 7 % V, asked, {"h": t, "weight": teacher_weight / 3}

@pytest.mark.parametrize("size", [1, 4, 11, 50])
@pytest.mark.parametrize("T", [1.0, 3.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind, beta", DIVERGENCES)
def test_the_loss_against_all_logits_at_once(chunk, kind, beta, alpha, T, size):
    V, mix = 19, Mix(19, 1 / 13, alpha, T, kind, beta, 1.7)
    chunk(size, V)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        h, weight, targets, asked, taught = problem(dtype=dtype)
        inputs = [x.clone().requires_grad_() for x in (h, weight)]
        loss, total = ChunkedLoss.apply(*inputs, targets, asked, taught, mix)
        (2.5 * loss).backward()
        exact = [x.double().requires_grad_() for x in (h, weight)]
        s, t = exact[0] @ exact[1][:V].T, taught["h"].double() @ taught["weight"][:V].double().T
        wanted, kd, ce = naive(s, (t / T).log_softmax(1), targets, asked, mix)
        (2.5 * wanted).backward()
        assert loss.dtype == total.dtype == dtype and not total.requires_grad
        close(loss.detach(), wanted.detach(), tolerance)
        teacher_ce = (asked * F.cross_entropy(t, targets, reduction="none")).sum() / 13
        tops = [(asked * x.abs().amax(1)).sum() / 13 for x in (s, t)]
        close(total, torch.stack([*tops, kd, ce, teacher_ce]).detach(), tolerance)
        for x, y in zip(inputs, exact):
            assert x.grad.dtype == dtype and y.grad.abs().max() > 1e-3
            close(x.grad, y.grad, tolerance)
        assert not inputs[1].grad[V:].any() and torch.equal(h, inputs[0]) and torch.equal(weight, inputs[1])

def test_golden_numbers():
    """z = (ln 3, 0) at T = 2, so q = (3/4, 1/4) and p = (1/2, 1/2); at T = 1 the softmax is (9/10, 1/10)."""
    h, weight = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[2 * math.log(3)], [0.0], [99.0]]).double()
    taught = {"h": h, "weight": torch.zeros(2, 1, dtype=torch.float64)}
    values = {"forward": math.log(4 / 3) / 2, "reverse": 0.75 * math.log(1.5) - 0.25 * math.log(2),
              "jsd": (math.log(0.8) + math.log(4 / 3)) / 4 + (0.75 * math.log(1.2) + 0.25 * math.log(2 / 3)) / 2}
    for kind, value in values.items():
        for alpha in (0.0, 0.25, 1.0):
            mix = Mix(2, 0.5, alpha, 2.0, kind)
            loss, total = ChunkedLoss.apply(h, weight, torch.tensor([0]), torch.ones(1), taught, mix)
            close(loss, 0.5 * (alpha * 4 * value + (1 - alpha) * math.log(10 / 9)), 2e-7)
            close(2 * total, [2 * math.log(3), 0, 4 * value, math.log(10 / 9), math.log(2)], 2e-7)
    x, W = h.clone().requires_grad_(), weight.clone().requires_grad_()
    ChunkedLoss.apply(x, W, torch.tensor([0]), torch.ones(1), taught, Mix(2, 1.0, 0.5, 2.0))[0].backward()
    close(W.grad, torch.tensor([[0.2], [-0.2], [0.0]]), 1e-6)           # 0.5 * 2 (3/4 - 1/2) + 0.5 (9/10 - 1)
    close(x.grad, [[0.4 * math.log(3)]], 1e-6)

@pytest.mark.parametrize("kind, beta", DIVERGENCES)
def test_compare_against_finite_differences(kind, beta):
    log_p, z, eps = (2 * noise(3, 6)).log_softmax(1), 2 * noise(3, 6, seed=1), 1e-5
    value, gradient = compare(log_p.clone(), z.log_softmax(1), kind, beta)
    close(value, divergence(log_p, z.log_softmax(1), kind, beta), 1e-13)
    assert (value > 0.01).all()
    for j in range(6):
        moved = [divergence(log_p, (z + eps * sign * F.one_hot(torch.tensor(j), 6)).log_softmax(1), kind, beta)
                 for sign in (1, -1)]
        close(gradient[:, j], (moved[0] - moved[1]) / (2 * eps), 1e-7)
    close(compare(log_p.clone(), log_p.clone(), kind, beta)[1], torch.zeros(3, 6), 1e-12)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, beta", DIVERGENCES)
def test_extreme_logits_are_finite(chunk, kind, beta, dtype):
    """Of a student and a teacher that are sure of opposite things, or of the same."""
    chunk(2, 4)
    s, t = 1e4 * torch.eye(4), 1e4 * torch.eye(4)[[1, 0, 2, 3]] - 1e4 * torch.eye(4)[[2, 2, 3, 0]]
    for T, alpha in itertools.product((1.0, 0.1), (0.0, 0.5, 1.0)):
        x, W = s.clone().requires_grad_(), torch.eye(4, requires_grad=True)
        taught, mix = {"h": t.to(dtype), "weight": torch.eye(4, dtype=dtype)}, Mix(4, 1.0, alpha, T, kind, beta)
        with common.autocast(CPU, dtype):
            loss, total = ChunkedLoss.apply(x, W, torch.tensor([1, 1, 2, 0]), torch.ones(4), taught, mix)
        loss.backward()
        assert loss.dtype == x.grad.dtype == W.grad.dtype == torch.float32 and loss >= 0 and loss.isfinite()
        assert total.isfinite().all() and x.grad.isfinite().all() and W.grad.isfinite().all()

def test_autocast_makes_products_in_low_precision_and_all_else_in_float32(chunk):
    chunk(3, 19)                                    # the gradient of the weight is a sum over chunks
    (h, weight, targets, asked, taught), found = problem(dtype=torch.float32), []
    for dtype in (torch.float32, torch.bfloat16):
        x, W = h.clone().requires_grad_(), weight.clone().requires_grad_()
        with common.autocast(CPU, dtype):
            loss = ChunkedLoss.apply(x, W, targets, asked, taught, Mix(19, 1 / 11, 0.5, 3.0))[0]
        found.append((loss.detach(), *torch.autograd.grad(loss, (x, W))))
    for one, other in zip(*found):
        assert one.dtype == other.dtype == torch.float32 and 0 < (one - other).abs().max() < 0.05 * one.abs().max()

def peak_of(function):
    """Bytes that are alive at once at most, beyond those that were there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        function()
    moves = [event.nbytes() for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert moves
    return int(np.cumsum(moves).max())

class Largest(TorchDispatchMode):
    """The most float32 elements behind a tensor that any operation gave back."""
    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        sizes = [x.untyped_storage().nbytes() // 4 for x in tree_leaves(out) if torch.is_tensor(x)]
        self.most = max(self.most, *sizes, 0)
        return out

@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind, beta", DIVERGENCES[:3])
def test_logits_of_all_positions_never_exist(chunk, kind, beta, cached):
    N, D, V = 300, 16, 8000
    h, weight, targets, asked, taught = problem(N, D, V, V, torch.float32)
    asked, mix, T = torch.ones(N), Mix(V, 1 / N, 0.5, 3.0, kind, beta), 3.0
    log_p = (taught["h"] @ taught["weight"][:V].T / T).log_softmax(1)
    if cached:
        taught = told(script, log_p, targets, Config(temperature=T), 8)

    def whole():
        x, W = h.clone().requires_grad_(), weight.clone().requires_grad_()
        naive(x @ W.T, log_p, targets, asked, mix)[0].backward()

    def chunked():
        x, W = h.clone().requires_grad_(), weight.clone().requires_grad_()
        ChunkedLoss.apply(x, W, targets, asked, taught, mix)[0].backward()
    chunk(10, V)
    bound = 4 * (5 * D * V + 6 * 10 * V + 5 * N * D)                    # copies of the weight, six tensors of a chunk
    assert peak_of(chunked) < bound and peak_of(whole) > 4 * bound
    with Largest() as seen:
        chunked()
    assert max(10 * V, D * V) <= seen.most < N * V / 10

def test_a_training_step_holds_no_logits_of_its_batch(data, folder, models, monkeypatch):
    config = config_of(folder, models)
    batch, model = get_batch(data, "train", 0, config), build_model(config, data.vocab).train()
    monkeypatch.setitem(CHUNK, "cpu", 20 * 257)
    for function, share in ((lambda: compute_loss(model, batch, 9, config)[0].backward(), (0, 0.5)),
                            (lambda: model(batch["tokens"]), (1, 1))):
        with Largest() as seen:
            function()
        assert share[0] <= seen.most / (batch["tokens"].numel() * 257) <= share[1]

# ------------------------------------------------------------------------------------------------- what is cached of it
@pytest.mark.parametrize("T", [1.0, 3.0])
@pytest.mark.parametrize("kind, beta", DIVERGENCES)
def test_a_cached_teacher_has_its_likeliest_tokens_and_one_class_for_the_rest(chunk, kind, beta, T):
    h, weight, targets, asked, taught = problem()
    V, t, mix = 19, taught["h"] @ taught["weight"][:19].T, Mix(19, 1 / 13, 0.75, T, kind, beta)
    chunk(4, V)
    for K in (1, 5, V - 1, V):
        x, W = h.clone().requires_grad_(), weight.clone().requires_grad_()
        y, U = h.clone().requires_grad_(), weight.clone().requires_grad_()
        kept = told(script, t, targets, Config(temperature=T), K)
        loss, total = ChunkedLoss.apply(x, W, targets, asked, kept, mix)
        loss.backward()
        s, inside = y @ U[:V].T, torch.zeros(11, V, dtype=torch.bool).scatter(1, (t / T).topk(K)[1], True)

        def classes(logits):
            log_p = (logits / T).log_softmax(1)
            rest = [log_p[~inside].view(11, -1).exp().sum(1, keepdim=True).log()] if K < V else []
            return torch.cat([log_p[inside].view(11, -1), *rest], 1)
        kd = T ** 2 * divergence(classes(t), classes(s), kind, beta).sum() / 13
        ce = (asked * F.cross_entropy(s, targets, reduction="none")).sum() / 13
        (0.75 * kd + 0.25 * ce).backward()
        close(loss.detach(), (0.75 * kd + 0.25 * ce).detach()), close(total[2], kd.detach())
        close(total[4], (asked * F.cross_entropy(t, targets, reduction="none")).sum() / 13)
        close(x.grad, y.grad), close(W.grad, U.grad)
        if 1 < K < V - 1:                           # without the rest the loss is another, and a poor one
            bare = [classes(logits)[:, :K].log_softmax(1) for logits in (t, s.detach())]
            without = T ** 2 * divergence(*bare, kind, beta).sum() / 13
            assert abs(float(without - total[2])) > 0.1 * float(total[2])

@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_a_cache_of_all_tokens_equals_the_teacher_itself(own, models, kind):
    online = gradient_of(own, models, {"divergence": kind}, False)
    cached = gradient_of(own, models, {"divergence": kind, "cache_teacher": 257}, False)
    assert_same_step(cached, online, 2e-6)
    few = gradient_of(own, models, {"divergence": kind, "cache_teacher": 8}, False)
    assert few[0][3] < 0.95 * online[0][3]          # of classes that are put together less is known
    close(few[0][[1, 2, 4, 5]], online[0][[1, 2, 4, 5]], 1e-6)          # all else is the same

def cache_of(folder, models, fields):
    config = config_of(folder, models, **fields)
    script.frozen_teacher.cache_clear()
    cached_teacher(script, config, load_data(config))

def arrays_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

def test_a_cache_that_was_made_with_something_else_is_refused(own, models, tmp_path, capsys):
    models, four = (str(shutil.copytree(models[0], tmp_path / "teacher")), models[1]), {"cache_teacher": 4}
    cache_of(own, models, four)
    cache, = own.glob("teacher-*-4")
    before = arrays_of(cache)
    cache_of(own, models, four | {"divergence": "jsd", "alpha": 0.9, "seed": 8, "batch_size": 3})
    assert arrays_of(cache) == before               # these do not matter
    cache_of(own, models, {"cache_teacher": 5})
    assert {path.name for path in own.glob("*teacher-*")} == {cache.name, cache.name[:-1] + "5"}
    for fields, what in (({"temperature": 2.0}, "temperature"), ({"teacher_dtype": "bfloat16"}, "teacher_dtype"),
                         ({"dtype": "bfloat16"}, "dtype"), ({"max_length": 70}, "rows"),
                         ({"train_on_prompt": True}, "rows"), ({}, "teacher")):
        if not fields:
            write_model(tmp_path / "teacher", GPT2 | {"n_embd": 24}, 5)
        error = refused(capsys, cache_of, own, models, four | fields)
        assert f"{cache} is stale, made with another {what};" in error and arrays_of(cache) == before
    shutil.rmtree(cache)
    cache_of(own, models, four)
    assert arrays_of(cache) != before

def test_one_or_two_ranks_make_the_same_cache_where_another_was_killed(own, models, pair):
    pair.run(cache_of, own, models, {"cache_teacher": 4})
    cache, = own.glob("*teacher-*")
    before = arrays_of(cache)
    assert len(before) == 6
    for run in (cache_of, functools.partial(pair.run, cache_of)):
        half = cache.rename(own / f".{cache.name}.999999999.new")       # no process has that number
        (half / "meta.json").unlink()
        (half / "top.npy").write_bytes(b"half")
        run(own, models, {"cache_teacher": 4})
        assert arrays_of(cache) == before and not list(own.glob(".*.new"))

# ------------------------------------------------------------------------------------- accumulation, ranks and padding
@pytest.mark.parametrize("double, tolerance", [(True, 1e-10), (False, 1e-5)])
@pytest.mark.parametrize("fields", [{"which": 2}, {"divergence": "jsd", "train_on_prompt": True}, {"cache_teacher": 8}],
                         ids=str)
def test_a_step_does_not_depend_on_how_it_is_cut(own, models, pair, fields, double, tolerance):
    """Defect 3: accumulation multiplied the gradient."""
    tolerance = 1e-6 if double and "cache_teacher" in fields else tolerance
    wanted = gradient_of(own, models, fields, double)
    assert wanted[0][0] > 1
    for ranks, batch_size, grad_accum, length in ((1, 4, 2, 0), (1, 2, 4, 0), (1, 1, 8, 0), (1, 8, 1, 300),
                                                  (1, 2, 4, 300), (2, 4, 1, 0), (2, 2, 2, 0), (2, 2, 2, 300)):
        step = own, models, fields | {"batch_size": batch_size, "grad_accum": grad_accum}, double, length
        for found in pair.run(gradient_of, *step) if ranks == 2 else [gradient_of(*step)]:
            assert_same_step(found, wanted, tolerance)

@pytest.mark.parametrize("raw", [LLAMA, QWEN3], ids=["tied", "untied"])
def test_the_gradient_of_all_weights_against_autograd_through_all_logits(data, folder, models, raw, monkeypatch):
    config = config_of(folder, models, alpha=0.375)
    monkeypatch.setitem(common.DTYPES, "float32", torch.float64)
    script.frozen_teacher.cache_clear()
    model, batch = random_model(raw, 4).double(), get_batch(data, "train", 0, config)
    s, t = (one(batch["tokens"]).flatten(0, 1)[batch["place"]] for one in (
        model, load_hf(models[0], "cpu", torch.float64)))
    mix = Mix(257, 1 / batch["count"], 0.375, 3.0)
    wanted = naive(s, (t / 3).log_softmax(1).detach(), batch["targets"], batch["asked"], mix)[0]
    grads = torch.autograd.grad(wanted, [*model.parameters()])
    loss = compute_loss(model, batch, 0, config)[0]
    close(loss.detach(), wanted.detach())
    for p, found, gradient in zip(model.parameters(), torch.autograd.grad(loss, [*model.parameters()]), grads):
        close(found, gradient, 1e-11)
        assert gradient.abs().max() > 0
    script.frozen_teacher.cache_clear()

def loss_of(models, config, data):
    model = build_model(config, data.vocab)
    return float(sum(compute_loss(model, get_batch(data, "train", 0, config, micro), 0, config)[0].detach()
                     for micro in range(config.grad_accum)))

@torch.no_grad()
def test_batchmean_is_the_originals_formula_and_the_default_the_mean_over_tokens(data, folder, models):
    """Defect 1: prompts and pads were added up too, and the sum divided by rows."""
    def log_p(name, batch):
        return F.log_softmax(load_hf(name)(batch["tokens"]).double() / 3, -1)
    for batch_size, grad_accum in ((8, 1), (4, 2)):
        config = config_of(folder, models, alpha=1.0, batch_size=batch_size, grad_accum=grad_accum)
        original = dataclasses.replace(config, kd_reduction="batchmean")
        batches = [get_batch(data, "train", 0, original, micro) for micro in range(grad_accum)]
        wanted = sum(9 * F.kl_div(log_p(models[1], batch), log_p(models[0], batch).exp(), reduction="batchmean")
                     for batch in batches) / grad_accum
        ce = loss_of(models, dataclasses.replace(config, alpha=0.0), data)
        for alpha in (0.0, 0.25, 1.0):
            found = loss_of(models, dataclasses.replace(original, alpha=alpha), data)
            close(found, alpha * wanted + (1 - alpha) * ce, 1e-5)
    batch = get_batch(data, "train", 0, config_of(folder, models))
    s, t = (log_p(name, batch).flatten(0, 1)[batch["place"]] for name in (models[1], models[0]))
    config = config_of(folder, models, alpha=1.0, kd_reduction=Config().kd_reduction)
    close(loss_of(models, config, data), 9 * divergence(t, s, "forward", 0).mean(), 1e-5)

def test_the_originals_loss_was_a_hundred_times_too_large(tmp_path, models):
    """Defect 1, at 128 positions: of their mean it made about their sum."""
    folder = write_set(tmp_path, [(f"{i} " + "x" * 30, "y" * (70 + i)) for i in range(24)])
    token = config_of(folder, models, alpha=1.0, max_length=129)
    batchmean, data = dataclasses.replace(token, kd_reduction="batchmean"), load_data(token)
    assert get_batch(data, "train", 0, token)["tokens"].shape == (8, 128)
    assert 50 < loss_of(models, batchmean, data) / loss_of(models, token, data) < 400

# -------------------------------------------------------------------------------------------------------------- batches
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("train_on_prompt", [False, True])
@pytest.mark.parametrize("max_length", [320, 75])
def test_rows_against_a_loop(folder, max_length, train_on_prompt, everywhere, capsys):
    data, arrays = read_folder(folder, max_length, train_on_prompt, CPU), {
        name: np.load(folder / f"{name}.npy") for name in ("tokens", "offsets", "prompt")}
    left = np.flatnonzero(np.minimum(np.diff(arrays["offsets"]), max_length) <= arrays["prompt"])
    assert sorted(np.concatenate([*data.rows.values()])) == sorted({*range(36)} - {*left})
    assert (max_length == 75) == (len(left) > 0) == ("left out" in capsys.readouterr().out)
    for seed, length in itertools.product(range(6), (0, 330)):
        rows = np.random.default_rng(seed).choice(data.rows["train"], 5)
        batch, found = get_rows(data, rows, length, everywhere), []
        texts = [arrays["tokens"][arrays["offsets"][row]:arrays["offsets"][row + 1]][:max_length] for row in rows]
        T = max(length, *(len(text) - 1 for text in texts))
        assert batch["tokens"].shape == (5, T) and batch["tokens"].dtype == batch["place"].dtype == torch.int64
        for b, (row, text) in enumerate(zip(rows, texts)):
            assert batch["tokens"][b].tolist() == [*text[:-1], *[text[-2]] * (T - len(text) + 1)]
            for t in range(T):
                asked = t < len(text) - 1 and (train_on_prompt or t + 1 >= arrays["prompt"][row])
                if asked or everywhere:
                    found.append((b * T + t, text[min(t + 1, len(text) - 1)], float(asked)))
        assert [*zip(*(batch[name].tolist() for name in ("place", "targets", "asked")))] == found

def batches_of(folder, models, fields):
    config = config_of(folder, models, **fields)
    data = load_data(config)
    batches = [get_batch(data, "train", step, config, micro) for step in range(5) for micro in range(config.grad_accum)]
    return [(batch["tokens"].tolist(), batch["targets"].tolist(), batch["count"], batch["rows"]) for batch in batches]

def test_batches_are_cut_from_one_global_batch_that_the_seed_and_step_decide(data, folder, models, pair):
    whole = batches_of(folder, models, {})
    assert batches_of(folder, models, {}) == whole != batches_of(folder, models, {"seed": 4})
    assert get_batch(data, "train", 4, config_of(folder, models))["tokens"].tolist() == whole[4][0]     # no history
    for fields in ({"batch_size": 2, "grad_accum": 4}, {"batch_size": 1, "grad_accum": 8}):
        found, n = batches_of(folder, models, fields), fields["grad_accum"]
        assert [sum((found[i * n + k][1] for k in range(n)), []) for i in range(5)] == [batch[1] for batch in whole]
        assert [batch[2:] for batch in found] == [batch[2:] for batch in whole for _ in range(n)]
    ranks = pair.run(batches_of, folder, models, {"batch_size": 2, "grad_accum": 2})
    for step, batch in enumerate(whole):
        mine = [micro for rank in ranks for micro in rank[2 * step:2 * step + 2]]
        assert sum((micro[1] for micro in mine), []) == batch[1] and {micro[2:] for micro in mine} == {batch[2:]}
        assert batch[2:] == (len(batch[1]), 8)
    epochs = [np.concatenate([script.bucketed_rows(data, "train", 2, 3, 4 * epoch + i // 3, 3)[i % 3]
                              for i in range(12)])
              for epoch in range(2)]                # 24 rows, and never two in one batch of 8
    assert all(sorted(rows) == data.rows["train"].tolist() for rows in epochs) and list(epochs[0]) != list(epochs[1])

# -------------------------------------------------------------------------------------------------------------- decoder
@pytest.mark.parametrize("raw", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_the_decoder_is_causal_and_decodes_with_a_cache_what_it_sees_at_once(raw):
    """What each kind computes is held against the library in test_hf.py."""
    model, tokens = random_model(raw, 5).double(), torch.arange(40).view(2, 20) * 37 % 257
    whole = model(tokens)
    close(whole, model(tokens, False) @ model.head_weight.T)
    changed = tokens.clone()
    changed[:, 11] += 1
    moved = (model(changed) - whole).abs().amax((0, 2))
    assert not moved[:11].any() and (moved[11:] > 1e-3).all()
    for cuts in ((1,) * 20, (7, 1, 1, 5, 6), (20,), (1, 19)):
        past, found = [[] for _ in model.blocks], []
        for part in tokens.split(cuts, 1):
            found.append(model(part, True, past))
        close(torch.cat(found, 1), whole, 1e-11)
        assert past[0][0].shape == (2, model.shape.kv_heads, 20, model.shape.head_dim)
    with pytest.raises(ValueError, match="513 positions, and the model has 512"):
        model(torch.zeros(1, 513, dtype=torch.int64))

def test_dropout_is_in_training_alone(data, folder, models):
    model = build_model(config_of(folder, models, dropout=0.4), data.vocab)

    def h(seed, training):
        torch.manual_seed(seed)
        return model.train(training)(data.table[None, :60].long(), False).detach()
    assert torch.equal(h(0, True), h(0, True)) and not torch.equal(h(0, True), h(1, True))
    assert torch.equal(h(0, False), h(1, False))
    assert torch.equal(h(0, False), load_hf(models[1])(data.table[None, :60].long(), False))
    teacher = script.frozen_teacher(models[0], "float32", "cpu")
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())

@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_teacher_in_half_precision_says_nearly_the_same(own, models, dtype):
    wanted, _ = gradient_of(own, models, {}, False)
    found, other = gradient_of(own, models, {"teacher_dtype": dtype}, False)
    assert script.frozen_teacher(models[0], dtype, "cpu").head_weight.dtype == common.DTYPES[dtype]
    close(found, wanted, 0.02), close(found[[1, 4]], wanted[[1, 4]], 1e-6)
    assert found[3] != wanted[3] and {p.dtype for p in other.values()} == {torch.float32}

def test_generate():
    model, prompt = random_model(LLAMA | {"max_position_embeddings": 24}, 6, 0.6, vocab=200), [5, 9, 2]
    greedy, ids = generate(model, prompt, 50, 0.0), [*prompt]
    while len(ids) < 24:
        ids.append(int(model(torch.tensor([ids]))[0, -1, :200].argmax()))
    assert greedy == ids[3:] == generate(model, prompt, 50, 1.3, top_k=1, seed=4) and max(greedy) < 200
    assert any(int(model(torch.tensor([ids[:k]]))[0, -1].argmax()) >= 200 for k in range(3, 24))
    assert generate(model, prompt, 5, 0.0) == greedy[:5] and len(set(greedy)) > 5
    last = next(i for i in reversed(range(21)) if greedy[i] not in greedy[:i])
    assert generate(model, prompt, 50, 0.0, end=greedy[last]) == greedy[:last]
    drawn = [generate(model, prompt, 21, 2.0, seed=seed) for seed in (0, 0, *range(1, 30))]
    assert drawn[0] == drawn[1] != drawn[2] and max(map(max, drawn)) < 200
    allowed = model(torch.tensor([prompt]))[0, -1, :200].topk(3)[1].tolist()
    first = [generate(model, prompt, 1, 5.0, 3, seed)[0] for seed in range(60)]
    assert {*first} == {*allowed}

# ------------------------------------------------------------------------------------------------------------- evaluate
def scores_of(folder, models, fields):
    config = config_of(folder, models, **fields)
    data = load_data(config)
    if config.cache_teacher:
        data.cache = cached_teacher(script, config, data)
    return evaluate(build_model(config, data.vocab).train(), data, config)

def slow_scores(config, data, models, rows):
    student, teacher, found = load_hf(models[1]), load_hf(models[0]), []
    for row in rows:
        ids = data.table[data.start[row]:data.start[row] + data.length[row] + 1].long()
        s, t = (one(ids[None, :-1])[0, data.first[row]:].detach().double() for one in (student, teacher))
        ce, teacher_ce = (F.cross_entropy(x, ids[1 + data.first[row]:], reduction="none") for x in (s, t))
        kd = config.temperature ** 2 * divergence(*((x / config.temperature).log_softmax(1) for x in (t, s)),
                                                  config.divergence, config.beta)
        loss = config.alpha * kd + (1 - config.alpha) * ce
        kl = divergence(t.log_softmax(1), s.log_softmax(1), "forward", 0)
        found.append(torch.stack([loss, ce, kl, teacher_ce], 1))
    return dict(zip(("loss", "ce", "kl", "teacher_ce"), torch.cat(found).mean(0).tolist()))

def assert_same_scores(found, wanted, tolerance=2e-6):
    assert found.keys() == wanted.keys()
    close([*found.values()], [*wanted.values()], tolerance)

@pytest.mark.parametrize("fields", [{}, {"divergence": "reverse", "alpha": 0.25, "temperature": 2.0}, {"alpha": 0.0}],
                         ids=str)
def test_evaluation_against_a_loop_per_row(data, folder, models, pair, monkeypatch, fields):
    config, model = config_of(folder, models, **fields), build_model(config_of(folder, models), 257)
    wanted = slow_scores(config, data, models, data.rows["val"])
    for most in (8192, 300, 1):
        monkeypatch.setattr(script, "packed", functools.partial(packed, most=most))
        for training in (True, False):
            assert_same_scores(evaluate(model.train(training), data, config), wanted)
            assert model.training == training
    for scores in pair.run(scores_of, folder, models, fields):
        assert_same_scores(scores, wanted)
    some = np.random.default_rng(0).permutation(data.rows["val"])[:5]
    assert_same_scores(evaluate(model, data, config, "val", 5), slow_scores(config, data, models, some))
    alone = evaluate(model, data, dataclasses.replace(config, teacher="", phase="teacher", alpha=0.0))
    assert_same_scores(alone, {"loss": wanted["ce"], "ce": wanted["ce"]})
    for most in (1, 200, 8192):                     # of each row once, and no more positions than that
        batches = packed(data, data.rows["train"], most)
        assert sorted(np.concatenate(batches)) == data.rows["train"].tolist()
        assert all(len(rows) == 1 or len(rows) * data.length[rows].max() <= most for rows in batches)

def test_evaluation_asks_the_teacher_itself_where_there_is_a_cache(own, models):
    """The cache is of training rows, and of the training's temperature."""
    assert_same_scores(scores_of(own, models, {"cache_teacher": 8}), scores_of(own, models, {}))

# ----------------------------------------------------------------------------------------- files, and defects by number
def test_files_are_read_back_bit_for_bit_and_those_of_another_script_refused(folder, models, tmp_path):
    for name, raw in KINDS.items():
        model = random_model(raw, 7)
        save_hf(model, tmp_path / name)
        again = load_hf(tmp_path / name)
        assert again.shape == model.shape and not again.training and again.raw.items() >= raw.items()
        assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())
    model = build_model(config_of(folder, models), 257)
    for name, about in (("best", model.about), ("other", {"config": {"phase": "teacher"}})):
        write_file(tmp_path / f"{name}.safetensors", model_tensors(model), {"about": about, "step": 0})
    again = load_model(tmp_path / "best.safetensors")
    assert torch.equal(again(torch.ones(1, 9).long()), model(torch.ones(1, 9).long())) and not again.training
    with pytest.raises(ValueError, match="other.safetensors is of another script"):
        load_model(tmp_path / "other.safetensors")

def word_tokenizer(folder, words):
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    return script.load_tokenizer(folder)

def test_vocabularies_of_equal_size_that_mean_other_tokens_are_refused(tmp_path, capsys):
    """Defect 4."""
    words = "? ### Instruction : Response End mass speed doubled tripled".split()
    same, swapped = (word_tokenizer(tmp_path / name, of) for name, of in (
        ("same", words), ("swapped", [*words[:6], *words[6:][::-1]])))
    longer = word_tokenizer(tmp_path / "longer", [*words, "beyond"])
    student, twin, other, longer = (
        str(write_model(tmp_path / f"m{i}", LLAMA | {"vocab_size": size}, i, tokenizer=tokenizer))
        for i, (tokenizer, size) in enumerate(((same, 10), (same, 16), (swapped, 10), (longer, 12))))
    folder = write_set(tmp_path, [("mass speed " * (1 + i), "doubled") for i in range(9)], student)
    for teacher in (twin, longer):
        data = load_data(config_of(folder, (teacher, student)))
        assert data.vocab == 10 and int(data.table.max()) < 10
    error = refused(capsys, load_data, config_of(folder, (other, student)))
    assert "4 of 10 ids differ, as 6: 'tripled' and 'mass'" in error and other in error
    assert "was prepared with another tokenizer" in refused(capsys, load_data, config_of(folder, (student, other)))

def test_a_teacher_with_fewer_embeddings_than_its_tokenizer_has_ids_is_refused(folder, models, tmp_path, capsys):
    teacher = str(write_model(tmp_path / "short", LLAMA | {"vocab_size": 250}))
    run = small_config(data_dir=folder, teacher=teacher, student=models[1], out_dir=tmp_path, run_name="r")
    assert teacher in refused(capsys, script.train, run)

def test_half_precision_without_a_gpu_is_float32_and_weights_always_are(folder, models, capsys):
    """Defect 5."""
    capsys.readouterr()
    config = config_of(folder, models, fp16=True, teacher_dtype="float16")
    assert config.dtype == "float32" and "--fp16: --dtype float32, since there is no GPU" in capsys.readouterr().out
    assert {p.dtype for p in build_model(config, 257).parameters()} == {torch.float32}

def test_the_end_of_text_is_learnt_in_every_row(data):
    """Defect 6: it was the pad, and pads were masked."""
    for rows in filter(len, data.rows.values()):
        batch = get_rows(data, rows)
        ends = batch["place"][batch["targets"] == 256]
        assert ends.tolist() == [i * batch["tokens"].shape[1] + data.length[row] - 1 for i, row in enumerate(rows)]
        assert batch["asked"].all()

@pytest.mark.parametrize("words", [[], ["--dry_run"], ["--data_dir", "mine.jsonl"]], ids=str)
def test_a_learning_rate_that_is_given_stays(words):
    """Defect 7: 5e-5 was taken for the default and replaced."""
    for given, rate in (("--learning_rate", "5e-5"), ("--learning-rate", "2e-5"), ("--lr", "1e-4")):
        config = settle(*parse_flags(Config, [*words, given, rate], "", script.ALIASES))
        assert config.learning_rate == float(rate)
    demo = script.DEMO["learning_rate"]
    assert settle(*parse_flags(Config, words, "", {})).learning_rate == (2e-5 if "--data_dir" in words else demo)

def test_the_warm_up_is_a_share_of_the_steps_of_this_run():
    """Defect 8: that of a dry run was the whole run's."""
    config = Config(learning_rate=1.0, min_lr=0.1)
    for steps, warmup in ((420, 42), (5, 1), (20, 2)):
        rates = [lr_at(step, steps, config) for step in range(steps + 1)]
        assert rates[:warmup] == [(i + 1) / warmup for i in range(warmup)] and max(rates) == 1
        assert rates[warmup:] == sorted(rates[warmup:], reverse=True) and rates[-1] == pytest.approx(0.1)
    assert lr_at(0, 420, dataclasses.replace(config, warmup_steps=4)) == 0.25
    assert lr_at(231, 420, config) == pytest.approx(0.55)               # half way down

def test_no_code_of_a_folder_is_run():
    """Defect 9."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("data/*/*.py")]
    assert len(sources) > 20 and not [path for path in sources if "trust_remote" + "_code" in path.read_text()]

def test_an_adapter_without_its_base_is_refused(folder, models, tmp_path, capsys):
    """Defect 10."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    for words in (("--teacher", tmp_path), ("--teacher", models[0], "--student", tmp_path)):
        assert "LoRA adapter" in refused(capsys, main_here, *words, "--data_dir", folder)
