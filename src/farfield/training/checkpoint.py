"""Checkpoints: a folder with ``config.json`` and ``checkpoint.safetensors``.

The settings stand in the JSON file, everything that training changes in the other one: parameters under ``model.*``,
the optimiser's moments, random states and the history, so that one rename replaces all of it at once. A checksum
guards the numbers. Needs the extra ``cli`` (safetensors).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farfield.models.language import LanguageConfig, LanguageModel
from farfield.training.files import write_atomically, write_json
from farfield.training.loop import TrainConfig, Trainer

__all__ = ["CONFIG_FILE", "STATE_FILE", "Checkpoint", "CheckpointError", "exists", "load", "save"]

CONFIG_FILE = "config.json"
STATE_FILE = "checkpoint.safetensors"
_FORMAT = "1"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another kind."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read into memory.

    Attributes:
        folder: Where it was read from.
        model: Architecture.
        train: How it was being trained.
        info: What the caller of `save` gave besides.
        state: As `Trainer.state_dict`, on the CPU.
    """

    folder: Path
    model: LanguageConfig
    train: TrainConfig
    info: dict[str, Any]
    state: dict[str, Tensor]

    @property
    def step(self) -> int:
        """Steps taken when it was saved."""
        history = self.state["history"]
        return int(history[-1, 0]) if len(history) else 0

    def build_model(self, device: torch.device | str = "cpu") -> LanguageModel:
        """Make the model with its trained parameters, in evaluation mode.

        Raises:
            CheckpointError: If the parameters do not fit the architecture in ``config.json``.
        """
        model = LanguageModel(self.model)
        parameters = {name.removeprefix("model."): t for name, t in self.state.items() if name.startswith("model.")}
        try:
            model.load_state_dict(parameters)
        except RuntimeError as error:
            hint = ". Opened tokens had no bias once: the option open_bias=null describes such a model"
            raise CheckpointError(
                f"{self.folder / STATE_FILE} does not fit the model that {self.folder / CONFIG_FILE} describes: {error}"
                f"{hint if 'page_bias' in str(error) else ''}"
            ) from error
        return model.to(device).eval()

    def restore(self, trainer: Trainer) -> None:
        """Bring a new trainer to where the saved one stood.

        Raises:
            CheckpointError: If the trainer's model is of another architecture.
        """
        try:
            trainer.load_state_dict(self.state)
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"cannot resume from {self.folder}: {error}") from error


def exists(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a checkpoint, whole or damaged."""
    return (Path(folder) / STATE_FILE).exists()


def save(folder: str | os.PathLike[str], trainer: Trainer, info: Mapping[str, Any] | None = None) -> None:
    """Save a trainer of a `LanguageModel`; replaces an older checkpoint in one step.

    Args:
        folder: Made if it is missing.
        trainer: Not changed.
        info: Anything that JSON can express, handed back by `load`.

    Raises:
        SaveError: If a file cannot be written. An older checkpoint stays as it was.
        TypeError: If the trainer's model is not a `LanguageModel`.
    """
    if not isinstance(trainer.model, LanguageModel):
        raise TypeError(f"checkpoints hold a LanguageModel, got a trainer of {type(trainer.model).__name__}")
    safetensors = _safetensors()
    # Clones, because safetensors refuses tensors that share memory.
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in trainer.state_dict().items()}
    data: bytes = safetensors.save(tensors, metadata={"farfield": _FORMAT, "sha256": _digest(tensors)})
    config = {
        "format": _FORMAT,
        "model": dataclasses.asdict(trainer.model.config),
        "train": dataclasses.asdict(trainer.config),
        "info": dict(info or {}),
    }
    folder = Path(folder)
    # The settings first: without numbers they are no checkpoint, while numbers without settings would be a broken one.
    write_json(folder / CONFIG_FILE, config)
    write_atomically(folder / STATE_FILE, data)


def load(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint and check that it is whole.

    Raises:
        CheckpointError: If there is none, or it is damaged; the message says which file and why.
    """
    folder = Path(folder)
    config_path, state_path = folder / CONFIG_FILE, folder / STATE_FILE
    if not folder.is_dir():
        raise CheckpointError(f"no such folder: {folder}; give one that `farfield train --out` wrote")
    for path in (config_path, state_path):
        if not path.is_file():
            found = sorted(entry.name for entry in folder.iterdir())[:8]
            raise CheckpointError(
                f"{folder} holds no checkpoint: {path.name} is missing (found {found or 'nothing'}); "
                "give a folder that `farfield train --out` wrote"
            )
    try:
        config = json.loads(config_path.read_text(encoding="utf-8", errors="surrogateescape"))
        if config["format"] != _FORMAT:
            raise CheckpointError(
                f"{config_path} has format {config['format']!r}; this version of farfield reads {_FORMAT!r}"
            )
        model = LanguageConfig.from_dict(config["model"])
        train = TrainConfig(**config["train"])
        info = dict(config["info"])
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{config_path} is damaged: {_reason(error)}") from error
    return Checkpoint(folder, model, train, info, _read_state(state_path))


def _read_state(path: Path) -> dict[str, Tensor]:
    safetensors = _safetensors()
    data = path.read_bytes()
    try:
        tensors: dict[str, Tensor] = safetensors.load(data)
        # The header: its length in 8 bytes, then JSON. The library hands out metadata of files on disk only.
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except Exception as error:  # safetensors raises its own class, and others where sizes make no sense
        raise CheckpointError(f"{path} is damaged or no safetensors file: {_reason(error)}") from error
    if "farfield" not in metadata or "history" not in tensors or "rng.cpu" not in tensors:
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of `farfield train`")
    if metadata.get("sha256") != _digest(tensors):
        raise CheckpointError(f"{path} is damaged: its checksum does not match its contents")
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    return f"lacks {error}" if isinstance(error, KeyError) else str(error)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "checkpoints need the extra `cli`: pip install 'farfield[cli]'", name=error.name
        ) from error
    return safetensors.torch
