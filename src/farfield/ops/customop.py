"""What custom operators share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["one_by_one"]


def one_by_one(op: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """A rule for `register_vmap` that runs the entries one after another: right for every argument, not fast.

    Args:
        op: the custom operator, which returns a tuple or a list of tensors.
    """

    def pick(value: Any, dim: Any, i: int) -> Any:
        if isinstance(value, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [pick(v, d, i) for v, d in zip(value, dim, strict=True)]
        return value if dim is None else value.select(dim, i)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        results = [op(*(pick(a, d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]
        stacked = [torch.stack(r) for r in zip(*results, strict=True)]
        return type(results[0])(stacked), type(results[0])([0] * len(stacked))

    return rule
