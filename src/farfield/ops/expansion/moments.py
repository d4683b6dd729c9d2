"""Moments: the sums over far tokens that an expansion needs, for every head and centre."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Moments", "evenly_read", "gathered", "moments_of", "moments_of_listed", "nearest", "nothing", "through",
]  # fmt: skip


class Moments(NamedTuple):
    """Means of some tokens under weights exp(scale c.k), for every head and centre.

    Attributes:
        lse: [.., C] log of the sum of weights; -inf where there is no token.
        key: [.., C, D] mean key.
        rows: [.., C, D + 1, D] mean of k v' (row by row of k), and in the last row the mean value.
    """

    lse: Tensor
    key: Tensor
    rows: Tensor

    def map(self, function: object) -> Moments:
        """``function`` of each of the three."""
        return Moments(*(function(x) for x in self))  # type: ignore[operator]


def evenly_read(read: list[int]) -> list[int]:
    """Key heads for heads that read these, so that consecutive heads share them evenly.

    Each once where all are read by equally many consecutive heads; otherwise one for every head.
    """
    once = list(dict.fromkeys(read))
    times = len(read) // len(once)
    return once if read == [head for head in once for _ in range(times)] else read


def nearest(query: Tensor, centres: Tensor) -> Tensor:
    """[..., H, N] numbers of the nearest of the centres [H, C, D] to queries [..., H, N, D]; of equals the first."""
    score = query @ centres.mT - 0.5 * centres.square().sum(-1)[:, None]
    return score.argmax(-1)


def moments_of(key: Tensor, value: Tensor, centres: Tensor, shown: Tensor, scale: float) -> Moments:
    """Moments [B, H, ..., C] of groups of M tokens.

    Args:
        key, value: [B, Hkv, ..., M, D], Hkv divides H.
        centres: [H, C, D].
        shown: [B or 1, 1, ..., M] bool, which tokens count.
        scale: factor of the scores.
    """
    repeat = centres.shape[0] // key.shape[1]
    between = [1] * (key.dim() - 4)
    wide = centres.dtype
    # Heads that share keys stand side by side, so that every key is multiplied once.
    of_key = (centres * scale).view(key.shape[1], *between, repeat * centres.shape[1], -1)
    key, value = key.to(wide), value.to(wide)
    lse, weight = _weights((of_key @ key.mT).masked_fill(~shown[..., None, :], -torch.inf))  # [B, Hkv, ..., R C, M]
    products = torch.cat([weight[..., None, :] * key.mT[..., None, :, :], weight[..., None, :]], -2)
    rows = (products.flatten(-3, -2) @ value).unflatten(-2, products.shape[-3:-1])
    made = Moments(lse, weight @ key, rows)
    return made.map(lambda x: _to_heads(x, len(between), repeat))


def _weights(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the masses of scores [.., M], and weights that sum to 1, or are 0 where there is nothing."""
    peak = scores.detach().amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    weight = (scores - peak).exp()
    return _normalised(weight, weight.sum(-1, keepdim=True), peak)


def moments_of_listed(key: Tensor, value: Tensor, centres: Tensor, listed: Tensor, scale: float) -> Moments:
    """Moments [B, H, U, C] of tokens that every centre has for itself.

    Args:
        key, value: [B, Hkv, N, D], Hkv divides H.
        centres: [H, C, D].
        listed: [B, H, U, C, M] tokens, negative for none.
        scale: factor of the scores.
    """
    hidden = listed < 0
    key, value = (
        gathered(x, listed).to(centres.dtype).masked_fill(hidden[..., None], 0.0) for x in (key, value)
    )  # [B, H, U, C, M, D]
    scores = (key @ (centres * scale)[:, None, :, :, None]).squeeze(-1)
    lse, weight = _weights(scores.masked_fill(hidden, -torch.inf))
    products = torch.cat([weight[..., None, :] * key.mT, weight[..., None, :]], -2)
    return Moments(lse, (weight[..., None, :] @ key).squeeze(-2), products @ value)


def gathered(x: Tensor, tokens: Tensor) -> Tensor:
    """Rows [B, H, ..., D] of x [B, Hkv, N, D] at tokens [B, H, ...]; negative ones get any."""
    batch, heads = tokens.shape[:2]
    shape = (batch, heads, *[1] * (tokens.dim() - 2))
    row = torch.arange(batch, device=x.device).view(-1, 1, *shape[2:])
    head = torch.arange(heads, device=x.device).view(1, -1, *shape[2:]) // (heads // x.shape[1])
    return x[row, head, tokens.clamp(min=0)]


def _to_heads(x: Tensor, between: int, repeat: int) -> Tensor:
    """[B, Hkv, ..., R C, *] -> [B, H, ..., C, *]."""
    x = x.unflatten(2 + between, (repeat, -1)).movedim(2 + between, 2)
    return x.flatten(1, 2)


def added(carry: Moments, part: Moments) -> Moments:
    """Moments [B, H, C] of the tokens of both."""
    peak = torch.maximum(carry.lse, part.lse).detach()
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    both = torch.stack([(x.lse - peak).exp() for x in (carry, part)], -1)
    lse, weight = _normalised(both, both.sum(-1, keepdim=True), peak[..., None])
    old, new = weight[..., 0, None], weight[..., 1, None]
    return Moments(lse, old * carry.key + new * part.key, old[..., None] * carry.rows + new[..., None] * part.rows)


def through(carry: Moments, parts: Moments) -> list[Moments]:
    """The carry and the parts [B, H, U, C] up to each of U, one after the other: none hangs on a later one."""
    found = []
    for part in zip(*(x.unbind(2) for x in parts), strict=True):
        carry = added(carry, Moments(*part))
        found.append(carry)
    return found


def _normalised(weight: Tensor, total: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of totals [.., n], -inf where they are 0, and weights [.., n, m] that sum to 1, or are 0 there."""
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    return (safe.log() + peak).masked_fill(empty, -torch.inf).squeeze(-1), weight / safe


def nothing(like: Tensor, centres: Tensor) -> Moments:
    """Moments of no token for [B, H] heads with centres [H, C, D]."""
    number, dim = centres.shape[1:]
    return Moments(
        like.new_full((*like.shape, number), -torch.inf),
        like.new_zeros(*like.shape, number, dim),
        like.new_zeros(*like.shape, number, dim + 1, dim),
    )
