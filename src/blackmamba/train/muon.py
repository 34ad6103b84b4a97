"""Muon: every matrix moves by an orthogonal one, so that all its directions learn at one speed.

Letters: e experts (1 for a matrix alone), r rows, c columns.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"
(kellerjordan.github.io/posts/muon), for momentum, Newton-Schulz iteration and its coefficients; Liu
et al. 2025 (arXiv 2502.16982), section 2.2, for weight decay and the size of the step. Stacked
experts are many matrices, each made orthogonal alone, in batched products; torch.optim.Muon takes
no stacks.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from blackmamba.train.mixed import MixedAdamW, on_device

if TYPE_CHECKING:
    from blackmamba.train.parallel.shards import Shards

MuonScale = Literal["moonlight", "jordan"]
_A, _B, _C = 3.4445, -4.7750, 2.0315  # a x + b x^3 + c x^5 on each singular value
_ITERATIONS = 5
_EPS = 1e-7
_TOGETHER = 1 << 16, 1 << 24
"""Numbers of matrices that are multiplied together, on a CPU and on a GPU."""


def is_muons(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon updates the parameter of this name: the layers' matrices, stacked or not.

    Embedding, head, router, convolution, norms, biases, A_log and D are AdamW's.
    """
    parts = name.split(".")
    is_bias = parts[-1].endswith("bias")
    others = ("embedding", "head", "router", "conv_weight", "A_log", "D")
    return parameter.dim() >= 2 and not is_bias and not any(p in others for p in parts)


class Muon(MixedAdamW):
    """Muon for the groups with "is_muons", AdamW for the others; float32, or narrow with masters.

        m = momentum m + (1 - momentum) g
        w = w - lr decay w - lr size orthogonal(g + momentum (m - g))

    Args:
        groups: each with "weight_decay" and "is_muons"; "lr_ratio": see `train_step`.
        lr, betas, eps, masters: see `MixedAdamW`.
        momentum: 0 .. 1.
        scale: the size of a step. "moonlight": 0.2 sqrt(max(r, c)), which makes its root mean
            square that of AdamW's, so that both take the same learning rate; "jordan":
            sqrt(max(1, r / c)).
        dtype: of the products that make a matrix orthogonal.
    Raises:
        ValueError: a narrow parameter of Muon has no master: its small steps would be lost.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        masters: Mapping[nn.Parameter, Tensor],
        *,
        momentum: float,
        scale: MuonScale,
        dtype: torch.dtype,
    ):
        super().__init__(groups, lr, betas, eps, masters)
        self._momentum, self._dtype = momentum, dtype
        self._scale: MuonScale = scale
        self.shards: Shards | None = None
        """Where this process holds pieces of the parameters: puts the matrices together."""
        for group in self._own_groups():
            for p in group["params"]:
                if p not in masters and p.dtype != torch.float32:
                    raise ValueError(f"a parameter of {p.dtype} for Muon has no float32 master")
                self.quantities[p] = ("momentum", *(("master",) if p in masters else ()))

    @torch.no_grad()
    def update(
        self,
        gradients: Mapping[nn.Parameter, Tensor],
        *,
        gradient_scale: Tensor | float = 1.0,
        go: Tensor | bool = True,
    ) -> None:
        """See `MixedAdamW.update`."""
        own = {p for group in self._own_groups() for p in group["params"]}
        others = {p: g for p, g in gradients.items() if p not in own}
        super().update(others, gradient_scale=gradient_scale, go=go)
        moved = [p for p in own if p in gradients]
        if not isinstance(go, Tensor) or any(p.device.type == "cpu" for p in moved):
            if not go:
                return
            go = True
        for group in self._own_groups():
            given = [p for p in group["params"] if p in gradients]
            for members in self._together(given):
                found = [_scaled(gradients[p], gradient_scale) for p in members]
                self._move(members, found, group, go)

    def _together(self, parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Those whose matrices are of one shape, so that one product is started for many.

        Pieces of parameters are put together one by one, in the same order on all ranks.
        """
        if self.shards is not None:
            return [[p] for p in parameters]
        found: list[list[nn.Parameter]] = []
        room: dict[torch.Size, tuple[list[nn.Parameter], int]] = {}
        for p in parameters:
            matrix = p.shape[-2:]
            members, left = room.get(matrix, ([], 0))
            if p.numel() > left:
                members, left = [], _TOGETHER[p.device.type == "cuda"]
                found.append(members)
            members.append(p)
            room[matrix] = members, left - p.numel()
        return found

    def _move(
        self,
        members: Sequence[nn.Parameter],
        gradients: list[Tensor],
        group: dict[str, Any],
        go: Tensor | Literal[True],
    ) -> None:
        """Parameters whose matrices are of one shape; the gradients are written on."""
        states, lr = [self.state[p] for p in members], group["lr"]
        for state, g in zip(states, gradients, strict=True):
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(g, memory_format=torch.contiguous_format)
        momenta = [state["momentum"] for state in states]
        if go is not True:  # only the device knows: towards itself no momentum moves
            gradients = [g.where(go, m) for g, m in zip(gradients, momenta, strict=True)]
        torch._foreach_lerp_(momenta, gradients, 1 - self._momentum)
        torch._foreach_lerp_(gradients, momenta, self._momentum)
        wholes = gradients
        if self.shards is not None:
            wholes = list(map(self.shards.gather, members, gradients))
        directions = orthogonal_together(wholes, self._dtype)
        if self.shards is not None:
            directions = list(map(self.shards.cut, members, directions))
        weights = [state.get("master", p.data) for state, p in zip(states, members, strict=True)]
        kept = 1 - lr * group["weight_decay"]
        size = lr * step_size(self._scale, *wholes[0].shape[-2:])
        if go is True:
            torch._foreach_mul_(weights, kept)
            torch._foreach_add_(weights, directions, alpha=-size)
        else:
            taken = go.float()  # 1 or 0
            torch._foreach_mul_(weights, (kept - 1) * taken + 1)
            for weight, direction in zip(weights, directions, strict=True):
                weight.addcmul_(direction, -size * taken)
        for p, weight in zip(members, weights, strict=True):
            if weight is not p.data:
                p.data.copy_(weight)

    def _own_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["is_muons"]]


def _scaled(gradient: Tensor, scale: Tensor | float) -> Tensor:
    """A new one in float32; in one pass, a scalar on the device has a dimension for that."""
    if not isinstance(scale, Tensor):
        return gradient.float() * scale
    return gradient * on_device(gradient.device, scale).float().view(1)


def orthogonal(x: Tensor, dtype: torch.dtype) -> Tensor:
    """About U V^T for each matrix U S V^T in x (..., r, c): singular values of 0.7 to 1.2.

    A matrix of zeros stays one. The result is float32 and no part of it depends on another matrix.

    Args:
        x: float32.
        dtype: of the products.
    """
    x_erc = x.reshape(-1, *x.shape[-2:])
    is_tall = x_erc.shape[1] > x_erc.shape[2]
    x_erc = x_erc / torch.linalg.matrix_norm(x_erc, keepdim=True).clamp(min=_EPS)
    x_erc = x_erc.to(dtype)
    for _ in range(_ITERATIONS):  # (X X^T) X = X (X^T X): by the smaller square, nothing turned
        gram = x_erc.mT @ x_erc if is_tall else x_erc @ x_erc.mT
        factor = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        pair = (x_erc, factor) if is_tall else (factor, x_erc)
        x_erc = torch.baddbmm(x_erc, *pair, beta=_A)
    return x_erc.float().reshape(x.shape)


def orthogonal_together(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`orthogonal` of each; their matrices are of one shape."""
    if len(tensors) == 1:
        return [orthogonal(tensors[0], dtype)]
    stacks = [x.reshape(-1, *x.shape[-2:]) for x in tensors]
    found = orthogonal(torch.cat(stacks), dtype).split([len(stack) for stack in stacks])
    return [y.view(x.shape) for y, x in zip(found, tensors, strict=True)]


def step_size(scale: MuonScale, rows: int, columns: int) -> float:
    """What an orthogonal matrix of this shape is multiplied by; see `Muon`."""
    if scale == "moonlight":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))
