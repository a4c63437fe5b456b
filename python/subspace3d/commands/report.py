"""Write one self-contained HTML page about a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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


def run(config: ReportConfig) -> Path:
    """Write the page and return its path.

    Raises:
        FileNotFoundError: the run folder does not exist or holds nothing to report.
        ValueError: one of its files cannot be read.
    """
    from subspace3d.reporting.report import write_report

    path = config.out or config.run / "report" / "index.html"
    write_report(config.run, path)
    logger.info(f"report -> {path}")
    return path
