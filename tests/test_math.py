"""Section 4 of drpo.py, "The mathematics", and `token_mask`: hand-worked numbers, and results of public packages.

Shapes and names are those of drpo.py. Most cases are float64, so that tolerances test formulas and not rounding."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

import drpo

ORACLES = [json.loads(file.read_text()) for file in sorted((Path(__file__).parent / "oracles").glob("*.json"))]


def f64(*rows):  # f64(1, 2) is (2,), f64([1, 2]) is (1, 2)
    return torch.tensor(rows, dtype=torch.float64)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_near(a, b, tolerance=1e-12):
    a, b = [torch.as_tensor(x, dtype=torch.float64) for x in (a, b)]
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- Every function that takes a mask, called on (a, b, c, mask), three tensors (B, T); it returns a tuple -
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
PLANTS = {"noise": 1e3 * randn(99, 6, 8), "nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("name", MASKED)
def test_nothing_outside_the_mask_counts(name, plant):
    """Neither in results nor in gradients; whitened advantages are constants of the loss and get none."""
    mask = drpo.token_mask(torch.tensor([0, 3, 7, 0, 2, 5]), torch.tensor([8, 5, 8, 1, 8, 6]), 8)
    clean = [randn(seed, 6, 8) for seed in (2, 3, 4)]

    def computed(dirty):
        x = [torch.where(mask | (i not in dirty), y, PLANTS[plant]).requires_grad_() for i, y in enumerate(clean)]
        results = MASKED[name](*x, mask)
        if "whiten" not in name:
            results[0].sum().backward()
        return [result.detach() for result in results], [y.grad for y in x if y.grad is not None]

    results, gradients = computed([])
    for dirty in [[0], [1], [2], [0, 1, 2]]:
        torch.testing.assert_close(computed(dirty), (results, gradients), rtol=0, atol=0)
    assert all(torch.equal(x != 0, mask) for x in results if x.shape == mask.shape)
    assert all((x[~mask] == 0).all() and (x[mask] != 0).any() for x in gradients) and bool(gradients) == ("whiten" not in name)


def test_token_mask_by_hand():
    # a reset of 2 and a response of 5; no reset and a response of 3; one token left to sample; a full row
    mask = drpo.token_mask(torch.tensor([2, 0, 5, 0]), torch.tensor([5, 3, 6, 6]), 6)
    wanted = [[0, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]]
    assert torch.equal(mask, torch.tensor(wanted).bool())


# ---- Means and whitening -----------------------------------------------------------------------------------
def test_masked_mean_and_whiten_by_hand():
    x = f64([1, 2, 100], [6, 100, 100])
    assert drpo.masked_mean(x, torch.tensor([[1, 1, 0], [1, 0, 0]])).item() == 3.0  # (1 + 2 + 6) / 3, not (1.5 + 6) / 2
    x = f64([1, 3, 50], [50, 5, 7])  # 1, 3, 5, 7: mean 4, biased variance (9 + 1 + 1 + 9) / 4 = 5
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert_near(drpo.masked_whiten(x, mask), f64([-3, -1, 0], [0, 1, 3]) / math.sqrt(5), 1e-8)
    kept = f64([4 - 3 / 5**0.5, 4 - 1 / 5**0.5, 0], [0, 4 + 1 / 5**0.5, 4 + 3 / 5**0.5])
    assert_near(drpo.masked_whiten(x, mask, shift_mean=False), kept, 1e-8)
    assert_near(drpo.masked_whiten(f64([7, 7, 50]), mask[:1]), f64([0, 0, 0]))


# ---- Rewards -----------------------------------------------------------------------------------------------
def test_penalised_rewards_by_hand():
    # kl_coef 0.5. Row 0: ln pi - ln pi_SFT = 1, -1, 2 -> -0.5, +0.5, -1 + score 2 = 1. Row 1: reset, then 0.5 -> -0.25 + 10.
    logprobs = f64([-1.0, -2.0, -1.0, -9.0], [-9.0, -0.5, -9.0, -9.0])
    ref_logprobs = f64([-2.0, -1.0, -3.0, -1.0], [-1.0, -1.0, -1.0, -1.0])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0]])
    rewards = drpo.penalised_rewards(f64(2, 10), logprobs, ref_logprobs, mask, 0.5)
    assert_near(rewards, f64([-0.5, 0.5, 1.0, 0.0], [0.0, 9.75, 0.0, 0.0]))


# ---- Generalised advantage estimation ----------------------------------------------------------------------
def test_gae_by_hand():
    # gamma = 0.5, lam = 0.5, rewards 1, 2, 4, values 2, 4, 8:
    #   delta_2 = 4             - 8 = -4        A_2 = -4                      return_2 = -4     + 8 = 4
    #   delta_1 = 2 + 0.5 x 8   - 4 =  2        A_1 =  2 + 0.25 x -4 = 1      return_1 =  1     + 4 = 5
    #   delta_0 = 1 + 0.5 x 4   - 2 =  1        A_0 =  1 + 0.25 x  1 = 1.25   return_0 =  1.25  + 2 = 3.25
    advantages, returns = drpo.gae(f64([7, 1, 2, 4, 7]), f64([7, 2, 4, 8, 7]), torch.tensor([[0, 1, 1, 1, 0]]), 0.5, 0.5)
    assert_near(advantages, f64([0, 1.25, 1, -4, 0]))
    assert_near(returns, f64([0, 3.25, 5, 4, 0]))


# ---- PPO's policy loss -------------------------------------------------------------------------------------
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


# ---- PPO's value loss --------------------------------------------------------------------------------------
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


# ---- Losses on pairs: the reward model's, Eq. (1), and DPO's -----------------------------------------------
def test_bradley_terry_loss_by_hand():
    assert_near(drpo.bradley_terry_loss(f64(3), f64(3)), math.log(2))
    assert_near(drpo.bradley_terry_loss(f64(1), f64(0)), math.log(1 + math.exp(-1)))
    both = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2
    assert_near(drpo.bradley_terry_loss(f64(6, 5), f64(5, 6)), both)  # the mean of the two; only differences count
    assert drpo.bradley_terry_loss(torch.tensor([0.0]), torch.tensor([1000.0])).item() == 1000.0  # not infinity


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
    assert drpo.dpo_loss(*torch.tensor([[0.0], [1000.0], [0.0], [0.0]]), 0.5)[0].item() == 500.0  # not infinity


# ---- Reset lengths -----------------------------------------------------------------------------------------
def draw(lengths, beta, include_zero=False, seed=0):
    return drpo.sample_reset_lengths(torch.as_tensor(lengths), beta, torch.Generator().manual_seed(seed), include_zero)


@pytest.mark.parametrize("include_zero", [False, True], ids=["1..n", "0..n"])
@pytest.mark.parametrize("beta", [1.0, 0.5, 0.1])
def test_a_share_beta_is_reset_to_prefixes_of_uniform_length(beta, include_zero):
    n = torch.tensor([1, 2, 5]).repeat(20000)
    lengths = draw(n, beta, include_zero)
    for k in (1, 2, 5):  # each on its own reference
        each = beta / (k + include_zero)  # probability of one length, among all rows
        wanted = 20000 * torch.tensor([1 - beta + each * include_zero] + [each] * k)  # a row that is not reset has 0 as well
        counts = torch.bincount(lengths[n == k], minlength=k + 1)
        assert len(counts) == k + 1 and (counts[wanted == 0] == 0).all()
        possible = wanted > 0
        statistic = ((counts - wanted) ** 2 / wanted)[possible].sum()
        quantiles = {1: 0.01, 2: 10.828, 3: 13.816, 5: 18.467, 6: 20.515}  # 99.9 % of chi-square, by number of outcomes
        assert statistic < quantiles[int(possible.sum())]
    assert draw([0, 0, 0], beta, include_zero).tolist() == [0, 0, 0]


# ---- RLOO --------------------------------------------------------------------------------------------------
def test_rloo_advantages_by_hand():
    assert_near(drpo.rloo_advantages(f64(3, 1, 10, 20), 2), f64(2, -2, -10, 10))
    # K = 4, returns 1, 2, 3, 6: 1 - (2 + 3 + 6) / 3, 2 - (1 + 3 + 6) / 3, 3 - (1 + 2 + 6) / 3, 6 - (1 + 2 + 3) / 3
    assert_near(drpo.rloo_advantages(f64(1, 2, 3, 6, 5, 5, 5, 5), 4), f64(-8 / 3, -4 / 3, 0, 4, 0, 0, 0, 0))


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


# ---- Oracles: cases of public packages, made by oracles/make_oracles.py ------------------------------------
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
