"""The tables of README.md and docs/ that come from files in results/, written in place.

    python -m tools.tables          rewrites what stands between <!-- table NAME --> and <!-- end -->

NAME is one of TABLES below. A test fails where a table is older than its file.
"""

import functools
import json
import re
from pathlib import Path
from statistics import mean

import toy_env
from tools import toy_sweep
from tools.report import spread

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/results.md")
GPU = {"1b_r64": "1B, 64", "2.8b_r64": "2.8B, 64", "2.8b_r64_compile": "2.8B, 64, `--compile`"}
GPU |= {"2.8b_r1024": "2.8B, 1024 (the paper's)", "6.9b_r64": "6.9B, 64"}
PHASES = ("rollout", "score", "update")
AGAIN = {"one thread": "text", "two threads": "two_threads", "another processor, one thread": "other_processor"}


def read(path):
    return json.loads((ROOT / "results" / path).read_text())


def table(rows):
    """Rows of cells, the first one the head -> a Markdown table."""
    head, *rest = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *rest])


def seconds(method, batch):
    """Seconds of an update, scaled to 512 episodes."""
    return sum(method[f"seconds_{phase}"] for phase in PHASES) * 512 / batch


def gpu():
    """README: an update of PPO and DR-PO, per model."""
    rows = [["Pythia, LoRA rank", "batch", "s per 512 episodes: PPO / DR-PO", "hours per epoch", "GB at the peak"]]
    rows[0].append("MFU of the update")
    for name, title in GPU.items():
        figures = read(f"bench/gpu_{name}.json")
        both, batch = list(figures["methods"].values()), figures["settings"]["batch_size"]
        columns = [[f"{seconds(m, batch):.0f}" for m in both], [f"{m['hours']:.1f}" for m in both]]
        columns += [[f"{max(m['gb'] for m in both):.0f}"], [f"{m['mfu_update']:.0%}" for m in both]]
        rows.append([title, batch, *map(" / ".join, columns)])
    return table(rows)


def gpu_phases():
    """docs/results.md: the same by phase."""
    rows = [["Pythia, LoRA rank", "batch, micro-batch", "method", "s: rollout + score + update", "s × 512 / batch"]]
    rows[0] += ["GB", "hours per epoch", "MFU of update", "decoding, GB/s (of a copy)"]
    for name, title in GPU.items():
        figures = read(f"bench/gpu_{name}.json")
        batch, decoding = figures["settings"]["batch_size"], figures["decode_bytes"]
        for method, one in figures["methods"].items():
            cells = [" + ".join(f"{one[f'seconds_{phase}']:.2f}" for phase in PHASES), f"{seconds(one, batch):.1f}"]
            cells += [f"{one['gb']:.1f}", f"{one['hours']:.1f}", f"{one['mfu_update']:.0%}"]
            cells += [f"{decoding / 1e9:.0f} ({decoding / figures['copy_bytes']:.0%})"]
            file = f"[{title}](../results/bench/gpu_{name}.json)"
            rows.append([file, f"{batch}, {figures['settings']['micro_batch']}", method, *cells])
    return table(rows)


def peers():
    rows = [["shape", "CPU time, ours / official", "peak memory, ours / official", "row-steps, β = 1 / β = 0"]]
    for size, one in read("bench/peers.json").items():
        steps = one["row-steps, ours at beta 0 and 1"]
        ratios = [b / a for a, b in (one["CPU s"], one["peak GB"], steps)]
        rows.append([f"Pythia-{size}", *(f"{ratio:.2f}" for ratio in ratios)])
    return table(rows)


def critic():
    """What an update costs with a critic (GAE) and without one (RLOO)."""
    rows = [["advantages", "s: rollout + score + update, PPO", "DR-PO", "GB resident"]]
    for name in ("gae", "rloo"):
        both = list(read(f"bench/cpu_14m_{name}.json")["methods"].values())
        cells = [" + ".join(f"{one[f'seconds_{phase}']:.2f}" for phase in PHASES) for one in both]
        rows.append([f"[`{name}`](../results/bench/cpu_14m_{name}.json)", *cells, f"{max(one['gb'] for one in both):.2f}"])
    return table(rows)


def interval(of, digits=3):
    return "–" if not of.get("ci95") else f"[{of['ci95'][0]:.{digits}f}, {of['ci95'][1]:.{digits}f}]"


def text(part, names=None, other="PPO"):
    """A part of tools.text_sweep: mean and 95 % t-interval over seeds, exact intervals of shares."""
    rows = [["method", "found", "share full", "win rate", f"win rate − {other}", "gold score", "RM score", "KL", "tokens"]]
    for name, of in read(f"text/{part}.json").items():
        if names is None or name in names:
            low, high = of["found_ci95"]
            found = f"{of['found']}/{of['win_rate']['n']} [{low:.2f}, {high:.2f}]"
            gap = of.get(f"win_rate minus {other}")
            cells = [f"{of['full']['mean']:.3f}", f"{of['win_rate']['mean']:.3f} {interval(of['win_rate'])}"]
            cells.append(f"{gap['mean']:+.3f} {interval(gap)}" if gap and gap["ci95"] else "")
            numbers = {key: f"{of[key]['mean']:.2f}" for key in ("gold", "rm_score", "kl", "tokens")}
            numbers |= {"kl": ""} if name == "SFT on chosen" else {}  # that was to itself
            rows.append([name, found, *cells, *numbers.values()])
    return table(rows)


def coverage():
    """Where resets help: PPO and DR-PO at each level of SFT's coverage, paired by seed."""
    rows = [["an SFT reference stops with", "P(full summary), SFT", "PPO: found", "share full", "DR-PO: found", "share full"]]
    rows[0].append("win rate, DR-PO − PPO")
    of = read("text/coverage.json")
    for stop in sorted({name.rpartition(" ")[2] for name in of}):
        cells = [f"0.{stop}", f"{of[f'SFT {stop}']['coverage']['mean']:.1e}"]
        for one in (of[f"PPO {stop}"], of[f"DR-PO {stop}"]):
            cells += [f"{one['found']}/{one['full']['n']}", f"{one['full']['mean']:.2f}"]
        gap = of[f"DR-PO {stop}"][f"win_rate minus PPO {stop}"]
        rows.append([*cells, f"{gap['mean']:+.3f} {interval(gap)}"])
    return table(rows)


def replications():
    """PPO and DR-PO on the same seeds with other rounding: on two threads, and on another processor."""
    rows = [["", "PPO: found", "DR-PO: found", "win rate, DR-PO − PPO", "seeds that end the other way"]]
    for title, folder in AGAIN.items():
        of, cells, differ = read(f"{folder}/table.json"), [title], []
        for name in ("PPO", "DR-PO"):
            found, first = [found_by(one, name) for one in (of, read("text/table.json"))]
            cells.append(f"{len(found)}/{len(of[name]['seeds'])}")
            differ += [f"{name} {seed}" for seed in sorted(found ^ first)]
        gap = of["DR-PO"]["win_rate minus PPO"]
        rows.append([*cells, f"{gap['mean']:+.3f} {interval(gap)}", ", ".join(differ)])
    return table(rows)


def found_by(of, name):
    """The seeds on which a run found the full summary."""
    return {seed for seed, full in zip(of[name]["seeds"], of[name]["full"]["values"]) if full >= 0.5}


def values(of, name, key):
    """A figure of a run, over the seeds that all runs of the part have."""
    shared = set.intersection(*(set(one["seeds"]) for one in of.values()))
    return [x for x, seed in zip(of[name][key]["values"], of[name]["seeds"]) if seed in shared]


def cell(of, name):
    """-> the cell "found/seeds; mean win rate; mean KL" of a run."""
    full, win, kl = [values(of, name, key) for key in ("full", "win_rate", "kl")]
    return f"{sum(x >= 0.5 for x in full)}/{len(full)}; {mean(win):.2f}; {mean(kl):.1f}"


def models():
    """Reward models of other sizes and of another architecture."""
    of, rows = read("text/models.json"), [["reward model and critic", "RM accuracy", "PPO: found; win rate; KL", "DR-PO"]]
    rows[0].append("win rate, DR-PO − PPO")
    for kind, title in RM.items():
        names = [f"{name}, RM {kind}" for name in ("PPO", "DR-PO")]
        gap = spread([b - a for a, b in zip(*[values(of, name, "win_rate") for name in names])])
        cells = [f"{mean(values(of, names[0], 'rm_accuracy')):.3f}", *(cell(of, name) for name in names)]
        rows.append([title, *cells, f"{gap['mean']:+.3f} {interval(gap)}"])
    return table(rows)


def beta_lambda():
    """beta against the KL coefficient."""
    of = read("text/beta_lambda.json")
    betas, coefficients = [sorted({float(name.split()[i].strip(",")) for name in of}) for i in (1, 3)]
    rows = [["found; win rate; KL", *(f"KL coefficient {kl:g}" for kl in coefficients)]]
    rows += [[f"β = {b:g}", *(cell(of, f"beta {b:g}, KL {kl:g}") for kl in coefficients)] for b in betas]
    return table(rows)


def car():
    """The control task: solved with its exact interval, and the mean return over seeds."""
    rows = [["method", "solved", "mean return", "lowest", "highest"]]
    for name, of in read("car/table.json").items():
        low, high = of["solved_ci95"]
        numbers = [f"{of['return'][key]:.1f}" for key in ("mean", "min", "max")]
        rows.append([name, f"{of['solved']}/{len(of['seeds'])} [{low:.2f}, {high:.2f}]", *numbers])
    return table(rows)


def lock(part):
    """A part of tools.toy_sweep, as in its sweep.md."""
    return toy_sweep.table(toy_sweep.by_name(read("toy/sweep.json"), part), toy_sweep.PARTS[part][1]).rstrip()


def growth():
    """The lock at several H: seeds solved, and the episodes that they took."""
    lines = toy_sweep.by_name(read("toy/sweep.json"), "growth")
    heights = sorted({runs[0]["H"] for runs in lines.values()})
    rows = [["", *(f"H = {H}" for H in heights)]]
    for name in dict.fromkeys(line.rpartition(", H = ")[0] for line in lines):
        found = [toy_env.summary(lines[f"{name}, H = {H}"]) for H in heights]
        rows.append([name, *(f"{solved}: {episodes}" for solved, episodes, _ in found)])
    return table(rows)


def lock_beta_lambda():
    """The lock: seeds solved within the budget, by beta and KL coefficient."""
    lines = toy_sweep.by_name(read("toy/sweep.json"), "beta_lambda")
    cells = {(runs[0]["beta"], runs[0]["kl_coef"]): toy_env.summary(runs)[0] for runs in lines.values()}
    betas, coefficients = [sorted({key[i] for key in cells}) for i in (0, 1)]
    rows = [["solved", *(f"KL coefficient {kl:g}" for kl in coefficients)]]
    return table(rows + [[f"β = {beta:g}", *(cells[beta, kl] for kl in coefficients)] for beta in betas])


def deep_sea():
    rows = [["method", "solved", "episodes until solved", "last value"]]
    return table(rows + [[name, *of.values()] for name, of in read("deep_sea/table.json").items()])


RM = {"quarter": "GPT-NeoX, a quarter of the policy's size", "same": "GPT-NeoX, the policy's size"}
RM |= {"fourfold": "GPT-NeoX, four times", "llama": "Llama, the policy's size"}
MAIN = ("SFT", "SFT on chosen", "DPO", "PPO", "PPO, KL 0.3", "DR-PO")
BUDGET = ("PPO, 2 x updates", "DR-PO, 2 x updates", "PPO, 3 x updates")
OTHERS = ("RLOO", "roll-in by SFT", "DR-PO, RLOO", "DR-PO, beta 0.25", "DR-PO, beta 0.5")
OTHERS += ("DR-PO, beta 1", "DR-PO, beta 1, 0..n")
TABLES = {"critic": critic, "gpu": gpu, "gpu by phase": gpu_phases, "peers": peers}
TABLES |= {"car": car, "deep sea": deep_sea, "coverage": coverage, "models": models}
TABLES |= {"beta lambda": beta_lambda, "replications": replications}
TABLES |= {"growth": growth, "lock beta lambda": lock_beta_lambda}
TABLES |= {f"lock {part}": functools.partial(lock, part) for part in ("beta", "pairs", "locks")}
TABLES |= {
    "budget": lambda: text("table", BUDGET),
    "text": lambda: text("table", MAIN),
    "optimisers": lambda: text("table", OTHERS),
}


def rewrite(page):
    """The text of a page -> the same with its tables made anew. Raises KeyError for a table that nobody makes."""
    pattern = re.compile(r"(<!-- table ([\w ]+) -->\n).*?(<!-- end -->)", re.S)
    return pattern.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", page)


if __name__ == "__main__":
    for name in PAGES:
        path = ROOT / name
        path.write_text(rewrite(path.read_text(encoding="utf-8")), encoding="utf-8")
