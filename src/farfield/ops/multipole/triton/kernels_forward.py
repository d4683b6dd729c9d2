# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"
"""The forward kernel: one running softmax over the near tokens, the sinks and the visible cells of all levels."""

from __future__ import annotations

import triton
import triton.language as tl

from farfield.ops.multipole.triton.kernels_common import (
    BY_LENGTH,
    LN2,
    LOG2E,
    cell_bias,
    later_tiles,
    load_rows,
    query_rows,
    shown_keys,
    softmax_step,
    store_rows,
    token_of,
)


@triton.jit(do_not_specialize=BY_LENGTH)
def attend(
    query, key, value, cell_key, cell_value, counts, level_bias, out, lse,
    near, near_count, far, far_count, level_of_row, sink_slots, sink_set, token_of_slot, shown, valid,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, mask_batch, count_batch,
    number, heads, key_heads, packs, blocks, near_width, far_width, cells, levels, sink_width, scale,
    M: tl.constexpr, P: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PACK: tl.constexpr,
    NEAR: tl.constexpr, FAR: tl.constexpr, SINKS: tl.constexpr, CAUSAL: tl.constexpr, COUNT_BIAS: tl.constexpr,
    LEVEL_BIAS: tl.constexpr, MASKED: tl.constexpr, IN_ORDER: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """One program per tile of a block's queries, of one head or of PACK heads that share a key head.

    WHOLE promises that every slot holds a token that may be read and that tiles of keys fill the blocks.
    """
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
    q_start = query + batch * q_batch + (first_head + row_head).to(tl.int64)[:, None] * q_head
    d = tl.arange(0, WIDTH)
    q_at = q_start + token.to(tl.int64)[:, None] * q_token + d[None, :]
    q = tl.load(q_at, mask=there[:, None] & (d[None, :] < D), other=0.0)
    k_start = key + batch * k_batch + key_head.to(tl.int64) * k_head
    v_start = value + batch * v_batch + key_head.to(tl.int64) * v_head
    shown += batch * mask_batch
    factor = scale * LOG2E
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    if NEAR:
        reach = tl.load(near_count + block) * near_tiles
        skipped = later_tiles(tile, M, PACK, ROWS, KEYS, CAUSAL)
        # The table is read one step ahead, so that its latency hides behind a tile.
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
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
            if not WHOLE:
                scores = tl.where(k_there[None, :], scores, float("-inf"))
            if CAUSAL:
                scores = tl.where(k_slot[None, :] <= slot[:, None], scores, float("-inf"))
            top, total, acc = softmax_step(scores, v, top, total, acc, PRECISION)
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
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
            scores = tl.where(k_there[None, :], scores, float("-inf"))
            if CAUSAL:
                scores = tl.where(k_slot[None, :] <= slot[:, None], scores, float("-inf"))
            top, total, acc = softmax_step(scores, v, top, total, acc, PRECISION)
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
            if LEVEL_BIAS:
                level = tl.load(level_of_row + row, mask=inside, other=0)
                bias += tl.load(level_bias + level, mask=inside, other=0.0) * LOG2E
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor + bias[None, :]
            top, total, acc = softmax_step(scores, v, top, total, acc, PRECISION)
            row = following
    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    state = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    at = (batch * heads + first_head + row_head) * number + token
    store_rows(out, at, there, D, acc, D, WIDTH)
    tl.store(lse + at, state, mask=there)
