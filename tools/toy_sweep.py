"""The detour lock over H, beta, lambda, labelled pairs and other locks: tables without verdicts.

    python toy_env.py --full [--seeds 100 101 ...] [--out DIR]       the sweep on ten seeds: hours on two cores
    python -m tools.toy_sweep --tune [--seeds 0 1] [--out DIR]       PPO's own grid, on seeds that are not reported

Each run is a line of DIR/sweep.jsonl (tuning.jsonl) when it is done, and the same command resumes with those that are missing.
Then come tables.
"""

import functools
import math
import os
from itertools import product
from statistics import mean, median

import torch
import torch.nn.functional as F

import drpo
import toy_env
from tools import experiment, report

PARTS = {  # title and further columns of each part's table
    "growth": ("Growth with H", ["mixture"]),
    "beta": ("Share of resets, H = 20", []),
    "beta_lambda": ("beta against the KL coefficient lambda, within 300k episodes, H = 20", []),
    "pairs": ("Reward error: DR-PO with few labelled pairs, H = 20", ["hacked_learned", "hacked_true", "best_learned"]),
    "locks": ("Locks on which PPO keeps more of its coverage, H = 20", []),
    "tune": ("PPO's own grid, H = 20", []),
}
JOBS = min(8, os.cpu_count())
GROWTH = ("PPO", "PPO, tuned", "PPO, count bonus", "DR-PO", "DR-PO with RLOO", "DR-PO with NPG (Algorithm 3)")


# ---- 1. The runs: dicts of part, name (a line of the part's table), seed, and settings of `toy_env.learn` --------------------
def runs_of(part, name, seeds, **settings):
    return [{"part": part, "name": name, "seed": seed, "H": 20, **settings} for seed in seeds]


def plan(seeds):
    """The runs of the sweep."""
    runs, few = [], seeds[:3]
    for row, H in product((*GROWTH, "DPO", "fitted Q on the learned reward"), (40, 30, 20, 10)):  # the longest first
        settings = {**toy_env.ROWS[row], "H": H, "budget": 1_200_000, "run_on": "NPG" in row}
        runs += runs_of("growth", f"{row}, H = {H}", seeds, **settings)
    for beta in (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0):
        runs += runs_of("beta", f"beta = {beta}", seeds, beta=beta, budget=3_000_000)
    for beta, kl_coef in product((0.1, 0.25, 0.5, 1.0), (0.0, 0.001, 0.01, 0.03, 0.1, 0.3)):
        name = f"beta = {beta}, lambda = {kl_coef}"
        runs += runs_of("beta_lambda", name, few, beta=beta, kl_coef=kl_coef, budget=300_000)
    for pairs in (1000, 2000, 5000, 10_000, 50_000):
        runs += runs_of("pairs", f"{pairs} pairs", seeds, beta=0.5, pairs=pairs, budget=400_000, run_on=True)
    for name, beta in (("PPO", 0.0), ("DR-PO", 0.5)):
        for c in (0.0, 0.5, 1.0, 4.0):
            runs += runs_of("locks", f"{name}, corridor costs c = {c}", few, beta=beta, c=c, budget=1_000_000)
        for keep in (0.95, 0.9):  # 1 - 1/H, 1 - 2/H
            plain, line = {"A": 10, "keep": keep}, f"{name}, plain lock, data right {keep:.0%}"
            runs += runs_of("locks", line, seeds, beta=beta, plain=plain, budget=1_000_000)
    return runs


def grid(seeds):
    """The runs of --tune: PPO at H = 20."""
    runs, weights = [], [(False, e) for e in (0.0, 1.0, 3.0, 10.0)] + [(True, e) for e in (2.0, 8.0)]
    for batch, kl_coef, (whiten, entropy) in product((512, 1024, 4096), (0.0, 0.001, 0.01), weights):
        settings = {"batch": batch, "kl_coef": kl_coef, "entropy": entropy, "whiten": whiten}
        runs += runs_of("tune", str(settings), seeds, beta=0.0, budget=1_000_000, **settings)
    return runs


@functools.lru_cache(maxsize=1)
def plain_problem(seed, H, A, keep):
    """As `toy_env.problem`, for the chain alone: a wrong action ends the episode. The data is right with probability `keep`."""
    transition, reward, behaviour = lock = toy_env.detour_lock(H, A, seed=seed)
    good = transition[:, toy_env.CHAIN, :, toy_env.CHAIN] + reward[:, toy_env.CHAIN] > 0  # (H, A)
    transition[0, toy_env.CHAIN, ~good[0]] = torch.eye(3)[toy_env.END]  # in place of the corridor
    behaviour[:, toy_env.CHAIN] = torch.where(good, keep, (1 - keep) / (A - 1))
    data = toy_env.collect(lock, behaviour, 100_000, drpo.generator(seed, "data"))
    pairs = toy_env.label(lock, data, drpo.generator(seed, "labels"))
    return lock, data, pairs, toy_env.clone(data, A), toy_env.fit_reward(data, pairs, A)


def reward_error(seed, H, pairs):
    """-> learned and true return of the best policy for the learned reward, and learned return of the truly best policy."""
    lock, _, _, _, reward = toy_env.problem(seed, H, pairs=pairs)
    hacked, best = [F.one_hot(toy_env.q_values(lock, r)[0].argmax(-1), 10).float() for r in (reward, lock.reward)]
    values = [toy_env.q_values(lock, r, policy)[1] for r, policy in ((reward, hacked), (lock.reward, hacked), (reward, best))]
    return dict(zip(("hacked_learned", "hacked_true", "best_learned"), values))


def execute(run):
    """A run of the plan -> its result as JSON, without the curve."""
    settings = {key: value for key, value in run.items() if key not in ("part", "name", "plain")}
    if "plain" in run:
        settings["tables"] = plain_problem(run["seed"], run["H"], **run["plain"])
    result = toy_env.learn(**settings)
    result.pop("curve", None)
    return result | (reward_error(run["seed"], run["H"], run["pairs"]) if run["part"] == "pairs" else {})


# ---- 2. Tables ---------------------------------------------------------------------------------------------------------------
def by_name(results, part):
    """{name: its runs}, of one part."""
    names = dict.fromkeys(run["name"] for run in results if run["part"] == part)
    return {name: [run for run in results if (run["part"], run["name"]) == (part, name)] for name in names}


def cells(lines, extra=()):
    """{name: its runs} -> rows for `report.table`: solved seeds, median and range of the episodes, and means over the seeds."""
    rows = [["", "solved", "median", "episodes", "value", *extra]]
    for name, mine in lines.items():
        solved, episodes, _ = toy_env.summary(mine)
        typical = median(math.inf if run["solved"] is None else run["solved"] for run in mine)
        means = [f"{mean(run[key] for run in mine):.2f}" if key in mine[0] else "-" for key in ("value", *extra)]
        rows.append([name, solved, "-" if math.isinf(typical) else f"{typical / 1000:.0f}k", episodes, *means])
    return rows


def score(mine):
    return sum(run["solved"] is not None for run in mine), mean(run["value"] for run in mine)


def show(results):
    """Prints a table for each part; of PPO's grid the best come first."""
    for part, (title, extra) in PARTS.items():
        if lines := by_name(results, part):
            best = sorted(lines, key=lambda name: score(lines[name]), reverse=True) if part == "tune" else lines
            print(f"\n{title}\n\n{report.table(cells({name: lines[name] for name in best}, extra))}")


def sweep(seeds, out, tune=False, jobs=JOBS):
    """The whole sweep on these seeds, or PPO's grid. Everything goes to the folder `out`."""
    path, runs = (out / "tuning.jsonl", grid(seeds)) if tune else (out / "sweep.jsonl", plan(seeds))
    show(experiment.carry_out(execute, [[run] for run in runs], path, jobs))


def main(argv=None):
    parser = experiment.options("toy_sweep", __doc__, "runs/toy", range(100, 110), JOBS)
    parser.add_argument("--tune", action="store_true", help="PPO's own grid instead of the sweep, by default on seeds 0 1")
    parser.set_defaults(seeds=None)
    args = parser.parse_args(argv)
    sweep(args.seeds or ([0, 1] if args.tune else range(100, 110)), args.out, args.tune, args.jobs)


if __name__ == "__main__":
    main()
