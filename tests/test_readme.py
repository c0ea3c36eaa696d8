"""README.md, held to the code: the functions, lines, settings, flags, paths and figures that it names are there."""

import argparse
import importlib
import importlib.util
import inspect
import itertools
import json
import re
import sys
from pathlib import Path
from unittest import mock

import pytest

import drpo
from tools import bench, report
from tools.stats import spread, t_interval

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTIONS = dict(part.split("\n", 1) for part in re.split(r"^## ", README, flags=re.M)[1:])
PAPER = SECTIONS["The paper, line by line"]


def table(text, heading):
    """-> the rows below the line `heading` of a Markdown table, each a list of cells."""
    below = text.partition(f"{heading}\n")[2].splitlines()[1:]
    rows = below[: next((i for i, line in enumerate(below) if not line.startswith("|")), len(below))]
    assert rows, heading
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def named(name):
    """`function` of drpo.py, or `module.function` of toy_env.py or tools/ -> the function."""
    module, _, function = name.rpartition(".")
    module = importlib.import_module({"": "drpo", "toy_env": "toy_env"}.get(module, f"tools.{module}"))
    return getattr(module, function)


# Both tables, row by row: `function`: `fragment`
LINES = [here for heading in ("| Algorithm 1 | drpo.py |", "| paper | here |") for _, here in table(PAPER, heading)]


@pytest.mark.parametrize("here", LINES)
def test_a_line_of_the_paper_is_done_by_the_line_of_code_that_stands_beside_it(here):
    function, fragment = re.fullmatch(r"`([\w.]+)`: `([^`]+)`", here).groups()
    assert any(fragment in line for line in inspect.getsource(named(function)).splitlines()), f"{function}: {fragment}"


def test_algorithm_1_is_told_from_its_input_to_its_last_line():
    begins = [paper.partition(" ")[0] for paper, _ in table(PAPER, "| Algorithm 1 | drpo.py |")]
    assert [word.rstrip(":") for word in begins if word.endswith(":")] == ["input", "1", "2", "3", "4", "5", "6"]


def test_the_functions_that_the_header_of_drpo_py_names_exist():
    lines = drpo.__doc__.partition("where each line is:")[2].partition("How one row stands")[0].strip().splitlines()
    found = [re.split(r" {2,}", line.strip())[-1] for line in lines]
    assert len(found) == 7
    for name in re.findall(r"[a-z][a-z_]+", re.sub(r"lines 3 - 6:", "", " ".join(found))):
        assert callable(getattr(drpo, name)), name


def test_table_5_states_the_settings_that_are_the_defaults():
    settings, seen = vars(drpo.parse(["--preset", "tldr"])[1]), []
    for item, paper, here in table(PAPER, "| Table 5 of the paper | value | setting here |"):
        pairs = re.findall(r"`(\w+)` ([^\s,;]+)", here)
        assert pairs and len(pairs) == here.count("`") // 2, item  # no setting without its value
        for name, value in pairs:
            assert settings[name] == (value if isinstance(settings[name], str) else float(value)), name
            assert value.rpartition("/")[2].lower() in re.split(r"[;,\s]+", paper.lower()), f"{name}: {paper}"
        seen += [name for name, _ in pairs]
    assert len(seen) == len(set(seen)) > 20


class Parser(Exception):
    """Carries the parser out of a command, and ends the command."""


def options(command):
    """The flags of drpo.py, toy_env.py or tools.NAME; with those of drpo.py, where the rest is left to that."""

    def strict(parser, *_, **__):
        raise Parser(parser, False)

    def lenient(parser, *_, **__):
        raise Parser(parser, True)

    module = importlib.import_module(command.removesuffix(".py"))
    with (
        mock.patch.multiple(argparse.ArgumentParser, parse_args=strict, parse_known_args=lenient),
        mock.patch("sys.path", [*sys.path]),
        pytest.raises(Parser) as found,
    ):
        drpo.parse([]) if module is drpo else module.main()
    parser, leaves_the_rest = found.value.args
    flags = {flag for flag in parser._option_string_actions if flag.startswith("--")}
    return flags | options("drpo.py") if leaves_the_rest and module is not drpo else flags


FLAG = r"(?<![\w-])--[a-z]\w*"
COMMAND = re.compile(r"(?:python |nproc_per_node \d+ |`)(?:-m )?(drpo\.py|toy_env\.py|tools\.\w+)([^\n`]*)")


def test_every_tool_that_a_command_names_is_a_module():
    tools = set(re.findall(r"-m (tools\.\w+)", README))
    assert len(tools) > 7
    assert [name for name in tools if not importlib.util.find_spec(name)] == []


def test_every_flag_of_a_command_is_one_that_the_command_takes():
    flags = [(command, flag) for command, rest in COMMAND.findall(README) for flag in re.findall(FLAG, rest)]
    assert len(flags) > 50
    known = {command: options(command) for command, _ in flags}
    assert [pair for pair in flags if pair[1] not in known[pair[0]]] == []


@pytest.mark.parametrize("section", SECTIONS)
def test_every_flag_in_the_text_is_one_of_drpo_py_or_of_a_command_of_its_section(section):
    text = re.sub(COMMAND, "", re.sub(r"^    .*", "", SECTIONS[section], flags=re.M))
    commands = {"drpo.py", *(command for command, _ in COMMAND.findall(SECTIONS[section]))}
    known = set().union(*map(options, commands))
    flags = re.findall(FLAG, " ".join(re.findall(r"`--[^`]*`", text)))
    assert [flag for flag in flags if flag not in known] == []


def test_every_link_image_and_path_leads_to_a_file():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    paths = re.findall(r"`((?:results|notebooks|tests)/[\w./-]*|tools/\w+\.py)`", README)
    assert len(links) > 15 and len(paths) > 5
    assert [path for path in links + paths if not (ROOT / path).exists()] == []


def test_the_section_on_tools_names_all_of_them():
    named_there = set(re.findall(r"`(\w+)`", SECTIONS["Files"]))
    assert {path.stem for path in (ROOT / "tools").glob("*.py")} <= named_there


# What the troubleshooting table says of each planted mistake, from its metrics and those of the healthy run
QUOTED = {
    "right_padding": lambda log, healthy: [
        f"at most {max(log['score']):.2f}",
        f"healthy {max(healthy['score']):.2f}",
        f"`kl` {log['kl'][-1]:.2f} in the last, healthy {healthy['kl'][-1]:.2f}",
    ],
    "score_at_padding": lambda log, healthy: [f"{log['score'][0]:.2f}, healthy {healthy['score'][0]:.2f}"],
    "reward_on_padding": lambda log, healthy: [
        f"at best {max(log['explained_variance']):.1f}",
        f"{healthy['explained_variance'][0]:.1f} at first, then up to {max(healthy['explained_variance']):.1f}",
    ],
    "trained_reference": lambda log, healthy: [
        f"`kl` exactly {max(map(abs, log['kl'])):g} in every update",
        f"healthy up to {max(healthy['kl']):.2f}",
    ],
    "no_resets": lambda log, healthy: [f"`reset_share` {max(log['reset_share']):.0f}"],
}


@pytest.mark.parametrize("mistake", QUOTED)
def test_troubleshooting_quotes_what_the_planted_mistake_did(mistake):
    def read(name):
        lines = [json.loads(line) for line in (ROOT / "results" / "planted" / f"{name}.jsonl").read_text().splitlines()]
        return {key: [line[key] for line in lines] for key in lines[0]}

    rows = "".join(row for row in SECTIONS["Troubleshooting by symptom"].splitlines() if f"`{mistake}`" in row)
    for quoted in QUOTED[mistake](read(mistake), read("healthy")):
        assert quoted.replace("-", "−") in rows, quoted


def test_what_stops_a_planted_mistake_is_as_troubleshooting_says():
    stopped = json.loads((ROOT / "results" / "planted" / "stopped.json").read_text())
    rows = SECTIONS["Troubleshooting by symptom"].splitlines()
    signs = {
        "right_padding": "`--check_rollouts` stops it",
        "score_at_padding": "the check on references stops it",
        "no_resets": "the check on resets stops",
        "trained_reference": "nothing stops it",
        "reward_on_padding": "nothing stops it",
    }
    for mistake, sign in signs.items():
        assert any(f"`{mistake}`" in row and sign in row for row in rows), mistake
        assert (stopped[mistake] is None) == (sign == "nothing stops it")


# ------------------------------------------------------------------------------------------------- figures in the tables

TOY, REAL, COSTS = (SECTIONS[name] for name in ("Results on the toy corpus", "A real run on real text", "What a run costs"))


def report_of(run):
    return json.loads((ROOT / "results" / run / "report.json").read_text())


def row_of(text, heading, first):
    """The row of the table below `heading` whose first cell begins with `first`, without that cell; a hyphen for each minus
    and dash."""
    row = next(cells for cells in table(text, heading) if cells[0].split(" (")[0] == first)
    return [cell.replace("−", "-").replace("–", "-") for cell in row[1:]]


def found(win_rate):
    """How many seeds have found the full summary."""
    return f"{sum(value >= report.FOUND for value in win_rate['values'])}/{win_rate['n']}"


def mean_and_range(stats):
    return f"{stats['mean']:.3f} ({stats['min']:.3f}-{stats['max']:.3f})"


def interval(stats):
    return "[{:.3f}, {:.3f}]".format(*t_interval(stats))


def win_rates(run):
    methods = report_of(run)["methods"]
    return [methods[name]["win_rate"] if name in methods else None for name in report.RL]  # of PPO, of DR-PO


def test_the_first_run_ends_as_it_is_printed():
    tiny = report_of("tiny")
    lines = report.table(report.method_rows(tiny["methods"], report.IN_TERMINAL, ["win_rate"])).splitlines()
    seconds = {report.METHODS.get(stage, "RM"): taken for stage, taken in tiny["seconds"].items()}
    each = ", ".join(f"{name} {taken:.0f}" for name, taken in seconds.items())
    for line in [*lines, f"seconds: {each}; in all {sum(seconds.values()):.0f}"]:
        assert line.rstrip() in SECTIONS["What you will see"], line


@pytest.mark.parametrize("method", report.METHODS)
def test_the_table_of_the_gate_is_that_of_its_report(method):
    figures, heading = report_of("gate")["methods"][method], next(line for line in TOY.splitlines() if "mean ± std" in line)
    win, row = figures["win_rate"], row_of(TOY, heading, report.METHODS[method])
    assert row[0] == f"{win['mean']:.3f} ± {win['std']:.3f} ({win['min']:.3f}-{win['max']:.3f})"
    assert row[1:3] == [interval(win), found(win)]
    assert [float(cell) for cell in row[3:]] == [
        round(figures[key]["mean"], places) + 0.0 for key, places in (("rm_score", 2), ("kl", 1), ("eos_rate", 2))
    ]


def test_what_rounding_moves_on_the_gate_is_as_the_text_says():
    text, changed, largest = " ".join(TOY.split()), [], []
    for one, other in zip(win_rates("gate"), win_rates("gate_rounding")):
        pairs = list(zip(one["values"], other["values"], strict=True))
        largest.append(max(abs(a - b) for a, b in pairs))
        changed.append(sum((a >= report.FOUND) != (b >= report.FOUND) for a, b in pairs))
    ppo, drpo = [f"{each['mean']:.3f} ({found(each)})" for each in win_rates("gate_rounding")]
    assert f"gave PPO {ppo} and DR-PO {drpo}" in text
    assert f"by up to {largest[0]:.2f} under PPO" in text and f"by up to {largest[1]:.2f} under DR-PO" in text
    assert changed == [3, 1] and "where three of six seeds changed sides of 0.30" in text and "where one did" in text


def test_how_often_the_full_summary_was_found_is_as_the_text_says():
    runs, text = [win_rates(run) for run in ("gate", "gate_lr2e-4", "gate_lr4e-4")], " ".join(TOY.split())
    pairs = [pair for ppo, drpo in runs for pair in zip(ppo["values"], drpo["values"], strict=True)]
    ppo, drpo = [sum(value >= report.FOUND for value in values) for values in zip(*pairs)]
    assert f"in {drpo} of {len(pairs)} runs, PPO in {ppo}, once where DR-PO did not" in text
    assert sum(ppo >= report.FOUND > drpo for ppo, drpo in pairs) == 1
    ends = [drpo - ppo for ppo, drpo in zip(*[each["values"] for each in runs[0]]) if ppo >= report.FOUND]
    assert sorted(round(end, 2) for end in ends)[0] == -0.10 and sum(abs(end) < 0.03 for end in ends) == 3 and len(ends) == 4


@pytest.mark.parametrize("run, lr", [("gate", "1e-4"), ("gate_lr2e-4", "2e-4"), ("gate_lr4e-4", "4e-4")])
def test_the_table_of_learning_rates_is_that_of_the_reports(run, lr):
    result, heading = report_of(run), next(line for line in TOY.splitlines() if line.startswith("| learning rate | PPO"))
    ppo, drpo = win_rates(run)
    difference = spread([ours - theirs for ours, theirs in zip(drpo["values"], ppo["values"])])
    row = row_of(TOY, heading, lr)
    assert row[:4] == [mean_and_range(ppo), found(ppo), mean_and_range(drpo), found(drpo)]
    assert row[4] == f"{difference['mean']:+.3f} {interval(difference)}" and f"results/{run}/" in row[5]
    assert result["settings"]["lr"] == float(lr)


@pytest.mark.parametrize("run", ["ppo", "beta_0.25", "beta_0.5", "gate", "beta_0.75", "beta_1", "beta_1_prompt"])
def test_the_table_of_the_ablation_is_that_of_the_reports(run):
    heading = next(line for line in TOY.splitlines() if line.startswith("| β |"))
    folder = "gate" if run == "ppo" else run  # beta = 0
    result = report_of(folder)
    beta = f"{result['settings']['beta']:g}" + ", prefixes of 0..n" * result["settings"]["reset_include_prompt"]
    row, figures = row_of(TOY, heading, "0" if run == "ppo" else beta), result["methods"]["ppo" if run == "ppo" else "drpo"]
    assert row[:2] == [mean_and_range(figures["win_rate"]), found(figures["win_rate"])] and f"results/{folder}/" in row[4]
    assert [float(cell) for cell in row[2:4]] == [round(figures["rm_score"]["mean"], 2), round(figures["kl"]["mean"], 1)]


@pytest.mark.parametrize(
    "run, other, quoted",
    [("beta_1", "gate", "−{:.3f} against β = 0.6"), ("beta_1_prompt", "beta_1", "+{:.3f}")],
)
def test_the_differences_beside_the_ablation_are_those_of_the_reports(run, other, quoted):
    one, two = [win_rates(each)[1]["values"] for each in (run, other)]
    difference, text = spread([a - b for a, b in zip(one, two, strict=True)]), " ".join(TOY.split())
    assert quoted.format(abs(difference["mean"])) in text and interval(difference).replace("-", "−") in text


def test_below_beta_1_no_two_rows_of_the_ablation_differ_significantly():
    rows = [win_rates("gate")[0], *[win_rates(run)[1] for run in ("gate", "beta_0.25", "beta_0.5", "beta_0.75")]]
    for one, two in itertools.combinations([row["values"] for row in rows], 2):
        low, high = t_interval(spread([a - b for a, b in zip(one, two, strict=True)]))
        assert low < 0 < high


@pytest.mark.parametrize("method", report.METHODS)
def test_the_table_of_the_real_run_is_that_of_its_report(method):
    figures, heading = report_of("smollm2")["methods"][method], next(line for line in REAL.splitlines() if "| at equal" in line)
    row = row_of(REAL, heading, report.METHODS[method])
    for cell, key, places in zip(row, ("win_rate", "lc_win_rate", "rm_score"), (3, 3, 2)):
        assert cell == f"{figures[key]['mean']:.{places}f} ± {figures[key]['std']:.{places}f}"


def test_the_plans_are_those_that_bench_prints(capsys):
    bench.main(["--plan"])
    assert capsys.readouterr().out.strip() in COSTS


def test_what_the_plan_says_of_the_papers_model_on_24_gb_is_what_bench_plans():
    def gb(lora_r, micro_batch, checkpointing):
        return bench.plan(bench.PYTHIA["2.8b"], lora_r, micro_batch, 512, 53, checkpointing=checkpointing)["peak"] / 1e9

    text = " ".join(COSTS.split())
    assert [f"{gb(1024, rows, True):.1f}" for rows in (1, 4)] == 2 * ["24.3"] and gb(1024, 8, True) > 24.3
    assert "The paper's rank 1024 needs 24.3 GB there with checkpointing at any micro-batch up to 4" in text
    assert f"micro-batch of 4 needs {gb(64, 4, False):.1f} GB without checkpointing and {gb(64, 4, True):.1f} GB with" in text


@pytest.mark.parametrize("file, first", [("peers", 0), ("peers_tuned", 1)])
def test_the_table_of_times_is_that_of_the_bench(file, first):
    rows = table(COSTS, next(line for line in COSTS.splitlines() if line.startswith("| shape, allocator |")))[first::2]
    measured = json.loads((ROOT / "results" / "bench" / f"{file}.json").read_text())
    for row, one in zip(rows, measured.values(), strict=True):
        ratio = {name: ours / official for name, (official, ours) in one.items()}
        phases = ", ".join(f"{phase} {ratio[f'CPU s, {phase}']:.2f}" for phase in drpo.PHASES)
        assert row[1:3] == [f"{seconds:.1f}" for seconds in one["CPU s"]]
        assert row[3] == f"{ratio['CPU s']:.2f} ({phases})"
        assert row[4] == " / ".join(f"{gb:.2f}" for gb in one["peak GB"])
        assert row[5] == f"{ratio['row-steps, ours at beta 0 and 1']:.2f}"
