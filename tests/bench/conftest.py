from __future__ import annotations

import pytest

from farfield.bench import ceilings


@pytest.fixture
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's ceilings measured in no time: tests look at what is done with them, not at how high they are."""
    monkeypatch.setattr(ceilings, "_LARGEST", {"cpu": 256})
    monkeypatch.setattr(ceilings, "_SAMPLE", 0.0)
    monkeypatch.setattr(ceilings, "_COPY_BYTES", {"cpu": 1 << 16})
