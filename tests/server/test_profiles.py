"""Profiles over the wire: what an adapter is served with where a request says nothing, and only there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from engine.request import GenerationRequest
from server.keys import Caller, Key, KeyRing, hash_key
from tests.fakes import say
from tests.support.surface import Surface, client_of, make_surface

TURN = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
FULL: dict[str, object] = {
    "system_prompt": "Be brief.",
    "temperature": 0.25,
    "top_p": 0.5,
    "top_k": 7,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.5,
    "stop": ["END"],
    "max_tokens": 9,
    "response_format": {"type": "json_object"},
    "min_pixels": 3136,
    "max_pixels": 50176,
}


@pytest.fixture
def surface(tmp_path: Path) -> Surface:
    surface = make_surface(tmp_path)
    for seed in range(3):
        surface.package(f"p{seed}", seed=seed)
    return surface


@pytest.fixture
def client(surface: Surface) -> Iterator[httpx2.Client]:
    with client_of(surface) as client:
        add(client, "a", "p0")
        yield client


def add(client: httpx2.Client, name: str, source: str, **more: Any) -> dict[str, Any]:
    reply = client.post("/v1/adapters", json={"name": name, "source": source, **more})
    assert reply.status_code in (200, 201), reply.text
    return dict(reply.json())


def patch(client: httpx2.Client, name: str, profile: object) -> httpx2.Response:
    return client.patch(f"/v1/adapters/{name}", json={"profile": profile})


def asked(surface: Surface, client: httpx2.Client, **body: Any) -> GenerationRequest:
    """What the engine got for a chat."""
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    fields = {"model": "a", **({} if "prompt" in body else {"messages": TURN}), **body}
    before = len(surface.engine.requests)
    reply = client.post(path, json=fields)
    assert reply.status_code == 200, reply.text
    return surface.engine.requests[before]


def text_of(request: GenerationRequest) -> str:
    return bytes(id for id in request.prompt.ids if id < 256).decode()


def test_a_request_that_says_nothing_gets_all_of_the_profile(surface: Surface, client: httpx2.Client) -> None:
    assert patch(client, "a", FULL).status_code == 200
    request = asked(surface, client)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.25, 0.5, 7, 0.125)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (
        1.5,
        -0.5,
        0.5,
    )
    assert (sampling.stop, sampling.max_tokens) == (("END",), 9)
    assert sampling.grammar is not None and sampling.grammar.kind == "json_object"
    assert "Be brief." in text_of(request)
    completion = asked(surface, client, prompt="once")
    assert (completion.sampling.temperature, completion.sampling.max_tokens) == (0.25, 9)
    assert "Be brief." not in text_of(completion)


OWN: list[tuple[str, object]] = [
    ("temperature", 1.0),
    ("top_p", 1.0),
    ("top_k", 0),
    ("min_p", 0.0),
    ("repetition_penalty", 1.0),
    ("presence_penalty", 0.0),
    ("frequency_penalty", 0.0),
    ("stop", []),
    ("max_tokens", 100),
    ("max_completion_tokens", 100),
    ("response_format", {"type": "text"}),
]


def test_a_request_s_own_field_wins_also_when_it_is_the_usual_value(
    surface: Surface, client: httpx2.Client
) -> None:
    for field, value in OWN:
        patch(client, "a", None)
        plain = asked(surface, client, **{field: value}).sampling
        patch(client, "a", {key: FULL[key] for key in FULL if key == field.replace("_completion", "")})
        assert asked(surface, client, **{field: value}).sampling == plain, field
        assert asked(surface, client).sampling != plain, field


def test_a_request_s_own_system_message_wins(surface: Surface, client: httpx2.Client) -> None:
    patch(client, "a", {"system_prompt": "Be brief."})
    for role in ("system", "developer"):
        own = [{"role": role, "content": "Be long."}, *TURN]
        text = text_of(asked(surface, client, messages=own))
        assert "Be long." in text and "Be brief." not in text


def test_the_base_and_composed_adapters_have_no_profile(surface: Surface, client: httpx2.Client) -> None:
    add(client, "b", "p1")
    for name in "ab":
        patch(client, name, {"temperature": 0.25})
    both = [{"name": "a", "weight": 0.5}, {"name": "b", "weight": 0.5}]
    assert asked(surface, client, model=None, adapter=both).sampling.temperature == 1.0
    assert asked(surface, client, model="base").sampling.temperature == 1.0
    half = [{"name": "a", "weight": 0.5}]
    assert asked(surface, client, model=None, adapter=half).sampling.temperature == 0.25


def test_adapters_that_answer_side_by_side_each_have_their_own(
    surface: Surface, client: httpx2.Client
) -> None:
    add(client, "b", "p1")
    patch(client, "a", {"temperature": 0.25, "system_prompt": "Be brief."})
    client.post("/v1/chat/completions", json={"messages": TURN, "adapters": ["a", "b", "base"], "n": 2})
    last = surface.engine.requests[-6:]
    assert [request.sampling.temperature for request in last] == [0.25, 0.25, 1.0, 1.0, 1.0, 1.0]
    assert ["Be brief." in text_of(request) for request in last] == [True] * 2 + [False] * 4
    assert last[0].prompt is last[1].prompt and last[2].prompt is last[5].prompt


def test_a_profile_s_length_gives_way_to_the_context_and_to_min_tokens(
    surface: Surface, client: httpx2.Client
) -> None:
    patch(client, "a", {"max_tokens": 100_000})
    request = asked(surface, client)
    assert request.sampling.max_tokens == surface.state.max_model_len - len(request.prompt.ids)
    patch(client, "a", {"max_tokens": 2})
    assert asked(surface, client, min_tokens=5).sampling.max_tokens == 5


def test_tools_put_a_profile_s_response_format_aside(surface: Surface, client: httpx2.Client) -> None:
    patch(client, "a", {"response_format": {"type": "json_object"}})
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    grammar = asked(surface, client, tools=tools).sampling.grammar
    assert grammar is None or grammar.kind != "json_object"


def test_counting_tokens_counts_the_profile_s_system_prompt(client: httpx2.Client) -> None:
    def count(**body: Any) -> int:
        return int(client.post("/tokenize", json={"model": "a", "messages": TURN, **body}).json()["count"])

    without = count()
    patch(client, "a", {"system_prompt": "Be brief."})
    assert count() >= without + len("Be brief.")
    own = [{"role": "system", "content": "x"}, *TURN]
    with_own = count(messages=own)
    patch(client, "a", None)
    assert count(messages=own) == with_own


# ---- setting it


def test_what_is_set_is_shown_with_where_it_comes_from_and_null_takes_it_back(client: httpx2.Client) -> None:
    patch(client, "a", {"temperature": 0.25, "top_k": 7})
    record = patch(client, "a@1", {"temperature": 0.5}).json()
    assert record["profile"] == {"temperature": 0.5, "top_k": 7}
    assert record["profile_from"] == {"temperature": "version", "top_k": "adapter"}
    shown = client.get("/v1/adapters/a").json()["effective"]
    assert shown["temperature"] == {"value": 0.5, "from": "version"}
    assert shown["top_p"] == {"value": 1.0, "from": "default"}
    assert shown["system_prompt"] == {"value": None, "from": "default"}
    assert patch(client, "a@1", {"temperature": None}).json()["profile"] == {"temperature": 0.25, "top_k": 7}
    assert patch(client, "a", None).json()["profile"] is None


def test_a_name_s_profile_outlives_a_promotion_and_a_version_s_does_not(
    surface: Surface, client: httpx2.Client
) -> None:
    patch(client, "a", {"temperature": 0.25})
    patch(client, "a@1", {"top_k": 7})
    add(client, "a", "p1")
    sampling = asked(surface, client).sampling
    assert (sampling.temperature, sampling.top_k) == (0.25, 0)
    assert asked(surface, client, model="a@1").sampling.top_k == 7


def test_an_adapter_is_registered_with_a_profile(surface: Surface, client: httpx2.Client) -> None:
    record = add(client, "b", "p1", profile={"temperature": 0.25})
    assert record["profile_from"] == {"temperature": "version"}
    assert asked(surface, client, model="b").sampling.temperature == 0.25
    refused = client.post("/v1/adapters", json={"name": "c", "source": "p2", "profile": {"temperature": 3}})
    assert refused.json()["error"]["param"] == "profile.temperature"
    assert client.get("/v1/adapters/c").status_code == 404


BAD: list[tuple[object, str]] = [
    ({"temperature": 2.5}, "profile.temperature"),
    ({"temperature": True}, "profile.temperature"),
    ({"temperature": "0.5"}, "profile.temperature"),
    ({"top_p": -0.1}, "profile.top_p"),
    ({"top_k": -2}, "profile.top_k"),
    ({"min_p": 1.5}, "profile.min_p"),
    ({"repetition_penalty": 0}, "profile.repetition_penalty"),
    ({"presence_penalty": 3}, "profile.presence_penalty"),
    ({"frequency_penalty": -3}, "profile.frequency_penalty"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "profile.stop"),
    ({"stop": ""}, "profile.stop"),
    ({"max_tokens": 0}, "profile.max_tokens"),
    ({"response_format": {"type": "json_schema"}}, "profile.response_format.json_schema"),
    ({"response_format": {"type": "xml"}}, "profile.response_format.type"),
    ({"system_prompt": 3}, "profile.system_prompt"),
    ({"system_prompt": ""}, "profile.system_prompt"),
    ({"min_pixels": 0}, "profile.min_pixels"),
    ({"max_pixels": 1.5}, "profile.max_pixels"),
    ({"max_pixels": 1 << 27}, "profile.max_pixels"),
    ({"min_pixels": 200, "max_pixels": 100}, "profile.min_pixels"),
    ({"messages": []}, "profile.messages"),
    ({"seed": 1}, "profile.seed"),
    ({"nonsense": None}, "profile.nonsense"),
    ([], "profile"),
]


def test_what_a_request_could_not_say_a_profile_cannot_either(client: httpx2.Client) -> None:
    for profile, param in BAD:
        reply = patch(client, "a", profile)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), profile
    assert client.get("/v1/adapters/a").json()["profile"] is None


def test_fields_that_do_not_fit_what_is_beneath_are_refused(client: httpx2.Client) -> None:
    patch(client, "a", {"max_pixels": 10_000})
    assert patch(client, "a@1", {"min_pixels": 20_000}).status_code == 400


def test_nothing_else_of_an_adapter_can_be_patched(client: httpx2.Client) -> None:
    for body in ({}, {"rank": 8}, {"profile": {}, "rank": 8}):
        assert client.patch("/v1/adapters/a", json=body).status_code == 400
    assert patch(client, "none", {}).status_code == 404


def test_a_key_changes_the_profiles_of_its_own_adapters_only(tmp_path: Path) -> None:
    caller = Caller("x", frozenset({"admin", "infer"}), ("mine*",))
    surface = make_surface(tmp_path, KeyRing([Key(hash_key("secret-of-x"), caller)]))
    surface.register("other")
    surface.register("mine")
    with client_of(surface, authorization="Bearer secret-of-x") as client:
        assert patch(client, "other", {"top_k": 1}).status_code == 404
        assert patch(client, "mine", {"top_k": 1}).status_code == 200


def test_a_package_brings_defaults_and_a_bad_one_is_refused(surface: Surface, client: httpx2.Client) -> None:
    for name, temperature in (("p1", 0.25), ("p2", 9)):
        document = {"profile": {"rank": 4, "temperature": temperature, "later_release": 1}}
        (surface.root / name / "lorikeet.json").write_text(json.dumps(document))
    assert add(client, "b", "p1")["profile_from"] == {"temperature": "package"}
    assert asked(surface, client, model="b").sampling.temperature == 0.25
    patch(client, "b", {"temperature": 0.5})
    assert patch(client, "b", {"temperature": None}).json()["profile"] == {"temperature": 0.25}
    reply = client.post("/v1/adapters", json={"name": "c", "source": "p2"})
    assert (reply.status_code, reply.json()["error"]["reason"]) == (422, "bad_config")


def test_pixels_of_a_profile_are_for_pictures_that_ask_for_none(tmp_path: Path) -> None:
    from tests.support.wire import PIXEL, Wire

    wire = Wire()
    from adapters.profile_layers import Layers

    wire.engine.script = say("ok")
    wire.registry.conduct.layers["json"] = Layers(version={"min_pixels": 3136, "max_pixels": 50176})
    picture = {"type": "image_url", "image_url": {"url": PIXEL}}
    with wire.serving():
        reply = wire.post(
            "/v1/chat/completions",
            {"model": "json", "messages": [{"role": "user", "content": [picture]}]},
        )
    assert reply.status_code == 200, reply.text
    assert wire.media.usual == (3136, 50176)
