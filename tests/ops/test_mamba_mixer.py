"""A Mamba layer's inner part: one operation against its pieces."""

import pytest
import torch
from numerics import assert_within_budget, relative_error
from torch import Tensor

from blackmamba.errors import InputError
from blackmamba.ops import causal_conv1d, gpu, mamba_mixer, native, selective_scan
from blackmamba.ops.mamba_mixer import gpu as mixer_gpu
from blackmamba.ops.mamba_mixer import whole

TRITON = pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))
NATIVE = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
BOTH = pytest.mark.parametrize(
    "backend", [pytest.param("native", marks=NATIVE), pytest.param("triton", marks=TRITON)]
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("xz", "conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A", "D")


def device_of(backend: str) -> str:
    """The native kernels are the CPU's, also where there is a GPU."""
    return "cpu" if backend == "native" else DEVICE


def make(
    b: int,
    l: int,
    d: int,
    n: int,
    r: int,
    dtype: torch.dtype = torch.float64,
    device: str = DEVICE,
):
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    inputs = {
        "xz": normal(b, l, 2 * d),
        "conv_weight": normal(d, 4),
        "conv_bias": normal(d),
        "x_proj": normal(r + 2 * n, d) / d**0.5,
        "dt_proj": normal(d, r) / r**0.5,
        "dt_bias": normal(d) - 2,
        "A": -torch.exp(normal(d, n)),
        "D": normal(d),
    }
    wide = torch.promote_types(dtype, torch.float32)
    kept = ("dt_bias", "A", "D")
    return {k: v.to(device, wide if k in kept else dtype) for k, v in inputs.items()}


def with_gradients(
    inputs: dict[str, Tensor], backend: str, seq_idx: Tensor | None = None, final: bool = True
) -> dict[str, Tensor]:
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    y, state = mamba_mixer(**leaves, seq_idx=seq_idx, backend=backend)  # pyright: ignore
    g = torch.Generator().manual_seed(7)
    wy, ws = (torch.randn(t.shape, generator=g, dtype=torch.float64).to(t) for t in (y, state))
    ((y * wy).sum() + (state * ws).sum() * final).backward()
    grads = {f"grad_{k}": v.grad for k, v in leaves.items() if v.grad is not None}
    return {"y": y.detach(), "state": state.detach()} | grads


@BOTH
@pytest.mark.parametrize("marked", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 21, 18, 4, 3)], ids=str)
def test_float32_is_near_float64(shape: tuple[int, int, int, int, int], marked: bool, backend: str):
    b, l, *_ = shape
    device = device_of(backend)
    seq_idx = (torch.arange(l, device=device) // 5).expand(b, l) if marked else None
    exact = with_gradients(make(*shape, device=device), "reference", seq_idx)
    inputs = make(*shape, dtype=torch.float32, device=device)
    actual = with_gradients(inputs, backend, seq_idx)
    assert actual.keys() == exact.keys()
    for name in exact:
        assert relative_error(actual[name], exact[name]) < 1e-5, name  # through two products


@NATIVE
def test_large_products_are_by_our_kernels_with_the_same_bits_on_any_number_of_threads():
    """Float32 products of this size are, also the one that adds to the scan's gradient."""
    shape, seen = (1, 130, 384, 5, 24), []
    exact = with_gradients(make(*shape, device="cpu"), "reference")
    threads = torch.get_num_threads()
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            inputs = make(*shape, dtype=torch.float32, device="cpu")
            seen.append(with_gradients(inputs, "native"))
    finally:
        torch.set_num_threads(threads)
    for name in exact:
        assert relative_error(seen[0][name], exact[name]) < 1e-5, name
        assert torch.equal(seen[0][name], seen[1][name]), name


@NATIVE
@pytest.mark.parametrize("marked", [False, True], ids=["", "documents"])
def test_one_call_gives_the_bits_of_its_pieces(marked: bool, nan_filled_memory: None):
    """What is computed again goes by its pieces; rows of xz and of y's gradient lie apart."""
    inputs = make(2, 65, 392, 5, 24, dtype=torch.float32, device="cpu")
    inputs["xz"] = torch.cat((inputs["xz"], inputs["xz"][..., :3]), dim=2)[..., : 2 * 392]
    weights = tuple(inputs[name] for name in NAMES[1:])
    assert whole.fits(inputs["xz"], weights)
    assert not whole.fits(inputs["xz"][:1, :47], weights)
    assert not whole.fits(inputs["xz"], (*weights[:-1], weights[-1].double()))
    seq_idx = (torch.arange(65) // 9).expand(2, 65) if marked else None
    found: list[list[Tensor]] = []
    for recompute in (False, True):
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
        y, state = mamba_mixer(**leaves, seq_idx=seq_idx, recompute=recompute, backend="native")  # pyright: ignore
        wide = torch.cat((y, y), dim=2)[..., 100 : 100 + 392].square().sum() + state.sum()
        found.append([y.detach(), state.detach(), *torch.autograd.grad(wide, [*leaves.values()])])
    assert all(map(torch.equal, *found))


INTERPRETED = pytest.mark.skipif(
    gpu.interpreted(), reason="the interpreter cuts to bfloat16, it does not round"
)


@pytest.mark.parametrize(
    "backend",
    [pytest.param("native", marks=NATIVE), pytest.param("triton", marks=[TRITON, INTERPRETED])],
)
def test_bfloat16_is_as_near_as_plain_pytorch(backend: str):
    # enough that the worst of each are alike
    narrow = make(2, 67, 24, 8, 6, torch.bfloat16, device_of(backend))
    exact = with_gradients({k: v.double() for k, v in narrow.items()}, "reference")
    eager, actual = (with_gradients(narrow, which) for which in ("reference", backend))
    for name in exact:
        assert_within_budget(name, actual[name], eager[name], exact[name])


@BOTH
def test_empty_and_one_output(backend: str):
    for shape in ((0, 5, 3, 4, 2), (2, 0, 3, 4, 2)):
        inputs = make(*shape, dtype=torch.float32, device=device_of(backend))
        actual = with_gradients(inputs, backend)
        assert actual["y"].shape == shape[:3]
        assert all(not v.any() for k, v in actual.items() if k.startswith("grad_"))
    inputs = make(1, 5, 3, 4, 2, device=device_of(backend))
    exact = with_gradients(inputs, "reference", final=False)
    leaves = {k: v.float().requires_grad_() for k, v in inputs.items()}
    y, _ = mamba_mixer(**leaves, backend=backend)  # pyright: ignore
    g = torch.Generator().manual_seed(7)
    (y * torch.randn(y.shape, generator=g, dtype=torch.float64).to(y)).sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert relative_error(leaf.grad, exact[f"grad_{name}"]) < 1e-5, name


@BOTH
def test_unwritten_memory_is_never_read(nan_filled_memory: None, backend: str):
    inputs = make(2, 9, 5, 3, 2, torch.float32, device_of(backend))
    for name, value in with_gradients(inputs, backend).items():
        assert value.isfinite().all(), name


@TRITON
def test_registered_as_torch_wants_it():
    inputs = [v.requires_grad_() for v in make(1, 5, 3, 4, 2, torch.float32).values()]
    torch.library.opcheck(torch.ops.blackmamba.mamba_mixer.default, (*inputs, None, True, True))


def test_bad_input_is_named():
    inputs = make(2, 5, 3, 4, 2)
    with pytest.raises(InputError, match=r"xz has shape \(2, 5, 5\), must be \(2, 5, 6\)"):
        mamba_mixer(**inputs | {"xz": inputs["xz"][..., :5]})  # pyright: ignore
    with pytest.raises(InputError, match=r"seq_idx is torch.float64, must be an integer dtype"):
        mamba_mixer(**inputs, seq_idx=inputs["xz"][..., 0])  # pyright: ignore


@pytest.mark.parametrize(
    "backend",
    [
        "reference",
        pytest.param("native", marks=NATIVE),
        pytest.param("triton", marks=TRITON),
    ],
)
def test_recomputing_changes_no_bit(backend: str):
    inputs = make(2, 21, 18, 4, 3, dtype=torch.float32, device=device_of(backend))
    results: list[list[Tensor]] = []
    for recompute in (False, True):
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        y, _ = mamba_mixer(**leaves, recompute=recompute, backend=backend)  # pyright: ignore
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [*leaves.values()])])
    assert all(map(torch.equal, *results))


def of_prompt(
    inputs: dict[str, Tensor], before: Tensor | None, first: Tensor | None, lengths: Tensor | None
) -> list[Tensor]:
    """What `mamba_mixer_of_prompt` means, by the operations' references."""
    r, n = inputs["dt_proj"].shape[1], inputs["A"].shape[1]
    x, z = inputs["xz"].chunk(2, dim=-1)
    x, last = causal_conv1d(
        x, inputs["conv_weight"], inputs["conv_bias"], initial_state=before, lengths=lengths,
        backend="reference",
    )  # fmt: skip
    low, B, C = (x @ inputs["x_proj"].t()).split((r, n, n), dim=-1)
    dt = low @ inputs["dt_proj"].t()
    if lengths is not None:
        pad = torch.arange(x.shape[1], device=DEVICE) >= lengths[:, None]
        dt = dt.masked_fill(pad[:, :, None], -torch.inf)
    y, state = selective_scan(
        x, dt, inputs["A"], B, C, inputs["D"], z, dt_bias=inputs["dt_bias"], dt_softplus=True,
        initial_state=first, backend="reference",
    )  # fmt: skip
    return [y if lengths is None else y.masked_fill(pad[:, :, None], 0), last, state]


@TRITON
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize(
    ("shape", "goes_on", "lengths"),
    [
        ((1, 1, 8, 5, 1), False, None),
        ((1, 16, 24, 8, 20), True, None),
        ((2, 17, 24, 16, 18), True, [17, 1]),
        ((2, 5, 8, 9, 16), False, [0, 5]),
    ],
    ids=str,
)
def test_a_prompt_is_read_as_the_operations_read_it(
    shape: tuple[int, ...], goes_on: bool, lengths: list[int] | None
):
    b, _, d, n, _ = shape
    inputs, g = make(*shape), torch.Generator().manual_seed(3)
    before = torch.randn(b, d, 3, generator=g, dtype=torch.float64).to(DEVICE)
    first = torch.randn(b, d, n, generator=g, dtype=torch.float64).to(DEVICE)
    counts = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    memory = (before, first) if goes_on else (None, None)
    exact = of_prompt(inputs, *memory, counts)
    narrow = {name: tensor.float() for name, tensor in inputs.items()}
    weights = mixer_gpu.PromptWeights.of(
        *(narrow[name] for name in NAMES[1:]),
        dtype=torch.float32,  # pyright: ignore
    )
    memory = (before.float(), first.float()) if goes_on else (None, None)
    found = [*mixer_gpu.mamba_mixer_of_prompt(narrow["xz"], weights, *memory, counts)]
    if counts is not None:
        pad = torch.arange(shape[1], device=DEVICE) >= counts[:, None]
        found[0] = found[0].masked_fill(pad[:, :, None], 0)
    for name, actual, expected in zip(("y", "last", "state"), found, exact, strict=True):
        assert relative_error(actual, expected) < 1e-5, name
