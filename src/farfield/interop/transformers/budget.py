"""Spending a budget of keys where it lowers the error most: one price for all heads of all layers."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["allocate"]

_STEPS = 80
_CHEAPEST, _DEAREST = -60.0, 40.0
"""Logarithms of prices between which every choice lies."""


def allocate(errors: Tensor, keys: Tensor, *, budget: float | None = None, bound: float | None = None) -> Tensor:
    """One setting for every head, least in error under a budget, or least in keys under a bound on the error.

    Every head takes the setting with the least ``error + price * keys``. The price is the lowest that keeps the budget
    (or the highest that keeps the bound), found by bisection, so the result lies on the lower convex hull of what can
    be had, within one head's step of the optimum.

    Args:
        errors: [S, L, H] the error of each setting in each head of each layer.
        keys: [S] what each setting reads.
        budget: mean keys over all heads.
        bound: the sum of errors over all heads. Exactly one of the two.

    Returns:
        [L, H] numbers of settings. Of equals, the first.

    Raises:
        ValueError: when no choice keeps the budget or the bound, naming the least that can be reached.
    """
    if (budget is None) == (bound is None):
        raise ValueError(f"budget={budget}, bound={bound}: exactly one of them would be accepted")
    errors, keys = errors.double(), keys.double()

    def choose(price: float) -> Tensor:
        return (errors + math.exp(price) * keys[:, None, None]).argmin(0)

    def fits(choice: Tensor) -> bool:
        if budget is not None:
            return keys[choice].mean().item() <= budget
        return errors.gather(0, choice[None]).sum().item() <= float(bound or 0.0)

    # With a budget the dear end fits, with a bound the cheap one; walk from there towards the other.
    good, bad = (_DEAREST, _CHEAPEST) if budget is not None else (_CHEAPEST, _DEAREST)
    if not fits(choose(good)):
        if budget is not None:
            raise ValueError(f"a budget of {budget:.1f} keys per query: the least that can be had is {keys.min():.1f}")
        least = errors.amin(0).sum()
        raise ValueError(f"an error of at most {bound:g}: the least that these settings reach is {least:.3g}")
    if fits(choose(bad)):
        return choose(bad)
    for _ in range(_STEPS):
        middle = (good + bad) / 2
        if fits(choose(middle)):
            good = middle
        else:
            bad = middle
    return choose(good)
