from __future__ import annotations

import pytest

from .bench import FaultLength


@pytest.fixture
def fault_length(pytestconfig: pytest.Config) -> FaultLength:
    return FaultLength(pytestconfig.getoption("--fault-length"))
