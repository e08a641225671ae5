"""BaseModel: the resident model as the engine sees it, over transformers' own modules.

Owns: the four calls of a step, and nothing that changes: no cache, no positions, no request. The language layers are
run by ``Decoder``, images by ``VisionTower``; transformers' own forwards are the references beside them.

Place in a request's way: step 8, under the runner; one thread at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from base.attention import AttentionPlan, LayerAttention, segments_of
from base.config import BaseConfig
from base.decoder import Decoder, Parts
from base.prompt import Grid
from base.spec import BaseSpec
from base.vision import VisionTower

if TYPE_CHECKING:
    from base.processor import Processor


class BaseModel:
    """A frozen, resident Qwen2.5-VL. Made by ``base.loader.load_base``."""

    def __init__(
        self,
        module: Qwen2_5_VLForConditionalGeneration,
        spec: BaseSpec,
        processor: Processor,
        config: BaseConfig,
        memory_by_part: Mapping[str, int],
        parts: Parts,
        kernels: Mapping[str, str],
    ) -> None:
        self.module = module
        self.spec = spec
        self.processor = processor
        self.config = config
        self.vision = VisionTower(module.model.visual)
        self.decoder = Decoder(module.model.language_model, parts)
        self.kernels = dict(kernels)
        """Whose kernels compute what (``linear``, ``attention``, ``prompts``); empty where there was no choice."""
        self.memory_by_part = dict(memory_by_part)
        """Bytes of ``language_4bit``, ``language`` (16-bit, CPU copies included), ``embeddings``, ``vision``,
        ``head`` (0 when tied), ``copies`` (4-bit weights dequantised ahead, CUDA) and ``other``."""

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @torch.no_grad()
    def embed_tokens(self, ids: Tensor) -> Tensor:
        """[T] int64 -> [T, H]."""
        embeds: Tensor = self.module.get_input_embeddings()(ids)
        return embeds

    @torch.no_grad()
    def embed_images(self, pixels: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Encode several images at once: pixels [P, patch_dim], one grid each -> [sum of tokens, H].

        An image's rows do not depend on the other images of the call.
        """
        return self.vision.forward(pixels.to(self.dtype), grids)

    @torch.no_grad()
    def reference_embed_images(self, pixels: Tensor, grids: Sequence[Grid]) -> Tensor:
        """As ``embed_images``, by transformers' own vision model."""
        grid_thw = torch.tensor(grids, dtype=torch.int64, device=pixels.device).reshape(-1, 3)
        embeds: Tensor = self.module.model.visual(pixels.to(self.dtype), grid_thw=grid_thw).pooler_output
        return embeds

    @torch.no_grad()
    def forward(self, embeds: Tensor, positions: Tensor, plan: AttentionPlan) -> Tensor:
        """Run the language layers over a flattened step: embeds [T, H], positions [3, T] -> final-normed [T, H].

        Writes the plan's caches at its slots.
        """
        return self.decoder.forward(embeds, positions, plan)

    @torch.no_grad()
    def reference_forward(self, embeds: Tensor, positions: Tensor, plan: AttentionPlan) -> Tensor:
        """As ``forward``, by transformers' own text model, module by module: slow, and what ``forward`` is held to."""
        output = self.module.model.language_model(
            inputs_embeds=embeds.unsqueeze(0),
            position_ids=positions.unsqueeze(1),
            attention_mask={"full_attention": None},  # ready-made: nothing is built, the plan says it all
            use_cache=False,
            plan=plan,
            segments=segments_of(plan),
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    @torch.no_grad()
    def decode_into(self, logits: Tensor, ids: Tensor, positions: Tensor, attend: LayerAttention) -> None:
        """One token a sequence, all the way: ids [S] and positions [3, S] int64 -> logits [S, V] float32, overwritten.

        Launches kernels and nothing else if ``attend`` does, so that a CUDA graph may be captured over it.
        """
        hidden = self.decoder.run(self.embed_tokens(ids), positions, attend)
        logits.copy_(self.module.lm_head(hidden))

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[S, H] -> [S, V] float32."""
        logits: Tensor = self.module.lm_head(hidden)
        return logits.float()
