"""The decoder layers of a Transformers causal language model, found by structure and called one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from farfield.interop.transformers import cores

__all__ = ["Block", "Calls", "adds_to_state", "blocks", "check_pair", "entered", "first_output", "output_projection"]

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
"""Names under which attention layers keep their output projection."""

_SHORT = 16
"""Tokens on which a model is asked how it is built."""

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]
"""What every layer is called with beside its hidden states."""


class Block(NamedTuple):
    """A decoder layer.

    Attributes:
        name: in the model, such as ``model.layers.3``.
        layer: the module, from hidden states `[B, N, width]` to hidden states.
        attention: the attention layer in it.
    """

    name: str
    layer: nn.Module
    attention: nn.Module


def blocks(model: Any) -> list[Block]:
    """The decoder layers of a model, in order.

    Raises:
        ValueError: for a model that is no plain list of layers with one attention each.
    """
    found: dict[str, Block] = {}
    for name, attention in cores.attention_layers(model).items():
        owner = _owner(model, name)
        if owner is None or owner in found:
            what = "lies in no list of layers" if owner is None else f"is the second attention in {owner}"
            raise ValueError(
                f"{type(model).__name__}: the attention layer {name} {what}; models that are one list of layers with "
                "one attention each would be accepted"
            )
        found[owner] = Block(owner, model.get_submodule(owner), attention)
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer that uses Transformers' attention interface")
    return list(found.values())


def _owner(model: Any, name: str) -> str | None:
    """The name of the list item that holds a module."""
    pieces = name.split(".")
    for i, piece in enumerate(pieces):
        if piece.isdecimal() and isinstance(model.get_submodule(".".join(pieces[:i])), nn.ModuleList):
            return ".".join(pieces[: i + 1])
    return None


def output_projection(block: Block) -> nn.Linear:
    """The linear layer that takes the heads' outputs back to the model's width.

    Raises:
        ValueError: when there is none, or it is of another kind, with the reason.
    """
    for name in OUTPUTS:
        child = getattr(block.attention, name, None)
        if child is None:
            continue
        if isinstance(child, nn.Linear) and child.weight.is_floating_point():
            return child
        raise ValueError(
            f"{block.name}: the output projection {name} is a {type(child).__name__}, which keeps its weight in "
            "another form; an nn.Linear of floating point numbers would be accepted"
        )
    raise ValueError(
        f"{block.name}: no output projection in {type(block.attention).__name__}; it is looked for as "
        f"{', '.join(OUTPUTS)}"
    )


def check_pair(original: Any, model: Any) -> None:
    """Checks that two models can be compared layer by layer and token by token.

    Raises:
        ValueError: for different numbers of layers, widths or vocabularies.
    """

    def sizes(of: Any) -> tuple[int, int, int]:
        return len(blocks(of)), of.get_input_embeddings().weight.shape[1], of.get_output_embeddings().weight.shape[0]

    (a, b) = sizes(original), sizes(model)
    if a != b:
        told = ["{} layers of width {:,}, {:,} tokens in the vocabulary".format(*x) for x in (a, b)]
        raise ValueError(
            f"the original has {told[0]}, the converted model {told[1]}: two forms of one model are needed"
        )


def first_output(out: Any) -> Tensor:
    """The hidden states among what a layer returns."""
    hidden: Tensor = out if isinstance(out, Tensor) else out[0]
    return hidden


@contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _short_run(model: Any, handles: list[Any]) -> None:
    device = next(model.parameters()).device
    with _hooked(handles), torch.no_grad():
        model.base_model(torch.arange(_SHORT, device=device)[None] % model.config.vocab_size, use_cache=False)


def _returns_tensors(model: Any, found: list[Block]) -> list[bool]:
    """Whether each layer returns its hidden states as they are, and not first in a tuple."""
    kinds: list[bool] = []
    handles = [
        block.layer.register_forward_hook(lambda _, __, out: kinds.append(isinstance(out, Tensor))) for block in found
    ]
    _short_run(model, handles)
    return kinds


def adds_to_state(model: Any) -> bool:
    """Whether every layer adds its attention's output to its hidden states as it is, and something reads the sum.

    Not so where a norm or a factor stands between (Gemma 2 and 3, Granite), or attention and MLP read the same state.
    """
    found = blocks(model)
    sums: list[Tensor] = []
    seen: list[bool] = []
    handles: list[Any] = []

    def watch(block: Block) -> None:
        kept: dict[str, Tensor] = {}

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            kept["state"] = args[0] if args else kwargs["hidden_states"]
            seen.append(False)

        def project(_: nn.Module, __: Any, out: Tensor) -> None:
            sums.append(kept["state"] + out)

        def read(_: nn.Module, args: Any, kwargs: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()), None)
            if sums and isinstance(given, Tensor) and given.shape == sums[-1].shape:
                seen[-1] = seen[-1] or bool(torch.allclose(given, sums[-1], rtol=1e-5, atol=1e-6, equal_nan=True))

        handles.append(block.layer.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(output_projection(block).register_forward_hook(project))
        handles.extend(c.register_forward_pre_hook(read, with_kwargs=True) for c in block.layer.children())

    for block in found:
        watch(block)
    _short_run(model, handles)
    return all(seen)


@torch.no_grad()
def entered(model: Any, windows: list[Tensor]) -> tuple[list[Tensor], list[Calls]]:
    """What goes into the first layer for every window `[N]`, and what every layer is called with beside it.

    The layers themselves are passed over, so this costs next to nothing.

    Returns:
        Hidden states `[1, N, width]` of every window, and its calls, one for each layer.
    """
    found = blocks(model)
    tensors = _returns_tensors(model, found)
    device = next(model.parameters()).device
    hidden: list[Tensor] = []
    calls: list[Calls] = []

    def pass_over(number: int, tensor: bool) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            state = args[0] if args else kwargs.pop("hidden_states")
            if number == 0:
                hidden.append(state)
            calls[-1].append((args[1:], kwargs))
            return state if tensor else (state,)

        return forward

    try:
        for number, (block, tensor) in enumerate(zip(found, tensors, strict=True)):
            block.layer.forward = pass_over(number, tensor)
        for ids in windows:
            calls.append([])
            model.base_model(ids.to(device)[None], use_cache=False)
    finally:
        for block in found:
            block.layer.__dict__.pop("forward", None)
    return hidden, calls
