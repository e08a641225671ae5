"""Pictures become the patches that stock transformers makes, within the limits, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from base.errors import InvalidImage
from base.images import ImagePreparer
from base.prompt import ImagePart
from tests.support.pictures import picture

SIZES = [(100, 70), (28, 28), (1, 1), (3, 100), (100, 3), (400, 2), (2000, 1500), (57, 83), (1, 200)]


@pytest.mark.parametrize("width, height", SIZES)
def test_patches_equal_stock_transformers(tiny_folder: Path, width: int, height: int) -> None:
    image = picture(1, width, height)
    prepared = ImagePreparer(tiny_folder).prepare(ImagePart(image))
    stock = Qwen2VLImageProcessorPil.from_pretrained(tiny_folder)(images=[image], return_tensors="pt")
    assert torch.equal(prepared.pixels, stock["pixel_values"])
    assert list(prepared.grid) == stock["image_grid_thw"][0].tolist()
    assert prepared.num_tokens == prepared.grid[1] * prepared.grid[2] // 4


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("limits", [(None, None), (None, 28 * 28), (9 * 28 * 28, None)])
def test_a_size_is_known_before_the_picture_is_prepared(
    tiny_folder: Path, width: int, height: int, limits: tuple[int | None, int | None]
) -> None:
    preparer = ImagePreparer(tiny_folder)
    grid = preparer.prepare(ImagePart(picture(1, width, height), *limits)).grid
    assert preparer.resized(width, height, *limits) == (grid[2] * 14, grid[1] * 14)


def test_limits_come_from_the_checkpoint_the_server_and_the_image_in_turn(tiny_folder: Path) -> None:
    large = picture(1, 1000, 1000)
    preparer = ImagePreparer(tiny_folder)
    assert (preparer.min_pixels, preparer.max_pixels, preparer.factor) == (4 * 28 * 28, 16 * 28 * 28, 28)
    assert preparer.prepare(ImagePart(large)).num_tokens == 16
    assert ImagePreparer(tiny_folder, max_pixels=9 * 28 * 28).prepare(ImagePart(large)).num_tokens == 9
    assert preparer.prepare(ImagePart(large, max_pixels=28 * 28)).num_tokens == 1
    assert preparer.prepare(ImagePart(large, max_pixels=100 * 28 * 28)).num_tokens == 100
    small = picture(1, 28, 28)
    assert preparer.prepare(ImagePart(small)).num_tokens == 4
    assert preparer.prepare(ImagePart(small, min_pixels=9 * 28 * 28)).num_tokens == 9
    assert ImagePreparer(tiny_folder, min_pixels=28 * 28).prepare(ImagePart(small)).num_tokens == 1


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_mode_is_shown_as_rgb(tiny_folder: Path, mode: str) -> None:
    image = Image.new("RGB", (60, 60), (255, 255, 255)).convert(mode)
    prepared = ImagePreparer(tiny_folder).prepare(ImagePart(image))
    white = ImagePreparer(tiny_folder).prepare(ImagePart(Image.new("RGB", (60, 60), (255, 255, 255))))
    assert prepared.digest == white.digest


@pytest.mark.parametrize("size", [(201, 1), (1, 300), (0, 5)])
def test_extreme_shapes_are_refused(tiny_folder: Path, size: tuple[int, int]) -> None:
    with pytest.raises(InvalidImage):
        ImagePreparer(tiny_folder).prepare(ImagePart(Image.new("RGB", size)))


def test_the_digest_names_content_and_grid(tiny_folder: Path) -> None:
    preparer = ImagePreparer(tiny_folder)
    digests = {
        preparer.prepare(ImagePart(image)).digest
        for image in (picture(1, 80, 80), picture(2, 80, 80), picture(1, 80, 140), picture(1, 80, 80))
    }
    assert len(digests) == 3
    wide, tall = (
        preparer.prepare(ImagePart(Image.new("RGB", size, "red"))) for size in ((112, 56), (56, 112))
    )
    assert torch.equal(wide.pixels, tall.pixels)
    assert wide.digest != tall.digest
