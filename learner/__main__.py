import sys

from penstock.cli import run

sys.exit(run("learner.main:main", sys.argv[1:]))
