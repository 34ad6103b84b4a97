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


CASES: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
    (conv, (normal(2, 67, 21), normal(21, 4), normal(21))),
    (conv, (normal(2, 9, 40), normal(40, 3), normal(40))),
    (norm, (normal(35, 83), normal(83))),
    (silu, (normal(5, 46),)),
    (gelu, (normal(5, 46),)),
    (outer, (normal(130, 110), normal(90, 110))),
    (cross_entropy, (normal(9, 5), normal(75, 5))),
]


def main() -> None:
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
    assert native.keep_memory() in (True, False)
    print(native.extension().target())  # noqa: T201


@pytest.mark.skipif(native.missing() is not None, reason="the extension was not built")
@pytest.mark.parametrize("name", SETS)
def test_lesser_instruction_sets(name: str):
    best = native.extension().target()
    if best != "avx512_bf16" and name not in SETS[: SETS.index(best) + 1]:
        pytest.skip(f"this processor has {best}")
    environment = {**os.environ, "BLACKMAMBA_CPU_TARGET": name}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == name


if __name__ == "__main__":
    main()
