"""The result of a fine-tuning run in formats that other software loads."""

from __future__ import annotations

from pathlib import Path

from subspace3d import outputs
from subspace3d.adapters.low_rank import adapter_factors
from subspace3d.backbones.model_card import write_card
from subspace3d.backbones.record import BackboneRecord
from subspace3d.choices import CORE_METHODS, OWN_WEIGHTS
from subspace3d.files import atomic_folder
from subspace3d.formats.adapter import fill_lora
from subspace3d.formats.basis import authors_stem, load_basis, save_authors
from subspace3d.formats.run import BASIS, read_tuned, tuned_folder
from subspace3d.training.tuned import base_of, load_tuned


def export_lora(run: Path, folder: Path, backbone: str = "") -> Path:
    """Write a run's adapter as one plain PEFT LoRA for the backbone's own weights.

    Exact: stock PEFT loads it on a fresh backbone and gives the same outputs up to rounding. psv, subspace:
    ``lora_B = s U c``, ``lora_A = V^T``, alpha = r = K, with the heads' LoRA in the same folder at its own rank; see
    `adapter_factors` for the other methods.

    Args:
        run (Path): run folder.
        folder (Path): adapter folder to write.
        backbone (str): see `load_tuned`.

    Raises:
        FileNotFoundError: there is no result in ``run``, or the backbone's weights are missing.
        ValueError: the run trained no adapter.
    """
    record = read_tuned(run)
    if record["method"] in ("none", *OWN_WEIGHTS):
        raise ValueError(f"run: the method of {run} must train an adapter, {record['method']!r} does not")
    model = load_tuned(run, backbone=backbone)
    origin = BackboneRecord(**record["backbone"])
    folder = outputs.claim(folder, outputs.EXPORTED, "folder")
    with atomic_folder(folder) as temporary:
        fill_lora(temporary, adapter_factors(model), base_of(model), origin.identity)
        write_card(temporary, origin.identity, origin.licence)
    return folder


def export_authors(run: Path, path: Path) -> Path:
    """Write the basis of a psv or subspace run in the layout of the authors' release, which their code loads.

    Bases of head modules have no key in it and are left out; the basis alone is written, the cores are not.

    Raises:
        FileNotFoundError: there is no result in ``run``.
        ValueError: the run is of a method without a basis, or of a backbone that the layout has no keys for.
    """
    method = read_tuned(run)["method"]
    if method not in CORE_METHODS:
        raise ValueError(
            f"run: the method of {run} must be {' or '.join(CORE_METHODS)}, which have a basis, got {method!r}"
        )
    basis = load_basis(tuned_folder(run) / BASIS)
    kept = {name: pair for name, pair in basis.items() if authors_stem(name) is not None}
    if not kept:
        raise ValueError(
            "run: the authors' layout has keys for VGGT's aggregator and Pi3's decoder, "
            f"the basis of {run} has neither, but {next(iter(basis))}"
        )
    save_authors(path, kept)
    return path
