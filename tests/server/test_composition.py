"""Composing and fanning out over HTTP, with a real engine over the embedded base behind it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from adapters.composition import compose
from adapters.ref import COMPOSED
from base.pocket import CHECKPOINT
from engine.observer import (
    AdapterLookup,
    AdapterMoved,
    FirstToken,
    ImagesEncoded,
    SequenceEnded,
    SequenceStarted,
)
from server.gauges import EngineFacts, StatusCollector
from server.metrics import Metrics
from tests.fakes import FakeEngineClient, ref
from tests.support.live_server import live_server
from tests.support.scenes import scene
from tests.support.serving import Rig
from tests.support.zoo import make_zoo

CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Live:
    url: str
    rig: Rig
    packages: dict[str, Path]

    def post(self, path: str, body: object) -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, timeout=60)

    def chat(self, image: Image.Image | None = None, **fields: object) -> dict[str, Any]:
        response = self.post(CHAT, asked(image, **fields))
        assert response.status_code == 200, response.text
        return dict(response.json())

    def text(self, image: Image.Image | None = None, **fields: object) -> str:
        return str(self.chat(image, **fields)["choices"][0]["message"]["content"])

    def loaded(self) -> set[str]:
        status = self.rig.engine.status()
        return {str(slot.ref) for slot in status.slots if slot.ref} | set(map(str, status.host_refs))

    def num_encoded(self) -> int:
        events = self.rig.recorder.events
        return sum(event.num_images for event in events if isinstance(event, ImagesEncoded))


def asked(image: Image.Image | None, **fields: object) -> dict[str, object]:
    parts: list[object] = [{"type": "text", "text": "Describe the picture."}]
    if image is not None:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    options = {"max_tokens": 10, "temperature": 0, "ignore_eos": True, **fields}
    return {"messages": [{"role": "user", "content": parts}], **options}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    packages = make_zoo(CHECKPOINT, folder / "zoo", {"rank4", "rslora", "vision", "dora"})
    with live_server(CHECKPOINT, folder) as (url, rig):
        rig.register(packages)
        yield Live(url, rig, packages)


def part(name: str, weight: float) -> dict[str, object]:
    return {"name": name, "weight": weight}


def test_a_composition_answers_unlike_its_parts_and_the_header_names_it(live: Live) -> None:
    both = [part("rank4", 0.7), part("rslora", -0.9)]
    response = live.post(CHAT, asked(None, adapter=both))
    assert response.headers["x-adapter"] == "rank4@1*0.7+rslora@1*-0.9"
    text = response.json()["choices"][0]["message"]["content"]
    assert text not in {live.text(adapter=name) for name in ("rank4", "rslora", "base")}
    entries = live.post(
        "/v1/chat/completions", asked(None, lora=[{"id": 2, "scale": -0.9}, {"id": 1, "scale": 0.7}])
    )
    assert entries.json()["choices"][0]["message"]["content"] == text


def test_weight_0_is_the_base_and_an_alias_is_what_it_means(live: Live) -> None:
    assert live.text(adapter=[part("rank4", 0), part("vision", 0)]) == live.text(adapter="base")
    assert (
        live.post("/v1/chat/completions", asked(None, adapter=[part("rank4", 0)])).headers["x-adapter"]
        == "base"
    )
    assert (
        httpx2.put(f"{live.url}/v1/aliases/prod", json={"target": "rank4@1", "load": False}).status_code
        == 201
    )
    assert live.text(adapter=[part("prod", 0.5)]) == live.text(adapter=[part("rank4@1", 0.5)])


def test_dora_can_be_neither_scaled_nor_composed(live: Live) -> None:
    for parts in ([part("dora", 0.5)], [part("dora", 1), part("rank4", 1)]):
        response = live.post(CHAT, asked(None, adapter=parts))
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "unsupported", "adapter")
        assert "dora@1" in error["message"]
    assert live.text(adapter=[part("dora", 1), part("rank4", 0)]) == live.text(adapter="dora")


def test_listings_know_nothing_of_compositions(live: Live) -> None:
    live.text(adapter=[part("rank4", 0.2), part("rslora", 0.2)])
    assert "rank4@1*0.2+rslora@1*0.2" in live.loaded()
    for path in ("/v1/adapters", "/v1/models", "/lora-adapters", "/metrics"):
        assert "*0.2" not in httpx2.get(live.url + path).text
    loaded = live.post("/load_lora_adapter", {"lora_name": "rank4", "lora_path": "nowhere"}).json()
    assert not [name for name in loaded["loaded_adapters"] if "composed" in name or "*" in name]


@pytest.mark.parametrize("path", ["/v1/adapters/rank4/unload", "/v1/adapters/rank4@1/unload"])
def test_unloading_a_part_frees_the_compositions_that_hold_it(live: Live, path: str) -> None:
    live.text(adapter=[part("rank4", 0.3), part("rslora", 0.3)])
    live.text(adapter=[part("rslora", 0.3)])
    live.text(adapter="rslora")
    freed = live.post(path, {})
    assert freed.status_code == 200, freed.text
    assert not [name for name in live.loaded() if "rank4" in name]
    assert {"rslora@1*0.3", "rslora@1"} <= live.loaded()


def test_removing_a_part_frees_the_compositions_that_hold_it(live: Live) -> None:
    live.rig.registry.register("brief", live.packages["rank4"])
    live.text(adapter=[part("brief", 0.5), part("rslora", 0.5)])
    assert httpx2.delete(f"{live.url}/v1/adapters/brief").status_code == 200
    assert live.post(CHAT, asked(None, adapter=[part("brief", 0.5)])).status_code == 404
    # freed behind the reply: the next load comes after it on the engine's inbox, or one soon after does
    for _ in range(50):
        live.text(adapter="base", max_tokens=1)
        if not [name for name in live.loaded() if "brief" in name]:
            return
    raise AssertionError(live.loaded())


def test_compositions_share_one_label_whatever_their_weights() -> None:
    metrics = Metrics("fake")
    refs = [compose([(ref("french"), 0.01 * i), (ref("json"), 1.0)]) for i in range(1, 100)]
    for each in refs:
        metrics.record(AdapterLookup(each, was_on_device=False))
        metrics.record(SequenceStarted(each, 0.1, 0.1))
        metrics.record(FirstToken(each, 0.1, 7))
        metrics.record(SequenceEnded(each, "stop", 0.2, 1))
        metrics.forget(each)
    page = metrics.render().decode()
    assert set(re.findall(r'adapter="([^"]*)"', page)) == {COMPOSED}
    assert f'lorikeet_prompt_tokens_total{{adapter="{COMPOSED}"}} 693.0' in page


def test_gateways_are_told_of_no_composition() -> None:
    labels = Metrics("fake").labels
    counts = {"french": 1, COMPOSED: 3, "base": 2}
    status = replace(FakeEngineClient().status(), running=counts, waiting=counts)
    collector = StatusCollector(EngineFacts("fake", 8, 16), labels, lambda: status, lambda: True)
    families = {family.name: family.samples for family in collector.collect()}
    (sample,) = families["vllm:lora_requests_info"]
    assert (sample.labels["running_lora_adapters"], sample.labels["waiting_lora_adapters"]) == (
        "french",
        "french",
    )
    running = {each.labels["adapter"]: each.value for each in families["lorikeet_requests_running"]}
    assert running == {"base": 2, "other": 1, COMPOSED: 3}


# ---- fan-out


def test_each_of_adapters_answers_as_it_does_alone(live: Live) -> None:
    picture = scene("green", "circle")
    names: list[object] = ["rank4", "vision", "base", [part("rslora", 0.6), part("vision", 0.5)]]
    choices = live.chat(picture, adapters=names)["choices"]
    assert [choice["adapter"] for choice in choices] == [
        "rank4@1",
        "vision@1",
        "base",
        "rslora@1*0.6+vision@1*0.5",
    ]
    alone = [live.text(picture, adapter=name) for name in names]
    assert [choice["message"]["content"] for choice in choices] == alone
    assert len(set(alone)) >= 3


def test_the_picture_is_encoded_once_for_all_without_vision_weights(live: Live) -> None:
    before = live.num_encoded()
    live.chat(scene("blue", "circle", (113, 140)), adapters=["rank4", "rslora", "base", [part("rank4", 0.4)]])
    assert live.num_encoded() - before == 1
    live.chat(
        scene("blue", "circle", (140, 113)), adapters=["rank4", "vision", "base", [part("vision", 0.4)]]
    )
    assert live.num_encoded() - before == 1 + 3


def test_many_compositions_at_once_beside_their_parts_answer_as_alone(live: Live) -> None:
    """More than there are slots."""
    asks: list[object] = [
        "rank4",
        "rslora",
        *([part("rank4", 0.1 * i), part("rslora", 1)] for i in range(-3, 5)),
    ]
    with ThreadPoolExecutor(len(asks)) as pool:
        together = list(pool.map(lambda adapter: live.text(adapter=adapter, max_tokens=6), asks))
    assert together == [live.text(adapter=adapter, max_tokens=6) for adapter in asks]
    assert len(set(together)) >= 4


def test_a_composition_is_loaded_once_for_all_who_ask(live: Live) -> None:
    fresh = [part("rank4", 0.123), part("rslora", 0.321)]
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: live.text(adapter=fresh), range(4)))) == 1
    moved = [str(event.ref) for event in live.rig.recorder.events if isinstance(event, AdapterMoved)]
    assert moved.count("rank4@1*0.123+rslora@1*0.321") == 1
