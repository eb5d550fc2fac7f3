"""What a language model is worth: its table (eval), its answers (sample), students with a teacher and without.

The functions are given the module of the script, which cannot be imported by name when it runs as a program."""
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import fail, finish, launch, rank
from data.files import aligned, or_fail, write_json
from data.text.metrics import MOST, NGram, choices, draw_comparison, own_questions, read_questions
from data.text.tokens import END, PROMPT
from runs import parse_flags, trained


@dataclass
class EvalFlags:
    run_name: str = ""  # the trained run
    model: str = ""  # a Hugging Face folder instead of a run
    out_dir: str = "out"  # where runs are
    data_dir: str = ""  # prepared data or a file of JSON lines; empty: the run's own
    split: str = "test"  # train, val or test
    eval_mc: str = ""  # questions, JSON lines with instruction (or prompt), options, answer; empty: the data's
    teacher: str = ""  # Hugging Face folder to compare with; empty: the run's own, if it is still there
    device: str = "auto"  # auto, cuda, mps, cpu


@dataclass
class SampleFlags:
    run_name: str = ""  # the trained run
    model: str = ""  # a Hugging Face folder instead of a run
    out_dir: str = "out"  # where runs are
    instruction: str = ""  # what to ask
    prompts: str = ""  # or a file with an instruction per line
    num_samples: int = 1  # answers to each
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 0  # draw from so many of the likeliest tokens; 0: from all
    max_tokens: int = 200  # of an answer
    out: str = ""  # JSON lines to write; empty: print
    seed: int = 0  # of the first answer to each, the next one has seed + 1
    device: str = "auto"  # auto, cuda, mps, cpu


# ---------------------------------------------------------------------------------------------------- table and samples
def prompt_ids(tokenizer, instruction):
    """Ids to answer an instruction by, without what the tokenizer puts behind a text."""
    ids, offsets = tokenizer.encode(PROMPT.format(instruction))
    return list(ids[:max(i for i, (start, end) in enumerate(offsets) if end > start) + 1])


def answer(tokenizer, ids):
    """Ids of a response -> its text without the end mark."""
    return tokenizer.decode([i for i in ids if i != tokenizer.eos]).split(END)[0]


def tell(step, batch, parts, config, vocab):
    """The first five steps in detail, as the original does; the only ones whose parts are read at once."""
    asked, shape = float(batch["asked"].sum()), [*batch["tokens"].shape, vocab]
    if step == batch["micro"] == 0:
        print(f"first forward: student logits {shape}" + f", teacher logits {shape}, T {config.temperature}, alpha "
              f"{config.alpha}" * ("kd" in parts) + f"; of them, in chunks, the {asked:,.0f} supervised positions")
    values = "  ".join(f"{name} {float(x) * batch['count'] / max(1, asked):.4f}" for name, x in parts.items())
    print(f"step {step} micro-batch {batch['micro']}: {values}", flush=True)


def completions(script, model, data, path, n=8, split="val"):
    """Write n held-out prompts, always the same, each with the response of the data and the model's likeliest one."""
    path, table, prompt = Path(path), data.table.cpu().numpy(), np.load(data.folder / "prompt.npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for row in np.random.default_rng(0).permutation(data.rows[split])[:n]:
            ids = table[data.start[row]:data.start[row] + data.length[row] + 1].tolist()
            asked, rest = ids[:prompt[row]], ids[prompt[row]:]
            made = script.generate(script.unwrap(model), asked, 200, 0.0, end=data.tokenizer.eos)
            file.write(f"{data.tokenizer.decode(asked)}--- {split} row {row}\n{answer(data.tokenizer, rest)}\n"
                       f"--- model\n{answer(data.tokenizer, made)}\n\n\n")


def lines_of(columns):
    """List of (name, {row: text}) -> lines of an aligned table, with - where a column lacks a row."""
    longest = max(columns, key=lambda column: len(column[1]))           # first its rows, in its order
    names = dict.fromkeys(row for _, cells in (longest, *columns) for row in cells)
    grid = [["", *(name for name, _ in columns)]]
    grid += [[row, *(cells.get(row, "-") for _, cells in columns)] for row in names]
    return aligned(grid)


def text_of(value):
    return "-" if value is None else f"{value:.4f}"


def floor_line(one):
    """What judge() says of guessing."""
    return f"chance {one['chance']:.4f}, always the most frequent answer {one['most_frequent']:.4f}"


ANSWERS = {}                                        # of teachers that several students share


def once(name, config, script, model, tokenizer, questions, log):
    """choices(), of the same teacher and questions once."""
    if name != "teacher":
        return choices(script, model, tokenizer, questions, log)
    stamps = sorted((path.name, path.stat().st_mtime_ns) for path in Path(config.teacher).iterdir())
    key = repr((stamps, config.teacher, config.teacher_dtype, model.vocab, questions))
    if key not in ANSWERS:
        ANSWERS.clear()
        ANSWERS[key] = choices(script, model, tokenizer, questions, log)
    return ANSWERS[key]


def table(script, model, data, config, scores, folder, log=print, stem="eval", questions=None):
    """evaluate()'s answers by split -> dict of what there is to say of a model, its teacher, if config has one, and
    n-grams: scores with perplexity, choices by column, table by column and row. questions: instead of the data's.

    Writes folder/stem.json and samples/stem.txt, which is final.txt if the stem is eval."""
    split, place = "test" if "test" in scores else next(iter(scores)), "the file"
    if questions is None:
        questions, place = own_questions(data, split)
    models = {"model": model}
    if config.teacher:
        models["teacher"] = script.frozen_teacher(config.teacher, config.teacher_dtype, str(data.table.device))
        models["teacher"].vocab = model.vocab       # the first ids of a padded vocabulary, as in evaluate()
    ngram = NGram(data)
    orders = {f"{ngram.order}-gram": ngram.order, "unigram": 1}
    ce = {"model": {name: of["ce"] for name, of in scores.items()}}
    if config.teacher:
        ce["teacher"] = {name: of["teacher_ce"] for name, of in scores.items()}
    ce |= {name: {at: ngram.ce(data, at, order) for at in scores} for name, order in orders.items()}
    asked = {}
    if questions:
        asked = {name: once(name, config, script, one, data.tokenizer, questions, log) for name, one in models.items()}
        asked |= {name: ngram.choices(data.tokenizer, questions, order) for name, order in orders.items()}
    perplexity = {name: {at: math.exp(min(x, 700.0)) for at, x in of.items()} for name, of in ce.items()}
    columns = {name: {f"{split} CE": of[split], f"{split} perplexity": perplexity[name][split]}
               | {f"{at} CE": x for at, x in of.items() if at != split} for name, of in ce.items()}
    if config.teacher:
        columns["model"][f"{split} KL to the teacher"] = scores[split]["kl"]
    for name, one in asked.items():
        columns[name] |= {f"choices {kind}": one.get(kind) for kind in ("acc", "acc_norm")}
    found = {"run_name": config.run_name, "phase": config.phase, "seed": config.seed, "teacher": config.teacher,
             "split": split, "rows": {name: len(data.rows[name]) for name in scores},
             "supervised_tokens": {name: int(data.asked[data.rows[name]].sum()) for name in scores},
             "scores": {name: of | {"perplexity": perplexity["model"][name]} for name, of in scores.items()},
             "choices": asked, "table": columns}
    folder.mkdir(parents=True, exist_ok=True)
    found = write_json(folder / f"{stem}.json", found)
    completions(script, model, data, folder / f"samples/{'final' if stem == 'eval' else stem}.txt", split=split)

    def shown(name, row, x):                        # with the interval, if it is a share of questions
        interval = found["choices"].get(name, {}).get(f"{row.removeprefix('choices ')}_interval")
        return text_of(x) + ("" if interval is None else " [{:.3f}, {:.3f}]".format(*interval))
    titles = {"model": config.run_name}
    for line in lines_of([(titles.get(name, name), {row: shown(name, row, x) for row, x in column.items()})
                          for name, column in found["table"].items()]):
        log(line)
    log("CE and KL in nats per token: " + ", ".join(
        f"{n:,} {name} rows with {found['supervised_tokens'][name]:,} tokens" for name, n in found["rows"].items())
        + f"; n-grams: {len(ngram.rows):,} of {len(data.rows['train']):,} train rows, at most {MOST:,} tokens a split")
    if asked and asked["model"]["n"]:
        log(f"choices: {asked['model']['n']:,} questions of {place}, {floor_line(asked['model'])}; Wilson's intervals")
    return found


# ------------------------------------------------------------------------------------------- with a teacher and without
def spread(values):
    """One number per seed -> dict of them, their mean and standard deviation (of a sample; null for a single one)."""
    whole = None not in values
    return {"values": values, "mean": float(np.mean(values)) if whole else None,
            "sd": float(np.std(values, ddof=1)) if whole and len(values) > 1 else None}


def read_run(folder):
    """-> a run's eval.json, and its validations from metrics.jsonl."""
    try:
        found = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
        rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return found, [row for row in rows if row["split"] == "val"]
    except (OSError, ValueError) as error:
        fail(f"{folder} is no finished run: {error}; finish it with --resume --run_name {folder.name}")


def comparison(config, log=print):
    """The runs that the script made with the teacher and without, by equal seeds side by side -> dict of the table.

    Writes comparison.json and comparison.png in the folder of config.run_name, the run with the teacher and seed 0."""
    out, run, n = Path(config.out_dir), config.run_name, config.compare
    taught, alone = "KD + CE" if config.alpha < 1 else "KD alone", "CE alone"
    names = {taught: [run, *(f"{run}-kd{i}" for i in range(1, n))], alone: [f"{run}-ce{i}" for i in range(n)]}
    read = {group: [read_run(out / name) for name in of] for group, of in names.items()}
    first, rows, cells = read[taught][0][0], {}, {}
    columns = {name: one for name, one in first["table"].items() if name != "model"}
    for row in first["table"]["model"]:
        values = {group: [one["table"]["model"].get(row) for one, _ in of] for group, of in read.items()}
        rows[row] = {group: spread(of) for group, of in values.items()}
        rows[row] |= {name: one[row] for name, one in columns.items() if row in one}
        paired = [None if None in pair else pair[0] - pair[1] for pair in zip(*values.values())]
        sign, whole = 1 if row.startswith("choices") else -1, None not in paired        # of two CE the lower is better
        rows[row]["difference"] = spread(paired) | ({} if not whole else {
            "low": min(paired), "high": max(paired), "better": sum(sign * x > 0 for x in paired)})
        for group in names:
            mean, sd = (text_of(rows[row][group][name]) for name in ("mean", "sd"))
            cells.setdefault(group, {})[row] = mean + f" +- {sd}" * (sd != "-")
        if whole:
            one = rows[row]["difference"]
            cells.setdefault("difference", {})[row] = (
                f"{one['mean']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}], {one['better']} of {n} better")
    cells |= {name: {row: text_of(x) for row, x in one.items() if row in rows} for name, one in columns.items()}
    order = [name for name in ("teacher", taught, alone, "difference", *columns) if name in cells]
    seeds = [one["seed"] for one, _ in read[taught]]
    steps = {group: [curve[-1]["step"] if curve else None for _, curve in of] for group, of in read.items()}
    for line in lines_of([(name, cells[name]) for name in dict.fromkeys(order)]):
        log(line)
    log(f"seeds {', '.join(map(str, seeds))}: mean +- standard deviation; difference: {taught} less {alone} by seed, "
        "its mean [lowest, highest]")
    done = sorted({x for of in steps.values() for x in of if x is not None})
    log(" or ".join(f"{x:,}" for x in done) + " steps each" + ": NOT equal, so they compare nothing" * (len(done) > 1))
    asked = first["choices"].get("model", {"n": 0})
    if asked["n"]:
        log(f"choices: {asked['n']:,} questions, {floor_line(asked)}")
    found = {"runs": names, "seeds": seeds, "steps": steps, "choices": asked, "rows": rows}
    found = write_json(out / run / "comparison.json", found)
    curves = {group: [curve for _, curve in of] for group, of in read.items()}
    draw_comparison(out / run / "comparison.png", curves, log)
    return found


# ---------------------------------------------------------------------------------------------------------------- verbs
def opened(script, flags, device):
    """-> (the model of --run_name or --model, its config with its Hugging Face folder as the student, out folder)."""
    if bool(flags.model) == bool(flags.run_name):
        fail("give --run_name NAME, a trained run, or --model DIR, a Hugging Face folder")
    if flags.model:
        model, name = script.load_hf(flags.model, device), "-".join(Path(flags.model).resolve().parts[-2:])
        most = min(script.Config.max_length, model.shape.n_positions)
        return (model, script.Config(run_name=name, phase="student", student=flags.model, max_length=most),
                Path(flags.out_dir) / f"eval-{name}")
    folder = trained(flags.out_dir, flags.run_name)
    model = or_fail(script.load_model, folder / "best.safetensors", device)
    if not (folder / "hf/config.json").exists():
        fail(f"{folder} is not finished, it has no hf folder: --resume --run_name {flags.run_name} goes on")
    own = str(folder / "hf")                        # whatever it was made from may be gone
    about = model.about["config"] | {"run_name": flags.run_name, "student": own, "teacher_size": own}
    return model, script.Config(**about), folder


def main_eval(script, argv):
    flags, given = parse_flags(EvalFlags, argv, "The table of a trained model beside its teacher and n-grams.")
    device = launch(flags.device)
    if flags.split not in ("train", "val", "test"):
        fail(f"--split {flags.split}: train, val or test")
    questions = read_questions(flags.eval_mc) if flags.eval_mc else None
    model, config, folder = opened(script, flags, device)
    teacher = flags.teacher or config.teacher
    if not flags.teacher and teacher and not (Path(teacher) / "config.json").exists():
        print(f"without the run's teacher: {teacher} is gone")
        teacher = ""
    config = dataclasses.replace(config, data_dir=flags.data_dir or config.data_dir, teacher=teacher)
    data = script.load_data(config, device)
    model.vocab = min(model.vocab, data.vocab)
    if int(data.table.max()) >= model.vocab:
        fail(f"--data_dir {data.folder} has ids up to {int(data.table.max()):,}, the model only {model.vocab:,}")
    if "split" not in given and not len(data.rows.get("test", [])):
        flags.split = "val"                         # as at the end of a training
    splits = [name for name in dict.fromkeys((flags.split, "val" if flags.split == "test" else flags.split))
              if len(data.rows.get(name, []))]
    if flags.split not in splits:
        fail(f"--split {flags.split}: {data.folder} has no rows in it")
    scores = {name: or_fail(script.evaluate, model, data, config, name) for name in splits}
    stem = "eval" if given <= {"run_name", "out_dir", "device", "model"} else f"eval-{flags.split}"
    if rank() == 0:                                 # other questions than the training's leave its eval.json alone
        table(script, model, data, config, scores, folder, print, stem, questions)
        print(f"written: {folder / stem}.json")
    finish()


def main_sample(script, argv):
    flags, _ = parse_flags(SampleFlags, argv, "Answers of a trained model to instructions.")
    device = launch(flags.device)
    if bool(flags.instruction) == bool(flags.prompts):
        fail("give --instruction TEXT, or --prompts FILE with an instruction per line")
    for name, least in {"num_samples": 1, "max_tokens": 1, "temperature": 0, "top_k": 0, "seed": 0}.items():
        if getattr(flags, name) < least:
            fail(f"--{name} {getattr(flags, name)}: must be at least {least}")
    try:
        asked = [flags.instruction] if flags.instruction else Path(flags.prompts).read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        fail(f"--prompts {flags.prompts} cannot be read: {error}")
    model, config, _ = opened(script, flags, device)
    tokenizer = script.load_tokenizer(config.student)
    model.vocab = min(model.vocab, tokenizer.size)
    prompts = [(number, text, prompt_ids(tokenizer, text)) for number, text in enumerate(asked, 1) if text.strip()]
    if not prompts:
        fail("nothing is asked: --instruction and the lines of --prompts are blank")
    for number, _, ids in prompts:
        if len(ids) >= model.shape.n_positions or max(ids) >= model.shape.vocab_size:
            fail(f"instruction {number} has {len(ids):,} tokens, the highest id is {max(ids):,}; the model has "
                 f"{model.shape.n_positions:,} positions and {model.shape.vocab_size:,} ids")
    try:
        file = open(flags.out, "w", encoding="utf-8") if flags.out else None
    except OSError as error:
        fail(f"--out {flags.out} cannot be written: {error.strerror}")
    for _, text, ids in prompts:
        for seed in range(flags.seed, flags.seed + flags.num_samples):
            made = script.generate(model, ids, flags.max_tokens, flags.temperature, flags.top_k, seed, tokenizer.eos)
            row = {"instruction": text, "response": answer(tokenizer, made), "seed": seed}
            print(json.dumps(row) if file else f"{PROMPT.format(text)}{row['response']}\n", file=file, flush=True)
    if file:
        file.close()
        print(f"{flags.out}: {len(prompts) * flags.num_samples:,} answers")


VERBS = {"eval": main_eval, "sample": main_sample}
