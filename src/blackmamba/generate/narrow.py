"""A step of one or two sequences on a GPU, for recording: every kernel is our own.

Activations are float32 whatever the weights are. Each kernel loads its weights while the one before
it still runs.

Letters: b batch, m d_model, d d_inner, r dt_rank, n d_state, f d_expert, v vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from blackmamba.generate.wide import padded
from blackmamba.model import BlackMamba
from blackmamba.model.layer import Layer
from blackmamba.model.mamba import Mamba
from blackmamba.model.mlp import MLP
from blackmamba.model.moe import MoE
from blackmamba.model.norm import LayerNorm, RMSNorm
from blackmamba.model.state import MambaState
from blackmamba.ops import gpu
from blackmamba.ops.gpu import tuning

NARROW = 2
"""Most sequences for kernels that multiply a matrix with each vector in turn."""


class NarrowStep:
    """What `model.step` computes; all memory is made beforehand.

    Args:
        model: sequential layers, each a Mamba, MLP or MoE layer without biases.
        size: sequences.
        new: makes float32 zeros of a shape.
        ids: (b,) int64, read by each step.
        logits: (b, v) float32, written by each step.
    """

    vectors = torch.float32
    """What products read, but for the stream."""

    def __init__(
        self,
        model: BlackMamba,
        size: int,
        new: Callable[..., Tensor],
        ids: Tensor,
        logits: Tensor,
    ):
        from blackmamba.ops.decode import kernels

        config, self._size = model.config, size
        self.states: list[MambaState | None] = []
        self._launches: list[Callable[[], object]] = []
        m, d, f = config.d_model, config.d_inner, max(config.d_expert, config.d_mlp, 1)
        self._x = new(size, m)
        self._xz, self._y = (new(size, wide).to(self.vectors) for wide in (2 * d, d))
        wide = config.dt_rank + 2 * config.d_state
        self._dbc = new(size, -(-wide // 8) * 8).to(self.vectors)[:, :wide]
        self._hidden, self._gate = new(size, f).to(self.vectors), new(size)
        self._expert = torch.zeros(size, dtype=torch.int64, device=ids.device)
        self._none, self._one = torch.zeros_like(self._expert), torch.ones_like(self._gate)
        table = model.embedding.weight
        self._add(kernels.embed_kernel, (size,), ids, table, self._x, m, BK=padded(m))
        for layer in model.layers:
            assert isinstance(layer, Layer)
            state = None
            if isinstance(layer.mixer, Mamba):
                state = MambaState(new(size, d, config.d_conv - 1), new(size, d, config.d_state))
                self._mamba(layer, layer.mixer, state)
            else:
                self._feed_forward(layer, model)
            self.states.append(state)
        norm = model.final_norm
        head = table if model.head is None else model.head.weight
        assert isinstance(head, Tensor)
        self._norm_linear(self._x, norm, head, logits)

    def __call__(self) -> None:
        """Read `ids`; `logits` are of the tokens after them."""
        for launch in self._launches:
            launch()

    def _add(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        self._launches.append(launcher(kernel, grid, args, options))

    def _add_product(
        self,
        kernel: Any,
        weight: Tensor,
        n_times: int,
        args: tuple[Any, ...],
        options: dict[str, Any],
        *,
        rows: int,
    ) -> None:
        """A kernel that multiplies `rows` rows of a weight, or pairs of rows, with vectors.

        Args:
            n_times: programs for each block of rows.
        """
        width = weight.shape[-1]
        is_pair = rows < weight.shape[-2]

        def cut_launcher(cut: RowCut) -> Callable[[], object]:
            block = max(1, cut.rows // 2) if is_pair else cut.rows
            sizes = {"BN": block, "BK": padded(width), "num_warps": cut.warps}
            return launcher(kernel, (-(-rows // block), n_times), args, options | sizes)

        cut = tuning.pick(
            f"decode, {kernel.__name__}",
            f"b={self._size} rows={rows} width={width} bytes={weight.element_size()}",
            _cut(rows, width, self._size, weight.element_size()),
            lambda: _cuts(rows, width),
            lambda cut: cut_launcher(cut)(),
        )
        self._launches.append(cut_launcher(cut))

    def _norm_linear(
        self,
        x: Tensor,
        norm: RMSNorm | LayerNorm | None,
        weight: Tensor,
        out: Tensor,
        *,
        conv: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        from blackmamba.ops.decode import kernels

        rows, width = weight.shape
        norm_weight: Any = x if norm is None else floats(norm.weight)
        norm_bias: Any = floats(norm.bias) if isinstance(norm, LayerNorm) else norm_weight
        taps, conv_bias, conv_state = conv or (x, x, x)
        args = (
            x, norm_weight, norm_bias, 0.0 if norm is None else norm.eps, weight.detach(), out,
            rows, width, taps, conv_bias, conv_state, rows // 2,
        )  # fmt: skip
        options = {
            "B": self._size, "NORM": norm is not None, "LAYER": isinstance(norm, LayerNorm),
            "CONV": conv is not None, "TAPS": taps.shape[1] if conv else 2,
        }  # fmt: skip
        self._add_product(kernels.norm_linear_kernel, weight, 1, args, options, rows=rows)

    def _mamba(self, layer: Layer, mixer: Mamba, state: MambaState) -> None:
        conv = (floats(mixer.conv_weight), floats(mixer.conv_bias), state.conv)
        self._norm_linear(self._x, layer.norm, mixer.in_proj.weight, self._xz, conv=conv)
        self._linear_of_x(mixer.x_proj.weight)
        self._update(mixer, state, None)
        self._add_linear(self._y, mixer.out_proj.weight, None)

    def _update(self, mixer: Mamba, state: MambaState, dt: Tensor | None) -> None:
        """What dt_proj gives is `dt`, or made by the kernel."""
        from blackmamba.ops.decode import kernels

        d, n = mixer.A_log.shape
        r = mixer.dt_proj.weight.shape[1]
        columns = 32 if dt is None else 64
        A2 = (mixer.decay_rates() / math.log(2)).float().detach().contiguous()
        self._add(
            kernels.update_kernel, (-(-d // columns), self._size),
            self._xz, self._dbc, self._dbc if dt is None else dt, mixer.dt_proj.weight.detach(),
            floats(mixer.dt_bias), A2, floats(mixer.D), state.ssm, self._y, d, r, n,
            self._dbc.stride(0), BD=columns, BR=padded(r), N=padded(n), PRODUCT=dt is None,
        )  # fmt: skip

    def _linear_of_x(self, weight: Tensor) -> None:
        """x_proj reads the first half of each row of xz."""
        from blackmamba.ops.decode import kernels

        rows, width = weight.shape
        self._add(
            kernels.project_kernel, (rows,), self._xz, weight.detach(), self._dbc, rows, width,
            self._dbc.stride(0), B=self._size, BK=padded(width), num_warps=4,
        )  # fmt: skip

    def _add_linear(self, y: Tensor, weight: Tensor, routed: tuple[Tensor, Tensor] | None) -> None:
        from blackmamba.ops.decode import kernels

        *_, rows, width = weight.shape
        ids, gate = routed or (self._none, self._one)
        args = (y, weight.detach(), self._x, rows, width, ids, gate, y.shape[1])
        options = {"B": 1 if routed else self._size, "ROUTED": routed is not None}
        n_times = self._size if routed else 1
        self._add_product(kernels.add_linear_kernel, weight, n_times, args, options, rows=rows)

    def _feed_forward(self, layer: Layer, model: BlackMamba) -> None:
        from blackmamba.ops.decode import kernels

        part, norm = layer.feed_forward, layer.norm
        m, eps, weight = model.config.d_model, norm.eps, floats(norm.weight)
        routed = None
        if isinstance(part, MoE):
            routed = (self._expert, self._gate)
            router = part.router
            e = router.weight.shape[0]
            self._add(
                kernels.route_kernel, (self._size,),
                self._x, weight, eps, floats(router.weight), floats(router.bias), *routed, m, e,
                BE=min(8, padded(e)), BK=padded(m), num_warps=8,
            )  # fmt: skip
            fc1, fc2 = part.fc1, part.fc2
        else:
            assert isinstance(part, MLP)
            fc1, fc2 = part.fc1.weight, part.fc2.weight
        assert isinstance(fc1, Tensor)
        assert isinstance(fc2, Tensor)
        f = fc2.shape[-1]
        hidden = self._hidden
        if f != hidden.shape[1]:
            hidden = hidden.new_zeros(self._size, f)
        assert isinstance(norm, RMSNorm)
        self._expert_in(norm, fc1, routed, hidden, model.config.activation)
        self._add_linear(hidden, fc2, routed)

    def _expert_in(
        self,
        norm: RMSNorm,
        fc1: Tensor,
        routed: tuple[Tensor, Tensor] | None,
        hidden: Tensor,
        activation: str,
    ) -> None:
        from blackmamba.ops.decode import kernels

        ids, _ = routed or (self._none, self._one)
        f = hidden.shape[1]
        args = (
            self._x, floats(norm.weight), norm.eps, fc1.detach(), ids, hidden, self._x.shape[1], f,
        )  # fmt: skip
        gelu = {"GELU": activation == "gelu"}
        self._add_product(kernels.expert_in_kernel, fc1, self._size, args, gelu, rows=f)


def launcher(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
) -> Callable[[], object]:
    """A call that launches the kernel, before the one ahead of it ends where the GPU can."""
    overlapped = gpu.can_overlap()
    options = {**options, "PDL": overlapped} | ({"launch_pdl": True} if overlapped else {})
    return functools.partial(kernel[grid], *args, **options)


def floats(tensor: Tensor) -> Tensor:
    """In one piece, for kernels that read float32."""
    return tensor.detach().float().contiguous()


@dataclasses.dataclass(frozen=True)
class RowCut:
    """How a product with few vectors is cut into programs."""

    rows: int
    """Of the weight; half as many pairs of rows."""
    warps: int


def _cut(rows: int, width: int, size: int, n_bytes: int) -> RowCut:
    """128 numbers of the weight a thread, 64 of wide ones and of float32, fewer where the rows
    would not keep all processors busy. Every program norms the vectors for itself: for two, of a
    weight with very many rows, 256. Chosen by measuring on an H200."""
    whole = padded(width)
    numbers = 16_384 if size == 1 or rows < 16_384 else 32_768
    if whole > 2048 or n_bytes > 2:
        numbers = 8192
    block = max(1, numbers // whole)
    while block > 1 and rows // block < 264 and not gpu.interpreted():
        block //= 2
    return RowCut(block, 4 if whole <= 8192 else 8)


def _cuts(rows: int, width: int) -> list[RowCut]:
    """What `blackmamba tune` tries: 16 to 256 numbers of the weight a thread."""
    whole = padded(width)
    return [
        RowCut(block, warps)
        for block in (1, 2, 4, 8, 16)
        for warps in (2, 4, 8, 16)
        if block <= rows and 16 <= block * whole // (32 * warps) <= 256
    ]
