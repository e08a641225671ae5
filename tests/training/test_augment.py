"""Augmentation: pictures differ, labels stay true."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from base.processor import Processor
from base.prompt import ImagePart
from tests.support.scenes import scene
from tests.training.learnable import picture_ref, row
from training.data.formats import Conversation
from training.data.formats.pictures import PictureRef
from training.data.labels import Labeller
from training.model.augment import augmentation
from training.model.collator import Collator, Examples
from training.recipe.recipe import Augmentation

BOX = (40, 60, 100, 120)
"""Of the red square on the sheet."""
NAMES: tuple[Augmentation, ...] = ("ocr", "natural")


def sheet(box: tuple[int, int, int, int] = BOX) -> Image.Image:
    """A red square on grey, 224 x 168: multiples of the base's 28."""
    image = Image.new("RGB", (224, 168), (128, 128, 128))
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=(220, 20, 20))
    return image


def found(image: Image.Image) -> tuple[int, int, int, int]:
    """Where the red is: left, top, right, bottom."""
    pixels = np.asarray(image).astype(int)
    ys, xs = np.nonzero(pixels[..., 0] - pixels[..., 1] > 80)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def opened(row: Conversation) -> list[Image.Image]:
    return [picture.open().image for picture in row.pictures]


def answer(row: Conversation) -> str:
    return row.turns[-1].text


@pytest.mark.parametrize("name", NAMES)
def test_pictures_differ_by_seed_epoch_and_row_and_are_else_the_same(name: Augmentation) -> None:
    augment, plain = augmentation(name), row("What?", "It is red.", picture_ref(sheet()))
    calls = [(0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    first, again, *others = [opened(augment(plain, *call))[0].tobytes() for call in calls]
    assert first == again
    assert len({first, *others, sheet().tobytes()}) == 5


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_keeps_its_size_so_a_row_keeps_its_tokens(processor: Processor, name: Augmentation) -> None:
    labeller = Labeller(processor)
    rows = [
        row("What?", "It is red.", picture_ref(scene("red", "circle", size)))
        for size in ((31, 90), (200, 40), (113, 97))
    ]
    examples = Examples(rows, labeller)
    collate = Collator(labeller, augmentation(name), seed=1)
    for epoch in range(3):
        for i in range(3):
            batch = collate([examples[i + epoch * len(examples)]])
            assert batch.num_tokens == examples.lengths[i]


@pytest.mark.parametrize("name", NAMES)
def test_hue_sides_and_order_survive(name: Augmentation) -> None:
    """Red stays red; what is left of the middle, above it, or left of something else stays so."""
    image = Image.new("RGB", (224, 168), (128, 128, 128))
    draw = ImageDraw.Draw(image)
    draw.rectangle((84, 60, 108, 80), fill=(220, 20, 20))  # just left of the middle, just above it
    plain = row("Where?", "On the left.", picture_ref(image))
    for epoch in range(40):
        [changed] = opened(augmentation(name)(plain, 0, epoch, 0))
        left, top, right, bottom = found(changed)
        assert right <= 112 and bottom <= 84
        middle = np.asarray(changed)[(top + bottom) // 2, (left + right) // 2].astype(int)
        assert middle[0] > 130 and middle[1] < 90 and middle[2] < 90


def test_light_is_moved_a_little_and_not_much() -> None:
    means = [
        np.asarray(opened(augmentation("ocr")(row("?", "!", picture_ref(sheet())), 0, epoch, 0))[0]).mean()
        for epoch in range(40)
    ]
    plain = np.asarray(sheet()).mean()
    assert 0.8 < min(means) / plain < 0.95
    assert 1.05 < max(means) / plain < 1.2


def test_ocr_never_moves_the_frame() -> None:
    plain = row("Where?", "There.", picture_ref(sheet()))
    for epoch in range(30):
        [changed] = opened(augmentation("ocr")(plain, 0, epoch, 0))
        assert np.abs(np.subtract(found(changed), BOX)).max() <= 2


def test_boxes_and_points_move_with_their_picture() -> None:
    text = '[{"bbox_2d": [40, 60, 100, 120], "label": "red"}, {"point_2d": [70.0, 90.0]}]'
    plain = row("Where?", text, picture_ref(sheet()), picture_ref(sheet()))
    moved = set()
    for epoch in range(20):
        changed = augmentation("natural")(plain, 0, epoch, 0)
        numbers = [float(n) for n in re.findall(r"(?<=[\[ ])-?[\d.]+(?=[,\]])", answer(changed))]
        assert len(numbers) == 6
        for image in opened(changed):
            assert np.abs(np.subtract(found(image), numbers[:4])).max() <= 3
        assert numbers[4] == pytest.approx((numbers[0] + numbers[2]) / 2, abs=1)
        assert '"label": "red"' in answer(changed)
        moved.add(answer(changed))
    assert len(moved) > 10


def test_a_box_of_the_question_moves_too() -> None:
    plain = row('What is at "bbox_2d": [40, 60, 100, 120]?', "A square.", picture_ref(sheet()))
    changed = augmentation("natural")(plain, 0, 3, 0)
    assert changed.turns[0].text != plain.turns[0].text
    assert answer(changed) == "A square."


@pytest.mark.parametrize(
    "text", ["(40,60),(100,120)", "<box>40 60</box>", '"polygon_2d": [1, 2]', "[40, 60]"]
)
def test_places_in_another_spelling_keep_the_frame(text: str) -> None:
    plain = row("Where?", text, picture_ref(sheet()))
    for epoch in range(10):
        changed = augmentation("natural")(plain, 0, epoch, 0)
        assert answer(changed) == text
        assert np.abs(np.subtract(found(opened(changed)[0]), BOX)).max() <= 2


def test_natural_moves_the_frame_both_ways_where_no_place_is_named() -> None:
    plain = row("What?", "A square.", picture_ref(sheet()))
    widths = []
    for epoch in range(40):
        left, _, right, _ = found(opened(augmentation("natural")(plain, 0, epoch, 0))[0])
        widths.append(right - left)
    assert 52 <= min(widths) < 57
    assert 62 < max(widths) <= 67


def test_none_is_the_row_itself() -> None:
    plain = row("What?", "A square.", picture_ref(sheet()))
    assert augmentation("none")(plain, 0, 1, 2) is plain


def test_a_picture_keeps_its_limits_and_its_refusals() -> None:
    small = PictureRef("small", None, picture_ref(sheet()).data, detail="low")
    changed = augmentation("ocr")(row("What?", "A square.", small), 0, 0, 0)
    [picture] = changed.pictures
    part = picture.open()
    assert isinstance(part, ImagePart)
    assert (part.min_pixels, part.max_pixels) == small.limits
