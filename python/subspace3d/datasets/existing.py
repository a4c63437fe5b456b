"""The parts of the verb generate that render nothing: checking scenes, and converting data sets that are on disk."""

from __future__ import annotations

from pathlib import Path

from subspace3d.configs import GenerateConfig


def run(config: GenerateConfig) -> list[Path]:
    """Check the scenes of ``validate``, or convert the data set ``from_``; returns the folders that were made."""
    if config.validate is not None:
        from subspace3d.datasets import validate

        validate.run(config.validate, config.json)
        return []
    from subspace3d.datasets.readers import convert

    return convert.run(config)
