"""Farfield as an attention implementation of Transformers 5.

    >>> from farfield.interop.transformers import register
    >>> register()
    >>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="farfield")

"farfield" is fma with mean summaries, which needs no new parameters; "farfield:<recipe>" is another recipe;
:func:`configure` sets options, and adds parameters where a recipe has some; with `dims=2` it works over the patches of
a vision transformer. Farfield's own vision models are there for `AutoBackbone` and `AutoModelForImageClassification`.
"""

try:
    import transformers as _transformers
except ImportError as error:
    raise ImportError(
        f"farfield.interop.transformers needs {error.name}: pip install 'farfield[transformers]' brings it"
    ) from error
if int(_transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(
        f"farfield.interop.transformers needs Transformers 5 and its attention interface, found "
        f"{_transformers.__version__}: pip install 'transformers>=5'"
    )

from farfield.interop.transformers.backbone import (
    FarfieldBackbone,
    FarfieldForImageClassification,
    FarfieldVisionConfig,
)
from farfield.interop.transformers.loading import configure, load
from farfield.interop.transformers.registering import register
from farfield.interop.transformers.streams import StreamCache

__all__ = [
    "FarfieldBackbone",
    "FarfieldForImageClassification",
    "FarfieldVisionConfig",
    "StreamCache",
    "configure",
    "load",
    "register",
]
