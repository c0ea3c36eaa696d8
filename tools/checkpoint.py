"""Checkpoints that are there whole or not at all. Imports nothing of ours.

    FOLDER/000040/tensors.safetensors    trained weights, and the optimizer's moments
    FOLDER/000040/state.json             everything else, and the digest of the tensors

A checkpoint is written under another name on the same file system, flushed to the disk, and renamed: whatever kills the
process, a reader finds the old one or the new one. There is no pickle in it.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import threading

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


def save(folder, update, params, optimizer, settings, keep=1):
    """Writes FOLDER/UPDATE, and then deletes all but the `keep` newest. params: {name: trained tensor}.

    An OSError, as of a full disk, leaves what was there before."""
    moments = {
        f"optimizer.{i}.{key}": value for i, values in optimizer.state_dict()["state"].items() for key, value in values.items()
    }
    new = folder / f".{update:06d}"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        tensors = {f"param.{name}": p.detach() for name, p in params.items()} | moments
        save_file({name: x.contiguous() for name, x in tensors.items()}, new / "tensors.safetensors")
        state = {
            "update": update,
            "settings": settings,
            "param_groups": optimizer.state_dict()["param_groups"],
            "sha256": digest(new / "tensors.safetensors"),
        }
        (new / "state.json").write_text(json.dumps(state, indent=1))
        for path in (new / "tensors.safetensors", new / "state.json", new):
            flush(path)
        shutil.rmtree(folder / f"{update:06d}", ignore_errors=True)  # there only if it is damaged
        new.rename(folder / f"{update:06d}")
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise OSError(str(error)) from error
    for old in sorted(folder.glob("[0-9]" * 6))[:-keep]:
        shutil.rmtree(old)


def newest(folder):
    """-> the newest whole checkpoint in the folder, or None. A damaged one is named, and passed over for the one before it."""
    for path in sorted(folder.glob("[0-9]" * 6), reverse=True):
        try:
            if json.loads((path / "state.json").read_text())["sha256"] == digest(path / "tensors.safetensors"):
                return path
            reason = "its tensors are not those that were written"
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        print(f"{path}: damaged ({reason}); looking for an older checkpoint")
    return None


def load_weights(path, params):
    """Restores the params {name: tensor}, some or all of those saved, in place -> all that was saved."""
    tensors = load_file(path / "tensors.safetensors")
    for name, p in params.items():
        p.data.copy_(tensors[f"param.{name}"])
    return tensors


def load(path, params, optimizer):
    """Restores the params {name: tensor} and the optimizer in place -> the number of updates done."""
    state, tensors, moments = json.loads((path / "state.json").read_text()), load_weights(path, params), {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            number, _, key = rest.partition(".")
            moments.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})
    return state["update"]


def digest(path):
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            sha256.update(block)
    return sha256.hexdigest()


def flush(path):
    """Has the file, or the folder's list of names, on the disk before anything else happens."""
    if path.is_dir() and os.name != "posix":  # where a folder cannot be opened
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hold(folder):
    """Keeps any other process out of the folder for as long as this one lives: nothing to clean up after a crash.

    -> what must be kept. Raises BlockingIOError if another process holds it. Where there is no flock nothing is held."""
    file = (folder / ".lock").open("w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    return file


@contextlib.contextmanager
def requests_to_stop():
    """Inside, SIGTERM and SIGINT only fill the list that this gives, for the caller to look at; a second one interrupts."""
    asked = []

    def handler(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield asked
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
