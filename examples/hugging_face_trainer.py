"""Tune cores with the Hugging Face Trainer.

    python examples/hugging_face_trainer.py --basis basis.safetensors --out trained

The basis may come from anywhere; without `--basis` the leading singular vectors of the weights are used, so that the
script runs by itself. The model is a small ViT with random weights: put your own in `build_model`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import subspace3d as s3


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
        )
    )


class Squares(Dataset[dict[str, torch.Tensor]]):
    """Images whose left or right half is bright."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        image = 0.3 * torch.randn(3, 16, 16, generator=generator)
        image[:, :, 8 * (index % 2) : 8 * (index % 2) + 8] += 1
        return {"pixel_values": image, "labels": torch.tensor(index % 2)}


def singular_vectors(model: nn.Module, k: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """U and V of the weights of every linear layer but the classifier's."""
    basis = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "classifier":
            u, _, vt = torch.linalg.svd(module.weight.detach(), full_matrices=False)
            basis[name] = (u[:, :k].contiguous(), vt[:k].T.contiguous())
    return basis


def main(arguments: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--basis", type=Path, help="basis file; none: singular vectors of the weights")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter and its basis")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args(arguments)

    model = build_model()
    basis_file = options.basis
    if basis_file is None:
        basis_file = options.out / "basis.safetensors"
        s3.save_basis(basis_file, singular_vectors(model, k=8))
    # modules_to_save: a fresh classifier head is trained in full beside the cores
    settings = s3.SubspaceConfig(basis=str(basis_file), modules_to_save=["classifier"])
    tuned = get_peft_model(model, settings)
    trainer = Trainer(
        model=tuned,
        args=TrainingArguments(
            output_dir=str(options.out / "trainer"), max_steps=options.steps, per_device_train_batch_size=16,
            learning_rate=1e-2, logging_steps=10, save_strategy="no", report_to=[], disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Squares(),
    )  # fmt: skip
    trainer.train()
    tuned.save_pretrained(str(options.out / "adapter"))
    print(f"adapter -> {options.out / 'adapter'}, its basis -> {basis_file}")
    again = PeftModel.from_pretrained(build_model(), str(options.out / "adapter"))
    image = Squares()[1]["pixel_values"][None]
    with torch.no_grad():
        assert torch.allclose(again.eval()(image).logits, tuned.eval()(image).logits, atol=1e-5)
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
