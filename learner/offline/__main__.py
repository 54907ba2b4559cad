import sys

from penstock.cli import run

sys.exit(run("learner.offline.main:main", sys.argv[1:]))
