"""Calls that the Triton engine must answer as the reference does: run in the interpreter and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from farfield.bench import budget
from farfield.geometry import geometry
from farfield.ops.multipole.summary import pack, unpack
from support.multipole_cases import Case, make_summary, tensors


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


def gradients(case: Case, impl: str) -> list[Tensor]:
    """Output, lse and every gradient by an engine, or by ``"plain"`` torch in the case's own precision."""
    tensors = {"query": case.query, "key": case.key, "value": case.value}
    if impl == "plain":
        return budget.gradients(lambda: budget.plain_attention(**tensors, **case.keywords()), case.leaves)
    return budget.gradients(lambda: case.run(impl=impl), case.leaves)


def assert_within_budget(case: Case, impl: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """The error of an engine in ``dtype`` against float64, beside that of plain torch in the same precision."""
    low = to(case, dtype, device)
    truth = gradients(to(low, torch.float64, device), "reference")
    got, plain = (gradients(low, name) for name in (impl, "plain"))
    assert [(x.dtype, x.shape) for x in got] == [(x.dtype, x.shape) for x in plain]
    verdict = budget.judge(got, plain, truth)
    assert verdict.right, verdict


SHAPES = {
    "line": Shape((70,), 16, 4, options={"causal": True}),
    "line, both ways, odd block": Shape((61,), 12, 3, width=20, options={"count_bias": False, "scale": 0.4}),
    "grouped heads in one tile": Shape((45,), 8, 4, "shared", heads=(4, 2), options={"causal": True}),
    "level bias": Shape((45,), 8, 4, heads=(2, 1), bias=True, options={"causal": True}),
    "level bias, both ways": Shape((37,), 8, 2, "shared", heads=(2, 2), bias=True, own=False),
    "image": Shape((18, 3), (4, 4), (2, 2)),
    "image, odd": Shape((13, 6), (3, 4), (1, 2), "shared", masked=0.3),
    "volume": Shape((5, 2, 3), (2, 2, 2), (1, 1, 2), "shared"),
    "deep volume": Shape((10, 3, 3), (2, 2, 2), (1, 1, 2), "shared"),
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
