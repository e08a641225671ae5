"""A grammar's trial: it is compiled in a process of its own, with bounded time and memory, before this one compiles it.

llguidance bounds what a step costs, not what compiling does: a schema of 45 bytes (``multipleOf: 99999989``) or twenty
patterns under one ``allOf`` takes minutes and gigabytes, and no thread can be told to stop. What passes here compiles
here at the same price. Knows nothing of specs. Place in a request's way: before a grammar is compiled.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from engine.errors import GrammarError

MAX_CPU_S: Final = 3
MAX_BYTES: Final = 1024 * 1024 * 1024  # of address space, the interpreter's own and a deep stack included
MAX_WALL_S: Final = 8.0  # on a machine that is busy
CHILD: Final = Path(__file__).with_name("grammar_child.py")


class GrammarTrial:
    """Any thread may call it; each trial is one short-lived process, about 0.1 s."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._letters = _letters_of(tokenizer)

    def run(self, source: str) -> None:
        """Raises GrammarError where compiling ``source`` is too expensive. What is merely wrong passes."""
        command = [sys.executable, "-I", str(CHILD), str(MAX_CPU_S), str(MAX_BYTES)]
        task = json.dumps([self._letters, source]).encode()
        try:
            # its output is nobody's: what llguidance prints quotes the schema
            done = subprocess.run(
                command,
                input=task,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=MAX_WALL_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise _too_expensive() from error
        if done.returncode != 0:
            raise _too_expensive()


def _too_expensive() -> GrammarError:
    return GrammarError(
        f"the schema takes over {MAX_CPU_S} s or {MAX_BYTES // 2**20} MiB to compile: simplify it"
    )


def _letters_of(tokenizer: Tokenizer) -> str:
    """The tokenizer's single letters and its special tokens alone: what a grammar costs does not hang on the rest."""
    whole = json.loads(tokenizer.to_str())
    letters = sorted(token for token in whole["model"]["vocab"] if len(token) == 1)
    added = [{**token, "id": len(letters) + i} for i, token in enumerate(whole["added_tokens"])]
    vocab = {letter: i for i, letter in enumerate(letters)}
    model = {**whole["model"], "vocab": vocab, "merges": []}
    return json.dumps({**whole, "model": model, "added_tokens": added})
