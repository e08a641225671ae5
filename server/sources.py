"""Where settings come from: flags, then the environment, then a TOML file, then the default; origins are kept.

The only reader of the environment. Unknown names are errors wherever they stand.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource, TomlConfigSettingsSource

from server.settings import Settings

PREFIX = "LORIKEET_"
CONFIG = "LORIKEET_CONFIG"
CLIENT_NAMES = {"LORIKEET_URL"}
"""Read by the client commands, not by the server."""


class SettingsError(ValueError):
    """``str()`` lists every setting at fault with its origin."""


def resolve(
    flags: Mapping[str, object], config: Path | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Read all sources. ``flags`` holds only what was given; ``config`` beats LORIKEET_CONFIG. Raises SettingsError.

    ``environ`` stands in for the process's environment.
    """
    names = os.environ if environ is None else environ
    path = config or (Path(names[CONFIG]) if names.get(CONFIG) else None)
    layers = [
        (f"file {path.name}" if path else "file", _from_file(path)),
        ("environment", _from_environment(names)),
        ("flag", dict(flags)),
    ]
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        _refuse_unknown(layer, origin)
        for name, value in layer.items():
            values[name] = value
            origins[name] = f"environment {PREFIX}{name.upper()}" if origin == "environment" else origin
    try:
        return Settings.model_validate(values).with_origins(origins)
    except ValidationError as error:
        raise SettingsError("\n".join(_lines(error, origins))) from error


def _from_file(path: Path | None) -> dict[str, object]:
    if path is None:
        return {}
    if not path.is_file():
        raise SettingsError(f"there is no settings file {path}")
    try:
        values: dict[str, object] = TomlConfigSettingsSource(Settings, toml_file=path)()
    except ValueError as error:
        raise SettingsError(f"cannot read the settings file {path}: {error}") from error
    return values


def _from_environment(names: Mapping[str, str]) -> dict[str, object]:
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | {CONFIG} | CLIENT_NAMES
    for name in sorted(names):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            raise SettingsError(f"unknown environment variable {name}{_near(name.upper(), known)}")
    return _EnvironmentSource(names)()


class _EnvironmentSource(EnvSettingsSource):
    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        super().__init__(Settings)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return {name.lower(): value for name, value in self._environ.items()}


def _refuse_unknown(layer: Mapping[str, object], origin: str) -> None:
    for name in layer:
        if name not in Settings.model_fields:
            raise SettingsError(f"unknown setting {name!r} ({origin}){_near(name, Settings.model_fields)}")


def data_home(environ: Mapping[str, str] | None = None) -> Path:
    """The user's data directory: XDG_DATA_HOME, else ~/.local/share. It may not be writable, or not exist."""
    named = (os.environ if environ is None else environ).get("XDG_DATA_HOME")
    return Path(named) if named else Path.home() / ".local" / "share"


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _lines(error: ValidationError, origins: Mapping[str, str]) -> list[str]:
    lines = []
    for item in error.errors(include_url=False, include_input=False):
        name = str(item["loc"][0]) if item["loc"] else ""
        where = f"{name} ({origins.get(name, 'default')}): " if name else ""
        lines.append(where + item["msg"].removeprefix("Value error, "))
    return lines


@dataclass(frozen=True, slots=True)
class SettingDoc:
    """One setting as help and documentation show it."""

    name: str
    flag: str
    environment: str
    default: str
    unit: str
    reason: str
    is_flag_only: bool
    """A yes-or-no setting: its flag takes no value (``--no-...`` turns it off)."""


def describe() -> list[SettingDoc]:
    """Every setting, in the order of the file."""
    defaults = {name: value for name, value, _ in Settings().rows()}
    return [_doc(name, field, defaults[name]) for name, field in Settings.model_fields.items()]


def _doc(name: str, field: FieldInfo, default: str) -> SettingDoc:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return SettingDoc(
        name,
        "--" + name.replace("_", "-"),
        PREFIX + name.upper(),
        default,
        str(extra.get("unit", "")),
        field.description or "",
        field.annotation is bool,
    )
