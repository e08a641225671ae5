"""One adapter of every kind that is served, made by stock PEFT on a given checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from peft import LoraConfig

from tests.support.oracle import load_stock
from tests.support.packages import peft_adapter

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LANGUAGE = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
VISION = r".*visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)"
MERGER = r".*visual\.merger\.mlp\.(0|2)"
EVERYTHING = f"({LANGUAGE})|({VISION})|({MERGER})"


def zoo() -> Mapping[str, LoraConfig]:
    return {
        "rank4": LoraConfig(r=4, lora_alpha=24, target_modules=LANGUAGE),
        "rank16": LoraConfig(r=16, lora_alpha=48, target_modules=ATTENTION),
        "rank64": LoraConfig(r=64, lora_alpha=48, target_modules=LANGUAGE),
        "rslora": LoraConfig(r=16, lora_alpha=12, use_rslora=True, target_modules=LANGUAGE),
        "patterns": LoraConfig(
            r=8,
            lora_alpha=24,
            target_modules=LANGUAGE,
            rank_pattern={"q_proj": 3, "layers.1.mlp.down_proj": 20},
            alpha_pattern={"v_proj": 60, "layers.0.self_attn.o_proj": 6},
        ),
        "dora": LoraConfig(r=8, lora_alpha=24, use_dora=True, target_modules=LANGUAGE),
        "vision": LoraConfig(r=8, lora_alpha=24, target_modules=VISION),
        "merger": LoraConfig(r=16, lora_alpha=48, target_modules=MERGER),
        "everything": LoraConfig(r=8, lora_alpha=24, target_modules=EVERYTHING),
        "dora_vision": LoraConfig(r=4, lora_alpha=12, use_dora=True, target_modules=EVERYTHING),
    }


def make_zoo(checkpoint: Path, root: Path, names: Collection[str] = ()) -> dict[str, Path]:
    """Packages by name, with random weights that change the answers; of all kinds, or of those named."""
    packages: dict[str, Path] = {}
    model = load_stock(checkpoint, quantized=False)
    for seed, (name, config) in enumerate(zoo().items()):
        if names and name not in names:
            continue
        packages[name] = root / name
        peft_adapter(model, config, packages[name], seed).unload()
    return packages
