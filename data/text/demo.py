"""The demo set: questions about formulas of physics, such as "How does the kinetic energy change if the speed is
tripled?" with 8 options; the response is the right one, "3^2 = 9", and a sentence that says why.

A row is a combination of a quantity, one of its variables and a factor, put into words in one of many ways. All rows of
a combination are in one split. Those held out can be answered by composition: the exponent of their variable is in
train with other factors, and their factor to that exponent is in train with other variables. A response is drawn from
several that are equally right, so even the best model is uncertain about the words, and a teacher's probabilities say
more than the one response in the data.
"""
import random
from fractions import Fraction
from math import isqrt
from typing import NamedTuple

# quantity | formula | symbol, name and exponent of the variables that are asked for
FORMULAS = """
kinetic energy | E = m v^2 / 2 | m mass 1, v speed 2
heating power | P = U^2 / R | U voltage 2, R resistance -1
swing period | T = 2 pi sqrt(l / g) | l length 1/2, g gravity -1/2
spring period | T = 2 pi sqrt(m / k) | m mass 1/2, k stiffness -1/2
gravity force | F = G m M / r^2 | m mass 1, r distance -2
electric force | F = k q Q / r^2 | q charge 1, r distance -2
tidal force | F = 2 G M m s / r^3 | m mass 1, r distance -3
magnet field | B = k m / r^3 | m moment 1, r distance -3
heat radiation | P = s A T^4 | A area 1, T temperature 4
pipe flow | Q = pi p r^4 / (8 n l) | r radius 4, n viscosity -1
ball mass | m = 4 pi d r^3 / 3 | d density 1, r radius 3
wind power | P = d A v^3 / 2 | A area 1, v speed 3
beam bending | y = F l^3 / (3 E I) | F load 1, l length 3
beam stiffness | k = E b h^3 / (4 l^3) | h height 3, l length -3
coil stiffness | k = G d^4 / (8 n D^3) | d wire width 4, D coil width -3
shaft stiffness | k = pi G d^4 / (32 l) | d width 4, l length -1
propeller thrust | F = c d n^2 D^4 | n rate 2, D width 4
string wave speed | v = sqrt(F / u) | F tension 1/2, u density -1/2
orbit speed | v = sqrt(G M / r) | M mass 1/2, r radius -1/2
circuit frequency | f = 1 / (2 pi sqrt(L C)) | L inductance -1/2, C capacitance -1/2
turning force | F = m v^2 / r | v speed 2, r radius -1
air drag | F = c d A v^2 / 2 | A area 1, v speed 2
braking distance | s = v^2 / (2 a) | v speed 2, a braking -1
lamp brightness | I = P / (4 pi r^2) | P power 1, r distance -2
wire resistance | R = 4 p l / (pi d^2) | l length 1, d width -2
wavelength | l = h / (m v) | m mass -1, v speed -1
"""
EXPONENTS = [Fraction(text) for text in "-3 -2 -1 -1/2 1/2 1 2 3 4".split()]
FACTORS = [Fraction(text) for text in "2 3 4 5 10 1/2 1/3 1/4 1/5 1/10".split()]
CHANGES = {2: ["doubled"], 3: ["tripled"], Fraction(1, 2): ["halved"]}       # besides those with a number
QUESTIONS = (
    "The {name} is {changed}. What about the {quantity}?",
    "How does the {quantity} change if the {name} is {changed}?",
    "If only the {name} is {changed}: the {quantity}?",
    "What is the {quantity} when the {name} is {changed}?")
REASONS = (
    "{left} goes as {power}.",
    "By {formula}.",
    "{formula} says so.",
    "It has {power} in it.",
    "The exponent of {symbol} is {exponent}.")
OPTIONS = 8
DEMO_ROWS, MOST_ROWS = 6_800, 12_000
DEMO_RECIPE = 1                                    # raised when other rows come out: prepare.py rebuilds old sets

class Variable(NamedTuple):
    quantity: str
    formula: str
    symbol: str
    name: str
    exponent: Fraction

def read_formulas():
    """FORMULAS -> list of Variable."""
    found = []
    for line in FORMULAS.strip().splitlines():
        quantity, formula, variables = (part.strip() for part in line.split("|"))
        for text in variables.split(", "):
            symbol, *name, exponent = text.split()
            found.append(Variable(quantity, formula, symbol, " ".join(name), Fraction(exponent)))
    return found

def power(factor, exponent):
    """factor ** exponent, exact, as text: 9, 1/8, sqrt(2), 1/sqrt(10). The factor is n or 1 / n."""
    n = max(factor.numerator, factor.denominator)
    exponent = -exponent if factor < 1 else exponent
    if exponent.denominator == 1:
        text = str(n ** abs(exponent.numerator))
    else:
        text = str(isqrt(n)) if isqrt(n) ** 2 == n else f"sqrt({n})"
    return text if exponent > 0 else f"1/{text}"

def raised(text, exponent):
    """v and 2 -> v^2, 1/3 and -1/2 -> (1/3)^(-1/2)."""
    base = f"({text})" if "/" in text else text
    return f"{base}^({exponent})" if exponent.denominator > 1 else f"{base}^{exponent}"

def option(factor, exponent):
    """3^2 = 9. The exponent comes first, so no option is the beginning of another and more likely for that alone."""
    return f"{raised(str(factor), exponent)} = {power(factor, exponent)}"

def split_combinations(rng):
    """-> dict split -> list of (Variable, factor), 80/10/10, no two of them equal, in random order.

    A combination is held out only if train keeps two others with its variable and two with its factor to its
    exponent."""
    left = [(variable, factor) for variable in read_formulas() for factor in FACTORS]
    rng.shuffle(left)
    share, splits = len(left) // 10, {"val": [], "test": []}
    seen = {}                                       # how many combinations in train show it
    for variable, factor in left:
        for key in ((variable,), (variable.exponent, factor)):
            seen[key] = seen.get(key, 0) + 1
    train = []
    for variable, factor in left:
        keys = (variable,), (variable.exponent, factor)
        split = next((name for name, rows in splits.items() if len(rows) < share), None)
        if split and min(seen[key] for key in keys) > 2:
            splits[split].append((variable, factor))
            for key in keys:
                seen[key] -= 1
        else:
            train.append((variable, factor))
    return {"train": train} | splits

def put(variable, factor, rng):
    """One row in words -> dict instruction, response, options, answer."""
    n = max(factor.numerator, factor.denominator)
    words = [f"multiplied by {n}", f"made {n} times as large"] if factor > 1 else [f"divided by {n}", f"cut to 1/{n}"]
    question = rng.choice(QUESTIONS).format(name=variable.name, quantity=variable.quantity, changed=rng.choice(
        words + CHANGES.get(factor, [])))
    reason = rng.choice(REASONS).format(
        formula=variable.formula, left=variable.formula.split()[0], symbol=variable.symbol,
        exponent=variable.exponent, power=raised(variable.symbol, variable.exponent))
    right, answer = option(factor, variable.exponent), rng.randrange(OPTIONS)
    wrong = [option(factor, exponent) for exponent in EXPONENTS if exponent != variable.exponent]
    options = rng.sample(wrong, OPTIONS - 1)
    options.insert(answer, right)
    return {"instruction": question, "response": f"{right}\n{reason}", "options": options, "answer": answer}

def demo_rows(n=DEMO_ROWS, seed=0):
    """n rows as dicts with the keys of prepare.py, the same for the same n and seed; 1/17 of them val, 1/17 test."""
    if not 3 <= n <= MOST_ROWS:
        raise ValueError(f"--limit {n}: the demo set has 3 to {MOST_ROWS:,} rows")
    rng, rows, seen = random.Random(f"{DEMO_RECIPE} {seed}"), [], set()
    held = max(1, round(n / 17))
    for split, combinations in split_combinations(rng).items():
        for k in range(held if split != "train" else n - 2 * held):
            row = put(*combinations[k % len(combinations)], rng)
            while (row["instruction"], row["response"]) in seen:     # in other words, then
                row = put(*combinations[k % len(combinations)], rng)
            seen.add((row["instruction"], row["response"]))
            rows.append({"split": split} | row)
    rng.shuffle(rows)
    return rows
