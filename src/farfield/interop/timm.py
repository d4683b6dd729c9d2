"""Farfield in timm: its attention in timm's vision transformers, and farfield's own backbones by name.

    >>> import timm
    >>> from farfield.interop.timm import configure, register
    >>> model = configure(timm.create_model("vit_base_patch16_224", pretrained=True, dynamic_img_size=True), "fma2d")
    >>> register()
    >>> own = timm.create_model("farfield_tiny", num_classes=10, attention="fma2d")

timm needs torchvision, whose builds belong to one torch each: `pip install --no-deps timm` and the torchvision of your
torch, rather than whatever an installer finds.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from torch import Tensor, nn

try:
    import timm
    from timm.layers.attention import Attention
    from timm.models import FeatureInfo, register_model
except ImportError as error:
    raise ImportError(
        f"farfield.interop.timm needs {error.name}: pip install --no-deps timm, and the torchvision that belongs to "
        "your torch"
    ) from error

from farfield.interop.grids import GridAttention, PatchGrid, grid_options
from farfield.models.vision import SIZES, VisionConfig, VisionModel, preset

__all__ = ["FarfieldAttention", "TimmFeatures", "TimmModel", "configure", "register"]


class FarfieldAttention(nn.Module):
    """timm's attention layer with its own projections and norms, and a recipe over the grid of patches between them.

    Its parameters have the names that they had, so weights go back and forth; those of the recipe lie under `core`.

    Args:
        old: the layer that it stands for.
        core: what is computed.
        grid: of the image at hand, shared by all layers of the model.
    """

    def __init__(self, old: Any, core: GridAttention, grid: PatchGrid) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = old.num_heads, old.head_dim, old.scale
        self.qkv, self.q_norm, self.k_norm, self.norm = old.qkv, old.q_norm, old.k_norm, old.norm
        self.gate, self.proj, self.proj_drop = getattr(old, "gate", None), old.proj, old.proj_drop
        self.attn_drop = old.attn_drop
        self.core = core
        self._grid = grid

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`[B, N, C]` from the tokens of an image, prefix first.

        Raises:
            ValueError: for a mask, which says who sees whom token by token, and tokens that are no grid.
        """
        if attn_mask is not None or is_causal:
            given = "is_causal=True" if attn_mask is None else f"attn_mask of shape {list(attn_mask.shape)}"
            raise ValueError(
                f"{given}: a mask of pairs of tokens cannot be honoured by summaries; use timm's own attention for it"
            )
        sides = self._grid.of(x.shape[1], self.core.prefix)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        out = self.core(q, k, v, sides, self.scale, self.attn_drop.p if self.training else 0.0)
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        mixed: Tensor = self.proj_drop(self.proj(out))
        return mixed

    def forget(self) -> None:
        """Takes the hook that told the grid out of the model; any number of times."""
        self._grid.remove()


def configure(model: Any, recipe: str = "fma2d", **options: Any) -> Any:
    """Gives every attention layer of a timm vision transformer this recipe over its grid of patches.

    Works on models whose blocks hold timm's `Attention` (vit, deit, deit3, dinov2 and others in
    `vision_transformer.py`), pretrained or not. Create them with `dynamic_img_size=True` to read images of other sizes.
    Class and register tokens (`model.num_prefix_tokens`) are seen exactly and see everything exactly.

    Args:
        model: a timm model; changed in place.
        recipe: a name of `farfield.recipes` that works in 2-D.
        **options: of the recipe; for "fma" and "fma2d" the defaults here are `summary="mean", bias=None`, which need
            no parameters.

    Returns:
        The model itself.

    Raises:
        ValueError: for a model whose attention is another, dropped patches, or a recipe that cannot work in it, with
            the reason; the model is as it was.
        TypeError: for an option that the recipe does not have.
    """
    everything = grid_options(recipe, options)
    if any(kind.__name__ == "NaFlexVit" for kind in type(model).__mro__):
        raise ValueError(
            f"{type(model).__name__}: its images have sizes of their own within a batch, laid out as sequences of "
            "patches with padding and a mask, so there is no one grid for a recipe; a VisionTransformer with "
            "dynamic_img_size=True reads any size, one per batch"
        )
    layers = {name: m for name, m in model.named_modules() if type(m) is Attention or isinstance(m, FarfieldAttention)}
    if not layers:
        found = sorted({type(m).__name__ for m in model.modules() if "Att" in type(m).__name__}) or ["none"]
        raise ValueError(
            f"{type(model).__name__} has no layer of timm's Attention (its attention: {', '.join(found)}): other "
            "layers add position biases or rotations to scores, or cut windows themselves, which would be lost"
        )
    if not isinstance(getattr(model, "patch_drop", None) or nn.Identity(), nn.Identity):
        raise ValueError(
            f"patch_drop={model.patch_drop}: dropped patches leave no grid; create the model with patch_drop_rate=0"
        )
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    cores = {}
    for number, (name, layer) in enumerate(layers.items()):
        core = GridAttention(
            recipe, everything, num_heads=layer.num_heads, head_dim=layer.head_dim, layer=number, prefix=prefix
        )
        weight = layer.qkv.weight
        cores[name] = core.to(device=weight.device, dtype=weight.dtype)
    grid = PatchGrid(model)
    for name, layer in layers.items():
        if isinstance(layer, FarfieldAttention):
            layer.forget()
        parent, _, own = name.rpartition(".")
        new = FarfieldAttention(layer, cores[name], grid)
        setattr(model.get_submodule(parent), own, new.train(layer.training))
    return model


class TimmModel(nn.Module):
    """A :class:`farfield.models.vision.VisionModel` with the methods that timm's tools call.

    Args:
        model: for classification.
        pretrained_cfg: as timm keeps it.
    """

    def __init__(self, model: VisionModel, pretrained_cfg: dict[str, Any]) -> None:
        super().__init__()
        config = model.config
        self.backbone = model.backbone
        self.num_classes = config.outputs
        self.num_features = self.head_hidden_size = config.widths[-1]
        self.head = nn.Linear(self.num_features, self.num_classes) if self.num_classes else nn.Identity()
        if isinstance(self.head, nn.Linear):
            self.head.load_state_dict(model.head.out.state_dict())
        self.pretrained_cfg = self.default_cfg = pretrained_cfg

    def forward_features(self, x: Tensor) -> Tensor:
        """The coarsest map `[B, C, H, W]` of images `[B, channels, H, W]` of any size."""
        last: Tensor = self.backbone(x)[-1].map
        return last

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `[B, classes]` of a map; its mean `[B, C]` with ``pre_logits``."""
        mean = x.mean((2, 3))
        logits: Tensor = mean if pre_logits else self.head(mean)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, classes]`."""
        return self.forward_head(self.forward_features(x))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether gradients compute every block again instead of keeping what it held."""
        self.backbone.checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """The names of all parameters but weights of linear maps and convolutions.

        By module and not by shape, as timm would: positions, and biases per level and head, are matrices by shape only.
        """
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        decaying = {id(module.weight) for module in self.modules() if isinstance(module, kinds)}
        return {name for name, parameter in self.named_parameters() if id(parameter) not in decaying}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm orders parameters into layers: the stem, then blocks (or stages, when coarse).

        The step to the next stage and the norm of a stage's map belong to the stage's last block; the head comes last.
        """
        after = (99999,)  # timm's word for "with the group before"
        blocks: Any = [
            (r"^backbone\.stages\.(\d+)\.(\d+)", None),
            (r"^backbone\.(?:steps|norms)\.(\d+)", after),
        ]
        if coarse:
            blocks = r"^backbone\.(?:stages|steps|norms)\.(\d+)"
        return {"stem": r"^backbone\.(?:stem|place)\.", "blocks": blocks}

    def get_classifier(self) -> nn.Module:
        """The last linear map."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for so many classes; 0 for none."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()


class TimmFeatures(nn.Module):
    """The maps of all stages, or of some, as timm's `features_only=True` gives them.

    Args:
        model: whose backbone is used.
        out_indices: which stages; all by default.
    """

    def __init__(self, model: VisionModel, out_indices: tuple[int, ...] | None = None) -> None:
        super().__init__()
        config = model.config
        self.backbone = model.backbone
        rows, reduction = [], config.patches[0]
        for number, width in enumerate(config.widths):
            rows.append({"num_chs": width, "reduction": reduction, "module": f"stages.{number}"})
            reduction *= config.strides[0]
        self.out_indices = tuple(range(len(rows))) if out_indices is None else tuple(out_indices)
        self.feature_info = FeatureInfo(rows, self.out_indices)

    def forward(self, x: Tensor) -> list[Tensor]:
        """`[B, C, H, W]` per stage, fine to coarse."""
        maps = [feature.map for feature in self.backbone(x)]
        return [maps[index] for index in self.out_indices]


_OWN = tuple(f.name for f in dataclasses.fields(VisionConfig) if f.name not in ("task", "dims", "channels", "outputs"))


def _make(
    size: str,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    features_only: bool = False,
    out_indices: tuple[int, ...] | None = None,
    seed: int = 0,
    **changes: Any,
) -> nn.Module:
    if pretrained:
        raise ValueError(f"pretrained=True: farfield_{size} has no published weights; checkpoint_path= reads yours")
    unknown = sorted(set(changes) - set(_OWN))
    if unknown:
        raise TypeError(f"farfield_{size} has no arguments {unknown}; it has num_classes, in_chans, {', '.join(_OWN)}")
    model = VisionModel(preset(size, channels=in_chans, outputs=max(num_classes, 1), **changes), seed=seed)
    if features_only:
        return TimmFeatures(model, out_indices)
    cfg = {"architecture": f"farfield_{size.replace('-', '_')}", "num_classes": num_classes,
           "input_size": (in_chans, 224, 224), "fixed_input_size": False, "classifier": "head",
           "first_conv": None, "url": ""}  # fmt: skip
    made = TimmModel(model, cfg)
    if num_classes == 0:
        made.reset_classifier(0)
    return made


def register() -> tuple[str, ...]:
    """Makes `timm.create_model("farfield_tiny", attention="fma2d")` and its sizes known; any number of times.

    They take `num_classes`, `in_chans`, `features_only`, `out_indices`, `seed` and the attributes of
    :class:`farfield.models.vision.VisionConfig`, and images of any size.

    Returns:
        The names, "farfield_" and a size of :data:`farfield.models.vision.SIZES`.
    """
    module = sys.modules[__name__]
    names = []
    for size in SIZES:
        name = f"farfield_{size.replace('-', '_')}"
        names.append(name)
        if not timm.is_model(name):

            def entry(*arguments: Any, size: str = size, **options: Any) -> nn.Module:
                return _make(size, *arguments, **options)

            entry.__name__ = entry.__qualname__ = name
            entry.__doc__ = f"The size {size!r} of farfield's vision backbones, for timm."
            setattr(module, name, entry)
            register_model(entry)
    return tuple(names)
