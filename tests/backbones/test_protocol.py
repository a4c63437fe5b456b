"""What a backbone is asked for, where it comes from, and which licence is written down."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch
from adapters.models import TINY
from torch import nn
from training.plane_scenes import write_plane_scenes

import subspace3d as s3
from subspace3d.backbones.find import backbone_of, find_backbone
from subspace3d.backbones.model_card import licence_of_card, write_card
from subspace3d.backbones.presets import PRESETS
from subspace3d.backbones.protocol import Backbone, Prediction, attach
from subspace3d.backbones.recompute import recompute
from subspace3d.backbones.record import UNKNOWN, BackboneRecord, read_licence, record_backbone
from subspace3d.backbones.vggt import VGGT
from subspace3d.backbones.vggt_preset import describe
from subspace3d.cli import main
from subspace3d.files import save_tensors
from subspace3d.formats.run import licence_of_adapter
from subspace3d.training.token_cache import TokenCache


def write_module(folder: Path, name: str, source: str) -> None:
    (folder / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_describe_themselves(name: str) -> None:
    backbone = find_backbone(name)
    assert backbone.name == name and backbone.licence
    assert {"cores", "heads", "all"} <= backbone.targets.keys()
    assert backbone.checked_size(0, (2, 6)) == backbone.image_size
    assert not backbone.missing() or backbone.install


def test_a_network_finds_its_backbone_inside_whatever_wraps_it() -> None:
    backbone = Backbone()
    network = attach(nn.Linear(1, 1), backbone)
    assert backbone_of(nn.Sequential(nn.Identity(), nn.ModuleDict({"inner": network}))) is backbone
    # a network without one is a VGGT: ours with its own sizes, else the published one
    assert backbone_of(VGGT(TINY)).image_size == TINY.image_size
    assert backbone_of(nn.Linear(1, 1)).image_size == 518


def test_parts_skip_what_wrappers_put_before_and_take_the_longest_prefix() -> None:
    backbone = Backbone()
    backbone.parts = {"body": "body", "body.head": "head", "head": "outer"}
    backbone.frozen = ("body.patch", "body.token")
    names = ("base_model.model.body.block.0.c", "module.body.head.0.weight", "head.body.weight", "tail.weight")
    assert [backbone.part_of(name) for name in names] == ["body", "head", "outer", "other"]
    frozen = ("body.patch.weight", "body.token", "body.tokens", "body.patches.weight", "patch.weight")
    assert [backbone.is_frozen(name) for name in frozen] == [True, True, False, False, False]


def test_sizes_and_frames_are_checked_before_anything_is_loaded() -> None:
    backbone = find_backbone("da3-small")
    with pytest.raises(ValueError, match="image_size must be a multiple of 14, a patch of da3-small, got 500"):
        backbone.checked_size(500, (2, 6))
    backbone.frames = (2, 2)
    with pytest.raises(ValueError, match="frames must be 2 to 2 for da3-small, got 2 to 6"):
        backbone.checked_size(504, (2, 6))
    with pytest.raises(ValueError, match="cache_tokens must be off for da3-small: it has no frozen image encoder"):
        TokenCache.of_backbone(Path("unused"), attach(nn.Linear(1, 1), backbone))


class Said(Backbone):
    def __init__(self, said: object) -> None:
        self.name, self.said = "said", said

    def __call__(self, model: nn.Module, images: torch.Tensor) -> Prediction:
        return self.said  # type: ignore[return-value]


def test_what_a_backbone_says_is_checked() -> None:
    images, ones = torch.zeros(1, 2, 3, 4, 6), torch.ones
    points = ones(1, 2, 4, 6, 3).cumsum(-1)
    said = Said(Prediction(points=points)).predict(nn.Identity(), images)
    assert said.depth is not None and torch.equal(said.depth, points[..., 2]) and said.points is points
    for wrong, message in (
        ((1, 2), "__call__ of said must return a subspace3d Prediction, got tuple"),
        (
            Prediction(ones(1, 2, 4, 6, 1)),
            r"depth of .* \[1, 2, 4, 6\], of \[1, 2, 3, 4, 6\] images, got \[1, 2, 4, 6, 1\]",
        ),
        (Prediction(ones(1, 2, 6, 4)), r"depth of .* got \[1, 2, 6, 4\]"),
        (Prediction(confidence=ones(2, 4, 6)), r"confidence of .* got \[2, 4, 6\]"),
        (Prediction(extrinsics=ones(1, 2, 4, 4)), r"extrinsics of .* \[1, 2, 3, 4\], .* got \[1, 2, 4, 4\]"),
        (Prediction(intrinsics=3), r"intrinsics of .* got int"),  # type: ignore[arg-type]
        (Prediction(points=ones(1, 2, 3, 4, 6)), r"points of .* \[1, 2, 4, 6, 3\]"),
        (Prediction(stages=(ones(1, 2, 9), ones(1, 2, 8))), r"stages\[1\] of .* \[1, 2, 9\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Said(wrong).predict(nn.Identity(), images)


def test_cards_name_the_licence_and_are_read_back(tmp_path: Path) -> None:
    for licence, front, read in (
        ("Apache-2.0", "license: apache-2.0", "apache-2.0"),
        ("CC BY-NC 4.0 (non-commercial)", "license: cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("CC-BY-NC-4.0", "license: cc-by-nc-4.0", "cc-by-nc-4.0"),
        ('My "own" terms', "license: other\nlicense_name: \"My 'own' terms\"", "My 'own' terms"),
        ("none: random weights", 'license: other\nlicense_name: "none: random weights"', "none: random weights"),
    ):
        write_card(tmp_path, "a-model@0123", licence)
        text = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert (
            text.startswith(f"---\nlibrary_name: peft\n{front}\n---\n") and "`a-model@0123`" in text and licence in text
        )
        assert licence_of_card(tmp_path / "README.md") == licence_of_adapter(tmp_path) == read


@pytest.mark.parametrize(
    "words",
    [
        ["params"],
        ["evaluate", "--weights", "random", "--scenes", "s", "--out", "o"],
        ["view", "s", "--weights", "random", "--device", "cpu"],
    ],
)
def test_a_package_that_is_missing_is_named_with_its_command(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_plane_scenes(tmp_path / "s", scenes=1, views=1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*words, "--backbone", "pi3"])
    said = "error: backbone pi3 needs pi3: pip install git+https://github.com/yyfz/Pi3"
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_the_flags_that_name_the_same_weights() -> None:
    assert BackboneRecord("vggt-nano", "shipped", "ab").flags() == ""
    assert BackboneRecord("vggt-nano", "random", "").flags() == " --backbone vggt-nano --weights random"
    assert BackboneRecord("pi3", "/a b/c", "ab").flags() == " --backbone pi3 --weights '/a b/c'"


def test_a_factory_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = """
        from torch import nn
        from subspace3d.backbones.protocol import Backbone

        class Mine(Backbone):
            targets = {"cores": "", "heads": "", "all": ""}

            def network(self):
                return nn.Linear(2, 2)

        def named():
            return Mine()

        class Untargeted(Backbone):
            targets = {"cores": ".*"}

        class Broken(Backbone):
            targets = Mine.targets

            def network(self):
                raise KeyError("checkpoint_dir")

        class NoModule(Broken):
            def network(self):
                return {}

        def network(weights):
            return small()

        def small():
            from subspace3d.backbones.config import VGGTConfig
            from subspace3d.backbones.vggt import VGGT

            sizes = dict(embed_dim=32, num_heads=2, encoder_depth=1, depth=4, camera_depth=1, depth_features=16)
            return VGGT(VGGTConfig("own", 48, 8, **sizes, depth_channels=(8, 8, 8, 8), depth_taps=(0, 1, 2, 3)))

        def needs_its_file(weights):
            if weights == "random":
                raise OSError("no such checkpoint: random")
            return small()

        def another(weights):
            return nn.Linear(3, 3)

        def strict(argument):
            return Mine()

        def wrong():
            return 3

        number = 3
    """
    write_module(tmp_path, "factories_of_a_test", source)
    monkeypatch.chdir(tmp_path)
    for factory in ("Mine", "named"):
        name = f"factories_of_a_test:{factory}"
        model = s3.build_backbone(name, "random")
        assert isinstance(model, nn.Linear) and backbone_of(model).name == name
    # what takes weights gives the network itself, which is then a VGGT of the sizes that it has
    own = backbone_of(s3.build_backbone("factories_of_a_test:network"))
    assert own.name == "factories_of_a_test:network"
    for sized in (own, find_backbone("factories_of_a_test:network"), describe(nn.ModuleDict({"x": own.network()}))):
        assert (sized.image_size, sized.patch_size, sized.special_tokens) == (48, 8, 5)
    caplog.clear()
    assumed = find_backbone("factories_of_a_test:needs_its_file")
    assert (assumed.image_size, assumed.patch_size) == (518, 14) and "518 px and patches of 14 px" in caplog.text
    built = assumed.build("file")
    assert backbone_of(built) is assumed and (assumed.image_size, assumed.patch_size) == (48, 8)
    for factory, message in (
        (
            "Untargeted",
            "targets of factories_of_a_test:Untargeted must have cores, heads and all, heads, all is missing",
        ),
        (
            "strict",
            r"factories_of_a_test:strict raised TypeError: .*missing 1 required positional argument: 'argument'$",
        ),
        ("absent", "backbone must be importable, got 'factories_of_a_test:absent'"),
        ("number", "must be a function or a class, got int"),
        ("wrong", "must return a subspace3d Backbone, got int"),
    ):
        with pytest.raises(ValueError, match=message):
            find_backbone(f"factories_of_a_test:{factory}")
    for factory, message in (
        ("Broken", r"Broken raised KeyError: 'checkpoint_dir' \(factories_of_a_test.py, line \d+\)"),
        ("NoModule", r"network of factories_of_a_test:NoModule must return a torch\.nn\.Module, got dict"),
        ("another", r"must return a VGGT with the published module names, got Linear; for another model return a"),
    ):
        with pytest.raises(ValueError, match=message):
            find_backbone(f"factories_of_a_test:{factory}").build("random")
    with pytest.raises(ValueError, match=r"backbone must be one of vggt-nano, .*, or package\.module:factory"):
        find_backbone("vggt")
    with pytest.raises(ValueError, match=r"weights of factories_of_a_test:Mine do not ship with the package"):
        s3.build_backbone("factories_of_a_test:Mine")
    with pytest.raises(ValueError, match=r"weights of da3-small do not ship .*DA3-SMALL \(licence: Apache-2\.0\)"):
        s3.build_backbone("da3-small")


def test_the_licence_is_given_read_or_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.safetensors"
    save_tensors(file, {"w": torch.zeros(1)})
    assert read_licence(file) is None
    # of the presets the published one; another file of that network is taken for one of those weights
    assert record_backbone("da3-base", file).licence == "Apache-2.0"
    assert record_backbone("vggt-nano", None).licence == "Apache-2.0"
    assert record_backbone("vggt-1b", Path("random")).licence == "none: random weights"
    assert record_backbone("vggt-1b", file, licence="mine").licence == "mine"
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: other\nlicense_name: 'our-terms'\n---\nlicense: not this\n", encoding="utf-8")
    assert read_licence(file) == record_backbone("da3-base", file).licence == "our-terms"
    card.write_text("no front matter\nlicense: not this\n", encoding="utf-8")
    assert read_licence(file) is None
    name = "backbones.unlicensed:Unlicensed"
    assert record_backbone(name, file).licence == UNKNOWN
    assert "--licence names it" in capsys.readouterr().err
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, file, {"license": "mit"})
    assert read_licence(file) == record_backbone(name, file).licence == "mit"
    # it says nothing about which weights they are
    assert record_backbone(name, file, licence="other").identity == record_backbone(name, file).identity


def test_recomputed_modules_give_the_same_gradients_and_keep_less() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)) for _ in range(3)))
    x = torch.randn(4, 8)

    def run() -> tuple[list[torch.Tensor], int]:
        model.zero_grad()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
            y = model(x)
        y.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()], sum(kept)  # type: ignore[union-attr]

    plain, kept = run()
    assert recompute(model, r"\d", True) == ["0", "1", "2"]
    again, kept_less = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, again)) and kept_less < kept / 3
    recompute(model, r"\d", False)
    assert run()[1] == kept
    with pytest.raises(ValueError, match="blocks must match at least one module name"):
        recompute(model, "blocks", True)


def test_a_prediction_reads_what_vggt_returns() -> None:
    outputs = {"pose_enc": torch.zeros(1, 2, 9), "depth": torch.ones(1, 2, 3, 4, 1)}
    prediction = Prediction.from_vggt(outputs)
    assert prediction.depth is not None and prediction.depth.shape == (1, 2, 3, 4)
    assert prediction.confidence is None and prediction.stages[0] is outputs["pose_enc"]
    stages = [torch.zeros(1, 2, 9), torch.ones(1, 2, 9)]
    assert Prediction.from_vggt({**outputs, "pose_enc_list": stages}).stages == tuple(stages)
