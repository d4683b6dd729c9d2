"""Spending a budget of keys where it lowers the error most: one price for all heads of all layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["allocate"]

_STEPS = 80
_CHEAPEST, _DEAREST = -60.0, 40.0
"""Logarithms of prices between which every choice lies."""


def allocate(
    errors: Tensor,
    keys: Tensor,
    *,
    budget: float | None = None,
    bound: float | None = None,
    apart: Tensor | None = None,
    shared: int = 1,
    most: int | None = None,
) -> Tensor:
    """One setting for every head, least in error under a budget, or least in keys under a bound on the error.

    Every head takes the setting with the least ``error + price * keys``. The price is the lowest that keeps the budget
    (or the highest that keeps the bound), found by bisection: what it gives lies on the lower convex hull of what can
    be had, within one head's step of the optimum. What of a budget is left then goes to single heads, first where it
    buys most for its keys; nothing is taken back for it. With a limit on groups neither holds, as which groups gain
    most hangs on the price.

    Args:
        errors: [S, L, H] the error of each setting in each head of each layer.
        keys: [S] what each setting reads.
        budget: mean keys over all heads.
        bound: the sum of errors over all heads. Exactly one of the two.
        apart: [S] bool, settings that few groups of heads may have: those that decoding keeps all tokens for.
        shared: consecutive heads of a layer that form a group: those that read one key head.
        most: how many groups, of all layers, may have settings that are ``apart``: at every price those that gain most
            by it. None for no limit.

    Returns:
        [L, H] numbers of settings. Of equals, the first.

    Raises:
        ValueError: when no choice keeps the budget or the bound, naming the least that can be reached.
    """
    if (budget is None) == (bound is None):
        raise ValueError(f"budget={budget}, bound={bound}: exactly one of them would be accepted")
    errors, keys = errors.double(), keys.double()
    if apart is not None and most is not None and bool(apart.all()):
        raise ValueError(f"most={most}: every setting is apart; one that is not would be needed")

    def allowed(price: float) -> Tensor:
        """[S, L, H] the errors of what every head may have at this price, inf of what it may not."""
        if apart is None or most is None:
            return errors
        cost = errors + math.exp(price) * keys[:, None, None]
        closed = apart[:, None, None].to(cost.device)
        gain = cost.masked_fill(closed, torch.inf).amin(0) - cost.amin(0)
        gain = gain.unflatten(-1, (-1, shared)).sum(-1)
        chosen = torch.zeros(gain.numel(), dtype=torch.bool, device=cost.device)
        chosen[gain.flatten().argsort(descending=True, stable=True)[:most]] = True
        heads = chosen.view_as(gain).repeat_interleave(shared, -1)
        return errors.masked_fill(closed & ~heads, torch.inf)

    def choose(price: float) -> Tensor:
        return (allowed(price) + math.exp(price) * keys[:, None, None]).argmin(0)

    def fits(choice: Tensor) -> bool:
        if budget is not None:
            return keys[choice].mean().item() <= budget
        return errors.gather(0, choice[None]).sum().item() <= float(bound or 0.0)

    # With a budget the dear end fits, with a bound the cheap one; walk from there towards the other.
    good, bad = (_DEAREST, _CHEAPEST) if budget is not None else (_CHEAPEST, _DEAREST)
    if not fits(choose(good)):
        if budget is not None:
            least = keys[choose(good)].mean()
            raise ValueError(f"a budget of {budget:.1f} keys per query: the least that can be had is {least:.1f}")
        least = errors.gather(0, choose(good)[None]).sum()
        raise ValueError(f"an error of at most {bound:g}: the least that these settings reach is {least:.3g}")
    if fits(choose(bad)):
        return choose(bad)
    for _ in range(_STEPS):
        middle = (good + bad) / 2
        if fits(choose(middle)):
            good = middle
        else:
            bad = middle
    return choose(good) if budget is None else _spent(choose(good), allowed(good), keys, budget)


def _spent(choice: Tensor, errors: Tensor, keys: Tensor, budget: float) -> Tensor:
    """A choice with what is left of the budget spent: the most error for a key first, as long as anything fits."""
    choice = choice.clone()
    left = budget * choice.numel() - keys[choice].sum().item()
    while True:
        more = keys[:, None, None] - keys[choice]
        gain = errors.gather(0, choice[None]) - errors
        fits = (gain > 0) & (more <= left)
        if not fits.any():
            return choice
        # What is better and reads no more comes before everything else.
        rate = torch.where(fits, gain / more.clamp(min=1e-9), 0.0)
        setting, layer, head = (int(i) for i in torch.unravel_index(rate.argmax(), rate.shape))
        left -= float(more[setting, layer, head])
        choice[layer, head] = setting
