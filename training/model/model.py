"""AdaptedBase: the resident base with one adapter that learns; batches in, summed losses out.

Owns: the order in which the base's modules are called for training, and what has a graph: the adapter, and nothing
that comes before it. The head runs on the positions that predict a label and on no other. Numbers are those of the
serving path: the same modules, attention by the same kernel, positions as the server makes them.

    ids -> embeddings <- pictures (`sight.py`); language layers over the packed row; final norm; rows that predict a
    label -> head -> cross entropy in fp32, summed

Does not know: steps, optimizers, files' formats beyond PEFT's folder. Place in a training run: the middle of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from base.model import BaseModel
from training.model.adapter_files import save_adapter
from training.model.adapter_layers import AdapterLayers, lora_config
from training.model.attention import attention, set_attention, use_segments
from training.model.batch import Batch
from training.model.head import head_losses, label_positions
from training.model.loading import load_training_base
from training.model.sight import Sight
from training.recipe.recipe import Part, Recipe
from training.targets.targets import Targets

__all__ = ["AdaptedBase", "SummedLoss", "load_training_base"]


@dataclass(frozen=True, slots=True, eq=False)
class SummedLoss:
    """Of one batch. Divide by the labels of a whole step, not of a batch, for a token-exact mean."""

    total: Tensor  # scalar float32: sum of the cross entropy over labels
    num_labels: int


class AdaptedBase(nn.Module):
    """One base, one adapter. Adapter weights are fp32, the base's own stay as they are, to the bit."""

    def __init__(self, base: BaseModel, targets: Targets, recipe: Recipe) -> None:
        """Attaches the adapter to ``base`` in place; its first forward pass equals the base's to the bit.

        Raises ValueError if the base has adapters attached already.
        """
        super().__init__()
        self.base = base
        self.targets = targets
        self._layers = AdapterLayers(base, targets, recipe.seed)
        self.peft: PeftModel = self._layers.peft
        keeps = recipe.augment == "none"  # an augmented picture never comes again
        self._sight = Sight(base, (recipe.vision_cache_mib << 20) if keeps else 0)
        self._served_attention = use_segments(base.module)
        self._version = 0
        self._is_detached = False
        if recipe.activation_checkpointing:
            _checkpoint_activations(base.module)

    # ---- forward -----------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> SummedLoss:
        """Differentiable in the adapter's learning weights. Raises ValueError for a batch that cannot be learnt."""
        losses = self._losses(batch)
        return SummedLoss(losses.sum(), losses.numel())

    @torch.no_grad()
    def label_losses(self, batch: Batch) -> Tensor:
        """[num_labels] float32, without dropout, in the order of the labels."""
        with self._judging():
            return self._losses(batch)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """[T, V] float32, without dropout: large, for proofs."""
        with self._judging():
            return self.base.logits(self._hidden(batch))

    @torch.no_grad()
    def last_logits(self, batch: Batch) -> Tensor:
        """[S, V] float32, without dropout: what follows each sequence. Alone in its batch, a sequence has the very bits
        that the engine serves: the head's rounding depends on how many rows it is given."""
        with self._judging():
            return self.base.logits(self._hidden(batch)[[end - 1 for end in batch.starts[1:]]])

    def _losses(self, batch: Batch) -> Tensor:
        with torch.autocast(self.base.device.type, enabled=False):
            batch = batch.to(self.base.device)
            labelled = label_positions(batch)
            predicting = self._hidden(batch)[labelled - 1]
            return head_losses(self.base.module.lm_head, predicting, batch.labels[labelled])

    def _hidden(self, batch: Batch) -> Tensor:
        """[T, H], final-normed."""
        self._check_on()
        batch = batch.to(self.base.device)
        if batch.positions.shape != (3, batch.num_tokens):
            # transformers would take others for plain text, in silence
            raise ValueError(f"positions are [3, T], not {list(batch.positions.shape)}")
        output = self.base.module.model.language_model(
            inputs_embeds=self._embeds(batch).unsqueeze(0),
            position_ids=batch.positions.unsqueeze(1),
            attention_mask={"full_attention": None},  # ready-made: nothing is built, starts say it all
            use_cache=False,
            starts=batch.starts,
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def _embeds(self, batch: Batch) -> Tensor:
        """[T, H]: tokens, and the pictures at image tokens."""
        embeds = self.base.embed_tokens(batch.ids)
        places = (batch.ids == self.base.spec.image_token_id).nonzero().squeeze(1)
        num_expected = sum(t * h * w for t, h, w in batch.grids) // self.base.spec.merge_size**2
        if len(places) != num_expected:
            raise ValueError(
                f"{len(places)} image tokens for pictures of {num_expected}: the batch is not whole"
            )
        if not batch.grids:
            return embeds
        learning, variant = self._learning(), self._variant()
        images = self._sight.embed(batch.pixels, batch.grids, batch.digests, learning, variant)
        return embeds.index_copy(0, places, images.to(embeds.dtype))

    def _learning(self) -> frozenset[Part]:
        return self._layers.learning if self._layers.is_enabled else frozenset()

    def _variant(self) -> str:
        """What a kept picture came from, besides its pixels."""
        return f"{self._version}" if self._layers.is_enabled else "base"

    def _check_on(self) -> None:
        if not self._layers.is_on:
            raise RuntimeError("the adapter is off this base: it was detached, or the bare base is in use")

    @contextmanager
    def _judging(self) -> Iterator[None]:
        """Without dropout, and back."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    # ---- the adapter -------------------------------------------------------------------------------------------

    def trainable(self) -> dict[str, nn.Parameter]:
        """What learns at present, by its name among ``named_parameters``."""
        return {
            f"peft.{name}": parameter
            for name, parameter in self._layers.parameters().items()
            if parameter.requires_grad
        }

    def part_of(self, parameter_name: str) -> Part:
        """The part that a parameter of the adapter belongs to. Raises KeyError for any other."""
        return self._layers.part_of(parameter_name)

    @property
    def learning(self) -> frozenset[Part]:
        return self._layers.learning

    def set_trained_parts(self, parts: Collection[Part]) -> None:
        """Only these learn from now on; the others keep what they know, and act. Raises ValueError."""
        self._layers.learn(parts)
        self._forget_pictures()

    def state(self) -> dict[str, Tensor]:
        """The adapter's weights: copies on the CPU, fp32, named as in PEFT's file."""
        return self._layers.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put ``state`` in their place. Raises ValueError unless it is of this very adapter."""
        self._layers.load_state(state)
        self._forget_pictures()

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the plain PEFT folder that stock PEFT and our server load. Each file appears whole or not at all."""
        save_adapter(folder, lora_config(self.targets, self.base), self.state(), dtype)

    def _forget_pictures(self) -> None:
        self._version += 1
        self._sight.store.clear()

    # ---- the base ----------------------------------------------------------------------------------------------

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Inside, the base has its own linears and serving attention again, and may be given to an engine.

        The engine must be closed inside too: raises RuntimeError otherwise.
        """
        self._check_on()
        was_training = self.training
        self.eval()
        self._layers.take_off()
        try:
            with attention(self.base.module, self._served_attention):
                yield
        finally:
            self._layers.put_on()
            self.train(was_training)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the adapter has no effect: losses and logits are the base's own."""
        with self._layers.disabled():
            yield

    def detach(self) -> None:
        """Leave the base for good, as it was to the bit. The weights stay readable. Idempotent."""
        if self._is_detached:
            return
        self._is_detached = True
        self.eval()
        self._layers.take_off()
        set_attention(self.base.module, self._served_attention)
        _keep_activations(self.base.module)
        self._sight.store.clear()
        if hasattr(self.base.module, "peft_config"):
            del self.base.module.peft_config


def _checkpoint_activations(module: nn.Module) -> None:
    """Each layer keeps its input alone and is computed again for its gradient."""
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = True
            recompute: object = partial(checkpoint, use_reentrant=False)
            layer._gradient_checkpointing_func = recompute  # type: ignore[assignment]  # modules hold functions too


def _keep_activations(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = False
