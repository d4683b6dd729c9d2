"""Index tables: packed sequences are trees in a row, every token in one slot, tables are made once."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from farfield.geometry import EMPTY, geometry
from farfield.ops.multipole.plan import Plan, make_plan

CPU = torch.device("cpu")


def plan(lengths: tuple[int, ...], causal: bool = False, sinks: int = 0, block: int = 2) -> Plan:
    return make_plan((sum(lengths),), lengths, (block,), (1,), None, causal, sinks, CPU)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any), st.booleans(), st.sampled_from((0, 1, 5)))
def test_packed_tokens_see_their_own_sequence_once(lengths: list[int], causal: bool, sinks: int) -> None:
    p = plan(tuple(lengths), causal, sinks)
    number, size = sum(lengths), p.layout.block_tokens
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    first = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
    slots = torch.arange(p.layout.tokens) if p.token_of_slot is None else p.token_of_slot
    token = torch.where(p.filled, slots.clamp(max=max(number - 1, 0)), EMPTY)
    assert sorted(token[token != EMPTY].tolist()) == list(range(number))
    assert (p.padding is not None) == (token[:number].tolist() == list(range(number)))
    back = torch.arange(number) if p.slot_of_token is None else p.slot_of_token
    assert torch.equal(token[back], torch.arange(number))
    by_block = token.view(-1, size)
    for b, own in enumerate(by_block):
        own = own[own != EMPTY]
        if len(own) == 0:
            continue
        home = int(segment[own[0]])
        leading = set(range(int(first[home]), min(int(first[home]) + sinks, int(first[home]) + lengths[home])))
        seen: list[int] = []
        for row in p.near.rows[b][p.near.used[b]]:
            seen += [t for t in by_block[row].tolist() if t != EMPTY and t not in leading]
        if p.sinks is not None:
            listed = token[p.sinks.rows[b][p.sinks.used[b]]].tolist()
            assert set(listed) == leading and len(listed) == len(leading)
            seen += listed
        rows = 0
        for level in range(1, p.layout.levels + 1):
            places = zip(
                p.far_of_block.rows[b].tolist(), p.far_of_block.used[b].tolist(), p.level_of_place, strict=True
            )
            groups = [row - rows for row, used, of in places if used and of == level - 1]
            rows += p.layout.group_total(level)
            width = size << (level - 1)
            for group in groups:
                inside = token[group * width : (group + 1) * width].tolist()
                seen += [t for t in inside if t != EMPTY and t not in leading]
        last = int(own.max()) if causal else first[home] + lengths[home] - 1
        expected = set(range(int(first[home]), int(last) + 1)) | leading
        assert len(seen) == len(set(seen)) and set(seen) == expected


def test_tables_are_made_once() -> None:
    assert plan((30, 12)) is plan((30, 12))
    assert plan((30, 12)) is not plan((12, 30))


def test_an_ordered_grid_needs_no_reordering() -> None:
    p = make_plan((64,), None, (4,), (2,), None, False, 0, CPU)
    assert p.token_of_slot is None and p.slot_of_token is None and p.whole
    assert make_plan((63,), None, (4,), (2,), None, False, 0, CPU).token_of_slot is not None
    assert p.layout == geometry((64,), 4, 2)


def test_tables_of_a_trace_are_not_kept() -> None:
    with FakeTensorMode():
        p = make_plan((101,), None, (4,), (2,), None, True, 2, CPU)
        assert isinstance(p.filled, FakeTensor)
    assert type(make_plan((101,), None, (4,), (2,), None, True, 2, CPU).filled) is torch.Tensor


def test_tables_made_under_inference_mode_are_ordinary() -> None:
    with torch.inference_mode():
        p = make_plan((97,), None, (4,), (2,), None, True, 2, CPU)
    tensors = [p.token_of_slot, p.slot_of_token, p.filled, p.near.rows, p.is_sink, p.row_bias, p.far_of_block.rows]
    assert not any(x.is_inference() for x in tensors if x is not None)
