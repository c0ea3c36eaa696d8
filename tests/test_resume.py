"""A run that cannot be lost: killed, asked to stop, out of disk space or damaged, the same command ends where it would have."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
from conftest import ROOT, SMALL, log_of
from safetensors import SafetensorError
from safetensors.torch import load_file

import drpo

pytestmark = [
    pytest.mark.usefixtures("no_figures"),
    pytest.mark.skipif(os.name != "posix", reason="signals, fork and /dev/full"),
]
STAGES = ["sft", "rm", "dpo", "ppo", "drpo"]


def contents(run):
    return {path: path.read_bytes() for path in run.glob("*/*") if path.is_file()}


def assert_same(folder, wanted):  # model, checkpoint and metrics of a stage, bit for bit
    tensors = [load_file(path / "model.safetensors") for path in (folder, wanted)]
    tensors += [torch.load(path / "checkpoint.pt", weights_only=True)["params"] for path in (folder, wanted)]
    for one, other in (tensors[:2], tensors[2:]):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert log_of(folder) == log_of(wanted)


# drpo.py in a forked child that kills itself at a given event: after a step, or anywhere in a save
WORKER = """
import itertools, os, signal, sys
from pathlib import Path
import torch, conftest, drpo, tools.report

def life(argv, dies_at):
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    events, save = itertools.count(1), torch.save
    def deadly(function):
        def called(*args, **kwargs):
            result = function(*args, **kwargs)
            if next(events) == dies_at:
                function is save and args[1].truncate(1000)
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return called
    for module, name in (torch, "save"), (os, "fsync"), (Path, "replace"), (drpo, "step"), (drpo, "save_network"):
        setattr(module, name, deadly(getattr(module, name)))
    drpo.main(argv)
    os._exit(0)

torch.set_num_threads(1)
tools.report.write = lambda run: None
died = 0
while life(sys.argv[1:], dies_at=(5, 19, 12, 23, 10, 21, 14, 17)[died % 8]) == -signal.SIGKILL:
    died += 1
print("died", died)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_the_same(small_run, tmp_path):
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER, "all", *SMALL, "--run_dir", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 6
    for stage in STAGES:
        assert_same(tmp_path / stage, small_run / stage)
    assert (tmp_path / "samples.jsonl").read_bytes() == (small_run / "samples.jsonl").read_bytes()


def interrupt(monkeypatch, command, update):  # runs the command, which ends in this update
    step = drpo.step

    def fails(optimizer, s, where, batch):
        if where.endswith(f" {update}"):
            raise RuntimeError("gone")
        return step(optimizer, s, where, batch)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="gone"):
        patch.setattr(drpo, "step", fails)
        drpo.main(command)


@pytest.mark.parametrize(
    "stage, changes", [*((stage, {}) for stage in STAGES), ("drpo", {"advantages": "rloo"}), ("drpo", {"lora_r": 4})]
)
def test_a_stage_resumes_from_its_checkpoint_bit_for_bit(start, tmp_path, monkeypatch, stage, changes):
    """Interrupted in its third update, saved after the second, with a log that has more lines than that."""
    command, log = start(stage, save_every=2, **changes), tmp_path / "run" / stage / "metrics.jsonl"
    interrupt(monkeypatch, command, 3)
    log.write_text(log.read_text() + '{"update": 3, "loss": 1.0}\n{"upda')
    drpo.main(command)
    drpo.main(start(stage, "whole", **changes))
    assert_same(tmp_path / "run" / stage, tmp_path / "whole" / stage)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_the_update_end_saves_and_exits_with_0(start, small_run, tmp_path, one_line, monkeypatch, number):
    command, step, handler = start("drpo", save_every=100), drpo.step, signal.default_int_handler
    before = signal.signal(number, handler)
    with monkeypatch.context() as patch:
        patch.setattr(drpo, "step", lambda *args: signal.raise_signal(number) or step(*args))
        assert "after update 1 of 3" in one_line(command, status=0)
    folder = tmp_path / "run" / "drpo"
    assert signal.signal(number, before) is handler and len(log_of(folder)) == 1 and not (folder / "result.json").exists()
    (folder / "metrics.jsonl").unlink()  # it resumes without its log, too
    drpo.main([*command, "--save_every", "2"])
    assert log_of(folder) == log_of(small_run / "drpo")[1:]
    shutil.copy(small_run / "drpo" / "metrics.jsonl", folder)
    assert_same(folder, small_run / "drpo")


def test_a_signal_that_is_ignored_stays_ignored(start, tmp_path, monkeypatch):  # as under nohup
    step, before = drpo.step, signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(drpo, "step", lambda *args: signal.raise_signal(signal.SIGHUP) or step(*args))
    drpo.main(start("drpo"))
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN and len(log_of(tmp_path / "run" / "drpo")) == 3


def test_a_signal_in_the_last_update_of_a_stage_stops_the_run(tmp_path, one_line, monkeypatch):
    step = drpo.step

    def last(optimizer, s, where, batch):
        if where == "sft update 4":
            signal.raise_signal(signal.SIGTERM)
        return step(optimizer, s, where, batch)

    monkeypatch.setattr(drpo, "step", last)
    assert "stopped" in one_line(["all", *SMALL, "--run_dir", tmp_path], status=0)
    assert not (tmp_path / "rm" / "metrics.jsonl").exists()


def test_a_finished_run_is_kept(small_run, tmp_path, capsys):
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    before = contents(run)
    drpo.main(["all", *SMALL, "--run_dir", str(run)])
    drpo.main(["ppo", *SMALL, "--run_dir", str(run), "--beta", "1"])  # which PPO does not depend on
    assert capsys.readouterr().out.count("finished, and kept") == 6 and contents(run) == before
    assert (run / "samples.jsonl").read_bytes() == (small_run / "samples.jsonl").read_bytes()


CHANGED = {  # command: words of the line
    "drpo --kl_coef 0.2": ["kl_coef was 0.1, is 0.2"],
    "drpo --beta 1 --epochs 3": ["beta was 0.6, is 1.0", "epochs was 2, is 3"],
    "drpo --sft_lr 0.5": ["sft_lr was 0.003, is 0.5"],
    "sft --dataset conftest:pairs": ["dataset was conftest:posts, is"],
    "drpo rows": ["rows of dataset was"],
    "drpo retrained": ["rm was"],
    "all without sft": ["sft was", "is None"],  # before sft is trained anew
    "all --kl_coef 0.2": ["kl_coef was 0.1, is 0.2"],  # before dpo, which is not finished, is trained
}


@pytest.mark.parametrize("change", CHANGED)
def test_changed_inputs_are_refused_by_name(small_run, tmp_path, one_line, monkeypatch, change):
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    for stage in ("dpo", "drpo"):
        (run / stage / "result.json").unlink()  # not finished, and refused all the same
    stage, *flags = change.split()
    if flags == ["rows"]:
        rows = conftest.posts()
        monkeypatch.setattr(conftest, "posts", lambda split: [*rows[:-1], rows[0]])
        monkeypatch.setattr(drpo, "load_rows", drpo.load_rows.__wrapped__)  # not from its cache
    if flags == ["retrained"]:
        (run / "rm" / "result.json").write_text('{"seconds": 1.5}')
    if flags == ["without", "sft"]:
        shutil.rmtree(run / "sft")
    before, flags = contents(run), flags if "--" in change else []
    line = one_line([stage, *SMALL, *flags, "--run_dir", run])
    assert all(word in line for word in ["delete", *CHANGED[change]]) and contents(run) == before, line


def test_a_model_that_was_changed_since_is_refused_by_name(start, tmp_path, one_line):
    conftest.network().save_pretrained(tmp_path / "model")
    commands = start("sft", model=tmp_path / "model"), start("rm", "other", rm_model=tmp_path / "model")
    for command in commands:
        drpo.main(command)
    os.utime(tmp_path / "model" / "model.safetensors", (1, 1))
    assert all("model.safetensors was" in one_line(command) for command in commands)


# ---- A full disk, damage, and files that somebody else made ------------------------------------------------
def test_ctrl_c_outside_of_training_is_one_line(start, one_line, monkeypatch):
    monkeypatch.setattr(conftest, "longer", lambda *_: signal.raise_signal(signal.SIGINT))
    assert "interrupted" in one_line(start("eval"), status=130)


def test_room_for_one_checkpoint_is_enough_to_resume(start, tmp_path, one_line, monkeypatch):
    command, room = start("sft", save_every=2), 20 * conftest.network().num_parameters()
    monkeypatch.setattr(drpo.shutil, "disk_usage", lambda path: SimpleNamespace(free=room))
    assert "too little room" in one_line(command)
    with monkeypatch.context() as patch:
        patch.setattr(drpo.shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * room))
        interrupt(patch, command, 3)
    drpo.main(command)


FULL = "sft/tokenizer_config.json rm/config.json drpo/settings.new drpo/checkpoint.new drpo/model.safetensors drpo/result.new"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device on which there is never room")
@pytest.mark.parametrize("path", [*FULL.split(), "eval/samples.jsonl", "eval/report.new"])
def test_a_full_disk_is_one_line_and_the_run_resumes(start, small_run, tmp_path, one_line, monkeypatch, path):
    stage, name = path.split("/")
    command, folder = start(stage), tmp_path / "run" / ("" if stage == "eval" else stage)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to("/dev/full")
    with monkeypatch.context() as patch:
        if name == "model.safetensors":  # safetensors replaces the link; this is what it says
            error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            patch.setattr(drpo, "save_network", lambda *_: (_ for _ in ()).throw(error))
        line = one_line(command, status=3)
    assert "No space left on device" in line and str(tmp_path) in line
    (folder / name).unlink()
    drpo.main(command)
    if stage == "eval":
        assert json.loads((folder / "report.json").read_text())["prompts"] == 10
    else:
        assert_same(folder, small_run / stage)


class Malice:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "of another stage", "pickle"])
def test_a_damaged_checkpoint_is_one_line_and_not_executed(start, small_run, tmp_path, one_line, how):
    command, path, planted = start("drpo"), tmp_path / "run" / "drpo" / "checkpoint.pt", tmp_path / "planted"
    path.parent.mkdir()
    own, other = [(small_run / stage / "checkpoint.pt").read_bytes() for stage in ("drpo", "rm")]
    path.write_bytes({"truncated": own[:-2000], "empty": b"", "text": b"no checkpoint"}.get(how, other))
    if how == "pickle":
        torch.save({"params": Malice(planted), "update": 1}, path)
        torch.load(path, weights_only=False)  # it is live
        planted.unlink()
    assert f"{path}: cannot be read; delete it" in one_line(command) and not planted.exists()


@pytest.mark.parametrize("what", ["pickle", "code"])
@pytest.mark.parametrize("flag", ["model", "rm_model"])
def test_what_comes_with_a_model_is_not_executed(start, tmp_path, one_line, monkeypatch, what, flag):
    model, planted = tmp_path / "model", tmp_path / "planted"
    conftest.network().save_pretrained(model)
    if what == "pickle":
        (model / "model.safetensors").unlink()
        torch.save({"gpt_neox.embed_in.weight": Malice(planted)}, model / "pytorch_model.bin")
    else:
        auto = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Custom"}
        config = json.loads((model / "config.json").read_text()) | {"model_type": "custom", "auto_map": auto}
        (model / "config.json").write_text(json.dumps(config))
        (model / "custom.py").write_text(f"open({str(planted)!r}, 'w')\nclass Config: pass\nclass Custom: pass\n")
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    stage = "rm" if (what, flag) == ("pickle", "rm_model") else "sft"  # SFT reads the configuration of --rm_model
    assert "model" in one_line(start(stage, **{flag: model})) and not planted.exists()
