"""Mine a folder of your own PEFT LoRA adapters, tune inside what they share, and give the result to stock PEFT.

    python examples/mine_your_adapters.py --adapters my_adapters --out tuned

Nothing here is about 3D: the base model is a small classifier. The adapters must be plain LoRAs of one base model. The
exported folder is a plain LoRA again, so whoever loads it needs PEFT alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn

import subspace3d as s3
from subspace3d.adapters.low_rank import adapter_factors
from subspace3d.commands import mine
from subspace3d.formats.adapter import write_lora


def base_model() -> nn.Module:
    """Your base model; the same weights every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))


def main(arguments: Sequence[str] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, required=True, help="folder with PEFT adapter folders below it")
    parser.add_argument("--out", type=Path, required=True, help="folder for the subspace, the basis and the result")
    parser.add_argument("--k", type=int, default=4, help="directions shared by the adapters, per module")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)

    # 1. what the adapters share
    subspace = mine.run(mine.MineConfig(adapters=options.adapters, out=options.out / "shared.safetensors", k=options.k))
    basis = s3.build_basis([subspace])
    basis_file = options.out / "basis.safetensors"
    s3.save_basis(basis_file, basis)

    # 2. tune cores inside it, like any other PEFT adapter
    model = get_peft_model(base_model(), s3.SubspaceConfig(basis=str(basis_file)))
    model.print_trainable_parameters()
    inputs = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
    labels = (inputs[:, 0] > 0).long() + 2 * (inputs[:, 1] > 0).long()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    loss = torch.zeros(())
    for _ in range(options.steps):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")

    # 3. one plain LoRA with the same outputs, for stock PEFT
    exported = options.out / "lora"
    write_lora(exported, adapter_factors(model), base_model())
    stock = PeftModel.from_pretrained(base_model(), str(exported))
    print(f"plain LoRA -> {exported}")
    with torch.no_grad():
        return model.eval()(inputs), stock.eval()(inputs)


if __name__ == "__main__":
    main()
