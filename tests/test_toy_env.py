"""The detour lock: its tables, exact values, methods and demo."""

import json
import math
from itertools import product

import pytest
import torch

import drpo
import toy_env
from tools import toy_sweep
from toy_env import CHAIN, CORRIDOR, END, Data


@pytest.fixture(scope="module")
def small():  # H = 6, A = 4: lock, data, labelled pairs, SFT policy, learned reward
    lock = toy_env.detour_lock(6, A=4, seed=3)
    data = toy_env.collect(lock, lock.behaviour, 20_000, drpo.generator(3, "data"))
    pairs = toy_env.label(lock, data, drpo.generator(3, "labels"))
    return lock, data, pairs, toy_env.clone(data, 4), toy_env.fit_reward(data, pairs, 4)


def random_policy(shape, seed=0):
    return torch.randn(shape, generator=drpo.generator(seed, "policy")).softmax(-1)


# ---- Environment -------------------------------------------------------------------------------------------
def test_the_tables_of_four_layers_are_those_by_hand():
    lock = toy_env.detour_lock(4, A=2, c=2.0, seed=5)
    good = [int(lock.transition[h, CHAIN, 1, CHAIN] > 0) for h in range(3)] + [int(lock.reward[3, CHAIN].argmax())]
    leave = {h: int(lock.transition[h, CORRIDOR, 1, END] == 1) for h in (1, 2)}
    chain, corridor, end = torch.eye(3).tolist()
    by_hand = {0: (chain, corridor), 1: (chain, end), 2: (chain, end), 3: (end, end)}
    for h, (right, wrong) in by_hand.items():
        assert lock.transition[h, CHAIN, good[h]].tolist() == right
        assert lock.transition[h, CHAIN, 1 - good[h]].tolist() == wrong
    for h, on in ((1, [0.5, 0.5, 0.0]), (2, [1.0, 0.0, 0.0])):  # onto the chain with probability 1 / (H - 1 - h)
        assert lock.transition[h, CORRIDOR, leave[h]].tolist() == end
        assert lock.transition[h, CORRIDOR, 1 - leave[h]].tolist() == on
        assert lock.reward[h, CORRIDOR, leave[h]] == 0 and lock.reward[h, CORRIDOR, 1 - leave[h]] == -0.5
    assert lock.transition[:, END, :, END].eq(1).all() and lock.reward[:, END].eq(0).all()
    assert lock.reward[:, CHAIN].sum() == 1 and lock.reward[3, CHAIN, good[3]] == 1


def test_values_are_those_of_enumeration():
    lock, policy, expected = toy_env.detour_lock(3, A=2, seed=1), random_policy((3, 3, 2)), 0.0
    for *actions, s1, s2 in product((0, 1), (0, 1), (0, 1), range(3), range(3)):
        p = 1.0
        for h, s, after in zip(range(3), (CHAIN, s1, s2), (s1, s2, None)):
            p *= policy[h, s, actions[h]] * (1 if after is None else lock.transition[h, s, actions[h], after])
        expected += p * sum(lock.reward[h, s, actions[h]] for h, s in enumerate((CHAIN, s1, s2)))
    assert toy_env.q_values(lock, lock.reward, policy)[1] == pytest.approx(expected.item(), abs=1e-6)


def test_the_data_covers_the_chain_and_earns_nothing():
    values = [toy_env.coverage(toy_env.detour_lock(H, seed=H)) for H in (10, 20, 40)]  # C_ST and C_TR of the paper
    assert [round(c_st) for c_st, _ in values] == [184, 451, 992]
    assert [math.log10(c_tr) for _, c_tr in values] == pytest.approx([10, 20, 40], abs=1e-3)
    lock = toy_env.detour_lock(20, seed=0)
    data = toy_env.collect(lock, lock.behaviour, 100_000, drpo.generator(0, "data"))
    returns = toy_env.summing(data, 10)(lock.reward)
    assert returns.max() <= 0 and returns.mean().item() == pytest.approx(-0.62, abs=0.01)
    assert (data.states == CHAIN).float().mean(0).min().item() == pytest.approx(0.022, abs=0.003)


def test_draws_follow_the_cdf_even_at_its_edges():
    p = torch.tensor([[[0.0, 0.25, 0.0, 0.75], [1.0, 0.0, 0.0, 0.0]]])  # one layer, two rows
    table = toy_env.cdf(p)[0]
    assert table.tolist() == [0.0, 0.25, 0.25, 1.0, 2.0, 2.0, 2.0, 2.0]
    u = torch.tensor([0.0, 0.2499, 0.25, 1 - 2**-53], dtype=torch.double)
    assert torch.searchsorted(table, u, right=True).tolist() == [1, 1, 3, 3]
    assert torch.searchsorted(table, 1 + u[:3], right=True).tolist() == [4, 4, 4]
    assert toy_env.cdf(torch.tensor([[[0.3, 0.3, 0.3]]]))[0, -1] == 1.0  # rounding never leaves a gap at the end


# ---- Resets ------------------------------------------------------------------------------------------------
def test_an_episode_replays_the_data_then_follows_the_policy(small):
    lock, data, _, sft, _ = small
    rows, reset_len = toy_env.draw_resets(data, 5000, 1.0, drpo.generator(1, "resets"))
    first = torch.full((5000,), 2)
    given = data.states[rows], data.actions[rows], first
    states, actions = toy_env.rollout(lock, sft, reset_len, drpo.generator(1, "episodes"), *given)
    T, at = states.shape[1], (torch.arange(5000), reset_len)
    prefix = torch.arange(T) < reset_len[:, None]
    assert torch.equal(states[prefix], data.states[rows][:, :T][prefix])
    assert torch.equal(actions[prefix], data.actions[rows][:, :T][prefix])
    assert torch.equal(states[at], data.states[rows, reset_len]) and (states[at] != END).all() and actions[at].eq(2).all()
    possible = lock.transition.flatten(0, 2)[toy_env.cells_of(states, actions, 4)[:, :-1]]  # (B, T-1, 3)
    assert (possible.gather(2, states[:, 1:, None]) > 0).all()


def test_resets_are_uniform_over_each_trajectory():
    zeros = torch.zeros(3, 6, dtype=torch.long)
    rows, reset_len = toy_env.draw_resets(Data(zeros, zeros, torch.tensor([1, 2, 5])), 60_000, 1.0, drpo.generator(0))
    for row, critical in ((1, 10.83), (2, 18.47)):  # chi-square at 0.001, with 1 and 4 degrees of freedom
        counts = torch.bincount(reset_len[rows == row]).double()
        assert len(counts) == (1, 2, 5)[row]
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < critical
    assert (reset_len[rows == 0] == 0).all()


def first_policies(small, n=3, data=None, **settings):
    lock, own, _, sft, reward = small
    updates = toy_env.ppo(lock, own if data is None else data, sft, reward, 7, batch=64, **settings)
    return [next(updates)[0].clone() for _ in range(n)]


@pytest.mark.parametrize(
    "settings, matters", [({"beta": 0}, False), ({"beta": 1}, True), ({"beta": 1, "roll_in": True}, False)]
)
def test_the_data_matters_only_where_it_is_reset_to(small, settings, matters):
    one, other = [first_policies(small, data=data, **settings) for data in (small[1], Data(*[x.flip(0) for x in small[1]]))]
    assert all(torch.equal(a, b) for a, b in zip(one, other)) != matters


def test_only_the_policys_own_steps_are_trained_on(small, monkeypatch):
    """Every reset is past the start: the policy and the critic there stay as they were."""
    lock, data, _, sft, reward = small
    long = Data(*[x[data.lengths > 1] for x in data])
    monkeypatch.setattr(toy_env, "draw_resets", lambda data, batch, beta, rng: (torch.arange(batch), torch.ones(batch).long()))
    policy, values, on_chain = next(toy_env.ppo(lock, long, sft, reward, 0, 1.0, batch=256))
    torch.testing.assert_close(policy[0], sft[0], rtol=0, atol=1e-7)
    assert values[0].eq(0).all() and on_chain[0] == 0
    assert not torch.allclose(policy[1:], sft[1:], atol=1e-3) and values[1:, :2].ne(0).any()


def test_groups_share_their_resets(small, monkeypatch):
    seen, rollout = [], toy_env.rollout
    monkeypatch.setattr(toy_env, "rollout", lambda *args: seen.append(args[2:6]) or rollout(*args))
    first_policies(small, n=1, beta=0.5, group=4)
    reset_len, _, states, actions = seen[0]
    for x in (reset_len, states, actions):
        grouped = x.view(16, 4, -1)
        assert torch.equal(grouped, grouped[:, :1].expand_as(grouped))
    assert len(reset_len.unique()) > 2


def test_the_count_bonus_is_1_over_the_root_of_the_visits(small, monkeypatch):
    seen, gae = [], drpo.gae
    monkeypatch.setattr(drpo, "gae", lambda rewards, *args, **kw: seen.append(rewards) or gae(rewards, *args, **kw))
    for bonus in (0.0, 2.0):
        first_policies(small, n=1, beta=0.0, bonus=bonus)
    gain = (seen[1] - seen[0])[:, 0]  # 64 episodes at the start
    states, actions = toy_env.rollout(small[0], small[3], torch.zeros(64).long(), drpo.generator(7, "rollouts"))
    counts = torch.bincount(actions[:, 0])
    torch.testing.assert_close(gain, 2.0 / counts[actions[:, 0]].sqrt())


# ---- Methods -----------------------------------------------------------------------------------------------
def test_the_npg_step_minimises_its_objective():
    sft, policy = random_policy((2, 3, 4), 1).double(), random_policy((2, 3, 4), 2).double()
    q, eta, lam = torch.randn(2, 3, 4, generator=drpo.generator(3)).double(), 5.0, 0.3
    logits = toy_env.npg_step(sft.log(), policy.log(), q, eta, lam).requires_grad_()
    p = logits.softmax(-1)
    (-q * p + lam * p * (p / sft).log() + p * (p / policy).log() / eta).sum().backward()
    assert logits.grad.abs().max() < 1e-12
    torch.testing.assert_close(toy_env.npg_step(sft.log(), policy.log(), q, 0.0, 1.0).exp(), policy)  # no step
    torch.testing.assert_close(toy_env.npg_step(sft.log(), policy.log(), q, 1.0, 1e9).exp(), sft)  # a huge lambda


def test_the_clone_counts():  # two trajectories of one step, actions 0 and 1 of 2: each counted once, plus one
    data = Data(torch.tensor([[CHAIN, END], [CHAIN, CHAIN]]), torch.tensor([[0, 0], [0, 1]]), torch.tensor([1, 2]))
    policy = toy_env.clone(data, 2)
    assert policy[0, CHAIN].tolist() == [0.75, 0.25]  # two of action 0, plus one each
    torch.testing.assert_close(policy[1, CHAIN], torch.tensor([1 / 3, 2 / 3]))
    assert policy[:, CORRIDOR].eq(0.5).all() and policy[1, END].eq(0.5).all()


def test_the_fitted_reward_recovers_differences():
    """Actions 0 and 1 of one layer, 0 preferred in 880 of 1000 pairs: the logit ln(880 / 120), which the prior hardly moves."""
    actions = torch.tensor([[0], [1]]).repeat(1000, 1)
    data = Data(torch.zeros_like(actions), actions, torch.ones(2000).long())
    pairs = torch.arange(2000).view(-1, 2)
    pairs[880:] = pairs[880:].flip(1)
    reward = toy_env.fit_reward(data, pairs, 2)
    assert (reward[0, CHAIN, 0] - reward[0, CHAIN, 1]).item() == pytest.approx(0.1 * math.log(880 / 120), rel=0.01)
    assert reward[0, CORRIDOR].eq(0).all()


# ---- Demo --------------------------------------------------------------------------------------------------
def test_a_claim_names_rows_and_needs_every_seed():
    assert len(toy_env.CLAIMS) <= 8 and {row for _, rows, _ in toy_env.CLAIMS for row in rows} <= toy_env.ROWS.keys()
    assert toy_env.COLOURS.keys() <= {row for row, settings in toy_env.ROWS.items() if settings.get("run_on")}

    def runs(*pairs):
        return [{"solved": solved, "value": value} for solved, value in pairs]

    shown = {"PPO": runs((None, 0.1)), "DR-PO": runs((90_000, 0.95), (110_000, 0.92))}
    not_shown = {"PPO": runs((None, 0.6)), "DR-PO": runs((90_000, 0.95), (None, 0.4))}
    assert [verdict for _, verdict, _ in toy_env.verdicts(shown)] == ["holds"] * 2
    assert [verdict for _, verdict, _ in toy_env.verdicts(not_shown)] == ["does not hold"] * 2
    assert toy_env.summary(runs((90_400, 0.95), (None, 0.6))) == ("1/2", "90k - 90k", "0.60 to 0.95")


def test_the_quick_demo_shows_the_claim_on_one_seed(tmp_path):
    status = toy_env.main(["--quick", "--seeds", "0", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert status == 0 and [verdict for _, verdict, _ in results["claims"]] == ["holds", "holds"]
    (ppo,), (drpo,) = results["runs"]["PPO"], results["runs"]["DR-PO"]
    assert ppo["seed"] == drpo["seed"] == 0 and drpo["solved"] and not ppo["solved"]
    later = [sum(run["curve"][-1][12:]) for run in (ppo, drpo)]  # episodes, value, then layers 0 to 19
    assert later[0] < 0.05 and later[1] > 5
    assert (tmp_path / "toy.png").stat().st_size > 20_000


def test_a_sweep_makes_tables_of_all_parts(capsys):
    plan = [
        {"part": "growth", "name": "DR-PO, H = 4", "seed": 0, "H": 4, "beta": 0.5, "budget": 2048},
        {"part": "pairs", "name": "100 pairs", "seed": 0, "H": 4, "beta": 0.5, "budget": 2048, "pairs": 100},
        {"part": "locks", "name": "PPO", "seed": 0, "H": 3, "beta": 0.0, "budget": 2048, "plain": {"A": 2, "keep": 0.9}},
    ]
    results = [run | toy_sweep.execute(run) for run in plan]
    toy_sweep.show(results)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if "0/1" in line or "1/1" in line] == ["DR-PO, H = 4", "100 pairs", "PPO"]
    assert {"hacked_true", "best_learned"} <= results[1].keys() and results[2]["value"] > 0.5
