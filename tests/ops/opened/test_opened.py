"""Opened attention against a loop-written oracle, its limits, and what must always hold."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import farfield as ff
from farfield.geometry import default_levels
from farfield.ops.opened import opened_attention

Cell = tuple[int, tuple[int, ...]]
"""(level, place on the grid of all cells of the level); level 0 are pages."""


class Oracle:
    """Section 2 of the definition, by sets of tokens and plain loops; one batch entry and head."""

    def __init__(
        self, grid: tuple[int, ...], block: int, rank: int, page: int, levels: int | None, causal: bool
    ) -> None:
        self.grid, self.block, self.page, self.causal = grid, block, page, causal
        self.cell = block // rank
        self.levels = default_levels(grid, (block,) * len(grid)) if levels is None else levels
        self.places = list(itertools.product(*(range(n) for n in grid)))

    def side(self, level: int) -> int:
        return self.page if level == 0 else self.cell << (level - 1)

    def tokens(self, cell: Cell, hidden: set[int]) -> list[int]:
        side = self.side(cell[0])
        return [
            i for i, x in enumerate(self.places)
            if i not in hidden and all(a // side == c for a, c in zip(x, cell[1], strict=True))
        ]  # fmt: skip

    def children(self, cell: Cell) -> list[Cell]:
        level, place = cell
        factor = self.side(level) // self.side(level - 1)
        steps = itertools.product(range(factor), repeat=len(place))
        return [(level - 1, tuple(c * factor + s for c, s in zip(place, step, strict=True))) for step in steps]

    def near(self, query: int) -> set[int]:
        b = [x // self.block for x in self.places[query]]
        return {
            i for i, x in enumerate(self.places)
            if all(abs(a // self.block - c) <= 1 for a, c in zip(x, b, strict=True)) and not (self.causal and i > query)
        }  # fmt: skip

    def far(self, query: int, level: int) -> list[Cell]:
        """Cells of the groups of a level that the query's leaf block sees there."""
        at = self.places[query]
        side = self.block << (level - 1)
        own = [x // side for x in at]
        counts = [-(-n // side) for n in self.grid]
        out = []
        for group in itertools.product(*(range(c) for c in counts)):
            adjacent = all(abs(g - o) <= 1 for g, o in zip(group, own, strict=True))
            parents = all(abs(g // 2 - o // 2) <= 1 for g, o in zip(group, own, strict=True))
            if adjacent or (level < self.levels and not parents) or (self.causal and group[0] > own[0]):
                continue
            per = self.block // self.cell
            for r in itertools.product(range(per), repeat=len(group)):
                out.append((level, tuple(g * per + x for g, x in zip(group, r, strict=True))))
        return out

    def number(self, cell: Cell) -> tuple[int, ...]:
        """What orders equal masses: group by group, row-major, and cells row-major in their group."""
        per = self.block // (self.cell if cell[0] else self.page)
        return (*(c // per for c in cell[1]), *(c % per for c in cell[1]))

    def row(
        self, query: int, choosers: tuple[np.ndarray, np.ndarray], k: np.ndarray, hidden: set[int], sinks: int,
        open: int, beam: int, bounds: bool,
    ) -> tuple[list[int], list[list[int]]]:  # fmt: skip
        """Tokens seen exactly and the token sets of the closed cells; ``choosers`` on the way, and in the end."""
        leading = set(range(sinks))
        exact = (self.near(query) | {i for i in leading if not (self.causal and i > query)}) - hidden
        gone = hidden | leading

        def mass(cell: Cell, chooser: np.ndarray) -> float:
            inside = self.tokens(cell, gone)
            if not inside:
                return -math.inf
            key = k[inside].mean(0)
            score = float(chooser @ key)
            if bounds:
                top = np.where(chooser > 0, chooser * k[inside].max(0), chooser * k[inside].min(0)).sum()
                score = (score + float(top)) / 2
            return score + math.log(len(inside))

        closed: list[list[int]] = []
        opened: list[Cell] = []
        one_page = self.cell == self.page
        for level in range(self.levels, -1, -1):
            if level == 0 and one_page:
                break
            candidates = ([] if level == 0 else self.far(query, level)) + [c for o in opened for c in self.children(o)]
            last = level == (1 if one_page else 0)
            masses = {c: mass(c, choosers[last]) for c in candidates}
            found = sorted((c for c in candidates if masses[c] > -math.inf), key=lambda c: (-masses[c], self.number(c)))
            opened = found[: open if last else beam]
            closed += [self.tokens(c, gone) for c in found[open if last else beam :]]
        for cell in opened:
            exact |= set(self.tokens(cell, gone))
        return sorted(exact), closed


def oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kw: Any) -> Tensor:
    grid, share, rest = kw["grid"], kw.get("share", 1), kw.get("rest", "keep")
    page = kw.get("page") or kw["block"] // kw["rank"]
    tree = Oracle(grid, kw["block"], kw["rank"], page, kw.get("levels"), kw.get("causal", False))
    groups = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    n = q.shape[2]
    beam = kw.get("beam") or kw["open"]
    for b, h, i in itertools.product(range(q.shape[0]), range(q.shape[1]), range(n)):
        keys, values = k[b, h // groups].numpy(), v[b, h // groups].numpy()
        scale = q.shape[3] ** -0.5
        assert len(grid) == 1 or share == 1
        hidden = set() if mask is None else {j for j in range(n) if not mask[b, j]}
        choosers = []
        for run in (kw.get("beam_share") or share, share):
            first = i // run * run
            unit = q[b, h, first : first + run]
            leader = unit[0] if kw.get("causal") else unit.mean(0)
            before = [j for j in range(max(0, first - kw.get("recent", 0)), first) if j not in hidden]
            if before:
                leader = (leader + q[b, h, before].mean(0)) / 2
            choosers.append(leader.numpy() * scale)
        bounds, sinks = kw.get("choose") == "bounds", kw.get("sinks", 0)
        exact, closed = tree.row(i, (choosers[0], choosers[1]), keys, hidden, sinks, kw["open"], beam, bounds)
        query = q[b, h, i].numpy() * scale
        scores = [float(query @ keys[j]) for j in exact]
        rows = [values[j] for j in exact]
        if rest == "keep":
            scores += [float(query @ keys[c].mean(0)) + math.log(len(c)) for c in closed]
            rows += [values[c].mean(0) for c in closed]
        weights = np.exp(np.array(scores) - max(scores)) if scores else np.zeros(0)
        if scores:
            out[b, h, i] = torch.from_numpy((weights / weights.sum()) @ np.stack(rows))
    return out


def tensors(
    n: int, heads: tuple[int, int] = (2, 1), dim: int = 4, batch: int = 1, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, heads[0], n, dim, dtype=dtype) * 2
    k, v = (torch.randn(batch, heads[1], n, dim, dtype=dtype) for _ in range(2))
    return q, k, v


CASES: dict[str, dict[str, Any]] = {
    "line": {"grid": (37,), "block": 4, "rank": 2, "open": 3},
    "line, causal": {"grid": (61,), "block": 4, "rank": 2, "open": 2, "causal": True},
    "pages": {"grid": (61,), "block": 8, "rank": 2, "page": 2, "open": 3, "beam": 2, "causal": True},
    "one level": {"grid": (59,), "block": 4, "rank": 1, "page": 2, "levels": 1, "open": 3, "causal": True, "sinks": 3},
    "bounds": {"grid": (61,), "block": 8, "rank": 4, "open": 2, "choose": "bounds", "causal": True},
    "bounds of pages, dropped": {
        "grid": (61,), "block": 8, "rank": 2, "page": 1, "open": 4, "choose": "bounds", "rest": "drop", "levels": 1,
        "share": 4, "causal": True,
    },
    "beam shared by more": {
        "grid": (61,), "block": 8, "rank": 2, "page": 2, "open": 3, "beam": 2, "causal": True, "share": 2,
        "beam_share": 8,
    },
    "recent queries": {
        "grid": (61,), "block": 8, "rank": 2, "page": 1, "open": 4, "beam": 2, "choose": "bounds", "rest": "drop",
        "levels": 1, "causal": True, "share": 2, "beam_share": 4, "recent": 6, "sinks": 2,
    },
    "recent queries, odd": {"grid": (53,), "block": 4, "rank": 2, "open": 2, "causal": True, "share": 2, "recent": 5},
    "one choice": {
        "grid": (45,), "block": 8, "rank": 4, "open": 3, "levels": 1, "causal": True, "share": 2, "beam_share": 8,
    },
    "beam shared by means": {"grid": (48,), "block": 4, "rank": 2, "page": 1, "open": 2, "share": 2, "beam_share": 4},
    "shared by means": {"grid": (48,), "block": 4, "rank": 2, "open": 2, "share": 2},
    "sinks": {"grid": (53,), "block": 4, "rank": 2, "open": 2, "sinks": 5, "rest": "drop", "causal": True},
    "image": {"grid": (7, 9), "block": 2, "rank": 1, "open": 3},
    "image, pages, bounds": {"grid": (11, 7), "block": 4, "rank": 2, "page": 1, "open": 5, "choose": "bounds"},
    "volume": {"grid": (2, 5, 3), "block": 1, "rank": 1, "open": 2, "rest": "drop"},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_loops(name: str, masked: bool) -> None:
    case = CASES[name]
    n = math.prod(case["grid"])
    q, k, v = tensors(n)
    mask = torch.rand(1, n) > 0.3 if masked else None
    expected = oracle(q, k, v, mask, **case)
    for impl in ("torch", "reference"):
        out = opened_attention(q, k, v, key_mask=mask, impl=impl, **case)
        assert isinstance(out, Tensor)
        # Scores are rounded to float32 for the choice only; these differ by more.
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", [(97,), (9, 13), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("choose", ["mean", "bounds"])
def test_limits(grid: tuple[int, ...], choose: str) -> None:
    n = math.prod(grid)
    q, k, v = tensors(n, heads=(4, 2), batch=2)
    block = {1: 8, 2: 4, 3: 2}[len(grid)]
    options = {"grid": grid, "block": block, "rank": block // 2}
    for causal in (False, True) if len(grid) == 1 else (False,):
        exact = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        for rest in ("keep", "drop"):
            out = opened_attention(q, k, v, open=n, rest=rest, choose=choose, causal=causal, page=1, **options)
            torch.testing.assert_close(out, exact, rtol=0, atol=1e-12)
        plain = ff.multipole_attention(q, k, v, causal=causal, **options)
        torch.testing.assert_close(opened_attention(q, k, v, open=0, causal=causal, **options), plain)


@pytest.mark.parametrize("levels", [None, 1])
@pytest.mark.parametrize("open", [1, 3])
def test_every_token_once(levels: int | None, open: int) -> None:
    """Without a preference every token weighs the same, opened or not."""
    n = 101
    q, k, _ = tensors(n, heads=(1, 1))
    weights = torch.stack([
        opened_attention(
            q * 0, k, F.one_hot(torch.tensor(j), n).to(q.dtype).view(1, 1, n, 1).expand(1, 1, n, 4),
            block=4, rank=2, open=open, levels=levels, causal=True, sinks=2,
        )[0, 0, :, 0]
        for j in range(0, n, 7)
    ])  # fmt: skip
    seen = torch.arange(n)[None] >= torch.arange(0, n, 7)[:, None]
    expected = seen / (torch.arange(n).double() + 1)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("more", [{"share": 1}, {"share": 4}, {"share": 2, "beam_share": 8, "recent": 12}], ids=str)
@pytest.mark.parametrize("choose", ["mean", "bounds"])
def test_causal(more: dict[str, int], choose: str) -> None:
    n, options = 83, {"block": 8, "rank": 4, "open": 2, "page": 1, "causal": True, **more}
    q, k, v = tensors(n)
    out = opened_attention(q, k, v, choose=choose, **options)
    for i in (0, 17, 41, 66):
        later = [torch.cat([x[:, :, : i + 1], torch.randn_like(x[:, :, i + 1 :]) * 9], 2) for x in (q, k, v)]
        changed = opened_attention(*later, choose=choose, **options)
        assert torch.equal(changed[:, :, : i + 1], out[:, :, : i + 1])


@pytest.mark.parametrize("impl", [None, "torch"])
@pytest.mark.parametrize("causal", [True, False])
def test_bias_of_opened_tokens(causal: bool, impl: str | None) -> None:
    n, options = 43, {"block": 4, "rank": 2, "page": 1, "causal": causal, "impl": impl}
    q, k, v = tensors(n, heads=(4, 2), batch=2)
    bias = torch.randn(4, dtype=q.dtype)
    # Everything opened: exact attention, far tokens with the bias of their head.
    far = (torch.arange(n)[:, None] // 4 - torch.arange(n) // 4).abs() > 1
    mask = torch.where(far, bias[:, None, None], 0.0)
    if causal:
        mask = mask.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    for rest in ("keep", "drop"):
        found = opened_attention(q, k, v, open=n, rest=rest, page_bias=bias, **options)
        torch.testing.assert_close(found, want)
    # Some opened: with the same number on cells and pages the far field moves as a whole.
    few = {"open": 3, "share": 2, "part": "far", "return_lse": True, **options}
    plain = opened_attention(q, k, v, **few)
    moved = opened_attention(q, k, v, level_bias=bias.repeat(8, 1), page_bias=bias, **few)
    torch.testing.assert_close(moved, (plain[0], plain[1] + bias[:, None]))
    # Without cells it is the pages alone that move, however quiet the cells are made.
    dropped = opened_attention(q, k, v, rest="drop", page_bias=bias, **few)
    alone = opened_attention(q, k, v, level_bias=torch.full((8, 4), -1e4, dtype=q.dtype), page_bias=bias, **few)
    seen = dropped[1] > -math.inf
    torch.testing.assert_close(dropped[0][seen], alone[0][seen])
    torch.testing.assert_close(dropped[1][seen], alone[1][seen])
    with pytest.raises(ValueError, match=r"page_bias has shape \[2\]: \[4\] would be accepted"):
        opened_attention(q, k, v, open=2, page_bias=bias[:2], **options)


@pytest.mark.parametrize("rest", ["keep", "drop"])
def test_gradients(rest: str) -> None:
    n, options = 41, {"block": 4, "rank": 2, "open": 2, "page": 1, "causal": True, "sinks": 1}
    q, k, v = (x.requires_grad_() for x in tensors(n, heads=(2, 1), dim=2))
    bias, of_pages = (torch.randn(*shape, dtype=q.dtype, requires_grad=True) for shape in ((4, 2), (2,)))

    def run(impl: str) -> tuple[Tensor, Tensor]:
        biases = {"level_bias": bias, "page_bias": of_pages}
        return opened_attention(q, k, v, rest=rest, **biases, return_lse=True, impl=impl, **options)

    weights = [torch.randn_like(x) for x in run("torch")]
    grads = {}
    for impl in ("torch", "reference"):
        total = sum((x * w).sum() for x, w in zip(run(impl), weights, strict=True))
        grads[impl] = torch.autograd.grad(total, (q, k, v, of_pages, bias), allow_unused=True)
    for a, b in zip(*grads.values(), strict=True):
        if b is None or a is None:
            assert rest == "drop" and a is b
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    short = [x[:, :, :19].detach().requires_grad_() for x in (q, k, v)]
    short.append(of_pages.detach().requires_grad_())

    def checked(*x: Tensor) -> Tensor:
        return opened_attention(*x[:3], rest=rest, page_bias=x[3], impl="torch", **options)

    assert torch.autograd.gradcheck(checked, short)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_engine(dtype: torch.dtype) -> None:
    from farfield.ops.compiled import tiles

    reason = tiles.why_not(torch.device("cpu"), dtype, False)
    if reason is not None:
        pytest.skip(reason)
    n, options = 131, {"block": 8, "rank": 2, "open": 3, "page": 2, "causal": True, "share": 2, "return_lse": True}
    plain = [x.to(dtype) for x in tensors(n, heads=(4, 2), dim=8, batch=2, dtype=torch.float32)]
    results = {}
    for impl in ("compiled", "torch"):
        q, k, v = (x.clone().requires_grad_() for x in plain)
        out, lse = opened_attention(q, k, v, impl=impl, **options)
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        ((out * weight).sum() + lse.sum()).backward()
        results[impl] = [x.float() for x in (out, lse, q.grad, k.grad, v.grad)]
    q, k, v = (x.double().requires_grad_() for x in plain)
    out, lse = opened_attention(q, k, v, impl="reference", **options)
    ((out * weight).sum() + lse.sum()).backward()
    for ours, theirs, exact in zip(*results.values(), (out, lse, q.grad, k.grad, v.grad), strict=True):
        error, budget = ((x - exact).norm() / exact.norm() for x in (ours, theirs))
        assert error <= 3 * budget + 1e-6


@pytest.mark.usefixtures("poisoned")
def test_hidden_tokens_do_not_exist() -> None:
    n, options = 67, {"block": 4, "rank": 2, "open": 2, "page": 1}
    q, k, v = tensors(n, batch=2)
    mask = torch.rand(2, n) > 0.4
    mask[1] = False
    zeros, threes = ([x.masked_fill(~mask[:, None, :, None], fill) for x in (k, v)] for fill in (0.0, 3.0))
    out = opened_attention(q, *zeros, key_mask=mask, **options)
    assert out.isfinite().all()
    assert (out[1] == 0).all()
    torch.testing.assert_close(opened_attention(q, *threes, key_mask=mask, **options), out, rtol=0, atol=1e-12)


def test_top_takes_the_first_of_equals() -> None:
    from farfield.ops.opened.choose import top

    rows = [[1.0, 3.0, 3.0, -math.inf, 3.0, -0.0, 0.0], [-math.inf] * 7, [-5.0, -1.0, -2.0, -1.0, -9.0, -8.0, -7.0]]
    scores = torch.tensor(rows)
    expected = torch.tensor([[0, 1, 2, 4], [-1, -1, -1, -1], [0, 1, 2, 3]])
    assert torch.equal(top(scores, 4), expected)
    assert torch.equal(top(scores.double(), 4), expected)
    assert torch.equal(top(torch.zeros(2, 9), 3), torch.tensor([[0, 1, 2]] * 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"open": -1}, "open=-1: an integer >= 0"),
        ({"page": 3}, r"one of \[1, 2, 4\] would be accepted"),
        ({"share": 3}, "share=3 does not divide the 8 tokens"),
        ({"share": 2, "beam_share": 3}, r"beam_share=3: a multiple of share=2 .* one of \[2, 4, 8\]"),
        ({"share": 4, "beam_share": 2}, r"one of \[4, 8\]"),
        ({"recent": -1}, "recent=-1: an integer >= 0"),
        ({"recent": 4}, "recent=4 with causal=False on 1 axes.*recent=0 would be accepted"),
        ({"rest": "blur"}, "'keep' .* or 'drop'"),
        ({"choose": "best"}, "'mean' or 'bounds'"),
        ({"impl": "cuda"}, "'compiled', 'torch', 'reference'"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    q, k, v = tensors(40)
    with pytest.raises(ValueError, match=message):
        opened_attention(q, k, v, block=8, rank=2, **options)


def test_operator_is_sound() -> None:
    from farfield.ops.listed import listed

    query = torch.randn(2, 1, 3, 2, 4, requires_grad=True)
    rows = [torch.randn(2, 5, 2, 4, requires_grad=True) for _ in range(2)]
    table = torch.tensor([[[0, 3], [1, -1], [-1, -1]], [[4, 0], [2, 1], [0, 1]]])
    arguments = (query, rows[:1], rows[1:], [table], None, None, 1, 0.5, "torch")
    torch.library.opcheck(
        listed, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
def test_chunks_change_nothing(heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from farfield.ops.opened import api

    q, k, v = tensors(101, heads=heads, batch=2)
    options = {"block": 8, "rank": 2, "open": 3, "causal": True}
    whole = opened_attention(q, k, v, **options)
    monkeypatch.setattr(api, "CHUNK", 1 << 12)
    torch.testing.assert_close(opened_attention(q, k, v, **options), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", [None, "torch", "reference"])
@pytest.mark.parametrize("rest", ["keep", "drop"])
def test_nothing_to_open(impl: str | None, rest: str) -> None:
    """Without a beam no page is ever reached: only closed cells are left, or nothing."""
    q, k, v = (x.requires_grad_() for x in tensors(101, dtype=torch.float32))
    options = {"block": 8, "rank": 2, "causal": True}
    out = opened_attention(q, k, v, open=3, beam=0, page=2, rest=rest, impl=impl, **options)
    part = "both" if rest == "keep" else "near"
    expected = ff.multipole_attention(q, k, v, part=part, **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    out.sum().backward()


def test_no_rows() -> None:
    q, k, v = tensors(101, batch=0)
    assert opened_attention(q, k, v, block=8, rank=2, open=3).shape == q.shape


@pytest.mark.parametrize("impl", [None, "torch", "reference"])
def test_autocast_chooses_in_float32(impl: str | None) -> None:
    q, k, v = (x.bfloat16() for x in tensors(301, dim=16, batch=2, dtype=torch.float32))
    options = {"block": 8, "rank": 4, "open": 2, "levels": 1, "causal": True, "return_lse": True, "impl": impl}
    expected = opened_attention(q, k, v, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = opened_attention(q.float(), k.float(), v.float(), **options)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", [None, "torch"])
def test_what_is_no_number_is_not_lost(impl: str | None) -> None:
    q, k, v = tensors(101, dtype=torch.float32)
    for number in (math.nan, -math.nan):
        bad = k.clone()
        bad[0, 0, 20] = number
        out = opened_attention(q, bad, v, block=8, rank=2, open=2, causal=True, impl=impl)
        assert out[:, :, 24:].isnan().all()
