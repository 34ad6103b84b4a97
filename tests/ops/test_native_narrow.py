"""Products of bfloat16 by float32's arithmetic, and by matrix units (AMX), number by number; and
where they are what runs."""

import math
import os
import platform
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blackmamba.ops import expert_mlp, linear, native
from blackmamba.ops.linear import native as linear_native
from blackmamba.ops.linear import product, products
from blackmamba.ops.native import bfloat16

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

FLOAT32, BFLOAT16 = 2**-24, 2**-8  # a rounding is off by at most so much of the number
CHOICES = ("plain", "accumulate", "rows", "outer")
LAYOUTS = ("rows", "columns", "part", "every other")


TILES = pytest.param(
    "tiles",
    marks=pytest.mark.skipif(
        not bfloat16._own_tiles,
        reason="this machine has no AMX, hides it, or the extension's compiler did not know it",
    ),
)


@pytest.fixture(autouse=True)
def _by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The kernel that a test names, or the one that widens."""
    named = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    monkeypatch.setattr(bfloat16, "_by", named.get("by", "floats"))


def normal(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).bfloat16()


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in the midst of NaN."""
    rows, columns = x.shape
    if layout == "columns":
        return laid_out(x.t(), "part").t()
    if layout == "every other":
        whole = x.new_full((rows, 2 * columns), torch.nan)
        whole[:, ::2] = x
        return whole[:, ::2]
    whole = x.new_full((rows + 2, columns + (3 if layout == "part" else 0)), torch.nan)
    whole[1:-1, :columns] = x
    return whole[1:-1, :columns]


def check(shape: tuple[int, int, int], choice: str, layouts: tuple[str, str], wide: bool) -> None:
    """One product by 1 and by 2 threads, each number within the bound of its roundings."""
    t, k, n = shape
    a, b, old = normal(t, k), normal(n, k, seed=1), normal(t, n, seed=3)
    bias, scale = normal(n, seed=2).float(), normal(max(t, k), seed=4).float()
    g = torch.Generator().manual_seed(5)
    rows, order = torch.randint(0, max(1, t), (t,), generator=g), torch.randperm(t, generator=g)
    columns = torch.randint(0, max(1, k), (k,), generator=g)
    options: dict[str, Any]
    left, right, add = a.double(), b.double(), torch.zeros(t, n).double()
    if choice == "plain":
        add, options = add + bias, {"bias": bias}
    elif choice == "accumulate":
        add, options = add + old, {"accumulate": True}
    elif choice == "rows":
        left = a.double()[rows] * scale[order][:, None]
        options = {"a_rows": rows, "out_rows": order, "out_scale": scale}
    else:
        left, right = (a * scale[:k].double())[:, columns], b.double()[:, columns]
        options = {"left_tokens": columns, "left_scale": scale, "tokens": columns}
    exact, size = left @ right.t() + add, left.abs() @ right.abs().t() + add.abs()
    if choice == "rows":
        exact, size = (torch.empty_like(t).index_copy_(0, order, t) for t in (exact, size))
    found = []
    threads = torch.get_num_threads()
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            guarded = old.float() if wide else old.clone()
            out = torch.full((t + 2, n), torch.nan, dtype=guarded.dtype)
            out[1:-1] = guarded
            linear_native.multiply(
                laid_out(a, layouts[0]), laid_out(b, layouts[1]), out[1:-1], **options
            )
            assert out[0].isnan().all()
            assert out[-1].isnan().all()
            found.append(out[1:-1].clone())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    allowed = (k + 4) * FLOAT32 * size + (0 if wide else BFLOAT16) * exact.abs()
    if choice == "outer" and bfloat16.has_own_tiles():
        allowed += BFLOAT16 * size  # a scaled number is rounded, as matrix units take no other
    assert ((found[0].double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("by", ["floats", TILES])
@settings(max_examples=80, deadline=None)
@given(
    t=st.integers(0, 150),
    k=st.integers(0, 1100),
    n=st.integers(1, 260),
    choice=st.sampled_from(CHOICES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    wide=st.booleans(),
)
def test_multiply(
    by: str, t: int, k: int, n: int, choice: str, layouts: tuple[str, str], wide: bool
):
    check((t, k, n), choice, layouts, wide)


@pytest.mark.parametrize("by", ["floats", TILES])
@pytest.mark.parametrize("layouts", [("rows", "rows"), ("columns", "columns")], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(4700, 900, 5), (530, 385, 49), (1, 3000, 700), (600, 17, 1024), (70, 33, 61), (128, 96, 64)],
    ids=str,
)
def test_multiply_in_parts(by: str, shape: tuple[int, int, int], layouts: tuple[str, str]):
    check(shape, "plain", layouts, wide=False)


def every_kind() -> None:
    """For a process of another instruction set."""
    for choice in CHOICES:
        for layout in LAYOUTS:
            check((75, 401, 53), choice, (layout, layout), wide=layout == "part")


@pytest.mark.parametrize("by", ["floats", TILES])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("t", [33, 300])
def test_nan_and_infinity_stay_in_their_row_and_column(by: str, bad: float, t: int):
    a, b = normal(t, 70), normal(40, 70, seed=1)
    a[5, 69], b[37, 0] = bad, bad
    out = torch.empty(t, 40, dtype=torch.bfloat16)
    linear_native.multiply(a, b, out)
    hit = torch.zeros(t, 40, dtype=torch.bool)
    hit[5], hit[:, 37] = True, True
    assert torch.equal(~out.isfinite(), hit)
    assert torch.equal(out[hit].isnan(), (a.float() @ b.float().t())[hit].isnan())


@pytest.mark.parametrize("by", [TILES])
def test_beside_the_library_on_the_same_threads(by: str):
    """oneDNN's tiles have shapes of their own; neither finds the other's."""
    a, b = normal(300, 200), normal(100, 200, seed=1)
    expected, out = a @ b.t(), torch.empty(300, 100, dtype=torch.bfloat16)
    linear_native.multiply(a, b, out)
    first = out.clone()
    for _ in range(3):
        assert torch.equal(a @ b.t(), expected)
        linear_native.multiply(a, b, out)
        assert torch.equal(out, first)


@pytest.mark.parametrize("by", [TILES])
def test_experts_against_the_library(by: str, monkeypatch: pytest.MonkeyPatch):
    """Forward and all gradients, an idle expert among them, off by roundings of bfloat16."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 3, (130,), generator=g)
    leaves = [normal(130, 48), normal(4, 66, 48, seed=1), normal(4, 48, 33, seed=2)]
    gate = torch.rand(130, generator=g)
    found = []
    for own in (True, False):
        monkeypatch.setattr(bfloat16, "_own_tiles", own)
        x, fc1, fc2 = (t.clone().requires_grad_() for t in leaves)
        y = expert_mlp(x, ids, fc1, fc2, gate=gate)
        found.append((y, *torch.autograd.grad(y, (x, fc1, fc2), normal(*y.shape, seed=3))))
    for ours, theirs in zip(*found, strict=True):
        error = (ours.float() - theirs.float()).abs().max()
        assert error < 0.02 * theirs.float().abs().max()  # measured: up to 0.0043


def test_a_term_that_is_left_out_is_out_of_bounds(monkeypatch: pytest.MonkeyPatch):
    multiply = linear_native.multiply

    def broken(a: Tensor, b: Tensor, out: Tensor, **options: Any) -> None:
        multiply(a[:, :-1], b[:, :-1], out, **options)

    monkeypatch.setattr(linear_native, "multiply", broken)
    with pytest.raises(AssertionError):
        check((40, 300, 50), "plain", ("rows", "rows"), wide=False)


@pytest.mark.parametrize("by", ["tiles", "pairs", "floats", "library"])
def test_what_multiplies(by: str, monkeypatch: pytest.MonkeyPatch):
    """Many rows, forward and both gradients; few rows and few columns stay with the library."""
    monkeypatch.setattr(bfloat16, "_by", by)
    monkeypatch.setattr(linear_native, "_LEAST_PRODUCTS", 1)
    shapes: list[tuple[int, ...]] = []
    multiply = linear_native.multiply

    def counted(a: Tensor, b: Tensor, out: Tensor, **options: Any) -> None:
        shapes.append((*a.shape, len(b)))
        multiply(a, b, out, **options)

    monkeypatch.setattr(linear_native, "multiply", counted)
    x, weight = normal(30, 40).requires_grad_(), normal(50, 40, seed=1).requires_grad_()
    linear(x, weight).float().sum().backward()
    ours = [(30, 40, 50), (30, 50, 40), (50, 30, 40)]
    assert shapes == (ours if by == "floats" else [])
    shapes.clear()
    product(normal(products._FEW_OF_BFLOAT16 - 1, 40), normal(50, 40))
    product(normal(30, 40), normal(products._FEW_COLUMNS - 1, 40))
    assert not shapes
    product(normal(30, 40).float(), normal(50, 40).float().t().contiguous().t())
    assert shapes == [(30, 40, 50)]


def test_bfloat16_compiles_as_it_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bfloat16, "_by", "floats")
    monkeypatch.setattr(linear_native, "_LEAST_PRODUCTS", 1)
    x, weight = normal(30, 40).requires_grad_(), normal(50, 40, seed=1).requires_grad_()
    bias = normal(50, seed=2)

    def total(x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight, bias).float().square().sum()

    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(total(x, weight), (x, weight))
    for a, b in zip(torch.autograd.grad(compiled(x, weight), (x, weight)), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("tiles", "ratio", "machine", "by"),
    [
        (True, 2.0, "x86_64", "tiles"),
        (True, 0.5, "x86_64", "tiles"),
        (False, 2.0, "x86_64", "pairs"),
        (False, 1.0, "x86_64", "floats"),
        (False, 0.0, "x86_64", "floats"),
        (False, 0.0, "aarch64", "library"),
    ],
)
def test_the_choice_follows_the_machine(
    tiles: bool, ratio: float, machine: str, by: str, monkeypatch: pytest.MonkeyPatch
):
    class Extension:
        @staticmethod
        def pairs_against_floats() -> float:
            return ratio

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": tiles}, raising=False)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(native, "extension", Extension)
    found = bfloat16._found()
    assert found == (by, ratio)
    monkeypatch.setattr(bfloat16, "_library_is_faster", lambda: False)
    monkeypatch.setattr(bfloat16, "_by", found[0])
    monkeypatch.setattr(bfloat16, "_ratio", found[1])
    assert bfloat16.is_faster_than_float32() == (by in ("tiles", "pairs"))
    words = {"tiles": "AMX", "pairs": "in pairs: ", "floats": "widened", "library": "torch"}
    assert words[by] in bfloat16.describe()


@pytest.mark.parametrize("has_instruction", [False, True])
def test_without_the_extension_a_product_is_timed(
    has_instruction: bool, monkeypatch: pytest.MonkeyPatch
):
    slow = torch.mm

    def mm(a: Tensor, b: Tensor) -> Tensor:
        for _ in range(20 if a.dtype == torch.float32 else 1):
            found = slow(a.float(), b.float())
        return found

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_instruction)
    monkeypatch.setattr(bfloat16, "_by", "library")
    bfloat16._library_is_faster.cache_clear()
    assert bfloat16.is_faster_than_float32() == has_instruction
    bfloat16._library_is_faster.cache_clear()


@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="sanitized code has other speeds"
)
def test_what_was_measured_is_measured_again():
    """The ratio is far from where the choice changes, as the choice must not differ by chance."""
    ratios = [native.extension().pairs_against_floats() for _ in range(3)]
    assert len({ratio > bfloat16._FASTER for ratio in ratios}) == 1
