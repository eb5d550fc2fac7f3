"""Every parser and loader on damaged files: it succeeds, or says why in one line, and leaves nothing half-written.

A short run by default; `python -m pytest tests/test_fuzz.py -m slow` damages 10,000 files for each. A failure names the
seed, which fuzz(name, folder, [seed]) repeats, and the damaged file still lies in its folder."""
import contextlib
import functools
import gzip
import inspect
import io
import os
import random
import re
import resource
import shutil
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fuzz_tools as whole
import train_adapter
import train_distill
import train_edl
import train_logbert
import train_student
from data.files import or_fail
from data.logs import prepare as logs
from data.molecules import prepare as molecules
from data.scenes import prepare as scenes
from data.scenes import report
from data.scenes.tokens import load_tokenizer as load_clip_tokenizer
from data.spectra import prepare as spectra
from data.text import prepare as text
from fuzz_tools import FIXTURES, SCRIPTS, again, log_flags, mutate
from runs import newest, parse_flags, read_file

# -------------------------------------------------------------------------------------------------- what may come of it
class Hangs(BaseException):                         # no Exception, so that no parser takes it for its own
    pass

@contextlib.contextmanager
def limits(seconds=30, gigabytes=6):
    """Raises Hangs when the time is over; what asks for more memory gets a MemoryError and not all of the machine's."""
    def stop(*_):
        raise Hangs(f"still at work after {seconds} s")
    handler, (soft, hard) = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + gigabytes * 2 ** 30, hard))
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, handler)

def succeeds(call, names):
    """Does it? If not, it must end in code 2 and one line that says which of the names is to blame."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors, write_through=True)      # as those of a process
                for errors in ("strict", "backslashreplace"))
    try:
        with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), limits(),
              warnings.catch_warnings(record=True) as warned):
            warnings.filterwarnings("ignore", "Reading `.npy`")      # numpy's, of a header that looks like Python 2's
            call()
    except SystemExit as stop:
        said = err.buffer.getvalue().decode()
        assert stop.code == 2 and re.fullmatch(r"error: .*\n", said), (stop.code, said)
        assert not warned, [*map(str, warned)]      # each would be another line
        assert any(str(name) in said for name in names), (names, said)
        return False
    return True

def lay_out(name, folder):
    """-> (the good files of a target that may be damaged, path -> does it succeed? with folder as it was if not)"""
    make, patterns, call = TARGETS[name]
    given, out = folder / "in", folder / "out"
    given.mkdir(), out.mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        make(given)
    there = {*folder.rglob("*")}

    def look(path):
        if well := succeeds(functools.partial(call, given, out, path), ("--", path.name, path.parent, "unknown flag")):
            shutil.rmtree(out), out.mkdir()
        else:
            assert {*folder.rglob("*")} == there, {*folder.rglob("*")} ^ there
        return well
    return [path for pattern in patterns for path in sorted(given.glob(pattern))], look

def fuzz(name, folder, seeds):
    """-> how many of the damaged files were refused"""
    paths, look = lay_out(name, folder)
    assert all(map(look, paths))                    # what is damaged was good before
    good, refused = {path: path.read_bytes() for path in paths}, 0
    for seed in seeds:
        rng = random.Random(f"{name} {seed}")
        path = rng.choice(paths)
        path.write_bytes(mutate(rng, path.name, good[path]))
        try:
            refused += not look(path)
        except BaseException as error:
            error.add_note(f"fuzz {name!r}, seed {seed}: {path}, {path.read_bytes()[:300]!r}")
            raise
        path.write_bytes(good[path])
    return refused

# -------------------------------------------------------------------------------------------------------------- targets
TARGETS = {}                                        # name -> (make(given), patterns of what is damaged, call)

def target(make, *patterns):
    """Registers call(given, out, path): path is the damaged one of the files that make(given) has written."""
    def register(call):
        TARGETS[call.__name__] = make, patterns, call
    return register

def loads(script, folder, **fields):
    config = script.Config(data_dir=str(folder), batch_size=2, **fields)
    data = script.load_data(config)
    for split in ("train", "val"):
        script.get_batch(data, split, 0, config)

def prepares(given, out, script, module, *flags):
    """What prepare.py makes of it, if anything, is a set that its script trains on."""
    folder = module.main([*map(str, flags), "--name", "set", "--out_dir", str(out)])
    if module is scenes and '"val": 0' in (folder / "meta.json").read_text():
        return                                      # one picture alone cannot be shared out
    try:
        loads(script, folder, **{"phase": "teacher"} if script is train_student else {})
    except SystemExit as stop:
        raise AssertionError("load_data refuses what prepare.py made") from stop

@target(whole.write_molecules, "in.*")
def molecule_files(given, out, path):
    more = ["--scaffold", "--props", "logp"] if path.suffix == ".csv" else []
    prepares(given, out, train_edl, molecules, "--input", path, "--workers", 1, *more)

@target(whole.write_spectra, "in.*", "mol/*")
def spectra_files(given, out, path):
    structures = ["--sdf", path if ".sdf" in path.name else given / "in.sdf"]
    structures = ["--mol_dir", path.parent] if path.suffix == ".MOL" else structures
    prepares(given, out, train_student, spectra, "--msp", path if ".msp" in path.name else given / "in.msp",
             "--max_mz", 99, "--workers", 1, *structures)

@target(whole.write_text, "in.*")
def text_files(given, out, path):
    prepares(given, out, train_distill, text, "--input", path)

@target(whole.write_tokenizers, "*/*.json")
def tokenizers(given, out, path):
    prepares(given, out, train_distill, text, "--input", given / "in.jsonl", "--tokenizer", path.parent)

@target(whole.write_language_models, "*/*.json", "*/*model*")
def language_models(given, out, path):
    train_distill.load_hf(path.parent)

@target(whole.write_diffusers, "sd1/*/*", "adapter.safetensors")
def diffusers_folders(given, out, path):
    if path.parent == given:
        or_fail(train_adapter.adapter_flags, path)
        or_fail(train_adapter.load_unet, given / "sd1", torch.float32, path)
    else:
        load = {"unet": train_adapter.load_unet, "vae": scenes.load_vae, "text_encoder": scenes.load_text_encoder,
                "scheduler": train_adapter.load_schedule, "tokenizer": load_clip_tokenizer}[path.parent.name]
        or_fail(load, given / "sd1")

@target(whole.write_scenes, "raw/*")
def scene_files(given, out, path):
    raw, source = given / "raw", ["--input", given / "raw/in.jsonl", "--boxes", "unit"]
    if path.stem == "texts":
        source += ["--embeddings", raw / "texts.safetensors"]
    elif path.suffix == ".json":
        source = ["--coco", raw / "instances.json", "--captions", raw / "captions.json", "--images", raw]
    prepares(given, out, train_adapter, scenes, "--base", FIXTURES / "scenes/sd1", *source, "--workers", 1, "--device",
             "cpu")

@functools.cache
def toy(folder):
    return train_adapter.load_data(train_adapter.Config(data_dir=str(folder)))

@target(whole.write_layouts, "*.json")
def layouts(given, out, path):
    flags, data = SimpleNamespace(layout=path, embeddings=""), toy(given / "set")
    for number, layout in enumerate(or_fail(report.read_layouts, flags, data.meta["slots"]), 1):
        or_fail(report.batch_of, data, report.ToyTexts(), flags, number, *layout)

@target(whole.write_logs, "*.*")
def log_files(given, out, path):
    prepares(given, out, train_logbert, logs, *log_flags(given, path))

@target(whole.write_runs, "hdfs.log*", "bgl.log", "hdfs/*", "bgl/*")
def logs_to_score(given, out, path):
    name = path.parent.name if path.parent != given else path.name.partition(".")[0]
    source = path if path.parent == given else given / f"{name}.log"
    train_logbert.main(["score", "--run_name", name, "--out_dir", str(given), "--input", str(source), "--out",
                        str(out / "scores.csv"), "--batch_size", "3", "--device", "cpu"])

@target(whole.write_checkpoints, "*2.safetensors")
def checkpoints(given, out, path):
    told = []
    _, tensors, body = newest(given, told.append)
    assert body["step"] == 2 - len(told) and torch.equal(tensors["model.a"], torch.arange(6.).view(2, 3))
    or_fail(read_file, path)

@target(whole.write_configs, "*.json")
def configs(given, out, path):
    script = SCRIPTS[path.stem]
    parse_flags(script.Config, ["--config", str(path)], "", script.ALIASES)

@target(whole.write_flags, "*")
def flags(given, out, path):
    words, script = os.fsdecode(path.read_bytes().replace(b"\0", b"")).split("\n"), SCRIPTS[path.stem]
    script.settle(*parse_flags(script.Config, [*words, "--out_dir", str(out)], "", script.ALIASES))

@target(whole.write_sets, "*/set/*.npy", "*/set/meta.json", "*/set/sessions.txt", "*/set/molecules.csv")
def sets(given, out, path):
    name = path.parts[-3]
    loads(SCRIPTS[name], path.parent, **{"edl": dict(scaffold=True, props="qed"), "student": dict(phase="teacher"),
                                         "logbert": dict(use_gaps=True)}.get(name, {}))

@target(whole.write_sets, "[!l]*/set/meta.json", "logbert/set/meta.json")
def sets_that_are_there(given, out, path):
    again(given, path.parts[-3])

# ---------------------------------------------------------------------------------------------------------------- tests
@pytest.fixture(autouse=True)
def models_once(monkeypatch):
    """The base of the scenes is whole whatever row or picture is damaged, and so is a script: they are read once."""
    for name in ("load_vae", "load_text_encoder"):
        monkeypatch.setattr(scenes, name, functools.cache(getattr(scenes, name)))
    monkeypatch.setattr("runs.inspect.getsource", functools.cache(inspect.getsource))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # --gpu_ids would stay

WRONG = {                                           # once a traceback or a second line: file, content, does it succeed?
    "configs": [("edl.json", b"[" * 100_000, False), ("toy.json", b'{"a\\nb": 1}', False)],
    "flags": [("student.0", b"--x\ry", False), ("edl.15", b"--skip_steps\n1-99999999999999", False)],
    "text_files": [("in.jsonl", b"\n".join(b'{"instruction": "%d", "response": "b", "\\ud800": 1, "split": "%s"}' % pair
                                           for pair in enumerate((b"train", b"val"))), True)],
    "molecule_files": [("in.smi", b"CC", False)],
    "tokenizers": [("bpe/tokenizer_config.json", b"[" * 100_000, False),
                   ("llama/config.json", b'{"eos_token_id": {}}', False),
                   ("bpe/tokenizer_config.json", b'{"eos_token": "\\ud800"}', False),
                   ("bpe/tokenizer.json", lambda good: good.replace(b'"a": 65', b'"a": 4294967290'), False)],
    "language_models": [("llama_half/pytorch_model.bin.index.json", b'{"weight_map": {"": "%0300d"}}' % 1, False)],
    "log_files": [("bgl.log", lambda good: good.replace(b"1117838590", b"9" * 400), True)],
    "diffusers_folders": [("sd1/tokenizer/special_tokens_map.json", b'{"pad_token": ["!"]}', False)],
    "logs_to_score": [("hdfs/thresholds.json", x, False) for x in (b"[]", b'{"thresholds": {"both": "x"}}')],
    "sets_that_are_there": [
        ("edl/set/meta.json", b"[" * 100_000, True), ("toy/set/meta.json", b'{"options": []}', True),
        ("student/set/meta.json", lambda good: good.replace(b'"atoms"', b'"%s"' % (b"x" * 300)), True)],
    "sets": [("logbert/set/meta.json", b"[]", False), ("distill/set/meta.json", b"{}", False),
             ("edl/set/tokens.npy", b"PK\3\4", False)]}

@pytest.mark.parametrize("name", WRONG)
def test_what_was_wrong_once(tmp_path, name):
    paths, look = lay_out(name, tmp_path)
    for file, blob, well in WRONG[name]:
        path = tmp_path / "in" / file
        good = path.read_bytes()
        path.write_bytes(blob(good) if callable(blob) else blob)
        assert path in paths and path.read_bytes() != good and look(path) is well, file
        path.write_bytes(good)

def test_arrays_that_do_not_fit(tmp_path):
    """An id that is in no table would stop a training long after the set was read; on a GPU nobody could say where."""
    _, look = lay_out("sets", tmp_path)
    for file, change in {
            "edl/offsets": lambda x: x[::-1], "edl/tokens": lambda x: x + 99, "edl/split": lambda x: x + 9,
            "student/bonds": lambda x: x + 9, "student/peak_bin": lambda x: x + 99,
            "student/peak_offsets": lambda x: x + 2 ** 40, "distill/offsets": lambda x: x << 40,
            "distill/tokens": lambda x: x.astype(int) - 200, "logbert/keys": lambda x: x + 9,
            "logbert/gaps": lambda x: -1 - x, "logbert/labels": lambda x: x + 9, "toy/phrase": lambda x: x + 50,
            "toy/labels": lambda x: x + 50, "latents/caption": lambda x: x - 7,
            "latents/phrases": lambda x: x.astype(">f2"), "latents/boxes": lambda x: x * np.nan}.items():
        path = tmp_path / "in" / file.replace("/", "/set/")
        path, good = path.with_suffix(".npy"), path.with_suffix(".npy").read_bytes()
        np.save(path, change(np.load(path)))
        assert not look(path), file
        path.write_bytes(good)

def test_a_log_that_breaks_off_leaves_older_scores_alone(tmp_path):
    lay_out("logs_to_score", tmp_path)
    log, scores = tmp_path / "in/bgl.log", tmp_path / "out/scores.csv"
    log.write_bytes(gzip.compress(log.read_bytes())[:-20])
    scores.write_text("older")
    assert not succeeds(functools.partial(TARGETS["logs_to_score"][2], log.parent, scores.parent, log), ["bgl.log"])
    assert [*scores.parent.iterdir()] == [scores] and scores.read_text() == "older"

@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files(tmp_path, name):
    assert fuzz(name, tmp_path, range(120)) > 0 or name == "sets_that_are_there"   # what is damaged is built anew

@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_damaged_files(tmp_path, name):
    assert fuzz(name, tmp_path, range(10_000)) > 0 or name == "sets_that_are_there"
