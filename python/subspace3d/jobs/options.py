"""Where jobs run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from subspace3d.settings import require


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """The settings of a command whose jobs a Ray cluster can do."""

    ray: str = ""
    """Address of a Ray cluster (auto, HOST:PORT or ray://HOST:PORT) that does the jobs; empty: this machine does."""
    ray_cpus: int = 1
    """With ray: cores of one job."""
    ray_gpus: float | None = None
    """With ray: GPUs of one job, or a part of one; none: 1 where the cluster has any and the job can use it."""

    def __post_init__(self) -> None:
        require(self.ray_cpus >= 1, "ray_cpus", "at least 1", self.ray_cpus)
        gpus, rule = self.ray_gpus, "in [0, 1] or a whole number"
        # Ray gives away parts of one GPU, or whole ones
        require(gpus is None or 0 <= gpus <= 1 or gpus == int(gpus) > 0, "ray_gpus", rule, gpus)

    def cluster_options(self) -> dict[str, Any]:
        """The same settings for another command."""
        return {"ray": self.ray, "ray_cpus": self.ray_cpus, "ray_gpus": self.ray_gpus}
