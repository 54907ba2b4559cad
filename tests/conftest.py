"""Options of the whole suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fault-length",
        choices=("short", "long"),
        default="short",
        help="how much of each fault tests/faults injects",
    )
