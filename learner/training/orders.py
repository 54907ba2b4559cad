"""What the loop does next, agreed by all ranks.

Rank 0 asks the coordinator; then every rank learns in one small all-reduce what was
decided, so that no rank waits in a collective that another never enters. A stop that
any rank has noticed stops all of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from learner.training.batch import Batch
from learner.training.coordinator import Coordinator, NextBatch
from learner.training.parallel import Ranks
from penstock.errors import PeerLost, ProtocolError

_log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""How long one question for a batch may wait: also how soon a stop is noticed."""
_FETCH_SECONDS = 30.0
"""How long a rank waits for a batch that rank 0 has been given already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    batch: Batch
    wait_seconds: float
    """From the end of the step before until this batch came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteCheckpoint:
    """An operator asked for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """No batch came within POLL_SECONDS; the question is asked again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """The run stops before its last step."""


Order = Train | WriteCheckpoint | Wait | Leave


class StopFlag(Protocol):
    def is_set(self) -> bool: ...


class Progress(Protocol):
    """Where training is: the loop moves it, the others read it."""

    epoch: int
    step: int


class Orders:
    """Yields orders until the last step is trained or a stop is agreed on."""

    def __init__(self, coordinator: Coordinator, ranks: Ranks, progress: Progress, stop: StopFlag) -> None:
        self._coordinator = coordinator
        self._ranks = ranks
        self._progress = progress
        self._stop = stop
        self._asked_aside = False
        """The coordinator says once that a checkpoint is wanted, to whichever rank asks next."""

    def until(self, num_steps: int) -> Iterator[Order]:
        """Consumes NextBatch; waits for the coordinator; woken by a batch, a request or a stop."""
        since = time.monotonic()
        while self._progress.step < num_steps:
            answer = self._ask() if self._ranks.is_first else NextBatch(batch=None)
            ready, checkpoint, stop = self._agree(answer)
            if stop:
                yield Leave()
                return
            if checkpoint:
                yield WriteCheckpoint()
            if ready:
                yield Train(batch=self._fetch(answer), wait_seconds=time.monotonic() - since)
                since = time.monotonic()
            elif not checkpoint:
                yield Wait()

    def _ask(self) -> NextBatch:
        try:
            return self._coordinator.next_batch(
                epoch=self._progress.epoch, step=self._progress.step, wait_seconds=POLL_SECONDS
            )
        except PeerLost:
            if self._stop.is_set():
                return NextBatch(batch=None, stop_requested=True)
            raise

    def _agree(self, answer: NextBatch) -> tuple[bool, bool, bool]:
        stop = answer.stop_requested or self._stop.is_set()
        checkpoint = answer.checkpoint_requested or self._asked_aside
        self._asked_aside = False
        mine = torch.tensor([answer.batch is not None, checkpoint, stop], dtype=torch.int64)
        ready, checkpoint, stopping = self._ranks.maximum(mine).bool().tolist()
        return ready, checkpoint, stopping

    def _fetch(self, answer: NextBatch) -> Batch:
        """The other ranks ask for what rank 0 got; all compare."""
        batch = answer.batch
        give_up = time.monotonic() + _FETCH_SECONDS
        while batch is None:
            if time.monotonic() > give_up:
                raise ProtocolError(
                    f"rank 0 has the batch of step {self._progress.step}; this rank is not given it"
                )
            answer = self._ask()
            batch, self._asked_aside = answer.batch, self._asked_aside or answer.checkpoint_requested
        fingerprint = torch.tensor([batch.fingerprint(), -batch.fingerprint()], dtype=torch.int64)
        most, least = self._ranks.maximum(fingerprint).tolist()
        if most != -least:
            raise ProtocolError(f"the ranks were given different batches for step {self._progress.step}")
        return batch
