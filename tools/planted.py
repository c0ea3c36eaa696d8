"""Runs with a known mistake planted in them, to learn what it looks like in the logged metrics.

    python -m tools.planted --run runs/tiny [--out results/planted] [settings of drpo.py]

On the SFT and reward model of a finished run, drpo trains 15 updates (or `--updates`): once as it is ("healthy"), and once with
each mistake of PLANTS in the place of a function of drpo.py. OUT/NAME.jsonl holds the metrics of each update, but for what
depends on the clock, and OUT/stopped.json what drpo.py's own checks said, `--check_rollouts` among them. There they end the
run with status 3; here the first is written down, and the run goes on, so that its curves can be seen.
notebooks/03_read_a_run.ipynb reads all this.
"""

import contextlib
import dataclasses
import json
import tempfile
from pathlib import Path
from unittest import mock

import torch

import drpo
from drpo import apply_head, padded, penalised_rewards, stop, twin  # as they are, whatever is planted
from tools import report, running, show


def prompts_padded_on_the_right(*args, **kwargs):
    """`padded`, but with the padding between the prompt and the response, as tokenizers pad unless told otherwise. Decoding
    then reads off padding what it should read off the prompt's last token. Passes over whole rows leave out any padding."""
    batch = padded(*args, **kwargs)
    order = (~batch["query_mask"]).long().argsort(dim=1, stable=True)  # the prompt first
    return batch | {name: batch[name].gather(1, order) for name in ("query", "query_mask")}


def reference_that_is_trained(network, lora_r, seed=0):
    """`twin`, but what should be the frozen SFT model is the policy itself. Critic and reward model stay as they should be."""
    trained, frozen = twin(network, lora_r, seed)
    return trained, (lambda: contextlib.nullcontext(trained)) if network.can_generate() else frozen


def score_read_at_padding(backbone, head, batch):
    """`end_scores`, but of padded rows and in the last column: on padding, in all rows but those with the longest response."""
    mask = torch.cat([batch["query_mask"], torch.ones_like(batch["response"])], 1)
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    states = backbone(input_ids=torch.cat([batch["query"], batch["response"]], 1), **given, use_cache=False).last_hidden_state
    return apply_head(head, states[:, -1].float())


def reward_put_on_padding(scores, logprobs, ref_logprobs, mask, kl_coef):
    """`penalised_rewards`, but with the score in the last column: on padding, in all rows that end before it."""
    rewards = penalised_rewards(0 * scores, logprobs, ref_logprobs, mask, kl_coef)
    rewards[:, -1] += scores
    return rewards


def no_resets(reference_lengths, *_, **__):
    """`sample_reset_lengths`, but beta is ignored: DR-PO has quietly become PPO."""
    return torch.zeros_like(reference_lengths)


PLANTS = {  # name: {function of drpo.py: what stands in its place}
    "healthy": {},
    "right_padding": {"padded": prompts_padded_on_the_right},
    "trained_reference": {"twin": reference_that_is_trained},
    "score_at_padding": {"end_scores": score_read_at_padding},
    "reward_on_padding": {"penalised_rewards": reward_put_on_padding},
    "no_resets": {"sample_reset_lengths": no_resets},
}
OF_THE_CLOCK = ("seconds", "tokens_per_second", "gb_")  # beginnings of names of metrics


def train(name, s):
    """-> what drpo logs with this mistake in it, a dict per update, and what stopped it, or would have: a line, or None."""
    said = []

    def noted(message, status=2):
        if status != 3:
            stop(message, status)
        said.append(" ".join(str(message).split()))

    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(drpo, stop=noted, **PLANTS[name]):
        for stage in ("sft", "rm"):
            Path(folder, stage).symlink_to(Path(s.run_dir, stage).resolve())
        Path(folder, "drpo").mkdir()
        with running.precision(s):
            drpo.train_drpo(dataclasses.replace(s, run_dir=folder))
        log = report.read(Path(folder, "drpo", "metrics.jsonl"), lines=True)
    log = [{key: value for key, value in line.items() if not key.startswith(OF_THE_CLOCK)} for line in log]
    return log, said[0] if said else None


def main(argv=None):
    parser = running.command("planted", __doc__)
    parser.add_argument("--run", type=Path, required=True, help="the folder of a run that has sft/ and rm/")
    parser.add_argument("--out", type=Path, default=Path("results/planted"), help="where the metrics go (default: %(default)s)")
    options, given = parser.parse_known_args(argv)
    s = drpo.parse(["drpo", *show.recorded(options.run, given), "--updates=15", "--check_rollouts=True", *given])[1]
    options.out.mkdir(parents=True, exist_ok=True)
    stopped = {}
    for name in PLANTS:
        print(f"{name}:")
        log, stopped[name] = train(name, s)
        (options.out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (options.out / "stopped.json").write_text(json.dumps(stopped, indent=1) + "\n")
    print("\n".join(f"{name}: {line or 'no check would have stopped it'}" for name, line in stopped.items()))


if __name__ == "__main__":
    main()
