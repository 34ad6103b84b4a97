"""Which experts each token goes to, and with what weights.

Letters: t tokens, m d_model, e experts, k experts_per_token.

Source: BlackMamba (arXiv 2402.01771), section on the router, and the authors' training and
inference code: in training Sinkhorn balances the choice and no gradient flows through it; in
inference the largest logit wins; both times the output is weighted by the sigmoid of the chosen
logit. Fedus et al. 2021 (arXiv 2101.03961), eq. 1, for "softmax"; Wang et al. 2024 (arXiv
2408.15664), eq. 3, for the bias of the choice; docs/model.md has all in one place.
"""

import dataclasses
from collections.abc import Callable
from typing import assert_never

import torch
from torch import Tensor, nn

from blackmamba.config import ModelConfig, RouterKind
from blackmamba.ops import router_choice, router_logits, sinkhorn_choice


@dataclasses.dataclass(frozen=True)
class RoutingStats:
    """Statistics of one layer's routing. All but the first two are 0-dimensional tensors."""

    tokens_per_expert: Tensor
    """(e,) int64; sums to k times the number of tokens: none is dropped."""
    dropped: int
    """Tokens that no expert saw: always 0, experts have no capacity limit."""
    mean_gate: Tensor
    """Mean weight of a chosen expert, 0 .. 1."""
    load_entropy: Tensor
    """Entropy of the experts' shares of tokens, nats; log(e) when perfectly balanced."""
    max_violation: Tensor
    """MaxVio: the busiest expert's tokens over the mean, less 1; 0 when perfectly balanced."""
    router_entropy: Tensor
    """Mean entropy of softmax(logits) of a token, nats; 0 when the router is certain."""
    argmax_agreement: Tensor
    """Share of choices that are also among the k largest logits of their token, 0 .. 1."""


@dataclasses.dataclass(frozen=True)
class Routing:
    """Where each token of one layer went."""

    expert_ids: Tensor
    """int64: (t,) if one expert was chosen for each token; else (t, k), the best first."""
    gate: Tensor
    """float32 or wider, of the shape of `expert_ids`: the weight of each chosen expert."""
    logits: Tensor
    """(t, e) float32 or wider."""

    @property
    def chosen(self) -> Tensor:
        """`expert_ids` as (t, k) whatever k is."""
        return self.expert_ids if self.expert_ids.dim() == 2 else self.expert_ids[:, None]

    def load(self, counted: Tensor | None = None) -> Tensor:
        """Choices of each expert: (e,) int64.

        Args:
            counted: (t,) bool: which tokens count; None: all.
        """
        n_experts, chosen = self.logits.shape[1], self.chosen
        ones = torch.ones_like(chosen)
        if counted is not None:
            ones = ones * counted[:, None]
        load = chosen.new_zeros(n_experts)
        return load.scatter_add(0, chosen.flatten(), ones.flatten())

    @torch.no_grad()
    def statistics(self) -> RoutingStats:
        """Computed only when asked for, so that a step which does not look pays nothing."""
        load = torch.bincount(self.expert_ids.flatten(), minlength=self.logits.shape[1])
        share = load.double() / max(1, self.expert_ids.numel())
        log_p = self.logits.log_softmax(dim=-1)
        largest = largest_scores(self.logits, self.chosen.shape[1])
        largest = largest.view(-1, 1, self.chosen.shape[1])
        agrees = (self.chosen[:, :, None] == largest).any(-1)
        return RoutingStats(
            tokens_per_expert=load,
            dropped=0,
            mean_gate=self.gate.mean(),
            load_entropy=-torch.special.xlogy(share, share).sum(),
            max_violation=share.max() * len(share) - 1,
            router_entropy=-(log_p.exp() * log_p).sum(-1).mean(),
            argmax_agreement=agrees.double().mean(),
        )


class Router(nn.Module):
    """k experts for each token and their gates, by the rule that `config.router` names.

    Attributes:
        selection_bias: (e,) float32 or wider, a buffer that is saved with the weights: added to the
            scores for the choice alone; None without `config.selection_bias`.
        load_since_step: (e,) int64, a buffer that is not saved: choices of each expert in training
            since the optimizer's last step; None unless `config.counts_tokens`.
        gather: for `sinkhorn_scope="global"`: takes the logits (t, e) of this rank, and gives those
            of all ranks (T, e) and the row where this rank's begin. None: there is one process.
    """

    selection_bias: Tensor | None
    load_since_step: Tensor | None

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
        bias = torch.zeros(n_experts, device=device, dtype=dtype) if config.selection_bias else None
        load = (
            torch.zeros(n_experts, device=device, dtype=torch.int64)
            if config.counts_tokens
            else None
        )
        self.register_buffer("selection_bias", bias)
        self.register_buffer("load_since_step", load, persistent=False)
        self.gather: Callable[[Tensor], tuple[Tensor, int]] | None = None

    def forward(self, x: Tensor, *, balanced: bool | None = None) -> Routing:
        """Route tokens x (t, m); the logits are computed in the router's own dtype, float32.

        Args:
            x: (t, m).
            balanced: whether "sinkhorn" chooses by its plan; None: in training mode.
        """
        config, k = self.config, self.config.experts_per_token
        balanced = self.training if balanced is None else balanced
        by_plan = config.router == "sinkhorn" and balanced
        if not (by_plan or torch.is_grad_enabled()) and self.is_plain:
            logits, expert_ids, gate = router_choice(x, self.weight, self.bias)
            return Routing(expert_ids, gate, logits)
        logits = router_logits(x, self.weight, self.bias)
        if by_plan:
            expert_ids = self._balanced(logits)
        else:
            expert_ids = largest_scores(self._scores(logits), k)
        chosen = logits.gather(1, expert_ids.view(-1, k))
        if config.router == "softmax":
            gate = torch.exp(chosen - logits.logsumexp(dim=1, keepdim=True))
        elif config.router in ("sinkhorn", "sigmoid"):
            gate = torch.sigmoid(chosen)
        else:
            assert_never(config.router)
        if config.normalize_gates:
            gate = gate / gate.sum(1, keepdim=True).clamp(min=torch.finfo(gate.dtype).tiny)
        return Routing(expert_ids, gate.view(expert_ids.shape), logits)

    @property
    def is_plain(self) -> bool:
        """Whether, without a plan, the largest logit wins and its sigmoid is the gate."""
        config = self.config
        alone = config.experts_per_token == 1 and not config.normalize_gates
        return config.gates_are_sigmoids and alone and self.selection_bias is None

    def _scores(self, logits: Tensor) -> Tensor:
        """What experts are chosen by; without a bias the logits, whose order is the same."""
        if self.selection_bias is None:
            return logits
        return probabilities(logits.detach(), self.config.router) + self.selection_bias

    def _balanced(self, logits: Tensor) -> Tensor:
        config, first, own = self.config, 0, len(logits)
        if config.sinkhorn_scope == "global" and self.gather is not None:
            logits, first = self.gather(logits.detach())
        expert_ids = sinkhorn_choice(
            logits,
            k=config.experts_per_token,
            scale=config.sinkhorn_scale,
            start=config.sinkhorn_start,
            tolerance=config.sinkhorn_tolerance,
            max_iterations=config.sinkhorn_max_iterations,
        )
        return expert_ids if len(expert_ids) == own else expert_ids[first : first + own]


def probabilities(logits: Tensor, kind: RouterKind) -> Tensor:
    """(t, e) logits to scores: softmax, or sigmoid for each expert alone."""
    if kind == "softmax":
        return logits.softmax(dim=-1)
    if kind in ("sinkhorn", "sigmoid"):
        return torch.sigmoid(logits)
    assert_never(kind)


def largest_scores(scores: Tensor, k: int) -> Tensor:
    """Where each row of scores (t, e) is largest: (t,), or for k > 1 (t, k), the largest first.

    Of equal ones the first wins; NaN counts as largest.
    """
    if k == 1:
        return scores.argmax(dim=-1)
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
