"""Which arithmetic runs the tiles of an operator: torch's, or the compiled one."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from farfield.ops import tiles
from farfield.ops.compiled import tiles as compiled

__all__ = ["arithmetic"]


def arithmetic(engine: str, query: Tensor, dropout: bool = False) -> ModuleType:
    """The module whose ``attend`` and ``attend_backward`` run a call: :mod:`farfield.ops.tiles` or its compiled twin.

    Args:
        engine: "torch", "compiled", or empty for compiled where it can run the call.
        query: any tensor of the call's dtype and device.
        dropout: whether weights are dropped.

    Raises:
        ValueError: when "compiled" was asked for and cannot run, with the reason.
    """
    if engine == "torch":
        return tiles
    reason = compiled.why_not(query.device, query.dtype, dropout)
    if engine == "compiled" and reason is not None:
        raise ValueError(f"impl='compiled' cannot run this call: {reason}")
    return tiles if reason is not None else compiled
