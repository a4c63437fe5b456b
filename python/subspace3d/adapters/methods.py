"""Put a tuning method on a backbone: what it adds, and what is trained afterwards."""

from __future__ import annotations

from typing import Any

from torch import nn

from subspace3d.adapters.adalora import adalora_config
from subspace3d.adapters.pissa import start_pissa
from subspace3d.adapters.placement import place, select_modules, trained_as_is
from subspace3d.backbones.find import backbone_of
from subspace3d.choices import CORE_METHODS, HEADS, METHODS, OWN_WEIGHTS, Heads, Method
from subspace3d.formats.adapter import target_expression
from subspace3d.formats.basis import Basis


def apply_method(
    model: nn.Module,
    method: Method,
    rank: int = 16,
    targets: str = "all",
    basis: Basis | None = None,
    base_model: str | None = None,
    steps: int = 0,
    heads: Heads = "lora",
) -> nn.Module:
    """Freeze ``model`` and make trainable what ``method`` trains, in place.

    none: nothing. full: all that the backbone does not keep frozen. bias: of that the biases outside the heads. lora:
    ``y += 2 B A x`` on ``targets``. pissa: the same, started at the leading singular directions of each weight, which
    leave it. adalora: ``y += 2 r / r_0 B diag(E) A x`` on the Linears among them, the rank given to each module by
    importance (train with `hooks.method_hook`). psv, subspace: ``y += 2 U c V^T x`` with ``c`` starting at zero on the
    modules in ``basis``, plain LoRA on both heads.

    Args:
        model (nn.Module): what a backbone built, or any VGGT with the published module names; for lora, pissa and
            adalora with an expression as ``targets``, and for none and full, any module.
        method (str): one of the above.
        rank (int): LoRA rank r; alpha is 2 r.
        targets (str): target preset of the LoRA family, or a regular expression that full module names match.
        basis (dict | None): module name -> (``U [out, K]``, ``V [in, K]``), psv and subspace only.
        base_model (str | None): identity of the weights, kept in PEFT's adapter configuration.
        steps (int): optimiser steps of the run, adalora only.
        heads (str): psv and subspace: lora, plain LoRA on both heads; frozen, nothing but the cores is trained.

    Returns:
        nn.Module: the model to train and to call: for all but none, full and bias a PeftModel around ``model``.

    Raises:
        ValueError: unknown method, no or a wrong basis, nothing matches ``targets``, a rank below one.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if heads not in HEADS:
        raise ValueError(f"heads must be one of {', '.join(HEADS)}, got {heads!r}")
    if method in CORE_METHODS and not basis:
        raise ValueError(f"subspaces must be given for the method {method}, got none")
    trained = set(trained_as_is(model, method))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    if method in ("none", *OWN_WEIGHTS):
        return model
    if method in CORE_METHODS:
        return _add_cores(model, rank, basis or {}, base_model, heads)
    if method == "adalora":
        linears = place(model, method, targets).adapters
        if not linears:
            raise ValueError(f"targets must match at least one Linear for the method adalora, got {targets!r}")
        # PEFT's allocator would take convolutions too, where the expression matches them
        return _wrap(model, adalora_config(rank, target_expression(linears, model), steps, base_model), base_model)
    tuned = add_lora(model, rank, targets, base_model)
    if method == "pissa":
        start_pissa(tuned)
    return tuned


def add_lora(model: nn.Module, rank: int, targets: str, base_model: str | None = None) -> nn.Module:
    """Wrap ``model`` in a stock PEFT LoRA: alpha = 2 r, no dropout, no bias."""
    from peft import LoraConfig

    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    select_modules(model, targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=backbone_of(model).targets.get(targets, targets),
        lora_dropout=0.0,
        bias="none",
        base_model_name_or_path=base_model,
    )
    return _wrap(model, config, base_model)


def _add_cores(model: nn.Module, rank: int, basis: Basis, base_model: str | None, heads: Heads) -> nn.Module:
    from subspace3d.adapters.peft.tuner import SubspaceConfig

    on_heads = backbone_of(model).targets["heads"] if heads == "lora" else None
    settings: dict[str, Any] = {"lora_modules": on_heads, "r": rank, "lora_alpha": 2 * rank}
    return _wrap(model, SubspaceConfig.from_basis(basis, **settings), base_model)


def _wrap(model: nn.Module, config: Any, base_model: str | None) -> nn.Module:
    from peft import get_peft_model

    # PEFT copies this entry into adapter_config.json
    model.__dict__["name_or_path"] = base_model
    return get_peft_model(model, config)
