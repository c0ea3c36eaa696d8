"""The detour lock: an MDP of tables on which the claim of DR-PO can be checked exactly.

    python toy_env.py [--seeds 200 201 202]   H = 20, three seeds: a table, eight verdicts and a figure, in a minute or two
    python toy_env.py --quick                 the claim itself: PPO and DR-PO on one seed, in seconds
    python toy_env.py --full                  the sweep over H, beta, lambda, pairs and locks (tools/toy_sweep.py), hours

`a*` is the one good action of A in a layer, `x` a wrong one. There are H layers, and the best return is 1:

             a*            a*            a*                a*
    chain   g_0 --------> g_1 --------> g_2 ---> ... ---> g_{H-1} ---> +1        x at g_h, h >= 1: the end, 0
             |                       /             /     /
             | x                    /             /     /      by chance: onto the chain, at a uniformly random layer
    corridor '----------> w_1 --------> w_2 ---> ... w_{H-2}                     leaving it: the end, 0
                               -c/H          -c/H                                each step in it costs c/H

The behaviour policy walks down the corridor, drops onto the chain somewhere, and acts at random there. Its data covers every
state of the chain, and no trajectory in it nets more than 0. PPO starts from its clone, learns that the corridor costs,
leaves it, and never sees the later chain again: it loses the coverage before it can use it. DR-PO is reset to states of the
data and learns the chain from its end. All tables are trained by the functions of drpo.py, section 4.
"""

import argparse
import functools
import json
import multiprocessing
import os
import signal
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn.functional as F

import drpo

# ----------------------------------------------------------------------------------------------------------------------
# 1. The lock. Tables are indexed [layer h, state s, action a], with three states in a layer.

CHAIN, CORRIDOR, END = range(3)

# H layers, A actions, undiscounted; every episode starts at CHAIN in layer 0. transition (H, 3, A, 3): P(state in layer h + 1 |
# h, s, a); reward (H, 3, A), the true one; behaviour (H, 3, A), the policy that the data comes from
Lock = namedtuple("Lock", "transition reward behaviour")


def detour_lock(H, A=10, c=2.0, seed=0):
    """The lock in the drawing above, H >= 2, with random good and leaving actions. -> Lock. The behaviour policy is uniform on
    the chain; in the corridor it leaves with probability 1/H."""
    good, leave = torch.randint(A, (2, H), generator=drpo.generator(seed, "lock"))
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


def cdf(p):
    """Distributions over the last axis, (H, ..., n) -> (H, rows * n), non-decreasing: row number + cumulative distribution.
    With u uniform in [0, 1), `searchsorted(cdf(p)[h], i + u, right=True)` is i * n + an outcome drawn from row i."""
    steps = p.double().flatten(1, -2).cumsum(-1).clamp(max=1.0)
    steps[..., -1] = 1.0  # u < 1 always finds an outcome, whatever the rounding
    return (steps + torch.arange(steps.shape[1])[:, None]).flatten(1)


def rollout(lock, policy, reset_len, generator, states=None, actions=None, first_action=None):
    """Alg. 1, line 4: B episodes, B = len(reset_len). Row i replays reset_len[i] steps of states and actions (B, H), then
    follows the policy (H, 3, A), or first takes first_action[i]. -> states, actions (B, T) long, at END after the end."""
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
    """Exact Q_h(s, a) = r_h(s, a) + E[V_{h+1}(s')] of a policy (H, 3, A), or of the best. -> Q (H, 3, A), V at the start."""
    q, v = torch.zeros_like(reward), torch.zeros(3)
    for h in reversed(range(len(reward))):
        q[h] = reward[h] + lock.transition[h] @ v
        v = q[h].max(-1)[0] if policy is None else (policy[h] * q[h]).sum(-1)
    return q, v[CHAIN].item()


def coverage(lock):
    """Assumption 5.4 for the behaviour policy pi and the best policy pi*, which never leaves the chain. -> C_ST, C_TR (floats):
    the maxima of d^{pi*}_h(s, a) / d^pi_h(s, a), and of d^{pi*}(tau) / d^pi(tau) over whole trajectories tau."""
    best = q_values(lock, lock.reward)[0][:, CHAIN].argmax(1)
    pi, d, ratios = lock.behaviour[torch.arange(len(best)), CHAIN, best].double(), torch.eye(3)[CHAIN], []
    for h in range(len(pi)):
        ratios.append(1 / (d[CHAIN] * pi[h]).item())
        d = torch.einsum("s,sa,sat->t", d, lock.behaviour[h], lock.transition[h])
    return max(ratios), (1 / pi).prod().item()


# ----------------------------------------------------------------------------------------------------------------------
# 2. The offline data, and the methods. All start from the same clone of the data and see the same learned reward.

# N trajectories, at END after their end; rows 2i and 2i + 1 are pair i. states, actions (N, H) long; lengths (N,) long: steps
Data = namedtuple("Data", "states actions lengths")
TEMPERATURE = 0.1  # of the labels' Bradley-Terry model; it also puts the fitted reward in units of the true one


def cells_of(states, actions, A):
    """The index of each step's (h, s, a) in a flattened table (H, 3, A). (B, T), (B, T) -> (B, T)."""
    return (torch.arange(states.shape[1]) * 3 + states) * A + actions


def collect(lock, policy, N, generator):
    """N trajectories of a policy (H, 3, A) -> Data."""
    states, actions = rollout(lock, policy, torch.zeros(N, dtype=torch.long), generator)
    rest = (0, len(policy) - states.shape[1])
    return Data(F.pad(states, rest, value=END), F.pad(actions, rest), (states != END).sum(1))


def summing(data, A):
    """-> a function, table (H, 3, A) -> (N,): the table's entries summed along each trajectory."""
    rows, h = (data.states != END).nonzero(as_tuple=True)
    cells = cells_of(data.states, data.actions, A)[rows, h]
    return lambda table: torch.zeros(len(data.lengths)).index_add(0, rows, table.flatten().index_select(0, cells))


def label(lock, data, generator):
    """Preferences by Bradley-Terry on the true returns -> (N / 2, 2) long: (chosen, rejected), as rows of the data."""
    pair = summing(data, lock.reward.shape[2])(lock.reward).view(-1, 2)
    first_wins = torch.rand(len(pair), generator=generator) < torch.sigmoid((pair[:, 0] - pair[:, 1]) / TEMPERATURE)
    chosen = 2 * torch.arange(len(pair)) + (~first_wins).long()
    return torch.stack([chosen, chosen ^ 1], 1)


def clone(data, A):
    """The SFT policy pi_SFT: counts of the data's actions, plus one each, so that none is impossible. -> (H, 3, A)"""
    cells = cells_of(data.states, data.actions, A)[data.states != END]
    counts = 1 + torch.bincount(cells, minlength=data.states.shape[1] * 3 * A).view(-1, 3, A)
    return counts / counts.sum(-1, keepdim=True)


def fit_reward(data, pairs, A, l2=1.0):
    """Alg. 1, line 1: Eq. (1) for a table whose sum along a trajectory / TEMPERATURE is the logit, by L-BFGS. -> (H, 3, A)
    An L2 penalty on the logits (a standard normal prior) settles what pairs leave open."""
    logits, sums = torch.zeros(data.states.shape[1], 3, A, requires_grad=True), summing(data, A)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_change=1e-9, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = drpo.bradley_terry_loss(*sums(logits)[pairs.T]) + l2 / 2 * (logits**2).sum() / len(pairs)
        loss.backward()
        return loss

    optimizer.step(objective)
    return TEMPERATURE * logits.detach()


def draw_resets(data, batch, beta, generator):
    """Alg. 1, line 3: rows of the data, and for each, with probability beta, how many of its steps to replay: uniform over its
    own length, the start included (Alg. 3). -> rows, reset_len, (batch,) long each."""
    rows = torch.randint(len(data.lengths), (batch,), generator=generator)
    return rows, drpo.sample_reset_lengths(data.lengths[rows] - 1, beta, generator, include_zero=True)


def ppo(lock, data, sft, reward, seed, beta, kl_coef=0.001, entropy=1.0, whiten=False, batch=1024, bonus=0.0, group=1,
        roll_in=False, lr=0.05, epochs=8, cliprange=0.5, lam=0.95):  # fmt: skip
    """Algorithm 1 with PPO on tables, as `drpo_update` of drpo.py but for the entropy bonus; beta = 0 is PPO itself.

    entropy   the bonus is entropy / H a step: in units of the reward, the same at every H. drpo.py has none
    whiten    advantages; off by default, since with few resets nearly all are 0, and whitening would scale up the noise
    bonus     adds bonus / sqrt(N(h, s, a)) to the reward of a step, N the visits of all updates so far
    group     > 1: RLOO on groups of so many rollouts from the same state; its advantages need no critic
    roll_in   resets to fresh trajectories of pi_SFT instead of the data (Remark 5.1), which `learn` does not count

    Yields after each update: policy (H, 3, A), values (H, 3), and the share of episodes that acted at g_h, (H,)."""
    H, _, A = sft.shape
    logits, values, visits = sft.log().requires_grad_(), torch.zeros(H, 3, requires_grad=True), torch.zeros(H * 3 * A)
    optimizer = torch.optim.Adam([logits, values], lr, eps=1e-5)
    resets, rng = drpo.generator(seed, "resets"), drpo.generator(seed, "rollouts")
    while True:
        with torch.no_grad():
            source = collect(lock, sft, batch, resets) if roll_in else data  # Alg. 1, line 3
            rows, reset_len = [x.repeat_interleave(group) for x in draw_resets(source, batch // group, beta, resets)]
            policy = logits.softmax(-1)  # line 4
            states, actions = rollout(lock, policy, reset_len, rng, source.states[rows], source.actions[rows])
            # Line 5: rewards and advantages of the policy's own steps
            mask = (states != END) & (torch.arange(states.shape[1]) >= reset_len[:, None])
            cells = cells_of(states, actions, A)
            sites = cells // A  # (h, s), in a flattened table (H, 3)
            old_logprobs, ref_logprobs = policy.log().flatten()[cells], sft.log().flatten()[cells]
            rewards = drpo.penalised_rewards(torch.zeros(batch), old_logprobs, ref_logprobs, mask, kl_coef)
            rewards += reward.flatten()[cells]
            if bonus:
                visits += torch.bincount(cells[mask], minlength=len(visits))
                rewards += bonus * visits[cells].clamp(min=1).rsqrt()
            old_values = values.flatten()[sites]
            advantages, returns = drpo.gae(rewards, old_values, mask, gamma=1.0, lam=lam)
            if group > 1:
                advantages = drpo.rloo_advantages((rewards * mask).sum(1), group)[:, None].expand(mask.shape)
            advantages = drpo.masked_whiten(advantages, mask) if whiten else advantages
            of_steps = cells, sites, old_logprobs, old_values, advantages, returns
            cells, sites, old_logprobs, old_values, advantages, returns = [x[mask] for x in of_steps]  # nothing else matters
            share, ones = torch.bincount(sites, minlength=H * 3) / len(sites), torch.ones_like(advantages)
        for _ in range(epochs):  # line 6
            log_policy = logits.log_softmax(-1)
            logprobs = log_policy.flatten().index_select(0, cells)
            pg_loss, _ = drpo.ppo_policy_loss(logprobs, old_logprobs, advantages, ones, cliprange)
            vf_loss, _ = drpo.ppo_value_loss(values.flatten().index_select(0, sites), old_values, returns, ones, cliprange)
            mean_entropy = -(share * (log_policy.exp() * log_policy).sum(-1).flatten()).sum()
            optimizer.zero_grad()
            (pg_loss + vf_loss - entropy / H * mean_entropy).backward()
            optimizer.step()
        on_chain = F.pad((mask & (states == CHAIN)).float().mean(0), (0, H - states.shape[1]))
        yield logits.detach().softmax(-1), values.detach(), on_chain


def npg_step(log_sft, log_policy, q, eta, lam):
    """The NPG oracle (Alg. 2) in closed form: argmin_p <-Q, p> + lam KL(p || pi_SFT) + KL(p || pi_t) / eta, in every state.
    (H, 3, A) each, as logs: a probability below the smallest float must be able to grow again."""
    return ((eta * lam * log_sft + log_policy + eta * q) / (eta * lam + 1)).log_softmax(-1)


def npg(lock, data, sft, reward, seed, batch=1024, eta=50.0, lam=1e-4):
    """Algorithm 3: every rollout is reset, and its first action is drawn from (pi_SFT + pi_t) / 2. The critic Q(s, a) is the
    mean return (the least-squares fit) of the episodes that began with (s, a); without any it keeps its last estimate.
    Yields what `ppo` yields, with Q (H, 3, A) as the critic. The paper returns the uniform mixture of all these policies, and
    Theorem 5.7 takes smaller steps: eta = 1 / (r_max sqrt(T)), 0.03 after 1,000 rounds."""
    H, _, A = sft.shape
    log_policy, q = sft.log(), torch.zeros(H * 3 * A)
    resets, rng = drpo.generator(seed, "resets"), drpo.generator(seed, "rollouts")
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
        on_chain = F.pad((mask & (states == CHAIN)).float().mean(0), (0, H - states.shape[1]))
        yield log_policy.exp(), q.view(H, 3, A), on_chain


def dpo(data, sft, pairs, beta=0.1, steps=100, lr=0.1):
    """DPO, full-batch, from the SFT policy. -> policy (H, 3, A)."""
    logits, sums = sft.log().requires_grad_(), summing(data, sft.shape[2])
    reference, optimizer = sums(sft.log()), torch.optim.Adam([logits], lr)
    for _ in range(steps):
        loss, _ = drpo.dpo_loss(*sums(logits.log_softmax(-1))[pairs.T], *reference[pairs.T], beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach().softmax(-1)


def fitted_q(data, reward):
    """Offline fitted Q iteration on the learned reward: in a table, dynamic programming on the transition counts of the data.
    What the data never tried ends the episode. -> policy (H, 3, A)."""
    states, h = F.pad(data.states, (0, 1), value=END), torch.arange(len(reward))
    counts, one = torch.zeros(*reward.shape, 3), torch.ones(())
    counts.index_put_((h, states[:, :-1], data.actions, states[:, 1:]), one, accumulate=True)
    counts[..., END] += counts.sum(-1) == 0
    q, _ = q_values(Lock(counts / counts.sum(-1, keepdim=True), reward, None), reward)
    return F.one_hot(q.argmax(-1), q.shape[-1]).float()


# ----------------------------------------------------------------------------------------------------------------------
# 3. The demo: every row on every seed, the verdicts, and the figure.

SOLVED, BUDGET = 0.9, 200_000  # the value that counts as solved, of the best value 1; episodes, unless a row says otherwise
ROWS = {  # the settings of `learn`
    "SFT: clone of the data": dict(method="sft"),
    "SFT: clone of the preferred": dict(method="sft_preferred"),
    "DPO": dict(method="dpo"),
    "fitted Q on the learned reward": dict(method="fitted_q"),
    "PPO": dict(beta=0.0, run_on=True),
    "PPO, tuned": dict(beta=0.0, run_on=True, batch=512, kl_coef=0.0, entropy=8.0, whiten=True),
    "PPO, count bonus": dict(beta=0.0, bonus=1.0),
    "PPO, free corridor (c = 0)": dict(beta=0.0, c=0.0),
    "RLOO": dict(beta=0.0, group=4, budget=300_000),
    "DR-PO": dict(beta=0.5, run_on=True),
    "DR-PO, no entropy bonus": dict(beta=0.5, entropy=0.0),
    "DR-PO, beta = 0.25": dict(beta=0.25, budget=500_000),
    "DR-PO, beta = 1": dict(beta=1.0),
    "DR-PO with RLOO": dict(beta=0.5, group=4, budget=300_000),
    "DR-PO with NPG (Algorithm 3)": dict(method="npg", budget=1_000_000),
    "DR-PO, roll-in by pi_SFT": dict(beta=0.5, roll_in=True),
    "DR-PO, first half of the data": dict(beta=0.5, reset_to="half", budget=150_000),
    "DR-PO, data without the corridor": dict(beta=0.5, reset_to="chain", budget=150_000),
}
CLAIMS = [  # text, rows, and where each seed's last value must be: above SOLVED / 2 (True) or below (False)
    ("DR-PO finds what the data covers", ["DR-PO"], True),
    ("Without resets the same optimisers do not, nor PPO with its own tuning", ["PPO", "PPO, tuned", "RLOO"], False),
    ("beta = 0.25, 0.5 and 1 work", ["DR-PO, beta = 0.25", "DR-PO", "DR-PO, beta = 1"], True),
    ("NPG as the policy optimiser works too (last iterate)", ["DR-PO with NPG (Algorithm 3)"], True),
    ("It is the coverage", ["DR-PO, first half of the data", "DR-PO, data without the corridor"], False),
    ("Where PPO keeps its coverage, it needs no resets", ["PPO, free corridor (c = 0)"], True),
    ("Resets to roll-ins by pi_SFT, not counted, work: here the data is pi_SFT's own", ["DR-PO, roll-in by pi_SFT"], True),
    ("PPO with a count bonus needs no resets", ["PPO, count bonus"], True),
]
COLOURS = {"PPO": "#D55E00", "PPO, tuned": "#E69F00", "DR-PO": "#0072B2"}  # of Okabe and Ito, safe for the colour-blind


@functools.lru_cache(maxsize=2)
def problem(seed, H=20, c=2.0, pairs=50_000):
    """-> lock, data, labelled pairs, SFT policy, learned reward. 100,000 trajectories, the first `pairs` pairs labelled."""
    lock = detour_lock(H, c=c, seed=seed)
    data = collect(lock, lock.behaviour, 100_000, drpo.generator(seed, "data"))
    labelled = label(lock, data, drpo.generator(seed, "labels"))[:pairs]
    return lock, data, labelled, clone(data, 10), fit_reward(data, labelled, 10)


def reset_states(data, reset_to):
    """What is reset to: all; half: the steps of the first half; chain: trajectories that never enter the corridor. -> Data"""
    if reset_to == "half":
        return data._replace(lengths=data.lengths.clamp(max=data.states.shape[1] // 2))
    return Data(*[x[(data.states != CORRIDOR).all(1)] for x in data]) if reset_to == "chain" else data


def learn(seed, method="ppo", H=20, c=2.0, pairs=50_000, reset_to="all", budget=BUDGET, run_on=False, tables=None, **settings):
    """Trains until the exact value from the true start passes SOLVED; with run_on, or if it does not, for `budget` episodes.
    -> JSON: solved (episodes, or None), value (the last), mixture (the mean over all policies), and with run_on the curve: rows
    of episodes, value, share of episodes at each g_h, after updates that are 10 % apart. Offline methods need no episodes."""
    lock, data, labelled, sft, reward = tables or problem(seed, H, c, pairs)
    offline = {"sft": lambda: sft, "dpo": lambda: dpo(data, sft, labelled), "fitted_q": lambda: fitted_q(data, reward)}
    offline["sft_preferred"] = lambda: clone(Data(*[x[labelled[:, 0]] for x in data]), sft.shape[2])
    if method in offline:
        value = q_values(lock, lock.reward, offline[method]())[1]
        return {"solved": 0 if value > SOLVED else None, "value": value}
    updates = {"ppo": ppo, "npg": npg}[method](lock, reset_states(data, reset_to), sft, reward, seed, **settings)
    batch, values, curve, solved = settings.get("batch", 1024), [], [], None
    for update in range(1, budget // batch + 1):
        policy, _, on_chain = next(updates)
        values.append(q_values(lock, lock.reward, policy)[1])
        if update in {round(1.1**k) for k in range(100)}:
            curve.append([update * batch, *[round(x, 4) for x in (values[-1], *on_chain.tolist())]])
        solved = solved or (update * batch if values[-1] > SOLVED else None)
        if solved and not run_on:
            break
    return {"solved": solved, "value": values[-1], "mixture": sum(values) / len(values), "curve": curve if run_on else []}


def summary(runs):
    """-> solved "2/3", episodes until solved "76k - 107k", last value "0.96 to 0.99", over the seeds of one row."""
    solved, values = sorted(run["solved"] for run in runs if run["solved"] is not None), [run["value"] for run in runs]
    episodes = f"{solved[0] / 1000:.0f}k - {solved[-1] / 1000:.0f}k" if any(solved) else "0" if solved else "-"
    return f"{len(solved)}/{len(runs)}", episodes, f"{min(values):.2f} to {max(values):.2f}"


def verdicts(by_row):
    """{row: its runs} -> (claim, "holds" or "does not hold", figures) for each claim whose first row is there."""
    table = []
    for claim, rows, above in [claim for claim in CLAIMS if claim[1][0] in by_row]:
        found = {row: by_row[row] for row in rows if row in by_row}
        holds = all((run["value"] > SOLVED / 2) == above for runs in found.values() for run in runs)
        figures = [f"{row}: solved {summary(runs)[0]}, value {summary(runs)[2]}" for row, runs in found.items()]
        table.append((claim, "holds" if holds else "does not hold", "; ".join(figures)))
    return table


def draw(by_row, path):
    """The figure: value against episodes, and who still acts on the chain under PPO and under DR-PO, means over seeds."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure  # without pyplot, which takes another second to import

    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    left, *maps = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    for row in [row for row in COLOURS if row in by_row]:
        episodes, values, *_ = torch.tensor([run["curve"] for run in by_row[row]]).permute(2, 1, 0)  # (snapshots, seeds) each
        left.plot(episodes[:, 0], values.mean(1), color=COLOURS[row], label=row)
        left.fill_between(episodes[:, 0], values.amin(1), values.amax(1), color=COLOURS[row], alpha=0.25, lw=0)
        for run in by_row[row]:
            x, y, face = (run["solved"], SOLVED, None) if run["solved"] else (*run["curve"][-1][:2], "white")
            left.plot(x, y, "o", color=COLOURS[row], mfc=face, alpha=0.6, clip_on=False, zorder=3)
    left.plot([], [], "o", color="grey", label="a seed passes 0.9")
    left.plot([], [], "o", color="grey", mfc="white", label="a seed never does")
    left.set(xscale="log", xlabel="episodes", ylabel="exact value", title="value of the policy (best: 1)")
    left.legend(loc="center left", bbox_to_anchor=(0, 0.62))
    for ax, row in zip(maps, ("PPO", "DR-PO")):
        curve = torch.tensor([run["curve"] for run in by_row[row]]).mean(0)  # (snapshots, 2 + H)
        share, layers = curve[:, 2:].T.clamp(min=1e-3), range(curve.shape[1] - 2)
        image = ax.pcolormesh(curve[:, 0].numpy(), layers, share.numpy(), norm=LogNorm(1e-3, 1), shading="nearest")
        ax.set(xscale="log", xlabel="episodes", ylabel="layer", title=f"where {row} still acts", yticks=layers[::5])
    figure.colorbar(image, ax=maps, label="share of episodes", format="{x:.1%}", extend="min")
    figure.savefig(path, dpi=180)


def main(argv=None):  # -> exit status: 0, or 1 if a claim does not hold
    parser = argparse.ArgumentParser(description="The detour lock: where dataset resets matter. Without a flag: minutes.")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="PPO and DR-PO on one seed, in seconds")
    mode.add_argument("--full", action="store_true", help="the sweep of tools/toy_sweep.py, hours; resumes")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 100 101 102; --quick: 100; --full: 100 ... 109")
    parser.add_argument("--out", type=Path, help="folder for the results; default: runs/toy, --quick: runs/toy_quick")
    parser.error = lambda message: parser.exit(2, f"toy_env.py: {message}\n")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs", "toy_quick" if args.quick else "toy")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / ("sweep.jsonl" if args.full else "results.json")).open("a").close()
    except OSError as error:
        parser.error(f"--out {args.out}: cannot be written to: {error.strerror}")
    if args.full:
        try:
            from tools.toy_sweep import sweep
        except ImportError as error:
            parser.error(f"--full needs tools/toy_sweep.py: {error}")
        return sweep(args.seeds or range(100, 110), args.out)
    rows, seeds = (("PPO", "DR-PO"), [100]) if args.quick else (ROWS, [100, 101, 102])
    tasks = [(row, {"seed": seed, **ROWS[row]}) for seed in args.seeds or seeds for row in rows]
    jobs, by_row = min(8, os.cpu_count(), len(tasks)), {row: [] for row in rows}
    os.environ["OMP_NUM_THREADS"] = "1"  # of each process
    try:
        with multiprocessing.get_context("spawn").Pool(jobs, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            for row, task, result in [(row, task, pool.apply_async(learn, (), task)) for row, task in tasks]:
                by_row[row].append({**task, **result.get()})
    except KeyboardInterrupt:
        parser.exit(130, "toy_env.py: interrupted\n")
    claims = verdicts(by_row)
    for H in (10, 20, 40):
        print("H = {}: the data covers the best policy with C_ST = {:.0f}, C_TR = {:.0e}".format(H, *coverage(detour_lock(H))))
    lines = ["", "| method | seeds solved | episodes until solved | last value |", "|---|---|---|---|"]
    lines += [f"| {' | '.join((row, *summary(runs)))} |" for row, runs in by_row.items()]
    print("\n".join([*lines, "", f"Claims; the bar is a last value of {SOLVED / 2} on each seed:"]))
    print("\n".join(f"{verdict}: {claim} ({figures})" for claim, verdict, figures in claims))
    (args.out / "results.json").write_text(json.dumps({"claims": claims, "runs": by_row}) + "\n")
    draw(by_row, args.out / "toy.png")
    return int(any(verdict != "holds" for _, verdict, _ in claims))


if __name__ == "__main__":
    raise SystemExit(main())
