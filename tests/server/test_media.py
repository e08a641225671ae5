"""Pictures: every kind of the four formats comes out upright and RGB; everything else is refused clearly."""

from __future__ import annotations

import asyncio
import base64
import io
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from server.decode import decode, open_image, sniff
from server.errors import WireError
from server.fetch import Fetcher, FetchPolicy
from server.media import LOW_MAX_PIXELS, MediaLimits, MediaLoader, read_data_url

MAX_PIXELS = 1_000_000
RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes, wanted_pixels: int | None = None) -> Image.Image:
    return decode(open_image(data, MAX_PIXELS), wanted_pixels)


def refusal(data: bytes, max_pixels: int = MAX_PIXELS) -> WireError:
    with pytest.raises(WireError) as caught:
        decode(open_image(data, max_pixels))
    return caught.value


def png_header(width: int, height: int, depth: int = 8, kind: int = 2) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def quarters() -> Image.Image:
    """32 x 16: red, green above blue, white."""
    image = Image.new("RGB", (32, 16), WHITE)
    image.paste(RED, (0, 0, 16, 8))
    image.paste((0, 255, 0), (16, 0, 32, 8))
    image.paste((0, 0, 255), (0, 8, 16, 16))
    return image


def is_close(pixel: object, colour: tuple[int, int, int], by: int = 12) -> bool:
    assert isinstance(pixel, tuple)
    return all(abs(a - b) <= by for a, b in zip(pixel, colour, strict=True))


# ---- formats and modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_content_decides_the_format(kind: str) -> None:
    data = encoded(Image.new("RGB", (20, 10), RED), kind)
    assert sniff(data) == kind
    image = decoded(data)
    assert (image.mode, image.size) == ("RGB", (20, 10))
    assert is_close(image.getpixel((5, 5)), RED)


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "ICO", "PPM", "PDF"])
def test_other_formats_are_refused_whatever_pillow_can_do(kind: str) -> None:
    assert refusal(encoded(Image.new("RGB", (32, 32), RED), kind)).code == "invalid_image"


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"RIFF\0\0\0\0WAVE"]
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    assert refusal(data).code == "invalid_image"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_honoured(orientation: int, kind: str) -> None:
    upright = quarters()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    image = decoded(encoded(stored, kind, exif=exif, **options))
    assert image.size == upright.size
    for spot in ((4, 2), (26, 2), (4, 13), (26, 13)):
        wanted = upright.getpixel(spot)
        assert isinstance(wanted, tuple)
        assert is_close(image.getpixel(spot), (wanted[0], wanted[1], wanted[2]), 40), spot


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_leaves_the_picture_as_it_is() -> None:
    data = encoded(quarters(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decoded(data).size == (32, 16)


def test_cmyk_becomes_rgb() -> None:
    image = decoded(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert is_close(image.getpixel((4, 4)), RED)


@pytest.mark.parametrize("value", [0, 256, 32768, 65535])
def test_16_bit_grey_is_scaled_not_clipped(value: int) -> None:
    image = decoded(encoded(Image.new("I;16", (8, 8), value), "PNG"))
    assert is_close(image.getpixel((4, 4)), (round(value / 257),) * 3, by=1)


def test_16_bit_colour_is_scaled() -> None:
    row = b"\0" + struct.pack(">HHH", 65535, 32768, 0) * 4
    body = b"IDAT" + zlib.compress(row * 4)
    data = (
        png_header(4, 4, depth=16)
        + struct.pack(">I", len(body) - 4)
        + body
        + struct.pack(">I", zlib.crc32(body))
    )
    data += struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    assert is_close(decoded(data).getpixel((1, 1)), (255, 128, 0), by=1)


def test_alpha_is_laid_on_white() -> None:
    rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert is_close(decoded(encoded(rgba, "PNG")).getpixel((4, 4)), (255, 127, 127), by=1)
    assert decoded(encoded(Image.new("LA", (8, 8), (0, 0)), "PNG")).getpixel((4, 4)) == WHITE
    assert (
        decoded(encoded(Image.new("RGBA", (8, 8), (9, 9, 9, 0)), "WEBP", lossless=True)).getpixel((4, 4))
        == WHITE
    )


def test_palettes_with_and_without_transparency() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    assert decoded(encoded(palette, "PNG")).getpixel((4, 4)) == RED
    assert decoded(encoded(palette, "PNG", transparency=1)).getpixel((4, 4)) == WHITE
    assert decoded(encoded(palette, "GIF", transparency=1)).getpixel((4, 4)) == WHITE


def test_one_bit_and_grey() -> None:
    assert decoded(encoded(Image.new("1", (8, 8), 1), "PNG")).getpixel((4, 4)) == WHITE
    assert decoded(encoded(Image.new("L", (8, 8), 100), "JPEG")).getpixel((4, 4)) == (100, 100, 100)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 0, 255), (0, 255, 0))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    assert is_close(decoded(data).getpixel((4, 4)), RED)


# ---- damage and size -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("part", [0.05, 0.3, 0.9])
def test_a_picture_cut_short_is_refused(kind: str, part: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    assert refusal(data[: int(len(data) * part)]).code == "invalid_image"
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_random_damage_never_raises_anything_else() -> None:
    generator = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        data = encoded(quarters(), kind)
        for _ in range(60):
            damaged = bytearray(data)
            for place in generator.integers(0, len(data), 4):
                damaged[place] = int(generator.integers(0, 256))
            with suppress(WireError):
                decoded(bytes(damaged))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_pixels_are_capped_from_the_header(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (101, 100), RED), kind)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    error = refusal(data, max_pixels=10_000)
    assert (error.status, error.code) == (400, "image_too_large")
    assert "101 x 100" in error.message
    assert "10,000" in error.message


def test_a_bomb_is_refused_before_its_canvas_is_taken() -> None:
    some_data = struct.pack(">I", 100) + b"IDAT" + bytes(104)
    assert refusal(png_header(60_000, 60_000) + some_data).code == "image_too_large"
    assert refusal(png_header(70_000, 1) + some_data).code == "image_too_large"
    canvas = (16_382).to_bytes(3, "little") * 2
    webp = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas
    assert refusal(webp).code == "image_too_large"


def test_the_webp_header_is_read_as_pillow_reads_it() -> None:
    for options in ({"lossless": True}, {"quality": 50}, {"quality": 50, "exif": b"Exif\0\0"}):
        data = encoded(Image.new("RGB", (123, 45), RED), "WEBP", **options)
        assert open_image(data, MAX_PIXELS).num_pixels == 123 * 45
        assert refusal(data, max_pixels=123 * 45 - 1).code == "image_too_large"


def test_a_large_jpeg_is_decoded_at_a_fraction_and_still_looks_the_same() -> None:
    y, x = np.mgrid[0:800, 0:1200]
    smooth = np.stack([x % 256 * 0 + x / 1200 * 255, y / 800 * 255, (x + y) / 2000 * 255], axis=-1).astype(
        np.uint8
    )
    data = encoded(Image.fromarray(smooth), "JPEG", quality=95)
    whole, drafted = decoded(data), decoded(data, wanted_pixels=10_000)
    assert drafted.width < whole.width
    assert drafted.width * drafted.height >= 4 * 10_000
    small = [
        np.asarray(i.resize((120, 80), Image.Resampling.BICUBIC), dtype=np.float32) for i in (whole, drafted)
    ]
    assert float(np.abs(small[0] - small[1]).mean()) < 2.0
    assert decoded(data, wanted_pixels=900_000).size == whole.size


# ---- data: URLs and the loader ---------------------------------------------------------------------------------


def limits(**changes: int) -> MediaLimits:
    values = {
        "max_bytes": 100_000,
        "max_pixels": MAX_PIXELS,
        "request_images": 3,
        "request_bytes": 150_000,
        "request_pixels": 2_000_000,
        "original_max_pixels": 500_000,
        "default_max_pixels": 200_000,
    }
    return MediaLimits(**{**values, **changes})


@pytest.fixture
def loader() -> Iterator[MediaLoader]:
    loader = MediaLoader(limits(), Fetcher(FetchPolicy("off")))
    yield loader
    loader.close()


def data_url(data: bytes, label: str = "image/png") -> str:
    return f"data:{label};base64,{base64.b64encode(data).decode()}"


RED_PNG = encoded(Image.new("RGB", (20, 10), RED), "PNG")


def load(loader: MediaLoader, url: str, detail: str = "auto", **more: Any) -> Any:
    return asyncio.run(loader.load(url, detail, **more))


@pytest.mark.parametrize("label", ["image/png", "image/jpeg", "text/html", "", "image/svg+xml;charset=utf-8"])
def test_the_mime_label_is_not_looked_at(loader: MediaLoader, label: str) -> None:
    assert load(loader, data_url(RED_PNG, label)).image.getpixel((3, 3)) == RED


def test_base64_as_clients_write_it(loader: MediaLoader) -> None:
    text = base64.b64encode(RED_PNG).decode()
    lines = "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    for payload in (text, lines, text.rstrip("="), text.replace("+", "%2B").replace("/", "%2F")):
        assert read_data_url(f"data:image/png;base64,{payload}", 100_000) == RED_PNG
    assert read_data_url("DATA:image/png;BASE64," + text, 100_000) == RED_PNG
    percent = "".join(f"%{byte:02x}" for byte in RED_PNG)
    assert read_data_url(f"data:image/png,{percent}", 100_000) == RED_PNG


@pytest.mark.parametrize(
    "url", ["data:image/png;base64", "data:image/png;base64,@@@", "data:,", "data:;base64,"]
)
def test_bad_data_urls_are_invalid_images(loader: MediaLoader, url: str) -> None:
    with pytest.raises(WireError) as caught:
        load(loader, url)
    assert (caught.value.status, caught.value.code) == (400, "invalid_image")


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://x/y",
        "/etc/passwd",
        "",
        "https://example.com/a.png",
        "javascript:alert(1)",
    ],
)
def test_other_urls_are_rejected_where_fetching_is_off(loader: MediaLoader, url: str) -> None:
    with pytest.raises(WireError) as caught:
        load(loader, url)
    assert (caught.value.status, caught.value.code) == (400, "media_url_rejected")
    assert "passwd" not in caught.value.message


def test_bytes_are_capped(loader: MediaLoader) -> None:
    for url in (
        data_url(b"\x89PNG\r\n\x1a\n" + bytes(100_001)),
        "data:," + "a" * 100_001,
        "data:," + "a" * 400_000,
    ):
        with pytest.raises(WireError) as caught:
            load(loader, url)
        assert caught.value.code == "image_too_large"


def test_detail_sets_the_pixel_range(loader: MediaLoader) -> None:
    url = data_url(RED_PNG)
    ranges = {
        d: (p.min_pixels, p.max_pixels)
        for d in ("auto", "high", "low", "original")
        if (p := load(loader, url, d))
    }
    assert ranges["auto"] == ranges["high"] == (None, None)
    assert ranges["low"] == (4 * 784, LOW_MAX_PIXELS) == (3136, 50_176)
    assert ranges["original"] == (None, 500_000)
    with pytest.raises(WireError, match="detail is one of"):
        load(loader, url, "medium")


def test_low_detail_is_never_more_than_a_small_bases_own_most(loader: MediaLoader) -> None:
    small = MediaLoader(replace(loader.limits, default_max_pixels=17_000), loader._fetcher)
    assert load(small, data_url(RED_PNG), "low").max_pixels == 17_000
    small.close()


def test_a_request_has_one_budget_for_all_its_images() -> None:
    async def spend(loader: MediaLoader, urls: list[str]) -> None:
        budget = loader.budget()
        for url in urls:
            await loader.load(url, "auto", budget)

    noise = np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8)
    heavy = data_url(encoded(Image.fromarray(noise), "PNG"))
    wide = data_url(encoded(Image.new("1", (1000, 900)), "PNG"))
    fetcher = Fetcher(FetchPolicy("off"))
    for urls, code in (([data_url(RED_PNG)] * 4, "invalid_request"), ([heavy] * 3, "image_too_large")):
        loader = MediaLoader(limits(), fetcher)
        asyncio.run(spend(loader, urls[:-1]))
        with pytest.raises(WireError) as caught:
            asyncio.run(spend(loader, urls))
        assert caught.value.code == code
        loader.close()
    loader = MediaLoader(limits(), fetcher)
    asyncio.run(spend(loader, [wide] * 2))
    with pytest.raises(WireError) as caught:
        asyncio.run(spend(loader, [wide] * 3))
    assert caught.value.code == "image_too_large"
    loader.close()


def test_decoding_happens_in_a_small_pool_off_the_loop(
    loader: MediaLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()
    real = decode

    def watched(*arguments: Any) -> Image.Image:
        threads.add(threading.current_thread().name)
        return real(*arguments)

    monkeypatch.setattr("server.media.decode", watched)

    async def many() -> None:
        await asyncio.gather(*(loader.load(data_url(RED_PNG)) for _ in range(20)))

    asyncio.run(many())
    assert threads
    assert len(threads) <= 2
    assert all(name.startswith("lorikeet-decode") for name in threads)


def test_real_pictures_of_the_repository_load(loader: MediaLoader) -> None:
    folder = Path(__file__).resolve().parents[2] / "base" / "pocket" / "pictures"
    for path in sorted(folder.glob("*.*")):
        assert load(loader, data_url(path.read_bytes())).image.mode == "RGB"
