"""What a run costs, before it is started: seconds, tokens per second and memory of an update by phase, and of the run.

    python -m tools.bench [--preset P] [settings of drpo.py]     times drpo.drpo_update itself, as PPO and as DR-PO
        --random_weights       the shape of --model (a Pythia size) with random weights: nothing is downloaded
        --micro_batch auto     the largest that fits: on a GPU by trying, on a CPU by the plan
        --lengths FILE         posts of a .jsonl file and the real tokenizer, in place of synthetic rows
        --iterations N         timed updates (3; of --peers 5); figures are medians
        --json FILE            the figures for a program
    python -m tools.bench --plan [settings]     which Pythia fits on which card: arithmetic, no GPU and no model
    python -m tools.bench --peers               an update here against one in the structure of the official code

Synthetic rows have numbers for words and the lengths of real rows (LENGTHS). A random policy ends no response, so each
runs to --response_length: more decoding than a trained policy needs. Seconds are wall-clock. Tokens are those decoded
(rollout), those of query and response (score), and these times epochs (update). GB are what torch allocated at most on a
GPU, and what was resident at most on a CPU (Linux). The rates of matrix products and copies are measured here, not looked
up; MFU is the model's own FLOPs, without padding and without anything computed twice, against that rate of products.
"""

import contextlib
import copy
import dataclasses
import json
import math
import os
import re
import statistics
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GPTNeoXConfig, LogitsProcessorList

import drpo
from tools import data, memory, report, running, token_logprobs

Shape = namedtuple("Shape", "layers width heads vocabulary")  # of a GPT-NeoX, whose MLP is four times as wide
PYTHIA = {
    "14m": Shape(6, 128, 4, 50304),
    "31m": Shape(6, 256, 8, 50304),
    "70m": Shape(6, 512, 8, 50304),
    "160m": Shape(12, 768, 12, 50304),
    "410m": Shape(24, 1024, 16, 50304),
    "1b": Shape(16, 2048, 8, 50304),
    "1.4b": Shape(24, 2048, 16, 50304),
    "2.8b": Shape(32, 2560, 32, 50304),
    "6.9b": Shape(32, 4096, 32, 50432),
    "12b": Shape(36, 5120, 40, 50688),
}
CARDS, BYTES, EOS = (16, 24, 40, 48, 80), {"bfloat16": 2, "float32": 4}, 0  # GB; EOS is Pythia's

# Tokens of a prompt, and of a reference with its EOS, at these quantiles, straight lines between them. tldr: 900 TL;DR posts,
# hh: 2,110 helpful dialogues, under Pythia's tokenizer; tiny: chosen responses of toy_env:gate_pairs, under its own
QUANTILES = [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]
LENGTHS = {
    "tldr": ([158, 196, 270, 350, 430, 495, 512], [16, 26, 28, 33, 38, 46, 50]),
    "hh": ([10, 17, 30, 105, 203, 379, 512], [3, 8, 22, 43, 77, 128, 128]),
    "tiny": ([45, 46, 48, 49, 50, 52, 54], [5, 5, 17, 21, 22, 27, 30]),
}
EPISODES = {"tldr": 116722, "hh": 160800, "tiny": 4000}  # one epoch of the rows that the preset resets to
PEERS = {"14m": 32, "70m": 16}  # Pythia sizes of --peers: episodes


# ----------------------------------------------------------------------------------------------------------------------
# 1. The plan. Networks, adapters, optimizer, gradients and cache are exact. Activations are what autograd keeps of
# transformers' GPT-NeoX with PyTorch's fused attention. The rest, workspaces, is rough.


def activation_bytes(shape, lora_r, rows, query, response, dtype, checkpointing=False, cuda=True):
    """What policy and critic keep for one backward on `rows` rows of query + response tokens.

    By token and layer, in units of width: q, k, the projection that v is a view of and attention's output, 1 + 1 + 3 + 1;
    GELU's input 4; A's input 1, or with lora_r = 0 the inputs of all four matrices, 1 + 1 + 1 + 4; the norms' input 1, of
    which autocast makes two float32 copies on CUDA. Besides: A's output, the softmax's normaliser, the norms'
    means and deviations; under autocast a bfloat16 copy of each trained matrix. In the first layer nothing before A needs a
    gradient; in the last one the MLP has the response only. With checkpointing: the input of every layer, and all this for one
    layer at a time."""
    L, d, e, tokens = shape.layers, shape.width, BYTES[dtype], rows * (query + response)
    autocast, stream = dtype == "bfloat16", e if lora_r else 4  # stream: bytes of a number between the layers
    norms = 8 if autocast and cuda and lora_r else stream
    matrices = 1 if lora_r else 7
    layer = tokens * ((e * (10 + matrices) + norms) * d + e * lora_r + 4 * shape.heads + 4 * e)
    layer += autocast * 2 * (4 * lora_r * d if lora_r else 12 * d * d)
    first = tokens * d * (norms + 4 * e) if lora_r else 0
    last = rows * query * e * d * (4 if lora_r else 9)
    kept = layer + 2 * L * tokens * stream * d if checkpointing else 2 * (L * layer - first - last)
    ends = 2 * tokens * stream * d + 2 * 4 * rows * response * d  # input of the last norms; states and slopes at the head
    return kept + ends + 4 * rows * d * (response + 1)  # at the value head


def plan(shape, lora_r, micro_batch, query, response, dtype="bfloat16", checkpointing=False, cuda=True):
    """-> {what: bytes} for full rows of query + response tokens. "peak" is the larger of "rollout" and "update"."""
    L, d, _, V = shape
    e, tokens, rows = BYTES[dtype], query + response, 4 * micro_batch  # rows that drpo.rollout decodes together
    body = V * d + L * (12 * d * d + 13 * d) + 2 * d  # embedding, layers, last norm
    both, adapters = 2 * body + V * d, 2 * L * 4 * lora_r * d  # only the policy has the head over the vocabulary
    trained = (adapters if lora_r else both) + d + 1  # with the value head
    tensors = (4 * L if lora_r else 24 * L + 7) + 2  # of each AdamW counts the steps
    part = {
        "networks": both * (e if lora_r else 2 * 4) + 2 * 4 * (d + 1),  # lora_r = 0: and the frozen twins
        "adapters": 4 * adapters,
        "optimizer": 8 * trained + 4 * tensors,
        "gradients": 4 * trained,
        "cache": L * d * (e + (e if lora_r else 4)) * rows * (tokens - 1),  # autocast leaves keys that it rotates float32
        "activations": activation_bytes(shape, lora_r, micro_batch, query, response, dtype, checkpointing, cuda),
    }
    standing = part["networks"] + part["adapters"] + part["optimizer"]
    # At prefill also a layer's intermediates, 16 wide; logits, softmax and its sums. In backward the gradients in a layer's
    # MLP, 8 wide, and buffers for logits. In the step AdamW's denominators
    part["rollout"] = standing + part["cache"] + rows * (tokens * 16 * d * e + 4 * 4 * V)
    buffers = (8 + 4 * (dtype == "bfloat16")) * token_logprobs.LOGITS_AT_ONCE
    backward = part["activations"] + micro_batch * tokens * 8 * d * e + buffers
    part["update"] = standing + part["gradients"] + max(backward, part["gradients"])
    return part | {"peak": max(part["rollout"], part["update"])}


def planned(shape, s):
    """The plan of these settings."""
    cuda = s.device.startswith("cuda")
    return plan(shape, s.lora_r, s.micro_batch, s.query_length, s.response_length, s.dtype, s.checkpoint_activations, cuda)


def best_plan(shape, most, s, ranks=(1024, 256, 64, 16), cuda=True):
    """What is worth most of what fits into `most` bytes -> {setting: value} with "peak" in bytes, or None. The first rank, the
    paper's, comes first, then a micro-batch of 4 or more, then no checkpointing, then the size of the micro-batch."""
    for lora_r in ranks:
        for sizes in ((64, 32, 16, 8, 4), (2, 1)):
            for checkpointing in (False, True):
                for size in sizes:
                    peak = plan(shape, lora_r, size, s.query_length, s.response_length, s.dtype, checkpointing, cuda)["peak"]
                    if peak <= most:
                        return {"lora_r": lora_r, "micro_batch": size, "checkpoint_activations": checkpointing, "peak": peak}


def print_plans(s):
    """The best plan of each size on each card. A card sold as 24 GB has 24 GiB: the 7 % between the two are left to CUDA's
    context, to workspaces and to fragmentation."""
    plans = {size: {card: best_plan(PYTHIA[size], card * 1e9, s) for card in CARDS} for size in list(PYTHIA)[3:]}
    print(
        f"LoRA rank x micro-batch (GB at the peak); c: with activation checkpointing; -: none. {s.dtype}, all rows of "
        f"{s.query_length} + {s.response_length} tokens"
    )
    rows = [["Pythia", *(f"{card} GB" for card in CARDS)]]
    for size, row in plans.items():
        cells = [
            f"{p['lora_r']} x {p['micro_batch']}{'c' * p['checkpoint_activations']} ({p['peak'] / 1e9:.0f})" if p else "-"
            for p in row.values()
        ]
        rows.append([size, *cells])
    print(report.table(rows))
    return plans


# ----------------------------------------------------------------------------------------------------------------------
# 2. The roles in memory, and the rows they work on.


def shape_of(name):
    """The Shape that a model's name speaks of, as EleutherAI/pythia-2.8b-deduped does; None where it speaks of none."""
    size = re.search(r"(?:^|[-/])(\d+(?:\.\d+)?[mb])(?:$|-)", name.lower())
    return PYTHIA.get(size[1]) if size else None


def random_network(shape, s, seed):
    """A GPTNeoXForCausalLM of that shape, made on the device, in the type that drpo.load_network would give it."""
    config = GPTNeoXConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    with torch.device(s.device):
        dtype = getattr(torch, s.dtype) if s.lora_r else torch.float32
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def build(s, shape=None):
    """-> (roles, optimizer) as in drpo.train_drpo: of random weights where a shape is given, else of --model, twice."""

    def network(seed):
        return random_network(shape, s, seed) if shape else drpo.load_network(s.model, s, full=not s.lora_r)

    policy, reference = drpo.twin(network(s.seed), s.lora_r, s.seed)
    critic, reward = drpo.twin(network(s.seed + 1).base_model, s.lora_r, s.seed)
    d = policy.get_input_embeddings().embedding_dim
    weight = torch.randn(1, d, generator=drpo.generator(s.seed, "bench head")).to(s.device) / math.sqrt(d + 1)
    reward_head = drpo.scalar_head(weight).requires_grad_(False)
    value_head = copy.deepcopy(reward_head).requires_grad_(True)
    modules = torch.nn.ModuleList([policy, critic, value_head])
    if s.checkpoint_activations:
        memory.checkpoint_layers(modules)
    params = [p for p in modules.parameters() if p.requires_grad]
    return SimpleNamespace(
        policy=policy, reference=reference, critic=critic, value_head=value_head, reward=reward, reward_head=reward_head
    ), torch.optim.AdamW(params, lr=s.lr, eps=1e-5)


def numbers(text, add_special_tokens=True):
    """The tokenizer of synthetic rows: the word for token i is the number i."""
    return {"input_ids": [int(word) for word in text.split()]}


numbers.eos_token_id = EOS


def synthetic_rows(count, vocabulary, lengths, seed):
    """Rows {prompt, reference} of random numbers. lengths: tokens of each at QUANTILES, a reference's with its EOS."""
    rng, columns = drpo.generator(seed, "bench rows"), []
    for values, eos in zip(lengths, (0, 1)):
        sizes = np.interp(torch.rand(count, generator=rng), QUANTILES, values).round().astype(int) - eos
        columns.append([" ".join(map(str, torch.randint(1, vocabulary, (n,), generator=rng).tolist())) for n in sizes])
    return [{"prompt": prompt, "reference": reference} for prompt, reference in zip(*columns)]


def read_posts(path):
    """Rows {prompt, reference} of a .jsonl file in any layout of tools/data.py. Exits with 2 on a line of no layout."""
    rows, number = [], 0
    try:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            row = data.read_row(json.loads(line))
            row = {"prompt": row["prompt"].strip(), "reference": row.get("reference", row.get("chosen")).strip()}
            rows += [row] * all(row.values())
    except (OSError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        drpo.stop(f"--lengths {path}: line {number}: no post with its summary ({type(error).__name__}: {error})")
    return rows or drpo.stop(f"--lengths {path}: has no posts")


# ----------------------------------------------------------------------------------------------------------------------
# 3. What an update costs.


def peak_rss():
    """The most GB that were resident since the last call. Linux knows; elsewhere nan."""
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    peak = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 / 1e9
    Path("/proc/self/clear_refs").write_text("5")  # from here on anew
    return peak


def timed_update(roles, optimizer, rows, update, tokenizer, s):
    """drpo.drpo_update -> its figures, with cpu_PHASE, seconds of all threads, and on a CPU gb_PHASE, resident memory."""
    laps, lap = [], drpo.lap

    def watched(s):
        laps.append((time.process_time(), peak_rss()))
        return lap(s)

    with patch.object(drpo, "lap", watched):
        figures = drpo.drpo_update(roles, optimizer, rows, update, tokenizer, s, f"update {update}")
    for phase, (start, _), (end, gb) in zip(drpo.PHASES, laps, laps[1:]):
        figures = {f"gb_{phase}": gb, f"cpu_{phase}": end - start} | figures
    return figures


def device_rates(s):
    """-> FLOP/s of a square matrix product in the networks' type, and bytes/s, read and written, of a copy: best of 5."""
    cuda = s.device.startswith("cuda")
    a = torch.randn(2, *[8192 if cuda else 1024] * 2, device=s.device).to(getattr(torch, s.dtype))
    x = torch.empty(2, 2 ** (30 if cuda else 27), dtype=torch.uint8, device=s.device)

    def seconds(work):
        began = drpo.lap(s)[0]
        work()
        return drpo.lap(s)[0] - began

    product, copying = [min(seconds(work) for _ in range(5)) for work in (lambda: a[0] @ a[1], lambda: x[1].copy_(x[0]))]
    return 2 * a.shape[1] ** 3 / product, x.nbytes / copying


def model_flops(roles, s, tokens, decoded):
    """FLOPs that one update needs, by phase. tokens (B,): of query and response, row by row; decoded: in all.

    Forward 2 for each weight and token; backward 2 for the input's gradient, and 2 for a trained weight's own. Attention
    4 x width a layer for each token and each before it, backward twice that. The head over the vocabulary: tokens decoded. The
    last layer's MLP is counted for all tokens, as in any model, though those that are decoded suffice."""
    body, head = drpo.body_and_head(roles.policy)
    weights = [p for p in body.parameters() if p.ndim == 2 and p is not body.get_input_embeddings().weight]
    trained, frozen = [sum(p.numel() for p in weights if p.requires_grad is kind) for kind in (True, False)]
    attention = 4 * body.config.num_hidden_layers * body.config.hidden_size * (tokens * (tokens + 1) / 2).sum()
    n, logits = tokens.sum(), 2 * head.weight.numel() * decoded
    forward, backward = 2 * (trained + frozen) * n + attention, (4 * trained + 2 * frozen) * n + 2 * attention
    adapter_off = 2 * (frozen or trained) * n + attention
    return {
        "rollout": forward + logits,
        "score": 2 * (forward + adapter_off + logits),
        "update": s.epochs * (2 * (forward + backward) + logits * (2 + head.weight.requires_grad)),
    }


def decode_bandwidth(roles, rows, tokenizer, s):
    """Bytes/s at which 4 x micro_batch rows decode together: the policy's weights at each step, and keys and values so far.
    The seconds are those of response_length tokens less those of one token, which is prefill."""
    group, T, policy = 4 * s.micro_batch, s.response_length, roles.policy
    queries = [drpo.encode_query(row["prompt"], tokenizer, s.query_length) for row in (rows * group)[:group]]

    def seconds(width):
        began, uniforms = drpo.lap(s)[0], torch.rand(group, width, generator=drpo.generator(s.seed, "bench decode"))
        drpo.rollout(policy, queries, [[]] * group, uniforms, tokenizer, s, s.temperature, stop_at_eos=False)
        return drpo.lap(s)[0] - began

    with torch.no_grad():
        cache = policy(input_ids=torch.ones(1, 1, dtype=torch.long, device=s.device), use_cache=True).past_key_values
    token = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    weights = sum(p.nbytes for p in policy.parameters()) - policy.get_input_embeddings().weight.nbytes
    seconds(T)  # once for the device to warm up
    return (T - 1) * (weights + token * (sum(map(len, queries)) + group * T / 2)) / (seconds(T) - seconds(1))


def doubled(fits, most):
    """The largest of 1, 2, 4 ... rows, at most `most`, for which fits(rows) is true and does not run out of memory."""
    size = 1
    while 2 * size <= most:
        try:
            if not fits(2 * size):
                break
        except torch.OutOfMemoryError:
            break
        size *= 2
    return size


def largest_micro_batch(roles, optimizer, rows, tokenizer, s, shape):
    """On a GPU each is tried, on the longest rows and without resets; on a CPU the plan is held against the free memory."""
    longest = sorted(rows, key=lambda row: -len(row["prompt"]))

    def planned_to_fit(size):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return planned(shape, dataclasses.replace(s, micro_batch=size))["peak"] <= free

    def tried(size):
        one = dataclasses.replace(s, micro_batch=size, batch_size=min(4 * size, s.batch_size), epochs=1, beta=0.0)
        return drpo.drpo_update(roles, optimizer, longest[: one.batch_size], 1, tokenizer, one, f"micro_batch {size}")

    found = doubled(tried if s.device.startswith("cuda") else planned_to_fit, s.batch_size)
    optimizer.zero_grad()  # what a failed try has left
    return found


def bench(s, shape, random_weights, auto, lengths, iterations):
    """Times updates of PPO and of DR-PO and prints what they cost -> all figures."""
    roles, optimizer = build(s, shape if random_weights else None)
    vocabulary = roles.policy.get_input_embeddings().num_embeddings
    if lengths:
        rows, tokenizer = read_posts(lengths), drpo.load_tokenizer(s.tokenizer or s.model, s)
        if len(tokenizer) > vocabulary:
            drpo.stop(f"--tokenizer has {len(tokenizer)} tokens, but --model {s.model} embeds only {vocabulary}")
    else:
        if s.preset not in LENGTHS:
            drpo.stop(
                f"--preset {s.preset}: is not trained on, and its lengths are not known; --lengths FILE takes those of its rows"
            )
        rows = synthetic_rows(iterations * s.batch_size, vocabulary, LENGTHS[s.preset], s.seed)
        tokenizer = numbers
    if auto:
        s = dataclasses.replace(s, micro_batch=largest_micro_batch(roles, optimizer, rows, tokenizer, s, shape))
    timed_update(roles, optimizer, rows, 1, tokenizer, dataclasses.replace(s, batch_size=4, epochs=1))  # to warm up
    matmul, copying = device_rates(s)
    B, updates = s.batch_size, s.updates or max(1, EPISODES.get(s.preset, len(rows)) // s.batch_size)
    drawn = drpo.draw(rows, B, iterations, s.seed, "rl")
    query = np.array([len(drpo.encode_query(row["prompt"], tokenizer, s.query_length)) for row in drawn])
    methods, table = {}, [["", "seconds", "tokens/s", "GB", "MFU"]]
    for name, beta in (("PPO", 0.0), ("DR-PO", s.beta)):
        runs = [
            timed_update(roles, optimizer, rows, update, tokenizer, dataclasses.replace(s, beta=beta))
            for update in range(1, iterations + 1)
        ]
        one = methods[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        tokens = query + one["response_tokens"]
        flops = model_flops(roles, s, tokens, one["tokens_decoded"])
        counts = {"rollout": one["tokens_decoded"], "score": tokens.sum(), "update": s.epochs * tokens.sum()}
        for phase in drpo.PHASES:
            seconds, gb = one[f"seconds_{phase}"], one[f"gb_{phase}"]
            rate, mfu = one[f"tokens_per_second_{phase}"], one[f"mfu_{phase}"] = (
                counts[phase] / seconds,
                flops[phase] / seconds / matmul,
            )
            table.append([f"{name} {phase}", f"{seconds:.2f}", f"{rate:,.0f}", f"{gb:.2f}", f"{mfu:.0%}"])
        one["hours"] = updates * sum(one[f"seconds_{phase}"] for phase in drpo.PHASES) / 3600
        one["gb"] = max(one[f"gb_{phase}"] for phase in drpo.PHASES)
    share = methods["DR-PO"]["tokens_decoded"] / methods["PPO"]["tokens_decoded"]
    decoding = decode_bandwidth(roles, rows, tokenizer, s)
    cuda = s.device.startswith("cuda")
    device = torch.cuda.get_device_name(s.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{s.model}{', random weights' * random_weights}, {s.dtype}, lora_r {s.lora_r}, micro_batch {s.micro_batch}\n"
        f"{device}: {matmul / 1e12:.3g} TFLOP/s in matrix products, {copying / 1e9:.3g} GB/s in copies, measured here\n"
        f"{B} episodes, prompts of {query.mean():.0f} tokens on average; medians of {iterations}\n\n{report.table(table)}\n\n"
        f"decoding: {decoding / 1e9:.3g} GB/s with {4 * s.micro_batch} rows together, {decoding / copying:.0%} of a copy\n"
        f"resets: DR-PO decodes {share:.2f} of the row-steps of PPO"
    )
    for name, one in methods.items():
        print(
            f"the full {name} run: {updates} updates, {updates * B / 1000:.3g}k episodes: "
            f"{one['hours']:.2g} h, {one['gb']:.2g} GB"
        )
    return {
        "settings": dataclasses.asdict(s),
        "random_weights": random_weights,
        "device": device,
        "torch": torch.__version__,
        "matmul_flops": matmul,
        "copy_bytes": copying,
        "decode_bytes": decoding,
        "row_steps_share": share,
        "updates": updates,
        "methods": methods,
    }


def out_of_memory(s, shape):
    """The line to end with: what ran out, and what fits by the plan, at the same LoRA rank if any size does."""
    cuda = s.device.startswith("cuda")
    total = torch.cuda.get_device_properties(s.device).total_memory if cuda else math.inf
    ranks = [s.lora_r, *(r for r in (1024, 256, 64, 16) if r < (s.lora_r or math.inf))]
    most = shape and min(total * 1e9 / 2**30, planned(shape, s)["peak"] - 1)  # as much to spare as in print_plans
    fit = shape and best_plan(shape, most, s, ranks, cuda)
    less = "nothing smaller"
    if fit:
        less = (
            f"--lora_r {fit['lora_r']} --micro_batch {fit['micro_batch']}"
            f"{' --checkpoint_activations' * fit['checkpoint_activations']} ({fit['peak'] / 1e9:.2g} GB)"
        )
    have = f"{total / 1e9:.0f} GB" if cuda else "this machine's memory"
    return f"OOM: --lora_r {s.lora_r} --micro_batch {s.micro_batch} in {have}; by the plan fits {less}"


# ----------------------------------------------------------------------------------------------------------------------
# 4. The structure of the official code, to compare with.


def whole(network, ids, mask):
    """A forward pass as the official code makes it: all positions, and all hidden states kept."""
    return network(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        output_hidden_states=True,
        use_cache=False,
    )


def official_logprobs(policy, ids, mask, T, temperature):
    """log pi of the last T tokens and the entropy, (B, T) each, from all logits and the full log-softmax."""
    logits = whole(policy, ids, mask).logits[:, -T - 1 : -1] / temperature
    logprobs = logits.log_softmax(-1).gather(2, ids[:, -T:, None])[..., 0]
    with torch.no_grad():
        return logprobs, logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def official_rollouts(policy, rows, update, tokenizer, s):
    """Rows and resets as of drpo.reset_rollouts, prompts padded to query_length. transformers' generate decodes
    response_length tokens of every row, and a logits processor forces the prefix.

    -> ids and mask (B, query_length + T), reset_len (B,)."""
    T, Q, rng = s.response_length, s.query_length, drpo.generator(s.seed, "rollout", update)
    episodes = drpo.draw(rows, s.batch_size, update, s.seed, "rl")
    queries = [drpo.encode_query(row["prompt"], tokenizer, Q) for row in episodes]
    references = [drpo.encode_response(row["reference"], tokenizer, T)[:-1] for row in episodes]
    reset_len = drpo.sample_reset_lengths(torch.tensor([len(ids) for ids in references]), s.beta, rng)
    forced = torch.tensor([ids + [EOS] * (T - len(ids)) for ids in references])
    ids = torch.tensor([[EOS] * (Q - len(query)) + query for query in queries])
    mask = torch.arange(Q + T) >= torch.tensor([[Q - len(query)] for query in queries])
    how = GenerationConfig(max_new_tokens=T, do_sample=True, temperature=s.temperature, top_k=0, pad_token_id=EOS)
    done = []
    for at in torch.arange(len(ids)).split(4 * s.micro_batch):

        def force(sequences, scores):
            t = sequences.shape[1] - Q
            only = torch.full_like(scores, -math.inf).scatter(1, forced[at, t, None], 0.0)
            return torch.where(t < reset_len[at, None], only, scores)

        done.append(
            policy.generate(
                input_ids=ids[at],
                attention_mask=mask[at, :Q].long(),
                generation_config=how,
                logits_processor=LogitsProcessorList([force]),
            )
        )
    return torch.cat(done), mask, reset_len


def official_update(roles, optimizer, rows, update, tokenizer, s):
    """One update in the structure of the official code (its drpo.py, lines 720 to 960): every row and token through four
    separate forward passes, then PPO's epochs, in micro-batches of rows as they come. The losses are those of our drpo.py
    on the official masks, so that only the structure differs. -> {cpu_PHASE: seconds of all threads}."""
    policy, critic, B, T, clock = roles.policy, roles.critic, s.batch_size, s.response_length, [time.process_time()]
    ids, mask, reset_len = official_rollouts(policy, rows, update, tokenizer, s)
    clock.append(time.process_time())

    def head_on(head, network, at):
        return head(whole(network, ids[at], mask[at]).hidden_states[-1])[:, -T - 1 :, 0]

    is_eos, (logprobs, ref_logprobs, values), scores = ids[:, -T:] == EOS, torch.zeros(3, B, T), torch.zeros(B)
    end, chunks = torch.where(is_eos, torch.arange(T), T - 1).amin(1), torch.arange(B).split(s.micro_batch)
    _, free, everything = drpo.token_masks(reset_len, end + 1, T, "official")
    with torch.no_grad():
        for at in chunks:
            logprobs[at], _ = official_logprobs(policy, ids[at], mask[at], T, s.temperature)
            values[at] = head_on(roles.value_head, critic, at)[:, :-1]
            with roles.reference() as network:
                ref_logprobs[at], _ = official_logprobs(network, ids[at], mask[at], T, s.temperature)
            with roles.reward() as network:
                scores[at] = head_on(roles.reward_head, network, at)[:, 1:].gather(1, end[at, None])[:, 0]
        rewards = -s.kl_coef * (logprobs - ref_logprobs)
        rewards[torch.arange(B), end] += torch.where(is_eos.any(1), scores, s.missing_eos_score)
        rewards = drpo.masked_whiten(rewards, everything, shift_mean=False)
        advantages, returns = drpo.gae(rewards, values, everything, s.gamma, s.lam)
        advantages = drpo.masked_whiten(advantages, everything)
    clock.append(time.process_time())

    for _ in range(s.epochs):
        for at in chunks:
            new_logprobs, _ = official_logprobs(policy, ids[at], mask[at], T, s.temperature)
            new_values = head_on(roles.value_head, critic, at)[:, :-1]
            pg_loss, _ = drpo.ppo_policy_loss(new_logprobs, logprobs[at], advantages[at], free[at], s.cliprange)
            vf_loss, _ = drpo.ppo_value_loss(new_values, values[at], returns[at], everything[at], s.cliprange_value)
            ((pg_loss + s.vf_coef * vf_loss) * len(at) / B).backward()
        drpo.step(optimizer, s, f"official update {update}", dict)
    clock.append(time.process_time())
    return {f"cpu_{phase}": end - start for phase, start, end in zip(drpo.PHASES, clock, clock[1:])}


SIDES = {"official": official_update, "ours": timed_update}


def peer(size, episodes):
    """What an update of either side is called with, but for its number. Two threads."""
    torch.set_num_threads(2)
    fixed = "--preset=tldr --device=cpu --dtype=float32 --query_length=128 --lora_r=16 --micro_batch=8".split()
    s = drpo.parse(["drpo", *fixed, f"--model={size}", f"--batch_size={episodes}"])[1]
    lengths = [64 + 64 * quantile for quantile in QUANTILES], [s.response_length] * len(QUANTILES)
    roles, optimizer = build(s, PYTHIA[size])
    rows = synthetic_rows(10 * s.batch_size, PYTHIA[size].vocabulary, lengths, s.seed)
    return {"roles": roles, "optimizer": optimizer, "rows": rows, "tokenizer": numbers, "s": s}


def peer_memory(size, episodes, side):
    """The most GB that are resident in a process that makes one update: imports, networks and all."""
    figures = SIDES[side](**peer(size, episodes), update=1)
    return max([peak_rss(), *(figures.get(f"gb_{phase}", 0) for phase in drpo.PHASES)])


def peers(iterations):
    """Whole updates at beta = 1, the two sides in turn; memory, each in a fresh process; row-steps -> all figures."""
    results, table = {}, [["", *SIDES, "ours / official"]]
    names = {"cpu": "CPU s"} | {f"cpu_{phase}": f"CPU s, {phase}" for phase in drpo.PHASES} | {"wall": "wall s"}
    for size, episodes in PEERS.items():
        given, runs = {side: peer(size, episodes) for side in SIDES}, {side: [] for side in SIDES}
        for update in range(1, iterations + 1):
            for side, work in SIDES.items():
                cpu, wall = time.process_time(), time.perf_counter()
                figures = work(**given[side], update=update)
                runs[side].append(figures | {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall})
        ours = {**given["ours"], "s": dataclasses.replace(given["ours"]["s"], beta=0.0)}
        ppo_steps = timed_update(**ours, update=1)["tokens_decoded"]
        one = results[size] = {
            name: [statistics.median(run[key] for run in runs[side]) for side in SIDES] for key, name in names.items()
        }
        del given, ours  # their memory, before others need it
        one["peak GB"] = []
        for side in SIDES:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                one["peak GB"].append(pool.submit(peer_memory, size, episodes, side).result())
        one["row-steps, ours at beta 0 and 1"] = [ppo_steps, statistics.mean(run["tokens_decoded"] for run in runs["ours"])]
        table += [[f"{size} {name}", *(f"{x:.2f}" for x in pair), f"{pair[1] / pair[0]:.2f}"] for name, pair in one.items()]
    print(f"medians of {iterations} updates, in turn, on two threads, in float32\n{report.table(table)}")
    return results


def main(argv=None):
    parser = running.command("bench", __doc__)
    for flag in ("--random_weights", "--plan", "--peers"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--micro_batch")
    parser.add_argument("--lengths", metavar="FILE")
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options, given = parser.parse_known_args(argv)
    if options.iterations is not None and options.iterations < 1:
        drpo.stop(f"--iterations {options.iterations}: must be 1 or more")
    if options.peers and (given or options.plan or options.random_weights or options.lengths or options.micro_batch):
        drpo.stop("--peers takes --iterations and --json only: its settings are fixed")
    auto = options.micro_batch == "auto"
    given += [f"--micro_batch={1 if auto else options.micro_batch}"] * (options.micro_batch is not None)
    s = drpo.parse(["drpo", *["--preset=tldr"] * options.plan, *given])[1]
    shape = shape_of(s.model)
    if (options.random_weights or auto) and not shape:
        drpo.stop(
            f"--model {s.model}: --random_weights and --micro_batch auto need the name of a Pythia size in it: "
            f"{', '.join(PYTHIA)}"
        )
    try:
        if options.json:
            options.json.touch()  # now, not after an hour
    except OSError as error:
        drpo.stop(f"--json {options.json}: {error}")
    try:
        with contextlib.nullcontext() if options.peers else running.precision(s):  # peers have settings of their own
            figures = (
                print_plans(s)
                if options.plan
                else peers(options.iterations or 5)
                if options.peers
                else bench(s, shape, options.random_weights, auto, options.lengths, options.iterations or 3)
            )
    except RuntimeError as error:  # on a CPU it is this type, with these words
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        drpo.stop(out_of_memory(s, shape))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
