"""One call of the Triton engine: tables, cells, and the launches of the attention kernels, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from farfield.ops.multipole.plan import packing
from farfield.ops.multipole.settings import Result, Settings, Tensors
from farfield.ops.multipole.summary import SharedSummary, check_levels, unpack
from farfield.ops.multipole.triton import interpreted, tuning
from farfield.ops.multipole.triton.cells import Cells, Rows, TorchCells, build, fused, leaf_weights, send_down
from farfield.ops.multipole.triton.kernels_forward import attend
from farfield.ops.multipole.triton.kernels_key import add_pieces, grad_blocks, grad_pieces
from farfield.ops.multipole.triton.kernels_query import grad_query, row_terms
from farfield.ops.multipole.triton.tables import Readers, make_tables
from farfield.ops.multipole.triton.tuning import Config

PACK_BELOW = 64
"""Leaf blocks smaller than this share a tile of queries among the heads of one key head."""

ADD_STEP = 1024
"""Numbers that one program adds up over the pieces of a row."""


def _rows(x: Tensor) -> Tensor:
    """With channels side by side, as the kernels load them."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Call:
    """The tensors, tables and constants that the kernels of a call share."""

    def __init__(self, s: Settings, tensors: Tensors) -> None:
        query, key, value, _, cu_seqlens, level_bias, _, weights = tensors
        lengths, key_mask = packing(cu_seqlens, tensors.key_mask, key.shape[2])
        self.s = s
        self.query, self.key, self.value = _rows(query), _rows(key), _rows(value)
        self.batch, self.heads, self.number, self.head_dim = query.shape
        self.key_heads = key.shape[1]
        self.tables = make_tables(s.grid, lengths, s.block, s.rank, s.levels, s.causal, s.sinks, key.device)
        self.layout = self.tables.plan.layout
        self.summary = unpack(s.kind, weights)
        if s.far:
            check_levels(self.summary, level_bias, self.layout, key)
        self.valid, shown = self._masks(key_mask)
        self.rows = Rows(self.tables, self.key, self.value, shown)
        self.far = s.far and self.layout.levels > 0 and self.tables.far.shape[1] > 0
        self.sinks = self.tables.sinks if s.near else None
        self.torch_cells: TorchCells | None = None
        if not self.far:
            none = key.new_empty(0, 0, self.head_dim)
            self.cells = Cells(none, none, key.new_empty(1, 0, dtype=torch.float32))
        elif fused(self.summary):
            self.cells = build(self.rows, self.summary)
        else:
            self.torch_cells = TorchCells(self.rows, self.summary)
            self.cells = self.torch_cells.cells
        self.level_bias = self.cells.counts
        if level_bias is not None and self.far:
            self.level_bias = level_bias[: self.layout.levels].T.to(torch.float32).contiguous()
        self.biased = level_bias is not None and self.far
        repeat, block = self.heads // self.key_heads, self.layout.block_tokens
        self.pack = 1 if self.biased or block >= PACK_BELOW else repeat
        self.packs = self.heads // self.pack
        self.tile_tokens = self.pack * block

    def _masks(self, key_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Bytes [B', slots]: tokens that may be read, and those of them that are no sinks; None where all are."""
        plan = self.tables.plan
        if key_mask is None and plan.is_sink is None:
            return None, None
        valid, shown = plan.readable(key_mask)
        return valid.contiguous().view(torch.uint8), shown.contiguous().view(torch.uint8)

    def run(self, kernel: str, keys: int, programs: Callable[[Config], int], start: Callable[[Config], None]) -> None:
        """Launches a kernel with tuned tiles of at most about ``keys`` keys."""
        configs = tuning.candidates(kernel, self.head_dim, self.query.dtype, self.tile_tokens, keys)
        key = tuning.Key(
            kernel, self.query.device.index or 0, self.head_dim, self.query.dtype, self.layout.block_tokens, self.pack,
            self.layout.dims, self.s.causal, self.layout.cells_per_group, self.s.sinks, self.s.part,
        )  # fmt: skip
        tuning.run(key, configs, programs, start, interpreted())

    def strides(self, *tensors: Tensor) -> list[int]:
        """Batch, head and token strides of each."""
        return [n for x in tensors for n in x.stride()[:3]]

    @property
    def masks(self) -> tuple[Tensor, Tensor]:
        """What near keys and sinks are hidden by; any pointers where nothing is."""
        near = self.tables.near
        return (near if self.rows.shown is None else self.rows.shown), (near if self.valid is None else self.valid)

    def lists(self) -> list[Tensor]:
        """Tables of the kernels with a program per tile of queries."""
        t, near = self.tables, self.tables.near
        sinks = (near, near) if self.sinks is None else (self.sinks.slots, self.sinks.set_of_block)
        return [
            t.near, t.near_count, t.far, t.far_count, t.level_of_row, *sinks, self.rows.token_of_slot, *self.masks
        ]  # fmt: skip

    def sizes(self) -> list[int | float]:
        """Numbers of the kernels with a program per tile of queries."""
        t = self.tables
        sinks = 0 if self.sinks is None else self.sinks.slots.shape[1]
        return [
            self.number, self.heads, self.key_heads, self.packs, self.layout.blocks, t.near.shape[1], t.far.shape[1],
            t.cells, self.layout.levels, sinks, self.s.scale,
        ]  # fmt: skip

    def constants(self) -> dict[str, Any]:
        """Constants of every attention kernel."""
        return {
            "M": self.layout.block_tokens,
            "D": self.head_dim,
            "WIDTH": max(16, 1 << (self.head_dim - 1).bit_length()),
            "PACK": self.pack,
            "CAUSAL": self.s.causal,
            "MASKED": self.rows.shown is not None,
            "IN_ORDER": self.rows.in_order,
            "PRECISION": _precision(self.query.dtype),
        }

    def seen(self, config: Config) -> dict[str, Any]:
        """Further constants of the kernels with a program per tile of queries."""
        return {
            "P": self.layout.cells_per_group,
            "NEAR": self.s.near,
            "FAR": self.far,
            "SINKS": self.sinks is not None,
            "COUNT_BIAS": self.s.count_bias,
            "LEVEL_BIAS": self.biased,
            "WHOLE": self.whole(config),
            "ROWS": config.rows,
            "KEYS": config.keys,
            "CELLS": config.cells,
            **_run(config),
        }

    def whole(self, config: Config) -> bool:
        """Whether every tile of near keys is full of tokens that may be read."""
        plan = self.tables.plan
        return plan.whole and self.rows.shown is None and self.layout.block_tokens % config.keys == 0

    def programs(self, config: Config) -> int:
        """Tiles of queries."""
        return self.batch * self.packs * self.layout.blocks * -(-self.tile_tokens // config.rows)


def _run(config: Config) -> dict[str, int]:
    return {"num_warps": config.warps, "num_stages": config.stages}


def _precision(dtype: torch.dtype) -> str:
    """Products of float32 use tf32 only where torch may, too.

    Both of torch's ways of allowing it (fp32_precision and the older set_float32_matmul_precision, allow_tf32) can be
    read here, while get_float32_matmul_precision raises once the newer one was used.
    """
    return "tf32" if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def forward(s: Settings, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, N, D] in the dtype of the query and lse [B, Hq, N] in float32."""
    query = tensors.query
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if query.shape[0] == 0:
        return out, lse
    call = _Call(s, tensors)
    cells, rows = call.cells, call.rows

    def start(config: Config) -> None:
        attend[(call.programs(config),)](
            call.query, call.key, call.value, cells.key, cells.value, cells.counts, call.level_bias, out, lse,
            *call.lists(), *call.strides(call.query, call.key, call.value), rows.mask_stride, cells.count_stride,
            *call.sizes(), **call.constants(), **call.seen(config),
        )  # fmt: skip

    call.run("forward", call.layout.block_tokens, call.programs, start)
    return out, lse


def backward(s: Settings, tensors: Tensors, result: Result) -> list[Tensor]:
    """Gradients of query, key, value, level_bias (empty where there is none) and of each weight, in this order."""
    query, key, value, _, _, level_bias, _, weights = tensors
    grad_out, grad_lse, out, lse = result
    none = query.new_zeros(0) if level_bias is None else torch.zeros_like(level_bias)
    if query.shape[0] == 0:
        return [*(torch.zeros_like(x) for x in (query, key, value)), none, *(torch.zeros_like(w) for w in weights)]
    call = _Call(s, tensors)
    back = _Backward(call, _rows(grad_out), grad_lse, out, lse)
    grad_q, by_level = back.of_queries()
    if level_bias is not None and by_level is not None:
        none[: call.layout.levels] = by_level.T.to(none.dtype)
    return [grad_q, *back.of_keys(weights, none)]


class _Backward:
    """The launches of a backward pass."""

    def __init__(self, call: _Call, grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor) -> None:
        self.call = call
        self.grad_out = grad_out
        out, lse, grad_lse = out.contiguous(), lse.contiguous(), grad_lse.to(torch.float32).contiguous()
        self.base, self.delta = torch.empty_like(lse), torch.empty_like(lse)
        rows = 32
        width = call.constants()["WIDTH"]
        row_terms[(-(-lse.numel() // rows),)](
            out, lse, grad_out, grad_lse, self.base, self.delta, *call.strides(grad_out), call.number, call.heads,
            lse.numel(), D=call.head_dim, WIDTH=width, ROWS=rows,
        )  # fmt: skip

    def of_queries(self) -> tuple[Tensor, Tensor | None]:
        """Gradient of the queries, and of the level bias [Hq, levels]."""
        call, cells = self.call, self.call.cells
        into = call.query.new_empty(call.query.shape)
        levels = max(1, 1 << (call.layout.levels - 1).bit_length()) if call.biased else 1
        parts: list[Tensor] = []

        def start(config: Config) -> None:
            programs = call.programs(config)
            part = self.base.new_empty(programs if call.biased else 0, levels)
            parts[:] = [part]
            grad_query[(programs,)](
                call.query, call.key, call.value, cells.key, cells.value, cells.counts, call.level_bias, self.grad_out,
                self.base, self.delta, into, part, *call.lists(),
                *call.strides(call.query, call.key, call.value, self.grad_out), call.rows.mask_stride,
                cells.count_stride, *call.sizes(), LEVELS=levels, **call.constants(), **call.seen(config),
            )  # fmt: skip

        call.run("grad_query", call.layout.block_tokens, call.programs, start)
        if not call.biased:
            return into, None
        by_level = parts[0].view(call.batch, call.heads, -1, levels).sum((0, 2))
        return into, by_level[:, : call.layout.levels]

    def of_keys(self, weights: list[Tensor], bias: Tensor) -> list[Tensor]:
        """Gradients of keys, values, then ``bias`` as it is, then of the weights of the summary."""
        call, t = self.call, self.call.tables
        cell_grads = None
        grad_weights = [torch.zeros_like(w) for w in weights]
        if call.far:
            cell_grads = self._of_rows(t.far_readers, call.layout.cells_per_group, sinks=False)
            if call.torch_cells is None:
                grad_weights = send_down(call.rows, call.summary, call.cells, *cell_grads) or grad_weights
        if call.torch_cells is None or cell_grads is None:
            sides = self._of_blocks(cell_grads, by_slot=False)
        else:
            slots = self._of_blocks(None, by_slot=True)
            grad_weights = call.torch_cells.send_down(*cell_grads, *slots)
            sides = [call.tables.plan.to_tokens(x).to(call.key.dtype) for x in slots]
        if call.sinks is not None:
            self._add_sinks(sides)
        return [*sides, bias, *grad_weights]

    def _add_sinks(self, sides: list[Tensor]) -> None:
        """Sinks lie in no block's near field and in no cell: what they get from their readers is all they get."""
        sinks = self.call.sinks
        assert sinks is not None
        grads = self._of_rows(sinks.readers, sinks.slots.shape[1], sinks=True)
        slots = sinks.slots.flatten()
        there = (slots >= 0).nonzero()[:, 0]
        slots = slots[there].long()
        tokens = slots if self.call.tables.slots is None else self.call.tables.slots[slots].long()
        for side, grad in zip(sides, grads, strict=True):
            part = grad.view(*side.shape[:2], -1, side.shape[3]).index_select(2, there)
            side.index_copy_(2, tokens, part.to(side.dtype))

    def _of_rows(self, readers: Readers, members: int, sinks: bool) -> tuple[Tensor, Tensor]:
        """Gradients [G, rows * members, D] in float32 of the cells, or of the sets of sinks."""
        call, cells, t = self.call, self.call.cells, self.call.tables
        groups, width = call.batch * call.key_heads, call.head_dim
        parts = [self.base.new_empty(groups, readers.pieces, members, width) for _ in range(2)]
        key, value = (call.key, call.value) if sinks else (cells.key, cells.value)
        step = call.key_heads * t.cells * width
        strides = call.strides(key, value) if sinks else [step, t.cells * width, width] * 2
        slots = call.sinks.slots if sinks and call.sinks is not None else t.near

        def programs(config: Config) -> int:
            return groups * readers.pieces * -(-members // config.keys)

        def start(config: Config) -> None:
            grad_pieces[(programs(config),)](
                call.query, key, value, cells.counts, call.level_bias, self.grad_out, self.base, self.delta, *parts,
                readers.units, readers.row, readers.low, readers.high, t.level_of_row, slots, call.rows.token_of_slot,
                call.masks[1], *call.strides(call.query), *strides, *call.strides(self.grad_out),
                call.rows.mask_stride, cells.count_stride,
                call.number, call.heads, call.key_heads, readers.pieces, call.layout.levels, call.s.scale,
                MEMBERS=members, SINKS=sinks, COUNT_BIAS=call.s.count_bias, LEVEL_BIAS=call.biased and not sinks,
                ROWS=config.rows, KEYS=config.keys, **call.constants(), **_run(config),
            )  # fmt: skip

        if readers.pieces and sinks:
            # By the number asked for, not by that of a short sequence: choices do not depend on the length.
            call.run("grad_sinks", call.s.sinks, programs, start)
        elif readers.pieces:
            call.run("grad_pieces", members, programs, start)
        sums = [self.base.new_empty(groups, readers.rows * members, width) for _ in range(2)]
        size = members * width
        add_pieces[(groups * readers.rows * -(-size // ADD_STEP),)](
            *parts, *sums, readers.start, readers.rows, readers.pieces, SIZE=size, STEP=ADD_STEP
        )
        return sums[0], sums[1]

    def _of_blocks(self, cell_grads: tuple[Tensor, Tensor] | None, by_slot: bool) -> list[Tensor]:
        """Gradients of keys and values from the near field, and from level 1 where its gradients are given.

        [B, Hkv, N, D] in the dtype of the keys; ``by_slot``: in block order and float32.
        """
        call, cells, t = self.call, self.call.cells, self.call.tables
        slots = call.layout.blocks * call.layout.block_tokens
        shape = (call.batch, call.key_heads, slots if by_slot else call.number, call.head_dim)
        dtype = torch.float32 if by_slot else call.key.dtype
        sides = [call.key.new_empty(shape, dtype=dtype) for _ in range(2)]
        grads = cell_grads or (self.base, self.base)
        leaf = leaf_weights(call.summary, call.key)
        block, group = call.layout.block_tokens, call.layout.cells_per_group

        def programs(config: Config) -> int:
            return call.batch * call.key_heads * call.layout.blocks * -(-block // config.keys)

        def start(config: Config) -> None:
            grad_blocks[(programs(config),)](
                call.query, call.key, call.value, self.grad_out, self.base, self.delta, *sides, *grads, cells.counts,
                *leaf[:2], t.near_readers.first, t.near_readers.units, t.cell, t.child, call.rows.token_of_slot,
                call.masks[0], *call.strides(call.query, call.key, call.value, self.grad_out),
                call.rows.mask_stride, cells.count_stride, leaf[2], shape[2],
                call.number, call.heads, call.key_heads, call.layout.blocks, t.cells, call.s.scale,
                P=group, S=block // group, NEAR=call.s.near, FROM_CELLS=cell_grads is not None,
                SHARED=isinstance(call.summary, SharedSummary), BY_SLOT=by_slot, WHOLE=call.whole(config),
                ROWS=config.rows, KEYS=config.keys, **call.constants(), **_run(config),
            )  # fmt: skip

        call.run("grad_blocks", block, programs, start)
        return sides
