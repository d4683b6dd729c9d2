"""Rotary positions."""

from __future__ import annotations

import pytest
import torch

from farfield.rope import Rope, segment_positions


def test_rotation_by_complex_numbers() -> None:
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    positions = torch.arange(7)
    turns = positions[:, None] * 100.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    want = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(turns), turns)
    got = Rope(100.0).rotate(x, positions)
    torch.testing.assert_close(got, torch.cat((want.real, want.imag), -1))
    torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1))


def test_scores_depend_on_differences_only() -> None:
    q, k = torch.randn(1, 2, 5, 8, dtype=torch.float64), torch.randn(1, 2, 5, 8, dtype=torch.float64)
    rope, positions = Rope(), torch.arange(5)
    scores = rope.rotate(q, positions) @ rope.rotate(k, positions).mT
    moved = rope.rotate(q, positions + 3.5) @ rope.rotate(k, positions + 3.5).mT
    torch.testing.assert_close(scores, moved)


def test_positions_by_batch() -> None:
    x = torch.randn(2, 1, 4, 4)
    positions = torch.tensor([[0, 1, 2, 3], [7, 8, 9, 10]])
    got = Rope().rotate(x, positions)
    for b in range(2):
        torch.testing.assert_close(got[b : b + 1], Rope().rotate(x[b : b + 1], positions[b]))


def test_positions_restart_in_segments() -> None:
    cu = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    assert segment_positions(5, cu, torch.device("cpu")).tolist() == [0, 1, 0, 1, 2]
    assert segment_positions(3, None, torch.device("cpu")).tolist() == [0, 1, 2]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="theta must be positive"):
        Rope(0.0)
    with pytest.raises(ValueError, match="even head_dim, got 5"):
        Rope().rotate(torch.randn(1, 1, 3, 5), torch.arange(3))
    with pytest.raises(ValueError, match="N = 3"):
        Rope().rotate(torch.randn(1, 1, 3, 4), torch.arange(4))
