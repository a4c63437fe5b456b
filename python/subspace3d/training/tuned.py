"""The result of fine-tuning on disk: OUT/tuned, a record and what was trained; it needs only the backbone's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from subspace3d.adapters.basis import Basis, read_basis, save_basis
from subspace3d.adapters.methods import SUBSPACE_SCALE, add_cores, apply_method, cores, lora_config
from subspace3d.adapters.parameters import trainable_parameters
from subspace3d.files import atomic_folder, load_tensors, read_json, save_tensors, sha256, write_json
from subspace3d.training.backbone import BackboneRecord, load_backbone

FORMAT = "subspace3d-tuned"
VERSION = 1
_ADAPTER = "adapter"
_WEIGHTS = "model.safetensors"
_CORES = "cores.safetensors"
_BASIS = "basis.safetensors"


def save_tuned(
    out: Path, model: nn.Module, method: str, backbone: BackboneRecord, basis: Basis | None, record: dict[str, Any]
) -> Path:
    """Write ``out/tuned``: tuned.json and, by method, the files below.

    full: model.safetensors with the trained weights. lora: adapter/, a PEFT folder. subspace: cores.safetensors
    (``<module>.c``), basis.safetensors (``<module>.U``, ``<module>.V``) and adapter/ with the heads' LoRA.

    Args:
        out (Path): run folder.
        model (nn.Module): what `apply_method` returned, trained.
        method (str): none, full, lora or subspace.
        backbone (BackboneRecord): the weights it started from.
        basis (dict | None): the frozen basis of the subspace method.
        record (dict): further JSON values for tuned.json.
    """
    folder = out / "tuned"
    with atomic_folder(folder) as temporary:
        if method == "full":
            save_tensors(temporary / _WEIGHTS, trainable_parameters(model))
        if method in ("lora", "subspace"):
            save_adapter(model, temporary / _ADAPTER)
        if method == "subspace":
            save_tensors(
                temporary / _CORES,
                {f"{name}.c": module.c for name, module in cores(model).items()},
                {"scale": SUBSPACE_SCALE},
            )
            save_basis(temporary / _BASIS, basis or {})
        write_json(
            temporary / "tuned.json",
            {
                "format": FORMAT,
                "version": VERSION,
                "method": method,
                "backbone": backbone.to_dict(),
                **record,
                "files": {
                    str(path.relative_to(temporary)): sha256(path) for path in sorted(temporary.rglob("*.safetensors"))
                },
            },
        )
    return folder


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the LoRA of a PeftModel as PEFT does."""
    # otherwise PEFT asks the network whether the base model has an embedding layer
    model.save_pretrained(str(folder), save_embedding_layers=False)  # type: ignore[operator]


def read_tuned(out: Path) -> dict[str, Any]:
    """tuned.json of a run folder (or of its ``tuned`` folder itself), its files checked against their hashes.

    Raises:
        FileNotFoundError: there is no result, or one of its files is missing.
        ValueError: another format, or a file that is not the one recorded.
    """
    folder = _folder(out)
    record = read_json(folder / "tuned.json")
    if record.get("format") != FORMAT or record.get("version") != VERSION:
        raise ValueError(f"{folder / 'tuned.json'} must have format {FORMAT!r} version {VERSION}")
    for name, digest in record["files"].items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        if sha256(path) != digest:
            raise ValueError(f"{path} must have the sha256 in tuned.json ({digest[:12]}...), it was changed")
    return record


def load_tuned(out: Path, device: torch.device | str = "cpu") -> nn.Module:
    """Rebuild backbone and method of a run folder, in evaluation mode.

    Raises:
        FileNotFoundError: the result, one of its files or the backbone's weights are missing.
        ValueError: hashes do not fit: of the backbone's weights, or of a file of the result.
    """
    record, folder = read_tuned(out), _folder(out)
    model: nn.Module = load_backbone(BackboneRecord(**record["backbone"]))
    method = record["method"]
    if method == "full":
        model = apply_method(model, "full")
        trained, (weights, _) = trainable_parameters(model), load_tensors(folder / _WEIGHTS)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(weights[name])
    if method == "subspace":
        add_cores(model, read_basis(folder / _BASIS), load_tensors(folder / _CORES)[1]["scale"])
        trained_cores, _ = load_tensors(folder / _CORES)
        with torch.no_grad():
            for name, module in cores(model).items():
                module.c.copy_(trained_cores[f"{name}.c"])
    if method in ("lora", "subspace"):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder / _ADAPTER))
    return model.to(device).eval()


def export_lora(out: Path, folder: Path) -> Path:
    """Write a subspace result as one plain PEFT LoRA: lora_B = s U c, lora_A = V^T with alpha = r = K.

    Exact: stock PEFT loads it on a fresh backbone and gives the same outputs. The heads keep their own rank; PEFT's
    rank_pattern and alpha_pattern hold those of the aggregator's modules.

    Args:
        out (Path): run folder of a subspace run.
        folder (Path): adapter folder to write.

    Raises:
        ValueError: the run is of another method.
    """
    record, source = read_tuned(out), _folder(out)
    if record["method"] != "subspace":
        raise ValueError(f"method of {out} must be subspace, got {record['method']!r}")
    trained_cores, header = load_tensors(source / _CORES)
    tensors, _ = load_tensors(source / _ADAPTER / "adapter_model.safetensors")
    ranks = {}
    for name, (u, v) in read_basis(source / _BASIS).items():
        ranks[name] = u.shape[1]
        tensors[f"base_model.model.{name}.lora_A.weight"] = v.T
        tensors[f"base_model.model.{name}.lora_B.weight"] = header["scale"] * (u @ trained_cores[f"{name}.c"])
    config = lora_config(record["rank"], "all", BackboneRecord(**record["backbone"]).identity)
    config.rank_pattern, config.alpha_pattern = ranks, dict(ranks)
    config.inference_mode = True
    with atomic_folder(folder) as temporary:
        config.save_pretrained(str(temporary))
        save_tensors(temporary / "adapter_model.safetensors", tensors)
    return folder


def _folder(out: Path) -> Path:
    folder = out if (out / "tuned.json").is_file() else out / "tuned"
    if not (folder / "tuned.json").is_file():
        raise FileNotFoundError(f"no tuned result (tuned/tuned.json) in {out}")
    return folder
