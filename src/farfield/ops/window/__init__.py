"""Windowed attention: sliding, strided, blocked, dilated; causal or not; in 1-D, 2-D and 3-D."""

from farfield.ops.window.api import window_attention

__all__ = ["window_attention"]
