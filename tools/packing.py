"""Rows of different lengths in one forward pass without any padding: they stand one behind another, as one long row, and
attention is computed of each apart. Imports nothing of drpo.py."""

import contextlib

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer


def attention_by_row(module, query, key, value, attention_mask, row_len=None, **kwargs):
    """transformers' "sdpa", but where a pass is given row_len, the lengths of the rows in it, of each row apart.
    query, key, value (1, heads, N, d) -> (1, N, heads, d), and None for the weights."""
    if row_len is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = zip(*(x.split(row_len, 2) for x in (query, key, value)))
    return torch.cat([sdpa_attention_forward(module, *row, None, **kwargs)[0] for row in rows], 1), None


def mask_of_padding(attention_mask=None, **kwargs):
    """transformers' mask for "sdpa", but none where nothing is padded: attention is causal by itself."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **kwargs)


AttentionInterface.register("by_row", attention_by_row)
AttentionMaskInterface.register("by_row", mask_of_padding)


@contextlib.contextmanager
def last_mlp_at(body, places, N):
    """Inside, the last layer's MLP sees only the tokens at `places` (n,) of the N, and gives 0 for the others: no other token's
    state depends on it. Not with activation checkpointing, whose second pass comes when this is over."""
    layer = [module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)][-1]
    if layer.gradient_checkpointing and torch.is_grad_enabled():
        yield
        return

    def put_back(mlp, given, out):
        states = out.new_zeros(1, N, out.shape[2])
        states[:, places] = out
        return states

    before = layer.mlp.register_forward_pre_hook(lambda mlp, given: given[0][:, places])
    after = layer.mlp.register_forward_hook(put_back)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def row_states(body, ids, row_len, places):
    """-> (n, d) float32: the body's last hidden states at `places` (n,) of ids (N,) long, in which rows of `row_len` tokens, a
    list, stand one behind another. A row's states are those that it has alone."""
    if body.config._attn_implementation != "by_row":
        body.set_attn_implementation("by_row")
    positions = torch.cat([torch.arange(length, device=ids.device) for length in row_len])
    with last_mlp_at(body, places, len(ids)):
        out = body(input_ids=ids[None], position_ids=positions[None], row_len=row_len, use_cache=False)
    return out.last_hidden_state[0].index_select(0, places).float()
