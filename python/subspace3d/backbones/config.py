"""Sizes of a VGGT and the two named presets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VGGTConfig:
    """Sizes of a VGGT; the defaults are those of the published one-billion-parameter model.

    Raises:
        ValueError: sizes that do not fit together.
    """

    name: str
    image_size: int = 518
    """Side in pixels of the square image at which position embeddings need no interpolation."""
    patch_size: int = 14
    """Side of a patch in pixels; image height and width must be multiples of it."""
    embed_dim: int = 1024
    """Width of a token in the image encoder and in the aggregator."""
    num_heads: int = 16
    mlp_ratio: int = 4
    encoder_depth: int = 24
    """Blocks of the image encoder."""
    encoder_layer_scale: float = 1.0
    """Initial LayerScale of the image encoder."""
    depth: int = 24
    """Pairs of a frame block and a global block in the aggregator."""
    layer_scale: float = 0.01
    """Initial LayerScale of aggregator and camera head."""
    num_registers: int = 4
    """Register tokens per frame, in the image encoder and in the aggregator."""
    rope_base: float = 100.0
    camera_depth: int = 4
    """Blocks of the camera head's trunk."""
    camera_iterations: int = 4
    """Refinement steps of the camera head."""
    depth_features: int = 256
    """Channels in which the depth head fuses its levels."""
    depth_channels: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    """Channels of the depth head's levels, from fine to coarse."""
    depth_taps: tuple[int, int, int, int] = (4, 11, 17, 23)
    """Aggregator blocks whose outputs feed these levels."""
    frames_chunk_size: int = 8
    """Most frames the depth head works on at once."""

    def get(self, name: str, default: object = None) -> object:
        """The setting ``name``, as of a dict: PEFT before 0.18 asks a model's ``config`` so."""
        return getattr(self, name, default)

    def __post_init__(self) -> None:
        rules = {
            "image_size": (self.image_size % self.patch_size == 0, f"a multiple of patch_size {self.patch_size}"),
            "embed_dim": (
                self.embed_dim % (4 * self.num_heads) == 0,
                f"a multiple of 4 * num_heads {4 * self.num_heads} (rotary embedding splits a head in four)",
            ),
            "depth_taps": (
                all(0 <= tap < self.depth for tap in self.depth_taps),
                f"block indices below depth {self.depth}",
            ),
            "depth_features": (self.depth_features % 8 == 0, "a multiple of 8 (sine and cosine of two axes, halved)"),
            "depth_channels": (
                all(channels % 4 == 0 for channels in self.depth_channels),
                "multiples of 4 (sine and cosine of two axes)",
            ),
            "frames_chunk_size": (self.frames_chunk_size >= 1, "at least 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")


CONFIGS: dict[str, VGGTConfig] = {
    "vggt-1b": VGGTConfig(name="vggt-1b"),
    # Trained from scratch: LayerScale starts at one, because small residual branches learn slowly at this depth.
    "vggt-nano": VGGTConfig(
        name="vggt-nano",
        image_size=112,
        embed_dim=160,
        num_heads=5,
        encoder_depth=4,
        depth=6,
        layer_scale=1.0,
        camera_depth=2,
        depth_features=48,
        depth_channels=(48, 64, 96, 96),
        depth_taps=(1, 2, 4, 5),
    ),
}


def named_config(name: str) -> VGGTConfig:
    """The preset called ``name``.

    Raises:
        ValueError: no such preset.
    """
    if name not in CONFIGS:
        raise ValueError(f"backbone must be one of {', '.join(CONFIGS)}, got {name!r}")
    return CONFIGS[name]
