"""Wrappers of other packages: their conventions, what they adapt and freeze, and how weights are loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.spatial.transform import Rotation
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from training.plane_scenes import plane_views

from subspace3d.adapters.inject import inject
from subspace3d.adapters.methods import apply_method
from subspace3d.adapters.placement import check_uses, count_parameters, place
from subspace3d.backbones.build import build_backbone
from subspace3d.backbones.find import backbone_of, find_backbone
from subspace3d.backbones.losses import LossCounts, multitask_loss
from subspace3d.backbones.pose import encode_pose
from subspace3d.backbones.presets import PRESETS
from subspace3d.backbones.protocol import Prediction, attach
from subspace3d.backbones.targets import target_modules
from subspace3d.training.normalization import normalize_scenes
from subspace3d.training.without_values import without_values

NAMES = ("pi3", "pi3x", "vggt-omega", "mapanything", "mapanything-apache")
FLOAT32 = 1e-5

pytestmark = pytest.mark.usefixtures("other_packages")


def _batch(size: int, frames: int = 3) -> dict[str, torch.Tensor]:
    scenes = [plane_views(seed, frames, size) for seed in range(2)]
    keys = ("images", "depths", "intrinsics", "extrinsics")
    batch = {key: torch.from_numpy(np.stack([s[i] for s in scenes])).float() for i, key in enumerate(keys)}
    batch["images"] = batch["images"].permute(0, 1, 4, 2, 3) / 255
    batch["point_masks"] = batch["depths"] > 0
    return batch


def _build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_backbone(name, "random")


class Recited(nn.Module):
    """A network that knows the answer and gives it as its package would."""

    def __init__(self, outputs: object) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, images: object) -> object:
        self.asked = images
        return self.outputs


def _world(batch: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    """Camera-to-world poses ``[B, S, 4, 4]`` in a world that is turned, moved and scaled."""
    turn = torch.eye(4)
    turn[:3, :3] = torch.from_numpy(Rotation.from_rotvec([0.4, 2.0, -1.0]).as_matrix())
    turn[:3, 3] = torch.tensor([4.0, -2.0, 1.0])
    full = torch.eye(4).repeat(*batch["extrinsics"].shape[:2], 1, 1)
    full[..., :3, :] = batch["extrinsics"]
    poses = turn @ torch.linalg.inv(full)
    poses[..., :3, 3] *= scale
    return poses


def _camera_points(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """z K^-1 (x, y, 1), by numpy."""
    size = batch["depths"].shape[-1]
    x, y = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
    pixels = np.stack([x, y, np.ones_like(x)], -1)
    inverse = np.linalg.inv(batch["intrinsics"].double().numpy())
    rays = np.einsum("bnij,hwj->bnhwi", inverse, pixels)
    return torch.from_numpy(rays * batch["depths"].double().numpy()[..., None]).float()


def _answers(name: str, batch: dict[str, torch.Tensor], scale: float) -> object:
    points, poses = scale * _camera_points(batch), _world(batch, scale)
    if name.startswith("pi3"):
        logits = torch.zeros(*points.shape[:-1], 1)
        return {"local_points": points, "points": points, "conf": logits, "camera_poses": poses}
    along = points.norm(dim=-1, keepdim=True)
    quaternions = Rotation.from_matrix(poses[..., :3, :3].flatten(0, 1).double().numpy()).as_quat()
    quaternions = torch.from_numpy(quaternions).float().reshape(*poses.shape[:2], 4)
    return [
        {
            "pts3d_cam": points[:, n],
            "ray_directions": points[:, n] / along[:, n],
            "depth_along_ray": along[:, n],
            "cam_trans": poses[:, n, :3, 3],
            # not of length one, as a network may give them
            "cam_quats": 3 * quaternions[:, n],
            "conf": torch.ones(points.shape[0], *points.shape[2:4]),
        }
        for n in range(points.shape[1])
    ]


@pytest.mark.parametrize("name", ["pi3", "pi3x", "mapanything"])
def test_true_outputs_in_the_package_s_conventions_are_read_and_cost_nothing(name: str) -> None:
    batch, scale = _batch(28), 2.5
    backbone = find_backbone(name)
    model = Recited(_answers(name, batch, scale))
    prediction = backbone(model, batch["images"])
    # z-depth, where the distance along the ray is up to a tenth longer
    torch.testing.assert_close(prediction.depth, scale * batch["depths"], rtol=FLOAT32, atol=0)
    torch.testing.assert_close(prediction.intrinsics, batch["intrinsics"], rtol=1e-4, atol=1e-4)
    # camera-from-world: the pose of camera 2 in camera 1 is that of the truth
    for poses, unit in ((prediction.extrinsics, scale), (batch["extrinsics"], 1.0)):
        assert poses is not None
        bottom = torch.tensor([0.0, 0, 0, 1]).expand(*poses.shape[:2], 1, 4)
        full = torch.cat([poses, bottom], -2).double()
        relative = full[:, 0] @ torch.linalg.inv(full[:, 1])
        relative[:, :3, 3] /= unit
        if unit == scale:
            found = relative
    torch.testing.assert_close(found, relative, rtol=0, atol=1e-5)
    normalised, _ = normalize_scenes(batch)
    terms = backbone.loss(prediction, normalised, 5.0, LossCounts.of(normalised))
    assert float(terms["loss"]) == pytest.approx(0, abs=1e-4)

    # the other direction, or the other depth, is not taken for it
    wrong = _answers(name, batch, scale)
    if isinstance(wrong, dict):
        wrong["camera_poses"] = torch.linalg.inv(wrong["camera_poses"])
    else:
        for view in wrong:
            view["cam_quats"] = view["cam_quats"] * torch.tensor([-1.0, -1, -1, 1])
    terms = backbone.loss(backbone(Recited(wrong), batch["images"]), normalised, 5.0, LossCounts.of(normalised))
    assert float(terms["rotation"]) > 0.05


def test_mapanything_gets_views_normalised_as_its_encoder_wants() -> None:
    batch = _batch(28)
    model = Recited(_answers("mapanything", batch, 1.0))
    find_backbone("mapanything")(model, batch["images"])
    assert len(model.asked) == 3 and model.asked[1]["data_norm_type"] == ["dinov2"]
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (batch["images"][:, 1] - mean[:, None, None]) / deviation[:, None, None]
    torch.testing.assert_close(model.asked[1]["img"], expected)
    model.encoder = nn.Module()
    model.encoder.data_norm_type = "dust3r"
    with pytest.raises(ValueError, match="must take images normalised as dinov2, got 'dust3r'"):
        find_backbone("mapanything")(model, batch["images"])


def test_omega_is_read_as_one_camera_encoding_in_the_first_frame() -> None:
    batch, _ = normalize_scenes(_batch(32))
    encoding = encode_pose(batch["extrinsics"], batch["intrinsics"], (32, 32))
    outputs = {"pose_enc": encoding, "depth": batch["depths"][..., None], "depth_conf": torch.ones(2, 3, 32, 32)}
    backbone = find_backbone("vggt-omega")
    prediction = backbone(Recited(outputs), batch["images"])
    assert len(prediction.stages) == 1 and (backbone.scale, backbone.frame) == ("scene", "first")
    terms = backbone.loss(prediction, batch, 5.0, LossCounts.of(batch))
    assert float(terms["camera"]) == pytest.approx(0, abs=1e-6)
    assert float(terms["depth_error"]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_presets_match_adaptable_modules_and_parts_cover_them(name: str) -> None:
    model = _build(name)
    backbone = backbone_of(model)
    everything = target_modules(model, "all")
    assert set(everything) == set(target_modules(model, "cores")) | set(target_modules(model, "heads"))
    placement = place(model, "subspace")
    check_uses(model, {"cores": placement.cores, "heads": placement.adapters})
    for module in everything:
        assert not backbone.is_frozen(module) and backbone.part_of(module) != "other", module
    # what is neither frozen nor targeted: positions, in Pi3X convolutions that pad by repetition, in MapAnything those
    # with several names
    rest = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and not backbone.is_frozen(name)
        and name not in everything
        and getattr(module, "padding_mode", "zeros") == "zeros"
    }
    assert rest <= {"position", "aggregator.position", *(f"dpt_feature_head.scratch.layer{n}_rn" for n in range(1, 5))}
    assert count_parameters(model, "subspace", rank=2, K=3)["total"] > 0
    with torch.device("meta"):
        assert sum(1 for _ in backbone.network().parameters()) == sum(1 for _ in model.parameters())


@pytest.mark.parametrize("name", NAMES[:4])
def test_a_zero_start_changes_nothing_and_every_trained_tensor_gets_a_gradient(name: str) -> None:
    model = _build(name)
    backbone = backbone_of(model)
    batch = _batch(2 * backbone.patch_size)
    normalised, _ = normalize_scenes(batch)
    with torch.no_grad():
        before = backbone(model, batch["images"])
        tuned = apply_method(model, "lora", rank=2)
        after = backbone(tuned, batch["images"])
    assert backbone_of(tuned) is backbone
    assert torch.equal(before.depth, after.depth)
    for one, two in zip((before.extrinsics, *before.stages), (after.extrinsics, *after.stages)):
        assert one is two is None or torch.equal(one, two)
    counts = LossCounts.of(normalised)
    backbone.loss(backbone(tuned, batch["images"]), normalised, 5.0, counts)["loss"].backward()
    trained = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    # lora_A has none before lora_B has moved
    assert all(torch.isfinite(p.grad).all() for p in trained.values())
    assert all(p.grad.any() for name, p in trained.items() if "lora_B" in name)


@pytest.mark.parametrize("name", [*NAMES[:4], "vggt-nano", "backbones.tiny_da3:backbone"])
def test_a_step_in_bfloat16_is_close_to_one_in_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, by autocast, with the usual weight of the cameras.

    A ReLU whose input is 0 up to rounding is on in one precision and off in the other. In a pose head of 16 channels,
    after the mean over an image, one such ReLU turns the gradient by 30 degrees; smooth ones leave the rounding alone.
    """
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.silu(x))
    torch.manual_seed(0)
    model = build_backbone(name, None if name == "vggt-nano" else "random")
    backbone = backbone_of(model)
    batch = _batch(2 * backbone.patch_size)
    normalised, _ = normalize_scenes(batch)
    counts, losses, gradients = LossCounts.of(normalised), [], []
    parameters = [model.get_parameter(f"{module}.weight") for module in target_modules(model, "cores")]
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            prediction = backbone.predict(model, batch["images"])
        loss = backbone.loss(prediction, normalised, 5.0, counts)["loss"]
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    # 8 bits of mantissa, through up to twenty layers
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("name", [*NAMES[:4], "vggt-nano", "backbones.tiny_da3:backbone"])
def test_heads_give_float32_inside_autocast(name: str) -> None:
    torch.manual_seed(0)
    model = build_backbone(name, None if name == "vggt-nano" else "random")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        prediction = backbone_of(model).predict(model, _batch(2 * backbone_of(model).patch_size)["images"])
    cameras = prediction.stages or (prediction.extrinsics,)
    for values in (prediction.depth, *cameras):
        assert values is not None and values.dtype == torch.float32
        # of numbers that were bfloat16 on their way none has more bits
        assert (values != values.bfloat16().float()).float().mean() > 0.5


@pytest.mark.parametrize("name", ["pi3", "vggt-omega", "mapanything"])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    batch = _batch(2 * find_backbone(name).patch_size)
    normalised, _ = normalize_scenes(batch)
    gradients = []
    for enabled in (False, True):
        model = _build(name)
        backbone = backbone_of(model)
        backbone.checkpointing(model, enabled)
        terms = backbone.loss(backbone(model, batch["images"]), normalised, 1.0, LossCounts.of(normalised))
        module = model.get_submodule(target_modules(model, "cores")[0])
        gradients.append(torch.autograd.grad(terms["loss"], module.weight)[0])
    assert torch.equal(*gradients)


def test_cores_sit_beside_the_masked_qkv_of_omega() -> None:
    model = _build("vggt-omega")
    name = "aggregator.frame_blocks.0.attn.qkv"
    base = model.get_submodule(name)
    dim = base.in_features
    assert torch.equal(base.bias_mask, torch.cat([torch.ones(dim), torch.zeros(dim), torch.ones(dim)]))
    with torch.no_grad():
        base.bias.normal_()
    x = torch.randn(5, dim)
    before = base(x)
    inject(model, {name: (torch.randn(3 * dim, 2), torch.randn(dim, 2))}, 2.0)
    layer = model.get_submodule(name)
    # attention reads the width of the layer
    assert layer.in_features == dim and torch.equal(layer(x), before)
    with torch.no_grad():
        layer.core.c.normal_()
    expected = before + 2 * ((x @ layer.core.V) @ layer.core.c.T) @ layer.core.U.T
    torch.testing.assert_close(layer(x), expected)


def test_a_file_with_the_inputs_of_pi3x_beside_images_is_read(tmp_path: Path) -> None:
    from pi3.models.pi3x import Pi3X

    full = Pi3X()
    save_file({name: tensor.clone() for name, tensor in full.state_dict().items()}, tmp_path / "model.safetensors")
    loaded = build_backbone("pi3x", tmp_path / "model.safetensors")
    assert not loaded.use_multimodal
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, full.state_dict()[name])
    with pytest.raises(ValueError, match=r"does not fit the model: .* 28 unexpected \(depth_emb, metric_decoder"):
        find_backbone("pi3").load(tmp_path / "model.safetensors")


def test_the_checkpoint_of_omega_brings_its_masks(tmp_path: Path) -> None:
    model = _build("vggt-omega")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["text_alignment_head.fc.weight"] = torch.ones(2, 2)
    torch.save(state, tmp_path / "vggt_omega.pt")
    loaded = build_backbone("vggt-omega", tmp_path / "vggt_omega.pt")
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_mapanything_is_built_from_the_configuration_beside_its_weights(tmp_path: Path) -> None:
    from mapanything.models import MapAnything

    published = MapAnything(dim=8)
    # of a tensor with two names safetensors keeps one
    state = {name: tensor.clone() for name, tensor in published.state_dict().items() if not name.startswith("dpt_")}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"must lie beside their config\.json and .* has no config\.json"):
        build_backbone("mapanything", tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"dim": 8}))
    loaded = build_backbone("mapanything", tmp_path / "model.safetensors")
    assert backbone_of(loaded).licence.startswith("CC BY-NC")
    assert all(torch.equal(tensor, published.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    broken = load_file(tmp_path / "model.safetensors")
    del broken["scale_token"]
    save_file(broken, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \(scale_token\)"):
        build_backbone("mapanything", tmp_path / "model.safetensors")


def test_a_parent_with_two_names_may_hold_an_adapter_and_a_shared_module_may_not() -> None:
    inner = nn.Sequential(nn.Linear(3, 3))
    twice_named = nn.ModuleDict({"one": inner, "two": nn.Sequential(inner)})
    check_uses(twice_named, {"targets": ["one.0"]})
    inject(twice_named, {"one.0": (torch.ones(3, 1), torch.ones(3, 1))})
    assert twice_named.get_submodule("two.0.0") is twice_named.get_submodule("one.0")
    shared = nn.Linear(3, 3)
    two_parents = nn.ModuleDict({"one": nn.Sequential(shared), "two": nn.Sequential(shared)})
    refused = r"targets must leave out one\.0: it is one module with two\.0"
    with pytest.raises(ValueError, match=refused):
        check_uses(two_parents, {"targets": ["one.0"]})
    for method in ("lora", "pissa", "adalora"):
        with pytest.raises(ValueError, match=refused):
            apply_method(two_parents, method, rank=1, targets=r"one\.0", steps=10)


def test_no_adapter_goes_on_the_convolutions_of_mapanything_that_are_called_by_another_name() -> None:
    model = _build("mapanything")
    head = model.dpt_feature_head
    assert head.input_process[1][1] is head.scratch.layer2_rn
    assert "dpt_feature_head.input_process.1.0.0" in target_modules(model, "heads")
    with pytest.raises(ValueError, match=r"scratch\.layer2_rn: it is one module with .*input_process\.1\.1"):
        apply_method(model, "lora", rank=1, targets=r"dpt_feature_head\.scratch\.layer2_rn")


def test_licences_are_those_of_the_published_weights() -> None:
    licences = {name: find_backbone(name).licence for name in NAMES}
    assert licences["mapanything-apache"] == "Apache-2.0"
    assert all("commercial" in str(licences[name]).lower() for name in NAMES[:4])
    assert set(NAMES) <= PRESETS.keys()


def test_the_package_is_named_where_it_is_looked_for() -> None:
    for name, package in (("pi3", "pi3"), ("vggt-omega", "vggt_omega"), ("mapanything", "mapanything")):
        backbone = find_backbone(name)
        assert backbone.missing() == [] and backbone.requires == (package,) and backbone.install


def test_a_user_s_own_instance_is_taken() -> None:
    from pi3.models.pi3 import Pi3

    own = attach(Pi3(), find_backbone("pi3"))
    assert backbone_of(own).name == "pi3"


class CrocoRotary(nn.Module):
    """The rotary embedding of Pi3: its table is as long as the largest position, and is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict = {}

    def get_cos_sin(self, dim: int, length: int, device: object, dtype: torch.dtype) -> tuple:
        key = dim, length, device, dtype
        if key not in self.cache:
            angles = torch.arange(length)[:, None] / 10.0 ** torch.arange(dim)
            self.cache[key] = angles.cos().to(dtype), angles.sin().to(dtype)
        return self.cache[key]

    def apply_rope1d(self, tokens: torch.Tensor, places: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        return tokens * nn.functional.embedding(places, cos) + tokens.flip(-1) * nn.functional.embedding(places, sin)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        tables = self.get_cos_sin(tokens.size(-1) // 2, int(positions.max()) + 1, tokens.device, tokens.dtype)
        halves = (self.apply_rope1d(t, positions[..., n], *tables) for n, t in enumerate(tokens.chunk(2, -1)))
        return torch.cat(list(halves), -1)


class PositionGetter:
    def __init__(self) -> None:
        self.cache_positions: dict = {}

    def __call__(self, size: int) -> torch.Tensor:
        if size not in self.cache_positions:
            self.cache_positions[size] = torch.cartesian_prod(torch.arange(size), torch.arange(size))
        return self.cache_positions[size]


def test_of_a_camera_that_is_predicted_in_part_the_part_is_trained() -> None:
    batch, _ = normalize_scenes(_batch(28))
    counts, size = LossCounts.of(batch), (28, 28)
    wrong = batch["extrinsics"].clone()
    wrong[..., 3] += 0.3
    longer = batch["intrinsics"] * torch.tensor([1.2, 1.2, 1])[:, None]
    full = multitask_loss(Prediction(extrinsics=wrong, intrinsics=longer), batch, 5.0, counts)
    poses = multitask_loss(Prediction(extrinsics=wrong), batch, 5.0, counts)
    assert float(poses["translation"]) == pytest.approx(float(full["translation"])) == pytest.approx(0.3)
    assert float(poses["fov"]) == pytest.approx(0, abs=1e-6)
    fields = multitask_loss(Prediction(intrinsics=longer), batch, 5.0, counts)
    expected = encode_pose(wrong, longer, size) - encode_pose(wrong, batch["intrinsics"], size)
    assert float(fields["fov"]) == pytest.approx(float(expected[..., 7:].abs().mean()))
    assert float(fields["translation"]) == float(fields["rotation"]) == 0
    assert float(fields["loss"]) == pytest.approx(5 * 0.5 * float(fields["fov"]))
    with pytest.raises(ValueError, match="must have depth, extrinsics, intrinsics or camera encodings"):
        multitask_loss(Prediction(), batch, 5.0, counts)


class Drawing(nn.Module):
    """Decides by draws, as MapAnything does about inputs that it may be given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        once = torch.rand(1) < 0.7
        x = x @ x if once else x
        if (torch.rand(3, device=x.device) < 0.2).any():
            raise AssertionError
        return x[:2]


def test_draws_are_a_half_where_tensors_have_no_values() -> None:
    model = Drawing()
    with without_values(model), FakeTensorMode():
        assert model(torch.ones(4, 4)).shape == (2, 4)
    assert torch.rand(1) != torch.rand(1)


def test_the_rotary_embedding_of_pi3_is_traced_and_its_tables_are_left_as_they_were() -> None:
    model = nn.Module()
    model.rope, model.positions = CrocoRotary(), PositionGetter()
    tokens = torch.randn(9, 8)
    expected = model.rope(tokens, model.positions(3))
    kept, places = dict(model.rope.cache), dict(model.positions.cache_positions)
    with without_values(model):
        torch.testing.assert_close(model.rope(tokens, model.positions(3)), expected)
    with without_values(model), FakeTensorMode() as fake:
        assert model.rope(fake.from_tensor(tokens), model.positions(4)[:9]).shape == tokens.shape
    assert model.rope.cache == kept and model.positions.cache_positions == places
    assert torch.equal(model.rope(tokens, model.positions(3)), expected)
