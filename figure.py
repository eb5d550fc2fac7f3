"""
One picture of all five scripts, from what their runs left behind.

python figure.py --molecules out/molecules --spectra out/spectra --text out/text --images out/images --logs out/logs
"""
import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from common import fail

# panel: the run's picture, what is seen in it
PANELS = {"molecules": ("samples/final.png", "train_edl.py: sampled molecules, the surest first"),
          "spectra": ("samples/final.png", "train_student.py: measured spectra up, predicted ones down"),
          "images": ("samples/final.png", "train_adapter.py: boxes at gate scales from 0, and the truth"),
          "logs": ("samples/scores.png", "train_logbert.py: scores of normal and anomalous sessions"),
          "text": ("comparison.png", "train_distill.py: students with a teacher and without")}
WIDTH, GAP, TITLE, TALLEST = 760, 16, 34, 1.16      # of a column, pixels; height of a picture by its width


def panel(path, title):
    """The top of a run's picture as wide as a column, its title above."""
    picture = Image.open(path).convert("RGB")
    picture = picture.crop((0, 0, picture.width, min(picture.height, round(TALLEST * picture.width))))
    picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.LANCZOS)
    sheet = Image.new("RGB", (WIDTH, picture.height + TITLE), "white")
    ImageDraw.Draw(sheet).text((4, 6), title, "black", ImageFont.load_default(20))
    sheet.paste(picture, (0, TITLE))
    return sheet


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (file, _) in PANELS.items():
        parser.add_argument(f"--{name}", default=f"out/{name}", help=f"run folder with {file} (default: %(default)s)")
    parser.add_argument("--out", default="docs/finite.png", help="picture to write (default: %(default)s)")
    flags = parser.parse_args(argv)
    columns = [[], []]
    for name, (file, title) in PANELS.items():      # each to the column that is shorter so far
        path = Path(getattr(flags, name)) / file
        if not path.is_file():
            fail(f"--{name} {getattr(flags, name)}: there is no {file}; a run of {title.split(':')[0]} has one")
        min(columns, key=lambda column: sum(sheet.height for sheet in column)).append(panel(path, title))
    height = max(sum(sheet.height + GAP for sheet in column) for column in columns)
    whole = Image.new("RGB", (2 * WIDTH + 3 * GAP, height + GAP), "white")
    for i, column in enumerate(columns):
        top = GAP
        for sheet in column:
            whole.paste(sheet, (GAP + i * (WIDTH + GAP), top))
            top += sheet.height + GAP
    whole.quantize(128).save(flags.out, optimize=True)
    print(f"{flags.out}: {whole.width} x {whole.height}")


if __name__ == "__main__":
    main()
