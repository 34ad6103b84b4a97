"""The scan's kernels on a GPU, CUDA C++ and Triton, at sizes that the interpreter cannot do."""

import dataclasses
from typing import Any

import pytest
import torch
from numerics import assert_within_budget, relative_error
from torch import Tensor

from blackmamba.ops import selective_scan
from blackmamba.ops.gpu import hopper
from blackmamba.ops.selective_scan import call, cuda, gpu, plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]
Shape = tuple[int, int, int, int]


def make(shape: Shape, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    b, l, d, n = shape
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
    kept = ("A", "D", "dt_bias", "initial_state")
    return {k: v.to("cuda", wide if k in kept else dtype) for k, v in inputs.items()}


def documents(b: int, l: int) -> Tensor:
    g = torch.Generator().manual_seed(3)
    return (torch.rand(b, l, generator=g) < 0.03).cumsum(1).cuda()


def with_gradients(inputs: dict[str, Tensor], backend: str, **options: Any) -> dict[str, Tensor]:
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    options = {"dt_softplus": True} | options
    y, state = selective_scan(**leaves, backend=backend, **options)  # pyright: ignore
    g = torch.Generator().manual_seed(7)
    wy, ws = (torch.randn(t.shape, generator=g, dtype=torch.float64).to(t) for t in (y, state))
    ((y * wy).sum() + (state * ws).sum()).backward()
    grads = {f"grad_{k}": v.grad for k, v in leaves.items() if v.grad is not None}
    return {"y": y.detach(), "state": state.detach()} | grads


@pytest.fixture(params=["cuda", "triton"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kinds, wherever there are both."""
    if request.param == "triton":
        monkeypatch.setattr(cuda, "fits", lambda *_: False)
    return request.param


@pytest.fixture(params=[1, 3])
def n_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    planned = plan.plan

    def cut(*args: Any) -> plan.Plan:
        spans = -(-args[1] // plan.SPAN)
        chunk = -(-spans // request.param) * plan.SPAN
        return dataclasses.replace(planned(*args), chunk=chunk, n_chunks=-(-args[1] // chunk))

    monkeypatch.setattr(call, "plan", cut)
    return request.param


def seldom(kernels: str, rare: bool) -> None:
    """Each set of options of the Triton kernels takes ten seconds to compile."""
    if kernels == "triton" and rare:
        pytest.skip("the same options are tested in Triton's interpreter")


@pytest.mark.parametrize(
    "shape", [(2, 67, 24, 16), (1, 200, 40, 12), (3, 64, 96, 16), (1, 1, 8, 16)], ids=str
)
@pytest.mark.parametrize("marked", [False, True], ids=["", "documents"])
def test_float32_is_near_float64(shape: Shape, marked: bool, n_chunks: int, kernels: str):
    seldom(kernels, shape[0] != 2 or n_chunks == 1)
    seq_idx = documents(*shape[:2]) if marked else None
    exact = with_gradients(make(shape), "torch", seq_idx=seq_idx)
    actual = with_gradients(make(shape, torch.float32), "triton", seq_idx=seq_idx)
    assert actual.keys() == exact.keys()
    for name in exact:
        assert relative_error(actual[name], exact[name]) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_is_as_near_as_plain_pytorch(dtype: torch.dtype, kernels: str):
    seldom(kernels, dtype == torch.float16)
    narrow = make((2, 300, 96, 16), dtype)
    exact = with_gradients({k: v.double() for k, v in narrow.items()}, "torch")
    eager, actual = (with_gradients(narrow, backend) for backend in ("torch", "triton"))
    for name in exact:
        assert_within_budget(name, actual[name], eager[name], exact[name])


@pytest.mark.parametrize("left_out", ["D", "z", "dt_bias", "initial_state", "softplus"])
def test_optional_inputs(left_out: str, kernels: str):
    seldom(kernels, True)
    inputs = {k: v for k, v in make((2, 67, 24, 16)).items() if k != left_out}
    options = {"dt_softplus": left_out != "softplus"}
    if left_out == "softplus":
        inputs["dt"] = inputs["dt"].exp()
        inputs["dt_bias"] = inputs["dt_bias"].abs()
    exact = with_gradients(inputs, "torch", **options)
    actual = with_gradients({k: v.float() for k, v in inputs.items()}, "triton", **options)
    for name in exact:
        assert relative_error(actual[name], exact[name]) < 1e-5, name


def test_minus_infinite_dt_passes_the_state_through_bit_for_bit(kernels: str, n_chunks: int):
    seldom(kernels, n_chunks == 1)
    inputs = make((2, 67, 24, 16), torch.float32)
    inputs["dt"] = torch.full_like(inputs["dt"], -torch.inf)
    results = with_gradients(inputs, "triton")
    assert torch.equal(results["state"], inputs["initial_state"])
    assert all(t.isfinite().all() for t in results.values())


def test_parts_of_wider_tensors_and_the_same_bits_again(kernels: str):
    inputs = make((2, 100, 32, 16), torch.bfloat16)
    wider = {k: torch.cat((v, v), -1)[..., v.shape[-1] :] for k, v in inputs.items()}
    first = with_gradients(inputs, "triton")
    for other in (inputs, wider):
        again = with_gradients(other, "triton")
        for name in first:
            assert torch.equal(first[name], again[name]), name


def test_a_long_row_and_a_full_batch():
    for shape in ((1, 32768, 64, 16), (4, 2048, 768, 16)):
        inputs = make(shape, torch.float32)
        exact = with_gradients({k: v.double() for k, v in inputs.items()}, "torch")
        actual = with_gradients(inputs, "triton")
        for name in exact:
            assert relative_error(actual[name], exact[name]) < 3e-5, name  # sums of 32,768 numbers


def test_runs_in_a_captured_graph():
    inputs = make((2, 64, 32, 16), torch.bfloat16)
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}

    def step() -> tuple[Tensor, ...]:
        y, _ = selective_scan(**leaves, dt_softplus=True, backend="triton")  # pyright: ignore
        return torch.autograd.grad(y.float().sum(), list(leaves.values()), allow_unused=True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, b in zip(expected, captured, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("block", sorted({tuning.block for tuning in plan.CUDA_OTHERS}))
def test_every_block_that_may_be_tuned(block: int, monkeypatch: pytest.MonkeyPatch):
    """Of the kernels in CUDA C++; 104 channels are whole blocks of none."""
    tuning = next(t for t in plan.CUDA_OTHERS if t.block == block)

    def forced(b: int, l: int, d: int, n_padded: int, processors: int, *_: object) -> plan.Plan:
        cut = plan.cuts(b, l, d, n_padded, processors, tuning)[0]
        return plan.planned(dataclasses.replace(cut, n_chunks=2), l)

    monkeypatch.setattr(call, "plan", forced)
    exact = with_gradients(make((2, 67, 104, 16)), "torch")
    actual = with_gradients(make((2, 67, 104, 16), torch.float32), "triton")
    for name in exact:
        assert relative_error(actual[name], exact[name]) < 1e-5, name


@pytest.mark.parametrize("tuning", plan.CUDA_FORWARD, ids=lambda tuning: str(tuning.block))
def test_every_block_of_the_forward_pass(tuning: plan.Tuning, monkeypatch: pytest.MonkeyPatch):
    planned = plan.plan
    monkeypatch.setattr(call, "plan", lambda *size: planned(*size[:5], tuning))
    with torch.no_grad():
        exact = selective_scan(**make((2, 67, 232, 16)), dt_softplus=True, backend="torch")  # pyright: ignore
        actual = selective_scan(
            **make((2, 67, 232, 16), torch.float32),  # pyright: ignore
            dt_softplus=True,
            backend="triton",
        )
    for a, b in zip(actual, exact, strict=True):
        assert relative_error(a, b) < 3e-6


@pytest.mark.parametrize("marked", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("tuning", plan.CUDA_FORWARD, ids=lambda tuning: str(tuning.block))
def test_the_forward_pass_in_equal_shares(
    tuning: plan.Tuning, marked: bool, monkeypatch: pytest.MonkeyPatch
):
    """The bits of whole rows: of outputs, and of gradients, which come of the states it keeps."""
    planned, shape = plan.plan, (5, 333, 296, 16)
    narrow, seq_idx = make(shape, torch.bfloat16), documents(*shape[:2]) if marked else None
    shares, launch = list[int](), cuda.launch

    def launched(name: str, blocks: int, warps: int, sizes: tuple[int, ...], *rest: Any) -> None:
        if name == "scan_forward":
            shares.append(sizes[6])
        launch(name, blocks, warps, sizes, *rest)

    def with_share(split: bool) -> dict[str, Tensor]:
        one = dataclasses.replace(tuning, split=split)

        def forced(*size: Any) -> plan.Plan:
            return planned(*size[:5], *((one,) if plan.CUDA_FORWARD[0] in size[5:] else size[5:]))

        monkeypatch.setattr(call, "plan", forced)
        return with_gradients(narrow, "triton", seq_idx=seq_idx)

    monkeypatch.setattr(cuda, "launch", launched)
    monkeypatch.setattr("blackmamba.ops.gpu.processors", lambda _: 4)
    whole, shared = with_share(False), with_share(True)
    assert shares[0] == 21 < shares[1]  # spans of a row
    assert shares[1] % 21
    for name, expected in whole.items():
        assert torch.equal(shared[name], expected), name


@pytest.mark.parametrize("tuning", plan.CUDA_BACKWARD, ids=lambda tuning: str(tuning.block))
def test_rows_that_are_shared_out(tuning: plan.Tuning, monkeypatch: pytest.MonkeyPatch):
    """As whole rows, but for the order in which their parts are added up."""
    planned = plan.plan
    narrow = make((5, 333, 296, 16), torch.bfloat16)

    def with_share(split: bool) -> dict[str, Tensor]:
        one = dataclasses.replace(tuning, split=split)

        def forced(*size: Any) -> plan.Plan:
            return planned(*size[:5], one if plan.CUDA_BACKWARD[0] in size[5:] else size[5])

        monkeypatch.setattr(call, "plan", forced)
        return with_gradients(narrow, "triton")

    monkeypatch.setattr("blackmamba.ops.gpu.processors", lambda _: 2)
    whole, shared = with_share(False), with_share(True)
    for name, expected in whole.items():
        if name in ("grad_A", "grad_D", "grad_dt_bias"):
            assert relative_error(shared[name], expected) < 1e-6, name
        else:
            assert torch.equal(shared[name], expected), name


@pytest.fixture
def by_units(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched; the forward pass is by matrix units."""
    if not hopper.runs_on(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("needs a Hopper")
    names, launch = list[str](), cuda.launch
    faster = (dataclasses.replace(plan.CUDA_FORWARD_UNITS[0], slower=0),)
    monkeypatch.setattr(gpu, "CUDA_FORWARD_UNITS", faster)

    def launched(name: str, *rest: Any) -> None:
        names.append(name)
        launch(name, *rest)

    monkeypatch.setattr(cuda, "launch", launched)
    return names


@pytest.mark.parametrize("marked", [False, True], ids=["", "documents"])
@pytest.mark.parametrize(
    ("shape", "processors"), [((5, 333, 296, 16), 4), ((1, 1000, 2312, 16), 132)], ids=str
)
def test_the_forward_pass_by_matrix_units(
    shape: Shape,
    processors: int,
    marked: bool,
    by_units: list[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """The same bits however rows are shared out, as near to float64 as plain PyTorch."""
    narrow, seq_idx = make(shape, torch.bfloat16), documents(*shape[:2]) if marked else None
    found: list[dict[str, Tensor]] = []
    for n in (10_000, processors):
        monkeypatch.setattr("blackmamba.ops.gpu.processors", lambda _, n=n: n)
        found.append(with_gradients(narrow, "triton", seq_idx=seq_idx))
    assert by_units.count("scan_forward_units") == 2
    for name in ("y", "state"):
        assert torch.equal(found[0][name], found[1][name]), name
    eager = with_gradients(narrow, "torch", seq_idx=seq_idx)
    exact = with_gradients({k: v.double() for k, v in narrow.items()}, "torch", seq_idx=seq_idx)
    for name in exact:
        assert_within_budget(name, found[1][name], eager[name], exact[name])
    assert relative_error(found[1]["state"], exact["state"]) < 1e-5


def test_a_long_row_by_matrix_units(by_units: list[str], monkeypatch: pytest.MonkeyPatch):
    """As the usual kernel, again and again with the same bits, where shares are a row and a bit."""
    inputs = make((1, 16384, 2304, 16), torch.bfloat16)
    with torch.no_grad():
        y, state = selective_scan(**inputs, dt_softplus=True, backend="triton")  # pyright: ignore
        for _ in range(5):
            again = selective_scan(**inputs, dt_softplus=True, backend="triton")  # pyright: ignore
            assert torch.equal(again[0], y)
            assert torch.equal(again[1], state)
        assert set(by_units) == {"scan_forward_units"}
        monkeypatch.setattr(gpu, "CUDA_FORWARD_UNITS", ())
        usual = selective_scan(**inputs, dt_softplus=True, backend="triton")  # pyright: ignore
    assert by_units[-1] == "scan_forward"
    assert relative_error(state, usual[1]) < 3e-6
    assert relative_error(y, usual[0]) < 2**-8  # the last place of bfloat16


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_matrix_units_let_no_number_back_in_time(bad: float, by_units: list[str]):
    inputs = make((1, 100, 40, 16), torch.bfloat16)
    with torch.no_grad():
        fine, _ = selective_scan(**inputs, dt_softplus=True, backend="triton")  # pyright: ignore
        inputs["x"][0, 50, 3] = bad
        y, state = selective_scan(**inputs, dt_softplus=True, backend="triton")  # pyright: ignore
    assert torch.equal(y[:, :50], fine[:, :50])
    assert torch.equal(y[..., 4:], fine[..., 4:])
    assert not y[0, 50:, 3].isfinite().any()
    assert not state[0, 3].isfinite().any()
    assert set(by_units) == {"scan_forward_units"}
