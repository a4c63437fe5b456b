"""Do cameras, depth and images of scenes fit together?"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ValidateConfig:
    """Check scenes: do cameras, depth and images fit together? Exit code 2 when there are errors."""

    scenes: Path
    """Folder with scenes anywhere at or below it."""
    json: bool = False
    """Print one JSON object instead of text."""


def run(config: ValidateConfig) -> dict[str, Any]:
    """Check every scene, print what was found, and return it as JSON values.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: there is no scene below it, or scenes have errors; the report is printed before.
    """
    from subspace3d.datasets.validate import check_scenes, describe

    reports, with_errors = check_scenes(config.scenes)
    result = {
        "root": str(config.scenes),
        "scenes": len(reports),
        "with_errors": with_errors,
        "reports": list(map(dataclasses.asdict, reports)),
    }
    print(json.dumps(result, indent=1) if config.json else "\n".join(describe(config.scenes, reports, with_errors)))
    if with_errors:
        raise ValueError(f"{with_errors} of {len(reports)} scenes in {config.scenes} have errors")
    return result
