"""The Triton kernels in Triton's interpreter. Collected by name only: test_triton.py runs this file in a process of
its own, since the interpreter must be chosen before triton is imported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from farfield.ops.multipole.triton import tables
from support.triton_cases import SHAPES, Shape, assert_close, budget, gradients, to

pytestmark = pytest.mark.usefixtures("poisoned")

LOOSE = 5e-6
"""Far above the error of float32 (a few 1e-7), far below any mistake."""


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Long lists of readers cut into many pieces, and a pyramid of one level to a launch."""
    monkeypatch.setattr(tables, "PIECE_TOKENS", 8)
    monkeypatch.setattr(tables, "FOLD_CELLS", 2)
    tables._make_tables.cache_clear()
    yield
    tables._make_tables.cache_clear()


def check(shape: Shape) -> None:
    case = shape.case()
    truth = gradients(case, "reference")
    got = gradients(to(case, torch.float32), "triton")
    assert_close(got, truth, [LOOSE] * (2 + len(truth[2])))


@pytest.mark.parametrize("name", SHAPES)
def test_equal_to_the_reference(name: str) -> None:
    check(SHAPES[name])


@pytest.mark.usefixtures("small_pieces")
def test_pieces_and_launches_do_not_show() -> None:
    check(Shape((35,), 4, 1, "shared", options={"causal": True, "sinks": 3}))


@pytest.mark.parametrize(
    "shape",
    [
        Shape((45,), 8, 4, "shared", heads=(2, 1), width=32, options={"causal": True}),
        Shape((13, 4), (4, 4), (2, 2), "pooled", width=24),
    ],
    ids=["line", "image"],
)
def test_error_budget_of_float16(shape: Shape) -> None:
    case = to(to(shape.case(), torch.float16), torch.float64)
    truth = gradients(case, "reference")
    assert_close(gradients(to(case, torch.float16), "triton"), truth, budget(case, torch.float16, truth))


def test_hidden_tokens_leak_nothing() -> None:
    case = to(Shape((27,), 8, 4, "shared", masked=0.4, options={"sinks": 3}).case(), torch.float32)
    hidden = ~case.options["key_mask"][:, None, :, None]
    key, value = (x.detach().masked_fill(hidden, torch.nan).requires_grad_() for x in (case.key, case.value))
    clean, dirty = (gradients(c, "triton") for c in (case, replace(case, key=key, value=value)))
    for a, b in zip((clean[0], clean[1], *clean[2]), (dirty[0], dirty[1], *dirty[2]), strict=True):
        assert torch.equal(a, b)
    assert all((g.masked_select(hidden) == 0).all() for g in dirty[2][1:3])


def test_rows_that_see_nothing() -> None:
    """0 and -inf with zero gradients, whatever flows into output and lse."""
    shape = Shape((37,), 8, 4, batch=2, options={"causal": True, "sinks": 2})
    case = to(shape.case(), torch.float32)
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[0], mask[1, :20] = False, False
    case.options["key_mask"] = mask
    out, lse, grads = gradients(case, "triton")
    empty = lse == -torch.inf
    assert empty[0].all() and empty[1, :, :20].all() and not empty[1, :, 20:].any()
    assert (out[empty] == 0).all() and (grads[0][empty] == 0).all()
    assert all(torch.isfinite(g).all() for g in grads)
    assert (grads[1][0] == 0).all() and (grads[2][0] == 0).all()


def test_gradient_of_lse_alone() -> None:
    case = Shape((45,), 8, 4).case()
    single = to(case, torch.float32)
    got, wanted = (
        torch.autograd.grad(c.run(impl=impl)[1].sum(), (c.query, c.key))
        for c, impl in ((single, "triton"), (case, "torch"))
    )
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_any_strides_and_the_same_bits_twice() -> None:
    case = to(Shape((45,), 8, 4, "shared", heads=(2, 1), options={"causal": True}).case(), torch.float32)

    def heads_last(x: torch.Tensor) -> torch.Tensor:
        return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()

    other = replace(case, query=heads_last(case.query), key=heads_last(case.key), value=heads_last(case.value))
    first, second = gradients(case, "triton"), gradients(other, "triton")
    for a, b in zip((first[0], first[1], *first[2]), (second[0], second[1], *second[2]), strict=True):
        assert torch.equal(a, b)
