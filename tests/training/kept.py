"""What a forward and a backward pass hold, counted on the meta device: shapes and types, no numbers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from tests.training.real_shapes import new_skeleton
from training.plan.shape import BaseShape
from training.recipe.recipe import Recipe
from training.targets.targets import resolve_targets


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
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _Live(TorchDispatchMode):
    """Counts storages from the operation that makes them until they are freed."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._live: dict[int, object] = {tensor.untyped_storage()._cdata: None for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self._live:
            self._live[key] = weakref.ref(storage, lambda _: self._leave(key, num_bytes))
            self.now += num_bytes
            self.peak = max(self.peak, self.now)

    def _leave(self, key: int, num_bytes: int) -> None:
        self._live.pop(key, None)
        self.now -= num_bytes


def peak_of(shape: BaseShape, recipe: Recipe, num_tokens: int, num_layers: int) -> int:
    """Most bytes alive at once in a forward and backward pass of the language layers in bf16, beside weights and the
    embeddings that go in."""
    model = _adapted(shape, recipe, num_layers, torch.bfloat16)
    language = model.model.language_model
    language.config._attn_implementation = "kept_flash"
    for layer in language.layers if recipe.activation_checkpointing else ():
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    embeds = torch.zeros(1, num_tokens, shape.hidden, dtype=torch.bfloat16, device="meta")
    positions = torch.zeros(3, 1, num_tokens, dtype=torch.int64, device="meta")
    live = _Live([*model.parameters(), *model.buffers(), embeds, positions])
    with live:
        output = language(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask={"full_attention": None},
            use_cache=False,
        )
        output.last_hidden_state.sum().backward()
    return live.peak


def _attend(module: object, query: Tensor, key: Tensor, value: Tensor, mask: object, **_: object) -> object:
    result: Tensor = _Flash.apply(query, key, value)
    return result.transpose(1, 2), None


def kept_by_a_layer(shape: BaseShape, recipe: Recipe, num_tokens: int, dtype: torch.dtype) -> int:
    """Bytes that one more language layer keeps: each storage once, weights left out."""
    model = _adapted(shape, recipe, 2, dtype)
    return _kept(model, 2, num_tokens, dtype) - _kept(model, 1, num_tokens, dtype)


def _adapted(shape: BaseShape, recipe: Recipe, num_layers: int, dtype: torch.dtype) -> Any:
    """With the adapter on, in fp32."""
    AttentionInterface.register("kept_flash", _attend)
    model = new_skeleton(replace(shape, layers=num_layers))
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
    return model


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
