"""Everything far in one cell, expanded about a centre: the sums of a softmax to first order in the query.

Around a centre c the far tokens j weigh exp(c.k_j), and for a query q = c + x

    exp(q.k_j) = exp(c.k_j) exp(x.k_j),  x.k_j = x.K + x.(k_j - K),  K the mean key under the weights exp(c.k_j).

The first part is common to all of them; of the second the exponential is taken to its first order, 1 + x.(k_j - K). So
all of them together have the mass exp(x.K) sum_j exp(c.k_j), and their mean value is V + x.Cov(k, v), with the mean and
the covariance under the same weights: sums over tokens that do not hang on the query. This is the local expansion of
fast multipole methods (Greengard & Rokhlin 1987), with the roles of points taken by queries and keys; to order zero
and about 0 it is the mean key and the mean value of everything far. Every head has a few centres, means of clusters of
its queries, and a query takes the nearest.

The first order fits tokens of little weight, and there are many of them. So a centre can keep some tokens out of its
cell, those with the largest scores at the centre; its queries read them exactly, and every token is still seen once.
Which they are hangs on the centre and the tokens alone: the centre chooses for all queries that are near it, at any
place. This is the clustered attention of Vyas, Katharopoulos & Fleuret (arXiv 2007.04825, "improved") with centres that
are known beforehand, so that it is causal and has a stream, and with sums to first order in place of those of order 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from farfield.geometry import EMPTY
from farfield.ops.cache import Cache, exactly
from farfield.ops.compiled import choice as compiled
from farfield.ops.compiled.expansion import StepPart, advance, expand, expand_backward
from farfield.ops.compiled.expansion import step as compiled_step
from farfield.ops.heads import index_of, merge_heads, take
from farfield.ops.listed import attend_lists
from farfield.ops.opened.choose import top
from farfield.ops.state import AttentionState, merge_states, state_from_scores
from farfield.ops.tiles import Store, compute_dtype

__all__ = [
    "Asked", "ExpansionStream", "Moments", "evenly_read", "expansion_state", "moments_of", "nearest", "sift",
    "with_expansions",
]  # fmt: skip

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


def _moments_of_listed(key: Tensor, value: Tensor, centres: Tensor, listed: Tensor, scale: float) -> Moments:
    """Moments [B, H, U, C] of tokens that every centre has for itself.

    Args:
        key, value: [B, Hkv, N, D], Hkv divides H.
        centres: [H, C, D].
        listed: [B, H, U, C, M] tokens, negative for none.
        scale: factor of the scores.
    """
    hidden = listed < 0
    key, value = (
        _gathered(x, listed).to(centres.dtype).masked_fill(hidden[..., None], 0.0) for x in (key, value)
    )  # [B, H, U, C, M, D]
    scores = (key @ (centres * scale)[:, None, :, :, None]).squeeze(-1)
    lse, weight = _weights(scores.masked_fill(hidden, -torch.inf))
    products = torch.cat([weight[..., None, :] * key.mT, weight[..., None, :]], -2)
    return Moments(lse, (weight[..., None, :] @ key).squeeze(-2), products @ value)


def _gathered(x: Tensor, tokens: Tensor) -> Tensor:
    """Rows [B, H, ..., D] of x [B, Hkv, N, D] at tokens [B, H, ...]; negative ones get any."""
    batch, heads = tokens.shape[:2]
    shape = (batch, heads, *[1] * (tokens.dim() - 2))
    row = torch.arange(batch, device=x.device).view(-1, 1, *shape[2:])
    head = torch.arange(heads, device=x.device).view(1, -1, *shape[2:]) // (heads // x.shape[1])
    return x[row, head, tokens.clamp(min=0)]


@torch.no_grad()
def sift(
    key: Tensor, centres: Tensor, shown: Tensor, *, block: int, open: int, scale: float, units: int
) -> tuple[Tensor, Tensor]:
    """Which tokens every centre keeps out of its cell, for the queries of every unit (a leaf block of them).

    Args:
        key: [B, Hkv, N, D], Hkv divides H.
        centres: [H, C, D].
        shown: [B or 1, N] bool, which tokens count.
        block: tokens of a unit.
        open: tokens kept by a centre.
        scale: factor of the scores.
        units: U, how many units; the last sees the tokens before ``(U - 2) * block``.

    Returns:
        Tokens kept [B, H, U, C, open], rising, and those that join the cell at a unit [B, H, U, C, block], ``EMPTY``
        where there are fewer. What unit u sees are tokens before (u - 1) * block: of these the ``open`` with the
        largest scores at the centre are kept, of equal ones the first; one with a score of -inf is not. Scores are made
        in float32. O(N C (D + open / block)) time, and as many numbers as both tables have.
    """
    heads, number = centres.shape[:2]
    tokens = torch.full((len(key), heads, number, open), EMPTY, device=key.device)
    scores = torch.full(tokens.shape, -torch.inf, dtype=torch.float32, device=key.device)
    nobody = torch.full((*tokens.shape[:3], block), EMPTY, device=key.device)
    kept, joins = [], []
    for unit in range(units):
        left = nobody
        if unit > 1:
            place = slice((unit - 2) * block, (unit - 1) * block)
            seen = shown[:, None, None, place]
            tokens, left, scores = _admitted(tokens, scores, key[:, :, place], place.start, seen, centres, scale)
            left = F.pad(left, (0, block - left.shape[-1]), value=EMPTY)
        kept.append(tokens)
        joins.append(left)
    return torch.stack(kept, 2), torch.stack(joins, 2)


def _scores(key: Tensor, centres: Tensor, scale: float) -> Tensor:
    """[B, H, C, M] scores of keys [B, Hkv, M, D] at the centres, float32.

    Bit by bit as the compiled engine has them, where it is there: equal choices in all precisions.
    """
    about = (centres.float() * scale).expand(len(key), -1, -1, -1)
    every = torch.arange(key.shape[2], device=key.device).expand(*about.shape[:3], -1)
    if key.device.type == "cpu" and compiled.why_not() is None and key.shape[-1] % WIDTH == 0:
        keys = key.float().flatten(0, 1)
        given = about.flatten(0, 1), keys, keys.new_zeros(1, keys.shape[1]), every.flatten(0, 1)
        return compiled.score(*given).view(every.shape)
    return (_gathered(key, every).float() @ about[..., None]).squeeze(-1)


def _admitted(
    tokens: Tensor, scores: Tensor, key: Tensor, start: int, seen: Tensor, centres: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What of tokens kept [.., open] and of those that come, seen [.., M], stays, what leaves [.., M], scores kept.

    Those that come have the keys [B, Hkv, M, D] and lie in the rows from ``start`` on.
    """
    open, size = tokens.shape[-1], key.shape[2]
    fresh = _scores(key, centres, scale).masked_fill(~seen, -torch.inf)
    index = torch.arange(start, start + size, device=key.device).where(seen, EMPTY)
    tokens, scores = torch.cat([tokens, index.expand(fresh.shape)], -1), torch.cat([scores, fresh], -1)
    chosen = top(scores, open)
    none, place = chosen == EMPTY, chosen.clamp(min=0)
    kept, score = (x.gather(-1, place).masked_fill(none, f) for x, f in ((tokens, EMPTY), (scores, -torch.inf)))
    others = F.pad(tokens, (0, 1)).scatter(-1, chosen.masked_fill(none, tokens.shape[-1]), EMPTY)[..., :-1]
    # Those that leave come first, in their order; never more of them than came in.
    order = (others == EMPTY).to(torch.uint8).argsort(stable=True, dim=-1)[..., :size]
    return kept, others.gather(-1, order), score


def _read(
    query: Tensor, key: Tensor, value: Tensor, kept: Tensor, own: Tensor, block: int, scale: float
) -> AttentionState:
    """Attention of queries [B, H, N, D] to what their centres ``own`` [B, H, N] keep, [B, H, U, C, open]."""
    batch, heads, length, dim = query.shape
    unit = torch.arange(length, device=query.device) // block
    table = kept.flatten(2, 3).gather(2, (unit * kept.shape[3] + own)[..., None].expand(-1, -1, -1, kept.shape[-1]))
    rows = [x.reshape(batch * x.shape[1], -1, 1, dim) for x in (key, value)]
    store = Store(rows[0], rows[1], table.flatten(0, 1))
    units = query.reshape(batch * heads, 1, length, 1, dim)
    state = attend_lists(units, [store], batch=batch, scale=scale)
    return AttentionState(*(x.reshape(batch, heads, length, *x.shape[4:]) for x in state))


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


def _attend(
    query: Tensor, own: Tensor, far: Moments, centres: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, H, U, M, D] and score [B, H, U, M] of queries [B, H, U, M, D] from moments [B, H, U, C]."""
    own = F.one_hot(own, centres.shape[1]).to(query.dtype)
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
    open: int = 0,
) -> AttentionState:
    """Attention of every query to all tokens beyond its near field of leaf blocks, in one cell. Causal, 1-D.

    Args:
        query: [B, H, N, D].
        key, value: [B, Hkv, N, D], Hkv divides H.
        centres: [H, C, D], what queries are expanded about (before the scale).
        bias: [H] added to the score.
        block, key_mask, scale, sinks: as in :func:`farfield.multipole_attention`.
        open: tokens that every centre keeps out of the cell, those with the largest scores at the centre; queries read
            those of their own centre exactly.

    Returns:
        The state: the value to first order and the score as lse, both in float32 or wider; 0 and -inf where nothing is
        far. With at least as many ``open`` as there are far tokens it is that of exact attention to them. O(N C D² + N
        C open / block) time; gradients, of queries, keys and values alone, compute the sums and the choice again
        instead of keeping them, and take what is kept as given. The compiled engine (float32 arithmetic on the CPU, D a
        multiple of 32) goes through the tokens once for every centre and keeps nothing else of size N; torch makes the
        tables of :func:`sift`, and has no gradients inside ``torch.func``'s transforms. No query depends on a later
        token. A value to first order is no mean: for a query far from all centres it can lie outside the range of the
        values.
    """
    # Autocast leaves rotated queries and keys in float32, and values not.
    common = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    query, key, value = (x.to(common) for x in (query, key, value))
    centres = centres.to(compute_dtype(common))
    if query.numel() == 0:
        return AttentionState(query.to(centres.dtype), query.new_zeros(query.shape[:3], dtype=centres.dtype))
    shown = torch.arange(query.shape[2], device=query.device)[None] >= sinks
    if key_mask is not None:
        shown = shown & key_mask
    with torch.no_grad(), exactly(query.device):
        own = nearest(query.to(centres.dtype), centres)
    open = min(open, query.shape[2])
    bias = bias.to(centres.dtype)
    return AttentionState(*_Expansion.apply(query, key, value, centres, bias, own, shown, block, open, scale))


class _Expansion(torch.autograd.Function):
    """Keeps what it was given and the lse: gradients go through the sums once more."""

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        centres: Tensor,
        bias: Tensor,
        own: Tensor,
        shown: Tensor,
        block: int,
        open: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        with exactly(query.device):
            if _fits(query, centres):
                tensors = _for_compiled(query, key, value, centres, bias, own, shown)
                return expand(**tensors, block=block, open=open, scale=scale)
            return _state(query, key, value, centres, bias, own, shown, block, open, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.block, ctx.open, ctx.scale = inputs
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, centres, bias, own, shown, lse = ctx.saved_tensors
        how = {"block": ctx.block, "open": ctx.open, "scale": ctx.scale}
        if _fits(query, centres):
            tensors = _for_compiled(query, key, value, centres, bias, own, shown)
            found = expand_backward(*upstream, lse, **tensors, **how)
            grads = tuple(grad.to(x.dtype) for grad, x in zip(found, (query, key, value), strict=True))
            return *grads, *[None] * 7
        with torch.enable_grad(), exactly(centres.device):
            query, key, value = (x.detach().requires_grad_() for x in (query, key, value))
            again = _state(query, key, value, centres, bias, own, shown, **how)
            grads = torch.autograd.grad(again, (query, key, value), upstream, allow_unused=True)
        return *grads, *[None] * 7


def _for_compiled(
    query: Tensor, key: Tensor, value: Tensor, centres: Tensor, bias: Tensor, own: Tensor, shown: Tensor
) -> dict[str, Tensor]:
    q, k, v = (x.float() for x in (query, key, value))
    shown = shown.expand(len(q), -1)
    return {"query": q, "key": k, "value": v, "centres": centres, "bias": bias, "own": own, "shown": shown}


def _fits(query: Tensor, centres: Tensor) -> bool:
    """Whether the compiled engine takes them: the CPU, float32 arithmetic, whole vectors."""
    there = query.device.type == "cpu" and compiled.why_not() is None
    return there and centres.dtype == torch.float32 and query.shape[-1] % WIDTH == 0


def _state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centres: Tensor,
    bias: Tensor,
    own: Tensor,
    shown: Tensor,
    block: int,
    open: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """:func:`expansion_state` in torch, a run of blocks at a time, for the centres ``own``; ``shown`` [B or 1, N]."""
    length, wide = query.shape[2], centres.dtype
    units = -(-length // block)
    joins: Tensor | None = None
    if open:
        # A hidden token may hold anything, and absent ones of a list read some token.
        key, value = (x.masked_fill(~shown[:, None, :, None], 0.0) for x in (key, value))
        kept, joins = sift(key, centres, shown, block=block, open=open, scale=scale, units=units)
    else:
        # What a block sees as far ends two blocks before it: two empty ones in front put it in the block's own place.
        late = max(0, units - 2) * block
        ahead = min(2, units) * block

        def shifted(x: Tensor) -> Tensor:
            return F.pad(x[:, :, :late], (0, 0, ahead, units * block - ahead - late)).unflatten(2, (units, block))

        shown = shifted(shown[:, None, :, None].expand(-1, 1, -1, -1).to(wide)).squeeze(-1) > 0
        # A masked token may hold anything.
        keys, values = (shifted(x).masked_fill(~shown[..., None], 0.0) for x in (key, value))
    laid = F.pad(query.to(wide), (0, 0, 0, units * block - length)).unflatten(2, (units, block))
    chosen = F.pad(own, (0, units * block - length)).unflatten(2, (units, block))
    repeat, outs, scores = query.shape[1] // key.shape[1], [], []
    for of_key in range(key.shape[1]):  # heads of one key head at a time: their sums stay in the cache
        one, heads = slice(of_key, of_key + 1), slice(of_key * repeat, (of_key + 1) * repeat)
        about = centres[heads]
        carry = _nothing(laid.new_zeros(query.shape[0], repeat), about)
        out, score = [], []
        for start, stop in pairwise([*range(0, units, RUN), units]):
            run = slice(start, stop)
            if joins is None:
                parts = moments_of(keys[:, one, run], values[:, one, run], about, shown[:, :, run], scale)
            else:
                parts = _moments_of_listed(key[:, one], value[:, one], about, joins[:, heads, run], scale)
            found = _through(carry, parts)
            carry, far = found[-1], Moments(*(torch.stack(x, 2) for x in zip(*found, strict=True)))
            of_run = _attend(laid[:, heads, run], chosen[:, heads, run], far, about, bias[heads].to(wide), scale)
            out.append(of_run[0])
            score.append(of_run[1])
        outs.append(torch.cat(out, 2))
        scores.append(torch.cat(score, 2))
    cell = AttentionState(*(torch.cat(x, 1).flatten(2, 3)[:, :, :length] for x in (outs, scores)))
    if not open:
        return cell
    exact = _read(query.to(wide), key.to(wide), value.to(wide), kept, own, block, scale)
    return merge_states(cell, AttentionState(exact.out, exact.lse.to(wide)))


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
    those of all tokens before block b, sinks left out, which is what the queries of block b + 1 see. Where centres keep
    tokens out of them it also holds where they lie, ``kept``, and ``scores``, [B, H, R, C, open]: rows of keys and
    values that somebody else has, all of them or those that are kept (:mod:`farfield.ops.kept`). R counts the blocks
    that can be asked for after tokens were taken back.
    """

    block: int
    sinks: int
    rewind: int = 0
    open: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Of a cache's tensors."""
        return (*Moments._fields, "kept", "scores") if self.open else Moments._fields

    @property
    def places(self) -> int:
        """R."""
        return 1 + -(-self.rewind // self.block)

    def empty(self, batch: int, centres: Tensor, dtype: torch.dtype, device: torch.device) -> Cache:
        """A cache of nothing."""
        with torch.inference_mode(False):
            like = torch.zeros(batch, len(centres), self.places, dtype=compute_dtype(dtype), device=device)
            number, dim = centres.shape[1:]
            cache = {
                "lse": like.new_full((*like.shape, number), -torch.inf),
                "key": like.new_zeros(*like.shape, number, dim),
                "rows": like.new_zeros(*like.shape, number, dim + 1, dim),
            }
            if self.open:
                kept = like.new_full((*like.shape, number, self.open), EMPTY, dtype=torch.int64)
                scores = torch.full(kept.shape, -torch.inf, dtype=torch.float32, device=device)
                cache |= {"kept": kept, "scores": scores}
        return cache

    def fill(self, cache: Cache, key: Tensor, value: Tensor, read: Tensor, centres: Tensor, scale: float) -> None:
        """A whole prefix [B, Hkv, N, D] into an empty cache; ``read`` [H] says which key head is whose."""
        if not key.shape[2]:
            return
        self._advance(cache, 0, max(0, key.shape[2] // self.block - 1), key, value, read, centres, scale, 0)

    def close(
        self, cache: Cache, number: int, key: Tensor, value: Tensor, read: Tensor, centres: Tensor, scale: float,
        first: int,
    ) -> None:  # fmt: skip
        """Adds the block before block ``number``, once that has its last token: the next one sees it as far.

        Keys and values [B, Hkv, N, D] have token i of that block in row i - ``first``. Where centres keep tokens, their
        rows come in front of it, in the order of the tokens: all from token 0 on (``first`` 0), or kept ones alone
        (``first`` may then be negative). ``read`` [H] says which key head is whose.
        """
        if not number:
            return
        if self.open:
            last = int(cache["kept"][:, :, (number - 1) % self.places].amax())
            front = (number - 1) * self.block - first
            if last >= front:
                raise ValueError(
                    f"tokens are kept in rows up to {last}: rows in front of block {number - 1} of {self.block} tokens "
                    f"are 0 to {front - 1}"
                )
        self._advance(cache, number - 1, number, key, value, read, centres, scale, first)

    def _advance(
        self, cache: Cache, first: int, last: int, key: Tensor, value: Tensor, read: Tensor, centres: Tensor,
        scale: float, before: int,
    ) -> None:  # fmt: skip
        """Adds blocks ``first`` to ``last``, the last left out, of which token i lies in row i - ``before``."""
        if before > first * self.block or last * self.block - before > key.shape[2]:
            raise ValueError(
                f"blocks {first} to {last} of {self.block} tokens, of keys {tuple(key.shape)} in which token 0 has row "
                f"{-before}: all tokens of these blocks are needed"
            )
        centres = centres.to(cache["lse"].dtype)
        if _fits(key, centres):
            sums = cache["lse"], cache["key"], cache["rows"]
            advance(
                sums, cache.get("kept"), cache.get("scores"), key.float(), value.float(), read, centres, scale,
                block=self.block, sinks=self.sinks, before=before, first=first, last=last,
            )  # fmt: skip
            return
        once = torch.tensor(evenly_read(read.tolist()), device=key.device)
        key, value = key.index_select(1, once), value.index_select(1, once)
        carry, done = self._at(cache, first), first
        while done < last:
            # Those whose sums nobody will ask for may come together.
            number = 1 if self.open else max(1, min(RUN, last + 1 - self.places - done))
            joins = self._sift(cache, done, key, centres, scale, before) if self.open else None
            carry = self._with(carry, key, value, centres, scale, done, number, joins, before)
            done += number
            self._put(cache, done, carry)

    def _sift(self, cache: Cache, number: int, key: Tensor, centres: Tensor, scale: float, before: int) -> Tensor:
        """Writes what is kept after block ``number``; what joins the sums with it, [B, H, 1, C, M]."""
        start, at, to = number * self.block - before, number % self.places, (number + 1) % self.places
        with exactly(key.device):
            seen = torch.arange(start, start + self.block, device=key.device) + before >= self.sinks
            kept, joins, scores = _admitted(
                cache["kept"][:, :, at], cache["scores"][:, :, at], key[:, :, start : start + self.block], start, seen,
                centres, scale,
            )  # fmt: skip
        cache["kept"][:, :, to], cache["scores"][:, :, to] = kept, scores
        return joins[:, :, None]

    def _at(self, cache: Cache, number: int) -> Moments:
        return Moments(*(cache[name][:, :, number % self.places].clone() for name in Moments._fields))

    def _put(self, cache: Cache, number: int, made: Moments) -> None:
        for name, x in made._asdict().items():
            cache[name][:, :, number % self.places] = x

    def _with(
        self, carry: Moments, key: Tensor, value: Tensor, centres: Tensor, scale: float, first: int, number: int,
        joins: Tensor | None, before: int,
    ) -> Moments:  # fmt: skip
        """The carry and ``number`` blocks from ``first`` on, or what joins with them."""
        tokens = slice(first * self.block - before, (first + number) * self.block - before)
        repeat, pieces = len(centres) // key.shape[1], []
        with exactly(key.device):
            index = torch.arange(tokens.start, tokens.stop, device=key.device) + before
            shown = (index >= self.sinks).view(1, 1, number, -1)
            for of_key in range(key.shape[1]):
                one, heads = slice(of_key, of_key + 1), slice(of_key * repeat, (of_key + 1) * repeat)
                about = centres[heads].to(carry.lse.dtype)
                if joins is None:
                    of_block, of_value = (x[:, one, tokens].unflatten(2, (number, -1)) for x in (key, value))
                    parts = moments_of(of_block, of_value, about, shown, scale)
                else:
                    parts = _moments_of_listed(key[:, one], value[:, one], about, joins[:, heads], scale)
                pieces.append(_through(carry.map(lambda x, heads=heads: x[:, heads]), parts)[-1])
        return Moments(*(torch.cat(x, 1) for x in zip(*pieces, strict=True)))

    def attend(
        self,
        cache: Cache,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        read: Tensor,
        centres: Tensor,
        bias: Tensor,
        number: int,
        scale: float,
    ) -> AttentionState:
        """Of queries [B, H, T, D] that all lie in block ``number``.

        Where centres keep tokens, ``key`` and ``value`` [B, Hkv, N, D] have these, and ``read`` [H] says which key head
        is whose.
        """
        wide = cache["lse"].dtype
        with exactly(query.device):
            if number < 1:
                lse = query.new_full(query.shape[:-1], -torch.inf, dtype=wide)
                return AttentionState(query.new_zeros(query.shape, dtype=wide), lse)
            place = (number - 1) % self.places
            far = Moments(*(cache[name][:, :, place, None] for name in Moments._fields))
            query, centres = query.to(wide), centres.to(wide)
            own = nearest(query, centres)
            out, score = _attend(query[:, :, None], own[:, :, None], far, centres, bias.to(wide), scale)
            cell = AttentionState(out[:, :, 0], score[:, :, 0])
            if not self.open:
                return cell
            tokens = cache["kept"][:, :, place].gather(2, own[..., None].expand(-1, -1, -1, self.open))
            row = torch.arange(len(query), device=query.device)[:, None, None, None]
            rows = (x[row, read[:, None, None], tokens.clamp(min=0)].to(wide) for x in (key, value))
            keys, values = rows  # [B, H, T, open, D]
            scores = (keys @ query[..., None]).squeeze(-1) * scale
            exact = state_from_scores(scores.masked_fill(tokens < 0, -torch.inf)[..., None, :], values)
            return merge_states(cell, AttentionState(exact.out.squeeze(-2), exact.lse.squeeze(-1)))


class Asked(NamedTuple):
    """An expansion that some of a layer's heads are asked for.

    Attributes:
        stream, cache: of it.
        centres, bias: [H, C, D], [H].
        heads: which of all heads these are.
        key, value, read: what the centres keep, as :meth:`ExpansionStream.attend` takes it.
    """

    stream: ExpansionStream
    cache: Cache
    centres: Tensor
    bias: Tensor
    heads: tuple[int, ...]
    key: Tensor
    value: Tensor
    read: Tensor


def with_expansions(
    near: AttentionState, query: Tensor, asked: Sequence[Asked], number: int, scale: float
) -> AttentionState:
    """The state of queries [B, H, T, D] in block ``number``, which may be changed, with their expansions merged in.

    ``asked`` has every head at most once; their caches have equally many places. One token on the CPU in float32 is one
    compiled call.
    """
    if not asked or number < 1:
        return near
    first = asked[0]
    place, wide = (number - 1) % first.stream.places, {near.out.dtype, near.lse.dtype, query.dtype}
    wide |= {x.key.dtype for x in asked if x.stream.open}
    if query.shape[2] == 1 and wide == {torch.float32} and _fits(query, first.centres):
        out, lse = near.out[:, :, 0].contiguous(), near.lse[:, :, 0].contiguous()
        parts = [
            StepPart(
                x.centres, x.bias, index_of(x.heads, query.device),
                (x.cache["lse"], x.cache["key"], x.cache["rows"]), x.cache.get("kept"), x.key, x.value, x.read,
            )
            for x in asked
        ]  # fmt: skip
        compiled_step(query[:, :, 0], out, lse, parts, place, scale)
        return AttentionState(out[:, :, None], lse[:, :, None])
    far = [
        x.stream.attend(x.cache, take(query, x.heads), x.key, x.value, x.read, x.centres, x.bias, number, scale)
        for x in asked
    ]
    return merge_heads(near, far, tuple(head for x in asked for head in x.heads))
