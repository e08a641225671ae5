"""/tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

import pytest

from tests.fakes import EOS_TOKEN, VOCAB_SIZE
from tests.support.wire import Wire, error_of


def test_a_text_becomes_ids(wire: Wire) -> None:
    reply = wire.post("/tokenize", {"model": "french", "prompt": "hé", "add_special_tokens": True})
    assert reply.json() == {"count": 3, "max_model_len": 4096, "tokens": [104, 195, 169], "token_strs": None}


def test_token_strings_come_where_asked_for(wire: Wire) -> None:
    reply = wire.post("/tokenize", {"prompt": "hi", "return_token_strs": True})
    assert reply.json()["token_strs"] == ["h", "i"]


def test_a_chat_becomes_ids_with_its_template_and_pictures(wire: Wire) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "data:,x"}]
    reply = wire.post(
        "/tokenize", {"messages": [{"role": "user", "content": parts}], "add_generation_prompt": False}
    )
    assert reply.json()["count"] == len("user:a") + 4
    assert wire.processor.options[0]["generation"] is False


def test_ids_become_text_special_ones_spelt_out(wire: Wire) -> None:
    reply = wire.post("/detokenize", {"tokens": [104, 105, EOS_TOKEN]})
    assert reply.json() == {"prompt": f"hi<|{EOS_TOKEN}|>"}


def test_empty_lists_and_texts_are_fine(wire: Wire) -> None:
    assert wire.post("/tokenize", {"prompt": ""}).json()["tokens"] == []
    assert wire.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/tokenize", {}, 400, "invalid_request"),
        (
            "/tokenize",
            {"prompt": "x", "messages": [{"role": "user", "content": "x"}]},
            400,
            "invalid_request",
        ),
        ("/tokenize", {"prompt": 5}, 400, "invalid_request"),
        ("/tokenize", {"prompt": "x", "y": 1}, 400, "invalid_request"),
        ("/tokenize", {"prompt": "x", "model": "nope"}, 404, "model_not_found"),
        ("/tokenize", {"prompt": "x" * 2_000_000}, 400, "context_length_exceeded"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, 400, "invalid_request"),
        ("/detokenize", {"tokens": [-1]}, 400, "invalid_request"),
        ("/detokenize", {"tokens": ["1"]}, 400, "invalid_request"),
        ("/detokenize", {"tokens": [1], "model": "nope"}, 404, "model_not_found"),
        ("/detokenize", {}, 400, "invalid_request"),
    ],
)
def test_bad_requests_are_told(wire: Wire, path: str, body: object, status: int, code: str) -> None:
    response = wire.post(path, body)
    assert (response.status_code, error_of(response)["code"]) == (status, code)
