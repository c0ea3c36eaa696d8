"""A run that cannot be lost: what is checked before it starts, who may work in its folder, how it is stopped and goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import drpo
from tools import checkpoint

ROOT = Path(__file__).resolve().parent.parent


def half_a_judge(prompts, a, b):
    return [1.0 for _ in prompts[::2]][1:]


def other_posts():
    return [{"prompt": f"post {i}", "reference": "summary"} for i in range(10)]


@pytest.mark.parametrize(
    "flag, value, named",
    [
        ("--judge", "toy_env:nosuchjudge", "nosuchjudge"),
        ("--judge", "gold", "--judge gold"),
        ("--judge", "api:", "api:MODEL"),
        ("--judge", "api:some-model", "OPENAI_API_KEY"),
        ("--preference_dataset", "toy_env:gate", "chosen"),
        ("--preference_dataset", "nowhere.jsonl", "nowhere.jsonl"),
        ("--preference_length", 250, "has room for"),
        ("--judge", "test_run:half_a_judge", "0 verdicts on 1 pairs"),
        ("--dataset", "test_run:other_posts", "no post of toy_env.py"),  # which its gold judge, the default, cannot judge
        ("--others", "nowhere/to/be/found", "nowhere/to/be/found"),
    ],
)
def test_what_is_wrong_in_a_later_stage_is_found_before_the_first_one_trains(
    tmp_path, one_line, monkeypatch, flag, value, named
):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    model = []
    if flag == "--preference_length":  # the config of a folder can be read without its weights
        import toy_env

        toy_env.tiny_pythia().save_pretrained(tmp_path / "model")
        model = ["--model", tmp_path / "model"]
    assert named in one_line(["all", "--run_dir", tmp_path / "run", flag, value, *model])
    assert not (tmp_path / "run" / "sft").exists()


def test_a_run_folder_belongs_to_one_process(tmp_path, one_line):
    with checkpoint.hold(tmp_path):
        assert "another process" in one_line(["sft", "--run_dir", tmp_path])


def test_a_folder_that_may_not_be_written_to_is_named(tmp_path, one_line, monkeypatch):
    def forbidden(path, *_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", forbidden)
    line = one_line(["sft", "--run_dir", tmp_path / "run"])
    assert "run" in line and "Permission denied" in line


def test_a_checkpoint_of_another_stage_is_refused_and_left_alone(tmp_path, one_line):
    small = ["--rm_steps", "2", "--rm_batch_size", "2", "--eval_samples", "2", "--run_dir", tmp_path]
    drpo.main([str(word) for word in ["sft", "--sft_steps", "2", "--sft_batch_size", "2", *small]])
    planted = tmp_path / "rm" / "checkpoint"
    shutil.copytree(tmp_path / "sft" / "checkpoint", planted)
    before = {path: path.read_bytes() for path in planted.rglob("*") if path.is_file()}
    assert "rm was made with other settings" in one_line(["rm", "--sft_steps", "2", "--sft_batch_size", "2", *small])
    assert before and {path: path.read_bytes() for path in planted.rglob("*") if path.is_file()} == before


SFT = ["sft", "--sft_steps", "60", "--eval_samples", "2", "--save_every", "1000"]


@pytest.mark.skipif(os.name != "posix", reason="sends a signal of POSIX")
def test_sigterm_ends_the_update_saves_and_the_same_command_goes_on_to_the_same_weights(tmp_path):
    command = [sys.executable, ROOT / "drpo.py", *SFT, "--run_dir"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, tmp_path / "stopped"], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "stopped" / "sft" / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 4):
        assert process.poll() is None, process.stderr.read()[-500:]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    done = len(log.read_text().splitlines())
    assert process.returncode == 0 and f"stopped as asked after update {done} of 60" in said and 4 < done < 60
    assert [path.name for path in (tmp_path / "stopped" / "sft" / "checkpoint").iterdir()] == [f"{done:06d}"]

    again = subprocess.run([*command, tmp_path / "stopped"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert again.returncode == 0 and f"goes on after update {done}" in again.stdout
    subprocess.run([*command, tmp_path / "whole"], cwd=ROOT, env=env, capture_output=True, check=True)
    stopped, whole = [load_file(tmp_path / run / "sft" / "model.safetensors") for run in ("stopped", "whole")]
    assert all((stopped[name] == whole[name]).all() for name in whole)
    logs = [
        [{**json.loads(line), "seconds": 0} for line in (tmp_path / run / "sft" / "metrics.jsonl").read_text().splitlines()]
        for run in ("stopped", "whole")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 60
