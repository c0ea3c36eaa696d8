"""Preference pairs without people or an API: of K samples of the SFT policy, the nearest to the human reference is preferred.

    python -m tools.rouge_pairs RUN_DIR --out pairs.jsonl [--samples K] [--prompts N] [settings of drpo.py]

RUN_DIR/sft writes K responses to each of N training prompts of --dataset, at --temperature. By ROUGE-L F1 against the reference
the best is chosen and the worst rejected; ties are dropped. The reward model then learns a label that can be computed for every response of an evaluation:

    python drpo.py sft --dataset tldr.jsonl --run_dir RUN_DIR ...
    python -m tools.rouge_pairs RUN_DIR --out pairs.jsonl --dataset tldr.jsonl --temperature 1.0 ...
    python drpo.py rm --dataset tldr.jsonl --preference_dataset pairs.jsonl --run_dir RUN_DIR ...

N may exceed the number of prompts: later rounds use each prompt again, with fresh samples. A response that was cut at
--response_length is a text like any other here; in a rollout it scores --missing_eos_score.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers.utils import logging

import drpo


def sample(network, rows, count, tokenizer, s):
    """-> `count` lists of texts, one per row each. The uniforms depend on the seed, the list and the row's place alone."""
    queries = [drpo.encode_query(row["prompt"], tokenizer, s.query_length) for row in rows] * count
    streams = [drpo.generator(s.seed, "rouge pairs", stream) for stream in range(count)]
    uniforms = torch.cat([torch.rand(len(rows), s.response_length, generator=stream) for stream in streams])
    responses = drpo.rollout(network, queries, [[]] * len(queries), uniforms, tokenizer, s, s.temperature)
    texts = [text.strip() for text in tokenizer.batch_decode(responses, skip_special_tokens=True)]
    return [texts[i : i + len(rows)] for i in range(0, len(texts), len(rows))]


def label(rows, samples):
    """Rows {prompt, reference} and lists of texts -> (pairs {prompt, chosen, rejected}, their gaps in ROUGE-L F1). A row has no
    pair if its texts score the same or if ROUGE cannot read the reference. Empty texts do not count."""
    pairs, gaps, scores = [], [], [drpo.rouge(texts, rows, "rougeL") for texts in samples]
    for row, *scored in zip(rows, *(zip(*both) for both in zip(scores, samples))):
        scored = sorted((score, text) for score, text in scored if text and score is not None)
        if scored and scored[0][0] < scored[-1][0]:
            pairs.append({"prompt": row["prompt"], "chosen": scored[-1][1], "rejected": scored[0][1]})
            gaps.append(scored[-1][0] - scored[0][0])
    return pairs, gaps


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tools.rouge_pairs", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder with a finished sft/")
    parser.add_argument("--out", type=Path, required=True, help="file to write, one pair a line")
    parser.add_argument("--samples", type=int, default=2, help="responses per prompt")
    parser.add_argument("--prompts", type=int, default=0, help="prompts to sample for; 0: each training prompt once")
    parser.error = drpo.stop
    args, given = parser.parse_known_args(argv)
    s = drpo.parse(["rm", *given, "--run_dir", args.run_dir])[1]
    if args.prompts < 0 or args.samples < 2:
        drpo.stop(f"--prompts {args.prompts} --samples {args.samples}: must be 0 or more, 2 or more")
    if not drpo.finished(s, "sft"):
        drpo.stop(f"{args.run_dir}/sft: is not finished; make it with: python drpo.py sft --run_dir {args.run_dir}")
    try:
        args.out.touch()  # now, not after the sampling
    except OSError as error:
        drpo.stop(f"--out {args.out}: {error.strerror}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    train = drpo.load_rows(s.dataset, "reference", s.seed)[0]
    rows = drpo.draw(train, args.prompts or len(train), 0, s.seed, "rouge pairs")
    tokenizer, network = drpo.load_tokenizer(f"{s.run_dir}/sft", s), drpo.load_network(f"{s.run_dir}/sft", s)
    with drpo.precision(s):
        samples = sample(network, rows, args.samples, tokenizer, s)
    pairs, gaps = label(rows, samples)
    args.out.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    print(f"{args.out}: {len(pairs)} pairs from {len(rows)} prompts, mean gap {drpo.mean(gaps) or 0:.3f} ROUGE-L")


if __name__ == "__main__":
    main()
