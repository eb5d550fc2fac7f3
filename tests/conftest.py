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
