from __future__ import annotations

import signal

import pytest

from farfield.commands.interrupt import Interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request_and_the_second_acts(number: signal.Signals) -> None:
    received = []
    previous = signal.signal(number, lambda *_: received.append(number))
    try:
        with Interruption() as interruption:
            assert not interruption()
            signal.raise_signal(number)
            assert interruption()
            assert received == []
            signal.raise_signal(number)
            assert received == [number]
    finally:
        signal.signal(number, previous)


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interruption():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_a_handler_that_is_not_from_python_gives_way_to_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    real = signal.signal
    try:
        with monkeypatch.context() as patch:
            patch.setattr(signal, "signal", lambda number, handler: real(number, handler) and None)
            interruption = Interruption().__enter__()
        interruption.__exit__(None, None, None)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for number, handler in before.items():
            real(number, handler)
