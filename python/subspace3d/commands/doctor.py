"""What this machine has, what the package can use of it, and the pip line for what is missing."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from subspace3d import __version__, extras, system
from subspace3d.backbones.find import find_backbone
from subspace3d.backbones.presets import PRESETS
from subspace3d.backbones.protocol import Backbone
from subspace3d.machine import usable_cores


@dataclass(frozen=True)
class DoctorConfig:
    """Say what this machine has and what is missing."""

    json: bool = False
    """Print one JSON object instead of text."""


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{p.name}, {p.total_memory / 2**30:.0f} GiB, {_architecture(p)}" for p in properties]


def _architecture(properties: Any) -> str:
    """NVIDIA's name of the architecture, or AMD's where torch is built for ROCm."""
    return getattr(properties, "gcnArchName", None) or f"sm_{properties.major}{properties.minor}"


def _open3d_problem() -> str | None:
    """Open3D's wheel leaves out some shared libraries, so being installed does not mean that it can be imported."""
    if extras.version("open3d") is None:
        return None
    probe = subprocess.run([sys.executable, "-c", "import open3d"], capture_output=True, text=True, check=False)
    return None if probe.returncode == 0 else (probe.stderr.strip().splitlines() or ["import failed"])[-1]


def _weights(backbone: Backbone) -> str:
    if backbone.shipped is not None:
        return "weights ship with the package"
    downloads = type(backbone).download is not Backbone.download
    return "weights: your file, or --weights hub" if downloads else "weights: your file"


def examine() -> dict[str, Any]:
    """Everything `run` prints, as plain values."""
    import torch

    import subspace_ext

    total, available = (size / 2**30 for size in system.memory() or (0, 0))
    backbones = {name: find_backbone(name) for name in PRESETS}
    known = extras.read()
    missing = {extra: extras.missing(extra) for extra in known.in_all}
    render: dict[str, Any] = {"chosen": None, "reason": "mitsuba is not installed"}
    if extras.version("mitsuba") is not None:
        from subspace3d.mitsuba_variant import probe

        render = probe()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpus": _gpus(),
        "native": subspace_ext.build_info(),
        "images": subspace_ext.kernel_images(),
        "render": render,
        "cores": usable_cores(),
        "memory_gib": round(total, 1),
        "memory_available_gib": round(available, 1),
        "disk_free_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        "missing": {extra: names for extra, names in missing.items() if names},
        "not_for_this_python": {
            extra: list(names) for extra, names in known.not_for_this_python.items() if extra in known.in_all
        },
        "open3d_problem": _open3d_problem(),
        "backbones": {
            name: {
                "usable": not backbone.missing(),
                "missing": backbone.missing(),
                "install": backbone.install,
                "weights": _weights(backbone),
                "licence": backbone.licence,
            }
            for name, backbone in backbones.items()
        },
    }


def _text(facts: dict[str, Any]) -> str:
    native, render = facts["native"], facts["render"]
    kernels = f"CUDA for {', '.join(native['cuda_archs'])}" if native["cuda_built"] else "built without CUDA"
    images = [f"GPU {index} runs {image}" for index, image in enumerate(facts["images"])]
    rows = [
        ("subspace3d", f"{facts['version']}, Python {facts['python']}, torch {facts['torch']}"),
        ("GPU", "; ".join(facts["gpus"]) or "none visible to torch; everything runs on the CPU"),
        ("native kernels", "; ".join(["CPU", kernels, *images])),
        ("rendering", render["chosen"] or f"not available: {render.get('reason', 'no variant works')}"),
        ("machine", f"{facts['cores']} cores, {facts['memory_gib']} GiB memory ({facts['memory_available_gib']} free), "
                    f"{facts['disk_free_gib']} GiB disk free here"),
    ]  # fmt: skip
    lines = [f"{name:<15} {value}" for name, value in rows]
    for extra, names in facts["missing"].items():
        lines.append(f"{'missing':<15} {', '.join(names)}: pip install 'subspace3d[{extra}]'")
    for extra, names in facts["not_for_this_python"].items():
        rest = f"the rest of subspace3d[{extra}] works"
        lines.append(f"{'left out':<15} {', '.join(names)}: no release for {extras.this_python()} yet; {rest}")
    if facts["open3d_problem"]:
        lines.append(f"{'open3d':<15} cannot be imported: {facts['open3d_problem']}")
        lines.append(f"{'':<15} apt-get install libusb-1.0-0 libgl1 libgomp1 libx11-6")
    if not facts["missing"] and not facts["open3d_problem"] and not facts["not_for_this_python"]:
        lines.append(f"{'extras':<15} all installed")
    for name, backbone in facts["backbones"].items():
        state = (
            backbone["weights"]
            if backbone["usable"]
            else f"missing {', '.join(backbone['missing'])}: {backbone['install']}"
        )
        lines.append(f"{'backbone':<15} {name} ({backbone['licence'] or 'licence unknown'}): {state}")
    return "\n".join(lines)


def run(config: DoctorConfig) -> None:
    facts = examine()
    print(json.dumps(facts, indent=1, default=str) if config.json else _text(facts))
