"""The kernel that chooses experts, interpreted where there is no GPU."""

import pytest
import torch

from blackmamba.ops import gpu, sinkhorn, sinkhorn_choice

pytestmark = pytest.mark.skipif(gpu.missing() is not None, reason="needs triton")
DEVICE = "cpu" if gpu.interpreted() else "cuda"


def check(logits: torch.Tensor, **options: object) -> None:
    """The choice is that of the float64 plan, or as likely there to within rounding."""
    plan = sinkhorn(logits.double(), **options).plan  # pyright: ignore
    found = sinkhorn_choice(logits.float().to(DEVICE), backend="triton", **options).cpu()  # pyright: ignore
    chosen = plan.gather(1, found[:, None])[:, 0]
    assert (chosen >= plan.amax(1) * (1 - 1e-4)).all()
    # where two experts are equally likely by the definition itself, either may be chosen
    two = plan.topk(min(2, plan.shape[1]), dim=1).values
    clear = two[:, -1] < two[:, 0] * (1 - 1e-12) if plan.shape[1] > 1 else two[:, 0] > 0
    load = torch.bincount(found[clear], minlength=plan.shape[1])
    exact = torch.bincount(plan[clear].argmax(1), minlength=plan.shape[1])
    assert (load - exact).abs().max() <= 2 + len(logits) // 500


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (700, 8), (65, 200)], ids=str)
@pytest.mark.parametrize("start", ["paper", "ones"])
def test_as_the_plan_says(shape: tuple[int, int], start: str):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    check(logits, start=start, tolerance=1e-3)


@pytest.mark.parametrize("spread", [0.1, 8.0, 300.0])
def test_spread_and_dead_experts(spread: float):
    logits = spread * torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    check(logits, tolerance=1e-2, max_iterations=30)
    logits[:, 2] = -1e6
    check(logits, tolerance=1e-2, max_iterations=30)


@pytest.mark.parametrize("max_iterations", [1, 2, 3])
@pytest.mark.parametrize("start", ["paper", "ones"])
def test_stops_where_the_definition_does(max_iterations: int, start: str):
    logits = 3 * torch.randn(400, 5, generator=torch.Generator().manual_seed(2))
    check(logits, start=start, tolerance=1e-9, max_iterations=max_iterations)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of NumPy, which interprets
def test_empty_and_nan():
    assert sinkhorn_choice(torch.zeros(0, 4, device=DEVICE), backend="triton").shape == (0,)
    ids = sinkhorn_choice(torch.full((9, 4), torch.nan, device=DEVICE), backend="triton")
    assert ids.shape == (9,)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize("shape", [(32768, 8), (5000, 256), (100001, 16)], ids=str)
def test_full_size_and_the_same_again(shape: tuple[int, int]):
    logits = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(3))
    check(logits, tolerance=1e-2)
    logits = logits.to(DEVICE)
    first = sinkhorn_choice(logits, tolerance=1e-2)
    assert all(torch.equal(first, sinkhorn_choice(logits, tolerance=1e-2)) for _ in range(5))
