"""Shared by all tests: one thread, hypothesis without deadlines and with fixed examples, buffers poisoned with NaN."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or deterministic algorithms refuse products on a GPU

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from typer.testing import Result

sys.path.insert(0, str(Path(__file__).parent))  # for `import support`

torch.set_num_threads(1)

settings.register_profile(
    "farfield",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("farfield")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """The program inside this process: quicker than another one, for the many kinds of bad input."""
    from typer.testing import CliRunner

    from farfield.cli import build_app

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(build_app(), list(map(str, arguments)), env={"COLUMNS": "240", "NO_COLOR": "1"})

    return run


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory is NaN until somebody writes to it (torch.empty, new_empty, empty_like, on every device)."""
    from farfield.ops import memory

    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    kept, memory.KEPT = memory.KEPT, 0  # buffers that are used again would not be NaN
    memory.forget()
    try:
        assert torch.empty(8).isnan().all()
        yield
    finally:
        memory.KEPT = kept
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before)
