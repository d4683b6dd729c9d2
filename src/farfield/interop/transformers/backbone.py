"""Farfield's own vision models as models of Transformers: `AutoBackbone` and image classification.

    >>> from farfield.interop.transformers import FarfieldVisionConfig, register
    >>> register()
    >>> maps = AutoBackbone.from_config(FarfieldVisionConfig(attention="fma2d", out_indices=[0, 1, 2, 3]))
    >>> model = AutoModelForImageClassification.from_config(FarfieldVisionConfig(num_labels=10))

They read images of any size, and are saved and read as every other model of Transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutputWithNoAttention

from farfield.models.vision import Backbone, VisionConfig, VisionModel, preset

__all__ = ["FarfieldBackbone", "FarfieldForImageClassification", "FarfieldVisionConfig", "register_vision"]

_OWN = tuple(f.name for f in dataclasses.fields(VisionConfig) if f.name not in ("task", "dims", "channels", "outputs"))


class FarfieldVisionConfig(BackboneConfigMixin, PreTrainedConfig):  # type: ignore[misc]
    """A :class:`farfield.models.vision.VisionConfig` for images, as Transformers keeps configs.

    Args:
        size: a key of :data:`farfield.models.vision.SIZES`.
        attention: a name of `farfield.recipes`, or one per stage.
        options: of the recipe, or one mapping per stage.
        num_channels: of the images.
        vision: any other attribute of `VisionConfig`: widths, depths, patch, position, ...
        out_features, out_indices: stages whose maps a backbone gives ("stage1", ... or 0, ...); the last by default.
        **arguments: of every config: num_labels, id2label, ...

    Raises:
        ValueError: for an attribute in `vision` that there is not, or a model that makes no sense.
    """

    model_type = "farfield_vision"

    def __init__(
        self,
        size: str = "tiny",
        attention: str | list[str] | tuple[str, ...] = "fma2d",
        options: Any = None,
        num_channels: int = 3,
        vision: Mapping[str, Any] | None = None,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.size, self.num_channels = size, num_channels
        self.attention = list(attention) if isinstance(attention, tuple) else attention
        self.options = {} if options is None else options
        self.vision = dict(vision or {})
        unknown = sorted(set(self.vision) - set(_OWN))
        if unknown:
            raise ValueError(f"vision has unknown attributes {unknown}; accepted are {', '.join(_OWN)}")
        config = self.vision_config()
        self.hidden_sizes, self.depths = list(config.widths), list(config.depths)
        self.hidden_size = config.widths[-1]
        self.stage_names = [f"stage{number}" for number in range(1, len(config.widths) + 1)]
        self.set_output_features_output_indices(out_features, out_indices)

    def vision_config(self) -> VisionConfig:
        """The architecture."""
        return preset(
            self.size,
            attention=self.attention,
            options=self.options,
            channels=self.num_channels,
            outputs=max(self.num_labels, 1),
            **self.vision,
        )


class _Model(PreTrainedModel):  # type: ignore[misc]
    """What both models have in common."""

    config_class = FarfieldVisionConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ("_Block",)

    def _init_weights(self, module: Any) -> None:
        """What a checkpoint may lack: the statistics, which the config has, and the head, if it is a backbone's."""
        if isinstance(module, Backbone):
            config = module.config
            init.copy_(module.mean, torch.tensor(config.mean or (0.0,) * config.channels))
            init.copy_(module.std, torch.tensor(config.std or (1.0,) * config.channels))
        elif isinstance(module, VisionModel):
            init.zeros_(module.target_mean)
            init.ones_(module.target_std)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)


class FarfieldBackbone(BackboneMixin, _Model):  # type: ignore[misc]
    """The maps of the chosen stages.

    Args:
        config: of the model.
    """

    has_attentions = False

    def __init__(self, config: FarfieldVisionConfig) -> None:
        super().__init__(config)
        self.num_features = config.hidden_sizes
        self.backbone = _drawn(VisionModel(config.vision_config()).backbone)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **arguments: Any,
    ) -> Any:
        """`feature_maps`, each `[B, C, H, W]`, fine to coarse.

        Args:
            pixel_values: `[B, channels, H, W]`, any size.
            output_hidden_states: give the maps of all stages, too.
            return_dict: False gives a tuple.
            **arguments: nothing else is known.

        Raises:
            ValueError: for output_attentions, or an unknown argument.
        """
        _refuse(arguments)
        maps = tuple(feature.map for feature in self.backbone(pixel_values))
        chosen = tuple(m for m, stage in zip(maps, self.stage_names, strict=True) if stage in self.out_features)
        hidden = maps if output_hidden_states else None
        if return_dict is False:
            return (chosen,) if hidden is None else (chosen, hidden)
        return BackboneOutput(feature_maps=chosen, hidden_states=hidden, attentions=None)


class FarfieldForImageClassification(_Model):
    """One answer per image.

    Args:
        config: of the model.
    """

    def __init__(self, config: FarfieldVisionConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = _drawn(VisionModel(config.vision_config()))
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **arguments: Any,
    ) -> Any:
        """Logits `[B, num_labels]`, and the cross-entropy in nats where labels are given.

        Args:
            pixel_values: `[B, channels, H, W]`, any size.
            labels: int64 `[B]`.
            return_dict: False gives a tuple.
            **arguments: nothing else is known.

        Raises:
            ValueError: for output_attentions, or an unknown argument.
        """
        _refuse(arguments)
        logits = self.model(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


_Drawn = TypeVar("_Drawn", bound=nn.Module)


def _drawn(model: _Drawn) -> _Drawn:
    """The model, told to Transformers as ready where it has drawn its numbers, which a model to be loaded has not."""
    for module in model.modules():
        if not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            module._is_hf_initialized = True  # type: ignore[assignment]
    return model


def _refuse(arguments: Mapping[str, Any]) -> None:
    for name, given in arguments.items():
        if given is not None and given is not False:
            why = "weights per pair of tokens are never computed" if name == "output_attentions" else "it is not known"
            raise ValueError(f"{name}={given!r} cannot be honoured: {why}")


def register_vision() -> None:
    """Makes `AutoConfig`, `AutoBackbone` and `AutoModelForImageClassification` know them; any number of times."""
    AutoConfig.register(FarfieldVisionConfig.model_type, FarfieldVisionConfig, exist_ok=True)
    AutoBackbone.register(FarfieldVisionConfig, FarfieldBackbone, exist_ok=True)
    AutoModelForImageClassification.register(FarfieldVisionConfig, FarfieldForImageClassification, exist_ok=True)
