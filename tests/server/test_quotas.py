"""Token quotas: spent is 429 before any work, with the time at which the next request goes through; and no sooner."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.budgets import TokenBudget
from server.keys import Caller, Key, KeyFileError, KeyRing, hash_key, read_keys
from server.quotas import Quotas
from tests.fakes import say
from tests.support.surface import Surface, client_of, make_surface

BODY = {"messages": [{"role": "user", "content": "hello"}]}


class Clock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


@given(
    limit=st.integers(1, 10_000),
    spends=st.lists(st.tuples(st.integers(0, 20_000), st.floats(0, 200)), max_size=30),
)
def test_nobody_gets_more_than_a_minute_ahead_and_the_wait_is_exact(
    limit: int, spends: list[tuple[int, float]]
) -> None:
    clock = Clock()
    budget, begin_s = TokenBudget(limit, clock), clock.now_s
    spent = last = 0
    for amount, pause_s in spends:
        clock.now_s += pause_s
        wait_s = budget.wait_s()
        if wait_s > 0:
            clock.now_s += wait_s * 1.000001 + 1e-6
        assert budget.wait_s() == 0
        budget.spend(amount)
        spent, last = spent + amount, amount
    allowed = limit * (1 + (clock.now_s - begin_s) / 60)
    assert spent - last <= allowed + 1e-3 * limit


def caller(name: str, quota: int | None) -> Key:
    return Key(hash_key(f"secret-of-{name}"), Caller(name, frozenset({"infer"}), ("*",), quota))


@pytest.fixture
def surface(tmp_path: Path) -> Surface:
    surface = make_surface(tmp_path, KeyRing([caller("small", 60), caller("free", None)]))
    surface.engine.script = say("x" * 100)
    return surface


def test_a_key_that_has_spent_its_tokens_waits_as_long_as_it_is_told(surface: Surface) -> None:
    clock = Clock()
    surface.state.quotas = Quotas(clock)
    with client_of(surface, authorization="Bearer secret-of-small") as client:
        first = client.post("/v1/chat/completions", json=BODY)
        used = first.json()["usage"]["total_tokens"]
        before = len(surface.engine.requests)
        refused = client.post("/v1/chat/completions", json=BODY)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (429, "rate_limited")
        wait_s = int(refused.headers["retry-after"])
        assert wait_s == used - 60 + 1  # one token a second, until one is there
        assert len(surface.engine.requests) == before
        clock.now_s += wait_s - 1.5
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 429
        clock.now_s += 1.5
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        assert client.get("/v1/models").status_code == 200
    with client_of(surface, authorization="Bearer secret-of-free") as client:
        assert client.post("/v1/chat/completions", json=BODY).status_code == 200


def test_streams_are_charged_and_a_prompt_once_for_all_its_choices(surface: Surface) -> None:
    surface.state.quotas = Quotas(Clock())
    with client_of(surface, authorization="Bearer secret-of-small") as client:
        text = client.post("/v1/chat/completions", json={**BODY, "stream": True, "n": 2}).text
        assert text.endswith("data: [DONE]\n\n")
        refused = client.post("/v1/chat/completions", json=BODY)
        num_prompt = len(surface.engine.requests[0].prompt.ids)
        assert int(refused.headers["retry-after"]) == num_prompt + 200 - 60 + 1


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "true", '"60"'])
def test_a_quota_that_cannot_be_meant_is_named(tmp_path: Path, value: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f'[[key]]\nname = "a"\nkey = "secret-of-a"\ntokens_per_minute = {value}\n')
    with pytest.raises(KeyFileError, match="tokens_per_minute"):
        read_keys(None, path)


def test_the_key_file_sets_quotas(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text('[[key]]\nname = "a"\nkey = "secret-of-a"\ntokens_per_minute = 60000\n')
    found = read_keys(None, path).find("secret-of-a")
    assert found is not None and found.tokens_per_minute == 60_000
