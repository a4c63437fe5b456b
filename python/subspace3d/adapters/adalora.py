"""AdaLoRA through PEFT, with what PEFT leaves to the training loop: the orthogonality term and the rank budget."""

from __future__ import annotations

from typing import Any

import torch

_INIT_RATIO = 1.5
_WARMUP_SHARE, _FINAL_SHARE, _ALLOCATIONS = 0.1, 0.5, 100


def adalora_config(rank: int, targets: str, steps: int, base_model: str | None = None) -> Any:
    """PEFT's AdaLoraConfig for a run of ``steps``: ranks start at 1.5 r and are cut to r on average, by importance.

    No cut in the first tenth of the steps, then the cubic schedule in about a hundred cuts up to the middle of the run,
    then the kept directions are tuned on.

    Args:
        rank (int): target rank r; alpha is 2 r.
        targets (str): expression that full module names match.
        steps (int): optimiser steps of the run.
        base_model (str | None): identity of the weights.

    Raises:
        ValueError: steps is below three, too few to score the directions before the cut.
    """
    from peft import AdaLoraConfig

    if steps < 3:
        raise ValueError(f"steps must be at least 3 for the method adalora, whose ranks follow a schedule, got {steps}")
    return AdaLoraConfig(
        target_r=rank,
        # with equal ranks PEFT's allocator would have nothing to cut, and fails
        init_r=max(rank + 1, int(_INIT_RATIO * rank)),
        lora_alpha=2 * rank,
        tinit=int(_WARMUP_SHARE * steps),
        tfinal=int(_FINAL_SHARE * steps),
        deltaT=max(1, steps // _ALLOCATIONS),
        total_step=steps,
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        base_model_name_or_path=base_model,
    )


class AdaLoraHook:
    """What a training loop calls for AdaLoRA (see `hooks.MethodHook`).

    PEFT adds the orthogonality term only to a model output with a ``loss``, which a dict of predictions does not have,
    and a plain PeftModel not even then.
    """

    def __init__(self, model: Any, adapter: str = "default") -> None:
        """Args: model, a PeftModel with one trained AdaLoRA; adapter, its name."""
        self._tuner: Any = model.base_model
        self._config = self._tuner.peft_config[adapter]
        self._allocator = self._tuner.rankallocator
        self._last_cut = self._config.total_step - self._config.tfinal
        parameters = dict(self._tuner.model.named_parameters())
        self._factors = {
            name: parameter
            for name, parameter in parameters.items()
            if any(f".{kind}.{adapter}" in name for kind in ("lora_A", "lora_B", "lora_E"))
        }
        self._masks = {
            name: torch.ones_like(parameter) for name, parameter in self._factors.items() if ".lora_E." in name
        }
        self._finished = torch.zeros(1)
        self._reset_scores()

    def extra_loss(self) -> torch.Tensor:
        """``w / n * sum |A A^T - I|_F + |B^T B - I|_F`` over the n factors, w = orth_reg_weight (0.5)."""
        terms = []
        for name, factor in self._factors.items():
            if ".lora_E." not in name:
                gram = factor @ factor.T if ".lora_A." in name else factor.T @ factor
                terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        return self._config.orth_reg_weight * torch.stack(terms).mean()

    def after_step(self, step: int) -> None:
        """Score the directions and cut the least important ones; after optimizer.step(), gradients still in place.

        Args:
            step (int): optimiser steps done, 1 after the first.
        """
        # a checkpoint is loaded into the masks alone
        self._config.rank_pattern = {name: mask.flatten().bool().tolist() for name, mask in self._masks.items()}
        if self._finished:
            self._allocator.mask_using_rank_pattern(self._tuner.model, self._config.rank_pattern)
            return
        for factor in self._factors.values():
            if factor.grad is None:
                factor.grad = torch.zeros_like(factor)
        # a step that was skipped must not skip the last cut
        self._tuner.update_and_allocate(min(step, self._last_cut))
        for name, kept in self._config.rank_pattern.items():
            mask = self._masks[name]
            mask.copy_(torch.tensor(kept, dtype=mask.dtype).reshape(mask.shape))
        if step >= self._last_cut:
            self._finished.fill_(1)
            self._reset_scores()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything a checkpoint must hold beside the parameters; loaded by copying into these very tensors."""
        allocator, held = self._allocator, {"adalora.finished": self._finished}
        for name in self._factors:
            held[f"adalora.importance.{name}"] = allocator.exp_avg_ipt[name]
            held[f"adalora.uncertainty.{name}"] = allocator.exp_avg_unc[name]
        for name, mask in self._masks.items():
            held[f"adalora.mask.{name}"] = mask
        return held

    def _reset_scores(self) -> None:
        # PEFT makes them at the first step and drops them after the last cut; a checkpoint needs them at all times
        for scores in (self._allocator.ipt, self._allocator.exp_avg_ipt, self._allocator.exp_avg_unc):
            scores.update({name: torch.zeros_like(factor.detach()) for name, factor in self._factors.items()})
