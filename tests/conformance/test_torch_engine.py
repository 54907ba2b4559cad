"""The torch engine passes the suite that every engine passes."""

from __future__ import annotations

from pathlib import Path

from actors.engines.base import Engine
from actors.engines.torch import TorchEngine
from penstock.trajectory import InstallMode
from tests.conformance.engine_suite import EngineSuite


class TestTorchEngine(EngineSuite):
    def make_engine(
        self, folder: Path, *, num_slots: int, max_context: int, install_mode: InstallMode
    ) -> Engine:
        return TorchEngine(
            folder,
            num_slots=num_slots,
            max_context=max_context,
            install_mode=install_mode,
            stream_seconds=0.0,
        )
