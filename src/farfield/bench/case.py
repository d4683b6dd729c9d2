"""What an attention is measured on: the grid of tokens, heads, dtype and device of one case, and its random inputs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["DTYPES", "Case", "Inputs", "dtype_of", "grid_of", "parse_length"]

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_STRETCH = 4
"""The longest side of a grid that is made from a number of tokens is at most this many times the shortest."""


@dataclass(frozen=True)
class Case:
    """One problem: self-attention of ``batch`` x ``heads`` over a grid of tokens.

    Attributes:
        grid: lengths of one, two or three axes; N is their product.
        dtype: name of the dtype of queries, keys and values, a key of :data:`DTYPES`.
        causal: a query sees itself and the past only; 1-D.
        batch, heads, head_dim: B, H, D of [B, H, N, D].
        device: where it runs.
    """

    grid: tuple[int, ...]
    dtype: str = "float32"
    causal: bool = False
    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        """N."""
        return math.prod(self.grid)

    @property
    def dims(self) -> int:
        """Axes of the grid."""
        return len(self.grid)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return DTYPES[self.dtype]

    @property
    def size(self) -> int:
        """Bytes of one number."""
        return self.torch_dtype.itemsize

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, H, N, D]."""
        return self.batch, self.heads, self.tokens, self.head_dim

    @property
    def width(self) -> int:
        """H * D, the width of a layer with these heads."""
        return self.heads * self.head_dim

    @property
    def name(self) -> str:
        """Such as ``4,096 tokens, float32, causal`` or ``64x64 tokens, bfloat16``."""
        size = f"{self.tokens:,}" if self.dims == 1 else "x".join(map(str, self.grid))
        return f"{size} tokens, {self.dtype}{', causal' if self.causal else ''}"


@dataclass(frozen=True)
class Inputs:
    """Standard normal inputs of a case, the same for everything that is measured on it.

    Attributes:
        q, k, v: [B, H, N, D].
        grad: [B, H, N, D], the gradient that arrives at the output.
        x: [B, N, H * D], the input of a layer.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    x: Tensor

    @staticmethod
    def of(case: Case) -> Inputs:
        """Drawn in float32 on the CPU from a seed that depends on the number of tokens only."""
        generator = torch.Generator().manual_seed(case.tokens)

        def draw() -> Tensor:
            return torch.randn(case.shape, generator=generator).to(case.device, case.torch_dtype)

        q, k, v, grad = draw(), draw(), draw(), draw()
        return Inputs(q, k, v, grad, q.transpose(1, 2).flatten(2).contiguous())


def dtype_of(text: str) -> str:
    """The name of a dtype; float64, bf16, fp16 and the like are understood.

    Raises:
        ValueError: for anything else, listing what would be accepted.
    """
    short = {"fp32": "float32", "f32": "float32", "fp64": "float64", "f64": "float64", "bf16": "bfloat16",
             "fp16": "float16", "f16": "float16", "half": "float16", "float": "float32"}  # fmt: skip
    name = text.strip().lower().removeprefix("torch.")
    name = short.get(name, name)
    if name not in DTYPES:
        raise ValueError(f"{text!r} is not a dtype to measure in: {', '.join(DTYPES)} would be accepted")
    return name


def parse_length(text: str) -> tuple[int, ...]:
    """(4096,) from ``4096`` or ``4k``, (64, 48) from ``64x48``.

    Raises:
        ValueError: for anything else, with how to write it.
    """
    sides = []
    for piece in text.strip().lower().split("x"):
        number = re.fullmatch(r"(\d+)([km]?)", piece.strip())
        if number is None or int(number[1]) == 0:
            raise ValueError(f"{text!r} is not a length; write it like 4096, 4k, 64x64 or 16x16x16 (1k is 1,024)")
        sides.append(int(number[1]) << {"": 0, "k": 10, "m": 20}[number[2]])
    if len(sides) > 3:
        raise ValueError(f"{text!r} has {len(sides)} axes; one to three would be accepted, such as 64x64")
    return tuple(sides)


def grid_of(tokens: int, dims: int) -> tuple[int, ...]:
    """The grid of ``dims`` axes with exactly that many tokens whose sides are most alike, the shortest first.

    Raises:
        ValueError: when the sides would differ by more than four times (a prime number of tokens, say).
    """
    sides = _grid(tokens, dims)
    if sides[-1] > _STRETCH * sides[0]:
        side = round(tokens ** (1 / dims))
        raise ValueError(
            f"{tokens:,} tokens make no {dims}-D grid with sides within {_STRETCH} times of each other; "
            f"write the grid itself, such as {'x'.join([str(side)] * dims)}"
        )
    return sides


@lru_cache(maxsize=256)
def _grid(tokens: int, dims: int) -> tuple[int, ...]:
    if dims == 1:
        return (tokens,)
    best: tuple[int, ...] | None = None
    for side in range(1, math.isqrt(tokens) + 1 if dims == 2 else round(tokens ** (1 / dims)) + 1):
        if tokens % side == 0:
            sides: Sequence[int] = sorted((side, *_grid(tokens // side, dims - 1)))
            if best is None or sides[-1] / sides[0] < best[-1] / best[0]:
                best = tuple(sides)
    assert best is not None  # side 1 always divides
    return best
