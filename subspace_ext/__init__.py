"""Numerical core: linear and convolution layers with a trained K x K core, and the mining of shared subspaces.

Tensors in, tensors out: nothing here knows files, models or adapters' formats. Importing it touches no GPU.
"""

from __future__ import annotations

from importlib import metadata

from subspace_ext._native import NativeUnavailableError
from subspace_ext.basis import combine_subspaces, disentanglement
from subspace_ext.build import build_info, kernel_images
from subspace_ext.core import SubspaceCore
from subspace_ext.mining import MinedSubspace, MiningState, mine_subspace
from subspace_ext.nn import SubspaceConv2d, SubspaceLinear, group_folds
from subspace_ext.ops.subspace_linear import subspace_linear

try:
    __version__ = metadata.version("subspace3d")
except metadata.PackageNotFoundError:
    __version__ = "unknown"

__all__ = [
    "MinedSubspace",
    "MiningState",
    "NativeUnavailableError",
    "SubspaceConv2d",
    "SubspaceCore",
    "SubspaceLinear",
    "build_info",
    "combine_subspaces",
    "disentanglement",
    "group_folds",
    "kernel_images",
    "mine_subspace",
    "subspace_linear",
]
