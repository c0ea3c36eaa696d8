"""What several test files share: a small corpus and network, a finished run of them, and one run of the toy corpus."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is nowhere is told at once
sys.path.insert(0, str(ROOT))  # `import drpo` works from wherever pytest is started

import drpo  # noqa: E402

WORDS = ["[E]", "[P]", "a", "b", "c", "d", "e", "f"]  # a vocabulary of EOS, padding and six letters
SMALL = (
    "--dataset conftest:posts --preference_dataset conftest:pairs --model conftest:network --tokenizer conftest:tokenizer "
    "--judge conftest:longer --device cpu --query_length 8 --response_length 7 --preference_length 7 --sft_steps 4 "
    "--rm_steps 4 --updates 3 --sft_batch_size 8 --rm_batch_size 8 --batch_size 8 --dpo_batch_size 8 --micro_batch 3 "
    "--lr 0.003 --sft_lr 0.003 --rm_lr 0.003 --dpo_lr 0.003 --eval_samples 10 --save_every 1 "
    "--seed 0 --rm_center 0 --beta 0.6 --lam 0.95"
).split()


def posts(split="train"):
    """Three letters, of which the reference is one to three, in reverse."""
    texts = list(itertools.product("abcdef", repeat=3))[split == "train" :: 5]
    return [{"prompt": " ".join(x), "reference": " ".join(x[::-1][: 1 + i % 3])} for i, x in enumerate(texts)]


def pairs(split="train"):
    return [{"prompt": x["prompt"], "chosen": x["reference"], "rejected": "f f f f"} for x in posts(split)]


def longer(prompts, a, b):
    """A judge that prefers the longer text."""
    return [(1 + (len(x) > len(y)) - (len(x) < len(y))) / 2 for x, y in zip(a, b)]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="f"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[E]", pad_token="[P]")


def network(seed=0):
    """GPT-NeoX of one layer of 16, with random weights that are large enough for decided logits."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = dict(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ends = dict(bos_token_id=0, eos_token_id=0, pad_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPTNeoXForCausalLM(GPTNeoXConfig(**config, **ends, max_position_embeddings=32, initializer_range=0.5)).eval()


def log_of(folder):
    """The metrics of a stage, line by line, but for seconds."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def one_thread():
    """Tensors this small are fastest on one thread, and sums always run in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_line(capsys):
    """one_line(argv) -> what `drpo.main(argv)` says on stderr before it ends with status 2: one line, not a long one."""

    def ends(argv):
        capsys.readouterr()  # what was said before does not count
        with pytest.raises(SystemExit) as stopped:
            drpo.main([str(word) for word in argv])
        line = capsys.readouterr().err
        assert stopped.value.code == 2 and len(line.splitlines()) == 1 and len(line) <= 300, line
        return line

    return ends


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a short run on the toy corpus, by drpo.py with toy_text.py beside it and nothing else. Tests only read it.

    In odd surroundings, too: another working folder, a space and an umlaut, no asserts, no HOME, an ASCII locale."""
    home, cwd, run = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("cwd"), "Läufe 1/ü"
    for name in ("drpo.py", "toy_text.py"):
        shutil.copy(ROOT / name, home)
    words = "--sft_steps 15 --rm_steps 8 --updates 2 --batch_size 16 --dpo_batch_size 16 --eval_samples 24 --device cpu"
    env = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    command = [sys.executable, "-O", home / "drpo.py", *words.split(), "--run_dir", run]
    env |= {"LC_ALL": "C", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in home.iterdir()} - {"__pycache__"} == {"drpo.py", "toy_text.py"}
    (cwd / run / "stdout.txt").write_text(done.stdout, encoding="utf-8")
    return cwd / run


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, one_thread):
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
