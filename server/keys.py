"""Keys: who may ask for what. Stored hashed, compared in constant time; a caller carries scopes and adapter globs.

Owns: the key file's format and the ring. Does not know requests: ``server/auth.py`` asks it.
Place in a request's way: step 1.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

Scope = Literal["infer", "admin", "metrics"]
SCOPES: tuple[Scope, ...] = ("infer", "admin", "metrics")
MIN_KEY_CHARS = 8
_HASHED = re.compile(r"sha256:[0-9a-f]{64}")
_FIELDS = {"name", "key", "scopes", "adapters", "tokens_per_minute"}
MAX_TOKENS_PER_MINUTE = 10**12


class KeyFileError(ValueError):
    """The key file says something that cannot be meant; the message names the entry, never the key."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. ``adapters`` are shell globs of the names this caller may see and use."""

    name: str
    scopes: frozenset[Scope]
    adapters: tuple[str, ...] = ("*",)
    tokens_per_minute: int | None = None
    """Prompt and answer together; None is as many as come."""

    def may_use(self, adapter: str) -> bool:
        """Whether the adapter exists for this caller; the base always does."""
        return any(fnmatchcase(adapter, glob) for glob in self.adapters)


@dataclass(frozen=True, slots=True)
class Key:
    digest: str
    """``sha256:HEX`` of the secret. Secrets are long and random, so a slow hash would buy nothing."""
    caller: Caller


def hash_key(secret: str) -> str:
    """``sha256:HEX`` of a secret; what is hashed already stays."""
    if _HASHED.fullmatch(secret):
        return secret
    if len(secret) < MIN_KEY_CHARS:
        raise ValueError(
            f"a key needs at least {MIN_KEY_CHARS} characters; make one with: openssl rand -hex 24"
        )
    return _digest(secret)


def _digest(secret: str) -> str:
    return "sha256:" + hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


class KeyRing:
    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = tuple(keys)

    @property
    def is_empty(self) -> bool:
        return not self._keys

    def find(self, secret: str) -> Caller | None:
        """The caller that holds the secret. Every key is compared, so the time tells nothing."""
        digest = _digest(secret)
        found: Caller | None = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key.caller
        return found


def read_keys(api_key: str | None, path: Path | None) -> KeyRing:
    """The ring of a hashed single key (every scope) and of a key file. Raises KeyFileError."""
    keys = [Key(api_key, Caller("api_key", frozenset(SCOPES)))] if api_key else []
    if path is not None:
        keys += _read_file(path)
        if not keys:
            raise KeyFileError(f"{path} holds no [[key]] table: nobody could use the server")
    return KeyRing(keys)


def _read_file(path: Path) -> list[Key]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise KeyFileError(f"cannot read the key file {path}: {error}") from error
    tables = document.get("key", [])
    if set(document) - {"key"} or not isinstance(tables, list):
        raise KeyFileError(f"{path} may hold [[key]] tables only")
    return [_parse(table, f"{path} key {i + 1}") for i, table in enumerate(tables)]


def _parse(table: Mapping[str, object], where: str) -> Key:
    unknown = set(table) - _FIELDS
    if unknown:
        raise KeyFileError(f"{where}: unknown field {sorted(unknown)[0]!r}; known are {sorted(_FIELDS)}")
    name, secret = table.get("name"), table.get("key")
    if not isinstance(name, str) or not name or not isinstance(secret, str):
        raise KeyFileError(f"{where}: name and key must be texts")
    try:
        digest = hash_key(secret)
    except ValueError as error:
        raise KeyFileError(f"{where}: {error}") from error
    scopes = _texts(table.get("scopes", ["infer"]), f"{where}: scopes")
    known = frozenset(scope for scope in SCOPES if scope in scopes)
    if len(known) != len(set(scopes)):
        raise KeyFileError(f"{where}: scopes are among {list(SCOPES)}")
    adapters = tuple(_texts(table.get("adapters", ["*"]), f"{where}: adapters"))
    return Key(digest, Caller(name, known, adapters, _quota(table.get("tokens_per_minute"), where)))


def _quota(value: object, where: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_TOKENS_PER_MINUTE:
        raise KeyFileError(f"{where}: tokens_per_minute is a whole number from 1")
    return value


def _texts(value: object, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise KeyFileError(f"{where} must be a list of texts")
    return value
