"""The README's example runs as it stands."""

import re
from pathlib import Path

import torch
from torch import nn

from subspace3d.formats.subspace import ModuleSubspace, save_subspace

README = Path(__file__).parents[2] / "README.md"


def test_the_training_loop_example_runs(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 8))
    values = torch.arange(6.0).flip(0).double()
    for attribute in ("texture", "camera"):
        modules = {
            name: ModuleSubspace(torch.randn(out, 3), torch.randn(into, 3), values, torch.ones(2).double())
            for name, out, into in (("0", 20, 12), ("2", 8, 20))
        }
        save_subspace(tmp_path / f"{attribute}.safetensors", modules, {"adapters": []})
    batches = [(torch.randn(4, 12), torch.randn(4, 8))] * 3
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = {"model": model, "batches": batches}
    exec(compile(example, str(README), "exec"), names)
    assert [tuple(p.shape) for p in model.parameters() if p.requires_grad] == [(6, 6), (6, 6)]
    assert model[0].c.abs().max() > 0
    after = {name.replace("base_layer.", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
