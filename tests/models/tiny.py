"""Tiny language models with random weights, and a tokenizer of characters; no files, no network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

LAYERS, D, VOCAB = 3, 16, 64
FAMILIES = ("llama", "gpt2", "neox")
DOCUMENTS = [
    "the quick brown fox jumps over the lazy dog. " * 3,
    "to be or not to be, that is the question.",
    "a",
    "all happy families are alike; every unhappy family is unhappy in its own way. " * 2,
    "call me ishmael. " * 4,
]


def tiny_model(family: str = "llama") -> nn.Module:
    """Return a causal language model of 3 blocks and width 16, larger weights than usual."""
    import transformers as hf

    torch.manual_seed(0)
    if family == "llama":
        config: Any = hf.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=D,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            initializer_range=0.3,
        )
        return hf.LlamaForCausalLM(config).eval()
    if family == "gpt2":
        config = hf.GPT2Config(
            vocab_size=VOCAB, n_embd=D, n_layer=LAYERS, n_head=2, n_positions=256,
            initializer_range=0.3, bos_token_id=1, eos_token_id=1,
        )  # fmt: skip
        return hf.GPT2LMHeadModel(config).eval()
    config = hf.GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=D, intermediate_size=24, num_hidden_layers=LAYERS,
        num_attention_heads=2, max_position_embeddings=256, initializer_range=0.3,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return hf.GPTNeoXForCausalLM(config).eval()


class CharTokenizer:
    """One token per character."""

    bos_token_id = 1
    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [3 + ord(c) % (VOCAB - 3) for c in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{i}>" for i in ids)
