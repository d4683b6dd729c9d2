"""Conv: a depthwise convolution of the values."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from farfield.near.conv import Conv
from farfield.parts import Inputs, LayerSpec


def test_equals_a_grouped_convolution_in_2d() -> None:
    v = torch.randn(2, 2, 30, 3)
    q = torch.randn(2, 4, 30, 3)
    module = Conv((3, 5)).build(LayerSpec(12, 4, 2, 3, dims=2))
    got = module(Inputs(q=q, k=v, v=v, x=q[:, 0], grid=(5, 6)))
    image = v.transpose(2, 3).reshape(2, 6, 5, 6)
    want = F.conv2d(image, module.conv.weight, module.conv.bias, padding=(1, 2), groups=6)
    want = want.view(2, 2, 3, 30).transpose(2, 3).repeat_interleave(2, 1)
    torch.testing.assert_close(got, want)


def test_causal_reads_the_token_and_those_before_it() -> None:
    v = torch.randn(1, 1, 6, 1)
    module = Conv(2).build(LayerSpec(1, 1, 1, 1, causal=True))
    got = module(Inputs(q=v, k=v, v=v, x=v[:, 0], grid=(6,), causal=True))[0, 0, :, 0]
    a, b = module.conv.weight[0, 0]
    line = v[0, 0, :, 0]
    want = b * line + a * F.pad(line, (1, 0))[:-1] + module.conv.bias
    torch.testing.assert_close(got, want)
