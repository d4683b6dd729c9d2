"""Everything far in one cell, expanded about a centre: the sums of a softmax to first order in the query.

Around a centre c the far tokens j weigh exp(c.k_j), and for a query q = c + x

    exp(q.k_j) = exp(c.k_j) exp(x.k_j),  x.k_j = x.K + x.(k_j - K),  K the mean key under the weights exp(c.k_j).

The first part is common to all of them; of the second the exponential is taken to its first order, 1 + x.(k_j - K). So
all of them together have the mass exp(x.K) sum_j exp(c.k_j), and their mean value is V + x.Cov(k, v), with the mean and
the covariance under the same weights: sums over tokens that do not hang on the query. This is the local expansion of
fast multipole methods (Greengard & Rokhlin 1987), with the roles of points taken by queries and keys; to order zero
and about 0 it is the mean key and the mean value of everything far. Every head has a few centres, means of clusters of
its queries, and a query takes the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from farfield.ops.cache import Cache, exactly
from farfield.ops.compiled import choice as compiled
from farfield.ops.compiled.expansion import expand
from farfield.ops.state import AttentionState
from farfield.ops.tiles import compute_dtype

__all__ = ["ExpansionStream", "Moments", "expansion_state", "moments_of", "nearest"]

RUN = 16
"""Blocks whose sums are held at once."""

WIDTH = 32
"""The compiled engine takes multiples of it."""


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
    scores = (of_key @ key.mT).masked_fill(~shown[..., None, :], -torch.inf)  # [B, Hkv, ..., R C, M]
    peak = scores.detach().amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    weight = (scores - peak).exp()
    total = weight.sum(-1, keepdim=True)
    lse, weight = _normalised(weight, total, peak)
    products = torch.cat([weight[..., None, :] * key.mT[..., None, :, :], weight[..., None, :]], -2)
    rows = (products.flatten(-3, -2) @ value).unflatten(-2, products.shape[-3:-1])
    made = Moments(lse, weight @ key, rows)
    return made.map(lambda x: _to_heads(x, len(between), repeat))


def _to_heads(x: Tensor, between: int, repeat: int) -> Tensor:
    """[B, Hkv, ..., R C, *] -> [B, H, ..., C, *]."""
    x = x.unflatten(2 + between, (repeat, -1)).movedim(2 + between, 2)
    return x.flatten(1, 2)


def _added(carry: Moments, part: Moments) -> Moments:
    """Moments [B, H, C] of the tokens of both."""
    peak = torch.maximum(carry.lse, part.lse).detach()
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    both = torch.stack([(x.lse - peak).exp() for x in (carry, part)], -1)
    lse, weight = _normalised(both, both.sum(-1, keepdim=True), peak[..., None])
    old, new = weight[..., 0, None], weight[..., 1, None]
    return Moments(lse, old * carry.key + new * part.key, old[..., None] * carry.rows + new[..., None] * part.rows)


def _through(carry: Moments, parts: Moments) -> list[Moments]:
    """The carry and the parts [B, H, U, C] up to each of U, one after the other: none hangs on a later one."""
    found = []
    for part in zip(*(x.unbind(2) for x in parts), strict=True):
        carry = _added(carry, Moments(*part))
        found.append(carry)
    return found


def _normalised(weight: Tensor, total: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of totals [.., n], -inf where they are 0, and weights [.., n, m] that sum to 1, or are 0 there."""
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    return (safe.log() + peak).masked_fill(empty, -torch.inf).squeeze(-1), weight / safe


def _attend(query: Tensor, far: Moments, centres: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, H, U, M, D] and score [B, H, U, M] of queries [B, H, U, M, D] from moments [B, H, U, C]."""
    number = centres.shape[1]
    with torch.no_grad():
        own = F.one_hot(nearest(query.flatten(2, 3), centres).unflatten(2, query.shape[2:4]), number).to(query.dtype)
    x = (query - (own.flatten(2, 3) @ centres).unflatten(2, query.shape[2:4])) * scale
    common = (x * (own @ far.key)).sum(-1, keepdim=True)
    # Rows of the query's own centre alone: x times k v', and 1 - x.K times the mean value.
    rows = own[..., None] * torch.cat([x, 1 - common], -1)[..., None, :]
    out = rows.flatten(-2) @ far.rows.flatten(-3, -2)
    lse = far.lse.masked_fill(far.lse == -torch.inf, -1e30)
    score = (own @ lse[..., None] + common).squeeze(-1) + bias[:, None, None]
    return out, score.masked_fill(score < -1e29, -torch.inf)


def expansion_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centres: Tensor,
    bias: Tensor,
    *,
    block: int,
    key_mask: Tensor | None,
    scale: float,
    sinks: int,
) -> AttentionState:
    """Attention of every query to one cell that holds all tokens beyond its near field of leaf blocks. Causal, 1-D.

    Args:
        query: [B, H, N, D].
        key, value: [B, Hkv, N, D], Hkv divides H.
        centres: [H, C, D], what queries are expanded about (before the scale).
        bias: [H] added to the score.
        block, key_mask, scale, sinks: as in :func:`farfield.multipole_attention`.

    Returns:
        The state: the value to first order, in float32 or wider, and the score as lse; 0 and -inf where nothing is far.
        O(N C D²) time; gradients, of queries, keys and values alone, compute it again instead of keeping it. No query
        depends on a later token. A value to first order is no mean: for a query far from all centres it can lie outside
        the range of the values.
    """
    centres = centres.to(compute_dtype(query.dtype))
    if query.numel() == 0:
        return AttentionState(query.to(centres.dtype), query.new_zeros(query.shape[:3], dtype=centres.dtype))
    shown = torch.arange(query.shape[2], device=query.device)[None] >= sinks
    if key_mask is not None:
        shown = shown & key_mask
    return AttentionState(*_Expansion.apply(query, key, value, centres, bias.to(centres.dtype), block, shown, scale))


class _Expansion(torch.autograd.Function):
    """Keeps queries, keys and values alone: gradients go through the sums once more."""

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        centres: Tensor,
        bias: Tensor,
        block: int,
        shown: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        with exactly(query.device):
            if query.device.type == "cpu" and _fits(query, centres) and compiled.why_not() is None:
                q, k, v = (x.float() for x in (query, key, value))
                own = nearest(q, centres)
                out, lse = expand(q, k, v, centres, bias, own, shown.expand(len(q), -1), block, scale)
                return out, lse
            return _state(query, key, value, centres, bias, block, shown, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, block, shown, scale = inputs
        ctx.save_for_backward(*tensors, shown)
        ctx.block, ctx.scale = block, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, centres, bias, shown = ctx.saved_tensors
        with torch.enable_grad(), exactly(centres.device):
            given = [x.detach().requires_grad_() for x in inputs]
            query, key, value = given
            out, lse = _state(query, key, value, centres, bias, ctx.block, shown, ctx.scale)
            grads = torch.autograd.grad((out, lse), given, upstream, allow_unused=True)
        return *grads, None, None, None, None, None


def _fits(query: Tensor, centres: Tensor) -> bool:
    """Whether the compiled engine takes them: float32 arithmetic, whole vectors."""
    return centres.dtype == torch.float32 and query.shape[-1] % WIDTH == 0


def _state(
    query: Tensor, key: Tensor, value: Tensor, centres: Tensor, bias: Tensor, block: int, shown: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The same in torch, a run of blocks at a time; ``shown`` [B or 1, N] bool."""
    length, wide = query.shape[2], centres.dtype
    units = -(-length // block)
    # What a block sees as far ends two blocks before it: two empty blocks in front put it in the block's own place.
    late = max(0, units - 2) * block
    ahead = min(2, units) * block

    def shifted(x: Tensor) -> Tensor:
        return F.pad(x[:, :, :late], (0, 0, ahead, units * block - ahead - late)).unflatten(2, (units, block))

    shown = shifted(shown[:, None, :, None].expand(-1, 1, -1, -1).to(wide)).squeeze(-1) > 0
    # A masked token may hold anything.
    keys, values = (shifted(x).masked_fill(~shown[..., None], 0.0) for x in (key, value))
    laid = F.pad(query.to(wide), (0, 0, 0, units * block - length)).unflatten(2, (units, block))
    repeat, outs, scores = query.shape[1] // key.shape[1], [], []
    for of_key in range(key.shape[1]):  # heads of one key head at a time: their sums stay in the cache
        heads = slice(of_key * repeat, (of_key + 1) * repeat)
        own = centres[heads]
        carry = _nothing(laid.new_zeros(query.shape[0], repeat), own)
        out, score = [], []
        for start, stop in pairwise([*range(0, units, RUN), units]):
            run = slice(start, stop)
            parts = moments_of(
                keys[:, of_key : of_key + 1, run], values[:, of_key : of_key + 1, run], own, shown[:, :, run], scale
            )
            found = _through(carry, parts)
            carry, far = found[-1], Moments(*(torch.stack(x, 2) for x in zip(*found, strict=True)))
            of_run = _attend(laid[:, heads, run], far, own, bias[heads].to(wide), scale)
            out.append(of_run[0])
            score.append(of_run[1])
        outs.append(torch.cat(out, 2))
        scores.append(torch.cat(score, 2))
    return (
        torch.cat(outs, 1).flatten(2, 3)[:, :, :length],
        torch.cat(scores, 1).flatten(2, 3)[:, :, :length],
    )


def _nothing(like: Tensor, centres: Tensor) -> Moments:
    """Moments of no token for [B, H] heads with centres [H, C, D]."""
    number, dim = centres.shape[1:]
    return Moments(
        like.new_full((*like.shape, number), -torch.inf),
        like.new_zeros(*like.shape, number, dim),
        like.new_zeros(*like.shape, number, dim + 1, dim),
    )


@dataclass(frozen=True)
class ExpansionStream:
    """The same one step at a time: moments up to the ends of the last few blocks. 1-D and causal.

    A cache holds ``lse`` [B, H, R, C], ``key`` [B, H, R, C, D] and ``rows`` [B, H, R, C, D + 1, D]: place b % R has
    those of all tokens before block b, sinks left out. R counts the blocks that can be asked for after tokens were
    taken back.
    """

    block: int
    sinks: int
    rewind: int = 0

    @property
    def places(self) -> int:
        """R."""
        return 2 + -(-self.rewind // self.block)

    def empty(self, batch: int, centres: Tensor, dtype: torch.dtype, device: torch.device) -> Cache:
        """A cache of nothing."""
        with torch.inference_mode(False):
            like = torch.zeros(batch, len(centres), self.places, dtype=compute_dtype(dtype), device=device)
            number, dim = centres.shape[1:]
            return {
                "lse": like.new_full((*like.shape, number), -torch.inf),
                "key": like.new_zeros(*like.shape, number, dim),
                "rows": like.new_zeros(*like.shape, number, dim + 1, dim),
            }

    def fill(self, cache: Cache, key: Tensor, value: Tensor, centres: Tensor, scale: float) -> None:
        """A whole prefix [B, Hkv, N, D] into an empty cache."""
        last = key.shape[2] // self.block
        first = max(0, last + 1 - self.places)
        carry, done = _nothing(cache["lse"][:, :, 0, 0], centres), 0
        while done < first:
            number = min(RUN, first - done)
            carry = self._with(carry, key, value, centres, scale, done, number)
            done += number
        self._put(cache, first, carry)
        for number in range(first, last):
            carry = self._with(carry, key, value, centres, scale, number)
            self._put(cache, number + 1, carry)

    def close(self, cache: Cache, number: int, key: Tensor, value: Tensor, centres: Tensor, scale: float) -> None:
        """Adds block ``number``, [B, Hkv, block, D], once its last token is there."""
        made = self._with(self._at(cache, number), key, value, centres, scale, 0, before=number * self.block)
        self._put(cache, number + 1, made)

    def _at(self, cache: Cache, number: int) -> Moments:
        return Moments(*(cache[name][:, :, number % self.places].clone() for name in Moments._fields))

    def _put(self, cache: Cache, number: int, made: Moments) -> None:
        for name, x in made._asdict().items():
            cache[name][:, :, number % self.places] = x

    def _with(
        self, carry: Moments, key: Tensor, value: Tensor, centres: Tensor, scale: float, first: int, number: int = 1,
        before: int = 0,
    ) -> Moments:  # fmt: skip
        """The carry, and ``number`` blocks from ``first`` on of keys [B, Hkv, N, D] with ``before`` tokens in front."""
        tokens = slice(first * self.block, (first + number) * self.block)
        repeat, pieces = len(centres) // key.shape[1], []
        with exactly(key.device):
            index = torch.arange(tokens.start, tokens.stop, device=key.device) + before
            shown = (index >= self.sinks).view(1, 1, number, -1)
            key, value = (x[:, :, tokens].unflatten(2, (number, -1)) for x in (key, value))
            for of_key in range(key.shape[1]):
                one, heads = slice(of_key, of_key + 1), slice(of_key * repeat, (of_key + 1) * repeat)
                parts = moments_of(key[:, one], value[:, one], centres[heads].to(carry.lse.dtype), shown, scale)
                pieces.append(_through(carry.map(lambda x, heads=heads: x[:, heads]), parts)[-1])
        return Moments(*(torch.cat(x, 1) for x in zip(*pieces, strict=True)))

    def attend(
        self, cache: Cache, query: Tensor, centres: Tensor, bias: Tensor, number: int, scale: float
    ) -> AttentionState:
        """Of queries [B, H, T, D] that all lie in block ``number``."""
        wide = cache["lse"].dtype
        with exactly(query.device):
            if number < 1:
                lse = query.new_full(query.shape[:-1], -torch.inf, dtype=wide)
                return AttentionState(query.new_zeros(query.shape, dtype=wide), lse)
            far = Moments(*(cache[name][:, :, (number - 1) % self.places, None] for name in Moments._fields))
            out, score = _attend(query[:, :, None].to(wide), far, centres.to(wide), bias.to(wide), scale)
            return AttentionState(out[:, :, 0], score[:, :, 0])
