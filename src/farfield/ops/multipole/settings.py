"""The settings of a call: everything but its tensors, as every engine takes them."""

from __future__ import annotations

from dataclasses import dataclass


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
