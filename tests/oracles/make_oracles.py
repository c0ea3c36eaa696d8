"""Makes the JSON files of this folder: what public packages return for small inputs. Run by hand; tests only read the files.

Each package runs in its own environment (Python 3.11, all on the CPU):

    torchrl              pip install torch==2.13.0 torchrl==0.14.1 tensordict==0.14.3 hoptorch==0.1.4 numpy==2.4.6
    stable_baselines3    pip install torch==2.13.0 stable-baselines3==2.9.2 gymnasium==1.4.0 numpy==2.4.6
    rlax                 pip install rlax==0.1.9 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
    trl                  pip install torch==2.13.0 trl==1.16.0 transformers==5.23.0 numpy==2.4.6

    python tests/oracles/make_oracles.py NAME        writes tests/oracles/NAME.json

A file has the version of the package and a list of cases. A case names the function that was called (`oracle`), the
function of drpo.py that must agree (`ours`), the arguments of the latter by name, what the package returned (`outputs`) and
its gradients with respect to arguments (`gradients`). Masks become episodes: `done` is set on the last token of a mask and on
the token before its first. Per-token outputs are 0 outside the mask. stable-baselines3 and TRL's RLOO compute in float32, all
others here in float64 (torchrl rounds gamma to float32).
"""

import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

SHAPES = [(1, 1), (2, 6), (4, 7), (3, 11)]
DISCOUNTS = [(1.0, 1.0), (0.99, 0.0), (0.9, 0.7), (1.0, 0.95)]  # gamma, lambda: one for each of SHAPES


def normal(rng, *shape, scale=1.0):
    return np.round(scale * rng.standard_normal(shape), 3)


def segments(rng, B, T):
    """-> mask and done, (B, T) bool: one run of ones per row, and the ends of episodes that cut each row in the same places."""
    t, start = np.arange(T), rng.integers(0, T, (B, 1))
    end = start + rng.integers(1, T - start + 1)
    return (t >= start) & (t < end), (t == start - 1) | (t == end - 1)


def gae_cases():
    """-> (arguments of `gae`, done, values of the states after the last column) per case. The last are never used."""
    rng = np.random.default_rng(0)
    for (B, T), (gamma, lam) in zip(SHAPES, DISCOUNTS):
        mask, done = segments(rng, B, T)
        rewards, values = normal(rng, B, T), normal(rng, B, T)
        yield dict(rewards=rewards, values=values, mask=mask, gamma=gamma, lam=lam), done, normal(rng, B, scale=100)


def gae_outputs(a, advantages, returns):
    return {"advantages": np.where(a["mask"], advantages, 0), "returns": np.where(a["mask"], returns, 0)}


def torchrl():
    import torch
    from tensordict import TensorDict
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value.functional import generalized_advantage_estimate

    for a, done, last in gae_cases():
        next_values = np.concatenate([a["values"][:, 1:], last[:, None]], 1)
        x = [torch.from_numpy(y)[..., None] for y in (a["values"], next_values, a["rewards"], done)]  # (B, T, 1)
        advantages, returns = [y[..., 0].numpy() for y in generalized_advantage_estimate(a["gamma"], a["lam"], *x)]
        yield "generalized_advantage_estimate", "gae", a, gae_outputs(a, advantages, returns), {}

    rng = np.random.default_rng(1)
    actor = ProbabilisticTensorDictSequential(  # the loss wants one; the critic's loss does not use it
        TensorDictModule(torch.nn.Linear(1, 2), ["observation"], ["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=torch.distributions.Categorical),
    )
    critic = TensorDictModule(torch.nn.Identity(), ["prediction"], ["state_value"])
    for (B, T), clip in zip(SHAPES, [0.2, 0.2, 0.3, 0.5]):
        mask, old_values = segments(rng, B, T)[0], normal(rng, B, T)
        values, returns = old_values + normal(rng, B, T, scale=0.4), old_values + normal(rng, B, T, scale=0.4)
        a = dict(values=values.round(3), old_values=old_values, returns=returns.round(3), mask=mask, cliprange_value=clip)
        new, old, target = [torch.from_numpy(a[name][mask])[:, None] for name in ("values", "old_values", "returns")]
        loss_of = ClipPPOLoss(actor, critic, clip_value=clip, loss_critic_type="l2", critic_coeff=0.5)
        rows = TensorDict(prediction=new.requires_grad_(), state_value=old, value_target=target, batch_size=len(new))
        loss = loss_of.loss_critic(rows)[0].mean()
        gradient = np.zeros((B, T))
        gradient[mask] = torch.autograd.grad(loss, new)[0][:, 0].numpy()
        yield "ClipPPOLoss.loss_critic", "ppo_value_loss", a, {"loss": loss.item()}, {"values": gradient}


def stable_baselines3():
    import torch
    from gymnasium.spaces import Box
    from stable_baselines3.common.buffers import RolloutBuffer

    box = Box(-1, 1, (1,))
    for a, done, last in gae_cases():
        B, T = done.shape
        buffer = RolloutBuffer(T, box, box, device="cpu", gamma=a["gamma"], gae_lambda=a["lam"], n_envs=B)
        starts = np.concatenate([np.ones((B, 1)), done[:, :-1]], 1)
        for t in range(T):
            value = torch.tensor(a["values"][:, t], dtype=torch.float32)
            buffer.add(np.zeros((B, 1)), np.zeros((B, 1)), a["rewards"][:, t], starts[:, t], value, torch.zeros(B))
        buffer.compute_returns_and_advantage(torch.tensor(last, dtype=torch.float32), done[:, -1])
        outputs = gae_outputs(a, buffer.advantages.T, buffer.returns.T)
        yield "RolloutBuffer.compute_returns_and_advantage", "gae", a, outputs, {}


def rlax():
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    import rlax

    for a, done, last in gae_cases():
        rows = [
            rlax.truncated_generalized_advantage_estimation(
                jnp.array(a["rewards"][b]),
                jnp.array(a["gamma"] * ~done[b]),
                a["lam"],
                jnp.array([*a["values"][b], last[b]]),
            )
            for b in range(len(done))
        ]
        outputs = gae_outputs(a, np.array(rows), np.array(rows) + a["values"])
        yield "truncated_generalized_advantage_estimation", "gae", a, outputs, {}

    rng = np.random.default_rng(2)
    for (B, T), eps in zip(SHAPES, [0.2, 0.2, 0.1, 0.3]):
        mask, old_logprobs, advantages = segments(rng, B, T)[0], -np.abs(normal(rng, B, T)), normal(rng, B, T)
        logprobs = (old_logprobs + normal(rng, B, T, scale=0.4)).round(3)
        a = dict(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask, cliprange=eps)

        def loss_of(x):
            return rlax.clipped_surrogate_pg_loss(jnp.exp(x - old_logprobs[mask]), jnp.array(advantages[mask]), eps)

        loss, on_mask = jax.value_and_grad(loss_of)(jnp.array(logprobs[mask]))
        gradient = np.zeros((B, T))
        gradient[mask] = on_mask
        yield "clipped_surrogate_pg_loss", "ppo_policy_loss", a, {"loss": float(loss)}, {"logprobs": gradient}


def trl():
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<eos>", "a", "b", "c"])}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    config = GPT2Config(vocab_size=4, n_positions=32, n_embd=8, n_layer=1, n_head=1, num_labels=1, pad_token_id=0)
    common = dict(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)
    pairs = Dataset.from_list([dict(prompt="a", chosen="b", rejected="c")] * 4)

    def network(**outputs):  # the trainer's losses see no more of a network than what it returns
        return lambda **inputs: SimpleNamespace(**outputs)

    rng = np.random.default_rng(3)
    for (B, T), beta in zip(SHAPES, [0.1, 0.05, 0.5, 0.3]):
        trainer = DPOTrainer(
            *[GPT2LMHeadModel(config) for _ in range(2)],
            DPOConfig(beta=beta, **common),
            train_dataset=pairs,
            processing_class=tokenizer,
        )
        mask = torch.from_numpy(np.arange(T + 1) > rng.integers(0, T, (2 * B, 1)))  # after a prompt of 1..T tokens
        logprobs, ref_logprobs = [torch.from_numpy(-np.abs(normal(rng, 2 * B, T))) * mask[:, 1:] for _ in range(2)]
        nothing = torch.zeros(2 * B, T)
        rest = dict(entropy=nothing, mean_logits=nothing, is_top1=nothing > 0)
        trainer.ref_model = network(log_probs=ref_logprobs)
        inputs = dict(input_ids=mask.long(), attention_mask=torch.ones_like(mask).long(), completion_mask=mask.long())
        loss = trainer.compute_loss(network(log_probs=logprobs.requires_grad_(), **rest), inputs)
        names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
        sums = [x.sum(1).detach().numpy() for x in (*logprobs.chunk(2), *ref_logprobs.chunk(2))]
        gradients = [x[:, -1].numpy() for x in torch.autograd.grad(loss, logprobs)[0].chunk(2)]  # the same at each token
        a = dict(zip(names, [x.round(3) for x in sums]), beta=beta)
        yield "DPOTrainer.compute_loss", "dpo_loss", a, {"loss": loss.item()}, dict(zip(names, gradients))

    trainer = RewardTrainer(
        GPT2ForSequenceClassification(config), RewardConfig(**common), train_dataset=pairs, processing_class=tokenizer
    )
    for B, scale in [(1, 1.0), (5, 1.0), (8, 20.0)]:
        scores = normal(rng, 2 * B, 1, scale=scale)
        logits = torch.from_numpy(scores).requires_grad_()
        loss = trainer.compute_loss(network(logits=logits), dict(attention_mask=torch.ones(2 * B, 1)))
        names, (chosen, rejected) = ("chosen_scores", "rejected_scores"), np.split(scores[:, 0], 2)
        gradients = [x[:, 0].numpy() for x in torch.autograd.grad(loss, logits)[0].chunk(2)]
        a = dict(zip(names, (chosen, rejected)))
        yield "RewardTrainer.compute_loss", "bradley_terry_loss", a, {"loss": loss.item()}, dict(zip(names, gradients))

    for K, groups in [(2, 3), (4, 2), (8, 1)]:
        returns = normal(rng, K * groups, scale=3)
        trainer = RLOOTrainer(
            GPT2LMHeadModel(config),
            lambda completions, **_: returns.tolist(),
            RLOOConfig(num_generations=K, per_device_train_batch_size=K * groups, beta=0.0, max_completion_length=2, **common),
            train_dataset=pairs.select_columns("prompt"),
            processing_class=tokenizer,
        )
        advantages = trainer._generate_and_score_completions([dict(prompt="a b")] * (K * groups))["advantages"]
        yield (
            "RLOOTrainer._generate_and_score_completions",
            "rloo_advantages",
            dict(returns=returns, group=K),
            {"advantages": advantages.numpy()},
            {},
        )


def plain(x):
    """Arrays as lists of numbers of at most 12 decimals; masks as 0 and 1."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    return (x.astype(int) if x.dtype == bool else x.astype(float).round(12)).tolist() if isinstance(x, np.ndarray) else x


if __name__ == "__main__":
    maker = {f.__name__: f for f in (torchrl, stable_baselines3, rlax, trl)}[sys.argv[1]]
    fields = ("oracle", "ours", "arguments", "outputs", "gradients")
    cases = [json.dumps(plain(dict(zip(fields, case))), separators=(",", ":")) for case in maker()]
    package = f"{maker.__name__} {importlib.metadata.version(maker.__name__)}"
    file = Path(__file__).with_name(f"{maker.__name__}.json")
    file.write_text(f'{{"package": "{package}", "cases": [\n' + ",\n".join(cases) + "\n]}\n")
