"""The result of fine-tuning on disk: OUT/tuned, a record and what was trained; it needs only the backbone's weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subspace3d import outputs
from subspace3d.adapters.low_rank import adapter_factors
from subspace3d.adapters.methods import apply_method
from subspace3d.adapters.parameters import trainable_parameters
from subspace3d.adapters.placement import CORE_METHODS
from subspace3d.backbones.record import BackboneRecord, load_backbone
from subspace3d.files import atomic_folder, load_tensors, save_tensors, sha256, write_json
from subspace3d.formats.adapter import write_lora
from subspace3d.formats.basis import Basis, save_basis
from subspace3d.formats.run import ADAPTER, BASIS, FORMAT, VERSION, WEIGHTS, read_tuned, tuned_folder


def save_tuned(
    out: Path, model: nn.Module, method: str, backbone: BackboneRecord, basis: Basis | None, record: dict[str, Any]
) -> Path:
    """Write ``out/tuned``: tuned.json and what `save_trained` writes.

    Args:
        out (Path): run folder.
        model (nn.Module): what `apply_method` returned, trained.
        method (str): none, full, lora, pissa, adalora, psv or subspace.
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
                "files": {
                    str(path.relative_to(temporary)): sha256(path) for path in sorted(temporary.rglob("*.safetensors"))
                },
            },
        )
    return folder


def save_trained(folder: Path, model: nn.Module, method: str, backbone: BackboneRecord, basis: Basis | None) -> None:
    """Write into ``folder`` what was trained, in a form others can load.

    full: model.safetensors with the trained weights. All others but none: adapter/, a PEFT folder for the backbone's
    own weights; for pissa a plain LoRA of rank 2 r, what was trained minus what was taken out of the weights. psv,
    subspace: basis.safetensors (``<module>.U``, ``<module>.V``) beside it. Args as in `save_tuned`.
    """
    if method == "full":
        save_tensors(folder / WEIGHTS, trainable_parameters(model))
    elif method == "pissa":
        write_lora(folder / ADAPTER, adapter_factors(model), base_of(model), backbone.identity)
    elif method != "none":
        if method in CORE_METHODS:
            save_basis(folder / BASIS, basis or {})
            model.peft_config["default"].basis = str(folder / BASIS)  # type: ignore[union-attr, index]
        save_adapter(model, folder / ADAPTER)


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


def load_tuned(out: Path, device: torch.device | str = "cpu") -> nn.Module:
    """Rebuild backbone and method of a run folder, in evaluation mode.

    Raises:
        FileNotFoundError: the result, one of its files or the backbone's weights are missing.
        ValueError: hashes do not fit: of the backbone's weights, of a file of the result, or of the basis.
    """
    record, folder = read_tuned(out), tuned_folder(out)
    try:
        backbone = BackboneRecord(**record["backbone"])
    except TypeError as error:
        raise ValueError(f"{folder / 'tuned.json'}: backbone must be that of a run: {error}") from error
    model: nn.Module = load_backbone(backbone)
    method = record["method"]
    if method == "full":
        model = apply_method(model, "full")
        trained, (weights, _) = trainable_parameters(model), load_tensors(folder / WEIGHTS)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(weights[name])
    elif method != "none":
        from peft import PeftModel

        if method in CORE_METHODS:
            from subspace3d.adapters import peft_tuner  # noqa: F401 (PEFT knows the adapter's type from now on)

        with warnings.catch_warnings():
            # PEFT reads the ranks that AdaLoRA kept as patterns over modules, and finds that none matches
            warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
            model = PeftModel.from_pretrained(model, str(folder / ADAPTER), torch_device="cpu")
    return model.to(device).eval()
