"""The command line that starts a trainer's ranks. Imports no torch: supervisors use it."""

import sys
from collections.abc import Sequence

RENDEZVOUS_VARIABLE = "PENSTOCK_RENDEZVOUS"
"""Names the file through which the ranks of one start find each other."""


def launch_command(*, module: str, arguments: Sequence[str], num_ranks: int) -> list[str]:
    """Runs `python -m module arguments` on `num_ranks` ranks of this host.

    SIGTERM to the process that it starts stops every rank in order. Its exit status is 0
    when all ranks left in order, 2 for bad input, 1 for other failures.
    """
    if num_ranks == 1:
        return [sys.executable, "-m", module, *arguments]
    return [sys.executable, "-m", "learner.training.agent", str(num_ranks), module, "--", *arguments]
