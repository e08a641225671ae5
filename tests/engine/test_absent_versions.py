"""Which versions a request would have to bring: what a server that loads none on demand goes by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from adapters.composition import compose
from adapters.moves import Load, Moved
from adapters.ref import BASE, AdapterRef
from adapters.residency import Residency
from engine.grammar import GrammarCompiler
from engine.lifecycle import Lifecycle
from engine.observer import SilentObserver
from engine.sequence import Sequence
from tests.support.lora import make_ref

A, B = make_ref("a"), make_ref("b")
BOTH = compose([(A, 0.5), (B, 0.5)])


def absent(ref: AdapterRef, *resident: AdapterRef) -> list[AdapterRef]:
    residency = Residency(4)
    for move in residency.plan(resident):
        assert isinstance(move, Load)
        residency.settle(Moved(move, 0, {}))
    lifecycle = Lifecycle(residency, SilentObserver(), cast(GrammarCompiler, None), (), 8, 8)
    return lifecycle.absent_versions(cast(Sequence, SimpleNamespace(adapter=ref)))


def test_the_base_is_always_there_and_an_adapter_once_it_is_loaded() -> None:
    assert absent(BASE) == []
    assert absent(A) == [A]
    assert absent(A, A) == []


def test_a_composition_may_be_made_of_what_is_loaded() -> None:
    assert absent(BOTH) == [A, B]
    assert absent(BOTH, A) == [B]
    assert absent(BOTH, A, B) == []
    assert absent(BOTH, BOTH) == []
