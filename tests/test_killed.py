"""A run that is killed again and again ends as if nobody had touched it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "all",
    "--sft_steps",
    "12",
    "--rm_steps",
    "12",
    "--updates",
    "6",
    "--sft_batch_size",
    "8",
    "--rm_batch_size",
    "8",
    "--dpo_batch_size",
    "8",
    "--batch_size",
    "8",
    "--eval_samples",
    "4",
    "--save_every",
    "1",
    "--judge",
    "rm",
]
STAGES = {"sft": 12, "rm": 12, "dpo": 6, "ppo": 6, "drpo": 6}

# drpo.py, but that it kills itself at the given step of writing checkpoints: half-way through the tensors, or at a flush
WORKER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import drpo
from tools import checkpoint

steps, save_file, flush = [], checkpoint.save_file, checkpoint.flush

def die_if_due(path=None):
    steps.append(1)
    if len(steps) == int(os.environ.get("DIES_AT", -1)):
        if path:
            os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

def deadly_save_file(tensors, path):
    save_file(tensors, path)
    die_if_due(path)

def deadly_flush(path):
    die_if_due()
    flush(path)

checkpoint.save_file, checkpoint.flush = deadly_save_file, deadly_flush
drpo.main()
"""


def life(tmp_path, run, **env):
    (tmp_path / "worker.py").write_text(WORKER.format(root=str(ROOT)))
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "worker.py"), *SMALL, "--run_dir", str(run)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env},
    )


def logged(run):
    return sum(log.read_text().count("\n") for log in run.glob("*/metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills as POSIX does")
def test_killed_at_ten_random_moments_also_while_saving_a_run_ends_with_the_same_weights_and_log(tmp_path):
    whole, killed, rng, moments = tmp_path / "whole", tmp_path / "killed", random.Random(7), []
    process = life(tmp_path, whole)
    assert process.wait(timeout=300) == 0, process.stdout.read()[-2000:]
    for number in range(10):
        if number % 2:  # inside a save: a save has five such steps
            process = life(tmp_path, killed, DIES_AT=str(rng.randint(1, 20)))
        else:  # at any moment, once it is at work
            process, before, more = life(tmp_path, killed), logged(killed), rng.randint(1, 4)
            while logged(killed) < before + more and process.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.random() * 0.1)
            process.kill()
        process.wait(timeout=300)
        said = process.stdout.read()
        assert process.returncode == -signal.SIGKILL, said[-2000:]
        assert "Traceback" not in said
        moments.append(logged(killed))
    assert moments[-1] > moments[0] and len(set(moments)) > 5  # it did go on in between
    process = life(tmp_path, killed)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "goes on after update" in said + str(moments), said[-2000:]

    for stage, updates in STAGES.items():
        one, other = [load_file(run / stage / "model.safetensors") for run in (whole, killed)]
        assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one), stage
        logs = [
            [
                {name: value for name, value in json.loads(line).items() if "second" not in name}
                for line in (run / stage / "metrics.jsonl").read_text().splitlines()
            ]
            for run in (whole, killed)
        ]
        assert logs[0] == logs[1] and len(logs[0]) == updates, stage
        assert [path.name for path in (killed / stage / "checkpoint").iterdir()] == [f"{updates:06d}"]
    assert (whole / "samples.jsonl").read_bytes() == (killed / "samples.jsonl").read_bytes()
