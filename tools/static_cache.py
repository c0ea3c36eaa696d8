"""Decoding into a cache of fixed size (--static_cache). On a GPU a step is then captured as a CUDA graph and replayed, so that
it costs what reading weights and cache costs, and not the launch of a thousand small kernels. Imports nothing of drpo.py."""

import torch
from transformers import StaticCache

from tools.models import body_and_head, last_logits


def decoder(policy, query_mask, room):
    """As drpo.decoder, with room for that many tokens after the queries. Rows that are no longer asked for are decoded on, and
    what they give is dropped: neither the graph nor its cache may change shape."""
    rows, Q = query_mask.shape
    device, cache = query_mask.device, StaticCache(config=policy.config, max_cache_len=Q + room)
    body, head = body_and_head(policy)
    slots, filled, graph, logits = torch.arange(rows, device=device), Q, None, None
    tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
    positions = query_mask.sum(1, keepdim=True)  # of the token that comes next
    mask = torch.zeros(rows, 1, 1, Q + room, dtype=torch.bool, device=device)
    mask[:, 0, 0, :Q] = query_mask

    def forward():
        given = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        return last_logits(head, body(**given, use_cache=True).last_hidden_state)

    def capture():
        nonlocal logits
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # once without a graph, as capturing asks for; what it wrote is written again
            forward()
        torch.cuda.current_stream(device).wait_stream(side)
        for layer in cache.layers:
            layer.cumulative_length.sub_(1)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            logits = forward()
        return captured

    def next_logits(new, keep):
        nonlocal slots, filled, graph, logits
        if logits is None:  # the queries
            where = (query_mask.cumsum(1) - 1).clamp(min=0)
            given = {"input_ids": new, "attention_mask": query_mask.long(), "position_ids": where, "past_key_values": cache}
            logits = last_logits(head, body(**given, use_cache=True).last_hidden_state)
            return logits
        slots = slots if keep is None else slots[keep]
        tokens[slots] = new
        mask[..., filled] = True
        if device.type != "cuda":
            logits = forward()
        else:
            graph = graph or capture()
            graph.replay()
        positions.add_(1)
        filled += 1
        return logits[slots]

    return next_logits
