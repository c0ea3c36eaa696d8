"""What several test files share: a small corpus and network, a finished run of them, and a made-up one."""

import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is nowhere is told at once
sys.path.insert(0, str(ROOT))  # `import drpo` works from wherever pytest is started

import drpo  # noqa: E402

torch.set_num_threads(1)  # tensors this small are fastest so, and sums always run in the same order
WORDS = ["[E]", "[P]", "a", "b", "c", "d", "e", "f"]  # a vocabulary of EOS, padding and six letters
SMALL = (
    "--dataset conftest:posts --preference_dataset conftest:pairs --model conftest:network --tokenizer conftest:tokenizer "
    "--judge conftest:longer --device cpu --query_length 8 --response_length 7 --preference_length 7 --sft_steps 4 "
    "--rm_steps 4 --updates 3 --sft_batch_size 8 --rm_batch_size 8 --batch_size 8 --dpo_batch_size 8 --micro_batch 3 "
    "--lr 0.003 --sft_lr 0.003 --rm_lr 0.003 --dpo_lr 0.003 --eval_samples 10 --eval_every 2 --save_every 1 "
    "--seed 0 --rm_center 0 --beta 0.6 --lam 0.95"
).split()


def posts(split="train"):  # three letters, of which the reference is one to three, in reverse
    texts = list(itertools.product("abcdef", repeat=3))[split == "train" :: 5]
    return [{"prompt": " ".join(x), "reference": " ".join(x[::-1][: 1 + i % 3])} for i, x in enumerate(texts)]


def pairs(split="train"):
    return [{"prompt": x["prompt"], "chosen": x["reference"], "rejected": "f f f f"} for x in posts(split)]


def longer(prompts, a, b):  # a judge that prefers the longer text
    return [(1 + (len(x) > len(y)) - (len(x) < len(y))) / 2 for x, y in zip(a, b)]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="f"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[E]", pad_token="[P]")


def network(seed=0):  # GPT-NeoX of one layer of 16, with random weights that are large enough for decided logits
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = dict(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ends = dict(bos_token_id=0, eos_token_id=0, pad_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPTNeoXForCausalLM(GPTNeoXConfig(**config, **ends, max_position_embeddings=32, initializer_range=0.5)).eval()


def log_of(folder):  # the metrics of a stage, line by line, but for seconds
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


@torch.no_grad()
def plain_sample(network, query, response, uniforms, temperature, eos=0):
    """Decodes until EOS or one token per uniform: each the first whose cumulative probability exceeds its uniform."""
    while len(response) < len(uniforms) and response[-1:] != [eos]:
        cdf = (network(torch.tensor([query + response]), use_cache=False).logits[0, -1] / temperature).softmax(-1).cumsum(-1)
        response = [*response, int((cdf <= uniforms[len(response)] * cdf[-1]).sum())]
    return response


# ---- A made-up run folder with figures that can be worked by hand --------------------------------------------
SETTINGS = {"dataset": "toy_text:gate", "preset": "tiny", "eval_temperature": 0.01, "temperature": 0.7}
LOG = {"kl": 0.5, "response_tokens": 9.0, "eos_rate": 0.5, "entropy": 1.0, "explained_variance": 0.2, "tokens_decoded": 100}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(folder, win_rates, seed=0, judge="toy_text:gold_judge", score=(0.0, 1.0), kl=2.5, log=LOG, **settings):
    """A finished run with these {method: win rate} on four prompts; PPO and DR-PO logged these scores, one per update, on
    held-out prompts from the second on."""
    settings = SETTINGS | {"seed": seed, "run_dir": str(folder)} | settings
    rl = [log | {"update": update, "score": value} for update, value in enumerate(score, 1)]
    for line in rl[1:]:
        line |= {f"held_out_{key}": line["score"] for key in ("win_rate", "rm_score", "kl", "response_tokens", "eos_rate")}
    logs = {"sft": [{"loss": 3.0}], "rm": [{"accuracy": 0.6}], "dpo": [{"accuracy": 0.6}], "ppo": rl, "drpo": rl}
    accuracy = {"accuracy": 0.7, "accuracy_ci95": [0.4, 0.9], "pairs": 10}
    results = {"sft": {"held_out_loss": 2.0, "rouge_l": 0.3}, "rm": accuracy | {"accuracy_by_batch": {"all": accuracy}}}
    for seconds, stage in enumerate(dict.fromkeys(["sft", "rm", *win_rates]), 5):
        write_lines(folder / stage / "metrics.jsonl", logs[stage])
        (folder / stage / "result.json").write_text(json.dumps({"seconds": seconds, **results.get(stage, {})}))
        of_stages = {"sft": seed + 0.5, f"weights of {folder}": seed}  # differ from run to run, and are no settings
        (folder / stage / "settings.json").write_text(json.dumps({"beta": 0.6, **of_stages, **settings}))
    samples = [{"prompt": f"POST: number {i}\n\nTL;DR:", "reference": f"told {i}"} for i in range(4)]
    for i, row in enumerate(samples):
        rest = {"kl": kl, "kl_rm_score": float(i), "rouge_1": 0.3, "rouge_2": 0.1, "rouge_l": i / 10, "eos_rate": int(i > 0)}
        rest |= {"rm_score": 1.0 + (i > 1), "response_tokens": 9 + i // 2}
        row |= {name: {"response": f"{name} says {i}", "win_rate": rate, **rest} for name, rate in win_rates.items()}
    drpo.write_report(folder, samples, settings, judge)
    return folder


# ---- Fixtures ------------------------------------------------------------------------------------------------
@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr("tools.report.write", lambda run: None)


@pytest.fixture
def one_line(capsys):
    """one_line(argv) -> what `drpo.main(argv)` says on stderr before it ends with status 2: one line, not a long one."""

    def ends(argv, status=2, main=drpo.main):
        capsys.readouterr()  # what was said before does not count
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in argv])
        line = capsys.readouterr().err
        line = line if status == 2 else line.rpartition("drpo.py: ")[2].partition("\n")[0]  # after bars of progress
        assert stopped.value.code == status and len(line.splitlines()) == 1 and len(line) <= 300, line
        return line

    return ends


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """The folder of a run of all stages on the corpus above, without figures: a second. Tests copy it or only read it."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.report.write", lambda run: None)
        drpo.main(["all", *SMALL, "--run_dir", str(folder)])
    return folder


@pytest.fixture
def start(small_run, tmp_path):
    """start(stage, folder="run", beta=0.5, ...) -> the command that is about to train this stage in tmp_path / folder."""

    def start(stage, folder="run", **changes):
        for needed in drpo.NEEDS[stage]:
            shutil.copytree(small_run / needed, tmp_path / folder / needed)
        return [stage, *SMALL, "--run_dir", str(tmp_path / folder), *(f"--{name}={x}" for name, x in changes.items())]

    return start
