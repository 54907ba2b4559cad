"""How far generation may run ahead of training: the one place that bounds lag.

A group is *born* at the version that its first lease was granted under, and is *due*
at born + max_lag: the last version on which it may be trained. Two rules keep every
trained group within its due version, without discarding any.

1. A group is admitted only if the groups then open fit into the steps up to its due
   version: open + 1 <= (due - version + 1) * groups_per_step. With every group born
   at the current version this is AReaL's rule (Fu et al. 2025, eq. 3): groups ever
   leased never exceed (max_lag + version + 1) * groups_per_step.
2. A step takes the groups that are due first. It waits for an unfinished group if
   taking others instead would leave more groups due by some version than the steps
   up to that version can train (`learner.coordinator.batches`).

Rule 1 keeps "everything open can still be trained in time" true when a group is
admitted; rule 2 keeps it true when a step is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

from learner.config import ScheduleConfig


@dataclass(frozen=True, slots=True)
class Admission:
    """Decides whether a new group may be opened."""

    schedule: ScheduleConfig

    def due(self, born: int) -> int:
        """The last version on which a group born at `born` may be trained."""
        return born + self.schedule.max_lag

    def born_in_turn(self, version: int, turn: int) -> int:
        """When to be born to be due on the step that takes the turn (0 is next), if each before it is taken."""
        return version + turn // self.schedule.groups_per_step - self.schedule.max_lag

    def num_groups(self, *, version: int, born: int, num_open: int) -> int:
        """How many new groups may be opened now, one after the other."""
        schedule = self.schedule
        per_step = schedule.groups_per_step
        in_run = (schedule.num_steps - version) * per_step
        in_time = (self.due(born) - version + 1) * per_step
        return max(min(in_run, in_time, schedule.depth * per_step) - num_open, 0)

    def refusal(self, *, version: int, born: int, num_open: int) -> str | None:
        """Why no new group may be opened now; None if one may.

        version: the learner's newest step. born: the step of the actor's installed
        version. num_open: groups that are opened and neither trained nor dropped.
        """
        schedule = self.schedule
        per_step = schedule.groups_per_step
        if version * per_step + num_open >= schedule.num_steps * per_step:
            return f"the run's last {num_open} groups are leased"
        if num_open + 1 > (self.due(born) - version + 1) * per_step:
            if born < version:
                return (
                    f"the actor's version {born} is too old to be trained within max_lag {schedule.max_lag}"
                )
            return f"max_lag {schedule.max_lag}: {num_open} groups are open, and more could not be trained in time"
        if num_open + 1 > schedule.depth * per_step:
            return f"pipeline_depth {schedule.depth}: {num_open} groups are open"
        return None
