"""The published bases as modules without numbers, and the embedded one's shape."""

from __future__ import annotations

from functools import cache

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from training.plan.shape import BaseShape


def config_of(shape: BaseShape) -> Qwen2_5_VLConfig:
    """As its ``config.json`` says."""
    vision = shape.vision
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "intermediate_size": shape.mlp,
            "vocab_size": shape.vocab,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "tie_word_embeddings": shape.is_head_tied,
        },
        vision_config={
            "depth": vision.depth,
            "hidden_size": vision.hidden,
            "num_heads": vision.heads,
            "intermediate_size": vision.mlp,
            "out_hidden_size": shape.hidden,
            "fullatt_block_indexes": list(vision.full_blocks),
        },
        tie_word_embeddings=shape.is_head_tied,
    )


@cache
def skeleton(shape: BaseShape) -> Qwen2_5_VLForConditionalGeneration:
    """On the meta device; not to be changed."""
    return new_skeleton(shape)


def new_skeleton(shape: BaseShape) -> Qwen2_5_VLForConditionalGeneration:
    """A copy of one's own."""
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config_of(shape))
