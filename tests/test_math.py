"""Section 4 of drpo.py, "The mathematics", and `token_mask`: hand-worked numbers, closed forms, and results of public packages.

Shapes and names are those of drpo.py: (B, T) over response positions; `mask` is 1 on the tokens that the policy sampled.
All random numbers come from fixed seeds. Most cases are float64, so that tolerances test formulas and not rounding."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import drpo

some = settings(max_examples=50, deadline=None, derandomize=True)
ORACLES = [json.loads(file.read_text()) for file in sorted((Path(__file__).parent / "oracles").glob("*.json"))]


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
    a, b = [torch.as_tensor(x, dtype=torch.float64) for x in (a, b)]
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# Every function that takes a mask, called on (a, b, c, mask), three tensors (B, T); it returns a tuple.

MASKED = {
    "masked_mean": lambda a, b, c, mask: (drpo.masked_mean(a, mask),),
    "masked_whiten": lambda a, b, c, mask: (drpo.masked_whiten(a, mask),),
    "masked_whiten, mean kept": lambda a, b, c, mask: (drpo.masked_whiten(a, mask, shift_mean=False),),
    "penalised_rewards": lambda a, b, c, mask: (drpo.penalised_rewards(torch.ones_like(a[:, 0]), a, b, mask, 0.1),),
    "gae": lambda a, b, c, mask: drpo.gae(a, b, mask, 0.9, 0.8),
    "log_ratio": lambda a, b, c, mask: (drpo.log_ratio(a, b, mask),),
    "ppo_policy_loss": lambda a, b, c, mask: drpo.ppo_policy_loss(a, b, c, mask, 0.2),
    "ppo_value_loss": lambda a, b, c, mask: drpo.ppo_value_loss(a, b, c, mask, 0.2),
}
PER_TOKEN = ["masked_whiten", "penalised_rewards", "gae", "log_ratio"]  # those that return tensors (B, T)
DIFFERENTIATED = [name for name in MASKED if "whiten" not in name]  # whitened advantages are constants of the loss
PLANTS = {"noise": 1e3 * randn(99, 6, 8), "nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def planted(plant):
    """-> mask, three random tensors, and the same three with something else wherever the mask is 0."""
    mask, x = segments(1, 6, 8), [randn(seed, 6, 8) for seed in (2, 3, 4)]
    return mask, x, [torch.where(mask, y, PLANTS[plant]) for y in x]


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("name", MASKED)
def test_values_outside_the_mask_never_matter(name, plant):
    mask, clean, dirty = planted(plant)
    for where in [(0,), (1,), (2,), (0, 1, 2)]:
        x = [dirty[i] if i in where else clean[i] for i in range(3)]
        for result, wanted in zip(MASKED[name](*x, mask), MASKED[name](*clean, mask)):
            assert_same(result, wanted)


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients_are_zero_outside_the_mask_whatever_is_there(name, plant):
    mask, clean, dirty = planted(plant)
    for where in [(0,), (1,), (2,), (0, 1, 2)]:
        gradients = []
        for x in clean, [dirty[i] if i in where else clean[i] for i in range(3)]:
            x = [y.clone().requires_grad_() for y in x]
            MASKED[name](*x, mask)[0].sum().backward()
            gradients.append([y.grad for y in x if y.grad is not None])
        for grad, wanted in zip(gradients[1], gradients[0], strict=True):
            assert_same(grad, wanted)
            assert (grad[~mask] == 0).all() and (grad[mask] != 0).any()


@pytest.mark.parametrize("name", MASKED)
def test_gradients_are_those_of_finite_differences(name):
    mask, x, _ = planted("noise")
    assert torch.autograd.gradcheck(lambda *x: MASKED[name](*x, mask)[0], [y.requires_grad_() for y in x])


@pytest.mark.parametrize("name", PER_TOKEN)
def test_per_token_results_are_zero_outside_the_mask_only(name):
    mask, x, _ = planted("noise")
    for result in MASKED[name](*x, mask):
        assert_same(result != 0, mask)


def test_token_mask_by_hand():
    # a reset of 2 and a response of 5; no reset and a response of 3; one token left to sample; a full row
    mask = drpo.token_mask(torch.tensor([2, 0, 5, 0]), torch.tensor([5, 3, 6, 6]), 6)
    wanted = [[0, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]]
    assert_same(mask, torch.tensor(wanted).bool())


# ----------------------------------------------------------------------------------------------------------------------
# Means and whitening


def test_masked_mean_is_over_tokens_not_a_mean_of_row_means():
    x = f64([1, 2, 100], [6, 100, 100])
    assert drpo.masked_mean(x, torch.tensor([[1, 1, 0], [1, 0, 0]])).item() == 3.0  # (1 + 2 + 6) / 3, not (1.5 + 6) / 2


def test_masked_whiten_by_hand():
    x = f64([1, 3, 50], [50, 5, 7])  # 1, 3, 5, 7: mean 4, biased variance (9 + 1 + 1 + 9) / 4 = 5
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert_near(drpo.masked_whiten(x, mask), f64([-3, -1, 0], [0, 1, 3]) / math.sqrt(5), 1e-8)
    kept = f64([4 - 3 / 5**0.5, 4 - 1 / 5**0.5, 0], [0, 4 + 1 / 5**0.5, 4 + 3 / 5**0.5])
    assert_near(drpo.masked_whiten(x, mask, shift_mean=False), kept, 1e-8)


@some
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12), st.integers(0, 10**6))
def test_whitened_tokens_have_mean_0_and_biased_variance_1(x, seed):
    x, mask = f64(x), segments(seed, 1, len(x))
    white, token = drpo.masked_whiten(x, mask)[mask].numpy(), x[mask].numpy()
    assert_near(white.mean(), 0, 1e-9)
    assert_near(white.var(), token.var() / (token.var() + 1e-8), 1e-6)  # numpy's variance divides by N; 0 for a constant
    assert_near(drpo.masked_whiten(x, mask, shift_mean=False)[mask], white + token.mean(), 1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Rewards


def test_penalised_rewards_by_hand():
    # kl_coef 0.5. Row 0: ln pi - ln pi_SFT = 1, -1, 2 -> -0.5, +0.5, -1 + score 2 = 1. Row 1: reset, then 0.5 -> -0.25 + 10.
    logprobs = f64([-1.0, -2.0, -1.0, -9.0], [-9.0, -0.5, -9.0, -9.0])
    ref_logprobs = f64([-2.0, -1.0, -3.0, -1.0], [-1.0, -1.0, -1.0, -1.0])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0]])
    rewards = drpo.penalised_rewards(f64(2, 10), logprobs, ref_logprobs, mask, 0.5)
    assert_near(rewards, f64([-0.5, 0.5, 1.0, 0.0], [0.0, 9.75, 0.0, 0.0]))


@pytest.mark.parametrize("kl_coef", [0.0, 0.05, 1.0])
def test_rewards_of_a_row_add_up_to_score_minus_kl_penalty(kl_coef):
    mask, scores, logprobs, ref_logprobs = segments(5, 8, 7), randn(6, 8), randn(7, 8, 7), randn(8, 8, 7)
    kl = ((logprobs - ref_logprobs) * mask).sum(1)
    assert_near(drpo.penalised_rewards(scores, logprobs, ref_logprobs, mask, kl_coef).sum(1), scores - kl_coef * kl)


def test_without_critic_the_advantage_is_the_reward_to_go():
    # kl_coef 0.1, ln ratios 1, 2, 3 after a reset token; score 5:  5 - 0.1 (1 + 2 + 3) = 4.4, 5 - 0.1 (2 + 3) = 4.5, 5 - 0.3
    mask, logprobs = torch.tensor([[0, 1, 1, 1, 0]]), f64([9, 1, 2, 3, 9])
    rewards = drpo.penalised_rewards(f64(5), logprobs, torch.zeros_like(logprobs), mask, 0.1)
    assert_near(drpo.gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)[0], f64([0, 4.4, 4.5, 4.7, 0]))


# ----------------------------------------------------------------------------------------------------------------------
# Generalised advantage estimation


def test_gae_by_hand():
    # gamma = 0.5, lam = 0.5, rewards 1, 2, 4, values 2, 4, 8:
    #   delta_2 = 4             - 8 = -4        A_2 = -4                      return_2 = -4     + 8 = 4
    #   delta_1 = 2 + 0.5 x 8   - 4 =  2        A_1 =  2 + 0.25 x -4 = 1      return_1 =  1     + 4 = 5
    #   delta_0 = 1 + 0.5 x 4   - 2 =  1        A_0 =  1 + 0.25 x  1 = 1.25   return_0 =  1.25  + 2 = 3.25
    advantages, returns = drpo.gae(f64([7, 1, 2, 4, 7]), f64([7, 2, 4, 8, 7]), torch.tensor([[0, 1, 1, 1, 0]]), 0.5, 0.5)
    assert_near(advantages, f64([0, 1.25, 1, -4, 0]))
    assert_near(returns, f64([0, 3.25, 5, 4, 0]))


@some
@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6))
def test_gae_is_the_double_sum_of_discounted_td_errors(gamma, lam, seed):
    mask, rewards, values = segments(seed, 3, 6), randn(seed + 1, 3, 6), randn(seed + 2, 3, 6)
    expected = np.zeros((3, 6))
    for b in range(3):
        steps = [t for t in range(6) if mask[b, t]]
        V = {t: values[b, t].item() for t in steps}  # 0 after the last step
        delta = {t: rewards[b, t].item() + gamma * V.get(t + 1, 0.0) - V[t] for t in steps}
        for t in steps:
            expected[b, t] = sum((gamma * lam) ** (u - t) * delta[u] for u in steps if u >= t)
    advantages, returns = drpo.gae(rewards, values, mask, gamma, lam)
    assert_near(advantages, expected)
    assert_near(returns, expected + (values * mask).numpy())


# ----------------------------------------------------------------------------------------------------------------------
# PPO's policy loss


def test_ppo_policy_loss_by_hand():
    # eps = 0.2      rho  1.5,  A +1  -> -1.2, clipped          rho  0.5,  A +1  -> -0.5         gradient -A rho / 4
    #                rho  1.5,  A -1  -> +1.5                   rho  0.5,  A -1  -> +0.8, clipped        unless clipped
    #                mean (-1.2 - 0.5 + 1.5 + 0.8) / 4 = 0.15, clipped 2 of 4
    ratio, advantages, mask = f64([1.5, 0.5, 1.5, 0.5, 7.0]), f64([1, 1, -1, -1, 7]), torch.tensor([[1, 1, 1, 1, 0]])
    logprobs = ratio.log().requires_grad_()
    loss, clipfrac = drpo.ppo_policy_loss(logprobs, 0 * ratio, advantages, mask, 0.2)
    loss.backward()
    assert_near(loss.detach(), 0.15)
    assert clipfrac.item() == 0.5
    assert_near(logprobs.grad, f64([0, -0.5, 1.5, 0, 0]) / 4)


@pytest.mark.parametrize("advantage, edge, outward", [(1, 1.2, 1), (-1, 0.8, -1)])
def test_the_policy_clip_starts_at_1_plus_or_minus_eps(advantage, edge, outward):
    for offset, bites in [(-1e-6, False), (1e-6, True)]:
        logprobs = f64([math.log(edge + outward * offset)]).requires_grad_()
        loss, clipfrac = drpo.ppo_policy_loss(logprobs, f64([0]), f64([advantage]), torch.ones(1, 1), 0.2)
        loss.backward()
        assert clipfrac.item() == bites == (logprobs.grad.item() == 0)
        assert_near(loss.detach(), -advantage * edge, 2e-6)  # continuous there


def test_at_ratio_1_the_loss_is_that_of_reinforce():
    old_logprobs, advantages, mask = randn(0, 20, 10), randn(1, 20, 10), segments(2, 20, 10)
    logprobs = old_logprobs.clone().requires_grad_()
    loss, clipfrac = drpo.ppo_policy_loss(logprobs, old_logprobs, advantages, mask, 0.2)
    loss.backward()
    assert_near(loss.detach(), -advantages[mask].mean())
    assert_near(logprobs.grad, torch.where(mask, -advantages / mask.sum(), 0.0))
    assert clipfrac.item() == 0


# ----------------------------------------------------------------------------------------------------------------------
# PPO's value loss


def test_ppo_value_loss_by_hand():
    # eps = 0.2, V_old = 0                        (V - R)^2   (clip - R)^2   larger           gradient (V - R) / N
    #   V  0.1, R  1   inside the range              0.81        0.81         0.81            -0.9 / 6
    #   V  0.5, R  1   towards R, too far            0.25        0.64         0.64, clipped    0
    #   V  0.5, R  0   should not have moved         0.25        0.04         0.25             0.5 / 6
    #   V -0.5, R -1   towards R, too far            0.25        0.64         0.64, clipped    0
    #   V -0.5, R  0   should not have moved         0.25        0.04         0.25            -0.5 / 6
    #   V  0.9, R -1   away from R                   3.61        1.44         3.61             1.9 / 6
    #   0.5 x (0.81 + 0.64 + 0.25 + 0.64 + 0.25 + 3.61) / 6 = 0.5 x 6.2 / 6
    values, returns = f64([0.1, 0.5, 0.5, -0.5, -0.5, 0.9, 50]).requires_grad_(), f64([1, 1, 0, -1, 0, -1, 0])
    loss, clipfrac = drpo.ppo_value_loss(values, 0 * values.detach(), returns, torch.tensor([[1] * 6 + [0]]), 0.2)
    loss.backward()
    assert_near(loss.detach(), 0.5 * 6.2 / 6)
    assert_near(clipfrac, 2 / 6, 1e-6)
    assert_near(values.grad, f64([-0.9, 0, 0.5, 0, -0.5, 1.9, 0]) / 6)


@pytest.mark.parametrize("direction", [1, -1])
def test_the_value_clip_starts_at_eps_from_the_old_value(direction):
    for offset, bites in [(-1e-6, False), (1e-6, True)]:
        values = f64([3 + direction * (0.2 + offset)]).requires_grad_()
        loss, clipfrac = drpo.ppo_value_loss(values, f64([3]), f64([3 + direction]), torch.ones(1, 1), 0.2)
        loss.backward()
        assert clipfrac.item() == bites == (values.grad.item() == 0)
        assert_near(loss.detach(), 0.5 * 0.8**2, 2e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Losses on pairs: the reward model's, Eq. (1), and DPO's


def test_bradley_terry_loss_by_hand():
    assert_near(drpo.bradley_terry_loss(f64(3), f64(3)), math.log(2))
    assert_near(drpo.bradley_terry_loss(f64(1), f64(0)), math.log(1 + math.exp(-1)))
    both = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2
    assert_near(drpo.bradley_terry_loss(f64(6, 5), f64(5, 6)), both)  # the mean of the two; only differences count


def test_bradley_terry_loss_is_least_at_the_log_odds():
    w = f64(math.log(4)).requires_grad_()  # item a scores w, item b 0; a wins 4 of 5 times
    drpo.bradley_terry_loss(w * f64(1, 1, 1, 1, 0), w * f64(0, 0, 0, 0, 1)).backward()
    assert_near(w.grad, [0.0])


def test_a_hopeless_pair_costs_its_margin_not_infinity():
    assert drpo.bradley_terry_loss(torch.tensor([0.0]), torch.tensor([1000.0])).item() == 1000.0
    assert drpo.dpo_loss(*torch.tensor([[0.0], [1000.0], [0.0], [0.0]]), 0.5)[0].item() == 500.0


def test_dpo_loss_by_hand():
    # beta 0.1; chosen +2, rejected +2, both +2, chosen -1 and rejected -4: margins 0.2, -0.2, 0, 0.3
    policy_chosen, policy_rejected = f64(-8, -10, -8, -11).requires_grad_(), f64(-20, -18, -18, -24).requires_grad_()
    loss, margins = drpo.dpo_loss(policy_chosen, policy_rejected, f64(*[-10] * 4), f64(*[-20] * 4), 0.1)
    loss.backward()
    m = f64(0.2, -0.2, 0.0, 0.3)
    assert_near(margins.detach(), m)
    assert_near(loss.detach(), (1 + (-m).exp()).log().mean())
    assert_near(policy_chosen.grad, -0.1 / (1 + m.exp()) / 4)  # the more wrong the margin, the larger
    assert_near(policy_rejected.grad, -policy_chosen.grad)


def test_losses_on_pairs_have_gradients_of_finite_differences():
    x = [randn(seed, 5).requires_grad_() for seed in range(4)]
    assert torch.autograd.gradcheck(lambda *x: drpo.dpo_loss(*x, 0.3), x)
    assert torch.autograd.gradcheck(drpo.bradley_terry_loss, x[:2])


# ----------------------------------------------------------------------------------------------------------------------
# Reset lengths


def draw(lengths, beta, include_zero=False, seed=0):
    return drpo.sample_reset_lengths(torch.as_tensor(lengths), beta, torch.Generator().manual_seed(seed), include_zero)


@pytest.mark.parametrize("include_zero", [False, True], ids=["1..n", "0..n"])
@pytest.mark.parametrize("beta", [1.0, 0.5, 0.1])
def test_a_share_beta_is_reset_to_prefixes_of_uniform_length(beta, include_zero):
    n, rows = 5, 20000
    counts = np.bincount(draw([n] * rows, beta, include_zero).numpy(), minlength=n + 1)
    each = beta / (n + include_zero)  # probability of one length, among all rows
    probability = [1 - beta + each * include_zero] + [each] * n  # a row that is not reset has 0 as well
    possible = [k for k in range(n + 1) if probability[k] > 0]
    assert len(counts) == n + 1 and counts[possible].sum() == rows
    statistic = sum((counts[k] - rows * probability[k]) ** 2 / (rows * probability[k]) for k in possible)
    assert statistic < {4: 18.467, 5: 20.515}[len(possible) - 1]  # 99.9 % quantiles of chi-square


def test_each_prefix_is_uniform_on_its_own_reference():
    n = torch.arange(1, 7).repeat(5000)
    lengths = draw(n, 1.0)
    for k in range(1, 7):  # uniform on 1..k: mean (k + 1) / 2, variance (k^2 - 1) / 12
        drawn = lengths[n == k].double()
        assert set(drawn.tolist()) == set(range(1, k + 1))
        assert abs(drawn.mean() - (k + 1) / 2) <= 5 * math.sqrt((k * k - 1) / 12 / 5000)


@some
@given(st.lists(st.integers(0, 40), min_size=1), st.floats(0, 1), st.booleans(), st.integers(0, 10**6))
def test_reset_lengths_lie_between_0_and_the_reference(n, beta, include_zero, seed):
    n = torch.tensor(n)
    lengths, none, every = [draw(n, b, include_zero, seed) for b in (beta, 0.0, 1.0)]
    assert lengths.dtype == torch.long and lengths.shape == n.shape
    assert (lengths >= 0).all() and (lengths <= n).all()
    assert (none == 0).all() and (include_zero or torch.equal(every > 0, n > 0))


def test_the_generator_alone_decides_the_resets():
    torch.manual_seed(0)
    first = draw([20] * 100, 0.5, seed=1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert_same(draw([20] * 100, 0.5, seed=1), first)
    assert_same(torch.get_rng_state(), before)
    assert not torch.equal(draw([20] * 100, 0.5, seed=2), first)


# ----------------------------------------------------------------------------------------------------------------------
# RLOO


def test_rloo_advantages_by_hand():
    assert_near(drpo.rloo_advantages(f64(3, 1, 10, 20), 2), f64(2, -2, -10, 10))
    # K = 4, returns 1, 2, 3, 6: 1 - (2 + 3 + 6) / 3, 2 - (1 + 3 + 6) / 3, 3 - (1 + 2 + 6) / 3, 6 - (1 + 2 + 3) / 3
    assert_near(drpo.rloo_advantages(f64(1, 2, 3, 6, 5, 5, 5, 5), 4), f64(-8 / 3, -4 / 3, 0, 4, 0, 0, 0, 0))


@some
@given(st.sampled_from([2, 3, 5]), st.lists(st.floats(-100, 100), min_size=15, max_size=45), st.floats(-100, 100))
def test_rloo_advantages_sum_to_0_and_ignore_a_group_shift(K, returns, shift):
    groups = len(returns) // K
    returns, of_group_0 = f64(*returns[: groups * K]), (torch.arange(groups * K) < K).double()
    advantages = drpo.rloo_advantages(returns, K)
    assert_near(advantages.view(groups, K).sum(1), torch.zeros(groups), 1e-9)
    assert_near(drpo.rloo_advantages(returns + shift * of_group_0, K), advantages, 1e-9)


@pytest.mark.parametrize("K", [2, 3])
def test_the_rloo_gradient_is_unbiased(K):
    # two states (groups), three actions; every outcome of the 2K draws is enumerated with its probability
    logits, reward = randn(0, 2, 3).requires_grad_(), 5 * randn(1, 2, 3)
    logprobs, state = logits.log_softmax(1), torch.arange(2).repeat_interleave(K)
    actions = torch.tensor(list(itertools.product(range(3), repeat=2 * K)))  # (3^2K, 2K)
    chosen = logprobs[state, actions]
    advantages = drpo.rloo_advantages(reward[state, actions].flatten(), K).view(chosen.shape)
    estimate = (advantages * chosen).sum(1) / K  # its gradient is the estimator: sum over states, mean over K rollouts
    (expected,) = torch.autograd.grad((chosen.sum(1).exp().detach() * estimate).sum(), logits, retain_graph=True)
    (true,) = torch.autograd.grad((logprobs.exp() * reward).sum(), logits)
    assert_near(expected, true)
    assert true.abs().min() > 0.01


# ----------------------------------------------------------------------------------------------------------------------
# Oracles: cases of public packages, made by oracles/make_oracles.py


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{case['ours']}, {package['package']}, {i}")
        for package in ORACLES
        for i, case in enumerate(package["cases"])
    ],
)
def test_public_packages_compute_the_same(case):
    x = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in case["arguments"].items()}
    for name in case["gradients"]:
        x[name].requires_grad_()
    result = getattr(drpo, case["ours"])(**x)
    results = result if isinstance(result, tuple) else (result,)
    for ours, wanted in zip(results, case["outputs"].values()):
        assert ours.dtype == torch.float32
        assert_near(ours.detach(), wanted, 1e-6)
    if case["gradients"]:
        results[0].backward()
    for name, wanted in case["gradients"].items():
        assert_near(x[name].grad, wanted, 1e-6)


def test_four_packages_speak_for_six_functions():
    assert [package["package"].split()[0] for package in ORACLES] == ["rlax", "stable_baselines3", "torchrl", "trl"]
    functions = {case["ours"] for package in ORACLES for case in package["cases"]}
    assert functions == {"gae", "ppo_policy_loss", "ppo_value_loss", "dpo_loss", "bradley_terry_loss", "rloo_advantages"}
