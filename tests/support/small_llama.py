"""A Llama of 4 layers that knows bytes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def config(**changes: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    return LlamaConfig(**sizes | changes)


def model(**changes: Any) -> LlamaForCausalLM:
    """Always the same, ready to train."""
    torch.manual_seed(0)
    return LlamaForCausalLM(config(**changes)).train()
