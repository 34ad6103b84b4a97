"""The convolution's Triton kernels: interpreted, or on the GPU where there is one."""

import pytest
import torch
from numerics import assert_within_budget, relative_error
from torch import Tensor

from blackmamba.ops import causal_conv1d, gpu

pytestmark = pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(b: int, l: int, d: int, k: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (b, l, d), "weight": (d, k), "bias": (d,), "initial_state": (b, d, k - 1)}
    return {
        name: torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE, dtype)
        for name, shape in shapes.items()
    }


def documents(b: int, l: int) -> Tensor:
    g = torch.Generator().manual_seed(3)
    return (torch.rand(b, l, generator=g) < 0.2).cumsum(1).to(DEVICE)


def with_gradients(
    inputs: dict[str, Tensor],
    backend: str,
    seq_idx: Tensor | None = None,
    activation: str = "silu",
) -> dict[str, Tensor]:
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    y, state = causal_conv1d(**leaves, seq_idx=seq_idx, activation=activation, backend=backend)  # pyright: ignore
    g = torch.Generator().manual_seed(7)
    weighting = torch.randn(y.shape, generator=g, dtype=torch.float64)
    (y * weighting.to(y)).sum().backward()
    grads = {f"grad_{k}": v.grad for k, v in leaves.items() if v.grad is not None}
    return {"y": y.detach(), "state": state.detach()} | grads


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("marked", [False, True], ids=["", "documents"])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 4), (2, 2, 5, 4), (1, 3, 130, 1), (2, 63, 3, 4), (2, 70, 3, 4), (1, 66, 3, 7)],
    ids=str,
)
def test_float32_is_near_float64(shape: tuple[int, int, int, int], marked: bool, activation: str):
    seq_idx = documents(*shape[:2]) if marked else None
    exact = with_gradients(make(*shape), "reference", seq_idx, activation)
    actual = with_gradients(make(*shape, dtype=torch.float32), "triton", seq_idx, activation)
    assert actual.keys() == exact.keys()
    for name in exact:
        assert relative_error(actual[name], exact[name]) < 2e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_is_as_near_as_plain_pytorch(dtype: torch.dtype):
    narrow = make(2, 70, 5, 4, dtype)
    exact = with_gradients({k: v.double() for k, v in narrow.items()}, "reference")
    eager, actual = (with_gradients(narrow, backend) for backend in ("reference", "triton"))
    for name in exact:
        assert_within_budget(name, actual[name], eager[name], exact[name])


@pytest.mark.parametrize("left_out", ["bias", "initial_state"])
def test_optional_inputs(left_out: str):
    inputs = {k: v for k, v in make(2, 9, 3, 4).items() if k != left_out}
    exact = with_gradients(inputs, "reference")
    actual = with_gradients({k: v.float() for k, v in inputs.items()}, "triton")
    assert actual.keys() == exact.keys()
    for name in exact:
        assert relative_error(actual[name], exact[name]) < 2e-6, name


def test_empty_strided_and_repeated():
    for shape in ((0, 5, 3, 4), (2, 0, 3, 4)):
        actual = with_gradients(make(*shape, dtype=torch.float32), "triton")
        assert actual["y"].shape == shape[:3]
        assert not actual["grad_weight"].any()
    inputs = make(2, 20, 6, 4, dtype=torch.float32)
    strided = {k: v.repeat_interleave(2, dim=-1)[..., ::2] for k, v in inputs.items()}
    wider = {k: torch.cat((v, v), -1)[..., : v.shape[-1]] for k, v in inputs.items()}
    first = with_gradients(inputs, "triton")
    for other in (inputs, strided, wider):
        again = with_gradients(other, "triton")
        for name in first:
            assert torch.equal(first[name], again[name]), name  # the same bits


def test_unwritten_memory_is_never_read(nan_filled_memory: None):
    for name, value in with_gradients(make(2, 70, 5, 4, torch.float32), "triton").items():
        assert value.isfinite().all(), name


def test_nan_reaches_the_next_inputs_of_its_channel_only():
    inputs = make(2, 9, 3, 4, torch.float32)
    inputs["x"][0, 4, 1] = torch.nan
    y, _ = causal_conv1d(**inputs, backend="triton")  # pyright: ignore
    assert y.isnan().nonzero().tolist() == [[0, t, 1] for t in range(4, 8)]


@pytest.mark.parametrize("absent", [False, True])
def test_registered_as_torch_wants_it(absent: bool):
    x, weight, bias, before = (v.requires_grad_() for v in make(2, 5, 3, 4, torch.float32).values())
    operation = torch.ops.blackmamba.causal_conv1d_gpu.default
    rest = (None, None, None) if absent else (bias, before, documents(2, 5))
    torch.library.opcheck(operation, (x, weight, *rest, True))
