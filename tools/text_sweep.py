"""The toy corpus over seeds: every method beside the baselines that a sceptic asks for.

    python -m tools.text_sweep PART [--seeds 120 121 ...] [--runs NAME ...] [--jobs 2] [--threads 1] [--out runs/text]

PART   table         SFT, SFT on the chosen responses, DPO, PPO, RLOO, roll-in by SFT, DR-PO at several beta
       coverage      PPO and DR-PO where the SFT policy writes the full summary often, rarely, or never
       models        PPO and DR-PO with reward models of other sizes and of another architecture
       beta_lambda   beta against the KL coefficient
       unpenalised   DR-PO without a KL penalty for more and more updates: over-optimisation of the reward model
       tuning        learning rates and KL coefficients, on seeds that are not reported

Each run is a line of OUT/PART.jsonl when it is done, and the same command resumes with those that are missing. Then come a
table and, once `coverage` or `unpenalised` is complete, OUT/PART.png. `full` is the share of responses that are full summaries,
on 500 held-out posts at temperature 0.7. A run has found it if that is at least one half. Models stay in --scratch.
"""

import contextlib
import functools
import itertools
import json
import math
import shutil
import time
from pathlib import Path
from statistics import mean

import torch
import transformers
from matplotlib.figure import Figure

import drpo
import toy_text
from tools import experiment, report
from tools.report import COLOURS

STOPS = (33, 56, 68, 72)  # the chance, in percent, that an SFT annotator stops after a clause; 65 elsewhere
gate_33, gate_56, gate_68, gate_72 = [functools.partial(toy_text.gate, stop=stop / 100) for stop in STOPS]
quarter, fourfold = [functools.partial(toy_text.tiny_pythia, width=width) for width in (56, 280)]


def llama(seed=0):
    """A Llama of about the size of `toy_text.tiny_pythia`, random weights."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 336}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=600, max_position_embeddings=256, **sizes, **ids)
        )


# Name of a run: stage, its flags, and, where they are not those of the preset, the flags of its SFT and of its reward model
TABLE = {
    "SFT": ("sft", ""),
    "SFT on chosen": ("sft", "", "--dataset=toy_text:gate_pairs"),
    "DPO": ("dpo", ""),
    "DPO, 3 x updates": ("dpo", "--updates=180"),
    "DPO, 3 x updates, beta 0.3": ("dpo", "--updates=180 --dpo_beta=0.3"),
    "PPO": ("ppo", ""),
    "PPO, KL 0.3": ("ppo", "--kl_coef=0.3"),
    "PPO, lr 5e-5": ("ppo", "--lr=5e-5"),
    "PPO, 3 x updates": ("ppo", "--updates=180"),
    "PPO, 2 x updates": ("ppo", "--updates=120"),
    "DR-PO, 2 x updates": ("drpo", "--updates=120"),
    "DR-PO, 3 x updates": ("drpo", "--updates=180"),
    "RLOO": ("ppo", "--advantages=rloo"),
    "roll-in by SFT": ("drpo", "--reset_to=sft"),
    "DR-PO": ("drpo", ""),
    "DR-PO, RLOO": ("drpo", "--advantages=rloo"),
    "DR-PO, beta 0.25": ("drpo", "--beta=0.25"),
    "DR-PO, beta 0.5": ("drpo", "--beta=0.5"),
    "DR-PO, beta 1": ("drpo", "--beta=1"),
    "DR-PO, beta 1, 0..n": ("drpo", "--beta=1 --reset_include_prompt=True"),
}
COVERAGE = {
    f"{name} {stop}": (stage, "", f"--dataset=tools.text_sweep:gate_{stop}" * (stop != 65))
    for stop in (*STOPS, 65)
    for name, stage in (("SFT", "sft"), ("PPO", "ppo"), ("DR-PO", "drpo"))
}
MODELS = {
    f"{name}, RM {kind}": (stage, "", "", f"--model=tools.text_sweep:{kind}" * (kind != "same"))
    for kind in ("quarter", "same", "fourfold", "llama")
    for name, stage in (("PPO", "ppo"), ("DR-PO", "drpo"))
}
BETA_LAMBDA = {
    f"beta {beta}, KL {kl}": ("drpo", f"--beta={beta} --kl_coef={kl}")
    for beta, kl in itertools.product((0, 0.25, 0.5, 1), (0.03, 0.1, 0.3))
}
TUNING = {
    f"{name} {value:g}": (stage, f"--{flag}={value:g}")
    for name, stage, flag, values in (
        ("DPO lr", "dpo", "dpo_lr", (3e-5, 1e-4, 3e-4, 1e-3)),
        ("PPO lr", "ppo", "lr", (5e-5, 1e-4, 2e-4, 4e-4)),
        ("PPO KL", "ppo", "kl_coef", (0.03, 0.3)),
        ("DR-PO KL", "drpo", "kl_coef", (0.03, 0.3)),
    )
    for value in values
}
TUNING |= {"PPO, 3 x updates, lr 5e-05": ("ppo", "--updates=180 --lr=5e-5")}
TUNING |= {f"DPO, 3 x updates, lr {lr:g}": ("dpo", f"--updates=180 --dpo_lr={lr:g}") for lr in (1e-4, 3e-4, 1e-3)}
TUNING |= {f"DPO, 3 x updates, beta {beta:g}": ("dpo", f"--updates=180 --dpo_beta={beta:g}") for beta in (0.1, 0.3, 1)}
UNPENALISED = {"SFT": ("sft", "")}
UNPENALISED |= {f"{n} updates": ("drpo", f"--kl_coef=0 --updates={n}") for n in (15, 30, 60, 120, 240)}
PARTS = {"table": TABLE, "coverage": COVERAGE, "models": MODELS, "beta_lambda": BETA_LAMBDA}
PARTS |= {"unpenalised": UNPENALISED, "tuning": TUNING}
SAME = {  # runs of other parts that are runs of `table` under another name; they are read from its file
    **{f"{name} 65": name for name in ("SFT", "PPO", "DR-PO")},
    **{f"{name}, RM same": name for name in ("PPO", "DR-PO")},
    "SFT": "SFT",
    "beta 0, KL 0.1": "PPO",
    "beta 0, KL 0.3": "PPO, KL 0.3",
    **{f"beta {beta}, KL 0.1": f"DR-PO, beta {beta}" for beta in (0.25, 0.5, 1)},
}


# ----------------------------------------------------------------------------------------------------------------------
# One run


def train(stage, folder, seed, flags, **parts):
    """python drpo.py STAGE in `folder`, with finished stages linked into it: parts are name=folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in parts.items():
        with contextlib.suppress(FileExistsError):
            (folder / name).symlink_to(path.resolve())
    argv = [stage, f"--seed={seed}", f"--run_dir={folder}", "--eval_every=0", *flags.split()]
    if not (folder / stage / "result.json").exists() and not experiment.quietly(argv):
        raise RuntimeError(f"{folder}: stopped; the same command resumes")
    return folder / stage


def measure(stage, folder, seed):
    """-> figures of the policy in folder/stage on held-out posts, by the gold score, beside its KL to SFT and its RM score,
    which is the reward model's own, also of a response that does not end."""
    s = drpo.parse(["eval", f"--seed={seed}", f"--run_dir={folder}"])[1]
    rows = drpo.draw(drpo.load_rows(s.dataset, "reference", seed)[1], s.eval_samples, 0, seed, "eval")
    tokenizer, network = drpo.load(drpo.AutoTokenizer, str(folder / stage), s), drpo.load_network(str(folder / stage), s)
    responses = drpo.sample(network, rows, s, tokenizer, s.eval_temperature)
    texts = [text.strip() for text in tokenizer.batch_decode(responses, skip_special_tokens=True)]
    prompts, references = [[row[key] for row in rows] for key in ("prompt", "reference")]
    warm, reward = drpo.sample(network, rows, s, tokenizer, s.temperature), drpo.load_reward(folder / "rm", s)
    log_pi, log_sft = [
        drpo.per_row(lambda x: drpo.sequence_logprobs(one, x, s.temperature), rows, warm, s, tokenizer)
        for one in (network, drpo.load_network(str(folder / "sft"), s))
    ]
    scores = drpo.per_row(functools.partial(drpo.end_scores, *reward), rows, responses, s, tokenizer)
    full = [" ".join(toy_text.careful(None, toy_text.read_clauses(prompt))) for prompt in prompts]
    full = [drpo.encode_response(text, tokenizer, s.response_length) for text in full]
    log_full = drpo.per_row(lambda x: drpo.sequence_logprobs(network, x, s.temperature), rows, full, s, tokenizer)
    return {
        "full": mean(map(toy_text.is_full, prompts, texts)),
        "coverage": log_full.exp().mean().item(),  # P(the full summary in this order), at the temperature of rollouts
        "win_rate": mean(toy_text.gold_judge(prompts, texts, references)),
        "gold": mean(map(toy_text.gold_score, prompts, texts)),
        "rm_score": scores.mean().item(),
        "kl": (log_pi - log_sft).mean().item(),
        "tokens": mean(map(len, responses)),
    }


def run(part, scratch, task):
    """-> figures of a task, {run, seed}. SFT and reward model of a seed are trained once. The levels of `coverage` share the
    reward model."""
    transformers.logging.set_verbosity_error()
    name, seed, began = task["run"], task["seed"], time.perf_counter()
    stage, flags, sft_flags, rm_flags = (*PARTS[part][name], "", "")[:4]
    home = scratch / str(seed)
    base = train("sft", home / "base", seed, "")
    if rm_flags:  # a reward model of another kind starts from its own SFT
        kind = home / rm_flags.rpartition(":")[2]
        start = train("sft", kind, seed, rm_flags)
        reward = train("rm", kind / "rm", seed, f"--rm_model={start}", sft=base)
    else:
        reward = train("rm", home / "base", seed, "")
    own = train("sft", home / sft_flags.rpartition(":")[2], seed, sft_flags) if sft_flags else base
    folder = home / name
    train(stage, folder, seed, flags, sft=own, rm=reward)  # "sft" is linked, and so finished
    figures = measure(stage, folder, seed) | {"rm_accuracy": json.loads((reward / "result.json").read_text())["accuracy"]}
    shutil.rmtree(folder)
    return {"seconds": time.perf_counter() - began} | figures


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def read(out, part):
    """-> {(run, seed): row} of OUT/PART.jsonl, and of OUT/table.jsonl where that has runs of PART under another name."""
    rows = {(row["run"], row["seed"]): row for row in experiment.read(out / f"{part}.jsonl")}
    names = [(name, same) for name, same in SAME.items() if name in PARTS[part]]
    table = experiment.read(out / "table.jsonl")
    return rows | {(name, row["seed"]): row for row in table for name, same in names if row["run"] == same}


def paired(rows, a, b, key):
    """Figures {(run, seed): row} -> the statistics of key in run a minus key in run b, over the seeds that have both."""
    seeds = sorted(seed for run, seed in rows if run == a and (b, seed) in rows)
    return report.spread([rows[a, seed][key] - rows[b, seed][key] for seed in seeds])


def summarise(part, rows):
    """{(run, seed): row} -> {run: {figure: its statistics over seeds, found, found_ci95, seeds, win_rate minus OTHER}}."""
    results = {}
    for name in [name for name in PARTS[part] if any(run == name for run, _ in rows)]:
        mine = [row for (run, _), row in sorted(rows.items()) if run == name]
        of = results[name] = {key: report.spread([row[key] for row in mine]) for key in mine[0] if key not in ("run", "seed")}
        hits = sum(row["full"] >= 0.5 for row in mine)
        of |= {"seeds": [row["seed"] for row in mine], "found": hits, "found_ci95": report.clopper_pearson(hits, len(mine))}
        for other in ("PPO", name.replace("DR-PO", "PPO")):
            if other != name and (gap := paired(rows, name, other, "win_rate")):
                of[f"win_rate minus {other}"] = gap
    return results


def gap(of):
    """What `paired` gives -> a cell, empty where there is no interval."""
    return f"{of['mean']:+.3f} {report.bracket(of['ci95'], 3)}" if of and of["ci95"] else ""


def cells(results):
    """What `summarise` gives -> rows for `report.table`."""
    rows = [["method", "found", "share full", "win rate", "win rate − PPO", "gold score", "RM score", "KL", "tokens"]]
    for name, of in results.items():
        found = f"{of['found']}/{len(of['seeds'])} {report.bracket(of['found_ci95'], 2)}"
        win = f"{of['win_rate']['mean']:.3f} {report.bracket(of['win_rate']['ci95'], 3)}"
        numbers = {key: f"{of[key]['mean']:.2f}" for key in ("gold", "rm_score", "kl", "tokens")}
        numbers |= {"kl": ""} if name == "SFT on chosen" else {}  # that was to itself
        rows.append([name, found, f"{of['full']['mean']:.3f}", win, gap(of.get("win_rate minus PPO")), *numbers.values()])
    return rows


def draw_coverage(rows, path):
    """Share of full summaries after training against P(full summary) of the SFT policy: a dot per seed, a line of means."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    ax = figure.subplots()
    stops = sorted({run.rpartition(" ")[2] for run, _ in rows})
    for name, key, marker, shift in (("PPO", "ppo", "o", 0.85), ("DR-PO", "drpo", "s", 1.18)):
        line = []
        for stop in stops:
            seeds = [seed for run, seed in rows if run == f"{name} {stop}" and (f"SFT {stop}", seed) in rows]
            x = [shift * rows[f"SFT {stop}", seed]["coverage"] for seed in seeds]
            y = [rows[f"{name} {stop}", seed]["full"] for seed in seeds]
            ax.scatter(x, y, color=COLOURS[key], marker=marker, alpha=0.6, label=name if stop == stops[0] else None)
            line.append((math.exp(mean(map(math.log, x))), mean(y)))
        ax.plot(*zip(*line), color=COLOURS[key], lw=1)
    ax.set(xscale="log", ylim=(-0.03, 1.03), xlabel="P(full summary) of the SFT policy")
    ax.set_ylabel("share of full summaries\nafter training")
    ax.legend(loc="center left")
    figure.savefig(path, dpi=150)


def draw_unpenalised(rows, path):
    """RM score above and gold score below against KL to SFT: a line per seed, larger dots for more updates."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes, seeds = figure.subplots(2, 1, sharex=True), {seed for _, seed in rows}
    seeds = [seed for seed in sorted(seeds) if all((name, seed) in rows for name in UNPENALISED)]
    for ax, key, title in zip(axes, ("rm_score", "gold"), ("RM score\n(what is optimised)", "gold score\n(what is wanted)")):
        for seed in seeds:
            line = [rows[name, seed] for name in UNPENALISED]
            ax.plot([row["kl"] for row in line], [row[key] for row in line], color=COLOURS["drpo"], alpha=0.4, lw=1)
        for size, name in enumerate(UNPENALISED):
            dots = [(rows[name, seed]["kl"], rows[name, seed][key]) for seed in seeds]
            ax.scatter(*zip(*dots), s=8 + 4 * size**2, color=COLOURS["drpo"], alpha=0.7, lw=0, label=name)
        ax.set_xscale("function", functions=(lambda x: x.clip(0) ** 0.5, lambda x: x**2))  # as Gao et al. 2023
        ax.set(ylabel=title, xlim=(0, None), xticks=(0, 1, 5, 10, 20, 50, 100))
        ax.grid(alpha=0.3)
    axes[1].set_xlabel("KL to the SFT policy, nats per response; square-root scale")
    axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)


FIGURES = {"coverage": draw_coverage, "unpenalised": draw_unpenalised}


def main(argv=None):
    parser = experiment.options("text_sweep", __doc__, "runs/text", range(120, 132), jobs=2)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--runs", nargs="+", help="only these; default: all of the part")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--scratch", type=Path, default=Path("runs/text/models"))
    args = parser.parse_args(argv)
    names = args.runs or PARTS[args.part]
    for name in set(names) - set(PARTS[args.part]):
        drpo.stop(f"--runs {name}: {args.part} has {'; '.join(PARTS[args.part])}")
    done = read(args.out, args.part)  # with those of `table`
    groups = [[{"run": name, "seed": seed} for name in names if (name, seed) not in done] for seed in args.seeds]
    execute = functools.partial(run, args.part, args.scratch)
    experiment.carry_out(execute, groups, args.out / f"{args.part}.jsonl", args.jobs, args.threads)
    rows = read(args.out, args.part)
    print(report.table(cells(summarise(args.part, rows))))
    if args.part in FIGURES and all((name, seed) in rows for name in PARTS[args.part] for seed in args.seeds):
        FIGURES[args.part](rows, args.out / f"{args.part}.png")


if __name__ == "__main__":
    main()
