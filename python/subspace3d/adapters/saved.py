"""The adapter of a tuned result put back on its backbone: PEFT is given a configuration made here, never the file's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from torch import nn
from typing_extensions import TypedDict

from subspace3d.adapters.placement import SUBSPACE_SCALE, match_names
from subspace3d.choices import CORE_METHODS
from subspace3d.files import check_values, load_tensors, read_json
from subspace3d.formats.adapter import CONFIG_NAME, WEIGHTS_NAME, module_values
from subspace3d.schema import Positive, PositiveInt, Rule, check

_LARGEST_RANK = 1 << 16
_Rank = Annotated[PositiveInt, Rule(f"an integer of 1 to {_LARGEST_RANK}", lambda value: value <= _LARGEST_RANK)]
_ADALORA_NUMBERS = ("target_r", "init_r", "lora_alpha", "total_step", "tinit", "tfinal", "deltaT")
_Modules = str | list[str]
# what PEFT writes beside the settings, and what says nothing about the model
_FREE = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type")


class _Lora(TypedDict):
    peft_type: Literal["LORA"]
    r: _Rank
    lora_alpha: Positive
    target_modules: _Modules
    rank_pattern: NotRequired[dict[str, _Rank] | None]
    alpha_pattern: NotRequired[dict[str, Positive] | None]


class _AdaLora(TypedDict):
    peft_type: Literal["ADALORA"]
    r: NotRequired[Any]
    target_r: _Rank
    init_r: _Rank
    lora_alpha: Positive
    target_modules: _Modules
    total_step: PositiveInt
    tinit: int
    tfinal: int
    deltaT: PositiveInt
    rank_pattern: NotRequired[dict[str, list[bool]] | None]


class _Subspace(TypedDict):
    peft_type: Literal["SUBSPACE"]
    basis: str
    basis_sha256: str
    r: _Rank
    lora_alpha: Positive
    lora_modules: NotRequired[_Modules | None]
    target_modules: NotRequired[_Modules | None]
    scale: Positive
    plan: str


def attach_adapter(model: nn.Module, folder: Path, method: str, basis: Path) -> nn.Module:
    """A PeftModel around ``model`` with the adapter that `training.tuned.save_trained` wrote into ``folder``.

    Nothing is asked of the network. The scaling must be the method's: alpha = 2 r (pissa: r), s = 2.

    Args:
        model (nn.Module): the backbone, untouched.
        folder (Path): adapter_config.json and adapter_model.safetensors.
        method (str): lora, pissa, adalora, psv or subspace.
        basis (Path): file of the frozen basis, psv and subspace only.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the configuration is not one of this method, has a setting that it never has, or the tensors are
            not those of the model; names file and setting.
    """
    from peft import PeftModel, set_peft_model_state_dict

    path = folder / CONFIG_NAME
    stored = check(read_json(path), dict[str, Any], path)
    tensors, _ = load_tensors(folder / WEIGHTS_NAME)
    for name, tensor in tensors.items():
        check_values(folder / WEIGHTS_NAME, name, tensor)
    if method in CORE_METHODS:
        config = _subspace_config(path, stored, model, basis)
    else:
        config = _adalora_config(path, stored, model) if method == "adalora" else _lora_config(path, stored, model)
    _refuse_others(path, stored, config)
    _check_scaling(path, stored, method)
    config.inference_mode = True
    try:
        tuned = PeftModel(model, config)
        result: Any = set_peft_model_state_dict(tuned, tensors)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:  # shapes, names, rank patterns
        raise ValueError(f"{folder} does not hold an adapter for the backbone: {error}") from error
    missing = [name for name in result.missing_keys if "lora_" in name or name.endswith(".c")]
    if missing or result.unexpected_keys:
        which, names = ("lacks", missing) if missing else ("has the foreign", result.unexpected_keys)
        raise ValueError(f"{folder / WEIGHTS_NAME} {which} {names[0]} and {len(names) - 1} more")
    return tuned


def _names(path: Path, setting: str, wanted: _Modules, model: nn.Module) -> list[str]:
    present = [name for name, _ in model.named_modules() if name]
    if isinstance(wanted, str):
        return match_names(f"{path}: {setting}", wanted, present)
    unknown = sorted(set(wanted) - set(present))
    if unknown or not wanted:
        raise ValueError(f"{path}: {setting} must be modules of the backbone, got {unknown[0] if unknown else ''!r}")
    return wanted


def _expression(names: list[str]) -> str:
    return "|".join(map(re.escape, names))


def _lora_config(path: Path, stored: dict[str, Any], model: nn.Module) -> Any:
    from peft import LoraConfig

    config = check(stored, _Lora, path)
    names = _names(path, "target_modules", config["target_modules"], model)
    ranks = module_values(f"{path}: rank_pattern", config.get("rank_pattern") or {}, names)
    alphas = module_values(f"{path}: alpha_pattern", config.get("alpha_pattern") or {}, names)
    return LoraConfig(
        r=config["r"],
        lora_alpha=config["lora_alpha"],  # type: ignore[arg-type]
        target_modules=_expression(names),
        rank_pattern={f"^{re.escape(name)}": int(value) for name, value in ranks.items()},
        alpha_pattern={f"^{re.escape(name)}": value for name, value in alphas.items()},
    )


def _adalora_config(path: Path, stored: dict[str, Any], model: nn.Module) -> Any:
    from peft import AdaLoraConfig

    config = check(stored, _AdaLora, path)
    pattern = config.get("rank_pattern")
    for name, kept in (pattern or {}).items():
        if len(kept) != config["init_r"]:
            raise ValueError(f"{path}: rank_pattern must hold lists of {config['init_r']}, {name:.80} has {len(kept)}")
    settings: dict[str, Any] = {key: config[key] for key in _ADALORA_NUMBERS}  # type: ignore[literal-required]
    names = _names(path, "target_modules", config["target_modules"], model)
    return AdaLoraConfig(target_modules=_expression(names), rank_pattern=pattern, **settings)


def _subspace_config(path: Path, stored: dict[str, Any], model: nn.Module, basis: Path) -> Any:
    from subspace3d.adapters.peft.tuner import SubspaceConfig
    from subspace3d.formats.basis import load_basis

    config = check(stored, _Subspace, path)
    modules = load_basis(basis)
    cores, loras = config.get("target_modules"), config.get("lora_modules")
    if isinstance(cores, str):
        cores = match_names(f"{path}: target_modules", cores, modules)
    return SubspaceConfig(
        basis=str(basis),
        basis_sha256=config["basis_sha256"],
        target_modules=cores,
        lora_modules=None if loras is None else _names(path, "lora_modules", loras, model),
        scale=config["scale"],
        plan=config["plan"],
        r=config["r"],
        lora_alpha=config["lora_alpha"],
    )


def _refuse_others(path: Path, stored: Mapping[str, Any], config: Any) -> None:
    """Settings that are not among those taken over must be off, or as they are by default."""
    usual = config.to_dict()
    taken = {"basis", "peft_type", "r", "lora_alpha", "target_modules", "lora_modules", "rank_pattern", "alpha_pattern"}
    for name, value in stored.items():
        if name in taken or name in _FREE or not value or value == usual.get(name):
            continue
        raise ValueError(f"{path}: {name} must be {usual.get(name)!r} or off, got {value!r:.80}")


def _check_scaling(path: Path, stored: Mapping[str, Any], method: str) -> None:
    rank, factor = stored["target_r"] if method == "adalora" else stored["r"], 1 if method == "pissa" else 2
    if stored["lora_alpha"] != factor * rank:
        raise ValueError(f"{path}: lora_alpha must be {factor * rank} for {method}, got {stored['lora_alpha']!r}")
    if method in CORE_METHODS and stored["scale"] != SUBSPACE_SCALE:
        raise ValueError(f"{path}: scale must be {SUBSPACE_SCALE}, got {stored['scale']!r}")
    patterns = stored.get("rank_pattern") or {}, stored.get("alpha_pattern") or {}
    if method == "pissa" and patterns[0] != patterns[1]:
        raise ValueError(f"{path}: alpha_pattern must be the rank_pattern for pissa")
    if method == "lora" and (patterns[0] or patterns[1]):
        raise ValueError(f"{path}: rank_pattern and alpha_pattern must be empty for lora")
