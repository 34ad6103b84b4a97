"""RMSNorm, the linear cross-entropy, and the picking of backends."""

import logging

import pytest
import torch
from numerics import assert_within_budget, relative_error
from torch.nn import functional as F

from blackmamba.errors import BackendError, InputError
from blackmamba.ops import expert_mlp, linear_cross_entropy, rms_norm
from blackmamba.ops.backend import available_backends, describe_backends
from blackmamba.ops.linear_cross_entropy import torch_chunked


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 5, 64), (0, 8)], ids=str)
def test_rms_norm_is_its_formula(shape: tuple[int, ...]):
    x, weight = normal(*shape), normal(shape[-1], seed=1)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight), expected)
    assert relative_error(rms_norm(x.float(), weight.float()), expected) < 1e-6
    assert rms_norm(x.bfloat16(), weight.float()).dtype == torch.bfloat16
    if x.numel():
        assert torch.autograd.gradcheck(rms_norm, (x.requires_grad_(), weight.requires_grad_()))


def test_rms_norm_names_bad_input():
    with pytest.raises(InputError, match=r"weight has shape \(3,\), must be \(4,\)"):
        rms_norm(normal(2, 4), normal(3))
    with pytest.raises(BackendError, match="rms_norm has reference, or auto"):
        rms_norm(normal(2, 4), normal(4), backend="torch")


@pytest.mark.parametrize("t", [0, 1, 15, 16, 17, 100])
@pytest.mark.parametrize("biased", [True, False])
def test_cross_entropy_in_chunks(t: int, biased: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_chunked, "_CHUNK_BYTES", 1)  # 16 tokens at a time
    labels = torch.randint(0, 11, (t,), generator=torch.Generator().manual_seed(0))
    labels[::3] = -100
    results = []
    for backend in ("reference", "torch"):
        x, weight = normal(t, 5).requires_grad_(), normal(11, 5, seed=1).requires_grad_()
        bias = normal(11, seed=2).requires_grad_() if biased else None
        loss = linear_cross_entropy(x, weight, labels, bias=bias, backend=backend)  # pyright: ignore
        (3 * loss).backward()
        grads = [p.grad for p in (x, weight, bias) if p is not None]
        results.append([loss.detach(), *grads])
    for actual, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(actual, expected)


def test_cross_entropy_gradcheck_and_dtypes():
    labels = torch.tensor([0, 3, -100, 2])
    inputs = normal(4, 3).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, labels), inputs)
    x, weight = (p.detach().bfloat16() for p in inputs)
    exact = linear_cross_entropy(x.double(), weight.double(), labels, backend="reference")
    eager = linear_cross_entropy(x, weight, labels, backend="reference")
    assert_within_budget("loss", linear_cross_entropy(x, weight, labels), eager, exact)
    assert eager.dtype == torch.float32


def test_cross_entropy_without_gradients_and_with_other_ignore_index():
    x, weight, labels = normal(6, 3), normal(5, 3, seed=1), torch.tensor([0, 1, 2, 3, 4, 4])
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, labels, ignore_index=4)
    expected = F.cross_entropy(x @ weight.t(), labels, ignore_index=4, reduction="sum")
    torch.testing.assert_close(loss, expected)
    with pytest.raises(InputError, match=r"labels has shape \(6,\), must be \(5,\)"):
        linear_cross_entropy(x[:5], weight, labels)


def test_cross_entropy_of_narrow_inputs_keeps_a_wide_weights_gradient():
    x, weight = normal(40, 8).bfloat16(), normal(11, 8, seed=1).float().requires_grad_()
    bias = normal(11, seed=2).float().requires_grad_()
    labels = torch.randint(0, 11, (40,), generator=torch.Generator().manual_seed(0))
    linear_cross_entropy(x, weight, labels, bias=bias).backward()
    leaves = weight.detach().bfloat16().double(), bias.detach().bfloat16().double()
    for leaf in leaves:
        leaf.requires_grad_()
    loss = linear_cross_entropy(x.double(), leaves[0], labels, bias=leaves[1], backend="reference")
    for actual, exact in zip((weight, bias), torch.autograd.grad(loss, leaves), strict=True):
        assert actual.grad is not None
        assert actual.grad.dtype == torch.float32
        assert relative_error(actual.grad, exact) < 0.02  # the logits' gradient is in bfloat16


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_cross_entropy_beside_a_frozen_input(frozen: int):
    results = []
    labels = torch.tensor([0, 3, -100, 2])
    for backend in ("reference", "torch"):
        leaves = [normal(4, 3), normal(5, 3, seed=1), normal(5, seed=2)]
        kept = [p.requires_grad_() for i, p in enumerate(leaves) if i != frozen]
        loss = linear_cross_entropy(*leaves[:2], labels, bias=leaves[2], backend=backend)  # pyright: ignore
        results.append(torch.autograd.grad(loss, kept))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", available_backends("linear_cross_entropy"))
def test_cross_entropy_of_nan(backend: str):
    """NaN in a counted token is NaN in the loss; in an ignored one it stays there."""
    x, weight = normal(4, 3), normal(5, 3, seed=1)
    x[2] = torch.nan
    labels = torch.tensor([0, 3, -100, 2])
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, labels, backend=backend)  # pyright: ignore
    loss.backward()
    assert x.grad is not None
    assert loss.isfinite()
    assert x.grad[[0, 1, 3]].isfinite().all()
    assert linear_cross_entropy(x, weight, labels.abs() % 5, backend=backend).isnan()  # pyright: ignore


def test_cross_entropy_names_bad_labels():
    x, weight = normal(4, 3), normal(5, 3, seed=1)
    with pytest.raises(InputError, match=r"labels holds 5, must be 0 .. 4 or -100"):
        linear_cross_entropy(x, weight, torch.tensor([0, -100, 5, 1]))
    with pytest.raises(InputError, match=r"labels is torch.int32, must be torch.int64"):
        linear_cross_entropy(x, weight, torch.tensor([0, 1, 2, 1], dtype=torch.int32))


def test_cross_entropy_never_reads_unwritten_memory(nan_filled_memory: None):
    leaves = normal(9, 3).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    labels = torch.tensor([0, 3, -100, 2, 1, 1, -100, 4, 0])
    grads = torch.autograd.grad(linear_cross_entropy(*leaves, labels), leaves)
    assert all(g.isfinite().all() for g in grads)


def test_available_backends():
    assert available_backends("selective_scan") == ("torch", "reference")
    assert available_backends("sinkhorn") == ("reference",)
    with pytest.raises(BackendError, match="operation='scan': must be one of causal_conv1d, "):
        available_backends("scan")


def test_environment_forces_a_backend_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    assert dict(describe_backends())["selective_scan"] == "torch (of torch, reference)"
    monkeypatch.setenv("BLACKMAMBA_BACKEND", "reference")
    assert dict(describe_backends())["selective_scan"] == "reference (of torch, reference)"
    monkeypatch.setenv("BLACKMAMBA_BACKEND", "torch")
    assert dict(describe_backends())["rms_norm"] == "reference (of reference)"
    rms_norm(normal(2, 4), normal(4))
    monkeypatch.setenv("BLACKMAMBA_BACKEND", "gpu")
    with pytest.raises(
        BackendError, match="BLACKMAMBA_BACKEND='gpu': must be one of auto, reference"
    ):
        rms_norm(normal(2, 4), normal(4))


def test_the_choice_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("blackmamba.ops.backend._logged", set())
    args = normal(3, 4), torch.zeros(3, dtype=torch.int64), normal(2, 6, 4), normal(2, 4, 3)
    with caplog.at_level(logging.INFO, logger="blackmamba.ops.backend"):
        expert_mlp(*args)
        expert_mlp(*args)
    assert [r.getMessage() for r in caplog.records] == ["expert_mlp runs as torch"]
