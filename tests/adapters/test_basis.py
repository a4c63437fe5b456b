"""Building, saving and recognising the frozen basis."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters.models import random_basis, tiny_vggt, write_subspace
from torch import nn

import subspace_ext as se
from subspace3d.adapters.basis import basis_for_model, build_basis, select_files, warn_of_other_base
from subspace3d.adapters.placement import place
from subspace3d.backbones.targets import target_modules
from subspace3d.files import load_tensors, save_tensors
from subspace3d.formats.basis import basis_digest, load_basis, save_authors, save_basis
from subspace3d.formats.subspace import load_subspace, save_subspace

QKV = "aggregator.frame_blocks.1.attn.qkv"


@pytest.fixture
def model() -> nn.Module:
    return tiny_vggt()


@pytest.fixture
def files(model: nn.Module, tmp_path: Path) -> list[Path]:
    return [
        write_subspace(tmp_path / f"mined/{name}.safetensors", model, k=3, seed=seed, preset="all")
        for seed, name in enumerate(("camera", "texture"))
    ]


def _spans(u: torch.Tensor, *inside: torch.Tensor) -> bool:
    """Whether the columns of ``u``, which are orthonormal, span those of the others and nothing more."""
    columns = torch.cat(inside, 1)
    left = columns - u @ (u.T @ columns)
    rank = int(torch.linalg.matrix_rank(columns))
    return bool(left.norm() < 1e-5 * columns.norm()) and u.shape[1] == rank


def test_concatenation_and_its_reductions(model: nn.Module, files: list[Path]) -> None:
    mined = [load_subspace(file).modules[QKV] for file in files]
    basis = basis_for_model(files, model)
    assert set(basis) == set(target_modules(model, "aggregator"))
    u, v = basis[QKV]
    torch.testing.assert_close(u.T @ u, torch.eye(6), atol=1e-5, rtol=0)
    assert _spans(u, *(m.u for m in mined)) and _spans(v, *(m.v for m in mined))
    # the leading directions of each file
    u, v = basis_for_model(files, model, k=2)[QKV]
    assert _spans(u, *(m.u[:, :2] for m in mined)) and _spans(v, *(m.v[:, :2] for m in mined))
    # the leading principal directions of the concatenation
    u, _ = basis_for_model(files, model, K=4)[QKV]
    left = torch.linalg.svd(torch.cat([m.u for m in mined], 1).double())[0][:, :4]
    torch.testing.assert_close(u.double() @ u.T.double(), left @ left.T, atol=1e-5, rtol=0)
    expected = se.combine_subspaces([(m.u[:, :2], m.v[:, :2]) for m in mined], rank=3)
    assert all(torch.equal(a, b) for a, b in zip(basis_for_model(files, model, K=3, k=2)[QKV], expected))


def test_attributes_are_selected_by_name(files: list[Path]) -> None:
    folder = files[0].parent
    assert list(select_files([folder])) == ["camera", "texture"]
    assert select_files([folder], ["texture"]) == {"texture": files[1]}
    with pytest.raises(ValueError, match="attributes must be among camera, texture, got 'lighting'"):
        select_files([folder], ["lighting"])


def test_head_cores_take_the_heads_subspaces(model: nn.Module, files: list[Path], tmp_path: Path) -> None:
    basis = basis_for_model(files, model, head_cores=True)
    assert set(basis) == set(place(model, "subspace", head_cores=True).cores)
    # a 3 x 3 convolution of 16 channels
    u, v = basis["depth_head.scratch.refinenet1.resConfUnit1.conv1"]
    assert (u.shape[0], v.shape[0]) == (16, 16 * 9)
    without = write_subspace(tmp_path / "without.safetensors", model, k=3)
    with pytest.raises(ValueError, match=r"must hold every module of the basis, \d+ are missing: camera_head"):
        basis_for_model([without], model, head_cores=True)


def test_any_model_by_the_modules_of_the_files(model: nn.Module, files: list[Path], tmp_path: Path) -> None:
    everything = build_basis(files)
    assert basis_digest(build_basis(files[0].parent)) == basis_digest(everything)
    assert basis_digest(build_basis(str(files[0]))) == basis_digest(build_basis(files[:1]))
    assert set(everything) == set(target_modules(model, "all"))
    assert all(torch.equal(a, b) for a, b in zip(everything[QKV], basis_for_model(files, model)[QKV]))
    assert set(build_basis(files, names=[QKV])) == {QKV}
    with pytest.raises(ValueError, match=r"must hold every module of the basis, \d+ are missing: camera_head"):
        build_basis([*files, write_subspace(tmp_path / "fewer.safetensors", model, k=3)])
    with pytest.raises(ValueError, match="subspaces must name at least one file"):
        build_basis([])
    with pytest.raises(ValueError, match=r"K and k must be at least 0 .* got K = -1, k = 0"):
        build_basis(files, K=-1)


@pytest.mark.parametrize("layout", ["ours", "authors"])
def test_a_combined_file_is_taken_as_it_is(model: nn.Module, tmp_path: Path, layout: str) -> None:
    names = target_modules(model, "aggregator")
    # columns that are not orthonormal, as in the authors' release
    basis = {name: (3 * u, v / 2) for name, (u, v) in random_basis(model, names, 4).items()}
    path = tmp_path / "basis.safetensors"
    (save_basis if layout == "ours" else save_authors)(path, basis)
    again = basis_for_model([path], model)
    assert all(torch.equal(again[name][side], basis[name][side]) for name in names for side in (0, 1))
    assert basis_digest(again) == basis_digest(basis) == basis_digest(load_basis(path))
    u, _ = basis_for_model([path], model, K=2)[QKV]
    torch.testing.assert_close(u.T @ u, torch.eye(2), atol=1e-5, rtol=0)
    other = write_subspace(tmp_path / "mined.safetensors", model, k=1)
    u, _ = basis_for_model([path, other], model)[QKV]
    assert _spans(u, basis[QKV][0], load_subspace(other).modules[QKV].u)


def test_digest_sees_names_shapes_and_values(model: nn.Module) -> None:
    basis = random_basis(model, [QKV], 4)
    u, v = basis[QKV]
    digest = basis_digest(basis)
    assert basis_digest({QKV: (u.T.contiguous().T, v.double())}) == digest
    changed = u.clone()
    changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(9.0))
    for other in ({QKV: (changed, v)}, {"other": (u, v)}, {QKV: (u.reshape(-1, 2), v)}, {QKV: (v, u)}, {}):
        assert basis_digest(other) != digest


def test_wrong_files_are_refused(model: nn.Module, files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no subspace files given"):
        basis_for_model([], model)
    with pytest.raises(FileNotFoundError, match="absent"):
        basis_for_model([tmp_path / "absent.safetensors"], model)
    foreign = write_subspace(tmp_path / "foreign.safetensors", model, k=2, more="decoder.0.attn.qkv")
    with pytest.raises(ValueError, match=r"1 modules are not in the model, e\.g\. decoder\.0\.attn\.qkv"):
        basis_for_model([foreign], model)
    lacking = write_subspace(tmp_path / "lacking.safetensors", model, k=2, leave_out=QKV)
    with pytest.raises(ValueError, match=f"1 are missing: {QKV}"):
        basis_for_model([lacking], model)
    with pytest.raises(ValueError, match="subspace3d-basis"):
        load_basis(files[0])
    path = tmp_path / "basis.safetensors"
    save_basis(path, random_basis(model, [QKV], 2))
    tensors, header = load_tensors(path)
    save_tensors(path, {name: value for name, value in tensors.items() if name.endswith("U")}, header)
    with pytest.raises(ValueError, match=rf"{QKV} must have U \[out, K\] and V \[in, K\]"):
        load_basis(path)
    save_tensors(path, {name: value * torch.nan for name, value in tensors.items()}, header)
    with pytest.raises(ValueError, match=f"{QKV} has NaN"):
        load_basis(path)
    model.aggregator.frame_blocks[1].attn.qkv = nn.Linear(32, 90)
    with pytest.raises(ValueError, match=r"attn.qkv must have \[out, in\] = \[90, 32\] as in .*got \[96, 32\]"):
        basis_for_model(files, model)


def test_a_basis_of_other_weights_is_used_with_a_warning(
    model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    modules = load_subspace(write_subspace(tmp_path / "any.safetensors", model, 2)).modules
    here = "vggt-nano@0123"
    for base, warns in (
        (here, False), (None, False), ("facebook/VGGT-1B", False), ("vggt-nano", True), ("vggt-nano@4567", True),
        ("my.models:make@0123", True),
    ):  # fmt: skip
        caplog.clear()
        save_subspace(tmp_path / "any.safetensors", modules, {"base_model": base, "k": 2})
        warn_of_other_base([tmp_path / "any.safetensors"], here)
        said = f"was mined from adapters of {base} and is used on {here}"
        assert (said in caplog.text) == warns and bool(caplog.text) == warns
