"""What a run is given and what it leaves behind: flags, checkpoints, the run folder. The same for all scripts."""
import argparse
import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import subprocess
import sys
import time
import zlib
from pathlib import Path

import torch
from safetensors.torch import load as parse_safetensors, save as to_safetensors

from common import agree, fail, rank, unwrap, world_size

# ----------------------------------------------------------------------------------------------------------- flags
def finite_number(text):
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number

def parse_flags(Config, argv, doc="", aliases={}):
    """argv -> (Config, names of the fields that were given). Each field's trailing comment is its help.

    --config FILE is a JSON base that flags override. aliases: {"lr": "learning_rate"}, {"no_edl": "use_edl=False"} as a
    switch, {"data_name": "data_dir=data/molecules/{}"} with a value put in. Bad flags end in fail()."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: fail(f"{message}; --help lists the flags")
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    fields = {field.name: field for field in dataclasses.fields(Config)}
    kinds = {name: finite_number if field.type is float else field.type for name, field in fields.items()}

    def add(flag, name, **kwargs):
        parser.add_argument(*dict.fromkeys([f"--{flag}", f"--{flag.replace('_', '-')}"]), dest=name, **kwargs)
    for name, field in fields.items():
        text = f"{comments[name]} (default: {field.default!r})".replace("%", "%%")
        if field.type is bool:
            add(name, name, action="store_true", help=text)
            add(f"no_{name}", name, action="store_false", help=argparse.SUPPRESS)
        else:
            add(name, name, type=kinds[name], metavar=field.type.__name__.upper(), help=text)
    for alias, target in aliases.items():
        name, equals, value = target.partition("=")
        if equals and "{}" not in value:
            value = value == "True" if kinds[name] is bool else value
            add(alias, name, action="store_const", const=value, help=f"is --{target}")
        else:
            kind = value.format if equals else kinds[name]
            add(alias, name, type=kind, metavar="X", help=f"is --{target.replace('{}', 'X')}")
    add("config", "config", metavar="FILE", help="JSON with any of these fields; flags override it")
    given, unknown = parser.parse_known_args(argv)
    for word in unknown:
        close = difflib.get_close_matches(word, parser._option_string_actions, 1)
        fail(f"unknown flag {word}" + (f": did you mean {close[0]}?" if close else "; --help lists the flags"))
    given = vars(given)
    base = read_config(given.pop("config"), fields) if "config" in given else {}
    return Config(**(base | given)), {*base, *given}

def read_config(path, fields):
    """A JSON file of fields (or a run's config.json) -> dict, checked by name and type; bad ones end in fail()."""
    if path.endswith((".yaml", ".yml")):
        fail(f"--config {path}: YAML; JSON is made of it by: python -c \"import yaml, json; json.dump("
             f"yaml.safe_load(open('{path}')), open('{Path(path).with_suffix('.json')}', 'w'))\"")
    try:
        base = json.loads(Path(path).read_text(), parse_float=finite_number, parse_constant=finite_number)
        base = dict(base.get("config", base))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        fail(f"--config {path}: not a JSON object of fields: {error}")
    for name, value in base.items():
        if name not in fields:
            fail(f"--config {path}: unknown field {name}")
        if type(value) is not fields[name].type and not (fields[name].type is float and type(value) is int):
            fail(f"--config {path}: {name} wants a {fields[name].type.__name__}, not {value!r}")
    return base

def resume_config(config, given, saved, fixed):
    """A checkpoint's config with the given fields on top; fail() if one of the fixed ones (model, data) was changed."""
    for name in saved.keys() - vars(config).keys():
        fail(f"--resume: {config.run_name} is a run of another script, with --{name}")
    for name in sorted(given & {*fixed}):
        if getattr(config, name) != saved[name]:
            fail(f"--resume: --{name} is {saved[name]!r} in the checkpoint, not {getattr(config, name)!r}; "
                 "leave it out, or start another --run_name")
    return dataclasses.replace(config, **{name: value for name, value in saved.items() if name not in given})

def complete(config, given, cpu, dry, fixed):
    """What the flags left open, filled in from the checkpoint or the presets for a CPU and a dry run -> Config.

    given, fixed: names of the fields that flags gave, and that a resume keeps. What cannot work ends in fail()."""
    if config.resume and not config.run_name:
        names = sorted(path.parent.name for path in Path(config.out_dir).glob("*/config.json"))
        fail(f"--resume needs --run_name; there is {', '.join(names) or 'no run yet'}")
    folder, saved, main = Path(config.out_dir) / config.run_name, {}, int(os.environ.get("RANK", 0)) == 0
    if config.resume and (found := newest(folder)):
        saved = found[2]["config"]
    elif config.resume:
        if checkpoints(folder):
            fail(f"--resume: none of the checkpoints in {folder} is whole; move them away to start anew")
        if (folder / "config.json").is_file():      # it ended before its first checkpoint: begun again as it was
            fields = {field.name: field for field in dataclasses.fields(config)}
            saved = read_config(str(folder / "config.json"), fields)
        if main:
            print(f"--resume: there is no checkpoint in {folder}, so it starts anew", flush=True)
    if len(saved) == len(vars(config)):             # a chain's own config.json holds less
        config = resume_config(config, given, saved, fixed)
    else:
        cuda = config.device.startswith("cuda") or config.device == "auto" and torch.cuda.is_available()
        preset = ({} if cuda else cpu) | (dry if config.dry_run else {})
        preset = {name: value for name, value in preset.items() if name not in given}
        config = dataclasses.replace(config, **preset)
        if preset and main:
            print("dry run:" if config.dry_run else "no GPU:", *(f"--{k} {v}" for k, v in preset.items()), flush=True)
    for name in ("batch_size", "grad_accum", "learning_rate", "n_layer", "n_head", "n_embd"):
        if getattr(config, name, 1) <= 0:
            fail(f"--{name} {getattr(config, name)}: must be above 0")
    for name in ("seed", "warmup_steps", "beta1", "beta2", "weight_decay", "grad_clip", "max_skips"):
        if not 0 <= getattr(config, name) < (1 if name.startswith("beta") else math.inf):
            fail(f"--{name} {getattr(config, name)}: must not be below 0, --beta1 and --beta2 below 1")
    for name, choices in {"on_nonfinite": ("skip", "stop"), "wandb": ("", "offline", "online")}.items():
        if getattr(config, name) not in choices:
            fail(f"--{name} {getattr(config, name)}: one of {', '.join(filter(None, choices))}")
    steps_in(config.skip_steps)
    return config

def steps_in(text):
    """'17,40-45' -> {17, 40, 41, 42, 43, 44, 45}"""
    try:
        ranges = [re.fullmatch(r" *(\d{1,7}) *(?:- *(\d{0,7}) *)?", part).groups() for part in text.split(",") if part]
        return {step for first, last in ranges for step in range(int(first), int(last or first) + 1)}
    except AttributeError:                          # no match: numbers of more digits would fill the memory
        fail(f"--skip_steps {text}: write steps as 17,40-45")

# ----------------------------------------------------------------------------------------------------- checkpoints
def _crc(tensor):
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return zlib.crc32(data, zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode()))

def write_whole(path, blob):
    """Bytes to a file: complete and durable, or not there at all.

    Raises OSError (disk full, no permission); whatever stood at path before is then still there, unharmed."""
    for left_over in path.parent.glob(f"{path.name}.tmp.*"):
        left_over.unlink(missing_ok=True)           # by a process that was killed while it saved
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":                          # the rename itself must survive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

def write_file(path, tensors, body):
    """Tensors and a JSON-able body in one checksummed safetensors file, by write_whole()."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    body = json.dumps(body | {"crc32": {name: _crc(tensor) for name, tensor in tensors.items()}})
    write_whole(path, to_safetensors(tensors, {"body": body, "body_crc32": str(zlib.crc32(body.encode()))}))

def read_file(path):
    """-> (tensors, body) of a file by write_file. Raises ValueError that says what is damaged."""
    try:
        blob = Path(path).read_bytes()
        tensors = parse_safetensors(blob)
        header = json.loads(blob[8:8 + int.from_bytes(blob[:8], "little")])["__metadata__"]
        body = json.loads(header["body"])
    except Exception as error:                      # the parser raises its own types, none of them a ValueError
        raise ValueError(f"{path} is not a whole safetensors file of ours: {error}") from None
    if str(zlib.crc32(header["body"].encode())) != header.get("body_crc32"):
        raise ValueError(f"{path}: the header's checksum is wrong")
    found = {name: _crc(tensor) for name, tensor in tensors.items()}
    if wrong := [name for name in {**body["crc32"], **found} if body["crc32"].get(name) != found.get(name)]:
        raise ValueError(f"{path}: the checksum of {len(wrong)} tensor(s) is wrong: {', '.join(wrong[:3])}")
    return tensors, body

def model_tensors(model):
    """Name -> parameter (tied ones once) or buffer that belongs in a file."""
    model = unwrap(model)
    keep = set(model.state_dict())
    return dict(model.named_parameters()) | {name: buffer for name, buffer in model.named_buffers() if name in keep}

def optimizer_names(model, optimizer):
    """The optimizer's parameters by name, in its own order."""
    names = {parameter: name for name, parameter in unwrap(model).named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]

def save_checkpoint(folder, step, model, optimizer, body, keep=0):
    """Write step-<step>.safetensors, by one process; then the newest `keep` stay (0 = all) -> its path.

    No RNG state: seed_step makes every draw a function of the step. Non-finite state goes to *.nonfinite, which never
    counts as a checkpoint and pushes none out."""
    names = optimizer_names(model, optimizer)
    tensors = {f"model.{name}": tensor for name, tensor in model_tensors(model).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"opt.{names[index]}.{key}": value for key, value in state.items()}
    finite = all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())
    path = Path(folder) / f"step-{step:08d}.safetensors{'' if finite else '.nonfinite'}"
    write_file(path, tensors, body | {"step": step, "optimizer": names})
    for old in [file for file in checkpoints(folder) if finite and file <= path][:-keep]:   # [:-0] is none of them
        old.unlink()                                # never the one just written
    return path

def checkpoints(folder):
    """The run folder's checkpoint files, oldest first."""
    return sorted(file for file in Path(folder).glob("step-*") if re.fullmatch(r"step-\d{8}\.safetensors", file.name))

def newest(folder, log=print):
    """(path, tensors, body) of the newest checkpoint that is whole, or None; damaged ones are named and passed over."""
    for path in reversed(checkpoints(folder)):
        try:
            return path, *read_file(path)
        except ValueError as error:
            log(f"passed over a damaged checkpoint: {error}")

def load_newest(folder, device):
    """(tensors, body) of the newest whole checkpoint, or None: rank 0 decides which, all ranks read that one."""
    found = newest(folder) if rank() == 0 else None
    step = agree(found[2]["step"] if found else -1, device)
    return None if step < 0 else found[1:] if found else read_file(Path(folder) / f"step-{step:08d}.safetensors")

def load_tensors(model, tensors, source=""):
    """Copy name -> tensor into the model. Raises ValueError naming what is missing, unexpected or of another shape."""
    own = model_tensors(model)
    if own.keys() != tensors.keys():
        raise ValueError(f"{source} does not fit this model: missing {sorted(own.keys() - tensors.keys())[:3]}, "
                         f"unexpected {sorted(tensors.keys() - own.keys())[:3]}")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(f"{source}: {name} is {list(tensors[name].shape)}, the model wants {list(tensor.shape)}")
        tensor.data.copy_(tensors[name])

def restore(model, optimizer, tensors, body):
    """Put what newest() returned into model and optimizer. Raises ValueError if they are not those that were saved."""
    names = optimizer_names(model, optimizer)
    if names != body["optimizer"]:
        raise ValueError("the optimizer holds other parameters, or in another order, than the checkpoint's")
    own, model_part, state = dict(unwrap(model).named_parameters()), {}, {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "model":
            model_part[name] = tensor
        else:
            name, _, moment = name.rpartition(".")
            if tensor.shape == own[name].shape:     # fused kernels walk memory: a moment must lie as its parameter does
                tensor = torch.empty_like(own[name], dtype=tensor.dtype, device="cpu").copy_(tensor)
            state.setdefault(names.index(name), {})[moment] = tensor
    load_tensors(model, model_part, f"the checkpoint of step {body['step']}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

# ------------------------------------------------------------------------------------------------------ run folder
def trained(out_dir, run_name):
    """The folder of a run that has a best.safetensors, or fail() naming those that there are."""
    folder = Path(out_dir) / run_name
    if not run_name or not os.path.exists(folder / "best.safetensors"):
        names = ", ".join(sorted(path.parent.name for path in Path(out_dir).glob("*/best.safetensors")))
        fail(f"--run_name {run_name}: no such trained run in {out_dir}; there is {names or 'none yet'}")
    return folder

def clock(seconds):
    """81 -> '1m 21s', 5000 -> '1h 23m'"""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}h {minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m {seconds:02d}s"

class Run:
    """out_dir/run_name: what was asked (config.json), said (train.log), measured (metrics.jsonl), drawn (curves.png).

    Only rank 0 writes. On a resume at step `start`, measurements of later steps are dropped: they are made again."""
    def __init__(self, config, start=0, derived={}):
        self.folder, self.main, self.wandb = Path(config.out_dir) / config.run_name, rank() == 0, None
        self.start, self.begun, self.since = start, time.perf_counter(), time.perf_counter()
        if not self.main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"--out_dir {config.out_dir}: {error}")
        git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True,
                             text=True)             # by the shell: a machine without git leaves it empty
        about = {"config": dataclasses.asdict(config), "derived": derived, "world_size": world_size(),
                 "commit": git.stdout.strip(), "torch": torch.__version__, "python": sys.version.split()[0]}
        write_whole(self.folder / "config.json", json.dumps(about, indent=1).encode())
        (self.folder / "train.pid").write_text(f"{os.getpid()}\n")
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(True) if start and path.exists() else []
        self.rows = [json.loads(line) for line in lines if line.endswith("\n")]    # a kill may have cut the last one
        self.rows = [row for row in self.rows if row["step"] < start + (row["split"] == "train")]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        if config.wandb:
            try:
                import wandb
            except ImportError:
                fail(f"--wandb {config.wandb} needs the package: pip install wandb")
            self.wandb = wandb.init(project="finite", name=config.run_name, mode=config.wandb, config=about["config"])

    def log(self, text, shown=True):
        """A line for train.log, and for the terminal if shown."""
        if self.main:
            if shown:
                print(text, flush=True)
            with open(self.folder / "train.log", "a") as file:
                file.write(text + "\n")

    def measure(self, step, split, **values):
        """A row of metrics.jsonl; NaN and Inf become null, so that every line is JSON."""
        if not self.main:
            return
        row = json.loads(json.dumps({"step": step, "split": split} | values), parse_constant=lambda name: None)
        self.rows.append(row)
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        if self.wandb:
            self.wandb.log({f"{split}/{k}": v for k, v in row.items() if k not in ("step", "split")}, step=step)

    def progress(self, step, max_steps, stats, lr, rows_per_step, unit):
        """The line per --log_every, and its row in metrics.jsonl. resume_clock() keeps evaluations out of the rate."""
        now = time.perf_counter()
        rate = stats["steps"] * rows_per_step / max(now - self.since, 1e-9)
        left = (now - self.begun) / (step - self.start) * (max_steps - step)
        parts = "".join(f" {name} {value:.4f}" for name, value in stats["parts"].items())
        self.log(f"step {step:,}/{max_steps:,} {step / max_steps:.1%} | loss {stats['loss']:.4f}{parts} | grad norm "
                 f"{stats['grad_norm']:.3f} | lr {lr:.3e} | skipped {stats['skipped']} | {rate:,.0f} {unit}/s | "
                 f"{clock(now - self.begun)}, {clock(left)} left")
        self.measure(step, "train", loss=stats["loss"], parts=stats["parts"], grad_norm=stats["grad_norm"], lr=lr,
                     skipped=stats["skipped"], **{f"{unit}_per_s": rate})

    def resume_clock(self):
        self.since = time.perf_counter()

    def curves(self):
        """Redraw curves.png: losses by split, gradient norm, learning rate. Says so once if matplotlib is absent."""
        if not self.main:
            return
        try:
            from matplotlib.figure import Figure    # not pyplot: no backend to choose, nothing global to close
        except ImportError:
            if not hasattr(self, "told"):
                self.told = self.log("no curves.png: pip install matplotlib")
            return
        top, bottom = (figure := Figure(figsize=(8, 7), layout="constrained")).subplots(2, 1, sharex=True)
        for split in dict.fromkeys(row["split"] for row in self.rows):
            rows = [row for row in self.rows if row["split"] == split and row.get("loss") is not None]
            steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
            top.plot(steps, losses, "-" if split == "train" else "o-", label=split)
        rows = [row for row in self.rows if row["split"] == "train"]
        steps = [row["step"] for row in rows]
        bottom.semilogy(steps, [row["grad_norm"] for row in rows], label="gradient norm")
        bottom.semilogy(steps, [row["lr"] for row in rows], label="learning rate")
        skipped = [row["skipped"] - before["skipped"] for before, row in zip([{"skipped": 0}] + rows, rows)]
        for step in [step for step, count in zip(steps, skipped) if count]:
            bottom.axvline(step, color="red", alpha=0.4)
        top.set(ylabel="loss"), bottom.set(xlabel="step (red: some were skipped)"), top.legend(), bottom.legend()
        figure.savefig(self.folder / "curves.png", dpi=100)
