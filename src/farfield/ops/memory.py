"""Fresh buffers on the CPU in large pages: first touching small ones costs as much time as the arithmetic."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["empty", "zeros"]

LARGE = 4 << 20
"""Bytes from which a buffer asks for large pages; a large page has 2 MiB on most machines."""

_ADVICE: int = getattr(mmap, "MADV_HUGEPAGE", -1)  # Linux only
_madvise = None if _ADVICE < 0 else getattr(ctypes.CDLL(None), "madvise", None)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """An uninitialised tensor; a large one on the CPU asks for large pages.

    It is only advice: whether the system takes it shows in nothing but time.
    """
    x = torch.empty(tuple(shape), dtype=dtype, device=device)
    if _madvise is not None and x.device.type == "cpu" and type(x) is Tensor and x.nbytes >= LARGE:
        start = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = x.data_ptr() + x.nbytes - start
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(_ADVICE))
    return x


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """As :func:`empty`, filled with 0."""
    return empty(shape, dtype, device).zero_()
