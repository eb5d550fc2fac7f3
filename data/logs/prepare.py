"""Logs: raw log files, log-key sequences, or a demo log built offline -> the sessions that train_logbert.py reads.

    python data/logs/prepare.py --demo                                                # 8,000 sessions of a block store
    python data/logs/prepare.py --input HDFS.log --format hdfs --labels anomaly_label.csv --templates FILE --name hdfs
    python data/logs/prepare.py --input BGL.log.gz --format bgl --name bgl            # windows of 100 lines
    python data/logs/prepare.py --input app.log --header "(?P<time>\\S+ \\S+) \\w+ (?P<content>.*)" \\
        --time_format "%Y-%m-%d %H:%M:%S" --window 430 --step 200 --name app
    python data/logs/prepare.py --train FILE --test_normal FILE --test_abnormal FILE --test_normals 330027 --name keys

Reads raw logs line by line (--format, or --header, --session, --window), CSV files of events (columns session, key) and
ready-made sequences (one session per line, keys separated by blanks, perhaps "id," or "label," in front), each also
gzipped. What is left out is counted by reason and listed in rejected.jsonl. data/README.md describes the arrays.
"""
import argparse
import csv
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import time
from array import array
from collections import Counter, deque
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import fail  # noqa: E402
from data.files import file_sha256, raw_lines, whole_folder, with_progress  # noqa: E402
from data.logs.demo import (DEMO_EVENTS, DEMO_FLAGS, DEMO_KINDS, DEMO_NEW, DEMO_RECIPE, DEMO_SESSIONS,  # noqa: E402
                            write_log)

MAX_LINE = 10_000                                  # bytes of a line that are read; the rest is cut off
MAX_KEYS = 512                                     # of a session; a longer one is cut
MAX_TEMPLATES = 64_000                             # and MAX_UNKNOWN more fit into uint16
MAX_UNKNOWN = 1_000                                # templates made of lines that match no given one
MAX_LISTED = 1_000                                 # entries per reason in rejected.jsonl
MAX_CACHED = 100_000                               # lines with different text whose log key is remembered
MAX_CLOSED = 200_000                               # ids closed by --session_timeout that are remembered
WILDCARD, UNKNOWN, OTHER = "<*>", "<unknown> ", "<other>"
SPLITS = ["train", "val", "test"]
LABELS = {"0": 0, "normal": 0, "-": 0, "1": 1, "anomaly": 1, "abnormal": 1}
COLUMNS = {"session": "session", "session_id": "session", "blockid": "session", "block_id": "session", "key": "key",
           "eventid": "key", "time": "time", "timestamp": "time", "label": "label", "template": "template",
           "eventtemplate": "template"}
DIGITS = re.compile(r"\d+")

class Format(NamedTuple):
    """How to read a raw log; `header` has the groups content and perhaps time and label ("-" is a normal line)."""
    header: str = "(?P<content>.*)"
    time_format: str = ""                          # of strptime, or "epoch"; "" is ISO 8601 or epoch
    session: str = ""                              # a line belongs to the session of each match
    window: int = 0                                # lines
    masks: tuple = ()                              # what Drain shall take for a wildcard

MASKS = (r"/?\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b", r"\b0[xX][0-9a-fA-F]+\b", r"(?<![\w.:])(?:/[\w.$@+-]+)+/?",
         r"(?<![A-Za-z0-9_])[-+]?\d+(?:[.:,]\d+)*(?![A-Za-z0-9_])")  # addresses, hexadecimal, paths, numbers
FORMATS = {
    "hdfs": Format(r"(?P<time>\d{6} \d{6}) +\d+ +\w+ +\S+: (?P<content>.*)", "%y%m%d %H%M%S", r"blk_-?\d+",
                   masks=(r"blk_-?\d+", *MASKS)),
    "bgl": Format(r"(?P<label>\S+) (?P<time>\d+)(?: \S+){7}(?: (?P<content>.*))?$", "epoch", window=100, masks=MASKS),
    "thunderbird": Format(r"(?P<label>\S+) (?P<time>\d+) \S+ \S+ \w+ +\d+ [\d:]+ \S+ (?:\S+?(?:\[\d+\])?: +)?"
                          r"(?P<content>.*)", "epoch", window=100, masks=MASKS),
    "generic": Format(masks=MASKS),
}

class Session(NamedTuple):
    id: str
    first_line: int                                # 1-based
    keys: list[int]                                # index into the templates, -1: matches none
    gaps: list[float]                              # seconds since the line before, 0 for the first
    label: int                                     # 0 normal, 1 anomaly, -1 unknown
    unknown: dict[int, str]                        # position of a line that matches no template -> its masked text

# ------------------------------------------------------------------------------------------------------ reading a file
def read_lines(path):
    """Yield (line number, bytes without the line end) of a file that must hold text, as raw_lines does."""
    number = 0
    for number, line in raw_lines(path, MAX_LINE):
        if number <= 20 and b"\0" in line:
            fail(f"{path}: line {number} contains NUL bytes, so this is no UTF-8 text file")
        yield number, line
    if not number:
        fail(f"{path} is empty")

def csv_fields(text):
    return next(csv.reader([text.replace("\r", " ")]), [])          # csv does not take these

def csv_columns(text):
    """First line of a CSV file -> dict from our names of the columns to their numbers."""
    return {COLUMNS[name]: i for i, field in reversed(list(enumerate(csv_fields(text))))
            if (name := field.strip().lower()) in COLUMNS}

def squeeze(text):
    return " ".join(text.split())

def read_templates(path):
    """Lines number<TAB>template, a CSV with EventId,EventTemplate, or one template a line -> dict name: template."""
    lines = [line.decode("utf-8", "replace") for _, line in read_lines(path) if line.strip()]
    columns = csv_columns(lines[0]) if lines else {}
    if {"key", "template"} <= set(columns):
        rows = [row for row in map(csv_fields, lines[1:]) if len(row) > max(columns.values())]
        pairs = [(row[columns["key"]], row[columns["template"]]) for row in rows]
    else:
        pairs = [line.split("\t", 1) if "\t" in line else (str(i), line) for i, line in enumerate(lines, 1)]
    named = {name.strip(): squeeze(text.replace("[*]", WILDCARD)) for name, text in pairs if text.strip()}
    if not 0 < len(named) <= MAX_TEMPLATES:
        fail(f"{path} holds {len(named):,} templates: expected 1 to {MAX_TEMPLATES:,}, as lines number<TAB>template or "
             "as a CSV with EventId,EventTemplate")
    return named

def read_labels(path):
    """A CSV such as BlockId,Label -> dict from session id to 0 or 1."""
    labels, columns = {}, {"session": 0, "label": 1}
    for number, line in read_lines(path):
        text = line.decode("utf-8", "replace")
        if number == 1 and "label" in csv_columns(text):
            columns |= csv_columns(text)
        elif row := csv_fields(text):
            label = LABELS.get(row[columns["label"]].strip().lower()) if len(row) > max(columns.values()) else None
            if label is None:
                fail(f"{path}: line {number} gives no label: expected a session id and one of {', '.join(LABELS)}")
            labels[row[columns["session"]].strip()] = label
    return labels or fail(f"{path} holds no labels: expected a CSV such as BlockId,Label")

def seconds(stamp, time_format):
    """Time stamp -> seconds since 1970 (without a zone: taken for UTC), None if it does not fit the format."""
    try:
        if time_format == "epoch" or not time_format and re.fullmatch(r"\d+(\.\d*)?", stamp):
            number = float(stamp)
            return number if abs(number) < 1e30 else None            # or a gap, float32, would not be finite
        moment = datetime.strptime(stamp, time_format) if time_format else datetime.fromisoformat(stamp)
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError):
        return None

# ------------------------------------------------------------------------------------------------------------ log keys
def matches(pieces, text):
    """Does the text consist of these pieces in this order, with anything in between? In linear time, unlike a regex."""
    place, end = len(pieces[0]), len(text) - len(pieces[-1])
    if len(pieces) == 1 or place > end or not (text.startswith(pieces[0]) and text.endswith(pieces[-1])):
        return text == pieces[0] and len(pieces) == 1
    for piece in pieces[1:-1]:
        found = text.find(piece, place, end)
        if found < 0:
            return False
        place = found + len(piece)
    return True

class Matcher:
    """matcher(content) -> index of the most specific template that matches it (most literal characters), or -1.

    Given templates are compared with the content as it is, and a wildcard stands for any text, also for none. Those
    found by Drain are compared word by word with the masked content that they come from. Most lines differ from an
    earlier one in their numbers only and share its entry of the cache, unless a template spells the number out."""
    def __init__(self, templates, masks=(), found=False):
        self.templates, self.found, self.cache, self.rows, self.unknown = list(templates), found, {}, {}, {}
        self.masks = re.compile("(?:{0})(?: +(?:{0}))*".format("|".join(masks or ["(?!)"])))   # a list is one wildcard
        self.other = self.templates.index(OTHER) if OTHER in self.templates else -1
        spelled, self.exact = set(), False
        for i, text in sorted(enumerate(templates), key=lambda row: (
                -len(row[1].replace(WILDCARD, "")), row[1].count(WILDCARD), row[1])):
            if text.startswith(UNKNOWN):
                self.unknown[text.removeprefix(UNKNOWN)] = i
            elif text != OTHER:
                units = self.units(text)
                self.rows.setdefault(len(units), []).append(([unit.split(WILDCARD) for unit in units], i))
                spelled.update(re.findall(r"\d+", text))
                # with a digit next to a wildcard, what matches hangs on the digits of the line
                self.exact |= found or bool(re.search(r"\d<\*>|<\*>\d", text))
        self.replace = (lambda number: number[0] if number[0] in spelled else "\0") if spelled else "\0"

    def units(self, text):
        return text.split() if self.found else [squeeze(text)]

    def mask(self, content):
        return squeeze(self.masks.sub(WILDCARD, content))

    def __call__(self, content):
        text = self.masks.sub(WILDCARD, content) if self.found else content
        probe = text if self.exact else DIGITS.sub(self.replace, text)
        key = self.cache.get(probe)
        if key is None:
            if len(self.cache) >= MAX_CACHED:
                self.cache.clear()
            key = self.cache[probe] = self.search(text)
        return self.unknown.get(self.mask(content), self.other) if key < 0 else key

    def search(self, text):
        units = self.units(text)
        return next((i for pieces, i in self.rows.get(len(units), ()) if all(map(matches, pieces, units))), -1)

    def learn(self, content):
        """A line that matches none of the given templates gets one of its own, the later ones share OTHER -> index."""
        text = self.mask(content)
        if text not in self.unknown and len(self.unknown) < MAX_UNKNOWN:
            self.unknown[text] = len(self.templates)
            self.templates.append(UNKNOWN + text)
        elif text not in self.unknown and self.other < 0:
            self.other = len(self.templates)
            self.templates.append(OTHER)
        return self.unknown.get(text, self.other)

def find_templates(path, parser, total):
    """A pass over a raw log with Drain (He et al. 2017, as drain3) -> list of templates."""
    try:
        from drain3.drain import Drain
    except ImportError:
        fail("finding templates needs drain3 (pip install drain3); or give them with --templates FILE")
    reader, drain = LogReader(parser, []), Drain(sim_th=0.5, depth=4)
    add = functools.lru_cache(MAX_CACHED)(drain.add_log_message)     # most masked lines repeat
    for _, _, _, _, content in reader.raw_lines(path, total):
        add(reader.matcher.mask(content))
        if drain.clusters_counter > MAX_TEMPLATES:
            fail(f"{path}: more than {MAX_TEMPLATES:,} templates: is content in --header the message alone?")
    return list(dict.fromkeys(cluster.get_template() for cluster in drain.clusters))

# ------------------------------------------------------------------------------------------------------------ sessions
class Open:
    """A session that is being collected."""
    __slots__ = ("id", "first_line", "piece", "keys", "gaps", "label", "unknown", "last", "touched")

    def __init__(self, id, line, piece=1):
        self.id, self.first_line, self.piece, self.label, self.unknown = id, line, piece, -1, {}
        self.keys, self.gaps, self.last, self.touched = array("i"), array("f"), None, 0.0

    def add(self, now, key, label, unknown):
        """Takes a line in -> did the clock go backwards?"""
        gap = 0.0 if self.last is None else now - self.last
        if unknown is not None:
            self.unknown[len(self.keys)] = unknown
        self.keys.append(key)
        self.gaps.append(gap if gap > 0 else 0.0)
        self.last = now
        if label > self.label:
            self.label = label
        return gap < 0

    def close(self):
        id = self.id if self.piece == 1 else f"{self.id}+{self.piece}"
        return Session(id, self.first_line, self.keys.tolist(), self.gaps.tolist(), self.label, self.unknown)

class LogReader:
    """Reads sessions as `parser` and `templates` of a data set's meta.json say; {} reads ready-made keys by name.

    counts: Counter of what was left out or changed. rejected: dict reason -> list of dict, at most MAX_LISTED each.
    learn=True, for the preparation: lines and names that are unknown become templates of their own."""
    def __init__(self, parser, templates, learn=False):
        self.parser, self.learning, self.counts, self.rejected = parser, learn, Counter(), {}
        self.matcher = Matcher(templates, parser.get("masks"), parser.get("templates") == "found")
        self.templates, self.has_times, self.file = self.matcher.templates, False, ""
        self.max_keys, self.timeout = parser.get("max_keys", MAX_KEYS), parser.get("session_timeout", 0)
        self.names = {}                             # of ready-made keys: "5" of "5", "5" and "E5" of "E5: words"
        for i, text in enumerate(templates):
            number = re.match(r"E(\S+): ", text)   # any other ": " belongs to the name of the key
            self.names |= {text: i} | ({number[1]: i, f"E{number[1]}": i} if number else {})

    def reject(self, line, reason, text=""):
        self.counts[reason] += 1
        listed = self.rejected.setdefault(reason, [])
        if len(listed) < MAX_LISTED:
            file = {"file": self.file} if self.file else {}
            listed.append(file | {"line": line, "reason": reason, "text": text[:120]})

    def sessions(self, path, cuts=(), total=0):
        """Yield each Session when it closes: by --session_timeout, when its window is full, at the end of the file.

        path: a plain or gzipped file, "-" for standard input. Windows do not reach over the line numbers in `cuts`.
        total > 0 lines: show progress. Fails with one line on what is no log of this kind."""
        if self.parser.get("session"):
            yield from self.by_id(self.raw_events(path, total))
        elif "header" in self.parser:
            yield from self.windows(self.raw_events(path, total), deque(cuts))
        else:
            lines = self.text_lines(path)
            head = list(itertools.islice(lines, 100))
            columns = csv_columns(head[0][1]) if head else {}
            if {"session", "key"} <= set(columns):
                yield from self.by_id(self.table_events(head, lines, columns))
            else:
                yield from self.sequences(head, lines, path)

    def text_lines(self, path, total=0):
        """Yield (line number, str) of the lines that are not empty."""
        lines = read_lines(path)
        for number, line in with_progress(lines, total, "lines") if total else lines:
            self.counts["lines"] += 1
            if len(line) > MAX_LINE:
                self.counts["long line, cut off"] += 1
                line = line[:MAX_LINE]
            if b"\0" in line:
                self.counts["NUL bytes, taken out"] += 1
            try:
                text = line.decode()
            except UnicodeDecodeError:
                self.counts["undecodable bytes, replaced"] += 1
                text = line.decode("utf-8", "replace")
            if text and not text.isspace():         # a carriage return would be a line end in sessions.txt
                yield number, text.replace("\0", "").replace("\r", " ")
            else:
                self.reject(number, "empty line")

    def raw_lines(self, path, total=0):
        """Yield (line number, session ids, seconds, label, content) of a raw log's lines."""
        header, session, time_format = (self.parser[name] for name in ("header", "session", "time_format"))
        header, find, to_seconds = re.compile(header), re.compile(session).findall, functools.lru_cache(1000)(seconds)
        fit, group, used, misfits, first = header.match, header.groupindex, 0, 0, ""
        places = [group.get(name, 0) for name in ("time", "content", "label")]
        self.has_times, has_labels, now, ids, label = "time" in group, "label" in group, 0.0, None, -1
        for number, text in self.text_lines(path, total):
            match = fit(text)
            if match:
                stamp, content, mark = match.group(*places)
                if self.has_times:                  # neighbouring lines have the same stamp
                    now = to_seconds(stamp, time_format)
            if not match or now is None:
                flag, misfits = "time_format" if match else "header", misfits + 1
                first = first or f"first line {number}: {text[:60]!r}; --{flag} is {self.parser[flag]!r}"
                self.reject(number, f"does not fit the {flag}", text)
                continue
            used += 1
            if session and not (ids := find(text)):
                self.reject(number, "no session id", text)
                continue
            if has_labels:
                label = 0 if mark == "-" else 1
            yield number, ids, now, label, content or ""
        if misfits > used:
            fail(f"{path}: {misfits:,} of {misfits + used:,} lines do not fit, {first}: give the right one or --format")

    def raw_events(self, path, total=0):
        """Yield (line number, session ids, seconds, key, label, masked text if unknown) of a raw log's lines."""
        matcher = self.matcher
        for number, ids, now, label, content in self.raw_lines(path, total):
            key, unknown = matcher(content), None
            if key < 0 or key == matcher.other:
                self.counts["line that matches no template"] += 1
                unknown = matcher.mask(content)[:120]
                key = matcher.learn(content) if self.learning else key
            yield number, ids, now, key, label, unknown

    def table_events(self, head, lines, columns):
        """Yield as raw_events does, from a CSV file with the columns session and key, perhaps time, label, template."""
        width, self.has_times = len(csv_fields(head[0][1])), "time" in columns
        for number, text in itertools.chain(head[1:], lines):
            row = csv_fields(text)
            if len(row) != width:
                self.reject(number, "wrong number of columns", text)
                continue
            row = {name: squeeze(row[i]) for name, i in columns.items()}
            now = seconds(row["time"], self.parser.get("time_format", "")) if self.has_times else 0.0
            label = LABELS.get(row["label"].lower()) if row.get("label") else -1
            if now is None or label is None or not row["session"] or not row["key"]:
                self.reject(number, "no session, key, time or label", text)
                continue
            key = self.key_of(row["key"], row.get("template", ""))
            yield number, (row["session"],), now, key, label, row["key"] if key < 0 else None

    def key_of(self, name, words=""):
        """Name of a ready-made log key -> its number, -1 if unknown; with learn=True a new one gets the next number."""
        key = self.names.get(name, -1)
        if key < 0 and self.learning:
            key = self.names[name] = len(self.templates)
            if key >= MAX_TEMPLATES:
                fail(f"more than {MAX_TEMPLATES:,} different log keys, such as {name!r}: for a raw log give --format")
            self.templates.append(f"E{name.removeprefix('E')}: {words}" if words else name)
        self.counts["log key that is not in the data set"] += key < 0
        return key

    def sequences(self, head, lines, path):
        """Yield a Session per line of keys separated by blanks; in front "id,", or everywhere "label,", or nothing."""
        fronts = [text.partition(",")[0].strip().lower() for _, text in head if "," in text]
        named = fronts[:1] and fronts[0] in ("id", "sequence", *COLUMNS)         # the names of the columns
        labelled = len(fronts) == len(head) and set(fronts[bool(named):]) <= LABELS.keys()
        used, bad, first = 0, 0, ""
        for number, text in itertools.chain(head[bool(named):], lines):
            front, _, keys = text.rpartition(",")
            front, keys, label = front.strip(), keys.split(), LABELS.get(front.strip().lower()) if labelled else -1
            strange = [name for name in keys if not re.fullmatch(r"[\w.-]{1,64}", name)]
            if strange or label is None or not keys:
                bad, what = bad + 1, f"{strange[0]!r} is no log key" if strange else repr(text[:60])
                first = first or f"line {number}: {what}"
                self.reject(number, "no log keys" if strange else "no label" if keys else "empty session", text)
                continue
            used += 1
            name = front if front and not labelled else f"{self.file or 'line'}:{number}"
            numbers, size = [self.key_of(key) for key in keys], self.max_keys
            for piece, start in enumerate(range(0, len(keys), size), 1):
                part = numbers[start:start + size]
                self.counts.update(["cut at max_keys"] * (piece > 1))
                yield Session(name if piece == 1 else f"{name}+{piece}", number, part, [0.0] * len(part), label,
                              {i: keys[start + i] for i, key in enumerate(part) if key < 0})
        if bad > used:
            fail(f"{path}: over half of its lines are no sequences of log keys, first {first}; for a raw log give its "
                 f"--format ({', '.join(FORMATS)}), for a CSV of events the columns session and key")

    def by_id(self, events):
        """Events -> sessions by id. Python objects are held for the open sessions only."""
        rows, closed, clock, timeout = {}, {}, -math.inf, self.timeout
        for number, ids, now, key, label, unknown in events:
            if timeout:                             # the rows then stand in the order of their last lines
                clock = max(clock, now)
                while rows and rows[id := next(iter(rows))].touched < clock - timeout:
                    self.counts["evicted"] += 1
                    yield rows.pop(id).close()
                    closed[id] = closed.pop(id, 0) + 1
                    if len(closed) > MAX_CLOSED:
                        del closed[next(iter(closed))]
            for id in dict.fromkeys(ids) if len(ids) > 1 else ids:
                row = rows.pop(id, None) if timeout else rows.get(id)
                if row is None:
                    before = closed.get(id, 0)
                    self.counts.update(["reopened"] * (before > 0))
                    row = Open(f"{id}#{before + 1}" if before else id, number)
                elif len(row.keys) >= self.max_keys:
                    self.counts["cut at max_keys"] += 1
                    yield row.close()
                    row = Open(row.id, number, row.piece + 1)
                if row.add(now, key, label, unknown):
                    self.counts["clock going backwards, gap 0"] += 1
                row.touched, rows[id] = clock, row
        for row in sorted(rows.values(), key=lambda row: row.first_line):
            yield row.close()

    def windows(self, events, cuts):
        """Events -> windows of so many lines or seconds; none reaches over a cut, so no line is in two splits."""
        size, step, length = self.parser["window"], self.parser["step"], self.parser["window_seconds"]
        rows, n, fresh, start = deque(), 0, False, None
        for number, _, now, key, label, unknown in events:
            while cuts and number > cuts[0]:
                cuts.popleft()
                for row in rows:
                    self.reject(row.first_line, "window over a cut", f"{len(row.keys)} lines")
                rows, n, start = deque(), 0, None
            if length:
                start = now if start is None else start
                full = rows and len(rows[0].keys) >= self.max_keys
                self.counts.update(["cut at max_keys"] * bool(full))
                if rows and (full or now >= start + length):
                    yield rows.popleft().close()
                start += max(0, (now - start) // length) * length
            if not rows if length else n % step == 0:
                rows.append(Open(f"line-{number}", number))
            n, fresh = n + 1, True
            for row in rows:
                if row.add(now, key, label, unknown) and row is rows[0]:
                    self.counts["clock going backwards, gap 0"] += 1
            if not length and len(rows[0].keys) == size:
                fresh = False
                yield rows.popleft().close()
        if rows and fresh:                          # what is left over; further windows hold a part of it only
            yield rows[0].close()

# ----------------------------------------------------------------------------------- all sessions: labels, splits, keys
class Corpus:
    """Closed sessions as compact arrays, in the order in which they closed."""
    def __init__(self):
        self.ids, self.columns = bytearray(), {"keys": array("H"), "gaps": array("f")} | {
            name: array("q") for name in ("size", "first_line", "label", "role")}

    def add(self, session, role):
        """role: 0 training period, 2 test, if the files say so."""
        self.ids += session.id.encode() + b"\n"
        self.columns["keys"].extend(session.keys)
        self.columns["gaps"].extend(session.gaps)
        for name, value in zip(("size", "first_line", "label", "role"),
                               (len(session.keys), session.first_line, session.label, role)):
            self.columns[name].append(value)

    def table(self):
        """-> dict of arrays, (n,) per session: id, size, first_line, label, role; (T,) per line: keys, gaps."""
        ids = np.array(self.ids.decode().split("\n")[:-1], object)
        return {name: np.array(column) for name, column in self.columns.items()} | {"id": ids}

def take(table, rows):
    """The sessions `rows` (m,) of a table, in this order."""
    size = table["size"][rows]
    within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
    lines = np.repeat((np.cumsum(table["size"]) - table["size"])[rows], size) + within
    return {name: column[lines if name in ("keys", "gaps") else rows] for name, column in table.items()}

def apply_labels(table, labels, reader, path):
    """Labels by session id; #2 and +2, which a timeout or max_keys has added, do not count."""
    plain = [id if id in labels else re.sub(r"(#\d+)?(\+\d+)?$", "", id) for id in table["id"]]
    used = labels.keys() & set(plain)
    if not used:
        fail(f"{path}: none of its {len(labels):,} ids, such as {next(iter(labels))!r}, is a session of the log, such "
             f"as {plain[0]!r}: is this the right file?")
    table["label"] = np.array([labels.get(id, -1) for id in plain])
    reader.counts["label without a session"] = len(labels) - len(used)
    reader.counts["session without a label"] = int((table["label"] < 0).sum())

def split_sessions(table, options, cuts):
    """-> (n,) int: 0 train, 1 val, 2 test. cuts, for windows: the last lines of train and val, or of both as one."""
    if len(cuts) == 2:
        return np.searchsorted(cuts, table["first_line"])
    if cuts:
        split = 2 * np.searchsorted(cuts, table["first_line"])
    elif options.train:
        split = table["role"].copy()
    else:
        split = np.where(np.arange(len(table["role"])) < round(options.train_share * len(table["role"])), 0, 2)
    rows = np.flatnonzero((split == 0) & (table["label"] < 1))
    size = min(max(1, round(options.val_share * len(rows))), len(rows) - 1)
    split[np.random.default_rng(options.seed).permutation(rows)[:max(size, 0)]] = 1
    return split

def finish(corpus, reader, options, settings, folder, source, cuts=(), labels=None, kinds=("anomaly",), texts={}):
    """Corpus -> the finished data set in `folder` -> meta. labels: dict from session id; texts: further files."""
    table = corpus.table()
    if not len(table["id"]):
        fail(f"{source}: no session is left; left out: {told(reader.counts)}")
    if not options.train:
        table = take(table, np.argsort(table["first_line"], kind="stable"))      # by timeouts, some closed early
    if labels:
        apply_labels(table, labels, reader, options.labels)
    table["split"] = split = split_sessions(table, options, cuts)
    bad, reader.file = (split < 2) & (table["label"] > 0), "train" if options.train else ""
    for row in np.flatnonzero(bad):
        reader.reject(int(table["first_line"][row]), "anomaly in the training period", table["id"][row])
    rows = np.flatnonzero(~bad)
    if options.limit and not options.demo:
        reader.counts["left out by --limit"] = max(0, len(rows) - options.limit)
        rows = np.sort(np.random.default_rng(options.seed).permutation(rows)[:options.limit])
    table = take(table, rows)
    n_split = np.bincount(table["split"], minlength=3).tolist()
    for name, n, flag in zip(("training", "validation", "test"), n_split, ("train_share", "val_share", "train_share")):
        if not n and not (name == "test" and options.train_share == 1 and not options.train):
            fail(f"{source}: no {name} session is left of {len(bad):,}; see --{flag} (--train_share 1: no test); "
                 f"left out: {told(reader.counts)}")
    names, keys = reader.templates, table["keys"]
    count = np.bincount(keys[np.repeat(table["split"] == 0, table["size"])], minlength=len(names))
    order = sorted(range(len(names)), key=lambda i: (-count[i], names[i]))
    keys = np.argsort(order).astype(np.uint16)[keys]
    offsets = np.concatenate([[0], np.cumsum(table["size"])]).astype(np.int64)
    distinct, data, bounds = {}, keys.tobytes(), (2 * offsets).tolist()
    unique = [distinct.setdefault(data[a:b], len(distinct)) for a, b in itertools.pairwise(bounds)]
    arrays = {"keys": keys, "offsets": offsets, "labels": table["label"].astype(np.int8),
              "split": table["split"].astype(np.uint8), "unique": np.array(unique, np.int32)}
    if reader.has_times:
        arrays["gaps"] = table["gaps"]
    told_labels = ["normal", *kinds, "unknown"]     # label -1 is the last one
    counts = {"lines": reader.counts.pop("lines"), "sessions": len(rows), "by_split": dict(zip(SPLITS, n_split)),
              "by_label": {name: {told_labels[label]: n for label, n in sorted(Counter(
                  table["label"][table["split"] == i].tolist()).items())} for i, name in enumerate(SPLITS)},
              "distinct": len(distinct), "keys": len(keys),
              "rejected": {reason: reader.counts.pop(reason) for reason in sorted(reader.rejected)},
              "rejected_listed_per_reason": MAX_LISTED}
    counts |= {reason: n for reason, n in sorted(reader.counts.items()) if n}
    meta = {"format": 1, "name": folder.name, "source": source, "sha256": options.sha256, "options": settings,
            "counts": counts, "templates": [names[i] for i in order], "n_train_keys": int((count > 0).sum()),
            "kinds": list(kinds), "splits": SPLITS, "longest": int(table["size"].max()), "parser": reader.parser,
            "has_gaps": reader.has_times, "test_normals": options.test_normals}
    rejected = sorted(itertools.chain(*reader.rejected.values()), key=lambda row: (row.get("file", ""), row["line"]))
    save(folder, arrays, texts | {
        "sessions.txt": "".join(f"{id}\n" for id in table["id"]), "meta.json": json.dumps(meta, indent=1) + "\n",
        "rejected.jsonl": "".join(json.dumps(row) + "\n" for row in rejected)})
    return meta

def told(counts):
    return ", ".join(f"{what} {n:,}" for what, n in sorted(counts.items()) if n and what != "lines") or "nothing"

def summary(folder, meta, took):
    counts = meta["counts"]
    capped, rate = max(counts["rejected"].values(), default=0) > MAX_LISTED, counts["lines"] / max(took, 1e-3)
    mean = counts["keys"] / counts["sessions"]
    print(f"{folder}: {counts['lines']:,} lines read, {counts['sessions']:,} sessions kept "
          f"in {took:.1f} s, {rate:,.0f} lines/s")
    for name, labels in counts["by_label"].items():
        print(f"  {name:<12}{counts['by_split'][name]:,} sessions: {told(labels)}")
    print(f"  left out    {told(counts['rejected'])}" + f"; listed: {MAX_LISTED:,} a reason" * capped)
    print(f"  noted       {told({what: n for what, n in list(counts.items())[8:]})}")
    print(f"  templates   {len(meta['templates']):,}, of which train has {meta['n_train_keys']:,}")
    print(f"  sequences   {counts['distinct']:,} different; {mean:.1f} keys in the mean, {meta['longest']:,} at most")

# ------------------------------------------------------------------------------------------------------------- writing
def save(folder, arrays, texts):
    with whole_folder(folder) as new:
        for name, values in arrays.items():
            np.save(new / f"{name}.npy", values, allow_pickle=False)
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8", newline="\n")

def already_there(folder, sha256, settings):
    """True if the folder holds a whole set of this source and these options; fails if it holds something else."""
    if not folder.exists():
        return False
    if not (folder / "meta.json").is_file():
        fail(f"{folder} exists and is no data set: move it away or choose another --name")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        same = meta["options"] == settings and sha256 in (None, meta["sha256"])
        names = [f"{name}.npy" for name in ("keys", "offsets", "labels", "split", "unique")] + ["sessions.txt"]
        return same and all((folder / name).is_file() for name in names + ["gaps.npy"] * meta["has_gaps"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):     # damaged: built again
        return False

# ------------------------------------------------------------------------------------------------------------ demo set
def build_demo(options, settings, folder):
    """The demo set. new.log holds further sessions for `score`, and new_labels.csv says what they are."""
    n, rng = options.limit or DEMO_SESSIONS, random.Random(options.seed)
    cut, raw = round(options.train_share * n), folder.with_name(f".{folder.name}.{os.getpid()}.log")
    def draw_kinds(n, share):                       # every kind as often, at random places
        kinds = [1 + k % len(DEMO_KINDS) for k in range(round(share * n))]
        return rng.sample(kinds + [0] * (n - len(kinds)), n)
    log, labels = write_log(draw_kinds(cut, 0.01) + draw_kinds(n - cut, 0.04), rng, 1_709_280_000, 1_000)
    new, new_labels = write_log(draw_kinds(DEMO_NEW, 0.1), rng, 1_719_280_000, 1_000_000)
    listed = "".join(f"{id},{min(kind, 1)},{['', *DEMO_KINDS][kind]}\n" for id, kind in new_labels.items())
    texts = {"new.log": new, "new_labels.csv": "session,label,kind\n" + listed}
    templates = [re.sub(r"\{\w+\}", WILDCARD, event.partition(": ")[2]) for event in DEMO_EVENTS.values()]
    try:
        raw.parent.mkdir(parents=True, exist_ok=True)
        raw.write_text(log)
        options.sha256, options.input = file_sha256(raw), raw        # and now as if the log had come from elsewhere
        return build(options, settings, folder, templates, "demo", labels, DEMO_KINDS, texts)
    except OSError as error:
        fail(f"cannot write {raw}: {error}")
    finally:
        raw.unlink(missing_ok=True)

# ---------------------------------------------------------------------------------------------------------------- main
def build(options, settings, folder, templates=(), source="", labels=None, kinds=("anomaly",), texts={}):
    """What --input or --train name -> the finished data set -> its meta."""
    named = read_templates(options.templates) if options.templates else {}
    labels = read_labels(options.labels) if options.labels else labels
    cuts, total, parser, corpus = [], 0, options.parser, Corpus()
    if "header" in parser:
        total = sum(1 for _ in read_lines(options.input))
        templates = templates or list(dict.fromkeys(named.values())) or find_templates(options.input, parser, total)
        if not parser["session"]:
            end = round(options.train_share * total)
            cuts = [round(end * (1 - options.val_share)), end][parser["step"] == parser["window"]:]
    else:
        templates = [f"E{name.removeprefix('E')}: {text}" for name, text in named.items()]
    reader = LogReader(parser, templates, learn=True)
    files = {"train": options.train, "test_normal": options.test_normal, "test_abnormal": options.test_abnormal}
    files = files if options.train else {"": options.input}
    for reader.file, path in files.items():
        for session in reader.sessions(path, cuts, total):
            if options.train:                       # a file's name says more than a label in it, but for train
                label = max(session.label, 0) if reader.file == "train" else int(reader.file == "test_abnormal")
                session = session._replace(label=label)
            corpus.add(session, 0 if reader.file == "train" else 2)
    names = ", ".join(path.name for path in files.values())
    return finish(corpus, reader, options, settings, folder, source or names, cuts, labels, kinds, texts)

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (see --help)")
    source = parser.add_mutually_exclusive_group(required=True)
    def flag(name, help, type=None, default=None, group=parser, **kind):
        kind = kind or {"type": type, "default": default}
        help += f" (default: {default})" if default and type is not Path else ""
        group.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), help=help, **kind)
    flag("input", "a raw log, a CSV of events or key sequences, in the order of time; or gzipped", Path, group=source)
    flag("train", "key sequences of the training period; with --test_normal and --test_abnormal", Path, group=source)
    flag("demo", f"build a log offline ({DEMO_SESSIONS:,} sessions, or --limit)", group=source, action="store_true")
    flag("test_normal", "key sequences of normal test sessions", Path)
    flag("test_abnormal", "key sequences of anomalous test sessions", Path)
    flag("test_normals", "how many sessions those of --test_normal stand for, as a sample; 0: themselves", int, 0)
    flag("name", "the data set is written to <out_dir>/<name>/ (default with --demo: demo)")
    flag("format", f"of a raw log: {', '.join(FORMATS)}; with one of the next four flags: generic")
    flag("header", "regex of a line, with the groups content and perhaps time, label (- is normal)")
    flag("session", "regex; a line belongs to the session of each match")
    flag("window", "instead of sessions: windows of so many lines", int)
    flag("window_seconds", "instead of sessions: windows of so many seconds", float)
    flag("step", "lines from the start of a window to that of the next; --window: no overlap", int)
    flag("time_format", "of the time, as in strptime, or epoch; none: ISO 8601 or epoch", str, "")
    flag("templates", "known templates, <*> for any text: number<TAB>template, or a CSV EventId,EventTemplate", Path)
    flag("labels", "CSV of session ids and labels, such as BlockId,Label", Path)
    flag("session_timeout", "close a session after so many seconds without a line; 0: off", float, 0.0)
    flag("max_keys", "cut longer sessions", int, MAX_KEYS)
    flag("train_share", "of the sessions, or of the lines for windows: the training period", float, 0.5)
    flag("val_share", "of the training sessions, held out", float, 0.2)
    flag("limit", "keep a random sample of so many sessions (seeded)", int)
    flag("seed", "of --val_share, --limit and --demo", int, 0)
    flag("out_dir", "(default: the folder of this script)", Path, Path(__file__).resolve().parent)
    flag("force", "build the set even if it is already there", action="store_true")
    options = parser.parse_args(argv)
    options.name = options.name or ("demo" if options.demo else "")
    if not re.fullmatch(r"\w[\w.+-]*", options.name):
        fail(f"--name {options.name or '(missing)'}: give the data set a plain folder name, such as --name hdfs")
    for names, least, most in (("limit max_keys window step", 1, 1e9), ("seed session_timeout test_normals", 0, 1e18),
                               ("window_seconds", 1e-6, 1e9), ("train_share", 1e-6, 1), ("val_share", 1e-6, 0.999)):
        for name in names.split():
            if (value := getattr(options, name)) is not None and not least <= value <= most:
                fail(f"--{name} {value}: must be a number from {least} to {most}")
    given = [f"--{name}" for name in ("format", "header", "session", "window", "window_seconds", "step", "labels",
             "session_timeout", "time_format", *["templates"] * options.demo) if getattr(options, name)]
    if given and not options.input:
        fail(f"{', '.join(given)}: only with --input")
    if len({bool(options.train), bool(options.test_normal), bool(options.test_abnormal)}) > 1 or (
            options.test_normals and not options.train):
        fail("--train, --test_normal and --test_abnormal belong together, and --test_normals is for these")
    raw = {"--format", "--header", "--session", "--window", "--window_seconds", "--step"} & set(given)
    options.parser = raw_parser(options) if raw else {name: getattr(options, name) for name, default in (
        ("session_timeout", 0), ("max_keys", MAX_KEYS), ("time_format", "")) if getattr(options, name) != default}
    if options.demo:
        options.parser = parse(["--input", "-", "--templates", "-", "--name", "demo", *DEMO_FLAGS]).parser
    return options

def raw_parser(options):
    """Flags -> the dict by which LogReader reads a raw log."""
    if options.format not in (None, *FORMATS):
        fail(f"--format {options.format}: choose from {', '.join(FORMATS)}")
    form = FORMATS[options.format or "generic"]
    session, window, timed = options.session or "", options.window or 0, options.window_seconds or 0
    session, window = (session, window) if session or window or timed else (form.session, form.window)
    header = options.header or form.header
    for name, regex in (("header", header), ("session", session)):
        try:
            groups = re.compile(regex)
        except re.error as error:
            fail(f"--{name} {regex!r} is no regular expression: {error}")
        if name == "session" and (groups.groups > 1 or session and groups.match("")):
            fail(f"--session {session!r} must have at most one group, around the id, and not match the empty text")
        if name == "header" and "content" not in groups.groupindex:
            fail(f"--header {header!r} needs a group (?P<content>...) for the message")
        if name == "header" and "time" not in groups.groupindex and (timed or options.session_timeout):
            fail("--window_seconds and --session_timeout need a group (?P<time>...) in --header")
    own = [session] * (groups.groups == 0 and session[:2] not in ("", "(?"))         # ids in a message are wildcards
    if sum(map(bool, (session, window, timed))) != 1:
        fail("what is a session? Give one of --session, --window and --window_seconds")
    if (options.step or 0) > window:
        fail(f"--step {options.step} is for --window and at most as long, or lines would be lost")
    if not session and (options.session_timeout or options.labels):
        fail("windows have no ids and no timeout: leave out --labels and --session_timeout")
    return {"format": options.format or "generic", "header": header, "session": session, "window": window,
            "step": options.step or window, "window_seconds": timed, "session_timeout": options.session_timeout,
            "time_format": options.time_format or form.time_format, "masks": list(dict.fromkeys([*own, *form.masks])),
            "templates": "given" if options.templates else "found", "max_keys": max(options.max_keys, window)}

def main(argv=None):
    """Build the data set that the command line asks for -> its folder (Path)."""
    options, start = parse(argv), time.monotonic()
    folder = options.out_dir / options.name
    settings = {name: getattr(options, name) for name in ("limit", "train_share", "val_share", "max_keys", "seed",
                                                          "test_normals", "parser")}
    settings |= {name: file_sha256(path) for name in ("templates", "labels") if (path := getattr(options, name))}
    settings |= {"demo": DEMO_RECIPE} if options.demo else {}
    files = (options.input, options.train, options.test_normal, options.test_abnormal)
    sums = " ".join(file_sha256(path) for path in files if path)     # of three files: the sum of their sums
    options.sha256 = hashlib.sha256(sums.encode()).hexdigest() if options.train else sums or None
    if already_there(folder, options.sha256, settings) and not options.force:
        print(f"{folder}: already there (--force builds it again)")
        return folder
    try:
        meta = (build_demo if options.demo else build)(options, settings, folder)
    except KeyboardInterrupt:
        print("interrupted: nothing was changed", file=sys.stderr)
        raise SystemExit(130) from None
    summary(folder, meta, time.monotonic() - start)
    return folder

if __name__ == "__main__":
    main()
