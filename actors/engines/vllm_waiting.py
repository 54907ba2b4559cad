"""Runs in vLLM's EngineCore, on CPUs: lets it sleep while its workers compute a step.

EngineCore reads the workers' answers from shared memory. vLLM spins there for a second before it
waits for a message, which takes a whole core from whoever computes on the same machine. Here it
spins for as long as answers that follow each other closely may take, and then waits.
"""

from __future__ import annotations

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

_SPIN_SECONDS = 0.003
"""ZeroMQ may drop the message about an answer that comes within a millisecond of the one before it."""


def sleep_during_steps() -> None:
    """From the next wait on, also where a queue was opened before."""
    wait = SpinCondition.wait

    def wait_asleep(self: SpinCondition, timeout_ms: int | None = None) -> None:
        self.busy_loop_s = _SPIN_SECONDS
        wait(self, timeout_ms)

    SpinCondition.wait = wait_asleep
