"""The causal convolution: against torch's own in float64, and its memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_within_budget, largest_difference, relative_error
from torch import Tensor
from torch.nn import functional as F

from blackmamba.errors import InputError
from blackmamba.ops import causal_conv1d
from blackmamba.ops.backend import available_backends

BACKENDS = available_backends("causal_conv1d")
WIDE = [name for name in BACKENDS if name != "native"]  # those that take float64
NATIVE = pytest.mark.skipif("native" not in BACKENDS, reason="the extension was not built")


def make(b: int, l: int, d: int, k: int, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (b, l, d), "weight": (d, k), "bias": (d,), "initial_state": (b, d, k - 1)}
    return {
        name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def exact(x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor) -> Tensor:
    """torch's convolution with the memory in front."""
    seen = torch.cat((initial_state, x.transpose(1, 2)), 2)
    return F.silu(F.conv1d(seen, weight[:, None], bias, groups=len(weight))).transpose(1, 2)


@pytest.mark.parametrize("k", [1, 2, 4, 5])
@pytest.mark.parametrize("l", [1, 2, 3, 4, 63, 64, 65, 1000])
@pytest.mark.parametrize("backend", WIDE)
def test_matches_torch_in_float64_and_float32(backend: str, l: int, k: int):
    inputs = make(2, l, 5, k)
    expected = exact(**inputs)
    y, state = causal_conv1d(**inputs, backend=backend)  # pyright: ignore
    assert relative_error(y, expected) < 1e-13
    seen = torch.cat((inputs["initial_state"], inputs["x"].transpose(1, 2)), 2)
    assert torch.equal(state, seen[:, :, seen.shape[2] - (k - 1) :])
    y, _ = causal_conv1d(**make(2, l, 5, k, torch.float32), backend=backend)  # pyright: ignore
    assert relative_error(y, expected) < 1e-5


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("backend", WIDE)
def test_gradcheck(backend: str, activation: str):
    inputs = [v.requires_grad_() for v in make(2, 5, 3, 4).values()]

    def conv(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor):
        return causal_conv1d(
            x,
            weight,
            bias,
            initial_state=state,
            activation=activation,
            backend=backend,  # pyright: ignore
        )

    assert torch.autograd.gradcheck(conv, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_as_near_as_plain_pytorch(backend: str):
    narrow = make(2, 40, 5, 4, torch.bfloat16)
    reference = causal_conv1d(**narrow, backend="reference")[0]  # pyright: ignore
    actual = causal_conv1d(**narrow, backend=backend)[0]  # pyright: ignore
    assert_within_budget(
        "y", actual, reference, exact(**{k: v.double() for k, v in narrow.items()})
    )


@pytest.mark.parametrize("backend", WIDE)
def test_pieces_equal_the_whole(backend: str):
    inputs = make(2, 9, 3, 4)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    whole, last = causal_conv1d(x, weight, bias, backend=backend)  # pyright: ignore
    state, parts = None, []
    for start, stop in ((0, 1), (1, 3), (3, 3), (3, 9)):
        y, state = causal_conv1d(
            x[:, start:stop], weight, bias, initial_state=state, backend=backend
        )  # pyright: ignore
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert torch.equal(state, last)


def test_padded_rows_remember_their_last_real_inputs():
    inputs = make(5, 6, 3, 4)
    lengths = torch.tensor([0, 1, 2, 4, 6])
    _, state = causal_conv1d(**inputs, lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        seen = torch.cat((inputs["initial_state"][row], inputs["x"][row, :n].t()), 1)
        assert torch.equal(state[row], seen[:, n:])


@pytest.mark.parametrize("backend", WIDE)
def test_no_bias_empty_batch_strides_and_bits(backend: str):
    inputs = make(2, 7, 4, 4)
    y, _ = causal_conv1d(inputs["x"], inputs["weight"], backend=backend)  # pyright: ignore
    zero = torch.zeros_like(inputs["bias"]), torch.zeros_like(inputs["initial_state"])
    torch.testing.assert_close(y, exact(inputs["x"], inputs["weight"], *zero))
    assert causal_conv1d(inputs["x"][:0], inputs["weight"], backend=backend)[0].shape == (0, 7, 4)  # pyright: ignore
    wide = torch.cat((inputs["x"], inputs["x"]), 2)[:, :, :4]
    again, _ = causal_conv1d(wide, inputs["weight"], backend=backend)  # pyright: ignore
    assert torch.equal(y, again)


@pytest.mark.parametrize("backend", WIDE)
def test_nan_reaches_the_next_inputs_of_its_channel_only(backend: str):
    inputs = make(2, 9, 3, 4)
    inputs["x"][0, 4, 1] = torch.nan
    y, _ = causal_conv1d(**inputs, backend=backend)  # pyright: ignore
    assert y.isnan().nonzero().tolist() == [[0, t, 1] for t in range(4, 8)]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_every_gradient_in_bfloat16_is_as_near_as_plain_pytorch(backend: str):
    def gradients(inputs: dict[str, Tensor], backend: str) -> list[Tensor]:
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        y, _ = causal_conv1d(**leaves, backend=backend)  # pyright: ignore
        return list(torch.autograd.grad(y.square().sum(), list(leaves.values())))

    narrow = make(2, 40, 5, 4, torch.bfloat16)
    exact = gradients({k: v.double() for k, v in narrow.items()}, "reference")
    for name, *results in zip(
        narrow, gradients(narrow, backend), gradients(narrow, "reference"), exact, strict=True
    ):
        assert_within_budget(f"grad_{name}", *results)


@pytest.mark.parametrize("backend", WIDE)
def test_unwritten_memory_is_never_read(backend: str, nan_filled_memory: None):
    leaves = [v.requires_grad_() for v in make(2, 9, 3, 4).values()]
    y, state = causal_conv1d(*leaves[:3], initial_state=leaves[3], backend=backend)  # pyright: ignore
    grads = torch.autograd.grad(y.sum() + state.sum(), leaves)
    assert all(t.isfinite().all() for t in (y, state, *grads))


# torch 2.13 instantiates autograd functions itself while it traces them
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(backend: str):
    leaves = {k: v.requires_grad_() for k, v in make(2, 9, 3, 4, torch.float32).items()}
    seq_idx = torch.tensor([[0] * 4 + [1] * 5, [2] * 9])

    def loss(leaves: dict[str, Tensor]) -> Tensor:
        y, state = causal_conv1d(**leaves, seq_idx=seq_idx, backend=backend)  # pyright: ignore
        return y.square().sum() + state.square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(
        torch.autograd.grad(compiled(leaves), list(leaves.values())),
        torch.autograd.grad(loss(leaves), list(leaves.values())),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", WIDE)
@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_documents_do_not_see_each_other(k: int, backend: str):
    """A packed row equals its documents one by one; the memory is that of the last."""
    inputs = make(2, 12, 3, k)
    lengths = torch.tensor([11, 12])
    pieces = [[(0, 3), (3, 4), (4, 11)], [(0, 12)]]
    seq_idx = torch.zeros(2, 12, dtype=torch.int32)
    for row, spans in enumerate(pieces):
        for number, (start, stop) in enumerate(spans):
            seq_idx[row, start:stop] = 7 - number
    seq_idx[0, 11] = 9  # a pad
    y, state = causal_conv1d(**inputs, lengths=lengths, seq_idx=seq_idx, backend=backend)  # pyright: ignore
    for row, spans in enumerate(pieces):
        before: Tensor | None = inputs["initial_state"][row : row + 1]
        for start, stop in spans:
            alone, after = causal_conv1d(
                inputs["x"][row : row + 1, start:stop],
                inputs["weight"],
                inputs["bias"],
                initial_state=before,
            )
            torch.testing.assert_close(y[row, start:stop], alone[0])
            before = None
        torch.testing.assert_close(state[row], after[0])
    same = causal_conv1d(**inputs, seq_idx=torch.zeros(2, 12, dtype=torch.int64), backend=backend)  # pyright: ignore
    for actual, expected in zip(same, causal_conv1d(**inputs, backend=backend), strict=True):  # pyright: ignore
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", WIDE)
def test_gradcheck_with_documents(backend: str):
    inputs = [v.requires_grad_() for v in make(2, 7, 2, 4).values()]
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [3, 3, 3, 3, 3, 3, 4]])

    def conv(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor):
        return causal_conv1d(
            x,
            weight,
            bias,
            initial_state=state,
            seq_idx=seq_idx,
            backend=backend,  # pyright: ignore
        )

    assert torch.autograd.gradcheck(conv, inputs)


def test_memory_of_a_row_of_which_nothing_is_real():
    inputs = make(2, 5, 3, 4)
    seq_idx = torch.tensor([[4, 4, 5, 5, 5]] * 2)
    _, state = causal_conv1d(**inputs, lengths=torch.tensor([0, 1]), seq_idx=seq_idx)
    assert torch.equal(state[0], inputs["initial_state"][0])
    empty = {**inputs, "x": inputs["x"][:, :0]}
    _, state = causal_conv1d(**empty, seq_idx=seq_idx[:, :0])
    assert torch.equal(state, inputs["initial_state"])


# ---- the native kernel -----------------------------------------------------------------------

sizes = st.integers(1, 257)


def run_with_gradients(
    tensors: dict[str, Tensor], seq_idx: Tensor | None, activation: str, backend: str
) -> dict[str, Tensor]:
    leaves = {name: v.detach().requires_grad_() for name, v in tensors.items()}
    y, state = causal_conv1d(
        **leaves,
        seq_idx=seq_idx,
        activation=activation,
        backend=backend,  # pyright: ignore
    )
    g = torch.Generator().manual_seed(1)
    outer = torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), outer, allow_unused=True)
    named = {
        f"grad_{k}": torch.zeros_like(leaves[k]) if v is None else v
        for k, v in zip(leaves, grads, strict=True)
    }
    return {"y": y.detach(), "state": state.detach(), **named}


def assert_close_to_its_terms(name: str, actual: Tensor, exact: Tensor):
    """The sums are of numbers about 1: they can be small, their errors need not be."""
    if exact.numel():
        scale = max(1.0, exact.abs().max().item())
        assert largest_difference(actual, exact) < 2e-6 * scale, name


@NATIVE
@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(0, 3),
    l=sizes,
    d=sizes,
    k=st.sampled_from([1, 2, 3, 4, 4, 4, 5, 9]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    activation=st.sampled_from(["silu", "none"]),
    absent=st.sets(st.sampled_from(["bias", "initial_state"])),
    n_documents=st.integers(0, 4),
    strided=st.booleans(),
)
def test_native_is_as_near_as_plain_pytorch(
    b: int,
    l: int,
    d: int,
    k: int,
    dtype: torch.dtype,
    activation: str,
    absent: set[str],
    n_documents: int,
    strided: bool,
):
    narrow = {n: v for n, v in make(b, l, d, k, dtype).items() if n not in absent}
    if strided:  # half of a product's columns, as in the model
        narrow["x"] = torch.cat((narrow["x"], narrow["x"]), 2)[:, :, d:]
    g = torch.Generator().manual_seed(2)
    seq_idx = (
        torch.randint(0, n_documents, (b, l), generator=g).sort(dim=1).values
        if n_documents
        else None
    )
    wide = {n: v.double() for n, v in narrow.items()}
    exact = run_with_gradients(wide, seq_idx, activation, "reference")
    eager = run_with_gradients(narrow, seq_idx, activation, "reference")
    actual = run_with_gradients(narrow, seq_idx, activation, "native")
    for name in actual:
        if dtype == torch.bfloat16:
            assert_within_budget(name, actual[name], eager[name], exact[name])
        else:
            assert_close_to_its_terms(name, actual[name], exact[name])


@NATIVE
def test_native_gives_the_same_bits_on_any_number_of_threads():
    inputs = make(2, 200, 601, 4, torch.float32)
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(run_with_gradients(inputs, None, "silu", "native"))
    torch.set_num_threads(1)
    for name in results[0]:
        assert all(torch.equal(results[0][name], r[name]) for r in results[1:]), name


@NATIVE
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_native_keeps_a_bad_number_to_its_channel_and_document(bad: float):
    inputs = make(2, 70, 20, 4, torch.float32)
    inputs["x"][0, 4, 17] = bad
    seq_idx = (torch.arange(70) > 5).long().expand(2, 70)
    seen = {name: [] for name in ("y", "grad_x")}
    for backend in ("native", "reference"):
        results = run_with_gradients(inputs, seq_idx, "silu", backend)
        for name, places in seen.items():
            places.append((~results[name].isfinite()).nonzero().tolist())
    assert seen["y"][0] == seen["y"][1] == [[0, 4, 17], [0, 5, 17]][: len(seen["y"][1])]
    assert {tuple(p) for p in seen["grad_x"][1]} <= {tuple(p) for p in seen["grad_x"][0]}
    assert {p[2] for p in seen["grad_x"][0]} <= {17}


@NATIVE
def test_native_is_registered_as_torch_wants_it():
    x, weight, bias, before = (v.requires_grad_() for v in make(2, 5, 3, 4, torch.float32).values())
    seq_idx = torch.tensor([[0, 0, 1, 1, 1]] * 2)
    op = torch.ops.blackmamba.causal_conv1d.default
    torch.library.opcheck(op, (x, weight, bias, before, seq_idx, True))
    torch.library.opcheck(op, (x, weight, None, None, None, False))


@NATIVE
def test_native_never_reads_unwritten_memory(nan_filled_memory: None):
    results = run_with_gradients(make(2, 70, 5, 4, torch.float32), None, "silu", "native")
    assert all(t.isfinite().all() for t in results.values())


def test_bad_input_is_named():
    inputs = make(2, 5, 3, 4)
    with pytest.raises(InputError, match=r"weight has shape \(2, 4\), must be \(3, 4\)"):
        causal_conv1d(inputs["x"], inputs["weight"][:2])
    with pytest.raises(InputError, match=r"activation='relu'"):
        causal_conv1d(inputs["x"], inputs["weight"], activation="relu")  # pyright: ignore
    with pytest.raises(InputError, match=r"lengths has shape \(3,\), must be \(2,\)"):
        causal_conv1d(inputs["x"], inputs["weight"], lengths=torch.tensor([1, 2, 3]))
    for wrong in (-1, 6):
        with pytest.raises(InputError, match=rf"lengths holds {wrong}, must be 0 .. 5"):
            causal_conv1d(inputs["x"], inputs["weight"], lengths=torch.tensor([2, wrong]))
    with pytest.raises(InputError, match=r"lengths is torch.float32, must be torch.int64"):
        causal_conv1d(inputs["x"], inputs["weight"], lengths=torch.tensor([2.0, 3.0]))
    with pytest.raises(InputError, match=r"weight has shape \(3, 0\), k must be at least 1"):
        causal_conv1d(inputs["x"], inputs["weight"][:, :0])
    with pytest.raises(InputError, match=r"seq_idx has shape \(2, 4\), must be \(2, 5\)"):
        causal_conv1d(inputs["x"], inputs["weight"], seq_idx=torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(InputError, match=r"seq_idx is torch.float32, must be an integer dtype"):
        causal_conv1d(inputs["x"], inputs["weight"], seq_idx=torch.zeros(2, 5))
    with pytest.raises(InputError, match=r"bias is torch.int64"):
        causal_conv1d(inputs["x"], inputs["weight"], inputs["bias"].long())
