"""A chunk-parallel selective scan in plain PyTorch, with its own backward.

Time is cut into blocks, read one after another; a block is `n_chunks` chunks of `length` tokens,
read side by side. Inside a chunk the recurrence runs token by token on tensors of (b, chunks, n,
d), with d innermost so that every operation is one long vector. Chunks start from zero; a short
pass over them then carries the state along, and each token adds what its chunk's start has decayed
to. Where batch and width alone fill the processor, a block is one chunk and the carrying falls
away.

Only each block's first state is kept for the backward pass, which recomputes the rest of the block:
the memory is that of the inputs, whatever d_state is. Decays are products of numbers in [0, 1];
nothing is ever divided by them.

Letters: b batch, l sequence, d d_inner, n d_state, c chunks of a block, i token inside a chunk.
"""

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from blackmamba.ops.checks import wide_dtype

_BLOCK_NUMBERS = 1 << 20  # of each (i, b, c, n, d) tensor: a few MB, so that a block stays in cache
_STEP_NUMBERS = 1 << 15  # of each (b, c, n, d) tensor, at least: below it calls cost more than work
_LONGEST_CHUNK = 64


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
) -> tuple[Tensor, Tensor]:
    """`selective_scan`, block by block; computed in float32, or float64 for float64."""
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], *A.shape, dtype=wide_dtype(x))
    return cast(
        "tuple[Tensor, Tensor]",
        _Scan.apply(x, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus),
    )


@dataclasses.dataclass(frozen=True)
class _Block:
    """Tokens start .. start + n_chunks * length - 1."""

    start: int
    n_chunks: int
    length: int

    @property
    def times(self) -> slice:
        return slice(self.start, self.start + self.n_chunks * self.length)


def _plan(b: int, l: int, d: int, n: int) -> list[_Block]:
    """Cut `l` tokens into blocks whose tensors fit the cache and whose steps are worth a call."""
    row = max(1, b * n * d)
    n_chunks = max(1, _STEP_NUMBERS // row)
    length = max(4, min(_LONGEST_CHUNK, _BLOCK_NUMBERS // (row * n_chunks)))
    blocks: list[_Block] = []
    start = 0
    while start < l:
        left = l - start
        if left < length:
            blocks.append(_Block(start, 1, left))
        else:
            blocks.append(_Block(start, min(n_chunks, left // length), length))
        start = blocks[-1].times.stop
    return blocks


class _Inputs:
    """One block's inputs in the wide dtype, tokens first: (i, b, c, ...)."""

    def __init__(
        self,
        block: _Block,
        wide: torch.dtype,
        x: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        z: Tensor | None,
        dt_bias: Tensor | None,
        dt_softplus: bool,
    ):
        self._block, self._wide = block, wide
        self.x = self.cut(x)
        self.B = self.cut(B)
        self.C = self.cut(C)
        self.z = None if z is None else self.cut(z)
        raw = self.cut(dt)
        self.raw_dt = raw if dt_bias is None else raw + dt_bias.to(wide)
        self.delta = F.softplus(self.raw_dt) if dt_softplus else self.raw_dt
        self.drive = self.delta * self.x

    def cut(self, tensor: Tensor) -> Tensor:
        """(b, l, w) to this block's (i, b, c, w)."""
        shape = (self._block.n_chunks, self._block.length)
        return tensor[:, self._block.times].to(self._wide).unflatten(1, shape).movedim(2, 0)

    def paste(self, target: Tensor, value: Tensor) -> None:
        """Write this block's (i, b, c, w) back into its place in (b, l, w)."""
        shape = (self._block.n_chunks, self._block.length)
        target[:, self._block.times].unflatten(1, shape).copy_(value.movedim(0, 2))


class _Workspace:
    """Two or three tensors (i, b, c, n, d), used by one block after another."""

    def __init__(self, blocks: list[_Block], b: int, n: int, d: int, like: Tensor, count: int):
        size = max((blk.n_chunks * blk.length for blk in blocks), default=0) * b * n * d
        self._flat = [torch.empty(size, dtype=like.dtype, device=like.device) for _ in range(count)]
        self._shape = (b, n, d)

    def views(self, block: _Block) -> list[Tensor]:
        b, n, d = self._shape
        shape = (block.length, b, block.n_chunks, n, d)
        used = block.length * b * block.n_chunks * n * d
        return [flat[:used].view(shape) for flat in self._flat]


def _states(inputs: _Inputs, A_nd: Tensor, first: Tensor, decay: Tensor, h: Tensor) -> Tensor:
    """Fill `decay` with exp(delta A) and `h` with every state of a block.

    Args:
        first: (b, n, d), the state before the block.
        decay, h: (i, b, c, n, d), overwritten.
    Returns:
        (b, c, n, d): the state before each chunk.
    """
    torch.mul(inputs.delta[..., None, :], A_nd, out=decay).exp_()
    torch.mul(inputs.drive[..., None, :], inputs.B[..., None], out=h)
    length, _, n_chunks = h.shape[:3]
    if n_chunks == 1:
        starts = first[:, None]
        h[0].addcmul_(decay[0], starts)
        for i in range(1, length):
            h[i].addcmul_(decay[i], h[i - 1])
        return starts
    for i in range(1, length):
        h[i].addcmul_(decay[i], h[i - 1])
    faded = decay.cumprod(0)  # what is left of a chunk's start after each of its tokens
    starts = torch.empty_like(h[0])
    state = first
    for c in range(n_chunks):
        starts[:, c] = state
        state = torch.addcmul(h[-1, :, c], faded[-1, :, c], state)
    h.addcmul_(faded, starts)
    return starts


def _adjoints(decay: Tensor, g: Tensor, after: Tensor) -> Tensor:
    """Turn `g`, the gradient that each state gets from its own output, into the whole gradient.

    Args:
        decay: (i, b, c, n, d).
        g: (i, b, c, n, d), overwritten.
        after: (b, n, d), the gradient of the state behind the block.
    Returns:
        (b, n, d): the gradient of the state before the block.
    """
    length, _, n_chunks = g.shape[:3]
    if n_chunks == 1:
        g[-1] += after[:, None]
        for i in range(length - 2, -1, -1):
            g[i].addcmul_(decay[i + 1], g[i + 1])
        return decay[0, :, 0] * g[0, :, 0]
    for i in range(length - 2, -1, -1):
        g[i].addcmul_(decay[i + 1], g[i + 1])
    # how much of a chunk's last state is made of each of its states
    kept = torch.ones_like(decay)
    for i in range(length - 2, -1, -1):
        torch.mul(kept[i + 1], decay[i + 1], out=kept[i])
    ends = torch.empty_like(g[0])
    for c in range(n_chunks - 1, -1, -1):
        ends[:, c] = after
        after = decay[0, :, c] * torch.addcmul(g[0, :, c], kept[0, :, c], after)
    g.addcmul_(kept, ends)
    return after


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor,
        dt_softplus: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = wide_dtype(x)
        (b, l, d), n = x.shape, A.shape[1]
        A_nd = A.to(wide).t().contiguous()
        state = initial_state.to(wide).transpose(1, 2).contiguous()
        blocks = _plan(b, l, d, n)
        workspace = _Workspace(blocks, b, n, d, state, 2)
        firsts = state.new_empty(len(blocks), b, n, d)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for block, first in zip(blocks, firsts, strict=True):
            first.copy_(state)
            inputs = _Inputs(block, wide, x, dt, B, C, z, dt_bias, dt_softplus)
            decay, h = workspace.views(block)
            _states(inputs, A_nd, first, decay, h)
            state = h[-1, :, -1]
            out = torch.matmul(inputs.C[..., None, :], h).squeeze(-2)
            if D is not None:
                out = torch.addcmul(out, inputs.x, D.to(wide))
            if inputs.z is not None:
                out = out * F.silu(inputs.z)
            inputs.paste(y, out)
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, firsts)
        ctx.dt_softplus, ctx.state_dtype = dt_softplus, initial_state.dtype
        return y, state.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_y, grad_final = grads
        x, dt, A, B, C, D, z, dt_bias, firsts = ctx.saved_tensors
        wide = wide_dtype(x)
        (b, l, d), n = x.shape, A.shape[1]
        A_nd = A.to(wide).t().contiguous()
        blocks = _plan(b, l, d, n)
        workspace = _Workspace(blocks, b, n, d, A_nd, 3)
        grad_x, grad_dt = torch.empty_like(x), torch.empty_like(dt)
        grad_B, grad_C = torch.empty_like(B), torch.empty_like(C)
        grad_z = None if z is None else torch.empty_like(z)
        grad_A = torch.zeros_like(A_nd)
        grad_D, grad_bias = A_nd.new_zeros(d), A_nd.new_zeros(d)
        after = grad_final.to(wide).transpose(1, 2)

        for block, first in zip(reversed(blocks), reversed(firsts), strict=True):
            inputs = _Inputs(block, wide, x, dt, B, C, z, dt_bias, ctx.dt_softplus)
            decay, h, g = workspace.views(block)
            starts = _states(inputs, A_nd, first, decay, h)
            gy = inputs.cut(grad_y)
            if inputs.z is not None and grad_z is not None:
                sigmoid = torch.sigmoid(inputs.z)
                out = torch.matmul(inputs.C[..., None, :], h).squeeze(-2)
                if D is not None:
                    out = torch.addcmul(out, inputs.x, D.to(wide))
                slope = sigmoid * (1 + inputs.z * (1 - sigmoid))
                inputs.paste(grad_z, gy * out * slope)
                gy = gy * inputs.z * sigmoid
            inputs.paste(grad_C, torch.matmul(h, gy[..., None]).squeeze(-1))

            torch.mul(gy[..., None, :], inputs.C[..., None], out=g)
            after = _adjoints(decay, g, after)
            inputs.paste(grad_B, torch.matmul(g, inputs.drive[..., None]).squeeze(-1))
            g_drive = torch.matmul(inputs.B[..., None, :], g).squeeze(-2)

            g_log = decay.mul_(g)  # gradient of delta A: g * decay * the state before
            g_log[1:] *= h[:-1]
            g_log[0] *= starts
            grad_A += (g_log * inputs.delta[..., None, :]).sum((0, 1, 2))
            g_delta = torch.addcmul((g_log * A_nd).sum(-2), g_drive, inputs.x)
            if ctx.dt_softplus:
                g_delta = g_delta * torch.sigmoid(inputs.raw_dt)
            inputs.paste(grad_dt, g_delta)
            if dt_bias is not None:
                grad_bias += g_delta.sum((0, 1, 2))
            g_x = g_drive * inputs.delta
            if D is not None:
                g_x = torch.addcmul(g_x, gy, D.to(wide))
                grad_D += (gy * inputs.x).sum((0, 1, 2))
            inputs.paste(grad_x, g_x)

        return (
            grad_x,
            grad_dt,
            grad_A.t().to(A.dtype),
            grad_B,
            grad_C,
            None if D is None else grad_D.to(D.dtype),
            grad_z,
            None if dt_bias is None else grad_bias.to(dt_bias.dtype),
            after.transpose(1, 2).to(ctx.state_dtype),
            None,
        )
