"""tools/report.py on small made-up run folders, with numbers worked by hand."""

import io
import math
import sys

import matplotlib.figure
import pytest
from conftest import LOG, make_run, write_lines

from tools import report


@pytest.fixture
def figures(monkeypatch):  # {file name: figure} of what is drawn; nothing is saved, which takes longer than all the rest
    drawn = {}
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, path, **_: drawn.update({path.name: self}))
    return drawn


@pytest.fixture
def three_seeds(tmp_path, figures):
    for seed, sft, ppo, dr in [(1, 0.30, 0.1, 0.2), (2, 0.29, 0.1, 0.4), (10, 0.0, 0.4, 0.6)]:
        make_run(tmp_path / f"seed_{seed}", {"sft": sft, "ppo": ppo, "drpo": dr}, seed, score=(seed, 2 * seed, 0), kl=seed / 2)
    return tmp_path


def row(text, name):  # the cells of the terminal table's line that begins with this method
    return next(line for line in text.splitlines() if line.startswith(name)).split()


def page(run):
    return (run / "report.md").read_text(encoding="utf-8")


def test_a_single_run_has_its_table_page_and_figures(tmp_path):
    run = make_run(tmp_path / "run", {"sft": 0.125, "dpo": 0.5, "ppo": 0.25, "drpo": 0.5})
    text = report.write(run)
    assert [line.split()[0] for line in text.splitlines()[:5]] == ["method", "SFT", "DPO", "PPO", "DR-PO"]
    # Wilson, 2 of 4: centre 0.5, half width z sqrt(1/16 + z^2 / 64) / (1 + z^2 / 4) = 0.350
    assert row(text, "DR-PO") == ["DR-PO", "0.500", "[0.150,", "0.850]", "1.50", "2.50", "0.150", "9.5", "0.75"]
    assert "reward model: 0.700 [0.400, 0.900]" in text and "SFT 5, RM 6, DPO 7, PPO 8, DR-PO 9; total 35" in text
    # 1.96 standard errors over four prompts. Texts that are all longer by the same cannot tell the win rate at equal length
    assert "| DR-PO | 0.500 [0.150, 0.850] | - - | 1.50 [1.01, 1.99] | 2.50 [2.50, 2.50] | 0.300 | 0.100 | 0.150 |" in page(run)
    assert "| PPO minus SFT | +0.125 | [0.125, 0.125] |" in page(run)  # the same on each prompt
    assert "    reference: told 0\n\n    SFT (win 0.12, RM score 1.00): sft says 0\n" in page(run)
    for name in ("curves.png", "diagnostics.png", "frontier.png"):
        assert f"]({name})" in page(run) and (run / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_missing_verdicts_are_counted_and_left_out(tmp_path, figures):
    run = make_run(tmp_path / "run", {"sft": 1.0, "ppo": None}, judge="rm")
    samples = report.read(run / "samples.jsonl", lines=True)
    samples[2]["sft"]["win_rate"] = None
    write_lines(run / "samples.jsonl", samples)
    text = report.write(run)
    assert "without a verdict, not counted: SFT 1, PPO 4" in text and "NOT independent" in text
    assert row(text, "PPO")[1:3] == ["-", "-"]


def test_rloo_without_values_and_a_judge_is_drawn(tmp_path, figures):
    log = {key: value for key, value in LOG.items() if key != "explained_variance"}
    report.write(make_run(tmp_path / "run", {"sft": None, "ppo": None, "drpo": None}, log=log))
    titles = [ax.get_title() for ax in figures["diagnostics.png"].axes]
    assert "explained_variance (ppo, drpo): not logged" in titles and len(figures["diagnostics.png"].axes[1].lines) == 2
    assert figures["curves.png"].axes[0].get_title().startswith("Responses that end with EOS")


def test_the_papers_table_stands_beside_ours(tmp_path, figures):
    for seed in (1, 2):
        make_run(tmp_path / f"seed_{seed}", {"sft": 0.25, "drpo": seed / 2}, seed, preset="tldr")
    report.write(tmp_path)
    assert "| DR-PO | here | 0.750 ± 0.354 | 1.50 ± 0.00 | 2.50 ± 0.00 |" in page(tmp_path)
    assert "| PPO | paper" not in page(tmp_path)
    assert "| DR-PO | paper | 0.702 ± 0.017 | 1.52 ± 0.09 | 16.84 ± 0.83 |" in page(tmp_path)


def test_over_seeds_mean_interval_and_paired_differences(three_seeds, figures):
    text = report.write(three_seeds)
    # 0.2, 0.4, 0.6: std 0.2, and 4.303 * 0.2 / sqrt(3) = 0.497
    assert row(text, "DR-PO")[1:6] == ["0.400", "±", "0.200", "(0.200-0.600)", "[-0.097,"]
    # 0.1, 0.3, 0.2: std 0.1, and 4.303 * 0.1 / sqrt(3) = 0.248
    assert "DR-PO minus PPO: +0.200 [-0.048, 0.448], by seed: 0.100, 0.300, 0.200" in text
    assert "| 2 | 0.290 | 0.100 | 0.400 |\n| 10 | 0.000 | 0.400 | 0.600 |" in page(three_seeds)  # seed 10 after seed 2
    assert "| DR-PO minus SFT | +0.203 | " in page(three_seeds)  # -0.1, 0.11, 0.6
    saved = report.read(three_seeds / "report.json")
    wins = saved["methods"]["drpo"]["win_rate"]
    assert saved["seeds"] == [1, 2, 10] and not {"seed", "run_dir"} & saved["settings"].keys()
    assert wins["values"] == [0.2, 0.4, 0.6] and wins["ci95"] == pytest.approx([-0.0969, 0.8969], abs=1e-4)
    assert [wins[key] for key in ("mean", "std", "min", "max", "n")] == pytest.approx([0.4, 0.2, 0.2, 0.6, 3])
    assert report.write(three_seeds) == text  # its own report.json is no run's


def test_a_method_that_one_seed_lacks_has_fewer_values(tmp_path, figures):
    make_run(tmp_path / "seed_1", {"ppo": 0.1, "drpo": 0.5}, 1)
    make_run(tmp_path / "seed_2", {"ppo": 0.3}, 2)
    text = report.write(tmp_path)
    assert row(text, "DR-PO")[1:3] == ["0.500", "-"] and row(text, "PPO")[1:4] == ["0.200", "±", "0.141"]
    assert "| 2 | 0.300 | - |" in page(tmp_path)


def test_seeds_with_two_judges_name_both(tmp_path, figures):
    make_run(tmp_path / "seed_1", {"drpo": 0.5}, 1, judge="rm")
    make_run(tmp_path / "seed_2", {"drpo": 0.5}, 2, judge="api:m")
    assert "judge: api:m, rm (the run's own reward model" in report.write(tmp_path)


def test_curves_show_held_out_prompts_mean_and_each_seed(three_seeds, figures):
    report.write(three_seeds)
    for ax in figures["curves.png"].axes:
        ppo, *seeds, drpo = ax.lines[:5]
        assert list(ppo.get_xdata()) == [2, 3] and list(ppo.get_ydata()) == pytest.approx([26 / 3, 0])  # none at update 1
        assert [line.get_ydata()[0] for line in seeds] == [2, 4, 20]
        assert [line.get_color() for line in (ppo, drpo, ax.lines[-1])] == [report.COLOURS[x] for x in ("ppo", "drpo", "sft")]
    assert figures["curves.png"].axes[2].lines[-1].get_ydata()[0] == pytest.approx(13 / 6)  # KL of SFT: 0.5, 1, 5
    score, against_tokens = figures["diagnostics.png"].axes[8:10]
    assert list(score.lines[0].get_ydata()) == pytest.approx([13 / 3, 26 / 3, 0])
    assert list(against_tokens.lines[0].get_xdata()) == [0.1, 0.2, 0.3]  # thousands


def test_the_frontier_has_a_point_per_seed_and_is_cut(tmp_path, figures):
    for seed, kl in [(1, 1.0), (2, 3.0)]:
        run = make_run(tmp_path / f"seed_{seed}", {"sft": 0.1, "dpo": 0.2, "drpo": 0.5}, seed, kl=kl)
        samples = report.read(run / "samples.jsonl", lines=True)
        for sample in samples:
            sample["sft"]["kl"], sample["dpo"]["kl"] = 0.0, 40.0 + seed
        write_lines(run / "samples.jsonl", samples)
    report.write(tmp_path)
    (ax,) = figures["frontier.png"].axes
    _, drpo = ax.containers
    assert list(drpo.lines[0].get_xdata()) == [1.0, 3.0] and list(drpo.lines[0].get_ydata()) == [1.5, 1.5]
    low, high = drpo.lines[2][1].get_segments()[0][:, 1]  # scores 0, 1, 2, 3: standard error sqrt(1.25) / 2
    assert high - 1.5 == pytest.approx(1.5 - low) == pytest.approx(1.25**0.5 / 2)
    assert ax.get_xlim()[1] == pytest.approx(1.3 * 3) and "DPO: KL 41.0, 42.0" in ax.texts[0].get_text()


def test_runs_are_compared_by_settings_that_differ(tmp_path, capsys, figures):
    for beta, wins in ((0.0, (0.1, 0.3)), (1.0, (0.4, 0.8))):
        for seed, win in enumerate(wins):
            make_run(tmp_path / f"beta_{beta}" / f"seed_{seed}", {"sft": 0.1, "drpo": win}, seed, beta=beta, run_dir="")
    make_run(tmp_path / "a" / "single", {"drpo": 0.5}, beta=0.25, run_dir="")
    make_run(tmp_path / "b" / "single", {"drpo": 0.5}, beta=0.75, run_dir="")
    report.main([str(tmp_path / name) for name in ("beta_0.0", "beta_1.0", "a/single", "b/single")])
    lines = capsys.readouterr().out.partition("DR-PO in each run")[2].splitlines()[2:]
    assert lines[0].startswith("| run | beta | seeds | win rate vs reference | RM score |")
    assert lines[2].startswith(f"| {tmp_path}/beta_0.0 | 0.0 | 2 | 0.200 ± 0.141 (0.100-0.300) | 1.50 ± 0.00 (1.50-1.50) |")
    assert lines[4].startswith(f"| {tmp_path}/a/single | 0.25 | 1 | 0.500 | 1.50 |") and "b/single | 0.75 |" in lines[5]


def test_t_quantiles_are_those_of_student():  # the integral of Student's density from 0 to t, by Simpson's rule, must be 0.475
    for df, t in enumerate(report.T975, 1):
        scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
        density = [scale * (1 + (t * i / 1000) ** 2 / df) ** (-(df + 1) / 2) for i in range(1001)]
        integral = (density[0] + density[-1] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2])) * t / 3000
        assert integral == pytest.approx(0.475, abs=3e-5), df


def test_clopper_pearson_has_closed_forms_at_its_ends():
    """With 0 of n the upper end solves (1 - p)^n = 0.025; 1 of 2: 1 - (1 - p)^2 = 0.025 below, 1 - p^2 = 0.025 above."""
    assert report.clopper_pearson(0, 6) == pytest.approx([0, 1 - 0.025 ** (1 / 6)])
    assert report.clopper_pearson(6, 6) == pytest.approx([0.025 ** (1 / 6), 1])
    assert report.clopper_pearson(1, 2) == pytest.approx([1 - 0.975**0.5, 0.975**0.5])


def test_the_bootstrap_of_gaps_of_0_and_1_is_a_binomial():
    """On 40 prompts one method wins all, the other 20: the resampled gap is Binomial(40, 1/2) / 40, quantiles 14 and 26."""
    found = report.paired_bootstrap([1.0] * 40 + [None, 1.0], [1.0] * 20 + [0.0] * 20 + [1.0, None])
    assert found == {"mean": 0.5, "ci95": [0.35, 0.65], "prompts": 40} and report.paired_bootstrap([None], [1.0]) is None


def test_two_lengths_give_the_line_through_two_log_odds():
    """80 % of the texts longer by 30 win, 40 % of those shorter by 10. Equal length lies on the line between the log odds, at
    tanh(0); its variance is that of a weighted sum: 1 / (n p q) each."""
    gaps, won = [30] * 10 + [-10] * 10, [1.0] * 8 + [0.0] * 2 + [1.0] * 4 + [0.0] * 6
    high, low = math.log(0.8 / 0.2), math.log(0.4 / 0.6)
    x, y = math.tanh(1.5), math.tanh(-0.5)  # the std is 20
    a = low - y * (high - low) / (x - y)
    error = math.sqrt((x / (x - y)) ** 2 / (10 * 0.4 * 0.6) + (y / (x - y)) ** 2 / (10 * 0.8 * 0.2))
    rate, interval = report.length_controlled([*won, None], [*gaps, 1000])
    assert rate == pytest.approx(1 / (1 + math.exp(-a)))
    assert interval == pytest.approx([1 / (1 + math.exp(-a - side * 1.96 * error)) for side in (-1, 1)])
    for separated in ("1111", "0000", "0011", "1100", ""):  # one threshold on the length parts wins from losses
        assert report.length_controlled([float(x) for x in separated], [1, 2, 3, 4][: len(separated)]) == (None, None)


SPOILED = {  # what is wrong with a file of the run: a word of the line
    ("report.json", None): "python drpo.py eval",
    ("samples.jsonl", None): "samples.jsonl",
    ("report.json", b"\xff{"): "report.json: not JSON",
    ("sft/metrics.jsonl", b'{"lo'): "metrics.jsonl: not JSON",
    ("samples.jsonl", b'{"prompt": "p"}\n'): "incomplete",
}


@pytest.mark.parametrize("name, content", SPOILED)
def test_a_bad_folder_ends_with_one_line(tmp_path, one_line, figures, name, content):
    path = make_run(tmp_path / "run", {"sft": 0.1}) / name
    path.unlink() if content is None else path.write_bytes(content)
    assert SPOILED[name, content] in one_line([tmp_path / "run"], main=report.main)


def test_a_stream_that_is_not_utf8_gets_replacements(three_seeds, figures, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    report.main([str(three_seeds)])
    sys.stdout.flush()
    assert b"0.400 ? 0.200" in sys.stdout.buffer.getvalue()
