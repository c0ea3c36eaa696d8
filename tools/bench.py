"""What a run costs, before it starts: seconds, tokens per second, memory and MFU of an update by phase, and of the whole run.

    python -m tools.bench [--preset tldr] [--model M] [settings of drpo.py]     times drpo.drpo_update, as PPO and as DR-PO
        --random_weights     the shape of --model (a Pythia size) with random weights: nothing is downloaded
        --lengths FILE       prompts and references of a file and the real tokenizer, instead of synthetic rows
        --iterations N       timed updates of each method (3; --check 1, --peers 5); figures are medians
        --json FILE          the same figures for a program
    python -m tools.bench --check [settings]    is this device fit for a long run? Minutes. Stages of the tiny preset on the CPU
        and on --device, one of them stopped and resumed; rollouts with a cache against plain passes; updates of --model's shape
    python -m tools.bench --plan [settings]     which Pythia fits on which card: arithmetic, no GPU and no model
    python -m tools.bench --peers               an update here against one in the structure of the official code

Synthetic rows have numbers for words and the lengths of real rows. With random weights no response ends, the worst case.
Seconds are wall-clock, the device synchronised between phases. Tokens: decoded (rollout), of query and response (score), and
these times epochs (update). GB: the most that torch allocated in a phase; on a CPU what was resident in the update (Linux).
MFU: FLOPs of the model, without padding and recomputation, over a measured matrix product's. The full run is one epoch.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import re
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, GPTNeoXConfig, LogitsProcessorList

import drpo
from tools import experiment
from tools.report import table

Shape = namedtuple("Shape", "layers width heads vocabulary")  # of a GPT-NeoX, whose MLP is four times as wide
PYTHIA = {
    "14m": Shape(6, 128, 4, 50304), "31m": Shape(6, 256, 8, 50304), "70m": Shape(6, 512, 8, 50304),
    "160m": Shape(12, 768, 12, 50304), "410m": Shape(24, 1024, 16, 50304), "1b": Shape(16, 2048, 8, 50304),
    "1.4b": Shape(24, 2048, 16, 50304), "2.8b": Shape(32, 2560, 32, 50304), "6.9b": Shape(32, 4096, 32, 50432),
    "12b": Shape(36, 5120, 40, 50688),
}  # fmt: skip
PHASES, GROUP, EOS = ("rollout", "score", "update"), 8, 0  # GROUP: micro-batches that drpo.rollout decodes together
CARDS, BYTES = (16, 24, 40, 48, 80), {"bfloat16": 2, "float32": 4}  # GB

# Tokens of a prompt, and of a reference with its EOS, at these quantiles, linear between them. tldr: 900 TL;DR posts,
# hh: 2,110 helpful dialogues, under Pythia's tokenizer
QUANTILES = [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]
LENGTHS = {
    "tldr": ([158, 196, 270, 350, 430, 495, 512], [16, 26, 28, 33, 38, 46, 50]),
    "hh": ([10, 17, 30, 105, 203, 379, 512], [3, 8, 22, 43, 77, 128, 128]),
}
EPISODES = {"tldr": 116722, "hh": 160800}  # one epoch of the rows that the preset resets to


# ---- 1. The plan -------------------------------------------------------------------------------------------------------------
def peak(shape, s):
    """Bytes at the peak of rollouts or an update if all rows are full. Rough: 2 to 7 % above what an H100 measured, 17 % with
    --compile."""
    (L, d, _, V), e, r, autocast = shape, BYTES[s.dtype], s.lora_r, s.dtype == "bfloat16"
    n, stream = 1 + (s.advantages == "gae"), e if r else 4  # networks that are trained; bytes of a number between the layers
    length, rows = s.query_length + s.response_length, min(GROUP * s.micro_batch, s.batch_size)
    tokens, steps = s.micro_batch * length, s.micro_batch * s.response_length
    body, adapters = V * d + 12 * L * d * d, n * L * 4 * r * d
    trained = adapters if r else n * body + V * d
    # Weights and AdamW's moments. Without LoRA all weights are float32, and each network has a frozen twin
    standing = (2 * body + V * d) * e + 12 * adapters if r else 16 * trained + (2 - n) * body * e
    # The cache; at prefill a layer's intermediates, the logits and their softmax
    rollout = 2 * L * d * stream * rows * length + rows * (48 * length * d + (16 + e) * V)
    # What autograd keeps of a layer. Autocast copies the norms' inputs in float32, and trained matrices in bfloat16
    norms = 8 if autocast and r else stream
    layer = tokens * ((e * (11 if r else 17) + norms) * d + e * r) + autocast * (8 * r * d if r else 24 * d * d)
    kept = layer + n * L * tokens * stream * d if s.checkpoint_activations else n * L * layer
    # Gradients; then a layer's and the logits' own gradients, or AdamW's denominators
    update = 4 * trained + max(kept + steps * (12 + e) * V + 32 * tokens * d, 4 * trained)
    return standing + max(rollout, update)


def best_plan(shape, most, s):
    """Settings, and "peak" in bytes, of what fits into `most` bytes; None if nothing does. Preferred are, in this order: a high
    rank (at most --lora_r), a micro-batch of 4 or more, no checkpointing, a large micro-batch."""
    highest = s.lora_r or 1024
    ranks = [highest, *(rank for rank in (256, 64, 16) if rank < highest)]
    sizes = [(c, size) for group in ((64, 32, 16, 8, 4), (2, 1)) for c in (False, True) for size in group]
    for lora_r, (checkpointing, size) in product(ranks, sizes):
        one = {"lora_r": lora_r, "micro_batch": size, "checkpoint_activations": checkpointing}
        if (needed := peak(shape, dataclasses.replace(s, **one))) <= most:
            return one | {"peak": needed}


def cell(lora_r, micro_batch, checkpointing, peak):
    return f"{lora_r} x {micro_batch}{'c' * checkpointing} ({peak / 1e9:.3g})"


def print_plans(s):
    """Prints and returns the best plan of each size on each card. A card sold as 24 GB has 24 GiB: the 7 % between the two are
    left to CUDA's context, to workspaces and to fragmentation."""
    plans = {size: {card: best_plan(PYTHIA[size], card * 1e9, s) for card in CARDS} for size in list(PYTHIA)[3:]}
    rows = [[size, *(cell(*best.values()) if best else "-" for best in row.values())] for size, row in plans.items()]
    print("LoRA rank x micro-batch (GB at the peak); c: with --checkpoint_activations; -: none.", end=" ")
    print(f"{s.dtype}, batches of {s.batch_size}, all rows of {s.query_length} + {s.response_length} tokens")
    print(table([["Pythia", *(f"{card} GB" for card in CARDS)], *rows]))
    return plans


# ---- 2. The roles in memory, and the rows they work on -----------------------------------------------------------------------
def shape_of(name):
    """The Shape that a model's name speaks of, as EleutherAI/pythia-2.8b-deduped does; None where it speaks of none."""
    size = re.search(r"(?:^|pythia-)(\d+(?:\.\d+)?[mb])(?:$|-)", name.lower())
    return PYTHIA.get(size[1]) if size else None


def random_network(shape, s, seed, trained):
    """A GPTNeoXForCausalLM of that shape, made on the device, in the dtype that drpo.load_network gives it."""
    sizes = dict(zip(("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"), shape))
    config = GPTNeoXConfig(**sizes, intermediate_size=4 * shape.width, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(seed)
    with torch.device(s.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32 if trained else getattr(torch, s.dtype))


def build(s, shape=None):
    """-> (roles, optimizer) as in drpo.train_drpo: of random weights where a shape is given, else of --model, twice."""

    def network(seed, trained):
        random = patch.object(drpo, "load", lambda *args, **kwargs: random_network(shape, s, seed, trained))
        with random if shape else contextlib.nullcontext():
            return drpo.load_network(s.model, s, trained=trained)

    body = network(s.seed + 1, not s.lora_r and s.advantages == "gae").base_model
    d = body.get_input_embeddings().embedding_dim
    weight = torch.randn(1, d, generator=drpo.generator(s.seed, "bench head")) / math.sqrt(d + 1)
    roles = drpo.build_roles(network(s.seed, not s.lora_r), (body, drpo.scalar_head(weight.to(s.device))), s)
    trained = [x for x in (roles.policy, roles.critic, roles.value_head) if x is not None]
    params = [p for p in torch.nn.ModuleList(trained).parameters() if p.requires_grad]
    return roles, torch.optim.AdamW(params, lr=s.lr, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.01)


def numbers(text, add_special_tokens=True):
    """The tokenizer of synthetic rows: the word for token i is the number i."""
    return {"input_ids": [int(word) for word in text.split()]}


numbers.eos_token_id = EOS
ENDLESS = SimpleNamespace(eos_token_id=-1)  # a tokenizer with which no row ends


def synthetic_rows(count, vocabulary, lengths, seed):
    """Rows {prompt, reference} of random numbers. lengths: tokens of each at QUANTILES, a reference's with its EOS."""
    rng, columns = drpo.generator(seed, "bench rows"), []
    for values, eos in zip(lengths, (0, 1)):
        sizes = np.interp(torch.rand(count, generator=rng), QUANTILES, values).round().astype(int) - eos
        columns.append([" ".join(map(str, torch.randint(1, vocabulary, (n,), generator=rng).tolist())) for n in sizes])
    return [{"prompt": prompt, "reference": reference} for prompt, reference in zip(*columns)]


# ---- 3. What an update costs -------------------------------------------------------------------------------------------------
def peak_rss():
    """The most GB that were resident since the last call. Linux knows; elsewhere nan."""
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+)", status.read_text() if status.exists() else "")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # from here on anew
    return int(peak[1]) * 1024 / 1e9 if peak else math.nan


def timed_update(roles, optimizer, rows, update, tokenizer, s):
    """drpo.drpo_update -> its figures, and on a CPU gb_PHASE: what was resident in the whole update."""
    peak_rss()
    figures = drpo.drpo_update(roles, optimizer, rows, update, tokenizer, s, f"bench update {update}")
    return dict.fromkeys([f"gb_{phase}" for phase in PHASES], peak_rss()) | figures


def seconds_of(work, s, times=1):
    began = drpo.lap(s)[0]
    for _ in range(times):
        work()
    return (drpo.lap(s)[0] - began) / times


def device_rates(s):
    """-> FLOP/s of a square matrix product in the networks' dtype, and bytes/s, read and written, of a copy: best of 5."""
    for size in (1024, 2048, 4096, 8192):  # until a product takes 1 ms: of a small one the launch would be measured
        a = torch.randn(size, size, device=s.device).to(getattr(torch, s.dtype))
        seconds = min(seconds_of(lambda: a @ a, s, 4) for _ in range(5))
        if seconds > 1e-3:
            break
    x = torch.empty(2, 2**27, dtype=torch.uint8, device=s.device)
    return 2 * size**3 / seconds, x.nbytes / min(seconds_of(lambda: x[1].copy_(x[0]), s, 8) for _ in range(5))


def model_flops(roles, s, tokens, decoded):
    """FLOPs that one update needs, by phase. tokens (B,): of query and response, row by row; decoded: in all.

    Forward 2 for each weight and token; backward 2 for the input's gradient, and 2 for a trained weight's own. Attention
    4 x width a layer for each token and each before it, backward twice that. The head over the vocabulary: tokens decoded."""
    body, head = drpo.body_and_head(roles.policy)
    weights = [p for p in body.parameters() if p.ndim == 2 and p is not body.get_input_embeddings().weight]
    trained, frozen = [sum(p.numel() for p in weights if p.requires_grad is kind) for kind in (True, False)]
    attention = 4 * body.config.num_hidden_layers * body.config.hidden_size * (tokens * (tokens + 1) / 2).sum()
    n, logits, networks = tokens.sum(), 2 * head.weight.numel() * decoded, 1 + (roles.critic is not None)
    forward, backward = 2 * (trained + frozen) * n + attention, (4 * trained + 2 * frozen) * n + 2 * attention
    return {
        "rollout": forward + logits,
        "score": networks * forward + 2 * (2 * (frozen or trained) * n + attention) + 2 * logits,
        "update": s.epochs * (networks * (forward + backward) + logits * (2 + head.weight.requires_grad)),
    }


def decode_bandwidth(roles, rows, tokenizer, s):
    """-> bytes/s at which a full group of rows decodes, and their number. Counted: the policy's weights at each step, keys and
    values so far. The seconds are those of response_length tokens less those of one token, which is prefill."""
    group, T, policy = min(GROUP * s.micro_batch, s.batch_size), s.response_length, roles.policy
    queries = [drpo.encode_query(row["prompt"], tokenizer, s.query_length) for row in (rows * group)[:group]]

    def seconds(width):
        given = policy, queries, [[]] * group, torch.rand(group, width, generator=drpo.generator(s.seed, "bench decode"))
        return seconds_of(lambda: drpo.rollout(*given, ENDLESS, s, s.temperature), s)

    with torch.no_grad():
        cache = policy(input_ids=torch.ones(1, 1, dtype=torch.long, device=s.device), use_cache=True).past_key_values
    token = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    weights = sum(p.nbytes for p in policy.parameters()) - policy.get_input_embeddings().weight.nbytes
    seconds(T)  # to warm up
    return (T - 1) * (weights + token * (sum(map(len, queries)) + group * T / 2)) / (seconds(T) - seconds(1)), group


def about(s):
    """The machine and the versions that figures belong to."""
    cuda, driver = s.device.startswith("cuda"), ""
    if cuda and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]
    name = torch.cuda.get_device_name(s.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "driver": driver, "torch": torch.__version__, "transformers": transformers.__version__}


def bench(s, shape, lengths, iterations):
    """Times updates of PPO and of DR-PO and prints what they cost -> all figures. shape: of random weights; None: --model."""
    (matmul, copying), (roles, optimizer), B, tokenizer = device_rates(s), build(s, shape), s.batch_size, numbers
    if lengths:
        rows = drpo.load_rows(lengths, "reference", s.seed)[0]
        tokenizer = drpo.load(drpo.AutoTokenizer, s.tokenizer or s.model, s)
    else:
        vocabulary = roles.policy.get_input_embeddings().num_embeddings
        rows = synthetic_rows(iterations * B, vocabulary, LENGTHS[s.preset], s.seed)
    # To warm up: resets have shapes of their own. On the longest prompts, where too little memory shows at once
    size = min(GROUP * s.micro_batch, B) // s.group * s.group or B
    longest = sorted(rows, key=lambda row: -len(row["prompt"]))[:size]
    for beta in (0.0, s.beta):
        small = dataclasses.replace(s, batch_size=size, epochs=1, beta=beta)
        timed_update(roles, optimizer, longest, 1, tokenizer, small)
    epoch, K = len(rows) if lengths else EPISODES[s.preset], s.group if s.advantages == "rloo" else 1
    updates = s.updates or max(1, epoch // B)
    drawn = drpo.draw(rows, B // K, 1, s.seed, "rl") * K
    query = np.array([len(drpo.encode_query(row["prompt"], tokenizer, s.query_length)) for row in drawn])
    methods, lines = {}, [["", "seconds", "tokens/s", "GB", "MFU"]]
    for name, beta in (("PPO", 0.0), ("DR-PO", s.beta)):
        given = tokenizer, dataclasses.replace(s, beta=beta)
        runs = [timed_update(roles, optimizer, rows, i, *given) for i in range(1, iterations + 1)]
        one = methods[name] = {key: np.median([run[key] for run in runs]) for key in runs[0]}
        tokens, decoded = query + one["response_tokens"], one["tokens_decoded"]
        counts = {"rollout": decoded, "score": tokens.sum(), "update": s.epochs * tokens.sum()}
        flops = model_flops(roles, s, tokens, decoded)
        for phase in PHASES:
            seconds, gb = one[f"seconds_{phase}"], one[f"gb_{phase}"]
            rate, mfu = counts[phase] / seconds, flops[phase] / seconds / matmul
            one |= {f"tokens_per_second_{phase}": rate, f"mfu_{phase}": mfu}
            lines.append([f"{name} {phase}", f"{seconds:.2f}", f"{rate:,.0f}", f"{gb:.2f}", f"{mfu:.0%}"])
        hours = updates * sum(one[f"seconds_{phase}"] for phase in PHASES) / 3600
        one |= {"hours": hours, "gb": max(one[f"gb_{phase}"] for phase in PHASES)}
    share = methods["DR-PO"]["tokens_decoded"] / methods["PPO"]["tokens_decoded"]
    decoding, group = decode_bandwidth(roles, rows, tokenizer, s)
    machine = about(s)
    print(
        f"{', '.join(f'{name} {value}' for name, value in machine.items() if value)}\n{s.model}"
        f"{', random weights' * bool(shape)}, {s.dtype}, lora_r {s.lora_r}, micro_batch {s.micro_batch}\n"
        f"{matmul / 1e12:.3g} TFLOP/s in matrix products, {copying / 1e9:,.0f} GB/s in copies, measured here\n"
        f"{B} episodes, prompts of {query.mean():.0f} tokens on average; medians of {iterations}\n\n{table(lines)}\n\n"
        f"decoding: {decoding / 1e9:,.0f} GB/s with {group} rows together, {decoding / copying:.0%} of a copy\n"
        f"resets: DR-PO decodes {share:.2f} of the tokens of PPO"
    )
    for name, one in methods.items():
        episodes = f"{updates} updates, {updates * B / 1000:.3g}k episodes"
        print(f"the full {name} run: {episodes}: {one['hours']:.3g} h, {one['gb']:.3g} GB", flush=True)
    rates = {"matmul_flops": matmul, "copy_bytes": copying, "decode_bytes": decoding, "row_steps_share": share}
    more = {"settings": dataclasses.asdict(s), "random_weights": bool(shape), "updates": updates}
    return machine | rates | more | {"methods": methods}


# ---- 4. --check: does the device compute what the CPU computes? --------------------------------------------------------------
SHORT = "--preset=tiny --sft_steps=40 --rm_steps=20 --updates=4 --micro_batch=16 --eval_samples=16".split()
BFLOAT16 = "--dtype=bfloat16 --lora_r=8 --supervised_lora_r=8 --checkpoint_activations=True".split()
# What is compared of two runs: |a - b| <= limit max(|a|, |b|, floor). In bfloat16 some tokens differ, and so do the scores
SAME = {
    "float32": (1e-3, 0.1, ("loss", "accuracy", "score", "kl", "entropy", "ratio", "grad_norm")),
    "bfloat16": (0.03, 1.0, ("loss", "entropy", "ratio")),
}
PLAIN = {"float32": (1e-4, 1e-3, 0.05), "bfloat16": (0.02, 0.5, 0.5)}  # limits: CDF, ln pi, share of rollouts that differ


def run_stage(stage, folder, device, flags):
    """python drpo.py STAGE in this process -> its metrics, a dict per update. Without ROUGE, whose package may be missing."""
    with patch.object(drpo, "rouge", lambda texts, rows, kind: [None] * len(rows)):
        if not experiment.quietly([stage, f"--run_dir={folder}", f"--device={device}", *SHORT, *flags]):
            raise KeyboardInterrupt
    return [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]


def farthest(a, b, dtype):
    """Two dicts of metrics -> (the largest relative difference of those that are compared, its name)."""
    _, floor, names = SAME[dtype]
    gaps = [(abs(a[k] - b[k]) / max(abs(a[k]), abs(b[k]), floor), k) for k in names if k in a]
    return max(gaps, key=lambda gap: (math.isnan(gap[0]), gap[0]))  # NaN is farther than all


def stages_agree(folder, device, dtype, flags):
    """Each stage on the CPU and on the device, both from what the CPU made so far. Yields verdicts."""
    for stage in drpo.STAGES:
        a, b = run_stage(stage, folder / "cpu", "cpu", flags), run_stage(stage, folder / "device", device, flags)
        shutil.copytree(folder / "cpu" / stage, folder / "device" / stage, dirs_exist_ok=True)
        (first, name), (last, last_name) = farthest(a[0], b[0], dtype), farthest(a[-1], b[-1], dtype)
        more = {"more": f"{last_name} {last:.1e} at update {len(a)}", "log": [a, b]}
        yield {"what": f"{stage}: {name} at update 1", "found": first, "limit": SAME[dtype][0]} | more


def rollouts_agree(folder, device, flags):
    """Rollouts of the SFT policy, with resets to the references, on both devices with the same uniforms. Yields verdicts."""
    responses = []
    for where in ("cpu", device):
        s = drpo.parse(["drpo", f"--run_dir={folder / 'cpu'}", f"--device={where}", *SHORT, *flags])[1]
        tokenizer = drpo.load(drpo.AutoTokenizer, f"{s.run_dir}/sft", s)
        rows = drpo.load_rows(s.dataset, "reference", s.seed)[0]
        with torch.no_grad(), drpo.precision(s):
            policy = drpo.load_network(f"{s.run_dir}/sft", s)
            batch = drpo.reset_rollouts(SimpleNamespace(policy=policy), rows, 0, tokenizer, s)
            responses.append(batch["response"].cpu())
            queries = [drpo.encode_query(row["prompt"], tokenizer, s.query_length) for row in rows[:16]]
            verdicts = cached_against_plain(policy, queries, s)
    differ = (responses[0] != responses[1]).any(1).float().mean().item()
    yield {"what": "rollouts that differ", "found": differ, "limit": PLAIN[s.dtype][2]}
    yield from verdicts  # of the device


@torch.no_grad()
def cached_against_plain(policy, queries, s):
    """Decodes rows that never end, with a cache, and reads them in one plain pass. -> verdicts on how far the uniform number of
    a token lies outside the interval that the plain pass gives the token (0: it draws the same token), and on ln pi."""
    (n, T), logits = (len(queries), s.response_length), []
    uniforms = torch.rand(n, T, generator=drpo.generator(s.seed, "bench uniforms"))
    assert n <= GROUP * s.micro_batch  # all rows in one group, in this order
    make = drpo.logits_of  # the one place where logits are made, divided by the temperature
    with patch.object(drpo, "logits_of", lambda *given: logits.append(make(*given)) or logits[-1]):
        responses = drpo.rollout(policy, queries, [[]] * n, uniforms, ENDLESS, s, s.temperature)
    batch, token = drpo.collate(queries, responses, T, s.device), torch.tensor(responses)[..., None]
    before = torch.tensor([[len(query) - 1] for query in queries]) + torch.arange(T)  # (n, T): positions that decide the tokens
    plain = policy(input_ids=batch["ids"], use_cache=False).logits[torch.arange(n)[:, None], before].float().cpu()
    log_p, log_q = (plain / s.temperature).log_softmax(-1), torch.stack(logits, 1).cpu().log_softmax(-1)  # (n, T, V)
    cdf = torch.nn.functional.pad(log_p.exp().cumsum(-1), (1, 0))
    low, high = [(cdf.gather(2, token + i) / cdf[..., -1:])[..., 0] for i in (0, 1)]
    gaps, differences = torch.maximum(low - uniforms, uniforms - high).clamp(min=0), (log_p - log_q).gather(2, token).abs()
    same = f"{(gaps == 0).float().mean():.1%} of {n * T} tokens are drawn from both"
    return [
        {"what": "cache, plain pass: CDF", "found": gaps.max().item(), "limit": PLAIN[s.dtype][0], "more": same},
        {"what": "cache, plain pass: ln pi", "found": differences.max().item(), "limit": PLAIN[s.dtype][1]},
    ]


def resuming_agrees(folder, device, flags):
    """DR-PO on the device, whole, and stopped by SIGTERM in its first update and run again. Yields a verdict on their last
    updates, which are equal on a CPU. On a GPU sums may be taken in another order."""
    update = drpo.drpo_update

    def update_and_stop(*given):
        signal.raise_signal(signal.SIGTERM)
        return update(*given)

    for name, stage in product(("whole", "stopped"), ("sft", "rm")):
        shutil.copytree(folder / "cpu" / stage, folder / name / stage)
    whole = run_stage("drpo", folder / "whole", device, flags)
    with patch.object(drpo, "drpo_update", update_and_stop), contextlib.suppress(KeyboardInterrupt):
        run_stage("drpo", folder / "stopped", device, flags)
    done = len((folder / "stopped" / "drpo" / "metrics.jsonl").read_text().splitlines())
    stopped = run_stage("drpo", folder / "stopped", device, flags)
    found, what = farthest(whole[-1], stopped[-1], "bfloat16")
    if done != 1 or [row["update"] for row in stopped] != [row["update"] for row in whole]:
        found, what = math.inf, "updates"
    limit, more = 0.0 if device == "cpu" else SAME["bfloat16"][0], f"stopped after {done} of {len(whole)} updates"
    yield {"what": f"stopped and resumed: {what}", "found": found, "limit": limit, "more": more, "log": [whole, stopped]}


def check(s, shape, iterations, save):
    """Prints verdicts as they come, then times updates -> all figures, which `save` is given after each part."""
    verdicts, began = [], time.perf_counter()
    figures = about(s) | {"check": verdicts}

    def part(name, work):
        try:
            for verdict in work:
                verdicts.append({"part": name, "ok": verdict["found"] <= verdict["limit"]} | verdict)
                line = "{what:32} {found:8.1e}   limit {limit:.0e}   {more}".format(**{"more": ""} | verdict)
                print(f"{'ok    ' if verdicts[-1]['ok'] else 'FAILED'} {name:10} {line.rstrip()}", flush=True)
        except (Exception, SystemExit) as error:  # the other parts still have something to say
            verdicts.append({"part": name, "ok": False, "error": traceback.format_exc()})
            print(f"FAILED {name:10} {type(error).__name__}: {error}", flush=True)
        save(figures | {"seconds": time.perf_counter() - began})

    with tempfile.TemporaryDirectory() as folder:
        for dtype, flags in (("float32", []), ("bfloat16", BFLOAT16)):
            part(dtype, stages_agree(Path(folder) / dtype, s.device, dtype, flags))
            part(dtype, rollouts_agree(Path(folder) / dtype, s.device, flags))
        part("bfloat16", resuming_agrees(Path(folder) / "bfloat16", s.device, BFLOAT16))
    print(f"{time.perf_counter() - began:.0f} seconds\n", flush=True)
    with drpo.precision(s):
        figures["bench"] = bench(s, shape, None, iterations)
    save(figures | {"seconds": time.perf_counter() - began})
    if failed := sum(not verdict["ok"] for verdict in verdicts):
        drpo.stop(f"--check: {failed} of {len(verdicts)} checks failed", 1)


# ---- 5. --peers: an update here against one in the structure of the official code --------------------------------------------
# Both sides have the same weights, adapters, optimizer, rows, reset lengths and micro-batch, in float32 on two threads: prompts
# of 64 to 128 tokens, references of 53, beta 1, 4 epochs, LoRA rank 16. Nothing else should run meanwhile.
PEERS = {"14m": 32, "70m": 16}  # Pythia sizes: episodes


def official_rollouts(policy, rows, update, tokenizer, s):
    """Rows and resets as of drpo.reset_rollouts, prompts padded to query_length. transformers' generate decodes T tokens of
    every row, and a logits processor forces the prefix. -> ids and mask (B, query_length + T), reset_len (B,)."""
    T, Q, rng, done = s.response_length, s.query_length, drpo.generator(s.seed, "rollout", update), []
    episodes = drpo.draw(rows, s.batch_size, update, s.seed, "rl")
    queries = [drpo.encode_query(row["prompt"], tokenizer, Q) for row in episodes]
    references = [drpo.encode_response(row["reference"], tokenizer, T)[:-1] for row in episodes]
    reset_len = drpo.sample_reset_lengths(torch.tensor([len(ids) for ids in references]), s.beta, rng)
    forced = torch.tensor([ids + [EOS] * (T - len(ids)) for ids in references])
    ids = torch.tensor([[EOS] * (Q - len(query)) + query for query in queries])
    mask = torch.arange(Q + T) >= torch.tensor([[Q - len(query)] for query in queries])
    how = GenerationConfig(max_new_tokens=T, do_sample=True, temperature=s.temperature, top_k=0, pad_token_id=EOS)
    for at in torch.arange(len(ids)).split(GROUP * s.micro_batch):

        def force(sequences, scores):
            t = sequences.shape[1] - Q
            only = torch.full_like(scores, -math.inf).scatter(1, forced[at, t, None], 0.0)
            return torch.where(t < reset_len[at, None], only, scores)

        given = {"input_ids": ids[at], "attention_mask": mask[at, :Q].long(), "generation_config": how}
        done.append(policy.generate(**given, logits_processor=LogitsProcessorList([force])))
    return torch.cat(done), mask, reset_len


def official_update(roles, optimizer, rows, update, tokenizer, s):
    """One update in the structure of the official code (its drpo.py, lines 720 to 960): four forward passes over every row and
    token, then PPO's epochs, in micro-batches of rows as they come. The losses are ours on the official masks, so that only the
    structure differs: the policy loss sees what follows the prefix, all other terms see everything."""
    B, T = s.batch_size, s.response_length
    ids, mask, reset_len = official_rollouts(roles.policy, rows, update, tokenizer, s)
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def whole(network, at):  # all positions, and all hidden states kept
        given = {"input_ids": ids[at], "attention_mask": mask[at].long(), "position_ids": positions[at]}
        return network(**given, output_hidden_states=True, use_cache=False)

    def logprobs_of(network, at):  # ln pi and the entropy, (b, T) each, from all logits and the full log-softmax
        logits = whole(network, at).logits[:, -T - 1 : -1] / s.temperature
        with torch.no_grad():
            entropy = logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)
        return logits.log_softmax(-1).gather(2, ids[at, -T:, None])[..., 0], entropy

    def head_on(head, network, at):  # (b, T + 1): from the state before the first token of the response on
        return head(whole(network, at).hidden_states[-1])[:, -T - 1 :, 0]

    is_eos, (logprobs, ref_logprobs, values), scores = ids[:, -T:] == EOS, torch.zeros(3, B, T), torch.zeros(B)
    end, chunks = torch.where(is_eos, torch.arange(T), T - 1).amin(1), torch.arange(B).split(s.micro_batch)
    free, everything = torch.arange(T) >= reset_len[:, None], torch.ones(B, T, dtype=torch.bool)
    with torch.no_grad():
        for at in chunks:
            logprobs[at], _ = logprobs_of(roles.policy, at)
            values[at] = head_on(roles.value_head, roles.critic, at)[:, :-1]
            ref_logprobs[at], _ = logprobs_of(roles.reference, at)
            scores[at] = head_on(roles.reward_head, roles.reward, at)[:, 1:].gather(1, end[at, None])[:, 0]
        rewards = -s.kl_coef * (logprobs - ref_logprobs)
        rewards[torch.arange(B), end] += torch.where(is_eos.any(1), scores, s.missing_eos_score)
        rewards = drpo.masked_whiten(rewards, everything, shift_mean=False)
        advantages, returns = drpo.gae(rewards, values, everything, s.gamma, s.lam)
        advantages = drpo.masked_whiten(advantages, everything)
    for _ in range(s.epochs):
        for at in chunks:
            new_logprobs, _ = logprobs_of(roles.policy, at)
            new_values = head_on(roles.value_head, roles.critic, at)[:, :-1]
            pg_loss, _ = drpo.ppo_policy_loss(new_logprobs, logprobs[at], advantages[at], free[at], s.cliprange)
            vf_loss, _ = drpo.ppo_value_loss(new_values, values[at], returns[at], everything[at], s.cliprange_value)
            ((pg_loss + s.vf_coef * vf_loss) * len(at) / B).backward()
        drpo.step(optimizer, s, f"official update {update}", {})
    return {}


SIDES = {"official": official_update, "ours": timed_update}


def peer(size, episodes):
    """The arguments of an update of either side, but for its number. Two threads."""
    torch.set_num_threads(2)
    fixed = "drpo --preset=tldr --device=cpu --dtype=float32 --query_length=128 --lora_r=16 --micro_batch=8".split()
    s = drpo.parse([*fixed, f"--model={size}", f"--batch_size={episodes}"])[1]
    lengths = [64 + 64 * quantile for quantile in QUANTILES], [s.response_length] * len(QUANTILES)
    roles, optimizer = build(s, PYTHIA[size])
    rows = synthetic_rows(10 * s.batch_size, PYTHIA[size].vocabulary, lengths, s.seed)
    return {"roles": roles, "optimizer": optimizer, "rows": rows, "tokenizer": numbers, "s": s}


def peer_memory(size, episodes, side):
    """The most GB that are resident in a process that makes one update: imports, networks and all."""
    figures = SIDES[side](**peer(size, episodes), update=1)
    return max(peak_rss(), figures.get("gb_update", 0))


def peers(iterations):
    """Whole updates at beta 1, the two sides in turn; memory, each in a fresh process; row-steps -> all figures."""
    results, lines = {}, [["", *SIDES, "ours / official"]]
    for size, episodes in PEERS.items():
        given, spent, steps = {side: peer(size, episodes) for side in SIDES}, {side: [] for side in SIDES}, []
        for update in range(1, iterations + 1):
            for side, work in SIDES.items():
                began = time.process_time(), time.perf_counter()
                figures = work(**given[side], update=update)
                spent[side].append((time.process_time() - began[0], time.perf_counter() - began[1]))
            steps.append(figures["tokens_decoded"])  # ours, which comes last
        ours = {**given["ours"], "s": dataclasses.replace(given["ours"]["s"], beta=0.0)}
        at_0 = timed_update(**ours, update=1)["tokens_decoded"]
        del given, ours  # their memory, before others need it
        cpu, wall = [[np.median([pair[i] for pair in spent[side]]) for side in SIDES] for i in (0, 1)]
        with ProcessPoolExecutor(1, max_tasks_per_child=1) as pool:  # a fresh process for each
            gb = list(pool.map(peer_memory, [size] * 2, [episodes] * 2, SIDES))
        steps = [at_0, np.mean(steps)]
        results[size] = {"CPU s": cpu, "wall s": wall, "peak GB": gb, "row-steps, ours at beta 0 and 1": steps}
        lines += [[f"{size} {name}", f"{a:.2f}", f"{b:.2f}", f"{b / a:.2f}"] for name, (a, b) in results[size].items()]
    print(f"medians of {iterations} updates, in turn, on two threads, in float32\n{table(lines)}")
    return results


# ---- 6. The command ----------------------------------------------------------------------------------------------------------
def out_of_memory(s, shape):
    """The line to end with: what ran out, and what fits by the plan with as much to spare as in print_plans."""
    cuda = s.device.startswith("cuda")
    total = torch.cuda.get_device_properties(s.device).total_memory if cuda else math.inf
    fit = shape and best_plan(shape, min(total * 1e9 / 2**30, peak(shape, s) - 1), s)
    flags = [f"--{name} {value}" for name, value in (fit or {}).items() if value and name != "peak"]
    less = f"{' '.join(flags)} ({fit['peak'] / 1e9:.3g} GB)" if fit else "nothing smaller"
    have = f"{total / 1e9:.0f} GB" if cuda else "this machine's memory"
    hint = f"by the plan fits {less}" if shape else "the plan knows Pythia sizes only"
    return f"OOM: --lora_r {s.lora_r} --micro_batch {s.micro_batch} in {have}; {hint}"


def parse(argv):
    """-> (options of this command, Settings, the Shape that --model names or None)."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.bench", description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.error = drpo.stop
    for flag in ("--random_weights", "--check", "--plan", "--peers"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--lengths", metavar="FILE")
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options, given = parser.parse_known_args(argv)
    fixed = options.peers and (given or options.random_weights)
    options.random_weights |= options.check
    small = ["--batch_size=128"] * options.check
    if options.check and drpo.parse(["drpo", *given])[1].device == "cpu":
        small = "--model=pythia-14m --batch_size=16 --dtype=float32 --lora_r=16".split()
    s = drpo.parse(["drpo", "--preset=tldr", *small, *given])[1]
    shape, modes = shape_of(s.model), options.check + options.plan + options.peers
    for wrong, message in (
        (options.iterations is not None and options.iterations < 1, f"--iterations {options.iterations}: must be 1 or more"),
        (modes > 1, "--check, --plan and --peers: one at a time"),
        (fixed, "--peers takes --iterations and --json only: its settings are fixed"),
        (options.random_weights and not shape, f"--model {s.model}: names no Pythia size, one of {', '.join(PYTHIA)}"),
        (options.lengths and modes, "--lengths: not with --check, --plan or --peers"),
        (not (options.lengths or options.plan or s.preset in LENGTHS), f"--preset {s.preset}: needs --lengths FILE, such rows"),
    ):
        if wrong:
            drpo.stop(message)
    with drpo.blame(f"--device {s.device}"):
        torch.empty(0, device=s.device)
    return options, s, shape


def main(argv=None):
    transformers.logging.set_verbosity_error()
    options, s, shape = parse(argv)

    def save(figures):
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1))

    with drpo.blame(f"--json {options.json}"):  # now, not after an hour
        options.json.open("a").close() if options.json else None
    try:
        if options.plan:
            save(print_plans(s))
        elif options.peers:
            save(peers(options.iterations or 5))
        elif options.check:
            check(s, shape, options.iterations or 1, save)
        else:
            with drpo.precision(s):
                save(bench(s, shape if options.random_weights else None, options.lengths, options.iterations or 3))
    except KeyboardInterrupt:
        drpo.stop("interrupted", 130)
    except RuntimeError as error:  # on a CPU it is this type, with these words
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        drpo.stop(out_of_memory(s, shape))


if __name__ == "__main__":
    main()
