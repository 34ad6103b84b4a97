"""What the passes of the scan on a GPU are launched with alike, Triton's and those in CUDA C++.

Letters: b batch, l sequence, d d_inner, n d_state.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from blackmamba.ops import gpu
from blackmamba.ops.gpu import tuning
from blackmamba.ops.selective_scan import cuda
from blackmamba.ops.selective_scan.plan import SPAN, Plan, Tuning, cuts, plan, planned


class Call:
    """What all passes are launched with alike."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        seq_idx: Tensor | None,
        dt_softplus: bool,
    ):
        self.b, self.l, self.d = x.shape
        self.n = A.shape[1]
        self.n_padded = padded(self.n)
        self.l_padded = math.ceil(self.l / SPAN) * SPAN
        self.x, self.dt = rows(x), rows(dt)
        self.z = None if z is None else rows(z)
        self.A = A.float().contiguous()
        self.D = None if D is None else D.contiguous()
        self.dt_bias = None if dt_bias is None else dt_bias.contiguous()
        self.flags = {
            "N": self.n_padded,
            "HAS_Z": z is not None,
            "HAS_BIAS": dt_bias is not None,
            "SOFTPLUS": dt_softplus,
            "HAS_SEQ": seq_idx is not None,
        }
        self._B, self._C, self._seq_idx = B, C, seq_idx

    def pack(self, zeros: int = 0) -> None:
        """Put B and C side by side, in float32; and `there`, so many zeros."""
        x, B, C, seq_idx = self.x, self._B, self._C, self._seq_idx
        self.packed = x.new_empty(self.b, self.l_padded, 2, self.n_padded, dtype=torch.float32)
        self.resets = (
            self.packed
            if seq_idx is None
            else x.new_empty(self.b, self.l_padded, dtype=torch.float32)
        )
        self.there = x.new_empty(zeros, dtype=torch.int32)
        tokens = max(1, 512 // self.n_padded)
        kernels().pack_kernel[(math.ceil(self.l_padded / tokens), self.b)](
            B,
            C,
            B if seq_idx is None else seq_idx,
            self.packed,
            self.resets,
            self.there,
            self.l,
            self.l_padded,
            self.n,
            zeros,
            *B.stride(),
            *C.stride(),
            *((0, 0) if seq_idx is None else seq_idx.stride()),
            N=self.n_padded,
            T=tokens,
            HAS_SEQ=seq_idx is not None,
        )

    def run_best(
        self,
        name: str,
        tunings: tuple[Tuning, ...],
        others: tuple[Tuning, ...],
        run: Callable[[Plan], object],
    ) -> None:
        """Run a pass as it was measured to be fastest, or as `plan` expects it to be."""
        size = (self.b, self.l, self.d, self.n_padded, gpu.processors(self.x))
        b, l = (tuning.rounded(n) for n in size[:2])
        best = tuning.pick(
            f"selective_scan {name}",
            f"b={b} l={l} d={self.d} n={self.n_padded} {self.x.dtype}",
            plan(*size, *tunings),
            lambda: cuts(*size, *tunings, *others),
            lambda cut: run(planned(cut, self.l)),
        )
        run(planned(best, self.l))

    def sizes(self, plan: Plan) -> tuple[int, int, int, int, int, int]:
        return self.l, self.d, self.n, self.l_padded, plan.n_chunks, plan.chunk

    def grid(self, plan: Plan) -> tuple[int]:
        return (math.ceil(self.d / plan.block) * plan.n_chunks * self.b,)

    def most_blocks(self, tunings: tuple[Tuning, ...]) -> int:
        """Blocks of threads of which no plan that cuts rows has more; 0 if none cuts rows."""
        most = 0
        for each in tunings:
            warps = each.block * self.n_padded // (32 * each.numbers)
            at_once = gpu.processors(self.x) * max(1, each.resident // warps)
            if each.split and self.b * math.ceil(self.d / each.block) > at_once:
                most = max(most, at_once)
        return most

    def share(self, plan: Plan) -> int:
        """Spans of each block of threads, so that all that run at once do as many: a row's where
        rows are cut into chunks or fit at once. Never less: a row's tokens are done one after
        another, and parts of it by two blocks would only take turns."""
        of_row = plan.chunk // SPAN
        at_once = gpu.processors(self.x) * max(1, plan.resident // plan.warps)
        cut = plan.split and plan.n_chunks == 1
        return max(of_row, math.ceil(self.grid(plan)[0] * of_row / at_once)) if cut else of_row

    def handed(self, plan: Plan, share: int) -> dict[str, Tensor]:
        """Where blocks of threads hand states over to others, and say so, if shares cut rows."""
        of_row = plan.chunk // SPAN
        if share == of_row:
            return {}
        blocks = math.ceil(self.grid(plan)[0] * of_row / share)
        assert blocks <= len(self.there)
        return {"handed": self.A.new_empty(blocks, plan.block * self.n_padded), "there": self.there}

    def even(self, plan: Plan) -> bool:
        return self.d % plan.block == 0 and self.l % SPAN == 0

    def states(self, plan: Plan) -> Tensor:
        return self.A.new_empty(self.b, plan.n_chunks, self.d, self.n_padded)

    def carry(self, ends: Tensor, decays: Tensor, first: Tensor | None, back: bool) -> Tensor:
        """What each chunk begins with (or, backwards, ends with), of what each leaves."""
        carried = torch.empty_like(ends)
        size = self.d * self.n_padded
        kernels().carry_kernel[(math.ceil(size / 256), self.b)](
            ends,
            decays,
            ends if first is None else first,
            carried,
            ends.shape[1],
            size,
            BACK=back,
            HAS_FIRST=first is not None,
            BLOCK=256,
            num_warps=4,
        )
        return carried

    def padded_rates(self) -> Tensor:
        """A as (d, N), zeros where there is no state."""
        return self._padded(self.A)

    def cuda(
        self,
        name: str,
        plan: Plan,
        defines: Mapping[str, int],
        tensors: Mapping[str, Tensor | None],
        share: int | None = None,
    ) -> None:
        """Run a kernel in CUDA C++."""
        of_row = plan.chunk // SPAN
        share, of_all = share or of_row, self.grid(plan)[0] * of_row
        n_blocks = math.ceil(self.d / plan.block)
        sizes = (self.l, self.d, self.l_padded, plan.n_chunks, plan.chunk, n_blocks, share, of_all)
        shared = {
            "x": self.x,
            "dt": self.dt,
            "z": self.z,
            "A": self.padded_rates(),
            "BC": self.packed,
        }
        shared |= {"D": self.D, "bias": self.dt_bias, "resets": self.resets}
        flags = {name: int(value) for name, value in self.flags.items() if name != "N"}
        short = torch.float32 not in (self._B.dtype, self._C.dtype)
        flags |= {"HAS_D": int(self.D is not None), "SHORT_BC": int(short)}
        flags |= {"MIN_BLOCKS": plan.resident // plan.warps, **defines}
        tensors = {**shared, **tensors}
        warps = plan.warps * (5 if plan.units else 1)  # roles: three scan, two do the rest
        cuda.launch(name, math.ceil(of_all / share), warps, sizes, tensors, flags)

    def padded_state(self, state: Tensor) -> Tensor:
        """(b, d, n) to contiguous float32 (b, d, N)."""
        return self._padded(state.float()).contiguous()

    def _padded(self, tensor: Tensor) -> Tensor:
        if self.n == self.n_padded:
            return tensor
        return torch.nn.functional.pad(tensor, (0, self.n_padded - self.n))


def padded(n: int) -> int:
    """A power of two: the states of a channel with their padding."""
    return max(4, 1 << (n - 1).bit_length())


def rows(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous."""
    return tensor if tensor.shape[-1] < 2 or tensor.stride(-1) == 1 else tensor.contiguous()


def strides(tensor: Tensor) -> tuple[int, int]:
    return tensor.stride(0), tensor.stride(1)


def kernels() -> Any:
    """kernels.py, whose language Python's types do not describe; triton is imported only now."""
    from blackmamba.ops.selective_scan import kernels as module

    return module


def backward_kernels() -> Any:
    """The same of backward_kernels.py."""
    from blackmamba.ops.selective_scan import backward_kernels as module

    return module
