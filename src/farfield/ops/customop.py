"""What custom operators and their gradients share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["differentiable_once", "one_by_one"]


class _Once(torch.autograd.Function):
    """Gradients as they are, which hang on what they were made of and cannot be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(instead: str, number: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in tensors[:number])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.instead = inputs[0]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        raise RuntimeError(f"a second derivative of an operator that is differentiable once. {ctx.instead}")


def differentiable_once(
    make: Callable[[], Sequence[Tensor]], sources: Sequence[Tensor | None], instead: str
) -> Sequence[Tensor]:
    """What ``make`` returns, gradients in the backward pass of a function; to differentiate them is an error.

    `torch.autograd.function.once_differentiable` lets second derivatives be 0 without a word: where they are asked for
    by name of the inputs, in ``torch.func``, or where only a part of a loss holds a gradient. Under `torch.compile`
    gradients come without a graph, as that of every function written so.

    Args:
        make: makes them, without a graph.
        sources: what they hang on: gradients of the outputs, and the inputs.
        instead: what is differentiable twice, a sentence for the message.
    """
    with torch.no_grad():
        made = make()
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return made
    found: tuple[Tensor, ...] = _Once.apply(instead, len(made), *made, *(x for x in sources if x is not None))
    return found


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
