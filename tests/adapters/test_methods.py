from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import subspace_ext as se
from subspace3d.adapters.basis import load_basis, read_basis, save_basis
from subspace3d.adapters.methods import add_cores, apply_method, cores
from subspace3d.adapters.parameters import count_trainable, part_of, trainable_parameters
from subspace3d.backbones import build_vggt
from subspace3d.backbones.targets import target_modules
from subspace3d.mining.subspace_file import ModuleSubspace, save_subspace


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return build_vggt("vggt-nano", weights="random").eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(1, 2, 3, 28, 28)


def write_subspace(path: Path, model: nn.Module, k: int, seed: int = 0, leave_out: str = "", more: str = "") -> Path:
    """A subspace file of random subspaces for the aggregator's linears."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name in target_modules(model, "aggregator"):
        if name != leave_out:
            out_size, in_size = model.get_submodule(name).weight.shape
            modules[name] = ModuleSubspace(
                torch.randn(out_size, k, generator=generator),
                torch.randn(in_size, k, generator=generator),
                torch.ones(k),
                torch.ones(2),
            )
    if more:
        modules[more] = ModuleSubspace(torch.randn(4, k), torch.randn(4, k), torch.ones(k), torch.ones(2))
    save_subspace(path, modules, {"base_model": None, "adapters": [], "k": k, "p": 1.0})
    return path


def _lora_count(model: nn.Module, preset: str, rank: int) -> int:
    """r (in + out) per module, a convolution unrolled on its input side."""
    weights = [model.get_submodule(name).weight for name in target_modules(model, preset)]
    return sum(rank * (weight.shape[0] + weight[0].numel()) for weight in weights)


def test_none_trains_nothing(model: nn.Module) -> None:
    assert count_trainable(apply_method(model, "none")) == {"total": 0}


def test_full_trains_all_but_the_image_encoder(model: nn.Module) -> None:
    expected = sum(p.numel() for name, p in model.named_parameters() if "patch_embed" not in name)
    tuned = apply_method(model, "full")
    counts = count_trainable(tuned)
    assert counts["total"] == expected
    assert set(counts) == {"aggregator", "camera_head", "depth_head", "total"}
    assert not any(p.requires_grad for p in model.aggregator.patch_embed.parameters())


def test_lora_counts_and_starts_at_the_base(model: nn.Module, images: torch.Tensor) -> None:
    expected, before = _lora_count(model, "all", 4), model(images)
    tuned = apply_method(model, "lora", rank=4, base_model="some-model")
    assert count_trainable(tuned)["total"] == expected
    assert tuned.peft_config["default"].lora_alpha == 8
    assert tuned.peft_config["default"].base_model_name_or_path == "some-model"
    assert not any("patch_embed" in name for name in trainable_parameters(tuned))
    after = tuned(images)
    # kernels chosen with and without gradients differ in rounding
    for key in ("pose_enc", "depth", "depth_conf"):
        torch.testing.assert_close(after[key], before[key], atol=1e-5, rtol=1e-5)


def test_subspace_counts_and_starts_at_the_base(model: nn.Module, images: torch.Tensor, tmp_path: Path) -> None:
    write_subspace(tmp_path / "texture.safetensors", model, k=3, seed=1)
    write_subspace(tmp_path / "camera.safetensors", model, k=2, seed=2)
    linears, heads, before = len(target_modules(model, "aggregator")), _lora_count(model, "heads", 4), model(images)
    tuned = apply_method(model, "subspace", rank=4, basis=load_basis([tmp_path], model))
    counts = count_trainable(tuned)
    assert counts["aggregator"] == linears * 5**2
    assert counts["camera_head"] + counts["depth_head"] == heads
    assert all(module.scale == 2 and module.rank == 5 for module in cores(tuned).values())
    after = tuned(images)
    # folded and plain products differ in rounding only
    for key in ("pose_enc", "depth", "depth_conf"):
        torch.testing.assert_close(after[key], before[key], atol=1e-5, rtol=1e-5)


def test_core_changes_the_weight_by_twice_u_c_v(model: nn.Module, tmp_path: Path) -> None:
    basis = load_basis([write_subspace(tmp_path / "a.safetensors", model, k=3)], model)
    name = "aggregator.global_blocks.1.mlp.fc2"
    before = model.get_submodule(name).weight.clone()
    add_cores(model, basis)
    layer = model.get_submodule(name)
    with torch.no_grad():
        layer.c.copy_(torch.randn(3, 3))
    u, v = basis[name]
    torch.testing.assert_close(layer.merged_weight(), before + 2 * u @ layer.c @ v.T)
    torch.testing.assert_close(u.T @ u, torch.eye(3), atol=1e-5, rtol=0)


def test_basis_keeps_leading_directions_and_round_trips(model: nn.Module, tmp_path: Path) -> None:
    paths = [write_subspace(tmp_path / f"{seed}.safetensors", model, k=3, seed=seed) for seed in (1, 2)]
    basis = load_basis(paths, model, K=4)
    assert set(basis) == set(target_modules(model, "aggregator"))
    assert all(u.shape[1] == v.shape[1] == 4 for u, v in basis.values())
    save_basis(tmp_path / "basis/basis.safetensors", basis)
    again = read_basis(tmp_path / "basis/basis.safetensors")
    assert all(torch.equal(again[name][side], basis[name][side]) for name in basis for side in (0, 1))
    with pytest.raises(ValueError, match="subspace3d-basis"):
        read_basis(paths[0])


def test_modules_outside_the_aggregator_are_left_to_lora(model: nn.Module, tmp_path: Path) -> None:
    path = write_subspace(tmp_path / "a.safetensors", model, k=2, more="camera_head.embed_pose")
    assert "camera_head.embed_pose" not in load_basis([path], model)


def test_wrong_bases_are_refused(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no subspace files given"):
        load_basis([], model)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_basis([tmp_path / "absent.safetensors"], model)
    foreign = write_subspace(tmp_path / "foreign.safetensors", model, k=2, more="decoder.0.attn.qkv")
    with pytest.raises(ValueError, match=r"not in the model, e.g. decoder.0.attn.qkv"):
        load_basis([foreign], model)
    name = "aggregator.frame_blocks.3.attn.proj"
    lacking = write_subspace(tmp_path / "lacking.safetensors", model, k=2, leave_out=name)
    with pytest.raises(ValueError, match=f"1 are missing: {name}"):
        load_basis([lacking], model)
    narrow = nn.Module()
    narrow.aggregator = model.aggregator
    u, v = torch.eye(160)[:, :2], torch.eye(160)[:, :2]
    with pytest.raises(ValueError, match=r"U \[480, K\] and V \[160, K\], got \[160, 2\]"):
        add_cores(narrow, {"aggregator.frame_blocks.0.attn.qkv": (u, v)})
    with pytest.raises(ValueError, match="must be a Linear, got LayerNorm"):
        add_cores(model, {"aggregator.frame_blocks.0.norm1": (u, v)})
    with pytest.raises(ValueError, match="is not in the model"):
        add_cores(model, {"nowhere": (u, v)})
    with pytest.raises(ValueError, match="subspaces must be given"):
        apply_method(model, "subspace")


def test_wrong_method_and_rank(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="method must be"):
        apply_method(model, "dora")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank must be at least 1"):
        apply_method(model, "lora", rank=0)


def test_shape_of_another_model_is_named(model: nn.Module, tmp_path: Path) -> None:
    path = write_subspace(tmp_path / "a.safetensors", model, k=2)
    model.aggregator.frame_blocks[0].attn.qkv = nn.Linear(160, 96)
    with pytest.raises(ValueError, match=r"attn.qkv must have \[out, in\] = \[96, 160\]"):
        load_basis([path], model)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("base_model.model.aggregator.frame_blocks.0.attn.qkv.c", "aggregator"),
        ("depth_head.projects.0.lora_A.default.weight", "depth_head"),
        ("camera_head.embed_pose.weight", "camera_head"),
        ("point_head.norm.weight", "other"),
    ],
)
def test_part_of(name: str, part: str) -> None:
    assert part_of(name) == part


def test_cores_are_named_as_in_the_backbone(model: nn.Module, tmp_path: Path) -> None:
    basis = load_basis([write_subspace(tmp_path / "a.safetensors", model, k=2)], model)
    tuned = apply_method(model, "subspace", rank=2, basis=basis)
    assert set(cores(tuned)) == set(basis)
    assert all(isinstance(module, se.SubspaceLinear) for module in cores(tuned).values())
