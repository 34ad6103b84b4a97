"""Routed experts: against the definition, whatever the assignment looks like."""

from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_within_budget, relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from blackmamba.errors import InputError
from blackmamba.ops import expert_mlp
from blackmamba.ops.backend import available_backends
from blackmamba.ops.expert_mlp import torch_grouped

BACKENDS = available_backends("expert_mlp")
WIDE_BACKENDS = [name for name in BACKENDS if name != "native"]  # those that take float64
NATIVE = pytest.mark.skipif("native" not in BACKENDS, reason="the extension was not built")
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


@pytest.mark.parametrize("backend", WIDE_BACKENDS)
def test_gradcheck(backend: str):
    tensors, ids = make(5, 3, 2, 3)

    def experts(*args: Tensor):
        named = dict(zip(NAMES, args, strict=True))
        return expert_mlp(expert_ids=ids, **named, backend=backend)  # pyright: ignore

    assert torch.autograd.gradcheck(experts, [tensors[k].requires_grad_() for k in NAMES])


@pytest.mark.parametrize("backend", BACKENDS)
def test_idle_experts_get_zero_gradient(backend: str):
    tensors, _ = make(4, 3, 2, 5, dtype=torch.float32)
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
    ends = torch.tensor([30, 30, 63, 64], dtype=torch.int32)
    results = []
    for product in (torch_grouped._one_call, torch_grouped._call_per_group):
        x, fc1 = (tensors[k].detach().clone().requires_grad_() for k in ("x", "fc1"))
        y = product(x, fc1, ends)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, fc1.grad))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 0.02  # two roundings to 8 bits


@pytest.mark.parametrize("shape", [(2, 6, 3), (2, 8, 8)], ids=str)
def test_one_call_is_for_aligned_rows_on_cuda_only(shape: tuple[int, int, int]):
    e, m, f = shape
    tensors, _ = make(4, m, f, e, dtype=torch.bfloat16)
    on_cuda = Mock(dtype=torch.bfloat16, device=torch.device("cuda"), element_size=lambda: 2)
    weights = tensors["fc1"], tensors["fc2"]
    expected = torch_grouped._one_call if m == 8 else torch_grouped._call_per_group
    assert torch_grouped._product(on_cuda, *weights) is expected
    assert torch_grouped._product(tensors["x"], *weights) is torch_grouped._call_per_group


@pytest.mark.parametrize("frozen", ["x", "fc1", "fc2"])
def test_gradients_beside_a_frozen_input(frozen: str):
    tensors, ids = make(9, 6, 5, 4)
    results = []
    for backend in ("reference", "torch"):
        leaves = {k: v.clone().requires_grad_(k != frozen) for k, v in tensors.items()}
        expert_mlp(expert_ids=ids, **leaves, backend=backend).square().sum().backward()  # pyright: ignore
        results.append({k: v.grad for k, v in leaves.items() if k != frozen})
        assert leaves[frozen].grad is None
    for name in results[0]:
        assert relative_error(results[1][name], results[0][name]) < 1e-12, name


def test_registered_as_torch_wants_it():
    g = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(s, generator=g, requires_grad=True) for s in ((7, 3), (4, 5, 3)))
    left, ends = torch.randn(7, 5, generator=g), torch.tensor([2, 2, 7, 7], dtype=torch.int32)
    torch.library.opcheck(torch.ops.blackmamba.grouped_linear.default, (rows, weight, ends))
    for dtype in (torch.float32, torch.float64):
        torch.library.opcheck(
            torch.ops.blackmamba.grouped_outer.default, (left, rows.detach(), ends, dtype)
        )


@pytest.mark.parametrize("t", [7, 300])
def test_wide_weights_and_their_gradients(t: int):
    """Mixed precision: the products are of bfloat16, the weights and their gradients float32."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(t, 32, generator=g).bfloat16()
    fc1, fc2 = torch.randn(4, 48, 32, generator=g) / 5, torch.randn(4, 32, 24, generator=g) / 5
    ids = torch.randint(0, 3, (t,), generator=g)  # the last expert idles
    found: list[list[torch.Tensor]] = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [
            w.clone().to(torch.promote_types(dtype, w.dtype)).requires_grad_() for w in (fc1, fc2)
        ]
        y = expert_mlp(x.to(dtype), ids, *leaves, backend="torch")
        y.double().square().sum().backward()
        found.append([leaf.grad for leaf in leaves if leaf.grad is not None])
    for wide, exact in zip(*found, strict=True):
        assert wide.dtype == torch.float32
        assert relative_error(wide, exact) < 0.03
        assert not wide[3].any()


# torch 2.13 instantiates autograd functions itself while it traces them
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("t", [1, 9])
def test_compiles_to_one_graph(t: int):
    tensors, ids = make(t, 6, 5, 4, dtype=torch.float32)
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}

    def loss(ids: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        return expert_mlp(expert_ids=ids, **leaves).square().sum()  # pyright: ignore

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(
        torch.autograd.grad(compiled(ids, leaves), list(leaves.values())),
        torch.autograd.grad(loss(ids, leaves), list(leaves.values())),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("t", [1, 9])
def test_fake_tensors_go_through(t: int):
    with FakeTensorMode():
        tensors, ids = make(t, 6, 5, 4)
        assert expert_mlp(expert_ids=ids, **tensors).shape == (t, 6)  # pyright: ignore


def test_unwritten_memory_is_never_read(nan_filled_memory: None):
    tensors, _ = make(9, 6, 5, 4)
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    ids = torch.tensor([1, 1, 3, 1, 3, 3, 1, 1, 1])  # experts 0 and 2 are idle
    y = expert_mlp(expert_ids=ids, **leaves)  # pyright: ignore
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(v.grad is not None and v.grad.isfinite().all() for v in leaves.values())


def test_nan_stays_in_its_token():
    tensors, ids = make(8, 6, 5, 2)
    tensors["x"][3, 0] = torch.nan
    y = expert_mlp(tensors["x"], ids, tensors["fc1"], tensors["fc2"])
    assert y.isnan().any(1).tolist() == [i == 3 for i in range(8)]


def test_bad_input_is_named():
    tensors, ids = make(8, 6, 5, 2)
    x, fc1, fc2 = tensors["x"], tensors["fc1"], tensors["fc2"]
    for wrong in (2, -1):
        with pytest.raises(InputError, match=rf"expert_ids holds {wrong}, must be 0 .. 1"):
            expert_mlp(x, ids.index_fill(0, torch.tensor([3]), wrong), fc1, fc2)
    with pytest.raises(InputError, match=r"expert_ids is torch.int32, must be torch.int64"):
        expert_mlp(x, ids.int(), fc1, fc2)
    with pytest.raises(InputError, match=r"fc2 is torch.int64"):
        expert_mlp(x, ids, fc1, fc2.long())
    with pytest.raises(InputError, match=r"fc2 has shape \(2, 6, 5\), must be \(2, 6, 10\)"):
        expert_mlp(x, ids, fc1, fc2, gated=False)
    with pytest.raises(InputError, match=r"activation='relu'"):
        expert_mlp(x, ids, fc1, fc2, activation="relu")  # pyright: ignore


# ---- the native kernels ----------------------------------------------------------------------


def with_gradients(tensors: dict[str, Tensor], ids: Tensor, backend: str, **options: object):
    leaves = {k: v.detach().clone().requires_grad_() for k, v in tensors.items()}
    y = expert_mlp(expert_ids=ids, **leaves, **options, backend=backend)  # pyright: ignore
    g = torch.Generator().manual_seed(3)
    outer = torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), outer)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


@NATIVE
@settings(max_examples=40, deadline=None)
@given(
    t=st.integers(64, 150),
    m=st.integers(1, 70),
    f=st.integers(1, 70),
    e=st.integers(1, 6),
    assignment=st.sampled_from(["random", "all in one", "some empty"]),
    gated=st.booleans(),
    activation=st.sampled_from(["silu", "gelu"]),
    absent=st.sets(st.sampled_from(["fc1_bias", "fc2_bias", "gate"])),
)
def test_native_matches_float64(
    t: int,
    m: int,
    f: int,
    e: int,
    assignment: str,
    gated: bool,
    activation: str,
    absent: set[str],
):
    tensors, _ = make(t, m, f, 2 * e, gated)
    tensors = {k: v for k, v in tensors.items() if k not in absent}
    ids = assignments(t, 2 * e)[assignment]
    options = {"gated": gated, "activation": activation}
    exact = with_gradients(tensors, ids, "reference", **options)
    narrow = {k: v.float() for k, v in tensors.items()}
    actual = with_gradients(narrow, ids, "native", **options)
    for name, expected in exact.items():
        assert actual[name].dtype == torch.float32
        assert relative_error(actual[name], expected) < 5e-6, name


@NATIVE
@pytest.mark.parametrize("t", [40, 100])  # weights read where they lie, and packed
def test_native_bits_nan_and_unwritten_memory(t: int, nan_filled_memory: None):
    tensors, ids = make(t, 33, 20, 6, dtype=torch.float32)
    ids[ids == 2] = 3  # an idle expert
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(with_gradients(tensors, ids, "native"))
    torch.set_num_threads(1)
    for name, first in results[0].items():
        assert first.isfinite().all(), name
        assert all(torch.equal(first, r[name]) for r in results[1:]), name
    assert results[0]["fc1"][2].count_nonzero() == 0
    tensors["x"][7, 3] = torch.nan
    bad = with_gradients(tensors, ids, "native")
    assert bad["y"].isnan().any(1).nonzero().flatten().tolist() == [7]
    assert bad["x"].isnan().any(1).nonzero().flatten().tolist() == [7]


@NATIVE
@pytest.mark.parametrize("t", [20, 70])
def test_native_is_registered_and_compiles(t: int):
    tensors, ids = make(t, 5, 4, 3, dtype=torch.float32)
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    args = (leaves["x"], ids, *(leaves[k] for k in ("fc1", "fc2", "fc1_bias", "fc2_bias", "gate")))
    torch.library.opcheck(
        torch.ops.blackmamba.expert_mlp.default,
        (*args, True, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    some = [leaves[k].detach() for k in ("x", "fc1", "fc2")]
    twice = (some[0][: t // 2], ids, *some[1:], None, None, None)  # 2 choices a token
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.blackmamba.expert_mlp.default, (*twice, True, True), test_utils=utils
    )

    def loss(leaves: dict[str, Tensor]) -> Tensor:
        return expert_mlp(expert_ids=ids, **leaves, backend="native").square().sum()  # pyright: ignore

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(
        torch.autograd.grad(compiled(leaves), list(leaves.values())),
        torch.autograd.grad(loss(leaves), list(leaves.values())),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "sizes",
    [
        (512,),
        (100, 156, 0, 256),
        (1, 511),
        (511, 1),
        (64, 128, 65, 63, 192),
        (600, 0, 0),
        (600, 2, 3, 1),
    ],
    ids=str,
)
def test_groups_of_bfloat16_rows_in_whole_runs(sizes: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(sizes), 24, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(len(sizes), 40, 24, generator=generator).bfloat16().requires_grad_()
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    grad = torch.randn(sum(sizes), 40, generator=generator).bfloat16()
    out = torch_grouped._call_per_group(rows, weight, ends)
    actual = (out, *torch.autograd.grad(out, (rows, weight), grad))
    parts = zip(rows.double().split(sizes), weight.double(), strict=True)
    expected = torch.cat([r @ w.t() for r, w in parts])
    exact = (expected, *torch.autograd.grad(expected, (rows, weight), grad.double()))
    for a, e in zip(actual, exact, strict=True):
        assert relative_error(a, e) < 4e-3  # half a unit in bfloat16's last place


@pytest.mark.parametrize("t", [1, 5, 41, 100])  # few, between, and many choices
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_experts_a_token_are_added_up(backend: str, t: int):
    tensors, _ = make(t, 8, 8, 5)
    ids = torch.rand(t, 5, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :3]
    gate = torch.rand(t, 3, generator=torch.Generator().manual_seed(3)).double() + 0.1
    tensors["gate"] = gate
    g = torch.randn(t, 8, generator=torch.Generator().manual_seed(4)).double()
    if backend == "triton":  # its own products have no biases
        del tensors["fc1_bias"], tensors["fc2_bias"]

    def run(dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
        leaves = {k: v.to(dtype).requires_grad_() for k, v in tensors.items()}
        y = expert_mlp(expert_ids=ids, **leaves, backend=backend)  # pyright: ignore
        with torch.no_grad():
            still = expert_mlp(expert_ids=ids, **leaves, backend=backend)  # pyright: ignore
        grads = torch.autograd.grad(y, list(leaves.values()), g.to(dtype))
        return {"y": y.detach(), "still": still, **dict(zip(leaves, grads, strict=True))}

    one_by_one = sum(
        expert_mlp(**(tensors | {"gate": gate[:, i]}), expert_ids=ids[:, i], backend="reference")  # pyright: ignore
        for i in range(3)
    )
    exact = run(torch.float64, "reference")
    assert relative_error(exact["y"], one_by_one) < 1e-14  # pyright: ignore
    for name, found in run(torch.float32, backend).items():
        assert relative_error(found, exact[name]) < 1e-5, name
    if backend == "triton":
        eager = run(torch.bfloat16, "reference")
        for name, found in run(torch.bfloat16, backend).items():
            assert_within_budget(name, found, eager[name], exact[name])
