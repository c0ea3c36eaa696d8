"""The tables and figures of a run, from the JSON in its folder: report.md, curves.png, frontier.png, what the terminal shows.

    python -m tools.report RUN_DIR [RUN_DIR ...]

A folder with seed_K/eval.json in it is a run over several seeds: its table has mean and spread, and it gets a report.json
of its own. Any other folder is a single run, and needs the eval.json and samples.jsonl that `drpo.py eval` writes. Of several
folders, such as those of a beta ablation, the DR-PO of each is a row of one more table.
"""

import argparse
import json
import statistics
import sys
import textwrap
from itertools import accumulate, chain, combinations
from pathlib import Path

from tools.stats import binned, distinct, length_controlled, mean_interval, paired_bootstrap, spread, t_interval, wilson

METHODS = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO", "drpo": "DR-PO"}
METRICS = {  # key: title, decimals
    "win_rate": ("win rate vs reference", 3),
    "lc_win_rate": ("at equal length", 3),
    "rm_score": ("RM score", 2),
    "kl": ("KL to SFT", 2),
    "rouge_1": ("ROUGE-1", 3),
    "rouge_2": ("ROUGE-2", 3),
    "rouge_l": ("ROUGE-L", 3),
    "response_tokens": ("tokens", 1),
    "eos_rate": ("EOS rate", 2),
    "distinct_1": ("distinct-1", 3),
    "distinct_2": ("distinct-2", 3),
}
MEANS = [key for key in METRICS if key not in ("lc_win_rate", "distinct_1", "distinct_2")]  # over prompts; not so these three
IN_TERMINAL = ("win_rate", "rm_score", "kl", "rouge_l", "response_tokens", "eos_rate")
WITH_INTERVAL = ("win_rate", "lc_win_rate", "rm_score", "kl")  # in report.md; report.json has all intervals
# On the toy gate corpus, writing the full summary every time wins about 0.65. About half of that tells a run that has
# found it from one that has not.
FOUND = 0.30

# What the paper reports of Pythia-2.8B, win rates by GPT-4: Table 1, ± over 3 seeds, and Table 3
PAPER_KEYS = ("win_rate", "rm_score", "kl", "rouge_1", "rouge_2", "rouge_l")
# fmt: off
PAPER = {
    "tldr": {
        "sft": ("0.316 ± 0.002", "-0.51 ± 0.04", "-", "0.322 ± 0.010", "0.123 ± 0.007", "0.249 ± 0.012"),
        "dpo": ("0.526 ± 0.004", "-", "37.33 ± 2.01", "0.300 ± 0.032", "0.079 ± 0.010", "0.221 ± 0.008"),
        "ppo": ("0.623 ± 0.025", "1.17 ± 0.13", "16.32 ± 1.46", "0.337 ± 0.023", "0.120 ± 0.009", "0.250 ± 0.010"),
        "drpo": ("0.702 ± 0.017", "1.52 ± 0.09", "16.84 ± 0.83", "0.337 ± 0.018", "0.119 ± 0.001", "0.251 ± 0.008"),
    },
    "cnndm": {
        "sft": ("0.105", "-", "-", "0.256", "0.123", "0.200"),
        "dpo": ("0.060", "-", "-", "0.207", "0.095", "0.157"),
        "ppo": ("0.085", "-", "-", "0.236", "0.123", "0.186"),
        "drpo": ("0.120", "-", "-", "0.295", "0.154", "0.229"),
    },
}
# fmt: on

COLOURS = {"sft": "tab:gray", "rm": "tab:purple", "dpo": "tab:green", "ppo": "tab:blue", "drpo": "tab:orange"}
RL, TOKENS = ("ppo", "drpo"), "tokens that the policy has generated"
PANELS = [  # key in metrics.jsonl, stages, axis, y label, title
    ("score", RL, {}, "score (0: references, on average)", "reward-model score: should rise"),
    ("kl", RL, {}, "nats per response", "KL to the SFT model: may rise, should stay small"),
    ("response_tokens", RL, {}, "tokens", "response length: should not run to the limit"),
    ("eos_rate", RL, {"ylim": (0, 1.03)}, "share", "responses that end with EOS: should rise to 1"),
    ("entropy", RL, {}, "nats per token", "policy entropy: may fall, should not drop to 0"),
    ("explained_variance", RL, {"ylim": (-1, 1.03)}, "share (cut at -1)", "critic, explained variance: should approach 1"),
    ("score", RL, {"xlabel": TOKENS}, "score (0: references, on average)", "the score again, against tokens generated"),
    ("kl", RL, {"xlabel": TOKENS}, "nats per response", "the KL again: a reset saves tokens"),
    ("response_tokens", RL, {"xlabel": TOKENS}, "tokens", "the response length again"),
    ("loss", ("sft",), {}, "nats per token", "SFT loss: should fall and level off"),
    ("accuracy", ("rm",), {"ylim": (0.4, 1.02)}, "share (chance: 0.5)", "reward model, pairs ranked right: should rise"),
    ("accuracy", ("dpo",), {"ylim": (0.4, 1.02)}, "share (chance: 0.5)", "DPO, pairs ranked right: should rise"),
]
HELD_OUT_PANELS = [  # key in history.jsonl, y label, title; a last row, where tools/history.py has measured kept checkpoints
    ("win_rate", "share", "win rate, validation prompts: should rise"),
    ("rm_score", "score", "RM score, validation prompts"),
    ("kl", "nats per response", "KL to the SFT model, validation prompts"),
]


def fail(message):
    """What the person at the keyboard can mend: one line on stderr, exit status 2."""
    print(f"report.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def label(method):
    """What a method is called: a network from elsewhere by the end of its name, the drpo of another run as RUN/drpo."""
    path = Path(method)
    return METHODS.get(method) or ("/".join(path.parts[-2:]) if path.name in METHODS else path.name)


def methods_in(rows):
    """The methods in rows of samples.jsonl or in tables: the run's in the order of METHODS, then those from elsewhere."""
    found = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, dict))
    return [name for name in METHODS if name in found] + [name for name in found if name not in METHODS]


def read(path, lines=False):
    """A JSON file -> its content; a .jsonl file -> the list of what its lines hold."""
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    except ValueError as error:
        fail(f"{path}: not JSON ({error}); mend or delete it")


def summarise(known, samples):
    """What `drpo.py eval` left -> report.json: each method's figures with their 95 % intervals over the prompts, and the
    differences of win rate between methods on the same prompts."""
    methods, references = {name: {} for name in methods_in(samples[:1])}, [row["reference"] for row in samples]
    for name, figures in methods.items():
        said = [row[name] for row in samples]
        if missing := [key for key in (*MEANS, "kl_rm_score") if key not in said[0]]:
            fail(f"samples.jsonl has no {', '.join(missing)}: make it again with: python drpo.py eval")
        verdicts, texts = [one["win_rate"] for one in said], [one["response"] for one in said]
        figures["judged"], figures["ties"] = len(verdicts) - verdicts.count(None), verdicts.count(0.5)
        if not figures["judged"]:
            fail(f"the judge gave no verdict on any response of {label(name)}: ask another one")
        for key in MEANS:
            values = [one[key] for one in said if one[key] is not None]
            shares = key in ("win_rate", "eos_rate")
            figures[key] = statistics.fmean(values)
            figures[f"{key}_ci95"] = wilson(sum(values), len(values)) if shares else mean_interval(values)
        gaps = [len(text) - len(reference) for text, reference in zip(texts, references)]  # in characters, which a judge sees
        figures["lc_win_rate"], figures["lc_win_rate_ci95"] = length_controlled(verdicts, gaps)
        figures["distinct_1"], figures["distinct_2"] = distinct(texts, 1), distinct(texts, 2)
    differences = {
        f"{b} - {a}": paired_bootstrap(*([row[name]["win_rate"] for row in samples] for name in (b, a)))
        for a, b in combinations(methods, 2)
    }
    rm, batches = known["rm"], known["rm"]["accuracy_by_batch"]
    right, pairs = [sum(batch[key] for batch in batches.values()) for key in ("right", "pairs")]
    rm = {
        **rm,
        "accuracy_ci95": wilson(right, pairs),
        "accuracy_by_batch": {
            name: {**batch, "accuracy_ci95": wilson(batch["right"], batch["pairs"])} for name, batch in sorted(batches.items())
        },
    }
    return {"methods": methods, "differences": differences, **known, "rm": rm}


def table(rows, markdown=False):
    """Rows of cells, the header first -> aligned columns for a terminal, or a Markdown table."""
    if markdown:
        rows = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("   ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) for first, *rest in rows)


def bracket(interval, digits):
    return f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else "-"


def number(value, digits):
    return "-" if value is None else f"{value:.{digits}f}"


def plus_minus(stats, digits):
    """What `spread` gives, or None, in a cell."""
    return f"{stats['mean']:.{digits}f}" + (f" ± {stats['std']:.{digits}f}" if stats["n"] > 1 else "") if stats else "-"


def method_rows(methods, keys, bracketed):
    """One run's {method: figures} -> rows for `table`: these keys of METRICS, those in `bracketed` with their 95 % interval."""
    rows = [["method", *(METRICS[key][0] for key in keys)]]
    for name, figures in methods.items():
        cells = {key: number(figures[key], METRICS[key][1]) for key in keys}
        for key in bracketed:
            cells[key] += " " + bracket(figures[f"{key}_ci95"], METRICS[key][1])
        rows.append([label(name), *cells.values()])
    return rows


def difference_rows(differences, interval):
    """{"ppo - sft": {mean, ...}} -> rows for `table`. interval(what stands there) -> [low, high] or None."""
    rows = [["win rate, paired", "difference", "95 % interval"]]
    for pair, gap in differences.items():
        b, a = pair.split(" - ")
        rows.append(
            [f"{label(b)} minus {label(a)}", f"{gap['mean']:+.3f}" if gap else "-", bracket(interval(gap), 3) if gap else "-"]
        )
    return rows


def paper_rows(methods, preset):
    """{method: figures}, numbers or what `spread` gives -> rows for `table`: each method here and in the paper."""
    rows = [["method", "", *(METRICS[key][0] for key in PAPER_KEYS)]]
    for name, theirs in PAPER[preset].items():
        if name in methods:
            ours = [(methods[name][key], METRICS[key][1]) for key in PAPER_KEYS]
            cells = [(plus_minus if isinstance(figure, dict) else number)(figure, digits) for figure, digits in ours]
            rows += [[METHODS[name], "here", *cells], [METHODS[name], "paper", *theirs]]
    return rows


def measured(settings, prompts):
    """How the figures were measured, in lines for below the table."""
    warning = ", the run's own reward model: NOT independent, it is what was optimised" if settings["judge"] == "rm" else ""
    return [
        f"judge: {settings['judge']}{warning}",
        f"measured on {prompts} held-out prompts at sampling temperature {settings['eval_temperature']:g}; "
        f"KL, in nats per response, at temperature {settings['temperature']:g}, that of training",
    ]


def judged(report, prompts):
    """What became of the questions to an API judge, which may leave one without a verdict."""
    said = [
        f"{label(name)} {figures['ties']} ties, {prompts - figures['judged']} without a verdict and left out"
        for name, figures in report["methods"].items()
    ]
    return [f"of {prompts} questions: {'; '.join(said)}"] if report["settings"]["judge"].startswith("api:") else []


def sample_posts(samples, methods):
    """The first three held-out posts with the response of each method, as indented (so verbatim) Markdown blocks."""
    blocks = []
    for i, row in enumerate(samples[:3], 1):
        parts = [line for line in row["prompt"].splitlines() if line.strip()] + [f"reference: {row['reference']}"]
        for name in methods:
            said = row[name]
            win = "no verdict" if said["win_rate"] is None else f"win {said['win_rate']:.2g}"
            parts.append(f"{label(name)} ({win}, RM score {said['rm_score']:.2f}): {said['response']}")
        lines = [line for part in parts for line in [*textwrap.wrap(part, 110), ""]]
        blocks += [f"### Post {i}", "\n".join(f"    {line}".rstrip() for line in lines[:-1])]
    return blocks


def draw(folders, batch_size, path):
    """curves.png: what each stage logged against its updates, and PPO's and DR-PO's also against episodes and against tokens
    generated; several folders give mean and min-max band. Win rates on the way, where tools/history.py has measured them."""
    from matplotlib.figure import Figure  # not pyplot: needs no display, leaves a notebook alone

    histories, drawn = read_history(folders), {}  # stage -> a line, for the one legend
    figure = Figure(figsize=(15, 17 if histories else 14), layout="constrained")
    axes = figure.subplots(5 if histories else 4, 3, height_ratios=(3, 3, 2, 2, 2)[: 5 if histories else 4])

    def curve(ax, stage, x, curves):
        if at := list(zip(*curves)):  # as far as every seed has come
            (drawn[stage],) = ax.plot(x[: len(at)], list(map(statistics.fmean, at)), color=COLOURS[stage], linewidth=2)
            ax.fill_between(x[: len(at)], list(map(min, at)), list(map(max, at)), color=COLOURS[stage], alpha=0.2, linewidth=0)

    def episodes(ax):
        ax.secondary_xaxis("top", functions=(lambda x: x * batch_size, lambda x: x / batch_size)).set_xlabel("episodes")

    for ax, (key, stages, limits, unit, title) in zip(axes.flat, PANELS):
        for stage in stages:
            logs = [read(log, lines=True) for folder in folders if (log := folder / stage / "metrics.jsonl").exists()]
            window = len(logs[0]) // 20 if logs and stage not in RL else 0
            x = range(1, max(map(len, logs), default=0) + 1)
            if limits.get("xlabel") == TOKENS:
                generated = [accumulate(line["tokens_decoded"] for line in log) for log in logs]
                x = list(map(statistics.fmean, zip(*generated)))
            curves = [
                [statistics.fmean(line[key] for line in log[max(0, i - window) : i + 1]) for i in range(len(log))]
                for log in logs
            ]
            curve(ax, stage, x, curves)
        ax.set(**{"title": title, "xlabel": "update", "ylabel": unit, **limits})
        ax.grid(alpha=0.3)
        if stages == RL and "xlabel" not in limits:
            episodes(ax)
    for ax, (key, unit, title) in zip(axes.flat[len(PANELS) :], HELD_OUT_PANELS):
        for stage in RL:
            found = [history[stage]["validation"] for history in histories if stage in history]
            x = sorted(set.intersection(*map(set, found))) if found else []
            curve(ax, stage, x, [[figures[update][key] for update in x] for figures in found])
        ax.set(title=title, xlabel="update", ylabel=unit)
        ax.grid(alpha=0.3)
        episodes(ax)
    notes = [
        "DR-PO's rollouts may begin inside a reference response, PPO's begin at the bare prompt: in the upper three rows",
        "compare how curves move, not how high they are. The table in report.md has levels that can be compared.",
        "Fourth row: running means over about a twentieth of the updates.",
    ]
    if len(folders) > 1:
        notes[-1] += f" Lines: means over {len(folders)} seeds; bands: from the lowest seed to the highest."
    figure.suptitle("\n".join(notes), fontsize=11)
    names = [METHODS.get(stage, "reward model") for stage in drawn]
    figure.legend(drawn.values(), names, loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=100)


def draw_frontier(samples, path):
    """frontier.png, the paper's figures 1 and 2: RM score against KL of the same responses, sampled at the training
    temperature, one per held-out prompt; by method in bins of equal count, mean and standard error. SFT is at KL 0."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    ax = figure.subplots()
    for name in methods_in(samples):
        said = [row[name] for row in samples if name in row]
        x, y, error, _ = zip(*binned([one["kl"] for one in said], [one["kl_rm_score"] for one in said]))
        ax.errorbar(x, y, error, color=COLOURS.get(name), marker="o", capsize=3, label=label(name))
        if name == "sft":
            ax.axhline(y[0], color=COLOURS[name], linestyle="--", linewidth=1)
    ax.axhline(0, color="black", linestyle=":", linewidth=1, label="references, on average")
    ax.set(
        xlabel="KL to the SFT model, nats per response (estimated on one sample: can be below 0)",
        ylabel="RM score",
        title=f"{len(samples)} held-out responses per method; dots: bins of equal count, bars: standard errors",
    )
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=100)


def read_history(folders):
    """What tools/history.py left in these folders, one a seed -> [{method: {part: {update: figures}}}], part is "validation" or
    "test"."""
    found = []
    for folder in folders:
        if (folder / "history.jsonl").exists():
            found.append({})
            for line in read(folder / "history.jsonl", lines=True):
                found[-1].setdefault(line["method"], {}).setdefault(line["prompts"], {})[line["update"]] = line
    return found


def draw_history(histories, path):
    """overoptimisation.png: RM score (left axis) and what it stands for (right axis: the gold score, or else the judge's win
    rate) on the validation prompts, against updates; mean over seeds, and dotted where each method peaks in the latter."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    for method in [name for name in RL if name in histories[0]]:
        runs = [history[method]["validation"] for history in histories if method in history]
        updates = sorted(set.intersection(*map(set, runs)))
        judged = runs[0][updates[0]]["judged_by"]
        for ax, key, style in ((left, "rm_score", "-"), (right, judged, "--")):
            curve = [statistics.fmean(run[update][key] for run in runs) for update in updates]
            ax.plot(updates, curve, style, color=COLOURS[method], label=f"{METHODS[method]}, {key}")
        peak = max(range(len(updates)), key=curve.__getitem__)  # of the latter curve
        left.axvline(updates[peak], color=COLOURS[method], linestyle=":")
    left.set(
        xlabel="update",
        ylabel="RM score (solid): what is optimised",
        title="Where the two part, the reward model is over-optimised",
    )
    right.set_ylabel(f"{judged} (dashed): what is wanted")
    left.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=100)


def history_rows(histories):
    """-> rows for `table`: the update at which each method does best on the validation prompts, and what stopping there gives
    on the test prompts, beside its last update; means over seeds."""
    judged = next(iter(next(iter(histories[0].values()))["test"].values()))["judged_by"]
    keys = dict.fromkeys((judged, "win_rate", "rm_score", "kl"))
    rows = [["on the test prompts", "update (of each seed)", *(METRICS.get(key, (key, 3))[0] for key in keys)]]
    for method in [name for name in RL if name in histories[0]]:
        parts = [history[method] for history in histories if method in history]
        peaks = [max(part["validation"], key=lambda update: part["validation"][update][judged]) for part in parts]
        lasts = [max(part["validation"]) for part in parts]
        for title, updates in (("peak on validation prompts", peaks), ("last update", lasts)):
            at = [part["test"][update] for part, update in zip(parts, updates)]
            rows.append(
                [
                    f"{METHODS[method]}, {title}",
                    ", ".join(map(str, updates)),
                    *(f"{statistics.fmean(figures[key] for figures in at):.3f}" for key in keys),
                ]
            )
    return rows


def publish(run, folders, samples, methods, settings, *parts):
    """Draws the figures, from the logs of `folders` and from all their samples, and writes report.md: the parts, the paper's
    table beside ours where it is of this task, the figures, the settings folded away."""
    draw(folders, settings["batch_size"], run / "curves.png")
    draw_frontier(samples, run / "frontier.png")
    if settings["preset"] in PAPER:
        parts += (
            "## Beside the paper",
            "Theirs: Pythia-2.8B-deduped, judged by GPT-4 against human references; how KL is estimated they do not say. On "
            "CNN/DailyMail their SFT model, and no other, was trained on that data.",
            table(paper_rows(methods, settings["preset"]), markdown=True),
        )
    if histories := read_history(folders):
        draw_history(histories, run / "overoptimisation.png")
        parts += (
            "## Over-optimisation",
            "![RM score and gold score](overoptimisation.png)",
            "Figure and peaks: validation prompts, which are apart from the test prompts that everything else is measured on.",
            table(history_rows(histories), markdown=True),
        )
    parts += (
        "## RM score against KL",
        "![RM score against KL](frontier.png)",
        "## Training curves",
        "![Training curves](curves.png)",
        "<details><summary>Settings</summary>",
        f"```json\n{json.dumps(settings, indent=1)}\n```",
        "</details>\n",
    )
    (run / "report.md").write_text("\n\n".join(parts), encoding="utf-8")


def write_single(run):
    """report.json, report.md and curves.png of one run -> the table for the terminal."""
    samples = read(run / "samples.jsonl", lines=True)
    report = summarise(read(run / "eval.json"), samples)
    (run / "report.json").write_text(json.dumps(report, indent=1))
    methods, rm, seconds = report["methods"], report["rm"], report["seconds"]
    each = ", ".join(f"{METHODS.get(stage, 'RM')} {value:.0f}" for stage, value in seconds.items())
    notes = [
        f"reward model accuracy: {rm['accuracy']:.3f} {bracket(rm['accuracy_ci95'], 3)}",
        *measured(report["settings"], len(samples)),
        *judged(report, len(samples)),
        f"seconds: {each}; in all {sum(seconds.values()):.0f}",
    ]
    publish(
        run,
        [run],
        samples,
        methods,
        report["settings"],
        f"# Run {run}",
        "In brackets: 95 % intervals over the prompts. At equal length: the win rate that a logistic regression on the "
        "difference in length predicts for responses as long as the reference; - where it cannot tell.",
        table(method_rows(methods, METRICS, WITH_INTERVAL), markdown=True),
        "\n".join(f"- {note}" for note in notes),
        "## Differences on the same prompts",
        "Intervals by the paired bootstrap: prompts drawn again, "
        "10,000 times. They hold for these trained networks, and say nothing of another seed.",
        table(difference_rows(report["differences"], lambda gap: gap["ci95"]), markdown=True),
        "## The first held-out posts",
        *sample_posts(samples, methods),
    )
    return "\n".join([table(method_rows(methods, IN_TERMINAL, ["win_rate"])), *notes])


def write_seeds(run, folders):
    """report.json, report.md and curves.png over the seeds of a run -> the table for the terminal."""
    samples = [read(folder / "samples.jsonl", lines=True) for folder in folders]
    reports = [summarise(read(folder / "eval.json"), rows) for folder, rows in zip(folders, samples)]
    seeds = [each["settings"]["seed"] for each in reports]
    methods = {
        name: {key: spread([each["methods"].get(name, {}).get(key) for each in reports]) for key in METRICS}
        for name in methods_in([each["methods"] for each in reports])
    }
    differences = {
        f"{b} - {a}": spread(
            [
                each["methods"][b]["win_rate"] - each["methods"][a]["win_rate"] if {a, b} <= each["methods"].keys() else None
                for each in reports
            ]
        )
        for a, b in combinations(methods, 2)
    }
    accuracy = spread([each["rm"]["accuracy"] for each in reports])
    settings = {name: value for name, value in reports[0]["settings"].items() if name not in ("seed", "run_dir")}
    report = {
        "methods": methods,
        "differences": differences,
        "seeds": seeds,
        "rm": {"accuracy": accuracy},
        "settings": settings,
    }
    (run / "report.json").write_text(json.dumps(report, indent=1))

    others = ("rm_score", "kl", "response_tokens", "eos_rate")
    titles = [METRICS[key][0] for key in ("win_rate", *others)]
    gate = settings["dataset"] == "toy_env:gate"  # elsewhere FOUND says nothing
    rows = [["method", titles[0], "95 % t-interval", *[f"seeds >= {FOUND:.2f}"] * gate, *titles[1:]]]
    all_rows = [["method", *(title for title, _ in METRICS.values())]]
    for name, stats in methods.items():
        wins = stats["win_rate"]
        found = sum(win is not None and win >= FOUND for win in wins["values"])
        rows.append(
            [
                label(name),
                f"{plus_minus(wins, 3)} ({wins['min']:.3f}-{wins['max']:.3f})",
                bracket(t_interval(wins), 3),
                *[f"{found}/{wins['n']}"] * gate,
                *(plus_minus(stats[key], METRICS[key][1]) for key in others),
            ]
        )
        all_rows.append([label(name), *(plus_minus(stats[key], digits) for key, (_, digits) in METRICS.items())])
    per_seed = [["seed", *map(label, methods)]]
    for seed, *wins in zip(seeds, *(stats["win_rate"]["values"] for stats in methods.values())):
        per_seed.append([str(seed), *(number(win, 3) for win in wins)])

    notes = [f"mean ± standard deviation (min-max) over seeds {', '.join(map(str, seeds))}"]
    if gain := differences.get("drpo - ppo"):
        each = ", ".join(f"seed {seed}: {value:+.3f}" for seed, value in zip(seeds, gain["values"]) if value is not None)
        notes.append(
            f"win rate of DR-PO minus PPO, paired by seed: {gain['mean']:+.3f}, "
            f"95 % t-interval {bracket(t_interval(gain), 3)}; {each}"
        )
    notes += [
        f"reward model accuracy: {accuracy['mean']:.3f} ({accuracy['min']:.3f}-{accuracy['max']:.3f})",
        *measured(settings, len(samples[0])),
    ]
    publish(
        run,
        folders,
        list(chain(*samples)),
        methods,
        settings,
        f"# Run {run}, {len(seeds)} seeds",
        table(rows, markdown=True),
        "\n".join(f"- {note}" for note in notes),
        "## All figures, mean ± standard deviation over the seeds",
        table(all_rows, markdown=True),
        "## Differences, paired by seed",
        table(difference_rows(differences, t_interval), markdown=True),
        "## Win rate of each seed",
        table(per_seed, markdown=True),
        f"Each seed's own report, with samples: `python -m tools.report {run}/seed_*`",
    )
    return "\n".join([table(rows), *notes])


def write(run_dir):
    """A run's folder, single or over seeds -> the table for the terminal; report.json, .md and curves.png then lie in it."""
    run = Path(run_dir)
    folders = [path.parent for path in run.glob("seed_*/eval.json")]
    if folders:
        return write_seeds(run, sorted(folders, key=lambda folder: (len(folder.name), folder.name)))  # seed_2, seed_10
    if not (run / "eval.json").exists():
        fail(f"{run}: no eval.json in it nor in seed_K folders below; make it with: python drpo.py eval --run_dir {run}")
    return write_single(run)


def compare(runs):
    """The DR-PO of several runs -> rows for `table`: the settings it was trained with, where they differ, and its figures,
    mean and range over the seeds of each run."""
    trained = {}
    for run in map(Path, runs):
        results = [*sorted(run.glob("seed_*/drpo/result.json")), *run.glob("drpo/result.json")]
        if results and "drpo" in read(run / "report.json")["methods"]:
            trained[run] = read(results[0])["settings"]
    first = next(iter(trained.values()), {})
    differing = [
        key for key in first if key != "seed" and any(settings.get(key) != first[key] for settings in trained.values())
    ]
    keys = ("win_rate", "rm_score", "kl", "response_tokens", "eos_rate")
    rows = [["run", *differing, "seeds", *(METRICS[key][0] for key in keys)]]
    for run, settings in trained.items():
        figures, cells = read(run / "report.json")["methods"]["drpo"], []
        for key in keys:
            stats = figures[key] if isinstance(figures[key], dict) else spread([figures[key]])
            mean, low, high = [f"{stats[name]:.{METRICS[key][1]}f}" for name in ("mean", "min", "max")]
            cells.append(f"{mean} ({low}-{high})" if stats["n"] > 1 else mean)
        rows.append([run.name, *(str(settings.get(key)) for key in differing), str(stats["n"]), *cells])
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__.partition("\n")[0])
    parser.add_argument("run_dir", nargs="+", metavar="RUN_DIR", help="what --run_dir of drpo.py was")
    parser.error = fail
    runs = parser.parse_args(argv).run_dir
    try:
        for run_dir in runs:
            print(write(run_dir))
        if len(rows := compare(runs)) > 2:
            print(f"\nDR-PO in each run, mean (range over seeds):\n\n{table(rows, markdown=True)}")
    except OSError as error:  # a file that is missing, a folder that is read-only
        fail(f"{error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
