"""The Triton engine."""

from __future__ import annotations

from farfield.ops.multipole.engines import Request


def why_not(request: Request) -> str | None:
    """Not built yet."""
    return "it is not built"
