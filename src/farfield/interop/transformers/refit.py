"""Output projections fitted anew, in closed form: what a converted layer lost, as far as a linear map restores it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from farfield.interop.transformers.structure import (
    Block,
    adds_to_state,
    blocks,
    check_pair,
    entered,
    first_output,
    output_projection,
)

__all__ = ["RIDGES", "TARGETS", "Moments", "Refit", "check_refit", "refit"]

RIDGES = (1e-9, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Strengths to choose from, relative to the mean square of the heads' outputs."""

TARGETS = ("state", "output")
"""What a layer is fitted to: the original's state after its attention, or what its attention adds to the state."""

RUN = 64
"""Tokens of a run; every fourth run of a window is held out."""

_ROWS = 2048
"""Tokens that are in float64 at once."""


class Refit(NamedTuple):
    """What became of one layer.

    Attributes:
        before, after: mean squared error of held-out tokens, relative to the square of the original's state.
        ridge: the strength chosen; None where the projection stays as it is, since no fit lowered the error.
    """

    before: float
    after: float
    ridge: float | None


class Moments:
    """Sums over tokens that a weighted least squares fit of `errors ~ change [inputs, 1]` rests on, in float64.

    Args:
        inputs, outputs: widths.
        device: of the sums.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs + 1, outputs, dtype=torch.float64, device=device)
        self.square, self.tokens = 0.0, 0

    def add(self, inputs: Tensor, errors: Tensor, weight: Tensor) -> None:
        """Takes in inputs `[n, inputs]`, errors `[n, outputs]`, weight `[n]`; O(n inputs (inputs + outputs))."""
        for start in range(0, len(inputs), _ROWS):
            a, e, w = (x[start : start + _ROWS].double() for x in (inputs, errors, weight))
            a = torch.cat([a, a.new_ones(len(a), 1)], 1)
            self.gram += a.mT @ (w[:, None] * a)
            self.cross += a.mT @ (w[:, None] * e)
            self.square += float((w * e.square().sum(1)).sum())
            self.tokens += len(a)

    def error(self, change: Tensor | None = None) -> float:
        """Mean over tokens of the weighted squared error that is left by ``change`` `[inputs + 1, outputs]`."""
        left = self.square
        if change is not None:
            left += float((change * (self.gram @ change - 2 * self.cross)).sum())
        return left / max(self.tokens, 1)

    def fits(self, ridges: Sequence[float], bias: bool) -> list[Tensor]:
        """The change for every ridge, `[inputs + 1, outputs]` each; the last row, the bias', is 0 where there is none.

        The ridge draws changes of the weight towards 0, never the weight itself, and leaves the bias free. All ridges
        share one decomposition, O(inputs^3).
        """
        gram, cross = self.gram[:-1, :-1], self.cross[:-1]
        mean, total = self.gram[-1, :-1], self.gram[-1, -1]
        if bias:
            gram = gram - torch.outer(mean, mean) / total
            cross = cross - torch.outer(mean, self.cross[-1]) / total
        values, vectors = torch.linalg.eigh(gram)
        turned = vectors.mT @ cross
        scale = gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        made = []
        for ridge in ridges:
            weight = vectors @ (turned / (values.clamp_min(0.0) + ridge * scale)[:, None])
            offset = (self.cross[-1] - mean @ weight) / total if bias else torch.zeros_like(weight[0])
            made.append(torch.cat([weight, offset[None]]))
        return made


@torch.no_grad()
def refit(
    model: Any,
    original: Any,
    windows: Sequence[Tensor],
    *,
    target: str = "state",
    ridges: Sequence[float] = RIDGES,
    progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[Refit]:
    """Fits the output projection of every attention layer so that the converted model's states follow the original's.

    Layer after layer, on the states of the converted model as it is by then: ridge regression of what the layer misses
    on what its heads hand to the projection. Every token's error counts relative to the square of the original's state
    there, which is how the norm that follows sees it. The ridge is the one with the least error on held-out tokens
    (every fourth run of 64 in each window), which the fit does not see; where none lowers it, the layer stays as it is.

    Costs one pass of the original and two of the model over all windows, and O(tokens heads^2 dim^2) for the sums. Of
    both models, hidden states `[N, width]` of every window are kept, and nothing of more than one layer.

    Args:
        model: converted, changed in place; only output projections change, and biases where there are some already.
        original: what it was converted from.
        windows: token ids [N] each, at least 256.
        target: "state" fits the state after the attention, and so undoes what earlier layers have lost too; "output"
            fits what the original's attention adds, for models where nothing reads the state between attention and MLP.
        ridges: strengths to choose from.
        progress: called after each layer with the layers done and all of them.
        should_stop: asked before each layer; later layers stay as they are.

    Returns:
        What became of each layer, in order.

    Raises:
        ValueError: for models that do not fit each other, have no output projection that can be fitted, or do not add
            it to the state; for windows that are too short.
        ArithmeticError: when numbers are not finite.
    """
    check_refit(model, original, windows, target)
    ours, theirs = blocks(model), blocks(original)
    states, calls = entered(model, list(windows))
    expected, original_calls = entered(original, list(windows))
    found: list[Refit] = []
    for number, (block, other) in enumerate(zip(ours, theirs, strict=True)):
        if should_stop is not None and should_stop():
            break
        made = _Layer(block, other, number, target)
        results = []
        for window, (state, wanted) in enumerate(zip(states, expected, strict=True)):
            expected[window], out = made.step(state, wanted, calls[window][number], original_calls[window][number])
            results.append(out)
        told = made.solve(ridges)
        found.append(told)
        for window, state in enumerate(states):
            args, kwargs = calls[window][number]
            # Where the projection stays, so does what the layer gave.
            same = told.ridge is None
            states[window] = results[window] if same else first_output(block.layer(state, *args, **kwargs))
        if progress is not None:
            progress(number + 1, len(ours))
    return found


def check_refit(model: Any, original: Any, windows: Sequence[Tensor], target: str) -> None:
    """Checks what :func:`refit` is asked for.

    Raises:
        ValueError: as that does.
    """
    check_pair(original, model)
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: one of {', '.join(map(repr, TARGETS))} would be accepted")
    short = [len(ids) for ids in windows if len(ids) < 4 * RUN]
    if short or not windows:
        raise ValueError(
            f"windows of {short or 'no'} tokens: at least one window is needed, and {4 * RUN} tokens in each, of which "
            f"every fourth run of {RUN} is held out"
        )
    for block in (*blocks(model), *blocks(original)):
        output_projection(block)
    if target == "state" and not (adds_to_state(model) and adds_to_state(original)):
        raise ValueError(
            f"target='state': in {type(model).__name__} the attention's output does not reach the state as it is (a "
            "norm or a factor between, or an MLP beside it); target='output' would be accepted"
        )


class _Layer:
    """One layer of both models: what its projection misses, and the fit."""

    def __init__(self, block: Block, other: Block, number: int, target: str) -> None:
        self.block, self.other, self.number, self.target = block, other, number, target
        self.projection, self.pattern = output_projection(block), output_projection(other)
        weight = self.projection.weight
        self.fit, self.held = (Moments(weight.shape[1], weight.shape[0], weight.device) for _ in range(2))

    def step(self, state: Tensor, wanted: Tensor, call: Any, other_call: Any) -> tuple[Tensor, Tensor]:
        """Takes one window in; gives the states after the layer, the original's and the model's, `[1, N, width]`."""
        kept: dict[str, Tensor] = {}

        def ours(_: nn.Module, args: Any, out: Tensor) -> None:
            kept["inputs"], kept["given"] = args[0], out

        def theirs(_: nn.Module, __: Any, out: Tensor) -> None:
            kept["pattern"] = out

        handles = [self.projection.register_forward_hook(ours), self.pattern.register_forward_hook(theirs)]
        try:
            after = first_output(self.block.layer(state, *call[0], **call[1]))
            wanted_after = first_output(self.other.layer(wanted, *other_call[0], **other_call[1]))
        finally:
            for handle in handles:
                handle.remove()
        missing = kept["pattern"].float() - kept["given"].float()
        if self.target == "state":
            missing = missing + (wanted.float() - state.float())
        square = (wanted.float() + kept["pattern"].float()).square().sum(-1)
        weight = 1.0 / square.clamp_min(torch.finfo(torch.float32).tiny)
        tokens = state.shape[1]
        held = torch.arange(tokens, device=state.device) // RUN % 4 == 3
        for moments, rows in ((self.fit, ~held), (self.held, held)):
            moments.add(kept["inputs"][0, rows], missing[0, rows], weight[0, rows])
        return wanted_after, after

    def solve(self, ridges: Sequence[float]) -> Refit:
        """Chooses by the held-out tokens, and changes the projection where that lowers their error."""
        before = self.held.error()
        if not torch.isfinite(self.fit.gram).all() or not torch.isfinite(self.fit.cross).all():
            raise ArithmeticError(f"layer {self.number}: hidden states that are not finite; the model cannot be fitted")
        changes = self.fit.fits(ridges, self.projection.bias is not None)
        errors = [self.held.error(change) for change in changes]
        best = min(range(len(ridges)), key=errors.__getitem__)
        if not errors[best] < before:
            return Refit(before, before, None)
        projection, change = self.projection, changes[best]
        projection.weight.copy_((projection.weight.double() + change[:-1].mT).to(projection.weight.dtype))
        if projection.bias is not None:
            projection.bias.copy_((projection.bias.double() + change[-1]).to(projection.bias.dtype))
        return Refit(before, max(errors[best], 0.0), ridges[best])
