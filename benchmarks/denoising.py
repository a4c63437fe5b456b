"""Error and cost of few samples per pixel with Open Image Denoise, beside four times the samples without.

python benchmarks/denoising.py [--scenes 4] [--views 2] [--resolution 112] [--spp 16] [--reference 1024] [--out FOLDER]

Scenes of the paper preset in which everything varies. Every way of rendering starts from the same draw; the reference
has samples of its own, which none of the others share. Errors are root mean squares in 8-bit steps over all pixels of
all views, scene by scene; the mean over scenes and the worst scene are kept. Seconds are CPU seconds of path tracing
and denoising for all views of all scenes, without drawing, compiling kernels, depth and files.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from subspace3d.choices import Variant
from subspace3d.commands.generate import GenerateConfig
from subspace3d.mitsuba_variant import choose_variant
from subspace3d.scenes.denoise import denoise
from subspace3d.scenes.render import tone_map
from subspace3d.scenes.scene import Prepared, SceneJob, prepare_scene


def main() -> None:
    arguments = parse_arguments()
    variant = choose_variant("auto")
    ways = {
        f"{arguments.spp}": (arguments.spp, False),
        f"{arguments.spp}, denoised": (arguments.spp, True),
        f"{4 * arguments.spp}": (4 * arguments.spp, False),
    }
    errors: dict[str, list[float]] = {way: [] for way in ways}
    seconds = dict.fromkeys(ways, 0.0)
    for scene in range(arguments.scenes + 1):
        prepared = prepare(scene, arguments, variant)
        reference = picture(prepared, arguments.reference, False, 1)[0] if scene else None
        for way, (spp, denoised) in ways.items():
            picture(prepared, spp, denoised, 0)  # compiles
            image, taken = picture(prepared, spp, denoised, 0)
            if reference is not None:
                errors[way].append(float(np.sqrt(np.mean((image - reference) ** 2))))
                seconds[way] += taken
        print(scene, {way: f"{values[-1]:.2f}" for way, values in errors.items() if values}, flush=True)
    row = {
        "benchmark": "denoising", "preset": "paper", "scenes": arguments.scenes, "views": arguments.views,
        "resolution": arguments.resolution, "reference_spp": arguments.reference, "variant": variant,
        "error": {way: round(float(np.mean(values)), 3) for way, values in errors.items()},
        "worst": {way: round(max(values), 3) for way, values in errors.items()},
        "core_seconds": {way: round(value, 2) for way, value in seconds.items()},
        "mitsuba": version("mitsuba"), "pyoidn": version("pyoidn"), **provenance(),
    }  # fmt: skip
    print(json.dumps(row))
    if arguments.out:
        from subspace3d.bench import harness

        print(harness.append_rows(arguments.out, [row]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=4, help="scenes measured, after one that warms up")
    parser.add_argument("--views", type=int, default=2, help="images per scene")
    parser.add_argument("--resolution", type=int, default=112, help="image width in pixels")
    parser.add_argument("--spp", type=int, default=16, help="samples per pixel of what is denoised")
    parser.add_argument("--reference", type=int, default=1024, help="samples per pixel of the reference")
    parser.add_argument("--out", type=Path, help="append the row to DEVICE.jsonl in this folder")
    return parser.parse_args()


def prepare(scene: int, arguments: argparse.Namespace, variant: Variant) -> Prepared:
    config = GenerateConfig(
        out=Path("unused"), attribute="all", views=arguments.views, resolution=arguments.resolution,
    )  # fmt: skip
    return prepare_scene(SceneJob(config.out, 0, scene, config, variant, 1))


def picture(prepared: Prepared, spp: int, denoised: bool, seed: int) -> tuple[np.ndarray, float]:
    """The images in 8-bit steps, float64 [S, H, W, 3], and the CPU seconds of path tracing and denoising."""
    started = time.process_time()
    radiance = prepared.renderer.radiance(spp, (prepared.noise_seed + seed) % 2**32)
    if denoised:
        radiance = denoise(radiance, *prepared.renderer.albedo_and_normals())
    taken = time.process_time() - started
    return tone_map(radiance, prepared.renderer.exposed()).astype(np.float64), taken


def provenance() -> dict[str, Any]:
    # torch is no part of rendering
    import torch

    from subspace3d.bench import harness

    return harness.provenance(torch.device("cpu"))


if __name__ == "__main__":
    main()
