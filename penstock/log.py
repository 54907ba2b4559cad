"""One line an event, one logger a module."""

import logging
import sys
import time


class _Formatter(logging.Formatter):
    converter = time.gmtime

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S")


def configure(level: str = "INFO") -> None:
    """Sends this process's log to standard error. Called once, by each program's main."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("httpx", "asyncio", "matplotlib", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
