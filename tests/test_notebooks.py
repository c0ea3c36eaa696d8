"""The notebooks run again to the figures that they are saved with. The mistakes that tools/planted.py plants are real ones."""

import json
import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

import drpo
from tools import planted

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def key_figures(notebook):  # the JSON that the last code cell prints
    return json.loads(code_cells(notebook)[-1].outputs[0].text)


def alike(new, old):
    """Same keys, lengths, whole numbers and texts; other numbers to 5 % or 0.05: another processor may round differently."""
    if isinstance(old, dict):
        return new.keys() == old.keys() and all(alike(new[key], old[key]) for key in old)
    if isinstance(old, list):
        return len(new) == len(old) and all(map(alike, new, old))
    return new == (pytest.approx(old, rel=0.05, abs=0.05) if isinstance(old, float) else old)


@pytest.mark.slow
@each_notebook
def test_a_fresh_run_gives_the_committed_key_figures(path):
    notebook, committed = [nbformat.read(path, as_version=4) for _ in range(2)]
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert alike(key_figures(notebook), key_figures(committed))


@each_notebook
def test_a_committed_notebook_ran_in_order_without_error(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for output in [output for cell in cells for output in cell.outputs]:
        assert output.output_type != "error" and output.get("name") != "stderr", output
        shown = str([output.get("text", ""), *(x for kind, x in output.get("data", {}).items() if kind.startswith("text/"))])
        assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr|opt|Users)/|[A-Z]:\\", shown), shown
    assert path.stat().st_size < 1e6 and all(cell.outputs for cell in cells)


# ---- Planted mistakes --------------------------------------------------------------------------------------
def test_mistakes_show_in_a_self_check_or_a_metric(small_run, tmp_path):
    planted.main([f"--run={small_run}", f"--out={tmp_path}", "--updates=2", "--beta=1", "--batch_size=16"])
    logs = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.glob("*.jsonl")}
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    committed = json.loads((ROOT / "results/planted/stopped.json").read_text())
    assert logs.keys() == stopped.keys() == planted.PLANTS.keys() == committed.keys()
    assert all(len(log) == 2 and not any("seconds" in key for line in log for key in line) for log in logs.values())
    assert drpo.stop is planted.stop and drpo.twin is planted.twin  # all is as it was
    caught = {name: line for name, line in stopped.items() if line and name != "score_at_padding"}
    assert caught.keys() == {"no_resets", "scorer_temperature"}
    assert "resets" in caught["no_resets"] and "policy differs" in caught["scorer_temperature"]
    first, second = [{name: log[i] for name, log in logs.items()} for i in (0, 1)]
    assert first["no_resets"]["reset_share"] == 0 and first["healthy"]["reset_share"] == 1
    assert second["trained_reference"]["kl"] == 0 != second["healthy"]["kl"]
    tokens = [first[name]["tokens_decoded"] / first[name]["response_tokens"] for name in ("healthy", "prefix_trained")]
    assert tokens[0] < 16 == tokens[1]
    assert abs(first["scorer_temperature"]["ratio"] - 1) > 1e-3
    assert first["sampler_temperature"]["score"] != first["healthy"]["score"]
