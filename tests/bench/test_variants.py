"""LABEL=RECIPE[:OPTION=VALUE...]."""

from __future__ import annotations

import pytest

from farfield.bench.variants import Variant, parse_variant


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("window", Variant("window", "window", {})),
        ("near=blocks", Variant("near", "blocks", {})),
        (
            "fma+open=fma:open=16:choose=bounds:bias=None:count_bias=False",
            Variant("fma+open", "fma", {"open": 16, "choose": "bounds", "bias": None, "count_bias": False}),
        ),
        ("w=window:size=7", Variant("w", "window", {"size": 7})),
    ],
)
def test_words_become_variants(text: str, want: Variant) -> None:
    assert parse_variant(text) == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("../x=fma", "is not a variant: write LABEL=RECIPE"),
        ("=fma", "is not a variant"),
        ("a=no_such", "no_such"),
        ("a=fma:size=3", "'size=3' in variant 'a=fma:size=3' is no option of fma; it takes block, rank"),
        ("a=fma:rank", "'rank' in variant"),
        ("a=fma:rank=2:rank=4", "option 'rank' comes twice"),
        ("a=dense:rank=2", "is no option of dense; it takes none"),
    ],
)
def test_others_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_variant(text)
