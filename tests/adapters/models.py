"""Small models to adapt and bases for them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from subspace3d.adapters.placement import matrix_shape
from subspace3d.backbones.config import VGGTConfig
from subspace3d.backbones.targets import target_modules
from subspace3d.backbones.vggt import VGGT
from subspace3d.formats.basis import Basis
from subspace3d.formats.subspace import ModuleSubspace, save_subspace

TINY = VGGTConfig(
    name="tiny",
    image_size=28,
    embed_dim=32,
    num_heads=2,
    encoder_depth=1,
    depth=2,
    layer_scale=1.0,
    camera_depth=1,
    depth_features=16,
    depth_channels=(16, 16, 20, 24),
    depth_taps=(0, 0, 1, 1),
)


def tiny_vggt(seed: int = 0) -> VGGT:
    torch.manual_seed(seed)
    return VGGT(TINY).eval()


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(1, 2, 3, 28, 28, generator=generator)


def random_basis(model: nn.Module, names: list[str], K: int, seed: int = 0) -> Basis:
    """Orthonormal columns from a seed, as many as K and the module's sides allow."""
    generator = torch.Generator().manual_seed(seed)
    basis = {}
    for name in names:
        out, into = matrix_shape(model.get_submodule(name))
        k = min(K, out, into)
        sides = [torch.linalg.qr(torch.randn(size, k, generator=generator))[0] for size in (out, into)]
        basis[name] = (sides[0], sides[1])
    return basis


def write_subspace(
    path: Path, model: nn.Module, k: int, seed: int = 0, leave_out: str = "", more: str = "", preset: str = "aggregator"
) -> Path:
    """A subspace file of random subspaces for the modules of a preset."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name in target_modules(model, preset):
        if name != leave_out:
            out, into = matrix_shape(model.get_submodule(name))
            width = min(k, out, into)
            u, v = (torch.randn(size, width, generator=generator) for size in (out, into))
            modules[name] = ModuleSubspace(u, v, torch.ones(width), torch.ones(2))
    if more:
        modules[more] = ModuleSubspace(torch.randn(4, k), torch.randn(4, k), torch.ones(k), torch.ones(2))
    save_subspace(path, modules, {"base_model": None, "adapters": [], "k": k, "p": 1.0})
    return path


@torch.no_grad()
def train_at_random(model: nn.Module, seed: int = 1, size: float = 0.1) -> None:
    """Stand-in for training: move every trainable value."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))


@torch.no_grad()
def outputs(model: nn.Module, *arguments: torch.Tensor) -> torch.Tensor:
    """All floating outputs of ``model`` in evaluation mode, in one row; for a VGGT on `images` by default."""
    was_training = model.training
    result = model.eval()(*(arguments or (images(),)))
    model.train(was_training)
    if torch.is_tensor(result):
        return result.flatten()
    if hasattr(result, "last_hidden_state"):
        return result.last_hidden_state.flatten()
    return torch.cat([result[key].flatten() for key in ("pose_enc", "depth", "depth_conf")])


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())
