"""Triton kernel of `adamw_`: one launch for all parameters of the same dtypes."""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from blackmamba.ops.adamw.tensors import AdamWTensors

_BLOCK = 512
_TURNS = 16  # blocks of a program
_WARPS = 8
_NORM_BLOCK = 4096
_NORM_WARPS = 8
_POINTERS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _hash(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def _adamw_kernel(
    work_ptr, table_ptr, numbers_ptr, decay_ptr, factors_ptr, beta1, rest1, beta2, rest2, eps,
    PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, HAS_MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, TURNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Owns TURNS blocks of one tensor, which `work` names. On chip: nothing but the block.
    # Bytes, with bfloat16 parameters and gradients: 14 read and 14 written a number with a master,
    # 12 and 10 without. Bound: device memory.
    number = tl.load(work_ptr + 2 * tl.program_id(0))
    start = tl.load(work_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * (TURNS * BLOCK)
    row = table_ptr + number * 5
    p_ptr = tl.load(row).to(tl.pointer_type(PARAMETER))
    g_ptr = tl.load(row + 1).to(tl.pointer_type(GRADIENT))
    m_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    v_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    master_ptr = tl.load(row + 4).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        p_ptr = tl.multiple_of(p_ptr, 16)
        g_ptr = tl.multiple_of(g_ptr, 16)
        m_ptr = tl.multiple_of(m_ptr, 16)
        v_ptr = tl.multiple_of(v_ptr, 16)
        master_ptr = tl.multiple_of(master_ptr, 16)
    n = tl.load(numbers_ptr + 2 * number)
    name = tl.load(numbers_ptr + 2 * number + 1)
    decay = tl.load(decay_ptr + number)
    lr = tl.load(factors_ptr).to(tl.float32)
    c1 = tl.load(factors_ptr + 1).to(tl.float32)
    c2 = tl.load(factors_ptr + 2).to(tl.float32)
    scale = tl.load(factors_ptr + 3).to(tl.float32)
    if tl.load(factors_ptr + 4) != 0:
        for turn in range(TURNS):
            at = start + turn * BLOCK + tl.arange(0, BLOCK)
            mask = at < n
            g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32) * scale
            m = tl.load(m_ptr + at, mask=mask, other=0.0)
            v = tl.load(v_ptr + at, mask=mask, other=0.0)
            if HAS_MASTER:
                p = tl.load(master_ptr + at, mask=mask, other=0.0)
            else:
                p = tl.load(p_ptr + at, mask=mask, other=0.0).to(tl.float32)
            m = beta1 * m + rest1 * g
            v = beta2 * v + rest2 * g * g
            p = p - lr * decay * p
            p = p - lr * (m * c1) / (tl.sqrt(v) * c2 + eps)
            tl.store(m_ptr + at, m, mask=mask)
            tl.store(v_ptr + at, v, mask=mask)
            if HAS_MASTER:
                tl.store(master_ptr + at, p, mask=mask)
            if STOCHASTIC:
                seed = tl.load(factors_ptr + 5).to(tl.int64) * 65536 + name
                noise = _hash(at.to(tl.uint32) ^ _hash(seed.to(tl.uint32))) & 0xFFFF
                bits = (p.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
                p = bits.to(tl.float32, bitcast=True)
            tl.store(p_ptr + at, p.to(PARAMETER), mask=mask)


@triton.jit
def _squares_adamw_kernel(
    work_ptr, table_ptr, numbers_ptr, sums_ptr,
    GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, TURNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Owns TURNS blocks of one tensor, which `work` names. On chip: sums of squares, of which one
    # number is written. Bytes: the tensor once. Bound: device memory.
    number = tl.load(work_ptr + 2 * tl.program_id(0))
    start = tl.load(work_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * (TURNS * BLOCK)
    g_ptr = tl.load(table_ptr + number).to(tl.pointer_type(GRADIENT))
    if ALIGNED:
        g_ptr = tl.multiple_of(g_ptr, 16)
    n = tl.load(numbers_ptr + 2 * number)
    total = tl.zeros((BLOCK,), tl.float32)
    for turn in range(TURNS):
        at = start + turn * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        total += g * g
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, axis=0))


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The root of the sum of all squares: a scalar, added up in an order that never changes."""
    groups: dict[tuple[torch.dtype, bool], list[Tensor]] = {}
    for t in tensors:
        if t.numel():
            groups.setdefault((t.dtype, t.data_ptr() % 16 == 0), []).append(t)
    sums: list[Tensor] = []
    for (dtype, aligned), members in groups.items():
        device = members[0].device
        table = _table(tuple((t.data_ptr(),) for t in members), device)
        sizes = tuple((t.numel(), 0.0, 0) for t in members)
        work, numbers, _ = _work(sizes, _TURNS * _NORM_BLOCK, device)
        sums.append(torch.empty(len(work), dtype=torch.float32, device=device))
        _squares_adamw_kernel[(len(work),)](
            work, table, numbers, sums[-1],
            GRADIENT=_POINTERS[dtype], ALIGNED=aligned, TURNS=_TURNS, BLOCK=_NORM_BLOCK,
            num_warps=_NORM_WARPS,
        )  # fmt: skip
    return torch.cat(sums).sum().sqrt()


def adamw(
    tensors: Sequence[AdamWTensors], factors: Tensor, beta1: float, beta2: float, eps: float
) -> None:
    """All of the same dtypes in one launch."""
    groups: dict[tuple[torch.dtype, torch.dtype, bool, bool], list[int]] = {}
    for i, t in enumerate(tensors):
        if t.parameter.numel():
            kinds = (t.parameter.dtype, t.gradient.dtype, t.master is not None, _aligned(t))
            groups.setdefault(kinds, []).append(i)
    for (parameter, gradient, has_master, aligned), members in groups.items():
        chosen = [tensors[i] for i in members]
        device = chosen[0].parameter.device
        table = _table(tuple(map(_addresses, chosen)), device)
        sizes = tuple(
            (t.parameter.numel(), t.decay, i) for i, t in zip(members, chosen, strict=True)
        )
        work, numbers, decays = _work(sizes, _TURNS * _BLOCK, device)
        _adamw_kernel[(len(work),)](
            work, table, numbers, decays, factors, beta1, 1 - beta1, beta2, 1 - beta2, eps,
            PARAMETER=_POINTERS[parameter], GRADIENT=_POINTERS[gradient], HAS_MASTER=has_master,
            STOCHASTIC=parameter == torch.bfloat16 and not has_master, ALIGNED=aligned,
            TURNS=_TURNS, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip


def _addresses(t: AdamWTensors) -> tuple[int, ...]:
    tensors = (t.parameter, t.gradient, t.exp_avg, t.exp_avg_sq, t.master)
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _aligned(t: AdamWTensors) -> bool:
    """Whether 16 bytes can be loaded at a time."""
    return all(address % 16 == 0 for address in _addresses(t))


# A step has the same tensors as the last, mostly at the same addresses: nothing is sent again.


@functools.lru_cache(maxsize=16)
def _table(addresses: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return _sent(torch.tensor(addresses), device)


@functools.lru_cache(maxsize=16)
def _work(
    sizes: tuple[tuple[int, float, int], ...], part: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Each program's tensor and part of it; each tensor's numbers and name; its decay."""
    numbers = torch.tensor([(n, name) for n, _, name in sizes])
    decays = torch.tensor([decay for _, decay, _ in sizes], dtype=torch.float32)
    parts = (numbers[:, 0] + part - 1) // part
    member = torch.repeat_interleave(torch.arange(len(sizes)), parts)
    firsts = parts.cumsum(0) - parts
    work = torch.stack((member, torch.arange(len(member)) - firsts[member]), 1).to(torch.int32)
    return _sent(work, device), _sent(numbers, device), _sent(decays, device)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
