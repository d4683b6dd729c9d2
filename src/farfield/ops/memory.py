"""Large buffers on the CPU in large pages, used again: first touching fresh memory can cost as much as the arithmetic.

When the last tensor that views a large buffer is gone, it is kept for the next one of its size, up to a limit: a loop
that makes the same calls touches fresh memory in its first turn only.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

__all__ = ["empty", "forget", "zeros"]

LARGE = 1 << 19
"""Bytes from which a buffer asks for large pages and is used again."""
KEPT = 256 << 20
"""Bytes that are kept at most; the buffers that came back first are given up first."""

_ADVICE: int = getattr(mmap, "MADV_HUGEPAGE", -1)  # Linux only
_madvise = None if _ADVICE < 0 else getattr(ctypes.CDLL(None), "madvise", None)
_kept: list[Tensor] = []
_lock = threading.RLock()  # a buffer can come back while one is taken, whenever Python collects garbage


def _take(size: int) -> Tensor:
    with _lock:
        for i, memory in enumerate(_kept):
            if memory.nbytes == size:
                return _kept.pop(i)
    with torch.inference_mode(False):  # or what an evaluation leaves could not serve a training step
        memory = torch.empty(size, dtype=torch.uint8)
    if _madvise is not None:  # only advice: whether the system takes it shows in nothing but time
        start = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = memory.data_ptr() + size - start
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(_ADVICE))
    return memory


def _give_back(memory: Tensor) -> None:
    with _lock:
        _kept.append(memory)
        while sum(x.nbytes for x in _kept) > KEPT:
            _kept.pop(0)


def forget() -> None:
    """Gives up all buffers that are kept for later."""
    with _lock:
        _kept.clear()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """An uninitialised tensor."""
    size = prod(shape) * dtype.itemsize
    if size < LARGE or type(x := torch.empty(0, device=device)) is not Tensor or x.device.type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    memory = _take(size)
    array = memory.numpy()
    weakref.finalize(array, _give_back, memory).atexit = False  # the storage holds on to the array
    return torch.from_numpy(array).view(dtype).view(tuple(shape))


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """As :func:`empty`, filled with 0."""
    return empty(shape, dtype, device).zero_()
