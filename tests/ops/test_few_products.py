"""A matrix times the vectors of a few sequences (few.cu), on a CPU or a GPU, against float64."""

from pathlib import Path

import pytest
import torch
from cuda_on_cpu import CXX, kernels
from numerics import relative_error
from torch import Tensor
from torch.nn import functional as F

from blackmamba.ops import gpu
from blackmamba.ops.decode.few import (
    WIDEST,
    Conv,
    FewCut,
    Norm,
    Routed,
    cuts,
    fits,
    launcher,
    usual_cut,
)
from blackmamba.ops.gpu import cuda
from blackmamba.presets import presets

PROCESSORS = gpu.processors
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and CXX is None, reason="needs a C++ compiler or a GPU"
)
CUTS = pytest.mark.parametrize(
    "cut",
    [None, FewCut(1, 16, 1, 7), FewCut(2, 4, 3, 2), FewCut(4, 1, 2, 1)],
    ids=str,
)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if DEVICE == "cuda":
        return
    monkeypatch.setattr(cuda, "kernel", kernels(tmp_path, races=True))
    monkeypatch.setattr(cuda, "runs_on", lambda _: True)
    monkeypatch.setattr(gpu, "can_overlap", lambda: False)
    monkeypatch.setattr(gpu, "processors", lambda _: 3)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def near(found: Tensor, exact: Tensor) -> bool:
    """Sums in float32, whose last places a GPU's matrix units cut off (on a CPU these were within
    3.6e-7); if out is bfloat16, rounded once."""
    bound = 2**-8 if found.dtype == torch.bfloat16 else 3e-6
    return relative_error(found, exact) < bound


@CUTS
@pytest.mark.parametrize(
    ("b", "rows", "width"), [(3, 40, 72), (16, 29, 8), (9, 104, 264), (1, 8, 32)]
)
def test_keeps(b: int, rows: int, width: int, cut: FewCut | None):
    """Vectors lie apart, as x does beside z."""
    v, weight = random(b, 2 * width).bfloat16()[:, :width], random(rows, width, seed=1).bfloat16()
    exact = v.double() @ weight.double().t()
    for dtype in (torch.float32, torch.bfloat16):
        out = random(b, rows, seed=2).to(dtype)
        launch = launcher(v, weight, out, cut=cut)
        launch()
        assert near(out, exact)
        again = out.clone()
        launch()
        assert torch.equal(out, again)


@CUTS
@pytest.mark.parametrize(("b", "width"), [(5, 72), (16, 264)])
def test_norms_and_convolves(b: int, width: int, cut: FewCut | None):
    channels, taps = 44, 4
    x, norm = random(b, width) * 3, Norm(random(width, seed=1).exp(), 1e-5)
    weight = (random(2 * channels, width, seed=2) / width**0.5).bfloat16()
    conv = Conv(
        random(channels, taps, seed=3), random(channels, seed=4), random(b, channels, 3, seed=5)
    )
    normed = x.double() * (x.double().square().mean(1, keepdim=True) + norm.eps).rsqrt()
    xz = (normed * norm.weight.double()) @ weight.double().t()
    read = torch.cat((conv.state.double(), xz[:, :channels, None]), 2)
    silu = F.silu((read * conv.weight.double()).sum(2) + conv.bias.double())
    exact = torch.cat((silu, xz[:, channels:]), 1)
    out = torch.empty(b, 2 * channels, dtype=torch.bfloat16, device=DEVICE)
    launcher(x, weight, out, norm=norm, conv=conv, cut=cut)()
    # the vector is rounded, and what comes out: 2.9e-3 at most on a CPU
    assert relative_error(out, exact) < 6e-3
    assert relative_error(conv.state, read[..., 1:]) < 6e-3
    assert torch.equal(conv.state[..., :2], read[..., 1:3].float())  # what was there moved on


@CUTS
@pytest.mark.parametrize(("b", "rows", "width"), [(6, 40, 72), (11, 24, 160)])
def test_adds(b: int, rows: int, width: int, cut: FewCut | None):
    v, weight = random(b, width).bfloat16(), random(rows, width, seed=1).bfloat16()
    x = random(b, rows, seed=2)
    exact = x.double() + v.double() @ weight.double().t()
    launcher(v, weight, x, add=True, cut=cut)()
    assert near(x, exact)


@CUTS
@pytest.mark.parametrize(
    ("ids", "activation"),
    [
        ([2], "silu"),
        ([1, 1, 0, 3, 1], "gelu"),
        ([0] * 16, "silu"),
        ([7 * i % 5 for i in range(13)], "silu"),
    ],
    ids=["one", "some", "all alike", "most"],
)
def test_experts(ids: list[int], activation: str, cut: FewCut | None):
    e, m, f = 5, 72, 40
    routed = Routed(torch.tensor(ids, device=DEVICE), random(len(ids), seed=1).sigmoid())
    x, norm = random(len(ids), m), Norm(random(m, seed=2).exp(), 1e-5)
    fc1, fc2 = (random(e, *s, seed=3).bfloat16() / 8 for s in ((2 * f, m), (m, f)))
    normed = x.double() * (x.double().square().mean(1, keepdim=True) + norm.eps).rsqrt()
    both = torch.einsum("bm,bnm->bn", normed * norm.weight.double(), fc1.double()[routed.ids])
    act = F.silu if activation == "silu" else F.gelu
    hidden = torch.full((len(ids), f), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    launcher(x, fc1, hidden, norm=norm, routed=routed, activation=activation, cut=cut)()
    # a product of two such: 5.4e-3 at most on a CPU
    assert relative_error(hidden, act(both[:, :f]) * both[:, f:]) < 1e-2
    update = torch.einsum("bf,bmf->bm", hidden.double(), fc2.double()[routed.ids])
    exact = x.double() + routed.gate.double()[:, None] * update
    launcher(hidden, fc2, x, add=True, routed=routed, cut=cut)()
    assert near(x, exact)


@pytest.mark.skipif(DEVICE == "cpu", reason="takes long without a GPU")
@pytest.mark.parametrize("b", [2, 7, 16])
@pytest.mark.parametrize("preset", ["blackmamba-1.5b", "blackmamba-2.8b"])
def test_the_papers_sizes(b: int, preset: str, monkeypatch: pytest.MonkeyPatch):
    """All products of a step, cut as usual, with every multiprocessor."""
    monkeypatch.setattr(gpu, "processors", PROCESSORS)
    config = presets[preset]
    m, d, f, e = config.d_model, config.d_inner, config.d_expert, config.n_experts
    r, n = config.dt_rank, config.d_state
    ids = torch.arange(b, device=DEVICE) * 3 % e
    norm, routed = Norm(random(m, seed=1).exp(), 1e-5), Routed(ids, random(b, seed=2).sigmoid())
    x = random(b, m)
    normed = F.rms_norm(x.double(), (m,), norm.weight.double(), norm.eps)

    in_proj = (random(2 * d, m, seed=3) / m**0.5).bfloat16()
    conv = Conv(random(d, 4, seed=4), random(d, seed=5), random(b, d, 3, seed=6))
    read = torch.cat((conv.state.double(), (normed @ in_proj[:d].double().t())[..., None]), 2)
    u = F.silu((read * conv.weight.double()).sum(2) + conv.bias.double())
    xz = torch.empty(b, 2 * d, dtype=torch.bfloat16, device=DEVICE)
    launcher(x, in_proj, xz, norm=norm, conv=conv)()
    assert relative_error(xz[:, :d], u) < 6e-3
    assert relative_error(xz[:, d:], normed @ in_proj[d:].double().t()) < 6e-3

    x_proj = (random(r + 2 * n, d, seed=7) / d**0.5).bfloat16()
    dbc = torch.zeros(b, -(-(r + 2 * n) // 8) * 8, dtype=torch.bfloat16, device=DEVICE)
    launcher(xz[:, :d], x_proj, dbc[:, : r + 2 * n])()
    assert near(dbc[:, : r + 2 * n], xz[:, :d].double() @ x_proj.double().t())
    dt_proj = F.pad((random(d, r, seed=8) / r**0.5).bfloat16(), (0, -r % 8))
    dt = torch.empty(b, d, device=DEVICE)
    launcher(dbc[:, : dt_proj.shape[1]], dt_proj, dt)()
    assert near(dt, dbc[:, :r].double() @ dt_proj[:, :r].double().t())

    out_proj = (random(m, d, seed=9) / d**0.5).bfloat16()
    stream = x.double() + xz[:, d:].double() @ out_proj.double().t()
    launcher(xz[:, d:], out_proj, x, add=True)()
    assert near(x, stream)

    fc1, fc2 = (random(e, *s, seed=10).bfloat16() for s in ((2 * f, m), (m, f)))
    fc1, fc2 = fc1 / m**0.5, fc2 / f**0.5
    normed = F.rms_norm(x.double(), (m,), norm.weight.double(), norm.eps)
    both = torch.stack([fc1[i].double() @ v for i, v in zip(ids.tolist(), normed, strict=True)])
    hidden = torch.empty(b, f, dtype=torch.bfloat16, device=DEVICE)
    launcher(x, fc1, hidden, norm=norm, routed=routed, activation="silu")()
    assert relative_error(hidden, F.silu(both[:, :f]) * both[:, f:]) < 1e-2
    update = [fc2[i].double() @ v for i, v in zip(ids.tolist(), hidden.double(), strict=True)]
    stream = x.double() + routed.gate.double()[:, None] * torch.stack(update)
    launcher(hidden, fc2, x, add=True, routed=routed)()
    assert near(x, stream)

    head = (random(config.vocab_size, m, seed=11) / m**0.5).bfloat16()
    logits = torch.empty(b, config.vocab_size, device=DEVICE)
    launcher(x.bfloat16(), head, logits)()
    assert near(logits, x.bfloat16().double() @ head.double().t())


def test_numbers_that_are_not_finite_stay_in_their_sequence():
    v, weight = random(5, 72).bfloat16(), random(40, 72, seed=1).bfloat16()
    fine, out = (torch.empty(5, 40, device=DEVICE) for _ in range(2))
    launcher(v, weight, fine)()
    v[2, 70] = torch.inf
    launcher(v, weight, out)()
    assert not out[2].isfinite().any()
    assert torch.equal(out[[0, 1, 3, 4]], fine[[0, 1, 3, 4]])


def test_what_fits():
    assert fits(random(16, 72).bfloat16())
    assert not fits(random(16, 72))
    assert not fits(random(16, 76).bfloat16())
    assert not fits(random(16, 80).bfloat16()[:, 8:])
    assert not fits(random(2 * 72 + 4).bfloat16()[4:].view(2, 72))


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize(
    ("rows", "width"), [(4608, 1152), (104, 2304), (3872, 1472), (1472, 3872), (8, 8)]
)
def test_the_usual_cut(rows: int, width: int, pairs: int):
    """Is one that tune tries, and there is one for the widest of vectors and on smaller GPUs."""
    assert usual_cut(rows, width, 16, pairs, 227 << 10) in cuts(width, 16, pairs, 227 << 10)
    assert usual_cut(rows, WIDEST, 16, pairs, 227 << 10).tiles == 1
    assert usual_cut(rows, min(width, 2048), 16, pairs, 99 << 10).blocks >= 1
