"""The native products with weights of every kind, against float64 and against themselves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import relative_error
from torch import Tensor

from blackmamba.ops import QuantizedWeight, dequantize, native, quantize_weight, quantized_linear
from blackmamba.ops.quantized_linear.native import FEW, KINDS, _few_vectors

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

WEIGHTS = {
    "float32": lambda w: w,
    "bfloat16": lambda w: w.bfloat16(),
    "int8 32": lambda w: quantize_weight(w, 8, 32),
    "int8 64": lambda w: quantize_weight(w, 8, 64),
    "int8 128": lambda w: quantize_weight(w, 8, 128),
    "int4 32": lambda w: quantize_weight(w, 4, 32),
    "int4 64": lambda w: quantize_weight(w, 4, 64),
    "int4 128": lambda w: quantize_weight(w, 4, 128),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    n_threads: int = 1,
    narrow: bool = False,
) -> Tensor:
    """The kernel itself: it takes any kind and any number of vectors."""
    data = weight if isinstance(weight, Tensor) else weight.data
    scales = None if isinstance(weight, Tensor) else weight.scales
    y = torch.full((len(x), len(data)), math.nan, dtype=x.dtype)
    native.extension().weight_product(
        x.data_ptr(),
        x.stride(0),
        len(x),
        x.dtype == torch.bfloat16,
        KINDS[data.dtype],
        data.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        len(data),
        x.shape[1],
        0 if isinstance(weight, Tensor) else weight.group_size,
        narrow,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        n_threads,
    )
    return y


def whole(weight: Tensor | QuantizedWeight) -> Tensor:
    return weight.double() if isinstance(weight, Tensor) else dequantize(weight, torch.float64)


def largest_error(
    y: Tensor, x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None
) -> float:
    """In units of what float32 sums and, for bfloat16, a rounding at the end may do."""
    added = torch.zeros(1, dtype=torch.float64) if bias is None else bias.double()
    exact = x.double() @ whole(weight).T + added
    sizes = x.double().abs() @ whole(weight).abs().T + added.abs()  # what cancels counts too
    allowed = 5e-7 * sizes + (2**-8 * exact.abs() if x.dtype == torch.bfloat16 else 0)
    return ((y.double() - exact).abs() / allowed.clamp(min=1e-30)).max().item() if len(x) else 0.0


@pytest.mark.parametrize("kind", WEIGHTS)
@settings(deadline=None, max_examples=60)
@given(
    t=st.integers(0, 64),
    o=st.integers(1, 150),
    i=st.one_of(st.integers(1, 300), st.sampled_from((31, 32, 33, 127, 128, 129, 1152))),
    narrow=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_matches_float64(kind: str, t: int, o: int, i: int, narrow: bool, biased: bool, seed: int):
    dtype = torch.bfloat16 if narrow else torch.float32
    weight, x = WEIGHTS[kind](normal(o, i, seed=seed)), normal(t, i, seed=seed + 1).to(dtype)
    bias = normal(o, seed=seed + 2) if biased else None
    y = product(x, weight, bias)
    assert largest_error(y, x, weight, bias) < 1


def largest_of_neighbours(x: Tensor, bits: int) -> Tensor:
    """For every number of x the largest magnitude among those that share its power of two."""
    column = torch.arange(x.shape[1])
    if bits == 8:
        lane = column // 64 * 16 + column % 32 // 2
    else:
        lane = column // 32 * 4 + column % 16 // 4
    index = lane.expand(x.shape)
    largest = torch.zeros(len(x), int(lane.max()) + 1).double()
    return largest.scatter_reduce(1, index, x.double().abs(), "amax").gather(1, index)


@pytest.mark.parametrize("kind", [kind for kind in WEIGHTS if "int" in kind])
@settings(deadline=None, max_examples=50)
@given(
    t=st.integers(1, 9),
    o=st.integers(1, 20),
    i=st.one_of(st.integers(1, 300), st.sampled_from((31, 32, 33, 63, 64, 65, 127, 128, 129))),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    spread=st.integers(0, 30),
    seed=st.integers(0, 2**16),
)
def test_narrow_products_keep_16_bits_of_each_few_neighbours(
    kind: str, t: int, o: int, i: int, dtype: torch.dtype, spread: int, seed: int
):
    """Magnitudes from 2^-spread to 2^spread, and one number far larger than all."""
    weight = WEIGHTS[kind](normal(o, i, seed=seed))
    g = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(t, i, generator=g) * 2.0 ** (spread * (2 * torch.rand(t, i, generator=g) - 1))
    x[0, seed % i] = 2.0 ** (spread + 12)
    x = x.to(dtype)
    exact, sizes = x.double() @ whole(weight).T, x.double().abs() @ whole(weight).abs().T
    allowed = largest_of_neighbours(x, weight.bits) @ whole(weight).abs().T * 2**-15 + 5e-7 * sizes
    if dtype == torch.bfloat16:
        allowed += 2**-8 * exact.abs()
    error = (product(x, weight, narrow=True).double() - exact).abs()
    assert (error <= allowed).all()


@pytest.mark.parametrize("kind", [kind for kind in WEIGHTS if "int" in kind])
def test_narrow_products_lose_nothing_of_like_bfloat16_numbers(kind: str):
    """Those of 2^-7 or more of the largest: none is smaller here than one hundredth."""
    weight = WEIGHTS[kind](normal(20, 300))
    x = normal(3, 300, seed=1).bfloat16().float()
    x = torch.where(x.abs() < 0.04, 0, x).clamp(-4, 4)
    assert largest_error(product(x, weight, narrow=True), x, weight) < 1


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e-30, 1e30, 3e34])
@pytest.mark.parametrize("kind", [kind for kind in WEIGHTS if "int" in kind])
def test_numbers_at_the_ends_of_the_range(kind: str, size: float):
    weight = WEIGHTS[kind](normal(5, 70) / 70)
    x = size * normal(2, 70, seed=1).clamp(-1, 1)
    for narrow in (False, True):
        y = product(x, weight, narrow=narrow)
        error = (y.double() - x.double() @ whole(weight).T).abs().max().item()
        assert error <= (2e-5 * size if narrow else 1e-6 * size) + 1e-33


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("shape", [(1, 1152), (64, 33), (389, 1152), (1000, 100)], ids=str)
def test_the_same_bits_on_any_number_of_threads_and_in_any_company(
    shape: tuple[int, int], kind: str, narrow: bool
):
    weight, x = WEIGHTS[kind](normal(*shape)), normal(23, shape[1], seed=1)
    y = product(x, weight, narrow=narrow)
    for n_threads in (2, 3):
        assert torch.equal(product(x, weight, n_threads=n_threads, narrow=narrow), y)
    for t in (1, 2, 3, 4, 5, 8, 11, 16):
        assert torch.equal(product(x[:t], weight, n_threads=2, narrow=narrow), y[:t])
    rows = slice(3, shape[0], 1)
    if shape[0] > 3:
        assert torch.equal(product(x, weight[rows], narrow=narrow), y[:, rows])


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_in_their_row(bad: float, kind: str, narrow: bool):
    for i in (33, 128, 300):
        weight, x = WEIGHTS[kind](normal(20, i)), normal(9, i, seed=1)
        x[3, i - 1] = bad
        y = product(x, weight, narrow=narrow)
        assert y.isfinite().all(1).tolist() == [row != 3 for row in range(9)]
        if math.isnan(bad):
            assert y[3].isnan().all()


def test_strided_rows_and_what_lies_behind_the_end():
    """Nothing but the matrix, its scales and the vectors is read into a result."""
    w = normal(7, 45)
    for kind in ("int8 32", "int4 32"):
        weight = WEIGHTS[kind](w)
        spread = torch.full((5, 3, 45), math.nan)
        spread[:, 1] = normal(5, 45, seed=2)
        x = spread[:, 1]
        exact = x.double() @ whole(weight).T
        assert relative_error(product(x, weight), exact) < 3e-6
        y = quantized_linear(x.t().contiguous().t(), weight, backend="native")
        assert relative_error(y, exact) < 3e-6


@pytest.mark.parametrize("bits", [8, 4])
def test_many_vectors_go_another_way_to_the_same_result(bits: int):
    weight = quantize_weight(normal(50, 200), bits, 32)
    for t in (FEW, FEW + 1, 100):
        x = normal(2, t, 200)[1]
        y = quantized_linear(x, weight, backend="native")
        assert relative_error(y, x.double() @ whole(weight).T) < 1e-5


def test_registered_as_torch_wants_it():
    for bits in (8, 4):
        weight = quantize_weight(normal(5, 40), bits, 32)
        for bias in (None, normal(5)):
            arguments = (normal(3, 2, 40), weight.data, weight.scales, 32, bias)
            torch.library.opcheck(_few_vectors, arguments)


def test_compiles_to_one_graph():
    weight = quantize_weight(normal(5, 40), 4, 32)

    def run(x: Tensor) -> Tensor:
        return quantized_linear(x * 2, weight, backend="native").relu()

    x = normal(3, 40)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), run(x))


def every_kind() -> None:
    """Products with each kind; by lesser instruction sets, too: see `test_native_sets`."""
    for kind, make in WEIGHTS.items():
        for i in (1, 16, 31, 45, 128, 300):
            weight, x = make(normal(70, i)), normal(7, i, seed=1)
            y = product(x, weight, n_threads=2)
            assert largest_error(y, x, weight) < 1, (kind, i)
            assert torch.equal(product(x[:1], weight), y[:1]), (kind, i)
            rounded = relative_error(product(x, weight, narrow=True), y.double())
            assert rounded < 1e-4, (kind, i)
