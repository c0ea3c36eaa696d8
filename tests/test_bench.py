"""tools/bench.py on tiny networks: the plan against what torch holds, the official structure against drpo.drpo_update, FLOPs
against torch's counter, --check with planted mistakes. Nothing here asserts a time."""

import contextlib
import json
import math
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from unittest.mock import Mock, patch

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import drpo
from tools import bench

SMALL = bench.Shape(layers=3, width=64, heads=4, vocabulary=300)
KINDS = pytest.mark.parametrize("lora_r, dtype", [(8, "float32"), (8, "bfloat16"), (0, "float32"), (0, "bfloat16")])
TLDR = "drpo --preset=tldr --model=14m --device=cpu --query_length=90 --response_length=30 --batch_size=16".split()
SHORT = "--dtype=float32 --query_length=12 --response_length=6 --batch_size=6 --micro_batch=6 --epochs=2 --lr=1e-2".split()
RUN = ["--random_weights", *TLDR[2:], *SHORT, "--lora_r=4", "--iterations=2"]


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    monkeypatch.setitem(bench.PYTHIA, "14m", SMALL)


def settings(*flags, **changed):
    return drpo.parse([*TLDR, "--micro_batch=4", *flags, *(f"--{name}={value}" for name, value in changed.items())])[1]


def held(tensors):  # bytes of tensors, none counted twice
    return sum({x.data_ptr(): x.nbytes for x in tensors}.values())


# ---- The plan ----------------------------------------------------------------------------------------------
@KINDS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_an_update_is_near_its_plan(lora_r, dtype, checkpointing):
    s = settings(lora_r=lora_r, dtype=dtype, checkpoint_activations=checkpointing, batch_size=4, epochs=1, beta=0.0)
    roles, optimizer = bench.build(s, SMALL)
    rows = bench.synthetic_rows(8, 300, ([90] * 7, [30] * 7), seed=0)
    with drpo.precision(s):
        drpo.drpo_update(roles, optimizer, rows, 1, bench.numbers, s, "makes the optimizer's state")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            drpo.drpo_update(roles, optimizer, rows, 2, bench.numbers, s, "seen")
    events = sorted((e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]")
    params = [p for module in vars(roles).values() for p in module.parameters()]
    standing = held([*params, *(x for state in optimizer.state.values() for x in state.values())])
    assert 0.65 < (standing + max(accumulate(size for _, size in events))) / bench.peak(SMALL, s) < 1


def test_plans_keep_to_their_cards(capsys, tmp_path):
    bench.main(["--plan", "--preset", "cnndm"])  # no lengths of its rows are known, and none are needed
    assert "1919 + 64 tokens" in capsys.readouterr().out
    bench.main(["--plan", "--json", str(tmp_path / "plan.json")])
    lines, plans = capsys.readouterr().out.splitlines(), json.loads((tmp_path / "plan.json").read_text())
    assert [line.split()[0] for line in lines[2:]] == list(plans) == ["160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b"]
    for row in plans.values():
        ranks = [best["lora_r"] if best else 0 for best in row.values()]
        assert ranks == sorted(ranks), "a larger card must not get a smaller rank"
        assert all(best is None or best["peak"] <= int(card) * 1e9 for card, best in row.items())


# ---- Rows, shapes, FLOPs -----------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", list(bench.LENGTHS))
def test_synthetic_rows_have_the_quantiles_of_real_ones(preset):
    rows = bench.synthetic_rows(1000, 50304, bench.LENGTHS[preset], seed=0)
    for field, eos, values in zip(("prompt", "reference"), (0, 1), bench.LENGTHS[preset]):
        ids = [bench.numbers(row[field])["input_ids"] for row in rows]
        sizes = torch.tensor([len(one) + eos for one in ids]).double()
        found = torch.quantile(sizes, torch.tensor(bench.QUANTILES, dtype=torch.double)).tolist()
        assert found == pytest.approx(values, rel=0.15, abs=2)
        assert min(map(min, ids)) > bench.EOS and max(map(max, ids)) < 50304


def test_the_shape_is_read_off_the_name():
    names = ["EleutherAI/pythia-2.8b-deduped", "pythia-160m", "1b", "runs/pythia-12B"]
    assert [bench.shape_of(name) for name in names] == [*map(bench.PYTHIA.get, ("2.8b", "160m", "1b", "12b"))]
    assert not any(map(bench.shape_of, ("gpt2", "toy_text:tiny_pythia", "x-3.2b", "meta-llama/Llama-3.2-1B", "pythia-3b")))


@pytest.mark.parametrize("lora_r", [8, 0])
def test_flops_are_those_that_torch_counts(lora_r):
    """torch counts attention to every position, bench to those before it: (n + 1) / 2 of n. In the first layer torch leaves out
    gradients that no adapter needs: of the input of query_key_value and of A, and attention's."""
    s, n, (L, d, _, V) = settings(lora_r=lora_r, epochs=1, dtype="float32"), 10, SMALL
    roles = bench.build(s, SMALL)[0]
    body, head = drpo.body_and_head(roles.policy)
    body.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as forward:
        states = body(torch.ones(1, n, dtype=torch.long)).last_hidden_state
    with FlopCounterMode(display=False) as backward:
        states.sum().backward()
    saved = 4 * L * d * (n * n - n * (n + 1) / 2)  # by looking back only
    unneeded = 2 * n * (3 * d * d + lora_r * d + 8 * d * d) if lora_r else 0  # query_key_value, A; the MLP, left of it too
    flops, with_head = [bench.model_flops(roles, s, torch.tensor([n]), decoded) for decoded in (0, 5)]
    assert flops["rollout"] == forward.get_total_flops() - saved
    assert flops["update"] == 2 * (forward.get_total_flops() + backward.get_total_flops() - 3 * saved + unneeded)
    assert with_head["score"] - flops["score"] == 2 * 2 * 5 * d * V  # policy and reference
    assert with_head["update"] - flops["update"] == (2 if lora_r else 3) * 2 * 5 * d * V


# ---- The official structure --------------------------------------------------------------------------------
def official(**changed):
    s = settings(*SHORT, **{"lora_r": 8} | changed)
    return *bench.build(s, SMALL), bench.synthetic_rows(40, 300, ([3, 4, 6, 8, 10, 12, 12], [6] * 7), seed=0), bench.numbers, s


def test_official_rollouts_start_with_the_same_prefixes():
    roles, _, rows, tokenizer, s = official(batch_size=12, micro_batch=1)
    ids, mask, reset_len = bench.official_rollouts(roles.policy, rows, 1, tokenizer, s)
    ours = drpo.reset_rollouts(roles, rows, 1, tokenizer, s)
    assert ids.shape == mask.shape == (12, 18)
    assert torch.equal(reset_len, ours["reset_len"]) and len(set(reset_len.tolist())) > 2
    for i, row in enumerate(drpo.draw(rows, 12, 1, s.seed, "rl")):
        query, reference = [bench.numbers(row[field])["input_ids"] for field in ("prompt", "reference")]
        assert ids[i, :12][mask[i, :12]].tolist() == query
        assert ids[i, 12:][: reset_len[i]].tolist() == reference[: reset_len[i]]


@pytest.mark.parametrize("lora_r", [8, 0])
def test_an_official_update_is_ours_where_the_masks_agree(lora_r, monkeypatch):
    """They do without resets and early ends; means of micro-batch means are means with one. Three of six rows end with EOS."""
    roles, ours, rows, tokenizer, s = official(lora_r=lora_r, beta=0.0)
    ids, mask, reset_len = bench.official_rollouts(roles.policy, rows, 1, tokenizer, s)
    ids[:, 12:], ids[:3, -1] = ids[:, 12:].clamp(min=1), bench.EOS
    queries = [row[m].tolist() for row, m in zip(ids[:, :12], mask[:, :12])]
    batch = drpo.collate(queries, ids[:, 12:].tolist(), 6, "cpu") | {"reset_len": reset_len, "has_eos": ids[:, -1] == bench.EOS}
    monkeypatch.setattr(drpo, "reset_rollouts", lambda *_: batch)
    monkeypatch.setattr(bench, "official_rollouts", lambda *_: (ids, mask, reset_len))
    drpo.drpo_update(roles, ours, rows, 1, tokenizer, s, "ours")
    roles, theirs, *_ = official(lora_r=lora_r, beta=0.0)
    bench.official_update(roles, theirs, rows, 1, tokenizer, s)
    gradients = [[o.state[p]["exp_avg"] for p in o.param_groups[0]["params"]] for o in (ours, theirs)]  # means of both epochs
    assert max(x.abs().max() for x in gradients[0]) > 1e-3
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(*gradients))


def test_official_masks_hide_the_prefix_from_the_policy_only(monkeypatch):
    roles, optimizer, rows, tokenizer, s = official(epochs=1)
    losses = {name: Mock(wraps=getattr(drpo, name)) for name in ("ppo_policy_loss", "ppo_value_loss")}
    for name, function in losses.items():
        monkeypatch.setattr(drpo, name, function)
    bench.official_update(roles, optimizer, rows, 1, tokenizer, s)
    free, everything = [function.call_args.args[3] for function in losses.values()]
    reset_len = drpo.reset_rollouts(roles, rows, 1, tokenizer, s)["reset_len"]
    assert torch.equal((~free).sum(1), reset_len) and free[:, -1].all() and everything.all()


def test_peers_tables_both_sides_and_the_row_steps(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # two, for tensors this small, only wait
    monkeypatch.setattr(bench, "PEERS", {"14m": 6})
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    bench.main(["--peers", "--iterations", "1", "--json", str(tmp_path / "p.json")])
    out, figures = capsys.readouterr().out, json.loads((tmp_path / "p.json").read_text())["14m"]
    for name, (a, b) in figures.items():
        assert re.search(rf"^14m {name} +{a:.2f} +{b:.2f} +{b / a:.2f}$", out, re.M) and min(a, b) > 0
    at_0, at_1 = figures["row-steps, ours at beta 0 and 1"]
    assert 0.8 * 6 * 53 < at_0 <= 6 * 53 and at_1 < 0.75 * at_0  # 1 to 52 of 53 tokens are reset to


# ---- --check -----------------------------------------------------------------------------------------------
@pytest.fixture
def checked(monkeypatch, tmp_path):
    """checked() -> the figures of a --check with few rows, updates and tokens, and without the timing at its end."""
    flags = "--preset=tiny --sft_steps=2 --rm_steps=1 --updates=2 --batch_size=8 --dpo_batch_size=4 --eval_samples=2"
    load_rows = drpo.load_rows
    monkeypatch.setattr(drpo, "load_rows", lambda *given: tuple(rows[:24] for rows in load_rows(*given)))
    monkeypatch.setattr(bench, "SHORT", [*flags.split(), "--response_length=8", "--micro_batch=4"])
    monkeypatch.setattr(bench, "bench", lambda *_: "timed")

    def check():
        with contextlib.suppress(SystemExit):
            bench.main([*RUN, "--check", "--json", str(tmp_path / "c.json")])
        return json.loads((tmp_path / "c.json").read_text() or "null")

    return check


def test_a_cpu_agrees_with_itself_and_resumes_exactly(checked):
    figures = checked()
    found = {f"{x['part']} {x['what']}": x["found"] for x in figures["check"]}
    assert len(found) == 17 and all(x["ok"] for x in figures["check"]) and figures["bench"] == "timed"
    assert not any(x for name, x in found.items() if "plain" not in name)
    assert found["float32 cache, plain pass: CDF"] < 1e-5 and "stopped after 1 of 2" in figures["check"][-1]["more"]


def test_a_stage_that_fails_is_a_failed_check(checked, monkeypatch):
    monkeypatch.setattr(drpo, "bradley_terry_loss", lambda a, b: a.mean() * math.nan)
    figures = checked()
    assert "not finite" in figures["check"][1]["error"] and not figures["check"][1]["ok"] and figures["bench"] == "timed"


def test_ctrl_c_ends_a_check(checked, monkeypatch):
    train, began = drpo.train_sft, []

    def interrupted(s):
        began.append(s)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may have been started without it
        with patch.object(drpo, "step", lambda *_: signal.raise_signal(signal.SIGINT) or 0.0):
            train(s)

    monkeypatch.setitem(drpo.STAGES, "sft", interrupted)
    assert checked() is None and len(began) == 1


def test_a_cache_that_forgets_is_found(monkeypatch):
    s, right = settings(dtype="float32"), drpo.next_states
    policy, queries = bench.build(s, SMALL)[0].policy, [[5, 6, 7], [8] * 20]
    assert all(x["found"] < 1e-4 for x in bench.cached_against_plain(policy, queries, s))
    monkeypatch.setattr(drpo, "next_states", lambda body, tokens, mask, cache: right(body, tokens, mask | True, cache))
    assert all(x["found"] > x["limit"] for x in bench.cached_against_plain(policy, queries, s))


def test_the_farthest_figure_by_hand():
    a, b = {"loss": 2.0, "entropy": 0.01, "ratio": 1.0, "kl": 9.0}, {"loss": 1.9, "entropy": 0.03, "ratio": 1.0, "kl": 9.0}
    assert bench.farthest(a, b, "bfloat16") == (pytest.approx(0.05), "loss")  # of 2
    assert bench.farthest(a, b, "float32") == (pytest.approx(0.2), "entropy")  # of the floor, 0.1
    assert bench.farthest(a, b | {"ratio": math.nan}, "bfloat16")[1] == "ratio"


# ---- The command line --------------------------------------------------------------------------------------
def test_a_bench_prints_what_its_json_says(capsys, tmp_path):
    bench.main([*RUN, "--json", str(tmp_path / "b.json")])
    out, figures = capsys.readouterr().out, json.loads((tmp_path / "b.json").read_text())
    ppo, ours = figures["methods"].values()
    assert "14m, random weights, float32, lora_r 4, micro_batch 6" in out and figures["updates"] == 116722 // 6
    assert ours["tokens_decoded"] / ppo["tokens_decoded"] == figures["row_steps_share"] < 0.9
    assert (ppo["reset_share"], ours["reset_share"]) == (0, 1)
    for name, one in figures["methods"].items():
        assert one["hours"] == pytest.approx(19453 * sum(one[f"seconds_{phase}"] for phase in bench.PHASES) / 3600)
        assert f"the full {name} run: 19453 updates, 117k episodes: {one['hours']:.3g} h, {one['gb']:.3g} GB" in out
        for phase in bench.PHASES:
            row = re.search(rf"^{name} {phase} +([\d.]+) +([\d,]+) +([\d.]+) +([\d.]+)%$", out, re.M)
            assert float(row[1]) == pytest.approx(one[f"seconds_{phase}"], abs=0.006) and one[f"gb_{phase}"] > 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("CPU: can't allocate memory")])
def test_out_of_memory_comes_with_a_plan_that_needs_less(one_line, monkeypatch, error):
    monkeypatch.setattr(drpo, "drpo_update", Mock(side_effect=error))
    monkeypatch.setattr(bench, "device_rates", lambda s: (1e9, 1e9))  # slow, and not what this is about
    line = one_line([*RUN, "--lora_r", "64"], main=bench.main)
    found = re.search(r"OOM: --lora_r 64 --micro_batch 6 in this machine's memory; by the plan fits (--.*) \(0\.", line)
    asked, fits = [settings(*RUN[2:-1], *flags) for flags in (["--lora_r=64"], found[1].split())]
    assert fits.lora_r == 64
    assert bench.peak(SMALL, fits) < bench.peak(SMALL, asked)
