"""The repository root goes on the path, so that `import drpo` works from wherever pytest is started."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture
def one_thread():
    """Tensors this small are fastest on one thread, and sums always run in the same order."""
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
