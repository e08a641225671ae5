"""Adapter packages made on the spot: by hand for a small table of sites, and by PEFT for a small random Qwen2.5-VL."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from adapters.sites import Site

Layout = Callable[[str], str]

LAYOUTS: Mapping[str, Layout] = {
    "today": lambda name: f"base_model.model.{name}",
    "before_4_52": lambda name: "base_model.model." + _before_4_52(name),
    "bare": lambda name: name,
    "bare_before_4_52": lambda name: _before_4_52(name),
    "language_model_model": lambda name: "base_model.model." + _llava(name),
    "inner_model": lambda name: "base_model.model." + name.removeprefix("model."),
}
"""How the same site has been spelled by the tools of the last two years."""


def _before_4_52(name: str) -> str:
    return name.replace("model.language_model.layers", "model.layers").replace("model.visual", "visual")


def _llava(name: str) -> str:
    return name.replace("model.language_model.", "language_model.model.").replace("model.visual", "visual")


def tiny_sites() -> dict[str, Site]:
    """Two language layers, one vision block and the merger, at widths that differ everywhere."""
    sites: list[Site] = []
    for layer in range(2):
        stem = f"model.language_model.layers.{layer}"
        for leaf, width_in, width_out in (
            ("self_attn.q_proj", 32, 32),
            ("self_attn.k_proj", 32, 16),
            ("self_attn.v_proj", 32, 16),
            ("self_attn.o_proj", 32, 32),
            ("mlp.gate_proj", 32, 48),
            ("mlp.up_proj", 32, 48),
            ("mlp.down_proj", 48, 32),
        ):
            sites.append(Site(f"{stem}.{leaf}", width_in, width_out, "language"))
    for leaf, width_in, width_out in (("attn.qkv", 24, 72), ("attn.proj", 24, 24), ("mlp.gate_proj", 24, 40)):
        sites.append(Site(f"model.visual.blocks.0.{leaf}", width_in, width_out, "vision"))
    for index, width_out in ((0, 96), (2, 32)):
        sites.append(Site(f"model.visual.merger.mlp.{index}", 96, width_out, "merger"))
    return {site.name: site for site in sites}


def random_tensors(
    sites: Sequence[Site],
    *,
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    is_dora: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """``{site.lora_A.weight: …}`` in today's names, without a wrapper."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for site in sites:
        tensors[f"{site.name}.lora_A.weight"] = torch.randn(rank, site.in_features, generator=generator).to(
            dtype
        )
        tensors[f"{site.name}.lora_B.weight"] = torch.randn(site.out_features, rank, generator=generator).to(
            dtype
        )
        if is_dora:
            tensors[f"{site.name}.lora_magnitude_vector"] = torch.rand(
                site.out_features, generator=generator
            ).to(dtype)
    return tensors


def lora_config(**overrides: object) -> dict[str, object]:
    """An ``adapter_config.json`` as PEFT 0.21 writes it."""
    config = json.loads(json.dumps(LoraConfig(r=4, lora_alpha=8).to_dict()))
    return {**config, "peft_type": "LORA", "inference_mode": True, **overrides}


def write_package(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def make_package(
    folder: Path,
    sites: Mapping[str, Site] | None = None,
    *,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    rank: int = 4,
    layout: str = "today",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    suffix: str = "",
    zeroed: Sequence[str] = (),
    **overrides: object,
) -> Path:
    """A sound package: random A and B on every site whose leaf is in ``targets``; B is zero at ``zeroed`` modules."""
    chosen = [site for site in (sites or tiny_sites()).values() if site.leaf in targets]
    tensors = random_tensors(
        chosen, rank=rank, dtype=dtype, is_dora=bool(overrides.get("use_dora")), seed=seed
    )
    for name, tensor in tensors.items():
        if "lora_B" in name and any(module in name for module in zeroed):
            tensor.zero_()
    spelled = {_with_suffix(LAYOUTS[layout](name), suffix): tensor for name, tensor in tensors.items()}
    return write_package(folder, spelled, lora_config(r=rank, **overrides))


def _with_suffix(name: str, suffix: str) -> str:
    stem, weight = (name.removesuffix(".weight"), ".weight") if name.endswith(".weight") else (name, "")
    return stem + suffix + weight


def tiny_qwen(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A random Qwen2.5-VL of 100,000 parameters in fp32, with every kind of site."""
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 128,
            "max_position_embeddings": 512,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.eval()
    return model


def peft_adapter(
    model: Qwen2_5_VLForConditionalGeneration, config: LoraConfig, folder: Path, seed: int = 0
) -> PeftModel:
    """An adapter made and saved by PEFT itself, with every one of its tensors randomised as training would."""
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(str(folder))
    return adapted.eval()
