# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"
"""The pyramid of mean and shared summaries, several levels to a launch: up from tokens to cells, down with gradients.

A program owns a few cells of the launch's top level and everything below them. Children follow one another in its
tables, so that going up is a sum over one axis of a register tile and going down a broadcast along it. Sums are
weighted by the counts of valid tokens; weights of a :class:`SharedSummary` multiply on top, averages otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from farfield.ops.multipole.triton.kernels_common import BY_LENGTH, load_rows, shown_keys, store_rows, token_of


@triton.jit
def child_weights(weights, SIZE: tl.constexpr, CHILDREN: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """[SIZE, WIDTH] the weight of each child, for children that follow one another."""
    d = tl.arange(0, WIDTH)
    child = tl.arange(0, SIZE) % CHILDREN
    return tl.load(weights + child[:, None] * D + d[None, :], mask=d[None, :] < D, other=0.0).to(tl.float32)


@triton.jit
def step_up(x, n, up, SIZE: tl.constexpr, CHILDREN: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
            SHARED: tl.constexpr):  # fmt: skip
    """SIZE cells and their counts made from the level below."""
    x = x * n[:, None]
    if SHARED:
        x = x * (child_weights(up, SIZE * CHILDREN, CHILDREN, D, WIDTH) * CHILDREN)
    x = tl.sum(tl.reshape(x, [SIZE, CHILDREN, WIDTH]), 1)
    n = tl.sum(tl.reshape(n, [SIZE, CHILDREN]), 1)
    return x / tl.maximum(n, 1.0)[:, None], n


@triton.jit
def step_down(grad, n, SIZE: tl.constexpr, CHILDREN: tl.constexpr, WIDTH: tl.constexpr):
    """What each child gets from SIZE cells, up to its own count and weight."""
    grad = (grad / tl.maximum(n, 1.0)[:, None])[:, None, :]
    return tl.reshape(tl.broadcast_to(grad, [SIZE, CHILDREN, WIDTH]), [SIZE * CHILDREN, WIDTH])


@triton.jit
def token_child(
    child, cell, inside, offset, token_of_slot, shown, number,
    M: tl.constexpr, P: tl.constexpr, S: tl.constexpr, MASKED: tl.constexpr, IN_ORDER: tl.constexpr,
):  # fmt: skip
    """The ``child``-th token of every level 1 cell, and which of them take part."""
    slot = cell // P * M + tl.load(offset + cell % P * S + child, mask=inside, other=0)
    token, there = token_of(slot, inside, token_of_slot, number, IN_ORDER)
    return token, shown_keys(slot, there, shown, False, MASKED)


@triton.jit(do_not_specialize=BY_LENGTH)
def fold_up(
    key, value, cell_key, cell_value, exact_key, exact_value, counts, leaf_key, leaf_value, up_key, up_value,
    offset, token_of_slot, shown, cells_0, cells_1, cells_2, cells_3, cells_4, cells_5, cells_6,
    k_batch, k_head, k_token, v_batch, v_head, v_token, mask_batch, count_batch, leaf_head, up_head,
    number, key_heads, programs, cells, exact_cells, exact_first, batches_of_counts,
    M: tl.constexpr, P: tl.constexpr, S: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    CHILDREN: tl.constexpr, STEPS: tl.constexpr, FROM_TOKENS: tl.constexpr, HAND_OVER: tl.constexpr,
    SHARED: tl.constexpr, MASKED: tl.constexpr, IN_ORDER: tl.constexpr,
):  # fmt: skip
    """Builds STEPS levels above the base; FROM_TOKENS also the base itself, level 1.

    ``exact`` [.., exact_cells, D], whose first cell is number ``exact_first``, takes the launch's top level in float32
    (HAND_OVER) for the next launch, which starts from it.
    """
    pid = tl.program_id(0)
    program = pid % programs
    side = (pid // programs) % 2
    which = (pid // (programs * 2)).to(tl.int64)
    batch = which // key_heads
    key_head = which % key_heads
    if side == 0:
        build(
            key + batch * k_batch + key_head * k_head, k_token, cell_key + which * cells * D,
            exact_key + (which * exact_cells - exact_first) * D, counts + batch * count_batch,
            (batch < batches_of_counts) & (key_head == 0), leaf_key + key_head * leaf_head, up_key + key_head * up_head,
            offset, token_of_slot, shown + batch * mask_batch, program,
            cells_0, cells_1, cells_2, cells_3, cells_4, cells_5, cells_6,
            number, M, P, S, D, WIDTH, SIZE, CHILDREN, STEPS, FROM_TOKENS, HAND_OVER, SHARED, MASKED,
            IN_ORDER,
        )  # fmt: skip
    else:
        build(
            value + batch * v_batch + key_head * v_head, v_token, cell_value + which * cells * D,
            exact_value + (which * exact_cells - exact_first) * D, counts + batch * count_batch,
            False, leaf_value + key_head * leaf_head, up_value + key_head * up_head,
            offset, token_of_slot, shown + batch * mask_batch, program,
            cells_0, cells_1, cells_2, cells_3, cells_4, cells_5, cells_6,
            number, M, P, S, D, WIDTH, SIZE, CHILDREN, STEPS, FROM_TOKENS, HAND_OVER, SHARED, MASKED,
            IN_ORDER,
        )  # fmt: skip


@triton.jit
def build(
    rows, row_stride, out, exact, counts, count_too, leaf, up, offset, token_of_slot, shown, program,
    cells_0, cells_1, cells_2, cells_3, cells_4, cells_5, cells_6, number,
    M: tl.constexpr, P: tl.constexpr, S: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    CHILDREN: tl.constexpr, STEPS: tl.constexpr, FROM_TOKENS: tl.constexpr, HAND_OVER: tl.constexpr,
    SHARED: tl.constexpr, MASKED: tl.constexpr, IN_ORDER: tl.constexpr,
):  # fmt: skip
    """:func:`fold_up` of the keys or of the values of one head."""
    tables = (cells_0, cells_1, cells_2, cells_3, cells_4, cells_5, cells_6)
    d = tl.arange(0, WIDTH)
    at = tl.arange(0, SIZE)
    cell = tl.load(cells_0 + program * SIZE + at)
    inside = cell >= 0
    if FROM_TOKENS:
        x = tl.zeros([SIZE, WIDTH], tl.float32)
        n = tl.zeros([SIZE], tl.float32)
        for child in range(0, S):
            token, there = token_child(
                child, cell, inside, offset, token_of_slot, shown, number, M, P, S, MASKED, IN_ORDER
            )
            tile = load_rows(rows, token, there, row_stride, D, WIDTH, False).to(tl.float32)
            if SHARED:
                weight = tl.load(leaf + child * D + d, mask=d < D, other=0.0).to(tl.float32) * S
                tile = tile * weight[None, :]
            x += tile
            n += there.to(tl.float32)
        x = x / tl.maximum(n, 1.0)[:, None]
        store_rows(out, cell, inside, D, x, D, WIDTH)
        tl.store(counts + cell, n, mask=inside & count_too)
    else:
        x = tl.load(exact + cell.to(tl.int64)[:, None] * D + d[None, :], mask=inside[:, None] & (d[None, :] < D),
                    other=0.0)  # fmt: skip
        n = tl.load(counts + cell, mask=inside, other=0.0)
    for step in tl.static_range(1, STEPS + 1):
        x, n = step_up(x, n, up, SIZE // CHILDREN**step, CHILDREN, D, WIDTH, SHARED)
        at = tl.arange(0, SIZE // CHILDREN**step)
        cell = tl.load(tables[step] + program * (SIZE // CHILDREN**step) + at)
        inside = cell >= 0
        store_rows(out, cell, inside, D, x, D, WIDTH)
        tl.store(counts + cell, n, mask=inside & count_too)
    if HAND_OVER:
        tl.store(exact + cell.to(tl.int64)[:, None] * D + d[None, :], x, mask=inside[:, None] & (d[None, :] < D))


@triton.jit(do_not_specialize=BY_LENGTH)
def fold_down(
    key, value, cell_key, cell_value, grad_key, grad_value, counts, up_key, up_value,
    part_leaf, part_up, offset, token_of_slot, shown,
    cells_0, cells_1, cells_2, cells_3, cells_4, cells_5, cells_6,
    k_batch, k_head, k_token, v_batch, v_head, v_token, mask_batch, count_batch, up_head,
    number, key_heads, programs, cells,
    M: tl.constexpr, P: tl.constexpr, S: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    CHILDREN: tl.constexpr, STEPS: tl.constexpr, FROM_TOKENS: tl.constexpr, SHARED: tl.constexpr,
    MASKED: tl.constexpr, IN_ORDER: tl.constexpr,
):  # fmt: skip
    """Sends the gradients of the top level's cells down to the base level, in place, and sums those of the weights.

    The step from level 1 to the tokens is in the kernel that writes the gradients of the tokens.
    """
    pid = tl.program_id(0)
    program = pid % programs
    side = (pid // programs) % 2
    which = (pid // (programs * 2)).to(tl.int64)
    batch = which // key_heads
    key_head = which % key_heads
    if side == 0:
        spread(
            key + batch * k_batch + key_head * k_head, k_token, cell_key + which * cells * D,
            grad_key + which * cells * D, counts + batch * count_batch, up_key + key_head * up_head,
            part_leaf + pid.to(tl.int64) * S * D, part_up + pid.to(tl.int64) * CHILDREN * D,
            offset, token_of_slot, shown + batch * mask_batch, program,
            cells_0, cells_1, cells_2, cells_3, cells_4, cells_5, cells_6,
            number, M, P, S, D, WIDTH, SIZE, CHILDREN, STEPS, FROM_TOKENS, SHARED, MASKED, IN_ORDER,
        )  # fmt: skip
    else:
        spread(
            value + batch * v_batch + key_head * v_head, v_token, cell_value + which * cells * D,
            grad_value + which * cells * D, counts + batch * count_batch, up_value + key_head * up_head,
            part_leaf + pid.to(tl.int64) * S * D, part_up + pid.to(tl.int64) * CHILDREN * D,
            offset, token_of_slot, shown + batch * mask_batch, program,
            cells_0, cells_1, cells_2, cells_3, cells_4, cells_5, cells_6,
            number, M, P, S, D, WIDTH, SIZE, CHILDREN, STEPS, FROM_TOKENS, SHARED, MASKED, IN_ORDER,
        )  # fmt: skip


@triton.jit
def spread(
    rows, row_stride, stored, grads, counts, up, part_leaf, part_up, offset, token_of_slot, shown, program,
    cells_0, cells_1, cells_2, cells_3, cells_4, cells_5, cells_6, number,
    M: tl.constexpr, P: tl.constexpr, S: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    CHILDREN: tl.constexpr, STEPS: tl.constexpr, FROM_TOKENS: tl.constexpr, SHARED: tl.constexpr,
    MASKED: tl.constexpr, IN_ORDER: tl.constexpr,
):  # fmt: skip
    """:func:`fold_down` of the keys or of the values of one head."""
    tables = (cells_0, cells_1, cells_2, cells_3, cells_4, cells_5, cells_6)
    d = tl.arange(0, WIDTH)
    tops: tl.constexpr = SIZE // CHILDREN**STEPS
    cell = tl.load(tables[STEPS] + program * tops + tl.arange(0, tops))
    inside = cell >= 0
    at = cell.to(tl.int64)[:, None] * D + d[None, :]
    grad = tl.load(grads + at, mask=inside[:, None] & (d[None, :] < D), other=0.0)
    n = tl.load(counts + cell, mask=inside, other=0.0)
    if SHARED:
        grad_up = tl.zeros([CHILDREN, WIDTH], tl.float32)
    for step in tl.static_range(1, STEPS + 1):
        grad = step_down(grad, n, SIZE // CHILDREN ** (STEPS - step + 1), CHILDREN, WIDTH)
        place = tl.arange(0, SIZE // CHILDREN ** (STEPS - step))
        cell = tl.load(tables[STEPS - step] + program * (SIZE // CHILDREN ** (STEPS - step)) + place)
        inside = cell >= 0
        mask = inside[:, None] & (d[None, :] < D)
        at = cell.to(tl.int64)[:, None] * D + d[None, :]
        n = tl.load(counts + cell, mask=inside, other=0.0)
        grad = grad * n[:, None]
        if SHARED:
            product = grad * tl.load(stored + at, mask=mask, other=0.0).to(tl.float32) * CHILDREN
            grad_up += tl.sum(tl.reshape(product, [SIZE // CHILDREN ** (STEPS - step + 1), CHILDREN, WIDTH]), 0)
            grad = grad * (child_weights(up, SIZE // CHILDREN ** (STEPS - step), CHILDREN, D, WIDTH) * CHILDREN)
        grad = grad + tl.load(grads + at, mask=mask, other=0.0)
    if STEPS > 0:
        tl.store(grads + at, grad, mask=inside[:, None] & (d[None, :] < D))
    if SHARED:
        c = tl.arange(0, CHILDREN)
        tl.store(part_up + c[:, None] * D + d[None, :], grad_up, mask=d[None, :] < D)
        if FROM_TOKENS:
            grad = grad * (S / tl.maximum(n, 1.0))[:, None]
            for child in range(0, S):
                token, there = token_child(
                    child, cell, inside, offset, token_of_slot, shown, number, M, P, S, MASKED, IN_ORDER
                )
                tile = load_rows(rows, token, there, row_stride, D, WIDTH, False).to(tl.float32)
                tl.store(part_leaf + child * D + d, tl.sum(grad * tile, 0), mask=d < D)
