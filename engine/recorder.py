"""Recorder: device work that is recorded once and then repeated with one call. The seam under the graphs.

What is recorded may read and write only tensors that stay where they are; numbers that Python knew meanwhile are part
of the recording for ever. tests/support/tape.py is another one, which holds a CPU to the same rules.

Place in a request's way: step 8, under the runner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import torch

WARM_UPS: Final = 2
"""Passes before a recording: kernels are compiled and libraries take their workspaces, neither of which a recording
may do."""


class Recorder(Protocol):
    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run ``work`` as it is, then record it; what is returned repeats it over the same tensors.

        Raises whatever ``work`` or the device raises; nothing is recorded then.
        """


class CudaRecorder:
    """CUDA graphs in one memory pool: record the largest first. One replay at a time, in one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                work()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: the mover's threads may pin and copy meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay
