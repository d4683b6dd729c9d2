"""Expansion: which heads see everything far in one cell, about what centres, and what these keep out of it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from farfield.geometry import integers

__all__ = ["Expansion"]


@dataclass(frozen=True)
class Expansion:
    """A far field of some heads about centres of their queries, see :mod:`farfield.ops.expansion`.

    One cell holds every token beyond the near field but those that the centre keeps out of it. Its score and value are
    those of all its tokens together, to the first order in the distance of the query from the nearest of the head's
    centres. Nothing is learned: centres are means of clusters of a pretrained model's queries.

    Args:
        heads: query heads that have it, rising.
        bias: added to the score of the cell, for each of these heads.
        number: centres of a head.
        centres: float16 `[heads, number, D]` in base64, queries as the scores take them (rotated, before the scale);
            :meth:`of` makes it.
        open: tokens that every centre keeps out of the cell, those with the largest scores at the centre; queries read
            those of their own centre exactly.
    """

    heads: tuple[int, ...]
    bias: tuple[float, ...]
    number: int
    centres: str
    open: int = 0

    def __post_init__(self) -> None:
        heads = integers(self.heads, "heads of an Expansion")
        if not heads or min(heads) < 0 or list(heads) != sorted(set(heads)):
            raise ValueError(f"Expansion(heads={self.heads!r}): rising numbers from 0 on would be accepted")
        object.__setattr__(self, "heads", heads)
        given = self.bias if isinstance(self.bias, list | tuple) else ()
        finite = all(not isinstance(x, bool) and isinstance(x, int | float) and math.isfinite(x) for x in given)
        if not finite or len(given) != len(heads):
            raise ValueError(
                f"Expansion(bias={self.bias!r}): a finite number for each of {len(heads)} heads would be accepted"
            )
        object.__setattr__(self, "bias", tuple(float(x) for x in self.bias))
        if isinstance(self.number, bool) or not isinstance(self.number, int) or self.number < 1:
            raise ValueError(f"Expansion(number={self.number!r}): a number of centres >= 1 would be accepted")
        if isinstance(self.open, bool) or not isinstance(self.open, int) or self.open < 0:
            raise ValueError(f"Expansion(open={self.open!r}): a number of tokens >= 0 would be accepted")
        try:
            size = len(base64.b64decode(self.centres, validate=True))
        except (TypeError, ValueError, binascii.Error) as error:
            raise ValueError(f"Expansion(centres=...) is no base64: {error}") from error
        whole = 2 * len(heads) * self.number
        if not size or size % whole:
            raise ValueError(
                f"Expansion(centres=...) has {size} bytes: 2 for every channel of {len(heads)} heads with "
                f"{self.number} centres each would be accepted, a multiple of {whole}"
            )
        if not torch.isfinite(self.tensor()).all():
            raise ValueError("Expansion(centres=...) has entries that are no finite float16")

    @property
    def width(self) -> int:
        """D."""
        return len(base64.b64decode(self.centres)) // (2 * len(self.heads) * self.number)

    @staticmethod
    def of(heads: tuple[int, ...], bias: tuple[float, ...], centres: Tensor, open: int = 0) -> Expansion:
        """From centres `[heads, number, D]`, which are rounded to float16."""
        raw = centres.detach().cpu().to(torch.float16).contiguous().numpy().astype("<f2").tobytes()
        return Expansion(tuple(heads), tuple(bias), centres.shape[1], base64.b64encode(raw).decode(), open)

    def only(self, heads: tuple[int, ...]) -> Expansion:
        """That of some of its heads, rising."""
        if heads == self.heads:
            return self
        places = [self.heads.index(head) for head in heads]
        return Expansion.of(heads, tuple(self.bias[i] for i in places), self.tensor()[places], self.open)

    def tensor(self) -> Tensor:
        """The centres, float32 `[heads, number, D]`."""
        raw = np.frombuffer(base64.b64decode(self.centres), dtype="<f2").astype(np.float32)
        return torch.from_numpy(raw).view(len(self.heads), self.number, -1)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Centres and biases `[heads]` on a device, kept for the next call."""
        traced = torch.compiler.is_compiling() or type(torch.empty(0)) is not torch.Tensor
        return (_kept.__wrapped__ if traced else _kept)(self, device)

    def __repr__(self) -> str:
        # A decode state knows its layer by this: of other centres it is another.
        name = hashlib.sha256(self.centres.encode()).hexdigest()[:12]
        about = f"centres=<{name}, {self.width} wide>"
        return f"Expansion(heads={self.heads}, bias={self.bias}, number={self.number}, {about}, open={self.open})"


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _kept(expansion: Expansion, device: torch.device) -> tuple[Tensor, Tensor]:
    return expansion.tensor().to(device), torch.tensor(expansion.bias, device=device)
