"""A call as every engine takes it: its settings and its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """Everything about a call but its tensors."""

    kind: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    rank: tuple[int, ...]
    levels: int | None
    causal: bool
    count_bias: bool
    query_rank: tuple[int, ...] | None
    sinks: int
    scale: float
    dropout: float
    part: str

    @property
    def near(self) -> bool:
        """Whether the near field takes part."""
        return self.part != "far"

    @property
    def far(self) -> bool:
        """Whether the far field takes part."""
        return self.part != "near"


class Tensors(NamedTuple):
    """The tensors of a call; those that may be None are not always there.

    Attributes:
        query: [B, Hq, N, D]; ``key``, ``value``: [B, Hkv, N, D].
        key_mask: [B, N] bool.
        cu_seqlens: [S + 1] bounds of packed sequences.
        level_bias: [levels or more, Hq].
        seed: [1] of the dropout.
        weights: of the summary, see :func:`farfield.ops.multipole.summary.unpack`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    level_bias: Tensor | None
    seed: Tensor | None
    weights: list[Tensor]


class Result(NamedTuple):
    """What a call gave and the gradients that arrive: [B, Hq, N, D] and, of the lse, [B, Hq, N]."""

    grad_out: Tensor
    grad_lse: Tensor
    out: Tensor
    lse: Tensor
