"""AdaLoRA: the orthogonality term and the budget, against PEFT's own loop."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from adapters.models import train_at_random
from peft import get_peft_model
from torch import nn

from subspace3d.adapters.adalora import AdaLoraHook, adalora_config
from subspace3d.adapters.parameters import count_trainable, trainable_parameters

STEPS = 20


class Net(nn.Module):
    """Returns what PEFT waits for: an output with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.fc2(self.fc1(x).tanh()) - 1).square().mean())


def tuned() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(Net(), adalora_config(2, "fc[12]", STEPS))


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def ranks(model: nn.Module) -> list[int]:
    return [int((value != 0).sum()) for name, value in model.named_parameters() if "lora_E" in name]


def test_schedule_follows_the_run() -> None:
    config = adalora_config(16, "x", 1000)
    assert (config.target_r, config.init_r, config.lora_alpha) == (16, 24, 32)
    assert (config.tinit, config.tfinal, config.deltaT, config.total_step) == (100, 500, 10, 1000)
    # the shortest run in which the directions are scored before they are cut
    short = adalora_config(1, "x", 3)
    assert (short.init_r, short.tinit, short.tfinal, short.deltaT) == (2, 0, 1, 1)


def test_orthogonality_term_is_pefts_own() -> None:
    model, x = tuned(), batch(0)
    train_at_random(model)
    term = AdaLoraHook(model).extra_loss()
    # PEFT's tuner adds it to the loss of an output that has one; the model inside gives the loss alone
    added = model.base_model(x).loss - model(x).loss
    torch.testing.assert_close(term, added)
    term.backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name)


def test_budget_and_cuts_are_those_of_pefts_loop(tmp_path: Path) -> None:
    models = {"hook": tuned(), "peft": tuned()}
    hook = AdaLoraHook(models["hook"])
    optimizers = {name: torch.optim.SGD(trainable_parameters(m).values(), 0.5) for name, m in models.items()}
    seen = []
    for step in range(1, STEPS + 1):
        for name, model in models.items():
            optimizers[name].zero_grad()
            if name == "peft":
                model.base_model(batch(step)).loss.backward()
                optimizers[name].step()
                model.base_model.update_and_allocate(step)
            else:
                (model(batch(step)).loss + hook.extra_loss()).backward()
                optimizers[name].step()
                hook.after_step(step)
        for (key, value), other in zip(models["hook"].named_parameters(), models["peft"].parameters()):
            torch.testing.assert_close(value, other, msg=f"{key} after step {step}")
        seen.append(sum(ranks(models["hook"])))
    # r = 2 on two modules, from 3; cubic from step 2 to step 10, whole directions
    budget = [6 if s <= 2 else 4 if s >= 10 else int(2 * (1 - (s - 2) / 8) ** 3 + 4) for s in range(1, STEPS + 1)]
    assert seen == budget
    counts = count_trainable(models["hook"])
    sides = {"fc1": 6 + 9, "fc2": 9 + 5}
    kept = dict(zip(sides, ranks(models["hook"])))
    assert counts["total"] == sum(kept[name] * (sides[name] + 1) for name in sides)
    models["hook"].save_pretrained(tmp_path, save_embedding_layers=False)
    assert count_trainable(models["hook"]) == counts


def test_a_skipped_step_does_not_skip_the_last_cut() -> None:
    model = tuned()
    hook, optimizer = AdaLoraHook(model), torch.optim.SGD(trainable_parameters(model).values(), 0.5)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        model(batch(step)).loss.backward()
        if step not in (9, 10, 11):
            optimizer.step()
            hook.after_step(step)
    assert sum(ranks(model)) == 4


def test_parameters_without_a_gradient_count_as_unimportant() -> None:
    model = tuned()
    hook = AdaLoraHook(model)
    layer = model.get_submodule("base_model.model.fc2")
    model(batch(1)).loss.backward()
    for factor in (layer.lora_A, layer.lora_B, layer.lora_E):
        factor["default"].grad = None
    hook.after_step(1)
    assert not hook.tensors()["adalora.importance.fc2.lora_A.default"].any()
