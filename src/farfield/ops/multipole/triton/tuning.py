"""Tile sizes: a few candidates per kernel, the fastest of which is kept per head width, dtype and leaf block.

The length is never part of the key: a training run with changing lengths tunes once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Config:
    """A tile of ``rows`` queries by ``keys`` keys (``cells`` where they are of many groups), and how a program runs."""

    rows: int
    keys: int
    cells: int
    warps: int = 4
    stages: int = 2


class Key(NamedTuple):
    """What a choice depends on."""

    kernel: str
    device: int
    head_dim: int
    dtype: torch.dtype
    block: int


_chosen: dict[Key, Config] = {}
_fixed = 0


@contextmanager
def fixed() -> Iterator[None]:
    """Within it nothing is timed: a kernel not tuned yet takes its first candidate that fits the device.

    It holds for all threads, since autograd runs backward passes in threads of its own.
    """
    global _fixed
    _fixed += 1
    try:
        yield
    finally:
        _fixed -= 1


def chosen() -> dict[Key, Config]:
    """The choices made so far."""
    return dict(_chosen)


def clear() -> None:
    """Forgets all choices."""
    _chosen.clear()


def fit(size: int, largest: int, smallest: int = 16) -> int:
    """The largest tile side (a power of two) that wastes at most a quarter on the last tile of ``size``."""
    side = largest
    while side > smallest and 4 * (-(-size // side) * side) > 5 * size:
        side //= 2
    return side


_Table = dict[int, list[tuple[int, int, int, int, int]]]

_TABLES: dict[str, _Table] = {
    "forward": {
        64: [(128, 64, 64, 4, 3), (64, 64, 64, 4, 3), (64, 64, 32, 4, 3), (128, 128, 64, 8, 3), (128, 64, 32, 8, 3)],
        128: [(128, 64, 64, 8, 3), (64, 64, 64, 4, 3), (64, 64, 32, 4, 2), (128, 128, 64, 8, 2), (64, 32, 32, 4, 2)],
        256: [(128, 32, 32, 8, 2), (64, 32, 32, 4, 2), (32, 32, 32, 4, 1)],
    },
    "grad_query": {
        64: [(128, 64, 64, 8, 2), (64, 64, 64, 4, 3), (64, 64, 32, 4, 2), (64, 32, 32, 4, 2)],
        128: [(128, 64, 64, 8, 2), (64, 64, 64, 4, 2), (64, 64, 32, 4, 2), (64, 32, 32, 4, 2)],
        256: [(64, 32, 32, 8, 2), (32, 32, 32, 4, 1)],
    },
    "grad_blocks": {
        64: [(64, 128, 0, 8, 2), (64, 64, 0, 4, 3), (128, 64, 0, 8, 2), (32, 64, 0, 4, 2)],
        128: [(64, 64, 0, 8, 2), (64, 128, 0, 8, 2), (64, 64, 0, 4, 2), (32, 64, 0, 4, 1)],
        256: [(64, 32, 0, 8, 2), (32, 64, 0, 8, 2), (32, 32, 0, 4, 1)],
    },
    "grad_pieces": {
        64: [(128, 64, 0, 4, 3), (128, 64, 0, 8, 2), (64, 64, 0, 4, 2)],
        128: [(128, 64, 0, 8, 2), (64, 64, 0, 4, 2), (64, 32, 0, 4, 1)],
        256: [(64, 32, 0, 8, 2), (64, 32, 0, 8, 1), (32, 16, 0, 4, 1)],
    },
}
"""(rows, keys, cells, warps, stages) by kernel and head width up to a bound; 0 where a kernel has no such tile.

Compiled for sm_90 they spill no or few registers; how fast they are has been measured on no machine yet. The last ones
are for devices with less shared memory.
"""

_EXACT: _Table = {
    64: [(32, 32, 32, 8, 2), (16, 16, 16, 4, 1)],
    256: [(16, 16, 16, 8, 1), (16, 16, 16, 4, 1)],
}
"""For float32, whose exact products run without matrix units, in registers."""


def candidates(kernel: str, head_dim: int, dtype: torch.dtype, rows: int, keys: int) -> list[Config]:
    """Configurations to try, the likeliest first: ``rows`` and ``keys`` of a block bound the tiles."""
    table = _EXACT if dtype == torch.float32 else _TABLES[kernel]
    rung = min(width for width in table if width >= head_dim)
    configs = [Config(fit(rows, r), fit(keys, k), c, warps, stages) for r, k, c, warps, stages in table[rung]]
    return list(dict.fromkeys(configs))


def run(key: Key, configs: list[Config], start: Callable[[Config], None], interpreted: bool = False) -> None:
    """Launches with the best configuration, timing all of them where none is known for the key.

    ``start`` launches the kernel, which must give the same result however often it runs. A configuration that does
    not fit the device is passed over; when none does, the error of the last is raised.
    """
    if interpreted:
        start(configs[0])
        return
    best = _chosen.get(key)
    if best is None and not _fixed and len(configs) > 1 and not torch.cuda.is_current_stream_capturing():
        best = _chosen[key] = _fastest(configs, start)
    order = configs if best not in configs else [best, *(c for c in configs if c != best)]
    failure: Exception | None = None
    for config in order:
        try:
            start(config)
        except Exception as error:
            if not _too_large(error):
                raise
            failure = error
        else:
            return
    assert failure is not None
    raise failure


def _too_large(error: Exception) -> bool:
    from triton.runtime.errors import OutOfResources  # type: ignore[import-untyped,import-not-found,unused-ignore]

    return isinstance(error, OutOfResources)


def _fastest(configs: list[Config], start: Callable[[Config], None]) -> Config:
    times: dict[Config, float] = {}
    for config in configs:
        try:
            start(config)
        except Exception as error:
            if not _too_large(error):
                raise
            continue
        spans = []
        for _ in range(3):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            start(config)
            end.record()
            end.synchronize()
            spans.append(begin.elapsed_time(end))
        times[config] = sorted(spans)[1]
    return min(times, key=lambda c: times[c]) if times else configs[0]
