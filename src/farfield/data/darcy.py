"""Darcy flow with random coefficients: -div(a grad u) = f on the unit square, u = 0 on its border.

A harder relative of the 16 x 16 data that neural operators are shown on: any resolution, any contrast, and fields a
that are piecewise constant ("blocky", the sign of a Gaussian field, as in the Fourier neural operator's data) or smooth
("lognormal"). Cell-centred finite volumes: the flux through a face is the harmonic mean of both cells' coefficients
(the exact one of two layers in series) times the difference of u, and half a cell lies between a border cell and the
border. Second order where a is smooth. Needs scipy.

Source: Li et al., Fourier Neural Operator, arXiv 2010.08895 (the equation and the blocky field).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["KINDS", "DarcyTask", "coefficients", "darcy_matrix", "solve_darcy"]

Floats = npt.NDArray[np.float64]

KINDS = ("blocky", "lognormal")
"""Kinds of coefficient fields."""


def darcy_matrix(a: Floats) -> Any:
    """The sparse matrix `[H W, H W]` of u -> -div(a grad u), rows and columns in row-major order.

    Symmetric and positive definite, 5 entries per row. O(H W).

    Args:
        a: `[H, W]`, the coefficient of each cell, positive. The square is divided into H x W cells.

    Raises:
        ValueError: for a field that is not 2-D, or not positive and finite.
    """
    from scipy.sparse import coo_matrix

    a = np.asarray(a, dtype=np.float64)
    if a.ndim != 2 or 0 in a.shape:
        raise ValueError(f"a has shape {list(a.shape)}: a field [H, W] is needed")
    if not (np.isfinite(a).all() and (a > 0).all()):
        raise ValueError(f"a lies between {a.min()} and {a.max()}: coefficients must be positive and finite")
    height, width = a.shape
    index = np.arange(a.size).reshape(a.shape)
    diagonal = np.zeros(a.shape)
    rows, columns, values = [], [], []
    for axis, n in ((0, height), (1, width)):
        squared = float(n) ** 2  # 1 / h^2 on this axis
        low, high = (np.take(a, r, axis) for r in (range(n - 1), range(1, n)))
        face = 2 * low * high / (low + high) * squared
        one, other = (np.take(index, r, axis) for r in (range(n - 1), range(1, n)))
        for here, there in ((one, other), (other, one)):
            rows.append(here.ravel())
            columns.append(there.ravel())
            values.append(-face.ravel())
            np.add.at(diagonal.reshape(-1), here.ravel(), face.ravel())
        for edge in (0, n - 1):  # half a cell to the border, where u is 0
            border = np.take(index, edge, axis)
            np.add.at(diagonal.reshape(-1), border, 2 * np.take(a, edge, axis) * squared)
    rows.append(index.ravel())
    columns.append(index.ravel())
    values.append(diagonal.ravel())
    shape = (a.size, a.size)
    return coo_matrix((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=shape).tocsc()


def solve_darcy(a: Floats, f: Floats | float = 1.0) -> Floats:
    """The solution u `[H, W]` at the centres of the cells, by a sparse direct solve.

    Args:
        a: `[H, W]`, as in :func:`darcy_matrix`.
        f: the source, a number or `[H, W]`.

    Raises:
        ValueError: as :func:`darcy_matrix`, and for an f of another shape.
    """
    from scipy.sparse.linalg import spsolve

    a = np.asarray(a, dtype=np.float64)
    matrix = darcy_matrix(a)
    source = np.asarray(f, dtype=np.float64)
    if source.ndim and source.shape != a.shape:
        raise ValueError(
            f"f has shape {list(source.shape)} and a {list(a.shape)}: a number or the same shape is needed"
        )
    u: Floats = spsolve(matrix, np.broadcast_to(source, a.shape).ravel()).reshape(a.shape)
    return u


def coefficients(
    side: int, rng: np.random.Generator, *, kind: str = "blocky", contrast: float = 4.0, smoothness: float = 2.0,
    length: float = 3.0,
) -> Floats:  # fmt: skip
    """A random field `[side, side]`: at the centres of cells, the values of one function whatever the side.

    The Gaussian field behind it has the covariance (-Laplace + length^2)^-smoothness with zero normal derivative on the
    border: a sum of cosines of 32 x 32 frequencies at most, drawn in one order, so a generator in the same state gives
    the same field at every side.

    Args:
        side: cells per axis.
        rng: of the draw.
        kind: "blocky" (`contrast` where the Gaussian is positive, 1 elsewhere, times 3) or "lognormal".
        contrast: the highest coefficient over the lowest; of "lognormal" about that of two standard deviations on
            either side.
        smoothness, length: of the covariance; less of the one, or more of the other, is rougher.

    Raises:
        ValueError: for an unknown kind or a contrast below 1.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known kinds are {', '.join(KINDS)}")
    if contrast < 1 or side < 1:
        raise ValueError(f"contrast={contrast}, side={side}: both must be at least 1")
    modes = 32
    draws = rng.standard_normal((modes, modes))
    k = np.arange(modes)
    weight = (np.pi**2 * (k[:, None] ** 2 + k[None] ** 2) + length**2) ** (-smoothness / 2)
    weight[0, 0] = 0.0
    places = (np.arange(side) + 0.5) / side
    waves = np.sqrt(2.0) * np.cos(np.pi * k[:, None] * places)
    waves[0] = 1.0
    field = waves.T @ (draws * weight) @ waves
    field /= np.sqrt((weight**2).sum())
    if kind == "blocky":
        return np.where(field > 0, 3.0 * contrast, 3.0)
    return np.asarray(np.exp(field * np.log(contrast) / 4))


@dataclass(frozen=True)
class DarcyTask:
    """Pairs of coefficient field and solution.

    Attributes:
        side: cells per axis of the pairs.
        fine: cells per axis on which the equation is solved; a multiple of the side. Pairs are thinned out from it by
            taking the cell at the place of every `fine / side`th, as the public Darcy data are.
        kind, contrast, smoothness, length: of :func:`coefficients`.
    """

    side: int = 64
    fine: int = 128
    kind: str = "blocky"
    contrast: float = 4.0
    smoothness: float = 2.0
    length: float = 3.0

    def __post_init__(self) -> None:
        """Check the two grids."""
        if self.side < 1 or self.fine % self.side:
            raise ValueError(f"fine={self.fine} must be a multiple of side={self.side}, which must be at least 1")

    def pairs(self, count: int, seed: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Fields and solutions `[count, side, side]`; pair k depends on the seed and k alone.

        Solutions are multiplied by the geometric mean of 3 and 3 * contrast, so that their size does not depend on it.
        """
        step = self.fine // self.side
        x = np.empty((count, self.side, self.side), dtype=np.float32)
        y = np.empty_like(x)
        scale = 3 * np.sqrt(self.contrast) if self.kind == "blocky" else 1.0
        for index in range(count):
            a = coefficients(
                self.fine,
                np.random.default_rng((seed, index)),
                kind=self.kind,
                contrast=self.contrast,
                smoothness=self.smoothness,
                length=self.length,
            )
            x[index] = a[::step, ::step]
            y[index] = scale * solve_darcy(a)[::step, ::step]
        return x, y
