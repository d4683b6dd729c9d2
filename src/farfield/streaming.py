"""Decoding: what a layer keeps of the tokens so far, and how it takes in the next ones.

A :class:`StreamState` holds the tensors of the layer's parts, the number of tokens of every row, and nothing of the
weights. A part that can be streamed builds a :class:`StreamModule`, which knows how to make, extend and attend to its
cache; a :class:`Decoder` puts near field, far field and merge together. States are data: they are reordered, rewound,
copied, moved and saved without the layer.

Rows of one batch may have different lengths. Runs of neighbouring rows of one length are computed together.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farfield.ops.cache import Cache, grown
from farfield.ops.state import AttentionState
from farfield.parts import Inputs

__all__ = ["Decoder", "StackState", "StreamModule", "StreamSpec", "StreamState", "row_positions"]

_FORMAT = "3"


@dataclass(frozen=True)
class StreamSpec:
    """What a cache is made for.

    Attributes:
        batch_size: B.
        num_heads, num_kv_heads, head_dim: Hq, Hkv, D.
        rewind: tokens that can be taken back.
        rope: whether keys will come with a rotary embedding still to be applied.
        dtype, device: of queries, keys and values.
    """

    batch_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rewind: int
    rope: bool
    dtype: torch.dtype
    device: torch.device

    def zeros(self, places: int, width: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """[B, Hkv, places, width or D] zeros; a normal tensor in inference mode too, since later steps write to it."""
        shape = (self.batch_size, self.num_kv_heads, places, self.head_dim if width is None else width)
        with torch.inference_mode(False):
            return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)


class StreamModule(nn.Module):
    """The module of a part that can be streamed. Its cache is a dict of tensors with the batch first."""

    def why_no_stream(self, spec: StreamSpec) -> str | None:
        """Why this part cannot be streamed so, or None."""
        return None

    def empty_cache(self, spec: StreamSpec) -> Cache:
        """The cache of rows without tokens."""
        raise NotImplementedError

    def reserve(self, cache: Cache, length: int, rewind: int) -> None:
        """Makes room for rows of ``length`` tokens, by putting larger tensors into the dict where it has to."""

    def resume(self, cache: Cache, length: int, rewind: int) -> None:
        """Brings what the cache derives from the length in order, after rows were cut to ``length`` tokens."""

    def step(self, inputs: Inputs, cache: Cache, length: int, rewind: int, need_lse: bool) -> AttentionState | Tensor:
        """Takes tokens in and attends from each. Called without gradients.

        Args:
            inputs: T >= 1 tokens that follow the first ``length``; grid (T,), causal, positions counted from the start
                of the sequence.
            cache: of exactly these rows; written in place, or given tensors of another length where that hangs on what
                the tokens are.
            length: tokens in the cache.
            rewind: tokens that can be taken back, as the cache was made.
            need_lse: whether an attention state is wanted, from parts that give one.

        Returns:
            An attention state, or [B, Hq, T, D]. The rows are the last T of ``forward`` on all ``length + T`` tokens.
        """
        raise NotImplementedError


class StreamState:
    """What one layer keeps of the tokens so far. Made by ``layer.stream``, written in place by ``layer.step``.

    Attributes:
        layer: the description of the layer it was made for.
        lengths: tokens of every row.
        limit: tokens that can be taken back.
        caches: tensors by part and name, the batch first.
    """

    def __init__(
        self,
        layer: str,
        caches: dict[str, Cache],
        lengths: Sequence[int],
        limit: int,
        *,
        furthest: Sequence[int] | None = None,
        dirty: bool = False,
    ) -> None:
        self.layer, self.caches, self.limit = layer, caches, limit
        self.lengths = list(lengths)
        self._furthest = list(self.lengths if furthest is None else furthest)
        self._dirty = dirty

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, room that is not yet used included."""
        return sum(t.nbytes for t in self._tensors())

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return next(self._tensors()).device

    def _tensors(self) -> Iterator[Tensor]:
        for cache in self.caches.values():
            yield from cache.values()

    def _with(self, change: Callable[[Tensor], Tensor], rows: Sequence[int] | None = None) -> StreamState:
        with torch.inference_mode(False), torch.no_grad():
            caches = {part: {name: change(t) for name, t in cache.items()} for part, cache in self.caches.items()}
        rows = range(self.batch_size) if rows is None else rows
        return StreamState(
            self.layer,
            caches,
            [self.lengths[i] for i in rows],
            self.limit,
            furthest=[self._furthest[i] for i in rows],
            dirty=self._dirty,
        )

    def reorder(self, rows: Tensor | Sequence[int]) -> StreamState:
        """A new state whose row i is a copy of row ``rows[i]``: beam search. Rows may come twice or not at all.

        Raises:
            ValueError: for anything but a list of row numbers.
        """
        chosen = _row_numbers(rows, self.batch_size)
        index = torch.tensor(chosen, device=self.device)
        return self._with(lambda t: t.index_select(0, index), chosen)

    def rewind(self, tokens: int | Sequence[int]) -> None:
        """Takes the last tokens back, in place; speculative decoding.

        Args:
            tokens: how many, one number for all rows or one for each.

        Raises:
            ValueError: when a row has fewer, or more than ``limit`` tokens lie between its new end and the furthest
                it has been.
        """
        many = [tokens] * self.batch_size if isinstance(tokens, int) else [int(n) for n in tokens]
        if len(many) != self.batch_size:
            raise ValueError(f"rewind got {len(many)} numbers for {self.batch_size} rows: one for each, or one for all")
        for row, (n, length, furthest) in enumerate(zip(many, self.lengths, self._furthest, strict=True)):
            most = min(length, self.limit - (furthest - length))
            if not 0 <= n <= most:
                raise ValueError(
                    f"rewind({n}) of row {row}, which has {length} tokens and has had {furthest}: 0 to {most} would be "
                    f"accepted; the state was made to take back up to {self.limit} (stream(..., rewind={self.limit}))"
                )
        if any(many):
            self.lengths = [length - n for length, n in zip(self.lengths, many, strict=True)]
            self._dirty = True

    def clone(self) -> StreamState:
        """A copy that shares nothing with this one."""
        return self._with(torch.Tensor.clone)

    def detach(self) -> StreamState:
        """This state: its tensors carry no gradients."""
        return self

    def to(self, device: torch.device | str) -> StreamState:
        """A state on that device; dtypes belong to the layer and stay. Shares tensors that are there already."""
        place = torch.device(device)
        return self._with(lambda t: t.to(place))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves to one safetensors file (JSON in its header); an older file is replaced in one step.

        Raises:
            ModuleNotFoundError: without the extra ``cli`` (safetensors).
        """
        _save(path, [self])

    @staticmethod
    def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> StreamState:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: when the file is damaged or something else, with the reason.
            ModuleNotFoundError: without the extra ``cli`` (safetensors).
        """
        states = _load(path, device)
        if len(states) != 1:
            raise ValueError(f"{path} holds the states of {len(states)} layers; StackState.load reads it")
        return states[0]

    def check(self, layer: str, batch: int, device: torch.device) -> None:
        """Raises ValueError when the state was not made for this layer, batch and device."""
        if self.layer != layer:
            raise ValueError(f"the state was made for another layer:\n  state: {self.layer}\n  layer: {layer}")
        if batch != self.batch_size:
            raise ValueError(f"the state has {self.batch_size} rows, the tokens come in a batch of {batch}")
        if self.device != device:
            raise ValueError(f"the state lies on {self.device}, the tokens on {device}; use state.to({str(device)!r})")

    def advance(self, counts: Sequence[int]) -> None:
        """Counts the tokens that a step took in."""
        self.lengths = [length + n for length, n in zip(self.lengths, counts, strict=True)]
        self._furthest = [max(a, b) for a, b in zip(self._furthest, self.lengths, strict=True)]

    def take_dirty(self) -> bool:
        """Whether rows were rewound since the last call."""
        dirty, self._dirty = self._dirty, False
        return dirty

    def header(self) -> dict[str, Any]:
        """Everything but the tensors, for JSON."""
        return {
            "layer": self.layer,
            "lengths": self.lengths,
            "furthest": self._furthest,
            "limit": self.limit,
            "dirty": self._dirty,
            "caches": {part: sorted(cache) for part, cache in self.caches.items()},
        }

    def __repr__(self) -> str:
        return f"StreamState(lengths={self.lengths}, rewind={self.limit}, nbytes={self.nbytes:,})"


class StackState:
    """The states of several layers that read the same tokens, such as those of a model."""

    def __init__(self, layers: Iterable[StreamState]) -> None:
        self.layers = list(layers)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row."""
        return self.layers[0].lengths

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.layers[0].batch_size

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(layer.nbytes for layer in self.layers)

    def reorder(self, rows: Tensor | Sequence[int]) -> StackState:
        """As :meth:`StreamState.reorder`."""
        return StackState(layer.reorder(rows) for layer in self.layers)

    def rewind(self, tokens: int | Sequence[int]) -> None:
        """As :meth:`StreamState.rewind`; all layers or, where one refuses, none."""
        for layer in self.layers:
            layer.rewind(tokens)

    def clone(self) -> StackState:
        """As :meth:`StreamState.clone`."""
        return StackState(layer.clone() for layer in self.layers)

    def detach(self) -> StackState:
        """This state: its tensors carry no gradients."""
        return self

    def to(self, device: torch.device | str) -> StackState:
        """As :meth:`StreamState.to`."""
        return StackState(layer.to(device) for layer in self.layers)

    def save(self, path: str | os.PathLike[str]) -> None:
        """As :meth:`StreamState.save`."""
        _save(path, self.layers)

    @staticmethod
    def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> StackState:
        """As :meth:`StreamState.load`."""
        return StackState(_load(path, device))

    def __repr__(self) -> str:
        return f"StackState(layers={len(self.layers)}, lengths={self.lengths}, nbytes={self.nbytes:,})"


class Decoder:
    """Near field, far field and merge of a layer, one step at a time, on ready queries, keys and values.

    For whoever has those already, such as a cache for another library's models: queries and keys may come rotated
    (``Inputs(rope=None)``), with fewer key heads than query heads.

    Args:
        near, far: modules that parts have built, or None. A far field that computes the near field with itself
            (``build_fused``) comes alone.
        merge: the module of the merge, where both are there.
        layer: a description; a state goes with decoders of the same one.

    Raises:
        ValueError: when a part has no stream, naming it.
    """

    def __init__(self, near: nn.Module | None, far: nn.Module | None, merge: nn.Module | None, layer: str) -> None:
        self.modules: dict[str, StreamModule] = {}
        for name, module in (("near", near), ("far", far)):
            if module is None:
                continue
            if not isinstance(module, StreamModule):
                raise ValueError(f"the {name} field of {layer} has no stream: {type(module).__name__} keeps no state")
            self.modules[name] = module
        self.merge, self.layer = merge, layer

    def stream(self, spec: StreamSpec) -> StreamState:
        """The state of rows without tokens.

        Raises:
            ValueError: when a part cannot be streamed so, with the reason.
        """
        if spec.batch_size < 1 or spec.rewind < 0:
            raise ValueError(
                f"stream(batch_size={spec.batch_size}, rewind={spec.rewind}): at least one row, and a number of tokens "
                ">= 0 to take back, would be accepted"
            )
        for name, module in self.modules.items():
            reason = module.why_no_stream(spec)
            if reason is not None:
                raise ValueError(f"the {name} field of {self.layer} cannot be streamed: {reason}")
        caches = {name: module.empty_cache(spec) for name, module in self.modules.items()}
        return StreamState(self.layer, caches, [0] * spec.batch_size, spec.rewind)

    @torch.no_grad()
    def step(self, inputs: Inputs, state: StreamState, present: Tensor | None = None) -> Tensor:
        """Takes tokens in and attends from each.

        Args:
            inputs: q [B, Hq, T, D], k and v [B, Hkv, T, D], T >= 1; grid (T,), causal, no mask, no segments. With a
                rotary embedding, positions [T] or [B, T] as :func:`row_positions` gives them. ``x`` [B, T, dim] is read
                by projections and gates only.
            state: changed in place.
            present: bool [B, T], True where the row has a token. The others take no place in its sequence, wherever
                they stand, and get 0.

        Returns:
            [B, Hq, T, D], without gradients.

        Raises:
            ValueError: when the state does not fit.
        """
        batch, _, tokens, _ = inputs.q.shape
        state.check(self.layer, batch, inputs.q.device)
        order = None
        if present is None:
            counts = [tokens] * batch
        else:
            _check_present(present, batch, tokens)
            counts = present.sum(1).tolist()
            order = torch.argsort(~present, dim=1, stable=True)
            inputs = _packed(inputs, order)
        longest = max(n + t for n, t in zip(state.lengths, counts, strict=True))
        for name, module in self.modules.items():
            module.reserve(state.caches[name], longest, state.limit)
        if state.take_dirty():
            for rows, length, _ in _runs(state.lengths, state.lengths):
                for name, module in self.modules.items():
                    module.resume(_rows(state.caches[name], rows), length, state.limit)
        runs = list(_runs(state.lengths, counts))
        if len(runs) == 1 and runs[0][2] == tokens:
            out = self._run(inputs, state.caches, runs[0][1], state.limit)
        else:
            out = torch.zeros_like(inputs.q)
            for rows, length, count in runs:
                if count:
                    caches = {name: _rows(cache, rows) for name, cache in state.caches.items()}
                    out[rows, :, :count] = self._run(_cut(inputs, rows, count), caches, length, state.limit)
                    for name, cache in state.caches.items():
                        _put_rows(cache, rows, caches[name])
        state.advance(counts)
        if order is None:
            return out
        back = order.argsort(1)[:, None, :, None]
        return out.gather(2, back.expand_as(out))

    def _run(self, inputs: Inputs, caches: dict[str, Cache], length: int, rewind: int) -> Tensor:
        """Rows of one length."""
        both = self.merge is not None and len(self.modules) == 2
        parts = [
            module.step(inputs, caches[name], length, rewind, need_lse=both) for name, module in self.modules.items()
        ]
        if both and self.merge is not None:
            merged: Tensor = self.merge(*parts, inputs.x)
            return merged
        return parts[0].out if isinstance(parts[0], AttentionState) else parts[0]


def row_positions(lengths: Sequence[int], tokens: int, present: Tensor | None, device: torch.device) -> Tensor:
    """Positions of the next tokens of every row: [T], or [B, T] where rows differ."""
    if present is None and len(set(lengths)) == 1:
        return torch.arange(lengths[0], lengths[0] + tokens, device=device)
    start = torch.tensor(lengths, device=device)[:, None]
    if present is None:
        return start + torch.arange(tokens, device=device)
    return start + (present.cumsum(1) - 1).clamp(min=0)


def _check_present(present: Tensor, batch: int, tokens: int) -> None:
    if present.dtype != torch.bool or present.shape != (batch, tokens):
        raise ValueError(
            f"present must be a bool tensor [B, T] = {[batch, tokens]} (True = the row has a token there), "
            f"got {present.dtype} {list(present.shape)}"
        )


def _row_numbers(rows: Tensor | Sequence[int], batch: int) -> list[int]:
    chosen = rows.tolist() if isinstance(rows, Tensor) else list(rows)
    if not isinstance(chosen, list) or not chosen or not all(isinstance(i, int) and 0 <= i < batch for i in chosen):
        raise ValueError(f"reorder({rows!r}): a list of row numbers from 0 to {batch - 1} would be accepted")
    return chosen


def _runs(lengths: Sequence[int], counts: Sequence[int]) -> Iterator[tuple[slice, int, int]]:
    """(rows, length, count) for every run of neighbouring rows that agree in both."""
    start = 0
    for i in range(1, len(lengths) + 1):
        if i == len(lengths) or (lengths[i], counts[i]) != (lengths[start], counts[start]):
            yield slice(start, i), lengths[start], counts[start]
            start = i


def _rows(cache: Cache, rows: slice) -> Cache:
    return {name: t[rows] for name, t in cache.items()}


def _put_rows(cache: Cache, rows: slice, part: Cache) -> None:
    """Tensors [B, H, length, ..] that a step put in place of those rows, into the whole; other rows end in zeros."""
    for name, x in part.items():
        if x.data_ptr() != cache[name][rows].data_ptr():
            cache[name] = grown(cache[name], x.shape[2])
            cache[name][rows, :, : x.shape[2]] = x


def _packed(inputs: Inputs, order: Tensor) -> Inputs:
    """The tokens of every row in that order [B, T]."""

    def heads(x: Tensor) -> Tensor:
        return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    positions = inputs.positions
    if positions is not None and positions.ndim == 2:
        positions = positions.gather(1, order)
    x = inputs.x.gather(1, order[:, :, None].expand(-1, -1, inputs.x.shape[2]))
    return replace(inputs, q=heads(inputs.q), k=heads(inputs.k), v=heads(inputs.v), x=x, positions=positions)


def _cut(inputs: Inputs, rows: slice, count: int) -> Inputs:
    """The first tokens of some rows."""
    positions = inputs.positions
    if positions is not None:
        # The rows of a run agree.
        positions = (positions[rows.start] if positions.ndim == 2 else positions)[:count]
    return replace(
        inputs,
        q=inputs.q[rows, :, :count],
        k=inputs.k[rows, :, :count],
        v=inputs.v[rows, :, :count],
        x=inputs.x[rows, :count],
        grid=(count,),
        positions=positions,
    )


def _save(path: str | os.PathLike[str], states: Sequence[StreamState]) -> None:
    safetensors = _safetensors()
    # Clones, because safetensors refuses tensors that share memory.
    tensors = {
        f"{i}.{part}.{name}": t.detach().cpu().contiguous().clone()
        for i, state in enumerate(states)
        for part, cache in state.caches.items()
        for name, t in cache.items()
    }
    header = json.dumps([state.header() for state in states])
    data: bytes = safetensors.save(tensors, metadata={"farfield.stream": _FORMAT, "states": header})
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _load(path: str | os.PathLike[str], device: torch.device | str) -> list[StreamState]:
    safetensors = _safetensors()
    data = Path(path).read_bytes()
    try:
        tensors: dict[str, Tensor] = safetensors.load(data)
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    except Exception as error:  # safetensors raises its own class, and others where sizes make no sense
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if metadata.get("farfield.stream") != _FORMAT:
        found = metadata.get("farfield.stream")
        raise ValueError(f"{path} holds no stream state of format {_FORMAT!r} (found {found!r})")
    states = []
    try:
        for i, header in enumerate(json.loads(metadata["states"])):
            caches = {
                part: {name: tensors[f"{i}.{part}.{name}"].to(device) for name in names}
                for part, names in header["caches"].items()
            }
            states.append(
                StreamState(
                    header["layer"], caches, header["lengths"], header["limit"], furthest=header["furthest"],
                    dirty=header["dirty"],
                )
            )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its header does not fit its tensors ({error!r})") from error
    return states


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "saving states needs the extra `cli`: pip install 'farfield[cli]'", name=error.name
        ) from error
    return safetensors.torch
