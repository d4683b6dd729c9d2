from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from farfield.bench import peers
from farfield.bench.case import Case, Inputs
from farfield.bench.subjects import Refused

CASE = Case((64,), causal=True, heads=2, head_dim=16)


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", lambda module: False)
    assert peers.peer("natten", {}, "natten").why_not == "natten is not installed"
    assert peers.PEERS["fla-gla"].why_not() == "flash-linear-attention is not installed"
    assert peers.peer("sdpa", {}, "sdpa").why_not is None


def test_unknown_names_and_options() -> None:
    with pytest.raises(ValueError, match=r"unknown peer 'spda'; did you mean 'sdpa'\? Known peers: sdpa, .*or all"):
        peers.peer("spda", {}, "spda")
    with pytest.raises(ValueError, match="peer 'natten' has no option 'size'; its options: window, stride"):
        peers.peer("natten", {"size": 3}, "natten:size=3")


@pytest.mark.parametrize("name", ["sdpa", "sdpa-flash", "sdpa-math"])
def test_torch_itself(name: str) -> None:
    inputs = Inputs.of(CASE)
    subject = peers.peer(name, {}, name)
    exact = F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, is_causal=True)
    torch.testing.assert_close(subject.make(CASE).run(inputs.q, inputs.k, inputs.v), exact, rtol=1e-4, atol=1e-5)
    assert subject.decode is not None
    one = subject.decode(CASE).run(inputs.q[:, :, -1:], inputs.k, inputs.v)
    torch.testing.assert_close(one, exact[:, :, -1:], rtol=1e-4, atol=1e-5)


def test_a_backend_that_this_device_lacks_is_refused() -> None:
    with pytest.raises(Refused, match="cudnn attention does not run in float32 on cpu"):
        peers.peer("sdpa-cudnn", {}, "sdpa-cudnn").make(CASE)
    assert "does not run" in (peers.PEERS["sdpa-cudnn"].why_not("cpu") or "")


def test_what_cannot_be_done_on_a_cpu_is_refused_before_it_is_tried() -> None:
    for mode in ("forward", "decode"):
        assert peers.peer("flex", {}, "flex").modes(CASE, mode) is None
    reason = peers.peer("flex", {}, "flex").modes(CASE, "backward")
    assert reason is None or "no backward pass on the CPU" in reason


@pytest.mark.parametrize(
    ("name", "case", "reason"),
    [
        ("fla-gla", CASE, "need a GPU"),
        ("fla-gla", Case((64,)), "causal only"),
        ("nystrom-attention", CASE, "no causal form"),
        ("reformer-pytorch", Case((4, 4)), "works in 1-D"),
    ],
)
def test_refusals_come_before_the_import(name: str, case: Case, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        peers.peer(name, {}, name).make(case)


def test_installed_packages_run() -> None:
    """All of them where the extra ``peers`` is installed; none of them need be."""
    for name, found in peers.PEERS.items():
        if found.package is None or found.why_not() is not None:
            continue
        for causal in (True, False):
            case = Case((256,), causal=causal, heads=2, head_dim=16)
            subject = peers.peer(name, {}, name)
            inputs = Inputs.of(case)
            given = (inputs.x,) if subject.level == "layer" else (inputs.q, inputs.k, inputs.v)
            try:
                built = subject.make(case)
            except Refused:
                continue
            out = built.run(*map(built.into, given))
            assert out.numel() == inputs.q.numel() and out.isfinite().all(), name
