"""The tables and figures of a run, from the JSON in its folder: report.md, curves.png and what the terminal shows.

    python -m tools.report RUN_DIR [RUN_DIR ...]

A folder with seed_K/eval.json in it is a run over several seeds: its table has mean and spread, and it gets a report.json
of its own. Any other folder is a single run, and needs the eval.json and samples.jsonl that `drpo.py eval` writes.
"""
import argparse
import json
import math
import statistics
import sys
import textwrap
from pathlib import Path

METHODS = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO", "drpo": "DR-PO"}
METRICS = {"win_rate": ("win rate vs reference", 3), "rm_score": ("RM score", 2), "kl": ("KL to SFT", 2),
           "rouge_l": ("ROUGE-L", 3), "response_tokens": ("tokens", 1), "eos_rate": ("EOS rate", 2)}    # title, decimals
# On the toy gate corpus, writing the full summary every time wins about 0.65. About half of that tells a run that has
# found it from one that has not.
FOUND = 0.30
# Student's t, 0.975 quantile, for 1..30 degrees of freedom. Beyond them the last one serves: at most 4 % too wide.
T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]

COLOURS = {"sft": "tab:gray", "rm": "tab:purple", "dpo": "tab:green", "ppo": "tab:blue", "drpo": "tab:orange"}
RL = ("ppo", "drpo")
PANELS = [                                                            # key in metrics.jsonl, stages, axis, y label, title
    ("score", RL, {}, "score (0: references, on average)", "reward-model score: should rise"),
    ("kl", RL, {}, "nats per response", "KL to the SFT model: may rise, should stay small"),
    ("response_tokens", RL, {}, "tokens", "response length: should not run to the limit"),
    ("eos_rate", RL, {"ylim": (0, 1.03)}, "share", "responses that end with EOS: should rise to 1"),
    ("entropy", RL, {}, "nats per token", "policy entropy: may fall, should not drop to 0"),
    ("explained_variance", RL, {"ylim": (-1, 1.03)}, "share (cut at -1)", "critic, explained variance: should approach 1"),
    ("loss", ("sft",), {}, "nats per token", "SFT loss: should fall and level off"),
    ("accuracy", ("rm",), {"ylim": (0.4, 1.02)}, "share (chance: 0.5)", "reward model, pairs ranked right: should rise"),
    ("accuracy", ("dpo",), {"ylim": (0.4, 1.02)}, "share (chance: 0.5)", "DPO, pairs ranked right: should rise"),
]


def fail(message):
    """What the person at the keyboard can mend: one line on stderr, exit status 2."""
    print(f"report.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def read(path, lines=False):
    """A JSON file -> its content; a .jsonl file -> the list of what its lines hold."""
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    except ValueError as error:
        fail(f"{path}: not JSON ({error}); mend or delete it")


def spread(values):
    """Values, one a seed and None where the seed lacks it -> their statistics. One value alone has no std."""
    given = [value for value in values if value is not None]
    return {"mean": statistics.mean(given), "std": statistics.stdev(given) if len(given) > 1 else None,
            "min": min(given), "max": max(given), "n": len(given), "values": values}


def wilson(hits, n, z=1.96):
    """Hits among n, ties as halves -> the 95 % interval [low, high] of their share, which behaves at 0 and 1 as +- does not."""
    p = hits / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)]


def mean_interval(values, z=1.96):
    """-> the 95 % interval [low, high] of the mean by the normal approximation."""
    mean, half = statistics.fmean(values), z * statistics.pstdev(values) / math.sqrt(len(values))
    return [mean - half, mean + half]


def summarise(known, samples):
    """What `drpo.py eval` left -> report.json: each method's mean of each metric, with its 95 % interval over the prompts."""
    methods = {name: {} for name in METHODS if name in samples[0]}
    for name, figures in methods.items():
        figures["judged"] = sum(row[name]["win_rate"] is not None for row in samples)
        figures["ties"] = sum(row[name]["win_rate"] == 0.5 for row in samples)
        if not figures["judged"]:
            fail(f"the judge gave no verdict on any response of {METHODS[name]}: ask another one")
        for key in METRICS:
            values = [row[name][key] for row in samples if row[name][key] is not None]
            shares = key in ("win_rate", "eos_rate")
            figures[key] = statistics.fmean(values)
            figures[f"{key}_ci95"] = wilson(sum(values), len(values)) if shares else mean_interval(values)
    rm, batches = known["rm"], known["rm"]["accuracy_by_batch"]
    right, pairs = [sum(batch[key] for batch in batches.values()) for key in ("right", "pairs")]
    rm = {**rm, "accuracy_ci95": wilson(right, pairs), "accuracy_by_batch": {
        name: {**batch, "accuracy_ci95": wilson(batch["right"], batch["pairs"])} for name, batch in sorted(batches.items())}}
    return {"methods": methods, **known, "rm": rm}


def t_interval(stats):
    """What `spread` gives -> the 95 % interval [low, high] of the mean over seeds; None for one seed."""
    if stats["n"] == 1:
        return None
    half = T975[min(stats["n"] - 1, len(T975)) - 1] * stats["std"] / math.sqrt(stats["n"])
    return [stats["mean"] - half, stats["mean"] + half]


def table(rows, markdown=False):
    """Rows of cells, the header first -> aligned columns for a terminal, or a Markdown table."""
    if markdown:
        rows = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("   ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) for first, *rest in rows)


def bracket(interval, digits):
    return f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else "-"


def plus_minus(stats, digits):
    return f"{stats['mean']:.{digits}f}" + (f" ± {stats['std']:.{digits}f}" if stats["n"] > 1 else "")


def method_rows(methods, bracketed):
    """One run's {method: figures} -> rows for `table`; the metrics in `bracketed` are given with their 95 % interval."""
    rows = [["method", *(title for title, _ in METRICS.values())]]
    for name, figures in methods.items():
        cells = {key: f"{figures[key]:.{digits}f}" for key, (_, digits) in METRICS.items()}
        for key in bracketed:
            cells[key] += " " + bracket(figures[f"{key}_ci95"], METRICS[key][1])
        rows.append([METHODS[name], *cells.values()])
    return rows


def measured(settings, prompts):
    """How the figures were measured, in lines for below the table."""
    warning = ", the run's own reward model: NOT independent, it is what was optimised" if settings["judge"] == "rm" else ""
    return [f"judge: {settings['judge']}{warning}",
            f"measured on {prompts} held-out prompts at sampling temperature {settings['eval_temperature']:g}; "
            f"KL, in nats per response, at temperature {settings['temperature']:g}, that of training"]


def judged(report, prompts):
    """What became of the questions to an API judge, which may leave one without a verdict."""
    said = [f"{METHODS[name]} {figures['ties']} ties, {prompts - figures['judged']} without a verdict and left out"
            for name, figures in report["methods"].items()]
    return [f"of {prompts} questions: {'; '.join(said)}"] if report["settings"]["judge"].startswith("api:") else []


def sample_posts(samples, methods):
    """The first three held-out posts with the response of each method, as indented (so verbatim) Markdown blocks."""
    blocks = []
    for number, row in enumerate(samples[:3], 1):
        parts = [line for line in row["prompt"].splitlines() if line.strip()] + [f"reference: {row['reference']}"]
        for name in methods:
            said = row[name]
            win = "no verdict" if said["win_rate"] is None else f"win {said['win_rate']:.2g}"
            parts.append(f"{METHODS[name]} ({win}, RM score {said['rm_score']:.2f}): {said['response']}")
        lines = [line for part in parts for line in [*textwrap.wrap(part, 110), ""]]
        blocks += [f"### Post {number}", "\n".join(f"    {line}".rstrip() for line in lines[:-1])]
    return blocks


def draw(folders, path):
    """curves.png: what each stage logged against its updates; several folders give mean and min-max band."""
    from matplotlib.figure import Figure                              # not pyplot: needs no display, leaves a notebook alone
    figure = Figure(figsize=(15, 11), layout="constrained")
    axes = figure.subplots(3, 3, height_ratios=(3, 3, 2))
    drawn = {}                                                        # stage -> a line, for the one legend
    for ax, (key, stages, limits, unit, title) in zip(axes.flat, PANELS):
        for stage in stages:
            logs = [read(log, lines=True) for folder in folders if (log := folder / stage / "metrics.jsonl").exists()]
            window = len(logs[0]) // 20 if logs and stage not in RL else 0
            curves = [[statistics.fmean(line[key] for line in log[max(0, i - window):i + 1]) for i in range(len(log))]
                      for log in logs]
            at_update = list(zip(*curves))                            # as far as every seed has come
            if at_update:
                updates, low, high = range(1, len(at_update) + 1), list(map(min, at_update)), list(map(max, at_update))
                drawn[stage], = ax.plot(updates, list(map(statistics.fmean, at_update)), color=COLOURS[stage], linewidth=2)
                ax.fill_between(updates, low, high, color=COLOURS[stage], alpha=0.2, linewidth=0)
        ax.set(title=title, xlabel="update", ylabel=unit, **limits)
        ax.grid(alpha=0.3)
    notes = ["DR-PO's rollouts may begin inside a reference response, PPO's begin at the bare prompt: in the upper two rows",
             "compare how curves move, not how high they are. The table in report.md has levels that can be compared.",
             "Bottom row: running means over about a twentieth of the updates."]
    if len(folders) > 1:
        notes[-1] += f" Lines: means over {len(folders)} seeds; bands: from the lowest seed to the highest."
    figure.suptitle("\n".join(notes), fontsize=11)
    names = [METHODS.get(stage, "reward model") for stage in drawn]
    figure.legend(drawn.values(), names, loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=100)


def publish(run, folders, settings, *parts):
    """Draws the figure from the logs of `folders`, and writes report.md: the parts, the figure, the settings folded away."""
    draw(folders, run / "curves.png")
    parts += ("## Training curves", "![Training curves](curves.png)", "<details><summary>Settings</summary>",
              f"```json\n{json.dumps(settings, indent=1)}\n```", "</details>\n")
    (run / "report.md").write_text("\n\n".join(parts), encoding="utf-8")


def write_single(run):
    """report.json, report.md and curves.png of one run -> the table for the terminal."""
    samples = read(run / "samples.jsonl", lines=True)
    report = summarise(read(run / "eval.json"), samples)
    (run / "report.json").write_text(json.dumps(report, indent=1))
    methods, rm, seconds = report["methods"], report["rm"], report["seconds"]
    each = ", ".join(f"{METHODS.get(stage, 'RM')} {value:.0f}" for stage, value in seconds.items())
    notes = [f"reward model accuracy: {rm['accuracy']:.3f} {bracket(rm['accuracy_ci95'], 3)}",
             *measured(report["settings"], len(samples)), *judged(report, len(samples)), f"seconds: {each}; in all {sum(seconds.values()):.0f}"]
    publish(run, [run], report["settings"], f"# Run {run}", "In brackets: 95 % intervals over the prompts.",
            table(method_rows(methods, METRICS), markdown=True), "\n".join(f"- {note}" for note in notes),
            "## The first held-out posts", *sample_posts(samples, methods))
    return "\n".join([table(method_rows(methods, ["win_rate"])), *notes])


def write_seeds(run, folders):
    """report.json, report.md and curves.png over the seeds of a run -> the table for the terminal."""
    samples = [read(folder / "samples.jsonl", lines=True) for folder in folders]
    reports = [summarise(read(folder / "eval.json"), rows) for folder, rows in zip(folders, samples)]
    seeds = [each["settings"]["seed"] for each in reports]
    methods = {name: {key: spread([each["methods"].get(name, {}).get(key) for each in reports]) for key in METRICS}
               for name in METHODS if any(name in each["methods"] for each in reports)}
    accuracy = spread([each["rm"]["accuracy"] for each in reports])
    settings = {name: value for name, value in reports[0]["settings"].items() if name not in ("seed", "run_dir")}
    report = {"methods": methods, "seeds": seeds, "rm": {"accuracy": accuracy}, "settings": settings}
    (run / "report.json").write_text(json.dumps(report, indent=1))

    others = ("rm_score", "kl", "response_tokens", "eos_rate")
    titles = [METRICS[key][0] for key in ("win_rate", *others)]
    rows = [["method", titles[0], "95 % t-interval", f"seeds >= {FOUND:.2f}", *titles[1:]]]
    for name, stats in methods.items():
        wins = stats["win_rate"]
        found = sum(win is not None and win >= FOUND for win in wins["values"])
        rows.append([METHODS[name], f"{plus_minus(wins, 3)} ({wins['min']:.3f}-{wins['max']:.3f})",
                     bracket(t_interval(wins), 3), f"{found}/{wins['n']}",
                     *(plus_minus(stats[key], METRICS[key][1]) for key in others)])
    per_seed = [["seed", *(METHODS[name] for name in methods)]]
    for seed, *wins in zip(seeds, *(stats["win_rate"]["values"] for stats in methods.values())):
        per_seed.append([str(seed), *("-" if win is None else f"{win:.3f}" for win in wins)])

    notes = [f"mean ± standard deviation (min-max) over seeds {', '.join(map(str, seeds))}"]
    gains = {seed: each["methods"]["drpo"]["win_rate"] - each["methods"]["ppo"]["win_rate"]
             for seed, each in zip(seeds, reports) if {"ppo", "drpo"} <= each["methods"].keys()}
    if gains:
        gain = spread(list(gains.values()))
        each = ", ".join(f"seed {seed}: {value:+.3f}" for seed, value in gains.items())
        notes.append(f"win rate of DR-PO minus PPO, paired by seed: {gain['mean']:+.3f}, "
                     f"95 % t-interval {bracket(t_interval(gain), 3)}; {each}")
    notes += [f"reward model accuracy: {accuracy['mean']:.3f} ({accuracy['min']:.3f}-{accuracy['max']:.3f})",
              *measured(settings, len(samples[0]))]
    publish(run, folders, settings, f"# Run {run}, {len(seeds)} seeds", table(rows, markdown=True),
            "\n".join(f"- {note}" for note in notes), "## Win rate of each seed", table(per_seed, markdown=True),
            f"Each seed's own report, with samples: `python -m tools.report {run}/seed_*`")
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


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__.partition("\n")[0])
    parser.add_argument("run_dir", nargs="+", metavar="RUN_DIR", help="what --run_dir of drpo.py was")
    parser.error = fail
    for run_dir in parser.parse_args(argv).run_dir:
        try:
            print(write(run_dir))
        except OSError as error:                                      # a file that is missing, a folder that is read-only
            fail(f"{error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
