"""The routed experts' GPU path, its kernels interpreted where there is no GPU."""

import sys

import pytest
import torch
from numerics import relative_error
from torch import Tensor

from blackmamba.ops import expert_mlp, gpu
from blackmamba.ops.expert_mlp.gpu import expert_mlp_gpu
from blackmamba.ops.expert_mlp.order import sort_by_expert

pytestmark = pytest.mark.skipif(gpu.missing() is not None, reason="needs triton")
DEVICE = "cpu" if gpu.interpreted() else "cuda"


def make(t: int, m: int, f: int, e: int, idle: bool) -> tuple[dict[str, Tensor], Tensor]:
    g = torch.Generator().manual_seed(t)
    inputs = {
        "x": torch.randn(t, m, generator=g),
        "fc1": torch.randn(e, 2 * f, m, generator=g) / m**0.5,
        "fc2": torch.randn(e, m, f, generator=g) / f**0.5,
        "gate": torch.rand(t, generator=g),
    }
    ids = torch.randint(0, e - 1 if idle else e, (t,), generator=g)
    return inputs, ids


def results(
    inputs: dict[str, Tensor], ids: Tensor, backend: str, **options: object
) -> dict[str, Tensor]:
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    y = expert_mlp(expert_ids=ids, backend=backend, **leaves, **options)  # pyright: ignore
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    (y * weight).sum().backward()
    return {"y": y.detach()} | {k: v.grad for k, v in leaves.items() if v.grad is not None}


@pytest.mark.parametrize("t", [1, 600, 1025])
@pytest.mark.parametrize("e", [1, 3, 8])
def test_sort(t: int, e: int):
    ids = torch.randint(0, e, (t,), generator=torch.Generator().manual_seed(t + e)).to(DEVICE)
    order, ends = sort_by_expert(ids, e)
    assert torch.equal(order.long(), torch.sort(ids, stable=True).indices)
    assert torch.equal(ends.long(), torch.bincount(ids, minlength=e).cumsum(0))


@pytest.mark.parametrize("shape", [(1, 8, 8, 2), (37, 24, 40, 4), (130, 48, 16, 3)], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("gated_by", ["gate", "nothing"])
def test_as_near_as_plain_pytorch(shape: tuple[int, int, int, int], activation: str, gated_by: str):
    inputs, ids = make(*shape, idle=shape[-1] > 2)
    if gated_by == "nothing":
        del inputs["gate"]
    narrow = {k: v if k == "gate" else v.bfloat16() for k, v in inputs.items()}
    narrow, ids = {k: v.to(DEVICE) for k, v in narrow.items()}, ids.to(DEVICE)
    wide = {k: v.double() for k, v in narrow.items()}
    exact = results(wide, ids, "torch", activation=activation)
    eager = results(narrow, ids, "torch", activation=activation)
    found = results(narrow, ids, "triton", activation=activation)
    assert found.keys() == eager.keys()
    for name, value in found.items():
        assert value.dtype == eager[name].dtype, name
        allowed = 2 * relative_error(eager[name], exact[name]) + 2**-8
        assert relative_error(value, exact[name]) <= allowed, name


def test_same_bits_again_and_strided_input():
    inputs, ids = make(70, 32, 24, 3, idle=False)
    narrow = {k: v.bfloat16().to(DEVICE) for k, v in inputs.items()}
    ids = ids.to(DEVICE)
    first = results(narrow, ids, "triton")
    apart = narrow | {"x": torch.cat([narrow["x"], narrow["x"]], 1)[:, :32]}
    for again in (results(narrow, ids, "triton"), results(apart, ids, "triton")):
        assert all(torch.equal(first[k], again[k]) for k in first)


def test_others_take_the_plain_path():
    inputs, ids = make(9, 10, 6, 3, idle=False)  # float32, rows of no whole 16 bytes
    inputs, ids = {k: v.to(DEVICE) for k, v in inputs.items()}, ids.to(DEVICE)
    found, plain = results(inputs, ids, "triton"), results(inputs, ids, "torch")
    assert all(torch.equal(found[k], plain[k]) for k in plain)
    none = {k: v[:0] if k in ("x", "gate") else v for k, v in inputs.items()}
    assert results(none, ids[:0], "triton")["y"].shape == (0, 10)


def test_registered_as_torch_wants_it():
    inputs, ids = make(9, 8, 8, 2, idle=False)
    x, fc1, fc2, gate = (v.bfloat16().to(DEVICE).requires_grad_() for v in inputs.values())
    op = torch.ops.blackmamba.expert_mlp_gpu.default
    torch.library.opcheck(op, (x, ids.to(DEVICE), fc1, fc2, gate, False, True))


@pytest.mark.parametrize("shape", [(1, 8, 8, 2), (37, 24, 40, 4), (130, 136, 35, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@torch.no_grad()
def test_few_tokens_without_a_gradient(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    activation: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(sys.modules[expert_mlp_gpu.__module__], "FEW", 512)
    inputs, ids = make(*shape, idle=shape[-1] > 2)
    narrow = {k: (v if k == "gate" else v.to(dtype)).to(DEVICE) for k, v in inputs.items()}
    ids = ids.to(DEVICE)
    wide = {k: v.double() for k, v in narrow.items()}
    exact = expert_mlp(expert_ids=ids, backend="torch", activation=activation, **wide)  # pyright: ignore
    found = expert_mlp(expert_ids=ids, backend="triton", activation=activation, **narrow)  # pyright: ignore
    assert found.dtype == dtype
    assert relative_error(found, exact) < (1e-6 if dtype == torch.float32 else 1e-2)
    del narrow["gate"], wide["gate"]
    spread = narrow["x"].new_zeros(shape[0], 2 * shape[1])[:, ::2].copy_(narrow["x"])
    exact = expert_mlp(expert_ids=ids, backend="torch", activation=activation, **wide)  # pyright: ignore
    found = expert_mlp(
        expert_ids=ids,
        backend="triton",
        activation=activation,
        **narrow | {"x": spread},  # pyright: ignore
    )
    assert relative_error(found, exact) < (1e-6 if dtype == torch.float32 else 1e-2)
