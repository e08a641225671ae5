"""The pocket base's shape: a Qwen2.5-VL configuration of a few million parameters, and its pixel limits.

Owns: every number of the architecture. Widths are multiples of 64, so that 4-bit kernels take them; windows of
2 x 2 merged patches and full attention in blocks 1 and 3, so that both occur as in the real model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer
from transformers import GenerationConfig, Qwen2_5_VLConfig

from base.pocket.recipe.tokenizer import VOCAB_SIZE

MIN_PIXELS: Final = 112 * 112
MAX_PIXELS: Final = 17_000  # 16 picture tokens for an even picture, 20 for a wide or a tall one
SPECIAL_NAMES: Final = (
    "im_end", "endoftext", "image_pad", "video_pad", "vision_start", "vision_end",
)  # fmt: skip
ROPE_THETA: Final = (
    20.0  # fast enough that the width section tells neighbouring columns of a small grid apart
)


def build_config(tokenizer: Tokenizer) -> Qwen2_5_VLConfig:
    """The configuration, with the token ids of `tokenizer`."""
    special = {name: _token_id(tokenizer, f"<|{name}|>") for name in SPECIAL_NAMES}
    text = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
        "initializer_range": 0.04, "tie_word_embeddings": True, "bos_token_id": None,
        "eos_token_id": special["im_end"], "pad_token_id": special["endoftext"],
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": [8, 12, 12]},
    }  # fmt: skip
    vision = {
        "depth": 4, "hidden_size": 128, "intermediate_size": 384, "num_heads": 4, "patch_size": 14,
        "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 56, "fullatt_block_indexes": [1, 3],
        "out_hidden_size": 256, "initializer_range": 0.04, "in_channels": 3,
    }  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=special["image_pad"],
        video_token_id=special["video_pad"],
        vision_start_token_id=special["vision_start"],
        vision_end_token_id=special["vision_end"],
    )


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None
    return int(found)


def save_processing(folder: Path, tokenizer: Tokenizer) -> None:
    """Write preprocessor_config.json and generation_config.json into `folder`."""
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "merge_size": 2,
        "patch_size": 14,
        "processor_class": "Qwen2_5_VLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "temporal_patch_size": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1) + "\n")
    GenerationConfig(
        do_sample=False,
        eos_token_id=[tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")],
        pad_token_id=tokenizer.token_to_id("<|endoftext|>"),
        max_new_tokens=128,
    ).save_pretrained(folder)
