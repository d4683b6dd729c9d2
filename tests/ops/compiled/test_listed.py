"""Attention over lists by the compiled engine, where units have few queries and where they have many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from farfield.ops.compiled import build
from farfield.ops.listed import attend_lists
from farfield.ops.tiles import Store

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"no compiled engine: {build.why_not()}")

BATCH, HEADS, UNITS = 2, 2, 5
GROUPS = BATCH * HEADS


def call(
    queries: int, dim: int, *, repeat: int = 1, pages: int = 9, biased: bool = True, wide: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """Query, (keys, values) of two stores, their tables, biases; unit 0 has absent rows, unit 1 nothing at all."""
    torch.manual_seed(queries * 100 + dim)
    query = torch.randn(GROUPS, repeat, UNITS, queries, dim)
    sides = [torch.randn(GROUPS, rows, width, dim) for rows, width in ((20, 4), (7, 1)) for _ in range(2)]
    tables = [torch.randint(0, 20, (GROUPS, UNITS, pages)), torch.randint(0, 7, (UNITS, 3))]
    tables[0][:, 0, ::2] = -1
    for table in tables:
        table[..., 1, :] = -1
    key_bias = head_bias = None
    if biased:
        key_bias = torch.randn(BATCH, UNITS, 4 * pages + 3, dtype=wide)
        key_bias[:, 2, ::3] = -torch.inf
        key_bias[0, 3] = -torch.inf
        head_bias = torch.randn(HEADS, repeat, 4 * pages + 3, dtype=wide)
    return query, sides, tables, key_bias, head_bias


def run(
    arguments: tuple[Tensor, list[Tensor], list[Tensor], Tensor | None, Tensor | None], dtype: torch.dtype, impl: str
) -> list[Tensor]:
    """Output, lse and all gradients."""
    query, sides, tables, key_bias, head_bias = arguments
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    query, *sides = (x.detach().to(dtype).requires_grad_() for x in (query, *sides))
    key_bias = None if key_bias is None else key_bias.to(wide)
    head_bias = None if head_bias is None else head_bias.detach().to(wide).requires_grad_()
    stores = [Store(*sides[2 * i : 2 * i + 2], tables[i]) for i in range(2)]
    out, lse = attend_lists(query, stores, key_bias, head_bias, batch=BATCH, scale=query.shape[-1] ** -0.5, impl=impl)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    seen = torch.where(lse == -torch.inf, 0.0, lse)
    inputs = [query, *sides, *([] if head_bias is None else [head_bias])]
    return [out, seen, *torch.autograd.grad((out * weight).sum() + seen.cos().sum(), inputs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 7, 20, 64])
@pytest.mark.parametrize("queries", [1, 2, 3, 4, 5, 7, 8, 17])
def test_any_number_of_queries(queries: int, dim: int, dtype: torch.dtype) -> None:
    """Against float64, at most twice (gradients: three times) the error of the torch engine, and a few roundings."""
    arguments = call(queries, dim, repeat=1 + (queries + dim) % 2, biased=dim != 20)
    rounded = tuple(x.to(dtype) if i == 0 else [y.to(dtype) for y in x] for i, x in enumerate(arguments[:2]))
    truth = run((*rounded, *arguments[2:]), torch.float64, "reference")  # type: ignore[arg-type]
    ours, theirs = (run(arguments, dtype, impl) for impl in ("compiled", "torch"))
    assert (ours[0][:, :, 1] == 0).all() and (ours[2][:, :, 1] == 0).all()
    for i, (got, other, wanted) in enumerate(zip(ours, theirs, truth, strict=True)):
        error, budget = ((x.double() - wanted).norm() / (1 + wanted.norm()) for x in (got, other))
        assert error <= (2 if i < 2 else 3) * budget + 4 * torch.finfo(torch.float32).eps, i


@pytest.mark.parametrize("queries", [1, 4, 8])
def test_long_lists_and_repetition(queries: int) -> None:
    """More keys than are worked on at once; the same call gives the same bits, with any number of threads."""
    arguments = call(queries, 16, pages=400)
    truth = run(arguments, torch.float64, "reference")
    threads = torch.get_num_threads()
    runs = []
    try:
        for number in (1, 1, 3):
            torch.set_num_threads(number)
            runs.append(run(arguments, torch.float32, "compiled"))
    finally:
        torch.set_num_threads(threads)
    for first, again, other, wanted in zip(*runs, truth, strict=True):
        assert torch.equal(first, again)
        torch.testing.assert_close(first.double(), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-5)
    assert torch.equal(runs[0][0], runs[2][0]) and torch.equal(runs[0][1], runs[2][1])


@pytest.mark.parametrize("queries", [1, 3, 4, 8])
def test_nan_and_large_scores(queries: int) -> None:
    """A NaN in a query spoils that query alone, one in a key those that read it; large scores do not overflow."""
    query, sides, tables, *_ = call(queries, 16, biased=False)
    clean = run((query, sides, tables, None, None), torch.float32, "compiled")[0]
    query[2, 0, 3, 0, 5] = torch.nan
    out = run((query, sides, tables, None, None), torch.float32, "compiled")[0]
    bad = out.isnan().any(-1)
    assert bad[2, 0, 3, 0] and bad.sum() == 1 and torch.equal(out[~bad], clean[~bad])
    query[2, 0, 3, 0, 5] = 0.0
    sides[0][1, tables[0][1, 4, 0], 2] = torch.nan
    out = run((query, sides, tables, None, None), torch.float32, "compiled")[0]
    readers = (tables[0][1] == tables[0][1, 4, 0]).any(-1)
    assert out[1, 0, readers].isnan().all() and not out[1, 0, ~readers].isnan().any() and not out[2:].isnan().any()
    sides[0].nan_to_num_(0.0)
    large = [run((query * 300, sides, tables, None, None), torch.float32, impl) for impl in ("compiled", "torch")]
    assert all(x.isfinite().all() for x in large[0])
    torch.testing.assert_close(large[0][1], large[1][1], rtol=1e-5, atol=0.0)
