"""Error budgets: how far from the truth a computation in some precision may be.

The rule, for every engine: at most twice the error that plain torch makes in the same precision, three times for
gradients. Plain torch is the dense definition, each step rounded to the dtype of the query. In a tensor of few numbers
it can be exact by luck, so gradients share the largest of its errors, and what neither the dtype of a result nor
float32 arithmetic can avoid is allowed anyhow.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farfield.ops.multipole import reference
from farfield.ops.multipole.api import multipole_attention, normalise

__all__ = ["FACTOR", "GRADIENT_FACTOR", "Verdict", "bounds", "error", "gradients", "judge", "plain_attention"]

FACTOR, GRADIENT_FACTOR = 2.0, 3.0
"""How many times plain torch's error output and lse, and gradients, may have."""

ROUNDINGS = 32
"""Roundings of float32 allowed in any case: sums have another order, and gradients of scores are differences."""

SMALLEST = 1e-3
"""Errors are relative to the size of the truth, or to this where it is smaller (gradients that cancel to nothing)."""


def plain_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Output and lse of :func:`farfield.multipole_attention` by plain torch, all in the dtype of the query.

    Args:
        query, key, value: [B, H, N, D].
        **options: those of `multipole_attention` that say what is computed, with the same defaults.

    Raises:
        TypeError, ValueError: as `multipole_attention` does.
    """
    given = inspect.signature(multipole_attention).bind(query, key, value, **options)
    given.apply_defaults()
    call = normalise(*(given.arguments[name] for name in inspect.signature(normalise).parameters))
    call.update({name: given.arguments[name] for name in ("causal", "count_bias", "sinks", "dropout", "part")})
    return reference.attention(**call, plain=True)


def gradients(attention: Callable[[], tuple[Tensor, Tensor]], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Output, lse and the gradients of one random functional of both, the same in every precision and place.

    Its coefficients, multiples of 1/64 up to 2, are exact in every dtype, or their rounding would count as an error.
    """
    out, lse = attention()
    generator = torch.Generator().manual_seed(1)
    of_out, of_lse = (
        torch.randint(-127, 128, x.shape, generator=generator).to(x.device, x.dtype) / 64 for x in (out, lse)
    )
    seen = torch.where(lse > -torch.inf, lse, 0.0)
    # Products of halves are summed in float32, so that the functional's own value loses nothing.
    loss = (out * of_out).sum(dtype=lse.dtype) + (seen * of_lse).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    return [out.detach(), lse.detach(), *found]


def error(got: Tensor, wanted: Tensor) -> float:
    """Root mean square of the error relative to that of the truth; infinite where one is no number."""
    got, wanted = got.detach().double(), wanted.detach().double().to(got.device)
    difference = torch.where(got == wanted, 0.0, got - wanted)  # two empty rows' lse are equal
    if not wanted.numel():
        return 0.0
    if not torch.isfinite(difference).all():
        return float("inf")
    size = torch.where(torch.isfinite(wanted), wanted, 0.0).square().mean().sqrt().item()
    return difference.square().mean().sqrt().item() / max(size, SMALLEST)


def bounds(plain: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """Largest :func:`error` allowed of output, lse and every gradient, given plain torch's and the true ones.

    Raises:
        ValueError: where plain torch gives no numbers: it is no yardstick there.
    """
    errors = [error(a, b) for a, b in zip(plain, truth, strict=True)]
    if not all(map(math.isfinite, errors)):
        raise ValueError(
            f"plain torch in {plain[0].dtype} gives what is no number here, so it allows no error: {errors}"
        )
    allowed = [FACTOR * e for e in errors[:2]] + [GRADIENT_FACTOR * max(errors[2:], default=0.0)] * len(errors[2:])
    single = ROUNDINGS * torch.finfo(torch.float32).eps / 2
    return [max(e, torch.finfo(x.dtype).eps / 2, single) for e, x in zip(allowed, plain, strict=True)]


@dataclass(frozen=True)
class Verdict:
    """Errors of output, lse and every gradient, those of plain torch, and what is allowed."""

    errors: list[float]
    plain: list[float]
    bounds: list[float]

    @property
    def right(self) -> bool:
        """Whether every error is a number and within its bound."""
        return all(math.isfinite(e) and e <= b for e, b in zip(self.errors, self.bounds, strict=True))


def judge(got: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor]) -> Verdict:
    """Sets three results of :func:`gradients` side by side: an engine's, plain torch's in its precision, the truth."""
    errors, others = ([error(a, b) for a, b in zip(x, truth, strict=True)] for x in (got, plain))
    return Verdict(errors, others, bounds(plain, truth))
