"""Shapes: random-weight checkpoints made on the spot, at sizes that are worth measuring.

Owns the sizes and a checkpoint's folder. Speed does not depend on what weights say, only on their number and type: so
nothing is downloaded, and the language linears are written as NF4 bytes directly, as a pre-quantised checkpoint has
them. Transformers, bitsandbytes and our own loader read the same folder, which makes peers' weights the same bits.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.shape_tokenizer import SPECIAL, save_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Qwen2_5_VLConfig

logger = logging.getLogger("lorikeet.bench")
MERGE, PATCH = 2, 14
SHARD_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Vision:
    """The vision tower's sizes."""

    depth: int
    hidden: int
    heads: int
    mlp: int
    full_attention: tuple[int, ...]
    window: int = 112


@dataclass(frozen=True, slots=True)
class Shape:
    """A checkpoint's sizes."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    is_tied: bool
    vision: Vision
    max_positions: int = 32768
    max_pixels: int = 12845056

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


_TOWER = Vision(32, 1280, 16, 3420, (7, 15, 23, 31))
SHAPES: Mapping[str, Shape] = {
    "tiny": Shape(128, 2, 4, 2, 192, 1024, True, Vision(2, 64, 4, 108, (1,), 56), 4096, 64 * 28 * 28),
    # Qwen2.5-0.5B's language model with a tower that two cores can bear.
    "0.5b": Shape(
        896, 24, 14, 2, 4864, 151936, True, Vision(6, 320, 4, 864, (2, 5)), max_pixels=1024 * 28 * 28
    ),
    "3b": Shape(2048, 36, 16, 2, 11008, 151936, True, _TOWER),
    "7b": Shape(3584, 28, 28, 4, 18944, 152064, False, _TOWER),
}


def make_checkpoint(shape: Shape, folder: Path, *, seed: int = 0, is_quantised: bool = True) -> Path:
    """Write a checkpoint folder. ``is_quantised``: the language linears in NF4 with double quantisation, else in bf16.

    Raises FileExistsError if the folder holds anything.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name another folder, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder, shape.vocab)
    config = _config(shape)
    description = config.to_dict() | {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    if is_quantised:
        description["quantization_config"] = _quantization()
    _write(folder / "config.json", description)
    _write(folder / "preprocessor_config.json", _pictures(shape))
    text = config.get_text_config()  # transformers 5.17 has the ids here alone
    eos = [text.eos_token_id, text.pad_token_id]
    _write(folder / "generation_config.json", {"eos_token_id": eos, "pad_token_id": text.pad_token_id})
    _save_shards(folder, config, seed, is_quantised)
    return folder


def _config(shape: Shape) -> Qwen2_5_VLConfig:
    from transformers import Qwen2_5_VLConfig

    ids = {token: shape.vocab - len(SPECIAL) + place for place, token in enumerate(SPECIAL)}
    half = shape.head_dim // 2
    time = half // 4
    height = (half - time) // 2
    text = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": shape.is_tied,
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000000.0,
            "mrope_section": [time, height, half - time - height],
        },
    }
    vision = {
        "depth": shape.vision.depth,
        "hidden_size": shape.vision.hidden,
        "intermediate_size": shape.vision.mlp,
        "num_heads": shape.vision.heads,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "spatial_merge_size": MERGE,
        "window_size": shape.vision.window,
        "fullatt_block_indexes": list(shape.vision.full_attention),
        "out_hidden_size": shape.hidden,
        "in_channels": 3,
    }
    outer = {
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": shape.is_tied,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "dtype": "bfloat16",
    }
    return Qwen2_5_VLConfig.from_dict(outer)


def _quantization() -> dict[str, object]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["model.visual", "lm_head"],
    }


def _pictures(shape: Shape) -> dict[str, object]:
    return {
        "min_pixels": 4 * 28 * 28,
        "max_pixels": shape.max_pixels,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }


def _save_shards(folder: Path, config: Qwen2_5_VLConfig, seed: int, is_quantised: bool) -> None:
    """Weights in files of about ``SHARD_BYTES``, so that no more than one of them is in memory."""
    from safetensors.torch import save_file

    index: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(_shards(config, seed, is_quantised), 1):
        name = f"model-{number:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, name)
        total += sum(tensor.nbytes for tensor in shard.values())
        logger.info("shapes.shard file=%s tensors=%d", name, len(shard))
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _shards(config: Qwen2_5_VLConfig, seed: int, is_quantised: bool) -> Iterator[dict[str, Tensor]]:
    from bench.shape_weights import make_tensors

    shard: dict[str, Tensor] = {}
    num_bytes = 0
    for name, tensor in make_tensors(config, seed, is_quantised=is_quantised):
        if num_bytes and num_bytes + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = tensor
        num_bytes += tensor.nbytes
    yield shard


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
