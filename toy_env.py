"""Two toys, small enough to check the claims on.

    python toy_env.py                 the detour lock: a table, a verdict per claim and a figure, in about a minute of CPU
    python toy_env.py --quick         the main claims at H = 10, in seconds
    python toy_env.py --full          everything, 10 seeds, in half an hour; goes on where it was stopped
    python toy_env.py --tune          the grid in which PPO is tuned for itself

**The detour lock** (parts 1 - 3) is an MDP of tables, so that the value of a policy is known exactly, and so is what the
offline data covers. `a*` is the one good action of A in a layer, `x` a wrong one; H layers, best return 1:

             a*            a*            a*                a*
    chain   g_0 --------> g_1 --------> g_2 ---> ... ---> g_{H-1} ---> +1        x at g_h, h >= 1: the end, 0
             | x            ^             ^                 ^
             v              |             |                 |  by chance, at a uniformly random layer
    corridor               w_1 --------> w_2 ---> ... ---> w_{H-2}               leaving it: the end, 0
                               -c/H          -c/H                                each step in it costs c/H

Its data strolls down the corridor, drops onto the chain somewhere, and there acts at random: it covers every state of the
chain, and hardly a trajectory in it earns anything. A policy that starts from its clone and optimises what it sees, as PPO
does, learns that the corridor costs and leaves it, and from then on never sees the chain again: the coverage is gone before
it was used. A policy that is reset to states of the data learns the chain from its end.

What trains the tables here is what trains the language model: `bradley_terry_loss`, `sample_reset_lengths`,
`penalised_rewards`, `gae`, `masked_whiten`, `ppo_policy_loss`, `ppo_value_loss` and `dpo_loss` of drpo.py.

**The toy TL;DR corpus** (part 4) is what `python drpo.py` trains on. Posts, annotators and judge are programs, so that "which
summary is better" has an answer that no reward model was asked for.

    gate, easy      posts and references for SFT               --dataset toy_env:gate | toy_env:easy
    gate_pairs      preference pairs for the reward model      --preference_dataset toy_env:gate_pairs
    gold_judge      who wins, by the true score                --judge toy_env:gold_judge
    bpe_tokenizer   a BPE tokenizer trained on the corpus      --tokenizer toy_env:bpe_tokenizer
    tiny_pythia     GPT-NeoX, 2 layers of 128, from scratch    --model toy_env:tiny_pythia

A post tells what somebody did to one of the writer's things, how the writer feels and what the writer wants, in shuffled
sentences with a distractor; its title gives one of these facts away. A full summary has four clauses:

    my sister broke our bike .  i feel angry .  i want an apology .  what should i do ?

The true score pays 3.0 for the question, but only after the three facts: a late reward behind a gate. Everything before it
costs a little more in words than it earns, so whoever looks only at what is near stops early. `gate` is the case that the
paper's abstract describes: the SFT references hardly ever get through the gate, but some responses in the preference pairs
do, and are preferred. In `easy` the SFT references get through often.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from drpo import (
    bradley_terry_loss,
    dpo_loss,
    gae,
    generator,
    masked_whiten,
    penalised_rewards,
    ppo_policy_loss,
    ppo_value_loss,
    sample_reset_lengths,
)

# ----------------------------------------------------------------------------------------------------------------------
# 1. The lock. Tables are indexed [layer h, state s, action a], with three states in a layer:

CHAIN, CORRIDOR, END = range(3)


class Lock(NamedTuple):
    """A layered MDP as tables: H layers, A actions, undiscounted. Every episode starts at CHAIN in layer 0."""

    transition: torch.Tensor  # (H, 3, A, 3): P(state in layer h+1 | h, s, a)
    reward: torch.Tensor  # (H, 3, A), the true one
    behaviour: torch.Tensor  # (H, 3, A), the policy that the data comes from


def detour_lock(H, A=10, c=2.0, seed=0):
    """The lock in the drawing above; the good and the leaving action of each layer are drawn at random. H >= 2 -> Lock.

    The behaviour policy is uniform on the chain; in the corridor it leaves with probability 1/H, else walks on."""
    good, leave = torch.randint(A, (2, H), generator=generator(seed, "lock"))
    h, onto_chain, into_corridor, out = torch.arange(H), *torch.eye(3)
    transition, reward, behaviour = out.repeat(H, 3, A, 1), torch.zeros(H, 3, A), torch.full((H, 3, A), 1 / A)
    transition[0, CHAIN] = into_corridor
    transition[h[:-1], CHAIN, good[:-1]] = onto_chain
    reward[-1, CHAIN, good[-1]] = 1.0
    exit_probability = (1 / (H - 1 - h[1:-1]))[:, None, None]  # makes the layer of the exit uniform
    transition[1:-1, CORRIDOR] = exit_probability * onto_chain + (1 - exit_probability) * into_corridor
    transition[h, CORRIDOR, leave] = out
    reward[1:-1, CORRIDOR] = -c / H
    reward[h, CORRIDOR, leave] = 0.0
    behaviour[:, CORRIDOR] = (1 - 1 / H) / (A - 1)
    behaviour[h, CORRIDOR, leave] = 1 / H
    return Lock(transition, reward, behaviour)


def plain_lock(H, A=10, keep=None, seed=0):
    """The chain alone: any action but the good one ends the episode. -> Lock

    The behaviour policy takes the good action with probability `keep`; without it, it is uniform."""
    good, h = torch.randint(A, (H,), generator=generator(seed, "lock")), torch.arange(H)
    transition, reward = torch.eye(3)[END].repeat(H, 3, A, 1), torch.zeros(H, 3, A)
    transition[h[:-1], CHAIN, good[:-1]] = torch.eye(3)[CHAIN]
    reward[-1, CHAIN, good[-1]] = 1.0
    behaviour = torch.full((H, 3, A), 1 / A)
    if keep is not None:
        behaviour[:, CHAIN] = (1 - keep) / (A - 1)
        behaviour[h, CHAIN, good] = keep
    return Lock(transition, reward, behaviour)


def cdf(p):
    """(H, ..., n) distributions over the last axis -> (H, rows * n), non-decreasing: row number + cumulative distribution.
    Where row + u falls in it, by bisection, is the cell row * n + outcome: the draw, and its index in the flat table."""
    steps = p.double().flatten(1, -2).cumsum(-1).clamp(max=1.0)
    steps[..., -1] = 1.0  # u < 1 always finds an outcome, whatever the rounding
    return (steps + torch.arange(steps.shape[1])[:, None]).flatten(1)


def rollout(lock, policy, reset_len, generator, states=None, actions=None, first_action=None):
    """Alg. 1, line 4: B episodes (B = len(reset_len)), all in step. Row i follows states and actions (B, H) of the data for
    reset_len[i] steps, and from the state it is in then the policy (H, 3, A); its own first action (B,) can be given.

    -> states, actions (B, T) long, T <= H the longest episode; an episode that is over stays at END."""
    H, B, A = len(policy), len(reset_len), policy.shape[2]
    choose, move, last = cdf(policy), cdf(lock.transition), int(reset_len.max())
    visited, taken, s = [], [], torch.full((B,), CHAIN)
    for h in range(H):
        u, v = torch.rand(2, B, generator=generator, dtype=torch.float64)
        cell = torch.searchsorted(choose[h], s + u, right=True)  # s * A + action
        if first_action is not None:
            cell = torch.where(h == reset_len, s * A + first_action, cell)
        if h < last:
            cell = torch.where(h < reset_len, s * A + actions[:, h], cell)
        visited.append(s)
        taken.append(cell - s * A)
        s = torch.searchsorted(move[h], cell + v, right=True) - 3 * cell
        if h < last:
            s = torch.where(h < reset_len, states[:, h + 1], s)
        elif (s == END).all():
            break
    return torch.stack(visited, 1), torch.stack(taken, 1)


def q_values(lock, reward, policy=None):
    """Exact action values by dynamic programming, Q_h(s, a) = r_h(s, a) + E[V_{h+1}(s')], of a policy (H, 3, A) or, without
    one, of the best policy. -> Q (H, 3, A), V at the start (float)."""
    q, v = torch.zeros_like(reward), torch.zeros(3)
    for h in reversed(range(len(reward))):
        q[h] = reward[h] + lock.transition[h] @ v
        v = q[h].max(-1)[0] if policy is None else (policy[h] * q[h]).sum(-1)
    return q, v[CHAIN].item()


def greedy(q):
    """The policy that takes the best action of Q, (H, 3, A) -> (H, 3, A)."""
    return F.one_hot(q.argmax(-1), q.shape[-1]).float()


# ----------------------------------------------------------------------------------------------------------------------
# 2. The offline data, and the methods. All start from the same clone of it and see the same learned reward.


class Data(NamedTuple):
    """N trajectories of the behaviour policy, at END after their end; rows 2i and 2i + 1 make pair i."""

    states: torch.Tensor  # (N, H) long
    actions: torch.Tensor  # (N, H) long
    lengths: torch.Tensor  # (N,) long, steps until END


def cells_of(states, actions, A):
    """Where (h, s, a) of each step stands in a flattened table (H, 3, A). (B, T), (B, T) -> (B, T)."""
    return (torch.arange(states.shape[1]) * 3 + states) * A + actions


def collect(lock, N, generator):
    """N trajectories of the behaviour policy -> Data."""
    H = len(lock.reward)
    states, actions = rollout(lock, lock.behaviour, torch.zeros(N, dtype=torch.long), generator)
    states = F.pad(states, (0, H - states.shape[1]), value=END)
    return Data(states, F.pad(actions, (0, H - actions.shape[1])), (states != END).sum(1))


def summing(data, A):
    """-> a function, table (H, 3, A) -> (N,): the table's entries summed along each trajectory."""
    rows, h = (data.states != END).nonzero(as_tuple=True)
    cells = cells_of(data.states, data.actions, A)[rows, h]
    return lambda table: torch.zeros(len(data.lengths)).index_add(0, rows, table.flatten().index_select(0, cells))


TEMPERATURE = 0.1  # of the labels' Bradley-Terry; with it, too, the fitted reward is in units of the true one


def label(lock, data, generator):
    """Which of each pair is preferred, by Bradley-Terry on the true returns. -> (N / 2, 2) long: (chosen, rejected), as rows of
    the data."""
    pair = summing(data, lock.reward.shape[2])(lock.reward).view(-1, 2)
    first_wins = torch.rand(len(pair), generator=generator) < torch.sigmoid((pair[:, 0] - pair[:, 1]) / TEMPERATURE)
    chosen = 2 * torch.arange(len(pair)) + (~first_wins).long()
    return torch.stack([chosen, chosen ^ 1], 1)


def clone(data, A):
    """The SFT policy: the actions of the data, counted, one more for each so that none is impossible. -> (H, 3, A)"""
    H = data.states.shape[1]
    cells = cells_of(data.states, data.actions, A)[data.states != END]
    counts = 1 + torch.bincount(cells, minlength=H * 3 * A).view(H, 3, A)
    return counts / counts.sum(-1, keepdim=True)


def fit_reward(data, pairs, A, l2=1.0):
    """Alg. 1, line 1: Eq. (1) with a table. r(trajectory) / TEMPERATURE is the logit of Bradley-Terry; an L2 penalty on it (a
    standard normal prior) settles what pairs leave open. Convex; by L-BFGS. -> (H, 3, A), in units of the true reward."""
    logits, sums = torch.zeros(data.states.shape[1], 3, A, requires_grad=True), summing(data, A)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_change=1e-9, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        scores = sums(logits)
        loss = bradley_terry_loss(scores[pairs[:, 0]], scores[pairs[:, 1]]) + l2 / 2 * (logits**2).sum() / len(pairs)
        loss.backward()
        return loss

    optimizer.step(objective)
    return TEMPERATURE * logits.detach()


def draw_resets(data, batch, beta, generator):
    """Alg. 1, line 3: `batch` trajectories of the data, and for each, with probability beta, how many of its steps to keep:
    uniform over its own length, the start included (Alg. 3). -> (rows, reset_len), (batch,) long each."""
    rows = torch.randint(len(data.lengths), (batch,), generator=generator)
    return rows, sample_reset_lengths(data.lengths[rows] - 1, beta, generator, include_zero=True)


def ppo(
    lock,
    data,
    sft,
    reward,
    seed,
    beta,
    kl_coef=0.001,
    entropy=1.0,
    whiten=False,
    batch=1024,
    lr=0.05,
    epochs=8,
    cliprange=0.5,
    lam=0.95,
):
    """Algorithm 1 with PPO as its policy optimiser, `drpo_update` again and again, on tables; PPO itself is beta = 0.

    The entropy bonus is entropy / H a step: in units of the reward, as much at every H. Advantages stay in these units unless
    `whiten`: with few resets in a batch hardly any advantage differs from 0, and whitening would blow up the noise.

    Yields after each update, without end: the policy (H, 3, A), the critic's values (H, 3), how many steps the policy took in
    the environment, and in how many of the episodes it acted on the chain, per layer."""
    H, _, A = sft.shape
    logits, values = sft.log().requires_grad_(), torch.zeros(H, 3, requires_grad=True)
    optimizer = torch.optim.Adam([logits, values], lr, eps=1e-5)
    resets, rng = generator(seed, "resets"), generator(seed, "rollouts")
    while True:
        with torch.no_grad():
            # Alg. 1, line 3
            rows, reset_len = draw_resets(data, batch, beta, resets)
            # Line 4
            policy = logits.softmax(-1)
            states, actions = rollout(lock, policy, reset_len, rng, data.states[rows], data.actions[rows])
            # Line 5: only what the policy did itself
            mask = (states != END) & (torch.arange(states.shape[1]) >= reset_len[:, None])
            cells = cells_of(states, actions, A)
            sites = cells // A  # (h, s), in a flattened table (H, 3)
            old_logprobs, ref_logprobs = policy.log().flatten()[cells], sft.log().flatten()[cells]
            rewards = reward.flatten()[cells] + penalised_rewards(torch.zeros(batch), old_logprobs, ref_logprobs, mask, kl_coef)
            old_values = values.flatten()[sites]
            advantages, returns = gae(rewards, old_values, mask, gamma=1.0, lam=lam)
            advantages = masked_whiten(advantages, mask) if whiten else advantages
            # What is outside the mask never matters (the tests hold the functions to that): leave it out, and be faster
            cells, sites, old_logprobs, old_values, advantages, returns = [
                x[mask] for x in (cells, sites, old_logprobs, old_values, advantages, returns)
            ]
            share, ones = torch.bincount(sites, minlength=H * 3) / len(sites), torch.ones_like(advantages)
        # Line 6
        for _ in range(epochs):
            log_policy = logits.log_softmax(-1)
            logprobs = log_policy.flatten().index_select(0, cells)
            pg_loss, _ = ppo_policy_loss(logprobs, old_logprobs, advantages, ones, cliprange)
            vf_loss, _ = ppo_value_loss(values.flatten().index_select(0, sites), old_values, returns, ones, cliprange)
            mean_entropy = -(share * (log_policy.exp() * log_policy).sum(-1).flatten()).sum()
            optimizer.zero_grad()
            (pg_loss + vf_loss - entropy / H * mean_entropy).backward()
            optimizer.step()
        yield logits.detach().softmax(-1), values.detach(), int(mask.sum()), (mask & (states == CHAIN)).sum(0)


def npg_step(log_sft, log_policy, q, eta, lam):
    """The NPG oracle (Alg. 2) in closed form: argmin_p <-Q, p> + lam KL(p || pi_SFT) + KL(p || pi_t) / eta, in every state:
    pi_{t+1} ~ pi_SFT^(eta lam / (eta lam + 1)) pi_t^(1 / (eta lam + 1)) exp(eta / (eta lam + 1) Q).

    (H, 3, A) each, in logs: what has become too improbable for a float must find its way back when Q changes."""
    return ((eta * lam * log_sft + log_policy + eta * q) / (eta * lam + 1)).log_softmax(-1)


def npg(lock, data, sft, reward, seed, batch=1024, eta=50.0, lam=1e-4):
    """Algorithm 3: resets only, and the NPG oracle. The first action after a reset is drawn from (pi_SFT + pi_t) / 2, and the
    critic is the least-squares fit to that one pair per episode, with the return under the learned reward as target: in a
    table, the mean of the returns; where an update has none, the estimate of the update before stands.

    Yields what `ppo` yields, the critic being Q (H, 3, A). The paper's output is the uniform mixture of all these policies."""
    H, _, A = sft.shape
    log_policy, q, resets, rng = sft.log(), torch.zeros(H * 3 * A), generator(seed, "resets"), generator(seed, "rollouts")
    while True:
        rows, reset_len = draw_resets(data, batch, 1.0, resets)
        policy, at = log_policy.exp(), (reset_len, data.states[rows, reset_len])  # layer and state of each reset
        first_action = torch.multinomial((sft[at] + policy[at]) / 2, 1, generator=rng)[:, 0]
        states, actions = rollout(lock, policy, reset_len, rng, data.states[rows], data.actions[rows], first_action)
        mask = (states != END) & (torch.arange(states.shape[1]) >= reset_len[:, None])
        returns = (mask * reward.flatten()[cells_of(states, actions, A)]).sum(1)
        cells = (reset_len * 3 + at[1]) * A + first_action
        counts = torch.bincount(cells, minlength=H * 3 * A)
        q = torch.where(counts > 0, torch.bincount(cells, returns, minlength=H * 3 * A) / counts, q)
        log_policy = npg_step(sft.log(), log_policy, q.view(H, 3, A), eta, lam)
        yield log_policy.exp(), q.view(H, 3, A), int(mask.sum()), (mask & (states == CHAIN)).sum(0)


def dpo(data, sft, pairs, beta=0.1, steps=100, lr=0.1):
    """DPO, full-batch, from the SFT policy. -> policy (H, 3, A)."""
    logits, sums = sft.log().requires_grad_(), summing(data, sft.shape[2])
    reference, optimizer = sums(sft.log()), torch.optim.Adam([logits], lr)
    chosen, rejected = pairs.T
    for _ in range(steps):
        logprobs = sums(logits.log_softmax(-1))
        loss, _ = dpo_loss(logprobs[chosen], logprobs[rejected], reference[chosen], reference[rejected], beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach().softmax(-1)


def fitted_q(data, reward):
    """Offline fitted Q iteration on the learned reward: least squares in a table, so dynamic programming on the transitions
    as counted in the data. What the data never tried ends the episode. -> policy (H, 3, A)."""
    H, _, A = reward.shape
    rows, h = (data.states != END).nonzero(as_tuple=True)
    following = F.pad(data.states, (0, 1), value=END)[rows, h + 1]
    counts = torch.bincount(cells_of(data.states, data.actions, A)[rows, h] * 3 + following, minlength=H * 3 * A * 3)
    counts = counts.view(H, 3, A, 3).float()
    counts[..., END] += counts.sum(-1) == 0
    return greedy(q_values(Lock(counts / counts.sum(-1, keepdim=True), reward, None), reward)[0])


# ----------------------------------------------------------------------------------------------------------------------
# 3. The experiment: runs, and plans of runs. What they say about each claim is worked out in tools/toy_report.py.

TUNED_PPO = dict(batch=512, kl_coef=0.0, entropy=8.0, whiten=True)  # the first of results/toy/tuning.json, by --tune
HEAT_BETAS, HEAT_KLS = (0.1, 0.25, 0.5, 1.0), (0.0, 0.001, 0.01, 0.03, 0.1, 0.3)
SEEDS = range(100, 110)  # for reporting only; every setting was chosen on others
SOLVED = 0.9  # of the best return, 1
EVALUATE_EVERY = 5  # updates
SNAPSHOTS = {round(1.2**k) for k in range(50)}  # updates at which it is kept who acted where


@dataclass(frozen=True)
class Run:
    """One method on one lock. With the code it determines the result to the last bit, timings aside."""

    method: str  # drpo | ppo | npg | offline: SFT, DPO and fitted Q
    H: int
    seed: int
    budget: int = 1_000_000  # episodes
    run_on: bool = False  # past the first evaluation above SOLVED
    beta: float = 0.5  # of drpo
    kl_coef: float = 0.001
    entropy: float = 1.0
    whiten: bool = False
    batch: int = 1024
    A: int = 10
    c: float = 2.0
    plain: float = 0.0  # > 0: the plain lock, its data keeping on with 1 - plain / H
    uniform: bool = False  # ... from a uniform policy, and with the true reward
    pairs: int = 50_000
    resets: str = "all"  # half | chain | 30: what of the data is reset to


@functools.lru_cache(maxsize=2)
def problem(seed, H, A, c, plain, uniform, pairs):
    """-> the lock, its data, its labelled pairs, the SFT policy and the learned reward. 100,000 trajectories, half of them
    pairs; the first `pairs` of these are labelled."""
    if uniform:
        lock = plain_lock(H, A, seed=seed)
        return lock, collect(lock, 1000, generator(seed, "data")), None, lock.behaviour, lock.reward
    lock = plain_lock(H, A, 1 - plain / H, seed) if plain else detour_lock(H, A, c, seed)
    data = collect(lock, 100_000, generator(seed, "data"))
    labelled = label(lock, data, generator(seed, "labels"))[:pairs]
    return lock, data, labelled, clone(data, A), fit_reward(data, labelled, A)


def states_to_reset_to(data, resets, H):
    """All of the data; only steps of the first half; only trajectories that never enter the corridor; 30 trajectories."""
    if resets == "half":
        return data._replace(lengths=data.lengths.clamp(max=H // 2))
    if resets == "chain":
        never = (data.states != CORRIDOR).all(1)
        return Data(*[x[never] for x in data])
    return Data(*[x[:30] for x in data]) if resets == "30" else data


def execute(run):
    """-> the result of a Run, as JSON: exact values of the policy from the true start, never from a reset."""
    lock, data, pairs, sft, reward = problem(run.seed, run.H, run.A, run.c, run.plain, run.uniform, run.pairs)
    best = greedy(q_values(lock, lock.reward)[0])
    true_value, learned_value = [lambda policy, r=r: q_values(lock, r, policy)[1] for r in (lock.reward, reward)]
    hacked = greedy(q_values(lock, reward)[0])  # what perfect optimisation of the learned reward leads to
    result = {
        "run": asdict(run),
        "best_learned_return": learned_value(best),
        "hacked_learned_return": learned_value(hacked),
        "hacked_value": true_value(hacked),
    }
    if run.method == "offline":
        returns = summing(data, run.A)(lock.reward)
        return result | {
            "data_mean": returns.mean().item(),
            "data_best": returns.max().item(),
            "sft": true_value(sft),
            "dpo": true_value(dpo(data, sft, pairs)),
            "fitted_q": true_value(fitted_q(data, reward)),
        }
    resets = states_to_reset_to(data, run.resets, run.H)
    if run.method == "npg":
        updates = npg(lock, resets, sft, reward, run.seed, run.batch)
    else:
        beta = 0.0 if run.method == "ppo" else run.beta
        updates = ppo(lock, resets, sft, reward, run.seed, beta, run.kl_coef, run.entropy, run.whiten, run.batch)
    values, visits, steps, cost, start = [], [], 0, None, time.process_time()
    result |= {"episodes_to_solve": None, "steps_to_solve": None}
    for update in range(1, run.budget // run.batch + 1):
        policy, _, taken, on_chain = next(updates)
        steps += taken
        if update <= 50:
            cost = {"steps_per_update": steps / update, "seconds_per_update": (time.process_time() - start) / update}
        if update in SNAPSHOTS:
            visits.append([update * run.batch, *(on_chain / run.batch).tolist(), *[0.0] * (run.H - len(on_chain))])
        if update % EVALUATE_EVERY == 0:
            values.append(true_value(policy))
            if values[-1] > SOLVED and result["episodes_to_solve"] is None:
                result |= {"episodes_to_solve": update * run.batch, "steps_to_solve": steps}
                if not run.run_on:
                    break
    result |= {"value": values[-1], "learned_return": learned_value(policy), "mixture_value": statistics.mean(values), **cost}
    return result | ({"visits": visits} if run.seed == SEEDS[0] else {})


def plan(mode):
    """The runs of a mode, the longest first. The seeds of `tune` are not reported on; those reported on were not tuned on."""
    if mode == "tune":  # PPO for itself
        return [
            Run("ppo", 20, seed, batch=batch, kl_coef=kl_coef, entropy=entropy, whiten=whiten)
            for seed in (0, 1)
            for batch in (512, 1024, 4096)
            for kl_coef in (0.0, 0.001, 0.01)
            for whiten, entropy in ((False, 0.0), (False, 1.0), (False, 3.0), (False, 10.0), (True, 2.0), (True, 8.0))
        ]
    if mode == "quick":
        return [Run("offline", 10, SEEDS[0])] + [
            run for seed in SEEDS[:3] for run in (Run("drpo", 10, seed), Run("ppo", 10, seed, 40_000), Run("npg", 10, seed))
        ]
    full, runs = mode == "full", []
    for seed in SEEDS if full else SEEDS[:3]:
        long = 1_000_000 if full else 200_000
        for H in (10, 20, 30, 40) if full else (10, 20):
            most = 1_200_000 if H == 40 else 1_000_000
            runs += [
                Run("drpo", H, seed, most, run_on=full),
                Run("npg", H, seed, most, run_on=full),
                Run("ppo", H, seed, long),
                Run("offline", H, seed),
            ]
            runs += [Run("ppo", H, seed, long, **TUNED_PPO)] if H >= 20 else []
        for beta in (0.05, 0.1, 0.25, 0.75, 0.9, 1.0) if full else (0.25, 1.0):
            runs += [Run("drpo", 20, seed, 3_000_000 if beta < 0.25 else 1_000_000, beta=beta)]
        runs += [
            Run("drpo", 20, seed, long, resets="half"),
            Run("drpo", 20, seed, long, resets="chain"),
            Run("drpo", 20, seed, 1_000_000, resets="30"),
        ]
        for method in ("ppo", "drpo"):
            runs += [Run(method, 20, seed, c=0.0), Run(method, 20, seed, plain=1.0), Run(method, 20, seed, plain=2.0)]
        for pairs in (1000, 2000, 5000, 10_000) if full else (1000,):
            runs += [Run("drpo", 20, seed, 400_000 if full else 100_000, run_on=True, pairs=pairs)]
        for A, H in [(2, H) for H in (12, 14, 16, 18)] + [(5, H) for H in (6, 7, 8, 9)] if full else []:
            runs += [Run("ppo", H, seed, 6_000_000, A=A, plain=1.0, uniform=True, entropy=0.2)]
        if full and seed in SEEDS[:3]:
            runs += [
                Run("drpo", 20, seed, 300_000, beta=beta, kl_coef=kl_coef)
                for beta in HEAT_BETAS
                for kl_coef in HEAT_KLS
                if kl_coef != 0.001  # those are in the sweep over beta
            ]
    return sorted(set(runs), key=lambda run: (-run.H, run.seed, run.c, run.plain, run.pairs, str(run)))  # problem by problem


def carry_out(runs, out, jobs):
    """The results of the runs. Each is appended to out/runs.jsonl as it is done; what stands there from the same code is not
    done again."""
    code = hashlib.sha256(
        b"".join(Path(__file__).with_name(name).read_bytes() for name in ("toy_env.py", "drpo.py"))
    ).hexdigest()
    path, done = out / "runs.jsonl", {}
    text = path.read_text() if path.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # a line that was cut off
            record = json.loads(line)
            if record["code"] == code:
                done[Run(**record["result"]["run"])] = record["result"]
    missing = [run for run in runs if run not in done]
    if missing and len(missing) < len(runs):
        print(f"{path}: {len(runs) - len(missing)} of {len(runs)} runs are there already")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "a"))
        file.write("\n" if text and not text.endswith("\n") else "")
        if min(jobs, len(missing)) > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(jobs, torch.set_num_threads, (1,)))
            results = pool.imap_unordered(execute, missing)
        else:
            torch.set_num_threads(1)  # tables are too small to share among threads
            results = map(execute, missing)
        for result in tqdm(results, total=len(missing), unit="run", disable=None):
            file.write(json.dumps({"code": code, "result": result}) + "\n")
            file.flush()
            done[Run(**result["run"])] = result
    return [done[run] for run in runs]


def tabulate_grid(results, out):
    """The grid of PPO for itself: settings, how many seeds it solved, its mean value, the best first; out/tuning.json."""
    cells = {}
    for r in results:
        cells.setdefault(tuple((key, r["run"][key]) for key in TUNED_PPO), []).append(r)
    rows = sorted(
        (
            {
                **dict(cell),
                "solved": sum(r["episodes_to_solve"] is not None for r in runs),
                "seeds": len(runs),
                "mean_value": statistics.mean(r["value"] for r in runs),
            }
            for cell, runs in cells.items()
        ),
        key=lambda row: (-row["solved"], -row["mean_value"]),
    )
    (out / "tuning.json").write_text("[" + ",\n ".join(json.dumps(row) for row in rows) + "]\n")
    print("\n".join(str(row) for row in rows[:10]))


def main(argv=None):
    """Exit status 0, or 1 if a claim did not come out as README.md states it."""
    parser = argparse.ArgumentParser(description="The detour lock: where dataset resets matter. Without a flag: a minute.")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--quick", action="store_true", help="the main claims at H = 10, in seconds")
    modes.add_argument("--full", action="store_true", help="everything, 10 seeds, in half an hour")
    modes.add_argument("--tune", action="store_true", help="PPO's own grid, on seeds that are not reported on")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/toy"),
        help="folder for results.json, claims.md and toy.png (default: %(default)s)",
    )
    parser.error = lambda message: parser.exit(2, f"toy_env.py: {message}\n")
    args = parser.parse_args(argv)
    mode = next((mode for mode in ("quick", "full", "tune") if getattr(args, mode)), "default")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "runs.jsonl").touch()
    except OSError as error:
        parser.exit(2, f"--out {args.out}: cannot be written to: {error.strerror}\n")
    results = carry_out(plan(mode), args.out, 1 if mode == "quick" else min(8, os.cpu_count()))
    if mode == "tune":
        return tabulate_grid(results, args.out)
    from tools.toy_report import NOT_EXPECTED, claims, draw, table

    rows = claims(results)
    (args.out / "claims.md").write_text(
        "| claim | verdict | measured |\n|---|---|---|\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)
    )
    (args.out / "results.json").write_text(
        '{"claims": [' + ",\n".join(map(json.dumps, rows)) + '],\n"runs": [' + ",\n".join(map(json.dumps, results)) + "]}\n"
    )
    print(table(results))
    for claim, verdict, figures in rows:
        print(f"{verdict:13}  {claim}\n               {figures}")
    draw(results, args.out / "toy.png")
    surprises = [claim for claim, verdict, _ in rows if verdict != "holds" and claim not in NOT_EXPECTED]
    if surprises:
        print("not as README.md states it: " + "; ".join(surprises))
    return 1 if surprises else 0


# ----------------------------------------------------------------------------------------------------------------------
# 4. The toy TL;DR corpus

SUBREDDITS = ["relationships", "advice", "legaladvice", "askreddit", "offmychest", "personalfinance"]
PEOPLE = ["sister", "brother", "boss", "roommate", "neighbor", "cousin", "friend", "uncle", "landlord", "coworker"]
DEEDS = ["broke", "sold", "lost", "stole", "painted", "hid", "burned", "borrowed"]
THINGS = ["bike", "phone", "laptop", "guitar", "car", "jacket", "camera", "couch", "watch", "garden"]
FEELINGS = ["angry", "sad", "hurt", "confused", "betrayed", "tired", "worried", "guilty"]
WISHES = [
    "an apology",
    "my money back",
    "some advice",
    "to move out",
    "a new one",
    "to stay calm",
    "to call a lawyer",
    "to talk",
]
DISTRACTORS = [
    "it was raining all day .",
    "we had dinner before that .",
    "i work two jobs .",
    "most of them live far away .",
    "this happened last week .",
    "sorry for the long post .",
    "we used to get along .",
    "i hardly slept since .",
]
QUESTION = "what should i do ?"


def write_post(rng):
    """-> (prompt in the TL;DR format, its three facts as the clauses that state them)."""
    person, deed, thing = rng.choice(PEOPLE), rng.choice(DEEDS), rng.choice(THINGS)
    feeling, wish = rng.choice(FEELINGS), rng.choice(WISHES)
    body = [
        rng.choice(["yesterday", "so", "last month", "well ,"]) + f" my {person} {deed} our {thing} .",
        rng.choice(["now i feel", "honestly i feel", "i really feel"]) + f" {feeling} .",
        rng.choice(["all i want is", "i just want", "i think i want"]) + f" {wish} .",
        rng.choice(DISTRACTORS),
    ]
    rng.shuffle(body)
    title = rng.choice([f"my {person} {deed} our {thing}", f"i feel {feeling}", f"i want {wish}"])
    prompt = f"SUBREDDIT: r/{rng.choice(SUBREDDITS)}\n\nTITLE: {title}\n\nPOST: {' '.join(body)}\n\nTL;DR:"
    return prompt, [f"my {person} {deed} our {thing} .", f"i feel {feeling} .", f"i want {wish} ."]


def read_facts(prompt):
    """The clauses of `write_post`, read off the prompt. Raises ValueError on any other post."""
    post = prompt.partition("POST:")[2]
    deed = re.search(rf"my (?:{'|'.join(PEOPLE)}) (?:{'|'.join(DEEDS)}) our (?:{'|'.join(THINGS)}) \.", post)
    feeling = re.search(rf"i (?:really )?feel ({'|'.join(FEELINGS)})", post)
    wish = re.search(rf"want (?:is )?({'|'.join(WISHES)})", post)
    if not (deed and feeling and wish):
        raise ValueError("this is no post of toy_env.py, and others have no gold score: name another judge, such as rm")
    return [deed[0], f"i feel {feeling[1]} .", f"i want {wish[1]} ."]


def careful(rng, facts):
    """Every fact, in order, and the question."""
    return [*facts, QUESTION]


def lazy(rng, facts):
    """60 %: the clauses in order, stopping after each with probability 0.7. 40 %: one clause from the middle."""
    if rng.random() < 0.4:
        return [rng.choice(facts[1:])]
    clauses = careful(rng, facts)
    kept = next((n for n in range(1, len(clauses)) if rng.random() < 0.7), len(clauses))
    return clauses[:kept]


def sloppy(rng, facts):
    """One thing wrong: facts of some other post, the question too early, a clause twice in place of another or on top."""
    clauses, wrong = careful(rng, facts), write_post(rng)[1]
    places, (here, there) = rng.sample(range(3), rng.randint(1, 3)), rng.sample(range(3), 2)
    return rng.choice(
        [
            [wrong[i] if i in places else clause for i, clause in enumerate(clauses)],
            [*rng.sample(facts, rng.randint(0, 2)), QUESTION],
            [clauses[here] if i == there else clause for i, clause in enumerate(clauses)],
            clauses[: here + 1] + clauses[here:],
        ]
    )


def mixed(rng, facts):
    """The annotators of the preference data: 45 % careful, 30 % lazy, 25 % sloppy."""
    return rng.choices([careful, lazy, sloppy], [0.45, 0.3, 0.25])[0](rng, facts)


def gold_score(prompt, response):
    """+0.3 a covered fact, -1 an invented one, -0.5 a repetition, -0.1 a word, -1 if it does not end with a full clause, and
    +3.0 for asking what to do after all three facts."""
    facts = read_facts(prompt)
    clauses = [clause.strip() for clause in re.split(r"(?<=[.?])\s", response.strip()) if clause.strip()]
    score, seen = -0.1 * len(re.findall(r"[a-z]+", response)), set()
    for clause in clauses:
        if clause in seen:
            score -= 0.5
        elif clause == QUESTION:
            score += 3.0 if seen.issuperset(facts) else 0.0
        else:
            score += 0.3 if clause in facts else -1.0
        seen.add(clause)
    return score - (0.0 if clauses and clauses[-1][-1] in ".?" else 1.0)


def gold_judge(prompts, a, b):
    """P(a is preferred) for each: 1, 0, or 0.5 at equal gold scores."""
    gaps = [gold_score(p, x) - gold_score(p, y) for p, x, y in zip(prompts, a, b)]
    return [0.5 if abs(gap) < 1e-9 else float(gap > 0) for gap in gaps]


def posts(split, seed, annotate, size):
    """`size` posts with a reference each. Held-out references are the better of two by mixed annotators."""
    rng, rows = random.Random(f"posts {split} {seed}"), []
    for _ in range(size):
        prompt, facts = write_post(rng)
        if split == "train":
            reference = " ".join(annotate(rng, facts))
        else:
            reference = max((" ".join(mixed(rng, facts)) for _ in range(2)), key=lambda text: gold_score(prompt, text))
        rows.append({"prompt": prompt, "reference": reference})
    return rows


def gate(split="train", seed=0):
    """SFT data by lazy annotators: one reference in sixty is full."""
    return posts(split, seed, lazy, 6000 if split == "train" else 1000)


def easy(split="train", seed=0):
    """SFT data by the annotators of the preference pairs: nearly half of the references are full."""
    return posts(split, seed, mixed, 6000 if split == "train" else 1000)


def gate_pairs(split="train", seed=0, temperature=0.5):
    """Two summaries by mixed annotators, the winner drawn by Bradley-Terry on the gold score: sigma(gap / temperature)."""
    rng, rows = random.Random(f"pairs {split} {seed}"), []
    while len(rows) < (4000 if split == "train" else 1000):
        prompt, facts = write_post(rng)
        a, b = " ".join(mixed(rng, facts)), " ".join(mixed(rng, facts))
        if a == b:
            continue
        gap = (gold_score(prompt, a) - gold_score(prompt, b)) / temperature
        first_wins = rng.random() < 1 / (1 + math.e**-gap)
        rows.append({"prompt": prompt, "chosen": a if first_wins else b, "rejected": b if first_wins else a})
    return rows


def bpe_tokenizer():
    """A byte-level BPE tokenizer like Pythia's, trained on the corpus. Needs `tokenizers`, which comes with transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "[PAD]"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    rows = posts("train", 0, careful, 2000)
    tokenizer.train_from_iterator((row["prompt"] + " " + row["reference"] for row in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="[PAD]")


def tiny_pythia(seed=0):
    """Pythia's architecture, 2 layers of 128, 0.5 M parameters, random weights."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # the residual is sequential: in two parallel layers copying from the post takes several times as long to learn
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=600,
                hidden_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=512,
                max_position_embeddings=256,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=1,
                classifier_dropout=0.0,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
                use_parallel_residual=False,
                tie_word_embeddings=False,
            )
        )


if __name__ == "__main__":
    import toy_env  # under its own name, as its processes and tools see it

    sys.exit(toy_env.main())
