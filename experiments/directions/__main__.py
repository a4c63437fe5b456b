"""``python -m experiments.directions``, from a checkout: the direction experiment at nano scale."""

import sys

from experiments.directions.run import run
from experiments.directions.settings import DirectionsConfig
from subspace3d.cli import execute

if __name__ == "__main__":
    execute("experiments.directions", DirectionsConfig, run, sys.argv[1:])
