"""Take the noise of few samples out of rendered views with Open Image Denoise, guided by albedo and normals."""

from __future__ import annotations

import numpy as np

KEPT_NOISE = 0.25
"""Share of the removed noise that is put back: what is left is as strong as with 1 / KEPT_NOISE^2 times the samples."""


def denoise(radiance: np.ndarray, albedo: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """``KEPT_NOISE radiance + (1 - KEPT_NOISE) filtered`` in RGB, view by view; alpha stays. On one thread.

    Args:
        radiance (float32 [S, H, W, 4]): linear RGB and alpha.
        albedo (float32 [S, H, W, 3]): diffuse reflectance in [0, 1] of the surface a pixel shows; 0 where none.
        normal (float32 [S, H, W, 3]): its unit normal; 0 where none.

    Returns:
        float32 [S, H, W, 4].

    Raises:
        ModuleNotFoundError: the package pyoidn is missing.
        RuntimeError: the library reports a failure.
    """
    import pyoidn as oidn

    device = oidn.Device()
    device.set_int("numThreads", 1)
    device.set_bool("setAffinity", False)
    device.commit()
    images = {"color": radiance[0, ..., :3], "albedo": albedo[0], "normal": normal[0]}
    images = {name: np.ascontiguousarray(image, np.float32) for name, image in images.items()}
    images["output"] = np.empty_like(images["color"])
    result = np.array(radiance, np.float32)
    oidn_filter = oidn.Filter(device, oidn.OIDN_FILTER_TYPE_RT)
    try:
        for name, image in images.items():
            oidn_filter.set_image(name, image, oidn.OIDN_FORMAT_FLOAT3)
        oidn_filter.set_bool("hdr", True)
        oidn_filter.set_quality(oidn.OIDN_QUALITY_FAST)
        oidn_filter.commit()
        for view in range(len(radiance)):
            images["color"][:] = radiance[view, ..., :3]
            images["albedo"][:], images["normal"][:] = albedo[view], normal[view]
            oidn_filter.execute()
            result[view, ..., :3] += (1 - KEPT_NOISE) * (images["output"] - images["color"])
        error = device.get_error()
    finally:
        oidn_filter.release()
        device.release()
    if error is not None:
        raise RuntimeError(f"Open Image Denoise failed: {error}")
    return result
