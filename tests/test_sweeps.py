"""Experiments of many runs, the sweep over the toy corpus, and the tables that README and docs take from results/."""

from unittest.mock import Mock

import pytest
import torch

import drpo
import toy_env
import toy_text
from tools import experiment, tables, text_sweep


def square(task):
    return {"square": task["x"] ** 2}


def test_an_experiment_resumes_what_is_missing(tmp_path):
    path, groups = tmp_path / "out" / "runs.jsonl", [[{"x": 1, "kind": {"a": []}}, {"x": 2}], [{"x": 3}]]
    path.parent.mkdir()
    path.write_text('{"x": 5, "square": 25}\n{"x": 2, "square": "kept"}\n{"x": 3, "squ')  # the last was cut off
    runs = experiment.carry_out(square, groups, path, jobs=2)
    assert [run["square"] for run in runs] == [1, "kept", 9]
    assert len(path.read_text().splitlines()) == 5
    assert sorted(run["x"] for run in experiment.read(path)) == [1, 2, 3, 5]


def test_ctrl_c_ends_experiments_in_one_line(tmp_path, one_line, monkeypatch):
    for way in ("starmap", "apply_async"):
        monkeypatch.setattr(f"multiprocessing.pool.Pool.{way}", Mock(side_effect=KeyboardInterrupt))
    path = tmp_path / "runs.jsonl"
    line = one_line([], status=130, main=lambda _: experiment.carry_out(square, [[{"x": 1}]], path, jobs=1))
    assert "the same command resumes" in line
    with pytest.raises(SystemExit, match="130"):
        toy_env.main(["--quick", "--out", str(tmp_path)])


@pytest.mark.parametrize("part", text_sweep.PARTS)
def test_all_flags_of_a_sweep_are_settings(part):
    for stage, flags, *others in text_sweep.PARTS[part].values():
        for words in (flags, *others):
            s = drpo.parse([stage, *words.split()])[1]
            assert drpo.resolve(s.dataset) and drpo.resolve(s.model)


def test_reward_models_are_a_quarter_the_same_and_fourfold():
    policy, sizes = toy_text.tiny_pythia().num_parameters(), []
    for make in (text_sweep.quarter, text_sweep.llama, text_sweep.fourfold):
        network = make(seed=0)
        assert network(torch.arange(5)[None]).logits.shape == (1, 5, 600)
        sizes.append(network.num_parameters() / policy)
    assert sizes == pytest.approx([0.25, 1.0, 4.0], rel=0.05)


def test_a_stage_that_stops_says_why_in_the_sweep(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="ppo needs .*sft"):
        text_sweep.train("ppo", tmp_path, 0, "")
    monkeypatch.setattr(drpo, "step", lambda optimizer, s, where, batch: drpo.stop(f"{where}: not finite", 3))
    with pytest.raises(RuntimeError, match="sft update 1: not finite"):  # below a bar of progress
        text_sweep.train("sft", tmp_path, 0, "")


def test_a_run_has_found_the_summary_at_one_half():
    def line(name, seed, full, win):
        zeros = dict.fromkeys(("coverage", "gold", "rm_score", "kl", "tokens", "rm_accuracy", "seconds"), 0.0)
        return {"run": name, "seed": seed, "full": full, "win_rate": win, **zeros}

    lines = [line("PPO", 1, 0.0, 0.2), line("PPO", 2, 0.49, 0.4), line("DR-PO", 1, 0.5, 0.6), line("DR-PO", 2, 0.9, 0.7)]
    results = text_sweep.summarise("table", {(x["run"], x["seed"]): x for x in lines})
    assert [results[name]["found"] for name in ("PPO", "DR-PO")] == [0, 2]
    assert results["DR-PO"]["found_ci95"] == pytest.approx([0.025**0.5, 1.0], abs=1e-6)  # p^2 = 0.025
    gap = results["DR-PO"]["win_rate minus PPO"]  # 0.4 and 0.3: mean 0.35, sd 0.0707, t = 12.706
    assert gap["mean"] == pytest.approx(0.35) and gap["ci95"][0] == pytest.approx(0.35 - 12.706 * 0.05, abs=1e-3)


@pytest.mark.parametrize("part", text_sweep.FIGURES)
def test_committed_rows_can_be_drawn(part, tmp_path):
    rows = text_sweep.read(tables.RESULTS / ("other_processor" if part == "coverage" else "text"), part)
    text_sweep.FIGURES[part](rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_tables_in_readme_and_docs_are_those_of_the_files():
    for name in tables.PAGES:
        page = (tables.ROOT / name).read_text(encoding="utf-8")
        assert page == tables.rewrite(page), "run: python -m tools.tables"
