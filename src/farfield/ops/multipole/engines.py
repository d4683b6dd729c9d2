"""The engines of multipole attention, and which of them can run a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

ENGINES = ("reference", "torch", "compiled", "triton")
"""Every engine; those but the reference run inside the operators ``farfield::multipole`` and its backward."""


@dataclass(frozen=True)
class Request:
    """What of a call decides which engines can run it.

    Attributes:
        device, dtype: of query, key and value.
        head_dim: D.
        kind: of the summary, see :func:`farfield.ops.multipole.summary.pack`.
        query_rank: whether queries are pooled.
        dropout: whether weights are dropped.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    kind: str = "mean"
    query_rank: bool = False
    dropout: bool = False

    @staticmethod
    def of(query: Tensor, kind: str = "mean", query_rank: bool = False, dropout: bool = False) -> Request:
        """The request of a call with this query."""
        return Request(query.device, query.dtype, query.shape[-1], kind, query_rank, dropout)


def module(engine: str) -> ModuleType:
    """The module of an engine other than the reference.

    It offers ``forward`` and ``backward`` with the arguments of :mod:`farfield.ops.multipole.torch`, and
    ``why_not(request)``: None where it can run a :class:`Request`, otherwise the reason in one sentence.
    """
    return import_module(f"farfield.ops.multipole.{engine}")


def check_name(impl: str | None) -> None:
    """Raises ValueError unless ``impl`` is the name of an engine, or None."""
    if impl is not None and impl not in ENGINES:
        raise ValueError(f"impl={impl!r} is not an engine: {', '.join(ENGINES)} or None (chooses) would be accepted")


def can_run(engine: str, request: Request) -> str | None:
    """None when the engine can run the request, otherwise the reason why not; ValueError for an unknown name."""
    check_name(engine)
    if engine == "reference":
        return None
    why_not: Callable[[Request], str | None] = module(engine).why_not
    reason = why_not(request)
    return None if reason is None else f"impl={engine!r} cannot run this call: {reason}"


def choose(impl: str | None, request: Request) -> str:
    """The engine that runs a request: the one that was named, or the fastest that can.

    Raises:
        ValueError: when the named engine cannot run it, with the reason.
    """
    if impl is not None:
        reason = can_run(impl, request)
        if reason is not None:
            raise ValueError(reason)
        return impl
    fastest = {"cpu": "compiled", "cuda": "triton"}.get(request.device.type, "torch")
    return "torch" if can_run(fastest, request) is not None else fastest
