"""The activation of experts and dense layers: against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_within_budget, relative_error
from torch import Tensor
from torch.nn import functional as F

from blackmamba.errors import InputError
from blackmamba.ops import activate
from blackmamba.ops.backend import available_backends

BACKENDS = available_backends("activate")
NATIVE = pytest.mark.skipif("native" not in BACKENDS, reason="the extension was not built")


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return (3 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)


def with_gradient(h: Tensor, activation: str, gated: bool, backend: str) -> list[Tensor]:
    leaf = h.detach().requires_grad_()
    y = activate(leaf, activation, gated, backend=backend)  # pyright: ignore
    outer = normal(*y.shape).bfloat16().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaf, outer)]


def test_definition():
    h = normal(2, 3, 8)
    g, u = h[..., :4], h[..., 4:]
    assert torch.equal(activate(h), F.silu(g) * u)
    assert torch.equal(activate(h, "gelu"), F.gelu(g) * u)
    assert torch.equal(activate(h, gated=False), F.silu(h))


@NATIVE
@settings(max_examples=60, deadline=None)
@given(
    t=st.integers(0, 70),
    f=st.integers(0, 257),
    strided=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    activation=st.sampled_from(["silu", "gelu"]),
    gated=st.booleans(),
)
def test_native_is_as_near_as_plain_pytorch(
    t: int, f: int, strided: bool, dtype: torch.dtype, activation: str, gated: bool
):
    w = 2 * f if gated else f
    h = normal(t, 2 * w, dtype=dtype)[:, w:] if strided else normal(t, w, dtype=dtype)
    exact = with_gradient(h.double(), activation, gated, "reference")
    eager = with_gradient(h, activation, gated, "reference")
    actual = with_gradient(h, activation, gated, "native")
    for name, *results in zip(("y", "h"), actual, eager, exact, strict=True):
        if dtype == torch.bfloat16:
            assert_within_budget(name, *results)
        else:
            assert relative_error(results[0], results[2]) < 1e-6, name


@NATIVE
def test_native_gelu_bound():
    """The probability inside GELU is off by at most 3e-7, on the whole line."""
    x = torch.cat((torch.linspace(-15, 15, 400_001), torch.tensor([-1e30, -90.0, 90.0, 1e30])))
    exact = F.gelu(x.double())
    error = (activate(x, "gelu", gated=False, backend="native").double() - exact).abs()
    assert (error <= 3e-7 * x.abs()).all()


@NATIVE
def test_native_bits_on_any_number_of_threads():
    h, results = normal(90, 700, dtype=torch.float32), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(with_gradient(h, "silu", True, "native"))
    torch.set_num_threads(1)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


@NATIVE
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_native_keeps_nan_to_its_place(activation: str):
    h = normal(5, 40, dtype=torch.float32)
    h[2, 3], h[4, 25] = torch.nan, torch.nan
    y, grad_h = with_gradient(h, activation, True, "native")
    assert y.isnan().nonzero().tolist() == [[2, 3], [4, 5]]
    assert grad_h.isnan().nonzero().tolist() == [[2, 3], [2, 23], [4, 5]]


@NATIVE
@pytest.mark.parametrize("gated", [True, False])
def test_native_is_registered_as_torch_wants_it(gated: bool):
    op = torch.ops.blackmamba.activate.default
    torch.library.opcheck(op, (normal(2, 3, 8, dtype=torch.float32).requires_grad_(), True, gated))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(backend: str):
    h = normal(3, 8, dtype=torch.float32).requires_grad_()

    def loss(h: Tensor) -> Tensor:
        return activate(h, backend=backend).square().sum()  # pyright: ignore

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(h), h), torch.autograd.grad(loss(h), h))


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"h has shape \(2, 3\), must be \(..., 2f\)"):
        activate(normal(2, 3))
    with pytest.raises(InputError, match=r"h has shape \(\), must be \(..., f\)"):
        activate(normal(), gated=False)
    with pytest.raises(InputError, match=r"activation='relu'"):
        activate(normal(2, 4), "relu")  # pyright: ignore
    with pytest.raises(InputError, match=r"h is torch.int64"):
        activate(normal(2, 4).long())
