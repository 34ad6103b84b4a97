"""Experts of bfloat16 in C++, forward and backward: one call for each kind of product of them all.

Tokens are picked, scaled and put back inside the products, as in `native_grouped`.

Letters: t choices of tokens, sorted by expert; e experts.
"""

from typing import Any

import torch
from torch import Tensor

from blackmamba.ops import native
from blackmamba.ops.activate.native import activate_rows, activate_rows_backward
from blackmamba.ops.checks import readable
from blackmamba.ops.expert_mlp import native_autograd
from blackmamba.ops.expert_mlp.choices import choices_per_token
from blackmamba.ops.native import bfloat16


def pairs_fit(x: Tensor, fc1: Tensor, fc2: Tensor) -> bool:
    """Whether the kernels take these, and are faster than a library's product for each expert."""
    sums = (*fc1.shape[1:], *fc2.shape[1:])
    return (
        native.missing() is None
        and x.dtype == torch.bfloat16
        and bfloat16.multiplied_by() == "pairs"
        and all(n % 2 == 0 and n > 0 for n in sums)
    )


def expert_mlp_native_pairs(
    x: Tensor,
    expert_ids: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    activation: str,
    gated: bool,
    gate: Tensor | None,
) -> Tensor:
    """`expert_mlp` of bfloat16 without biases; sums in float32."""
    gate = None if gate is None else gate.float()
    gelu = activation == "gelu"
    inputs = (x, expert_ids, fc1.to(x.dtype), fc2.to(x.dtype), gate, gelu, gated)
    if readable(x):
        return native_autograd.run(_run, _run_backward, inputs)
    return _forward(*inputs)[0]


def _run(
    x: Tensor,
    expert_ids: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    gate: Tensor | None,
    gelu: bool,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; and for the gradient fc1's output, sorted by expert, that order and the groups' ends."""
    x, fc1, fc2 = native.rows(x), fc1.contiguous(), fc2.contiguous()
    order, ends = native_autograd.sorted_by_expert(expert_ids, len(fc1))
    k = choices_per_token(x, expert_ids)
    h, y = x.new_empty(len(order), fc1.shape[1]), x.new_empty(len(order), x.shape[1])
    _product(x, order if k == 1 else order // k, fc1, h, None, ends)
    scale = None if gate is None else gate.contiguous()
    _product(activate_rows(h, gelu, gated), None, fc2, y, order, ends, scale=scale)
    return y, h, order, ends


def _run_backward(
    grad_y: Tensor,
    x: Tensor,
    expert_ids: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    gate: Tensor | None,
    h: Tensor,
    order: Tensor,
    ends: Tensor,
    gelu: bool,
    gated: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, fc1, fc2 and gate; empty for those not needed."""
    needs_x, needs_fc1, needs_fc2, needs_gate = needs
    grads = native_autograd.empty_gradients((x, fc1, fc2, gate), needs)
    grad_x, grad_fc1, grad_fc2, grad_gate = grads
    x, grad_y, fc1, fc2 = native.rows(x), native.rows(grad_y), fc1.contiguous(), fc2.contiguous()
    scale, k = None if gate is None else gate.contiguous(), choices_per_token(x, expert_ids)

    grad_hidden = x.new_empty(len(order), fc2.shape[2])  # but for the gate
    _product(grad_y, order, fc2, grad_hidden, None, ends, transposed=True)
    dots = grad_gate if needs_gate else None
    grad_h = activate_rows_backward(grad_hidden, h, gelu, gated, scale, dots, order)
    if needs_fc2:
        _outer(grad_y, order, activate_rows(h, gelu, gated), None, grad_fc2, ends, scale=scale)
    if needs_fc1:
        _outer(grad_h, None, x, order if k == 1 else order // k, grad_fc1, ends)
    if needs_x:
        each = grad_x if k == 1 else x.new_empty(len(order), x.shape[1])
        _product(grad_h, None, fc1, each, order, ends, transposed=True)
        if k > 1:
            torch.sum(each.view(len(x), k, -1), 1, out=grad_x)
    return grads


def _product(
    a: Tensor,
    a_rows: Tensor | None,
    b: Tensor,
    c: Tensor,
    c_rows: Tensor | None,
    ends: Tensor,
    *,
    scale: Tensor | None = None,
    transposed: bool = False,
) -> None:
    """c's row c_rows[i] = a's row a_rows[i] times its expert's matrix of b (e, n, k) transposed, or
    of b (e, k, n); times scale[c_rows[i]]."""
    native.extension().grouped_product(
        (a.data_ptr(), a.stride(0), _address(a_rows)),
        b.data_ptr(),
        transposed,
        (c.data_ptr(), c.stride(0), _address(c_rows)),
        _address(scale),
        ends.data_ptr(),
        (len(b), c.shape[1], a.shape[1]),
        torch.get_num_threads(),
    )


def _outer(
    a: Tensor,
    a_rows: Tensor | None,
    b: Tensor,
    b_rows: Tensor | None,
    c: Tensor,
    ends: Tensor,
    *,
    scale: Tensor | None = None,
) -> None:
    """c[j] = a's rows, of expert j, times scale, transposed, times b's rows; 0 for an idle one."""
    native.extension().grouped_outer(
        (a.data_ptr(), a.stride(0), _address(a_rows)),
        _address(scale),
        (b.data_ptr(), b.stride(0), _address(b_rows)),
        c.data_ptr(),
        ends.data_ptr(),
        tuple(c.shape),
        torch.get_num_threads(),
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# ---- what autograd, torch.compile and fake tensors need to know ----------------------------------

_forward = torch.library.custom_op("blackmamba::expert_mlp_pairs", _run, mutates_args=())
_backward = torch.library.custom_op(
    "blackmamba::expert_mlp_pairs_backward", _run_backward, mutates_args=()
)
_forward.register_fake(native_autograd.outputs)


@_backward.register_fake
def _(grad_y: Tensor, x: Tensor, expert_ids: Tensor, *rest: Any) -> list[Tensor]:
    return native_autograd.empty_gradients((x, *rest[:3]), rest[-1])


_forward.register_autograd(native_autograd.gradients(_backward), setup_context=native_autograd.save)
