"""``python -m experiments``, from a checkout: the paper's tables at nano scale."""

import sys

from experiments.run import run
from experiments.settings import ExperimentsConfig
from subspace3d.cli import execute

if __name__ == "__main__":
    execute("experiments", ExperimentsConfig, run, sys.argv[1:])
