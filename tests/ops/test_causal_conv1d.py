"""The causal convolution: against torch's own in float64, and its memory."""

import pytest
import torch
from numerics import assert_within_budget, relative_error
from torch import Tensor
from torch.nn import functional as F

from blackmamba.errors import InputError
from blackmamba.ops import causal_conv1d
from blackmamba.ops.backend import available_backends

BACKENDS = available_backends("causal_conv1d")


def make(b: int, l: int, d: int, k: int, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (b, l, d), "weight": (d, k), "bias": (d,), "initial_state": (b, d, k - 1)}
    return {
        name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def exact(x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor) -> Tensor:
    """torch's convolution with the memory in front."""
    seen = torch.cat((initial_state, x.transpose(1, 2)), 2)
    return F.silu(F.conv1d(seen, weight[:, None], bias, groups=len(weight))).transpose(1, 2)


@pytest.mark.parametrize("k", [1, 2, 4, 5])
@pytest.mark.parametrize("l", [1, 2, 3, 4, 63, 64, 65, 1000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_torch_in_float64_and_float32(backend: str, l: int, k: int):
    inputs = make(2, l, 5, k)
    expected = exact(**inputs)
    y, state = causal_conv1d(**inputs, backend=backend)  # pyright: ignore
    assert relative_error(y, expected) < 1e-13
    seen = torch.cat((inputs["initial_state"], inputs["x"].transpose(1, 2)), 2)
    assert torch.equal(state, seen[:, :, seen.shape[2] - (k - 1) :])
    y, _ = causal_conv1d(**make(2, l, 5, k, torch.float32), backend=backend)  # pyright: ignore
    assert relative_error(y, expected) < 1e-5


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, activation: str):
    inputs = [v.requires_grad_() for v in make(2, 5, 3, 4).values()]

    def conv(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor):
        return causal_conv1d(
            x,
            weight,
            bias,
            initial_state=state,
            activation=activation,
            backend=backend,  # pyright: ignore
        )

    assert torch.autograd.gradcheck(conv, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_as_near_as_plain_pytorch(backend: str):
    narrow = make(2, 40, 5, 4, torch.bfloat16)
    reference = causal_conv1d(**narrow, backend="reference")[0]  # pyright: ignore
    actual = causal_conv1d(**narrow, backend=backend)[0]  # pyright: ignore
    assert_within_budget(
        "y", actual, reference, exact(**{k: v.double() for k, v in narrow.items()})
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_equal_the_whole(backend: str):
    inputs = make(2, 9, 3, 4)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    whole, last = causal_conv1d(x, weight, bias, backend=backend)  # pyright: ignore
    state, parts = None, []
    for start, stop in ((0, 1), (1, 3), (3, 3), (3, 9)):
        y, state = causal_conv1d(
            x[:, start:stop], weight, bias, initial_state=state, backend=backend
        )  # pyright: ignore
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert torch.equal(state, last)


def test_padded_rows_remember_their_last_real_inputs():
    inputs = make(5, 6, 3, 4)
    lengths = torch.tensor([0, 1, 2, 4, 6])
    _, state = causal_conv1d(**inputs, lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        seen = torch.cat((inputs["initial_state"][row], inputs["x"][row, :n].t()), 1)
        assert torch.equal(state[row], seen[:, n:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_bias_empty_batch_strides_and_bits(backend: str):
    inputs = make(2, 7, 4, 4)
    y, _ = causal_conv1d(inputs["x"], inputs["weight"], backend=backend)  # pyright: ignore
    zero = torch.zeros_like(inputs["bias"]), torch.zeros_like(inputs["initial_state"])
    torch.testing.assert_close(y, exact(inputs["x"], inputs["weight"], *zero))
    assert causal_conv1d(inputs["x"][:0], inputs["weight"], backend=backend)[0].shape == (0, 7, 4)  # pyright: ignore
    wide = torch.cat((inputs["x"], inputs["x"]), 2)[:, :, :4]
    again, _ = causal_conv1d(wide, inputs["weight"], backend=backend)  # pyright: ignore
    assert torch.equal(y, again)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_the_next_inputs_of_its_channel_only(backend: str):
    inputs = make(2, 9, 3, 4)
    inputs["x"][0, 4, 1] = torch.nan
    y, _ = causal_conv1d(**inputs, backend=backend)  # pyright: ignore
    assert y.isnan().nonzero().tolist() == [[0, t, 1] for t in range(4, 8)]


def test_every_gradient_in_bfloat16_is_as_near_as_plain_pytorch():
    def gradients(inputs: dict[str, Tensor], backend: str) -> list[Tensor]:
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        y, _ = causal_conv1d(**leaves, backend=backend)  # pyright: ignore
        return list(torch.autograd.grad(y.square().sum(), list(leaves.values())))

    narrow = make(2, 40, 5, 4, torch.bfloat16)
    exact = gradients({k: v.double() for k, v in narrow.items()}, "reference")
    for name, *results in zip(
        narrow, gradients(narrow, "torch"), gradients(narrow, "reference"), exact, strict=True
    ):
        assert_within_budget(f"grad_{name}", *results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unwritten_memory_is_never_read(backend: str, nan_filled_memory: None):
    leaves = [v.requires_grad_() for v in make(2, 9, 3, 4).values()]
    y, state = causal_conv1d(*leaves[:3], initial_state=leaves[3], backend=backend)  # pyright: ignore
    grads = torch.autograd.grad(y.sum() + state.sum(), leaves)
    assert all(t.isfinite().all() for t in (y, state, *grads))


# torch 2.13 instantiates autograd functions itself while it traces them
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_to_one_graph():
    inputs = make(2, 9, 3, 4, torch.float32)
    compiled = torch.compile(causal_conv1d, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(**inputs), causal_conv1d(**inputs), strict=True):
        torch.testing.assert_close(actual, expected)


def test_bad_input_is_named():
    inputs = make(2, 5, 3, 4)
    with pytest.raises(InputError, match=r"weight has shape \(2, 4\), must be \(3, 4\)"):
        causal_conv1d(inputs["x"], inputs["weight"][:2])
    with pytest.raises(InputError, match=r"activation='relu'"):
        causal_conv1d(inputs["x"], inputs["weight"], activation="relu")  # pyright: ignore
    with pytest.raises(InputError, match=r"lengths has shape \(3,\), must be \(2,\)"):
        causal_conv1d(inputs["x"], inputs["weight"], lengths=torch.tensor([1, 2, 3]))
    for wrong in (-1, 6):
        with pytest.raises(InputError, match=rf"lengths holds {wrong}, must be 0 .. 5"):
            causal_conv1d(inputs["x"], inputs["weight"], lengths=torch.tensor([2, wrong]))
    with pytest.raises(InputError, match=r"lengths is torch.float32, must be torch.int64"):
        causal_conv1d(inputs["x"], inputs["weight"], lengths=torch.tensor([2.0, 3.0]))
    with pytest.raises(InputError, match=r"weight has shape \(3, 0\), k must be at least 1"):
        causal_conv1d(inputs["x"], inputs["weight"][:, :0])
    with pytest.raises(InputError, match=r"bias is torch.int64"):
        causal_conv1d(inputs["x"], inputs["weight"], inputs["bias"].long())
