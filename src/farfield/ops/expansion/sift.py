"""Which tokens a centre keeps out of its cell."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from farfield.geometry import EMPTY
from farfield.ops.compiled import choice as compiled
from farfield.ops.compiled.expansion import takes
from farfield.ops.expansion.moments import gathered
from farfield.ops.opened.choose import top

__all__ = ["admitted", "sift"]


@torch.no_grad()
def sift(
    key: Tensor, centres: Tensor, shown: Tensor, *, block: int, open: int, scale: float, units: int
) -> tuple[Tensor, Tensor]:
    """Which tokens every centre keeps out of its cell, for the queries of every unit (a leaf block of them).

    Args:
        key: [B, Hkv, N, D], Hkv divides H.
        centres: [H, C, D].
        shown: [B or 1, N] bool, which tokens count.
        block: tokens of a unit.
        open: tokens kept by a centre.
        scale: factor of the scores.
        units: U, how many units; the last sees the tokens before ``(U - 2) * block``.

    Returns:
        Tokens kept [B, H, U, C, open], rising, and those that join the cell at a unit [B, H, U, C, block], ``EMPTY``
        where there are fewer. What unit u sees are tokens before (u - 1) * block: of these the ``open`` with the
        largest scores at the centre are kept, of equal ones the first; one with a score of -inf is not. Scores are made
        in float32. O(N C (D + open / block)) time, and as many numbers as both tables have.
    """
    heads, number = centres.shape[:2]
    tokens = torch.full((len(key), heads, number, open), EMPTY, device=key.device)
    scores = torch.full(tokens.shape, -torch.inf, dtype=torch.float32, device=key.device)
    nobody = torch.full((*tokens.shape[:3], block), EMPTY, device=key.device)
    kept, joins = [], []
    for unit in range(units):
        left = nobody
        if unit > 1:
            place = slice((unit - 2) * block, (unit - 1) * block)
            seen = shown[:, None, None, place]
            tokens, left, scores = admitted(tokens, scores, key[:, :, place], place.start, seen, centres, scale)
            left = F.pad(left, (0, block - left.shape[-1]), value=EMPTY)
        kept.append(tokens)
        joins.append(left)
    return torch.stack(kept, 2), torch.stack(joins, 2)


def _scores(key: Tensor, centres: Tensor, scale: float) -> Tensor:
    """[B, H, C, M] scores of keys [B, Hkv, M, D] at the centres, float32.

    Bit by bit as the compiled engine has them, where it is there: equal choices in all precisions.
    """
    about = (centres.float() * scale).expand(len(key), -1, -1, -1)
    every = torch.arange(key.shape[2], device=key.device).expand(*about.shape[:3], -1)
    if takes(key, torch.float32):
        keys = key.float().flatten(0, 1)
        given = about.flatten(0, 1), keys, keys.new_zeros(1, keys.shape[1]), every.flatten(0, 1)
        return compiled.score(*given).view(every.shape)
    return (gathered(key, every).float() @ about[..., None]).squeeze(-1)


def admitted(
    tokens: Tensor, scores: Tensor, key: Tensor, start: int, seen: Tensor, centres: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What of tokens kept [.., open] and of those that come, seen [.., M], stays, what leaves [.., M], scores kept.

    Those that come have the keys [B, Hkv, M, D] and lie in the rows from ``start`` on.
    """
    open, size = tokens.shape[-1], key.shape[2]
    fresh = _scores(key, centres, scale).masked_fill(~seen, -torch.inf)
    index = torch.arange(start, start + size, device=key.device).where(seen, EMPTY)
    tokens, scores = torch.cat([tokens, index.expand(fresh.shape)], -1), torch.cat([scores, fresh], -1)
    chosen = top(scores, open)
    none, place = chosen == EMPTY, chosen.clamp(min=0)
    kept, score = (x.gather(-1, place).masked_fill(none, f) for x, f in ((tokens, EMPTY), (scores, -torch.inf)))
    others = F.pad(tokens, (0, 1)).scatter(-1, chosen.masked_fill(none, tokens.shape[-1]), EMPTY)[..., :-1]
    # Those that leave come first, in their order; never more of them than came in.
    order = (others == EMPTY).to(torch.uint8).argsort(stable=True, dim=-1)[..., :size]
    return kept, others.gather(-1, order), score
