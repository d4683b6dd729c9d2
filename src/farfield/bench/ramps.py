"""The first steps of a run, on short windows, kept so that runs which share them take them once.

A ramp depends on the variant, the seed and the text, not on the context, the batch or the budget that follow: its
learning rate rises in its own first steps and is constant after. So every run of a variant and seed goes on from the
same numbers, up to rounding of the rate.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from farfield.training.files import write_atomically
from farfield.training.loop import Trainer

__all__ = ["ramp_file", "take_ramp"]


def ramp_file(folder: Path, key: Mapping[str, Any]) -> Path:
    """Where the state after a ramp lies; ``key`` is every setting that it depends on, as JSON."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder / f"{digest[:24]}.pt"


def take_ramp(trainer: Trainer, steps: int, path: Path, run: Callable[[Callable[[], bool]], object]) -> None:
    """Brings a fresh trainer to where its ramp ends.

    Args:
        trainer: its first ``steps`` steps are the ramp.
        steps: of the ramp.
        path: read where it exists, otherwise written.
        run: runs the trainer until what it is given says stop.

    Raises:
        ValueError: when the file is no such state.
        OSError: when it cannot be written.
    """
    if path.exists():
        try:
            trainer.load_state_dict(torch.load(path, weights_only=True))
        except Exception as error:  # torch raises many kinds for damaged files
            raise ValueError(f"{path} is not the state after a ramp ({error}); delete it") from error
        if trainer.step != steps:
            raise ValueError(f"{path} ends after {trainer.step} steps, the ramp has {steps}; delete it")
        return
    run(lambda: trainer.step >= steps)
    if trainer.step == steps:
        buffer = io.BytesIO()
        torch.save(trainer.state_dict(), buffer)
        write_atomically(path, buffer.getvalue())
