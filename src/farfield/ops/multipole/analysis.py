"""What the operator really does: its dense weight matrix, and its distance to exact softmax attention.

Computed by the reference engine in float64 with O(N^2) memory: for pictures, tests and error analysis at a few
thousand tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farfield.geometry import geometry
from farfield.ops.multipole import reference
from farfield.ops.multipole.api import normalise
from farfield.ops.multipole.summary import LearnedSummary, LevelWeights, SharedSummary, Summaries, Summary

_DEFAULTS: dict[str, Any] = {
    "grid": None, "block": 64, "rank": 8, "levels": None, "causal": False, "key_mask": None, "cu_seqlens": None,
    "scale": None, "query_rank": None, "sinks": 0, "summary": "mean", "level_bias": None, "part": "both",
}  # fmt: skip


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The call in float64, normalised, and what the reference's weights take besides tensors."""
    unknown = set(options) - set(_DEFAULTS) - {"count_bias"}
    if unknown:
        raise TypeError(f"unknown option {sorted(unknown)}: {sorted([*_DEFAULTS, 'count_bias'])} would be accepted")
    count_bias = options.pop("count_bias", True)
    given = {**_DEFAULTS, **options}
    call = normalise(query.double(), key.double(), value.double(), dropout=0.0, **given)
    fixed = {n: given[n] for n in ("causal", "sinks", "part")} | {
        n: call[n] for n in ("scale", "query_rank", "level_bias")
    }
    return call, {**fixed, "count_bias": count_bias}


def _pieces(call: dict[str, Any]) -> list[tuple[slice, Any, Tensor]]:
    """(tokens, hierarchy, valid) of the one grid or of every packed sequence."""
    key = call["key"]
    if call["cu_seqlens"] is None:
        valid = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        shape = geometry(call["grid"], call["block"], call["rank"], call["levels"])
        return [(slice(0, key.shape[2]), shape, valid if call["key_mask"] is None else call["key_mask"])]
    out, bounds = [], call["cu_seqlens"].tolist()
    for start, stop in zip(bounds, bounds[1:], strict=False):
        if stop > start:
            most = geometry((stop - start,), call["block"], call["rank"]).levels
            levels = most if call["levels"] is None else min(call["levels"], most)
            shape = geometry((stop - start,), call["block"], call["rank"], levels)
            valid = torch.ones(key.shape[0], stop - start, dtype=torch.bool, device=key.device)
            out.append((slice(start, stop), shape, valid))
    return out


def _per_token(summary: Summary, tokens: int) -> Summary:
    """The summary with value weights averaged over channels, so that it maps tokens to cells by one matrix."""
    if isinstance(summary, SharedSummary):
        leaf, up = (w.double().mean(-1, keepdim=True) for w in (summary.value_leaf, summary.value_up))
        return summary._replace(value_leaf=leaf, value_up=up)
    if isinstance(summary, LearnedSummary):
        levels = []
        for level in summary.levels:
            taps = level.value_weight.double().mean(1, keepdim=True).expand(-1, tokens, -1)
            levels.append(LevelWeights(level.key_weight, level.key_bias, taps, taps.new_zeros(taps.shape[:2])))
        return LearnedSummary(tuple(levels))
    if isinstance(summary, Summaries):
        raise ValueError(
            "summary is a ready Summaries: how its values came from tokens is unknown; pass 'mean' or weights instead"
        )
    return summary


def effective_weights(query: Tensor, key: Tensor, **options: Any) -> Tensor:
    """The matrix W with ``multipole_attention(q, k, v, ...) == W @ v``.

    Args:
        query: [B, Hq, N, D]; key: [B, Hkv, N, D].
        **options: those of :func:`farfield.multipole_attention`: grid, block, rank, levels, causal, key_mask,
            cu_seqlens, scale, count_bias, query_rank, sinks, summary, level_bias, part.

    Returns:
        [B, Hq, N, N] float64. With "mean" and PooledSummary rows sum to 1 (0 where a query sees nothing). Where value
        summaries differ by channel (shared, learned) it is the mean over channels, without the learned bias.

    Raises:
        ValueError, TypeError: as the operator; for a ready Summaries.

    Memory O(N^2).
    """
    call, fixed = _arguments(query, key, key, options)
    number = call["query"].shape[2]
    out = call["query"].new_zeros(*call["query"].shape[:2], number, number)
    for cut, shape, valid in _pieces(call):
        q, k = call["query"][:, :, cut], call["key"][:, :, cut]
        size = q.shape[2]
        eye = torch.eye(size, dtype=q.dtype, device=q.device).expand(*k.shape[:2], size, size)
        w = reference.weights(q, k, eye, shape=shape, valid=valid, summary=_per_token(call["summary"], size), **fixed)
        total = w.tokens
        for cells, tokens in zip(w.cells, w.values, strict=True):
            total = total + cells @ tokens
        out[:, :, cut, cut] = total
    return out


class LevelError(NamedTuple):
    """Errors of what one level (0 = near field and sinks) stands for; means over batch, heads and queries.

    Attributes:
        level: 0, or the level of the summaries.
        tokens: tokens that a query sees through this level.
        exact_mass, mass: their share of the exact softmax, and of this operator's.
        score: root mean square of (cell score without count bias - token score).
        weight: sum over these tokens of abs(weight - exact weight).
        output: norm of this level's contribution to the output error, relative to the norm of the exact output.
    """

    level: int
    tokens: float
    exact_mass: float
    mass: float
    score: float
    weight: float
    output: float


@dataclass(frozen=True)
class ErrorReport:
    """Distance to exact softmax attention, per level and in all; prints as a table.

    Attributes:
        levels: one entry per level, near field first.
        score: root mean square of the score error over far tokens.
        weight: mean over queries of the sum of absolute weight errors (2 = disjoint).
        output: norm of the output error relative to the norm of the exact output.
        lse: root mean square error of the log-sum-exp.
    """

    levels: tuple[LevelError, ...]
    score: float
    weight: float
    output: float
    lse: float

    def __str__(self) -> str:
        head = "level  tokens/query  exact mass  mass    score rms  weight L1  output"
        rows = [
            f"{'near' if e.level == 0 else e.level:>5}  {e.tokens:>12.1f}  {e.exact_mass:>10.4f}  {e.mass:.4f}  "
            f"{e.score:>9.4f}  {e.weight:>9.4f}  {e.output:.4f}"
            for e in self.levels
        ]
        total = (
            f"  all  {'':>12}  {'':>10}  {'':>6}  "
            f"{self.score:>9.4f}  {self.weight:>9.4f}  {self.output:.4f}   lse rms {self.lse:.4f}"
        )
        return "\n".join([head, *rows, total])


def error_report(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> ErrorReport:
    """Compares multipole attention with exact softmax attention over the same visible tokens, level by level.

    Args:
        query: [B, Hq, N, D]; key, value: [B, Hkv, N, D].
        **options: as :func:`effective_weights`, without cu_seqlens and part. A ready Summaries is refused.

    Returns:
        ErrorReport of scores, weights and outputs, computed in float64. Memory O(N^2).

    Raises:
        ValueError, TypeError: as the operator; for what :func:`effective_weights` takes and this does not.
    """
    for name in ("cu_seqlens", "part"):
        if options.get(name) not in (None, "both"):
            raise ValueError(
                f"{name}={options[name]!r}: error_report compares one whole sequence or grid; leave it out"
            )
    call, fixed = _arguments(query, key, value, options)
    q, k, v = call["query"], call["key"], call["value"]
    ((_, shape, valid),) = _pieces(call)
    number = q.shape[2]
    where = reference.Coordinates.of(shape, q.device)
    exact = _exact(q, k, v, where, valid, fixed)
    eye = torch.eye(number, dtype=q.dtype, device=q.device).expand(*k.shape[:2], number, number)
    traced = reference.weights(
        q, k, eye, shape=shape, valid=valid, summary=_per_token(call["summary"], number), **fixed
    )
    real = reference.weights(q, k, v, shape=shape, valid=valid, summary=call["summary"], **fixed)
    sink = torch.arange(number, device=q.device) < fixed["sinks"]
    near, *far = _seen_by_level(where, sink, fixed["causal"])
    out = real.tokens @ exact.values
    rows = [_level_error(exact, 0, near, traced.tokens, out, 0.0)]
    squares = 0.0
    for level, seen in enumerate(far, start=1):
        i = level - 1
        inside = reference.same_rows(where.cells(level), where.cell(level)).double()
        bare = _bare_scores(real.cell_scores[i], inside, level, valid & ~sink, fixed) @ inside
        square = torch.where(seen & exact.allowed, bare - exact.scores, 0.0).square().sum().item()
        part = real.cells[i] @ real.values[i]
        rows.append(_level_error(exact, level, seen, traced.cells[i] @ traced.values[i], part, square))
        squares, out = squares + square, out + part
    far_tokens = sum((seen & exact.allowed).expand(exact.weights.shape).sum().item() for seen in far)
    finite = exact.lse > -torch.inf
    return ErrorReport(
        tuple(rows),
        (squares / far_tokens) ** 0.5 if far_tokens else 0.0,
        sum(r.weight for r in rows),
        (out - exact.out).norm().item() / exact.norm,
        (real.lse - exact.lse)[finite].square().mean().sqrt().item() if finite.any() else 0.0,
    )


class _Exact(NamedTuple):
    """Softmax attention over every visible token.

    Attributes:
        allowed: [B, 1, N, N] bool, tokens that a query may see.
        scores, weights: [B, Hq, N, N].
        lse: [B, Hq, N].
        values, out: [B, Hq, N, D]; hidden values are 0.
        norm: of the output, 1 where that is 0.
    """

    allowed: Tensor
    scores: Tensor
    weights: Tensor
    lse: Tensor
    values: Tensor
    out: Tensor
    norm: float


def _exact(
    query: Tensor, key: Tensor, value: Tensor, where: reference.Coordinates, valid: Tensor, fixed: dict[str, Any]
) -> _Exact:
    repeat = query.shape[1] // key.shape[1]
    allowed = valid[:, None, None, :].expand(-1, 1, query.shape[2], -1)
    if fixed["causal"]:
        allowed = allowed & (where.position[:, None, 0] >= where.position[None, :, 0])
    scores = (fixed["scale"] * query @ key.repeat_interleave(repeat, 1).mT).masked_fill(~allowed, -torch.inf)
    blind = ~allowed.any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    values = value.masked_fill(~valid[:, None, :, None], 0.0).repeat_interleave(repeat, 1)
    out = weights @ values
    return _Exact(allowed, scores, weights, torch.logsumexp(scores, -1), values, out, out.norm().item() or 1.0)


def _seen_by_level(where: reference.Coordinates, sink: Tensor, causal: bool) -> list[Tensor]:
    """Per level, near field and sinks first, [N, N] bool: tokens that a query sees through it."""
    levels, number = where.shape.levels, where.shape.tokens
    far = []
    for level in range(1, levels + 1):
        inside = reference.same_rows(where.cells(level), where.cell(level))
        seen = (reference.far_visible(where, level, levels, causal).double() @ inside.double()) > 0
        far.append(seen & ~sink)
    near = ~torch.stack(far).any(0) if far else torch.ones(number, number, dtype=torch.bool, device=sink.device)
    return [near, *far]


def _level_error(exact: _Exact, level: int, seen: Tensor, weight: Tensor, out: Tensor, square: float) -> LevelError:
    """From the level's weights on tokens, its part of the output and the sum of its squared score errors."""
    mask = (seen & exact.allowed).expand(exact.weights.shape)
    count = mask.sum().item()
    queries = mask[..., 0].numel()
    share = exact.weights * mask
    return LevelError(
        level=level,
        tokens=count / queries,
        exact_mass=share.sum().item() / queries,
        mass=weight.sum().item() / queries,
        score=(square / count) ** 0.5 if count else 0.0,
        weight=torch.where(mask, weight - exact.weights, 0.0).abs().sum().item() / queries,
        output=(out - share @ exact.values).norm().item() / exact.norm,
    )


def _bare_scores(scores: Tensor, inside: Tensor, level: int, valid: Tensor, fixed: dict[str, Any]) -> Tensor:
    """Cell scores without count and level bias, 0 where unseen; ``inside`` [C, N] is 1 where a cell holds a token."""
    if fixed["count_bias"]:
        scores = scores - (valid.double() @ inside.T).clamp(min=1).log()[:, None, None, :]
    if fixed["level_bias"] is not None:
        scores = scores - fixed["level_bias"][level - 1].double()[None, :, None, None]
    return torch.where(scores == -torch.inf, 0.0, scores)
