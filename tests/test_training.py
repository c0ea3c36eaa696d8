"""Sections 6 and 7 of drpo.py: what each stage optimises, against plain loops over single rows, and what stops a run."""

import json
import math

import conftest
import pytest
import torch
from conftest import log_of, plain_sample
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import drpo
from tools.planted import PLANTS, old_logprobs_at_another_temperature


@pytest.fixture
def run(start, tmp_path):
    """run(stage, folder="run", beta=0.5, ...) -> the trained weights in its last checkpoint, and its metrics."""

    def run(stage, folder="run", **changes):
        drpo.main(start(stage, folder, **changes))
        folder = tmp_path / folder / stage
        return torch.load(folder / "checkpoint.pt", weights_only=True)["params"], log_of(folder)

    return run


def gap(a, b):  # the largest difference between two dicts of tensors with the same names
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def weights_of(modules):
    return {f"{name}.{key}": p.data for name, module in modules.items() for key, p in module.named_parameters()}


# ---- Plain loops. One row at a time, no padding, no cache, no function of drpo.py that computes a loss, a mask or a rollout
def encode(row, field, length, words):  # -> (ids of the prompt, ids of the response)
    return words(row["prompt"])["input_ids"][-8:], ([*words(row[field])["input_ids"], 0])[:length]


def plain_logits(network, query, response, temperature):  # the logits that each response token is drawn from, (n, V)
    return network(torch.tensor([query + response])).logits[0, len(query) - 1 : -1] / temperature


def plain_logprobs(network, query, response, temperature=1.0):
    return plain_logits(network, query, response, temperature).log_softmax(-1)[range(len(response)), response]


def plain_states(body, query, response):  # the states before each response token, and the one at the last token: (n + 1, d)
    return body(input_ids=torch.tensor([query + response])).last_hidden_state[0, len(query) - 1 :]


def plain_whiten(x, centre=True):
    return (x - x.mean()) / (x.var(correction=0) + 1e-8).sqrt() + (0 if centre else x.mean())


def plain_optimizer(modules, lr):  # -> step(loss, share of the learning rate) -> norm of the gradient, clipped to 1
    params = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.01)

    def step(loss, share=1.0):
        optimizer.param_groups[0]["lr"] = lr * share
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        return norm.item()

    return step


def plain_training(s):
    """Two updates of Algorithm 1 with PPO or RLOO -> (metrics of each, weights of policy, critic and value_head)."""
    policy, ref = [AutoModelForCausalLM.from_pretrained(f"{s.run_dir}/sft").eval() for _ in range(2)]
    critic, reward = [AutoModelForSequenceClassification.from_pretrained(f"{s.run_dir}/rm").eval() for _ in range(2)]
    critic, head = critic.base_model, nn.Linear(16, 1)
    head.load_state_dict({"weight": reward.score.weight, "bias": torch.tensor([-reward.config.reward_bias])})
    modules = {"policy": policy} | ({"critic": critic, "value_head": head} if s.advantages == "gae" else {})
    step = plain_optimizer(modules, s.lr)
    return [plain_update(s, update, policy, ref, critic, head, reward, step) for update in (0, 1)], weights_of(modules)


def plain_update(s, update, policy, ref, critic, head, reward, step):
    is_gae, words = s.advantages == "gae", drpo.load(drpo.AutoTokenizer, f"{s.run_dir}/sft", s)
    group, rng = 1 if is_gae else s.group, drpo.generator(0, "rollout", update)
    data = drpo.draw(drpo.load_rows(s.dataset, "reference", 0)[0], s.batch_size // group, update, 0, "rl")
    rows = [encode(row, "reference", 7, words) for row in data]
    n = [len([x for x in response if x != 0][:6]) for _, response in rows]
    is_reset = torch.rand(len(n), generator=rng) < s.beta
    resets = [1 + int(u * n) for u, n in zip(torch.rand(len(n), generator=rng, dtype=torch.float64), n)]
    starts = [(q, x[:k] if yes else []) for (q, x), k, yes in zip(rows, resets, is_reset) for _ in range(group)]
    uniforms, T = torch.rand(len(starts), 7, generator=rng).tolist(), s.temperature
    with torch.no_grad():
        rollouts = [(q, plain_sample(policy, q, x, u, T), len(x)) for (q, x), u in zip(starts, uniforms)]
        old, ref_logprobs = [[plain_logprobs(net, q, x, T)[k:] for q, x, k in rollouts] for net in (policy, ref)]
        p = torch.cat([plain_logits(policy, q, x, T)[k:] for q, x, k in rollouts]).softmax(-1)
        kl = torch.stack([(a - b).sum() for a, b in zip(old, ref_logprobs)])
        scores = [reward(torch.tensor([q + x])).logits[0, 0] - reward.config.reward_bias for q, x, _ in rollouts]
        scores = torch.stack([r if x[-1] == 0 else torch.tensor(-1.0) for r, (_, x, _) in zip(scores, rollouts)])
        values, advantages = [head(plain_states(critic, q, x)[k:-1])[:, 0] for q, x, k in rollouts], []
        rewards = [-s.kl_coef * (a - b) for a, b in zip(old, ref_logprobs)]
        for r, score in zip(rewards, scores):
            r[-1] += score
        lengths = list(map(len, rewards))
        if s.whiten_rewards and is_gae:
            rewards = plain_whiten(torch.cat(rewards), centre=False).split(lengths)
        for i, (r, v) in enumerate(zip(rewards, values)):
            if is_gae:  # A_t is the sum of (gamma lambda)^k delta_{t+k}
                delta = r + s.gamma * torch.cat([v[1:], torch.zeros(1)]) - v
                discounts = [(s.gamma * s.lam) ** torch.arange(len(r) - t) for t in range(len(r))]
                advantages += [torch.stack([(discounts[t] * delta[t:]).sum() for t in range(len(r))])]
            else:
                gains = [(rewards[j].sum()).item() for j in range(i // group * group, i // group * group + group) if j != i]
                advantages += [(r.sum() - sum(gains) / len(gains)).expand(len(r))]
        raw, values = torch.cat(advantages), torch.cat(values)
        returns, A, old = raw + values, plain_whiten(raw), torch.cat(old)

    sums = torch.zeros(6)
    for _ in range(s.epochs):
        ratio = (torch.cat([plain_logprobs(policy, q, x, T)[k:] for q, x, k in rollouts]) - old).exp()
        terms = torch.stack([-A * ratio, -A * ratio.clamp(1 - s.cliprange, 1 + s.cliprange)])
        loss = pg_loss = terms.max(0).values.mean()
        vf_loss, vf_clipfrac = torch.zeros(2)
        if is_gae:
            V = torch.cat([head(plain_states(critic, q, x)[k:-1])[:, 0] for q, x, k in rollouts])
            near = torch.max(torch.min(V, values + s.cliprange_value), values - s.cliprange_value)
            errors = torch.stack([(V - returns) ** 2, (near - returns) ** 2])
            vf_loss, vf_clipfrac = 0.5 * errors.max(0).values.mean(), (errors[1] > errors[0]).float().mean()
            loss = pg_loss + s.vf_coef * vf_loss
        norm, rho = step(loss, 1 - update / 2), ratio.detach()
        clipfrac, k3 = (terms[1] > terms[0]).float().mean(), (rho - 1 - rho.log()).mean()
        sums += torch.stack([pg_loss, clipfrac, rho.mean(), k3, vf_loss, vf_clipfrac]).detach() / s.epochs
    metrics = dict(zip(("pg_loss", "clipfrac", "ratio", "approx_kl", "vf_loss", "vf_clipfrac"), sums.tolist()))
    metrics |= {"score": scores.mean().item(), "kl": kl.mean().item(), "entropy": -(p * p.log()).sum(-1).mean().item()}
    metrics |= {"update": update + 1, "lr": s.lr * (1 - update / 2), "grad_norm": norm}
    metrics |= {"loss": metrics["pg_loss"] + s.vf_coef * metrics["vf_loss"]}
    metrics |= {"response_tokens": sum(len(x) for _, x, _ in rollouts) / len(rollouts), "tokens_decoded": sum(lengths)}
    metrics |= {"eos_rate": sum(x[-1] == 0 for _, x, _ in rollouts) / len(rollouts)}
    metrics |= {"reset_share": sum(k > 0 for _, _, k in rollouts) / len(rollouts)}
    metrics |= {"explained_variance": (1 - raw.var() / returns.var()).item()}
    return {name: x for name, x in metrics.items() if is_gae or name not in ("vf_loss", "vf_clipfrac", "explained_variance")}


@pytest.mark.parametrize("beta", [0.0, 0.6])
@pytest.mark.parametrize("advantages, whiten", [("gae", True), ("gae", False), ("rloo", False)])
def test_updates_are_those_of_a_plain_loop(start, run, advantages, whiten, beta):
    """Two of them, so that there is a KL. With clipping in both losses, a discount, and a last micro-batch that is smaller."""
    changes = dict(epochs=3, cliprange=0.02, cliprange_value=0.05, gamma=0.9, lam=0.8, kl_coef=0.5, temperature=0.7, group=4)
    changes |= dict(updates=2, eval_every=0, batch_size=16, micro_batch=5)
    changes |= dict(beta=beta, advantages=advantages, whiten_rewards=whiten)
    weights, metrics = run("drpo", reset_to="reference", **changes)
    wanted, wanted_weights = plain_training(drpo.parse(start("drpo", "plain", reset_to="reference", **changes))[1])
    for line, wanted_line in zip(metrics, wanted, strict=True):
        assert line == pytest.approx(wanted_line, rel=1e-3, abs=1e-4)
    assert gap(weights, wanted_weights) < 1e-4  # they have moved by up to 0.01; with RLOO the policy is all there is
    assert metrics[1]["clipfrac"] > 0.1 and (advantages == "rloo" or metrics[1]["vf_clipfrac"] > 0.1)
    assert metrics[1]["kl"] > 0.05 and metrics[0]["kl"] == pytest.approx(0, abs=1e-6)


def plain_loss(stage, modules, ref, rows, words):
    """-> (loss, share of pairs in the right order). SFT by transformers' own `labels`, the others one response at a time."""
    if stage == "sft":
        ids = [sum(encode(row, "reference", 7, words), []) for row in rows]
        padded, labels = [torch.tensor([x + [fill] * (max(map(len, ids)) - len(x)) for x in ids]) for fill in (1, -100)]
        return modules["policy"](input_ids=padded, labels=labels).loss, None

    def score(x):
        if stage == "rm":
            return modules["head"](plain_states(modules["reward"], *x)[-1])[0]
        return 0.5 * (plain_logprobs(modules["policy"], *x) - plain_logprobs(ref, *x)).sum()

    a, b = [torch.stack([score(encode(row, field, 7, words)) for row in rows]) for field in ("chosen", "rejected")]
    centring = 0.1 * ((a + b) ** 2).mean() if stage == "rm" else 0.0
    return torch.log1p(torch.exp(b - a)).mean() + centring, (a > b).float().mean().item()


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_a_supervised_stage_takes_the_steps_of_a_plain_loop(start, run, stage):
    sizes = dict.fromkeys(["sft_batch_size", "rm_batch_size", "dpo_batch_size"], 7)
    sizes |= dict(micro_batch=5, updates=3, sft_steps=3, rm_steps=3, dpo_beta=0.5, rm_center=0.1)
    weights, metrics = run(stage, **sizes)
    s = drpo.parse(start(stage, "plain", **sizes))[1]
    words, sft = drpo.load(drpo.AutoTokenizer, s.tokenizer, s), s.model if stage == "sft" else f"{s.run_dir}/sft"
    network, ref = [drpo.load_network(sft, s, trained=True) for _ in range(2)]
    modules = {"policy": network}
    if stage == "rm":
        modules = {"reward": network.base_model, "head": nn.Linear(16, 1, bias=False)}
        modules["head"].weight.data = torch.randn(1, 16, generator=drpo.generator(0, "rm head")) / math.sqrt(17)
    data = drpo.load_rows(*((s.dataset, "reference") if stage == "sft" else (s.preference_dataset, "pairs")), 0)[0]
    step = plain_optimizer(modules, 0.003)
    for update, share in enumerate((1, 2 / 3, 1 / 3)):
        loss, accuracy = plain_loss(stage, modules, ref, drpo.draw(data, 7, update, 0, stage), words)
        wanted = {"update": update + 1, "lr": 0.003 * share, "loss": loss.item(), "grad_norm": step(loss, share)}
        wanted |= {} if stage == "sft" else {"accuracy": accuracy}
        assert metrics[update] == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    assert gap(weights, weights_of(modules)) < 1e-5


# ---- Means over the batch, the mask, the schedule ----------------------------------------------------------
def test_resets_to_chosen_read_no_other_column(start, monkeypatch):
    found, labelled = [], [row | {"label": "a label"} for row in conftest.pairs()]
    monkeypatch.setattr(conftest, "labelled", lambda: labelled, raising=False)
    monkeypatch.setattr(drpo, "drpo_update", lambda roles, optimizer, rows, *rest: found.extend(rows) or {})
    drpo.main(start("drpo", preference_dataset="conftest:labelled", updates=1))
    assert found and all(row["reference"] == row["chosen"] in {x["chosen"] for x in labelled} for row in found)


def test_the_optimizer_is_the_official_adamw(tmp_path):
    module, s = nn.Linear(2, 2), drpo.parse(["sft", "--run_dir", str(tmp_path)])[1]
    module.bias.requires_grad_(False)
    (tmp_path / "sft").mkdir()
    _, optimizer, _ = next(drpo.training("sft", 1, 0.1, module, s))
    wanted = dict(params=[module.weight], lr=0.1, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.01, amsgrad=False)
    assert type(optimizer) is torch.optim.AdamW and {x: optimizer.param_groups[0][x] for x in wanted} == wanted


# ---- PPO, RLOO, LoRA, learning -----------------------------------------------------------------------------
@pytest.mark.parametrize("advantages, lora_r", [("gae", 0), ("gae", 4), ("rloo", 0)])
def test_ppo_is_drpo_at_beta_0_bit_for_bit(run, advantages, lora_r):
    changes = dict(updates=2, lora_r=lora_r, advantages=advantages)
    weights, metrics = run("drpo", "drpo", beta=0.0, **changes)
    torch.manual_seed(7)  # no random numbers but its own
    ppo_weights, ppo_metrics = run("ppo", "ppo", beta=0.5, **changes)
    assert metrics == ppo_metrics and metrics[0]["reset_share"] == 0 and gap(weights, ppo_weights) == 0
    assert gap(weights, run("drpo", "reset", beta=0.5, **changes)[0]) > 1e-4


def test_supervised_lora_is_merged_into_the_saved_networks(start, tmp_path):
    command, weights = start("sft", supervised_lora_r=4, sft_lr=0.03, rm_lr=0.03), [conftest.network().base_model.state_dict()]
    for stage, auto in (("sft", AutoModelForCausalLM), ("rm", AutoModelForSequenceClassification)):
        drpo.main([stage, *command[1:]])
        weights.append(auto.from_pretrained(tmp_path / "run" / stage).base_model.state_dict())
        moved = {name for name, p in weights[-1].items() if (p - weights[-2][name]).abs().max() > 1e-3}
        assert moved == {name for name in weights[0] if "query_key_value.weight" in name}
    drpo.main(["drpo", *command[1:]])  # whose check finds that references score 0


def test_batches_of_labels_may_have_any_names(start, tmp_path, monkeypatch):
    names = [["b", 7], 0, "", None]
    named = [row | {"batch": names[i % 4]} for i, row in enumerate(conftest.pairs())]
    monkeypatch.setattr(conftest, "named", lambda: named, raising=False)
    drpo.main(start("rm", preference_dataset="conftest:named"))
    assert set(json.loads((tmp_path / "run" / "rm" / "result.json").read_text())["accuracy_by_batch"]) == {
        "['b', 7]",
        "0",
        "all",
    }


def test_the_reward_model_and_the_policy_learn(start, tmp_path):
    """Pairs whose rejected response is always the same are ranked right, and the policy comes to score higher."""
    changes = dict(batch_size=32, micro_batch=32, kl_coef=0.01, missing_eos_score=-3.0, updates=12, lr=0.01)
    command = start("rm", rm_steps=60, rm_lr=0.01, **changes)
    drpo.main(command)
    result = json.loads((tmp_path / "run" / "rm" / "result.json").read_text())
    assert result["accuracy"] > 0.9 and result["accuracy_by_batch"] == {"all": {"accuracy": result["accuracy"], "pairs": 42}}
    for stage in ("ppo", "drpo"):
        drpo.main([stage, *command[1:]])
        metrics = log_of(tmp_path / "run" / stage)
        first, last = [sum(line["score"] for line in lines) / 3 for lines in (metrics[:3], metrics[-3:])]
        assert last > first + 0.5 and metrics[0]["kl"] == pytest.approx(0.0, abs=1e-6) and metrics[-1]["kl"] > 0.1


# ---- What stops a run, with status 3 and before the weights move -------------------------------------------
@pytest.fixture
def stops(one_line, tmp_path):
    """stops(command, word, ...) -> how many updates it logged before it ended with status 3 and a line with these words."""

    def stops(command, *words):
        line, folder = one_line(command, status=3), tmp_path / "run" / command[0]
        assert all(word in line for word in words) and not (folder / "result.json").exists(), line
        return len(log_of(folder)) if (folder / "metrics.jsonl").exists() else 0

    return stops


def moved_policy(network, s, role, twin=drpo.twin):
    trained, frozen = twin(network, s, role)
    for name, p in trained.named_parameters():
        p.data += 0.01 * (role == "policy" and ("lora_B" in name or not s.lora_r))
    return trained, frozen


def shifted(by, load=drpo.load_reward):
    def mistaken(*args, **kwargs):
        backbone, head = load(*args, **kwargs)
        head.bias.data += by
        return backbone, head

    return mistaken


MISTAKES = {  # mistake: function of drpo.py, what stands in its place, settings, a word of the line
    "a moved policy": ("twin", moved_policy, dict(lora_r=0), "reference"),
    "a moved adapter": ("twin", moved_policy, dict(lora_r=4), "reference"),
    "no resets": ("sample_reset_lengths", PLANTS["no_resets"]["sample_reset_lengths"], dict(batch_size=32), "beta"),
    "low scores": ("load_reward", shifted(-1.0), {}, "references"),
    "high scores": ("load_reward", shifted(1.0), {}, "references"),
    "a ratio that is not 1": ("response_logprobs", old_logprobs_at_another_temperature, {}, "before any step"),
    "the same, RLOO": ("response_logprobs", old_logprobs_at_another_temperature, dict(advantages="rloo"), "before any step"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_self_check_stops_the_first_update(start, stops, monkeypatch, mistake):
    function, mistaken, changes, word = MISTAKES[mistake]
    monkeypatch.setattr(drpo, function, mistaken)
    assert stops(start("drpo", **changes), word) == 0


def test_compiled_passes_may_round_apart_in_bfloat16(start, stops, monkeypatch):
    plain = drpo.response_logprobs

    def apart(*args):  # a pass without gradients, known by its entropy, is 0.3 nats off
        logprobs, entropy = plain(*args)
        return logprobs + 0.3 * (entropy is not None), entropy

    monkeypatch.setattr(drpo, "response_logprobs", apart)
    monkeypatch.setattr(drpo.GradientCheckpointingLayer, "compile", lambda *args, **given: None)
    drpo.main(start("drpo", "other", dtype="bfloat16", compile=True, updates=1))
    assert stops(start("drpo", dtype="bfloat16", updates=1), "before any step") == 0


def test_a_rare_miss_in_a_small_batch_is_no_mistake(run):
    """Six resets of eight at beta 0.99, as happens in one batch of 400."""
    assert run("drpo", beta=0.99, seed=200, updates=1)[1][0]["reset_share"] == 0.75


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "drpo"])
def test_a_gradient_that_is_not_finite_stops_before_the_step(start, stops, tmp_path, monkeypatch, stage):
    before, step, folder = [], drpo.step, tmp_path / "run" / stage

    def planted(optimizer, s, where, batch):
        if where == f"{stage} update 2":
            params = optimizer.param_groups[0]["params"]
            params[0].grad.view(-1)[0] = math.inf
            before.extend((p, p.detach().clone()) for p in params)
        return step(optimizer, s, where, batch)

    monkeypatch.setattr(drpo, "step", planted)
    assert stops(start(stage), f"{stage} update 2", "gradient", "bad_batch.pt") == 1
    assert before and all(torch.equal(p, was) for p, was in before)
    assert torch.load(folder / "bad_batch.pt", weights_only=True)["response"].shape[1] == 7
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["update"] == 1


def test_a_score_that_is_not_a_number_is_named_and_kept(start, stops, tmp_path, monkeypatch):
    original = drpo.end_scores
    monkeypatch.setattr(drpo, "end_scores", lambda *args: original(*args) * (math.nan if "reset_len" in args[2] else 1))
    assert stops(start("drpo"), "scores", "advantages", "not finite") == 0
    kept = torch.load(tmp_path / "run" / "drpo" / "bad_batch.pt", weights_only=True)
    assert kept["scores"].isnan().any() and kept["response"].shape == (8, 7) and kept["logprobs"].isfinite().all()
