"""The Triton engine: its tables, what it refuses, the kernels in the interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import farfield as ff
from farfield.geometry import EMPTY, geometry
from farfield.ops.multipole.engines import Request, can_run
from farfield.ops.multipole.triton import tables, tuning
from support.triton_cases import SHAPES, Shape, assert_close, budget, gradients, to

ROOT = Path(__file__).parents[3]
CUDA = torch.device("cuda")


# What it refuses ------------------------------------------------------------------------------------------------------


def test_importing_farfield_does_not_import_triton() -> None:
    code = (
        "import sys, torch, farfield; from farfield.ops.multipole.engines import Request, can_run;"
        "print(can_run('triton', Request(torch.device('cpu'), torch.float32, 64)));"
        "assert 'farfield.ops.multipole.triton.launch' not in sys.modules"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "not on cpu" in done.stdout


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Request(CUDA, torch.float64, 64), "not in torch.float64"),
        (Request(CUDA, torch.float32, 8), "16 to 256, not 8"),
        (Request(CUDA, torch.float32, 257), "16 to 256, not 257"),
        (Request(CUDA, torch.float32, 64, query_rank=True), "pooled queries"),
        (Request(CUDA, torch.float32, 64, dropout=True), "dropout"),
        (Request(torch.device("cpu"), torch.float32, 64), "not on cpu"),
        (Request(CUDA, torch.bfloat16, 64), None),
    ],
)
def test_reasons(request_: Request, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    got = can_run("triton", request_)
    assert (got is None) if reason is None else (got is not None and reason in got)


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert can_run("triton", Request(CUDA, torch.float16, 64)) is not None


def test_asking_for_it_on_cpu_says_why_not() -> None:
    q = torch.randn(1, 1, 40, 16)
    with pytest.raises(ValueError, match=r"impl='triton' cannot run this call"):
        ff.multipole_attention(q, q, q, block=4, rank=2, impl="triton")


# Tables ---------------------------------------------------------------------------------------------------------------


def test_readers_turn_a_table_round() -> None:
    rows = np.array([[2, 0, 1], [0, 3, 3], [3, 2, 2]])
    used = np.array([[True, True, False], [True, True, False], [False, True, False]])
    first, units = tables.readers(rows, used, 5)
    assert [units[a:b].tolist() for a, b in zip(first, first[1:], strict=False)] == [[0, 1], [], [0, 2], [1], []]


def test_compact_moves_used_places_to_the_front() -> None:
    rows = np.array([[5, 6, 7], [1, 2, 3]])
    got, count = tables.compact(rows, np.array([[False, True, True], [True, False, False]]))
    assert got.tolist() == [[6, 7], [1, EMPTY]] and count.tolist() == [2, 1]


@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_pieces_cover_every_row_once(most: int) -> None:
    first = np.array([0, 4, 4, 11, 12])
    row, bounds, start = tables.pieces(first, most)
    covered = [[i for a, b in bounds[row == r] for i in range(a, b)] for r in range(4)]
    assert covered == [list(range(a, b)) for a, b in zip(first, first[1:], strict=False)]
    sizes = bounds[:, 1] - bounds[:, 0]
    assert (sizes >= 1).all() and (sizes <= most).all()
    assert [(row == r).sum() for r in range(4)] == np.diff(start).tolist()


@pytest.mark.parametrize(
    ("grid", "block", "rank"), [((300,), 4, 2), ((37, 50), (2, 4), (1, 2)), ((9, 17, 12), 2, (1, 2, 1))]
)
@pytest.mark.parametrize("cells", [8, 64])
def test_the_pyramids_launches_hold_every_cell_once(
    grid: tuple[int, ...], block: tuple[int, ...], rank: tuple[int, ...], cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "FOLD_CELLS", cells)
    g = geometry(grid, block, rank)
    children = 2**g.dims
    built: list[int] = []
    for base, top, tops in tables.folds(g, g.levels):
        levels = tables.hierarchy(g, base, top, tops)
        assert len(levels) == top - base + 1 and levels[0].shape[1] <= cells
        assert all(a.shape[1] == children * b.shape[1] for a, b in zip(levels, levels[1:], strict=False))
        for level, numbers in enumerate(levels, start=base):
            if level > base or base == 1:
                built += numbers[numbers != EMPTY].tolist()
    total = sum(g.group_total(level) for level in range(1, g.levels + 1)) * g.cells_per_group
    assert sorted(built) == list(range(total))


def test_tokens_of_leaf_cells() -> None:
    offset, cell, child = tables.leaf_tokens(geometry((8, 8), (2, 4), (1, 2)))
    assert offset.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert cell.tolist() == [0, 0, 1, 1, 0, 0, 1, 1] and child.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]


# Tuning ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["forward", "grad_query", "grad_blocks", "grad_pieces"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_fit_the_block(kernel: str, dtype: torch.dtype) -> None:
    for width in (16, 40, 64, 100, 128, 256):
        for rows, keys in ((1, 1), (16, 4), (96, 96), (128, 16), (343, 27)):
            configs = tuning.candidates(kernel, width, dtype, rows, keys)
            assert configs and len(set(configs)) == len(configs)
            for c in configs:
                assert all(side >= 16 and side & (side - 1) == 0 for side in (c.rows, c.keys))
                assert c.keys <= max(16, 2 * keys) and c.rows <= max(16, 2 * rows)


# In the interpreter ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernels_in_the_interpreter() -> None:
    """Every test of interpreted_triton.py, in a process in which triton interprets."""
    tests = Path(__file__).with_name("interpreted_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


# On a GPU -------------------------------------------------------------------------------------------------------------

LARGE = {
    "long": Shape((3000,), 128, 16, heads=(4, 2), width=64, options={"causal": True}),
    "long, both ways": Shape((2500,), 64, 8, "shared", heads=(2, 2), width=128, bias=True),
    "wide heads": Shape((700,), 32, 4, width=256, options={"causal": True, "sinks": 4}),
    "odd heads": Shape((700,), 48, 6, width=72, heads=(3, 1), masked=0.2),
    "image": Shape((70, 61), (16, 16), (4, 4), width=64, heads=(2, 1)),
    "volume": Shape((13, 14, 15), (4, 4, 4), (2, 2, 2), "shared", width=32),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*SHAPES, *LARGE])
def test_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    shape = {**SHAPES, **LARGE}[name]
    case = to(to(shape.case(), dtype), torch.float64)
    truth = gradients(case, "reference")
    got = gradients(to(case, dtype, "cuda"), "triton")
    loose = [5e-6] * (2 + len(truth[2]))
    assert_close(got, truth, loose if dtype == torch.float32 else budget(case, dtype, truth))
