"""Models: parity with transformers on single rows without padding, LoRA twins, what is saved, and what is refused.

Networks have two layers with random weights, so large that distributions are far from uniform."""

import dataclasses
import gc
import random
import shutil
import weakref

import conftest
import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import drpo

VOCABULARY, PAD, EOS = 64, 1, 3  # EOS is neither 0 nor the padding
S = dataclasses.replace(drpo.parse(["sft"])[1], device="cpu", lora_r=4)
KINDS = {  # name: model type, and what differs from `tiny`
    "gpt_neox": ("gpt_neox", {}),
    "sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {"intermediate_size": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 4}),
}


def tiny(kind, **changes):  # a network of a name in KINDS, or of a model type
    kind, known = KINDS.get(kind, (kind, {}))
    sizes = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    rest = dict(num_key_value_heads=2, max_position_embeddings=64, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD)
    config = AutoConfig.for_model(kind, **{**sizes, **rest, "initializer_range": 0.3, **known, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def loaded(monkeypatch, network, trained=False, **changes):
    """The network after load_network, which gets it from a module:function."""
    monkeypatch.setattr(conftest, "network", lambda: network)
    return drpo.load_network("conftest:network", dataclasses.replace(S, **changes), trained=trained)


def token_lists(seed, *lengths):  # random ids; EOS and padding come up among them
    rng = random.Random(seed)
    return [[rng.choice([EOS, PAD, rng.randrange(VOCABULARY), rng.randrange(VOCABULARY)]) for _ in range(n)] for n in lengths]


QUERIES, RESPONSES = token_lists(0, 1, 4, 9, 6, 9, 2), token_lists(1, 3, 1, 7, 5, 2, 7)
BATCH = drpo.collate(QUERIES, RESPONSES, 7, "cpu")
NOISE, ENDS = torch.tensor(token_lists(3, *[16] * 6)), (BATCH["query_len"] + BATCH["response_len"])[:, None]
BATCH["ids"] = torch.where(torch.arange(16) < ENDS, BATCH["ids"], NOISE)  # padding must not matter
MASK = drpo.token_mask(torch.tensor([1, 0, 4, 0, 1, 3]), BATCH["response_len"], 7)
WHOLE = drpo.token_mask(0 * BATCH["query_len"], BATCH["response_len"], 7)
HEAD = drpo.scalar_head(torch.randn(1, 32, generator=torch.Generator().manual_seed(0)), 0.25)
with_and_without_lora = pytest.mark.parametrize("lora_r", [0, 4])


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


# ---- Log-probabilities, values and scores ------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logprobs_values_and_scores_equal_plain_transformers(kind):
    network, (whole, _) = tiny(kind), drpo.response_logprobs(tiny(kind), BATCH, WHOLE)
    logprobs, entropy = drpo.response_logprobs(network, BATCH, MASK, 0.7)
    body = network.base_model
    values, scores = drpo.response_values(body, HEAD, BATCH, MASK), drpo.end_scores(body, HEAD, BATCH)
    for i, (query, response) in enumerate(zip(QUERIES, RESPONSES)):
        ids, m, before = torch.tensor([query + response]), MASK[i, : len(response)], slice(len(query) - 1, -1)
        plain, tempered = [torch.distributions.Categorical(logits=network(ids).logits[0, before] / x) for x in (1.0, 0.7)]
        every = HEAD(body(ids).last_hidden_state[0])[:, 0]
        close(whole[i, : len(m)], plain.log_prob(torch.tensor(response)))
        close(logprobs[i, : len(m)], torch.where(m, tempered.log_prob(torch.tensor(response)), 0.0))
        close(entropy[i, : len(m)], torch.where(m, tempered.entropy(), 0.0))
        close(values[i, : len(m)], torch.where(m, every[before], 0.0))
        close(scores[i], every[-1])
    assert not torch.stack([logprobs, entropy, values])[:, ~WHOLE].any() and logprobs.dtype == values.dtype == torch.float32
    close(drpo.sequence_logprobs(network, BATCH), whole.sum(1))


# ---- Twins and LoRA ----------------------------------------------------------------------------------------
def train_a_little(network):
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 1e-2, eps=1e-5)
    for _ in range(3):
        (-drpo.sequence_logprobs(network, BATCH).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


@with_and_without_lora
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_frozen_twin_stays_the_network_that_it_was(monkeypatch, lora_r, checkpointed):
    wanted = drpo.sequence_logprobs(tiny("llama"), BATCH).detach()
    network = loaded(monkeypatch, tiny("llama"), trained=not lora_r, checkpoint_activations=checkpointed)
    policy, reference = drpo.twin(network, dataclasses.replace(S, lora_r=lora_r), "policy")
    with torch.no_grad():
        assert torch.equal(drpo.sequence_logprobs(reference, BATCH), drpo.sequence_logprobs(policy, BATCH))  # KL is 0
    train_a_little(policy)
    with torch.no_grad():
        assert torch.equal(drpo.sequence_logprobs(reference, BATCH), wanted)
    assert (drpo.sequence_logprobs(policy, BATCH) - wanted).abs().min() > 0.1  # and the adapter is on again


def test_the_next_network_finds_the_last_one_gone(monkeypatch):
    network = loaded(monkeypatch, tiny("gpt_neox"), checkpoint_activations=True)
    weight = weakref.ref(network.base_model.layers[0].attention.dense.weight)
    del network
    monkeypatch.undo()  # it held the network too
    gc.disable()
    try:
        loaded(monkeypatch, tiny("gpt_neox"))
    finally:
        gc.enable()
    assert weight() is None


def test_adapters_are_trained_alone_and_depend_on_seed_and_role():
    def adapters(seed, role):
        return {name: p for name, p in drpo.add_lora(tiny("gpt_neox"), 4, seed, role).named_parameters() if p.requires_grad}

    first, others = adapters(0, "policy"), [adapters(0, "critic"), adapters(0, "sft"), adapters(1, "policy")]
    before = torch.manual_seed(7).get_state()
    again, after = adapters(0, "policy"), torch.get_rng_state()
    assert len(first) == 4 and all("lora_" in name for name in first) and torch.equal(before, after)
    for name, p in first.items():  # A is random, B starts at 0
        assert torch.equal(p, again[name]) and p.any() == ("lora_A" in name)
        assert all(torch.equal(p, other[name]) == ("lora_B" in name) for other in others)


def test_a_model_unknown_to_peft_gets_lora_on_all_linear_layers():
    network = drpo.add_lora(tiny("smollm3"), 4, 0, "policy").get_base_model()
    adapted = {name for name, module in network.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == 2 * 7 and "lm_head" not in adapted  # q, k, v, o, gate, up and down


@with_and_without_lora
def test_checkpointed_activations_give_the_same_gradients(monkeypatch, lora_r):
    results = []
    for checkpointed in (False, True):
        network, calls = loaded(monkeypatch, tiny("llama"), trained=not lora_r, checkpoint_activations=checkpointed), []
        network.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        policy, _ = drpo.twin(network, dataclasses.replace(S, lora_r=lora_r), "policy")
        drpo.sequence_logprobs(policy, BATCH).sum().backward()
        results.append((len(calls), {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}))
    (once, gradients), (twice, same) = results
    assert (once, twice) == (1, 2) and gradients.keys() == same.keys() and max(g.abs().max() for g in gradients.values()) > 0.01
    for name, gradient in gradients.items():
        close(same[name], gradient)


# ---- What is saved -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, tied", [("gpt_neox", False), ("qwen2", True), ("smollm3", True)])
@with_and_without_lora
def test_a_saved_network_gives_the_same_logits_and_stays_tied(tmp_path, kind, tied, lora_r):
    policy, _ = drpo.twin(tiny(kind, tie_word_embeddings=tied), dataclasses.replace(S, lora_r=lora_r), "policy")
    start = drpo.sequence_logprobs(policy, BATCH).detach()
    train_a_little(policy)
    wanted = drpo.sequence_logprobs(policy, BATCH).detach()
    drpo.save_network(policy, conftest.tokenizer(), tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    close(drpo.sequence_logprobs(saved, BATCH).detach(), wanted, atol=1e-4)
    if lora_r:
        adapted = PeftModel.from_pretrained(tiny(kind, tie_word_embeddings=tied), tmp_path / "adapter")
        close(drpo.sequence_logprobs(adapted, BATCH).detach(), wanted)
    assert (wanted - start).abs().min() > 0.1 and (tmp_path / "adapter").exists() == bool(lora_r)
    assert (saved.get_output_embeddings().weight is saved.get_input_embeddings().weight) == tied


@torch.no_grad()
def test_merging_keeps_updates_that_bfloat16_cannot_hold(tmp_path):
    policy = drpo.add_lora(conftest.network().bfloat16(), 2, 0, "policy")
    name, layer = next((name, x) for name, x in policy.named_modules() if hasattr(x, "lora_B"))
    layer.lora_B["default"].weight.fill_(1e-5)
    wanted = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    assert not torch.equal(wanted.bfloat16().float(), wanted)
    drpo.save_network(policy, conftest.tokenizer(), tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).get_submodule(name.removeprefix("base_model.model."))
    close(saved.weight, wanted, atol=1e-8)


def test_a_reward_model_may_start_from_another_network(small_run, tmp_path):
    shutil.copytree(small_run / "sft", tmp_path / "sft")
    start = tiny("llama", vocab_size=len(conftest.WORDS), eos_token_id=0)
    start.save_pretrained(tmp_path / "start")
    changes = ["--rm_model", str(tmp_path / "start"), "--rm_lr", "1e-6", "--run_dir", str(tmp_path)]
    drpo.main(["rm", *conftest.SMALL, *changes])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert model.config.model_type == "llama" and model.score.weight.shape == (1, 32)
    close(model.model.layers[1].mlp.up_proj.weight, start.model.layers[1].mlp.up_proj.weight, atol=1e-4)


# ---- What is refused, and bfloat16 -------------------------------------------------------------------------
CANNOT = {"gemma2": {"final_logit_softcapping": 5.0, "head_dim": 8}, "granite": {"logits_scaling": 8.0}}
CANNOT |= {"bert": {"is_decoder": True}, "jamba": {}, "mamba": {}}  # model type: what it has of its own


@pytest.mark.parametrize("kind", CANNOT)
def test_a_model_that_cannot_be_used_is_refused_when_loaded(monkeypatch, one_line, kind):
    assert "cannot be used" in one_line([], main=lambda _: loaded(monkeypatch, tiny(kind, **CANNOT[kind])))


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}
FACTORS = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
LONGROPE = {"rope_parameters": FACTORS, "max_position_embeddings": 256, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("kind, changes", {"llama": DYNAMIC, "phi3": LONGROPE, "gpt2": {}}.items())
def test_a_model_without_room_for_the_rows_is_refused(monkeypatch, tmp_path, one_line, kind, changes):
    monkeypatch.setattr(conftest, "network", lambda: tiny(kind, **changes))
    argv = ["sft", *conftest.SMALL, "--sft_steps", "1", "--query_length", "40"]
    assert "64 positions for 65" in one_line([*argv, "--preference_length", "25", "--run_dir", tmp_path / "25"])
    drpo.main([*argv, "--preference_length", "24", "--run_dir", str(tmp_path / "24")])


def test_compiled_layers_stay_below_the_limit_of_graphs(small_run, tmp_path, monkeypatch):
    """Beyond it torch continues without compiling. Here by graphs alone, no kernels, with a reward model of another kind."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(drpo.GradientCheckpointingLayer, "compile", lambda x, **given: compile(x, backend="eager", **given))
    monkeypatch.setattr("tools.report.write", lambda run: None)
    tiny("llama", vocab_size=len(conftest.WORDS), eos_token_id=0).save_pretrained(tmp_path / "start")
    more = f"--compile True --lora_r 4 --dtype bfloat16 --rm_model {tmp_path / 'start'} --run_dir {tmp_path}".split()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for stage in ("sft", "rm", "ppo", "eval"):
            drpo.main([stage, *conftest.SMALL, *more])
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize("trained, dtype", [(True, torch.float32), (False, torch.bfloat16)])
def test_bfloat16_changes_products_only(tmp_path, trained, dtype):
    s, exact = dataclasses.replace(S, dtype="bfloat16"), tiny("gpt_neox", initializer_range=0.1)
    exact.save_pretrained(tmp_path)
    wanted, scores = drpo.response_logprobs(exact, BATCH, MASK)[0], drpo.end_scores(exact.base_model, HEAD, BATCH)
    with drpo.precision(s):
        network = drpo.load_network(str(tmp_path), s, trained=trained)
        assert {x.dtype for x in network.buffers()} == {torch.float32}  # such as the frequencies of RoPE
        policy = drpo.add_lora(network, 4, 0, "policy")
        assert {(p.dtype, p.requires_grad) for p in policy.parameters()} == {(dtype, False), (torch.float32, True)}
        logprobs, entropy = drpo.response_logprobs(policy, BATCH, MASK)
        found = drpo.end_scores(network.base_model, HEAD, BATCH)
        state = network.base_model(BATCH["ids"]).last_hidden_state[0, 3]
    close(found[0], HEAD(state.float())[0])  # the head is float32, outside of autocast
    assert logprobs.dtype == entropy.dtype == found.dtype == torch.float32
    assert 0 < (logprobs - wanted).abs().max() < 0.1 and 0 < (found - scores).abs().max() < 0.3


def test_another_rounding_of_bfloat16_products_is_accepted(monkeypatch):
    network = tiny("llama", initializer_range=0.1)

    def another_kernel(body, args, given):  # as on a GPU, with and without a mask
        network.set_attn_implementation("eager" if given.get("attention_mask") is None else "sdpa")

    network.base_model.register_forward_pre_hook(another_kernel, with_kwargs=True)
    with drpo.precision(dataclasses.replace(S, dtype="bfloat16")):
        loaded(monkeypatch, network, trained=True, dtype="bfloat16")
