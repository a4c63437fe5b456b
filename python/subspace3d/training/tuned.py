"""The result of fine-tuning on disk: OUT/tuned, a record and what was trained; it needs only the backbone's weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subspace3d import outputs
from subspace3d.adapters.low_rank import adapter_factors
from subspace3d.adapters.methods import apply_method
from subspace3d.adapters.parameters import trainable_parameters
from subspace3d.adapters.saved import attach_adapter
from subspace3d.backbones.model_card import write_card
from subspace3d.backbones.presets import PRESETS
from subspace3d.backbones.record import BackboneRecord, load_backbone
from subspace3d.choices import CORE_METHODS, OWN_WEIGHTS
from subspace3d.files import atomic_folder, check_values, load_tensors, save_tensors, sha256, write_json
from subspace3d.formats.adapter import CONFIG_NAME, write_lora
from subspace3d.formats.basis import Basis, save_basis
from subspace3d.formats.run import ADAPTER, BASIS, FORMAT, VERSION, WEIGHTS, read_tuned, tuned_folder


def save_tuned(
    out: Path, model: nn.Module, method: str, backbone: BackboneRecord, basis: Basis | None, record: dict[str, Any]
) -> Path:
    """Write ``out/tuned``: tuned.json and what `save_trained` writes.

    Args:
        out (Path): run folder.
        model (nn.Module): what `apply_method` returned, trained.
        method (str): none, full, bias, lora, pissa, adalora, psv or subspace.
        backbone (BackboneRecord): the weights it started from.
        basis (dict | None): the frozen basis of psv and subspace.
        record (dict): further JSON values for tuned.json.
    """
    folder = outputs.claim(out / "tuned", outputs.TUNED, "out")
    with atomic_folder(folder) as temporary:
        save_trained(temporary, model, method, backbone, basis)
        write_json(
            temporary / "tuned.json",
            {
                "format": FORMAT,
                "version": VERSION,
                "method": method,
                "backbone": backbone.to_dict(),
                **record,
                # everything that load_tuned reads
                "files": {
                    path.relative_to(temporary).as_posix(): sha256(path)
                    for path in sorted((*temporary.rglob("*.safetensors"), *temporary.rglob(CONFIG_NAME)))
                },
            },
        )
    return folder


def save_trained(folder: Path, model: nn.Module, method: str, backbone: BackboneRecord, basis: Basis | None) -> None:
    """Write into ``folder`` what was trained, in a form others can load.

    full, bias: model.safetensors with the trained weights. All others but none: adapter/, a PEFT folder for the
    backbone's own weights; for pissa a plain LoRA of rank 2 r, what was trained minus what was taken out of the
    weights. psv, subspace: basis.safetensors (``<module>.U``, ``<module>.V``) beside it. Args as in `save_tuned`.
    """
    if method in OWN_WEIGHTS:
        save_tensors(folder / WEIGHTS, trainable_parameters(model))
    elif method == "pissa":
        write_lora(folder / ADAPTER, adapter_factors(model), base_of(model), backbone.identity)
        write_card(folder / ADAPTER, backbone.identity, backbone.licence)
    elif method != "none":
        if method in CORE_METHODS:
            save_basis(folder / BASIS, basis or {})
            model.peft_config["default"].basis = str(folder / BASIS)  # type: ignore[union-attr, index]
        save_adapter(model, folder / ADAPTER)
        write_card(folder / ADAPTER, backbone.identity, backbone.licence)


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the adapter of a PeftModel as PEFT does.

    Raises:
        OSError: the disk is full, or the file cannot be written for another reason.
        ValueError: ``folder`` holds anything else than an adapter of this project.
    """
    from safetensors import SafetensorError

    folder = outputs.claim(folder, outputs.ADAPTED, "folder")
    with warnings.catch_warnings():
        # AdaLoRA may leave a module no direction at all, which PEFT takes for a shard that was not gathered
        warnings.filterwarnings("ignore", r".*LoRA tensor\(s\) have invalid shape")
        # otherwise PEFT asks the network whether the base model has an embedding layer
        try:
            model.save_pretrained(str(folder), save_embedding_layers=False)  # type: ignore[operator]
        except SafetensorError as error:
            raise OSError(f"{folder} could not be written: {error}") from error


def base_of(model: nn.Module) -> nn.Module:
    """The backbone inside a PeftModel, its adapted modules still adapted."""
    return model.get_base_model()  # type: ignore[operator]


def load_tuned(out: Path, device: torch.device | str = "cpu", backbone: str = "") -> nn.Module:
    """Rebuild backbone and method of a run folder, in evaluation mode.

    Args:
        out (Path): run folder.
        device (torch.device | str): where the model goes.
        backbone (str): of a run on ``package.module:factory`` the same name: a record alone starts no code from outside
            the package.

    Raises:
        FileNotFoundError: the result, one of its files or the backbone's weights are missing.
        ValueError: hashes do not fit (of the backbone's weights, of a file of the result, or of the basis), a file is
            not what the method writes, or the backbone is another one, or a factory that is not named.
    """
    record, folder = read_tuned(out), tuned_folder(out)
    name = record["backbone"]["name"]
    if (backbone and backbone != name) or (not backbone and name not in PRESETS):
        raise ValueError(f"backbone must be {name}, on which {out} was tuned, got {backbone or 'none'}")
    model: nn.Module = load_backbone(BackboneRecord(**record["backbone"]))
    method = record["method"]
    if method in OWN_WEIGHTS:
        model = apply_method(model, method)
        _copy_weights(folder / WEIGHTS, trainable_parameters(model), method)
    elif method != "none":
        model = attach_adapter(model, folder / ADAPTER, method, folder / BASIS)
    return model.to(device).eval()


def _copy_weights(path: Path, parameters: Mapping[str, nn.Parameter], method: str) -> None:
    weights, _ = load_tensors(path)
    foreign = sorted(weights.keys() ^ parameters.keys())
    if foreign:
        raise ValueError(f"{path} must hold what {method} trains: {len(foreign)} tensors differ, e.g. {foreign[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            check_values(path, name, weights[name])
            if weights[name].shape != parameter.shape:
                raise ValueError(f"{path}: {name} must be {list(parameter.shape)}, got {list(weights[name].shape)}")
            parameter.copy_(weights[name])
