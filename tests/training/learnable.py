"""A base to learn on, and rows that are learnt in no time; shared by the tests of models."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from base.model import BaseModel
from base.prompt import TextPart
from tests.support.scenes import scene
from training.data.faults import Origin
from training.data.formats import Conversation, PictureRef, Turn
from training.data.labels import Labeller
from training.model.batch import Batch
from training.model.collator import Collator, Examples
from training.model.model import AdaptedBase, load_training_base
from training.recipe.recipe import Recipe
from training.targets.targets import resolve_targets

COLORS = ("red", "blue", "green", "yellow")


def make_base(source: str = "pocket") -> BaseModel:
    """In fp32, as this machine trains."""
    return load_training_base(Recipe(base=source, precision="fp32"), device="cpu")


def picture_ref(image: Image.Image) -> PictureRef:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return PictureRef("a picture", None, buffer.getvalue())


def row(question: str, answer: str, *pictures: PictureRef, line: int = 1) -> Conversation:
    asked = Turn("user", (*pictures, TextPart(question)))
    return Conversation((asked, Turn("assistant", (TextPart(answer),), True)), origin=Origin("rows", line))


def pictured(count: int) -> list[Conversation]:
    """One picture each, of different sizes."""
    return [
        row(
            "What color is it?",
            f"It is {COLORS[i % 4]}.",
            picture_ref(scene(COLORS[i % 4], "circle", (60 + 30 * (i % 3), 60))),
            line=i + 1,
        )
        for i in range(count)
    ]


def texts() -> list[Conversation]:
    return [row("Who are you?", "A bird."), row("Good night.", "Sleep well, and dream of the sea.", line=2)]


def batch_of(base: BaseModel, rows: Sequence[Conversation]) -> Batch:
    labeller = Labeller(base.processor)
    examples = Examples(rows, labeller)
    return Collator(labeller)([examples[i] for i in range(len(examples))])


def base_state(base: BaseModel) -> dict[str, Tensor]:
    """Every tensor of the base, copied."""
    return {name: tensor.detach().clone() for name, tensor in base.module.state_dict().items()}


def adapt(base: BaseModel, **fields: object) -> AdaptedBase:
    """An adapter of rank 4 on everything, without dropout, but for ``fields`` of the recipe. Detach it."""
    recipe = Recipe(**{"preset": ("all",), "r": 4, "dropout": 0.0, **fields})  # type: ignore[arg-type]
    return AdaptedBase(base, resolve_targets(recipe, base.module), recipe)


def randomise(model: AdaptedBase, seed: int = 3) -> None:
    """As training would leave it: every tensor has an effect."""
    generator = torch.Generator().manual_seed(seed)
    state = model.state()
    for name, tensor in state.items():
        if "magnitude" in name:
            tensor.mul_(0.8 + 0.4 * torch.rand(tensor.shape, generator=generator))
        else:
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    model.load_state(state)
