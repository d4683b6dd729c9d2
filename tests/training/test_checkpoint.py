from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from farfield.training import checkpoint, files
from farfield.training.checkpoint import CONFIG_FILE, STATE_FILE, CheckpointError
from farfield.training.files import SaveError
from farfield.training.loop import Trainer

Make = Callable[..., Trainer]


@pytest.fixture
def saved(tmp_path: Path, make_trainer: Make) -> Path:
    trainer = make_trainer()
    trainer.run(should_stop=lambda: trainer.step >= 5)
    checkpoint.save(tmp_path / "run", trainer, {"note": "hello"})
    return tmp_path / "run"


def test_a_resumed_run_ends_with_the_same_bits(saved: Path, make_trainer: Make) -> None:
    whole = make_trainer()
    whole.run()
    loaded = checkpoint.load(saved)
    assert loaded.step == 5
    assert loaded.info == {"note": "hello"}
    assert loaded.train == whole.config
    resumed = make_trainer()
    loaded.restore(resumed)
    resumed.run()
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_checkpoint_gives_the_model(saved: Path) -> None:
    loaded = checkpoint.load(saved)
    model = loaded.build_model()
    assert not model.training
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, loaded.state[f"model.{name}"])


def test_a_fresh_trainer_can_be_saved(tmp_path: Path, make_trainer: Make) -> None:
    checkpoint.save(tmp_path, make_trainer())
    assert checkpoint.load(tmp_path).step == 0


def test_the_folder_holds_two_files(saved: Path) -> None:
    assert sorted(os.listdir(saved)) == [STATE_FILE, CONFIG_FILE]
    assert checkpoint.exists(saved)
    assert not checkpoint.exists(saved / "nowhere")


def test_only_language_models_are_saved(tmp_path: Path, text: object) -> None:
    from farfield.training.loop import TrainConfig

    with pytest.raises(TypeError, match="Linear"):
        checkpoint.save(tmp_path, Trainer(nn.Linear(1, 1), text, TrainConfig(context=4, steps=1)))  # type: ignore[arg-type]


def test_a_full_disk_keeps_the_older_checkpoint(
    saved: Path, make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    calls = []

    def fill_up(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:  # the settings fit, the numbers do not
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    trainer = make_trainer()
    trainer.run()
    monkeypatch.setattr(files.os, "fsync", fill_up)
    with pytest.raises(SaveError, match=r"checkpoint\.safetensors: No space left on device"):
        checkpoint.save(saved, trainer)
    assert checkpoint.load(saved).step == 5
    assert sorted(os.listdir(saved)) == [STATE_FILE, CONFIG_FILE]


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such folder: .*nowhere"):
        checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json is missing \(found nothing\)"):
        checkpoint.load(tmp_path)


def test_a_missing_file_is_named(saved: Path) -> None:
    (saved / STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors is missing \(found \['config\.json'\]\)"):
        checkpoint.load(saved)


@pytest.mark.parametrize("size", [0, 5, 8, 100, 0.5, -1])
def test_truncated_numbers(saved: Path, size: float) -> None:
    path = saved / STATE_FILE
    data = path.read_bytes()
    path.write_bytes(data[: int(size * len(data)) if isinstance(size, float) else size])
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors is damaged or no safetensors file"):
        checkpoint.load(saved)


def test_flipped_bits_are_noticed(saved: Path) -> None:
    path = saved / STATE_FILE
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum does not match"):
        checkpoint.load(saved)


def test_another_safetensors_file_is_no_checkpoint(saved: Path) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(3)}, saved / STATE_FILE)
    with pytest.raises(CheckpointError, match="not a checkpoint of `farfield train`"):
        checkpoint.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("model"), r"config\.json is damaged: lacks 'model'"),
        (lambda c: c["model"].update(dim=0), r"damaged: dim must be an integer of at least 1, got 0"),
        (lambda c: c["model"].update(width=0), r"unknown model settings \['width'\]"),
        (lambda c: c["train"].update(speed=1), r"damaged: .*speed"),
        (lambda c: c.update(format="99"), r"has format '99'; this version of farfield reads '1'"),
    ],
)
def test_changed_settings(saved: Path, change: Callable[[dict[str, dict[str, object]]], object], message: str) -> None:
    path = saved / CONFIG_FILE
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(saved)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\0\1"])
def test_settings_that_are_no_settings(saved: Path, content: str) -> None:
    (saved / CONFIG_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        checkpoint.load(saved)


def test_numbers_of_another_model(saved: Path, make_trainer: Make) -> None:
    path = saved / CONFIG_FILE
    config = json.loads(path.read_text())
    config["model"]["dim"] = 64
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        checkpoint.load(saved).build_model()
    with pytest.raises(CheckpointError, match="cannot resume"):
        checkpoint.load(saved).restore(make_trainer(dim=64))
