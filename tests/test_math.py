"""Section 4 of drpo.py, "The mathematics", and `token_masks`: against numbers worked by hand, slow loops and closed forms.

Shapes and names are those of drpo.py: (B, T) over response positions, `mask` is 1 on the tokens that the policy sampled.
Everything random comes from a fixed seed. Most cases are float64, so that tolerances test formulas and not rounding."""

import math

import numpy as np
import pytest
import torch

from drpo import (
    bradley_terry_loss,
    dpo_loss,
    gae,
    log_ratio,
    masked_mean,
    masked_whiten,
    penalised_rewards,
    ppo_policy_loss,
    ppo_value_loss,
    sample_reset_lengths,
    token_masks,
)

NAN, INF = float("nan"), float("inf")


def f64(*rows):
    """f64(1, 2) is (2,), f64([1, 2]) is (1, 2)."""
    return torch.tensor(rows, dtype=torch.float64)


def randn(seed, *shape, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def segments(seed, B, T):
    """A random mask with a reset prefix of zeros, then at least one 1, then zeros after EOS, in each row. (B, T) bool."""
    rng = torch.Generator().manual_seed(seed)
    start = torch.randint(0, T, (B, 1), generator=rng)
    length = 1 + (torch.rand(B, 1, generator=rng) * (T - start)).long()
    t = torch.arange(T)
    return (t >= start) & (t < start + length)


def assert_same(a, b):
    """Bit for bit, and no NaN."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_near(a, b, tolerance=1e-12):
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


def outside(x, mask, value):
    """x with `value` planted wherever the mask is 0; "noise" plants large random numbers."""
    plant = randn(99, *x.shape, scale=1e3).to(x.dtype) if value == "noise" else torch.full_like(x, value)
    return torch.where(mask, x, plant)


plants = pytest.mark.parametrize("plant", ["noise", NAN, INF, -INF])

# Every function that takes a mask, called on (a, b, c, mask), three tensors (B, T), with what it returns as a tuple.
MASKED = {
    "masked_mean": lambda a, b, c, mask: (masked_mean(a, mask),),
    "masked_whiten": lambda a, b, c, mask: (masked_whiten(a, mask),),
    "masked_whiten, mean kept": lambda a, b, c, mask: (masked_whiten(a, mask, shift_mean=False),),
    "penalised_rewards": lambda a, b, c, mask: (penalised_rewards(torch.ones(len(a), dtype=a.dtype), a, b, mask, 0.1),),
    "gae": lambda a, b, c, mask: gae(a, b, mask, 0.9, 0.8),
    "log_ratio": lambda a, b, c, mask: (log_ratio(a, b, mask),),
    "ppo_policy_loss": lambda a, b, c, mask: ppo_policy_loss(a, b, c, mask, 0.2),
    "ppo_value_loss": lambda a, b, c, mask: ppo_value_loss(a, b, c, mask, 0.2),
}
PER_TOKEN = ["masked_whiten", "penalised_rewards", "gae", "log_ratio"]  # those that return tensors (B, T)
each_masked_function = pytest.mark.parametrize("function", MASKED.values(), ids=MASKED.keys())


# ----------------------------------------------------------------------------------------------------------------------
# What holds for every function with a mask


@plants
@each_masked_function
def test_what_lies_outside_the_mask_never_matters(function, plant):
    mask, x = segments(1, 6, 8), [randn(seed, 6, 8) for seed in (2, 3, 4)]
    expected = function(*x, mask)
    for planted in [
        [outside(x[0], mask, plant), x[1], x[2]],
        [x[0], outside(x[1], mask, plant), x[2]],
        [x[0], x[1], outside(x[2], mask, plant)],
        [outside(y, mask, plant) for y in x],
    ]:
        for result, wanted in zip(function(*planted, mask), expected):
            assert_same(result, wanted)


@pytest.mark.parametrize("name", PER_TOKEN)
def test_per_token_results_are_zero_outside_the_mask_and_only_there(name):
    mask = segments(1, 6, 8)
    for result in MASKED[name](*[randn(seed, 6, 8) for seed in (2, 3, 4)], mask):
        assert_same(result != 0, mask)


@pytest.mark.parametrize("dtype", [torch.long, torch.uint8, torch.float32, torch.float64])
@each_masked_function
def test_a_mask_of_numbers_is_as_good_as_one_of_bools(function, dtype):
    mask, x = segments(1, 6, 8), [randn(seed, 6, 8) for seed in (2, 3, 4)]
    for result, wanted in zip(function(*x, mask.to(dtype)), function(*x, mask)):
        assert_same(result, wanted)


# ----------------------------------------------------------------------------------------------------------------------
# Means and whitening


def test_masked_mean_is_one_mean_over_tokens_not_a_mean_of_row_means():
    x = f64([1, 2, 100], [6, 100, 100])
    assert masked_mean(x, torch.tensor([[1, 1, 0], [1, 0, 0]])).item() == 3.0  # (1 + 2 + 6) / 3, not (1.5 + 6) / 2


def test_masked_whiten_by_hand():
    x = f64([1, 3, 50], [50, 5, 7])  # 1, 3, 5, 7: mean 4, biased variance (9 + 1 + 1 + 9) / 4 = 5
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert_near(masked_whiten(x, mask), f64([-3, -1, 0], [0, 1, 3]) / math.sqrt(5), 1e-8)
    kept = f64([4 - 3 / 5**0.5, 4 - 1 / 5**0.5, 0], [0, 4 + 1 / 5**0.5, 4 + 3 / 5**0.5])
    assert_near(masked_whiten(x, mask, shift_mean=False), kept, 1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_whitened_tokens_have_mean_0_and_biased_variance_1(seed):
    mask, x = segments(seed, 4, 6), 3 + randn(seed + 50, 4, 6, scale=7)
    white = masked_whiten(x, mask)[mask].numpy()
    assert_near(white.mean(), 0)
    assert_near(white.var(), 1, 1e-8)  # numpy divides by N, as the official code does
    kept = masked_whiten(x, mask, shift_mean=False)[mask].numpy()
    assert_near(kept.mean(), x[mask].mean())
    assert_near(kept.var(), 1, 1e-8)


def test_whitening_a_constant_gives_zeros_not_nan():
    assert_same(masked_whiten(torch.full((2, 3), 5.0), torch.ones(2, 3)), torch.zeros(2, 3))


# ----------------------------------------------------------------------------------------------------------------------
# Rewards


@pytest.mark.parametrize(
    "case, mask, last",
    [
        ("EOS early", [1, 1, 1, 0, 0], 2),
        ("EOS in the last column, or no EOS at all", [1, 1, 1, 1, 1], 4),
        ("EOS at once", [1, 0, 0, 0, 0], 0),
        ("reset prefix, EOS early", [0, 0, 1, 1, 0], 3),
        ("reset prefix, to the end", [0, 1, 1, 1, 1], 4),
        ("reset prefix, one token left", [0, 0, 0, 0, 1], 4),
    ],
)
def test_the_score_lands_on_the_last_masked_token(case, mask, last):
    mask = torch.tensor([mask, [1, 1, 0, 0, 0]])  # beside another row, which keeps its own
    rewards = penalised_rewards(f64(7, -3), torch.zeros(2, 5).double(), torch.zeros(2, 5).double(), mask, 0.05)
    expected = torch.zeros(2, 5).double()
    expected[0, last], expected[1, 1] = 7, -3
    assert_same(rewards, expected)


def test_penalised_rewards_by_hand():
    # kl_coef 0.5. Row 0: ln pi - ln pi_SFT = 1, -1, 2 -> -0.5, +0.5, -1 + score 2 = 1. Row 1: reset, then 0.5 -> -0.25 + 10.
    logprobs = f64([-1.0, -2.0, -1.0, -9.0], [-9.0, -0.5, -9.0, -9.0])
    ref_logprobs = f64([-2.0, -1.0, -3.0, -1.0], [-1.0, -1.0, -1.0, -1.0])
    rewards = penalised_rewards(f64(2, 10), logprobs, ref_logprobs, torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0]]), 0.5)
    assert_near(rewards, f64([-0.5, 0.5, 1.0, 0.0], [0.0, 9.75, 0.0, 0.0]))


@pytest.mark.parametrize("kl_coef", [0.0, 0.05, 1.0])
def test_the_rewards_of_a_row_add_up_to_its_score_less_the_price_of_its_kl(kl_coef):
    mask, scores, logprobs, ref_logprobs = segments(5, 8, 7), randn(6, 8), randn(7, 8, 7), randn(8, 8, 7)
    kl = ((logprobs - ref_logprobs) * mask).sum(1)
    assert_near(penalised_rewards(scores, logprobs, ref_logprobs, mask, kl_coef).sum(1), scores - kl_coef * kl)


def test_without_a_kl_price_only_the_score_is_left():
    mask, scores = segments(5, 8, 7), 1 + randn(6, 8).abs()
    rewards = penalised_rewards(scores, randn(7, 8, 7), randn(8, 8, 7), mask, 0.0)
    assert (rewards != 0).sum() == 8
    assert_same(rewards.sum(1), scores)


def test_without_critic_and_discount_the_advantage_is_the_score_less_the_price_of_the_kl_still_to_come():
    # kl_coef 0.1, ln ratios 1, 2, 3 after a reset token; score 5:  5 - 0.1 (1 + 2 + 3) = 4.4, 5 - 0.1 (2 + 3) = 4.5, 5 - 0.3
    mask, logprobs = torch.tensor([[0, 1, 1, 1, 0]]), f64([9, 1, 2, 3, 9])
    rewards = penalised_rewards(f64(5), logprobs, torch.zeros_like(logprobs), mask, 0.1)
    advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
    assert_near(advantages, f64([0, 4.4, 4.5, 4.7, 0]))


# ----------------------------------------------------------------------------------------------------------------------
# Generalised advantage estimation


def test_gae_by_hand():
    # gamma = 0.5, lam = 0.5, rewards 1, 2, 4, values 2, 4, 8:
    #   delta_2 = 4             - 8 = -4        A_2 = -4                      return_2 = -4     + 8 = 4
    #   delta_1 = 2 + 0.5 x 8   - 4 =  2        A_1 =  2 + 0.25 x -4 = 1      return_1 =  1     + 4 = 5
    #   delta_0 = 1 + 0.5 x 4   - 2 =  1        A_0 =  1 + 0.25 x  1 = 1.25   return_0 =  1.25  + 2 = 3.25
    advantages, returns = gae(f64([1, 2, 4]), f64([2, 4, 8]), torch.ones(1, 3), 0.5, 0.5)
    assert_near(advantages, f64([1.25, 1, -4]))
    assert_near(returns, f64([3.25, 5, 4]))


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (0.99, 0.0), (0.8, 1.0), (1.0, 1.0), (0.0, 0.5)])
def test_gae_is_the_double_sum_of_discounted_td_errors(gamma, lam):
    mask, rewards, values = segments(11, 6, 9), randn(12, 6, 9), randn(13, 6, 9)
    expected = np.zeros((6, 9))
    for b in range(6):
        steps = [t for t in range(9) if mask[b, t]]
        V = {t: values[b, t].item() for t in steps}  # 0 after the last step
        delta = {t: rewards[b, t].item() + gamma * V.get(t + 1, 0.0) - V[t] for t in steps}
        for t in steps:
            expected[b, t] = sum((gamma * lam) ** (u - t) * delta[u] for u in steps if u >= t)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    assert_near(advantages, expected)
    assert_near(returns, expected + (values * mask).numpy())


def test_with_lambda_1_the_return_is_the_discounted_sum_of_rewards():
    mask, rewards, values = segments(11, 6, 9), randn(12, 6, 9), randn(13, 6, 9)
    monte_carlo = torch.zeros(6, 9).double()
    for t in reversed(range(9)):
        monte_carlo[:, t] = mask[:, t] * (rewards[:, t] + (0.9 * monte_carlo[:, t + 1] if t < 8 else 0))
    advantages, returns = gae(rewards, values, mask, 0.9, 1.0)
    assert_near(returns, monte_carlo)
    assert_near(advantages, monte_carlo - values * mask)


def test_with_lambda_0_the_advantage_is_the_one_step_td_error():
    mask, rewards, values = segments(11, 6, 9), randn(12, 6, 9), randn(13, 6, 9)
    next_values = torch.cat([(values * mask)[:, 1:], torch.zeros(6, 1).double()], 1)
    advantages, _ = gae(rewards, values, mask, 0.9, 0.0)
    assert_near(advantages, (rewards + 0.9 * next_values - values) * mask)


def test_rows_of_gae_know_nothing_of_one_another():
    mask, rewards, values = segments(11, 6, 9), randn(12, 6, 9), randn(13, 6, 9)
    together = gae(rewards, values, mask, 0.9, 0.7)
    for b in range(6):
        for result, alone in zip(together, gae(rewards[b : b + 1], values[b : b + 1], mask[b : b + 1], 0.9, 0.7)):
            assert_same(result[b : b + 1], alone)


# ----------------------------------------------------------------------------------------------------------------------
# PPO's policy loss


def policy_case(seed):
    """-> logprobs, old_logprobs, advantages, mask: (20, 10), ratios about exp(+-0.5)."""
    old_logprobs, advantages = -randn(seed, 20, 10).abs(), randn(seed + 200, 20, 10)
    return old_logprobs + randn(seed + 100, 20, 10, scale=0.5), old_logprobs, advantages, segments(seed + 300, 20, 10)


def slow_policy_loss(logprobs, old_logprobs, advantages, mask, eps):
    """-> loss, clipfrac, gradient on logprobs, the branches met; one token at a time, one case at a time."""
    N, total, clipped, gradient, branches = int(mask.sum()), 0.0, 0, np.zeros(mask.shape), set()
    for b, t in mask.nonzero().tolist():
        A, rho = advantages[b, t].item(), math.exp(logprobs[b, t].item() - old_logprobs[b, t].item())
        where = "below" if rho < 1 - eps else "above" if rho > 1 + eps else "inside"
        branches.add((A > 0, where))
        if A > 0 and where == "above":  # good already made likelier: no more
            total, clipped = total - A * (1 + eps), clipped + 1
        elif A < 0 and where == "below":  # bad already made unlikelier: no more
            total, clipped = total - A * (1 - eps), clipped + 1
        else:
            total, gradient[b, t] = total - A * rho, -A * rho / N
    return total / N, clipped / N, gradient, branches


def test_ppo_policy_loss_by_hand():
    # eps = 0.2      rho  1.5,  A +1  -> -1.2, clipped          rho  0.5,  A +1  -> -0.5
    #                rho  1.5,  A -1  -> +1.5                   rho  0.5,  A -1  -> +0.8, clipped
    #                mean (-1.2 - 0.5 + 1.5 + 0.8) / 4 = 0.15, clipped 2 of 4
    ratio, advantages = f64([1.5, 0.5, 1.5, 0.5, 7.0]), f64([1, 1, -1, -1, 7])
    loss, clipfrac = ppo_policy_loss(ratio.log(), 0 * ratio, advantages, torch.tensor([[1, 1, 1, 1, 0]]), 0.2)
    assert_near(loss, 0.15)
    assert clipfrac.item() == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_ppo_policy_loss_and_its_gradient_are_those_of_a_slow_loop(seed):
    logprobs, old_logprobs, advantages, mask = policy_case(seed)
    wanted_loss, wanted_clipfrac, wanted_gradient, branches = slow_policy_loss(logprobs, old_logprobs, advantages, mask, 0.2)
    assert len(branches) == 6  # the case meets A > 0 and A < 0, below, inside and above the range
    loss, clipfrac = ppo_policy_loss(logprobs.requires_grad_(), old_logprobs, advantages, mask, 0.2)
    loss.backward()
    assert_near(loss.detach(), wanted_loss)
    assert_near(clipfrac, wanted_clipfrac, 1e-6)  # clipfrac is a float32
    assert_near(logprobs.grad, wanted_gradient)


def test_at_ratio_1_the_gradient_is_that_of_reinforce():
    _, old_logprobs, advantages, mask = policy_case(0)
    logprobs = old_logprobs.clone().requires_grad_()
    loss, clipfrac = ppo_policy_loss(logprobs, old_logprobs, advantages, mask, 0.2)
    loss.backward()
    assert_near(logprobs.grad, torch.where(mask, -advantages / mask.sum(), 0.0))
    assert_near(loss.detach(), -advantages[mask].mean())
    assert clipfrac.item() == 0


def test_where_the_clip_bites_and_outside_the_mask_the_policy_gradient_is_exactly_zero():
    logprobs, old_logprobs, advantages, mask = policy_case(0)
    ratio = (logprobs - old_logprobs).exp()
    bites = (advantages > 0) & (ratio > 1.2) | (advantages < 0) & (ratio < 0.8)
    ppo_policy_loss(logprobs.requires_grad_(), old_logprobs, advantages, mask, 0.2)[0].backward()
    assert (bites & mask).any() and (~bites & mask).any()
    assert_same(logprobs.grad != 0, ~bites & mask)


@plants
@pytest.mark.parametrize("where", [[0], [1], [2], [0, 1], [0, 1, 2]], ids=["logprobs", "old", "advantages", "both", "all"])
def test_what_lies_outside_the_mask_does_not_reach_the_policy_gradient(where, plant):
    *x, mask = policy_case(3)
    planted = [outside(y, mask, plant) if i in where else y.clone() for i, y in enumerate(x)]
    for tensors in (x, planted):
        ppo_policy_loss(tensors[0].requires_grad_(), tensors[1], tensors[2], mask, 0.2)[0].backward()
    assert_same(planted[0].grad, x[0].grad)


def test_log_ratio_is_0_on_forced_tokens_even_where_both_policies_call_them_impossible():
    assert_same(log_ratio(f64([-INF, -1, -INF]), f64([-INF, -3, 0]), torch.tensor([[0, 1, 0]])), f64([0, 2, 0]))


# ----------------------------------------------------------------------------------------------------------------------
# PPO's value loss

# eps = 0.2, V_old = 0                        (V - R)^2   (clip - R)^2   larger           gradient (V - R) / N
#   V  0.1, R  1   inside the range              0.81        0.81         0.81            -0.9 / 6
#   V  0.5, R  1   on its way, too far           0.25        0.64         0.64, clipped    0
#   V  0.5, R  0   should not have moved         0.25        0.04         0.25             0.5 / 6
#   V -0.5, R -1   on its way, too far           0.25        0.64         0.64, clipped    0
#   V -0.5, R  0   should not have moved         0.25        0.04         0.25            -0.5 / 6
#   V  0.9, R -1   on the wrong way              3.61        1.44         3.61             1.9 / 6
#   0.5 x (0.81 + 0.64 + 0.25 + 0.64 + 0.25 + 3.61) / 6 = 0.5 x 6.2 / 6
VALUES, RETURNS = [0.1, 0.5, 0.5, -0.5, -0.5, 0.9], [1, 1, 0, -1, 0, -1]


def test_ppo_value_loss_by_hand():
    values = f64(VALUES + [50.0]).requires_grad_()
    loss, clipfrac = ppo_value_loss(values, 0 * values.detach(), f64(RETURNS + [0.0]), torch.tensor([[1] * 6 + [0]]), 0.2)
    loss.backward()
    assert_near(loss.detach(), 0.5 * 6.2 / 6)
    assert_near(clipfrac, 2 / 6, 1e-6)
    assert_near(values.grad, f64([-0.9, 0, 0.5, 0, -0.5, 1.9, 0]) / 6)


@pytest.mark.parametrize("seed", range(5))
def test_ppo_value_loss_is_that_of_a_slow_loop(seed):
    old_values, mask = randn(seed, 20, 10), segments(seed + 300, 20, 10)
    values, returns = [old_values + randn(seed + offset, 20, 10, scale=0.4) for offset in (100, 200)]
    total = clipped = 0
    for b, t in mask.nonzero().tolist():
        V, old, R = values[b, t].item(), old_values[b, t].item(), returns[b, t].item()
        plain, cut = (V - R) ** 2, (min(max(V, old - 0.3), old + 0.3) - R) ** 2
        total, clipped = total + max(plain, cut), clipped + (abs(V - old) > 0.3 and cut > plain)
    loss, clipfrac = ppo_value_loss(values, old_values, returns, mask, 0.3)
    assert_near(loss, 0.5 * total / int(mask.sum()))
    assert_near(clipfrac, clipped / int(mask.sum()), 1e-6)
    assert 0 < clipped < mask.sum()


def test_no_value_counts_as_clipped_while_all_stay_in_range():
    old_values, returns = randn(1, 50, 50), randn(2, 50, 50)
    values = old_values + 0.19 * torch.tanh(randn(3, 50, 50))
    x = [y.float() for y in (values, old_values, returns)]  # as in training, where rounding is not clipping
    assert ppo_value_loss(*x, torch.ones(50, 50), 0.2)[1].item() == 0


@plants
def test_what_lies_outside_the_mask_does_not_reach_the_value_gradient(plant):
    x, mask = [randn(seed, 6, 10) for seed in (1, 2, 3)], segments(4, 6, 10)
    for where in ([0], [1], [2], [0, 1], [0, 1, 2]):
        clean = [y.clone() for y in x]
        planted = [outside(y, mask, plant) if i in where else y.clone() for i, y in enumerate(x)]
        for tensors in (clean, planted):
            ppo_value_loss(tensors[0].requires_grad_(), tensors[1], tensors[2], mask, 0.2)[0].backward()
        assert_same(planted[0].grad, clean[0].grad)
        assert (clean[0].grad[~mask] == 0).all() and (clean[0].grad[mask] != 0).any()


# ----------------------------------------------------------------------------------------------------------------------
# Micro-batches


@pytest.mark.parametrize("loss_function", [ppo_policy_loss, ppo_value_loss])
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_micro_batching_does_not_change_the_gradient(loss_function, micro_batch):
    x, old, target, mask = policy_case(7)

    def gradient(chunks, weight):
        leaf = x.clone().requires_grad_()
        for chunk in chunks:  # as train_drpo: backward per chunk, gradients add up
            loss, _ = loss_function(leaf[chunk], old[chunk], target[chunk], mask[chunk], 0.2)
            (loss * weight(chunk)).backward()
        return leaf.grad

    rows = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    whole, chunks = gradient([rows], lambda chunk: 1.0), rows.split(micro_batch)
    assert_near(gradient(chunks, lambda chunk: mask[chunk].sum().double() / mask.sum()), whole, 1e-12)
    means_of_means = gradient(chunks, lambda chunk: 1 / len(chunks))  # the official code: not the same
    assert (means_of_means - whole).abs().max() > 0.1 * whole.abs().max()


# ----------------------------------------------------------------------------------------------------------------------
# The reward model's loss, Eq. (1)


def minimise(loss_of, size, lr, steps=500):
    """Plain gradient descent from 0."""
    w = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss_of(w), w)
        w = (w - lr * gradient).detach().requires_grad_()
    return w.detach()


def test_bradley_terry_loss_by_hand():
    assert_near(bradley_terry_loss(f64(3), f64(3)), math.log(2))  # a coin
    assert_near(bradley_terry_loss(f64(1), f64(0)), math.log(1 + math.exp(-1)))
    assert_near(
        bradley_terry_loss(f64(1, 0), f64(0, 1)),  # the mean of the two
        (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2,
    )


def test_bradley_terry_loss_sees_only_differences():
    chosen, rejected = randn(1, 20), randn(2, 20)
    assert_near(bradley_terry_loss(chosen + 5, rejected + 5), bradley_terry_loss(chosen, rejected))


def test_bradley_terry_loss_finds_the_log_odds_of_winning():
    a_wins = torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.8
    share = a_wins.double().mean().item()
    assert 0.5 < share < 1

    def loss_of(w):  # item a scores w, item b scores 0
        return bradley_terry_loss(torch.where(a_wins, w, 0.0), torch.where(a_wins, 0.0, w))

    assert_near(minimise(loss_of, 1, lr=4), [math.log(share / (1 - share))], 1e-9)


def test_bradley_terry_loss_has_the_optimum_of_logistic_regression():
    first, second = randn(1, 150, 3), randn(2, 150, 3)  # features of two responses; the truth w = (1, -2, 0.5) is noisy
    p = torch.sigmoid((first - second) @ f64(1, -2, 0.5))
    first_wins = (torch.rand(150, generator=torch.Generator().manual_seed(3)) < p)[:, None]
    chosen, rejected = torch.where(first_wins, first, second), torch.where(first_wins, second, first)

    x, y, w = (first - second).numpy(), first_wins[:, 0].numpy().astype(float), np.zeros(3)
    for _ in range(25):  # Newton's method on the log-likelihood of labels y
        p = 1 / (1 + np.exp(-x @ w))
        w += np.linalg.solve(x.T @ (x * (p * (1 - p))[:, None]), x.T @ (y - p))
    assert_near(minimise(lambda w: bradley_terry_loss(chosen @ w, rejected @ w), 3, lr=4), w, 1e-8)


def test_bradley_terry_loss_vanishes_on_separable_data_as_the_scores_grow():
    chosen, rejected = randn(1, 50).abs() + 0.1, -randn(2, 50).abs()
    losses = [bradley_terry_loss(scale * chosen, scale * rejected).item() for scale in (1, 10, 100, 1000)]
    assert losses == sorted(losses, reverse=True) and 0 <= losses[-1] < 1e-12 < 1e-3 < losses[0]


def test_a_hopeless_pair_costs_its_margin_not_infinity():
    assert bradley_terry_loss(torch.tensor([0.0]), torch.tensor([1000.0])).item() == 1000.0


# ----------------------------------------------------------------------------------------------------------------------
# Reset lengths


def draw(lengths, beta, include_zero=False, seed=0):
    return sample_reset_lengths(torch.as_tensor(lengths), beta, torch.Generator().manual_seed(seed), include_zero)


CHI_SQUARE_999 = {4: 18.467, 5: 20.515}  # 99.9 % quantiles by degrees of freedom


@pytest.mark.parametrize("include_zero", [False, True], ids=["1..n", "0..n"])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_prefix_lengths_are_uniform(beta, include_zero):
    n, rows = 5, 20000
    counts = np.bincount(draw([n] * rows, beta, include_zero).numpy(), minlength=n + 1)
    each = beta / (n + include_zero)  # probability of one length, among all rows
    probability = [1 - beta + each * include_zero] + [each] * n  # a row that is not reset has 0 as well
    possible = [k for k in range(n + 1) if probability[k] > 0]
    assert len(counts) == n + 1 and counts[possible].sum() == rows
    statistic = sum((counts[k] - rows * probability[k]) ** 2 / (rows * probability[k]) for k in possible)
    assert statistic < CHI_SQUARE_999[len(possible) - 1]


def test_each_prefix_is_drawn_from_its_own_reference():
    n = torch.arange(1, 7).repeat(5000)
    lengths = draw(n, 1.0)
    for k in range(1, 7):  # uniform on 1..k: mean (k + 1) / 2, variance (k^2 - 1) / 12
        drawn = lengths[n == k].double()
        assert set(drawn.tolist()) == set(range(1, k + 1))
        assert abs(drawn.mean() - (k + 1) / 2) <= 5 * math.sqrt((k * k - 1) / 12 / 5000)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_a_share_beta_of_the_rows_is_reset(beta):
    share = (draw([30] * 20000, beta) > 0).double().mean().item()
    assert abs(share - beta) < 5 * math.sqrt(beta * (1 - beta) / 20000)


@pytest.mark.parametrize("include_zero", [False, True])
def test_beta_0_resets_nothing(include_zero):
    assert_same(draw([9] * 1000, 0.0, include_zero), torch.zeros(1000, dtype=torch.long))


def test_beta_1_resets_every_row_that_has_a_reference():
    n = torch.arange(1000) % 4
    assert_same(draw(n, 1.0) > 0, n > 0)


def test_the_shortest_references():
    assert set(draw([0] * 1000, 1.0).tolist()) == {0} == set(draw([0] * 1000, 1.0, include_zero=True).tolist())
    assert set(draw([1] * 1000, 1.0).tolist()) == {1}
    assert set(draw([1] * 1000, 1.0, include_zero=True).tolist()) == {0, 1}


@pytest.mark.parametrize("include_zero", [False, True])
def test_reset_lengths_are_long_and_never_beyond_the_reference(include_zero):
    n = torch.randint(0, 60, (20000,), generator=torch.Generator().manual_seed(1))
    lengths = draw(n, 0.7, include_zero)
    assert lengths.dtype == torch.long and lengths.shape == n.shape
    assert (lengths >= 0).all() and (lengths <= n).all() and (lengths == n)[n > 0].any()


def test_the_generator_alone_decides_the_resets():
    torch.manual_seed(0)
    first = draw([20] * 100, 0.5, seed=1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert_same(draw([20] * 100, 0.5, seed=1), first)
    assert_same(torch.get_rng_state(), before)  # nothing is taken from the global generator
    assert not torch.equal(draw([20] * 100, 0.5, seed=2), first)


# ----------------------------------------------------------------------------------------------------------------------
# DPO


def test_dpo_loss_is_its_definition():
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = x = [randn(seed, 12, scale=5) for seed in range(4)]
    pc, pr, rc, rr = [y.numpy() for y in x]
    expected = 0.3 * (np.log(np.exp(pc) / np.exp(rc)) - np.log(np.exp(pr) / np.exp(rr)))  # Rafailov et al. (7)
    loss, margins = dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, 0.3)
    assert_near(margins, expected)
    assert_near(loss, np.mean(-np.log(1 / (1 + np.exp(-expected)))))


def test_dpo_loss_is_log_2_at_the_reference():
    chosen, rejected = randn(1, 8, scale=50), randn(2, 8, scale=50)
    loss, margins = dpo_loss(chosen, rejected, chosen, rejected, 0.05)
    assert_same(margins, torch.zeros(8).double())
    assert_near(loss, math.log(2))


def test_a_dpo_margin_is_positive_when_the_policy_moved_towards_the_chosen_response():
    # beta 0.1: chosen +2, then rejected +2, then both +2, then chosen -1 and rejected -4 (both fell, the rejected one further)
    policy_chosen, policy_rejected = f64(-8, -10, -8, -11), f64(-20, -18, -18, -24)
    _, margins = dpo_loss(policy_chosen, policy_rejected, f64(*[-10] * 4), f64(*[-20] * 4), 0.1)
    assert_near(margins, [0.2, -0.2, 0.0, 0.3])


def test_dpo_pushes_chosen_up_as_hard_as_it_pushes_rejected_down():
    chosen, rejected, ref_chosen, ref_rejected = [randn(seed, 12, scale=5) for seed in range(4)]
    loss, margins = dpo_loss(chosen.requires_grad_(), rejected.requires_grad_(), ref_chosen, ref_rejected, 0.3)
    loss.backward()
    assert_near(chosen.grad, -0.3 * torch.sigmoid(-margins.detach()) / 12)  # hardest where the margin is most wrong
    assert_near(chosen.grad, -rejected.grad)


# ----------------------------------------------------------------------------------------------------------------------
# Which tokens are learned from


def test_token_masks_of_two_rows_by_hand():
    reset_len, response_len = torch.tensor([2, 0]), torch.tensor([5, 3])  # row 0: the drawing at the top of drpo.py
    wanted = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]).bool()
    for mask in token_masks(reset_len, response_len, 6):
        assert_same(mask, wanted)


def test_official_token_masks_of_two_rows_by_hand():
    reset_len, response_len = torch.tensor([2, 0]), torch.tensor([5, 3])
    sampled, policy_loss, rest = token_masks(reset_len, response_len, 6, "official")
    assert_same(sampled, token_masks(reset_len, response_len, 6)[0])
    assert_same(
        policy_loss,
        torch.tensor(
            [
                [0, 0, 1, 1, 1, 1],  # no prefix, but all that follows EOS
                [1, 1, 1, 1, 1, 1],
            ]
        ).bool(),
    )
    assert_same(rest, torch.ones(2, 6).bool())  # and the prefix too


def test_a_response_that_fills_all_columns_is_masked_to_the_end():
    sampled, _, _ = token_masks(torch.tensor([0, 5]), torch.tensor([6, 6]), 6)
    assert_same(sampled, torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]).bool())
