"""A tokenizer for tests: every byte is a token."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def tokenizer(begin: bool = False) -> Any:
    """Every byte is a token, as if digits were split; with a first token if asked."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({word: i for i, word in enumerate(["<s>", *bytes_])}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    if begin:
        from tokenizers.processors import TemplateProcessing

        built.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>")
