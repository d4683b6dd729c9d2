"""The custom operators in torch's machinery: opcheck, compile, export, vmap, checkpoints, determinism, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import farfield as ff
from farfield.geometry import geometry
from farfield.ops.multipole.engines import Request, can_run
from farfield.ops.multipole.op import multipole, multipole_backward
from farfield.ops.multipole.settings import Result, Settings, Tensors
from farfield.ops.multipole.summary import pack, unpack
from farfield.ops.multipole.torch import backward, forward
from support.multipole_cases import KINDS, Case, make_summary, tensors


def fresh(
    *heads: int, number: int = 40, width: int = 4, batch: int = 1, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    return [torch.randn(batch, h, number, width, dtype=dtype).requires_grad_() for h in heads]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ["causal", "image", "pooled", "packed", "far", "near", "ordered"])
@pytest.mark.parametrize("engine", ["torch", "compiled"])
def test_opcheck(kind: str, options: str, engine: str) -> None:
    """Schema, fakes and aliasing, forward and backward, with every kind of argument (dropout: where there is any)."""
    reason = can_run(engine, Request(torch.device("cpu"), torch.float32, 4, kind))
    if reason is not None:
        pytest.skip(reason)
    grid = {"image": (5, 8), "ordered": (64,)}.get(options, (40,))
    number = 64 if options == "ordered" else 40
    g = geometry(grid, 4, 2)
    if kind == "given" and options == "packed":
        pytest.skip("packed sequences build their own pyramids")
    q, k, v = (x.detach() for x in fresh(2, 1, 1, number=number))
    kind, weights = pack(make_summary(kind, g, 1, 1, 4))
    weights = [w.detach().float() for w in weights]
    bias = torch.randn(4, 2)
    mask = torch.rand(1, number) > 0.3 if options in ("image", "pooled") else None
    bounds = torch.tensor([0, 11, number]) if options == "packed" else None
    seed = torch.tensor([5]) if options == "causal" and engine == "torch" else None
    part = options if options in ("far", "near") else "both"
    tensors_ = (q, k, v, mask, bounds, bias, seed, weights)
    settings = (
        kind, list(grid), [4] * len(grid), [2] * len(grid), -1, options == "causal", True,
        [2] if options == "pooled" else [], 1 if options == "causal" else 0, 0.5, 0.0 if seed is None else 0.2,
        part, engine,
    )  # fmt: skip
    torch.library.opcheck(multipole, (*tensors_, *settings))
    out, lse = multipole(*tensors_, *settings)
    torch.library.opcheck(
        multipole_backward, (torch.randn_like(out), torch.randn_like(lse), out, lse, *tensors_, *settings)
    )


# torch.compile --------------------------------------------------------------------------------------------------------

# torch.compile itself instantiates autograd functions to trace them, and warns that this is deprecated.
traced = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

LENGTHS = (40, 57, 200, 64, 1000, 13, 3)


def compiled(f: Callable[..., Any]) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(f, fullgraph=True, dynamic=True, backend=counter), counter


def graphs(counter: CompileCounterWithBackend) -> int:
    """Compiled graphs that hold anything."""
    return sum(any(node.op.startswith("call") for node in graph.graph.nodes) for graph in counter.graphs)


@traced
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "return_lse": True},
        {"causal": True, "sinks": 2, "part": "far"},
        {"query_rank": 2},
    ],
)
def test_one_graph_for_all_lengths(options: dict[str, Any]) -> None:
    """Whatever the number of levels; forward and backward equal the eager call."""

    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
        return ff.multipole_attention(q, k, v, block=4, rank=2, level_bias=bias, **options)

    g, counter = compiled(f)
    bias = torch.randn(12, 4, requires_grad=True)
    for number in LENGTHS:
        inputs = [*fresh(4, 2, 2, number=number), bias]
        results = []
        for run in (g, f):
            out = run(*inputs)
            out, lse = out if isinstance(out, tuple) else (out, out.sum(-1))
            results.append((out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), inputs)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert graphs(counter) == 1


@traced
def test_one_graph_for_masks_and_weights() -> None:
    weights = torch.randn(1, 2, 4, requires_grad=True)

    def f(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, w: Tensor) -> Any:
        return ff.multipole_attention(q, k, v, block=4, rank=2, key_mask=mask, summary=ff.SharedSummary(w, w, w, w))

    g, counter = compiled(f)
    for number in LENGTHS:
        inputs = fresh(4, 2, 2, number=number, batch=2)
        mask = torch.rand(2, number) > 0.4
        results = []
        for run in (g, f):
            out = run(*inputs, mask, weights)
            results.append((out, *torch.autograd.grad(out.square().sum(), [*inputs, weights])))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert graphs(counter) == 1


@traced
def test_one_graph_for_packed_sequences_and_images() -> None:
    def packed(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Any:
        return ff.multipole_attention(q, k, v, block=4, rank=2, causal=True, cu_seqlens=bounds)

    g, counter = compiled(packed)
    for bounds in ([0, 7, 40], [0, 40, 57, 200], [0, 2, 30, 100, 1000]):
        inputs = fresh(4, 2, 2, number=bounds[-1])
        assert torch.equal(g(*inputs, torch.tensor(bounds)), packed(*inputs, torch.tensor(bounds)))
    assert graphs(counter) == 1

    def image(q: Tensor, k: Tensor, v: Tensor, rows: int) -> Any:
        return ff.multipole_attention(q, k, v, grid=(rows, q.shape[2] // rows), block=2, rank=1)

    g, counter = compiled(image)
    for height, width in ((8, 12), (30, 17), (16, 64)):
        inputs = fresh(2, 2, 2, number=height * width)
        assert torch.equal(g(*inputs, height), image(*inputs, height))
    assert graphs(counter) == 1


@traced
def test_compiled_calls_check_too() -> None:
    """What cannot be checked while lengths are symbols is checked when the operator runs."""

    def f(q: Tensor, bias: Tensor, levels: int | None = None) -> Any:
        return ff.multipole_attention(q, q, q, block=4, rank=2, level_bias=bias, levels=levels)

    g, _ = compiled(f)
    (q,) = fresh(2)
    with pytest.raises(ValueError, match="level_bias has 1 rows; this length has 3 levels"):
        g(q, torch.zeros(1, 2))
    for levels in (7, -1):
        g, _ = compiled(lambda q, levels=levels: f(q, torch.zeros(9, 2), levels))
        with pytest.raises(Exception, match="levels="):
            g(q)


@traced
def test_compiled_under_autocast() -> None:
    def f(q: Tensor, w: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ff.multipole_attention(q, q, q, block=4, rank=2, summary=ff.PooledSummary(w), return_lse=True)

    g, _ = compiled(f)
    (q,), w = fresh(2), torch.randn(1, 4)
    for a, b in zip(g(q, w), f(q, w), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@traced
def test_compiled_dropout_follows_the_seed() -> None:
    def f(q: Tensor) -> Any:
        return ff.multipole_attention(q, q, q, block=4, rank=2, dropout=0.5)

    g, _ = compiled(f)
    (q,) = fresh(2)
    torch.manual_seed(1)
    a, b = g(q), g(q)
    torch.manual_seed(1)
    assert torch.equal(a, g(q)) and not torch.equal(a, b)


# export, functional transforms, checkpoints ---------------------------------------------------------------------------


class Causal(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1, 2, 4), 0.5))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        w = self.weight
        return ff.multipole_attention(
            q, k, v, block=4, rank=2, causal=True, return_lse=True, summary=ff.SharedSummary(w, w, w, w)
        )


@traced
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_length(strict: bool) -> None:
    module = Causal()
    number = torch.export.Dim("number", min=2, max=100_000)
    example = tuple(x.detach() for x in fresh(4, 2, 2))
    program = torch.export.export(module, example, dynamic_shapes=({2: number},) * 3, strict=strict)
    nodes = [
        node for module in program.graph_module.modules() for node in getattr(module, "graph", torch.fx.Graph()).nodes
    ]
    assert [str(node.target) for node in nodes].count("farfield.multipole.default") == 1
    for length in (5, 40, 77, 500):
        inputs = [x.detach() for x in fresh(4, 2, 2, number=length)]
        for a, b in zip(program.module()(*inputs), module(*inputs), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["mean", "shared", "pooled", "learned"])
def test_vmap_equals_a_loop(kind: str) -> None:
    g = geometry((50,), 4, 2)
    kind, weights = pack(make_summary(kind, g, 1, 2, 4))
    q, k, v = (torch.randn(3, 2, h, 50, 4, dtype=torch.float64) for h in (4, 2, 2))
    mask = torch.rand(3, 2, 50) > 0.3
    bias = torch.randn(3, g.levels, 4, dtype=torch.float64)
    stacked = [torch.stack([w.detach() + i for i in range(3)]) for w in weights]

    def f(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor, *w: Tensor) -> Tensor:
        out, lse = ff.multipole_attention(
            q, k, v, block=4, rank=2, key_mask=mask, level_bias=bias, summary=unpack(kind, w), return_lse=True
        )
        return out * lse.clamp(min=-1e9)[..., None]

    everything = (q, k, v, mask, bias, *stacked)
    loop = torch.stack([f(*(x[i] for x in everything)) for i in range(3)])
    torch.testing.assert_close(torch.func.vmap(f)(*everything), loop)
    argnums = (0, 1, 2, *range(4, len(everything)))
    gradient = torch.func.grad(lambda *x: f(*x).sum(), argnums=argnums)
    got = torch.func.vmap(gradient)(*everything)
    each = [gradient(*(x[i] for x in everything)) for i in range(3)]
    for a, *b in zip(got, *each, strict=True):
        torch.testing.assert_close(a, torch.stack(b))
    only_queries = torch.func.vmap(f, in_dims=(0, *(None,) * (len(everything) - 1)))(q, *(x[0] for x in everything[1:]))
    torch.testing.assert_close(only_queries[2], f(q[2], *(x[0] for x in everything[1:])))
    last = torch.func.vmap(lambda q: f(q, *(x[0] for x in everything[1:])), in_dims=4, out_dims=4)(q.movedim(0, 4))
    torch.testing.assert_close(last.movedim(4, 0), only_queries)


def test_vmap_inside_vmap() -> None:
    q = torch.randn(2, 3, 1, 2, 30, 4, dtype=torch.float64)

    def f(q: Tensor) -> Any:
        return ff.multipole_attention(q, q, q, block=4, rank=2)

    loop = torch.stack([torch.stack([f(y) for y in x]) for x in q])
    torch.testing.assert_close(torch.func.vmap(torch.func.vmap(f))(q), loop)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    """The recomputed forward pass drops the same weights."""
    q, k, v = fresh(4, 2, 2, number=70)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ff.multipole_attention(q * 2, k, v, block=4, rank=2, causal=True, dropout=0.2)

    results = []
    for run in (f, lambda *x: torch.utils.checkpoint.checkpoint(f, *x, use_reentrant=reentrant)):
        torch.manual_seed(4)
        out = run(q, k, v)
        results.append(
            (out, *torch.autograd.grad(out.square().sum(), (q, k, v))) if not reentrant else _backward(out, q, k, v)
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _backward(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    for x in inputs:
        x.grad = None
    out.square().sum().backward()
    return (out, *(x.grad for x in inputs if x.grad is not None))


def test_deterministic_mode(poisoned: None) -> None:
    """Allowed, and twice the same to the last bit."""
    g = geometry((9, 20), 2, 1)
    for options in ({}, {"query_rank": 1}, {"sinks": 2, "dropout": 0.1}):
        case = Case(g, *tensors(2, 4, 2, 180, 4), make_summary("shared", g, 2, 2, 4), None, dict(options))
        runs = []
        for _ in range(2):
            torch.manual_seed(1)
            runs.append(case.gradients())
        assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
        assert all(torch.equal(a, b) for a, b in zip(runs[0][2], runs[1][2], strict=True))


def test_inference_mode_first_then_training() -> None:
    """Tables made in inference mode serve training later (they are cached)."""
    options: dict[str, Any] = {"block": 4, "rank": 2}
    with torch.inference_mode():
        x = torch.randn(1, 2, 83, 4)
        mask = torch.rand(1, 83) > 0.5
        ff.multipole_attention(x, x, x, causal=True, sinks=3, **options)
        ff.summarise(x, x, sinks=3, **options)
    q, k, v = fresh(2, 2, 2, number=83)
    ff.multipole_attention(q, k, v, causal=True, sinks=3, **options).sum().backward()  # type: ignore[union-attr]
    ready = ff.summarise(k, v, sinks=3, key_mask=mask.clone(), **options)
    sum(level.sum() for level in ready.keys).backward()


# Memory ---------------------------------------------------------------------------------------------------------------


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes that torch held at once during ``run`` beyond those at its start, by the profiler's allocation log."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    del kept
    held = most = 0
    records = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for record in sorted(records, key=lambda e: e.start_ns()):
        held += record.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize(
    ("options", "limit"), [({"causal": True}, 12), ({"causal": False}, 12), ({"query_rank": 8}, 14)]
)
def test_memory_is_linear(options: dict[str, Any], limit: float) -> None:
    """Forward and backward: doubling the length at most doubles the peak, which is a few times the size of q."""
    s = Settings(
        kind="mean", grid=(), block=(64,), rank=(8,), levels=None, causal=bool(options.get("causal")), count_bias=True,
        query_rank=(options["query_rank"],) if "query_rank" in options else None, sinks=0, scale=0.125, dropout=0.0,
        part="both",
    )  # fmt: skip
    peaks = []
    for number in (8192, 16384):
        size = Settings(**{**s.__dict__, "grid": (number,)})
        q, k, v, grad = (torch.randn(1, 4, number, 64) for _ in range(4))

        def run(size: Settings = size, q: Tensor = q, k: Tensor = k, v: Tensor = v, grad: Tensor = grad) -> Any:
            call = Tensors(q, k, v, None, None, None, None, [])
            out, lse = forward(size, call)
            return backward(size, call, Result(grad, torch.zeros_like(lse), out, lse))

        peaks.append((peak_bytes(run), q.nbytes))
    chunk = 40 << 20  # buffers of one chunk, which do not grow
    assert peaks[1][0] <= 2.1 * peaks[0][0]
    assert peaks[1][0] - peaks[0][0] <= limit * (peaks[1][1] - peaks[0][1])
    assert peaks[1][0] <= limit * peaks[1][1] + chunk


def test_what_is_kept_for_the_backward_pass() -> None:
    """Inputs, output and lse: nothing that grows faster than they do."""
    kept: list[int] = []

    def pack_hook(x: Tensor) -> Tensor:
        kept.append(x.nbytes)
        return x

    for number in (500, 1000):
        q, k, v = fresh(4, 4, 4, number=number, width=16)
        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda x: x):
            kept.clear()
            ff.multipole_attention(q, k, v, block=16, rank=4, causal=True)
        assert sum(kept) == 4 * q.nbytes + q.nbytes // 16


def test_gradients_through_vmap() -> None:
    """Under vmap no tensor says that it needs a gradient, and yet it gets one."""
    q, k, v = (torch.randn(3, 2, 17, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = ff.multipole_attention(q, k, v, causal=True, block=2, rank=1)
        assert isinstance(out, Tensor)
        return out.square().sum()

    def total(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.func.vmap(loss)(*(x[:, None] for x in (q, k, v))).sum()

    want = torch.autograd.grad(loss(q, k, v), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad(total(q, k, v), (q, k, v)), want)
    torch.testing.assert_close(torch.func.grad(total, (0, 1, 2))(q.detach(), k.detach(), v.detach()), want)


@traced
def test_compiled_inference_is_one_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(
        lambda q: ff.multipole_attention(q, q, q, causal=True, block=4, rank=2),
        backend=counter,
        fullgraph=True,
        dynamic=True,
    )
    for number in (19, 50, 131):
        q = torch.randn(1, 2, number, 8)
        torch.testing.assert_close(run(q), ff.multipole_attention(q, q, q, causal=True, block=4, rank=2))
        with torch.no_grad():
            run(q.requires_grad_())
    assert counter.frame_count <= 3  # plain inputs, no_grad, and torch's own first guess of a fixed length


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # of torch.func.jvp itself
@pytest.mark.parametrize("graded", [False, True])
def test_forward_mode_is_refused_and_not_zero(graded: bool) -> None:
    x = torch.randn(1, 1, 40, 4)
    with torch.set_grad_enabled(graded), pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        torch.func.jvp(lambda q: ff.multipole_attention(q, x, x, block=4, rank=2), (x,), (torch.ones_like(x),))
