"""train_adapter.py, what needs no base: grounding tokens and gated layers against loops in float64, noise, targets and
DDIM against closed forms, learning rates, alarms; and the toy's scenes.
"""
import dataclasses
import math

import numpy as np
import pytest
import torch

import train_adapter as script
from data.scenes import demo, report
from data.scenes.diffusers_folder import Schedule
from train_adapter import Config, Fuser, Layout, PositionNet, ToyBase

KINDS = ("epsilon", "v_prediction", "sample")


# --------------------------------------------------------------------------------------------------- layers of boxes
def mask_by_loop(boxes, present, H, W):
    """A cell sees all cells, null tokens, and boxes that its centre lies in."""
    B, N = present.shape
    mask = torch.zeros(B, 1, H * W, H * W + N, dtype=torch.bool)
    for b in range(B):
        for y in range(H):
            for x in range(W):
                mask[b, 0, y * W + x, :H * W] = True
                for i in range(N):
                    x0, y0, x1, y1 = boxes[b, i].tolist()
                    inside = x0 < (x + 0.5) / W < x1 and y0 < (y + 0.5) / H < y1
                    mask[b, 0, y * W + x, H * W + i] = inside or not present[b, i]
    return mask


@torch.no_grad()
def test_masks_against_a_loop_and_no_row_is_empty():
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(6, 3, 2, generator=generator)
    side = torch.rand(6, 3, 2, generator=generator) * (torch.rand(6, 3, 2, generator=generator) > 0.3)
    boxes = torch.cat([corner, (corner + side).clamp(max=1)], -1)            # a third of the sides are 0
    boxes[0] = 0.5
    present = (torch.rand(6, 3, generator=generator) > 0.3).float()
    present[0] = 1
    layout = Layout(torch.randn(6, 3, 12), boxes, present, 1.0, True, True)
    for H, W in ((8, 8), (3, 5), (7, 2)):
        mask = layout.mask(H, W)
        assert torch.equal(mask, mask_by_loop(boxes, present, H, W)) and mask.any(-1).all()
        assert not torch.equal(mask, torch.ones_like(mask)) and layout.mask(H, W) is mask
    fuser = Fuser(8, 2, 12)
    fuser.alpha_attn.data.fill_(1)
    assert fuser(torch.randn(6, 15, 8), layout, layout.mask(3, 5)).isfinite().all()
    assert dataclasses.replace(layout, box_mask=False).mask(8, 8) is None


def waves_by_loop(box):
    found = []
    for k in range(8):
        for function in (math.sin, math.cos):
            found += [function(100 ** (k / 8) * number) for number in box]
    return found


def silu(x):
    return x / (1 + np.exp(-x))


@torch.no_grad()
def test_grounding_tokens_against_a_loop():
    torch.manual_seed(2)
    net = PositionNet(5, 7).double()
    net.null_positive_feature.normal_(), net.null_position_feature.normal_()
    boxes, phrases = torch.rand(2, 3, 4).double(), torch.randn(2, 3, 5).double()
    has_box, has_phrase = torch.tensor([[[1, 1, 0], [0, 1, 1]], [[1, 0, 1], [0, 1, 0]]]).double()
    out = net(boxes, phrases, has_box, has_phrase)
    layers = [(net.linears[i].weight.numpy(), net.linears[i].bias.numpy()) for i in (0, 2, 4)]
    for b in range(2):
        for i in range(3):
            waves = waves_by_loop(boxes[b, i].tolist()) if has_box[b, i] else net.null_position_feature.numpy()
            x = np.concatenate([(phrases[b, i] if has_phrase[b, i] else net.null_positive_feature).numpy(), waves])
            for j, (weight, bias) in enumerate(layers):
                x = weight @ x + bias
                x = silu(x) if j < 2 else x
            assert np.abs(out[b, i].numpy() - x).max() < 2e-6                # frequencies are float32


@torch.no_grad()
def test_boxes_a_cell_apart_are_told_apart():
    identity = PositionNet(1, 64)
    identity.linears = torch.nn.Identity()
    x = torch.arange(7) / 8
    boxes = torch.stack([x, torch.zeros(7), x + 1 / 8, torch.ones(7)], -1)[None]
    waves = identity(boxes, torch.zeros(1, 7, 1), torch.ones(1, 7), torch.ones(1, 7))[0, :, 1:]
    wanted = torch.tensor([waves_by_loop(box.tolist()) for box in boxes[0]])
    assert (waves - wanted).abs().max() < 1e-5
    apart = torch.cdist(waves, waves) + 9 * torch.eye(7)
    assert apart.min() > 2                          # of 8 that are possible
    torch.manual_seed(0)
    base = ToyBase(32, 2, 8, gated=True)
    script.reset_adapter(base)
    tokens = base.position_net(boxes, torch.zeros(1, 7, 32), torch.ones(1, 7), torch.ones(1, 7))[0]
    distance = torch.cdist(tokens, tokens) / tokens.norm(dim=1).mean()
    assert (distance + torch.eye(7)).min() > 0.25


@torch.no_grad()
def test_initialisation_of_the_adapter():
    """Kaiming's normal and no bias: boxes' tokens are ten times as far apart as with torch's default."""
    def spread(net):
        corner = torch.rand(64, 1, 2, generator=torch.Generator().manual_seed(0)) * 0.7
        tokens = net(torch.cat([corner, corner + 0.3], -1), torch.zeros(64, 1, 64), *[torch.ones(64, 1)] * 2)[:, 0]
        return tokens.std(0).mean().item()
    torch.manual_seed(0)
    base = ToyBase(64, 2, 8, gated=True)
    default = PositionNet(64, 64)
    script.reset_adapter(base)
    net = base.position_net
    assert spread(net) > 0.25 and spread(net) > 10 * spread(default)
    for layer in (net.linears[0], net.linears[2], net.linears[4]):
        wanted = math.sqrt(2 / layer.in_features)
        assert abs(layer.weight.std().item() / wanted - 1) < 0.03 and not layer.bias.any()
        assert layer.weight.abs().max() > 3 * wanted                         # normal, not uniform
    assert not net.null_positive_feature.any() and not net.null_position_feature.any()
    for fuser in (block.fuser for block in base.blocks):
        assert fuser.alpha_attn == 0 and fuser.alpha_dense == 0
        for layer in (fuser.attn.to_out[0], fuser.ff.net[2], fuser.linear, fuser.attn.to_q):
            assert 0.9 < layer.weight.abs().max() * math.sqrt(layer.in_features) <= 1
        assert (fuser.norm1.weight == 1).all() and (fuser.norm2.bias == 0).all()
    first, second = (block.fuser.linear.weight for block in base.blocks)
    assert not torch.equal(first, second)


def norm_by_hand(x, layer):
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return y * layer.weight.numpy() + layer.bias.numpy()


def linear(x, layer):
    return x @ layer.weight.numpy().T + (0 if layer.bias is None else layer.bias.numpy())


def fuser_by_loop(fuser, x, tokens, mask, scale, rms):
    """GLIGEN's eq. 8, one row, one head, one cell after another, in float64."""
    out, T, heads = x.copy(), x.shape[1], fuser.attn.heads
    for b in range(len(x)):
        both = norm_by_hand(np.concatenate([x[b], linear(tokens[b], fuser.linear)]), fuser.norm1)
        q, k, v = (linear(both, layer) for layer in (fuser.attn.to_q, fuser.attn.to_k, fuser.attn.to_v))
        mixed, d = np.zeros((T, q.shape[1])), q.shape[1] // heads
        for head in range(heads):
            some = slice(head * d, head * d + d)
            for t in range(T):
                visible = np.flatnonzero(mask[b, 0, t]) if mask is not None else np.arange(len(both))
                score = np.array([q[t, some] @ k[s, some] / math.sqrt(d) for s in visible])
                weight = np.exp(score - score.max())
                mixed[t, some] = (weight / weight.sum()) @ v[visible, some]
        branch = linear(mixed, fuser.attn.to_out[0])
        if rms:
            branch = branch / np.sqrt((branch ** 2).mean(-1, keepdims=True) + np.finfo(np.float64).eps)
        h = x[b] + scale * math.tanh(fuser.alpha_attn) * branch
        value, gate = np.split(linear(norm_by_hand(h, fuser.norm2), fuser.ff.net[0].proj), 2, -1)
        gelu = gate * 0.5 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))
        out[b] = h + scale * math.tanh(fuser.alpha_dense) * linear(value * gelu, fuser.ff.net[2])
    return out


def shaken_fuser(width=8, heads=2, context=5):
    torch.manual_seed(4)
    fuser = Fuser(width, heads, context).double()
    for p in fuser.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return fuser


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("box_mask", [False, True])
@torch.no_grad()
def test_a_fuser_against_a_loop(rms, box_mask):
    fuser, x = shaken_fuser(), torch.randn(2, 12, 8).double()
    boxes = torch.tensor([[0.1, 0.1, 0.7, 0.6], [0, 0, 0.4, 1], [0.5] * 4]).expand(2, 3, 4)
    layout = Layout(torch.randn(2, 3, 5).double(), boxes, torch.tensor([[1, 1, 1], [1, 0, 1.0]]),
                    torch.tensor(0.625).double(), box_mask, rms)
    mask = layout.mask(3, 4)
    out = fuser(x, layout, mask).numpy()
    wanted = fuser_by_loop(fuser, x.numpy(), layout.tokens.numpy(), None if mask is None else mask.numpy(), 0.625, rms)
    assert np.abs(out - wanted).max() < 1e-12 and np.abs(out - x.numpy()).max() > 0.1
    for gate in (fuser.alpha_attn, fuser.alpha_dense):
        gate.zero_()
    assert torch.equal(fuser(x, layout, mask), x)
    fuser.alpha_attn.fill_(2), fuser.alpha_dense.fill_(-2)
    assert torch.equal(fuser(x, dataclasses.replace(layout, scale=0.0), mask), x)


@torch.no_grad()
def test_with_rms_norm_the_residual_is_the_gate():
    fuser, x = shaken_fuser(), 5 * torch.randn(2, 12, 8).double()
    for gate in (-1.3, 0.02, 0.4):
        fuser.alpha_attn.fill_(gate), fuser.alpha_dense.zero_()
        layout = Layout(torch.randn(2, 3, 5).double(), torch.rand(2, 3, 4), torch.ones(2, 3), 0.5, False, True)
        rms, plain = ((fuser(x, some, None) - x).square().mean(-1).sqrt() / 0.5 - abs(math.tanh(gate)) for some in (
            layout, dataclasses.replace(layout, rms_norm=False)))
        assert rms.abs().max() < 1e-12 and plain.abs().max() > 1e-3


@torch.no_grad()
def test_a_masked_box_reaches_its_own_cells_alone():
    fuser, x = shaken_fuser().float(), torch.randn(1, 64, 8)
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.3], [0.4, 0.5, 1.0, 1.0], [0.2, 0.2, 0.9, 0.4]]])
    tokens = torch.randn(1, 3, 5)
    for i in range(3):
        other = tokens.clone()
        other[0, i] += 1
        a, b = (fuser(x, layout, layout.mask(8, 8)) for layout in (
            Layout(t, boxes, torch.ones(1, 3), 1.0, True, True) for t in (tokens, other)))
        inside = mask_by_loop(boxes, torch.ones(1, 3), 8, 8)[0, 0, :, 64 + i]
        assert inside.any() and torch.equal((a != b).any(-1)[0], inside)
        absent = torch.ones(1, 3)
        absent[0, i] = 0                            # a null token is seen by all
        a, b = (fuser(x, layout, layout.mask(8, 8)) for layout in (
            Layout(t, boxes, absent, 1.0, True, True) for t in (tokens, other)))
        assert (a != b).any(-1).all()


# ------------------------------------------------------------------------------------------------------- noise and DDIM
def schedule(kind="epsilon", **changes):
    return Schedule(**dict(timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                           prediction_type=kind, spacing="leading", offset=0, last_alpha_one=True, clip=0.0) | changes)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
def test_alphas_by_hand(kind):
    found, product, T = script.alphas_of(schedule(beta_schedule=kind, timesteps=700)), 1.0, 700
    assert found.shape == (T,)
    for i in range(T):
        beta = 0.00085 + (0.012 - 0.00085) * i / (T - 1) if kind == "linear" else (
            math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / (T - 1)) ** 2
        product *= 1 - beta
        assert abs(found[i].item() / product - 1) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_noise_targets_and_their_inverse(kind):
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    alpha = script.alphas_of(schedule())[[0, 200, 500, 800, 999]].double()
    noisy, target = script.add_noise(clean, noise, alpha), script.target_of(clean, noise, alpha, kind)
    for i in range(5):
        signal, sigma = math.sqrt(alpha[i]), math.sqrt(1 - alpha[i])
        wanted = {"epsilon": noise[i], "sample": clean[i], "v_prediction": signal * noise[i] - sigma * clean[i]}[kind]
        assert (noisy[i] - signal * clean[i] - sigma * noise[i]).abs().max() < 1e-14
        assert (target[i] - wanted).abs().max() < 1e-14
        found = script.clean_and_noise(noisy[i], target[i], alpha[i], kind)
        assert all((x - y).abs().max() < 1e-12 for x, y in zip(found, (clean[i], noise[i])))
        off = script.clean_and_noise(noisy[i], target[i] + 0.1, alpha[i], kind)     # wrong, yet two parts of noisy
        assert (signal * off[0] + sigma * off[1] - noisy[i]).abs().max() < 1e-12
        assert (off[0] - clean[i]).abs().max() > 1e-3


def test_timesteps_of_three_spacings():
    for steps in (1, 3, 10, 12, 50, 250):
        stride = 1000 // steps
        leading = [i * stride + 1 for i in range(steps)][::-1]
        assert script.ddim_timesteps(schedule(offset=1), steps) == leading
        trailing = script.ddim_timesteps(schedule(spacing="trailing"), steps)
        assert trailing[0] == 999 and len(trailing) == steps
        assert all(abs(t - (1000 - i * 1000 / steps - 1)) <= 0.5 for i, t in enumerate(trailing))
        linspace = script.ddim_timesteps(schedule(spacing="linspace"), steps)
        assert linspace[-1] == 0 and len(linspace) == steps and (steps == 1 or linspace[0] == 999)
        assert all(abs(t - 999 * (steps - 1 - i) / max(1, steps - 1)) <= 0.5 for i, t in enumerate(linspace))
    assert script.ddim_timesteps(schedule(spacing="trailing"), 4) == [999, 749, 499, 249]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [0, 1001])
def test_counts_of_steps_that_are_refused(spacing, steps):
    with pytest.raises(ValueError, match=f"{steps} sampling steps"):
        script.ddim_timesteps(schedule(spacing=spacing), steps)


class Oracle(torch.nn.Module):
    """Knows the clean picture, and what of a noisy one is noise."""
    def __init__(self, schedule, clean):
        super().__init__()
        self.schedule, self.clean, self.alphas = schedule, clean, script.alphas_of(schedule).double()

    def forward(self, noisy, times, *given):
        clean = self.clean.repeat(len(noisy) // len(self.clean), 1, 1, 1).double()
        alpha = self.alphas[times].view(-1, 1, 1, 1)
        noise = (noisy.double() - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        kind = self.schedule.prediction_type
        return script.target_of(clean, noise, alpha.flatten(), kind).to(noisy.dtype)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_denoiser_is_sampled_to_the_truth(kind, spacing):
    plan, batch = schedule(kind, spacing=spacing), {
        "clean": torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)), "context": torch.zeros(3, 5, 2),
        "empty": torch.zeros(1, 5, 2), "boxes": torch.rand(3, 2, 4), "phrases": torch.zeros(3, 2, 2),
        "masks": torch.ones(3, 2, 2)}
    given = batch | {"when": torch.tensor([0.1, 0.5, 0.9]), "noise": torch.randn(3, 4, 8, 8)}
    assert script.errors(Oracle(plan, batch["clean"]), given)[0].max() < 1e-9          # nor has it an error in training
    for steps in (1, 4, 20):
        config = Config(sample_steps=steps, guidance=3.0, dtype="float32")
        out = script.generate(Oracle(plan, batch["clean"]), batch, config)
        first = script.ddim_timesteps(plan, steps)[-1]                       # rounding, as noise is told from a sum
        worst = {"sample": 1e-6, "v_prediction": 2e-6, "epsilon": 5e-6 / float(script.alphas_of(plan)[first].sqrt())}
        assert (out - batch["clean"]).abs().max() < worst[kind]
        alphas, x = script.alphas_of(plan).double(), torch.randn(3, 4, 8, 8, dtype=torch.float64)
        oracle = Oracle(plan, batch["clean"])
        for time in script.ddim_timesteps(plan, steps):
            told = oracle(torch.cat([x, x]), torch.tensor([time] * 6))[:3]
            x = script.ddim_step(plan, alphas, x, told, time, steps)
        assert (x - batch["clean"]).abs().max() < 1e-10
    last = script.generate(Oracle(dataclasses.replace(plan, last_alpha_one=False), batch["clean"]), batch, config)
    assert (last - batch["clean"]).abs().max() > 1e-3        # there it keeps the noise of the first timestep


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_clips_the_clean_part_alone(kind):
    plan, alphas = schedule(kind, clip=0.5), script.alphas_of(schedule()).double()
    x, out = torch.randn(2, 50, dtype=torch.float64)
    clean, noise = script.clean_and_noise(x, out, alphas[799], kind)
    found = script.ddim_step(plan, alphas, x, out, 799, 10)
    wanted = alphas[699].sqrt() * clean.clamp(-0.5, 0.5) + (1 - alphas[699]).sqrt() * noise
    assert (found - wanted).abs().max() < 1e-12 and clean.abs().max() > 0.5


# ------------------------------------------------------------------------------------------- learning rates and alarms
@pytest.mark.parametrize("decay", ["constant", "cosine", "late"])
@pytest.mark.parametrize("least", [0.0, 0.1])
def test_learning_rates(decay, least):
    config = Config(learning_rate=2.0, warmup_steps=10, decay=decay, min_lr=least)
    def lr(step):
        return script.lr_at(step, 100, config)
    assert [lr(step) for step in range(10)] == [pytest.approx(2.0 * (step + 1) / 10) for step in range(10)]
    for step in range(10, 130):
        left = max(0.0, 1 - step / 100)
        share = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * (1 - left))) / 2, "late": min(1, 2 * left)}[decay]
        assert lr(step) == pytest.approx(2 * (least + (1 - least) * share), abs=1e-12)
    end = {"constant": 2.0, "cosine": 2 * least, "late": 2 * least}[decay]
    half = {"constant": 2.0, "cosine": 1 + least, "late": 2.0}[decay]
    assert lr(50) == pytest.approx(half) and lr(100) == lr(10 ** 6) == pytest.approx(end, abs=1e-12)
    assert script.lr_at(0, 100, Config(warmup_steps=0, learning_rate=2.0)) == 2.0


def test_alarms():
    quiet = {"attn": [0.3, 0.004], "dense": [0.2, 0.001], "ratio": [0.4, 0.2], "grad": [1.0, 1.0]}
    shut = {"attn": [0.0099], "dense": [0.0], "ratio": [0.0], "grad": [1e-3]}
    assert report.alarm(shut, 999) == "" and report.alarm(shut, 1000).startswith("collapse")
    assert report.alarm(shut | {"dense": [0.01]}, 10 ** 6) == ""             # one that is open will do
    assert report.alarm(quiet, 0) == report.alarm(quiet, 5000) == ""
    for name, edge, above in (("attn", 0.9, 0.9001), ("dense", 0.9, 0.9001), ("ratio", 1.0, 1.001)):
        for step in (0, 5000):
            assert report.alarm(quiet | {name: [0.1, edge]}, step) == ""
            assert report.alarm(quiet | {name: [above, 0.1]}, step).startswith("over-activation")
    assert all("--" in report.alarm(*given) for given in ((shut, 1000), (quiet | {"attn": [1.0]}, 1)))


# ----------------------------------------------------------------------------------------------------- the toy's scenes
def test_scenes_hold_what_their_captions_say():
    arrays = demo.draw(2000, np.random.default_rng(5))
    present, kinds = arrays["present"] > 0, arrays["kinds"]
    count = present.sum(1)
    assert all(abs((count == n).mean() - 1 / 3) < 0.05 for n in (1, 2, 3)) and present[:, 0].all()
    assert not (present[:, 1:] & ~present[:, :-1]).any()                     # objects come first
    assert all(abs((kinds == kind)[present].mean() - 1 / 3) < 0.05 for kind in range(3))
    for row in range(2000):
        n = count[row]
        assert len({*arrays["colours"][row, :n]}) == n
        phrases = [demo.text(ids.tolist()) for ids in arrays["phrases"][row, :n]]
        assert phrases == [f"a {demo.COLOURS[c]} {demo.SHAPES[k]}" for c, k in zip(
            arrays["colours"][row, :n], kinds[row, :n])]
        assert sorted(demo.text(arrays["captions"][row].tolist()).split(" and ")) == sorted(phrases)
        ids = arrays["captions"][row].tolist()
        assert ids[0] == demo.ID["<start>"] and ids[4 * n] == demo.ID["<end>"] == max(ids) and not any(ids[4 * n + 1:])
    swapped = [demo.text(ids.tolist()).split(" and ")[0] != demo.text(phrase.tolist())
               for ids, phrase in zip(arrays["captions"][count == 2], arrays["phrases"][count == 2, 0])]
    assert abs(np.mean(swapped) - 0.5) < 0.08        # in any order


def test_boxes_are_tight_and_apart():
    arrays = demo.draw(2000, np.random.default_rng(6))
    pixels = arrays["boxes"] * 32
    assert (pixels == pixels.round()).all() and pixels.min() >= 0 and pixels.max() <= 32
    side = pixels[..., 2:] - pixels[..., :2]
    assert side.min() == 8 and side.max() == 14
    for row in range(2000):
        objects, seen_labels = np.flatnonzero(arrays["present"][row]), {0}
        for i in objects:
            label = 1 + arrays["colours"][row, i]
            seen_labels.add(label)
            ys, xs = np.nonzero(arrays["labels"][row] == label)
            x0, y0, x1, y1 = pixels[row, i]
            assert (xs.min(), xs.max() + 1, ys.max() + 1) == (x0, x1, y1)
            if arrays["kinds"][row, i] < 2:
                assert ys.min() == y0
            else:                                   # the tip begins where it is as wide as the middle pixels
                w, h = x1 - x0, y1 - y0
                tip = next(j for j in range(int(h)) if (w % 2 == 0) * 2 / w <= (2 * j + 1) / h)
                assert ys.min() == y0 + tip and tip <= 2
            if arrays["kinds"][row, i] == 1:
                assert len(ys) == (x1 - x0) * (y1 - y0)
            for j in objects[objects > i]:
                a, b = pixels[row, i], pixels[row, j]
                assert max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3]) >= 1
        assert {*np.unique(arrays["labels"][row])} == seen_labels


def test_scenes_are_always_the_same():
    first, rows = demo.scenes(64)
    demo.scenes.cache_clear()
    again, _ = demo.scenes(64)
    assert all((first[name] == again[name]).all() for name in first)
    other, others = demo.scenes(7)                  # held-out scenes whatever the training set
    for split in ("val", "test"):
        assert len(rows[split]) == 96
        assert all((first[name][rows[split]] == other[name][others[split]]).all() for name in first)
    assert (first["labels"][rows["val"]] != first["labels"][rows["test"]]).any()
    demo.scenes.cache_clear()


@torch.no_grad()
def test_a_patch_of_the_toy_is_answered_where_it_lies():
    torch.manual_seed(0)
    model, x = ToyBase(32, 2, 8), torch.zeros(2, 3, 32, 32)
    torch.nn.init.normal_(model.proj_out.weight)
    for block in model.blocks:                      # so that no cell sees another
        for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.conv):
            torch.nn.init.zeros_(layer.weight)
    x[1, :, 8:16, 24:32] = 1
    out = model(x, torch.tensor([5, 5]), torch.ones(2, 14, dtype=torch.int64))
    moved = (out[0] != out[1]).any(0)
    assert moved[8:16, 24:32].all() and moved.sum() == 64


@torch.no_grad()
def test_each_branch_of_a_toy_block_has_its_own_shift_by_time():
    torch.manual_seed(0)
    block, given = script.ToyBlock(8, 2, False), {}
    torch.nn.init.normal_(block.shift.weight)
    for name in ("norm1", "norm2", "norm3"):
        getattr(block, name).register_forward_hook(lambda _, x, out, name=name: given.update({name: out}))
    for name in ("attn1", "attn2", "ff"):
        getattr(block, name).register_forward_pre_hook(lambda _, x, name=name: given.update({name: x[0]}))
    time = torch.randn(3, 8)
    block(torch.randn(3, 16, 8), torch.randn(3, 5, 8), time, None, None)
    wanted = (time / (1 + (-time).exp())) @ block.shift.weight.T + block.shift.bias
    for i, (branch, norm) in enumerate((("attn1", "norm1"), ("attn2", "norm2"), ("ff", "norm3"))):
        assert (given[branch] - given[norm] - wanted[:, None, 8 * i:8 * i + 8]).abs().max() < 1e-5


def test_cells_of_the_toy_have_waves_of_their_own():
    waves = script.cell_waves(4, 16)[0]
    assert waves.shape == (16, 16) and waves.abs().max() <= 0.5
    for y in range(4):
        for x in range(4):
            row = []
            for place in (y, x):
                angles = [(place + 0.5) / 4 * math.pi / 2 * 2 ** (k * 2 / 3) for k in range(4)]
                row += [math.sin(a) / 2 for a in angles] + [math.cos(a) / 2 for a in angles]
            assert (waves[y * 4 + x] - torch.tensor(row)).abs().max() < 1e-6
