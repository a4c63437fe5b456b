"""Time the generator: images per second and core for each Mitsuba variant and resolution, and memory over many scenes.

python benchmarks/rendering.py [--variants llvm scalar] [--resolutions 128 518] [--spp 64] [--memory-scenes 300]

One process with one thread renders scenes of the paper preset in which everything varies; the first scene of each size
compiles kernels and is not counted. Seconds are CPU seconds of the process for llvm and scalar, wall seconds for cuda:
drawing, meshes, textures, depth, path tracing and writing files are all in them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from subspace3d.choices import Variant
from subspace3d.commands.generate import GenerateConfig
from subspace3d.mitsuba_variant import VARIANTS, check_variant
from subspace3d.scenes.scene import SceneJob, render_scene


def main() -> None:
    arguments = parse_arguments()
    variants = arguments.variants or [name for name in VARIANTS if not check_variant(name)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        # first, while the process is small
        memory = memory_over_scenes(Path(folder), variants[0], arguments.memory_scenes)
        for variant in variants:
            for resolution in arguments.resolutions:
                rows.append(throughput(Path(folder), variant, resolution, arguments))
                print(rows[-1], flush=True)
    record = {
        "benchmark": "rendering", "regime": arguments.regime, "spp": arguments.spp, "rows": rows,
        "memory_variant": variants[0], "memory_mib": memory, "mitsuba": version("mitsuba"), **cpu_provenance(),
    }  # fmt: skip
    print(json.dumps(record))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with open(arguments.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), help="default: all that work here")
    parser.add_argument("--resolutions", nargs="*", type=int, default=[128, 518], help="image widths in pixels")
    parser.add_argument("--spp", type=int, default=64, help="samples per pixel")
    parser.add_argument("--regime", choices=["object", "room"], default="object")
    parser.add_argument("--views", type=int, default=4, help="images per scene")
    parser.add_argument("--scenes", type=int, default=3, help="scenes measured, after one that is not")
    parser.add_argument("--memory-scenes", type=int, default=300, help="small scenes in one process; 0: skip it")
    parser.add_argument("--out", type=Path, help="append the record to this JSON-lines file")
    return parser.parse_args()


def throughput(folder: Path, variant: Variant, resolution: int, arguments: argparse.Namespace) -> dict[str, object]:
    config = GenerateConfig(
        out=folder, attribute="all", regime=arguments.regime, views=arguments.views, resolution=resolution,
        spp=arguments.spp,
    )  # fmt: skip
    clock = time.perf_counter if variant == "cuda" else time.process_time
    start = 0.0
    for scene in range(arguments.scenes + 1):
        if scene == 1:
            start = clock()
        render_scene(SceneJob(folder / f"{variant}-{resolution}-{scene}", 0, scene, config, variant, 1))
    seconds = clock() - start
    images = arguments.scenes * arguments.views
    return {
        "variant": variant, "resolution": resolution, "images": images, "seconds": round(seconds, 2),
        "images_per_second_and_core": round(images / seconds, 4),
    }  # fmt: skip


def memory_over_scenes(folder: Path, variant: Variant, scenes: int) -> dict[int, int]:
    """Resident MiB of the process after 1, 50, 100, ... scenes of 64 pixels and 2 views."""
    config = GenerateConfig(out=folder, attribute="all", views=2, resolution=64, spp=4)
    result = {}
    for scene in range(scenes):
        render_scene(SceneJob(folder / "memory", 0, scene, config, variant, 1))
        if scene == 0 or (scene + 1) % 50 == 0:
            result[scene + 1] = resident_mib()
            print(f"memory after {scene + 1} scenes: {result[scene + 1]} MiB", flush=True)
    return result


def resident_mib() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def cpu_provenance() -> dict[str, Any]:
    # Imported once memory has been measured: torch is no part of rendering.
    import torch

    from subspace3d.bench import harness

    return harness.provenance(torch.device("cpu"))


if __name__ == "__main__":
    main()
