"""The compiled choice of cells: the same as torch's, place for place."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from farfield.ops.compiled import build, choice
from farfield.ops.opened import choose, opened_attention

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"no compiled engine: {build.why_not()}")


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((301,), {"causal": True, "levels": 1, "page": 2, "share": 4, "sinks": 3}),
        ((301,), {"causal": True, "page": 1, "share": 2}),
        ((301,), {"causal": True, "page": 1, "share": 2, "beam_share": 8, "beam": 3}),
        ((301,), {"causal": True, "levels": 1, "page": 1, "beam_share": 4, "beam": 99, "recent": 16}),
        ((301,), {"causal": True, "levels": 1, "beam_share": 4}),
        ((301,), {"causal": False, "share": 1}),
        ((301,), {"causal": True, "levels": 2, "beam": 1, "page": 2}),
        ((301,), {"causal": True, "beam": 99, "open": 99, "page": 4}),
        ((301,), {"causal": True, "beam": 0, "page": 2}),
        ((37, 29), {"causal": False, "page": 2, "rank": 2}),
    ],
)
@pytest.mark.parametrize("by", ["mean", "bounds"])
def test_descent_is_torch_s(grid: tuple[int, ...], options: dict[str, Any], by: str, monkeypatch: Any) -> None:
    """Of small integers every score is exact, and many are equal."""
    torch.manual_seed(0)
    n = math.prod(grid)
    q, k, v = (torch.randint(-2, 3, (2, heads, n, 5)).float() for heads in (4, 2, 2))
    seen: list[torch.Tensor] = []
    descend = choose.descend

    def spy(*arguments: Any) -> choose.Choice:
        found = descend(*arguments)
        monkeypatch.setattr(choose, "_compiled", lambda x: False)
        seen.extend((found.pages, descend(*arguments).pages))
        monkeypatch.undo()
        return found

    with monkeypatch.context() as patch:
        patch.setattr("farfield.ops.opened.api.descend", spy)
        given = {"block": 8, "rank": 2, "open": 5, "rest": "drop", "choose": by, "scale": 0.5, **options}
        opened_attention(q, k, v, grid=grid, **given)
    assert len(seen) == 2 and torch.equal(*seen)
    assert (seen[0] >= 0).any() or options.get("beam") == 0


@pytest.mark.parametrize("width", [1, 5, 16, 40, 257])
def test_top_is_torch_s(width: int, monkeypatch: Any) -> None:
    torch.manual_seed(width)
    scores = torch.stack([
        torch.randn(width),
        torch.randn(width) * 1e30,
        torch.randint(-1, 2, (width,)).float() * 0.0,
        torch.randint(-2, 2, (width,)).float(),
        torch.randn(width).masked_fill(torch.rand(width) < 0.6, -torch.inf),
        torch.full((width,), -torch.inf),
        torch.randn(width).masked_fill(torch.rand(width) < 0.3, torch.nan),
        torch.randn(width).masked_fill(torch.rand(width) < 0.3, torch.inf),
    ])  # fmt: skip
    for count in {0, 1, 3, width // 2, width, width + 2}:
        found = choice.top(scores, count)
        with monkeypatch.context() as patch:
            patch.setattr(choose, "_compiled", lambda x: False)
            assert torch.equal(found, choose.top(scores, count)), count
