"""The Darcy generator: its matrix, its solutions and its draws."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from farfield.data.darcy import KINDS, DarcyTask, coefficients, darcy_matrix, solve_darcy
from farfield.data.grids import open_grids

pytest.importorskip("scipy", reason="scipy is not installed")

ROOT = Path(__file__).resolve().parents[2]


def test_the_matrix_is_symmetric_positive_and_keeps_the_flux() -> None:
    a = coefficients(12, np.random.default_rng(0), contrast=10)
    matrix = darcy_matrix(a).toarray()
    np.testing.assert_array_equal(matrix, matrix.T)
    assert np.linalg.eigvalsh(matrix).min() > 0
    # What flows through inner faces cancels: the sum over all cells is what leaves through the border.
    inner = matrix.sum(1).reshape(12, 12)
    assert np.abs(inner[1:-1, 1:-1]).max() < 1e-9 * np.abs(matrix).max()
    np.testing.assert_allclose(inner[0, 5], 2 * a[0, 5] * 144)
    np.testing.assert_allclose(inner[0, 0], 4 * a[0, 0] * 144)


def test_the_residual_vanishes() -> None:
    a = coefficients(24, np.random.default_rng(1), kind="lognormal", contrast=100)
    f = np.random.default_rng(2).standard_normal((24, 24))
    u = solve_darcy(a, f)
    residual = darcy_matrix(a) @ u.ravel() - f.ravel()
    assert np.abs(residual).max() < 1e-9 * np.abs(f).max()


def test_constant_coefficient_has_the_known_solution() -> None:
    """u = sin(pi x) sin(2 pi y) with f = 5 pi^2 a u, second order: the error falls by 4 when cells halve."""
    errors = []
    for n in (16, 32, 64):
        s = (np.arange(n) + 0.5) / n
        u = np.sin(np.pi * s)[:, None] * np.sin(2 * np.pi * s)
        got = solve_darcy(np.full((n, n), 3.0), 3.0 * 5 * np.pi**2 * u)
        errors.append(np.linalg.norm(got - u) / np.linalg.norm(u))
    assert errors[0] < 0.02
    np.testing.assert_allclose([errors[0] / errors[1], errors[1] / errors[2]], 4, rtol=0.05)


def test_layers_in_series_are_exact() -> None:
    """Across layers without a source in between, the flux is that of resistances in series; here along a thin strip."""
    a = np.repeat([[1.0], [10.0], [1.0], [5.0]], 64, 1)
    matrix = darcy_matrix(a).toarray().reshape(4, 64, 4, 64)
    face = -matrix[0, 30, 1, 30] / 16
    np.testing.assert_allclose(face, 2 / (1 / 1 + 1 / 10))


def test_symmetry_and_sign() -> None:
    """A symmetric field gives a symmetric solution, a positive source a positive one; twice the field, half of it."""
    a = coefficients(20, np.random.default_rng(3), contrast=8)
    a = np.minimum(a, a.T)
    u = solve_darcy(a)
    np.testing.assert_allclose(u, u.T, rtol=1e-10)
    assert u.min() > 0
    np.testing.assert_allclose(solve_darcy(2 * a), u / 2, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_draws(kind: str) -> None:
    """The same seed gives the same pairs, at every side the same function; another seed gives another."""
    coarse, fine = (DarcyTask(side, 32, kind, 20.0) for side in (16, 32))
    x, y = coarse.pairs(3, 5)
    again, finer = coarse.pairs(3, 5), fine.pairs(3, 5)
    np.testing.assert_array_equal(x, again[0])
    np.testing.assert_array_equal(y, again[1])
    np.testing.assert_array_equal(x, finer[0][:, ::2, ::2])
    np.testing.assert_array_equal(y, finer[1][:, ::2, ::2])
    assert not np.array_equal(x, coarse.pairs(3, 6)[0]) and not np.array_equal(x[0], x[1])
    np.testing.assert_array_equal(DarcyTask(16, 32, kind, 20.0).pairs(2, 5)[0], x[:2])
    if kind == "blocky":
        assert set(np.unique(x)) == {3.0, 60.0}
    else:
        assert x.min() > 0 and len(np.unique(x)) == x.size


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solve_darcy(np.zeros((3, 3))), "between 0.0 and 0.0"),
        (lambda: solve_darcy(np.ones(3)), r"shape \[3\]"),
        (lambda: solve_darcy(np.ones((3, 3)), np.ones((2, 3))), r"f has shape \[2, 3\]"),
        (lambda: coefficients(4, np.random.default_rng(0), kind="stripes"), "unknown kind 'stripes'"),
        (lambda: coefficients(4, np.random.default_rng(0), contrast=0.5), "contrast=0.5"),
        (lambda: DarcyTask(48, 64), "fine=64 must be a multiple"),
    ],
)
def test_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_the_command_writes_what_compare_reads(tmp_path: Path) -> None:
    out = tmp_path / "d.npz"
    script = ROOT / "benchmarks" / "make_darcy.py"
    options = ["--train", "4", "--test", "2", "--side", "8", "--fine", "16"]
    subprocess.run([sys.executable, str(script), str(out), *options], check=True, capture_output=True)
    data = open_grids([out])
    assert {name: len(source) for name, source in data.tests.items()} == {"8x8": 2, "16x16": 2}
    assert len(data.train) == 4
