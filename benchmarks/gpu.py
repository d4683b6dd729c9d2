"""Everything about the Triton engine that only a CUDA device can tell, in one run: is it right, how fast, how large.

    python benchmarks/gpu.py --json runs/gpu.json
    python benchmarks/gpu.py --parts correctness,rate --json runs/gpu.json      # parts can be run one by one

Parts: matrix (the bf16 rate of a large product: the ceiling), correctness (against the float64 reference), rate (share
of the ceiling, useful products only), dense (beside every backend of scaled_dot_product_attention), million (1,048,576
tokens), image (beside NATTEN, if installed). What fails is written down with its error, and the rest goes on. The file
is rewritten after every part and keeps the parts of earlier runs. At the end a table sets each target beside its
figure.

Times are medians over rounds in which all candidates take turns; a sample repeats a call until it lasts some
milliseconds, so that launches overlap with computing as they do in a model.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import farfield as ff
from farfield.geometry import geometry
from farfield.ops.multipole.engines import Request, can_run

Run = Callable[[], object]
PARTS = ("matrix", "correctness", "rate", "dense", "million", "image")
HEADS = 8
ROUNDS = 7
SAMPLE_MS = 8.0


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


def interleaved(runs: dict[str, Run], rounds: int = ROUNDS) -> dict[str, dict[str, Any]]:
    """Median milliseconds of every candidate (or its error); all take turns in every round."""
    out: dict[str, dict[str, Any]] = {}
    repeats: dict[str, int] = {}
    for name, run in runs.items():
        try:
            for _ in range(3):
                run()
            torch.cuda.synchronize()
            repeats[name] = max(1, min(200, round(SAMPLE_MS / max(1e-3, once(run)))))
            out[name] = {"ms": None, "samples": []}
        except Exception as error:
            out[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            torch.cuda.empty_cache()
    for _ in range(rounds):
        for name, repeat in repeats.items():
            out[name]["samples"].append(once(runs[name], repeat))
    for name in repeats:
        out[name]["ms"] = statistics.median(out[name]["samples"])
    return out


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


def pairs(grid: tuple[int, ...], block: int, rank: int, causal: bool) -> int:
    """Query-key products that the result needs; for grids of whole blocks."""
    g = geometry(grid, block, rank)
    size = g.block_tokens
    near = int((g.near_list(causal) >= 0).sum()) * size * size
    if causal:
        near -= g.blocks * size * (size - 1) // 2
    far = 0
    for level in range(1, g.levels + 1):
        listed = (g.far_list(level, causal) >= 0).sum(1)
        tokens = torch.bincount(torch.from_numpy(g.group_of_block(level)), minlength=len(listed)).numpy() * size
        far += int((listed * tokens).sum()) * g.cells_per_group
    return near + far


# Parts ----------------------------------------------------------------------------------------------------------------


class Report:
    """The JSON file, written after every step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.data.setdefault("parts", {})
        self.data["machine"] = {
            "gpu": torch.cuda.get_device_name(),
            "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        }
        try:
            import triton

            self.data["machine"]["triton"] = triton.__version__
        except ImportError:
            pass

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")

    def part(self, name: str) -> list[dict[str, Any]]:
        self.data["parts"][name] = rows = []
        return rows

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [r for r in self.data["parts"].get(name, []) if "error" not in r]


@contextmanager
def row(rows: list[dict[str, Any]], report: Report, **what: Any) -> Iterator[dict[str, Any]]:
    """One entry of a part; an exception becomes its ``error``, and the next entry follows."""
    entry: dict[str, Any] = dict(what)
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
    print({k: v for k, v in entry.items() if k not in ("trace", "timing")}, flush=True)


def part_matrix(report: Report) -> None:
    rows = report.part("matrix")
    with row(rows, report, size=8192) as entry:
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        timing = interleaved({"matrix": lambda: a @ b}, rounds=15)["matrix"]
        entry |= {"ms": timing["ms"], "tflops": 2 * 8192**3 / timing["ms"] / 1e9}


CALLS: dict[str, dict[str, Any]] = {
    "line": {"grid": (1500,), "block": 128, "rank": 16, "causal": True},
    "line, both ways": {"grid": (1000,), "block": 64, "rank": 8},
    "grouped heads, sinks": {"grid": (1000,), "block": 32, "rank": 4, "causal": True, "sinks": 4, "key_heads": 2},
    "bias, mask": {"grid": (1000,), "block": 48, "rank": 6, "bias": True, "mask": True},
    "packed": {"grid": (1024,), "block": 32, "rank": 4, "causal": True, "cu_seqlens": [0, 100, 613, 1024]},
    "image": {"grid": (70, 45), "block": 16, "rank": 4},
    "volume": {"grid": (9, 14, 12), "block": 4, "rank": 2},
}


def gradients(call: dict[str, Any], tensors: list[Tensor], bias: Tensor | None, impl: str) -> list[Tensor]:
    """Output, lse and the gradients of query, key, value and level bias."""
    q, k, v, grad, grad_lse = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    if bias is not None:
        bias = bias.detach().to(q.dtype).requires_grad_()
    out, lse = ff.multipole_attention(*leaves, impl=impl, level_bias=bias, return_lse=True, **call)
    leaves += [] if bias is None else [bias]
    seen = lse > -torch.inf
    loss = (out * grad).sum() + (torch.where(seen, lse, 0.0) * grad_lse.to(lse.dtype)).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def error_of(got: Tensor, wanted: Tensor) -> float:
    difference = torch.where(got == wanted, 0.0, got.double() - wanted.double())
    size = torch.where(torch.isfinite(wanted), wanted, 0.0).double().square().mean().sqrt().item()
    return difference.square().mean().sqrt().item() / max(size, 1e-3)


def part_correctness(report: Report) -> None:
    """Relative errors against float64, beside those of the dense reference in the same precision."""
    from farfield.ops.multipole.triton import tuning

    rows = report.part("correctness")
    widths = {torch.bfloat16: 64, torch.float16: 80, torch.float32: 64}
    for dtype, width in widths.items():
        for name, settings in CALLS.items():
            with row(rows, report, call=name, dtype=str(dtype), head_dim=width) as entry, tuning.fixed():
                torch.manual_seed(0)
                call = dict(settings)
                key_heads = call.pop("key_heads", 4)
                g = geometry(call["grid"], call["block"], call["rank"])
                n = g.tokens
                bias = torch.randn(g.levels, 4, device="cuda") if call.pop("bias", False) else None
                if call.pop("mask", False):
                    call["key_mask"] = torch.rand(2, n, device="cuda") > 0.3
                if "cu_seqlens" in call:
                    call["cu_seqlens"] = torch.tensor(call["cu_seqlens"], device="cuda")
                shapes = [(2, h, n, width) for h in (4, key_heads, key_heads, 4)]
                tensors = [torch.randn(*s, device="cuda").to(dtype) for s in (*shapes, (2, 4, n))]
                truth = gradients(call, [x.double() for x in tensors], bias, "reference")
                got = gradients(call, tensors, bias, "triton")
                plain = gradients(call, tensors, bias, "reference")
                entry["errors"] = [error_of(a, b) for a, b in zip(got, truth, strict=True)]
                entry["plain"] = [error_of(a, b) for a, b in zip(plain, truth, strict=True)]
                limits = [2, 2, 3, 3, 3, 3]
                floor = 5e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
                entry["right"] = all(
                    e <= max(limit * p, floor)
                    for e, p, limit in zip(entry["errors"], entry["plain"], limits, strict=False)
                )


def part_rate(report: Report) -> None:
    """Share of the matrix rate: products that the result needs, 2 forward and 5 backward, nothing else counted."""
    rows = report.part("rate")
    ceiling = next((r["tflops"] for r in report.rows("matrix")), None)
    for width in (64, 128):
        for causal in (True, False):
            for number in (2048, 4096, 8192, 16384, 32768, 65536, 131072):
                batch = max(1, 131072 // number)
                with row(rows, report, n=number, batch=batch, head_dim=width, causal=causal) as entry:
                    attention = multipole(block=128, rank=16, causal=causal)
                    work = 4e-9 * width * pairs((number,), 128, 16, causal) * batch * HEADS
                    runs = both(attention, inputs(batch, HEADS, number, width))
                    timing = interleaved(runs, rounds=5)
                    for name, factor in (("forward", 1.0), ("both", 3.5)):
                        entry[name] = timing[name].get("ms") or timing[name]
                        if timing[name].get("ms"):
                            entry[f"{name}_tflops"] = factor * work / timing[name]["ms"]
                            if ceiling:
                                entry[f"{name}_share"] = entry[f"{name}_tflops"] / ceiling


def part_dense(report: Report) -> None:
    """Beside every backend of scaled_dot_product_attention: one long sequence, and 65,536 tokens in all."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows = report.part("dense")
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }

    def dense(backend: SDPBackend) -> Callable[..., Tensor]:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return attention

    for series in ("tokens", "single"):
        for number in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536):
            batch = 65536 // number if series == "tokens" else 1
            with row(rows, report, series=series, n=number, batch=batch) as entry:
                tensors = inputs(batch, HEADS, number, 64)
                ours = both(multipole(block=128, rank=16, causal=True), tensors)
                peers = {name: both(dense(b), tensors) for name, b in backends.items()}
                for what in ("forward", "both"):
                    timing = interleaved({"multipole": ours[what], **{n: p[what] for n, p in peers.items()}})
                    entry[what] = {n: t.get("ms") or t.get("error") for n, t in timing.items()}
                    known = {n: t["ms"] for n, t in timing.items() if t.get("ms")}
                    best = min((t for n, t in known.items() if n != "multipole"), default=None)
                    if best is not None and "multipole" in known:
                        entry[f"{what}_ratio"] = best / known["multipole"]
                if series == "single":
                    try:
                        entry["forward"]["multipole, graph"] = once(graphed(ours["forward"]), 20)
                    except Exception as error:
                        entry["forward"]["multipole, graph"] = f"{type(error).__name__}: {str(error)[:200]}"


def part_million(report: Report) -> None:
    rows = report.part("million")
    with row(rows, report, n=1 << 20, batch=1, heads=HEADS, head_dim=64) as entry:
        torch.cuda.empty_cache()
        tensors = inputs(1, HEADS, 1 << 20, 64)
        size = tensors[0].numel() * tensors[0].element_size()
        runs = both(multipole(block=128, rank=16, causal=True), tensors)
        for what, run in runs.items():
            run()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            rise = torch.cuda.max_memory_allocated() - before
            entry[what] = {"rise_gib": rise / 2**30, "rise_in_q": rise / size}
            entry[what]["ms"] = statistics.median(once(run) for _ in range(5))
        entry["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30


def part_image(report: Report) -> None:
    """256 x 256 with leaf blocks of 16 x 16, beside a neighbourhood of the same size: 47 x 47."""
    rows = report.part("image")
    for width in (64, 128):
        with row(rows, report, grid=[256, 256], block=16, rank=4, head_dim=width) as entry:
            tensors = inputs(1, HEADS, 65536, width)
            runs = {f"multipole {w}": r for w, r in both(multipole(grid=(256, 256), block=16, rank=4), tensors).items()}
            try:
                import natten

                entry["natten_version"] = natten.__version__
                other = [x.detach().transpose(1, 2).unflatten(1, (256, 256)).contiguous() for x in tensors]
                other = [*(x.requires_grad_() for x in other[:3]), other[3]]
                na = both(lambda q, k, v: natten.na2d(q, k, v, kernel_size=47), other)
                runs |= {f"natten {w}": r for w, r in na.items()}
            except Exception as error:
                entry["natten"] = f"{type(error).__name__}: {str(error)[:200]}"
            entry |= {n: t.get("ms") or t.get("error") for n, t in interleaved(runs).items()}
            work = 4e-9 * width * pairs((256, 256), 16, 4, False) * HEADS
            if isinstance(entry.get("multipole forward"), float):
                entry["forward_tflops"] = work / entry["multipole forward"]


# Targets --------------------------------------------------------------------------------------------------------------


def least(rows: list[dict[str, Any]], what: str) -> float | None:
    values = [r[what] for r in rows if isinstance(r.get(what), float)]
    return min(values, default=None)


def targets(report: Report) -> list[dict[str, Any]]:
    """Each target, its figure, and whether it is met (None: not measured)."""
    out: list[dict[str, Any]] = []

    def add(name: str, figure: float | None, target: float, at_most: bool = False) -> None:
        met = None if figure is None else (figure <= target if at_most else figure >= target)
        out.append({"target": name, "wanted": target, "figure": figure, "met": met})

    checks = report.data["parts"].get("correctness", [])
    right = sum(bool(r.get("right")) for r in checks)
    add(f"correct calls of {len(checks)}", float(right) if checks else None, float(max(1, len(checks))))
    for width in (64, 128):
        for causal in (True, False):
            some = [r for r in report.rows("rate") if (r["head_dim"], r["causal"]) == (width, causal)]
            some = [r for r in some if r["n"] >= 16384]
            kind = f"D {width}, {'causal' if causal else 'both ways'}, least over N >= 16,384"
            add(f"forward, share of the matrix rate, {kind}", least(some, "forward_share"), 0.45)
            add(f"forward + backward, share of the matrix rate, {kind}", least(some, "both_share"), 0.35)
    dense = report.rows("dense")
    long = [r for r in dense if r["n"] == 65536]
    add("N 65,536 causal: forward, times the best dense backend", least(long, "forward_ratio"), 20.0)
    add("N 65,536 causal: forward + backward, times the best dense backend", least(long, "both_ratio"), 15.0)
    for series in ("tokens", "single"):
        for what in ("forward", "both"):
            faster = [r["n"] for r in dense if r["series"] == series and r.get(f"{what}_ratio", 0.0) >= 1.0]
            measured = any(f"{what}_ratio" in r for r in dense if r["series"] == series)
            figure = float(min(faster, default=1 << 30)) if measured else None
            batch = "batch 1" if series == "single" else "65,536 tokens in all"
            add(f"break-even N, {what}, {batch}", figure, 2048.0, at_most=True)
    million = report.data["parts"].get("million", [])
    done = any("both" in r and "error" not in r for r in million)
    add("1,048,576 tokens forward + backward in one go", float(done) if million else None, 1.0)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which parts, in this order")
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
    report = Report(args.json)
    for name in chosen:
        print(f"== {name}", flush=True)
        try:
            globals()[f"part_{name}"](report)
        except Exception:
            report.data["parts"].setdefault(name, []).append({"error": traceback.format_exc()[-3000:]})
            traceback.print_exc()
        report.write()
    try:
        from farfield.ops.multipole.triton import tuning

        report.data["tiles"] = {str(tuple(map(str, k))): str(v) for k, v in tuning.chosen().items()}
        report.data["targets"] = targets(report)
    finally:
        report.write()
    print(f"\n{'target':88s} {'wanted':>8s} {'figure':>10s}  met")
    for t in report.data["targets"]:
        figure = "-" if t["figure"] is None else f"{t['figure']:.3g}"
        print(f"{t['target']:88s} {t['wanted']:8g} {figure:>10s}  {'-' if t['met'] is None else t['met']}")
    print(f"\nwritten: {args.json}")


if __name__ == "__main__":
    main()
