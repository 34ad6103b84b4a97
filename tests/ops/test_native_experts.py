"""The native experts for a few tokens against the float64 definition."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_within_budget, relative_error
from torch import Tensor
from torch.nn import functional as F

from blackmamba.errors import InputError
from blackmamba.ops import expert_mlp, native
from blackmamba.ops.backend import Backend
from blackmamba.ops.expert_mlp.native_grouped import expert_mlp_native_grouped
from blackmamba.ops.expert_mlp.native_pairs import expert_mlp_native_pairs
from blackmamba.ops.native import bfloat16

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

sizes = st.integers(1, 257)

# How far a result may be from float64's, number by number: what the roundings on its way come to.
FLOAT32, BFLOAT16 = 2**-24, 2**-8  # a rounding is off by at most so much of the number
ACTIVATION = 3e-7  # of the size of what act(g) multiplies: its exponential or its probability
SLOPE, BEND = 1.13, 0.8  # the largest first and second derivatives of both activations
LANES = 16  # in which a sum is taken at the least
DEVIATIONS = (
    2.25  # in bounds of roundings, whose deviation is 0.42 of their bound: more than 5 of them
)


def summed(n: int, size: Tensor) -> Tensor:
    """The error of a float32 sum of n terms whose sizes add up to `size`.

    Higham and Mary 2019 (doi 10.1137/18M1226312): it grows with the root of the roundings that are
    done one after the other.
    """
    return FLOAT32 * math.sqrt(n / LANES + 3) * size


def passed_on(equation: str, factors: Tensor, *errors: Tensor) -> Tensor:
    """What errors, each of which knows of no other, come to in a sum of their products with
    `factors`: never more than all in one direction, and of many hardly more than deviations."""
    together = torch.einsum(equation, factors.abs(), torch.stack(errors).abs().sum(0))
    squares = torch.stack(errors).square().sum(0)
    return torch.minimum(
        together, DEVIATIONS * torch.einsum(equation, factors.square(), squares).sqrt()
    )


class Hidden:
    """Of each token: its expert's hidden numbers in float64, and what may be wrong with them.

    Args:
        stored: the relative error of what is kept of fc1's product; 0: it stays in float32.
    """

    def __init__(self, inputs, biases: dict[str, Tensor], activation: str, gated: bool, stored=0.0):
        x, ids, fc1, _ = inputs
        weights, x = fc1.double()[ids], x.double()
        h = torch.einsum("tfm,tm->tf", weights, x)
        size = torch.einsum("tfm,tm->tf", weights.abs(), x.abs())
        if "fc1_bias" in biases:
            bias = biases["fc1_bias"].double()[ids]
            h, size = h + bias, size + bias.abs()
        error = summed(x.shape[1], size) + stored * h.abs()
        parts, errors = h.chunk(1 + gated, 1), error.chunk(1 + gated, 1)
        self.g, self.error_g = parts[0].detach().requires_grad_(), errors[0]
        self.u, self.error_u = parts[-1] if gated else torch.ones_like(self.g), errors[-1] * gated
        act = F.silu if activation == "silu" else F.gelu
        with torch.enable_grad():
            value = act(self.g)
            (slope,) = torch.autograd.grad(value.sum(), self.g)
        self.value, self.slope, self.g = value.detach(), slope.detach(), self.g.detach()
        self.a = self.value * self.u
        self.error_a = (
            (SLOPE * self.u * self.error_g).square() + (self.value * self.error_u).square()
        ).sqrt() + ACTIVATION * (self.g * self.u).abs()


def bound(inputs, extra, activation: str, gated: bool, narrow: bool) -> Tensor:
    """Of what a few tokens give: float32 inside, y rounded to bfloat16 where inputs are."""
    _, ids, _, fc2 = inputs
    hidden = Hidden(inputs, extra, activation, gated)
    weights = fc2.double()[ids]
    y = torch.einsum("tmf,tf->tm", weights, hidden.a)
    size = torch.einsum("tmf,tf->tm", weights.abs(), hidden.a.abs())
    if "fc2_bias" in extra:
        bias = extra["fc2_bias"].double()[ids]
        y, size = y + bias, size + bias.abs()
    error = passed_on("tmf,tf->tm", weights, hidden.error_a) + summed(fc2.shape[2], size)
    rounding = 2 * FLOAT32 + (BFLOAT16 if narrow else 0)  # by the gate, and into memory
    return extra["gate"].double()[:, None] * (error + rounding * y.abs())


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
    wanted = exact(inputs, extra, **options)
    assert relative_error(y, wanted) < (4e-3 if narrow else 5e-6)
    assert ((y.double() - wanted).abs() <= bound(inputs, extra, activation, gated, narrow)).all()


@torch.no_grad()
@pytest.mark.parametrize("narrow", [False, True])
def test_a_term_that_is_left_out_is_out_of_bounds(narrow: bool):
    dtype = torch.bfloat16 if narrow else torch.float32
    (x, ids, fc1, fc2), extra = arguments(4, 3, 150, 257, dtype=dtype)
    allowed = bound((x, ids, fc1, fc2), extra, "silu", True, narrow)
    wanted = exact((x, ids, fc1, fc2), extra)
    for weights in ((fc1.clone(), fc2), (fc1, fc2.clone())):
        for changed, whole in zip(weights, (fc1, fc2), strict=True):
            if changed is not whole:
                changed[:, :, -1] = 0
        y = expert_mlp(x, ids, *weights, **extra, backend="native")
        assert ((y.double() - wanted).abs() > 4 * allowed).any(1).all()


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


def test_no_tokens_give_zero_gradients():
    (x, ids, fc1, fc2), _ = arguments(0, 3, 8, 8, biases=False)
    learnt = [t.requires_grad_() for t in (x, fc1, fc2)]
    y = expert_mlp(learnt[0], ids, *learnt[1:], backend="native")
    found = torch.autograd.grad(y.sum(), learnt)
    assert y.shape == found[0].shape == (0, 8)
    assert not found[1].any()
    assert not found[2].any()


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


@pytest.mark.parametrize("wrong", [-1, 2])
@pytest.mark.parametrize("narrow", [False, True])
def test_compiled_programs_do_not_take_other_ids(wrong: int, narrow: bool):
    inputs, _ = arguments(40, 2, 8, 8)
    x, ids, fc1, fc2 = (t.bfloat16() if narrow and t.is_floating_point() else t for t in inputs)
    ids[7] = wrong
    operations = torch.ops.blackmamba  # what they call, without `expert_mlp`'s checks
    operation = operations.expert_mlp_pairs if narrow else operations.expert_mlp
    biases = () if narrow else (None, None)
    with pytest.raises(InputError, match=f"expert_ids holds {wrong}, must be 0 .. 1"):
        operation(x, ids, fc1, fc2, *biases, None, False, True)


def direction(y: torch.Tensor) -> torch.Tensor:
    """A gradient of y that is the same however y was rounded, in bfloat16's numbers."""
    return torch.arange(y.numel()).cos().bfloat16().to(y.dtype).view_as(y)


BY = pytest.mark.parametrize("by", ["pairs", "floats"])
"""Pairs of bfloat16 multiplied as they are, or widened to float32 before."""


def narrow(inputs, n_threads: int, k: int, by: str, **options) -> list[torch.Tensor]:
    """Output and gradients of x, fc1, fc2 and gate by the products of bfloat16, (t k,) choices."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        (x, ids, fc1, fc2), gate = inputs
        learnt = [t.clone().requires_grad_() for t in (x, fc1, fc2, gate)]
        if by == "pairs":
            y = expert_mlp_native_pairs(learnt[0], ids, *learnt[1:3], **options, gate=learnt[3])
        else:
            biases = {"fc1_bias": None, "fc2_bias": None}
            y = expert_mlp_native_grouped(
                learnt[0], ids, *learnt[1:3], **options, **biases, gate=learnt[3]
            )
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


NAMES = ("y", "x", "fc1", "fc2", "gate")


def bounds_of_narrow(
    inputs, k: int, activation: str, gated: bool, stored: float = BFLOAT16
) -> list[Tensor]:
    """Of what `narrow` gives: all that is stored is bfloat16, but for the gate's gradient.

    Args:
        stored: the relative error of all that is stored, if it is of another dtype.
    """
    (x, ids, fc1, fc2), gate = inputs
    t, gate, ids = len(ids), gate.double()[:, None], ids.view(-1)
    x = x.double().repeat_interleave(k, 0)
    y_shape = t // k, fc2.shape[1]
    outer = direction(torch.empty(y_shape, dtype=torch.float64)).repeat_interleave(k, 0)
    hidden = Hidden((x, ids, fc1, fc2), {}, activation, gated, stored)
    fc1, fc2 = fc1.double()[ids], fc2.double()[ids]
    a, errors_a = hidden.a, (hidden.error_a, stored * hidden.a)
    m, f = fc2.shape[1:]

    y = torch.einsum("tmf,tf->tm", fc2, a)
    y_size = torch.einsum("tmf,tf->tm", fc2.abs(), a.abs())
    error = passed_on("tmf,tf->tm", fc2, *errors_a) + summed(f, y_size) + stored * y.abs()
    found = {"y": _of_tokens(gate * error, k)}

    d = torch.einsum("tmf,tm->tf", fc2, outer)
    d_size = torch.einsum("tmf,tm->tf", fc2.abs(), outer.abs())
    error_d = summed(m, d_size) + stored * d.abs()
    error = passed_on("tf,tf->t", a, error_d) + passed_on("tf,tf->t", d, hidden.error_a)
    found["gate"] = error + summed(f, (d * a).abs().sum(1))

    errors = [error_d * hidden.u * hidden.slope, d * hidden.error_u * hidden.slope,
              d * hidden.u * BEND * hidden.error_g]  # fmt: skip
    rows, row_errors = [d * hidden.u * hidden.slope], [_root(errors)]
    if gated:
        rows.append(d * hidden.value)
        row_errors.append(_root([error_d * hidden.value, d * SLOPE * hidden.error_g]))
    h = gate * torch.cat(rows, 1)
    errors_h = gate * torch.cat(row_errors, 1), stored * h

    each = torch.einsum("tfm,tf->tm", fc1, h)
    size = torch.einsum("tfm,tf->tm", fc1.abs(), h.abs())
    error = passed_on("tfm,tf->tm", fc1, *errors_h) + summed(h.shape[1], size)
    whole = _of_tokens(each, k).abs() if k > 1 else 0
    found["x"] = _of_tokens(error + stored * each.abs(), k) + stored * whole

    scaled = gate * outer
    for name, left, right, errors in (
        ("fc1", h, x, [error[:, :, None] * x[:, None] for error in errors_h]),
        ("fc2", scaled, a, [scaled[:, :, None] * error[:, None] for error in
                            (*errors_a, stored * a)]),
    ):  # fmt: skip
        per_expert = []
        for expert in range(inputs[0][2].shape[0]):
            mine = ids == expert
            terms = left[mine][:, :, None] * right[mine][:, None]
            ones = torch.ones(len(terms), dtype=torch.float64)
            error = passed_on("t,tij->ij", ones, *(e[mine] for e in errors))
            error += summed(len(terms), terms.abs().sum(0)) + stored * terms.sum(0).abs()
            per_expert.append(error)
        found[name] = torch.stack(per_expert)
    return [found[name] for name in NAMES]


def _of_tokens(x: Tensor, k: int) -> Tensor:
    """The sum of each token's choices."""
    return x.view(len(x) // k, k, -1).sum(1)


def _root(errors: list[Tensor]) -> Tensor:
    """Of errors that do not know of each other."""
    return torch.stack(errors).square().sum(0).sqrt()


@BY
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
def test_narrow_products_match_meaning(by, t, e, m, f, k, gated, activation):
    (x, _, fc1, fc2), _ = arguments(
        t, e, 2 * m, 2 * f, dtype=torch.bfloat16, gated=gated, biases=False
    )
    generator = torch.Generator().manual_seed(t)
    ids = torch.randint(0, e, (t * k,), generator=generator)
    inputs = (x, ids, fc1, fc2), torch.rand(t * k, generator=generator)
    options = {"activation": activation, "gated": gated}
    actual = narrow(inputs, 2, k, by, **options)
    for one, two in zip(actual, narrow(inputs, 1, k, by, **options), strict=True):
        assert torch.equal(one, two)
    exact_ = meaning(inputs, torch.float64, "reference", k, **options)
    allowed = bounds_of_narrow(inputs, k, **options)
    eager = meaning(inputs, torch.bfloat16, "torch", k, **options)
    for name, one, other, wanted, most in zip(NAMES, actual, eager, exact_, allowed, strict=True):
        # of a few draws in a thousand, plain PyTorch is right by luck, and this then too strict
        assert_within_budget(name, one.bfloat16(), other.bfloat16(), wanted)
        assert one.shape == most.shape
        assert ((one.double() - wanted).abs() <= most).all(), name


@given(
    t=st.integers(1, 48),
    e=st.integers(1, 9),
    m=sizes,
    f=sizes,
    k=st.integers(1, 3),
    gated=st.booleans(),
    activation=st.sampled_from(("silu", "gelu")),
)
@settings(max_examples=40)
def test_gradients_of_few_tokens_match_meaning(t, e, m, f, k, gated, activation):
    (x, _, fc1, fc2), _ = arguments(t, e, m, f, gated=gated, biases=False)
    generator = torch.Generator().manual_seed(t)
    ids = torch.randint(0, e, (t * k,), generator=generator)
    inputs = (x, ids, fc1, fc2), torch.rand(t * k, generator=generator)
    options = {"activation": activation, "gated": gated}
    actual = narrow(inputs, 2, k, "floats", **options)
    for one, two in zip(actual, narrow(inputs, 1, k, "floats", **options), strict=True):
        assert torch.equal(one, two)
    exact_ = meaning(inputs, torch.float64, "reference", k, **options)
    allowed = bounds_of_narrow(inputs, k, **options, stored=ACTIVATION)
    for name, one, wanted, most in zip(NAMES, actual, exact_, allowed, strict=True):
        assert one.dtype == torch.float32
        assert one.shape == most.shape
        assert ((one.double() - wanted).abs() <= most).all(), name


@BY
def test_a_pair_that_is_left_out_is_out_of_bounds(by: str):
    (x, ids, fc1, fc2), extra = arguments(70, 3, 64, 48, dtype=torch.bfloat16, biases=False)
    options: dict[str, Any] = {"activation": "silu", "gated": True}
    inputs = (x, ids, fc1, fc2), extra["gate"]
    exact_ = meaning(inputs, torch.float64, "reference", 1, **options)
    allowed = bounds_of_narrow(inputs, 1, **options)
    fc2 = fc2.clone()
    fc2[:, :, -2:] = 0
    broken = narrow(((x, ids, fc1, fc2), extra["gate"]), 1, 1, by, **options)
    for name, one, wanted, most in zip(NAMES, broken, exact_, allowed, strict=True):
        if name != "fc2":  # its gradient does not have them in it
            assert ((one.double() - wanted).abs() > most).any(), name


@BY
def test_narrow_products_longer_than_a_task_in_strided_memory(by: str):
    """A group of 301 tokens, an idle expert, more columns and rows than a task has."""
    (x, _, fc1, fc2), extra = arguments(301, 3, 150, 84, dtype=torch.bfloat16, biases=False)
    spread = torch.full((301, 2, 150), math.nan, dtype=torch.bfloat16)
    spread[:, 1] = x
    ids = torch.full((301,), 2)
    ids[7] = 0
    options = {"activation": "silu", "gated": True}
    inputs = (spread[:, 1], ids, fc1, fc2), extra["gate"]
    exact_ = meaning(inputs, torch.float64, "reference", 1, **options)
    actual = narrow(inputs, 2, 1, by, **options)
    for a, b in zip(actual, exact_, strict=True):
        assert relative_error(a, b) < 1e-2
    assert not actual[2][1].any()
    assert not actual[3][1].any()


@BY
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_narrow_products_keep_nan_and_infinity(bad: float, by: str):
    (x, ids, fc1, fc2), extra = arguments(70, 2, 20, 12, dtype=torch.bfloat16, biases=False)
    x[1, 3] = bad
    options = {"activation": "silu", "gated": True}
    y, grad_x, *_ = narrow(((x, ids, fc1, fc2), extra["gate"]), 1, 1, by, **options)
    assert not y[1].isfinite().all()
    others = torch.arange(70) != 1
    assert y[others].isfinite().all()
    assert grad_x[others].isfinite().all()


@pytest.mark.skipif(native.missing() is not None, reason="the extension was not built")
@pytest.mark.parametrize(
    ("by", "module"),
    [("pairs", "native_pairs"), ("floats", "native_grouped"), ("library", None)],
)
def test_experts_are_by_what_is_fastest(
    by: str, module: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bfloat16, "_by", by)
    (x, ids, fc1, fc2), extra = arguments(64, 3, 16, 8, dtype=torch.bfloat16, biases=False)
    x.requires_grad_()
    node: Any = expert_mlp(x, ids, fc1, fc2, **extra).grad_fn
    found = node.run.__module__.rpartition(".")[2] if hasattr(node, "run") else None
    assert found == module


@pytest.mark.parametrize("own", [False, True])
def test_experts_are_by_our_matrix_units_where_they_may_be_used(
    own: bool, monkeypatch: pytest.MonkeyPatch
):
    if own and not bfloat16._own_tiles:
        pytest.skip("this machine has no AMX, hides it, or its compiler did not know it")
    monkeypatch.setattr(bfloat16, "_by", "tiles")
    monkeypatch.setattr(bfloat16, "_own_tiles", own)
    (x, ids, fc1, fc2), extra = arguments(64, 3, 16, 8, dtype=torch.bfloat16, biases=False)
    node: Any = expert_mlp(x.requires_grad_(), ids, fc1, fc2, **extra).grad_fn
    assert hasattr(node, "run") == own


def test_pairs_are_registered_as_torch_wants_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bfloat16, "_by", "pairs")
    (x, ids, fc1, fc2), extra = arguments(64, 3, 16, 8, dtype=torch.bfloat16, biases=False)
    torch.library.opcheck(
        torch.ops.blackmamba.expert_mlp_pairs.default,
        (x[:32], ids, fc1, fc2, None, True, True),  # 2 choices a token
        test_utils=("test_schema", "test_faketensor"),
    )
    odd = fc1[:, :, :15].contiguous(), fc2[:, :15].contiguous()
    other = expert_mlp(x[:, :15].requires_grad_(), ids, *odd, **extra)
    assert not hasattr(other.grad_fn, "run")
