"""The selective scan: every implementation against float64, backward and forward."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_within_budget, largest_difference, relative_error
from torch import Tensor

from blackmamba.errors import BackendError, InputError
from blackmamba.ops import selective_scan, selective_state_update
from blackmamba.ops.backend import available_backends
from blackmamba.ops.selective_scan import torch_chunked

GOLDEN = Path(__file__).parent.parent / "fixtures" / "released-dev" / "selective_scan.npz"
BACKENDS = available_backends("selective_scan")
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
WIDEST = dict.fromkeys(BACKENDS, torch.float64) | {"native": torch.float32}
in_float64 = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "native"])


def make(b: int, l: int, d: int, n: int, dtype: torch.dtype = torch.float64, seed: int = 0):
    """All inputs of the scan by name, as a trained layer would have them."""
    g = torch.Generator().manual_seed(seed)

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
    return {k: v.to(wide if k in kept else dtype) for k, v in inputs.items()}


def documents(b: int, l: int, seed: int = 0) -> Tensor:
    """Rows of a few documents, none of which begins at the same token in all rows."""
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(b, l, generator=g) < 0.15).cumsum(1)


def run(inputs: dict[str, Tensor], backend: str, **options: Any):
    return selective_scan(**inputs, dt_softplus=True, backend=backend, **options)  # pyright: ignore


def with_gradients(inputs: dict[str, Tensor], backend: str, **options: Any) -> dict[str, Tensor]:
    """Outputs and every gradient of a fixed random weighting of both outputs."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    y, state = run(leaves, backend, **options)
    g = torch.Generator().manual_seed(7)
    wy = torch.randn(y.shape, generator=g, dtype=torch.float64)
    ws = torch.randn(state.shape, generator=g, dtype=torch.float64)
    ((y * wy.to(y.dtype)).sum() + (state * ws.to(state.dtype)).sum()).backward()
    grads = {f"grad_{k}": v.grad for k, v in leaves.items() if v.grad is not None}
    return {"y": y.detach(), "state": state.detach()} | grads


SHAPES = [(1, 1, 1, 1), (2, 2, 3, 4), (1, 3, 8, 16), (2, 63, 5, 3), (1, 64, 7, 16), (3, 65, 4, 2)]


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1000, 3, 2), (2, 150, 600, 16)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_near_float64(backend: str, shape: tuple[int, int, int, int]):
    if backend == "reference" and shape[1] * shape[2] > 10_000:
        pytest.skip("the reference needs no large shape")
    exact = with_gradients(make(*shape), "reference")
    actual = with_gradients(make(*shape, dtype=torch.float32), backend)
    assert actual.keys() == exact.keys()
    for name in exact:
        bound = 1e-5 if name in ("y", "state") else 3e-5  # sums over up to 1,000 tokens
        assert relative_error(actual[name], exact[name]) < bound, name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_chunked_equals_the_reference(shape: tuple[int, int, int, int]):
    exact, actual = (with_gradients(make(*shape), b) for b in ("reference", "torch"))
    for name in exact:
        assert relative_error(actual[name], exact[name]) < 1e-12, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_as_near_as_plain_pytorch(backend: str):
    narrow = make(2, 65, 5, 4, dtype=torch.bfloat16)
    exact = with_gradients({k: v.double() for k, v in narrow.items()}, "reference")
    eager = with_gradients(narrow, "reference")
    actual = with_gradients(narrow, backend)
    for name in exact:
        assert actual[name].dtype == eager[name].dtype
        assert_within_budget(name, actual[name], eager[name], exact[name])


@in_float64
@pytest.mark.parametrize("blocks", ["one chunk a block", "chunks side by side", "ragged"])
def test_gradcheck(backend: str, blocks: str, monkeypatch: pytest.MonkeyPatch):
    if blocks == "one chunk a block":
        monkeypatch.setattr(torch_chunked, "_LEAST_STEP_NUMBERS", 1)
        monkeypatch.setattr(torch_chunked, "_MOST_STEP_NUMBERS", 1)
    elif blocks == "ragged":
        monkeypatch.setattr(torch_chunked, "_BLOCK_NUMBERS", 1)
    inputs = [v.requires_grad_() for v in make(2, 11, 2, 2).values()]
    for seq_idx in (None, documents(2, 11)):

        def scan(*args: Tensor, seq_idx: Tensor | None = seq_idx):
            return run(dict(zip(NAMES, args, strict=True)), backend, seq_idx=seq_idx)

        assert torch.autograd.gradcheck(scan, inputs)


@pytest.mark.parametrize("most_rows", [1, 2, 3])
@pytest.mark.parametrize("step_numbers", [1, 1 << 9, 1 << 15])
@pytest.mark.parametrize("block_numbers", [1, 1 << 10, 1 << 20])
@pytest.mark.parametrize("l", [1, 7, 64, 129])
def test_any_cutting_gives_the_same(
    l: int, block_numbers: int, step_numbers: int, most_rows: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch_chunked, "_LEAST_STEP_NUMBERS", step_numbers)
    monkeypatch.setattr(torch_chunked, "_BLOCK_NUMBERS", block_numbers)
    monkeypatch.setattr(torch_chunked, "_MOST_STEP_NUMBERS", most_rows * 3 * 4)
    for seq_idx in (None, documents(3, l)):
        exact, actual = (
            with_gradients(make(3, l, 3, 4), b, seq_idx=seq_idx) for b in ("reference", "torch")
        )
        for name in exact:
            assert relative_error(actual[name], exact[name]) < 1e-12, name


def test_plan_covers_every_token_once():
    for b, l, d, n in [
        (1, 1, 1, 1),
        (1, 1000, 8, 16),
        (8, 257, 512, 16),
        (64, 33, 2048, 16),
        (0, 9, 4, 4),
    ]:
        groups, blocks = torch_chunked._plan(b, l, d, n)
        assert [t for block in blocks for t in range(l)[block.times]] == list(range(l))
        assert [row for group in groups for row in range(b)[group]] == list(range(b))


@pytest.mark.parametrize("shape", [(8, 256, 512), (1, 2048, 512), (64, 512, 512), (8, 2048, 2304)])
def test_what_is_kept_for_the_backward_pass_is_no_larger_than_x(shape: tuple[int, int, int]):
    b, l, d = shape
    _, blocks = torch_chunked._plan(b, l, d, 16)
    assert len(blocks) * b * d * 16 <= b * l * d


@pytest.mark.parametrize("shape", [(2, 9, 3, 4), (2, 9, 3, 1), (1, 0, 3, 1), (0, 5, 3, 4)], ids=str)
@pytest.mark.parametrize("left_out", [(), ("D", "z", "dt_bias")], ids=str)
def test_registered_as_torch_wants_it(shape: tuple[int, int, int, int], left_out: tuple[str, ...]):
    """Schema, no aliases, autograd, fake tensors, and the same under AOT dispatch."""
    inputs = make(*shape, dtype=torch.float32)
    args = [None if name in left_out else inputs[name].requires_grad_() for name in NAMES]
    same = None if left_out else documents(*shape[:2]) == 0
    torch.library.opcheck(torch.ops.blackmamba.selective_scan.default, (*args, same, True))


def test_compiles_to_one_graph_with_the_same_bits():
    inputs = {k: v.requires_grad_() for k, v in make(2, 9, 3, 4, dtype=torch.float32).items()}

    def scan(inputs: dict[str, Tensor]) -> Tensor:
        y, state = run(inputs, "auto")
        return y.sum() + state.square().sum()

    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
    leaves = list(inputs.values())
    for actual, expected in zip(
        torch.autograd.grad(compiled(inputs), leaves),
        torch.autograd.grad(scan(inputs), leaves),
        strict=True,
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unwritten_memory_is_never_read(backend: str, nan_filled_memory: None):
    for name, value in with_gradients(
        make(3, 70, 5, 4, dtype=WIDEST[backend]), backend, seq_idx=documents(3, 70)
    ).items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("left_out", ["D", "z", "dt_bias", "initial_state"])
def test_optional_inputs(backend: str, left_out: str):
    neutral = {"D": 0.0, "dt_bias": 0.0, "initial_state": 0.0}
    inputs = make(2, 9, 3, 4, dtype=WIDEST[backend])
    without = {k: v for k, v in inputs.items() if k != left_out}
    y, state = run(without, backend)
    if left_out == "z":
        gated, expected_state = run(inputs, "reference")
        expected = gated / torch.nn.functional.silu(inputs["z"])
    else:
        full = inputs | {left_out: torch.full_like(inputs[left_out], neutral[left_out])}
        expected, expected_state = run(full, "reference")
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state, expected_state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_softplus_delta_is_taken_as_it_is(backend: str):
    inputs = make(2, 9, 3, 4, dtype=WIDEST[backend])
    expected, _ = run(inputs, "reference")
    inputs["dt"] = torch.nn.functional.softplus(inputs["dt"] + inputs.pop("dt_bias"))
    y, _ = selective_scan(**inputs, backend=backend)  # pyright: ignore
    torch.testing.assert_close(y, expected)
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    results = [selective_scan(**leaves, backend=b)[0] for b in (backend, "reference")]  # pyright: ignore
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), leaves["dt"])[0] for y in results))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_halves_equal_one_scan_and_steps_equal_both(backend: str):
    inputs = make(2, 21, 3, 4, dtype=WIDEST[backend])
    whole, last = run(inputs, backend)
    per_token = ("x", "dt", "B", "C", "z")
    first = inputs | {k: inputs[k][:, :8] for k in per_token}
    y1, state = run(first, backend)
    second = inputs | {k: inputs[k][:, 8:] for k in per_token} | {"initial_state": state}
    y2, state = run(second, backend)
    torch.testing.assert_close(torch.cat((y1, y2), 1), whole)
    torch.testing.assert_close(state, last)

    state = inputs["initial_state"]
    kept = state.clone()
    for t in range(21):
        args = (inputs[k][:, t] if k in per_token else inputs[k] for k in NAMES[:7])
        y, state = selective_state_update(state, *args, dt_bias=inputs["dt_bias"], dt_softplus=True)
        torch.testing.assert_close(y, whole[:, t])
    torch.testing.assert_close(state, last)
    assert torch.equal(inputs["initial_state"], kept)  # nothing written in place


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinite_dt_passes_the_state_through_bit_for_bit(backend: str):
    inputs = make(2, 70, 3, 4, dtype=torch.float32)
    inputs["dt"] = torch.full_like(inputs["dt"], -torch.inf)
    _, state = run(inputs, backend)
    assert torch.equal(state, inputs["initial_state"])
    results = with_gradients(inputs, backend)
    assert all(t.isfinite().all() for t in results.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_strided_and_repeated(backend: str):
    y, state = run(make(0, 5, 3, 4, dtype=WIDEST[backend]), backend)
    assert y.shape == (0, 5, 3)
    assert state.shape == (0, 3, 4)
    inputs = make(2, 0, 3, 4, dtype=WIDEST[backend])
    y, state = run(inputs, backend)
    assert y.shape == (2, 0, 3)
    torch.testing.assert_close(state, inputs["initial_state"])

    inputs = make(3, 20, 6, 4, dtype=torch.float32)
    strided = {k: v.repeat_interleave(2, dim=-1)[..., ::2] for k, v in inputs.items()}
    first, again = with_gradients(inputs, backend), with_gradients(strided, backend)
    for name in first:
        assert torch.equal(first[name], again[name]), name  # the same bits


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row_and_after_its_token(backend: str):
    inputs = make(2, 9, 3, 4, dtype=WIDEST[backend])
    inputs["x"][0, 4, 1] = torch.nan
    y, state = run(inputs, backend)
    assert y[0, 4:, 1].isnan().all()
    assert state[0, 1].isnan().all()
    assert y[1].isfinite().all()
    assert y[0, :4].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_of_a_row_are_scans_of_their_own(backend: str):
    inputs = make(1, 50, 3, 4, dtype=WIDEST[backend])
    ends = [7, 8, 30, 50]
    seq_idx = torch.zeros(1, 50, dtype=torch.int32)
    for number, end in enumerate(ends[:-1]):
        seq_idx[:, end:] = 5 - number  # any numbers that differ
    together = with_gradients(inputs, backend, seq_idx=seq_idx)

    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    outputs: list[Tensor] = []
    begin, first, state = 0, leaves["initial_state"], leaves["initial_state"]
    for end in ends:
        part = {
            k: v[:, begin:end] if k in ("x", "dt", "B", "C", "z") else v for k, v in leaves.items()
        }
        y, state = run(part | {"initial_state": first}, backend)
        outputs.append(y)
        begin, first = end, torch.zeros_like(first)
    y = torch.cat(outputs, 1)
    torch.testing.assert_close(together["y"], y)
    torch.testing.assert_close(together["state"], state)
    g = torch.Generator().manual_seed(7)
    wy = torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)
    ws = torch.randn(state.shape, generator=g, dtype=torch.float64).to(state.dtype)
    ((y * wy).sum() + (state * ws).sum()).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(together[f"grad_{name}"], leaf.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_document_is_no_document(backend: str):
    inputs = make(2, 40, 3, 4, dtype=WIDEST[backend])
    plain = with_gradients(inputs, backend)
    marked = with_gradients(inputs, backend, seq_idx=torch.full((2, 40), 3))
    for name in plain:
        assert torch.equal(plain[name], marked[name]), name


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    b=st.integers(0, 3),
    l=st.integers(0, 90),
    d=st.integers(1, 9),
    n=st.integers(1, 17),
    seed=st.integers(0, 99),
    shift=st.sampled_from([-14.0, 0.0, 20.0]),
)
def test_sweep(b: int, l: int, d: int, n: int, seed: int, shift: float):
    """Random shapes; delta from about 1e-6 (nothing decays) to about 20 (all decays at once)."""
    inputs = make(b, l, d, n, seed=seed)
    inputs["dt"] = inputs["dt"] + shift
    exact, actual = (with_gradients(inputs, name) for name in ("reference", "torch"))
    for name in exact:
        # torch takes softplus(v) = v above 20, with slope 1; ours is sigmoid(20) = 1 - 2e-9
        assert relative_error(actual[name], exact[name]) < 1e-8, name


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend: str, case: str):
    """Outputs and gradients of the authors' scan; their layout is (b, d, l)."""
    with np.load(GOLDEN) as file:
        golden = {
            k.split("/")[1]: torch.from_numpy(v) for k, v in file.items() if k.startswith(case)
        }
    swapped = {"u": "x", "delta": "dt", "B": "B", "C": "C", "z": "z"}
    inputs = {ours: golden[theirs].transpose(1, 2) for theirs, ours in swapped.items()}
    inputs |= {"A": golden["A"], "D": golden["D"], "dt_bias": golden["delta_bias"]}
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    y, state = run(leaves, backend)
    assert largest_difference(y.transpose(1, 2), golden["out"]) < 2e-5
    assert largest_difference(state, golden["last_state"]) < 2e-5
    (y * golden["grad_w"].transpose(1, 2)).sum().backward()
    for theirs, ours in (swapped | {"A": "A", "D": "D", "delta_bias": "dt_bias"}).items():
        grad = leaves[ours].grad
        assert grad is not None
        grad = grad.transpose(1, 2) if theirs in swapped else grad
        assert relative_error(grad, golden[f"grad_{theirs}"]) < 1e-5, ours
    del inputs["D"], inputs["z"]
    y, _ = run(inputs, backend)
    assert largest_difference(y.transpose(1, 2), golden["out_noD_noz"]) < 2e-5


def test_bad_input_is_named():
    good = make(2, 5, 3, 4)
    with pytest.raises(InputError, match=r"dt has shape \(2, 4, 3\), must be \(2, 5, 3\)"):
        run(good | {"dt": good["dt"][:, :4]}, "auto")
    with pytest.raises(InputError, match=r"x has shape \(5, 3\), must be \(b, l, d\)"):
        run(good | {"x": good["x"][0]}, "auto")
    for name in NAMES:
        with pytest.raises(InputError, match=rf"selective_scan: {name} is torch.int64"):
            run(good | {name: good[name].long()}, "auto")
    with pytest.raises(
        BackendError,
        match=r"backend='nothing': selective_scan has native, triton, torch, ref",
    ):
        run(good, "nothing")
    with pytest.raises(InputError, match=r"seq_idx has shape \(2, 4\), must be \(2, 5\)"):
        run(good, "auto", seq_idx=documents(2, 4))
    with pytest.raises(InputError, match=r"seq_idx is torch.float32, must be an integer dtype"):
        run(good, "auto", seq_idx=documents(2, 5).float())
    with pytest.raises(InputError, match=r"selective_state_update: x has shape"):
        selective_state_update(
            good["initial_state"], *([good["x"]] * 2), good["A"], good["B"], good["C"]
        )
