"""Data-parallel training of cores: two processes give the gradients of one on the joint batch."""

import subprocess
import sys

import torch
from torch import nn

from subspace_ext import SubspaceConv2d, SubspaceLinear, group_folds


def make_model() -> nn.Module:
    torch.manual_seed(0)
    conv = SubspaceConv2d.from_conv(nn.Conv2d(3, 8, 3), torch.randn(8, 4), torch.randn(27, 4))
    linear = SubspaceLinear.from_linear(nn.Linear(8, 6), torch.randn(6, 3), torch.randn(8, 3), plan="effective")
    nn.init.normal_(conv.c)
    nn.init.normal_(linear.c)
    model = nn.Sequential(conv, nn.Flatten(2), nn.GELU(), _Turn(), linear)
    group_folds(model)
    return model


class _Turn(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def images() -> torch.Tensor:
    return torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """The cores after a step for each batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for batch in batches:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


WORKER = """
import sys
import torch
sys.path.insert(0, {folder!r})
from test_distributed import images, make_model, train
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method={url!r}, rank={rank}, world_size=2)
model = torch.nn.parallel.DistributedDataParallel(make_model())
share = images()[2 * {rank} : 2 * {rank} + 2]
torch.save(train(model, [share, share]), {result!r})
torch.distributed.destroy_process_group()
"""


def test_two_processes_train_as_one(tmp_path):
    url = f"file://{tmp_path}/rendezvous"
    results = [str(tmp_path / f"{rank}.pt") for rank in range(2)]
    folder = __file__.rpartition("/")[0]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER.format(folder=folder, url=url, rank=rank, result=result)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, result in enumerate(results)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    wanted = train(make_model(), [images(), images()])
    for result in results:
        for ours, joint in zip(torch.load(result, weights_only=True), wanted):
            torch.testing.assert_close(ours, joint, rtol=1e-5, atol=1e-6)
