from __future__ import annotations

import sys

import pytest
import torch

from farfield.bench.memory import PeakMemory, available_bytes, is_out_of_memory, why_unmeasured

MIB = 2**20
linux = pytest.mark.skipif(why_unmeasured("cpu") is not None, reason="no resettable peak on this system")


@linux
def test_a_peak_is_seen_after_its_memory_is_gone() -> None:
    with PeakMemory() as peak:
        torch.ones(64 * MIB // 4).sum()
    assert peak.raised is not None
    assert 60 * MIB < peak.raised < 100 * MIB


@linux
def test_an_earlier_peak_does_not_count() -> None:
    torch.ones(64 * MIB // 4).sum()
    with PeakMemory() as peak:
        torch.ones(MIB // 4).sum()
    assert peak.raised is not None
    assert peak.raised < 20 * MIB


@linux
def test_what_stays_allocated_from_before_does_not_count() -> None:
    held = torch.ones(64 * MIB // 4)
    with PeakMemory() as peak:
        held.sum()
    assert peak.raised is not None
    assert peak.raised < 20 * MIB


def test_an_unmeasured_device_says_so() -> None:
    with PeakMemory("meta") as peak:
        pass
    assert peak.raised is None
    assert peak.reason is not None
    assert "meta" in peak.reason


def test_another_system_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    reason = why_unmeasured("cpu")
    assert reason is not None
    assert "darwin" in reason


@linux
def test_available_memory_is_plausible() -> None:
    free = available_bytes()
    assert free is not None
    assert MIB < free < 2**50


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


@linux
def test_asking_does_not_touch_a_peak_under_way() -> None:
    with PeakMemory() as peak:
        torch.ones(64 * MIB // 4).sum()
        assert why_unmeasured("cpu") is None
    assert peak.raised is not None
    assert peak.raised > 60 * MIB
