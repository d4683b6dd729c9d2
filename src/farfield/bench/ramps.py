"""The first steps of a run, on short windows, kept so that runs which share them take them once.

A ramp depends on the variant, the seed and the text, not on the context, the batch or the budget that follow: its
learning rate rises in its own first steps and is constant after. So every run of a variant and seed goes on from the
same numbers, up to rounding of the rate.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from farfield.training.files import write_atomically
from farfield.training.loop import Trainer

__all__ = ["ramp_file", "take_ramp"]


def ramp_file(folder: Path, key: Mapping[str, Any]) -> Path:
    """Where the state after a ramp lies; ``key`` is every setting that it depends on, as JSON."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder / f"{digest[:24]}.safetensors"


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
    # Here, so that a study without ramps needs no safetensors.
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    if path.exists():
        try:
            trainer.load_state_dict(load(path.read_bytes()))
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is not the state after a ramp ({error}); delete it") from error
        if trainer.step != steps:
            raise ValueError(f"{path} ends after {trainer.step} steps, the ramp has {steps}; delete it")
        return
    run(lambda: trainer.step >= steps)
    if trainer.step == steps:
        state = {name: tensor.contiguous() for name, tensor in trainer.state_dict().items()}
        write_atomically(path, save(state))
