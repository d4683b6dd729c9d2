"""Farfield: multiscale attention for PyTorch. Near tokens exactly, far tokens through summaries, the whole context.

    >>> import torch, farfield as ff
    >>> q = k = v = torch.randn(1, 8, 1000, 64)
    >>> ff.multipole_attention(q, k, v, causal=True, block=64, rank=8).shape
    torch.Size([1, 8, 1000, 64])

The operator is :func:`multipole_attention`; the layer is :class:`Attention` with a near field (:mod:`farfield.near`),
a far field (:mod:`farfield.far`) and a merge; :mod:`farfield.recipes` names the combinations of the literature.
"""

from farfield import far, near, recipes
from farfield.attention import Attention
from farfield.geometry import Geometry
from farfield.merge import AttentionState, merge_states
from farfield.ops.multipole import (
    ErrorReport,
    LearnedSummary,
    LevelWeights,
    PooledSummary,
    SharedSummary,
    Summaries,
    effective_weights,
    error_report,
    multipole_attention,
    summarise,
)
from farfield.ops.opened import opened_attention

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "AttentionState",
    "ErrorReport",
    "Geometry",
    "LearnedSummary",
    "LevelWeights",
    "PooledSummary",
    "SharedSummary",
    "Summaries",
    "effective_weights",
    "error_report",
    "far",
    "merge_states",
    "multipole_attention",
    "near",
    "opened_attention",
    "recipes",
    "summarise",
]
