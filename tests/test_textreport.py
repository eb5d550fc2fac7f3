"""data/text/metrics.py and report.py: choices against the scoring of whole texts, n-grams against counts, tables of
runs whose numbers are known, the verbs and what they refuse.
"""
import json
import math
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_distill as script
from data.text import metrics, prepare, report
from data.text.metrics import NGram, choices, judge, own_questions, read_questions, score, tokens_of, wilson
from data.text.prepare import write_lines
from data.text.tokens import PROMPT, Bytes

LLAMA = {"model_type": "llama", "vocab_size": 260, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 160, "hidden_act": "silu",
         "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "vocab_size": 260, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 160}
WORDS = "mass speed force is two three doubled grows \u00e9t\u00e9 \u00bd".split()

def random_model(raw=LLAMA, vocab=257, seed=0):
    torch.manual_seed(seed)
    model = script.Decoder(raw, vocab=vocab).eval()
    for p in model.parameters():                    # far from uniform, so that an error of place is seen
        torch.nn.init.normal_(p, std=0.3)
    return model

def random_questions(n=12, seed=0):
    rng, found = np.random.default_rng(seed), []
    for _ in range(n):
        options = list(dict.fromkeys(" ".join(rng.choice(WORDS, rng.integers(1, 4))) for _ in range(5)))
        prompt = " ".join(rng.choice(WORDS, rng.integers(1, 8))) + ": "
        found.append({"prompt": prompt, "options": options, "answer": int(rng.integers(len(options)))})
    return found

@torch.no_grad()
def alone(model, prompt, option):
    """log p of an option, of the whole text without a cache, position by position."""
    ids, begin = list((prompt + option).encode()), len(prompt.encode())
    log_p = model(torch.tensor([ids]))[0, :, :model.vocab].double().log_softmax(-1)
    return sum(float(log_p[t - 1, ids[t]]) for t in range(begin, len(ids)))

class Pieces:
    """A tokenizer with a token before and one after each text, whose tokens are of two letters and may straddle."""
    def encode_batch(self, texts):
        rows = [[(i, min(i + 2, len(text))) for i in range(0, len(text), 2)] for text in texts]
        return [([250, *(sum(text[a:b].encode()) % 250 for a, b in spans), 256], [(0, 0), *spans, (0, 0)])
                for text, spans in zip(texts, rows)]

# -------------------------------------------------------------------------------------------------- multiple choice
@pytest.mark.parametrize("right, n", [(0, 7), (7, 7), (3, 7), (50, 400)])
def test_wilson_against_the_shares_that_the_data_do_not_refuse(right, n):
    p = np.linspace(0, 1, 2_000_001)
    kept = p[np.abs(right / n - p) <= 1.959964 * np.sqrt(p * (1 - p) / n)]
    assert wilson(right, n) == pytest.approx([kept[0], kept[-1]], abs=1e-6)

@pytest.mark.parametrize("raw", [LLAMA, GPT2, LLAMA | {"tie_word_embeddings": False}], ids=["llama", "gpt2", "untied"])
def test_scores_are_those_of_each_whole_text_alone(raw):
    model = random_model(raw)
    cases = ("x", ["a", "bc"]), ("x", ["abcd", "abce", "ab"]), ("long prompt ", ["same", "same and more"]), (
        "\u00e9", ["\u00e9", "\u00e8"])            # two letters that share a byte
    for prompt, options in [*cases, *((question["prompt"], question["options"]) for question in random_questions())]:
        with torch.no_grad():
            found = score(script, model, tokens_of(Bytes(), {"prompt": prompt, "options": options}))
        assert found.tolist() == pytest.approx([alone(model, prompt, option) for option in options], abs=1e-4)

def test_the_tokens_of_an_option_are_told_by_their_characters():
    (ids, first), (longer, place) = tokens_of(Pieces(), {"prompt": "abc", "options": ["d", "de"]})
    assert len(ids) == 3 and first == 2             # 250 ab cd: the token that straddles counts, the one after does not
    assert len(longer) == 4 and place == 2
    assert tokens_of(Bytes(), {"prompt": "\u00e9", "options": ["\u00e9"]})[0] == ([195, 169, 195, 169], 2)

def test_choices_are_those_of_whole_texts_in_any_order_and_grouping():
    model, questions = random_model(), random_questions(30)
    model.train()
    found = choices(script, model, Bytes(), questions)
    sums = [[alone(model, q["prompt"], option) for option in q["options"]] for q in questions]
    means = [[x / len(option) for x, option in zip(row, q["options"])] for row, q in zip(sums, questions)]
    for name, rows in ("acc", sums), ("acc_norm", means):
        right = sum(row.index(max(row)) == q["answer"] for row, q in zip(rows, questions))
        assert found[name] == right / 30 and found[f"{name}_interval"] == wilson(right, 30)
    assert found["n"] == 30 and found["skipped"] == 0 and model.training
    assert found["chance"] == pytest.approx(np.mean([1 / len(q["options"]) for q in questions]))
    assert choices(script, model, Bytes(), questions[::-1]) == found
    parts = [choices(script, model, Bytes(), questions[i:i + 10])["acc"] for i in (0, 10, 20)]
    assert np.mean(parts) == pytest.approx(found["acc"])
    model.token.weight.data[257:] = 100.0           # padding of the vocabulary: nothing may depend on it
    assert choices(script, model, Bytes(), questions) == found

def test_the_first_of_equals_is_chosen():
    model = random_model()
    model.norm.weight.data.zero_()                  # all logits are 0
    question = {"prompt": "p", "options": ["abc", "xyz", "uvw"], "answer": 0}
    assert [choices(script, model, Bytes(), [question | {"answer": i}])["acc"] for i in range(3)] == [1, 0, 0]
    found = choices(script, model, Bytes(), [{"prompt": "p", "options": ["abcdef", "ab"], "answer": 1}])
    assert (found["acc"], found["acc_norm"]) == (1, 0)                             # equal by character
    assert judge([question], [np.array([-3.00001, -3.0, -9])])["acc"] == 1          # what rounding made
    questions = [{"prompt": "p", "options": ["yes", "no"], "answer": int(i > 2)} for i in range(10)]
    found = judge(questions, [np.array([0.0, -1.0])] * 10)
    assert (found["acc"], found["chance"], found["most_frequent"]) == (0.3, 0.5, 0.7)

def test_what_cannot_be_scored_is_counted_and_told():
    model, said = random_model(GPT2), []
    fits = {"prompt": "p" * 152, "options": ["123456789", "987654321"], "answer": 0}
    long, bare = fits | {"prompt": "p" * 153}, {"prompt": "", "options": ["a", "b"], "answer": 0}
    found = choices(script, model, Bytes(), [fits, long, bare], said.append)
    assert (found["n"], found["skipped"]) == (1, 2) and "2 of 3 questions skipped" in said[0]
    assert choices(script, model, Bytes(), [long], said.append) == {"n": 0, "skipped": 1}
    model.vocab = ord("5")                          # an option with an id that the model lacks
    assert choices(script, model, Bytes(), [fits], said.append)["skipped"] == 1

# ------------------------------------------------------------------------------------------------------------ n-grams
def small_data(folder):
    """What load_data returns, of 60 random rows of bytes with questions, 40 of them train; in folder/set."""
    rng, splits = np.random.default_rng(0), "train val test train train train".split()
    rows = [{"instruction": question.pop("prompt"), "response": " ".join(rng.choice(WORDS[:4], 3)),
             "split": splits[i % 6]} | question for i, question in enumerate(random_questions(60))]
    write_lines(folder / "rows.jsonl", rows)
    made = prepare.main(["--input", str(folder / "rows.jsonl"), "--name", "set", "--out_dir", str(folder)])
    return script.load_data(script.Config(data_dir=str(made)))

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("text"))

def targets(data, split):
    """(the four tokens before, the token) of each supervised position, by loops."""
    table = data.table.tolist()
    for row in data.rows[split]:
        for t in range(data.first[row], data.length[row]):
            end = data.start[row] + t + 1
            yield table[end - 4:end], table[end]

@pytest.mark.parametrize("order", [1, 2, 5])
def test_n_grams_are_the_recursion_of_the_counts(data, order):
    ngram, train = NGram(data), list(targets(data, "train"))

    def p(context, token, k):
        if not k:
            return 1 / 257
        known = Counter(t for c, t in train if c[5 - k:] == context[5 - k:])
        return (known[token] + 4 * p(context, token, k - 1)) / (sum(known.values()) + 4)
    wanted = np.mean([-math.log(p(context, token, order)) for context, token in targets(data, "val")])
    assert ngram.order == 5 and ngram.ce(data, "val", order) == pytest.approx(wanted, abs=1e-9)

@pytest.mark.parametrize("order", [1, 2, 5])
def test_probabilities_sum_to_one(data, order):
    ngram, context = NGram(data), list(b"is mass")
    table = np.array([context + [token] for token in range(257)]).ravel()
    begin = np.arange(257) * 8
    assert ngram.probability(table, begin + 7, begin, order).sum() == pytest.approx(1, abs=1e-12)

def test_large_vocabularies_and_many_tokens(data, monkeypatch):
    big = vars(data) | {"tokenizer": SimpleNamespace(size=151_936), "asked": data.asked}
    assert NGram(SimpleNamespace(**big)).order == 3
    monkeypatch.setattr(metrics, "MOST", 200)
    assert 1 <= len(rows := NGram(data).rows) < len(data.rows["train"]) and data.asked[rows].sum() <= 200

def test_choices_of_the_n_gram(data):
    ngram, questions = NGram(data), random_questions()

    def one(question, option):
        table = np.array(list((question["prompt"] + option).encode()))
        place = np.arange(len(question["prompt"].encode()), len(table))
        return np.log(ngram.probability(table, place, 0 * place, 5)).sum()
    scores = [np.array([one(q, option) for option in q["options"]]) for q in questions]
    assert ngram.choices(Bytes(), questions, 5) == judge(questions, scores)

# ------------------------------------------------------------------------------------------------- table, comparison
def finished(folder, data_dir, seed=0, teacher=""):
    """A run's folder as the script leaves it, of random weights -> (model, config)."""
    config = script.Config(run_name=folder.name, out_dir=str(folder.parent), data_dir=str(data_dir), seed=seed,
                           phase="student" if teacher else "teacher", teacher=teacher)
    model = random_model(seed=seed)
    model.about = {"config": vars(config), "raw": LLAMA, "vocab": 257}
    folder.mkdir(parents=True)
    script.write_file(folder / "best.safetensors", script.model_tensors(model), {"about": model.about, "step": 3})
    script.save_hf(model, folder / "hf")
    return model, config

def test_table(data, tmp_path):
    finished(tmp_path / "tutor", data.folder, seed=5)
    model, config = finished(tmp_path / "pupil", data.folder, teacher=str(tmp_path / "tutor/hf"))
    scores, said = {split: script.evaluate(model, data, config, split) for split in ("val", "test")}, []
    scores["val"]["loss"] = math.nan                # null in the JSON
    found = report.table(script, model, data, config, scores, tmp_path / "pupil", said.append)
    assert found == json.loads((tmp_path / "pupil/eval.json").read_text(), parse_constant=pytest.fail)
    assert found["scores"]["test"]["perplexity"] == pytest.approx(math.exp(scores["test"]["ce"]))
    assert found["supervised_tokens"]["test"] == len(list(targets(data, "test")))
    columns, questions = found["table"], own_questions(data, "test")[0]
    assert list(columns) == ["model", "teacher", "5-gram", "unigram"] and len(questions) == 10
    assert columns["model"]["test KL to the teacher"] == scores["test"]["kl"] > 0
    assert all(columns["teacher"][f"{split} CE"] == scores[split]["teacher_ce"] for split in scores)
    assert columns["unigram"]["test CE"] == NGram(data).ce(data, "test", 1)
    for name, one in ("model", model), ("teacher", script.load_hf(tmp_path / "tutor/hf", vocab=257)):
        assert found["choices"][name] == choices(script, one, Bytes(), questions)
    assert len({len(line) for line in said[:7]}) == 1 and said[0].split() == ["pupil", "teacher", "5-gram", "unigram"]
    assert said[1].split() == ["test", "CE", *(f"{one['test CE']:.4f}" for one in columns.values())]
    assert "10 questions of test, chance 0.2" in said[-1]
    samples = (tmp_path / "pupil/samples/final.txt").read_text()
    assert samples.count("### Instruction:") == samples.count("--- model") == 8 and "<eos>" not in samples
    row = int(samples.split("--- test row ")[1].split("\n")[0])
    ids = data.table[data.start[row]:data.start[row] + data.length[row] + 1].tolist()
    asked = ids[:np.load(data.folder / "prompt.npy")[row]]
    made = script.generate(model, asked, 200, 0.0, end=256)
    assert samples.startswith(Bytes().decode(asked) + f"--- test row {row}\n")
    assert f"\n--- model\n{report.answer(Bytes(), made)}\n" in samples

def test_table_without_teacher_questions_or_test_rows(tmp_path):
    data = small_data(tmp_path)
    (data.folder / "mc.jsonl").unlink()
    model, config = finished(tmp_path / "r", data.folder)
    found = report.table(script, model, data, config, {"val": script.evaluate(model, data, config, "val")},
                         tmp_path / "r", lambda text: None)
    assert found["choices"] == {} and list(found["table"]) == ["model", "5-gram", "unigram"]
    assert list(found["table"]["model"]) == ["val CE", "val perplexity"] and found["split"] == "val"

def test_questions_of_val_stand_in_and_many_are_sampled(tmp_path, monkeypatch):
    questions = [{"split": "val"} | question for question in random_questions(20)]
    write_lines(tmp_path / "mc.jsonl", questions)
    here = SimpleNamespace(folder=tmp_path)
    assert own_questions(here, "test") == (questions, "val")
    monkeypatch.setattr(metrics, "QUESTIONS", 5)
    assert len(some := own_questions(here, "test")[0]) == 5 and some == [q for q in questions if q in some]

def fake_runs(folder, **changed):
    ces = {"r": 0.9, "r-kd1": 0.8, "r-kd2": 1.0, "r-ce0": 1.1, "r-ce1": 1.0, "r-ce2": 0.95}
    for i, (name, ce) in enumerate(ces.items()):
        (folder / name).mkdir(parents=True)
        model = {"test CE": ce, "test perplexity": math.exp(ce), "test KL to the teacher": ce / 10,
                 "choices acc": 1 - ce / 2, "choices acc_norm": 0.5} | changed.get(name, {})
        (folder / name / "eval.json").write_text(json.dumps({
            "seed": i % 3, "choices": {"model": {"n": 40, "chance": 0.125, "most_frequent": 0.1}},
            "table": {"model": model, "teacher": {"test CE": 0.5, "choices acc": 0.9}, "unigram": {"test CE": 3.0}}}))
        rows = [{"step": i, "split": "val", "loss": 1.0, "ce": 2 / i, "teacher_ce": 0.5} for i in range(1, 5)]
        write_lines(folder / name / "metrics.jsonl", [*rows, {"step": 1, "split": "train", "loss": 1.0}])
    return script.Config(run_name="r", out_dir=str(folder), compare=3)

def test_comparison(tmp_path, monkeypatch):
    config, said = fake_runs(tmp_path), []
    found = report.comparison(config, said.append)
    assert found == json.loads((tmp_path / "r/comparison.json").read_text(), parse_constant=pytest.fail)
    assert (tmp_path / "r/comparison.png").stat().st_size > 1000
    row = found["rows"]["test CE"]
    assert row["KD + CE"] == {"values": [0.9, 0.8, 1.0], "mean": pytest.approx(0.9), "sd": pytest.approx(0.1)}
    assert (row["CE alone"]["mean"], row["CE alone"]["sd"]) == pytest.approx((3.05 / 3, math.sqrt(0.035 / 6)))
    assert row["difference"]["values"] == pytest.approx([-0.2, -0.2, 0.05])
    assert [row["difference"][name] for name in ("low", "high", "better")] == pytest.approx([-0.2, 0.05, 2])
    assert (row["teacher"], row["unigram"]) == (0.5, 3.0)
    better = {name: of["difference"]["better"] for name, of in found["rows"].items()}
    assert better["choices acc"] == 2 and better["choices acc_norm"] == 0   # there the higher one is
    assert found["seeds"] == [0, 1, 2] and found["steps"]["CE alone"] == [4, 4, 4]
    assert said[0].split("  ")[-1] == "unigram" and said[1].startswith("test CE") and said[1].split()[2] == "0.5000"
    assert "0.9000 +- 0.1000" in said[1] and "-0.1167 [-0.2000, +0.0500], 2 of 3 better" in said[1]
    assert "seeds 0, 1, 2" in said[-3] and said[-2] == "4 steps each" and "40 questions, chance 0.1250" in said[-1]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report.comparison(config, said.append)
    assert said[-1] == "no comparison.png: pip install matplotlib"

def test_comparison_of_runs_that_differ(tmp_path, capsys):
    config, said = fake_runs(tmp_path, **{"r-ce1": {"test CE": None}}), []
    write_lines(tmp_path / "r-ce2/metrics.jsonl", [{"step": 9, "split": "val", "loss": 1.0, "ce": 1.0}])
    found = report.comparison(config, said.append)
    assert found["rows"]["test CE"]["CE alone"]["mean"] is None and "difference" in found["rows"]["test CE"]
    assert "4 or 9 steps each: NOT equal" in said[-2]
    (tmp_path / "r-kd2/eval.json").unlink()
    with pytest.raises(SystemExit) as stop:
        report.comparison(config, said.append)
    assert stop.value.code == 2 and "r-kd2 is no finished run" in capsys.readouterr().err

# ------------------------------------------------------------------------------------------------------------- verbs
def test_questions_from_a_file(tmp_path, capsys):
    path, options = tmp_path / "q.jsonl", {"options": ["a", "b"], "answer": 1}
    write_lines(path, [{"prompt": "Q: "} | options, {"instruction": "Q", "options": ["a", "b"], "answer": "b"}])
    assert read_questions(path) == [{"prompt": "Q: "} | options, {"prompt": PROMPT.format("Q")} | options]
    bad = [{"prompt": "p", "options": ["a"], "answer": 0}, {"prompt": 3} | options,
           {"instruction": "p"} | options | {"answer": 2}, {"instruction": "p", "response": "a"}]
    path.write_text("\n".join(["{", "", *map(json.dumps, bad)]))
    with pytest.raises(SystemExit) as stop:
        read_questions(path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "6 bad lines: 1 (not JSON), 2 (empty line), 3 (options" in error
    assert "4 (instruction is no text), 5 (answer is no option), 6 (no options)" in error

@pytest.fixture
def verb(data, tmp_path, capsys):
    """Two runs, pupil and tutor, and what calls the script with --out_dir and --device, and answers what it printed."""
    finished(tmp_path / "tutor", data.folder, seed=5)
    finished(tmp_path / "pupil", data.folder, teacher=str(tmp_path / "tutor/hf"))

    def call(*words):
        script.main([*map(str, words), "--out_dir", str(tmp_path), "--device", "cpu"])
        return capsys.readouterr().out
    return call

def test_eval(data, tmp_path, verb):
    def found(*words, name="pupil/eval"):
        said = verb("eval", *words)
        assert f"written: {tmp_path / name}.json" in said
        return json.loads((tmp_path / f"{name}.json").read_text())
    pupil = "--run_name", "pupil"
    first = found(*pupil)
    assert first["split"] == "test" and first["table"]["model"]["test KL to the teacher"] > 0
    write_lines(tmp_path / "q.jsonl", [{"prompt": "Q: ", "options": ["a", "b"], "answer": 1}])
    one = found(*pupil, "--eval_mc", tmp_path / "q.jsonl", "--split", "val", name="pupil/eval-val")
    assert one["choices"]["model"]["n"] == 1 and json.loads((tmp_path / "pupil/eval.json").read_text()) == first
    same = found("--model", tmp_path / "pupil/hf", "--data_dir", data.folder, "--teacher", tmp_path / "tutor/hf",
                 "--split", "train", name="eval-pupil-hf/eval-train")
    assert same["rows"] == {"train": 40} and same["table"]["model"]["train KL to the teacher"] > 0
    shutil.rmtree(tmp_path / "tutor")
    again = found(*pupil)
    assert "teacher" not in again["table"] and again["table"]["model"]["test CE"] == first["table"]["model"]["test CE"]
    assert "tutor/hf is gone" in verb("eval", *pupil)

def test_sample(tmp_path, verb):
    asked, model = PROMPT.format("How far?"), script.load_hf(tmp_path / "pupil/hf", vocab=257)

    def wanted(*how):
        return report.answer(Bytes(), script.generate(model, list(asked.encode()), 9, *how, 256))
    base = "sample", "--run_name", "pupil", "--max_tokens", 9
    assert verb(*base, "--instruction", "How far?", "--temperature", 0) == asked + wanted(0.0, 0, 0) + "\n\n"
    (tmp_path / "asked.txt").write_text("How far?\n\nHow long?\n")
    verb(*base, "--prompts", tmp_path / "asked.txt", "--num_samples", 2, "--seed", 3, "--out", tmp_path / "a.jsonl")
    rows = list(map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines()))
    assert [(row["instruction"][:8], row["seed"]) for row in rows] == [
        ("How far?", 3), ("How far?", 4), ("How long", 3), ("How long", 4)]
    assert rows[0]["response"] == wanted(0.8, 0, 3) != rows[1]["response"] == wanted(0.8, 0, 4)

def test_refusals(tmp_path, verb, capsys):
    pupil = "--run_name", "pupil"
    asked = "sample", *pupil, "--instruction"
    for words, *flags in [
            ("--model DIR", "eval"), ("--model DIR", "eval", *pupil, "--model", "x"), ("q2", "eval", "--eval_mc", "q2"),
            ("no such trained run", "eval", "--run_name", "none"), ("--split all", "eval", *pupil, "--split", "all"),
            ("no config.json", "eval", "--model", tmp_path), ("no config.json", "eval", *pupil, "--teacher", tmp_path),
            ("--instruction TEXT", "sample", *pupil), ("--top_k -1", *asked, "a", "--top_k", "-1"),
            ("cannot be read", "sample", *pupil, "--prompts", tmp_path), ("instruction 1 has", *asked, "a" * 200),
            ("cannot be written", *asked, "a", "--out", tmp_path), ("is not finished", "eval", *pupil)]:
        if words == "is not finished":
            (tmp_path / "pupil/hf/config.json").unlink()
        with pytest.raises(SystemExit) as stop:
            verb(*flags)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and error.count("\n") == 1, error
