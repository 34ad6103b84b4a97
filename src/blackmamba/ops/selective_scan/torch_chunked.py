"""A chunk-parallel selective scan in plain PyTorch, with its own backward.

The batch is cut into groups of rows, and time into blocks, read one after another; a block is
`n_chunks` chunks of `length` tokens, read side by side. Inside a chunk the recurrence runs token by
token on tensors of (b, chunks, n, d), with d innermost so that every operation is one long vector.
Where there is more than one chunk, a first pass finds only what each would end with had it started
from zero, which gives all their starts; the second pass is then the same as for one chunk. Where
batch and width alone fill the processor, a block is one chunk and the first pass falls away.

Only each block's first state is kept for the backward pass, which recomputes the rest of the block:
the memory is about that of the inputs. No number is ever divided by a decay.

Two choices follow from measurement on CPU: exp2 with log2(e) folded into A takes a quarter of exp's
time, and a product summed over d a fifth of a matrix-vector product's.

Letters: b batch, l sequence, d d_inner, n d_state, c chunks of a block, i token inside a chunk.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blackmamba.ops.checks import wide_dtype

_BLOCK_NUMBERS = 1 << 20  # of each (i, b, c, n, d) tensor: a few MB, so that a block stays in cache
_LEAST_STEP_NUMBERS = 1 << 13  # of each (b, c, n, d) tensor: below it calls cost more than work
_MOST_STEP_NUMBERS = 1 << 16  # above it blocks get short, and the first states to keep many
_LONGEST_CHUNK = 64
_LOG2_E = 1 / math.log(2)


def selective_scan_chunked(
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
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan`, block by block; computed in float32, or float64 for float64."""
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], *A.shape, dtype=wide_dtype(x))
    y, final_state, _ = _forward(
        x, dt, A, B, C, D, z, dt_bias, initial_state, _carries_over(seq_idx), dt_softplus
    )
    return y, final_state


def _carries_over(seq_idx: Tensor | None) -> Tensor | None:
    """(b, l), bool: whether a token sees the state before it, or is the first of its document."""
    if seq_idx is None:
        return None
    same = torch.ones_like(seq_idx, dtype=torch.bool)
    torch.eq(seq_idx[:, 1:], seq_idx[:, :-1], out=same[:, 1:])
    return same


@dataclasses.dataclass(frozen=True)
class _Block:
    """Tokens start .. start + n_chunks * length - 1."""

    start: int
    n_chunks: int
    length: int

    @property
    def times(self) -> slice:
        return slice(self.start, self.start + self.n_chunks * self.length)


def _plan(b: int, l: int, d: int, n: int) -> tuple[list[slice], list[_Block]]:
    """Groups of rows and blocks of time; every group is read in the same blocks."""
    n_rows = max(1, min(b, _MOST_STEP_NUMBERS // max(1, n * d)))
    groups = [slice(row, min(row + n_rows, b)) for row in range(0, b, n_rows)]
    step = max(1, n_rows * n * d)
    n_chunks = max(1, _LEAST_STEP_NUMBERS // step)
    length = max(4, min(_LONGEST_CHUNK, _BLOCK_NUMBERS // (step * n_chunks)))
    blocks: list[_Block] = []
    start = 0
    while start < l:
        left = l - start
        if left < length:
            blocks.append(_Block(start, 1, left))
        else:
            blocks.append(_Block(start, min(n_chunks, left // length), length))
        start = blocks[-1].times.stop
    return groups, blocks


class _Inputs:
    """One block's inputs of some rows, in the wide dtype, tokens first: (i, b, c, ...)."""

    def __init__(
        self,
        rows: slice,
        block: _Block,
        wide: torch.dtype,
        x: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        z: Tensor | None,
        dt_bias: Tensor | None,
        same: Tensor | None,
        dt_softplus: bool,
    ):
        self._place, self._wide = (rows, block.times), wide
        self._shape = (block.n_chunks, block.length)
        self.x = self.cut(x)
        self.B = self.cut(B)
        self.C = self.cut(C)
        self.z = None if z is None else self.cut(z)
        raw = self.cut(dt)
        self.raw_dt = raw if dt_bias is None else raw + dt_bias.to(wide)
        self.delta = F.softplus(self.raw_dt) if dt_softplus else self.raw_dt
        self.drive = self.delta * self.x
        self.same = None if same is None else self.cut(same[..., None])[..., None]

    def cut(self, tensor: Tensor) -> Tensor:
        """(b, l, w) to this block's (i, b, c, w)."""
        return tensor[self._place].to(self._wide).unflatten(1, self._shape).movedim(2, 0)

    def paste(self, target: Tensor, value: Tensor) -> None:
        """Write this block's (i, b, c, w) back into its place in (b, l, w)."""
        target[self._place].unflatten(1, self._shape).copy_(value.movedim(0, 2))


class _Workspace:
    """Two or three tensors (i, b, c, n, d), used by one block after another."""

    def __init__(self, groups: list[slice], blocks: list[_Block], A_nd: Tensor, count: int):
        tokens = max((block.n_chunks * block.length for block in blocks), default=0)
        rows = max((group.stop - group.start for group in groups), default=0)
        self._flat = [A_nd.new_empty(tokens * rows * A_nd.numel()) for _ in range(count)]

    def views(self, block: _Block, first: Tensor) -> list[Tensor]:
        b, n, d = first.shape
        shape = (block.length, b, block.n_chunks, n, d)
        return [flat[: math.prod(shape)].view(shape) for flat in self._flat]


def _states(inputs: _Inputs, A2_nd: Tensor, first: Tensor, decay: Tensor, h: Tensor) -> Tensor:
    """Fill `decay` with exp(delta A) and `h` with every state of a block.

    Args:
        A2_nd: log2(e) A.
        first: (b, n, d), the state before the block.
        decay, h: (i, b, c, n, d), overwritten.
    Returns:
        (b, c, n, d): the state before each chunk.
    """
    torch.mul(inputs.delta[..., None, :], A2_nd, out=decay).exp2_()
    if inputs.same is not None:
        decay.mul_(inputs.same)
    torch.mul(inputs.drive[..., None, :], inputs.B[..., None], out=h)
    decays, drives = decay.unbind(), h.unbind()
    starts = first[:, None]
    n_chunks = h.shape[2]
    if n_chunks > 1:
        ends = drives[0].clone()  # of chunks that started from zero
        for a, u in zip(decays[1:], drives[1:], strict=True):
            torch.addcmul(u, a, ends, out=ends)
        whole = _whole_decay(inputs, A2_nd)
        starts = torch.empty_like(ends)
        for c in range(n_chunks):
            starts[:, c] = first
            first = torch.addcmul(ends[:, c], whole[:, c], first)
    before = starts
    for a, u in zip(decays, drives, strict=True):
        before = u.addcmul_(a, before)
    return starts


def _adjoints(inputs: _Inputs, A2_nd: Tensor, after: Tensor, decay: Tensor, g: Tensor) -> Tensor:
    """Turn `g`, the gradient that each state gets from its own output, into the whole gradient.

    Args:
        A2_nd: log2(e) A.
        after: (b, n, d), the gradient of the state behind the block from all that follows.
        decay: (i, b, c, n, d), overwritten with decay * g.
        g: (i, b, c, n, d), overwritten.
    Returns:
        (b, n, d), the gradient of the state before the block.
    """
    decays, gs = decay.unbind(), g.unbind()
    incoming = after[:, None]
    n_chunks = g.shape[2]
    if n_chunks > 1:
        begins = torch.zeros_like(gs[0])  # gradient of the starts, had nothing come from behind
        for a, own in zip(reversed(decays), reversed(gs), strict=True):
            begins.add_(own).mul_(a)
        whole = _whole_decay(inputs, A2_nd)
        incoming = torch.empty_like(begins)
        for c in range(n_chunks - 1, -1, -1):
            incoming[:, c] = after
            after = torch.addcmul(begins[:, c], whole[:, c], after)
    for a, own in zip(reversed(decays), reversed(gs), strict=True):
        incoming = a.mul_(own.add_(incoming))
    return incoming[:, 0].clone()


def _whole_decay(inputs: _Inputs, A2_nd: Tensor) -> Tensor:
    """(b, c, n, d): what is left of each chunk's first state after all of its tokens."""
    whole = torch.exp2(inputs.delta.sum(0)[..., None, :] * A2_nd)
    return whole if inputs.same is None else whole.mul_(inputs.same.amin(0))


@torch.library.custom_op("blackmamba::selective_scan", mutates_args=())
def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor,
    same: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and for the backward pass each block's first state (blocks, b, n, d)."""
    wide = wide_dtype(x)
    (b, l, d), n = x.shape, A.shape[1]
    A2_nd = A.to(wide).t().contiguous() * _LOG2_E
    groups, blocks = _plan(b, l, d, n)
    workspace = _Workspace(groups, blocks, A2_nd, 2)
    firsts = A2_nd.new_empty(len(blocks), b, n, d)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    final_state = A2_nd.new_empty(b, d, n)
    for rows in groups:
        state = initial_state[rows].to(wide).transpose(1, 2)
        for block, first in zip(blocks, firsts[:, rows].unbind(), strict=True):
            first.copy_(state)
            inputs = _Inputs(rows, block, wide, x, dt, B, C, z, dt_bias, same, dt_softplus)
            decay, h = workspace.views(block, first)
            _states(inputs, A2_nd, first, decay, h)
            state = h[-1, :, -1]
            out = _readout(inputs, h, D)
            if inputs.z is not None:
                out *= F.silu(inputs.z)
            inputs.paste(y, out)
        final_state[rows] = state.transpose(1, 2)
    return y, final_state, firsts


def _readout(inputs: _Inputs, h: Tensor, D: Tensor | None) -> Tensor:
    """(i, b, c, d): y before the gate z."""
    out = torch.matmul(inputs.C[..., None, :], h).squeeze(-2)
    return out if D is None else out.addcmul_(inputs.x, D.to(out.dtype))


@torch.library.custom_op("blackmamba::selective_scan_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    grad_final: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    same: Tensor | None,
    firsts: Tensor,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and initial_state; empty for absent inputs."""
    wide = wide_dtype(x)
    (b, l, d), n = x.shape, A.shape[1]
    A_nd = A.to(wide).t().contiguous()
    A2_nd = A_nd * _LOG2_E
    groups, blocks = _plan(b, l, d, n)
    workspace = _Workspace(groups, blocks, A_nd, 3)
    grad_x, grad_dt, grad_B, grad_C, grad_z = (_empty_like(t, x) for t in (x, dt, B, C, z))
    grad_A, grad_D, grad_bias = torch.zeros_like(A_nd), A_nd.new_zeros(d), A_nd.new_zeros(d)
    grad_state = A_nd.new_empty(b, d, n)

    for rows in groups:
        after = grad_final[rows].to(wide).transpose(1, 2)
        for block, first in zip(reversed(blocks), reversed(firsts[:, rows].unbind()), strict=True):
            inputs = _Inputs(rows, block, wide, x, dt, B, C, z, dt_bias, same, dt_softplus)
            decay, h, g = workspace.views(block, first)
            starts = _states(inputs, A2_nd, first, decay, h)

            gy = inputs.cut(grad_y)
            if inputs.z is not None:
                g_z = torch.ops.aten.silu_backward(gy, inputs.z).mul_(_readout(inputs, h, D))
                inputs.paste(grad_z, g_z)
                gy = gy * F.silu(inputs.z)
            inputs.paste(grad_C, torch.mul(h, gy[..., None, :], out=g).sum(-1))

            torch.mul(gy[..., None, :], inputs.C[..., None], out=g)
            after = _adjoints(inputs, A2_nd, after, decay, g)
            g_drive = torch.matmul(inputs.B[..., None, :], g).squeeze(-2)

            g_log = decay  # the gradient of delta A: decay * g * the state before
            g_log[1:] *= h[:-1]
            g_log[0] *= starts
            inputs.paste(grad_B, torch.mul(g, inputs.drive[..., None, :], out=h).sum(-1))
            grad_A += torch.mul(g_log, inputs.delta[..., None, :], out=g).sum((0, 1, 2))
            g_delta = g_log.mul_(A_nd).sum(-2).addcmul_(g_drive, inputs.x)
            if dt_softplus:
                g_delta *= torch.sigmoid(inputs.raw_dt)
            inputs.paste(grad_dt, g_delta)
            if dt_bias is not None:
                grad_bias += g_delta.sum((0, 1, 2))

            g_x = g_drive.mul_(inputs.delta)
            if D is not None:
                g_x.addcmul_(gy, D.to(wide))
                grad_D += (gy * inputs.x).sum((0, 1, 2))
            inputs.paste(grad_x, g_x)
        grad_state[rows] = after.transpose(1, 2)

    return (
        grad_x,
        grad_dt,
        _empty_like(A, x).copy_(grad_A.t()),
        grad_B,
        grad_C,
        grad_D.to(D.dtype) if D is not None else _empty_like(D, x),
        grad_z,
        grad_bias.to(dt_bias.dtype) if dt_bias is not None else _empty_like(dt_bias, x),
        grad_state,
    )


def _empty_like(tensor: Tensor | None, present: Tensor) -> Tensor:
    """Contiguous memory for a gradient of `tensor`; no numbers where it is absent."""
    if tensor is None:
        return present.new_empty(0)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


# ---- what autograd, torch.compile and fake tensors need to know ----------------------------------


@_forward.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    (b, l, d), n = x.shape, A.shape[1]
    state = x.new_empty(b, d, n, dtype=wide_dtype(x))
    return _empty_like(x, x), state, state.new_empty(len(_plan(b, l, d, n)[1]), b, n, d)


@_backward.register_fake
def _(grad_y: Tensor, grad_final: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, _, _, _ = args
    return (*(_empty_like(t, inputs[0]) for t in inputs), _empty_like(grad_final, grad_final))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, initial_state, same, dt_softplus = inputs
    ctx.save_for_backward(*tensors, same, output[2])
    ctx.dt_softplus, ctx.state_dtype = dt_softplus, initial_state.dtype
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx: Any, grad_y: Tensor, grad_final: Tensor, _: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: a checkpointed layer computes them when they are asked for
    *grads, grad_state = _backward(grad_y, grad_final, *saved, ctx.dt_softplus)
    kept = [g if t is not None else None for g, t in zip(grads, saved[:-2], strict=True)]
    return *kept, grad_state.to(ctx.state_dtype), None, None


_forward.register_autograd(_gradients, setup_context=_save)
