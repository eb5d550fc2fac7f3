"""The grammar of the demo log: a made-up block store, and five ways to break it. prepare.py --demo writes the log and
reads it like any other.

A session is the life of one block: allocated, written to 2 to 4 nodes (receiving, closed, stored: each node in this
order, the nodes interleaved), then reads and checks in any number among steps that come as a whole (a copy to a further
node, an append under a lease), then perhaps deleted on every node that holds it. So some counts are tied to one another
and the others are free.
"""
import math
from datetime import datetime, timezone

DEMO_EVENTS = {
    "a": "INFO names.Table: allocated block {block} for file {file}",
    "r": "INFO node.Writer: receiving block {block} from {peer} to {node}",
    "c": "INFO node.Writer: writer {number} of block {block} closed",
    "s": "INFO names.Table: stored block {block} of size {size} on {node}",
    "d": "INFO node.Reader: served block {block} to {peer}",
    "v": "INFO node.Scanner: verified checksum of block {block}",
    "w": "INFO names.Table: location of block {block} asked for by {peer}",
    "k": "INFO names.Table: asked {peer} to copy block {block} to {node}",
    "t": "INFO node.Copier: transfer of block {block} to {node} started",
    "x": "INFO node.Copier: transmitted block {block} to {node}",
    "l": "INFO names.Lease: lease on block {block} given to {peer}",
    "p": "INFO node.Writer: appending to block {block} at offset {size}",
    "u": "INFO names.Lease: lease on block {block} returned by {peer}",
    "q": "INFO names.Table: delete of block {block} requested by {peer}",
    "e": "INFO node.Disk: deleting block {block} file {file}",
    "i": "INFO names.Table: block {block} invalidated on {node}",
    "1": "WARN node.Writer: write of block {block} to mirror {node} failed: broken pipe",
    "2": "ERROR node.Scanner: checksum mismatch in block {block} at offset {size}",
    "3": "WARN node.Reader: block {block} not found on {node}",
    "4": "WARN names.Table: no heartbeat from {node} holding block {block} for {number} s",
    "5": "ERROR node.Disk: disk full on {node} while writing block {block}",
    "6": "WARN names.Table: stale copy of block {block} on {node}",
}
DEMO_KINDS = ("missing step", "extra step", "wrong order", "unseen key", "early end")
DEMO_SESSIONS, DEMO_NEW = 8_000, 300
DEMO_RECIPE = 1                                    # raised when another log comes out: prepare.py rebuilds old sets
DEMO_FLAGS = ["--header", r"(?P<time>\S+ \S+) \w+ \S+: (?P<content>.*)", "--session", r"\bblk_\d+",
              "--time_format", "%Y-%m-%d %H:%M:%S"]

def shuffle_in(chains, rng):
    """Interleave strings, each in its own order; every interleaving is as likely as any other."""
    turns, letters = [i for i, chain in enumerate(chains) for _ in chain], [iter(chain) for chain in chains]
    rng.shuffle(turns)
    return "".join(next(letters[i]) for i in turns)

def draw_life(rng):
    """A normal session as letters of DEMO_EVENTS, one per line."""
    def geometric(p, most):
        return min(int(math.log(1 - rng.random()) / math.log(p)), most)
    nodes, copies = rng.choice((2, 3, 3, 3, 4)), rng.choices((0, 1, 2), (80, 17, 3))[0]
    steps = ["ktxrcs"] * copies + ["lpu"] * (rng.random() < 0.2)
    rng.shuffle(steps)
    free = "d" * geometric(0.5, 8) + "v" * geometric(0.2, 3) + "w" * geometric(0.2, 3)
    life = shuffle_in(["".join(steps), "".join(rng.sample(free, len(free)))], rng)
    deleted = "q" + shuffle_in(["ei"] * (nodes + copies), rng) if rng.random() < 0.8 else ""
    return "a" + shuffle_in(["rcs"] * nodes, rng) + life + deleted

def spoil(text, kind, rng):
    """A normal session -> one that the grammar cannot make, with the anomaly `kind` of DEMO_KINDS."""
    i = rng.choice([i for i, letter in enumerate(text) if letter in "rcsktxlpuei"])
    if kind == "missing step":
        return text[:i] + text[i + 1:]
    if kind == "extra step":
        j = rng.randint(i + 1, len(text))
        return text[:j] + text[i] + text[j:]
    if kind == "wrong order":                       # a line moves before what must precede it
        moves = [("s", 1), ("c", 1), ("d", 1), ("x", text.find("k")), ("p", text.find("l")), ("e", text.find("q")),
                 ("i", text.find("q") + 1)]
        letter, to = rng.choice([(letter, to) for letter, to in moves if to > 0 and letter in text])
        i = text.index(letter, to)
        return text[:to] + letter + text[to:i] + text[i + 1:]
    if kind == "unseen key":
        j = rng.randint(1, len(text))
        return text[:j] + rng.choice("123456") + text[j:]
    return text[:rng.choice([i for i in range(3, len(text)) if text[i - 1] in "rcktxlpqe"])]     # a step must follow

def write_log(kinds, rng, start, first):
    """kinds: 0 (normal) or 1 + the place in DEMO_KINDS for each session -> (raw log, dict from session id to kind)."""
    lines, labels, clock = [], {}, float(start)
    for number, kind in enumerate(kinds, first):
        text = spoil(draw_life(rng), DEMO_KINDS[kind - 1], rng) if kind else draw_life(rng)
        block = f"blk_{number * 1_000_003 + rng.randrange(1_000_000)}"
        labels[block] = kind
        clock += rng.expovariate(1 / 5)
        now, size, file = clock, rng.randint(1, 1 << 26), f"/store/user{rng.randint(1, 9)}/part-{rng.randint(0, 999)}"
        for place, letter in enumerate(text):
            node, peer = (f"10.0.{rng.randint(1, 4)}.{rng.randint(1, 30)}" for _ in range(2))
            lines.append((int(now), number, place, DEMO_EVENTS[letter].format(
                block=block, file=file, size=size, number=place % 4, node=f"{node}:50010",
                peer=f"{peer}:{rng.randint(32768, 60999)}")))
            now += rng.expovariate(1 / (120 if letter in "advwu" else 2))
    stamps = {now: datetime.fromtimestamp(now, timezone.utc).strftime(DEMO_FLAGS[-1]) for now, *_ in lines}
    return "".join(f"{stamps[now]} {event}\n" for now, _, _, event in sorted(lines)), labels
