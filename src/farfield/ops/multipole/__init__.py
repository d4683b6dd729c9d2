"""Multipole attention: near tokens exactly, far tokens through a hierarchy of summaries, one softmax."""

from farfield.ops.multipole.analysis import ErrorReport, LevelError, effective_weights, error_report
from farfield.ops.multipole.api import multipole_attention
from farfield.ops.multipole.decode import multipole_rows
from farfield.ops.multipole.engines import ENGINES, Request, can_run
from farfield.ops.multipole.summarise import summarise
from farfield.ops.multipole.summary import (
    LearnedSummary,
    LevelWeights,
    PooledSummary,
    SharedSummary,
    Summaries,
    Summary,
    averaging,
)

__all__ = [
    "ENGINES",
    "ErrorReport",
    "LearnedSummary",
    "LevelError",
    "LevelWeights",
    "PooledSummary",
    "Request",
    "SharedSummary",
    "Summaries",
    "Summary",
    "averaging",
    "can_run",
    "effective_weights",
    "error_report",
    "multipole_attention",
    "multipole_rows",
    "summarise",
]
