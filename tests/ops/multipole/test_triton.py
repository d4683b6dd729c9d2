"""The Triton engine: its tables, what it refuses, the kernels in the interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import farfield as ff
from farfield.bench.budget import judge
from farfield.geometry import EMPTY, geometry
from farfield.ops.multipole.engines import Request, can_run
from farfield.ops.multipole.settings import Result, Settings, Tensors
from farfield.ops.multipole.triton import tables, tuning
from support.triton_cases import SHAPES, Shape, assert_within_budget, gradients, to

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


KEY = tuning.Key("forward", 0, 64, torch.bfloat16, 128, 1, 1, True, 16, 0, "both")
SMALL, MIDDLE, BIG = (tuning.Config(rows, 32, 32) for rows in (32, 64, 128))
CONFIGS = [BIG, MIDDLE, SMALL]


class Device:
    """A device with 10 multiprocessors, on which a configuration takes the time that it is given, or does not fit."""

    def __init__(self, times: dict[tuning.Config, float], too_large: tuple[tuning.Config, ...] = ()) -> None:
        self.times, self.too_large = times, too_large
        self.started: list[tuning.Config] = []

    def start(self, config: tuning.Config) -> None:
        if config in self.too_large:
            from triton.runtime.errors import OutOfResources

            raise OutOfResources(200_000, 100_000, "shared memory")
        self.started.append(config)

    def milliseconds(self, start: Callable[[tuning.Config], None], config: tuning.Config) -> float:
        start(config)
        return self.times[config]

    def run(self, rows: int = 10_000, key: tuning.Key = KEY, interpreted: bool = False) -> list[tuning.Config]:
        """What a call of so many rows of queries launches."""
        self.started.clear()
        tuning.run(key, CONFIGS, lambda c: -(-rows // c.rows), self.start, interpreted)
        return list(self.started)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    made = Device({BIG: 3.0, MIDDLE: 1.0, SMALL: 2.0})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=10))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_milliseconds", made.milliseconds)
    monkeypatch.delenv(tuning.SWITCH, raising=False)
    tuning.clear()
    yield made
    tuning.clear()


def test_the_fastest_is_timed_once_and_kept(device: Device) -> None:
    first = device.run()
    assert first == [c for c in CONFIGS for _ in range(1 + tuning.TIMINGS)] + [MIDDLE]
    assert tuning.chosen() == {KEY: MIDDLE}
    assert device.run() == device.run(rows=1) == [MIDDLE]  # also for calls that would not have been timed
    assert device.run(key=KEY._replace(causal=False))[-1] == MIDDLE and len(tuning.chosen()) == 2


def test_one_slow_moment_decides_nothing(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {BIG: [3.0] * 3, MIDDLE: [9.0, 1.0, 1.0], SMALL: [2.0] * 3}
    monkeypatch.setattr(tuning, "_milliseconds", lambda start, config: times[config].pop(0))
    assert device.run()[-1] == MIDDLE


def test_a_call_that_does_not_fill_the_device_is_not_timed(device: Device) -> None:
    """What it would choose would say nothing of larger calls, and stay."""
    assert device.run(rows=9 * SMALL.rows) == [BIG] and not tuning.chosen()
    device.run(rows=10 * SMALL.rows)
    assert tuning.chosen() == {KEY: MIDDLE}


def test_nothing_is_timed_while_fixed_or_switched_off(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    with tuning.fixed():
        with tuning.fixed():
            assert device.run() == [BIG]
        assert device.run() == [BIG]
    monkeypatch.setenv(tuning.SWITCH, "0")
    assert device.run() == [BIG] and not tuning.enabled()
    monkeypatch.setenv(tuning.SWITCH, "1")
    assert device.run()[-1] == MIDDLE
    with tuning.fixed():
        assert device.run() == [BIG]  # whatever was chosen before, or bits would depend on it
    assert device.run() == [MIDDLE]


def test_nothing_is_timed_while_a_graph_is_captured(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert device.run() == [BIG] and not tuning.chosen()


def test_the_interpreter_takes_the_first(device: Device) -> None:
    assert device.run(interpreted=True) == [BIG] and not tuning.chosen()


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_what_does_not_fit_the_device_is_passed_over(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.too_large = (BIG,)
    with tuning.fixed():
        assert device.run() == [MIDDLE]
    device.times[MIDDLE] = 5.0
    assert device.run()[-1] == SMALL and tuning.chosen() == {KEY: SMALL}
    device.too_large = (BIG, SMALL)  # the one that was chosen, for another call of its key
    assert device.run() == [MIDDLE]
    device.too_large = (BIG, MIDDLE, SMALL)
    tuning.clear()
    with pytest.raises(Exception, match="out of resource"):
        device.run()
    assert not tuning.chosen()


def test_other_errors_are_not_hidden(device: Device) -> None:
    def broken(config: tuning.Config) -> None:
        raise RuntimeError("a bug")

    for off in (tuning.fixed, nullcontext):
        with off(), pytest.raises(RuntimeError, match="a bug"):
            tuning.run(KEY, CONFIGS, lambda c: 100, broken)


# What is launched -----------------------------------------------------------------------------------------------------


class Launches:
    """Calls of the engine whose kernels are not run: their tuning keys, and what Triton would compile them for."""

    def __init__(self) -> None:
        self.keys: set[tuning.Key] = set()
        self.kernels: dict[str, set[tuple[tuple[str, str], ...]]] = {}

    def call(self, *grid: int, causal: bool = False, heads: tuple[int, int] = (2, 2), bias: bool = False,
             dtype: torch.dtype = torch.float16, width: int = 64, block: int = 16, rank: int = 4, **options: Any
             ) -> set[tuning.Key]:  # fmt: skip
        """Forward and backward of one call; its tuning keys."""
        from farfield.ops.multipole.triton import launch

        dims, number = len(grid), prod(grid)
        masked = options.pop("masked", False)
        s = Settings(
            **{
                "kind": "mean", "grid": grid, "block": (block,) * dims, "rank": (rank,) * dims, "levels": None,
                "causal": causal, "count_bias": True, "query_rank": None, "sinks": 0, "scale": 0.1, "dropout": 0.0,
                "part": "both", **options,
            }
        )  # fmt: skip
        q, k, v, grad = (torch.zeros(2, h, number, width, dtype=dtype) for h in (*heads, heads[1], heads[0]))
        mask = torch.ones(2, number, dtype=torch.bool) if masked else None
        tensors = Tensors(q, k, v, mask, None, torch.zeros(20, heads[0]) if bias else None, None, [])
        self.keys = set()
        out, lse = launch.forward(s, tensors)
        launch.backward(s, tensors, Result(grad, lse, out, lse))
        return self.keys


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    jit = pytest.importorskip("triton.runtime.jit", reason="triton is not installed")
    nvidia = pytest.importorskip("triton.backends.nvidia.compiler", reason="triton has no backend for NVIDIA's GPUs")
    backend = nvidia.CUDABackend(nvidia.GPUTarget("cuda", 90, 32))
    made, run = Launches(), tuning.run

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, special, _ = binder(*args, debug=False, **options)
        name = "grad_sinks" if options.get("SINKS") and kernel.fn.__name__ == "grad_pieces" else kernel.fn.__name__
        made.kernels.setdefault(name, set()).add(tuple(zip(bound, map(str, special), strict=True)))

    def keyed(key: tuning.Key, *args: Any) -> None:
        made.keys.add(key)
        run(key, *args)

    monkeypatch.setattr(jit.JITFunction, "run", note)
    monkeypatch.setattr(tuning, "run", keyed)
    monkeypatch.setenv(tuning.SWITCH, "0")
    return made


LENGTHS = (500, 1000, 1024, 1025, 2048, 3333)


def test_choices_depend_on_the_work_and_not_on_the_length(launches: Launches) -> None:
    kinds: list[dict[str, Any]] = [
        {}, {"causal": True}, {"sinks": 3}, {"part": "near"}, {"part": "far"}, {"heads": (4, 2)}, {"rank": 2},
        {"block": 32}, {"width": 128}, {"dtype": torch.float32},
    ]  # fmt: skip
    found = []
    for kind in kinds:
        found.append(launches.call(1000, **kind))
        for number in (*LENGTHS, 64):
            assert launches.call(number, **kind) <= found[-1], (kind, number)
    for grid in ((40, 50), (10, 20, 30)):
        found.append(launches.call(*grid, block=4, rank=2))
        assert launches.call(*(2 * n + 1 for n in grid), block=4, rank=2) <= found[-1]
    # A length that is shorter than the sinks asked for, or has one level more, is no other kind either.
    few, many = launches.call(40, sinks=100), launches.call(5000, sinks=100)
    assert few <= many
    found.append(many)
    forward = [next(key for key in keys if key.kernel == "forward") for keys in found]
    assert len(set(forward)) == len(forward)
    kernels = {key.kernel for key in launches.call(1000, sinks=3)}
    assert kernels == {"forward", "grad_query", "grad_blocks", "grad_pieces", "grad_sinks"}


@pytest.mark.parametrize("options", [{}, {"causal": True, "sinks": 3}, {"masked": True}, {"bias": True}], ids=str)
def test_kernels_are_not_compiled_anew_for_new_lengths(options: dict[str, Any], launches: Launches) -> None:
    """But for whether the last block is full, and for the levels of a pyramid, which are few.

    (One kernel sums the pieces of cells and of sinks, which are of two sizes.)
    """
    for number in LENGTHS:
        launches.call(number, **options)
    assert len(launches.kernels) == (9 if "sinks" in options else 8)
    for name, variants in launches.kernels.items():
        differing = {p for rows in zip(*variants, strict=True) for p, _ in rows if len(set(rows)) > 1}
        allowed = {"fold_up": {"STEPS"}, "fold_down": {"STEPS"}, "add_pieces": {"SIZE"}}.get(name, {"WHOLE", "LEVELS"})
        assert differing <= allowed, name
        assert len(variants) <= (7 if name.startswith("fold") else 4), name


# Precision ------------------------------------------------------------------------------------------------------------

PRECISIONS = {
    "pass": "ieee",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    "torch.set_float32_matmul_precision('highest')": "ieee",
}
"""What is said to torch, and what products of float32 are then computed in."""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_tf32_only_where_torch_may() -> None:
    """A call in float32 runs and obeys, said in torch's newer way or its older.

    They must not be mixed in one process, so each is said in a fork of its own.
    """
    code = f"""
import os, torch, farfield
from farfield.ops.multipole.triton import launch

q = torch.randn(1, 1, 4, 16)
call = lambda: farfield.multipole_attention(q, q, q, block=4, rank=2, impl="triton")
call()  # what it imports is imported once
for setting in {list(PRECISIONS)}:
    child = os.fork()
    if child == 0:
        exec(setting)
        call()
        print(launch._precision(torch.float32), launch._precision(torch.float16), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, setting
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{wanted} tf32" for wanted in PRECISIONS.values()]


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


def on_a_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that needs a GPU, and skips it without one."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


@pytest.fixture
def untuned() -> Iterator[None]:
    """The first tiles that fit, whatever ran before: nothing is timed, and the same bits come out."""
    tuning.clear()
    with tuning.fixed():
        yield


SWEPT = {
    "long": Shape((3000,), 128, 16, heads=(4, 2), width=64, options={"causal": True}),
    "long, both ways": Shape((2500,), 64, 8, "shared", heads=(2, 2), width=128, bias=True),
    "wide heads": Shape((700,), 32, 4, width=256, options={"causal": True, "sinks": 4}),
    "odd heads": Shape((700,), 48, 6, width=72, heads=(3, 1), masked=0.2),
    "image": Shape((70, 61), (16, 16), (4, 4), width=64, heads=(2, 1)),
    "volume": Shape((13, 14, 15), (4, 4, 4), (2, 2, 2), "shared", width=32),
}

LARGE = {
    "line": Shape((65_536,), 128, 16, heads=(2, 1), width=64, options={"causal": True}),
    "line, both ways": Shape((65_536,), 128, 16, "shared", heads=(2, 1), width=64),
    "image": Shape((256, 256), 16, 4, "shared", heads=(2, 1), width=64),
    "volume": Shape((64, 64, 64), 8, 2, "shared", heads=(1, 1), width=32),
}


@on_a_gpu
@pytest.mark.usefixtures("poisoned", "untuned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), *SWEPT.values()], ids=[*SHAPES, *(f"swept {n}" for n in SWEPT)])
def test_on_a_gpu(shape: Shape, dtype: torch.dtype) -> None:
    assert_within_budget(shape.case(), "triton", dtype, "cuda")


@on_a_gpu
@pytest.mark.usefixtures("untuned")
@pytest.mark.parametrize("name", LARGE)
def test_large_sizes_on_a_gpu(name: str) -> None:
    """Several launches of the pyramid and rows of many pieces, where only the torch engine is small enough to ask."""
    case = to(LARGE[name].case(), torch.float32, "cuda")
    truth = gradients(to(case, torch.float64, "cuda"), "torch")
    verdict = judge(gradients(case, "triton"), gradients(case, "torch"), truth)
    assert verdict.right, verdict


@on_a_gpu
@pytest.mark.parametrize("place", range(5))
def test_every_candidate_on_a_gpu(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles that tuning chooses among all give the right answer."""
    candidates = tuning.candidates
    monkeypatch.setattr(tuning, "candidates", lambda *args: candidates(*args)[place % len(candidates(*args)) :])
    with tuning.fixed():
        tuning.clear()
        assert_within_budget(SWEPT["long"].case(), "triton", torch.bfloat16, "cuda")
    tuning.clear()


@on_a_gpu
@pytest.mark.usefixtures("untuned")
@pytest.mark.parametrize("name", ["long", "long, both ways", "image"])
def test_the_same_bits_twice_on_a_gpu(name: str) -> None:
    case = to(SWEPT[name].case(), torch.bfloat16, "cuda")
    first, second = gradients(case, "triton"), gradients(case, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_a_gpu
@pytest.mark.usefixtures("untuned")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_one_compiled_graph_for_all_lengths_on_a_gpu() -> None:
    """By inductor, forward and backward: the bits of the eager call, and nothing compiled anew for a new length."""

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ff.multipole_attention(q, k, v, block=32, rank=4, causal=True, impl="triton")  # type: ignore[return-value]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for number in (300, 517, 64, 1024, 2000):
        leaves = [
            torch.randn(2, h, number, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2)
        ]
        results = []
        for run in (compiled, f):
            out = run(*leaves)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@on_a_gpu
@pytest.mark.usefixtures("untuned")
def test_more_than_two_to_the_31_elements_on_a_gpu() -> None:
    """The last head lies beyond what 32 bits address: the bits are those of that head alone."""
    heads, number, width = 33, 1 << 20, 64
    assert heads * number * width > 1 << 31
    needed = 16 * heads * number * width * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = ff.multipole_attention(*leaves, block=128, rank=16, causal=True, impl="triton", return_lse=True)
        grads = torch.autograd.grad(out, leaves, grad)
        return [x.detach()[:, -1:].clone() for x in (out, lse, *grads)]

    tensors = [torch.randn(1, heads, number, width, device="cuda", dtype=torch.float16) for _ in range(4)]
    alone = run(*(x[:, -1:].clone() for x in tensors))
    together = run(*tensors)
    assert all(torch.isfinite(x).all() for x in alone)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
