"""The repository root goes on the path, so that `import drpo` works from wherever pytest is started."""

import os
import sys
from pathlib import Path
from unittest.mock import patch

import huggingface_hub
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(autouse=True)
def hub_as_it_was():
    """Where the Hub cannot be reached, `tools/preflight.py` goes offline for the rest of the process: here, of the test."""
    with (
        patch.dict(os.environ),
        patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", huggingface_hub.constants.HF_HUB_OFFLINE),
    ):
        yield


@pytest.fixture
def one_thread():
    """Tensors this small are fastest on one thread, and sums always run in the same order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_line(capsys):
    """one_line(argv) -> what `drpo.py` says on stderr before it ends with status 2: one line, for who can mend it."""
    import drpo

    def ends(argv):
        capsys.readouterr()  # what was said before does not count
        with pytest.raises(SystemExit) as stopped:
            drpo.main([str(word) for word in argv])
        line = capsys.readouterr().err
        assert stopped.value.code == 2 and len(line.splitlines()) == 1, line
        return line

    return ends
