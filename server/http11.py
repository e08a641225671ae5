"""HttpProtocol: uvicorn over h11, where a stream's later pieces pass by h11's state machine.

h11 is here because it reads requests strictly and bounds their heads, which httptools under uvicorn does not. But every
piece of a body goes through the whole of its state machine, and leaves it as it was: so once h11 has framed a piece as
a chunk, those that follow it are framed here, the same way. Place in a request's way: around all of it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState


class StreamingConnection(h11.Connection):
    """Writes what h11 writes, byte for byte."""

    _is_chunking = False
    """The last thing sent was a piece of a body, and h11 framed it, or would have, as a chunk."""

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        """Raises h11.LocalProtocolError as h11 does."""
        if self._is_chunking and type(event) is h11.Data and event.data:
            return [b"%x\r\n" % len(event.data), event.data, b"\r\n"]
        self._is_chunking = False
        pieces = super().send_with_data_passthrough(event)
        self._is_chunking = type(event) is h11.Data and pieces is not None and len(pieces) == 3
        return pieces


class HttpProtocol(H11Protocol):
    """One connection."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        limit = config.h11_max_incomplete_event_size
        self.conn = (
            StreamingConnection(h11.SERVER) if limit is None else StreamingConnection(h11.SERVER, limit)
        )
