"""bench.py: that its rows run, what they say without their peer, and how a ratio is made. Speed is not tested."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
from bench import edl, logbert

CPU, TINY = torch.device("cpu"), dict(dry_run=True, batch_size=8, n_layer=1, n_head=2, n_embd=16)       # the small demo
SMALL = {edl: edl.Config(**TINY, dropout=0.0), logbert: logbert.Config(**TINY)}
SCRIPTS = pytest.mark.parametrize("script", [edl, logbert], ids=["edl", "logbert"])


@pytest.fixture(autouse=True)
def one_thread():
    yield
    torch.set_num_threads(1)                        # as conftest.py has it; main() sets what its flag says


def made(ours, theirs, **more):
    row = dict(unit="rows/s", goal=">= 1x", peer="some_peer", memory=[], compared="nothing")
    return bench.Row(rates=np.array([ours, theirs] if theirs else [ours], float), **row | more)


def test_a_ratio_is_the_median_of_the_pairs_ratios():
    row = made([10, 30, 90, 8, 50], [10, 10, 10, 4, 100])        # 1, 3, 9, 2, .5; the medians alone would give 3
    assert bench.ratio(row) == "2.0x (0.5 ... 9.0)"
    assert bench.line("name", row) == "| name | 30 | 10 | rows/s | 2.0x (0.5 ... 9.0) | >= 1x | - | nothing |"


def test_a_cost_is_the_time_on_top():
    assert bench.ratio(made([100, 100, 100], [101, 103, 98], percent=True)) == "+1.0 % (-2.0 ... +3.0)"


def test_rates_are_amounts_over_seconds_of_interleaved_turns(monkeypatch):
    order, clock = [], iter(np.cumsum([0, 1, 0, 2, 0, 3, 0, 4, 0, 1, 0, 1, 0, 1, 0, 1]).tolist())
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    rates = bench.measure(CPU, 2, [lambda: order.append("a") or 8, None, lambda: order.append("b") or 12], turns=2)
    assert order == ["a", "b"] * 5                               # the first of each is untimed
    assert rates.tolist() == [[16 / (1 + 3), 8], [24 / (2 + 4), 12]]


def test_memory_is_the_peak_of_tensors():
    def twice():
        a = torch.empty(1 << 20)
        del a
        return torch.empty(1 << 20), torch.empty(1 << 19)
    assert bench.peak_memory(CPU, [None, twice]) == [6 << 20]


def rows_with(peer, pairs):
    """The rows that have this peer, tiny."""
    tiny = dict(steps=1, turns=1)
    if peer == "drain3":
        return [bench.logs_prepare(CPU, pairs, SMALL[logbert], lines=300, sample=50)]
    return [bench.edl_train(CPU, pairs, SMALL[edl], **tiny),
            bench.edl_train(CPU, pairs, SMALL[edl], **tiny, longest=True),
            bench.edl_sample(CPU, pairs, SMALL[edl], steps=1, n=3),
            bench.logbert_train(CPU, pairs, SMALL[logbert], **tiny),
            bench.logbert_score(CPU, pairs, SMALL[logbert], "bag"),
            bench.logbert_score(CPU, pairs, SMALL[logbert], "ordered", sample=3)]


@pytest.mark.parametrize("gone", ["transformers", "drain3"])
def test_a_missing_peer_is_said(gone, monkeypatch):
    monkeypatch.setitem(sys.modules, gone, None)
    for row in rows_with(gone, 1):
        assert f"| - | {row.unit} | not installed: pip install {gone} |" in bench.line("name", row)
        assert row.rates.shape == (1, 1) and row.rates[0, 0] > 0


@pytest.mark.parametrize("there", ["transformers", "drain3"])
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
    drawn = bench.NextTokens(data.table[s:s + n + 1].numpy() for s, n in zip(data.start[rows], data.length[rows]))
    tokens, labels = bench.padded([drawn[i] for i in range(5)], pad=edl.EOS)
    assert torch.equal(tokens != edl.EOS, batch["mask"]) and torch.equal(labels != bench.IGNORE, batch["mask"])
    assert torch.equal(tokens[batch["mask"]], batch["tokens"][batch["mask"]])
    assert torch.equal(labels[batch["mask"]], batch["targets"][batch["mask"]])
    assert [column.shape for column in bench.padded([drawn[0]], data.block, edl.EOS)] == [(1, data.block)] * 2


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
    monkeypatch.setattr(bench, "measure", lambda device, pairs, sides, turns: np.ones((len(sides), pairs)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    row = bench.edl_pair(torch.device("cuda"), 1, SMALL[edl])
    assert "| 1 | - | molecules/s | needs two devices |" in bench.line("name", row)


def test_what_a_gpu_would_take_is_computed(monkeypatch):
    data = edl.load_data(SMALL[edl])
    size = sum(p.numel() for p in bench.new_model(edl, SMALL[edl], data, CPU).parameters())
    assert "MFU - " in bench.utilization(SMALL[edl], data, 1000.0, CPU)
    monkeypatch.setattr(bench, "new_model", lambda *about: torch.nn.Linear(1, size, bias=False))
    rate = 0.25 * 312e12 / (6 * size * data.length[data.rows["train"]].mean())
    for name, mfu in {"NVIDIA A100-SXM4-80GB": "25.0%", "NVIDIA H100 80GB HBM3": "7.9%", "NVIDIA H100 PCIe": "-",
                      "NVIDIA H200": "7.9%", "NVIDIA H200 NVL": "-"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        text = bench.utilization(SMALL[edl], data, rate, torch.device("cuda"))
        assert f"MFU {mfu} (" in text and f"computed: {1_584_663 / rate:,.0f} s for 1,584,663 molecules" in text


def test_a_row_runs_from_the_command_line(capsys):
    bench.main(["logbert guard", "--dry_run"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 3 and len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| train_logbert guard on / off | ") and " % (" in table[2]


def test_the_prepared_set_is_the_one_named(tmp_path):
    with pytest.raises(SystemExit):
        bench.main(["train_edl guard", "--dry_run", "--molecules", str(tmp_path / "none")])
    assert bench.settings(edl, CPU, False, "some/where").data_dir == "some/where"
    assert bench.settings(edl, CPU, False) == edl.Config(**edl.CPU)
    assert bench.settings(edl, torch.device("cuda"), False) == edl.Config()
    assert bench.settings(logbert, CPU, False, "some/where") == logbert.Config()


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
    assert sum("computed: " in line for line in table) == 2
