"""Do cameras, depth and images of scenes fit together?"""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspace3d.log import logger


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
    from subspace3d.datasets.validate import WITHOUT_CAMERAS, check_scenes, describe

    reports, with_errors = check_scenes(config.scenes)
    result = {
        "root": str(config.scenes),
        "scenes": len(reports),
        "with_errors": with_errors,
        "reports": list(map(dataclasses.asdict, reports)),
    }
    print(json.dumps(result, indent=1) if config.json else "\n".join(describe(config.scenes, reports, with_errors)))
    if not config.json and not with_errors:
        bare = any(report.unchecked == WITHOUT_CAMERAS for report in reports)
        scenes = f"--scenes {shlex.quote(str(config.scenes))} --method lora --out RUN"
        few = "" if bare else ", with --few for 30 images or fewer"
        logger.info(f"next: subspace3d finetune {'--few ' if bare else ''}{scenes}{few}")
    if with_errors:
        raise ValueError(f"{with_errors} of {len(reports)} scenes in {config.scenes} have errors")
    return result
