"""What a backbone says of images. Importing this module loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["depth", "confidence", "extrinsics", "intrinsics"]


@dataclass(frozen=True)
class Prediction:
    """What a backbone says of B scenes of S images; None is what it does not say.

    Cameras are OpenCV ones (x right, y down, z forward); the centre of the top-left pixel is at (0.5, 0.5). They come
    as ``extrinsics`` and ``intrinsics``, or as the encodings of `subspace3d.backbones.pose` in ``stages``.

    Attributes:
        depth: z-depth ``[B, S, H, W]``, in the unit of the translations.
        confidence: ``[B, S, H, W]``, positive, the weight of an error in the loss.
        extrinsics: camera-from-world ``[B, S, 3, 4]``.
        intrinsics: ``[B, S, 3, 3]`` in pixels of the images given.
        points: ``[B, S, H, W, 3]`` in each camera and the unit of ``depth``, which is their z; of a model without
            intrinsics.
        stages: camera encodings ``[B, S, 9]`` after every refinement, the last one is the result.
        outputs: what the network returned, for a loss of the backbone's own.
    """

    depth: Tensor | None = None
    confidence: Tensor | None = None
    extrinsics: Tensor | None = None
    intrinsics: Tensor | None = None
    points: Tensor | None = None
    stages: tuple[Tensor, ...] = ()
    outputs: Any = field(default=None, repr=False)

    @classmethod
    def from_vggt(cls, outputs: Mapping[str, Any]) -> Prediction:
        """Of ``pose_enc_list`` or ``pose_enc``, ``depth [B, S, H, W, 1]`` and ``depth_conf``, as VGGT returns them."""
        stages = outputs.get("pose_enc_list")
        if stages is None and "pose_enc" in outputs:
            stages = [outputs["pose_enc"]]
        depth = outputs.get("depth")
        return cls(
            depth=None if depth is None else depth.squeeze(-1),
            confidence=outputs.get("depth_conf"),
            stages=tuple(stages or ()),
            outputs=outputs,
        )
