"""What is no tensor where one is needed gets an error that names it and says what would be accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farfield as ff
from farfield.ops.window import window_attention

X = torch.ones(1, 2, 20, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ff.multipole_attention(X, X, X, block=4, rank=2, cu_seqlens=[0, 20]), r"cu_seqlens=\[0, 20\]"),
        (lambda: window_attention(X, X, X, window=4, cu_seqlens=[0, 20]), r"cu_seqlens=\[0, 20\]"),
        (lambda: ff.multipole_attention(X, X, X, block=4, rank=2, level_bias=-8.0), "level_bias=-8.0"),
        (lambda: ff.opened_attention(X, X, X, block=4, rank=2, open=1, page_bias=-8.0), "page_bias=-8.0"),
        (
            lambda: ff.recipes.build("fma", 8, 2, block=4, rank=2)(torch.ones(1, 20, 8), cu_seqlens=[0, 20]),
            r"cu_seqlens=\[0, 20\]",
        ),
    ],
)
def test_a_tensor_is_asked_for(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message + ": .*tensor .* would be accepted"):
        call()
