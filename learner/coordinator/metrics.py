"""Prometheus metrics over HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import prometheus_client
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from learner.coordinator.breaker import BreakerState
from learner.coordinator.broadcasts import Broadcasts
from learner.coordinator.core import Coordinator
from learner.coordinator.evaluation.status import evaluation_metrics
from learner.coordinator.refusals import refused
from penstock.errors import ConfigError, FaultKind
from penstock.rpc import is_loopback, split_address


class _RunCollector(Collector):
    """Reads what the coordinator's tick left, about a second old. Runs in the HTTP thread."""

    def __init__(self, coordinator: Coordinator, broadcasts: Broadcasts) -> None:
        self._coordinator = coordinator
        self._membership = broadcasts.membership

    def collect(self) -> Iterator[Metric]:
        coordinator = self._coordinator
        totals, version = coordinator.totals, coordinator.scheduler.version
        yield _gauge("penstock_ledger_imbalance", "Accepted minus accounted for; 0, or something was lost.",
                     totals.imbalance)  # fmt: skip
        yield _gauge("penstock_version_step", "Newest published version.", version.step if version else 0)
        yield _gauge("penstock_actors", "Connected actors.", len(coordinator.scheduler.fleet))
        yield _gauge("penstock_actors_wanted", "Actors like these that the learner could use.",
                     coordinator.actors_wanted())  # fmt: skip
        yield _gauge("penstock_rollouts_handed_over", "Partial rollouts of lost actors that were kept.",
                     totals.handed_over)  # fmt: skip
        yield _gauge("penstock_rollouts_continued", "Leases that went on from one, since the start.",
                     coordinator.scheduler.grants.num_continued)  # fmt: skip
        streams = coordinator.scheduler.board.streams
        yield _gauge("penstock_streamed_bytes", "Of rollouts that are being played.", streams.num_bytes)
        yield _gauge("penstock_streams_refused", "Rollouts that found no room there, since the start.",
                     streams.num_refused)  # fmt: skip
        yield _gauge("penstock_tokens_per_second", "Sampled by all actors.", coordinator.tokens_per_second())
        yield _gauge(
            "penstock_groups_open", "Groups leased and not trained.", len(coordinator.scheduler.groups)
        )
        yield _gauge(
            "penstock_lag_max_trained", "Highest lag trained on, in versions.", totals.max_lag_trained
        )
        states = GaugeMetricFamily(
            "penstock_trajectories", "Accepted trajectories by state.", labels=["state"]
        )
        for state, count in totals.by_state.items():
            states.add_metric([state], count)
        yield states
        rejected = GaugeMetricFamily("penstock_rejected", "Refused items by code.", labels=["code"])
        for code, count in totals.rejected.items():
            rejected.add_metric([code], count)
        yield rejected
        calls = GaugeMetricFamily(
            "penstock_calls_refused", "Of actors, trainers, operators and strangers, since the start.",
            labels=["status"],
        )  # fmt: skip
        for status, count in refused.by_status.copy().items():
            calls.add_metric([status], count)
        yield calls
        yield from self._environments()
        yield from self._broadcasts()
        yield from evaluation_metrics(coordinator.scheduler.evaluations)
        step = GaugeMetricFamily("penstock_step", "What the newest step measured.", labels=["measure"])
        for name, value in coordinator.step_metrics.items():
            step.add_metric([name], value)
        yield step

    def _broadcasts(self) -> Iterator[Metric]:
        membership = self._membership
        standing = membership.standing
        yield _gauge("penstock_broadcast_members", "Actors in the group that versions are broadcast to.",
                     len(standing.seats) if standing else 0)  # fmt: skip
        yield _gauge("penstock_broadcast_groups", "Groups that have come together, since the start.",
                     membership.num_groups)  # fmt: skip
        yield _gauge("penstock_broadcasts", "Versions that were broadcast whole, since the start.",
                     membership.num_broadcasts)  # fmt: skip
        fallbacks = GaugeMetricFamily(
            "penstock_broadcast_fallbacks",
            "Groups and broadcasts that failed, so that actors pulled, since the start.",
            labels=["reason"],
        )
        for reason, count in membership.fallbacks.copy().items():
            fallbacks.add_metric([reason], count)
        yield fallbacks

    def _environments(self) -> Iterator[Metric]:
        faults = GaugeMetricFamily(
            "penstock_environment_faults", "Failed rollouts, since the start.", labels=["environment", "kind"]
        )
        left_out = GaugeMetricFamily(
            "penstock_environment_left_out", "1 while it is left out or tried again.", labels=["environment"]
        )
        cut = GaugeMetricFamily(
            "penstock_environment_groups_cut",
            "Groups that ended because their environment was left out, since the start.",
            labels=["environment"],
        )
        for name, watched in self._coordinator.scheduler.outages.environments.copy().items():
            for kind in FaultKind:
                faults.add_metric([name, kind], watched.faults.counts[kind])
            left_out.add_metric([name], watched.breaker.state is not BreakerState.CLOSED)
            cut.add_metric([name], watched.num_groups_cut)
        yield from (faults, left_out, cut)


def serve_metrics(address: str, coordinator: Coordinator, broadcasts: Broadcasts, *, insecure: bool) -> None:
    """Serves /metrics on HOST:PORT. Raises ConfigError."""
    host, port = split_address(address)
    if not is_loopback(address) and not insecure:
        raise ConfigError(
            f"metrics_bind {address} is not a loopback address; bind 127.0.0.1, or set insecure"
        )
    registry = CollectorRegistry()
    registry.register(_RunCollector(coordinator, broadcasts))
    try:
        prometheus_client.start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ConfigError(f"cannot serve metrics on {address}: {error}") from error


def _gauge(name: str, documentation: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, value=value)
