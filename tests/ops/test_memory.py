"""Buffers: ordinary tensors, of which large ones ask for large pages and are used again."""

from __future__ import annotations

import mmap

import pytest
import torch

from farfield.bench.memory import give_back
from farfield.ops import memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(0,), (3, 5), (memory.LARGE + 12345,)])
def test_ordinary_tensors(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, zero = memory.empty(shape, dtype), memory.zeros(shape, dtype)
    assert x.shape == zero.shape == shape and x.dtype == zero.dtype == dtype and x.is_contiguous()
    assert not zero.any() and x.fill_(1).sum() == x.numel()


def test_the_advice_stays_inside_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(memory, "_madvise", lambda start, size, _: asked.append((start.value, size.value)))
    memory.forget()
    x = memory.empty((memory.LARGE,), torch.uint8)
    memory.empty((memory.LARGE - 1,), torch.uint8)
    ((start, size),) = asked
    assert start % mmap.PAGESIZE == 0 and x.data_ptr() <= start and start + size <= x.data_ptr() + x.nbytes


def test_fake_tensors_have_no_address() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert memory.empty((memory.LARGE,), torch.float32).shape == (memory.LARGE,)


def test_a_buffer_is_used_again_when_its_last_view_is_gone() -> None:
    memory.forget()
    x = memory.empty((memory.LARGE,), torch.float32)
    view, address = x[5:], x.data_ptr()
    del x
    other = memory.empty((memory.LARGE,), torch.int32)
    assert other.data_ptr() != address
    del view
    assert memory.empty((2, memory.LARGE // 2), torch.float32).data_ptr() == address


def test_no_more_is_kept_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    memory.forget()
    monkeypatch.setattr(memory, "KEPT", 3 * memory.LARGE)
    buffers = [memory.empty((memory.LARGE,), torch.uint8) for _ in range(5)]
    addresses = [x.data_ptr() for x in buffers]
    while buffers:
        del buffers[0]
    assert [x.data_ptr() for x in memory._kept] == addresses[2:]


def test_what_an_evaluation_leaves_serves_training() -> None:
    memory.forget()
    with torch.inference_mode():
        memory.empty((memory.LARGE,), torch.float32)
    x = memory.empty((memory.LARGE,), torch.float32).fill_(1.0)
    assert not x.is_inference()
    (x * torch.ones((), requires_grad=True)).sum().backward()


def test_measurements_begin_without_kept_buffers() -> None:
    """Otherwise a peak would hide in what an earlier call left."""
    memory.empty((memory.LARGE,), torch.uint8)  # gone at once, and kept
    assert memory._kept
    give_back()
    assert not memory._kept
