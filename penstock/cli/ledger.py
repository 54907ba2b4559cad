"""`penstock ledger RUN`: what a run's ledger holds, and whether its invariants do."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from learner.coordinator.audit import INVARIANTS, Audit, audit
from learner.coordinator.records import TrajectoryState

STATUS_VIOLATED = 5


def main(argv: Sequence[str]) -> int:
    """Exit status 0 if every invariant holds, 5 if one does not, 4 if the ledger cannot be read."""
    parser = argparse.ArgumentParser(prog="penstock ledger", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the run's folder; its learner may be running")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    found = audit(arguments.run_dir / "ledger.sqlite")
    print(_as_json(found) if arguments.json else "\n".join(_as_text(found)))
    return STATUS_VIOLATED if found.violations else 0


def _as_json(found: Audit) -> str:
    fields = dataclasses.asdict(found)
    fields["totals"]["imbalance"] = found.totals.imbalance
    return json.dumps(fields | {"failed": found.failed}, indent=1)


def _as_text(found: Audit) -> Iterator[str]:
    totals = found.totals
    state = "finished" if found.finished else "not finished"
    newest = f"{found.newest[0]}.{found.newest[1]}" if found.newest else "none"
    yield f"run {found.run_id}: {state}"
    yield "lineages    " + (", ".join(f"epoch {e} from step {s}" for e, s in found.lineages) or "none")
    yield f"versions    {found.num_versions}, the newest {newest}; {found.num_steps} steps survive"
    yield f"groups      {_counts(found.groups)}"
    yield f"accepted    {totals.accepted} = {_counts(totals.by_state, ' + ')}; imbalance {totals.imbalance}"
    yield f"refused     {totals.duplicates} duplicates; rejected: {_counts(totals.rejected)}"
    yield (
        f"trained     {totals.tokens_trained} tokens, lag at most {totals.max_lag_trained}, "
        f"{totals.mixed_version_trained} trajectories of mixed versions"
    )
    kept = "none kept" if found.payloads_from is None else f"kept from step {found.payloads_from} on"
    yield f"payloads    {kept}"
    for name, (meaning, _) in INVARIANTS.items():
        yield f"{'FAILED' if name in found.failed else 'ok':<7}{name:<13} {meaning}"
        for violation in found.violations:
            if violation.invariant == name:
                yield f"       {violation.message}"


def _counts(counts: Mapping[str, int] | Mapping[TrajectoryState, int], separator: str = ", ") -> str:
    return separator.join(f"{count} {name}" for name, count in sorted(counts.items(), key=str)) or "none"
