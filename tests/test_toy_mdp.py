"""The detour lock of toy_env.py: its tables, its exact values, and the methods that are tried on it."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import toy_env
from drpo import gae, generator, ppo_policy_loss
from tools import toy_report
from toy_env import CHAIN, CORRIDOR, END, Data, Run

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small():
    """H = 6, A = 4: lock, data, labelled pairs, SFT policy, learned reward."""
    lock = toy_env.detour_lock(6, A=4, seed=3)
    data = toy_env.collect(lock, 20_000, generator(3, "data"))
    pairs = toy_env.label(lock, data, generator(3, "labels"))
    return lock, data, pairs, toy_env.clone(data, 4), toy_env.fit_reward(data, pairs, 4)


def random_policy(shape, seed=0):
    return torch.randn(shape, generator=generator(seed, "policy")).softmax(-1)


# ---------------------------------------------------------------------------------------------------------- environment


def test_the_tables_of_a_lock_of_four_layers_are_those_written_by_hand():
    lock = toy_env.detour_lock(4, A=2, c=2.0, seed=5)
    good, leave = [], []
    for h in range(4):  # which actions were drawn: read off two rows
        good.append(int(lock.transition[h, CHAIN, 1, CHAIN] > 0) if h < 3 else int(lock.reward[3, CHAIN].argmax()))
        leave.append(int(lock.transition[h, CORRIDOR].argmax(1).eq(END).nonzero()[0, 0]) if 0 < h < 3 else None)
    chain, corridor, end = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
    by_hand = {(0, CHAIN): (chain, corridor), (1, CHAIN): (chain, end), (2, CHAIN): (chain, end), (3, CHAIN): (end, end)}
    for (h, s), (right, wrong) in by_hand.items():
        assert lock.transition[h, s, good[h]].tolist() == right
        assert lock.transition[h, s, 1 - good[h]].tolist() == wrong
    for h, on in ((1, [0.5, 0.5, 0.0]), (2, [1.0, 0.0, 0.0])):  # onto the chain with probability 1 / (H - 1 - h)
        assert lock.transition[h, CORRIDOR, leave[h]].tolist() == end
        assert lock.transition[h, CORRIDOR, 1 - leave[h]].tolist() == on
        assert lock.reward[h, CORRIDOR, leave[h]] == 0 and lock.reward[h, CORRIDOR, 1 - leave[h]] == -0.5
    assert lock.transition[:, END, :, END].eq(1).all() and lock.reward[:, END].eq(0).all()
    assert lock.reward[:, CHAIN].sum() == 1 and lock.reward[3, CHAIN, good[3]] == 1


@pytest.mark.parametrize("c", [0.0, 2.0])
def test_every_row_is_a_distribution_and_the_best_return_is_one(c):
    for H in (3, 10, 40):
        lock = toy_env.detour_lock(H, c=c, seed=H)
        torch.testing.assert_close(lock.transition.sum(-1), torch.ones(H, 3, 10))
        torch.testing.assert_close(lock.behaviour.sum(-1), torch.ones(H, 3))
        assert toy_env.q_values(lock, lock.reward)[1] == 1


def test_seeds_draw_other_locks_and_the_same_seed_the_same():
    a, b, c = [toy_env.detour_lock(20, seed=seed).transition for seed in (1, 1, 2)]
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("H, mean, rarest", [(10, -0.58, 0.055), (20, -0.62, 0.022), (40, -0.64, 0.010)])
def test_the_data_earns_nothing_and_covers_every_state_of_the_chain(H, mean, rarest):
    lock = toy_env.detour_lock(H, seed=0)
    data = toy_env.collect(lock, 100_000, generator(0, "data"))
    returns = toy_env.summing(data, 10)(lock.reward)
    assert returns.max() <= 0
    assert returns.mean().item() == pytest.approx(mean, abs=0.01)
    assert (data.states == CHAIN).float().mean(0).min().item() == pytest.approx(rarest, abs=0.003)


def test_the_plain_lock_has_no_corridor_and_its_data_keeps_on_as_often_as_asked():
    lock = toy_env.plain_lock(5, A=3, keep=0.9, seed=1)
    data = toy_env.collect(lock, 20_000, generator(1, "data"))
    assert not (data.states == CORRIDOR).any()
    assert (data.lengths == 5).float().mean().item() == pytest.approx(0.9**4, abs=0.02)
    assert toy_env.q_values(lock, lock.reward, lock.behaviour)[1] == pytest.approx(0.9**5)


def test_the_exact_value_is_what_many_episodes_average_to(small):
    lock, policy = small[0], random_policy((6, 3, 4))
    states, actions = toy_env.rollout(lock, policy, torch.zeros(200_000, dtype=torch.long), generator(0, "episodes"))
    returns = lock.reward.flatten()[toy_env.cells_of(states, actions, 4)].sum(1)
    error = returns.std() / math.sqrt(len(returns))
    assert abs(returns.mean() - toy_env.q_values(lock, lock.reward, policy)[1]) < 4 * error


def test_actions_are_drawn_from_the_policy_even_when_some_have_no_probability():
    policy = torch.tensor([0.0, 0.25, 0.0, 0.75]).repeat(6, 3, 1)
    _, actions = toy_env.rollout(
        toy_env.detour_lock(6, A=4), policy, torch.zeros(40_000, dtype=torch.long), generator(0, "draws")
    )
    shares = torch.bincount(actions[:, 0], minlength=4) / 40_000
    assert shares[0] == shares[2] == 0
    assert shares[1].item() == pytest.approx(0.25, abs=0.01)


# --------------------------------------------------------------------------------------------------------------- resets


def test_a_reset_episode_follows_the_data_and_goes_on_from_the_state_it_is_in(small):
    lock, data, _, sft, _ = small
    rows, reset_len = toy_env.draw_resets(data, 5000, 1.0, generator(1, "resets"))
    states, actions = toy_env.rollout(lock, sft, reset_len, generator(1, "episodes"), data.states[rows], data.actions[rows])
    T = states.shape[1]
    prefix = torch.arange(T) < reset_len[:, None]
    assert torch.equal(states[prefix], data.states[rows][:, :T][prefix])
    assert torch.equal(actions[prefix], data.actions[rows][:, :T][prefix])
    at = states[torch.arange(5000), reset_len]
    assert torch.equal(at, data.states[rows, reset_len]) and (at != END).all()
    possible = lock.transition.flatten(0, 2)[toy_env.cells_of(states, actions, 4)[:, :-1]]  # (B, T-1, 3)
    assert (possible.gather(2, states[:, 1:, None]) > 0).all()


def test_reset_steps_are_uniform_over_each_trajectory_the_start_included():
    lengths = torch.tensor([1, 2, 5])
    data = Data(torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.long), lengths)
    rows, reset_len = toy_env.draw_resets(data, 60_000, 1.0, generator(0, "chi square"))
    for row, critical in ((1, 10.83), (2, 18.47)):  # chi-square at 0.001, with 1 and 4 degrees of freedom
        counts = torch.bincount(reset_len[rows == row], minlength=int(lengths[row])).double()
        assert len(counts) == lengths[row]
        expected = counts.sum() / lengths[row]
        assert ((counts - expected) ** 2 / expected).sum() < critical
    assert (reset_len[rows == 0] == 0).all()


def test_a_share_beta_of_the_episodes_is_reset():
    data = Data(torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 9, dtype=torch.long), torch.tensor([9]))
    for beta, share in ((0.0, 0.0), (0.3, 0.3 * 8 / 9), (1.0, 8 / 9)):
        _, reset_len = toy_env.draw_resets(data, 40_000, beta, generator(0, beta))
        assert (reset_len > 0).float().mean().item() == pytest.approx(share, abs=0.01)


def policies(updates, n):
    return [next(updates)[0].clone() for _ in range(n)]


def test_without_resets_dr_po_is_ppo_bit_for_bit_whatever_the_data(small, monkeypatch):
    lock, data, _, sft, reward = small
    shuffled = Data(data.states.flip(0), data.actions.flip(0), data.lengths.flip(0))
    one, other = [policies(toy_env.ppo(lock, d, sft, reward, 7, 0.0, batch=64), 5) for d in (data, shuffled)]
    monkeypatch.setattr(toy_env, "draw_resets", lambda data, batch, beta, generator: [torch.zeros(batch, dtype=torch.long)] * 2)
    plain = policies(toy_env.ppo(lock, data, sft, reward, 7, 1.0, batch=64), 5)
    for a, b, c in zip(one, other, plain):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_with_resets_the_data_matters(small):
    lock, data, _, sft, reward = small
    shuffled = Data(data.states.flip(0), data.actions.flip(0), data.lengths.flip(0))
    one, other = [policies(toy_env.ppo(lock, d, sft, reward, 7, 0.5, batch=64), 1)[0] for d in (data, shuffled)]
    assert not torch.equal(one, other)


def test_a_run_is_repeated_to_the_last_bit():
    run = Run("drpo", 10, 0, 20_480, batch=1024)
    one, other = [{k: v for k, v in toy_env.execute(run).items() if k != "seconds_per_update"} for _ in range(2)]
    assert one == other


def test_steps_of_the_prefix_change_neither_policy_nor_critic(small, monkeypatch):
    """Where only prefixes lead, at the start, all is as it was: with beta = 1 and no reset to the start, nobody acts there."""
    lock, data, _, sft, reward = small
    long = data.lengths > 1
    data = Data(*[x[long] for x in data])
    monkeypatch.setattr(
        toy_env,
        "draw_resets",
        lambda data, batch, beta, rng: (
            torch.arange(batch),
            1 + (torch.rand(batch, generator=rng) * (data.lengths[:batch] - 1)).long(),
        ),
    )
    policy, values, steps, on_chain = next(toy_env.ppo(lock, data, sft, reward, 0, 1.0, batch=256))
    torch.testing.assert_close(policy[0], sft[0], rtol=0, atol=1e-7)
    assert values[0].eq(0).all() and on_chain[0] == 0
    assert not torch.allclose(policy[1:], sft[1:], atol=1e-3) and values[1:, :2].ne(0).any()
    assert steps < data.lengths[:256].sum() * 3


# -------------------------------------------------------------------------------------------------------------- methods


def test_the_step_of_ppo_at_ratio_one_is_the_policy_gradient(small):
    """lambda = 1 and no baseline: the gradient of the loss, times the steps per episode, is minus the gradient of the exact
    value but for the noise of the episodes. The exact one by differentiating the dynamic programme."""
    lock, policy = small[0], random_policy((6, 3, 4), seed=1)
    logits = policy.log().requires_grad_()
    (exact,) = torch.autograd.grad(differentiable_value(lock, logits.softmax(-1)), logits)
    batches = []
    for i in range(20):
        states, actions = toy_env.rollout(lock, policy, torch.zeros(20_000, dtype=torch.long), generator(i, "episodes"))
        mask, cells = states != END, toy_env.cells_of(states, actions, 4)
        returns, _ = gae(lock.reward.flatten()[cells], torch.zeros(cells.shape), mask, 1.0, 1.0)
        logprobs = logits.log_softmax(-1).flatten()[cells]
        loss, clipfrac = ppo_policy_loss(logprobs, logprobs.detach(), returns, mask, 0.2)
        assert clipfrac == 0
        batches.append(-torch.autograd.grad(loss, logits)[0] * mask.sum() / len(mask))
    batches = torch.stack(batches)
    error = batches.std(0) / math.sqrt(len(batches))
    assert exact.abs().max() > 0.01
    assert ((batches.mean(0) - exact).abs() <= 5 * error + 1e-6).all()


def differentiable_value(lock, policy):
    v = torch.zeros(3)
    for h in reversed(range(len(policy))):
        v = (policy[h] * (lock.reward[h] + lock.transition[h] @ v)).sum(-1)
    return v[CHAIN]


def test_the_critic_finds_the_values_of_a_policy_that_stands_still(small, monkeypatch):
    lock, data, _, sft, reward = small
    monkeypatch.setattr(toy_env, "ppo_policy_loss", lambda logprobs, *_: (0.0 * logprobs.sum(), 0.0))
    updates = toy_env.ppo(lock, data, sft, reward, 0, 0.5, kl_coef=0.0, entropy=0.0, batch=4096, lam=1.0, lr=0.01)
    values = torch.stack([next(updates)[1].clone() for _ in range(150)])[-50:].mean(0)
    q, _ = toy_env.q_values(lock, reward, sft)
    exact = (sft * q).sum(-1)
    visited = (F.one_hot(data.states, 3).sum(0) > 500) & torch.tensor([True, True, False])
    assert visited.sum() >= 9
    torch.testing.assert_close(values[visited], exact[visited], atol=0.02, rtol=0)


def test_the_npg_step_minimises_its_objective():
    """Against Adam on the softmax's logits, in float64, in every state at once."""
    shape, eta, lam = (2, 3, 4), 5.0, 0.3
    sft, policy = random_policy(shape, 1).double(), random_policy(shape, 2).double()
    q = torch.randn(shape, generator=generator(3, "q")).double()

    def objective(p):
        return (-q * p + lam * p * (p / sft).log() + p * (p / policy).log() / eta).sum()

    logits = torch.zeros(shape, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.02)
    for _ in range(4000):
        optimizer.zero_grad()
        objective(logits.softmax(-1)).backward()
        optimizer.step()
    closed = toy_env.npg_step(sft.log(), policy.log(), q, eta, lam).exp()
    torch.testing.assert_close(closed, logits.detach().softmax(-1), atol=1e-5, rtol=0)
    assert objective(closed) <= objective(logits.softmax(-1)) + 1e-12


def test_the_npg_step_keeps_to_its_anchors():
    """No step size: the policy stays. A huge lambda: back to SFT. Neither reward nor KL: the policy stays."""
    sft, policy, q = random_policy((2, 3, 4), 1).log(), random_policy((2, 3, 4), 2).log(), torch.ones(2, 3, 4)
    torch.testing.assert_close(toy_env.npg_step(sft, policy, 3 * q, 0.0, 1.0), policy)
    torch.testing.assert_close(toy_env.npg_step(sft, policy, q, 1.0, 1e6), sft, atol=1e-4, rtol=0)
    torch.testing.assert_close(toy_env.npg_step(sft, policy, q, 5.0, 0.0), policy)


def test_the_npg_step_finds_back_from_a_probability_below_the_smallest_float():
    log_policy, sft = torch.tensor([0.0, -300.0]), torch.tensor([0.5, 0.5]).log()
    assert log_policy.exp()[1] == 0
    for _ in range(80):
        log_policy = toy_env.npg_step(sft, log_policy, torch.tensor([0.0, 1.0]), 5.0, 0.0)
    assert log_policy.exp()[1] > 0.99


def test_the_npg_critic_is_the_action_value_of_the_policy(small):
    """In the first update, from the SFT policy."""
    lock, data, _, sft, reward = small
    _, q, _, _ = next(toy_env.npg(lock, data, sft, reward, 0, batch=400_000))
    exact, _ = toy_env.q_values(lock, reward, sft)
    visited = F.one_hot(data.states, 3).sum(0) > 500
    visited[:, END] = False
    torch.testing.assert_close(q[visited], exact[visited], atol=0.05, rtol=0)


def test_the_clone_counts(small):
    lock, data, _, sft, _ = small
    h, s = 1, CORRIDOR
    actions = data.actions[data.states[:, h] == s][:, h]
    counts = torch.bincount(actions, minlength=4) + 1.0
    torch.testing.assert_close(sft[h, s], counts / counts.sum())
    torch.testing.assert_close(sft[3, END], torch.full((4,), 0.25))


def test_labels_prefer_the_better_trajectory_as_often_as_bradley_terry_says(small):
    lock, data, pairs, _, _ = small
    returns = toy_env.summing(data, 4)(lock.reward)
    assert torch.equal(pairs.sort(1)[0], torch.arange(20_000).view(-1, 2))
    gap = returns[0::2] - returns[1::2]
    first = (pairs[:, 0] % 2 == 0).float()
    error = (first - torch.sigmoid(gap / 0.1)).mean()
    assert abs(error) < 4 * 0.5 / math.sqrt(10_000)


def test_the_fitted_reward_is_at_the_minimum_and_ranks_trajectories(small):
    lock, data, pairs, _, reward = small
    logits, sums = (reward / 0.1).requires_grad_(), toy_env.summing(data, 4)
    scores = sums(logits)
    loss = -F.logsigmoid(scores[pairs[:, 0]] - scores[pairs[:, 1]]).mean() + 0.5 * (logits**2).sum() / len(pairs)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 1e-4
    returns, learned = sums(lock.reward), sums(reward)
    assert torch.corrcoef(torch.stack([returns, learned]))[0, 1] > 0.9


def test_fitted_q_solves_the_lock_and_shuns_what_the_data_never_tried(small):
    lock, data, _, _, reward = small
    assert toy_env.q_values(lock, lock.reward, toy_env.fitted_q(data, reward))[1] == 1
    few = Data(*[x[:3] for x in data])
    assert toy_env.fitted_q(few, reward).sum() == 6 * 3


# ----------------------------------------------------------------------------------------------------------- experiment


def test_what_is_reset_to_can_be_cut(small):
    data = small[1]
    half = toy_env.states_to_reset_to(data, "half", 6)
    assert half.lengths.max() == 3 and len(half.lengths) == len(data.lengths)
    chain = toy_env.states_to_reset_to(data, "chain", 6)
    assert 0 < len(chain.lengths) < len(data.lengths) and not (chain.states == CORRIDOR).any()
    assert len(toy_env.states_to_reset_to(data, "30", 6).lengths) == 30


@pytest.mark.parametrize("mode", ["quick", "default", "full", "tune"])
def test_a_plan_asks_for_nothing_twice_and_never_tunes_on_the_seeds_it_reports(mode):
    runs = toy_env.plan(mode)
    assert len(set(runs)) == len(runs)
    assert all((run.seed in toy_env.SEEDS) == (mode != "tune") for run in runs)
    budgets = {}
    for run in runs:  # what claims are read from is there once per seed
        key = tuple(value for name, value in vars(run).items() if name not in ("budget", "run_on"))
        assert budgets.setdefault(key, run) == run


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("quick")
    return out, toy_env.main(["--quick", "--out", str(out)])


def test_the_main_claims_hold_at_ten_layers_on_the_first_reported_seeds(quick):
    out, status = quick
    results = json.loads((out / "results.json").read_text())
    verdicts = {claim: verdict for claim, verdict, _ in results["claims"]}
    assert len(verdicts) == 5 and set(verdicts.values()) == {"holds"}
    assert (out / "claims.md").read_text().count("| holds |") == 5
    assert status == 0 and (out / "toy.png").stat().st_size > 50_000
    for r in results["runs"]:
        if r["run"]["method"] == "drpo":
            assert r["episodes_to_solve"] <= 60_000 and r["value"] > 0.9


def test_a_second_call_repeats_nothing_and_says_the_same(quick, capsys, monkeypatch):
    out, _ = quick
    monkeypatch.setattr(toy_env, "execute", None)
    before = (out / "results.json").read_text()
    assert toy_env.main(["--quick", "--out", str(out)]) == 0
    assert (out / "results.json").read_text() == before


def test_a_run_that_was_cut_off_while_writing_is_done_again(quick, tmp_path, monkeypatch):
    lines = (quick[0] / "runs.jsonl").read_text().splitlines()
    (tmp_path / "runs.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    done, execute = [], toy_env.execute
    monkeypatch.setattr(toy_env, "execute", lambda run: done.append(run) or execute(run))
    assert toy_env.main(["--quick", "--out", str(tmp_path)]) == 0
    assert len(done) == 1
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(lines) + 1


def test_results_of_other_code_are_not_used(quick, tmp_path, monkeypatch):
    text = (quick[0] / "runs.jsonl").read_text()
    (tmp_path / "runs.jsonl").write_text(text.replace('{"code": "', '{"code": "0'))
    done = []

    def stop(run):
        done.append(run)
        raise InterruptedError

    monkeypatch.setattr(toy_env, "execute", stop)
    with pytest.raises(InterruptedError):
        toy_env.main(["--quick", "--out", str(tmp_path)])
    assert len(done) == 1


def test_a_claim_that_does_not_hold_is_said_so_and_fails_the_command(quick, tmp_path, capsys):
    results = [json.loads(line) for line in (quick[0] / "runs.jsonl").read_text().splitlines()]
    for r in results:
        if r["result"]["run"]["method"] == "drpo":
            r["result"]["episodes_to_solve"] = None
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in results))
    assert toy_env.main(["--quick", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "does not hold  DR-PO, beta = 0.5" in out and "not as README.md states it: DR-PO, beta = 0.5" in out


def test_a_folder_that_cannot_be_written_to_is_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as error:
        toy_env.main(["--quick", "--out", str(tmp_path / "file")])
    assert error.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_runs_that_were_not_solved_are_counted_as_such():
    runs = [{"episodes_to_solve": n} for n in (None, 5000, 20_000)]
    assert toy_report.solved(runs) == [5000, 20_000] and toy_report.solved(runs, 10_000) == [5000]
    assert toy_report.tally(runs) == "2/3, 5k-20k episodes" and toy_report.tally(runs[:1]) == "0/1"
    assert toy_report.typical(runs) == 20_000 and toy_report.typical(runs[:2]) == math.inf


def test_fits_find_the_law_that_made_the_counts():
    power, off = toy_report.line_fit([math.log(H) for H in (10, 20, 40)], [3 * H**1.7 for H in (10, 20, 40)])
    assert power == pytest.approx(1.7) and off < 1e-9
    rate, off = toy_report.line_fit([4, 5, 6], [7 * 3.0**H for H in (4, 5, 6)])
    assert math.exp(rate) == pytest.approx(3.0)
    _, off = toy_report.line_fit([10, 20, 40], [3 * H**1.7 for H in (10, 20, 40)])
    assert off > 0.1


def test_the_table_in_the_readme_is_the_one_of_the_committed_results():
    folder = ROOT / "results" / "toy"
    table = (folder / "claims.md").read_text()
    assert table in (ROOT / "README.md").read_text()
    results = json.loads((folder / "results.json").read_text())
    assert [list(row) for row in toy_report.claims(results["runs"])] == results["claims"]
    assert all(f"| {' | '.join(row)} |" in table for row in results["claims"])
    assert {claim for claim, verdict, _ in results["claims"] if verdict != "holds"} == toy_report.NOT_EXPECTED
    assert sorted({r["run"]["seed"] for r in results["runs"]}) == list(toy_env.SEEDS)


def test_ppo_tuned_for_itself_has_the_best_settings_of_the_committed_grid():
    rows = json.loads((ROOT / "results" / "toy" / "tuning.json").read_text())
    assert len(rows) == 54
    assert {name: rows[0][name] for name in toy_env.TUNED_PPO} == toy_env.TUNED_PPO
