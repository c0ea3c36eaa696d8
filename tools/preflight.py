"""Everything that can be checked before training starts, so that no stage dies of a typo in the hours after the first one."""

import os
import shutil
import sys
from pathlib import Path

import huggingface_hub
from transformers import AutoConfig

import drpo
from tools import checkpoint, evaluation
from tools.data import resolve
from tools.models import load
from tools.running import USES


def check(stages, s, held):
    """Makes the run folder, holds it for as long as the ExitStack `held` is open, and reads data, tokenizer, the model's
    config and the judge that these stages will ask for.

    Exits with 2 and one line at the first thing that is wrong, as the stage itself would later."""
    run = Path(s.run_dir)
    try:
        run.mkdir(parents=True, exist_ok=True)
        held.enter_context(checkpoint.hold(run))
    except BlockingIOError:
        drpo.stop(f"--run_dir {run}: another process is at work in it")
    except OSError as error:
        drpo.stop(f"--run_dir {run}: {error.strerror}")
    if s.fresh:
        start_over(stages, run)
    if any(is_hub_name(name) for name in (s.model, s.tokenizer, s.dataset, s.preference_dataset, *s.others)):
        do_without_an_unreachable_hub()
    todo = [stage for stage in stages if stage == "eval" or not (run / stage / "result.json").exists()]
    if set(todo) & {"sft", "rm", "ppo", "drpo", "eval"}:
        drpo.load_rows(s.dataset, "reference", s.seed)
    if set(todo) & {"rm", "dpo"}:
        drpo.load_rows(s.preference_dataset, "pairs", s.seed)
    if set(todo) & {"ppo", "drpo"} and s.reset_to == "chosen":
        drpo.load_rows(s.preference_dataset, "reference", s.seed)
    if "sft" in todo:
        drpo.load_tokenizer(s.tokenizer or s.model, s)
        room = getattr(read_config(s), "max_position_embeddings", None)
        longest = s.query_length + max(s.response_length, s.preference_length)
        if room and longest > room:
            drpo.stop(
                f"--query_length {s.query_length} and --preference_length or --response_length make {longest} tokens, but "
                f"--model {s.model} has room for {room}"
            )
    if "eval" in todo:
        (row, *_), judge = evaluation.held_out_rows(s), evaluation.load_judge(s)
        if resolve(s.judge):  # a function of one's own: asked about one row, it costs nothing to know now
            judge([row["prompt"]], [row["reference"]], [row["reference"]])
        for name in s.others:
            drpo.load_tokenizer(name, s)


def start_over(stages, run):
    """Deletes what these stages, and the stages that build on them, have left in the run folder, if the person agrees."""
    parts = {stage: set(parts) for stage, parts in USES.items()}
    doomed = [
        run / stage for stage in parts if any(one == stage or parts[one] < parts[stage] for one in stages if one in parts)
    ]
    left = "samples.jsonl eval.json report.json report.md curves.png frontier.png history.jsonl overoptimisation.png"
    doomed += [run / name for name in [*left.split(), "resets.jsonl"]]  # not verdicts.jsonl, which may have been paid for
    if not (there := [path for path in doomed if path.exists()]):
        return
    print(f"--fresh deletes {', '.join(map(str, there))}. Type yes to go on: ", end="", flush=True)
    if sys.stdin.readline().strip() != "yes":
        drpo.stop(f"--fresh: nothing was deleted from {run}, as nobody said yes")
    for path in there:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_hub_name(name):
    return bool(name) and not resolve(name) and not Path(name).exists() and not name.startswith((".", "/"))


def do_without_an_unreachable_hub():
    """Where the Hub does not answer, what is in its cache serves, and what is not is missed at once, not after a minute."""
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception as error:  # whatever type the HTTP library of the day has
        print(f"{huggingface_hub.constants.ENDPOINT} cannot be reached ({error}): only what was downloaded before is at hand")
        os.environ["HF_HUB_OFFLINE"] = "1"  # `datasets` reads it when it is imported
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def read_config(s):
    """The model's config, without its weights; that of a module:function or a .gguf file comes with them, or not at all."""
    if resolve(s.model) or s.model.endswith(".gguf"):
        return None
    return load(AutoConfig, s.model, s)
