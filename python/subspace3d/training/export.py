"""The verb export: the result of a fine-tuning run in a format that other software loads."""

from __future__ import annotations

from pathlib import Path

from subspace3d import outputs
from subspace3d.adapters.basis import read_basis
from subspace3d.adapters.lora_folder import adapter_factors, write_lora
from subspace3d.adapters.placement import CORE_METHODS
from subspace3d.backbones.targets import target_modules
from subspace3d.configs import ExportConfig
from subspace3d.mining.subspace_file import save_authors
from subspace3d.training.backbone import BackboneRecord
from subspace3d.training.tuned import BASIS, base_of, load_tuned, read_tuned, tuned_folder


def run(config: ExportConfig) -> Path:
    """Write what ``config.to`` says and print where; returns the path."""
    config = outputs.check(config)
    if config.to == "lora":
        path = export_lora(config.run, config.out or config.run / "export" / "lora")
        print(f"{path}: plain LoRA, PeftModel.from_pretrained(model, {str(path)!r})")
    else:
        path = export_authors(config.run, config.out or config.run / "export" / "basis.safetensors")
        print(f"{path}: the basis as .A and .B; this layout has no place for the trained cores and the heads' LoRA")
    return path


def export_lora(run: Path, folder: Path) -> Path:
    """Write a run's adapter as one plain PEFT LoRA for the backbone's own weights.

    Exact: stock PEFT loads it on a fresh backbone and gives the same outputs up to rounding. psv, subspace:
    ``lora_B = s U c``, ``lora_A = V^T``, alpha = r = K, with the heads' LoRA in the same folder at its own rank; see
    `adapter_factors` for the other methods.

    Args:
        run (Path): run folder.
        folder (Path): adapter folder to write.

    Raises:
        FileNotFoundError: there is no result in ``run``, or the backbone's weights are missing.
        ValueError: the run trained no adapter.
    """
    record = read_tuned(run)
    if record["method"] in ("none", "full"):
        raise ValueError(f"run: the method of {run} must train an adapter, {record['method']!r} does not")
    model = load_tuned(run)
    return write_lora(folder, adapter_factors(model), base_of(model), BackboneRecord(**record["backbone"]).identity)


def export_authors(run: Path, path: Path) -> Path:
    """Write the basis of a psv or subspace run in the layout of the authors' release, which their code loads.

    Bases of head modules have no key in it and are left out; the basis alone is written, the cores are not.

    Raises:
        FileNotFoundError: there is no result in ``run``.
        ValueError: the run is of a method without a basis.
    """
    method = read_tuned(run)["method"]
    if method not in CORE_METHODS:
        raise ValueError(
            f"run: the method of {run} must be {' or '.join(CORE_METHODS)}, which have a basis, got {method!r}"
        )
    basis = read_basis(tuned_folder(run) / BASIS)
    save_authors(path, {name: basis[name] for name in target_modules(basis, "aggregator")})
    return path
