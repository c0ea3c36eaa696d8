"""tools/bench.py: the plan against what torch really holds, the official structure against drpo.drpo_update, FLOPs against
torch's own counter, and the command line, all on networks of a few thousand parameters. Nothing here asserts a time."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode

import drpo
from tools import bench, kv_cache, memory

SMALL = bench.Shape(layers=3, width=64, heads=4, vocabulary=300)
LORA, FULL = 8, 0
BOTH_DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
BOTH_RANKS = pytest.mark.parametrize("lora_r", [LORA, FULL])


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Two sizes that cost nothing, on one thread; the other sizes stay what they are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setitem(bench.PYTHIA, "14m", SMALL)
    monkeypatch.setitem(bench.PYTHIA, "70m", SMALL._replace(width=32))
    yield
    monkeypatch.undo()
    torch.set_num_threads(threads)


def settings(**changed):
    flags = (
        dict(
            preset="tldr",
            model="14m",
            device="cpu",
            dtype="float32",
            query_length=12,
            response_length=6,
            batch_size=6,
            micro_batch=3,
            lora_r=LORA,
            epochs=2,
            lr=1e-2,
        )
        | changed
    )
    return drpo.parse(["drpo", *(f"--{name}={value}" for name, value in flags.items())])[1]


def built(s, shape=SMALL, count=40):
    roles, optimizer = bench.build(s, shape)
    rows = bench.synthetic_rows(count, shape.vocabulary, ([3, 4, 6, 8, 10, 12, 12], [6] * 7), seed=0)
    return roles, optimizer, rows, bench.numbers, s


def autocast(s):
    return torch.autocast("cpu", torch.bfloat16, enabled=s.dtype == "bfloat16", cache_enabled=False)


def full_rows(s, rows, shape=SMALL):
    """A batch whose rows all have query_length and response_length tokens, but one that is a token shorter, so that padding
    and its mask are there."""
    rng = torch.Generator().manual_seed(0)
    queries = torch.randint(1, shape.vocabulary, (rows, s.query_length), generator=rng).tolist()
    responses = torch.randint(1, shape.vocabulary, (rows, s.response_length), generator=rng).tolist()
    return drpo.padded([queries[0][1:], *queries[1:]], responses, bench.EOS, "cpu")


def loss(roles, batch):
    """What drpo.drpo_update makes of a micro-batch before it goes backward, less PPO."""
    logprobs, _ = drpo.response_logprobs(roles.policy, batch, 0.7)
    values = drpo.response_values(roles.critic, roles.value_head, batch, drpo.response_mask(batch))
    return logprobs.sum() + (values**2).sum()


def held(tensors):
    """Bytes of tensors, none counted twice."""
    return sum({x.data_ptr(): x.nbytes for x in tensors}.values())


# ----------------------------------------------------------------------------------------------------------------------
# The plan


@BOTH_DTYPES
@BOTH_RANKS
def test_networks_adapters_gradients_and_optimizer_are_planned_to_the_byte(lora_r, dtype):
    s = settings(lora_r=lora_r, dtype=dtype)
    roles, optimizer, *_ = built(s)
    with autocast(s):
        loss(roles, full_rows(s, 2)).backward()
    parameters = [roles.policy, roles.critic, roles.value_head, roles.reward_head]
    with roles.reference() as reference, roles.reward() as reward:
        parameters += [reference, reward]
    parameters = [(name, p) for module in parameters for name, p in module.named_parameters()]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = held(p.grad for p in trained)
    optimizer.step()
    planned = bench.planned(SMALL, s)
    assert held(p for name, p in parameters if "lora_" in name) == planned["adapters"]
    assert held(p for name, p in parameters if "lora_" not in name) == planned["networks"]
    assert gradients == planned["gradients"]
    assert held(x for state in optimizer.state.values() for x in state.values()) == planned["optimizer"]


@BOTH_DTYPES
@BOTH_RANKS
def test_the_cache_of_a_group_of_rollouts_is_planned_to_the_byte(lora_r, dtype):
    s = settings(lora_r=lora_r, dtype=dtype)
    roles, cache = built(s)[0], []
    queries, rows = [[5] * s.query_length] * (4 * s.micro_batch), 4 * s.micro_batch
    with pytest.MonkeyPatch.context() as patch, autocast(s):
        patch.setattr(drpo, "roomy_cache", lambda *given: cache.append(kv_cache.roomy_cache(*given)) or cache[0])
        tokens = SimpleNamespace(eos_token_id=bench.EOS)
        drpo.rollout(roles.policy, queries, [[]] * rows, torch.rand(rows, s.response_length), tokens, s, 1.0, stop_at_eos=False)
    buffers = [x.untyped_storage() for layer in cache[0].layers for x in layer.buffers]
    assert sum(storage.nbytes() for storage in buffers) == bench.planned(SMALL, s)["cache"]


def saved_for_backward(roles, batch, s):
    """Bytes that autograd keeps for the backward of `loss`, without the parameters themselves."""
    own = {
        p.untyped_storage().data_ptr() for module in (roles.policy, roles.critic, roles.value_head) for p in module.parameters()
    }
    kept = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, so that no other takes its place
        return x

    with autocast(s), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss(roles, batch)
    return sum(storage.nbytes() for storage in kept.values())


@BOTH_DTYPES
@BOTH_RANKS
def test_activations_are_planned_within_2_percent(lora_r, dtype):
    s = settings(lora_r=lora_r, dtype=dtype, query_length=90, response_length=30, micro_batch=4)
    measured = saved_for_backward(built(s)[0], full_rows(s, s.micro_batch), s)
    planned = bench.activation_bytes(SMALL, lora_r, 4, 90, 30, dtype, cuda=False)
    assert planned == pytest.approx(measured, rel=0.02)
    assert bench.plan(SMALL, lora_r, 4, 90, 30, dtype, cuda=False)["activations"] == planned


@BOTH_RANKS
def test_with_checkpointing_the_inputs_of_layers_and_one_layer_are_planned(lora_r):
    s = settings(lora_r=lora_r, query_length=90, response_length=30, micro_batch=4)
    roles = built(s)[0]
    one_layer = (
        saved_for_backward(bench.build(s, SMALL._replace(layers=5))[0], full_rows(s, 4), s)
        - saved_for_backward(bench.build(s, SMALL._replace(layers=4))[0], full_rows(s, 4), s)
    ) / 2
    memory.checkpoint_layers(torch.nn.ModuleList([roles.policy, roles.critic]))
    measured = saved_for_backward(roles, full_rows(s, 4), s) + one_layer
    assert bench.activation_bytes(SMALL, lora_r, 4, 90, 30, "float32", checkpointing=True) == pytest.approx(measured, rel=0.04)


def test_pythia_2_8b_at_the_papers_rank_by_hand():
    """Two bfloat16 networks of 2,775,208,960 and 2,646,430,720 parameters, the head over the vocabulary once; 335,544,320
    weights of adapters in each, 16 bytes apiece with gradient and AdamW; two heads of 2,561; 8 bytes of AdamW per weight."""
    part = bench.plan(bench.PYTHIA["2.8b"], 1024, 4, 512, 53)
    assert part["networks"] == 2 * (2775208960 + 2646430720) + 2 * 4 * 2561
    assert part["adapters"] == 4 * 2 * 335544320
    assert part["gradients"] == 4 * (2 * 335544320 + 2561)
    assert part["optimizer"] == 8 * (2 * 335544320 + 2561) + 4 * (4 * 32 + 2)
    assert part["cache"] == 2 * 2 * 32 * 2560 * 16 * 564  # keys and values, 2 bytes, 16 rows


def test_the_table_of_plans_keeps_to_its_cards(capsys, tmp_path):
    bench.main(["--plan", "--json", str(tmp_path / "plan.json")])
    lines, plans = capsys.readouterr().out.splitlines(), json.loads((tmp_path / "plan.json").read_text())
    assert "512 + 53 tokens" in lines[0] and lines[1].split() == "Pythia 16 GB 24 GB 40 GB 48 GB 80 GB".split()
    assert [line.split()[0] for line in lines[2:]] == list(plans) == ["160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b"]
    for size, row in plans.items():
        ranks = [plan["lora_r"] if plan else 0 for plan in row.values()]
        assert ranks == sorted(ranks), "a larger card must not get a smaller rank"
        for card, plan in row.items():
            if plan:
                again = bench.plan(
                    bench.PYTHIA[size],
                    plan["lora_r"],
                    plan["micro_batch"],
                    512,
                    53,
                    checkpointing=plan["checkpoint_activations"],
                )
                assert again["peak"] == plan["peak"] <= int(card) * 1e9


def test_the_best_plan_is_none_where_not_even_the_networks_fit():
    assert bench.best_plan(bench.PYTHIA["12b"], 40e9, settings()) is None


# ----------------------------------------------------------------------------------------------------------------------
# Rows, shapes and sizes


@pytest.mark.parametrize("preset", list(bench.LENGTHS))
def test_synthetic_rows_have_the_quantiles_of_real_ones(preset):
    s = drpo.parse(["drpo", f"--preset={preset}"])[1]
    rows = bench.synthetic_rows(1000, 50304, bench.LENGTHS[preset], seed=0)
    for field, eos, values in zip(("prompt", "reference"), (0, 1), bench.LENGTHS[preset]):
        sizes = torch.tensor([len(bench.numbers(row[field])["input_ids"]) + eos for row in rows]).double()
        found = torch.quantile(sizes, torch.tensor(bench.QUANTILES, dtype=torch.double)).tolist()
        assert found == pytest.approx(values, rel=0.15, abs=2)
        assert max(sizes) <= (s.query_length if field == "prompt" else 128)
    assert rows == bench.synthetic_rows(1000, 50304, bench.LENGTHS[preset], seed=0)
    ids = bench.numbers(rows[0]["prompt"])["input_ids"]
    assert bench.EOS not in ids and max(ids) < 50304


@pytest.mark.parametrize(
    "name, size",
    [
        ("EleutherAI/pythia-2.8b-deduped", "2.8b"),
        ("EleutherAI/pythia-160m", "160m"),
        ("1b", "1b"),
        ("runs/pythia-12B", "12b"),
        ("gpt2", None),
        ("toy_env:tiny_pythia", None),
        ("meta-llama/Llama-3.2-3b", None),
    ],
)
def test_the_shape_is_read_off_the_name(name, size):
    assert bench.shape_of(name) == bench.PYTHIA.get(size)


def test_the_micro_batch_doubles_until_it_does_not_fit_or_memory_runs_out():
    tried = []

    def fits(size, limit=None, refuse=False):
        tried.append(size)
        if limit and size > limit and not refuse:
            raise torch.OutOfMemoryError
        return not (limit and size > limit)

    assert bench.doubled(lambda size: fits(size, 9), 512) == 8 and tried == [2, 4, 8, 16]
    assert bench.doubled(lambda size: fits(size, 9, refuse=True), 512) == 8
    assert bench.doubled(lambda size: fits(size, 1), 512) == 1
    assert bench.doubled(fits, 48) == 32


def test_on_a_gpu_the_largest_micro_batch_is_tried_on_the_longest_rows(monkeypatch):
    roles, optimizer, rows, tokenizer, s = built(settings(batch_size=32))
    tried = []

    def update(roles, optimizer, rows, update, tokenizer, s, where):
        tried.append((s.micro_batch, s.beta, sorted(len(row["prompt"].split()) for row in rows)))
        if s.micro_batch > 4:
            raise torch.OutOfMemoryError
        return {"score": 0.0}

    monkeypatch.setattr(drpo, "drpo_update", update)
    on_gpu = SimpleNamespace(**vars(s) | {"device": "cuda"})
    monkeypatch.setattr(dataclasses, "replace", lambda s, **changed: SimpleNamespace(**vars(s) | changed))
    assert bench.largest_micro_batch(roles, optimizer, rows, tokenizer, on_gpu, SMALL) == 4
    assert [size for size, _, _ in tried] == [2, 4, 8] and {beta for _, beta, _ in tried} == {0.0}
    lengths = sorted(len(row["prompt"].split()) for row in rows)
    assert tried[0][2][-4:] == lengths[-4:]


# ----------------------------------------------------------------------------------------------------------------------
# FLOPs


@BOTH_RANKS
def test_flops_of_a_forward_and_a_backward_pass_are_those_that_torch_counts(lora_r):
    """torch counts attention to every position, and bench to those before it: (n + 1) / 2 of n. In the first layer of a network
    with adapters torch leaves out gradients that nothing needs: of the input of query_key_value and of A, and attention's."""
    s, n = settings(lora_r=lora_r, epochs=1), 10
    roles = built(s)[0]
    body, head = drpo.body_and_head(roles.policy)
    body.config._attn_implementation = "eager"
    L, d, V = SMALL.layers, SMALL.width, SMALL.vocabulary
    with FlopCounterMode(display=False) as counter:
        states = body(torch.ones(1, n, dtype=torch.long)).last_hidden_state
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        states.sum().backward()
    backward = counter.get_total_flops()
    saved = 4 * L * d * (n * n - n * (n + 1) / 2)  # by looking back only
    flops = bench.model_flops(roles, s, torch.tensor([n]), 0)
    assert flops["rollout"] == forward - saved
    unneeded = 2 * n * (3 * d * d + LORA * d + 8 * d * d) if lora_r else 0  # query_key_value, A; the MLP, left of it too
    assert flops["update"] == 2 * (forward + backward - 3 * saved + unneeded)
    with_head = bench.model_flops(roles, s, torch.tensor([n]), 5)
    assert with_head["rollout"] - flops["rollout"] == 2 * 5 * d * V
    assert with_head["score"] - flops["score"] == 2 * 2 * 5 * d * V  # policy and reference
    assert with_head["update"] - flops["update"] == (2 if lora_r else 3) * 2 * 5 * d * V


# ----------------------------------------------------------------------------------------------------------------------
# The official structure


def test_the_official_rollouts_start_with_the_same_prefixes_and_never_stop():
    roles, _, rows, tokenizer, s = built(settings(batch_size=12, micro_batch=1))
    ids, mask, reset_len = bench.official_rollouts(roles.policy, rows, 1, tokenizer, s)
    ours = drpo.reset_rollouts(roles.policy, rows, 1, tokenizer, s)
    assert ids.shape == mask.shape == (12, s.query_length + s.response_length)
    assert torch.equal(reset_len, ours["reset_len"]) and reset_len.min() >= 1 and reset_len.max() <= 5
    assert len(set(reset_len.tolist())) > 2
    for i, row in enumerate(drpo.draw(rows, 12, 1, s.seed, "rl")):
        query, reference = [bench.numbers(row[field])["input_ids"] for field in ("prompt", "reference")]
        assert ids[i, : s.query_length][mask[i, : s.query_length]].tolist() == query
        assert ids[i, s.query_length :][: reset_len[i]].tolist() == reference[: reset_len[i]]


def test_official_log_probabilities_and_entropies_are_ours():
    roles, _, rows, tokenizer, s = built(settings(batch_size=12))
    ids, mask, _ = bench.official_rollouts(roles.policy, rows, 1, tokenizer, s)
    T, Q = s.response_length, s.query_length
    batch = {"query": ids[:, :Q], "query_mask": mask[:, :Q], "response": ids[:, Q:], "row_len": mask.sum(1)}
    batch["response_len"] = torch.full((12,), T)
    with torch.no_grad():
        theirs, ours = (
            bench.official_logprobs(roles.policy, ids, mask, T, 0.7),
            drpo.response_logprobs(roles.policy, batch, 0.7),
        )
    assert theirs[0].std() > 1e-3
    for a, b in zip(theirs, ours):
        assert torch.allclose(a, b, atol=1e-5)


@BOTH_RANKS
def test_an_official_update_on_the_same_tokens_is_ours_with_the_official_masks(lora_r, monkeypatch):
    """With all rows in one micro-batch, where means of micro-batch means are means. Some rows end early, some never."""
    s = settings(lora_r=lora_r, masking="official", micro_batch=6)
    roles, ours, rows, tokenizer, _ = built(s)
    batch = drpo.reset_rollouts(roles.policy, rows, 1, tokenizer, s)
    batch["response"][1, 4] = batch["response"][2, 5] = batch["response"][4, 3] = bench.EOS
    batch["response_len"], batch["has_eos"] = torch.tensor([6, 5, 6, 6, 4, 6]), torch.tensor([0, 1, 1, 0, 1, 0]).bool()
    batch["reset_len"] = batch["reset_len"].clamp(max=2)
    monkeypatch.setattr(drpo, "reset_rollouts", lambda *_: batch)
    drpo.drpo_update(roles, ours, rows, 1, tokenizer, s, "ours")

    roles, theirs, *_ = built(s)
    ids = torch.cat([batch["query"], batch["response"]], 1)
    mask = torch.cat([batch["query_mask"], torch.ones(6, s.response_length, dtype=torch.bool)], 1)
    monkeypatch.setattr(bench, "official_rollouts", lambda *_: (ids, mask, batch["reset_len"]))
    bench.official_update(roles, theirs, rows, 1, tokenizer, s)

    pairs = [
        (ours.state[a]["exp_avg"], theirs.state[b]["exp_avg"])  # means of the gradients of both epochs
        for a, b in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"])
    ]
    assert max(a.abs().max() for a, _ in pairs) > 1e-3
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in pairs)


def test_peers_tables_both_sides_and_the_row_steps_that_resets_save(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # two, for tensors this small, only wait
    monkeypatch.setattr(bench, "PEERS", {"14m": 6})
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    bench.main(["--peers", "--iterations", "1", "--json", str(tmp_path / "p.json")])
    out, [(size, figures)] = capsys.readouterr().out, json.loads((tmp_path / "p.json").read_text()).items()
    assert len(figures) == 7 and figures["CPU s"] == pytest.approx(
        [sum(figures[f"CPU s, {phase}"][i] for phase in drpo.PHASES) for i in (0, 1)], rel=0.2, abs=0.1
    )
    for name, (first, second) in figures.items():
        assert (
            re.search(rf"^{size} {name} +{first:.2f} +{second:.2f} +{second / first:.2f}$", out, re.M)
            and min(first, second) > 0
        )
    at_0, at_1 = figures["row-steps, ours at beta 0 and 1"]
    assert 0.8 * 6 * 53 < at_0 <= 6 * 53 and at_1 < 0.75 * at_0  # 1 to 52 of 53 tokens are reset to


# ----------------------------------------------------------------------------------------------------------------------
# The command line

RUN = (
    "--preset tldr --model 14m --random_weights --device cpu --dtype float32 --query_length 40 "
    "--response_length 20 --batch_size 12 --micro_batch 2 --lora_r 4 --epochs 1"
).split()


def test_a_bench_prints_what_its_json_says(capsys, tmp_path):
    bench.main([*RUN, "--iterations", "2", "--json", str(tmp_path / "b.json")])
    out, figures = capsys.readouterr().out, json.loads((tmp_path / "b.json").read_text())
    assert "14m, random weights, float32, lora_r 4, micro_batch 2" in out and "measured here" in out
    assert figures["updates"] == 116722 // 12
    share = figures["methods"]["DR-PO"]["tokens_decoded"] / figures["methods"]["PPO"]["tokens_decoded"]
    assert figures["row_steps_share"] == share < 0.8 and f"DR-PO decodes {share:.2f} of the row-steps of PPO" in out
    assert figures["methods"]["PPO"]["tokens_decoded"] == pytest.approx(12 * 20, abs=15)
    assert figures["methods"]["PPO"]["reset_share"] == 0 and figures["methods"]["DR-PO"]["reset_share"] == 1
    for name, one in figures["methods"].items():
        seconds = sum(one[f"seconds_{phase}"] for phase in drpo.PHASES)
        assert one["hours"] == pytest.approx(9726 * seconds / 3600)
        assert f"the full {name} run: 9726 updates, 117k episodes: {one['hours']:.2g} h, {one['gb']:.2g} GB" in out
        for phase in drpo.PHASES:
            row = re.search(rf"^{name} {phase} +([\d.]+) +([\d,]+) +([\d.]+) +([\d.]+)%$", out, re.M)
            assert float(row[1]) == pytest.approx(one[f"seconds_{phase}"], abs=0.006)
            assert int(row[2].replace(",", "")) == pytest.approx(one[f"tokens_per_second_{phase}"], abs=1)
            assert one[f"gb_{phase}"] > 0 and one[f"cpu_{phase}"] > 0


def test_automatic_micro_batches_on_a_cpu_are_those_whose_plan_fits_the_free_memory(capsys, monkeypatch):
    s = settings(query_length=40, response_length=20, lora_r=4, micro_batch=4)
    free = bench.planned(SMALL, s)["peak"]
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else free)
    monkeypatch.setattr(bench, "device_rates", lambda s: (1e9, 1e9))  # not asked for here, and slow
    bench.main([*RUN, "--micro_batch", "auto", "--iterations", "1"])
    assert "micro_batch 4\n" in capsys.readouterr().out


def test_real_posts_take_the_real_tokenizer(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "device_rates", lambda s: (1e9, 1e9))
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "[UNK]": 1, "a": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    posts = [{"prompt": "a " * (5 + i), "completion": " a b a b"} for i in range(11)]
    posts += [{"subreddit": "a", "title": "a", "post": "b", "summary": "c"}]
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts))
    bench.main(
        [*RUN, "--iterations", "1", "--lengths", str(tmp_path / "posts.jsonl"), "--tokenizer", str(tmp_path / "tokenizer.json")]
    )
    lengths = [*range(5, 16), 7]  # SUBREDDIT: r/a TITLE: a POST: b TL;DR:
    assert f"prompts of {sum(lengths) / 12:.0f} tokens on average" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--iterations 0", "--iterations 0: must be 1 or more"),
        ("--iterations many", "invalid int value"),
        ("--micro_batch few", "invalid int value"),
        ("--micro_batch 0", "--micro_batch 0: must be 1 or more"),
        ("--no_such_flag", "--no_such_flag"),
        ("--random_weights --model gpt2", "--model gpt2"),
        ("--micro_batch auto --model toy_env:tiny_pythia", "--model toy_env:tiny_pythia"),
        ("--json no/such/folder/b.json", "--json no/such/folder/b.json"),
        ("--random_weights --model 14m --lengths no.jsonl", "--lengths no.jsonl"),
        ("--peers --batch_size 4", "--peers takes --iterations and --json only"),
        ("--model ./no/such/folder", "./no/such/folder: no such file or folder"),
        ("--device cuda:99", "--device cuda:99"),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(flags.split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("line", ["not json", '{"a": 1}', '{"prompt": 3, "reference": "b"}', "[]"])
def test_a_post_that_is_none_is_named_by_its_line(line, capsys, tmp_path):
    (tmp_path / "posts.jsonl").write_text('{"prompt": "a", "reference": "b"}\n' + line)
    with pytest.raises(SystemExit) as end:
        bench.read_posts(tmp_path / "posts.jsonl")
    error = capsys.readouterr().err
    assert end.value.code == 2 and "posts.jsonl: line 2: " in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
@pytest.mark.parametrize("size", [1, 8])
def test_out_of_memory_is_called_that_with_a_plan_that_needs_less(capsys, monkeypatch, error, size):
    def update(*_):
        raise error

    monkeypatch.setattr(drpo, "drpo_update", update)
    with pytest.raises(SystemExit) as end:
        bench.main([*RUN, "--lora_r", "64", "--micro_batch", str(size)])
    line = capsys.readouterr().err
    found = re.search(
        rf"OOM: --lora_r 64 --micro_batch {size} in this machine's memory; by the plan fits --lora_r (\d+) "
        r"--micro_batch (\d+)( --checkpoint_activations)? \(0\.",
        line,
    )
    assert end.value.code == 2 and line.count("\n") == 1
    rank, smaller, checkpointing = int(found[1]), int(found[2]), bool(found[3])
    asked = bench.plan(SMALL, 64, size, 40, 20, "float32", cuda=False)["peak"]
    fits = bench.plan(SMALL, rank, smaller, 40, 20, "float32", checkpointing, cuda=False)["peak"]
    assert fits < asked and rank == 64


def test_another_error_is_not_called_out_of_memory(monkeypatch):
    def update(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(drpo, "drpo_update", update)
    with pytest.raises(RuntimeError, match="shapes"):
        bench.main(RUN)


def test_the_table_of_plans_is_printed_where_there_is_no_datasets():
    code = "import runpy, sys; sys.modules['datasets'] = None; runpy.run_module('tools.bench', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, "--plan"], capture_output=True, text=True, cwd=Path(drpo.__file__).parent
    )
    assert done.returncode == 0 and done.stdout.count("GB") > 5, done.stderr
