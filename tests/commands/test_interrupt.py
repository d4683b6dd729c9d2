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
