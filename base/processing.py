"""Reads a checkpoint's tokenizer, chat template and image settings into a Processor.

Knows where the published checkpoints keep them. Place in a request's way: none; once, at load.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Final

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from base.chat import ChatTemplate
from base.config import BaseConfig
from base.errors import BaseNotFound, InvalidMessage, UnsupportedBase
from base.images import ImagePreparer
from base.processor import PatchSizes, Processor, TokenIds
from base.tokens import Tokens

QWEN2_5_VL_TEMPLATE: Final = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""For checkpoints that ship none: what Qwen2.5-VL's own gives for text and images."""
logger = logging.getLogger("lorikeet.base")


def load_processor(folder: Path, ids: TokenIds, patches: PatchSizes, base: BaseConfig) -> Processor:
    """The processor of the checkpoint in ``folder``. Raises BaseNotFound, UnsupportedBase."""
    tokenizer = _read_tokenizer(folder, base.source)
    tokens = Tokens(tokenizer.backend_tokenizer.to_str())
    _check_ids(tokens, ids, base.source)
    named = {
        name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
    }
    try:
        template = ChatTemplate(_read_template(folder, tokenizer), tokens, named)
    except InvalidMessage as error:
        raise UnsupportedBase(base.source, str(error)) from error
    return Processor(tokens, template, _read_images(folder, patches, base), ids)


def _read_tokenizer(folder: Path, source: str) -> PreTrainedTokenizerBase:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise BaseNotFound(
            source, "it has no tokenizer.json (nor vocab.json): give a whole checkpoint folder"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BaseNotFound(
            source, f"its tokenizer cannot be read ({error}): tokenizer.json is needed"
        ) from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UnsupportedBase(source, "its tokenizer is no byte-level BPE tokenizer.json")
    return tokenizer


def _check_ids(tokens: Tokens, ids: TokenIds, source: str) -> None:
    if tokens.size > ids.vocab_size:
        raise UnsupportedBase(
            source, f"its tokenizer has {tokens.size} tokens, its embedding only {ids.vocab_size} rows"
        )
    if tokens.added_id("<|image_pad|>") != ids.image:
        raise UnsupportedBase(source, f"image_token_id {ids.image} of its config.json is not <|image_pad|>")


def _read_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """The processor's template, else the tokenizer's, else Qwen2.5-VL's."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    if (path := folder / "chat_template.json").is_file():
        return str(json.loads(path.read_text(encoding="utf-8"))["chat_template"])
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if isinstance(template, str):
        return template
    logger.warning("base.no_chat_template using=qwen2.5-vl")
    return QWEN2_5_VL_TEMPLATE


def _read_images(folder: Path, patches: PatchSizes, base: BaseConfig) -> ImagePreparer:
    try:
        images = ImagePreparer(folder, base.min_pixels, base.max_pixels)
    except (OSError, ValueError, KeyError) as error:
        raise BaseNotFound(
            base.source, f"its image settings cannot be read ({error}): preprocessor_config.json is needed"
        ) from error
    if (found := (images.patch_size, images.merge_size)) != (patches.patch_size, patches.merge_size):
        raise UnsupportedBase(
            base.source,
            f"preprocessor_config.json cuts patches of {found[0]} merged by {found[1]}, "
            f"config.json wants {patches.patch_size} by {patches.merge_size}",
        )
    return images
