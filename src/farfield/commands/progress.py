"""What a command of several stages shows while it works."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Stages"]


class Stages:
    """Told of every step: a bar on a terminal, a line for every tenth of a stage elsewhere."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = console
        self.bar: Any = None
        self.tasks: dict[str, Any] = {}
        self.printed: dict[str, float] = {}
        if console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[word]}")
            self.bar = Progress(*columns, TimeRemainingColumn(), console=console)

    def __enter__(self) -> Stages:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, stage: str, share: float, word: str) -> None:
        """Show that `share` (0 to 1) of `stage` is done, and say what it came to."""
        if self.bar is None:
            if share >= 1.0 or share >= self.printed.get(stage, -1.0) + 0.1:
                self.printed[stage] = share
                self.console.print(f"{stage}: {word}", soft_wrap=True)
            return
        if stage not in self.tasks:
            self.tasks[stage] = self.bar.add_task(stage, total=1.0, word=word)
        self.bar.update(self.tasks[stage], completed=share, word=word)
