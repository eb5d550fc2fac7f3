"""bench.py: that its rows run, what they say without their peer, and how a ratio is made. Speed is not tested."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
from train_logbert import Config

CPU, SMALL = torch.device("cpu"), Config(dry_run=True, batch_size=8, n_layer=1, n_head=2, n_embd=16)    # the small demo


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


@pytest.mark.parametrize("gone", ["transformers", "drain3"])
def test_a_missing_peer_is_said(gone, monkeypatch):
    monkeypatch.setitem(sys.modules, gone, None)
    rows = [bench.logs_prepare(CPU, 1, SMALL, lines=300, sample=50)] if gone == "drain3" else [
        bench.logbert_train(CPU, 1, SMALL, steps=1, turns=1), bench.logbert_score(CPU, 1, "bag", SMALL)]
    for row in rows:
        assert f"| - | {row.unit} | not installed: pip install {gone} |" in bench.line("name", row)
        assert row.rates.shape == (1, 1) and row.rates[0, 0] > 0


@pytest.mark.parametrize("gone", ["transformers", "drain3"])
def test_rows_with_their_peer(gone):
    pytest.importorskip(gone)
    rows = [bench.logs_prepare(CPU, 2, SMALL, lines=300, sample=50)] if gone == "drain3" else [
        bench.logbert_train(CPU, 2, SMALL, steps=1, turns=1), bench.logbert_score(CPU, 2, "ordered", SMALL, sample=3)]
    for row in rows:
        assert row.rates.shape == (2, 2) and (row.rates > 0).all() and "x (" in bench.ratio(row)


def test_guard_row_runs_from_the_command_line(monkeypatch, capsys):
    row = bench.ROWS["train_logbert guard on / off"]
    monkeypatch.setitem(bench.ROWS, "train_logbert guard on / off",
                        lambda device, pairs: row(device, pairs, SMALL, steps=2, turns=1))
    bench.main(["guard"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 3 and len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| train_logbert guard on / off | ") and " % (" in table[2]


def test_the_guarded_and_the_plain_step_do_the_same(monkeypatch):
    models, build = [], bench.logbert.LogBERT
    monkeypatch.setattr(bench.logbert, "LogBERT", lambda *about: models.append(build(*about)) or models[-1])
    for side in [bench.logbert_steps(CPU, SMALL, 5, guarded) for guarded in (True, False)]:
        assert side() == 5 * SMALL.batch_size
    for mine, other in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


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
