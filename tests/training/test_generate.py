from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from farfield.models.language import LanguageModel
from farfield.training.generate import generate
from farfield.training.loop import Trainer


@pytest.fixture
def model(make_trainer: Callable[..., Trainer]) -> LanguageModel:
    trainer = make_trainer(steps=80, batch=2)
    trainer.run()
    assert isinstance(trainer.model, LanguageModel)
    return trainer.model


def test_it_writes_what_it_has_learned(model: LanguageModel) -> None:
    text = bytes(generate(model, b"near far fi", 60, temperature=0.5))
    assert len(text) == 60
    assert set(text) <= set(b"near far field level group cell ")


def test_equal_seeds_write_equal_text(model: LanguageModel) -> None:
    def write(seed: int) -> bytes:
        return bytes(generate(model, b"", 40, temperature=1.0, seed=seed))

    torch.manual_seed(0)
    first = write(1)
    torch.manual_seed(1)
    assert write(1) == first
    assert write(2) != first


def test_temperature_zero_takes_the_likeliest(model: LanguageModel) -> None:
    text = list(b"near ")
    for byte in generate(model, bytes(text), 20, temperature=0, seed=7):
        with torch.no_grad():
            assert byte == int(model(torch.tensor([text[-64:]]))[0, -1].argmax())
        text.append(byte)


def test_no_more_than_the_context_is_read(model: LanguageModel) -> None:
    long = b"far field " * 30
    assert bytes(generate(model, long, 10)) == bytes(generate(model, long[-64:], 10))


def test_nothing_is_written_when_nothing_is_asked(model: LanguageModel) -> None:
    assert bytes(generate(model, b"near", 0)) == b""


@pytest.mark.parametrize(
    ("length", "settings", "message"),
    [
        (-1, {}, "must not be negative, got -1"),
        (1, {"temperature": -0.5}, "temperature must be a finite number of at least 0, got -0.5"),
        (1, {"temperature": float("nan")}, "temperature"),
        (1, {"seed": -1}, "seed"),
    ],
)
def test_bad_arguments_are_refused_at_once(
    model: LanguageModel, length: int, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, b"", length, **settings)  # type: ignore[arg-type]


def test_a_full_state_begins_again_with_the_last_half(model: LanguageModel) -> None:
    """The context is 64: byte 65 is made from 64 bytes, then the state holds 32 and grows again."""
    text = list(b"near far field " * 4)[:60]
    written = list(generate(model, bytes(text), 40, temperature=0))
    start, text = 0, list(text)
    for byte in written:
        if len(text) - start > 64:
            start = len(text) - 32
        with torch.no_grad():
            assert byte == int(model(torch.tensor([text[start:]]))[0, -1].argmax())
        text.append(byte)
    assert start > 0
