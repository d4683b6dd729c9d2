"""A cache for `generate` that holds decode states instead of all keys and values."""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation import GenerationMixin

from farfield.attention import ReadyAttention
from farfield.parts import Inputs
from farfield.streaming import Decoder, StreamSpec, StreamState

__all__ = ["ARGUMENT", "StreamCache", "StreamLayer", "stream_of"]

_old = "past_key_values" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
ARGUMENT = "past_key_values" if _old else "cache"
"""How models and `generate` call the cache that they are given: "cache", in older Transformers "past_key_values"."""

_MARK = "_farfield_stream"
"""Transformers does not hand its cache to the attention function: the keys that come out of it carry their layer's."""

_decoders: WeakKeyDictionary[ReadyAttention, Decoder] = WeakKeyDictionary()
"""Kept apart from caches, which are reset, copied and used again, with other weights too."""


def _decoder(core: ReadyAttention) -> Decoder:
    if core not in _decoders:
        _decoders[core] = Decoder(core.near, core.far, core.merge, core.extra_repr())
    return _decoders[core]


class Held:
    """The columns that all layers of a cache hold.

    Attributes:
        length: how many.
        hidden: [B, length] which of them are padding; None: none.
        layers: of the cache.
    """

    def __init__(self) -> None:
        self.length = 0
        self.hidden: Tensor | None = None
        self.layers: list[StreamLayer] = []

    def check(self, length: int) -> None:
        """Raises ValueError where a layer with so many tokens, or another, has missed a call that others took."""
        lengths = {length, self.length, *(layer.length for layer in self.layers if layer.state is not None)}
        if len(lengths) > 1:
            raise ValueError(
                f"layers of this StreamCache hold {' and '.join(map(str, sorted(lengths)))} tokens: a call was refused "
                "half-way. reset() it and start again"
            )

    def extended(self, mask: Tensor | None) -> Tensor | None:
        """[B, N] what is hidden of held and new columns, None for nothing.

        Args:
            mask: [B, N] of all columns, True = a token; None: all of them.

        Raises:
            ValueError: for a mask of held columns that is not what it was when they came: a stream has taken in, or
                left out, what they hold.
        """
        hidden = _some(None if mask is None else ~mask)
        before = _some(None if hidden is None else hidden[:, : self.length])
        both = before is not None and self.hidden is not None
        if not (torch.equal(before, self.hidden) if both else before is self.hidden):  # type: ignore[arg-type]
            old, now = ("none" if x is None else f"{x.sum(1).tolist()} (by row)" for x in (self.hidden, before))
            raise ValueError(
                f"the attention mask hid {old} of the {self.length} columns that a StreamCache holds, and hides {now} "
                "now: a state cannot hide again what it has taken in. Give every call the mask of earlier calls, "
                "extended; or use Transformers' DynamicCache"
            )
        return hidden

    def pick(self, rows: Tensor | list[int]) -> None:
        """Keeps these rows."""
        if self.hidden is not None:
            self.hidden = _some(self.hidden[torch.as_tensor(rows, device=self.hidden.device)])

    def crop(self, length: int) -> None:
        """Keeps so many columns."""
        self.length, self.hidden = length, _some(None if self.hidden is None else self.hidden[:, :length])


def _some(hidden: Tensor | None) -> Tensor | None:
    return hidden if hidden is not None and bool(hidden.any()) else None


def _has_holes(hidden: Tensor) -> bool:
    """Whether a row has padding between its tokens."""
    begun = (~hidden).cumsum(1) > 0
    return bool((begun & hidden)[:, :-1].logical_and(~hidden[:, 1:]).any())


class StreamLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's part of a :class:`StreamCache`."""

    is_sliding = False
    is_croppable = True

    def __init__(self, config: Any, rewind: int, held: Held) -> None:
        super().__init__()
        self.config, self.rewind, self.held = config, rewind, held
        self.state: StreamState | None = None
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is made before the attention function says for which parts."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values alone, marked; the attention function takes them in.

        Raises:
            ValueError: for another attention implementation, which would take the new keys for all keys.
        """
        used = str(self.config._attn_implementation)
        if not used.startswith("farfield"):
            raise ValueError(
                f"a StreamCache with attn_implementation={used!r}: only farfield's attention reads it; "
                "use Transformers' DynamicCache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_states = key_states.view_as(key_states)
        setattr(key_states, _MARK, self)
        return key_states, value_states

    def attend(self, core: ReadyAttention, inputs: Inputs, mask: Tensor | None, holes: bool) -> Tensor:
        """Takes the tokens of `inputs` in and attends from each: `[B, Hq, T, D]`.

        Args:
            core: the parts.
            inputs: new queries, keys and values.
            mask: [B, N] of all columns, held and new, True = a token; None for all.
            holes: whether there may be padding between the tokens of a row: where all layers see by distance alone.

        Raises:
            ValueError: when the parts have no stream, with the reason; in training; for masks that cannot be honoured.
                This layer has not changed then.
        """
        new, hidden = inputs.k.shape[2], self.held.hidden
        known = self.held.length == self.length + new
        if not known:  # the first layer of a call: what it says of columns holds for all
            self.held.check(self.length)
            hidden = self.held.extended(mask)
            if hidden is not None and not holes and _has_holes(hidden):
                raise ValueError(
                    "padding between the tokens of a row: it takes places in a prefill and none in a stream, so that "
                    f"near={core.near_spec!r}, far={core.far_spec!r} would see other blocks than without a "
                    "StreamCache; use Transformers' DynamicCache, or 'farfield:dense'"
                )
        if torch.is_grad_enabled() and any(x.requires_grad for x in (inputs.q, inputs.k, inputs.v)):
            raise ValueError("a StreamCache keeps no gradients: train with use_cache=False, decode in torch.no_grad()")
        decoder, state = _decoder(core), self.state
        if state is None:
            batch, heads, _, width = inputs.q.shape
            dtype, device = inputs.k.dtype, inputs.k.device
            spec = StreamSpec(
                batch, heads, inputs.k.shape[1], width, self.rewind, rope=False, dtype=dtype, device=device
            )
            state = decoder.stream(spec)
        out = decoder.step(inputs, state, None if mask is None else mask[:, -new:])
        if not known:
            self.held.length, self.held.hidden = self.length + new, hidden
        self.state, self.length = state, self.length + new
        return out

    def get_seq_length(self) -> int:
        """Columns so far, padding included."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key columns that a mask covers, and the first of them."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forgets everything."""
        self.state, self.length = None, 0
        self.held.crop(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows for the beams that go on."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows."""
        if self.state is not None:
            self.state = self.state.reorder(indices)
        if self is self.held.layers[0]:
            self.held.pick(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        if self.state is not None:
            self.batch_select_indices(torch.arange(self.state.batch_size).repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """Takes tokens back, as many as `rewind` allows; negative: so many, and so none for 0."""
        take = -max_length if max_length <= 0 else self.length - max_length
        if take > 0 and self.state is not None:
            # Padding has no place in a state.
            padding = self.held.hidden
            left = self.length - take
            self.state.rewind(take if padding is None else [take - n for n in padding[:, left:].sum(1).tolist()])
            self.length -= take

    def offload(self) -> None:
        """Decode states are small: they stay."""

    def prefetch(self) -> None:
        """See :meth:`offload`."""


class StreamCache(Cache):  # type: ignore[misc]
    """Decode states of all layers, for `model(..., cache=cache)` and `model.generate(..., cache=cache)`.

    Older Transformers call the argument `past_key_values` (:data:`ARGUMENT` is its name here).

    Memory and time per token are those of the recipe's stream (docs/streaming.md): with fma they grow by one level
    when the context doubles. A step gives what a prefill would. One cache serves one sequence or batch; rows may be
    padded on the left. The mask of later calls has to begin with that of earlier ones, and padding between the tokens
    of a row is refused (but by exact attention and windows), since it takes places in a prefill and none in a state.
    What the first layer refuses leaves the cache as it was; after a call that a later one has refused, reset() it.

    Args:
        model: whose attention is "farfield" or "farfield:<recipe>".
        rewind: tokens that `crop` may take back (assisted generation); at most a block.

    Raises:
        ValueError: when the model's attention is not farfield's; for a negative number of tokens.
    """

    def __init__(self, model: PreTrainedModel, rewind: int = 0) -> None:
        config = model.config.get_text_config(decoder=True)
        used = str(config._attn_implementation)
        if not used.startswith("farfield"):
            raise ValueError(
                f"StreamCache for attn_implementation={used!r}: register(), then set_attn_implementation('farfield')"
            )
        if rewind < 0:
            raise ValueError(f"StreamCache(rewind={rewind}): a number of tokens >= 0 would be accepted")
        self.held = held = Held()
        held.layers = [StreamLayer(config, rewind, held) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=list(held.layers))

    def crop(self, max_length: int) -> None:
        """Takes tokens back, as many as `rewind` allows; negative: so many, and so none for 0."""
        super().crop(max_length)
        self.held.crop(self.layers[0].length)

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(layer.state.nbytes for layer in self.layers if layer.state is not None)


def stream_of(key: Tensor) -> StreamLayer | None:
    """The layer of a :class:`StreamCache` that these keys came out of, or None."""
    return getattr(key, _MARK, None)
