"""MSP, the text format of spectral libraries: read in its dialects, written in one, and peaks on nominal masses.

A record is opened by `Name:`; `Key: value` lines follow, then peaks, one per line or several with semicolons. A blank
line closes it. What cannot be read as it stands makes the whole record a Bad one: a spectrum that lost peaks would
still look like a spectrum.
"""
import re
from array import array
from typing import NamedTuple

import numpy as np

from common import fail
from data.files import raw_lines

MAX_LINE = 1_000_000                               # bytes; of a longer line no more is read
KEY = re.compile(r'\s*([^\s\d.(+"-][^:]{0,99}?)\s*:\s*(.*)', re.S)
NUM_PEAKS = re.compile(r"num[ _]?peaks")

class Record(NamedTuple):
    line: int                                      # 1-based line of `Name:`
    fields: dict[str, str]                         # lower-case keys, the first one wins
    mz: np.ndarray                                 # (k,) float64, k > 0, as written: neither sorted nor unique
    intensity: np.ndarray                          # (k,) float64, not all 0

class Bad(NamedTuple):
    line: int                                      # where the block begins
    reason: str                                    # what is counted
    text: str
    detail: str = ""

# ------------------------------------------------------------------------------------------------------------- reading
def read_lines(path):
    """Yield (line number, bytes without the line end) of a file that must hold text, as raw_lines does."""
    for number, line in raw_lines(path, MAX_LINE):
        if number == 1 and line.startswith(b"version https://git-lfs"):
            fail(f"{path} is a Git-LFS pointer, not the data: run `git lfs pull` where it was cloned")
        if number == 1 and b"\r" in line:
            fail(f"{path}: its lines end in lone carriage returns; convert them to newlines (tr '\\r' '\\n')")
        if number <= 20 and b"\0" in line:
            fail(f"{path}: line {number} contains NUL bytes, so this is no UTF-8 text file")
        yield number, line

def decode(line):
    """bytes -> str: UTF-8, or Latin-1 where it is not, as in many old libraries."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("latin-1")

def read_peaks(text):
    """One line of peaks -> list of (m/z, intensity). Raises ValueError if it is no such line.

    `41 15`, `41,15` and `41<tab>15`, each perhaps with a comment or a "quoted" one behind; several with semicolons, in
    parentheses, or, where nothing but numbers stands, just one after the other."""
    text = re.sub(r'"[^"]*"?', " ", text).strip()
    if text.startswith("("):
        text = text.replace("(", " ").replace(")", ";")
    peaks = []
    for piece in text.split(";"):
        words = piece.replace(",", " ").split()
        if not words:
            continue
        numbers = []
        for word in words:
            try:
                numbers.append(float(word.replace("_", "?")))        # or 1_0 would be 10
            except ValueError:
                break
        if len(numbers) < 2:
            raise ValueError(piece)
        if len(numbers) < len(words) or len(words) % 2:              # what follows the pair is a comment
            numbers = numbers[:2]
        peaks += zip(numbers[::2], numbers[1::2])
    return peaks

class Block:
    """The lines between one `Name:` and the next; the first thing that is wrong with them stays."""
    def __init__(self, line, text):
        self.line, self.text, self.fields, self.reason, self.detail = line, text[:80], {}, "", ""
        self.mz, self.intensity = array("d"), array("d")
        self.stated = None                          # by Num Peaks
        self.gap = False                            # was there a blank line, though peaks were still to come?

    def bad(self, reason, detail=""):
        self.reason, self.detail = (self.reason, self.detail) if self.reason else (reason, detail)

    def add(self, number, text, key, value):
        if key and NUM_PEAKS.fullmatch(key):
            found = re.match(r"\d{1,9}\b", value)
            self.stated = int(found[0]) if found and self.stated is None else self.stated
            key = "num peaks"
        if key:
            self.fields.setdefault(key, value)
            return
        try:
            for mz, intensity in read_peaks(text):
                self.mz.append(mz)
                self.intensity.append(intensity)
        except ValueError:
            self.bad("unreadable peak line", f"line {number}: {text.strip()[:60]!r}")

    def close(self):
        """-> Record or Bad"""
        mz, intensity = np.array(self.mz), np.array(self.intensity)
        if not self.reason and not len(mz):
            self.bad("no peaks")
        if "num peaks" in self.fields and len(mz) != self.stated:
            self.bad("number of peaks differs from Num Peaks", f"{len(mz)}, stated {self.fields['num peaks'][:20]}")
        good = np.isfinite(mz) & np.isfinite(intensity) & (mz >= 0) & (intensity >= 0)
        if not good.all():
            first = int(np.argmin(good))
            self.bad("negative or non-finite peak", f"{mz[first]:g} {intensity[first]:g}")
        if not intensity.any():
            self.bad("all intensities are zero")
        return Bad(self.line, self.reason, self.text, self.detail) if self.reason else \
            Record(self.line, self.fields, mz, intensity)

def read_msp(path):
    """Yield a Record or a Bad for each block of a file, plain or gzipped, in its order. One block is held at a time.

    Fails on a missing or damaged file. A blank line closes a block unless `Num Peaks` said that more peaks follow."""
    block = None
    for number, line in read_lines(path):
        text = decode(line)
        if not text.strip():
            if block:
                block.gap = block.stated is not None and len(block.mz) < block.stated
            if block and not block.gap:
                yield block.close()
                block = None
            continue
        key, value = match.groups() if (match := KEY.match(text)) else ("", "")
        key, value = key.lower(), value.strip()
        nameless = block is None or key and block.gap
        if key == "name" or nameless:
            if block:
                yield block.close()
            block = Block(number, value if key == "name" else text.strip())
            if key != "name":
                block.bad("block without a name")
        if len(line) > MAX_LINE:
            block.bad(f"line over {MAX_LINE} bytes", f"line {number}")
        else:
            block.add(number, text, key, value)
    if block:
        yield block.close()

# ------------------------------------------------------------------------------------------------------------- writing
def write_msp(file, fields, mz, intensity):
    """Append a record to an open text file.

    fields: dict of str, Name first; mz, intensity: (k,) numbers. Up to 4 and 2 decimals are written, so scale the base
    peak to 999 or so. Raises ValueError for what could not be read back."""
    mz, intensity = (np.asarray(values, np.float64) for values in (mz, intensity))
    if mz.shape != intensity.shape or mz.ndim != 1 or not (np.isfinite(mz + intensity).all() and (mz >= 0).all()
                                                           and (intensity >= 0).all() and (intensity >= 0.01).any()):
        raise ValueError("a spectrum is m/z and intensities, finite, not negative, one of these at least 0.01")
    keys = [match[1].lower() if (match := KEY.match(f"{key}:")) else "" for key in fields]
    if "name" in keys[1:] or keys[:1] != ["name"] or keys != [key.lower() for key in fields] or any(
            map(NUM_PEAKS.fullmatch, keys)):
        raise ValueError(f"Name is the first field, Num Peaks is none, keys have no colons: {', '.join(fields)}")
    for key, value in fields.items():
        file.write(f"{key}: {' '.join(str(value).split())}\n")
    file.write(f"Num Peaks: {len(mz)}\n")
    for pair in zip(mz, intensity):
        file.write(" ".join(np.format_float_positional(value, digits, trim="-") for value, digits in zip(pair, (4, 2))))
        file.write("\n")
    file.write("\n")

# ------------------------------------------------------------------------------------------------------ nominal masses
def nominal(mz):
    """Half up, as libraries of nominal masses do; np.rint would send 40.5 to 40 and 41.5 to 42."""
    return np.floor(np.asarray(mz, np.float64) + 0.5)

def to_bins(mz, intensity, bins):
    """Peaks in any order -> bin (k,) uint16, sorted and unique, and value (k,) float32, the largest 1.

    Peaks of one nominal mass are summed, zeros dropped. What lies at or above `bins` is cut before the base peak is
    set to 1: a model speaks of the masses below it alone, and its spectra have their base peak there. k may be 0."""
    place, intensity = nominal(mz), np.asarray(intensity, np.float64)
    inside = (place < bins) & (intensity > 0)
    if not inside.any():
        return np.empty(0, np.uint16), np.empty(0, np.float32)
    total = np.bincount(place[inside].astype(np.int64), intensity[inside] / intensity[inside].max(), minlength=bins)
    value = (total / total.max()).astype(np.float32)
    index = np.flatnonzero(value)
    return index.astype(np.uint16), value[index]
