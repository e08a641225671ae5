"""One table of errors, one envelope."""

from __future__ import annotations

import errno
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import (
    AdapterBusy,
    AdapterExists,
    AdapterNotFound,
    AdapterNotLoaded,
    AdapterRejected,
    InsufficientMemory,
    InsufficientStorage,
    InvalidAdapterName,
    RejectReason,
    SourceRejected,
)
from base.errors import InvalidImage, InvalidImageCount, InvalidMessage, InvalidToken
from engine.errors import (
    AdapterUnavailable,
    ContextTooLong,
    DeadlineExceeded,
    Draining,
    EngineDown,
    EngineError,
    GrammarError,
    NumericalError,
    OutOfMemory,
    QueueFull,
    StepFailed,
)
from server.errors import (
    INTERNAL_MESSAGE,
    MAX_BODY_BYTES,
    WireError,
    error_body,
    error_response,
    to_wire,
)
from server.wording import without_host_paths

TABLE: list[tuple[Exception, int, str]] = [
    (ContextTooLong(9, 8), 400, "context_length_exceeded"),
    (GrammarError("x"), 400, "invalid_request"),
    (InvalidImage("x"), 400, "invalid_image"),
    (InvalidImageCount(1, 2), 400, "invalid_request"),
    (InvalidToken("x"), 400, "invalid_request"),
    (InvalidMessage("x"), 400, "invalid_request"),
    (SourceRejected("x"), 400, "invalid_request"),
    (AdapterNotFound("x", ("y",)), 404, "model_not_found"),
    (AdapterNotLoaded("x"), 404, "model_not_found"),
    (InvalidAdapterName("a b", "it has a blank"), 400, "invalid_request"),
    (AdapterExists("x"), 409, "adapter_exists"),
    (AdapterBusy("x", 3), 409, "adapter_busy"),
    (AdapterRejected(RejectReason.BAD_SHAPE, "x"), 422, "adapter_rejected"),
    (QueueFull("x", 2.5), 429, "queue_full"),
    (Draining("x"), 503, "draining"),
    (EngineDown("x"), 503, "engine_restarting"),
    (OutOfMemory("x"), 503, "insufficient_memory"),
    (InsufficientMemory("x"), 503, "insufficient_memory"),
    (DeadlineExceeded("x"), 504, "deadline_exceeded"),
    (InsufficientStorage("x"), 507, "insufficient_storage"),
    (OSError(errno.ENOSPC, "No space left"), 507, "insufficient_storage"),
    (NumericalError("x"), 500, "numerical_error"),
    (StepFailed("x"), 500, "internal"),
    (RuntimeError("x"), 500, "internal"),
    (AdapterUnavailable("x@1", AdapterRejected(RejectReason.NON_FINITE, "x")), 422, "adapter_rejected"),
    (AdapterUnavailable("x@1", AdapterNotFound("x")), 404, "model_not_found"),
    (AdapterUnavailable("x@1", InsufficientMemory("x")), 503, "insufficient_memory"),
    (AdapterUnavailable("x@1", RuntimeError("x")), 500, "internal"),
]


@pytest.mark.parametrize(("error", "status", "code"), TABLE, ids=lambda value: type(value).__name__)
def test_every_error_has_its_status_and_code(error: Exception, status: int, code: str) -> None:
    wire = to_wire(error)
    assert (wire.status, wire.code) == (status, code)


def subclasses(kind: type[Exception]) -> set[type[Exception]]:
    return {kind} | {each for child in kind.__subclasses__() for each in subclasses(child)}


def test_the_table_knows_every_error_of_the_engine() -> None:
    """A new EngineError without a row would be a 500 that nobody decided on."""
    covered = {type(error) for error, _, _ in TABLE}
    assert {kind for kind in subclasses(EngineError) if kind.__module__ == "engine.errors"} - {
        EngineError
    } <= covered


def test_clients_are_told_not_to_repeat_a_conflict() -> None:
    assert to_wire(AdapterExists("x")).headers == {"x-should-retry": "false"}
    assert to_wire(AdapterBusy("x", 1)).headers == {"x-should-retry": "false"}


@pytest.mark.parametrize(
    "error", [QueueFull("x", 2.5), Draining("x"), EngineDown("x"), InsufficientMemory("x")]
)
def test_what_passes_says_when_to_come_back(error: Exception) -> None:
    seconds = int(to_wire(error).headers["retry-after"])
    assert seconds == (3 if isinstance(error, QueueFull) else 1)


def test_a_bug_tells_nothing_of_itself(caplog: pytest.LogCaptureFixture) -> None:
    assert to_wire(RuntimeError("secret /home/me/thing")).message == INTERNAL_MESSAGE
    assert "request.failed" in caplog.text


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("cannot read '/var/lib/x/a.bin'", "cannot read '<path>'"),
        ("at /root/a: bad", "at <path>: bad"),
        ("https://example.com/a/b is off", "https://example.com/a/b is off"),
        ("org/name and q/k", "org/name and q/k"),
        ("application/json", "application/json"),
    ],
)
def test_paths_of_the_host_are_not_told(text: str, safe: str) -> None:
    assert without_host_paths(text) == safe
    assert to_wire(SourceRejected(text)).message == safe


def body_of(error: WireError) -> dict[str, Any]:
    data = error_body(error)
    assert len(data) <= MAX_BODY_BYTES
    parsed: dict[str, Any] = json.loads(data)
    return parsed


def test_the_envelope_has_openais_members() -> None:
    assert body_of(WireError(400, "invalid_request", "no", param="n")) == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": "invalid_request"}
    }


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (404, "invalid_request_error"),
        (429, "rate_limit_error"),
        (503, "server_error"),
    ],
)
def test_types_follow_the_status(status: int, kind: str) -> None:
    assert body_of(WireError(status, "x", "y"))["error"]["type"] == kind


def test_a_rejection_carries_its_reason_and_at_most_ten_details() -> None:
    details = tuple(f"key {i}" for i in range(30))
    wire = to_wire(AdapterRejected(RejectReason.UNKNOWN_KEYS, "unknown keys", details))
    error = body_of(wire)["error"]
    assert error["reason"] == "unknown_keys"
    assert error["details"] == list(details[:10])


@given(st.text(max_size=20_000), st.text(max_size=2000), st.lists(st.text(max_size=2000), max_size=20))
def test_no_error_is_longer_than_4_kib(message: str, param: str, details: list[str]) -> None:
    body_of(WireError(422, "x", message, param=param, extra={"reason": message, "details": details}))


def test_the_worst_text_still_fits() -> None:
    bad = "\x00" * 10_000
    body_of(WireError(422, "x", bad, param=bad, extra={"reason": bad, "details": [bad] * 10}))
    body_of(WireError(422, "x", "\ud800", param="\udfff"))


def test_headers_reach_the_response() -> None:
    response = error_response(WireError(429, "queue_full", "x", headers={"retry-after": "3"}))
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert response.headers["content-type"] == "application/json"
