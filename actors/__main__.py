import sys

from penstock.cli import run

sys.exit(run("actors.main:main", sys.argv[1:]))
