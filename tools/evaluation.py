"""The eval stage of drpo.py: every finished method of a run on the same held-out prompts, and who judges them."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import drpo
from tools.data import resolve
from tools.judge import api_judge
from tools.running import USES


def load_judge(s, backbone=None, head=None, tokenizer=None):
    """-> judge(prompts, a, b) -> [P(a is preferred), or None where there is no verdict, ...], from lists of texts."""

    def by_reward(prompts, a, b):
        nonlocal backbone, head, tokenizer, other_run
        if other_run:  # loaded when it is first asked, once
            (backbone, head), tokenizer = drpo.load_reward(f"{other_run}/rm", s), drpo.load_tokenizer(f"{other_run}/rm", s)
            other_run = None
        rows = [[{"prompt": prompt, "reference": text} for prompt, text in zip(prompts, texts)] for texts in (a, b)]
        first, second = [drpo.reference_scores(backbone, head, side, s, tokenizer) for side in rows]
        return ((torch.sign(first - second) + 1) / 2).tolist()

    def by_api(prompts, a, b):
        found = torch.zeros(len(prompts), dtype=torch.double)  # nan: no verdict
        try:
            if drpo.world()[0] == 0:  # asked, and paid for, once
                found += torch.tensor([math.nan if p is None else p for p in verdicts(prompts, a, b)])
        except ValueError as error:
            drpo.stop(error)
        return [None if math.isnan(p) else p for p in drpo.summed(found).tolist()]

    def by_function(prompts, a, b):
        try:
            found = [None if p is None else float(p) for p in function(prompts, a, b)]
        except ValueError as error:
            drpo.stop(f"--judge {s.judge}: {error}")
        if len(found) != len(prompts):
            drpo.stop(f"--judge {s.judge}: gave {len(found)} verdicts on {len(prompts)} pairs")
        return found

    other_run = s.judge.removeprefix("rm:") if s.judge.startswith("rm:") else None
    if other_run and not Path(other_run, "rm", "config.json").exists():
        drpo.stop(
            f"--judge {s.judge}: there is no reward model in {other_run}/rm; make one with: "
            f"python drpo.py rm --run_dir {other_run}"
        )
    if s.judge == "rm" or other_run:
        return by_reward  # the run's own: what was optimised
    if s.judge.startswith("api:") and len(s.judge) > 4:
        try:
            verdicts = api_judge(s.judge[4:], s.run_dir, s.seed, s.both_orders, s.judge_prompt)
        except ValueError as error:
            drpo.stop(error)
        return by_api
    function = resolve(s.judge) or drpo.stop(f"--judge {s.judge}: must be rm, rm:RUN_DIR, module:function or api:MODEL")
    return by_function


def held_out_rows(s):
    """All held-out rows of the dataset, or of its split --eval_split."""
    source = (s.dataset, "reference", s.seed)
    # without a split called just as the stages call it, so that what load_rows has read serves again
    return drpo.load_rows(*source, s.eval_split)[1] if s.eval_split else drpo.load_rows(*source)[1]


def yardsticks(s):
    """What methods are measured with, all of the run: {sft, backbone, head: its SFT and reward model, tokenizer, judge}."""
    tokenizer, sft = drpo.load_tokenizer(f"{s.run_dir}/sft", s), drpo.load_network(f"{s.run_dir}/sft", s)
    backbone, head = drpo.load_reward(f"{s.run_dir}/rm", s)
    return SimpleNamespace(
        sft=sft, backbone=backbone, head=head, tokenizer=tokenizer, judge=load_judge(s, backbone, head, tokenizer)
    )


def measure(network, rows, s, by):
    """A network on prompts and references -> {figure: one value per row}: those of report.METRICS, the texts, and `ids`, the
    tokens of the response. by: what `yardsticks` gives.

    KL(pi || pi_SFT) is estimated on samples at the training temperature, the one at which the two were compared in training,
    and `kl_rm_score` is the score of those very samples; everything else is measured at the evaluation temperature."""
    prompts, references = [row["prompt"] for row in rows], [row["reference"] for row in rows]
    responses, tempered = [drpo.sample(network, rows, s, by.tokenizer, at) for at in (s.eval_temperature, s.temperature)]
    log_pi, log_sft = [
        drpo.per_row(lambda part: drpo.sequence_logprobs(net, part, s.temperature), rows, tempered, s, by.tokenizer)
        for net in (network, by.sft)
    ]
    rm_scores, kl_rm_scores = [
        drpo.per_row(lambda part: drpo.end_scores(by.backbone, by.head, part), rows, said, s, by.tokenizer)
        for said in (responses, tempered)
    ]
    texts = drpo.decode(responses, by.tokenizer)
    return {
        "response": texts,
        "win_rate": by.judge(prompts, texts, references),
        "kl": (log_pi - log_sft).tolist(),
        "rm_score": rm_scores.tolist(),
        "kl_rm_score": kl_rm_scores.tolist(),
        **{f"rouge_{kind.lower()}": drpo.rouge(texts, rows, f"rouge{kind}") for kind in "12L"},
        "response_tokens": [len(ids) for ids in responses],
        "eos_rate": [int(ids[-1] == by.tokenizer.eos_token_id) for ids in responses],
        "ids": responses,
    }


def require_same_tokenizer(name, s, tokenizer):
    """A network from elsewhere must read and write the run's tokens, or its KL to the SFT model, a sum over tokens, would mean
    nothing."""
    other = drpo.load_tokenizer(name, s)
    fewer, more = sorted((other.get_vocab().items(), tokenizer.get_vocab().items()), key=len)
    if not fewer <= more or other.eos_token_id != tokenizer.eos_token_id:  # one may have a [PAD] that the other lacks
        drpo.stop(f"--others {name}: has another tokenizer than {s.run_dir}/sft, so that there is no KL between the two")


def evaluate(s):
    """Every finished method of the run, and the networks named by --others, on the same held-out prompts -> samples.jsonl, a
    row per prompt, and eval.json, what is known of the run; tools/report.py makes tables, intervals and figures of them."""
    run = Path(s.run_dir)
    results = {stage: json.loads(path.read_text()) for stage in USES if (path := run / stage / "result.json").exists()}
    rows, by = held_out_rows(s)[: s.eval_samples], yardsticks(s)
    samples = [{"prompt": row["prompt"], "reference": row["reference"]} for row in rows]
    folders = {name: f"{run}/{name}" for name in ("sft", "dpo", "ppo", "drpo") if name in results}
    for name in s.others:
        require_same_tokenizer(name, s, by.tokenizer)
        folders[name] = name
    for method in tqdm(folders, desc="eval", unit="method", disable=drpo.world()[0] > 0):
        network = by.sft if method == "sft" else drpo.load_network(folders[method], s)
        columns = measure(network, rows, s, by)
        for row, *values in zip(samples, *columns.values()):
            row[method] = dict(zip(columns, values))
    if drpo.world()[0] > 0:
        return
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (run / "eval.json").write_text(
        json.dumps(
            {
                "rm": results["rm"],
                "sft": results["sft"],
                "settings": dataclasses.asdict(s),
                "seconds": {stage: result.pop("seconds") for stage, result in results.items()},
            }
        )
    )
