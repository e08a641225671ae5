"""What the engine can answer instead of tokens.

EngineError
├── QueueFull            nothing was allocated; retry_after_s says when to come back
├── Draining             the server is stopping
├── EngineDown           the engine died or is restarting
├── ContextTooLong       the prompt (plus one token) exceeds the context or the KV cache
├── DeadlineExceeded     a queue, first-token or total deadline passed
├── NumericalError       the model gave NaN for this request alone
├── AdapterUnavailable   its adapter could not be loaded (carries the AdapterError)
├── GrammarError         its schema or grammar cannot be compiled, or cannot be followed any further
├── OutOfMemory          the device has no room for it, even alone
└── StepFailed           this request made its step throw
"""

from __future__ import annotations


class EngineError(Exception):
    """Root of the tree."""


class QueueFull(EngineError):
    def __init__(self, message: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class Draining(EngineError):
    pass


class EngineDown(EngineError):
    pass


class ContextTooLong(EngineError):
    def __init__(self, num_tokens: int, limit: int) -> None:
        self.num_tokens = num_tokens
        self.limit = limit
        super().__init__(f"the prompt has {num_tokens} tokens; this server's limit is {limit}: shorten it")


class DeadlineExceeded(EngineError):
    pass


class NumericalError(EngineError):
    pass


class AdapterUnavailable(EngineError):
    def __init__(self, ref_text: str, cause: Exception) -> None:
        self.cause = cause
        super().__init__(f"adapter {ref_text} could not be loaded: {cause}")


class GrammarError(EngineError):
    pass


class OutOfMemory(EngineError):
    pass


class StepFailed(EngineError):
    pass
