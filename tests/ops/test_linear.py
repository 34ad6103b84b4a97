"""Products: against float64, in the layouts and shapes at which the library changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import relative_error
from torch import Tensor

from blackmamba.errors import InputError
from blackmamba.ops import linear
from blackmamba.ops.backend import available_backends
from blackmamba.ops.linear import native, product, products

BACKENDS = available_backends("linear")


@pytest.fixture(autouse=True)
def _small_products_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "_LEAST_PRODUCTS", 1)
    monkeypatch.setattr(products, "_LEAST_PRODUCTS", 1)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (0, 3, 5), (7, 33, 65), (300, 130, 12)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_float64(
    backend: str, shape: tuple[int, int, int], biased: bool, dtype: torch.dtype
):
    if backend == "native" and dtype == torch.float64:
        pytest.skip("it takes float32 and bfloat16")
    t, k, n = shape
    inputs = [normal(2, t, k, dtype=dtype), normal(n, k, seed=1, dtype=dtype)]
    if biased:
        inputs.append(normal(n, seed=2, dtype=dtype))
    results = []
    for cast, name in ((dtype, backend), (torch.float64, "reference")):
        leaves = [p.to(cast).requires_grad_() for p in inputs]
        y = linear(*leaves, backend=name)  # pyright: ignore
        results.append([y.detach(), *torch.autograd.grad(y, leaves, normal(*y.shape).to(cast))])
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 0.02, torch.float64: 1e-13}[dtype]
    for actual, exact in zip(*results, strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, exact) < tolerance


@settings(max_examples=60, deadline=None)
@given(
    use_native=st.booleans(),
    t=st.integers(0, 150),
    k=st.integers(1, 500),
    n=st.integers(1, 150),
    layouts=st.tuples(*[st.sampled_from(["rows", "columns", "part", "every other"])] * 2),
)
def test_product_in_any_layout(use_native: bool, t: int, k: int, n: int, layouts: tuple[str, str]):
    def laid_out(x: Tensor, layout: str) -> Tensor:
        if layout == "columns":
            return x.t().contiguous().t()
        if layout == "part":
            return torch.cat((x, x), 1)[:, x.shape[1] :]
        return x.repeat_interleave(2, 0)[::2] if layout == "every other" else x

    a, b = normal(t, k), normal(n, k, seed=1)
    args = laid_out(a.float(), layouts[0]), laid_out(b.float(), layouts[1])
    actual = product(*args, use_native=use_native)
    assert actual.is_contiguous()
    assert actual.shape == (t, n)
    scale = max(1.0, (a @ b.t()).abs().max().item() if t else 1.0)
    assert t == 0 or (actual - a @ b.t()).abs().max() < 5e-6 * scale


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_gradients_beside_a_frozen_input(frozen: int):
    leaves = [normal(*s).float() for s in ((9, 5), (4, 5), (4,))]
    kept = [p.requires_grad_() for i, p in enumerate(leaves) if i != frozen]
    results = [
        torch.autograd.grad(linear(*leaves, backend=b).square().sum(), kept)  # pyright: ignore
        for b in BACKENDS
    ]
    for actual in results[:-1]:
        torch.testing.assert_close(actual, results[-1])


NATIVE = pytest.mark.skipif("native" not in BACKENDS, reason="the extension was not built")


@NATIVE
@settings(max_examples=60, deadline=None)
@given(
    t=st.integers(0, 70),
    k=st.integers(0, 1000),
    n=st.integers(1, 260),
    transposed=st.booleans(),
    choice=st.sampled_from(["plain", "accumulate", "rows", "outer"]),
)
def test_multiply_with_all_it_can(t: int, k: int, n: int, transposed: bool, choice: str):
    a, b, bias = normal(t, k), normal(n, k, seed=1), normal(n, seed=2)
    out, scale = normal(t, n, seed=3), normal(max(t, k), seed=4)
    g = torch.Generator().manual_seed(5)
    rows, order = torch.randint(0, max(1, t), (t,), generator=g), torch.randperm(t, generator=g)
    columns = torch.randint(0, max(1, k), (k,), generator=g)
    options: dict[str, Tensor | bool]
    if choice == "plain":
        expected, options = a @ b.t() + bias, {"bias": bias}
    elif choice == "accumulate":
        expected, options = out + a @ b.t(), {"accumulate": True}
    elif choice == "rows":
        expected = torch.empty_like(out)
        expected[order] = a[rows] @ b.t() * scale[order][:, None]
        options = {"a_rows": rows, "out_rows": order, "out_scale": scale}
    else:
        expected = (a * scale[:k])[:, columns] @ b[:, columns].t()
        options = {"left_tokens": columns, "left_scale": scale, "tokens": columns}
    narrow = {
        o: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v
        for o, v in options.items()
    }
    actual, left, right = out.float(), a.float(), b.float()
    if transposed:
        left, right = left.t().contiguous().t(), right.t().contiguous().t()
    native.multiply(left, right, actual, **narrow)  # pyright: ignore
    if t:
        assert (actual - expected).abs().max() < 3e-6 * max(1.0, expected.abs().max().item())


@NATIVE
@pytest.mark.parametrize("options", ["bias", "accumulate", "rows"])
def test_few_rows_of_many_columns(options: str):
    """Tasks pack b themselves; 301 and 61 are no whole number of blocks."""
    t, k, n = 61, 900, 301
    a, b, bias, out = normal(t, k), normal(n, k, seed=1), normal(n, seed=2), normal(t, n, seed=3)
    rows, order, scale = torch.arange(t).flip(0), torch.randperm(t), normal(t, seed=4)
    found = out.float()
    if options == "bias":
        expected = a @ b.t() + bias
        native.multiply(a.float(), b.float(), found, bias=bias.float())
    elif options == "accumulate":
        expected = out + a @ b.t()
        native.multiply(a.float(), b.float(), found, accumulate=True)
    else:
        expected = torch.empty_like(out)
        expected[order] = a[rows] @ b.t() * scale[order][:, None]
        native.multiply(
            a.float(), b.float(), found, a_rows=rows, out_rows=order, out_scale=scale.float()
        )
    assert relative_error(found, expected) < 2e-6


@NATIVE
@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    k=st.integers(1, 450),
    n=st.integers(1, 120),
    by_columns=st.booleans(),
    with_all=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_products_of_groups(
    counts: list[int], k: int, n: int, by_columns: bool, with_all: bool, dtype: torch.dtype
):
    """Rows of a group times its matrix, and groups' rows times each other."""
    t, e, g = sum(counts), len(counts), torch.Generator().manual_seed(6)
    ends, x = torch.tensor(counts).cumsum(0), normal(t + 3, k, dtype=dtype)
    w, y = normal(e, n, k, seed=1, dtype=dtype), normal(t + 2, n, seed=2, dtype=dtype)
    rows, order = torch.randint(0, t + 3, (t,), generator=g), torch.randperm(t, generator=g)
    scale, bias = normal(t + 2, seed=3), normal(e, n, seed=4)
    if by_columns:
        w = w.transpose(1, 2).contiguous().transpose(1, 2)
    if not with_all:
        rows, order, x, y = torch.arange(t), torch.arange(t), x[:t], y[:t]
    expected = torch.full((t, n), torch.nan, dtype=torch.float64)
    outer = torch.zeros(e, n, k, dtype=torch.float64)
    start = 0
    for j, count in enumerate(counts):
        mine = slice(start, start + count)
        start += count
        found = x[rows[mine]].double() @ w[j].double().t()
        left = y[order[mine]].double()
        if with_all:
            found = (found + bias[j]) * scale[order[mine]][:, None]
            left = left * scale[order[mine]][:, None]
        expected[order[mine]] = found
        outer[j] = left.t() @ x[rows[mine]].double()
    options = (
        {"bias": bias.float(), "a_rows": rows, "out_rows": order, "out_scale": scale.float()}
        if with_all
        else {}
    )
    tolerance = 3e-6 if dtype == torch.float32 else 0.01
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = torch.full((t, n), torch.nan, dtype=dtype)
        native.multiply_groups(x, w, out, ends, **options)
        found = torch.full((e, n, k), torch.nan, dtype=dtype)
        picked = {"a_rows": order, "b_rows": rows, "a_scale": scale.float()} if with_all else {}
        native.multiply_outer_groups(y, x, found, ends, **picked)
        torch.set_num_threads(1)
        if t:
            assert (out - expected).abs().max() <= tolerance * max(1, expected.abs().max().item())
        assert (found - outer).abs().max() <= tolerance * max(1, outer.abs().max().item())


@NATIVE
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 3000, 49),
        (700, 9000, 130),
        (40, 20, 700),
        (61, 900, 301),
        (1088, 17, 1024),
        (530, 400, 66),
    ],
    ids=str,
)
def test_multiply_in_parts_and_on_threads(shape: tuple[int, int, int], transposed: bool):
    t, k, n = shape
    a, b, results = normal(t, k).float(), normal(n, k, seed=1).float(), []
    if transposed:
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = torch.full((t, n), torch.nan)
        native.multiply(a, b, out)
        results.append(out)
    torch.set_num_threads(1)
    assert relative_error(results[0], a.double() @ b.double().t()) < 2e-6
    assert all(torch.equal(results[0], out) for out in results[1:])


def test_nan_stays_in_its_row_and_precision_is_full():
    x, weight = normal(40, 64).float(), normal(48, 64, seed=1).float()
    x[3, 5] = torch.nan
    y = linear(x, weight)
    assert y.isnan().any(1).nonzero().flatten().tolist() == [3]
    big = normal(64, 512), normal(96, 512, seed=1)
    assert relative_error(product(*(p.float() for p in big)), big[0] @ big[1].t()) < 1e-6


@pytest.mark.parametrize("biased", [True, False])
def test_registered_and_compiles(biased: bool):
    x, weight = normal(2, 3, 5).float().requires_grad_(), normal(4, 5).float().requires_grad_()
    bias = normal(4).float().requires_grad_() if biased else None
    torch.library.opcheck(torch.ops.blackmamba.linear.default, (x, weight, bias, True))
    compiled = torch.compile(
        lambda x, w: linear(x, w, bias).square().sum(), backend="aot_eager", fullgraph=True
    )
    expected = torch.autograd.grad(linear(x, weight, bias).square().sum(), (x, weight))
    for a, b in zip(torch.autograd.grad(compiled(x, weight), (x, weight)), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"x has shape \(2, 3\), must be \(..., 4\)"):
        linear(normal(2, 3), normal(5, 4))
    with pytest.raises(InputError, match=r"bias has shape \(4,\), must be \(5,\)"):
        linear(normal(2, 4), normal(5, 4), normal(4))
    with pytest.raises(InputError, match=r"weight is torch.float32, must be torch.float64"):
        linear(normal(2, 4), normal(5, 4).float())
