"""A server of chat completions that answers by a script, on a real socket: each call gets words, pauses and faults."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Script:
    """What the server does, and what it was asked."""

    def __init__(self) -> None:
        self.first_s = 0.0
        self.gap_s = 0.0
        self.fault: str | None = None
        """`status`, `error`, `cut`, `short`, `unfinished`, `silent`."""
        self.bodies: list[dict[str, object]] = []
        self.paths: list[str] = []
        self.num_at_once = 0
        self.most_at_once = 0
        self.num_tokens = 0
        self.num_rows = 1
        """Of each step that /metrics tells of: so many tokens make one."""
        self.step_ms = 8.0
        self.waits_at: frozenset[int] = frozenset()
        """Before its token with such a number an answer waits until /metrics has told of all that came before."""
        self.lock = threading.Lock()
        self.num_told = 0
        self.was_told = threading.Condition(self.lock)

    def count(self, number: int) -> None:
        """An answer's token is about to be sent."""
        with self.lock:
            if number in self.waits_at:
                before = self.num_tokens
                self.was_told.wait_for(lambda: self.num_told >= before, timeout=20)
            self.num_tokens += 1


def _handler(script: Script) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            body = _counters(script).encode()
            self.send_response(200 if self.path == "/metrics" else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"] or 0))
            with script.lock:
                script.paths.append(self.path)
            if not content:  # an act of an administrator
                self._refuse_or_agree()
                return
            body = json.loads(content)
            with script.lock:
                script.bodies.append(body)
                script.num_at_once += 1
                script.most_at_once = max(script.most_at_once, script.num_at_once)
            try:
                self._answer(body)
            finally:
                with script.lock:
                    script.num_at_once -= 1

        def _refuse_or_agree(self) -> None:
            self.send_response(429 if script.fault == "status" else 200)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def _answer(self, body: dict[str, object]) -> None:
            status = 429 if script.fault == "status" else 200
            self.send_response(status)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for data in self._events(body):
                self._chunk(data)
            self._chunk(b"")

        def _events(self, body: dict[str, object]) -> Iterator[bytes]:
            num = int(str(body["max_tokens"])) - (script.fault == "short")
            yield _event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            time.sleep(script.first_s)
            for number in range(0 if script.fault == "silent" else num):
                if number:
                    time.sleep(script.gap_s)
                script.count(number)
                content = f"w{number} {body.get('adapter')}"
                yield _event({"choices": [{"index": 0, "delta": {"content": content}}]})
            if script.fault == "error":
                yield _event({"error": {"message": "broke", "code": "internal"}})
            if script.fault != "unfinished":
                yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
            usage = {
                "prompt_tokens": 7,
                "completion_tokens": num,
                "prompt_tokens_details": {"cached_tokens": 3},
            }
            last = _event({"choices": [], "usage": usage})
            yield last[:9]  # an event may come in two pieces
            yield last[9:]
            if script.fault != "cut":
                yield b"data: [DONE]\n\n"

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    return Handler


def _event(frame: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(frame).encode() + b"\n\n"


def _counters(script: Script) -> str:
    """As our own server counts: steps of ``num_rows`` rows, each of which took ``step_ms`` in its forward."""
    with script.lock:
        num_steps = script.num_tokens // script.num_rows
        script.num_told = script.num_tokens
        script.was_told.notify_all()
    return (
        f"lorikeet_generation_tokens_total {script.num_tokens}\n"
        f"lorikeet_batch_rows_count {num_steps}\n"
        f"lorikeet_batch_rows_sum {num_steps * script.num_rows}\n"
        f'lorikeet_step_seconds_sum{{phase="forward"}} {num_steps * script.step_ms / 1000}\n'
        f'lorikeet_step_seconds_sum{{phase="plan"}} {num_steps * 0.001}\n'
    )


@contextmanager
def fake_sse_server() -> Iterator[tuple[str, Script]]:
    """Its URL, and the script that it follows."""
    script = Script()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(script))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", script
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
