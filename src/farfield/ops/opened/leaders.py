"""Who chooses: the queries whose scores decide which cells are opened for a run of neighbouring queries."""

from __future__ import annotations

from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from farfield.ops.cache import read_ring

__all__ = ["leader_of", "leaders", "leaders_at", "means"]


def leaders(queries: Tensor, share: int, recent: int, valid: Tensor | None = None) -> Tensor:
    """[G, ceil(N / share), D] float32, the causal leader of every run: its first query, averaged with those before it.

    The leader is half the run's first query and half the mean of the ``recent`` valid ones right before it; where there
    are none, and with ``recent=0``, it is the first query alone. No run depends on a query after its first. O(N).

    Args:
        queries: [G, N, D] in the order of the sequence.
        share: queries of a run.
        recent: how many queries before it count.
        valid: [G, N] bool, the queries that count; None for all.
    """
    own = queries[:, ::share].float()
    if not recent:
        return own
    step = gcd(share, recent)
    weight = own.new_ones(1, queries.shape[1]) if valid is None else valid.float()
    runs = queries.float() if valid is None else queries.float().masked_fill(~valid[..., None], 0.0)

    def total(x: Tensor) -> Tensor:
        """[G, U, ...] sums of [G, N, ...] over the queries before every run."""
        x = F.pad(x, (0, 0, 0, -x.shape[1] % step)).unflatten(1, (-1, step)).sum(2)
        places, every = recent // step, share // step
        x = F.pad(x, (0, 0, places, 0))[:, :-1]
        parts = [x[:, place::every][:, : own.shape[1]] for place in range(places)]
        return sum(parts[1:], parts[0])

    count = total(weight[..., None])
    return own + (total(runs) / count.clamp(min=1) - own) * 0.5 * (count > 0)


def leaders_at(queries: Tensor, positions: Tensor, share: int, recent: int) -> Tensor:
    """[G, n, D] as :func:`leaders`, of the runs that hold the ``positions`` [n] alone. O(n recent)."""
    first = positions // share * share
    own = queries[:, first].float()
    total = torch.zeros_like(own)
    for step in range(1, recent + 1):
        total += queries[:, (first - step).clamp(min=0)].float() * (step <= first)[:, None]
    count = first.clamp(max=recent)[:, None]
    return own + (total / count.clamp(min=1) - own) * 0.5 * (count > 0)


def leader_of(ring: Tensor, at: int, share: int, recent: int) -> Tensor:
    """[B, H, D] float32, the leader of the run that holds position ``at``.

    ``ring`` [B, H, S, D] holds the query of position i at place i % S, from at - share - recent + 1 on at least.
    """
    first = at // share * share
    own = ring[:, :, first % ring.shape[2]].float()
    start = max(0, first - recent)
    if start == first:
        return own
    return own + (read_ring(ring, start, first).float().mean(2) - own) * 0.5


def means(units: Tensor, filled: Tensor) -> Tensor:
    """[G, U, D] float32 means over the queries [G, U, M, D] of a unit, those at places that hold a token.

    ``filled`` [N] bool says which of the first N places do.
    """
    share = units.shape[2]
    slots = F.pad(filled, (0, units.shape[1] * share - len(filled)))
    weight = slots.view(1, -1, share, 1).float()
    return (units.float() * weight).sum(2) / weight.sum(2).clamp(min=1.0)
