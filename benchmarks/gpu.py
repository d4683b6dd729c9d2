"""Everything about the Triton engine that only a CUDA device can tell, in one run: is it right, how fast, how large.

    python benchmarks/gpu.py --json runs/gpu.json
    python benchmarks/gpu.py --parts correctness,rate --budget 600 --json runs/gpu.json

Parts, the cheapest and most important first: matrix (the bf16 rate of a large product: the ceiling, measured in every
run), correctness (bfloat16 within its error budget), million (1,048,576 tokens), rate (share of the ceiling), dense
(beside every backend of scaled_dot_product_attention), image (beside NATTEN, if installed), large (against the torch
engine, where no dense reference fits), precisions (float16 and float32 within their budgets). With ``--budget``, no
part is begun after so many seconds.

What fails is written down with its error, and the rest goes on. The file is rewritten after every step and keeps the
parts of earlier runs, each with its run, card and versions. At the end a table sets each target beside its figure: a
target is met or missed only if all of its rows were measured. It exits with 1 when anything failed, or gave a result
beyond its error budget; a target that is missed for its speed is no failure.

Useful FLOPs are those of query-key pairs that the result needs, as docs/bench.md counts them. Times are medians over
rounds in which all candidates take turns; a sample repeats a call until it lasts some milliseconds, so that launches
overlap with computing as they do in a model.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import statistics
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import farfield as ff
from farfield import far, near
from farfield.bench import budget
from farfield.bench.case import Case
from farfield.bench.model import work_of
from farfield.geometry import geometry
from farfield.ops.multipole.engines import Request, can_run
from farfield.ops.multipole.triton import tuning

Run = Callable[[], object]
Row = dict[str, Any]
FORMAT = "farfield-gpu/2"
HEADS = 8
ROUNDS = 5
SAMPLE_MS = 8.0
WIDTHS = (64, 128)
MODES = ("forward", "both")
BLOCK, RANK = 128, 16
RATE_LENGTHS = (16384, 65536, 32768, 131072, 8192, 4096, 2048)
RATE_FROM = 16384
DENSE_LENGTHS = (65536, 2048, 1024, 4096, 512, 8192, 16384, 32768)
LONG = 65536
SERIES = {"single": "batch 1", "tokens": "65,536 tokens in all"}
IMAGE, IMAGE_BLOCK, IMAGE_RANK = (256, 256), 16, 4
NATTEN_WINDOW = 47
"""The odd side nearest to the 48 tokens per axis that leaf blocks of 16 see with their neighbours."""


# Counting -------------------------------------------------------------------------------------------------------------


def pairs(grid: tuple[int, ...], block: int, rank: int, causal: bool) -> int:
    """Query-key products that multipole attention needs, per batch entry and head."""
    work = work_of(near.Blocks(block), far.Pyramid(rank=rank), Case(grid, causal=causal))
    assert work is not None
    return work.exact + work.far


def window_pairs(grid: tuple[int, ...], size: int) -> int:
    """Those that NATTEN's neighbourhood attention needs: every query sees a whole window, at borders as well."""
    work = work_of(near.Window(size), None, Case(grid))
    assert work is not None
    return work.exact


def flops(count: int, width: int, mode: str) -> float:
    """Useful FLOPs of so many pairs: two products forward, and five more backward."""
    return (4.0 if mode == "forward" else 14.0) * width * count


# Timing ---------------------------------------------------------------------------------------------------------------


def once(run: Run, repeat: int = 1) -> float:
    """Milliseconds of one call, from ``repeat`` of them in a row."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeat):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeat


def interleaved(runs: dict[str, Run], rounds: int = ROUNDS) -> tuple[dict[str, float], dict[str, str]]:
    """Median milliseconds of every candidate that runs, and the errors of the others; all take turns in every round."""
    errors: dict[str, str] = {}
    repeats: dict[str, int] = {}
    for name, run in runs.items():
        try:
            for _ in range(3):
                run()
            torch.cuda.synchronize()
            repeats[name] = max(1, min(200, round(SAMPLE_MS / max(1e-3, once(run)))))
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {str(error)[:300]}"
            torch.cuda.empty_cache()
    samples: dict[str, list[float]] = {name: [] for name in repeats}
    for _ in range(rounds):
        for name, repeat in repeats.items():
            samples[name].append(once(runs[name], repeat))
    return {name: statistics.median(times) for name, times in samples.items()}, errors


def timed(runs: dict[str, Run]) -> dict[str, float]:
    """As :func:`interleaved`, where all must run."""
    times, errors = interleaved(runs)
    if errors:
        raise RuntimeError(str(errors))
    return times


def graphed(run: Run) -> Run:
    """The call as a CUDA graph: its time without that of launching."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def inputs(batch: int, heads: int, number: int, width: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Query, key, value that take gradients, and the gradient of the output."""
    q, k, v, grad = (torch.randn(batch, heads, number, width, device="cuda", dtype=dtype) for _ in range(4))
    return [*(x.requires_grad_() for x in (q, k, v)), grad]


def both(attention: Callable[..., Tensor], tensors: list[Tensor]) -> dict[str, Run]:
    """Forward alone, and forward with backward."""
    *leaves, grad = tensors
    plain = [x.detach() for x in leaves]
    return {
        "forward": lambda: attention(*plain),
        "both": lambda: torch.autograd.grad(attention(*leaves), leaves, grad),
    }


def multipole(**options: Any) -> Callable[..., Tensor]:
    return lambda q, k, v: ff.multipole_attention(q, k, v, impl="triton", **options)  # type: ignore[return-value]


# The file -------------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What a figure depends on: the card and the versions."""
    facts: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "farfield": ff.__version__,
        "torch": torch.__version__,
    }
    for package in ("triton", "natten"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = None
    return facts


def writable(x: Any) -> Any:
    """JSON knows no infinity and no NaN: they become words."""
    if isinstance(x, dict):
        return {k: writable(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [writable(v) for v in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


class Report:
    """The JSON file, written after every step. A part carries the run that it is from, and that run's machine."""

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self.path, self.machine = path, machine
        self.run = f"{time.strftime('%Y-%m-%dT%H:%M:%S')}-{uuid.uuid4().hex[:6]}"
        self.data: dict[str, Any] = {"format": FORMAT, "parts": {}}
        if path.exists():
            self.data = json.loads(path.read_text())
            if self.data.get("format") != FORMAT:
                sys.exit(f"{path} has another format than {FORMAT}: name another file, or remove it")

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(writable(self.data), indent=1, allow_nan=False) + "\n")

    def begin(self, name: str) -> list[Row]:
        """The rows of a part, empty; those of an earlier run are forgotten."""
        rows: list[Row] = []
        self.data["parts"][name] = {"run": self.run, "machine": self.machine, "rows": rows}
        return rows

    def rows(self, name: str) -> list[Row]:
        part = self.data["parts"].get(name)
        return [] if part is None else part["rows"]

    def ceiling(self) -> float | None:
        """The matrix rate of this run in TFLOP/s: a share of another run's would compare two machines."""
        part = self.data["parts"].get("matrix")
        if part is None or part["run"] != self.run:
            return None
        return next((row["tflops"] for row in part["rows"] if "tflops" in row), None)


@contextmanager
def row(rows: list[Row], report: Report, **what: Any) -> Iterator[Row]:
    """One entry of a part; an exception becomes its ``error``, and the next entry follows."""
    entry: Row = dict(what)
    start = time.perf_counter()
    try:
        yield entry
        torch.cuda.synchronize()
    except Exception as error:
        entry["error"] = f"{type(error).__name__}: {str(error)[:600]}"
        entry["trace"] = traceback.format_exc()[-3000:]
        torch.cuda.empty_cache()
    entry["seconds"] = round(time.perf_counter() - start, 2)
    rows.append(entry)
    report.write()
    print({k: v for k, v in entry.items() if k != "trace"}, flush=True)


# Parts ----------------------------------------------------------------------------------------------------------------


def part_matrix(report: Report) -> None:
    with row(report.begin("matrix"), report, size=8192) as entry:
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        entry["ms"] = timed({"matrix": lambda: a @ b})["matrix"]
        entry["tflops"] = 2 * 8192**3 / entry["ms"] / 1e9


CALLS: dict[str, dict[str, Any]] = {
    "line": {"grid": (1500,), "block": 128, "rank": 16, "causal": True},
    "line, both ways": {"grid": (1000,), "block": 64, "rank": 8},
    "grouped heads, sinks": {"grid": (1000,), "block": 32, "rank": 4, "causal": True, "sinks": 4, "key_heads": 2},
    "bias, mask": {"grid": (1000,), "block": 48, "rank": 6, "bias": True, "mask": True},
    "packed": {"grid": (1024,), "block": 32, "rank": 4, "causal": True, "cu_seqlens": [0, 100, 613, 1024]},
    "image": {"grid": (70, 45), "block": 16, "rank": 4},
    "volume": {"grid": (9, 14, 12), "block": 4, "rank": 2},
}
WIDTH_OF = {torch.bfloat16: 64, torch.float16: 80, torch.float32: 64}
LARGE: dict[str, dict[str, Any]] = {
    "line": {"grid": (65536,), "block": 128, "rank": 16, "causal": True},
    "line, both ways": {"grid": (65536,), "block": 128, "rank": 16},
    "image": {"grid": (256, 256), "block": 16, "rank": 4},
    "volume": {"grid": (64, 64, 64), "block": 8, "rank": 2},
}


def verdict(call: dict[str, Any], dtype: torch.dtype, width: int, heads: int, truth: str, plain: str) -> budget.Verdict:
    """A call by the Triton engine, by engine ``truth`` in float64, and by ``plain`` in the same precision."""
    torch.manual_seed(0)
    call = dict(call)
    key_heads = call.pop("key_heads", heads)
    g = geometry(call["grid"], call["block"], call["rank"])
    leaves = [torch.randn(2, h, g.tokens, width, device="cuda").to(dtype) for h in (heads, key_heads, key_heads)]
    if call.pop("bias", False):
        leaves.append(torch.randn(g.levels, heads, device="cuda").to(dtype))
    if call.pop("mask", False):
        call["key_mask"] = torch.rand(2, g.tokens, device="cuda") > 0.3
    if "cu_seqlens" in call:
        call["cu_seqlens"] = torch.tensor(call["cu_seqlens"], device="cuda")

    def results(impl: str, dtype: torch.dtype) -> list[Tensor]:
        q, k, v, *bias = some = [x.to(dtype, copy=True).requires_grad_() for x in leaves]
        options = {**call, "level_bias": bias[0] if bias else None}
        if impl == "plain":
            return budget.gradients(lambda: budget.plain_attention(q, k, v, **options), some)
        attention = ff.multipole_attention
        return budget.gradients(lambda: attention(q, k, v, impl=impl, return_lse=True, **options), some)  # type: ignore[arg-type, return-value]

    return budget.judge(results("triton", dtype), results(plain, dtype), results(truth, torch.float64))


def check(report: Report, rows: list[Row], calls: dict[str, dict[str, Any]], dtype: torch.dtype, **how: Any) -> None:
    for name, call in calls.items():
        with row(rows, report, call=name, dtype=str(dtype)) as entry, tuning.fixed():
            found = verdict(call, dtype, WIDTH_OF[dtype], **how)
            entry |= {**asdict(found), "right": found.right}


def part_correctness(report: Report) -> None:
    """Against float64; at most twice the error of plain torch, three times for gradients."""
    check(report, report.begin("correctness"), CALLS, torch.bfloat16, heads=4, truth="reference", plain="plain")


def part_precisions(report: Report) -> None:
    """The same in the other precisions."""
    rows = report.begin("precisions")
    for dtype in (torch.float16, torch.float32):
        check(report, rows, CALLS, dtype, heads=4, truth="reference", plain="plain")


def part_large(report: Report) -> None:
    """Several launches of the pyramid, many pieces to a row: against the torch engine, float32."""
    check(report, report.begin("large"), LARGE, torch.float32, heads=1, truth="torch", plain="torch")


def part_rate(report: Report) -> None:
    """Share of the matrix rate: products that the result needs, nothing else counted."""
    rows, ceiling = report.begin("rate"), report.ceiling()
    for width in WIDTHS:
        for causal in (True, False):
            for number in RATE_LENGTHS:
                batch = max(1, 131072 // number)
                with row(rows, report, n=number, batch=batch, head_dim=width, causal=causal) as entry:
                    attention = multipole(block=BLOCK, rank=RANK, causal=causal)
                    count = pairs((number,), BLOCK, RANK, causal) * batch * HEADS
                    times = timed(both(attention, inputs(batch, HEADS, number, width)))
                    for mode in MODES:
                        entry[mode] = times[mode]
                        entry[f"{mode}_tflops"] = flops(count, width, mode) / times[mode] / 1e9
                        if ceiling is not None:
                            entry[f"{mode}_share"] = entry[f"{mode}_tflops"] / ceiling


def dense_backends() -> dict[str, Callable[..., Tensor]]:
    """Every fused backend of causal scaled_dot_product_attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def by(backend: SDPBackend) -> Callable[..., Tensor]:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return attention

    return {
        "flash": by(SDPBackend.FLASH_ATTENTION),
        "cudnn": by(SDPBackend.CUDNN_ATTENTION),
        "efficient": by(SDPBackend.EFFICIENT_ATTENTION),
    }


def part_dense(report: Report) -> None:
    """Beside every backend of scaled_dot_product_attention: one long sequence, and 65,536 tokens in all.

    Short sequences also as a CUDA graph, to tell how much of their time is launching.
    """
    rows, backends = report.begin("dense"), dense_backends()
    for series in SERIES:
        for width in WIDTHS:
            for number in DENSE_LENGTHS:
                batch = 65536 // number if series == "tokens" else 1
                with row(rows, report, series=series, head_dim=width, n=number, batch=batch) as entry:
                    tensors = inputs(batch, HEADS, number, width)
                    ours = both(multipole(block=BLOCK, rank=RANK, causal=True), tensors)
                    peers = {name: both(attention, tensors) for name, attention in backends.items()}
                    for mode in MODES:
                        times, errors = interleaved(
                            {"multipole": ours[mode], **{name: peer[mode] for name, peer in peers.items()}}
                        )
                        entry[mode] = {**times, **errors}
                        best = min((ms for name, ms in times.items() if name != "multipole"), default=None)
                        if best is None or "multipole" not in times:
                            raise RuntimeError(f"{mode}: {errors}")
                        entry[f"{mode}_ratio"] = best / times["multipole"]
    for number in (512, 1024, 2048, 4096):
        with row(rows, report, series="graph", head_dim=64, n=number) as entry:
            attention = multipole(block=BLOCK, rank=RANK, causal=True)
            entry["forward"] = once(graphed(both(attention, inputs(1, HEADS, number, 64))["forward"]), 20)


def part_million(report: Report) -> None:
    """1,048,576 tokens forward and backward in one go, all of them numbers."""
    number, width = 1 << 20, 64
    with row(report.begin("million"), report, n=number, batch=1, heads=HEADS, head_dim=width) as entry:
        torch.cuda.empty_cache()
        tensors = inputs(1, HEADS, number, width)
        size = tensors[0].numel() * tensors[0].element_size()
        attention = multipole(block=BLOCK, rank=RANK, causal=True)
        for mode, run in both(attention, tensors).items():
            run()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            rise = torch.cuda.max_memory_allocated() - before
            entry[mode] = {"rise_gib": rise / 2**30, "rise_in_q": rise / size}
            entry[mode]["ms"] = statistics.median(once(run) for _ in range(ROUNDS))
        entry["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        *leaves, grad = tensors
        out = attention(*leaves)
        results = [out, *torch.autograd.grad(out, leaves, grad)]
        entry["finite"] = all(bool(torch.isfinite(x).all()) for x in results)


def part_image(report: Report) -> None:
    """256 x 256 with leaf blocks of 16 x 16, beside NATTEN with a window of about as many tokens as those see."""
    rows = report.begin("image")
    natten = None
    if report.machine.get("natten") is None:
        print("NATTEN is not installed: multipole attention is measured alone", flush=True)
    else:
        import natten
    count = pairs(IMAGE, IMAGE_BLOCK, IMAGE_RANK, False) * HEADS
    other = window_pairs(IMAGE, NATTEN_WINDOW) * HEADS
    for width in WIDTHS:
        with row(rows, report, grid=list(IMAGE), block=IMAGE_BLOCK, rank=IMAGE_RANK, head_dim=width) as entry:
            tensors = inputs(1, HEADS, math.prod(IMAGE), width)
            runs = both(multipole(grid=IMAGE, block=IMAGE_BLOCK, rank=IMAGE_RANK), tensors)
            if natten is not None:
                attention = natten.na2d
                layout = [x.detach().transpose(1, 2).unflatten(1, IMAGE).contiguous() for x in tensors]
                layout = [*(x.requires_grad_() for x in layout[:3]), layout[3]]
                peers = both(lambda q, k, v, f=attention: f(q, k, v, kernel_size=NATTEN_WINDOW), layout)
                runs |= {f"natten {mode}": run for mode, run in peers.items()}
            entry |= {"pairs": count, "natten_pairs": other, **timed(runs)}
            for mode in MODES:
                entry[f"{mode}_tflops"] = flops(count, width, mode) / entry[mode] / 1e9
                if natten is not None:
                    theirs = flops(other, width, mode) / entry[f"natten {mode}"] / 1e9
                    entry |= {f"natten {mode}_tflops": theirs, f"{mode}_ratio": theirs / entry[f"{mode}_tflops"]}


PARTS: dict[str, Callable[[Report], None]] = {
    "matrix": part_matrix,
    "correctness": part_correctness,
    "million": part_million,
    "rate": part_rate,
    "dense": part_dense,
    "image": part_image,
    "large": part_large,
    "precisions": part_precisions,
}


# Targets --------------------------------------------------------------------------------------------------------------


class NotMeasured(Exception):
    """Why a target has no figure."""


@dataclass(frozen=True)
class Target:
    """A target beside its figure: ``status`` is "met", "missed" or "not measured", and ``note`` says why the last."""

    name: str
    wanted: float
    figure: float | None
    status: str
    note: str = ""

    @staticmethod
    def of(name: str, wanted: float, measure: Callable[[], float], at_most: bool = False) -> Target:
        try:
            figure = measure()
        except NotMeasured as why:
            return Target(name, wanted, None, "not measured", str(why))
        met = figure <= wanted if at_most else figure >= wanted
        return Target(name, wanted, figure, "met" if met else "missed")


def wanted_rows(report: Report, part: str, keys: Sequence[dict[str, Any]], *figures: str) -> list[Row]:
    """One row of a part for each of ``keys``, holding all ``figures``.

    Raises:
        NotMeasured: where a row is missing, failed or lacks a figure.
    """
    found = []
    for key in keys:
        what = f"{part} {', '.join(f'{k} {v}' for k, v in key.items())}"
        matching = [r for r in report.rows(part) if all(r.get(k) == v for k, v in key.items())]
        if not matching:
            raise NotMeasured(f"{what}: no row")
        (one,) = matching
        if "error" in one:
            raise NotMeasured(f"{what}: {one['error'][:120]}")
        missing = [name for name in figures if name not in one]
        if missing:
            raise NotMeasured(f"{what}: no {', '.join(missing)}")
        found.append(one)
    return found


def break_even(ratios: dict[int, float]) -> float:
    """The smallest N from which on every longer one measured is no slower, too; infinite where the longest is."""
    found = math.inf
    for number in sorted(ratios, reverse=True):
        if ratios[number] < 1.0:
            break
        found = float(number)
    return found


def targets(report: Report) -> list[Target]:
    """Every target of the issue, and whether it is met."""
    out: list[Target] = []

    def right(part: str, calls: dict[str, Any], dtypes: Sequence[torch.dtype], name: str) -> None:
        keys = [{"call": call, "dtype": str(dtype)} for dtype in dtypes for call in calls]

        def measure() -> float:
            return float(sum(r["right"] for r in wanted_rows(report, part, keys, "right")))

        out.append(Target.of(f"calls within the error budget, {name}", float(len(keys)), measure))

    right("correctness", CALLS, [torch.bfloat16], "bfloat16")
    right("precisions", CALLS, [torch.float16, torch.float32], "float16 and float32")
    right("large", LARGE, [torch.float32], "65,536 to 262,144 tokens in float32")
    for width in WIDTHS:
        for causal in (True, False):
            for mode, wanted in zip(MODES, (0.45, 0.35), strict=True):
                keys = [{"head_dim": width, "causal": causal, "n": n} for n in RATE_LENGTHS if n >= RATE_FROM]

                def share(keys: list[dict[str, Any]] = keys, name: str = f"{mode}_share") -> float:
                    return float(min(r[name] for r in wanted_rows(report, "rate", keys, name)))

                kind = f"D {width}, {'causal' if causal else 'both ways'}, least over N >= {RATE_FROM:,}"
                out.append(Target.of(f"{SAID[mode]}, share of the matrix rate, {kind}", wanted, share))
    for width in WIDTHS:
        for mode, wanted in zip(MODES, (20.0, 15.0), strict=True):

            def ratio(width: int = width, name: str = f"{mode}_ratio") -> float:
                keys = [{"series": "single", "head_dim": width, "n": LONG}]
                return float(wanted_rows(report, "dense", keys, name)[0][name])

            kind = f"N {LONG:,} causal, D {width}"
            out.append(Target.of(f"{SAID[mode]}, times the best dense backend, {kind}", wanted, ratio))
    for series, batch in SERIES.items():
        for width in WIDTHS:
            for mode in MODES:

                def even(series: str = series, width: int = width, name: str = f"{mode}_ratio") -> float:
                    keys = [{"series": series, "head_dim": width, "n": n} for n in DENSE_LENGTHS]
                    return break_even({r["n"]: r[name] for r in wanted_rows(report, "dense", keys, name)})

                kind = f"D {width}, {batch}"
                out.append(Target.of(f"{SAID[mode]}, break-even N with dense, {kind}", 2048.0, even, at_most=True))

    def million() -> float:
        return float(wanted_rows(report, "million", [{"n": 1 << 20}], "both", "finite")[0]["finite"])

    out.append(Target.of("1,048,576 tokens forward + backward in one go, all finite", 1.0, million))
    for width in WIDTHS:
        for mode in MODES:

            def beside(width: int = width, name: str = f"{mode}_ratio") -> float:
                if report.rows("image") and report.data["parts"]["image"]["machine"].get("natten") is None:
                    raise NotMeasured("NATTEN is not installed")
                return float(wanted_rows(report, "image", [{"head_dim": width}], name)[0][name])

            name = f"{SAID[mode]}, time per useful FLOP over NATTEN's, 256 x 256, D {width}"
            out.append(Target.of(name, 1.0, beside, at_most=True))
    return out


SAID = {"forward": "forward", "both": "forward + backward"}


# Running --------------------------------------------------------------------------------------------------------------


def run_parts(report: Report, names: Sequence[str], seconds: float, clock: Callable[[], float]) -> None:
    """The parts in their order, none begun after ``seconds``; the rate of matrix products first, in every run."""
    start = clock()
    left_out: list[str] = []
    took: dict[str, float] = {}
    for name in [n for n in PARTS if n == "matrix" or n in names]:
        begun = clock()
        if begun - start >= seconds:
            print(f"== {name}: left out, {begun - start:.0f} of {seconds:.0f} seconds are over", flush=True)
            left_out.append(name)
            continue
        print(f"== {name}", flush=True)
        torch.manual_seed(0)
        try:
            PARTS[name](report)
        except Exception as error:
            if report.data["parts"].get(name, {}).get("run") != report.run:
                report.begin(name)
            report.rows(name).append({"error": str(error)[:600], "trace": traceback.format_exc()[-3000:]})
            traceback.print_exc()
        took[name] = round(clock() - begun, 1)
        report.data["parts"][name]["seconds"] = took[name]
        print(f"== {name}: {took[name]:.0f} s, {clock() - start:.0f} s in all", flush=True)
        report.write()
    report.data["last"] = {"run": report.run, "machine": report.machine, "seconds": took, "left_out": left_out}
    report.data["tiles"] = {str(tuple(map(str, key))): str(config) for key, config in tuning.chosen().items()}
    report.data["targets"] = [asdict(target) for target in targets(report)]
    report.write()


def failures(report: Report) -> list[str]:
    """What this run could not do, or did wrongly: rows with an error, and rows beyond their error budget."""
    found = []
    for name, part in report.data["parts"].items():
        for entry in part["rows"] if part["run"] == report.run else ():
            if "error" in entry or not entry.get("right", True) or not entry.get("finite", True):
                found.append(f"{name}: {entry.get('error', 'wrong')}")
    return found


def table(report: Report) -> str:
    """The targets, and which run each part is of."""
    lines = [f"{'target':96s} {'wanted':>8s} {'figure':>10s}  status"]
    for t in targets(report):
        figure = "-" if t.figure is None else f"{t.figure:.3g}"
        lines.append(f"{t.name:96s} {t.wanted:8g} {figure:>10s}  {t.status}{f' ({t.note})' if t.note else ''}")
    lines.append("")
    for name, part in report.data["parts"].items():
        lines.append(f"{name:12s} {part['run']} on {part['machine'].get('gpu')}, torch {part['machine'].get('torch')}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which of {', '.join(PARTS)}; matrix is always run")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no part is begun")
    parser.add_argument("--json", type=Path, default=Path("runs/gpu.json"))
    args = parser.parse_args()
    chosen = args.parts.split(",")
    unknown = [p for p in chosen if p not in PARTS]
    if unknown:
        sys.exit(f"--parts {unknown}: {', '.join(PARTS)} would be accepted")
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device, and torch finds none here: nothing was measured")
    reason = can_run("triton", Request(torch.device("cuda", 0), torch.bfloat16, 64))
    if reason is not None:
        sys.exit(reason)
    report = Report(args.json, machine())
    run_parts(report, chosen, args.budget, time.perf_counter)
    print(f"\n{table(report)}\n\nwritten: {args.json}")
    if failures(report):
        sys.exit("failed or wrong in this run:\n  " + "\n  ".join(failures(report)))


if __name__ == "__main__":
    main()
