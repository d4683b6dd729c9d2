"""The engines as custom operators: one node in a compiled or exported graph, whatever the length.

``farfield::multipole`` and ``farfield::multipole_backward`` are registered with fakes and a rule for
``torch.func.vmap``; the gradient (that of the lse included) is :class:`Multipole`. It is no formula registered with the
operator, because torch.func.vmap and checkpoints do not take such a formula where an argument is a list of tensors
(torch 2.13). Tensors come first, then the settings as plain integers, floats and strings. Under autocast the caller
casts (:func:`farfield.multipole_attention`): the dtype is the context's, not the operator's.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from farfield.ops.customop import differentiable_once, one_by_one
from farfield.ops.multipole import engines
from farfield.ops.multipole.settings import Result, Settings, Tensors
from farfield.ops.tiles import compute_dtype


def _settings(
    kind: str,
    grid: Sequence[int],
    block: Sequence[int],
    rank: Sequence[int],
    levels: int,
    causal: bool,
    count_bias: bool,
    query_rank: Sequence[int],
    sinks: int,
    scale: float,
    dropout: float,
    part: str,
) -> Settings:
    return Settings(
        kind=kind,
        grid=tuple(int(n) for n in grid),
        block=tuple(block),
        rank=tuple(rank),
        levels=None if levels < 0 else levels,
        causal=causal,
        count_bias=count_bias,
        query_rank=tuple(query_rank) or None,
        sinks=sinks,
        scale=scale,
        dropout=dropout,
        part=part,
    )


def _engine(engine: str, s: Settings, query: Tensor) -> ModuleType:
    # Chosen here and not by the caller, who may be traced, or exported and run on another machine.
    request = engines.Request.of(query, s.kind, s.query_rank is not None, s.dropout > 0)
    return engines.module(engines.choose(engine or None, request))


@torch.library.custom_op("farfield::multipole", mutates_args=())
def multipole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    level_bias: Tensor | None,
    seed: Tensor | None,
    weights: list[Tensor],
    kind: str,
    grid: list[int],
    block: list[int],
    rank: list[int],
    levels: int,
    causal: bool,
    count_bias: bool,
    query_rank: list[int],
    sinks: int,
    scale: float,
    dropout: float,
    part: str,
    engine: str,
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, N, D] and lse [B, Hq, N]; see :func:`farfield.multipole_attention`.

    ``levels`` is -1 for the published number, ``query_rank`` empty for none, ``engine`` empty for the
    fastest that can run the call.
    """
    s = _settings(kind, grid, block, rank, levels, causal, count_bias, query_rank, sinks, scale, dropout, part)
    with torch.autocast(query.device.type, enabled=False):
        tensors = Tensors(query, key, value, key_mask, cu_seqlens, level_bias, seed, weights)
        return _engine(engine, s, query).forward(s, tensors)


@multipole.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty(query.shape)
    return out, query.new_empty(query.shape[:-1], dtype=compute_dtype(query.dtype))


@torch.library.custom_op("farfield::multipole_backward", mutates_args=())
def multipole_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    level_bias: Tensor | None,
    seed: Tensor | None,
    weights: list[Tensor],
    kind: str,
    grid: list[int],
    block: list[int],
    rank: list[int],
    levels: int,
    causal: bool,
    count_bias: bool,
    query_rank: list[int],
    sinks: int,
    scale: float,
    dropout: float,
    part: str,
    engine: str,
) -> list[Tensor]:
    """Gradients of query, key, value, level_bias (empty where there is none), then of every weight."""
    s = _settings(kind, grid, block, rank, levels, causal, count_bias, query_rank, sinks, scale, dropout, part)
    with torch.autocast(query.device.type, enabled=False):
        tensors = Tensors(query, key, value, key_mask, cu_seqlens, level_bias, seed, weights)
        grads = _engine(engine, s, query).backward(s, tensors, Result(grad_out, grad_lse, out, lse))
    return [g.contiguous() for g in grads]


@multipole_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    level_bias: Tensor | None,
    seed: Tensor | None,
    weights: list[Tensor],
    *args: Any,
) -> list[Tensor]:
    bias = query.new_empty(0) if level_bias is None else level_bias.new_empty(level_bias.shape)
    return [x.new_empty(x.shape) for x in (query, key, value)] + [bias] + [w.new_empty(w.shape) for w in weights]


class Multipole(torch.autograd.Function):
    """The gradient of ``farfield::multipole``, differentiable once; composes with torch.func and torch.compile."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        settings: tuple[Any, ...],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        level_bias: Tensor | None,
        seed: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Output and lse of ``farfield::multipole``."""
        return multipole(query, key, value, key_mask, cu_seqlens, level_bias, seed, list(weights), *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keeps every tensor: the backward pass repeats the scores."""
        settings, *tensors = inputs
        ctx.settings = settings
        ctx.save_for_backward(*output, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        """One gradient (or None) per argument of :meth:`forward`."""
        out, lse, query, key, value, key_mask, cu_seqlens, level_bias, seed, *weights = ctx.saved_tensors

        def make() -> list[Tensor]:
            return multipole_backward(
                grad_out, grad_lse, out, lse, query, key, value, key_mask, cu_seqlens, level_bias, seed, list(weights),
                *ctx.settings,
            )  # fmt: skip

        sources = (grad_out, grad_lse, query, key, value, level_bias, *weights)
        grads = differentiable_once(make, sources, 'With impl="reference" it is to any order, in O(N²).')
        return None, *grads[:3], None, None, None if level_bias is None else grads[3], None, *grads[4:]


multipole.register_vmap(one_by_one(multipole))
multipole_backward.register_vmap(one_by_one(multipole_backward))
