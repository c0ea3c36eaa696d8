"""Over-optimisation: what PPO and DR-PO were worth on the way, from the checkpoints that a run has kept.

    python drpo.py all --run_dir DIR --save_every 5 --keep 1000            a run that keeps them, every fifth update
    python -m tools.history DIR [--gold module:function] [settings]        this, once the run is finished

Each checkpoint is measured on validation prompts: held-out rows after those that `eval` uses, none with the prompt of one of
them. The update that is best there, and the last one, are then measured on the test prompts, those of `eval`: so no choice is
made on the prompts that are reported. Best is meant by the judge's win rate or, with --gold, by the mean of
function(prompt, response), such as toy_env:gold_score; never by the RM score, which is what was optimised.

history.jsonl holds a line per measurement; report.md gets a section, and the figure overoptimisation.png.
"""

import json
import statistics
from pathlib import Path

from tqdm import tqdm

import drpo
from tools import checkpoint, data, evaluation, report, running, show


def policy_at(path, s):
    """The policy as it was when the checkpoint `path` was written."""
    policy, _ = drpo.twin(drpo.load_network(f"{s.run_dir}/sft", s, full=not s.lora_r), s.lora_r, s.seed)
    trained = {f"policy.{name}": p for name, p in policy.named_parameters() if p.requires_grad}
    checkpoint.load_weights(path, trained)
    return policy


def split(s):
    """-> (validation rows, test rows), of the held-out rows: the latter are those of `eval`; the two share no prompt."""
    held_out = evaluation.held_out_rows(s)
    test = held_out[: s.eval_samples]
    taken = {row["prompt"] for row in test}
    validation = [row for row in held_out[s.eval_samples :] if row["prompt"] not in taken][: s.eval_samples]
    if not validation:
        drpo.stop(
            f"--eval_samples {s.eval_samples}: takes all {len(held_out)} held-out rows, and leaves none for validation; "
            f"make it smaller, and run eval again with it"
        )
    return validation, test


def figures(network, rows, s, by, gold):
    """-> the mean of each figure over the rows, and under which name the one stands that is wanted."""
    columns = evaluation.measure(network, rows, s, by)
    means = {key: statistics.fmean(value for value in columns[key] if value is not None) for key in report.MEANS}
    if gold:
        means["gold_score"] = statistics.fmean(gold(row["prompt"], text) for row, text in zip(rows, columns["response"]))
    return {"judged_by": "gold_score" if gold else "win_rate", **means}


def measure(s, gold):
    """Measures all kept checkpoints of ppo and drpo, and the SFT model as their update 0 -> the lines of history.jsonl."""
    validation, test = split(s)
    by, lines = evaluation.yardsticks(s), []
    kept = {stage: sorted(Path(s.run_dir, stage, "checkpoint").glob("[0-9]" * 6)) for stage in report.RL}
    kept = {stage: paths for stage, paths in kept.items() if len(paths) > 1}
    if not kept:
        drpo.stop(f"{s.run_dir}: has kept no more than one checkpoint; train it with, say, --save_every 5 --keep 1000")
    for stage, paths in kept.items():
        found = {}
        for update, path in tqdm([(0, None), *((int(path.name), path) for path in paths)], desc=stage, unit="checkpoint"):
            found[update] = figures(policy_at(path, s) if path else by.sft, validation, s, by, gold)
        best = max(found, key=lambda update: found[update][found[update]["judged_by"]])
        lines += [{"method": stage, "prompts": "validation", "update": update, **each} for update, each in found.items()]
        for update in sorted({best, max(found)}):
            network = policy_at(Path(s.run_dir, stage, "checkpoint", f"{update:06d}"), s) if update else by.sft
            lines.append({"method": stage, "prompts": "test", "update": update, **figures(network, test, s, by, gold)})
    return lines


def main(argv=None):
    parser = running.command("history", __doc__)
    parser.add_argument("run", type=Path, metavar="DIR", help="the folder of a finished run")
    parser.add_argument("--gold", default="", help="module:function (prompt, response) -> a score that was not optimised")
    options, given = parser.parse_known_args(argv)
    s = drpo.parse(["eval", *show.recorded(options.run, given), *given])[1]
    gold = data.resolve(options.gold) if options.gold else None
    if options.gold and not gold:
        drpo.stop(f"--gold {options.gold}: must be module:function")
    with running.precision(s):
        lines = measure(s, gold)
    (options.run / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(report.write(options.run))
    print("\n" + report.table(report.history_rows(report.read_history([options.run]))))


if __name__ == "__main__":
    main()
