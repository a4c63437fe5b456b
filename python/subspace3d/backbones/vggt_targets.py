"""The modules of a VGGT that adapters attach to: presets, each one full-match regular expression over names."""

from __future__ import annotations

_BLOCK_LINEARS = r"(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
_AGGREGATOR = rf"aggregator\.(frame_blocks|global_blocks)\.\d+\.{_BLOCK_LINEARS}"
_CAMERA = rf"camera_head\.(embed_pose|poseLN_modulation\.1|pose_branch\.(fc1|fc2)|trunk\.\d+\.{_BLOCK_LINEARS})"
# Entries 0 and 1 of resize_layers are transposed convolutions, entry 2 is the identity.
_DEPTH = (
    r"depth_head\.(projects\.\d+|resize_layers\.3|scratch\.(layer\d_rn|output_conv1|output_conv2\.[02]"
    r"|refinenet\d\.(out_conv|resConfUnit[12]\.conv[12])))"
)
EXPRESSIONS = {
    "cores": _AGGREGATOR,
    "aggregator": _AGGREGATOR,
    "heads": rf"({_CAMERA}|{_DEPTH})",
    "all": rf"({_AGGREGATOR}|{_CAMERA}|{_DEPTH})",
}
"""Of a VGGT; every backbone has its own, see `subspace3d.backbones.protocol`."""
