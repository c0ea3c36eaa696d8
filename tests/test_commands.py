"""The commands of the README, run; and the README itself, held to the code."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import drpo

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = "--sft_steps 3 --rm_steps 3 --updates 2 --eval_samples 12 --batch_size 4 --dpo_batch_size 4".split()
KEYS = ["win_rate", "win_rate_ci95", "rm_score", "kl", "rouge_l", "response_tokens", "eos_rate"]


def python(*words, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """`python drpo.py`, cut short."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    done = python("drpo.py", "--run_dir", folder, *SHORT)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done


def test_the_main_command_goes_from_posts_to_a_win_rate_table(tiny):
    folder, done = tiny
    assert re.search(r"^DR-PO +0\.\d+ \[", done.stdout, re.M)
    report = json.loads((folder / "report.json").read_text())
    assert list(report["methods"]) == ["sft", "dpo", "ppo", "drpo"]
    assert set(report["seconds"]) == {"sft", "rm", "dpo", "ppo", "drpo"} and 0 < report["rm"]["accuracy"] < 1
    for method in report["methods"].values():
        low, high = method["win_rate_ci95"]
        assert set(KEYS) <= set(method) and 0 <= low <= method["win_rate"] <= high <= 1
    assert report["methods"]["sft"]["kl"] == 0.0
    assert report["settings"]["sft_steps"] == 3
    assert {"report.md", "curves.png", "frontier.png", "samples.jsonl"} <= {path.name for path in folder.iterdir()}
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 12 and isinstance(samples[0]["drpo"]["response"], str)


def test_every_update_leaves_a_line_of_metrics(tiny):
    for stage, updates in [("sft", 3), ("rm", 3), ("dpo", 2), ("ppo", 2), ("drpo", 2)]:
        lines = [json.loads(line) for line in (tiny[0] / stage / "metrics.jsonl").read_text().splitlines()]
        assert [line["update"] for line in lines] == list(range(1, updates + 1))
        assert (tiny[0] / stage / "checkpoint" / f"{updates:06d}" / "tensors.safetensors").exists()
    glossary = README.partition("## Metrics")[2].partition("## The TL;DR")[0]
    named = set(re.findall(r"`([a-z_0-9*]+)`", glossary))
    missing = [
        name
        for name in lines[0]
        if name not in named | {"update", "loss", "pg_loss", "seconds"}
        and not (name.startswith("seconds_") and "seconds_*" in named)
    ]
    assert not missing, "metrics that the README's glossary does not explain"


def test_the_first_update_prints_three_self_checks_for_ppo_and_drpo(tiny):
    checks = re.findall(r"check: .*", tiny[1].stderr + tiny[1].stdout)
    assert len(checks) == 6
    assert checks[0].startswith("check: SFT references score ")
    assert "check: 0.00 of the rollouts start from a reset, and beta is 0" in checks[1]
    assert "is at most 0.0e+00 before the first step" in checks[2]


def test_the_same_command_again_keeps_what_is_finished(tiny):
    before = (tiny[0] / "report.json").read_text()
    again = python("drpo.py", "--run_dir", tiny[0], *SHORT)
    assert again.returncode == 0 and again.stdout.count("finished, and kept") == 5
    assert (tiny[0] / "report.json").read_text() == before


def test_a_changed_setting_retrains_only_what_depends_on_it(tiny, tmp_path):
    shutil.copytree(tiny[0], tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "drpo")
    again = python("drpo.py", "--run_dir", tmp_path / "copy", *SHORT, "--beta", "1.0")
    assert again.returncode == 0 and again.stdout.count("finished, and kept") == 4
    refused = python("drpo.py", "--run_dir", tiny[0], *SHORT, "--beta", "1.0")
    assert refused.returncode == 2 and "beta was 0.6, is 1.0" in refused.stderr.splitlines()[-1]


def test_an_api_judge_decides_the_win_rates_and_its_key_is_written_nowhere(tiny, tmp_path, monkeypatch, capsys):
    from test_judge import KEY, Endpoint, prefers

    shutil.copytree(tiny[0], tmp_path / "run")
    endpoint = Endpoint(prefers(len))  # the longer text wins, always
    threading.Thread(target=endpoint.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    for name, value in {"OPENAI_BASE_URL": endpoint.url, "OPENAI_API_KEY": KEY, "NO_PROXY": "*"}.items():
        monkeypatch.setenv(name, value)
    drpo.main(["eval", "--run_dir", str(tmp_path / "run"), *SHORT, "--judge", "api:some-model"])
    endpoint.shutdown()
    said = capsys.readouterr()
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    for sample in samples:
        for method in ("sft", "drpo"):
            text, reference = sample[method]["response"], sample["reference"]
            assert sample[method]["win_rate"] in ([0.5] if text == reference else [float(len(text) > len(reference)), 0.5])
    assert "of 12 questions: SFT" in said.out and (tmp_path / "run" / "verdicts.jsonl").exists()
    assert all(KEY.encode() not in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert KEY not in said.out + said.err


def test_several_seeds_make_one_table(tmp_path):
    done = python("drpo.py", "--seeds", "7", "8", "--run_dir", tmp_path, *SHORT)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    values = [json.loads((tmp_path / f"seed_{seed}" / "report.json").read_text())["methods"]["drpo"]["kl"] for seed in (7, 8)]
    assert report["methods"]["drpo"]["kl"]["mean"] == pytest.approx(sum(values) / 2)
    assert "seeds 7, 8" in done.stdout and (tmp_path / "seed_8" / "report.md").exists()


def test_the_tiny_run_does_not_import_datasets():
    done = python(
        "-c",
        "import sys, drpo; s = drpo.parse([])[1]; drpo.load_rows(s.dataset, 'reference', 0); "
        "assert 'datasets' not in sys.modules",
    )
    assert done.returncode == 0, done.stderr


def test_every_drpo_command_in_the_readme_and_the_header_is_understood():
    commands = re.findall(r"python drpo\.py(?![`*])([^\n#`]*)", README + drpo.__doc__)
    commands = [command.split("   ")[0].split() for command in commands if "STAGE" not in command]
    assert len(commands) > 6
    for words in commands:
        stage, settings = drpo.parse(
            [word.replace("$beta", "0.5").replace("$stage", "drpo") for word in words if word != "..."]
        )
        assert stage in [*drpo.STAGES, "eval", "all"] and settings.run_dir


def test_the_settings_table_shows_the_defaults_of_the_tldr_preset():
    s = drpo.parse(["--preset", "tldr"])[1]
    assert (s.model, s.batch_size, s.epochs, s.lora_r, s.query_length, s.response_length) == (
        "EleutherAI/pythia-2.8b-deduped",
        512,
        4,
        1024,
        512,
        53,
    )
    assert {s.lr, s.sft_lr, s.rm_lr, s.dpo_lr} == {3e-6}
    assert (s.gamma, s.lam, s.cliprange, s.vf_coef, s.kl_coef, s.beta, s.dpo_beta) == (1, 0.95, 0.2, 0.1, 0.05, 1, 0.05)
    assert s.reset_to == "reference"
