"""The window operator one step at a time, against the reference on every prefix."""

from __future__ import annotations

import pytest
import torch

from farfield.ops.state import AttentionState
from farfield.ops.window import window_attention
from farfield.ops.window.stream import WindowStream

F64 = torch.float64


@pytest.mark.parametrize("chunk", [1, 2, 5, 64])
@pytest.mark.parametrize("rewind", [0, 4])
@pytest.mark.parametrize(
    ("window", "stride", "dilation"), [(1, 1, 1), (5, 1, 1), (5, 1, 3), (4, 4, 1), (6, 3, 2), (3, 2, 4), (90, 1, 1)]
)
def test_every_prefix_against_the_reference(window: int, stride: int, dilation: int, rewind: int, chunk: int) -> None:
    q, (k, v) = torch.randn(2, 4, 43, 4, dtype=F64), torch.randn(2, 2, 2, 43, 4, dtype=F64)
    stream = WindowStream(window, stride, dilation, rewind)
    cache = stream.empty(2, 2, 4, F64, torch.device("cpu"))
    assert cache["keys"].shape[2] % dilation == 0 and cache["keys"].shape[2] >= (window - 1) * dilation + 1 + rewind
    for start in range(0, 43, chunk):
        stop = min(start + chunk, 43)
        parts = [x[:, :, start:stop] for x in (q, k, v)]
        state = stream.step({n: t.clone() for n, t in cache.items()}, *parts, start, scale=0.7)
        out = stream.step(cache, *parts, start, scale=0.7, need_lse=False)
        want = window_attention(
            *(x[:, :, :stop] for x in (q, k, v)), window=window, stride=stride, dilation=dilation, causal=True,
            scale=0.7, impl="reference", return_lse=True,
        )  # fmt: skip
        assert isinstance(state, AttentionState)
        torch.testing.assert_close(state.out, want.out[:, :, start:])
        torch.testing.assert_close(state.lse, want.lse[:, :, start:])
        torch.testing.assert_close(out, want.out[:, :, start:])
