"""Put a tuning method on a backbone: what it adds, and what is trained afterwards."""

from __future__ import annotations

from typing import Any

from torch import nn

import subspace_ext as se
from subspace3d.adapters.basis import Basis
from subspace3d.backbones.targets import target_regex
from subspace3d.configs import Method

SUBSPACE_SCALE = 2.0
_ENCODER = "aggregator.patch_embed."


def apply_method(
    model: nn.Module,
    method: Method,
    rank: int = 16,
    targets: str = "all",
    basis: Basis | None = None,
    base_model: str | None = None,
) -> nn.Module:
    """Freeze ``model`` and make trainable what ``method`` trains, in place.

    none: nothing. full: all but the image encoder. lora: ``y += 2 B A x`` on the modules of the preset ``targets``
    (stock PEFT, alpha = 2 r). subspace: ``y += 2 U c V^T x`` with ``c`` starting at zero on the linears in ``basis``,
    plain LoRA on both heads.

    Args:
        model (nn.Module): a VGGT.
        method (str): none, full, lora or subspace.
        rank (int): LoRA rank r.
        targets (str): target preset of lora.
        basis (dict | None): module name -> (``U [out, K]``, ``V [in, K]``), method subspace only.
        base_model (str | None): identity of the weights, kept in PEFT's adapter configuration.

    Returns:
        nn.Module: the model to train and to call: for lora and subspace a PeftModel around ``model``.

    Raises:
        ValueError: unknown method, no or a wrong basis, nothing matches ``targets``, a rank below one.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if method == "none":
        return model
    if method == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(_ENCODER))
        return model
    if method == "lora":
        return add_lora(model, rank, targets, base_model)
    if method == "subspace":
        if not basis:
            raise ValueError("subspaces must be given for the method subspace, got none")
        add_cores(model, basis)
        tuned = add_lora(model, rank, "heads", base_model)
        # PEFT freezes whatever is not its own
        for module in model.modules():
            if isinstance(module, se.SubspaceLinear):
                module.c.requires_grad_(True)
        return tuned
    raise ValueError(f"method must be none, full, lora or subspace, got {method!r}")


def add_lora(model: nn.Module, rank: int, targets: str, base_model: str | None = None) -> nn.Module:
    """Wrap ``model`` in a stock PEFT LoRA: alpha = 2 r, no dropout, no bias."""
    from peft import get_peft_model

    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    # PEFT copies this entry into adapter_config.json
    model.__dict__["name_or_path"] = base_model
    return get_peft_model(model, lora_config(rank, targets, base_model))


def lora_config(rank: int, targets: str, base_model: str | None = None) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=target_regex(targets),
        lora_dropout=0.0,
        bias="none",
        base_model_name_or_path=base_model,
    )


def add_cores(model: nn.Module, basis: Basis, scale: float = SUBSPACE_SCALE) -> None:
    """Replace every linear in ``basis`` by a `SubspaceLinear` that shares its weight.

    Raises:
        ValueError: a module of the basis is missing in the model, is no Linear, or has another shape.
    """
    for name, (u, v) in basis.items():
        parent_name, _, child = name.rpartition(".")
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"basis: module {name} is not in the model") from None
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"basis: module {name} must be a Linear, got {type(linear).__name__}")
        if (u.shape[0], v.shape[0]) != tuple(linear.weight.shape):
            raise ValueError(
                f"basis: {name} must have U [{linear.out_features}, K] and V [{linear.in_features}, K], "
                f"got {list(u.shape)} and {list(v.shape)}"
            )
        device = linear.weight.device
        core = se.SubspaceLinear.from_linear(linear, u.to(device), v.to(device), scale)
        setattr(model.get_submodule(parent_name), child, core)


def cores(model: nn.Module) -> dict[str, se.SubspaceLinear]:
    """Every `SubspaceLinear` of ``model`` by its name in the backbone, PEFT's prefix removed."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module
        for name, module in model.named_modules()
        if isinstance(module, se.SubspaceLinear)
    }
