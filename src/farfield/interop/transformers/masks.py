"""The mask function: what Transformers says about who may see whom, brought into a form that a sparse operator can use.

Transformers describes a mask by an index function and a padding mask. Nothing of size N² is made of it here. The result
is a small integer tensor [B, 1, 1, Nk], one code per key column, or None where every column is a visible token:

- uint8: 1 visible, 0 hidden (padding);
- int8: the same, and -1 for the unused end of a static cache;
- int32: every token has the number of its packed sequence, from 1.

Four axes make Transformers hand it on unchanged; integers cannot be mistaken for a mask of the caller's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

__all__ = ["Columns", "mask", "read"]

_HIDDEN, _VISIBLE, _UNUSED = 0, 1, -1


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """The function that :func:`register` gives to Transformers' `AttentionMaskInterface`.

    Returns:
        Codes of the key columns, see above, or None. O(B Nk).

    Raises:
        ValueError: for a pattern that is neither causal nor bidirectional nor made of packed sequences (or chunks) that
            are; the message says what was found.
    """
    if use_vmap:
        raise ValueError(
            "the model combines its attention mask with a function of its own (or_mask_function, and_mask_function: a "
            "prefix that sees itself both ways, image tokens, ...); farfield needs a plain causal or bidirectional "
            "order. Use attn_implementation='eager'"
        )
    keep = None
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}: [B, N] is needed, True = a token, "
                "False = padding. Farfield never builds the N x N matrix that a mask per pair would be part of"
            )
        keep = attention_mask.to(device=device, dtype=torch.bool)[:, kv_offset : kv_offset + kv_length]
        keep = torch.nn.functional.pad(keep, (0, kv_length - keep.shape[1]))
    if mask_function is bidirectional_mask_function:
        return _padding(keep)
    length = q_offset - kv_offset + q_length
    if mask_function is not causal_mask_function:
        columns = _Pattern(mask_function, batch_size, kv_length, kv_offset, torch.device(device))
        # Only packed sequences and overlays forbid the skip, and packed sequences come without a padding mask.
        single = local_size is not None and (keep is not None or allow_is_causal_skip)
        segments = columns.segments(local_size, one=single and torch.compiler.is_compiling())
        if segments is not None:
            return _packed(segments, keep, length, kv_length)
    if isinstance(length, int) and length == kv_length:
        return _padding(keep)
    codes = torch.ones(batch_size, kv_length, device=device) if keep is None else keep
    unused = torch.arange(kv_length, device=device) >= length
    return codes.to(torch.int8).masked_fill(unused, _UNUSED)[:, None, None]


def _padding(keep: Tensor | None) -> Tensor | None:
    if keep is None or (not torch.compiler.is_compiling() and bool(keep.all())):
        return None
    return keep.to(torch.uint8)[:, None, None]


def _packed(segments: Tensor, keep: Tensor | None, length: int | Tensor, kv_length: int) -> Tensor:
    if keep is not None and not torch.compiler.is_compiling() and not bool(keep.all()):
        raise ValueError(
            "packed sequences or chunks together with padding: drop the padding and pack, or pad and do not pack"
        )
    if not isinstance(length, int) or length != kv_length:
        raise ValueError(
            "packed sequences or chunks in a static cache, whose end is unused: use a dynamic cache or use_cache=False"
        )
    return segments.to(torch.int32)[:, None, None]


class _Pattern:
    """An index function, looked at near the diagonal: O(B N) entries of its matrix."""

    def __init__(
        self, function: Callable[..., Tensor], batch: int, columns: int, offset: int, device: torch.device
    ) -> None:
        self.function, self.columns, self.offset = function, columns, offset
        self.batch = torch.arange(batch, device=device)[:, None]
        self.index = torch.arange(columns, device=device)[None]

    def _sees(self, other: Tensor) -> Tensor:
        """[B, N] whether every column sees the column `other` [1 or B, N]; False outside."""
        inside = (other >= 0) & (other < self.columns)
        at = other.clamp(0, self.columns - 1)
        seen = self.function(self.batch, 0, self.index + self.offset, at + self.offset)
        return (seen & inside).expand(len(self.batch), -1)

    def segments(self, window: int | None, one: bool) -> Tensor | None:
        """[B, N] numbers of packed sequences from 1, None for one sequence (`one` promises that).

        Raises:
            ValueError: when the pattern is not causal (in a window, if given) inside sequences that do not see another.
        """
        index, before = self.index, self.index - 1
        follows = self._sees(before)
        if window == 1 or one:
            starts = index == 0
        else:
            starts = ~follows
        starts = starts.expand(len(self.batch), -1)
        begin = torch.where(starts, index, 0).cummax(-1).values
        age = index - begin
        reach = age if window is None else age.clamp(max=window - 1)
        wrong = self._sees(index + 1) | ~self._sees(index) | ~self._sees(index - reach) | self._sees(index - reach - 1)
        _demand(~wrong.any(), _STRANGE)
        if one or (not torch.compiler.is_compiling() and not bool(starts[:, 1:].any())):
            return None
        return starts.cumsum(-1)


_STRANGE = (
    "the model's attention mask is neither causal nor bidirectional, nor packed sequences or chunks of a causal one (a "
    "window that looks both ways, or blocks of tokens that see each other, such as an image's); farfield does not know "
    "this order. Use attn_implementation='eager'"
)


def _demand(holds: Tensor, message: str) -> None:
    if torch.compiler.is_compiling():
        torch._assert_async(holds, message)
    elif not bool(holds):
        raise ValueError(message)


class Columns(NamedTuple):
    """What the key columns of a call are.

    Attributes:
        key_mask: bool [B, Nk], True = visible; None for all.
        length: columns in use; those after them are a static cache's unused end.
        segments: [B, Nk] number of each token's packed sequence, or None.
    """

    key_mask: Tensor | None
    length: int
    segments: Tensor | None


def read(attention_mask: Tensor | None, columns: int) -> Columns:
    """What :func:`mask` wrote, for `columns` keys.

    Raises:
        ValueError: for any other mask, which is the caller's own.
    """
    if attention_mask is None:
        return Columns(None, columns, None)
    if (
        attention_mask.dtype not in (torch.uint8, torch.int8, torch.int32)
        or attention_mask.ndim != 4
        or attention_mask.shape[1:3] != (1, 1)
        or attention_mask.shape[3] != columns
    ):
        raise ValueError(
            f"an attention mask of shape {list(attention_mask.shape)} and dtype {attention_mask.dtype} says for every "
            "pair of tokens who sees whom, which a sparse operator cannot honour; give a 2-D mask [B, N] (padding), "
            "position_ids that restart (packed sequences), or use attn_implementation='eager'"
        )
    codes = attention_mask[:, 0, 0]
    if codes.dtype == torch.int32:
        return Columns(None, columns, codes)
    length = columns
    if codes.dtype == torch.int8:
        length = int((codes[0] != _UNUSED).sum())
        codes = codes[:, :length]
        if not torch.compiler.is_compiling() and bool((codes == _VISIBLE).all()):
            return Columns(None, length, None)
    return Columns(codes != _HIDDEN, length, None)
