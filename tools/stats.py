"""The statistics of an evaluation: intervals, differences on the same prompts, win rates at equal length, variety of wording.

Pure functions on lists of numbers and texts, standard library and numpy. Imports nothing of ours.
"""

import math
import statistics

import numpy as np

# Student's t, 0.975 quantile, for 1..30 degrees of freedom. Beyond them the last one serves: at most 4 % too wide.
# fmt: off
T975 = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
]
# fmt: on


def spread(values):
    """Values, one a seed and None where the seed lacks it -> their statistics. One value alone has no std; of none at all
    there are no statistics: None."""
    given = [value for value in values if value is not None]
    if not given:
        return None
    std = statistics.stdev(given) if len(given) > 1 else None
    return {"mean": statistics.mean(given), "std": std, "min": min(given), "max": max(given), "n": len(given), "values": values}


def t_interval(stats):
    """What `spread` gives -> the 95 % interval [low, high] of the mean over seeds; None for one seed."""
    if stats["n"] == 1:
        return None
    half = T975[min(stats["n"] - 1, len(T975)) - 1] * stats["std"] / math.sqrt(stats["n"])
    return [stats["mean"] - half, stats["mean"] + half]


def wilson(hits, n, z=1.96):
    """Hits among n, ties as halves -> the 95 % interval [low, high] of their share, which behaves at 0 and 1 as +- does not."""
    p = hits / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)]


def mean_interval(values, z=1.96):
    """-> the 95 % interval [low, high] of the mean by the normal approximation."""
    mean, half = statistics.fmean(values), z * statistics.pstdev(values) / math.sqrt(len(values))
    return [mean - half, mean + half]


def paired_bootstrap(a, b, resamples=10_000, seed=0):
    """Verdicts on two methods, the same prompt at the same place, None: undecided -> the difference of their win rates.

    Prompts, not verdicts, are drawn again with replacement: what makes a prompt easy for both methods cancels, and the
    interval is that of the mean of a_i - b_i, by the percentiles 2.5 and 97.5 of its resampled means. Prompts on which either
    is undecided are left out. -> {mean, ci95 (two numbers), prompts}; None where no prompt is left."""
    gaps = np.array([x - y for x, y in zip(a, b, strict=True) if None not in (x, y)])
    if not len(gaps):
        return None
    rng = np.random.default_rng(seed)
    means = [gaps[rng.integers(len(gaps), size=len(gaps))].mean() for _ in range(resamples)]
    return {"mean": gaps.mean().item(), "ci95": np.quantile(means, [0.025, 0.975]).tolist(), "prompts": len(gaps)}


def length_controlled(verdicts, gaps, z=1.96):
    """Verdicts (1, 0, 0.5; None: undecided) and by how much the judged text is longer than the reference -> (the win rate at
    equal length, its 95 % interval).

    As in length-controlled AlpacaEval (Dubois et al. 2024), without its term for the difficulty of a prompt, which one run
    cannot tell:

        P(win_i) = sigma(a + b tanh(x_i)),    x_i = gap_i / std(gap),    win rate at equal length = sigma(a)

    x is scaled and not centred, so that 0 stays equal length; tanh keeps a few very long texts from ruling the fit. (a, b)
    maximise the likelihood, by Newton's method; the interval is sigma(a +- z se(a)), se from the inverse Fisher information.

    Not identified, (None, None), where no pair of finite (a, b) is best: if one threshold on the length parts wins from
    losses (all won, or every longer text won, or all of one length). And where hardly any pair is of about equal length
    sigma(a) is an extrapolation, which the wide interval shows as far as the model is right."""
    decided = [(verdict, gap) for verdict, gap in zip(verdicts, gaps, strict=True) if verdict is not None]
    won, lost = [gap for verdict, gap in decided if verdict > 0], [gap for verdict, gap in decided if verdict < 1]
    if not (won and lost and min(won) < max(lost) and min(lost) < max(won)):
        return None, None
    y, gap = np.array(decided).T
    x = np.stack([np.ones_like(gap), np.tanh(gap / gap.std())], 1)  # (n, 2)
    weights = np.zeros(2)

    def likelihood(weights):
        logits = x @ weights
        return (y * logits - np.logaddexp(0, logits)).sum()

    for _ in range(100):
        p = (1 + np.tanh(x @ weights / 2)) / 2  # sigma, which so cannot overflow
        fisher = x.T @ (x * (p * (1 - p))[:, None])
        step = np.linalg.solve(fisher, x.T @ (y - p))
        while likelihood(weights + step) < likelihood(weights) - 1e-9:  # too far: Newton's step is halved
            step = step / 2
        weights = weights + step
        if np.abs(step).max() < 1e-9:
            break
    a, error = weights[0], math.sqrt(np.linalg.inv(fisher)[0, 0])
    low, mean, high = [(1 + math.tanh((a + side * error) / 2)) / 2 for side in (-z, 0, z)]
    return mean, [low, high]


def distinct(texts, n):
    """distinct-n (Li et al. 2016): different n-grams of words over all n-grams, in all the texts together; None if they have
    none. It falls with the amount of text by itself: compare methods on the same prompts, and look at their lengths."""
    grams = [gram for words in map(str.split, texts) for gram in zip(*(words[i:] for i in range(n)))]
    return len(set(grams)) / len(grams) if grams else None


def binned(x, y, bins=10):
    """Points (x, y) in bins of equal count along x -> [(mean of x, mean of y, standard error of that mean, count), ...], at
    least two points to a bin; one bin where all x are the same."""
    points = sorted(zip(x, y, strict=True))
    n, bins = len(points), 1 if min(x) == max(x) else max(1, min(bins, len(points) // 2))
    result = []
    for part in (points[n * i // bins : n * (i + 1) // bins] for i in range(bins)):
        xs, ys = zip(*part)
        error = statistics.stdev(ys) / math.sqrt(len(ys)) if len(ys) > 1 else 0.0
        result.append((statistics.fmean(xs), statistics.fmean(ys), error, len(ys)))
    return result
