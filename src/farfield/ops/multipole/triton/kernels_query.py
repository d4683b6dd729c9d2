# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"
"""Backward kernels on the side of the queries: what a row carries, and the gradient of the queries."""

from __future__ import annotations

import triton
import triton.language as tl

from farfield.ops.multipole.triton.kernels_common import (
    BY_LENGTH,
    LOG2E,
    cell_bias,
    later_tiles,
    load_rows,
    query_rows,
    shown_keys,
    store_rows,
    token_of,
)


@triton.jit(do_not_specialize=BY_LENGTH)
def row_terms(
    out, lse, grad_out, grad_lse, base, delta, g_batch, g_head, g_token, number, heads, total,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Per row the lse in base 2 (inf where it saw nothing, so that its weights are 0) and the delta of its scores."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < total
    d = tl.arange(0, WIDTH)
    mask = there[:, None] & (d[None, :] < D)
    which = row // number
    at = (which // heads) * g_batch + (which % heads) * g_head + (row % number) * g_token
    grad = tl.load(grad_out + at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    value = tl.load(out + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    state = tl.load(lse + row, mask=there, other=float("-inf"))
    empty = state == float("-inf")
    term = tl.sum(grad * value, 1) - tl.load(grad_lse + row, mask=there, other=0.0)
    tl.store(base + row, tl.where(empty, float("inf"), state * LOG2E), mask=there)
    tl.store(delta + row, tl.where(empty, 0.0, term), mask=there)


@triton.jit
def weigh(q, k, v, g, base, delta, factor, bias, PRECISION: tl.constexpr):
    """[rows, keys] weights of the joint softmax and the gradients of the scores; ``bias`` hides by -inf."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor + bias
    weights = tl.exp2(scores - base[:, None])
    grads = weights * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return weights, grads


@triton.jit(do_not_specialize=BY_LENGTH)
def grad_query(
    query, key, value, cell_key, cell_value, counts, level_bias, grad_out, base, delta, into, grad_bias,
    near, near_count, far, far_count, level_of_row, sink_slots, sink_set, token_of_slot, shown, valid,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, g_batch, g_head, g_token,
    mask_batch, count_batch,
    number, heads, key_heads, packs, blocks, near_width, far_width, cells, levels, sink_width, scale,
    M: tl.constexpr, P: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PACK: tl.constexpr, LEVELS: tl.constexpr,
    NEAR: tl.constexpr, FAR: tl.constexpr, SINKS: tl.constexpr, CAUSAL: tl.constexpr, COUNT_BIAS: tl.constexpr,
    LEVEL_BIAS: tl.constexpr, MASKED: tl.constexpr, IN_ORDER: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """As the forward kernel, one program per tile of queries; with a level bias also its gradient, tile by tile."""
    tiles: tl.constexpr = (PACK * M + ROWS - 1) // ROWS
    near_tiles: tl.constexpr = (M + KEYS - 1) // KEYS
    pid = tl.program_id(0)
    tile = pid % tiles
    block = (pid // tiles) % blocks
    pack = pid // (tiles * blocks)
    batch = (pack // packs).to(tl.int64)
    first_head = pack % packs * PACK
    key_head = first_head // (heads // key_heads)
    row_head, slot, token, there = query_rows(tile, block, token_of_slot, number, M, PACK, ROWS, IN_ORDER)
    head = (first_head + row_head).to(tl.int64)
    d = tl.arange(0, WIDTH)
    mask = there[:, None] & (d[None, :] < D)
    q_at = (batch * q_batch + head * q_head + token.to(tl.int64) * q_token)[:, None] + d[None, :]
    g_at = (batch * g_batch + head * g_head + token.to(tl.int64) * g_token)[:, None] + d[None, :]
    q = tl.load(query + q_at, mask=mask, other=0.0)
    g = tl.load(grad_out + g_at, mask=mask, other=0.0)
    at = (batch * heads + head) * number + token
    row_base = tl.load(base + at, mask=there, other=float("inf"))
    row_delta = tl.load(delta + at, mask=there, other=0.0)
    k_start = key + batch * k_batch + key_head.to(tl.int64) * k_head
    v_start = value + batch * v_batch + key_head.to(tl.int64) * v_head
    shown += batch * mask_batch
    factor = scale * LOG2E
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    if NEAR:
        reach = tl.load(near_count + block) * near_tiles
        skipped = later_tiles(tile, M, PACK, ROWS, KEYS, CAUSAL)
        other = block
        for step in range(skipped, reach):
            after = step + 1
            following = tl.load(near + block * near_width + after // near_tiles, mask=after < reach, other=0)
            part = step % near_tiles - tl.where(step < near_tiles, skipped, 0)
            cols = part * KEYS + tl.arange(0, KEYS)
            k_slot = other * M + cols
            k_token_, k_there = token_of(k_slot, cols < M, token_of_slot, number, IN_ORDER)
            k_there = shown_keys(k_slot, k_there, shown, WHOLE, MASKED)
            k = load_rows(k_start, k_token_, k_there, k_token, D, WIDTH, WHOLE)
            v = load_rows(v_start, k_token_, k_there, v_token, D, WIDTH, WHOLE)
            if CAUSAL:
                bias = tl.where(k_there[None, :] & (k_slot[None, :] <= slot[:, None]), 0.0, float("-inf"))
            else:
                bias = tl.where(k_there, 0.0, float("-inf"))[None, :]
            _, grads = weigh(q, k, v, g, row_base, row_delta, factor, bias, PRECISION)
            acc = tl.dot(grads.to(k.dtype), k, acc, input_precision=PRECISION)
            other = following
    if SINKS:
        valid += batch * mask_batch
        which = tl.load(sink_set + block)
        for start in range(0, tl.where(which >= 0, sink_width, 0), KEYS):
            cols = start + tl.arange(0, KEYS)
            k_slot = tl.load(sink_slots + which * sink_width + cols, mask=cols < sink_width, other=-1)
            k_token_, k_there = token_of(k_slot, k_slot >= 0, token_of_slot, number, IN_ORDER)
            k_there = shown_keys(k_slot, k_there, valid, False, MASKED)
            k = load_rows(k_start, k_token_, k_there, k_token, D, WIDTH, False)
            v = load_rows(v_start, k_token_, k_there, v_token, D, WIDTH, False)
            if CAUSAL:
                bias = tl.where(k_there[None, :] & (k_slot[None, :] <= slot[:, None]), 0.0, float("-inf"))
            else:
                bias = tl.where(k_there, 0.0, float("-inf"))[None, :]
            _, grads = weigh(q, k, v, g, row_base, row_delta, factor, bias, PRECISION)
            acc = tl.dot(grads.to(k.dtype), k, acc, input_precision=PRECISION)
    by_level = tl.zeros([LEVELS], tl.float32)
    if FAR:
        store = (batch * key_heads + key_head) * cells * D
        counts += batch * count_batch
        level_bias += first_head * levels
        reach = tl.load(far_count + block) * P
        cols = tl.arange(0, CELLS)
        row = tl.load(far + block * far_width + cols // P, mask=cols < reach, other=0)
        for start in range(0, reach, CELLS):
            cols = start + tl.arange(0, CELLS)
            inside = cols < reach
            after = cols + CELLS
            following = tl.load(far + block * far_width + after // P, mask=after < reach, other=0)
            cell = row * P + cols % P
            k = load_rows(cell_key + store, cell, inside, D, D, WIDTH, False)
            v = load_rows(cell_value + store, cell, inside, D, D, WIDTH, False)
            bias = cell_bias(counts, cell, inside, COUNT_BIAS)
            level = tl.load(level_of_row + row, mask=inside, other=0)
            if LEVEL_BIAS:
                bias += tl.load(level_bias + level, mask=inside, other=0.0) * LOG2E
            _, grads = weigh(q, k, v, g, row_base, row_delta, factor, bias[None, :], PRECISION)
            acc = tl.dot(grads.to(k.dtype), k, acc, input_precision=PRECISION)
            if LEVEL_BIAS:
                same = level[:, None] == tl.arange(0, LEVELS)[None, :]
                by_level += tl.sum(tl.where(same, tl.sum(grads, 0)[:, None], 0.0), 0)
            row = following
    store_rows(into, at, there, D, acc * scale, D, WIDTH)
    if LEVEL_BIAS:
        tl.store(grad_bias + pid.to(tl.int64) * LEVELS + tl.arange(0, LEVELS), by_level)
