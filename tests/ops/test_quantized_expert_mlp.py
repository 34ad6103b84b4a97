"""Routed experts in 8 and 4 bits: against `expert_mlp` with the matrices written out."""

import pytest
import torch
from numerics import relative_error
from torch import Tensor

from blackmamba.errors import InputError
from blackmamba.ops import (
    dequantize,
    expert_mlp,
    frozen_expert_mlp,
    quantize_weight,
    quantized_expert_mlp,
)
from blackmamba.ops.backend import available_backends

BACKENDS = available_backends("quantized_expert_mlp")


def make(t: int, m: int, f: int, e: int, gated: bool, bits: int):
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    rows = 2 * f if gated else f
    fc1, fc2 = (quantize_weight(normal(*s), bits, 32) for s in ((e, rows, m), (e, m, f)))
    extras = {"fc1_bias": normal(e, rows), "fc2_bias": normal(e, m), "gate": normal(t)}
    return normal(t, m), torch.randint(0, e, (t,), generator=g), fc1, fc2, extras


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("t", [0, 1, 2, 17, 200])
def test_matches_the_experts_written_out(
    t: int, bits: int, gated: bool, activation: str, backend: str
):
    x, ids, fc1, fc2, extras = make(t, 40, 33, 4, gated, bits)
    assignments = (ids, torch.full((t,), 3), 2 * (ids // 2)) if t else (ids,)
    for chosen in assignments:
        for more in ({}, extras):
            options = {"activation": activation, "gated": gated, "backend": backend, **more}
            y = quantized_expert_mlp(x, chosen, fc1, fc2, **options)  # pyright: ignore
            exact = expert_mlp(
                x.double(),
                chosen,
                dequantize(fc1, torch.float64),
                dequantize(fc2, torch.float64),
                **(options | {"backend": "reference"} | {k: v.double() for k, v in more.items()}),
            )  # pyright: ignore
            assert y.shape == x.shape
            assert relative_error(y, exact) < 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_and_a_row_on_its_own(backend: str):
    x, ids, fc1, fc2, extras = make(9, 40, 33, 4, True, 8)
    exact = quantized_expert_mlp(x.double(), ids, fc1, fc2, gate=extras["gate"].double())
    narrow = quantized_expert_mlp(
        x.bfloat16(),
        ids,
        fc1,
        fc2,
        gate=extras["gate"],
        backend=backend,  # pyright: ignore
    )
    assert narrow.dtype == torch.bfloat16
    assert relative_error(narrow, exact) < 0.02  # roundings to 8 bits
    whole = quantized_expert_mlp(x, ids, fc1, fc2, backend=backend)  # pyright: ignore
    for row in range(9):
        part = slice(row, row + 1)
        alone = quantized_expert_mlp(x[part], ids[part], fc1, fc2, backend=backend)  # pyright: ignore
        assert relative_error(alone, whole[part]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_token(backend: str):
    x, ids, fc1, fc2, _ = make(8, 40, 33, 2, True, 8)
    x[3, 0] = torch.nan
    y = quantized_expert_mlp(x, ids, fc1, fc2, backend=backend)  # pyright: ignore
    assert y.isnan().any(1).tolist() == [i == 3 for i in range(8)]


def test_unwritten_memory_is_never_read(nan_filled_memory: None):
    x, ids, fc1, fc2, _ = make(8, 40, 33, 4, True, 8)
    assert quantized_expert_mlp(x, ids.clamp(max=1), fc1, fc2).isfinite().all()


def test_bad_input_is_named():
    x, ids, fc1, fc2, _ = make(8, 40, 33, 2, True, 8)
    with pytest.raises(InputError, match=r"expert_ids holds 2, must be 0 .. 1"):
        quantized_expert_mlp(x, torch.full((8,), 2), fc1, fc2)
    with pytest.raises(InputError, match=r"fc2 has shape \(2, 40, 33\), must be \(2, 40, 66\)"):
        quantized_expert_mlp(x, ids, fc1, fc2, gated=False)
    with pytest.raises(InputError, match=r"fc1 has shape \(66, 40\), must be \(e, o, i\)"):
        quantized_expert_mlp(x, ids, fc1[0], fc2)
    with pytest.raises(InputError, match=r"activation='relu'"):
        quantized_expert_mlp(x, ids, fc1, fc2, activation="relu")  # pyright: ignore
    with pytest.raises(InputError, match="for inference only"):
        quantized_expert_mlp(x.requires_grad_(), ids, fc1, fc2)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("gated", [True, False], ids=("gated", "plain"))
def test_frozen_experts_pass_gradients_on(k: int, gated: bool):
    """Those of the experts written out; and none of what does not need it."""
    torch.manual_seed(0)
    e, f, m, t = 3, 32, 32, 11
    fc1, fc2 = (
        quantize_weight(torch.randn(e, o, i), 4, 32)
        for o, i in ((2 * f if gated else f, m), (m, f))
    )
    ids = torch.randint(0, e - 1, (t,) if k == 1 else (t, k))  # the last expert has no token
    found: list[list[torch.Tensor]] = []
    start = torch.randn(t, m, dtype=torch.float64), torch.rand(ids.shape, dtype=torch.float64)
    for run, weights in (
        (frozen_expert_mlp, (fc1, fc2)),
        (expert_mlp, tuple(dequantize(w, torch.float64) for w in (fc1, fc2))),
    ):
        x, gate = (tensor.clone().requires_grad_() for tensor in start)
        y = run(x, ids, *weights, gate=gate, gated=gated)  # pyright: ignore
        y.square().sum().backward()
        assert x.grad is not None
        assert gate.grad is not None
        found.append([y, x.grad, gate.grad])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
