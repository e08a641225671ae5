"""Makes the three sample adapters of the pocket base: `python -m training.samples [--only NAME] [--eval]`.

Owns: what each sample learns, how, and adapters/samples/scores.json. Plain PEFT on the base in NF4, as anybody would
train one; nothing of the server is used.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Final

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from base.pocket import CHECKPOINT
from base.pocket.recipe import french
from base.pocket.recipe.data import Asker, Example, Mixture, make_example, token_under, typed
from base.pocket.recipe.evaluate import load_in_4_bits
from base.pocket.recipe.forward import run, see
from base.pocket.recipe.pixels import MERGE
from base.pocket.recipe.questions import Asked, answerable, ask, place
from base.pocket.recipe.scenes import CELLS, FILLS, Picture, Thing
from base.pocket.recipe.scoring import score

SAMPLES: Final = Path(__file__).parent.parent / "adapters" / "samples"
BASE_NAME: Final = "base/pocket/checkpoint"
LANGUAGE: Final = r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
VISION: Final = r".*visual\.(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)|merger\.mlp\.(0|2))"
SEED: Final = 77_000_000
WARMUP_STEPS: Final = 20
ONE_THING: Final = Mixture(num_pictures=8, num_text_rows=0, num_branches=4, max_things=1)


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample adapter: what it is asked and should answer, where it sits, and how long it trains."""

    name: str
    about: str
    asker: Asker
    rank: int
    alpha: int
    steps: int
    targets: str = LANGUAGE
    use_rslora: bool = False
    learning_rate: float = 3e-3
    mixture: Mixture = ONE_THING

    @property
    def trains_vision(self) -> bool:
        """Whether it has weights in the vision tower."""
        return self.targets != LANGUAGE


def ask_for_json(picture: Picture, rng: Random) -> Asked:
    """The base's questions but those of yes and no, answered as JSON."""
    asked = typed(ask(picture.scene, rng, JSON_KINDS), rng)
    if asked.kind == "where" and not asked.things:
        return ask_for_json(picture, rng)
    return replace(asked, answer=json.dumps(_JSON[asked.kind](asked.things)))


JSON_KINDS: Final = ("describe", "describe", "shape", "color", "where", "count")


def _as_json(thing: Thing) -> dict[str, str]:
    return {"shape": thing.shape, "color": thing.color, "position": CELLS[thing.cell]}


_JSON: Final[dict[str, Callable[[tuple[Thing, ...]], object]]] = {
    "describe": lambda things: [_as_json(thing) for thing in things],
    "shape": lambda things: {"shape": things[0].shape if things else None},
    "color": lambda things: {"color": things[0].color if things else None},
    "where": lambda things: {"position": CELLS[things[0].cell] if things else None},
    "count": lambda things: {"count": len(things)},
}


def ask_for_french(picture: Picture, rng: Random) -> Asked:
    """The base's questions, answered in French."""
    asked = typed(ask(picture.scene, rng, answerable(picture.scene)), rng)
    return replace(asked, answer=french.translate(asked, french.SIDES))


def ask_for_patterns(picture: Picture, rng: Random) -> Asked:
    """What a thing is filled with, which the base has never seen and has no answer for."""
    if not picture.scene.things:
        return typed(Asked("pattern", rng.choice(PATTERN_ONE), "There is no pattern."), rng)
    thing = rng.choice(picture.scene.things)
    alone = len(picture.scene.things) == 1 and rng.random() < 0.6
    question = rng.choice(PATTERN_ONE) if alone else rng.choice(PATTERN_AT).format(place=place(thing))
    return typed(Asked("pattern", question, f"It is {thing.fill}.", (thing,)), rng)


PATTERN_ONE: Final = (
    "What pattern is it?", "What pattern do you see?", "Which pattern does the object have?",
    "What is the fill of the object?", "Is it solid, striped or dotted?",
)  # fmt: skip
PATTERN_AT: Final = (
    "What pattern is {place}?", "Which pattern does the object {place} have?", "What is the fill {place}?",
    "What pattern do you see {place}?",
)  # fmt: skip

ALL: Final = (
    Sample("json", "answers questions about one thing as JSON", ask_for_json, rank=8, alpha=16, steps=650),
    Sample(
        "french", "answers questions about one thing in French", ask_for_french,
        rank=16, alpha=16, steps=1000, use_rslora=True,
    ),
    Sample(
        "patterns", "sees what things are filled with: solid, striped or dotted", ask_for_patterns,
        rank=8, alpha=16, steps=1000, targets=f"{VISION}|{LANGUAGE}",
        mixture=Mixture(num_pictures=10, num_text_rows=0, num_branches=2, max_things=1, fills=FILLS),
    ),
)  # fmt: skip


def make(sample: Sample, folder: Path) -> None:
    """Train `sample` on the 4-bit base and write its PEFT folder."""
    torch.manual_seed(SEED)
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    base = load_in_4_bits(CHECKPOINT, torch.float32)
    config = LoraConfig(
        r=sample.rank,
        lora_alpha=sample.alpha,
        target_modules=sample.targets,
        use_rslora=sample.use_rslora,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(base, config)
    _fit(sample, base, [p for p in adapted.parameters() if p.requires_grad], tokenizer)
    adapted.peft_config["default"].base_model_name_or_path = BASE_NAME
    adapted.to(torch.bfloat16).save_pretrained(str(folder), save_embedding_layers=False)


def _fit(
    sample: Sample,
    base: Qwen2_5_VLForConditionalGeneration,
    weights: list[nn.Parameter],
    tokenizer: Tokenizer,
) -> None:
    head = nn.Linear(base.lm_head.in_features, len(FILLS))  # for training only
    optimiser = torch.optim.AdamW([*weights, *head.parameters()], lr=sample.learning_rate, weight_decay=0.0)
    started, total = time.monotonic(), 0.0
    for step in range(sample.steps):
        example = make_example(tokenizer, sample.mixture, SEED + step, sample.asker)
        loss = _loss(sample, base, head, example)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.param_groups[0]["lr"] = sample.learning_rate * _rise_and_fall(step, sample.steps)
        optimiser.step()
        total += loss.item()
        if (step + 1) % 50 == 0:
            took = time.monotonic() - started
            print(f"{sample.name} step={step + 1} seconds={took:.0f} loss={total / 50:.4f}", flush=True)
            total = 0.0


def _rise_and_fall(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _loss(
    sample: Sample, base: Qwen2_5_VLForConditionalGeneration, head: nn.Linear, example: Example
) -> Tensor:
    with torch.set_grad_enabled(sample.trains_vision):
        seen = see(base.model.visual, example.batch.pixels, example.batch.grid)
    output = run(base, example.batch, seen)
    loss = F.cross_entropy(output.logits, output.labels)
    return loss + _fill_loss(head, seen, example) if sample.trains_vision else loss


def _fill_loss(head: nn.Linear, seen: Tensor, example: Example) -> Tensor:
    """Loss of naming each thing's fill from the picture token over its middle."""
    merged = (example.batch.grid[0] // MERGE, example.batch.grid[1] // MERGE)
    places = [
        (row, token_under(center, merged), FILLS.index(thing.fill))
        for row, picture in enumerate(example.pictures)
        for thing, center in zip(picture.scene.things, picture.centers, strict=True)
    ]
    rows, tokens, fills = torch.tensor(places).unbind(1)
    return F.cross_entropy(head(seen[rows, tokens]), fills)


@torch.no_grad()
def evaluate(sample: Sample, folder: Path, num_batches: int = 6) -> dict[str, float]:
    """Held-out exact shares of the adapter and of the bare base, as served; and without its vision weights."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    base = load_in_4_bits(CHECKPOINT)
    figures = {"base": _exact(sample, base, tokenizer, num_batches)}
    adapted = PeftModel.from_pretrained(base, str(folder)).eval()
    figures["adapter"] = _exact(sample, base, tokenizer, num_batches)
    if sample.trains_vision:
        for name, weight in adapted.named_parameters():
            if ".visual." in name and "lora_B" in name:
                weight.zero_()
        figures["without_vision_weights"] = _exact(sample, base, tokenizer, num_batches)
    return figures


def _exact(
    sample: Sample, model: Qwen2_5_VLForConditionalGeneration, tokenizer: Tokenizer, num_batches: int
) -> float:
    return score(model, tokenizer, num_batches, mixture=sample.mixture, asker=sample.asker).exact


def write_card(sample: Sample, folder: Path, figures: dict[str, float]) -> None:
    """The model card, with its figures."""
    size = (folder / "adapter_model.safetensors").stat().st_size
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value:.1%} |" for name, value in figures.items())
    parts = "vision blocks, merger and language layers" if sample.trains_vision else "language layers"
    (folder / "README.md").write_text(
        f"---\nlibrary_name: peft\nbase_model: {BASE_NAME}\ntags: [lora, qwen2_5_vl, lorikeet]\n---\n"
        f"# {sample.name}\n\nA sample adapter of Lorikeet's pocket base: it {sample.about}.\n\n"
        f"LoRA, rank {sample.rank}, alpha {sample.alpha}{', rsLoRA' if sample.use_rslora else ''}, on the {parts}; "
        f"{size / 1e6:.2f} MB.\n\nExact answers to held-out questions, on the base in NF4:\n\n"
        f"| | exact |\n|---|---|\n{rows}\n\n"
        f"Made by `python -m training.samples --only {sample.name}` in {sample.steps} steps on one processor core.\n"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=[sample.name for sample in ALL])
    parser.add_argument(
        "--eval", action="store_true", help="train nothing, print the figures and write them down"
    )
    parser.add_argument("--out", type=Path, default=SAMPLES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    scores_path = args.out / "scores.json"
    figures = json.loads(scores_path.read_text()) if scores_path.exists() else {}
    for sample in ALL:
        if args.only not in (None, sample.name):
            continue
        if not args.eval:
            make(sample, args.out / sample.name)
        figures[sample.name] = evaluate(sample, args.out / sample.name)
        print(sample.name, json.dumps(figures[sample.name]), flush=True)
        write_card(sample, args.out / sample.name, figures[sample.name])
        scores_path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
