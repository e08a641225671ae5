"""What SQLite's errors are called here: a full disk, a ledger that somebody holds, a file that is none.

Owns the border to SQLite. Knows no table.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from adapters.errors import AdapterError, InsufficientStorage

_STORAGE_CODES = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}
)


@contextmanager
def ledger_errors() -> Iterator[None]:
    """Foreign errors, translated where they enter. Raises InsufficientStorage, AdapterError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in _STORAGE_CODES:  # the low byte is the primary code
            raise InsufficientStorage(
                f"the adapter registry cannot be written ({error}); free disk space"
            ) from error
        raise AdapterError(
            f"the adapter registry did not answer ({error}); does another server hold it?"
        ) from error
    except sqlite3.DatabaseError as error:
        raise AdapterError(
            f"the adapter registry cannot be read ({error}); move registry.sqlite away"
        ) from error
