"""Tape: a Recorder for CPUs that keeps to a CUDA graph's rules, so that what would go stale there goes stale here.

While it records, it writes down every operation with the tensors and the numbers that it was given; playing it runs
those operations again, into the same tensors, and no Python of the recorded code. Like a capture it refuses to look at
a tensor's value and to take anything new from the host. Triton's kernels are interpreted, and are written down whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.recorder import WARM_UPS

FORBIDDEN = ("item", "_local_scalar_dense", "nonzero", "lift_fresh", "equal", "is_nonzero")


class Tape:
    """A Recorder."""

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_played = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        for _ in range(WARM_UPS):
            work()
        head = _Head()
        with head.kernels(), head:
            work()
        self.num_recorded += 1

        def play() -> None:
            self.num_played += 1
            for repeat in head.operations:
                repeat()

        return play


class _Head(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Callable[[], None]] = []
        self._is_in_kernel = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if self._is_in_kernel:
            return func(*args, **options)
        if func.overloadpacket.__name__ in FORBIDDEN:
            raise RuntimeError(f"{func} is not permitted while a graph is recorded")
        made = func(*args, **options)
        given = {_place(tensor) for tensor in _tensors((args, options))}
        fresh = [tensor for tensor in _tensors(made) if _place(tensor) not in given]
        if func._schema.is_mutable:
            self.operations.append(lambda: func(*args, **options))
        elif fresh:
            self.operations.append(lambda: _again(func, args, options, made))
        return made

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Also write down what Triton's interpreter runs."""
        from triton.runtime.interpreter import InterpretedFunction

        run = InterpretedFunction.run

        def write_down(kernel: Any, *args: Any, **options: Any) -> Any:
            self.operations.append(lambda: run(kernel, *args, **options))
            self._is_in_kernel = True
            try:
                return run(kernel, *args, **options)
            finally:
                self._is_in_kernel = False

        with patch.object(InterpretedFunction, "run", write_down):
            yield


def _again(func: Any, args: Sequence[Any], options: Mapping[str, Any], made: Any) -> None:
    """Where the results were, they are again."""
    for old, new in zip(_tensors(made), _tensors(func(*args, **options)), strict=True):
        old.copy_(new)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _place(tensor: Tensor) -> int:
    """Equal for views of one memory; oneDNN's own tensors have none that can be seen, and no views."""
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()
