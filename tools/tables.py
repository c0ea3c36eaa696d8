"""The tables of README.md and docs/ that come from files in results/, written in place.

    python -m tools.tables          rewrites what stands between <!-- table NAME --> and <!-- end -->

NAME is one of TABLES below. A test fails where a table is older than its file.
"""

import json
import re
from functools import partial
from pathlib import Path

import toy_env
from tools import car, deep_sea, experiment, text_sweep, toy_sweep
from tools.bench import PHASES
from tools.report import bracket, table
from tools.text_sweep import gap

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/results.md")
GPU = {"1b_r64": "1B, 64", "2.8b_r64": "2.8B, 64", "2.8b_r64_compile": "2.8B, 64, `--compile`"}
GPU |= {"2.8b_r1024": "2.8B, 1024 (the paper's)", "6.9b_r64": "6.9B, 64"}
AGAIN = {"EPYC with AVX-512, one thread": "text", "the same, two threads": "two_threads"}
AGAIN |= {"EPYC with AVX2, one thread": "other_processor", "Xeon with AMX, one thread": "xeon"}
RESULTS = ROOT / "results"


def read(path):
    return json.loads((RESULTS / path).read_text())


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
    return rows


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
    return rows


def peers():
    rows = [["shape", "CPU time, ours / official", "peak memory, ours / official", "tokens decoded, β = 1 / β = 0"]]
    for size, one in read("bench/peers.json").items():
        steps = one["row-steps, ours at beta 0 and 1"]
        ratios = [b / a for a, b in (one["CPU s"], one["peak GB"], steps)]
        rows.append([f"Pythia-{size}", *(f"{ratio:.2f}" for ratio in ratios)])
    return rows


def critic():
    """What an update costs with a critic (GAE) and without one (RLOO)."""
    rows = [["advantages", "s: rollout + score + update, PPO", "DR-PO", "GB resident"]]
    for name in ("gae", "rloo"):
        both = list(read(f"bench/cpu_14m_{name}.json")["methods"].values())
        cells = [" + ".join(f"{one[f'seconds_{phase}']:.2f}" for phase in PHASES) for one in both]
        rows.append([f"[`{name}`](../results/bench/cpu_14m_{name}.json)", *cells, f"{max(one['gb'] for one in both):.2f}"])
    return rows


def of_text(part, folder="text", shared=False):
    """{run: its statistics} of a part of tools.text_sweep; shared: over the seeds that all its runs have."""
    rows = text_sweep.read(RESULTS / folder, part)
    if shared:
        names = {name for name, _ in rows}
        rows = {key: row for key, row in rows.items() if all((name, key[1]) in rows for name in names)}
    return text_sweep.summarise(part, rows)


def text(names, folder="text"):
    """Runs of the part `table`: mean and 95 % t-interval over seeds, exact intervals of shares."""
    return text_sweep.cells({name: of for name, of in of_text("table", folder).items() if name in names})


def longer(folder):
    """Runs of 60 and of 180 updates: DR-PO against each run with as many, paired by seed."""
    rows = [["updates", "method", "found", "share full", "win rate", "gold score", "KL", "win rate, DR-PO − it"]]
    lines, of = text_sweep.read(RESULTS / folder, "table"), of_text("table", folder)
    for updates, suffix, names in ((60, "", SHORT), (180, ", 3 x updates", LONG)):
        for title in names:
            method, comma, change = title.partition(",")
            if one := of.get(run := f"{method}{suffix}{comma}{change}"):
                versus = gap(text_sweep.paired(lines, f"DR-PO{suffix}", run, "win_rate")) if title != "DR-PO" else ""
                means = [f"{one[key]['mean']:.{n}f}" for key, n in (("full", 3), ("win_rate", 3), ("gold", 2), ("kl", 1))]
                found = f"{one['found']}/{len(one['seeds'])} {bracket(one['found_ci95'], 2)}"
                rows.append([str(updates), title, found, *means, versus])
    return rows


def coverage():
    """Where resets help: PPO and DR-PO at each level of SFT's coverage, paired by seed."""
    rows = [["an SFT reference stops with", "P(full summary), SFT", "PPO: found", "share full", "DR-PO: found", "share full"]]
    rows[0].append("win rate, DR-PO − PPO")
    of = of_text("coverage", "other_processor")
    for stop in sorted({name.rpartition(" ")[2] for name in of}):
        cells = [f"0.{stop}", f"{of[f'SFT {stop}']['coverage']['mean']:.1e}"]
        for one in (of[f"PPO {stop}"], of[f"DR-PO {stop}"]):
            cells += [f"{one['found']}/{one['full']['n']}", f"{one['full']['mean']:.2f}"]
        rows.append([*cells, gap(of[f"DR-PO {stop}"][f"win_rate minus PPO {stop}"])])
    return rows


def replications():
    """The same seeds with other rounding: on two threads, and on other processors."""
    others = ("PPO", "DPO", "SFT on chosen")
    rows, first = [["", "PPO: found", "DR-PO: found", *(f"win rate, DR-PO − {other}" for other in others)]], {}
    rows[0].append("seeds that end the other way")
    for title, folder in AGAIN.items():
        cells, differ, lines = [title], [], text_sweep.read(RESULTS / folder, "table")
        for name in ("PPO", "DR-PO"):
            full = {seed: row["full"] >= 0.5 for (run, seed), row in sorted(lines.items()) if run == name}
            cells.append(f"{sum(full.values())}/{len(full)}")
            first.setdefault(name, full)
            differ += [f"{name} {seed}" for seed in full if full[seed] != first[name][seed]]
        gaps = [gap(text_sweep.paired(lines, "DR-PO", other, "win_rate")) for other in others]
        rows.append([*cells, *gaps, ", ".join(differ)])
    return rows


def cell(of):
    """The statistics of a run -> "found/seeds; mean win rate; mean KL"."""
    return f"{of['found']}/{len(of['seeds'])}; {of['win_rate']['mean']:.2f}; {of['kl']['mean']:.1f}"


def models():
    """Reward models of other sizes and of another architecture."""
    of, rows = of_text("models", shared=True), [["reward model and critic", "RM accuracy", "PPO: found; win rate; KL", "DR-PO"]]
    rows[0].append("win rate, DR-PO − PPO")
    for kind, title in RM.items():
        ppo, ours = [of[f"{name}, RM {kind}"] for name in ("PPO", "DR-PO")]
        cells = [f"{ppo['rm_accuracy']['mean']:.3f}", cell(ppo), cell(ours), gap(ours[f"win_rate minus PPO, RM {kind}"])]
        rows.append([title, *cells])
    return rows


def grid(corner, cells):
    """{(beta, KL coefficient): cell} -> a line for each beta, a column for each coefficient."""
    betas, coefficients = [sorted({key[i] for key in cells}) for i in (0, 1)]
    rows = [[corner, *(f"KL coefficient {kl:g}" for kl in coefficients)]]
    return rows + [[f"β = {beta:g}", *(cells[beta, kl] for kl in coefficients)] for beta in betas]


def beta_lambda():
    """beta against the KL coefficient."""
    of = {tuple(map(float, re.findall(r"[\d.]+", name))): one for name, one in of_text("beta_lambda", shared=True).items()}
    return grid("found; win rate; KL", {key: cell(one) for key, one in of.items()})


def demo():
    """What python toy_env.py prints: H = 20."""
    rows = [[name, *toy_env.summary(runs)] for name, runs in read("toy/results.json")["runs"].items()]
    return [["method", "solved", "episodes", "last value"], *rows]


def of_lock(part):
    """{name: its runs} of a part of tools.toy_sweep."""
    return toy_sweep.by_name(experiment.read(RESULTS / "toy" / "sweep.jsonl"), part)


def lock(part):
    """A part of tools.toy_sweep."""
    return toy_sweep.cells(of_lock(part), toy_sweep.PARTS[part][1])


def growth():
    """The lock at several H: seeds solved, and the episodes that they took."""
    lines = of_lock("growth")
    heights = sorted({runs[0]["H"] for runs in lines.values()})
    rows = [["", *(f"H = {H}" for H in heights)]]
    for name in dict.fromkeys(line.rpartition(", H = ")[0] for line in lines):
        found = [toy_env.summary(lines[f"{name}, H = {H}"]) for H in heights]
        rows.append([name, *(f"{solved}: {episodes}" for solved, episodes, _ in found)])
    return rows


def lock_beta_lambda():
    """The lock: seeds solved within the budget, by beta and KL coefficient."""
    lines = of_lock("beta_lambda").values()
    return grid("solved", {(runs[0]["beta"], runs[0]["kl_coef"]): toy_env.summary(runs)[0] for runs in lines})


def runs(module, folder):
    """What tools.car or tools.deep_sea prints."""
    return module.cells(experiment.read(RESULTS / folder / "runs.jsonl"))


RM = {"quarter": "GPT-NeoX, a quarter of the policy's size", "same": "GPT-NeoX, the policy's size"}
RM |= {"fourfold": "GPT-NeoX, four times", "llama": "Llama, the policy's size"}
MAIN = ("SFT", "SFT on chosen", "DPO", "PPO", "PPO, KL 0.3", "PPO, lr 5e-5", "DR-PO")
SHORT = ("DPO", "PPO", "PPO, lr 5e-5", "DR-PO")
LONG = ("DPO", "DPO, beta 0.3", "PPO", "DR-PO")
BUDGET = ("PPO, 2 x updates", "DR-PO, 2 x updates")
OTHERS = ("RLOO", "roll-in by SFT", "DR-PO, RLOO", "DR-PO, beta 0.25", "DR-PO, beta 0.5")
OTHERS += ("DR-PO, beta 1", "DR-PO, beta 1, 0..n")
TABLES = {"critic": critic, "gpu": gpu, "gpu by phase": gpu_phases, "peers": peers}
TABLES |= {"coverage": coverage, "models": models, "beta lambda": beta_lambda, "replications": replications}
TABLES |= {"text": partial(text, MAIN), "budget": partial(text, BUDGET), "optimisers": partial(text, OTHERS)}
TABLES |= {"longer": partial(longer, "text"), "longer elsewhere": partial(longer, "xeon")}
TABLES |= {"demo": demo, "growth": growth, "lock beta lambda": lock_beta_lambda}
TABLES |= {f"lock {part}": partial(lock, part) for part in ("beta", "pairs", "locks")}
TABLES |= {"car": partial(runs, car, "car"), "deep sea": partial(runs, deep_sea, "deep_sea")}


def rewrite(page):
    """The text of a page -> the same with its tables made anew. Raises KeyError for a table that nobody makes."""
    pattern = re.compile(r"(<!-- table ([\w ]+) -->\n).*?(<!-- end -->)", re.S)
    return pattern.sub(lambda match: f"{match[1]}{table(TABLES[match[2]](), markdown=True)}\n{match[3]}", page)


if __name__ == "__main__":
    for name in PAGES:
        path = ROOT / name
        path.write_text(rewrite(path.read_text(encoding="utf-8")), encoding="utf-8")
