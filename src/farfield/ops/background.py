"""One cell for everything far: the mean key and the mean value of all tokens beyond the near field, with a bias.

What opened cells leave out is small token by token and biased as a whole: the values of tokens that win differ from
those of the many that lose. A single cell over all of them corrects the most of that for one more score per query.
It does not know what was opened, so a token that is opened is in the mean as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farfield.ops.cache import Cache, exactly
from farfield.ops.multipole.plan import make_plan
from farfield.ops.state import AttentionState
from farfield.ops.tiles import compute_dtype

__all__ = ["BackgroundStream", "background_state"]


def background_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    *,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    causal: bool,
    key_mask: Tensor | None,
    scale: float,
    sinks: int,
) -> AttentionState:
    """Attention of every query to one cell that holds all tokens beyond its near field of leaf blocks.

    Args:
        query: [B, Hq, N, D].
        key, value: [B, Hkv, N, D], Hkv divides Hq.
        bias: [Hq] added to the score, which is scale q . mean(k) + log(count); -inf for a head without.
        grid, block, causal, key_mask, scale, sinks: as in :func:`farfield.multipole_attention`.

    Returns:
        The state: the mean value, and the score as lse; 0 and -inf where nothing is far. Float32 or wider inside.
        O(N D) time. Causal-safe: the sums stop at the end of a block that is over.
    """
    wide = compute_dtype(query.dtype)
    plan = make_plan(grid, None, block, (1,) * len(block), None, causal, sinks, query.device)
    size = plan.layout.block_tokens
    with exactly(query.device):
        readable = plan.readable(key_mask)[1][:, None, :, None]  # [B', 1, slots, 1]
        sums = [
            plan.to_blocks(x).to(wide).masked_fill(~readable, 0.0).unflatten(2, (-1, size)).sum(3) for x in (key, value)
        ]
        sums.append(readable.to(wide).unflatten(2, (-1, size)).sum(3))
        if causal:
            # Never a difference of sums: a later token of the query's own block would leave its rounding behind.
            key_sum, value_sum, count = (_before(x) for x in sums)
        else:
            near = plan.near.used[..., None].to(wide)
            key_sum, value_sum, count = (x.sum(2, keepdim=True) - (x[:, :, plan.near.rows] * near).sum(3) for x in sums)
        laid = plan.to_blocks(query).to(wide).unflatten(2, (-1, size))
        out, lse = _cell(laid, key_sum, value_sum, count, bias.to(wide), scale)
        out = out.to(query.dtype).expand(*laid.shape).flatten(2, 3)
        return AttentionState(plan.to_tokens(out), plan.to_tokens(lse.flatten(2, 3)))


def _before(x: Tensor) -> Tensor:
    """Sums over all blocks up to the last but one before each."""
    return torch.cat([torch.zeros_like(x[:, :, :2]), x.cumsum(2)[:, :, :-2]], 2)[:, :, : x.shape[2]]


def _cell(
    query: Tensor, key_sum: Tensor, value_sum: Tensor, count: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """[B, Hq, U, 1, D] and [B, Hq, U, M] of queries [B, Hq, U, M, D] and sums [B, Hkv, U, D], [B', 1, U, 1]."""
    some = count.clamp(min=1.0)
    repeat = query.shape[1] // key_sum.shape[1]
    key, value = ((x / some).repeat_interleave(repeat, 1) for x in (key_sum, value_sum))
    score = (query @ key[..., None]).squeeze(-1) * scale + some.log() + bias[:, None, None]
    empty = (count == 0).expand_as(score) | (bias == -torch.inf)[:, None, None]
    return value[:, :, :, None], score.masked_fill(empty, -torch.inf)


@dataclass(frozen=True)
class BackgroundStream:
    """The same one step at a time: sums up to the ends of the last few blocks. 1-D and causal.

    A cache holds ``sums`` [B, Hkv, R, 2 D]: place b % R has the sum of keys, then of values, over all tokens before
    block b, sinks left out. R counts the blocks that can be asked for after tokens were taken back.
    """

    block: int
    sinks: int
    rewind: int = 0

    @property
    def places(self) -> int:
        """R."""
        return 3 + -(-self.rewind // self.block)

    def empty(self, batch: int, key_heads: int, width: int, dtype: torch.dtype, device: torch.device) -> Cache:
        """A cache of nothing."""
        with torch.inference_mode(False):
            shape = (batch, key_heads, self.places, 2 * width)
            return {"sums": torch.zeros(shape, dtype=compute_dtype(dtype), device=device)}

    def fill(self, cache: Cache, key: Tensor, value: Tensor) -> None:
        """A whole prefix [B, Hkv, N, D] into an empty cache."""
        length, sums = key.shape[2], cache["sums"]
        total = torch.zeros_like(sums[:, :, 0])
        last = length // self.block
        first = max(0, last + 1 - self.places)
        start = self.sinks
        for number in range(first, last + 1):
            stop = number * self.block
            if stop > start:
                total = total + self._sum(sums, key[:, :, start:stop], value[:, :, start:stop])
                start = stop
            sums[:, :, number % self.places] = total

    def close(self, cache: Cache, number: int, key: Tensor, value: Tensor) -> None:
        """Adds block ``number``, [B, Hkv, block, D], once its last token is there."""
        sums, first = cache["sums"], max(0, self.sinks - number * self.block)
        total = self._sum(sums, key[:, :, first:], value[:, :, first:]) if first < self.block else 0.0
        sums[:, :, (number + 1) % self.places] = sums[:, :, number % self.places] + total

    def _sum(self, like: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.cat([key.to(like).sum(2), value.to(like).sum(2)], -1)

    def attend(self, cache: Cache, query: Tensor, bias: Tensor, number: int, scale: float) -> AttentionState:
        """Of queries [B, Hq, T, D] that all lie in block ``number``."""
        wide = cache["sums"].dtype
        tokens = max(0, (number - 1) * self.block - self.sinks)
        with exactly(query.device):
            sums = cache["sums"][:, :, (number - 1) % self.places, None]
            key, value = sums.chunk(2, -1)
            count = sums.new_full((1, 1, 1, 1), tokens)
            out, lse = _cell(query[:, :, None].to(wide), key, value, count, bias.to(wide), scale)
            return AttentionState(out[:, :, 0].expand(*query.shape).to(query.dtype), lse[:, :, 0])
