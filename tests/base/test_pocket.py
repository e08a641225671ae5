"""The pocket base: its recipe computes what transformers computes, and what it shipped sees and speaks."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from base.pocket import CHECKPOINT
from base.pocket.recipe.architecture import build_config
from base.pocket.recipe.data import Example, Mixture, make_example
from base.pocket.recipe.evaluate import load_in_4_bits
from base.pocket.recipe.forward import run, see
from base.pocket.recipe.pixels import patchify
from base.pocket.recipe.questions import Asked
from base.pocket.recipe.rows import IGNORED, TEXT, RowWriter, collate
from base.pocket.recipe.scenes import draw, sample_scene
from base.pocket.recipe.scoring import score
from base.pocket.recipe.tokenizer import PLAIN_ADDED_TOKENS, SPECIAL_TOKENS, build_tokenizer
from base.pocket.recipe.train import Schedule, Trainer

MAX_BYTES = 16_000_000


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> Qwen2_5_VLForConditionalGeneration:
    loaded: Qwen2_5_VLForConditionalGeneration = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        CHECKPOINT, dtype=torch.float32
    )
    return loaded


@pytest.fixture(scope="module")
def example(tokenizer: Tokenizer) -> Example:
    return make_example(tokenizer, Mixture(num_pictures=3, num_branches=3), seed=5)


def test_the_checkpoint_is_small_and_in_16_bits() -> None:
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= MAX_BYTES
    assert json.loads((CHECKPOINT / "config.json").read_text())["dtype"] == "bfloat16"


def test_patches_equal_those_of_the_image_processor() -> None:
    processor = Qwen2VLImageProcessorPil.from_pretrained(CHECKPOINT)
    rng = Random(3)
    for _ in range(8):
        image = draw(sample_scene(rng), rng).image
        patches, (down, across) = patchify(image)
        wanted = processor(images=[image], return_tensors="pt")
        assert wanted["image_grid_thw"].tolist() == [[1, down, across]]
        torch.testing.assert_close(torch.from_numpy(patches), wanted["pixel_values"], atol=1e-5, rtol=0)


def test_the_recipe_makes_the_shipped_tokenizer(tokenizer: Tokenizer) -> None:
    assert json.loads(build_tokenizer().to_str()) == json.loads(tokenizer.to_str())


def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    for text in ("Where is it?", "Ça, c'est déjà vu: 42 €!\n\t", '{"a": [1, null]}', "鸚鵡 🦜\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_special_tokens_are_single_and_agree_with_the_configuration(tokenizer: Tokenizer) -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())
    for token in (*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS):
        assert len(tokenizer.encode(token).ids) == 1
    assert config["image_token_id"] == tokenizer.token_to_id("<|image_pad|>")
    assert config["vision_start_token_id"] == tokenizer.token_to_id("<|vision_start|>")
    assert tokenizer.get_vocab_size() <= config["text_config"]["vocab_size"]
    stock = AutoTokenizer.from_pretrained(CHECKPOINT)
    assert (stock.eos_token, stock.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert stock("Where is the red circle?")["input_ids"] == tokenizer.encode("Where is the red circle?").ids


def test_rows_spell_what_the_chat_template_spells(tokenizer: Tokenizer) -> None:
    writer = RowWriter(tokenizer, (1, 1))
    writer.start("You are a helpful assistant.", shows_picture=True)
    writer.branch([Asked("shape", "What is it?", "A star."), Asked("chat", "Thanks!", "You are welcome!")])
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A star."},
        {"role": "user", "content": "Thanks!"},
        {"role": "assistant", "content": "You are welcome!"},
    ]
    wanted = AutoTokenizer.from_pretrained(CHECKPOINT).apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(writer.finish().ids, skip_special_tokens=False) + "\n" == wanted


def test_labels_are_only_on_what_the_assistant_says(tokenizer: Tokenizer) -> None:
    writer = RowWriter(tokenizer, None)
    writer.start("Answer briefly.", shows_picture=False)
    writer.branch([Asked("chat", "Hello!", "Hi."), Asked("chat", "Bye!", "Goodbye!")])
    row = writer.finish()
    wanted = [label for label in row.labels if label != IGNORED]
    assert tokenizer.decode(wanted, skip_special_tokens=False) == "Hi.<|im_end|>Goodbye!<|im_end|>"


def test_positions_equal_transformers_rope_index(
    tokenizer: Tokenizer, model: Qwen2_5_VLForConditionalGeneration
) -> None:
    for down, across, late in ((4, 4, False), (3, 5, False), (5, 3, True)):
        writer = RowWriter(tokenizer, (down, across))
        writer.start("Answer briefly.", shows_picture=not late)
        writer.branch([Asked("shape", "What is it?", "A star.")], picture_after=late)
        row = writer.finish()
        is_picture = torch.tensor([[int(index != TEXT) for index in row.picture]])
        grid = torch.tensor([[1, 2 * down, 2 * across]])
        wanted, _ = model.model.get_rope_index(torch.tensor([row.ids]), is_picture, image_grid_thw=grid)
        assert torch.equal(torch.tensor(row.positions).T, wanted[:, 0])


def test_the_batched_tower_equals_transformers_tower(
    model: Qwen2_5_VLForConditionalGeneration, example: Example
) -> None:
    batch = example.batch
    grids = torch.tensor([[1, *batch.grid]] * len(batch.pixels))
    with torch.no_grad():
        wanted = model.model.visual(batch.pixels.flatten(0, 1), grid_thw=grids).pooler_output
        found = see(model.model.visual, batch.pixels, batch.grid)
    torch.testing.assert_close(found.flatten(0, 1), wanted, atol=1e-4, rtol=1e-4)


def test_a_branch_is_read_as_if_it_were_alone(
    tokenizer: Tokenizer, model: Qwen2_5_VLForConditionalGeneration
) -> None:
    hello, bye = Asked("chat", "Hello!", "Hi."), Asked("chat", "Bye!", "Goodbye!")
    turns = [[hello], [bye, hello]]
    together = _logits(tokenizer, model, turns)
    alone = torch.cat([_logits(tokenizer, model, [turn]) for turn in turns])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)


def _logits(
    tokenizer: Tokenizer, model: Qwen2_5_VLForConditionalGeneration, branches: list[list[Asked]]
) -> torch.Tensor:
    writer = RowWriter(tokenizer, None)
    writer.start("Answer briefly.", shows_picture=False)
    for turns in branches:
        writer.branch(turns)
    batch = collate([writer.finish()], torch.zeros(0, 64, 1176), (8, 8))
    with torch.no_grad():
        return run(model, batch, torch.zeros(1, 16, 256)).logits


def test_the_served_base_answers_and_needs_the_picture(tokenizer: Tokenizer) -> None:
    served = load_in_4_bits(CHECKPOINT)
    mixture = Mixture(num_pictures=8, num_branches=5)
    assert score(served, tokenizer, 1, mixture=mixture).exact >= 0.9
    assert score(served, tokenizer, 1, "blank", mixture).exact_about_pictures <= 0.4
    assert score(served, tokenizer, 1, "swapped", mixture).exact_about_pictures <= 0.4


def test_training_goes_on_from_where_it_was_saved(tmp_path: Path) -> None:
    schedule = Schedule(vision_steps=1, joint_steps=3, pictures=2, branches=1)
    whole, first, second = (_trainer(schedule) for _ in range(3))
    for _ in range(3):
        whole.advance()
    first.advance()
    first.advance()
    first.save(tmp_path / "state.safetensors")
    second.load(tmp_path / "state.safetensors")
    second.advance()
    pairs = zip(whole.parameters, second.parameters, strict=True)
    assert second.step == 3
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def _trainer(schedule: Schedule) -> Trainer:
    torch.manual_seed(3)
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    return Trainer(Qwen2_5_VLForConditionalGeneration(build_config(tokenizer)), tokenizer, schedule)
