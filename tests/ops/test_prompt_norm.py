"""Norm and choice of an expert in CUDA C++ (norm.cu), on a CPU or a GPU, against float64."""

from pathlib import Path

import pytest
import torch
from cuda_on_cpu import CXX, kernels

from blackmamba.ops.gpu import cuda
from blackmamba.ops.prompt.gpu import NormCut, chooses, norm_and_choice, norm_and_places

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and CXX is None, reason="needs a C++ compiler or a GPU"
)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if DEVICE == "cuda":
        return
    monkeypatch.setattr(cuda, "kernel", kernels(tmp_path, races=True))
    monkeypatch.setattr(cuda, "runs_on", lambda _: True)
    monkeypatch.setattr("blackmamba.ops.gpu.processors", lambda _: 2)


@pytest.mark.parametrize(
    ("t", "m", "e", "cut"),
    [(11, 132, 8, NormCut(2, 2)), (1, 256, 3, NormCut(1, 1)), (7, 64, 1, NormCut(1, 16))],
    ids=str,
)
def test_near_float64(t: int, m: int, e: int, cut: NormCut):
    g = torch.Generator().manual_seed(t)
    x, update = torch.randn(t, m, generator=g), torch.randn(t, m, generator=g).bfloat16()
    weight, bias = torch.rand(m, generator=g) + 0.5, torch.randn(e, generator=g)
    router = torch.randn(e, m, generator=g) / m**0.5
    total = x.double() + update.double()
    exact = total / (total.square().mean(1, keepdim=True) + 1e-5).sqrt()
    logits = exact @ router.double().t() + bias.double()
    own, others, weight, router, bias = (v.to(DEVICE) for v in (x, update, weight, router, bias))
    assert chooses(own, others, torch.bfloat16, router)
    assert not chooses(own[:, :-2], others, torch.bfloat16, router)
    assert not chooses(own, others, torch.bfloat16, torch.zeros(16, 1536, device=DEVICE))
    y, routes = norm_and_choice(own, others, weight, 1e-5, (router, bias), cut)
    assert torch.equal(own.cpu(), total.float())  # a sum of two is rounded once
    wrong = (y.double() - exact.to(DEVICE) * weight.double()).abs()
    assert (wrong <= 2**-8 * (exact.to(DEVICE) * weight.double()).abs() + 1e-6).all()
    assert torch.equal(routes.expert_ids.cpu(), logits.argmax(1))
    torch.testing.assert_close(
        routes.gate.cpu(), logits.max(1).values.sigmoid().float(), rtol=2e-6, atol=0
    )


@pytest.mark.parametrize(
    ("t", "m", "e", "cut"),
    [
        (11, 132, 8, NormCut(2, 2)),
        (1, 256, 3, NormCut(1, 1)),
        (70, 64, 1, NormCut(1, 2)),
        (131, 128, 16, NormCut(1, 16)),
    ],
    ids=str,
)
def test_rows_where_experts_read_them(t: int, m: int, e: int, cut: NormCut):
    g = torch.Generator().manual_seed(t)
    x, update = torch.randn(t, m, generator=g), torch.randn(t, m, generator=g).bfloat16()
    weight, bias = torch.rand(m, generator=g) + 0.5, torch.randn(e, generator=g)
    router = torch.randn(e, m, generator=g) / m**0.5
    x, update, weight, router, bias = (v.to(DEVICE) for v in (x, update, weight, router, bias))
    total = x.clone()
    y, routes = norm_and_choice(total, update, weight, 1e-5, (router, bias), cut)
    counts = torch.zeros(e, dtype=torch.int32, device=DEVICE)
    placed, places = norm_and_places(x, update, weight, 1e-5, (router, bias), counts, cut)
    assert torch.equal(x, total)
    assert placed.shape == (e, t, m)
    assert places.counts is counts
    assert counts.tolist() == routes.expert_ids.bincount(minlength=e).tolist()
    for i, count in enumerate(counts.tolist()):
        tokens = places.order[i, :count].long()
        assert torch.equal(tokens.sort().values, (routes.expert_ids == i).nonzero()[:, 0])
        assert torch.equal(placed[i, :count], y[tokens])
        assert torch.equal(places.gate[i, :count], routes.gate[tokens])


def test_the_first_of_equals():
    x, update = torch.ones(3, 8, device=DEVICE), torch.ones(3, 8, device=DEVICE).bfloat16()
    router, bias = torch.ones(4, 8, device=DEVICE), torch.tensor([0.0, 1, 1, 0], device=DEVICE)
    _, routes = norm_and_choice(x, update, torch.ones(8, device=DEVICE), 0.0, (router, bias))
    assert routes.expert_ids.tolist() == [1, 1, 1]
