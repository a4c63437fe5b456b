"""Show true and predicted points and cameras in a browser, live."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from subspace3d.settings import require


@dataclass(frozen=True)
class ViewConfig:
    """Show true and predicted points and cameras in a browser, live."""

    path: Path
    """Run folder with an evaluation, or a folder of scenes, which are predicted as they are opened."""
    tuned: tuple[Path, ...] = ()
    """Run folders of finetune, shown beside the base model; for a folder of scenes only."""
    backbone: str = "vggt-nano"
    """A preset (doctor lists them), or package.module:factory; for a folder of scenes only."""
    weights: Path | None = None
    """File of weights, random, or hub (published, downloaded); none: those shipped with the package (nano only)."""
    frames: int = 8
    """Frames shown per scene, evenly spaced, at most 8."""
    device: str = "auto"
    """auto: cuda when there is one, else cpu."""
    host: str = "localhost"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8080
    """Port to listen on; the next free one when it is taken."""

    def __post_init__(self) -> None:
        require(1 <= self.frames <= 8, "frames", "1 to 8", self.frames)
        require(0 < self.port < 65536, "port", "1 to 65535", self.port)


def run(config: ViewConfig) -> None:
    """Serve until interrupted.

    Raises:
        FileNotFoundError: the folder, a tuned run or weights are not there.
        ValueError: there is nothing to show.
        ModuleNotFoundError: viser is not installed.
    """
    from subspace3d.reporting.viewer import serve
    from subspace3d.reporting.viewer_sources import Prediction, open_source

    how = Prediction(config.backbone, config.weights, config.tuned, config.frames, config.device)
    serve(open_source(config.path, how), config.host, config.port)
