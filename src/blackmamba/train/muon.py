"""Muon: every matrix moves by an orthogonal one, so that all its directions learn at one speed.

Letters: e experts (1 for a matrix alone), r rows, c columns.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"
(kellerjordan.github.io/posts/muon), for momentum, Newton-Schulz iteration and its coefficients; Liu
et al. 2025 (arXiv 2502.16982), section 2.2, for weight decay and the size of the step. Stacked
experts are many matrices, each made orthogonal alone, in batched products; torch.optim.Muon takes
no stacks.
"""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from blackmamba.train.mixed import MixedAdamW

if TYPE_CHECKING:
    from blackmamba.train.parallel.shards import Shards

MuonScale = Literal["moonlight", "jordan"]
_A, _B, _C = 3.4445, -4.7750, 2.0315  # a x + b x^3 + c x^5 on each singular value
_ITERATIONS = 5
_EPS = 1e-7


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
        if not isinstance(go, Tensor) or go.device.type == "cpu":
            if not go:
                return
            go = True
        for group in self._own_groups():
            for p in group["params"]:
                if p in gradients:
                    self._move(p, gradients[p].float() * gradient_scale, group, go)

    def _move(
        self, parameter: nn.Parameter, g: Tensor, group: dict[str, Any], go: Tensor | Literal[True]
    ) -> None:
        state, lr = self.state[parameter], group["lr"]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(g, memory_format=torch.contiguous_format)
        m = state["momentum"].lerp(g, 1 - self._momentum)
        whole = g.lerp(m, self._momentum)
        if self.shards is not None:
            whole = self.shards.gather(parameter, whole)
        direction = orthogonal(whole, self._dtype)
        if self.shards is not None:
            direction = self.shards.cut(parameter, direction)
        weight = state.get("master", parameter.data)
        size = lr * step_size(self._scale, *whole.shape[-2:])
        moved = (weight * (1 - lr * group["weight_decay"])).sub_(direction, alpha=size)
        if go is not True:  # only the device knows
            m, moved = m.where(go, state["momentum"]), moved.where(go, weight)
        state["momentum"].copy_(m)
        weight.copy_(moved)
        if weight is not parameter.data:
            parameter.data.copy_(weight)

    def _own_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["is_muons"]]


def orthogonal(x: Tensor, dtype: torch.dtype) -> Tensor:
    """About U V^T for each matrix U S V^T in x (..., r, c): singular values of 0.7 to 1.2.

    A matrix of zeros stays one. The result is float32 and no part of it depends on another matrix.

    Args:
        x: float32.
        dtype: of the products.
    """
    x_erc = x.reshape(-1, *x.shape[-2:])
    is_tall = x_erc.shape[1] > x_erc.shape[2]
    x_erc = x_erc.mT if is_tall else x_erc
    x_erc = x_erc / torch.linalg.matrix_norm(x_erc, keepdim=True).clamp(min=_EPS)
    x_erc = x_erc.to(dtype)
    for _ in range(_ITERATIONS):
        gram_err = x_erc @ x_erc.mT
        factor_err = torch.baddbmm(gram_err, gram_err, gram_err, beta=_B, alpha=_C)
        x_erc = torch.baddbmm(x_erc, factor_err, x_erc, beta=_A)
    return (x_erc.mT if is_tall else x_erc).float().reshape(x.shape)


def step_size(scale: MuonScale, rows: int, columns: int) -> float:
    """What an orthogonal matrix of this shape is multiplied by; see `Muon`."""
    if scale == "moonlight":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))
