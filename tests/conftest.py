"""What all tests share: the repository root on sys.path, one thread, and two processes that stay up for the session."""
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
torch.set_num_threads(1)


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
