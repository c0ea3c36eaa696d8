"""Keys and values while responses are sampled, in memory that is taken once. Imports nothing of drpo.py."""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """A layer of transformers' growing cache with room for `room` tokens after the first ones: what it holds is not copied anew
    for every token."""

    def __init__(self, room):
        super().__init__()
        self.room, self.filled = room, 0

    def update(self, key_states, value_states, *args, **kwargs):
        given = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(*given)
            rows, heads, n, _ = key_states.shape
            self.buffers = [x.new_empty(rows, heads, n + self.room, x.shape[3]) for x in given]
        new = slice(self.filled, self.filled + key_states.shape[2])
        for buffer, x in zip(self.buffers, given):
            buffer[:, :, new] = x
        self.filled = new.stop
        self.keys, self.values = [buffer[:, :, : self.filled] for buffer in self.buffers]
        return self.keys, self.values

    def batch_select_indices(self, indices):
        """Row i is then what row indices[i] was; only rows that move are copied."""
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        for buffer in self.buffers:
            buffer[moved, :, : self.filled] = buffer[indices[moved], :, : self.filled]
        self.buffers = [buffer[: len(indices)] for buffer in self.buffers]
        self.keys, self.values = [buffer[:, :, : self.filled] for buffer in self.buffers]


def roomy_cache(config, room):
    """A DynamicCache for this model with room for that many tokens after the first pass; other layers than those of plain
    attention stay as transformers makes them."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def gaps_filled(left):
    """Places in ascending order -> the same, but the last of them in the gaps, so that most stay: 0 3 4 5 -> 0 5 4 3."""
    left = list(left)
    last = [i for i in left if i >= len(left)]
    return [i if i in left else last.pop() for i in range(len(left))]
