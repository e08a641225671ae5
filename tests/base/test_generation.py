"""Greedy tokens of the base equal transformers' on the same quantised weights: text, images, chunks, mixed batches."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from base.model import BaseModel
from base.processor import ImagePart, Message, PromptInputs, TextPart
from tests.support.oracle import Oracle, same_where_certain
from tests.support.paged import PagedCache, Segment, embed_prompt, generate_greedy, run
from tests.support.pictures import picture

NUM_TOKENS = 12


def prompts(base: BaseModel) -> list[PromptInputs]:
    first, second = ImagePart(picture(1, 100, 70)), ImagePart(picture(2, 60, 150))
    chats: Sequence[tuple[TextPart | ImagePart, ...]] = (
        (TextPart("What is this?"),),
        (TextPart("Describe the quick brown fox, please."),),
        (first, TextPart("How many red circles are there?")),
        (second, TextPart("Describe the image.")),
        (first, TextPart("and"), second, TextPart("What is in this picture?")),
    )
    return [base.processor.prepare_chat([Message("user", parts)]) for parts in chats]


@pytest.mark.parametrize("which", ["tiny", "odd"])
@pytest.mark.parametrize(
    ("way", "is_reference", "margin", "least"),
    [
        ("dequantised", True, 0.05, 2 * NUM_TOKENS),
        ("dequantised", False, 0.1, NUM_TOKENS),
        ("float32", False, 0.1, NUM_TOKENS),
    ],
)
def test_greedy_tokens_equal_transformers(
    which: str,
    way: str,
    is_reference: bool,
    margin: float,
    least: int,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums in another order make a lead of one last bit of a bfloat16 logit (0.0625) uncertain."""
    base: BaseModel = request.getfixturevalue(f"{which}_{way}")
    if is_reference:
        monkeypatch.setattr(BaseModel, "forward", BaseModel.reference_forward)
    oracle: Oracle = request.getfixturevalue(f"{which}_oracle")
    num_certain = 0
    for prompt in prompts(base):
        reference = oracle.generate(prompt, NUM_TOKENS)
        assert same_where_certain(generate_greedy(base, prompt, NUM_TOKENS), reference, margin)
        assert same_where_certain(generate_greedy(base, prompt, NUM_TOKENS, chunk=5), reference, margin)
        num_certain += reference.num_certain(margin)
    assert num_certain >= least  # or the comparison would say little


def test_another_prompts_picture_changes_the_tokens(odd: BaseModel, odd_oracle: Oracle) -> None:
    """The control of the test above: it can fail."""
    _, _, first, second, _ = prompts(odd)
    reference = odd_oracle.generate(first, NUM_TOKENS)
    assert not same_where_certain(generate_greedy(odd, second, NUM_TOKENS), reference)


@pytest.mark.parametrize("which", ["tiny_dequantised", "odd_dequantised", "tiny_float32", "odd_float32"])
def test_a_row_does_not_depend_on_its_neighbours_to_the_bit(
    which: str, request: pytest.FixtureRequest
) -> None:
    base: BaseModel = request.getfixturevalue(which)
    cache = PagedCache(base, num_blocks=200)
    segments: list[Segment] = []
    next_block = 0
    for number, prompt in enumerate(prompts(base)):
        embeds = embed_prompt(base, prompt)
        num_blocks = len(prompt.ids) // cache.block_size + 1
        blocks = tuple(range(next_block, next_block + num_blocks))
        next_block += num_blocks
        cut = len(prompt.ids) - (1, 7, 3, 1, 12)[number]  # decodes and chunks with a past
        run(base, cache, [Segment(embeds[:cut], prompt.positions[:, :cut], blocks, 0)])
        segments.append(Segment(embeds[cut:], prompt.positions[:, cut:], blocks, cut))
    whole = embed_prompt(base, prompts(base)[0])
    segments.append(Segment(whole, prompts(base)[0].positions, tuple(range(next_block, next_block + 12)), 0))
    together = run(base, cache, segments)
    turned = run(base, cache, segments[::-1])[::-1]
    for segment, one, other in zip(segments, together, turned, strict=True):
        (alone,) = run(base, cache, [segment])
        assert torch.equal(one, alone)
        assert torch.equal(other, alone)
        assert torch.equal(base.logits(torch.cat(together)[-1:])[0], base.logits(torch.cat(together))[-1])


@pytest.mark.parametrize("which", ["tiny_dequantised", "odd_dequantised", "tiny_float32", "odd_float32"])
def test_an_image_does_not_depend_on_the_others_to_the_bit(
    which: str, request: pytest.FixtureRequest
) -> None:
    base: BaseModel = request.getfixturevalue(which)
    parts = [ImagePart(picture(seed, 40 + 37 * seed, 160 - 25 * seed)) for seed in range(1, 5)]
    images = [base.processor.images.prepare(part) for part in parts]
    together = base.embed_images(torch.cat([i.pixels for i in images]), [i.grid for i in images])
    rows = together.split([image.num_tokens for image in images])
    for image, row in zip(images, rows, strict=True):
        assert row.shape == (image.num_tokens, base.spec.hidden_size)
        assert torch.equal(row, base.embed_images(image.pixels, [image.grid]))


def test_blocks_in_any_order_and_shared_caches_do_not_matter(odd: BaseModel) -> None:
    prompt = prompts(odd)[1]
    embeds = embed_prompt(odd, prompt)
    results = []
    for blocks in (tuple(range(20)), tuple(range(39, 19, -1))):
        cache = PagedCache(odd, num_blocks=40)
        results += run(odd, cache, [Segment(embeds, prompt.positions, blocks, 0)])
    assert torch.equal(*results)


def test_unwritten_cache_is_never_read(odd: BaseModel) -> None:
    prompt = prompts(odd)[0]
    embeds = embed_prompt(odd, prompt)
    cache = PagedCache(odd, num_blocks=20)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan"))
    (hidden,) = run(odd, cache, [Segment(embeds, prompt.positions, tuple(range(20)), 0)])
    assert bool(torch.isfinite(hidden).all())
