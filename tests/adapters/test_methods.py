"""Every method on the same model: what it trains, that it starts at the base, that training lowers the loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters.models import outputs, random_basis, relative_difference, tiny_vggt
from torch import nn
from training.plane_scenes import write_plane_scenes

from subspace3d.adapters.hooks import method_hook
from subspace3d.adapters.methods import add_lora, apply_method
from subspace3d.adapters.parameters import count_trainable, trainable_parameters
from subspace3d.adapters.placement import count_parameters, place, select_modules
from subspace3d.adapters.spectral import singular_basis
from subspace3d.backbones import build_vggt
from subspace3d.backbones.targets import target_modules
from subspace3d.backbones.vggt_preset import VGGTBackbone
from subspace3d.choices import METHODS, OWN_WEIGHTS
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.training.config import TrainConfig
from subspace3d.training.loop import train

ADAPTED = [method for method in METHODS if method not in ("none", *OWN_WEIGHTS)]


def tune(model: nn.Module, method: str, rank: int = 3, K: int = 5, steps: int = 20, head_cores: bool = False):
    basis = None
    if method == "psv":
        basis = singular_basis(model, place(model, "psv", head_cores=head_cores).cores, K)
    if method == "subspace":
        basis = random_basis(model, list(place(model, "subspace", head_cores=head_cores).cores), K)
    return apply_method(model, method, rank, basis=basis, base_model="some-model", steps=steps)  # type: ignore[arg-type]


def _lora_count(model: nn.Module, names: list[str], rank: int, extra: int = 0) -> int:
    """r (in + out + extra) per module, a convolution unrolled on its input side."""
    weights = [model.get_parameter(f"{name}.weight") for name in names]
    return sum(rank * (weight.shape[0] + weight[0].numel() + extra) for weight in weights)


def test_none_and_full() -> None:
    model = tiny_vggt()
    assert count_trainable(apply_method(model, "none")) == {"total": 0}
    expected = sum(p.numel() for name, p in model.named_parameters() if "patch_embed" not in name)
    counts = count_trainable(apply_method(model, "full"))
    assert counts["total"] == expected
    assert set(counts) == {"aggregator", "camera_head", "depth_head", "total"}
    assert not any(p.requires_grad for p in model.aggregator.patch_embed.parameters())


def test_bias_trains_the_biases_outside_heads_and_encoder() -> None:
    model = tiny_vggt()
    tuned = apply_method(model, "bias")
    assert tuned is model
    names = list(trainable_parameters(model))
    assert names == [
        name
        for name, _ in model.named_parameters()
        if name.startswith("aggregator.") and "patch_embed" not in name and name.endswith(".bias")
    ]
    # of every block: two norms, those of queries and keys, the four Linears
    kinds = {name.partition("_blocks.")[2].partition(".")[2] for name in names}
    assert kinds == {
        f"{module}.bias"
        for module in ("norm1", "norm2", "attn.q_norm", "attn.k_norm", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert set(count_trainable(model)) == {"aggregator", "total"}


def test_bias_needs_biases() -> None:
    model = tiny_vggt()
    for module in model.aggregator.modules():
        if getattr(module, "bias", None) is not None:
            module.bias = None
    with pytest.raises(ValueError, match="bias needs a backbone with biases in aggregator, found none"):
        apply_method(model, "bias")


@pytest.mark.parametrize("method", ADAPTED)
def test_starts_at_the_base_and_trains_what_it_says(method: str) -> None:
    model = tiny_vggt()
    linears = [name for name in target_modules(model, "all") if isinstance(model.get_submodule(name), nn.Linear)]
    expected = {
        "lora": _lora_count(model, target_modules(model, "all"), 3),
        "pissa": _lora_count(model, target_modules(model, "all"), 3),
        # ranks start at 4 = 3 + 1 and are cut to 3 on average
        "adalora": _lora_count(model, linears, 4, extra=1),
        "psv": 16 * 5**2 + _lora_count(model, target_modules(model, "heads"), 3),
        "subspace": 16 * 5**2 + _lora_count(model, target_modules(model, "heads"), 3),
    }[method]
    before = outputs(model)
    tuned = tune(model, method)
    assert count_trainable(tuned)["total"] == expected
    assert not any("patch_embed" in name for name in trainable_parameters(tuned))
    assert tuned.peft_config["default"].base_model_name_or_path == "some-model"
    assert tuned.peft_config["default"].lora_alpha == 6
    # kernels chosen with and without adapters differ in rounding; pissa takes the weights apart
    assert relative_difference(outputs(tuned), before) < 1e-5


@pytest.mark.parametrize("method", [*OWN_WEIGHTS, *ADAPTED])
@pytest.mark.parametrize("head_cores", [False, True])
def test_counts_without_weights_are_those_of_the_tuned_model(method: str, head_cores: bool) -> None:
    if head_cores and method not in ("psv", "subspace"):
        return
    counted = count_parameters(tiny_vggt(), method, 3, 5, head_cores=head_cores)
    real = count_trainable(tune(tiny_vggt(), method, head_cores=head_cores))
    if method == "adalora":
        # counted at the target rank 3, the model still stands at the initial 4
        assert {part: 3 * number for part, number in real.items()} == {part: 4 * n for part, n in counted.items()}
    else:
        assert counted == real


def test_head_cores_stand_beside_the_lora() -> None:
    model = tiny_vggt()
    placement = place(model, "subspace", head_cores=True)
    wide = [name for name in placement.cores if not name.startswith("aggregator")]
    # depth features: 16
    assert "depth_head.projects.0" in wide and "camera_head.pose_branch.fc1" in wide
    assert "camera_head.pose_branch.fc2" not in wide and "depth_head.scratch.output_conv2.2" not in wide
    tuned = tune(model, "subspace", head_cores=True)
    layer = tuned.get_submodule("base_model.model.depth_head.projects.0")
    assert set(layer.subspace_core) == set(layer.lora_A) == {"default"}


@pytest.mark.parametrize("method", [*OWN_WEIGHTS, *ADAPTED])
def test_a_few_steps_lower_the_loss_of_vggt_nano(method: str, tmp_path: Path) -> None:
    scenes = write_plane_scenes(tmp_path / "scenes", scenes=1, views=2)
    # one scene and all its frames: every step sees the same batch, in one of two orders
    dataset = MultiViewDataset(scenes, image_size=28, augment=False)
    rate = {"full": 1e-4, "pissa": 3e-4, "adalora": 2e-2}.get(method, 3e-3)
    config = TrainConfig(
        steps=8, lr=rate, warmup=0.0, frames=(2, 2), images_per_step=2, image_size=28, device="cpu", threads=1
    )
    torch.manual_seed(0)
    model = tune(build_vggt("vggt-nano"), method, rank=4, K=8, steps=config.steps)
    train(model, dataset, config, tmp_path / method, hook=method_hook(model))
    lines = [json.loads(line) for line in (tmp_path / method / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert all(("regularizer" in line) == (method == "adalora") for line in lines)
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.01 * abs(losses[0])


def test_targets() -> None:
    model = tiny_vggt()
    tuned = apply_method(model, "lora", rank=2, targets=r"aggregator\.frame_blocks\.1\.attn\.(qkv|proj)")
    names = sorted(name for name in trainable_parameters(tuned) if "lora_A" in name)
    assert [name.split(".")[-4] for name in names] == ["proj", "qkv"]
    with pytest.raises(ValueError, match=r"targets must match at least one full .*, heads, all; 'blocks' matches none"):
        add_lora(tiny_vggt(), 2, "blocks")
    with pytest.raises(ValueError, match=r"targets must be a regular expression, got '\(': "):
        add_lora(tiny_vggt(), 2, "(")
    with pytest.raises(ValueError, match=r"leave out depth_head.resize_layers.0: ConvTranspose2d is not supported"):
        add_lora(tiny_vggt(), 2, r"depth_head\.resize_layers\.[01]")
    with pytest.raises(ValueError, match=r"aggregator.frame_blocks is a torch\..*\.ModuleList"):
        select_modules(model, "aggregator.frame_blocks")
    with pytest.raises(ValueError, match=r"leave out 0: a Conv2d with groups=2"):
        select_modules(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), "0")
    with pytest.raises(ValueError, match="match at least one Linear for the method adalora"):
        apply_method(tiny_vggt(), "adalora", targets=r"depth_head\.projects\.\d", steps=9)


def test_wrong_settings() -> None:
    model = tiny_vggt()
    with pytest.raises(ValueError, match=r"method must be one of none, full, .*, got 'dora'"):
        apply_method(model, "dora")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"method must be one of lora, .*, subspace, got 'full'"):
        place(model, "full")
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        apply_method(model, "lora", rank=0)
    for method in ("psv", "subspace"):
        with pytest.raises(ValueError, match=f"subspaces must be given for the method {method}"):
            apply_method(model, method)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be at least 3 for the method adalora"):
        apply_method(model, "adalora", steps=2)
    with pytest.raises(ValueError, match=r"K must be at most 32, the smaller side of aggregator.frame_blocks.0.attn"):
        tune(model, "psv", K=33)
    with pytest.raises(ValueError, match=r"rank \(K\) must be at most 32"):
        count_parameters(model, "psv", 3, 33)


def test_methods_work_by_name_on_a_foreign_vggt() -> None:
    """A class of its own with the published names; it is called as its owner calls it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})
            self.mlp = nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.attn["proj"](self.attn["qkv"](x)[..., :8].tanh())
            return x + self.mlp["fc2"](self.mlp["fc1"](x).relu())

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aggregator = nn.Module()
            self.aggregator.patch_embed = nn.Linear(6, 8)
            self.aggregator.frame_blocks = nn.ModuleList(Block() for _ in range(2))
            self.aggregator.global_blocks = nn.ModuleList(Block() for _ in range(2))
            self.camera_head = nn.Module()
            self.camera_head.embed_pose = nn.Linear(8, 9)
            self.track_head = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.aggregator.patch_embed(x)
            for frame, globally in zip(self.aggregator.frame_blocks, self.aggregator.global_blocks):
                x = globally(frame(x))
            return torch.cat([self.camera_head.embed_pose(x), self.track_head(x)], -1)

    for method in ADAPTED:
        torch.manual_seed(0)
        model, x = Theirs(), torch.randn(4, 6)
        before = outputs(model, x)
        tuned = tune(model, method, rank=2, K=3)
        names = trainable_parameters(tuned)
        assert any("embed_pose" in name for name in names) and not any("track_head" in name for name in names)
        assert not any("patch_embed" in name for name in names)
        assert relative_difference(outputs(tuned, x), before) < 1e-6
        optimizer = torch.optim.AdamW(names.values(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            tuned(x).square().mean().backward()
            optimizer.step()
        assert outputs(tuned, x).square().mean() < before.square().mean()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("base_model.model.aggregator.frame_blocks.0.attn.qkv.subspace_core.default.c", "aggregator"),
        ("depth_head.projects.0.lora_A.default.weight", "depth_head"),
        ("camera_head.embed_pose.weight", "camera_head"),
        ("point_head.norm.weight", "other"),
    ],
)
def test_part_of(name: str, part: str) -> None:
    assert VGGTBackbone().part_of(name) == part
