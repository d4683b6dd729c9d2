"""Ctrl-C as a request: finish the step, save, and say how to go on."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interruption"]


class Interruption:
    """While open, a first SIGINT or SIGTERM sets `requested`; a second one acts as it did before.

    Works in the main thread only, as Python's signals do. A handler that was not installed from Python cannot be put
    back; Python's own takes its place.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    def __call__(self) -> bool:
        """Whether to stop; fits ``Trainer.run(should_stop=...)``."""
        return self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            if handler is None:
                handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, handler)
        self._previous.clear()
