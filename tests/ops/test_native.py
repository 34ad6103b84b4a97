"""The native extension itself: its functions' error bounds, its absence, its instruction sets."""

import importlib.util
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blackmamba.errors import BackendError
from blackmamba.ops import native, rms_norm
from blackmamba.ops.backend import Implementations, available_backends

needs_native = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

FUNCTIONS = {
    "exp2_nonpositive": (0, torch.exp2, 2e-7),
    "exp": (1, torch.exp, 2e-7),
    "sigmoid": (2, torch.sigmoid, 3e-7),
    "silu": (3, F.silu, 3e-7),
    "softplus": (4, lambda x: torch.where(x < 30, torch.log1p(torch.exp(x)), x), 4e-7),
    "round_to_bf16": (5, lambda x: x.float().bfloat16().double(), 0.0),
}


def applied(name: str, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    native.extension().elementwise(FUNCTIONS[name][0], x.data_ptr(), y.data_ptr(), x.numel())
    return y


@needs_native
@pytest.mark.parametrize("name", FUNCTIONS)
def test_relative_error_is_within_its_bound(name: str):
    _, exact, bound = FUNCTIONS[name]
    x = torch.cat((torch.linspace(-87, 0, 200_003), -torch.logspace(-38, 0, 1001)))
    if name != "exp2_nonpositive":
        x = torch.cat((x, -x))
    wanted = exact(x.double())
    error = (applied(name, x).double() - wanted).abs() / wanted.abs().clamp_min(1e-36)
    assert error.max() <= bound


@needs_native
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_stays_nan(name: str):
    assert applied(name, torch.tensor([math.nan, -math.nan])).isnan().all()


@needs_native
def test_limits():
    ends = torch.tensor([-math.inf, -1e30, 0.0, 1e30, math.inf])
    assert applied("exp", ends)[2:].tolist() == [1.0, math.inf, math.inf]
    assert (applied("exp", ends)[:2] < 2e-38).all()
    assert applied("exp2_nonpositive", ends[:3])[2] == 1
    assert (applied("exp2_nonpositive", ends[:3])[:2] < 2e-38).all()
    assert applied("softplus", ends).tolist() == pytest.approx(
        [0.0, 0.0, math.log(2), 1e30, math.inf]
    )
    assert applied("sigmoid", ends).tolist() == pytest.approx([0.0, 0.0, 0.5, 1.0, 1.0])


@needs_native
@pytest.mark.parametrize("n", [0, 1, 3, 15, 16, 17, 31, 33])
def test_nothing_is_written_behind_the_end(n: int):
    x, y = torch.randn(n), torch.full((n + 16,), 7.0)
    native.extension().elementwise(1, x.data_ptr(), y.data_ptr(), n)
    assert torch.allclose(y[:n], x.exp())
    assert (y[n:] == 7).all()


@needs_native
def test_threads_are_those_of_torch():
    assert native.extension().threading() in ("OpenMP of torch", "own threads")
    assert native.extension().flops_per_second(1) > 1e8
    assert "kernels on" in native.describe()


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if "_native" in name else find(name, *a)
    )
    module, reason = native._load()
    monkeypatch.setattr(native, "_MODULE", module)
    monkeypatch.setattr(native, "_REASON", reason)


def test_without_the_extension_the_next_backend_runs(without_extension: None):
    assert "not built" in str(native.missing())
    assert native.describe().startswith("none: the native extension was not built")
    assert "native" not in available_backends("rms_norm")
    assert rms_norm(torch.ones(2, 3), torch.ones(3)).shape == (2, 3)
    with pytest.raises(BackendError, match="was not built; install a C\\+\\+ compiler"):
        native.extension()


def test_an_extension_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch):
    def broken(name: str):
        raise ImportError("undefined symbol: x")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", broken)
    module, reason = native._load()
    assert module is None
    assert "cannot be loaded (undefined symbol: x)" in str(reason)


@needs_native
def test_an_extension_of_other_sources_is_not_used_and_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    for older in ({}, {"interface": "another"}):  # before there was an interface, and since
        module = types.SimpleNamespace(__file__="_native.so", **older)
        monkeypatch.setattr(importlib, "import_module", lambda name, module=module: module)
        found, reason = native._load()
        assert found is None
        assert "_native.so was built from other sources" in str(reason)
        assert "make native" in caplog.text
        assert "plain PyTorch" in caplog.text
        caplog.clear()
    monkeypatch.undo()
    assert native._load() == (native.extension(), None)
    assert native._interface() == native.extension().interface


def test_an_installed_package_has_no_sources_to_compare_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "ops" / "native" / "__init__.py"))
    assert native._interface() is None


@pytest.fixture
def doubling(monkeypatch: pytest.MonkeyPatch):
    """An operation of two implementations that say which one ran."""
    from blackmamba.ops import backend

    monkeypatch.setattr(backend, "_registered", dict(backend._registered))
    return Implementations("doubling", {"native": lambda: "native", "torch": lambda: "torch"})


@needs_native
def test_auto_takes_the_first_that_fits_the_input(doubling: Implementations[...]):
    assert doubling.pick("auto", torch.ones(1))() == "native"
    assert doubling.pick("auto", torch.ones(1), None, torch.ones(1).bfloat16())() == "native"
    assert doubling.pick("auto", torch.ones(1).double())() == "torch"
    assert doubling.pick("auto", torch.ones(1, device="meta"))() == "torch"


@needs_native
def test_a_named_backend_runs_or_raises(
    doubling: Implementations[...], monkeypatch: pytest.MonkeyPatch
):
    wide, meta = torch.ones(1).double(), torch.ones(1, device="meta")
    with pytest.raises(BackendError, match=r"doubling.*takes float32 and bfloat16.*float64"):
        doubling.pick("native", wide)
    with pytest.raises(BackendError, match="runs on the CPU, the input is on meta"):
        doubling.pick("native", meta)
    monkeypatch.setenv("BLACKMAMBA_BACKEND", "native")
    with pytest.raises(BackendError, match="float64"):
        doubling.pick("auto", wide)


@pytest.mark.skipif("asan" not in os.environ.get("LD_PRELOAD", ""), reason="only in make sanitize")
def test_the_sanitizer_sees_a_kernel_that_reads_too_far():
    code = (
        "import torch; from blackmamba import _native\n"
        "x = torch.zeros(100)\n"
        "_native.elementwise(1, x.data_ptr(), x.data_ptr(), 400)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AddressSanitizer" in done.stderr
