"""One row of each format, and what it means; shared by the tests of this room."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Final

from tests.support.pictures import picture
from training.data.formats import Format


def png(seed: int = 1, width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    picture(seed, width, height).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def put_pictures(folder: Path) -> None:
    """`a.png` and `b.png`, of different sizes."""
    (folder / "a.png").write_bytes(png(1))
    (folder / "b.png").write_bytes(png(2, 60, 90))


CALL: Final = {
    "id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "kite"}'},
}  # fmt: skip
TOOL: Final = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}

ROWS: Final[dict[str, tuple[Format, dict[str, object]]]] = {
    "alpaca": (Format.ALPACA, {"instruction": "Translate.", "input": "a kite", "output": "un cerf-volant"}),
    "alpaca_whole": (
        Format.ALPACA,
        {
            "instruction": "And this? <image>", "input": "", "output": "A boat.", "system": "Be brief.",
            "history": [["<image>What is it?", "A kite."]], "images": ["a.png", "b.png"],
        },
    ),
    "sharegpt": (
        Format.SHAREGPT,
        {
            "conversations": [
                {"from": "system", "value": "You see."},
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A kite."},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "Yes, I am."},
            ],
            "images": ["a.png"],
        },
    ),
    "role_content": (
        Format.ROLE_CONTENT,
        {
            "messages": [
                {"role": "user", "content": "Compare <image> and <image>"},
                {"role": "assistant", "content": "The same."},
            ],
            "images": ["a.png", "b.png"],
        },
    ),
    "openai": (
        Format.OPENAI,
        {
            "messages": [
                {"role": "developer", "content": "Answer in words."},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is it?"},
                        {"type": "image_url", "image_url": {"url": data_url(png()), "detail": "low"}},
                        {"type": "image_url", "image_url": {"url": "b.png"}},
                    ],
                },
                {"role": "assistant", "content": "A kite.", "weight": 0},
                {"role": "user", "content": "Say <image> in words."},
                {"role": "assistant", "content": "A tag."},
            ]
        },
    ),
    "openai_tools": (
        Format.OPENAI,
        {
            "tools": [TOOL],
            "messages": [
                {"role": "user", "content": "What is a kite?"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "call_1", "content": "A toy that flies."},
                {"role": "assistant", "content": "A toy that flies."},
            ],
        },
    ),
    "query_response": (
        Format.QUERY_RESPONSE,
        {
            "query": "And its colour?", "response": "Red.", "history": [["What is it?", "A kite."]],
            "images": ["a.png"], "loss": [False, True],
        },
    ),
    "prompt_completion": (Format.PROMPT_COMPLETION, {"prompt": "Once upon", "completion": " a time\n"}),
    "prompt_completion_messages": (
        Format.PROMPT_COMPLETION,
        {
            "prompt": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello."},
                {"role": "user", "content": "Bye"},
            ],
            "completion": [{"role": "assistant", "content": "See you."}],
        },
    ),
    "newlines": (  # the answer's first newline merges with the template's own once it is history
        Format.SHAREGPT,
        {
            "conversations": [
                {"from": "human", "value": "Write two lines."},
                {"from": "gpt", "value": "\n\none\ntwo\n"},
                {"from": "human", "value": "\nOnce more "},
                {"from": "gpt", "value": "  three"},
            ]
        },
    ),
}  # fmt: skip


def write(folder: Path, *rows: object, name: str = "rows.jsonl") -> Path:
    """Rows as JSON lines; a string is written as it is."""
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
