"""What can be measured beside each other: recipes of farfield by name and options, and peers (:mod:`.peers`).

Everything is measured at its *core*, on ready queries, keys and values [B, H, N, D], where it allows that; what has its
own projections is measured as a *layer* on [B, N, H * D], and says so.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from farfield import recipes
from farfield.attention import Attention
from farfield.bench import model
from farfield.bench.case import Case
from farfield.bench.model import Work, work_of
from farfield.far.pyramid import Pyramid
from farfield.near.blocks import Blocks
from farfield.near.dense import Dense
from farfield.near.window import Window
from farfield.ops.multipole import ENGINES, Request, multipole_attention
from farfield.ops.multipole.engines import choose
from farfield.ops.window import window_attention
from farfield.parts import Inputs as LayerInputs

__all__ = ["Built", "Refused", "Subject", "installed", "recipe", "split_label"]


class Refused(Exception):
    """Something cannot be measured on a case; the message says why, in one sentence."""


@dataclass(frozen=True)
class Built:
    """Something ready to run on one case.

    Attributes:
        run: called with q, k, v (a core) or x (a layer), each as ``into`` made it; returns the output.
        parameters: tensors whose gradients belong to a backward pass, beside those of the inputs.
        into: brings an input of farfield's layout into its own, outside the measured time.
        back: brings its output to [B, H, N, D]; None where the output is not comparable with exact attention.
        why_no_error: why it is not.
        engine: what computes, where there is a choice.
    """

    run: Callable[..., Tensor]
    parameters: tuple[Tensor, ...] = ()
    into: Callable[[Tensor], Tensor] = field(default=lambda x: x)
    back: Callable[[Tensor], Tensor] | None = field(default=lambda x: x)
    why_no_error: str | None = None
    engine: str | None = None


@dataclass(frozen=True)
class Subject:
    """Something that can be measured.

    Attributes:
        label: its name in tables, with the options that were given.
        make: prepares a case; raises :class:`Refused` (or ValueError, TypeError) with the reason where it cannot.
        work: what the cost model counts for a case, or None where that is not known.
        level: "core" or "layer".
        decode: one query [B, H, 1, D] against all keys and values, where it can; otherwise ``why_no_decode``.
        decode_work: what the cost model counts for that.
        why_not: why it cannot run here at all, or None.
        modes: why it cannot run a mode on a case, or None.
        scores: whether it holds the whole [N, N] matrix of scores, so that memory is known before the first run.
        peer: whether it is not farfield's own.
    """

    label: str
    make: Callable[[Case], Built]
    work: Callable[[Case], Work | None]
    level: str = "core"
    decode: Callable[[Case], Built] | None = None
    decode_work: Callable[[Case], Work | None] = model.decode
    why_no_decode: str = "it has no decoding step here"
    why_not: str | None = None
    modes: Callable[[Case, str], str | None] = field(default=lambda case, mode: None)
    scores: bool = False
    peer: bool = False


def installed(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def split_label(text: str) -> tuple[str, list[str]]:
    """("fma", ["block=32", "impl=torch"]) from ``fma:block=32,impl=torch``; commas inside brackets belong to a value.

    Raises:
        ValueError: without a name, or with colons between options, as `farfield study` has them.
    """
    name, _, rest = text.strip().partition(":")
    if not name:
        raise ValueError(f"{text!r} names no attention; write NAME or NAME:option=value,option=value")
    if re.search(r"=[^,]*:\s*[A-Za-z_][\w-]*\s*=", rest):
        raise ValueError(f"{text!r}: options are separated by commas, as in {name}:{rest.replace(':', ',')}")
    return name, [piece for piece in re.split(r",(?=\s*[A-Za-z_][\w-]*\s*=)", rest) if piece.strip()]


def recipe(name: str, options: dict[str, Any], label: str) -> Subject:
    """A recipe of farfield, measured between its projections.

    Options are the recipe's, ``impl``, the engine, where its operator has several, and ``layer``, the index of the
    layer, for recipes that alternate. A recipe whose level bias can be left out is measured without one unless an
    option gives it: a fresh layer starts so far below 0 that its far field would be silent, and every trained layer
    has its own.

    Raises:
        ValueError: for an unknown recipe, option or engine.
    """
    found = recipes.get(name)
    given = dict(options)
    impl, index = given.pop("impl", None), given.pop("layer", 0)
    known = found.options()
    for option in given:
        if option not in known:
            listed = ", ".join([*known, *(["impl"] if _engines(name) else []), "layer"])
            raise ValueError(f"{label!r}: recipe {name!r} has no option {option!r}; its options: {listed}")
    if impl is not None and impl not in _engines(name):
        listed = ", ".join(_engines(name)) or "none, its operator has one engine only"
        raise ValueError(f"{label!r}: impl={impl!r} is not an engine of {name!r}; its engines: {listed}")
    if "bias" in known:
        given.setdefault("bias", None)

    def layer(case: Case) -> Attention:
        return found.build(case.width, case.heads, causal=case.causal, dims=case.dims, layer=index, **given)

    def make(case: Case) -> Built:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # fresh weights are the same in every run
            built = layer(case).to(case.device, case.torch_dtype).eval()
        inner = [part for part in (built.near, built.far, built.merge) if part is not None]
        parameters = tuple(p for part in inner for p in part.parameters())
        if impl is None:
            engine = _engine(built, case)
            return Built(_core(built, case), parameters, engine=engine)
        if impl in ENGINES and not isinstance(built.near_spec, Window):
            engine = choose(impl, _request(built, case))
            return Built(_multipole(built, case, engine), parameters, engine=engine)
        return Built(_window(built, case, impl), parameters, engine=impl)

    def work(case: Case) -> Work | None:
        built = layer(case)
        return work_of(built.near_spec, built.far_spec, case)

    def decode(case: Case) -> Built:
        if impl is not None:
            raise Refused(f"impl={impl!r} is an engine for whole sequences; a stream has one way only")
        if not case.causal:
            raise Refused("a stream takes tokens in as they come, and this case is not causal")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            built = layer(case).to(case.device, case.torch_dtype).eval()
        return Built(_stream(built, case), why_no_error="not computed in decoding")

    def decode_work(case: Case) -> Work | None:
        if case.tokens == 1:
            return work(case)
        # What the last token adds: no earlier one changes by it.
        both = work(case), work(replace(case, grid=(case.tokens - 1,)))
        return None if both[0] is None or both[1] is None else both[0] - both[1]

    return Subject(label, make, work, decode=decode, decode_work=decode_work, scores=impl == "reference")


def _engines(name: str) -> tuple[str, ...]:
    """The engines that an entry of this recipe may name."""
    from farfield.ops.window.api import ENGINES as WINDOWS

    if name in ("fma", "fma2d", "blocks"):
        return ENGINES
    return WINDOWS if name in ("window", "na", "dina", "gna") else ()


def _request(layer: Attention, case: Case) -> Request:
    far = layer.far_spec
    kind, pooled = (far.summary, far.query_rank is not None) if isinstance(far, Pyramid) else ("mean", False)
    return Request(torch.device(case.device), case.torch_dtype, case.head_dim, kind, pooled)


def _engine(layer: Attention, case: Case) -> str | None:
    """What a layer runs on, as far as it has a choice."""
    if isinstance(layer.near_spec, Dense) and layer.far_spec is None:
        return "sdpa"
    if isinstance(layer.near_spec, Blocks):
        return choose(None, _request(layer, case))
    return None


def _core(layer: Attention, case: Case) -> Callable[..., Tensor]:
    """A layer between its projections."""
    x = torch.zeros(1, device=case.device, dtype=case.torch_dtype).expand(case.batch, case.tokens, case.width)
    reads_x = _reads_x(layer)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # What reads the layer's input beside q, k and v (landmarks, gates) gets the queries side by side.
        given = q.transpose(1, 2).flatten(2) if reads_x else x
        return layer.attend(LayerInputs(q, k, v, given, case.grid, causal=case.causal, scale=layer.scale))

    return run


def _stream(layer: Attention, case: Case) -> Callable[..., Tensor]:
    """One step of a layer's stream between its projections.

    The first call takes all tokens but the last in; every call takes the last one in (again) and attends from it.
    """
    state = layer.stream(case.batch, rewind=0)
    reads_x = _reads_x(layer)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = q.transpose(1, 2).flatten(2) if reads_x else q.new_empty(q.shape[0], q.shape[2], 0)
        return layer.attend_step(LayerInputs(q, k, v, x, (q.shape[2],), causal=True, scale=layer.scale), state)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if state.lengths[0] == 0 and k.shape[2] > 1:
            # Any queries do: what they attend to is thrown away.
            step(torch.zeros_like(k[:, :, :-1]), k[:, :, :-1], v[:, :, :-1])
        return step(q, k[:, :, -1:], v[:, :, -1:])

    return run


def _reads_x(layer: Attention) -> bool:
    """Whether a part looks at the layer's input: one with weights as wide as the layer."""
    inner = [part for part in (layer.near, layer.far, layer.merge) if part is not None]
    return any(isinstance(m, nn.Linear) and m.in_features == layer.spec.dim for part in inner for m in part.modules())


def _multipole(layer: Attention, case: Case, engine: str) -> Callable[..., Tensor]:
    """The operator of a layer made of blocks, with one engine for all calls."""
    near, far = layer.near_spec, layer.far_spec
    assert isinstance(near, Blocks)
    settings: dict[str, Any] = {
        "grid": case.grid, "block": near.block, "causal": case.causal, "scale": layer.scale, "impl": engine,
    }  # fmt: skip
    if far is None:
        settings |= {"rank": 1, "part": "near"}
        return lambda q, k, v: _tensor(multipole_attention(q, k, v, **settings))
    assert isinstance(far, Pyramid)
    module: Any = layer.far
    settings |= {
        "rank": far.rank, "levels": far.levels, "count_bias": far.count_bias,
        "query_rank": far.query_rank, "sinks": far.sinks,
    }  # fmt: skip

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _tensor(multipole_attention(q, k, v, summary=module.summary(), level_bias=module.biases(), **settings))

    return run


def _window(layer: Attention, case: Case, engine: str) -> Callable[..., Tensor]:
    near = layer.near_spec
    assert isinstance(near, Window)
    size, stride, dilation = near.rule(case.grid)
    settings: dict[str, Any] = {
        "window": size, "stride": stride, "dilation": dilation, "grid": case.grid, "causal": case.causal,
        "scale": layer.scale, "impl": engine,
    }  # fmt: skip
    return lambda q, k, v: _tensor(window_attention(q, k, v, **settings))


def _tensor(out: object) -> Tensor:
    """The output of an operator that was asked for nothing else."""
    assert isinstance(out, Tensor)
    return out


def names(subjects: Sequence[Subject]) -> list[str]:
    """Labels, in order.

    Raises:
        ValueError: when one comes twice.
    """
    labels = [s.label for s in subjects]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is named twice; name each once")
    return labels
