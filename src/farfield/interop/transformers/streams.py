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


class StreamLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's part of a :class:`StreamCache`."""

    is_sliding = False
    is_croppable = True

    def __init__(self, config: Any, rewind: int = 0) -> None:
        super().__init__()
        self.config, self.rewind = config, rewind
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
        self.length += key_states.shape[2]
        key_states = key_states.view_as(key_states)
        setattr(key_states, _MARK, self)
        return key_states, value_states

    def attend(self, core: ReadyAttention, inputs: Inputs, present: Tensor | None) -> Tensor:
        """Takes the tokens of `inputs` in and attends from each: `[B, Hq, T, D]`.

        Raises:
            ValueError: when the parts have no stream, with the reason; in training.
        """
        if torch.is_grad_enabled() and any(x.requires_grad for x in (inputs.q, inputs.k, inputs.v)):
            raise ValueError("a StreamCache keeps no gradients: train with use_cache=False, decode in torch.no_grad()")
        decoder = _decoder(core)
        if self.state is None:
            batch, heads, _, width = inputs.q.shape
            self.state = decoder.stream(
                StreamSpec(
                    batch,
                    heads,
                    inputs.k.shape[1],
                    width,
                    self.rewind,
                    rope=False,
                    dtype=inputs.k.dtype,
                    device=inputs.k.device,
                )
            )
        return decoder.step(inputs, self.state, present)

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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows for the beams that go on."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows."""
        if self.state is not None:
            self.state = self.state.reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        if self.state is not None:
            self.state = self.state.reorder([i for i in range(self.state.batch_size) for _ in range(repeats)])

    def crop(self, max_length: int) -> None:
        """Takes tokens back, as many as `rewind` allows; negative: so many, and so none for 0."""
        take = -max_length if max_length <= 0 else self.length - max_length
        if take > 0 and self.state is not None:
            self.state.rewind(take)
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
    padded on the left.

    Args:
        model: whose attention is "farfield" or "farfield:<recipe>".
        rewind: tokens that `crop` may take back (assisted generation); at most a block.

    Raises:
        ValueError: when the model's attention is not farfield's.
    """

    def __init__(self, model: PreTrainedModel, rewind: int = 0) -> None:
        config = model.config.get_text_config(decoder=True)
        used = str(config._attn_implementation)
        if not used.startswith("farfield"):
            raise ValueError(
                f"StreamCache for attn_implementation={used!r}: register(), then set_attn_implementation('farfield')"
            )
        super().__init__(layers=[StreamLayer(config, rewind) for _ in range(config.num_hidden_layers)])

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(layer.state.nbytes for layer in self.layers if layer.state is not None)


def stream_of(key: Tensor) -> StreamLayer | None:
    """The layer of a :class:`StreamCache` that these keys came out of, or None."""
    return getattr(key, _MARK, None)
