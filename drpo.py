"""DR-PO (Dataset Reset Policy Optimization for RLHF, Chang et al. 2024, arXiv 2404.08495) in one file that runs alone.

PPO starts every rollout at the prompt. DR-PO starts a share `beta` of them at the prompt plus a random prefix of a response
in the data. The policy finishes it and learns only from its own tokens. `ppo` is `drpo` with beta = 0.

    python drpo.py                       all stages on the toy corpus of toy_text.py, on a laptop CPU, in minutes
    python drpo.py all --preset tldr     the paper's TL;DR run: Pythia-2.8B, LoRA, one GPU
    python drpo.py STAGE [--preset P] [--run_dir DIR] [settings]      STAGE = sft | rm | dpo | ppo | drpo | eval | all

Algorithm 1 of the paper, and where each line is:
    input   preference pairs D_R, unlabelled responses D_TR, policy pi_SFT        load_rows, train_sft
    1       fit the reward r on D_R by maximum likelihood, Eq. (1)                train_rm, bradley_terry_loss
    2       pi_1 = pi_SFT; for t = 1..T:                                          train_drpo, training
    3         draw a response from D_TR and a step h of it                        reset_rollouts, sample_reset_lengths
    4         reset to s_h (prompt + prefix), roll out pi_t to the end            reset_rollouts, rollout
    5         keep the steps h' >= h only: state, action, r, ln(pi_t / pi_SFT)    token_mask, penalised_rewards
    6         pi_{t+1} = PO(pi_t, D_on); here PO is PPO, or RLOO                  gae, rloo_advantages, ppo_policy_loss

One row: a query of 4 tokens, a reset of 2, EOS sampled at t = 4, T = 6. Padding is on the right: causal attention ignores it.
    ids             q   q   q   q   r   r   a   a   EOS .
    t (response)                    0   1   2   3   4   5
    state of step t             0   1   2   3   4   5
    mask                            0   0   1   1   1   0        what the policy sampled, EOS included: `token_mask`
    rewards                         0   0  -kl -kl -kl+score     `penalised_rewards`

The main differences from the paper (P) and the official code (C); docs/paper.md has all of them. N+ is arXiv 2403.17031.
    1  One mask in every term and mean: the policy's tokens up to EOS, as in Alg. 1. C masks prefixes in the policy loss only.
    2  Prefixes: 1..n tokens as in C; `--reset_include_prompt`: 0..n (P, Alg. 3). Critic: its head is trained; C's is not.
"""

import contextlib
import copy
import csv
import dataclasses
import functools
import gc
import gzip
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GradientCheckpointingLayer
from transformers.hf_argparser import HfArg

torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention plans anew for every shape, and the shapes of rollouts change
torch._dynamo.config.recompile_limit = 64  # graphs with --compile: the layers of all networks share one code object

# ---- 1. Settings. Defaults: the paper's TL;DR run, Table 5; from C: temperatures, whitening, value clip, missing EOS ---------
# Each name starts a block of fields of Settings; those before `seed` change no training. USES: which blocks a stage depends on
BLOCKS = {"seed": "data", "sft_steps": "sft", "rm_model": "rm", "updates": "po", "batch_size": "rl", "dpo_beta": "dpo"}
USES = {"sft": "data sft", "rm": "data sft rm", "dpo": "data sft po dpo"} | dict.fromkeys(["ppo", "drpo"], "data sft rm po rl")
TLDR = "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144"


@dataclasses.dataclass
class Settings:
    preset: Literal["tiny", "tldr", "hh", "cnndm"] = HfArg(default="tiny", help="a set of defaults")
    run_dir: str = HfArg(default="", help="output folder; empty: runs/PRESET")
    seeds: list[int] = HfArg(default_factory=list, help="run once per seed, in RUN_DIR/seed_K, and tabulate mean and range")
    device: str = HfArg(default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    micro_batch: int = HfArg(default=8, help="rows per forward pass (8 times as many in rollouts); memory and speed only")
    checkpoint_activations: bool = HfArg(default=False, help="recompute layers in the backward pass: less memory, slower")
    compile: bool = HfArg(default=False, help="torch.compile of the layers: minutes at the start, then faster on a GPU")
    save_every: int = HfArg(default=100, help="updates between checkpoints")
    eval_samples: int = HfArg(default=600, help="held-out prompts that the methods are compared on")
    eval_every: int = HfArg(default=10, help="updates of ppo and drpo between looks at 100 held-out prompts, judged; 0: none")
    eval_temperature: float = HfArg(default=0.01, help="sampling temperature of the evaluation")
    judge: str = HfArg(default="rm", help="rm (not independent: it was optimised), rm:RUN_DIR or module:function")
    seed: int = HfArg(default=0, help="seed of all randomness")
    model: str = HfArg(default="EleutherAI/pythia-2.8b-deduped", help="Hub name, folder or module:function")
    tokenizer: str = HfArg(default="", help="the same, if it is not the model's own")
    dataset: str = HfArg(default=TLDR, help="prompts and references: Hub name[:config], file, folder or module:function")
    preference_dataset: str = HfArg(default="vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144", help="pairs")
    dtype: Literal["bfloat16", "float32"] = HfArg(default="bfloat16", help="of autocast, and of what LoRA leaves frozen")
    query_length: int = HfArg(default=512, help="tokens of a prompt; a longer post loses its last lines")
    response_length: int = HfArg(default=53, help="tokens of a response, EOS included, in SFT and rollouts")
    preference_length: int = HfArg(default=169, help="tokens of a response, EOS included, in a preference pair")
    max_grad_norm: float = HfArg(default=0.0, help="clip the gradient of all that a stage trains to this norm; 0: never")
    supervised_lora_r: int = HfArg(default=0, help="LoRA rank in SFT and reward model; 0 trains all weights, as the paper does")
    sft_steps: int = HfArg(default=0, help="updates of SFT; 0: one epoch")
    sft_lr: float = HfArg(default=3e-6, help="learning rate of SFT, linear to 0")
    sft_batch_size: int = HfArg(default=64, help="rows per update of SFT")
    rm_model: str = HfArg(default="", help="reward model's start, Hub name or folder, same tokenizer; empty: the SFT network")
    rm_steps: int = HfArg(default=0, help="updates of the reward model; 0: one epoch")
    rm_lr: float = HfArg(default=3e-6, help="learning rate of the reward model, linear to 0")
    rm_batch_size: int = HfArg(default=64, help="pairs per update of the reward model")
    rm_center: float = HfArg(default=0.0, help="weight of (r(winner) + r(loser))^2: Eq. (1) leaves a prompt's mean score free")
    updates: int = HfArg(default=0, help="updates of drpo, ppo and dpo; 0: as many rollouts or pairs as rows")
    lora_r: int = HfArg(default=1024, help="LoRA rank of policy and critic, alpha = 2r; 0 trains all weights")
    batch_size: int = HfArg(default=512, help="rollouts per update")
    lr: float = HfArg(default=3e-6, help="learning rate of policy and critic, linear to 0")
    beta: float = HfArg(default=1.0, help="probability that a rollout starts from a reset; 0 is PPO, the paper runs 1")
    reset_to: Literal["reference", "chosen", "sft"] = HfArg(default="reference", help="whose prefixes; chosen: and prompts")
    reset_include_prompt: bool = HfArg(default=False, help="prefixes of 0..n tokens (Alg. 3), not 1..n")
    advantages: Literal["gae", "rloo"] = HfArg(default="gae", help="gae: from a critic; rloo: leave-one-out, no critic")
    group: int = HfArg(default=4, help="rollouts from the same state, with rloo")
    temperature: float = HfArg(default=0.7, help="sampling temperature of rollouts, log-probabilities and KL")
    epochs: int = HfArg(default=4, help="PPO passes over each batch, one optimizer step each")
    kl_coef: float = HfArg(default=0.05, help="KL penalty coefficient; low values invite reward hacking")
    gamma: float = HfArg(default=1.0, help="discount")
    lam: float = HfArg(default=0.95, help="GAE's lambda: 1 is Monte Carlo, 0 trusts the critic")
    cliprange: float = HfArg(default=0.2, help="PPO's epsilon")
    cliprange_value: float = HfArg(default=0.2, help="how far a value may move in one update")
    vf_coef: float = HfArg(default=0.1, help="weight of the value loss")
    whiten_rewards: bool = HfArg(default=True, help="scale per-token rewards to unit variance (gae only)")
    missing_eos_score: float = HfArg(default=-1.0, help="score of a response that never ends")
    dpo_beta: float = HfArg(default=0.05, help="DPO's beta")
    dpo_lr: float = HfArg(default=3e-6, help="learning rate of DPO, linear to 0")
    dpo_batch_size: int = HfArg(default=64, help="pairs per update of DPO")

    def __post_init__(self):
        self.run_dir = self.run_dir or f"runs/{self.preset}" + "_seeds" * bool(self.seeds)
        least = dict.fromkeys("seed sft_steps rm_steps updates lora_r supervised_lora_r eval_every".split(), 0)
        least |= {"temperature": 1e-3, "eval_temperature": 1e-3, "missing_eos_score": -1e6, "response_length": 2, "group": 2}
        most = dict.fromkeys("beta lam gamma cliprange lr sft_lr rm_lr dpo_lr".split(), 1)
        for name, value in vars(self).items():
            low, high = least.get(name, int(type(value) is int)), most.get(name, 10**6)
            if type(value) in (int, float) and not low <= value <= high:
                stop(f"--{name} {value}: must lie in [{low}, {high}]")
        if self.advantages == "rloo" and self.batch_size % self.group:
            stop(f"--group {self.group}: must divide --batch_size {self.batch_size}")
        if self.compile and self.checkpoint_activations:
            stop("--compile: not together with --checkpoint_activations")


PRESETS = {
    "tldr": {}, "cnndm": dict(dataset="abisee/cnn_dailymail:3.0.0", query_length=1919, response_length=64),  # for tldr's `eval`
    "hh": dict(model="EleutherAI/pythia-1b-deduped", dataset="Anthropic/hh-rlhf", preference_dataset="Anthropic/hh-rlhf",
               response_length=128, preference_length=256),
    "tiny": dict(model="toy_text:tiny_pythia", tokenizer="toy_text:bpe_tokenizer", dataset="toy_text:gate", dtype="float32",
                 preference_dataset="toy_text:gate_pairs", judge="toy_text:gold_judge", reset_to="chosen", query_length=48,
                 response_length=30, preference_length=40, lora_r=0, micro_batch=64, max_grad_norm=1.0, sft_steps=600, seed=124,
                 sft_lr=3e-3, sft_batch_size=16, rm_steps=600, rm_lr=5e-4, rm_batch_size=16, rm_center=0.02, updates=60,
                 batch_size=96, epochs=2, lr=2e-4, beta=0.8, lam=1.0, kl_coef=0.1, temperature=1.0, cliprange_value=5.0,
                 whiten_rewards=False, dpo_lr=3e-4, dpo_batch_size=48, eval_samples=500, eval_temperature=0.7, eval_every=5),
}  # fmt: skip


def stop(message, status=2):  # one line on stderr; status 2: the caller can fix it, 3: the run cannot go on
    tqdm.write(f"drpo.py: {' '.join(str(message).split())[:290]}", file=sys.stderr)
    raise SystemExit(status)


@contextlib.contextmanager
def blame(what):  # whatever a library raises inside, of bad input, becomes one line that begins with `what`, and status 2
    try:
        yield
    except Exception as error:  # `datasets` alone has some twenty types of them
        stop(f"{what}: {type(error).__name__}: {error.__cause__ or error}")


def generator(seed, *key):  # on the CPU, depends on seed and key alone: a resumed run draws what it would have drawn
    return torch.Generator().manual_seed(int(hashlib.sha256(repr((seed, *key)).encode()).hexdigest()[:16], 16) >> 1)


def world():  # -> (rank, number of processes): all hold all rows and weights, each computes a share of the micro-batches
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def summed(x):  # x, summed in place over all processes, so that all continue with the same sum
    dist.all_reduce(x) if world()[1] > 1 else None
    return x


# ---- 2. Data: rows {prompt, reference} for SFT and RL, {prompt, chosen, rejected, batch} for the reward model and DPO --------
def resolve(name, **offered):  # `module:function` -> the function with those of the offered arguments that it takes, else None
    module, _, function = name.partition(":")
    if Path(name).exists() or not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) or not importlib.util.find_spec(module):
        return None
    function = getattr(importlib.import_module(module), function)
    return functools.partial(function, **{k: offered[k] for k in inspect.signature(function).parameters if k in offered})


def read_row(row):  # of any known layout, told by its columns -> texts prompt, reference, chosen, rejected, and its batch
    prompt, a, b = row.get("prompt", row.get("query")), row.get("chosen"), row.get("rejected")
    info = row["info"] if isinstance(row.get("info"), dict) else row
    if info.get("article") and "prompt" not in row:  # CNN/DM, in abisee/cnn_dailymail and among openai's pairs
        prompt = f"Article:\n{info['article']}\n\nTL;DR:"
    elif info.keys() >= {"subreddit", "title", "post"} and "prompt" not in row:  # openai, vwxyzjn, cleanrl
        prompt = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {info['post']}\n\nTL;DR:"
    if "summaries" in row:  # openai/summarize_from_feedback
        a, b = [row["summaries"][i]["text"] for i in (row["choice"], 1 - row["choice"])]
    if isinstance(a, str) and isinstance(b, str) and prompt is None:  # Anthropic/hh-rlhf: two dialogues
        (prompt, mark, a), (other, _, b) = a.rpartition("\n\nAssistant:"), b.rpartition("\n\nAssistant:")
        prompt = prompt + mark if prompt == other else ""  # to be dropped
    elif str(a).startswith("TL;DR:") and str(b).startswith("TL;DR:"):  # CarperAI/openai_summarize_comparisons
        prompt, a, b = f"{prompt}\nTL;DR:", a.removeprefix("TL;DR:"), b.removeprefix("TL;DR:")
    names = "reference completion label response reference_response summary highlights".split()  # trl-lib, Dahoas, ...
    reference = next((row[name] for name in names if name in row), a)
    return {"prompt": prompt, "reference": reference, "chosen": a, "rejected": b, "batch": row.get("batch")}


def read_source(source, seed):  # -> {split: rows as they stand}; a file of json, jsonl or csv is the split "train"
    path, kind = Path(source), source.removesuffix(".gz").rpartition(".")[2]
    if resolve(source):
        return {split: resolve(source, split=split, seed=seed)() for split in ("train", "validation")}
    if path.is_file() and kind in ("json", "jsonl", "csv"):  # read here: texts stay texts, and no cache goes stale
        with (gzip.open if source.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            read = {"json": json.load, "csv": csv.DictReader, "jsonl": lambda file: [json.loads(x) for x in file if x.strip()]}
            return {"train": list(rows.get("data", ()) if isinstance(rows := read[kind](file), dict) else rows)}
    datasets = importlib.import_module("datasets")  # late, as peft and rouge_score: slow to import
    datasets.logging.set_verbosity(50)  # what goes wrong is said once, in one line
    if path.is_file():
        return datasets.load_dataset(kind, data_files=source)
    read = datasets.load_from_disk if [*path.glob("state.json"), *path.glob("dataset_dict.json")] else datasets.load_dataset
    return rows if isinstance(rows := read(*[source] if path.exists() else source.split(":")), dict) else {"train": rows}


@functools.lru_cache
def load_rows(source, kind, seed):
    """-> (training rows, held-out rows): of a single split about a tenth of the prompts. Kind: "reference" or "pairs"."""
    fields, result = ["prompt", "reference"] if kind == "reference" else ["prompt", "chosen", "rejected"], []
    with blame(f"{source}: cannot be read"):
        splits = read_source(source, seed)
        found = [name for name in ("validation", "valid", "test", "valid1") if name in splits]
        parts = [[read_row(row) for row in splits[name]] for name in ["train", *found[:1]]]
    for number, row, name in ((i, row, name) for rows in parts for i, row in enumerate(rows) for name in fields):
        if not isinstance(row[name], str) or re.search("[\ud800-\udfff]", row[name]):
            stop(f"{source}: row {number}: {name} must be text, not {row[name]!a:.40}; a row needs {', '.join(fields)}")
    if not found:
        prompts = sorted({row["prompt"].strip() for row in parts[0]})  # each decided alone: the same in every file
        out = {x for x in prompts if generator(seed, "held out", x).initial_seed() % 10 == 0} or set(prompts[:1])
        parts = [[row for row in parts[0] if (row["prompt"].strip() in out) == side] for side in (False, True)]
    for part, rows in zip(("training", "held-out"), parts):
        texts = [{name: row[name].removesuffix("<|endoftext|>").strip() for name in fields} for row in rows]
        kept = [x | {"batch": row["batch"]} for x, row in zip(texts, rows) if len(set(x.values()) - {""}) == len(fields)]
        if len(kept) < len(rows):
            print(f"{source}: {len(rows) - len(kept)} of {len(rows)} {part} rows dropped (empty, equal, or no shared prompt)")
        result.append(kept or stop(f"{source}: no usable {part} rows among {len(rows)}"))
    return result


def encode_query(prompt, tokenizer, length):
    """-> at most `length` ids. A post loses its last lines until it fits (OpenAI's rule), other prompts their beginning."""
    match = re.fullmatch(r"(.*?\n+POST:|Article:\n?)(.*?)(\n+TL;DR:)", prompt, re.S)
    head, post, tail = match.groups() if match else (prompt, "", "")
    while True:
        ids = tokenizer(head + post + tail)["input_ids"] or [tokenizer.eos_token_id]
        ids = ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
        if len(ids) <= length or not post:  # a BOS stays
            bos = ids[:1] if len(ids) > length and ids[0] == getattr(tokenizer, "bos_token_id", None) else []
            return bos + ids[max(0, len(ids) - length + len(bos)) :]
        post = post[: post.rfind("\n") if "\n" in post.strip() else -max(1, (len(ids) - length) // 4)]  # a letter: 1 to 4 ids


def encode_response(text, tokenizer, length):  # -> ids of " " + text + EOS; where it is cut, the EOS is lost, as in C
    ids = tokenizer(" " + text.strip(), add_special_tokens=False)["input_ids"]
    return ([token for token in ids if token != tokenizer.eos_token_id] + [tokenizer.eos_token_id])[:length]


def collate(queries, responses, T, device):
    """Lists of ids -> {ids (B, L): query + response, response (B, T), query_len (B,), response_len (B,)}; 0 on the right."""
    rows = [query + response for query, response in zip(queries, responses)]
    lists = {"query_len": list(map(len, queries)), "response_len": list(map(len, responses))}
    for name, ids, width in ("ids", rows, max(map(len, rows))), ("response", responses, T):
        lists[name] = [x + [0] * (width - len(x)) for x in ids]
    return {name: torch.tensor(values, device=device) for name, values in lists.items()}


def encode(rows, fields, s, tokenizer, T):  # all rows with the first field as response, then all with the second, if any
    queries = [encode_query(row["prompt"], tokenizer, s.query_length) for row in rows] * len(fields)
    return collate(queries, [encode_response(row[name], tokenizer, T) for name in fields for row in rows], T, s.device)


def whole(batch):  # each row as a response to its first token: SFT is trained on query and response alike
    length = batch["query_len"] + batch["response_len"] - 1
    return batch | {"response": batch["ids"][:, 1:], "query_len": torch.ones_like(length), "response_len": length}


def micro_batches(batch, size, pairs=False):  # yields (indices, part), longest rows first; pairs: i means rows i and i + B/2
    lengths, (rank, processes) = batch["query_len"] + batch["response_len"], world()
    longest, size = (torch.max(*lengths.chunk(2)), max(1, size // 2)) if pairs else (lengths, size)
    for index in longest.argsort(descending=True, stable=True).split(size)[rank::processes]:
        rows = torch.cat([index, index + len(longest)]) if pairs else index
        part = {name: x[rows] for name, x in batch.items()}
        yield index, part | {"ids": part["ids"][:, : lengths[rows].max()]}


def draw(rows, size, update, seed, stream):  # the `update`-th batch of an endless stream of epochs, each in a fresh order
    order = functools.cache(lambda epoch: torch.randperm(len(rows), generator=generator(seed, stream, epoch)).tolist())
    return [rows[order(i // len(rows))[i % len(rows)]] for i in range(update * size, (update + 1) * size)]


def few(rows, size, s, stream):  # at most `size` of the rows, drawn by the seed
    return draw(rows, min(size, len(rows)), 0, s.seed, stream)


# ---- 3. Models ---------------------------------------------------------------------------------------------------------------
# Four roles from two networks, frozen: policy = SFT network + LoRA           reference = SFT network
# (without LoRA they are copies)         critic = RM network + LoRA + head     reward    = RM network + its own head
def load(loader, name, s, **kwargs):  # from a Hub name, a folder or a module:function; a model's own code is never run
    with blame(f"{name}: cannot be loaded"):
        function = resolve(name, seed=s.seed)
        return function() if function else loader.from_pretrained(name, trust_remote_code=False, **kwargs)


def load_network(name, s, cls=AutoModelForCausalLM, trained=False, **kwargs):  # eval mode, always: no dropout
    dtype = torch.float32 if trained else getattr(torch, s.dtype)
    gc.collect()  # checkpointed and compiled layers hold themselves: those of the last stage would stay in memory
    with torch.no_grad(), blame(f"--model {name}: cannot be used"):
        network = load(cls, name, s, dtype=dtype, **kwargs).to(s.device, torch.float32 if trained else None).eval()
        if cls is AutoModelForCausalLM:  # left padding and a cache, as in rollouts, must give the logits of a plain pass
            (body, head), ids = body_and_head(network), torch.arange(4, device=s.device)[None]
            plain, cache = network(ids[:, 1:]).logits[:, -1].float(), transformers.DynamicCache(config=body.config)
            next_states(body, ids[:, :3], ids[:, :3] > 0, cache)
            cache.batch_select_indices(torch.tensor([0], device=s.device))  # as when rows leave
            logits = logits_of(head, next_states(body, ids[:, 3:], ids > 0, cache), 1.0)
            if not (logits - plain).norm() < (1e-3 if s.dtype == "float32" else 5e-2) * plain.norm():
                raise ValueError("left padding, or more than a linear head, changes its logits")
    for layer in [x for x in network.modules() if isinstance(x, GradientCheckpointingLayer)]:
        if s.checkpoint_activations:  # transformers' own switch needs train mode, and with it dropout
            layer.forward = functools.partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)
        layer.compile(dynamic=True) if s.compile else None
    return network


def add_lora(network, r, seed, role):  # on what peft chooses (query_key_value in Pythia, as in C), or all linear layers
    peft, kind = importlib.import_module("peft"), network.config.model_type
    targets = None if kind in peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING else "all-linear"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "lora", role).initial_seed())  # A is drawn from the global generator
        return peft.get_peft_model(network, peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets)).eval()


def twin(network, s, role):  # -> the network as it will be trained, and frozen as it is now; with LoRA they share weights
    shared = {id(p): p for p in network.parameters()} if s.lora_r else {}  # deepcopy's memo: not copied
    frozen = copy.deepcopy(network, shared).requires_grad_(False)  # a copy is not compiled
    frozen.apply(lambda x: x.compile(dynamic=True) if s.compile and isinstance(x, GradientCheckpointingLayer) else None)
    return add_lora(network, s.lora_r, s.seed, role) if s.lora_r else network, frozen


def load_reward(folder, s):  # -> (backbone, head); logit - reward_bias: references average 0, N+ detail 15
    model = load_network(str(folder), s, AutoModelForSequenceClassification, trained=s.advantages == "gae" and not s.lora_r)
    if not hasattr(model.config, "reward_bias"):
        stop(f"{folder}: is not a reward model; make one with: python drpo.py rm")
    return model.base_model, scalar_head(model.score.weight, -model.config.reward_bias)


def scalar_head(weight, bias=0.0):  # a frozen torch.nn.Linear(d, 1) in float32 from a weight (1, d) and a number
    head = torch.nn.Linear(weight.shape[1], 1, device=weight.device)
    head.load_state_dict({"weight": weight.float(), "bias": torch.tensor([bias])})
    return head.requires_grad_(False)


def save_network(network, tokenizer, folder):  # the layout of Hugging Face; an adapter under adapter/, and merged, in place
    if hasattr(network, "merge_and_unload"):
        network.save_pretrained(folder / "adapter", is_main_process=world()[0] == 0)
        network = network.float().merge_and_unload()  # in bfloat16 the sum would round small updates away
    network.save_pretrained(folder, is_main_process=world()[0] == 0)
    tokenizer.save_pretrained(folder) if world()[0] == 0 else None


def body_and_head(network):  # -> the transformer without its head, and the linear layer that makes logits of its states
    network = network.get_base_model() if hasattr(network, "get_base_model") else network
    return network.base_model, network.get_output_embeddings()


def states_before(body, batch, mask):  # -> (n, d): the states that the masked response steps are decided from
    states, (row, t) = body(input_ids=batch["ids"], use_cache=False).last_hidden_state, mask.nonzero(as_tuple=True)
    return states[row, batch["query_len"][row] - 1 + t].float()


def logits_of(head, states, temperature):  # (n, d) -> (n, V), a product in s.dtype, then float32. SFT, DPO: temperature 1
    bias = None if head.bias is None else head.bias / temperature
    return F.linear((states / temperature).to(head.weight.dtype), head.weight, bias).float()


def response_logprobs(network, batch, mask, temperature=1.0):
    """-> ln pi(a_t | s_t), from the state left of a_t, without gradients also the entropy: (B, T) float32, 0 off the mask."""
    (body, head), zeros = body_and_head(network), torch.zeros(mask.shape, device=mask.device)
    logits = logits_of(head, states_before(body, batch, mask), temperature)
    logprobs = zeros.masked_scatter(mask, -F.cross_entropy(logits, batch["response"][mask], reduction="none"))
    entropy = None if torch.is_grad_enabled() else torch.distributions.Categorical(logits=logits, validate_args=False).entropy()
    return logprobs, None if entropy is None else zeros.masked_scatter(mask, entropy)


def sequence_logprobs(network, batch, temperature=1.0):  # ln pi(response | query), (B,) float32
    mask = token_mask(torch.zeros_like(batch["response_len"]), batch["response_len"], batch["response"].shape[1])
    return response_logprobs(network, batch, mask, temperature)[0].sum(1)


def response_values(critic, head, batch, mask):  # V(s_t), from the state one to the left of a_t: (B, T) float32, 0 off the mask
    values = (states_before(critic, batch, mask) * head.weight[0]).sum(-1) + head.bias  # a matrix product would be in bfloat16
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values)


def end_scores(backbone, head, batch):  # -> (B,): the head on the last token's state, that is, of step response_len
    after = torch.arange(batch["response"].shape[1] + 1, device=batch["ids"].device) == batch["response_len"][:, None]
    return response_values(backbone, head, batch, after).sum(1)


# ---- 4. The mathematics: pure functions --------------------------------------------------------------------------------------
# Tensors are (B, T) float32 over response positions; mask is 1 on sampled tokens, EOS included. The rest, even NaN, is ignored.
def bradley_terry_loss(chosen_scores, rejected_scores):
    """Eq. (1) under Bradley-Terry-Luce: mean of -log sigma(r(winner) - r(loser)). (B,), (B,) -> scalar."""
    return -F.logsigmoid(chosen_scores - rejected_scores).mean()


def sample_reset_lengths(reference_lengths, beta, generator, include_zero=False):
    """Alg. 1, line 3: with probability beta uniform on 1..n (include_zero: 0..n, Alg. 3), else 0. (B,) long -> (B,) long."""
    n, is_reset = reference_lengths, torch.rand(len(reference_lengths), generator=generator) < beta
    lengths = 1 - include_zero + (torch.rand(len(n), generator=generator, dtype=torch.float64) * (n + include_zero)).long()
    return torch.where(is_reset & (n > 0), lengths, 0)


def masked_mean(x, mask):
    """Mean of x where mask is 1. (B, T), (B, T) -> scalar."""
    return torch.where(mask.bool(), x, 0.0).sum() / mask.sum()


def masked_whiten(x, mask, shift_mean=True):
    """Unit variance (biased, as in C) and, if shift_mean, zero mean over the mask; 0 elsewhere. (B, T), (B, T) -> (B, T)."""
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8)
    return torch.where(mask.bool(), whitened + (0.0 if shift_mean else mean), 0.0)


def penalised_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """r_t = -kl_coef * ln(pi(a_t|s_t) / pi_SFT(a_t|s_t)), and the score, (B,), at the last token in the mask -> (B, T)."""
    penalty = torch.where(mask.bool(), -kl_coef * (logprobs - ref_logprobs), 0.0)
    is_last = mask.bool() & (mask.flip(1).cumsum(1).flip(1) == 1)  # from here on one in the mask, this one
    return penalty + torch.where(is_last, scores[:, None], 0.0)


def gae(rewards, values, mask, gamma, lam):
    """GAE (Schulman et al. 2016, eq. 16), (B, T) each -> advantages, returns, 0 outside the mask. The value after its end is 0:
    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   returns_t = A_t + V_t."""
    mask, rewards, values = mask.bool(), *[torch.where(mask.bool(), x, 0.0) for x in (rewards, values)]
    delta = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    advantages, following = torch.zeros_like(delta), 0.0
    for t in reversed(range(delta.shape[1])):
        advantages[:, t] = following = torch.where(mask[:, t], delta[:, t] + gamma * lam * following, 0.0)
    return advantages, advantages + values


def rloo_advantages(returns, group):
    """RLOO (arXiv 2402.14740): return minus the mean of the group - 1 others from the same state, neighbours. (B,) -> (B,)."""
    grouped = returns.view(-1, group)
    return ((grouped - grouped.mean(1, keepdim=True)) * group / (group - 1)).view(-1)


def log_ratio(logprobs, old_logprobs, mask):
    """ln(pi / pi_old) on the mask, 0 elsewhere: masked before any exp, so that no gradient and no NaN leaks in. (B, T)."""
    return torch.where(mask.bool(), logprobs - old_logprobs, 0.0)


def ppo_policy_loss(logprobs, old_logprobs, advantages, mask, cliprange):
    """PPO (Schulman et al. 2017, eq. 7), negated: mean max(-A rho, -A clip(rho, 1-eps, 1+eps)). (B, T) -> (loss, clipfrac)."""
    ratio = log_ratio(logprobs, old_logprobs, mask).exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return masked_mean(torch.max(unclipped, clipped), mask), masked_mean((clipped > unclipped).float(), mask)


def ppo_value_loss(values, old_values, returns, mask, cliprange_value):
    """0.5 mean max((V - R)^2, (clip(V, V_old +- eps) - R)^2), C's drpo.py, lines 866-874. (B, T) -> (loss, clipfrac)."""
    clipped = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    plain, clip = [torch.where(mask.bool(), v - returns, 0.0) ** 2 for v in (values, clipped)]
    return 0.5 * masked_mean(torch.max(plain, clip), mask), masked_mean((clip > plain).float(), mask)


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """DPO (Rafailov et al. 2023, eq. 7) on log-probabilities of whole responses, (B,) each -> (loss, margins (B,))."""
    margins = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    return -F.logsigmoid(margins).mean(), margins


# ---- 5. Rollouts with dataset resets -----------------------------------------------------------------------------------------
def token_mask(reset_len, response_len, T):  # (B,), (B,) -> (B, T) bool: the tokens that the policy sampled, EOS included
    t = torch.arange(T, device=reset_len.device)
    return (t >= reset_len[:, None]) & (t < response_len[:, None])


def next_states(body, tokens, mask, cache):
    """States (n, d) after the last of `tokens`, (n, Q) prompts, then (n, 1). mask (n, tokens so far): 0 on left padding."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    given = {"input_ids": tokens, "attention_mask": mask.long(), "position_ids": positions, "past_key_values": cache}
    return body(**given, use_cache=True).last_hidden_state[:, -1]


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # the cache grows: each step would be compiled anew
def rollout(policy, queries, prefixes, uniforms, tokenizer, s, temperature):
    """Alg. 1, line 4: reset to query + prefix, lists of ids, and let the policy finish -> responses of at most T ids, prefix
    included. Token t of row i is the inverse CDF at uniforms[i, t], (B, T): the same, up to rounding, beside any other rows."""
    (body, head), T, (rank, processes), responses = body_and_head(policy), uniforms.shape[1], world(), list(map(list, prefixes))
    mine = sorted(range(len(queries)), key=lambda i: -len(prefixes[i]))[rank::processes]
    for first in range(0, len(mine), 8 * s.micro_batch):
        rows = mine[first : first + 8 * s.micro_batch]  # these have about as much left to decode
        starts, cache = [queries[i] + responses[i] for i in rows], transformers.DynamicCache(config=body.config)
        Q = max(map(len, starts))
        tokens = torch.tensor([[0] * (Q - len(ids)) + ids for ids in starts], device=s.device)
        mask = torch.arange(Q, device=s.device) >= torch.tensor([[Q - len(ids)] for ids in starts], device=s.device)
        while rows:
            cdf = logits_of(head, next_states(body, tokens, mask, cache), temperature).softmax(-1).cumsum(-1)
            u = uniforms[rows, [len(responses[i]) for i in rows]].to(cdf)[:, None]
            tokens = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)  # u * cdf may round up
            for i, token in zip(rows, tokens[:, 0].tolist()):
                responses[i].append(token)
            left = [k for k, i in enumerate(rows) if responses[i][-1] != tokenizer.eos_token_id and len(responses[i]) < T]
            if 0 < len(left) < len(rows):  # rows that have ended leave
                keep = torch.tensor(left, device=s.device)
                cache.batch_select_indices(keep)
                tokens, mask = tokens[keep], mask[keep]
            rows, mask = [rows[k] for k in left], F.pad(mask, (0, 1), value=True)
    if processes > 1:
        dist.all_gather_object(parts := [None] * processes, responses)
        responses = [max(versions, key=len) for versions in zip(*parts)]  # the process that decoded a row has the longest
    return responses


def reset_rollouts(roles, rows, update, tokenizer, s):  # Alg. 1, lines 3 and 4: a reset per row -> batch, reset_len, has_eos
    K, T, rng = s.group if s.advantages == "rloo" else 1, s.response_length, generator(s.seed, "rollout", update)
    rows, eos = draw(rows, s.batch_size // K, update, s.seed, "rl"), tokenizer.eos_token_id
    references = [encode_response(row["reference"], tokenizer, T) for row in rows]
    if s.reset_to == "sft" and s.beta > 0:
        references = sample(roles.reference, rows, s, tokenizer, s.temperature, ("roll-in", update))
    references = [[token for token in ids if token != eos][: T - 1] for ids in references]
    reset_len = sample_reset_lengths(torch.tensor(list(map(len, references))), s.beta, rng, s.reset_include_prompt)
    prefixes = [ids[:n] for ids, n in zip(references, reset_len.tolist()) for _ in range(K)]
    queries = [ids for row in rows for ids in [encode_query(row["prompt"], tokenizer, s.query_length)] * K]
    uniforms = torch.rand(len(queries), T, generator=rng)
    responses = rollout(roles.policy, queries, prefixes, uniforms, tokenizer, s, s.temperature)
    ends = {"has_eos": torch.tensor([ids[-1] == eos for ids in responses], device=s.device)}
    return collate(queries, responses, T, s.device) | ends | {"reset_len": reset_len.repeat_interleave(K).to(s.device)}


def sample(network, rows, s, tokenizer, temperature, key=("evaluation",)):  # -> ids, from the bare prompt
    uniforms = torch.rand(len(rows), s.response_length, generator=generator(s.seed, *key))
    queries = [encode_query(row["prompt"], tokenizer, s.query_length) for row in rows]
    return rollout(network, queries, [[]] * len(rows), uniforms, tokenizer, s, temperature)


# ---- 6. The loop around every stage: optimizer, schedule, precision, log, checkpoint -----------------------------------------
def precision(s):  # of matrix products; log-softmax, losses, values, trained weights, AdamW: float32. A cache would go stale
    return torch.autocast(torch.device(s.device).type, torch.bfloat16, enabled=s.dtype == "bfloat16", cache_enabled=False)


def training(stage, updates, lr, modules, s):
    """Yields (update, optimizer, metrics to fill in) per update to do. Draws depend on seed and update: resuming is exact."""
    params, asked = {name: p for name, p in modules.named_parameters() if p.requires_grad}, []
    optimizer = torch.optim.AdamW(params.values(), lr=lr, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.01)  # as C
    folder, done, is_first = Path(s.run_dir) / stage, 0, world()[0] == 0
    checkpoint, log = folder / "checkpoint.pt", folder / "metrics.jsonl" if is_first else Path(os.devnull)
    if checkpoint.exists():
        with blame(f"{checkpoint}: cannot be read; delete it to train {stage} from the start"):
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
            modules.load_state_dict(modules.state_dict() | saved["params"])
            optimizer.load_state_dict(optimizer.state_dict() | {"state": dict(enumerate(saved["moments"]))})
            done, saved = saved["update"], None  # gigabytes
    lines = re.finditer(r'\{"update": (\d+),.*\n', log.read_text() if log.exists() else "")
    log.write_text("".join(line[0] for line in lines if int(line[1]) <= done))
    with contextlib.ExitStack() as handlers:
        for number in {signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)}:  # Windows has no SIGHUP
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                handlers.callback(signal.signal, number, signal.signal(number, lambda number, _: asked.append(number)))
        for update in (bar := tqdm(range(done, updates), stage, updates, initial=done, disable=not is_first)):
            metrics, began = {"update": update + 1, "lr": lr * (1 - update / updates)}, time.perf_counter()
            optimizer.param_groups[0]["lr"] = metrics["lr"]
            yield update, optimizer, metrics
            metrics["seconds"] = time.perf_counter() - began
            bar.set_postfix({k: f"{metrics[k]:.3g}" for k in ("loss", "accuracy", "score", "kl") if k in metrics})
            with log.open("a") as file:
                file.write(json.dumps(metrics) + "\n")
            stopping = summed(torch.tensor(len(asked))).item() > 0
            if is_first and ((update + 1) % s.save_every == 0 or update + 1 == updates or stopping):
                moments = [{k: x.cpu() for k, x in optimizer.state[p].items()} for p in params.values()]
                weights = {name: p.detach().cpu() for name, p in params.items()}
                save_whole({"params": weights, "moments": moments, "update": update + 1}, checkpoint)
            if stopping:
                stop(f"{stage}: stopped as asked after update {update + 1} of {updates}; the same command resumes", 0)


def save_whole(value, path):  # written beside, flushed, renamed: whenever the process dies, the file is the old or the new one
    if world()[0] == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".new").open("wb") as file:
            torch.save(value, file) if path.suffix == ".pt" else file.write(json.dumps(value, indent=1).encode())
            file.flush()
            os.fsync(file.fileno())
        path.with_suffix(".new").replace(path)


def step(optimizer, s, where, batch):
    """One step on the gradients, summed over micro-batches and processes -> their norm. Not finite: stops and keeps `batch`."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params if world()[1] > 1 else []:
        p.grad = summed(torch.zeros_like(p) if p.grad is None else p.grad)
    norm = torch.nn.utils.clip_grad_norm_(params, s.max_grad_norm or math.inf)
    if not torch.isfinite(norm):
        path = Path(s.run_dir) / where.split()[0] / "bad_batch.pt"
        save_whole({name: x.cpu() for name, x in batch.items()}, path)
        bad = [name for name, x in batch.items() if x.is_floating_point() and not x.isfinite().all()]
        stop(f"{where}: {', '.join(['the gradient', *bad])}: not finite; no step was taken. The batch is in {path}", 3)
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


# ---- 7. The stages -----------------------------------------------------------------------------------------------------------
def fit(stage, modules, loss_of, s, tokenizer):  # SFT, reward model, DPO; loss_of(batch) -> [loss] or [loss, accuracy]
    source, kind, fields, T = s.preference_dataset, "pairs", ["chosen", "rejected"], s.preference_length
    if stage == "sft":
        source, kind, fields, T = s.dataset, "reference", ["reference"], s.response_length
    rows, lr, size = load_rows(source, kind, s.seed)[0], getattr(s, f"{stage}_lr"), getattr(s, f"{stage}_batch_size")
    updates = (s.updates if stage == "dpo" else getattr(s, f"{stage}_steps")) or max(1, len(rows) // size)
    for update, optimizer, metrics in training(stage, updates, lr, torch.nn.ModuleDict(modules), s):
        batch = encode(draw(rows, size, update, s.seed, stage), fields, s, tokenizer, T)
        weighed, figures = whole(batch) if stage == "sft" else batch, torch.zeros(1 + (kind == "pairs"), device=s.device)
        for i, part in micro_batches(weighed, s.micro_batch, kind == "pairs"):
            loss, *accuracy = loss_of(part)
            share = len(i) / size if kind == "pairs" else part["response_len"].sum() / weighed["response_len"].sum()
            (loss * share).backward()  # sums to the mean over the batch: over pairs, in SFT over tokens
            figures += torch.stack([loss.detach(), *accuracy]) * share
        metrics |= dict(zip(("loss", "accuracy"), summed(figures).tolist()))
        metrics["grad_norm"] = step(optimizer, s, f"{stage} update {update + 1}", batch)


def train_sft(s):  # supervised fine-tuning: cross-entropy over query and response, as in C's sft.py
    tokenizer, begun = load(AutoTokenizer, s.tokenizer or s.model, s), Path(s.run_dir, "sft", "checkpoint.pt").exists()
    network = load_network(s.model, s, trained=not s.supervised_lora_r)
    config, longest = network.config.get_text_config(), s.query_length + max(s.response_length, s.preference_length)
    with blame(f"--model {s.model} or --rm_model {s.rm_model}: cannot be a reward model or trained with LoRA (use --lora_r 0)"):
        rm_config = load(transformers.AutoConfig, s.rm_model, s).get_text_config() if s.rm_model else config
        with torch.device("meta"):  # tried before anything trains
            _ = AutoModelForSequenceClassification.from_config(rm_config).score
        add_lora(network, s.lora_r, s.seed, "trial").unload().requires_grad_(True) if s.lora_r else None
    room = min(getattr(x, f"{key}max_position_embeddings", math.inf) for x in (config, rm_config) for key in ("", "original_"))
    if getattr(tokenizer, "eos_token_id", None) is None:
        stop(f"--tokenizer {s.tokenizer or s.model}: is no tokenizer, or has no end-of-text token")
    known, sampled = min(config.vocab_size, rm_config.vocab_size), max(config.vocab_size, len(tokenizer))
    if known < sampled or longest > room:
        stop(f"--model {s.model} or --rm_model: {room} positions for {longest}, {known} tokens for {sampled} needed")
    if shutil.disk_usage(s.run_dir).free < network.num_parameters() * (4 if s.supervised_lora_r else 16 if begun else 28):
        stop(f"--run_dir {s.run_dir}: too little room on the disk for the model and two checkpoints of SFT")
    if tokenizer.pad_token in (None, tokenizer.eos_token) and len(tokenizer) < config.vocab_size:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # apart from EOS, in a spare row of the embedding
    network.config.update(ends := {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id})
    network.generation_config = transformers.GenerationConfig(**ends)
    network = add_lora(network, s.supervised_lora_r, s.seed, "sft") if s.supervised_lora_r else network
    fit("sft", {"policy": network}, lambda x: [-sequence_logprobs(network, x).sum() / x["response_len"].sum()], s, tokenizer)
    save_network(network, tokenizer, Path(s.run_dir) / "sft")
    rows = few(load_rows(s.dataset, "reference", s.seed)[1], s.eval_samples, s, "eval")
    losses = per_row(lambda x: -sequence_logprobs(network, whole(x)), rows, None, s, tokenizer)
    counts = per_row(lambda x: whole(x)["response_len"], rows, None, s, tokenizer)
    texts = tokenizer.batch_decode(sample(network, rows, s, tokenizer, s.eval_temperature), skip_special_tokens=True)
    return {"held_out_loss": (losses.sum() / counts.sum()).item(), "rouge_l": mean(rouge(texts, rows, "rougeL"))}


def train_rm(s):  # Alg. 1, line 1: the SFT network with a scalar head read at the last token, fitted by Eq. (1)
    tokenizer, start = load(AutoTokenizer, f"{s.run_dir}/sft", s), s.rm_model or f"{s.run_dir}/sft"
    model = load_network(start, s, AutoModelForSequenceClassification, not s.supervised_lora_r, num_labels=1)
    weight = torch.randn(model.score.weight.shape, generator=generator(s.seed, "rm head"))
    head = scalar_head(weight.to(s.device) / math.sqrt(weight.shape[1] + 1))  # N+ detail 11
    head.weight.requires_grad_(True)  # not the bias: Eq. (1) sees differences only
    backbone = add_lora(model.base_model, s.supervised_lora_r, s.seed, "rm") if s.supervised_lora_r else model.base_model

    def loss_of(part):
        chosen, rejected = end_scores(backbone, head, part).chunk(2)
        centring = s.rm_center * ((chosen + rejected) ** 2).mean()  # as center_rewards_coefficient in TRL
        return bradley_terry_loss(chosen, rejected) + centring, (chosen > rejected).float().mean()

    fit("rm", {"reward": backbone, "head": head}, loss_of, s, tokenizer)
    backbone, model = backbone.float().merge_and_unload() if s.supervised_lora_r else backbone, model.float()
    model.score.weight.data.copy_(head.weight)
    score, references = functools.partial(end_scores, backbone, head), load_rows(s.dataset, "reference", s.seed)[0]
    model.config.reward_bias = per_row(score, few(references, 2048, s, "bias"), None, s, tokenizer).mean().item()
    model.config.pad_token_id = None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id
    save_network(model, tokenizer, Path(s.run_dir) / "rm")
    pairs, by_batch = few(load_rows(s.preference_dataset, "pairs", s.seed)[1], 2000, s, "rm held out"), {}
    responses = [encode_response(pair[x], tokenizer, s.preference_length) for x in ("chosen", "rejected") for pair in pairs]
    hits = torch.gt(*per_row(score, pairs * 2, responses, s, tokenizer).chunk(2)).tolist()
    for hit, pair in zip(hits, pairs):  # N+ detail 16: accuracy differs by labelling batch
        by_batch.setdefault(str("all" if pair["batch"] in (None, "") else pair["batch"]), []).append(hit)
    by_batch = {name: {"accuracy": mean(of_batch), "pairs": len(of_batch)} for name, of_batch in by_batch.items()}
    return {"accuracy": mean(hits), "accuracy_ci95": wilson(hits), "pairs": len(hits), "accuracy_by_batch": by_batch}


def train_dpo(s):  # direct preference optimization, from the SFT network, on the pairs of the reward model
    tokenizer, network = load(AutoTokenizer, f"{s.run_dir}/sft", s), load_network(f"{s.run_dir}/sft", s, trained=not s.lora_r)
    policy, reference = twin(network, s, "dpo")

    def loss_of(part):
        loss, margins = dpo_loss(*[x for n in (policy, reference) for x in sequence_logprobs(n, part).chunk(2)], s.dpo_beta)
        return loss, (margins > 0).float().mean()

    fit("dpo", {"policy": policy}, loss_of, s, tokenizer)
    save_network(policy, tokenizer, Path(s.run_dir) / "dpo")


def build_roles(sft_network, reward_model, s):  # SFT network, (backbone, head) -> the four roles; RLOO has no critic
    roles = SimpleNamespace(reward=reward_model[0], reward_head=reward_model[1], critic=None, value_head=None)
    roles.policy, roles.reference = twin(sft_network, s, "policy")
    if s.advantages == "gae":  # the critic starts as the reward model, head and all (N+ detail 22)
        roles.critic, roles.reward = twin(roles.reward, s, "critic")
        roles.value_head = copy.deepcopy(roles.reward_head).requires_grad_(True)
    return roles


def train_drpo(s, stage="drpo"):  # Algorithm 1 with PPO as its policy optimizer; PPO itself is this function at beta = 0
    references, held_out = load_rows(s.dataset, "reference", s.seed)
    s, pairs = s if stage == "drpo" else dataclasses.replace(s, beta=0.0), load_rows(s.preference_dataset, "pairs", s.seed)[0]
    rows = [row | {"reference": row["chosen"]} for row in pairs] if s.reset_to == "chosen" else references  # D_TR, and prompts
    tokenizer, network = load(AutoTokenizer, f"{s.run_dir}/sft", s), load_network(f"{s.run_dir}/sft", s, trained=not s.lora_r)
    roles = build_roles(network, load_reward(f"{s.run_dir}/rm", s), s)
    own, checked = (roles.reward, roles.reward_head), few(references, 256, s, "check")
    scores = per_row(functools.partial(end_scores, *own), checked, None, s, tokenizer)
    error = scores.std(correction=0).item() / math.sqrt(len(scores))
    tqdm.write(f"check: SFT references score {scores.mean():.2f} +- {error:.2f} (standard error); it should be 0")
    if not abs(scores.mean()) < 5 * error + (1e-4 if s.dtype == "float32" else 0.1):
        stop("the reward model does not see the references as it was trained on them", 3)
    modules = torch.nn.ModuleDict({name: getattr(roles, name) for name in ("policy", "critic", "value_head")})
    held_out, judge = few(held_out, 100, s, "eval"), find_judge(s, tokenizer, own) if s.eval_every else None
    for update, optimizer, metrics in training(stage, s.updates or max(1, len(rows) // s.batch_size), s.lr, modules, s):
        metrics |= drpo_update(roles, optimizer, rows, update, tokenizer, s, f"{stage} update {update + 1}")
        if s.eval_every and (update + 1) % s.eval_every == 0:
            columns = rate(roles.policy, roles.reference, own, judge, held_out, s, tokenizer)
            metrics |= {f"held_out_{name}": mean(column) for name, column in columns.items() if name != "response"}
    save_network(roles.policy, tokenizer, Path(s.run_dir) / stage)


def drpo_update(roles, optimizer, rows, update, tokenizer, s, where):  # Alg. 1, lines 3 to 6 -> metrics, all floats
    B, T, is_gae, laps = s.batch_size, s.response_length, s.advantages == "gae", [lap(s)]
    tolerance = 1e-4 if s.dtype == "float32" else 1.0 if s.compile else 0.1  # nats: above what rounding does
    batch = reset_rollouts(roles, rows, update, tokenizer, s)  # lines 3 and 4
    has_eos, mask = batch["has_eos"], token_mask(batch["reset_len"], batch["response_len"], T)
    laps.append(lap(s))
    with torch.no_grad():  # line 5: reward and log-ratio of every step; ln pi is that of a training pass, not the sampler's
        logprobs, ref_logprobs, entropy, values = of_steps = torch.zeros(4, B, T, device=s.device)  # views
        scores = torch.zeros(B, device=s.device)
        for i, part in micro_batches(batch, s.micro_batch):
            logprobs[i], entropy[i] = response_logprobs(roles.policy, part, mask[i], s.temperature)
            ref_logprobs[i], _ = response_logprobs(roles.reference, part, mask[i], s.temperature)
            scores[i] = end_scores(roles.reward, roles.reward_head, part)
            values[i] = response_values(roles.critic, roles.value_head, part, mask[i]) if is_gae else 0.0
        summed(of_steps), summed(scores)  # in place
        kl, reset_share = log_ratio(logprobs, ref_logprobs, mask), (batch["reset_len"] > 0).float().mean().item()
        if update == 0:  # self-checks; slack: five standard errors and one of n draws; the flags below allow empty resets
            drift = kl.abs().max().item()
            tqdm.write(f"check: {reset_share:.2f} of rollouts are resets, beta {s.beta:g}; |ln pi - ln pi_SFT| <= {drift:.1e}")
            slack = 5 * math.sqrt(s.beta * (1 - s.beta) / (n := B if is_gae else B // s.group)) + (0 < s.beta < 1) / n + 1e-6
            if not s.reset_include_prompt and s.reset_to != "sft" and abs(reset_share - s.beta) > slack:
                stop(f"{where}: resets do not happen as often as beta says", 3)
            if not drift < tolerance:
                stop(f"{where}: the reference is not the SFT network that the policy starts from", 3)
        scores = torch.where(has_eos, scores, s.missing_eos_score)
        if is_gae:
            rewards = penalised_rewards(scores, logprobs, ref_logprobs, mask, s.kl_coef)
            rewards = masked_whiten(rewards, mask, shift_mean=False) if s.whiten_rewards else rewards
            raw_advantages, returns = gae(rewards, values, mask, s.gamma, s.lam)
        else:
            raw_advantages = rloo_advantages(scores - s.kl_coef * kl.sum(1), s.group)[:, None].expand(B, T)
        advantages = masked_whiten(raw_advantages, mask)
    laps.append(lap(s))
    dump = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values, "scores": scores, "advantages": advantages}
    new_logprobs, new_values = torch.zeros(2, s.epochs, B, T, device=s.device)
    for epoch in range(s.epochs):  # line 6: PPO, each epoch one step on the whole batch
        for i, part in micro_batches(batch, s.micro_batch):
            new_logprobs_i, _ = response_logprobs(roles.policy, part, mask[i], s.temperature)
            loss, _ = ppo_policy_loss(new_logprobs_i, logprobs[i], advantages[i], mask[i], s.cliprange)
            new_logprobs[epoch, i] = new_logprobs_i.detach()
            if is_gae:
                new_values_i = response_values(roles.critic, roles.value_head, part, mask[i])
                loss += s.vf_coef * ppo_value_loss(new_values_i, values[i], returns[i], mask[i], s.cliprange_value)[0]
                new_values[epoch, i] = new_values_i.detach()
            (loss * mask[i].sum() / mask.sum()).backward()  # summed over micro-batches: the mean over all tokens of the batch
        drift = log_ratio(summed(new_logprobs[epoch]), logprobs, mask).abs().max().item()  # summed in place
        if epoch == 0 and drift > tolerance:  # False for NaN, which `step` catches
            stop(f"{where}: the policy differs from the one that was scored by {drift:.1e} nats before any step", 3)
        norm = step(optimizer, s, where, batch | dump)
    laps.append(lap(s))
    m = mask.expand(s.epochs, B, T)  # losses and ratios: means over the epochs
    pg_loss, clipfrac = ppo_policy_loss(new_logprobs, logprobs, advantages, m, s.cliprange)
    log_rho = log_ratio(new_logprobs, logprobs, m)[m]
    metrics = {"score": scores.mean(), "kl": kl.sum(1).mean(), "entropy": masked_mean(entropy, mask), "grad_norm": norm}
    metrics |= {"loss": pg_loss, "pg_loss": pg_loss, "clipfrac": clipfrac, "reset_share": reset_share}
    metrics |= {"ratio": log_rho.exp().mean(), "approx_kl": (log_rho.expm1() - log_rho).mean(), "tokens_decoded": mask.sum()}
    metrics |= {"response_tokens": batch["response_len"].float().mean(), "eos_rate": has_eos.float().mean()}
    if is_gae:
        vf_loss, vf_clipfrac = ppo_value_loss(summed(new_values), values, returns, m, s.cliprange_value)
        metrics |= {"vf_loss": vf_loss, "vf_clipfrac": vf_clipfrac, "loss": pg_loss + s.vf_coef * vf_loss}
        metrics["explained_variance"] = 1 - raw_advantages[mask].var() / returns[mask].var()
    for phase, (start, _), (end, gb) in zip(("rollout", "score", "update"), laps, laps[1:]):
        metrics |= {f"seconds_{phase}": end - start} | ({f"gb_{phase}": gb} if gb else {})
    return {name: float(value) for name, value in metrics.items()}


def lap(s):  # -> the time when all work is done, and the most GB that the GPU held since the last lap (0 on a CPU)
    if not s.device.startswith("cuda"):
        return time.perf_counter(), 0.0
    torch.cuda.synchronize(s.device)
    peak = torch.cuda.max_memory_allocated(s.device) / 1e9
    torch.cuda.reset_peak_memory_stats(s.device)
    return time.perf_counter(), peak


# ---- 8. Evaluation: every finished method on the same held-out prompts -------------------------------------------------------
@torch.no_grad()
def per_row(function, rows, responses, s, tokenizer):  # function(batch) -> (B,), over all rows (responses None: references)
    T, out = max(s.response_length, s.preference_length), torch.zeros(len(rows))
    queries = [encode_query(row["prompt"], tokenizer, s.query_length) for row in rows]
    batch = collate(queries, responses or [encode_response(row["reference"], tokenizer, T) for row in rows], T, s.device)
    for index, part in micro_batches(batch, s.micro_batch):
        out[index.cpu()] = function(part).float().cpu()
    return summed(out)


def rouge(texts, rows, kind):  # -> F1 with stemming; None if most letters of a reference are not ASCII: ROUGE drops them
    score = importlib.import_module("rouge_score.rouge_scorer").RougeScorer([kind], use_stemmer=True).score
    known = [mean(letter.isascii() for letter in row["reference"] if letter.isalpha()) or 0 for row in rows]
    return [score(x["reference"], text)[kind].fmeasure if share > 0.5 else None for x, text, share in zip(rows, texts, known)]


def mean(values):  # of those that are not None; None if there are none
    return sum(known) / len(known) if (known := [float(value) for value in values if value is not None]) else None


def wilson(wins, z=1.96):  # (1, 0, ties 0.5, None undecided) -> the 95 % interval [low, high] of their share, or None
    p, n = mean(wins), sum(win is not None for win in wins)
    if n == 0:
        return None
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))]


def find_judge(s, tokenizer=None, own=None):  # -> judge(prompts, a, b) -> [P(a is preferred) or None, ...], or a reward model
    folder = Path(s.judge[3:] or s.run_dir, "rm")  # a reward model is (backbone, head); own: this run's, for --judge rm
    if s.judge == "rm" or (s.judge.startswith("rm:") and (folder / "config.json").exists()):
        if tokenizer and load(AutoTokenizer, str(folder), s).get_vocab() != tokenizer.get_vocab():
            stop(f"--judge {s.judge}: its reward model has another tokenizer")
        return load_reward(folder, s) if s.judge != "rm" and tokenizer else own
    with blame(f"--judge {s.judge}"):
        judge = resolve(s.judge) or stop(f"--judge {s.judge}: is not rm, rm:RUN_DIR or module:function. API: tools/judge.py")
    return judge if not world()[0] else lambda prompts, *_: [None] * len(prompts)  # one process asks


@torch.no_grad()
def rate(network, sft, reward_model, judge, rows, s, tokenizer):  # -> {figure: a list over rows}, from the bare prompts
    measure, eos = functools.partial(per_row, rows=rows, s=s, tokenizer=tokenizer), tokenizer.eos_token_id

    def scores_of(model, responses):  # of token ids; a response that does not end scores as in training
        ended = torch.tensor([ids[-1] == eos for ids in responses])
        return torch.where(ended, measure(functools.partial(end_scores, *model), responses=responses), s.missing_eos_score)

    responses, warm = [sample(network, rows, s, tokenizer, t) for t in (s.eval_temperature, s.temperature)]
    texts = [text.strip() for text in tokenizer.batch_decode(responses, skip_special_tokens=True)]
    if isinstance(judge, tuple):
        gap = scores_of(judge, responses) - measure(functools.partial(end_scores, *judge), responses=None)
        wins = ((torch.sign(gap) + 1) / 2).tolist()
    else:
        wins = [p if p is None else float(p) for p in judge([x["prompt"] for x in rows], texts, [x["reference"] for x in rows])]
    columns = {"response": texts, "win_rate": wins, "rm_score": scores_of(reward_model, responses).tolist()}
    log_pi, log_sft = [measure(lambda x: sequence_logprobs(n, x, s.temperature), responses=warm) for n in (network, sft)]
    columns |= {"kl": (log_pi - log_sft).tolist(), "kl_rm_score": scores_of(reward_model, warm).tolist()}
    return columns | {"response_tokens": list(map(len, responses)), "eos_rate": [int(ids[-1] == eos) for ids in responses]}


def evaluate(s):  # -> samples.jsonl, report.json: win rate over references (tie: 0.5), RM score, KL, ROUGE, length, EOS rate
    run, tokenizer = Path(s.run_dir), load(AutoTokenizer, f"{s.run_dir}/sft", s)
    sft, reward_model, done = load_network(f"{run}/sft", s, trained=not s.lora_r), load_reward(run / "rm", s), results(run)
    judge, uses = find_judge(s, tokenizer, reward_model), {x: json.loads((run / x / "settings.json").read_text()) for x in done}
    rows = few(load_rows(s.dataset, "reference", seed := uses["sft"]["seed"])[1], s.eval_samples, s, "eval")  # of its split
    for method, other in ((x, y) for x in USES if x in done for y in NEEDS[x] if uses[x][y] != done[y]["seconds"]):
        stop(f"{run / method} was trained on another {run / other}: delete it, and train it anew")
    if unlike := {k: v for x in uses.values() for k, v in x.items() if k != "beta" and getattr(s, k, v) != v}:
        print(f"eval: training had other settings: {unlike}")
    samples = [{"prompt": row["prompt"], "reference": row["reference"]} for row in rows]
    for method in tqdm([stage for stage in USES if stage != "rm" and stage in done], desc="eval", unit="method"):
        is_lora = method != "sft" and (adapter := run / method / "adapter").exists()  # as in training: applied, or all float32
        network = sft if method == "sft" else load_network(f"{run}/{'sft' if is_lora else method}", s, trained=not is_lora)
        network = importlib.import_module("peft").PeftModel.from_pretrained(network, adapter) if is_lora else network
        columns = rate(network, sft, reward_model, judge, rows, s, tokenizer)
        columns |= {f"rouge_{kind.lower()}": rouge(columns["response"], rows, f"rouge{kind}") for kind in "12L"}
        for row, *values in zip(samples, *columns.values(), strict=True):
            row[method] = dict(zip(columns, values))
    if world()[0] == 0:
        seen = {row["prompt"] for row in load_rows(s.preference_dataset, "pairs", seed)[0]}
        print(f"eval: {sum(row['prompt'] in seen for row in rows)} of {len(rows)} prompts also stand in the preference data")
        write_report(run, samples, dataclasses.asdict(s), s.judge)


def results(run):  # -> {stage: what it returned, and its seconds}, of all finished stages
    return {path.parent.name: json.loads(path.read_text()) for path in Path(run).glob("*/result.json")}


def write_report(run, samples, settings, judge):  # samples.jsonl, report.json and a table; tools/ adds figures
    done, text, tables = results(run), [], Path(__file__).parent / "tools" / "report.py"
    seconds = {stage: done[stage].pop("seconds") for stage in USES if stage in done}
    report = {"judge": judge, "prompts": len(samples), "settings": settings, "seconds": seconds, "methods": {}}
    for name in [name for name in USES if name in samples[0]]:
        columns = {key: [row[name][key] for row in samples] for key in samples[0][name] if key != "response"}
        of = report["methods"][name] = {key: mean(column) for key, column in columns.items()}
        of["win_rate_ci95"] = wilson(columns["win_rate"])
        text.append(f"{name:5}" + "".join(f"   {key} {x:.3f}" for key, x in of.items() if isinstance(x, float)))
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples), encoding="utf-8")
    save_whole(report | {"sft": done["sft"], "rm": done["rm"]}, run / "report.json")
    print(importlib.import_module("tools.report").write(run) if tables.exists() else "\n".join(text))


# ---- 9. Running --------------------------------------------------------------------------------------------------------------
STAGES = {"sft": train_sft, "rm": train_rm, "dpo": train_dpo, "ppo": lambda s: train_drpo(s, "ppo"), "drpo": train_drpo}
NEEDS = {"sft": [], "rm": ["sft"], "dpo": ["sft"], "ppo": ["sft", "rm"], "drpo": ["sft", "rm"], "eval": ["sft", "rm"]}


def inputs(stage, s):  # -> {name: value}: all that the stage depends on; stops where it was begun with something else
    path, done, block, new = Path(s.run_dir, stage, "settings.json"), results(s.run_dir), "", {}
    for name, value in vars(dataclasses.replace(s, beta=0.0) if stage == "ppo" else s).items():
        block = BLOCKS.get(name, block)
        new |= {name: value} if block in USES.get(stage, "").split() else {}
    for name, kind in [("dataset", "reference"), ("preference_dataset", "pairs")][: 1 if stage == "sft" else 2]:
        new[f"rows of {name}"] = hashlib.sha256(repr(load_rows(getattr(s, name), kind, s.seed)).encode()).hexdigest()[:16]
    new |= {x: done[x]["seconds"] if x in done else None for x in NEEDS[stage]}  # a fingerprint of that run; None: yet to come
    new |= {x.name: x.stat().st_mtime for x in Path({"sft": s.model, "rm": s.rm_model}.get(stage) or "-").glob("*.safetensors")}
    old = json.loads(path.read_text()) if path.exists() and (stage in done or path.with_name("checkpoint.pt").exists()) else new
    if changed := [f"{name} was {old.get(name)}, is {new[name]}" for name in new if old.get(name) != new[name]]:
        stop(f"{path.parent} was made with other settings ({'; '.join(changed)}): name another --run_dir or delete it")
    return new


def preflight(stages, s):  # what a later stage needs is tried before the first one trains; train_sft tries the model
    with blame(f"--run_dir {s.run_dir}, --device {s.device} or the installation"):
        torch.empty(0, device=s.device)
        Path(s.run_dir).mkdir(parents=True, exist_ok=True)
        rouge([], [], "rougeL") if {"sft", "eval"} & {*stages} else None  # imports its package
    for i, stage in enumerate(stages):
        for needed in (x for x in NEEDS[stage] if x not in [*stages[:i], *results(s.run_dir)]):
            stop(f"{stage} needs {s.run_dir}/{needed}; train {needed} first, with the same --preset, --run_dir and settings")
        inputs(stage, s)
    if {"ppo", "drpo", "eval"} & {*stages} and (judge := find_judge(s)):  # a function, tried on one row
        row = load_rows(s.dataset, "reference", s.seed)[1][0]
        with blame(f"--judge {s.judge}"):
            (_,) = judge([row["prompt"]], [row["reference"]], [row["reference"]])  # as many verdicts as pairs


def run_stage(stage, s):  # a finished stage is kept, an interrupted one resumes; both only with the same inputs
    folder, new, began = Path(s.run_dir, stage), inputs(stage, s), time.perf_counter()
    if stage in results(s.run_dir):
        return print(f"{stage}: finished, and kept (delete {folder} to train it anew)")
    save_whole(new, folder / "settings.json")
    figures = {**(STAGES[stage](s) or {}), "seconds": time.perf_counter() - began}
    save_whole(figures, folder / "result.json")
    print(f"{stage}:", ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if isinstance(value, float)))
    dist.barrier() if world()[1] > 1 else None


def parse(argv):  # -> (stage, Settings): command line, preset, defaults. A --model that is named has its own tokenizer
    parser = transformers.HfArgumentParser(Settings, prog="drpo.py", allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("stage", nargs="?", default="all", help="sft, rm, dpo, ppo, drpo, eval or all")
    parser.error = stop
    given = {"preset": "tiny", "model": ":"} | dict(re.findall(r"(?<!\S)--(preset|model)[= ](\S+)", " ".join(argv)))
    parser.set_defaults(**PRESETS.get(given["preset"], {}) | ({} if ":" in given["model"] else {"tokenizer": ""}))
    s, rest, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown or rest.stage not in [*STAGES, "eval", "all"]:
        stop(f"nothing takes {' '.join(unknown) or rest.stage}; see --help")
    return rest.stage, s


def main(argv=None):
    sys.path.append(os.getcwd())  # for module:function
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    stage, s = parse(sys.argv[1:] if argv is None else argv)
    stages, on_cuda = [*STAGES, "eval"] if stage == "all" else [stage], s.device.startswith("cuda")
    if "LOCAL_RANK" in os.environ:  # torchrun. 12 x 30 minutes: one process asks the judge, and the others wait
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) if on_cuda else None
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=12 * dist.default_pg_timeout)
        sys.stdout = sys.stdout if dist.get_rank() == 0 else open(os.devnull, "w")
    runs = [dataclasses.replace(s, seed=seed, run_dir=f"{s.run_dir}/seed_{seed}") for seed in s.seeds] or [s]
    try:
        for one in runs:
            preflight(stages, one)
        for one, name in [(one, name) for one in runs for name in stages]:
            with precision(one):
                evaluate(one) if name == "eval" else run_stage(name, one)
        dist.destroy_process_group() if world()[1] > 1 else None
    except KeyboardInterrupt:
        stop("interrupted; the same command resumes from the last checkpoint", 130)
    except Exception as error:  # a full disk, as Python, torch and safetensors tell it
        if not isinstance(error, OSError) and not re.search("No space left|failed writing|unexpected pos", str(error)):
            raise
        stop(f"{s.run_dir}: {error}; what was saved before is whole, and the same command resumes from there", 3)


if __name__ == "__main__":
    main()
