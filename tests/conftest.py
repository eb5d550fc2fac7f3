"""What all tests share: the repository root on sys.path, one thread, and two processes that stay up for the session."""
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes hours: a long soak, commands as they are written; only by -m slow")


def pytest_collection_modifyitems(config, items):
    """Slow tests are left out, unless -m speaks of them: then it decides."""
    left_out = [] if "slow" in config.option.markexpr else [item for item in items if item.get_closest_marker("slow")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def pair():
    """Two gloo processes: pair.run(function, *arguments) calls it in both -> [rank 0's answer, rank 1's]."""
    from tiny import Pair
    processes = Pair()
    yield processes
    processes.close()


@pytest.fixture
def refuse(request, tmp_path, capsys):
    """refuse(*arguments) to prepare.py of the test's module -> the one line on stderr; checks the exit code and that
    nothing was written."""
    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            request.module.prepare.main([*map(str, arguments), "--out_dir", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        assert list(tmp_path.glob("out/*")) == []
        return error
    return call
