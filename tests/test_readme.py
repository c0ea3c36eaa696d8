"""README.md, held to the code: the functions, lines, settings, flags, paths and figures that it names are there."""

import argparse
import importlib
import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path
from unittest import mock

import pytest

import drpo

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
        f"{log['entropy'][0]:.2f} at update 1, healthy {healthy['entropy'][0]:.2f}",
    ],
    "score_at_padding": lambda log, healthy: [f"{log['score'][0]:.2f}, healthy {healthy['score'][0]:.2f}"],
    "reward_on_padding": lambda log, healthy: [
        f"at best {max(log['explained_variance']):.1f}",
        f"({min(log['kl']):.2f} in",
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
