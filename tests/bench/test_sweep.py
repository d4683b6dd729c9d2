from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from farfield.bench import peers
from farfield.bench.case import Case, Inputs
from farfield.bench.model import Work
from farfield.bench.subjects import Built, Refused, Subject, recipe
from farfield.bench.sweep import EXACT_LENGTH, Row, Settings, Watcher, plan, sweep

pytestmark = pytest.mark.usefixtures("quick_ceilings")
SMALL = {"heads": 2, "head_dim": 8}
CASES = (Case((32,), causal=True, **SMALL), Case((64,), causal=True, **SMALL))


def fake(label: str, run: object, **settings: object) -> Subject:
    def make(case: Case) -> Built:
        return Built(run)  # type: ignore[arg-type]

    return Subject(label, make, lambda case: Work(exact=case.tokens), **settings)  # type: ignore[arg-type]


def mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q + k) / 2 + v


class Listener(Watcher):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_case(self, case: Case, mode: str, number: int, total: int) -> None:
        self.heard.append(f"case {number}/{total} {case.tokens} {mode}")

    def on_subject(self, label: str) -> None:
        self.heard.append(label)

    def on_turn(self, turn: int, turns: int) -> None:
        self.heard.append(f"turn {turn}/{turns}")

    def on_rows(self, rows: Sequence[Row], reused: bool) -> None:
        self.heard.append(f"{len(rows)} rows{', reused' if reused else ''}")


def test_everything_in_every_case() -> None:
    listener = Listener()
    subjects = [recipe("fma", {"block": 4, "rank": 2}, "fma:block=4,rank=2"), peers.peer("sdpa", {}, "sdpa")]
    result = sweep(subjects, Settings(CASES, repeats=2), watcher=listener)
    assert [(r.label, r.case.tokens, r.mode) for r in result.rows] == [
        (s.label, n, mode) for n in (32, 64) for mode in ("forward", "backward") for s in subjects
    ]  # fmt: skip
    for row in result.rows:
        assert row.reason is None and row.seconds is not None and row.ceiling is not None and row.floor is not None
        assert 0 < row.low <= row.seconds <= row.high  # type: ignore[operator]
        assert row.share is not None and row.over_floor is not None and row.share > 0
        assert row.repeats >= 2
    exact = [row.error for row in result.rows if row.label == "sdpa"]
    assert all(error is not None and error < 1e-6 for error in exact)
    blurred = [row.error for row in result.rows if row.label != "sdpa"]
    assert all(error is not None and 1e-3 < error < 2 for error in blurred)
    assert result.rows[1].flops == 2 * 4 * 8 * (32 * 33 // 2)
    assert listener.heard[:6] == ["case 1/4 32 forward", "fma:block=4,rank=2", "sdpa", "turn 1/2", "turn 2/2", "2 rows"]
    assert all(Row.from_json(json.loads(json.dumps(dataclasses.asdict(row)))) == row for row in result.rows)


def test_backward_takes_gradients_of_inputs_and_parameters() -> None:
    weight = torch.ones(8, requires_grad=True)
    seen: list[bool] = []

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(q.requires_grad and v.requires_grad)
        out = mean(q, k, v) * weight
        if out.requires_grad:
            out.register_hook(lambda grad: seen.append(bool(grad.abs().sum() > 0)))
        return out

    subject = Subject("a", lambda case: Built(run, (weight,)), lambda case: None)
    (row,) = sweep([subject], Settings(CASES[:1], modes=("backward",), repeats=1)).rows
    assert row.seconds is not None and row.flops is None and row.share is None and row.floor is None
    assert all(seen) and len(seen) >= 6
    assert weight.grad is None


def test_a_layer_gets_x() -> None:
    shapes: list[tuple[int, ...]] = []

    def run(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return 2 * x

    built = Built(run, back=None, why_no_error="a layer")
    subject = Subject("a", lambda case: built, lambda case: None, level="layer")
    rows = sweep([subject], Settings(CASES[:1], repeats=1)).rows
    assert set(shapes) == {(1, 32, 16)}
    assert [(row.error, row.error_from, row.level) for row in rows] == [(None, "a layer", "layer")] * 2


def test_layouts_are_converted_before() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.shape == (1, 32, 2, 8)
        return torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
        ).transpose(1, 2)

    built = Built(run, into=lambda x: x.transpose(1, 2).contiguous(), back=lambda x: x.transpose(1, 2))
    subject = Subject("a", lambda case: built, lambda case: None)
    for row in sweep([subject], Settings(CASES[:1], repeats=1)).rows:
        assert row.error is not None and row.error < 1e-6


def test_what_cannot_run_gives_its_reason_and_the_others_go_on() -> None:
    def refuse(case: Case) -> Built:
        raise Refused("it is Tuesday")

    def fail(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise RuntimeError("kernel died\nat line 3")

    def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    subjects = [
        Subject("refused", refuse, lambda case: None),
        Subject("missing", refuse, lambda case: None, why_not="it is not installed"),
        fake("broken", fail, peer=True),
        fake("full", full),
        fake("fine", mean),
        recipe("agent", {}, "agent"),
    ]
    rows = sweep(subjects, Settings(CASES[:1], modes=("forward",), repeats=1)).rows
    assert {row.label: row.reason for row in rows} == {
        "refused": "it is Tuesday",
        "missing": "it is not installed",
        "broken": "RuntimeError: kernel died",
        "full": "ran out of memory",
        "fine": None,
        "agent": "recipe 'agent' cannot be causal: it reads later tokens",
    }


def test_errors_of_our_own_are_not_swallowed() -> None:
    def fail(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        sweep([fake("ours", fail)], Settings(CASES[:1], repeats=1))


def test_decoding_is_a_step_of_the_stream() -> None:
    names = ("fma", "window", "l2vit:layer=1", "dense")
    subjects = [recipe("fma", {"block": 4, "rank": 2}, "fma"), recipe("window", {"size": 4}, "window"),
                recipe("l2vit", {"layer": 1}, "l2vit:layer=1"), recipe("dense", {}, "dense")]  # fmt: skip
    cases = (CASES[0], Case((4, 8), **SMALL))
    rows = sweep([*subjects, peers.peer("sdpa", {}, "sdpa")], Settings(cases, modes=("decode",), repeats=1)).rows
    assert [row.label for row in rows[:5]] == [*names, "sdpa"]
    assert [row.reason for row in rows[:5]] == [None] * 5 and all(row.seconds for row in rows[:5])
    assert {row.reason for row in rows[5:]} == {"tokens are decoded one by one in 1-D only"}
    flops = {row.label: row.flops for row in rows[:5]}
    assert flops["sdpa"] == flops["dense"] == 2 * 4 * 8 * 32
    assert flops["window"] == 2 * 4 * 8 * 4
    # The last of 32 tokens sees 8 of its two blocks of 4; groups 4, 5 of level 1 and 0, 1 of the top level.
    # It goes into one key and one value summary.
    assert flops["fma"] == 2 * 4 * 8 * (8 + 2 * 4) + 2 * 2 * 8 * 2


def test_a_measured_step_equals_the_last_row() -> None:
    case = CASES[0]
    inputs = Inputs.of(case)
    for name in ("fma", "window", "dense"):
        subject = recipe(name, {"block": 4, "rank": 2} if name == "fma" else {}, name)
        assert subject.decode is not None
        run = subject.decode(case).run
        whole = subject.make(case).run(inputs.q, inputs.k, inputs.v)
        with torch.no_grad():
            step = run(inputs.q[:, :, -1:], inputs.k, inputs.v)
        torch.testing.assert_close(step, whole[:, :, -1:])
    reason = "an engine for whole sequences"
    with pytest.raises(Refused, match=reason):
        recipe("fma", {"impl": "torch"}, "fma").decode(case)  # type: ignore[misc]
    with pytest.raises(Refused, match="not causal"):
        recipe("fma", {}, "fma").decode(dataclasses.replace(case, causal=False))  # type: ignore[misc]


def test_stopping_keeps_the_finished_cases() -> None:
    rows: list[Row] = []

    class Keeper(Watcher):
        def on_rows(self, done: Sequence[Row], reused: bool) -> None:
            rows.extend(done)

    subject = fake("a", mean)
    result = sweep([subject], Settings(CASES, repeats=1), watcher=Keeper(), should_stop=lambda: len(rows) >= 2)
    assert result.interrupted
    assert result.rows == rows and len(rows) == 2


def test_finished_cases_are_kept_only_when_they_are_whole() -> None:
    subjects = [fake("a", mean), fake("b", mean)]
    settings = Settings(CASES, modes=("forward",), repeats=1)
    first = sweep(subjects, settings).rows
    listener = Listener()
    again = sweep(subjects, settings, finished=first[:3], watcher=listener).rows
    assert again[:2] == first[:2]
    assert listener.heard[0] == "2 rows, reused"
    assert listener.heard[1] == "case 2/2 64 forward"


def test_long_calls_and_large_memory_are_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = fake("a", mean)
    before = Row("a", "core", None, CASES[0], "forward", seconds=10.0, memory=1 << 20)
    settings = Settings(CASES, modes=("forward",), repeats=1, limit=30.0)
    rows = sweep([subject], settings, finished=[before]).rows
    assert rows[1].reason == "a call would take about 40 s, over the limit of 30 s"
    monkeypatch.setattr("farfield.bench.sweep.available_bytes", lambda device: 4 << 20)
    rows = sweep([subject], dataclasses.replace(settings, limit=60.0), finished=[before]).rows
    assert rows[1].reason is not None and "of memory" in rows[1].reason
    scores = fake("s", mean, scores=True)
    rows = sweep([scores], Settings((Case((4096,), **SMALL),), modes=("forward",))).rows
    assert rows[0].reason is not None and "GiB of memory" in rows[0].reason


def test_no_error_above_the_exact_length() -> None:
    case = Case((EXACT_LENGTH + 1,), heads=1, head_dim=1)
    (row,) = sweep([fake("a", mean)], Settings((case,), modes=("forward",), repeats=1)).rows
    assert row.error is None and row.error_from == "not computed above 4,096 tokens"


def test_the_plan_runs_nothing() -> None:
    def never(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise AssertionError

    subjects = [fake("a", never), fake("b", never, why_not="it is not installed"), recipe("agent", {}, "agent")]
    found = plan(subjects, Settings(CASES[:1], modes=("forward", "decode")))
    assert [(p.label, p.mode) for p in found] == [(s, m) for m in ("forward", "decode") for s in ("a", "b", "agent")]
    assert found[0].flops == 2 * 4 * 8 * 32 and found[0].floor is not None and found[0].floor > 0
    assert found[1].reason == "it is not installed"
    assert found[2].reason is not None and "cannot be causal" in found[2].reason
    assert found[5].reason is not None and "cannot be causal" in found[5].reason
