"""Keeping the rows that are on a list: the same ones, in their order, and no others."""

from __future__ import annotations

import torch

from farfield.geometry import EMPTY
from farfield.ops.kept import compact


def test_lists_point_to_the_same_rows_of_less() -> None:
    batch, kv_heads, rows = 2, 3, 50
    key, value = torch.randn(batch, kv_heads, rows, 4), torch.randn(batch, kv_heads, rows, 4)
    generator = torch.Generator().manual_seed(1)
    reads = [torch.tensor([0, 0, 2, 1]), torch.tensor([2])]
    lists = [
        torch.randint(-1, rows, (batch, len(read), 2, 3, size), generator=generator)
        for read, size in zip(reads, (4, 1), strict=True)
    ]
    lists[0][1, :2] = EMPTY  # a key head of which one row of the batch keeps nothing
    before = [x.clone() for x in lists]
    keys, values = compact(key, value, list(zip(lists, reads, strict=True)))
    most = 0
    for b in range(batch):
        for head in range(kv_heads):
            wanted = sorted(
                {
                    row
                    for x, read in zip(before, reads, strict=True)
                    for row in x[b, read == head].flatten().tolist()
                    if row != EMPTY
                }
            )
            assert torch.equal(keys[b, head, : len(wanted)], key[b, head, wanted])
            assert torch.equal(values[b, head, : len(wanted)], value[b, head, wanted])
            for old, new, read in zip(before, lists, reads, strict=True):
                for was, now in zip(old[b, read == head].flatten(), new[b, read == head].flatten(), strict=True):
                    assert int(now) == (EMPTY if was == EMPTY else wanted.index(int(was)))
            most = max(most, len(wanted))
    assert keys.shape == values.shape == (batch, kv_heads, most, 4)


def test_where_nothing_is_kept_one_row_is_left() -> None:
    key, lists = torch.randn(1, 2, 9, 4), torch.full((1, 2, 1, 3, 5), EMPTY)
    keys, values = compact(key, key, [(lists, torch.tensor([0, 1]))])
    assert keys.shape == values.shape == (1, 2, 1, 4)
    assert (lists == EMPTY).all()
