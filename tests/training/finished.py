"""Finished adapters and small checkpoints for the tests of export, import, inspect and shrink."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from base.config import BaseConfig
from base.loader import open_processor
from base.processor import ImagePart, Message, TextPart
from tests.support.checkpoints import Layout, make_checkpoint
from tests.support.oracle import model_inputs
from tests.support.packages import peft_adapter
from tests.support.scenes import scene

SMALL = {"hidden": 64, "heads": 4, "kv_heads": 2, "layers": 2, "mlp": 96, "vision_hidden": 32, "vision_heads": 2,
         "vision_mlp": 48, "vocab": 448}  # fmt: skip


def small_checkpoint(folder: Path, layout: Layout = "today") -> Path:
    return make_checkpoint(folder, layout=layout, **SMALL)  # type: ignore[arg-type]


def stock(checkpoint: Path) -> Qwen2_5_VLForConditionalGeneration:
    """By stock transformers, in fp32, so that only what is stored can differ."""
    transformers_logging.disable_progress_bar()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    model.eval().requires_grad_(False)
    return model


def made_by_peft(checkpoint: Path, folder: Path, config: LoraConfig, seed: int = 0) -> Path:
    """A package by stock PEFT, with random weights."""
    peft_adapter(stock(checkpoint), config, folder, seed)
    return folder


@torch.no_grad()
def answers(model: torch.nn.Module, checkpoint: Path) -> Tensor:
    """[T, V] of one question with a picture: logits by stock code alone."""
    processor = open_processor(BaseConfig(source=str(checkpoint)))
    parts: tuple[ImagePart | TextPart, ...] = (ImagePart(_picture()), TextPart("How many red circles?"))
    inputs = model_inputs(processor.prepare_chat([Message("user", parts)]), processor.image_token_id)
    logits: Tensor = model(**inputs, use_cache=False).logits[0]
    return logits.float()


def _picture() -> Image.Image:
    return scene("red", "circle")


def adapted(checkpoint: Path, package: Path) -> Tensor:
    """``answers`` of base and package, by stock PEFT."""
    return answers(PeftModel.from_pretrained(stock(checkpoint), str(package)).eval(), checkpoint)


def relative(made: Tensor, wanted: Tensor) -> float:
    """|made - wanted| / |wanted|."""
    return float((made - wanted).norm() / wanted.norm())


def config_of(folder: Path) -> dict[str, object]:
    config = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(config, dict)
    return config


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def rewrite(
    folder: Path, *, tensors: Mapping[str, Tensor] | None = None, config: Mapping[str, object] | None = None
) -> None:
    """Put other tensors in a package, or change fields of its configuration."""
    if tensors is not None:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps({**config_of(folder), **config}))


def trained_from(
    checkpoint: Path, folder: Path, config: LoraConfig, moved: float = 0.02, seed: int = 0
) -> tuple[Path, Path, Tensor]:
    """A run of PEFT's own from an initialisation that may change the base: (initial, trained, trained answers)."""
    torch.manual_seed(seed)
    model = get_peft_model(stock(checkpoint), config).eval()
    model.save_pretrained(str(folder / "initial"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                size = moved * float(parameter.abs().mean() + 1e-3)
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(folder / "trained"))
    return folder / "initial", folder / "trained", answers(model, checkpoint)


def leftovers(folder: Path, *, beside: Sequence[str] = ()) -> list[str]:
    """What lies in a folder, hidden partial folders included, that was not there before."""
    return sorted(path.name for path in folder.iterdir() if path.name not in beside)
