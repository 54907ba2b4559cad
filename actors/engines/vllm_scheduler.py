"""Runs in vLLM's EngineCore: keeps the caches of different versions apart.

vLLM names a cached block by its tokens and the request's salt, and looks a request's
blocks up when it is first scheduled. The salt here is the number of switches so far.
It is given when a request arrives, and given anew to those that still wait when
weights are switched, so that nothing that begins under a version reads what another
one computed. Both happen in EngineCore's thread, in order with the switch.

`keep` and `recompute` are what vLLM is told to make its scheduler with.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from actors.engines.vllm_waiting import sleep_during_steps
from penstock.trajectory import InstallMode


def keep(**arguments: Any) -> Scheduler:
    return _make(InstallMode.KEEP, arguments)


def recompute(**arguments: Any) -> Scheduler:
    return _make(InstallMode.RECOMPUTE, arguments)


def _make(mode: InstallMode, arguments: dict[str, Any]) -> Scheduler:
    vllm_config = arguments["vllm_config"]
    if vllm_config.device_config.device_type == "cpu":
        sleep_during_steps()
    overlapping = vllm_config.scheduler_config.async_scheduling
    scheduler = (_VersionedAsyncScheduler if overlapping else _VersionedScheduler)(**arguments)
    scheduler.install_mode = mode
    return scheduler


class _Versioned:
    """Mixed into a scheduler, whose methods it extends."""

    install_mode: InstallMode
    waiting: Any
    num_switches = 0

    def set_pause_state(self, pause_state: PauseState) -> None:
        """The end of a pause is the end of a switch."""
        super().set_pause_state(pause_state)  # type: ignore[misc]
        if pause_state is PauseState.UNPAUSED:
            self._begin_version()

    def add_request(self, request: Request) -> None:
        self._give_salt(request)
        super().add_request(request)  # type: ignore[misc]

    def _begin_version(self) -> None:
        self.num_switches += 1
        if self.install_mode is InstallMode.RECOMPUTE:
            # Running requests wait again, without keys and values.
            self.reset_prefix_cache(reset_running_requests=True)  # type: ignore[attr-defined]
        for request in self.waiting:
            if self.install_mode is InstallMode.RECOMPUTE or request.status is not RequestStatus.PREEMPTED:
                self._give_salt(request)

    def _give_salt(self, request: Request) -> None:
        salt = str(self.num_switches)
        if request.cache_salt != salt:
            request.cache_salt = salt
            request.block_hashes.clear()
            request.update_block_hashes()


class _VersionedScheduler(_Versioned, Scheduler):  # type: ignore[misc]
    pass


class _VersionedAsyncScheduler(_Versioned, AsyncScheduler):  # type: ignore[misc]
    pass
