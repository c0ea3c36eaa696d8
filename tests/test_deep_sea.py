"""DR-PO on bsuite's deep_sea; skipped where bsuite is not installed."""

import pytest
import torch

bsuite = pytest.importorskip("bsuite")
from tools import deep_sea  # noqa: E402


def no_resets(n, N):
    return torch.zeros(n, dtype=torch.long), torch.zeros(n, N, dtype=torch.long)


def test_a_reset_replays_the_prefix_and_then_follows_the_policy():
    envs, actions = deep_sea.deep_seas(3, 4, 0), torch.tensor([[0, 1, 1, 0]]).repeat(3, 1)
    right = torch.tensor(envs[0]._action_mapping)
    columns, taken, rewards = deep_sea.play(envs, torch.tensor([0, 2, 4]), actions, lambda h, column: right[h, column])
    assert columns[0].tolist() == [0, 1, 2, 3] and rewards[0].sum().item() == pytest.approx(0.99)  # right to the goal
    assert taken[1, :2].tolist() == [0, 1] and taken[2].tolist() == [0, 1, 1, 0]
    assert (taken[1, 2:] == right[[2, 3], columns[1, 2:]]).all()


def test_the_exact_value_is_the_mean_return_in_bsuite():
    policy, rng = torch.rand(5, 5, 2, generator=torch.Generator().manual_seed(0)).softmax(-1), torch.Generator().manual_seed(1)
    envs = deep_sea.deep_seas(4000, 5, 3)
    right = torch.tensor(envs[0]._action_mapping)
    policy = policy + 2 * torch.nn.functional.one_hot(right, 2)  # so that some reach the goal
    policy = policy / policy.sum(-1, keepdim=True)
    act = lambda h, column: torch.multinomial(policy[h, column], 1, generator=rng)[:, 0]  # noqa: E731
    _, _, rewards = deep_sea.play(envs, *no_resets(4000, 5), act)
    returns = rewards.sum(1)
    assert returns.mean().item() == pytest.approx(deep_sea.value(policy, right), abs=4 * returns.std().item() / 4000**0.5)


def test_the_learned_reward_pays_at_the_goal():
    right, columns, actions, clone, reward = deep_sea.problem(5, 0, trajectories=2000)
    steps = reward[range(5), range(5)].gather(1, right[range(5), range(5), None])[:, 0]
    assert steps[-1] == reward.max() > 0.1 and columns.shape == actions.shape == (2000, 5)
    torch.testing.assert_close(clone.sum(-1), torch.ones(5, 5))
