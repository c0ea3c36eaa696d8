"""Tables and figures of a run, from the files in its folder: report.md, curves.png, diagnostics.png, frontier.png.

    python -m tools.report RUN_DIR [RUN_DIR ...]

A folder with seed_K/report.json in it is a run over several seeds. It gets a report.json and report.md of its own, with means,
spreads and intervals over the seeds. Any other folder is a single run with the report.json and samples.jsonl of `drpo.py eval`.
Several folders, such as a beta ablation, also give one table with the DR-PO of each. Imports nothing of ours.
"""

import argparse
import json
import math
import statistics
import sys
import textwrap
from itertools import combinations
from pathlib import Path

import numpy as np

METHODS = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO", "drpo": "DR-PO"}
RL = ("ppo", "drpo")
# One colour per method in all figures, from the colour-blind safe palette of Okabe and Ito
COLOURS = {"sft": "#7f7f7f", "rm": "#cc79a7", "dpo": "#009e73", "ppo": "#d55e00", "drpo": "#0072b2"}
# fmt: off
METRICS = {  # key: title, decimals
    "win_rate": ("win rate vs reference", 3), "lc_win_rate": ("at equal length", 3), "rm_score": ("RM score", 2),
    "kl": ("KL to SFT", 2), "rouge_1": ("ROUGE-1", 3), "rouge_2": ("ROUGE-2", 3), "rouge_l": ("ROUGE-L", 3),
    "response_tokens": ("tokens", 1), "eos_rate": ("EOS rate", 2),
}
IN_TERMINAL = ("win_rate", "rm_score", "kl", "rouge_l", "response_tokens", "eos_rate")

# The paper's results with Pythia-2.8B, win rates by GPT-4: Table 1, ± over 3 seeds, and Table 3
PAPER_KEYS = ("win_rate", "rm_score", "kl", "rouge_1", "rouge_2", "rouge_l")
PAPER = {
    "tldr": {
        "sft": ("0.316 ± 0.002", "-0.51 ± 0.04", "-", "0.322 ± 0.010", "0.123 ± 0.007", "0.249 ± 0.012"),
        "dpo": ("0.526 ± 0.004", "-", "37.33 ± 2.01", "0.300 ± 0.032", "0.079 ± 0.010", "0.221 ± 0.008"),
        "ppo": ("0.623 ± 0.025", "1.17 ± 0.13", "16.32 ± 1.46", "0.337 ± 0.023", "0.120 ± 0.009", "0.250 ± 0.010"),
        "drpo": ("0.702 ± 0.017", "1.52 ± 0.09", "16.84 ± 0.83", "0.337 ± 0.018", "0.119 ± 0.001", "0.251 ± 0.008"),
    },
    "cnndm": {
        "sft": ("0.105", "-", "-", "0.256", "0.123", "0.200"), "dpo": ("0.060", "-", "-", "0.207", "0.095", "0.157"),
        "ppo": ("0.085", "-", "-", "0.236", "0.123", "0.186"), "drpo": ("0.120", "-", "-", "0.295", "0.154", "0.229"),
    },
}
THEIRS = (
    "Theirs: Pythia-2.8B-deduped, judged by GPT-4 against human references; they do not say how KL is estimated. On "
    "CNN/DailyMail only their SFT model was trained on that data."
)
# Student's t, 0.975 quantile, for 1..30 degrees of freedom. Above 30 the last one is used: at most 4 % too wide.
T975 = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
]
# fmt: on


def fail(message):
    """One line on stderr, exit status 2."""
    sys.stderr.write(f"report.py: {' '.join(str(message).split())}\n")
    raise SystemExit(2)


def read(path, lines=False):
    """A JSON file -> its content; a .jsonl file -> the list of its objects. Exit status 2 if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    except ValueError as error:
        fail(f"{path}: not JSON ({error}); repair or delete it")
    except OSError as error:
        fail(f"{path}: {error.strerror}; made by: python drpo.py eval. A run over seeds has it in each of its seed_K folders")


def label(method):
    return METHODS.get(method, method)


def methods_in(rows):
    """The methods that occur in {method: figures} tables or in rows of samples.jsonl, in the order of METHODS."""
    return [name for name in METHODS if any(name in row for row in rows)]


# ---- 1. Statistics: pure functions on lists of numbers -----------------------------------------------------------------------
def spread(values):
    """Values, one per seed, None where a seed lacks it -> their statistics, with the 95 % t-interval of the mean; one value has
    neither std nor interval. None without any value."""
    given = [value for value in values if value is not None]
    if not (n := len(given)):
        return None
    mean, std = statistics.mean(given), statistics.stdev(given) if n > 1 else None
    half = T975[min(n - 1, len(T975)) - 1] * std / math.sqrt(n) if n > 1 else None
    ci95 = [mean - half, mean + half] if n > 1 else None
    return {"mean": mean, "std": std, "min": min(given), "max": max(given), "n": n, "values": values, "ci95": ci95}


def clopper_pearson(hits, n, alpha=0.05):
    """The exact 1 - alpha interval [low, high] of a share of which `hits` among n were seen."""

    def quantile(k, level):  # the p at which P(X <= k) = level, by bisection: the probability falls in p
        low, high = 0.0, 1.0
        for _ in range(60):
            p = (low + high) / 2
            above = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)) > level
            low, high = (p, high) if above else (low, p)
        return low

    return [quantile(hits - 1, 1 - alpha / 2) if hits else 0.0, quantile(hits, alpha / 2) if hits < n else 1.0]


def paired_bootstrap(a, b, resamples=10_000, seed=0):
    """Verdicts on two methods, aligned by prompt -> {mean, ci95, prompts} of the difference a - b, or None without any.
    Resamples prompts that have both verdicts: what makes a prompt easy for both methods cancels."""
    gaps = np.array([x - y for x, y in zip(a, b, strict=True) if None not in (x, y)])
    if not len(gaps):
        return None
    rng = np.random.default_rng(seed)
    means = [gaps[rng.integers(len(gaps), size=len(gaps))].mean() for _ in range(resamples)]
    return {"mean": gaps.mean().item(), "ci95": np.quantile(means, [0.025, 0.975]).tolist(), "prompts": len(gaps)}


def length_controlled(verdicts, gaps, z=1.96):
    """Verdicts (1, 0, 0.5, None: no verdict) and length minus the reference's -> (win rate at equal length, 95 % interval).

    Length-controlled AlpacaEval (Dubois et al. 2024) without its prompt term: P(win_i) = sigma(a + b tanh(x_i)) with
    x_i = gap_i / std(gap), not centred; at equal length the win rate is sigma(a). Maximum likelihood, standard error of a
    from the Fisher information. (None, None) where one threshold on length separates wins from losses: no finite fit."""
    decided = [(verdict, gap) for verdict, gap in zip(verdicts, gaps, strict=True) if verdict is not None]
    won, lost = [gap for verdict, gap in decided if verdict > 0], [gap for verdict, gap in decided if verdict < 1]
    if not (won and lost and min(won) < max(lost) and min(lost) < max(won)):
        return None, None
    y, gap = np.array(decided, float).T
    x, weights = np.stack([np.ones_like(gap), np.tanh(gap / gap.std())], 1), np.zeros(2)  # (n, 2), (2,)
    ascent = 4 * np.linalg.inv(x.T @ x) @ x.T  # Boehning's bound on the curvature: no step goes too far
    for _ in range(10_000):
        p = (1 + np.tanh(x @ weights / 2)) / 2  # sigma that cannot overflow
        step = ascent @ (y - p)
        weights = weights + step
        if np.abs(step).max() < 1e-9:
            break
    error = z * math.sqrt(np.linalg.inv(x.T @ (x * (p * (1 - p))[:, None]))[0, 0])
    low, rate, high = [(1 + math.tanh((weights[0] + side) / 2)) / 2 for side in (-error, 0, error)]
    return rate, [low, high]


# ---- 2. Tables ---------------------------------------------------------------------------------------------------------------
def figures_of(report, samples):
    """report.json and samples.jsonl of one run -> {method: figures}: those of report.json, and what only the samples tell."""
    methods = {name: dict(report["methods"][name]) for name in methods_in([report["methods"]])}
    for name, figures in methods.items():
        gaps = [len(row[name]["response"]) - len(row["reference"]) for row in samples]  # in characters, which a judge sees
        rate, interval = length_controlled([row[name]["win_rate"] for row in samples], gaps)
        figures |= {"lc_win_rate": rate, "lc_win_rate_ci95": interval}
        for key in ("rm_score", "kl", "kl_rm_score"):
            values = [row[name][key] for row in samples]
            mean, error = statistics.fmean(values), statistics.pstdev(values) / math.sqrt(len(values))
            figures |= {key: mean, f"{key}_error": error, f"{key}_ci95": [mean - 1.96 * error, mean + 1.96 * error]}
    return methods


def table(rows, markdown=False):
    """Rows of cells, the header first -> aligned columns for a terminal, or a Markdown table."""
    rows = [[str(cell) for cell in row] for row in rows]
    if markdown:
        rows = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("   ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) for first, *rest in rows)


def bracket(interval, digits):
    return f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else "-"


def number(value, digits, ranged=False):
    """A number, None, or what `spread` gives -> a cell: 1.23, -, 1.23 ± 0.04, with `ranged` 1.23 ± 0.04 (1.20-1.27)."""
    if not isinstance(value, dict):
        return "-" if value is None else f"{value:.{digits}f}"
    mean, std, low, high = [number(value[key], digits) for key in ("mean", "std", "min", "max")]
    return mean if value["n"] == 1 else f"{mean} ± {std}" + f" ({low}-{high})" * ranged


def method_rows(methods, keys, bracketed):
    """{method: figures} -> rows for `table`: these keys of METRICS, those in `bracketed` with range and 95 % interval."""
    rows = [["method", *(METRICS[key][0] for key in keys)]]
    for name, figures in methods.items():
        cells = {key: number(figures.get(key), METRICS[key][1], key in bracketed) for key in keys}
        for key in bracketed:
            interval = figures[key]["ci95"] if isinstance(figures[key], dict) else figures.get(f"{key}_ci95")
            cells[key] += " " + bracket(interval, METRICS[key][1])
        rows.append([label(name), *cells.values()])
    return rows


def difference_rows(differences):
    """{"ppo - sft": {mean, ci95, ...} or None} -> rows for `table`."""
    rows = [["win rate, paired", "difference", "95 % interval"]]
    for pair, gap in differences.items():
        cells = [f"{gap['mean']:+.3f}", bracket(gap["ci95"], 3)] if gap else ["-", "-"]
        rows.append([" minus ".join(map(label, pair.split(" - "))), *cells])
    return rows


def post_and_responses(row):
    """A row of samples.jsonl: the post with the reference and the response of each method, an indented (verbatim) block."""
    lines = [*row["prompt"].splitlines(), "", *f"reference: {row['reference']}".splitlines()]
    for name in methods_in([row]):
        win, score = number(row[name]["win_rate"], 2), number(row[name]["rm_score"], 2)
        lines += ["", *f"{label(name)} (win {win}, RM score {score}): {row[name]['response']}".splitlines()]
    return textwrap.indent("\n".join(textwrap.fill(line, 110) for line in lines), "    ")


# ---- 3. Figures. `folders`: one per seed; `tables`: what `figures_of` gives of each ------------------------------------------
CURVES = [  # key, title, unit
    ("win_rate", "Win rate against the references", "share"),
    ("rm_score", "Reward-model score", "score (0: references on average)"),
    ("kl", "KL to the SFT policy", "nats per response"),
    ("response_tokens", "Response length", "tokens"),
]
TOKENS = "tokens sampled so far, thousands"
DIAGNOSTICS = [  # key in metrics.jsonl, stages, title, axis
    ("eos_rate", RL, "ends with EOS: should rise to 1", {"ylabel": "share", "ylim": (0, 1.03)}),
    ("entropy", RL, "policy entropy: should not drop to 0", {"ylabel": "nats per token"}),
    ("explained_variance", RL, "critic, explained variance: towards 1", {"ylabel": "share (cut at -1)", "ylim": (-1, 1.03)}),
    ("vf_loss", RL, "value loss: should fall", {}),
    ("approx_kl", RL, "approx_kl: below 0.05", {"ylabel": "nats per token"}),
    ("clipfrac", RL, "clipped tokens: below 0.3", {"ylabel": "share"}),
    ("grad_norm", RL, "gradient norm: should not grow", {}),
    ("reset_share", RL, "rollouts from a reset: beta", {"ylabel": "share", "ylim": (-0.03, 1.03)}),
    ("score", RL, "score of rollouts, with prefixes", {"ylabel": "score"}),
    ("score", RL, "the same, against tokens", {"ylabel": "score", "xlabel": TOKENS}),
    ("kl", RL, "KL of rollouts; none on prefixes", {"ylabel": "nats per response"}),
    ("response_tokens", RL, "length of rollouts, with prefixes", {"ylabel": "tokens"}),
    ("loss", ("sft",), "SFT loss: should fall and level off", {"ylabel": "nats per token"}),
    ("accuracy", ("rm",), "reward model, pairs ranked right", {"ylabel": "share (chance: 0.5)", "ylim": (0.3, 1.03)}),
    ("accuracy", ("dpo",), "DPO, pairs ranked right", {"ylabel": "share (chance: 0.5)", "ylim": (0.3, 1.03)}),
]


def new_figure(rows, columns, size):
    from matplotlib.figure import Figure  # not pyplot: needs no display, and leaves a notebook's figures alone

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_log(ax, folders, stage, key, against_tokens=False):
    """A stage's metric against its updates, a running mean over a twentieth of them: mean and min-max band over the folders.
    -> the number of updates that all folders have; with 0 nothing is drawn."""
    logs = [read(path, lines=True) for folder in folders if (path := folder / stage / "metrics.jsonl").exists()]
    logs = [log for log in logs if log and key in log[0]]
    if n := min(map(len, logs), default=0):
        x, window = range(1, n + 1), n // 20 + 1
        if against_tokens:
            x = np.mean([np.cumsum([line["tokens_decoded"] for line in log[:n]]) for log in logs], 0) / 1000
        y = np.array([[line[key] for line in log[:n]] for log in logs], float)  # (folders, n)
        y = np.stack([y[:, max(0, i - window) : i].mean(1) for i in range(1, n + 1)], 1)
        ax.plot(x, y.mean(0), color=COLOURS[stage], linewidth=2, label=METHODS.get(stage, "reward model"))
        ax.fill_between(x, y.min(0), y.max(0), color=COLOURS[stage], alpha=0.2, linewidth=0)
    return n


def draw_curves(folders, tables):
    """Held-out prompts, from the bare prompt, while PPO and DR-PO train: the mean, and a thin line for each folder; SFT and
    DPO as they ended. Without a verdict the win rate gives way to the share of responses that end."""
    figure, axes = new_figure(2, 2, (10, 7.5))
    judged = any(figures["win_rate"] is not None for each in tables for figures in each.values())
    first = CURVES[0] if judged else ("eos_rate", "Responses that end with EOS", "share")
    for ax, (key, title, unit) in zip(axes, [first, *CURVES[1:]]):
        for stage in RL:
            paths = [folder / stage / "metrics.jsonl" for folder in folders]
            logs = [{x["update"]: x.get(f"held_out_{key}") for x in read(path, lines=True)} for path in paths if path.exists()]
            updates = [update for update in (logs or [{}])[0] if all(log.get(update) is not None for log in logs)]
            values = np.array([[log[update] for update in updates] for log in logs]).reshape(len(logs), len(updates))
            if updates:
                ax.plot(updates, values.mean(0), "o-", markersize=4, color=COLOURS[stage], label=label(stage))
                ax.plot(updates, values.T, color=COLOURS[stage], alpha=0.4, linewidth=0.8)
        for name, style in (("sft", "--"), ("dpo", "-.")):
            if of := spread([each[name][key] for each in tables if name in each]):
                ax.axhline(of["mean"], color=COLOURS[name], linestyle=style, label=label(name))
        ax.set(title=title, xlabel="update", ylabel=unit, **{"ylim": (-0.03, 1.03)} if unit == "share" else {})
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    over = f"; means over {len(folders)} seeds, thin lines: each seed" if len(folders) > 1 else ""
    figure.suptitle(f"Held-out prompts, responses from the bare prompt{over}", fontsize=11)
    return figure


def draw_diagnostics(folders):
    """What the stages logged. A metric that a run has not logged leaves its panel empty."""
    figure, axes = new_figure(3, 5, (18, 9))
    for ax, (key, stages, title, axis) in zip(axes, DIAGNOSTICS):
        drawn = sum(draw_log(ax, folders, stage, key, axis.get("xlabel") == TOKENS) for stage in stages)
        ax.set(**{"title": title if drawn else f"{key} ({', '.join(stages)}): not logged", "xlabel": "update", **axis})
    handles = {name: line for ax in axes for line, name in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5)
    return figure


def draw_frontier(tables, prompts):
    """After the paper's figures 1 and 2: mean RM score against mean KL of the same responses, sampled at the training
    temperature. One point per method and seed, with standard errors over prompts."""
    figure, (ax,) = new_figure(1, 1, (8, 5.5))
    points = {name: [each[name] for each in tables if name in each] for name in methods_in(tables)}
    # DPO moves far from SFT: the axis ends a little beyond the other methods, and words stand for what lies further right
    limit = 1.3 * max([0.5, *(one["kl"] + one["kl_error"] for name in points if name != "dpo" for one in points[name])])
    for name, found in points.items():
        near, far = [[one for one in found if (one["kl"] > limit) == beyond] for beyond in (False, True)]
        if near:
            columns = [[one[key] for one in near] for key in ("kl", "kl_rm_score", "kl_rm_score_error", "kl_error")]
            ax.errorbar(*columns, fmt="o", capsize=2, color=COLOURS[name], label=label(name))
        if far:
            kls, y = ", ".join(f"{one['kl']:.1f}" for one in far), statistics.fmean(one["kl_rm_score"] for one in far)
            ax.annotate(f"{label(name)}: KL {kls} → ", (limit, y), ha="right", va="center", color=COLOURS[name])
    ax.axhline(0, color="black", linestyle=":", linewidth=1, label="references, on average")
    ax.set(
        xlabel="KL to the SFT policy, nats per response: mean of ln π - ln π_SFT over one sample per prompt.\n"
        "A KL is never negative; its estimate can be, by about its standard error.",
        ylabel="RM score of the same samples",
        title=f"A dot per {'seed' if len(tables) > 1 else 'method'}; bars: standard errors over {prompts} prompts",
    )
    ax.set_xlim(right=limit)
    ax.legend()
    return figure


# ---- 4. Reports --------------------------------------------------------------------------------------------------------------
def measured(report):
    """How the figures were measured, in lines for below the table."""
    warning = " (the run's own reward model: NOT independent, it is what was optimised)" * ("rm" in report["judge"].split(", "))
    return [
        f"judge: {report['judge']}{warning}",
        f"{report['prompts']} held-out prompts, sampling temperature {report['settings']['eval_temperature']:g}; "
        f"KL in nats per response, at the training temperature {report['settings']['temperature']:g}",
    ]


def publish(run, folders, tables, methods, report, parts):
    """Saves the figures and report.md: the parts, the paper's table where there is one, figures, settings."""
    if (preset := report["settings"].get("preset")) in PAPER:
        rows = [["method", "", *(METRICS[key][0] for key in PAPER_KEYS)]]
        for name, of in methods.items():
            ours = [number(of.get(key), METRICS[key][1]) for key in PAPER_KEYS]
            rows += [[label(name), "here", *ours], [label(name), "paper", *PAPER[preset][name]]]
        parts += ["## Beside the paper", THEIRS, table(rows, markdown=True)]
    for title, name, figure in (
        ("Training", "curves", draw_curves(folders, tables)),
        ("RM score against KL", "frontier", draw_frontier(tables, report["prompts"])),
        ("Diagnostics", "diagnostics", draw_diagnostics(folders)),
    ):
        figure.savefig(run / f"{name}.png", dpi=100)
        parts += [f"## {title}", f"![{title}]({name}.png)"]
    note = "Win rates of PPO and DR-PO: by the judge of their training. Of SFT and DPO: by the judge above."
    parts.insert(parts.index("## Training") + 1, note)
    settings = f"```json\n{json.dumps(report['settings'], indent=1)}\n```"
    parts += ["<details><summary>Settings</summary>", settings, "</details>\n"]
    (run / "report.md").write_text("\n\n".join(parts), encoding="utf-8")


def write_single(run):
    """report.md and figures of one run -> the table for the terminal."""
    report, samples = read(run / "report.json"), read(run / "samples.jsonl", lines=True)
    methods, rm, seconds = figures_of(report, samples), report["rm"], report["seconds"]
    wins = {name: [row[name]["win_rate"] for row in samples] for name in methods}
    by_batch = ", ".join(f"{name}: {of['accuracy']:.3f} of {of['pairs']}" for name, of in rm["accuracy_by_batch"].items())
    silent = ", ".join(f"{label(name)} {column.count(None)}" for name, column in wins.items() if None in column)
    each = ", ".join(f"{METHODS.get(stage, stage.upper())} {value:.0f}" for stage, value in seconds.items())
    differences = {f"{b} - {a}": paired_bootstrap(wins[b], wins[a]) for a, b in combinations(methods, 2)}
    notes = [
        f"reward model: {rm['accuracy']:.3f} {bracket(rm['accuracy_ci95'], 3)} of the held-out pairs ranked right ({by_batch})",
        *measured(report),
        *[f"responses without a verdict, not counted: {silent}"] * bool(silent),
        f"seconds: {each}; total {sum(seconds.values()):.0f}",
    ]
    parts = [
        f"# Run {run.name}",
        "In brackets: 95 % intervals over the prompts. At equal length: the win rate that a logistic regression on the "
        "difference in length predicts for responses as long as the reference; -: not identified.",
        table(method_rows(methods, METRICS, ["win_rate", "lc_win_rate", "rm_score", "kl"]), markdown=True),
        "\n".join(f"- {note}" for note in notes),
        "## Differences on the same prompts",
        "Paired bootstrap over prompts, 10,000 resamples. The intervals hold for these trained networks, not for another seed.",
        table(difference_rows(differences), markdown=True),
        "## The first held-out posts",
        *(f"### Post {i}\n\n{post_and_responses(row)}" for i, row in enumerate(samples[:3], 1)),
    ]
    publish(run, [run], [methods], methods, report, parts)
    return "\n".join([table(method_rows(methods, IN_TERMINAL, ["win_rate"])), *notes])


def write_seeds(run, folders):
    """report.json, report.md and figures over the seeds of a run -> the table for the terminal."""
    reports = [read(folder / "report.json") for folder in folders]
    tables = [figures_of(each, read(folder / "samples.jsonl", lines=True)) for each, folder in zip(reports, folders)]
    seeds, names = [each["settings"]["seed"] for each in reports], methods_in(tables)

    def by_seed(name, key):
        return [each.get(name, {}).get(key) for each in tables]

    wins = {name: by_seed(name, "win_rate") for name in names}
    report = {
        "methods": {name: {key: spread(by_seed(name, key)) for key in (*METRICS, "kl_rm_score")} for name in names},
        "differences": {
            f"{b} - {a}": spread([x - y if None not in (x, y) else None for x, y in zip(wins[b], wins[a])])
            for a, b in combinations(names, 2)
        },
        "seeds": seeds,
        "rm": {"accuracy": spread([each["rm"]["accuracy"] for each in reports])},
        "judge": ", ".join(sorted({each["judge"] for each in reports})),
        "prompts": reports[0]["prompts"],
        "settings": {key: value for key, value in reports[0]["settings"].items() if key not in ("seed", "run_dir")},
    }
    (run / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    short, full = [method_rows(report["methods"], keys, ["win_rate"]) for keys in (IN_TERMINAL, METRICS)]
    notes = [f"mean ± standard deviation (min-max) [95 % t-interval] over seeds {', '.join(map(str, seeds))}"]
    if gain := report["differences"].get("drpo - ppo"):
        each = ", ".join(number(value, 3) for value in gain["values"])
        notes.append(f"win rate of DR-PO minus PPO: {gain['mean']:+.3f} {bracket(gain['ci95'], 3)}, by seed: {each}")
    notes += [f"reward model accuracy: {number(report['rm']['accuracy'], 3, ranged=True)}", *measured(report)]
    per_seed = [[str(seed), *(number(wins[name][i], 3) for name in names)] for i, seed in enumerate(seeds)]
    parts = [
        f"# Run {run.name}, {len(seeds)} seeds",
        table(full, markdown=True),
        "\n".join(f"- {note}" for note in notes),
        "## Differences, paired by seed",
        table(difference_rows(report["differences"]), markdown=True),
        "## Win rate of each seed",
        table([["seed", *map(label, names)], *per_seed], markdown=True),
    ]
    publish(run, folders, tables, report["methods"], report, parts)
    return "\n".join([table(short), *notes])


def write(run_dir):
    """The folder of a run, single or over seeds -> the table for the terminal. Writes report.md and the figures into it."""
    run = Path(run_dir)
    folders = [path.parent for path in run.glob("seed_*/report.json")]
    if folders:
        return write_seeds(run, sorted(folders, key=lambda folder: (len(folder.name), folder.name)))  # seed_2, seed_10
    text = write_single(run)
    several = run.name.startswith("seed_") and len(list(run.parent.glob("seed_*/report.json"))) > 1
    return f"{text}\n\n{write(run.parent)}" if several else text


def compare(runs):
    """The DR-PO of several runs -> rows for `table`: the settings in which they differ, and its figures over their seeds."""
    trained = {}
    for run in map(Path, runs):
        found = [*sorted(run.glob("seed_*/drpo/settings.json")), *run.glob("drpo/settings.json")]
        if found and "drpo" in (methods := read(run / "report.json")["methods"]):
            alike = ("seed", "sft", "rm")  # the last two tell runs of these stages apart, not settings
            trained[str(run)] = read(found[0]) | dict.fromkeys(alike), methods["drpo"]
    first = next(iter(trained.values()), ({}, {}))[0]
    differing = [key for key in first if key.isidentifier() and len({str(s.get(key)) for s, _ in trained.values()}) > 1]
    rows = [["run", *differing, "seeds", *(METRICS[key][0] for key in IN_TERMINAL)]]
    for name, (settings, figures) in trained.items():
        cells = [number(figures[key], METRICS[key][1], ranged=True) for key in IN_TERMINAL]
        seeds = figures["kl"]["n"] if isinstance(figures["kl"], dict) else 1
        rows.append([name, *(str(settings.get(each)) for each in differing), str(seeds), *cells])
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__.partition("\n")[0])
    parser.add_argument("run_dir", nargs="+", metavar="RUN_DIR", help="what --run_dir of drpo.py was")
    parser.error = fail
    sys.stdout.reconfigure(errors="replace")  # where the terminal is not UTF-8
    try:
        runs = parser.parse_args(argv).run_dir
        for run_dir in runs:
            print(write(run_dir))
        if len(rows := compare(runs)) > 2:
            print(f"\nDR-PO in each run, over its seeds:\n\n{table(rows, markdown=True)}")
    except OSError as error:  # a file that is missing, a folder that is read-only
        fail(f"{error.filename}: {error.strerror}")
    except (KeyError, TypeError, IndexError) as error:
        fail(f"report.json or samples.jsonl is incomplete ({error!r}); make both again with: python drpo.py eval")


if __name__ == "__main__":
    main()
