"""Norm, loss, router's product, activation, optimizer at the 1.5B model's size, against float64."""

from collections.abc import Callable

import pytest
import torch
from numerics import relative_error
from torch import nn

from blackmamba.ops import (
    AdamWTensors,
    activate,
    adamw_,
    adamw_factors,
    add_rms_norm,
    linear_cross_entropy,
    rms_norm,
    router_logits,
)
from blackmamba.train.mixed import MixedAdamW
from blackmamba.train.muon import Muon

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]
T, M, V = 16_384, 1152, 50_304
BETAS = {"beta1": 0.9, "beta2": 0.95}


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def relative_norm(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("m", [M, 1472])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
def test_norm(stream: torch.dtype, m: int):
    x, update = normal(T, m, dtype=stream), normal(T, m, seed=1)
    weight = 1 + 0.1 * normal(m, dtype=torch.float32, seed=2)
    leaves = [p.requires_grad_() for p in (x, update, weight)]
    outers = normal(T, m, dtype=stream, seed=3), normal(T, m, seed=4)
    outputs = add_rms_norm(x, update, weight, out_dtype=torch.bfloat16)
    grads = torch.autograd.grad(outputs, leaves, outers)
    wide = outputs[0].detach().double().requires_grad_()
    wide_weight = weight.detach().double().requires_grad_()
    y = rms_norm(wide, wide_weight)
    exact = torch.autograd.grad(y, (wide, wide_weight), outers[1].double())
    grad_x = exact[0] + outers[0].double()
    narrow = 2**-8  # one rounding to bfloat16
    assert relative_error(outputs[0], x.detach().double() + update.detach().double()) < narrow
    assert relative_norm(outputs[1], y.detach()) < narrow
    assert relative_norm(grads[0], grad_x) < (narrow if stream == torch.bfloat16 else 1e-6)
    assert relative_norm(grads[1], grad_x) < narrow
    assert relative_norm(grads[2], exact[1]) < 1e-5


@pytest.mark.parametrize("t", [1, T - 3])
def test_loss(t: int):
    x, weight = normal(t, M).requires_grad_(), (0.03 * normal(V, M, seed=1)).requires_grad_()
    labels = torch.randint(0, V, (t,), device="cuda")
    labels[5::7] = -100
    loss = linear_cross_entropy(x, weight, labels)
    grads = torch.autograd.grad(loss / t, (x, weight))
    exact_loss, exact = 0.0, torch.zeros(V, M, device="cuda", dtype=torch.float64)
    wide = weight.detach().double()
    exact_x: list[torch.Tensor] = []
    for part in torch.arange(t, device="cuda").split(512):
        z = (x.detach()[part].double() @ wide.t()).requires_grad_()
        some = torch.nn.functional.cross_entropy(z, labels[part], reduction="sum")
        (g,) = torch.autograd.grad(some / t, z)
        exact_loss += some.item()
        exact_x.append(g @ wide)
        exact += g.t() @ x.detach()[part].double()
    # logits and their gradient are rounded to bfloat16; the sums over tokens and words are not
    assert loss.item() == pytest.approx(exact_loss, rel=1e-3)
    assert relative_norm(grads[0], torch.cat(exact_x)) < 0.01
    assert relative_norm(grads[1], exact) < 0.01
    again = torch.autograd.grad(linear_cross_entropy(x, weight, labels) / t, (x, weight))
    assert all(map(torch.equal, grads, again))


def test_loss_keeps_few_logits():
    x, weight = normal(T, M).requires_grad_(), normal(V, M, seed=1).requires_grad_()
    labels = torch.zeros(T, dtype=torch.int64, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(x, weight, labels).backward()
    # a chunk of logits, the weight's gradient in float32 and bfloat16, x's
    allowed = 2**29 + (4 + 3 * 2) * V * M + 4 * T * M * 2 + 2**26
    assert torch.cuda.max_memory_allocated() - before < allowed < T * V * 2


def test_router_logits():
    x, weight = normal(T, M), normal(8, M, dtype=torch.float32, seed=1) / 30
    leaves = [p.requires_grad_() for p in (x, weight, torch.zeros(8, device="cuda"))]
    outer = normal(T, 8, dtype=torch.float32, seed=2)
    y = router_logits(*leaves)
    grads = torch.autograd.grad(y, leaves, outer)
    wide = [p.detach().double().requires_grad_() for p in leaves]
    exact = router_logits(*wide)
    exact_grads = torch.autograd.grad(exact, wide, outer.double())
    assert relative_norm(y.detach(), exact.detach()) < 1e-5  # matrix units have few guard bits
    for actual, expected, allowed in zip(grads, exact_grads, (2**-8, 1e-5, 1e-5), strict=True):
        assert relative_norm(actual, expected) < allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize(("f", "gated"), [(664, True), (1741, True), (3072, False)])
def test_activation(f: int, gated: bool, activation: str, dtype: torch.dtype):
    h = normal(T, 2 * f if gated else f, dtype=dtype).requires_grad_()
    outer = normal(T, f, dtype=dtype, seed=1)
    y = activate(h, activation, gated, backend="triton")  # pyright: ignore
    (grad,) = torch.autograd.grad(y, h, outer)
    wide = h.detach().double().requires_grad_()
    exact = activate(wide, activation, gated)  # pyright: ignore
    (exact_grad,) = torch.autograd.grad(exact, wide, outer.double())
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    for actual, wanted in ((y, exact), (grad, exact_grad)):
        allowed = rounding * wanted.detach().abs() + 3e-6
        assert ((actual.double() - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("has_master", [True, False])
def test_adamw(has_master: bool):
    shapes = [(8, 6144, 1152), (V, M), (2304, 4), (7,)]
    groups: list[list[AdamWTensors]] = []
    for _ in range(2):
        groups.append([])
        for i, shape in enumerate(shapes):
            p = normal(*shape, dtype=torch.float32, seed=i)
            groups[-1].append(
                AdamWTensors(
                    parameter=p.bfloat16(),
                    gradient=normal(*shape, seed=10 + i),
                    exp_avg=normal(*shape, dtype=torch.float32, seed=20 + i),
                    exp_avg_sq=normal(*shape, dtype=torch.float32, seed=30 + i).square(),
                    master=p if has_master else None,
                    decay=0.1,
                )
            )
    factors = adamw_factors(1e-3, torch.tensor(3, device="cuda"), **BETAS, gradient_scale=0.5)
    for group, backend in zip(groups, ("triton", "reference"), strict=True):
        adamw_(group, factors, **BETAS, eps=1e-8, backend=backend)  # pyright: ignore
    for actual, expected in zip(*groups, strict=True):
        assert relative_error(actual.exp_avg_sq, expected.exp_avg_sq) < 1e-6
        # the same noise, where there is some: but for those on an edge, equal
        assert (actual.parameter == expected.parameter).float().mean() > 0.99
        if actual.master is not None and expected.master is not None:
            assert relative_error(actual.master, expected.master) < 1e-6


@pytest.mark.parametrize("kind", [MixedAdamW, Muon])
def test_parameters_may_be_on_the_host(kind: type[MixedAdamW]):
    def trained(where: str, told: str) -> list[torch.Tensor]:
        ps = [nn.Parameter(normal(6, 5, dtype=torch.float32, seed=i).to(where)) for i in range(2)]
        gradients = {p: torch.ones_like(p) * (1 + i) for i, p in enumerate(ps)}
        groups = [{"params": ps, "weight_decay": 0.1, "is_muons": True}]
        options = {"momentum": 0.9, "scale": "moonlight", "dtype": torch.float32}
        optimizer = kind(groups, 0.02, (0.9, 0.95), 1e-8, {}, **options if kind is Muon else {})
        for scale, go in ((0.5, True), (1.0, False), (0.25, True)):
            told_scale, told_go = torch.tensor(scale, device=told), torch.tensor(go, device=told)
            optimizer.update(gradients, gradient_scale=told_scale, go=told_go)
        return [p.detach().cpu() for p in ps]

    for there, here in zip(trained("cpu", "cuda"), trained("cpu", "cpu"), strict=True):
        assert torch.equal(there, here)
    for there, here in zip(trained("cuda", "cuda"), trained("cpu", "cpu"), strict=True):
        assert relative_error(there, here) < 1e-5


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("run", ["norm", "loss", "router", "adamw", "activation"])
def test_nothing_waits_for_the_device(run: str):
    x, weight = normal(64, M).requires_grad_(), normal(V, M, seed=1).requires_grad_()
    labels = torch.zeros(64, dtype=torch.int64, device="cuda")
    router = normal(8, M, dtype=torch.float32), normal(8, dtype=torch.float32)
    wide = [normal(64, M, dtype=torch.float32) for _ in range(2)]
    step = torch.zeros((), device="cuda")

    def adamw() -> torch.Tensor:
        tensors = AdamWTensors(
            parameter=x.detach(), gradient=x.detach(), exp_avg=wide[0], exp_avg_sq=wide[1]
        )
        adamw_([tensors], adamw_factors(1e-3, step, **BETAS), **BETAS, eps=1e-8)
        return x.sum()

    calls: dict[str, Callable[[], torch.Tensor]] = {
        "norm": lambda: add_rms_norm(x, x, normal(M, dtype=torch.float32))[1].sum(),
        "loss": lambda: linear_cross_entropy(x, weight, labels),
        "router": lambda: router_logits(x, *router).sum(),
        "adamw": adamw,
        "activation": lambda: activate(x, backend="triton").sum(),
    }
    calls[run]().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls[run]().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
