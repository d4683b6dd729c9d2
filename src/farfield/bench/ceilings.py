"""What this machine reaches at best, measured beside everything else: matrix products and copies."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch

from farfield.bench.case import DTYPES
from farfield.bench.model import Rates
from farfield.bench.timing import seconds

__all__ = ["MatrixProduct", "memory_rate", "rates"]

_LONG_ENOUGH = 0.01
"""Seconds of a product from which its rate is no longer that of starting it."""
_SAMPLE = 0.04
"""Seconds that a sample takes at least: on a shared machine a short one may slip between two pauses."""
_LARGEST = {"cpu": 2048}
_LARGEST_ELSEWHERE = 8192
_COPY_BYTES = {"cpu": 1 << 27}
_COPY_BYTES_ELSEWHERE = 1 << 30
_COPIES = 3


class MatrixProduct:
    """A square matrix product in one dtype on one device, of the smallest side that takes 10 ms or more.

    Attributes:
        side: of the matrices.
        count: products in a sample.
    """

    def __init__(self, dtype: str, device: str) -> None:
        self._device = torch.device(device)
        largest = _LARGEST.get(self._device.type, _LARGEST_ELSEWHERE)
        side = 256
        while True:
            self.side = side
            self._a, self._b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
            self.count = 1
            self.time()  # the first one starts threads and takes memory
            once = self.time()
            if side >= largest or once >= _LONG_ENOUGH:
                break
            side *= 2
        self.count = max(1, round(_SAMPLE / once))

    @property
    def flops(self) -> float:
        """Of a sample: 2 side^3 for every product."""
        return 2.0 * self.count * self.side**3

    def time(self) -> float:
        """Seconds of one sample."""
        return seconds(self._products, self._device)

    def rate(self, times: list[float]) -> float:
        """FLOPs per second at the median of these times."""
        return self.flops / statistics.median(times)

    def _products(self) -> None:
        for _ in range(self.count):
            torch.mm(self._a, self._b)


def memory_rate(device: str) -> float:
    """Bytes per second, read and written, of copying a large tensor: the best of three."""
    place = torch.device(device)
    number = _COPY_BYTES.get(place.type, _COPY_BYTES_ELSEWHERE) // 4
    source, target = torch.ones(number, device=device), torch.zeros(number, device=device)
    copy: Callable[[], object] = partial(target.copy_, source)
    seconds(copy, place)
    return 8.0 * number / min(seconds(copy, place) for _ in range(_COPIES))


def rates(dtype: str, device: str) -> Rates:
    """Both rates of a machine at this moment, in about a second."""
    product = MatrixProduct(dtype, device)
    return Rates(product.rate([product.time() for _ in range(3)]), memory_rate(device))
