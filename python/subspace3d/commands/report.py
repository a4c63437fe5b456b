"""Write one self-contained HTML page about a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from subspace3d import outputs
from subspace3d.log import logger


@dataclass(frozen=True)
class ReportConfig:
    """Write one self-contained HTML page about a run folder."""

    run: Path
    """Run folder of demo, or any folder with results.json and analysis.json below it."""
    out: Path | None = None
    """Page to write; none: RUN/report/index.html."""

    def lock(self) -> tuple[Path, str]:
        """The page alone."""
        return (self.run, "report") if self.out is None else (self.out.parent, self.out.name)

    @property
    def target(self) -> Path:
        """The page."""
        return self.out or self.run / "report" / "index.html"

    def reads(self) -> list[tuple[str, Path]]:
        parts = (
            "evaluation",
            "analysis",
            "comparison",
            "fit",
            "tuned",
            "results.json",
            "analysis.json",
            "config.yaml",
            "metrics.jsonl",
        )
        return outputs.named(run=tuple(self.run / part for part in parts))

    def writes(self) -> list[outputs.Output]:
        return [outputs.Output("out", self.target, outputs.PAGE)]


def run(config: ReportConfig) -> Path:
    """Write the page and return its path.

    Raises:
        FileNotFoundError: the run folder does not exist or holds nothing to report.
        ValueError: one of its files cannot be read.
    """
    from subspace3d.reporting.report import write_report

    config = outputs.check(config)
    path = config.target
    write_report(config.run, path)
    logger.info(f"report -> {path}")
    return path
