"""The eval stage of drpo.py: every finished method of a run on the same held-out prompts, and who judges them."""
import dataclasses
import json
import math
from pathlib import Path

import torch
from tqdm import tqdm

import drpo
from tools.judge import api_judge


def load_judge(s, backbone=None, head=None, tokenizer=None):
    """-> judge(prompts, a, b) -> [P(a is preferred), or None where there is no verdict, ...], from lists of texts."""
    def by_reward(prompts, a, b):                                     # the run's own reward model: what was optimised
        rows = [[{"prompt": prompt, "reference": text} for prompt, text in zip(prompts, texts)] for texts in (a, b)]
        first, second = [drpo.reference_scores(backbone, head, side, s, tokenizer) for side in rows]
        return ((torch.sign(first - second) + 1) / 2).tolist()

    def by_api(prompts, a, b):
        found = torch.zeros(len(prompts), dtype=torch.double)         # nan: no verdict
        try:
            if drpo.world()[0] == 0:                                  # asked, and paid for, once
                found += torch.tensor([math.nan if p is None else p for p in verdicts(prompts, a, b)])
        except ValueError as error:
            drpo.stop(error)
        return [None if math.isnan(p) else p for p in drpo.summed(found).tolist()]

    if s.judge == "rm":
        return by_reward
    if s.judge.startswith("api:") and len(s.judge) > 4:
        try:
            verdicts = api_judge(s.judge[4:], s.run_dir, s.seed, s.both_orders, s.judge_prompt)
        except ValueError as error:
            drpo.stop(error)
        return by_api
    return drpo.resolve(s.judge) or drpo.stop(f"--judge {s.judge}: must be rm, module:function or api:MODEL")


def evaluate(s):
    """Every finished method of the run, on the same held-out prompts -> samples.jsonl, a row per prompt, and eval.json, what
    is known of the run; tools/report.py makes tables, intervals and figures of them.

    KL(pi || pi_SFT) is estimated on samples at the training temperature, the one at which the two were compared in training;
    everything else is measured on samples at the evaluation temperature."""
    run = Path(s.run_dir)
    results = {stage: json.loads(path.read_text()) for stage in drpo.USES if (path := run / stage / "result.json").exists()}
    rows = drpo.load_rows(s.dataset, "reference", s.seed)[1][:s.eval_samples]
    prompts, references = [row["prompt"] for row in rows], [row["reference"] for row in rows]
    tokenizer, sft = drpo.load_tokenizer(f"{run}/sft", s), drpo.load_network(f"{run}/sft", s)
    backbone, head = drpo.load_reward(f"{run}/rm", s)
    judge = load_judge(s, backbone, head, tokenizer)
    samples = [{"prompt": prompt, "reference": reference} for prompt, reference in zip(prompts, references)]
    def scored(part):
        return drpo.end_scores(backbone, head, part)

    for method in tqdm([name for name in ("sft", "dpo", "ppo", "drpo") if name in results], desc="eval", unit="method",
                       disable=drpo.world()[0] > 0):
        network = sft if method == "sft" else drpo.load_network(f"{run}/{method}", s)
        responses, tempered = [drpo.sample(network, rows, s, tokenizer, at) for at in (s.eval_temperature, s.temperature)]
        log_pi, log_sft = [drpo.per_row(lambda part: drpo.sequence_logprobs(net, part, s.temperature), rows, tempered, s,
                                        tokenizer) for net in (network, sft)]
        texts = drpo.decode(responses, tokenizer)
        columns = {"response": texts, "win_rate": judge(prompts, texts, references), "kl": (log_pi - log_sft).tolist(),
                   "rm_score": drpo.per_row(scored, rows, responses, s, tokenizer).tolist(),
                   **{f"rouge_{kind.lower()}": drpo.rouge(texts, rows, f"rouge{kind}") for kind in "12L"},
                   "response_tokens": [len(ids) for ids in responses],
                   "eos_rate": [int(ids[-1] == tokenizer.eos_token_id) for ids in responses]}
        for row, *values in zip(samples, *columns.values()):
            row[method] = dict(zip(columns, values))
    if drpo.world()[0] > 0:
        return
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (run / "eval.json").write_text(json.dumps({"rm": results["rm"], "sft": results["sft"], "settings": dataclasses.asdict(s),
                                               "seconds": {stage: result.pop("seconds") for stage, result in results.items()}}))
