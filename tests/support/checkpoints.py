"""Makes tiny random Qwen2.5-VL checkpoints on the spot, in the official layouts and at odd sizes.

Weights are scaled so that activations keep their size from layer to layer and logits spread by about 3: the greedy
token then leads by more than rounding, and depends on the whole prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

Layout = Literal["today", "old"]

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
ADDED = ("<tool_call>", "</tool_call>")
LOGIT_SPREAD = 3.0
TIED_LOGIT_SPREAD = 1.5  # more, and each token would only call for itself
_CORPUS = (
    "You are a helpful assistant. system user assistant",
    "What is in this picture? Describe the image, please. How many red circles are there?",
    "The quick brown fox jumps over the lazy dog; it's a test, isn't it? 1234567890",
    '{"shape": "circle", "color": "red"} Où est le carré bleu ? Здравствуйте, мир. 你好，世界',
)
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)  # of Qwen2's tokenizer.json
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_checkpoint(
    folder: Path,
    *,
    tied: bool = True,
    hidden: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    layers: int = 2,
    mlp: int = 192,
    vision_hidden: int = 64,
    vision_heads: int = 4,
    vision_depth: int = 2,
    vision_mlp: int = 108,
    fullatt_block_indexes: Sequence[int] = (1,),
    window_size: int = 56,
    vocab: int = 512,
    max_positions: int = 4096,
    layout: Layout = "today",
    seed: int = 0,
) -> Path:
    """Write a checkpoint folder: weights in bfloat16, tokenizer, chat template, image settings. Returns ``folder``.

    ``layout``: configuration and key names as transformers holds them (``model.language_model.*``, ``model.visual.*``)
    or as the published files have them (``model.*``, ``visual.*``). ``vocab`` may exceed the tokenizer, as real ones
    do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    text = {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": _mrope_section(hidden // heads)
        },
    }  # fmt: skip
    vision = {
        "depth": vision_depth, "hidden_size": vision_hidden, "intermediate_size": vision_mlp,
        "num_heads": vision_heads, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2,
        "window_size": window_size, "fullatt_block_indexes": list(fullatt_block_indexes),
        "out_hidden_size": hidden, "in_channels": 3,
    }  # fmt: skip
    outer: dict[str, object] = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": tied,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    config = Qwen2_5_VLConfig.from_dict(outer | {"text_config": text, "vision_config": vision})
    if layout == "today":
        config.save_pretrained(folder)
    else:
        _write(folder / "config.json", outer | _published(text, vision))
    weights = random_weights(config, seed)
    save_file({key_in(layout, name): weight for name, weight in weights.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    _save_settings(folder, tokenizer)
    return folder


def _published(text: Mapping[str, object], vision: Mapping[str, object]) -> dict[str, object]:
    """The configuration as the published checkpoints spell it: text settings in the open, rope in its older form."""
    flat: dict[str, object] = {key: value for key, value in text.items() if key != "rope_parameters"}
    rope = text["rope_parameters"]
    assert isinstance(rope, dict)
    flat |= {
        "hidden_act": "silu",
        "max_window_layers": 70,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "transformers_version": "4.41.2",
    }
    sizes: dict[str, object] = {key: value for key, value in vision.items() if key != "in_channels"}
    sizes |= {"in_chans": 3, "spatial_patch_size": 14, "tokens_per_second": 2, "hidden_act": "silu"}
    return flat | {"vision_config": sizes | {"model_type": "qwen2_5_vl"}}


def _mrope_section(head_dim: int) -> list[int]:
    """Frequencies for time, height and width, in about the real ratio of 16 : 24 : 24."""
    half = head_dim // 2
    time = half // 4
    height = (half - time) // 2
    return [time, height, half - time - height]


def key_in(layout: Layout, name: str) -> str:
    """A weight's name in the files, from its name in transformers."""
    if layout == "today":
        return name
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    return name.replace("model.language_model.", "model.", 1)


def random_weights(config: Qwen2_5_VLConfig, seed: int) -> dict[str, Tensor]:
    """By transformers' names; no head when it is tied."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        skeleton = Qwen2_5_VLForConditionalGeneration(config)
    spread = TIED_LOGIT_SPREAD if config.tie_word_embeddings else LOGIT_SPREAD
    weights = {
        name: _random(
            name,
            parameter.shape,
            spread if name.endswith(("embed_tokens.weight", "lm_head.weight")) else 1.0,
            generator,
        ).to(torch.bfloat16)
        for name, parameter in skeleton.named_parameters()
    }
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return weights


def _random(name: str, shape: torch.Size, gain: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith(".bias"):
        return 0.1 * noise
    if noise.dim() == 1:  # a norm's scale
        return 1 + 0.1 * noise
    return noise.mul(gain / float(noise[0].numel()) ** 0.5)


@lru_cache(maxsize=1)
def build_tokenizer() -> Tokenizer:
    """Byte-level BPE with Qwen's splitting and special tokens over a few hundred merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=[],
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in ADDED])
    return tokenizer


def _save_settings(folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_prefix_space": False,
            "additional_special_tokens": list(SPECIAL[1:]),
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "errors": "replace",
            "model_max_length": 4096,
            "split_special_tokens": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    _write(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    _write(
        folder / "preprocessor_config.json",
        {
            "min_pixels": 4 * 28 * 28,
            "max_pixels": 16 * 28 * 28,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
    )
    _write(
        folder / "generation_config.json",
        {
            "eos_token_id": [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")],
            "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        },
    )


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
