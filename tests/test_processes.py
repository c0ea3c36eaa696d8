"""Several processes, started by torchrun: together they do what one does alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import drpo
from tools import running

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "--sft_steps",
    "4",
    "--rm_steps",
    "4",
    "--updates",
    "3",
    "--sft_batch_size",
    "10",
    "--rm_batch_size",
    "10",
    "--dpo_batch_size",
    "10",
    "--batch_size",
    "10",
    "--micro_batch",
    "3",
    "--eval_samples",
    "8",
    "--save_every",
    "2",
]
STAGES = ("sft", "rm", "dpo", "ppo", "drpo")

# drpo.py, but that every process leaves a digest of the weights that it has at the end of each stage; and dies when asked to
WORKER = """
import hashlib, os, sys
sys.path.insert(0, {root!r})
import drpo

save_network, draw = drpo.save_network, drpo.draw

def watched_save(network, tokenizer, folder):
    weights = b"".join(p.detach().numpy().tobytes() for p in network.parameters())
    (folder / f"digest_{{drpo.world()[0]}}").write_text(hashlib.sha256(weights).hexdigest())
    save_network(network, tokenizer, folder)

def deadly_draw(rows, size, update, seed, stream):
    if os.environ.get("DIES") == f"{{drpo.world()[0]}} {{stream}} {{update}}":
        os._exit(7)
    return draw(rows, size, update, seed, stream)

drpo.save_network, drpo.draw = watched_save, deadly_draw
drpo.main()
"""


def start(tmp_path, processes, *argv, **env):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(root=str(ROOT)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*(launch if processes > 1 else [sys.executable]), str(worker), *map(str, argv)],
        cwd=ROOT,
        timeout=300,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env},
    )


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    said = {}
    for n in (1, 2):
        said[n] = start(folder, n, "all", *SMALL, "--run_dir", folder / str(n))
        assert said[n].returncode == 0, said[n].stderr[-2000:]
    return folder, said


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_take_the_steps_of_one(one_and_two, stage):
    folder, _ = one_and_two
    one, two = [load_file(folder / str(n) / stage / "model.safetensors") for n in (1, 2)]
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)
    logs = [[json.loads(line) for line in (folder / str(n) / stage / "metrics.jsonl").read_text().splitlines()] for n in (1, 2)]
    assert len(logs[0]) == len(logs[1]) == (4 if stage in ("sft", "rm") else 3)
    for a, b in zip(*logs):
        assert a.keys() == b.keys()
        for name in a:
            if "second" not in name:
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("stage", STAGES)
def test_both_processes_end_with_the_same_weights_to_the_last_bit(one_and_two, stage):
    folder, _ = one_and_two
    first, second = [(folder / "2" / stage / f"digest_{rank}").read_text() for rank in (0, 1)]
    assert first == second


def test_two_processes_measure_what_one_measures_and_one_of_them_talks(one_and_two):
    folder, said = one_and_two
    one, two = [json.loads((folder / str(n) / "report.json").read_text()) for n in (1, 2)]
    assert one["methods"].keys() == two["methods"].keys() == {"sft", "dpo", "ppo", "drpo"}
    for method in one["methods"]:
        for figure in ("win_rate", "rouge_l", "response_tokens", "eos_rate"):
            assert two["methods"][method][figure] == pytest.approx(one["methods"][method][figure], abs=1e-6), (method, figure)
        for figure in ("rm_score", "kl"):
            assert two["methods"][method][figure] == pytest.approx(one["methods"][method][figure] or 0, abs=1e-3), (
                method,
                figure,
            )
    for n in (1, 2):
        assert said[n].stdout.count("rm: accuracy") == 1
        assert len((folder / str(n) / "samples.jsonl").read_text().splitlines()) == 8


def test_a_process_that_dies_takes_the_run_down_and_the_run_goes_on_from_the_checkpoint(one_and_two, tmp_path):
    folder, _ = one_and_two
    dead = start(tmp_path, 2, "sft", *SMALL, "--run_dir", tmp_path / "run", DIES="1 sft 3")
    assert dead.returncode != 0 and "exitcode  : 7" in dead.stderr and "rank      : 1" in dead.stderr
    assert not (tmp_path / "run" / "sft" / "result.json").exists()
    again = start(tmp_path, 2, "sft", *SMALL, "--run_dir", tmp_path / "run")
    assert again.returncode == 0 and again.stdout.count("goes on after update 2") == 1
    resumed, whole = [load_file(run / "sft" / "model.safetensors") for run in (tmp_path / "run", folder / "2")]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_what_is_wrong_is_said_once_and_ends_all_processes(tmp_path):
    done = start(tmp_path, 2, "sft", "--dataset", "nowhere.jsonl", "--run_dir", tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.count("drpo.py: nowhere.jsonl") == 1


def test_shares_are_disjoint_and_whole(monkeypatch):
    parts = list(range(7))
    shares = []
    for rank in range(3):
        monkeypatch.setattr(running, "world", lambda rank=rank: (rank, 3))
        shares.append(drpo.share(parts))
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]


def test_without_torchrun_there_is_one_process_and_sums_are_left_alone():
    assert drpo.world() == (0, 1)
    x = torch.arange(3.0)
    assert drpo.summed(x) is x and x.tolist() == [0.0, 1.0, 2.0]
