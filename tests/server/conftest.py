"""One server over fakes for the tests of the wire; its fakes are put back before each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.wire import Wire


@pytest.fixture(scope="session")
def wire_server() -> Iterator[Wire]:
    with Wire().serving() as wire:
        yield wire


@pytest.fixture
def wire(wire_server: Wire) -> Wire:
    wire_server.reset()
    return wire_server
