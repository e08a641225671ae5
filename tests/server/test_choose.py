"""Four places may name an adapter, and they must agree; never the base in silence."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from adapters.ref import BASE, AdapterRef
from server.choose import Chooser
from server.errors import WireError
from server.schemas import parse_chat
from tests.fakes import BASE_NAME, FakeRegistry, ref
from tests.support.wire import ask

FRENCH, JSON = ref("french"), ref("json")


def everything(name: str) -> bool:
    return True


def choose(
    fields: dict[str, object], header: str | None = None, may_use: Callable[[str], bool] = everything
) -> AdapterRef:
    names = FakeRegistry("french", "json", "org/nested")
    names.versions["french"].append(ref("french", 2))
    names.versions["french"].reverse()  # version 1 is current
    return Chooser(names, BASE_NAME, may_use).choose(parse_chat(ask(**fields)), header).ref


def refusal(
    fields: dict[str, object], header: str | None = None, may_use: Callable[[str], bool] = everything
) -> WireError:
    with pytest.raises(WireError) as caught:
        choose(fields, header, may_use)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ({}, BASE),
        ({"model": BASE_NAME}, BASE),
        ({"model": "base"}, BASE),
        ({"model": "french"}, FRENCH),
        ({"model": "french@2"}, ref("french", 2)),
        ({"model": "org/nested"}, ref("org/nested")),
        ({"model": f"{BASE_NAME}:french"}, FRENCH),
        ({"model": "base:french@2"}, ref("french", 2)),
        ({"model": f"{BASE_NAME}:base"}, BASE),
        ({"adapter": "french"}, FRENCH),
        ({"adapter": "french@1"}, FRENCH),
        ({"adapter": None}, BASE),
        ({"adapter": "base"}, BASE),
        ({"adapter": BASE_NAME}, BASE),
        ({"adapter": [{"name": "french", "weight": 1}]}, FRENCH),
        ({"adapter": [{"name": "french"}]}, FRENCH),
        ({"adapter": [{"name": "french", "weight": 0}]}, BASE),
        ({"adapter": [{"name": "french", "weight": 0}, {"name": "json", "weight": 1.0}]}, JSON),
        ({"lora_path": "french"}, FRENCH),
        ({"lora_path": None}, BASE),
        ({"adapter_id": "json"}, JSON),
        ({"lora": [{"id": 0, "scale": 1}]}, FRENCH),
        ({"lora": [{"id": 1, "scale": 1.0}, {"id": 0, "scale": 0}]}, JSON),
        ({"lora": [{"id": "json", "scale": 1}]}, JSON),
        ({"lora": [{"id": 0, "scale": 0.0}]}, BASE),
        ({"lora": []}, BASE),
        ({"model": BASE_NAME, "adapter": "french"}, FRENCH),
        ({"model": "french", "adapter": "french"}, FRENCH),
        ({"model": "french@1", "adapter": "french", "lora_path": "french"}, FRENCH),
    ],
)
def test_each_place_names_an_adapter(fields: dict[str, object], chosen: AdapterRef) -> None:
    assert choose(fields) == chosen


def test_the_header_names_one_too() -> None:
    assert choose({}, "french") == FRENCH
    assert choose({"model": BASE_NAME}, "french") == FRENCH
    assert choose({}, "base") == BASE
    assert choose({}, "") == BASE


@pytest.mark.parametrize(
    ("fields", "header", "param"),
    [
        ({"adapter": "french", "model": "json"}, None, "model"),
        ({"adapter": "french", "lora_path": "json"}, None, "lora_path"),
        ({"lora_path": "french", "adapter_id": "json"}, None, "adapter_id"),
        ({"adapter": "french@1", "model": "french@2"}, None, "model"),
        ({"adapter": None, "model": "french"}, None, "model"),
        ({"adapter": "base", "model": "french"}, None, "model"),
        ({"model": "french"}, "json", "X-Adapter"),
        ({"model": "french"}, "base", "X-Adapter"),
        ({"lora": [{"id": 0, "scale": 1}], "model": "json"}, None, "model"),
    ],
)
def test_two_that_differ_are_a_conflict(fields: dict[str, object], header: str | None, param: str) -> None:
    error = refusal(fields, header)
    assert (error.status, error.code, error.param) == (400, "adapter_conflict", param)


@pytest.mark.parametrize(
    ("fields", "header", "param"),
    [
        ({"model": "frenchy"}, None, "model"),
        ({"model": ""}, None, "model"),
        ({"model": "gpt-4o", "adapter": "french"}, None, "model"),
        ({"model": f"{BASE_NAME}:nope"}, None, "model"),
        ({"model": "french@9"}, None, "model"),
        ({"adapter": "nope"}, None, "adapter"),
        ({"adapter": [{"name": "nope", "weight": 0}]}, None, "adapter[0].name"),
        ({"lora_path": "nope"}, None, "lora_path"),
        ({"adapter_id": "nope"}, None, "adapter_id"),
        ({"lora": [{"id": 7, "scale": 1}]}, None, "lora[0].id"),
        ({"lora": [{"id": "nope", "scale": 0}]}, None, "lora[0].id"),
        ({}, "nope", "X-Adapter"),
    ],
)
def test_an_unknown_name_is_404_naming_the_field(
    fields: dict[str, object], header: str | None, param: str
) -> None:
    error = refusal(fields, header)
    assert (error.status, error.code, error.param) == (404, "model_not_found", param)


def test_near_names_are_suggested() -> None:
    assert "did you mean french?" in refusal({"model": "frenhc"}).message


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter": [{"name": "french", "weight": 0.5}]},
        {"adapter": [{"name": "french"}, {"name": "json"}]},
        {"adapter": [{"name": "french"}, {"name": "french"}]},
        {"lora": [{"id": 0, "scale": 0.5}]},
        {"lora": [{"id": 0, "scale": 1}, {"id": 1, "scale": 1}]},
        {"lora_path": "/etc/passwd"},
        {"lora_path": "./here"},
        {"adapter_id": "s3://bucket/x"},
        {"adapter_id": "hf://org/x"},
        {"adapter_id": "a/b/c"},
    ],
)
def test_compositions_paths_and_urls_are_unsupported(fields: dict[str, object]) -> None:
    error = refusal(fields)
    assert (error.status, error.code) == (400, "unsupported")


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter": 5},
        {"adapter": []},
        {"adapter": ""},
        {"lora": [{"id": 0}]},
        {"lora": [{"id": -1, "scale": 1}]},
    ],
)
def test_other_forms_are_refused(fields: dict[str, object]) -> None:
    error = refusal(fields)
    assert (error.status, error.code) == (400, "invalid_request")


def only_json(name: str) -> bool:
    return name == "json"


@pytest.mark.parametrize(
    "fields", [{"model": "french"}, {"adapter": "french@2"}, {"lora": [{"id": 0, "scale": 1}]}]
)
def test_a_foreign_adapter_does_not_exist(fields: dict[str, object]) -> None:
    error = refusal(fields, may_use=only_json)
    assert (error.status, error.code) == (404, "model_not_found")


def test_a_foreign_name_reads_like_an_unknown_one() -> None:
    foreign = refusal({"model": "french"}, may_use=only_json).message
    unknown = refusal({"model": "frenhc"}, may_use=only_json).message
    assert foreign.replace("french", "X") == unknown.replace("frenhc", "X")
    assert choose({"model": "json"}, may_use=only_json) == JSON


def test_the_base_is_everybodys() -> None:
    assert choose({"model": BASE_NAME}, may_use=lambda name: False) == BASE
    assert choose({"adapter": "base"}, may_use=lambda name: False) == BASE
