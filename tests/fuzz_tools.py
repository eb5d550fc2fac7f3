"""What test_fuzz.py damages, and how: mutate() knows JSON, arrays, safetensors and gzip, and of the rest the bytes.

Not a test file."""
import gzip
import io
import itertools
import json
import math
import random
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from rdkit import Chem
from safetensors.torch import save_file

import train_adapter
import train_distill
import train_edl
import train_logbert
import train_student
from adapter_tools import build_set, write_latents
from data.logs import prepare as logs
from data.molecules import prepare as molecules
from data.scenes import prepare as scenes
from data.scenes.diffusers_folder import write_adapter
from data.spectra import prepare as spectra
from data.text import prepare as text
from logbert_tools import small_model
from runs import model_tensors, write_file
from test_scenes import entries, write_rows
from test_spectra import SMILES, block
from test_text import byte_level, metaspace, row, save

FIXTURES = Path(__file__).parent / "fixtures"
SCRIPTS = {"edl": train_edl, "student": train_student, "distill": train_distill, "logbert": train_logbert,
           "toy": train_adapter, "latents": train_adapter}

# ------------------------------------------------------------------------------------------------------------ mutations
ODD = [text.encode() for text in (
    "1e999 -1 0 4294967296 1e-320 1_0 0x1F NaN -Infinity null true [] {} \u0661\u0662 \u00b2 \u2028 \x85 \ufeff \0 "
    '\\ " \' , ; : ( $$$$ % %n{} ../.. /dev/null "\\ud800" <*> blk_1 C%99 [U] . Name:x').split(" ")]
ODD += [b"9" * 5000, b"[" * 10_000, b'{"a":' * 10_000, b"x" * 20_000, b" " * 5000, b"x\n" * 3000, b"C" * 300, b"\r",
        b"\r\n", b"\n\n", b"\t", b"\x1c", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\x1f\x8b", b"PK\3\4", b"M  END\n",
        b"Num Peaks: 2\n"]
VALUES = [None, True, False, 0, -1, 1, 3, 1.5, -0.0, 1e308, math.nan, math.inf, 10 ** 30, 2 ** 31, 2 ** 63, "", "x",
          "a\nb", "\ud800", "\0", "\u0661", "nan", "-1", "x" * 20_000, "@deep", "@digits", [], {}, [[]], [1, [2, {}]],
          {"a": {"b": []}}, list(range(300))]

def places(found):
    """(container, key) of everything inside a JSON value."""
    for key in found if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else ():
        yield found, key
        yield from places(found[key])

def odd_json(rng, blob):
    """One value becomes another or takes the place of another, one key goes, is written otherwise or comes twice."""
    root = [json.loads(blob)]
    (parent, key), (other, at) = (rng.choice([*places(root)]) for _ in range(2))
    kind = rng.randrange(6)
    if kind == 0 and parent is not root:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(["", f"{key} ", "\ud800"])] = parent.pop(key)
    else:
        parent[key] = json.loads(json.dumps(other[at])) if kind == 2 else rng.choice(VALUES)
    told = json.dumps(root[0])
    if kind == 3 and isinstance(parent, dict):
        told = told.replace("{", f"{{{json.dumps(key)}: {json.dumps(rng.choice(VALUES))}, ", 1)
    return told.replace('"@deep"', "[" * 10_000 + "]" * 10_000).replace('"@digits"', "9" * 5000).encode()

def odd_line(rng, blob):
    lines = blob.split(b"\n")
    at = rng.randrange(len(lines))
    return b"\n".join([*lines[:at], odd_json(rng, lines[at]), *lines[at + 1:]])

def odd_header(rng, blob):
    """A safetensors file whose header says something else, but is in its place."""
    size = 8 + int.from_bytes(blob[:8], "little")
    header = odd_json(rng, blob[8:size])
    return len(header).to_bytes(8, "little") + header + blob[size:]

def odd_array(rng, blob):
    """A .npy of another type, shape or order, with one strange value, or with a header that promises more."""
    array, kind = np.load(io.BytesIO(blob)), rng.randrange(8)
    if kind == 0:
        return re.sub(rb"\(\d+", b"(" + rng.choice([b"0", b"-1", b"7", b"99999999999"]), blob, count=1)
    if kind == 1:
        kinds = array.dtype.newbyteorder(), "i1", "u8", "f2", "f8", "?", "c16", "U3", "M8[s]"
        array = array.astype(rng.choice(kinds))
    elif kind == 2:
        array = [array[:0], array[:-1], array[::-1], array[None], array[..., None], array.reshape(-1)[0],
                 np.concatenate([array, array])][rng.randrange(7)]
    else:
        array.reshape(-1)[rng.randrange(array.size):][:1] = np.array(rng.choice(
            [-1, 1, 255, 65535, 2 ** 31 - 1, -2 ** 40, 2 ** 62, math.nan, math.inf])).astype(array.dtype)
    np.save(file := io.BytesIO(), array)
    return file.getvalue()

def odd_bytes(rng, blob):
    """Bits flipped, a span or lines cut, doubled or moved, something odd put in or in the place of a word."""
    at, kind = int(len(blob) * rng.random() ** rng.choice((1, 1, 4))), rng.randrange(8)     # headers are near the start
    end, lines = min(len(blob), at + rng.choice((1, 4, 30, 1000))), blob.split(b"\n")
    before, span, after = blob[:at], blob[at:end], blob[end:]
    words = [*re.finditer(rb"[^\s,;:\"\[\]{}()]+", blob[at:at + 2000])]
    if kind == 0:
        return before + bytes(x ^ 1 << rng.randrange(8) for x in span[:4]) + span[4:] + after
    if kind == 1:
        return rng.choice([before, before + after, span, b""])
    if kind == 2:
        return rng.choice([before + span * 2 + after, before + span * 50 + after, after + span + before])
    if kind == 3:
        a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
        lines[a:a + 1] = rng.choice([[], [lines[b]], [lines[a], lines[b]], [lines[a]] * 30, [lines[a] + lines[b]]])
        return b"\n".join(lines)
    if kind == 4 or not words:
        return before + rng.choice(ODD) + after
    word = rng.choice(words)
    new = rng.choice([rng.choice(ODD), rng.choice(words)[0], word[0] * 2, word[0].swapcase(), b"-" + word[0]])
    return blob[:at + word.start()] + new + blob[at + word.end():]

CHANGES = {".json": odd_json, ".jsonl": odd_line, ".npy": odd_array, ".safetensors": odd_header}

def mutate(rng, name, blob):
    if blob[:2] == b"\x1f\x8b" and rng.random() < 0.7:
        return gzip.compress(mutate(rng, name.removesuffix(".gz"), gzip.decompress(blob)), 1)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            with warnings.catch_warnings(action="ignore"):
                blob = (CHANGES.get(Path(name).suffix, odd_bytes) if rng.random() < 0.6 else odd_bytes)(rng, blob)
        except Exception:                           # no longer of its kind: cannot be changed as such once more
            blob = odd_bytes(rng, blob)
    return blob

# ------------------------------------------------------------------------------------------ what is damaged
def write(given, zipped=False, **files):
    """in_csv="..." -> given/in.csv, and zipped given/in.csv.gz"""
    for name, content in files.items():
        path = given / name.replace("_", ".")
        content = content if isinstance(content, str) else "\n".join(content) + "\n"
        path.write_text(content)
        if zipped:
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content.encode()))

def write_molecules(given):
    splits = ["train"] * 8 + ["valid"] * 2 + ["test"] * 2
    write(given, True, in_smi=[f"{smiles}\tname {smiles}" for smiles in SMILES * 2],
          in_csv=["SMILES,SPLIT,note", *(f'{smiles},{split},"a, b"' for smiles, split in zip(SMILES, splits))])

def write_spectra(given):
    found = [block("CCO", name="a", MW=46, InChIKey="N/A"), block("", "15 100", "c", ID=1),
             block("", "(15,9) (31,99)", "d", 2, ID="id2"), block("CCCO", '15 100 "?"\n31.02\t999.5', License="CC"),
             block("", "15 1; 27 2; 44 999", count=3, InChI="InChI=1S/C2H7N/c1-2-3/h2-3H2,1H3"),
             *(block(smiles, "15 100") for smiles in SMILES[5:])]
    mol = [Chem.MolToMolBlock(Chem.MolFromSmiles(smiles)) for smiles in ("CCOC", "COCCO")]
    write(given, True, in_msp="".join(found),
          in_sdf="".join(f"{one}> <ID>\n{i}\n\n$$$$\n" for i, one in enumerate(mol, 1)))
    (given / "mol").mkdir()
    write(given / "mol", ID1_MOL=mol[0], ID2_MOL=mol[1])

def write_text(given):
    rows = [row(f"What is {i}?", f"{i} \u00e9", split="train" if i % 3 else "val") for i in range(9)]
    write(given, True, in_jsonl=[*rows, row(response=None, options=["a", "b"], answer=1, split="test"), row()])

def write_tokenizers(given):
    write_text(given)
    save(given / "bpe", byte_level(), "<|endoftext|>", generation_config={"eos_token_id": [0]})
    save(given / "llama", metaspace(), config={"eos_token_id": 2}, generation_config={"eos_token_id": [2]})

def write_language_models(given):
    for name in ("gpt2_erf", "gpt2_bin", "qwen2", "mistral", "llama_half", "llama3_gqa"):
        shutil.copytree(FIXTURES / "hf" / name, given / name, ignore=shutil.ignore_patterns("ref.*"))

def write_diffusers(given):
    shutil.copytree(FIXTURES / "scenes/sd1", given / "sd1", ignore=shutil.ignore_patterns("ref.*", "golden.*"))
    weights = train_adapter.load_unet(given / "sd1", adapter=True).state_dict()
    write_adapter(given / "adapter.safetensors", weights, box_mask=True)

def write_scenes(given):
    rows = entries(4)
    write_rows(given, rows)
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(4)]
    boxes = [{"id": i, "image_id": i, "category_id": 3, "bbox": [5, 5, 15, 12], "iscrowd": 0} for i in range(4)]
    said = [{"id": i, "image_id": i, "caption": rows[i]["caption"]} for i in range(4)]
    texts = ["", "red box", *dict.fromkeys(one["caption"] for one in rows)]
    instances = {"images": images, "annotations": boxes, "categories": [{"id": 3, "name": "cat"}]}
    write(given / "raw", captions_json=json.dumps({"annotations": said}), texts_json=json.dumps(texts),
          instances_json=json.dumps(instances))
    tensors = {"context": torch.randn(len(texts), 5, 24), "phrases": torch.randn(len(texts), 24)}
    save_file(tensors, given / "raw/texts.safetensors")

def write_layouts(given):
    one = {"caption": "a red circle", "objects": [{"name": "red circle", "bbox": [0.1, 0.1, 0.5, 0.5]}]}
    two = {"objects": [{"name": "a blue square", "bbox": [1, 2, 30, 31]}], "boxes": "pixels", "size": [32, 32]}
    write(given, one_json=json.dumps(one), two_json=json.dumps([one, two]))
    build_set(given)

def write_logs(given):
    rng = random.Random(0)
    said = [rng.choice(["Receiving block {} src: /10.0.0.1:5", "Received block {} of size 67", "Deleting {}"]).format(
        f"blk_{i % 12}") for i in range(60)]
    keys = [" ".join(str(rng.randrange(9)) for _ in range(3)) for _ in range(60)]
    stamps = [f"0811{9 + i // 20:02d} 2035{i % 60:02d}" for i in range(60)]
    write(given, hdfs_log=[f"{stamp} 148 INFO dfs.Data: {words}" for stamp, words in zip(stamps, said)],
          labels_csv=["BlockId,Label", *(f"blk_{i},{'Anomaly' if i % 5 == 4 else 'Normal'}" for i in range(12))],
          templates_txt=["1\tReceiving block <*> src: <*>", "2\tReceived block <*> of size <*>", "3\tDeleting <*>"],
          bgl_log=[f"{'-' if i % 9 else 'KERN'} {1117838570 + i} 2005.06.03 R02 2005-06-03 R02 RAS KERNEL INFO {words}"
                   for i, words in enumerate(said)], generic_log=[f"{i} {words}" for i, words in enumerate(said)],
          events_csv=["BlockId,EventId,Timestamp,EventTemplate", *(
              f"s{i % 12},E{i % 5},2008-11-09 20:35:{i % 60:02d},words {i % 5}" for i in range(60))],
          train_txt=keys[:30], normal_txt=keys[30:50], abnormal_txt=keys[50:])
    (given / "hdfs.log.gz").write_bytes(gzip.compress((given / "hdfs.log").read_bytes()))

def log_flags(given, path):
    name = path.name.partition(".")[0]
    if name in ("labels", "templates", "hdfs"):
        return ["--input", path if name == "hdfs" else given / "hdfs.log", "--format", "hdfs",
                "--labels", given / "labels.csv", "--templates", given / "templates.txt"]
    if name in ("train", "normal", "abnormal"):
        return ["--train", given / "train.txt", "--test_normal", given / "normal.txt",
                "--test_abnormal", given / "abnormal.txt"]
    generic = ["--header", r"(?P<time>\d+) (?P<content>.*)", "--window_seconds", 7.5]
    return ["--input", path, *{"bgl": ["--format", "bgl", "--window", 5], "events": [],
                               "generic": [*generic, "--templates", given / "templates.txt"]}[name]]

def write_runs(given):
    write_logs(given)
    for name in ("hdfs.log", "bgl.log"):
        words, folder = log_flags(given, given / name), given / name.partition(".")[0]
        data = logs.main([*map(str, words), "--name", f"{folder.name}-set", "--out_dir", str(given)])
        model = small_model(train_logbert.load_data(train_logbert.Config(data_dir=str(data))).about, data_dir=str(data))
        folder.mkdir()
        write_file(folder / "best.safetensors", model_tensors(model), {"about": model.about, "step": 1})
        write(folder, thresholds_json=json.dumps({"thresholds": {"both": 1.0 if name == "hdfs.log" else 1e6}}))

def write_checkpoints(given):
    for step in (1, 2):
        tensors = {"model.a": torch.arange(6.).view(2, 3), "model.b": torch.zeros(0), "opt.a.step": torch.tensor(3)}
        body = {"step": step, "about": {"x": [1, 2]}, "optimizer": ["a"]}
        write_file(given / f"step-{step:08d}.safetensors", tensors, body)

def write_configs(given):
    write(given, **{f"{name}_json": json.dumps({"config": vars(script.Config())}) for name, script in SCRIPTS.items()
                    if name != "latents"})

def write_flags(given):
    for name, script in SCRIPTS.items():
        words = [[f"--{field}", str(x)] if type(x) is not bool else [f"--{'no_' * (not x)}{field}"]
                 for field, x in vars(script.Config()).items() if field != "out_dir"]
        for i in range(0, len(words), 15):          # few at a time: the first that is wrong is the only one looked at
            (given / f"{name}.{i}").write_text("\n".join(itertools.chain(*words[i:i + 15])))

def again(given, name):
    """Makes the set of that name, unless it is there."""
    make, *words = {
        "edl": (molecules.main, "--input", given / "in.csv", "--scaffold", "--props", "logp,qed", "--workers", 1),
        "student": (spectra.main, "--msp", given / "in.msp", "--max_mz", 99, "--workers", 1),
        "distill": (text.main, "--input", given / "in.jsonl"),
        "logbert": (logs.main, *log_flags(given, given / "hdfs.log")),
        "toy": (scenes.main, "--demo", "--limit", 312)}[name]
    make([*map(str, words), "--name", "set", "--out_dir", str(given / name)])

def write_sets(given):
    for make in (write_molecules, write_spectra, write_text, write_logs):
        make(given)
    for name in ("edl", "student", "distill", "logbert", "toy"):
        again(given, name)
    write_latents(given / "latents/set")
