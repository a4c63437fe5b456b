"""Which GPUs get kernels: by the image that the driver loads, not by the name of the device."""

import contextlib
import warnings

import emulated
import pytest
import torch
from core.test_kernels import assert_same_mining, factors, stacks
from tolerances import assert_as_exact_as_torch

import subspace_ext
from subspace_ext import SubspaceLinear, _native
from subspace_ext.ops.core_grad import core_grad
from subspace_ext.ops.core_grad_ref import core_grad_ref
from subspace_ext.ops.irls import irls
from subspace_ext.ops.irls_ref import irls_ref
from subspace_ext.ops.rank_update import HostLaunch, HostUpdate, rank_update
from subspace_ext.ops.rank_update_ref import rank_update_ref

NO_IMAGE, OLD_DRIVER = "209", "35"


@pytest.fixture
def card(emulated_module, monkeypatch):
    """The emulated module in the place of the native one; what it answers is the environment's."""
    monkeypatch.setattr(_native, "_C", emulated_module)
    monkeypatch.setattr(_native, "KERNEL_DEVICE", "cpu")
    clear = (_native.kernel_image.cache_clear, _native._warn_once.cache_clear)
    for each in clear:
        each()
    yield monkeypatch
    for each in clear:
        each()


def refuse(card, cause: str) -> str:
    """Makes the card refuse its kernels; what the warning must say."""
    if cause == "hip":
        card.setattr(torch.version, "hip", "7.1")
        return "this torch is built for ROCm"
    card.setenv("EMULATED_CUDA_ERROR", cause)
    return {NO_IMAGE: r"no kernel image .* \(CUDA error 209\)", OLD_DRIVER: r"driver .* \(CUDA error 35\)"}[cause]


@pytest.mark.parametrize("cause", [NO_IMAGE, OLD_DRIVER, "hip"])
def test_a_card_that_runs_no_image_takes_the_references_with_one_warning(card, cause):
    message = refuse(card, cause)
    base, left, mid, right = factors(7, 9, 3, "cpu")
    g, p = torch.randn(5, 4), torch.randn(5, 4)
    stacks = torch.randn(2, 6, 8, dtype=torch.float64), torch.randn(2, 7, 8, dtype=torch.float64)
    settings = (4, 2, 1.0, 1e-3, 5, 1e-6)
    with pytest.warns(RuntimeWarning, match=message) as caught:
        updated = rank_update(base, left, mid, right, 0.5, torch.bfloat16)
        gradient = core_grad(g, p, 0.5)
        mined = irls(*stacks, *settings)
        layer = SubspaceLinear.from_linear(torch.nn.Linear(6, 5), torch.randn(5, 2), torch.randn(6, 2))
        layer(torch.randn(3, 6)).sum().backward()
    assert len(caught) == 1, [str(each.message) for each in caught]
    assert torch.equal(updated, rank_update_ref(base, left, mid, right, 0.5, torch.bfloat16))
    assert torch.equal(gradient, core_grad_ref(g, p, 0.5))
    wanted = irls_ref(*stacks, *settings)
    torch.testing.assert_close(mined.u @ mined.v.mT, wanted.u @ wanted.v.mT, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mined.weights, wanted.weights, rtol=1e-9, atol=1e-9)
    assert layer.c.grad is not None and torch.isfinite(layer.c.grad).all()


def test_the_warning_names_card_and_capability(card):
    """A T4 and a module that was built for newer cards alone."""
    card.setenv("EMULATED_CUDA_ERROR", NO_IMAGE)
    card.setattr(_native, "KERNEL_DEVICE", "cuda")
    card.setattr(_native, "guard", lambda device: contextlib.nullcontext())
    card.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    card.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    wanted = r"do not run on Tesla T4 \(compute capability 7\.5\): no kernel image"
    with pytest.warns(RuntimeWarning, match=wanted):
        assert not _native.runs_on(torch.device("cuda", 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _native.runs_on(torch.device("cuda", 0))
        assert not _native.runs_on(torch.device("cuda", 1)), "one warning for cards of a kind"


def test_the_cards_shared_memory_bounds_the_rank(card):
    """64 KiB on Turing, 99 on Ada, 163 on an A100: K of 64, 192 and 384; beyond it the reference works."""
    for bytes_, rank in ((64 << 10, 64), (99 << 10, 192), (163 << 10, 384), (227 << 10, 384), (0, 0)):
        _native.kernel_image.cache_clear()
        card.setenv("EMULATED_SHARED_BYTES", str(bytes_))
        image = _native.kernel_image(torch.device("cpu"))
        assert (image.refusal, image.max_rank) == (None, rank)
    _native.kernel_image.cache_clear()
    card.setenv("EMULATED_SHARED_BYTES", str(64 << 10))
    for rank, by_reference in ((64, False), (65, True)):
        arguments = (*factors(33, 70, rank, "cpu"), 0.5, torch.float32)
        found, wanted = rank_update(*arguments), rank_update_ref(*arguments)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(found, wanted) == by_reference


def test_tensors_of_two_cards_are_not_taken(card):
    here, there = torch.ones(2, 2), torch.ones(2, 2, device="meta")
    assert _native.takes(here, here) and not _native.takes(here, there) and not _native.takes(there, here)


def test_images_are_listed_for_each_card(card):
    card.setattr(torch.cuda, "is_available", lambda: False)
    assert subspace_ext.kernel_images() == []
    card.setattr(torch.cuda, "is_available", lambda: True)
    card.setattr(torch.cuda, "device_count", lambda: 1)
    card.setattr(_native, "guard", lambda device: contextlib.nullcontext())
    assert subspace_ext.kernel_images() == ["the machine code of sm_80"]
    _native.kernel_image.cache_clear()
    card.setenv("EMULATED_CUDA_ERROR", OLD_DRIVER)
    (text,) = subspace_ext.kernel_images()
    assert text.startswith("none: CUDA driver version is insufficient")


@pytest.mark.gpu
def test_every_card_here_runs_an_image():
    for index in range(torch.cuda.device_count()):
        image = _native.kernel_image(torch.device("cuda", index))
        major, minor = torch.cuda.get_device_capability(index)
        assert image.refusal is None and 75 <= image.binary <= 10 * major + minor
        assert image.max_rank >= 64


@pytest.fixture(scope="module")
def plain_module():
    module = emulated.load(plain=True)
    if module is None:
        pytest.skip("no C++ compiler for the emulated kernels")
    return module


@pytest.mark.slow(reason="builds the native module once more")
def test_kernels_of_turing(card, plain_module):
    """Without tensor cores for float32 and without asynchronous copies: the same results to rounding."""
    card.setattr(_native, "_C", plain_module)
    card.setenv("EMULATED_SHARED_BYTES", str(64 << 10))
    for rows, columns, rank in ((70, 132, 36), (1, 1, 1), (65, 131, 64)):
        arguments = (*factors(rows, columns, rank, "cpu"), 0.5)
        exact = rank_update_ref(*(each.double() for each in arguments[:4]), 0.5, torch.float64)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found, plain = rank_update(*arguments, dtype), rank_update_ref(*arguments, dtype)
            assert_as_exact_as_torch(found, plain, exact, "out")
    g, p = torch.randn(257, 70), torch.randn(257, 70)
    exact = core_grad_ref(g.double(), p.double(), 0.5)
    assert_as_exact_as_torch(core_grad(g, p, 0.5), core_grad_ref(g, p, 0.5), exact, "dc")


@pytest.mark.slow(reason="builds the native module once more")
def test_lanes_of_a_compiler_without_vector_types(plain_module, monkeypatch):
    """As MSVC compiles them: the same mining, the same updates."""
    monkeypatch.setattr(_native, "_C", plain_module)
    for model in ("mean", "shared"):
        rb, ra = stacks(2, 6, 8, 40, 44, "cpu")
        settings = (6, 4, 1.0, 1e-3, 12, 1e-6, model)
        assert_same_mining(irls(rb, ra, *settings), irls_ref(rb, ra, *settings), model)
    base, left, mid, right = factors(70, 37, 20, "cpu")
    base[0, :3] = torch.tensor([float("nan"), float("inf"), 3.39e38])
    for dtype in (torch.float32, torch.bfloat16):
        (found,) = HostLaunch([HostUpdate(base, left, mid, right, 0.5)], dtype)()
        plain = rank_update_ref(base, left, mid, right, 0.5, dtype)
        exact = rank_update_ref(*(each.double() for each in (base, left, mid, right)), 0.5, torch.float64)
        assert torch.equal(found.view(70, 37).isnan(), plain.isnan())
        assert torch.equal(found.view(70, 37).isinf(), plain.isinf())
        assert_as_exact_as_torch(found.view(70, 37)[1:], plain[1:], exact[1:], "out")
