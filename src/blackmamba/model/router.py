"""Which expert each token goes to, and with what weight.

Letters: t tokens, m d_model, e experts.

Source: BlackMamba (arXiv 2402.01771), section on the router, and the authors' training and
inference code: in training Sinkhorn balances the choice and no gradient flows through it; in
inference the largest logit wins; both times the output is weighted by the sigmoid of the chosen
logit.
"""

import dataclasses

import torch
from torch import Tensor, nn

from blackmamba.config import ModelConfig
from blackmamba.ops import router_logits, sinkhorn_choice


@dataclasses.dataclass(frozen=True)
class RoutingStats:
    """Figures of one layer's routing; all but the first are 0-dimensional tensors."""

    tokens_per_expert: Tensor
    """(e,) int64; sums to the number of tokens: none is dropped."""
    dropped: int
    """Tokens that no expert saw: always 0, experts have no capacity limit."""
    mean_gate: Tensor
    """Mean weight of the chosen expert, 0 .. 1."""
    load_entropy: Tensor
    """Entropy of the experts' shares of tokens, nats; log(e) when perfectly balanced."""
    router_entropy: Tensor
    """Mean entropy of softmax(logits) of a token, nats; 0 when the router is certain."""
    argmax_agreement: Tensor
    """Share of tokens whose expert is also the one of largest logit, 0 .. 1."""


@dataclasses.dataclass(frozen=True)
class Routing:
    """Where each token of one layer went."""

    expert_ids: Tensor
    """(t,) int64."""
    gate: Tensor
    """(t,) float32 or wider: sigmoid of the chosen expert's logit."""
    logits: Tensor
    """(t, e) float32 or wider."""

    @torch.no_grad()
    def statistics(self) -> RoutingStats:
        """Computed only when asked for, so that a step which does not look pays nothing."""
        load = torch.bincount(self.expert_ids, minlength=self.logits.shape[1])
        share = load.double() / max(1, len(self.expert_ids))
        log_p = self.logits.log_softmax(dim=-1)
        return RoutingStats(
            tokens_per_expert=load,
            dropped=0,
            mean_gate=self.gate.mean(),
            load_entropy=-torch.special.xlogy(share, share).sum(),
            router_entropy=-(log_p.exp() * log_p).sum(-1).mean(),
            argmax_agreement=(self.logits.argmax(-1) == self.expert_ids).double().mean(),
        )


class Router(nn.Module):
    """Top-1: expert = argmax of the Sinkhorn plan (training) or of the logits (inference)."""

    def __init__(
        self,
        config: ModelConfig,
        n_experts: int,
        *,
        device: torch.device | None,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(
            torch.empty(n_experts, config.d_model, device=device, dtype=dtype)
        )
        self.bias = nn.Parameter(torch.empty(n_experts, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Routing:
        """Route tokens x (t, m); the logits are computed in the router's own dtype, float32."""
        logits = router_logits(x, self.weight, self.bias)
        expert_ids = self._balanced(logits) if self.training else logits.argmax(dim=-1)
        chosen = logits.gather(1, expert_ids[:, None])[:, 0]
        return Routing(expert_ids, torch.sigmoid(chosen), logits)

    def _balanced(self, logits: Tensor) -> Tensor:
        config = self.config
        return sinkhorn_choice(
            logits,
            scale=config.sinkhorn_scale,
            start=config.sinkhorn_start,
            tolerance=config.sinkhorn_tolerance,
            max_iterations=config.sinkhorn_max_iterations,
        )
