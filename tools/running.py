"""What every stage and command needs and a reader of the method need not see: how a command begins and ends, several processes,
and the loop around the updates, with its learning rate, metrics and checkpoints. Imports nothing of drpo.py."""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from tools import checkpoint

# The parts of Settings that bear on each stage, by the [part] before a setting's help. A finished stage is kept while those
# are what they were.
USES = {
    "sft": ("data", "sft"),
    "rm": ("data", "sft", "rm"),
    "dpo": ("data", "sft", "policy", "dpo"),
    "ppo": ("data", "sft", "rm", "policy", "rl"),
    "drpo": ("data", "sft", "rm", "policy", "rl"),
}


def stop(message, status=2):
    """One line on stderr, and the end. Status 2: the person at the keyboard can mend it; 3: this run must not go on."""
    tqdm.write(f"drpo.py: {' '.join(str(message).split())}", file=sys.stderr)  # on a line of its own, also below a bar
    raise SystemExit(status)


def prepare():
    """What every command begins with: a module:function of the current folder can be named, and one bar per stage is enough."""
    sys.path.append(os.getcwd())
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def command(name, doc):
    """`prepare`, and a parser for `python -m tools.NAME`; what it does not know is left for drpo.parse."""
    prepare()
    how = {"description": doc, "formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog=f"python -m tools.{name}", **how)
    parser.error = stop
    return parser


def precision(s):
    """The context of everything that is done with networks: matrix products are in s.dtype."""
    kind = torch.device(s.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=s.dtype == "bfloat16", cache_enabled=False)


def check_ranges(s):
    """Stops at the first number among the settings that means nothing, before anything is begun."""
    lowest = {"temperature": 1e-3, "eval_temperature": 1e-3, "missing_eos_score": -1e6}
    highest = dict.fromkeys(("beta", "lam", "gamma", "cliprange", "lr", "sft_lr", "rm_lr", "dpo_lr"), 1)
    for name, value in vars(s).items():
        low, high = lowest.get(name, 0), highest.get(name, 1000000)
        if type(value) is float and not low <= value <= high:
            stop(f"--{name} {value}: must lie in [{low}, {high}]")
        least = 0 if name in ("seed", "sft_steps", "rm_steps", "updates", "lora_r", "supervised_lora_r") else 1
        if type(value) is int and value < least:
            stop(f"--{name} {value}: must be {least} or more")
    if len(set(s.seeds)) < len(s.seeds):
        stop(f"--seeds {' '.join(map(str, s.seeds))}: names a seed twice")
    if s.response_length < 2:
        stop("--response_length 1: must be 2 or more, one token and its EOS")
    try:
        torch.empty(0, device=s.device)
    except (RuntimeError, AssertionError) as error:  # the latter: a torch without CUDA
        stop(f"--device {s.device}: {error}")


# ----------------------------------------------------------------------------------------------------------------------
# Several processes, started by torchrun: each holds all rows and all weights, takes its share of the micro-batches, and adds
# up what they give. Whatever is computed from whole batches is then the same everywhere, as if there were one process.


def join(s, held):
    """Meets the other processes, where torchrun has started some; they are left when the ExitStack `held` closes. One talks."""
    if "LOCAL_RANK" in os.environ:
        cuda = s.device.startswith("cuda")
        if cuda:
            torch.cuda.set_device(s.device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(days=7))
        held.callback(dist.destroy_process_group)
    if world()[0] > 0:
        sys.stdout = held.enter_context(open(os.devnull, "w"))


def world():
    """-> (number of this process, how many there are); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def share(parts):
    """This process's part of a sequence: its first, and every world-size-th after it."""
    rank, size = world()
    return parts[rank::size]


def summed(x):
    """x, a contiguous tensor, summed over all processes in place."""
    if world()[1] > 1:
        dist.all_reduce(x)
    return x


def wait_for_all():
    if world()[1] > 1:
        dist.barrier()


def exchanged(responses, prefix_lengths, T, device):
    """B lists of ids, of which each process has let some grow beyond their prefixes -> all of them as they have grown."""
    table = torch.zeros(len(responses), T + 1, dtype=torch.long, device=device)
    for row, (ids, prefix_length) in enumerate(zip(responses, prefix_lengths)):
        if len(ids) > prefix_length:
            table[row, : len(ids) + 1] = torch.tensor([len(ids), *ids])
    return [ids[1 : ids[0] + 1] for ids in summed(table).tolist()]


# ----------------------------------------------------------------------------------------------------------------------
# The loop.


def training(stage, updates, lr, modules, s):
    """Yields (update, optimizer, metrics) for each update still to do; what the loop body puts into `metrics` is logged.

    AdamW with eps 1e-5, lr linear from `lr` to lr / updates. Randomness depends on seed and update number alone, so a
    checkpoint is no more than trained weights, optimizer state and a number, and an interrupted stage goes on from it.
    SIGTERM and SIGINT let the update end, save, and end the run with status 0."""
    if s.checkpoint_activations:
        from tools import memory

        memory.checkpoint_layers(modules)
    params = {name: p for name, p in modules.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), lr=lr, eps=1e-5)
    folder, done = Path(s.run_dir) / stage, 0
    if found := checkpoint.newest(folder / "checkpoint"):
        refuse_if_changed(found / "state.json", s, stage)
        done = checkpoint.load(found, params, optimizer)
        print(f"{stage}: goes on after update {done}, from {found}")
    log = folder / "metrics.jsonl"
    is_first = world()[0] == 0  # of the processes: the one that writes
    if is_first:
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:done]) if done else "")
    bar = tqdm(range(done, updates), initial=done, total=updates, desc=f"{stage:4}", unit="update", disable=not is_first)
    with checkpoint.requests_to_stop() as asked_to_stop:
        for update in bar:
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - update / updates)
            metrics, began = {"update": update + 1, "lr": group["lr"]}, time.perf_counter()
            yield update, optimizer, metrics
            metrics["seconds"] = time.perf_counter() - began
            stopping = summed(torch.tensor(len(asked_to_stop))).item() > 0
            if is_first:
                with log.open("a") as file:
                    file.write(json.dumps(metrics) + "\n")
            shown = [name for name in ("loss", "accuracy", "score", "kl", "eos_rate", "response_tokens") if name in metrics]
            bar.set_postfix({name: f"{metrics[name]:.3g}" for name in shown})
            if is_first and ((update + 1) % s.save_every == 0 or update + 1 == updates or stopping):
                try:
                    checkpoint.save(folder / "checkpoint", update + 1, params, optimizer, relevant(s, stage), s.keep)
                except OSError as error:
                    stop(
                        f"{folder}/checkpoint: update {update + 1} cannot be saved ({error}); what was saved before is whole", 3
                    )
            if stopping and update + 1 < updates:
                wait_for_all()
                stop(
                    f"{stage}: stopped as asked after update {update + 1} of {updates}; the same command goes on from there", 0
                )


def step(optimizer, s, where, batch):
    """One optimizer step -> the gradient's norm. Where that is not finite, so also where the loss was not, the run stops
    before the weights move, and leaves what batch() gives, a dict of tensors, for a look. `where` is "STAGE update N"."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if world()[1] > 1:
        for p in params:  # of a process without a share there is none
            p.grad = summed(torch.zeros_like(p) if p.grad is None else p.grad)
    norm = nn.utils.clip_grad_norm_(params, s.max_grad_norm or math.inf)
    if not torch.isfinite(norm):
        path, tensors = f"{s.run_dir}/{where.split()[0]}/bad_batch.safetensors", batch()
        if world()[0] == 0:
            Path(path).parent.mkdir(parents=True, exist_ok=True)  # of tools/bench.py, which has no stage and so no folder
            save_file({name: x.contiguous() for name, x in tensors.items()}, path)
        wait_for_all()
        bad = [name for name, x in tensors.items() if x.is_floating_point() and not x.isfinite().all()]
        stop(
            f"{where}: {', '.join(['the gradient', *bad])}: not finite; no step was taken. The batch is in {path}, and the "
            f"last checkpoint beside it",
            3,
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


def relevant(s, stage):
    """The settings that a stage's result depends on."""
    return {f.name: getattr(s, f.name) for f in dataclasses.fields(s) if f.metadata["help"][1:].split("]")[0] in USES[stage]}


def refuse_if_changed(path, s, stage):
    """What was made with other settings (as JSON in `path`) is neither continued nor overwritten."""
    try:
        old = json.loads(path.read_text())["settings"]
    except (ValueError, KeyError, TypeError) as error:
        stop(f"{path}: cannot be read ({type(error).__name__}: {error}); delete it")
    new, folder = relevant(s, stage), f"{s.run_dir}/{stage}"
    changed = [f"{name} was {old.get(name)}, is {new[name]}" for name in new if old.get(name) != new[name]]
    if changed:
        stop(f"{folder} was made with other settings ({'; '.join(changed)}): name another --run_dir, or delete {folder}")
