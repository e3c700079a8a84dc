"""Parts of tiny random pipelines: tokenizers, text encoders, random numbers."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["a", "red", "ball", "rolls", "over", "the", "sea", "of", "glass", "slowly", "blue", "cube"]


def words_tokenizer(cls: Any, special: list[str], **names: Any) -> Any:
    """A tokenizer of class `cls` that knows a dozen words: every word is one token."""
    vocab = {word: index for index, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token=special[-1]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return cls(tokenizer_object=inner, **names)


def t5(cls: Any, dim: int, vocab: int = 32) -> tuple[Any, Any]:
    """A T5-like encoder of `cls` with `dim` channels, and its tokenizer."""
    from transformers import PreTrainedTokenizerFast, T5Config, UMT5Config

    config = {"T5EncoderModel": T5Config, "UMT5EncoderModel": UMT5Config}[cls.__name__]
    encoder = cls(
        config(
            vocab_size=vocab, d_model=dim, d_kv=8, d_ff=16, num_layers=1, num_heads=2, relative_attention_num_buckets=8
        )
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return encoder.eval(), words_tokenizer(PreTrainedTokenizerFast, list(names.values()), **names)


def bytes_tokenizer(template: str) -> Any:
    """Qwen's tokenizer with no merges: every byte is one token. `template`: of a chat, Jinja."""
    from transformers import Qwen2Tokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate([*letters, "<|endoftext|>", "<|im_start|>", "<|im_end|>"])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = template
    return tokenizer


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_text(dim: int) -> dict[str, Any]:
    """Settings of the language model inside Qwen2.5-VL with `dim` channels, one layer per hidden state that is taken."""
    return {
        "vocab_size": 264,
        "hidden_size": dim,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]},
        "pad_token_id": 256,
        "bos_token_id": 256,
        "eos_token_id": 256,
    }


def randomised(model: Any) -> Any:
    """Every parameter random and none zero, so that an output depends on everything."""
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.8 / parameter[0].numel() ** 0.5)
            else:
                parameter.normal_(0, 0.1).add_(1.0 if "norm" in path and path.endswith("weight") else 0.0)
    return model.eval()
