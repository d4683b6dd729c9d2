"""Calls that the Triton engine must answer as the reference does: run in the interpreter and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from farfield.geometry import geometry
from farfield.ops.multipole.summary import pack, unpack
from support.multipole_cases import Case, make_summary, tensors

Run = tuple[Tensor, Tensor, list[Tensor]]


@dataclass(frozen=True)
class Shape:
    """One call by its sizes; ``heads`` are those of the query and of the key."""

    grid: tuple[int, ...]
    block: tuple[int, ...] | int
    rank: tuple[int, ...] | int
    kind: str = "mean"
    heads: tuple[int, int] = (1, 1)
    width: int = 16
    batch: int = 1
    bias: bool = False
    own: bool = True
    levels: int | None = None
    masked: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def case(self) -> Case:
        """In float64."""
        g = geometry(self.grid, self.block, self.rank, self.levels)
        summary = make_summary(self.kind, g, self.batch, self.heads[1], self.width, self.own)
        bias = torch.randn(g.levels + 1, self.heads[0], dtype=torch.float64).requires_grad_() if self.bias else None
        options = dict(self.options)
        if self.masked:
            options["key_mask"] = torch.rand(self.batch, g.tokens) > self.masked
        if "cu_seqlens" in options:
            options |= {"cu_seqlens": torch.tensor(options["cu_seqlens"]), "levels": None}
        return Case(g, *tensors(self.batch, *self.heads, g.tokens, self.width), summary, bias, options)


def to(case: Case, dtype: torch.dtype, device: str = "cpu") -> Case:
    """The same call in another precision and place."""

    def move(x: Tensor) -> Tensor:
        return x.detach().to(device, dtype).requires_grad_()

    kind, weights = pack(case.summary)
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.options.items()}
    bias = None if case.level_bias is None else move(case.level_bias)
    summary = unpack(kind, [move(w) for w in weights])
    return Case(case.shape, move(case.query), move(case.key), move(case.value), summary, bias, options)


def gradients(case: Case, impl: str) -> Run:
    """Output, lse and the gradients of one random functional of both, the same in every precision."""
    out, lse = case.run(impl=impl)
    generator = torch.Generator().manual_seed(1)
    of_out, of_lse = (
        torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.device, x.dtype) for x in (out, lse)
    )
    loss = (out * of_out).sum() + (torch.where(lse > -torch.inf, lse, 0.0) * of_lse).sum()
    grads = torch.autograd.grad(loss, case.leaves, allow_unused=True)
    return out, lse, [torch.zeros_like(x) if g is None else g for g, x in zip(grads, case.leaves, strict=True)]


def error(got: Tensor, wanted: Tensor) -> float:
    """Root mean square of the error relative to that of the truth; infinite where one is no number."""
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    same = got == wanted  # two empty rows' lse
    difference = torch.where(same, 0.0, got - wanted)
    if not torch.isfinite(difference).all():
        return float("inf")
    size = torch.where(torch.isfinite(wanted), wanted, 0.0).square().mean().sqrt().item() if wanted.numel() else 0.0
    rms = difference.square().mean().sqrt().item() if wanted.numel() else 0.0
    return rms / max(size, 1e-3)


def assert_close(got: Run, wanted: Run, bounds: list[float]) -> None:
    """``bounds``: of output, lse, then every gradient."""
    pairs = zip((got[0], got[1], *got[2]), (wanted[0], wanted[1], *wanted[2]), bounds, strict=True)
    for place, (a, b, bound) in enumerate(pairs):
        assert error(a, b) <= bound, f"tensor {place}: error {error(a, b):.1e} above {bound:.1e}"


def budget(case: Case, dtype: torch.dtype, truth: Run) -> list[float]:
    """Twice the error of plain torch in the same precision, three times for gradients."""
    plain = gradients(to(case, dtype), "reference")
    floor = torch.finfo(dtype).eps
    out, lse = (max(2 * error(a, b), floor) for a, b in zip(plain[:2], truth[:2], strict=True))
    return [out, lse, *(max(3 * error(a, b), floor) for a, b in zip(plain[2], truth[2], strict=True))]


SHAPES = {
    "line": Shape((70,), 16, 4, options={"causal": True}),
    "line, both ways, odd block": Shape((61,), 12, 3, width=20, options={"count_bias": False, "scale": 0.4}),
    "grouped heads in one tile": Shape((45,), 8, 4, "shared", heads=(4, 2), options={"causal": True}),
    "level bias": Shape((45,), 8, 4, heads=(2, 1), bias=True, options={"causal": True}),
    "level bias, both ways": Shape((37,), 8, 2, "shared", heads=(2, 2), bias=True, own=False),
    "image": Shape((18, 3), (4, 4), (2, 2)),
    "image, odd": Shape((13, 6), (3, 4), (1, 2), "shared", masked=0.3),
    "volume": Shape((5, 2, 3), (2, 2, 2), (1, 1, 2), "shared"),
    "pooled": Shape((70,), 16, 4, "pooled", options={"causal": True}),
    "learned": Shape((70,), 16, 4, "learned", heads=(2, 1), options={"causal": True}),
    "given": Shape((70,), 16, 4, "given", options={"causal": True}),
    "pooled image with sinks": Shape((17, 3), (4, 4), (1, 2), "pooled", options={"sinks": 3}),
    "sinks": Shape((45,), 8, 4, "shared", options={"causal": True, "sinks": 11}),
    "more sinks than tokens": Shape((20,), 4, 2, options={"sinks": 200}),
    "packed": Shape((41,), 4, 2, options={"causal": True, "sinks": 2, "cu_seqlens": [0, 5, 5, 34, 41]}),
    "packed and shared": Shape((33,), 4, 2, "shared", options={"cu_seqlens": [0, 4, 24, 33]}),
    "mask": Shape((37,), 8, 4, "shared", batch=2, masked=0.5),
    "mask, causal": Shape((37,), 8, 4, "pooled", batch=2, masked=0.8, options={"causal": True}),
    "nothing to see": Shape((27,), 8, 4, masked=1.0),
    "far": Shape((45,), 8, 4, "shared", options={"part": "far"}),
    "near": Shape((45,), 8, 4, "shared", options={"part": "near"}),
    "far only, pooled": Shape((45,), 8, 4, "pooled", options={"part": "far"}),
    "fewer levels": Shape((30,), 4, 1, levels=1, options={"causal": True}),
    "several tiles to a block": Shape((200,), 80, 2, options={"causal": True}),
    "one block": Shape((5,), 8, 4, "shared"),
    "one token": Shape((1,), 8, 4, options={"causal": True}),
}
