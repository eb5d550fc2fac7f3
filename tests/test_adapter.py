"""train_adapter.py, single functions: what kept such adapters from learning, guidance, batches that are slices of
one, the loss, the gap, groups of parameters. Layers, noise, learning rates and scenes are in test_adapter_layers.py.
"""
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import train_adapter as script
from data.scenes import demo
from data.scenes.diffusers_folder import GATED, part_sha256
from data.scenes.report import other_boxes
from runs import read_file
from train_adapter import Adapter, Config, ToyBase

FIXTURES = Path(__file__).parent / "fixtures" / "scenes"
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------ fixtures
def write_set(folder, meta, arrays):
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "meta.json").write_text(json.dumps({"format": 1, "splits": ["train", "val", "test"], "slots": 3} | meta))
    return folder


def splits(rows, n):
    split = np.full(n, 255, np.uint8)
    for i, name in enumerate(("train", "val", "test")):
        split[rows[name]] = i
    return split


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Toy scenes as data/scenes/prepare.py writes them: 64 to train on, 96 held out twice."""
    arrays, rows = demo.scenes(64)
    n, present = len(arrays["labels"]), arrays["present"] > 0
    empty = np.array([[demo.ID["<start>"], demo.ID["<end>"]] + [0] * 12])
    phrases = [[demo.ID[word] for word in ("<start>", "a", colour, shape, "<end>")]
               for colour in demo.COLOURS for shape in demo.SHAPES]
    return write_set(tmp_path_factory.mktemp("sets") / "toy", {"kind": "toy"}, {
        "boxes": arrays["boxes"] * present[..., None], "split": splits(rows, n), "labels": arrays["labels"],
        "phrase": np.where(present, arrays["colours"] * 3 + arrays["kinds"], -1).astype(np.int32),
        "caption": np.arange(1, n + 1, dtype=np.int32), "contexts": np.concatenate([empty, arrays["captions"]]),
        "phrases": np.array(phrases), "colours": arrays["colours"], "kinds": arrays["kinds"]})


@pytest.fixture(scope="module")
def data(folder):
    return script.read_folder(folder, CPU)


def latent_set(folder, name, size=(8, 8), n=96):
    """Random latents and texts of the widths of a fixture; captions and phrases are rows of few texts."""
    rng = np.random.default_rng(3)
    raw = json.loads((FIXTURES / name / "unet/config.json").read_text())
    width = raw["cross_attention_dim"]
    count = rng.integers(1, 4, n)
    corner = rng.random((n, 3, 2)) * 0.6
    boxes = np.concatenate([corner, corner + 0.1 + 0.3 * rng.random((n, 3, 2))], -1)
    there = np.arange(3) < count[:, None]
    arrays = {"boxes": (boxes * there[..., None]).astype(np.float32),
              "phrase": np.where(there, rng.integers(0, 7, (n, 3)), -1).astype(np.int32),
              "caption": rng.integers(1, 6, n).astype(np.int32),
              "split": splits({"train": np.arange(0, n - 32), "val": np.arange(n - 32, n - 8),
                               "test": np.arange(n - 8, n)}, n),
              "latents": rng.standard_normal((n, 4, *size)).astype(np.float16),
              "contexts": rng.standard_normal((6, 5, raw.get("encoder_hid_dim") or width)).astype(np.float16),
              "phrases": rng.standard_normal((7, width)).astype(np.float16)}
    if raw.get("addition_embed_type"):
        arrays |= {"pooled": rng.standard_normal((6, 20)).astype(np.float16),
                   "time_ids": rng.integers(0, 64, (n, 6)).astype(np.float32)}
    vae = part_sha256(FIXTURES / name, "vae") if (FIXTURES / name / "vae").is_dir() else ""
    return script.read_folder(write_set(folder, {"kind": "latents", "base": {
        "vae": vae, "embeddings": True}}, arrays), CPU)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return latent_set(tmp_path_factory.mktemp("sets") / "sd1", "sd1")


@pytest.fixture(scope="module")
def sized(tmp_path_factory):
    return latent_set(tmp_path_factory.mktemp("sets") / "kolors", "kolors")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Latents of one cell: cheap to draw thousands of."""
    return latent_set(tmp_path_factory.mktemp("sets") / "tiny", "sd1", (1, 1))


def settings(**changes):
    return Config(**dict(batch_size=8, width=32, depth=2, patch=8, phase="adapter", sample_steps=4, dtype="float32",
                         device="cpu") | changes)


def toy(open_gates=False, box_mask=True, rms_norm=True):
    """A fresh adapter on a random toy base, whose output is not zero as if it were trained."""
    torch.manual_seed(0)
    base = ToyBase(32, 2, 8, gated=True)
    torch.nn.init.normal_(base.proj_out.weight, std=0.1)
    for block in base.blocks:
        torch.nn.init.normal_(block.shift.weight, std=0.1)
    script.reset_adapter(base)
    base.box_mask, base.rms_norm = box_mask, rms_norm
    model = Adapter(base)
    if open_gates:
        for i, fuser in enumerate(model.fusers):
            fuser.alpha_attn.data.fill_(0.7 - i)
            fuser.alpha_dense.data.fill_(-0.4 + i)
    return model


def on_fixture(name, **changes):
    torch.manual_seed(0)
    return script.build_model(settings(base=str(FIXTURES / name), **changes)).eval()


def zero_outputs(model):
    for fuser in model.fusers:
        for layer in (fuser.attn.to_out[0], fuser.ff.net[2]):
            torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)


def seen(model, function):
    """What the base is called with while function() runs -> list of tuples of arguments"""
    calls, base = [], getattr(model, "base", model)
    hook = base.register_forward_pre_hook(lambda _, given: calls.append(given))
    try:
        function()
    finally:
        hook.remove()
    return calls


def loss_of(model, batch, config):
    return script.compute_loss(model, batch, 0, config)[0]


def stopped(capsys, function):
    """What function() says on stderr, in one line, as it ends the program with 2"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


# ----------------------------------------------------------------------------------------- what kept gates from opening
def ten_steps(model, data, config):
    """AdamW on one batch -> (losses, gradients of the first step, tensors that moved)"""
    batch, before = script.get_batch(data, "train", 0, config), {
        name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, losses, first = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0), [], {}
    for step in range(10):
        loss = loss_of(model, batch, config)
        loss.backward()
        losses.append(loss.item())
        first = first or {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return losses, first, {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("rms_norm", [False, True])
def test_double_zero_is_a_fixed_point_and_refused(data, capsys, rms_norm):
    model, config = toy(rms_norm=rms_norm), settings()
    zero_outputs(model)
    said = stopped(capsys, lambda: script.check_alive(model, data, config))
    assert "dead adapter" in said
    losses, gradients, moved = ten_steps(model, data, config)
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    assert all((gradient == 0).all() for gradient in gradients.values()) and not moved
    assert len({*losses}) == 1


@pytest.mark.parametrize("gate, zero", [(0.0, False), (0.5, True)])
def test_one_zero_is_enough_to_learn(data, gate, zero):
    model, config = toy(rms_norm=False), settings()
    for fuser in model.fusers:
        fuser.alpha_attn.data.fill_(gate), fuser.alpha_dense.data.fill_(gate)
    if zero:
        zero_outputs(model)
    script.check_alive(model, data, config)
    assert all(p.grad is None for p in model.parameters())
    losses, gradients, moved = ten_steps(model, data, config)
    first = {name for name, gradient in gradients.items() if gradient.any()}
    assert first == {name for name in gradients if (".alpha_" in name if not zero else (
        "attn.to_out.0." in name or "ff.net.2." in name))}      # then they let all others learn
    assert losses[-1] < losses[0] and moved == gradients.keys() - {
        name for name in moved ^ gradients.keys() if name.endswith("null_position_feature")}


def test_a_loop_of_gates_only_leaves_the_base_alone(data):
    model = toy()
    names = {name for name, _ in model.named_parameters()}
    assert names == model.base.adapter().keys() and all(GATED.search(name) for name in names)
    assert {name for name, p in model.base.named_parameters() if p.requires_grad} == names
    before = {name: x.clone() for name, x in model.base.state_dict().items() if not GATED.search(name)}
    ten_steps(model, data, settings())
    assert before and all(torch.equal(model.base.state_dict()[name], x) for name, x in before.items())
    assert {*model.state_dict()} == names           # what a checkpoint holds


@pytest.mark.parametrize("dtype, stall", [(torch.float16, 0.25), (torch.bfloat16, 0.03125)])
def test_half_precision_stalls_and_is_refused(data, capsys, dtype, stall):
    assert torch.tensor(stall, dtype=dtype) + 1e-4 == stall                  # an update of the learning rate is lost
    assert torch.tensor(stall * 0.98, dtype=dtype) + 1e-4 > torch.tensor(stall * 0.98, dtype=dtype)
    torch.manual_seed(0)
    base = ToyBase(32, 2, 8, gated=True).to(dtype)
    script.reset_adapter(base)
    model = Adapter(base)                           # of a base in half precision
    assert {p.dtype for p in model.parameters()} == {torch.float32} and base.proj_in.weight.dtype == dtype
    gate = model.fusers[0].alpha_attn
    gate.data.fill_(stall)
    optimizer = torch.optim.AdamW([gate], lr=1e-4, weight_decay=0.0)
    for step in range(1, 11):
        gate.grad = torch.tensor(-1e-2)
        optimizer.step()
        assert abs(gate.item() - stall - step * 1e-4) < 2e-7
    for module in (model.fusers[1].norm1, model.base.position_net):
        module.to(dtype)
        said = stopped(capsys, lambda: script.check_alive(model, data, settings()))
        assert "not float32" in said and "0.0001" in said
        module.float()


def test_half_bases_of_a_folder(latents):
    config = settings(dtype="bfloat16")
    model = on_fixture("sd1", base_dtype="bfloat16", dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.float32} != {model.base.conv_in.weight.dtype}
    script.check_alive(model, latents, config, torch.bfloat16)
    with common.autocast(CPU, torch.bfloat16):
        loss = loss_of(model, script.get_batch(latents, "train", 0, config), config)
    assert loss.dtype == torch.float32 and loss.isfinite()


# ------------------------------------------------------------------------------------------------------------- layouts
@pytest.mark.parametrize("box_mask", [False, True])
@torch.no_grad()
def test_a_null_layout_does_not_know_its_boxes(data, latents, box_mask):
    for model, rows, x in ((toy(True, box_mask), data, torch.randn(8, 3, 32, 32)),
                           (on_fixture("gligen", box_mask=box_mask), latents, torch.randn(8, 4, 8, 8))):
        batch, times = script.get_rows(rows, rows.rows["val"][:8]), torch.arange(8) * 100
        null = batch | {"masks": 0 * batch["masks"]}
        turned, zeros = (null | {name: change(batch[name]) for name in ("boxes", "phrases")} for change in (
            lambda x: x.flip(0), torch.zeros_like))
        outs = [script.predict(model, x, times, some) for some in (null, turned, zeros)]
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2]) and outs[0].isfinite().all()
        right, wrong = (script.predict(model, x, times, batch | {"boxes": boxes})
                        for boxes in (batch["boxes"], batch["boxes"].flip(0)))
        assert (right - wrong).abs().max() > 1e-3 and (right - outs[0]).abs().max() > 1e-3
        assert (script.predict(model, x, times, batch, "") - outs[0]).abs().max() > 1e-3     # skipped is not null


def test_shared_fusers(latents):
    plain, shared = on_fixture("sd1"), on_fixture("sd1", share_fusers=True)
    blocks = [module for module in shared.base.modules() if isinstance(module, script.Block)]
    widths = {block.norm1.normalized_shape for block in blocks}
    assert len(plain.fusers) == len(blocks) > len(shared.fusers) == len(widths)
    assert len({(id(block.fuser), block.norm1.normalized_shape) for block in blocks}) == len(widths)
    config = settings()
    loss_of(shared, script.get_batch(latents, "train", 0, config), config).backward()
    assert all(fuser.alpha_attn.grad != 0 for fuser in shared.fusers)
    assert script.identity(shared, latents, config) == 0.0


# ------------------------------------------------------------------------------------------------------------ samples
def sampled_by_hand(model, batch, config, scale, seed):
    """DDIM of the toy with the conditional prediction alone."""
    alphas = script.alphas_of(model.base.schedule).double()
    x = torch.randn(batch["clean"].shape, generator=torch.Generator().manual_seed(seed)).double()
    for i in range(config.sample_steps):
        t = round(1000 - i * 1000 / config.sample_steps) - 1
        before = t - 1000 // config.sample_steps
        clean = model(x.float(), torch.full((len(x),), t), batch["context"], batch["boxes"], batch["phrases"],
                      batch["masks"], None, scale).double().clamp(-1, 1)
        noise = (x - alphas[t].sqrt() * clean) / (1 - alphas[t]).sqrt()
        after = alphas[before] if before >= 0 else torch.ones(())
        x = after.sqrt() * clean + (1 - after).sqrt() * noise
    return x


@torch.no_grad()
def test_guidance(data):
    model, batch = toy(True), script.get_rows(data, data.rows["val"][:4])
    one = settings(guidance=1.0)
    out = script.generate(model, batch, one, 0.7, seed=5)
    assert (out - sampled_by_hand(model, batch, one, 0.7, 5)).abs().max() < 1e-5
    other = batch | {"empty": batch["context"][:1]}
    assert (script.generate(model, other, one, 0.7, seed=5) - out).abs().max() < 1e-5        # not there at all
    strong, single = settings(guidance=3.0, sample_steps=1), settings(sample_steps=1)
    x = torch.randn(batch["clean"].shape, generator=torch.Generator().manual_seed(7))
    empty = {**batch, "context": batch["empty"].expand(4, -1), "masks": 0 * batch["masks"]}
    times = torch.full((4,), 999)
    u, c = (script.predict(model, x, times, some) for some in (empty, batch))
    for config, g in ((strong, 3), (single, 7.5), (settings(guidance=0.0, sample_steps=1), 0)):
        assert (script.generate(model, batch, config) - (u + g * (c - u)).clamp(-1, 1)).abs().max() < 1e-5
    assert not torch.equal(*(script.generate(model, batch, one, seed=seed) for seed in (5, 6)))


@torch.no_grad()
def test_the_unconditional_half_has_neither_caption_nor_boxes(data, sized):
    for model, rows, shape in ((toy(True), data, (14,)), (on_fixture("kolors"), sized, (5, 28))):
        config = settings(sample_steps=3)
        for B in (3, 1):
            batch = script.get_rows(rows, rows.rows["val"][:B])
            calls = seen(model, lambda: script.generate(model, batch, config, 0.3))
            assert len(calls) == 3
            for x, times, context, boxes, phrases, masks, added, scale in calls:
                assert torch.equal(x[:B], x[B:]) and len(x) == len(times) == 2 * B and scale == 0.3
                assert torch.equal(context[:B], batch["empty"].expand(B, *shape)) and not masks[:B].any()
                assert torch.equal(context[B:], batch["context"]) and torch.equal(masks[B:], batch["masks"])
                assert batch["masks"].any() and not torch.equal(context[:B], context[B:])
                assert torch.equal(boxes[B:], batch["boxes"]) and torch.equal(phrases[B:], batch["phrases"])
                if "pooled" in batch:
                    assert torch.equal(added["text_embeds"][:B], batch["empty_pooled"].expand(B, 20))
                    assert torch.equal(added["text_embeds"][B:], batch["pooled"])
                    assert torch.equal(added["time_ids"], batch["time_ids"].repeat(2, 1))
            assert [int(call[1][0]) for call in calls] == script.ddim_timesteps(model.base.schedule, 3)


@torch.no_grad()
def test_beta_is_the_share_of_steps_with_the_adapter(data):
    model, batch = toy(True), script.get_rows(data, data.rows["val"][:4])
    plain = script.generate(model, batch, settings(), boxes="")
    assert torch.equal(script.generate(model, batch, settings(beta=0.0)), plain)
    assert torch.equal(script.generate(toy(), batch, settings()), plain)     # gates shut: exactly the base
    assert not torch.equal(script.generate(model, batch, settings()), plain)
    half = script.generate(model, batch, settings(beta=0.5))
    assert not torch.equal(half, plain) and not torch.equal(half, script.generate(model, batch, settings()))
    for beta, steps, wanted in ((0.0, 4, []), (0.5, 4, [0, 1]), (0.5, 5, [0, 1]), (0.3, 10, [0, 1, 2]),
                                (1.0, 3, [0, 1, 2])):
        calls = seen(model, lambda: script.generate(model, batch, settings(beta=beta, sample_steps=steps)))
        assert [i for i, call in enumerate(calls) if call[3] is not None] == wanted and len(calls) == steps
    count, hook = [], model.fusers[0].register_forward_hook(lambda *_: count.append(1))
    script.generate(model, batch, settings(beta=0.5))
    hook.remove()
    assert len(count) == 2


# ------------------------------------------------------------------------------------------------------------- batches
def as_rank(monkeypatch, rank, ranks, function):
    with monkeypatch.context() as patch:
        for module in (script, common):
            patch.setattr(module, "world_size", lambda: ranks)
            patch.setattr(module, "rank", lambda: rank)
        return function()


@pytest.mark.parametrize("kind", ["toy", "sized"])
def test_batches_are_a_function_of_seed_and_step(data, sized, kind):
    rows, config = (data if kind == "toy" else sized), settings(caption_dropout=0.5, phrase_dropout=0.5)
    there = {step: script.get_batch(rows, "train", step, config) for step in range(12)}
    torch.manual_seed(99), torch.rand(3)
    for step in (9, 0, 4):
        again = script.get_batch(rows, "train", step, config)
        assert again.keys() == there[step].keys() and again["count"] == 8
        assert all(torch.equal(again[name], there[step][name]) for name in again.keys() - {"count"})
    other = script.get_batch(rows, "train", 4, settings(seed=1))
    for name in ("clean", "noise", "when", "masks", "scale"):
        assert not torch.equal(there[4][name], other[name]) and not torch.equal(there[4][name], there[5][name])
    noise = torch.cat([there[step]["noise"].flatten(1) for step in there])
    assert (torch.corrcoef(noise) - torch.eye(len(noise))).abs().max() < 0.4          # all rows have their own
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    wanted = rows.rows["train"][common.global_rows(len(rows.rows["train"]), 8, 0, 3)]
    plain = script.get_rows(rows, wanted)
    assert all(torch.equal(there[3][name], plain[name]) for name in ("clean", "boxes", "phrases"))


@pytest.mark.parametrize("ranks, accum", [(1, 2), (2, 1), (1, 8), (2, 2), (4, 2)])
@pytest.mark.parametrize("kind", ["toy", "sized"])
def test_micro_batches_of_all_ranks_are_the_whole_batch(data, sized, monkeypatch, kind, ranks, accum):
    rows, dropouts = (data if kind == "toy" else sized), dict(caption_dropout=0.5, layout_dropout=0.3, t_bias="cubic")
    config = settings(batch_size=8 // ranks // accum, grad_accum=accum, **dropouts)
    for step in (0, 5):
        whole = script.get_batch(rows, "train", step, settings(**dropouts))
        parts = [as_rank(monkeypatch, rank, ranks, lambda: script.get_batch(rows, "train", step, config, micro))
                 for rank in range(ranks) for micro in range(accum)]
        assert {part["count"] for part in parts} == {8} and all(part.keys() == whole.keys() for part in parts)
        assert all(torch.equal(part["scale"], whole["scale"]) for part in parts)
        for name in whole.keys() - {"count", "scale", "empty", "empty_pooled"}:
            assert torch.equal(whole[name], torch.cat([part[name] for part in parts])), name


def test_rows_against_the_arrays(data, sized):
    some = np.array([3, 70, 5])
    batch, (arrays, _) = script.get_rows(data, some), demo.scenes(64)
    assert (batch["clean"].numpy() == demo.PALETTE[arrays["labels"][some]].transpose(0, 3, 1, 2) * 2 - 1).all()
    assert (batch["context"].numpy() == arrays["captions"][some]).all()
    there = arrays["present"][some] > 0
    assert (batch["masks"].numpy() == there[..., None]).all() and batch["masks"].shape == (3, 3, 2)
    assert all((batch[name].numpy() == arrays[name][some])[there].all() for name in ("phrases", "boxes"))
    assert demo.text(batch["empty"][0].tolist()) == "" and batch["empty"].shape == (1, 14)
    batch, table = script.get_rows(sized, some), {name: np.array(x) for name, x in sized.table.items()}
    caption, phrase = table["caption"][some], table["phrase"][some]
    for name, wanted in {"clean": table["latents"][some], "context": table["contexts"][caption],
                         "empty": table["contexts"][:1], "pooled": table["pooled"][caption],
                         "empty_pooled": table["pooled"][:1], "time_ids": table["time_ids"][some],
                         "boxes": table["boxes"][some], "masks": np.stack([phrase >= 0] * 2, -1)}.items():
        assert (batch[name].numpy() == wanted).all() and batch[name].dtype == torch.float32, name
    assert (batch["phrases"].numpy() == table["phrases"][phrase])[phrase >= 0].all()


def interval(n, p, chance=1e-6):
    """Counts of successes in n that a binomial leaves on either side with less than `chance`."""
    k = np.arange(n + 1)
    log = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in k]
    total = np.exp(np.array(log) + k * math.log(p) + (n - k) * math.log(1 - p)).cumsum()
    return int(np.searchsorted(total, chance)), int(np.searchsorted(total, 1 - chance))


def within(successes, p):
    successes = torch.as_tensor(successes)
    low, high = interval(successes.numel(), p)
    return low <= int(successes.sum()) <= high and high - low < 0.2 * successes.numel()


def many(tiny, steps=8, **changes):
    """Thousands of rows -> (batches joined, the same rows as get_rows has them)"""
    config = settings(batch_size=512, **changes)
    batches = [script.get_batch(tiny, "train", step, config) for step in range(steps)]
    rows = tiny.rows["train"]
    plain = [script.get_rows(tiny, rows[common.global_rows(len(rows), 512, 0, step)]) for step in range(steps)]
    return tuple({name: torch.cat([part[name] for part in parts]) for name in ("when", "masks", "context", "clean")
                  if name in parts[0]} for parts in (batches, plain))


@pytest.mark.parametrize("caption, layout, phrase", [(0.1, 0.2, 0.3), (0.5, 0.1, 0.9)])
def test_shares_of_what_is_dropped(tiny, caption, layout, phrase):
    batch, plain = many(tiny, caption_dropout=caption, layout_dropout=layout, phrase_dropout=phrase)
    empty = torch.from_numpy(tiny.table["contexts"][0].astype(np.float32))
    no_caption = (batch["context"] == empty).flatten(1).all(1)
    assert torch.equal(batch["context"][~no_caption], plain["context"][~no_caption]) and within(no_caption, caption)
    no_layout = ~batch["masks"].flatten(1).any(1)   # boxes and phrases together
    there = plain["masks"][..., 0] > 0
    assert within(no_layout, layout) and within(no_layout & no_caption, layout * caption)
    kept = ~no_layout[:, None] & there              # a phrase goes, its box stays
    assert torch.equal(batch["masks"][..., 0] > 0, kept) and not batch["masks"][~kept].any()
    no_phrase = batch["masks"][..., 1] == 0
    assert within(no_phrase[kept], phrase)
    two = kept[:, 0] & kept[:, 1]                   # each box for itself
    assert within((no_phrase[:, 0] & no_phrase[:, 1])[two], phrase ** 2)
    assert {*batch["masks"].unique().tolist()} == {0.0, 1.0}
    assert abs(batch["when"][no_caption].mean() - 0.5) < 0.06


def test_nothing_or_all_is_dropped(tiny, sized):
    batch, plain = many(tiny, 1, caption_dropout=0.0, layout_dropout=0.0, phrase_dropout=0.0)
    assert torch.equal(batch["masks"], plain["masks"]) and torch.equal(batch["context"], plain["context"])
    batch = script.get_batch(sized, "train", 0, settings(caption_dropout=1.0, phrase_dropout=1.0, layout_dropout=0.0))
    assert torch.equal(batch["context"], batch["empty"].expand(8, -1, -1)) and not batch["masks"][..., 1].any()
    assert torch.equal(batch["pooled"], batch["empty_pooled"].expand(8, -1)) and batch["masks"][..., 0].any(1).all()
    half = script.get_batch(sized, "train", 0, settings(caption_dropout=0.5))
    gone = [(half[name] == half[empty]).flatten(1).all(1) for name, empty in (
        ("context", "empty"), ("pooled", "empty_pooled"))]
    assert torch.equal(*gone) and 0 < gone[0].sum() < 8
    assert not script.get_batch(sized, "train", 0, settings(layout_dropout=1.0))["masks"].any()


@pytest.mark.parametrize("bias", ["", "cubic"])
def test_times_are_uniform_or_cubic(tiny, bias):
    when, _ = many(tiny, t_bias=bias)
    when = when["when"].double().sort().values
    n = len(when)
    share = (torch.arange(n).double() + 0.5) / n
    wanted = 1 - (1 - when).clamp(min=0).pow(1 / 3) if bias else when        # P(1 - u^3 < x) = 1 - (1 - x)^(1/3)
    assert (share - wanted).abs().max() < math.sqrt(math.log(2e6) / (2 * n)) + 0.5 / n       # Dvoretzky, with 1e-6
    assert abs(when.mean() - (0.75 if bias else 0.5)) < 0.02 and when.min() >= 0 and when.max() <= 1
    assert bias or when.max() < 1


@pytest.mark.parametrize("name", ["sd1", "kolors"])
def test_timesteps_stay_below_their_count(latents, sized, name):
    model, rows = on_fixture(name), latents if name == "sd1" else sized
    T = model.base.schedule.timesteps
    batch = script.get_batch(rows, "train", 0, settings())
    when = [0.0, 0.2, 0.5, 0.8, 1 - 2 ** -24, 1.0, 1.5 / T, 0.9995 / T]
    call, = seen(model, lambda: script.errors(model, batch | {"when": torch.tensor(when)}))
    assert call[1].tolist() == [0, T // 5, T // 2, T * 4 // 5, T - 1, T - 1, 1, 0] and call[1].dtype == torch.int64


def test_the_scale_is_drawn_once_per_step(tiny, data):
    config = settings(batch_size=1, scale_min=0.2, scale_max=0.7)
    scales = torch.stack([script.get_batch(tiny, "train", step, config)["scale"] for step in range(600)])
    assert scales.shape == (600,) and scales.dtype == torch.float32 and len(scales.unique()) == 600
    share = (torch.arange(600) + 0.5) / 600
    assert ((scales.sort().values - 0.2) / 0.5 - share).abs().max() < math.sqrt(math.log(2e6) / 1200)
    fixed = settings(scale_min=0.3, scale_max=0.3)
    assert script.get_batch(tiny, "train", 1, fixed)["scale"] == torch.tensor(0.3)
    model, batch = toy(True), script.get_batch(data, "train", 0, settings())
    layouts, hook = [], model.fusers[0].register_forward_pre_hook(lambda _, given: layouts.append(given[1]))
    call, = seen(model, lambda: script.compute_loss(model, batch, 0, settings()))
    hook.remove()
    assert call[-1] is batch["scale"] is layouts[0].scale and layouts[0].box_mask and layouts[0].rms_norm
    assert torch.equal(layouts[0].present, batch["masks"][..., 0])
    calls = seen(model, lambda: (script.evaluate(model, data, settings(), "val", 8), script.gates_of(
        model, data, settings()), script.identity(model, data, settings())))
    assert len(calls) == 9 and all(float(call[-1]) == 1.0 for call in calls)


# ---------------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("phase", ["base", "adapter"])
def test_the_loss_by_hand(data, phase):
    config = settings(phase=phase)
    model = toy(True) if phase == "adapter" else toy().base
    batch = script.get_batch(data, "train", 2, config) | {"count": 24}       # of which 8 are here
    alphas, total, parts = script.alphas_of(script.TOY_SCHEDULE).double(), 0.0, {"high_t": 0.0, "low_t": 0.0}
    with torch.no_grad():
        for i in range(8):
            t = int(batch["when"][i].double() * 1000)
            noisy = alphas[t].sqrt() * batch["clean"][i] + (1 - alphas[t]).sqrt() * batch["noise"][i]
            one = {name: batch[name][i:i + 1] for name in ("context", "boxes", "phrases", "masks")}
            out = script.predict(model, noisy[None].float(), torch.tensor([t]), one, "boxes" * (phase == "adapter"),
                                 batch["scale"])
            error = (out[0].double() - batch["clean"][i]).square().mean().item()
            total += error / (max(1 - alphas[t].item(), 0.2) if phase == "base" else 1) / 24
            parts["high_t" if batch["when"][i] >= 0.5 else "low_t"] += error / 24
        loss, told = script.compute_loss(model, batch, 2, config)
    assert abs(loss.item() / total - 1) < 1e-5 and told.keys() == parts.keys() and all(parts.values())
    assert all(abs(told[name].item() / parts[name] - 1) < 1e-5 for name in parts)
    assert loss.dim() == 0 and loss.dtype == torch.float32
    if phase == "adapter":
        assert abs(sum(told.values()) / loss - 1) < 1e-6
    else:
        assert loss > 1.05 * sum(told.values())


def test_half_batches_add_up_to_the_whole(data):
    model, config = toy(True), settings(batch_size=8)
    whole, halves = (script.get_batch(data, "train", 1, config, 0), [script.get_batch(
        data, "train", 1, settings(batch_size=4, grad_accum=2), micro) for micro in (0, 1)])
    with torch.no_grad():
        loss, parts = script.compute_loss(model, whole, 1, config)
        found = [script.compute_loss(model, half, 1, config) for half in halves]
    assert abs(sum(x for x, _ in found) / loss - 1) < 1e-6
    assert all(abs(sum(x[name] for _, x in found) - parts[name]) < 1e-6 for name in parts)
    model.base.double()
    gradients = []
    for batches in ([whole], halves):
        for batch in batches:
            loss_of(model, common.cast(batch, CPU, torch.float64), config).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
    assert (gradients[0] - gradients[1]).norm() < 1e-6 * gradients[0].norm() and gradients[0].norm() > 1e-3


def test_the_loss_is_float32_under_autocast(data):
    model, config = toy(True), settings()
    batch = script.get_batch(data, "train", 0, config)
    wanted = loss_of(model, batch, config)
    with common.autocast(CPU, torch.bfloat16):
        loss, parts = script.compute_loss(model, batch, 0, config)
        noisy = script.predict(model, batch["clean"], torch.arange(8), batch)
    assert noisy.dtype == torch.bfloat16 and {loss.dtype, *(x.dtype for x in parts.values())} == {torch.float32}
    assert 0 < abs(loss / wanted - 1) < 0.02
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------------------------------------- gap, gates and identity
def test_the_gap_is_exactly_zero_while_gates_are_shut(data, latents):
    for model, rows in ((toy(), data), (on_fixture("sd1"), latents)):
        scores = script.evaluate(model, rows, settings(), "val", 24)
        assert [scores[f"gap_{at}"] for at in (200, 500, 800)] == [0.0] * 3 and scores["loss"] > 0
    assert not [name for name in script.evaluate(toy().base, data, settings(phase="base"), "val", 8) if "gap" in name]


def odd_one_out(data):
    """Validation rows of which one has no partner with as many objects"""
    count = (data.take("phrase", data.rows["val"]) >= 0).sum(1).numpy()
    few = [data.rows["val"][count == n] for n in (1, 2, 3)]
    return dataclasses.replace(data, rows={"val": np.concatenate([few[0][:3], few[1][:1], few[2][:4]])})


@pytest.mark.parametrize("kind", ["toy", "sd1"])
def test_scores_and_gap_against_a_loop_over_rows(data, latents, kind):
    model, rows = (toy(True), data) if kind == "toy" else (on_fixture("gligen"), latents)
    rows, config = odd_one_out(rows), settings(batch_size=3)
    scores, chosen = script.evaluate(model, rows, config, "val"), rows.rows["val"]
    partner = chosen[other_boxes(rows.take("phrase", chosen) >= 0)]
    assert (partner != chosen).sum() == len(chosen) - 1 == 7
    kind, alphas = model.base.schedule.prediction_type, script.alphas_of(model.base.schedule).double()
    losses = []
    for at in (200, 500, 800):
        right, gaps = [], []
        for row, other in zip(chosen, partner):
            batch, alpha = script.get_rows(rows, [row]), alphas[at]
            noise = script.fixed_batch(rows, [row], at)["noise"]
            noisy = (alpha.sqrt() * batch["clean"] + (1 - alpha).sqrt() * noise).float()
            target = {"sample": batch["clean"], "epsilon": noise,
                      "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * batch["clean"]}[kind]
            pair = []
            for boxes in (batch["boxes"], script.get_rows(rows, [other])["boxes"]):
                out = script.predict(model, noisy, torch.tensor([at]), batch | {"boxes": boxes}).detach()
                pair.append((out - target).double().square().mean().item())
            right.append(pair[0])
            if other != row:                        # the one without a partner is not counted
                gaps.append(pair[1] - pair[0])
        assert abs(scores[f"mse_{at}"] - np.mean(right)) < 1e-6
        assert abs(scores[f"gap_{at}"] - np.mean(gaps)) < 1e-6 and abs(np.mean(gaps)) > 1e-5
        losses.append(np.mean(right))
    assert abs(scores["loss"] - np.mean(losses)) < 1e-6


def test_evaluation_is_repeatable(data):
    model, config = toy(True), settings(batch_size=2)
    model.train()
    scores = script.evaluate(model, data, config, "val")
    torch.manual_seed(5)
    assert script.evaluate(model, data, config, "val") == scores and model.training and not model.base.training
    assert script.evaluate(model, data, config, "val", 96) == scores != script.evaluate(model, data, config, "val", 95)
    alone = script.fixed_batch(data, [7], 500)["noise"]      # whatever else is looked at
    both = script.fixed_batch(data, [3, 7], 500)["noise"]
    assert torch.equal(both[1:], alone) and abs(torch.corrcoef(both.flatten(1))[0, 1]) < 0.1
    assert not torch.equal(alone, script.fixed_batch(data, [7], 800)["noise"]) and abs(alone.std() - 1) < 0.1
    lonely = dataclasses.replace(data, rows={"val": odd_one_out(data).rows["val"][3:4]})
    found = script.evaluate(model, lonely, config, "val")
    assert "mse_500" in found and "gap_500" not in found                     # no number is better than a wrong one


def test_evaluation_over_two_ranks(latents, monkeypatch):
    model, config, halves = on_fixture("gligen"), settings(batch_size=3), []
    whole = script.evaluate(model, latents, config, "val")
    def collect(total):
        halves.append(total.clone())
        total.copy_(sum(halves))
    monkeypatch.setattr(script.dist, "all_reduce", collect)
    found = [as_rank(monkeypatch, rank, 2, lambda: script.evaluate(model, latents, config, "val")) for rank in (0, 1)]
    assert found[1].keys() == whole.keys() and all(abs(found[1][name] - whole[name]) < 1e-6 for name in whole)
    assert found[0] != found[1]


def test_gates_are_told_by_their_size(data):
    model, config = toy(), settings()
    for fuser, attn, dense in zip(model.fusers, (1.0, -1.0), (-0.2, 0.2)):
        fuser.alpha_attn.data.fill_(attn), fuser.alpha_dense.data.fill_(dense)
    gates = script.gates_of(model.train(), data, config)
    assert np.allclose(gates["attn"], [math.tanh(1)] * 2, atol=1e-6)         # their mean with signs would be 0
    assert np.allclose(gates["dense"], [math.tanh(0.2)] * 2, atol=1e-6) and model.training
    assert gates.keys() == {"attn", "dense", "ratio", "grad"} and all(len(x) == 2 for x in gates.values())
    assert not any(fuser._forward_hooks for fuser in model.fusers) and all(p.grad is None for p in model.parameters())
    batch, given = script.get_rows(data, data.rows["val"][:32]), []
    hooks = [fuser.register_forward_hook(lambda _, x, out: given.append((x[0].double(), out.double())))
             for fuser in model.fusers]
    alpha = script.alphas_of(script.TOY_SCHEDULE)[500]
    noise = script.fixed_batch(data, data.rows["val"][:32], 500)["noise"]
    out = model(alpha.sqrt() * batch["clean"] + (1 - alpha).sqrt() * noise, torch.full((32,), 500), batch["context"],
                batch["boxes"], batch["phrases"], batch["masks"], None, 1.0)
    (out - batch["clean"]).square().mean().backward()
    for hook in hooks:
        hook.remove()
    for i, (fuser, (x, y)) in enumerate(zip(model.fusers, given)):
        assert abs(gates["ratio"][i] / ((y - x).square().sum().sqrt() / x.square().sum().sqrt()).item() - 1) < 1e-5
        wanted = math.hypot(fuser.alpha_attn.grad, fuser.alpha_dense.grad)
        assert abs(gates["grad"][i] / wanted - 1) < 1e-4 and wanted > 0
    shut = script.gates_of(toy(), data, config)
    assert shut["attn"] == shut["dense"] == shut["ratio"] == [0.0] * 2 and min(shut["grad"]) > 0


def test_numbers_of_a_gated_layer_stand_at_one_place(latents):
    """Layers of a UNet run in another order than they are listed in: down, middle, up."""
    model, config = on_fixture("sd1"), settings()
    for i, fuser in enumerate(model.fusers):
        fuser.alpha_dense.data.fill_(1.0)
        gates = script.gates_of(model, latents, config)
        wanted = [float(j == i) for j in range(len(model.fusers))]
        assert (np.array(gates["dense"]) > 0).tolist() == wanted and (np.array(gates["ratio"]) > 0).tolist() == wanted
        fuser.alpha_dense.data.zero_()


def test_gates_of_shared_layers_have_one_number_each(latents):
    model, added = on_fixture("sd1", share_fusers=True), []
    model.fusers[0].alpha_dense.data.fill_(1.0)
    hook = model.fusers[0].register_forward_hook(lambda _, given, out: added.append(
        ((out - given[0]).norm() / given[0].norm()).item()))
    gates = script.gates_of(model, latents, settings())
    hook.remove()
    assert {len(x) for x in gates.values()} == {len(model.fusers)} and len(added) > 1
    assert gates["ratio"][0] == pytest.approx(max(added)) and not any(gates["ratio"][1:])    # the alarm sees the worst


@pytest.mark.parametrize("box_mask", [False, True])
def test_identity_at_init_is_exact_and_ends_with_a_gate(data, latents, sized, box_mask):
    for make, rows in ((lambda: toy(box_mask=box_mask, rms_norm=box_mask), data),
                       (lambda: on_fixture("sd1", box_mask=box_mask, rms_norm=box_mask), latents),
                       (lambda: on_fixture("kolors", box_mask=box_mask), sized)):
        for gate in ("alpha_attn", "alpha_dense"):
            model = make()
            assert float(script.identity(model, rows, settings())) == 0.0
            getattr(model.fusers[-1], gate).data.fill_(0.01)
            assert script.identity(model, rows, settings()) > 0
        assert (script.predict(model, torch.zeros_like(script.get_rows(rows, [0])["clean"]), torch.tensor(
            [5]), script.get_rows(rows, [0])).abs().max() > 0)               # no base that says nothing


# --------------------------------------------------------------------------------------------------- groups, refusals
def test_groups_of_parameters_in_a_run(folder, tmp_path, monkeypatch, capsys):
    """AdamW's first step moves what has a gradient by its group's learning rate, and shrinks matrices."""
    made, kept = [], torch.optim.AdamW
    class Spy(kept):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            made.append(self)
    monkeypatch.setattr(script.torch.optim, "AdamW", Spy)
    monkeypatch.setattr(script.report, "table", lambda *given, **named: {})
    flags = dict(out_dir=str(tmp_path), data_dir=str(folder), warmup_steps=0, eval_rows=4, batch_size=4, log_every=0,
                 learning_rate=1e-3, max_steps=1)
    script.train(settings(run_name="b", **flags | {"phase": "base"}))
    base = made[0]
    assert [group.get("times") for group in base.param_groups] == [None, None]
    made.clear()
    script.train(settings(run_name="a", base=str(tmp_path / "b"), weight_decay=0.5, gate_lr=7.0, **flags))
    matrices, vectors, gates = made[0].param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"], gates["weight_decay"]) == (0.5, 0.0, 0.0)
    assert all(p.dim() > 1 for p in matrices["params"]) and all(p.dim() == 1 for p in vectors["params"])
    assert len(gates["params"]) == 4 and all(p.dim() == 0 for p in gates["params"])
    assert [group["lr"] for group in made[0].param_groups] == pytest.approx([1e-3, 1e-3, 7e-3])
    assert "identity at init: max |difference| = 0.0" in capsys.readouterr().out
    tensors = read_file(tmp_path / "a/step-00000001.safetensors")[0]
    after = {name.removeprefix("model."): x for name, x in tensors.items() if name.startswith("model.")}
    config = settings(base=str(tmp_path / "b"), **flags)
    torch.manual_seed(0)
    before = dict(script.build_model(config).named_parameters())
    assert before.keys() == after.keys()
    for name, p in before.items():
        if ".alpha_" in name:
            assert abs(abs(after[name].item()) - 7e-3) < 1e-4
        else:                                       # no gradient yet
            assert torch.allclose(after[name], p.detach() * (1 - 5e-4 * (p.dim() > 1)), rtol=1e-6, atol=0), name


def test_data_of_another_base_are_refused(data, latents, sized, capsys):
    plain, wide, small = on_fixture("sd1"), on_fixture("kolors"), toy()
    for model, rows in ((plain, latents), (wide, sized), (small, data), (small.base, data)):         # these fit
        script.check_data(rows, model)
    def changed(rows, **arrays):
        return dataclasses.replace(rows, table=rows.table | arrays)
    other = np.zeros((6, 5, 25), np.float16)
    for model, rows, culprits in (
            (plain, data, "toy scenes"), (small, latents, "holds latents"), (small.base, latents, "holds latents"),
            (plain, sized, "28 pooled 24"), (wide, latents, "24 28 pooled"),
            (plain, changed(latents, contexts=other), "25 24"), (plain, changed(latents, phrases=other[:, 0]), "25 24"),
            (plain, changed(latents, latents=np.zeros((9, 16, 8, 8))), "16 4"),
            (plain, changed(latents, pooled=sized.table["pooled"]), "pooled")):
        said = stopped(capsys, lambda: script.check_data(rows, model))
        assert all(culprit in said for culprit in ("--data_dir", *culprits.split())), said
    made = latents.meta["base"]
    for part, more in (("vae", {"vae": "0" * 64}), ("text_encoder", {"embeddings": False, "text_encoder": ""})):
        base = made | more
        foreign = dataclasses.replace(latents, meta=latents.meta | {"base": base})
        assert f"another {part}" in stopped(capsys, lambda: script.check_data(foreign, plain))


def test_the_branch_is_of_the_dtype_of_what_it_is_added_to(latents, monkeypatch):
    """A GPU's autocast makes an rms_norm float32, and the sum would be too: but only where there are boxes."""
    model, true = on_fixture("sd1", rms_norm=True), F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda x, *more: true(x, *more).float())
    assert script.identity(model, latents, settings(dtype="bfloat16")) == 0.0


def test_layers_that_were_trained_apart_are_not_shared():
    unet = on_fixture("sd1").base
    fusers = [module for module in unet.modules() if isinstance(module, script.Fuser)]
    fusers[0].alpha_attn.data.fill_(0.5)
    with pytest.raises(ValueError, match="trained apart"):
        script.share_fusers(unet)


def test_phrases_of_the_texts_width_are_projected_as_the_captions_are(sized):
    model = on_fixture("kolors")
    batch = script.get_rows(sized, sized.rows["val"][:2])
    raw = torch.randn(*batch["phrases"].shape[:2], 28)
    times = torch.tensor([5, 500])
    for fuser in model.fusers:
        fuser.alpha_attn.data.fill_(0.5)
    one = script.predict(model, batch["clean"], times, batch | {"phrases": raw})
    other = script.predict(model, batch["clean"], times, batch | {"phrases": model.base.encoder_hid_proj(raw)})
    assert torch.equal(one, other)
    assert not torch.equal(one, script.predict(model, batch["clean"], times, batch))


def test_held_out_rows_are_a_fixed_sample(data):
    rows = data.some("val", 10)
    assert len(rows) == 10 and {*rows} < {*data.rows["val"]} and (rows == data.some("val", 10)).all()
    assert (rows[1:] > rows[:-1]).all() and (rows != data.rows["val"][:10]).any()
    assert (data.some("val", 0) == data.rows["val"]).all() and len(data.some("val", 10 ** 6)) == len(data.rows["val"])
