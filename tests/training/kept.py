"""What autograd keeps for a backward pass, counted on the meta device: shapes and types, no numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AttentionInterface

from tests.training.real_shapes import new_skeleton
from training.plan_shape import BaseShape
from training.recipe import Recipe
from training.targets import resolve_targets


class _Flash(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps: q, k, v, its result and a number a head and row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = torch.empty_like(query)
        sums = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, result, sums)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("nothing is computed here")


def _attend(module: object, query: Tensor, key: Tensor, value: Tensor, mask: object, **_: object) -> object:
    result: Tensor = _Flash.apply(query, key, value)
    return result.transpose(1, 2), None


def kept_by_a_layer(shape: BaseShape, recipe: Recipe, num_tokens: int, dtype: torch.dtype) -> int:
    """Bytes that one more language layer keeps: each storage once, weights left out."""
    AttentionInterface.register("kept_flash", _attend)
    model = new_skeleton(replace(shape, layers=2))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    targets = resolve_targets(recipe, model)
    config = LoraConfig(
        r=targets.r,
        lora_alpha=targets.alpha,  # type: ignore[arg-type]
        target_modules=targets.pattern,
        lora_dropout=targets.dropout,
    )
    wrapped = get_peft_model(model, config).train()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return _kept(model, 2, num_tokens, dtype) - _kept(model, 1, num_tokens, dtype)


def _kept(model: Any, num_layers: int, num_tokens: int, dtype: torch.dtype) -> int:
    language = model.model.language_model
    language.config._attn_implementation = "kept_flash"
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage
        return tensor

    embeds = torch.zeros(1, num_tokens, language.config.hidden_size, dtype=dtype, device="meta")
    positions = torch.zeros(3, 1, num_tokens, dtype=torch.int64, device="meta")
    layers = language.layers
    language.layers = torch.nn.ModuleList(list(layers)[:num_layers])
    language.config.num_hidden_layers = num_layers
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = language(
            inputs_embeds=embeds.requires_grad_(),
            position_ids=positions,
            attention_mask={"full_attention": None},
            use_cache=False,
        )
    del output
    language.layers = layers
    return sum(storage.nbytes() for storage in found.values())
