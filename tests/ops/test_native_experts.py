"""The native experts for a few tokens against the float64 definition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import relative_error

from blackmamba.ops import expert_mlp, native

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

sizes = st.integers(1, 257)


def arguments(t: int, e: int, m: int, f: int, *, dtype=torch.float32, gated=True, biases=True):
    generator = torch.Generator().manual_seed(t + 7 * e + 13 * m + 31 * f)

    def normal(*shape: int, scale: float = 1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    rows = 2 * f if gated else f
    x = normal(t, m)
    ids = torch.randint(0, e, (t,), generator=generator)
    fc1, fc2 = normal(e, rows, m, scale=m**-0.5), normal(e, m, f, scale=f**-0.5)
    extra = {"gate": torch.rand(t, generator=generator)}
    if biases:
        extra |= {"fc1_bias": normal(e, rows), "fc2_bias": normal(e, m)}
    return (x, ids, fc1, fc2), extra


def exact(inputs, extra, **options):
    x, ids, fc1, fc2 = inputs
    wide = {name: t.double() for name, t in extra.items()}
    return expert_mlp(
        x.double(), ids, fc1.double(), fc2.double(), **wide, **options, backend="reference"
    )


@given(
    t=st.integers(0, 16),
    e=st.integers(1, 9),
    m=sizes,
    f=sizes,
    gated=st.booleans(),
    biases=st.booleans(),
    narrow=st.booleans(),
    activation=st.sampled_from(("silu", "gelu")),
)
@torch.no_grad()
def test_matches_meaning(t, e, m, f, gated, biases, narrow, activation):
    dtype = torch.bfloat16 if narrow else torch.float32
    inputs, extra = arguments(t, e, m, f, dtype=dtype, gated=gated, biases=biases)
    options = {"activation": activation, "gated": gated}
    y = expert_mlp(*inputs, **extra, **options, backend="native")
    assert y.dtype == dtype
    assert relative_error(y, exact(inputs, extra, **options)) < (4e-3 if narrow else 5e-6)


@torch.no_grad()
def test_strided_input_and_wide_weights_under_narrow_activations():
    (x, ids, fc1, fc2), extra = arguments(5, 3, 40, 33)
    wanted = exact((x, ids, fc1, fc2), extra)
    spread = torch.full((5, 3, 40), math.nan)
    spread[:, 1] = x
    assert relative_error(expert_mlp(spread[:, 1], ids, fc1, fc2, **extra), wanted) < 5e-6
    narrow = expert_mlp(x.bfloat16(), ids, fc1, fc2, **extra)
    assert narrow.dtype == torch.bfloat16
    assert relative_error(narrow, wanted) < 2e-2


@torch.no_grad()
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_stay_with_their_token(bad: float):
    inputs, extra = arguments(4, 2, 20, 12)
    inputs[0][1, 3] = bad
    y = expert_mlp(*inputs, **extra)
    assert y[1].isnan().any()
    assert y[[0, 2, 3]].isfinite().all()


@torch.no_grad()
def test_threads_and_neighbours_do_not_change_a_bit():
    (x, ids, fc1, fc2), extra = arguments(13, 4, 129, 200)
    expected = expert_mlp(x, ids, fc1, fc2, **extra)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(expert_mlp(x, ids, fc1, fc2, **extra), expected)
    finally:
        torch.set_num_threads(before)
    extra["gate"] = extra["gate"][4:5]
    assert torch.equal(expert_mlp(x[4:5], ids[4:5], fc1, fc2, **extra)[0], expected[4])


def test_gradients_flow_where_they_are_wanted():
    inputs, extra = arguments(3, 2, 8, 8)
    inputs[2].requires_grad_()
    expert_mlp(*inputs, **extra, backend="native").sum().backward()
    assert inputs[2].grad is not None


@torch.no_grad()
def test_registered_as_torch_wants_it():
    inputs, extra = arguments(3, 2, 8, 6)
    gate = extra.pop("gate")
    operation = torch.ops.blackmamba.expert_mlp_few_tokens
    torch.library.opcheck(operation, (*inputs, *extra.values(), gate, True, False))
    compiled = torch.compile(expert_mlp, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs, gate=gate), expert_mlp(*inputs, gate=gate))
