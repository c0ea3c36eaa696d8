"""The notebooks: what is committed was run, and runs again to the same figures. tools/planted.py: the mistakes are real."""

import json
import re
from contextlib import nullcontext
from unittest import mock

import nbformat
import pytest
import torch

import drpo
import toy_env
from tools import notebooks, planted, resets

PATHS = sorted((notebooks.ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def key_figures(notebook):
    """The JSON that the last code cell prints."""
    return json.loads(code_cells(notebook)[-1].outputs[0].text)


def alike(new, old):
    """Same keys, lengths, whole numbers and texts; other numbers to 5 % or 0.05, as far as another processor may round them."""
    if isinstance(old, dict):
        return new.keys() == old.keys() and all(alike(new[key], old[key]) for key in old)
    if isinstance(old, list):
        return len(new) == len(old) and all(map(alike, new, old))
    return new == (pytest.approx(old, rel=0.05, abs=0.05) if isinstance(old, float) else old)


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_from_top_to_bottom_and_its_key_figures_are_those_committed(path):
    assert alike(key_figures(notebooks.execute(path)), key_figures(nbformat.read(path, as_version=4)))


def test_key_figures_that_differ_are_not_alike():
    old = {"solved": {"0.0": 0}, "value": 0.98, "lengths": [7, 0]}
    assert alike({"solved": {"0.0": 0}, "value": 0.97, "lengths": [7, 0]}, old)
    for new in ({"solved": {"0.0": 1}}, {"value": 0.8}, {"lengths": [7, 1]}, {"lengths": [7]}, {"more": 1}):
        assert not alike({**old, **new}, old)


@each_notebook
def test_committed_notebooks_were_run_in_order_without_an_error_and_name_no_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert cell.outputs, cell.source
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", output
            texts = [str(x) for kind, x in output.get("data", {}).items() if kind.startswith("text/")]
            shown = output.get("text", "") + "".join(texts)
            assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr|opt|Users)/|[A-Z]:\\", shown), shown
    assert path.stat().st_size < 1e6
    assert notebook.metadata == notebooks.METADATA and all(cell.metadata == {} for cell in notebook.cells)


@each_notebook
def test_a_notebook_begins_with_what_it_shows_and_what_it_takes(path):
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "no GPU" in first.source and re.search("second|minute", first.source)


def test_a_name_that_begins_no_notebook_ends_with_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as ended:
        notebooks.main(["nowhere"])
    assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------- planted mistakes


def planting(name):
    return mock.patch.multiple(drpo, **planted.PLANTS[name]) if planted.PLANTS[name] else nullcontext()


def test_every_plant_replaces_functions_that_drpo_calls_and_the_healthy_run_replaces_none():
    assert planted.PLANTS["healthy"] == {}
    for plant in planted.PLANTS.values():
        for function, replacement in plant.items():
            assert callable(getattr(drpo, function)) and getattr(drpo, function) is not replacement
    assert planted.PLANTS.keys() == json.loads((notebooks.ROOT / "results/planted/stopped.json").read_text()).keys()


def test_right_padding_moves_the_padding_behind_the_prompt_and_nothing_else():
    queries, responses = [[5, 6, 7], [8]], [[1], [2, 3]]
    good = drpo.padded(queries, responses, 0, "cpu")
    with planting("right_padding"):
        wrong = drpo.padded(queries, responses, 0, "cpu")
    assert good["query"].tolist() == [[5, 6, 7], [0, 0, 8]] and wrong["query"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert wrong["query_mask"].tolist() == [[True, True, True], [True, False, False]]
    assert all((wrong[name] == good[name]).all() for name in ("response", "response_len"))


def test_the_trained_reference_moves_with_the_policy_and_the_reward_model_stays():
    network = toy_env.tiny_pythia()
    with planting("trained_reference"):
        (policy, reference), (critic, reward) = drpo.twin(network, 0), drpo.twin(toy_env.tiny_pythia(1).base_model, 0)
    for trained in (policy, critic):
        for p in trained.parameters():
            p.data += 1
    with reference() as frozen, reward() as scoring:
        assert all((p == q).all() for p, q in zip(policy.parameters(), frozen.parameters(), strict=True))
        assert all((p != q).any() for p, q in zip(critic.parameters(), scoring.parameters(), strict=True))


def test_the_score_at_padding_differs_just_where_there_is_padding():
    backbone, head = toy_env.tiny_pythia().base_model.eval(), drpo.scalar_head(torch.arange(128.0)[None])
    batch = drpo.padded([[5, 6], [7, 8]], [[9, 10, 0], [11, 0]], 0, "cpu")
    with torch.no_grad():
        good = drpo.end_scores(backbone, head, batch)
        with planting("score_at_padding"):
            wrong = drpo.end_scores(backbone, head, batch)
    assert abs(wrong[0] - good[0]) < 1e-3 < abs(wrong[1] - good[1])


def test_the_reward_on_padding_reaches_gae_only_in_rows_that_fill_the_width():
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1]])
    with planting("reward_on_padding"):
        scores, logprobs, ref_logprobs = torch.tensor([2.0, 3.0]), torch.full((2, 4), -1.0), torch.full((2, 4), -2.0)
        rewards = drpo.penalised_rewards(scores, logprobs, ref_logprobs, mask, 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[0, -0.1, -0.1, 2.0], [0, -0.1, -0.1, 2.9]]))
    _, returns = drpo.gae(rewards, torch.zeros(2, 4), mask, 1.0, 1.0)
    torch.testing.assert_close(returns[:, 1], torch.tensor([-0.2, 2.7]))


def test_without_resets_every_prefix_is_empty_whatever_beta():
    with planting("no_resets"):
        assert drpo.sample_reset_lengths(torch.tensor([4, 9]), 1.0, drpo.generator(0), False).tolist() == [0, 0]


SMALL = [
    "--sft_steps=2",
    "--rm_steps=2",
    "--sft_batch_size=2",
    "--rm_batch_size=2",
    "--eval_samples=2",
    "--response_length=12",
    "--updates=2",
    "--batch_size=32",
]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run folder with an SFT and a reward model that have hardly been trained."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(notebooks.ROOT)
        for stage in ("sft", "rm"):
            drpo.main([stage, f"--run_dir={folder}", *SMALL])
    return folder


@pytest.mark.slow
def test_a_planted_run_says_what_stops_it_goes_on_and_logs_no_clock(small_run, one_thread):
    _, s = drpo.parse(["drpo", f"--run_dir={small_run}", *SMALL])
    assert planted.train("healthy", s)[1] is None
    log, said = planted.train("no_resets", s)
    assert said == "resets do not happen as often as beta says" and len(log) == 2
    assert all(line["reset_share"] == 0 and "seconds" not in line and "tokens_per_second" not in line for line in log)
    assert drpo.stop is planted.stop  # all is as it was


@pytest.mark.slow
def test_rollouts_from_resets_are_kept_as_prefix_of_the_reference_and_continuation(small_run, one_thread):
    resets.main([str(small_run), "--rows=20", *SMALL])
    _, s = drpo.parse(["drpo", f"--run_dir={small_run}", *SMALL])
    lines = [json.loads(line) for line in (small_run / "resets.jsonl").read_text().splitlines()]
    assert len(lines) == 20 and 0 < sum(line["prefix"] != "" for line in lines) < 20  # beta is 0.6
    for line in lines:
        assert (" " + line["reference"]).startswith(line["prefix"])
        assert line["sft"]["eos"] or line["sft"]["score"] == s.missing_eos_score
    assert any(line["sft"]["continuation"] for line in lines)
    with pytest.raises(SystemExit) as ended:
        resets.main([str(small_run), "--rows=33", *SMALL])
    assert ended.value.code == 2
