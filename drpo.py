"""DR-PO, Dataset Reset Policy Optimization for RLHF (Chang et al. 2024, arXiv 2404.08495), in one file.

DR-PO is PPO with one change. PPO starts every rollout at the prompt. DR-PO starts a share beta of them further on: at the
prompt plus a random prefix of a response that a person wrote, a state that the offline data is known to cover. The policy
finishes the response, and only what it wrote itself is learned from. `ppo` here is `drpo` with beta = 0, and nothing else.

    python drpo.py                       all stages on a toy corpus, on a laptop CPU, in minutes
    python drpo.py all --preset tldr     the paper's TL;DR run: Pythia-2.8B, LoRA, one GPU
    python drpo.py STAGE [--preset P] [--run_dir DIR] [settings]      STAGE = sft | rm | drpo | ppo | dpo | eval | all

What the method does not depend on is in tools/: `running` (the loop around a stage's updates, with optimizer and checkpoints;
several processes), `models` (loading and saving), `data` (where rows come from), and whatever measures, draws and checks.

Algorithm 1 of the paper, and where each line is:

    input   preference pairs D_R, unlabelled responses D_TR, policy pi_SFT                 load_rows, train_sft
    1       fit the reward r on D_R by maximum likelihood, Eq. (1)                         train_rm, bradley_terry_loss
    2       pi_1 = pi_SFT;  for t = 1..T, each a `drpo_update`:                            train_drpo, twin, training
    3         draw a response from D_TR and a step h of it                                 reset_rollouts, sample_reset_lengths
    4         reset to s_h (prompt + prefix), roll out pi_t to the end                     reset_rollouts, rollout
    5         store the steps h' >= h only: state, action, r, ln(pi_t/pi_SFT)              token_masks, penalised_rewards
    6         pi_{t+1} = PO(pi_t, D_on); here PO is PPO                                    gae, ppo_policy_loss, ppo_value_loss

How one row stands in memory (Q = 6 columns of query, T = 6 of response, a reset of 2 tokens, EOS sampled at t = 4):

    column          0   1   2   3   4   5     6   7   8   9   10  11
    token           .   .   q   q   q   q  |  r   r   a   a   EOS .        . = padding, never attended to or learned from
                    padding, then query    |  reset   sampled     padding
    t (response)                              0   1   2   3   4   5
    logits, value   those for step t are read one column to the left: at t = 0, at the last query token
    mask                                      0   0   1   1   1   0        what the policy itself did: `token_masks`
    reset_len = 2, response_len = 5
    rewards                                   0   0  -kl -kl -kl+score     `penalised_rewards`
    advantages                                0   0   A   A   A   0        `gae`, whitened over the mask
    A pass over whole rows sees no padding: it reads them as one long row, one after another (`packed`).

Differences from the paper (P) and from the official code (C, github.com/Cornell-RL/drpo); README.md gives them all. N+ is the
list of implementation details in Huang et al. 2024, arXiv 2403.17031:

    1  one mask, the sampled tokens up to EOS, in every term: Alg. 1 stores just those. C leaves the prefix out of the policy
       loss only, and what follows EOS out of nothing; `--masking official` does that
    2  prefixes are of 1..n tokens, n without EOS, as in C; with `--reset_include_prompt` of 0..n, as in P, Alg. 3
    3  the prefix is fed with the prompt: a reset saves decoding steps. C forces it token by token; same distribution
    4  a response without EOS scores -1. C looks for padding instead, and so punishes an EOS in the very last place
    5  references score 0 on average, read at their EOS, or where one is cut at its last token. C reads that bias at the wrong
       place in left-padded prompts
    6  losses are means over all tokens of the batch, for PPO and DR-PO alike. C averages means of micro-batches, over all
       positions in PPO and the free ones in DR-PO, so that the two weigh the value loss differently
    7  every draw depends on seed and update number alone, the resets too; C's resets are unseeded
    8  the critic's head is trained (frozen in C, under peft); schedules are linear to 0 as in P (cosine in C)
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
from rouge_score.rouge_scorer import RougeScorer
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, HfArgumentParser

from tools import static_cache
from tools.data import load_rows
from tools.kv_cache import gaps_filled, roomy_cache
from tools.models import body_and_head, last_logits, load_network, load_reward, load_tokenizer, save_network, scalar_head
from tools.packing import row_states
from tools.token_logprobs import token_logprobs

# share: this process's part of a list; summed: in place, over the processes; step: the optimizer's, on the summed gradients
from tools.running import check_ranges, exchanged, join, precision, prepare, refuse_if_changed, relevant  # isort: skip
from tools.running import share, step, stop, summed, training, wait_for_all, world  # isort: skip

# ----------------------------------------------------------------------------------------------------------------------
# 1. Settings. A field's default is that of the paper's TL;DR run (Table 5); what the command line does not give comes from the
# preset first, which is `tiny` where none is named.


def setting(part, default, help):
    """A field of Settings. `part` says which stages it bears on (USES in tools/running.py)."""
    value = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**value, metadata={"help": f"[{part}] {help}"})


@dataclass
class Settings:
    preset: Literal["tiny", "tldr", "hh", "cnndm"] = setting("run", "tiny", "which set of defaults")
    run_dir: str = setting("run", "", "where everything is written; empty: runs/PRESET, with --seeds runs/PRESET_seeds")
    seeds: list[int] = setting("run", [], "repeat with each of these seeds in RUN_DIR/seed_K, then tabulate mean and range")
    micro_batch: int = setting("run", 8, "rows per pass (4 times as many in rollouts): memory and speed; only rounding differs")
    checkpoint_activations: bool = setting("run", False, "memory for time: layers are computed anew in the backward pass")
    static_cache: bool = setting("run", False, "decode into a cache of fixed size; on a GPU a step is then one CUDA graph")
    check_rollouts: bool = setting("run", False, "to debug: hold every token drawn against a plain forward pass")
    save_every: int = setting("run", 100, "updates between checkpoints; the last update is always kept")
    keep: int = setting("run", 1, "how many of the newest checkpoints stay on the disk")
    fresh: bool = setting("run", False, "start over: what the stages and those after them left is deleted, once you say yes")
    device: str = setting("run", "auto", "cpu, cuda, cuda:1 ...; auto takes cuda where there is one")

    seed: int = setting("data", 0, "of everything random: data, weights, order, resets, sampling")
    model: str = setting("data", "EleutherAI/pythia-2.8b-deduped", "Hub name, folder, .gguf file or module:function")
    tokenizer: str = setting("data", "", "the same, where it is not the model's own")
    dataset: str = setting(
        "data",
        "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144",
        "prompts and references: Hub name[:config], file, folder or module:function",
    )
    preference_dataset: str = setting(
        "data",
        "vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144",
        "preference pairs, from the same kinds of places",
    )
    dtype: Literal["bfloat16", "float32"] = setting("data", "bfloat16", "of products, and of networks under LoRA")
    query_length: int = setting("data", 512, "tokens of a prompt; a longer post is cut at its last newlines")
    response_length: int = setting("data", 53, "tokens of a response with its EOS, in SFT and rollouts")
    preference_length: int = setting("data", 169, "tokens of a response with its EOS in a preference pair")
    max_grad_norm: float = setting("data", 0.0, "gradient norm is clipped to this in every stage; 0: never, as in C")
    supervised_lora_r: int = setting("data", 0, "LoRA rank in SFT and reward model; 0 trains all weights, as the paper does")

    sft_steps: int = setting("sft", 0, "updates of SFT; 0: one epoch")
    sft_lr: float = setting("sft", 3e-6, "learning rate of SFT, linear to 0")
    sft_batch_size: int = setting("sft", 64, "rows per update of SFT")

    rm_steps: int = setting("rm", 0, "updates of the reward model; 0: one epoch")
    rm_lr: float = setting("rm", 3e-6, "learning rate of the reward model, linear to 0")
    rm_batch_size: int = setting("rm", 64, "pairs per update of the reward model")

    updates: int = setting("policy", 0, "updates of drpo, ppo and dpo; 0: one epoch")
    lora_r: int = setting("policy", 1024, "LoRA rank of policy and critic, alpha = 2r; 0 trains all weights")

    batch_size: int = setting("rl", 512, "rollouts per update of drpo and ppo")
    lr: float = setting("rl", 3e-6, "learning rate of policy and critic, linear to 0; too high and both collapse at once")
    beta: float = setting("rl", 1.0, "probability that a rollout starts from a reset; 0 is PPO, the paper runs 1")
    reset_to: Literal["reference", "chosen"] = setting("rl", "reference", "along SFT's reference, or a pair's chosen response")
    reset_include_prompt: bool = setting("rl", False, "prefixes of 0..n tokens, not 1..n: Alg. 3; see Differences, 2")
    masking: Literal["sampled", "official"] = setting("rl", "sampled", "which tokens the losses see; see Differences, 1")
    temperature: float = setting("rl", 0.7, "of rollouts, log-probabilities and KL in drpo and ppo; below 1 it sharpens")
    epochs: int = setting("rl", 4, "passes over each batch of rollouts; more is sample-efficient until approx_kl grows")
    kl_coef: float = setting("rl", 0.05, "price per nat of KL to the SFT policy; 0.01 - 0.2, low invites reward hacking")
    gamma: float = setting("rl", 1.0, "discount; 1 as a response is short")
    lam: float = setting("rl", 0.95, "GAE's lambda: 1 is Monte Carlo (variance), 0 trusts the critic (bias)")
    cliprange: float = setting("rl", 0.2, "PPO's epsilon; clipfrac beyond 0.3 says the steps are too large")
    cliprange_value: float = setting("rl", 0.2, "how far a value may move in one update before its loss is cut off")
    vf_coef: float = setting("rl", 0.1, "weight of the value loss: matters little, AdamW rescales, unless max_grad_norm bites")
    whiten_rewards: bool = setting("rl", True, "divide the per-token rewards by their standard deviation in the batch")
    missing_eos_score: float = setting("rl", -1.0, "score of a response that never ends")

    dpo_beta: float = setting("dpo", 0.05, "DPO's beta: small lets the policy move far from SFT")
    dpo_lr: float = setting("dpo", 3e-6, "learning rate of DPO, linear to 0")
    dpo_batch_size: int = setting("dpo", 64, "pairs per update of DPO")

    eval_samples: int = setting("eval", 600, "held-out prompts on which the methods are compared")
    eval_split: str = setting("eval", "", "the held-out split that they are from, such as test; empty: validation, if any")
    eval_temperature: float = setting("eval", 0.01, "sampling temperature of the evaluation; 0.01 is all but greedy")
    judge: str = setting("eval", "rm", "rm (the run's own: not independent!), rm:RUN_DIR, module:function or api:MODEL")
    both_orders: bool = setting("eval", False, "an API judge sees each pair twice, either text first; disagreement is a tie")
    judge_prompt: str = setting("eval", "", "file with another prompt for the API judge, such as the paper's own")
    others: list[str] = setting("eval", [], "more networks to compare: folders or Hub names, with the run's tokenizer")

    def __post_init__(self):
        self.run_dir = self.run_dir or f"runs/{self.preset}" + "_seeds" * bool(self.seeds)
        if self.device == "auto":
            self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        check_ranges(self)


# fmt: off
PRESETS = {
    "tldr": {},
    "hh": dict(model="EleutherAI/pythia-1b-deduped", dataset="Anthropic/hh-rlhf", preference_dataset="Anthropic/hh-rlhf",
               response_length=128, preference_length=256),
    "cnndm": dict(dataset="abisee/cnn_dailymail:3.0.0", query_length=1919, response_length=64),  # for eval of a tldr run
    "tiny": dict(model="toy_env:tiny_pythia", tokenizer="toy_env:bpe_tokenizer", dataset="toy_env:gate",
                 preference_dataset="toy_env:gate_pairs", judge="toy_env:gold_judge", reset_to="chosen", dtype="float32",
                 query_length=80, response_length=24, preference_length=32, lora_r=0, micro_batch=64, max_grad_norm=1.0,
                 sft_steps=600, sft_lr=3e-3, sft_batch_size=16, rm_steps=400, rm_lr=5e-4, rm_batch_size=16,
                 updates=45, batch_size=48, epochs=2, lr=1e-4, beta=0.6, kl_coef=0.1, temperature=1.0, cliprange_value=5.0,
                 whiten_rewards=False, dpo_lr=3e-4, dpo_batch_size=48,
                 eval_samples=500, eval_temperature=0.7),
}
# fmt: on
REFERENCES_FOR_BIAS, HELD_OUT_PAIRS = 2048, 2000  # rows that the reward bias and the accuracy are measured on, at most
PHASES = ("rollout", "score", "update")  # of one update of drpo and ppo, timed apart


def generator(seed, *key):
    """A CPU generator whose state depends on the seed and the key alone: a resumed run draws what it would have drawn."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# ----------------------------------------------------------------------------------------------------------------------
# 2. Data. Whatever the source, `load_rows` gives rows {prompt, reference} for SFT and RL, {prompt, chosen, rejected, batch} for
# pairs, `batch` being the one that they were labelled in, or empty.


def encode_query(prompt, tokenizer, length):
    """-> at most `length` token ids. A TL;DR post or an article that is too long loses its last line, or where there is one
    line only its last characters, again and again: OpenAI's rule; title and "TL;DR:" stay. Others lose their beginning."""
    ids = tokenizer(prompt)["input_ids"]
    head, mark, tail = prompt.rpartition("\n\nTL;DR:")
    before, label, post = head.partition("Article:" if head.startswith("Article:") else "\n\nPOST:")
    while len(ids) > length and mark and label and post:
        beyond = max(1, (len(ids) - length) // 4)  # a character is at most four tokens, its bytes
        post = post[: post.rindex("\n")] if "\n" in post else post[:-beyond]
        ids = tokenizer(before + label + post + mark + tail)["input_ids"]
    return ids[-length:]


def encode_response(text, tokenizer, length):
    """-> ids of " " + text + EOS, at most `length`; where it is cut, the EOS is lost, as in the paper's preprocessing."""
    ids = tokenizer(" " + text.strip(), add_special_tokens=False)["input_ids"]
    return ([token for token in ids if token != tokenizer.eos_token_id] + [tokenizer.eos_token_id])[:length]


def padded(queries, responses, fill, device, width=None):
    """Lists of token ids -> one batch: queries padded on the left, responses on the right, so that the first response
    token stands in the same column in every row. The fill is any valid token: masks come from lengths, never from ids.

    Returns {query (B, Q) long, query_mask (B, Q) bool, response (B, T) long, response_len (B,) long, row_len (B,) long}:
    T = `width` if given; row_len counts query and response, and is not cut at an EOS as response_len is later."""
    Q = max(map(len, queries))
    T = max(map(len, responses)) if width is None else width
    query_len, response_len = [torch.tensor([len(ids) for ids in rows], device=device) for rows in (queries, responses)]
    return {
        "query": torch.tensor([[fill] * (Q - len(ids)) + ids for ids in queries], device=device),
        "query_mask": torch.arange(Q, device=device) >= Q - query_len[:, None],
        "response": torch.tensor([ids + [fill] * (T - len(ids)) for ids in responses], dtype=torch.long, device=device),
        "response_len": response_len,
        "row_len": query_len + response_len,
    }


def encode(rows, fields, s, tokenizer, length):
    """A batch of all rows with row[fields[0]] as the response, then all of them with row[fields[1]], if there are two."""
    queries = [encode_query(row["prompt"], tokenizer, s.query_length) for row in rows]
    responses = [encode_response(row[field], tokenizer, length) for field in fields for row in rows]
    return padded(queries * len(fields), responses, tokenizer.eos_token_id, s.device)


def response_mask(batch):
    """(B, T) bool: the tokens of the response, EOS included."""
    return torch.arange(batch["response"].shape[1], device=batch["response"].device) < batch["response_len"][:, None]


def micro_batches(batch, s):
    """Yields (row indices, batch of those rows), this process's, of at most `micro_batch` rows; the longest rows first, so that
    a batch that does not fit into memory fails at its beginning."""
    order = (-batch["row_len"]).argsort(stable=True)
    for rows in share(order.split(s.micro_batch)):
        yield rows, {name: x[rows] for name, x in batch.items()}


def draw(rows, size, update, seed, stream):
    """The `update`-th batch of an endless stream of epochs, each in a fresh order that depends on the seed alone."""
    at = range(update * size, (update + 1) * size)
    orders = {
        epoch: torch.randperm(len(rows), generator=generator(seed, stream, epoch)).tolist()
        for epoch in {i // len(rows) for i in at}
    }
    return [rows[orders[i // len(rows)][i % len(rows)]] for i in at]


# ----------------------------------------------------------------------------------------------------------------------
# 3. Models. Four roles from two frozen networks:    policy  =  SFT network + LoRA          reference = adapter off
#                                                    critic  =  RM network + LoRA + head    reward    = adapter off, own head
# With lora_r = 0 all weights are trained and the frozen twin is a real copy. Networks stay in eval mode throughout:
# dropout would make two passes over the same tokens disagree, and the ratio of the first epoch would not be 1.


def add_lora(network, r, seed=0):
    """LoRA on the projections that peft chooses for this architecture (query_key_value in Pythia), as in the official code.
    B starts at 0, so a fresh adapter changes nothing; peft keeps adapters in float32 whatever the network is in."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)  # A is drawn from the global generator
    return get_peft_model(network, LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.0, bias="none")).eval()


def twin(network, lora_r, seed=0):
    """-> (trained, frozen): the network as it will be trained, and a function that opens a context with it as it is now."""
    if not lora_r:
        original = copy.deepcopy(network).requires_grad_(False)
        return network, lambda: contextlib.nullcontext(original)
    trained = add_lora(network, lora_r, seed)

    @contextlib.contextmanager
    def frozen():
        with trained.disable_adapter():
            yield trained

    return trained, frozen


def packed(batch):
    """-> ids (N,) long: the tokens of query and response, row after row, without padding; lengths, a list: of the rows;
    before (B, T+1) long: where in ids the token before response step t stands, which for t = response_len is the last one."""
    T, query_len = batch["response"].shape[1], batch["query_mask"].sum(1)
    in_response = torch.arange(T, device=query_len.device) < (batch["row_len"] - query_len)[:, None]
    is_token = torch.cat([batch["query_mask"], in_response], 1)
    place = (is_token.flatten().cumsum(0) - 1).view(is_token.shape)
    return torch.cat([batch["query"], batch["response"]], 1)[is_token], batch["row_len"].tolist(), place[:, -T - 1 :]


def response_states(body, batch, mask):
    """-> (n, d) float32, row after row: the hidden states that the response steps in the mask are decided from, each at the
    token before. The mask is (B, T) bool, or (B, T+1) where what would follow the last token is of interest, too."""
    ids, lengths, before = packed(batch)
    return row_states(body, ids, lengths, before[:, : mask.shape[1]][mask])


def put_into(mask, x):
    """(B, T), (n,) -> (B, T): x at the n places where the mask is 1, row after row, and 0 elsewhere."""
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, x)


def response_logprobs(network, batch, temperature=1.0, mask=None):
    """-> ln pi(a_t | s_t) and the entropy of pi(. | s_t), (B, T) float32 each, at the given temperature: a log-softmax of the
    head's logits, of which only a few rows exist at a time. 0 where the mask (B, T) is 0; without one: the whole response."""
    mask = response_mask(batch) if mask is None else mask
    body, head = body_and_head(network)
    states = response_states(body, batch, mask)
    return [put_into(mask, x) for x in token_logprobs(head, states, batch["response"][mask], temperature)]


def apply_head(head, states):
    """(..., d) -> (...), as a sum of products: a matrix product would be cast to bfloat16 under autocast."""
    return (states * head.weight[0]).sum(-1) + head.bias


def response_values(critic, head, batch, mask):
    """V(s_t), (B, T) float32, 0 where the mask (B, T) is 0."""
    return put_into(mask, apply_head(head, response_states(critic, batch, mask)))


def end_scores(backbone, head, batch):
    """The reward of whole responses, (B,) float32: the head on the state at the last token, which is EOS if there is one."""
    steps = torch.arange(batch["response"].shape[1] + 1, device=batch["response"].device)
    return apply_head(head, response_states(backbone, batch, steps == batch["response_len"][:, None]))


# ----------------------------------------------------------------------------------------------------------------------
# 4. The mathematics. Pure functions. Per-token tensors are (B, T) float32 over response positions; `mask` (B, T) is 1 on the
# tokens that count: those that the policy itself sampled, up to and with EOS. What is outside it, even NaN, never matters.


def bradley_terry_loss(chosen_scores, rejected_scores):
    """Eq. (1) under Bradley-Terry-Luce: mean of -log sigma(r(winner) - r(loser)). (B,), (B,) -> scalar."""
    return -F.logsigmoid(chosen_scores - rejected_scores).mean()


def sample_reset_lengths(reference_lengths, beta, generator, include_zero=False):
    """Alg. 1, line 3: how many tokens of its reference each rollout starts with. (B,) long -> (B,) long.

    A row is reset with probability beta. A reset row's prefix is uniform on 1..n, n its reference's length without EOS
    (as RollinProcessor in the official code; with `include_zero` on 0..n, as Alg. 3). An empty reference gives 0."""
    n = reference_lengths.cpu()
    is_reset = torch.rand(len(n), generator=generator) < beta
    low = 0 if include_zero else 1
    lengths = low + (torch.rand(len(n), generator=generator, dtype=torch.float64) * (n + 1 - low)).long()
    return torch.where(is_reset & (n > 0), lengths, 0).to(reference_lengths.device)


def masked_mean(x, mask):
    """Mean of x where mask is 1. (B, T), (B, T) -> scalar."""
    mask = mask.bool()
    return torch.where(mask, x, 0.0).sum() / mask.sum()


def masked_whiten(x, mask, shift_mean=True):
    """Unit variance (biased, as in the official code) and, if shift_mean, zero mean over the mask; 0 elsewhere. (B, T)."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8) + (0.0 if shift_mean else mean)
    return torch.where(mask.bool(), whitened, 0.0)


def penalised_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """r_t = -kl_coef * ln(pi(a_t|s_t) / pi_SFT(a_t|s_t)), and the score, (B,), at the last token in the mask -> (B, T)."""
    mask = mask.bool()
    penalty = torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0.0)
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)  # from here on one in the mask, this one
    return penalty + torch.where(is_last, scores[:, None], 0.0)


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16), 0 bootstrapped after the last token in the mask.

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   returns_t = A_t + V_t.
    (B, T) each -> advantages, returns, both 0 outside the mask."""
    mask = mask.bool()
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0.0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def log_ratio(logprobs, old_logprobs, mask):
    """ln(pi / pi_old) on the mask, 0 elsewhere: masked before any exp, so that no gradient and no NaN leaks in. (B, T)."""
    return torch.where(mask.bool(), logprobs - old_logprobs, 0.0)


def ppo_policy_loss(logprobs, old_logprobs, advantages, mask, cliprange):
    """PPO's clipped objective (Schulman et al. 2017, eq. 7), negated: mean of max(-A rho, -A clip(rho, 1-eps, 1+eps)).

    (B, T) each -> (loss, clipfrac), scalars; clipfrac is the share of tokens in the mask on which the clip bites."""
    ratio = log_ratio(logprobs, old_logprobs, mask).exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return masked_mean(torch.max(unclipped, clipped), mask), masked_mean((clipped > unclipped).float(), mask)


def ppo_value_loss(values, old_values, returns, mask, cliprange_value):
    """0.5 mean max((V - R)^2, (clip(V, V_old +- eps) - R)^2), C's drpo.py, lines 866-874. (B, T) -> (loss, clipfrac)."""
    clipped = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    plain_error, clipped_error = [torch.where(mask.bool(), v - returns, 0.0) ** 2 for v in (values, clipped)]
    return (
        0.5 * masked_mean(torch.max(plain_error, clipped_error), mask),
        masked_mean((clipped_error > plain_error).float(), mask),
    )


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """DPO (Rafailov et al. 2023, eq. 7) on log-probabilities of whole responses, (B,) each -> (loss, margins (B,))."""
    margins = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    return -F.logsigmoid(margins).mean(), margins


# ----------------------------------------------------------------------------------------------------------------------
# 5. Rollouts with dataset resets.


def token_masks(reset_len, response_len, T, masking="sampled"):
    """The one place where masks are made. -> three (B, T) bool: the sampled tokens up to EOS; what the policy loss sees; what
    the value loss, the KL reward, GAE and whitening see. All three are the first, unless masking is "official"."""
    t = torch.arange(T, device=reset_len.device)
    free = t >= reset_len[:, None]
    sampled = free & (t < response_len[:, None])
    return (sampled, sampled, sampled) if masking == "sampled" else (sampled, free, torch.ones_like(free))


def decoder(policy, query_mask, room):
    """-> next_logits(tokens, keep) -> (rows, V): the logits that follow. The first call reads the queries, (rows, Q); each
    later one a token a row, (rows, 1), of the rows that `keep` names among those of the call before (None: all of them).
    `room`: for how many tokens after the queries there is memory."""
    body, head = body_and_head(policy)
    mask, cache = query_mask, roomy_cache(body.config, room)

    def next_logits(tokens, keep):
        nonlocal mask
        if cache.get_seq_length():
            mask = F.pad(mask, (0, 1), value=True)
        if keep is not None:
            mask = mask[keep]
            cache.batch_select_indices(keep)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        given = {"input_ids": tokens, "attention_mask": mask.long(), "position_ids": positions, "past_key_values": cache}
        return last_logits(head, body(**given, use_cache=True).last_hidden_state)

    return next_logits


@torch.no_grad()
def rollout(policy, queries, prefixes, uniforms, tokenizer, s, temperature, stop_at_eos=True):
    """Alg. 1, line 4: reset to query + prefix, then let the policy finish.

    The prefix is fed with the query, so only what is left is decoded. Token t of row i is the inverse of the policy's
    cumulative distribution at uniforms[i, t]: of the softmax that is scored later; but for rounding the same token whatever
    rows are decoded beside it. Rows with about as much left to decode go together, and leave when they have ended; four times
    as many as in a micro-batch, since nothing is kept for backward.
    queries, prefixes: B lists of ids; uniforms (B, T) in [0, 1) -> responses, B lists of at most T ids, EOS included."""
    T, responses = uniforms.shape[1], [list(prefix) for prefix in prefixes]
    order = sorted(range(len(queries)), key=lambda row: -len(prefixes[row]))
    for first in share(range(0, len(order), 4 * s.micro_batch)):
        rows = order[first : first + 4 * s.micro_batch]
        start = padded([queries[row] + responses[row] for row in rows], [[]] * len(rows), tokenizer.eos_token_id, s.device)
        room = T - 1 - min(len(responses[row]) for row in rows)  # the last token of a response is not read again
        next_logits = (static_cache.decoder if s.static_cache else decoder)(policy, start["query_mask"], room)
        tokens, keep = start["query"], None  # the query, and the prefix after it
        while rows:
            cdf = (next_logits(tokens, keep).float() / temperature).softmax(-1).cumsum(-1)
            u = uniforms[rows, [len(responses[row]) for row in rows]].to(cdf)[:, None]
            tokens = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)  # u * cdf may round up
            for row, token in zip(rows, tokens[:, 0].tolist()):
                responses[row].append(token)
            left = gaps_filled(
                i
                for i, row in enumerate(rows)
                if len(responses[row]) < T and not (stop_at_eos and responses[row][-1] == tokenizer.eos_token_id)
            )
            keep = torch.tensor(left, dtype=torch.long, device=tokens.device) if len(left) < len(rows) else None
            if keep is not None:
                rows, tokens = [rows[i] for i in left], tokens[keep]
    return exchanged(responses, [len(prefix) for prefix in prefixes], T, s.device) if world()[1] > 1 else responses


def reset_rollouts(policy, rows, update, tokenizer, s):
    """Alg. 1, lines 3 and 4: the rollouts of one update. Rows, resets and uniforms depend on seed and update number alone.

    -> a batch as of `padded`, T = response_length wide, whose response_len ends at the first EOS, and with reset_len (B,) long,
    has_eos (B,) bool and decoded (B,) long: how many tokens the policy itself had to produce."""
    B, T, eos, rng = s.batch_size, s.response_length, tokenizer.eos_token_id, generator(s.seed, "rollout", update)
    episodes = draw(rows, B, update, s.seed, "rl")
    queries = [encode_query(row["prompt"], tokenizer, s.query_length) for row in episodes]
    references = [encode_response(row["reference"], tokenizer, T)[:-1] for row in episodes]  # without EOS, or cut to T - 1
    reset_len = sample_reset_lengths(torch.tensor([len(ids) for ids in references]), s.beta, rng, s.reset_include_prompt)
    prefixes = [ids[:length] for ids, length in zip(references, reset_len.tolist())]
    uniforms = torch.rand(B, T, generator=rng)
    responses = rollout(policy, queries, prefixes, uniforms, tokenizer, s, s.temperature, stop_at_eos=s.masking == "sampled")
    if s.check_rollouts:
        from tools import rollout_check

        rollout_check.check(policy, queries, prefixes, responses, uniforms, tokenizer, s)
    batch = padded(queries, responses, eos, s.device, width=T) | {"reset_len": reset_len.to(s.device)}
    batch["decoded"] = batch["response_len"] - batch["reset_len"]  # with official masking also after EOS
    batch["has_eos"] = torch.tensor([eos in ids for ids in responses], device=s.device)
    batch["response_len"] = torch.tensor([ids.index(eos) + 1 if eos in ids else T for ids in responses], device=s.device)
    return batch


def sample(network, rows, s, tokenizer, temperature):
    """-> one response (list of ids) per row, from the bare prompt. The same uniforms for every method: paired samples."""
    uniforms = torch.rand(len(rows), s.response_length, generator=generator(s.seed, "evaluation"))
    queries = [encode_query(row["prompt"], tokenizer, s.query_length) for row in rows]
    return rollout(network, queries, [[]] * len(rows), uniforms, tokenizer, s, temperature)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Measuring: what the stages, their checks and the evaluation (tools/evaluation.py) share.


def sequence_logprobs(network, batch, temperature=1.0):
    """ln pi(response | query), (B,)."""
    return response_logprobs(network, batch, temperature)[0].sum(1)


def per_row(function, rows, responses, s, tokenizer):
    """function(batch) -> (B,), over all rows with these responses (lists of ids), in micro-batches -> (rows,) on the CPU."""
    queries, out = [encode_query(row["prompt"], tokenizer, s.query_length) for row in rows], torch.zeros(len(rows))
    with torch.no_grad():
        for chunk, part in micro_batches(padded(queries, responses, tokenizer.eos_token_id, s.device), s):
            out[chunk.cpu()] = function(part).float().cpu()
    return summed(out)


def reference_scores(backbone, head, rows, s, tokenizer):
    """What the reward model gives to the rows' own references, (rows,)."""
    responses = [encode_response(row["reference"], tokenizer, s.response_length) for row in rows]
    return per_row(lambda part: end_scores(backbone, head, part), rows, responses, s, tokenizer)


def decode(responses, tokenizer):
    """Lists of ids -> texts as a judge reads them."""
    return [text.strip() for text in tokenizer.batch_decode(responses, skip_special_tokens=True)]


def rouge(texts, rows, kind="rougeL"):
    """ROUGE F1 (rouge1, rouge2 or rougeL) with stemming, as `evaluate.load("rouge")` computes it, per text."""
    scorer = RougeScorer([kind], use_stemmer=True)
    return [scorer.score(row["reference"], text)[kind].fmeasure for text, row in zip(texts, rows)]


# ----------------------------------------------------------------------------------------------------------------------
# 7. Stages. Each is a visible loop over `training(...)`, which keeps what all of them need out of sight: learning rate,
# metrics, checkpoints. Each returns what the next one should know before it starts.


def train_sft(s):
    """Supervised fine-tuning: cross-entropy over query and response, as in the official sft.py."""
    rows, held_out = load_rows(s.dataset, "reference", s.seed)
    tokenizer = load_tokenizer(s.tokenizer or s.model, s)
    network = load_network(s.model, s, full=not s.supervised_lora_r)
    vocabulary = network.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        stop(f"--tokenizer has {len(tokenizer)} tokens, but --model {s.model} embeds only {vocabulary}")
    if tokenizer.pad_token in (None, tokenizer.eos_token) and len(tokenizer) < vocabulary:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # apart from EOS, in a spare row of the embedding
    network.config.pad_token_id = tokenizer.pad_token_id
    network.config.eos_token_id = network.generation_config.eos_token_id = tokenizer.eos_token_id
    network = add_lora(network, s.supervised_lora_r, s.seed) if s.supervised_lora_r else network
    some = rows[:2000]
    cut = sum(len(encode_response(row["reference"], tokenizer, s.response_length + 1)) > s.response_length for row in some)
    print(
        f"sft: {len(rows)} rows, {len(held_out)} held out; {cut} of the first {len(some)} references are cut at "
        f"{s.response_length} tokens; lr linear from {s.sft_lr:g} to 0"
    )

    def token_losses(batch):
        """-> the sum of the tokens' losses, and their number."""
        (body, head), (ids, lengths, _) = body_and_head(network), packed(batch)
        has_next = torch.ones_like(ids, dtype=torch.bool).index_fill(0, batch["row_len"].cumsum(0) - 1, False)
        places = has_next.nonzero()[:, 0]  # every token but a row's last predicts the next one
        return -token_logprobs(head, row_states(body, ids, lengths, places), ids[places + 1])[0].sum(), len(places)

    updates = s.sft_steps or max(1, len(rows) // s.sft_batch_size)
    for update, optimizer, metrics in training("sft", updates, s.sft_lr, nn.ModuleDict({"policy": network}), s):
        batch = encode(draw(rows, s.sft_batch_size, update, s.seed, "sft"), ["reference"], s, tokenizer, s.response_length)
        tokens = (batch["row_len"] - 1).sum()  # that are targets
        metrics["loss"] = 0.0
        for _, part in micro_batches(batch, s):
            loss = token_losses(part)[0] / tokens  # summed over micro-batches: the mean over all tokens
            loss.backward()
            metrics["loss"] += loss.item()
        metrics["loss"] = summed(torch.tensor(metrics["loss"])).item()
        metrics["grad_norm"] = step(optimizer, s, f"sft update {update + 1}", lambda: batch)
    save_network(network, tokenizer, Path(s.run_dir) / "sft")

    held_out = held_out[: s.eval_samples]
    with torch.no_grad():
        batch = encode(held_out, ["reference"], s, tokenizer, s.response_length)
        sums = [[float(x) for x in token_losses(part)] for _, part in micro_batches(batch, s)]
    total, count = summed(torch.tensor(sums, dtype=torch.double).reshape(-1, 2).sum(0)).tolist()
    loss = total / count
    rouge_l = rouge(decode(sample(network, held_out, s, tokenizer, s.eval_temperature), tokenizer), held_out)
    print(f"sft: held-out loss {loss:.3f} nats per token, ROUGE-L {sum(rouge_l) / len(rouge_l):.3f}, on {len(held_out)} rows")
    return {"held_out_loss": loss, "rouge_l": sum(rouge_l) / len(rouge_l)}


def pair_update(pairs, s, optimizer, loss_of, tokenizer, where):
    """One step on the mean over pairs of loss_of(pairs) -> (loss, margins), in micro-batches. -> metrics."""
    size, loss, right = max(1, s.micro_batch // 2), 0.0, 0  # a pair is two rows
    for part in share([pairs[i : i + size] for i in range(0, len(pairs), size)]):
        part_loss, margins = loss_of(part)
        (part_loss * len(part) / len(pairs)).backward()
        loss, right = loss + part_loss.item() * len(part) / len(pairs), right + (margins > 0).sum().item()
    loss, right = summed(torch.tensor([loss, right], dtype=torch.double)).tolist()
    norm = step(optimizer, s, where, lambda: encode(pairs, ["chosen", "rejected"], s, tokenizer, s.preference_length))
    return {"loss": loss, "accuracy": right / len(pairs), "grad_norm": norm}


def train_rm(s):
    """Alg. 1, line 1. The reward model: the SFT network with a scalar head read at EOS, fitted by Eq. (1)."""
    rows, held_out = load_rows(s.preference_dataset, "pairs", s.seed)
    tokenizer = load_tokenizer(f"{s.run_dir}/sft", s)
    model = load_network(f"{s.run_dir}/sft", s, AutoModelForSequenceClassification, not s.supervised_lora_r, num_labels=1)
    d = model.score.in_features
    head = scalar_head(torch.randn(1, d, generator=generator(s.seed, "rm head")).to(s.device) / math.sqrt(d + 1))
    head.bias.requires_grad_(False)  # the loss sees differences only
    backbone = add_lora(model.base_model, s.supervised_lora_r, s.seed) if s.supervised_lora_r else model.base_model

    def pair_loss(pairs):
        batch = encode(pairs, ["chosen", "rejected"], s, tokenizer, s.preference_length)
        chosen, rejected = end_scores(backbone, head, batch).chunk(2)
        return bradley_terry_loss(chosen, rejected), chosen - rejected

    updates = s.rm_steps or max(1, len(rows) // s.rm_batch_size)
    for update, optimizer, metrics in training("rm", updates, s.rm_lr, nn.ModuleDict({"reward": backbone, "head": head}), s):
        pairs = draw(rows, s.rm_batch_size, update, s.seed, "rm")
        metrics.update(pair_update(pairs, s, optimizer, pair_loss, tokenizer, f"rm update {update + 1}"))

    if s.supervised_lora_r:
        backbone = backbone.merge_and_unload()  # before it is measured: in bfloat16 merging rounds
    held_out, by_batch, size = held_out[:HELD_OUT_PAIRS], {}, max(1, s.micro_batch // 2)  # a pair is two rows
    with torch.no_grad():
        margins = torch.cat([pair_loss(held_out[i : i + size])[1] for i in range(0, len(held_out), size)])
        references = load_rows(s.dataset, "reference", s.seed)[0][:REFERENCES_FOR_BIAS]
        scores = reference_scores(backbone, head, references, s, tokenizer)
    for right, row in zip((margins > 0).tolist(), held_out):  # N+ detail 16: accuracy differs by labelling batch
        count = by_batch.setdefault(row["batch"] or "all", {"right": 0, "pairs": 0})
        count["right"], count["pairs"] = count["right"] + right, count["pairs"] + 1
    accuracy = (margins > 0).double().mean().item()
    model.score.weight.data.copy_(head.weight)
    model.config.reward_bias = scores.mean().item()  # N+ detail 15: references score 0 on average
    if tokenizer.pad_token_id == tokenizer.eos_token_id:  # transformers' own classifier reads before the padding
        model.config.pad_token_id = None
    save_network(model, tokenizer, Path(s.run_dir) / "rm")
    error, spread = math.sqrt(accuracy * (1 - accuracy) / len(held_out)), scores.std(correction=0).item()
    print(
        f"rm: accuracy {accuracy:.3f} +- {1.96 * error:.3f} (95 %) on {len(held_out)} held-out pairs; references scored "
        f"{scores.mean():.2f} with spread {spread:.2f}, and from here on 0 on average"
    )
    return {"accuracy": accuracy, "accuracy_by_batch": by_batch, "reference_score_std": spread}


def train_dpo(s):
    """Direct preference optimisation, from the SFT network, on the pairs that the reward model was fitted on."""
    rows, _ = load_rows(s.preference_dataset, "pairs", s.seed)
    tokenizer = load_tokenizer(f"{s.run_dir}/sft", s)
    policy, reference = twin(load_network(f"{s.run_dir}/sft", s, full=not s.lora_r), s.lora_r, s.seed)

    def pair_loss(pairs):
        batch = encode(pairs, ["chosen", "rejected"], s, tokenizer, s.preference_length)
        with torch.no_grad(), reference() as network:
            ref = sequence_logprobs(network, batch).chunk(2)
        return dpo_loss(*sequence_logprobs(policy, batch).chunk(2), *ref, s.dpo_beta)

    updates = s.updates or max(1, len(rows) // s.dpo_batch_size)
    for update, optimizer, metrics in training("dpo", updates, s.dpo_lr, nn.ModuleDict({"policy": policy}), s):
        pairs = draw(rows, s.dpo_batch_size, update, s.seed, "dpo")
        metrics.update(pair_update(pairs, s, optimizer, pair_loss, tokenizer, f"dpo update {update + 1}"))
    save_network(policy, tokenizer, Path(s.run_dir) / "dpo")


def train_drpo(s, stage="drpo"):
    """Algorithm 1 with PPO as its policy optimiser. PPO itself is this function at beta = 0, which `run_stage` sets."""
    references, _ = load_rows(s.dataset, "reference", s.seed)
    # D_TR, what is reset to: a row's "reference" is the human one, or the preferred response of a pair
    rows = references if s.reset_to == "reference" else load_rows(s.preference_dataset, "reference", s.seed)[0]
    tokenizer = load_tokenizer(f"{s.run_dir}/sft", s)
    policy, reference = twin(load_network(f"{s.run_dir}/sft", s, full=not s.lora_r), s.lora_r, s.seed)
    backbone, reward_head = load_reward(f"{s.run_dir}/rm", s, full=not s.lora_r)
    critic, reward = twin(backbone, s.lora_r, s.seed)  # the critic starts as the reward model, head and all
    value_head = copy.deepcopy(reward_head).requires_grad_(True)
    # Of these, `reference` and `reward` are contexts: `with roles.reference() as network` gives the frozen network
    roles = SimpleNamespace(
        policy=policy, reference=reference, critic=critic, value_head=value_head, reward=reward, reward_head=reward_head
    )
    check_references(roles, references, tokenizer, s)

    modules = nn.ModuleDict({"policy": policy, "critic": critic, "value_head": value_head})
    for update, optimizer, metrics in training(stage, s.updates or max(1, len(rows) // s.batch_size), s.lr, modules, s):
        metrics.update(drpo_update(roles, optimizer, rows, update, tokenizer, s, f"{stage} update {update + 1}"))
    save_network(policy, tokenizer, Path(s.run_dir) / stage)


def drpo_update(roles, optimizer, rows, update, tokenizer, s, where):
    """Lines 3 to 6 of Algorithm 1: one batch of rollouts from resets, and the PPO steps on it -> metrics, all floats."""
    policy, critic, value_head, B, T = roles.policy, roles.critic, roles.value_head, s.batch_size, s.response_length
    tolerance = 1e-4 if s.dtype == "float32" else 0.1  # nats that rounding may cost, and a bug exceeds
    laps = [lap(s)]
    # Lines 3 and 4: reset to the prompt and, with probability beta, a prefix of the row's response of the data; roll out
    batch = reset_rollouts(policy, rows, update, tokenizer, s)
    reset_len, lengths = batch["reset_len"], batch["response_len"]
    sampled, in_policy_loss, in_rest = token_masks(reset_len, lengths, T, s.masking)
    laps.append(lap(s))

    # Line 5: reward and log-ratio of every step. Log-probabilities come from the training forward, not the sampler
    with torch.no_grad():
        logprobs, ref_logprobs, entropy, values = of_steps = torch.zeros(4, B, T, device=s.device)
        scores = torch.zeros(B, device=s.device)
        for chunk, part in micro_batches(batch, s):
            logprobs[chunk], entropy[chunk] = response_logprobs(policy, part, s.temperature, in_rest[chunk])
            values[chunk] = response_values(critic, value_head, part, in_rest[chunk])
            with roles.reference() as network:
                ref_logprobs[chunk], _ = response_logprobs(network, part, s.temperature, in_rest[chunk])
            with roles.reward() as network:
                scores[chunk] = end_scores(network, roles.reward_head, part)
        summed(of_steps), summed(scores)  # in place, over the processes
        log_ratios = log_ratio(logprobs, ref_logprobs, sampled)
        if update == 0:
            check_first_update(log_ratios, reset_len, tolerance, s)
        scores = torch.where(batch["has_eos"], scores, s.missing_eos_score)
        rewards = penalised_rewards(scores, logprobs, ref_logprobs, sampled, s.kl_coef)
        if s.masking == "official":  # the KL reward on all other tokens too; the score stays where it is
            rewards += penalised_rewards(0 * scores, logprobs, ref_logprobs, ~sampled, s.kl_coef)
        scaled = masked_whiten(rewards, in_rest, shift_mean=False) if s.whiten_rewards else rewards
        raw_advantages, returns = gae(scaled, values, in_rest, s.gamma, s.lam)
        advantages = masked_whiten(raw_advantages, in_rest)
    laps.append(lap(s))

    # Line 6: PPO, `epochs` steps on the whole batch
    seen = batch | dict(
        logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, scores=scores, rewards=rewards, advantages=advantages
    )
    new_logprobs, new_values = torch.zeros(2, s.epochs, B, T, device=s.device)
    for epoch in range(s.epochs):
        for chunk, part in micro_batches(batch, s):
            mask, rest = in_policy_loss[chunk], in_rest[chunk]
            part_logprobs, _ = response_logprobs(policy, part, s.temperature, rest)
            part_values = response_values(critic, value_head, part, rest)
            pg_loss, _ = ppo_policy_loss(part_logprobs, logprobs[chunk], advantages[chunk], mask, s.cliprange)
            vf_loss, _ = ppo_value_loss(part_values, values[chunk], returns[chunk], rest, s.cliprange_value)
            # a mean over some rows, times their share of the tokens: summed up, the mean over the whole batch
            loss = pg_loss * mask.sum() / in_policy_loss.sum() + s.vf_coef * vf_loss * rest.sum() / in_rest.sum()
            loss.backward()
            new_logprobs[epoch][chunk], new_values[epoch][chunk] = part_logprobs.detach(), part_values.detach()
        summed(new_logprobs[epoch]), summed(new_values[epoch])
        drift = log_ratio(new_logprobs[epoch], logprobs, in_policy_loss).abs().max().item()
        if epoch == 0 and drift > tolerance:  # not a number goes on to `step`, which keeps the batch
            stop(
                f"{where}: before any step the policy differs from the one that was scored (ln ratio up to {drift:.1e}, "
                f"should be 0): look for dropout, padding, masks, temperature",
                3,
            )
        grad_norm = step(optimizer, s, where, lambda: seen)
    laps.append(lap(s))

    mask, rest = [x.expand(s.epochs, B, T) for x in (in_policy_loss, in_rest)]  # losses and ratios: means over the epochs
    pg_loss, clipfrac = ppo_policy_loss(new_logprobs, logprobs, advantages, mask, s.cliprange)
    vf_loss, vf_clipfrac = ppo_value_loss(new_values, values, returns, rest, s.cliprange_value)
    log_rho = log_ratio(new_logprobs, logprobs, mask)
    seconds = {phase: end - start for phase, (start, _), (end, _) in zip(PHASES, laps, laps[1:])}
    figures = {
        "score": scores.mean(),
        "kl": log_ratios.sum(1).mean(),
        "non_score_reward": rewards.sum(1).mean() - scores.mean(),
        "entropy": masked_mean(entropy, sampled),
        "loss": pg_loss + s.vf_coef * vf_loss,
        "pg_loss": pg_loss,
        "vf_loss": vf_loss,
        "clipfrac": clipfrac,
        "vf_clipfrac": vf_clipfrac,
        "ratio": log_rho.exp()[mask].mean(),
        "ratio_var": log_rho.exp()[mask].var(),
        "approx_kl": -log_rho[mask].mean(),
        "approx_kl3": (log_rho.exp() - 1 - log_rho)[mask].mean(),  # Schulman's k1, k3
        "explained_variance": 1 - raw_advantages[in_rest].var() / returns[in_rest].var(),
        "advantage_mean": raw_advantages[in_rest].mean(),
        "advantage_std": raw_advantages[in_rest].std(),
        "eos_rate": batch["has_eos"].float().mean(),
        "response_tokens": lengths.float().mean(),
        "reset_share": (reset_len > 0).float().mean(),
        "prefix_share": (reset_len / lengths)[reset_len > 0].mean() if reset_len.any() else 0.0,
        "tokens_decoded": batch["decoded"].sum(),
        "tokens_forced": reset_len.sum(),
        "grad_norm": grad_norm,
        "tokens_per_second": lengths.sum() / sum(seconds.values()),
        **{f"seconds_{phase}": value for phase, value in seconds.items()},
    }
    if s.device.startswith("cuda"):
        figures |= {f"gb_{phase}": peak for phase, (_, peak) in zip(PHASES, laps[1:])}
    return {name: float(value) for name, value in figures.items()}


def lap(s):
    """-> seconds on the clock, and the most GB that the GPU has held since the last lap. All work is done by then."""
    if not s.device.startswith("cuda"):
        return time.perf_counter(), 0.0
    torch.cuda.synchronize(s.device)
    peak = torch.cuda.max_memory_allocated(s.device) / 1e9
    torch.cuda.reset_peak_memory_stats(s.device)
    return time.perf_counter(), peak


def check_first_update(log_ratios, reset_len, tolerance, s):
    """Two mistakes that no curve shows at once, looked for before the first step. Each check prints a line, or stops."""
    reset_share, sigma = (reset_len > 0).float().mean().item(), math.sqrt(s.beta * (1 - s.beta) / len(reset_len))
    zero = ", some with none of its tokens (not checked)" if s.reset_include_prompt else ""
    tqdm.write(f"check: {reset_share:.2f} of the rollouts start from a reset, and beta is {s.beta:g}{zero}")
    if not s.reset_include_prompt and abs(reset_share - s.beta) > 5 * sigma + 1e-6:
        stop("resets do not happen as often as beta says", 3)
    tqdm.write(f"check: |ln pi - ln pi_SFT| is at most {log_ratios.abs().max():.1e} before the first step; it should be 0")
    if not log_ratios.abs().max() < tolerance:
        stop("the reference is not the SFT model that the policy starts from", 3)


def check_references(roles, references, tokenizer, s):
    """A third: the reward model must see what it was trained on, and then SFT references score 0 on average."""
    with roles.reward() as network:
        some = draw(references, min(256, len(references)), 0, s.seed, "check")
        scores = reference_scores(network, roles.reward_head, some, s, tokenizer)
    mean, error = scores.mean().item(), scores.std(correction=0).item() / math.sqrt(len(scores))
    tqdm.write(f"check: SFT references score {mean:.2f} +- {error:.2f} (standard error); it should be 0")
    if not abs(mean) < 5 * error + (1e-4 if s.dtype == "float32" else 0.1):
        stop("the reward model does not see the references as it was trained on them", 3)


# ----------------------------------------------------------------------------------------------------------------------
# 8. Running.

STAGES = {"sft": train_sft, "rm": train_rm, "dpo": train_dpo, "ppo": lambda s: train_drpo(s, "ppo"), "drpo": train_drpo}


def run_stage(stage, s):
    """One stage, from the finished ones before it to its own result.json. A finished stage with the same settings is kept."""
    result = Path(s.run_dir) / stage / "result.json"
    for needed in {"sft": (), "rm": ("sft",), "dpo": ("sft",)}.get(stage, ("sft", "rm")):
        if not (Path(s.run_dir) / needed / "result.json").exists():
            stop(f"{stage} needs {s.run_dir}/{needed}; make it with: python drpo.py {needed} --run_dir {s.run_dir}")
    if stage == "eval":
        from tools import evaluation

        return evaluation.evaluate(s)
    if stage == "ppo":
        s = dataclasses.replace(s, beta=0.0)
    if result.exists():
        refuse_if_changed(result, s, stage)
        return print(f"{stage}: finished, and kept (delete {result.parent} to train it anew)")
    result.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    figures = STAGES[stage](s) or {}
    if world()[0] == 0:
        result.write_text(
            json.dumps({"seconds": time.perf_counter() - began, **figures, "settings": relevant(s, stage)}, indent=1)
        )
    wait_for_all()


def parse(argv):
    """-> (stage, Settings). What the command line does not give comes from the preset, and then from Settings."""
    parser = HfArgumentParser(Settings, prog="drpo.py", allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.add_argument("stage", nargs="?", default="all", choices=[*STAGES, "eval", "all"], help="what to run")
    parser.error = stop
    preset = ["tiny"] + [
        word.removeprefix("--preset=") if "=" in word else after
        for word, after in zip(argv, [*argv[1:], ""])
        if word.partition("=")[0] == "--preset"
    ]
    parser.set_defaults(preset=preset[-1], **PRESETS.get(preset[-1], {}))
    try:
        s, rest = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except ValueError as error:  # a word or a flag that nothing takes
        stop(error)
    return rest.stage, s


def main(argv=None):
    from tools import preflight, report

    prepare()
    stage, s = parse(sys.argv[1:] if argv is None else argv)
    runs = [dataclasses.replace(s, seed=seed, run_dir=f"{s.run_dir}/seed_{seed}") for seed in s.seeds] or [s]
    stages = [*STAGES, "eval"] if stage == "all" else [stage]
    with contextlib.ExitStack() as held:
        join(s, held)  # the other processes, if there are any
        if world()[0] == 0:
            for one in runs:  # what is wrong is found before anything is trained
                preflight.check(stages, one, held)
        wait_for_all()
        held.enter_context(precision(s))
        for one in runs:
            for name in stages:
                run_stage(name, one)
        if stage in ("eval", "all") and world()[0] == 0:
            tables = [report.write(folder) for folder in dict.fromkeys([*(one.run_dir for one in runs), s.run_dir])]
            print(tables[-1])


if __name__ == "__main__":
    import drpo  # so that tools and toys find this module, not a second one

    drpo.main()
