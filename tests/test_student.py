"""train_student.py piece by piece, against loops in float64: graph layers, the head, routing, the losses, what teachers
are asked, evaluation. Molecules and batches are in test_student_data.py, whole runs in test_run_student.py.
"""
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rdkit import Chem
from torch import nn

import common
import train_student
from data.spectra import metrics, prepare
from data.spectra.features import N_FEATURES, featurise, fragments, join, mass_number, read_smiles
from data.spectra.tables import MASKED, Molecules, read_folder
from runs import model_tensors, write_file
from train_student import (DRY, LDS, SHIFTS, Config, Fragments, Head, Student, Teacher, ask_teachers, build_model,
                           compute_loss, dropout_on, evaluate, get_batch, load_model, lr_at, pool, predict, rank_loss,
                           soft_loss, temper, weigh)

CPU = torch.device("cpu")
ODD = ("[Xe]", "C", "CCO", "OC1CC2CCC1C2", "CC(=O)Oc1ccccc1C(=O)O", "C1CCC2(CC1)OCCO2", "BrCC#N")
MANY = ODD + ("CC", "CC(C)(C)C", "C=C", "C#N", "CCOC(C)=O", "NCC(=O)O", "C1CCCCCCCC1", "Cc1ccncc1", "c1ccc2ccccc2c1",
              "Clc1ccc(Cl)cc1", "O=C1CCC2CCCCC12", "CC(C)CCCC(C)CCO")


# ---------------------------------------------------------------------------------------------------------------- tools
@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return prepare.main(["--demo", "--limit", "220", "--max_mz", "240", "--name", "few", "--workers", "1", "--out_dir",
                         str(tmp_path_factory.mktemp("spectra"))])


@pytest.fixture(scope="module")
def data(folder):
    return read_folder(folder)


@pytest.fixture
def double(monkeypatch):
    """What the script computes in float32 whatever comes in is computed in float64."""
    real = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: real(x) if x.dtype == torch.bool else x.double())


def settings(**fields):
    return Config(**DRY | dict(device="cpu", dropout=0.0, input_dropout=0.0, phase="student") | fields)


def model_of(phase, bins, features=0, seed=0, spread=0.1, **fields):
    """A random model in eval mode in which no weight is still at its 0 or 1."""
    torch.manual_seed(seed)
    model = build_model(settings(phase=phase, **fields), bins, features)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return model.eval()


def molecules_of(*smiles, bins=200):
    return Molecules(join([featurise(one if isinstance(one, Chem.Mol) else read_smiles(one)) for one in smiles]), bins)


def graph_of(*smiles, bins=200, rows=None):
    molecules = molecules_of(*smiles, bins=bins)
    batch = molecules.inputs(np.arange(molecules.n) if rows is None else np.array(rows), True)
    return common.cast(batch, CPU, torch.float64)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_teacher(data, features=12):
    """The data as if a teacher had been asked."""
    taught, feature, confidence = (noise(len(data.mass), width) for width in (data.molecules.bins, features, 1))
    return dataclasses.replace(data, taught={"taught": taught.abs().half(), "feature": feature.half(),
                                             "confidence": 0.5 + confidence[:, 0].abs().float()})


def saved(model, path):
    write_file(path, model_tensors(model), {"about": model.about, "step": 0})
    return str(path)


def close(found, wanted, tolerance=1e-10):
    assert found.shape == wanted.shape and found.isfinite().all()
    assert (found - wanted).abs().max() <= tolerance * max(1, wanted.abs().max()), (found - wanted).abs().max()


# --------------------------------------------------------------------------------------------------------- graph layers
def test_gine_against_a_dense_adjacency():
    torch.manual_seed(0)
    layer, h = train_student.GINE(settings()).double(), noise(7, 16)
    with torch.no_grad():
        layer.eps.fill_(0.3), layer.norm.weight.copy_(noise(16)), layer.norm.bias.copy_(noise(16, seed=1))
    adjacency = -torch.ones(7, 7, dtype=torch.int64)
    for kind, (i, j) in enumerate(((0, 1), (1, 2), (2, 0), (2, 3), (4, 5))):            # 6 has no bond
        adjacency[i, j] = adjacency[j, i] = kind
    i, j = (adjacency >= 0).nonzero().T
    n = F.layer_norm(h, (16,), layer.norm.weight, layer.norm.bias)
    total = torch.stack([1.3 * n[a] + sum([(n[b] + layer.bond.weight[adjacency[a, b]]).relu() for b in range(7)
                                           if adjacency[a, b] >= 0], torch.zeros(16)) for a in range(7)])
    wanted = h + layer.down(F.gelu(layer.up(total)))
    close(layer(h, torch.stack([j, i]), adjacency[i, j]), wanted, 1e-12)


@pytest.mark.parametrize("smiles", [*ODD[2:4], "Cc1ccc(C#N)nc1", *ODD[5:]])
def test_the_order_of_atoms_does_not_matter(double, smiles):
    molecule, rng = read_smiles(smiles), np.random.default_rng(0)
    order = rng.permutation(molecule.GetNumAtoms()).tolist()
    one, other = graph_of(molecule), graph_of(Chem.RenumberAtoms(molecule, order))
    assert not torch.equal(one["atoms"], other["atoms"]) or not torch.equal(one["edges"], other["edges"])
    encoder, teacher = (model_of(phase, 200).double() for phase in ("pretrain", "teacher"))
    atoms = encoder.encoder(one)
    for column in range(7):                         # each is read
        changed = one["atoms"].clone()
        changed[0, column] = 1 - changed[0, column].clamp(max=1)
        assert not torch.equal(encoder.encoder(one | {"atoms": changed}), atoms), column
    close(encoder.encoder(other), atoms[order], 1e-12)
    assert (atoms - atoms.mean(0)).abs().max() > 0.1
    for found, wanted in zip(teacher(other), teacher(one)):
        close(found, wanted, 1e-11)


@pytest.mark.parametrize("phase", ["teacher", "student"])
def test_other_molecules_of_the_batch_do_not_matter(double, phase):
    model = model_of(phase, 200).double()
    together, h = model(graph_of(*ODD))[:2]
    for i, smiles in enumerate(ODD):
        y, alone = model(graph_of(smiles))[:2]
        close(y[0], together[i], 1e-11), close(alone[0], h[i], 1e-11)
    assert (together.amax(1) > 0.01).all() and (together[2:] - together[1:-1]).abs().max() > 0.01
    reverse = model(graph_of(*ODD, rows=[*range(len(ODD))][::-1]))[0]
    close(reverse.flip(0), together, 1e-11)


def test_pooling_against_a_loop_per_molecule(double):
    h, score, owner = noise(9, 4), noise(9, seed=1), torch.tensor([0, 2, 2, 1, 0, 2, 3, 1, 2])
    for scale in (1, 1e4):
        found = pool(h, score * scale, owner, 4)
        for k in range(4):
            mine, weight = h[owner == k], (score[owner == k] * scale).softmax(0)
            close(found[k], torch.cat([mine.mean(0), mine.amax(0), (mine * weight[:, None]).sum(0)]), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_huge_attention_logits_are_finite(dtype):
    """Defect 11: no exponential without the maximum taken off."""
    h, score = noise(6, 4).to(dtype).requires_grad_(), torch.tensor([1e4, -1e4, 1e4, 3e4, -3e4, 0]).to(dtype)
    found = pool(h, score.requires_grad_(), torch.tensor([0, 0, 0, 1, 1, 2]), 3)
    found.sum().backward()
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert h.grad.isfinite().all() and score.grad.isfinite().all()
    assert torch.equal(found[0, 8:], (h[0].float() + h[2].float()) / 2)


@pytest.mark.parametrize("some", [("[Xe]",), ("C",), ("[Xe]", "C"), ("CCO", "[Xe]", "C", "c1ccccc1")], ids="+".join)
@pytest.mark.parametrize("phase", ["pretrain", "teacher", "student"])
def test_molecules_without_bonds(phase, some):
    """Defect 11, forward and backward."""
    model, molecules, rows = model_of(phase, 200).train(), molecules_of(*some), np.arange(len(some))
    if phase == "pretrain":
        batch = molecules.hide_bonds(rows, rows, np.random.default_rng(0))
        assert (len(batch["asked"]) > 0) == ("CCO" in some) and batch["count"] >= 1
    else:
        batch = molecules.inputs(rows, True) | {"target": torch.rand(len(some), 200), "count": len(some), "micro": 0}
    loss, _ = compute_loss(model, batch, 0, settings(phase=phase, rank_weight=0.0))
    loss.backward()
    assert loss.isfinite() and (loss > 0 or phase == "pretrain")
    grads = [parameter.grad for parameter in model.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("bins", [60, 200])
def test_fragment_scores_against_a_loop_per_fragment(double, bins):
    torch.manual_seed(0)
    module, some = Fragments(settings()).double().eval(), [*ODD]
    batch = graph_of(*some, bins=bins)
    atoms, h = noise(len(batch["atoms"]), 16), noise(len(some), 32, seed=1)
    found, wanted, first_atom = module(atoms, h, batch, bins), torch.zeros(len(some), bins), 0
    wanted = wanted.double()
    for b, smiles in enumerate(some):
        molecule, one = read_smiles(smiles), featurise(read_smiles(smiles))
        mine = atoms[first_atom:first_atom + molecule.GetNumAtoms()]
        first_atom += molecule.GetNumAtoms()
        for kind, inside in zip(*fragments(molecule)):
            inside = torch.from_numpy(inside)
            x = module.inside(mine[inside].sum(0)) + module.outside(mine[~inside].sum(0)) + module.whole(h[b])
            for i, j, type, ring in one["bonds"].tolist():
                if inside[i] != inside[j]:
                    x = x + module.ends(mine[i] + mine[j]) + module.bond.weight[2 * type + ring]
            x = F.gelu(module.norm(x + module.kind.weight[int(kind)]))
            scores = module.down(F.gelu(module.up(x)))
            mass = sum(mass_number(molecule.GetAtomWithIdx(i)) for i in inside.nonzero()[:, 0].tolist())
            for k in range(11):
                if 0 <= mass + k - 5 < bins:
                    wanted[b, mass + k - 5] += scores[k]
    close(found, wanted, 1e-11)
    assert wanted.abs().max() > 0.1


# ------------------------------------------------------------------------------------------------------------- the head
def head_of(bins=40, **fields):
    torch.manual_seed(0)
    head = Head(settings(width=8, **fields), bins).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head


MASSES = torch.tensor([1, 2, 16, 33, 34, 35, 39, 44])                   # bins 0 ... 39: M + 5 is beyond from 35 on


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("use_fragments", [False, True])
@pytest.mark.parametrize("use_anchor", [False, True])
def test_the_head_against_a_loop(double, use_anchor, use_fragments, scored):
    """y_j = g_j F_j + (1 - g_j) R_(M + 5 - j), fragments' shifts, scores before the ReLU, 0 at 0 and above M + 5."""
    head, Z = head_of(use_anchor=use_anchor, use_fragments=use_fragments), 40
    h, table, scores = noise(8, 8), noise(8, 3, Z, seed=1).abs(), noise(8, Z, seed=2)
    wanted = torch.zeros(8, Z, dtype=torch.float64)
    for b, M in enumerate(MASSES.tolist()):
        forward = head.forward_axis(h[b])
        for j in range(1, min(M + 5, Z - 1) + 1):
            y = forward[j]
            if use_anchor:
                g = 1 / (1 + (-head.gate(h[b])[j]).exp())
                y = g * y + (1 - g) * head.reverse_axis(h[b])[min(M + 5 - j, Z - 1)]
            if use_fragments:
                for row, (kind, k) in enumerate(itertools.product(range(3), range(SHIFTS))):
                    if 0 <= j + k - 5 < Z:
                        y = y + (head.shifts(h[b])[row] + head.place[row, j]) * table[b, kind, j + k - 5]
            wanted[b, j] = max(y + (scores[b, j] if scored else 0), 0)
    found = head(h, MASSES, table, scores if scored else None)
    close(found, wanted, 1e-12)
    assert (wanted > 0).sum() > 60 and hasattr(head, "gate") == use_anchor and hasattr(head, "place") == use_fragments


def test_peaks_counted_from_the_mass_are_no_linear_layer():
    """Defect 4: a flipped second axis is one linear layer and knows no mass; this head answers by it."""
    one, other = nn.Linear(8, 40).double(), nn.Linear(8, 40).double()
    both = nn.Linear(8, 40).double()
    with torch.no_grad():
        both.weight.copy_(one.weight + other.weight.flip(0)), both.bias.copy_(one.bias + other.bias.flip(0))
    h, nothing = noise(1, 8), torch.zeros(1, 3, 40, dtype=torch.float64)
    close(one(h) + other(h).flip(1), both(h), 1e-12)
    for use_anchor in (False, True):
        head = head_of(use_anchor=use_anchor, use_fragments=False)
        light, heavy = (head(h, torch.tensor([mass]), nothing)[0, :25] for mass in (20, 31))
        assert torch.equal(light, heavy) == (not use_anchor)
    with torch.no_grad():                                               # all from the reverse axis: it moves along
        head.gate.weight.zero_(), head.gate.bias.fill_(-50)
    light, heavy = (head(h, torch.tensor([mass]), nothing)[0] for mass in (20, 31))
    close(light[1:26], heavy[12:37], 1e-6)
    assert (light > 0).sum() > 5


# -------------------------------------------------------------------------------------------------------------- routing
@pytest.mark.parametrize("bias_in_weights", [False, True])
@pytest.mark.parametrize("experts, top_k", [(4, 2), (4, 1), (3, 3), (7, 2)])
def test_experts_are_chosen_by_logits_and_bias_and_mixed_by_logits(double, experts, top_k, bias_in_weights):
    fields = dict(experts=experts, top_k=top_k, bias_in_weights=bias_in_weights, blocks=2)
    model, batch = model_of("student", 200, **fields).double(), graph_of(*MANY)
    with torch.no_grad():
        model.bias.copy_(noise(experts))
        trunk = model.trunk(model.fingerprint(batch))
        model.router.copy_(0.3 * noise(*model.router.shape, seed=1))    # it starts next to even
        y, h, p, load = model(batch)
        even = (trunk - trunk.mean(1, keepdim=True)) / (trunk.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        logits = even @ model.router.T
        mixed, counts, moved = torch.zeros_like(trunk), torch.zeros(experts), 0
        for b in range(len(trunk)):
            order = sorted(range(experts), key=lambda i: -(logits[b, i] + model.bias[i]))[:top_k]
            moved += set(order) != set(logits[b].topk(top_k).indices.tolist())
            weight = torch.stack([(logits[b, i] + model.bias[i] * bias_in_weights).exp() for i in order])
            for i, share in zip(order, weight / weight.sum()):
                x, counts[i] = trunk[b:b + 1], counts[i] + 1
                for block in model.experts[i]:
                    x = x + block.down(F.gelu(block.up(block.norm(x))))
                mixed[b] += share * x[0]
        wanted = F.gelu(model.norm(mixed))
        close(h, wanted, 1e-11), close(p, logits.softmax(1), 1e-12)
        close(y, model.head(wanted, batch["mass"], batch["fragments"]), 1e-11)
    assert torch.equal(load.float(), counts) and load.sum() == top_k * len(trunk) and (moved > 3 or top_k == experts)
    model(batch)[0].square().sum().backward()       # the router learns through the weights, the bias never
    assert (model.router.grad.abs().max() > 1e-9) == (top_k > 1) and not model.bias.requires_grad


@pytest.mark.parametrize("experts", [2, 4, 5])
def test_the_bias_follows_accepted_steps_by_the_share_of_rows(experts):
    """Defect 12: any number of experts, any batch size, no skipped step."""
    fields = dict(experts=experts, top_k=1, grad_accum=3, bias_rate=0.01)
    counts = torch.tensor([7.0] + [2.0] * (experts - 2) + [0.0])
    counts = torch.stack([counts, counts + 1, counts * 0])
    after = []
    for scale in (1, 1000):
        model = model_of("student", 50, **fields)
        with torch.no_grad():
            model.bias.copy_(noise(experts)), model.usage.copy_(noise(experts).softmax(0))
            before = {name: value.clone() for name, value in model.named_buffers()}
            model.chosen.copy_(counts * scale)
            model.follow(torch.tensor(1.0))
            for name in ("bias", "usage", "balance"):
                assert torch.equal(getattr(model, name), before[name]), name
            model.follow(torch.tensor(0.0))
        load = counts.sum(0) / counts.sum()
        close(model.bias, before["bias"] + 0.01 * (load.mean() - load).sign(), 1e-7)
        close(model.usage, 0.9 * before["usage"] + 0.1 * load, 1e-7)
        assert torch.equal(model.balance, before["balance"]) and load.max() > load.min()
        after.append(model.bias)
    assert torch.equal(*after)


def test_what_is_chosen_is_counted_once_per_micro_batch():
    """A replay leaves nothing behind, micro-batches add up, evaluation counts nothing."""
    model, molecules = model_of("student", 200, grad_accum=2).train(), molecules_of(*MANY)
    one, other = (molecules.inputs(rows, False) for rows in np.split(np.arange(len(MANY)), [7]))
    loads = [model(batch | {"micro": micro})[3] for micro, batch in enumerate((one, other))]
    for _ in range(3):
        model(one | {"micro": 0})
    assert torch.equal(model.chosen, torch.stack(loads)) and model.chosen.sum() == 2 * len(MANY)
    before = model.chosen.clone()
    model.eval()(other | {"micro": 0})
    assert torch.equal(model.chosen, before)
    usage = model.usage.clone()
    model.follow(torch.tensor(0.0))
    close(model.usage, 0.9 * usage + 0.1 * before.sum(0) / before.sum(), 1e-6)


def usage_after(steps, data, **fields):
    """Train a student on the spot -> shares of rows over the last third."""
    config = settings(width=16, blocks=1, batch_size=32, rank_weight=0.0, max_steps=steps, **fields)
    torch.manual_seed(0)
    model = build_model(config, data.molecules.bins).train()
    optimizer, shares = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    for step in range(steps):
        loss, parts = compute_loss(model, get_batch(data, "train", step, config), step, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.follow(torch.tensor(0.0))
        shares.append([float(parts[f"expert{i}"]) for i in range(4)])
    return np.mean(shares[-(steps // 3):], 0)


def test_experts_are_used_alike_only_if_they_are_balanced(data):
    collapsed = usage_after(150, data, bias_rate=0.0, balance_weight=0.0)
    balanced = usage_after(600, data, bias_rate=Config.bias_rate, balance_weight=Config.balance_weight)
    assert collapsed.min() < 0.1 and collapsed.sum() == pytest.approx(1), collapsed
    assert 0.20 <= balanced.min() and balanced.max() <= 0.30, balanced


# --------------------------------------------------------------------------------------------------------------- losses
def spectra(n, bins, seed=0, empty=()):
    """Square roots of spectra, a tenth of the bins filled."""
    x = noise(n, bins, seed=seed).abs() * (torch.rand(n, bins, generator=torch.Generator().manual_seed(seed)) < 0.1)
    x[:, 5] += 0.1
    x[list(empty)] = 0
    return x


def tempered(root, T):
    q = (root / root.amax(1, keepdim=True)) ** 2 + 1e-3
    q = q ** (1 / T)
    return q / q.sum(1, keepdim=True)


def kl(p, q):
    return (p * (p / q).log()).sum(1)


def test_weighing_tempering_and_the_soft_loss():
    one, other = spectra(6, 50), spectra(6, 50, seed=1)
    wanted = one * torch.arange(50)
    close(weigh(one), wanted / wanted.square().sum(1, keepdim=True).sqrt(), 1e-12)
    close(weigh(one.float()), metrics.weigh(one.float() ** 2, *metrics.COSINES["weighted"]), 1e-6)
    for T in (1.0, 2.5, 4.0):
        close(temper(one, T).exp(), tempered(one, T), 1e-12)
        wanted = T ** 2 * kl(tempered(other, T), tempered(one, T))
        close(soft_loss(one, other, T), wanted, 1e-11)
        close(soft_loss(one.float(), other.float(), T), wanted.float(), 1e-5)
        close(soft_loss(7 * one, 0.01 * other, T), wanted, 1e-11)               # a spectrum has no scale
        assert (wanted > 0.1).all() and soft_loss(one, one, T).abs().max() < 1e-12
        assert soft_loss(one.float(), one.float() * 1.0001, T).min() > -1e-5
    assert (weigh(torch.zeros(2, 9)) == 0).all()


def slope(function, x, *arguments):
    x = x.clone().requires_grad_()
    value = function(x, *arguments).sum()
    return value.detach(), torch.autograd.grad(value, x)[0]


def test_the_temperature_matters():
    """Defect 1: an MSE divided and multiplied by T is flat in T. Here other peaks gain weight."""
    one, other = spectra(6, 50), spectra(6, 50, seed=1)
    flat = [slope(lambda x, T: (x / T - other / T).square() * T ** 2, one, T) for T in (1.0, 4.0)]
    (value, gradient), (warm, warm_gradient) = [slope(soft_loss, one, other, T) for T in (1.0, 4.0)]
    close(flat[0][1], flat[1][1], 1e-12), close(flat[0][0], flat[1][0], 1e-12)
    assert not 0.75 < warm / value < 1.33
    assert F.cosine_similarity(gradient.flatten(), warm_gradient.flatten(), dim=0) < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_predicted_has_a_finite_loss_and_gradient(dtype):
    one, other = spectra(4, 50, empty=(1, 3)).to(dtype), spectra(4, 50, seed=1, empty=(2, 3)).to(dtype)
    for function in (soft_loss, lambda x, y, T: 1 - (weigh(x) * weigh(y)).sum(1)):
        value, gradient = slope(function, one, other, 4.0)
        assert value.isfinite() and gradient.isfinite().all()
    uniform = torch.full((1, 50), 1 / 50, dtype=dtype)
    close(temper(one[1:2], 2.0).exp(), uniform, 1e-6)


def test_the_rank_loss_against_a_loop():
    found, own, rivals = (F.normalize(noise(n, 20, seed=i).abs(), dim=1) for i, n in enumerate((4, 4, 6)))
    are_own = torch.zeros(4, 6, dtype=torch.bool)
    are_own[0, 2] = are_own[1, 0] = are_own[1, 5] = True
    are_own[3] = True
    wanted = []
    for b in range(4):
        scores = [float(found[b] @ own[b])] + [float(found[b] @ rivals[r]) for r in range(6) if not are_own[b, r]]
        wanted.append(-math.log(math.exp(scores[0] / 0.05) / sum(math.exp(score / 0.05) for score in scores)))
    close(rank_loss(found, own, rivals, are_own), torch.tensor(wanted, dtype=torch.float64), 1e-11)
    assert wanted[3] == 0 and min(wanted[:3]) > 0.1


class Says(nn.Module):
    """A model that gives what it was made with."""
    def __init__(self, *answers, usage=None):
        super().__init__()
        self.answers, self.usage, self.projector = answers, usage, nn.Identity()

    def forward(self, batch):
        return self.answers


@pytest.mark.parametrize("taught", [False, True])
def test_the_loss_is_the_weighted_sum_of_its_parts(taught):
    y, target, rivals, said = (spectra(4, 30, seed=i).float() for i in range(4))
    target = target / target.amax(1, keepdim=True)
    target[3] = 0                                   # never measured: only its teachers count
    h, feature = torch.randn(4, 6), torch.randn(4, 6)
    are_own = torch.eye(4, dtype=torch.bool)
    p, load, usage = torch.rand(4, 3).softmax(1), torch.tensor([4.0, 3.0, 1.0]), torch.tensor([0.5, 0.3, 0.2])
    confidence = torch.tensor([0.5, 2.0, 1.0, 0.25])
    batch = {"target": target, "count": 10, "micro": 0, "temperature": 3.0, "rivals": weigh(rivals),
             "are_own": are_own}
    batch |= {"taught": said, "feature": feature, "confidence": confidence} if taught else {}
    config = settings(hard_weight=0.3, soft_weight=0.7, feature_weight=0.2, rank_weight=0.4, balance_weight=0.6)
    loss, parts = compute_loss(Says(y, h, p, load, usage=usage), batch, 0, config)
    hard = (1 - (weigh(y) * weigh(target)).sum(1))[:3].sum() / 10
    ranked = rank_loss(weigh(y), weigh(target), weigh(rivals), are_own)[:3].sum() / 10
    switch = 3 * sum(usage[i] * p[:, i].sum() / 10 for i in range(3))
    wanted = {"hard": hard, "rank": ranked, "switch": switch, "expert0": 0.2, "expert1": 0.15, "expert2": 0.05}
    total = (0.3 if taught else 1.0) * hard + 0.4 * ranked + 0.6 * switch
    if taught:
        soft = sum(confidence[b] * soft_loss(y[b:b + 1], said[b:b + 1], 3.0)[0] for b in range(4)) / 10
        apart = sum(1 - (h[b] @ feature[b]) / (h[b].norm() * feature[b].norm()) for b in range(4)) / 10
        wanted |= {"soft": soft, "feature": apart}
        total = total + 0.7 * soft + 0.2 * apart
    assert {name: float(part) for name, part in parts.items()} == pytest.approx(
        {name: float(part) for name, part in wanted.items()}, rel=1e-5)
    assert float(loss) == pytest.approx(float(total), rel=1e-5) and loss.dtype == torch.float32 and loss.dim() == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_loss(Says(y, h, p, load, usage=usage), batch, 0, config)[0] == loss
    config = dataclasses.replace(config, rank_weight=0.0, lds_sigma=1.5)
    other, parts = compute_loss(Says(y, h, p, load, usage=usage), batch, 0, config)
    smooth = weigh(LDS(1.5)(target ** 2).sqrt())     # of the measured spectrum alone
    smooth = (1 - (weigh(y) * smooth).sum(1))[:3].sum() / 10
    wanted = total - 0.4 * ranked + (0.3 if taught else 1.0) * (smooth - hard)
    assert "rank" not in parts and float(other) == pytest.approx(float(wanted), rel=1e-4)


def test_the_balancing_loss_is_least_where_experts_are_used_alike():
    """Switch: E * sum f_i P_i is 1 for equal shares and E if one expert gets all."""
    one, even = [1.0, 0.0, 0.0, 0.0], [0.25] * 4
    for usage, p, wanted in (even, even, 1.0), (one, one, 4.0), (one, one[::-1], 0.0), (one, even, 1.0):
        p, usage = torch.tensor([p, p]), torch.tensor(usage)
        model = Says(torch.ones(2, 9), None, p, torch.ones(4), usage=usage)
        batch = {"target": torch.ones(2, 9), "count": 2}
        assert float(compute_loss(model, batch, 0, settings(rank_weight=0.0))[1]["switch"]) == pytest.approx(wanted)


def loss_and_gradient(folder, phase, batch_size, grad_accum):
    """This rank's share of a step of 8 rows, with DDP if there are two ranks -> loss of all, gradients, followers."""
    data = with_teacher(read_folder(folder)) if phase == "student" else read_folder(folder)
    fields = dict(grad_accum=grad_accum, use_gradnorm=phase == "student")
    config = settings(phase=phase, batch_size=batch_size, **fields)
    model = model_of(phase, data.molecules.bins, 12 if phase == "student" else 0, **fields).train()
    wrapped, total = common.wrap_ddp(model, CPU), torch.zeros(())
    for micro in range(grad_accum):
        if wrapped is not model:
            wrapped.require_backward_grad_sync = micro == grad_accum - 1
        loss, _ = compute_loss(wrapped, get_batch(data, "train", 3, config, micro), 3, config)
        (loss * common.world_size()).backward()
        total = total + loss.detach()
    if common.world_size() > 1:
        torch.distributed.all_reduce(total)
    if phase == "student":
        model.follow(torch.tensor(0.0))
    followed = torch.cat([model.bias, model.usage, model.balance]) if phase == "student" else torch.zeros(1)
    return total, torch.cat([p.grad.flatten() for p in model.parameters()]), followed


@pytest.mark.parametrize("phase", ["pretrain", "teacher", "student"])
def test_micro_batches_and_processes_add_up_to_the_whole_batch(folder, pair, phase):
    loss, gradient, followed = loss_and_gradient(folder, phase, 8, 1)
    answers = [loss_and_gradient(folder, phase, 4, 2), loss_and_gradient(folder, phase, 2, 4),
               *pair.run(loss_and_gradient, folder, phase, 4, 1), *pair.run(loss_and_gradient, folder, phase, 2, 2)]
    assert gradient.abs().max() > 1e-3 and loss > 0.1
    for answer in answers:
        assert float(answer[0]) == pytest.approx(float(loss), rel=1e-5)
        assert (answer[1] - gradient).norm() < 1e-5 * gradient.norm()
        close(answer[2], followed, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("phase", ["pretrain", "teacher", "student"])
def test_losses_are_float32_under_autocast(data, phase, dtype):
    data = with_teacher(data) if phase == "student" else data
    config = settings(phase=phase, batch_size=32, use_gradnorm=phase == "student")
    exact, model = [], model_of(phase, data.molecules.bins, 12 if phase == "student" else 0).train()
    for precision in (torch.float32, dtype):
        with common.autocast(CPU, precision):
            loss, parts = compute_loss(model, get_batch(data, "train", 0, config), 0, config)
        assert loss.dtype == torch.float32 and loss.dim() == 0 and loss.isfinite()
        model.zero_grad()
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        exact.append(float(loss.detach()))
    assert exact[1] == pytest.approx(exact[0], rel=0.03) and exact[1] != exact[0]


def test_spectra_of_1e4_in_float16_have_a_finite_loss():
    y = (spectra(4, 30) * 1e4).half().clamp(max=65000).requires_grad_()
    h = (torch.randn(4, 6) * 1e4).half().requires_grad_()
    batch = {"target": spectra(4, 30, seed=1).float(), "count": 4, "micro": 0, "temperature": 4.0,
             "taught": spectra(4, 30, seed=2).float(), "feature": torch.randn(4, 6), "confidence": torch.ones(4),
             "rivals": spectra(9, 30, seed=3).float(), "are_own": torch.zeros(4, 9, dtype=torch.bool)}
    loss, _ = compute_loss(Says(y.float(), h), batch, 0, settings())
    loss.backward()
    assert loss.isfinite() and y.grad.isfinite().all() and h.grad.isfinite().all() and h.grad.abs().max() > 0
    with torch.autocast("cpu", torch.float16):
        logits = (torch.randn(5, MASKED) * 1e4).half().requires_grad_()
        asked = {"kinds": torch.arange(5), "count": 5}
        loss, _ = compute_loss(Says(logits, None), asked, 0, settings(phase="pretrain"))
    loss.backward()
    assert loss.isfinite() and loss.dtype == torch.float32 and logits.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------- LDS, GradNorm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_smoothing_follows_the_input_and_is_a_gaussian_of_seven_taps(dtype):
    """Defect 18: the kernel had its own device and dtype."""
    x, smooth = spectra(3, 40).to(dtype), LDS(1.5)
    found, tolerance = smooth(x), {torch.bfloat16: 0.02}.get(dtype, 1e-6)
    assert found.dtype == dtype and found.shape == x.shape
    assert smooth(x.to("meta")).device.type == "meta"
    taps = [math.exp(-0.5 * (k / 1.5) ** 2) for k in range(-3, 4)]
    wanted = torch.zeros(3, 40, dtype=torch.float64)
    for j, k in itertools.product(range(40), range(-3, 4)):
        if 0 <= j + k < 40:
            wanted[:, j] += taps[k + 3] / sum(taps) * x[:, j + k].double()
    close(found.double(), wanted, tolerance)
    x[:, :3] = x[:, -3:] = 0
    close(smooth(x).double().sum(1), x.double().sum(1), 2 * tolerance)


def test_smoothing_takes_a_measured_spectrum_away_from_itself(data):
    root = data.measured().sqrt()
    cosine = (weigh(root) * weigh(LDS(1.5)(root))).sum(1)
    assert 0.5 < cosine.mean() < 0.85 and Config.lds_sigma == 0.0


def gradnorm_run(sizes, steps=300, bad=()):
    """A toy whose losses have gradients of these sizes at h -> the factors after each step."""
    weights, seen = {"hard": 0.5, "soft": 0.5, "feature": 0.05, "rank": 0.1}, []
    model = model_of("student", 20, use_gradnorm=True).train()
    model.chosen.fill_(1)
    for step in range(steps):
        h = (1 + 0.1 * noise(4, 6, seed=step)).requires_grad_()
        parts = {name: size * h.square().sum() for name, size in zip(("hard", "soft", "feature"), sizes)}
        before = model.balance.clone()
        found = train_student.balanced(model, parts, weights, h, 0)
        slopes = torch.tensor([weights[name] * size for name, size in zip(parts, sizes)]) * 2 * float(h.detach().norm())
        assert torch.allclose(model.squares[0], slopes.square(), rtol=1e-4)
        assert found == weights | {name: weights[name] * factor for name, factor in
                                   zip(("hard", "soft", "feature"), before)}
        if step in bad:
            model.squares.fill_(math.nan)
        model.follow(torch.tensor(float(step in bad)))
        seen.append(model.balance.clone())
        assert step not in bad or torch.equal(seen[-1], before)
    return torch.stack(seen)


@pytest.mark.parametrize("sizes", [(1e4, 1, 1), (1, 1e4, 1), (1, 1, 1e-4), (1, 0, 1)])
def test_gradnorm_does_not_run_away(sizes):
    """Defect 2: it ran to 0 and .99 within tens of steps."""
    seen = gradnorm_run(sizes, bad=(3, 50))
    assert seen.isfinite().all() and (seen.sum(1) - 3).abs().max() < 1e-5
    assert seen.min() >= 0.3 / 20.1 and seen.max() <= 30 / 10.2
    assert (seen[-1] - seen[-2]).abs().max() < 0.02


def test_gradnorm_makes_weighted_gradients_alike():
    """At rest the factors undo weight times norm: with unweighted norms they would not."""
    seen = gradnorm_run((1.0, 3.0, 5.0))[-1]
    wanted = 1 / torch.tensor([0.5 * 1.0, 0.5 * 3.0, 0.05 * 5.0])
    close(seen, 3 * wanted / wanted.sum(), 0.01)


# ------------------------------------------------------------------------------------------------------------- teachers
@pytest.fixture(scope="module")
def tutors(data, tmp_path_factory):
    """Two teachers with dropout, in files."""
    folder = tmp_path_factory.mktemp("tutors")
    models = [model_of("teacher", data.molecules.bins, seed=seed, dropout=0.4, input_dropout=0.3) for seed in (1, 2)]
    return models, [saved(model, folder / f"{i}.safetensors") for i, model in enumerate(models)]


@torch.no_grad()
def passes_of(teacher, data, some, number, turn, on, seed=0):
    dropout_on(teacher, on)
    common.seed_step(seed, number, 0, turn)
    root = teacher(data.molecules.inputs(some, True))[0]
    dropout_on(teacher, False)
    return (root / root.amax(1, keepdim=True)).double()


def test_mean_spread_and_features_are_those_of_explicit_passes(data, tutors):
    models, paths = tutors
    rows, config = data.rows["train"], settings(teacher=",".join(paths), passes=4)
    answer = ask_teachers(config, data)
    assert {name: (table.dtype, table.shape) for name, table in answer.items()} == {
        "taught": (torch.float16, (len(data.mass), data.molecules.bins)),
        "feature": (torch.float16, (len(data.mass), 64)), "confidence": (torch.float32, (len(data.mass),))}
    roots = torch.stack([passes_of(models[turn % 2], data, rows, 0, turn, True) for turn in range(4)])
    mean, variance = roots.mean(0), roots.var(0, correction=0).sum(1)
    close(answer["taught"][rows].double(), mean, 1e-3)
    trust = mean.square().sum(1) / (mean.square().sum(1) + variance)
    close(answer["confidence"][rows].double(), trust / trust.mean(), 1e-5)
    assert trust.std() > 0.001 and float(answer["confidence"][rows].mean()) == pytest.approx(1, abs=1e-5)
    assert (roots[0] - roots[2]).abs().max() > 0.05
    with torch.no_grad():                                               # features without dropout
        wanted = torch.cat([model(data.molecules.inputs(rows, True))[1] for model in models], 1)
    close(answer["feature"][rows].float(), wanted, 1e-3)
    again, other = ask_teachers(config, data), ask_teachers(dataclasses.replace(config, seed=1), data)
    assert all(torch.equal(answer[name], again[name]) for name in answer)
    assert not torch.equal(answer["taught"], other["taught"])
    others = np.setdiff1d(np.arange(len(data.mass)), rows)
    assert len(others) and (answer["taught"][others] == 0).all()        # nothing but the training molecules is asked


def test_without_passes_a_teacher_is_asked_once_without_dropout(data, tutors):
    (model, _), (path, _) = tutors
    answer, rows = ask_teachers(settings(teacher=path, passes=0), data), data.rows["train"]
    close(answer["taught"][rows].double(), passes_of(model, data, rows, 0, 0, False), 1e-3)
    close(answer["confidence"][rows], torch.ones(len(rows)), 1e-5)


@pytest.mark.parametrize("passes", [0, 1])
def test_every_teacher_is_asked_at_least_once(data, tutors, passes):
    models, paths = tutors
    answer, rows = ask_teachers(settings(teacher=",".join(paths), passes=passes), data), data.rows["train"]
    if passes == 0:
        wanted = sum(passes_of(model, data, rows, 0, 0, False) for model in models) / 2
    else:
        wanted = sum(passes_of(model, data, rows, 0, turn, True) for turn, model in enumerate(models)) / 2
    close(answer["taught"][rows].double(), wanted, 1e-3)


def test_only_dropout_is_switched_on(data, tutors, monkeypatch):
    """Defect 5: train() would move statistics, and a teacher must stay as it is."""
    (model, _), (path, _) = tutors
    opened, real, during = [], train_student.load_model, []
    monkeypatch.setattr(train_student, "load_model", lambda *given: opened.append(real(*given)) or opened[-1])
    monkeypatch.setattr(Teacher, "forward", lambda self, batch, forward=Teacher.forward: (
        during.append({name for name, module in self.named_modules() if module.training}), forward(self, batch))[1])
    ask_teachers(settings(teacher=path, passes=2), data)
    dropouts = {name for name, module in opened[0].named_modules() if isinstance(module, nn.Dropout)} | {"fingerprint"}
    assert during == [set(), dropouts, dropouts] and len(dropouts) > 4
    assert not any(module.training for module in opened[0].modules())
    after, before = opened[0].state_dict(), model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    for phase in ("pretrain", "teacher", "student"):
        for module in model_of(phase, 50, 7).modules():
            assert not isinstance(module, nn.modules.batchnorm._NormBase), phase


@pytest.mark.parametrize("kind", ["bins", "student", "pretrain"])
def test_what_is_no_teacher_of_these_data_is_refused(data, tutors, tmp_path, capsys, kind):
    bins = data.molecules.bins + (kind == "bins")
    wrong = saved(model_of("teacher" if kind == "bins" else kind, bins), tmp_path / "wrong.safetensors")
    for paths in (wrong, f"{tutors[1][0]},{wrong}"):
        with pytest.raises(SystemExit) as stop:
            ask_teachers(settings(teacher=paths, passes=1), data)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith(f"error: --teacher {wrong}: ")


# ----------------------------------------------------------------------------------------------- evaluation, prediction
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("phase", ["pretrain", "teacher", "student"])
def test_evaluation_leaves_the_mode_and_is_the_same_twice(data, phase, training):
    fields = dict(dropout=0.5, input_dropout=0.5)
    model, config = model_of(phase, data.molecules.bins, **fields).train(training), settings(phase=phase, **fields)
    before = {name: value.clone() for name, value in model.named_buffers()}
    found = evaluate(model, data, config)
    assert model.training == training == all(module.training for module in model.modules())
    torch.manual_seed(5)
    assert evaluate(model, data, config) == found
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_what_evaluation_says(data):
    model, rows = model_of("student", data.molecules.bins), data.rows["val"]
    found, made, library = evaluate(model, data, settings()), predict(model, data.molecules, rows), data.measured()
    weighted = [metrics.weigh(one.double(), 1, 0.5) for one in (made, library)]
    cosines = weighted[0] @ weighted[1].T
    loss = 1 - float(cosines[range(len(rows)), rows].mean())
    better = [int((cosines[i] > cosines[i, row] + 1e-6).sum()) for i, row in enumerate(rows)]
    assert found["loss"] == pytest.approx(loss, abs=1e-5)
    assert found["recall@10"] == pytest.approx(np.mean(np.array(better) < 10), abs=1e-9)
    assert found["error"] == pytest.approx(1 - found["recall@10"] + found["loss"]) and 0 < found["recall@10"] < 1
    assert evaluate(model, data, settings(), "test") != found


def test_evaluation_of_pretraining_is_of_the_hidden_bonds(data):
    model, rows = model_of("pretrain", data.molecules.bins), data.rows["val"]
    found = evaluate(model, data, settings(phase="pretrain"))
    batch = data.molecules.hide_bonds(rows, np.arange(len(rows)), np.random.default_rng(0))
    with torch.no_grad():
        logits = model(batch)[0].double()
    loss = -logits.log_softmax(1)[range(len(logits)), batch["kinds"]].mean()
    wrong = (logits.argmax(1) != batch["kinds"]).double().mean()
    assert found == pytest.approx({"loss": float(loss), "error": float(wrong)}) and 0 < wrong


@pytest.mark.parametrize("phase", ["teacher", "student"])
def test_predictions_are_row_by_row_with_a_base_peak_of_1(data, phase):
    model, molecules = model_of(phase, data.molecules.bins), data.molecules
    rows = np.random.default_rng(0).integers(len(data.mass), size=300)                # more than one batch
    found = predict(model, molecules, rows)
    assert found.dtype == torch.float32 and found.shape == (300, data.molecules.bins)
    assert torch.equal(found.amax(1), torch.ones(300)) and found.min() == 0 and not found.requires_grad
    for place in (0, 100, 255, 256, 299):
        close(predict(model, molecules, rows[place:place + 1])[0], found[place], 1e-5)
        with torch.no_grad():
            root = model(molecules.inputs(rows[place:place + 1], phase == "teacher"))[0][0].double()
        close(found[place].double(), (root / root.max()) ** 2, 1e-5)
    assert predict(model, molecules, rows[:0]).shape == (0, data.molecules.bins)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (predict(model, molecules, rows[:3]) == 0).all()


# ---------------------------------------------------------------------------------------------------------- pretraining
def test_pretraining_learns_and_its_encoder_is_where_a_teacher_begins(data, tmp_path):
    config = settings(phase="pretrain", batch_size=32)
    model = build_model(config, 1).train()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(40):
        loss, _ = compute_loss(model, get_batch(data, "train", step, config), step, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:3]), losses
    path = saved(model, tmp_path / "bonds.safetensors")
    teacher, fresh = (build_model(settings(phase="teacher", init=init), 60) for init in (path, ""))
    wanted = model.encoder.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in teacher.encoder.state_dict().items())
    assert not torch.equal(fresh.encoder.state_dict()["embed.0.weight"], wanted["embed.0.weight"])
    assert teacher.encoder.embed[0].weight.requires_grad
    (tmp_path / "bonds.safetensors").unlink()       # a teacher that is read needs no file of --init
    again = load_model(saved(teacher, tmp_path / "tutor.safetensors"))
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in again.state_dict().items())
    assert not again.training


@pytest.mark.parametrize("kind", ["width", "student"])
def test_an_init_that_does_not_fit_ends_in_one_line(tmp_path, kind):
    wrong = model_of("pretrain", 60, gnn_width=8) if kind == "width" else model_of("student", 60)
    path = saved(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(SystemExit):
        build_model(settings(phase="teacher", init=path), 60)


# ----------------------------------------------------------------------------------------------- schedule, size, guard
def test_learning_rate():
    """Defect 3: it is defined at every step, also beyond the last."""
    config = Config(learning_rate=2e-3, warmup_steps=10, min_lr=0.01)
    rates = [lr_at(step, 110, config) for step in range(111)]
    assert rates[:10] == pytest.approx([2e-3 * (step + 1) / 10 for step in range(10)], rel=1e-12)
    assert rates[10] == max(rates) == 2e-3 and rates[60] == pytest.approx(2e-3 * 0.505)
    assert all(one > other for one, other in zip(rates[10:], rates[11:]))
    assert rates[110] == lr_at(10**6, 110, config) == pytest.approx(2e-5)
    assert lr_at(0, 10, Config(warmup_steps=0)) == Config.learning_rate and lr_at(5, 5, Config(warmup_steps=5)) > 0


def test_models_are_as_large_as_they_say():
    """Defect 15: the small student had 623 M parameters."""
    sizes = {phase: sum(p.numel() for p in build_model(Config(phase=phase), 501).parameters())
             for phase in ("student", "teacher")}
    assert sizes["student"] < 12e6 and round(sizes["student"] / 1e6, 1) == 7.4 and "7.4 M parameters" in Student.__doc__
    assert round(sizes["teacher"] / 1e6) == 5 and "; 5 M parameters" in Teacher.__doc__


@pytest.mark.parametrize("fault", ["gradient", "loss"])
def test_a_bad_step_of_the_student_changes_nothing(data, fault):
    """Defect 6: a finite loss with an infinite gradient."""
    data, config = with_teacher(data), settings(batch_size=16, use_gradnorm=True, bias_rate=0.1)
    model = model_of("student", data.molecules.bins, 12, bias_rate=0.1, use_gradnorm=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    guard, states = common.Guard(model, optimizer, 1.0, log=lambda text: None), []
    for step in range(4):
        loss, parts = compute_loss(model, get_batch(data, "train", step, config), step, config)
        if step == 2:
            loss.register_hook(lambda gradient: gradient * math.inf) if fault == "gradient" else None
            loss = loss * math.inf if fault == "loss" else loss
        guard.backward(loss, parts)
        bad = guard.step(step)
        model.follow(bad)
        assert float(bad) == (step == 2)
        moments = [value.clone() for p in model.parameters() for value in optimizer.state[p].values()]
        followers = [model.bias.clone(), model.usage.clone(), model.balance.clone()]
        states.append([p.detach().clone() for p in model.parameters()] + moments + followers)
    assert all(torch.equal(one, other) for one, other in zip(states[1], states[2]))
    for one, other in (states[0], states[1]), (states[2], states[3]):
        assert not any(torch.equal(one[k], other[k]) for k in (0, -1, -2, -3))


def test_fingerprints_are_a_linear_layer_of_all_entries():
    layer, molecules = train_student.Fingerprint(settings(input_dropout=0.5)).eval(), molecules_of(*ODD)
    batch, dense = molecules.inputs(np.arange(len(ODD)), False), torch.zeros(len(ODD), N_FEATURES)
    ends = [*batch["fp_begin"].tolist(), len(batch["fp_index"])]
    for b, (begin, end) in enumerate(zip(ends, ends[1:])):
        dense[b, batch["fp_index"][begin:end]] = batch["fp_value"][begin:end]
    with torch.no_grad():
        close(layer(batch), dense @ layer.weight.weight + layer.bias, 1e-5)
        assert not torch.equal(layer.train()(batch), layer(batch))
