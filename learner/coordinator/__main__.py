import sys

from penstock.cli import run

sys.exit(run("learner.coordinator.main:main", sys.argv[1:]))
