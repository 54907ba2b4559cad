"""What a run looks like: drawn from one GetStatusResponse, for a terminal or as one line."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from penstock.codec import version_from_wire
from penstock.rpc import to_seconds
from penstock.v1 import operator_pb2 as pb

_STATES = {
    pb.RUN_STATE_STARTING: ("starting", "yellow"),
    pb.RUN_STATE_RUNNING: ("running", "green"),
    pb.RUN_STATE_PAUSED: ("paused", "yellow"),
    pb.RUN_STATE_STOPPING: ("stopping", "yellow"),
    pb.RUN_STATE_FINISHED: ("finished", "cyan"),
}
_ACTOR_STYLES = {"ready": "green", "suspect": "red", "installing": "yellow", "draining": "yellow"}
_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARKLINE_WIDTH = 40
_MAX_WIDTH = 100


class RewardHistory:
    """The reward of each step that was seen, as a line of blocks."""

    def __init__(self) -> None:
        self._rewards: dict[int, float] = {}

    def add(self, status: pb.GetStatusResponse) -> None:
        if "reward_mean" in status.metrics:
            self._rewards[status.version.step] = status.metrics["reward_mean"]

    def sparkline(self, width: int) -> str:
        """At most `width` blocks, each the mean of equally many steps; the lowest is 0 or the least reward."""
        rewards = [reward for _, reward in sorted(self._rewards.items())]
        means = list(_means(rewards, width))
        low, high = min((0.0, *means)), max((1.0, *means))
        return "".join(_BLOCKS[round((mean - low) / (high - low) * (len(_BLOCKS) - 1))] for mean in means)


def render(status: pb.GetStatusResponse, rewards: RewardHistory) -> RenderableType:
    """The whole view; needs 80 columns."""
    parts: list[RenderableType] = [
        _progress(status, rewards),
        "",
        _actors(status),
        "",
        _ledger(status.ledger),
    ]
    refused, broadcasts = _refused(status.ledger), _broadcasts(status.broadcasts)
    if refused:
        parts.append(Text(refused, style="yellow"))
    if broadcasts:
        parts += ["", Text(broadcasts, style="yellow" if status.broadcasts.fallbacks else "")]
    parts += ["", _environments(status), "", _waiting(status)]
    state, style = _STATES.get(status.state, ("unknown", "red"))
    uptime = _clock(to_seconds(status.uptime))
    panel = Panel(
        Group(*parts),
        title=Text.assemble(
            ("penstock ", "bold"), (f"run {status.run_id} ", "dim"), (f"{state} ", style), uptime
        ),
        title_align="left",
        border_style=style,
    )
    return Constrain(panel, width=_MAX_WIDTH)


def line(status: pb.GetStatusResponse) -> str:
    """The same in one line, for logs."""
    ledger, metrics = status.ledger, status.metrics
    reward = f"{metrics['reward_mean']:.3f}" if "reward_mean" in metrics else "-"
    return (
        f"version {_version(status)} of {status.num_steps}  reward {reward}  "
        f"lag {metrics.get('lag_mean', 0.0):.1f} (max {metrics.get('lag_max', 0.0):.0f} of {status.max_lag})  "
        f"{status.tokens_per_second:,.0f} tokens/s  actors {len(status.actors)} of {status.actors_wanted} wanted  "
        f"trained {ledger.trained:,}  pending {ledger.pending:,}  imbalance {ledger.imbalance}"
    )


def _progress(status: pb.GetStatusResponse, rewards: RewardHistory) -> RenderableType:
    table = _grid()
    table.add_column(style="bold", width=9)
    table.add_column(min_width=8, justify="right")
    table.add_column(ratio=1)
    metrics, step = status.metrics, status.version.step
    bar = _grid()
    bar.add_column(width=_SPARKLINE_WIDTH)
    bar.add_column()
    bar.add_row(
        ProgressBar(total=max(status.num_steps, 1), completed=step, width=_SPARKLINE_WIDTH),
        f"of {status.num_steps}",
    )
    table.add_row("version", _version(status), bar)
    table.add_row(
        "reward",
        _measured(metrics.get("reward_mean"), ".3f"),
        Text(rewards.sparkline(_SPARKLINE_WIDTH), style="green"),
    )
    most = status.ledger.max_lag_trained
    table.add_row(
        "lag",
        _measured(metrics.get("lag_mean"), ".1f"),
        Text.assemble(
            f"max {_measured(metrics.get('lag_max'), '.0f')} in this step, ",
            (f"{most} in any", "bold red" if most > status.max_lag else ""),
            f"; bound {status.max_lag}",
        ),
    )
    if status.HasField("evaluation"):
        table.add_row("evaluated", *_evaluation(status.evaluation))
    table.add_row(
        "tokens/s",
        f"{status.tokens_per_second:,.0f}",
        f"{status.num_groups_open} groups open, {status.num_groups_ready} of them ready to train",
    )
    return table


def _evaluation(evaluation: pb.EvaluationStatus) -> tuple[str, Text]:
    """The newest mean reward, and what it is of."""
    newest, mean, parts = evaluation.newest, evaluation.newest.scores.get("mean"), []
    if evaluation.HasField("newest"):
        parts.append(f"version {version_from_wire(newest.version)}")
        if mean is not None and mean.HasField("reward_error"):
            parts[-1] += f" (± {mean.reward_error:.3f})"
        parts += [f"pass@{k} {chance:.3f}" for k, chance in sorted(mean.pass_at.items())] if mean else []
        lost = newest.num_slots - newest.num_answers
        parts += [f"{lost} of {newest.num_slots} without a reward"] if lost else []
    if evaluation.HasField("open"):
        answered = f"{evaluation.num_answers} of {evaluation.num_slots}"
        parts.append(f"{version_from_wire(evaluation.open)} open: {answered} answers")
    return _measured(None if mean is None else mean.reward_mean, ".3f"), _said(", ".join(parts))


def _actors(status: pb.GetStatusResponse) -> RenderableType:
    if not status.actors:
        return Text("no actor is connected", style="yellow")
    table = _columns("actor", "state", "version", "behind", "leases", "tokens/s", "silent", "weights", left=2)
    for actor in sorted(status.actors, key=lambda actor: actor.actor_id):
        has_version = actor.HasField("installed")
        table.add_row(
            _said(actor.actor_id),
            _said(f"{actor.state:<10}", _ACTOR_STYLES.get(actor.state, "")),
            str(version_from_wire(actor.installed)) if has_version else "-",
            str(max(status.version.step - actor.installed.step, 0)) if has_version else "-",
            str(actor.num_leases),
            f"{actor.stats.tokens_per_second:,.0f}",
            f"{to_seconds(actor.since_heartbeat):.1f} s",
            _said(actor.weights.medium or "-"),
        )
    return table


def _broadcasts(status: pb.BroadcastStatus) -> str:
    """Empty where all actors pull, and none ever did otherwise."""
    if not status.num_groups and not status.fallbacks:
        return ""
    group = f"{status.num_members} actors ({status.backend}) {status.state}"
    fallbacks = ", ".join(f"{count:,} {reason}" for reason, count in sorted(status.fallbacks.items()))
    parts = [f"broadcasts: {status.num_broadcasts:,} versions", group if status.num_members else "no group"]
    return "; ".join([*parts, f"pulled instead: {fallbacks}"] if fallbacks else parts)


def _ledger(ledger: pb.LedgerStatus) -> RenderableType:
    counts = {
        "accepted": ledger.accepted,
        "trained": ledger.trained,
        "pending": ledger.pending,
        "stale": ledger.stale,
        "surplus": ledger.surplus,
        "dropped": ledger.group_dropped,
        "quarantined": ledger.quarantined,
    }
    table = _columns(*counts, "imbalance", left=0)
    imbalance = Text(str(ledger.imbalance), style="bold red" if ledger.imbalance else "green")
    table.add_row(*(f"{count:,}" for count in counts.values()), imbalance)
    return table


def _refused(ledger: pb.LedgerStatus) -> str:
    rejected = [f"{count:,} {code}" for code, count in sorted(ledger.rejected.items()) if count]
    parts = [f"rejected: {', '.join(rejected)}"] if rejected else []
    if ledger.duplicates:
        parts.append(f"sent twice: {ledger.duplicates:,}")
    return "; ".join(parts)


_LEASES = {"closed": "yes", "open": "left out", "probing": "tried"}
"""Whether an environment is leased, by the state of its breaker."""


def _environments(status: pb.GetStatusResponse) -> RenderableType:
    table = _columns("environment", "address", "trajectories", "faults", "of data", "leases", left=2)
    for environment in status.environments:
        infrastructure, data = environment.infrastructure_faults, environment.data_faults
        style = "red" if infrastructure + data else ""
        table.add_row(
            _said(environment.name),
            _said(environment.address),
            f"{environment.num_trajectories:,}",
            Text(f"{infrastructure + data:,}", style=style),
            Text(f"{data:,}", style=style),
            Text(_LEASES.get(environment.breaker, ""), style="red" if environment.left_out else ""),
        )
    left_out = [
        _said(f"{environment.name} is left out: {environment.left_out}", "red")
        for environment in status.environments
        if environment.left_out
    ]
    faults = [
        _said(f"{environment.name}: {environment.last_fault}", "red")
        for environment in status.environments
        if environment.last_fault
    ]
    return Group(table, *left_out, *faults)


def _waiting(status: pb.GetStatusResponse) -> Text:
    return Text.assemble(("now       ", "bold"), _said(status.waiting_for or "nothing is waited for"))


def _said(text: str, style: str = "") -> Text:
    """Text from a peer, on one line: neither markup nor control characters have an effect."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return Text(printable, style=style, overflow="ellipsis", no_wrap=True)


def _grid() -> Table:
    return Table.grid(padding=(0, 1), expand=False)


def _columns(*names: str, left: int) -> Table:
    """A table without lines; the first `left` columns are text, the others numbers."""
    table = Table(box=None, expand=left > 0, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for index, name in enumerate(names):
        table.add_column(
            name,
            justify="left" if index < left else "right",
            ratio=1 if index == 0 and left else None,  # gives way where there is no room
            min_width=len(name),
            overflow="ellipsis",
            no_wrap=True,
        )
    return table


def _version(status: pb.GetStatusResponse) -> str:
    return str(version_from_wire(status.version)) if status.HasField("version") else "none yet"


def _measured(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _means(values: list[float], count: int) -> Iterable[float]:
    """Cuts values into at most `count` runs of nearly equal length; gives the mean of each."""
    count = min(count, len(values))
    cuts = [len(values) * index // count for index in range(count + 1)] if count else []
    return (sum(values[start:end]) / (end - start) for start, end in pairwise(cuts))
