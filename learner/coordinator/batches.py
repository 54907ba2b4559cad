"""Which groups a step takes, and which it must wait for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from learner.coordinator.groups import Group


@dataclass(frozen=True, slots=True)
class Chosen:
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class WaitFor:
    """No batch yet: any of these groups, once complete, would bring it nearer."""

    groups: tuple[Group, ...]
    num_ready: int
    reason: str


def choose(open_groups: Iterable[Group], *, version: int, groups_per_step: int) -> Chosen | WaitFor:
    """Takes the complete groups that are due first, if those left can still be trained in time.

    open_groups: all that are neither trained nor dropped. version: the step trained on.
    """
    ordered = sorted(open_groups, key=lambda group: (group.due, group.group_id))
    ready = [group for group in ordered if group.is_ready]
    unfinished = [group for group in ordered if not group.is_ready]
    if len(ready) < groups_per_step:
        reason = (
            f"{groups_per_step - len(ready)} more complete groups ({len(ready)} of {groups_per_step} ready)"
        )
        return WaitFor(tuple(unfinished), len(ready), reason)
    chosen = ready[:groups_per_step]
    taken = {group.group_id for group in chosen}
    left = [group for group in ordered if group.group_id not in taken]
    crowded = _first_crowded(left, version=version, groups_per_step=groups_per_step)
    late = [group for group in unfinished if crowded is not None and group.due <= crowded]
    if late:
        names = ", ".join(str(group.group_id) for group in late[:4])
        reason = f"unfinished groups that are due by version {crowded} (group {names})"
        return WaitFor(tuple(late), len(ready), reason)
    return Chosen(tuple(sorted(chosen, key=lambda group: group.group_id)))


def _first_crowded(left: list[Group], *, version: int, groups_per_step: int) -> int | None:
    """The first due version by which more groups are due than the steps after `version` can train."""
    for count, group in enumerate(left, start=1):
        if count > (group.due - version) * groups_per_step:
            return group.due
    return None
