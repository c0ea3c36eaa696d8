"""What comes from outside is data: no code of a model folder runs, no pickle is opened, old results go only when one agrees."""

import io
import json
import os
import pickle
import sys

import pytest
import torch

import drpo
import toy_env
from tools import checkpoint

SMALL = ["--sft_steps", "1", "--sft_batch_size", "2", "--eval_samples", "2", "--dataset", "test_security:few"]


def few():
    return [{"prompt": f"p {i}", "reference": f"r {i}"} for i in range(4)]


class Malice:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_in_a_model_folder_is_refused(tmp_path, one_line):
    model, planted = tmp_path / "model", tmp_path / "planted"
    toy_env.tiny_pythia().save_pretrained(model)
    (model / "model.safetensors").unlink()
    torch.save({"gpt_neox.embed_in.weight": Malice(f"touch {planted}")}, model / "pytorch_model.bin")
    with (model / "pytorch_model.bin").open("rb") as file:  # it is live: opened without care, it would do its work
        torch.load(io.BytesIO(file.read()), weights_only=False)
    assert planted.exists()
    planted.unlink()
    assert "model" in one_line(["sft", *SMALL, "--model", model, "--run_dir", tmp_path / "run"])
    assert not planted.exists()


def test_code_that_comes_with_a_model_is_not_run_and_nobody_is_asked(tmp_path, one_line, monkeypatch):
    model, planted = tmp_path / "model", tmp_path / "planted"
    toy_env.tiny_pythia().save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "custom",
        "architectures": ["Custom"],
        "auto_map": {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Custom"},
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "custom.py").write_text(f"open({str(planted)!r}, 'w')\nclass Config: pass\nclass Custom: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    line = one_line(["sft", *SMALL, "--model", model, "--run_dir", tmp_path / "run"])
    assert "model" in line and not planted.exists()


def test_a_pickle_in_the_place_of_a_checkpoint_is_not_opened(tmp_path):
    planted, params = tmp_path / "planted", {"w": torch.ones(2, requires_grad=True)}
    checkpoint.save(tmp_path / "checkpoint", 1, params, torch.optim.AdamW(params.values()), {})
    at = tmp_path / "checkpoint" / "000001"
    for name in ("tensors.safetensors", "state.json", "optimizer.pt"):
        (at / name).write_bytes(pickle.dumps(Malice(f"touch {planted}")))
    assert checkpoint.newest(tmp_path / "checkpoint") is None
    assert not planted.exists()


def test_names_in_the_data_never_become_files(tmp_path):
    """Prompts and references that look like paths are texts."""
    before = set(tmp_path.rglob("*"))
    globals()["paths"] = lambda: [{"prompt": f"../{i}/../../escape", "reference": f"/{tmp_path}/escape_{i}"} for i in range(4)]
    drpo.load_rows.cache_clear()
    drpo.main(["sft", *SMALL[:-1], "test_security:paths", "--run_dir", str(tmp_path / "run")])
    outside = {path for path in set(tmp_path.rglob("*")) - before if tmp_path / "run" not in (path, *path.parents)}
    assert not outside and not any("escape" in path.name for path in tmp_path.rglob("*"))


# ------------------------------------------------------------------------------------------------------------- --fresh


@pytest.fixture
def finished(tmp_path):
    drpo.main(["sft", *SMALL, "--run_dir", str(tmp_path / "run")])
    for name in ("dpo", "other"):
        (tmp_path / "run" / name).mkdir()
    (tmp_path / "run" / "verdicts.jsonl").write_text("{}\n")
    (tmp_path / "run" / "eval.json").write_text("{}\n")
    (tmp_path / "run" / "resets.jsonl").write_text("{}\n")
    return tmp_path / "run"


@pytest.mark.parametrize("answer", ["", "no\n", "y\n"])
def test_fresh_deletes_nothing_that_nobody_agreed_to(finished, one_line, monkeypatch, answer):
    before = sorted(finished.rglob("*"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    assert "nothing was deleted" in one_line(["sft", *SMALL, "--sft_lr", "0.1", "--fresh", "--run_dir", finished])
    assert sorted(finished.rglob("*")) == before


def test_fresh_starts_over_and_takes_with_it_what_was_built_on_it_but_not_what_was_paid_for(finished, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))
    drpo.main(["sft", *SMALL, "--sft_lr", "0.1", "--fresh", "--run_dir", str(finished)])
    said = capsys.readouterr().out
    assert f"--fresh deletes {finished}/sft, {finished}/dpo, {finished}/eval.json, {finished}/resets.jsonl." in said
    assert json.loads((finished / "sft" / "result.json").read_text())["settings"]["sft_lr"] == 0.1
    assert not (finished / "dpo").exists() and (finished / "other").exists() and (finished / "verdicts.jsonl").exists()


def test_fresh_asks_nothing_where_there_is_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    drpo.main(["sft", *SMALL, "--fresh", "--run_dir", str(tmp_path / "run")])
    assert (tmp_path / "run" / "sft" / "result.json").exists()
