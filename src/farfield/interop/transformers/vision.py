"""Vision transformers of Transformers: farfield attention over the grid of patches, class and register tokens exact.

Transformers' attention interface hands over a sequence of tokens and says nothing of an image. So the grid comes from
the model's patch embedding, see :class:`farfield.interop.grids.PatchGrid`, and how many tokens stand before the patches
from the kind of model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from farfield.interop.grids import GridAttention, PatchGrid, grid_options

__all__ = ["PREFIX", "GridCore", "grid_cores", "grid_options"]


def _with_registers(config: Any) -> int:
    return 1 + int(config.num_register_tokens)


PREFIX: dict[str, Callable[[Any], int]] = {
    "vit": lambda config: 1,
    "deit": lambda config: 2,
    "dinov2": lambda config: 1,
    "dinov2_with_registers": _with_registers,
    "dinov3_vit": _with_registers,
    "clip_vision_model": lambda config: 1,
    "siglip_vision_model": lambda config: 0,
    "ijepa": lambda config: 0,
}
"""Class and register tokens before the patches, by `config.model_type`: models whose order of tokens is known here."""


class GridCore(nn.Module):
    """What one attention layer of a vision transformer computes.

    Args:
        attention: over prefix and patches.
        grid: of the image at hand, shared by all layers of the model.
    """

    def __init__(self, attention: GridAttention, grid: PatchGrid) -> None:
        super().__init__()
        self.attention = attention
        self._grid = grid

    def forget(self) -> None:
        """Takes the hook that told the grid out of the model; any number of times."""
        self._grid.remove()

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float, refused: dict[str, Any]
    ) -> Tensor:
        """`[B, N, Hq, D]`, as the attention interface wants it, from query, key and value `[B, H, N, D]`.

        Raises:
            ValueError: for tokens that are no prefix and grid, or an argument in `refused` that is given.
        """
        for name, given in refused.items():
            if given is not None and given is not False:
                raise ValueError(
                    f"{name} in a vision transformer with farfield over its grid of patches: it says who sees whom "
                    "token by token, which a grid of summaries cannot honour; set_attn_implementation('sdpa') may"
                )
        if query.shape[2] != key.shape[2]:
            raise ValueError(
                f"{query.shape[2]} queries and {key.shape[2]} keys: attention to another sequence has no common grid"
            )
        sides = self._grid.of(query.shape[2], self.attention.prefix)
        out: Tensor = self.attention(query, key, value, sides, scaling, dropout)
        return out.transpose(1, 2).contiguous()


def grid_cores(
    model: Any, layers: dict[str, nn.Module], recipe: str, options: dict[str, Any], prefix: int | None
) -> dict[str, GridCore]:
    """A core for each attention layer, by its name.

    Args:
        model: a Transformers model that reads images alone.
        layers: of :func:`farfield.interop.transformers.cores.attention_layers`.
        recipe, options: of :func:`farfield.interop.grids.grid_options`.
        prefix: tokens before the patches; None looks the kind of model up.

    Raises:
        ValueError: for a model whose order of tokens is not known, or a recipe that cannot work in it.
    """
    if prefix is None:
        kind = model.config.model_type
        if kind not in PREFIX:
            raise ValueError(
                f"where the class and register tokens of a model of type {kind!r} stand is not known here (known: "
                f"{', '.join(PREFIX)}); if they all stand before the patches, give their number, prefix=1"
            )
        prefix = PREFIX[kind](model.config)
    causal = [name for name, layer in layers.items() if getattr(layer, "is_causal", False)]
    if causal:
        raise ValueError(f"{causal[0]} is causal: patches of an image have no order; give the vision part of the model")
    attentions = {}
    for number, (name, layer) in enumerate(layers.items()):
        config: Any = layer.config
        heads = config.num_attention_heads
        width = getattr(layer, "head_dim", None) or getattr(layer, "attention_head_size", None)
        attentions[name] = GridAttention(
            recipe,
            options,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None),
            head_dim=width or config.hidden_size // heads,
            layer=number,
            prefix=prefix,
        )
    grid = PatchGrid(model)
    return {name: GridCore(attention, grid) for name, attention in attentions.items()}
