"""bench.py: that its rows run, what they say without their peer, and how a ratio is made. Speed is not tested."""
import contextlib
import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bench
from bench import adapter, distill, edl, logbert, student

CPU, TINY = torch.device("cpu"), dict(dry_run=True, batch_size=8, n_layer=1, n_head=2, n_embd=16)       # the small demo
SMALL = {edl: edl.Config(**TINY, dropout=0.0), logbert: logbert.Config(**TINY),
         student: student.Config(**student.DRY | dict(dry_run=True, batch_size=8, phase="student")),
         distill: distill.Config(**distill.DRY | dict(dry_run=True, batch_size=3, phase="student", learning_rate=3e-3)),
         adapter: adapter.Config(**adapter.DEMO | adapter.DRY | dict(dry_run=True, phase="adapter"))}
SCRIPTS = pytest.mark.parametrize("script", SMALL, ids=lambda script: script.__name__)


@pytest.fixture(autouse=True)
def one_thread():
    yield
    torch.set_num_threads(1)                        # as conftest.py has it; main() sets what its flag says


def made(ours, theirs, **more):
    row = dict(unit="rows/s", goal=">= 1x", peer="some_peer", seen=None, compared="nothing")
    return bench.Row(rates=np.array([ours, theirs] if theirs else [ours], float), **row | more)


def test_a_ratio_is_the_median_of_the_pairs_ratios():
    row = made([10, 30, 90, 8, 50], [10, 10, 10, 4, 100])        # 1, 3, 9, 2, .5; the medians alone would give 3
    assert bench.ratio(row) == "2.0x (0.5 ... 9.0)"
    assert bench.line("name", row) == "| name | 30 | 10 | rows/s | 2.0x (0.5 ... 9.0) | >= 1x | - | - | nothing |"


def test_a_cost_is_the_time_on_top():
    assert bench.ratio(made([100, 100, 100], [101, 103, 98], percent=True)) == "+1.0 % (-2.0 ... +3.0)"


def test_rates_are_amounts_over_seconds_of_interleaved_turns(monkeypatch):
    order, clock = [], iter(np.cumsum([0, 1, 0, 2, 0, 3, 0, 4, 0, 1, 0, 1, 0, 1, 0, 1]).tolist())
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    rates = bench.measure(CPU, 2, [lambda: order.append("a") or 8, None, lambda: order.append("b") or 12], turns=2)
    assert order == ["a", "b"] + ["a", "b", "b", "a"] * 2        # the first of each is untimed
    assert rates.tolist() == [[16 / (1 + 4), 8], [24 / (2 + 3), 12]]


def test_memory_is_the_peak_of_tensors():
    def twice():
        a = torch.empty(1 << 20)
        del a
        return 7 * len([torch.empty(1 << 20), torch.empty(1 << 19)])

    def product():
        return len([torch.ones(400, 400) @ torch.ones(400, 400) for _ in range(20)])
    seen = bench.look(CPU, [twice, None, product])
    assert seen.memory[0] == 6 << 20 and seen.memory[1] >= 3 * 4 * 400 ** 2 and seen.work == 14
    assert bench.look(CPU, [product]).longest.startswith("mm ") and bench.look(CPU, [twice], False).cost is None


def cost_of(function):
    with bench.Cost() as cost:
        function()
    return cost.flops, cost.moved, cost.reads


def test_a_cost_counts_products_bytes_and_reads():
    a, b, table = torch.randn(3, 5), torch.randn(5, 7), torch.randn(1000, 6)
    assert cost_of(lambda: a @ b) == (2 * 3 * 5 * 7, 0, 0)
    assert cost_of(lambda: a + 1) == (0, 2 * 60, 0) and cost_of(lambda: a.add_(1)) == (0, 2 * 60, 0)
    assert cost_of(lambda: a.view(-1)[:3].detach()) == (0, 0, 0)      # a view moves nothing
    assert cost_of(lambda: table[torch.tensor([3])])[1] <= 2 * 24 + 2 * 8       # nor what is not picked
    assert cost_of(lambda: a.sum().item())[2] == 1 and cost_of(lambda: (a > 0).nonzero())[2] == 1
    q = torch.randn(2, 4, 300, 16, requires_grad=True)
    flops = cost_of(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())[0]
    assert flops == 2 * 2 * 4 * 300 * 300 * 16 * (2 + 5)        # two products forwards, five backwards, one made again


def test_a_floor_is_products_and_copies_at_measured_rates(monkeypatch):
    monkeypatch.setattr(bench, "ceilings", lambda device, dtype: [1e9, 1e8])
    row = made([50, 100, 150], [1, 1, 1])
    assert bench.floor(row, CPU, torch.float32) == "-"
    row = row._replace(seen=SimpleNamespace(cost=SimpleNamespace(flops=3e8, moved=1e7), work=80, longest="mm 40%"))
    assert bench.floor(row, CPU, torch.float32) == "2.0x, 75% of it products; mm 40%"           # .8 s to .3 + .1
    for name, mfu in {"NVIDIA A100-SXM4-80GB": "20.0%", "NVIDIA H100 80GB HBM3": "6.3%", "NVIDIA H100 PCIe": "",
                      "NVIDIA H200": "6.3%", "NVIDIA H200 NVL": ""}.items():
        row.seen.cost.flops = 0.2 * 312e12 * 0.8
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert bench.floor(row, torch.device("cuda"), torch.float32).endswith(f"mm 40%; MFU {mfu}" if mfu else "mm 40%")


def test_ceilings_are_rates():
    products, copies = bench.ceilings(CPU, torch.float32)
    assert 1e9 < products < 1e14 and 1e8 < copies < 1e13


@SCRIPTS
def test_the_host_reads_nothing_in_a_step(script):
    """Evaluations, saves and log lines read; the steps between them do not, on whatever device."""
    row = bench.guard_cost(CPU, 1, SMALL[script], script, "rows/s", 2, 1)
    assert "In 2 steps the host reads the device 0 times" in row.compared and row.seen.cost.flops > 0


def test_growth_is_told_with_what_prepare_takes():
    row = bench.growth(CPU, 1, SMALL[logbert], logbert, "logs", "sessions/s", 1, 1, (200, 210))
    assert row.rates.shape == (2, 1) and " % (" in bench.ratio(row) and len(row.seen.memory) == 2
    assert re.search(r"on 210 rows; on 200\..*: 200 rows in [\d.]+ s, 0\.\d\d MB; 210 rows in ", row.compared)


def rows_with(peer, pairs):
    """The rows that have this peer, tiny."""
    tiny = dict(steps=1, turns=1)
    if peer == "diffusers":
        return [bench.adapter_step(CPU, pairs, SMALL[adapter], **tiny),
                bench.adapter_step(CPU, pairs, SMALL[adapter], **tiny, compiled=True)]
    return [bench.edl_train(CPU, pairs, SMALL[edl], **tiny),
            bench.edl_sample(CPU, pairs, SMALL[edl], steps=1, n=3),
            bench.logbert_train(CPU, pairs, SMALL[logbert], **tiny),
            bench.logbert_score(CPU, pairs, SMALL[logbert], "bag"),
            bench.logbert_score(CPU, pairs, SMALL[logbert], "ordered", sample=3)]


@pytest.mark.parametrize("gone", ["transformers", "diffusers"])
def test_a_missing_peer_is_said(gone, monkeypatch):
    monkeypatch.setitem(sys.modules, gone, None)
    for row in rows_with(gone, 1):
        assert f"| - | {row.unit} | not installed: pip install {gone} |" in bench.line("name", row)
        assert row.rates.shape == (1, 1) and row.rates[0, 0] > 0


@pytest.mark.parametrize("there", ["transformers", "diffusers"])
def test_rows_with_their_peer(there):
    pytest.importorskip(there)
    for row in rows_with(there, 2):
        assert row.rates.shape == (2, 2) and (row.rates > 0).all() and "x (" in bench.ratio(row)


def test_gpt2_with_our_weights_has_our_logits():
    transformers, data = pytest.importorskip("transformers"), edl.load_data(SMALL[edl])
    model = bench.new_model(edl, SMALL[edl], data, CPU).eval()
    with torch.no_grad():
        for parameter in model.parameters():        # biases and norms too; far from flat
            parameter.add_(torch.randn_like(parameter) / 5)
    other = bench.gpt2(transformers, SMALL[edl], data, CPU).eval()
    batch = edl.get_rows(data, data.rows["val"][:9])
    mask = torch.arange(data.block)[:batch["mask"].shape[1]] < batch["mask"].sum(1, keepdim=True)
    before = other(batch["tokens"], attention_mask=mask.long()).logits
    bench.copy_weights(model, other)
    mine, its = model(batch["tokens"]), other(batch["tokens"], attention_mask=mask.long()).logits
    assert mine.std() > 0.5 and (mine - before)[mask].abs().max() > 0.5
    torch.testing.assert_close(mine[mask], its[mask], rtol=0, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in other.parameters())


def test_the_peer_reads_and_is_asked_what_we_are():
    data = edl.load_data(SMALL[edl])
    rows = data.rows["train"][:5]
    batch = edl.get_rows(data, rows)
    drawn = [data.table[s:s + n + 1].numpy() for s, n in zip(data.start[rows], data.length[rows])]
    tokens, labels = bench.token_loss(bench.next_tokens, edl.EOS)[1](drawn)
    assert torch.equal(tokens != edl.EOS, batch["mask"]) and torch.equal(labels != bench.IGNORE, batch["mask"])
    assert torch.equal(tokens[batch["mask"]], batch["tokens"][batch["mask"]])
    assert torch.equal(labels[batch["mask"]], batch["targets"][batch["mask"]])


# ------------------------------------------------------------------------------------------------ peers of a student
@pytest.fixture(scope="module")
def spectra():
    return student.load_data(SMALL[student])


def shaken(module):
    """The same module, each weight moved, biases and norms too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return module


def test_dense_rows_are_what_we_read(spectra):
    rows = spectra.spectra["train"][::7]
    owner = spectra.molecule[rows]
    batch = spectra.molecules.inputs(owner, False)
    fingerprint, mass, fragments = bench.dense_rows(map(spectra.smiles, owner), spectra.molecules.bins)
    assert fingerprint.dtype == fragments.dtype == torch.float32 and fingerprint.shape == (len(rows), 6144)
    places = spectra.molecules.fingerprint.take(owner)[0]
    expected = torch.zeros_like(fingerprint).index_put((places, batch["fp_index"]), batch["fp_value"])
    torch.testing.assert_close(fingerprint, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(fragments, batch["fragments"], rtol=0, atol=1e-6)
    assert torch.equal(mass, batch["mass"]) and fragments.amax() > 0.5 and expected.amax() > 1


def test_the_dense_student_has_our_spectra_and_gradients(spectra):
    torch.manual_seed(1)
    model = shaken(bench.new_model(student, SMALL[student], spectra, CPU)).eval()
    other, rows = bench.dense_student(model), spectra.rows["train"][:20]
    names = "fingerprint", "mass", "fragments"
    dense = dict(zip(names, bench.dense_rows(map(spectra.smiles, rows), spectra.molecules.bins)))
    mine, its = (one(batch)[0] for one, batch in ((model, spectra.molecules.inputs(rows, False)), (other, dense)))
    assert mine.std() > 0.05
    torch.testing.assert_close(mine, its, rtol=0, atol=1e-5)
    for y in mine, its:
        y.square().mean().backward()
    torch.testing.assert_close(model.fingerprint.weight.weight.grad, other.fingerprint.weight.grad.T, rtol=0, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in other.parameters())
    layer = other.fingerprint
    assert torch.equal(layer(dense), layer(dense)) and not torch.equal(layer.train()(dense), layer(dense))     # drops


def test_the_plain_student_learns_by_our_loss_from_our_rows(spectra, monkeypatch):
    seen, loss = {False: [], True: []}, student.compute_loss

    def spy(model, batch, step, config):
        value, parts = loss(model, batch, step, config)
        seen["fingerprint" in batch].append((batch, parts))
        return value, parts
    monkeypatch.setattr(student, "compute_loss", spy)
    row = bench.student_train(CPU, 1, SMALL[student], steps=5, turns=1)
    assert row.rates.shape == (2, 1) and "x (" in bench.ratio(row)
    (mine, parts), (its, other_parts) = seen[False][0], seen[True][0]
    assert list(parts) == list(other_parts)         # the same terms
    for name in "target", "rivals", "are_own", "mass", "fragments":
        assert mine[name].shape == its[name].shape and mine[name].dtype == its[name].dtype, name
    assert mine["count"] == its["count"] == len(its["mass"]) == 8 and mine["micro"] == its["micro"]
    pool, drawn = spectra.spectra["train"], []
    for batch, _ in seen[True]:
        away = torch.cdist(batch["target"], spectra.dense(pool).sqrt(), compute_mode="donot_use_mm_for_euclid_dist")
        assert (away.amin(1) == 0).all()            # a training row,
        drawn += away.argmin(1).tolist()
        owner = spectra.molecule[pool[drawn[-8:]]]  # with what is known of its molecule,
        fingerprint, mass, fragments = bench.dense_rows(map(spectra.smiles, owner), spectra.molecules.bins)
        assert torch.equal(batch["fingerprint"], fingerprint) and torch.equal(batch["mass"], mass)
        assert torch.equal(batch["fragments"], fragments) and (batch["are_own"].sum(1) == 1).all()
        own = batch["rivals"][batch["are_own"].nonzero()[:, 1]]         # whose own spectrum is not a rival
        torch.testing.assert_close(own, student.weigh(spectra.dense(spectra.first[owner]).sqrt()), rtol=0, atol=1e-6)
    assert len(set(drawn)) > 0.8 * len(drawn)       # shuffled, without repeats within an epoch


def test_a_batch_that_is_never_full_is_refused():
    config = student.Config(**vars(SMALL[student]) | {"batch_size": 1000})
    with pytest.raises(SystemExit):
        bench.student_train(CPU, 1, config, steps=1, turns=1)


def test_prediction_runs_on_one_thread(monkeypatch):
    threads, measure = [], bench.measure
    monkeypatch.setattr(bench, "measure", lambda *about: threads.append(torch.get_num_threads()) or measure(*about))
    torch.set_num_threads(2)
    row = bench.student_predict(CPU, 2, SMALL[student], n=5, turns=1)
    assert threads == [1]
    assert row.rates.shape == (2, 2) and f" {1000 / np.median(row.rates[0]):.2f} ms each" in row.compared


class DocumentedGINE(torch.nn.Module):
    """torch_geometric.nn.GINEConv as its documentation has it, for where it is not installed."""
    def __init__(self, nn, eps=0.0, train_eps=False, edge_dim=None):
        super().__init__()
        assert train_eps and edge_dim is None
        self.nn, self.eps = nn, torch.nn.Parameter(torch.full((1,), eps))
        for layer in nn:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()

    def forward(self, x, edge_index, edge_attr):
        source, target = edge_index
        total = torch.stack([(x[source[target == i]] + edge_attr[target == i]).relu().sum(0) for i in range(len(x))])
        return self.nn(total + (1 + self.eps) * x)


class GeometricGINE(torch.nn.Module):
    """train_student's GINE, taken over: torch_geometric's GINEConv with its weights."""
    def __init__(self, nn, layer):
        super().__init__()
        self.norm, self.bond = layer.norm, layer.bond
        inner = torch.nn.Sequential(layer.up, torch.nn.GELU(), layer.drop, layer.down)
        self.conv = nn.GINEConv(copy.deepcopy(inner), train_eps=True).to(layer.eps.device)
        self.conv.nn.load_state_dict(inner.state_dict())        # it had drawn new ones
        self.conv.eps.data.fill_(layer.eps.item())

    def forward(self, h, edges, edge_kind):
        return h + self.conv(self.norm(h), edges, self.bond(edge_kind))


@pytest.mark.parametrize("installed", [False, True], ids=["documented", "installed"])
def test_gine_of_torch_geometric_is_ours(installed, spectra):
    if installed:
        pytest.importorskip("torch_geometric")
        nn = bench.peer("torch_geometric.nn")
    else:
        nn = SimpleNamespace(GINEConv=DocumentedGINE)
    torch.manual_seed(1)
    layer = shaken(student.GINE(SMALL[student])).eval()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    other = GeometricGINE(nn, layer)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    batch = spectra.molecules.inputs(spectra.rows["train"][:6], True)
    h = torch.randn(len(batch["atoms"]), SMALL[student].gnn_width)
    mine, its = (one(h, batch["edges"], batch["edge_kind"]) for one in (layer, other.eval()))
    torch.testing.assert_close(mine, its, rtol=0, atol=1e-4)
    assert (mine - h).std() > 0.05 and layer.eps.abs() > 0.01
    whole = student.Encoder(SMALL[student]).eval()
    its = copy.deepcopy(whole)
    its.layers = torch.nn.ModuleList(GeometricGINE(nn, layer) for layer in its.layers)
    torch.testing.assert_close(whole(batch), its(batch), rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------------------- peers of train_distill
def text_rows(pairs):
    """The row that has the Trainer beside it, tiny."""
    return [bench.distill_train(CPU, pairs, SMALL[distill], steps=1, turns=1)]


@pytest.mark.parametrize("gone", ["transformers", "accelerate"])
def test_a_missing_trainer_is_said(gone, monkeypatch):
    monkeypatch.setitem(sys.modules, gone, None)
    before = sorted(os.listdir(distill.load_data(SMALL[distill]).folder))
    for row in text_rows(1):
        assert f"| - | {row.unit} | not installed: pip install transformers accelerate |" in bench.line("name", row)
        assert row.rates.shape == (1, 1) and row.rates[0, 0] > 0
    assert sorted(os.listdir(distill.load_data(SMALL[distill]).folder)) == before         # no cache is left there


def test_rows_with_the_trainer(capsys):
    pytest.importorskip("transformers"), pytest.importorskip("accelerate")
    row, = text_rows(2)
    assert row.rates.shape == (2, 2) and (row.rates > 0).all() and "x (" in bench.ratio(row)
    out = capsys.readouterr().out
    assert "loss" not in out and "{" not in out     # neither of them talks during what is timed


@pytest.fixture
def small_text():
    """Rows and two models, of far from flat weights."""
    with bench.distill_models(CPU, SMALL[distill]) as (data, config):
        for folder in config.student, config.teacher:
            torch.manual_seed(len(folder))
            model = distill.load_hf(folder)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) / 5)
            distill.save_hf(model, folder)
        yield data, config


def sums(logits, taught, tokens, asked, T):
    """Of one row, in float64: T^2 KL(teacher || student) of each position; and of the asked ones the cross-entropy."""
    log_p, log_q = (taught.double() / T).log_softmax(-1), (logits.double() / T).log_softmax(-1)
    ce = -logits.double().log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
    return T ** 2 * (log_p.exp() * (log_p - log_q)).sum(1), ce[asked[:-1]]


def test_the_trainer_takes_our_rows_and_the_original_formula(small_text, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    (data, config), seen, plain = small_text, [], bench.original_loss
    monkeypatch.setattr(bench, "original_loss", lambda *about: seen.append((about, plain(*about))) or seen[-1][1])
    side = bench.trainer_steps(CPU, config, data, 2)
    assert side() == 2 * config.batch_size and side() and len(seen) == 4
    models = [transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
              for folder in (config.student, config.teacher)]
    rows = [bench.taken(data, bench.FIRST + i, config) for i in range(4)]
    width = data.length[rows[0]].max() + 1
    kd, ce, fine = 0.0, [], 0
    for row in rows[0]:
        n = data.length[row] + 1
        tokens, place = data.table[data.start[row]:data.start[row] + n].long(), torch.arange(width)
        ids = torch.cat([tokens, tokens.new_zeros(width - n)])
        with torch.no_grad():
            logits, taught = (model(input_ids=ids[None], attention_mask=(place < n).long()[None]).logits[0]
                              for model in models)
            own = distill.load_hf(config.student)(tokens[None])[0]
        torch.testing.assert_close(own, logits[:n].float(), rtol=0, atol=1e-3)
        each, asked = sums(logits, taught, ids, (place >= data.first[row]) & (place < data.length[row]), 3.0)
        kd, fine = kd + each.sum(), fine + int(data.asked[row])
        ce.append(asked)
    ce = torch.cat(ce)
    (logits, _, its_ce, _), loss = seen[0]
    assert logits.shape == (config.batch_size, width, data.vocab) and len(ce) == fine
    assert its_ce.item() == pytest.approx(float(ce.mean()), rel=1e-5) and float(ce.mean()) > 1
    assert loss.item() == pytest.approx(float(0.5 * kd / config.batch_size + 0.5 * ce.mean()), rel=1e-4)
    assert [len(about[0][0]) for about, _ in seen] == [data.length[some].max() + 1 for some in rows]     # it goes on
    assert float(seen[0][1]) != float(seen[1][1])


def test_our_loss_is_the_mean_over_supervised_tokens(small_text):
    data, config = small_text
    batch, rows = distill.get_batch(data, "train", bench.FIRST, config), bench.taken(data, bench.FIRST, config)
    models, kd, ce = [distill.load_hf(folder).double() for folder in (config.student, config.teacher)], [], []
    for row in rows:
        tokens = data.table[data.start[row]:data.start[row] + data.length[row] + 1].long()
        with torch.no_grad():
            logits, taught = (model(tokens[None])[0] for model in models)
        asked = torch.arange(len(tokens)).ge(int(data.first[row])) & torch.arange(len(tokens)).lt(len(tokens) - 1)
        each, some = sums(logits, taught, tokens, asked, 3.0)
        kd.append(each[asked])
        ce.append(some)
    kd, ce = torch.cat(kd), torch.cat(ce)
    loss, parts = distill.compute_loss(distill.load_hf(config.student), batch, bench.FIRST, config)
    assert len(kd) == len(ce) == batch["count"] and config.kd_reduction == "token"
    assert float(parts["kd"]) == pytest.approx(float(kd.mean()), rel=1e-4) and float(kd.mean()) > 0.1
    assert float(loss) == pytest.approx(float(0.5 * kd.mean() + 0.5 * ce.mean()), rel=1e-4)


def test_the_rows_of_a_step_are_those_of_our_batches(small_text):
    data, config = small_text
    for step in range(2 * distill.WINDOW + 1):
        tokens = distill.get_batch(data, "train", step, config)["tokens"]
        rows = bench.taken(data, step, config)
        assert len(tokens) == len(rows) == config.batch_size
        for mine, (ids, labels), row in zip(tokens, bench.labelled(data, rows), rows):
            n, first = data.length[row], data.first[row]
            assert mine[:n].tolist() == ids[:-1] and len(ids) == len(labels) == n + 1
            assert labels == [bench.IGNORE] * (first + 1) + ids[first + 1:] and first > 0


def test_loss_memory_is_without_weights_and_gradients(monkeypatch):
    monkeypatch.setitem(distill.CHUNK, "cpu", 1 << 16)
    row = bench.distill_loss(CPU, 1, SMALL[distill], 20_000, 2, 64, (32, 48))
    size = 4 * 2 * 64 * 20_000                      # of all logits of one model
    assert 3 * size < row.seen.memory[1] < 9 * size and 3 << 18 < row.seen.memory[0] < 8 << 18
    monkeypatch.setattr(bench, "look", lambda device, sides: SimpleNamespace(memory=[10 ** 8, 10 ** 9]))
    row = bench.distill_loss(CPU, 1, SMALL[distill], 2_000, 2, 64, (32, 48))
    assert row.seen.memory == [peak - 4 * 32 * (2_000 + 128) for peak in (10 ** 8, 10 ** 9)]
    assert row.rates.shape == (2, 1)
    assert "76 positions of 2 x 64" in row.compared.replace("supervised ", "")


# ----------------------------------------------------------------------------------------- peers of train_adapter
def test_random_scenes_are_what_is_prepared():
    config, data = bench.random_scenes(SMALL[adapter], CPU)
    model, batch = bench.new_model(adapter, config, data, CPU), adapter.get_rows(data, data.rows["train"])
    model.about = {"config": {"base": ""}}
    adapter.check_data(data, model)
    there, boxes = batch["masks"][..., 0], batch["boxes"]
    assert (there[:, 0] == 1).all() and (there.diff(dim=1) <= 0).all() and set(there.sum(1).tolist()) == {*range(1, 9)}
    assert (boxes[there == 0] == 0).all() and 0 <= boxes.min() and boxes.max() <= 1
    assert (boxes[..., 2:] > boxes[..., :2])[there == 1].all()
    loss = adapter.compute_loss(model, adapter.get_batch(data, "train", 0, config), 0, config)[0]
    loss.backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if "null_" not in name) and 0.3 < loss.item() < 3
    assert not (config.box_mask or config.rms_norm or model.base.conv_in.weight.requires_grad)


def check_same(base, other, loss_of, given):
    """AssertionError unless ours predicts what the peer does in its loss, with the same gradients of the gates."""
    seen = []
    hook = other.register_forward_hook(lambda unet, args, out: seen.append((*args[:2], out.sample)))
    assert loss_of(other, *given).isfinite()
    hook.remove()
    (noisy, times, out), = seen
    assert (noisy - given[0]).std() > 0.1           # with noise
    outs = base(noisy, times, *given[1:]), out
    grads = [torch.stack(torch.autograd.grad(out.square().mean(), [p for name, p in sorted(
        unet.named_parameters()) if "alpha_" in name])) for unet, out in zip((base, other), outs)]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-4), torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)
    assert grads[0].abs().amin() > 0


@pytest.mark.parametrize("changed", ["", "mid_block.resnets.0.conv2.weight", "mid_block.attentions.0."
                                     "transformer_blocks.0.fuser.alpha_dense", "position_net.linears.0.weight"])
def test_gated_layers_of_diffusers_are_ours(changed, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    load = diffusers.UNet2DConditionModel.load_state_dict

    def loaded(unet, tensors):
        done = load(unet, tensors)
        if changed:
            unet.get_parameter(changed).data.mul_(1.5)
        return done
    monkeypatch.setattr(diffusers.UNet2DConditionModel, "load_state_dict", loaded)
    found, ours, plain = [], bench.our_steps, bench.plain_steps
    monkeypatch.setattr(bench, "our_steps", lambda *about, model, data: found.append(model.base)
                        or ours(*about, model=model, data=data))

    def compared(device, config, other, rows, steps, loss_of):     # the row's own two, as they start
        found.append(other)
        with pytest.raises(AssertionError) if changed else contextlib.nullcontext():
            check_same(*found, loss_of, [column[:2] for column in rows.tensors])
        return plain(device, config, other, rows, steps, loss_of)
    monkeypatch.setattr(bench, "plain_steps", compared)
    assert "x (" in bench.ratio(bench.adapter_step(CPU, 1, SMALL[adapter], steps=1, turns=1)) and len(found) == 2


def test_diffusers_trains_the_gated_layers_alone(monkeypatch):
    pytest.importorskip("diffusers")
    seen, plain = [], bench.plain_steps

    def spy(device, config, model, rows, *more):
        seen.append((model, {name: p.clone() for name, p in model.named_parameters()}, rows, config))
        return plain(device, config, model, rows, *more)
    monkeypatch.setattr(bench, "plain_steps", spy)
    bench.adapter_step(CPU, 1, SMALL[adapter], steps=2, turns=1)
    (model, before, rows, config), = seen
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if bench.GATED.search(name)}
    _, data = bench.random_scenes(config, CPU)
    batch = adapter.get_rows(data, data.rows["train"])
    for mine, its in zip((batch["clean"], batch["context"], batch["boxes"], batch["phrases"]), rows.tensors):
        assert torch.equal(mine, its)
    assert torch.equal(batch["masks"], rows.tensors[4][..., None].expand(-1, -1, 2)) and len(rows.tensors) == 5


def test_what_is_cached_is_encoded_beside_it(monkeypatch):
    seen, encode, forward = [], bench.VAE.encode, bench.CLIPText.forward
    monkeypatch.setattr(bench.VAE, "encode", lambda vae, x: seen.append(tuple(x.shape)) or encode(vae, x))
    monkeypatch.setattr(bench.CLIPText, "forward", lambda text, x: seen.append(tuple(x.shape)) or forward(text, x))
    row = bench.adapter_cached(CPU, 1, SMALL[adapter], steps=2, turns=1)
    assert row.rates.shape == (2, 1) and "x (" in bench.ratio(row)
    assert seen == [(2, 3, 16, 16), (2, 77), (8, 8)] * 2 * 3     # steps; untimed, timed, and once more for the memory


def test_compiled_rows_are_for_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROWS", {name: (lambda *about: made([1], [1]), {}, {}) for name in bench.ROWS})
    told = {}
    for flags in [], ["--gpu", "--dry_run"]:
        bench.main(["train_adapter step", *flags])
        told[len(flags)] = capsys.readouterr().out.count("both compiled")
    assert told == {0: 0, 2: 1}


# ------------------------------------------------------------------------------------------------ switches and commands
def test_the_head_switch_is_used(monkeypatch):
    seen, steps = [], bench.our_steps
    monkeypatch.setattr(bench, "our_steps", lambda script, device, config, n: seen.append(config.use_edl)
                        or steps(script, device, config, n))
    assert " % (" in bench.ratio(bench.edl_head(CPU, 1, SMALL[edl], steps=1, turns=1)) and seen == [True, False]


def test_two_processes_beside_one(monkeypatch):
    config, amounts, measure = edl.Config(**vars(SMALL[edl]) | {"log_every": 2}), [], bench.measure

    def counted(device, pairs, sides, turns):       # every poll tells whether both hold the same weights
        amounts.extend(side() for side in sides)
        return measure(device, pairs, sides, turns)
    monkeypatch.setattr(bench, "measure", counted)
    row = bench.edl_pair(CPU, 2, config, steps=3, turns=2)
    assert row.rates.shape == (2, 2) and (row.rates > 0).all() and "x (" in bench.ratio(row)
    assert amounts == [2 * 3 * config.batch_size, 3 * config.batch_size]


def test_two_processes_need_two_devices(monkeypatch):
    monkeypatch.setattr(bench, "our_steps", lambda *about: lambda: 8)
    monkeypatch.setattr(bench, "measure", lambda device, pairs, sides, turns: np.ones((sum(map(bool, sides)), pairs)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    row = bench.edl_pair(torch.device("cuda"), 1, SMALL[edl])
    assert "| 1 | - | molecules/s | needs two devices |" in bench.line("name", row)


def test_a_row_runs_from_the_command_line(capsys):
    bench.main(["logbert guard", "--dry_run"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 3 and len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| train_logbert guard on / off | ") and " % (" in table[2]


def test_nothing_but_the_table_is_on_stdout(monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROWS", {"train_distill some": (lambda *about: print("a script talks") or made([1], [1]),
                                                               {}, {})})
    bench.main(["some"])
    out, err = capsys.readouterr()
    assert "a script talks" in err and len(out.splitlines()) == 5 and "talks" not in out


def test_the_prepared_set_is_the_one_named(tmp_path):
    with pytest.raises(SystemExit):
        bench.main(["train_edl guard", "--dry_run", "--molecules", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        bench.main(["train_student guard", "--dry_run", "--spectra", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        bench.main(["train_distill guard", "--dry_run", "--text", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        bench.main(["train_adapter guard", "--dry_run", "--scenes", str(tmp_path / "none")])
    assert bench.settings(edl, CPU, False, "some/where").data_dir == "some/where"
    assert bench.settings(edl, CPU, False) == edl.Config(**edl.CPU)
    assert bench.settings(edl, torch.device("cuda"), False) == edl.Config()
    assert bench.settings(logbert, CPU, False) == logbert.Config()
    asked = bench.settings(student, CPU, False, "some/where")
    assert asked == student.Config(**student.CPU, data_dir="some/where", phase="student")
    asked = bench.settings(distill, CPU, False, "some/where")
    assert asked == distill.Config(batch_size=4, max_length=512, data_dir="some/where", phase="student")
    asked = bench.settings(distill, torch.device("cuda"), False)
    assert asked == distill.Config(batch_size=64, dtype="bfloat16", phase="student")
    assert bench.settings(adapter, CPU, False) == adapter.Config(**adapter.DEMO, phase="adapter")


def test_a_row_gets_its_own_script_and_set(monkeypatch):
    got = {}
    monkeypatch.setattr(bench, "ROWS", {name: (lambda *about, name=name: got.update({name: about[2]}) or made([1], [1]),
                                               {}, {}) for name in bench.ROWS})
    bench.main(["--molecules", "a", "--spectra", "b", "--text", "c", "--scenes", "d", "--logs", "e"])
    for name, config in got.items():
        scripts = {"train_edl": (edl, "a"), "train_student": (student, "b"), "train_distill": (distill, "c"),
                   "train_adapter": (adapter, "d"), "train_logbert": (logbert, "e")}
        script, folder = scripts[name.split()[0]]
        assert type(config) is script.Config and config.data_dir == folder, name


def test_each_row_begins_with_the_threads_that_were_asked_for(monkeypatch):
    threads = []

    def changes(*about):
        threads.append(torch.get_num_threads())
        torch.set_num_threads(1)
        return made([1], [1])
    monkeypatch.setattr(bench, "ROWS", {name: (changes, {}, {}) for name in ("train_edl a", "train_edl b")})
    bench.main(["--threads", "2"])
    assert threads == [2, 2]


@SCRIPTS
def test_the_guarded_and_the_plain_step_do_the_same(script):
    data, models = script.load_data(SMALL[script]), []
    for guarded in True, False:
        models.append(bench.new_model(script, SMALL[script], data, CPU))
        assert bench.our_steps(script, CPU, SMALL[script], 5, guarded, models[-1])() == 5 * SMALL[script].batch_size
    start = bench.new_model(script, SMALL[script], data, CPU)
    for mine, other in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    assert any(not torch.equal(mine, other) for mine, other in zip(models[0].parameters(), start.parameters()))
    for (name, mine), other in zip(models[0].named_buffers(), models[1].buffers()):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    assert script is not student or models[0].bias.any() and models[0].usage.std() > 0      # follow() was called


def test_what_cannot_be_run_is_one_line():
    flags = [["no such row"], ["--threads", "0"]] + [["--gpu"]] * (not torch.cuda.is_available())
    for flag in flags:
        with pytest.raises(SystemExit) as error:
            bench.main(flag)
        assert error.value.code == 2


def test_without_cuda_the_command_says_so():
    if torch.cuda.is_available():
        pytest.skip("CUDA is here")
    done = subprocess.run([sys.executable, str(Path(bench.__file__)), "--gpu"], capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA device" in done.stderr and done.stderr.count("\n") == 1


def test_gpu_dry_run_runs_everything_without_a_gpu():
    done = subprocess.run([sys.executable, bench.__file__, "--gpu", "--dry_run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.cuda.is_available() or "no CUDA device here, so the same code runs on the CPU" in done.stdout
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0][2:] for line in table] == ["row", *bench.ROWS]
    assert sum("Computed: " in line for line in table) == 1
    assert sum(line.split(" | ")[7] == "-" for line in table) == 2       # two processes, and what is compiled
