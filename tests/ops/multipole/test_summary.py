"""Ready weights as tuples: packing for the operator and back, averaging weights. Wrong shapes: see test_api."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farfield as ff
from farfield.geometry import geometry
from farfield.ops.multipole.summary import averaging, check, check_levels, pack, unpack
from support.multipole_cases import KINDS, make_summary


@pytest.mark.parametrize("kind", KINDS)
def test_pack_and_back(kind: str) -> None:
    summary = make_summary(kind, geometry((9, 40), 4, 2), 1, 2, 3)
    name, tensors = pack(summary)
    again = unpack(name, tensors)
    assert name == kind and type(again) is type(summary)
    assert all(a is b for a, b in zip(tensors, pack(again)[1], strict=True))


@pytest.mark.parametrize("given", [3, None, (1, 2), torch.zeros(1)])
def test_what_is_no_summary(given: Any) -> None:
    with pytest.raises(TypeError, match=f"{type(given).__name__}.*SharedSummary"):
        pack(given)


def test_averaging() -> None:
    g = geometry((9, 40), (4, 6), (2, 3))
    weights = averaging(g, 5, 7, torch.float64)
    assert weights.key_leaf.shape == (5, 4, 7) and weights.value_up.shape == (5, 4, 7)
    assert all((w == 1 / w.shape[1]).all() and w.dtype == torch.float64 for w in weights)
    check(weights, g, torch.zeros(1, 5, 360, 7), g.levels)


def test_levels_reach_the_top() -> None:
    g = geometry((64,), 4, 2)
    key = torch.zeros(1, 2, 64, 3)
    check_levels("mean", torch.zeros(3, 2), g, key)
    check_levels(make_summary("learned", g, 1, 2, 3), None, g, key)
    with pytest.raises(ValueError, match="level_bias has 2 rows; this length has 3 levels"):
        check_levels("mean", torch.zeros(2, 2), g, key)
    with pytest.raises(ValueError, match="needs 3"):
        check_levels(ff.LearnedSummary(()), None, g, key)
