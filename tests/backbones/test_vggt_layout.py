"""Names, shapes and sizes of the big model, on the meta device: what a published checkpoint is matched against."""

import pytest
import torch

from subspace3d.backbones.config import CONFIGS, VGGTConfig, named_config
from subspace3d.backbones.vggt import VGGT


@pytest.mark.parametrize(
    ("part", "tensors", "parameters"),
    [
        ("aggregator", 1210, 909_112_320),
        ("aggregator.patch_embed", 344, 304_372_736),
        ("aggregator.frame_blocks", 432, 302_364_672),
        ("aggregator.global_blocks", 432, 302_364_672),
        ("camera_head", 69, 216_174_610),
        ("depth_head", 62, 32_654_562),
    ],
)
def test_each_part_of_vggt_1b_has_its_published_size(big: VGGT, part: str, tensors: int, parameters: int) -> None:
    state = big.get_submodule(part).state_dict()
    assert len(state) == tensors
    assert sum(tensor.numel() for tensor in state.values()) == parameters


def test_vggt_1b_totals(big: VGGT) -> None:
    total = sum(tensor.numel() for tensor in big.state_dict().values())
    encoder = sum(tensor.numel() for tensor in big.aggregator.patch_embed.state_dict().values())
    assert round(total / 1e6, 2) == 1157.94
    assert round((total - encoder) / 1e6, 2) == 853.57


PUBLISHED_SHAPES = {
    "aggregator.camera_token": (1, 2, 1, 1024),
    "aggregator.register_token": (1, 2, 4, 1024),
    "aggregator.patch_embed.cls_token": (1, 1, 1024),
    "aggregator.patch_embed.pos_embed": (1, 1370, 1024),
    "aggregator.patch_embed.register_tokens": (1, 4, 1024),
    "aggregator.patch_embed.mask_token": (1, 1024),
    "aggregator.patch_embed.patch_embed.proj.weight": (1024, 3, 14, 14),
    "aggregator.patch_embed.blocks.23.attn.qkv.weight": (3072, 1024),
    "aggregator.patch_embed.blocks.0.ls1.gamma": (1024,),
    "aggregator.patch_embed.norm.bias": (1024,),
    "aggregator.frame_blocks.23.attn.q_norm.weight": (64,),
    "aggregator.global_blocks.0.attn.k_norm.bias": (64,),
    "aggregator.global_blocks.23.mlp.fc1.weight": (4096, 1024),
    "camera_head.empty_pose_tokens": (1, 1, 9),
    "camera_head.embed_pose.weight": (2048, 9),
    "camera_head.token_norm.weight": (2048,),
    "camera_head.trunk_norm.weight": (2048,),
    "camera_head.trunk.3.attn.qkv.weight": (6144, 2048),
    "camera_head.trunk.0.mlp.fc2.weight": (2048, 8192),
    "camera_head.poseLN_modulation.1.weight": (6144, 2048),
    "camera_head.pose_branch.fc1.weight": (1024, 2048),
    "camera_head.pose_branch.fc2.weight": (9, 1024),
    "depth_head.norm.weight": (2048,),
    "depth_head.projects.0.weight": (256, 2048, 1, 1),
    "depth_head.projects.3.weight": (1024, 2048, 1, 1),
    "depth_head.resize_layers.0.weight": (256, 256, 4, 4),
    "depth_head.resize_layers.1.weight": (512, 512, 2, 2),
    "depth_head.resize_layers.3.weight": (1024, 1024, 3, 3),
    "depth_head.scratch.layer4_rn.weight": (256, 1024, 3, 3),
    "depth_head.scratch.refinenet1.resConfUnit1.conv1.weight": (256, 256, 3, 3),
    "depth_head.scratch.refinenet4.resConfUnit2.conv2.bias": (256,),
    "depth_head.scratch.refinenet4.out_conv.weight": (256, 256, 1, 1),
    "depth_head.scratch.output_conv1.weight": (128, 256, 3, 3),
    "depth_head.scratch.output_conv2.0.weight": (32, 128, 3, 3),
    "depth_head.scratch.output_conv2.2.weight": (2, 32, 1, 1),
}


def test_names_and_shapes_of_vggt_1b(big: VGGT) -> None:
    state = big.state_dict()
    assert {name: tuple(state[name].shape) for name in PUBLISHED_SHAPES if name in state} == PUBLISHED_SHAPES
    assert "depth_head.scratch.refinenet4.resConfUnit1.conv1.weight" not in state
    assert "depth_head.scratch.layer1_rn.bias" not in state
    assert not any("image_mean" in name or "image_std" in name for name in state)


def test_published_constants(big: VGGT) -> None:
    encoder, camera = big.aggregator.patch_embed, big.camera_head
    assert {encoder.norm.eps, encoder.get_submodule("blocks.0.norm1").eps, camera.adaln_norm.eps} == {1e-6}
    norms = ("aggregator.frame_blocks.0.norm2", "aggregator.global_blocks.0.attn.q_norm", "camera_head.trunk_norm")
    assert {big.get_submodule(name).eps for name in (*norms, "camera_head.trunk.0.norm1", "depth_head.norm")} == {1e-5}
    assert camera.adaln_norm.weight is None


def test_random_weights_start_as_documented(tiny: VGGT) -> None:
    aggregator = tiny.aggregator
    assert 0 < aggregator.camera_token.std() < 3e-6
    assert 0 < aggregator.register_token.std() < 3e-6
    assert aggregator.get_parameter("frame_blocks.0.ls1.gamma").unique().tolist() == [0.5]
    assert aggregator.get_parameter("patch_embed.blocks.0.ls1.gamma").unique().tolist() == [1.0]
    assert not aggregator.patch_embed.mask_token.requires_grad


def test_nano_fits_in_the_package() -> None:
    with torch.device("meta"):
        nano = VGGT(CONFIGS["vggt-nano"])
    assert 2 * sum(parameter.numel() for parameter in nano.parameters()) < 20e6


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 100),
        ("embed_dim", 100),
        ("depth_taps", (0, 1, 2, 24)),
        ("depth_features", 12),
        ("depth_channels", (8, 8, 8, 6)),
        ("frames_chunk_size", 0),
    ],
)
def test_sizes_that_do_not_fit_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        VGGTConfig(name="odd", **{field: value})


def test_configuration_can_be_asked_as_a_dictionary():
    """PEFT before 0.18 does so with a model's `config`."""
    config = named_config("vggt-nano")
    assert config.get("embed_dim") == config.embed_dim
    assert config.get("model_type") is None and config.get("tie_word_embeddings", False) is False
