"""Padded rows: blocks, cells and sinks are counted from every row's first token, not from its first column."""

from __future__ import annotations

import torch
from torch import Tensor

from farfield.attention import ReadyAttention
from farfield.parts import Inputs

__all__ = ["align", "aligned"]


def aligned(core: ReadyAttention, inputs: Inputs) -> Tensor:
    """Attention with every row's first visible token in column 0; `[B, Hq, N, D]` in the columns as given.

    So a padded sequence gives what it gives alone, on whichever side the padding is, up to the number of levels,
    which is that of the padded length.
    """
    turned, first = align(inputs)
    tokens = inputs.q.shape[2]
    index = (torch.arange(tokens, device=first.device) - first[:, None]) % tokens
    return _take(core.attend(turned), index)


def align(inputs: Inputs) -> tuple[Inputs, Tensor]:
    """The inputs turned round so, and how far every row was turned, [B].

    Queries are turned with their keys, and left as they are where they are fewer.
    """
    assert inputs.key_mask is not None
    tokens = inputs.k.shape[2]
    first = inputs.key_mask.to(torch.int8).argmax(-1)
    index = (torch.arange(tokens, device=first.device) + first[:, None]) % tokens
    turned = Inputs(
        q=_take(inputs.q, index) if inputs.q.shape[2] == tokens else inputs.q,
        k=_take(inputs.k, index),
        v=_take(inputs.v, index),
        x=inputs.x,
        grid=inputs.grid,
        causal=inputs.causal,
        key_mask=inputs.key_mask.gather(1, index),
        scale=inputs.scale,
        dropout=inputs.dropout,
    )
    return turned, first


def _take(x: Tensor, index: Tensor) -> Tensor:
    """[B, H, N, D] at tokens [B, M]."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
