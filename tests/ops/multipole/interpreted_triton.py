"""The Triton kernels in Triton's interpreter. Collected by name only: test_triton.py runs this file in a process of
its own, since the interpreter must be chosen before triton is imported."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import farfield as ff
from farfield.geometry import geometry
from farfield.ops.multipole.op import multipole, multipole_backward
from farfield.ops.multipole.summary import pack
from farfield.ops.multipole.triton import tables
from support.triton_cases import SHAPES, Shape, assert_within_budget, gradients, to

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("name", SHAPES)
def test_equal_to_the_reference(name: str) -> None:
    assert_within_budget(SHAPES[name].case(), "triton", torch.float32)


@pytest.mark.parametrize(
    "shape",
    [
        Shape((35,), 4, 1, "shared", options={"causal": True, "sinks": 3}),
        Shape((20, 3), 2, (1, 2), "shared", masked=0.2),
        Shape((18, 2, 3), 2, (2, 1, 1), "shared", options={"sinks": 2}),
    ],
    ids=["line", "image", "volume"],
)
def test_pieces_and_launches_do_not_show(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of readers cut into many pieces, and a pyramid of one level to a launch, as large sizes have them."""
    g = geometry(shape.grid, shape.block, shape.rank)
    with monkeypatch.context() as patch:
        patch.setattr(tables, "PIECE_TOKENS", 2 * g.block_tokens)
        patch.setattr(tables, "FOLD_CELLS", 2**g.dims)
        tables._make_tables.cache_clear()
        causal, sinks = (shape.options.get(name, default) for name, default in (("causal", False), ("sinks", 0)))
        t = tables.make_tables(g.grid, None, g.block, g.rank, None, causal, sinks, torch.device("cpu"))
        assert len(t.folds) == g.levels - 1 >= 2 and t.far_readers.start.diff().max() > 1
        assert_within_budget(shape.case(), "triton", torch.float32)
    tables._make_tables.cache_clear()


@pytest.mark.parametrize(
    "shape",
    [
        Shape((45,), 8, 4, "shared", heads=(2, 1), width=32, options={"causal": True}),
        Shape((13, 4), (4, 4), (2, 2), "pooled", width=24),
    ],
    ids=["line", "image"],
)
def test_error_budget_of_float16(shape: Shape) -> None:
    assert_within_budget(shape.case(), "triton", torch.float16)


def test_hidden_tokens_leak_nothing() -> None:
    case = to(Shape((27,), 8, 4, "shared", masked=0.4, options={"sinks": 3}).case(), torch.float32)
    hidden = ~case.options["key_mask"][:, None, :, None]
    key, value = (x.detach().masked_fill(hidden, torch.nan).requires_grad_() for x in (case.key, case.value))
    clean, dirty = (gradients(c, "triton") for c in (case, replace(case, key=key, value=value)))
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert all((g.masked_select(hidden) == 0).all() for g in dirty[3:5])


def test_rows_that_see_nothing() -> None:
    """0 and -inf with zero gradients, whatever flows into output and lse."""
    shape = Shape((37,), 8, 4, batch=2, options={"causal": True, "sinks": 2})
    case = to(shape.case(), torch.float32)
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[0], mask[1, :20] = False, False
    case.options["key_mask"] = mask
    out, lse, *grads = gradients(case, "triton")
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
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# In torch's machinery -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "causal"),
    [
        (Shape((29,), 8, 4, heads=(2, 1), bias=True, options={"sinks": 2}), True),
        (Shape((7, 2), 2, (1, 2), "shared", masked=0.3), False),
        (Shape((29,), 8, 4, "pooled"), True),
    ],
    ids=["line", "image", "pooled"],
)
def test_opcheck(shape: Shape, causal: bool) -> None:
    """Schema, fakes and aliasing, forward and backward."""
    case = to(shape.case(), torch.float32)
    kind, weights = pack(case.summary)
    q, k, v = (x.detach() for x in (case.query, case.key, case.value))
    bias = None if case.level_bias is None else case.level_bias.detach()
    tensors = (q, k, v, case.options.get("key_mask"), None, bias, None, [w.detach() for w in weights])
    g = case.shape
    settings = (
        kind, list(g.grid), list(g.block), list(g.rank), -1, causal, True, [], shape.options.get("sinks", 0), 0.25, 0.0,
        "both", "triton",
    )  # fmt: skip
    torch.library.opcheck(multipole, (*tensors, *settings))
    out, lse = multipole(*tensors, *settings)
    grads = (torch.randn_like(out), torch.randn_like(lse))
    torch.library.opcheck(multipole_backward, (*grads, out, lse, *tensors, *settings))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
def test_one_graph_for_all_lengths() -> None:
    """Compiled with fullgraph, forward and backward: the bits of the eager call, whatever the number of levels."""

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return ff.multipole_attention(q, k, v, block=4, rank=1, causal=True, impl="triton", return_lse=True)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    for number in (14, 25, 9, 3):
        leaves = [torch.randn(1, heads, number, 16, requires_grad=True) for heads in (2, 1, 1)]
        results = []
        for run in (compiled, f):
            out, lse = run(*leaves)
            results.append((out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert sum(any(node.op.startswith("call") for node in graph.graph.nodes) for graph in counter.graphs) == 1
