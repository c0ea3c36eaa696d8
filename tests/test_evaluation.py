"""Section 8 of drpo.py: every method on the same held-out prompts, against what can be worked out."""

import json
import shutil
from pathlib import Path

import conftest
import pytest
import torch
from conftest import SMALL
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import drpo

pytestmark = pytest.mark.usefixtures("no_figures")
METHODS = ["sft", "dpo", "ppo", "drpo"]
FIGURES = "win_rate rm_score kl kl_rm_score rouge_1 rouge_2 rouge_l response_tokens eos_rate".split()


@pytest.fixture
def copy(small_run, tmp_path):
    return Path(shutil.copytree(small_run, tmp_path / "copy"))


def settings(run, *flags):
    return drpo.parse(["eval", *SMALL, "--run_dir", str(run), *flags])[1]


def evaluated(run, *flags):  # -> the samples and the report of an evaluation
    drpo.evaluate(settings(run, *flags))
    return samples_of(run), json.loads((run / "report.json").read_text(), parse_constant=pytest.fail)  # no NaN: not JSON


def samples_of(run):
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def test_the_report_has_the_figures_that_others_rely_on(small_run):
    samples, report = samples_of(small_run), json.loads((small_run / "report.json").read_text())
    assert set(report) == {"methods", "rm", "sft", "judge", "prompts", "seconds", "settings"}
    assert list(report["methods"]) == METHODS and set(report["seconds"]) == {"rm", *METHODS}
    assert set(report["rm"]) == {"accuracy", "accuracy_ci95", "accuracy_by_batch", "pairs"} and report["prompts"] == 10
    assert set(report["sft"]) == {"held_out_loss", "rouge_l"} and report["settings"]["sft_lr"] == 0.003
    assert len(samples) == 10 and set(samples[0]) == {"prompt", "reference", *METHODS}
    for method in METHODS:
        assert set(report["methods"][method]) == {*FIGURES, "win_rate_ci95"}
        assert set(samples[0][method]) == {*FIGURES, "response"}
        for name in FIGURES:
            values = [row[method][name] for row in samples]
            assert report["methods"][method][name] == pytest.approx(sum(values) / 10)
        assert report["methods"][method]["win_rate_ci95"] == drpo.wilson([row[method]["win_rate"] for row in samples])
        for row in samples:
            assert row[method]["win_rate"] == conftest.longer([""], [row[method]["response"]], [row["reference"]])[0]
            assert (row[method]["kl"] == 0.0) == (method == "sft")


def test_held_out_figures_in_training_are_those_of_eval(start, tmp_path, monkeypatch):
    run, without = tmp_path / "run", tmp_path / "without"
    drpo.main(start("drpo", eval_every=3))  # once, after the last of three updates
    asked, find_judge = [], drpo.find_judge
    monkeypatch.setattr(drpo, "find_judge", lambda s, *rest: asked.append(rest) or find_judge(s, *rest))
    drpo.main(start("drpo", folder="without", eval_every=0))
    assert asked == [()]  # before the run only, and no reward model is loaded for it
    assert [any("held_out" in name for name in line) for line in conftest.log_of(run / "drpo")] == [False, False, True]
    of, last = evaluated(run, "--eval_samples=100")[1]["methods"]["drpo"], conftest.log_of(run / "drpo")[-1]
    for name in set(FIGURES) - {"rouge_1", "rouge_2", "rouge_l"}:
        assert last.pop(f"held_out_{name}") == pytest.approx(of[name], abs=1e-6)
    assert last == conftest.log_of(without / "drpo")[-1]  # looking changes nothing


def test_eval_names_the_settings_that_training_had(copy, capsys):
    evaluated(copy, "--judge=rm", "--eval_samples=5")
    assert "other settings" not in capsys.readouterr().out
    evaluated(copy, "--temperature=2")
    assert "training had other settings: {'temperature': 1.0}\n" in capsys.readouterr().out


def test_weights_trained_in_float32_are_evaluated_in_float32(copy, monkeypatch):
    seen, rate, s = set(), drpo.rate, settings(copy, "--dtype=bfloat16")

    def watched(network, sft, reward_model, *rest):
        seen.update(p.dtype for one in (network, sft, *reward_model) for p in one.parameters())
        return rate(network, sft, reward_model, *rest)

    monkeypatch.setattr(drpo, "rate", watched)
    with drpo.precision(s):
        drpo.evaluate(s)
    assert seen == {torch.float32}


def test_references_are_scored_whole(small_run):
    s = settings(small_run, "--response_length=2")
    rows, words = drpo.load_rows(s.dataset, "reference", 0)[1], conftest.tokenizer()
    lengths = drpo.per_row(lambda x: x["response_len"], rows, None, s, words).tolist()
    assert lengths == [len(row["reference"].split()) + 1 for row in rows] and max(lengths) == 4


def test_wilson_by_hand():
    # 8 of 10: (0.8 + 0.19208 -+ 1.96 sqrt(0.016 + 0.0096040)) / 1.38416
    assert drpo.wilson([1] * 8 + [0] * 2) == pytest.approx([0.49016, 0.94332], abs=1e-5)
    assert drpo.wilson([1.0, None, 0.5, 0.5, 0.0, None]) == pytest.approx(drpo.wilson([1, 0, 1, 0]))  # 2 of 4
    assert drpo.wilson([0] * 4)[0] == 0.0 and drpo.wilson([1] * 4)[1] == 1.0 and drpo.wilson([None]) is None


def test_verdicts_that_are_none_do_not_count(copy, monkeypatch):
    monkeypatch.setattr(conftest, "longer", lambda prompts, a, b: [1.0, *[None for _ in prompts[1:]]])
    samples, report = evaluated(copy)
    assert [row["drpo"]["win_rate"] for row in samples] == [1.0] + [None] * 9
    assert report["methods"]["drpo"]["win_rate"] == 1.0
    assert report["methods"]["drpo"]["win_rate_ci95"] == pytest.approx([1 / (1 + 1.96**2), 1.0])
    monkeypatch.setattr(conftest, "longer", lambda prompts, a, b: [None for _ in prompts])
    _, report = evaluated(copy)  # still JSON
    assert report["methods"]["drpo"]["win_rate"] is None and report["methods"]["drpo"]["response_tokens"] > 1


def test_the_prompts_are_a_seeded_sample_of_the_held_out_rows(small_run, copy, monkeypatch):
    seeds, load_rows = set(), drpo.load_rows
    monkeypatch.setattr(drpo, "load_rows", lambda source, kind, seed: seeds.add(seed) or load_rows(source, kind, seed))
    held_out = drpo.load_rows("conftest:posts", "reference", 0)[1]
    prompts, everything = [row["prompt"] for row in samples_of(small_run)], [row["prompt"] for row in held_out]
    assert set(prompts) < set(everything) and prompts != everything[:10] and len(set(prompts)) == 10
    other, _ = evaluated(copy, "--seed", "1", "--eval_samples", "99")
    assert sorted(row["prompt"] for row in other) == sorted(everything) != [row["prompt"] for row in other]
    assert seeds == {0}  # the split is that of training


def test_only_finished_methods_are_evaluated(copy):
    shutil.rmtree(copy / "dpo")
    (copy / "ppo" / "result.json").unlink()
    samples, report = evaluated(copy)
    assert list(report["methods"]) == ["sft", "drpo"] and set(samples[0]) == {"prompt", "reference", "sft", "drpo"}


@torch.no_grad()
def test_scores_and_kl_are_of_the_sampled_ids_and_no_eos_is_fined(copy, monkeypatch):
    """By transformers alone, from the very ids that were sampled, text aside, at each of the two temperatures."""
    responses, sample, words = [], drpo.sample, conftest.tokenizer()
    monkeypatch.setattr(drpo, "sample", lambda *args: responses.append(sample(*args)) or responses[-1])
    samples, _ = evaluated(copy, "--temperature", "0.8")
    model = AutoModelForSequenceClassification.from_pretrained(copy / "rm").eval()
    networks = {method: AutoModelForCausalLM.from_pretrained(copy / method).eval() for method in METHODS}

    def logprob(method, query, ids):
        logits = networks[method](torch.tensor([query + ids])).logits[0, len(query) - 1 : -1] / 0.8
        return logits.log_softmax(-1)[range(len(ids)), ids].sum().item()

    for i, row in enumerate(samples):
        query = words(row["prompt"])["input_ids"]
        for method, cool, warm in zip(METHODS, responses[::2], responses[1::2], strict=True):
            for name, ids in (("rm_score", cool[i]), ("kl_rm_score", warm[i])):
                score = model(torch.tensor([query + ids])).logits.item() - model.config.reward_bias
                assert row[method][name] == pytest.approx(score if ids[-1] == 0 else -1.0, abs=1e-4)
            assert (row[method]["response_tokens"], row[method]["eos_rate"]) == (len(cool[i]), cool[i][-1] == 0)
            assert row[method]["response"] == words.decode(cool[i], skip_special_tokens=True)
            kl = logprob(method, query, warm[i]) - logprob("sft", query, warm[i])
            assert row[method]["kl"] == pytest.approx(kl, abs=1e-4)
    assert {0, 1} == {row["drpo"]["eos_rate"] for row in samples} and responses[0] != responses[1]


def test_the_rm_judge_compares_scores_and_unfinished_responses_lose(small_run, copy):
    model = AutoModelForSequenceClassification.from_pretrained(small_run / "rm").eval()
    words, verdicts = conftest.tokenizer(), []
    for row in evaluated(copy, "--judge", "rm")[0]:
        ids = [*words(row["prompt"])["input_ids"], *words(row["reference"])["input_ids"], 0]
        with torch.no_grad():
            reference = model(torch.tensor([ids])).logits.item() - model.config.reward_bias
        for method in METHODS:
            verdicts.append(row[method]["win_rate"])
            assert verdicts[-1] == (1 + (row[method]["rm_score"] > reference) - (row[method]["rm_score"] < reference)) / 2
    assert {0.0, 1.0} <= set(verdicts)


def test_another_runs_reward_model_can_be_the_judge(small_run, copy, tmp_path, one_line):
    own = [row["drpo"]["win_rate"] for row in evaluated(copy, "--judge", f"rm:{small_run}")[0]]
    assert own == [row["drpo"]["win_rate"] for row in evaluated(copy, "--judge", "rm")[0]]
    shutil.copytree(small_run / "rm", tmp_path / "other" / "rm")
    weights = AutoModelForSequenceClassification.from_pretrained(tmp_path / "other" / "rm")
    weights.score.weight.data *= -1  # it prefers what this one does not
    weights.save_pretrained(tmp_path / "other" / "rm")
    samples, _ = evaluated(copy, "--judge", f"rm:{tmp_path / 'other'}", "--missing_eos_score", "-1000")
    ended = [i for i, row in enumerate(samples) if row["drpo"]["eos_rate"]]
    assert ended and all(samples[i]["drpo"]["win_rate"] == 1 - own[i] for i in ended)
    file = tmp_path / "other" / "rm" / "tokenizer.json"
    file.write_text(file.read_text().replace('"a"', '"z"'))
    assert "tokenizer" in one_line(["--judge", f"rm:{tmp_path / 'other'}"], main=lambda flags: evaluated(copy, *flags))


def test_rouge_by_hand_and_none_where_it_sees_no_letters():
    """'the cats sat' against 'the cat sat down': 3 of 3 and of 4 words after stemming, 2 of 2 and of 3 pairs."""
    rows = [{"reference": "the cat sat down"}]
    assert drpo.rouge(["the cats sat"], rows, "rouge1") == [pytest.approx(2 * 3 / (3 + 4))]
    assert drpo.rouge(["the cats sat"], rows, "rouge2") == [pytest.approx(2 * 2 / (2 + 3))]
    assert drpo.rouge(["sat the cat"], rows, "rougeL") == [pytest.approx(2 * 2 / (3 + 4))]  # in order: the cat
    assert drpo.rouge(["mat", "das Bär"], [{"reference": "кошка спит"}, {"reference": "der Bär"}], "rouge1")[0] is None
    assert drpo.mean([None, 0.25, None, 0.75]) == 0.5 and drpo.mean([None]) is None


def test_eval_applies_the_adapter_and_does_not_merge_it(copy):
    network = drpo.add_lora(drpo.load_network(f"{copy}/sft", settings(copy)), 2, 0, "policy")  # B = 0: changes nothing
    network.save_pretrained(copy / "drpo" / "adapter")
    samples, _ = evaluated(copy)
    assert all(row["drpo"] == row["sft"] for row in samples)


def test_a_method_trained_on_another_network_is_refused(copy, one_line):
    (copy / "rm" / "result.json").write_text('{"seconds": 1.5}')  # trained anew
    line = one_line(["eval", *SMALL, "--run_dir", copy])
    assert f"{copy}/ppo was trained on another {copy}/rm: delete it" in line
