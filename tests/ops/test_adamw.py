"""One step of AdamW: its definition against torch's own, its kernel against the definition."""

import dataclasses

import pytest
import torch
from numerics import largest_difference, relative_error

from blackmamba.errors import BackendError, InputError
from blackmamba.ops import AdamWTensors, adamw_, adamw_factors, global_norm, gpu, native
from blackmamba.ops.adamw.reference import stochastic_bfloat16

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BETAS = {"beta1": 0.9, "beta2": 0.95}
SHAPES = [(1,), (3, 5), (1025,), (40, 129), (0, 4)]
TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing())),
)
NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(
        native.missing() is not None or DEVICE != "cpu", reason=f"{native.missing()}, or a GPU"
    ),
)
KERNELS = [NATIVE, TRITON]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def tensors(dtype: torch.dtype, gradient: torch.dtype, has_master: bool) -> list[AdamWTensors]:
    found: list[AdamWTensors] = []
    for i, shape in enumerate(SHAPES):
        wide = normal(*shape, seed=i)
        found.append(
            AdamWTensors(
                parameter=wide.to(dtype, copy=True),
                gradient=normal(*shape, seed=i + 10).to(gradient),
                exp_avg=normal(*shape, seed=i + 20),
                exp_avg_sq=normal(*shape, seed=i + 30).square(),
                master=wide if has_master else None,
                decay=0.1 * (i % 2),
            )
        )
    return found


def copied(group: list[AdamWTensors]) -> list[AdamWTensors]:
    return [
        AdamWTensors(
            **{
                f.name: v.clone() if isinstance(v := getattr(t, f.name), torch.Tensor) else v
                for f in dataclasses.fields(t)
            }
        )
        for t in group
    ]


def factors(step: int, **options: object) -> torch.Tensor:
    return adamw_factors(1e-2, torch.tensor(step, device=DEVICE), **BETAS, **options)  # pyright: ignore


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_is_torchs_adamw(backend: str):
    group = tensors(torch.float32, torch.float32, False)
    for t in group:
        t.exp_avg.zero_()
        t.exp_avg_sq.zero_()
    theirs = [t.parameter.clone().requires_grad_() for t in group]
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": t.decay} for p, t in zip(theirs, group, strict=True)],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    for step in range(3):
        for i, (p, t) in enumerate(zip(theirs, group, strict=True)):
            t.gradient.copy_(normal(*t.gradient.shape, seed=100 * step + i))
            p.grad = t.gradient / 2
        optimizer.step()
        adamw_(group, factors(step, gradient_scale=0.5), **BETAS, eps=1e-8, backend=backend)  # pyright: ignore
    for p, t in zip(theirs, group, strict=True):
        assert relative_error(t.parameter, p.detach()) < 1e-6
        assert relative_error(t.exp_avg_sq, optimizer.state[p]["exp_avg_sq"]) < 1e-6


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("has_master", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_is_the_definition(
    dtype: torch.dtype, gradient: torch.dtype, has_master: bool, backend: str
):
    if dtype == torch.float16 and not has_master:
        with pytest.raises(InputError, match="a float16 parameter needs a master"):
            adamw_(tensors(dtype, gradient, False), factors(3), **BETAS, eps=1e-8)
        return
    if dtype == torch.float16 and backend == "native":
        with pytest.raises(BackendError, match="it takes float32 and bfloat16"):
            adamw_(tensors(dtype, gradient, True), factors(3), **BETAS, eps=1e-8, backend="native")
        return
    expected = tensors(dtype, gradient, has_master)
    actual, again = copied(expected), copied(expected)
    adamw_(expected, factors(3), **BETAS, eps=1e-8, backend="reference")
    adamw_(actual, factors(3), **BETAS, eps=1e-8, backend=backend)  # pyright: ignore
    adamw_(again, factors(3), **BETAS, eps=1e-8, backend=backend)  # pyright: ignore
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for a, b, e in zip(actual, again, expected, strict=True):
        assert torch.equal(a.parameter, b.parameter)
        # a kernel's multiply-add rounds once, the definition's twice
        assert relative_error(a.exp_avg, e.exp_avg) < 1e-6
        assert relative_error(a.exp_avg_sq, e.exp_avg_sq) < 1e-6
        assert relative_error(a.parameter, e.parameter) < rounding
        if a.master is not None and e.master is not None:
            assert relative_error(a.master, e.master) < 1e-6
        elif dtype == torch.bfloat16 and a.parameter.numel() > 1000:
            # the same noise: all but those on an edge go the same way
            assert (a.parameter == e.parameter).float().mean() > 0.99


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_nothing_changes_without_go(backend: str):
    for has_master in (True, False):
        group = tensors(torch.bfloat16, torch.bfloat16, has_master)
        before = copied(group)
        for t in group:
            t.gradient.fill_(torch.nan)
        go = torch.tensor(False, device=DEVICE)
        adamw_(group, factors(3, go=go), **BETAS, eps=1e-8, backend=backend)  # pyright: ignore
        for t, b in zip(group, before, strict=True):
            for name in ("parameter", "exp_avg", "exp_avg_sq"):
                assert torch.equal(getattr(t, name), getattr(b, name))
            if t.master is not None and b.master is not None:
                assert torch.equal(t.master, b.master)


def test_stochastic_rounding_is_right_on_average():
    x = torch.full((4096,), 1 + 2**-7 / 4)  # a quarter of the way from 1 to the next
    for seed in (1, 2):
        rounded = stochastic_bfloat16(x, torch.tensor(seed), 0).float()
        assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
        # a binomial of 4,096 draws: five standard deviations are 0.034
        assert abs((rounded > 1).float().mean().item() - 0.25) < 0.034
    a, b = (stochastic_bfloat16(x, torch.tensor(1), i) for i in (0, 1))
    assert not torch.equal(a, b)
    exact = torch.tensor([0.0, -2.0, 1.5])
    assert torch.equal(stochastic_bfloat16(exact, torch.tensor(7), 3).float(), exact)


def test_small_updates_add_up_without_a_master():
    """1 - 100 * 1e-4 is out of reach of a bfloat16 that rounds to the nearest each time."""
    shape = (4096,)
    t = AdamWTensors(
        parameter=torch.ones(shape, dtype=torch.bfloat16),
        gradient=torch.ones(shape),
        exp_avg=torch.zeros(shape),
        exp_avg_sq=torch.zeros(shape),
    )
    for step in range(100):
        f = adamw_factors(1e-4, torch.tensor(step), **BETAS)
        adamw_([t], f, **BETAS, eps=1e-8, backend="reference")
    # each number's way is a random walk of steps of 2^-8, of which there are 2.6 on average
    assert abs(t.parameter.float().mean().item() - 0.99) < 5 * 2**-8 * 2.6**0.5 / 64


def test_bad_input_is_named():
    t = tensors(torch.bfloat16, torch.bfloat16, True)[1]
    for wrong, message in (
        ({"gradient": normal(2)}, r"gradient has shape \(2,\)"),
        ({"exp_avg": t.exp_avg.bfloat16()}, r"exp_avg is torch.bfloat16, must be torch.float32"),
        ({"master": normal(5, 3).t()}, "master is not contiguous"),
    ):
        with pytest.raises(InputError, match=message):
            adamw_([dataclasses.replace(t, **wrong)], factors(0), **BETAS, eps=1e-8)
    with pytest.raises(InputError, match=r"factors of shape \(3,\)"):
        adamw_([t], torch.zeros(3), **BETAS, eps=1e-8)
    assert largest_difference(factors(0)[4], torch.tensor(1.0)) == 0


@pytest.mark.parametrize("backend", KERNELS)
def test_tensors_that_begin_anywhere(backend: str):
    room = [normal(40) for _ in range(4)]
    t = AdamWTensors(
        parameter=room[0][1:34],
        gradient=room[1][3:36],
        exp_avg=room[2][2:35],
        exp_avg_sq=room[3].square_()[5:38],
    )
    (expected,) = copied([t])
    adamw_([expected], factors(1), **BETAS, eps=1e-8, backend="reference")
    adamw_([t], factors(1), **BETAS, eps=1e-8, backend=backend)  # pyright: ignore
    assert relative_error(t.parameter, expected.parameter) < 1e-6


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_global_norm(backend: str):
    wide = [normal(*shape, seed=i) for i, shape in enumerate([*SHAPES, (9000,)])]
    mixed = [t.bfloat16() if i % 2 else t for i, t in enumerate(wide)] + [wide[2][3:]]
    exact = torch.cat([t.double().flatten() for t in mixed]).norm()
    found = global_norm(mixed, backend=backend)  # pyright: ignore
    assert found.dtype == torch.float32
    assert abs(found.item() / exact.item() - 1) < 1e-6
    mixed[1][0, 0] = torch.inf
    assert not global_norm(mixed, backend=backend).isfinite()  # pyright: ignore
    with pytest.raises(InputError, match="tensors is empty"):
        global_norm([], backend=backend)  # pyright: ignore
