"""The event loop that serves: uvloop where it is installed, asyncio's own elsewhere. They differ in cost alone.

Not only is a token cheaper there. Waking the loop and writing to its sockets do not let go of the interpreter, so the
engine's thread need not win it back from the loop in the midst of a step. Place in a request's way: under all of it.
"""

from __future__ import annotations

import asyncio


def new_event_loop() -> asyncio.AbstractEventLoop:
    """The caller runs it and closes it."""
    try:
        import uvloop
    except ModuleNotFoundError:  # Windows, and interpreters that nobody builds it for
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
