"""The native AdamW and norm: against float64, sizes around a task's, the same on all threads."""

import dataclasses

import pytest
import torch
from numerics import relative_error
from torch import Tensor

from blackmamba.ops import AdamWTensors, adamw_, adamw_factors, global_norm, native

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

BETAS = {"beta1": 0.9, "beta2": 0.95}
BLOCK = 1 << 14  # numbers of a task
SIZES = (1, 15, 17, 0, 255, BLOCK - 1, BLOCK, 3 * BLOCK + 5)
KINDS = {
    "float32": (torch.float32, torch.float32, False),
    "float32 by bfloat16": (torch.float32, torch.bfloat16, False),
    "master": (torch.bfloat16, torch.bfloat16, True),
    "at random": (torch.bfloat16, torch.float32, False),
}


def normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def group(kind: str) -> list[AdamWTensors]:
    dtype, gradient, has_master = KINDS[kind]
    return [
        AdamWTensors(
            parameter=normal(n, i).to(dtype, copy=True),
            gradient=normal(n, i + 10).to(gradient),
            exp_avg=normal(n, i + 20),
            exp_avg_sq=normal(n, i + 30).square(),
            master=normal(n, i) if has_master else None,
            decay=0.1 * (i % 2),
        )
        for i, n in enumerate(SIZES)
    ]


def updated(kind: str, n_threads: int) -> list[AdamWTensors]:
    found, before = group(kind), torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        factors = adamw_factors(1e-2, torch.tensor(3), **BETAS, gradient_scale=0.5)
        adamw_(found, factors, **BETAS, eps=1e-8, backend="native")
    finally:
        torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_formula_in_float64(kind: str):
    for t, old in zip(updated(kind, 2), group(kind), strict=True):
        p, g = (old.parameter if old.master is None else old.master).double(), old.gradient / 2.0
        m = 0.9 * old.exp_avg.double() + 0.1 * g.double()
        v = 0.95 * old.exp_avg_sq.double() + 0.05 * g.double().square()
        p = p - 1e-2 * old.decay * p
        p = p - 1e-2 * (m / (1 - 0.9**4)) / ((v / (1 - 0.95**4)).sqrt() + 1e-8)
        assert relative_error(t.exp_avg, m) < 3e-7
        assert relative_error(t.exp_avg_sq, v) < 3e-7
        assert relative_error(t.parameter if t.master is None else t.master, p) < (
            2**-7 if kind == "at random" else 3e-7
        )
        if t.master is not None:
            assert torch.equal(t.parameter, t.master.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_change_a_bit(kind: str):
    for one, two in zip(updated(kind, 1), updated(kind, 2), strict=True):
        for field in dataclasses.fields(one):
            a, b = getattr(one, field.name), getattr(two, field.name)
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_the_norm_of_any_sizes():
    tensors = [normal(n, n).to(torch.bfloat16 if n % 2 else torch.float32) for n in SIZES]
    exact = torch.cat([t.double() for t in tensors]).norm()
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            found.append(global_norm(tensors, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert relative_error(found[0], exact) < 3e-7
    for bad in (torch.nan, torch.inf):
        tensors[-1][-1] = bad
        assert not global_norm(tensors, backend="native").isfinite()


def test_a_number_that_is_none_stays_one():
    (t,) = updated_alone(torch.tensor([1.0, torch.nan, torch.inf]))
    assert t.parameter.isfinite().tolist() == [True, False, False]
    assert t.exp_avg.isfinite().tolist() == [True, False, False]


def updated_alone(gradient: Tensor) -> list[AdamWTensors]:
    zeros = torch.zeros_like(gradient)
    found = [
        AdamWTensors(
            parameter=zeros.clone(), gradient=gradient, exp_avg=zeros.clone(), exp_avg_sq=zeros
        )
    ]
    factors = adamw_factors(1e-2, torch.tensor(0), **BETAS)
    adamw_(found, factors, **BETAS, eps=1e-8, backend="native")
    return found
