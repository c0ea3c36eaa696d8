"""bsuite's deep_sea, unmodified: DR-PO in which a reset is a replay of actions. Needs `pip install bsuite==0.3.6`.

    python -m tools.deep_sea [--seeds 300 301 ...] [--sizes 10 20 30] [--out runs/deep_sea]

A block falls through N rows. In each row an action moves it to the left or to the right; which does which differs from cell to
cell. A move to the right costs 0.01 / N. N moves to the right reach the goal, +1, and nothing else does. bsuite cannot set a
state, so a reset plays the first actions of an offline trajectory again, as one can in any deterministic simulator.

Each trajectory of the data has an inclination p, uniform in [0, 1], and moves to the right with probability p. The behaviour
policy knows what the actions do and nothing about the goal. The reward is a table, fitted to preferences by Eq. (1). A run is
solved when the exact value of its policy passes 0.9. Each is a line of OUT/runs.jsonl; the same command resumes.
"""

import functools
import importlib.util
from itertools import product

import torch

import drpo
import toy_env
from tools import experiment, report

SOLVED, BUDGET, BATCH, TEMPERATURE = 0.9, 51_200, 256, 0.1  # value; episodes; per update; of the preferences
ROWS = {  # the settings of `ppo`; with `clone` the policy starts as the clone of the data, otherwise uniform
    "PPO": {"beta": 0.0},
    "DR-PO": {"beta": 0.5},
    "PPO from the clone": {"beta": 0.0, "clone": True},
    "DR-PO from the clone": {"beta": 0.5, "clone": True},
}


def deep_seas(count, N, seed):
    """`count` environments of bsuite, which is imported here: the tables need this module without it."""
    from bsuite.environments.deep_sea import DeepSea

    return [DeepSea(N, mapping_seed=seed) for _ in range(count)]


def play(envs, reset_len, actions, act):
    """Alg. 1, line 4: B episodes. Row i replays reset_len[i] of actions[i] (B, N), then does what act(h, column) says, (B,) ->
    (B,). -> columns, actions (B, N) long, rewards (B, N)."""
    steps, history = [env.reset() for env in envs], []
    for h in range(actions.shape[1]):
        column = torch.tensor([step.observation[h].argmax() for step in steps])
        action = torch.where(h < reset_len, actions[:, h], act(h, column))
        steps = [env.step(a) for env, a in zip(envs, action.tolist())]
        history.append((column, action, torch.tensor([step.reward for step in steps])))
    return [torch.stack(x, 1) for x in zip(*history)]


def cells_of(columns, actions):
    """The index of each step's (row, column, action) in a flattened table (N, N, 2). (B, N), (B, N) -> (B, N)."""
    N = columns.shape[1]
    return (torch.arange(N) * N + columns) * 2 + actions


def value(policy, right):
    """Exact return of a policy (N, N, 2) from the start; right (N, N) long: the action that moves to the right. -> float"""
    N, v = len(right), torch.zeros(len(right))
    for h in reversed(range(N)):
        p = policy[h].gather(1, right[h, :, None])[:, 0]
        to_right = torch.cat([v[1:], v[-1:] + 1]) - 0.01 / N
        v = p * to_right + (1 - p) * torch.cat([v[:1], v[:-1]])
    return v[0].item()


@functools.lru_cache(maxsize=1)
def problem(N, seed, trajectories=10_000):
    """-> right (N, N), the data's columns and actions (trajectories, N), the clone and the learned reward (N, N, 2)."""
    envs, rng = deep_seas(trajectories, N, seed), drpo.generator(seed, "data")
    right, p = torch.tensor(envs[0]._action_mapping), torch.rand(trajectories, generator=rng)
    behaviour = lambda h, column: (right[h, column] + (torch.rand(trajectories, generator=rng) >= p)) % 2  # noqa: E731
    nothing = torch.zeros(trajectories, N, dtype=torch.long)
    columns, actions, rewards = play(envs, nothing[:, 0], nothing, behaviour)
    cells, logits = cells_of(columns, actions), torch.zeros(N * N * 2, requires_grad=True)
    counts = 1 + torch.bincount(cells.flatten(), minlength=N * N * 2).view(N, N, 2)
    returns = rewards.sum(1).view(-1, 2)  # trajectories 2i and 2i + 1 are pair i
    first_wins = torch.rand(len(returns), generator=rng) < torch.sigmoid((returns[:, 0] - returns[:, 1]) / TEMPERATURE)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_change=1e-9, line_search_fn="strong_wolfe")

    def objective():  # Alg. 1, line 1: Eq. (1), with a standard normal prior on the logits
        optimizer.zero_grad()
        scores = logits[cells].sum(1).view(-1, 2)
        chosen, rejected = [torch.where(first, scores[:, 0], scores[:, 1]) for first in (first_wins, ~first_wins)]
        loss = drpo.bradley_terry_loss(chosen, rejected) + (logits**2).sum() / 2 / len(scores)
        loss.backward()
        return loss

    optimizer.step(objective)
    return right, columns, actions, counts / counts.sum(-1, keepdim=True), TEMPERATURE * logits.detach().view(N, N, 2)


def ppo(N, seed, beta, clone=False, lr=0.05, epochs=8, cliprange=0.5, lam=0.95, entropy=0.01):
    """Algorithm 1 with PPO on tables; beta = 0 is PPO. -> {solved: episodes or None, value: the last, start: the first}."""
    right, _, data, sft, reward = problem(N, seed)
    envs = deep_seas(BATCH, N, seed)
    logits = (sft.log() if clone else torch.zeros(N, N, 2)).requires_grad_()
    values, start = torch.zeros(N * N, requires_grad=True), value(logits.detach().softmax(-1), right)
    optimizer = torch.optim.Adam([logits, values], lr, eps=1e-5)
    resets, rng = drpo.generator(seed, "resets"), drpo.generator(seed, "rollouts")
    for update in range(1, BUDGET // BATCH + 1):
        with torch.no_grad():
            # Alg. 1, lines 3 and 4
            rows = torch.randint(len(data), (BATCH,), generator=resets)
            reset_len = drpo.sample_reset_lengths(torch.full((BATCH,), N - 1), beta, resets)
            policy = logits.softmax(-1)
            act = lambda h, column: torch.multinomial(policy[h, column], 1, generator=rng)[:, 0]  # noqa: E731
            columns, actions, _ = play(envs, reset_len, data[rows], act)
            # Line 5
            mask, cells = torch.arange(N) >= reset_len[:, None], cells_of(columns, actions)
            advantages, returns = drpo.gae(reward.flatten()[cells], values[cells // 2], mask, 1.0, lam)
            old_logprobs, old_values = policy.log().flatten()[cells], values[cells // 2]
        # Line 6
        for _ in range(epochs):
            log_policy = logits.log_softmax(-1)
            pg_loss, _ = drpo.ppo_policy_loss(log_policy.flatten()[cells], old_logprobs, advantages, mask, cliprange)
            vf_loss, _ = drpo.ppo_value_loss(values[cells // 2], old_values, returns, mask, cliprange)
            mean_entropy = drpo.masked_mean(-(log_policy.exp() * log_policy).sum(-1).flatten()[cells // 2], mask)
            optimizer.zero_grad()
            (pg_loss + vf_loss - entropy * mean_entropy).backward()
            optimizer.step()
        if (now := value(logits.detach().softmax(-1), right)) > SOLVED:
            return {"solved": update * BATCH, "value": now, "start": start}
    return {"solved": None, "value": now, "start": start}


def execute(task):
    return ppo(task["N"], task["seed"], **ROWS[task["row"]])


def cells(lines):
    """Lines of runs.jsonl -> rows for `report.table`, over the seeds."""
    table = [["method", "solved", "episodes until solved", "last value"]]
    for N, row in product(sorted({line["N"] for line in lines}), ROWS):
        if mine := [line for line in lines if (line["row"], line["N"]) == (row, N)]:
            table.append([f"{row}, N = {N}", *toy_env.summary(mine)])
    return table


def main(argv=None):
    parser = experiment.options("deep_sea", __doc__, "runs/deep_sea", range(300, 305), jobs=2)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 20, 30])
    args = parser.parse_args(argv)
    if min(args.sizes) < 1:
        drpo.stop("--sizes: must be at least 1")
    if not importlib.util.find_spec("bsuite"):
        drpo.stop("needs bsuite: pip install bsuite==0.3.6")
    groups = [[{"row": row, "N": N, "seed": seed}] for seed, N, row in product(args.seeds, args.sizes, ROWS)]
    print(report.table(cells(experiment.carry_out(execute, groups, args.out / "runs.jsonl", args.jobs))))


if __name__ == "__main__":
    main()
