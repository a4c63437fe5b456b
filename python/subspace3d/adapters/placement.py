"""Which modules of a model a method puts a core or an adapter on, and how many parameters that trains.

Tuning (`methods`) and counting (`subspace3d params`) both follow `place`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from subspace3d.backbones.find import backbone_of
from subspace3d.backbones.targets import target_modules
from subspace3d.choices import CORE_METHODS, LORA_METHODS, OWN_WEIGHTS
from subspace3d.patterns import compile_pattern

SUBSPACE_SCALE = 2.0
"""s in ``delta W = s U c V^T``: lora_alpha / r of the authors' adapters, whatever K."""


@dataclass(frozen=True)
class Placement:
    """Names of the modules that get a core ``c [K, K]`` and of those that get an adapter of rank r; some get both."""

    cores: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()


def place(model: nn.Module, method: str, targets: str = "all", head_cores: bool = False) -> Placement:
    """Which modules ``method`` changes.

    lora, pissa: adapters on ``targets``. adalora: on the Linears among them. psv, subspace: cores on the modules of the
    backbone's preset ``cores`` (of a VGGT the four Linears of every aggregator block), adapters on those of ``heads``,
    and with ``head_cores`` a core beside the adapter of every head module with both sides at least as wide as the depth
    head's features (45 modules of VGGT-1B).

    Args:
        model (nn.Module): the backbone, untouched; its weights may lie on the meta device.
        method (str): lora, pissa, adalora, psv or subspace.
        targets (str): target preset of the LoRA family, or a regular expression that full module names match.
        head_cores (bool): see above; subspace and psv only.

    Raises:
        ValueError: another method, nothing in ``model`` matches, something that can hold no adapter does, or the
            backbone has no width for ``head_cores``.
    """
    if method in LORA_METHODS:
        names = select_modules(model, targets)
        if method == "adalora":
            names = [name for name in names if isinstance(model.get_submodule(name), nn.Linear)]
        return Placement(adapters=tuple(names))
    if method not in CORE_METHODS:
        raise ValueError(f"method must be one of {', '.join((*LORA_METHODS, *CORE_METHODS))}, got {method!r}")
    cores, heads = target_modules(model, "cores"), target_modules(model, "heads")
    if head_cores:
        backbone = backbone_of(model)
        if backbone.head_width is None:
            raise ValueError(f"head_cores must be off for {backbone.name}: it does not say which head modules are wide")
        width = matrix_shape(model.get_submodule(backbone.head_width))[0]
        cores += [name for name in heads if min(matrix_shape(model.get_submodule(name))) >= width]
    return Placement(tuple(cores), tuple(heads))


def trained_as_is(model: nn.Module, method: str) -> list[str]:
    """Names of the backbone's own parameters that ``method`` trains.

    full: all that the backbone does not keep frozen. bias: of those the biases (of Linears and norms) in the parts that
    hold the modules of the preset ``cores``, so not those of the heads. All other methods train none.

    Raises:
        ValueError: bias, and there is none.
    """
    if method not in OWN_WEIGHTS:
        return []
    backbone = backbone_of(model)
    names = [name for name, _ in model.named_parameters() if not backbone.is_frozen(name)]
    if method == "full":
        return names
    parts = {backbone.part_of(name) for name in target_modules(model, "cores")}
    names = [name for name in names if name.endswith(".bias") and backbone.part_of(name) in parts]
    if not names:
        raise ValueError(f"method bias needs a backbone with biases in {', '.join(sorted(parts))}, found none")
    return names


def select_modules(model: nn.Module, targets: str) -> list[str]:
    """Modules of a target preset, or those whose full names match ``targets`` as a regular expression.

    Raises:
        ValueError: nothing matches; or a match is no Linear and no Conv2d, a Conv2d with groups, or has uses that an
            adapter would not see.
    """
    presets = backbone_of(model).targets
    if targets in presets:
        names = target_modules(model, targets)
    else:
        names = match_names("targets", targets, (name for name, _ in model.named_modules()), presets)
    for name in names:
        check_adaptable("targets", name, model.get_submodule(name))
    check_uses(model, {"targets": names})
    return names


def match_names(argument: str, expression: str, names: Iterable[str], presets: Iterable[str] = ()) -> list[str]:
    """The ``names`` that ``expression`` matches from end to end.

    Raises:
        ValueError: there is none, or the expression is malformed; names ``argument``.
    """
    try:
        pattern = compile_pattern(expression)
    except ValueError as error:
        raise ValueError(f"{argument} must be a regular expression, got {expression[:80]!r}: {error}") from None
    found = [name for name in names if pattern.matches(name)]
    if not found:
        others = ", or be one of " + ", ".join(presets) if presets else ""
        raise ValueError(
            f"{argument} must match at least one full module name{others}; {expression[:80]!r} matches none"
        )
    return found


def check_adaptable(argument: str, name: str, module: nn.Module) -> None:
    """Raise ValueError, naming ``argument``, unless ``module`` is a Linear or a Conv2d without groups."""
    if isinstance(module, nn.ConvTranspose2d):
        raise ValueError(
            f"{argument} must leave out {name}: ConvTranspose2d is not supported, its weight [in, out, kh, kw] does "
            "not unroll to the [out, in] matrix of an update"
        )
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        raise ValueError(f"{argument} must match torch.nn.Linear and Conv2d modules, {name} is a {kind}")
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        raise ValueError(f"{argument} must leave out {name}: a Conv2d with groups={module.groups} is not supported")


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of the weight matrix, which may be stored in another form; a convolution's is [out, in * kh * kw]."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = module.get_parameter("weight")
    return weight.shape[0], weight[0].numel()


def count_parameters(model: nn.Module, method: str, rank: int, K: int = 0, head_cores: bool = False) -> dict[str, int]:
    """Parameters that ``method`` trains in each part of ``model`` that has any, and their total; targets all.

    full: everything that the backbone does not keep frozen. bias: see `trained_as_is`. lora, pissa: ``(in + out) r``
    per adapter. adalora: ``(in + out + 1) r`` with r the target rank. subspace, psv: ``K^2`` per core and
    ``(in + out) r`` per adapter.

    Args:
        model (nn.Module): the backbone, untouched; its weights may lie on the meta device.
        method (str): none, full, bias, lora, pissa, adalora, psv or subspace.
        rank (int): r.
        K (int): side of a core.
        head_cores (bool): see `place`.

    Raises:
        ValueError: see `place`; or K above the smaller side of a module with a core.
    """
    counts: dict[str, int] = {}
    backbone = backbone_of(model)

    def add(name: str, number: int) -> None:
        part = backbone.part_of(name)
        counts[part] = counts.get(part, 0) + number

    if method in OWN_WEIGHTS:
        for name in trained_as_is(model, method):
            add(name, model.get_parameter(name).numel())
    elif method != "none":
        placement = place(model, method, head_cores=head_cores)
        for name in placement.cores:
            smaller = min(matrix_shape(model.get_submodule(name)))
            if smaller < K:
                raise ValueError(f"rank (K) must be at most {smaller}, the smaller side of {name}, got {K}")
            add(name, K**2)
        for name in placement.adapters:
            # AdaLoRA trains a singular value with every pair of vectors
            add(name, (sum(matrix_shape(model.get_submodule(name))) + (1 if method == "adalora" else 0)) * rank)
    return {**counts, "total": sum(counts.values())}


def check_uses(model: nn.Module, chosen: Mapping[str, Iterable[str]]) -> None:
    """Refuse modules of which an adapter would change one use of several, or none.

    Args:
        model (nn.Module): the model, untouched.
        chosen (Mapping): argument, for the message -> names of modules that are to be adapted.

    Raises:
        ValueError: a module has several names in the model, or its parent reads its weight without calling it.
    """
    # a parent with two names holds its child once: replacing the child there reaches every use through either name
    uses: dict[nn.Module, dict[tuple[int, str], str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        parent, _, child = name.rpartition(".")
        uses.setdefault(module, {}).setdefault((id(model.get_submodule(parent)), child), name)
    for argument, wanted in chosen.items():
        for name in wanted:
            module = model.get_submodule(name)
            if len(uses[module]) > 1:
                others = ", ".join(other for other in uses[module].values() if other != name)
                raise ValueError(
                    f"{argument} must leave out {name}: it is one module with {others}, and only one of its uses would "
                    "be adapted"
                )
            parent = model.get_submodule(name.rpartition(".")[0])
            if isinstance(parent, nn.MultiheadAttention):
                raise ValueError(
                    f"{argument} must leave out {name}: torch.nn.MultiheadAttention reads its weight and never calls "
                    "it, so an adapter would have no effect"
                )
