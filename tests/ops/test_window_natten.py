"""Windows against NATTEN's own, where natten is installed (pip install --no-build-isolation --no-deps natten)."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from farfield.ops.window import window_attention

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    natten = pytest.importorskip("natten", reason="natten is not installed")

# FlexAttention without a compiler says that it is slow.
pytestmark = pytest.mark.filterwarnings("ignore")

HEADS, DIM = 2, 16
Sides = tuple[int, ...]


def _lines() -> list[tuple[Sides, Sides, Sides, Sides, tuple[bool, ...]]]:
    """1-D: odd and even windows, every kind of stride, dilations that leave residues of different lengths."""
    cases = []
    for length, size, dilation in ((23, 7, 1), (24, 6, 1), (23, 4, 2), (29, 5, 3), (32, 8, 4)):
        for stride in sorted({1, 2, size // 2, size - 1, size}):
            for causal in (False, True):
                cases.append(((length,), (size,), (stride,), (dilation,), (causal,)))
    return cases


CASES = [
    *_lines(),
    ((9, 13), (3, 4), (1, 1), (1, 1), (False, False)),
    ((9, 13), (5, 4), (2, 3), (1, 1), (False, False)),
    ((8, 12), (4, 6), (4, 6), (1, 1), (False, False)),
    ((12, 13), (3, 4), (1, 2), (4, 3), (False, False)),
    ((12, 13), (3, 4), (3, 2), (2, 3), (True, False)),
    ((5, 7, 6), (3, 3, 2), (1, 1, 1), (1, 1, 1), (False, False, False)),
    ((5, 7, 6), (3, 4, 5), (2, 3, 4), (1, 1, 1), (True, False, False)),
    ((6, 6, 8), (2, 3, 4), (2, 3, 4), (1, 1, 1), (False, False, False)),
    ((6, 7, 8), (2, 3, 3), (1, 2, 1), (3, 2, 2), (False, False, False)),
]


@pytest.mark.parametrize(("grid", "size", "stride", "dilation", "causal"), CASES, ids=str)
def test_equals_natten(grid: Sides, size: Sides, stride: Sides, dilation: Sides, causal: tuple[bool, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = math.prod(grid)
    q, k, v = (torch.randn(2, HEADS, tokens, DIM, generator=generator) for _ in range(3))
    theirs = (natten.na1d, natten.na2d, natten.na3d)[len(grid) - 1](
        *(t.transpose(1, 2).unflatten(1, grid) for t in (q, k, v)),
        kernel_size=size,
        stride=stride,
        dilation=dilation,
        is_causal=causal,
        backend="flex-fna",
        torch_compile=False,
    )
    ours = window_attention(
        q.double(), k.double(), v.double(), window=size, grid=grid, stride=stride, dilation=dilation, causal=causal
    )
    # Theirs rounds in float32: DIM products in a score and as many summands as keys in an output, of values below 5.
    bound = 5 * (DIM + math.prod(size) + 2) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(theirs.flatten(1, -3).transpose(1, 2).double(), ours, rtol=0.0, atol=bound)
