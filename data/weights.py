"""Other people's model folders: config fields taken one by one, tensors opened by name and read one at a time.

What is wrong with a folder is a ValueError that names the file, and the key or the tensor."""
import functools
import json
import os
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

FLOATS = {"F64", "F32", "F16", "BF16", torch.float64, torch.float32, torch.float16, torch.bfloat16}
UNQUANTISED = "quantised weights are not supported; use the model as it was before, in float32, bfloat16 or float16"
CHECKS = {int: (lambda value: type(value) is int and 0 < value < 2 ** 31, f"a whole number from 1 to {2 ** 31 - 1}"),
          float: (lambda value: type(value) in (int, float) and 0 < value < 1e30, "a number above 0"),
          bool: (lambda value: type(value) is bool, "true or false")}

class Fields(NamedTuple):
    """A JSON object whose values are taken one by one, checked; `where` names it in what is raised."""
    raw: dict
    where: str

    def refuse(self, text):
        raise ValueError(f"{self.where}: {text}")

    def take(self, key, kind=int):
        value, (fine, wanted) = self.raw.get(key), CHECKS[kind]
        return value if fine(value) else self.refuse(f"{key} is {value!r:.60}, not {wanted}")

    def choose(self, key, known):
        """known[the value]"""
        value = self.raw.get(key)
        return known[value] if type(value) is str and value in known else self.refuse(
            f"{key} is {value!r:.60}, not one of {', '.join(known)}")

def listed(items, most=8):
    return ", ".join(items[:most]) + f" and {len(items) - most:,} more" * (len(items) > most)

def whole(path, read=lambda path: dict(json.loads(path.read_bytes()).items())):
    """read(path), by default the object in a JSON file, or ValueError that names the file."""
    try:
        return read(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:                      # each layer of the readers raises its own types
        with open(path, "rb") as file:
            if file.read(23) == b"version https://git-lfs":
                error = "a Git-LFS pointer, not the file: run `git lfs pull` where it was cloned"
        raise ValueError(f"{path} is cut off, damaged or of another kind: {error!r:.120}") from None

def open_safetensors(path):
    file = safe_open(path, "pt")
    return {name: (tuple(view.get_shape()), view.get_dtype(), functools.partial(file.get_tensor, name))
            for name in file.keys() for view in [file.get_slice(name)]}

def open_bin(path):                                 # that of torch before 1.6 is no zip and cannot be mapped
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    return {name: (tuple(t.shape), t.dtype, functools.partial(tensors.get, name)) for name, t in tensors.items()}

def weight_files(folder, stems, variants=("",)):
    """-> (the files that hold a model's tensors, function that opens one). stems: by ending; the first there is."""
    for variant in variants:
        for ending, stem in stems.items():
            opener = open_bin if ending == ".bin" else open_safetensors
            file, index = folder / f"{stem}{variant}{ending}", folder / f"{stem}{ending}.index{variant}.json"
            if file.is_file():
                return [file], opener
            if index.is_file():
                names = whole(index, lambda path: {*json.loads(path.read_bytes())["weight_map"].values()})
                for name in sorted(map(str, names)):
                    if not re.fullmatch(r"\w[\w.+=-]*", name) or not os.path.isfile(folder / name):
                        raise ValueError(f"{index} names {name!r:.60}, which is no file beside it: get what is missing")
                return [folder / name for name in sorted(map(str, names))], opener
    raise ValueError(f"{folder} has no weights: neither {' nor '.join(stem + end for end, stem in stems.items())}, "
                     "alone or with .index.json" + f", nor their {' or '.join(variants[1:])} variants" * (
                         len(variants) > 1))

def open_weights(folder, stems, variants=("",)):
    """-> dict of stored name -> (shape, dtype, function that reads the tensor), of one file or of all in an index."""
    files, opener = weight_files(Path(folder), stems, variants)
    return {name: tensor for file in files for name, tensor in whole(file, opener).items()}

def check_fit(source, stored, wanted, known=()):
    """ValueError that names each tensor unless `stored`, as open_weights gives it, has just those that are wanted.

    wanted: name -> shape; known: names that may be there too."""
    if odd := [f"{name} ({kind})" for name, (_, kind, _) in stored.items()
               if (name in wanted or name in known) and kind not in FLOATS]:
        raise ValueError(f"{source}: {listed(odd)}: {UNQUANTISED}")
    kinds = {"missing": [f"{name} {list(size)}" for name, size in wanted.items() if name not in stored],
             "unexpected": [f"{name} {list(stored[name][0])}" for name in stored
                            if name not in wanted and name not in known],
             "of another shape": [f"{name} {list(stored[name][0])} instead of {list(size)}" for name, size
                                  in wanted.items() if name in stored and stored[name][0] != tuple(size)]}
    if texts := [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names]:
        raise ValueError(f"{source}: the weights are not those of its config.json; {'; '.join(texts)}")

def bad_values(name, tensor):
    """[what to say of a tensor that is not finite] or []"""
    count = int((~tensor.isfinite()).sum())
    return [f"{name} ({count:,} of {tensor.numel():,} values)"] if count else []

def refuse_bad(source, dtype, bad):
    if bad:
        raise ValueError(f"{source}: not finite in {str(dtype)[6:]}: {listed(bad)}; get the model again")

def refuse_to_write(folder, tensors):
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{folder} is not written, as these weights are not finite: {listed(bad)}")

def replace_file(path, write):
    """write(temporary path), then onto the disk and in place of `path`: whole, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
