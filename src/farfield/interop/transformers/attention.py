"""The attention function: one call of Transformers' attention interface, refused or computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from farfield.attention import ReadyAttention
from farfield.interop.transformers import cores
from farfield.interop.transformers.cached import dense_rows, last_rows
from farfield.interop.transformers.masks import Columns, read
from farfield.interop.transformers.padding import aligned
from farfield.interop.transformers.streams import stream_of
from farfield.interop.transformers.vision import GridCore
from farfield.near import Dense, Window
from farfield.parts import Inputs

__all__ = ["attention_function"]

Attend = Callable[..., tuple[Tensor, None]]

_REFUSED = {
    "softcap": "soft-capped scores (Gemma 2) are not the dot products that summaries of keys rest on; "
    "attn_logit_softcapping=None in the config turns them off",
    "s_aux": "learned attention sinks (gpt-oss) add a score to the softmax that is no token's",
    "sinks": "learned attention sinks add a score to the softmax that is no token's",
    "head_mask": "heads are not masked one by one",
    "cache": "a paged cache (continuous batching) hands over keys in pages",
    "block_indices": "the model chooses the keys itself",
    "indices": "the model chooses the keys itself",
    "output_attentions": "weights per pair of tokens are never computed",
}
"""Arguments that mean something which cannot be honoured, and why."""

_HARMLESS = frozenset(
    (
        "position_ids", "cache_position", "use_cache", "past_key_values", "return_dict", "output_hidden_states",
        "output_router_logits", "num_items_in_batch", "deterministic", "max_length_q", "max_length_k",
        "logits_to_keep", "encoder_hidden_states", "encoder_attention_mask", "is_first_iteration",
    )
)  # fmt: skip
"""Arguments that say nothing about attention, or nothing that is not known from elsewhere."""


def attention_function(recipe: str | None) -> Attend:
    """The function for "farfield" (None) or "farfield:<recipe>", as Transformers calls it."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        sliding_window: int | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention `[B, Nq, Hq, D]` and no weights; query `[B, Hq, Nq, D]`, key and value `[B, Hkv, Nk, D]`.

        Raises:
            ValueError: for what cannot be honoured, with the reason.
        """
        _refuse(kwargs)
        scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
        on_grid = getattr(module, cores.NAME, None)
        if isinstance(on_grid, GridCore):
            refused = {"attention_mask": attention_mask, "position_bias": position_bias, "is_causal": is_causal,
                       "cu_seq_lens_q": cu_seq_lens_q, "sliding_window": sliding_window}  # fmt: skip
            return on_grid.attend(query, key, value, scale, dropout, refused), None
        config = getattr(module, "config", None)
        causal = _causal(module, config, is_causal)
        stream = stream_of(key)
        # A stream hands over the new keys alone.
        columns = read(attention_mask, key.shape[2] + (0 if stream is None else stream.length))
        key, value = key[:, :, : columns.length], value[:, :, : columns.length]
        core = _core(module, config, recipe, query, key, causal, sliding_window)
        for part in (core.near_spec, core.far_spec):
            if dropout and part is not None and not part.takes_dropout:
                raise ValueError(f"dropout={dropout} in training: {part!r} has none; set the config's to 0")
        inputs = Inputs(
            q=query,
            k=key,
            v=value,
            x=key.new_empty(key.shape[0], key.shape[2], 0),
            grid=(key.shape[2],),
            causal=causal,
            key_mask=None if stream is not None else columns.key_mask,
            scale=scale,
            dropout=dropout,
        )
        if stream is not None:
            if position_bias is not None or columns.segments is not None or cu_seq_lens_q is not None or not causal:
                raise ValueError(
                    "a StreamCache decodes causal sequences: without position_bias, packed sequences, cross attention"
                )
            everywhere = cores.setting_of(config, recipe)[0] in ("dense", "window")
            out = stream.attend(core, inputs, columns.key_mask, everywhere and _counts_from_itself(core))
        elif position_bias is not None:
            _check_bias(core, dropout, columns, cu_seq_lens_q)
            out = dense_rows(inputs, position_bias[..., : columns.length])
        elif columns.segments is not None and cu_seq_lens_q is None and _is_dense(core) and not dropout:
            # Row by row: side by side, exact attention would build the matrix of all rows together.
            out = dense_rows(inputs, segments=columns.segments)
        elif cu_seq_lens_q is not None or columns.segments is not None:
            out = _packed(core, inputs, columns, cu_seq_lens_q, cu_seq_lens_k)
        elif query.shape[2] != key.shape[2]:
            out = last_rows(core, inputs)
        elif columns.key_mask is not None and not _counts_from_itself(core):
            out = aligned(core, inputs)
        else:
            out = core.attend(inputs)
        return out.transpose(1, 2).contiguous(), None

    return attend


def _refuse(kwargs: dict[str, Any]) -> None:
    for name, given in kwargs.items():
        # A model's own cache, under its new name, has given its keys already; a paged one is another class.
        if given is None or given is False or name in _HARMLESS or isinstance(given, Cache):
            continue
        why = _REFUSED.get(name, "it does not know this argument, and does not ignore what it does not know")
        raise ValueError(
            f"farfield cannot honour the argument {name}={_short(given)} of an attention layer: {why}; "
            "set_attn_implementation('eager') may"
        )


def _is_dense(core: ReadyAttention) -> bool:
    return isinstance(core.near_spec, Dense) and core.far_spec is None


def _check_bias(core: ReadyAttention, dropout: float, columns: Columns, bounds: Tensor | None) -> None:
    """An additive bias per pair of tokens (T5 and its kin) is exact attention's alone."""
    if not _is_dense(core):
        raise ValueError(
            "the model adds a bias to the score of every pair of tokens (position_bias, as T5 does), and a summary of "
            f"many keys has no such pairs: near={core.near_spec!r}, far={core.far_spec!r} cannot honour it; "
            "'farfield:dense' can"
        )
    if dropout or columns.segments is not None or bounds is not None:
        raise ValueError(
            f"position_bias together with dropout={dropout} or packed sequences; set the config's dropout to 0, and pad"
        )


def _short(given: Any) -> str:
    return f"<tensor {list(given.shape)}>" if isinstance(given, Tensor) else f"{given!r}"


def _causal(module: nn.Module, config: Any, given: bool | None) -> bool:
    if given is not None:
        return bool(given)
    return bool(getattr(module, "is_causal", True)) and bool(getattr(config, "is_causal", True))


def _core(
    module: nn.Module,
    config: Any,
    recipe: str | None,
    query: Tensor,
    key: Tensor,
    causal: bool,
    sliding_window: int | None,
) -> ReadyAttention:
    """The parts that compute this call."""
    if sliding_window is not None:
        if not causal:
            raise ValueError(
                f"sliding_window={sliding_window} in a layer that is not causal: it narrows towards the borders, "
                "which farfield's window does not; use attn_implementation='sdpa'"
            )
        # The model's own near field: nothing lies outside that a far field could add.
        return cores.shared("window", sliding_window)
    cross = _is_cross(module, causal)
    if cross or (not causal and query.shape[2] != key.shape[2]):
        name, options = cores.setting_of(config, recipe)
        if name != "dense":
            raise ValueError(
                f"cross attention (queries of {query.shape[2]} tokens, keys of {key.shape[2]}) with recipe {name!r}: a "
                "near field needs queries and keys to lie on one axis; use 'farfield:dense', or 'sdpa' for this model"
            )
    own = getattr(module, cores.NAME, None)
    if own is not None:
        name, _ = cores.setting_of(config, recipe)
        if own.spec.causal != causal:
            raise ValueError(f"the layer was configured with causal={own.spec.causal} and is called with {causal}")
        core: ReadyAttention = own
        return core
    name, options = cores.setting_of(config, recipe)
    layer = getattr(module, "layer_idx", None) or 0
    options = cores.of_layer(name, options, layer)
    spec = (causal, query.shape[1], key.shape[1], query.shape[3], layer)
    return cores.shared("recipe", name, tuple((k, _plain(v)) for k, v in options.items()), *spec)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_cross(module: nn.Module, causal: bool) -> bool:
    """Whether keys come from another sequence, as far as the layer says so (its lengths may agree by chance)."""
    if causal:
        return False
    named = "cross" in type(module).__name__.lower() or bool(getattr(module, "is_cross_attention", False))
    return named or bool(getattr(module, "is_decoder", False))


def _counts_from_itself(core: ReadyAttention) -> bool:
    """Whether a token sees by distance alone, so that padding before the first token changes nothing."""
    near = core.near_spec
    sliding = isinstance(near, Window) and near.stride == 1 and core.spec.causal
    return core.far_spec is None and (isinstance(near, Dense) or sliding)


def _packed(
    core: ReadyAttention, inputs: Inputs, columns: Columns, bounds_q: Tensor | None, bounds_k: Tensor | None
) -> Tensor:
    """Packed sequences of all rows side by side, in one row."""
    batch, heads, tokens, width = inputs.q.shape
    if tokens != inputs.k.shape[2]:
        raise ValueError(
            f"packed sequences with a cache: {tokens} queries, {inputs.k.shape[2]} keys; pass use_cache=False, or one "
            "sequence per row"
        )
    if columns.key_mask is not None:
        raise ValueError("packed sequences (cu_seq_lens_q) together with a padding mask: drop the padding")
    if bounds_q is not None:
        if bounds_k is not None and bounds_k is not bounds_q and not _equal(bounds_q, bounds_k):
            raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ: packed cross attention is not known")
        bounds = bounds_q.to(inputs.q.device)
    else:
        assert columns.segments is not None
        bounds = _bounds(columns.segments)

    def flat(x: Tensor) -> Tensor:
        return x if batch == 1 else x.transpose(0, 1).reshape(1, x.shape[1], batch * tokens, x.shape[3])

    row = Inputs(
        q=flat(inputs.q),
        k=flat(inputs.k),
        v=flat(inputs.v),
        x=inputs.x.reshape(1, batch * tokens, 0),
        grid=(batch * tokens,),
        causal=inputs.causal,
        cu_seqlens=bounds,
        scale=inputs.scale,
        dropout=inputs.dropout,
    )
    out = core.attend(row)
    return out if batch == 1 else out.reshape(heads, batch, tokens, width).transpose(0, 1)


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.compiler.is_compiling() or torch.equal(a, b)


def _bounds(segments: Tensor) -> Tensor:
    """Where sequences begin, over all rows, and the end of the last; repeated, where a compiler traces, to B N + 1."""
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = starts.flatten()
    if torch.compiler.is_compiling():
        # A fixed number of bounds: what is after the last is an empty sequence.
        return torch.searchsorted(starts.cumsum(0), torch.arange(1, starts.shape[0] + 2, device=starts.device))
    return torch.cat([starts.nonzero()[:, 0], starts.new_full((1,), starts.shape[0], dtype=torch.int64)])
