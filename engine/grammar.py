"""Grammars: a JSON schema (or Lark, or a regular expression) -> for each step the set of tokens that may come next.

GrammarCompiler owns the tokenizer's index and a small cache; a Grammar is compiled and shared; a GrammarState is one
sequence's place in it. Knows nothing of requests or logits. Each grammar fails alone: with GrammarError, never a panic.
Place in a request's way: compiled before the request is submitted, followed by the sampler at each of its steps.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Final

import llguidance
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from engine.errors import GrammarError
from engine.grammar_trial import GrammarTrial
from engine.sampling import GrammarSpec

MAX_SOURCE_BYTES: Final = 64 * 1024
MAX_COMPILE_S: Final = 10.0
MAX_CACHED: Final = 64
MAX_MESSAGE_CHARS: Final = 400
TOOL_CALL_OPEN: Final = "<tool_call>"

# llguidance descends 10 KB of stack for each link of a chain of $refs, and 64 KiB of schema can hold thousands of
# links: on an ordinary thread's 8 MiB that is a segmentation fault of the whole process. Address space only; pages are
# taken as they are touched.
COMPILE_STACK_BYTES: Final = 512 * 1024 * 1024

# Between JSON tokens: room for pretty-printing nine levels deep, but a model cannot go on with spaces for ever.
WHITESPACE_PATTERN: Final = r"[\x20\x0A\x0D\x09]{0,20}"


class GrammarState:
    """One sequence's place in a grammar. Used by the engine's thread only."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._bits: NDArray[np.uint8] = np.zeros((vocab_size + 31) // 32 * 4, dtype=np.uint8)
        self._has_ended = False

    def mask(self) -> Tensor:
        """[V] bool, on the CPU: the tokens that may come next; the end tokens among them where the grammar may end.

        Raises GrammarError when the grammar cannot be followed any further.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.size)
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed: {_shorten(self._matcher.get_error())}")
        bits = np.unpackbits(self._bits, count=self._vocab_size, bitorder="little")
        return torch.from_numpy(bits).view(torch.bool)

    def advance(self, token_id: int) -> None:
        """The token was generated. One that the grammar does not allow makes the next ``mask`` raise."""
        if self._has_ended:
            return
        self._has_ended = token_id in self._eos_token_ids
        self._matcher.consume_token(token_id)

    @property
    def is_complete(self) -> bool:
        """Nothing but an end token may follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()


class Grammar:
    """Compiled, immutable, shared by all sequences that ask for it; any thread may start one."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._lock = threading.Lock()

    def start(self) -> GrammarState:
        """A new place at the beginning; microseconds."""
        with self._lock:
            copy = self._matcher.deep_copy()
        return GrammarState(copy, self._vocab_size, self._eos_token_ids)


class GrammarCompiler:
    """Compiles on a thread of its own, one at a time, and keeps the latest MAX_CACHED. Any thread may call it.

    What a client wrote is tried in another process first: one grammar that cannot be compiled would hold up all others.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Sequence[int], vocab_size: int) -> None:
        """``vocab_size`` is the model's, which may exceed the tokenizer's; the ids beyond are never allowed.

        The tokenizer's index (a second for 150,000 tokens) is made with the first grammar.
        """
        self._tokenizer = tokenizer
        self._eos_token_ids = tuple(eos_token_ids)
        self._vocab_size = vocab_size
        self._trial = GrammarTrial(tokenizer)
        self._index: llguidance.LLTokenizer | None = None
        self._cache: OrderedDict[GrammarSpec, Grammar] = OrderedDict()
        self._cache_lock = threading.Lock()
        self._work_lock = threading.Lock()

    def compile(self, spec: GrammarSpec) -> Grammar:
        """Raises GrammarError saying what is not supported, too large, or wrong."""
        with self._cache_lock:
            grammar = self._cache.get(spec)
            if grammar is not None:
                self._cache.move_to_end(spec)
                return grammar
        source = self._source(spec)
        if spec.kind != "json_object":
            self._trial.run(source)
        grammar = _on_deep_stack(lambda: self._build(source))
        with self._cache_lock:
            self._cache[spec] = grammar
            while len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        return grammar

    def _source(self, spec: GrammarSpec) -> str:
        """The grammar in llguidance's own form."""
        num_bytes = len(spec.source.encode("utf-8", "surrogatepass"))
        if num_bytes > MAX_SOURCE_BYTES:
            raise GrammarError(
                f"the schema has {num_bytes} bytes; the limit is {MAX_SOURCE_BYTES}: shorten it"
            )
        match spec.kind:
            case "json_object":
                return _json_grammar('{"type": "object"}')
            case "json_schema":
                return _json_grammar(spec.source)
            case "regex":
                return str(llguidance.LLMatcher.grammar_from_regex(spec.source))
            case "lark":
                if TOOL_CALL_OPEN in spec.source and self._tokenizer.token_to_id(TOOL_CALL_OPEN) is None:
                    raise GrammarError(
                        "this base's tokenizer has no <tool_call> token: a tool call cannot be enforced"
                    )
                return str(llguidance.LLMatcher.grammar_from_lark(spec.source))

    def _build(self, source: str) -> Grammar:
        """On the compile thread. The first mask is computed too: it finds grammars that no token can begin."""
        with self._work_lock:
            matcher = llguidance.LLMatcher(self._tokens(), source, log_level=0, limits=_limits())
            if matcher.is_error():
                raise GrammarError(f"the schema cannot be enforced: {_shorten(matcher.get_error())}")
            grammar = Grammar(matcher, self._vocab_size, self._eos_token_ids)
            grammar.start().mask()
            return grammar

    def _tokens(self) -> llguidance.LLTokenizer:
        if self._index is None:
            self._index = llguidance.LLTokenizer(
                self._tokenizer.to_str(), n_vocab=self._vocab_size, eos_token=list(self._eos_token_ids)
            )
        return self._index


def json_options(is_lenient: bool = False) -> dict[str, object]:
    """What stands under "x-guidance" at a schema's root; lenient ignores the keywords that cannot be enforced."""
    return {"whitespace_pattern": WHITESPACE_PATTERN, "lenient": is_lenient}


def _json_grammar(schema_text: str) -> str:
    try:
        schema = json.loads(schema_text)
    except (ValueError, RecursionError) as error:
        raise GrammarError("the schema is not JSON, or is nested too deeply") from error
    if not isinstance(schema, dict):
        raise GrammarError("the schema must be a JSON object")
    schema["x-guidance"] = json_options()
    try:
        return str(llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    except ValueError as error:
        raise GrammarError(f"the schema cannot be enforced: {_shorten(str(error))}") from error


def _limits() -> llguidance.LLParserLimits:
    """llguidance's own limits: about 20 ms to build a lexer, 15 ms and 50,000 items a step. Errors quote no text."""
    return llguidance.LLParserLimits(verbose_errors=False)


def _shorten(message: str) -> str:
    """The reason without the grammar that llguidance quotes around it."""
    lines = [line.strip() for line in message.splitlines()] or [""]
    reason = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", lines[0])
    details = [line for line in lines[1:] if line.startswith("error:")]
    text = " ".join([reason, *details]).replace("NoExtensionBias", "no text can satisfy it")
    return text[:MAX_MESSAGE_CHARS]


def _on_deep_stack(work: Callable[[], Grammar]) -> Grammar:
    """Run ``work`` on a new thread with a deep stack and wait. Raises what it raises; a panic is a GrammarError."""
    outcome: Future[Grammar] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001  (a Rust panic is a BaseException; it is handed to the waiter)
            outcome.set_exception(error)

    _start_deep(threading.Thread(target=run, name="lorikeet-grammar", daemon=True))
    try:
        return outcome.result(timeout=MAX_COMPILE_S)
    except FutureTimeout as error:
        raise GrammarError(f"the schema took over {MAX_COMPILE_S:g} s to compile: simplify it") from error
    except GrammarError:
        raise
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise GrammarError("the schema made the grammar compiler fail: simplify it") from error
        raise


_stack_size_lock = threading.Lock()


def _start_deep(thread: threading.Thread) -> None:
    """The size is a setting of the process; it is put back at once."""
    with _stack_size_lock:
        previous = threading.stack_size(COMPILE_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(previous)
