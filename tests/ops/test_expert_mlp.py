"""Routed experts: against the definition, whatever the assignment looks like."""

import pytest
import torch
from numerics import assert_within_budget, relative_error
from torch import Tensor

from blackmamba.errors import InputError
from blackmamba.ops import expert_mlp
from blackmamba.ops.expert_mlp import _IMPLEMENTATIONS, torch_grouped

BACKENDS = list(_IMPLEMENTATIONS)
NAMES = ("x", "fc1", "fc2", "fc1_bias", "fc2_bias", "gate")


def make(t: int, m: int, f: int, e: int, gated: bool = True, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(0)
    rows = 2 * f if gated else f
    shapes = {
        "x": (t, m),
        "fc1": (e, rows, m),
        "fc2": (e, m, f),
        "fc1_bias": (e, rows),
        "fc2_bias": (e, m),
        "gate": (t,),
    }
    tensors = {
        k: torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for k, s in shapes.items()
    }
    return tensors, torch.randint(0, e, (t,), generator=g)


def assignments(t: int, e: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "random": torch.randint(0, e, (t,), generator=g),
        "all in one": torch.full((t,), e - 1),
        "some empty": 2 * torch.randint(0, e // 2, (t,), generator=g),
    }


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("assignment", ["random", "all in one", "some empty"])
@pytest.mark.parametrize("t", [1, 2, 3, 63, 64, 65, 1000])
def test_grouped_matches_the_reference(t: int, assignment: str, gated: bool, activation: str):
    tensors, _ = make(t, 6, 5, 4, gated)
    ids = assignments(t, 4)[assignment]
    options = {"gated": gated, "activation": activation}
    results = []
    for backend in ("reference", "torch"):
        leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
        y = expert_mlp(expert_ids=ids, **leaves, **options, backend=backend)  # pyright: ignore
        y.square().sum().backward()
        results.append({"y": y.detach()} | {k: v.grad for k, v in leaves.items()})
    for name in results[0]:
        assert relative_error(results[1][name], results[0][name]) < 1e-12, name
    narrow = {k: v.float() for k, v in tensors.items()}
    y = expert_mlp(expert_ids=ids, **narrow, **options)  # pyright: ignore
    assert relative_error(y, results[0]["y"]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str):
    tensors, ids = make(5, 3, 2, 3)

    def experts(*args: Tensor):
        named = dict(zip(NAMES, args, strict=True))
        return expert_mlp(expert_ids=ids, **named, backend=backend)  # pyright: ignore

    assert torch.autograd.gradcheck(experts, [tensors[k].requires_grad_() for k in NAMES])


@pytest.mark.parametrize("backend", BACKENDS)
def test_idle_experts_get_zero_gradient(backend: str):
    tensors, _ = make(4, 3, 2, 5)
    fc1 = tensors["fc1"].requires_grad_()
    ids = torch.tensor([1, 1, 3, 1])
    expert_mlp(tensors["x"], ids, fc1, tensors["fc2"], backend=backend).sum().backward()  # pyright: ignore
    assert fc1.grad is not None
    used = fc1.grad.abs().sum((1, 2)) > 0
    assert used.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_as_near_as_plain_pytorch(backend: str):
    tensors, ids = make(33, 16, 12, 4, dtype=torch.bfloat16)
    exact = expert_mlp(
        expert_ids=ids, **{k: v.double() for k, v in tensors.items()}, backend="reference"
    )  # pyright: ignore
    eager = expert_mlp(expert_ids=ids, **tensors, backend="reference")  # pyright: ignore
    actual = expert_mlp(expert_ids=ids, **tensors, backend=backend)  # pyright: ignore
    assert_within_budget("y", actual, eager, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wider_weights_are_cast_and_their_gradients_are_wide(backend: str):
    tensors, ids = make(9, 6, 5, 4, dtype=torch.float32)
    fc1 = tensors["fc1"].requires_grad_()
    x = tensors["x"].bfloat16()
    y = expert_mlp(x, ids, fc1, tensors["fc2"], gate=tensors["gate"], backend=backend)  # pyright: ignore
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert fc1.grad is not None
    assert fc1.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_permuted_tokens_and_the_same_bits(backend: str):
    tensors, ids = make(40, 6, 5, 4, dtype=torch.float32)
    x, fc1, fc2 = tensors["x"], tensors["fc1"], tensors["fc2"]
    empty = expert_mlp(x[:0], ids[:0], fc1, fc2, backend=backend)  # pyright: ignore
    assert empty.shape == (0, 6)
    y = expert_mlp(x, ids, fc1, fc2, backend=backend)  # pyright: ignore
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    shuffled = expert_mlp(x[order], ids[order], fc1, fc2, backend=backend)  # pyright: ignore
    torch.testing.assert_close(shuffled, y[order])
    assert torch.equal(y, expert_mlp(x, ids, fc1, fc2, backend=backend))  # pyright: ignore


def test_torchs_grouped_product_does_the_same():
    """What CUDA runs; torch has it on the CPU too."""
    tensors, _ = make(64, 32, 16, 4, dtype=torch.bfloat16)
    counts = torch.tensor([30, 0, 33, 1])
    results = []
    for product in (torch_grouped._one_call(counts), torch_grouped._call_per_group(counts)):
        x, fc1 = (tensors[k].detach().clone().requires_grad_() for k in ("x", "fc1"))
        y = product(x, fc1)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, fc1.grad))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 0.02  # two roundings to 8 bits


def test_nan_stays_in_its_token():
    tensors, ids = make(8, 6, 5, 2)
    tensors["x"][3, 0] = torch.nan
    y = expert_mlp(tensors["x"], ids, tensors["fc1"], tensors["fc2"])
    assert y.isnan().any(1).tolist() == [i == 3 for i in range(8)]


def test_bad_input_is_named():
    tensors, ids = make(8, 6, 5, 2)
    x, fc1, fc2 = tensors["x"], tensors["fc1"], tensors["fc2"]
    with pytest.raises(InputError, match=r"expert_ids holds 0 .. 2, must be 0 .. 1"):
        expert_mlp(x, ids.clone().fill_(2).index_fill(0, torch.tensor([0]), 0), fc1, fc2)
    with pytest.raises(InputError, match=r"fc2 has shape \(2, 6, 5\), must be \(2, 6, 10\)"):
        expert_mlp(x, ids, fc1, fc2, gated=False)
    with pytest.raises(InputError, match=r"activation='relu'"):
        expert_mlp(x, ids, fc1, fc2, activation="relu")  # pyright: ignore
