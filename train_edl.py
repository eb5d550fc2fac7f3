"""MolGPT with an evidential head (work in progress: the tokenizer that data/molecules/prepare.py imports)."""
import re

SMILES_TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|[BCNOSPFI]|[bcnosp]|[().=#\-+\\/:~@?>*$]|%[0-9]{2}|[0-9]")
SPECIALS = ["<bos>", "<eos>"]                     # ids 0 and 1 of every vocabulary


def tokenize(smiles):
    """Split a SMILES string (str) into tokens (list of str) whose concatenation is the string again.

    Raises ValueError naming the first character that is no SMILES token: findall alone would drop it silently.
    """
    tokens = SMILES_TOKEN.findall(smiles)
    if "".join(tokens) != smiles:
        position = 0
        for token in tokens:
            if not smiles.startswith(token, position):
                break
            position += len(token)
        raise ValueError(f"character {position + 1} ({smiles[position]!r}) of {smiles[:60]!r} is no SMILES token")
    return tokens
