"""tools/checkpoint.py: what is on the disk, whatever happens while it is written or after."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import checkpoint

ROOT = Path(__file__).resolve().parent.parent


def trained(steps=3, seed=0):
    """-> ({name: parameter}, AdamW that has taken this many steps on them)."""
    rng = torch.Generator().manual_seed(seed)
    params = {name: torch.randn(4, 3, generator=rng, requires_grad=True) for name in ("policy.a", "head.weight")}
    optimizer = torch.optim.AdamW(params.values(), lr=0.1)
    for step in range(steps):
        train(params, optimizer, step)
    return params, optimizer


def train(params, optimizer, step):
    optimizer.zero_grad()
    sum((p**2).sum() * (step + 1) for p in params.values()).backward()
    optimizer.step()


def test_a_restored_run_goes_on_bit_for_bit(tmp_path):
    params, optimizer = trained()
    checkpoint.save(tmp_path, 3, params, optimizer, {"lr": 0.1})
    for step in (3, 4):
        train(params, optimizer, step)
    other, other_optimizer = trained(0, seed=1)
    assert checkpoint.load(checkpoint.newest(tmp_path), other, other_optimizer) == 3
    for step in (3, 4):
        train(other, other_optimizer, step)
    assert all(torch.equal(params[name], other[name]) for name in params)


def test_a_checkpoint_knows_its_settings_and_has_no_pickle_in_it(tmp_path):
    checkpoint.save(tmp_path, 3, *trained(), {"beta": 0.5})
    path = checkpoint.newest(tmp_path)
    assert json.loads((path / "state.json").read_text())["settings"] == {"beta": 0.5}
    assert sorted(file.name for file in path.iterdir()) == ["state.json", "tensors.safetensors"]


@pytest.mark.parametrize("keep, left", [(1, ["000030"]), (2, ["000020", "000030"]), (9, ["000009", "000020", "000030"])])
def test_the_newest_are_kept(tmp_path, keep, left):
    for update in (9, 20, 30):
        checkpoint.save(tmp_path, update, *trained(), {}, keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert checkpoint.newest(tmp_path).name == "000030"


def test_there_is_no_newest_in_an_empty_folder_or_in_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None and checkpoint.newest(tmp_path / "none") is None


def spoil(path, how):
    tensors, state = path / "tensors.safetensors", path / "state.json"
    if how == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-5])
    elif how == "one bit":
        data = bytearray(tensors.read_bytes())
        data[-3] ^= 1
        tensors.write_bytes(data)
    elif how == "no tensors":
        tensors.unlink()
    elif how == "broken state":
        state.write_text(state.read_text()[:40])
    elif how == "state of another kind":
        state.write_text("[]")


@pytest.mark.parametrize("how", ["truncated", "one bit", "no tensors", "broken state", "state of another kind"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(tmp_path, capsys, how):
    for update in (1, 2):
        checkpoint.save(tmp_path, update, *trained(), {}, keep=2)
    spoil(tmp_path / "000002", how)
    assert checkpoint.newest(tmp_path).name == "000001"
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "000002: damaged" in line
    checkpoint.save(tmp_path, 2, *trained(), {}, keep=2)  # the run comes by again, and writes over it
    assert checkpoint.newest(tmp_path).name == "000002" and not capsys.readouterr().out


def test_what_a_killed_process_left_half_written_is_not_seen_and_is_cleared_away(tmp_path):
    checkpoint.save(tmp_path, 1, *trained(), {})
    shutil.copytree(tmp_path / "000001", tmp_path / ".000002")
    (tmp_path / ".000002" / "state.json").unlink()
    assert checkpoint.newest(tmp_path).name == "000001"
    checkpoint.save(tmp_path, 2, *trained(), {})
    assert [path.name for path in tmp_path.iterdir()] == ["000002"]


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files by the means of POSIX")
def test_a_disk_that_is_full_leaves_the_checkpoint_before(tmp_path):
    params, optimizer = trained()
    checkpoint.save(tmp_path, 1, params, optimizer, {})
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError):
            checkpoint.save(tmp_path, 2, params, optimizer, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["000001"] and checkpoint.newest(tmp_path).name == "000001"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_request_to_stop_is_noted_and_the_second_interrupts(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), checkpoint.requests_to_stop() as asked:
        assert not asked
        signal.raise_signal(number)
        assert asked == [number]
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_it_imports_nothing_of_ours():
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from tools import checkpoint; assert 'drpo' not in sys.modules"], cwd=ROOT
    )
    assert done.returncode == 0
