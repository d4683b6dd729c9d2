"""Opened cells: a far field that looks closer where the mass is."""

from farfield.ops.opened.api import opened_attention

__all__ = ["opened_attention"]
