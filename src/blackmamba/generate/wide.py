"""A step of many sequences on a GPU, for recording: the model's own parts, its memory in place.

Letters: b batch, d d_inner, r dt_rank, n d_state, v vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from blackmamba.generate.decoder import beyond_the_paper
from blackmamba.model import BlackMamba
from blackmamba.model.layer import Layer
from blackmamba.model.mamba import Mamba
from blackmamba.model.moe import MoE
from blackmamba.model.state import MambaState
from blackmamba.ops import expert_mlp, gpu


class WideStep:
    """What `model.step` computes; the convolution and the SSM update their memory where it lies.

    Args:
        model: sequential layers, each a Mamba, MLP or MoE layer without biases.
        size: sequences.
        new: makes float32 zeros of a shape.
    """

    def __init__(self, model: BlackMamba, size: int, new: Callable[..., Tensor]):
        self._model, self._size = model, size
        self._has_kernel = beyond_the_paper(model.config) is None
        self._gate = new(size)
        self._expert_ids = torch.zeros_like(self._gate, dtype=torch.int64)
        self.states: list[MambaState | None] = []
        self._constants: list[tuple[Tensor, ...]] = []
        d, n, taps = model.config.d_inner, model.config.d_state, model.config.d_conv
        for layer in model.layers:
            assert isinstance(layer, Layer)
            if not isinstance(layer.mixer, Mamba):
                self.states.append(None)
                self._constants.append(())
                continue
            mixer = layer.mixer
            self.states.append(MambaState(new(size, d, taps - 1), new(size, d, n)))
            constants = (
                mixer.conv_weight,
                mixer.conv_bias,
                mixer.dt_bias,
                mixer.decay_rates() / math.log(2),
                mixer.D,
            )
            self._constants.append(tuple(c.detach().float().contiguous() for c in constants))

    @torch.no_grad()
    def __call__(self, ids: Tensor, logits: Tensor) -> None:
        """Read ids (b,); logits (b, v) of the tokens after them go to `logits`."""
        model = self._model
        x, update = model._embed(ids), None
        for layer, state, constants in zip(
            model._stack(), self.states, self._constants, strict=True
        ):
            x, y = layer.norm.add(x, update, model.compute_dtype)
            if isinstance(layer.mixer, Mamba):
                assert state is not None
                update = self._mamba(layer.mixer, y, state, constants)
            elif isinstance(layer.feed_forward, MoE):
                update = self._moe(layer, layer.feed_forward, x, y)
            else:
                assert layer.feed_forward is not None
                update = layer.feed_forward(y)
        logits.copy_(model._logits(model._normed(x, update)))

    def _moe(self, layer: Layer, part: MoE, x: Tensor, y: Tensor) -> Tensor:
        """One kernel chooses the experts of y = norm(x): logits, argmax and gate together; where
        there is more to it than these, the layer does what it always does."""
        if not self._has_kernel:
            return part(y, balanced=False)[0]
        from blackmamba.ops.decode import kernels

        weight, bias = part.router.weight, part.router.bias
        e, m = weight.shape
        gpu.launch(
            kernels.route_kernel, (self._size,),
            x, layer.norm.weight.detach().float(), layer.norm.eps, weight.detach().float(),
            bias.detach().float(), self._expert_ids, self._gate, m, e,
            BE=min(8, padded(e)), BK=padded(m), PDL=False, num_warps=8,
        )  # fmt: skip
        assert isinstance(part.fc1, Tensor)
        assert isinstance(part.fc2, Tensor)
        return expert_mlp(
            y, self._expert_ids, part.fc1, part.fc2, activation=part.activation, gate=self._gate
        )

    def _mamba(
        self, mixer: Mamba, u: Tensor, state: MambaState, constants: tuple[Tensor, ...]
    ) -> Tensor:
        from blackmamba.ops.decode import kernels

        conv_weight, conv_bias, dt_bias, A2, D = constants
        d, n = A2.shape
        r = mixer.dt_proj.weight.shape[1]
        xz = mixer.in_proj(u)
        gpu.launch(
            kernels.conv_kernel, (-(-d // 256), self._size),
            xz, conv_weight, conv_bias, state.conv, d, TAPS=conv_weight.shape[1], BD=256,
        )  # fmt: skip
        dbc = torch.cat(mixer.dt_B_C(xz[:, :d]), 1) if mixer.dt_norm else mixer.x_proj(xz[:, :d])
        y = u.new_empty(self._size, d)
        gpu.launch(
            kernels.update_kernel, (-(-d // 64), self._size),
            xz, dbc, mixer.dt_proj(dbc[:, :r]), dt_bias, dt_bias, A2, D, state.ssm, y, d, r, n,
            dbc.stride(0), BD=64, BR=16, N=padded(n), PRODUCT=False, PDL=False,
        )  # fmt: skip
        return mixer.out_proj(y)


def padded(size: int) -> int:
    """A power of two that Triton's products take."""
    return max(16, 1 << (size - 1).bit_length())
