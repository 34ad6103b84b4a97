"""Tokens by the group: picked, scaled and put back by the native products themselves.

Where groups are short, the forward pass in float32 reads each weight where it lies, as for a few
tokens without gradients.
"""

from typing import Any

import torch
from torch import Tensor

from blackmamba.ops import native
from blackmamba.ops.activate.native import activate_rows, activate_rows_backward
from blackmamba.ops.checks import readable
from blackmamba.ops.expert_mlp import native_autograd
from blackmamba.ops.expert_mlp.choices import choices_per_token
from blackmamba.ops.expert_mlp.native_few import run_few_tokens
from blackmamba.ops.linear.native import groups, multiply_groups, multiply_outer_groups

FEW_OF_EXPERT = 8  # choices for each expert there is, up to which float32 weights are not packed


def expert_mlp_native_grouped(
    x: Tensor,
    expert_ids: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    activation: str,
    gated: bool,
    fc1_bias: Tensor | None,
    fc2_bias: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    """`expert_mlp` of float32, or of bfloat16 with sums in float32."""
    fc1, fc2 = fc1.to(x.dtype), fc2.to(x.dtype)
    fc1_bias, fc2_bias, gate = (
        None if t is None else t.float() for t in (fc1_bias, fc2_bias, gate)
    )
    weights = (fc1, fc2, fc1_bias, fc2_bias, gate)
    inputs = (x, expert_ids, *weights, activation == "gelu", gated)
    if readable(x):
        return native_autograd.run(_run, _run_backward, inputs)
    return _forward(*inputs)[0]


def _run(
    x: Tensor,
    expert_ids: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    fc1_bias: Tensor | None,
    fc2_bias: Tensor | None,
    gate: Tensor | None,
    gelu: bool,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; and for the gradient fc1's output, sorted by expert, that order and the groups' ends.

    Several choices of a token read its row of x where it is.
    """
    order, ends = native_autograd.sorted_by_expert(expert_ids, len(fc1))
    h = x.new_empty(len(order), fc1.shape[1])
    if _are_few(x, expert_ids, fc1, fc2):
        y = run_few_tokens(x, expert_ids, fc1, fc2, fc1_bias, fc2_bias, gate, gated, gelu, h)
        return y, h, order, ends
    k = choices_per_token(x, expert_ids)
    tokens = order if k == 1 else order // k
    x, scale = native.rows(x), _contiguous(gate)
    y = x.new_empty(len(order), x.shape[1])
    multiply_groups(x, fc1, h, ends, a_rows=tokens, bias=_contiguous(fc1_bias))
    hidden, bias = activate_rows(h, gelu, gated), _contiguous(fc2_bias)
    multiply_groups(hidden, fc2, y, ends, out_rows=order, out_scale=scale, bias=bias)
    return y, h, order, ends


def _run_backward(
    grad_y: Tensor,
    x: Tensor,
    expert_ids: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    fc1_bias: Tensor | None,
    fc2_bias: Tensor | None,
    gate: Tensor | None,
    h: Tensor,
    order: Tensor,
    ends: Tensor,
    gelu: bool,
    gated: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, fc1, fc2, fc1_bias, fc2_bias and gate; empty for those not needed."""
    needs_x, needs_fc1, needs_fc2, needs_b1, needs_b2, needs_gate = needs
    grads = native_autograd.empty_gradients((x, fc1, fc2, fc1_bias, fc2_bias, gate), needs)
    grad_x, grad_fc1, grad_fc2, grad_b1, grad_b2, grad_gate = grads
    x, grad_y, scale = native.rows(x), native.rows(grad_y), _contiguous(gate)
    k = choices_per_token(x, expert_ids)

    grad_hidden = x.new_empty(len(order), fc2.shape[2])  # but for the gate
    multiply_groups(grad_y, fc2.transpose(1, 2), grad_hidden, ends, a_rows=order)
    dots = grad_gate if needs_gate else None
    grad_h = activate_rows_backward(grad_hidden, h, gelu, gated, scale, dots, order)
    if needs_fc2:
        hidden = activate_rows(h, gelu, gated)
        multiply_outer_groups(grad_y, hidden, grad_fc2, ends, a_rows=order, a_scale=scale)
    if needs_fc1:
        multiply_outer_groups(grad_h, x, grad_fc1, ends, b_rows=order if k == 1 else order // k)
    if needs_x:
        grad_each = grad_x if k == 1 else x.new_empty(len(order), x.shape[1])
        multiply_groups(grad_h, fc1.transpose(1, 2), grad_each, ends, out_rows=order)
        if k > 1:
            torch.sum(grad_each.view(len(x), k, -1), 1, out=grad_x)
    if needs_b1 or needs_b2:
        for j, group in groups(ends):
            if needs_b1:
                grad_b1[j] = grad_h[group].sum(0, dtype=torch.float32)
            if needs_b2:
                g = grad_y[order[group]]
                g = g if scale is None else g * scale[order[group]][:, None]
                grad_b2[j] = g.sum(0, dtype=torch.float32)
    if needs_gate and fc2_bias is not None:
        grad_gate += (grad_y * fc2_bias[expert_ids]).sum(-1)
    return grads


def _are_few(x: Tensor, expert_ids: Tensor, fc1: Tensor, fc2: Tensor) -> bool:
    """Whether packing a weight costs more than it saves. By shapes alone: so are a row's bits."""
    return (
        x.dtype == torch.float32
        and fc1.is_contiguous()
        and fc2.is_contiguous()
        and len(expert_ids) <= FEW_OF_EXPERT * len(fc1)
    )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


# ---- what autograd, torch.compile and fake tensors need to know ----------------------------------

_forward = torch.library.custom_op("blackmamba::expert_mlp", _run, mutates_args=())
_backward = torch.library.custom_op(
    "blackmamba::expert_mlp_backward", _run_backward, mutates_args=()
)
_forward.register_fake(native_autograd.outputs)


@_backward.register_fake
def _(grad_y: Tensor, x: Tensor, expert_ids: Tensor, *rest: Any) -> list[Tensor]:
    return native_autograd.empty_gradients((x, *rest[:5]), rest[-1])


_forward.register_autograd(native_autograd.gradients(_backward), setup_context=native_autograd.save)
