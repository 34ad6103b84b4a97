"""The experts' products by Hopper's matrix units (products.cu), run on the CPU, against float64."""

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_on_cpu import CXX, Kernel, kernels
from hopper_on_cpu import take_place
from torch import Tensor
from torch.nn import functional as F

from blackmamba.ops.expert_mlp import hopper
from blackmamba.ops.gpu import cuda

pytestmark = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
SIZES = [1, 0, 63, 64, 65, 128, 130, 0]  # rows of each group
T, E = sum(SIZES), len(SIZES)
BEYOND = 136  # rows of NaN before and after a result, more than a tile has
ROUNDED = 2**-8  # of a number: half of bfloat16's last place, and the sum's own error


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Kernel]:
    return kernels(tmp_path_factory.mktemp("kernels"))


class Results:
    """Takes the place of `Tensor.new_empty`: NaN, and NaN before and after, which has to stay."""

    def __init__(self):
        self._all: list[tuple[Tensor, int]] = []

    def new(self, *shape: int) -> Tensor:
        guard, numbers = BEYOND * shape[-1], torch.Size(shape).numel()
        whole = torch.full((numbers + 2 * guard,), torch.nan, dtype=torch.bfloat16)
        self._all.append((whole, guard))
        return whole[guard : guard + numbers].view(shape)

    def check(self) -> None:
        for whole, guard in self._all:
            assert whole[:guard].isnan().all()
            assert whole[-guard:].isnan().all()


@pytest.fixture(params=[1, 5], ids="blocks={}".format)
def results(
    request: pytest.FixtureRequest,
    kernel: Callable[..., Kernel],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Results]:
    """A GPU of few multiprocessors takes the launches, so that each block makes several tiles."""
    results = Results()
    monkeypatch.setattr(cuda, "kernel", kernel)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda _, *shape: results.new(*shape))
    gpu = SimpleNamespace(multi_processor_count=request.param)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    take_place(monkeypatch)
    yield results
    results.check()


def matrix(rows: int, columns: int, scale: float = 1) -> Tensor:
    """Numbers in the midst of NaN."""
    g = torch.Generator().manual_seed(rows + columns)
    whole = torch.full((rows + 300, columns + 16), torch.nan, dtype=torch.bfloat16)
    inside = whole[8 : rows + 8, 8 : columns + 8]
    inside[:] = torch.randn(rows, columns, generator=g) * scale
    return inside


def drawn(m: int, n: int, columns_of_w: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (t, m), w (e, n, m) or (e, m, n), the groups' ends, and the exact products (t, n)."""
    x = matrix(T, m)
    rows, columns = (m, n) if columns_of_w else (n, m)
    w = matrix(E * rows, columns, m**-0.5).unflatten(0, (E, rows))
    turned = w.double() if columns_of_w else w.double().mT
    exact = [a @ b for a, b in zip(x.double().split(SIZES), turned, strict=True)]
    return x, w, torch.tensor(SIZES).cumsum(0).int(), torch.cat(exact)


def assert_near(actual: Tensor, exact: Tensor, of: Tensor | None = None) -> None:
    """Each number is wrong by the rounding of itself, or of those in `of`."""
    assert actual.shape == exact.shape
    allowed = (exact if of is None else of).abs() * ROUNDED + 1e-5
    wrong = ~((actual.double() - exact).abs() <= allowed)  # NaN too
    assert not wrong.any(), f"{int(wrong.sum())} wrong, the first at {wrong.nonzero()[0].tolist()}"


@pytest.mark.parametrize(("gelu", "keep"), [(False, True), (True, False)])
@pytest.mark.usefixtures("results")
def test_gated(gelu: bool, keep: bool):
    m, n = 72, 136
    x, w, ends, exact = drawn(m, 2 * n)
    y, h = hopper.gated(x, w, ends, gelu, keep)
    g, u = exact[:, :n], exact[:, n:]
    expected = (F.gelu if gelu else F.silu)(g) * u
    assert_near(
        y, expected, of=2 * expected.abs() + 1.2 * (g * u).abs()
    )  # g and u may be rounded first
    assert (h is not None) == keep
    if h is not None:
        assert_near(h, exact)


@pytest.mark.parametrize(("by_columns", "gate", "n"), [(False, True, 200), (True, False, 264)])
def test_placed(results: Results, by_columns: bool, gate: bool, n: int):
    x, w, ends, exact = drawn(136, n, by_columns)
    g = torch.Generator().manual_seed(0)
    # After the last a row and a gate that would be seen.
    order = torch.cat([torch.randperm(T, generator=g), torch.full((300,), T)]).int()
    gates = torch.cat([torch.rand(T, generator=g), torch.full((300,), torch.nan)])
    y = hopper.placed(x, w, ends, order[:T], gates[:T] if gate else None, by_columns=by_columns)
    exact[order[:T].long()] = exact * (gates[order[:T].long(), None].double() if gate else 1)
    assert_near(y, exact)


@pytest.mark.parametrize(("m", "f", "gelu"), [(200, 72, True), (264, 136, False)])
@pytest.mark.usefixtures("results")
def test_added_to_the_stream(m: int, f: int, gelu: bool):
    x, fc1, ends, _ = drawn(m, 2 * f)
    fc2 = matrix(E * m, f, f**-0.5).unflatten(0, (E, m))
    g = torch.Generator().manual_seed(0)
    tokens, of_token = torch.randperm(T, generator=g), torch.rand(T, generator=g)
    order, rows = torch.full((E, T), T), torch.full((E, T, m), torch.nan, dtype=torch.bfloat16)
    gates = torch.full((E, T), torch.nan)  # beyond the groups is what would be seen
    for e, (own, of_group) in enumerate(zip(tokens.split(SIZES), x.split(SIZES), strict=True)):
        order[e, : len(own)], rows[e, : len(own)] = own, of_group
        gates[e, : len(own)] = of_token[own]

    stream = torch.randn(T + 2, m, generator=g)
    expected, again = stream.clone(), stream.clone()
    for to in (stream, again):
        hopper.add_routed_(
            to[1:-1], rows, torch.tensor(SIZES).int(), order.int(), gates, fc1, fc2, gelu
        )
    hidden = hopper.gated(x, fc1, ends, gelu, False)[0]
    expected[1:-1] += hopper.placed(hidden, fc2, ends, tokens.int(), of_token)
    assert torch.equal(stream, expected)
    assert torch.equal(again, stream)


def test_product(results: Results):
    x, w, ends, exact = drawn(72, 40, columns_of_w=True)
    assert_near(hopper.product(x, w, ends), exact)
    group = 4  # the one before has rows, and its last numbers come in a part of their own
    w[group, 0], w[group, 7] = torch.nan, torch.inf
    found, begin, end = hopper.product(x, w, ends), sum(SIZES[:group]), sum(SIZES[: group + 1])
    assert not found[begin:end].isfinite().any()
    found[begin:end] = exact[begin:end] = 0
    assert_near(found, exact)


def test_gradient(results: Results):
    x, w, ends = matrix(T, 200), matrix(T, 264), torch.tensor(SIZES).cumsum(0).int()
    groups = zip(x.double().split(SIZES), w.double().split(SIZES), strict=True)
    exact = torch.stack([a.mT @ b for a, b in groups])
    assert_near(hopper.gradient(x, w, ends), exact)
    start = sum(SIZES[:3])  # of a group behind 63 rows, which come with its first
    x[start], w[start] = torch.nan, torch.nan
    found = hopper.gradient(x, w, ends)
    assert found[3].isnan().all()
    others = [i for i in range(E) if i != 3]
    assert_near(found[others], exact[others])


@pytest.mark.usefixtures("results")
def test_sums_over_many_parts():
    """So many that several parts pass between the pieces of the tile before that are finished."""
    m, n = 1096, 80  # 18 parts, the last of 8 numbers, beside 8 pieces
    x, w, ends, exact = drawn(m, n)
    order = torch.arange(T - 1, -1, -1).int()
    assert_near(hopper.placed(x, w, ends, order).flip(0), exact)
    gated, h = hopper.gated(x, w, ends, False, True)
    g, u = exact.tensor_split(2, 1)
    assert_near(gated, F.silu(g) * u, of=2 * (F.silu(g) * u).abs() + 1.2 * (g * u).abs())
    assert h is not None
    assert_near(h, exact)
    x, w, ends, exact = drawn(m, n, columns_of_w=True)
    assert_near(hopper.product(x, w, ends), exact)
    sizes = [1030, 70, 2050]
    x, w, ends = matrix(sum(sizes), 72), matrix(sum(sizes), n), torch.tensor(sizes).cumsum(0)
    groups = zip(x.double().split(sizes), w.double().split(sizes), strict=True)
    assert_near(hopper.gradient(x, w, ends.int()), torch.stack([a.mT @ b for a, b in groups]))


class _Count(ctypes.Structure):
    _fields_ = (("n", ctypes.c_int),)


def test_a_deadlock_is_told(tmp_path: Path):
    source = tmp_path / "waits.cu"
    source.write_text(
        "struct Arguments { int n; };"
        'extern "C" __global__ void grouped_product(const Arguments a) {'
        "    if (threadIdx.x < a.n) __syncthreads();"
        "}"
    )
    kernel = Kernel((source,), "grouped_product", {}, tmp_path)
    kernel.launch(2, 64, _Count(64))
    with pytest.raises(
        RuntimeError, match=r"deadlock in block 0; from thread 0 on.* all 64 threads"
    ):
        kernel.launch(2, 64, _Count(63))
