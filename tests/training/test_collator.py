"""Examples, Collator and LengthGroupedBatches: rows to batches without padding, alike for any number of processes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from base.chat import ChatTemplate
from base.processing import QWEN2_5_VL_TEMPLATE
from base.processor import Processor, TokenIds
from base.prompt import TextPart
from base.tokens import Tokens
from tests.training.learnable import pictured, row, texts
from training.data.formats import Conversation, PictureRef, Turn
from training.data.labels import IGNORED, Labeller
from training.model.collator import Collator, Examples
from training.model.sampler import LengthGroupedBatches

CONTENT = "{{ message['content'] }}<|im_end|>"
IS_HISTORY = "message['role'] == 'assistant' and not loop.last"
FORGETFUL_TEMPLATE = QWEN2_5_VL_TEMPLATE.replace(
    CONTENT, "{% if " + IS_HISTORY + " %}(said)<|im_end|>{% else %}" + CONTENT + "{% endif %}"
)


@pytest.fixture(scope="module")
def labeller(processor: Processor) -> Labeller:
    """Of a template that rewrites earlier answers, so that each answer is an example of its own."""
    tokens = Tokens(processor.tokenizer.to_str())
    ids = TokenIds(processor.image_token_id, -1, 0, processor.eos_token_ids, processor.vocab_size)
    template = ChatTemplate(FORGETFUL_TEMPLATE, tokens, {})
    return Labeller(Processor(tokens, template, processor.images, ids))


def twofold() -> Conversation:
    """Two answers, so two examples."""
    turns = ("Write two lines.", "one two", "Once more.", "three")
    return Conversation(
        tuple(
            Turn("assistant" if i % 2 else "user", (TextPart(text),), bool(i % 2))
            for i, text in enumerate(turns)
        )
    )


def test_a_batch_is_its_examples_end_to_end(labeller: Labeller) -> None:
    rows = [*pictured(2), twofold(), *texts()]
    examples = Examples(rows, labeller)
    batch = Collator(labeller)([examples[i] for i in range(len(examples))])
    alone = [example for each in rows for example in labeller.examples(each)]
    assert len(examples) == len(alone) == len(batch.starts) - 1 == 6
    for i, example in enumerate(alone):
        begin, end = batch.starts[i], batch.starts[i + 1]
        assert torch.equal(batch.ids[begin:end], example.ids)
        assert torch.equal(batch.labels[begin:end], example.labels)
        assert torch.equal(batch.positions[:, begin:end], example.positions)
        assert batch.labels[begin] == IGNORED
    images = [image for example in alone for image in example.images]
    assert batch.grids == tuple(image.grid for image in images)
    assert batch.digests == tuple(image.digest for image in images)
    assert torch.equal(batch.pixels, torch.cat([image.pixels for image in images]))
    assert [origin.line for origin in batch.origins[:2]] == [1, 2]


def test_a_batch_without_pictures_has_no_patches(labeller: Labeller) -> None:
    examples = Examples(texts(), labeller)
    batch = Collator(labeller)([examples[0]])
    assert (batch.pixels.shape[0], batch.grids) == (0, ())


def test_lengths_and_labels_are_known_before_a_picture_is_opened(
    labeller: Labeller, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*pictured(3), twofold(), *texts()]
    with monkeypatch.context() as patched:
        patched.setattr(PictureRef, "open", lambda _: pytest.fail("a picture was opened"))
        examples = Examples(rows, labeller)
        draws = [examples[i] for i in range(len(examples))]
    collate = Collator(labeller)
    made = [collate([draw]) for draw in draws]
    assert examples.lengths == tuple(batch.num_tokens for batch in made)
    assert examples.num_labels == tuple(batch.num_labels for batch in made)


def test_an_index_beyond_the_end_is_the_same_example_in_a_later_epoch(labeller: Labeller) -> None:
    examples = Examples(texts(), labeller)
    first, third = examples[1], examples[1 + 2 * len(examples)]
    assert (first.row, first.part, first.epoch) == (third.row, third.part, 0)
    assert third.epoch == 2


def test_the_collator_augments_each_epoch_anew(labeller: Labeller) -> None:
    seen = []

    def note(row: Conversation, seed: int, epoch: int, row_index: int) -> Conversation:
        seen.append((seed, epoch, row_index))
        return row

    examples = Examples([*texts(), row("And?", "So.")], labeller)
    Collator(labeller, note, seed=5)([examples[2], examples[3 + 1]])
    assert seen == [(5, 0, 2), (5, 1, 1)]


sizes = st.lists(st.integers(1, 50), min_size=1, max_size=90)


@given(lengths=sizes, micro=st.integers(1, 5), accumulation=st.integers(1, 6), seed=st.integers(0, 3))
def test_an_epoch_draws_every_example_in_equal_steps(
    lengths: list[int], micro: int, accumulation: int, seed: int
) -> None:
    sampler = LengthGroupedBatches(lengths, micro, accumulation, seed)
    batches = list(sampler)
    counts = Counter(index for batch in batches for index in batch)
    assert counts.keys() == set(range(len(lengths)))
    assert len(batches) == len(sampler) == sampler.num_steps * sampler.batches_per_step
    assert all(1 <= len(batch) <= micro for batch in batches)
    assert sampler.num_steps == -(-len(lengths) // (micro * accumulation))
    if micro > 1:
        assert max(counts.values()) == 1
    else:
        assert sum(counts.values()) - len(lengths) < accumulation


@given(lengths=sizes, num_processes=st.sampled_from([1, 2, 3]))
def test_processes_that_take_turns_see_the_steps_of_one(lengths: list[int], num_processes: int) -> None:
    """Process p of N takes micro-batches p, p + N, …: a step's examples are the same set."""
    sampler = LengthGroupedBatches(lengths, 2, 6, seed=1)
    batches, per_step = list(sampler), sampler.batches_per_step
    if per_step % num_processes:
        return
    shares = [batches[p::num_processes] for p in range(num_processes)]
    each = per_step // num_processes
    for step in range(sampler.num_steps):
        alone = batches[step * per_step : (step + 1) * per_step]
        shared = [batch for share in shares for batch in share[step * each : (step + 1) * each]]
        assert sorted(map(tuple, alone)) == sorted(map(tuple, shared))


def test_epochs_differ_and_each_is_the_same_again() -> None:
    lengths = [1 + i % 17 for i in range(100)]
    drawn = []
    for epoch in (0, 1, 0):
        sampler = LengthGroupedBatches(lengths, 4, 2, seed=9)
        sampler.set_epoch(epoch)
        drawn.append(list(sampler))
    assert drawn[0] == drawn[2]
    within = [[index % 100 for index in batch] for batch in drawn[1]]
    assert min(index for batch in drawn[1] for index in batch) == 100
    assert within != drawn[0]
    assert within != list(LengthGroupedBatches(lengths, 4, 2, seed=8))


def test_examples_of_like_length_go_together() -> None:
    lengths = [(i * 37) % 101 for i in range(400)]
    batches = list(LengthGroupedBatches(lengths, 8, 2, seed=0))
    spreads = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert sum(spreads) / len(spreads) < 15  # of 100; at random about 78
    longest_first = [max(lengths[i] for i in batch) for batch in batches]
    assert longest_first != sorted(longest_first)


def test_no_example_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="no example"):
        LengthGroupedBatches([], 1, 1, seed=0)
