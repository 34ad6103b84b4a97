"""Convolution, x_proj and dt_proj in one CUDA C++ kernel (projected.cu), on a CPU or a GPU."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_on_cpu import CXX, kernels
from hopper_on_cpu import take_place
from numerics import assert_within_budget, relative_error
from torch import Tensor

from blackmamba.ops import causal_conv1d, gpu, mamba_mixer
from blackmamba.ops.backend import Backend
from blackmamba.ops.gpu import cuda, hopper
from blackmamba.ops.mamba_mixer import hopper as mixer
from blackmamba.ops.mamba_mixer.hopper import fits, is_enough, projected

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not hopper.runs_on(torch.device("cuda")) if DEVICE == "cuda" else CXX is None,
    reason="needs a C++ compiler or Hopper",
)
ON_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="takes long without a GPU")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if DEVICE == "cuda":
        return
    monkeypatch.setattr(cuda, "kernel", kernels(tmp_path, races=True))
    take_place(monkeypatch)


def weights(d: int, r: int, n: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    padded = torch.full((d, -(-r // 8) * 8), torch.nan)  # which nothing may read
    padded[:, :r] = normal(d, r) / r**0.5
    padded = padded.bfloat16().to(DEVICE)
    found = {"conv_weight": normal(d, 4), "conv_bias": normal(d)}
    found["x_proj"] = normal(r + 2 * n, d) / d**0.5
    narrow = {name: t.bfloat16().to(DEVICE) for name, t in found.items()}
    return narrow | {"dt_proj": padded[:, :r]}


def check_near(actual: Tensor, exact: Tensor) -> None:
    """Rounded to bfloat16 once, of a sum in float32."""
    wrong = (actual.double() - exact).abs()
    assert (wrong <= 2**-8 * exact.abs() + 2e-6 * exact.abs().max()).all()


@pytest.mark.parametrize(
    ("shape", "with_memory", "lengths", "documents"),
    [
        ((1, 1, 8, 1, 1), False, None, None),
        ((2, 70, 136, 9, 4), True, None, None),
        ((2, 70, 136, 16, 3), True, [70, 33], None),
        ((3, 37, 264, 24, 8), True, [2, 0, 37], None),
        ((2, 131, 128, 72, 16), False, None, torch.int64),
        ((2, 70, 384, 92, 16), False, None, torch.int32),
        ((1, 40, 128, 33, 47), False, None, torch.uint8),
        pytest.param((8, 2048, 2304, 72, 16), False, None, None, marks=ON_GPU),
        pytest.param((5, 1999, 2304, 72, 16), True, [1999, 0, 2, 1920, 64], None, marks=ON_GPU),
        pytest.param((3, 1111, 2944, 92, 16), False, None, torch.int64, marks=ON_GPU),
    ],
    ids=str,
)
def test_near_float64(
    shape: tuple[int, int, int, int, int],
    with_memory: bool,
    lengths: list[int] | None,
    documents: torch.dtype | None,
):
    b, l, d, r, n = shape
    g = torch.Generator().manual_seed(1)
    xz = torch.randn(b, l, 2 * d, generator=g).bfloat16().to(DEVICE)
    x, given = xz[..., d:], weights(d, r, n)
    assert fits(x, **given)
    before = torch.randn(b, d, 3, generator=g).bfloat16().to(DEVICE) if with_memory else None
    counts = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    ids = None
    if documents is not None:
        ids = (torch.arange(l) // 7).expand(b, l).to(documents).to(DEVICE)
    y, columns, dt, last = projected(
        x, **given, before=before, lengths=counts, seq_idx=ids, last=with_memory
    )
    wide = {name: t.double() for name, t in given.items()}
    exact, memory = causal_conv1d(
        x.double(), wide["conv_weight"], wide["conv_bias"],
        initial_state=None if before is None else before.double(),
        seq_idx=ids, activation="silu", backend="reference",
    )  # fmt: skip
    check_near(y, exact)
    check_near(columns, y.double() @ wide["x_proj"].t())
    expected = columns.double()[..., :r] @ wide["dt_proj"].t()
    real = torch.ones(b, l, dtype=torch.bool)
    if lengths is not None:
        real = torch.arange(l) < torch.tensor(lengths)[:, None]
    real = real.to(DEVICE)
    check_near(dt[real], expected[real])
    assert (dt[~real] == -torch.inf).all()
    if not with_memory:
        assert not last.numel()
        return
    if counts is None:
        assert torch.equal(last.double(), memory)
        return
    inputs = torch.cat((before, x.transpose(1, 2)), 2) if before is not None else x
    for row, count in enumerate(counts.tolist()):
        assert torch.equal(last[row], inputs[row, :, count : count + 3])


def test_nothing_that_is_not_low_gets_into_dt():
    """Columns behind low are multiplied by zeros; they must be zeros themselves."""
    x = torch.randn(1, 40, 128, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    given = weights(128, 9, 16)
    dt = projected(x, **given)[2]
    given["x_proj"][9:] = torch.inf
    assert torch.equal(projected(x, **given)[2], dt)


def test_what_does_not_fit():
    x, given = torch.zeros(1, 4, 128, dtype=torch.bfloat16, device=DEVICE), weights(128, 8, 16)
    assert fits(x, **given)
    changes = {
        "conv_weight": torch.zeros(128, 3, dtype=torch.bfloat16, device=DEVICE),
        "conv_bias": torch.zeros(129, dtype=torch.bfloat16, device=DEVICE)[1:],
        "x_proj": torch.zeros(129, 128, dtype=torch.bfloat16, device=DEVICE),
        "dt_proj": given["dt_proj"].float(),
    }
    for name, changed in changes.items():
        assert not fits(x, **given | {name: changed}), name
    for changed in (x.float(), x[..., :4], x[:, :0], x[..., 1:121], x.transpose(1, 2)):
        assert not fits(changed, **given)


def test_nothing_is_written_beside(monkeypatch: pytest.MonkeyPatch):
    """Results lie in the midst of NaN, which has to stay; 70 tokens are not a block's 128."""
    made: list[tuple[Tensor, int]] = []

    def new_empty(like: Tensor, *shape: int) -> Tensor:
        n, guard = torch.Size(shape).numel(), 130 * shape[-1]
        whole = torch.full((n + 2 * guard,), torch.nan, dtype=like.dtype, device=like.device)
        made.append((whole, guard))
        return whole[guard : guard + n].view(shape)

    x = torch.randn(2, 70, 136, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    given = weights(136, 9, 4)
    expected = projected(x, **given, last=True)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    found = projected(x, **given, last=True)
    monkeypatch.undo()
    assert len(made) == 4
    assert all(map(torch.equal, found, expected))
    for whole, guard in made:
        assert whole[:guard].isnan().all()
        assert whole[-guard:].isnan().all()


@pytest.mark.parametrize(
    ("b", "l", "enough"),
    [
        (8, 2048, True), (6, 2048, True), (4, 2048, False), (9, 2048, False), (16, 2048, True),
        (1, 16384, True), (1, 2048, False), (1, 1, False),
    ],
)  # fmt: skip
def test_where_it_is_faster(b: int, l: int, enough: bool, monkeypatch: pytest.MonkeyPatch):
    processors = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: processors)
    assert is_enough(torch.empty(b, l, 1)) == enough


@pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("r", [8, 5])
def test_a_layers_gradients_are_as_near_as_those_of_three_kernels(
    r: int, recompute: bool, monkeypatch: pytest.MonkeyPatch
):
    d, n, g = 24, 4, torch.Generator().manual_seed(0)
    inputs = {
        "xz": torch.randn(2, 21, 2 * d, generator=g),
        "conv_weight": torch.randn(d, 4, generator=g),
        "conv_bias": torch.randn(d, generator=g),
        "x_proj": torch.randn(r + 2 * n, d, generator=g) / d**0.5,
        "dt_proj": torch.randn(d, r, generator=g) / r**0.5,
    }
    inputs = {name: t.bfloat16() for name, t in inputs.items()}
    inputs |= {"dt_bias": torch.randn(d, generator=g) - 2}
    inputs |= {"A": -torch.rand(d, n, generator=g) - 0.1, "D": torch.randn(d, generator=g)}
    seq_idx = (torch.arange(21) // 5).expand(2, 21).to(DEVICE)
    launched: list[int] = []

    def counted(*args: Tensor, **kwargs: Tensor | None) -> tuple[Tensor, ...]:
        launched.append(1)
        return projected(*args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(mixer, "projected", counted)
    w = torch.randn(2, 21, d, generator=g)

    def results(dtype: torch.dtype | None, backend: Backend) -> dict[str, Tensor]:
        leaves = {k: v.to(DEVICE, dtype, copy=True).requires_grad_() for k, v in inputs.items()}
        y, state = mamba_mixer(**leaves, seq_idx=seq_idx, recompute=recompute, backend=backend)  # pyright: ignore
        ((y * w.to(y)).sum() + state.sum()).backward()
        grads = {k: v.grad for k, v in leaves.items() if v.grad is not None}
        return {"y": y.detach(), "state": state.detach()} | grads

    exact = results(torch.float64, "reference")
    monkeypatch.setattr(mixer, "is_enough", lambda _: True)
    one = results(None, "triton")
    monkeypatch.setattr(mixer, "is_enough", lambda _: False)
    three = results(None, "triton")
    assert launched == [1]
    assert one.keys() == exact.keys()
    bound = 0.05 if gpu.interpreted() else 0.02  # interpreted kernels cut to 8 bits
    for name in exact:
        assert_within_budget(name, one[name], three[name], exact[name])
        if name in ("y", "state"):
            assert relative_error(one[name], three[name]) < bound, name
