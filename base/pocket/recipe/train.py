"""Trains the pocket base: `python -m base.pocket.recipe.train --out FOLDER`.

Owns: the schedule. First the vision tower alone learns, from training-only heads, what lies under each token; then
all learns together from answers, one thing per picture before many; the last quarter, while the learning rate falls,
runs in the served numbers (NF4 and bf16). About an hour on one processor core.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from base.pocket.recipe.architecture import build_config, save_processing
from base.pocket.recipe.data import (
    HELD_OUT_SEED,
    NUM_CELL_LABELS,
    NUM_COLOR_LABELS,
    NUM_SHAPE_LABELS,
    Example,
    Mixture,
    make_example,
    subject,
    training_turn,
)
from base.pocket.recipe.forward import run, see
from base.pocket.recipe.pixels import MERGE
from base.pocket.recipe.quantise import served_weights
from base.pocket.recipe.rows import TEXT
from base.pocket.recipe.scoring import score
from base.pocket.recipe.tokenizer import save_tokenizer

MAX_SIDE: Final = 8  # merged tokens along a side
WARMUP_STEPS: Final = 100
DECAY_SHARE: Final = 0.38  # of the joint steps, at the end
SERVED_SHARE: Final = 0.12  # and of those in the served numbers
NOTHING_WEIGHT: Final = 0.2  # most tokens lie on nothing
SEED: Final = 1


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast."""

    vision_steps: int = 2400
    joint_steps: int = 4400
    learning_rate: float = 1.0e-3
    pictures: int = 9
    branches: int = 7
    evaluate_every: int = 200

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.vision_steps + self.joint_steps

    @property
    def decay_start(self) -> int:
        """The step at which the learning rate begins to fall."""
        return self.steps - int(self.joint_steps * DECAY_SHARE)

    @property
    def served_start(self) -> int:
        """The step from which all runs in the served numbers."""
        return self.steps - int(self.joint_steps * SERVED_SHARE)

    def rate(self, step: int) -> float:
        """Learning rate: up, level, down to nothing; a second short rise where the language model joins."""
        since = step if step < self.vision_steps else step - self.vision_steps
        rise = min(1.0, (since + 1) / WARMUP_STEPS)
        fall = min(1.0, (self.steps - step) / max(1, self.steps - self.decay_start))
        return self.learning_rate * rise * fall

    def mixture(self, step: int) -> Mixture:
        """One thing per picture at first, then more."""
        if step < self.vision_steps:
            return Mixture(num_pictures=16, num_text_rows=0, num_branches=0)
        joint = step - self.vision_steps
        max_things = 1 if joint < 300 else 2
        return Mixture(num_pictures=self.pictures, num_branches=self.branches, max_things=max_things)


class Heads(nn.Module):
    """Training-only classifiers: what lies under a picture token, and where the token is in its picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape = nn.Linear(width, NUM_SHAPE_LABELS)
        self.color = nn.Linear(width, NUM_COLOR_LABELS)
        self.row = nn.Linear(width, MAX_SIDE)
        self.column = nn.Linear(width, MAX_SIDE)
        self.subject = nn.Linear(width, NUM_SHAPE_LABELS + NUM_COLOR_LABELS + NUM_CELL_LABELS)

    def what(self, seen: Tensor, example: Example) -> Tensor:
        """Loss of naming the shape and colour under each token of `seen` [P, M, H]."""
        shape = _naming_loss(self.shape(seen), example.shapes)
        color = _naming_loss(self.color(seen), example.colors)
        return shape + color

    def place(self, middle: Tensor, example: Example) -> Tensor:
        """Loss of telling row and column from the language model's states [B, L, H] at picture tokens."""
        picture = example.batch.picture
        index, across = picture[picture != TEXT], example.batch.grid[1] // MERGE
        states = middle[picture != TEXT]
        row = F.cross_entropy(self.row(states), index // across)
        return row + F.cross_entropy(self.column(states), index % across)

    def meant(self, late: Tensor, example: Example) -> Tensor:
        """Loss of telling, from the states [B, L, H] before an answer, which one thing was asked about."""
        answers = example.batch.answers
        starts = (answers >= 0) & (answers != answers.roll(1, dims=1))
        subjects = torch.tensor([subject(asked) for asked in example.batch.asked])[answers[starts]]
        parts = self.subject(late[starts]).split((NUM_SHAPE_LABELS, NUM_COLOR_LABELS, NUM_CELL_LABELS), dim=1)
        losses = [F.cross_entropy(part, subjects[:, i], ignore_index=-100) for i, part in enumerate(parts)]
        return torch.stack(losses).sum()


def _naming_loss(logits: Tensor, labels: Tensor) -> Tensor:
    weight = torch.ones(logits.shape[-1])
    weight[0] = NOTHING_WEIGHT
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight, ignore_index=-100)


class Trainer:
    """A model, its heads and its optimiser, somewhere along a schedule."""

    def __init__(
        self, model: Qwen2_5_VLForConditionalGeneration, tokenizer: Tokenizer, schedule: Schedule
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.schedule = schedule
        self.heads = Heads(model.lm_head.in_features)
        self.step = 0
        self.parameters = [*model.parameters(), *self.heads.parameters()]
        matrices = [p for p in self.parameters if p.ndim > 1]
        vectors = [p for p in self.parameters if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98), fused=True)

    def advance(self) -> dict[str, float]:
        """One optimiser step; the losses by name."""
        seed = SEED * 1_000_000 + self.step
        example = make_example(self.tokenizer, self.schedule.mixture(self.step), seed, training_turn)
        if self.step >= self.schedule.served_start:
            with served_weights(self.model):
                losses = self._losses(example)
                self._backward(losses)
        else:
            losses = self._losses(example)
            self._backward(losses)
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return {name: loss.item() for name, loss in losses.items()}

    def _losses(self, example: Example) -> dict[str, Tensor]:
        if self.step < self.schedule.vision_steps:
            seen = see(self.model.model.visual, example.batch.pixels, example.batch.grid)
            return {"what": self.heads.what(seen, example)}
        output = run(self.model, example.batch)
        return {
            "answer": F.cross_entropy(output.logits, output.labels),
            "what": 0.3 * self.heads.what(output.seen, example),
            "place": 0.1 * self.heads.place(output.middle, example),
            "meant": 0.15 * self.heads.meant(output.late, example),
        }

    def _backward(self, losses: dict[str, Tensor]) -> None:
        torch.stack(list(losses.values())).sum().backward()

    def save(self, path: Path) -> None:
        """Write everything needed to go on."""
        state = {"model": self.model.state_dict(), "heads": self.heads.state_dict()}
        torch.save({**state, "optimiser": self.optimiser.state_dict(), "step": self.step}, path)

    def load(self, path: Path) -> None:
        """Go on from `path`."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]


@torch.no_grad()
def vision_scores(trainer: Trainer) -> tuple[float, float]:
    """Held-out share of things whose shape and colour the heads name."""
    right, total = torch.zeros(2), 0
    for index in range(4):
        example = make_example(trainer.tokenizer, Mixture(16, 0, 0), HELD_OUT_SEED + index)
        seen = see(trainer.model.model.visual, example.batch.pixels, example.batch.grid)
        on_thing = example.shapes > 0
        total += int(on_thing.sum())
        right[0] += (trainer.heads.shape(seen).argmax(-1) == example.shapes)[on_thing].sum()
        right[1] += (trainer.heads.color(seen).argmax(-1) == example.colors)[on_thing].sum()
    return float(right[0] / total), float(right[1] / total)


def export(model: Qwen2_5_VLForConditionalGeneration, folder: Path) -> None:
    """Write the weights in bf16, leaving the model as it was."""
    copy = Qwen2_5_VLForConditionalGeneration._from_config(model.config, dtype=torch.bfloat16)
    copy.load_state_dict({name: value.to(torch.bfloat16) for name, value in model.state_dict().items()})
    copy.save_pretrained(folder)


def train(out: Path, schedule: Schedule, state: Path) -> None:
    """Run the schedule from the start, or from `state` where it exists; write the checkpoint into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer(out)
    save_processing(out, tokenizer)
    torch.manual_seed(SEED)
    model = Qwen2_5_VLForConditionalGeneration._from_config(build_config(tokenizer), dtype=torch.float32)
    trainer = Trainer(model, tokenizer, schedule)
    if state.exists():
        trainer.load(state)
    started = time.monotonic()
    sums: dict[str, float] = defaultdict(float)
    while trainer.step < schedule.steps:
        for name, loss in trainer.advance().items():
            sums[name] += loss
        if trainer.step % 50 == 0:
            losses = " ".join(f"{name}={value / 50:.3f}" for name, value in sums.items())
            print(f"step={trainer.step} seconds={time.monotonic() - started:.0f} {losses}", flush=True)
            sums.clear()
        if trainer.step % schedule.evaluate_every == 0:
            _report(trainer)
            trainer.save(state)
    export(model, out)


def _report(trainer: Trainer) -> None:
    if trainer.step <= trainer.schedule.vision_steps:
        shape, color = vision_scores(trainer)
        print(f"held-out step={trainer.step} heads: shape={shape:.3f} color={color:.3f}", flush=True)
        return
    with served_weights(trainer.model):
        found = score(trainer.model, trainer.tokenizer, num_batches=6)
    kinds = " ".join(f"{kind}={value:.3f}" for kind, value in found.by_kind.items())
    print(f"held-out step={trainer.step} exact={found.exact:.3f} {kinds}", flush=True)


def main() -> None:
    """The command line."""
    default = Schedule()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state", type=Path, default=Path("pocket-state.pt"), help="where to stop and go on")
    parser.add_argument("--vision-steps", type=int, default=default.vision_steps)
    parser.add_argument("--joint-steps", type=int, default=default.joint_steps)
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    args = parser.parse_args()
    torch.set_num_threads(1)
    schedule = Schedule(args.vision_steps, args.joint_steps, args.learning_rate)
    train(args.out, schedule, args.state)


if __name__ == "__main__":
    main()
