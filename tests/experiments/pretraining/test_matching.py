"""What pre-training adds to a step: where patches are in other frames, points of patches, attention across frames."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from adapters.models import TINY
from training.plane_scenes import plane_views

from experiments.pretraining.matching import (
    MATCH_WEIGHT,
    Pretraining,
    match_targets,
    matching_loss,
    points_loss,
    start_able_to_match,
)
from subspace3d.backbones.losses import LossCounts, multitask_loss
from subspace3d.backbones.vggt import VGGT
from subspace3d.training.normalization import normalize_scenes

SIZE, PATCH = 56, 14
CONFIG = dataclasses.replace(TINY, image_size=SIZE)


def plane_batch(scenes: int = 2, views: int = 3) -> dict:
    """Normalised scenes of a tilted plane, whose points and cameras are known in closed form."""
    parts = [[torch.from_numpy(x) for x in plane_views(seed, views, SIZE)] for seed in range(scenes)]
    images, depths, intrinsics, extrinsics = (torch.stack(x) for x in zip(*parts))
    batch = {
        "images": images.permute(0, 1, 4, 2, 3).float() / 255,
        "depths": depths,
        "point_masks": depths > 0,
        "intrinsics": intrinsics.float(),
        "extrinsics": extrinsics.float(),
    }
    return normalize_scenes(batch)[0]


def test_targets_point_at_the_patch_that_shows_the_same_surface() -> None:
    batch = plane_batch()
    target, visible = match_targets(batch, batch["world_points"], PATCH)
    side = SIZE // PATCH
    seen = visible.nonzero()
    assert target.shape == (len(seen), side**2)
    assert visible.any() and not visible.diagonal(dim1=1, dim2=2).any()
    torch.testing.assert_close(target.sum(-1), torch.ones(len(seen)))
    # the middles of the patches as one sees them: a plane maps linearly in homogeneous pixels, so one point at a time
    scene, i, j, p = seen[len(seen) // 2].tolist()
    row, column = divmod(p, side)
    point = batch["world_points"][scene, i, row * PATCH + PATCH // 2, column * PATCH + PATCH // 2]
    camera = batch["extrinsics"][scene, j]
    x, y, z = (batch["intrinsics"][scene, j] @ (camera[:, :3] @ point + camera[:, 3])).tolist()
    across, down = x / z / PATCH - 0.5, y / z / PATCH - 0.5
    weights = target[len(seen) // 2].view(side, side)
    found = [float((weights.sum(axis) * torch.arange(side)).sum()) for axis in (0, 1)]
    expected = [min(max(value, 0), side - 1) for value in (across, down)]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_patch_hidden_in_the_other_frame_is_not_visible() -> None:
    batch = plane_batch(scenes=1, views=2)
    _, before = match_targets(batch, batch["world_points"], PATCH)
    batch["depths"][:, 1] *= 0.5  # something nearer stands in front of all of the second frame
    _, after = match_targets(batch, batch["world_points"], PATCH)
    assert before[:, 0, 1].any() and not after[:, 0, 1].any()


def test_matching_loss_is_least_where_attention_equals_the_target() -> None:
    everywhere = torch.rand(1, 2, 2, 5, 5).softmax(-1)
    visible = torch.rand(1, 2, 2, 5) < 0.7
    target = everywhere[visible]
    entropy = -(target * target.log()).sum(-1).mean()
    torch.testing.assert_close(matching_loss(everywhere.log(), target, visible), entropy)
    assert matching_loss(torch.randn_like(everywhere), target, visible) > entropy
    assert matching_loss(everywhere, target[:0], torch.zeros_like(visible)) == 0


def test_points_loss_is_the_mean_distance_of_valid_points() -> None:
    batch = plane_batch()
    stride = PATCH // 2
    exact = batch["world_points"][:, :, stride // 2 :: stride, stride // 2 :: stride]
    assert points_loss(exact, batch["world_points"], batch["point_masks"]) == 0
    moved = exact + torch.tensor([3.0, 0.0, 4.0])
    torch.testing.assert_close(points_loss(moved, batch["world_points"], batch["point_masks"]), torch.tensor(5.0))
    mask = batch["point_masks"].clone()
    mask[0] = False
    moved[0] = torch.tensor(1e6)
    torch.testing.assert_close(points_loss(moved, batch["world_points"], mask), torch.tensor(5.0))


def test_match_logits_are_those_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    trainer = Pretraining(VGGT(CONFIG), blocks=(1,))
    start = trainer.model.aggregator.patch_start
    tokens = start + (SIZE // PATCH) ** 2
    computed = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def record(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        computed.append(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5)
        return fused(q, k, v)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    logits = trainer(plane_batch()["images"])["match_logits"][0]
    # the last attention over all tokens of three frames is that of block 1 of two
    last = [values for values in computed if values.shape[-1] == 3 * tokens][-1]
    expected = last[:, 0].view(2, 3, tokens, 3, tokens).transpose(2, 3)[..., start:, start:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_objective_adds_both_losses_and_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    model = VGGT(CONFIG)
    start_able_to_match(model)
    trainer = Pretraining(model, blocks=(0, 1))
    batch = plane_batch()
    counts = LossCounts.of(batch)
    predictions = trainer(batch["images"])
    terms = trainer.objective(predictions, batch, 1.0, counts)
    plain = multitask_loss(predictions, batch, 1.0, counts)["loss"]
    torch.testing.assert_close(terms["loss"], plain + terms["points"] + MATCH_WEIGHT * terms["match"])
    terms["loss"].backward()
    unreached = [n for n, p in trainer.named_parameters() if p.grad is None]
    assert all("mask_token" in name for name in unreached), unreached


def test_the_objectives_of_the_parts_of_a_step_add_up_to_that_of_the_whole() -> None:
    torch.manual_seed(0)
    trainer = Pretraining(VGGT(CONFIG), blocks=(1,)).eval()
    batch = plane_batch(scenes=3)
    batch["point_masks"] = torch.ones_like(batch["point_masks"])
    counts = LossCounts.of(batch)

    def terms(scenes: slice) -> dict:
        part = {name: value[scenes] for name, value in batch.items()}
        with torch.no_grad():
            return trainer.objective(trainer(part["images"]), part, 1.0, counts)

    whole, parts = terms(slice(3)), [terms(slice(1)), terms(slice(1, 3))]
    torch.testing.assert_close(parts[0]["points"] + parts[1]["points"], whole["points"])
    # a mean over the visible patches of each part, so equal only about
    torch.testing.assert_close(parts[0]["match"] + parts[1]["match"], whole["match"], rtol=0.05, atol=0)
    for name in ("depth_error", "rotation"):
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name])


def test_without_the_depth_head_a_step_leaves_it_alone() -> None:
    trainer = Pretraining(VGGT(CONFIG), blocks=(1,))
    trainer.run_depth_head(False)
    batch = plane_batch()
    terms = trainer.objective(trainer(batch["images"]), batch, 1.0, LossCounts.of(batch))
    terms["loss"].backward()
    assert all(p.grad is None for p in trainer.model.depth_head.parameters())
    assert "depth" not in terms


def test_start_lets_alike_tokens_attend_to_each_other() -> None:
    torch.manual_seed(0)
    model = VGGT(CONFIG)
    start_able_to_match(model)
    query, key, _ = model.aggregator.global_blocks[0].get_submodule("attn.qkv").weight.detach().chunk(3)
    similarity = torch.nn.functional.cosine_similarity(query.flatten(), key.flatten(), dim=0)
    # keys are 0.9 query + sqrt(1 - 0.81) noise of the same size
    assert abs(float(similarity) - 0.9) < 3 / query.numel() ** 0.5
    embeddings = model.aggregator.patch_embed.pos_embed[0, 1:].detach()
    distances = torch.cdist(embeddings, embeddings) + 10 * torch.eye(len(embeddings))
    assert distances.min() > 0.1  # every patch knows its place
