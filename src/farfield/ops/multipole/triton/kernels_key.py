# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"
"""Backward kernels on the side of the keys: every key sums over the query blocks that read it, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from farfield.ops.multipole.triton.kernels_common import (
    BY_LENGTH,
    LOG2E,
    cell_bias,
    load_rows,
    query_rows,
    shown_keys,
    store_rows,
    token_of,
)


@triton.jit
def query_tile(
    query, grad_out, base, delta, tile, block, batch, first_head, token_of_slot,
    q_batch, q_head, q_token, g_batch, g_head, g_token, number, heads,
    M: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PACK: tl.constexpr, IN_ORDER: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Slots, queries, output gradients, lse (base 2) and delta of one tile of a block's queries."""
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
    return slot, q, g, row_base, row_delta


@triton.jit
def add_from_cells(tile, grads, cell, child, counts, leaf, inside, SHARED: tl.constexpr, S: tl.constexpr,
                   D: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Adds what reaches tokens from the gradients of their level 1 cells."""
    d = tl.arange(0, WIDTH)
    mask = inside[:, None] & (d[None, :] < D)
    count = tl.load(counts + cell, mask=inside, other=1.0)
    part = tl.load(grads + cell.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0)
    part = part / tl.maximum(count, 1.0)[:, None]
    if SHARED:
        part *= tl.load(leaf + child[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32) * S
    return tile + part


@triton.jit(do_not_specialize=BY_LENGTH)
def grad_blocks(
    query, key, value, grad_out, base, delta, grad_key, grad_value,
    cell_grad_key, cell_grad_value, counts, key_leaf, value_leaf,
    first, units, cell_of_place, child_of_place, token_of_slot, shown,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, g_batch, g_head, g_token,
    mask_batch, count_batch, leaf_head, out_rows,
    number, heads, key_heads, blocks, cells, scale,
    M: tl.constexpr, P: tl.constexpr, S: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PACK: tl.constexpr,
    NEAR: tl.constexpr, FROM_CELLS: tl.constexpr, SHARED: tl.constexpr, BY_SLOT: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, IN_ORDER: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of a leaf block: from the blocks that read it, and from its level 1 cells.

    One program per tile of its keys. BY_SLOT writes in block order, otherwise in the order of the tokens.
    """
    tiles: tl.constexpr = (M + KEYS - 1) // KEYS
    query_tiles: tl.constexpr = (PACK * M + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    block = (pid // tiles) % blocks
    which = (pid // (tiles * blocks)).to(tl.int64)
    batch = which // key_heads
    key_head = which % key_heads
    place = pid % tiles * KEYS + tl.arange(0, KEYS)
    slot = block * M + place
    token, there = token_of(slot, place < M, token_of_slot, number, IN_ORDER)
    readable = shown_keys(slot, there, shown + batch * mask_batch, WHOLE, MASKED)
    k = load_rows(key + batch * k_batch + key_head * k_head, token, readable, k_token, D, WIDTH, WHOLE)
    v = load_rows(value + batch * v_batch + key_head * v_head, token, readable, v_token, D, WIDTH, WHOLE)
    factor = scale * LOG2E
    acc_k = tl.zeros([KEYS, WIDTH], tl.float32)
    acc_v = tl.zeros([KEYS, WIDTH], tl.float32)
    if NEAR:
        repeat = heads // key_heads
        of_unit = repeat // PACK * query_tiles
        low = tl.load(first + block)
        steps = (tl.load(first + block + 1) - low) * of_unit
        other = tl.load(units + low, mask=steps > 0, other=0)
        for step in range(0, steps):
            after = step + 1
            following = tl.load(units + low + after // of_unit, mask=after < steps, other=0)
            first_head = key_head * repeat + (step % of_unit) // query_tiles * PACK
            q_slot, q, g, row_base, row_delta = query_tile(
                query, grad_out, base, delta, step % query_tiles, other, batch, first_head, token_of_slot,
                q_batch, q_head, q_token, g_batch, g_head, g_token, number, heads, M, D, WIDTH, PACK, IN_ORDER, ROWS,
            )  # fmt: skip
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor
            if not WHOLE:
                scores = tl.where(readable[:, None], scores, float("-inf"))
            if CAUSAL:
                scores = tl.where(slot[:, None] <= q_slot[None, :], scores, float("-inf"))
            weights = tl.exp2(scores - row_base[None, :])
            acc_v = tl.dot(weights.to(g.dtype), g, acc_v, input_precision=PRECISION)
            grads = weights * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - row_delta[None, :])
            acc_k = tl.dot(grads.to(q.dtype), q, acc_k, input_precision=PRECISION)
            other = following
        acc_k *= scale
    if FROM_CELLS:
        inside = readable & (place < M)
        cell = block * P + tl.load(cell_of_place + place, mask=place < M, other=0)
        child = tl.load(child_of_place + place, mask=place < M, other=0)
        store = which * cells * D
        counts += batch * count_batch
        leaf = key_head * leaf_head
        acc_k = add_from_cells(
            acc_k, cell_grad_key + store, cell, child, counts, key_leaf + leaf, inside, SHARED, S, D, WIDTH
        )
        acc_v = add_from_cells(
            acc_v, cell_grad_value + store, cell, child, counts, value_leaf + leaf, inside, SHARED, S, D, WIDTH
        )
    into = which * out_rows * D
    if BY_SLOT:
        store_rows(grad_key + into, slot, place < M, D, acc_k, D, WIDTH)
        store_rows(grad_value + into, slot, place < M, D, acc_v, D, WIDTH)
    else:
        store_rows(grad_key + into, token, there, D, acc_k, D, WIDTH)
        store_rows(grad_value + into, token, there, D, acc_v, D, WIDTH)


@triton.jit(do_not_specialize=BY_LENGTH)
def grad_pieces(
    query, key, value, counts, level_bias, grad_out, base, delta, part_key, part_value,
    units, piece_row, piece_low, piece_high, level_of_row, sink_slots, token_of_slot, valid,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, g_batch, g_head, g_token,
    mask_batch, count_batch,
    number, heads, key_heads, pieces, levels, scale,
    M: tl.constexpr, MEMBERS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PACK: tl.constexpr,
    SINKS: tl.constexpr, CAUSAL: tl.constexpr, COUNT_BIAS: tl.constexpr, LEVEL_BIAS: tl.constexpr,
    MASKED: tl.constexpr, IN_ORDER: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of the cells of a group, or of a set of sinks, from one piece of the blocks that read it.

    Keys lie along the columns of all products: a group has few cells, and the matrix units take few columns but not
    few rows. The sums over the pieces of a row are :func:`add_pieces`'.
    """
    tiles: tl.constexpr = (MEMBERS + KEYS - 1) // KEYS
    query_tiles: tl.constexpr = (PACK * M + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    piece = (pid // tiles) % pieces
    which = (pid // (tiles * pieces)).to(tl.int64)
    batch = which // key_heads
    key_head = which % key_heads
    member = pid % tiles * KEYS + tl.arange(0, KEYS)
    row = tl.load(piece_row + piece)
    at = row * MEMBERS + member
    k_start = key + batch * k_batch + key_head * k_head
    v_start = value + batch * v_batch + key_head * v_head
    bias = tl.zeros([KEYS], tl.float32)
    if SINKS:
        slot = tl.load(sink_slots + at, mask=member < MEMBERS, other=-1)
        k_row, there = token_of(slot, slot >= 0, token_of_slot, number, IN_ORDER)
        there = shown_keys(slot, there, valid + batch * mask_batch, False, MASKED)
        bias = tl.where(there, 0.0, float("-inf"))
    else:
        slot = at
        k_row = at
        there = member < MEMBERS
        bias = cell_bias(counts + batch * count_batch, at, there, COUNT_BIAS)
    k = load_rows(k_start, k_row, there, k_token, D, WIDTH, False)
    v = load_rows(v_start, k_row, there, v_token, D, WIDTH, False)
    factor = scale * LOG2E
    acc_k = tl.zeros([WIDTH, KEYS], tl.float32)
    acc_v = tl.zeros([WIDTH, KEYS], tl.float32)
    repeat = heads // key_heads
    of_unit = repeat // PACK * query_tiles
    low = tl.load(piece_low + piece)
    steps = (tl.load(piece_high + piece) - low) * of_unit
    other = tl.load(units + low)
    for step in range(0, steps):
        after = step + 1
        following = tl.load(units + low + after // of_unit, mask=after < steps, other=0)
        first_head = key_head * repeat + (step % of_unit) // query_tiles * PACK
        q_slot, q, g, row_base, row_delta = query_tile(
            query, grad_out, base, delta, step % query_tiles, other, batch, first_head, token_of_slot,
            q_batch, q_head, q_token, g_batch, g_head, g_token, number, heads, M, D, WIDTH, PACK, IN_ORDER, ROWS,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor + bias[None, :]
        if LEVEL_BIAS:
            scores += tl.load(level_bias + first_head * levels + tl.load(level_of_row + row)) * LOG2E
        if SINKS and CAUSAL:
            scores = tl.where(slot[None, :] <= q_slot[:, None], scores, float("-inf"))
        weights = tl.exp2(scores - row_base[:, None])
        acc_v = tl.dot(tl.trans(g), weights.to(g.dtype), acc_v, input_precision=PRECISION)
        grads = weights * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - row_delta[:, None])
        acc_k = tl.dot(tl.trans(q), grads.to(q.dtype), acc_k, input_precision=PRECISION)
        other = following
    d = tl.arange(0, WIDTH)
    into = ((which * pieces + piece) * MEMBERS + member)[None, :] * D + d[:, None]
    mask = (member < MEMBERS)[None, :] & (d[:, None] < D)
    tl.store(part_key + into, acc_k * scale, mask=mask)
    tl.store(part_value + into, acc_v, mask=mask)


@triton.jit(do_not_specialize=BY_LENGTH)
def add_pieces(part_key, part_value, sum_key, sum_value, start, rows, pieces, SIZE: tl.constexpr, STEP: tl.constexpr):
    """Sums the pieces of every row, in order; 0 for a row that nobody reads. SIZE numbers to a row."""
    tiles: tl.constexpr = (SIZE + STEP - 1) // STEP
    pid = tl.program_id(0)
    at = pid % tiles * STEP + tl.arange(0, STEP)
    row = (pid // tiles) % rows
    which = (pid // (tiles * rows)).to(tl.int64)
    inside = at < SIZE
    total_key = tl.zeros([STEP], tl.float32)
    total_value = tl.zeros([STEP], tl.float32)
    for piece in range(tl.load(start + row), tl.load(start + row + 1)):
        source = (which * pieces + piece) * SIZE + at
        total_key += tl.load(part_key + source, mask=inside, other=0.0)
        total_value += tl.load(part_value + source, mask=inside, other=0.0)
    into = (which * rows + row) * SIZE + at
    tl.store(sum_key + into, total_key, mask=inside)
    tl.store(sum_value + into, total_value, mask=inside)
