"""Rollouts held against the plain forward pass (--check_rollouts): what a mistake in cache, positions or masks would change."""

import torch
from tqdm import tqdm

import drpo


@torch.no_grad()
def check(policy, queries, prefixes, responses, uniforms, tokenizer, s):
    """Stops with status 3 at a row in which a whole pass over query and response would have drawn another token.

    A uniform u draws token k where C(k - 1) <= u < C(k), C the cumulative distribution. A pass with a cache rounds otherwise
    than a whole one, so C may differ by `slack`; where u is as close as that to a step of C, either side of it is right.
    Arguments and result as of drpo.rollout: B lists of ids each, uniforms (B, T)."""
    slack, drawn, near = 1e-4 if s.dtype == "float32" else 0.1, 0, 0
    body, head = drpo.body_and_head(policy)
    for rows, part in drpo.micro_batches(drpo.padded(queries, responses, tokenizer.eos_token_id, s.device), s):
        states = drpo.response_states(body, part, drpo.response_mask(part)).split(part["response_len"].tolist())
        for row, of_row in zip(rows.tolist(), states):
            steps = slice(len(prefixes[row]), len(responses[row]))
            tokens = torch.tensor(responses[row][steps], device=s.device)[:, None]
            cdf = (head(of_row[steps].to(head.weight.dtype)).float() / s.temperature).softmax(-1).cumsum(-1)
            u = uniforms[row, steps].to(cdf)[:, None] * cdf[:, -1:]
            low = torch.where(tokens > 0, cdf.gather(1, (tokens - 1).clamp(min=0)), 0.0)
            outside = torch.maximum(low - u, u - cdf.gather(1, tokens))[:, 0]  # how far u is from what draws the token
            if not outside.max() <= slack:
                first = int((~(outside <= slack)).nonzero()[0])
                plain = torch.searchsorted(cdf[first], u[first], right=True).item()
                drpo.stop(
                    f"--check_rollouts: row {row}: response token {steps.start + first} is {tokens[first].item()}, where a "
                    f"plain forward pass draws {plain}: look for cache, positions, padding",
                    3,
                )
            drawn, near = drawn + len(tokens), near + int((outside > 0).sum())
    tqdm.write(f"check: {drawn} tokens drawn are those of a plain forward pass; {near} of them within rounding ({slack:g})")
