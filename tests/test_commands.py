"""The command line: drpo.py alone in a folder, settings, bad input, several seeds, documented commands."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import conftest
import pytest
from conftest import ROOT, SMALL, make_run
from transformers import BertConfig, GPTNeoXConfig

import drpo

METHODS = ["sft", "dpo", "ppo", "drpo"]


# ---- One file that runs alone ------------------------------------------------------------------------------
def test_drpo_py_does_the_main_job_in_an_empty_folder(tmp_path):
    """And in odd surroundings: another working folder, a space and an umlaut, no asserts, no HOME, an ASCII locale."""
    home, cwd = tmp_path / "alone", tmp_path / "cwd"
    run = cwd / "Läufe 1" / "ü"
    (home / "tools").mkdir(parents=True)  # of somebody else
    cwd.mkdir()
    for name in ("drpo.py", "toy_text.py"):
        shutil.copy(ROOT / name, home)
    words = "--sft_steps 15 --rm_steps 8 --updates 2 --batch_size 16 --dpo_batch_size 16 --eval_samples 24 --device cpu"
    env = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    env |= {"LC_ALL": "C", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-O", home / "drpo.py", *words.split(), "--run_dir", run.relative_to(cwd)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in home.iterdir()} - {"__pycache__"} == {"drpo.py", "toy_text.py", "tools"}
    report = json.loads((run / "report.json").read_text())
    assert {"methods", "rm", "seconds", "settings"} <= set(report) and list(report["methods"]) == METHODS
    for name, figures in report["methods"].items():
        assert {"win_rate", "win_rate_ci95", "rm_score", "kl", "rouge_l", "response_tokens", "eos_rate"} <= set(figures)
        assert re.search(rf"^{name} +win_rate {figures['win_rate']:.3f} ", done.stdout, re.M)
    assert set(report["seconds"]) == {"rm", *METHODS} and 0 < report["rm"]["accuracy"] < 1
    assert report["prompts"] == 24 == len((run / "samples.jsonl").read_text().splitlines())
    assert [done.stdout.count(x) for x in ("references score", "are resets")] == [2, 2]  # checks of PPO and of DR-PO


@pytest.mark.parametrize("file", ["drpo.py", "toy_text.py", "tools/report.py"])
def test_what_stands_alone_imports_nothing_of_ours(file):
    assert not re.findall(r"^ *(?:import|from) (?:drpo|toy_text|toy_env|tools)\b.*", (ROOT / file).read_text("utf-8"), re.M)


def test_drpo_py_stays_within_1000_lines():
    assert len((ROOT / "drpo.py").read_text().splitlines()) <= 1000


# ---- Settings ----------------------------------------------------------------------------------------------
def test_the_tldr_preset_has_the_values_of_table_5():
    s = drpo.parse(["--preset", "tldr"])[1]
    wanted = dict(model="EleutherAI/pythia-2.8b-deduped", query_length=512, response_length=53, lora_r=1024, batch_size=512)
    wanted |= dict(epochs=4, gamma=1, lam=0.95, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, kl_coef=0.05, temperature=0.7)
    wanted |= dict(lr=3e-6, sft_lr=3e-6, rm_lr=3e-6, dpo_lr=3e-6, sft_batch_size=64, rm_batch_size=64, dpo_batch_size=64)
    wanted |= dict(beta=1, dpo_beta=0.05, reset_to="reference", advantages="gae", whiten_rewards=True, missing_eos_score=-1)
    assert {name: getattr(s, name) for name in wanted} == wanted


def test_precedence_is_command_line_preset_default():
    for words in ("--preset tldr", "--preset=tldr", "--preset hh --preset=tldr"):
        stage, s = drpo.parse([*words.split(), "drpo", "--beta", "0.25"])
        assert (stage, s.preset, s.batch_size, s.beta, s.run_dir) == ("drpo", "tldr", 512, 0.25, "runs/tldr")
    s = drpo.parse(["--lr", "0.5"])[1]
    assert (s.preset, s.lr, s.epochs, s.gamma) == ("tiny", 0.5, drpo.PRESETS["tiny"]["epochs"], drpo.Settings().gamma)


def test_a_model_that_is_named_has_its_own_tokenizer():
    own = {"": "toy_text:bpe_tokenizer", "--model toy_text:tiny_pythia": "toy_text:bpe_tokenizer", "--model=here": ""}
    own |= {"--model there --tokenizer here": "here", "--model EleutherAI/pythia-14m": "", "--preset tldr": ""}
    assert {words: drpo.parse(words.split())[1].tokenizer for words in own} == own


# ---- Bad input ---------------------------------------------------------------------------------------------
def cases(table):  # those between the bars, below the first line
    return [case for line in table.splitlines()[1:] for case in line.split(" | ")]


def half_a_judge(prompts, a, b):
    return [1.0 for _ in prompts[1:]]


def large_tokenizer():
    words = conftest.tokenizer()
    words.add_tokens(["more"])
    return words


def spare_rows():  # ids that no text has can be sampled
    network = conftest.network()
    network.resize_token_embeddings(16)
    return network


BAD = """  the line has each word that stands after the colon, or, where there is none, each word of the command
nosuchstage | --nosuchflag | --preset nope | --lr abc | --lr | --lr nan | --lr 2 | --sft_lr -0.5 | --max_grad_norm inf
--beta 1.5 | --beta -0.1 | --updates -3 | --updates 1.5 | --seed -1 | --batch_size 0 | --micro_batch -1 | --temperature 0
--response_length 1 | --dtype float16 | --whiten_rewards maybe | --advantages grpo | --device nosuchdevice | --device cuda:99
--judge gold | --judge rm:nowhere | --judge test_commands:half_a_judge | --tokenizer conftest:posts | --run_dir {shelf}/file
--rm_model {shelf}/nosuchmodel: nosuchmodel | sft extra: extra | --seeds 1 -1: --seed -1 | --advantages rloo --group 1: --group
--advantages rloo --group 3: --group --batch_size | --compile True --checkpoint_activations True: --compile
--dataset nowhere.jsonl: nowhere.jsonl | --dataset conftest:nosuch: conftest:nosuch | --model conftest:posts: conftest:posts
--preference_dataset nowhere.jsonl: nowhere.jsonl | --preference_dataset conftest:posts: conftest:posts row 0: chosen
--model {shelf}/nosuchmodel: nosuchmodel | --model {shelf}/adapter: adapter | --judge toy_text:nosuchjudge: nosuchjudge
--judge toy_text:gold_judge: --judge toy_text:gold_judge no post of | --preference_length 30: 32 positions for 38
--tokenizer test_commands:large_tokenizer: 8 tokens for 9 | rm: rm needs run/sft first | dpo: dpo needs run/sft first
drpo --run_dir {shelf}/only_sft: drpo needs only_sft/rm first | eval --run_dir {shelf}/only_sft: eval needs only_sft/rm
drpo --run_dir {shelf}/sft_twice: sft_twice/rm is not a reward model
eval --run_dir {shelf}/done --preference_dataset nowhere.jsonl: nowhere.jsonl
--model test_commands:spare_rows --rm_model {shelf}/narrow: 8 tokens for 16 needed
--rm_model {shelf}/short: 8 positions for 15 | --rm_model {shelf}/bert: cannot be a reward model"""


@pytest.fixture(scope="module")
def shelf(small_run, tmp_path_factory):  # a folder with what the bad commands point at
    shelf = tmp_path_factory.mktemp("shelf")
    (shelf / "file").touch()
    (shelf / "adapter").mkdir()
    (shelf / "adapter" / "adapter_config.json").write_text("{}")
    for folder, stages in {"only_sft": "sft", "sft_twice": "sft", "done": "sft rm"}.items():
        for stage in stages.split():
            shutil.copytree(small_run / stage, shelf / folder / stage)
    shutil.copytree(small_run / "sft", shelf / "sft_twice" / "rm")
    for name, positions in {"short": 8, "narrow": 32}.items():
        GPTNeoXConfig(vocab_size=8, max_position_embeddings=positions).save_pretrained(shelf / name)
    BertConfig(vocab_size=8).save_pretrained(shelf / "bert")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.report.write", lambda run: None)
        make_run(shelf / "made", {"sft": 0.5})
    return shelf


@pytest.mark.parametrize("case", cases(BAD))
def test_bad_input_is_one_line_before_anything_is_trained(shelf, tmp_path, one_line, monkeypatch, case):
    monkeypatch.setattr(drpo, "step", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(drpo, "sample", lambda *_: pytest.fail("evaluated"))
    flags, _, words = case.format(shelf=shelf).partition(": ")
    line = one_line(["--run_dir", str(tmp_path / "run"), *SMALL, *flags.split()])
    assert line.startswith("drpo.py: ") and all(word in line for word in (words or flags).split()), line


def test_a_missing_package_is_told_before_training(tmp_path, one_line, monkeypatch):
    monkeypatch.setattr(drpo, "step", lambda *_: pytest.fail("trained"))
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    assert "rouge_score" in one_line([*SMALL, "--run_dir", tmp_path])


BAD_FOR_TOOLS = """  the line has the last word of the command, or what stands after its colon
toy_env --quick --full | toy_env --seeds oops | toy_env --nosuch | toy_env --out {shelf}/file: --out
tools.toy_sweep --nosuch | tools.toy_sweep --seeds oops | tools.toy_sweep --out {shelf}/file: --out
tools.planted --run=nowhere: nowhere/sft | tools.car --jobs 0: --jobs | tools.car --rows nothing
tools.judge {shelf}/nowhere --model m: nowhere/samples.jsonl | tools.judge {shelf}/made: --model | tools.judge: RUN_DIR
tools.show {shelf}/nowhere --sample 1: nowhere/samples.jsonl | tools.show {shelf}/made --sample 4: has 4 rows
tools.show {shelf}/made --sample -1: count from 0 | tools.show {shelf}/made --beta 1: --beta 1 | tools.show: RUN_DIR
tools.show row --run_dir none: none/sft | tools.show data --row 16: --row 16 | tools.show data --row oops
tools.show data --beta 2: --beta 2 | tools.bench --iterations 0: --iterations 0 | tools.bench --micro_batch few
tools.bench --no_such_flag | tools.bench --random_weights --model gpt2 | tools.bench --preset cnndm
tools.bench --json no/such/folder/b.json | tools.bench --peers --batch_size 4: --peers | tools.bench --device meat
tools.bench --plan --check: one at a time | tools.bench --model ./no/such/folder | tools.bench --check --lengths file: --lengths
tools.text_sweep table --runs NOPE | tools.text_sweep table --threads 0"""


@pytest.mark.parametrize("case", cases(BAD_FOR_TOOLS))
def test_bad_input_of_a_tool_is_one_line(shelf, tmp_path, one_line, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.print", lambda *_, **__: pytest.fail("it went on"))
    command, _, word = case.partition(": ")
    name, *argv = command.format(shelf=shelf).split()
    assert (word or argv[-1]) in one_line(argv, main=importlib.import_module(name).main)


def test_several_seeds_make_one_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    drpo.main(["all", *SMALL, "--seeds", "7", "8", "--run_dir", str(tmp_path)])
    report = json.loads((tmp_path / "report.json").read_text())
    runs = [json.loads((tmp_path / f"seed_{seed}" / "report.json").read_text()) for seed in (7, 8)]
    values = [run["methods"]["drpo"]["kl"] for run in runs]
    assert [run["settings"]["seed"] for run in runs] == [7, 8] and values[0] != values[1]
    assert report["methods"]["drpo"]["kl"]["mean"] == pytest.approx(sum(values) / 2)
    assert report["methods"]["drpo"]["kl"]["values"] == pytest.approx(values)
    assert re.search(r"seeds 7, 8", capsys.readouterr().out)


# ---- Documented commands -----------------------------------------------------------------------------------
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"python(?:3)? (?:-m )?(drpo\.py|toy_env\.py|tools\.\w+)((?: (?![#|&])[^\s`#|&;)]+)*)")


def commands(text):  # -> [(program, words), ...] of fenced blocks and inline code
    code = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.M | re.S) + re.findall(r"`(python [^`\n]+)`", text)
    return [(program, rest.split()) for program, rest in COMMAND.findall("\n".join(code))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_are_accepted(page):
    found = commands(page.read_text(encoding="utf-8"))
    for program, words in found:
        assert (ROOT / (program if program.endswith(".py") else f"{program.replace('.', '/')}.py")).exists(), program
        if program == "drpo.py" and "--help" not in words:
            words = " ".join(words).replace("$stage", "drpo").replace("...", "").replace("STAGE", "all")
            assert drpo.parse(re.sub(r"\$\{?\w+\}?", "0", words).split())[0] in {*drpo.STAGES, "eval", "all"}
    assert page.name != "README.md" or {"drpo.py", "toy_env.py"} <= {program for program, _ in found} and len(found) > 5
