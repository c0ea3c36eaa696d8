"""The tldr and hh presets to the end on real posts, pairs and dialogues, with the real tokenizer and a small random Pythia.

Needs the folder DRPO_DATA: tldr_train.jsonl, tldr_validation.jsonl, tldr_preferences.jsonl, hh_helpful.jsonl.gz and
pythia_tokenizer.json."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

import drpo
from tools import real_run

DATA = Path(os.environ.get("DRPO_DATA", ""))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("DRPO_DATA" not in os.environ, reason="DRPO_DATA names no folder of real data"),
]


@pytest.fixture(scope="module")
def pythia(tmp_path_factory):
    """A folder like EleutherAI/pythia-*: the architecture with its vocabulary of 50304, two layers of 32."""
    folder = tmp_path_factory.mktemp("pythia")
    torch.manual_seed(0)
    GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=50304,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=2048,
        )
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("preset, lora_r", [("tldr", 4), ("hh", 0)])
def test_the_preset_runs_to_the_end_on_real_text(preset, lora_r, pythia, tmp_path):
    if preset == "tldr":
        (tmp_path / "posts").mkdir()
        for split in ("train", "validation"):
            (tmp_path / "posts" / f"{split}.jsonl").symlink_to(DATA / f"tldr_{split}.jsonl")
        sources = ["--dataset", tmp_path / "posts", "--preference_dataset", DATA / "tldr_preferences.jsonl"]
    else:
        sources = ["--dataset", DATA / "hh_helpful.jsonl.gz", "--preference_dataset", DATA / "hh_helpful.jsonl.gz"]
    run = tmp_path / "run"
    sizes = "--sft_steps 1 --rm_steps 1 --updates 1 --sft_batch_size 4 --rm_batch_size 4 --dpo_batch_size 4"
    drpo.main(
        [
            "all",
            "--preset",
            preset,
            "--model",
            pythia,
            "--tokenizer",
            str(DATA / "pythia_tokenizer.json"),
            *map(str, sources),
            "--run_dir",
            str(run),
            "--lora_r",
            str(lora_r),
            "--dtype",
            "float32",
            "--micro_batch",
            "4",
            "--query_length",
            "256",
            *sizes.split(),
            *"--batch_size 4 --eval_samples 4".split(),
        ]
    )
    report = json.loads((run / "report.json").read_text())
    assert list(report["methods"]) == ["sft", "dpo", "ppo", "drpo"] and report["settings"]["preset"] == preset
    line = json.loads((run / "drpo" / "metrics.jsonl").read_text())
    assert line["reset_share"] == 1.0 and line["tokens_forced"] > 0  # beta is 1 in both presets
    assert (run / "drpo" / "adapter").exists() == bool(lora_r)
    assert AutoModelForCausalLM.from_pretrained(run / "drpo").config.vocab_size == 50304  # [PAD] takes a spare row


def test_the_two_halves_of_the_pairs_are_disjoint_and_hold_no_post_that_is_held_out():
    first, second = real_run.first_half("train"), real_run.second_half("train")
    texts = [{(row["prompt"], row["chosen"], row["rejected"]) for row in half} for half in (first, second)]
    assert not texts[0] & texts[1] and len(first) == len(second) == 200 + real_run.HH
    held_out = {row["prompt"].strip() for row in real_run.posts("validation")}
    assert not held_out & {row["prompt"].strip() for row in [*first, *second, *real_run.posts("train")]}
    unseen = [row["prompt"].strip() for row in real_run.first_half("validation") if row["batch"] == "tldr"]
    assert len(unseen) == 100 and set(unseen) <= held_out
