"""Two processes, started by torchrun, do what one does alone."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL, log_of
from safetensors.torch import load_file


@pytest.mark.slow
def test_two_processes_do_what_one_does(small_run, tmp_path):
    """They get five and three of the eight rows of a batch. If their weights differed, so would their sums."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "drpo.py"]
    env, two = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}, tmp_path / "run"
    command = [*launch, "all", *SMALL, "--run_dir", two]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for stage in ("sft", "rm", "dpo", "ppo", "drpo"):
        one, other = [load_file(run / stage / "model.safetensors") for run in (small_run, two)]
        assert one.keys() == other.keys() and max((one[name] - other[name]).abs().max() for name in one) < 1e-5
        for line, again in zip(log_of(small_run / stage), log_of(two / stage), strict=True):
            assert again == pytest.approx(line, rel=1e-3, abs=1e-4)
    one, other = [json.loads((run / "report.json").read_text()) for run in (small_run, two)]
    for method, figures in one["methods"].items():
        for name, value in figures.items():
            assert other["methods"][method][name] == pytest.approx(value, abs=1e-3), (method, name)
    assert other["rm"]["accuracy"] == one["rm"]["accuracy"] and done.stdout.count("rm: accuracy") == 1  # one of them writes
    assert len((two / "samples.jsonl").read_text().splitlines()) == 10
