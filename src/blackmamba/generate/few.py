"""A step of a few sequences on an NVIDIA GPU, in bfloat16, for recording: every kernel is our own.

The kernels are `narrow.py`'s but for the products, which matrix units make (few.cu): what they
multiply is rounded to bfloat16, as in the model's own step, and sums are float32.

Letters: b batch, m d_model, d d_inner, r dt_rank, n d_state, f d_expert, v vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blackmamba.generate.narrow import NarrowStep, floats
from blackmamba.generate.wide import padded
from blackmamba.model import BlackMamba
from blackmamba.model.layer import Layer
from blackmamba.model.mamba import Mamba
from blackmamba.model.mlp import MLP
from blackmamba.model.moe import MoE
from blackmamba.model.norm import LayerNorm, RMSNorm
from blackmamba.model.state import MambaState
from blackmamba.ops.decode import few


class FewStep(NarrowStep):
    """As `NarrowStep`, of a model and a size that `fits`."""

    vectors = torch.bfloat16

    def __init__(
        self,
        model: BlackMamba,
        size: int,
        new: Callable[..., Tensor],
        ids: Tensor,
        logits: Tensor,
    ):
        self._dt = new(size, model.config.d_inner)
        super().__init__(model, size, new, ids, logits)

    def _norm_linear(
        self,
        x: Tensor,
        norm: RMSNorm | LayerNorm | None,
        weight: Tensor,
        out: Tensor,
        *,
        conv: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        if conv is not None:
            assert isinstance(norm, RMSNorm)
            normed = few.Norm(floats(norm.weight), norm.eps)
            self._launches.append(
                few.launcher(x, weight.detach(), out, norm=normed, conv=few.Conv(*conv))
            )
            return
        # the head has too many rows for each block to read the stream and norm it
        y = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
        self._norm(x, norm, y)
        self._launches.append(few.launcher(y, weight.detach(), out))

    def _norm(self, x: Tensor, norm: RMSNorm | LayerNorm | None, y: Tensor) -> None:
        from blackmamba.ops.decode import kernels

        is_layer = isinstance(norm, LayerNorm)
        weight: Any = x if norm is None else floats(norm.weight)
        bias: Any = floats(norm.bias) if isinstance(norm, LayerNorm) else weight
        eps, m = 0.0 if norm is None else norm.eps, x.shape[1]
        self._add(
            kernels.norm_kernel, (len(x),), x, weight, bias, eps, y, m,
            BK=padded(m), NORM=norm is not None, LAYER=is_layer,
        )  # fmt: skip

    def _linear_of_x(self, weight: Tensor) -> None:
        x = self._xz[:, : weight.shape[1]]
        self._launches.append(few.launcher(x, weight.detach(), self._dbc))

    def _update(self, mixer: Mamba, state: MambaState, dt: Tensor | None) -> None:
        weight = mixer.dt_proj.weight.detach()
        # rows of whole 16 bytes: what lies beyond dt is multiplied with zeros
        weight = F.pad(weight, (0, -weight.shape[1] % 8)).contiguous()
        inputs = self._dbc.as_strided((self._size, weight.shape[1]), self._dbc.stride())
        self._launches.append(few.launcher(inputs, weight, self._dt))
        super()._update(mixer, state, self._dt)

    def _add_linear(self, y: Tensor, weight: Tensor, routed: tuple[Tensor, Tensor] | None) -> None:
        to = None if routed is None else few.Routed(*routed)
        self._launches.append(few.launcher(y, weight.detach(), self._x, add=True, routed=to))

    def _expert_in(
        self,
        norm: RMSNorm,
        fc1: Tensor,
        routed: tuple[Tensor, Tensor] | None,
        hidden: Tensor,
        activation: str,
    ) -> None:
        self._launches.append(
            few.launcher(
                self._x, fc1.detach(), hidden, norm=few.Norm(floats(norm.weight), norm.eps),
                routed=None if routed is None else few.Routed(*routed), activation=activation,
            )
        )  # fmt: skip


def fits(model: BlackMamba, size: int) -> bool:
    """Whether `FewStep` can make the model's products for so many sequences. One is left to
    `NarrowStep`, which computes with more places and takes as long."""
    if not 1 < size <= few.MOST or not all(isinstance(each, Layer) for each in model.layers):
        return False
    head = model.embedding.weight if model.head is None else model.head.weight
    weights: list[Any] = [head]
    for layer in model.layers:
        assert isinstance(layer, Layer)
        if isinstance(mixer := layer.mixer, Mamba):
            weights += [mixer.in_proj.weight, mixer.x_proj.weight, mixer.out_proj.weight]
            if mixer.dt_proj.weight.dtype != torch.bfloat16:
                return False
        elif isinstance(part := layer.feed_forward, MoE):
            weights += [part.fc1, part.fc2]
            if model.config.n_experts > few.MOST_EXPERTS:
                return False
        elif isinstance(part, MLP):
            weights += [part.fc1.weight, part.fc2.weight]
        if not isinstance(layer.norm, RMSNorm):
            return False
    return all(isinstance(weight, Tensor) and few.fits(weight) for weight in weights)
