"""Whatever the rows and the settings: a stage works, or it ends with status 2 and one line. Never a traceback."""

import contextlib
import io
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

import drpo
from tools import data

relaxed = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
anything = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
text = some.text(some.characters(), max_size=60)  # of all of Unicode, halves of surrogate pairs included
fields = some.sampled_from(
    ["prompt", "reference", "chosen", "rejected", "summary", "info", "summaries", "choice", "query", "messages"]
)
row = some.dictionaries(fields, text | anything, max_size=4)
ROWS = []


def rows():
    return ROWS


def outcome(function, *arguments):
    """-> what the function gives, or None where it ended cleanly; anything else that is raised comes through."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            return function(*arguments)
        except SystemExit as ended:
            assert ended.code == 2
    lines = [line for line in said.getvalue().splitlines() if line.startswith("drpo.py: ")]
    assert len(lines) == 1 and "Traceback" not in said.getvalue()
    return None


@relaxed
@given(some.lists(row | anything, max_size=6), some.sampled_from(["reference", "pairs"]))
def test_rows_of_any_kind_are_read_or_refused(new, kind):
    ROWS[:] = new
    drpo.load_rows.cache_clear()
    splits = outcome(drpo.load_rows, "test_fuzz:rows", kind, 0)
    for part in splits or []:
        assert part
        for kept in part:
            assert all(
                kept[name].strip()
                for name in (("prompt", "reference") if kind == "reference" else ("prompt", "chosen", "rejected"))
            )


@relaxed
@given(row)
def test_a_row_of_no_known_layout_raises_what_its_reader_names(new):
    with contextlib.suppress(TypeError, AttributeError, KeyError, IndexError):
        assert isinstance(data.read_row(new), dict)


NAMES = [f"--{name}" for name in vars(drpo.parse(["sft"])[1]) if name not in ("run_dir", "seeds", "device", "preset")]
word = some.sampled_from(["", "0", "1", "-1", "0.5", "1e9", "nan", "inf", "-inf", "true", "reference", "api:x"]) | some.text(
    max_size=8
)


@relaxed
@given(some.lists(some.tuples(some.sampled_from(NAMES), word), max_size=4))
def test_settings_of_any_kind_are_taken_or_refused(pairs):
    argv = ["sft", *[part for name, value in pairs for part in (name, value)]]
    parsed = outcome(drpo.parse, argv)
    for value in vars(parsed[1]).values() if parsed else []:
        assert not isinstance(value, float) or math.isfinite(value)


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    some.lists(some.fixed_dictionaries({"prompt": text, "reference": text}), min_size=1, max_size=4),
    some.sampled_from(
        [
            ("query_length", 1),
            ("query_length", 7),
            ("response_length", 2),
            ("response_length", 9),
            ("micro_batch", 1),
            ("sft_batch_size", 1),
            ("eval_temperature", 0.001),
            ("supervised_lora_r", 2),
            ("seed", 5),
            ("max_grad_norm", 0.1),
        ]
    ),
)
def test_a_stage_on_any_texts_works_or_ends_cleanly(tmp_path_factory, new, one):
    ROWS[:] = new
    drpo.load_rows.cache_clear()
    run = tmp_path_factory.mktemp("fuzz")
    name, value = one
    outcome(
        drpo.main,
        [
            "sft",
            "--dataset",
            "test_fuzz:rows",
            "--sft_steps",
            "1",
            "--sft_batch_size",
            "3",
            "--eval_samples",
            "2",
            f"--{name}",
            str(value),
            "--run_dir",
            str(run),
        ],
    )
    if (run / "sft" / "result.json").exists():
        assert math.isfinite(json.loads((run / "sft" / "result.json").read_text())["held_out_loss"])
