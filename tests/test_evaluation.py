"""tools/evaluation.py, tools/history.py and tools/show.py --sample on a tiny run, against what can be worked out."""

import itertools
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rouge_score import rouge_scorer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

import drpo
from tools import checkpoint, evaluation, history, report, show

WORDS = ["[E]", "a", "b", "c", "d", "e"]
SMALL = [
    "--dataset",
    "test_evaluation:posts",
    "--preference_dataset",
    "test_evaluation:pairs",
    "--model",
    "test_evaluation:network",
    "--tokenizer",
    "test_evaluation:tokenizer",
    "--judge",
    "test_evaluation:longer",
    *(
        "--sft_steps 1 --rm_steps 1 --updates 3 --sft_batch_size 4 --rm_batch_size 4 --batch_size 4 "
        "--dpo_batch_size 4 --lr 0.01 --query_length 8 --response_length 6 --preference_length 6 "
        "--eval_samples 10 --save_every 1 --keep 5"
    ).split(),
]


def posts(split):
    """Held out: 26 rows, of which the 12th has the prompt of the first."""
    texts = ["".join(letters) for letters in itertools.product("abcde", repeat=3)][split == "train" :: 4][:26]
    texts[11] = texts[0]
    return [{"prompt": " ".join(text), "reference": " ".join(reversed(text[:2]))} for text in texts]


def pairs(split):
    return [
        {"prompt": row["prompt"], "chosen": row["reference"], "rejected": "e e"}
        for row in posts(split)
        if row["reference"] != "e e"
    ]


def tokenizer():
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="e"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[E]")


def network(seed=0):
    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            bos_token_id=0,
            eos_token_id=0,
            max_position_embeddings=32,
            initializer_range=0.5,
        )
    ).eval()


def longer(prompts, a, b):
    return [(1 + (len(x) > len(y)) - (len(x) < len(y))) / 2 for x, y in zip(a, b)]


def length(prompt, response):
    return float(len(response.split()))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All stages, with every checkpoint kept."""
    folder = tmp_path_factory.mktemp("run")
    drpo.main(["all", "--run_dir", str(folder), *SMALL])
    return folder


@pytest.fixture
def copy_of_run(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


def samples_of(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_kl_is_an_unbiased_estimate_of_the_exact_one():
    """Six tokens and at most three steps make 1 + 5 + 25 * 6 responses, so KL(pi || pi_SFT) can be summed up in full."""
    policy, sft, eos, T = network(1), network(2), 0, 3
    s = drpo.parse(["eval", "--response_length", str(T), "--temperature", "0.8", "--device", "cpu", *SMALL[:8]])[1]
    ended = [[*body, eos] for n in range(T) for body in itertools.product(range(1, 6), repeat=n)]
    responses = ended + [list(body) for body in itertools.product(range(1, 6), repeat=T)]
    row = {"prompt": "a b", "reference": "c d"}
    log_pi, log_sft = [
        drpo.per_row(
            lambda part: drpo.sequence_logprobs(net, part, 0.8), [row] * len(responses), responses, s, tokenizer()
        ).double()
        for net in (policy, sft)
    ]
    assert log_pi.exp().sum().item() == pytest.approx(1, abs=1e-5)  # these are all the responses there are
    exact = (log_pi.exp() * (log_pi - log_sft)).sum().item()
    by = SimpleNamespace(
        sft=sft, backbone=sft.base_model, head=drpo.scalar_head(torch.randn(1, 16)), tokenizer=tokenizer(), judge=longer
    )
    kl = torch.tensor(evaluation.measure(policy, [row] * 3000, s, by)["kl"])
    error = kl.std().item() / math.sqrt(len(kl))
    assert exact > 0.2 and error < exact / 10  # so that the test can fail
    assert abs(kl.mean().item() - exact) < 4 * error


def test_another_runs_reward_model_can_be_the_judge(run, copy_of_run, one_line):
    shutil.rmtree(copy_of_run / "rm")
    drpo.main(["rm", "--run_dir", str(copy_of_run), "--rm_lr", "0.1", *SMALL])  # trained otherwise
    s = drpo.parse(["eval", "--run_dir", str(run), *SMALL])[1]
    rows = posts("validation")[:10]
    prompts, a, b = [row["prompt"] for row in rows], ["a b"] * 10, ["e d c"] * 10

    def verdicts(judge):
        by = evaluation.yardsticks(drpo.dataclasses.replace(s, judge=judge))
        return by.judge(prompts, a, b), by

    (own, by), (same, _), (other, _) = map(verdicts, ["rm", f"rm:{run}", f"rm:{copy_of_run}"])
    assert own == same
    backbone, head = drpo.load_reward(f"{copy_of_run}/rm", s)
    first, second = [
        drpo.reference_scores(backbone, head, [{"prompt": prompt, "reference": text} for prompt in prompts], s, by.tokenizer)
        for text in (a[0], b[0])
    ]
    assert other == ((first > second) + 0.5 * (first == second)).tolist()
    assert "there is no reward model in nowhere/rm" in one_line(["eval", "--run_dir", run, *SMALL, "--judge", "rm:nowhere"])


def test_rouge_is_the_librarys_and_comes_out_as_by_hand():
    """'the cats sat' against 'the cat sat down': 3 of 3 and of 4 words after stemming, 2 of 2 and of 3 pairs."""
    rows, texts = [{"reference": "the cat sat down"}], ["the cats sat"]
    assert drpo.rouge(texts, rows, "rouge1") == [pytest.approx(2 * 3 / (3 + 4))]
    assert drpo.rouge(texts, rows, "rouge2") == [pytest.approx(2 * 2 / (2 + 3))]
    assert drpo.rouge(["sat the cat"], rows) == [pytest.approx(2 * 2 / (3 + 4))]  # the longest common subsequence: the cat


def test_the_rouge_in_the_samples_is_that_of_the_library(run):
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for sample in samples_of(run):
        wanted = scorer.score(sample["reference"], sample["drpo"]["response"])
        for key, kind in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
            assert sample["drpo"][key] == pytest.approx(wanted[kind].fmeasure)


def test_an_evaluation_is_the_same_again_and_at_any_micro_batch(run, copy_of_run):
    drpo.main(["eval", "--run_dir", str(copy_of_run), *SMALL])
    assert (copy_of_run / "samples.jsonl").read_text() == (run / "samples.jsonl").read_text()
    drpo.main(["eval", "--run_dir", str(copy_of_run), *SMALL, "--micro_batch", "3"])
    for one, other in zip(samples_of(run), samples_of(copy_of_run), strict=True):
        for method in ("sft", "dpo", "ppo", "drpo"):
            assert one[method]["response"] == other[method]["response"] and one[method]["ids"] == other[method]["ids"]
            for key in report.MEANS:
                assert other[method][key] == pytest.approx(one[method][key], abs=1e-5), key


def test_another_seed_gives_other_samples(run, copy_of_run):
    drpo.main(["eval", "--run_dir", str(copy_of_run), *SMALL, "--seed", "1"])
    assert [row["sft"]["ids"] for row in samples_of(run)] != [row["sft"]["ids"] for row in samples_of(copy_of_run)]


def test_the_score_beside_the_kl_is_that_of_the_samples_whose_kl_it_is(run, copy_of_run):
    """At one temperature for both, the samples are the same, and so are the scores."""
    drpo.main(["eval", "--run_dir", str(copy_of_run), *SMALL, "--eval_temperature", "1.0"])
    for row in samples_of(copy_of_run):
        assert row["drpo"]["kl_rm_score"] == row["drpo"]["rm_score"]
    assert any(row["drpo"]["kl_rm_score"] != row["drpo"]["rm_score"] for row in samples_of(run))


def test_any_folder_is_measured_beside_the_methods_of_the_run(copy_of_run, tmp_path, capsys):
    """A copy of the SFT model gets the figures of the SFT model, and its folder's name in the table."""
    shutil.copytree(copy_of_run / "sft", tmp_path / "somebody")
    drpo.main(["eval", "--run_dir", str(copy_of_run), *SMALL, "--others", str(tmp_path / "somebody")])
    methods = json.loads((copy_of_run / "report.json").read_text())["methods"]
    assert list(methods) == ["sft", "dpo", "ppo", "drpo", str(tmp_path / "somebody")]
    assert methods[str(tmp_path / "somebody")] == methods["sft"]
    assert (
        re.search(r"^somebody +[01]\.", capsys.readouterr().out, re.M)
        and "somebody minus DR-PO" in (copy_of_run / "report.md").read_text()
    )


def test_a_folder_with_another_tokenizer_has_no_kl_and_is_refused_in_one_line(copy_of_run, tmp_path, capsys):
    shutil.copytree(copy_of_run / "sft", tmp_path / "other")
    words = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    words["model"]["vocab"] |= {"a": 2, "b": 1}
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(words))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        drpo.main(["eval", "--run_dir", str(copy_of_run), *SMALL, "--others", str(tmp_path / "other")])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "--others" in err.splitlines()[-1] and "tokenizer" in err.splitlines()[-1]


def test_validation_prompts_are_apart_from_the_test_prompts(run):
    s = drpo.parse(["eval", "--run_dir", str(run), *SMALL])[1]
    validation, test = history.split(s)
    held_out = drpo.load_rows(s.dataset, "reference", s.seed)[1]
    assert test == held_out[:10] and held_out[11]["prompt"] == held_out[0]["prompt"]
    assert validation == [held_out[10], *held_out[12:21]]  # ten, and not the prompt that eval has seen


def test_the_policy_of_the_last_checkpoint_is_the_one_that_was_saved_and_those_before_are_not(run):
    s = drpo.parse(["eval", "--run_dir", str(run), *SMALL])[1]
    saved = AutoModelForCausalLM.from_pretrained(run / "drpo").state_dict()
    gaps = []
    for update in (1, 2, 3):
        found = history.policy_at(run / "drpo" / "checkpoint" / f"{update:06d}", s).state_dict()
        gaps.append(max((found[name] - saved[name]).abs().max().item() for name in saved))
    assert gaps[2] == 0 < gaps[1] < gaps[0]


def test_the_history_names_the_peak_on_validation_prompts_and_measures_it_on_the_test_prompts(copy_of_run, capsys):
    history.main([str(copy_of_run), "--gold", "test_evaluation:length"])
    lines = [json.loads(line) for line in (copy_of_run / "history.jsonl").read_text().splitlines()]
    samples, out = samples_of(copy_of_run), capsys.readouterr().out
    for method in ("ppo", "drpo"):
        parts = {
            part: {line["update"]: line for line in lines if line["method"] == method and line["prompts"] == part}
            for part in ("validation", "test")
        }
        assert list(parts["validation"]) == [0, 1, 2, 3]
        best = max(parts["validation"], key=lambda update: parts["validation"][update]["gold_score"])
        assert set(parts["test"]) == {best, 3}
        # the last update, on the test prompts, is what eval has measured
        last = parts["test"][3]
        assert last["rm_score"] == pytest.approx(sum(row[method]["rm_score"] for row in samples) / 10, abs=1e-5)
        assert last["gold_score"] == pytest.approx(sum(length("", row[method]["response"]) for row in samples) / 10)
        name = report.METHODS[method]
        assert re.search(rf"{name}, peak on validation prompts +{best} +{parts['test'][best]['gold_score']:.3f}", out)
    page = (copy_of_run / "report.md").read_text()
    assert "](overoptimisation.png)" in page and (copy_of_run / "overoptimisation.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "change, words",
    [
        (["--eval_samples", "26"], ["--eval_samples 26", "26 held-out rows"]),
        (["--gold", "nonsense"], ["--gold nonsense"]),
        ("one checkpoint", ["--keep"]),
    ],
)
def test_a_history_that_cannot_be_had_is_told_in_one_line(copy_of_run, capsys, change, words):
    if change == "one checkpoint":
        for stage in report.RL:
            for update in (1, 2):
                shutil.rmtree(copy_of_run / stage / "checkpoint" / f"{update:06d}")
    with pytest.raises(SystemExit) as stopped:
        history.main([str(copy_of_run), *([] if change == "one checkpoint" else change)])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and len(err.splitlines()) == 1 and all(word in err for word in words), err


def blocks(out):
    """What show --sample prints -> {heading: [[token, role, reward, value, advantage], ...]}."""
    found, heading = {}, None
    for block in re.split(r"\n\n+", out.strip()):
        if block.startswith("token "):
            rows = [
                re.split(r" {2,}", re.sub(r"^(token|role|reward|value|advantage)", "", line).strip())
                for line in block.splitlines()
            ]
            found[heading] += list(zip(*rows, strict=True))
        else:
            heading = block
            found[heading] = []
    return {heading: columns for heading, columns in found.items() if columns}


def test_a_sample_is_shown_with_what_training_would_have_computed_for_each_token(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")  # so that tables are folded
    show.main(["--run", str(run), "--sample", "3"])
    out = capsys.readouterr().out
    assert "\033[" not in out and max(map(len, out.splitlines())) <= 132
    found, row = blocks(out), samples_of(run)[3]
    assert [heading.partition(",")[0] for heading in found] == ["SFT", "DPO", "PPO", "DR-PO", "DR-PO"]
    s = drpo.parse(["drpo", "--run_dir", str(run), *SMALL])[1]
    for (heading, columns), method in zip(found.items(), ("sft", "dpo", "ppo", "drpo")):
        ids = row[method]["ids"]
        tokens, roles, *numbers = [list(cells[: len(ids)]) for cells in zip(*columns)]
        assert tokens == [repr(WORDS[token]) for token in ids]
        assert roles == ["EOS" if token == 0 else "sampled" for token in ids]
        assert [cells[1] for cells in columns[len(ids) :]] == ["pad"] * (len(ids) < 6)
        rewards, values, advantages = [list(map(float, cells)) for cells in numbers]
        score = float(re.search(r"score (\S+?)[, ]", heading)[1])
        assert score == pytest.approx(row[method]["rm_score"] if ids[-1] == 0 else -1.0, abs=1e-3)
        running, wanted = 0.0, []  # A_t = delta_t + gamma lam A_{t+1}
        for t in reversed(range(len(ids))):
            running = (
                rewards[t] + s.gamma * (values[t + 1] if t + 1 < len(ids) else 0.0) - values[t] + s.gamma * s.lam * running
            )
            wanted.insert(0, running)
        assert advantages == pytest.approx(wanted, abs=0.01)
        if method == "sft":
            assert rewards == [0.0] * (len(ids) - 1) + [pytest.approx(score)]  # it has no KL to itself


def test_the_reset_that_is_shown_begins_as_the_reference_does(run, capsys):
    show.main(["--run", str(run), "--sample", "3"])
    heading, columns = list(blocks(capsys.readouterr().out).items())[-1]
    forced, length = (
        [cells for cells in columns if cells[1] == "reset prefix"],
        int(re.search(r"reset to (\d+) of", heading)[1]),
    )
    reference = samples_of(run)[3]["reference"].split()
    assert 0 < len(forced) == length <= len(reference)
    assert [cells[0] for cells in forced] == list(map(repr, reference[:length])) and columns[length][1] in ("sampled", "EOS")
    assert {cells[2:] for cells in forced} == {(".", ".", ".")}  # what a person wrote is not learned from


def test_the_critic_that_is_shown_is_the_one_that_was_trained(run):
    s = drpo.parse(["drpo", "--run_dir", str(run), *SMALL])[1]
    critic, value_head = show.trained_critic("drpo", s)
    kept = checkpoint.load_file(run / "drpo" / "checkpoint" / "000003" / "tensors.safetensors")
    assert all(torch.equal(p, kept[f"param.critic.{name}"]) for name, p in critic.named_parameters())
    assert torch.equal(value_head.weight, kept["param.value_head.weight"])
    backbone, head = show.trained_critic("dpo", s)  # DPO has none
    assert not torch.equal(head.weight, value_head.weight)


def test_on_a_terminal_roles_have_colours_and_with_no_color_they_have_not(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    show.main(["--run", str(run), "--sample", "3"])
    coloured = capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    show.main(["--run", str(run), "--sample", "3"])
    plain = capsys.readouterr().out
    assert f"\033[{show.PAINT['reset prefix']}m" in coloured and re.sub("\033\\[[0-9;]*m", "", coloured) == plain != coloured


@pytest.mark.parametrize(
    "words, named",
    [
        (["--run", "{run}", "--sample", "10"], ["--sample 10", "[0, 9]"]),
        (["--run", "{run}", "--sample", "-1"], ["--sample -1"]),
        (["--sample", "1"], ["--run"]),
    ],
)
def test_a_sample_that_is_not_there_is_told_in_one_line(run, capsys, words, named):
    with pytest.raises(SystemExit) as stopped:
        show.main([word.format(run=run) for word in words])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and len(err.splitlines()) == 1 and all(word in err for word in named), err
