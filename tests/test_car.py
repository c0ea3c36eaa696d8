"""The car of tools/car.py: gymnasium's dynamics, masks, resets, the learned reward, and the command."""

import gymnasium
import numpy as np
import pytest
import torch

import drpo
from tools import car

DATA = car.drive(500, drpo.generator(0, "data"))


def test_each_step_is_that_of_gymnasium():
    env, rng = gymnasium.make("MountainCarContinuous-v0"), np.random.default_rng(0)
    for episode in range(20):
        (state, _), terminated = env.reset(seed=episode), False
        if episode % 2:  # a reset to any state
            state = env.unwrapped.state = rng.uniform([-1.2, -0.07], [0.44, 0.07]).astype(np.float32)
        while not terminated:
            before, actions = torch.tensor(state)[None], torch.tensor([rng.uniform(-0.3, 1.5) * (1 if state[1] >= 0 else -1)])
            states = torch.stack([before, after := car.advance(before, actions)], 1)
            rewards = car.features(car.Rollout(states, actions[None], torch.ones(1, 1))) @ car.TRUE_REWARD
            state, reward, terminated, *_ = env.step(actions.clamp(-1, 1).numpy())
            assert after[0].tolist() == pytest.approx(state.tolist(), abs=1e-6)
            assert rewards.item() == pytest.approx(float(reward), abs=1e-5)
            assert car.at_goal(after).item() == terminated


def test_the_mask_runs_from_the_reset_to_the_arrival():
    states = torch.tensor([[0.44, 0.05], [-0.5, 0.0], [-0.6, 0.0]])  # a step before the goal; at rest, twice
    mask = car.rollout(lambda states, t: states[:, 1].sign(), states, torch.tensor([7, 150, 0])).mask
    assert [row.nonzero().flatten().tolist() for row in mask[:2]] == [[7], list(range(150, 200))]
    assert 50 < mask[2].sum() < 200 and mask[2].long().diff().max() == 0  # with the motion it arrives


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_resets_start_in_states_of_the_data(beta):
    _, run = next(car.ppo(DATA, car.clone(DATA, 0), lambda run: car.features(run) @ car.TRUE_REWARD, 0, beta))
    reset_len = run.mask.long().argmax(1)
    assert (reset_len > 0).float().mean().item() == pytest.approx(beta, abs=0.1)
    pairs = zip(run.states[:, 0], reset_len.tolist())
    assert all(((DATA.states[:, t] == state).all(1) & DATA.mask[:, t]).any() for state, t in pairs)


def test_pairs_recover_the_cost_and_the_sign_of_the_bonus():
    step = car.Rollout(torch.tensor([[[0.44, 0.05], [0.49, 0.05], [0.0, 0.0]]]), torch.tensor([[0.0, 1.0]]), torch.ones(1, 2))
    bonus, cost = car.fit_reward(DATA, 0)(step)[0].tolist()
    assert cost == pytest.approx(-0.1 / 5, rel=0.5)  # labels: true return / 5
    assert 2 < bonus < 100 / 5  # an arrival wins every pair, so its bonus is known from below only
