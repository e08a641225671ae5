"""The whole of it, as a user meets it: `lorikeet serve` in its own process, and openai-python unmodified."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from peft import LoraConfig
from PIL import Image

from base.pocket import CHECKPOINT
from tests.support.oracle import load_stock
from tests.support.packages import peft_adapter
from tests.support.scenes import scene
from tests.support.zoo import EVERYTHING, LANGUAGE

START_TIMEOUT_S = 110
BASE = "lorikeet-pocket"


class Server:
    """`lorikeet serve` on a free port."""

    def __init__(self, root: Path, *flags: str) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "lorikeet", "serve", "--port", str(self.port), *flags]
        command += ["--adapter-root", str(root / "adapters"), "--state-dir", str(root / "state")]
        self.log = (root / "serve.log").open("ab")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        self._await_ready()

    def _await_ready(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s and self.process.poll() is None:
            try:
                if httpx2.get(f"{self.url}/ready", timeout=2).status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"the server did not become ready: {Path(self.log.name).read_text()[-2000:]}")

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=100)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        self.log.close()
        return code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters, one of them with vision weights."""
    folder = tmp_path_factory.mktemp("e2e")
    model = load_stock(CHECKPOINT, quantized=False)
    for seed, (name, targets) in enumerate((("words", LANGUAGE), ("eyes", EVERYTHING))):
        config = LoraConfig(r=8, lora_alpha=32, target_modules=targets)
        peft_adapter(model, config, folder / "adapters" / name, seed).unload()
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    started = Server(root)
    yield started
    assert started.end() == 0


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.openai() as made:
        yield made


def data_url(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def question(text: str, *urls: str) -> list[Any]:
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def say(
    client: openai.OpenAI, model: str, *urls: str, text: str = "Describe the picture.", **more: Any
) -> str:
    options = {"max_tokens": 16, "temperature": 0, **more}
    reply: Any = client.chat.completions.create(model=model, messages=question(text, *urls), **options)
    return str(reply.choices[0].message.content)


PICTURE = data_url(scene("red", "circle"))


def test_models_are_listed_with_the_base_first_and_can_be_retrieved(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == [BASE, "eyes", "words"]
    assert client.models.retrieve("words").id == "words"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_one_picture_through_the_base_and_two_adapters_at_once(client: openai.OpenAI) -> None:
    names = [BASE, "words", "eyes"] * 4
    with ThreadPoolExecutor(len(names)) as pool:
        together = list(pool.map(lambda name: say(client, name, PICTURE), names))
    alone = [say(client, name, PICTURE) for name in names[:3]]
    assert together == alone * 4
    assert len(set(alone)) == 3


def test_every_way_to_name_an_adapter_gives_the_same_answer(client: openai.OpenAI) -> None:
    expected = say(client, "words", PICTURE)
    assert say(client, BASE, PICTURE, extra_body={"adapter": "words"}) == expected
    assert say(client, f"{BASE}:words", PICTURE) == expected
    assert say(client, BASE, PICTURE, extra_headers={"X-Adapter": "words"}) == expected
    assert say(client, BASE, PICTURE, extra_body={"adapter": "words@1"}) == expected


def test_a_stream_gives_the_same_text_and_ends_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="eyes",
        messages=question("Describe the picture.", PICTURE),
        max_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == say(
        client, "eyes", PICTURE
    )
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens > 16


def test_n_logprobs_seed_and_stop(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="words",
        messages=question("Tell me a story."),
        max_tokens=8,
        n=3,
        seed=7,
        temperature=2.0,
        logprobs=True,
        top_logprobs=2,
        extra_body={"ignore_eos": True},
    )
    assert len(reply.choices) == 3
    assert len({choice.message.content for choice in reply.choices}) > 1
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in logprobs.content)
    whole = say(client, BASE, PICTURE, max_tokens=12)
    cut = whole[len(whole) // 2 :][:2]
    assert say(client, BASE, PICTURE, max_tokens=12, stop=[cut]) == whole[: whole.index(cut)]


def test_bad_requests_raise_the_documented_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        say(client, "word")
    assert missing.value.code == "model_not_found"
    assert "words" in str(missing.value)
    for bad in ({"temperature": 9}, {"top_p": 1.5}, {"max_tokens": -1}, {"extra_body": {"no_such": 1}}):
        with pytest.raises(openai.BadRequestError):
            say(client, BASE, **bad)
    with pytest.raises(openai.BadRequestError) as broken:
        say(client, BASE, "data:image/png;base64,AAAA")
    assert broken.value.code == "invalid_image"
    with pytest.raises(openai.BadRequestError) as long:
        say(client, BASE, text="word " * 9000)
    assert long.value.code == "context_length_exceeded"


def photograph(kind: str) -> str:
    """A picture as cameras, printers and scanners leave it."""
    image = scene("red", "square", (300, 200))
    if kind == "exif-rotated jpeg":
        exif = Image.Exif()
        exif[0x0112] = 6  # stored on its side
        return data_url(image.rotate(90, expand=True), "JPEG", exif=exif, quality=95)
    if kind == "cmyk jpeg":
        return data_url(image.convert("CMYK"), "JPEG", quality=95)
    if kind == "16-bit png":
        return data_url(image.convert("L").convert("I;16"), "PNG")
    if kind == "palette png":
        return data_url(image.convert("P"), "PNG")
    if kind == "animated gif":
        return data_url(image, "GIF", save_all=True, append_images=[scene("blue", "circle", (300, 200))])
    return data_url(image.convert("RGBA"), "WEBP", lossless=True)


@pytest.mark.parametrize(
    "kind", ["exif-rotated jpeg", "cmyk jpeg", "16-bit png", "palette png", "animated gif", "rgba webp"]
)
def test_pictures_as_the_world_makes_them(client: openai.OpenAI, kind: str) -> None:
    assert say(client, "eyes", photograph(kind))


def test_an_answer_in_a_schema_is_in_the_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"shape": {"enum": ["circle", "square"]}, "count": {"enum": [1, 2, 3]}},
        "required": ["shape", "count"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    answer = say(client, BASE, PICTURE, response_format=form, max_tokens=400)
    assert set(json.loads(answer)) == {"shape", "count"}


def test_an_adapter_added_loaded_unloaded_and_deleted_on_the_running_server(
    server: Server, client: openai.OpenAI, root: Path
) -> None:
    source = str(root / "adapters" / "words")
    with httpx2.Client(base_url=server.url, timeout=60) as http:
        made = http.post("/v1/adapters", json={"name": "org/copy", "source": source})
        assert made.status_code == 201, made.text
        assert made.json()["tier"] == "device"
        assert say(client, "org/copy", PICTURE) == say(client, "words", PICTURE)
        unloaded = http.post("/v1/adapters/org%2Fcopy/unload")
        assert unloaded.status_code == 200, unloaded.text
        assert client.models.delete("org/copy").deleted
        with pytest.raises(openai.NotFoundError):
            say(client, "org/copy", PICTURE)
        outside = http.post("/v1/adapters", json={"name": "x", "source": "/etc"})
        assert outside.status_code == 400, outside.text
        assert "root:" not in outside.text


def test_metrics_tell_of_adapters_by_name(server: Server) -> None:
    text = httpx2.get(f"{server.url}/metrics", timeout=20).text
    assert 'lorikeet_requests_total{adapter="words"' in text
    assert "lorikeet_time_to_first_token_seconds_bucket" in text
    assert text.count("vllm:lora_requests_info{") == 1
    assert httpx2.head(f"{server.url}/metrics", timeout=20).status_code == 200


def test_after_kill_9_every_acknowledged_adapter_is_there(root: Path, tmp_path: Path) -> None:
    (tmp_path / "adapters").symlink_to(root / "adapters")
    first = Server(tmp_path)
    with httpx2.Client(base_url=first.url, timeout=60) as http:
        source = str((root / "adapters" / "words").resolve())
        assert http.post("/v1/adapters", json={"name": "kept", "source": source}).status_code == 201
        expected = say(first.openai(), "kept", PICTURE)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait(timeout=30)
    again = Server(tmp_path)
    try:
        assert say(again.openai(), "kept", PICTURE) == expected
    finally:
        assert again.end() == 0
