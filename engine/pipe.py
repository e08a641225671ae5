"""Pipe: values between this process and its own engine process, over a socket that nobody else can open.

Owns the framing and the encoding. A frame is 8 bytes of length and a pickle of a tuple of values; what is unpickled can
only be made of our own value classes and a few plain ones, so that even a process gone mad sends data and not code.
Sending never blocks: a thread of its own encodes and writes, and puts all that waits into one frame.

Place in a request's way: steps 4 and 11, where the engine has a process of its own.
"""

from __future__ import annotations

import io
import pickle
import queue
import socket
import threading
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

HEADER_BYTES: Final = 8
CLOSE_TIMEOUT_S: Final = 5.0  # for what still has to be written
OUR_ROOMS: Final = ("adapters", "base", "engine")
PLAIN: Final = frozenset(
    {
        ("builtins", "set"),
        ("builtins", "frozenset"),
        ("collections", "Counter"),
        ("collections", "OrderedDict"),
        ("builtins", "RuntimeError"),
        ("builtins", "ValueError"),
    }
)
"""Classes of others that may cross."""

Rebuilt = tuple[Callable[..., object], tuple[object, ...]]


class Pipe:
    """One end. ``send`` from any thread; ``receive`` from one."""

    def __init__(self, end: socket.socket, name: str) -> None:
        self._socket = end
        self._outbox: queue.SimpleQueue[object | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_all, name=f"lorikeet-{name}-writer", daemon=True)
        self._writer.start()

    def send(self, value: object) -> None:
        """Queued; lost if the other end is gone, which ``receive`` tells."""
        self._outbox.put(value)

    def receive(self, timeout_s: float | None = None) -> tuple[object, ...]:
        """The values of the next frame. Raises EOFError when the other end is gone, TimeoutError when it is silent."""
        self._socket.settimeout(timeout_s)
        try:
            length = int.from_bytes(self._read(HEADER_BYTES), "little")
            return decode(self._read(length))
        except TimeoutError:
            raise
        except OSError as error:
            raise EOFError(str(error)) from error

    def close(self) -> None:
        """Write what is queued, then hang up."""
        self._outbox.put(None)
        self._writer.join(CLOSE_TIMEOUT_S)
        self._socket.close()

    def _read(self, num_bytes: int) -> bytearray:
        data = bytearray(num_bytes)
        view = memoryview(data)
        while view:
            num_read = self._socket.recv_into(view)
            if num_read == 0:
                raise EOFError("the other process hung up")
            view = view[num_read:]
        return data

    def _write_all(self) -> None:
        while (first := self._outbox.get()) is not None:
            values, is_last = [first], False
            while not self._outbox.empty():
                value = self._outbox.get()
                if value is None:
                    is_last = True
                    break
                values.append(value)
            data = encode(tuple(values))
            try:
                self._socket.sendall(len(data).to_bytes(HEADER_BYTES, "little"))
                self._socket.sendall(data)
            except OSError:
                return  # the reader of this end learns it, too
            if is_last:
                return


# ---- the encoding ----------------------------------------------------------------------------------------------


def encode(values: tuple[object, ...]) -> bytes:
    buffer = io.BytesIO()
    _Writer(buffer, protocol=5).dump(values)
    return buffer.getvalue()


def decode(data: bytes | bytearray) -> tuple[object, ...]:
    """Raises pickle.UnpicklingError for what is not made of our values."""
    values: tuple[object, ...] = _Reader(io.BytesIO(data)).load()
    return values


class _Writer(pickle.Pickler):
    def reducer_override(self, value: object) -> Rebuilt:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            return _tensor, (
                str(value.dtype).removeprefix("torch."),
                tuple(value.shape),
                flat.numpy().tobytes(),
            )
        if isinstance(value, BaseException):
            return _error, (type(value), value.args, dict(vars(value)))
        as_usual: Rebuilt = NotImplemented
        return as_usual


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if module.partition(".")[0] in OUR_ROOMS or (module, name) in PLAIN:
            found = super().find_class(module, name)
            if isinstance(found, type) or found in (_tensor, _error):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} may not cross between the processes")


def _tensor(dtype: str, shape: tuple[int, ...], data: bytes) -> Tensor:
    kind = getattr(torch, dtype)
    if not data:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(bytearray(data), dtype=kind).reshape(shape)


def _error(kind: type[BaseException], args: tuple[object, ...], fields: dict[str, object]) -> BaseException:
    """Without calling ``__init__``, whose parameters are not ``args``; its cause and traceback stay behind."""
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(fields)
    return error
