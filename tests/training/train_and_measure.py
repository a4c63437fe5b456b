"""Print the estimated and the measured memory of training vggt-nano, in bytes, as JSON.

Estimated are the tensors a step adds to the weights; measured is how far this process's resident memory rises above
where it stands before the run, whatever it held while it started.
Started with MALLOC_MMAP_THRESHOLD_ set, so that freed tensors go back to the system and the peak is not that of the
allocator.

python train_and_measure.py METHOD PRECISION CHECKPOINTING IMAGES FOLDER
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from training.plane_scenes import write_plane_scenes

from subspace3d.adapters.methods import apply_method
from subspace3d.backbones import build_vggt
from subspace3d.backbones.targets import target_modules
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.training.config import TrainConfig
from subspace3d.training.device import peak_memory
from subspace3d.training.loop import train
from subspace3d.training.memory import check_memory
from subspace3d.training.step import set_modes


def main(method: str, precision: str, checkpointing: str, images: str, folder: str) -> None:
    dataset = MultiViewDataset(write_plane_scenes(Path(folder) / "scenes", scenes=1, views=4, size=112), 112)
    dataset.scene(0)
    model = build_vggt("vggt-nano")
    model.enable_checkpointing(checkpointing == "on")
    basis = None
    if method == "subspace":
        shapes = {name: model.get_parameter(f"{name}.weight").shape for name in target_modules(model, "aggregator")}
        basis = {name: (torch.eye(out, 16), torch.eye(in_, 16)) for name, (out, in_) in shapes.items()}
    tuned = apply_method(model, method, 16, basis=basis)  # type: ignore[arg-type]
    set_modes(tuned)
    config = TrainConfig(
        steps=2,
        lr=1e-3,
        frames=(4, 4),
        images_per_step=int(images),
        precision=precision,  # type: ignore[arg-type]
        device="cpu",
        threads=1,
    )
    estimate = check_memory(tuned, config, 112)
    assert estimate is not None
    folds = estimate.weights - sum(t.numel() * t.element_size() for t in (*tuned.parameters(), *tuned.buffers()))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    before = peak_memory(torch.device("cpu"))
    train(tuned, dataset, config, Path(folder) / "run", quiet=True)
    after = peak_memory(torch.device("cpu"))
    print(json.dumps({"estimated": estimate.step + estimate.optimizer + folds, "measured": after - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
