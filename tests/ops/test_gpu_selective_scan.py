"""The scan's kernels: Triton's interpreted, or on a GPU where there is one; CUDA's on the CPU."""

import dataclasses
from pathlib import Path
from typing import Any

import hopper_on_cpu
import pytest
import torch
from cuda_on_cpu import CXX, kernels
from numerics import assert_within_budget, relative_error
from torch import Tensor

from blackmamba.errors import BackendError
from blackmamba.ops import gpu, selective_scan
from blackmamba.ops.gpu import cuda
from blackmamba.ops.selective_scan import call, plan
from blackmamba.ops.selective_scan import cuda as scan_cuda
from blackmamba.ops.selective_scan import gpu as scan

pytestmark = pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CUDA_ON_CPU = pytest.mark.skipif(
    CXX is None or DEVICE == "cuda", reason="needs a C++ compiler, and no GPU that could run it"
)
WIDE = ("A", "D", "dt_bias", "initial_state")


def make(b: int, l: int, d: int, n: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """All inputs of the scan by name, as a trained layer would have them."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    inputs = {
        "x": normal(b, l, d),
        "dt": normal(b, l, d) - 1,
        "A": -torch.exp(normal(d, n)),
        "B": normal(b, l, n),
        "C": normal(b, l, n),
        "D": normal(d),
        "z": normal(b, l, d),
        "dt_bias": normal(d),
        "initial_state": normal(b, d, n),
    }
    wide = torch.promote_types(dtype, torch.float32)
    return {k: v.to(DEVICE, wide if k in WIDE else dtype) for k, v in inputs.items()}


def documents(b: int, l: int) -> Tensor:
    g = torch.Generator().manual_seed(3)
    return (torch.rand(b, l, generator=g) < 0.15).cumsum(1).to(DEVICE)


def with_gradients(
    inputs: dict[str, Tensor], backend: str, seq_idx: Tensor | None = None, softplus: bool = True
) -> dict[str, Tensor]:
    """Outputs and every gradient of a fixed random weighting of both outputs."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    y, state = selective_scan(**leaves, dt_softplus=softplus, seq_idx=seq_idx, backend=backend)  # pyright: ignore
    g = torch.Generator().manual_seed(7)
    wy, ws = (torch.randn(t.shape, generator=g, dtype=torch.float64).to(t) for t in (y, state))
    ((y * wy).sum() + (state * ws).sum()).backward()
    grads = {f"grad_{k}": v.grad for k, v in leaves.items() if v.grad is not None}
    return {"y": y.detach(), "state": state.detach()} | grads


def compare(shape: tuple[int, int, int, int], seq_idx: Tensor | None = None) -> None:
    """Float32 against float64: sums of a few hundred numbers, each rounded to 6e-8 of itself."""
    exact = with_gradients(make(*shape), "reference", seq_idx)
    actual = with_gradients(make(*shape, dtype=torch.float32), "triton", seq_idx)
    assert actual.keys() == exact.keys()
    for name in exact:
        assert relative_error(actual[name], exact[name]) < 3e-6, name


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is cut into chunks of one span, whatever the machine."""
    planned = plan.plan

    def short(*args: int, **kwargs: int) -> plan.Plan:
        _, l, *_ = args
        chunk = plan.SPAN
        return dataclasses.replace(planned(*args, **kwargs), chunk=chunk, n_chunks=-(-l // chunk))  # pyright: ignore

    monkeypatch.setattr(call, "plan", short)


@pytest.mark.parametrize(
    "shape",
    [
        *((1, 1, 1, 1), (2, 2, 3, 4), (1, 15, 16, 5), (1, 17, 17, 16)),
        *((2, 33, 5, 3), (1, 3, 2, 100), (1, 3, 10, 300)),
    ],
    ids=str,
)
def test_float32_is_near_float64(shape: tuple[int, int, int, int]):
    compare(shape)


@pytest.mark.parametrize("marked", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("shape", [(2, 37, 5, 4), (1, 48, 16, 16)], ids=str)
def test_chunks_give_the_same(shape: tuple[int, int, int, int], marked: bool, in_chunks: None):
    compare(shape, documents(*shape[:2]) if marked else None)


def check_final_state(shape: tuple[int, int, int, int], has_first: bool) -> None:
    names = ("x", "dt", "A", "B", "dt_bias", "initial_state")
    exact, narrow = make(*shape), make(*shape, dtype=torch.float32)
    if not has_first:
        del exact["initial_state"], narrow["initial_state"]
    state = scan.final_state(*(narrow.get(name) for name in names), True)  # pyright: ignore
    expected = selective_scan(**exact, dt_softplus=True, backend="reference")[1]  # pyright: ignore
    assert relative_error(state, expected) < 3e-6


@pytest.mark.parametrize("has_first", [False, True])
@pytest.mark.parametrize("shape", [(2, 37, 5, 5), (2, 9, 7, 16)], ids=str)
def test_final_state_alone(shape: tuple[int, int, int, int], has_first: bool, in_chunks: None):
    check_final_state(shape, has_first)


def test_documents():
    compare((2, 37, 18, 4), documents(2, 37))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tiles", [1, 2])
def test_narrow_is_as_near_as_plain_pytorch(
    dtype: torch.dtype, tiles: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scan, "TILES", tiles)
    narrow = make(2, 35, 5, 4, dtype=dtype)
    exact = with_gradients({k: v.double() for k, v in narrow.items()}, "reference")
    eager, actual = (with_gradients(narrow, backend) for backend in ("reference", "triton"))
    for name in exact:
        assert actual[name].dtype == eager[name].dtype
        assert_within_budget(name, actual[name], eager[name], exact[name])


def test_sums_by_matrix_units(monkeypatch: pytest.MonkeyPatch):
    """As on NVIDIA GPUs for narrow inputs. Interpreted they are exact; a GPU reads 11 bits."""
    monkeypatch.setattr(scan, "_sum_by", lambda *_: "tf32")
    shape = (1, 21, 20, 4)
    exact = with_gradients(make(*shape), "reference")
    actual = with_gradients(make(*shape, dtype=torch.float32), "triton")
    for name in exact:
        bound = 1e-3 if name in ("grad_B", "grad_C") else 3e-6
        assert relative_error(actual[name], exact[name]) < bound, name


@pytest.mark.parametrize("n", [4, 1000])
@pytest.mark.parametrize("of", [0, 1], ids=["y", "state"])
def test_the_gradient_of_one_output_alone(of: int, n: int):
    found: list[tuple[Tensor, ...]] = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        leaves = {k: v.requires_grad_() for k, v in make(1, 3, 2, n, dtype).items()}
        out = selective_scan(**leaves, dt_softplus=True, backend=backend)[of]  # pyright: ignore
        grads = torch.autograd.grad(out.sum(), list(leaves.values()), materialize_grads=True)
        found.append(grads)
    for expected, actual in zip(*found, strict=True):
        assert torch.allclose(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("left_out", ["D", "z", "dt_bias", "initial_state", "softplus"])
def test_optional_inputs(left_out: str):
    inputs = {k: v for k, v in make(2, 19, 3, 4).items() if k != left_out}
    softplus = left_out != "softplus"
    if not softplus:
        inputs["dt"] = inputs["dt"].exp()
        inputs["dt_bias"] = inputs["dt_bias"].abs()
    exact = with_gradients(inputs, "reference", softplus=softplus)
    actual = with_gradients({k: v.float() for k, v in inputs.items()}, "triton", softplus=softplus)
    assert actual.keys() == exact.keys()
    for name in exact:
        assert relative_error(actual[name], exact[name]) < 3e-6, name


@pytest.mark.parametrize("shift", [-14.0, 20.0])
def test_delta_from_1e_6_to_20(shift: float):
    inputs = make(1, 20, 3, 4)
    inputs["dt"] = inputs["dt"] + shift
    exact = with_gradients(inputs, "reference")
    actual = with_gradients({k: v.float() for k, v in inputs.items()}, "triton")
    for name in exact:
        assert relative_error(actual[name], exact[name]) < 1e-5, name  # exp(20 A) is poorly rounded


def test_minus_infinite_dt_passes_the_state_through_bit_for_bit(in_chunks: None):
    inputs = make(2, 37, 3, 4, dtype=torch.float32)
    inputs["dt"] = torch.full_like(inputs["dt"], -torch.inf)
    results = with_gradients(inputs, "triton")
    assert torch.equal(results["state"], inputs["initial_state"])
    assert all(t.isfinite().all() for t in results.values())


def test_empty_strided_and_repeated():
    for shape in ((0, 5, 3, 4), (2, 0, 3, 4)):
        exact = with_gradients(make(*shape), "reference")
        actual = with_gradients(make(*shape, dtype=torch.float32), "triton")
        for name in exact:
            assert relative_error(actual[name], exact[name]) < 1e-6, name
    inputs = make(2, 20, 6, 4, dtype=torch.float32)
    strided = {k: v.repeat_interleave(2, dim=-1)[..., ::2] for k, v in inputs.items()}
    wider = {k: torch.cat((v, v), -1)[..., : v.shape[-1]] for k, v in inputs.items()}
    first = with_gradients(inputs, "triton")
    for other in (inputs, strided, wider):
        again = with_gradients(other, "triton")
        for name in first:
            assert torch.equal(first[name], again[name]), name  # the same bits


def test_unwritten_memory_is_never_read(nan_filled_memory: None, in_chunks: None):
    results = with_gradients(make(2, 37, 18, 3, dtype=torch.float32), "triton", documents(2, 37))
    for name, value in results.items():
        assert value.isfinite().all(), name


def test_nan_stays_in_its_channel_and_after_its_token():
    inputs = make(2, 20, 3, 4, dtype=torch.float32)
    inputs["x"][0, 4, 1] = torch.nan
    y, state = selective_scan(**inputs, dt_softplus=True, backend="triton")  # pyright: ignore
    assert y[0, 4:, 1].isnan().all()
    assert state[0, 1].isnan().all()
    assert y[1].isfinite().all()
    assert y[0, :4].isfinite().all()
    assert y[0, :, (0, 2)].isfinite().all()


@pytest.mark.parametrize("left_out", [(), ("D", "z", "dt_bias", "initial_state")], ids=str)
def test_registered_as_torch_wants_it(left_out: tuple[str, ...]):
    inputs = make(1, 5, 3, 4, dtype=torch.float32)
    args = [None if k in left_out else v.requires_grad_() for k, v in inputs.items()]
    seq_idx = None if left_out else documents(1, 5)
    operation = torch.ops.blackmamba.selective_scan_gpu.default
    torch.library.opcheck(operation, (*args, seq_idx, True, True))


def test_float64_is_refused():
    with pytest.raises(BackendError, match="float64"):
        selective_scan(**make(1, 2, 3, 4), backend="triton")  # pyright: ignore


@pytest.mark.parametrize("l", [1, 15, 16, 2048, 32768])
@pytest.mark.parametrize("b", [1, 8])
def test_plans_cover_every_token(b: int, l: int):
    for tunings in ((plan.FORWARD,), (plan.BACKWARD,), plan.CUDA_FORWARD, plan.CUDA_BACKWARD):
        cut = plan.plan(b, l, 2304, 16, 132, *tunings)
        assert cut.chunk % plan.SPAN == 0
        assert (cut.n_chunks - 1) * cut.chunk < l <= cut.n_chunks * cut.chunk


@pytest.mark.parametrize("n", [16, 128, 256, 1024])
def test_a_block_has_registers_for_its_states(n: int):
    for tuning in (plan.FORWARD, plan.BACKWARD):
        cut = plan.plan(2, 100, 64, n, 132, tuning)
        assert 32 * cut.warps * (tuning.registers or 64) <= 65_536
        assert cut.block * n <= 32 * cut.warps * tuning.numbers


@pytest.mark.parametrize("l", [1, 100, 2048, 32768])
def test_plans_of_few_rows_are_those_without_shares(l: int):
    whole = tuple(dataclasses.replace(tuning, split=False) for tuning in plan.CUDA_FORWARD)
    for b in (1, 2, 4):
        cut = plan.plan(b, l, 2304, 16, 132, *plan.CUDA_FORWARD)
        assert dataclasses.replace(cut, split=False) == plan.plan(b, l, 2304, 16, 132, *whole)


def test_the_plan_that_fills_a_gpu():
    """On an H200 (132 multiprocessors) each of these was within 1 % of the fastest that was tried,
    but for 1 x 16,384, which was not."""
    for shape, forward, backward in (
        ((8, 2048, 2304), (128, 1), (128, 1)),
        ((16, 2048, 2304), (192, 1), (128, 1)),
        ((8, 2048, 2944), (128, 1), (128, 1)),
        ((1, 16384, 2304), (192, 11), (128, 22)),
        ((1, 32768, 2304), (192, 11), (128, 22)),
    ):
        for tunings, expected in ((plan.CUDA_FORWARD, forward), (plan.CUDA_BACKWARD, backward)):
            cut = plan.plan(*shape, 16, 132, *tunings)
            assert (cut.block, cut.n_chunks) == expected, shape


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the CUDA kernels that were made; the CPU runs them now."""
    names: list[str] = []
    monkeypatch.setattr(cuda, "kernel", kernels(tmp_path, names.append))
    monkeypatch.setattr(cuda, "runs_on", lambda _: True)
    return names


@CUDA_ON_CPU
def test_cuda_in_float32_in_chunks_with_documents(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
):
    planned = plan.plan

    def cut(*args: int, **kwargs: int) -> plan.Plan:
        return dataclasses.replace(planned(*args, **kwargs), chunk=32, n_chunks=2)  # pyright: ignore

    monkeypatch.setattr(call, "plan", cut)
    shape, seq_idx = (1, 41, 56, 12), documents(1, 41)
    exact = with_gradients(make(*shape), "reference", seq_idx)
    actual = with_gradients(make(*shape, dtype=torch.float32), "triton", seq_idx)
    assert sorted(launched) == ["scan_backward", "scan_backward_local"] + ["scan_forward"] * 2
    for name in exact:
        assert relative_error(actual[name], exact[name]) < 3e-6, name
    check_final_state(shape, has_first=True)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Of each pass, what said that states were handed over."""
    pack, found = call.Call.pack, list[Tensor]()

    def packed(self: call.Call, zeros: int = 0) -> None:
        pack(self, zeros)
        found.append(self.there)

    monkeypatch.setattr(call.Call, "pack", packed)
    return found


@CUDA_ON_CPU
def test_cuda_shares_rows_out(
    launched: list[str], there: list[Tensor], monkeypatch: pytest.MonkeyPatch
):
    """More rows than blocks that run at once: most blocks do the begin of one and the end of
    another. What says that a state is there says so no more once it was taken."""
    monkeypatch.setattr("blackmamba.ops.gpu.processors", lambda _: 1)
    shape = (3, 73, 56, 16)
    exact = with_gradients(make(*shape), "reference")
    actual = with_gradients(make(*shape, dtype=torch.float32), "triton")
    assert launched == ["scan_forward", "scan_backward"]
    assert [len(t) for t in there] == [3, 3]  # in blocks of 48 channels, or of 32
    assert not any(t.any() for t in there)
    for name in exact:
        assert relative_error(actual[name], exact[name]) < 3e-6, name


NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "seq_idx")
Found = tuple[Tensor, Tensor, Tensor]


def forward(inputs: dict[str, Tensor]) -> Found:
    """y, the final state and the states that are kept."""
    return scan._forward(*(inputs.get(name) for name in NAMES), True, True)  # pyright: ignore


def check_forward(whole: Found, shared: Found, inputs: dict[str, Tensor]) -> Tensor:
    """Both have the same bits, as near to float64 as plain PyTorch; the exact final state."""
    for a, b in zip(whole, shared, strict=True):
        assert torch.equal(a, b)
    wide = {k: v if k == "seq_idx" else v.double() for k, v in inputs.items()}
    eager, exact = (
        selective_scan(**each, dt_softplus=True, backend="reference")  # pyright: ignore
        for each in (inputs, wide)
    )
    for name, *of_each in zip(("y", "state"), shared, eager, exact, strict=False):
        assert_within_budget(name, *of_each)
    return exact[1]


@CUDA_ON_CPU
@pytest.mark.parametrize(
    ("at_once", "share"),
    [
        (1, 45),  # all that there is
        (2, 23),  # a row's begin, or its end, and whole rows
        (4, 12),
        (7, 7),
        (8, 6),  # seven are of a row's end and another's begin
        (9, 5),  # rows
        (20, 5),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "left_out"),
    [
        (torch.float32, ()),
        (torch.float32, ("initial_state",)),
        (torch.float32, ("seq_idx",)),
        (torch.bfloat16, ("D", "z", "dt_bias", "initial_state")),
    ],
    ids=str,
)
def test_cudas_forward_pass_in_equal_shares(
    at_once: int,
    share: int,
    dtype: torch.dtype,
    left_out: tuple[str, ...],
    launched: list[str],
    there: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
):
    """3 rows of 5 spans in 3 blocks of channels, of which the last is half empty: y, the final
    state and the states that are kept have the bits that they have where rows are whole."""
    monkeypatch.setattr("blackmamba.ops.gpu.processors", lambda _: at_once)
    shares, launch = list[int](), scan_cuda.launch

    def launch_so(name: str, blocks: int, warps: int, sizes: tuple[int, ...], *rest: Any) -> None:
        shares.append(sizes[6])
        assert blocks == -(-45 // sizes[6])
        launch(name, blocks, warps, sizes, *rest)

    monkeypatch.setattr(scan_cuda, "launch", launch_so)
    inputs = make(3, 73, 40, 16, dtype=dtype) | {"seq_idx": documents(3, 73)}
    inputs = {k: v for k, v in inputs.items() if k not in left_out}
    found: list[Found] = []
    for split in (False, True):
        tuning = plan.Tuning(block=16, numbers=4, resident=2, extra=0.6, split=split)
        monkeypatch.setattr(scan, "CUDA_FORWARD", (tuning,))
        found.append(forward(inputs))
    assert launched == ["scan_forward"]
    assert shares == [5, share]
    assert [len(t) for t in there] == [0, at_once if share > 5 else 0]
    assert not there[1].any()
    check_forward(*found, inputs)


@pytest.fixture
def by_units(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """On a Hopper, where the forward pass is never expected to take less time otherwise."""
    hopper_on_cpu.take_place(monkeypatch)
    faster = (dataclasses.replace(plan.CUDA_FORWARD_UNITS[0], slower=0),)
    monkeypatch.setattr(scan, "CUDA_FORWARD_UNITS", faster)
    return launched


@CUDA_ON_CPU
@pytest.mark.parametrize("at_once", [1, 2, 4, 7, 20])
@pytest.mark.parametrize(
    "left_out",
    [(), ("initial_state",), ("seq_idx",), ("D", "z", "dt_bias", "initial_state", "seq_idx")],
    ids=str,
)
def test_the_forward_pass_by_matrix_units(
    at_once: int, left_out: tuple[str, ...], by_units: list[str], monkeypatch: pytest.MonkeyPatch
):
    """3 rows of 145 tokens, in 3 blocks of channels of which the last is half empty, in shares that
    end within rows or do not: the bits of y, the final state and the states that are kept are the
    same, and near those of float64."""
    inputs = make(3, 145, 40, 16, dtype=torch.bfloat16) | {"seq_idx": documents(3, 145)}
    inputs = {k: v for k, v in inputs.items() if k not in left_out}
    found: list[Found] = []
    for processors in (100, at_once):
        monkeypatch.setattr("blackmamba.ops.gpu.processors", lambda _, n=processors: n)
        found.append(forward(inputs))
    assert by_units == ["scan_forward_units"]
    exact_state = check_forward(*found, inputs)
    assert relative_error(found[1][1], exact_state) < 3e-6


@CUDA_ON_CPU
@pytest.mark.parametrize("l", [1, 16, 17, 130])
def test_states_that_matrix_units_keep(
    l: int, by_units: list[str], monkeypatch: pytest.MonkeyPatch
):
    inputs = make(2, l, 24, 16, dtype=torch.bfloat16)
    y, state, kept = forward(inputs)
    monkeypatch.setattr(scan, "CUDA_FORWARD_UNITS", ())
    other_y, other_state, other_kept = forward(inputs)
    assert by_units[0] == "scan_forward_units"
    assert set(by_units[1:]) == {"scan_forward"}
    assert relative_error(state, other_state) < 1e-6
    assert relative_error(kept, other_kept) < 1e-3  # a few numbers are rounded the other way
    assert relative_error(y, other_y) < 2**-8  # the last place of bfloat16


@CUDA_ON_CPU
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_matrix_units_let_no_number_back_in_time(bad: float, by_units: list[str]):
    inputs = make(1, 40, 16, 16, dtype=torch.bfloat16)
    fine = forward(inputs)[0]
    inputs["x"][0, 22, 3] = bad
    y, state, _ = forward(inputs)
    others = [c for c in range(16) if c != 3]
    assert torch.equal(y[:, :22], fine[:, :22])
    assert torch.equal(y[..., others], fine[..., others])
    assert not y[0, 22:, 3].isfinite().any()
    assert not state[0, 3].isfinite().any()
    inputs["x"][0, 22, 3] = 0
    inputs["B"][0, 22] = bad
    y = forward(inputs)[0]
    assert torch.equal(y[:, :22], fine[:, :22])
    assert not y[0, 22].isfinite().any()
    assert by_units == ["scan_forward_units"]


@CUDA_ON_CPU
def test_matrix_units_pass_the_state_through_bit_for_bit(by_units: list[str]):
    inputs = make(2, 37, 24, 16, dtype=torch.bfloat16)
    inputs["dt"] = torch.full_like(inputs["dt"], -torch.inf)
    y, state, _ = forward(inputs)
    assert torch.equal(state, inputs["initial_state"])
    assert y.isfinite().all()
    assert by_units == ["scan_forward_units"]


@CUDA_ON_CPU
def test_tune_may_choose_matrix_units(by_units: list[str], monkeypatch: pytest.MonkeyPatch):
    """Where they are not expected to be the fastest, but nearly."""
    slower = (dataclasses.replace(plan.CUDA_FORWARD_UNITS[0], slower=1),)
    monkeypatch.setattr(scan, "CUDA_FORWARD_UNITS", slower)
    inputs = make(1, 20, 16, 16, dtype=torch.bfloat16)
    forward(inputs)
    assert "scan_forward_units" not in by_units

    def pick(_: str, __: str, default: plan.Cut, candidates: Any, ___: Any) -> plan.Cut:
        assert not default.units
        return next(cut for cut in candidates() if cut.units)

    monkeypatch.setattr(call.tuning, "pick", pick)
    forward(inputs)
    assert by_units[-1] == "scan_forward_units"


@CUDA_ON_CPU
@pytest.mark.parametrize("wide", ["B", "C", "all"])
def test_matrix_units_are_for_bfloat16_alone(wide: str, by_units: list[str]):
    inputs = make(1, 20, 16, 16, dtype=torch.bfloat16)
    for name in ("x", "dt", "B", "C", "z") if wide == "all" else (wide,):
        inputs[name] = inputs[name].float()
    forward(inputs)
    assert by_units == ["scan_forward"]


def test_few_rows_are_scanned_by_matrix_units():
    """Where an H200 took less time so, and not where it took more."""
    for l, d, yes, no in (
        (2048, 2304, (1, 2, 3, 4), (5, 6, 7, 8, 16)),
        (32768, 2304, (1,), ()),
        (2048, 2944, (1, 2, 3), (4, 5, 8)),
        (2048, 1536, (1, 2, 4, 6), ()),
        (2048, 1024, (2, 4, 8), ()),
        (2048, 768, (2, 4, 8), (1,)),
        (2048, 512, (4, 8), (1,)),
        (512, 256, (4, 8), ()),
    ):
        for b in (*yes, *no):
            cut = plan.plan(b, l, d, 16, 132, *plan.CUDA_FORWARD, *plan.CUDA_FORWARD_UNITS)
            assert cut.units == (b in yes), (b, l, d)
            assert cut.n_chunks == 1 or not cut.units


@CUDA_ON_CPU
def test_cuda_in_bfloat16_with_rows_shared_out(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
):
    """By the widest blocks there are: as with whole rows, but for the order in which rows' parts
    are added up."""
    monkeypatch.setattr(scan, "CUDA_BACKWARD", plan.CUDA_BACKWARD[1:2])
    narrow = make(2, 35, 136, 16, dtype=torch.bfloat16)
    whole = with_gradients(narrow, "triton")
    monkeypatch.setattr("blackmamba.ops.gpu.processors", lambda _: 3)
    shared = with_gradients(narrow, "triton")
    assert set(launched) == {"scan_forward", "scan_backward"}
    for name, expected in whole.items():
        if name in ("grad_A", "grad_D", "grad_dt_bias"):
            assert relative_error(shared[name], expected) < 1e-6, name
        else:
            assert torch.equal(shared[name], expected), name


@CUDA_ON_CPU
@pytest.mark.parametrize("block", [16, 80])
def test_cuda_in_blocks_that_only_tuning_tries(
    block: int, launched: list[str], monkeypatch: pytest.MonkeyPatch
):
    """A thread has 32 bytes of a span's B and C, or 8 and some threads none."""
    tried = plan.Tuning(block=block, numbers=4, resident=16, extra=0.4)
    monkeypatch.setattr(scan, "CUDA_BACKWARD", (tried,))
    shape = (1, 35, 88, 16)
    exact = with_gradients(make(*shape), "reference")
    actual = with_gradients(make(*shape, dtype=torch.float32), "triton")
    assert launched == ["scan_forward", "scan_backward"]
    for name in exact:
        assert relative_error(actual[name], exact[name]) < 3e-6, name


def test_rows_of_4_gb_are_not_for_cudas_backward_pass():
    def rows(l: int) -> Tensor:
        return torch.empty(1, l, 4608, dtype=torch.bfloat16, device="meta")[..., 2304:]

    assert scan_cuda.fits_backward([rows(466_033), None])
    assert not scan_cuda.fits_backward([rows(100), rows(466_034)])


@CUDA_ON_CPU
def test_cuda_where_softplus_ends(launched: list[str]):
    """Far from zero softplus(v) is exp(v), or v: the backward pass gets its slope from it."""
    wide = make(1, 19, 56, 16)
    wide["dt_bias"] = torch.linspace(-40, 200, 56, dtype=torch.float64)
    wide = {k: v.float().double() for k, v in wide.items()}
    exact = with_gradients(wide, "reference")
    actual = with_gradients({k: v.float() for k, v in wide.items()}, "triton")
    assert launched == ["scan_forward", "scan_backward"]
    for name in exact:
        assert relative_error(actual[name], exact[name]) < 3e-6, name
    grad, expected = actual["grad_dt_bias"], exact["grad_dt_bias"]
    assert ((grad - expected).abs() < 1e-4 * expected.abs()).all()


@CUDA_ON_CPU
def test_cuda_in_bfloat16_is_as_near_as_plain_pytorch(launched: list[str]):
    narrow = make(2, 35, 24, 16, dtype=torch.bfloat16)
    exact = with_gradients({k: v.double() for k, v in narrow.items()}, "reference")
    eager, actual = (with_gradients(narrow, backend) for backend in ("reference", "triton"))
    assert launched == ["scan_forward", "scan_backward"]
    for name in exact:
        assert_within_budget(name, actual[name], eager[name], exact[name])
