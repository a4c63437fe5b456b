"""Every example runs, at small size, and does what it says."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from mining.synthetic_adapters import orthonormal
from training.plane_scenes import write_plane_scenes

import subspace3d as s3
from subspace3d.backbones.targets import target_modules
from subspace3d.formats.subspace import ModuleSubspace, save_subspace

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_plane_scenes(folder / "plane")
    return folder


@pytest.fixture(scope="module")
def subspaces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("subspaces")
    model = s3.build_backbone("vggt-nano", "random")
    rng = np.random.default_rng(0)
    modules = {}
    for name in target_modules(model, "aggregator")[:8]:
        out_size, in_size = model.get_submodule(name).weight.shape
        u, v = (torch.from_numpy(orthonormal(rng, size, 4)).float() for size in (out_size, in_size))
        modules[name] = ModuleSubspace(u, v, torch.ones(4).double(), torch.ones(3).double())
    save_subspace(folder / "texture.safetensors", modules, {"base_model": None})
    return folder


def test_cores_in_your_loop(scenes: Path, subspaces: Path, tmp_path: Path) -> None:
    arguments = ["--scenes", str(scenes), "--subspaces", str(subspaces), "--out", str(tmp_path / "cores.safetensors")]
    losses = load("cores_in_your_loop").main([*arguments, "--steps", "3", "--image-size", "28"])
    assert len(losses) == 3 and np.isfinite(losses).all()
    from safetensors.torch import load_file

    assert any(core.any() for core in load_file(tmp_path / "cores.safetensors").values())


def test_mine_your_adapters(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    example = load("mine_your_adapters")
    for number in range(3):
        model = get_peft_model(example.base_model(), LoraConfig(r=4, target_modules=["0", "2"]))
        for parameter in (p for name, p in model.named_parameters() if "lora_B" in name):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
        model.save_pretrained(str(tmp_path / f"adapters/{number}"))
    ours, stock = example.main(
        ["--adapters", str(tmp_path / "adapters"), "--out", str(tmp_path / "out"), "--steps", "30"]
    )
    assert (ours - stock).abs().max() < 1e-5 * ours.abs().max()


def test_hugging_face_trainer(tmp_path: Path) -> None:
    # in a process of its own: transformers would take the folder tests/datasets for the package datasets
    command = [sys.executable, str(EXAMPLES / "hugging_face_trainer.py"), "--out", str(tmp_path), "--steps", "40"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    first, last = map(float, re.findall(r"^loss ([\d.]+) to ([\d.]+)$", answer.stdout, re.MULTILINE)[0])
    assert last < 0.5 * first


def test_reference_trainer(scenes: Path, subspaces: Path, tmp_path: Path) -> None:
    example = load("reference_trainer")
    s3.save_basis(tmp_path / "basis.safetensors", s3.build_basis(subspaces.glob("*.safetensors")))
    model = example.build_model("random", str(tmp_path / "basis.safetensors"), backbone="vggt-nano")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 8 and all(name.endswith(".c") for name in trained)
    dataset = example.SceneDataset(SimpleNamespace(training=True, img_size=28), str(scenes), len_train=10)
    sample = dataset[0, 3, 1.0]
    assert len(dataset) == 10 and sample["frame_num"] == 3 and sample["images"][0].dtype == np.uint8
    for points, pose, intrinsic in zip(sample["world_points"], sample["extrinsics"], sample["intrinsics"]):
        seen = (points @ pose[:, :3].T + pose[:, 3]) @ intrinsic.T
        np.testing.assert_allclose(seen[3, 5, :2] / seen[3, 5, 2], [5.5, 3.5], atol=1e-6)
    example.save_cores(model, str(tmp_path / "cores.safetensors"))
    assert (tmp_path / "cores.safetensors").stat().st_size < 10_000


def test_your_own_scenes(tmp_path: Path) -> None:
    report = load("your_own_scenes").main(["--out", str(tmp_path / "mine"), "--size", "56"])
    assert report["scenes"] == 2 and report["with_errors"] == 0
