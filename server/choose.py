"""Which adapter a request means: four places may name one, and they must agree. Never the base in silence.

In order: ``adapter``; ``lora_path``, ``adapter_id`` or ``lora``; ``model``; the header ``X-Adapter``. A base id in
``model`` names no adapter, since most clients cannot leave it out; elsewhere the base is a choice like any other.

Knows the registry's names; knows no weights. Place in a request's way: step 2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from adapters.errors import AdapterNotFound
from adapters.ref import BASE, AdapterRef
from server.errors import WireError, shorten, unsupported
from server.schemas import GenerationFields
from server.schemas.base import ScaledLora, WeightedAdapter

HEADER = "X-Adapter"
BASE_WORD = "base"
_LOCATION = re.compile(r"^[/\\.~]|://|\\|/.*/")
"""What no adapter's name can look like, but a path or a URL does."""


class Named(Protocol):
    @property
    def ref(self) -> AdapterRef: ...


class AdapterNames(Protocol):
    """The registry, as far as names go."""

    def resolve(self, name: str, *, is_visible: Callable[[str], bool]) -> AdapterRef: ...

    def entries(self) -> Sequence[Named]: ...


@dataclass(frozen=True, slots=True)
class Choice:
    ref: AdapterRef
    asked: str
    """What the reply's ``model`` echoes."""


@dataclass(frozen=True, slots=True)
class Mention:
    """One place of a request that names an adapter or the base."""

    ref: AdapterRef
    param: str


@dataclass(frozen=True, slots=True)
class Chooser:
    """Chooses for one caller."""

    names: AdapterNames
    base_name: str
    may_use: Callable[[str], bool]

    def choose(self, request: GenerationFields, header: str | None = None) -> Choice:
        """Raises WireError: 404 model_not_found, 400 adapter_conflict, unsupported or invalid_request."""
        mentions = list(self._mentions(request, header))
        for other in mentions[1:]:
            if other.ref != mentions[0].ref:
                raise _conflict(mentions[0], other)
        ref = mentions[0].ref if mentions else BASE
        return Choice(ref, request.model or (self.base_name if ref.is_base else str(ref)))

    def _mentions(self, request: GenerationFields, header: str | None) -> Iterator[Mention]:
        if "adapter" in request.model_fields_set:
            yield Mention(self._adapter(request.adapter), "adapter")
        if request.lora_path is not None:
            yield self._by_name(_plain_name(request.lora_path, "lora_path"), "lora_path")
        if request.adapter_id is not None:
            yield self._by_name(_plain_name(request.adapter_id, "adapter_id"), "adapter_id")
        if request.lora is not None:
            yield Mention(self._lora(request.lora), "lora")
        if request.model is not None and request.model not in (BASE_WORD, self.base_name):
            yield self._model(request.model)
        if header:
            yield self._by_name(header, HEADER)

    # ---- one place each ----------------------------------------------------------------------------------------

    def _adapter(self, value: str | list[WeightedAdapter] | None) -> AdapterRef:
        if value is None:
            return BASE
        if isinstance(value, str):
            return self._resolve(value, "adapter")
        refs = [(self._resolve(item.name, f"adapter[{i}].name"), item.weight) for i, item in enumerate(value)]
        return _only_one(refs, "adapter")

    def _lora(self, items: list[ScaledLora]) -> AdapterRef:
        refs = [(self._numbered(item.id, f"lora[{i}].id"), item.scale) for i, item in enumerate(items)]
        return _only_one(refs, "lora")

    def _numbered(self, id_or_name: int | str, param: str) -> AdapterRef:
        if isinstance(id_or_name, str):
            return self._resolve(id_or_name, param)
        found = next(islice(self.names.entries(), id_or_name, None), None)
        if found is None or not self.may_use(found.ref.name):
            raise _not_found(str(id_or_name), (), param)
        return found.ref

    def _model(self, model: str) -> Mention:
        for base in (self.base_name, BASE_WORD):
            if model.startswith(f"{base}:"):
                return self._by_name(model.removeprefix(f"{base}:"), "model")
        return self._by_name(model, "model")

    def _by_name(self, name: str, param: str) -> Mention:
        return Mention(self._resolve(name, param), param)

    # ---- names -------------------------------------------------------------------------------------------------

    def _resolve(self, name: str, param: str) -> AdapterRef:
        """A name, ``name@version`` or a base id. What a caller may not use does not exist for it."""
        if name == self.base_name:
            return BASE
        try:
            ref = self.names.resolve(name, is_visible=self.may_use)
            if not (ref.is_base or self.may_use(ref.name)):
                ref = self.names.resolve(
                    f"{ref.name}@0", is_visible=self.may_use
                )  # no adapter has a version 0
        except AdapterNotFound as error:
            raise _not_found(name, error.near, param) from None
        return ref


def _only_one(refs: Sequence[tuple[AdapterRef, float]], param: str) -> AdapterRef:
    """A list that comes to one adapter as it is, or to the base; a true composition is refused."""
    weighted = [(ref, weight) for ref, weight in refs if weight != 0 and not ref.is_base]
    if not weighted:
        return BASE
    if len(weighted) == 1 and weighted[0][1] == 1:
        return weighted[0][0]
    raise unsupported(
        "this server does not compose or scale adapters yet: name one adapter with weight 1, the others with 0",
        param,
    )


def _plain_name(value: str, param: str) -> str:
    if _LOCATION.search(value):
        raise unsupported(
            f"`{param}` takes the name of a registered adapter; requests load nothing from paths or URLs: "
            "register it first with POST /v1/adapters",
            param,
        )
    return value


def _not_found(name: str, near: tuple[str, ...], param: str) -> WireError:
    return WireError(404, "model_not_found", str(AdapterNotFound(shorten(name, 96), near)), param=param)


def _conflict(first: Mention, other: Mention) -> WireError:
    return WireError(
        400,
        "adapter_conflict",
        f"`{first.param}` asks for {first.ref} and `{other.param}` for {other.ref}: name one adapter",
        param=other.param,
    )
