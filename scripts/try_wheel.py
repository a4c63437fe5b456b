"""What an installed wheel must be able to do with its base dependencies beside it; run outside the repository.

Both plans of the fused linear against the formula with its gradients, mining of a planted subspace, and kernels for the
GPUs that were promised (none with SUBSPACE_CUDA=OFF in the environment).
"""

import os

import torch

import subspace_ext as se

ARCHITECTURES = ["75-real", "80-real", "86-real", "89-real", "90a-real", "100-real", "120-real", "80-virtual"]


def main() -> None:
    torch.manual_seed(0)
    info = se.build_info()
    print(f"torch {torch.__version__}, subspace_ext from {se.__file__}", info, sep="\n")
    promised = [] if os.environ.get("SUBSPACE_CUDA", "").upper() == "OFF" else ARCHITECTURES
    assert info["native"] and info["cuda_archs"] == promised, f"kernels must be there for {promised}"
    u, v = torch.linalg.qr(torch.randn(10, 3))[0], torch.linalg.qr(torch.randn(12, 3))[0]
    compare_linear(u, v)
    mine_planted(u, v)
    print("fused linear (both plans, with gradients) and mining agree with their formulas")


def compare_linear(u: torch.Tensor, v: torch.Tensor) -> None:
    """y = x w^T + bias + s ((x V) c^T) U^T and its gradient in c, by both plans."""
    x, w, bias = torch.randn(5, 12), torch.randn(10, 12), torch.randn(10)
    for plan in ("fold", "factored"):
        c, expected_c = (torch.full((3, 3), 0.5, requires_grad=True) for _ in range(2))
        y = se.subspace_linear(x, w, bias, u, c, v, scale=2.0, plan=plan)
        expected = x @ w.T + bias + 2.0 * ((x @ v) @ expected_c.T) @ u.T
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(c.grad, expected_c.grad, rtol=1e-4, atol=1e-3)


def mine_planted(u: torch.Tensor, v: torch.Tensor) -> None:
    adapters, rank = 4, 3
    lora_b = u @ torch.randn(adapters, rank, rank)
    mined = se.mine_subspace(lora_b, v.T.expand(adapters, -1, -1), k=rank)
    basis = torch.linalg.qr(mined.u)[0]  # mined.u carries the square roots of the singular values
    torch.testing.assert_close(basis @ basis.T, (u @ u.T).to(basis.dtype), rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    main()
