"""The oracle: stock transformers, and PEFT, run alone on the same quantised base.

Nothing of ours computes here: the model comes from ``from_pretrained`` with BitsAndBytesConfig, adapters from
``PeftModel.from_pretrained``, tokens from ``generate``, positions from transformers. bitsandbytes is kept from packing
weights on the CPU (its packed way is 0.3 % apart).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast
from unittest.mock import patch

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from base.processor import PromptInputs

_NO_TOKEN = 1 << 30


@dataclass(frozen=True, slots=True)
class Reference:
    """Greedy tokens, and by how much each led the runner-up's logit."""

    tokens: tuple[int, ...]
    margins: tuple[float, ...]

    def num_certain(self, margin: float = 0.05) -> int:
        """How many tokens come before the first that leads by ``margin`` or less, which rounding may change."""
        return next((i for i, lead in enumerate(self.margins) if lead <= margin), len(self.margins))


class _Generated(Protocol):
    """What we read of ``generate``'s answer."""

    sequences: Tensor  # [1, T + N]
    logits: tuple[Tensor, ...]  # N of [1, V]


class Oracle:
    """One base, and adapters by name, each run alone."""

    def __init__(
        self,
        folder: Path,
        *,
        quantized: bool = True,
        adapters: Mapping[str, Path] | None = None,
        device: str = "cpu",
    ) -> None:
        base = load_stock(folder, quantized=quantized, device=device)
        self.config = base.config
        self._model: nn.Module = base
        self._base = base
        for name, package in (adapters or {}).items():
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(str(package), adapter_name=name)
            else:
                self._model = PeftModel.from_pretrained(base, str(package), adapter_name=name)
        self._model.eval()

    def generate(self, prompt: PromptInputs, num_tokens: int, adapter: str | None = None) -> Reference:
        """Greedy, ``num_tokens`` of them; end tokens are ordinary ones here."""
        if adapter is None:
            if isinstance(self._model, PeftModel):
                with self._model.disable_adapter():
                    return self._generate(prompt, num_tokens)
            return self._generate(prompt, num_tokens)
        if not isinstance(self._model, PeftModel):
            raise KeyError(adapter)
        self._model.set_adapter(adapter)
        return self._generate(prompt, num_tokens)

    def compose(self, name: str, weights: Mapping[str, float]) -> None:
        """PEFT's own: the adapters' matrices stacked, with their weights.

        In fp32, as the adapters themselves are; left alone, PEFT would round the stacked ones to the base's 16 bits.
        """
        if not isinstance(self._model, PeftModel):
            raise KeyError(name)
        with patch.object(BaseTunerLayer, "_move_adapter_to_device_of_base_layer"):
            self._model.add_weighted_adapter(
                list(weights), list(weights.values()), name, combination_type="cat"
            )

    @torch.no_grad()
    def _generate(self, prompt: PromptInputs, num_tokens: int) -> Reference:
        generate = cast("Callable[..., _Generated]", self._model.generate)
        inputs = model_inputs(prompt, self.config.image_token_id)
        output = generate(
            **{name: each.to(self._base.device) for name, each in inputs.items()},
            max_new_tokens=num_tokens,
            eos_token_id=_NO_TOKEN,  # so that the run always has its full length
            do_sample=False,
            repetition_penalty=1.0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits = torch.stack([step[0].float() for step in output.logits])  # [N, V]
        top = logits.topk(2, dim=-1).values
        tokens = output.sequences[0, len(prompt.ids) :].tolist()
        return Reference(tuple(tokens), tuple((top[:, 0] - top[:, 1]).tolist()))


def load_stock(
    folder: Path, *, quantized: bool = True, device: str = "cpu"
) -> Qwen2_5_VLForConditionalGeneration:
    """The base as transformers loads it: NF4 as ours is, or 16 bits; a pre-quantised one as it is."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
    transformers_logging.disable_progress_bar()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map={"": device},
        quantization_config=settings if quantized else None,
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    model.eval().requires_grad_(False)
    return model


def model_inputs(prompt: PromptInputs, image_token_id: int) -> dict[str, Tensor]:
    """What stock transformers' processor would give the model for this prompt."""
    ids = torch.tensor([prompt.ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.images:
        inputs["pixel_values"] = torch.cat([image.pixels for image in prompt.images])
        inputs["image_grid_thw"] = torch.tensor([image.grid for image in prompt.images])
        inputs["mm_token_type_ids"] = (ids == image_token_id).int()
    return inputs


def same_where_certain(tokens: Sequence[int], reference: Reference, margin: float = 0.05) -> bool:
    """Whether ``tokens`` are the reference's up to its first uncertain one."""
    certain = reference.num_certain(margin)
    return tuple(tokens[:certain]) == reference.tokens[:certain]
