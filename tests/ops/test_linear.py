"""Products: against float64, in the layouts and shapes at which the library changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import relative_error
from torch import Tensor

from blackmamba.errors import InputError
from blackmamba.ops import linear
from blackmamba.ops.backend import available_backends
from blackmamba.ops.linear import onednn, product

BACKENDS = available_backends("linear")


@pytest.fixture(autouse=True)
def _small_products_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onednn, "_LEAST_PRODUCTS", 1)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (0, 3, 5), (7, 33, 65), (300, 130, 12)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_float64(
    backend: str, shape: tuple[int, int, int], biased: bool, dtype: torch.dtype
):
    t, k, n = shape
    inputs = [normal(2, t, k, dtype=dtype), normal(n, k, seed=1, dtype=dtype)]
    if biased:
        inputs.append(normal(n, seed=2, dtype=dtype))
    results = []
    for cast in (dtype, torch.float64):
        leaves = [p.to(cast).requires_grad_() for p in inputs]
        y = linear(*leaves, backend=backend)  # pyright: ignore
        results.append([y.detach(), *torch.autograd.grad(y, leaves, normal(*y.shape).to(cast))])
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 0.02, torch.float64: 1e-13}[dtype]
    for actual, exact in zip(*results, strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, exact) < tolerance


@settings(max_examples=60, deadline=None)
@given(
    t=st.integers(0, 150),
    k=st.integers(1, 150),
    n=st.integers(1, 150),
    layouts=st.tuples(*[st.sampled_from(["rows", "columns", "part", "every other"])] * 2),
)
def test_product_in_any_layout(t: int, k: int, n: int, layouts: tuple[str, str]):
    def laid_out(x: Tensor, layout: str) -> Tensor:
        if layout == "columns":
            return x.t().contiguous().t()
        if layout == "part":
            return torch.cat((x, x), 1)[:, x.shape[1] :]
        return x.repeat_interleave(2, 0)[::2] if layout == "every other" else x

    a, b = normal(t, k), normal(n, k, seed=1)
    actual = product(laid_out(a.float(), layouts[0]), laid_out(b.float(), layouts[1]))
    assert actual.is_contiguous()
    assert actual.shape == (t, n)
    scale = max(1.0, (a @ b.t()).abs().max().item() if t else 1.0)
    assert t == 0 or (actual - a @ b.t()).abs().max() < 5e-6 * scale


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_gradients_beside_a_frozen_input(frozen: int):
    leaves = [normal(*s).float() for s in ((9, 5), (4, 5), (4,))]
    kept = [p.requires_grad_() for i, p in enumerate(leaves) if i != frozen]
    results = [
        torch.autograd.grad(linear(*leaves, backend=b).square().sum(), kept)  # pyright: ignore
        for b in BACKENDS
    ]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_nan_stays_in_its_row_and_precision_is_full():
    x, weight = normal(40, 64).float(), normal(48, 64, seed=1).float()
    x[3, 5] = torch.nan
    y = linear(x, weight)
    assert y.isnan().any(1).nonzero().flatten().tolist() == [3]
    big = normal(64, 512), normal(96, 512, seed=1)
    assert relative_error(product(*(p.float() for p in big)), big[0] @ big[1].t()) < 1e-6


@pytest.mark.parametrize("biased", [True, False])
def test_registered_and_compiles(biased: bool):
    x, weight = normal(2, 3, 5).float().requires_grad_(), normal(4, 5).float().requires_grad_()
    bias = normal(4).float().requires_grad_() if biased else None
    torch.library.opcheck(torch.ops.blackmamba.linear.default, (x, weight, bias))
    compiled = torch.compile(
        lambda x, w: linear(x, w, bias).square().sum(), backend="aot_eager", fullgraph=True
    )
    expected = torch.autograd.grad(linear(x, weight, bias).square().sum(), (x, weight))
    for a, b in zip(torch.autograd.grad(compiled(x, weight), (x, weight)), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"x has shape \(2, 3\), must be \(..., 4\)"):
        linear(normal(2, 3), normal(5, 4))
    with pytest.raises(InputError, match=r"bias has shape \(4,\), must be \(5,\)"):
        linear(normal(2, 4), normal(5, 4), normal(4))
    with pytest.raises(InputError, match=r"weight is torch.float32, must be torch.float64"):
        linear(normal(2, 4), normal(5, 4).float())
