"""Sinkhorn: marginals, golden plans, and that no finite logits break it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import largest_difference
from torch import Tensor

from blackmamba.errors import InputError
from blackmamba.ops import sinkhorn

GOLDEN = Path(__file__).parent.parent / "fixtures" / "released-dev" / "sinkhorn.npz"
CASES = [f"c{i}" for i in (0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13)]


def logits(t: int, e: int, spread: float = 1.0, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(0)
    return (spread * torch.randn(t, e, generator=g, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("start", ["paper", "ones"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (7, 4), (64, 8), (1000, 8), (33, 64)], ids=str)
def test_marginals(shape: tuple[int, int], start: str):
    t, e = shape
    result = sinkhorn(logits(t, e), start=start)  # pyright: ignore
    assert result.error < 1e-4
    torch.testing.assert_close(result.plan.sum(1), torch.full((t,), 1 / t), rtol=2e-4, atol=0)
    torch.testing.assert_close(result.plan.sum(0), torch.full((e,), 1 / e), rtol=2e-4, atol=0)
    rows = (t * result.plan.double().sum(1) - 1).abs().max().item()
    assert rows == pytest.approx(result.error, abs=1e-5)


def test_plan_is_the_cost_with_scaled_rows_and_columns():
    """log P - scale * logits is a sum of a row part and a column part: all 2 x 2 minors vanish."""
    x = logits(9, 5, dtype=torch.float64)
    plan = sinkhorn(x, scale=3.0, tolerance=1e-12).plan
    rest = plan.log() - 3.0 * x
    rest = rest - rest[:1] - rest[:, :1] + rest[0, 0]
    assert rest.abs().max() < 1e-12


@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0])
def test_both_starts_end_in_the_same_plan(spread: float):
    x = logits(512, 8, spread, torch.float64)
    paper, ones = (sinkhorn(x, start=s, tolerance=1e-6) for s in ("paper", "ones"))  # pyright: ignore
    assert largest_difference(paper.plan, ones.plan) < 1e-8


@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_the_papers_start_is_nearer_after_the_same_steps(spread: float):
    x = logits(512, 8, spread)
    for steps in (1, 2):
        paper, ones = (
            sinkhorn(x, start=s, tolerance=1e-30, max_iterations=steps)  # pyright: ignore
            for s in ("paper", "ones")
        )
        assert paper.error < ones.error


def test_first_plan_of_the_papers_start_is_one_more_column_step():
    x = logits(6, 3, dtype=torch.float64)
    cost = torch.exp(2 * x)
    d1 = 1 / (3 * cost.sum(0))
    d0 = (1 / 6) / (cost * d1).sum(1)
    d1 = (1 / 3) / (cost * d0[:, None]).sum(0)
    plan = sinkhorn(x, max_iterations=1).plan
    torch.testing.assert_close(plan, d0[:, None] * cost * d1)


def test_stopping_does_not_depend_on_size_or_offset():
    x = logits(64, 8, dtype=torch.float64)
    many = x.repeat(100, 1)  # the same distribution of rows: the same factors but for their scale
    assert sinkhorn(many).iterations == sinkhorn(x).iterations
    assert sinkhorn(x + 500).iterations == sinkhorn(x).iterations


def plain_loop(cost: Tensor, start: str, steps: int, eps: float) -> Tensor:
    """The iteration as the paper writes it, in float64; the authors add `eps` to denominators."""
    C = torch.exp(2 * cost.double())
    t, e = C.shape
    d1 = 1 / (e * C.sum(0)) if start == "paper" else torch.ones(e, dtype=torch.float64)
    d0 = torch.ones(t, dtype=torch.float64)
    for _ in range(steps):
        d0 = (1 / t) / ((d1 * C).sum(1) + eps)
        d1 = (1 / e) / ((d0[:, None] * C).sum(0) + eps)
    return d0[:, None] * C * d1


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str):
    """The authors' plans, step for step, and converged where theirs have converged.

    Their loop stops by the change of d1, which thousands of tokens pass at once, so that many
    golden plans have not converged. Their 1e-8 in the denominators changes plans of wide logits; it
    is shown to be the only difference.
    """
    with np.load(GOLDEN) as file:
        golden = {
            k.split("/")[1]: torch.from_numpy(v) for k, v in file.items() if k.split("/")[0] == case
        }
    cost = golden["cost"]
    t, e = cost.shape
    for key, start in (("new", "paper"), ("vanilla", "ones")):
        if key not in golden:
            continue
        theirs, steps = golden[key].double(), int(golden[f"iters_{key}"])
        assert largest_difference(plain_loop(cost, start, steps, 1e-8), theirs) * t < 2e-3
        ours = sinkhorn(cost.double(), start=start, tolerance=1e-300, max_iterations=steps)  # pyright: ignore
        if ours.iterations == steps:
            assert largest_difference(ours.plan, plain_loop(cost, start, steps, 0.0)) * t < 1e-9
        else:  # the marginals are exact to the last bit, which nothing can change any more
            assert ours.error == 0
        rows, columns = t * theirs.sum(1) - 1, e * theirs.sum(0) - 1
        if max(rows.abs().max(), columns.abs().max()) < 1e-4:
            converged = sinkhorn(cost, start=start, tolerance=1e-6)  # pyright: ignore
            assert largest_difference(converged.plan, theirs) * t < 1e-4


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(5, 3),
        torch.full((5, 3), 1000.0),
        torch.tensor([[1000.0, -1000.0], [-1000.0, 1000.0], [0.0, 0.0]]),
        torch.tensor([[0.0, -1000.0], [1.0, -1000.0]]),  # a dead expert
        torch.tensor([[3e38, -3e38, 0.0], [0.0, 3e38, -3e38]]),
        torch.tensor([[50.0, 0.0]]).half(),
        torch.tensor([[1e-38, 0.0]]).bfloat16(),
        logits(100, 8, 300.0),
    ],
    ids=["zeros", "1000", "+-1000", "dead", "3e38", "half", "bfloat16", "spread 300"],
)
@pytest.mark.parametrize("start", ["paper", "ones"])
def test_any_finite_logits_give_a_finite_plan(x: torch.Tensor, start: str):
    result = sinkhorn(x, start=start, max_iterations=200)  # pyright: ignore
    assert result.plan.isfinite().all()
    assert (result.plan >= 0).all()
    assert result.plan.max() <= 1 / x.shape[1] * 1.001
    assert 1 <= result.iterations <= 200


def test_a_dead_expert_still_gets_its_share():
    x = logits(64, 4)
    x[:, 2] = -1000
    plan = sinkhorn(x).plan
    torch.testing.assert_close(plan.sum(0), torch.full((4,), 0.25), rtol=1e-3, atol=0)


def test_nan_gives_nan_and_an_end():
    x = logits(6, 3)
    x[2, 1] = torch.nan
    result = sinkhorn(x)
    assert result.plan.isnan().any()
    assert result.iterations == 1


def test_empty_input():
    result = sinkhorn(torch.zeros(0, 4))
    assert result.plan.shape == (0, 4)
    assert (result.iterations, result.error) == (0, 0.0)


def test_no_gradient_flows_and_dtypes():
    x = logits(5, 3).requires_grad_()
    assert not sinkhorn(x).plan.requires_grad
    assert sinkhorn(logits(5, 3, dtype=torch.bfloat16)).plan.dtype == torch.float32
    assert sinkhorn(logits(5, 3, dtype=torch.float64)).plan.dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "zeros"}, "start='zeros'"),
        ({"max_iterations": 0}, "max_iterations=0"),
        ({"tolerance": 0.0}, r"tolerance=0.0"),
        ({"scale": -1.0}, r"scale=-1.0"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str):
    with pytest.raises(InputError, match=message):
        sinkhorn(logits(5, 3), **options)  # pyright: ignore


def test_bad_shapes_are_named():
    with pytest.raises(InputError, match="needs an expert"):
        sinkhorn(torch.zeros(4, 0))
    with pytest.raises(InputError, match=r"must be \(t, e\)"):
        sinkhorn(torch.zeros(4))
    with pytest.raises(InputError, match=r"torch.int64"):
        sinkhorn(torch.zeros(4, 2, dtype=torch.int64))
