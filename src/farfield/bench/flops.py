"""What a vision model computes in one forward pass: FLOPs counted as it runs, attention by the cost model.

A multiply-add is 2 FLOPs. Linear maps and convolutions are counted from the shapes that pass through them, attention
by :mod:`farfield.bench.model` (useful pairs only). Norms, activations and interpolations are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from farfield.attention import Attention
from farfield.bench.case import Case
from farfield.bench.model import work_of

__all__ = ["Count", "count_flops"]


@dataclass(frozen=True)
class Count:
    """One model at one size.

    Attributes:
        parameters: trained numbers.
        maps: FLOPs of linear maps and convolutions.
        attention: FLOPs of the attention between its projections; None when a part is not known to the cost model.
    """

    parameters: int
    maps: int
    attention: int | None

    @property
    def flops(self) -> int | None:
        """All of them; None where the attention's are not known."""
        return None if self.attention is None else self.maps + self.attention


def count_flops(model: nn.Module, channels: int, grid: tuple[int, ...]) -> Count:
    """Counts one forward pass of a single input `[1, channels, *grid]`.

    Raises:
        ValueError: when the model refuses that input.
    """
    maps = 0
    pairs: list[float | None] = []

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
        case = Case(tuple(where), heads=spec.num_heads, head_dim=spec.head_dim)
        work = work_of(module.near_spec, module.far_spec, case)
        pairs.append(None if work is None else work.flops(case, "forward"))

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(matrix))
        elif isinstance(module, nn.Conv2d | nn.Conv3d):
            hooks.append(module.register_forward_hook(convolve))
        elif isinstance(module, Attention):
            hooks.append(module.register_forward_hook(attend, with_kwargs=True))
    training = model.training
    device = next(model.parameters()).device
    try:
        model.eval()
        with torch.no_grad():
            model(torch.zeros(1, channels, *grid, device=device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    known = [p for p in pairs if p is not None]
    attention = round(sum(known)) if len(known) == len(pairs) else None
    return Count(sum(p.numel() for p in model.parameters()), maps, attention)
