"""Tile sizes: a few candidates per kernel, the fastest of which is kept for every kind of work.

The length is never part of the key: a training run with changing lengths tunes once. Calls too small to fill the
device are not timed, since they would tell nothing of larger ones: until a larger one comes, they take the first
candidate. ``FARFIELD_TUNE=0`` in the environment switches timing off for a process, :func:`fixed` for a stretch of it;
the first candidate is then taken everywhere, and the same bits come out of every process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch

SWITCH = "FARFIELD_TUNE"
"""The environment variable that switches timing off where it is 0."""

TIMINGS = 3
"""Times that a candidate is measured; the median counts."""


@dataclass(frozen=True)
class Config:
    """A tile of ``rows`` queries by ``keys`` keys (``cells`` where they are of many groups), and how a program runs."""

    rows: int
    keys: int
    cells: int
    warps: int = 4
    stages: int = 2


class Key(NamedTuple):
    """What a choice depends on: all that changes the work of a program, except the length.

    Attributes:
        kernel: a key of the table of candidates.
        device: its index.
        head_dim, dtype: of query and key.
        block: tokens of a leaf block.
        pack: query heads in a tile.
        dims, causal: how many blocks and groups a block reads, and which.
        cells: of a group.
        sinks: tokens that are always seen.
        part: which part of the sum is computed, "both", "near" or "far".
    """

    kernel: str
    device: int
    head_dim: int
    dtype: torch.dtype
    block: int
    pack: int
    dims: int
    causal: bool
    cells: int
    sinks: int
    part: str


_chosen: dict[Key, Config] = {}
_fixed = 0


@contextmanager
def fixed() -> Iterator[None]:
    """Within it nothing is timed: every kernel takes the first candidate that fits, whatever was chosen before.

    It holds for all threads, since autograd runs backward passes in threads of its own.
    """
    global _fixed
    _fixed += 1
    try:
        yield
    finally:
        _fixed -= 1


def enabled() -> bool:
    """Whether kernels that are not tuned yet may be timed."""
    return not _fixed and os.environ.get(SWITCH) != "0"


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

_TABLES["grad_sinks"] = _TABLES["grad_pieces"]  # one kernel for the cells of a group and for a set of sinks

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


def run(
    key: Key,
    configs: list[Config],
    programs: Callable[[Config], int],
    start: Callable[[Config], None],
    interpreted: bool = False,
) -> None:
    """Launches with the best configuration, timing all of them where none is known for the key.

    ``start`` launches the kernel, which must give the same result however often it runs; ``programs`` says how many
    programs that takes. A configuration that does not fit the device is passed over; when none does, the error of the
    last is raised.
    """
    if interpreted:
        start(configs[0])
        return
    best = _chosen.get(key) if enabled() else None
    if best is None and len(configs) > 1 and enabled() and _fills(key.device, configs, programs):
        best = _fastest(configs, start)
        if best is not None:
            _chosen[key] = best
    failure: Exception | None = None
    for config in dict.fromkeys([*([] if best is None else [best]), *configs]):
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


def _fills(device: int, configs: list[Config], programs: Callable[[Config], int]) -> bool:
    """Whether a call is large enough to be timed, and may be."""
    enough = torch.cuda.get_device_properties(device).multi_processor_count
    return max(map(programs, configs)) >= enough and not torch.cuda.is_current_stream_capturing()


def _too_large(error: Exception) -> bool:
    from triton.runtime.errors import OutOfResources  # type: ignore[import-untyped,import-not-found,unused-ignore]

    return isinstance(error, OutOfResources)


def _fastest(configs: list[Config], start: Callable[[Config], None]) -> Config | None:
    """None where no configuration fits the device."""
    times: dict[Config, float] = {}
    for config in configs:
        try:
            start(config)
        except Exception as error:
            if not _too_large(error):
                raise
            continue
        times[config] = median(_milliseconds(start, config) for _ in range(TIMINGS))
    return min(times, key=lambda c: times[c]) if times else None


def _milliseconds(start: Callable[[Config], None], config: Config) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    start(config)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
