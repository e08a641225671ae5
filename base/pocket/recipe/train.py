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
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from base.pocket.recipe.architecture import build_config, save_processing
from base.pocket.recipe.data import (
    HELD_OUT_SEED,
    Example,
    Mixture,
    make_example,
)
from base.pocket.recipe.forward import run, see
from base.pocket.recipe.heads import Heads
from base.pocket.recipe.quantise import served_weights
from base.pocket.recipe.room import make_room, trained_tokens
from base.pocket.recipe.scoring import score
from base.pocket.recipe.tokenizer import save_tokenizer

WARMUP_STEPS: Final = 100
DECAY_SHARE: Final = 0.38  # of the joint steps, at the end
SERVED_SHARE: Final = 0.12  # and of those in the served numbers
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
        example = make_example(self.tokenizer, self.schedule.mixture(self.step), seed)
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
        """Write everything needed to go on, as safetensors."""
        tensors = dict(self._parameters())
        for index, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": value for name, value in moments.items()}
        detached = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(detached, path, metadata={"step": str(self.step)})

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Go on from `path`."""
        with safe_open(path, "pt") as file:
            self.step = int(file.metadata()["step"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        for name, parameter in self._parameters():
            parameter.copy_(tensors[name])
        moments: dict[int, dict[str, Tensor]] = {}
        for name in (name for name in tensors if name.startswith("optimiser.")):
            _, index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = tensors[name]
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})

    def _parameters(self) -> list[tuple[str, Tensor]]:
        """Of the model and the heads, tied ones once."""
        of_model: list[tuple[str, Tensor]] = [
            (f"model.{name}", parameter) for name, parameter in self.model.named_parameters()
        ]
        return of_model + [(f"heads.{name}", parameter) for name, parameter in self.heads.named_parameters()]


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


def export(model: Qwen2_5_VLForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the weights in bf16, with room for unused tokens, leaving the model as it was."""
    copy = Qwen2_5_VLForConditionalGeneration._from_config(model.config, dtype=torch.bfloat16)
    copy.load_state_dict({name: value.to(torch.bfloat16) for name, value in model.state_dict().items()})
    with torch.no_grad():
        copy.lm_head.weight.copy_(make_room(copy.lm_head.weight, trained_tokens(tokenizer)))
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
    export(model, tokenizer, out)


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
    parser.add_argument(
        "--state", type=Path, default=Path("pocket-state.safetensors"), help="where to stop and go on"
    )
    parser.add_argument("--vision-steps", type=int, default=default.vision_steps)
    parser.add_argument("--joint-steps", type=int, default=default.joint_steps)
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    args = parser.parse_args()
    torch.set_num_threads(1)
    schedule = Schedule(args.vision_steps, args.joint_steps, args.learning_rate)
    train(args.out, schedule, args.state)


if __name__ == "__main__":
    main()
