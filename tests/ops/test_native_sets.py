"""The kernels of lesser instruction sets, each in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blackmamba.ops import (
    activate,
    causal_conv1d,
    linear,
    linear_cross_entropy,
    native,
    rms_norm,
    selective_scan,
    selective_state_update,
)

SETS = ("baseline", "avx2", "avx512")


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def conv(backend: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return causal_conv1d(x, weight, bias, backend=backend)[0]  # pyright: ignore


def norm(backend: str, x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, backend=backend)  # pyright: ignore


def silu(backend: str, h: Tensor) -> Tensor:
    return activate(h, "silu", backend=backend)  # pyright: ignore


def gelu(backend: str, h: Tensor) -> Tensor:
    return activate(h, "gelu", gated=False, backend=backend)  # pyright: ignore


def outer(backend: str, x: Tensor, weight: Tensor) -> Tensor:
    return linear(x, weight, backend=backend)  # pyright: ignore


def cross_entropy(backend: str, x: Tensor, weight: Tensor) -> Tensor:
    labels = torch.arange(len(x)) % len(weight)
    return linear_cross_entropy(x, weight, labels, backend=backend)  # pyright: ignore


def scan(backend: str, *inputs: Tensor) -> Tensor:
    x, dt, A, B, C, D, z = inputs
    wide = torch.promote_types(A.dtype, torch.float32)
    y, state = selective_scan(
        *(x, dt, -A.to(wide).exp(), B, C, D, z),
        dt_softplus=True,
        backend=backend,  # pyright: ignore
    )
    return torch.cat((y.flatten(), state.flatten().to(y.dtype)))


CASES: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
    (conv, (normal(2, 67, 21), normal(21, 4), normal(21))),
    (conv, (normal(2, 9, 40), normal(40, 3), normal(40))),
    (norm, (normal(35, 83), normal(83))),
    (silu, (normal(5, 46),)),
    (gelu, (normal(5, 46),)),
    (outer, (normal(130, 110), normal(90, 110))),
    (cross_entropy, (normal(9, 5), normal(75, 5))),
    *(
        (
            scan,
            (
                *(normal(2, 37, d), normal(2, 37, d) - 1, normal(d, n)),
                *(normal(2, 37, n), normal(2, 37, n) + 1, normal(d), normal(2, 37, d)),
            ),
        )
        for d, n in ((21, 16), (5, 7))
    ),
]


def main() -> None:
    """All that a process of one instruction set computes."""
    import test_native
    import test_native_narrow
    import test_native_weights

    for name in test_native.FUNCTIONS:
        test_native.test_relative_error_is_within_its_bound(name)
    test_native.test_limits()
    test_native_weights.every_kind()
    test_native_narrow.every_kind()
    operations()
    one_token()
    kept_states()
    print(native.extension().target())  # noqa: T201


def operations() -> None:
    """Every case forward and backward, in float32 and bfloat16, against float64."""
    for function, inputs in CASES:
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 0.02)):
            narrow = [t.to(dtype) for t in inputs]
            results: list[list[Tensor]] = []
            for backend, wide in (("native", dtype), ("reference", torch.float64)):
                leaves = [t.to(wide).requires_grad_() for t in narrow]
                y = function(backend, *leaves)
                results.append([y, *torch.autograd.grad(y.sum(), leaves)])
            for actual, exact in zip(*results, strict=True):
                error = (actual.double() - exact).abs().max() / exact.abs().max()
                assert error < tolerance, (function.__name__, dtype, error)


def one_token() -> None:
    """The scan's single step, which has no gradient."""
    for n in (9, 16):
        inputs = (normal(3, 21, n), normal(3, 21), normal(3, 21) - 1, -normal(21, n).exp())
        inputs += (normal(3, n), normal(3, n) + 1, normal(21), normal(3, 21))
        actual = selective_state_update(*inputs, dt_softplus=True, backend="native")
        wide = [t.double() for t in inputs]
        exact = selective_state_update(*wide, dt_softplus=True, backend="reference")
        for a, e in zip(actual, exact, strict=True):
            assert (a - e).abs().max() / e.abs().max() < 2e-6, n


def kept_states() -> None:
    """What the scan keeps for its gradient is all written, channels that only pad it too."""
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    d, n = 5, 3
    inputs = (normal(2, 19, d), normal(2, 19, d), -normal(d, n).exp(), *(normal(2, 19, n),) * 2)
    absent = (None,) * 5
    operation = torch.ops.blackmamba.selective_scan_native
    assert operation(*inputs, *absent, True, True)[2].isfinite().all()


@pytest.mark.skipif(native.missing() is not None, reason="the extension was not built")
@pytest.mark.parametrize("name", SETS)
def test_lesser_instruction_sets(name: str):
    order = (*SETS, "avx512_bf16")
    best = native.extension().target()
    environment = {
        **os.environ,
        "BLACKMAMBA_CPU_TARGET": name,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == min(name, best, key=order.index)


if __name__ == "__main__":
    main()
