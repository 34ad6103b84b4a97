"""Triton's kernels of the norm and the loss, step by step on the CPU where there is no GPU."""

import importlib

import pytest
import torch
from numerics import largest_difference

from blackmamba.errors import BackendError, InputError
from blackmamba.ops import add_rms_norm, gpu, linear_cross_entropy, rms_norm
from blackmamba.ops.linear_cross_entropy import gpu as loss_gpu

pytestmark = pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of a result's parts: float32 sums, or one rounding of the result to its dtype. Where kernels are
# interpreted, bfloat16 is cut off, not rounded.
BFLOAT16 = 2**-7 if gpu.interpreted() else 2**-8
EXACTNESS = {torch.float32: 2e-6, torch.bfloat16: BFLOAT16, torch.float16: 2**-10}


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE, dtype)


def norm_and_gradients(
    x: torch.Tensor,
    update: torch.Tensor | None,
    weight: torch.Tensor,
    out_dtype: torch.dtype,
    backend: str,
    outers: tuple[bool, bool] = (True, True),
) -> list[torch.Tensor]:
    """Outputs, and gradients by x, update and weight."""
    leaves = [p.detach().requires_grad_() for p in (x, update, weight) if p is not None]
    if update is None:
        outputs = [rms_norm(*leaves, out_dtype=out_dtype, backend=backend)]  # pyright: ignore
    else:
        outputs = [*add_rms_norm(*leaves, out_dtype=out_dtype, backend=backend)]  # pyright: ignore
        outputs = [y for y, kept in zip(outputs, outers, strict=True) if kept]
    outer = [
        normal(*x.shape, seed=5 + i).bfloat16().to(y.dtype) for i, y in enumerate(outputs)
    ]  # the same in any dtype
    grads = torch.autograd.grad(outputs, leaves, outer, materialize_grads=True)
    return [*(y.detach() for y in outputs), *grads]


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 9, 64), (5, 257), (0, 8), (70, 5)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "update_dtype", "out_dtype"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, None, torch.bfloat16),
        (torch.bfloat16, None, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("outers", [(True, True), (False, True)], ids=["both", "y"])
def test_norm_is_as_near_as_its_dtypes(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    update_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
    outers: tuple[bool, bool],
):
    x, weight = normal(*shape, dtype=dtype), normal(shape[-1], dtype=torch.float32, seed=1)
    update = None if update_dtype is None else normal(*shape, dtype=update_dtype, seed=2)
    eager = norm_and_gradients(x, update, weight, out_dtype, "reference", outers)
    actual = norm_and_gradients(x, update, weight, out_dtype, "triton", outers)
    assert [(a.dtype, a.shape) for a in actual] == [(e.dtype, e.shape) for e in eager]
    if not x.numel():
        assert all(not g.any() for g in actual)
        return
    # the norm is of the sum as it is stored, so that is where the exact one begins
    total = x
    if update is not None:
        total = add_rms_norm(x, update, weight, backend="triton")[0]
        error = largest_difference(total, x.double() + update.double())
        assert error <= EXACTNESS[dtype] * total.abs().max()
    wide = total.double().requires_grad_()
    exact_weight = weight.double().requires_grad_()
    y = rms_norm(wide, exact_weight)
    outer = [normal(*shape, seed=5 + i).bfloat16().double() for i in range(2)]
    kept_sum = update is not None and outers[0]
    y_outer = outer[1] if kept_sum else outer[0]
    grad_x, grad_weight = torch.autograd.grad(y, (wide, exact_weight), y_outer)
    grad_x = grad_x + outer[0] if kept_sum else grad_x
    exact = [total.double()] * kept_sum + [y.detach(), grad_x]
    exact += [grad_x] * (update is not None) + [grad_weight]
    # gradients are sums and differences: what they are made of says how exact they can be
    root = (total.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    scale = (y_outer * weight / root).abs().max() + outer[0].abs().max()
    scales = [total.abs().max()] * kept_sum + [y.abs().max(), scale]
    scales += [scale] * (update is not None) + [
        (y_outer * total / root).abs().flatten(0, -2).sum(0).max()
    ]
    for i, (result, expected, size) in enumerate(zip(actual, exact, scales, strict=True)):
        error = largest_difference(result, expected)
        assert error <= EXACTNESS[result.dtype] * size, (i, error)


def test_norm_of_a_strided_input_and_the_same_bits(nan_filled_memory: None):
    x, update = (
        normal(9, 200, dtype=torch.float32)[:, 60:],
        normal(140, 9, dtype=torch.bfloat16).t(),
    )
    weight = normal(280, dtype=torch.float32, seed=1)[::2]
    results = [
        norm_and_gradients(*args, torch.bfloat16, "triton")
        for args in (
            (x, update, weight),
            (x.contiguous(), update.contiguous(), weight.contiguous()),
        )
    ]
    assert all(map(torch.equal, *results))
    assert all(r.isfinite().all() for r in results[0])


def test_norm_when_only_the_sum_is_used():
    x, update, weight = (normal(4, 6, seed=i).float() for i in range(3))
    update = update.bfloat16().requires_grad_()
    x.requires_grad_()
    total, _ = add_rms_norm(x, update, weight[0], backend="triton")
    grads = torch.autograd.grad(total.sum(), (x, update))
    assert [g.dtype for g in grads] == [torch.float32, torch.bfloat16]
    assert all((g == 1).all() for g in grads)


def test_norm_bad_numbers_stay_in_their_rows_and_registration():
    x, weight = normal(7, 33).float(), normal(33, seed=1).float()
    x[3, 30] = torch.nan
    y, grad_x, _ = norm_and_gradients(x, None, weight, torch.float32, "triton")
    for t in (y, grad_x):
        assert (~t.isfinite()).any(1).nonzero().flatten().tolist() == [3]
    leaves = x[:3].clone().requires_grad_(), x[4:].bfloat16().requires_grad_()
    op = torch.ops.blackmamba.add_rms_norm_triton.default
    for update in (leaves[1], None):
        torch.library.opcheck(
            op, (leaves[0], update, weight.clone().requires_grad_(), 1e-5, torch.bfloat16)
        )


def test_norm_compiles_to_one_graph():
    leaves = [normal(3, 9).float(), normal(3, 9, seed=1).bfloat16(), normal(9, seed=2).float()]
    for leaf in leaves:
        leaf.requires_grad_()

    def loss(x: torch.Tensor, update: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        total, y = add_rms_norm(x, update, weight, out_dtype=torch.bfloat16, backend="triton")
        return total.square().sum() + y.square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_norm_names_bad_input():
    with pytest.raises(InputError, match=r"update has shape \(3, 4\), must be \(2, 4\)"):
        add_rms_norm(normal(2, 4), normal(3, 4), normal(4))
    with pytest.raises(BackendError, match="float64"):
        rms_norm(normal(2, 4), normal(4), backend="triton")


# ---- the loss -------------------------------------------------------------------------------


def loss_and_gradients(
    inputs: list[torch.Tensor], labels: torch.Tensor, dtype: torch.dtype, backend: str
) -> list[torch.Tensor]:
    leaves = [p.detach().to(dtype).requires_grad_() for p in inputs]
    bias = leaves[2] if len(leaves) > 2 else None
    loss = linear_cross_entropy(*leaves[:2], labels, bias=bias, backend=backend)  # pyright: ignore
    return [loss.detach(), *torch.autograd.grad(loss / 3, leaves)]


@pytest.mark.parametrize("dtype", EXACTNESS, ids=str)
@pytest.mark.parametrize(
    ("t", "v", "m"), [(0, 5, 3), (1, 1, 1), (7, 3, 20), (40, 257, 9), (33, 2100, 16)]
)
@pytest.mark.parametrize("biased", [True, False])
def test_loss_is_as_near_as_its_dtype(
    t: int, v: int, m: int, biased: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loss_gpu, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(loss_gpu, "_LEAST_CHUNK", 16)
    kernels = importlib.import_module("blackmamba.ops.linear_cross_entropy.kernels")
    monkeypatch.setattr(kernels, "_BLOCK", 1024)
    labels = torch.randint(0, v, (t,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    labels[::3] = -100
    inputs = [normal(t, m, dtype=dtype), normal(v, m, dtype=dtype, seed=1)]
    if biased:
        inputs.append(normal(v, dtype=dtype, seed=2))
    actual = loss_and_gradients(inputs, labels, dtype, "triton")
    exact = loss_and_gradients(inputs, labels, torch.float64, "reference")
    for name, result, expected in zip(("loss", "x", "weight", "bias"), actual, exact):  # noqa: B905
        assert result.dtype == (torch.float32 if name == "loss" else dtype), name
        # as the tests of the CPU's version have it: logits and their gradient are of this dtype
        exactness = {torch.float32: 3e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
        if t:
            scale = max(1.0, expected.abs().max().item())
            assert largest_difference(result, expected) < exactness * scale, name


def test_loss_keeps_a_wide_weights_gradient():
    x, weight = normal(40, 8).bfloat16(), normal(11, 8, seed=1).float().requires_grad_()
    labels = torch.arange(40, device=DEVICE) % 11
    loss = linear_cross_entropy(x, weight, labels, backend="triton")
    (grad,) = torch.autograd.grad(loss, weight)
    wide = weight.detach().bfloat16().double().requires_grad_()
    exact = linear_cross_entropy(x.double(), wide, labels, backend="reference")
    (expected,) = torch.autograd.grad(exact, wide)
    assert grad.dtype == torch.float32
    # 40 logits' gradients of at most 1, rounded to bfloat16, times x
    assert largest_difference(grad, expected) < 2**-8 * x.abs().max().item() * 40**0.5


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_loss_beside_a_frozen_input(frozen: int):
    labels = torch.tensor([0, 3, -100, 2], device=DEVICE)
    results = []
    for backend in ("reference", "triton"):
        leaves = [normal(4, 3).float(), normal(5, 3, seed=1).float(), normal(5, seed=2).float()]
        kept = [p.requires_grad_() for i, p in enumerate(leaves) if i != frozen]
        loss = linear_cross_entropy(*leaves[:2], labels, bias=leaves[2], backend=backend)  # pyright: ignore
        results.append([loss.detach(), *torch.autograd.grad(loss, kept)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    with torch.no_grad():
        assert linear_cross_entropy(*leaves[:2], labels, backend="triton").isfinite()


def test_loss_of_extremes_and_nan(nan_filled_memory: None):
    x, weight = normal(9, 7).float(), normal(301, 7, seed=1).float()
    labels = torch.arange(9, device=DEVICE) % 3
    args = 1e4 * x, weight, labels
    masked = torch.full((301,), -torch.inf, device=DEVICE)
    masked[:3] = 0  # all but three words are impossible
    for bias in (None, masked):
        actual, expected = (
            linear_cross_entropy(*args, bias=bias, backend=b)  # pyright: ignore
            for b in ("triton", "reference")
        )
        torch.testing.assert_close(actual, expected)
    x[2] = torch.nan
    labels[2] = -100
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, labels, backend="triton")
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.isfinite()
    assert grad[[0, 1, 3]].isfinite().all()
    assert linear_cross_entropy(x, weight, labels.abs() % 5, backend="triton").isnan()


def test_loss_bits_registration_and_one_graph():
    leaves = [
        normal(20, 3).float().requires_grad_(),
        normal(50, 3, seed=1).float().requires_grad_(),
    ]
    labels = torch.arange(20, device=DEVICE) * 2
    labels[4] = -100

    def loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(x, weight, labels, backend="triton") / 7

    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert all(map(torch.equal, expected, torch.autograd.grad(loss(*leaves), leaves)))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.library.opcheck(
        torch.ops.blackmamba.linear_cross_entropy_triton.default,
        (*leaves, labels, None, -100, [True, True, False]),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
