"""The public function: arguments checked and normalised, one engine chosen, nothing computed here."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from farfield.geometry import Geometry, check_divides, geometry, integers, per_axis
from farfield.ops.multipole import reference
from farfield.ops.multipole.engines import check_name
from farfield.ops.multipole.op import Multipole, multipole
from farfield.ops.multipole.plan import segment_lengths
from farfield.ops.multipole.summary import Summaries, Summary, check, check_levels, pack


def multipole_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Sequence[int] | None = None,
    block: int | Sequence[int] = 64,
    rank: int | Sequence[int] = 8,
    levels: int | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    count_bias: bool = True,
    query_rank: int | Sequence[int] | None = None,
    sinks: int = 0,
    dropout: float = 0.0,
    summary: Summary = "mean",
    level_bias: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
    part: str = "both",
) -> Tensor | tuple[Tensor, Tensor]:
    """Fast multipole attention: near tokens exactly, far tokens through a hierarchy of summaries, one softmax.

    Leaf blocks of ``block`` tokens per axis see their own and their neighbouring blocks token by token. Everything
    else is seen through groups that double in side from level to level, each cut into ``rank`` cells per axis that
    carry one key and one value summary. Every token is seen exactly once.

    Args:
        query: [B, Hq, N, D]; float32, float64, bfloat16 or float16. Tokens row-major in the grid.
        key, value: [B, Hkv, N, D], same dtype; Hq a multiple of Hkv (grouped heads).
        grid: (N,), (H, W) or (T, H, W) with product N; None means (N,).
        block: side of a leaf block in tokens, one integer or one per axis.
        rank: cells of a group per axis; divides ``block``.
        levels: coarse levels; None takes the published number (log2(N / block) - 1 for powers of two). Fewer are
            allowed.
        causal: a query sees only itself and the past; 1-D only.
        key_mask: [B, N] bool, True = the key may be seen. In every dimension. Masked tokens count in no summary.
        cu_seqlens: [S + 1] integer bounds of packed sequences, from 0 to N; 1-D only. Each gets its own tree, none
            sees another. With a key_mask too, cu_seqlens wins and the mask is not read.
        scale: factor of the scores; None means D ** -0.5.
        count_bias: add log(count) to the score of a cell of ``count`` tokens, so that it weighs as many tokens.
        query_rank: pool queries too, in cells of this rank, and share the far field within a cell: O(N) instead of
            O(N log N). Not with ``causal``, since a pooled query mixes later tokens in.
        sinks: leading tokens (of each packed sequence) that every query sees exactly and that belong to no cell.
        dropout: rate in [0, 1) for the normalised weights, drawn from torch's default generator. Pass 0 in evaluation.
        summary: "mean", ready weights (SharedSummary, PooledSummary, LearnedSummary), or ready summaries (Summaries).
        level_bias: [levels or more, Hq], added to the scores of each level's cells.
        return_lse: also return the natural log of each query's sum of exponentials, differentiable.
        impl: "triton" (GPU), "compiled" (CPU; built by a C++ compiler on first use), "torch" (any device), "reference"
            (dense, O(N^2), differentiable to any order), None: the fastest that can run the call.
        part: "both", or only the "near" or the "far" part of the sum, for merging by lse.

    Returns:
        Output [B, Hq, N, D] in the dtype of the query; with ``return_lse`` also lse [B, Hq, N] (float32, or float64
        for float64 inputs). A query that sees nothing gets 0 and -inf, with zero gradients.

    Raises:
        ValueError, TypeError: with what was given and what would be accepted.

    Complexity: time O(N (block + rank * levels)) per axis product and memory O(N), forward and backward. Causal-safe
    with ``causal=True``. Under autocast, float inputs are cast to the autocast dtype first. Accumulation is float32
    (float64 for float64).

    Source: Fast Multipole Attention, arXiv 2310.11960.

    Example:
        >>> q = k = v = torch.randn(1, 8, 1000, 64)
        >>> multipole_attention(q, k, v, causal=True, block=64, rank=8).shape
        torch.Size([1, 8, 1000, 64])
    """
    call = normalise(
        query, key, value, grid, block, rank, levels, causal, key_mask, cu_seqlens, scale, query_rank, sinks, dropout,
        summary, level_bias, part,
    )  # fmt: skip
    check_name(impl)
    call.update(causal=causal, count_bias=count_bias, sinks=sinks, dropout=float(dropout), part=part)
    out, lse = reference.attention(**call) if impl == "reference" else _operator(impl or "", **call)
    return (out, lse) if return_lse else out


def _operator(
    engine: str,
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    rank: tuple[int, ...],
    levels: int | None,
    causal: bool,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    count_bias: bool,
    query_rank: tuple[int, ...] | None,
    sinks: int,
    dropout: float,
    summary: Summary,
    level_bias: Tensor | None,
    part: str,
) -> tuple[Tensor, Tensor]:
    kind, weights = pack(summary)
    seed = torch.randint(1 << 62, (1,)) if dropout > 0 else None
    settings = (
        kind, list(grid), list(block), list(rank), -1 if levels is None else levels, causal, count_bias,
        list(query_rank or ()), sinks, scale, dropout, part, engine,
    )  # fmt: skip
    differentiable = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, key, value, level_bias, *weights)
    )
    if torch.compiler.is_compiling() and not differentiable:
        # Dynamo cannot trace an autograd function that has nothing to differentiate. (In eager mode it can be right
        # although no tensor says so: under vmap requires_grad is False for differentiated inputs, too.)
        return multipole(query, key, value, key_mask, cu_seqlens, level_bias, seed, weights, *settings)
    query, key, value, *weights = _distinct([query, key, value, *weights])
    out, lse = Multipole.apply(settings, query, key, value, key_mask, cu_seqlens, level_bias, seed, *weights)
    return out, lse


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    """Repeated tensors become views: torch.compile refuses one tensor in two places of an autograd function."""
    return [x.view_as(x) if any(x is y for y in tensors[:i]) else x for i, x in enumerate(tensors)]


def normalise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Sequence[int] | None,
    block: int | Sequence[int],
    rank: int | Sequence[int],
    levels: int | None,
    causal: bool,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    query_rank: int | Sequence[int] | None,
    sinks: int,
    dropout: float,
    summary: Summary,
    level_bias: Tensor | None,
    part: str,
) -> dict[str, Any]:
    """Checks a call and brings its arguments into one form; what comes out fits every engine."""
    query, key, value = _inputs(query, key, value)
    number = query.shape[2]
    axes = (number,) if grid is None else integers(grid, "grid")
    if levels is not None:
        (levels,) = integers(levels, "levels")
    if not 1 <= len(axes) <= 3:
        raise ValueError(f"grid={axes} has {len(axes)} axes: (N,), (H, W) or (T, H, W) would be accepted")
    if grid is not None and prod(axes) != number:
        raise ValueError(f"grid={axes} has {prod(axes)} tokens but query has N={number}: their product must be N")
    dims = len(axes)
    m, p = per_axis(block, dims, "block"), per_axis(rank, dims, "rank")
    pooled = None if query_rank is None else per_axis(query_rank, dims, "query_rank")
    if causal and dims > 1:
        raise ValueError(f"causal=True with grid={axes}: an order of tokens exists in 1-D only; pass causal=False")
    if causal and pooled is not None:
        raise ValueError(
            f"causal=True with query_rank={query_rank}: a pooled query mixes later tokens in; drop one of the two"
        )
    check_divides("rank", p, m)
    if pooled is not None:
        check_divides("query_rank", pooled, m)
    if part not in ("both", "near", "far"):
        raise ValueError(f"part={part!r}: 'both', 'near' or 'far' would be accepted")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout}: a rate in [0, 1) would be accepted")
    if not isinstance(sinks, int) or sinks < 0:
        raise ValueError(f"sinks={sinks!r}: a number of leading tokens >= 0 would be accepted")
    if key_mask is not None:
        _check_mask(key_mask, query.shape[0], number)
    if cu_seqlens is not None:
        _check_segments(cu_seqlens, number, dims)
    if level_bias is not None and not isinstance(level_bias, Tensor):
        raise TypeError(f"level_bias={level_bias!r}: a tensor [levels or more, Hq] would be accepted")
    if level_bias is not None and (level_bias.dim() != 2 or level_bias.shape[1] != query.shape[1]):
        raise ValueError(
            f"level_bias has shape {list(level_bias.shape)}: [levels or more, Hq={query.shape[1]}] is needed"
        )
    fixed = _shape_if_needed(axes, m, p, levels, cu_seqlens)
    kind, _ = pack(summary)
    if fixed is None:
        if levels is not None and levels < 0:
            raise ValueError(f"levels={levels}: a number >= 0 would be accepted (or None)")
    elif part != "near":
        check_levels(summary, level_bias, fixed, key)
    if kind in ("shared", "pooled"):
        check(summary, Geometry(axes, m, p, 0), key, 0)
    if isinstance(summary, Summaries) and cu_seqlens is not None:
        raise ValueError(
            "summary is a ready Summaries with cu_seqlens: packed sequences build their own; pass weights instead"
        )
    return {
        "query": query,
        "key": key,
        "value": value,
        "grid": axes,
        "block": m,
        "rank": p,
        "levels": levels,
        "key_mask": key_mask,
        "cu_seqlens": cu_seqlens,
        "scale": float(query.shape[3] ** -0.5 if scale is None else scale),
        "query_rank": pooled,
        "summary": summary,
        "level_bias": level_bias,
    }


def _shape_if_needed(
    axes: tuple[int, ...], block: tuple[int, ...], rank: tuple[int, ...], levels: int | None, cu_seqlens: Tensor | None
) -> Geometry | None:
    """The hierarchy (that of the longest packed sequence), where its integers can be checked now.

    None under tracing, where lengths are symbols: the operator checks these.
    """
    if torch.compiler.is_compiling():
        return None
    if cu_seqlens is not None:
        axes = (int(cu_seqlens.diff().max()),)
    return geometry(axes, block, rank, levels)


def _inputs(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}: [B, H, N, D] is needed")
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name} has dtype {x.dtype}: float32, float64, bfloat16 or float16 would be accepted")
    if key.shape != value.shape:
        raise ValueError(f"key {list(key.shape)} and value {list(value.shape)} must have one shape, [B, Hkv, N, D]")
    if query.shape[0] != key.shape[0] or query.shape[2:] != key.shape[2:]:
        raise ValueError(f"query {list(query.shape)} and key {list(key.shape)} must share B, N and D (self-attention)")
    if 0 in (query.shape[1], query.shape[3], key.shape[1]):
        raise ValueError(
            f"query {list(query.shape)} and key {list(key.shape)} need at least one head of at least one channel"
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"query has {query.shape[1]} heads, key {key.shape[1]}: Hq must be a multiple of Hkv")
    if query.shape[2] == 0:
        raise ValueError(
            f"query has shape {list(query.shape)}: an empty sequence has nothing to attend to, N >= 1 is needed"
        )
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"query, key and value have dtypes {query.dtype}, {key.dtype}, {value.dtype}: one for all is needed"
        )
    return query, key, value


def _check_mask(key_mask: Tensor, batch: int, number: int) -> None:
    if key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask has dtype {key_mask.dtype}: a bool mask is needed, True = the key may be seen")
    if key_mask.shape != (batch, number):
        raise ValueError(f"key_mask has shape {list(key_mask.shape)}: [B, N] = {[batch, number]} is needed")


def _check_segments(cu_seqlens: Tensor, number: int, dims: int) -> None:
    if dims > 1:
        raise ValueError(
            f"cu_seqlens with a {dims}-D grid: packed sequences are 1-D; drop grid, or pass images as a batch"
        )
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens={cu_seqlens!r}: an int32 or int64 tensor [S + 1] would be accepted")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens has shape {list(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}: "
            "[S + 1] int32 or int64 is needed"
        )
    if not torch.compiler.is_compiling():  # the operator checks again
        segment_lengths(cu_seqlens, number)
