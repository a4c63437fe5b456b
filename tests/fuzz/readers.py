"""Every reader of files: a valid input of each, the file in it that is attacked, and the call that reads it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import benchmark_layouts, official_layouts, own_captures
from mining.synthetic_adapters import random_pair, write_adapter
from peft import LoraConfig, get_peft_model
from PIL import Image
from reporting.synthetic_run import write_adapters, write_results, write_training
from safetensors.torch import save_file

from subspace3d import settings
from subspace3d.adapters.adalora import adalora_config
from subspace3d.adapters.basis import read_pairs, warn_of_other_base
from subspace3d.adapters.saved import attach_adapter
from subspace3d.backbones.model_card import licence_of_card, write_card
from subspace3d.backbones.record import read_licence
from subspace3d.backbones.weights import load_weights
from subspace3d.commands import convert, mine
from subspace3d.commands import fit as fit_command
from subspace3d.commands.convert import ConvertConfig
from subspace3d.commands.finetune import FinetuneConfig
from subspace3d.commands.mine import MineConfig
from subspace3d.datasets.multiview import read_mixture
from subspace3d.datasets.readers import (
    binary_depth,
    clearpose,
    co3d,
    colmap,
    colmap_model,
    handshake,
    indoor,
    mesh_files,
    nerfstudio,
    renderings,
    rgbd_folder,
    stereo,
)
from subspace3d.datasets.readers.source import Report
from subspace3d.evaluation.results import KeptResults, empty_record
from subspace3d.files import read_record, write_json
from subspace3d.formats import fit as fit_format
from subspace3d.formats.adapter import read_adapter
from subspace3d.formats.adapter_folders import search_adapters
from subspace3d.formats.basis import load_authors, load_basis, save_authors, save_basis
from subspace3d.formats.images import read_raw_depth, read_rgb
from subspace3d.formats.run import AdaptRecord, licence_of_adapter, read_tuned
from subspace3d.formats.scene import load_scene, write_scene
from subspace3d.formats.subspace import ModuleSubspace, load_subspace, load_subspaces, save_subspace
from subspace3d.mining.analyze import analyze
from subspace3d.mining.compare import compare
from subspace3d.reporting.collect import collect
from subspace3d.reporting.viewer_sources import Prediction, open_source
from subspace3d.training import checkpoints
from subspace3d.training.trackers import MetricsFile
from subspace3d.training.tuned import _copy_weights, save_adapter


@dataclasses.dataclass(frozen=True)
class Reader:
    """``make(folder)`` writes a valid input, ``target`` is the file in it to damage, ``read(folder)`` reads it."""

    make: Callable[[Path], object]
    target: str
    read: Callable[[Path], object]
    share: float = 1.0
    """Of the cases of a run, for a reader that takes long."""

    @property
    def is_record(self) -> bool:
        return self.target.endswith(".json")


def _adapter(folder: Path) -> None:
    rng = np.random.default_rng(0)
    modules = {"blocks.0.proj": random_pair(rng, 6, 5, 2), "blocks.1.proj": random_pair(rng, 6, 5, 3)}
    shutil.rmtree(folder)
    write_adapter(folder, modules, rank_pattern={"1.proj": 3}, alpha_pattern={"blocks.0.proj": 4})


def _subspace(folder: Path) -> None:
    module = ModuleSubspace(torch.ones(5, 2), torch.ones(4, 2), torch.ones(4).double(), torch.ones(3).double())
    save_subspace(folder / "s.safetensors", {"blocks.0.proj": module}, {"k": 2, "adapters": [], "modules": {}})


def _basis(folder: Path) -> None:
    save_basis(folder / "b.safetensors", {"blocks.0.proj": (torch.ones(5, 2), torch.ones(4, 2))})


def _authors(folder: Path) -> None:
    name = "aggregator.frame_blocks.0.attn.qkv"
    save_authors(folder / "a.safetensors", {name: (torch.ones(5, 2), torch.ones(4, 2))})


def _without_checksum(path: Path) -> None:
    """Write the file as other software would, so that damage reaches what is behind the checksum."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, "pt") as file:
        metadata = {key: value for key, value in (file.metadata() or {}).items() if key != "crc32"}
    save_file({name: tensor.clone() for name, tensor in load_file(path).items()}, path, metadata)


def _plain(make: Callable[[Path], object], name: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        make(folder)
        _without_checksum(folder / name)

    return write


def _scene(folder: Path) -> None:
    rng = np.random.default_rng(0)
    shutil.rmtree(folder)
    write_scene(
        folder,
        rng.integers(0, 256, (2, 6, 7, 3), dtype=np.uint8),
        rng.uniform(1, 5, (2, 6, 7)).astype(np.float32),
        np.stack([np.array([[7.0, 0, 3.5], [0, 8.0, 3], [0, 0, 1]])] * 2),
        np.stack([np.eye(3, 4)] * 2),
        {"seeds": {}},
        np.ones((2, 6, 7), bool),
    )
    record = json.loads((folder / "scene.json").read_text())
    np.save(folder / "depth/0001.npy", np.full((6, 7), 2.0, np.float32))
    record["frames"][1]["depth"] = "depth/0001.npy"
    (folder / "scene.json").write_text(json.dumps(record))


def _checkpoint(folder: Path) -> None:
    model, optimizer = _model()
    checkpoints.save(folder, 1, dict(model.named_parameters()), optimizer, {"settings": {}}, {"rng": torch.zeros(3)})


def _model() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def _load_checkpoint(folder: Path) -> object:
    model, optimizer = _model()
    path = folder / "step_1"
    checkpoints.read_state(path)
    return checkpoints.load(path, dict(model.named_parameters()), optimizer)


def _tuned(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"x")
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    record = {"format": "subspace3d-tuned", "version": 2, "method": "full", "settings": {}}
    record["backbone"] = {"name": "vggt-nano", "weights": "shipped", "sha256": "", "seed": 0}
    record["files"] = {"model.safetensors": digest}
    (folder / "tuned.json").write_text(json.dumps(record))


def _tuned_run(folder: Path) -> None:
    (folder / "tuned/lora/tuned").mkdir(parents=True)
    _tuned(folder / "tuned/lora/tuned")


def _consume(kind: str, find: Callable[..., list], allow_pickle: bool = True) -> Callable[[Path], object]:
    """Convert every frame of a data set, as processes of `convert` do; they catch the two kinds of error per scene."""

    def read(folder: Path) -> object:
        config = ConvertConfig(out=folder / "out", from_=kind, root=folder, frame_step=1, allow_pickle=allow_pickle)  # type: ignore[arg-type]
        scenes = pickle.loads(pickle.dumps(find(config, folder, Report())))
        return [list(scene.read(config, Report()).frames) for scene in scenes]

    return read


def _bundle(members: dict) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        np.savez(folder / "frame_bundle.npz", **members)

    return make


def _mesh(folder: Path) -> None:
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(folder / "t.png")
    (folder / "m.mtl").write_text("newmtl a\nmap_Kd t.png\n")
    (folder / "m.obj").write_text("mtllib m.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nf 1/1 2/2 3/3\n")
    header = "ply\nformat {}\nelement vertex 3\n" + "".join(f"property float {axis}\n" for axis in "xyz")
    header += "".join(f"property uchar {name}\n" for name in ("red", "green", "blue"))
    header += "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    (folder / "a.ply").write_text(header.format("ascii 1.0") + "0 0 0 1 2 3\n1 0 0 1 2 3\n0 1 0 1 2 3\n3 0 1 2\n")
    vertices = np.array(
        [(*point, 1, 2, 3) for point in ((0, 0, 0), (1, 0, 0), (0, 1, 0))], "<f4,<f4,<f4,u1,u1,u1"
    ).tobytes()
    faces = np.array([(3, (0, 1, 2))], "u1,(3,)<i4").tobytes()
    (folder / "b.ply").write_bytes(header.format("binary_little_endian 1.0").encode() + vertices + faces)


def _report(folder: Path) -> object:
    from subspace3d.commands import report
    from subspace3d.commands.report import ReportConfig

    with contextlib.redirect_stdout(io.StringIO()):
        return report.run(ReportConfig(folder))


def _evaluation(folder: Path) -> None:
    """A run without curves."""
    write_results(folder / "evaluation", ["a"])


def _analysis(folder: Path) -> None:
    """Without figures, which take long to draw."""
    write_adapters(folder / "adapters", ("texture", "camera"), layers=1)
    for attribute in ("texture", "camera"):
        with contextlib.redirect_stdout(io.StringIO()):
            mine.run(MineConfig(folder / "adapters" / attribute, folder / f"{attribute}.safetensors", k=2))
    shutil.rmtree(folder / "adapters")
    write_json(folder / "analysis/analysis.json", analyze(load_subspaces([folder])))


def _comparison(folder: Path) -> None:
    _analysis(folder)
    found = load_subspaces([folder])
    write_json(folder / "comparison/comparison.json", compare(found, found, {}))
    shutil.rmtree(folder / "analysis")


def _pictures(folder: Path) -> None:
    """What an evaluation keeps, without checksums, so that damage reaches what is behind them."""
    write_results(folder / "evaluation", ["a"])
    for path in folder.rglob("*.safetensors"):
        _without_checksum(path)


def _view(folder: Path) -> object:
    source = open_source(folder, Prediction())
    shown = [source.truth(scene).rgb for scene in source.scenes]
    return shown, [source.prediction(scene, method) for scene in source.scenes for method in source.methods]


def _image(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        Image.fromarray(np.arange(6 * 7 * 3, dtype=np.uint8).reshape(6, 7, 3)).save(folder / f"i.{suffix}")

    return make


def _exr(folder: Path) -> None:
    from subspace3d.mitsuba_variant import load_mitsuba

    depth = np.repeat(np.arange(42, dtype=np.float32).reshape(6, 7, 1), 3, 2)
    load_mitsuba().Bitmap(depth).write(str(folder / "d.exr"))


def _depth(name: str) -> Callable[[Path], None]:
    """A depth map in the format that the suffix of ``name`` says."""
    metres = np.arange(42, dtype=np.float32).reshape(6, 7)

    def make(folder: Path) -> None:
        if name.endswith(".npz"):
            np.savez_compressed(folder / name, metres)
        else:
            Image.fromarray((1000 * metres).astype(np.uint16)).save(folder / name)

    return make


def _grey(folder: Path) -> None:
    Image.fromarray(np.arange(42, dtype=np.uint16).reshape(6, 7) * 1500).save(folder / "g.png")


def _state_dict(folder: Path) -> None:
    torch.save({"model": torch.nn.Linear(3, 2).state_dict(), "epoch": 3}, folder / "w.pt")


class _Tiny(torch.nn.Module):
    """A backbone of one layer, in place of the real one, which takes seconds to build."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)
        self.heads = torch.nn.Linear(2, 3)


def _tuned_adapter(method: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        torch.manual_seed(0)
        model = _Tiny()
        if method == "subspace":
            from subspace3d.adapters.peft.tuner import SubspaceConfig

            basis = {"fc": (torch.eye(2), torch.eye(3)[:, :2])}
            save_basis(folder / "basis.safetensors", basis)
            config = SubspaceConfig.from_basis(basis, lora_modules="heads", r=2, lora_alpha=4)
            config.basis = str(folder / "basis.safetensors")
        elif method == "adalora":
            config = adalora_config(2, "fc", 10)
        else:
            config = LoraConfig(r=2, lora_alpha=4, target_modules="fc|heads")
        save_adapter(get_peft_model(model, config), folder / "adapter")
        _without_checksum(folder / "adapter/adapter_model.safetensors")

    return make


def _attach(method: str) -> Callable[[Path], object]:
    return lambda folder: attach_adapter(_Tiny(), folder / "adapter", method, folder / "basis.safetensors")


def _analyze(folder: Path) -> object:
    return analyze({"a": load_subspace(folder / "s.safetensors")})


def _adapt(folder: Path) -> None:
    (folder / "adapt.json").write_text(json.dumps({"scenes": "a", "trainable": {"total": 3}, "settings": {"rank": 4}}))


def _yaml(folder: Path) -> None:
    text = "scenes: a\nout: b\nmethod: lora\nrank: 4\nsubspaces: [a, b]\ntrain:\n  lr: 1.0e-3\n  frames: [2, 4]\n"
    (folder / "c.yaml").write_text(text)
    (folder / "c.toml").write_text('scenes = "a"\nout = "b"\nrank = 4\nsubspaces = ["a"]\n[train]\nlr = 1e-3\n')
    (folder / "mix.yaml").write_text("real: 0.4\nsynthetic: 0.6\n")


def _colmap(binary: bool) -> Callable[[Path], object]:
    return lambda folder: own_captures.write_colmap(folder, 2, binary=binary, at=".")


def _pfm(folder: Path) -> None:
    (folder / "d.pfm").write_bytes(benchmark_layouts.pfm(np.ones((5, 7), np.float32)))


def _npz_depth(folder: Path) -> None:
    np.savez_compressed(folder / "d.npz", depth=np.ones((5, 7), np.float32))


def _clearpose(folder: Path) -> None:
    official_layouts.write_clearpose_scene(folder / "set1/scene1", [0, 1])


_SHARES = {source: dict.fromkeys(("core", "U", "V"), 0.1) for source in ("basis", "psv", "random", "gradient")}


def _fit(folder: Path) -> None:
    module = {"norm": 1.0, "stable_rank": 2.0, "K": 2, "shares": _SHARES}
    record = {
        "format": fit_format.FORMAT,
        "version": fit_format.VERSION,
        "inputs": {"k": 2},
        "sentence": "it fits",
        "teacher": "depth",
        "verdict": "fits",
        "K": 2,
        "shares": _SHARES,
        "by_K": {source: [0.1, 0.2] for source in _SHARES},
        "modules": {"aggregator.frame_blocks.0.attn.qkv": module, "head": module},
        "suggested": {"K": 1, "k": None, "attributes": ["a"]},
    }
    write_json(folder / "fit/fit.json", record)


def _described(folder: Path) -> object:
    record = fit_format.read_fit(folder / "fit/fit.json")
    return collect(folder), None if record is None else fit_command.describe(record)


def _curve(folder: Path) -> None:
    write_training(folder / "tuned/lora", "lora", 10)


def _kept_results(folder: Path) -> KeptResults:
    return KeptResults(folder, "base", {"frames": 2}, {})


def _kept(folder: Path) -> None:
    record = empty_record(())
    parts = {name: record[name] for name in ("per_scene", "failed", "details", "skipped", "pictures", "files")}
    _kept_results(folder).keep_method({**parts, "mean": {}, "protocols": {}})
    _kept_results(folder).keep_scene(0, record)


def _card(folder: Path) -> None:
    write_card(folder, "vggt-nano", "CC BY-NC 4.0")


def _weights(folder: Path) -> None:
    save_file(torch.nn.Linear(3, 2).state_dict(), folder / "w.safetensors")


def _own_weights(folder: Path) -> object:
    path = folder / "w.safetensors"
    _copy_weights(path, dict(torch.nn.Linear(3, 2).named_parameters()), "full")
    return read_licence(path)


def _of_a_base(folder: Path) -> object:
    warn_of_other_base([folder / "s.safetensors"], "vggt-nano")
    return read_pairs(folder / "s.safetensors")


def _searched(folder: Path) -> None:
    for name in ("one", "two"):
        (folder / name).mkdir()
        _adapter(folder / name)


def _dense(folder: Path) -> None:
    (folder / "d.bin").write_bytes(b"7&5&1&" + np.ones((5, 7), "<f4").tobytes())


def _half(folder: Path) -> None:
    Image.fromarray(np.full((5, 7), 0x3C00, np.uint16)).save(folder / "d.png")


READERS = {
    "adapter configuration": Reader(_adapter, "adapter_config.json", read_adapter),
    "adapter weights": Reader(_adapter, "adapter_model.safetensors", read_adapter),
    "subspace file": Reader(_subspace, "s.safetensors", lambda folder: load_subspace(folder / "s.safetensors")),
    "subspace file, no checksum": Reader(
        _plain(_subspace, "s.safetensors"), "s.safetensors", lambda folder: load_subspace(folder / "s.safetensors")
    ),
    "basis": Reader(_plain(_basis, "b.safetensors"), "b.safetensors", lambda f: load_basis(f / "b.safetensors")),
    "authors' basis": Reader(
        _plain(_authors, "a.safetensors"), "a.safetensors", lambda folder: load_authors(folder / "a.safetensors")
    ),
    "scene.json": Reader(_scene, "scene.json", lambda folder: load_scene(folder, image_size=3)),
    "scene image": Reader(_scene, "images/0000.png", load_scene),
    "scene depth png": Reader(_scene, "depth/0000.png", load_scene),
    "scene depth npy": Reader(_scene, "depth/0001.npy", load_scene),
    "scene mask": Reader(_scene, "mask/0000.png", load_scene),
    "adapt.json": Reader(_adapt, "adapt.json", lambda f: read_record(f / "adapt.json", AdaptRecord)),
    "image, jpeg": Reader(_image("jpg"), "i.jpg", lambda folder: read_rgb(folder / "i.jpg")),
    "image, tiff": Reader(_image("tiff"), "i.tiff", lambda folder: read_rgb(folder / "i.tiff")),
    "image, webp": Reader(_image("webp"), "i.webp", lambda folder: read_rgb(folder / "i.webp")),
    "image, bmp": Reader(_image("bmp"), "i.bmp", lambda folder: read_rgb(folder / "i.bmp")),
    "image, 16-bit grey": Reader(_grey, "g.png", lambda folder: read_rgb(folder / "g.png")),
    "depth exr": Reader(_exr, "d.exr", lambda folder: read_raw_depth(folder / "d.exr", 1.0)),
    "depth npz": Reader(_depth("d.npz"), "d.npz", lambda folder: read_raw_depth(folder / "d.npz", 1.0)),
    "depth tiff": Reader(_depth("d.tiff"), "d.tiff", lambda folder: read_raw_depth(folder / "d.tiff", 1000.0)),
    "weights, pt": Reader(_state_dict, "w.pt", lambda folder: load_weights(torch.nn.Linear(3, 2), folder / "w.pt")),
    "tuned lora, configuration": Reader(_tuned_adapter("lora"), "adapter/adapter_config.json", _attach("lora")),
    "tuned lora, weights": Reader(_tuned_adapter("lora"), "adapter/adapter_model.safetensors", _attach("lora")),
    "tuned adalora, configuration": Reader(
        _tuned_adapter("adalora"), "adapter/adapter_config.json", _attach("adalora")
    ),
    "tuned subspace, configuration": Reader(
        _tuned_adapter("subspace"), "adapter/adapter_config.json", _attach("subspace")
    ),
    "tuned subspace, basis": Reader(
        _plain(_tuned_adapter("subspace"), "basis.safetensors"), "basis.safetensors", _attach("subspace")
    ),
    "subspace file, analyzed": Reader(_plain(_subspace, "s.safetensors"), "s.safetensors", _analyze),
    "analysis.json": Reader(_analysis, "analysis/analysis.json", collect),
    "comparison.json": Reader(_comparison, "comparison/comparison.json", collect),
    "results.json, viewed": Reader(_pictures, "evaluation/results.json", _view),
    "kept truth": Reader(_pictures, "evaluation/pictures/a/true.safetensors", _view),
    "kept prediction": Reader(_pictures, "evaluation/pictures/a/base.safetensors", _view),
    "checkpoint state": Reader(_checkpoint, "step_1/state.json", _load_checkpoint),
    "checkpoint weights": Reader(
        _plain(_checkpoint, "step_1/model.safetensors"), "step_1/model.safetensors", _load_checkpoint
    ),
    "checkpoint optimiser": Reader(
        _plain(_checkpoint, "step_1/optimizer.safetensors"), "step_1/optimizer.safetensors", _load_checkpoint
    ),
    "tuned.json": Reader(_tuned, "tuned.json", read_tuned),
    "metadata.mat": Reader(_clearpose, "set1/scene1/metadata.mat", _consume("clearpose", clearpose.find)),
    "hand-shake bundle": Reader(
        _bundle(official_layouts.soap_bundle(2, (8, 8))[0]), "frame_bundle.npz", _consume("soap", handshake.find)
    ),
    "HNDR bundle": Reader(
        _bundle(official_layouts.hndr_bundle(2, (8, 8))), "frame_bundle.npz", _consume("hndr", handshake.find)
    ),
    "RGB-D poses": Reader(
        lambda folder: official_layouts.write_rgbd_folder(folder, 2), "poses.txt", _consume("rgbd", rgbd_folder.find)
    ),
    "RGB-D list": Reader(
        lambda folder: official_layouts.write_tum_folder(folder, 2), "rgb.txt", _consume("rgbd", rgbd_folder.find)
    ),
    "images.bin": Reader(_colmap(True), "images.bin", colmap_model.read_model),
    "cameras.bin": Reader(_colmap(True), "cameras.bin", colmap_model.read_model),
    "images.txt": Reader(_colmap(False), "images.txt", colmap_model.read_model),
    "cameras.txt": Reader(_colmap(False), "cameras.txt", colmap_model.read_model),
    "transforms.json": Reader(
        lambda folder: own_captures.write_nerfstudio(folder, 2),
        "transforms.json",
        _consume("nerfstudio", nerfstudio.find),
        share=0.3,
    ),
    "opencv_cameras.json": Reader(
        lambda folder: own_captures.write_renderings(folder, 2),
        "opencv_cameras.json",
        _consume("renderings", renderings.find),
        share=0.3,
    ),
    "annotations": Reader(
        lambda folder: benchmark_layouts.co3d(folder, "."), "apple_train.jgz", _consume("co3d", co3d.find), share=0.3
    ),
    "PFM": Reader(_pfm, "d.pfm", lambda folder: binary_depth.read_pfm(folder / "d.pfm")),
    "npz depth": Reader(_npz_depth, "d.npz", lambda folder: read_raw_depth(folder / "d.npz", 1e-3)),
    "OBJ": Reader(_mesh, "m.obj", lambda folder: mesh_files.read_obj(folder / "m.obj")),
    "MTL": Reader(_mesh, "m.mtl", lambda folder: mesh_files.read_obj(folder / "m.obj")),
    "PLY, ascii": Reader(_mesh, "a.ply", lambda folder: mesh_files.read_ply(folder / "a.ply")),
    "PLY, binary": Reader(_mesh, "b.ply", lambda folder: mesh_files.read_ply(folder / "b.ply")),
    "YAML settings": Reader(_yaml, "c.yaml", lambda folder: settings.flags(folder / "c.yaml", FinetuneConfig)),
    "TOML settings": Reader(_yaml, "c.toml", lambda folder: settings.flags(folder / "c.toml", FinetuneConfig)),
    "mixture of scenes": Reader(_yaml, "mix.yaml", lambda folder: read_mixture(folder / "mix.yaml")),
    "results.json": Reader(_evaluation, "evaluation/results.json", collect),
    "results.json, drawn": Reader(_evaluation, "evaluation/results.json", _report, share=0.2),
    "run folder": Reader(_tuned_run, "tuned/lora/tuned/tuned.json", collect),
    "metrics.jsonl": Reader(_curve, "tuned/lora/metrics.jsonl", collect),
    "metrics.jsonl, continued": Reader(
        _curve, "tuned/lora/metrics.jsonl", lambda folder: MetricsFile(folder / "tuned/lora/metrics.jsonl", 100).close()
    ),
    "fit.json": Reader(_fit, "fit/fit.json", _described),
    "fit.json, drawn": Reader(_fit, "fit/fit.json", _report, share=0.2),
    "kept results of a method": Reader(_kept, "methods/base.json", lambda folder: _kept_results(folder).method()),
    "kept results of a scene": Reader(
        _kept, "methods/base.parts/0.json", lambda folder: _kept_results(folder).scene(0)
    ),
    "subspace file, of a base": Reader(_plain(_subspace, "s.safetensors"), "s.safetensors", _of_a_base),
    "weights of a run": Reader(_weights, "w.safetensors", _own_weights),
    "adapter weights, mined": Reader(_adapter, "adapter_model.safetensors", lambda f: dict(read_adapter(f).modules)),
    "skipped.json": Reader(
        lambda folder: write_json(folder / "skipped.json", {"a": ["0.png: no pose"]}),
        "skipped.json",
        lambda folder: convert._read_skipped(folder / "skipped.json"),
    ),
    "model card": Reader(_card, "README.md", lambda folder: licence_of_card(folder / "README.md")),
    "licence of an adapter": Reader(_adapt, "adapt.json", licence_of_adapter),
    "adapters, searched": Reader(_searched, "one/adapter_config.json", search_adapters),
    "weights, safetensors": Reader(
        _weights, "w.safetensors", lambda folder: load_weights(torch.nn.Linear(3, 2), folder / "w.safetensors")
    ),
    "COLMAP depth": Reader(_dense, "d.bin", lambda folder: colmap._read_dense(folder / "d.bin")),
    "depth of ETH3D": Reader(
        lambda folder: (folder / "d").write_bytes(np.ones((5, 7), "<f4").tobytes()),
        "d",
        lambda folder: binary_depth.read_raw(folder / "d", (5, 7)),
    ),
    "depth of Co3D": Reader(_half, "d.png", lambda folder: binary_depth.read_half_png(folder / "d.png")),
    "depth of Sintel": Reader(
        benchmark_layouts.sintel,
        "training/depth/alley_1/frame_0001.dpt",
        lambda folder: binary_depth.read_dpt(folder / "training/depth/alley_1/frame_0001.dpt"),
    ),
    "camera of Sintel": Reader(
        benchmark_layouts.sintel,
        "training/camdata_left/alley_1/frame_0001.cam",
        lambda folder: binary_depth.read_sintel_camera(folder / "training/camdata_left/alley_1/frame_0001.cam"),
    ),
    "camera of DTU": Reader(
        lambda folder: benchmark_layouts.dtu(folder, "test"),
        "scan1/cams/00000000_cam.txt",
        lambda folder: stereo._dtu_camera(folder / "scan1/cams/00000000_cam.txt"),
    ),
    "camera of HiRoom": Reader(
        benchmark_layouts.hiroom,
        "20241230/828805/cam_sampled_06/cam_K.npy",
        _consume("hiroom", indoor.find_hiroom),
        share=0.3,
    ),
    "pose of ScanNet": Reader(
        benchmark_layouts.scannet, "scans/scene0000_00/pose/0.txt", _consume("scannet", indoor.find_scannet), share=0.3
    ),
}


def zip_of(members: dict[str, bytes]) -> bytes:
    """An npz file with these raw members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def npy_of(value: object) -> bytes:
    """A member that holds a pickle."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"shape": (), "fortran_order": False, "descr": "|O"})
    return buffer.getvalue() + pickle.dumps(value)
