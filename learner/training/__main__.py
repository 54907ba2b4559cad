import sys

from penstock.cli import run

sys.exit(run("learner.training.start:main", sys.argv[1:]))
