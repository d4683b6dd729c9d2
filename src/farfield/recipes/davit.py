"""davit: dual attention, windows in even layers, between channels in odd ones."""

from __future__ import annotations

from farfield.far.channels import Channels
from farfield.near.partition import Partition
from farfield.recipes.registry import Parts, Recipe, Setting

__all__ = ["RECIPE"]


def _parts(setting: Setting, size: int | tuple[int, ...] = 7) -> Parts:
    return Parts(near=Partition(size)) if setting.layer % 2 == 0 else Parts(far=Channels())


RECIPE = Recipe(
    name="davit",
    title="dual attention: windows in even layers, channels attend to channels in odd ones",
    citation="Ding et al., DaViT, ECCV 2022, arXiv 2204.03645",
    near="tile of size tokens per axis (even layers)",
    far="channels, each a summary of all tokens (odd layers)",
    merge="in sequence",
    cost="n·size per axis; n·head_dim",
    dims=(1, 2, 3),
    causal=False,
    proof="tests/recipes/test_davit.py::test_equals_attention_over_transposed_heads",
    departures=(
        "scores between channels are divided by the root of the number of tokens and values are mixed, as in the "
        "second version; the first divided by the root of the channels though it sums over tokens, and mixed "
        "what it called queries; the convolutions before both attentions (CPE) belong to the model's block"
    ),
    parts=_parts,
)
