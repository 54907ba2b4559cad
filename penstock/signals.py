"""Signals set one `stop` event: the first drains, the second kills."""

import asyncio
import logging
import os
import signal

_log = logging.getLogger(__name__)


class Stop:
    """Set once, with a reason. Every long wait of a process races against it."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.reason = ""

    def set(self, reason: str) -> None:
        if not self._event.is_set():
            self.reason = reason
            self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set()

    async def wait(self) -> None:
        """Returns when the process should stop. Its deadline is the operator's."""
        await self._event.wait()

    async def sleep(self, seconds: float) -> bool:
        """Waits for `seconds` or for the stop, whichever comes first; True if stopped."""
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            return False
        return True

    def on_signals(self) -> None:
        """SIGINT and SIGTERM drain; a second one of either ends the process at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled, number)

    def _signalled(self, number: signal.Signals) -> None:
        if self.is_set():
            _log.error("second %s: exiting at once", number.name)
            os._exit(128 + number)
        _log.info("%s: draining; send it again to exit at once", number.name)
        self.set(number.name)
