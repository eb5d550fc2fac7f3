"""data/scenes/metrics.py and report.py: scores of pictures made by hand, alarms, tables and pairs of models whose gates
are known, the verbs eval and sample on a toy and on a diffusers folder, and what they refuse.
"""
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import train_adapter as script
from data.scenes import demo, prepare, report
from data.scenes.diffusers_folder import part_sha256
from data.scenes.metrics import COLUMNS, iou, labels_of, score, tight_box
from runs import read_file, write_file

SD1 = Path(__file__).parent / "fixtures/scenes/sd1"
LAYOUT = {"caption": "a red circle and a blue square",
          "objects": [{"name": "a red circle", "bbox": [0.1, 0.1, 0.5, 0.5]},
                      {"name": "blue square", "bbox": [0.5, 0.5, 0.9, 1]}]}
PHOTO = {"caption": "the red cat", "objects": [{"name": "cat", "bbox": [0.1, 0.2, 0.6, 0.9]}]}

@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder of runs: toy-base, toy with opened gates, sd1; the data sets toy_data and latents_data."""
    out = tmp_path_factory.mktemp("scenes")
    prepare.main(["--demo", "--limit", "256", "--name", "toy_data", "--out_dir", str(out)])
    common = dict(out_dir=str(out), device="cpu", batch_size=4, eval_every=0, save_every=0, log_every=0, eval_rows=24,
                  sample_steps=2, warmup_steps=0, learning_rate=2e-3)
    script.train(script.Config(run_name="toy", data_dir=str(out / "toy_data"), max_steps=2, base_steps=30, width=16,
                               depth=1, patch=8, box_mask=True, rms_norm=True, **common))
    rewrite(out, "toy", "toy", opened=True)
    write_latents(out / "latents_data")
    script.train(script.Config(run_name="sd1", data_dir=str(out / "latents_data"), base=str(SD1), max_steps=1,
                               phase="adapter", **common))
    rewrite(out, "sd1", "sd1", opened=True)
    return out

def rewrite(out, run, name, opened=False, **config):
    """The run under another name, with other flags, and its gates opened."""
    tensors, body = read_file(out / run / "best.safetensors")
    tensors = {key: torch.full_like(x, 1.5) if opened and "alpha_" in key else x for key, x in tensors.items()}
    body["about"]["config"] |= config
    (out / name).mkdir(exist_ok=True)
    write_file(out / name / "best.safetensors", tensors, body)

def write_latents(folder, n=12, slots=4, width=24, pooled=0):
    rng, captions, phrases = np.random.default_rng(0), ["", "the red cat", "the dog"], ["cat", "dog", "box"]
    folder.mkdir()
    corner = rng.random((n, slots, 2)) * 0.5
    phrase = np.full((n, slots), -1, np.int32)
    for row in range(n):
        phrase[row, :1 + row % 2] = rng.integers(len(phrases), size=1 + row % 2)
    boxes = np.concatenate([corner, corner + 0.1 + rng.random(corner.shape) * 0.4], -1) * (phrase >= 0)[..., None]
    arrays = {"boxes": boxes.astype(np.float32), "phrase": phrase,
              "caption": rng.integers(1, len(captions), n).astype(np.int32),
              "split": np.array([0] * 8 + [1] * 4, np.uint8),
              "latents": rng.normal(size=(n, 4, 9, 9)).astype(np.float16),
              "contexts": rng.normal(size=(len(captions), 12, width)).astype(np.float16),
              "phrases": rng.normal(size=(len(phrases), 24)).astype(np.float16)}
    if pooled:
        arrays |= {"pooled": rng.normal(size=(len(captions), pooled)).astype(np.float16),
                   "time_ids": np.tile(np.array([18, 18, 0, 0, 18, 18], np.float32), (n, 1))}
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    (folder / "texts.json").write_text(json.dumps({"captions": captions, "phrases": phrases}))
    (folder / "meta.json").write_text(json.dumps({
        "format": 1, "kind": "latents", "name": "made", "splits": ["train", "val", "test"], "slots": slots,
        "size": [18, 18], "scaling_factor": 0.2, "caption_tokens": 12, "base": {
            "vae": part_sha256(SD1, "vae"), "text_encoder": part_sha256(SD1, "text_encoder")}}))

def loaded(out, run):
    """-> (model, its data, its config)"""
    model = script.load_model(out / run / "best.safetensors")
    config = script.Config(**model.about["config"])
    return model, script.load_data(config), config

@pytest.fixture
def verb(capsys):
    def call(name, *argv):
        capsys.readouterr()
        report.VERBS[name](script, [*map(str, argv), "--device", "cpu"])
        return capsys.readouterr().out
    return call

@pytest.fixture
def refused(capsys):
    """-> the one line on stderr"""
    def call(name, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            report.VERBS[name](script, [*map(str, argv), "--device", "cpu"])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        return error
    return call

# ----------------------------------------------------------------------------------------------------------- the scores
def drawing(kind, box, colour=1):
    """labels (1, S, S) of one object, box in pixels"""
    return (demo.shape_masks(np.array(kind), np.array(box, np.float32)) * (1 + colour)).astype(np.uint8)[None]

def judged(labels, kind, box, colour=1):
    """score of a picture that should hold one object in a box in pixels"""
    boxes = np.array([[box]], np.float32) / demo.SIZE
    return score(labels, boxes, np.array([[1]]), np.array([[colour]]), np.array([[kind]]))

def test_an_exact_square_is_perfect_and_a_moved_one_scores_by_hand():
    assert judged(drawing(1, [4, 6, 14, 16]), 1, [4, 6, 14, 16]) == dict.fromkeys(COLUMNS, 1.0) | {"n": 1}
    near = judged(drawing(1, [6, 6, 16, 16]), 1, [4, 6, 14, 16])     # 2 of 10 pixels to the right: 80 / 120
    assert near["miou"] == pytest.approx(80 / 120) and near["coverage"] == pytest.approx(0.8) and near["acc50"] == 1
    far = judged(drawing(1, [9, 6, 19, 16]), 1, [4, 6, 14, 16])      # 50 / 150
    assert far["miou"] == pytest.approx(1 / 3) and far["coverage"] == pytest.approx(0.5) and far["acc50"] == 0
    assert far["presence"] == far["shape"] == 1

def test_a_missing_colour_scores_nothing_and_a_few_pixels_are_no_object():
    assert judged(drawing(1, [4, 6, 14, 16], colour=2), 1, [4, 6, 14, 16]) == dict.fromkeys(COLUMNS, 0.0) | {"n": 1}
    for pixels, present in ((11, 0), (12, 1)):
        labels = np.zeros((1, demo.SIZE, demo.SIZE), np.uint8)
        labels[0, 6:8, 4:10].flat[:pixels] = 2
        labels[0, 6:8, 4:10] = np.where(np.arange(12).reshape(2, 6) < pixels, 2, 0)
        assert judged(labels, 1, [4, 6, 10, 8])["presence"] == present
    scattered = np.zeros((1, demo.SIZE, demo.SIZE), np.uint8)
    scattered[0, range(20), range(20)] = 2          # no two in a row: no box
    assert judged(scattered, 1, [0, 0, 20, 20])["presence"] == 0

@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("box", [[3, 4, 11, 12], [10, 5, 24, 14], [6, 6, 17, 20]])
def test_shapes_are_told_apart_wherever_they_lie(kind, box):
    for asked in range(3):
        assert judged(drawing(kind, box), asked, box)["shape"] == (asked == kind)
        assert judged(drawing(kind, box), asked, [0, 20, 8, 28])["shape"] == (asked == kind)

def test_overlaps_against_counted_pixels():
    rng = np.random.default_rng(0)
    for _ in range(50):
        masks, boxes = np.zeros((2, 20, 20), bool), np.sort(rng.integers(0, 21, (2, 2, 2)), 1)
        if (boxes[:, 0] == boxes[:, 1]).any():
            continue
        for mask, ((x0, y0), (x1, y1)) in zip(masks, boxes):
            mask[y0:y1, x0:x1] = True
            assert tight_box(mask, 1).tolist() == [x0, y0, x1, y1]
        assert iou(*boxes.reshape(2, 4)) == pytest.approx((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum())
    stray = np.zeros((20, 20))
    stray[4:8, 4:9] = stray[15, 15] = 1
    assert tight_box(stray, 2).tolist() == [4, 4, 9, 8] and tight_box(stray * 0, 1) is None

def test_only_present_objects_count_and_none_is_no_score():
    boxes = np.array([[[4, 6, 14, 16], [20, 20, 30, 30]]], np.float32) / demo.SIZE
    given = drawing(1, [4, 6, 14, 16]), boxes
    colours, kinds = np.array([[1, 2]]), np.array([[1, 1]])
    assert score(*given, np.array([[1, 0]]), colours, kinds)["acc50"] == 1
    half = score(*given, np.array([[1, 1]]), colours, kinds)
    assert half["acc50"] == 0.5 and half["n"] == 2
    none = score(*given, np.array([[0, 0]]), colours, kinds)
    assert none["n"] == 0 and np.isnan(none["acc50"])

def test_the_nearest_colour_of_each_pixel():
    labels = np.random.default_rng(0).integers(0, 5, (2, 32, 32))
    pictures = torch.from_numpy(demo.PALETTE * 2 - 1)[torch.from_numpy(labels)].permute(0, 3, 1, 2)
    assert (labels_of(pictures + 0.1 * torch.rand_like(pictures)) == labels).all()

def test_other_boxes_are_a_permutation_within_equal_counts_without_fixed_points():
    present = np.random.default_rng(0).random((50, 4)) < 0.5
    present[present.sum(1) == 4] = False
    present[7] = True                               # the only one with four
    order, count = report.other_boxes(present), present.sum(1)
    assert sorted(order) == [*range(50)] and (count[order] == count).all()
    assert np.flatnonzero(order == np.arange(50)).tolist() == [7]
    assert report.other_boxes(torch.from_numpy(present)).tolist() == order.tolist()

# ----------------------------------------------------------------------------------------------------------- the alarms
HEALTHY = {"attn": [0.3, 0.005], "dense": [0.4, 0.2], "ratio": [0.2, 0.9], "grad": [1e-3, 1e-3]}

def test_alarms_fire_and_healthy_gates_are_silent():
    shut = HEALTHY | {"attn": [0.001, 0.002], "dense": [0.0, 0.009]}
    assert report.alarm(HEALTHY, 20_000) == report.alarm(shut, 999) == ""
    assert report.alarm(shut, 1000).startswith("collapse")
    for wide in HEALTHY | {"dense": [0.1, 0.95]}, HEALTHY | {"ratio": [1.2, 0.1]}:
        assert report.alarm(wide, 10).startswith("over-activation")

def test_gates_of_opposite_signs_do_not_cancel(out):
    base = script.ToyBase(16, 2, 8, gated=True)
    script.reset_adapter(base)
    model = script.Adapter(base)
    for fuser, gate in zip(model.fusers, (0.7, -0.7)):
        fuser.alpha_attn.data.fill_(gate), fuser.alpha_dense.data.fill_(-gate)
    _, data, config = loaded(out, "toy")
    gates = script.gates_of(model, data, config)
    assert gates["attn"] == gates["dense"] == pytest.approx([np.tanh(0.7)] * 2)
    assert report.near_ends({"attn": [0.001, 0.95], "dense": [0.5, 0.5]}) == (0.25, 0.25)

@pytest.mark.parametrize("place", ["down_blocks.0", "mid_block", "up_blocks.2"])
def test_each_layer_is_told_with_its_own_gates_and_ratio(out, place):
    model, data, config = loaded(out, "sd1")
    for name, module in model.base.named_modules():
        if isinstance(module, script.Fuser):
            module.alpha_attn.data.fill_(0.5 * name.startswith(place)), module.alpha_dense.data.zero_()
    layers = report.layers_of(script, model, script.gates_of(model, data, config))
    opened = [one["layer"].startswith(place) for one in layers]
    assert any(opened) and [one["attn"] > 0 for one in layers] == [one["ratio"] > 0 for one in layers] == opened

def test_a_shared_layer_is_one_line(out):
    _, data, config = loaded(out, "sd1")
    model = script.build_model(dataclasses.replace(config, share_fusers=True))
    layers = report.layers_of(script, model, script.gates_of(model, data, config))
    assert len(layers) == len(model.fusers) < 7

def test_worse_samples_at_scale_1_are_told_with_the_best_scale():
    table = {f"scale {scale:g}": {"acc50": x} for scale, x in zip(report.SCALES, (0.0, 0.2, 0.7, 0.65, 0.5, 0.9, 0.9))}
    assert "0.500 at scale 1, but 0.700 at scale 0.5" in report.overdone(table)
    table["scale 1"]["acc50"] = 0.61
    assert report.overdone(table) == ""

def test_the_log_of_gates_and_their_curves(tmp_path):
    lines, gates = [], HEALTHY | {"attn": [0.95, 0.005]}
    rows = [{"step": step, "split": "val", "gates": gates, "gap_800": None if step else 0.1} for step in (0, 5)]
    run = SimpleNamespace(folder=tmp_path, main=True, log=lines.append, rows=[{"step": 1, "split": "train"}, *rows])
    report.tell_gates(run, gates, 5)
    assert lines[0].split() == ["attn", "0.950", "0.005"] and "below .01: 25%, above .9: 25%" in lines[-2]
    assert lines[-1].startswith("warning: over-activation: |tanh| up to 0.95")
    assert Image.open(tmp_path / "samples/gates.png").size == (800, 900)
    report.tell_gates(run, HEALTHY, 5)
    assert "warning" not in lines[-1]

# ------------------------------------------------------------------------------------------------------------- pictures
@pytest.mark.parametrize("run", ["toy", "sd1"])
def test_samples_of_a_row_do_not_depend_on_the_batch(out, run):
    model, data, config = loaded(out, run)
    rows = data.rows["val"][:4]
    whole, other_batch = report.drawn(script, model, data, rows, config), dataclasses.replace(config, batch_size=3)
    assert torch.equal(whole[:3], report.drawn(script, model, data, rows[:3], other_batch))
    assert not torch.equal(whole[0], report.drawn(script, model, data, rows[:1], config, seed=8)[0])
    base = report.drawn(script, model, data, rows, config, boxes="")
    assert torch.equal(report.drawn(script, model, data, rows, config, 0.0), base) and not torch.equal(whole, base)
    order = np.array([1, 0, 2, 3])
    other = report.drawn(script, model, data, rows, config, order=order)
    assert not torch.equal(other[:2], whole[:2]) and torch.equal(other[2:], whole[2:])

@pytest.mark.parametrize("run, shape", [("toy", (10, 3, 32, 32)), ("sd1", (4, 3, 18, 18))])
def test_pairs_are_the_same_rows_from_the_same_noise(out, run, shape, tmp_path):
    model, data, config = loaded(out, run)
    made = report.pairs(script, model, data, config, tmp_path / "a" / "pairs.png")
    assert [*made] == ["truth", "base", "scale 1"] and all(x.shape == shape for x in made.values())
    assert not torch.equal(made["base"], made["scale 1"]) and Image.open(tmp_path / "a/pairs.png").width > 288
    again = report.pairs(script, model, data, config, tmp_path / "again.png")
    assert all(torch.equal(made[name], again[name]) for name in made)
    for fuser in model.fusers:
        fuser.alpha_attn.data.zero_(), fuser.alpha_dense.data.zero_()
    shut = report.pairs(script, model, data, config, tmp_path / "shut.png")
    assert torch.equal(shut["base"], made["base"]) and torch.equal(shut["scale 1"], shut["base"])

def test_the_truth_of_latents_is_what_the_vae_makes_of_them_unscaled(out, tmp_path):
    model, data, config = loaded(out, "sd1")
    rows = np.sort(np.random.default_rng(0).permutation(data.rows["val"])[:10])
    with torch.no_grad():
        wanted = script.load_vae(SD1).decode(torch.from_numpy(data.table["latents"][rows]).float() / 0.2)
    made = report.pairs(script, model, data, config, tmp_path / "pairs.png")
    assert torch.allclose(made["truth"], wanted, atol=1e-5)

def test_a_toy_base_is_shown_beside_the_truth_and_an_empty_split_is_val(out, tmp_path):
    model, data, config = loaded(out, "toy-base")
    made = report.pairs(script, model, data, config, tmp_path / "pairs.png")
    assert [*made] == ["truth", "base"]
    rows = np.sort(np.random.default_rng(0).permutation(data.rows["val"])[:10])
    assert (labels_of(made["truth"]) == data.table["labels"][rows].numpy()).all()
    data.rows["test"] = data.rows["test"][:0]
    again = report.pairs(script, model, data, config, tmp_path / "test.png", split="test")
    assert torch.equal(again["truth"], made["truth"]) and report.split_of(data) == "val"

def test_a_base_without_a_vae_says_so_once(out, tmp_path):
    shutil.copytree(SD1, tmp_path / "bare", ignore=shutil.ignore_patterns("vae", "text_encoder"))
    model, data, config = loaded(out, "sd1")
    config, told = dataclasses.replace(config, base=str(tmp_path / "bare")), []
    for _ in range(2):
        assert report.pairs(script, model, data, config, tmp_path / "pairs.png", log=told.append) == {}
    assert len(told) == 1 and "vae" in told[0] and not (tmp_path / "pairs.png").exists()

def test_boxes_are_drawn_where_they_are_and_only_if_present(tmp_path):
    boxes = np.array([[[32 / 127, 32 / 63, 96 / 127, 1.0], [0.0, 0.0, 0.2, 0.2]]])
    for present in ([[1, 0]], [[0, 0]]):
        report.grid({"one": torch.zeros(1, 3, 64, 128)}, boxes, np.array(present), tmp_path / "grid.png")
        sheet = np.asarray(Image.open(tmp_path / "grid.png"))[14:78, 2:130]  # a tile of 128 x 64
        black = np.argwhere((sheet == 0).all(-1))
        corners = [black.min(0).tolist(), black.max(0).tolist()] if len(black) else []
        assert corners == ([[32, 32], [63, 96]] if present[0][0] else [])

# --------------------------------------------------------------------------------------------------------------- tables
def read(path):
    """Strict JSON: NaN and Infinity are errors."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))

def test_the_table_of_a_toys_adapter(out, verb):
    said = verb("eval", "--run_name", "toy", "--out_dir", out, "--rows", 40)
    found = read(out / "toy/eval-test.json")
    assert [*found["table"]] == ["truth", "truth with other boxes", "base", *(
        f"scale {x:g}" for x in report.SCALES), "scale 1, shuffled boxes"]
    assert found["rows"] == 40 and found["table"]["truth"]["acc50"] == found["table"]["truth"]["shape"] == 1.0
    assert found["table"]["truth with other boxes"]["acc50"] < 0.2
    assert found["table"]["scale 0"] == found["table"]["base"] != found["table"]["scale 1"]
    assert {f"{kind}_{at}" for kind in ("mse", "gap") for at in (200, 500, 800)} < {*found["scores"]}
    assert found["layers"][0]["layer"] == "blocks.0" and found["layers"][0]["attn"] == pytest.approx(np.tanh(1.5))
    assert found["share_saturated"] == 1.0 and found["step"] in (0, 2)
    assert "over-activation" in found["warnings"][0] and "warning: over-activation" in said
    assert all(f"\n{name} " in f"\n{said}" for name in found["table"]) and "blocks.0" in said and "at t = 800" in said
    for name in "eval-test", "eval-test-pairs":
        assert Image.open(out / f"toy/samples/{name}.png").width > 280
    assert read(out / "toy/eval.json")["rows"] == 24         # that of the training stays

def paint(model, batch, config, scale, boxes, seed):
    """What script.generate would give, were it perfect from scale 1 on and blind below."""
    labels = np.zeros((len(batch["boxes"]), demo.SIZE, demo.SIZE), np.uint8)
    for row, slot in zip(*np.nonzero(batch["masks"][..., 0].numpy() * (scale >= 1) * (boxes != ""))):
        colour, kind = batch["phrases"][row, slot, 2:4].numpy() - [demo.ID["red"], demo.ID["circle"]]
        labels[row] += drawing(kind, batch["boxes"][row, slot].numpy() * demo.SIZE, colour)[0]
    return torch.from_numpy(demo.PALETTE * 2 - 1)[torch.from_numpy(labels).long()].permute(0, 3, 1, 2)

def test_a_perfect_painter_gets_the_score_of_the_truth_and_none_with_other_boxes(out):
    model, data, config = loaded(out, "toy")
    perfect = SimpleNamespace(get_rows=script.get_rows, unwrap=script.unwrap, Adapter=script.Adapter, generate=paint)
    found, made = report.grounding(perfect, model, data, config, data.rows["val"])
    assert found["scale 1"] == found["scale 2.5"] == found["truth"] and found["truth"]["n"] > 150
    assert found["base"]["presence"] == found["scale 0.75"]["presence"] == 0
    shuffled = found["scale 1, shuffled boxes"]
    assert shuffled["acc50"] < 0.2 and shuffled["coverage"] < 0.3 and shuffled["presence"] == 1
    assert (labels_of(made["scale 1"]) == data.table["labels"][data.rows["val"]].numpy()).all()

def test_rows_that_keep_their_boxes_are_no_evidence_and_no_number(out):
    model, data, config = loaded(out, "toy")
    counts = report.boxes_of(data, data.rows["val"])[1].sum(1)
    rows = data.rows["val"][[int(np.flatnonzero(counts == n)[0]) for n in (1, 2, 3)]]
    found, _ = report.grounding(script, model, data, config, rows)
    assert found["truth"]["n"] == 6 and found["truth with other boxes"]["n"] == 0
    assert np.isnan(found["scale 1, shuffled boxes"]["acc50"])

def test_nan_becomes_null(tmp_path):
    assert report.write_json(tmp_path / "a/x.json", {"x": float("nan"), "y": [float("inf"), 1.0]}) == read(
        tmp_path / "a/x.json") == {"x": None, "y": [None, 1.0]}

def test_the_table_of_a_toy_base(out, verb):
    verb("eval", "--run_name", "toy-base", "--out_dir", out, "--split", "val")
    found = read(out / "toy-base/eval-val.json")
    assert [*found["table"]] == ["truth", "base"] and found["layers"] == [] and "gap_800" not in found["scores"]
    assert found["split"] == "val" and (out / "toy-base/samples/eval-val.png").exists()

def test_the_table_of_a_diffusers_base(out, verb):
    said = verb("eval", "--run_name", "sd1", "--out_dir", out)
    found = read(out / "sd1/eval.json")
    assert found["table"] == {} and found["split"] == "val" and found["rows"] == 4       # it has no test rows
    assert said.count("without a detector") == 1 and found["scores"]["gap_800"] is not None
    names = [one["layer"] for one in found["layers"]]
    assert len(names) == len({*names}) == 7 and all(name.count("transformer_blocks.0") for name in names)
    assert all(one["attn"] == pytest.approx(np.tanh(1.5)) for one in found["layers"])
    assert (out / "sd1/samples/final.png").exists()

def test_any_checkpoint_can_be_tested(out, verb, refused):
    steps = sorted(int(path.stem[5:]) for path in (out / "sd1").glob("step-*.safetensors"))
    verb("eval", "--run_name", "sd1", "--out_dir", out, "--step", steps[-1])
    found = read(out / f"sd1/eval-val-{steps[-1]}.json")
    tensors = read_file(out / f"sd1/step-{steps[-1]:08d}.safetensors")[0]
    gates = [abs(float(x.tanh())) for name, x in tensors.items() if name.endswith("alpha_attn") and name[:4] == "mode"]
    assert found["step"] == steps[-1] and sorted(one["attn"] for one in found["layers"]) == pytest.approx(sorted(gates))
    assert "step-00009999" in refused("eval", "--run_name", "sd1", "--out_dir", out, "--step", 9999)

def test_a_run_that_never_moved_is_told_of_though_its_first_state_is_the_best(out, tmp_path):
    model, data, config = loaded(out, "toy")
    shutil.copy(out / "toy/best.safetensors", tmp_path)
    for fuser in model.fusers:
        fuser.alpha_attn.data.zero_(), fuser.alpha_dense.data.zero_()
    assert report.table(script, model, data, config, tmp_path, log=lambda text: None)["warnings"] == []
    (tmp_path / "step-00001000.safetensors").touch()
    assert "collapse" in report.table(script, model, data, config, tmp_path, log=lambda text: None)["warnings"][0]

def test_scores_may_be_given(out, tmp_path):
    model, data, config = loaded(out, "toy-base")
    shutil.copy(out / "toy-base/best.safetensors", tmp_path)
    found = report.table(script, model, data, config, tmp_path, log=lambda text: None, scores={"mse_200": 0.25})
    assert found["scores"] == {"mse_200": 0.25}
    assert found["step"] == read_file(out / "toy-base/best.safetensors")[1]["step"]

@pytest.mark.parametrize("flags, why", [
    (["--run_name", "nobody"], "no such trained run"), (["--split", "dev"], "train, val or test"),
    (["--rows", "-1"], "at least 0"), (["--data_dir", "nowhere"], "no prepared scenes"),
    (["--data_dir", "latents_data"], "toy scenes")])
def test_what_eval_refuses(out, refused, flags, why):
    flags = ["--data_dir", out / flags[1]] if flags[0] == "--data_dir" else flags
    error = refused("eval", "--run_name", "toy", "--out_dir", out, *flags)
    assert why in error or "latents" in error and "latents_data" in str(flags)

def test_a_split_without_rows_is_refused(out, refused):
    assert "has no rows" in refused("eval", "--run_name", "sd1", "--out_dir", out, "--split", "test")

@pytest.mark.parametrize("verb_name", ["eval", "sample"])
def test_a_base_that_is_gone_or_changed_is_refused(out, refused, tmp_path, verb_name):
    layout = ["--layout", write(tmp_path, LAYOUT)] if verb_name == "sample" else []
    rewrite(out, "toy", "homeless", base=str(tmp_path / "gone"))
    assert "no such folder" in refused(verb_name, "--run_name", "homeless", "--out_dir", out, *layout)
    tensors, body = read_file(out / "toy-base/best.safetensors")
    (tmp_path / "changed").mkdir()
    write_file(tmp_path / "changed/best.safetensors", {name: x + 1e-3 for name, x in tensors.items()}, body)
    rewrite(out, "toy", "homeless", base=str(tmp_path / "changed"))
    assert "another base" in refused(verb_name, "--run_name", "homeless", "--out_dir", out, *layout)
    shutil.rmtree(out / "homeless")

# --------------------------------------------------------------------------------------------------------------- sample
def write(folder, layout, name="layout.json"):
    (folder / name).write_text(layout if isinstance(layout, str) else json.dumps(layout))
    return folder / name

def pixels(path):
    return np.asarray(Image.open(path))

def test_samples_of_a_toy(out, verb, tmp_path):
    path = write(tmp_path, [LAYOUT, LAYOUT | {"caption": ""}])
    verb("sample", "--run_name", "toy", "--out_dir", out, "--layout", path, "--gate_scale", "0,1")
    folder = out / "toy/samples"
    assert {x.name for x in folder.glob("layout*")} == {"layout-layout.png", *(
        f"layout-layout-{i}-{name}.png" for i in (1, 2) for name in ("base", "scale-0", "scale-1"))}
    assert pixels(folder / "layout-layout.png").shape == (2 * 100 + 14, 3 * 100, 3)
    base, shut, opened = (pixels(folder / f"layout-layout-1-{name}.png") for name in ("base", "scale-0", "scale-1"))
    assert base.shape == (32, 32, 3) and (base == shut).all() and (base != opened).any()
    assert (pixels(folder / "layout-layout-2-base.png") != base).any()              # without its caption

def test_seeds_units_and_out(out, verb, tmp_path):
    units = {"unit": 1, "thousand": 1000, "pixels": 64}
    for unit, whole in units.items():
        one = LAYOUT | {"boxes": unit, "objects": [
            entry | {"bbox": [edge * whole for edge in entry["bbox"]]} for entry in LAYOUT["objects"]]}
        path = write(tmp_path, one | ({"size": [64, 64]} if unit == "pixels" else {}))
        verb("sample", "--run_name", "toy", "--out_dir", out, "--layout", path, "--gate_scale", "1", "--num_samples",
             2, "--seed", 3, "--out", tmp_path / f"made/{unit}.png")
    made = {unit: pixels(tmp_path / f"made/{unit}-1-scale-1-seed-4.png") for unit in units}
    assert (made["unit"] == made["thousand"]).all() and (made["unit"] == made["pixels"]).all()
    assert (made["unit"] != pixels(tmp_path / "made/unit-1-scale-1-seed-3.png")).any()
    verb("sample", "--run_name", "toy", "--out_dir", out, "--layout", path, "--gate_scale", "1", "--seed", 4,
         "--out", tmp_path / "alone.png")
    assert (pixels(tmp_path / "alone-1-scale-1.png") == made["unit"]).all()
    for flag, value in ("--guidance", 0), ("--sample_steps", 5), ("--beta", 0):
        verb("sample", "--run_name", "toy", "--out_dir", out, "--layout", path, "--gate_scale", "1", "--seed", 4,
             "--out", tmp_path / "other.png", flag, value)
        assert (pixels(tmp_path / "other-1-scale-1.png") != made["unit"]).any(), flag
    assert (pixels(tmp_path / "other-1-scale-1.png") == pixels(tmp_path / "other-1-base.png")).all()     # beta 0

def test_boxes_in_pixels_are_shares_of_width_and_height(tmp_path):
    one = {"boxes": "pixels", "size": [200, 100], "objects": [{"name": "a dog", "bbox": [50, 50, 100, 75]}]}
    flags = report.SampleFlags(layout=str(write(tmp_path, one)))
    assert report.read_layouts(flags, 3) == [("", [("a dog", [0.25, 0.5, 0.5, 0.75])])]

def test_the_words_of_a_toy_are_those_of_its_training(out):
    _, data, _ = loaded(out, "toy")
    row = int(data.rows["val"][0])
    objects = zip(data.table["colours"][row].tolist(), data.table["kinds"][row].tolist())
    names = [f"a {demo.COLOURS[colour]} {demo.SHAPES[kind]}" for colour, kind in objects]
    n = int((data.table["phrase"][row] >= 0).sum())
    batch, texts = script.get_rows(data, np.array([row])), report.ToyTexts()
    assert texts.embed(names[:n], "phrases")[0].tolist() == batch["phrases"][0, :n].tolist()
    assert texts.embed(["red circle"], "phrases")[0].tolist() == texts.embed(["A red circle"], "phrases")[0].tolist()
    caption = demo.text(batch["context"][0].tolist())
    assert texts.embed([caption], "context")[0].tolist() == batch["context"].tolist()

def with_box(*box):
    return LAYOUT | {"objects": [LAYOUT["objects"][0], {"name": "a blue square", "bbox": [*box]}]}

@pytest.mark.parametrize("layout, why", [
    ("{", "is not JSON"), ("[]", "no layouts"), ("[3]", "layout 1 is not a JSON object"),
    ([LAYOUT, {"caption": "a"}], "layout 2: no objects"), (LAYOUT | {"objects": []}, "layout 1: no objects"),
    (LAYOUT | {"captoin": "a"}, "unknown key 'captoin'"), (LAYOUT | {"caption": 7}, "the caption is 7"),
    (with_box(0.1, 0.1, 1.5, 0.5), "layout 1, object 2 (a blue square): box outside"),
    (with_box(100, 100, 600, 500), 'it would fit "boxes": thousand'),
    (with_box(0.5, 0.1, 0.4, 0.5), "object 2 (a blue square): inverted box"),
    (with_box(0.1, 0.1, 0.4, float("nan")), "object 2: box is not four finite numbers"),
    (with_box(0.1, 0.1, 0.4), "object 2: box is not four finite numbers"),
    (with_box(0.1, 0.1, 0.4, "1"), "object 2: box is not four finite numbers"),
    (LAYOUT | {"objects": LAYOUT["objects"] * 2}, "4 objects, but the run has 3 slots"),
    (LAYOUT | {"objects": [{"name": " ", "bbox": [0, 0, 1, 1]}]}, "object 1: empty phrase"),
    (LAYOUT | {"boxes": "percent"}, "boxes is 'percent', not one of unit, thousand, pixels"),
    (LAYOUT | {"boxes": "pixels"}, "need the picture's size"),
    (LAYOUT | {"boxes": "pixels", "size": [0, 5]}, "need the picture's size"),
    (LAYOUT | {"caption": "a red zebra"}, "caption: the toy does not know the word 'zebra', only a, and, red"),
    (LAYOUT | {"objects": [{"name": "purple circle", "bbox": [0, 0, 1, 1]}]}, "object 1: the toy does not know the"),
    (LAYOUT | {"objects": [{"name": "a red red circle", "bbox": [0, 0, 1, 1]}]}, "has 4 words, the toy reads 3"),
    (LAYOUT | {"caption": "a red circle " * 5}, "has 15 words, the toy reads 12")])
def test_layouts_that_are_refused(out, refused, tmp_path, layout, why):
    path = write(tmp_path, layout)
    error = refused("sample", "--run_name", "toy", "--out_dir", out, "--layout", path)
    assert why in error and f"--layout {path}" in error

@pytest.mark.parametrize("flags, why", [
    (["--gate_scale", "0,half"], "numbers separated by commas"), (["--gate_scale", ""], "numbers separated by commas"),
    (["--gate_scale", "0,nan"], "numbers separated by commas"), (["--num_samples", "0"], "must be at least 1"),
    (["--beta", "2"], "at most 1"), (["--out", "picture.jpg"], "ends in .png"),
    (["--layout", "none.json"], "--layout none.json: there is no"), (["--layout", ""], "--layout FILE: there is no"),
    (["--run_name", "nobody"], "no such trained run"), (["--run_name", "toy-base"], "is a base"),
    (["--sample_steps", "5000"], "do not fit"), (["--embeddings", "x.safetensors"], "reads its captions itself")])
def test_flags_that_are_refused(out, refused, tmp_path, flags, why):
    path = write(tmp_path, LAYOUT)
    assert why in refused("sample", "--run_name", "toy", "--out_dir", out, "--layout", path, *flags)

# --------------------------------------------------------------------------------------------- sample, diffusers folder
def test_samples_of_a_diffusers_base(out, verb, refused, tmp_path):
    path = write(tmp_path, [PHOTO, PHOTO | {"caption": "the dog " * 20}])
    said = verb("sample", "--run_name", "sd1", "--out_dir", out, "--layout", path, "--gate_scale", "0,1")
    assert said.count("is cut to 12 tokens") == 1 and "layout 2, caption" in said
    base, shut, opened = (pixels(out / f"sd1/samples/layout-layout-1-{name}.png")
                          for name in ("base", "scale-0", "scale-1"))
    assert base.shape == (18, 18, 3) and (base == shut).all() and (base != opened).any()
    many = write(tmp_path, PHOTO | {"objects": PHOTO["objects"] * 5})
    assert "5 objects, but the run has 4 slots" in refused(
        "sample", "--run_name", "sd1", "--out_dir", out, "--layout", many)

def test_texts_of_a_base_are_those_of_its_tokenizer_and_encoder(out):
    _, data, config = loaded(out, "sd1")
    texts, flags = report.open_texts(data, config, ""), report.SampleFlags(layout="x.json")
    batch = report.batch_of(data, texts, flags, 1, "the red cat", [("cat", [0.1, 0.2, 0.6, 0.9])])
    encoder = script.load_text_encoder(SD1)
    from data.scenes.tokens import load_tokenizer
    ids = torch.from_numpy(load_tokenizer(SD1)(["the red cat", "cat"], 12)[0])
    hidden, pooled = encoder(ids)
    assert torch.allclose(batch["context"], hidden[:1], atol=1e-6)
    assert torch.allclose(batch["phrases"][0, 0], pooled[1], atol=1e-6)
    assert batch["masks"].tolist() == [[[1, 1], [0, 0], [0, 0], [0, 0]]] and batch["clean"].shape == (1, 4, 9, 9)
    assert torch.equal(report.batch_of(data, texts, flags, 1, "", [("cat", [0, 0, 1, 1])])["context"], batch["empty"])
    wanted = {name: x.shape for name, x in script.get_rows(data, data.rows["val"][:1]).items()}
    assert {name: x.shape for name, x in batch.items()} == wanted            # as a row of the data set

def test_a_base_without_its_parts(out, verb, refused, tmp_path):
    path = write(tmp_path, PHOTO)
    command = ["sample", "--out_dir", out, "--layout", path, "--gate_scale", "1", "--run_name"]
    shutil.copytree(SD1, tmp_path / "mute", ignore=shutil.ignore_patterns("text_encoder"))
    shutil.copytree(SD1, tmp_path / "bare", ignore=shutil.ignore_patterns("vae"))
    for name, why in ("mute", "text_encoder"), ("bare", "without a VAE there are no pictures"):
        rewrite(out, "sd1", name, base=str(tmp_path / name))
        assert why in refused(*command, name)
    given = tmp_path / "texts.safetensors"
    save_file({"context": torch.randn(2, 12, 24), "phrases": torch.randn(2, 24)}, given)
    write(tmp_path, json.dumps(["the red cat", "cat"]), "texts.json")
    verb(*command, "mute", "--embeddings", given)
    assert (out / "mute/samples/layout-layout-1-scale-1.png").exists()
    write(tmp_path, PHOTO | {"caption": "the green cat"})
    error = refused(*command, "mute", "--embeddings", given)
    assert "layout 1, caption" in error and "lacks 'the green cat'" in error
    assert "cannot be read" in refused(*command, "mute", "--embeddings", tmp_path / "none.safetensors")
    save_file({"context": torch.randn(2, 7, 24), "phrases": torch.randn(2, 24)}, given)
    assert "texts of 7 tokens" in refused(*command, "mute", "--embeddings", given)
    for name in "mute", "bare":
        shutil.rmtree(out / name)

def test_texts_of_another_encoder_than_the_datas_are_refused(out, refused, tmp_path):
    shutil.copytree(out / "latents_data", tmp_path / "other")
    meta = json.loads((tmp_path / "other/meta.json").read_text())
    for embeddings, why in (True, "has its texts from elsewhere"), (False, "prepared with another text_encoder"):
        meta["base"] |= {"text_encoder": "of a file", "embeddings": embeddings}
        write(tmp_path / "other", meta, "meta.json")
        assert why in refused("sample", "--run_name", "sd1", "--out_dir", out, "--layout", write(tmp_path, PHOTO),
                              "--data_dir", tmp_path / "other")

def test_samples_of_an_sdxl_shaped_base_are_of_embeddings_with_pooled_text(out, verb, refused, tmp_path):
    base = tmp_path / "kolors"
    shutil.copytree(SD1.with_name("kolors"), base)
    shutil.copytree(SD1 / "vae", base / "vae")
    write_latents(tmp_path / "data", width=28, pooled=20)
    script.train(script.Config(run_name="kolors", out_dir=str(out), data_dir=str(tmp_path / "data"), base=str(base),
                               phase="adapter", device="cpu", max_steps=1, log_every=0, sample_steps=2))
    rewrite(out, "kolors", "kolors", opened=True)
    path, given = write(tmp_path, PHOTO), tmp_path / "texts.safetensors"
    command = ["sample", "--run_name", "kolors", "--out_dir", out, "--layout", path, "--gate_scale", "0,1"]
    torch.manual_seed(0)
    tensors = {"context": torch.randn(2, 12, 28), "phrases": torch.randn(2, 24), "pooled": torch.randn(2, 20)}
    write(tmp_path, json.dumps(["the red cat", "cat"]), "texts.json")
    made = []
    for other in (0, 1):                            # the pooled text counts
        save_file(tensors | {"pooled": tensors["pooled"] + other}, given)
        verb(*command, "--embeddings", given)
        made.append(pixels(out / "kolors/samples/layout-layout-1-base.png"))
        assert (made[-1] == pixels(out / "kolors/samples/layout-layout-1-scale-0.png")).all()
        assert (made[-1] != pixels(out / "kolors/samples/layout-layout-1-scale-1.png")).any()
    assert (made[0] != made[1]).any()
    for part in "text_encoder", "tokenizer":        # one text encoder makes no pooled text of SDXL
        shutil.copytree(SD1 / part, base / part)
    assert "takes pooled text" in refused(*command)
    _, data, config = loaded(out, "kolors")
    batch = report.batch_of(data, report.open_texts(data, config, given), report.SampleFlags(), 1, *report.read_layouts(
        report.SampleFlags(layout=str(path)), 4)[0])
    wanted = script.get_rows(data, data.rows["val"][:1])
    assert {name: x.shape for name, x in batch.items()} == {name: x.shape for name, x in wanted.items()}
    assert batch["time_ids"].tolist() == wanted["time_ids"].tolist()
    assert torch.equal(batch["empty_pooled"], wanted["empty_pooled"])
    shutil.rmtree(out / "kolors")
