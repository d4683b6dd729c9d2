"""Windowed attention one step at a time: a causal window reads the last ``(window - 1) * dilation + 1`` tokens.

A *group* is the tokens of one remainder of the dilation; a token's *place* is its number in its group. The ring has a
multiple of ``dilation`` places, so that a group is a view of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farfield.ops.cache import Cache, attend_few, exactly, join_rows, read_ring, write_ring
from farfield.ops.state import AttentionState
from farfield.ops.tiles import compute_dtype

__all__ = ["WindowStream"]

PIECE = 128
"""Queries that attend at once to the tokens before them and to each other."""


@dataclass(frozen=True)
class WindowStream:
    """The operator on a cache; 1-D and causal.

    Attributes:
        window, stride, dilation: as in :func:`farfield.ops.window.window_attention`.
        rewind: tokens that can be taken back.

    Caches hold ``keys`` and ``values`` [B, Hkv, S, D] in the dtype of the tokens.
    """

    window: int
    stride: int
    dilation: int
    rewind: int = 0

    @property
    def ring(self) -> int:
        """S, places of recent tokens."""
        reach = (self.window - 1) * self.dilation + 1 + self.rewind
        return -(-reach // self.dilation) * self.dilation

    def empty(self, batch: int, key_heads: int, width: int, dtype: torch.dtype, device: torch.device) -> Cache:
        """A cache of nothing."""
        with torch.inference_mode(False):
            return {
                name: torch.zeros(batch, key_heads, self.ring, width, dtype=dtype, device=device)
                for name in ("keys", "values")
            }

    def fill(self, cache: Cache, key: Tensor, value: Tensor) -> None:
        """Takes a whole prefix [B, Hkv, N, D] into an empty cache, without attending."""
        write_ring(cache["keys"], key, 0)
        write_ring(cache["values"], value, 0)

    def step(
        self,
        cache: Cache,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        length: int,
        *,
        scale: float,
        need_lse: bool = True,
    ) -> AttentionState | Tensor:
        """Takes tokens in and attends from each.

        Args:
            cache: changed.
            query: [B, Hq, T, D].
            key, value: [B, Hkv, T, D].
            length: tokens before them.
            scale: factor of the scores.
            need_lse: whether the log-sum-exp is wanted.

        Returns:
            out [B, Hq, T, D], and lse [B, Hq, T] where it is wanted: the last T rows of the operator on
            ``length + T`` tokens.
            (With a stride, windows of queries whose neighbours are not there yet lie further back; that is why the
            length counts.)

        Time O(T window), O(T window dilation) for several tokens at once.
        """
        with exactly(key.device):
            if query.shape[2] == 1:
                return self._one(cache, query, key, value, length, scale, need_lse)
            end = length + query.shape[2]
            states: list[AttentionState | Tensor] = []
            for done in range(0, query.shape[2], PIECE):
                piece = slice(done, min(done + PIECE, query.shape[2]))
                tokens = query[:, :, piece], key[:, :, piece], value[:, :, piece]
                states.append(self._several(cache, *tokens, length + done, end, scale, need_lse))
        return join_rows(states)

    def _one(
        self,
        cache: Cache,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        length: int,
        scale: float,
        need_lse: bool,
    ) -> AttentionState | Tensor:
        """The newest token is the last of its stride, so that its window ends with it."""
        slot = length % self.ring
        cache["keys"][:, :, slot] = key[:, :, 0]
        cache["values"][:, :, slot] = value[:, :, 0]
        keys, values = (
            cache[name].unflatten(2, (-1, self.dilation))[:, :, :, length % self.dilation]
            for name in ("keys", "values")
        )
        place, size = length // self.dilation, self.ring // self.dilation
        seen = min(self.window, place + 1)
        bias = None
        if place < size:
            first = place + 1 - seen
            keys, values = keys[:, :, first : place + 1], values[:, :, first : place + 1]
        elif size > self.window:
            age = (place - torch.arange(size, device=key.device)) % size
            bias = torch.zeros(1, size, dtype=compute_dtype(key.dtype), device=key.device).masked_fill_(
                age >= seen, -torch.inf
            )
        dtype = compute_dtype(key.dtype)
        return attend_few(query, keys, values, scale=scale, bias=bias, dtype=dtype, need_lse=need_lse)

    def _several(
        self,
        cache: Cache,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        length: int,
        end: int,
        scale: float,
        need_lse: bool,
    ) -> AttentionState | Tensor:
        """Attends to the tokens before and among each other, in a sequence of ``end`` tokens; then writes."""
        tokens, start = query.shape[2], max(0, length - (self.window - 1) * self.dilation)
        keys = torch.cat((read_ring(cache["keys"], start, length), key.to(cache["keys"].dtype)), 2)
        values = torch.cat((read_ring(cache["values"], start, length), value.to(cache["values"].dtype)), 2)
        own = torch.arange(length, length + tokens, device=key.device)[:, None]
        other = torch.arange(start, length + tokens, device=key.device)[None]
        group, place = own % self.dilation, own // self.dilation
        last = (end - 1 - group) // self.dilation
        leader = torch.minimum(place // self.stride * self.stride + self.stride - 1, last)
        there = other // self.dilation
        seen = (other % self.dilation == group) & (there <= place) & (there > leader - self.window)
        write_ring(cache["keys"], key, length)
        write_ring(cache["values"], value, length)
        dtype = compute_dtype(key.dtype)
        bias = torch.zeros(seen.shape, dtype=dtype, device=key.device).masked_fill_(~seen, -torch.inf)
        return attend_few(query, keys, values, scale=scale, bias=bias, dtype=dtype, need_lse=need_lse)
