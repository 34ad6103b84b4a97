"""Rotary positions: against the definition, by every implementation that can run here."""

import pytest
import torch
from numerics import assert_within_budget
from torch import Tensor

from blackmamba.errors import InputError
from blackmamba.ops import gpu, rotary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", *(["triton"] if gpu.missing() is None else [])]
SHAPES = [(1, 1, 1, 2), (2, 5, 3, 6), (3, 7, 2, 64), (2, 70, 1, 32), (0, 3, 2, 4)]


def make(shape: tuple[int, ...], dtype: torch.dtype, rows: int) -> list[Tensor]:
    """x in bfloat16's numbers, and tables."""
    g = torch.Generator().manual_seed(0)
    _, l, _, h = shape
    x = torch.randn(shape, generator=g).bfloat16().to(DEVICE, dtype)
    angles = torch.randn(rows, l, h // 2, generator=g).to(DEVICE) * 100
    return [x, angles.cos(), angles.sin()]


def with_gradient(x: Tensor, cos: Tensor, sin: Tensor, backend: str) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = rotary(leaf, cos, sin, backend=backend)  # pyright: ignore
    outer = torch.linspace(-2, 3, y.numel(), dtype=torch.float64).bfloat16().view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, leaf, outer.to(y))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_shared", [True, False])
def test_matches_the_definition(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], is_shared: bool
):
    inputs = make(shape, dtype, 1 if is_shared else shape[0])
    exact = with_gradient(*(t.double() for t in inputs), "reference")
    eager = with_gradient(*inputs, "reference")
    actual = with_gradient(*inputs, backend)
    for name, *results in zip(("y", "x"), actual, eager, exact, strict=True):
        if gpu.interpreted() and dtype == torch.bfloat16:  # it cuts bfloat16 off
            assert largest(results[0], results[2]) <= 2**-7 * largest(results[2])
        else:
            assert_within_budget(name, *results)


def largest(x: Tensor, y: Tensor | None = None) -> float:
    difference = x.double() if y is None else x.double() - y
    return difference.abs().max().item() if x.numel() else 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_of_a_product_need_not_be_contiguous(backend: str):
    x, cos, sin = make((2, 5, 4, 8), torch.float32, 1)
    whole = rotary(x, cos, sin, backend=backend)  # pyright: ignore
    part = rotary(x[:, :, 1:3], cos, sin, backend=backend)  # pyright: ignore
    assert torch.equal(part, whole[:, :, 1:3])


def test_turning_keeps_lengths_and_tells_distances():
    x, _, _ = make((1, 1, 1, 8), torch.float64, 1)
    angles = torch.arange(6.0)[None, :, None] * torch.tensor([1.0, 0.5, 0.1, 0.01])
    turned = rotary(x.expand(1, 6, 1, 8), angles.cos().to(x), angles.sin().to(x))[0, :, 0]
    products = turned @ turned.T
    for distance in range(6):  # of two places nothing else counts
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton here")
def test_is_registered_as_torch_wants_it():
    x, cos, sin = make((2, 3, 2, 8), torch.float32, 2)
    op = torch.ops.blackmamba.rotary_triton.default
    torch.library.opcheck(op, (x.requires_grad_(), cos, sin, False))


def test_bad_input_is_named():
    x, cos, sin = make((2, 3, 2, 8), torch.float32, 2)
    with pytest.raises(InputError, match=r"cos has shape \(2, 3, 3\), x \(2, 3, 2, 8\)"):
        rotary(x, cos[..., :3], sin)
    with pytest.raises(InputError, match="h even"):
        rotary(x[..., :7], cos[..., :3], sin[..., :3])
    with pytest.raises(InputError, match=r"cos has shape \(2, 3, 4\), sin \(1, 3, 4\)"):
        rotary(x, cos, sin[:1])
    with pytest.raises(InputError, match=r"cos is torch.int64"):
        rotary(x, cos.long(), sin)
