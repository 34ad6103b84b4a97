"""The native choice of experts against the float64 plan."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blackmamba.ops import native, sinkhorn, sinkhorn_choice

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


@given(
    t=st.integers(1, 257),
    e=st.integers(1, 33),
    spread=st.sampled_from((0.0, 0.1, 3.0, 300.0)),
    start=st.sampled_from(("paper", "ones")),
    dead=st.booleans(),
    limits=st.sampled_from(((1e-9, 1), (1e-9, 2), (1e-9, 3), (1e-2, 30), (1e-3, 1000))),
)
@settings(max_examples=30)
def test_as_likely_as_the_best_of_the_plan(t, e, spread, start, dead, limits):
    logits = spread * torch.randn(t, e, generator=torch.Generator().manual_seed(t + e))
    if dead:
        logits[:, e // 2] = -1e6
    options = {"start": start, "tolerance": limits[0], "max_iterations": limits[1]}
    plan = sinkhorn(logits.double(), **options).plan
    found = sinkhorn_choice(logits, **options, backend="native")
    assert found.dtype == torch.int64
    assert (plan.gather(1, found[:, None])[:, 0] >= plan.amax(1) * (1 - 2e-3)).all()


def test_the_load_of_a_usual_batch():
    logits = torch.randn(2048, 8, generator=torch.Generator().manual_seed(0))
    for narrow in (logits, logits.bfloat16()):
        plan = sinkhorn(narrow.double(), tolerance=1e-2).plan
        found = sinkhorn_choice(narrow, tolerance=1e-2, backend="native")
        assert (found == plan.argmax(1)).float().mean() > 0.999


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_empty_and_not_finite(bad: float):
    assert sinkhorn_choice(torch.zeros(0, 4), backend="native").shape == (0,)
    logits = torch.zeros(19, 4)
    logits[3, 1] = bad
    found = sinkhorn_choice(logits, max_iterations=20, backend="native")
    assert ((found >= 0) & (found < 4)).all()
    logits[:] = bad
    assert (sinkhorn_choice(logits, backend="native") >= 0).all()
