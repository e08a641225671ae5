"""What is not strictly JSON is refused, and everything else is read as the standard library reads it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import WireError
from server.strictjson import MAX_DEPTH, parse, parse_object, require_json


def refusal(data: bytes) -> WireError:
    with pytest.raises(WireError) as caught:
        parse_object(data)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"  \n",
        b"{",
        b'{"a":1} x',
        b'{"a":1}{"b":2}',
        b'{"a":1,"a":2}',
        b'{"x":{"a":1,"b":2,"a":1}}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-Infinity}',
        b'{"a":1e999}',
        b'{"a":-1e999}',
        b'{"a":01}',
        b"{'a':1}",
        b'{"a":1,}',
        b'{"a":"\n"}',
        b'\xef\xbb\xbf{"a":1}',
        b'{"a":"\xff"}',
        b'{"a":"\xed\xa0\x80"}',
        b'{"a":"\\ud800"}',
        b'{"\\udc00":1}',
        b'{"a":["\\ud800\\u0041"]}',
        b'{"a":' + b"1" * 5000 + b"}",
        b'{"a":' + b"[" * 100_000,
    ],
)
def test_bad_json_is_refused(data: bytes) -> None:
    error = refusal(data)
    assert error.code == "invalid_json"
    assert len(error.message) < 300


@pytest.mark.parametrize("data", [b"[]", b"1", b'"a"', b"null", b"true"])
def test_only_objects_are_requests(data: bytes) -> None:
    assert refusal(data).code == "invalid_request"


def nested(depth: int) -> bytes:
    return b'{"a":' * (depth - 1) + b"{}" + b"}" * (depth - 1)


def test_the_deepest_nesting_is_64() -> None:
    parse_object(nested(MAX_DEPTH))
    assert "64" in refusal(nested(MAX_DEPTH + 1)).message
    assert refusal(b'{"a":' + b"[" * 64 + b"]" * 64 + b"}").code == "invalid_json"


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert parse_object(b'{"a":"\\ud83e\\udd9c"}') == {"a": "🦜"}


def test_a_client_that_nests_without_end_costs_little() -> None:
    refusal(b'{"a":' + b"[" * 5_000_000)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON, st.booleans())
def test_good_json_reads_as_the_standard_library_reads_it(value: object, is_ascii: bool) -> None:
    data = json.dumps(value, ensure_ascii=is_ascii).encode()
    assert parse(data) == json.loads(data)


@given(st.binary(max_size=64))
def test_any_bytes_give_a_value_or_a_refusal(data: bytes) -> None:
    codes = set()
    try:
        parse(data)
    except WireError as error:
        codes.add(error.code)
    assert codes <= {"invalid_json"}


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "Application/JSON; charset=utf-8", 'application/json; charset="UTF-8"'],
)
def test_json_is_taken(content_type: str) -> None:
    require_json(content_type)


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/jsonx",
        "application/json;charset=latin-1",
    ],
)
def test_other_types_are_415(content_type: str | None) -> None:
    with pytest.raises(WireError) as caught:
        require_json(content_type)
    assert (caught.value.status, caught.value.code) == (415, "unsupported_media_type")


def test_an_object_of_a_million_keys_is_refused_at_once() -> None:
    data = json.dumps({str(i): i for i in range(1_000_000)}).encode()
    with pytest.raises(WireError, match="16,384 keys"):
        parse(data)
    assert parse(json.dumps({str(i): i for i in range(16_384)}).encode())
