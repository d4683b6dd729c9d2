from __future__ import annotations

import pytest
import torch

from farfield.bench.case import Case, Inputs, dtype_of, grid_of, parse_length


@pytest.mark.parametrize(
    ("text", "grid"),
    [("4096", (4096,)), ("4k", (4096,)), ("1M", (1 << 20,)), ("64x48", (64, 48)), (" 4x4x2 ", (4, 4, 2))],
)
def test_lengths(text: str, grid: tuple[int, ...]) -> None:
    assert parse_length(text) == grid


@pytest.mark.parametrize("text", ["", "0", "-3", "4q", "1.5k", "4x", "x4", "2x2x2x2"])
def test_other_texts_are_no_lengths(text: str) -> None:
    with pytest.raises(ValueError, match=r"write it like 4096, 4k, 64x64|one to three"):
        parse_length(text)


@pytest.mark.parametrize(
    ("tokens", "dims", "grid"),
    [(4096, 1, (4096,)), (4096, 2, (64, 64)), (2048, 2, (32, 64)), (4096, 3, (16, 16, 16)), (1000, 2, (25, 40)),
     (1024, 3, (8, 8, 16)), (360, 3, (6, 6, 10))],
)  # fmt: skip
def test_grids_of_a_number_of_tokens(tokens: int, dims: int, grid: tuple[int, ...]) -> None:
    assert grid_of(tokens, dims) == grid


def test_a_prime_number_of_tokens_makes_no_image() -> None:
    with pytest.raises(ValueError, match=r"1,021 tokens make no 2-D grid .* such as 32x32"):
        grid_of(1021, 2)


def test_dtypes() -> None:
    assert [dtype_of(t) for t in ("bf16", "torch.float16", "FP32", "float64")] == [
        "bfloat16", "float16", "float32", "float64"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'int8' is not a dtype to measure in: float32"):
        dtype_of("int8")


def test_inputs_are_the_same_every_time_and_x_is_q() -> None:
    case = Case((6, 5), dtype="bfloat16", batch=2, heads=3, head_dim=4)
    one, two = Inputs.of(case), Inputs.of(case)
    assert one.q.shape == (2, 3, 30, 4) and one.q.dtype == torch.bfloat16
    assert torch.equal(one.k, two.k) and torch.equal(one.grad, two.grad)
    assert torch.equal(one.x, one.q.transpose(1, 2).reshape(2, 30, 12))
    assert case.name == "6x5 tokens, bfloat16"
    assert Case((4096,), causal=True).name == "4,096 tokens, float32, causal"
