"""Rows and samples token by token, made by the functions of drpo.py: what is wrong there shows here.

    python -m tools.show data [--row N] [settings of drpo.py]    row N of the first update of sft, and pair N of rm
    python -m tools.show row [--row N] [settings of drpo.py]     rollout N of the first update of drpo, from a run that has sft/
                                                                 and rm/: mask, resets, ln pi, values, rewards, advantages
    python -m tools.show RUN_DIR --sample N                      row N of samples.jsonl: each method beside the reference

`row` takes the settings from RUN_DIR/report.json, if it is there; those of the command line come first. N counts from 0.
"""

import argparse
import dataclasses
import sys
from itertools import groupby
from pathlib import Path
from unittest.mock import patch

from transformers import logging

import drpo
from tools import report

KEPT = 3  # tokens shown of either end of a query


def print_row(title, ids, roles, columns, tokenizer):
    """One line per token, without the middle of a long query. roles: what each token is; columns: {name: number or text of
    each token}."""
    print(f"\n{title}\nposition     id  token               role     " + "".join(f"{name:>11}" for name in columns))
    for role, run in groupby(range(len(ids)), key=roles.__getitem__):
        run = list(run)
        hidden = run[KEPT:-KEPT] if role == "query" and len(run) > 2 * KEPT + 1 else []
        for i in run:
            if hidden and i == hidden[0]:
                print(f"       ... {len(hidden)} more of the query ...")
            if i not in hidden:
                cells = [f"{round(x[i], 3) + 0.0:.3f}" if isinstance(x[i], float) else str(x[i]) for x in columns.values()]
                cells = "".join(f"{cell:>11}" for cell in cells)
                print(f"{i:8}{ids[i]:7}  {tokenizer.decode([ids[i]])!r:18.18}  {role:9}{cells}")


def length(name, encode, text, tokenizer, most):
    """How long a query or response is, and what was cut."""
    n, whole = [len(encode(text, tokenizer, limit)) for limit in (most, 10**9)]
    return f"{name} {n} tokens" + f", CUT from {whole}" * (n < whole)


def show_data(s, number):
    """What sft and rm see in their first update: where the loss is, and where the reward model is read."""
    tokenizer = drpo.load(drpo.AutoTokenizer, s.tokenizer or s.model, s)
    rows = drpo.draw(drpo.load_rows(s.dataset, "reference", s.seed)[0], s.sft_batch_size, 0, s.seed, "sft")
    pairs = drpo.draw(drpo.load_rows(s.preference_dataset, "pairs", s.seed)[0], s.rm_batch_size, 0, s.seed, "rm")
    if number >= min(len(rows), len(pairs)):
        drpo.stop(f"--row {number}: the first update has {len(rows)} rows and {len(pairs)} pairs")
    for kind, row, field, T in (
        ("sft row", rows[number], "reference", s.response_length),
        ("rm pair, chosen", pairs[number], "chosen", s.preference_length),
        ("rm pair, rejected", pairs[number], "rejected", s.preference_length),
    ):
        batch = drpo.encode([row], [field], s, tokenizer, T)
        ids, Q = batch["ids"][0].tolist(), batch["query_len"].item()
        roles = ["query"] * Q + ["EOS" if token == tokenizer.eos_token_id else "response" for token in ids[Q:]]
        is_read = {"read": ["."] * (len(ids) - 1) + ["<-"]}
        marks = {"predicted": [0] + [1] * (len(ids) - 1)} if field == "reference" else is_read
        query = length("query", drpo.encode_query, row["prompt"], tokenizer, s.query_length)
        response = length("response", drpo.encode_response, row[field], tokenizer, T)
        print_row(f"{kind} {number}: {query}; {response}", ids, roles, marks, tokenizer)


def needs_models(run):
    """Exit status 2 unless the folder of a run holds an SFT and a reward model."""
    for stage in ("sft", "rm"):
        if not Path(run, stage, "config.json").exists():
            drpo.stop(f"{run}/{stage}: no model; make it with: python drpo.py {stage} --run_dir {run}")


def first_batch(s):
    """Update 0 of drpo up to its optimizer step -> tokenizer, {name: (B, ...)} as `drpo.step` gets it, {column: (B, T)}."""
    run, seen = Path(s.run_dir), {}
    needs_models(run)
    pairs, references = [drpo.load_rows(*x, s.seed)[0] for x in ((s.preference_dataset, "pairs"), (s.dataset, "reference"))]
    rows = [row | {"reference": row["chosen"]} for row in pairs] if s.reset_to == "chosen" else references
    tokenizer, sft = drpo.load(drpo.AutoTokenizer, f"{run}/sft", s), drpo.load_network(f"{run}/sft", s, trained=not s.lora_r)
    roles = drpo.build_roles(sft, drpo.load_reward(f"{run}/rm", s), s)
    with patch.multiple(drpo, step=lambda *given: seen.update(given[-1]) or 0.0, stop=lambda message, status: print(message)):
        drpo.drpo_update(roles, None, rows, 0, tokenizer, dataclasses.replace(s, epochs=1), "check")  # told, if one fails
    mask = drpo.token_mask(seen["reset_len"], seen["response_len"], s.response_length)
    rewards = drpo.penalised_rewards(seen["scores"], seen["logprobs"], seen["ref_logprobs"], mask, s.kl_coef)
    if s.advantages == "gae" and s.whiten_rewards:
        rewards = drpo.masked_whiten(rewards, mask, shift_mean=False)
    columns = {"mask": mask.int(), "logprob": seen["logprobs"], "value": seen["values"], "reward": rewards}
    return tokenizer, seen, columns | {"advantage": seen["advantages"]}


def show_row(s, number):
    """One training row of drpo. The state that decides a token stands one line above it: there logprob and value are read."""
    if number >= s.batch_size:
        drpo.stop(f"--row {number}: must be below --batch_size {s.batch_size}")
    tokenizer, batch, steps = first_batch(s)
    one = {name: x[number] for name, x in batch.items()}
    Q, R, reset = [one[name].item() for name in ("query_len", "response_len", "reset_len")]
    ids, ended = one["ids"][: Q + R].tolist(), one["has_eos"].item()
    roles = ["query"] * Q + ["reset"] * reset + ["sampled"] * (R - reset - ended) + ["EOS"] * ended
    columns = {"t": ["."] * Q + list(range(R))}
    for name, x in steps.items():  # nothing is computed for the prefix: the mask is 0 there
        columns[name] = ["."] * Q + [0 if name == "mask" else "."] * reset + x[number, reset:R].tolist()
    print(
        f"beta {s.beta:g}, reset to {s.reset_to}, temperature {s.temperature:g}, kl_coef {s.kl_coef:g}, {s.advantages}.\n"
        "logprob, value: of the state that decides the token, which stands one line above it.\n"
        "reward: -kl_coef (ln pi - ln pi_SFT), which is 0 before training, and the score at the last token."
    )
    title = f"rollout {number}: {reset} of {R} tokens from the reset; {'ends with EOS' if ended else 'NO EOS'}"
    print_row(f"{title}; score {one['scores']:.3f}", ids, roles, columns, tokenizer)


def show_sample(run, number):
    """Row `number` of samples.jsonl: prompt, reference, and every method's response with its figures."""
    samples = report.read(run / "samples.jsonl", lines=True)
    if number >= len(samples):
        drpo.stop(f"--sample {number}: {run}/samples.jsonl has {len(samples)} rows")
    row = samples[number]
    methods = {name: row[name] for name in report.methods_in([row])}
    print(f"{report.post_and_responses(row)}\n\n{report.table(report.method_rows(methods, report.IN_TERMINAL, []))}")


def recorded(run):
    """The settings of a run that has been evaluated, as arguments for `drpo.parse`."""
    known = report.read(run / "report.json")["settings"] if (run / "report.json").exists() else {}
    return [f"--{name}={value}" for name, value in known.items() if name not in ("seeds", "device")]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.show", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("what", metavar="data | row | RUN_DIR")
    parser.add_argument("--row", type=int, default=0, help="which row of the first update")
    parser.add_argument("--sample", type=int, default=0, help="which row of samples.jsonl")
    parser.error = drpo.stop
    args, given = parser.parse_known_args(argv)
    logging.disable_progress_bar()
    sys.stdout.reconfigure(errors="replace")  # where the terminal is not UTF-8
    if min(args.row, args.sample) < 0:
        drpo.stop("--row and --sample count from 0")
    if args.what not in ("data", "row"):
        if given:
            drpo.stop(f"{args.what} --sample N takes no other arguments: {' '.join(given)}")
        return show_sample(Path(args.what), args.sample)
    s = drpo.parse(["drpo", *given])[1]
    if args.what == "row":
        s = drpo.parse(["drpo", *recorded(Path(s.run_dir)), *given, f"--run_dir={s.run_dir}"])[1]
    with drpo.precision(s):
        (show_data if args.what == "data" else show_row)(s, args.row)


if __name__ == "__main__":
    main()
