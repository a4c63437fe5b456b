"""LoRA adapter folders as stock PEFT has them: adapter_config.json and adapter_model.safetensors.

They are read from JSON and safetensors alone, without PEFT.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NotRequired

import torch
from torch import nn
from typing_extensions import TypedDict

from subspace3d import files, outputs
from subspace3d.backbones.find import backbone_of
from subspace3d.patterns import compile_pattern
from subspace3d.schema import Positive, PositiveInt, check

Pair = tuple[torch.Tensor, torch.Tensor]
Factors = dict[str, Pair]
"""Module name -> (``lora_b [out, r]``, ``lora_a [r, in]``) with ``delta W = lora_b lora_a``, scaling included."""

Source = Literal["tuned", "gradient"]
"""What an update is: the result of training, or the gradient at the base weights (`training.gradient_adapter`)."""

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

PEFT_PREFIX = "base_model.model."
_FACTOR_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<part>A\.0|A|B\.0|B\.1|B)\.weight")
_PAIR, _CORE = {"A", "B"}, {"A.0", "B.0", "B.1"}
_WRAPPERS = ("_orig_mod.", "module.")  # torch.compile's, DataParallel's

# These initialisations subtract something from the base weight, so B A alone is not the change of the model.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Settings of PEFT's LoRA that leave the change of a layer at scaling * B A, or that are read here. Whatever else is on
# is a variant of LoRA.
_KNOWN_SETTINGS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "trainable_token_indices", "use_rslora",
})  # fmt: skip
# Of the authors' PEFT: where the frozen bases came from. The first two ask for cores; the last has a default.
_ASK_FOR_CORES = ("apply_svd_lora", "use_predefined_space")
_AUTHORS_SETTINGS = frozenset({*_ASK_FOR_CORES, "pattern_svd_lora"})


class _Config(TypedDict):
    peft_type: str
    r: PositiveInt
    lora_alpha: Positive
    rank_pattern: NotRequired[dict[str, PositiveInt] | None]
    alpha_pattern: NotRequired[dict[str, Positive] | None]
    use_rslora: NotRequired[bool | None]
    init_lora_weights: NotRequired[bool | str | None]
    base_model_name_or_path: NotRequired[str | None]
    apply_svd_lora: NotRequired[bool | None]
    use_predefined_space: NotRequired[str | None]


@dataclass(frozen=True)
class Core:
    """Frozen bases and the trained core of one module: ``delta = scale * u c v^T``.

    Attributes:
        u: ``[out, K]``, c: ``[K, K]``, v: ``[in, K]``, as stored.
        scale: ``lora_alpha / r`` of the configuration, ``/ sqrt(r)`` with rslora, whatever K.
    """

    u: torch.Tensor
    c: torch.Tensor
    v: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter: ``delta[module] = lora_b @ lora_a``, the scaling already inside ``lora_b``.

    Attributes:
        path: the folder it was read from.
        base_model: ``base_model_name_or_path`` of its configuration; None when that is missing or empty.
        modules: module name without PEFT's prefix -> (lora_b ``[out, r]``, lora_a ``[r, in]``), float32, or float64
            where stored so. A Conv2d is unrolled: ``in = Cin * kh * kw``. Those of `read_adapter` stay in the file, and
            each is read when it is asked for.
        ignored: keys of the file that are no part of a LoRA pair: modules_to_save, biases, embeddings.
        unwrapped: prefixes of wrappers that were taken off the names: ``_orig_mod.``, ``module.``.
        source: gradient where the header of the weights says so (`fill_lora`), else tuned.
        cores: of the modules that the method's authors' code trained in a basis; their products are in ``modules`` too.
    """

    path: Path
    base_model: str | None
    modules: Mapping[str, Pair]
    ignored: tuple[str, ...]
    unwrapped: tuple[str, ...] = ()
    source: Source = "tuned"
    cores: Mapping[str, Core] = field(default_factory=dict)


@dataclass(frozen=True)
class _Stored:
    """Where the factors of one module stand in the file, and what they are multiplied with."""

    keys: Mapping[str, str]
    rank: int
    scaling: float


class StoredFactors(Mapping[str, Pair]):
    """Module -> its factors, read from the file each time they are asked for, so that many adapters need no memory.

    Raises:
        ValueError: when asked for a module, if the file has been written anew since it was checked.
    """

    def __init__(self, path: Path, modules: Mapping[str, _Stored]) -> None:
        self._path, self._modules = path, modules
        self._state = files.state(path)

    def __getitem__(self, name: str) -> Pair:
        stored = self._modules[name]
        if files.state(self._path) != self._state:
            raise ValueError(f"{self._path} must stay as it is while it is used: it was written anew")
        return _factors(self._path, name, files.load_some(self._path, stored.keys), stored)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


def is_core_key(key: str) -> bool:
    """Whether a tensor of this name in an adapter's file is the core of a module."""
    return key.endswith(".lora_B.0.weight")


def read_adapter(folder: Path) -> Adapter:
    """Read one adapter folder and apply its scaling, ``lora_alpha / r`` or ``lora_alpha / sqrt(r)`` (rslora).

    A module may also have the frozen bases and the core of the method's authors, who store ``lora_A.0 = V^T [K, in]``,
    ``lora_B.0 = c [K, K]`` and ``lora_B.1 = U [out, K]``: its update is ``lora_alpha / r * U c V^T``, whatever K.

    Raises:
        FileNotFoundError: configuration or weights are missing.
        ValueError: not a plain LoRA, base weights changed by its initialisation, a factor missing, of the wrong shape
            or not finite, or a truncated file; the message names file and tensor.
    """
    folder = Path(folder)
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    config = _read_config(config_path)
    tensors, header = files.load_tensors(weights_path)
    source = header.get("source", "tuned")
    if source not in ("tuned", "gradient"):
        raise ValueError(f"{weights_path}: source must be tuned or gradient, got {str(source)[:80]!r}")
    names, unwrapped = _unwrap(tensors)

    found: dict[str, dict[str, str]] = {}
    ignored = []
    for key, name in names.items():
        match = _FACTOR_KEY.fullmatch(name)
        if match is None:
            if "lora_" in name:
                raise ValueError(f"{weights_path}: {key} is none of lora_A.weight and lora_B.weight: {_foreign(name)}")
            ignored.append(key)
            continue
        files.check_values(weights_path, key, tensors[key])
        if tensors[key].ndim < 2 or not tensors[key].numel():
            raise ValueError(f"{weights_path}: {key} must be a matrix or a convolution, got {list(tensors[key].shape)}")
        parts = found.setdefault(match["module"], {})
        if match["part"] in parts:
            raise ValueError(f"{weights_path}: {key} stands twice once the wrappers' prefixes are taken off")
        parts[match["part"]] = key
    if not found:
        raise ValueError(f"{weights_path}: holds no lora_A and lora_B weights")

    stored = _stored(config_path, found, config)
    cores: dict[str, Core] = {}
    for name, module in stored.items():
        # every module is looked at once here, so that what is read later is known to be sound
        core = _factors(weights_path, name, {part: tensors[key] for part, key in module.keys.items()}, module)[1]
        if core is not None:
            cores[name] = core
    asked = next((name for name in _ASK_FOR_CORES if config.get(name)), None)
    if asked and not cores:
        raise ValueError(f"{config_path}: {asked} is on, but no module of {WEIGHTS_NAME} has a core (lora_B.0)")
    base_model = config.get("base_model_name_or_path") or None
    modules = StoredFactors(weights_path, stored)
    return Adapter(folder, base_model, modules, tuple(sorted(ignored)), unwrapped, source, cores)


def _foreign(name: str) -> str:
    """What a tensor is that belongs to a LoRA but is none of its factors, and what can be done."""
    if "lora_embedding_" in name:
        return "the LoRA of an embedding, which has no input to mine; tune without it (target_modules)"
    if "lora_magnitude_vector" in name:
        return "DoRA's magnitudes, with which the update is no product of two factors; tune without use_dora"
    if re.search(r"\.lora_[AB]\.[^.\d][^.]*\.weight$", name):
        return "a state_dict with the adapter's own name in it; write the folder with save_pretrained"
    if re.search(r"\.lora_(down|up|linear_layer)\b", name):
        return "another library's names; load it with PEFT and write the folder with save_pretrained"
    return "DoRA or another variant"


def _unwrap(keys: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Key -> name without PEFT's prefix and those of wrappers; and which wrappers there were.

    ``module.`` is one only where every key has it, since a module may be called so.
    """
    names = {key: key for key in keys}
    found = []
    for wrapper in _WRAPPERS:
        if wrapper == "_orig_mod.":
            plain = {key: re.sub(r"(^|\.)_orig_mod\.", r"\1", name) for key, name in names.items()}
        else:
            plain = {key: re.sub(rf"^({re.escape(PEFT_PREFIX)})?module\.", r"\1", name) for key, name in names.items()}
            if any(plain[key] == name for key, name in names.items()):
                continue
        if plain != names:
            names = plain
            found.append(wrapper)
    return {key: name.removeprefix(PEFT_PREFIX) for key, name in names.items()}, tuple(found)


def _read_config(path: Path) -> _Config:
    stored = check(files.read_json(path), dict[str, Any], path)
    if stored.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type must be LORA, got {stored.get('peft_type')!r:.80}")
    init = stored.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise ValueError(
            f"{path}: init_lora_weights is {init!r:.80}, which also changes the base weights, so the adapter alone is "
            "not the update. Convert it first: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    for name, value in stored.items():
        if value and name not in _KNOWN_SETTINGS | _AUTHORS_SETTINGS:
            raise ValueError(f"{path}: {name:.80} must be off, got {value!r:.80}: not a plain low-rank update")
    return check(stored, _Config, path)


def deciding(path: Path) -> str:
    """What of a configuration decides, with the weights, which update of which model it is; as text.

    One that cannot be read decides by its bytes: `read_adapter` says what is wrong with it.
    """
    try:
        stored = check(files.read_json(path), dict[str, Any], path)
    except ValueError:
        return files.sha256(path)
    return json.dumps([stored.get(name) or None for name in _Config.__annotations__])


def module_values(what: str, pattern: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Module name -> value of the first key that, read as an expression, matches it or a dotted suffix of it.

    Args:
        what (str): names the pattern in messages.
        pattern (dict): PEFT's rank_pattern or alpha_pattern.
        names (Iterable[str]): modules; one that no key matches has no entry.

    Raises:
        ValueError: a key is no expression that `patterns` reads.
    """
    compiled = []
    for key, value in pattern.items():
        try:
            compiled.append((compile_pattern(key), value))
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
    values = {}
    for name in names if compiled else ():
        found = next((value for key, value in compiled if key.matches_suffix(name)), None)
        if found is not None:
            values[name] = found
    return values


def _stored(config_path: Path, found: Mapping[str, Mapping[str, str]], config: _Config) -> dict[str, _Stored]:
    ranks = module_values(f"{config_path}: rank_pattern", config.get("rank_pattern") or {}, found)
    alphas = module_values(f"{config_path}: alpha_pattern", config.get("alpha_pattern") or {}, found)
    modules = {}
    for name in sorted(found):
        rank, alpha = int(ranks.get(name, config["r"])), alphas.get(name, config["lora_alpha"])
        modules[name] = _Stored(found[name], rank, alpha / (rank**0.5 if config.get("use_rslora") else rank))
    return modules


def _factors(path: Path, name: str, parts: Mapping[str, torch.Tensor], stored: _Stored) -> tuple[Pair, Core | None]:
    """The update of one module, and its core where it has one."""
    core = None
    if set(parts) <= _CORE:
        core = _core(path, name, parts, stored.scaling)
        lora_a = core.v.T
        lora_b = (core.u.double() @ core.c.double()).to(torch.promote_types(core.u.dtype, torch.float32))
    else:
        lora_b, lora_a = _pair_factors(path, name, parts, stored.rank)
    lora_b = _widen(lora_b) * stored.scaling
    if not torch.isfinite(lora_b).all():
        raise ValueError(f"{path}: {name} must be finite once scaled by {stored.scaling:g}")
    return (lora_b, _widen(lora_a)), core


def _pair_factors(
    path: Path, name: str, parts: Mapping[str, torch.Tensor], rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    for side in "AB":
        if side not in parts:
            raise ValueError(f"{path}: {name} has no lora_{side}.weight")
    if set(parts) != _PAIR:
        raise ValueError(f"{path}: {name} has both lora_A.weight and a core, lora_B.0: which of them is meant?")
    lora_a, lora_b = parts["A"].flatten(1), parts["B"].flatten(1)
    # a grouped convolution has fewer columns in lora_B than rows in lora_A; its update is no product of the two
    if lora_a.shape[0] != rank or lora_b.shape[1] != rank:
        raise ValueError(
            f"{path}: {name} has lora_A {tuple(parts['A'].shape)} and lora_B {tuple(parts['B'].shape)}, "
            f"which do not fit the rank {rank} of {CONFIG_NAME}"
        )
    return lora_b, lora_a


def _core(path: Path, name: str, parts: Mapping[str, torch.Tensor], scale: float) -> Core:
    for part in sorted(_CORE):
        if part not in parts:
            raise ValueError(f"{path}: {name} has a core but no lora_{part}.weight")
    v, core, u = (parts[part] for part in ("A.0", "B.0", "B.1"))
    size = v.shape[0]
    if any(part.ndim != 2 for part in (v, core, u)) or tuple(core.shape) != (size, size) or u.shape[1] != size:
        raise ValueError(
            f"{path}: {name} must have lora_A.0 [K, in], lora_B.0 [K, K] and lora_B.1 [out, K], "
            f"got {list(v.shape)}, {list(core.shape)} and {list(u.shape)}"
        )
    return Core(u, core, v.T, scale)


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def write_lora(folder: Path, factors: Factors, model: nn.Module, base_model: str | None = None) -> Path:
    """Write one LoRA folder: alpha = r for every module, so that PEFT's scaling is exactly one.

    Modules of another rank than the most common one stand in rank_pattern and alpha_pattern.

    Args:
        folder (Path): folder to write, whole or not at all.
        factors (dict): see `Factors`; a module's rank may be its own.
        model (nn.Module): the model they belong to, plain or adapted; it gives the kernels of convolutions.
        base_model (str | None): identity of its weights, for base_model_name_or_path.

    Raises:
        ValueError: no factors; or a convolution that PEFT's LoRA cannot represent (dilation, groups, padding mode).
    """
    folder = outputs.claim(folder, outputs.EXPORTED, "folder")
    with files.atomic_folder(folder) as temporary:
        fill_lora(temporary, factors, model, base_model)
    return folder


def fill_lora(
    folder: Path,
    factors: Factors,
    model: nn.Module,
    base_model: str | None = None,
    header: Mapping[str, Any] | None = None,
) -> None:
    """Write the two files of `write_lora` into a folder that is there, for a caller that puts more beside them.

    ``header`` are JSON values for the header of the weights, which PEFT does not read; ``source`` among them says what
    the update is.
    """
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
    for expression in backbone_of(model).targets.values():
        if {name for name, _ in model.named_modules() if re.fullmatch(expression, name)} == wanted:
            return expression
    return "|".join(re.escape(name) for name in names)
