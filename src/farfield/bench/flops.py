"""What a vision model computes in one forward pass: FLOPs counted as it runs, attention by the cost model.

A multiply-add is 2 FLOPs. Linear maps and convolutions are counted from the shapes that pass through them, attention
by :mod:`farfield.bench.model` (useful pairs only). Norms, activations and interpolations are left out.

A model on the meta device is counted by shapes alone: nothing is computed, and no memory is used.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from farfield.attention import Attention
from farfield.bench.case import Case
from farfield.bench.model import is_known, work_of

__all__ = ["Count", "count_flops"]


@dataclass(frozen=True)
class Count:
    """One model at one size.

    Attributes:
        parameters: trained numbers.
        maps: FLOPs of linear maps and convolutions; None for a model on the meta device with a part that the cost model
            does not know: its course may depend on the content (opened cells), so that shapes do not tell.
        attention: FLOPs of the attention between its projections; None when a part is not known to the cost model.
    """

    parameters: int
    maps: int | None
    attention: int | None

    @property
    def flops(self) -> int | None:
        """All of them; None where some are not known."""
        return None if self.maps is None or self.attention is None else self.maps + self.attention


def count_flops(model: nn.Module, channels: int, grid: tuple[int, ...]) -> Count:
    """Counts one forward pass of a single input `[1, channels, *grid]`.

    Raises:
        ValueError: when the model refuses that input.
    """
    parameters = sum(p.numel() for p in model.parameters())
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    by_shapes = next(model.parameters()).device.type == "meta"
    if by_shapes and not all(is_known(part) for layer in attentions for part in (layer.near_spec, layer.far_spec)):
        return Count(parameters, None, None)
    maps = 0
    met: list[tuple[Attention, Case]] = []

    def matrix(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal maps
        assert isinstance(module, nn.Linear)
        maps += 2 * module.in_features * output.numel()

    def convolve(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal maps
        assert isinstance(module, nn.Conv2d | nn.Conv3d)
        maps += 2 * module.weight[0].numel() * output.numel()

    def attend(module: nn.Module, inputs: Any, keywords: dict[str, Any], output: Tensor) -> None:
        assert isinstance(module, Attention)
        spec = module.spec
        where = keywords.get("grid") or (output.shape[1],)
        met.append((module, Case(tuple(where), heads=spec.num_heads, head_dim=spec.head_dim)))

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(matrix))
        elif isinstance(module, nn.Conv2d | nn.Conv3d):
            hooks.append(module.register_forward_hook(convolve))
        elif isinstance(module, Attention):
            hooks.append(module.register_forward_hook(attend, with_kwargs=True))
    training = model.training
    try:
        model.eval()
        (_shapes if by_shapes else _run)(model, (1, channels, *grid))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    attention: float | None = 0.0
    for module, case in met:
        work = work_of(module.near_spec, module.far_spec, case)
        attention = None if work is None or attention is None else attention + work.flops(case, "forward")
    return Count(parameters, maps, None if attention is None else round(attention))


def _run(model: nn.Module, shape: tuple[int, ...]) -> None:
    """One forward pass where the model lies."""
    with torch.no_grad():
        model(torch.zeros(shape, device=next(model.parameters()).device))


def _shapes(model: nn.Module, shape: tuple[int, ...]) -> None:
    """One forward pass of shapes: as on a CPU, since parts ask for the device, but of tensors that hold nothing."""
    with torch.no_grad(), FakeTensorMode():
        state = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype)
            for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
        }
        functional_call(model, state, (torch.zeros(shape),))
