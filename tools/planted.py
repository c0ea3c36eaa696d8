"""Short DR-PO runs with a known mistake in each, to learn what the mistake looks like in the metrics.

    python -m tools.planted --run runs/tiny [--out results/planted] [settings of drpo.py]

Starts from the SFT and reward model of a finished run. Trains 15 updates (or `--updates`) with drpo.py as it is ("healthy"),
and then with each mistake of PLANTS. OUT/NAME.jsonl holds the metrics, without times. OUT/stopped.json holds the first
self-check that failed, or null: drpo.py ends such a run with status 3. Here it continues, for notebooks/03_read_a_run.ipynb.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from unittest import mock

import torch
import transformers

import drpo
from drpo import penalised_rewards, response_logprobs, rollout, stop, token_mask, twin  # the originals, whatever is planted
from tools import report, show


def trained_reference(network, s, role):
    """`twin`, but the reference is the policy itself. Critic and reward model are as they should be."""
    trained, frozen = twin(network, s, role)
    return trained, trained if role == "policy" else frozen


def score_at_padding(backbone, head, batch):
    """`end_scores`, but read in the last column: on padding, in all rows of a micro-batch but the longest."""
    return head(backbone(input_ids=batch["ids"], use_cache=False).last_hidden_state[:, -1].float())[:, 0]


def reward_on_padding(scores, logprobs, ref_logprobs, mask, kl_coef):
    """`penalised_rewards`, but the score stands in the last column: on padding, in all rows that end before it."""
    rewards = penalised_rewards(0 * scores, logprobs, ref_logprobs, mask, kl_coef)
    rewards[:, -1] += scores
    return rewards


def old_logprobs_at_another_temperature(network, batch, mask, temperature=1.0):
    """`response_logprobs`, but what is computed without gradients, the old log-probabilities, is taken at 0.7 of it."""
    return response_logprobs(network, batch, mask, temperature if torch.is_grad_enabled() else 0.7 * temperature)


PLANTS = {  # name: {function of drpo.py: what stands in its place}
    "healthy": {},
    "no_resets": {"sample_reset_lengths": lambda reference_lengths, *_: torch.zeros_like(reference_lengths)},
    "score_at_padding": {"end_scores": score_at_padding},
    "scorer_temperature": {"response_logprobs": old_logprobs_at_another_temperature},
    "sampler_temperature": {"rollout": lambda *given: rollout(*given[:-1], 0.7 * given[-1])},
    "trained_reference": {"twin": trained_reference},
    "reward_on_padding": {"penalised_rewards": reward_on_padding},
    "prefix_trained": {"token_mask": lambda reset_len, response_len, T: token_mask(0 * reset_len, response_len, T)},
}


def train(name, s):
    """-> what drpo logs with this mistake in it, a dict per update, and the first self-check that failed: a line, or None."""
    failed = []

    def noted(message, status=2):
        failed.append(message) if status == 3 else stop(message, status)

    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(drpo, stop=noted, **PLANTS[name]):
        for stage in ("sft", "rm"):
            Path(folder, stage).symlink_to(Path(s.run_dir, stage).resolve())
        Path(folder, "drpo").mkdir()
        with drpo.precision(s):
            drpo.train_drpo(dataclasses.replace(s, run_dir=folder))
        log = report.read(Path(folder, "drpo", "metrics.jsonl"), lines=True)
    log = [{key: value for key, value in line.items() if not key.startswith(("seconds", "gb_"))} for line in log]
    return log, next(iter(failed), None)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.planted", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True, help="the folder of a run that has sft/ and rm/")
    parser.add_argument("--out", type=Path, default=Path("results/planted"), help="where the metrics go (default: %(default)s)")
    parser.error = drpo.stop
    options, given = parser.parse_known_args(argv)
    s = drpo.parse(["drpo", *show.recorded(options.run), "--updates=15", *given, f"--run_dir={options.run}"])[1]
    show.needs_models(s.run_dir)
    transformers.logging.disable_progress_bar()
    with drpo.blame(f"--out {options.out}"):
        options.out.mkdir(parents=True, exist_ok=True)
    stopped = {}
    for name in PLANTS:
        log, stopped[name] = train(name, s)
        print(f"{name}: {stopped[name] or 'no self-check fails'}")
        (options.out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (options.out / "stopped.json").write_text(json.dumps(stopped, indent=1) + "\n")


if __name__ == "__main__":
    main()
