"""Decoder: the language layers, run over a flattened step with the weights of transformers' modules.

It computes what transformers' ``Qwen2_5_VLTextModel.forward`` does, with the same roundings (bfloat16 between
operations, norms in float32), and leaves out what a step does not need: masks, cache objects, batch dimensions, output
records. The original stays as the reference: ``BaseModel.reference_forward``.

Owns: the order of operations. Does not know how attention, norms and gates are computed (``Parts``, chosen when it is
made), nor adapters: linears are looked up at each call, never kept, so adapters may be attached and detached around
them.

A CUDA graph may be captured over ``run`` if embeds, positions and the tensors that the attention's step reads are
buffers that are refilled in place: all of them then have the sizes of the captured bucket, and nothing here copies to
the host or branches on a tensor.

Place in a request's way: step 8, under the base.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from base.attention import AttentionPlan, LayerAttention, PagedAttention
from base.children import child
from base.gate import Gate
from base.merged_linear import Projection
from base.norm import Norm
from base.rotary import Rotary

if TYPE_CHECKING:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel


@dataclass(frozen=True, slots=True)
class Parts:
    """Who computes what lies between the products; chosen when the decoder is built."""

    attention: PagedAttention
    norm: Callable[[nn.Module], Norm] = Norm
    """Made over each of transformers' norms,"""
    gate: Callable[[nn.Module], Gate] = Gate
    """and over each of its MLPs."""


class DecoderLayer:
    """One layer's modules."""

    def __init__(self, index: int, module: nn.Module, head_dim: int, parts: Parts) -> None:
        self._index = index
        self._attention = module.get_submodule("self_attn")._modules
        self._mlp = module.get_submodule("mlp")._modules
        self._qkv = Projection(module.get_submodule("self_attn"), "qkv_proj")
        self._gate_up = Projection(module.get_submodule("mlp"), "gate_up_proj")
        self._norm_before_attention = parts.norm(module.get_submodule("input_layernorm"))
        self._norm_before_mlp = parts.norm(module.get_submodule("post_attention_layernorm"))
        self._gate = parts.gate(module.get_submodule("mlp"))
        self._head_dim = head_dim
        self._scaling = head_dim**-0.5

    def __call__(
        self, hidden: Tensor, delta: Tensor | None, rotary: Rotary, attend: LayerAttention
    ) -> tuple[Tensor, Tensor]:
        """hidden [T, H] and what is to be added to it (overwritten) -> the same two, of the next layer."""
        hidden, x = self._norm_before_attention.after(hidden, delta)
        hidden, x = self._norm_before_mlp.after(hidden, self._attend(x, rotary, attend))
        return hidden, self._feed_forward(x)

    def _attend(self, x: Tensor, rotary: Rotary, attend: LayerAttention) -> Tensor:
        heads = (x.shape[0], -1, self._head_dim)
        query, key, value = (part.view(heads) for part in self._qkv(x))
        attended = attend(self._index, query, key, value, rotary, self._scaling)
        return child(self._attention, "o_proj")(attended.flatten(1))

    def _feed_forward(self, x: Tensor) -> Tensor:
        gate, up = self._gate_up(x)
        return child(self._mlp, "down_proj")(self._gate(gate, up))


class Decoder:
    """All layers and the final norm of a text model, over the parts that were chosen at build."""

    def __init__(self, text_model: Qwen2_5_VLTextModel, parts: Parts) -> None:
        head_dim = text_model.config.hidden_size // text_model.config.num_attention_heads
        self.attention = parts.attention
        self._layers = [
            DecoderLayer(index, layer, head_dim, parts) for index, layer in enumerate(text_model.layers)
        ]
        self._norm = parts.norm(text_model.norm)
        self._rotary_emb = text_model.rotary_emb

    def forward(self, embeds: Tensor, positions: Tensor, plan: AttentionPlan) -> Tensor:
        """embeds [T, H], positions [3, T] int64 -> final-normed [T, H]. Writes the plan's caches at its slots."""
        return self.run(embeds, positions, self.attention.begin(plan, embeds.dtype))

    def run(self, embeds: Tensor, positions: Tensor, attend: LayerAttention) -> Tensor:
        """As ``forward``, over a step's attention that is begun already."""
        cos, sin = self._rotary_emb(embeds, positions.unsqueeze(1))
        rotary = Rotary(cos[0], sin[0])
        hidden, delta = embeds, None
        for layer in self._layers:
            hidden, delta = layer(hidden, delta, rotary, attend)
        return self._norm.after(hidden, delta)[1]
