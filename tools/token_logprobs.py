"""ln pi(token) and the entropy from hidden states, by a log-softmax over the vocabulary that is never held whole. Imports
nothing of drpo.py."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

LOGITS_AT_ONCE = 2**24  # how many logits exist at a time: 64 MB of float32


@lru_cache(maxsize=1)
def buffers(rows, V, device):
    """Room for logits and their softmax, (2, rows, V) float32, kept from call to call: a CPU pages new memory in each time."""
    return torch.empty(2, rows, V, device=device)


class TokenLogprobs(torch.autograd.Function):
    """States (N, d), the head's weight (V, d) and bias (V,) or None, tokens (N,) -> ln pi(token | state) and the entropy of
    pi(. | state), (N,) float32 each; no gradient flows through the entropy.

    Logits exist for a few rows at a time, in a buffer: no (N, V) is held, neither now nor for backward. What the gradient
    needs is one vector a token, d ln pi_a / d state = (W_a - sum_v pi_v W_v) / temperature. It is taken while pi is at hand,
    and only where there will be a gradient, as it costs what the logits cost. With it, pi may overwrite its logits, and their
    mean over pi, for the entropy ln Z - sum_v pi_v logit_v, comes from it too."""

    @staticmethod
    def forward(ctx, states, weight, bias, tokens, temperature):
        device, (N, V) = states.device, (len(states), len(weight))
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
        h, W, room = (states / temperature).to(dtype), weight.to(dtype), max(1, LOGITS_AT_ONCE // V)
        size = math.ceil(N / math.ceil(N / room)) if N else 1  # parts of equal size: a product of few rows is slow
        slope = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        buffer, other = buffers(room, V, device)
        products = buffer if dtype == torch.float32 else torch.empty_like(buffer, dtype=dtype)
        pi_buffer = other if slope is None else buffer
        logprobs, entropy = torch.zeros(2, N, device=device)
        for rows in [slice(i, i + size) for i in range(0, N, size)]:
            n = len(h[rows])
            logits = buffer[:n].copy_(torch.mm(h[rows], W.T, out=products[:n]))
            if bias is not None:
                logits.add_(bias / temperature)
            of_token, top = logits.gather(1, tokens[rows, None])[:, 0], logits.amax(1)
            pi = torch.softmax(logits, 1, out=pi_buffer[:n])
            log_z = top - pi.amax(1).log()  # the largest pi is exp(top) / Z
            if slope is None:
                mean_logit = logits.mul_(pi).sum(1)
            else:
                slope[rows] = (W[tokens[rows]] - pi.to(dtype) @ W) / temperature
                mean_logit = of_token - (states[rows] * slope[rows]).sum(1)
                if bias is not None:
                    mean_logit -= (bias[tokens[rows]] - pi @ bias.float()) / temperature
            logprobs[rows], entropy[rows] = of_token - log_z, log_z - mean_logit
        ctx.save_for_backward(slope, states, weight, bias, tokens)
        ctx.size, ctx.dtype, ctx.temperature = size, dtype, temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        slope, states, weight, bias, tokens = ctx.saved_tensors
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:  # a head that is trained: pi once more
            h, grad_weight, grad_bias = states.to(ctx.dtype), torch.zeros_like(weight), torch.zeros_like(weight[:, 0])
            for rows in [slice(i, i + ctx.size) for i in range(0, len(states), ctx.size)]:
                logits = F.linear(h[rows], weight.to(ctx.dtype)).float() + (0.0 if bias is None else bias)
                scaled = grad[rows, None] / ctx.temperature
                grad_logits = -scaled * (logits / ctx.temperature).softmax(1)
                grad_logits.scatter_add_(1, tokens[rows, None], scaled)
                grad_weight += grad_logits.to(ctx.dtype).T @ h[rows]
                grad_bias += grad_logits.sum(0)
        return None if slope is None else grad[:, None] * slope, grad_weight, None if bias is None else grad_bias, None, None


def token_logprobs(head, states, tokens, temperature=1.0):
    """ln pi(token | state) and the entropy, (N,) float32 each, from a linear head, states (N, d) and tokens (N,)."""
    return TokenLogprobs.apply(states, head.weight, head.bias, tokens, temperature)
