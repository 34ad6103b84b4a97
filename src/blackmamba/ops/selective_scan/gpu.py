"""The selective scan on a GPU: both passes, and what autograd needs to know.

Letters: b batch, l sequence, d d_inner, n d_state.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from blackmamba.ops import gpu
from blackmamba.ops.selective_scan import cuda
from blackmamba.ops.selective_scan.call import (
    Call,
    backward_kernels,
    kernels,
    padded,
    rows,
    strides,
)
from blackmamba.ops.selective_scan.plan import (
    BACKWARD,
    CUDA_BACKWARD,
    CUDA_FORWARD,
    CUDA_FORWARD_UNITS,
    CUDA_OTHERS,
    FORWARD,
    OTHERS,
    SPAN,
    Plan,
    Tuning,
)

TILES = 1
_SUMMED = 64  # numbers of A's gradient that a program adds up, or one channel's


def selective_scan_gpu(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan`, computed in float32; x, dt, z, B and C are read as they lie in memory."""
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y, final_state, _ = _forward(*inputs, seq_idx, dt_softplus, keep)
    return y, final_state


def _outputs(x: Tensor, A: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    (b, l, d), n = x.shape, A.shape[1]
    final_state = x.new_empty(b, d, n, dtype=torch.float32)
    starts = (b, math.ceil(l / SPAN), d, padded(n)) if keep else (0,)
    kept = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    return x.new_empty(x.shape), final_state, x.new_empty(starts, dtype=kept)


@torch.library.custom_op("blackmamba::selective_scan_gpu", mutates_args=())
def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state and, if `keep`, the states before every SPAN tokens."""
    y, final_state, starts = _outputs(x, A, keep)
    if final_state.numel() == 0 or x.shape[1] == 0:
        if initial_state is None:
            return y, final_state.zero_(), starts
        return y, final_state.copy_(initial_state), starts
    call = Call(x, dt, A, B, C, D, z, dt_bias, seq_idx, dt_softplus)
    by_cuda = cuda.fits(call.n_padded, [call.x, call.dt, call.z, y], [call.D, call.dt_bias])
    units = CUDA_FORWARD_UNITS if cuda.fits_units(call.x, B, C) else ()
    call.pack(zeros=call.most_blocks(CUDA_FORWARD + units) if by_cuda else 0)
    first = None if initial_state is None else call.padded_state(initial_state)
    last = (
        final_state
        if call.n == call.n_padded
        else final_state.new_empty(*final_state.shape[:2], call.n_padded)
    )

    def run(cut: Plan) -> None:
        begin = first
        if cut.n_chunks > 1:
            ends, decays = _left(call, cut, by_cuda)
            begin = call.carry(ends, decays, first, back=False)
        _launch_forward(call, cut, by_cuda, begin, y, starts, last, last, keep=keep)

    if by_cuda:
        tunings, others = _fitting("scan_forward", CUDA_FORWARD, call.x)
        call.run_best("forward, CUDA", tunings + units, others, run)
    else:
        call.run_best("forward", (FORWARD,), OTHERS, run)
    if last is not final_state:
        final_state.copy_(last[..., : call.n])
    return y, final_state, starts


def final_state(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """`selective_scan`'s final state alone, (b, d, n) float32, of rows that are not empty and
    without a gradient: the pass that finds what chunks leave behind is all that it takes."""
    call = Call(x, dt, A, B, B, None, None, dt_bias, None, dt_softplus)
    by_cuda = cuda.fits(call.n_padded, [call.x, call.dt], [call.dt_bias])
    call.pack()
    first = None if initial_state is None else call.padded_state(initial_state)
    found: list[Tensor] = []

    def run(cut: Plan) -> None:
        ends, decays = _left(call, cut, by_cuda)
        begin = first
        if cut.n_chunks > 1:
            begin = call.carry(ends, decays, first, back=False)[:, -1]
        state = ends[:, -1]
        found[:] = [state if begin is None else torch.addcmul(state, decays[:, -1], begin)]

    tunings = _fitting("scan_forward", CUDA_FORWARD, call.x)[0] if by_cuda else (FORWARD,)
    alone = tuple(dataclasses.replace(each, extra=0, cutting=1, split=False) for each in tunings)
    call.run_best("final state", alone, (), run)
    return found[0][..., : call.n].contiguous()


def _left(call: Call, cut: Plan, by_cuda: bool) -> tuple[Tensor, Tensor]:
    """What chunks leave behind had they begun with nothing, and what is left of what they begin
    with."""
    ends, decays = call.states(cut), call.states(cut)
    _launch_forward(call, cut, by_cuda, None, None, None, ends, decays, local=True)
    return ends, decays


def _launch_forward(
    call: Call,
    cut: Plan,
    by_cuda: bool,
    first: Tensor | None,
    y: Tensor | None,
    starts: Tensor | None,
    ends: Tensor,
    decays: Tensor,
    *,
    keep: bool = False,
    local: bool = False,
) -> None:
    if by_cuda:
        defines = {"LOCAL": local, "KEEP": keep, "HAS_FIRST": first is not None}
        tensors = {"y": y, "first": first, "starts": starts, "ends": ends, "decays": decays}
        share = None
        if not local:
            share = call.share(cut)
            tensors |= call.handed(cut, share)
        name = "scan_forward_units" if cut.units else "scan_forward"
        call.cuda(name, cut, {k: int(v) for k, v in defines.items()}, tensors, share)
        return
    flags = call.flags | {"S": SPAN, "HAS_D": call.D is not None, "KEEP": keep, "AHEAD": True}
    z = call.x if call.z is None else call.z
    kernels().forward_kernel[call.grid(cut)](
        call.x,
        call.dt,
        call.A,
        call.packed,
        call.A if call.D is None else call.D,
        z,
        call.A if call.dt_bias is None else call.dt_bias,
        call.resets,
        call.A if first is None else first,
        call.x if y is None else y,
        ends if starts is None else starts,
        ends,
        decays,
        *call.sizes(cut),
        *strides(call.x),
        *strides(call.dt),
        *strides(z),
        HAS_FIRST=first is not None,
        LOCAL=local,
        BD=cut.block,
        EVEN=call.even(cut),
        num_warps=cut.warps,
        **flags,
    )


@torch.library.custom_op("blackmamba::selective_scan_gpu_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    starts: Tensor,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and initial_state; empty for absent inputs."""
    grads = _gradients_of(x, dt, A, B, C, D, z, dt_bias, initial_state)
    backward_into(
        grads,
        grad_y,
        grad_final,
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        initial_state,
        seq_idx,
        starts,
        dt_softplus,
    )
    return grads


def backward_into(
    grads: tuple[Tensor, ...],
    grad_y: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    starts: Tensor,
    dt_softplus: bool,
) -> None:
    """Fill `grads`, of x, dt, A, B, C, D, z, dt_bias and initial_state in this order; of (b, l,
    ...) tensors only the last dimension need be contiguous, so that they may be parts of a wider
    gradient; those of A, D and dt_bias have to be as a whole."""
    grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_first = grads
    b, l, d = x.shape
    if x.numel() == 0:
        for grad in (grad_A, grad_B, grad_C, grad_D, grad_bias):
            grad.zero_()
        if initial_state is not None:
            grad_first.zero_() if grad_final is None else grad_first.copy_(grad_final)
        return
    call = Call(x, dt, A, B, C, D, z, dt_bias, seq_idx, dt_softplus)
    grad_y = rows(grad_y)
    written = {"grad_x": grad_x, "grad_dt": grad_dt, "grad_z": None if z is None else grad_z}
    read_and_written = [call.x, call.dt, call.z, grad_y, *written.values()]
    by_cuda = cuda.fits(call.n_padded, read_and_written, [call.D, call.dt_bias])
    by_cuda = by_cuda and cuda.fits_backward(read_and_written)
    call.pack(zeros=call.most_blocks(CUDA_BACKWARD) if by_cuda else 0)
    z_ = call.x if call.z is None else call.z
    D_ = call.A if call.D is None else call.D
    bias = call.A if call.dt_bias is None else call.dt_bias
    last = None if grad_final is None else call.padded_state(grad_final)

    def run(cut: Plan) -> None:
        shared = call.flags | {"BD": cut.block, "EVEN": call.even(cut), "num_warps": cut.warps}
        after = last
        if cut.n_chunks > 1:
            ends, decays = call.states(cut), call.states(cut)
            if by_cuda:
                tensors = {"grad_y": grad_y, "ends": ends, "decays": decays}
                call.cuda("scan_backward_local", cut, {}, tensors)
            else:
                backward_kernels().backward_local_kernel[call.grid(cut)](
                    call.dt,
                    call.A,
                    call.packed,
                    z_,
                    bias,
                    call.resets,
                    grad_y,
                    ends,
                    decays,
                    *call.sizes(cut),
                    *strides(call.dt),
                    *strides(z_),
                    *strides(grad_y),
                    **shared,
                )
            after = call.carry(ends, decays, after, back=True)
        elif after is None and not by_cuda:
            after = call.states(cut).zero_()
        n_blocks = math.ceil(d / cut.block)
        share = call.share(cut)
        handed = call.handed(cut, share) if by_cuda else {}
        parts = b * cut.n_chunks * (2 if handed else 1)
        new = call.A.new_empty
        partial = new(b, call.l_padded // 4, n_blocks, 8 * call.n_padded)
        sum_A = new(parts, d, call.n_padded)
        sum_D = new(parts, d) if D is not None else sum_A
        sum_bias = new(parts, d) if dt_bias is not None else sum_A
        before = new(b, d, call.n_padded)
        if by_cuda:
            tensors = {"grad_y": grad_y, "starts": starts, "after": after, "partial": partial}
            tensors |= written | {"grad_first": before, "grad_A": sum_A}
            tensors |= {"grad_D": sum_D, "grad_bias": sum_bias} | handed
            call.cuda("scan_backward", cut, {}, tensors, share)
        else:
            backward_kernels().backward_kernel[call.grid(cut)](
                call.x,
                call.dt,
                call.A,
                call.packed,
                D_,
                z_,
                bias,
                call.resets,
                starts,
                grad_y,
                after,
                grad_x,
                grad_dt,
                grad_x if z is None else grad_z,
                partial,
                before,
                sum_A,
                sum_D,
                sum_bias,
                *call.sizes(cut),
                *strides(call.x),
                *strides(call.dt),
                *strides(z_),
                *strides(grad_y),
                *strides(grad_x),
                *strides(grad_dt),
                *((0, 0) if z is None else strides(grad_z)),
                S=SPAN,
                TILES=TILES,
                HAS_D=D is not None,
                SUM=_sum_by(x, cut.block),
                **shared,
                **_registers(BACKWARD),
            )
        n = call.n_padded
        channels, tiles = max(1, _SUMMED // n), call.l_padded // 4
        others = math.ceil(d / channels / b)
        backward_kernels().sum_kernel[(tiles + others, b)](
            partial,
            sum_A,
            sum_D,
            sum_bias,
            grad_B,
            grad_C,
            grad_A,
            grad_D,
            grad_bias,
            l,
            d,
            call.n,
            tiles,
            n_blocks,
            parts,
            *strides(grad_B),
            *strides(grad_C),
            N=n,
            HAS_D=D is not None,
            HAS_BIAS=dt_bias is not None,
            OF_UNITS=by_cuda,
            BLOCKS=max(1, min(128 // n, _power_of_two(n_blocks))),
            PARTS=max(1, min(1024 // n, _power_of_two(parts), 16)),
            CHANNELS=channels,
            num_warps=max(1, min(4, n // 32)),
        )
        if initial_state is not None:
            grad_first.copy_(before[..., : call.n])

    if by_cuda:
        tunings, others = _fitting("scan_backward", CUDA_BACKWARD, call.x)
        call.run_best("backward, CUDA", tunings, others, run)
    else:
        call.run_best("backward", (BACKWARD,), OTHERS, run)


def _power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


def _fitting(
    name: str, tunings: tuple[Tuning, ...], x: Tensor
) -> tuple[tuple[Tuning, ...], tuple[Tuning, ...]]:
    """Of these and of `CUDA_OTHERS` those whose blocks x's GPU has shared memory for."""
    usual, others = (
        tuple(each for each in some if cuda.fits_block(name, each.block, x))
        for some in (tunings, CUDA_OTHERS)
    )
    return usual, others


def _registers(tuning: Tuning) -> dict[str, int]:
    if tuning.registers is None or torch.version.hip is not None or gpu.interpreted():
        return {}
    return {"maxnreg": tuning.registers}


def _sum_by(x: Tensor, channels: int) -> str:
    """How numbers are summed over channels: by additions, or by matrix units that read 11 bits of
    each number, of at least 16 channels."""
    units = torch.version.hip is None and not gpu.interpreted()
    return "tf32" if units and x.dtype != torch.float32 and channels >= 16 else "add"


def _gradients_of(*inputs: Tensor | None) -> Any:
    """Contiguous memory for each gradient; no numbers where the input is absent."""
    present = inputs[0]
    assert present is not None
    return tuple(present.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


# ---- what autograd, torch.compile and fake tensors need to know ----------------------------------


@_forward.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, A, rest[-1])


@_backward.register_fake
def _(grad_y: Tensor, grad_final: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return _gradients_of(*rest[:9])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, dt_softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.dt_softplus = dt_softplus
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # of the states that are kept, too, which nothing reads


def _gradients(
    ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None, _: None
) -> tuple[Any, ...]:
    if grad_y is None:
        grad_y = torch.zeros_like(ctx.saved_tensors[0])
    grads = _backward(grad_y, grad_final, *ctx.saved_tensors, ctx.dt_softplus)
    kept = [None if t is None else g for g, t in zip(grads, ctx.saved_tensors[:9], strict=True)]
    return *kept, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
