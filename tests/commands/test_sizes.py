"""``farfield sizes``: the table, JSON, video, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from typer.testing import Result

from farfield.bench.flops import count_flops
from farfield.models.vision import SIZES, VisionModel, preset


def test_a_row_per_size(invoke: Callable[..., Result]) -> None:
    result = invoke("sizes", "--attention", "na", "--image-size", "64x96")
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line for line in result.output.splitlines() if line.strip()}
    assert list(SIZES) == [name for name in lines if name in SIZES]
    with torch.device("meta"):
        model = VisionModel(preset("tiny", attention="na", outputs=1000))
    assert f"{model.parameter_count():,}" in lines["tiny"] and "16x24" in lines["tiny"]


def test_json_is_what_a_real_pass_counts(invoke: Callable[..., Result]) -> None:
    arguments = ("sizes", "vit-tiny", "--attention", "fma2d", "--image-size", "48", "--classes", "7", "--json")
    result = invoke(*arguments, "--option", "block=2", "--option", "rank=1")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.output)
    model = VisionModel(preset("vit-tiny", attention="fma2d", options={"block": 2, "rank": 1}, outputs=7))
    count = count_flops(model, 3, (48, 48))
    assert row["flops"] == count.flops == row["maps"] + row["attention"]
    assert row["parameters"] == count.parameters == model.parameter_count()
    assert (row["size"], row["widths"], row["depths"], row["tokens"]) == ("vit-tiny", [192], [12], [3, 3])


def test_video(invoke: Callable[..., Result]) -> None:
    result = invoke("sizes", "tiny", "--attention", "flashvggt", "--image-size", "6x32x32", "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.output)
    assert row["tokens"] == [6, 8, 8] and row["flops"] > 0


def test_what_is_opened_has_no_count(invoke: Callable[..., Result]) -> None:
    result = invoke("sizes", "tiny", "--option", "open=2")
    assert result.exit_code == 0, result.output
    assert "depends on the image" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("huge",), "unknown size 'huge'; known sizes are tiny, small, base, vit-tiny, vit-small, vit-base"),
        (("--attention", "fma2"), "did you mean 'fma2d'? Known recipes: dense, window"),
        (("--attention", "flashvggt"), "works in 3-D; 224x224 is 2-D: give height x width for 2-D"),
        (("--attention", "na", "--option", "rank=2"), "recipe 'na' has no option rank=2; its options: size=7"),
        (("--option", "rank"), "write NAME=VALUE"),
        (("--option", "block=5"), "one of [1, 5] would be accepted"),
        (("--image-size", "0"), "--image-size '0': write one to three positive numbers"),
        (("--image-size", "big"), "--image-size 'big': write one to three positive numbers"),
    ],
)
def test_bad_input_is_answered_with_what_would_do(
    invoke: Callable[..., Result], arguments: tuple[str, ...], message: str
) -> None:
    result = invoke("sizes", *arguments)
    assert result.exit_code == 2
    assert message in result.output
