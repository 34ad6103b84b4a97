"""The router's product: the kernels against float64."""

import pytest
import torch
from numerics import largest_difference

from blackmamba.errors import BackendError, InputError
from blackmamba.ops import gpu, native, router_choice, router_logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE)


def logits_and_gradients(inputs: tuple[torch.Tensor, ...], backend: str) -> list[torch.Tensor]:
    leaves = [p.detach().requires_grad_() for p in inputs]
    y = router_logits(*leaves, backend=backend)  # pyright: ignore
    return [y.detach(), *torch.autograd.grad(y, leaves, normal(*y.shape, seed=9).to(y.dtype))]


@TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("t", "m", "e"), [(0, 8, 3), (1, 1, 1), (7, 70, 8), (130, 64, 17), (200, 33, 4)]
)
def test_is_as_near_as_its_dtype(
    t: int, m: int, e: int, dtype: torch.dtype, nan_filled_memory: None
):
    inputs = normal(t, 2 * m).to(dtype)[:, ::2], normal(e, m, seed=1).float(), normal(e).float()
    actual = logits_and_gradients(inputs, "triton")
    eager = logits_and_gradients(inputs, "reference")
    exact = logits_and_gradients(tuple(p.double() for p in inputs), "reference")
    for name, *values in zip(("y", "x", "weight", "bias"), actual, eager, exact, strict=True):
        assert (values[0].dtype, values[0].shape) == (values[1].dtype, values[1].shape), name
        if values[0].numel():
            # sums of float32 products; the interpreter cuts bfloat16 off
            rounding = 2 * torch.finfo(values[0].dtype).eps
            error = largest_difference(values[0], values[2])
            assert error <= rounding * 4 * max(1.0, values[2].abs().max().item()), name
    assert all(map(torch.equal, actual, logits_and_gradients(inputs, "triton")))


@TRITON
@pytest.mark.parametrize(("t", "m", "e"), [(0, 8, 3), (1, 1, 1), (70, 70, 8), (33, 64, 17)])
def test_the_choice_is_of_the_largest_logit(t: int, m: int, e: int, nan_filled_memory: None):
    x, weight, bias = normal(t, m).bfloat16(), normal(e, m, seed=1).float(), normal(e).float()
    if t > 2:
        weight[:: e - 1], bias[:: e - 1] = 0, 12  # two equals, which no BLAS can round apart
        x[1] = torch.nan
    logits, expert_ids, gate = router_choice(x, weight, bias, backend="triton")
    assert torch.equal(
        logits.nan_to_num(), router_logits(x, weight, bias, backend="triton").nan_to_num()
    )
    assert expert_ids.dtype == torch.int64
    assert gate.dtype == torch.float32
    assert bool(((expert_ids >= 0) & (expert_ids < e)).all())
    real = ~logits.isnan().any(1)
    assert torch.equal(expert_ids[real], logits[real].argmax(1))
    assert t <= 2 or expert_ids[real].bincount(minlength=e)[[0, -1]].sign().tolist() == [1, 0]
    expected = torch.sigmoid(logits[real].amax(1)) if real.any() else gate
    torch.testing.assert_close(gate[real], expected, rtol=1e-6, atol=0)
    if t:
        with pytest.raises(BackendError, match="no gradient"):
            router_choice(x, weight.requires_grad_(), bias, backend="triton")
    _, plain_ids, plain_gate = router_choice(x[real], weight.detach(), bias, backend="reference")
    torch.testing.assert_close((expert_ids[real], gate[real]), (plain_ids, plain_gate))


@TRITON
def test_registration_and_many_experts():
    x, weight, bias = normal(5, 9).bfloat16(), normal(3, 9).float(), normal(3).float()
    for leaf in (x, weight, bias):
        leaf.requires_grad_()
    torch.library.opcheck(torch.ops.blackmamba.router_logits_triton.default, (x, weight, bias))
    fixed = tuple(leaf.detach() for leaf in (x, weight, bias))
    torch.library.opcheck(
        torch.ops.blackmamba.router_choice_triton.default,
        fixed,
        test_utils=("test_schema", "test_faketensor"),
    )
    many = normal(100, 9).float(), normal(100).float()
    expected = router_logits(x, *many, backend="reference")
    assert torch.equal(router_logits(x, *many, backend="triton"), expected)


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"weight has shape \(3, 4\), must be \(3, 5\)"):
        router_logits(normal(2, 5), normal(3, 4), normal(3))
    x, weight = normal(2, 5), normal(3, 5)
    assert router_logits(x.float(), weight, normal(3)).dtype == torch.float64


NATIVE = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("t", "m", "e"), [(0, 8, 3), (1, 1, 1), (7, 70, 8), (129, 64, 17), (4100, 33, 4)]
)
def test_native_is_as_near_as_its_dtype(
    t: int, m: int, e: int, dtype: torch.dtype, nan_filled_memory: None
):
    g = torch.Generator().manual_seed(0)
    wide = [torch.randn(shape, generator=g).double() for shape in ((t, 2 * m), (e, m), (e,))]
    inputs = (wide[0].to(dtype)[:, ::2], wide[1].float(), wide[2].float())
    exact = cpu_gradients(tuple(p.double() for p in inputs), "reference")
    eager = cpu_gradients(inputs, "reference")
    found = []
    for n in (1, 3):
        torch.set_num_threads(n)
        found.append(cpu_gradients(inputs, "native"))
    torch.set_num_threads(1)
    assert all(map(torch.equal, *found))
    sums = (m, e, t, t)  # terms of each; float32's error grows with their root
    names = ("y", "x", "weight", "bias")
    for name, n, *values in zip(names, sums, found[0], eager, exact, strict=True):
        assert (values[0].dtype, values[0].shape) == (values[1].dtype, values[1].shape), name
        if values[0].numel():
            error = largest_difference(values[0], values[2])
            sizes = max(1.0, values[2].abs().max().item())
            rounding = torch.finfo(values[0].dtype).eps / 2 * sizes
            assert error <= rounding + 2**-24 * 8 * max(1, n) ** 0.5 * sizes, name


def cpu_gradients(inputs: tuple[torch.Tensor, ...], backend: str) -> list[torch.Tensor]:
    leaves = [p.detach().requires_grad_() for p in inputs]
    y = router_logits(*leaves, backend=backend)  # pyright: ignore
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


@NATIVE
def test_native_keeps_nan_and_leaves_the_rest_to_the_definition():
    x, weight, bias = torch.randn(70, 20).bfloat16(), torch.randn(5, 20), torch.randn(5)
    x[3, 4] = torch.nan
    y, grad_x, *_ = cpu_gradients((x, weight, bias), "native")
    others = torch.arange(70) != 3
    assert y[3].isnan().all()
    assert y[others].isfinite().all()
    assert grad_x.isfinite().all()
    # weights that are not float32, and what torch.compile sees
    narrow = router_logits(x[:2], weight.bfloat16(), bias.bfloat16(), backend="native")
    assert torch.equal(narrow, router_logits(x[:2], weight.bfloat16(), bias.bfloat16()))
    assert narrow.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(router_logits(x, weight, bias)[others], y[others])
