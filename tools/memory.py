"""Activation checkpointing: memory for time (--checkpoint_activations)."""

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tools.running import stop


def checkpoint_layers(modules):
    """From here on every transformer layer in `modules` keeps no more than its input for the backward pass, and is computed
    once more when that comes to it. Passes without gradients, rollouts and scoring, stay as they are.

    transformers' own switch asks for train mode, which drops out and gives up the cache: here networks stay in eval mode."""
    layers = [layer for layer in modules.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        stop("--checkpoint_activations: this model has no layers that transformers knows how to checkpoint")
    for layer in layers:
        layer.forward = computed_twice(layer.forward)
        layer.gradient_checkpointing = True  # says so; in eval mode transformers does no more with it


def computed_twice(forward):
    def wrapped(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)  # nothing in it is random

    return wrapped
