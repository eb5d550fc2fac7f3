"""What a run is given and leaves behind: flags, checkpoints and the run folder of runs.py.

The checkpoints are damaged for real: every bit of one is flipped, processes are killed while they save, a disk is full.
"""
import builtins
import dataclasses
import errno
import json
import math
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn as nn

import runs
import train_edl
from runs import (Run, checkpoints, load_newest, load_tensors, model_tensors, newest, parse_flags, read_file, restore,
                  resume_config, save_checkpoint, write_file)
from tiny import Config, fingerprint, make_net

ALIASES = {"lr": "learning_rate", "no_norm": "use_norm=False", "offline": "wandb=offline",
           "data_name": "data_dir=data/tiny/{}"}


# --------------------------------------------------------------------------------------------------------------- flags
def flags(*argv):
    return parse_flags(Config, list(argv), "Trains a tiny thing.\n\n  python tiny.py --seed 3", ALIASES)


def refused(capsys, *argv):
    """The one line that these flags end in."""
    with pytest.raises(SystemExit) as stop:
        flags(*argv)
    output = capsys.readouterr()
    assert (stop.value.code, output.out, output.err[:7], output.err.count("\n")) == (2, "", "error: ", 1), output
    return output.err


def test_nothing_given_is_all_defaults():
    assert flags() == (Config(), set())


@pytest.mark.parametrize("argv,expected", [
    (["--seed", "3"], {"seed": 3}), (["--grad_accum=2"], {"grad_accum": 2}), (["--grad-accum", "2"], {"grad_accum": 2}),
    (["--learning-rate", "1e-4"], {"learning_rate": 1e-4}), (["--learning_rate", "1"], {"learning_rate": 1.0}),
    (["--dropout", "-0.5"], {"dropout": -0.5}), (["--run_name", "a b"], {"run_name": "a b"}),
    (["--verbose"], {"verbose": True}), (["--no_verbose"], {"verbose": False}),
    (["--no_use_norm"], {"use_norm": False}), (["--no-use-norm"], {"use_norm": False}),
    (["--use_norm", "--no_use_norm"], {"use_norm": False}),
    (["--seed", "1", "--seed", "2"], {"seed": 2}), (["--lr", "0.5"], {"learning_rate": 0.5}),
    (["--no_norm"], {"use_norm": False}), (["--no-norm"], {"use_norm": False}), (["--offline"], {"wandb": "offline"}),
    (["--data_name", "big"], {"data_dir": "data/tiny/big"}),
    (["--data-name", "big", "--seed", "1"], {"data_dir": "data/tiny/big", "seed": 1})])
def test_flags(argv, expected):
    config, given = flags(*argv)
    assert config == Config(**expected) and given == set(expected)
    assert all(type(getattr(config, field.name)) is field.type for field in dataclasses.fields(Config))


@pytest.mark.parametrize("argv,says", [
    (["--seeed", "3"], "unknown flag --seeed: did you mean --seed?"), (["--see", "1"], "unknown flag --see"),
    (["--learnin_rate=1"], "did you mean --learning_rate?"), (["--zzz"], "unknown flag --zzz; --help"),
    (["stray"], "unknown flag stray"), (["--seed", "three"], "--seed: invalid int value: 'three'"),
    (["--seed", "1.5"], "--seed"), (["--seed"], "expected one argument"), (["--learning_rate", "nan"], "'nan'"),
    (["--learning_rate", "inf"], "'inf'"), (["--learning_rate=-inf"], "'-inf'"), (["--lr", "nan"], "'nan'"),
    (["--lr", "1e999"], "'1e999'"), (["--dropout", "much"], "'much'"), (["--use_norm=maybe"], "--use_norm")])
def test_a_bad_flag_is_one_line_and_exit_2(capsys, argv, says):
    assert says in refused(capsys, *argv)


def test_help_tells_every_comment_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        flags("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "python tiny.py --seed 3" in text
    comments = [line.split("  # ")[1] for line in Path(__file__).with_name("tiny.py").read_text().splitlines()
                if line.startswith("    ") and not line.startswith("     ") and ": " in line and "  # " in line]
    assert len(comments) == len(dataclasses.fields(Config))
    for field, comment in zip(dataclasses.fields(Config), comments):
        assert f"{comment} (default: {field.default!r})" in text and f"--{field.name}" in text
    for target in ("is --learning_rate", "is --use_norm=False", "is --wandb=offline", "is --data_dir=data/tiny/X"):
        assert target in text


def test_flags_override_a_config_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"seed": 5, "learning_rate": 1, "use_norm": False}))
    config, given = flags("--seed", "6", "--config", str(path))
    assert config == Config(seed=6, learning_rate=1, use_norm=False) and given == {"seed", "learning_rate", "use_norm"}
    path.write_text(json.dumps({"config": {"seed": 5}, "world_size": 2}))       # as a run's folder has it
    assert flags("--config", str(path))[0] == Config(seed=5)


@pytest.mark.parametrize("content,says", [
    ('{"sed": 1}', "unknown field sed"), ('{"seed": "1"}', "seed wants a int, not '1'"), ('{"seed": 1.5}', "seed"),
    ('{"seed": true}', "seed"), ('{"use_norm": 1}', "use_norm wants a bool"),
    ('{"learning_rate": "1e-3"}', "learning_rate"), ('{"learning_rate": null}', "learning_rate"),
    ('{"run_name": 7}', "run_name"), ("[1]", "not a JSON object"),
    ("{", "not a JSON object"), ("", "not a JSON object"), ('{"config": 5}', "not a JSON object"),
    ('{"learning_rate": NaN}', "not a JSON object"), ('{"learning_rate": -Infinity}', "not a JSON object"),
    ('{"learning_rate": 1e999}', "not a JSON object")])
def test_a_bad_config_file_is_one_line_and_exit_2(capsys, tmp_path, content, says):
    path = tmp_path / "config.json"
    path.write_text(content)
    line = refused(capsys, "--config", str(path))
    assert str(path) in line and says in line


@pytest.mark.parametrize("end", ["yaml", "yml"])
@pytest.mark.parametrize("there", [True, False])
def test_a_yaml_config_is_refused_with_the_line_that_converts_it(capsys, tmp_path, end, there):
    """JSON is valid YAML, so the line can be tried out here with a stand-in for the yaml package."""
    path = tmp_path / f"my.run.{end}"
    if there:
        path.write_text('{"seed": 5, "learning_rate": 0.5}')
    line = refused(capsys, "--config", str(path))
    code = line.split("python -c ")[1].strip()
    assert code == (f"\"import yaml, json; json.dump(yaml.safe_load(open('{path}')), "
                    f"open('{tmp_path / 'my.run.json'}', 'w'))\"")
    if there:
        (tmp_path / "yaml.py").write_text("from json import load as safe_load\n")
        subprocess.run(f"{sys.executable} -c {code}", shell=True, check=True, cwd=tmp_path)
        assert flags("--config", str(tmp_path / "my.run.json"))[0] == Config(seed=5, learning_rate=0.5)


def test_a_missing_config_file_is_one_line_and_exit_2(capsys, tmp_path):
    assert "No such file" in refused(capsys, "--config", str(tmp_path / "none.json"))
    assert str(tmp_path) in refused(capsys, "--config", str(tmp_path))


def test_resume_takes_the_checkpoint_and_free_flags(capsys):
    saved = dataclasses.asdict(Config(seed=5, dropout=0.3, learning_rate=0.5))
    config, given = flags("--learning_rate", "0.25", "--seed", "5")
    resumed = resume_config(config, given, saved, ["seed", "dropout", "data_dir"])
    assert resumed == Config(seed=5, dropout=0.3, learning_rate=0.25)
    config, given = flags("--dropout", "0.1")       # the default, but said aloud: that is not what was trained
    with pytest.raises(SystemExit) as stop:
        resume_config(config, given, saved, ["seed", "dropout", "data_dir"])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and "--dropout is 0.3 in the checkpoint, not 0.1" in line


# --------------------------------------------------------------------------------------------------------- checkpoints
class Odd(nn.Module):
    """Everything that a file may have to hold: tied weights, bfloat16, integers, booleans, 0-dim, empty, transposed."""
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.across = nn.Parameter(torch.randn(3, 5).T)
        self.register_buffer("mean", torch.randn(3).bfloat16())
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("passing", torch.zeros(2), persistent=False)

    def forward(self):
        return self.head(self.embed.weight).sum() + self.across.square().sum()


def odd_run(steps, seed=0):
    torch.manual_seed(seed)
    model = Odd()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    take_steps(model, optimizer, steps)
    return model, optimizer


def take_steps(model, optimizer, steps):
    for _ in range(steps):
        model().backward()
        optimizer.step()
        optimizer.zero_grad()


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        *[tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)])


def test_a_checkpoint_brings_back_every_bit(tmp_path):
    model, optimizer = odd_run(3)
    model.count += 1
    path = save_checkpoint(tmp_path, 3, model, optimizer, {"config": {"seed": 1}, "guard": {"scale": 2.0}})
    assert path == tmp_path / "step-00000003.safetensors"
    found, tensors, body = newest(tmp_path)
    assert found == path and body["step"] == 3 and body["config"] == {"seed": 1} and body["guard"] == {"scale": 2.0}
    other, its_optimizer = odd_run(1, seed=9)
    restore(other, its_optimizer, tensors, body)
    assert other.head.weight is other.embed.weight
    for (name, tensor), again in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert same_bits(tensor, again), name
    assert fingerprint(model, optimizer) == fingerprint(other, its_optimizer)
    take_steps(model, optimizer, 3)
    take_steps(other, its_optimizer, 3)
    assert fingerprint(model, optimizer) == fingerprint(other, its_optimizer), "3 + 3 steps are 6 steps"


def test_a_checkpoint_before_the_first_step(tmp_path):
    model, optimizer = odd_run(0)
    save_checkpoint(tmp_path, 0, model, optimizer, {})
    other, its_optimizer = odd_run(2, seed=9)
    restore(other, its_optimizer, *newest(tmp_path)[1:])
    for run in ((model, optimizer), (other, its_optimizer)):
        take_steps(*run, 2)
    assert fingerprint(model, optimizer) == fingerprint(other, its_optimizer)


def test_the_file_is_plain_safetensors_with_tied_weights_once(tmp_path):
    model, optimizer = odd_run(1)
    path = save_checkpoint(tmp_path, 1, model, optimizer, {})
    names = set(safetensors.torch.load_file(path))
    model_names = {"embed.weight", "across", "mean", "count", "mask", "empty"}
    assert names == {f"model.{name}" for name in model_names} | {
        f"opt.{name}.{moment}" for name in ("embed.weight", "across") for moment in ("exp_avg", "exp_avg_sq", "step")}
    assert path.read_bytes()[8:9] == b"{", "JSON and raw numbers: no zip, no pickle"


def test_wrappers_leave_no_trace_in_the_file(tmp_path):
    class Wrapped(nn.Module):                       # as DistributedDataParallel does
        def __init__(self, model):
            super().__init__()
            self.module = model
    model, optimizer = odd_run(1)
    plain = read_file(save_checkpoint(tmp_path / "", 1, model, optimizer, {}))[0]
    compiled = torch.compile(model)
    for step, wrapped in enumerate([Wrapped(model), compiled, Wrapped(compiled), torch.compile(Wrapped(model))], 2):
        tensors, body = read_file(save_checkpoint(tmp_path, step, wrapped, optimizer, {}))
        assert tensors.keys() == plain.keys() and body["optimizer"] == ["across", "embed.weight"]
        restore(wrapped, optimizer, tensors, body)


def test_keep_removes_the_oldest_only(tmp_path):
    model, optimizer = odd_run(1)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=0)
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-0000000{n}.safetensors" for n in (1, 2, 3)]
    (tmp_path / "best.safetensors").write_bytes(b"not ours to delete")
    save_checkpoint(tmp_path, 10, model, optimizer, {}, keep=2)
    left = ["best.safetensors", "step-00000003.safetensors", "step-00000010.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_a_save_never_removes_itself(tmp_path):
    """A run that went back behind a damaged file saves below it, at other intervals than before."""
    model, optimizer = odd_run(1)
    for step in (10, 20, 30):
        path = save_checkpoint(tmp_path, step, model, optimizer, {}, keep=3)
    damage(path, "truncated")
    for step in (22, 24):
        path = save_checkpoint(tmp_path, step, model, optimizer, {}, keep=1)
        assert newest(tmp_path)[0] == path


@pytest.mark.parametrize("where", ["weight", "moment", "buffer"])
def test_a_non_finite_state_counts_for_nothing(tmp_path, where):
    model, optimizer = odd_run(1)
    for step in (1, 2):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=2)
    moment = optimizer.state[model.across]["exp_avg"]
    {"weight": model.across.data, "moment": moment, "buffer": model.mean}[where][0] = math.inf
    path = save_checkpoint(tmp_path, 3, model, optimizer, {}, keep=1)
    assert path.name == "step-00000003.safetensors.nonfinite" and len(checkpoints(tmp_path)) == 2
    assert newest(tmp_path)[2]["step"] == 2 and read_file(path)[1]["step"] == 3, "it is there for a look"


def damage(path, how):
    blob = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(blob[:8], "little")
    if how == "truncated":
        blob = blob[:-100]
    elif how == "truncated header":
        blob = blob[:header // 2]
    elif how == "empty file":
        blob = b""
    elif how == "flipped data bit":
        blob[-50] ^= 4
    elif how == "flipped header bit":
        blob[blob.index(b'"body') + 40] ^= 1
    elif how == "zeroed page":
        blob[header:header + 64] = bytes(64)
    elif how == "other shape":
        blob = blob.replace(b'"shape":[7,4]', b'"shape":[4,7]')
    elif how == "other type":
        blob = blob.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1)
    elif how == "something else":
        blob = b"<html>502 Bad Gateway</html>" * 50
    assert bytes(blob) != path.read_bytes()
    path.write_bytes(blob)


@pytest.mark.parametrize("how", ["truncated", "truncated header", "empty file", "flipped data bit",
                                 "flipped header bit", "zeroed page", "other shape", "other type", "something else"])
def test_a_damaged_file_is_named_passed_over_and_kept(tmp_path, how):
    model, optimizer = odd_run(1)
    paths = [save_checkpoint(tmp_path, step, model, optimizer, {}) for step in (1, 2, 3)]
    for path in paths[1:]:
        damage(path, how)
    said = []
    assert newest(tmp_path, said.append)[0] == paths[0]
    assert [str(path) in line for path, line in zip(reversed(paths[1:]), said, strict=True)] == [True, True]
    assert all("passed over a damaged checkpoint" in line for line in said) and all(path.exists() for path in paths)
    damage(paths[0], how)
    assert newest(tmp_path, said.append) is None and len(said) == 5


def test_an_empty_or_absent_folder_has_no_newest(tmp_path):
    assert newest(tmp_path) is None and newest(tmp_path / "none") is None and checkpoints(tmp_path / "none") == []


def test_every_single_bit_flip_is_found(tmp_path):
    """All bits of a small file: header, names, checksums, data."""
    path = tmp_path / "small.safetensors"
    write_file(path, {"model.a": torch.randn(3), "opt.a.step": torch.tensor(2.0)}, {"step": 2, "note": "x"})
    whole, (tensors, body) = path.read_bytes(), read_file(path)
    with open(path, "r+b") as file:
        for bit in range(8 * len(whole)):
            changed = whole[bit // 8] ^ 1 << bit % 8
            file.seek(bit // 8)
            file.write(bytes([changed]))
            file.flush()
            try:
                again, its_body = read_file(path)
            except ValueError:
                pass
            else:                                   # white space around the header: nothing that is read has changed
                assert its_body == body and again.keys() == tensors.keys(), f"bit {bit} of {whole[:bit // 8 + 1]}"
                assert all(same_bits(again[name], tensors[name]) for name in tensors)
            file.seek(bit // 8)
            file.write(whole[bit // 8:bit // 8 + 1])
    file.close()
    assert read_file(path)[1] == body


def test_sigkill_while_saving(tmp_path):
    """Thirty times: a process that saves in a loop is killed at a random moment, and the newest file is whole."""
    model = nn.Linear(512, 400)                     # 2.5 MB with its moments: a save takes long enough to be hit
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(2, 512)).sum().backward()
    optimizer.step()
    last, left_over, chance = -1, 0, random.Random(0)
    for attempt in range(30):
        start = last + 1
        child = os.fork()
        if child == 0:                              # never returns: no pytest in the child
            try:
                for step in range(start, start + 10000):
                    model.bias.data.fill_(step)
                    save_checkpoint(tmp_path, step, model, optimizer, {}, keep=2)
            finally:
                os._exit(1)
        while not any(int(path.name[5:13]) >= start for path in checkpoints(tmp_path)):
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child could not save"
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        path, tensors, body = newest(tmp_path, pytest.fail)         # a file under its own name is never damaged
        assert body["step"] >= start and (tensors["model.bias"] == body["step"]).all()
        last = body["step"]
        left_over += len(list(tmp_path.glob("*.tmp.*")))
    assert left_over > 0, "no kill has hit a save"
    for path in tmp_path.glob("*.tmp.*"):           # the next save of that step takes the left-over away
        save_checkpoint(tmp_path, int(path.name[5:13]), model, optimizer, {})
    assert not list(tmp_path.glob("*.tmp.*"))


def full_disk_by_limit(monkeypatch, size=65536):
    """The kernel refuses to let any file grow past 64 KB (Python ignores the signal that comes with it)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_disk_at(call):
    def fill(monkeypatch):
        def refuse(*arguments):
            raise OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(os, call, refuse)
        return monkeypatch.undo
    return fill


@pytest.mark.parametrize("fill", [full_disk_by_limit, full_disk_at("fsync"), full_disk_at("replace")],
                         ids=["past a limit", "at fsync", "at rename"])
def test_a_full_disk_harms_no_earlier_file(tmp_path, monkeypatch, fill):
    model = nn.Linear(200, 200)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for step in (1, 2):
        path = save_checkpoint(tmp_path, step, model, optimizer, {}, keep=1)
    whole, free = path.read_bytes(), fill(monkeypatch)
    try:
        for step in (2, 3):                         # over an old file and as a new one
            with pytest.raises(OSError):
                save_checkpoint(tmp_path, step, model, optimizer, {}, keep=1)
    finally:
        free()
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and path.read_bytes() == whole
    assert newest(tmp_path)[2]["step"] == 2


def test_a_power_cut_finds_the_file_before_its_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def note_fsync(number):
        calls.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else f"{os.fstat(number).st_size} bytes")
        fsync(number)
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("rename") or replace(*paths))
    path = save_checkpoint(tmp_path, 1, *odd_run(1), {})
    assert calls == [f"{path.stat().st_size} bytes", "rename", "folder"]


@pytest.mark.parametrize("change,says", [
    (lambda model: setattr(model, "head", nn.Linear(4, 7)), r"other parameters"),
    (lambda model: model.register_buffer("extra", torch.zeros(1)), r"missing \['extra'\], unexpected \[\]"),
    (lambda model: delattr(model, "mean"), r"missing \[\], unexpected \['mean'\]"),
    (lambda model: setattr(model, "across", nn.Parameter(torch.zeros(5, 4))),
     r"across is \[5, 3\], the model wants \[5, 4\]"),
    (lambda model: setattr(model, "mean", torch.zeros(1, 3)), r"mean is \[3\], the model wants \[1, 3\]")])
def test_a_wrong_model_is_named(tmp_path, change, says):
    model, optimizer = odd_run(1)
    save_checkpoint(tmp_path, 1, model, optimizer, {})
    other, _ = odd_run(0)
    change(other)
    with pytest.raises(ValueError, match=says):
        restore(other, torch.optim.AdamW(other.parameters(), fused=True), *newest(tmp_path)[1:])


def test_another_order_of_the_optimizer_is_refused(tmp_path):
    model, optimizer = odd_run(1)
    save_checkpoint(tmp_path, 1, model, optimizer, {})
    turned = torch.optim.AdamW(list(model.parameters())[::-1], fused=True)
    with pytest.raises(ValueError, match="another order"):
        restore(model, turned, *newest(tmp_path)[1:])


def test_parameter_groups_come_back_in_place(tmp_path):
    """The moments find their parameters over two groups; learning rate and decay stay those of the script."""
    def build():
        torch.manual_seed(1)
        model = Odd()
        groups = [{"params": [model.across], "weight_decay": 0.5}, {"params": [model.embed.weight]}]
        return model, torch.optim.AdamW(groups, lr=0.01, fused=True)
    model, optimizer = build()
    take_steps(model, optimizer, 2)
    save_checkpoint(tmp_path, 2, model, optimizer, {})
    other, its_optimizer = build()
    its_optimizer.param_groups[0]["lr"] = 0.02
    restore(other, its_optimizer, *newest(tmp_path)[1:])
    assert fingerprint(model, optimizer) == fingerprint(other, its_optimizer)
    assert [(group["lr"], group["weight_decay"]) for group in its_optimizer.param_groups] == [(0.02, 0.5), (0.01, 0.01)]


def test_load_tensors_of_a_model_alone(tmp_path):
    model, other = make_net(), make_net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    write_file(tmp_path / "best.safetensors", model_tensors(model), {"about": model.about})
    tensors, body = read_file(tmp_path / "best.safetensors")
    load_tensors(other, tensors)
    assert body["about"] == {"dropout": 0.1} and all(map(torch.equal, model.parameters(), other.parameters()))


def begun(tmp_path, **fields):
    """A run's folder as it is before its first checkpoint, and the Config of a --resume that says no more."""
    config = train_edl.settle(train_edl.Config(run_name="r", out_dir=str(tmp_path), **fields), {"run_name", *fields})
    Run(config)
    return train_edl.Config(run_name="r", out_dir=str(tmp_path), resume=True), {"run_name", "out_dir", "resume"}


def test_a_resume_before_the_first_checkpoint_begins_as_it_was_begun(tmp_path, capsys):
    config, given = begun(tmp_path, n_embd=48, n_head=3, data_dir="mine", dry_run=True)
    found = train_edl.settle(config, given)
    assert (found.n_embd, found.n_head, found.data_dir, found.max_steps) == (48, 3, "mine", train_edl.DRY["max_steps"])
    assert f"there is no checkpoint in {tmp_path / 'r'}, so it starts anew" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:         # another model is another run, here as well
        train_edl.settle(dataclasses.replace(config, n_embd=64), given | {"n_embd"})
    assert stop.value.code == 2 and "--n_embd is 48" in capsys.readouterr().err


def test_a_resume_of_nothing_says_so(tmp_path, capsys):
    train_edl.settle(train_edl.Config(run_name="typo", out_dir=str(tmp_path), resume=True), {"run_name", "resume"})
    assert f"there is no checkpoint in {tmp_path / 'typo'}, so it starts anew" in capsys.readouterr().out


def test_a_resume_without_a_whole_checkpoint_is_refused(tmp_path, capsys):
    config, given = begun(tmp_path)
    (tmp_path / "r/step-00000003.safetensors").write_bytes(b"cut off")
    with pytest.raises(SystemExit) as stop:
        train_edl.settle(config, given)
    said = capsys.readouterr()
    assert stop.value.code == 2 and "none of the checkpoints in" in said.err and said.err.count("\n") == 1
    assert "step-00000003.safetensors is not a whole" in said.out


def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        Run(train_edl.Config(run_name="r", out_dir=str(tmp_path / "file")))
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(f"error: --out_dir {tmp_path / 'file'}: ")


def load_newest_here(folder):
    with pytest.MonkeyPatch.context() as patch:
        if runs.rank() == 1:                        # it must not look itself: a folder may seem otherwise from there
            patch.setattr(runs, "newest", None)
        found = load_newest(folder, torch.device("cpu"))
    return found and (found[1]["step"], float(found[0]["model.bias"][0]))


def test_all_ranks_load_the_checkpoint_that_rank_0_found_whole(pair, tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    assert pair.run(load_newest_here, tmp_path) == [None, None]
    for step in (1, 2):
        model.bias.data.fill_(step)
        path = save_checkpoint(tmp_path, step, model, optimizer, {})
    assert pair.run(load_newest_here, tmp_path) == [(2, 2.0)] * 2
    damage(path, "flipped data bit")
    assert pair.run(load_newest_here, tmp_path) == [(1, 1.0)] * 2
    assert load_newest_here(tmp_path) == (1, 1.0)


# ---------------------------------------------------------------------------------------------------------- run folder
def config_in(tmp_path, **options):
    return Config(out_dir=str(tmp_path / "out"), run_name="r", **options)


def stats(loss=1.0, skipped=0, **options):
    return {"steps": 2, "loss": loss, "parts": {"half": loss / 2}, "grad_norm": loss, "skipped": skipped} | options


def strict(line):
    def refuse(name):
        raise ValueError(f"{name} is no JSON")
    return json.loads(line, parse_constant=refuse)


def rows_of(run):
    return [strict(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_config_json_is_valid_input(tmp_path):
    config = config_in(tmp_path, seed=5, use_norm=False, learning_rate=0.25)
    run = Run(config, derived={"max_steps": 100})
    about = strict((run.folder / "config.json").read_text())
    assert about["derived"] == {"max_steps": 100} and about["torch"] == torch.__version__ and about["world_size"] == 1
    assert flags("--config", str(run.folder / "config.json"))[0] == config
    assert int((run.folder / "train.pid").read_text()) == os.getpid()


def test_without_git_the_commit_is_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert strict((Run(config_in(tmp_path)).folder / "config.json").read_text())["commit"] == ""


def test_metrics_are_strict_json(tmp_path, capsys):
    run = Run(config_in(tmp_path))
    run.progress(2, 10, stats(1.5), 0.1, 32, "rows")
    run.progress(4, 10, stats(math.nan, 2), 0.1, 32, "rows")        # a poll in which no step was taken
    run.measure(4, "val", loss=math.inf, low=-math.inf, accuracy=0.5, table={"a": {"b": math.nan}}, series=[math.nan])
    first, second, third = rows_of(run)
    assert (first["step"], first["split"], first["lr"], first["skipped"]) == (2, "train", 0.1, 0)
    assert (first["loss"], first["parts"]) == (1.5, {"half": 0.75})
    assert (second["loss"], second["parts"]) == (None, {"half": None})
    assert second["grad_norm"] is None and second["skipped"] == 2 and second["rows_per_s"] > 0
    assert third == {"step": 4, "split": "val", "loss": None, "low": None, "accuracy": 0.5,
                     "table": {"a": {"b": None}}, "series": [None]}
    said = capsys.readouterr().out
    assert "step 2/10 20.0% | loss 1.5000 half 0.7500 | grad norm 1.500" in said and "skipped 2" in said
    assert said == (run.folder / "train.log").read_text(), "what was printed"


def test_a_resume_goes_on_in_the_same_folder(tmp_path):
    run = Run(config_in(tmp_path))
    for step in (2, 4, 6):
        run.progress(step, 10, stats(), 0.1, 32, "rows")
        run.measure(step, "val", loss=2.0)          # made again by a resume, which begins with the evaluation
    run.log("only for the file", shown=False)
    before = (run.folder / "train.log").read_text()
    again = Run(config_in(tmp_path), start=4)
    again.log("resumed")
    again.progress(6, 10, stats(0.5), 0.1, 32, "rows")
    assert [(row["step"], row["loss"]) for row in rows_of(again)] == [(2, 1.0), (2, 2.0), (4, 1.0), (6, 0.5)]
    assert (run.folder / "train.log").read_text().startswith(before + "resumed\n")
    assert rows_of(Run(config_in(tmp_path))) == [], "a run that starts at 0 measures anew"


def test_a_resume_after_a_kill_in_the_middle_of_a_line(tmp_path):
    run = Run(config_in(tmp_path))
    run.measure(2, "train", loss=1.0)
    run.measure(4, "train", loss=1.0)
    path = run.folder / "metrics.jsonl"
    path.write_text(path.read_text()[:-10])
    assert [row["step"] for row in rows_of(Run(config_in(tmp_path), start=4))] == [2]


@pytest.mark.parametrize("name,size", [("metrics.jsonl", 65536), ("config.json", 0)])
def test_a_resume_on_a_full_disk_or_killed_while_it_writes_loses_nothing(tmp_path, monkeypatch, name, size):
    """It writes both again: into the old file a kill in the middle would be as bad as the full disk here."""
    run = Run(config_in(tmp_path))
    for step in range(500):
        run.measure(step, "train", loss=1.0, note="x" * 200)
    path = run.folder / name
    whole, free = path.read_bytes(), full_disk_by_limit(monkeypatch, size)
    try:
        with pytest.raises(OSError):
            Run(config_in(tmp_path), start=500)
    finally:
        free()
    assert path.read_bytes() == whole and len(whole) > size
    assert not list(run.folder.glob("*.tmp.*"))


def test_only_rank_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "rank", lambda: 1)
    run = Run(config_in(tmp_path))
    run.log("x")
    run.progress(2, 10, stats(), 0.1, 32, "rows")
    run.measure(2, "val", loss=1.0)
    run.curves()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    run = Run(config_in(tmp_path))
    for step, loss in ((2, 1.0), (4, math.nan), (6, 0.5)):
        run.progress(step, 10, stats(loss, skipped=step // 4), 0.1, 32, "rows")
    run.measure(6, "val", loss=0.7, accuracy=0.5)
    run.measure(6, "test", accuracy=0.5)
    run.curves()
    picture = (run.folder / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    Run(config_in(tmp_path), start=6).curves()
    assert (run.folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def block(monkeypatch, *packages):
    """As if they were not installed."""
    real = builtins.__import__

    def blocked(name, *arguments, **options):
        if name.split(".")[0] in packages:
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **options)
    monkeypatch.setattr(builtins, "__import__", blocked)
    for name in list(sys.modules):
        if name.split(".")[0] in packages:
            monkeypatch.delitem(sys.modules, name)


def test_without_matplotlib_it_says_so_once(tmp_path, monkeypatch, capsys):
    block(monkeypatch, "matplotlib")
    run = Run(config_in(tmp_path))
    run.progress(2, 10, stats(), 0.1, 32, "rows")
    run.curves()
    run.curves()
    assert capsys.readouterr().out.count("no curves.png: pip install matplotlib") == 1
    assert not (run.folder / "curves.png").exists()


def test_wandb_is_wanted_but_missing(tmp_path, monkeypatch, capsys):
    block(monkeypatch, "wandb")
    with pytest.raises(SystemExit) as stop:
        Run(config_in(tmp_path, wandb="offline"))
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line == "error: --wandb offline needs the package: pip install wandb\n"


def test_wandb_gets_what_metrics_get(tmp_path, monkeypatch):
    class Wandb:
        logged, begun = [], []
        init = classmethod(lambda self, **options: self.begun.append(options) or self)
        log = classmethod(lambda self, values, step: self.logged.append((step, values)))
    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    run = Run(config_in(tmp_path, wandb="offline"))
    run.measure(3, "val", loss=0.5)
    assert Wandb.logged == [(3, {"val/loss": 0.5})]
    assert (Wandb.begun[0]["mode"], Wandb.begun[0]["name"], Wandb.begun[0]["config"]["seed"]) == ("offline", "r", 0)


@pytest.mark.parametrize("seconds,text", [(0, "0m 00s"), (81.9, "1m 21s"), (5000, "1h 23m"), (360000, "100h 00m")])
def test_clock(seconds, text):
    assert runs.clock(seconds) == text
