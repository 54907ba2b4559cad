"""What came of it: a table, and the same as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from learner.coordinator.audit import audit
from penstock.chaos.checker import check
from penstock.chaos.evidence import Evidence, gather, read_metrics
from penstock.chaos.killer import Kill, Victim
from penstock.errors import ConfigError
from penstock.quickstart.summary import Summary

UNDISTURBED = (0.977, 0.986)
"""Accuracy of `penstock quickstart`, seeds 0 to 2: 120 steps after a warm start of 450."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    kills: tuple[Kill, ...]
    lost: int
    trained_twice: int
    violations: tuple[str, ...]
    imbalance: int
    accepted: int
    trained: int
    versions: int
    accuracy_before: float
    accuracy_after: float
    seconds: float

    @property
    def recoveries(self) -> list[float]:
        return sorted(kill.recovery_seconds for kill in self.kills if kill.recovery_seconds is not None)

    @property
    def is_sound(self) -> bool:
        """Nothing was lost, and something was done."""
        return not self.violations and not self.lost and not self.trained_twice and self.trained > 0

    def write(self, path: Path) -> None:
        """Raises ConfigError."""
        results = {
            "kills": len(self.kills),
            "lost": self.lost,
            "trained_twice": self.trained_twice,
            "recovery_p50_seconds": percentile(self.recoveries, 50),
            "recovery_p99_seconds": percentile(self.recoveries, 99),
            "accuracy_before": self.accuracy_before,
            "accuracy_after": self.accuracy_after,
            "accuracy_undisturbed": list(UNDISTURBED),
            "violations": len(self.violations),
            "imbalance": self.imbalance,
            "accepted": self.accepted,
            "trained": self.trained,
            "versions": self.versions,
            "seconds": round(self.seconds, 1),
        }
        killed = [
            {"victim": kill.victim, "seconds": kill.seconds, "recovery_seconds": kill.recovery_seconds}
            for kill in self.kills
        ]
        text = json.dumps({"results": results, "killed": killed}, indent=2)
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error}") from error


def verify(run_dir: Path, histories: Path, summary: Summary, kills: Sequence[Kill]) -> Report:
    """Reads what the run left behind, while nothing of it is alive. Raises PenstockError."""
    audited = audit(run_dir / "ledger.sqlite")
    evidence = gather(run_dir, sorted(histories.glob("*.jsonl")))
    journal = read_metrics(run_dir / "metrics.jsonl", evidence.ledger)
    found = check(Evidence(ledger=evidence.ledger, sessions=evidence.sessions, journal=journal))
    return Report(
        kills=tuple(kills),
        lost=found.lost,
        trained_twice=found.trained_twice,
        violations=(
            *(f"{violation.invariant}: {violation.message}" for violation in audited.violations),
            *map(str, found.violations),
        ),
        imbalance=audited.totals.imbalance,
        accepted=found.accepted,
        trained=found.trained,
        versions=summary.versions,
        accuracy_before=summary.accuracy_before,
        accuracy_after=summary.accuracy_after,
        seconds=summary.seconds,
    )


def table(report: Report) -> Table:
    rows = Table("killed", "times", "back at work after (median)", "(longest)", box=None, pad_edge=False)
    for victim in Victim:
        kills = [kill for kill in report.kills if kill.victim is victim]
        back = sorted(kill.recovery_seconds for kill in kills if kill.recovery_seconds is not None)
        rows.add_row(victim, str(len(kills)), _shown(percentile(back, 50)), _shown(percentile(back, 100)))
    everything = (percentile(report.recoveries, 50), percentile(report.recoveries, 99))
    rows.add_row("all", str(len(report.kills)), *map(_shown, everything))
    return rows


def lines(report: Report) -> list[str]:
    low, high = UNDISTURBED
    return [
        f"accepted {report.accepted:,}, trained {report.trained:,} in {report.versions} steps; "
        f"lost {report.lost}, trained twice {report.trained_twice}, imbalance {report.imbalance}",
        f"held-out accuracy {report.accuracy_before:.3f} before, {report.accuracy_after:.3f} after "
        f"(undisturbed, 120 steps, seeds 0 to 2: {low} to {high})",
        *(f"violated: {violation}" for violation in report.violations),
    ]


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The nearest-rank percentile of sorted values; None of none."""
    if not ordered:
        return None
    return ordered[max(math.ceil(share / 100 * len(ordered)) - 1, 0)]


def _shown(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s"
