"""Sections 2, 3, 5 and 6 of drpo.py on networks of two layers with random weights: batches, log-probabilities, scores, the
frozen twins, rollouts, and whole updates of every stage from a tiny run folder.

What is expected comes from plain transformers, one row at a time and without padding, or from a slow loop. Weights are drawn
large, so that distributions are far from uniform, and the end-of-text token is neither 0 nor the padding token."""

import copy
import dataclasses
import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import drpo
from tools import kv_cache, memory, rollout_check
from tools.models import last_logits
from tools.packing import row_states

NAN = float("nan")
WORDS = ["[UNK]", "[PAD]", "the", "<|endoftext|>", "good", *(f"w{i}" for i in range(59))]
VOCABULARY, PAD, EOS = len(WORDS), 1, 3
T = 8  # tokens of a response in the tiny runs


# ----------------------------------------------------------------------------------------------------------------------
# The tiny networks, tokenizer and corpus, as `module:function` sources of this very file


def tiny(Config, Model, seed, **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(
            Config(
                vocab_size=VOCABULARY,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                initializer_range=0.3,
                bos_token_id=EOS,
                eos_token_id=EOS,
                pad_token_id=PAD,
                **kwargs,
            )
        ).eval()


def gpt_neox(seed=0):
    return tiny(GPTNeoXConfig, GPTNeoXForCausalLM, seed, intermediate_size=64, hidden_dropout=0.0, attention_dropout=0.0)


def llama(seed=0):
    return tiny(LlamaConfig, LlamaForCausalLM, seed, intermediate_size=64)


def gpt2(seed=0):
    """Learned absolute positions: with rotary ones, positions that are off by a constant would go unseen."""
    return tiny(GPT2Config, GPT2LMHeadModel, seed)


def forgetful(seed=0):
    """Drops out half of everything, and is handed over in train mode."""
    network = tiny(GPTNeoXConfig, GPTNeoXForCausalLM, seed, intermediate_size=64, hidden_dropout=0.5, attention_dropout=0.5)
    return network.train()


def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", eos_token="<|endoftext|>")


def text(rng, low, high):
    return " ".join(rng.choice(WORDS[5:]) for _ in range(rng.randint(low, high)))


def rows(split, seed):
    """Ragged prompts and references, some of either too long for the tiny runs."""
    rng = random.Random(f"rows {split} {seed}")
    return [{"prompt": text(rng, 1, 9), "reference": text(rng, 1, 9)} for _ in range(40)]


def pairs(split, seed, words="pairs"):
    """The chosen response has the word "good" in it, the rejected one never has."""
    rng, result = random.Random(f"{words} {split} {seed}"), []
    for row in rows(split, seed):
        chosen = text(rng, 1, 5).split()
        chosen.insert(rng.randint(0, len(chosen)), "good")
        result.append({"prompt": row["prompt"], "chosen": " ".join(chosen), "rejected": text(rng, 1, 6)})
    return result


def other_pairs(split, seed):
    """The same prompts, other responses."""
    return pairs(split, seed, words="other pairs")


def settings(run_dir="unused", **changes):
    """Whatever the presets say: all that bears on these runs is given."""
    here = {
        name: f"{__name__}:{function}"
        for name, function in [
            ("model", "gpt_neox"),
            ("tokenizer", "tokenizer"),
            ("dataset", "rows"),
            ("preference_dataset", "pairs"),
        ]
    }
    given = {
        "run_dir": run_dir,
        "device": "cpu",
        "dtype": "float32",
        **here,
        "query_length": 8,
        "response_length": T,
        "preference_length": 10,
        "max_grad_norm": 1.0,
        "supervised_lora_r": 0,
        "micro_batch": 8,
        "save_every": 1,
        "sft_steps": 3,
        "sft_lr": 1e-2,
        "sft_batch_size": 8,
        "rm_steps": 3,
        "rm_lr": 3e-3,
        "rm_batch_size": 8,
        "updates": 1,
        "lora_r": 0,
        "batch_size": 8,
        "lr": 3e-3,
        "beta": 0.5,
        "reset_to": "reference",
        "temperature": 0.7,
        "epochs": 2,
        "kl_coef": 0.05,
        "cliprange_value": 0.2,
        "whiten_rewards": False,
        "missing_eos_score": -1.0,
        "dpo_beta": 0.05,
        "dpo_lr": 3e-3,
        "dpo_batch_size": 8,
        "eval_samples": 16,
        "eval_temperature": 0.7,
        **changes,
    }
    return drpo.parse([f"--{name}={value}" for name, value in given.items()])[1]


# ----------------------------------------------------------------------------------------------------------------------
# Helpers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(folder, stage, lora_r=4, ...) -> Settings of a run in `folder`, ready for that stage: SFT and reward model, where
    it needs them, have been trained for three steps each."""
    made = {}

    def start(folder, stage="drpo", **changes):
        model = changes.get("model", settings().model)
        if model not in made:
            made[model] = tmp_path_factory.mktemp("run")
            for needed in ("sft", "rm"):
                drpo.run_stage(needed, settings(made[model], model=model))
        for needed in {"sft": (), "rm": ("sft",)}.get(stage, ("sft", "rm")):
            shutil.copytree(made[model] / needed, Path(folder) / needed)
        return settings(folder, **changes)

    return start


def outcome(s, stage):
    """-> the trained weights in the last checkpoint, and the metrics without what the clock says."""
    [checkpoint] = Path(s.run_dir, stage, "checkpoint").iterdir()
    metrics = [json.loads(line) for line in Path(s.run_dir, stage, "metrics.jsonl").read_text().splitlines()]
    timed = {name for name in metrics[0] if name.startswith("seconds")} | {"tokens_per_second"}
    tensors = load_file(checkpoint / "tensors.safetensors")
    return (
        {name.removeprefix("param."): tensor for name, tensor in tensors.items() if name.startswith("param.")},
        [{name: value for name, value in line.items() if name not in timed} for line in metrics],
    )


def run(stage, s):
    drpo.run_stage(stage, s)
    return outcome(s, stage)


def largest_gap(a, b):
    """Over two dicts of tensors with the same names."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def assert_same_weights(a, b):
    """Bit for bit."""
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def token_lists(seed, *lengths):
    """Lists of random token ids; EOS and [PAD] come up among them."""
    rng = random.Random(seed)
    return [[rng.choice([EOS, PAD, rng.randrange(VOCABULARY), rng.randrange(VOCABULARY)]) for _ in range(n)] for n in lengths]


def ragged(seed=0):
    """-> queries, responses and their batch. The padding is a token that real rows contain."""
    queries, responses = token_lists(seed, 1, 4, 9, 6, 9, 2), token_lists(seed + 1, 3, 1, 7, 5, 2, 7)
    return queries, responses, drpo.padded(queries, responses, EOS, "cpu")


def uniforms(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def seen(batch, t_mask):
    """(B, T) over response steps -> (N,) over the tokens of all rows: those at which a forward pass decides these steps."""
    starts = [0, *batch["row_len"].cumsum(0).tolist()]
    tokens = torch.zeros(starts[-1], dtype=torch.bool)
    for row, t in t_mask.nonzero().tolist():
        tokens[starts[row] + batch["query_mask"][row].sum() - 1 + t] = True
    return tokens


@pytest.fixture
def leaf(monkeypatch):
    """The states of all tokens in the last pass, cut off from the network: leaf.states.grad is what came back to them."""
    kept = SimpleNamespace()

    def states_from_a_leaf(body, ids, lengths, places):
        kept.states = row_states(body, ids, lengths, torch.arange(len(ids))).detach().requires_grad_()
        return kept.states[places]

    monkeypatch.setattr(drpo, "row_states", states_from_a_leaf)
    return kept


@torch.no_grad()
def logits_of(network, ids):
    """Plain transformers on one row: (length, V), or (1,) from a reward model."""
    return network(torch.tensor([ids])).logits[0]


def train_a_little(parameters, loss_function, steps=3):
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_function().backward()
        optimizer.step()


every_network = pytest.mark.parametrize("make", [gpt_neox, llama, gpt2], ids=lambda make: make.__name__)
both_networks = pytest.mark.parametrize("model", ["gpt_neox", "llama"])
with_and_without_lora = pytest.mark.parametrize("lora_r", [0, 4])
each_stage = pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "drpo"])


# ----------------------------------------------------------------------------------------------------------------------
# Batches (section 2)


def test_each_epoch_of_draw_has_every_row_once_in_an_order_of_its_own():
    rows = list(range(10))
    drawn = [row for update in range(10) for row in drpo.draw(rows, 4, update, 0, "rl")]  # batches straddle the epochs
    epochs = [drawn[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == rows for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_draw_depends_on_seed_stream_and_update_alone():
    def batch(update=5, seed=0, stream="rl"):
        return drpo.draw(list(range(100)), 20, update, seed, stream)

    torch.manual_seed(1)
    first = batch()
    torch.rand(7), random.random()
    assert batch() == first
    assert first not in (batch(update=6), batch(seed=1), batch(stream="sft"))


def test_a_batch_larger_than_the_data_repeats_rows_evenly():
    drawn = drpo.draw(list("abc"), 7, 0, 0, "rl")
    assert sorted(drawn.count(row) for row in "abc") == [2, 2, 3]


def test_pack_puts_queries_on_the_left_of_one_column_and_responses_on_its_right():
    batch = drpo.padded([[7], [4, 5, 6]], [[8, 9], [EOS]], EOS, "cpu")
    assert batch["query"].tolist() == [[EOS, EOS, 7], [4, 5, 6]]
    assert batch["query_mask"].tolist() == [[False, False, True], [True, True, True]]
    assert batch["response"].tolist() == [[8, 9], [EOS, EOS]]
    assert batch["response_len"].tolist() == [2, 1]
    assert drpo.response_mask(batch).tolist() == [[True, True], [True, False]]
    assert drpo.padded([[7]], [[8]], EOS, "cpu", width=4)["response"].tolist() == [[8, EOS, EOS, EOS]]


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 100])
def test_micro_batches_hold_every_row_once_and_like_with_like_in_length(micro_batch):
    queries, responses, batch = ragged()
    visited, lengths = [], []
    for chunk, part in drpo.micro_batches(batch, settings(micro_batch=micro_batch)):
        assert len(chunk) <= micro_batch
        for i, row in enumerate(chunk.tolist()):
            assert part["query"][i][part["query_mask"][i]].tolist() == queries[row]
            assert part["response"][i, : part["response_len"][i]].tolist() == responses[row]
            visited.append(row)
            lengths.append(len(queries[row] + responses[row]))
    assert sorted(visited) == list(range(len(queries))) and lengths == sorted(lengths, reverse=True)


def test_a_pass_is_over_the_rows_one_after_another_without_padding():
    queries, responses = token_lists(0, 9, 2, 5), token_lists(1, 1, 6, 3)
    ids, lengths, before = drpo.packed(drpo.padded(queries, responses, EOS, "cpu", width=8))
    assert ids.tolist() == [token for query, response in zip(queries, responses) for token in query + response]
    assert lengths == [10, 8, 8] and before.shape == (3, 9)
    assert before[0, :2].tolist() == [8, 9]  # the last token of the query, and the only one of the response
    assert before[1, :7].tolist() == [11, 12, 13, 14, 15, 16, 17]
    assert before[2, :4].tolist() == [22, 23, 24, 25]


def test_tokens_after_an_eos_are_in_a_pass_where_a_rollout_went_on():
    batch = drpo.padded([[7], [8, 9]], [[4, EOS, 5], [EOS, 5, 6]], EOS, "cpu") | {"response_len": torch.tensor([2, 1])}
    ids, lengths, before = drpo.packed(batch)  # as with --masking official
    assert ids.tolist() == [7, 4, EOS, 5, 8, 9, EOS, 5, 6] and lengths == [4, 5]
    assert before.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]


def test_a_response_ends_with_eos_and_has_no_other():
    words = tokenizer()
    assert drpo.encode_response("w0 w1", words, 5) == [5, 6, EOS]
    assert drpo.encode_response("  w0 w1\n", words, 5) == [5, 6, EOS]
    assert drpo.encode_response("w0 <|endoftext|> w1 <|endoftext|>", words, 5) == [5, 6, EOS]
    assert drpo.encode_response("w0 w1", words, 3) == [5, 6, EOS]


def test_a_response_that_is_cut_loses_its_eos():
    assert drpo.encode_response("w0 w1 w2", tokenizer(), 3) == [5, 6, 7]


# ----------------------------------------------------------------------------------------------------------------------
# Log-probabilities and scores (section 3)


def plain_logprobs(network, query, response, temperature):
    """One row, no padding, nothing but transformers. -> every (t, V), those of the response (t,)."""
    every = (logits_of(network, query + response)[len(query) - 1 : -1] / temperature).log_softmax(-1)
    return every, every[torch.arange(len(response)), response]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@every_network
@torch.no_grad()
def test_logprobs_of_a_padded_batch_are_those_of_single_rows(make, temperature):
    network, (queries, responses, batch) = make(), ragged()
    logprobs, entropy = drpo.response_logprobs(network, batch, temperature)
    for row, (query, response) in enumerate(zip(queries, responses)):
        every, wanted = plain_logprobs(network, query, response, temperature)
        torch.testing.assert_close(logprobs[row, : len(response)], wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            entropy[row, : len(response)], torch.distributions.Categorical(logits=every).entropy(), rtol=0, atol=1e-5
        )


def capped(seed=0):
    """Gemma 2, whose logits x leave it as 5 tanh(x / 5)."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return tiny(
        Gemma2Config,
        Gemma2ForCausalLM,
        seed,
        intermediate_size=64,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=5.0,
    )


def test_a_model_whose_logits_are_not_a_linear_map_of_its_states_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        drpo.load_network(f"{__name__}:capped", settings())
    assert stopped.value.code == 2 and "scaled or capped" in capsys.readouterr().err


def unable_to_tell_rows_apart(seed=0):
    """A body that never hears of the rows in a pass, as one whose states go on from token to token by other ways."""
    network = gpt_neox(seed)
    forward = network.base_model.forward
    network.base_model.forward = lambda *args, row_lengths=None, **given: forward(*args, **given)
    return network


def without_positions(seed=0):
    """Learned positions, counted from the beginning of the pass whatever it is told."""
    network = gpt2(seed)
    forward = network.base_model.forward
    network.base_model.forward = lambda *args, position_ids=None, **given: forward(*args, **given)
    return network


def with_sinks(seed=0):
    """An attention that hands over more than queries, keys and values."""
    network = gpt_neox(seed)
    forward = network.base_model.forward
    network.base_model.forward = lambda *args, **given: forward(*args, **given, s_aux=torch.zeros(4))
    return network


def last_layer_twice(seed=0):
    """Its last layer feeds another: the MLP there is needed for all tokens."""
    network = gpt_neox(seed)
    layers = network.base_model.layers
    layers.append(layers[-1])
    return network


def short_sighted(seed=0):
    from transformers import MistralConfig, MistralForCausalLM

    return tiny(MistralConfig, MistralForCausalLM, seed, intermediate_size=64, num_key_value_heads=2, sliding_window=8)


@pytest.mark.parametrize("make", [unable_to_tell_rows_apart, without_positions, last_layer_twice])
def test_a_model_whose_rows_cannot_stand_one_after_another_is_refused(make, capsys):
    with pytest.raises(SystemExit) as stopped:
        drpo.load_network(f"{__name__}:{make.__name__}", settings())
    assert stopped.value.code == 2 and "which row stands before" in capsys.readouterr().err


def test_a_model_of_another_build_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        drpo.load_network(f"{__name__}:with_sinks", settings())
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "not built from" in err and len(err.splitlines()) == 1


def test_a_model_that_sees_fewer_tokens_than_a_row_has_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        drpo.load_network(f"{__name__}:short_sighted", settings(query_length=8, response_length=4))
    assert stopped.value.code == 2 and "sees 8 tokens only" in capsys.readouterr().err
    drpo.load_network(f"{__name__}:short_sighted", settings(query_length=2, response_length=4, preference_length=6))


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_the_logits_to_sample_from_are_those_of_the_head_on_the_last_states(bias):
    torch.manual_seed(0)
    head, states = torch.nn.Linear(5, 7, bias=bias), torch.randn(3, 4, 5)
    torch.testing.assert_close(last_logits(head, states), head(states[:, -1]))


@pytest.mark.parametrize("logits_at_once", [1, 3 * 7, 1000])  # a row at a time, three rows, all eleven
@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 7, dtype=torch.float32)])
def test_token_logprobs_and_their_gradients_are_those_of_a_log_softmax(monkeypatch, logits_at_once, bias):
    monkeypatch.setattr("tools.token_logprobs.LOGITS_AT_ONCE", logits_at_once)
    rng = torch.Generator().manual_seed(0)
    states, weight, direction = [torch.randn(*shape, generator=rng) for shape in ((11, 5), (7, 5), (11,))]
    tokens, results = torch.randint(7, (11,), generator=rng), []
    for ours in (True, False):
        leaves = [x.clone().requires_grad_() for x in (states, weight, *([] if bias is None else [bias]))]
        head = SimpleNamespace(weight=leaves[1], bias=None if bias is None else leaves[2])
        if ours:
            logprobs, entropy = drpo.token_logprobs(head, leaves[0], tokens, 0.7)
        else:
            every = (torch.nn.functional.linear(leaves[0], leaves[1], head.bias) / 0.7).log_softmax(-1)
            logprobs, entropy = every.gather(1, tokens[:, None])[:, 0], -(every.exp() * every).sum(-1).detach()
        assert not entropy.requires_grad
        (logprobs * direction).sum().backward()
        results.append([logprobs.detach(), entropy, *(leaf.grad for leaf in leaves)])
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)
    frozen = SimpleNamespace(weight=weight, bias=bias)
    for mine, wanted in zip(drpo.token_logprobs(frozen, states, tokens, 0.7), results[1]):  # where no gradient will be
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


def test_logits_are_made_in_parts_of_about_the_same_number_of_rows(monkeypatch):
    monkeypatch.setattr("tools.token_logprobs.LOGITS_AT_ONCE", 8 * 7)  # room for 8 rows
    mm, parts = torch.mm, []
    monkeypatch.setattr(torch, "mm", lambda h, W, out: parts.append(len(h)) or mm(h, W, out=out))
    drpo.token_logprobs(torch.nn.Linear(5, 7), torch.randn(17, 5), torch.zeros(17, dtype=torch.long))
    assert parts == [6, 6, 5]  # not 8, 8 and 1


def test_token_logprobs_of_no_token_at_all_are_empty_and_give_a_zero_gradient():
    states, head = torch.zeros(0, 5, requires_grad=True), torch.nn.Linear(5, 7)
    logprobs, _ = drpo.token_logprobs(head, states, torch.zeros(0, dtype=torch.long))
    logprobs.sum().backward()
    assert logprobs.shape == (0,) and states.grad.shape == (0, 5) and not head.weight.grad.any()


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation makes inside the context."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in (made if isinstance(made, (tuple, list)) else [made]) if isinstance(x, torch.Tensor)]
        self.numel = max([getattr(self, "numel", 0), *sizes])
        return made


def test_scoring_and_its_gradient_hold_logits_of_a_few_rows_only(monkeypatch):
    """Six rows of seven steps have 6 * 7 * 64 = 2,688 logits; 4 rows at a time, in two buffers, are 512."""
    monkeypatch.setattr("tools.token_logprobs.LOGITS_AT_ONCE", 4 * VOCABULARY)
    network, (_, _, batch) = gpt_neox(), ragged()
    states = drpo.response_states(network.base_model, batch, drpo.response_mask(batch)).detach().requires_grad_()
    monkeypatch.setattr(drpo, "row_states", lambda *_: states)
    network.requires_grad_(False)  # as under LoRA: the head is frozen
    with LargestTensor() as largest:
        drpo.sequence_logprobs(network, batch).sum().backward()
    assert largest.numel <= max(2 * 4 * VOCABULARY, VOCABULARY * 32, states.numel())  # the buffers, W transposed, the states
    assert states.grad.abs().sum() > 0


@every_network
@torch.no_grad()
def test_logprobs_would_show_rows_that_see_each_other(make, monkeypatch):
    network, batch = make(), ragged()[2]
    right, _ = drpo.response_logprobs(network, batch)
    monkeypatch.setattr(drpo, "row_states", lambda body, ids, lengths, places: row_states(body, ids, [len(ids)], places))
    wrong, _ = drpo.response_logprobs(network, batch)
    gaps = torch.where(drpo.response_mask(batch), (right - wrong).abs(), 0.0).amax(1)
    assert (gaps[1:] > 1e-2).all() and gaps[0] < 1e-5


@every_network
def test_the_last_mlp_sees_the_tokens_that_are_asked_for_and_no_gradient_changes(make, monkeypatch):
    """Held against all states, of which the same are then taken."""
    network, (_, _, batch) = make(), ragged()
    body, (ids, lengths, before) = network.base_model, drpo.packed(batch)
    at, seen = before[:, :-1][drpo.response_mask(batch)], []
    last = (body.h if hasattr(body, "h") else body.layers)[-1].mlp
    gradients = []
    for places in (at, torch.arange(len(ids))):
        network.zero_grad()
        counted = last.register_forward_hook(lambda module, given, out: seen.append(given[0].shape[1]))
        states = row_states(body, ids, lengths, places)
        counted.remove()
        states = states if places is at else states[at]
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        gradients.append([states.detach(), *(p.grad.clone() for p in body.parameters() if p.grad is not None)])
    assert seen == [len(at), len(ids)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_stands_in_the_padding_never_matters():
    network, head, (_, _, batch) = gpt_neox(), drpo.scalar_head(torch.ones(1, 32)), ragged()
    noise = torch.randint(VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
    other = {
        **batch,
        "query": torch.where(batch["query_mask"], batch["query"], noise[:, :9]),
        "response": torch.where(drpo.response_mask(batch), batch["response"], noise[:, 9:]),
    }
    assert not torch.equal(batch["query"], other["query"]) and not torch.equal(batch["response"], other["response"])
    for result in (
        lambda batch: drpo.sequence_logprobs(network, batch),
        lambda batch: drpo.end_scores(network.base_model, head, batch),
    ):
        torch.testing.assert_close(result(batch), result(other), rtol=0, atol=2e-5)


@every_network
@torch.no_grad()
def test_the_score_is_the_head_on_the_state_at_the_last_token_of_the_single_row(make):
    backbone, (queries, responses, batch) = make().base_model, ragged()
    head = drpo.scalar_head(torch.randn(1, 32, generator=torch.Generator().manual_seed(0)), 0.25)
    steps, scores = torch.arange(batch["response"].shape[1] + 1), drpo.end_scores(backbone, head, batch)
    states = drpo.response_states(backbone, batch, steps <= batch["response_len"][:, None])
    states = states.split([len(response) + 1 for response in responses])
    for row, (query, response) in enumerate(zip(queries, responses)):
        single = backbone(torch.tensor([query + response])).last_hidden_state[0]
        torch.testing.assert_close(states[row], single[len(query) - 1 :], rtol=0, atol=1e-5)
        torch.testing.assert_close(scores[row], head(single[-1])[0], rtol=0, atol=1e-5)


@both_networks
def test_a_saved_reward_model_gives_its_scores_with_transformers_alone(start, tmp_path, model):
    s = start(tmp_path, model=f"{__name__}:{model}")
    loaded = AutoModelForSequenceClassification.from_pretrained(f"{tmp_path}/rm").eval()
    queries = token_lists(0, 1, 4, 9, 6)
    responses = [[token for token in ids if token != EOS] + [EOS] for ids in token_lists(1, 3, 1, 7, 5)]
    with torch.no_grad():
        scores = drpo.end_scores(*drpo.load_reward(f"{tmp_path}/rm", s), drpo.padded(queries, responses, EOS, "cpu"))
    alone = torch.cat([logits_of(loaded, query + response) for query, response in zip(queries, responses)])
    torch.testing.assert_close(alone - loaded.config.reward_bias, scores, rtol=0, atol=1e-5)
    assert scores.std() > 0.1


def test_references_score_0_on_average_at_their_last_token(start, tmp_path):
    start(tmp_path)
    loaded, words = AutoModelForSequenceClassification.from_pretrained(f"{tmp_path}/rm").eval(), tokenizer()
    scores = [
        logits_of(loaded, words(row["prompt"])["input_ids"][-8:] + drpo.encode_response(row["reference"], words, T))
        for row in rows("train", 0)
    ]
    assert abs(loaded.config.reward_bias) > 0.02
    assert torch.cat(scores).mean().item() == pytest.approx(loaded.config.reward_bias, abs=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Frozen twins (section 3)


@with_and_without_lora
@pytest.mark.parametrize("make", [gpt_neox, llama], ids=lambda make: make.__name__)
def test_the_reference_is_the_sft_network_before_and_after_training(make, lora_r):
    _, _, batch = ragged()
    original = make()
    policy, reference = drpo.twin(copy.deepcopy(original), lora_r)
    with torch.no_grad(), reference() as network:
        assert torch.equal(drpo.response_logprobs(policy, batch)[0], drpo.response_logprobs(network, batch)[0])

    train_a_little(policy.parameters(), lambda: -drpo.sequence_logprobs(policy, batch).mean())
    with torch.no_grad():
        wanted, _ = drpo.response_logprobs(original, batch)
        with reference() as network:
            assert torch.equal(drpo.response_logprobs(network, batch)[0], wanted)
        assert (drpo.response_logprobs(policy, batch)[0] - wanted).abs().max() > 0.1  # and the adapter is on again


@with_and_without_lora
def test_the_reward_stays_while_the_critic_trains(start, tmp_path, lora_r):
    s, (_, _, batch) = start(tmp_path), ragged()
    backbone, reward_head = drpo.load_reward(f"{tmp_path}/rm", s, full=not lora_r)
    critic, reward = drpo.twin(backbone, lora_r)
    value_head = copy.deepcopy(reward_head).requires_grad_(True)

    everywhere = torch.arange(batch["response"].shape[1] + 1) <= batch["response_len"][:, None]  # and after the last token

    def values():
        return drpo.response_values(critic, value_head, batch, everywhere)

    with torch.no_grad(), reward() as network:
        before = drpo.end_scores(network, reward_head, batch)
        torch.testing.assert_close(values()[torch.arange(6), batch["response_len"]], before)  # the critic starts as it
    train_a_little([*critic.parameters(), *value_head.parameters()], lambda: (values() - 5.0).pow(2).mean())
    with torch.no_grad(), reward() as network:
        assert torch.equal(drpo.end_scores(network, reward_head, batch), before)
    assert (values()[torch.arange(6), batch["response_len"]] - before).abs().min() > 0.1


@with_and_without_lora
@torch.no_grad()
def test_dropout_is_off_whatever_mode_a_network_comes_in(lora_r):
    _, _, batch = ragged()
    dropping = forgetful()
    assert not torch.equal(*(drpo.response_logprobs(dropping, batch)[0] for _ in range(2)))
    policy, _ = drpo.twin(drpo.load_network(f"{__name__}:forgetful", settings()), lora_r)
    assert torch.equal(*(drpo.response_logprobs(policy, batch)[0] for _ in range(2)))


def test_a_fresh_adapter_leaves_everything_else_frozen():
    policy, _ = drpo.twin(gpt_neox(), 4)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)


# ----------------------------------------------------------------------------------------------------------------------
# Rollouts (section 5)


def slow_rollout(network, query, prefix, uniforms, temperature, stop_at_eos=True):
    """One row, the whole forward pass anew for each token: the first whose cumulative probability exceeds the uniform."""
    ids = list(prefix)
    while len(ids) < len(uniforms) and not (stop_at_eos and EOS in ids[len(prefix) :]):
        cdf = (logits_of(network, query + ids)[-1] / temperature).softmax(-1).cumsum(-1)
        ids.append(int((cdf <= uniforms[len(ids)] * cdf[-1]).sum()))
    return ids


def roll(network, queries, prefixes, uniforms, temperature=0.7, micro_batch=4, static_cache=False, **kwargs):
    words, s = SimpleNamespace(eos_token_id=EOS), settings(micro_batch=micro_batch, static_cache=static_cache)
    return drpo.rollout(network, queries, prefixes, uniforms, words, s, temperature, **kwargs)


def likely_eos(network):
    """The same network, in which EOS comes up often: its row of the output matrix is that of a likely token, and more."""
    with torch.no_grad():
        states = network.base_model(torch.tensor(token_lists(7, 20))).last_hidden_state[0]
        weight = network.get_output_embeddings().weight
        weight[EOS] = 1.2 * weight[(states @ weight.T).mean(0).argmax()]
    return network


def reset_rows():
    """Nine rows: ragged queries, prefixes of length 0, 1 and up to 11 of 12; EOS may stand in a query, never in a prefix."""
    queries = token_lists(2, 1, 5, 9, 3, 9, 2, 7, 4, 6)
    prefixes = [[token for token in ids if token != EOS] for ids in token_lists(3, 0, 1, 11, 0, 4, 1, 11, 0, 7)]
    prefixes[2], prefixes[6] = [*prefixes[2], *[9] * 11][:11], [*prefixes[6], *[9] * 11][:11]
    return queries, prefixes, uniforms(4, 9, 12)


@pytest.mark.parametrize("stop_at_eos", [True, False])
@every_network
def test_rollouts_with_a_cache_are_those_of_whole_forward_passes(make, stop_at_eos):
    network, (queries, prefixes, u) = likely_eos(make()), reset_rows()
    for temperature in (0.7, 1.0):
        network.set_attn_implementation("sdpa")
        wanted = [slow_rollout(network, *row, temperature, stop_at_eos) for row in zip(queries, prefixes, u)]
        network.set_attn_implementation("by_row")  # as every network that was loaded or scored has it
        assert roll(network, queries, prefixes, u, temperature, stop_at_eos=stop_at_eos) == wanted


@pytest.mark.parametrize("make", [gpt_neox, llama], ids=lambda make: make.__name__)
def test_rollouts_do_not_depend_on_the_rows_decoded_beside_them(make):
    network, (queries, prefixes, u) = likely_eos(make()), reset_rows()
    first, *others = [roll(network, queries, prefixes, u, micro_batch=size) for size in (1, 2, 3, 8, 100)]
    assert all(other == first for other in others)
    assert roll(network, queries[::-1], prefixes[::-1], u.flip(0), micro_batch=3) == first[::-1]


@pytest.mark.parametrize("make", [gpt_neox, llama], ids=lambda make: make.__name__)
def test_a_rollout_reset_to_a_prefix_of_itself_ends_as_it_did(make):
    """A prefix fed with the query, and the same tokens decoded one at a time, lead to the same state."""
    network, (queries, _, u) = likely_eos(make()), reset_rows()
    whole = roll(network, queries, [[]] * 9, u)
    for share in (0.0, 0.3, 0.7, 0.99):
        prefixes = [ids[: int(share * len(ids))] for ids in whole]
        assert roll(network, queries, prefixes, u) == whole
    assert len(set(map(tuple, whole))) > 5


def test_a_rollout_keeps_its_prefix_and_ends_at_eos_or_after_T_tokens():
    network, (queries, prefixes, u) = likely_eos(gpt_neox()), reset_rows()
    responses = roll(network, queries, prefixes, u)
    ended = [ids[-1] == EOS for ids in responses]
    for ids, prefix in zip(responses, prefixes):
        assert ids[: len(prefix)] == prefix and len(prefix) < len(ids) <= 12
        assert EOS not in ids[:-1]
        assert ids[-1] == EOS or len(ids) == 12
    assert any(ended) and not all(ended)
    assert any(end and len(ids) < 12 for end, ids in zip(ended, responses))


def test_a_rollout_that_does_not_stop_at_eos_has_T_tokens_and_begins_as_the_one_that_does():
    network, (queries, prefixes, u) = likely_eos(gpt_neox()), reset_rows()
    stopped, full = [roll(network, queries, prefixes, u, stop_at_eos=stop) for stop in (True, False)]
    assert all(len(ids) == 12 for ids in full)
    assert [ids[: len(short)] for ids, short in zip(full, stopped)] == stopped


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_eos_may_come_in_the_first_in_the_last_and_in_no_place(prefix):
    """Uniforms from the middle of what draws the wanted token; prefixes of 0, of 1 and of all but one of six tokens."""
    network, query, rng = likely_eos(gpt_neox()), [5, 6, 7], random.Random(prefix)
    start = [rng.randrange(4, VOCABULARY) for _ in range(prefix)]
    rest = [rng.randrange(4, VOCABULARY) for _ in range(5 - prefix)]
    wanted, u = [[*start, EOS], [*start, *rest, EOS], [*start, *rest, 9]], torch.zeros(3, 6)
    for row, ids in enumerate(wanted):
        for t in range(prefix, len(ids)):
            cdf = F.pad(logits_of(network, query + ids[:t])[-1].double().softmax(-1).cumsum(-1), (1, 0))
            u[row, t] = (cdf[ids[t]] + cdf[ids[t] + 1]) / 2
    assert roll(network, [query] * 3, [start] * 3, u, temperature=1.0) == wanted


def test_a_reset_saves_decoding_steps():
    network, calls = gpt_neox(), []
    network.base_model.register_forward_hook(lambda *_: calls.append(1))
    roll(network, [[5], [6, 7]], [[8] * 9, [9] * 10], uniforms(0, 2, 12), stop_at_eos=False)
    assert len(calls) == 3


def test_the_sampler_draws_from_the_softmax_at_its_temperature():
    network, n, temperature = gpt_neox(), 4000, 0.7
    tokens = torch.tensor(roll(network, [[5, 6, 7]] * n, [[]] * n, uniforms(0, n, 1), temperature, micro_batch=n))[:, 0]
    counts = torch.bincount(tokens, minlength=VOCABULARY)

    def chi_square(temperature):  # of the nine likeliest tokens, and all others as a tenth
        p = (logits_of(network, [5, 6, 7])[-1] / temperature).softmax(-1)
        top = p.topk(9).indices
        expected, found = [torch.cat([x[top], x.sum()[None] - x[top].sum()]) for x in (n * p, counts)]
        return ((found - expected) ** 2 / expected).sum()

    assert chi_square(temperature) < 27.88  # the 99.9 % quantile with 9 degrees of freedom
    assert chi_square(0.8) > 60  # and a wrong temperature shows


@pytest.mark.parametrize("stop_at_eos", [True, False])
@every_network
def test_a_cache_of_fixed_size_gives_the_tokens_of_one_that_grows(make, stop_at_eos):
    network, given = likely_eos(make()), reset_rows()
    grown = roll(network, *given, stop_at_eos=stop_at_eos)
    assert roll(network, *given, stop_at_eos=stop_at_eos, static_cache=True) == grown
    assert len({len(ids) for ids in grown}) > 3 or not stop_at_eos  # rows left at different times


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@every_network
def test_a_cuda_graph_gives_the_tokens_of_a_cache_that_grows(make):
    network, (queries, prefixes, u) = likely_eos(make()).cuda(), reset_rows()
    words, s = SimpleNamespace(eos_token_id=EOS), settings(micro_batch=4, device="cuda")
    both = [
        drpo.rollout(network, queries, prefixes, u, words, dataclasses.replace(s, static_cache=static), 0.7)
        for static in (False, True)
    ]
    assert both[0] == both[1]


def test_a_cache_with_room_holds_what_a_growing_one_holds_and_takes_its_memory_once():
    config, rng, rows, memory = gpt_neox().config, torch.Generator().manual_seed(0), 5, set()
    roomy, growing = kv_cache.roomy_cache(config, 3), DynamicCache(config=config)
    for n, keep in ((4, [0, 1, 2, 3, 4]), (1, [0, 4, 2]), (1, [0, 1, 2]), (1, [2])):
        for layer in range(config.num_hidden_layers):
            x = [torch.randn(rows, 4, n, 8, generator=rng) for _ in range(2)]
            for one, other in zip(roomy.update(*x, layer), growing.update(*x, layer)):
                assert torch.equal(one, other)
            assert roomy.get_mask_sizes(1, layer) == growing.get_mask_sizes(1, layer)
        for cache in (roomy, growing):
            cache.batch_select_indices(torch.tensor(keep))
        rows = len(keep)
        memory |= {x.untyped_storage().data_ptr() for layer in roomy.layers for x in (layer.keys, layer.values)}
    assert len(memory) == 2 * config.num_hidden_layers


def test_rows_that_end_are_replaced_by_the_last_ones_and_most_stay():
    assert kv_cache.gaps_filled([0, 3, 4, 5]) == [0, 5, 4, 3] and kv_cache.gaps_filled([1, 2]) == [2, 1]
    assert kv_cache.gaps_filled(range(4)) == [0, 1, 2, 3] and kv_cache.gaps_filled([]) == []


def test_a_token_without_probability_is_never_drawn():
    probabilities = torch.tensor([0, 0.25, 0.5, 0, 0.25, 0])

    def body(input_ids, **_):  # its states are the logits, and the head changes nothing
        states = probabilities.log().clamp(min=-1e9).expand(len(input_ids), 1, -1)
        return SimpleNamespace(last_hidden_state=states)

    body.config = GPT2Config(n_layer=0)

    def identity():
        return SimpleNamespace(weight=torch.eye(len(probabilities)), bias=None)

    stub = SimpleNamespace(base_model=body, get_output_embeddings=identity)
    u = torch.tensor([0.0, 0.2, 0.3, 0.7, 0.8, 1 - 2**-24])  # the first and last that torch.rand can give
    drawn = roll(stub, [[5]] * 6, [[]] * 6, u[:, None], temperature=1.0, micro_batch=6)
    assert drawn == [[1], [1], [2], [2], [4], [4]]

    for n in range(100, 200):  # rounding: for many n these add up to less than 1
        probabilities = torch.cat([torch.ones(n) / n, torch.zeros(1)])
        assert roll(stub, [[5]], [[]], u[-1:, None], temperature=1.0) == [[n - 1]]


@pytest.mark.parametrize("stop_at_eos", [True, False])
@every_network
def test_sound_rollouts_pass_their_check(make, stop_at_eos, capsys):
    network, (queries, prefixes, u) = likely_eos(make()), reset_rows()
    responses = roll(network, queries, prefixes, u, stop_at_eos=stop_at_eos)
    rollout_check.check(network, queries, prefixes, responses, u, tokenizer(), settings(micro_batch=4))
    drawn = sum(map(len, responses)) - sum(map(len, prefixes))
    assert f"check: {drawn} tokens drawn are those of a plain forward pass" in capsys.readouterr().out


@every_network
def test_positions_that_are_wrong_in_decoding_fail_the_check_of_rollouts(make, capsys):
    network, (queries, prefixes, u) = likely_eos(make()), reset_rows()
    sound = roll(network, queries, prefixes, u)

    def one_further(module, args, kwargs):
        if kwargs.get("past_key_values") and kwargs["past_key_values"].get_seq_length():  # not in prefill
            kwargs["position_ids"] = kwargs["position_ids"] + 1
        return args, kwargs

    network.base_model.register_forward_pre_hook(one_further, with_kwargs=True)
    responses = roll(network, queries, prefixes, u)
    assert responses != sound
    with pytest.raises(SystemExit) as end:
        rollout_check.check(network, queries, prefixes, responses, u, tokenizer(), settings(micro_batch=1))
    error = capsys.readouterr().err
    row, place = map(int, re.search(r"row (\d+): response token (\d+) is", error).groups())
    assert end.value.code == 3 and error.count("\n") == 1
    same = slow_rollout(network, queries[row], responses[row][:place], u[row], 0.7)[place]
    assert f"is {responses[row][place]}, where a plain forward pass draws {same}:" in error and same != responses[row][place]


def test_the_check_of_rollouts_forgives_rounding_and_no_more(capsys):
    """A uniform a little beyond the step between two tokens may draw either; one that is far from it, only its own."""
    network, query = gpt_neox(), [5, 6, 7]
    cdf = (logits_of(network, query)[-1].double() / 0.7).softmax(-1).cumsum(-1)
    token = int(torch.diff(cdf).argmax())  # the next one has the most probability
    for beyond, fine in ((1e-5, True), (1e-2, False)):
        given = [query], [[]], [[token, 9]], torch.tensor([[cdf[token] + beyond, 0.5]]).float()
        given[3][0, 1] = (logits_of(network, query + [token])[-1] / 0.7).softmax(-1).cumsum(-1)[8:10].mean()
        if fine:
            rollout_check.check(network, *given, tokenizer(), settings())
            assert "; 1 of them within rounding" in capsys.readouterr().out
        else:
            with pytest.raises(SystemExit):
                rollout_check.check(network, *given, tokenizer(), settings())
            assert (
                f"row 0: response token 0 is {token}, where a plain forward pass draws {token + 1}" in capsys.readouterr().err
            )


def test_a_run_checks_the_rollouts_of_every_update(start, tmp_path, capsys):
    run("drpo", start(tmp_path, check_rollouts=True, updates=2))
    assert capsys.readouterr().out.count("tokens drawn are those of a plain forward pass") == 2


# ----------------------------------------------------------------------------------------------------------------------
# What gets a gradient


def sampled_mask(batch):
    """Resets of 0 to 4 tokens for the six rows of `ragged`."""
    return drpo.token_masks(torch.tensor([1, 0, 4, 0, 1, 3]), batch["response_len"], 7)[0]


def test_only_the_decisions_that_the_policy_sampled_get_a_policy_gradient(leaf):
    network, (_, _, batch) = gpt_neox(), ragged()
    mask, advantages = sampled_mask(batch), torch.linspace(-2, 3, 42).reshape(6, 7)
    for given in (None, mask):  # computed on the whole response, or where it is needed
        logprobs, _ = drpo.response_logprobs(network, batch, 0.7, given)
        drpo.ppo_policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2)[0].backward()
        assert torch.equal((leaf.states.grad != 0).any(-1), seen(batch, mask))


def test_only_the_states_in_which_the_policy_acted_get_a_value_gradient(leaf):
    backbone, (_, _, batch) = gpt_neox().base_model, ragged()
    mask, head = sampled_mask(batch), drpo.scalar_head(torch.ones(1, 32))
    for given in (drpo.response_mask(batch), mask):
        values = drpo.response_values(backbone, head, batch, given)
        drpo.ppo_value_loss(values, values.detach(), values.detach() + 1.0, mask, 0.2)[0].backward()
        assert torch.equal((leaf.states.grad != 0).any(-1), seen(batch, mask))


def test_nan_outside_the_mask_does_not_reach_the_networks_gradient():
    network, (_, _, batch) = gpt_neox(), ragged()
    mask, advantages = sampled_mask(batch), torch.linspace(-2, 3, 42).reshape(6, 7)
    old_logprobs = drpo.response_logprobs(network, batch, 0.7)[0].detach() - 0.05

    def gradients(old_logprobs, advantages):
        network.zero_grad()
        logprobs, _ = drpo.response_logprobs(network, batch, 0.7)
        drpo.ppo_policy_loss(logprobs, old_logprobs, advantages, mask, 0.2)[0].backward()
        return {name: p.grad.clone() for name, p in network.named_parameters()}

    clean = gradients(old_logprobs, advantages)
    planted = gradients(torch.where(mask, old_logprobs, NAN), torch.where(mask, advantages, NAN))
    assert_same_weights(clean, planted)
    assert max(gradient.abs().max() for gradient in clean.values()) > 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# The stages (section 6): what they optimise


def test_the_sft_loss_is_the_mean_cross_entropy_of_all_tokens_of_single_rows(start, tmp_path):
    _, metrics = run("sft", start(tmp_path, "sft", sft_steps=1, micro_batch=3))
    network, words, losses = gpt_neox(0), tokenizer(), []
    for row in drpo.draw(rows("train", 0), 8, 0, 0, "sft"):
        ids = words(row["prompt"])["input_ids"][-8:] + drpo.encode_response(row["reference"], words, T)
        losses += [-plain_logprobs(network, ids[:1], ids[1:], 1.0)[1]]
    assert metrics[0]["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)


@pytest.fixture(scope="module")
def marked_run(start, tmp_path_factory):
    """A run whose reward model has seen forty steps of pairs in which the chosen response says "good"."""
    s = start(tmp_path_factory.mktemp("marked"), "rm", rm_steps=40)
    drpo.run_stage("rm", s)
    return s


def test_the_reward_model_separates_separable_pairs(marked_run):
    result = json.loads(Path(marked_run.run_dir, "rm", "result.json").read_text())
    assert result["accuracy"] > 0.9
    assert result["accuracy_by_batch"] == {"all": {"right": round(result["accuracy"] * 40), "pairs": 40}}
    words, reward = tokenizer(), AutoModelForSequenceClassification.from_pretrained(f"{marked_run.run_dir}/rm").eval()
    for row in pairs("validation", 0)[:10]:  # and with transformers alone it is the chosen that wins
        chosen, rejected = [
            logits_of(reward, words(f"{row['prompt']} {row[name]} <|endoftext|>")["input_ids"])
            for name in ("chosen", "rejected")
        ]
        assert chosen > rejected


def tokenizer_without_padding():
    """Its every token has its row in the embedding, so that none is left for a [PAD], and padding is with EOS."""
    words = tokenizer()
    words.pad_token = words.eos_token
    return words


def test_a_reward_model_whose_padding_is_eos_still_reads_eos_with_transformers_alone(start, tmp_path):
    s = start(tmp_path, "sft", tokenizer=f"{__name__}:tokenizer_without_padding")
    drpo.run_stage("sft", s)
    drpo.run_stage("rm", s)
    words, model = tokenizer(), AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    ids = words(f"{rows('train', 0)[0]['prompt']} good <|endoftext|>")["input_ids"]
    with torch.no_grad():
        state = model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
    assert ids[-1] == EOS and logits_of(model, ids).item() == pytest.approx((model.score.weight[0] @ state).item(), abs=1e-5)


def test_dpo_starts_at_log_2_and_learns_separable_pairs(start, tmp_path):
    _, metrics = run("dpo", start(tmp_path, "dpo", updates=30, dpo_beta=0.3))
    assert metrics[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and metrics[0]["accuracy"] == 0.0
    assert min(line["accuracy"] for line in metrics[-5:]) >= 0.75
    assert metrics[-1]["loss"] < 0.4
    words, dpo, sft = tokenizer(), *(AutoModelForCausalLM.from_pretrained(tmp_path / stage) for stage in ("dpo", "sft"))

    def preference(network, row):
        query, *responses = [words(row[name])["input_ids"] for name in ("prompt", "chosen", "rejected")]
        chosen, rejected = [plain_logprobs(network, query, [*response, EOS], 1.0)[1].sum() for response in responses]
        return chosen - rejected

    moved = torch.stack([preference(dpo, row) - preference(sft, row) for row in pairs("validation", 0)[:10]])
    assert moved.mean() > 1.0 and (moved > 0).float().mean() >= 0.8


@pytest.mark.parametrize("stage", ["drpo", "ppo"])
def test_policy_optimisation_raises_the_score_that_it_maximises(marked_run, tmp_path, stage):
    """Mostly by learning to end its responses, as one that does not end scores -3."""
    shutil.copytree(marked_run.run_dir, tmp_path, dirs_exist_ok=True)
    s = settings(tmp_path, updates=12, batch_size=32, micro_batch=32, missing_eos_score=-3.0, kl_coef=0.01)
    _, metrics = run(stage, s)
    first, last = [sum(line["score"] for line in lines) / 3 for lines in (metrics[:3], metrics[-3:])]
    assert last > first + 0.5
    assert metrics[0]["kl"] == pytest.approx(0.0, abs=1e-5) and metrics[-1]["kl"] > 0.1


@pytest.mark.parametrize("masking", ["sampled", "official"])
def test_the_score_lands_on_eos_wherever_it_stands_and_no_eos_costs_the_penalty(start, tmp_path, monkeypatch, masking):
    """EOS early; EOS as the very last token, where there is no padding; no EOS. On the first update the KL is 0, and the
    critic is the reward model, read at the state before each token."""
    s = start(tmp_path, batch_size=3, masking=masking, missing_eos_score=-7.0)
    responses = [[10, 11, EOS], [12, 13, 14, 15, 16, 17, 18, EOS], [19, 20, 21, 22, 23, 24, 25, 26]]
    after_eos = [[30, EOS, 31, 32, 33], [], []] if masking == "official" else [[], [], []]  # C decodes on after EOS
    reset_len, seen = torch.tensor([1, 0, 4]), []
    monkeypatch.setattr(drpo, "rollout", lambda *_, **__: [ids + rest for ids, rest in zip(responses, after_eos)])
    monkeypatch.setattr(drpo, "sample_reset_lengths", lambda *_: reset_len)
    gae = drpo.gae
    monkeypatch.setattr(drpo, "gae", lambda *args: seen.append(args[:3]) or gae(*args))
    _, metrics = run("drpo", s)

    reward, words = AutoModelForSequenceClassification.from_pretrained(f"{tmp_path}/rm").eval(), tokenizer()
    [(rewards, values, mask)], scores = seen, []
    for i, (row, ids) in enumerate(zip(drpo.draw(rows("train", 0), 3, 0, 0, "rl"), responses)):
        query = words(row["prompt"])["input_ids"][-8:]
        with torch.no_grad():
            states = reward.base_model(torch.tensor([query + ids])).last_hidden_state[0]
            every = reward.score(states)[:, 0] - reward.config.reward_bias
        wanted = torch.where(mask[i, : len(ids)], every[len(query) - 1 : -1], 0.0)
        torch.testing.assert_close(values[i, : len(ids)], wanted, rtol=0, atol=1e-5)
        scores.append(every[-1].item() if EOS in ids else -7.0)
    wanted = torch.zeros(3, T)
    wanted[0, 2], wanted[1, 7], wanted[2, 7] = torch.tensor(scores)
    torch.testing.assert_close(rewards, wanted, rtol=0, atol=1e-5)
    sampled = [[0, 1, 1, 0, 0, 0, 0, 0], [1] * 8, [0] * 4 + [1] * 4]
    assert mask.int().tolist() == (sampled if masking == "sampled" else [[1] * 8] * 3)
    assert metrics[0]["score"] == pytest.approx(sum(scores) / 3, abs=1e-5)
    assert metrics[0]["eos_rate"] == pytest.approx(2 / 3) and metrics[0]["response_tokens"] == pytest.approx(19 / 3)


@with_and_without_lora
def test_the_first_pass_over_a_batch_meets_the_policy_and_the_values_that_it_was_collected_with(start, tmp_path, lora_r):
    _, [line] = run("drpo", start(tmp_path, lora_r=lora_r, epochs=1, temperature=0.6))
    assert line["ratio"] == pytest.approx(1.0, abs=1e-5)
    for name in ("kl", "approx_kl", "approx_kl3", "clipfrac", "vf_clipfrac", "pg_loss"):  # whitened, A is 0 on average
        assert line[name] == pytest.approx(0.0, abs=1e-4), name
    n = line["tokens_decoded"]  # V - R is -A
    mean_square = line["advantage_std"] ** 2 * (n - 1) / n + line["advantage_mean"] ** 2
    assert line["vf_loss"] == pytest.approx(0.5 * mean_square, rel=1e-4)


@pytest.mark.parametrize("reset_to", ["reference", "chosen"])
def test_rollouts_start_with_a_prefix_of_the_response_that_is_reset_to(start, tmp_path, monkeypatch, reset_to):
    s, calls, original = start(tmp_path, beta=1.0, reset_to=reset_to), [], drpo.rollout

    def recorded(policy, queries, prefixes, *rest, **kwargs):
        calls.append((queries, prefixes))
        return original(policy, queries, prefixes, *rest, **kwargs)

    monkeypatch.setattr(drpo, "rollout", recorded)
    _, metrics = run("drpo", s)
    words, source = tokenizer(), rows("train", 0) if reset_to == "reference" else pairs("train", 0)
    responses = {}
    for row in source:
        responses.setdefault(tuple(words(row["prompt"])["input_ids"][-8:]), []).append(words(row[reset_to])["input_ids"])
    for query, prefix in zip(*calls[0]):
        assert 1 <= len(prefix) <= T - 1
        assert prefix in [ids[: len(prefix)] for ids in responses[tuple(query)]]
    assert metrics[0]["reset_share"] == 1.0
    assert metrics[0]["tokens_forced"] == sum(map(len, calls[0][1]))


# ----------------------------------------------------------------------------------------------------------------------
# The stages: micro-batches, beta = 0, interruption


@each_stage
def test_micro_batch_changes_neither_gradient_nor_weights_nor_metrics(start, tmp_path, monkeypatch, stage):
    gradients, original = [], drpo.step

    def recorded(optimizer, s, where, batch):
        params = [p for p in optimizer.param_groups[0]["params"] if p.grad is not None]
        gradients.append({i: p.grad.clone() for i, p in enumerate(params)})
        return original(optimizer, s, where, batch)

    monkeypatch.setattr(drpo, "step", recorded)

    def once(micro_batch):
        gradients.clear()
        s = start(
            tmp_path / str(micro_batch),
            stage,
            micro_batch=micro_batch,
            sft_steps=1,
            sft_lr=3e-3,
            rm_steps=1,
            rm_batch_size=7,
            dpo_batch_size=7,
            whiten_rewards=True,
        )  # 7 pairs: 4 and 3, or one by one
        weights, [metrics] = run(stage, s)
        return gradients[0], weights, metrics

    gradient, weights, metrics = once(8)
    assert max(g.abs().max() for g in gradient.values()) > 1e-2
    for micro_batch in (1, 3):
        other_gradient, other_weights, other_metrics = once(micro_batch)
        assert largest_gap(gradient, other_gradient) < 1e-5
        assert largest_gap(weights, other_weights) < 1e-5
        assert other_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5)


@with_and_without_lora
def test_in_float64_no_micro_batch_changes_the_gradient_of_drpo(start, tmp_path, monkeypatch, lora_r):
    """Networks, heads, losses, and `float()`: all of them double."""
    gradients, original, load_network = [], drpo.step, drpo.load_network

    def recorded(optimizer, *rest):
        gradients.append(torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"] if p.grad is not None]))
        return original(optimizer, *rest)

    s = start(tmp_path, lora_r=lora_r, epochs=1, whiten_rewards=True)
    monkeypatch.setattr(drpo, "step", recorded)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for module in ("drpo", "tools.models"):  # the latter loads the reward model
        monkeypatch.setattr(f"{module}.load_network", lambda *args, **kwargs: load_network(*args, **kwargs).double())
    torch.set_default_dtype(torch.float64)
    try:
        for micro_batch in (1, 2, 4, 8):
            shutil.rmtree(tmp_path / "drpo", ignore_errors=True)
            drpo.run_stage("drpo", dataclasses.replace(s, micro_batch=micro_batch))
    finally:
        monkeypatch.undo()
        torch.set_default_dtype(torch.float32)
    assert gradients[0].dtype == torch.float64 and gradients[0].abs().max() > 1e-2
    assert all(torch.allclose(gradient, gradients[0], rtol=0, atol=1e-9) for gradient in gradients[1:])


@with_and_without_lora
def test_beta_0_is_ppo_bit_for_bit(start, tmp_path, lora_r):
    changes = {"updates": 2, "lora_r": lora_r}
    drpo_weights, drpo_metrics = run("drpo", start(tmp_path / "drpo", beta=0.0, **changes))
    ppo_weights, ppo_metrics = run("ppo", start(tmp_path / "ppo", beta=0.5, **changes))
    assert_same_weights(drpo_weights, ppo_weights)
    assert drpo_metrics == ppo_metrics
    assert all(line["reset_share"] == line["tokens_forced"] == 0 for line in ppo_metrics)


@with_and_without_lora
def test_a_run_depends_on_no_random_numbers_but_its_own(start, tmp_path, lora_r):
    def weights(name):
        return run("drpo", start(tmp_path / name, lora_r=lora_r))[0]

    torch.manual_seed(1), random.seed(1)
    first = weights("first")
    torch.manual_seed(2), random.seed(2)
    assert_same_weights(weights("second"), first)


def test_beta_above_0_is_not_ppo(start, tmp_path):
    drpo_weights, metrics = run("drpo", start(tmp_path / "drpo", beta=0.5))
    ppo_weights, _ = run("ppo", start(tmp_path / "ppo", beta=0.5))
    assert largest_gap(drpo_weights, ppo_weights) > 1e-4
    assert 0 < metrics[0]["reset_share"] < 1 and metrics[0]["tokens_forced"] > 0


def test_at_beta_0_what_would_be_reset_to_plays_no_part(start, tmp_path):
    def weights(beta, preference_dataset):
        s = start(
            tmp_path / f"{beta} {preference_dataset}",
            beta=beta,
            reset_to="chosen",
            preference_dataset=f"{__name__}:{preference_dataset}",
        )
        return run("drpo", s)[0]

    assert_same_weights(weights(0.0, "pairs"), weights(0.0, "other_pairs"))
    assert largest_gap(weights(0.5, "pairs"), weights(0.5, "other_pairs")) > 1e-4


@pytest.mark.parametrize("stage, lora_r", [("sft", 0), ("rm", 0), ("dpo", 0), ("drpo", 0), ("drpo", 4)])
def test_an_interrupted_stage_goes_on_to_the_same_weights_and_metrics(start, tmp_path, monkeypatch, stage, lora_r):
    """Interrupted in its fourth update, saved after the second: the third is done again, and stands in the log once."""

    def begin(name):
        return start(tmp_path / name, stage, updates=4, sft_steps=4, rm_steps=4, save_every=2, lora_r=lora_r)

    uninterrupted, s, original = begin("uninterrupted"), begin("interrupted"), drpo.draw
    weights, metrics = run(stage, uninterrupted)

    def interrupt(rows, size, update, *rest):
        if update == 3:
            raise KeyboardInterrupt
        return original(rows, size, update, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(drpo, "draw", interrupt)
        drpo.run_stage(stage, s)
    half_way, logged = outcome(s, stage)
    assert len(logged) == 3 and largest_gap(half_way, weights) > 1e-4

    resumed_weights, resumed_metrics = run(stage, s)
    assert_same_weights(resumed_weights, weights)
    assert resumed_metrics == metrics and [line["update"] for line in metrics] == [1, 2, 3, 4]
    for name, tensor in load_file(tmp_path / "uninterrupted" / stage / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "interrupted" / stage / "model.safetensors")[name], tensor)


def test_a_checkpoint_of_other_settings_is_not_continued(start, tmp_path, capsys):
    drpo.run_stage("drpo", start(tmp_path))
    (tmp_path / "drpo" / "result.json").unlink()
    with pytest.raises(SystemExit) as exit:
        drpo.run_stage("drpo", settings(tmp_path, kl_coef=0.2))
    assert exit.value.code == 2 and "kl_coef was 0.05, is 0.2" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# The stages: what they refuse to go on with


def stops(capsys, s, *words, stage="drpo"):
    """The stage ends with status 3, and says so in these words, on one line."""
    with pytest.raises(SystemExit) as exit:
        drpo.run_stage(stage, s)
    _, name, message = capsys.readouterr().err.rpartition("drpo.py: ")
    assert exit.value.code == 3 and name and all(word in message.splitlines()[0] for word in words), message


def test_a_sound_first_update_prints_three_checks(start, tmp_path, capsys):
    drpo.run_stage("drpo", start(tmp_path))
    assert capsys.readouterr().out.count("check: ") == 3


def test_a_reference_that_is_not_the_sft_network_stops_the_run(start, tmp_path, monkeypatch, capsys):
    original = drpo.twin

    def mistaken(*args):
        trained, frozen = original(*args)
        with torch.no_grad():
            next(trained.parameters()).mul_(1.01)
        return trained, frozen

    monkeypatch.setattr(drpo, "twin", mistaken)
    stops(capsys, start(tmp_path), "reference is not the SFT model")


@pytest.mark.parametrize("shift", [-1.0, 1.0])
def test_a_reward_model_whose_references_do_not_score_0_stops_the_run(start, tmp_path, capsys, shift):
    s, config = start(tmp_path), tmp_path / "rm" / "config.json"
    changed = json.loads(config.read_text())
    changed["reward_bias"] += shift
    config.write_text(json.dumps(changed))
    stops(capsys, s, "reward model does not see the references")


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_resets_that_do_not_happen_as_often_as_beta_says_stop_the_run(start, tmp_path, monkeypatch, capsys, share):
    original = drpo.sample_reset_lengths
    monkeypatch.setattr(drpo, "sample_reset_lengths", lambda lengths, beta, *rest: original(lengths, share, *rest))
    stops(capsys, start(tmp_path, beta=0.5, batch_size=32), "resets do not happen")


@pytest.mark.parametrize("other_checks", [True, False])
def test_dropout_stops_the_run(start, tmp_path, monkeypatch, capsys, other_checks):
    original = drpo.load_network

    def with_dropout(*args, **kwargs):
        network = original(*args, **kwargs).train()
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        return network

    for module in ("drpo", "tools.models"):  # the latter loads the reward model
        monkeypatch.setattr(f"{module}.load_network", with_dropout)
    if not other_checks:  # then the ratio alone has to find it
        monkeypatch.setattr(drpo, "check_first_update", lambda *_: None)
    stops(capsys, start(tmp_path), *([] if other_checks else ["drpo update 1", "dropout"]))


@each_stage
def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_move(start, tmp_path, monkeypatch, capsys, stage):
    original, kept, s = drpo.training, {}, start(tmp_path, stage, updates=3, sft_steps=3, rm_steps=3)

    def planted(*args):
        for update, optimizer, metrics in original(*args):
            if update == 1:
                for i, p in enumerate(p for p in args[3].parameters() if p.requires_grad):
                    p.data.view(-1)[0] = NAN
                    kept[i] = p, p.detach().clone()
            yield update, optimizer, metrics

    monkeypatch.setattr(drpo, "training", planted)
    stops(capsys, s, f"{stage} update 2", "not finite", stage=stage)
    for now, before in kept.values():
        torch.testing.assert_close(now.detach(), before, rtol=0, atol=0, equal_nan=True)
    weights, metrics = outcome(s, stage)  # the checkpoint is still that of update 1
    assert len(metrics) == 1 and all(tensor.isfinite().all() for tensor in weights.values())
    assert not Path(s.run_dir, stage, "result.json").exists()
    assert {"query", "response"} <= load_file(tmp_path / stage / "bad_batch.safetensors").keys()


@pytest.mark.parametrize(
    "name, found", [("penalised_rewards", {"rewards", "advantages"}), ("end_scores", {"scores", "rewards"})]
)
def test_a_reward_that_is_not_a_number_stops_the_run_and_its_batch_is_kept(start, tmp_path, monkeypatch, capsys, name, found):
    s, original = start(tmp_path), getattr(drpo, name)

    def planted(*args):
        result = original(*args).clone()
        if name == "penalised_rewards" or len(result) == 8:  # the rollouts' scores; the check's are of more rows
            result.view(-1)[-1 if name == "end_scores" else slice(None)] = NAN
        return result

    monkeypatch.setattr(drpo, name, planted)
    monkeypatch.setattr(drpo, "check_references", lambda *_: None)
    stops(capsys, s, "drpo update 1", "the gradient", "rewards")
    kept = load_file(tmp_path / "drpo" / "bad_batch.safetensors")
    assert all(not kept[name].isfinite().all() for name in found) and kept["response"].shape == (8, T)


# ----------------------------------------------------------------------------------------------------------------------
# The stages: what they leave behind


@with_and_without_lora
@both_networks
def test_the_saved_policy_is_the_one_in_memory(start, tmp_path, model, lora_r):
    s = start(tmp_path, model=f"{__name__}:{model}", lora_r=lora_r, lr=1e-2)
    weights, _ = run("drpo", s)
    policy, _ = drpo.twin(drpo.load_network(f"{tmp_path}/sft", s, full=True), lora_r)
    trained = {name.removeprefix("policy."): tensor for name, tensor in weights.items() if name.startswith("policy.")}
    assert not policy.load_state_dict(trained, strict=False).unexpected_keys

    [ids] = token_lists(0, 20)
    wanted = logits_of(policy, ids)
    saved, sft = [AutoModelForCausalLM.from_pretrained(tmp_path / stage) for stage in ("drpo", "sft")]
    torch.testing.assert_close(logits_of(saved, ids), wanted, rtol=0, atol=5e-5)  # merging rounds
    assert (logits_of(sft, ids) - wanted).abs().max() > 1e-2
    if lora_r:
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(sft, f"{tmp_path}/drpo/adapter")
        torch.testing.assert_close(logits_of(adapted, ids), wanted, rtol=0, atol=5e-5)


@with_and_without_lora
def test_the_checkpoint_holds_a_value_head_that_has_left_the_reward_head(start, tmp_path, lora_r):
    s = start(tmp_path, lora_r=lora_r)
    weights, _ = run("drpo", s)
    _, reward_head = drpo.load_reward(f"{tmp_path}/rm", s)
    for name in ("weight", "bias"):
        assert (weights[f"value_head.{name}"] - getattr(reward_head, name)).abs().max() > 1e-4
    critic = {name for name in weights if name.startswith("critic.")}
    assert critic and all("lora_" in name for name in critic) == bool(lora_r)


def test_the_saved_tokenizer_is_the_one_of_the_run(start, tmp_path):
    drpo.run_stage("drpo", start(tmp_path))
    words, text = tokenizer(), "w3 good w58 the"
    for stage in ("sft", "rm", "drpo"):
        loaded = AutoTokenizer.from_pretrained(tmp_path / stage)
        assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (EOS, PAD, VOCABULARY)
        assert loaded(text)["input_ids"] == words(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "drpo").generation_config
    assert config.eos_token_id == EOS


def test_supervised_stages_with_lora_save_networks_with_the_adapter_merged_in(start, tmp_path):
    s = start(tmp_path, "sft", supervised_lora_r=4, sft_lr=3e-2, rm_lr=3e-2)
    sft_weights, _ = run("sft", s)
    run("rm", s)
    assert all("lora_" in name for name in sft_weights)
    merged, original = AutoModelForCausalLM.from_pretrained(tmp_path / "sft").state_dict(), gpt_neox(0).state_dict()
    moved = {name for name in merged if (merged[name] - original[name]).abs().max() > 1e-3}
    assert moved == {name for name in original if "query_key_value.weight" in name}
    words = tokenizer()  # the bias was measured with the adapter on
    scores = drpo.reference_scores(*drpo.load_reward(f"{tmp_path}/rm", s), rows("train", 0), s, words)
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Activation checkpointing


def kept_for_backward(function):
    """Bytes that autograd holds until the backward pass of function(), parameters aside."""
    kept = {}

    def pack(x):
        if not isinstance(x, nn.Parameter) and not isinstance(x._base, nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, so that no other takes its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function().backward()
    return sum(storage.nbytes() for storage in kept.values())


@with_and_without_lora
@every_network
def test_activation_checkpointing_keeps_less_for_backward_and_changes_no_gradient(make, lora_r):
    network, _ = drpo.twin(make(), lora_r)
    _, _, batch = ragged()

    def measured():
        network.zero_grad()
        kept = kept_for_backward(lambda: drpo.response_logprobs(network, batch)[0].sum())
        return kept, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}

    kept, gradients = measured()
    memory.checkpoint_layers(network)
    kept_less, same = measured()
    assert kept_less < 0.6 * kept
    assert max(g.abs().max() for g in gradients.values()) > 1e-2
    assert largest_gap(gradients, same) < 1e-6
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("stage", ["sft", "drpo"])
@with_and_without_lora
def test_a_run_with_activation_checkpointing_ends_at_the_same_weights_and_metrics(start, tmp_path, monkeypatch, stage, lora_r):
    calls, original = [], memory.checkpoint
    monkeypatch.setattr(memory, "checkpoint", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))

    def once(on):
        s = start(tmp_path / str(on), stage, lora_r=lora_r, supervised_lora_r=lora_r, sft_steps=1, checkpoint_activations=on)
        return run(stage, s)

    (weights, metrics), nothing, (same, again) = once(False), list(calls), once(True)
    assert not nothing and calls
    assert largest_gap(weights, same) < 1e-6
    assert again[0] == pytest.approx(metrics[0], rel=1e-5, abs=1e-6)
