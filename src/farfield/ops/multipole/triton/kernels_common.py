# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"
"""Device functions that the kernels share: where rows lie, how they are loaded, what is seen, one softmax step.

Names in all kernels: M tokens of a leaf block, P cells of a group, D head width and WIDTH the power of two that holds
it, ROWS queries and KEYS keys of a tile. PACK query heads that share a key head lie in one tile of queries, head after
head, where a block alone would leave most of the tile empty. Scores are in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

BY_LENGTH = (
    "number", "total", "blocks", "cells", "levels", "near_width", "far_width", "sink_width", "rows", "pieces",
    "programs", "exact_cells", "exact_first", "out_rows", "mask_batch", "count_batch",
)  # fmt: skip
"""Arguments that vary with the length. Triton would compile a kernel anew whenever one becomes 1 or a multiple of 16,
which gains nothing here: addresses that are to be read in wide loads are multiples of the head width. Strides of query,
key and value stay out of the list, since the width of the loads depends on them."""

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def token_of(slot, inside, token_of_slot, number, IN_ORDER: tl.constexpr):
    """The token at each slot and whether there is one."""
    if IN_ORDER:
        token = slot
        there = inside & (slot < number)
    else:
        token = tl.load(token_of_slot + slot, mask=inside, other=-1)
        there = inside & (token >= 0)
    return token, there


@triton.jit
def load_rows(start, row, there, stride, D: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """[rows, WIDTH] of a matrix with ``stride`` between rows; 0 where there is none, so that nothing hidden is read."""
    d = tl.arange(0, WIDTH)
    at = start + row.to(tl.int64)[:, None] * stride + d[None, :]
    if WHOLE and D == WIDTH:
        tile = tl.load(at)
    elif D == WIDTH:
        tile = tl.load(at, mask=there[:, None], other=0.0)
    else:
        tile = tl.load(at, mask=there[:, None] & (d[None, :] < D), other=0.0)
    return tile


@triton.jit
def store_rows(start, row, there, stride, tile, D: tl.constexpr, WIDTH: tl.constexpr):
    """Writes what :func:`load_rows` reads."""
    d = tl.arange(0, WIDTH)
    at = start + row.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, tile.to(start.dtype.element_ty), mask=there[:, None] & (d[None, :] < D))


@triton.jit
def query_rows(tile, block, token_of_slot, number, M: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr,
               IN_ORDER: tl.constexpr):  # fmt: skip
    """Packed head, slot and token of the rows of a tile of a block's queries, and whether there is one."""
    at = tile * ROWS + tl.arange(0, ROWS)
    if PACK == 1:
        head = tl.zeros_like(at)
        place = at
    else:
        head = at // M
        place = at - head * M
    slot = block * M + place
    token, there = token_of(slot, at < PACK * M, token_of_slot, number, IN_ORDER)
    return head, slot, token, there


@triton.jit
def later_tiles(tile, M: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
                CAUSAL: tl.constexpr):  # fmt: skip
    """Tiles at the end of a block's own keys that lie behind all queries of a tile."""
    if CAUSAL and PACK == 1:
        skipped = (M + KEYS - 1) // KEYS - (tl.minimum((tile + 1) * ROWS, M) + KEYS - 1) // KEYS
    else:
        skipped = tile * 0
    return skipped


@triton.jit
def shown_keys(slot, there, shown, WHOLE: tl.constexpr, MASKED: tl.constexpr):
    """Which key slots of a batch entry may be read; ``shown`` points at the entry's bytes."""
    if MASKED and not WHOLE:
        there = there & (tl.load(shown + slot, mask=there, other=0) != 0)
    return there


@triton.jit
def cell_bias(counts, cell, inside, COUNT_BIAS: tl.constexpr):
    """What a cell's score is biased by (base 2): the log of its count, or 0; -inf where it is empty."""
    count = tl.load(counts + cell, mask=inside, other=0.0)
    bias = tl.zeros_like(count)
    if COUNT_BIAS:
        bias = tl.log2(tl.maximum(count, 1.0))
    return tl.where(count > 0, bias, float("-inf"))


@triton.jit
def softmax_step(scores, value, top, total, out, PRECISION: tl.constexpr):
    """Takes one tile of keys into the running maximum, sum and output of the rows."""
    new = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    out = tl.dot(weights.to(value.dtype), value, out * shrink[:, None], input_precision=PRECISION)
    return new, total, out
