import sys

from penstock.cli import run

sys.exit(run("environments.main:main", sys.argv[1:]))
