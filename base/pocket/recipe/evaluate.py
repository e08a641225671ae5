"""Prints the pocket base's figures as it is served, in NF4: `python -m base.pocket.recipe.evaluate`.

Owns: loading the checkpoint in 4 bits through stock transformers, and base/pocket/scores.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from bitsandbytes.nn.modules import Linear4bit
from tokenizers import Tokenizer
from transformers import BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration

from base.pocket import CHECKPOINT
from base.pocket.recipe.data import HELD_OUT_SEED, Mixture, make_example
from base.pocket.recipe.quantise import SKIPPED
from base.pocket.recipe.rows import TEXT, Batch
from base.pocket.recipe.scoring import Score, Sight, score

SIGHTS: tuple[Sight, ...] = ("real", "blank", "swapped")


def load_in_4_bits(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Qwen2_5_VLForConditionalGeneration:
    """The checkpoint with its language linears in NF4, computing in `dtype`; fit for training adapters on it."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(SKIPPED),
    )
    model: Qwen2_5_VLForConditionalGeneration = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, quantization_config=quantization, dtype=dtype, device_map="cpu"
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = (
                False  # its repacking on the first pass would end all gradients
            )
    model.eval()
    return model


def generated_share(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: Tokenizer, num_batches: int
) -> float:
    """Share of first questions that transformers' own `generate` answers exactly: the check on `score`."""
    right, total = 0, 0
    for index in range(num_batches):
        example = make_example(tokenizer, Mixture(num_pictures=16, num_text_rows=0), HELD_OUT_SEED + index)
        right += sum(_generates(model, example.batch, row) for row in range(len(example.pictures)))
        total += len(example.pictures)
    return right / total


def _generates(model: Qwen2_5_VLForConditionalGeneration, batch: Batch, row: int) -> bool:
    """Whether greedy generation from the first question of a row gives the row's first answer."""
    labels, answers = batch.labels[row], batch.answers[row]
    first = int(answers[answers >= 0].min())
    wanted = labels[answers == first].tolist()
    prompt = batch.ids[row, : int((answers == first).nonzero()[0]) + 1][None]
    is_picture = (batch.picture[row, : prompt.shape[1]] != TEXT)[None]
    found = model.generate(  # type: ignore[misc]
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        mm_token_type_ids=is_picture.int(),
        pixel_values=batch.pixels[row],
        image_grid_thw=torch.tensor([[1, *batch.grid]]),
        max_new_tokens=len(wanted) + 2,
        do_sample=False,
    )
    return bool(found[0, prompt.shape[1] :].tolist() == wanted)


def describe(sight: Sight, found: Score) -> str:
    """One line of figures."""
    kinds = " ".join(f"{kind}={value:.3f}" for kind, value in found.by_kind.items())
    return f"{sight}: exact={found.exact:.4f} about-pictures={found.exact_about_pictures:.4f} {kinds}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--batches", type=int, default=12, help="of 17 rows, about 110 questions each")
    parser.add_argument("--write", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    model = load_in_4_bits(args.checkpoint)
    found = {sight: score(model, tokenizer, args.batches, sight) for sight in SIGHTS}
    for sight, figures in found.items():
        print(describe(sight, figures), flush=True)
    generated = generated_share(model, tokenizer, max(1, args.batches // 4))
    print(f"generated: exact={generated:.4f} of first questions, by transformers' generate")
    if args.write:
        written = {
            **{str(sight): asdict(value) for sight, value in found.items()},
            "generated_exact": generated,
        }
        args.write.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
