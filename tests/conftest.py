"""For every test: no network, no settings from the developer's own environment, no GPU unless there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before any library reads them: the hub is never asked, and tokenizers start no threads behind a fork.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _name in [name for name in os.environ if name.startswith("LORIKEET_")]:
    del os.environ[_name]

import pytest  # noqa: E402 (after the environment is set)
import torch  # noqa: E402

# Before triton is imported, which settles it for the process: without a device its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
from hypothesis import HealthCheck, settings  # noqa: E402

# A shared machine is slow at times, which says nothing about the code; so no deadline for one example.
settings.register_profile("lorikeet", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lorikeet")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch's, for one test; other counts by indirect parameters."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
