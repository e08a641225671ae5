"""Splits and shadows over the wire: everybody keeps their side, and nobody is ever sent what a shadow says."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.errors import DeadlineExceeded, StepFailed
from engine.request import GenerationRequest
from server.keys import Caller, Key, KeyRing, hash_key
from server.shadows import MAX_PENDING, Shadows, shared_prefix
from tests.fakes import Item, delta, finish, say
from tests.support.surface import Surface, client_of, make_surface

TURN = [{"role": "user", "content": "hello"}]


@pytest.fixture
def surface(tmp_path: Path) -> Surface:
    surface = make_surface(tmp_path)
    for seed in range(3):
        folder = surface.package(f"p{seed}", seed=seed)
        surface.registry.register("a", folder, source=f"local:p{seed}")
    surface.registry.pointers.point("prod", "a@1")
    return surface


@pytest.fixture
def client(surface: Surface) -> Iterator[httpx2.Client]:
    with client_of(surface) as client:
        yield client


def split(client: httpx2.Client, weights: object, **more: Any) -> httpx2.Response:
    return client.put("/v1/traffic/prod", json={"weights": weights, **more})


def served_by(client: httpx2.Client, headers: dict[str, str] | None = None, **body: Any) -> str:
    fields = {"model": "prod", "messages": TURN, "temperature": 0, **body}
    reply = client.post("/v1/chat/completions", json=fields, headers=headers or {})
    assert reply.status_code == 200, reply.text
    return str(reply.headers["x-adapter"])


# ---- splits


def test_a_user_stays_on_one_side_and_the_shares_are_the_weights(client: httpx2.Client) -> None:
    record = split(client, {"1": 50, "2": 50}).json()
    assert record["shares"] == {"1": 0.5, "2": 0.5} and record["is_split"] is True
    sides = {f"u{i}": served_by(client, user=f"u{i}") for i in range(60)}
    counts = Counter(sides.values())
    assert set(counts) == {"a@1", "a@2"} and min(counts.values()) > 15
    assert {user: served_by(client, user=user) for user in sides} == sides


@pytest.mark.parametrize(
    ("sticky", "headers", "body"),
    [
        ("user", {}, {"user": "KEY"}),
        ("user", {}, {"safety_identifier": "KEY"}),
        ("header:x-session", {"X-Session": "KEY"}, {}),
        ("metadata:tenant", {}, {"metadata": {"tenant": "KEY"}}),
    ],
)
def test_the_key_is_where_the_alias_says(
    client: httpx2.Client, surface: Surface, sticky: str, headers: dict[str, str], body: dict[str, Any]
) -> None:
    split(client, {"1": 1, "2": 1}, sticky=sticky)
    record = surface.registry.pointers.alias("prod")
    assert record is not None and record.traffic is not None
    for key in ("k1", "k2", "k3", "k4"):
        keyed = dict.fromkeys(headers, key)
        fields = {n: (dict.fromkeys(v, key) if isinstance(v, dict) else key) for n, v in body.items()}
        expected = f"a@{record.traffic.side('prod', key, (1, 2))}"
        assert {served_by(client, keyed, **fields) for _ in range(3)} == {expected}


def test_without_a_key_each_request_is_drawn_anew(client: httpx2.Client) -> None:
    split(client, {"1": 1, "2": 1})
    assert len({served_by(client) for _ in range(40)}) == 2


def test_one_request_is_one_draw_wherever_it_names_the_alias(client: httpx2.Client) -> None:
    split(client, {"1": 1, "2": 1})
    for _ in range(20):
        served_by(client, {"X-Adapter": "prod"}, adapter="prod")


def test_a_version_by_its_number_and_the_bare_name_are_never_split(client: httpx2.Client) -> None:
    split(client, {"1": 1, "2": 1})
    assert {served_by(client, model="a@1") for _ in range(5)} == {"a@1"}
    assert {served_by(client, model="a") for _ in range(5)} == {"a@3"}


def test_moving_the_alias_or_ending_the_split_sends_all_to_one(client: httpx2.Client) -> None:
    split(client, {"1": 1, "2": 1})
    assert client.put("/v1/aliases/prod", json={"target": "a@2"}).status_code == 200
    assert client.get("/v1/traffic/prod").json()["is_split"] is False
    assert {served_by(client) for _ in range(8)} == {"a@2"}
    split(client, {"1": 1, "2": 1})
    assert client.delete("/v1/traffic/prod").json()["shares"] == {"2": 1.0}
    assert {served_by(client) for _ in range(8)} == {"a@2"}
    split(client, {"1": 1, "2": 1})
    client.post("/v1/adapters/prod/rollback")
    assert {served_by(client) for _ in range(8)} == {"a@1"}


def test_requests_in_flight_keep_their_version(client: httpx2.Client, surface: Surface) -> None:
    begun, go_on = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    def script(request: GenerationRequest) -> Iterator[Item]:
        yield delta(str(request.adapter))
        loops.append(asyncio.get_running_loop())
        begun.set()
        yield go_on
        yield finish(request, 1)

    surface.engine.script = script
    split(client, {"1": 0, "2": 1})
    replies: list[httpx2.Response] = []

    def ask() -> None:
        body = {"model": "prod", "messages": TURN}
        with client_of(surface) as other:  # a loop of its own, on which it is let go on
            replies.append(other.post("/v1/chat/completions", json=body))

    thread = threading.Thread(target=ask)
    thread.start()
    assert begun.wait(10)
    assert split(client, {"1": 1, "2": 0}).status_code == 200
    client.delete("/v1/adapters/a@2")
    surface.engine.script = say("ok")
    assert served_by(client) == "a@1"
    loops[0].call_soon_threadsafe(go_on.set)
    thread.join(10)
    assert replies[0].headers["x-adapter"] == "a@2"
    assert replies[0].json()["choices"][0]["message"]["content"] == "a@2"


def test_a_deleted_version_s_share_goes_to_the_others(client: httpx2.Client) -> None:
    split(client, {"1": 1, "2": 1})
    client.delete("/v1/adapters/a@2")
    assert {served_by(client) for _ in range(8)} == {"a@1"}
    assert client.get("/v1/traffic").json()["data"][0]["weights"] == {"1": 1.0}


def test_versions_are_loaded_before_anything_goes_to_them(client: httpx2.Client, surface: Surface) -> None:
    split(client, {"1": 1, "2": 0}, shadow={"version": 3, "share": 0.5})
    assert sorted(str(ref) for ref in surface.engine.loaded) == ["a@1", "a@2", "a@3"]


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({}, 400, "weights"),
    ({"weights": {"1": 0}}, 400, "weights"),
    ({"weights": {"2": 1}}, 400, "weights"),
    ({"weights": {"1": -1}}, 400, "weights.1"),
    ({"weights": {"1": True}}, 400, "weights.1"),
    ({"weights": {"one": 1}}, 400, "weights"),
    ({"weights": {"1": 1, "9": 1}}, 404, "weights"),
    ({"weights": {"1": 1}, "sticky": "cookie:x"}, 400, "sticky"),
    ({"weights": {"1": 1}, "shadow": {"version": 9}}, 404, "shadow.version"),
    ({"weights": {"1": 1}, "shadow": {"share": 1}}, 400, "shadow.version"),
    ({"weights": {"1": 1}, "shadow": {"version": 2, "share": 0}}, 400, "shadow.share"),
    ({"weights": {"1": 1}, "shadow": {"version": 2, "share": 2}}, 400, "shadow.share"),
    ({"weights": {"1": 1}, "shadow": {"version": 2, "rate": 1}}, 400, "shadow"),
    ({"weights": {"1": 1}, "unknown": 1}, 400, "unknown"),
]


def test_what_is_wrong_is_named_and_changes_nothing(client: httpx2.Client) -> None:
    for body, status, param in BAD:
        reply = client.put("/v1/traffic/prod", json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (status, param), body
    assert client.get("/v1/traffic/prod").json()["is_split"] is False
    for method in ("GET", "PUT", "DELETE"):
        assert client.request(method, "/v1/traffic/none", json={"weights": {"1": 1}}).status_code == 404


def test_a_key_splits_the_aliases_of_its_own_adapters_only(tmp_path: Path) -> None:
    caller = Caller("x", frozenset({"admin", "infer"}), ("mine*",))
    surface = make_surface(tmp_path, KeyRing([Key(hash_key("secret-of-x"), caller)]))
    surface.register("other")
    surface.registry.pointers.point("prod", "other@1")
    surface.registry.conduct.split("prod", _whole())
    with client_of(surface, authorization="Bearer secret-of-x") as client:
        assert split(client, {"1": 1}).status_code == 404
        assert client.get("/v1/traffic").json()["data"] == []
        assert (
            client.post("/v1/chat/completions", json={"model": "prod", "messages": TURN}).status_code == 404
        )


def _whole() -> Any:
    from adapters.traffic import Traffic

    return Traffic({1: 1.0})


# ---- shadows


def by_version(answers: dict[int, list[Item] | str]) -> Any:
    def script(request: GenerationRequest) -> list[Item]:
        answer = answers[request.adapter.version]
        if isinstance(answer, list):
            return answer
        return [delta(answer), finish(request, len(answer))]

    return script


def copies(surface: Surface) -> list[GenerationRequest]:
    return [request for request in surface.engine.requests if request.is_background]


def settle(client: httpx2.Client, surface: Surface, outcome: str, count: int = 1) -> dict[str, float]:
    """The shadow's series, once so many copies came to an outcome."""
    for _ in range(400):
        values = {
            sample.name
            + "".join(f"[{v}]" for k, v in sorted(sample.labels.items()) if k != "adapter"): sample.value
            for family in text_string_to_metric_families(client.get("/metrics").text)
            for sample in family.samples
            if sample.name.startswith("lorikeet_shadow")
        }
        if values.get(f"lorikeet_shadow_requests_total[{outcome}]") == count:
            return values
    raise AssertionError(f"no {outcome}: {values}")


@pytest.mark.parametrize(
    ("says", "outcome", "agreement"),
    [("abcd", "same", 1.0), ("abxd", "different", 0.5), ("ab", "different", 0.5)],
)
def test_a_shadow_is_compared_and_never_heard(
    client: httpx2.Client, surface: Surface, says: str, outcome: str, agreement: float
) -> None:
    surface.engine.script = by_version({1: "abcd", 2: says})
    split(client, {"1": 1}, shadow={"version": 2})
    reply = client.post("/v1/chat/completions", json={"model": "prod", "messages": TURN, "temperature": 0})
    assert reply.json()["choices"][0]["message"]["content"] == "abcd"
    values = settle(client, surface, outcome)
    assert values["lorikeet_shadow_agreement_ratio_sum"] == agreement
    assert values["lorikeet_shadow_seconds_count"] == values["lorikeet_shadow_primary_seconds_count"] == 1
    (copy,) = copies(surface)
    assert str(copy.adapter) == "a@2"
    assert copy.sampling == surface.engine.requests[0].sampling
    assert copy.prompt is surface.engine.requests[0].prompt


def test_a_streamed_answer_is_copied_when_it_has_ended(client: httpx2.Client, surface: Surface) -> None:
    surface.engine.script = by_version({1: "abcd", 2: "abcd"})
    split(client, {"1": 1}, shadow={"version": 2})
    fields = {"model": "prod", "messages": TURN, "temperature": 0, "stream": True, "n": 2}
    text = client.post("/v1/chat/completions", json=fields).text
    assert text.endswith("data: [DONE]\n\n")
    settle(client, surface, "same")
    assert len(copies(surface)) == 1


def test_answers_that_chance_has_a_part_in_are_not_compared(client: httpx2.Client, surface: Surface) -> None:
    surface.engine.script = by_version({1: "abcd", 2: "xyz"})
    split(client, {"1": 1}, shadow={"version": 2})
    served_by(client, temperature=1.0)
    values = settle(client, surface, "unpaired")
    assert values["lorikeet_shadow_seconds_count"] == 1
    assert "lorikeet_shadow_agreement_ratio_sum" not in values
    served_by(client, temperature=1.0, seed=7)
    settle(client, surface, "different")


@pytest.mark.parametrize(
    ("error", "outcome"), [(DeadlineExceeded("no idle time"), "dropped"), (StepFailed("bad"), "failed")]
)
def test_a_copy_that_fails_or_finds_no_time_is_counted_and_harms_nobody(
    client: httpx2.Client, surface: Surface, error: Any, outcome: str
) -> None:
    surface.engine.script = by_version({1: "abcd", 2: [error]})
    split(client, {"1": 1}, shadow={"version": 2})
    assert served_by(client) == "a@1"
    settle(client, surface, outcome)
    assert served_by(client) == "a@1"
    assert surface.registry.entry("a@2").num_leases == 0


def test_only_so_many_copies_wait(client: httpx2.Client, surface: Surface) -> None:
    surface.engine.script = by_version({1: "abcd", 2: [asyncio.Event()]})
    split(client, {"1": 1}, shadow={"version": 2})
    for _ in range(MAX_PENDING + 3):
        served_by(client)
    settle(client, surface, "dropped", 3)
    assert len(copies(surface)) == MAX_PENDING


def test_a_share_is_drawn_and_a_budget_holds(client: httpx2.Client, surface: Surface) -> None:
    draws = iter([0.6, 0.4, 0.6, 0.4, 0.4])
    surface.state.shadows = Shadows(draw=lambda: next(draws), clock=lambda: 100.0)
    surface.engine.script = by_version({1: "abcd", 2: "abcd"})
    split(client, {"1": 1}, shadow={"version": 2, "share": 0.5, "tokens_per_minute": 10})
    for _ in range(3):
        served_by(client)
    settle(client, surface, "same")
    assert len(copies(surface)) == 1
    served_by(client)
    settle(client, surface, "dropped")  # the first has spent the minute's tokens


def test_requests_for_other_names_and_side_by_side_answers_are_not_copied(
    client: httpx2.Client, surface: Surface
) -> None:
    split(client, {"1": 1}, shadow={"version": 2})
    served_by(client, model="a@1")
    served_by(client, model="base")
    served_by(client, model=None, adapters=["prod", "base"])
    assert copies(surface) == []


def test_the_shared_prefix_is_of_the_longer_answer() -> None:
    assert [shared_prefix(a, b) for a, b in (([], []), ([1], []), ([1, 2], [1, 2]), ([1, 2, 3, 4], [1]))] == [
        1.0,
        0.0,
        1.0,
        0.25,
    ]
