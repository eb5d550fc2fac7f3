"""figure.py: five pictures of runs become one, and a run that is not there is named."""
import pytest
from PIL import Image

import figure


def test_five_panels(tmp_path):
    flags = []
    for i, (name, (file, _)) in enumerate(figure.PANELS.items()):
        path = tmp_path / name / file
        path.parent.mkdir(parents=True)
        Image.new("RGB", (100, 40 + 200 * (i == 2)), (40 * i, 0, 255 - 40 * i)).save(path)      # the third one is tall
        flags += [f"--{name}", str(tmp_path / name)]
    figure.main([*flags, "--out", str(tmp_path / "whole.png")])
    with Image.open(tmp_path / "whole.png") as whole:
        colours = {colour for count, colour in whole.convert("RGB").getcolors(1 << 20) if count > 10_000}
        assert whole.width == 2 * figure.WIDTH + 3 * figure.GAP and len(colours) == 6           # five and white
        assert whole.height < 2 * 1.3 * figure.WIDTH                                            # its top alone


def test_a_run_without_its_picture_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        figure.main(["--molecules", str(tmp_path), "--out", str(tmp_path / "whole.png")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: --molecules {tmp_path}: there is no samples/final.png")
    assert error.count("\n") == 1 and not (tmp_path / "whole.png").exists()
