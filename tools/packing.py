"""Rows of different lengths in one forward pass without padding: the body reads them as one long row, one after another, and
attention is computed of each apart. Imports nothing of drpo.py."""

import contextlib

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans anew for every length of a row, and here each is another


def attention_by_row(module, query, key, value, attention_mask, row_lengths=None, **kwargs):
    """transformers' "sdpa"; in a pass that is given row_lengths, a list, of each row apart. There query is (1, heads, N, d),
    key and value (1, heads or fewer, N, d) -> (1, N, heads, d), and None for the weights. ValueError for what it cannot do."""
    if kwargs.get("s_aux") is not None or (row_lengths and attention_mask is not None):
        raise ValueError("its attention has sinks or a mask of its own")
    if not row_lengths:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = zip(*(x.split(row_lengths, 2) for x in (query, key, value)))
    return torch.cat([sdpa_attention_forward(module, *row, None, **kwargs)[0] for row in rows], 1), None


def mask_of_padding(attention_mask=None, **kwargs):
    """transformers' mask for "sdpa", but none where nothing is padded: attention is causal by itself."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **kwargs)


AttentionInterface.register("by_row", attention_by_row)
AttentionMaskInterface.register("by_row", mask_of_padding)


@contextlib.contextmanager
def last_mlp_at(body, places, N):
    """Inside, the last layer's MLP sees only the tokens at `places` (n,) of the N, and gives 0 for the others. Their states are
    then wrong, and nothing reads them. Not with activation checkpointing, whose second pass comes when this is over."""
    layers = [module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)]
    mlp = getattr(layers[-1], "mlp", None) if layers else None
    if mlp is None or (layers[-1].gradient_checkpointing and torch.is_grad_enabled()):
        yield
        return

    def put_back(mlp, given, out):
        states = out.new_zeros(1, N, out.shape[2])
        states[:, places] = out
        return states

    before = mlp.register_forward_pre_hook(lambda mlp, given: given[0].index_select(1, places))
    after = mlp.register_forward_hook(put_back)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def row_states(body, ids, lengths, places):
    """-> (n, d) float32: the body's last hidden states at `places` (n,) of ids (N,) long, in which rows of `lengths` tokens, a
    list, stand one after another. A row's states are those that it has alone. For gradients no place may be named twice."""
    if body.config._attn_implementation != "by_row":
        body.set_attn_implementation("by_row")
    positions = torch.cat([torch.arange(length, device=ids.device) for length in lengths])
    with last_mlp_at(body, places, len(ids)):
        out = body(input_ids=ids[None], position_ids=positions[None], row_lengths=lengths, use_cache=False)
    return out.last_hidden_state[0].index_select(0, places).float()
