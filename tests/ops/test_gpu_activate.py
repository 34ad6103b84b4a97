"""Triton's kernels of `activate`, step by step on the CPU where there is no GPU."""

from typing import Any

import pytest
import torch
from numerics import largest_difference
from torch import Tensor

from blackmamba.ops import activate, gpu

pytestmark = pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One rounding of a result to its dtype, or float32's few. Where kernels are interpreted, bfloat16
# is cut off, not rounded.
EXACTNESS = {
    torch.float32: 1e-6,
    torch.bfloat16: 2**-7 if gpu.interpreted() else 2**-8,
    torch.float16: 2**-10,
}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape, generator=g)).to(DEVICE, dtype)


def with_gradient(h: Tensor, outer: Tensor, backend: str, activation: str, gated: bool):
    leaf = h.detach().requires_grad_()
    y = activate(leaf, activation, gated, backend=backend)  # pyright: ignore
    return [y.detach(), *torch.autograd.grad(y, leaf, outer.to(y.dtype))]


def assert_exact(h: Tensor, outer: Tensor, activation: str, gated: bool) -> list[Tensor]:
    """Every number within its own rounding of float64's."""
    actual = with_gradient(h, outer, "triton", activation, gated)
    exact = with_gradient(h.double(), outer.double(), "reference", activation, gated)
    for found, wanted in zip(actual, exact, strict=True):
        assert (found.shape, found.dtype) == (wanted.shape, h.dtype)
        # products of numbers up to 12 are exact to float32's rounding of their largest factor
        allowed = EXACTNESS[h.dtype] * wanted.abs() + 3e-6
        assert ((found.double() - wanted).abs() <= allowed).all()
    return actual


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 17), (2, 9, 64), (9, 255), (7, 257), (5, 528)], ids=str
)
@pytest.mark.usefixtures("nan_filled_memory")
def test_matches_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype, activation: str, gated: bool
):
    *leading, f = shape
    h = normal(*leading, 2 * f if gated else f, dtype=dtype)
    outer = normal(*leading, f, dtype=dtype, seed=1)
    first = assert_exact(h, outer, activation, gated)
    again = with_gradient(h, outer, "triton", activation, gated)
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("shape", [(6,), (0, 8), (3, 0)], ids=str)
def test_a_row_and_nothing(shape: tuple[int, ...]):
    h, outer = normal(*shape), normal(*shape[:-1], shape[-1] // 2, seed=1)
    assert_exact(h, outer, "silu", True)


@pytest.mark.parametrize("columns", [slice(None, 24), slice(3, 27), slice(None, None, 2)], ids=str)
def test_memory_may_have_strides(columns: slice):
    h = normal(5, 48)[:, columns]
    outer = normal(1, 12, seed=1).expand(5, 12)
    assert_exact(h, outer, "gelu", True)
    assert_exact(h, normal(5, 48, seed=1)[:, columns], "silu", False)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's: infinity is meant
def test_large_numbers_are_kept_and_nan_stays_in_its_place():
    g = torch.tensor([-1e30, -200.0, -100.0, 0.0, 100.0, 1e30], device=DEVICE)
    for activation in ("silu", "gelu"):
        y, slope = with_gradient(g, torch.ones_like(g), "triton", activation, False)
        assert torch.equal(y, g.relu())
        assert torch.equal(slope, torch.tensor([0, 0, 0, 0.5, 1, 1], device=DEVICE))
    h = normal(5, 40)
    h[2, 3], h[4, 25] = torch.nan, torch.nan
    y, grad_h = with_gradient(h, normal(5, 20), "triton", "silu", True)
    assert y.isnan().nonzero().tolist() == [[2, 3], [4, 5]]
    assert grad_h.isnan().nonzero().tolist() == [[2, 3], [2, 23], [4, 5]]


def test_numbers_of_places_may_need_64_bits(monkeypatch: pytest.MonkeyPatch):
    h, outer = normal(5, 48, dtype=torch.float16), normal(5, 24, dtype=torch.float16, seed=1)
    usual = with_gradient(h, outer, "triton", "silu", True)
    options: list[bool] = []

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **rest: Any) -> None:
        options.append(rest["LONG"])
        kernel[grid](*args, **rest | {"LONG": True})

    monkeypatch.setattr(gpu, "launch", launch)
    assert all(map(torch.equal, usual, with_gradient(h, outer, "triton", "silu", True)))
    assert options == [False, False]


def test_a_row_does_not_depend_on_its_neighbours():
    h = normal(37, 90, dtype=torch.bfloat16)
    whole = activate(h, backend="triton")
    assert torch.equal(activate(h[5:6], backend="triton"), whole[5:6])
    assert largest_difference(whole, activate(h.double())) < 1


@pytest.mark.parametrize("gated", [True, False])
def test_is_registered_as_torch_wants_it(gated: bool):
    op = torch.ops.blackmamba.activate_triton.default
    torch.library.opcheck(op, (normal(2, 3, 8).requires_grad_(), True, gated))
