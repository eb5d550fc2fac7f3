"""What an adapter does: gate-scale table, pairs of samples, grids, gate curves, alarms; the verbs eval and sample.

The functions are given the module of the script, which cannot be imported by name when it runs as a program."""
import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors import safe_open

from common import fail, finish, launch, rank, world_size
from data.files import aligned, or_fail, write_json
from data.scenes import demo
from data.scenes.metrics import COLUMNS, labels_of, score
from runs import checkpoints, finite_number, parse_flags, trained

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5)


@dataclass
class EvalFlags:
    run_name: str = ""  # the trained run
    out_dir: str = "out"  # where runs are
    data_dir: str = ""  # prepared data; empty: the run's own
    base: str = ""  # where its base is now; empty: where it was
    step: int = 0  # of the checkpoint to test; 0: best.safetensors
    split: str = "test"  # train, val or test
    rows: int = 200  # of the split that are looked at; 0: all
    device: str = "auto"  # auto, cuda, mps, cpu


@dataclass
class SampleFlags:
    run_name: str = ""  # the trained run
    out_dir: str = "out"  # where runs are
    base: str = ""  # where its base is now; empty: where it was
    data_dir: str = ""  # prepared data, for their size and slots; empty: the run's own
    layout: str = ""  # JSON: one or a list of {"caption", "objects": [{"name", "bbox"}], "boxes": "unit", "size"}
    gate_scale: str = "0,0.5,1"  # of what the adapter adds, a picture for each
    out: str = ""  # the picture to write, PNG; empty: samples/layout-<name of --layout>.png of the run
    seed: int = 0  # of the first sample of each layout, the next one has seed + 1
    num_samples: int = 1  # of each layout
    beta: float = -1.0  # share of the sampling steps with the adapter; below 0: the run's own
    guidance: float = -1.0  # classifier-free; below 0: the run's own
    sample_steps: int = 0  # of DDIM; 0: the run's own
    embeddings: str = ""  # of the texts, safetensors as in data/scenes/prepare.py; empty: the base makes them
    device: str = "auto"  # auto, cuda, mps, cpu


# ----------------------------------------------------------------------------------------------- gates and their alarms
def other_boxes(present):
    """present (B, N) of 0 and 1 -> (B,), for each row another one with as many objects, or itself if there is none"""
    count, order = np.asarray(present).sum(1), np.arange(len(present))
    for n in np.unique(count):
        order[count == n] = np.roll(order[count == n], 1)
    return order


def alarm(gates, step):
    """What is wrong with the gates, in a sentence with what to do, or ''."""
    opened = [*gates["attn"], *gates["dense"]]
    if step >= 1000 and max(opened) < 0.01:
        return "collapse: every |tanh| is below .01 after 1,000 steps; see the gap, and try --rms_norm or a higher " \
            "--gate_lr in a new run"
    if max(opened) > 0.9 or max(gates["ratio"]) > 1:
        return f"over-activation: |tanh| up to {max(opened):.2f}, residual / hidden up to {max(gates['ratio']):.2f}; " \
            "a lower --learning_rate or --gate_lr, --rms_norm, a smaller --scale_max"
    return ""


def near_ends(gates):
    """-> (share of the gates with |tanh| below .01, share above .9)"""
    opened = np.array([*gates["attn"], *gates["dense"]])
    return float((opened < 0.01).mean()), float((opened > 0.9).mean())


def tell_gates(run, gates, step):
    """Gates of a validation into the log, with an alarm if there is one, and samples/gates.png."""
    for name, values in gates.items():
        run.log(f"  {name:5} " + " ".join(f"{x:.3g}" if name == "grad" else f"{x:.3f}" for x in values))
    run.log("  |tanh| below .01: {:.0%}, above .9: {:.0%}".format(*near_ends(gates)))
    if warning := alarm(gates, step):
        run.log(f"warning: {warning}")
    if run.main:
        gate_curves(run)


def gate_curves(run):
    """samples/gates.png: |tanh| of the gates and residual/hidden per layer, and the shuffle gap, by step."""
    rows = [row for row in run.rows if row["split"] == "val" and "gates" in row]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return                                      # curves() has said so
    if not rows:
        return
    figure = Figure(figsize=(8, 9), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    steps = [row["step"] for row in rows]
    for kind, style in (("attn", "-"), ("dense", ":")):
        for i, line in enumerate(zip(*(row["gates"][kind] for row in rows))):
            top.plot(steps, line, style, color=f"C{i}", label=f"{kind} {i}")
    for i, line in enumerate(zip(*(row["gates"]["ratio"] for row in rows))):
        middle.plot(steps, line, color=f"C{i}")
    gaps = [name for name in rows[0] if name.startswith("gap_")]
    for name in gaps:
        bottom.plot(steps, [row[name] for row in rows], label=f"t = {name[4:]}")
    top.set(ylabel="|tanh gate|"), middle.set(ylabel="residual / hidden")
    bottom.set(ylabel="shuffle gap", xlabel="step")
    if len(rows[0]["gates"]["attn"]) <= 8:          # more lines than that have no room for their names
        top.legend(ncols=4, fontsize=7)
    if gaps:
        bottom.legend()
    (run.folder / "samples").mkdir(exist_ok=True)
    figure.savefig(run.folder / "samples/gates.png", dpi=100)


def overdone(table):
    """rows of a gate-scale table -> what is wrong with the samples of larger scales, in a sentence, or ''"""
    at = {scale: table[f"scale {scale:g}"]["acc50"] for scale in SCALES if scale <= 1}
    best = max(at, key=at.get)
    if at[best] - at[1.0] > 0.1:
        return (f"over-activation: acc50 {at[1.0]:.3f} at scale 1, but {at[best]:.3f} at scale {best:g}, the best one; "
                f"sample with --gate_scale {best:g}, or train with a lower --gate_lr or --scale_max")
    return ""


# ------------------------------------------------------------------------------------------------------------- pictures
def drawn(script, model, data, rows, config, scale=1.0, boxes="boxes", order=None, seed=7):
    """script.generate for these rows -> (n, C, H, W) on the CPU. order: whose boxes each has instead of its own.

    A row's noise depends on its place in rows alone: the pieces are of a size that no flag changes."""
    most, made = 96 if data.toy else 1, []
    for at in range(0, len(rows), most):
        batch = script.get_rows(data, rows[at:at + most])
        if order is not None:
            batch["boxes"] = data.take("boxes", rows[order[at:at + most]])
        made.append(script.generate(model, batch, config, scale, boxes, seed + at).float().cpu())
    return torch.cat(made)


@functools.lru_cache(maxsize=1)
def vae_of(script, base):
    """-> the VAE of a diffusers folder, float32 on the CPU; a str that says why there is none."""
    try:
        return script.load_vae(base)
    except ValueError as error:
        return str(error)


@torch.no_grad()
def pictures(script, data, config, values):
    """values (B, C, h, w) -> pictures (B, 3, H, W): of a toy as they are, else decoded singly. ValueError: no VAE"""
    if data.toy:
        return values
    vae = vae_of(script, config.base)
    if isinstance(vae, str):
        raise ValueError(vae)
    vae.to(data.device)
    made = [vae.decode(one[None].to(data.device) / vae.shape.scaling_factor).cpu() for one in values]
    vae.cpu()                                       # the training needs the room
    return torch.cat(made)


def grid(columns, boxes, present, path):
    """columns: dict of name -> pictures (n, 3, H, W) in -1..1. One line per layout; its boxes (n, N, 4), where present
    (n, N), are drawn into all of them -> PNG at path."""
    from PIL import Image, ImageDraw
    height, width = next(iter(columns.values())).shape[-2:]
    side = min(256, max(96, height, width))
    wide, high = (max(1, round(side * n / max(height, width))) for n in (width, height))
    sheet = Image.new("RGB", ((wide + 4) * len(columns), (high + 4) * len(boxes) + 14), "white")
    pen = ImageDraw.Draw(sheet)
    for x, (name, images) in enumerate(columns.items()):
        pen.text((x * (wide + 4) + 4, 1), name, fill="black")
        for y, picture in enumerate(to_pixels(images)):
            how = Image.LANCZOS if max(height, width) > side else Image.NEAREST
            tile = Image.fromarray(picture).resize((wide, high), how)
            for box in boxes[y][present[y] > 0]:
                corners = [float(edge) * n for edge, n in zip(box, (wide - 1, high - 1) * 2)]
                for colour, thick in (("white", 3), ("black", 1)):           # seen on dark and on light
                    ImageDraw.Draw(tile).rectangle(corners, outline=colour, width=thick)
            sheet.paste(tile, (x * (wide + 4) + 2, y * (high + 4) + 14))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def to_pixels(images):
    """(n, 3, H, W) in -1..1 -> uint8 (n, H, W, 3)"""
    return ((images.float().cpu() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


UNSEEN = set()                                      # bases whose lack of a VAE was told


def pairs(script, model, data, config, path, n=10, split="val", log=print):
    """Draw n rows of a split, always the same: the truth, without the adapter, and with it from the same noise.

    -> dict of the columns, like the pictures at path; {} if the base has no VAE, which is said once."""
    rows = data.rows[split_of(data, split)]
    rows = np.sort(np.random.default_rng(0).permutation(rows)[:n])
    made = {"truth": torch.cat([script.get_rows(data, rows[i:i + 1])["clean"].cpu() for i in range(len(rows))])}
    try:
        made["truth"] = pictures(script, data, config, made["truth"])
    except ValueError as error:
        if config.base not in UNSEEN:
            log(f"no pictures of samples: {error}")
            UNSEEN.add(config.base)
        return {}
    made["base"] = pictures(script, data, config, drawn(script, model, data, rows, config, boxes=""))
    if is_adapter(script, model):
        made["scale 1"] = pictures(script, data, config, drawn(script, model, data, rows, config))
    grid(made, *boxes_of(data, rows), Path(path))
    return made


def boxes_of(data, rows):
    """-> boxes (n, N, 4) and present (n, N), arrays"""
    return data.take("boxes", rows).cpu().numpy(), data.table["phrase"][rows] >= 0


def is_adapter(script, model):
    return isinstance(script.unwrap(model), script.Adapter)


# ---------------------------------------------------------------------------------------------------------------- table
def split_of(data, split="test"):
    """split, or val if it has no rows"""
    return split if len(data.rows[split]) else "val"


def step_of(path):
    """The training step of a file by runs.write_file, without reading its tensors."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["body"])["step"]


def grounding(script, model, data, config, rows):
    """Scores of a toy's samples of these rows -> (dict of row of the table -> scores, dict of name -> pictures)."""
    boxes, present = boxes_of(data, rows)
    colours, kinds, truth = (data.take(name, rows).cpu().numpy() for name in ("colours", "kinds", "labels"))
    wanted, made = (boxes, present, colours, kinds), {}
    found = {"truth": score(truth, *wanted)}
    draw = functools.partial(drawn, script, model, data, rows, config)
    made["base"] = draw(boxes="")
    if is_adapter(script, model):
        other = other_boxes(present)
        moved = other != np.arange(len(rows))       # the only one with so many objects keeps its own: no evidence
        found["truth with other boxes"] = score(truth[moved], boxes[other][moved], *(x[moved] for x in wanted[1:]))
        made |= {f"scale {scale:g}": draw(scale) for scale in SCALES}
    found |= {name: score(labels_of(images), *wanted) for name, images in made.items()}
    if is_adapter(script, model):
        found["scale 1, shuffled boxes"] = score(labels_of(draw(order=other))[moved], *(x[moved] for x in wanted))
    return found, made


def layers_of(script, model, gates):
    """gates_of -> list of dicts, one per gated layer: name, attn, dense, ratio, grad."""
    names = [name.removesuffix(".fuser") for name, module in model.base.named_modules()
             if isinstance(module, script.Fuser)]
    assert all(len(values) == len(names) for values in gates.values()), {x: len(y) for x, y in gates.items()}
    return [{"layer": name} | {kind: values[i] for kind, values in gates.items()} for i, name in enumerate(names)]


def table(script, model, data, config, folder, split="test", log=print, stem="eval", scores=None, step=0):
    """What there is to say of a model on a split (val if it is empty), by one process -> dict: table, of a toy, by row
    and column; scores of script.evaluate; layers with their gates; warnings.

    scores: script.evaluate asks all processes; so one of several is to be given them, and a single one makes them.
    step: of the model; 0: it is best.safetensors.
    Writes folder/stem.json and samples/stem.png, which is final.png if the stem is eval."""
    split, adapter = split_of(data, split), is_adapter(script, model)
    rows, found, warnings = data.some(split, config.eval_rows), {}, []
    picture = folder / f"samples/{'final' if stem == 'eval' else stem}.png"
    if scores is None:
        scores = script.evaluate(model, data, config, split, config.eval_rows) if world_size() == 1 else {}
    about = {"run_name": config.run_name, "phase": config.phase, "base": config.base, "seed": config.seed,
             "step": step or step_of(folder / "best.safetensors"), "split": split, "rows": len(rows),
             "sample_steps": config.sample_steps, "guidance": config.guidance, "beta": config.beta}
    if data.toy:
        found, made = grounding(script, model, data, config, rows)
        for line in aligned([["", *COLUMNS]] + [
                [name, *(f"{one[column]:.3f}" for column in COLUMNS)] for name, one in found.items()]):
            log(line)
        log(f"{found['truth']['n']} objects of {len(rows)} {split} layouts, {config.sample_steps} DDIM steps, guidance "
            f"{config.guidance:g}")
        if adapter:
            made["truth"] = script.get_rows(data, rows[:12])["clean"].cpu()
            shown = ("base", *(f"scale {scale:g}" for scale in SCALES if scale <= 1), "truth")
            grid({name: made[name][:12] for name in shown}, *boxes_of(data, rows[:12]), picture)
            warnings = [text for text in [overdone(found)] if text]
    if not (data.toy and adapter):
        pairs(script, model, data, config, picture, split=split, log=log)
    for name, text in (("mse", "error"), ("gap", "gap to shuffled boxes")):
        if values := {at: x for at, x in scores.items() if at.startswith(name)}:
            log(f"{text}: " + ", ".join(f"{x:.5f} at t = {at.split('_')[1]}" for at, x in values.items()))
    layers = []
    if adapter:
        if not data.toy:
            log("without a detector grounding is not scored: the gap says whether boxes matter, the pictures how")
        gates = script.gates_of(model, data, config)
        layers = layers_of(script, model, gates)
        for line in aligned([["layer", "|tanh a1|", "|tanh a2|", "ratio", "gradient"]] + [
                [one["layer"], *(f"{one[name]:.3f}" for name in ("attn", "dense", "ratio")), f"{one['grad']:.2g}"]
                for one in layers]):
            log(line)
        about["share_near_0"], about["share_saturated"] = near_ends(gates)
        log("|tanh| below .01: {:.0%}, above .9: {:.0%}".format(*near_ends(gates)))
        done = max([about["step"], *(int(path.stem[5:]) for path in checkpoints(folder))])     # best may be the first
        warnings = [text for text in [alarm(gates, done)] if text] + warnings
    for text in warnings:
        log(f"warning: {text}")
    return write_json(folder / f"{stem}.json", about | {
        "scores": scores, "table": found, "layers": layers, "warnings": warnings})


# -------------------------------------------------------------------------------------------------------------- layouts
def refuse(flags, number, text):
    raise ValueError(f"--layout {flags.layout}, layout {number}{text}")


def read_layouts(flags, slots):
    """--layout -> list of (caption, list of (phrase, [x0, y0, x1, y1] in 0..1)). ValueError, with layout and object."""
    from data.scenes.pictures import UNITS, Refused, plain_text, read_box, read_object
    try:
        found = json.loads(Path(flags.layout).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--layout {flags.layout} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--layout {flags.layout} is not JSON: {error}") from None
    layouts = []
    for number, one in enumerate(found if isinstance(found, list) else [found], 1):
        bad = functools.partial(refuse, flags, number)
        if not isinstance(one, dict):
            bad(f" is not a JSON object: {one!r:.40}")
        if unknown := [key for key in one if key not in ("caption", "objects", "boxes", "size")]:
            bad(f": unknown key {unknown[0]!r:.40}; caption, objects, boxes and size are known")
        caption, objects, units = one.get("caption", ""), one.get("objects"), one.get("boxes", "unit")
        if not isinstance(caption, str):
            bad(f": the caption is {caption!r:.40}, not a text")
        if not isinstance(objects, list) or not objects:
            bad(': no objects; they are a list of {"name": text, "bbox": [x0, y0, x1, y1]}')
        if len(objects) > slots:
            bad(f": {len(objects)} objects, but the run has {slots} slots")
        if not isinstance(units, str) or units not in UNITS:
            bad(f": boxes is {units!r:.40}, not one of {', '.join(UNITS)}")
        size = one.get("size") if units == "pixels" else [1000, 1000]
        if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
            bad(f": boxes in pixels need the picture's size, [width, height]; it is {size!r:.40}")
        placed = []
        for which, entry in enumerate(objects, 1):
            read = read_object(which, entry, number)
            if hasattr(read, "reason"):
                bad(f", object {which}: {read.reason}, {read.detail if 'box' in read.reason else read.text}"[:160])
            try:
                box = read_box(read[2], *size, units, "xyxy")
            except Refused as error:
                hint = error.args[1].partition(";")[2].replace("--boxes", '"boxes":')
                bad(f", object {which} ({read[1]}): {error.args[0]}, {read[2]} in {units}" + f";{hint}" * bool(hint))
            placed.append((read[1], [edge / n for edge, n in zip(box, size * 2)]))
        layouts.append((plain_text(caption), placed))
    if not layouts:
        raise ValueError(f"--layout {flags.layout}: no layouts in it")
    return layouts


class ToyTexts:
    """Texts of the toy -> ids of its few words."""

    def embed(self, texts, kind):
        """-> (ids (B, L), 0: none was cut). ValueError: an unknown word, or more words than the toy has seen."""
        length, made = demo.LENGTH if kind == "context" else 5, []
        known = [word for word in demo.WORDS if word[0] != "<"]
        for text in texts:
            words = text.lower().split()
            if kind == "phrases" and words[:1] != ["a"]:
                words = ["a", *words]               # as all phrases of its training
            if unknown := [word for word in words if word not in known]:
                raise ValueError(f"the toy does not know the word {unknown[0]!r:.40}, only {', '.join(known)}")
            if len(words) > length - 2:
                raise ValueError(f"{text!r:.60} has {len(words)} words, the toy reads {length - 2}")
            ids = [demo.ID[word] for word in ("<start>", *words, "<end>")]
            made.append(ids + [demo.ID["<pad>"]] * (length - len(ids)))
        return torch.tensor(made), 0

    def absent(self, texts):
        return []


def open_texts(data, config, path):
    """-> what embeds texts as the run's data set has them. ValueError."""
    from data.scenes.prepare import Clip, Stored
    if data.toy:
        if path:
            raise ValueError("--embeddings: the toy reads its captions itself")
        return ToyTexts()
    options = SimpleNamespace(batch_size=8, dtype="float32")
    try:
        texts = Stored(Path(path), options) if path else Clip(config.base, options)
    except ValueError as error:
        raise ValueError(f"{error}" + "; or give --embeddings FILE, as to prepare.py" * (not path)) from None
    texts.ready(data.device, {})
    if not path:
        if "pooled" in data.table:
            raise ValueError(f"--base {config.base} takes pooled text, which its one text encoder does not give: "
                             "--embeddings FILE, as to prepare.py")
        if texts.sha256 != data.meta["base"]["text_encoder"]:
            raise ValueError(f"--data_dir {data.folder} has its texts from elsewhere than the text encoder of "
                             f"{config.base}: --embeddings FILE, as to prepare.py")
    wanted = {name: data.table[array].shape[-1] for name, array in (
        ("context", "contexts"), ("phrases", "phrases"), ("pooled", "pooled")) if array in data.table}
    found = {name: texts.widths.get(name) for name in wanted}
    if found != wanted or texts.length != data.table["contexts"].shape[1]:
        raise ValueError(f"{path or config.base}: texts of {texts.length} tokens and widths {found}, but the run was "
                         f"trained on {data.table['contexts'].shape[1]} tokens and {wanted}")
    return texts


def batch_of(data, texts, flags, number, caption, placed, log=print):
    """A layout -> a batch of one row, as script.get_rows makes them. ValueError."""
    def embed(text, kind, where):
        if texts.absent([text]):
            refuse(flags, number, f"{where}: --embeddings {flags.embeddings} lacks {text!r:.60}")
        try:
            value, cut = texts.embed([text], kind)
        except ValueError as error:
            refuse(flags, number, f"{where}: {error}")
        if cut:
            log(f"layout {number}{where}: the text is cut to {texts.length} tokens: {text!r:.60}")
        return value.to(data.device)
    first, slots = np.zeros(1, np.int64), data.meta["slots"]
    empty = data.take("contexts", first)            # as in training, whoever made it
    shape = (3, demo.SIZE, demo.SIZE) if data.toy else data.table["latents"].shape[1:]
    phrases = torch.cat([embed(phrase, "phrases", f", object {which}") for which, (phrase, _) in enumerate(placed, 1)])
    batch = {"clean": torch.zeros(1, *shape), "empty": empty, "boxes": torch.zeros(1, slots, 4),
             "context": embed(caption, "context", ", caption") if caption else empty,
             "phrases": phrases.new_zeros(1, slots, phrases.shape[-1]), "masks": torch.zeros(1, slots, 2)}
    batch["boxes"][0, :len(placed)] = torch.tensor([box for _, box in placed])
    batch["phrases"][0, :len(placed)], batch["masks"][0, :len(placed)] = phrases, 1.0
    if "pooled" in data.table:
        height, width = data.meta["size"]
        batch |= {"empty_pooled": data.take("pooled", first),
                  "time_ids": torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)}
        batch["pooled"] = embed(caption, "pooled", ", caption") if caption else batch["empty_pooled"]
    return {name: value.to(data.device) for name, value in batch.items()}


# ---------------------------------------------------------------------------------------------------------------- verbs
def opened(script, flags, device):
    """-> (the model of --run_name, its config with --data_dir, its data, its folder)"""
    folder, step = trained(flags.out_dir, flags.run_name), getattr(flags, "step", 0)
    file = f"step-{step:08d}.safetensors" if step else "best.safetensors"
    model = or_fail(script.load_model, folder / file, device, flags.base)
    about = model.about["config"] | {"run_name": flags.run_name, "out_dir": flags.out_dir}
    config = script.Config(**about | ({"data_dir": flags.data_dir} if flags.data_dir else {}))
    data = script.load_data(config, device)
    script.check_data(data, model)
    return model, config, data, folder


def main_eval(script, argv):
    flags, given = parse_flags(EvalFlags, argv, "The checkpoint test: samples, gates, the gap to shuffled boxes.")
    device = launch(flags.device)
    if flags.split not in ("train", "val", "test") or flags.rows < 0:
        fail(f"--split {flags.split}: train, val or test; --rows {flags.rows}: at least 0")
    model, config, data, folder = opened(script, flags, device)
    config = dataclasses.replace(config, eval_rows=flags.rows)
    if "split" in given and not len(data.rows[flags.split]):
        fail(f"--split {flags.split}: {data.folder} has no rows in it")
    if data.key != model.about["data"]:
        print(f"{data.folder} is not the data that the run was trained on")
    split = split_of(data, flags.split)
    scores = script.evaluate(model, data, config, split, config.eval_rows)
    if rank() == 0:                                 # other rows than the training's leave its eval.json alone
        stem = "eval" if given <= {"run_name", "out_dir", "device", "base"} else f"eval-{split}" + f"-{flags.step}" * (
            flags.step > 0)
        table(script, model, data, config, folder, split, print, stem, scores, flags.step)
        if data.toy and is_adapter(script, model):
            pairs(script, model, data, config, folder / f"samples/{stem}-pairs.png", split=split)
        print(f"written: {folder / stem}.json")
    finish()


def main_sample(script, argv):
    flags, _ = parse_flags(SampleFlags, argv, "Pictures of layouts, without the adapter and at each gate scale.")
    device = launch(flags.device)
    try:
        scales = [*dict.fromkeys(map(finite_number, flags.gate_scale.split(",")))]
    except ValueError:
        fail(f"--gate_scale {flags.gate_scale}: numbers separated by commas, as 0,0.5,1")
    if flags.num_samples < 1 or flags.seed < 0 or flags.sample_steps < 0 or flags.beta > 1:
        fail(f"--num_samples {flags.num_samples} must be at least 1, --seed {flags.seed} and --sample_steps "
             f"{flags.sample_steps} at least 0, --beta {flags.beta:g} at most 1")
    if not Path(flags.layout).is_file():
        fail(f"--layout {flags.layout or 'FILE'}: there is no such file; it is JSON, as in "
             '{"caption": "...", "objects": [{"name": "...", "bbox": [x0, y0, x1, y1]}], "boxes": "unit"}')
    out = Path(flags.out or Path(flags.out_dir) / flags.run_name / "samples" / f"layout-{Path(flags.layout).stem}.png")
    if out.suffix.lower() != ".png":
        fail(f"--out {out}: name a file that ends in .png")
    model, config, data, _ = opened(script, flags, device)
    if not is_adapter(script, model):
        fail(f"--run_name {flags.run_name} is a base, which knows no boxes: name the run of an adapter on it")
    own = {"beta": flags.beta < 0, "guidance": flags.guidance < 0, "sample_steps": not flags.sample_steps}
    config = dataclasses.replace(config, **{name: getattr(flags, name) for name, is_own in own.items() if not is_own})
    try:
        if not data.toy and isinstance(vae := vae_of(script, config.base), str):
            raise ValueError(f"{vae}; without a VAE there are no pictures")
        layouts = read_layouts(flags, data.meta["slots"])
        texts = open_texts(data, config, flags.embeddings)
        batches = [batch_of(data, texts, flags, number, *layout) for number, layout in enumerate(layouts, 1)]
        columns = {"base": (1.0, "")} | {f"scale {scale:g}": (scale, "boxes") for scale in scales}
        made = {name: [] for name in columns}
        for name, (scale, boxes) in columns.items():
            for batch in batches:
                for seed in range(flags.seed, flags.seed + flags.num_samples):
                    values = script.generate(model, batch, config, scale, boxes, seed).float().cpu()
                    made[name].append(pictures(script, data, config, values))
        made = {name: torch.cat(images) for name, images in made.items()}
        boxes, present = (torch.cat([x for batch in batches for x in [batch[name].cpu()] * flags.num_samples]).numpy()
                          for name in ("boxes", "masks"))
        grid(made, boxes, present[..., 0], out)
        write_each(out, made, flags.seed, flags.num_samples)
    except (ValueError, OSError) as error:
        fail(error)
    print(f"{out}: {len(layouts)} layouts, {flags.num_samples} samples of each, {len(columns)} columns; beside it each "
          "picture without boxes")


def write_each(out, columns, seed, samples):
    """Every picture of the grid without boxes, as <stem>-<layout>-<column>.png, with several samples -seed-<seed>."""
    from PIL import Image
    for name, images in columns.items():
        for i, picture in enumerate(to_pixels(images)):
            which = f"-seed-{seed + i % samples}" if samples > 1 else ""
            stem = f"{out.stem}-{i // samples + 1}-{name.replace(' ', '-')}{which}"
            Image.fromarray(picture).save(out.with_name(f"{stem}.png"))


VERBS = {"eval": main_eval, "sample": main_sample}
