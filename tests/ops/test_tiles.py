"""Tiles of queries against gathered lists of keys, compared with a softmax over the whole list."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farfield.ops import tiles
from farfield.ops.tiles import Dropout, Lists, Store, attend, attend_backward, compute_dtype

BATCH, HEADS, REPEAT, UNITS, ROWS, WIDTH, OUT = 2, 2, 3, 7, 4, 3, 5
GROUPS = BATCH * HEADS


def make_lists(hidden: float = 0.3, classes: bool = True) -> tuple[Tensor, Lists]:
    """Two stores of different row widths, and every kind of bias."""
    f64 = torch.float64
    stores = tuple(
        Store(
            torch.randn(GROUPS, rows, width, WIDTH, dtype=f64), torch.randn(GROUPS, rows, width, OUT, dtype=f64),
            torch.randint(rows, (UNITS, places)),
        )
        for rows, width, places in ((6, 4, 3), (9, 1, 2))
    )  # fmt: skip
    number = sum(s.width for s in stores)
    key_bias = torch.randn(BATCH, UNITS, number, dtype=f64).masked_fill(
        torch.rand(BATCH, UNITS, number) < hidden, -torch.inf
    )
    row_bias = torch.zeros(2, ROWS, 6, dtype=f64)
    row_bias[1] = torch.full((ROWS, 6), -torch.inf, dtype=f64).triu(1)
    head_bias = torch.randn(HEADS, REPEAT, number, dtype=f64)
    lists = Lists(stores, key_bias, head_bias, row_bias, (0, 1, 0, 1, 1, 0, 0) if classes else ())
    return torch.randn(GROUPS, REPEAT, UNITS, ROWS, WIDTH, dtype=f64), lists


def dense(query: Tensor, lists: Lists, scale: float) -> tuple[Tensor, Tensor]:
    """The same by ordinary operations."""
    keys = torch.cat([s.keys[:, s.table].flatten(2, 3) for s in lists.stores], 2)  # [G, U, K, D]
    values = torch.cat([s.values[:, s.table].flatten(2, 3) for s in lists.stores], 2)
    scores = scale * torch.einsum("grumd,gukd->grumk", query, keys)
    if lists.key_bias is not None:
        of = torch.arange(GROUPS) // HEADS if lists.key_bias.shape[0] > 1 else torch.zeros(GROUPS, dtype=torch.long)
        scores = scores + lists.key_bias[of][:, None, :, None]
    if lists.head_bias is not None:
        scores = scores + lists.head_bias[torch.arange(GROUPS) % HEADS][:, :, None, None]
    if lists.row_bias is not None:
        bias = lists.row_bias[list(lists.row_class) or [0] * UNITS]
        scores = scores + torch.nn.functional.pad(bias, (0, scores.shape[-1] - bias.shape[-1]))
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
    lse = scores.masked_fill(dead, 0.0).logsumexp(-1).masked_fill(dead[..., 0], -torch.inf)
    return torch.einsum("grumk,gukd->grumd", weights, values), lse


CHUNKS = st.sampled_from((1, 200, 700, 3000, 1 << 20))


def with_chunks(scores: int) -> pytest.MonkeyPatch:
    patch = pytest.MonkeyPatch()
    patch.setitem(tiles.CHUNK_SCORES, "cpu", scores)
    return patch


@settings(max_examples=40)
@given(
    CHUNKS,
    st.sampled_from((0.0, 0.3, 1.0)),
    st.booleans(),
    st.sets(st.sampled_from(("key_bias", "head_bias", "row_bias"))),
    st.booleans(),
)
def test_attend_is_a_softmax_over_the_list(
    chunk: int, hidden: float, classes: bool, without: set[str], one_batch: bool
) -> None:
    query, lists = make_lists(hidden, classes)
    if one_batch and lists.key_bias is not None:
        lists = replace(lists, key_bias=lists.key_bias[:1])
    lists = replace(lists, **dict.fromkeys(without))
    patch = with_chunks(chunk)
    try:
        got = attend(query, lists, batch=BATCH, scale=0.7)
    finally:
        patch.undo()
    torch.testing.assert_close(got, dense(query, lists, 0.7))


@settings(max_examples=30)
@given(CHUNKS, st.sampled_from((0.0, 0.3, 1.0)))
def test_backward_is_the_gradient(chunk: int, hidden: float) -> None:
    query, lists = make_lists(hidden)
    leaves = [query, *(s.keys for s in lists.stores), *(s.values for s in lists.stores), lists.head_bias]
    for leaf in leaves:
        assert leaf is not None
        leaf.requires_grad_()
    out, lse = dense(query, lists, 0.7)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse == -torch.inf, 0.0)
    loss = (out * grad_out).sum() + (torch.where(lse > -torch.inf, lse, 0.0) * grad_lse).sum()
    wanted = torch.autograd.grad(loss, leaves)  # type: ignore[arg-type]
    delta = (out * grad_out).sum(-1) - grad_lse
    patch = with_chunks(chunk)
    try:
        with torch.no_grad():
            got = attend_backward(grad_out, delta, query, lse, lists, batch=BATCH, scale=0.7)
    finally:
        patch.undo()
    assert got.head_bias is not None
    for a, b in zip((got.query, *got.keys, *got.values, got.head_bias), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_two_stores_over_one_memory_share_one_gradient(poisoned: None) -> None:
    """As near blocks and sinks do: rows of four and rows of one of the same tokens."""
    query, _ = make_lists()
    keys, values = (
        torch.randn(GROUPS, 24, 1, WIDTH, dtype=torch.float64),
        torch.randn(GROUPS, 24, 1, OUT, dtype=torch.float64),
    )
    wide = Store(keys.view(GROUPS, 6, 4, WIDTH), values.view(GROUPS, 6, 4, OUT), torch.randint(6, (UNITS, 2)))
    lists = Lists((wide, Store(keys, values, torch.randint(24, (UNITS, 3)))))
    out, lse = attend(query, lists, batch=BATCH, scale=0.5)
    grad = torch.randn_like(out)
    delta = (out * grad).sum(-1)
    apart = attend_backward(grad, delta, query, lse, lists, batch=BATCH, scale=0.5)
    joint = attend_backward(grad, delta, query, lse, lists, batch=BATCH, scale=0.5, shared=(0, 0))
    assert joint.keys[1] is None and joint.values[1] is None
    for one, two in ((joint.keys, apart.keys), (joint.values, apart.values)):
        assert one[0] is not None and two[0] is not None and two[1] is not None
        torch.testing.assert_close(one[0], two[0] + two[1].view_as(two[0]))


def test_one_part_of_a_larger_softmax() -> None:
    """Backward with the joint lse: weights are exp(score - lse), which need not sum to one."""
    query, lists = make_lists(0.0)
    parts = [Lists((store,)) for store in lists.stores]
    whole = Lists(lists.stores)
    out, lse = attend(query, whole, batch=BATCH, scale=1.0)
    grad = torch.randn_like(out)
    delta = (out * grad).sum(-1)
    together = attend_backward(grad, delta, query, lse, whole, batch=BATCH, scale=1.0)
    pieces = [attend_backward(grad, delta, query, lse, part, batch=BATCH, scale=1.0) for part in parts]
    torch.testing.assert_close(pieces[0].query + pieces[1].query, together.query)
    for i in range(2):
        torch.testing.assert_close(pieces[i].keys[0], together.keys[i])


@pytest.mark.parametrize("scores", [1, 3000, 1 << 20])
def test_dropout_draws_the_same_in_both_directions(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiles.CHUNK_SCORES, "cpu", scores)
    query, lists = make_lists(0.0)
    drop = Dropout(0.4, 17)
    out, lse = attend(query, lists, batch=BATCH, scale=0.7, dropout=drop)
    again, _ = attend(query, lists, batch=BATCH, scale=0.7, dropout=drop)
    other, plain_lse = attend(query, lists, batch=BATCH, scale=0.7, dropout=Dropout(0.4, 18))
    assert torch.equal(out, again) and not torch.equal(out, other) and torch.equal(lse, plain_lse)
    # The output is linear in the values, so its gradient by them, applied to them, gives the output back.
    grad = torch.randn_like(out)
    got = attend_backward(grad, (out * grad).sum(-1), query, lse, lists, batch=BATCH, scale=0.7, dropout=drop)
    linear = sum((g * s.values).sum() for g, s in zip(got.values, lists.stores, strict=True) if g is not None)
    torch.testing.assert_close(linear, (out * grad).sum())


def test_masks_of_different_chunks_are_independent() -> None:
    like = torch.empty(4, 500, dtype=torch.float32)
    drop = Dropout(0.25, 3)
    a, b = drop.mask(like, 0), drop.mask(like, 1)
    assert torch.equal(a, drop.mask(like, 0)) and not torch.equal(a, b)
    assert sorted(a.unique().tolist()) == pytest.approx([0.0, 4 / 3])
    assert abs(float((a > 0).float().mean()) - 0.75) < 0.05
    assert abs(float(((a > 0) & (b > 0)).float().mean()) - 0.5625) < 0.05
    assert torch.isfinite(Dropout(0.5, (1 << 62) - 1).mask(like, 1 << 20)).all()  # the largest seeds fit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_is_float32_for_less(dtype: torch.dtype) -> None:
    query, lists = make_lists()
    low = replace(
        lists,
        stores=tuple(Store(s.keys.to(dtype), s.values.to(dtype), s.table) for s in lists.stores),
        key_bias=None if lists.key_bias is None else lists.key_bias.float(),
    )
    wide = replace(low, stores=tuple(Store(s.keys.float(), s.values.float(), s.table) for s in low.stores))
    out, lse = attend(query.to(dtype), low, batch=BATCH, scale=0.7)
    truth, truth_lse = attend(query.to(dtype).float(), wide, batch=BATCH, scale=0.7)
    assert out.dtype == dtype and lse.dtype == torch.float32 == compute_dtype(dtype)
    assert torch.equal(out, truth.to(dtype)) and torch.equal(lse, truth_lse)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 1 << 21), st.sampled_from((1, 100, 1 << 20)))
def test_chunks_cover_the_plane_once(groups: int, units: int, scores: int, fit: int) -> None:
    patch = with_chunks(fit)
    try:
        seen = torch.zeros(groups, units, dtype=torch.int64)
        for g, u in tiles._chunks(groups, units, scores, torch.device("cpu")):
            part = seen[g, u]
            assert part.numel() == 1 or part.numel() * scores <= fit
            part += 1
    finally:
        patch.undo()
    assert (seen == 1).all()
