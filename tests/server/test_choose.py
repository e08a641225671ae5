"""Four places may name an adapter, and they must agree; never the base in silence."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from adapters.ref import BASE, AdapterRef
from server.choose import Chooser
from server.errors import WireError
from server.schemas import parse_chat
from tests.fakes import BASE_NAME, FakeRegistry, ref
from tests.support.fake_registry import FakeReport
from tests.support.wire import ask

FRENCH, JSON = ref("french"), ref("json")


def everything(name: str) -> bool:
    return True


def choose(
    fields: dict[str, object], header: str | None = None, may_use: Callable[[str], bool] = everything
) -> AdapterRef:
    (chosen,) = choices(fields, header, may_use)
    return chosen


def choices(
    fields: dict[str, object], header: str | None = None, may_use: Callable[[str], bool] = everything
) -> tuple[AdapterRef, ...]:
    names = FakeRegistry("french", "json", "org/nested", "dora", "wide")
    names.versions["french"].append(ref("french", 2))
    names.versions["french"].reverse()  # version 1 is current
    names.reports["dora"] = FakeReport(kind="dora")
    names.reports["wide"] = FakeReport(rank=64)
    chooser = Chooser(names, BASE_NAME, may_use, max_rank=40)
    return chooser.choose(parse_chat(ask(**fields)), header).refs


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
        {"lora_path": "/etc/passwd"},
        {"lora_path": "./here"},
        {"adapter_id": "s3://bucket/x"},
        {"adapter_id": "hf://org/x"},
        {"adapter_id": "a/b/c"},
    ],
)
def test_paths_and_urls_are_unsupported(fields: dict[str, object]) -> None:
    error = refusal(fields)
    assert (error.status, error.code) == (400, "unsupported")


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter": 5},
        {"adapter": []},
        {"adapter": [{"name": "french", "weight": 101}]},
        {"adapter": [{"name": "french", "weight": "1"}]},
        {"adapter": [{"name": "french"}] * 17},
        {"adapters": []},
        {"adapters": "french"},
        {"adapters": [None]},
        {"adapters": [5]},
        {"adapters": [[]]},
        {"adapters": ["base"] * 17},
        {"adapters": ["base"] * 3, "n": 6},
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


# ---- composing: several as one


def composed(**weights: float) -> dict[str, object]:
    return {"adapter": [{"name": name, "weight": weight} for name, weight in weights.items()]}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (composed(french=0.5), "french@1*0.5"),
        (composed(french=-1), "french@1*-1"),
        (composed(french=0.7, json=0.3), "french@1*0.7+json@1*0.3"),
        (composed(json=0.3, french=0.7), "french@1*0.7+json@1*0.3"),
        (composed(french=0.7, json=0.3, base=5), "french@1*0.7+json@1*0.3"),
        (
            {"adapter": [{"name": "french@1", "weight": 0.5}, {"name": "french@2", "weight": 2}]},
            "french@1*0.5+french@2*2",
        ),
        ({"adapter": [{"name": "french"}, {"name": "french@1"}]}, "french@1*2"),
        ({"lora": [{"id": 1, "scale": 0.5}, {"id": "french", "scale": 1}]}, "french@1*1+json@1*0.5"),
    ],
)
def test_a_list_composes(fields: dict[str, object], name: str) -> None:
    assert str(choose(fields)) == name


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        (composed(french=1, json=0), FRENCH),
        (composed(dora=1, json=0), ref("dora")),
        (composed(french=0, json=-0.0), BASE),
        (composed(base=3), BASE),
        ({"adapter": [{"name": "french", "weight": 0.5}, {"name": "french", "weight": 0.5}]}, FRENCH),
        ({"adapter": [{"name": "french", "weight": 0.5}, {"name": "french", "weight": -0.5}]}, BASE),
    ],
)
def test_a_list_that_comes_to_one_or_none_is_that_one_or_the_base(
    fields: dict[str, object], chosen: AdapterRef
) -> None:
    assert choose(fields) == chosen


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        (composed(dora=0.5), "dora@1 uses DoRA"),
        (composed(dora=1, french=1), "dora@1 uses DoRA"),
        (
            composed(wide=1, json=1, french=1, **{"org/nested": 1}),
            "come to 88 at q_proj; this server allows 80",
        ),
    ],
)
def test_what_cannot_be_composed_is_unsupported(fields: dict[str, object], part: str) -> None:
    error = refusal(fields)
    assert (error.status, error.code, error.param) == (400, "unsupported", "adapter")
    assert part in error.message


def test_ranks_may_come_to_twice_what_one_adapter_may_have() -> None:
    assert choose(composed(wide=1, json=1, french=1)).is_composed


def test_one_list_and_another_conflict_unless_they_mean_the_same() -> None:
    fields = composed(french=0.5, json=2)
    lora = [{"id": "json", "scale": 2}, {"id": 0, "scale": 0.5}]
    assert choose(fields | {"lora": lora}) == choose(fields)
    assert refusal(fields | {"lora": lora[:1]}).code == "adapter_conflict"
    assert refusal(fields | {"model": "french"}).code == "adapter_conflict"
    assert refusal(fields, "french").code == "adapter_conflict"


def test_a_foreign_part_does_not_exist() -> None:
    error = refusal(composed(json=1, french=0.5), may_use=only_json)
    assert (error.status, error.param) == (404, "adapter[1].name")


# ---- fan-out: several, each for itself


def test_adapters_answer_in_the_order_of_naming_and_may_repeat() -> None:
    asked: list[object] = ["json", "base", "french@2", "json", [{"name": "french", "weight": 0.5}]]
    chosen = choices({"adapters": asked, "model": BASE_NAME})
    assert list(map(str, chosen)) == ["json@1", "base", "french@2", "json@1", "french@1*0.5"]


@pytest.mark.parametrize(
    ("fields", "header"),
    [
        ({"adapter": "french"}, None),
        ({"adapter": None}, None),
        ({"model": "french"}, None),
        ({"lora_path": "french"}, None),
        ({"adapter_id": "json"}, None),
        ({"lora": []}, None),
        ({}, "french"),
    ],
)
def test_adapters_and_any_other_place_conflict(fields: dict[str, object], header: str | None) -> None:
    error = refusal({"adapters": ["french"], **fields}, header)
    assert (error.status, error.code) == (400, "adapter_conflict")


@pytest.mark.parametrize(
    ("asked", "param"), [(["json", "nope"], "adapters[1]"), ([[{"name": "nope"}]], "adapters[0][0].name")]
)
def test_each_of_adapters_must_exist(asked: list[object], param: str) -> None:
    error = refusal({"adapters": asked})
    assert (error.status, error.code, error.param) == (404, "model_not_found", param)


def test_each_of_adapters_must_be_the_callers() -> None:
    assert refusal({"adapters": ["json", "french"]}, may_use=only_json).status == 404
    assert choices({"adapters": ["json", "base"]}, may_use=only_json) == (JSON, BASE)


def test_the_base_is_everybodys() -> None:
    assert choose({"model": BASE_NAME}, may_use=lambda name: False) == BASE
    assert choose({"adapter": "base"}, may_use=lambda name: False) == BASE
