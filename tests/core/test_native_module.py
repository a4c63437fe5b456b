"""The compiled module: what it links, what importing does, what it says about itself."""

import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import subspace_ext
from subspace_ext import NativeUnavailableError, _native, build_info
from subspace_ext.ops import irls as irls_module


@pytest.fixture
def module():
    if not _native.available():
        pytest.skip("subspace_ext._C is not built here")
    return _native.module()


def test_links_neither_torch_nor_the_driver(module):
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    dynamic = subprocess.run(["readelf", "-d", module.__file__], capture_output=True, text=True, check=True).stdout
    needed = [line for line in dynamic.splitlines() if "NEEDED" in line]
    assert needed
    for name in ("torch", "c10", "libcuda", "libcudart", "libgomp"):
        assert not any(name in line for line in needed), f"{name} in {needed}"


def test_importing_touches_no_gpu_and_no_heavy_package():
    code = (
        "import sys, subspace_ext, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "found = {'subspace3d', 'peft', 'open3d', 'mitsuba', 'transformers'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_free_threaded_python_stays_free(module):
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("this Python has a global lock")
    # importing a module that does not say it can do without turns the lock on, with a warning
    code = "import sys; import subspace_ext; assert subspace_ext._native.available(); print(sys._is_gil_enabled())"
    run = [sys.executable, "-c"]
    alone = subprocess.run([*run, "import sys, torch; print(sys._is_gil_enabled())"], capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    assert subprocess.run([*run, code], capture_output=True, text=True).stdout == alone.stdout


def test_threads_do_not_disturb_each_other():
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(6, 24, 3, generator=generator, dtype=torch.float64)
    a = torch.randn(6, 3, 20, generator=generator, dtype=torch.float64)
    u, v = (torch.linalg.qr(torch.randn(size, 5, generator=generator))[0] for size in (24, 20))
    weight, core, x = (torch.randn(*shape, generator=generator) for shape in ((24, 20), (5, 5), (7, 20)))

    def work(_):
        own = core.clone().requires_grad_()
        y = subspace_ext.subspace_linear(x, weight, None, u, own, v)
        y.square().sum().backward()
        mined = subspace_ext.mine_subspace(b, a, 4)
        return y.detach(), own.grad, mined.u, mined.v

    expected = work(0)
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(work, range(32)):
            assert all(torch.equal(got, want) for got, want in zip(result, expected))


def test_build_info():
    info = build_info()
    assert info["native"] == _native.available()
    assert info["cuda_available"] == torch.cuda.is_available()
    assert info["torch"] == torch.__version__
    if info["native"]:
        assert info["version"] and info["compiler"] and info["cpp_standard"] == 17 and info["threads"]
        assert bool(info["cuda_archs"]) == info["cuda_built"]
    assert isinstance(subspace_ext.__version__, str)


def test_without_the_native_module(monkeypatch):
    monkeypatch.setattr(_native, "_C", None)
    assert build_info()["native"] is False
    with pytest.raises(NativeUnavailableError, match="could not be imported"):
        _native.module()
    b, a = torch.randn(3, 10, 2), torch.randn(3, 2, 8)
    assert torch.isfinite(subspace_ext.mine_subspace(b, a, 2).u).all()


def test_native_checks_reach_python_with_values(module):
    def job(adapters, k, model=0, workers=1, sb=4):
        return irls_module._JOB.pack(*[0] * 13, workers, 1, adapters, 3, sb, 5, k, 10, model, 1.0, 1e-3, 1e-6)

    with pytest.raises(ValueError, match=r"k must be in 1..min\(sb, sa\), got k 9, sb 4, sa 5"):
        module.irls_workspace(job(2, 9))
    with pytest.raises(ValueError, match="sizes must be positive, got layers 1, adapters 0"):
        module.irls_workspace(job(0, 1))
    for wrong in (job(2**62, 1), job(2, 1, sb=2**40)):
        with pytest.raises(ValueError, match="adapters x rank, sb and sa must be at most 16777216, got"):
            module.irls_workspace(wrong)
    with pytest.raises(ValueError, match="count must not be negative, got -1"):
        module.same_bytes(0, 0, -1)
    with pytest.raises(ValueError, match="model must be 0 or 1, got 2"):
        module.irls_workspace(job(2, 1, model=2))
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        module.irls(job(2, 1, workers=0))
    with pytest.raises(ValueError, match="a job must have 200 bytes, got 192"):
        module.irls(job(2, 1)[:-8])


def test_irls_refuses_what_the_native_loop_cannot_read(module):
    good = torch.ones(1, 4, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"rb must be contiguous float64, got torch\.float32"):
        irls_module.irls(good.float(), good, 2, 2, 1.0, 1e-3, 5, 1e-6)
    with pytest.raises(ValueError, match="rb and ra must be"):
        irls_module.irls(good, good[:, :, :4], 2, 2, 1.0, 1e-3, 5, 1e-6)
    with pytest.raises(ValueError, match="N r columns with N = 4, got 6 columns"):
        irls_module.irls(good, good, 4, 2, 1.0, 1e-3, 5, 1e-6)
