"""What only evaluates: multiple choice by likelihood, the floors (n-grams, which have read only the data), a picture.

`script` is the module of train_distill.py, which cannot be imported by name when it runs as a program."""
import json
import math
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

from common import fail
from data.files import raw_lines
from data.text.prepare import MAX_LINE, Bad, read_row
from data.text.tokens import PROMPT

QUESTIONS = 400                                     # of mc.jsonl, a sample of them if there are more
MOST = 1_000_000                                    # supervised tokens that the n-grams see of a split


# -------------------------------------------------------------------------------------------------- multiple choice
def wilson(right, n, z=1.959964):
    """95 % interval of a share, right of n (Wilson 1927) -> [low, high]."""
    p, centre = right / n, (right + z * z / 2) / (n + z * z)
    half = z * math.sqrt(n * p * (1 - p) + z * z / 4) / (n + z * z)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def tokens_of(tokenizer, question):
    """Each option -> (ids of the prompt and the option as one text, place of the first id that has a character of the
    option). What the tokenizer puts behind a text is cut off. An option without tokens has place 0."""
    begin, found = len(question["prompt"]), []
    for ids, offsets in tokenizer.encode_batch([question["prompt"] + option for option in question["options"]]):
        places = [i for i, (start, end) in enumerate(offsets) if end > max(begin, start)] or [0]
        found.append((list(ids[:places[-1] + 1]), places[0]))
    return found


def score(script, model, options):
    """What tokens_of() gave -> log p of each option's tokens after what is before them, float64 (options,).

    What all have in common is computed once; but the last token before an option, which foretells it, not with that."""
    device, W, found = model.token.weight.device, model.head_weight[:model.vocab], []
    shared = min(first for _, first in options) - 1
    shared = next((i for i in range(shared) if len({ids[i] for ids, _ in options}) > 1), shared)
    past = [[] for _ in model.blocks]
    if shared:
        model(torch.tensor([options[0][0][:shared]], device=device), False, past)
    past = [[x.expand(len(options), -1, -1, -1) for x in pair] for pair in past]
    longest = max(len(ids) for ids, _ in options) - 1
    rest = [ids[shared:-1] + [0] * (longest - len(ids) + 1) for ids, _ in options]      # on the right: nobody sees pads
    h = model(torch.tensor(rest, device=device), False, past)
    for x, (ids, first) in zip(h, options):         # one by one: the logits may be large
        log_p = script.widen(F.linear(x[first - 1 - shared:len(ids) - 1 - shared], W)).log_softmax(1)
        found.append(log_p.gather(1, torch.tensor(ids[first:], device=device)[:, None]).sum().cpu().double())
    return torch.stack(found).numpy()


def judge(questions, scores):
    """Scores of the options of each question -> dict of how often the answer's is highest, as it is (acc) and by
    character of the option (acc_norm, so called by lm-evaluation-harness); the first one of equals counts.

    With intervals; chance, that of a blind guess; most_frequent, that of always the text that is most often right."""
    n = len(questions)
    if not n:
        return {"n": 0}
    found, scores = {"n": n}, [np.round(x, 4) for x in scores]          # what differs in the last bits is equal
    lengths = [np.array([len(option) for option in question["options"]]) for question in questions]
    for name, values in ("acc", scores), ("acc_norm", [x / length for x, length in zip(scores, lengths)]):
        right = sum(int(x.argmax()) == question["answer"] for x, question in zip(values, questions))
        found |= {name: right / n, f"{name}_interval": wilson(right, n)}
    answers = Counter(question["options"][question["answer"]] for question in questions)
    chance = math.fsum(1 / len(length) for length in lengths) / n         # the same in any order
    return found | {"chance": chance, "most_frequent": max(answers.values()) / n}


@torch.no_grad()
def choices(script, model, tokenizer, questions, log=print):
    """Questions, dicts of prompt, options and answer (an index) -> dict of judge(), and how many were skipped because
    the model has too few positions for an option, or lacks an id of it, or the prompt has no token of its own."""
    model = script.unwrap(model)
    was_training, kept, scores = model.training, [], []
    model.eval()
    for question in questions:
        options = tokens_of(tokenizer, question)
        if all(first and len(ids) - 1 <= model.shape.n_positions and max(ids) < model.vocab for ids, first in options):
            kept.append(question)
            scores.append(score(script, model, options))
    model.train(was_training)
    if len(kept) < len(questions):
        log(f"{len(questions) - len(kept):,} of {len(questions):,} questions skipped: over the model's "
            f"{model.shape.n_positions:,} positions, with an id beyond its {model.vocab:,}, or without a prompt")
    return judge(kept, scores) | {"skipped": len(questions) - len(kept)}


def read_questions(path):
    """A file of JSON lines -> list of questions; what is wrong ends in fail(), with the numbers of the lines."""
    questions, bad = [], []
    for number, line in raw_lines(path, MAX_LINE):
        try:
            given = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):        # read_row says what is wrong
            given = None
        as_it_is = isinstance(given, dict) and "prompt" in given
        row = read_row(number, json.dumps(given | {"instruction": given["prompt"]}).encode() if as_it_is else line)
        if isinstance(row, Bad) or not row.options:
            bad.append(f"{number} ({row.reason if isinstance(row, Bad) else 'no options'})")
            continue
        prompt = row.instruction if as_it_is else PROMPT.format(row.instruction)
        questions.append({"prompt": prompt, "options": row.options, "answer": row.answer})
    if bad or not questions:
        fail(f"--eval_mc {path}: " + (f"{len(bad):,} bad lines: {', '.join(bad[:8])}" if bad else "no questions in it"))
    return questions


def own_questions(data, split):
    """The questions of the data's mc.jsonl in a split, or in val if it has none there -> (list, the split)."""
    path = data.folder / "mc.jsonl"
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    name = split if any(question["split"] == split for question in found) else "val"
    found = [question for question in found if question["split"] == name]
    return [found[i] for i in np.sort(np.random.default_rng(0).permutation(len(found))[:QUESTIONS])], name


# ----------------------------------------------------------------------------------------------------------- the floors
class NGram:
    """Token n-gram model of the train split's supervised tokens and what stands before them; order 1 is the unigram.

    Each order is smoothed by the one below it: p_k(t | c) = (count(c t) + w p_{k-1}(t | c')) / (count(c) + w), with
    p_0 = 1 / K (MacKay and Peto 1995)."""
    def __init__(self, data, order=5, w=4.0):
        self.K, self.w, self.known = data.tokenizer.size, w, []
        self.order = min(order, int(62 / math.log2(self.K)))            # so that a gram is an int64
        self.rows = some_rows(data, "train")
        for code in self.codes(*places(data, self.rows), self.order):
            grams, counts = np.unique(code, return_counts=True)
            heads = np.flatnonzero(np.diff(grams // self.K, prepend=-1))
            self.known.append(((grams, counts), (grams[heads] // self.K, np.add.reduceat(counts, heads))))

    def codes(self, table, place, begin, order):
        """Yield for each order the last tokens up to each place as digits; before a row stands its first token."""
        code = np.zeros(len(place), np.int64)
        for lag in range(order):
            code = code + table[np.maximum(place - lag, begin)] * np.int64(self.K) ** lag
            yield code

    def probability(self, table, place, begin, order):
        """Of the token at each place of a table of ids, whose row starts at begin -> float64 (places,)."""
        def look_up(known, code):
            values, counts = known
            i = np.searchsorted(values, code).clip(max=len(values) - 1)
            return np.where(values[i] == code, counts[i], 0)
        p = np.full(len(place), 1 / self.K)
        for (grams, contexts), code in zip(self.known, self.codes(table, place, begin, order)):
            p = (look_up(grams, code) + self.w * p) / (look_up(contexts, code // self.K) + self.w)
        return p

    def ce(self, data, split, order):
        """Nats per supervised token of a split."""
        return float(-np.log(self.probability(*places(data, some_rows(data, split)), order)).mean())

    def choices(self, tokenizer, questions, order):
        """judge() of what this model knows without having read the question, unless it is short."""
        options = [(question, *pair) for question in questions for pair in tokens_of(tokenizer, question)]
        sizes = np.array([len(ids) for _, ids, _ in options])
        begin = np.cumsum(sizes) - sizes
        place = [np.arange(start + first, start + len(ids)) for start, (_, ids, first) in zip(begin, options)]
        n, table = np.array([len(one) for one in place]), np.concatenate([np.array(ids) for _, ids, _ in options])
        log_p = np.log(self.probability(table, np.concatenate(place), np.repeat(begin, n), order))
        sums = np.add.reduceat(log_p, np.cumsum(n) - n)
        return judge(questions, np.split(sums, np.cumsum([len(question["options"]) for question in questions])[:-1]))


def some_rows(data, split):
    """The rows of a split, or a seeded sample of them with MOST supervised tokens."""
    rows = np.random.default_rng(0).permutation(data.rows[split])
    return rows[:max(1, int((np.cumsum(data.asked[rows]) <= MOST).sum()))]


def places(data, rows):
    """-> the table of ids, where in it the supervised tokens of the rows are (N,), and where their rows begin (N,)."""
    n = data.asked[rows]
    begin, first = np.repeat(data.start[rows], n), np.repeat(data.first[rows], n)
    return data.table.cpu().numpy(), begin + first + 1 + np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n), begin


def draw_comparison(path, curves, log=print):
    """{group: list of validations of each seed} -> a PNG: cross-entropy by step, and the teacher's."""
    try:
        from matplotlib.figure import Figure        # not pyplot: no backend to choose, nothing global to close
    except ImportError:
        log(f"no {path.name}: pip install matplotlib")
        return
    axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).subplots()
    for (group, of), colour in zip(curves.items(), ("tab:blue", "tab:orange")):
        for i, curve in enumerate(of):
            points = [(row["step"], row["ce"]) for row in curve if row["ce"] is not None]
            label = None if i else group
            axes.plot(*zip(*points) if points else ([], []), ".-", color=colour, linewidth=1, label=label)
    teacher = [row["teacher_ce"] for of in curves.values() for curve in of for row in curve if row.get("teacher_ce")]
    if teacher:
        axes.axhline(teacher[-1], color="black", linestyle="--", label="teacher")
    axes.set(xlabel="step", ylabel="validation cross-entropy, nats per token")
    axes.legend()
    figure.savefig(path, dpi=100)
