"""Fresh buffers: ordinary tensors, of which large ones ask for large pages."""

from __future__ import annotations

import mmap

import pytest
import torch

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
    x = memory.empty((memory.LARGE,), torch.uint8)
    memory.empty((memory.LARGE - 1,), torch.uint8)
    ((start, size),) = asked
    assert start % mmap.PAGESIZE == 0 and x.data_ptr() <= start and start + size <= x.data_ptr() + x.nbytes


def test_fake_tensors_have_no_address() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert memory.empty((memory.LARGE,), torch.float32).shape == (memory.LARGE,)
