"""The native scan and its single step against float64."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numerics import relative_error
from torch import Tensor

from blackmamba.errors import BackendError
from blackmamba.ops import native, selective_scan, selective_state_update

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="the extension was not built")

PER_TOKEN = ("x", "dt", "B", "C", "z")
OPTIONAL = ("D", "z", "dt_bias", "initial_state", "seq_idx")
# n is cut into runs of 16, 8, 4, 2 and 1 states, d into vectors, l into chunks of 16
STATES = st.sampled_from([1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 64])


def make(
    b: int, l: int, d: int, n: int, dtype: torch.dtype = torch.float32, shift: float = 0.0
) -> dict[str, Tensor]:
    """Inputs by name as a layer has them: x, z and B, C are parts of wider rows."""
    g = torch.Generator().manual_seed(b + l + d + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    x, z = normal(b, l, 2 * d).to(dtype).chunk(2, -1)
    B, C = normal(b, l, 3 + 2 * n).to(dtype)[..., 3:].chunk(2, -1)
    return {
        "x": x,
        "dt": (normal(b, l, d) + shift).to(dtype),
        "A": -torch.exp(2 * normal(d, n)).clamp(max=50),
        "B": B,
        "C": C,
        "D": normal(d),
        "z": z,
        "dt_bias": normal(d),
        "initial_state": normal(b, d, n),
        "seq_idx": (torch.rand(b, l, generator=g) < 0.1).cumsum(1).int(),
    }


def results(
    inputs: dict[str, Tensor], backend: str = "native", dt_softplus: bool = True
) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    wide = backend != "native"
    leaves = {
        k: v if k == "seq_idx" else (v.double() if wide else v).detach().requires_grad_()
        for k, v in inputs.items()
    }
    outputs = selective_scan(**leaves, dt_softplus=dt_softplus, backend=backend)  # pyright: ignore
    g = torch.Generator().manual_seed(3)
    weights = [torch.randn(t.shape, generator=g).to(inputs["x"].dtype).to(t) for t in outputs]
    floating = {k: v for k, v in leaves.items() if k != "seq_idx"}
    grads = torch.autograd.grad(outputs, list(floating.values()), weights)
    return {"y": outputs[0].detach(), "state": outputs[1].detach()} | {
        f"grad_{k}": v for k, v in zip(floating, grads, strict=True)
    }


def check(inputs: dict[str, Tensor], dt_softplus: bool = True) -> None:
    exact = results(inputs, "torch", dt_softplus)
    for name, actual in results(inputs, dt_softplus=dt_softplus).items():
        # bfloat16 is rounded to at the end only
        bound = 1e-5 if actual.dtype == torch.float32 else 2**-8
        assert relative_error(actual, exact[name]) < bound, name


@settings(max_examples=60, derandomize=True)
@given(
    b=st.integers(0, 3),
    l=st.integers(0, 70),
    d=st.integers(1, 70),
    n=STATES,
    narrow=st.booleans(),
    shift=st.sampled_from([-14.0, -2.0, 0.0, 20.0]),
    left_out=st.sets(st.sampled_from(OPTIONAL)),
)
@example(b=1, l=257, d=257, n=16, narrow=False, shift=-2.0, left_out={"seq_idx"})
@example(b=2, l=40, d=17, n=257, narrow=False, shift=0.0, left_out=set())
@example(b=1, l=33, d=1540, n=3, narrow=True, shift=0.0, left_out={"z"})
def test_sweep(b: int, l: int, d: int, n: int, narrow: bool, shift: float, left_out: set[str]):
    inputs = make(b, l, d, n, torch.bfloat16 if narrow else torch.float32, shift)
    check({k: v for k, v in inputs.items() if k not in left_out})


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_state_that_grows(sign: float):
    """Without softplus delta may be negative, and nothing stops A from being positive."""
    inputs = make(2, 20, 19, 6)
    inputs["A"] = sign * inputs["A"].clamp(min=-3)
    inputs["dt"] = 0.1 * inputs["dt"]
    inputs["dt_bias"] = 0.1 * inputs["dt_bias"]
    check(inputs, dt_softplus=False)
    inputs["dt"] = torch.full_like(inputs["dt"], -1000 * sign)
    del inputs["seq_idx"]
    y, _ = selective_scan(**inputs, backend="native")  # pyright: ignore
    assert not y.isfinite().any()


def test_mixed_dtypes():
    inputs = make(2, 9, 5, 4)
    mixed = inputs | {k: inputs[k].bfloat16() for k in ("x", "B")}
    exact = results(mixed, "torch")
    for name, actual in results(mixed).items():
        assert actual.dtype == mixed.get(name.removeprefix("grad_"), mixed["x"]).dtype or (
            name == "state"
        )
        assert relative_error(actual, exact[name]) < (
            1e-5 if actual.dtype == torch.float32 else 2**-8
        ), name


@pytest.mark.parametrize("shape", [(1, 50, 40, 16), (3, 33, 300, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(dtype: torch.dtype, shape: tuple[int, int, int, int]):
    inputs = make(*shape, dtype=dtype)
    found: list[dict[str, Tensor]] = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(results(inputs))
    torch.set_num_threads(1)
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [*PER_TOKEN, "A", "D", "dt_bias", "initial_state"])
def test_nan_and_infinity_come_out(name: str, poison: float):
    inputs = make(2, 40, 21, 5)
    del inputs["seq_idx"]
    inputs = {k: v.clone() for k, v in inputs.items()}
    inputs[name].view(-1)[3] = poison
    silent = (name in ("dt", "dt_bias", "A") and poison == -torch.inf) or (
        name == "z" and poison == -torch.inf
    )
    found = results(inputs)
    if not silent:  # where the limit is finite: softplus(-inf) = 0, exp(-inf) = 0
        assert not all(v.isfinite().all() for v in found.values())
    if name in (*PER_TOKEN, "initial_state"):  # the other row of the batch
        assert found["y"][1].isfinite().all()
        assert found["state"][1].isfinite().all()
        assert found["grad_x"][1].isfinite().all()


@pytest.mark.parametrize("left_out", [(), OPTIONAL], ids=["all", "none"])
def test_registered_as_torch_wants_it(left_out: tuple[str, ...]):
    inputs = make(2, 19, 5, 3)
    args = [
        None if k in left_out else v if k == "seq_idx" else v.requires_grad_()
        for k, v in ((k, v.long() if k == "seq_idx" else v.clone()) for k, v in inputs.items())
    ]
    torch.library.opcheck(torch.ops.blackmamba.selective_scan_native.default, (*args, True, True))
    step = [v.detach()[:, 0] if k in PER_TOKEN else v for k, v in inputs.items()][:-2]
    torch.library.opcheck(
        torch.ops.blackmamba.selective_state_update_native.default,
        (inputs["initial_state"], *step, True),
    )


def test_compiles_to_one_graph():
    inputs = make(2, 19, 5, 3)
    for with_documents in (True, False):
        kept = {k: v for k, v in inputs.items() if with_documents or k != "seq_idx"}

        def scan(leaves: dict[str, Tensor]) -> Tensor:
            y, state = selective_scan(**leaves, dt_softplus=True)  # pyright: ignore
            return y.sum() + state.square().sum()

        compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
        leaves = {k: v if k == "seq_idx" else v.clone().requires_grad_() for k, v in kept.items()}
        wanted = [v for v in leaves.values() if v.requires_grad]
        for actual, expected in zip(
            torch.autograd.grad(compiled(leaves), wanted),
            torch.autograd.grad(scan(leaves), wanted),
            strict=True,
        ):
            assert torch.equal(actual, expected)


# ---- one token -----------------------------------------------------------------------------------


def token(
    b: int, d: int, n: int, dtype: torch.dtype = torch.float32, shift: float = 0.0
) -> dict[str, Tensor]:
    inputs = make(b, 2, d, n, dtype, shift)
    inputs["state"] = inputs.pop("initial_state")
    del inputs["seq_idx"]
    return {k: v[:, 1] if k in PER_TOKEN else v for k, v in inputs.items()}


@settings(max_examples=40, derandomize=True)
@given(
    b=st.integers(0, 5),
    d=st.integers(1, 300),
    n=STATES,
    narrow=st.booleans(),
    softplus=st.booleans(),
    shift=st.sampled_from([-14.0, 0.0, 20.0]),
    left_out=st.sets(st.sampled_from(["D", "z", "dt_bias"])),
)
@example(b=1, d=1536, n=257, narrow=False, softplus=True, shift=0.0, left_out=set())
def test_one_token(
    b: int, d: int, n: int, narrow: bool, softplus: bool, shift: float, left_out: set[str]
):
    inputs = token(b, d, n, torch.bfloat16 if narrow else torch.float32, shift)
    if not softplus:
        inputs |= {"dt": inputs["dt"].abs(), "dt_bias": inputs["dt_bias"].abs()}
    inputs = {k: v for k, v in inputs.items() if k not in left_out}
    before = inputs["state"].clone()
    wide = {k: v.double() for k, v in inputs.items()}
    actual, exact = (
        selective_state_update(**i, dt_softplus=softplus, backend=backend)  # pyright: ignore
        for i, backend in ((inputs, "native"), (wide, "reference"))
    )
    assert relative_error(actual[0], exact[0]) < (2**-8 if narrow else 3e-6)
    assert relative_error(actual[1], exact[1]) < 3e-6
    assert actual[0].dtype == inputs["x"].dtype
    assert torch.equal(inputs["state"], before)


def test_one_token_of_every_row_and_thread_is_the_same():
    inputs = token(4, 600, 16)
    y, state = selective_state_update(**inputs, dt_softplus=True, backend="native")
    for row in range(4):
        alone = {
            k: v[row : row + 1] if k in (*PER_TOKEN, "state") else v for k, v in inputs.items()
        }
        torch.set_num_threads(2)
        y_row, state_row = selective_state_update(**alone, dt_softplus=True, backend="native")
        torch.set_num_threads(1)
        assert torch.equal(y[row], y_row[0])
        assert torch.equal(state[row], state_row[0])


def test_one_token_has_no_gradient():
    inputs = token(2, 5, 3)
    inputs["D"].requires_grad_()
    with pytest.raises(BackendError, match=r"native.*no gradient.*torch\.no_grad"):
        selective_state_update(**inputs, backend="native")
    y, _ = selective_state_update(**inputs)  # the reference
    assert y.requires_grad
    with torch.no_grad():
        again, _ = selective_state_update(**inputs, backend="native")
    torch.testing.assert_close(again, y.detach())


def test_one_token_compiles_to_one_graph():
    inputs = token(2, 5, 3)
    compiled = torch.compile(selective_state_update, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(**inputs), selective_state_update(**inputs), strict=True):
        assert torch.equal(actual, expected)
