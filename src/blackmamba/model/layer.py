"""How one layer is wired into the residual stream.

A layer has a mixer (Mamba or attention), a feed-forward part (dense or routed), or both side by
side:

    one part:       x <- x + part(norm(x))
    parallel pair:  x <- x + mixer(norm(x)) + feed_forward(feed_forward_norm(x))

A layer does not add its output to the stream itself. It returns both, and the next norm adds them
as it reads them: one pass over memory instead of two.

Source: BlackMamba (arXiv 2402.01771) and the authors' code, where every layer adds to the raw
stream; the equation as printed in the paper leaves the mixer's output out of the outer sum.
"""

from contextlib import AbstractContextManager
from functools import partial
from typing import assert_never

import torch
from torch import Tensor, nn

from blackmamba.config import LayerSpec, ModelConfig
from blackmamba.model.attention import Attention
from blackmamba.model.balance import Losses, RouterLoad, router_load, wants_load
from blackmamba.model.mamba import Mamba
from blackmamba.model.mlp import MLP
from blackmamba.model.moe import MoE
from blackmamba.model.norm import RMSNorm
from blackmamba.model.router import Routing
from blackmamba.model.state import LayerState
from blackmamba.ops.recompute import Recompute, not_kept
from blackmamba.ops.sequence import Pieces


class Trace:
    """Filled in by a forward pass that is given one: what went on inside, by layer index from 0.

    Args:
        keep_hidden: whether `hidden` is wanted.

    (Not a dataclass, because FSDP takes the tensors in one for inputs of the layer.)
    """

    def __init__(self, keep_hidden: bool = False):
        self.keep_hidden = keep_hidden
        self.hidden: dict[int, Tensor] = {}
        """The residual stream (b, l, m) after each layer; only if keep_hidden."""
        self.routing: dict[int, Routing] = {}
        """Of each layer with experts; tokens in row-major order of (b, l)."""
        self.losses: Losses | None = None
        """Of `BlackMamba.loss`."""


class Layer(nn.Module):
    """One entry of the layer pattern."""

    def __init__(
        self,
        config: ModelConfig,
        spec: LayerSpec,
        index: int,
        *,
        device: torch.device | None,
        dtype: torch.dtype,
        wide: torch.dtype,
        compute_dtype: torch.dtype,
    ):
        super().__init__()
        self.index = index
        self.config = config
        self.compute_dtype = compute_dtype
        self.recompute: Recompute = "none"
        self.norm = RMSNorm(config.d_model, config.norm_eps, device=device, dtype=wide)
        self.mixer: Mamba | Attention | None = None
        if spec.mixer == "mamba":
            self.mixer = Mamba(config, device=device, dtype=dtype, wide=wide)
        elif spec.mixer == "attention":
            self.mixer = Attention(config, device=device, dtype=dtype)
        elif spec.mixer != "none":
            assert_never(spec.mixer)

        self.feed_forward: MLP | MoE | None = None
        self.feed_forward_norm: RMSNorm | None = None
        if spec.feed_forward == "mlp":
            self.feed_forward = MLP(config, config.d_mlp, device=device, dtype=dtype)
        elif spec.feed_forward == "moe":
            self.feed_forward = MoE(config, spec.n_experts, device=device, dtype=dtype, wide=wide)
        if self.mixer is not None and self.feed_forward is not None:
            self.feed_forward_norm = RMSNorm(
                config.d_model, config.norm_eps, device=device, dtype=wide
            )

    def initial_state(self, batch_size: int) -> LayerState:
        """Memory of a mixer that has read nothing; None if there is no mixer."""
        return (
            None if self.mixer is None else self.mixer.initial_state(batch_size, self.compute_dtype)
        )

    def forward(
        self,
        x: Tensor,
        update: Tensor | None,
        state: LayerState | Pieces,
        lengths: Tensor | None,
        seq_idx: Tensor | None,
        trace: Trace | None,
    ) -> tuple[Tensor, Tensor, LayerState, RouterLoad | None]:
        """Read a piece of each sequence.

        Args:
            x: (b, l, m), the residual stream as it was before the last layer.
            update: (b, l, m), what that layer adds to it; None: nothing.
            state: the mixer's memory of what came before, None for nothing; `Pieces`: see `Mamba`.
            lengths: (b,) int64, rows are right-padded.
            seq_idx: (b, l), integers: which document of its row each token is of; negative: a pad.
            trace: filled with what went on inside.
        Returns:
            x + update, what this layer adds to that, the mixer's new memory, and in training, if
            the configuration wants it, how the experts were used.
        """
        x, y = self.norm.add(x, update, self.compute_dtype)
        update, memory = None, None
        if self.mixer is not None:
            with self._not_kept(y, self.norm, x):
                update, memory = self.mixer(y, state, lengths, seq_idx)
        update, routing = self._fed(x, y, update)
        load = None
        if routing is not None:
            if trace is not None:
                trace.routing[self.index] = routing
            if self.training and wants_load(self.config):
                counted = None if seq_idx is None else seq_idx.flatten() >= 0
                load = router_load(routing, self.config, counted)
        if trace is not None and trace.keep_hidden:
            trace.hidden[self.index] = x + update
        return x, update, memory, load

    def step(self, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        """One token: x (b, m) through this layer, and the mixer's new memory."""
        y, update = self.norm(x, self.compute_dtype), None
        if self.mixer is not None:
            update, state = self.mixer.step(y, state)  # pyright: ignore[reportArgumentType] # its own kind of state
        return x + self._fed(x, y, update)[0], state

    def _fed(self, x: Tensor, y: Tensor, update: Tensor | None) -> tuple[Tensor, Routing | None]:
        """Add the feed-forward part to the mixer's update. Its input is y = norm(x), or in a
        parallel pair its own norm of x."""
        routing = None
        if self.feed_forward is not None:
            norm = self.norm
            if self.feed_forward_norm is not None:
                norm = self.feed_forward_norm
                y = norm(x, self.compute_dtype)
            with self._not_kept(y, norm, x):
                if isinstance(self.feed_forward, MoE):
                    fed, routing = self.feed_forward(y)
                else:
                    fed = self.feed_forward(y)
            update = fed if update is None else update + fed
        assert update is not None  # a layer has at least one part
        return update, routing

    def _not_kept(self, y: Tensor, norm: RMSNorm, x: Tensor) -> AbstractContextManager[object]:
        again = partial(norm, x, self.compute_dtype)
        return not_kept(y, again, self.training and self.recompute == "cheap")
