"""tools/report.py on small made-up run folders, with numbers worked by hand."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.figure
import pytest

from tools import report

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "dataset": "toy_env:gate",
    "preset": "tiny",
    "eval_samples": 600,
    "eval_temperature": 0.01,
    "temperature": 0.7,
    "batch_size": 48,
    "judge": "toy_env:gold_judge",
}


def make_run(folder, win_rates, seed=0, accuracy=0.7, score=(0.0, 1.0), **settings):
    """A finished run with these {method: win rate} on four prompts; PPO and DR-PO logged these scores, one an update."""
    folder.mkdir(parents=True)
    (folder / "eval.json").write_text(
        json.dumps(
            {
                "rm": {"accuracy": accuracy, "accuracy_by_batch": {"all": {"right": round(10 * accuracy), "pairs": 10}}},
                "sft": {"held_out_loss": 2.0, "rouge_l": 0.3},
                "settings": {**SETTINGS, "run_dir": str(folder), "seed": seed, **settings},
                "seconds": {"sft": 5.0, "rm": 7.0, "drpo": 30.0},
            }
        )
    )
    samples = [
        {"prompt": f"POST: number {i}\n\nTL;DR:", "reference": f"told {i}"}
        | {
            name: {
                "response": f"{name} says {i}",
                "win_rate": rate,
                "rm_score": 1.0 + (i > 1),
                "kl": 2.5,
                "kl_rm_score": i,
                "rouge_1": 0.3,
                "rouge_2": 0.1,
                "rouge_l": i / 10,
                "response_tokens": 9 + i // 2,
                "eos_rate": int(i > 0),
            }
            for name, rate in win_rates.items()
        }
        for i in range(4)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    keys = {
        "kl": 0.5,
        "response_tokens": 9.0,
        "eos_rate": 0.5,
        "entropy": 1.0,
        "explained_variance": 0.2,
        "tokens_decoded": 100,
    }
    logs = {"sft": [{"loss": 3.0}], "rm": [{"accuracy": 0.6}], "dpo": [{"accuracy": 0.6}]}
    logs |= {name: [{"score": value, **keys} for value in score] for name in ("ppo", "drpo")}
    for stage in {"rm", *win_rates}:
        (folder / stage).mkdir()
        (folder / stage / "result.json").write_text(
            json.dumps({"settings": {"seed": seed, "beta": 0.6, "lr": 1e-4, **settings}})
        )
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logs[stage]))
    return folder


@pytest.fixture
def no_figure(monkeypatch):
    """Drawing takes longer than all the rest; other tests look at the figure."""
    monkeypatch.setattr(report, "draw", lambda *_: None)
    monkeypatch.setattr(report, "draw_frontier", lambda *_: None)


@pytest.fixture
def three_seeds(tmp_path):
    for seed, sft, ppo, drpo, accuracy in [(1, 0.30, 0.1, 0.2, 0.6), (2, 0.29, 0.1, 0.4, 0.7), (10, 0.0, 0.4, 0.6, 0.8)]:
        rates = {"sft": sft, "ppo": ppo, "drpo": drpo}
        make_run(tmp_path / f"seed_{seed}", rates, seed, accuracy, score=(seed, 2 * seed, 0))
    return tmp_path


def row(text, name):
    """The cells of the line of the terminal table that begins with this method."""
    return next(line for line in text.splitlines() if line.startswith(name)).split()


def test_single_run(tmp_path):
    run = make_run(tmp_path / "run", {"drpo": 0.5, "sft": 0.125, "ppo": 0.25})  # in no good order
    text = report.write(run)
    assert [line.split()[0] for line in text.splitlines()[:4]] == ["method", "SFT", "PPO", "DR-PO"]  # no row for DPO
    # Wilson, 2 of 4: (0.5 + z^2 / 8) / (1 + z^2 / 4) = 0.5, half width z sqrt(1/16 + z^2 / 64) / (1 + z^2 / 4) = 0.350
    assert row(text, "DR-PO") == ["DR-PO", "0.500", "[0.150,", "0.850]", "1.50", "2.50", "0.150", "9.5", "0.75"]
    assert "reward model accuracy: 0.700 [0.397, 0.892]" in text  # 7 of 10
    assert "on 4 held-out prompts at sampling temperature 0.01; KL, in nats per response, at temperature 0.7" in text
    assert "seconds: SFT 5, RM 7, DR-PO 30; in all 42" in text
    assert "judge: toy_env:gold_judge\n" in text and "NOT independent" not in text

    page = (run / "report.md").read_text(encoding="utf-8")
    # half widths: 0.98 times the standard deviation over the four prompts, 0.5 of the scores. Of 12 words "drpo says 0" 6
    # differ, of 8 pairs 5; texts that are all longer by the same cannot tell what the win rate at equal length would be
    assert (
        "| DR-PO | 0.500 [0.150, 0.850] | - - | 1.50 [1.01, 1.99] | 2.50 [2.50, 2.50] | 0.300 | 0.100 | 0.150 | 9.5 | 0.75 "
        "| 0.500 | 0.625 |"
    ) in page
    assert "| DR-PO minus PPO | +0.250 | [0.250, 0.250] |" in page  # the same on each prompt
    saved = json.loads((run / "report.json").read_text())
    assert list(saved["methods"]) == ["sft", "ppo", "drpo"] and saved["methods"]["drpo"]["kl"] == 2.5
    assert saved["methods"]["drpo"]["rouge_l_ci95"] == pytest.approx([0.15 - 0.98 * 0.0125**0.5, 0.15 + 0.98 * 0.0125**0.5])
    assert list(saved["differences"]) == ["ppo - sft", "drpo - sft", "drpo - ppo"]
    assert saved["differences"]["drpo - sft"] == {"mean": 0.375, "ci95": [0.375, 0.375], "prompts": 4}
    assert saved["rm"]["accuracy_by_batch"]["all"]["pairs"] == 10 and saved["seconds"]["drpo"] == 30.0
    assert page.count("### Post") == 3 and "told 2" in page and "told 3" not in page
    assert "    reference: told 0\n\n    SFT (win 0.12, RM score 1.00): sft says 0\n\n    PPO (" in page
    assert "](curves.png)" in page and '"eval_temperature": 0.01' in page.partition("<details>")[2]
    assert "](frontier.png)" in page
    assert {(run / name).read_bytes()[:8] for name in ("curves.png", "frontier.png")} == {b"\x89PNG\r\n\x1a\n"}


def test_what_an_api_judge_left_undecided_is_counted_and_left_out(tmp_path, no_figure):
    run = make_run(tmp_path / "run", {"sft": 1.0}, judge="api:some-model")
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for sample, verdict in zip(samples, [1.0, 0.5, None, 0.0]):
        sample["sft"]["win_rate"] = verdict
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    text = report.write(run)
    assert row(text, "SFT")[1] == "0.500" and "of 4 questions: SFT 1 ties, 1 without a verdict and left out" in text
    low, high = json.loads((run / "report.json").read_text())["methods"]["sft"]["win_rate_ci95"]
    assert [low, high] == pytest.approx(report.wilson(1.5, 3))


def test_no_verdict_at_all_is_no_win_rate(tmp_path, capsys):
    run = make_run(tmp_path / "run", {"sft": None}, judge="api:some-model")
    with pytest.raises(SystemExit) as stopped:
        report.main([str(run)])
    assert stopped.value.code == 2 and "no verdict on any response of SFT" in capsys.readouterr().err


def test_the_reward_model_as_judge_is_called_not_independent(tmp_path, no_figure):
    text = report.write(make_run(tmp_path / "run", {"sft": 0.1}, judge="rm"))
    assert "judge: rm, the run's own reward model: NOT independent" in text


def test_a_run_on_a_task_of_the_paper_has_the_papers_table_beside_its_own(tmp_path, no_figure):
    make_run(tmp_path / "one", {"sft": 0.25, "drpo": 0.75}, preset="tldr")
    report.write(tmp_path / "one")
    for seed in (1, 2):
        make_run(tmp_path / "two" / f"seed_{seed}", {"ppo": seed / 2}, seed=seed, preset="cnndm")
    report.write(tmp_path / "two")
    make_run(tmp_path / "toy", {"sft": 0.25})
    report.write(tmp_path / "toy")
    one, two, toy = [(tmp_path / name / "report.md").read_text() for name in ("one", "two", "toy")]
    assert "| DR-PO | here | 0.750 | 1.50 | 2.50 | 0.300 | 0.100 | 0.150 |" in one
    assert "| DR-PO | paper | 0.702 ± 0.017 | 1.52 ± 0.09 | 16.84 ± 0.83 | 0.337 ± 0.018 |" in one
    assert "| PPO | here | 0.750 ± 0.354 |" in two and "| PPO | paper | 0.085 | - | - | 0.236 | 0.123 | 0.186 |" in two
    assert "| PPO | paper" not in one and "paper" not in toy


def test_three_seeds(three_seeds, no_figure):
    text = report.write(three_seeds)
    # 0.2, 0.4, 0.6: std 0.2, and 4.303 * 0.2 / sqrt(3) = 0.497
    assert row(text, "DR-PO")[1:8] == ["0.400", "±", "0.200", "(0.200-0.600)", "[-0.097,", "0.897]", "2/3"]
    assert row(text, "SFT")[7] == "1/3"  # 0.30 counts, 0.29 does not
    # paired by seed: 0.1, 0.3, 0.2, std 0.1, and 4.303 * 0.1 / sqrt(3) = 0.248
    assert (
        "DR-PO minus PPO, paired by seed: +0.200, 95 % t-interval [-0.048, 0.448]; "
        "seed 1: +0.100, seed 2: +0.300, seed 10: +0.200"
    ) in text
    assert "reward model accuracy: 0.700 (0.600-0.800)" in text

    page = (three_seeds / "report.md").read_text(encoding="utf-8")
    assert "| 2 | 0.290 | 0.100 | 0.400 |\n| 10 | 0.000 | 0.400 | 0.600 |" in page
    saved = json.loads((three_seeds / "report.json").read_text())
    assert set(saved) == {"methods", "differences", "seeds", "rm", "settings"}
    assert saved["differences"]["drpo - ppo"]["values"] == pytest.approx([0.1, 0.3, 0.2])
    assert "| DR-PO minus SFT | +0.203 | " in page  # -0.1, 0.11, 0.6
    assert saved["seeds"] == [1, 2, 10] and saved["settings"] == SETTINGS
    wins = saved["methods"]["drpo"]["win_rate"]
    assert wins.pop("values") == [0.2, 0.4, 0.6]
    assert wins == pytest.approx({"mean": 0.4, "std": 0.2, "min": 0.2, "max": 0.6, "n": 3})
    assert saved["methods"]["ppo"]["kl"]["mean"] == 2.5 and saved["rm"]["accuracy"]["mean"] == pytest.approx(0.7)


def test_samples_of_an_older_version_are_named_in_one_line(tmp_path, capsys):
    run = make_run(tmp_path / "run", {"sft": 0.5})
    (run / "samples.jsonl").write_text((run / "samples.jsonl").read_text().replace('"rouge_2"', '"rouge_two"'))
    with pytest.raises(SystemExit) as stopped:
        report.main([str(run)])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and "rouge_2" in err and "python drpo.py eval" in err


def test_seeds_again_after_the_first_report(three_seeds, no_figure):
    first = report.write(three_seeds)
    assert (three_seeds / "report.json").exists() and report.write(three_seeds) == first
    make_run(three_seeds / "seed_11", {"sft": 0.0, "ppo": 0.0, "drpo": 0.8}, 11)
    assert row(report.write(three_seeds), "DR-PO")[1] == "0.500"  # a new seed is taken in


def test_a_method_that_one_seed_lacks(tmp_path, no_figure):
    make_run(tmp_path / "seed_1", {"ppo": 0.1, "drpo": 0.5}, 1)
    make_run(tmp_path / "seed_2", {"ppo": 0.3}, 2)
    text = report.write(tmp_path)
    assert row(text, "PPO")[1:4] == ["0.200", "±", "0.141"]
    assert row(text, "DR-PO")[1:5] == ["0.500", "(0.500-0.500)", "-", "1/1"]  # one value: no spread
    assert "paired by seed: +0.400, 95 % t-interval -; seed 1: +0.400\n" in text
    assert "| 2 | 0.300 | - |" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "report.json").read_text())["methods"]["drpo"]["win_rate"]["values"] == [0.5, None]


def test_the_figure_draws_mean_and_band(three_seeds, monkeypatch):
    figures = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path, **kwargs: figures.append(figure))
    report.write(three_seeds)
    score = figures[0].axes[0]
    assert [list(line.get_ydata()) for line in score.lines] == [pytest.approx([13 / 3, 26 / 3, 0])] * 2  # PPO and DR-PO
    assert list(score.lines[0].get_xdata()) == [1, 2, 3]
    band = score.collections[0].get_paths()[0].vertices.tolist()
    assert [2, 2] in band and [2, 20] in band  # update 2: 2, 4 and 20
    assert score.lines[0].get_color() == figures[0].axes[1].lines[0].get_color() != score.lines[1].get_color()
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["PPO", "DR-PO", "SFT", "reward model"]
    assert not figures[0].axes[11].lines  # nobody ran DPO
    assert "3 seeds" in figures[0].get_suptitle()
    against_tokens = figures[0].axes[6]
    assert against_tokens.lines[0].get_xdata() == pytest.approx([100, 200, 300])
    assert list(against_tokens.lines[0].get_ydata()) == list(score.lines[0].get_ydata())
    episodes = score.child_axes[0]._functions[0]  # 48 rollouts an update
    assert episodes(2) == 96


def test_the_frontier_has_a_line_per_method_with_mean_and_standard_error_of_each_bin(tmp_path, monkeypatch):
    """Four prompts make two bins; SFT, all at KL 0, makes one point."""
    figures, samples = [], []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path, **kwargs: figures.append(figure))
    for kl, score in [(3.0, 5.0), (1.0, 0.0), (2.0, 2.0), (5.0, 9.0)]:
        samples.append(
            {
                "prompt": "p",
                "reference": "r",
                "sft": {"kl": 0.0, "kl_rm_score": score},
                "drpo": {"kl": kl, "kl_rm_score": score},
            }
        )
    report.draw_frontier(samples, tmp_path / "frontier.png")
    sft, drpo = figures[0].axes[0].containers
    assert sft.get_label() == "SFT" and drpo.get_label() == "DR-PO"
    assert [list(sft.lines[0].get_xdata()), list(sft.lines[0].get_ydata())] == [[0.0], [4.0]]
    assert [list(drpo.lines[0].get_xdata()), list(drpo.lines[0].get_ydata())] == [[1.5, 4.0], [1.0, 7.0]]
    low, high = drpo.lines[2][0].get_segments()[0][:, 1]  # of 0 and 2: the std is 1.41, over sqrt(2) it is 1
    assert (low, high) == pytest.approx((0.0, 2.0))


def test_several_runs_are_compared_by_the_settings_in_which_they_differ(tmp_path, capsys, no_figure):
    """A beta ablation: what drpo was trained with counts, whatever the flags of the evaluation were."""
    for beta, wins in (("0.0", (0.1, 0.3)), ("1.0", (0.4, 0.8))):
        for seed, win in enumerate(wins):
            make_run(tmp_path / f"beta_{beta}" / f"seed_{seed}", {"sft": 0.1, "drpo": win}, seed, beta=float(beta))
    make_run(tmp_path / "single", {"drpo": 0.5}, beta=0.25)
    make_run(tmp_path / "without", {"sft": 0.5})
    report.main([str(tmp_path / name) for name in ("beta_0.0", "beta_1.0", "single", "without")])
    lines = capsys.readouterr().out.partition("DR-PO in each run")[2].splitlines()[2:]
    assert lines == [
        "| run | beta | seeds | win rate vs reference | RM score | KL to SFT | tokens | EOS rate |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| beta_0.0 | 0.0 | 2 | 0.200 (0.100-0.300) | 1.50 (1.50-1.50) | 2.50 (2.50-2.50) | 9.5 (9.5-9.5) | 0.75 (0.75-0.75) |",
        "| beta_1.0 | 1.0 | 2 | 0.600 (0.400-0.800) | 1.50 (1.50-1.50) | 2.50 (2.50-2.50) | 9.5 (9.5-9.5) | 0.75 (0.75-0.75) |",
        "| single | 0.25 | 1 | 0.500 | 1.50 | 2.50 | 9.5 | 0.75 |",
    ]


def test_over_optimisation_names_the_peak_of_each_seed_and_what_it_gives_on_the_test_prompts(tmp_path, monkeypatch):
    """The RM score rises all the way; gold falls in the one seed after update 5, and in the other it does not."""
    figures = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path, **kwargs: figures.append((path.name, figure)))
    for seed, gold, on_test in ((1, [0.0, 2.0, 1.0], {5: 1.5, 10: 0.5}), (2, [0.0, 1.0, 3.0], {10: 2.5})):
        folder = make_run(tmp_path / f"seed_{seed}", {"sft": 0.1, "ppo": 0.2}, seed)
        known = {"method": "ppo", "judged_by": "gold_score", "win_rate": 0.25, "kl": 1.0}
        lines = [
            known | {"prompts": "validation", "update": 5 * i, "rm_score": float(i), "gold_score": value}
            for i, value in enumerate(gold)
        ]
        lines += [
            known | {"prompts": "test", "update": update, "rm_score": 3.0, "gold_score": value}
            for update, value in on_test.items()
        ]
        (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.write(tmp_path)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| PPO, peak on validation prompts | 5, 10 | 2.000 | 0.250 | 3.000 | 1.000 |" in page
    assert "| PPO, last update | 10, 10 | 1.500 | 0.250 | 3.000 | 1.000 |" in page
    left, right = dict(figures)["overoptimisation.png"].axes
    assert list(left.lines[0].get_ydata()) == [0, 1, 2] and list(right.lines[0].get_ydata()) == [0, 1.5, 2]
    assert left.lines[1].get_xdata()[0] == 10  # the peak of the mean


def spoil(tmp_path, what):
    """-> the folder of a run in which this is wrong."""
    run = tmp_path / "run"
    if what == "no folder":
        return run
    make_run(run, {"sft": 0.1})
    if what == "broken log":
        (run / "sft" / "metrics.jsonl").write_text('{"loss": 1.0}\n{"lo')
    elif what == "broken report":
        (run / "eval.json").write_bytes(b"\xff{")
    else:
        (run / what).unlink()
    return run


@pytest.mark.parametrize(
    "what, named",
    [
        ("no folder", "drpo.py eval --run_dir"),
        ("eval.json", "drpo.py eval --run_dir"),
        ("samples.jsonl", "samples.jsonl"),
        ("broken report", "eval.json: not JSON"),
        ("broken log", "metrics.jsonl: not JSON"),
    ],
)
def test_bad_folders_end_with_one_line(tmp_path, capsys, what, named):
    with pytest.raises(SystemExit) as end:
        report.main([str(spoil(tmp_path, what))])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out
    assert err.count("\n") == 1 and err.startswith("report.py: error: ") and named in err and str(tmp_path) in err


def test_no_folder_named_at_all(capsys):
    with pytest.raises(SystemExit) as end:
        report.main([])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and "RUN_DIR" in err


def test_command(tmp_path):
    """The command of the README, on two folders of which the second does not exist: the first is reported all the same."""
    run = make_run(tmp_path / "run", {"sft": 0.125})
    command = [sys.executable, "-m", "tools.report", run, tmp_path / "none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and row(done.stdout, "SFT")[1] == "0.125" and (run / "curves.png").exists()
    assert done.stderr.count("\n") == 1 and "none: no eval.json" in done.stderr


def test_it_imports_nothing_of_ours_but_statistics_which_import_nothing_of_ours():
    def imported(nodes):
        return {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names} | {
            node.module for node in nodes if isinstance(node, ast.ImportFrom)
        }

    trees = {name: ast.parse((ROOT / "tools" / name).read_text(encoding="utf-8")) for name in ("report.py", "stats.py")}
    assert imported(trees["report.py"].body) <= sys.stdlib_module_names | {"tools.stats"}  # matplotlib only to draw
    assert imported(ast.walk(trees["report.py"])) <= sys.stdlib_module_names | {"tools.stats", "matplotlib.figure"}
    assert imported(ast.walk(trees["stats.py"])) <= sys.stdlib_module_names | {"numpy"}
