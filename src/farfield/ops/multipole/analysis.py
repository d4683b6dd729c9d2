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
from farfield.ops.multipole.summary import LearnedSummary, LevelWeights, Pyramid, SharedSummary, Summary

_DEFAULTS: dict[str, Any] = {
    "grid": None, "block": 64, "rank": 8, "levels": None, "causal": False, "key_mask": None, "cu_seqlens": None, "scale": None,
    "query_rank": None, "sinks": 0, "summary": "mean", "level_bias": None, "part": "both",
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
    if isinstance(summary, Pyramid):
        raise ValueError(
            "summary is a ready Pyramid: how its values came from tokens is unknown; pass 'mean' or weights instead"
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
        ValueError, TypeError: as the operator; for a ready Pyramid.

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
            f"{'near' if e.level == 0 else e.level:>5}  {e.tokens:>12.1f}  {e.exact_mass:>10.4f}  {e.mass:.4f}  {e.score:>9.4f}  "
            f"{e.weight:>9.4f}  {e.output:.4f}"
            for e in self.levels
        ]
        total = f"  all  {'':>12}  {'':>10}  {'':>6}  {self.score:>9.4f}  {self.weight:>9.4f}  {self.output:.4f}   lse rms {self.lse:.4f}"
        return "\n".join([head, *rows, total])


def error_report(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> ErrorReport:
    """Compares multipole attention with exact softmax attention over the same visible tokens: scores, weights and
    outputs, by level.

    Args:
        query: [B, Hq, N, D]; key, value: [B, Hkv, N, D].
        **options: as :func:`effective_weights`, without cu_seqlens and part. A ready Pyramid is refused.

    Returns:
        ErrorReport, computed in float64. Memory O(N^2).
    """
    for name in ("cu_seqlens", "part"):
        if options.get(name) not in (None, "both"):
            raise ValueError(
                f"{name}={options[name]!r}: error_report compares one whole sequence or grid; leave it out"
            )
    call, fixed = _arguments(query, key, value, options)
    q, k, v = call["query"], call["key"], call["value"]
    ((_, shape, valid),) = _pieces(call)
    repeat, number = q.shape[1] // k.shape[1], q.shape[2]
    eye = torch.eye(number, dtype=q.dtype, device=q.device).expand(*k.shape[:2], number, number)
    w = reference.weights(q, k, eye, shape=shape, valid=valid, summary=_per_token(call["summary"], number), **fixed)
    real = reference.weights(q, k, v, shape=shape, valid=valid, summary=call["summary"], **fixed)
    where = reference.Coordinates.of(shape, q.device)
    allowed = valid[:, None, None, :].expand(-1, 1, number, -1)
    if fixed["causal"]:
        allowed = allowed & (where.position[:, None, 0] >= where.position[None, :, 0])
    exact_scores = (fixed["scale"] * q @ k.repeat_interleave(repeat, 1).mT).masked_fill(~allowed, -torch.inf)
    blind = ~allowed.any(-1, keepdim=True)
    exact = torch.softmax(exact_scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    exact_lse = torch.logsumexp(exact_scores, -1)
    values = v.masked_fill(~valid[:, None, :, None], 0.0).repeat_interleave(repeat, 1)
    exact_out = exact @ values
    norm = exact_out.norm().item() or 1.0
    sink = torch.arange(number, device=q.device) < fixed["sinks"]
    far_seen = []
    for level in range(1, shape.levels + 1):
        inside = reference.same_rows(where.cells(level), where.cell(level))
        seen = (reference.far_visible(where, level, shape.levels, fixed["causal"]).double() @ inside.double()) > 0
        far_seen.append(seen & ~sink)
    near_seen = (
        ~torch.stack(far_seen).any(0) if far_seen else torch.ones(number, number, dtype=torch.bool, device=q.device)
    )
    rows, far_square, far_number = [], 0.0, 0.0
    out = real.tokens @ values
    queries = exact.shape[0] * exact.shape[1] * number
    for level, seen in enumerate([near_seen, *far_seen]):
        mask = (seen & allowed).expand(exact.shape)
        if level == 0:
            weight, part, square = w.tokens, real.tokens @ values, 0.0
        else:
            weight, part = w.cells[level - 1] @ w.values[level - 1], real.cells[level - 1] @ real.values[level - 1]
            inside = reference.same_rows(where.cells(level), where.cell(level)).double()
            bare = _bare_scores(real.cell_scores[level - 1], where, level, valid & ~sink, fixed) @ inside
            gap = torch.where(mask, bare - exact_scores, 0.0)
            square = gap.square().sum().item()
            out = out + part
        count = mask.sum().item()
        far_square, far_number = far_square + square, far_number + (count if level else 0)
        rows.append(
            LevelError(
                level,
                count / queries,
                (exact * mask).sum().item() / queries,
                weight.sum().item() / queries,
                (square / count) ** 0.5 if count else 0.0,
                torch.where(mask, weight - exact, 0.0).abs().sum().item() / queries,
                (part - (exact * mask) @ values).norm().item() / norm,
            )
        )
    finite = exact_lse > -torch.inf
    return ErrorReport(
        tuple(rows),
        (far_square / far_number) ** 0.5 if far_number else 0.0,
        sum(r.weight for r in rows),
        (out - exact_out).norm().item() / norm,
        (real.lse - exact_lse)[finite].square().mean().sqrt().item() if finite.any() else 0.0,
    )


def _bare_scores(
    scores: Tensor, where: reference.Coordinates, level: int, valid: Tensor, fixed: dict[str, Any]
) -> Tensor:
    """Cell scores without count and level bias, 0 where unseen."""
    inside = reference.same_rows(where.cells(level), where.cell(level)).double()
    if fixed["count_bias"]:
        scores = scores - (valid.double() @ inside.T).clamp(min=1).log()[:, None, None, :]
    if fixed["level_bias"] is not None:
        scores = scores - fixed["level_bias"][level - 1].double()[None, :, None, None]
    return torch.where(scores == -torch.inf, 0.0, scores)
