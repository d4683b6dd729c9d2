from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch
from torch import Tensor, nn

from farfield.bench.cost import Cost, CostPoint, measure


class Sleeper(nn.Module):
    """A layer that takes a known time per token, squared or not."""

    def __init__(self, per_token: float, power: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.per_token, self.power = per_token, power
        self.lengths: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.lengths.append(x.shape[1])
        time.sleep(self.per_token * x.shape[1] ** self.power)
        out: Tensor = self.linear(x)
        return out


def test_measures_every_length_of_every_attention() -> None:
    seen: list[CostPoint] = []
    cost = measure(
        {"a": lambda: nn.Linear(4, 4), "b": lambda: nn.Linear(4, 4)},
        dim=4, heads=1, first=8, longest=32, on_point=seen.append,
    )  # fmt: skip
    assert [(p.attention, p.length) for p in cost.points] == [(n, k) for k in (8, 16, 32) for n in "ab"]
    assert seen == cost.points
    assert all(p.both > 0 and p.forward > 0 and p.repeats == 3 for p in cost.points)
    assert all("32" in reason for reason in cost.stopped.values())


def test_lengths_grow_by_the_factor() -> None:
    cost = measure({"a": lambda: nn.Linear(4, 4)}, dim=4, heads=1, first=8, longest=128, factor=4)
    assert [p.length for p in cost.points] == [8, 32, 128]


def test_an_attention_that_gets_slow_leaves_and_the_other_goes_on() -> None:
    cost = measure(
        {"slow": lambda: Sleeper(1e-3), "fast": lambda: nn.Linear(4, 4)},
        dim=4, heads=1, first=8, longest=64, call_limit=0.02, repeats=1,
    )  # fmt: skip
    assert [p.length for p in cost.of("fast")] == [8, 16, 32, 64]
    assert max(p.length for p in cost.of("slow")) <= 32
    assert "0.02 s" in cost.stopped["slow"]


def test_nothing_is_begun_that_is_predicted_to_overrun_the_budget() -> None:
    layer = Sleeper(2e-3)
    cost = measure({"a": lambda: layer}, dim=4, heads=1, first=8, budget=0.5, repeats=3)
    # What it slept, not the clock: a busy machine takes longer, and then fewer lengths are predicted to fit.
    assert 0.0 < 2e-3 * sum(layer.lengths) < 0.5
    assert "0.5 s" in cost.stopped["a"]


def test_projected_memory_stops_an_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([100, 400, 1600])

    class Peak:
        def __init__(self, device: object) -> None:
            self.raised = 0

        def __enter__(self) -> Peak:
            return self

        def __exit__(self, *_: object) -> None:
            self.raised = next(sizes)

    monkeypatch.setattr("farfield.bench.cost.PeakMemory", Peak)
    cost = measure({"a": lambda: nn.Linear(4, 4)}, dim=4, heads=1, first=8, memory_limit=2000)
    assert [p.memory for p in cost.points] == [100, 400, 1600]
    assert "memory" in cost.stopped["a"]


def test_running_out_of_memory_ends_one_attention_only() -> None:
    class Full(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] > 8:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return super().forward(x)

    cost = measure({"full": lambda: Full(4, 4), "fine": lambda: nn.Linear(4, 4)}, dim=4, heads=1, first=8, longest=32)
    assert [p.length for p in cost.of("full")] == [8]
    assert cost.stopped["full"] == "16 ran out of memory"
    assert [p.length for p in cost.of("fine")] == [8, 16, 32]


def test_other_errors_are_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        measure({"a": lambda: nn.Linear(5, 5)}, dim=4, heads=1, first=8, longest=8)


def test_stopping_keeps_what_is_measured() -> None:
    points: list[CostPoint] = []
    cost = measure(
        {"a": lambda: nn.Linear(4, 4)}, dim=4, heads=1, first=8,
        on_point=points.append, should_stop=lambda: len(points) >= 2,
    )  # fmt: skip
    assert cost.interrupted
    assert len(cost.points) == 2


def test_survives_json() -> None:
    cost = Cost(4, 1, [CostPoint("a", 8, 0.1, 0.2, None, 3)], {"a": "why"}, 1.0)
    assert Cost.from_json(json.loads(json.dumps(dataclasses.asdict(cost)))) == cost


def test_gradients_are_those_of_one_call() -> None:
    layer = nn.Linear(4, 4)
    measure({"a": lambda: layer}, dim=4, heads=1, first=8, longest=8)
    once = layer.weight.grad
    assert once is not None
    again = nn.Linear(4, 4)
    again.load_state_dict(layer.state_dict())
    measure({"a": lambda: again}, dim=4, heads=1, first=8, longest=8, repeats=1)
    assert again.weight.grad is not None
    torch.testing.assert_close(once, again.weight.grad)
