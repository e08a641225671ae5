"""The process in which a grammar is tried: run as a file by grammar_trial, never imported. Exit 0 says it is cheap.

Imports nothing of ours, so that it starts in 0.1 s. Place in a request's way: before a grammar is compiled.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading

import llguidance

STACK_BYTES = 512 * 1024 * 1024
"""As in engine/grammar.py, which says why."""


def main() -> None:
    cpu_s, num_bytes = (int(argument) for argument in sys.argv[1:3])
    letters, source = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(5)  # the step goes first
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_compile, args=(letters, source))
    thread.start()
    thread.join()


def _compile(letters: str, source: str) -> None:
    """What goes wrong in an orderly way is not this process's business: the compiler will meet it again, and say so."""
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer(letters), source, log_level=0)
    matcher.compute_bitmask()


if __name__ == "__main__":
    main()
