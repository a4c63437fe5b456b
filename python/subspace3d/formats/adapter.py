"""LoRA adapter folders as stock PEFT has them: adapter_config.json and adapter_model.safetensors.

They are read from JSON and safetensors alone, without PEFT.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from subspace3d import files, outputs
from subspace3d.backbones.targets import PRESETS, target_regex

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Module name -> (``lora_b [out, r]``, ``lora_a [r, in]``) with ``delta W = lora_b lora_a``, scaling included."""

Source = Literal["tuned", "gradient"]
"""What an update is: the result of training, or the gradient at the base weights (`training.gradient_adapter`)."""

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLE_NAME = "adapter_model.bin"

PEFT_PREFIX = "base_model.model."
_FACTOR_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

# These initialisations subtract something from the base weight, so B A alone is not the change of the model.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Variants of LoRA whose change of the layer is not the constant matrix scaling * B A.
_VARIANT_SETTINGS = ("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "target_parameters")

_LONGEST_KEY = 500
_MOST_REPETITIONS = 3


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter: ``delta[module] = lora_b @ lora_a``, the scaling already inside ``lora_b``.

    Attributes:
        path: the folder it was read from.
        base_model: ``base_model_name_or_path`` of its configuration; None when that is missing or empty.
        modules: module name without PEFT's prefix -> (lora_b ``[out, r]``, lora_a ``[r, in]``), float32, or float64
            where stored so. A Conv2d is unrolled: ``in = Cin * kh * kw``.
        ignored: keys of the file that are no part of a LoRA pair: modules_to_save, biases, embeddings.
        source: gradient where the header of the weights says so (`write_lora`), else tuned.
    """

    path: Path
    base_model: str | None
    modules: dict[str, tuple[torch.Tensor, torch.Tensor]]
    ignored: tuple[str, ...]
    source: Source = "tuned"


def find_adapters(root: Path) -> list[Path]:
    """Every folder at or below ``root`` that holds a PEFT adapter, sorted by path; hidden folders are left out.

    Raises:
        FileNotFoundError: ``root`` is not a folder, or no adapter is below it.
        ValueError: a folder has an adapter configuration but no safetensors weights.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"adapters: no such folder: {root}")
    folders = []
    for config in sorted(root.rglob(CONFIG_NAME)):
        folder = config.parent
        # the temporary folder of a stage that was cut off has a hidden name
        if any(part.startswith(".") for part in folder.relative_to(root).parts):
            continue
        if not (folder / WEIGHTS_NAME).is_file():
            found = f"only {_PICKLE_NAME}" if (folder / _PICKLE_NAME).is_file() else "no weights"
            raise ValueError(f"{folder} has {CONFIG_NAME} but {found}: only {WEIGHTS_NAME} is read, never a pickle")
        folders.append(folder)
    if not folders:
        raise FileNotFoundError(f"no adapter ({CONFIG_NAME} and {WEIGHTS_NAME}) at or below {root}")
    return folders


def read_adapter(folder: Path) -> Adapter:
    """Read one adapter folder and apply its scaling, ``lora_alpha / r`` or ``lora_alpha / sqrt(r)`` (rslora).

    Raises:
        FileNotFoundError: configuration or weights are missing.
        ValueError: not a plain LoRA, base weights changed by its initialisation, a factor missing, of the wrong shape
            or not finite, or a truncated file; the message names file and tensor.
    """
    folder = Path(folder)
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    config = files.read_json(config_path)
    _check_config(config_path, config)
    tensors, header = files.load_tensors(weights_path)
    source = header.get("source", "tuned")
    if source not in ("tuned", "gradient"):
        raise ValueError(f"{weights_path}: source must be tuned or gradient, got {str(source)[:80]!r}")

    pairs: dict[str, dict[str, torch.Tensor]] = {}
    ignored = []
    for key, tensor in tensors.items():
        if "lora_magnitude_vector" in key:
            raise ValueError(f"{weights_path}: {key} belongs to DoRA, which is not a plain low-rank update")
        match = _FACTOR_KEY.fullmatch(key.removeprefix(PEFT_PREFIX))
        if match is None:
            ignored.append(key)
            continue
        files.check_values(weights_path, key, tensor)
        if tensor.ndim < 2 or not tensor.numel():
            raise ValueError(f"{weights_path}: {key} must be a matrix or a convolution, got {list(tensor.shape)}")
        pairs.setdefault(match["module"], {})[match["side"]] = tensor
    if not pairs:
        raise ValueError(f"{weights_path}: holds no lora_A and lora_B weights")

    modules = {name: _factors(weights_path, name, pairs[name], config) for name in sorted(pairs)}
    return Adapter(folder, config.get("base_model_name_or_path") or None, modules, tuple(sorted(ignored)), source)


def _check_config(path: Path, config: Any) -> None:
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type must be LORA, got {config.get('peft_type')!r}")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise ValueError(
            f"{path}: init_lora_weights is {init!r}, which also changes the base weights, so the adapter alone is not "
            "the update. Convert it first: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    for name in _VARIANT_SETTINGS:
        if config.get(name):
            raise ValueError(f"{path}: {name} must be off, got {config[name]!r}: not a plain low-rank update")
    for name in ("r", "lora_alpha"):
        if not _is_positive(config.get(name)):
            raise ValueError(f"{path}: {name} must be a positive number, got {config.get(name)!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        _check_pattern(f"{path}: {name}", config.get(name) or {})
    if not isinstance(config.get("base_model_name_or_path") or "", str):
        raise ValueError(f"{path}: base_model_name_or_path must be text, got {config['base_model_name_or_path']!r}")


def _is_positive(value: object) -> bool:
    """True of a number that is positive, finite and no more than a float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _check_pattern(what: str, pattern: object) -> None:
    """Values must be numbers; keys regular expressions that cannot take forever on a module's name."""
    if not isinstance(pattern, dict):
        raise ValueError(f"{what} must be an object, got {type(pattern).__name__}")
    for key, value in pattern.items():
        if not _is_positive(value):
            raise ValueError(f"{what} must hold positive numbers, got {value!r} for {key[:80]!r}")
        # a repeated group with a repetition inside is what takes exponential time, many repetitions polynomial time
        if len(key) > _LONGEST_KEY or re.search(r"\)[*+{]", key) or len(re.findall(r"[*+{]", key)) > _MOST_REPETITIONS:
            raise ValueError(
                f"{what}: a key must have at most {_LONGEST_KEY} characters and {_MOST_REPETITIONS} repetitions, none "
                f"of a group, got {key[:80]!r}"
            )
        try:
            re.compile(key)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{what}: {key[:80]!r} is no regular expression: {error}") from error


def _factors(
    path: Path, name: str, pair: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    for side in "AB":
        if side not in pair:
            raise ValueError(f"{path}: {name} has no lora_{side}.weight")
    rank = _pattern_value(config.get("rank_pattern") or {}, name, config["r"])
    alpha = _pattern_value(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    lora_a, lora_b = pair["A"].flatten(1), pair["B"].flatten(1)
    # a grouped convolution has fewer columns in lora_B than rows in lora_A; its update is no product of the two
    if lora_a.shape[0] != rank or lora_b.shape[1] != rank:
        raise ValueError(
            f"{path}: {name} has lora_A {tuple(pair['A'].shape)} and lora_B {tuple(pair['B'].shape)}, "
            f"which do not fit the rank {rank} of {CONFIG_NAME}"
        )
    scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return _widen(lora_b) * scaling, _widen(lora_a)


def _pattern_value(pattern: Mapping[str, float], name: str, default: float) -> float:
    """Value of the first key that, read as a regular expression, matches ``name`` or a dotted suffix of it."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def write_lora(
    folder: Path,
    factors: Factors,
    model: nn.Module,
    base_model: str | None = None,
    header: Mapping[str, Any] | None = None,
) -> Path:
    """Write one LoRA folder: alpha = r for every module, so that PEFT's scaling is exactly one.

    Modules of another rank than the most common one stand in rank_pattern and alpha_pattern.

    Args:
        folder (Path): folder to write, whole or not at all.
        factors (dict): see `Factors`; a module's rank may be its own.
        model (nn.Module): the model they belong to, plain or adapted; it gives the kernels of convolutions.
        base_model (str | None): identity of its weights, for base_model_name_or_path.
        header (Mapping | None): JSON values for the header of the weights, which PEFT does not read; ``source`` among
            them says what the update is.

    Raises:
        ValueError: no factors; or a convolution that PEFT's LoRA cannot represent (dilation, groups, padding mode).
    """
    folder = outputs.claim(folder, outputs.EXPORTED, "folder")
    with files.atomic_folder(folder) as temporary:
        fill_lora(temporary, factors, model, base_model, header)
    return folder


def fill_lora(
    folder: Path,
    factors: Factors,
    model: nn.Module,
    base_model: str | None = None,
    header: Mapping[str, Any] | None = None,
) -> None:
    """Write the two files of `write_lora` into a folder that is there, for a caller that puts more beside them."""
    from peft import LoraConfig

    if not factors:
        raise ValueError("the adapter must change at least one module, got none")
    tensors = {}
    for name, (b, a) in factors.items():
        module = model.get_submodule(name)
        module = getattr(module, "base_layer", module)
        if isinstance(module, nn.Conv2d):
            _check_convolution(name, module)
            a, b = a.reshape(len(a), *module.weight.shape[1:]), b[:, :, None, None]
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = a.float()
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = b.float()
    ranks = {name: len(a) for name, (_, a) in factors.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT reads the keys as expressions that may match a suffix; the anchor makes them match one module alone
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        target_modules=target_expression(factors, model),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
        base_model_name_or_path=base_model,
    )
    config.save_pretrained(str(folder))
    files.save_tensors(folder / WEIGHTS_NAME, tensors, header)


def _check_convolution(name: str, module: nn.Conv2d) -> None:
    for setting, plain in (("dilation", (1, 1)), ("groups", 1), ("padding_mode", "zeros")):
        value = getattr(module, setting)
        if value != plain:
            raise ValueError(
                f"{name} cannot be exported: PEFT's LoRA for Conv2d needs {setting} {plain!r}, the module has {value!r}"
            )


def target_expression(names: Iterable[str], model: nn.Module) -> str:
    """A full-match expression for exactly these modules: a preset's if one fits, else their names."""
    wanted = set(names)
    for preset in PRESETS:
        expression = target_regex(preset)
        if {name for name, _ in model.named_modules() if re.fullmatch(expression, name)} == wanted:
            return expression
    return "|".join(re.escape(name) for name in names)
