"""tools/stats.py, with numbers worked by hand."""

import math
import random

import pytest

from tools import stats


def test_t_quantiles():
    """The table against the integral of Student's density from 0 to t, by Simpson's rule: must be 0.475."""
    for df, t in enumerate(stats.T975, 1):
        scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
        density = [scale * (1 + (t * i / 1000) ** 2 / df) ** (-(df + 1) / 2) for i in range(1001)]
        integral = (density[0] + density[-1] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2])) * t / 3000
        assert integral == pytest.approx(0.475, abs=3e-5), df
    many = stats.spread([0.0, 1.0] * 50)
    low, high = stats.t_interval(many)  # 99 degrees: the last one
    assert high - low == pytest.approx(2 * 2.042 * many["std"] / 10)


def test_wilson_interval_stays_inside_zero_and_one():
    """At 0 of 10 the upper end is z^2 / (n + z^2); a half counts as half a hit; many hits: near p +- z sqrt(p q / n)."""
    assert stats.wilson(0, 10) == pytest.approx([0, 1.96**2 / (10 + 1.96**2)])
    assert stats.wilson(10, 10)[1] == pytest.approx(1) and stats.wilson(4.5, 10)[0] < 0.45
    assert stats.wilson(5000, 10000) == pytest.approx([0.5 - 0.0098, 0.5 + 0.0098], abs=1e-5)


def binomial_quantile(share, n, p):
    """The smallest k of Binomial(n, p) whose cumulative probability reaches the share."""
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= share:
            return k


def test_the_bootstrap_of_gaps_of_0_and_1_is_a_binomial():
    """On 40 prompts one method wins all, the other 20: the resampled gap is Binomial(40, 1/2) / 40."""
    found = stats.paired_bootstrap([1.0] * 40, [1.0] * 20 + [0.0] * 20)
    assert found["mean"] == 0.5 and found["prompts"] == 40
    assert found["ci95"] == [binomial_quantile(share, 40, 0.5) / 40 for share in (0.025, 0.975)] == [0.35, 0.65]


def test_what_is_the_same_on_every_prompt_has_no_spread_however_the_prompts_differ():
    """Unpaired, 0.9 [..] and 0.4 [..] would overlap in noise: paired, the easy and the hard prompts cancel."""
    rng = random.Random(0)
    hard = [rng.random() / 2 for _ in range(50)]
    found = stats.paired_bootstrap([x + 0.5 for x in hard], hard)
    assert found["ci95"] == pytest.approx([0.5, 0.5])


def test_a_bootstrap_leaves_out_what_is_undecided_on_either_side_and_draws_the_same_each_time():
    a, b = [1.0, None, 0.0, 1.0, 0.5], [0.0, 1.0, None, 1.0, 0.0]
    found = stats.paired_bootstrap(a, b)
    assert found == stats.paired_bootstrap(a, b) and found["prompts"] == 3 and found["mean"] == 0.5
    assert stats.paired_bootstrap(b, a)["mean"] == -0.5 and stats.paired_bootstrap([None], [1.0]) is None


def test_the_win_rate_at_equal_length_of_two_lengths_is_that_of_the_line_through_two_log_odds():
    """80 % of the texts that are longer by 30 win, 40 % of those shorter by 10. Two lengths, two parameters: the fit goes
    through both log odds, and at equal length lies on the line between them at tanh(0)."""
    gaps, won = [30] * 10 + [-10] * 10, [1.0] * 8 + [0.0] * 2 + [1.0] * 4 + [0.0] * 6
    high, low = math.log(0.8 / 0.2), math.log(0.4 / 0.6)  # at tanh(30 / 20) and tanh(-10 / 20); the std is 20
    x, y = math.tanh(1.5), math.tanh(-0.5)
    a = low - y * (high - low) / (x - y)
    rate, (lower, upper) = stats.length_controlled(won, gaps)
    assert rate == pytest.approx(1 / (1 + math.exp(-a)))
    # the line is a weighted sum of two independent log odds, whose variances are 1 / (n p q)
    error = math.sqrt((x / (x - y)) ** 2 / (10 * 0.4 * 0.6) + (y / (x - y)) ** 2 / (10 * 0.8 * 0.2))
    assert [lower, upper] == pytest.approx([1 / (1 + math.exp(-a - side * 1.96 * error)) for side in (-1, 1)])


def test_a_judge_that_likes_length_alone_is_seen_through():
    """The longer text wins with probability sigma(gap / 20): at equal length that is one half, however long the texts are."""
    rng = random.Random(1)
    gaps = [rng.gauss(25, 30) for _ in range(4000)]
    won = [float(rng.random() < 1 / (1 + math.exp(-gap / 20))) for gap in gaps]
    rate, (low, high) = stats.length_controlled(won, gaps)
    assert sum(won) / len(won) > 0.7 and low < rate < high and rate == pytest.approx(0.5, abs=0.06)


def test_without_an_effect_of_length_the_win_rate_at_equal_length_is_the_win_rate():
    gaps, won = [-20, -5, 5, 20] * 10, [1.0] * 20 + [0.5] * 12 + [0.0] * 8
    assert stats.length_controlled(won, gaps)[0] == pytest.approx(26 / 40)


@pytest.mark.parametrize(
    "won, gaps",
    [
        ([1.0] * 4, [1, 2, 3, 4]),
        ([0.0] * 4, [1, 2, 3, 4]),
        ([0.0, 0.0, 1.0, 1.0], [1, 2, 3, 4]),
        ([1.0, 1.0, 0.0, 0.0], [1, 2, 3, 4]),
        ([0.0, 1.0, 0.0, 1.0], [1, 2, 2, 3]),
        ([0.0, 1.0, 0.0, 1.0], [5, 5, 5, 5]),
        ([None, None], [1, 2]),
    ],
)
def test_what_lengths_cannot_tell_is_not_told(won, gaps):
    assert stats.length_controlled(won, gaps) == (None, None)


def test_undecided_verdicts_play_no_part_in_the_win_rate_at_equal_length():
    won, gaps = [1.0, 0.0, 0.5, 1.0, 0.0, 1.0], [3, 4, -2, -1, 0, 7]
    assert stats.length_controlled([*won, None], [*gaps, 1000]) == stats.length_controlled(won, gaps)


def test_distinct_n_counts_different_n_grams_of_all_texts_together():
    texts = ["a b a", "a b c"]  # words: 3 of 6; pairs ab ba ab bc: 3 of 4
    assert (stats.distinct(texts, 1), stats.distinct(texts, 2)) == (0.5, 0.75)
    assert stats.distinct(["a", ""], 2) is None  # no pair, and none across two texts


def test_bins_have_equal_counts_and_the_standard_error_of_their_means():
    found = stats.binned([4, 1, 3, 2, 6, 5], [10.0, 0.0, 7.0, 4.0, 3.0, 3.0], bins=3)
    assert found == [pytest.approx(point) for point in [(1.5, 2.0, 2.0, 2), (3.5, 8.5, 1.5, 2), (5.5, 3.0, 0.0, 2)]]
    assert stats.binned([0, 0, 0], [1.0, 2.0, 3.0]) == [pytest.approx((0, 2.0, 1 / 3**0.5, 3))]
    assert [n for *_, n in stats.binned(range(103), range(103))] == [10, 10, 10, 11, 10, 10, 11, 10, 10, 11]
