"""The subspace method as a PEFT tuner: `get_peft_model(model, SubspaceConfig(basis="basis.safetensors"))`.

Importing this module registers the tuner, so that `PeftModel.from_pretrained` knows what a saved folder holds.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig
from peft import mapping as peft_mapping
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

import subspace_ext as se
from subspace3d.adapters.basis import check_shapes
from subspace3d.adapters.merging import MAX_ERROR, MergeReport, plan_merge
from subspace3d.adapters.peft.layers import SubspaceLayer
from subspace3d.adapters.peft.release import check_release
from subspace3d.adapters.placement import SUBSPACE_SCALE, check_adaptable, check_uses, match_names
from subspace3d.formats.basis import Basis, basis_digest, check_basis, load_basis
from subspace3d.log import logger
from subspace_ext.core import checked_scale
from subspace_ext.ops.subspace_linear import checked_plan

# before anything below asks PEFT for what older releases lack
check_release(peft.__version__)

PEFT_TYPE = "SUBSPACE"


@dataclass
class SubspaceConfig(PeftConfig):
    """Settings of `SubspaceModel`; adapter_config.json holds them.

    The saved folder holds what was trained and, of the basis, its path and hash. Where the basis lies beside or below
    the folder the path is stored relative to it, so both can be moved together.
    """

    basis: str = ""
    """File of the combined basis: `save_basis`, or the authors' .A/.B layout. Used as it is."""
    basis_sha256: str | None = None
    """`basis_digest` of the basis; set when the adapter is made, and checked when it is loaded."""
    target_modules: str | list[str] | None = None
    """Modules that get a core: an expression full names match, or full names; None: every module of the basis."""
    scale: float = SUBSPACE_SCALE
    """s in ``delta W = s U c V^T``."""
    plan: str = "auto"
    """How linears compute it, see `subspace_ext.subspace_linear`: auto, effective or beside."""
    lora_modules: str | list[str] | None = None
    """Modules that get a plain LoRA (beside a core, if both name one), like target_modules; None: none."""
    r: int = 16
    """Rank of the plain LoRA."""
    lora_alpha: float = 32
    """The plain LoRA is scaled by lora_alpha / r."""
    modules_to_save: list[str] | None = None
    """Modules trained in full and saved with the adapter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}")
        checked_plan(self.plan)
        checked_scale(self.scale)
        if not math.isfinite(self.lora_alpha):
            raise ValueError(f"lora_alpha must be finite, got {self.lora_alpha}")
        self._basis: Basis | None = None
        self._resolved: _Resolved | None = None

    @classmethod
    def from_basis(cls, basis: Basis, **settings: Any) -> SubspaceConfig:
        """A configuration for a basis in memory; ``settings`` are the fields. Name the file in ``config.basis`` later.

        A folder saved while ``basis`` is empty can be loaded with ``from_pretrained(folder, basis=path)`` only.
        """
        check_basis("basis", basis)
        config = cls(basis_sha256=basis_digest(basis), **settings)
        config._basis = basis
        return config

    def load_basis(self) -> Basis:
        """The basis, checked against basis_sha256, which is set if it was not.

        Raises:
            FileNotFoundError: the file is not there.
            ValueError: no file is named, it is no basis, or its hash does not fit.
        """
        if self._basis is not None:
            return self._basis
        if not self.basis:
            raise ValueError("basis must name the file of the combined basis, got none")
        if not Path(self.basis).is_file():
            raise FileNotFoundError(
                f"basis: no such file: {self.basis}; name it with SubspaceConfig.from_pretrained(folder, basis=path)"
            )
        basis = load_basis(Path(self.basis))
        digest = basis_digest(basis)
        if self.basis_sha256 not in (None, digest):
            raise ValueError(
                f"basis {self.basis} must have the hash {str(self.basis_sha256)[:12]}... with which this adapter was "
                f"trained, got {digest[:12]}..."
            )
        self.basis_sha256 = digest
        return basis

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT does, with the path of the basis made relative where it lies beside or below the folder."""
        path = self.basis
        if path:
            absolute, folder = Path(path).resolve(), Path(save_directory).resolve()
            near = absolute.is_relative_to(folder.parent)
            self.basis = os.path.relpath(absolute, folder) if near else str(absolute)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.basis = path

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, basis: str | None = None, **kwargs: Any
    ) -> SubspaceConfig:
        """As PEFT does; ``basis`` replaces the stored path, not the stored hash."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if basis is not None:
            config.basis = str(basis)
        elif config.basis and not Path(config.basis).is_absolute():
            folder = Path(pretrained_model_name_or_path, subfolder or "")
            config.basis = str((folder / config.basis).resolve())
        return config


@dataclass
class _Resolved:
    basis: Basis
    cores: frozenset[str]
    loras: frozenset[str]


class SubspaceModel(BaseTuner):
    """y = x w^T + bias + s ((x V) c^T) U^T on the modules of a basis, plain LoRA on others; ``c`` and LoRA are trained.

    Args and methods are those of PEFT's tuners. Several adapters, each with its own basis, can stand side by side.

    Raises:
        ValueError: a module of the basis is not in the model, has another shape or is no Linear or Conv2d, a pattern
            matches nothing, or the basis does not have the hash in the configuration.
    """

    prefix: str = "subspace_"
    tuner_layer_cls = SubspaceLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's name and type)
    merge_report: MergeReport | None = None

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        # PEFT's own would look up default targets by the model's type
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        basis = peft_config.load_basis()
        adapted = {name for name, module in model.named_modules() if isinstance(module, SubspaceLayer)}
        # what lies inside an adapted module is no module of the user's
        modules: dict[str, nn.Module] = {}
        for name, module in model.named_modules():
            if not any(parent in adapted for parent in _parents(name)):
                modules[name] = module.base_layer if name in adapted else module
        cores = _select("target_modules", peft_config.target_modules, basis)
        missing = [name for name in cores if name not in modules]
        if missing:
            raise ValueError(f"basis: {len(missing)} of its modules are not in the model, e.g. {missing[0]}")
        loras = [] if peft_config.lora_modules is None else _select("lora_modules", peft_config.lora_modules, modules)
        for argument, names in (("target_modules", cores), ("lora_modules", loras)):
            for name in names:
                check_adaptable(argument, name, modules[name])
                _check_not_trained_in_full(argument, name, peft_config.modules_to_save or ())
        check_uses(model, {"target_modules": cores, "lora_modules": loras})
        check_shapes("basis", {name: basis[name] for name in cores}, modules)
        peft_config._resolved = _Resolved(basis, frozenset(cores), frozenset(loras))

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **settings: Any) -> Iterator[None]:
        # PEFT drops these before a layer sees them
        for name in ("adapter_names", "alora_offsets"):
            if settings.get(name) is not None:
                raise ValueError(
                    f"{name} must be left out: all of a batch goes through the active adapters, see set_adapter"
                )
        yield

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put the adapter on its modules; see PEFT."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # the layers hold the basis from now on
        config: Any = self.peft_config[adapter_name]
        config._resolved = None
        # one launch an optimiser step instead of one a layer
        se.group_folds(model)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return key in peft_config._resolved.cores or key in peft_config._resolved.loras

    # with low_cpu_mem_usage, too: the basis is not among the weights that are loaded afterwards
    @peft.utils.integrations.skip_init_on_device
    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        layer = target if isinstance(target, SubspaceLayer) else SubspaceLayer(target)  # type: ignore[arg-type]
        resolved: _Resolved = peft_config._resolved
        if current_key in resolved.cores:
            layer.add_core(adapter_name, *resolved.basis[current_key], peft_config.scale, peft_config.plan)
        if current_key in resolved.loras:
            layer.add_lora(adapter_name, peft_config.r, peft_config.lora_alpha)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        # the basis is referred to by path and hash, never copied
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return {key: value for key, value in selected.items() if not key.endswith(_basis_suffixes(adapter_name))}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        names: dict[int, list[str]] = {}
        for key, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(key)
        # a parameter that the model has under several names is saved under one of them
        others = {key: same for same in names.values() if len(same) > 1 for key in same}
        for key, value in model.state_dict().items():
            stored = next((other for other in others.get(key, ()) if other in mapped), None)
            if key not in mapped and stored is not None:
                mapped[key] = mapped[stored]
            if key.endswith(_basis_suffixes(adapter_name)):
                # already in place; named here so that PEFT does not report it as missing
                mapped[key] = value
            if not key.endswith(_saved_suffixes(adapter_name)):
                continue
            if key not in mapped:
                raise ValueError(f"the saved adapter must hold {key}, which is missing")
            if mapped[key].shape != value.shape:
                raise ValueError(f"{key} must have shape {list(value.shape)}, got {list(mapped[key].shape)}")
        return mapped

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, max_error: float = MAX_ERROR
    ) -> None:
        """Merge as PEFT does, in float32; refused where rounding to the weights' type would lose the update.

        Args:
            adapter_names (list[str] | None): adapters to merge; none: the active ones.
            safe_merge (bool): PEFT's; weights that are not finite are refused in either case.
            max_error (float): largest share of the update, in Frobenius norm over all modules, that rounding may lose.

        Raises:
            ValueError: more than that would be lost, or a merged weight would not be finite. Nothing is merged then.
        """
        self._plan_merge(adapter_names, max_error)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        max_error: float = MAX_ERROR,
    ) -> nn.Module:
        """The plain model with the adapters merged as by `merge_adapter`; prints the error of the applied update."""
        self._plan_merge(adapter_names, max_error)
        logger.info(self.merge_report)
        return super().merge_and_unload(progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)

    def _plan_merge(self, adapter_names: list[str] | None, max_error: float) -> None:
        names = self.active_adapters if adapter_names is None else adapter_names
        layers = {key: module for key, module in self.model.named_modules() if isinstance(module, SubspaceLayer)}
        for key, layer in layers.items():
            layer.check_mergeable(key, names)
        self.merge_report = plan_merge(layers, names, max_error)


def _parents(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def _check_not_trained_in_full(argument: str, name: str, saved: Iterable[str]) -> None:
    """PEFT trains a copy of every module whose name ends with one of ``saved``, cores inside included or lost."""
    for above in (*_parents(name), name):
        if any(above.endswith(each) for each in saved):
            raise ValueError(
                f"{argument} must leave out {name}: modules_to_save trains {above} in full, beside which no core or "
                "LoRA has a place"
            )


def _saved_suffixes(adapter: str) -> tuple[str, ...]:
    return f".subspace_core.{adapter}.c", f".lora_A.{adapter}.weight", f".lora_B.{adapter}.weight"


def _basis_suffixes(adapter: str) -> tuple[str, ...]:
    return f".subspace_core.{adapter}.U", f".subspace_core.{adapter}.V"


def _select(argument: str, wanted: str | Iterable[str] | None, names: Iterable[str]) -> list[str]:
    names = [name for name in names if name]
    if wanted is None:
        return names
    if isinstance(wanted, str):
        return match_names(argument, wanted, names)
    wanted = list(wanted)
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        raise ValueError(f"{argument} must be full module names, got {unknown[0] if unknown else ''!r}")
    return wanted


peft_mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SubspaceConfig  # type: ignore[index]
peft_mapping.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = SubspaceModel  # type: ignore[index]
peft_mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = SubspaceModel.prefix  # type: ignore[index]
