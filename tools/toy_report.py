"""What the runs of toy_env.py say: a table, a verdict per claim, a figure. Used by `python toy_env.py`."""

import math
from dataclasses import asdict
from statistics import mean, median

import torch

from toy_env import HEAT_BETAS, HEAT_KLS, SOLVED, TUNED_PPO, Run

HORIZONS, BETAS, PAIRS = (10, 20, 30, 40), (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0), (1000, 2000, 5000, 10_000, 50_000)
BARS = {10: 60_000, 20: 200_000, 30: 350_000, 40: 1_200_000}  # episodes within which DR-PO is to solve all seeds
NOT_EXPECTED = {"... and at H = 20 within 120k episodes"}  # claims of which README.md says that they do not hold


def pick(results, method, H=None, **settings):
    """The results of a method, at H if it is given, with these settings and, budgets apart, all others at their defaults."""
    wanted = {
        key: settings.get(key, value)
        for key, value in asdict(Run(method, H, 0)).items()
        if key not in ("H", "seed", "budget", "run_on")
    }
    return [r for r in results if H in (None, r["run"]["H"]) and all(r["run"][key] == value for key, value in wanted.items())]


def solved(runs, within=math.inf):
    """The episodes that each solved run took, of those that took at most `within`."""
    return [r["episodes_to_solve"] for r in runs if r["episodes_to_solve"] is not None and r["episodes_to_solve"] <= within]


def typical(runs):
    """The median of the episodes to solve; infinite if half of the runs did not."""
    return median(r["episodes_to_solve"] or math.inf for r in runs)


def tally(runs, within=math.inf):
    """'9/10, 71k-128k episodes': how many were solved within so many episodes, and the range."""
    episodes = solved(runs, within)
    return f"{len(episodes)}/{len(runs)}" + (
        f", {min(episodes) // 1000}k-{max(episodes) // 1000}k episodes" if episodes else ""
    )


def budget(runs):
    return f"{max(r['run']['budget'] for r in runs) // 1000}k"


def table(results):
    """How often, how soon and how well, per method and H, as text."""
    rows = [
        f"{'':9} {'H':>3} {'solved':>7} {'episodes':>9} {'steps':>11} {'value':>7}   "
        f"medians; the value is exact, from the true start"
    ]
    for method in ("ppo", "drpo", "npg"):
        for H in HORIZONS:
            if runs := pick(results, method, H):
                found = [r for r in runs if r["episodes_to_solve"]]
                episodes, steps = [
                    f"{median(r[key] for r in found):,.0f}" if found else "-" for key in ("episodes_to_solve", "steps_to_solve")
                ]
                rows.append(
                    f"{method:9} {H:3} {len(found):3}/{len(runs):<3} {episodes:>9} {steps:>11} "
                    f"{median(r['value'] for r in runs):7.3f}"
                )
    for method in ("sft", "dpo", "fitted_q"):
        for H in HORIZONS:
            if values := [r[method] for r in pick(results, "offline", H)]:
                rows.append(
                    f"{method:9} {H:3} {sum(v > SOLVED for v in values):3}/{len(values):<3} {'-':>9} {'-':>11} "
                    f"{median(values):7.3f}"
                )
    return "\n".join(rows)


def claims(results):
    """-> rows (claim, "holds" or "does not hold", figures). Only the claims on which there are results."""
    rows = []

    def add(claim, holds, *figures):
        rows.append((claim, "holds" if holds else "does not hold", "; ".join(figures)))

    horizons = [H for H in HORIZONS if pick(results, "drpo", H)]
    full, long = len(horizons) > 2, [H for H in horizons if H >= 20] or horizons
    drpo, ppo, npg, offline = [{H: pick(results, method, H) for H in horizons} for method in ("drpo", "ppo", "npg", "offline")]
    tuned = {H: pick(results, "ppo", H, **TUNED_PPO) for H in long}

    add(
        "DR-PO, beta = 0.5, finds what the data covers",
        all(len(solved(drpo[H], BARS[H])) == len(drpo[H]) for H in horizons),
        *[f"H = {H}: {tally(drpo[H], BARS[H])} (bar {BARS[H] // 1000}k)" for H in horizons],
    )
    if full:
        worst = min(r["value"] for H in horizons for r in drpo[H])
        means = [r["data_mean"] for H in horizons for r in offline[H]]
        best = max(r["data_best"] for H in horizons for r in offline[H])
        add(
            "... and it is no imitation",
            worst >= 0.97,
            f"worst value after {budget(drpo[10])} episodes {worst:.3f}, where the "
            f"data's mean is {min(means):.2f} to {max(means):.2f} and its best trajectory earns {best:.1f}",
        )
    if long == [10]:
        add(
            "PPO, the same but for beta = 0, is later",
            not solved(ppo[10]),
            f"H = 10: {tally(ppo[10])} within {budget(ppo[10])}",
        )
    else:
        add(
            "PPO, the same but for beta = 0, does not",
            not any(solved(ppo[H]) for H in long),
            *[
                f"H = {H}: {tally(ppo[H])} within {budget(ppo[H])}, mean value {mean(r['value'] for r in ppo[H]):.2f}"
                for H in long
            ],
        )
        add(
            "... nor when it is tuned for itself",
            all(len(solved(tuned[H])) <= (len(tuned[H]) // 10 if H == 20 else 0) for H in long),
            *[f"H = {H}: {tally(tuned[H])} within {budget(tuned[H])}" for H in long],
        )
        add(
            "At H = 10 PPO finds it too, later",
            bool(solved(ppo[10])) and typical(ppo[10]) > typical(drpo[10]),
            f"PPO {tally(ppo[10])} within {budget(ppo[10])}",
            f"DR-PO {tally(drpo[10])}",
        )

    sweep = {beta: runs for beta in BETAS if (runs := pick(results, "drpo", 20, beta=beta))}
    if len(sweep) > 1:
        add(
            "Any beta > 0 works, H = 20",
            all(len(solved(runs)) == len(runs) for runs in sweep.values()),
            *[f"{beta}: {tally(runs)}" for beta, runs in sweep.items()],
        )
        medians = [typical(runs) for beta, runs in sweep.items() if beta >= 0.25]
        add(
            "... with beta in [0.25, 1] within 2x",
            max(medians) <= 2 * min(medians),
            f"slowest median over fastest {max(medians) / min(medians):.2f}",
        )
    add(
        "Algorithm 3, with the NPG oracle, works too",
        all(len(solved(npg[H])) == len(npg[H]) for H in horizons),
        *[
            f"H = {H}: {tally(npg[H])}"
            + (f", mixture of all iterates at {budget(npg[H])} {mean(r['mixture_value'] for r in npg[H]):.2f}" if full else "")
            for H in horizons
        ],
    )
    if full:
        add(
            "... and at H = 20 within 120k episodes",
            len(solved(npg[20], 120_000)) == len(npg[20]),
            f"{tally(npg[20], 120_000)}; the slowest {max(solved(npg[20])) // 1000}k",
        )
    H = long[0]
    add(
        f"DPO falls short, H = {H}",
        max(r["dpo"] for r in offline[H]) <= 0.15,
        f"DPO at most {max(r['dpo'] for r in offline[H]):.2f}",
        f"cloning {mean(r['sft'] for r in offline[H]):.2f}",
    )
    add(
        "... which is not so of all offline methods",
        min(r["fitted_q"] for r in offline[H]) > SOLVED,
        f"fitted Q on the learned reward, worst {min(r['fitted_q'] for r in offline[H]):.2f}",
    )
    if H >= 20:
        steps, seconds = [
            median(r[key] for r in drpo[H]) / median(r[key] for r in ppo[H])
            for key in ("steps_per_update", "seconds_per_update")
        ]
        add(
            f"No extra steps, H = {H}",
            steps <= 1.1,  # a clock would not give the same verdict every time
            f"an update of DR-PO takes {steps:.2f}x the steps and {seconds:.2f}x the CPU time of one of PPO",
        )
    if full:
        (power, off_power), (rate, off_rate) = [
            line_fit(x, [typical(drpo[H]) for H in horizons]) for x in ([math.log(H) for H in horizons], horizons)
        ]
        add(
            "DR-PO's episodes grow as H^2.5 or slower",
            power <= 2.5,
            f"power law H^{power:.2f}, residual {off_power:.2f} in ln",
            f"exponential x{math.exp(rate):.2f} a layer, residual {off_rate:.2f}",
        )
    growth = {
        A: {H: runs for H in range(20) if (runs := pick(results, "ppo", H, A=A, plain=1.0, uniform=True, entropy=0.2))}
        for A in (2, 5)
    }
    if growth[2]:
        factor = {A: math.exp(line_fit(list(by), [typical(runs) for runs in by.values()])[0]) for A, by in growth.items()}
        add(
            "From a uniform policy PPO's grow exponentially",
            factor[2] >= 1.5 and factor[5] >= 3,
            *[
                f"plain lock, true reward, A = {A}: x{factor[A]:.2f} a layer, H = {min(by)}-{max(by)}"
                for A, by in growth.items()
            ],
        )
    half, chain, few = [pick(results, "drpo", 20, resets=resets) for resets in ("half", "chain", "30")]
    if half:
        add(
            "It is the coverage",
            not solved(half) and not solved(chain) and len(solved(few)) == len(few),
            f"resets to the first half: {tally(half)} within {budget(half)}",
            f"to what never enters the corridor: {tally(chain)} within {budget(chain)}",
            f"to 30 trajectories: {tally(few)}",
        )
        kept = {
            name: [pick(results, method, 20, **{key: value}) for method in ("ppo", "drpo")]
            for name, key, value in (("c = 0", "c", 0.0), ("plain lock", "plain", 1.0), ("worse data", "plain", 2.0))
        }
        worse = kept.pop("worse data")
        add(
            "Where PPO keeps its coverage, it needs no resets",
            all(len(solved(runs)) == len(runs) for both in kept.values() for runs in both),
            *[f"{name}: PPO {tally(both[0])}, DR-PO {tally(both[1])}" for name, both in kept.items()],
        )
        add(
            "... and where the data is worse, it may lose it again",
            len(solved(worse[0])) < len(worse[0]) == len(solved(worse[1])),
            f"plain lock, data that goes on with 1 - 2/H, not 1 - 1/H: PPO {tally(worse[0])}, DR-PO {tally(worse[1])}",
        )
    labels = {pairs: runs for pairs in PAIRS if (runs := pick(results, "drpo", 20, pairs=pairs))}
    if 1000 in labels:
        few = labels[1000]
        add(
            "A reward from few pairs is hacked",
            all(r["hacked_learned_return"] > r["best_learned_return"] and r["hacked_value"] < 0.1 for r in few),
            *[
                f"{pairs} pairs: the best policy for the learned reward has learned return "
                f"{mean(r['hacked_learned_return'] for r in runs):.2f} and true {mean(r['hacked_value'] for r in runs):.2f} "
                f"(DR-PO {mean(r['learned_return'] for r in runs):.2f} and {mean(r['value'] for r in runs):.2f}; "
                f"the truly best {mean(r['best_learned_return'] for r in runs):.2f} and 1)"
                for pairs, runs in labels.items()
            ],
        )
    if heat := heat_map(results):
        bears = {
            beta: max([kl_coef for b, kl_coef in heat if b == beta and heat[b, kl_coef] == 1], default=-1) for beta, _ in heat
        }
        most = {bears[beta] for beta in bears if beta >= 0.25}
        add(
            "How large lambda may be does not depend on beta in [0.25, 1]",
            len(most) == 1 and max(most) > 0,
            "all seeds solved within 300k up to "
            + ", ".join(f"lambda = {kl_coef} at beta = {beta}" for beta, kl_coef in bears.items() if kl_coef >= 0),
            f"at beta = 0.1 {max(share for (beta, _), share in heat.items() if beta == 0.1):.0%} of the seeds at the best "
            f"lambda",
        )
    return rows


def heat_map(results):
    """{(beta, kl_coef): share of the seeds solved within 300,000 episodes}, H = 20; empty if the run had no such part."""
    cells = {}
    for beta in HEAT_BETAS:
        for kl_coef in HEAT_KLS:
            if runs := pick(results, "drpo", 20, beta=beta, kl_coef=kl_coef):
                cells[beta, kl_coef] = len(solved(runs, 300_000)) / len(runs)
    return cells if len(cells) == len(HEAT_BETAS) * len(HEAT_KLS) else {}


def line_fit(x, counts):
    """ln(count) = slope x + intercept, by least squares. -> slope, root mean square residual."""
    y = torch.tensor(counts, dtype=torch.double).log()
    columns = torch.stack([torch.tensor(x, dtype=torch.double), torch.ones(len(x), dtype=torch.double)], 1)
    solution = torch.linalg.lstsq(columns, y).solution
    return solution[0].item(), (columns @ solution - y).square().mean().sqrt().item()


def draw(results, path):
    """The figure: the lock, who solves it, how soon, which states they see meanwhile, and what beta, lambda and r do."""
    from matplotlib.figure import Figure  # without pyplot, which takes another second to import

    colours = {
        "drpo": "tab:blue",
        "npg": "tab:cyan",
        "ppo": "tab:red",
        "tuned": "tab:orange",
        "dpo": "tab:purple",
        "fitted_q": "tab:green",
    }
    names = {
        "drpo": "DR-PO",
        "npg": "Algorithm 3 (NPG)",
        "ppo": "PPO",
        "tuned": "PPO, tuned for itself",
        "dpo": "DPO",
        "fitted_q": "fitted Q",
    }
    figure = Figure(figsize=(21, 9.5))
    (lock, success, episodes, hacking), (lost, kept, sweep, heat) = figure.subplots(2, 4)
    horizons = [H for H in HORIZONS if pick(results, "drpo", H)]
    by_method = {method: {H: pick(results, method, H) for H in horizons} for method in ("drpo", "npg", "ppo")}
    by_method["tuned"] = {H: runs for H in horizons if (runs := pick(results, "ppo", H, **TUNED_PPO))}

    draw_lock(lock)
    for place, method in enumerate(("drpo", "npg", "fitted_q", "ppo", "tuned", "dpo")):
        if method in by_method:  # shifted a little, so that no line hides another
            shares = {H: len(solved(runs)) / len(runs) for H, runs in by_method[method].items()}
        else:
            shares = {H: mean(r[method] > SOLVED for r in pick(results, "offline", H)) for H in horizons}
        success.plot(
            list(shares),
            [share - 0.012 * (place % 3 - 1) for share in shares.values()],
            "o-",
            color=colours[method],
            label=names[method],
            alpha=0.8,
        )
    success.set(title="Share of seeds solved", xlabel="H", ylim=(-0.05, 1.05), xticks=horizons)
    success.legend(loc="center left")

    for shift, (method, by_horizon) in enumerate(by_method.items()):
        for H, runs in by_horizon.items():
            for i, r in enumerate(runs):
                x, n = H + 2 * (shift - 1.5) + 0.15 * (i - 4.5), r["episodes_to_solve"]
                episodes.plot(
                    x, n or r["run"]["budget"], "o", color=colours[method], mfc=colours[method] if n else "none", ms=4
                )
        episodes.plot([], [], "o", color=colours[method], label=names[method])
    episodes.plot([], [], "o", color="grey", mfc="none", label="not solved when the budget was spent")
    episodes.plot(range(3, 8), [10.0**H for H in range(3, 8)], "k--", lw=1, label="$A^H$: a lucky guess of the whole lock")
    episodes.set(title="Episodes until solved", xlabel="H", yscale="log", xticks=horizons, ylim=(5e3, 4e7))
    episodes.legend(fontsize=8)

    H = 20 if 20 in horizons else 10
    for ax, method in ((lost, "ppo"), (kept, "drpo")):
        r = next(r for r in by_method[method][H] if "visits" in r)
        start, *share = torch.tensor(r["visits"]).T
        stopped = None if r["run"]["run_on"] else r["episodes_to_solve"]
        end = torch.cat([start, torch.tensor([stopped + 1 if stopped else r["run"]["budget"]])])
        image = ax.pcolormesh(
            end.numpy(), torch.arange(H + 1) - 0.5, torch.stack(share).clamp(min=1e-3).log10(), vmin=-3, vmax=0
        )
        ax.set(
            title=f"{names[method]}: who acts on the chain, H = {H}", xlabel="episodes so far", ylabel="layer h", xscale="log"
        )
        figure.colorbar(image, ax=ax, ticks=[-3, -2, -1, 0], label="share of the episodes at $g_h$").ax.set_yticklabels(
            ["1/1000 or less", "1/100", "1/10", "all"]
        )

    for beta in BETAS:
        for r in pick(results, "drpo", 20, beta=beta):
            n = r["episodes_to_solve"]
            sweep.plot(beta, n or r["run"]["budget"], "o", color="tab:blue", mfc="tab:blue" if n else "none", alpha=0.6)
    for r in pick(results, "ppo", 20):
        sweep.plot(0, r["run"]["budget"], "o", color="tab:red", mfc="none")
    sweep.set(
        title="Any $\\beta$ > 0, H = 20 (hollow: not solved)",
        xlabel="share of rollouts that are reset, $\\beta$",
        ylabel="episodes until solved",
        yscale="log",
    )

    labels = {pairs: runs for pairs in PAIRS if (runs := pick(results, "drpo", 20, pairs=pairs))}
    for key, label, style in (
        ("hacked_learned_return", "best policy for the learned reward: its learned return", "^--"),
        ("hacked_value", "... and its true return", "^-"),
        ("best_learned_return", "truly best policy: its learned return", "s--"),
        ("learned_return", "DR-PO: learned return", "o--"),
        ("value", "DR-PO: true return", "o-"),
    ):
        hacking.plot(
            list(labels),
            [mean(r[key] for r in runs) for runs in labels.values()],
            style,
            label=label,
            color={"^": "tab:purple", "s": "tab:grey", "o": "tab:blue"}[style[0]],
        )
    hacking.set(
        title="Reward error: few labelled pairs, H = 20", xlabel="pairs", xscale="log", ylabel="return", ylim=(-0.1, 1.5)
    )
    hacking.legend(fontsize=7.5, loc="upper left")

    cells = heat_map(results)
    if cells:
        heat.imshow(
            [[cells[beta, kl_coef] for kl_coef in HEAT_KLS] for beta in HEAT_BETAS],
            vmin=0,
            vmax=1,
            origin="lower",
            cmap="Blues",
            aspect="auto",
        )
        for (beta, kl_coef), share in cells.items():
            heat.text(
                HEAT_KLS.index(kl_coef),
                HEAT_BETAS.index(beta),
                f"{share:.0%}",
                ha="center",
                va="center",
                color="white" if share > 0.5 else "black",
            )
        heat.set(
            title="Solved within 300k episodes, H = 20",
            xlabel="KL coefficient $\\lambda$",
            ylabel="$\\beta$",
            xticks=range(len(HEAT_KLS)),
            yticks=range(len(HEAT_BETAS)),
            xticklabels=HEAT_KLS,
            yticklabels=HEAT_BETAS,
        )
    for ax, there in ((sweep, 20 in horizons), (hacking, 20 in horizons), (heat, cells)):
        if not there:  # not part of this mode
            ax.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def draw_lock(ax):
    """The detour lock for H = 5."""
    chain, corridor = [(x, 1.0) for x in range(5)], [(x, 0.0) for x in range(1, 4)]
    for name, places, colour in (("g", chain, "#cfe2f3"), ("w", corridor, "#fce5cd")):
        for x, y in places:
            ax.text(x, y, f"${name}_{x}$", ha="center", va="center", bbox=dict(boxstyle="circle", fc=colour))

    def arrow(start, end, text="", where=(0, 0), **style):
        ax.annotate("", end, start, arrowprops=dict(arrowstyle="->", shrinkA=14, shrinkB=14, **style))
        ax.text((start[0] + end[0]) / 2 + where[0], (start[1] + end[1]) / 2 + where[1], text, ha="center", fontsize=9)

    for x in range(4):
        arrow(chain[x], chain[x + 1], "$a^*$", (0, 0.06))
    arrow(chain[4], (5.0, 1.0), "$a^*$: +1", (0.1, 0.06))
    arrow(chain[0], corridor[0], "any\nother", (-0.35, -0.1))
    for (x, _), text in zip(corridor, ("$-c/H$", "$-c/H$", "")):
        arrow((x, 0.0), (x + 1, 1.0), linestyle="dotted")
        if x < 3:
            arrow((x, 0.0), (x + 1, 0.0), text, (0, -0.12))
    ax.text(
        2.2,
        -0.62,
        "dotted: by chance, at a uniformly random layer\nnot drawn: wrong on the chain, or leaving the corridor,\n"
        "ends the episode with 0",
        ha="center",
        fontsize=9,
    )
    ax.set(xlim=(-0.6, 5.2), ylim=(-0.8, 1.5), title="The detour lock, H = 5")
    ax.axis("off")
