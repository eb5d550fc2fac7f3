"""train_edl.py piece by piece: the evidential numbers against float64 closed forms and Monte Carlo, the tokenizer, the
batches, the model, its samples, the schedule and the flags of the original guide. Whole runs are in test_run_edl.py.
"""
import copy
import csv
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from edl_tools import assert_same_bits, build_demo, small_config, small_model, smiles_of, train_here, write_data
from rdkit import Chem

import common
import train_edl
from runs import load_tensors, parse_flags, read_file
from train_edl import (BOS, EOS, Config, MolGPT, compute_loss, dirichlet_kl, edl_loss, evaluate, generate, get_batch,
                       get_rows, load_data, log_evidence, lr_at, tokenize, uncertainty)

KINDS, EVIDENCES = ("log", "digamma", "mse"), ("exp", "softplus")
VOCAB = [*train_edl.SPECIALS, "#", "(", ")", "1", "=", "C", "Cl", "N", "O", "c", "n"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The data of a dry run."""
    return load_data(Config(data_dir=str(build_demo(tmp_path_factory.mktemp("demo")))))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def draw_alpha(generator, n, K, low, high):
    """alpha = 1 + e, the log of the evidence e even between low and high."""
    return 1 + torch.empty(n, K).uniform_(low, high, generator=generator).exp()


# ---------------------------------------------------------------------------------------------------- KL of Dirichlets
def closed_kl(alpha):
    """The formula as it stands in every paper, in the precision of alpha."""
    K, S = alpha.shape[-1], alpha.sum(-1)
    return torch.lgamma(S) - math.lgamma(K) - torch.lgamma(alpha).sum(-1) + (
        (alpha - 1) * (torch.digamma(alpha) - torch.digamma(S)[..., None])).sum(-1)


def test_kl_of_known_vectors():
    found = dirichlet_kl(torch.tensor([[2.0, 2, 2, 2], [100, 3, 2, 1]]))
    assert [f"{kl:.4f}" for kl in found.tolist()] == ["0.3620", "7.7889"]


@pytest.mark.parametrize("K, relative", [(2, 4e-6), (4, 3e-6), (28, 1e-6), (64, 1e-6)])
def test_kl_of_large_evidence_keeps_its_digits_in_float32(generator, K, relative):
    alpha = draw_alpha(generator, 20_000, K, -15, 15)                   # up to 3e6
    exact = closed_kl(alpha.double())
    large = exact > 1
    error = ((dirichlet_kl(alpha) - exact).abs() / exact)[large]
    naive = ((closed_kl(alpha) - exact).abs() / exact)[large]
    assert error.max() < relative and naive.max() > 0.01, (error.max(), naive.max())


@pytest.mark.parametrize("K", [2, 4, 28, 64])
@pytest.mark.parametrize("high", [-10.0, 0.0, 2.0, 5.0, 10.0])
def test_kl_is_near_the_closed_form_and_never_negative(generator, K, high):
    alpha = draw_alpha(generator, 5_000, K, -15, high)
    exact = closed_kl(alpha.double())
    found = dirichlet_kl(alpha)
    assert (found >= 0).all() and ((found - exact).abs() < 2.5e-6 * K + 1e-6 * exact).all()


@pytest.mark.parametrize("K", [2, 3, 26, 28, 64, 600])
def test_kl_of_no_evidence_is_nothing(K):
    assert dirichlet_kl(torch.ones(3, K)).abs().max() < 1e-6 * K


@pytest.mark.parametrize("K", [2, 28])
def test_gradient_of_the_kl_is_the_trigamma_identity(generator, K):
    alpha = torch.cat([draw_alpha(generator, 2_000, K, -3, high) for high in (1, 4, 8, 15)]).requires_grad_()
    dirichlet_kl(alpha).sum().backward()
    exact = alpha.detach().double()
    S = exact.sum(-1, keepdim=True)
    wanted = (exact - 1) * torch.polygamma(1, exact) - (S - K) * torch.polygamma(1, S)
    assert (alpha.grad - wanted).abs().max() < 1e-6                     # of gradients up to 1
    assert closed_kl(exact).min() > 1e-4                                # nearer to 0 the clamp may take the gradient


# ------------------------------------------------------------------------------------------------------ evidential loss
def closed_alpha(logits, evidence):
    return 1 + (logits.clamp(-15, 15).exp() if evidence == "exp" else torch.log1p(logits.exp()))


def closed_risk(logits, targets, kind, evidence):
    """Per row, from sums over one-hot vectors as Sensoy et al. write them."""
    alpha = closed_alpha(logits, evidence)
    S, y = alpha.sum(-1, keepdim=True), F.one_hot(targets, logits.shape[-1]).to(logits.dtype)
    p = alpha / S
    return {"log": (y * (S.log() - alpha.log())).sum(-1),
            "digamma": (y * (torch.digamma(S) - torch.digamma(alpha))).sum(-1),
            "mse": ((y - p) ** 2 + p * (1 - p) / (S + 1)).sum(-1)}[kind]


def closed_loss(logits, targets, kind, evidence, kl_weight):
    alpha, y = closed_alpha(logits, evidence), F.one_hot(targets, logits.shape[-1]).to(logits.dtype)
    return (closed_risk(logits, targets, kind, evidence) + kl_weight * closed_kl(y + (1 - y) * alpha)).mean()


def some_logits(generator, n=40, K=7, scale=3.0):
    """Logits that float64 and float32 hold alike, and targets."""
    return torch.randn(n, K, generator=generator) * scale, torch.randint(0, K, (n,), generator=generator)


@pytest.mark.parametrize("evidence", EVIDENCES)
@pytest.mark.parametrize("kind", KINDS)
class TestLoss:
    @pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
    def test_value_and_gradient_are_those_of_the_closed_form(self, generator, kind, evidence, kl_weight):
        logits, targets = some_logits(generator)
        found, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
        loss, parts = edl_loss(found, targets, kind, evidence, kl_weight)
        wanted = closed_loss(exact, targets, kind, evidence, kl_weight)
        assert loss.item() == pytest.approx(wanted.item(), rel=2e-6)
        risk = closed_risk(exact, targets, kind, evidence).mean()
        assert parts["risk"].item() == pytest.approx(risk.item(), rel=2e-6)
        loss.backward()
        wanted.backward()
        assert (found.grad - exact.grad).abs().max() < 2e-6 * exact.grad.abs().max()

    def test_gradient_of_the_closed_form_is_its_finite_difference(self, generator, kind, evidence):
        logits, targets = some_logits(generator, n=3, K=4, scale=1.0)
        assert torch.autograd.gradcheck(lambda x: closed_loss(x, targets, kind, evidence, 0.5),
                                        logits.double().requires_grad_(), rtol=1e-5, atol=1e-8)

    def test_parts(self, generator, kind, evidence):
        logits, targets = some_logits(generator)
        alpha, y = closed_alpha(logits.double(), evidence), F.one_hot(targets, 7)
        loss, parts = edl_loss(logits, targets, kind, evidence, 0.25)
        assert list(parts) == ["risk", "kl", "nll", "vacuity"]
        assert parts["kl"].item() == pytest.approx(closed_kl(y + (1 - y) * alpha).mean().item(), rel=3e-6)
        assert parts["vacuity"].item() == pytest.approx((7 / alpha.sum(-1)).mean().item(), rel=1e-6)
        p = (alpha - 1) / (alpha - 1).sum(-1, keepdim=True)
        assert parts["nll"].item() == pytest.approx(-(y * p.log()).sum(-1).mean().item(), rel=1e-6)
        assert loss.item() == pytest.approx((parts["risk"] + 0.25 * parts["kl"]).item(), rel=1e-6)

    def test_without_a_kl_weight_there_is_no_kl(self, generator, kind, evidence):
        logits, targets = some_logits(generator)
        results = []
        for kl_weight in (None, 0.0):
            x = logits.clone().requires_grad_()
            loss, parts = edl_loss(x, targets, kind, evidence, kl_weight)
            loss.backward()
            results.append((loss.detach(), x.grad, parts))
        (loss, gradient, parts), (other, other_gradient, with_kl) = results
        assert torch.equal(loss, other) and torch.equal(gradient, other_gradient)
        assert list(parts) == ["nll", "vacuity"] and list(with_kl) == ["risk", "kl", "nll", "vacuity"]

    def test_mask_and_count(self, generator, kind, evidence):
        logits, targets = some_logits(generator)
        mask = torch.rand(40, generator=generator) < 0.6
        x = logits.clone().requires_grad_()
        loss, parts = edl_loss(x, targets, kind, evidence, 0.5, mask, count=100)
        loss.backward()
        kept, kept_parts = edl_loss(logits[mask], targets[mask], kind, evidence, 0.5)       # over their number
        n = int(mask.sum())
        assert loss.item() * 100 == pytest.approx(kept.item() * n, rel=1e-6)
        assert all(parts[name].item() * 100 == pytest.approx(kept_parts[name].item() * n, rel=1e-6) for name in parts)
        assert (x.grad[~mask] == 0).all() and (x.grad[mask] != 0).any(-1).all()
        assert edl_loss(logits, targets, kind, evidence, 0.5, mask)[0].item() == pytest.approx(kept.item(), rel=1e-6)

    def test_bfloat16_logits_and_autocast_change_nothing(self, generator, kind, evidence):
        logits, targets = some_logits(generator, scale=5.0)
        low = logits.bfloat16()
        wanted = edl_loss(low.float(), targets, kind, evidence, 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            found = [edl_loss(low, targets, kind, evidence, 1.0), edl_loss(low.float(), targets, kind, evidence, 1.0)]
        for loss, parts in found:
            assert loss.dtype == torch.float32 and torch.equal(loss, wanted[0])
            assert all(torch.equal(part, wanted[1][name]) for name, part in parts.items())
            assert {part.dtype for part in parts.values()} == {torch.float32}

    @pytest.mark.parametrize("kl_weight", [None, 1.0])
    def test_extreme_logits_stay_finite(self, kind, evidence, kl_weight):
        sizes = [-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4]
        rows = torch.tensor([[a, b, c] for a in sizes for b in sizes for c in sizes])
        for target in range(3):
            x = rows.clone().requires_grad_()
            loss, parts = edl_loss(x, torch.full((len(rows),), target), kind, evidence, kl_weight)
            loss.backward()
            assert loss.isfinite() and x.grad.isfinite().all() and all(part.isfinite() for part in parts.values())


@pytest.mark.parametrize("kind", KINDS)
def test_risks_are_expectations_over_the_dirichlet(kind):
    """log is -log E[p_c], digamma E[-log p_c], mse E[|y - p|^2]."""
    torch.manual_seed(0)
    logits = torch.tensor([[0.5, -1.0, 2.0, 0.0], [-2.0, -2.0, -3.0, 1.0], [3.0, 2.0, 1.0, 0.0]])
    for row, target in zip(logits, torch.tensor([0, 1, 2])):
        p = torch.distributions.Dirichlet(1 + row.double().exp()).sample((200_000,))
        y = F.one_hot(target, 4)
        draws = {"log": p[:, target], "digamma": -p[:, target].log(), "mse": ((y - p) ** 2).sum(-1)}[kind]
        mean, noise = draws.mean(), draws.std() / len(draws) ** 0.5
        found = edl_loss(row[None], target[None], kind, "exp", None)[0].double()
        assert (mean - (torch.exp(-found) if kind == "log" else found)).abs() < 5 * noise + 1e-6


def test_an_unknown_kind_is_an_error(generator):
    with pytest.raises(AssertionError, match="mle"):
        edl_loss(*some_logits(generator), "mle", "exp", None)


def test_a_plain_model_has_the_cross_entropy(demo):
    config = small_config(use_edl=False)
    model, batch = small_model(demo.vocab, demo.block, use_edl=False), get_batch(demo, "train", 0, config)
    loss, parts = compute_loss(model, batch, 0, config)
    mask = batch["mask"]
    wanted = F.cross_entropy(model(batch["tokens"])[mask], batch["targets"][mask])
    assert batch["count"] == mask.sum() and loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert list(parts) == ["nll"] and parts["nll"] is loss


def test_the_kl_grows_with_the_epochs(demo):
    config = small_config(edl_kl_weight=0.5, edl_annealing_step=10.0)
    model, batch = small_model(demo.vocab, demo.block), get_batch(demo, "train", 0, config)

    def weight(epoch, config):
        loss, parts = compute_loss(model, batch | {"epoch": epoch}, 0, config)
        return ((loss - parts["risk"]) / parts["kl"]).item()
    assert [weight(epoch, config) for epoch in (0, 2.5, 10, 30)] == pytest.approx([0, 0.125, 0.5, 0.5], rel=1e-5)
    assert weight(0, small_config(edl_kl_weight=0.5, edl_annealing_step=0.0)) == pytest.approx(0.5, rel=1e-5)
    assert "kl" not in compute_loss(model, batch, 0, small_config(edl_kl_weight=0.0))[1]


# ---------------------------------------------------------------------------------------------------------- uncertainty
def test_uncertainty_against_monte_carlo():
    torch.manual_seed(0)
    for alpha in ([1.0, 1, 1], [30.0, 2, 5], [1.01, 400, 1.5, 80], [1e4, 2e4, 1.0]):
        alpha = torch.tensor(alpha)
        p = torch.distributions.Dirichlet(alpha.double()).sample((200_000,))
        found = {name: value.item() for name, value in uncertainty(alpha).items()}
        entropy = -torch.special.xlogy(p, p).sum(-1)
        mean = p.mean(0)
        assert found["aleatoric"] == pytest.approx(entropy.mean().item(), abs=5 * entropy.std().item() / 200_000 ** 0.5)
        assert found["total"] == pytest.approx(-torch.special.xlogy(mean, mean).sum().item(), abs=5e-3)
        assert found["vacuity"] == pytest.approx(len(alpha) / alpha.sum().item(), rel=1e-6)


@pytest.mark.parametrize("high", [-5.0, 0.0, 5.0, 10.0, 15.0])
def test_uncertainty_in_its_ranges_and_near_float64(generator, high):
    alpha = draw_alpha(generator, 5_000, 28, -15, high)
    found, exact = uncertainty(alpha), alpha.double()
    S = exact.sum(-1, keepdim=True)
    p = exact / S
    total = -(p * p.log()).sum(-1)
    aleatoric = (p * (torch.digamma(S + 1) - torch.digamma(exact + 1))).sum(-1)
    assert ((found["vacuity"] > 0) & (found["vacuity"] <= 1)).all() and (found["epistemic"] >= 0).all()
    assert (found["total"] - total).abs().max() < 2e-6 and (found["aleatoric"] - aleatoric).abs().max() < 4e-6
    assert (found["epistemic"] - (total - aleatoric)).abs().max() < 4e-6
    assert (found["total"] - found["aleatoric"] - found["epistemic"]).abs().max() < 4e-6
    assert all(value.dtype == torch.float32 and value.shape == (5_000,) for value in found.values())
    apart = (p * (torch.digamma(exact + 1) - exact.log())).sum(-1) - (torch.digamma(S + 1) - S.log())[:, 0]
    assert ((found["epistemic"] - apart).abs() / apart).max() < 2e-6       # also where the entropies agree to 1e-7


def test_no_evidence_is_all_vacuity():
    found = uncertainty(torch.ones(2, 5, 28))
    assert (found["vacuity"] == 1).all() and (found["total"] - math.log(28)).abs().max() < 1e-6
    expected_entropy = (torch.digamma(torch.tensor(29.0)) - torch.digamma(torch.tensor(2.0))).item()
    assert (found["aleatoric"] - expected_entropy).abs().max() < 2e-6


# ------------------------------------------------------------------------------------------------------------ tokenizer
DRUGS = ["CC(=O)Oc1ccccc1C(=O)O", "C/C=C\\C", "F/C(Cl)=C(\\F)Br", "[13CH4]", "C[C@@H](N)C(=O)[O-]", "[Na+].[Cl-]",
         "C%12CCCCC%12", "c1ccc2[nH]ccc2c1", "O=[N+]([O-])c1ccccc1", "[2H]C([2H])([2H])S(C)=O", "CN1CCC[C@H]1c1cccnc1",
         "B(O)(O)c1ccc(I)cc1P", "C#N", "C:1:C:C:C:C:C1", "[Cu+2]", "C$C", "[C@?](F)(Cl)(Br)*", "", "C1CC%10CC1CC%10",
         "C~N", "[se]1cccc1", "CC>>CO"]


@pytest.mark.parametrize("smiles, tokens", [
    ("CBrClC", ["C", "Br", "Cl", "C"]), ("[nH]1cc[13C@@H]1", ["[nH]", "1", "c", "c", "[13C@@H]", "1"]),
    ("C%12N%0123", ["C", "%12", "N", "%01", "2", "3"]), ("C/C=C\\C", ["C", "/", "C", "=", "C", "\\", "C"]),
    ("BCNOSPFI", list("BCNOSPFI")), ("bcnosp", list("bcnosp")), ("", [])])
def test_tokens(smiles, tokens):
    assert tokenize(smiles) == tokens


def test_tokens_join_to_the_smiles_however_it_is_written(demo):
    written = DRUGS + [smiles_of(demo, row) for row in range(0, 500, 10)]
    for i, smiles in enumerate(written):
        molecule = Chem.MolFromSmiles(smiles)
        if molecule:
            written += Chem.MolToRandomSmilesVect(molecule, 3, randomSeed=i + 1) if i < len(DRUGS) + 50 else []
    assert len(written) > 200
    for smiles in written:
        assert "".join(tokenize(smiles)) == smiles


@pytest.mark.parametrize("smiles, position, character", [
    ("CC!C", 3, "!"), ("CC\u0661C", 3, "\u0661"), ("C\u00b2", 2, "\u00b2"), ("C\u212b", 2, "\u212b"), ("X", 1, "X"),
    ("CC(=O)Q", 7, "Q"), ("c1ccccc1 ", 9, " "), ("CC\n", 3, "\n"), ("C[NH", 2, "["), ("C%1", 2, "%"), ("CQC", 2, "Q"),
    ("A", 1, "A"), ("Al", 1, "A")])
def test_what_is_no_token_is_named_with_its_place(smiles, position, character):
    with pytest.raises(ValueError) as error:
        tokenize(smiles)
    assert f"character {position} ({character!r})" in str(error.value)


# ----------------------------------------------------------------------------------------------------------------- data
def test_a_row_is_bos_tokens_eos(tmp_path):
    train = ["CCO", "C/C=C\\C", "N"]
    data = load_data(Config(data_dir=str(write_data(tmp_path / "set", train, ["CO"], ["O"]))))
    assert [smiles_of(data, row) for row in range(5)] == [*train, "CO", "O"]
    assert data.length.tolist() == [4, 8, 2, 3, 2] and data.block == 8 and data.table.dtype == torch.uint8
    assert {name: rows.tolist() for name, rows in data.rows.items()} == {"train": [0, 1, 2], "val": [3], "test": [4]}
    assert [data.vocab[i] for i in data.table[:8].tolist()] == ["<bos>", "C", "C", "O", "<eos>", "<bos>", "C", "/"]


def test_large_vocabularies_are_kept(tmp_path):
    isotopes = [f"[{i}C]" for i in range(1, 300)]
    folder = write_data(tmp_path / "set", ["CC"], ["C"], vocab=[*train_edl.SPECIALS, "C", *isotopes])
    np.save(folder / "tokens.npy", np.array([2, 301, 250], np.uint16))
    np.save(folder / "offsets.npy", np.array([0, 2, 3]))
    data = load_data(Config(data_dir=str(folder)))
    assert [smiles_of(data, 0), smiles_of(data, 1)] == ["C[299C]", "[248C]"] and data.table.dtype == torch.int16


def test_targets_are_the_inputs_shifted_and_end_in_eos(demo):
    config = small_config(batch_size=32)
    batch = get_batch(demo, "train", 3, config)
    tokens, targets, mask = batch["tokens"], batch["targets"], batch["mask"]
    lengths = mask.sum(1)
    assert tokens.shape == targets.shape == mask.shape == (32, lengths.max())
    assert (tokens.dtype, targets.dtype, mask.dtype) == (torch.int64, torch.int64, torch.bool)
    assert (tokens[:, 0] == BOS).all() and batch["count"] == mask.sum()
    assert torch.equal(mask, torch.arange(mask.shape[1]) < lengths[:, None])
    for row in range(32):
        n = lengths[row]
        assert torch.equal(tokens[row, 1:n], targets[row, :n - 1]) and targets[row, n - 1] == EOS
        assert (targets[row, :n - 1] > EOS).all() and (tokens[row, n:] == BOS).all()


def texts(batch):
    """The rows of a batch, as tuples of their targets."""
    return [tuple(row[keep].tolist()) for row, keep in zip(batch["targets"], batch["mask"])]


def test_a_batch_is_a_function_of_seed_and_step(demo):
    config = small_config(batch_size=16)
    there = [get_batch(demo, "train", step, config) for step in range(60)]
    train_edl.bucketed_rows.cache_clear()
    for step in (41, 3, 59, 0):
        again = get_batch(demo, "train", step, config)
        assert all(torch.equal(again[name], there[step][name]) for name in ("tokens", "targets", "mask"))
        assert (again["count"], again["epoch"]) == (there[step]["count"], step * 16 / len(demo.rows["train"]))
    assert texts(get_batch(demo, "train", 3, small_config(batch_size=16, seed=1))) != texts(there[3])
    assert texts(there[0]) != texts(there[1])


@pytest.mark.parametrize("ranks, accum", [(1, 4), (4, 1), (2, 2), (2, 4)])
def test_micro_batches_of_all_ranks_are_the_global_batch(demo, monkeypatch, ranks, accum):
    for step in (0, 7, 40):
        whole = get_batch(demo, "train", step, small_config(batch_size=32))
        config, parts = small_config(batch_size=32 // ranks // accum, grad_accum=accum), []
        for rank in range(ranks):
            with monkeypatch.context() as patch:
                for module in (train_edl, common):
                    patch.setattr(module, "world_size", lambda: ranks)
                    patch.setattr(module, "rank", lambda: rank)
                parts += [get_batch(demo, "train", step, config, micro) for micro in range(accum)]
        assert [text for part in parts for text in texts(part)] == texts(whole)
        assert {part["count"] for part in parts} == {whole["count"]} == {sum(int(part["mask"].sum()) for part in parts)}
        assert {part["epoch"] for part in parts} == {whole["epoch"]}


@pytest.mark.parametrize("batch_size", [16, 29, 449, 500, 1000])
def test_each_row_once_per_epoch(demo, batch_size):
    """After any whole number of windows each row has come as often as every other, or once more."""
    n = len(demo.rows["train"])
    size = max(1, min(train_edl.WINDOW, n // batch_size))
    seen = Counter()
    for window in range(5):
        rows = train_edl.bucketed_rows(demo, "train", batch_size, 0, window)
        assert rows.shape == (size, batch_size)
        seen.update(rows.ravel().tolist())
        epochs = (window + 1) * size * batch_size / n
        assert set(seen) <= set(demo.rows["train"].tolist())
        assert all(math.floor(epochs) <= seen[row] <= math.ceil(epochs) for row in demo.rows["train"].tolist())


def test_batches_of_similar_lengths_have_few_pads(demo):
    def pads(batches):
        lengths = [demo.length[rows] for rows in batches]
        return 1 - sum(x.sum() for x in lengths) / sum(x.max() * len(x) for x in lengths)
    ours = pads([rows for window in range(5) for rows in train_edl.bucketed_rows(demo, "train", 16, 0, window)])
    rows, steps = demo.rows["train"], range(5 * train_edl.WINDOW)
    shuffled = pads([rows[common.global_rows(len(rows), 16, 0, step)] for step in steps])
    assert ours < 0.08 and shuffled > 0.15 and ours < shuffled / 2.5, (ours, shuffled)
    masks = [get_batch(demo, "train", step, small_config(batch_size=16))["mask"] for step in steps]
    assert 1 - sum(m.sum() for m in masks) / sum(m.numel() for m in masks) == pytest.approx(ours, abs=1e-6)


def test_batches_do_not_come_sorted(demo):
    longest = [get_batch(demo, "train", step, small_config(batch_size=16))["mask"].shape[1] for step in range(16)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_fewer_rows_than_a_batch(tmp_path):
    data = load_data(Config(data_dir=str(write_data(tmp_path / "set", ["C", "CC", "CCO"], ["CN"]))))
    seen = Counter()
    for step in range(6):                                               # 6 x 8 rows are 16 epochs of 3
        batch = get_batch(data, "train", step, small_config(batch_size=8))
        assert len(batch["tokens"]) == 8 and batch["count"] == batch["mask"].sum()
        seen.update(texts(batch))
    assert sorted(seen.values()) == [16, 16, 16]


@pytest.mark.parametrize("broken", ["missing folder", "no meta", "no val", "bad json"])
def test_what_is_no_data_is_refused(tmp_path, capsys, broken):
    folder = write_data(tmp_path / "set", ["CC", "CO"], [] if broken == "no val" else ["C"])
    if broken == "no meta":
        (folder / "meta.json").unlink()
    if broken == "bad json":
        (folder / "meta.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        load_data(Config(data_dir=str(tmp_path / "nowhere" if broken == "missing folder" else folder)))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: --data_dir") and said.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------- model
def test_number_of_parameters():
    def count(**fields):
        with torch.device("meta"):
            return sum(p.numel() for p in MolGPT(Config(**fields), ["x"] * 28, 55).parameters())
    assert count() == 6_347_008
    for n_layer, D in (6, 128), (12, 512), (2, 32):
        qkv, out, up, down, norms = 3 * D * D + 3 * D, D * D + D, 4 * D * D + 4 * D, 4 * D * D + D, 4 * D
        around = 28 * D + 55 * D + 2 * D + 28 * D                       # tokens, positions, the last norm, the head
        assert count(n_layer=n_layer, n_embd=D) == n_layer * (qkv + out + up + down + norms) + around


@pytest.fixture(scope="module")
def model():
    return small_model(VOCAB, block=24)


@torch.no_grad()
def test_step_by_step_with_a_cache_is_the_full_forward(model, generator):
    tokens = torch.randint(2, len(VOCAB), (5, 24), generator=generator)
    tokens[:, 0] = BOS
    full = model(tokens)
    assert full.std() > 0.5
    for prompt in (1, 2, 7, 23, 24):
        cache = model.cache(5, 24).fill_(math.nan)      # what was not written is not read
        logits = [model(tokens[:, :prompt], (cache, 0))]
        logits += [model(tokens[:, t:t + 1], (cache, t)) for t in range(prompt, 24)]
        assert (torch.cat(logits, 1) - full).abs().max() < 1e-5


@pytest.mark.parametrize("T", [1, 7, 128, 129])
def test_attention_of_short_rows_is_that_of_sdpa(T, generator):
    """On a CPU in float32 up to 128 positions are three products; longer rows, and float64, go to SDPA."""
    layer = train_edl.Attention(small_config(n_head=4, n_embd=32))
    x, exact = torch.randn(3, T, 32, generator=generator, requires_grad=True), copy.deepcopy(layer).double()
    y, reference = layer(x), exact(x.double())
    assert reference.std() > 0.1 and (y - reference).abs().max() < 1e-6
    seed = torch.randn(y.shape, generator=generator)
    mine, = torch.autograd.grad((y * seed).sum(), x)
    its, = torch.autograd.grad((reference * seed.double()).sum(), x)
    assert its.std() > 0.05 and (mine - its).abs().max() < 1e-5


@torch.no_grad()
def test_later_tokens_and_pads_change_nothing_before(model, demo, generator):
    tokens = torch.randint(2, len(VOCAB), (3, 24), generator=generator)
    other = tokens.clone()
    other[:, 15] = (other[:, 15] - 2 + 1) % (len(VOCAB) - 2) + 2
    before, after = model(tokens), model(other)
    assert (before[:, :15] - after[:, :15]).abs().max() < 1e-6 and (before[:, 15:] - after[:, 15:]).abs().max() > 1e-2
    wide = small_model(demo.vocab, demo.block)
    rows = demo.rows["train"][np.argsort(demo.length[demo.rows["train"]])[[0, 100, 300, -1]]]       # of many lengths
    batch = get_rows(demo, rows)
    logits = wide(batch["tokens"])
    for i, row in enumerate(rows):
        alone = wide(get_rows(demo, rows[i:i + 1])["tokens"])[0]
        assert (logits[i, :demo.length[row]] - alone).abs().max() < 1e-5


@pytest.mark.parametrize("use_edl", [True, False])
def test_micro_batches_add_up_to_the_gradient_of_the_whole(demo, use_edl):
    model, gradients = small_model(demo.vocab, demo.block, scale=3.0), []
    for batch_size, accum in (8, 1), (4, 2), (2, 4):
        config = small_config(batch_size=batch_size, grad_accum=accum, use_edl=use_edl, edl_kl_weight=0.1)
        model.zero_grad()
        batches = [get_batch(demo, "train", 5, config, micro) for micro in range(accum)]
        sum(compute_loss(model, batch, 5, config)[0] for batch in batches).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    whole = gradients[0]
    for other in gradients[1:]:
        assert (other - whole).abs().max() < 1e-6 * whole.abs().max() and (other - whole).norm() < 1e-6 * whole.norm()


def test_dropout_is_on_in_training_only(demo):
    model = small_model(demo.vocab, demo.block, dropout=0.5)
    tokens = get_batch(demo, "train", 0, small_config())["tokens"]
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    torch.manual_seed(0)
    one = model(tokens)
    torch.manual_seed(0)
    assert torch.equal(one, model(tokens)) and not torch.equal(one, model(tokens))


# -------------------------------------------------------------------------------------------------------------- samples
class FixedLogits(torch.nn.Module):
    """A stand-in for MolGPT: the same logits at every position."""
    def __init__(self, logits, evidence, block=2):
        super().__init__()
        self.head, self.blocks, self.block, self.evidence = torch.nn.Linear(1, 1), [], block, evidence
        self.vocab, self.logits = ["<bos>", "<eos>", *(f"[{i}C]" for i in range(2, len(logits)))], logits

    def cache(self, rows, positions):
        return torch.zeros(0, 2, rows, 1, positions, 1)

    def forward(self, tokens, past=None, begin=None, props=None):
        return self.logits.expand(*tokens.shape, -1)


def first_tokens(made, vocab):
    """How often each token came first, EOS too."""
    counts = Counter((tokenize(molecule["smiles"]) or ["<eos>"])[0] for molecule in made)
    return torch.tensor([float(counts[token]) for token in vocab])


@pytest.mark.parametrize("evidence", ["exp", "softplus", "none"])
def test_tokens_are_drawn_from_the_evidence_itself(evidence):
    logits = torch.tensor([0.0, 1.5, -1.0, 2.0, 0.3, -3.0])
    e = F.softplus(logits) if evidence == "softplus" else logits.exp()
    assert (log_evidence(logits, evidence).exp() - e).abs().max() < 1e-6
    p = e.index_fill(0, torch.tensor([BOS]), 0)
    p = p / p.sum()
    made = generate(FixedLogits(logits, evidence), 40_000, batch_size=40_000)
    found = first_tokens(made, FixedLogits(logits, evidence).vocab) / 40_000
    assert ((found - p).abs() < 5 * (p * (1 - p) / 40_000).sqrt() + 1e-9).all() and found[BOS] == 0
    nll = -(e / e.sum()).log()                                          # the model's own, BOS in the sum
    ended = [molecule["nll"] for molecule in made if molecule["tokens"] == 1]
    assert ended and max(abs(x - nll[EOS].item()) for x in ended) < 1e-5


def test_no_prior_leaks_into_sure_tokens():
    """99.9 % of the evidence is on one token: alpha / S would take (K - 1) / S from it on top of that, we nothing."""
    K, sure = 28, 5
    e = torch.full((K,), 1 / 27).index_fill(0, torch.tensor([sure]), 999.0)
    alpha, p = 1 + e, log_evidence(e.log(), "exp").softmax(-1)
    S = alpha.sum()
    assert p[sure].item() == pytest.approx(0.999, abs=1e-6)
    assert (p[sure] - alpha[sure] / S).item() == pytest.approx(((K - 1) / S).item(), rel=2e-3)      # 2.6 % per token
    model = FixedLogits(e.log(), "exp")
    missed = 1 - first_tokens(generate(model, 40_000, batch_size=40_000), model.vocab)[sure].item() / 40_000
    assert abs(missed - 0.001) < 5 * (0.001 / 40_000) ** 0.5


@pytest.mark.parametrize("prompt", [[], [7], [7, 10, 3]])
def test_samples_keep_their_promises(model, prompt):
    made = generate(model, 60, prompt=prompt, seed=3, batch_size=25)
    assert made == generate(model, 60, prompt=prompt, seed=3, batch_size=25) and len(made) == 60
    assert made != generate(model, 60, prompt=prompt, seed=4, batch_size=25)
    start = "".join(VOCAB[i] for i in prompt)
    for molecule in made:
        tokens = tokenize(molecule["smiles"])                           # raises if <bos> or <eos> is in it
        assert molecule["smiles"].startswith(start)
        assert molecule["tokens"] == len(tokens) - len(prompt) + molecule["finished"] <= model.block - len(prompt)
        assert molecule["finished"] or len(tokens) == model.block
        assert 0 < molecule["vacuity"] <= molecule["max_vacuity"] <= 1
        assert 0 <= molecule["epistemic"] <= molecule["max_epistemic"]


@torch.no_grad()
def full_forward(model, molecule):
    """Logits that the full forward gives for each token of a sample, and these tokens."""
    ids = [model.vocab.index(token) for token in tokenize(molecule["smiles"])] + [EOS] * molecule["finished"]
    logits = model(torch.tensor([[BOS, *ids[:-1]]]))[0]
    return logits[-molecule["tokens"]:], torch.tensor(ids[-molecule["tokens"]:])


@pytest.mark.parametrize("fields", [{}, {"edl_evidence": "softplus"}, {"use_edl": False}],
                         ids=["exp", "softplus", "plain"])
@pytest.mark.parametrize("prompt, temperature, top_k", [([], 1.0, 0), ([7, 7], 0.5, 0), ([], 2.0, 4)])
def test_scores_of_a_sample_are_those_of_the_full_forward(fields, prompt, temperature, top_k):
    model = small_model(VOCAB, 24, **fields)
    for molecule in generate(model, 20, temperature, top_k, prompt, seed=1):
        logits, ids = full_forward(model, molecule)
        log_e = log_evidence(logits, model.evidence)
        scores = {"nll": F.cross_entropy(log_e, ids, reduction="none")}
        scores |= {"total": torch.distributions.Categorical(logits=log_e).entropy()} if fields == {"use_edl": False} \
            else uncertainty(1 + log_e.exp())
        assert list(molecule) == ["smiles", "tokens", "finished", *scores, *(f"max_{name}" for name in scores)]
        for name, values in scores.items():
            assert molecule[name] == pytest.approx(values.mean().item(), abs=1e-4), name
            assert molecule[f"max_{name}"] == pytest.approx(values.max().item(), abs=1e-4), name


def test_top_1_is_greedy_decoding(model):
    made = generate(model, 3, top_k=1, seed=9)
    tokens = [BOS]
    while len(tokens) <= model.block and (len(tokens) == 1 or tokens[-1] != EOS):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))[0, -1]
        logits[BOS] = -math.inf
        tokens.append(int(logits.argmax()))
    finished = tokens[-1] == EOS
    assert [m["smiles"] for m in made] == ["".join(VOCAB[i] for i in tokens[1:len(tokens) - finished])] * 3


def test_temperature_and_top_k_change_what_is_drawn(model):
    cold, warm, hot = (np.mean([m["nll"] for m in generate(model, 200, t)]) for t in (0.3, 1.0, 3.0))
    assert cold < warm < hot
    logits = torch.tensor([0.0, 1.0, 3.0, 2.0, 2.5, -1.0])
    made = generate(FixedLogits(logits, "exp"), 500, top_k=2)
    assert set(first_tokens(made, FixedLogits(logits, "exp").vocab).nonzero()[:, 0].tolist()) == {2, 4}
    assert first_tokens(generate(FixedLogits(logits, "exp"), 500, top_k=99), ["<bos>"]).sum() == 0


def test_a_sample_that_never_ends_is_flagged():
    never = FixedLogits(torch.tensor([0.0, -1e4, 0.0, 0.0]), "none", block=6)
    made = generate(never, 10)
    assert all(not m["finished"] and m["tokens"] == 6 and len(tokenize(m["smiles"])) == 6 for m in made)
    at_once = FixedLogits(torch.tensor([0.0, 1e4, 0.0, 0.0]), "none", block=6)
    assert all(m["finished"] and m["tokens"] == 1 and m["smiles"] == "" for m in generate(at_once, 10))


def test_samples_as_a_table(tmp_path, model):
    made = generate(model, 5) + generate(model, 1, prompt=[7], top_k=1) + [generate(model, 1)[0] | {"smiles": "CCO"}]
    train_edl.write_csv(tmp_path / "deep" / "samples.csv", made)
    with open(tmp_path / "deep" / "samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["smiles"] for row in rows] == [m["smiles"] for m in made] and rows[-1]["valid"] == "True"
    assert list(rows[0])[:3] == ["smiles", "valid", "tokens"] and float(rows[0]["nll"]) == pytest.approx(made[0]["nll"])


# ----------------------------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize("fields", [{}, {"edl_loss_type": "mse", "edl_evidence": "softplus"}, {"edl_loss_type": "log"},
                                    {"use_edl": False}], ids=["digamma exp", "mse softplus", "log exp", "plain"])
def test_evaluation_is_the_mean_over_targets_one_row_at_a_time(demo, fields):
    config, model = small_config(**fields), small_model(demo.vocab, demo.block, dropout=0.3, **fields)
    rows = np.random.default_rng(0).permutation(demo.rows["train"])[:300]       # more than one batch of 256
    model.train()
    found = evaluate(model, demo, config, "train", 300)
    assert model.training
    model.eval()
    sums, count = Counter(), 0
    for row in rows:
        one = get_rows(demo, np.array([row]))
        with torch.no_grad():
            logits, targets = model(one["tokens"])[0].double(), one["targets"][0]
        count += len(targets)
        if config.use_edl:
            alpha = closed_alpha(logits, config.edl_evidence)
            sums["loss"] += closed_risk(logits, targets, config.edl_loss_type, config.edl_evidence).sum().item()
            sums.update({name: value.sum().item() for name, value in uncertainty(alpha).items()})
            log_e = (alpha - 1).log()
        else:
            log_e = logits
            sums["total"] += torch.distributions.Categorical(logits=logits).entropy().sum().item()
        sums["nll"] += F.cross_entropy(log_e, targets, reduction="sum").item()
    wanted = {name: value / count for name, value in sums.items()}
    wanted |= {} if config.use_edl else {"loss": wanted["nll"]}
    assert found == pytest.approx(wanted, rel=1e-5)
    assert evaluate(model, demo, config, "val").keys() == found.keys() and not model.training
    assert evaluate(model, demo, config, "val", 5) != evaluate(model, demo, config, "val")


def test_the_best_checkpoint_has_the_lowest_nll_and_no_nan_wins(demo, tmp_path, monkeypatch):
    """Five evaluations; the loss, which could hold a KL, would choose others."""
    nll, loss = iter([math.nan, 2.0, 1.5, math.nan, 1.8]), iter([0.1, 5.0, 4.0, math.nan, 0.2])
    monkeypatch.setattr(train_edl, "evaluate", lambda *a: {"nll": next(nll, 0.0), "loss": next(loss, 0.0)})
    data_dir, folder = build_demo(tmp_path), tmp_path / "run"
    answer = train_here(data_dir, folder, max_steps=10, eval_every=2, save_every=2, keep=0)
    assert answer["best"] == 1.5
    tensors, body = read_file(folder / "best.safetensors")
    at_6, body_6 = read_file(folder / "step-00000006.safetensors")
    assert_same_bits(tensors, {name[len("model."):]: x for name, x in at_6.items() if name.startswith("model.")})
    assert body_6["best"] == 1.5 and body["about"]["vocab"] == demo.vocab
    fresh = MolGPT(Config(**body["about"]["config"]), body["about"]["vocab"], body["about"]["block"])
    load_tensors(fresh, tensors)


# ------------------------------------------------------------------------------------------------------------- schedule
def test_learning_rate():
    config = Config(learning_rate=1e-3, warmup_steps=10, min_lr=0.1)
    rates = [lr_at(step, 110, config) for step in range(111)]
    assert rates[:10] == pytest.approx([1e-3 * (step + 1) / 10 for step in range(10)])
    assert rates[10] == max(rates) == pytest.approx(1e-3) and rates[60] == pytest.approx(0.55e-3)
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and rates[110] == pytest.approx(1e-4)
    assert lr_at(500, 110, config) == pytest.approx(1e-4)
    assert lr_at(0, 10, Config(warmup_steps=0, learning_rate=1e-3)) == pytest.approx(1e-3)
    assert lr_at(3, 5, Config(warmup_steps=300, learning_rate=3e-3)) == pytest.approx(4e-5)     # ends in the warm-up


def test_steps_in_words():
    assert train_edl.steps_in("") == set() and train_edl.steps_in("17") == {17}
    assert train_edl.steps_in("17,40-45") == {17, 40, 41, 42, 43, 44, 45} and train_edl.steps_in("3, 5-5,") == {3, 5}


@pytest.mark.parametrize("text", ["x", "1-y", "-5", "1.5", "3 4"])
def test_steps_that_are_none(capsys, text):
    with pytest.raises(SystemExit) as stop:
        train_edl.steps_in(text)
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: --skip_steps {text}: write steps as 17,40-45\n"


# ------------------------------------------------------------------------------------------------ the guide's interface
@pytest.fixture
def on_cuda(monkeypatch):
    """settle() as on a machine with a GPU and in one process, where no CPU preset is filled in."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")                      # gpu_ids sets it; put back afterwards
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize("words, fields", [
    ("", {}),
    ("--run_name edl_test", dict(run_name="edl_test")),
    ("--max_epochs 20 --batch_size 512 --learning_rate 6e-4", dict(max_epochs=20, batch_size=512, learning_rate=6e-4)),
    ("--n_layer 12 --n_head 8 --n_embd 512", dict(n_layer=12, n_head=8, n_embd=512)),
    ("--n_layer 6 --n_embd 128 --gpu_ids 0", dict(n_layer=6, n_embd=128, gpu_ids="0")),
    ("--use_edl --edl_loss_type log --edl_annealing_step 10",
     dict(use_edl=True, edl_loss_type="log", edl_annealing_step=10.0)),
    ("--no_edl --run_name baseline", dict(use_edl=False, run_name="baseline")),
    ("--data_name moses2 --epochs 3 --lr 1e-3",
     dict(data_dir="data/molecules/moses2", max_epochs=3, learning_rate=1e-3)),
    ("--wandb_online --edl-loss-type mse", dict(wandb="online", edl_loss_type="mse"))])
def test_commands_of_the_guide(on_cuda, capsys, words, fields):
    config, given = parse_flags(Config, words.split(), train_edl.__doc__, train_edl.ALIASES)
    wanted = vars(Config()) | fields
    assert vars(config) == wanted and given == set(fields)
    assert vars(train_edl.settle(config, given)) == wanted and capsys.readouterr().out == ""


def test_the_defaults_are_the_guides():
    config = Config()
    assert (config.n_layer, config.n_head, config.n_embd) == (8, 8, 256) and config.use_edl
    assert (config.batch_size, config.learning_rate, config.max_epochs, config.min_lr) == (512, 6e-4, 20, 0.1)


def test_many_gpus_are_torchruns_to_start(on_cuda, capsys):
    words = "--gpu_ids 0,1 --num_gpus 2 --data_name moses2 --wandb_online".split()
    config, given = parse_flags(Config, words, "", train_edl.ALIASES)
    fields = dict(gpu_ids="0,1", num_gpus=2, data_dir="data/molecules/moses2", wandb="online")
    assert vars(config) == vars(Config()) | fields and given == set(fields)
    with pytest.raises(SystemExit) as stop:
        train_edl.settle(config, given)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "torchrun --nproc_per_node=2 train_edl.py" in said and said.count("\n") == 1


def test_as_many_processes_as_gpus_were_asked_for(on_cuda, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config, given = parse_flags(Config, ["--num_gpus", "2"], "", train_edl.ALIASES)
    assert train_edl.settle(config, given).num_gpus == 2


@pytest.mark.parametrize("words, said", [
    ("--n_head 12 --n_embd 512", "--n_embd 512 is not a multiple of --n_head 12"), ("--batch_size 0", "--batch_size 0"),
    ("--learning_rate -1", "--learning_rate -1.0"), ("--n_head 0", "--n_head 0"), ("--seed -1", "--seed -1"),
    ("--dropout 1.5", "--dropout 1.5"), ("--edl_loss_type mle", "log, digamma, mse"),
    ("--edl_evidence relu", "exp, softplus"), ("--on_nonfinite pray", "skip, stop"), ("--wandb on", "offline, online"),
    ("--num_gpus 8", "torchrun --nproc_per_node=8"), ("--resume", "--resume needs --run_name")])
def test_what_cannot_work_is_refused(on_cuda, capsys, words, said):
    config, given = parse_flags(Config, words.split(), "", train_edl.ALIASES)
    with pytest.raises(SystemExit) as stop:
        train_edl.settle(config, given)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_without_a_gpu_a_small_preset_is_filled_in_and_flags_win(capsys):
    words = "--device cpu --n_embd 64 --run_name x".split()
    config, given = parse_flags(Config, words, "", train_edl.ALIASES)
    settled = train_edl.settle(config, given)
    assert vars(settled) == vars(Config()) | train_edl.CPU | dict(device="cpu", n_embd=64, run_name="x")
    said = capsys.readouterr().out
    assert said.startswith("no GPU") and "--n_layer 4" in said and "n_embd" not in said
