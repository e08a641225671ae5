"""What the tests of this room share."""

from __future__ import annotations

import pytest

from base.config import BaseConfig
from base.loader import open_processor
from base.processor import Processor


@pytest.fixture(scope="session")
def processor() -> Processor:
    """The embedded base's, without its weights."""
    return open_processor(BaseConfig())
