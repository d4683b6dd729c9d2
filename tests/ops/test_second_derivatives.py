"""Operators that are differentiable once refuse second derivatives however they are asked for, and never return 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import farfield as ff
from farfield.ops.expansion import expansion_state
from farfield.ops.window import window_attention

Function = Callable[[Tensor], Tensor]


def _expansion(x: Tensor) -> Tensor:
    centres, bias = torch.ones(1, 2, 4).cumsum(1), torch.zeros(1)
    return expansion_state(x, x, x, centres, bias, block=4, key_mask=None, scale=0.5, sinks=0).out


OPERATORS: dict[str, Function] = {
    "multipole": lambda x: ff.multipole_attention(x, x, x, block=4, rank=2),
    "multipole in torch": lambda x: ff.multipole_attention(x, x, x, block=4, rank=2, impl="torch"),
    "window": lambda x: window_attention(x, x, x, window=7),
    "opened": lambda x: ff.opened_attention(x, x, x, block=4, rank=2, open=2),
    "expansion": _expansion,
}


def _named(f: Function, x: Tensor) -> object:
    return torch.autograd.functional.hvp(lambda z: f(z).square().sum(), x, torch.ones_like(x))


def _penalty(f: Function, x: Tensor) -> object:
    """A part of the loss holds a gradient, another does not."""
    y = f(x.requires_grad_())
    (of_x,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return torch.autograd.grad((of_x.norm() - 1).square() + y.square().sum(), x)


def _backward(f: Function, x: Tensor) -> object:
    (of_x,) = torch.autograd.grad(f(x.requires_grad_()).square().sum(), x, create_graph=True)
    of_x.square().sum().backward()
    return x.grad


def _transformed(f: Function, x: Tensor) -> object:
    return torch.func.grad(lambda z: torch.func.grad(lambda y: f(y).square().sum())(z).square().sum())(x)


@pytest.mark.parametrize("ask", [_named, _penalty, _backward, _transformed])
@pytest.mark.parametrize("name", OPERATORS)
def test_refused(name: str, ask: Callable[[Function, Tensor], object]) -> None:
    if ask is _transformed and name in ("opened", "expansion"):
        pytest.skip("no gradients inside torch.func's transforms")
    with pytest.raises(RuntimeError, match="second derivative of an operator that is differentiable once"):
        ask(OPERATORS[name], torch.randn(1, 1, 50, 4, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", OPERATORS)
def test_a_graph_of_first_derivatives_that_nobody_uses_is_no_error(name: str) -> None:
    x = torch.randn(1, 1, 50, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    f = OPERATORS[name]
    (plain,) = torch.autograd.grad(f(x).square().sum(), x)
    (of_x,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(of_x, plain, rtol=0, atol=0)
    assert of_x.requires_grad
    if name != "opened" and name != "expansion":
        torch.testing.assert_close(torch.func.grad(lambda z: f(z).square().sum())(x.detach()), plain, rtol=0, atol=0)
