"""The subspace method as a PEFT tuner: its formula, PEFT's verbs, files, merging, refusals."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
from adapters.models import (
    images,
    outputs,
    random_basis,
    relative_difference,
    tiny_vggt,
    train_at_random,
    write_subspace,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import subspace_ext as se
from subspace3d.adapters import SubspaceConfig
from subspace3d.adapters.basis import basis_for_model
from subspace3d.adapters.methods import apply_method
from subspace3d.adapters.peft.layers import SubspaceLayer
from subspace3d.adapters.peft.release import check_release
from subspace3d.adapters.placement import place
from subspace3d.backbones.targets import target_regex
from subspace3d.formats.basis import Basis, basis_digest, save_basis


class Net(nn.Module):
    """Linear, Conv2d with every setting a core must copy, and a ConvTranspose2d."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=2, dilation=2, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(6, 6, 2)
        self.fc1 = nn.Linear(6, 10)
        self.fc2 = nn.Linear(10, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.conv(x).tanh()).mean((-2, -1))
        return self.fc2(self.fc1(x).tanh())


NAMES = ["conv", "fc1", "fc2"]
DOCUMENTATION = Path(__file__).parents[2] / "docs/adapters.md"


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def x() -> torch.Tensor:
    return torch.rand(2, 3, 11, 11, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def basis() -> Basis:
    return random_basis(net(), NAMES, 3)


@pytest.fixture
def file(basis: Basis, tmp_path: Path) -> Path:
    save_basis(tmp_path / "basis.safetensors", basis)
    return tmp_path / "basis.safetensors"


def tuned_net(file: Path, seed: int = 1, **settings) -> PeftModel:
    model = get_peft_model(net(), SubspaceConfig(basis=str(file), **settings))
    train_at_random(model, seed)
    return model


def by_definition(model: PeftModel, basis: Basis, adapter: str = "default", scale: float = 2.0) -> Net:
    """The plain net with w + s U c V^T + (alpha / r) B A in the place of every weight, all in float64."""
    plain = net()
    with torch.no_grad():
        for name, layer in model.named_modules():
            if not isinstance(layer, SubspaceLayer):
                continue
            name = name.removeprefix("base_model.model.")
            weight = plain.get_parameter(f"{name}.weight")
            update = torch.zeros_like(weight).double().flatten(1)
            if adapter in layer.subspace_core:
                u, v = (side.double() for side in basis[name])
                update += scale * u @ layer.subspace_core[adapter].c.double() @ v.T
            if adapter in layer.lora_A:
                a, b = (part[adapter].weight.double().flatten(1) for part in (layer.lora_A, layer.lora_B))
                update += layer.lora_scaling[adapter] * b @ a
            weight += update.view(weight.shape)
    return plain


def test_formula_of_cores_and_loras(file: Path, basis: Basis) -> None:
    model = tuned_net(file, scale=1.5, target_modules="conv|fc1", lora_modules="conv|fc2", r=2, lora_alpha=3)
    kinds = {name: set(layer.subspace_core) | set(layer.lora_A) for name, layer in _layers(model).items()}
    assert kinds == {name: {"default"} for name in NAMES}
    assert not _layers(model)["fc2"].subspace_core and not _layers(model)["fc1"].lora_A
    expected = by_definition(model, basis, scale=1.5)
    assert relative_difference(outputs(model, x()), outputs(expected, x())) < 1e-6
    assert relative_difference(outputs(model, x()), outputs(net(), x())) > 1e-2


def test_gradients_are_those_of_the_definition(file: Path, basis: Basis) -> None:
    model = tuned_net(file).train()
    model(x()).square().sum().backward()
    for name, layer in _layers(model).items():
        u, v = basis[name]
        core = layer.subspace_core["default"]
        plain, c = by_definition(model, basis), core.c.detach().clone().requires_grad_()
        weight = net().get_parameter(f"{name}.weight")
        update = (2.0 * u @ c @ v.T).view(weight.shape)
        replaced = {f"{name}.weight": weight.detach() + update}
        torch.func.functional_call(plain, replaced, (x(),)).square().sum().backward()
        torch.testing.assert_close(core.c.grad, c.grad, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if not name.endswith(".c"))


def _layers(model: nn.Module) -> dict[str, SubspaceLayer]:
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, SubspaceLayer)
    }


def test_only_cores_and_loras_are_trainable(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(net(), SubspaceConfig(basis=str(file), lora_modules=["fc2"], r=2))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    cores = [f"base_model.model.{name}.subspace_core.default.c" for name in NAMES]
    assert set(names) == {*cores, *(f"base_model.model.fc2.lora_{side}.default.weight" for side in "AB")}
    model.print_trainable_parameters()
    assert "trainable params: 55 " in capsys.readouterr().out  # 3 * 9 + 2 * (10 + 4)
    core = _layers(model)["fc1"].subspace_core["default"]
    assert isinstance(core, se.SubspaceCore)
    # one weight, registered once: nothing is held, moved or saved twice
    assert {name for name, _ in core.named_parameters()} == {"c"}
    fc1 = {name for name in model.state_dict() if ".fc1." in name}
    prefix = "base_model.model.fc1."
    kept = {f"{prefix}base_layer.weight", f"{prefix}base_layer.bias"}
    assert fc1 == kept | {f"{prefix}subspace_core.default.{name}" for name in ("U", "V", "c")}


def test_saved_folder_round_trips(file: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = tuned_net(file, lora_modules="fc.*", r=2, plan="beside")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["peft_type"] == "SUBSPACE" and config["basis"] == "../basis.safetensors"
    assert (tmp_path / "adapter/adapter_model.safetensors").stat().st_size < file.stat().st_size + 1000
    for trainable in (False, True):
        again = PeftModel.from_pretrained(net(), tmp_path / "adapter", is_trainable=trainable)
        assert torch.equal(outputs(again, x()), outputs(model, x()))
        assert any(parameter.requires_grad for parameter in again.parameters()) == trainable
    assert not recwarn.list
    slim = PeftModel.from_pretrained(net(), tmp_path / "adapter", low_cpu_mem_usage=True)
    assert torch.equal(outputs(slim, x()), outputs(model, x()))
    (tmp_path / "moved").mkdir()
    for name in ("adapter", "basis.safetensors"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    moved = PeftModel.from_pretrained(net(), tmp_path / "moved/adapter")
    assert torch.equal(outputs(moved, x()), outputs(model, x()))


def test_basis_far_from_the_folder_is_stored_by_its_whole_path(file: Path, tmp_path: Path) -> None:
    model = tuned_net(file)
    model.save_pretrained(tmp_path / "a/b/adapter", save_embedding_layers=False)
    assert SubspaceConfig.from_pretrained(str(tmp_path / "a/b/adapter")).basis == str(file)
    file.rename(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match=r"basis: no such file.*basis\.safetensors; name it with"):
        PeftModel.from_pretrained(net(), tmp_path / "a/b/adapter")
    config = SubspaceConfig.from_pretrained(str(tmp_path / "a/b/adapter"), basis=tmp_path / "other.safetensors")
    again = PeftModel.from_pretrained(net(), tmp_path / "a/b/adapter", config=config)
    assert torch.equal(outputs(again, x()), outputs(model, x()))


def test_another_basis_is_refused(file: Path, basis: Basis, tmp_path: Path) -> None:
    tuned_net(file).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    u, v = basis["fc1"]
    save_basis(file, {**basis, "fc1": (u + 1e-6, v)})
    with pytest.raises(ValueError, match=rf"must have the hash {basis_digest(basis)[:12]}\.\.\. with which"):
        PeftModel.from_pretrained(net(), tmp_path / "adapter")


def test_adapters_are_added_switched_and_removed(file: Path, basis: Basis, tmp_path: Path) -> None:
    model = tuned_net(file)
    first = outputs(model, x())
    other = random_basis(net(), ["fc1", "fc2"], 2, seed=9)
    save_basis(tmp_path / "other.safetensors", other)
    model.add_adapter("second", SubspaceConfig(basis=str(tmp_path / "other.safetensors"), lora_modules="conv", r=1))
    assert torch.equal(outputs(model, x()), first)
    model.set_adapter("second")
    assert [name for name, p in model.named_parameters() if p.requires_grad and "default" in name] == []
    train_at_random(model, seed=4)
    second = outputs(model, x())
    assert relative_difference(second, outputs(by_definition(model, other, "second"), x())) < 1e-6
    model.set_adapter("default")
    assert torch.equal(outputs(model, x()), first)
    with model.disable_adapter():
        assert torch.equal(outputs(model, x()), outputs(net(), x()))
    model.base_model.set_adapter(["default", "second"])
    both = outputs(model, x())
    merged = copy.deepcopy(model).merge_and_unload()
    assert relative_difference(both, outputs(merged, x())) < 1e-6
    assert relative_difference(both, first) > 1e-3 and relative_difference(both, second) > 1e-3
    model.save_pretrained(tmp_path / "all", save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(net(), tmp_path / "all")
    loaded.load_adapter(tmp_path / "all/second", adapter_name="second")
    assert torch.equal(outputs(loaded, x()), first)
    loaded.set_adapter("second")
    assert torch.equal(outputs(loaded, x()), second)
    loaded.delete_adapter("second")
    loaded.set_adapter("default")
    assert torch.equal(outputs(loaded, x()), first)
    assert torch.equal(outputs(loaded.unload(), x()), outputs(net(), x()))


def test_merging(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tuned_net(file, lora_modules="fc2", r=2)
    before = outputs(model, x())
    weights = {name: layer.weight.clone() for name, layer in _layers(model).items()}
    model.merge_adapter()
    assert relative_difference(outputs(model, x()), before) < 1e-6
    with model.disable_adapter():
        assert torch.equal(outputs(model, x()), outputs(net(), x()))
    model.unmerge_adapter()
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in _layers(model).items())
    assert torch.equal(outputs(model, x()), before)
    plain = model.merge_and_unload()
    report = model.base_model.merge_report
    assert report.modules == 3 and report.dtype == "float32" and 0 < report.relative_error < 1e-6
    assert "merged 3 modules in float32: relative error of the update" in capsys.readouterr().out
    assert type(plain) is Net and relative_difference(outputs(plain, x()), before) < 1e-6
    assert set(plain.state_dict()) == set(net().state_dict())


def test_merging_in_float64_is_as_exact(file: Path) -> None:
    model = tuned_net(file, lora_modules="fc.", r=2).double()
    before = outputs(model, x().double())
    model.merge_adapter()
    assert relative_difference(outputs(model, x().double()), before) < 1e-14


def test_merging_into_bfloat16_is_refused_where_it_would_lose_the_update(file: Path, basis: Basis) -> None:
    model = get_peft_model(net().bfloat16(), SubspaceConfig(basis=str(file)))
    train_at_random(model, size=1e-3)
    weights = {name: layer.weight.clone() for name, layer in _layers(model).items()}
    # the error by its definition, in float64
    lost = total = 0.0
    for name, layer in _layers(model).items():
        u, v = (side.double() for side in basis[name])
        update = (2.0 * u @ layer.subspace_core["default"].c.detach().double() @ v.T).view(layer.weight.shape)
        applied = (layer.weight.double() + update).to(torch.bfloat16).double() - layer.weight.double()
        lost, total = lost + float((applied - update).square().sum()), total + float(update.square().sum())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"max_error must be at least .* to merge in bfloat16.*Merge in float32"):
            merge()
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in _layers(model).items())
    model.merge_adapter(max_error=1.0)
    assert model.base_model.merge_report.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    model.unmerge_adapter()
    # large updates survive; and in float32 the same one does
    train_at_random(model, size=3.0)
    model.merge_and_unload()


def test_not_finite_is_not_merged(file: Path) -> None:
    model = tuned_net(file)
    with torch.no_grad():
        _layers(model)["fc1"].subspace_core["default"].c[0, 0] = torch.nan
    conv = _layers(model)["conv"].weight.clone()
    with pytest.raises(ValueError, match=r"merged weight of fc1 must be finite"):
        model.merge_and_unload()
    # known before any module is touched
    assert torch.equal(_layers(model)["conv"].weight, conv)
    with pytest.raises(ValueError, match="the merged weight must be finite, got NaN or Inf: check the adapters"):
        _layers(model)["fc1"].merge()


def test_training_in_autocast_and_bfloat16(file: Path) -> None:
    for model, context in (
        (tuned_net(file, lora_modules="fc2|conv", r=2), torch.autocast("cpu", torch.bfloat16)),
        (get_peft_model(net().bfloat16(), SubspaceConfig(basis=str(file), lora_modules="fc2", r=2)), None),
    ):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert all(parameter.dtype == torch.float32 for parameter in trained)
        optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
        for _ in range(4):
            optimizer.zero_grad()
            if context is None:
                y = model(x().bfloat16())
            else:
                with context:
                    y = model(x())
            loss = (y.float() - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


def test_modules_to_save_are_trained_and_kept(file: Path, tmp_path: Path) -> None:
    model = tuned_net(file, target_modules="conv|fc1", modules_to_save=["fc2"])
    assert model.get_submodule("base_model.model.fc2.modules_to_save.default").weight.requires_grad
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = PeftModel.from_pretrained(net(), tmp_path / "adapter")
    assert torch.equal(outputs(again, x()), outputs(model, x()))


def test_a_choice_of_adapters_within_a_batch_is_refused_rather_than_ignored(file: Path) -> None:
    with pytest.raises(ValueError, match="adapter_names must be left out"):
        tuned_net(file)(x(), adapter_names=["default"] * len(x()))


def test_wrong_configurations(file: Path, basis: Basis, tmp_path: Path) -> None:
    def put(model: nn.Module | None = None, **settings) -> None:
        get_peft_model(model or net(), SubspaceConfig(**{"basis": str(file), **settings}))

    for settings, message in (
        ({"basis": ""}, "basis must name the file of the combined basis, got none"),
        ({"target_modules": "fc"}, r"target_modules must match at least one full module name; 'fc' matches none"),
        ({"target_modules": ["fc1", "fc3"]}, r"target_modules must be full module names, got 'fc3'"),
        ({"lora_modules": "head.*"}, r"lora_modules must match at least one full module name"),
        ({"lora_modules": ["fc1", "head"]}, r"lora_modules must be full module names, got 'head'"),
        ({"lora_modules": "up"}, r"lora_modules must leave out up: ConvTranspose2d is not supported"),
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"plan": "guess"}, "plan must be one of auto, effective, beside, got 'guess'"),
        ({"scale": float("inf")}, "scale must be finite, got inf"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be finite, got nan"),
        ({"modules_to_save": ["fc2"]}, "target_modules must leave out fc2: modules_to_save trains fc2 in full"),
    ):
        with pytest.raises(ValueError, match=message):
            put(**settings)
    with pytest.raises(ValueError, match=r"basis: 3 of its modules are not in the model, e\.g\. conv"):
        put(nn.Sequential(nn.Linear(2, 2)))
    wide = net()
    wide.fc1 = nn.Linear(6, 12)
    with pytest.raises(ValueError, match=r"basis: fc1 must have \[out, in\] = \[12, 6\] as in .*got \[10, 6\]"):
        put(wide)
    grouped = net()
    grouped.conv = nn.Conv2d(27, 6, 1, groups=3)
    with pytest.raises(ValueError, match="leave out conv: a Conv2d with groups=3"):
        put(grouped)
    save_basis(tmp_path / "up.safetensors", {"up": (torch.eye(6)[:, :2], torch.eye(24)[:, :2])})
    with pytest.raises(ValueError, match="leave out up: ConvTranspose2d is not supported"):
        put(basis=str(tmp_path / "up.safetensors"))


def test_saved_adapter_that_does_not_fit_is_refused(file: Path, basis: Basis, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tuned_net(file).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    weights = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(weights)
    key = "base_model.model.fc1.subspace_core.c"
    assert key in tensors
    save_file({**tensors, key: torch.zeros(2, 2)}, weights)
    with pytest.raises(ValueError, match=r"fc1.subspace_core.default.c must have shape \[3, 3\], got \[2, 2\]"):
        PeftModel.from_pretrained(net(), tmp_path / "adapter")
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, weights)
    with pytest.raises(ValueError, match=r"must hold base_model.model.fc1.subspace_core.default.c, which is missing"):
        PeftModel.from_pretrained(net(), tmp_path / "adapter")


def test_basis_in_memory(basis: Basis, tmp_path: Path) -> None:
    config = SubspaceConfig.from_basis(basis)
    models = [get_peft_model(net(), config) for _ in range(2)]
    for model in models:
        train_at_random(model)
    assert torch.equal(outputs(models[0], x()), outputs(models[1], x()))
    models[0].save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ValueError, match="basis must name the file"):
        PeftModel.from_pretrained(net(), tmp_path / "adapter")
    save_basis(tmp_path / "kept.safetensors", basis)
    config = SubspaceConfig.from_pretrained(str(tmp_path / "adapter"), basis=str(tmp_path / "kept.safetensors"))
    again = PeftModel.from_pretrained(net(), tmp_path / "adapter", config=config)
    assert torch.equal(outputs(again, x()), outputs(models[0], x()))


def test_a_vit_from_transformers(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    def vit() -> nn.Module:
        torch.manual_seed(0)
        return ViTModel(
            ViTConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=24,
                image_size=16,
                patch_size=8,
            )
        ).eval()

    names = [name for name, module in vit().named_modules() if isinstance(module, nn.Linear) and "layer" in name]
    patch = next(name for name, module in vit().named_modules() if isinstance(module, nn.Conv2d))
    assert len(names) >= 12
    save_basis(tmp_path / "basis.safetensors", random_basis(vit(), [*names, patch], 4))
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model = get_peft_model(vit(), SubspaceConfig(basis=str(tmp_path / "basis.safetensors")))
    assert torch.equal(outputs(model, picture), outputs(vit(), picture))
    train_at_random(model)
    tuned = outputs(model, picture)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = PeftModel.from_pretrained(vit(), tmp_path / "adapter")
    assert torch.equal(outputs(again, picture), tuned)
    assert relative_difference(outputs(again.merge_and_unload(), picture), tuned) < 1e-6
    assert relative_difference(tuned, outputs(vit(), picture)) > 1e-3


def test_a_vggt_with_the_authors_placement(tmp_path: Path) -> None:
    names = list(place(tiny_vggt(), "subspace").cores)
    save_basis(tmp_path / "basis.safetensors", random_basis(tiny_vggt(), names, 4))
    config = SubspaceConfig(basis=str(tmp_path / "basis.safetensors"), lora_modules=target_regex("heads"), r=2)
    model = get_peft_model(tiny_vggt(), config)
    train_at_random(model, size=0.03)
    tuned = outputs(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = PeftModel.from_pretrained(tiny_vggt(), tmp_path / "adapter")
    assert torch.equal(outputs(again, images()), tuned)
    assert relative_difference(outputs(again.merge_and_unload()), tuned) < 1e-5


def test_the_documented_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, _ = re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("texture", "camera")):
        write_subspace(tmp_path / f"{name}.safetensors", tiny_vggt(), k=2, seed=seed, preset="all")
    other = apply_method(
        tiny_vggt(), "subspace", 2, basis=basis_for_model([tmp_path / "camera.safetensors"], tiny_vggt())
    )
    save_basis(tmp_path / "camera-basis.safetensors", basis_for_model([tmp_path / "camera.safetensors"], tiny_vggt()))
    other.peft_config["default"].basis = "camera-basis.safetensors"
    train_at_random(other)
    other.save_pretrained("other", save_embedding_layers=False)
    names = {"model": tiny_vggt(), "base_model": tiny_vggt()}
    exec(compile(example, str(DOCUMENTATION), "exec"), names)
    assert relative_difference(outputs(names["plain"]), outputs(other)) < 1e-5


def test_plain_lora_still_works_beside_the_registration() -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["fc1"]))
    assert torch.equal(outputs(model, x()), outputs(net(), x()))


def test_other_releases_of_peft() -> None:
    check_release(peft.__version__)
    check_release("0.21.0.dev0")
    with pytest.raises(ImportError, match=r"needs PEFT 0\.21 or newer, got 0\.20\.3: pip install -U"):
        check_release("0.20.3")
    with pytest.warns(UserWarning, match=r"tested with PEFT up to 0\.21, this is 1\.0\.1: if it fails, install"):
        check_release("1.0.1")
