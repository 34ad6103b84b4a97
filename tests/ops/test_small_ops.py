"""RMSNorm, the linear cross-entropy, and the picking of backends."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_within_budget, largest_difference, relative_error
from torch.nn import functional as F

from blackmamba.errors import BackendError, InputError
from blackmamba.ops import add_rms_norm, expert_mlp, linear_cross_entropy, native, rms_norm
from blackmamba.ops.backend import available_backends, describe_backends
from blackmamba.ops.linear_cross_entropy import chunked

NATIVE = pytest.mark.skipif(
    "native" not in available_backends("rms_norm"), reason="the extension was not built"
)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 5, 64), (0, 8)], ids=str)
def test_rms_norm_is_its_formula(shape: tuple[int, ...]):
    x, weight = normal(*shape), normal(shape[-1], seed=1)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight), expected)
    assert relative_error(rms_norm(x.float(), weight.float()), expected) < 1e-6
    assert rms_norm(x.bfloat16(), weight.float()).dtype == torch.bfloat16
    if x.numel():
        assert torch.autograd.gradcheck(rms_norm, (x.requires_grad_(), weight.requires_grad_()))


def test_rms_norm_names_bad_input():
    with pytest.raises(InputError, match=r"weight has shape \(3,\), must be \(4,\)"):
        rms_norm(normal(2, 4), normal(3))
    with pytest.raises(InputError, match=r"out_dtype=torch.int32, must be a floating-point dtype"):
        rms_norm(normal(2, 4), normal(4), out_dtype=torch.int32)
    with pytest.raises(BackendError, match="rms_norm has triton, native, reference, or auto"):
        rms_norm(normal(2, 4), normal(4), backend="torch")


def rms_norm_with_gradients(
    x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype, backend: str
) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    y = rms_norm(*leaves, out_dtype=out_dtype, backend=backend)  # pyright: ignore
    outer = normal(*y.shape, seed=2).to(torch.bfloat16).to(y.dtype)  # the same in any dtype
    return [y.detach(), *torch.autograd.grad(y, leaves, outer)]


dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@NATIVE
@settings(max_examples=60, deadline=None)
@given(
    t=st.integers(0, 70),
    m=st.integers(1, 257),
    strided=st.booleans(),
    dtype=dtypes,
    weight_dtype=dtypes,
    out_dtype=dtypes,
)
def test_native_rms_norm_is_as_near_as_plain_pytorch(
    t: int,
    m: int,
    strided: bool,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    out_dtype: torch.dtype,
):
    x = normal(t, 2 * m, dtype=dtype)[:, m:] if strided else normal(t, m, dtype=dtype)
    weight = normal(m, dtype=weight_dtype, seed=1)
    exact = rms_norm_with_gradients(x.double(), weight.double(), torch.float64, "reference")
    eager = rms_norm_with_gradients(x, weight, out_dtype, "reference")
    actual = rms_norm_with_gradients(x, weight, out_dtype, "native")
    if t == 0:
        assert actual[2].count_nonzero() == 0
        return
    # gradients are sums and differences: what they are made of says how exact they can be
    outer, root = normal(t, m, seed=2), (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    parts = (exact[0], outer * weight / root, (outer * x / root).abs().sum(0))
    for name, made_of, *results in zip(
        ("y", "x", "weight"), parts, actual, eager, exact, strict=True
    ):
        assert results[0].dtype == results[1].dtype, name
        exactness = 2e-6 if results[0].dtype == torch.float32 else 2**-8
        error = largest_difference(results[0], results[2])
        assert error <= exactness * made_of.abs().max(), name


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("update_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("read", ["both", "total", "y"])
def test_native_norm_of_a_sum(dtype: torch.dtype, update_dtype: torch.dtype, read: str):
    """Its gradient is that of both outputs, or of the one that is read."""

    def run(backend: str, wide: bool = False) -> list[torch.Tensor]:
        given = [
            normal(2, 37, 53, dtype=dtype),
            normal(2, 53, 37, dtype=update_dtype, seed=1).transpose(1, 2),
            normal(53, dtype=torch.float32, seed=2),
        ]
        leaves = [t.to(torch.float64 if wide else t.dtype).requires_grad_() for t in given]
        outputs = add_rms_norm(*leaves, out_dtype=None, backend=backend)  # pyright: ignore
        shares = [normal(*t.shape, seed=3 + i).to(t.dtype) for i, t in enumerate(outputs)]
        terms = [(t * w).sum() for t, w in zip(outputs, shares, strict=True)]
        ({"both": terms[0] + terms[1], "total": terms[0], "y": terms[1]}[read]).backward()
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
        return [*(t.detach() for t in outputs), *grads]

    exact = run("reference", wide=True)
    for name, actual, eager, right in zip(
        ("total", "y", "x", "update", "weight"), run("native"), run("reference"), exact, strict=True
    ):
        assert_within_budget(name, actual, eager, right)


@NATIVE
def test_native_rms_norm_bits_bad_numbers_and_registration():
    x, weight = normal(200, 601, dtype=torch.float32), normal(601, dtype=torch.float32, seed=1)
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(rms_norm_with_gradients(x, weight, torch.float32, "native"))
    torch.set_num_threads(1)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))
    x[3, 600], x[5, 0] = torch.nan, torch.inf
    y, grad_x, grad_weight = rms_norm_with_gradients(x, weight, torch.float32, "native")
    assert y[3].isnan().all()
    assert y[5, 0].isnan()
    for t in (y, grad_x):
        assert (~t.isfinite()).any(1).nonzero().flatten().tolist() in ([3], [3, 5])
    assert grad_weight.isnan().all()
    leaves = x[:4, :9].contiguous().requires_grad_(), weight[:9].clone().requires_grad_()
    op = torch.ops.blackmamba.rms_norm.default
    torch.library.opcheck(op, (*leaves, 1e-5, torch.bfloat16))


@pytest.mark.parametrize("backend", available_backends("rms_norm"))
def test_rms_norm_compiles_to_one_graph(backend: str):
    x, weight = normal(3, 9).float().requires_grad_(), normal(9).float().requires_grad_()

    def loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = rms_norm(x, weight, out_dtype=torch.bfloat16, backend=backend)  # pyright: ignore
        return y.square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(x, weight), (x, weight))
    for a, b in zip(torch.autograd.grad(compiled(x, weight), (x, weight)), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("t", [0, 1, 15, 16, 17, 100])
@pytest.mark.parametrize("biased", [True, False])
def test_cross_entropy_in_chunks(t: int, biased: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunked, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(chunked, "_LEAST_CHUNK", 16)
    monkeypatch.setattr(chunked, "_COLUMNS", 4)
    labels = torch.randint(0, 11, (t,), generator=torch.Generator().manual_seed(0))
    labels[::3] = -100
    results = []
    for backend in ("reference", "torch"):
        x, weight = normal(t, 5).requires_grad_(), normal(11, 5, seed=1).requires_grad_()
        bias = normal(11, seed=2).requires_grad_() if biased else None
        loss = linear_cross_entropy(x, weight, labels, bias=bias, backend=backend)  # pyright: ignore
        (3 * loss).backward()
        grads = [p.grad for p in (x, weight, bias) if p is not None]
        results.append([loss.detach(), *grads])
    for actual, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(actual, expected)


def test_cross_entropy_gradcheck_and_dtypes():
    labels = torch.tensor([0, 3, -100, 2])
    inputs = normal(4, 3).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, labels), inputs)
    x, weight = (p.detach().bfloat16() for p in inputs)
    exact = linear_cross_entropy(x.double(), weight.double(), labels, backend="reference")
    eager = linear_cross_entropy(x, weight, labels, backend="reference")
    assert_within_budget("loss", linear_cross_entropy(x, weight, labels), eager, exact)
    assert eager.dtype == torch.float32


def test_cross_entropy_without_gradients_and_with_other_ignore_index():
    x, weight, labels = normal(6, 3), normal(5, 3, seed=1), torch.tensor([0, 1, 2, 3, 4, 4])
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, labels, ignore_index=4)
    expected = F.cross_entropy(x @ weight.t(), labels, ignore_index=4, reduction="sum")
    torch.testing.assert_close(loss, expected)
    with pytest.raises(InputError, match=r"labels has shape \(6,\), must be \(5,\)"):
        linear_cross_entropy(x[:5], weight, labels)


def test_cross_entropy_of_narrow_inputs_keeps_a_wide_weights_gradient():
    x, weight = normal(40, 8).bfloat16(), normal(11, 8, seed=1).float().requires_grad_()
    bias = normal(11, seed=2).float().requires_grad_()
    labels = torch.randint(0, 11, (40,), generator=torch.Generator().manual_seed(0))
    linear_cross_entropy(x, weight, labels, bias=bias).backward()
    leaves = weight.detach().bfloat16().double(), bias.detach().bfloat16().double()
    for leaf in leaves:
        leaf.requires_grad_()
    loss = linear_cross_entropy(x.double(), leaves[0], labels, bias=leaves[1], backend="reference")
    for actual, exact in zip((weight, bias), torch.autograd.grad(loss, leaves), strict=True):
        assert actual.grad is not None
        assert actual.grad.dtype == torch.float32
        assert relative_error(actual.grad, exact) < 0.02  # the logits' gradient is in bfloat16


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_cross_entropy_beside_a_frozen_input(frozen: int):
    results = []
    labels = torch.tensor([0, 3, -100, 2])
    for backend in ("reference", "torch"):
        leaves = [normal(4, 3), normal(5, 3, seed=1), normal(5, seed=2)]
        kept = [p.requires_grad_() for i, p in enumerate(leaves) if i != frozen]
        loss = linear_cross_entropy(*leaves[:2], labels, bias=leaves[2], backend=backend)  # pyright: ignore
        results.append(torch.autograd.grad(loss, kept))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", available_backends("linear_cross_entropy"))
@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_cross_entropy_over_a_divisor(backend: str, upstream: float):
    labels, divisor = torch.tensor([0, 3, -100, 2]), torch.tensor(3)
    results = []
    for dtype, name in ((torch.float64, "reference"), (torch.float32, backend)):
        leaves = normal(4, 3).to(dtype).requires_grad_(), normal(5, 3, seed=1).to(dtype)
        leaves[1].requires_grad_()
        loss = linear_cross_entropy(*leaves, labels, divisor=divisor, backend=name)  # pyright: ignore
        grads = torch.autograd.grad(upstream * loss, leaves, retain_graph=True)
        again = torch.autograd.grad(upstream * loss, leaves)
        assert all(map(torch.equal, grads, again))
        results.append([loss.detach(), *grads])
    for exact, actual in zip(*results, strict=True):
        assert largest_difference(actual, exact) < 1e-6
    x, weight = leaves
    none = linear_cross_entropy(
        x, weight, torch.full((4,), -100), divisor=torch.tensor(0), backend=backend
    )  # pyright: ignore
    assert none.isnan()
    with pytest.raises(InputError, match=r"divisor has shape \(1,\), must be \(\)"):
        linear_cross_entropy(x, weight, labels, divisor=divisor[None])


@pytest.mark.parametrize("backend", available_backends("linear_cross_entropy"))
def test_cross_entropy_of_nan(backend: str):
    """NaN in a counted token is NaN in the loss; in an ignored one it stays there."""
    x, weight = normal(4, 3).float(), normal(5, 3, seed=1).float()
    x[2] = torch.nan
    labels = torch.tensor([0, 3, -100, 2])
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, labels, backend=backend)  # pyright: ignore
    loss.backward()
    assert x.grad is not None
    assert loss.isfinite()
    assert x.grad[[0, 1, 3]].isfinite().all()
    assert linear_cross_entropy(x, weight, labels.abs() % 5, backend=backend).isnan()  # pyright: ignore


@NATIVE
@settings(max_examples=40, deadline=None)
@given(
    t=st.integers(0, 40),
    v=st.integers(1, 257),
    m=st.integers(1, 20),
    dtype=dtypes,
    biased=st.booleans(),
    ignored=st.booleans(),
)
def test_native_cross_entropy_is_as_near_as_plain_pytorch(
    t: int, v: int, m: int, dtype: torch.dtype, biased: bool, ignored: bool
):
    labels = torch.randint(0, v, (t,), generator=torch.Generator().manual_seed(0))
    if ignored:
        labels[::3] = -100
    inputs = [normal(t, m, dtype=dtype), normal(v, m, dtype=dtype, seed=1)]
    if biased:
        inputs.append(normal(v, dtype=dtype, seed=2))
    results = []
    for backend, cast in (("native", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [p.to(cast).requires_grad_() for p in inputs]
        bias = leaves[2] if biased else None
        loss = linear_cross_entropy(*leaves[:2], labels, bias=bias, backend=backend)  # pyright: ignore
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for name, *values in zip(("loss", "x", "weight", "bias"), *results):  # noqa: B905
        assert values[0].dtype == values[1].dtype, name
        if t:
            exactness = 3e-6 if dtype == torch.float32 else 2**-6
            scale = max(1.0, values[2].abs().max().item())
            assert largest_difference(values[0], values[2]) < exactness * scale, name


@NATIVE
def test_native_cross_entropy_bits_extremes_and_registration():
    x, weight = normal(90, 7).float(), normal(301, 7, seed=1).float()
    labels = torch.randint(0, 301, (90,), generator=torch.Generator().manual_seed(0))
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(*leaves, labels, backend="native")
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.set_num_threads(1)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))
    huge = linear_cross_entropy(1e4 * x, weight, labels, backend="native")
    torch.testing.assert_close(
        huge, linear_cross_entropy(1e4 * x, weight, labels, backend="reference")
    )
    masked = torch.full((301,), -torch.inf)
    masked[:3] = 0  # all but three words are impossible
    args = x, weight, labels % 3
    actual, expected = (
        linear_cross_entropy(*args, bias=masked, backend=b)  # pyright: ignore
        for b in ("native", "reference")
    )
    torch.testing.assert_close(actual, expected)
    op = torch.ops.blackmamba.linear_cross_entropy.default
    for leaf in args[:2]:
        leaf.requires_grad_()
    torch.library.opcheck(
        op,
        (*args, None, -100, torch.tensor(90), [True, True, False], True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("backend", available_backends("linear_cross_entropy"))
def test_cross_entropy_compiles_to_one_graph(backend: str):
    leaves = normal(9, 3).float().requires_grad_(), normal(5, 3, seed=1).float().requires_grad_()
    labels = torch.tensor([0, 3, -100, 2, 1, 1, -100, 4, 0])

    def loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(x, weight, labels, backend=backend) / 7  # pyright: ignore

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_cross_entropy_names_bad_labels():
    x, weight = normal(4, 3), normal(5, 3, seed=1)
    with pytest.raises(InputError, match=r"labels holds 5, must be 0 .. 4 or -100"):
        linear_cross_entropy(x, weight, torch.tensor([0, -100, 5, 1]))
    with pytest.raises(InputError, match=r"labels is torch.int32, must be torch.int64"):
        linear_cross_entropy(x, weight, torch.tensor([0, 1, 2, 1], dtype=torch.int32))


def test_cross_entropy_never_reads_unwritten_memory(nan_filled_memory: None):
    leaves = normal(9, 3).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    labels = torch.tensor([0, 3, -100, 2, 1, 1, -100, 4, 0])
    grads = torch.autograd.grad(linear_cross_entropy(*leaves, labels), leaves)
    assert all(g.isfinite().all() for g in grads)


NATIVE = ("native",) if native.missing() is None else ()


def test_available_backends():
    assert available_backends("selective_scan") == (*NATIVE, "torch", "reference")
    assert available_backends("sinkhorn") == ("reference",)
    with pytest.raises(BackendError, match="operation='scan': must be one of activate, "):
        available_backends("scan")


def test_environment_forces_a_backend_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    names = ", ".join((*NATIVE, "torch", "reference"))
    best = (*NATIVE, "torch")[0]
    assert dict(describe_backends())["selective_scan"] == f"{best} (of {names})"
    monkeypatch.setenv("BLACKMAMBA_BACKEND", "reference")
    assert dict(describe_backends())["selective_scan"] == f"reference (of {names})"
    monkeypatch.setenv("BLACKMAMBA_BACKEND", "torch")
    assert dict(describe_backends())["sinkhorn"] == "reference (of reference)"
    rms_norm(normal(2, 4), normal(4))
    monkeypatch.setenv("BLACKMAMBA_BACKEND", "gpu")
    with pytest.raises(
        BackendError, match="BLACKMAMBA_BACKEND='gpu': must be one of auto, reference"
    ):
        rms_norm(normal(2, 4), normal(4))


def test_the_choice_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("blackmamba.ops.backend._logged", set())
    args = normal(3, 4), torch.zeros(3, dtype=torch.int64), normal(2, 6, 4), normal(2, 4, 3)
    with caplog.at_level(logging.INFO, logger="blackmamba.ops.backend"):
        expert_mlp(*args)
        expert_mlp(*args)
    messages = [r.getMessage() for r in caplog.records]
    assert messages.count("expert_mlp runs as torch") == 1
    assert len(set(messages)) == len(messages)
