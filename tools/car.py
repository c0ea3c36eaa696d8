"""DR-PO beyond text: continuous control, gymnasium's MountainCarContinuous-v0. Needs `pip install gymnasium==1.4.0`.

    python -m tools.car [--seeds 300 301 ...] [--rows NAME ...] [--jobs 1] [--out runs/car]

A car in a valley must swing to get out: its engine is too weak to drive straight up. A step costs 0.1 a^2, arrival pays 100.
The data comes from a driver who pushes with the motion 20 % of the time and brakes 80 %. It covers the way up, but few of its
trajectories arrive. PPO and DR-PO start from its Gaussian clone pi_SFT, see the same reward, fitted to preferences, and differ
in beta alone. A reset puts the car into a state of the data.

Each run is a line of OUT/runs.jsonl when it is done, and the same command resumes with those that are missing. Then comes a
table. "Solved": 100 episodes of the mean action in gymnasium return at least 90 on average, the threshold of gymnasium.
Settings were searched, on other seeds, until DR-PO worked and PPO did not: an existence proof.
"""

import copy
import time
from collections import namedtuple
from functools import lru_cache, partial
from statistics import mean

import gymnasium
import torch
from torch import nn

import drpo
from tools import experiment, report

# ---- 1. The car: gymnasium's equations for B cars at once. A state is a position and a velocity ------------------------------
T, TIME, TRUE_REWARD = 200, torch.arange(200) / 200, torch.tensor([10.0, -0.1])  # steps; t / T of each; weights of `features`
Rollout = namedtuple("Rollout", "states actions mask")  # (B, T + 1, 2), (B, T), (B, T) bool: from the reset to the arrival


def take(run, rows):  # these rows of a Rollout
    return Rollout(*[x[rows] for x in run])


def at_goal(states):  # (..., 2) -> (...) bool
    return (states[..., 0] >= 0.45) & (states[..., 1] >= 0)


def advance(states, actions):  # (B, 2), (B,) -> the next states, (B, 2). Actions are clipped to [-1, 1]
    position, velocity = states.unbind(-1)
    velocity = (velocity + 0.0015 * actions.clamp(-1, 1) - 0.0025 * torch.cos(3 * position)).clamp(-0.07, 0.07)
    position = (position + velocity).clamp(-1.2, 0.6)
    return torch.stack([position, torch.where(position <= -1.2, velocity.clamp(min=0), velocity)], -1)


@torch.no_grad()
def rollout(act, states, reset_len=0):
    """Alg. 1, line 4: row i starts from states[i] at step reset_len[i] and follows act(states, t) -> (B,) until it arrives.
    Before and after that a car keeps its state. (B, 2), (B,) -> Rollout"""
    visited, taken, mask = [states], [], []
    for t in range(T):
        taken.append(act(states, t))
        mask.append((t >= reset_len) & ~at_goal(states))
        states = torch.where(mask[t][:, None], advance(states, taken[t]), states)
        visited.append(states)
    return Rollout(*[torch.stack(x, 1) for x in (visited, taken, mask)])


def features(run):  # of each step: 10 if it arrives, else 0, and a^2. `@ TRUE_REWARD` is gymnasium's reward. -> (B, T, 2)
    return torch.stack([10.0 * at_goal(run.states[:, 1:]), run.actions.clamp(-1, 1) ** 2], -1) * run.mask[..., None]


# ---- 2. The data, pi_SFT and the learned reward ------------------------------------------------------------------------------
def drive(n, rng, share=0.2, otherwise=-1.0):
    """n trajectories of a driver who pushes with the motion for a share of the time, else `otherwise` times as much: -1 brakes,
    0 rests. The driver decides anew every 20 steps on average. -> Rollout"""
    position, pushes = torch.rand(n, generator=rng) * 0.2 - 0.6, torch.rand(n, generator=rng) < share

    def steer(states, t):
        pushes[:] = torch.where(torch.rand(n, generator=rng) < 1 / 20, torch.rand(n, generator=rng) < share, pushes)
        return (torch.where(pushes, 1.0, otherwise) * states[:, 1].sign() + 0.3 * torch.randn(n, generator=rng)).clamp(-1, 1)

    return rollout(steer, torch.stack([position, torch.zeros(n)], -1))  # starts as in gymnasium


def mlp(seed, name):  # 3 inputs, 1 output
    torch.manual_seed(drpo.generator(seed, name).initial_seed())
    return nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))


def observe(states, third=TIME):  # a network's inputs: position, velocity, and time or action. (..., 2), (...) -> (..., 3)
    return torch.stack(torch.broadcast_tensors((states[..., 0] + 0.3) / 0.9, states[..., 1] / 0.07, third), -1)


def act(policy, rng, states, t):  # a draw from the policy; without a generator its mean. (B, 2) -> (B,)
    mean = policy(observe(states, TIME[t]))[:, 0]
    return mean + policy.log_std.exp() * torch.randn(len(mean), generator=rng) if rng else mean


def logprobs(policy, x, actions):  # ln pi(a | s). (..., 3), (...) -> (...)
    return torch.distributions.Normal(policy(x)[..., 0], policy.log_std.exp()).log_prob(actions)


def fit(net, loss, n, batch, lr, steps, rng):  # Adam on loss(some indices below n), learning rate linear to 0
    optimizer = torch.optim.Adam(net.parameters(), lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss(torch.randint(n, (batch,), generator=rng)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return net


def clone(data, seed):  # -> pi_SFT, by maximum likelihood: a Gaussian, an MLP for its mean, the same deviation in all states
    policy, x, actions = mlp(seed, "policy"), observe(data.states[:, :-1])[data.mask], data.actions[data.mask]
    policy.log_std, rng = nn.Parameter(torch.tensor(-0.5)), drpo.generator(seed, "clone")
    return fit(policy, lambda rows: -logprobs(policy, x[rows], actions[rows]).mean(), len(x), 2048, 3e-3, 300, rng)


def fit_reward(data, seed, network=False):
    """Alg. 1, line 1: Eq. (1) on 5,000 pairs, labelled by Bradley-Terry on the true return / 5. Linear in the features, a class
    with the true reward in it (Assumption 5.2), or an MLP of next state and action. -> reward: Rollout -> (B, T)"""
    net, rng = mlp(seed, "reward") if network else nn.Linear(2, 1, bias=False), drpo.generator(seed, "pairs")
    pairs = torch.randint(len(data.mask), (5000, 2), generator=rng)
    first, second = (features(data) @ TRUE_REWARD).sum(1)[pairs].T
    first_wins = torch.rand(5000, generator=rng) < torch.sigmoid((first - second) / 5)
    pairs = torch.where(first_wins[:, None], pairs, pairs.flip(1))  # winner, loser

    def reward(run):
        return net(observe(run.states[:, 1:], run.actions.clamp(-1, 1)) if network else features(run))[..., 0] * run.mask

    def loss(rows):
        return drpo.bradley_terry_loss(*[reward(take(data, side)).sum(1) for side in pairs[rows].T])

    nn.init.zeros_(net.weight) if not network else None
    fit(net, loss, 5000, 64, 3e-3 if network else 1e-2, 600, rng)
    return reward


# ---- 3. Algorithm 1 with PPO -------------------------------------------------------------------------------------------------
def ppo(data, sft, reward, seed, beta, roll_in=False, updates=60, batch=256, lr=4e-3, cliprange=0.4, lam=0.98, entropy=0.002):
    """As `drpo_update` of drpo.py, without KL penalty and without whitening; beta = 0 is PPO itself. roll_in: resets to fresh
    trajectories of pi_SFT (Remark 5.1). Yields after each update: the policy, and the Rollout that it learned from."""
    both = nn.ModuleList([copy.deepcopy(sft), mlp(seed, "critic")])
    optimizer, (policy, critic) = torch.optim.Adam(both.parameters(), lr, eps=1e-5), both
    resets, rng = drpo.generator(seed, "resets"), drpo.generator(seed, "rollouts")
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = lr * (1 - update / updates)
        with torch.no_grad():
            # Alg. 1, line 3. Without a reset a car starts where the trajectory does
            source = take(data, torch.randint(len(data.mask), (batch,), generator=resets))
            source = rollout(partial(act, sft, resets), source.states[:, 0]) if roll_in else source
            reset_len = drpo.sample_reset_lengths(source.mask.sum(1) - 1, beta, resets, include_zero=True)
            # Line 4
            run = rollout(partial(act, policy, rng), source.states[torch.arange(batch), reset_len], reset_len)
            # Line 5: rewards and advantages of the policy's own steps. The factor brings returns to about 1
            x, rewards = observe(run.states[:, :-1]), 0.1 * reward(run)
            old_logprobs, old_values = logprobs(policy, x, run.actions), critic(x)[..., 0]
            advantages, returns = drpo.gae(rewards, old_values, run.mask, gamma=1.0, lam=lam)
            steps = [y[run.mask] for y in (x, run.actions, old_logprobs, old_values, advantages, returns, run.mask)]
        # Line 6: four epochs of four mini-batches over at most 10,000 steps
        for part in [part for _ in range(4) for part in torch.randperm(len(steps[0]), generator=rng)[:10_000].chunk(4)]:
            x, actions, old_logprobs, old_values, advantages, returns, mask = [y[part] for y in steps]
            pg_loss, _ = drpo.ppo_policy_loss(logprobs(policy, x, actions), old_logprobs, advantages, mask, cliprange)
            vf_loss, _ = drpo.ppo_value_loss(critic(x)[..., 0], old_values, returns, mask, torch.inf)
            optimizer.zero_grad()
            (pg_loss + 0.5 * vf_loss - entropy * policy.log_std).backward()  # a Gaussian's entropy is log_std + constant
            nn.utils.clip_grad_norm_(both.parameters(), 0.5)
            optimizer.step()
        yield policy, run


# ---- 4. The experiment -------------------------------------------------------------------------------------------------------
ROWS = {  # the settings of `learn`. filtered: a clone of the best 2 % by the learned reward; halves: resets to first halves
    "SFT": dict(method="sft"), "filtered cloning": dict(method="filtered"),
    "PPO": dict(beta=0.0), "DR-PO": dict(beta=0.5), "DR-PO, beta 0.25": dict(beta=0.25), "DR-PO, beta 1": dict(beta=1.0),
    "DR-PO, first halves": dict(beta=0.5, halves=True), "DR-PO, roll-in by SFT": dict(beta=0.5, roll_in=True),
    "PPO, network reward": dict(beta=0.0, network=True), "DR-PO, network reward": dict(beta=0.5, network=True),
    "PPO, resting driver": dict(beta=0.0, rests=True), "DR-PO, resting driver": dict(beta=0.5, rests=True),
    "DR-PO, GAE lambda 0.95": dict(beta=0.5, lam=0.95), "DR-PO, entropy x 5": dict(beta=0.5, entropy=0.01),
}  # fmt: skip


@lru_cache(maxsize=3)
def problem(seed, rests=False, network=False):  # -> data, pi_SFT, reward. rests: a driver who half the time pushes, else rests
    data = drive(2000, drpo.generator(seed, "data"), *(0.5, 0.0) * rests)
    return data, clone(data, seed), fit_reward(data, seed, network)


def learn(seed, method="ppo", rests=False, network=False, halves=False, **settings):  # -> the policy of a row
    data, sft, reward = problem(seed, rests, network)
    if method == "filtered":
        return clone(take(data, reward(data).sum(1).topk(len(data.mask) // 50).indices), seed)
    if halves:
        data = data._replace(mask=data.mask & (torch.arange(T) < data.mask.sum(1, keepdim=True) / 2))
    return sft if method == "sft" else [policy for policy, _ in ppo(data, sft, reward, seed, **settings)][-1]


@torch.no_grad()
def evaluate(policy, episodes=100):  # the mean action in gymnasium itself -> mean return, share that arrives
    env, total, arrived = gymnasium.make("MountainCarContinuous-v0"), 0.0, 0
    for episode in range(episodes):
        (state, _), t, terminated = env.reset(seed=episode), 0, False
        while t < T and not terminated:
            action = act(policy, None, torch.tensor(state)[None], t).clamp(-1, 1).numpy()
            state, reward, terminated, *_ = env.step(action)
            t, total = t + 1, total + float(reward)
        arrived += terminated
    return total / episodes, arrived / episodes


def execute(task):  # {run, seed} -> figures of the run
    began, policy = time.perf_counter(), learn(task["seed"], **ROWS[task["run"]])
    value, arrived = evaluate(policy)
    return {"return": value, "arrived": arrived, "seconds": time.perf_counter() - began}


def cells(lines):  # of runs.jsonl -> rows for `report.table`, over the seeds
    table = [["method", "solved", "mean return", "lowest", "highest"]]
    for name in [name for name in ROWS if any(line["run"] == name for line in lines)]:
        returns = [line["return"] for line in lines if line["run"] == name]
        solved, n = sum(value >= 90 for value in returns), len(returns)
        interval = report.bracket(report.clopper_pearson(solved, n), 2)
        table.append([name, f"{solved}/{n} {interval}", *(f"{f(returns):.1f}" for f in (mean, min, max))])
    return table


def main(argv=None):
    parser = experiment.options("car", __doc__, "runs/car", range(300, 310), jobs=1)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="NAME", help=f"of {'; '.join(ROWS)}")
    args = parser.parse_args(argv)
    groups = [[{"run": row, "seed": seed}] for seed in args.seeds for row in args.rows]
    print(report.table(cells(experiment.carry_out(execute, groups, args.out / "runs.jsonl", args.jobs))))


if __name__ == "__main__":
    main()
