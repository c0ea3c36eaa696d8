"""A made-up run folder with figures that can be worked by hand, for the tests of the tools that read one."""

import json

import drpo

SETTINGS = {"dataset": "toy_text:gate", "preset": "tiny", "eval_temperature": 0.01, "temperature": 0.7}
LOG = {"kl": 0.5, "response_tokens": 9.0, "eos_rate": 0.5, "entropy": 1.0, "explained_variance": 0.2, "tokens_decoded": 100}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(folder, win_rates, seed=0, judge="toy_text:gold_judge", score=(0.0, 1.0), kl=2.5, log=LOG, **settings):
    """A finished run with these {method: win rate} on four prompts; PPO and DR-PO logged these scores, one per update."""
    settings = SETTINGS | {"seed": seed, "run_dir": str(folder)} | settings
    rl = [log | {"score": value} for value in score]
    logs = {"sft": [{"loss": 3.0}], "rm": [{"accuracy": 0.6}], "dpo": [{"accuracy": 0.6}], "ppo": rl, "drpo": rl}
    accuracy = {"accuracy": 0.7, "accuracy_ci95": [0.4, 0.9], "pairs": 10}
    results = {"sft": {"held_out_loss": 2.0, "rouge_l": 0.3}, "rm": accuracy | {"accuracy_by_batch": {"all": accuracy}}}
    for seconds, stage in enumerate(dict.fromkeys(["sft", "rm", *win_rates]), 5):
        write_lines(folder / stage / "metrics.jsonl", logs[stage])
        (folder / stage / "result.json").write_text(json.dumps({"seconds": seconds, **results.get(stage, {})}))
        (folder / stage / "settings.json").write_text(json.dumps({"beta": 0.6, f"weights of {folder}": seed, **settings}))
    samples = [{"prompt": f"POST: number {i}\n\nTL;DR:", "reference": f"told {i}"} for i in range(4)]
    for i, row in enumerate(samples):
        rest = {"kl": kl, "kl_rm_score": float(i), "rouge_1": 0.3, "rouge_2": 0.1, "rouge_l": i / 10, "eos_rate": int(i > 0)}
        rest |= {"rm_score": 1.0 + (i > 1), "response_tokens": 9 + i // 2}
        row |= {name: {"response": f"{name} says {i}", "win_rate": rate, **rest} for name, rate in win_rates.items()}
    drpo.write_report(folder, samples, settings, judge)
    return folder
