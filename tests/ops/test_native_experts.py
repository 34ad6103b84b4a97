"""The native experts for a few tokens against the float64 definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_within_budget, relative_error

from blackmamba.ops import expert_mlp, native
from blackmamba.ops.backend import Backend
from blackmamba.ops.expert_mlp.native_pairs import expert_mlp_native_pairs

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


def direction(y: torch.Tensor) -> torch.Tensor:
    """A gradient of y that is the same however y was rounded."""
    return torch.arange(y.numel()).cos().to(y.dtype).view_as(y)


def pairs(inputs, n_threads: int, k: int, **options) -> list[torch.Tensor]:
    """Output and gradients of x, fc1, fc2 and gate by the products of bfloat16, (t k,) choices."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        (x, ids, fc1, fc2), gate = inputs
        learnt = [t.clone().requires_grad_() for t in (x, fc1, fc2, gate)]
        y = expert_mlp_native_pairs(learnt[0], ids, *learnt[1:3], **options, gate=learnt[3])
        y = y.view(len(x), k, -1).float().sum(1)
        return [y.detach(), *torch.autograd.grad(y, learnt, direction(y))]
    finally:
        torch.set_num_threads(before)


def meaning(inputs, dtype: torch.dtype, backend: Backend, k: int, **options):
    """The same by another backend, in another dtype."""
    (x, ids, fc1, fc2), gate = inputs
    learnt = [t.to(dtype).requires_grad_() for t in (x, fc1, fc2)] + [
        gate.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    ]
    y = expert_mlp(
        learnt[0], ids.view(-1, k), *learnt[1:3], **options, gate=learnt[3].view(-1, k),
        backend=backend,
    ).to(learnt[3].dtype)  # fmt: skip
    return [y.detach(), *torch.autograd.grad(y, learnt, direction(y))]


@given(
    t=st.integers(1, 130),
    e=st.integers(1, 9),
    m=st.integers(1, 70),
    f=st.integers(1, 70),
    k=st.integers(1, 3),
    gated=st.booleans(),
    activation=st.sampled_from(("silu", "gelu")),
)
@settings(max_examples=15)
def test_products_of_pairs_match_meaning(t, e, m, f, k, gated, activation):
    (x, _, fc1, fc2), _ = arguments(
        t, e, 2 * m, 2 * f, dtype=torch.bfloat16, gated=gated, biases=False
    )
    generator = torch.Generator().manual_seed(t)
    ids = torch.randint(0, e, (t * k,), generator=generator)
    inputs = (x, ids, fc1, fc2), torch.rand(t * k, generator=generator)
    options = {"activation": activation, "gated": gated}
    actual = pairs(inputs, 2, k, **options)
    for one, two in zip(actual, pairs(inputs, 1, k, **options), strict=True):
        assert torch.equal(one, two)
    exact_ = meaning(inputs, torch.float64, "reference", k, **options)
    eager = meaning(inputs, torch.bfloat16, "torch", k, **options)
    for name, a, b, c in zip(("y", "x", "fc1", "fc2", "gate"), actual, eager, exact_, strict=True):
        assert_within_budget(name, a.bfloat16(), b.bfloat16(), c)


def test_products_of_pairs_longer_than_a_task_in_strided_memory():
    """A group of 301 tokens, an idle expert, more columns and rows than a task has."""
    (x, _, fc1, fc2), extra = arguments(301, 3, 150, 84, dtype=torch.bfloat16, biases=False)
    spread = torch.full((301, 2, 150), math.nan, dtype=torch.bfloat16)
    spread[:, 1] = x
    ids = torch.full((301,), 2)
    ids[7] = 0
    options = {"activation": "silu", "gated": True}
    inputs = (spread[:, 1], ids, fc1, fc2), extra["gate"]
    exact_ = meaning(inputs, torch.float64, "reference", 1, **options)
    actual = pairs(inputs, 2, 1, **options)
    for a, b in zip(actual, exact_, strict=True):
        assert relative_error(a, b) < 1e-2
    assert not actual[2][1].any()
    assert not actual[3][1].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_pairs_keep_nan_and_infinity(bad: float):
    (x, ids, fc1, fc2), extra = arguments(70, 2, 20, 12, dtype=torch.bfloat16, biases=False)
    x[1, 3] = bad
    options = {"activation": "silu", "gated": True}
    y, grad_x, *_ = pairs(((x, ids, fc1, fc2), extra["gate"]), 1, 1, **options)
    assert not y[1].isfinite().all()
    others = torch.arange(70) != 1
    assert y[others].isfinite().all()
    assert grad_x[others].isfinite().all()


@pytest.mark.skipif(
    native.missing() is not None or not native.extension().multiplies_pairs(),
    reason="the processor has no instruction for pairs of bfloat16",
)
def test_training_takes_products_of_pairs():
    (x, ids, fc1, fc2), extra = arguments(64, 3, 16, 8, dtype=torch.bfloat16, biases=False)
    x.requires_grad_()
    assert "expert_mlp_pairs" in str(expert_mlp(x, ids, fc1, fc2, **extra).grad_fn)
    torch.library.opcheck(
        torch.ops.blackmamba.expert_mlp_pairs.default,
        (x.detach()[:32], ids, fc1, fc2, None, True, True),  # 2 choices a token
        test_utils=("test_schema", "test_faketensor"),
    )
    odd = fc1[:, :, :15].contiguous(), fc2[:, :15].contiguous()
    other = expert_mlp(x[:, :15], ids, *odd, **extra)
    assert "expert_mlp_pairs" not in str(other.grad_fn)
