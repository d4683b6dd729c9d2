"""What the far fields of images refuse, with the reason."""

from __future__ import annotations

import pytest

from farfield import Attention
from farfield.far import Channels, Multigrid, Relay, Spectrum
from farfield.near import Anchors, DynamicConv, GlobalQueries, Window
from farfield.parts import Part


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Multigrid(4, sampling="bilinear"), "known samplings are mean, learned"),
        (lambda: Multigrid(4, levels=0), "levels must be a positive integer, or None"),
        (lambda: Attention(16, 4, far=Multigrid(4, 1)), "rate=1 makes nothing coarser"),
        (lambda: Relay(4, 0), "count must be a positive integer"),
        (lambda: Anchors(0), "every must be a positive integer"),
        (lambda: Attention(16, 4, near=DynamicConv(2)), "kernel=2 has no middle"),
        (
            lambda: Attention(15, 4, head_dim=4, near=DynamicConv(3)),
            "dim=15 must be a multiple of num_kv_heads=4",
        ),
        (lambda: Attention(16, 4, far=Spectrum((4, 4))), r"size=\(4, 4\) does not fit a 1-D grid"),
        (lambda: Attention(16, 4, near=Window(4), far=Multigrid(4)), "every level has a softmax of its own"),
        (lambda: Attention(16, 4, near=Window(4), far=Spectrum(4)), "a filter weighs by position"),
        (lambda: Attention(16, 4, near=Window(4), far=Channels()), "its softmax runs over channels"),
    ],
)
def test_what_makes_no_sense_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    "part", [Multigrid(4), Relay(4), Spectrum(4), Channels(), GlobalQueries(4), DynamicConv(3)], ids=repr
)
def test_what_reads_the_future_is_not_causal(part: Part) -> None:
    role = "near" if isinstance(part, GlobalQueries | DynamicConv) else "far"
    with pytest.raises(ValueError, match=r"is not causal-safe: .*; use causal=False"):
        Attention(16, 4, causal=True, **{role: part})  # type: ignore[arg-type]
