"""Rollouts from resets, kept as text: the same posts, prefixes and random numbers for the SFT model and for what RL made of it.

    python -m tools.resets RUN [--rows 8] [settings of drpo.py]

RUN/resets.jsonl: a line for each of the first rollouts of DR-PO's first update, with prompt, reference and prefix, and for each
method of the run how it goes on ("continuation"), whether that ends ("eos"), and what the reward model says of it ("score").
"""

import json
from pathlib import Path

import torch

import drpo
from tools import report, running, show


@torch.no_grad()
def continued(s, count):
    """-> the lines of resets.jsonl, `count` of them."""
    run = Path(s.run_dir)
    rows = drpo.load_rows(s.dataset if s.reset_to == "reference" else s.preference_dataset, "reference", s.seed)[0]
    tokenizer, (backbone, head) = drpo.load_tokenizer(f"{run}/sft", s), drpo.load_reward(f"{run}/rm", s)
    lines = [{"prompt": row["prompt"], "reference": row["reference"]} for row in drpo.draw(rows, s.batch_size, 0, s.seed, "rl")]
    for method in [name for name in report.METHODS if (run / name / "config.json").exists()]:
        batch = drpo.reset_rollouts(drpo.load_network(f"{run}/{method}", s), rows, 0, tokenizer, s)
        for chunk, part in drpo.micro_batches(batch, s):
            scores = drpo.end_scores(backbone, head, part).tolist()
            for i, ids, start, end, eos, score in zip(
                chunk.tolist(), *(part[name].tolist() for name in ("response", "reset_len", "response_len", "has_eos")), scores
            ):
                lines[i]["prefix"] = tokenizer.decode(ids[:start])
                text = tokenizer.decode(ids[start:end], skip_special_tokens=True)
                lines[i][method] = {"continuation": text, "eos": eos, "score": score if eos else s.missing_eos_score}
    return lines[:count]


def main(argv=None):
    parser = running.command("resets", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--rows", type=int, default=8, help="how many rollouts (default: %(default)s)")
    options, given = parser.parse_known_args(argv)
    s = drpo.parse(["eval", *show.recorded(options.run, given), *given])[1]
    if not 1 <= options.rows <= s.batch_size:
        drpo.stop(f"--rows {options.rows}: must lie in [1, {s.batch_size}], the rollouts of one update")
    with running.precision(s):
        lines = continued(s, options.rows)
    (options.run / "resets.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{options.run}/resets.jsonl: {len(lines)} rollouts")


if __name__ == "__main__":
    main()
