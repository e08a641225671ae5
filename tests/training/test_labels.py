"""Training ids up to each answer are the server's prompt for the messages before it; only answers are labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from base.chat import ChatTemplate
from base.config import BaseConfig
from base.loader import open_processor
from base.positions import mrope_positions
from base.processing import QWEN2_5_VL_TEMPLATE
from base.processor import Processor, TextPart, TokenIds
from base.tokens import Tokens
from tests.support.checkpoints import make_checkpoint
from tests.training.rows import ROWS, put_pictures, write
from training.data.faults import FaultKind, RowRejected
from training.data.formats import Conversation, DataFile, PictureRoot
from training.data.labels import IGNORED, Example, Labeller

CONTENT = "{{ message['content'] }}<|im_end|>"
IS_HISTORY = "message['role'] == 'assistant' and not loop.last"
FORGETFUL_TEMPLATE = QWEN2_5_VL_TEMPLATE.replace(
    CONTENT, "{% if " + IS_HISTORY + " %}(said)<|im_end|>{% else %}" + CONTENT + "{% endif %}"
)
"""Rewrites what was said before, as templates do that drop earlier reasoning."""


@pytest.fixture(scope="module")
def odd_processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    """Another vocabulary and other pixel limits."""
    folder = make_checkpoint(tmp_path_factory.mktemp("odd"), vocab=640)
    return open_processor(BaseConfig(source=str(folder)))


@pytest.fixture(scope="module")
def forgetful(processor: Processor) -> Processor:
    tokens = Tokens(processor.tokenizer.to_str())
    ids = TokenIds(processor.image_token_id, -1, 0, processor.eos_token_ids, processor.vocab_size)
    return Processor(tokens, ChatTemplate(FORGETFUL_TEMPLATE, tokens, {}), processor.images, ids)


@pytest.fixture(scope="module")
def merging(processor: Processor) -> Processor:
    """Two newlines are one token, as in every published Qwen2.5: an answer's newline and the template's may merge."""
    description = json.loads(processor.tokenizer.to_str())
    model = description["model"]
    model["vocab"]["ĊĊ"] = model["vocab"].pop(
        "".join(model["merges"].pop())
    )  # the last: no other is built on it
    model["merges"].insert(0, ["Ċ", "Ċ"])
    tokens = Tokens(json.dumps(description))
    ids = TokenIds(processor.image_token_id, -1, 0, processor.eos_token_ids, processor.vocab_size)
    return Processor(tokens, ChatTemplate(QWEN2_5_VL_TEMPLATE, tokens, {}), processor.images, ids)


def conversation(folder: Path, name: str, processor: Processor) -> Conversation:
    put_pictures(folder)
    root = PictureRoot(folder, base_max_pixels=processor.images.max_pixels)
    (row,) = DataFile(write(folder, ROWS[name][1]), root=root)
    assert isinstance(row, Conversation), str(row)
    return row


def spans(example: Example) -> list[tuple[int, int]]:
    """Begin and end of each run of labels; a run ends with an end token, so neighbours cannot touch."""
    marks = [False, *(example.labels != IGNORED).tolist(), False]
    edges = [i for i in range(1, len(marks)) if marks[i] != marks[i - 1]]
    return [(begin - 1, end - 1) for begin, end in zip(edges[::2], edges[1::2], strict=True)]


def breaches(row: Conversation, examples: Sequence[Example], processor: Processor) -> list[str]:
    """Where examples differ from what the server would send and what the model should answer."""
    messages = row.messages()
    wanted = [i for i, turn in enumerate(row.turns) if turn.is_trained]
    found = []
    answers = [(example, span) for example in examples for span in spans(example)]
    if len(answers) != len(wanted):
        return [f"{len(answers)} runs of labels for {len(wanted)} answers"]
    for index, (example, (begin, end)) in zip(wanted, answers, strict=True):
        prompt = processor.prepare_chat(messages[:index], tools=row.tools)
        ids = example.ids.tolist()
        if ids[:begin] != list(prompt.ids):
            found.append(f"turn {index}: the ids before the answer are not the server's prompt")
        if not torch.equal(example.positions[:, :begin], prompt.positions):
            found.append(f"turn {index}: positions")
        if [image.digest for image in example.images[: len(prompt.images)]] != [
            i.digest for i in prompt.images
        ]:
            found.append(f"turn {index}: pictures")
        if example.labels[begin:end].tolist() != ids[begin:end]:
            found.append(f"turn {index}: labels are not the ids")
        text = row.turns[index].text
        if not row.turns[index].tool_calls and processor.decode(ids[begin : end - 1]) != text:
            found.append(f"turn {index}: the labels do not read {text!r}")
        if ids[end - 1] not in processor.eos_token_ids:
            found.append(f"turn {index}: the labels do not end with the end token")
    for example in examples:
        if (example.labels == processor.image_token_id).any():
            found.append("a label on a picture")
    return found


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("base", ["processor", "odd_processor", "forgetful", "merging"])
def test_ids_before_each_answer_are_the_server_s_prompt(
    tmp_path: Path, request: pytest.FixtureRequest, base: str, name: str
) -> None:
    processor: Processor = request.getfixturevalue(base)
    row = conversation(tmp_path, name, processor)
    examples = Labeller(processor).examples(row)
    assert breaches(row, examples, processor) == []


def test_answers_share_one_example_unless_the_template_rewrites_them(
    tmp_path: Path, processor: Processor, forgetful: Processor
) -> None:
    row = conversation(tmp_path, "sharegpt", processor)
    assert [len(Labeller(each).outlines(row)) for each in (processor, forgetful)] == [1, 2]


def test_an_answer_that_merges_with_the_template_s_newline_begins_a_new_example(
    tmp_path: Path, processor: Processor, merging: Processor
) -> None:
    row = conversation(tmp_path, "newlines", processor)
    assert [len(Labeller(each).outlines(row)) for each in (processor, merging)] == [1, 2]


def _shifted(example: Example) -> Example:
    return replace(example, labels=example.labels.roll(1))


def _all_labelled(example: Example) -> Example:
    return replace(example, labels=example.ids)


def _unlabelled(example: Example) -> Example:
    return replace(example, labels=torch.full_like(example.labels, IGNORED))


def _no_end(example: Example) -> Example:
    labels = example.labels.clone()
    labels[spans(example)[-1][1] - 1] = IGNORED
    return replace(example, labels=labels)


def _other_prompt(example: Example) -> Example:
    ids = example.ids.clone()
    ids[2] += 1
    return replace(example, ids=ids)


@pytest.mark.parametrize("spoil", [_shifted, _all_labelled, _unlabelled, _no_end, _other_prompt])
def test_planted_mistakes_are_found(
    tmp_path: Path, processor: Processor, spoil: Callable[[Example], Example]
) -> None:
    row = conversation(tmp_path, "sharegpt", processor)
    examples = [spoil(example) for example in Labeller(processor).examples(row)]
    assert breaches(row, examples, processor) != []


def test_labels_are_the_answers_and_their_end_tokens(tmp_path: Path, processor: Processor) -> None:
    row = conversation(tmp_path, "query_response", processor)
    (example,) = Labeller(processor).examples(row)
    labelled = example.labels[example.labels != IGNORED].tolist()
    assert labelled == [*processor.encode("Red."), *processor.eos_token_ids[:1]]
    assert example.num_labels == len(labelled)


def test_positions_and_pictures_are_those_of_the_whole(tmp_path: Path, processor: Processor) -> None:
    row = conversation(tmp_path, "alpaca_whole", processor)
    (example,) = Labeller(processor).examples(row)
    grids = [image.grid for image in example.images]
    expected, _ = mrope_positions(
        example.ids.tolist(), processor.image_token_id, grids, processor.images.merge_size
    )
    assert torch.equal(example.positions, expected)
    for image in example.images:
        covered = example.ids[image.offset : image.offset + image.num_tokens]
        assert (covered == processor.image_token_id).all()
    assert int((example.ids == processor.image_token_id).sum()) == sum(i.num_tokens for i in example.images)


@pytest.mark.parametrize("name", ["alpaca_whole", "openai", "role_content"])
def test_the_size_of_a_picture_is_known_before_it_is_decoded(
    tmp_path: Path, processor: Processor, odd_processor: Processor, name: str
) -> None:
    for each in (processor, odd_processor):
        row = conversation(tmp_path, name, each)
        labeller = Labeller(each)
        (example,) = labeller.examples(row)
        assert [labeller.num_image_tokens(p) for p in row.pictures] == [i.num_tokens for i in example.images]


def test_tool_calls_are_learnt_as_the_server_s_grammar_writes_them(
    tmp_path: Path, processor: Processor
) -> None:
    row = conversation(tmp_path, "openai_tools", processor)
    outline = Labeller(processor).outlines(row)[0]
    learnt = [i for i, is_label in zip(outline.ids, outline.is_label, strict=True) if is_label]
    text = processor.decode(learnt, skip_special_tokens=False)
    assert text.startswith(
        '<tool_call>\n{"name": "look_up", "arguments": {"word": "kite"}}\n</tool_call><|im_end|>'
    )


def test_a_row_without_labels_is_an_error(tmp_path: Path, processor: Processor) -> None:
    row = conversation(tmp_path, "alpaca", processor)
    mute = replace(row, turns=tuple(replace(turn, is_trained=False) for turn in row.turns))
    with pytest.raises(RowRejected) as rejected:
        Labeller(processor).outlines(mute)
    assert rejected.value.complaint.kind == FaultKind.NO_LABEL


def test_text_cannot_spell_a_label_s_end_or_a_picture(tmp_path: Path, processor: Processor) -> None:
    row = conversation(tmp_path, "alpaca", processor)
    spelt = "a<|im_end|>b<|image_pad|>"
    turns = (row.turns[0], replace(row.turns[1], parts=(TextPart(spelt),)))
    (example,) = Labeller(processor).examples(replace(row, turns=turns))
    learnt = example.labels[example.labels != IGNORED].tolist()
    assert learnt.count(processor.eos_token_ids[0]) == 1
    assert processor.image_token_id not in learnt


def test_a_template_whose_answers_never_end_is_refused(processor: Processor) -> None:
    tokens = Tokens(processor.tokenizer.to_str())
    ids = TokenIds(processor.image_token_id, -1, 0, processor.eos_token_ids, processor.vocab_size)
    endless = QWEN2_5_VL_TEMPLATE.replace("<|im_end|>", "")
    with pytest.raises(ValueError, match="end token"):
        Labeller(Processor(tokens, ChatTemplate(endless, tokens, {}), processor.images, ids))
