"""Two processes, started by torchrun, do what one does alone."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL
from safetensors.torch import load_file

import drpo

STAGES = ("sft", "rm", "dpo", "ppo", "drpo")

# drpo.py, but every process leaves a digest of its weights at the end of each stage
WORKER = """
import hashlib, sys
import drpo, tools.report

save_network, tools.report.write = drpo.save_network, lambda run: None

def watched(network, tokenizer, folder):
    folder.mkdir(parents=True, exist_ok=True)
    weights = b"".join(p.detach().numpy().tobytes() for p in network.parameters())
    (folder / f"digest_{drpo.world()[0]}").write_text(hashlib.sha256(weights).hexdigest())
    save_network(network, tokenizer, folder)

drpo.save_network = watched
drpo.main()
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of small_run made by two processes, which get five and three of the eight rows of a batch."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", folder / "worker.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [*launch, "all", *SMALL, "--run_dir", folder / "run"]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (folder / "run" / "stdout.txt").write_text(done.stdout)
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_take_the_steps_of_one(small_run, two, stage):
    one, other = [load_file(run / stage / "model.safetensors") for run in (small_run, two)]
    assert one.keys() == other.keys()
    assert max((one[name] - other[name]).abs().max() for name in one) < 1e-5
    logs = [[json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()] for run in (small_run, two)]
    assert len(logs[0]) == len(logs[1])
    for line, again in zip(*logs):
        assert line.keys() == again.keys()
        for name in line:
            assert "second" in name or again[name] == pytest.approx(line[name], rel=1e-3, abs=1e-4), name
    assert (two / stage / "digest_0").read_text() == (two / stage / "digest_1").read_text()


@pytest.mark.slow
def test_two_processes_measure_what_one_measures_and_one_writes(small_run, two):
    one, other = [json.loads((run / "report.json").read_text()) for run in (small_run, two)]
    for method, figures in one["methods"].items():
        for name, value in figures.items():
            assert other["methods"][method][name] == pytest.approx(value, abs=1e-3), (method, name)
    assert other["rm"]["accuracy"] == one["rm"]["accuracy"]
    assert (two / "stdout.txt").read_text().count("rm: accuracy") == 1
    assert len((two / "samples.jsonl").read_text().splitlines()) == 10


def test_without_torchrun_there_is_one_process_and_sums_are_left_alone():
    x = torch.arange(3.0)
    assert drpo.world() == (0, 1) and drpo.summed(x) is x and x.tolist() == [0.0, 1.0, 2.0]


def test_the_shares_of_processes_are_disjoint_and_whole(monkeypatch):
    batch = drpo.collate([[5] * n for n in range(1, 12)], [[6]] * 11, 3, "cpu")
    seen = []
    for rank in range(3):
        monkeypatch.setattr(drpo, "world", lambda rank=rank: (rank, 3))
        seen.append([i for index, part in drpo.micro_batches(batch, 2) for i in index.tolist()])
    assert sorted(sum(seen, [])) == list(range(11)) and max(map(len, seen)) - min(map(len, seen)) <= 2
