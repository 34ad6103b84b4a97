"""Tokens sorted by expert, then one product per group."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from blackmamba.ops.activate import activate
from blackmamba.ops.checks import readable
from blackmamba.ops.expert_mlp.choices import choices_per_token, summed
from blackmamba.ops.linear import linear, product


def expert_mlp_grouped(
    x: Tensor,
    expert_ids: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    activation: Literal["silu", "gelu"],
    gated: bool,
    fc1_bias: Tensor | None,
    fc2_bias: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    """`expert_mlp` by sorting; waits for the device only where it has no grouped product."""
    k = choices_per_token(x, expert_ids)
    if len(expert_ids) == 1 and readable(expert_ids):
        chosen = int(expert_ids)  # one token, as in generation: nothing to sort
        y = linear(x, fc1[chosen].to(x.dtype), _row(fc1_bias, chosen, x.dtype))
        y = activate(y, activation, gated)
        y = linear(y, fc2[chosen].to(x.dtype), _row(fc2_bias, chosen, x.dtype))
        return y if gate is None else (y * gate[:, None]).to(x.dtype)

    sorted_ids, order = torch.sort(expert_ids, stable=True)
    place = torch.empty_like(order)  # of each choice among the sorted ones
    place.scatter_(0, order, torch.arange(len(order), device=order.device))
    experts = torch.arange(len(fc1), device=order.device)
    ends = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)  # of each group

    product = _product(x, fc1, fc2)
    h = product(_reorder(x, order, place, k), fc1, ends)
    if fc1_bias is not None:
        h = h + F.embedding(sorted_ids, fc1_bias.to(x.dtype))
    h = activate(h, activation, gated)
    y = product(h, fc2, ends)
    if fc2_bias is not None:
        y = y + F.embedding(sorted_ids, fc2_bias.to(x.dtype))
    y = _reorder(y, place, order)
    return y if gate is None else (y * gate[:, None]).to(x.dtype)


def _row(bias: Tensor | None, chosen: int, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias[chosen].to(dtype)


def _product(x: Tensor, fc1: Tensor, fc2: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function of sorted rows (t, in), weights (e, out, in) and group ends to (t, out).

    The weights are cast to the rows' dtype, their gradient is of their own.

    torch's grouped product takes bfloat16 rows of a multiple of 16 bytes on CUDA; elsewhere one
    product per group is as fast (measured on CPU, 1 to 2,048 tokens), and takes any dtype.
    """
    aligned = all(size * x.element_size() % 16 == 0 for size in (*fc1.shape[1:], *fc2.shape[1:]))
    if x.device.type == "cuda" and x.dtype == torch.bfloat16 and aligned:
        return _one_call
    return _call_per_group


def _one_call(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    grouped = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return grouped(rows, weight.to(rows.dtype).transpose(1, 2), offs=ends)


# Of bfloat16 rows on a CPU, products take this many times a whole number. oneDNN compiles a program
# for every shape that it meets, and groups have another size in every step.
_RUN = 16


@torch.library.custom_op("blackmamba::grouped_linear", mutates_args=())
def _call_per_group(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows[group j] @ weight[j]^T for each group j; on a GPU this waits for `ends`."""
    out = rows.new_empty(len(rows), weight.shape[1])
    for j, group in _groups(ends):
        of_group = weight[j].to(rows.dtype)  # one by one: the cast numbers are still in the cache
        if not _wants_whole_runs(rows):
            out[group] = product(rows[group], of_group)
            continue
        window = _window(group, len(rows))
        if window.start == group.start:  # the next groups write over what is too much
            torch.mm(rows[window], of_group.t(), out=out[window])
        else:
            before = group.start - window.start
            size = group.stop - group.start
            out[group] = (rows[window] @ of_group.t())[before : before + size]
    return out


@torch.library.custom_op("blackmamba::grouped_outer", mutates_args=())
def _grouped_outer(left: Tensor, right: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """left[group j]^T @ right[group j] for each group j, in dtype; zeros for an empty group."""
    out = left.new_empty(len(ends), left.shape[1], right.shape[1], dtype=dtype)
    narrow = left.new_empty(out.shape[1:]) if dtype != left.dtype else None
    idle = set(range(len(ends)))
    for j, group in _groups(ends):
        idle.remove(j)
        if not _wants_whole_runs(left):
            out[j] = product(left[group].t(), right[group].t())
            continue
        window = _window(group, len(left))
        to = out[j] if narrow is None else narrow
        if left.shape[1] < right.shape[1]:
            torch.mm(_alone(left, group, window).t(), right[window], out=to)
        else:
            torch.mm(left[window].t(), _alone(right, group, window), out=to)
        if narrow is not None:
            out[j] = narrow
    for j in idle:
        out[j] = 0
    return out


def _wants_whole_runs(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.dtype == torch.bfloat16 and len(rows) >= 16 * _RUN


def _window(group: slice, n_rows: int) -> slice:
    """A whole number of runs that holds the group: from its first row on where there is room."""
    length = min(n_rows, -(-(group.stop - group.start) // _RUN) * _RUN)
    start = min(group.start, n_rows - length)
    return slice(start, start + length)


def _alone(rows: Tensor, group: slice, window: slice) -> Tensor:
    """rows[window] with zeros outside of the group."""
    alone = rows.new_zeros(window.stop - window.start, rows.shape[1])
    alone[group.start - window.start : group.stop - window.start] = rows[group]
    return alone


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Number and rows of each group that is not empty."""
    start = 0
    for j, end in enumerate(ends.tolist()):
        if end > start:
            yield j, slice(start, end)
        start = end


@_call_per_group.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@_grouped_outer.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1], dtype=dtype)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, weight, ends = ctx.saved_tensors
    g = g.contiguous()
    grad_rows = (
        _call_per_group(g, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    )
    grad_weight = _grouped_outer(g, rows, ends, weight.dtype) if ctx.needs_input_grad[1] else None
    return grad_rows, grad_weight, None


_call_per_group.register_autograd(_gradients, setup_context=_save)


def _reorder(rows: Tensor, order: Tensor, inverse: Tensor, k: int = 1) -> Tensor:
    """rows[order // k]; knowing the inverse permutation, its gradient is a gather too."""
    return cast(Tensor, _Reorder.apply(rows, order, inverse, k))


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return rows.index_select(0, order if k == 1 else order // k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = grads[0].index_select(0, ctx.saved_tensors[0])
        return found if ctx.k == 1 else summed(found, len(found) // ctx.k), None, None, None
