"""What the forward pass computes: the published numbers, symmetries, precision, bad input."""

import math

import pytest
import torch
from backbones.formula_weights import formula_images, set_formula_weights
from torch import Tensor

from subspace3d.backbones import build_vggt
from subspace3d.backbones.dpt_head import ResidualConvUnit, position_map
from subspace3d.backbones.layers import Attention, rotary_table, rotate
from subspace3d.backbones.vggt import VGGT

# Results of the published implementation in float64, with the sizes of fixture `tiny` and the weights and the
# non-square images of formula_weights. Depth and confidence: third frame, every 9th row and 13th column.
PUBLISHED_POSE = [
    [-4.027812, -0.662348, -1.555930, 2.400148, 3.374012, 3.481270, 0.017353, 2.629804, 1.574011],
    [-2.800436, -0.715831, -2.676766, 1.325923, 2.321349, 3.861513, -0.746860, 2.466305, 2.800349],
    [-2.967556, -0.619249, -2.791577, 1.393240, 2.291654, 3.871261, -0.766785, 2.493505, 2.602551],
]
PUBLISHED_FIRST_STEP = [-0.726499, -0.239647, -0.244509, 0.558722, 0.857832, 0.872179, 0.195440, 0.915170, 0.505403]
PUBLISHED_DEPTH = [
    [0.675833, 0.588170, 0.614709, 0.636309],
    [0.453589, 0.428675, 0.438877, 0.576251],
    [0.458311, 0.404325, 0.434377, 0.606940],
    [0.498452, 0.497980, 0.502293, 0.595485],
]
PUBLISHED_CONFIDENCE = [
    [2.028563, 1.969395, 1.932045, 1.999388],
    [2.238094, 2.416102, 2.382499, 2.298044],
    [2.235057, 2.434043, 2.445262, 2.297257],
    [2.399748, 3.021094, 2.945965, 2.638846],
]


def test_agrees_with_the_published_implementation(tiny: VGGT) -> None:
    tiny.double()
    set_formula_weights(tiny)
    with torch.no_grad():
        result = tiny(formula_images(1, 3, 28, 42).double())

    def compare(actual: Tensor, expected: list) -> None:
        # the numbers are rounded to 6 digits, and the rotation tables are float32 in both implementations
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)

    compare(result["pose_enc"][0], PUBLISHED_POSE)
    compare(result["pose_enc_list"][0][0, 0], PUBLISHED_FIRST_STEP)
    compare(result["depth"][0, 2, ::9, ::13, 0], PUBLISHED_DEPTH)
    compare(result["depth_conf"][0, 2, ::9, ::13], PUBLISHED_CONFIDENCE)


def test_shapes_and_ranges(tiny: VGGT) -> None:
    result = tiny(torch.rand(2, 3, 3, 28, 42))
    assert set(result) == {"pose_enc", "pose_enc_list", "depth", "depth_conf"}
    assert result["pose_enc"].shape == (2, 3, 9)
    assert len(result["pose_enc_list"]) == 4
    assert result["pose_enc_list"][-1] is result["pose_enc"]
    assert result["depth"].shape == (2, 3, 28, 42, 1)
    assert result["depth_conf"].shape == (2, 3, 28, 42)
    assert (result["depth"] > 0).all()
    assert (result["depth_conf"] > 1).all()


def test_untrained_outputs_are_plain(tiny: VGGT) -> None:
    result = tiny(torch.rand(1, 2, 3, 56, 56))
    plain = torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 1, 1]).expand(1, 2, 9)
    torch.testing.assert_close(result["pose_enc"], plain, rtol=0, atol=0.3)
    torch.testing.assert_close(result["depth"], torch.ones_like(result["depth"]), rtol=0, atol=0.3)


def test_one_scene_needs_no_batch_axis(tiny: VGGT) -> None:
    images = torch.rand(2, 3, 28, 28)
    torch.testing.assert_close(tiny(images)["depth"], tiny(images[None])["depth"])


def test_order_of_the_other_frames_does_not_matter(tiny: VGGT) -> None:
    set_formula_weights(tiny.double())
    images = torch.rand(1, 4, 3, 28, 28, dtype=torch.float64)
    order = [0, 3, 1, 2]
    with torch.no_grad():
        straight, shuffled = tiny(images), tiny(images[:, order])
        swapped = tiny(images[:, [1, 0, 2, 3]])
    for name in ("pose_enc", "depth", "depth_conf"):
        torch.testing.assert_close(shuffled[name], straight[name][:, order])
    assert (swapped["pose_enc"][:, [1, 0, 2, 3]] - straight["pose_enc"]).abs().max() > 1e-3


def test_scenes_of_a_batch_do_not_mix(tiny: VGGT) -> None:
    set_formula_weights(tiny.double())
    images = torch.rand(2, 3, 3, 28, 28, dtype=torch.float64)
    with torch.no_grad():
        together, alone = tiny(images), tiny(images[1:])
    torch.testing.assert_close(together["pose_enc"][1:], alone["pose_enc"])
    torch.testing.assert_close(together["depth"][1:], alone["depth"])


def test_chunks_of_the_depth_head_change_nothing(tiny: VGGT) -> None:
    set_formula_weights(tiny.double())
    images = torch.rand(2, 2, 3, 28, 28, dtype=torch.float64)
    results = []
    for size in (1, 3, 8):
        tiny.depth_head.frames_chunk_size = size
        results.append(tiny(images)["depth"])
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])


def test_heads_keep_float32_under_autocast(tiny: VGGT) -> None:
    set_formula_weights(tiny)
    images = torch.rand(1, 2, 3, 28, 28)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = tiny(images)
    assert {mixed[name].dtype for name in ("pose_enc", "depth", "depth_conf")} == {torch.float32}
    # eight aggregator and two encoder blocks in bfloat16, 2^-8 each in the worst case
    torch.testing.assert_close(mixed["depth"], tiny(images)["depth"], rtol=10 * 2**-8, atol=0)


def test_every_trained_parameter_gets_a_gradient(tiny: VGGT) -> None:
    result = tiny(torch.rand(1, 2, 3, 28, 28))
    (sum(pose.square().sum() for pose in result["pose_enc_list"]) + result["depth"].sum()).backward()
    result = tiny(torch.rand(1, 2, 3, 28, 28))
    result["depth_conf"].sum().backward()
    without = [name for name, p in tiny.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []


def test_frozen_encoder_leaves_no_graph(tiny: VGGT) -> None:
    tiny.aggregator.patch_embed.requires_grad_(False)
    seen = []
    tiny.aggregator.patch_embed.register_forward_hook(lambda *arguments: seen.append(arguments[-1].requires_grad))
    tiny(torch.rand(1, 2, 3, 28, 28))
    images = torch.rand(1, 2, 3, 28, 28, requires_grad=True)
    tiny(images)["depth"].sum().backward()
    assert seen == [False, True]
    assert images.grad is not None and images.grad.any()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(1, 2, 3, 28, 30), "multiples of 14, got 28 x 30"),
        (torch.rand(1, 2, 3, 13, 28), "multiples of 14, got 13 x 28"),
        (torch.rand(1, 2, 4, 28, 28), r"got \(1, 2, 4, 28, 28\)"),
        (torch.rand(3, 28, 28), r"got \(3, 28, 28\)"),
        (torch.rand(1, 0, 3, 28, 28), "not empty"),
        (torch.zeros(1, 2, 3, 28, 28, dtype=torch.uint8), "floating point in 0..1, got torch.uint8"),
    ],
)
def test_bad_images_are_refused(tiny: VGGT, images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(images)


def test_attention_is_softmax_of_scaled_products() -> None:
    attention = Attention(8, 2).double()
    x = torch.rand(2, 5, 8, dtype=torch.float64)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(4)).softmax(-1)
        heads.append(weights @ v[..., part])
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, dim=-1)))


def test_rotated_products_depend_on_relative_position_only() -> None:
    q, k = torch.rand(2, 1, 16, dtype=torch.float64)

    def product(at_q: tuple[int, int], at_k: tuple[int, int]) -> Tensor:
        tables = [rotary_table(torch.tensor([place]), 16, 100.0) for place in (at_q, at_k)]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum()

    torch.testing.assert_close(product((3, 1), (5, 7)), product((10, 4), (12, 10)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product((0, 0), (0, 0)), (q * k).sum())
    # rows turn the first half of the dimensions, columns the second
    row = rotate(q, rotary_table(torch.tensor([[2, 0]]), 16, 100.0))
    torch.testing.assert_close(row[:, 8:], q[:, 8:])
    torch.testing.assert_close(row[:, 0], q[:, 0] * math.cos(2) - q[:, 4] * math.sin(2), rtol=1e-6, atol=1e-6)


def test_residual_unit_adds_the_rectified_input() -> None:
    unit = ResidualConvUnit(2)
    for parameter in unit.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.tensor([[-1.0, 2.0]]).view(1, 2, 1, 1)
    assert unit(x).flatten().tolist() == [0.0, 2.0]
    assert x.flatten().tolist() == [-1.0, 2.0]


def test_position_map_by_hand() -> None:
    # 4:3 image: half width 0.8, half height 0.6; outermost cell centres at 3/4 and 2/3 of that
    grid = position_map(8, 3, 4, 4 / 3, torch.device("cpu"))
    assert grid.shape == (8, 3, 4)
    u, v = 0.8 * 3 / 4, 0.6 * 2 / 3
    corner = [math.sin(u), math.sin(u / 10), math.cos(u), math.cos(u / 10)]
    corner += [math.sin(v), math.sin(v / 10), math.cos(v), math.cos(v / 10)]
    torch.testing.assert_close(grid[:, -1, -1], torch.tensor(corner))
    torch.testing.assert_close(grid[:2, 0, 0], -grid[:2, -1, -1])


@pytest.mark.parametrize(("name", "message"), [("vggt-2b", "vggt-1b, vggt-nano, got 'vggt-2b'")])
def test_unknown_backbone(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_vggt(name, weights="random")


def test_nano_trains_at_its_own_size() -> None:
    model = build_vggt("vggt-nano", weights="random")
    images = torch.rand(1, 2, 3, 112, 112)
    result = model(images)
    assert result["depth"].shape == (1, 2, 112, 112, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = (model(images)["depth"] - 2).square().mean()
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
