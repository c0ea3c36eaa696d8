"""Rollouts and resets: sampling from exactly the softmax that is scored, on random networks of one and two layers."""

import copy
import dataclasses
from types import SimpleNamespace

import conftest
import pytest
import torch
from test_models import EOS, KINDS, S, tiny, token_lists
from torch import nn
from transformers import GPT2Config

import drpo

T = 12


def roll(network, queries, prefixes, uniforms, temperature=0.7, micro_batch=1, eos=EOS):
    s = dataclasses.replace(S, micro_batch=micro_batch)
    return drpo.rollout(network, queries, prefixes, uniforms, SimpleNamespace(eos_token_id=eos), s, temperature)


def uniforms(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def likely_eos(network):
    """The same network, in which EOS comes up often: its row of the output matrix is that of a likely token, and more."""
    states = network.base_model(torch.tensor(token_lists(7, 20))).last_hidden_state[0]
    weight = network.get_output_embeddings().weight
    weight[EOS] = 1.2 * weight[(states @ weight.T).mean(0).argmax()]
    return network


# Nine rows: ragged queries, and prefixes of 0, 1, 4, 7 and T - 1 tokens. EOS may be in a query, never in a prefix.
QUERIES = token_lists(2, 1, 5, 9, 3, 9, 2, 7, 4, 6)
PREFIXES = [[5 + (i + t) % 50 for t in range(n)] for i, n in enumerate((0, 1, T - 1, 0, 4, 1, T - 1, 0, 7))]
U = uniforms(9, T)


@pytest.mark.parametrize("kind", [*KINDS, "bloom", "falcon"])
def test_rollouts_are_those_of_whole_forward_passes(kind):
    network = likely_eos(tiny(kind, **({"alibi": True, "num_kv_heads": 4} if kind == "falcon" else {})))
    for temperature in (0.7, 1.0):
        wanted = [conftest.plain_sample(network, *row, temperature, EOS) for row in zip(QUERIES, PREFIXES, U)]
        assert all(roll(network, QUERIES, PREFIXES, U, temperature, size) == wanted for size in (1, 2, 100))  # beside any rows
    seen = {(len(prefix), len(ids), ids[-1] == EOS) for ids, prefix in zip(wanted, PREFIXES)}
    assert {True, False} == {ended for *_, ended in seen} and any(n < T for _, n, _ in seen)
    if kind == "gpt_neox":  # EOS early, at the last token with and without a prefix, and never
        assert {(0, 3, True), (0, T, True), (T - 1, T, True), (0, T, False)} <= seen


def test_a_token_without_probability_is_never_drawn():
    def drawn(probabilities, u):
        def body(input_ids, **_):  # its states are the logits, and the head changes nothing
            return SimpleNamespace(last_hidden_state=probabilities.log().clamp(min=-1e9).expand(len(input_ids), 1, -1))

        body.config, head = GPT2Config(n_layer=0), SimpleNamespace(weight=torch.eye(len(probabilities)), bias=None)
        network = SimpleNamespace(base_model=body, get_output_embeddings=lambda: head)
        return roll(network, [[5]] * len(u), [[]] * len(u), torch.tensor(u)[:, None], temperature=1.0)

    last = 1 - 2**-24  # the first and the last that torch.rand can give are 0 and this
    found = drawn(torch.tensor([0, 0.25, 0.5, 0, 0.25, 0]), [0.0, 0.2, 0.3, 0.7, 0.8, last])
    assert found == [[1], [1], [2], [2], [4], [4]]
    for n in range(100, 150):  # for many n these add up to less than 1
        assert drawn(torch.cat([torch.ones(n) / n, torch.zeros(1)]), [last]) == [[n - 1]]


# ---- Resets ------------------------------------------------------------------------------------------------
def resets(update=0, policy=None, reference=None, rows=None, tokenizer=None, **changes):
    """-> one batch of reset_rollouts on the corpus of conftest.py."""
    changes = {"reset_to": "reference", "batch_size": 64} | changes
    s = dataclasses.replace(drpo.parse(["drpo", *conftest.SMALL])[1], **changes)
    roles = SimpleNamespace(policy=policy or conftest.network(), reference=reference)
    return drpo.reset_rollouts(roles, rows or conftest.posts(), update, tokenizer or conftest.tokenizer(), s)


def lists(batch):  # -> queries, responses and prefixes as lists of ids
    rows, ends = batch["ids"].tolist(), batch["query_len"] + batch["response_len"]
    queries = [ids[:n] for ids, n in zip(rows, batch["query_len"])]
    responses = [ids[:n] for ids, n in zip(batch["response"].tolist(), batch["response_len"])]
    assert [ids[:n] for ids, n in zip(rows, ends)] == [query + response for query, response in zip(queries, responses)]
    return queries, responses, [ids[:n] for ids, n in zip(responses, batch["reset_len"])]


@pytest.mark.parametrize("beta, include_prompt, shortest", [(0.0, False, 0), (1.0, False, 1), (1.0, True, 0), (0.5, False, 0)])
def test_prefixes_are_those_of_the_references(beta, include_prompt, shortest):
    batch, tokenizer = resets(beta=beta, reset_include_prompt=include_prompt), conftest.tokenizer()
    queries, responses, prefixes = lists(batch)
    references = {row["prompt"]: row["reference"].split() for row in conftest.posts()}
    whole = [references[tokenizer.decode(query)] for query in queries]
    texts = [tokenizer.decode(prefix).split() for prefix in prefixes]
    assert all(text == reference[: len(text)] for text, reference in zip(texts, whole))
    assert min(map(len, texts)) == shortest and any(map(bool, texts)) == bool(beta)
    assert not beta or any(len(text) == len(reference) == 3 for text, reference in zip(texts, whole))
    assert batch["has_eos"].tolist() == [ids[-1] == 0 for ids in responses]


def test_a_batch_depends_on_seed_and_update_alone():
    def drawn(seed, *key):
        torch.manual_seed(seed)
        batch = resets(key[0], rows=conftest.posts()[3:4], beta=0.5, seed=key[1])  # one row: nothing else differs
        return [*map(tuple, batch["ids"].tolist()), *batch["reset_len"].tolist()]

    first = drawn(1, 0, 0)
    assert drawn(2, 0, 0) == first and first not in (drawn(1, 1, 0), drawn(1, 0, 1))


def test_reset_to_sft_starts_with_what_the_sft_network_writes():
    certain, endless = conftest.network(1), conftest.tokenizer()
    certain.get_output_embeddings().weight.data *= 1e4  # one token has all the probability
    endless.add_special_tokens({"eos_token": "[NEVER]"})  # which the network cannot draw
    batch = resets(reference=certain, tokenizer=endless, beta=1.0, reset_to="sft", batch_size=700)
    written = {}
    for query, _, prefix in zip(*lists(batch)):
        key = tuple(query)
        written[key] = written.get(key) or conftest.plain_sample(certain, query, [], torch.full((7,), 0.5), 1.0, eos=8)
        assert prefix == written[key][: len(prefix)]
    counts = torch.bincount(batch["reset_len"], minlength=7)[1:].double()  # each of 1 ... 6 as often
    assert counts.sum() == 700 and ((counts - 700 / 6) ** 2 / (700 / 6)).sum() < 20.52  # chi-square, 5 degrees, 99.9 %


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_update_on_cuda_is_that_of_the_cpu():
    results = []
    for device in ("cpu", "cuda"):
        s = dataclasses.replace(drpo.parse(["drpo", *conftest.SMALL, "--device", device])[1], beta=0.5, temperature=0.7)
        network, backbone = [conftest.network().to(device) for _ in range(2)]
        reward = backbone.base_model, drpo.scalar_head(torch.linspace(-1, 1, 16, device=device)[None])
        roles = drpo.build_roles(network, reward, s)
        optimizer = torch.optim.AdamW(nn.ModuleList([roles.policy, roles.critic, roles.value_head]).parameters(), 1e-3)
        rows, tokenizer = conftest.posts(), conftest.tokenizer()
        responses = drpo.reset_rollouts(roles, rows, 0, tokenizer, s)["response"].tolist()
        metrics = drpo.drpo_update(roles, optimizer, rows, 0, tokenizer, s, "drpo update 1")
        figures = {name: value for name, value in metrics.items() if not name.startswith(("seconds", "gb"))}
        results.append((responses, figures, copy.deepcopy(network).cpu().state_dict()))
    (responses, figures, weights), (same, others, moved) = results
    assert same == responses and others == pytest.approx(figures, rel=1e-3, abs=1e-4)
    assert max((moved[name] - weights[name]).abs().max() for name in weights) < 1e-3
