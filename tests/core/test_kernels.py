"""The CUDA kernels against their references and float64: on a GPU, and emulated where there is none."""

import pytest
import torch
from tolerances import assert_as_exact_as_torch, relative_error

from subspace_ext import _native
from subspace_ext.ops.core_grad import core_grad
from subspace_ext.ops.core_grad_ref import core_grad_ref
from subspace_ext.ops.irls import irls
from subspace_ext.ops.irls_ref import irls_ref
from subspace_ext.ops.irls_result import IrlsResult
from subspace_ext.ops.rank_update import Job, Launch, queue, rank_update, rank_update_
from subspace_ext.ops.rank_update_ref import rank_update_ref, uniform

SCALE = 0.7
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)


def factors(rows, columns, rank, device, dtype=torch.float32):
    """base [rows, columns], left, mid, right with an update about as large as base."""
    base, left = torch.randn(rows, columns, device=device), torch.randn(rows, rank, device=device)
    mid, right = torch.randn(rank, rank, device=device) / max(rank, 1), torch.randn(columns, rank, device=device)
    return base.to(dtype), left, mid, right


def exact_update(base, left, mid, right):
    return base.double() + SCALE * left.double() @ mid.double() @ right.double().t()


# ---- rank_update ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [(64, 128, 32), (70, 132, 36), (1, 1, 1), (65, 131, 33), (3, 260, 0), (5, 9, 130), (0, 8, 4), (8, 0, 4)],
    ids=str,
)
def test_rank_update(kernel_device, base_dtype, dtype, rows, columns, rank):
    base, left, mid, right = factors(rows, columns, rank, kernel_device, base_dtype)
    ours = rank_update(base, left, mid, right, SCALE, dtype)
    torchs = rank_update_ref(base, left, mid, right, SCALE, dtype)
    assert_as_exact_as_torch(ours, torchs, exact_update(base, left, mid, right), "out")


def test_rank_update_reads_strided_matrices(kernel_device):
    base, left, mid, right = factors(70, 66, 12, kernel_device)
    wanted = exact_update(base, left, mid, right)
    plain = rank_update_ref(base, left, mid, right, SCALE, torch.float32)
    wide = [torch.cat([matrix, matrix], dim=1)[:, : matrix.shape[1]] for matrix in (base, left, right)]
    turned = [matrix.t().contiguous().t() for matrix in (base, left, right)]
    for one, other, third in (wide, turned):
        ours = rank_update(one, other, mid.t().contiguous().t(), third, SCALE, torch.float32)
        assert_as_exact_as_torch(ours, plain, wanted, "out")
    # One element off the alignment that moving four at a time needs.
    shifted = torch.cat([base[:, :1], base], dim=1)[:, 1:]
    assert_as_exact_as_torch(rank_update(shifted, left, mid, right, SCALE, torch.float32), plain, wanted, "out")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "columns", "rank"), [(33, 70, 10), (1, 260, 64), (0, 8, 4)], ids=str)
def test_rank_update_in_place(kernel_device, dtype, tokens, columns, rank):
    base, left, mid, right = factors(tokens, columns, rank, kernel_device, dtype)
    left = left.to(dtype)
    wanted = exact_update(base, left, mid, right)
    plain = rank_update_ref(base, left, mid, right, SCALE, dtype)
    out = base.clone()
    assert rank_update_(out, left, mid.t().contiguous().t(), right, SCALE) is out
    assert_as_exact_as_torch(out, plain, wanted, "out")


def test_rank_update_of_many_matrices_at_once(kernel_device):
    jobs, wanted = [], []
    for rows, columns, rank in [(70, 300, 20), (1, 5, 3), (0, 7, 2), (129, 64, 40), (64, 1100, 8)]:
        base, left, mid, right = factors(rows, columns, rank, kernel_device)
        out = torch.empty(rows, columns + 3, dtype=torch.bfloat16, device=kernel_device)[:, :columns]
        jobs.append(Job(out, base, left, mid, right, SCALE))
        wanted.append(rank_update(base, left, mid, right, SCALE, torch.bfloat16))
    launch = Launch(jobs)
    for _ in range(2):
        for job in jobs:
            job.out.fill_(float("nan"))
        launch()
        for job, alone in zip(jobs, wanted):
            assert torch.equal(job.out, alone)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_rounding_is_that_of_the_reference(kernel_device, dtype):
    base, left, mid, right = factors(70, 132, 8, kernel_device)
    base[0, :4] = torch.tensor([float("inf"), float("nan"), 0.0, 1e30])
    base[1, :3] = torch.tensor([3.0e38, -3.4e38, 1e-41])
    still = torch.zeros_like(mid)
    for seed in (0, 7, -3):
        ours = rank_update(base, left, still, right, SCALE, dtype, seed)
        wanted = rank_update_ref(base, left, still, right, SCALE, dtype, seed)
        assert torch.equal(ours.isnan(), wanted.isnan())
        assert torch.equal(ours.nan_to_num(), wanted.nan_to_num())
    nearest = base.to(dtype)
    assert not torch.equal(ours[2:], nearest[2:])
    assert ((ours[2:].float() - base[2:]).abs() <= 2 * torch.finfo(dtype).eps * base[2:].abs()).all()


def test_stochastic_rounding_keeps_small_updates(kernel_device):
    """The mean over many elements of a value a tenth of the way to its neighbour is a tenth of the way."""
    base = torch.full((128, 512), 1 + 0.1 * 2**-7, device=kernel_device)
    none = torch.zeros(128, 1, device=kernel_device), torch.zeros(1, 1, device=kernel_device)
    rounded = rank_update(base, *none, torch.zeros(512, 1, device=kernel_device), SCALE, torch.bfloat16, 1)
    share = ((rounded.float() - 1) / 2**-7).mean().item()
    # 65,536 independent choices of probability 0.1: six standard deviations.
    assert abs(share - 0.1) < 6 * (0.09 / rounded.numel()) ** 0.5


def test_the_hash_is_uniform():
    values = uniform(3, torch.arange(1 << 16))
    assert values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, 16, 0, 1)
    assert ((counts - 4096).abs() < 6 * 4096**0.5).all()
    assert not torch.equal(values, uniform(4, torch.arange(1 << 16)))


def test_rank_update_refuses_what_the_kernel_cannot_read(kernel_device):
    base, left, mid, right = factors(8, 12, 4, kernel_device)
    good = Job(torch.empty_like(base), base, left, mid, right, SCALE)
    for change, message in [
        ({"left": left[:, :3]}, r"left must be \[8, 4\], got shape \(8, 3\)"),
        ({"out": base[:, :11]}, r"out must be \[8, 12\], got shape \(8, 11\)"),
        ({"mid": mid.double()}, r"mid must be torch.float32, got torch.float64"),
        ({"right": right.half()}, r"right must be torch.float32, got torch.float16"),
        ({"base": base.t().contiguous().t()}, r"base must have columns of stride 1, got strides \(1, 8\)"),
        ({"base": base.to("meta")}, "base must be on the GPU of the first job, .*, got meta"),
        ({"base": base.double()}, "half or single precision dtypes"),
    ]:
        with pytest.raises(ValueError, match=message):
            queue([good._replace(**change)])
    with pytest.raises(ValueError, match="job 1: out, base and left must have"):
        queue([good, good._replace(out=good.out.bfloat16())])
    module = _native.module()
    with pytest.raises(ValueError, match="rank must be at most 384, got 385"):
        wide = factors(2, 3, 385, kernel_device)
        queue([Job(torch.empty_like(wide[0]), *wide, SCALE)])
    with pytest.raises(ValueError, match="dtype code must be 0, 1 or 2, got 5"):
        module.rank_update(0, 0, 1, 1, 1, 5, 0, 0, False, 0, 0)
    with pytest.raises(ValueError, match="device_jobs must be given for more than one job"):
        module.rank_update(0, 0, 2, 1, 1, 0, 0, 0, False, 0, 0)


def test_ranks_beyond_the_kernel_take_the_reference(kernel_device):
    base, left, mid, right = factors(4, 6, 400, kernel_device)
    ours = rank_update(base, left, mid, right, SCALE, torch.float32)
    assert torch.equal(ours, rank_update_ref(base, left, mid, right, SCALE, torch.float32))


# ---- core_grad ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "rank"), [(300, 16), (1, 1), (0, 5), (257, 70), (129, 130)], ids=str)
def test_core_grad(kernel_device, dtype, tokens, rank):
    g, p = (torch.randn(tokens, rank, device=kernel_device).to(dtype) for _ in range(2))
    exact = core_grad_ref(g.double(), p.double(), SCALE)
    assert_as_exact_as_torch(core_grad(g, p, SCALE), core_grad_ref(g, p, SCALE), exact, "dc")


def test_core_grad_reads_strided_projections(kernel_device):
    g, p = torch.randn(90, 31, device=kernel_device)[:, 3:19], torch.randn(16, 90, device=kernel_device).t()
    exact = core_grad_ref(g.double(), p.double(), SCALE)
    assert_as_exact_as_torch(core_grad(g, p, SCALE), core_grad_ref(g, p, SCALE), exact, "dc")


def test_kernels_repeat_bit_for_bit(kernel_device):
    base, left, mid, right = factors(70, 140, 20, kernel_device)
    g, p = torch.randn(300, 20, device=kernel_device), torch.randn(300, 20, device=kernel_device)
    rb, ra = stacks(1, 4, 3, 12, 10, kernel_device)
    runs = [
        (
            rank_update(base, left, mid, right, SCALE, torch.bfloat16),
            core_grad(g, p, SCALE),
            *irls(rb, ra, 4, 3, 1.0, 1e-3, 5, 0.0),
        )
        for _ in range(2)
    ]
    for first, second in zip(*runs):
        assert torch.equal(first, second)


@pytest.mark.gpu
def test_kernels_follow_the_current_stream():
    device = torch.device("cuda")
    base, left, mid, right = factors(2048, 1024, 64, device)
    expected = rank_update(base, left, mid, right, SCALE, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = rank_update(base, left, mid, right, SCALE, torch.bfloat16)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(result, expected)


# ---- irls -----------------------------------------------------------------------------------------------------------


def stacks(layers, adapters, rank, sb, sa, device, noise=0.3):
    """rb [L, sb, N r], ra [L, sa, N r]: a shared part, noise, and a first adapter five times too large."""
    rb = torch.randn(layers, sb, 1, rank) + noise * torch.randn(layers, sb, adapters, rank)
    ra = torch.randn(layers, sa, 1, rank) + noise * torch.randn(layers, sa, adapters, rank)
    rb[:, :, 0] *= 5
    return (stack.double().flatten(2).to(device) for stack in (rb, ra))


def assert_same_mining(ours, wanted, model):
    ours, wanted = ([field.cpu() for field in result] for result in (ours, wanted))
    ours, wanted = IrlsResult(*ours), IrlsResult(*wanted)
    assert torch.equal(ours.n_iter, wanted.n_iter)
    assert torch.equal(ours.converged, wanted.converged)
    assert torch.equal(ours.status, wanted.status)
    pairs = [(ours.u, ours.v, wanted.u, wanted.v)] if model == "mean" else []
    if model == "shared":  # the same subspaces
        pairs = [(ours.u, ours.u, wanted.u, wanted.u), (ours.v, ours.v, wanted.v, wanted.v)]
    for u, v, wanted_u, wanted_v in pairs:
        assert relative_error(u @ v.mT, wanted_u @ wanted_v.mT) < 1e-9
    for name in ("weights", "residuals", "norms", "objective"):
        result, expected = (getattr(mined, name).nan_to_num(-1.0) for mined in (ours, wanted))
        size = (wanted.norms if name == "residuals" else expected.abs()).max().item()
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9 * size, msg=name)


@pytest.mark.parametrize("model", ["mean", "shared"])
@pytest.mark.parametrize("p", [2.0, 1.0, 0.5])
@pytest.mark.parametrize(
    ("layers", "adapters", "rank", "sb", "sa", "k"),
    [
        (2, 4, 2, 8, 8, 2),
        (1, 3, 3, 9, 7, 3),
        (1, 3, 3, 7, 9, 2),
        (1, 6, 8, 40, 44, 4),
        (1, 6, 8, 48, 48, 3),
        (1, 4, 2, 8, 8, 8),
        (1, 1, 4, 4, 4, 2),
    ],
    ids=str,
)
def test_irls(kernel_device, p, layers, adapters, rank, sb, sa, k, model):
    rb, ra = stacks(layers, adapters, rank, sb, sa, kernel_device)
    settings = (adapters, k, p, 1e-3, 12, 1e-6, model)
    assert_same_mining(irls(rb, ra, *settings), irls_ref(rb.cpu(), ra.cpu(), *settings), model)


def test_irls_of_deficient_and_empty_layers(kernel_device):
    rb, ra = stacks(3, 4, 2, 8, 8, kernel_device)
    rb[1] = 0
    rb[2, :, 2:] = rb[2, :, :2].repeat(1, 3)
    ra[2, :, 2:] = ra[2, :, :2].repeat(1, 3)
    settings = (4, 3, 1.0, 1e-3, 6, 1e-6)
    ours = irls(rb, ra, *settings)
    assert not ours.u[1].any() and not ours.v[1].any() and (ours.weights[1] == 1).all()
    assert not ours.residuals[1].any() and ours.converged[1]
    # Four times the same update of rank two: nothing is left over, and the third direction means nothing.
    wanted = rb[2, :, :2] @ ra[2, :, :2].t()
    assert relative_error(ours.u[2] @ ours.v[2].t(), wanted) < 1e-14
    assert not ours.u[2, :, 2].any()
    assert irls(rb[:0], ra[:0], *settings).u.shape == (0, 8, 3)


def test_irls_keeps_devices_apart(kernel_device):
    rb, ra = stacks(1, 4, 2, 8, 8, kernel_device)
    with pytest.raises(ValueError, match=r"ra must be on the device of rb, .*, got meta"):
        irls(rb, ra.to("meta"), 4, 2, 1.0, 1e-3, 5, 1e-6)
