"""What `adamw_` means, tensor by tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blackmamba.ops.adamw.tensors import AdamWTensors
from blackmamba.ops.checks import wide_dtype


@torch.no_grad()
def adamw_reference(
    tensors: Sequence[AdamWTensors], factors: Tensor, beta1: float, beta2: float, eps: float
) -> None:
    """In float32, on any device."""
    go, seed = factors[4] != 0, factors[5].to(torch.int64)
    lr, c1, c2, scale = factors[:4].float()
    for number, t in enumerate(tensors):
        old = t.parameter.float() if t.master is None else t.master
        g = t.gradient.float() * scale
        m = beta1 * t.exp_avg + (1 - beta1) * g
        v = beta2 * t.exp_avg_sq + (1 - beta2) * g * g
        new = old - lr * t.decay * old
        new = new - lr * (m * c1) / (v.sqrt() * c2 + eps)
        if t.master is not None:
            t.master.copy_(torch.where(go, new, old))
        narrow = new.to(t.parameter.dtype)
        if t.master is None and t.parameter.dtype == torch.bfloat16:
            narrow = stochastic_bfloat16(new, seed, number)
        t.parameter.copy_(torch.where(go, narrow, t.parameter))
        t.exp_avg.copy_(torch.where(go, m, t.exp_avg))
        t.exp_avg_sq.copy_(torch.where(go, v, t.exp_avg_sq))


@torch.no_grad()
def global_norm_reference(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of the tensors' norms, in float32 or wider."""
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(t, dtype=wide_dtype(t)) for t in tensors])
    )


def stochastic_bfloat16(x: Tensor, seed: Tensor, number: int) -> Tensor:
    """Round float32 x up or down to bfloat16: add 16 random bits to the 16 that are cut off.

    Args:
        x: finite.
        seed: a scalar, int64.
        number: of the tensor, so that no two of a step have the same noise.
    """
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    noise = _hash(index ^ _hash(seed * 65_536 + number)) & 0xFFFF
    bits = x.view(torch.int32).to(torch.int64) + noise
    return (bits & ~0xFFFF).to(torch.int32).view(torch.float32).to(torch.bfloat16)


def _hash(x: Tensor) -> Tensor:
    """32 bits that look random, of the low 32 bits of an integer.

    Source: Wellons 2018, "Prospecting for Hash Functions", the one he calls lowbias32.
    """
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0xD35A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)
