"""LogitCheck: what a model answers next on a few fixed prompts, by stock transformers and stock PEFT.

Owns: the prompts (texts and one drawn picture), the way to run them, and how two sets of logits are compared. Nothing
of our serving computes here, so that a merge or a conversion is proved by others' code.
Place in a training run: none; export, import and shrink prove their work with it.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from base.checkpoint import Checkpoint
from base.config import BaseConfig
from base.loader import open_processor
from base.processor import Processor
from base.prompt import ImagePart, Message, PromptInputs, TextPart
from base.quantization import plan_quantization
from training.tools.plain import PlainSite, write_plain

NUM_POSITIONS: Final = 8
"""Of each prompt's last tokens, the answer's first among them."""
_TEXTS: Final = (
    "What is in this picture?",
    "Answer in one word: what is the capital of France?",
    "Write three short sentences about a red circle and a blue square.",
)
_FLOAT32_BYTES_LIMIT: Final = 8 << 30
"""Checkpoints up to this size are run in fp32 on a CPU, which is exact and there also faster; larger ones as stored."""


@dataclass(frozen=True, slots=True)
class LogitDifference:
    """How far one set of logits is from another, both root mean square over all probes, positions and tokens."""

    error: float
    """Between what was made and what it must equal."""
    effect: float
    """Between the adapter and its base: what there was to lose."""
    spread: float
    """Standard deviation of the wanted logits: the size of what is compared."""
    same_top: float
    """Share of positions with the same most likely token."""

    @property
    def of_spread(self) -> float:
        return self.error / self.spread if self.spread else 0.0

    @property
    def of_effect(self) -> float:
        return self.error / self.effect if self.effect else 0.0

    def as_dict(self) -> dict[str, float]:
        return {
            "error": self.error,
            "effect": self.effect,
            "spread": self.spread,
            "error_of_spread": self.of_spread,
            "error_of_effect": self.of_effect,
            "same_top": self.same_top,
        }

    @property
    def text(self) -> str:
        return (
            f"logits: rms error {self.error:.3g}, {100 * self.of_effect:.2g} % of the adapter's effect "
            f"({self.effect:.3g}) and {100 * self.of_spread:.2g} % of their spread; same top token at "
            f"{100 * self.same_top:.0f} % of positions"
        )


def compare(made: Tensor, wanted: Tensor, base: Tensor) -> LogitDifference:
    """All [P, V] float32."""
    return LogitDifference(
        error=_rms(made - wanted),
        effect=_rms(wanted - base),
        spread=float(wanted.std()),
        same_top=float((made.argmax(-1) == wanted.argmax(-1)).float().mean()),
    )


def _rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


class LogitCheck:
    """The prompts of one base, and the type and device on which they are run."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint: Final = checkpoint
        self._config: Final = BaseConfig(source=str(checkpoint.folder))
        processor = open_processor(self._config)
        self._prompts: Final = probe_prompts(processor)
        self._image_token_id: Final = processor.image_token_id
        self.device: Final = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        num_bytes = sum(path.stat().st_size for path in checkpoint.weight_files)
        self._is_quantised: Final = checkpoint.stored_quantization is not None
        is_small = num_bytes <= _FLOAT32_BYTES_LIMIT
        is_exact = self.device.type == "cpu" and is_small and not self._is_quantised
        stored = getattr(checkpoint.config, "dtype", None)
        self.dtype: Final = torch.float32 if is_exact else stored or torch.bfloat16

    def base(self) -> Qwen2_5_VLForConditionalGeneration:
        """The checkpoint as stock transformers loads it; one that is stored in 4 bits stays so."""
        model = self.load(self._checkpoint.folder)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = False  # packed, it is rounded once more
        return model

    def load(self, folder: Path) -> Qwen2_5_VLForConditionalGeneration:
        """The checkpoint in ``folder``, of the same kind, as stock transformers loads it."""
        had_bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                folder, config=self._model_config(folder), dtype=self.dtype,
                device_map={"": self.device}, local_files_only=True,
            )  # fmt: skip
        finally:
            if had_bars:
                transformers_logging.enable_progress_bar()
        model.eval().requires_grad_(False)
        return model

    def _model_config(self, folder: Path) -> Qwen2_5_VLConfig:
        """With the list of 16-bit modules made anew, which in the wild names modules of older layouts."""
        config = Qwen2_5_VLConfig.from_pretrained(folder, local_files_only=True)
        if self._is_quantised:
            config.quantization_config = plan_quantization(self._checkpoint, self._config).stored
        return config

    @torch.no_grad()
    def logits(self, model: torch.nn.Module) -> Tensor:
        """[P, V] float32 on the CPU: the last positions of every prompt, one after the other."""
        rows = [self._run(model, prompt) for prompt in self._prompts]
        return torch.cat(rows)

    def adapted(self, model: Qwen2_5_VLForConditionalGeneration, folder: Path) -> Tensor:
        """As ``logits``, with stock PEFT's reading of an adapter, which is taken off again."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an older name
            adapted = PeftModel.from_pretrained(model, str(folder))
        adapted.eval()
        try:
            return self.logits(adapted)
        finally:
            adapted.unload()

    def adapted_by(
        self, model: Qwen2_5_VLForConditionalGeneration, sites: Mapping[str, PlainSite], beside: Path
    ) -> Tensor:
        """As ``adapted``, of an adapter at hand: written for PEFT under ``beside``, and removed again.

        Whatever layout its package has, PEFT reads it in today's, and so misses none of it.
        """
        with tempfile.TemporaryDirectory(dir=beside) as folder:
            write_plain(Path(folder), sites, "")
            return self.adapted(model, Path(folder))

    def _run(self, model: torch.nn.Module, prompt: PromptInputs) -> Tensor:
        inputs = {name: each.to(self.device) for name, each in self._inputs(prompt).items()}
        logits: Tensor = model(**inputs, use_cache=False, logits_to_keep=NUM_POSITIONS).logits[0]
        return logits.float().cpu()

    def _inputs(self, prompt: PromptInputs) -> dict[str, Tensor]:
        """What stock transformers' own processor would give the model."""
        ids = torch.tensor([prompt.ids])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prompt.images:
            inputs["pixel_values"] = torch.cat([image.pixels for image in prompt.images]).to(self.dtype)
            inputs["image_grid_thw"] = torch.tensor([image.grid for image in prompt.images])
            inputs["mm_token_type_ids"] = (ids == self._image_token_id).int()
        return inputs


def probe_prompts(processor: Processor) -> tuple[PromptInputs, ...]:
    """Each text alone, and the first with a picture."""
    with_picture = (ImagePart(_picture()), TextPart(_TEXTS[0]))
    turns: Sequence[tuple[ImagePart | TextPart, ...]] = (
        *((TextPart(text),) for text in _TEXTS),
        with_picture,
    )
    return tuple(processor.prepare_chat([Message("user", parts)]) for parts in turns)


def _picture(side: int = 224) -> Image.Image:
    """A colour gradient with a dark square on it: something at every place, and one thing to see."""
    ramp = Image.linear_gradient("L").resize((side, side))
    picture = Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180)))
    picture.paste((20, 20, 40), (side // 4, side // 4, side // 2, side // 2))
    return picture
