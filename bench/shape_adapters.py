"""Random adapters for any checkpoint of the family: stock PEFT folders, ranks in turn, each unlike the others."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from bench.floors import LanguageShape, read_shape

TARGETS = {
    "language": ("q", "k", "v", "o", "gate", "up", "down"),
    "attention": ("q", "k", "v", "o"),
    "mlp": ("gate", "up", "down"),
    "qv": ("q", "v"),
}
STRENGTH = 0.3
"""What an adapter adds, as a share of what its linear gives: enough to change the answer, not to drown it."""
MAX_ADAPTERS = 100_000


def make_adapters(
    checkpoint: Path,
    folder: Path,
    num: int,
    *,
    ranks: Sequence[int] = (16,),
    targets: str = "language",
    seed: int = 0,
) -> tuple[str, ...]:
    """Write ``num`` packages ``adapter-0000``... into ``folder``, and return their names.

    Adapter i has rank ``ranks[i % len(ranks)]``. One that is there already is left as it is, so that a set may grow.
    Raises ValueError for ranks, targets or a number that make no adapter.
    """
    if not ranks or min(ranks) < 1 or not 0 < num <= MAX_ADAPTERS:
        raise ValueError(f"{num} adapters of ranks {list(ranks)}: both must be at least 1")
    if targets not in TARGETS:
        raise ValueError(f"no targets {targets!r}; there are {', '.join(TARGETS)}")
    shape = read_shape(checkpoint)
    names = tuple(adapter_name(number) for number in range(num))
    for number, name in enumerate(names):
        if not (folder / name / "adapter_config.json").exists():
            _make(
                shape,
                folder / name,
                ranks[number % len(ranks)],
                TARGETS[targets],
                seed * MAX_ADAPTERS + number,
            )
    return names


def adapter_name(number: int) -> str:
    return f"adapter-{number:04d}"


def _make(shape: LanguageShape, folder: Path, rank: int, leaves: Sequence[str], seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(shape.layers):
        for leaf in leaves:
            num_in, num_out = shape.linears[leaf]
            stem = f"base_model.model.model.language_model.layers.{layer}.{_path(leaf)}"
            a = torch.empty(rank, num_in, dtype=torch.bfloat16).normal_(0, num_in**-0.5, generator=generator)
            b = torch.empty(num_out, rank, dtype=torch.bfloat16).normal_(
                0, STRENGTH * rank**-0.5, generator=generator
            )
            tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = _config(rank, leaves)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _path(leaf: str) -> str:
    return f"self_attn.{leaf}_proj" if leaf in TARGETS["attention"] else f"mlp.{leaf}_proj"


def _config(rank: int, leaves: Sequence[str]) -> dict[str, object]:
    paths = "|".join(re.escape(_path(leaf)) for leaf in leaves)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        "base_model_name_or_path": "",
        # a plain list of leaves would also hit the vision tower's gate, up and down
        "target_modules": rf".*language_model\.layers\.\d+\.({paths})",
    }
