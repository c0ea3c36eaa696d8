"""Rows and samples exactly as the model sees them: padding, masks, truncation, and where the reward lands.

    python -m tools.show [--preset P] [settings of drpo.py] [--rows N]    the first rows and pairs that sft and rm train on
    python -m tools.show --run DIR [settings of drpo.py] [--rows N]       the first rollouts of drpo, from a run that has sft/
                                                                          and rm/ (its own policy rolls out once drpo/ is there)
    python -m tools.show --run DIR --sample K                             row K of samples.jsonl: each method's response, and
                                                                          DR-PO's from a reset; with reward, value, advantage

The settings of a run are read from its folder. All is done by the functions of drpo.py: what is wrong there shows here.
"""

import copy
import dataclasses
import json
import os
import shutil
import sys
import textwrap
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

import drpo
from tools import checkpoint, report, running

# Prefix and sampled tokens in the colours of the README's drawing: blue is a person's, yellow the policy's
PAINT = {"prompt": "2", "reset prefix": "1;34", "sampled": "33", "EOS": "1;32", "pad": "2"}
KEPT = {"pad": (1, 1), "query": (3, 3), "after EOS": (1, 0)}  # what a long run of these shows of its two ends


def show(title, batch, row, reset_len, tokenizer, names, more):
    """One line for each column of a row of the batch. names: of a token of the response, and of one after it. more: {title:
    what else to show of each response position, or of each column; "." for an empty cell}."""
    inside, Q = drpo.response_mask(batch)[row].tolist(), batch["query"].shape[1]
    sampled = drpo.token_masks(reset_len, batch["response_len"], len(inside))[0][row].tolist()
    ids = [*batch["query"][row].tolist(), *batch["response"][row].tolist()]
    padding, row_len = Q - int(batch["query_mask"][row].sum()), int(batch["row_len"][row])
    place = [i - padding if padding <= i < padding + row_len else "." for i in range(len(ids))]
    roles = ["query" if real else "pad" for real in batch["query_mask"][row].tolist()] + [
        names[1] if not kept else "reset prefix" if not own else "EOS" if token == tokenizer.eos_token_id else names[0]
        for token, kept, own in zip(ids[Q:], inside, sampled)
    ]
    more = {name: ["."] * (len(ids) - len(x)) + x for name, x in more.items()}
    widths = [max(8, len(name) + 2) for name in more]
    print(f"\n{title}\ncolumn    t      id  token               role             place", end="")
    print(*(f"{name:>{width}}" for name, width in zip(more, widths)), sep="")
    for role, run in groupby(range(len(ids)), key=roles.__getitem__):
        run = list(run)
        first, last = KEPT.get(role, (len(run), 0))
        hidden = run[first : len(run) - last] if len(run) > first + last + 1 else []
        for i in run:
            if hidden and i == hidden[0]:
                print(f"           ... {len(hidden)} more {role} tokens ...")
            if i not in hidden:
                t, text = i - Q if i >= Q else ".", repr(tokenizer.decode(ids[i]))
                cells = [x[i] if not isinstance(x[i], float) else f"{round(x[i], 3) + 0:.3f}" for x in more.values()]
                print(
                    f"{i:6}{t:>5}{ids[i]:8}  {text:18.18}  {role:12}{place[i]:>10}",
                    *(f"{x:>{width}}" for x, width in zip(cells, widths)),
                    sep="",
                )


def lengths(row, field, s, tokenizer, length):
    """How long the texts of a row are, and what was cut."""
    query, whole = [len(drpo.encode_query(row["prompt"], tokenizer, n)) for n in (s.query_length, 10**9)]
    response, uncut = [len(drpo.encode_response(row[field], tokenizer, n)) for n in (length, 10**9)]
    return (
        f"query {query} tokens{f', CUT from {whole}' * (query < whole)}; "
        f"response {response} tokens{f', CUT from {uncut}: no EOS' if response < uncut else ' with EOS'}"
    )


def reward_columns(batch):
    """The columns in which drpo.end_scores reads, asked of it: with each token's place for its state. -> B numbers."""
    head = SimpleNamespace(weight=torch.ones(1, 1), bias=0.0)
    with patch.object(drpo, "row_states", lambda body, ids, lengths, places: places[:, None]):
        batch = {name: x.cpu() for name, x in batch.items()}
        places = drpo.end_scores(None, head, batch)
    starts, padding = batch["row_len"].cumsum(0) - batch["row_len"], (~batch["query_mask"]).sum(1)
    return (places - starts + padding).int().tolist()


def show_rows(s, count):
    """What sft and rm see in their first update, micro-batch by micro-batch."""
    tokenizer, as_is = drpo.load_tokenizer(s.tokenizer or s.model, s), ("response", "pad")
    rows = drpo.draw(drpo.load_rows(s.dataset, "reference", s.seed)[0], s.sft_batch_size, 0, s.seed, "sft")
    pairs = drpo.draw(drpo.load_rows(s.preference_dataset, "pairs", s.seed)[0], s.rm_batch_size, 0, s.seed, "rm")
    print(
        "place: of the token in its row as the network gets it, without the padding before the query\n"
        "loss: 1 where sft learns to predict the token from those before it; reward: where the reward model is read"
    )
    batch = drpo.encode(rows, ["reference"], s, tokenizer, s.response_length)
    places = {n: (i, part) for chunk, part in drpo.micro_batches(batch, s) for i, n in enumerate(chunk.tolist())}
    for n in range(count):
        i, part = places[n]
        valid = torch.cat([part["query_mask"], drpo.response_mask(part)], 1)[i].int()
        show(
            f"sft row {n}: {lengths(rows[n], 'reference', s, tokenizer, s.response_length)}",
            part,
            i,
            0 * part["response_len"],
            tokenizer,
            as_is,
            {"loss": [0, *(valid[1:] * valid[:-1]).tolist()]},
        )
    size = max(1, s.micro_batch // 2)
    for n in range(count):
        part = pairs[n // size * size :][:size]
        batch = drpo.encode(part, ["chosen", "rejected"], s, tokenizer, s.preference_length)
        width, columns = batch["query"].shape[1] + batch["response"].shape[1], reward_columns(batch)
        for field, i in (("chosen", n % size), ("rejected", n % size + len(part))):
            marks = ["<-" if column == columns[i] else "." for column in range(width)]
            show(
                f"pair {n}, {field}: {lengths(pairs[n], field, s, tokenizer, s.preference_length)}",
                batch,
                i,
                0 * batch["response_len"],
                tokenizer,
                as_is,
                {"reward": marks},
            )


def of_steps(batch, masks, roles, s):
    """Line 5 of Algorithm 1 as in `drpo.drpo_update`, before any whitening -> log pi, log pi_SFT and values, (B, T) each, on
    the prefix too, of which training has no need; scores (B,); rewards (B, T)."""
    everywhere = torch.ones_like(masks[0])
    logprobs, ref_logprobs = [
        drpo.response_logprobs(network, batch, s.temperature, everywhere)[0] for network in (roles.policy, roles.reference)
    ]
    values = drpo.response_values(roles.critic, roles.value_head, batch, everywhere)
    scores = torch.where(batch["has_eos"], drpo.end_scores(roles.reward, roles.reward_head, batch), s.missing_eos_score)
    rewards = drpo.penalised_rewards(scores, logprobs, ref_logprobs, masks[0], s.kl_coef)
    if s.masking == "official":  # the KL reward also outside of what was sampled
        rewards += drpo.penalised_rewards(0 * scores, logprobs, ref_logprobs, ~masks[0], s.kl_coef)
    return logprobs, ref_logprobs, values, scores, rewards


@torch.no_grad()
def show_rollouts(s, count):
    """The first rollouts of update 0, as in `drpo.drpo_update`: the same rows, resets and random numbers."""
    run, T, full = Path(s.run_dir), s.response_length, not s.lora_r
    rows = drpo.load_rows(s.dataset if s.reset_to == "reference" else s.preference_dataset, "reference", s.seed)[0]
    tokenizer, trained = drpo.load_tokenizer(f"{run}/sft", s), (run / "drpo" / "result.json").exists()
    sft, (backbone, head) = drpo.load_network(f"{run}/sft", s, full=full), drpo.load_reward(f"{run}/rm", s, full)
    policy = drpo.load_network(f"{run}/drpo", s, full=full) if trained else sft
    print(
        f"policy: {run}/{'drpo' if trained else 'sft, which RL starts from'}; beta {s.beta:g}, reset to {s.reset_to}, "
        f"temperature {s.temperature:g}, kl_coef {s.kl_coef:g}\n"
        "log pi, value: read one column to the left of the token; value: the critic as RL starts, which is the reward model\n"
        f"KL: log pi - log pi_SFT where sampled; reward: -kl_coef KL{', before whitening' * s.whiten_rewards}, and the score"
    )

    batch = {name: x[:count] for name, x in drpo.reset_rollouts(policy, rows, 0, tokenizer, s).items()}
    reset_len, has_eos = batch["reset_len"], batch["has_eos"]
    episodes = drpo.draw(rows, count, 0, s.seed, "rl")
    available = [len(drpo.encode_response(row["reference"], tokenizer, T)) - 1 for row in episodes]  # EOS, or the cut, aside
    masks = drpo.token_masks(reset_len, batch["response_len"], T, s.masking)
    roles = SimpleNamespace(policy=policy, reference=sft, critic=backbone, value_head=head, reward=backbone, reward_head=head)
    logprobs, ref_logprobs, values, scores, rewards = of_steps(batch, masks, roles, s)
    kl = drpo.log_ratio(logprobs, ref_logprobs, masks[0])
    for n, (start, end) in enumerate(zip(reset_len.tolist(), batch["response_len"].tolist())):
        names, shown = (["mask"], end) if s.masking == "sampled" else (["mask", "policy", "rest"], T)
        more = {name: mask[n].int().tolist() for name, mask in zip(names, masks)}
        for name, x in {"log pi": logprobs, "log pi_SFT": ref_logprobs, "KL": kl, "value": values, "reward": rewards}.items():
            more[name] = x[n, :shown].tolist() + ["."] * (T - shown)
        show(
            f"rollout {n}: reset_len {start} of {available[n]}, response_len {end}, {end - start} sampled; "
            f"{'ends with EOS' if has_eos[n] else 'NO EOS'}; score {scores[n]:.3f}, KL {kl[n].sum():.3f}",
            batch,
            n,
            reset_len,
            tokenizer,
            ("sampled", "after EOS"),
            more,
        )


def trained_critic(stage, s):
    """The critic and its head at the end of ppo or drpo; before that, and in any other stage, they are the reward model."""
    backbone, head = drpo.load_reward(f"{s.run_dir}/rm", s, full=not s.lora_r)
    if not (found := checkpoint.newest(Path(s.run_dir, stage, "checkpoint")) if stage in report.RL else None):
        return backbone, head
    critic, _ = drpo.twin(backbone, s.lora_r, s.seed)
    value_head = copy.deepcopy(head).requires_grad_(True)
    modules = torch.nn.ModuleDict({"critic": critic, "value_head": value_head})
    checkpoint.load_weights(found, {name: p for name, p in modules.named_parameters() if p.requires_grad})
    return critic, value_head


def paint(text, role):
    """In the colour of its role on a terminal; as it is in a file or a pipe, and where NO_COLOR is set."""
    return f"\033[{PAINT[role]}m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def show_tokens(columns, width):
    """Columns of (token, role, reward, value, advantage), all texts, side by side, as many to a line as fit into the width."""
    names, line = ("token", "role", "reward", "value", "advantage"), []
    for column in [*columns, None]:
        size = sum(max(map(len, cells)) + 2 for cells in line)
        if column is None or line and len(names[-1]) + size + max(map(len, column)) + 2 > width:
            for i, name in enumerate(names):
                cells = [paint(cells[i].rjust(max(map(len, cells)) + 2), cells[1]) for cells in line]
                print(f"{name:{len(names[-1])}}" + "".join(cells))
            print()
            line = []
        line.append(column)


@torch.no_grad()
def show_sample(s, number):
    """Row `number` of samples.jsonl: the response of every method, and one of DR-PO from a reset into the row's reference."""
    run, T, width = Path(s.run_dir), s.response_length, shutil.get_terminal_size().columns
    try:
        samples = report.read(run / "samples.jsonl", lines=True)
    except OSError as error:
        drpo.stop(f"{error.filename}: {error.strerror}; make it with: python drpo.py eval --run_dir {run}")
    if not 0 <= number < len(samples):
        drpo.stop(f"--sample {number}: must lie in [0, {len(samples) - 1}], the rows of {run}/samples.jsonl")
    row, methods = samples[number], report.methods_in(samples[number : number + 1])
    if "ids" not in row[methods[0]]:
        drpo.stop(f"{run}/samples.jsonl: has no token ids; make it again with: python drpo.py eval --run_dir {run}")
    tokenizer, sft = drpo.load_tokenizer(f"{run}/sft", s), drpo.load_network(f"{run}/sft", s)
    backbone, head = drpo.load_reward(f"{run}/rm", s)
    query, eos = drpo.encode_query(row["prompt"], tokenizer, s.query_length), tokenizer.eos_token_id
    for title, text in (("prompt", tokenizer.decode(query)), ("reference", row["reference"])):
        print(f"{title}:\n" + paint("\n".join(textwrap.fill(line, width) for line in text.splitlines()), "prompt") + "\n")
    print(
        f"reward: -{s.kl_coef:g} (ln pi - ln pi_SFT) at temperature {s.temperature:g}, and the score at the last token; before "
        f"any whitening\nvalue: the critic at the end of that training, for other methods the reward model; advantage: GAE\n"
    )

    for method in methods:
        policy = sft if method == "sft" else drpo.load_network(f"{run}/{method}" if method in report.METHODS else method, s)
        critic, value_head = trained_critic(method, s)
        roles = SimpleNamespace(
            policy=policy, reference=sft, critic=critic, value_head=value_head, reward=backbone, reward_head=head
        )
        said, shown = row[method], [("as evaluated", 0, row[method]["ids"])]
        if method == "drpo":  # the same prompt, with a reset for certain
            rng = drpo.generator(s.seed, "show", number)
            reference = [token for token in drpo.encode_response(row["reference"], tokenizer, T) if token != eos][: T - 1]
            length = drpo.sample_reset_lengths(torch.tensor([len(reference)]), 1.0, rng, s.reset_include_prompt).item()
            (ids,) = drpo.rollout(
                policy, [query], [reference[:length]], torch.rand(1, T, generator=rng), tokenizer, s, s.temperature
            )
            shown.append((f"reset to {length} of the reference's {len(reference)} tokens", length, ids))
        for how, length, ids in shown:
            batch = drpo.padded([query], [ids], eos, s.device, width=T) | {
                "reset_len": torch.tensor([length], device=s.device),
                "has_eos": torch.tensor([ids[-1] == eos], device=s.device),
            }
            masks = drpo.token_masks(batch["reset_len"], batch["response_len"], T, s.masking)
            _, _, values, scores, rewards = of_steps(batch, masks, roles, s)
            advantages, _ = drpo.gae(rewards, values, masks[2], s.gamma, s.lam)
            judged = "" if length else f", win rate {said['win_rate']}"
            print(
                f"{report.label(method)}, {how}: {len(ids)} tokens, score {scores.item():.3f}"
                f"{'' if ids[-1] == eos else ' (NO EOS)'}{judged}\n"
            )
            columns = []
            for t, token in enumerate(ids):
                role = "reset prefix" if t < length else "EOS" if token == eos else "sampled"
                numbers = [f"{round(x[0, t].item(), 3) + 0:.3f}" if t >= length else "." for x in (rewards, values, advantages)]
                columns.append((repr(tokenizer.decode(token)), role, *numbers))
            columns += [(f"{T - len(ids)} more", "pad", ".", ".", ".")] * (len(ids) < T)
            show_tokens(columns, width)


def recorded(run, given):
    """The settings that a run was made with, as arguments. A preset, the likeliest where none is given, tells the rest."""
    known = {}
    for stage, path in {"": "eval.json", "sft": "sft/result.json", "rm": "rm/result.json", "drpo": "drpo/result.json"}.items():
        try:
            known |= json.loads((run / path).read_text())["settings"]
        except FileNotFoundError:
            if stage in ("sft", "rm"):
                drpo.stop(f"--run {run}: has no {path}; make it with: python drpo.py {stage} --run_dir {run}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            drpo.stop(f"{run}/{path}: cannot be read: {type(error).__name__}: {error}")
    fields = {
        f.name: f.default
        for f in dataclasses.fields(drpo.Settings)
        if not f.metadata["help"].startswith("[run]") and f.name != "others"
    }
    alike = {
        name: sum(known.get(key) == value for key, value in (fields | preset).items()) for name, preset in drpo.PRESETS.items()
    }
    likeliest = [f"--preset={known.get('preset', max(alike, key=alike.get))}"]
    return [
        *likeliest * all(word.partition("=")[0] != "--preset" for word in given),
        f"--run_dir={run}",
        *(f"--{name}={known[name]}" for name in fields if name in known),
    ]


def main(argv=None):
    parser = running.command("show", __doc__)
    parser.add_argument("--run", "--run_dir", type=Path, help="the folder of a run; without it, rows of the data are shown")
    parser.add_argument("--rows", type=int, default=2, help="how many of each to show")
    parser.add_argument("--sample", type=int, help="which row of samples.jsonl, from 0; with --run")
    options, given = parser.parse_known_args(argv)
    s = drpo.parse(["all", *(recorded(options.run, given) if options.run else []), *given])[1]
    if options.sample is not None and not options.run:
        drpo.stop(f"--sample {options.sample}: of which run? Add --run DIR")
    most = s.batch_size if options.run else min(s.sft_batch_size, s.rm_batch_size)
    if not 1 <= options.rows <= most:
        drpo.stop(f"--rows {options.rows}: must lie in [1, {most}], the rows of one update")
    with running.precision(s):
        if options.sample is None:
            (show_rollouts if options.run else show_rows)(s, options.rows)
        else:
            show_sample(s, options.sample)


if __name__ == "__main__":
    main()
