"""Random weights that a model can run on: NF4 bytes made directly, and 16-bit ones scaled so that activations keep
their size and greedy tokens depend on the prompt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Final

import torch
from bitsandbytes.functional import create_dynamic_map, get_4bit_type
from bitsandbytes.utils import pack_dict_to_tensor
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

BLOCK: Final = 64
NESTED_BLOCK: Final = 256
LOGIT_SPREAD: Final = 3.0
TIED_LOGIT_SPREAD: Final = 1.5
"""More, and each token would only call for itself."""
SCALE_VARIATION: Final = 0.2
"""Blocks' scales differ by so much of their mean."""
_QUANTISED: Final = re.compile(r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")


def make_tensors(config: Qwen2_5_VLConfig, seed: int, *, is_quantised: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of everything that the checkpoint's files hold, in today's layout; one at a time."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        skeleton = Qwen2_5_VLForConditionalGeneration(config)
    is_tied = bool(config.tie_word_embeddings)
    for name, parameter in skeleton.named_parameters():
        if is_tied and name == "lm_head.weight":
            continue
        if is_quantised and _QUANTISED.fullmatch(name):
            yield from nf4_tensors(name, parameter.shape[0], parameter.shape[1], generator)
        else:
            yield name, _sixteen_bit(name, parameter.shape, is_tied, generator)


def _sixteen_bit(name: str, shape: torch.Size, is_tied: bool, generator: torch.Generator) -> Tensor:
    noise = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)
    if name.endswith(".bias"):
        return noise.mul_(0.1)
    if noise.dim() == 1:  # a norm's scale
        return noise.mul_(0.1).add_(1)
    is_vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight"))
    gain = (TIED_LOGIT_SPREAD if is_tied else LOGIT_SPREAD) if is_vocabulary else 1.0
    return noise.mul_(gain / math.sqrt(noise[0].numel()))


def nf4_tensors(
    name: str, num_out: int, num_in: int, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """What bitsandbytes' own serialisation holds for a 4-bit linear: random codes, scales that give 1 / sqrt(in).

    Raises ValueError where the weights are no whole number of blocks of 64.
    """
    num = num_out * num_in
    if num % BLOCK:
        raise ValueError(f"{name} [{num_out}, {num_in}] is no whole number of blocks of {BLOCK}")
    codes = torch.empty(num // 2, 1, dtype=torch.uint8).random_(0, 256, generator=generator)
    code_values = get_4bit_type("nf4", device="cpu").float()  # type: ignore[no-untyped-call]
    mean_scale = 1 / (math.sqrt(num_in) * float(code_values.pow(2).mean().sqrt()))
    num_blocks = num // BLOCK
    scales = torch.empty(num_blocks, dtype=torch.uint8).random_(0, 256, generator=generator)
    nested = torch.full((math.ceil(num_blocks / NESTED_BLOCK),), SCALE_VARIATION * mean_scale)
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": "bfloat16",
        "shape": [num_out, num_in],
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": mean_scale,
    }
    yield name, codes
    yield f"{name}.absmax", scales
    yield f"{name}.quant_map", code_values
    yield f"{name}.nested_absmax", nested
    yield f"{name}.nested_quant_map", create_dynamic_map().float()  # type: ignore[no-untyped-call]
    yield f"{name}.quant_state.bitsandbytes__nf4", pack_dict_to_tensor(state)  # type: ignore[no-untyped-call]
