from __future__ import annotations

import pytest
import typer

from farfield.commands.options import duration, duration_option, in_words, recipe_options


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("60s", 60),
        ("2m", 120),
        ("1h", 3600),
        ("1.5m", 90),
        ("1h30m", 5400),
        ("1h 1m 1s", 3661),
        (" 5S ", 5),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds
    assert duration_option(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "-5", "5 minutes", "m", "1d", "nan", "inf", "1e3", "5s!", "1.2.3"])
def test_other_texts_are_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a duration; write it like 90, 60s, 2m"):
        duration(text)
    with pytest.raises(typer.BadParameter, match="is not a duration"):
        duration_option(text)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (125, "2m05s"), (3600, "1h00m"), (3725, "1h02m")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_recipe_options() -> None:
    assert recipe_options(["block=32", "summary=mean", "count-bias=false", "x=0.5", "name=a=b"]) == {
        "block": 32,
        "summary": "mean",
        "count_bias": False,
        "x": 0.5,
        "name": "a=b",
    }
    assert recipe_options([]) == {}
    assert recipe_options(["grid=[8, [4]]"]) == {"grid": (8, (4,))}


@pytest.mark.parametrize("setting", ["block", "=3", "a b=3"])
def test_malformed_recipe_options(setting: str) -> None:
    with pytest.raises(ValueError, match="write NAME=VALUE"):
        recipe_options([setting])


def test_a_recipe_option_given_twice() -> None:
    with pytest.raises(ValueError, match="'block' is given twice: 1 and '2'"):
        recipe_options(["block=1", "block=2"])
