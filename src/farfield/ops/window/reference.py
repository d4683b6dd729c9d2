"""The reference engine: a dense mask built straight from the index rule, and a softmax over it. O(N²), any float dtype.

The rule, per axis of length L with window w, stride s and dilation d. Token i belongs to the group g = i mod d of the
tokens g, g + d, g + 2d, ...; it stands at place p = i div d among L' = ceil((L - g) / d). Places are visible from

- not causal: leader = min((p div s) s + s div 2, L' - 1), moved inside so that w places fit around it; the places from
  leader - w div 2 on, w of them. So every query sees exactly w keys, at the borders too;
- causal: leader = min((p div s) s + s - 1, L' - 1); the places from max(leader - w + 1, 0) to p.

In several dimensions a key is visible when it is so on every axis. (Neighborhood attention, arXiv 2204.07143; dilation,
arXiv 2209.15001; stride, arXiv 2504.16922.)
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from farfield.ops.state import AttentionState, attend_dense

__all__ = ["attend", "axis_mask", "window_mask"]


def axis_mask(length: int, window: int, stride: int, dilation: int, causal: bool) -> Tensor:
    """Bool `[length, length]`: entry (i, j) says whether the query at i sees the key at j."""
    window = min(window, length) if dilation == 1 else window
    stride = min(stride, window)
    mask = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        group, place = i % dilation, i // dilation
        places = -(-(length - group) // dilation)
        if causal:
            leader = min(place // stride * stride + stride - 1, places - 1)
            seen = range(max(leader - window + 1, 0), place + 1)
        else:
            left = window // 2
            right = window // 2 + window % 2 - 1
            leader = min(place // stride * stride + stride // 2, places - 1)
            centre = min(max(leader, left), places - 1 - right)
            seen = range(centre - left, centre + right + 1)
        mask[i, seen.start * dilation + group : seen.stop * dilation : dilation] = True
    return mask


def window_mask(
    grid: tuple[int, ...],
    window: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[bool, ...],
    bounds: tuple[int, ...] | None = None,
) -> Tensor:
    """Bool `[N, N]` over the row-major tokens of the grid; with `bounds` (1-D) every packed segment on its own."""
    if bounds is not None:
        pieces = [b - a for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
        segments = [axis_mask(n, window[0], stride[0], dilation[0], causal[0]).to(torch.uint8) for n in pieces]
        joined: Tensor = torch.block_diag(*segments)
        return joined.bool()
    axes = [axis_mask(*rule) for rule in zip(grid, window, stride, dilation, causal, strict=True)]
    product: Tensor = reduce(torch.kron, (axis.to(torch.uint8) for axis in axes))
    return product.bool()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: tuple[int, ...],
    window: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[bool, ...],
    key_mask: Tensor | None,
    bounds: tuple[int, ...] | None,
    scale: float,
) -> AttentionState:
    """The operator of :func:`farfield.ops.window.window_attention`, on checked arguments."""
    visible = window_mask(grid, window, stride, dilation, causal, bounds).to(query.device)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    return attend_dense(query, key, value, scale=scale, visible=visible)
