"""The autopsy names what was planted: operation, module or autograd node, source line, phase; and leaves no trace.

The faults stand in tiny.py, one marked line each; tiny.py also plays the script whose events are kept and replayed.
"""
import importlib
import math
import re
import types
import warnings

import pytest
import torch
import torch.nn as nn

import autopsy
import common
import tiny
from autopsy import dissect, examine
from runs import read_file
from tiny import Config, compute_loss, line_of, make_batch, make_net


def report_on(fault, model=None, dtype=torch.float32):
    """-> (report, was anything found) for one batch with this fault."""
    model, batch = model or make_net(), make_batch(fault=fault)

    def replay():
        common.seed_step(0, 0, 0)
        with common.autocast(torch.device("cpu"), dtype):
            return compute_loss(model, batch)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")              # a report is for reading: torch must not mutter in between
        return dissect(model, replay, batch, "of a test")


def births(report):
    """The lines of a report that tell where something was born or came in."""
    return [line.strip() for line in report.splitlines() if " BORN in " in line or " CAME IN " in line]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault,phase,first,where", [
    ("masked attention row", "forward", "NaN BORN in forward: _softmax", "module middle"),
    ("log(0)", "forward", "Inf BORN in forward: log", "module middle"),
    ("sqrt(0) in backward", "backward", "Inf BORN in backward: div", "autograd node SqrtBackward0"),
    ("0/0 by a batch weight", "forward", "NaN BORN in forward: div", ""),
    ("float16 cast", "forward", "Inf BORN in forward: _to_copy", "module middle"),
    ("-inf logit on a label", "forward", "Inf BORN in forward: index_fill", "module (root)"),
    ("log(0) in place", "forward", "Inf BORN in forward: log_", "module middle"),
    ("log(0) after a causal mask", "forward", "Inf BORN in forward: log", "module middle"),
    ("loss NaN", "forward", "NaN BORN in forward: mul", ""),
])
def test_a_birth_is_named(fault, phase, first, where, dtype):
    report, found = report_on(fault, dtype=dtype)
    line = next(line for line in births(report) if line.startswith(first))
    assert found and line.endswith(where) and f"at {line_of(fault)}" in report, report
    assert ("non-finite in FORWARD" if phase == "forward" else "looking in BACKWARD") in report
    assert re.search(r"  \[\d+/\d+ of b?float\d\d\[", line), "how many, of which shape"
    assert "path to " in report and "inputs: " in report


def test_a_masked_row_is_told_from_its_mask_on():
    """The mask is on the way of the NaN, so its -inf is told, and then the softmax that made NaN of it."""
    report, _ = report_on("masked attention row")
    first, second = births(report)[:2]
    assert "masked_fill" in first and "_softmax" in second and "path to loss: masked_fill -> _softmax -> mm" in report


def test_a_causal_mask_next_to_a_fault_is_not_blamed():
    report, found = report_on("log(0) after a causal mask")
    assert found and "masked_fill" not in report and " _softmax" not in report, report


def test_a_gradient_that_a_saved_inf_spoils_leads_back_to_the_forward():
    report, found = report_on("Inf behind a clamp")
    first, second = births(report)[:2]
    assert found and "looking in BACKWARD" in report and f"at {line_of('Inf behind a clamp')}" in report, report
    assert first.startswith("Inf BORN in forward: exp") and second.startswith("NaN BORN in backward: mul")


def test_nan_already_in_a_parameter():
    model = make_net()
    model.middle.linear.weight.data[1, 1] = math.nan
    report, found = report_on("", model)
    assert found and "at entry: parameter middle.linear.weight already holds NaN, 1/1024 of float32[32, 32]" in report
    assert births(report) == ["NaN CAME IN with: parameter middle.linear.weight  [1/1024 of float32[32, 32]]"], report


def test_nan_in_a_buffer_and_in_the_batch():
    model = make_net()
    model.register_buffer("shift", torch.full((tiny.CLASSES,), math.nan))
    model.last.register_forward_hook(lambda module, inputs, output: output + model.shift)
    report, found = report_on("", model)
    assert found and births(report) == ["NaN CAME IN with: buffer shift  [5/5 of float32[5]]"], report
    report, found = report_on("input NaN")
    assert found and births(report) == ["NaN CAME IN with: batch['x']  [1/128 of float32[16, 8]]"], report
    assert "at entry: batch['x'] already holds NaN, 1/128" in report


def test_an_exploded_parameter_that_is_still_finite():
    model = make_net()
    model.middle.linear.weight.data *= 1e39
    model.middle.linear.weight.data.clamp_(-3e38, 3e38)
    report, found = report_on("", model)
    assert found and "at entry: parameter middle.linear.weight is finite but huge, max|.|=3e+38" in report
    first = births(report)[0]
    assert first.startswith("Inf BORN in forward: addmm") and first.endswith("module middle.linear")
    assert f"at {line_of('gradient')}" in report and "parameter middle.linear.weight [" in report, report


def test_a_healthy_batch_is_said_to_be_healthy():
    report, found = report_on("")
    assert not found and "did NOT reproduce" in report and births(report) == [] and "at entry" not in report


def test_after_an_exception_inside_a_module_the_right_module_is_named():
    report, found = report_on("exception inside")
    assert found and births(report)[0].endswith("module (root)"), report
    assert f"at {line_of('exception inside')}" in report


@pytest.mark.parametrize("fault", ["", "log(0)", "sqrt(0) in backward", "log(0) in place"])
def test_nothing_is_left_changed(fault):
    model = make_net()
    compute_loss(model, make_batch(1))[0].backward()
    buffers = dict(model.named_buffers())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    report_on(fault, model)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "weights; buffers moved in place or replaced"
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert all(map(torch.equal, gradients, [parameter.grad for parameter in model.parameters()]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.is_anomaly_enabled() is False


def test_a_failing_replay_leaves_no_hook_and_no_changed_buffer():
    model = make_net()

    def replay():
        compute_loss(model, make_batch())
        raise RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        dissect(model, replay, make_batch(), "")
    assert model.calls == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_in_a_folder_called_torch_has_source_lines_too(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "somebodys_model.py").write_text("def loss(weight):\n    return (weight * 0).log().sum()\n")
    monkeypatch.syspath_prepend(tmp_path / "torch")
    model = nn.Linear(2, 2)
    report, found = dissect(model, lambda: importlib.import_module("somebodys_model").loss(model.weight), {}, "")
    assert found and "at somebodys_model.py:2, in loss" in report, report


# ------------------------------------------------------------------------------------------------- events that are kept
def event_of(tmp_path, fault, step=5, micro_with_fault=1, now=7, break_it=False):
    """examine() as a script calls it, on a run of two micro-batches -> the event's folder."""
    run, model, config = types.SimpleNamespace(folder=tmp_path), make_net(), Config(grad_accum=2, seed=3)

    def batch_of(micro):
        if break_it:
            raise KeyError("the data are gone")
        return make_batch(step, 0, micro, fault=fault if micro == micro_with_fault else "")

    def loss_of(batch):
        return compute_loss(model, batch, step, config)[0]
    examine("tiny", run, model, config, torch.float32, step, now, batch_of, loss_of)
    return tmp_path / "autopsy" / f"step-{step:08d}-rank0"


@pytest.mark.parametrize("fault,born", [("log(0)", "Inf BORN in forward: log"),
                                        ("sqrt(0) in backward", "Inf BORN in backward: div")])
def test_an_event_is_kept_and_replayed(tmp_path, capsys, fault, born):
    event = event_of(tmp_path, fault)
    told = capsys.readouterr()
    report = (event / "report.txt").read_text()
    assert told.out == "" and report in told.err and f"python autopsy.py {event}" in told.err
    assert "=== AUTOPSY step 5 rank 0 micro-batch 1" in report and born in report
    assert "weights: a little newer" in report and "before step 7" in report
    assert read_file(event / "model.safetensors")[1]["about"] == {"dropout": 0.1}
    net = make_net()
    common.seed_step(3, 5, 0, 1)                    # the dropout of that step and micro-batch
    loss = compute_loss(net, make_batch(5, 0, 1))[0].item()
    assert f"replayed loss = {loss:.6g} (finite" in report or fault == "log(0)", report
    tensors, about = read_file(event / "batch.safetensors")
    assert set(tensors) == {"x", "labels"} and torch.equal(tensors["x"], make_batch(5, 0, 1)["x"])
    assert about["config"]["seed"] == 3 and about["numbers"] == {"count": tiny.ROWS, "fault": fault}
    autopsy.main(str(event))
    again = capsys.readouterr().out
    assert again.strip() == report[:report.index("\n  weights: ")].strip(), "the same report to the last digit"


def test_under_stop_the_weights_are_exactly_those(tmp_path):
    assert "weights: exactly those of the step" in (event_of(tmp_path, "log(0)", now=5) / "report.txt").read_text()


def test_what_does_not_reproduce_is_reported_too(tmp_path, capsys):
    assert "did NOT reproduce" in (event_of(tmp_path, "") / "report.txt").read_text()


def test_a_failing_autopsy_does_not_end_the_run(tmp_path, capsys):
    report = (event_of(tmp_path, "", break_it=True) / "report.txt").read_text()
    assert "AUTOPSY of step 5 failed itself" in report and "KeyError: 'the data are gone'" in report


def test_a_full_disk_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(autopsy, "write_file", full)
    event_of(tmp_path, "log(0)")
    told = capsys.readouterr().err
    assert "Inf BORN in forward: log" in told and "No space left on device" in told


def examine_here(folder):
    """Rank 1's data is bad; rank 0 finds nothing and keeps nothing."""
    fault = "log(0)" if common.rank() == 1 else ""
    run, model, config = types.SimpleNamespace(folder=folder), make_net(), Config()
    examine("tiny", run, model, config, torch.float32, 5, 5, lambda micro: make_batch(5, micro=micro, fault=fault),
            lambda batch: compute_loss(model, batch)[0])


def test_only_the_rank_that_found_it_keeps_it(pair, tmp_path):
    pair.run(examine_here, tmp_path)
    assert [event.name for event in (tmp_path / "autopsy").iterdir()] == ["step-00000005-rank1"]


@pytest.mark.parametrize("folder", ["none", "."])
def test_a_wrong_folder_is_one_line_and_exit_2(tmp_path, capsys, folder):
    with pytest.raises(SystemExit) as stop:
        autopsy.main(tmp_path / folder)
    output = capsys.readouterr()
    assert (stop.value.code, output.out, output.err.count("\n")) == (2, "", 1)
    assert "give the folder of an event" in output.err


def test_a_norm_that_overflows_though_every_gradient_is_finite():
    model, batch = make_net(), make_batch()
    name, parameter = list(model.named_parameters())[2]
    report, found = dissect(model, lambda: compute_loss(model, batch)[0] + parameter.sum() * 1e25, batch, "of a test")
    assert found and f"norm overflows: {name} has max|.|=1e+25" in report, report
