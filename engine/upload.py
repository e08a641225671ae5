"""upload: numbers from the host to the device without waiting for it.

``torch.tensor(..., device="cuda")`` waits until all that the device was given before has run. A copy that is allowed to
overlap does not, and is safe from ordinary memory: its bytes are taken before the call returns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence[float] | Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[N] of ``dtype`` on ``device``."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
