"""Which adapter a request means: four places may name one, and they must agree. Never the base in silence.

In order: ``adapter``; ``lora_path``, ``adapter_id`` or ``lora``; ``model``; the header ``X-Adapter``. A base id in
``model`` names no adapter, since most clients cannot leave it out; elsewhere the base is a choice like any other. A
list composes several as one; ``adapters`` names several that answer each for itself, and goes with none of the others.

Knows the registry's names; knows no weights. Place in a request's way: step 2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from adapters.composition import CompositionRejected, Described, Ingredient, check_composition, compose
from adapters.errors import AdapterNotFound
from adapters.ref import BASE, AdapterRef
from server.errors import WireError, shorten, unsupported
from server.schemas import GenerationFields
from server.schemas.base import AskedAdapter, ScaledLora

HEADER = "X-Adapter"
BASE_WORD = "base"
_LOCATION = re.compile(r"^[/\\.~]|://|\\|/.*/")
"""What no adapter's name can look like, but a path or a URL does."""


class Named(Protocol):
    @property
    def ref(self) -> AdapterRef: ...

    @property
    def report(self) -> Described: ...


class AdapterNames(Protocol):
    """The registry, as far as names go."""

    def resolve(self, name: str, *, is_visible: Callable[[str], bool]) -> AdapterRef: ...

    def entry(self, name: str) -> Named: ...

    def entries(self) -> Sequence[Named]: ...


@dataclass(frozen=True, slots=True)
class Choice:
    refs: tuple[AdapterRef, ...]
    """Who answers: one, or each of several."""
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
    max_rank: int
    """Of one adapter, as this server has it; compositions are measured by it."""

    def choose(self, request: GenerationFields, header: str | None = None) -> Choice:
        """Raises WireError: 404 model_not_found, 400 adapter_conflict, unsupported or invalid_request."""
        mentions = list(self._mentions(request, header))
        if request.fan_out is not None:
            if mentions:
                raise _fan_out_conflict(mentions[0])
            return self._fan_out(request.fan_out, request.model or self.base_name)
        for other in mentions[1:]:
            if other.ref != mentions[0].ref:
                raise _conflict(mentions[0], other)
        ref = mentions[0].ref if mentions else BASE
        return Choice((ref,), request.model or (self.base_name if ref.is_base else str(ref)))

    def _fan_out(self, asked: Sequence[AskedAdapter], model: str) -> Choice:
        return Choice(tuple(self._adapter(one, f"adapters[{i}]") for i, one in enumerate(asked)), model)

    def _mentions(self, request: GenerationFields, header: str | None) -> Iterator[Mention]:
        if "adapter" in request.model_fields_set:
            yield Mention(self._adapter(request.adapter, "adapter"), "adapter")
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

    def _adapter(self, value: AskedAdapter | None, param: str) -> AdapterRef:
        if value is None:
            return BASE
        if isinstance(value, str):
            return self._resolve(value, param)
        refs = [(self._resolve(item.name, f"{param}[{i}].name"), item.weight) for i, item in enumerate(value)]
        return self._composed(refs, param)

    def _lora(self, items: list[ScaledLora]) -> AdapterRef:
        refs = [(self._numbered(item.id, f"lora[{i}].id"), item.scale) for i, item in enumerate(items)]
        return self._composed(refs, "lora")

    def _composed(self, refs: Sequence[tuple[AdapterRef, float]], param: str) -> AdapterRef:
        """A list that comes to one adapter as it is, or to the base, is that; else a composition."""
        try:
            ref = compose(refs)
            ingredients = [Ingredient(part, self.names.entry(str(part.ref)).report) for part in ref.parts]
            if ingredients:
                check_composition(ingredients, self.max_rank)
        except CompositionRejected as error:
            raise unsupported(str(error), param) from error
        except AdapterNotFound as error:  # removed since it was resolved
            raise _not_found(error.name, (), param) from None
        return ref

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


def _fan_out_conflict(other: Mention) -> WireError:
    return WireError(
        400,
        "adapter_conflict",
        f"`adapters` asks for several and `{other.param}` for {other.ref}: name all of them in `adapters`",
        param=other.param,
    )
