"""Keeping experts evenly busy without a plan: balance loss, z-loss and selection bias.

Letters: t tokens, e experts, k experts_per_token.

A layer returns its `RouterLoad`; losses and counts are computed from these outside the layers. So a
layer that is computed twice (`Recompute`) counts once, and one message between ranks holds the
counts of all layers.

Source: Fedus et al. 2021 (arXiv 2101.03961), eq. 4 to 6; Zoph et al. 2022 (arXiv 2202.08906),
eq. 5; Wang et al. 2024 (arXiv 2408.15664), algorithm 1; Qiu et al. 2025 (arXiv 2501.11873) for the
load of the global batch.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from blackmamba.config import ModelConfig
from blackmamba.model.router import Router, Routing, probabilities

Reduce = Callable[[Tensor], Tensor]
"""Sums an int64 tensor over ranks: what every rank gives, to what every rank gets."""


class RouterLoad(NamedTuple):
    """What one layer's routing of a micro-batch says of its balance."""

    load: Tensor
    """(e,) int64: choices of each expert, of tokens that count."""
    mean_probability: Tensor | None
    """(e,) float32 or wider: a token's mean score of each expert; what the balance loss trains."""
    z: Tensor | None
    """The mean of logsumexp(logits)^2, a scalar."""


class Losses(NamedTuple):
    """What training minimises, and its parts; all float32 or wider scalars."""

    total: Tensor
    """cross_entropy + balance + router_z."""
    cross_entropy: Tensor
    """Mean nats per label: the one to report."""
    balance: Tensor | None
    """Of all routed layers together, with its weight; None if that is 0."""
    router_z: Tensor | None
    """The same of the z-loss."""


def wants_load(config: ModelConfig) -> bool:
    """Whether training needs `RouterLoad`."""
    return bool(config.balance_loss or config.router_z_loss or config.counts_tokens)


def router_load(routing: Routing, config: ModelConfig, counted: Tensor | None) -> RouterLoad:
    """What this routing says of its layer's balance.

    Args:
        routing: of t tokens.
        config: says what is needed.
        counted: (t,) bool: pads are False; None: all count.
    """
    probability = z = None
    if config.balance_loss:
        scores = probabilities(routing.logits, config.router)
        if config.router == "sigmoid":  # shares of a token, as softmax gives
            scores = scores / scores.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        probability = _mean(scores, counted)
    if config.router_z_loss:
        z = _mean(routing.logits.logsumexp(dim=1).square(), counted)
    return RouterLoad(routing.load(counted), probability, z)


def losses(
    cross_entropy: Tensor,
    loads: Sequence[RouterLoad],
    routers: Sequence[Router],
    config: ModelConfig,
    reduce: Reduce | None,
) -> Losses:
    """Add the routers' losses up, and let the routers remember their load.

    A layer's balance loss is e / k sum_i f_i P_i with f_i the share of tokens that chose expert i,
    no gradient, and P_i `mean_probability`: 1 when both are even, e / k at the worst. The layers'
    losses are summed, as in the Switch Transformer.

    Args:
        cross_entropy: mean nats per label.
        loads: of each routed layer; empty: nothing to add.
        routers: of the same layers.
        config: has the weights.
        reduce: for balance_scope="global": sums loads over the ranks; None: there is one.
    """
    if not loads:
        return Losses(cross_entropy, cross_entropy, None, None)
    balance = router_z = None
    if config.balance_loss:
        seen = [load.load for load in loads]
        if config.balance_scope == "global":
            seen = [n + _kept(r) for n, r in zip(seen, routers, strict=True)]
            seen = _reduced(seen, reduce)
        each = [
            _balance(n, _known(load.mean_probability)) for n, load in zip(seen, loads, strict=True)
        ]
        balance = config.balance_loss * torch.stack(each).sum()
    if config.router_z_loss:
        router_z = config.router_z_loss * torch.stack([_known(load.z) for load in loads]).sum()
    if config.counts_tokens and torch.is_grad_enabled():
        for load, router in zip(loads, routers, strict=True):
            _kept(router).add_(load.load)
    total = cross_entropy
    for extra in (balance, router_z):
        total = total if extra is None else total + extra
    return Losses(total, cross_entropy, balance, router_z)


@torch.no_grad()
def balance_step(
    model: nn.Module, *, reduce: Reduce | None = None, go: Tensor | bool = True
) -> None:
    """Move each router's selection bias against the load since the last call, and forget that load.
    To be called once after every step of the optimizer.

    The bias of an expert goes up by `selection_bias_rate` if it had fewer tokens than the mean and
    down if it had more ("sign"), or up by the rate times 1 - load / mean ("error"). A router whose
    weight is not trained (frozen, or under adapters) keeps its bias. Nothing waits for the device.

    Args:
        model: any module with routers in it; without any that count tokens, nothing happens.
        reduce: sums loads over the ranks, called once for all routers together.
        go: False, or a bool scalar on the device: biases stay, as after a step that was skipped.
    """
    routers = [r for r in counting_routers(model) if r.selection_bias is not None and _learns(r)]
    seen = _reduced([_kept(router) for router in routers], reduce) if routers else []
    for router, load in zip(routers, seen, strict=True):
        bias, config = _known(router.selection_bias), router.config
        total = load.sum()
        error = torch.where(total > 0, 1 - load.to(bias.dtype) * len(load) / total, 0.0)
        if config.selection_bias_update == "sign":
            error = error.sign()
        bias.copy_(torch.where(torch.as_tensor(go, device=bias.device),
                               bias + config.selection_bias_rate * error, bias))  # fmt: skip
    forget_load(model)


def counting_routers(model: nn.Module) -> list[Router]:
    """The routers that remember their load, from bottom to top."""
    return [m for m in model.modules() if isinstance(m, Router) and m.load_since_step is not None]


def _learns(router: Router) -> bool:
    weight = dict(router.named_parameters()).get("weight")  # an adapted one has another name
    return weight is not None and weight.requires_grad


def forget_load(model: nn.Module) -> None:
    """As if no token had been seen since the last step of the optimizer."""
    for router in counting_routers(model):
        _kept(router).zero_()


def _balance(seen: Tensor, probability: Tensor) -> Tensor:
    """e / k sum_i f_i P_i."""
    share = seen.to(probability.dtype) / seen.sum().clamp(min=1)  # f / k
    return (share * probability).sum() * len(seen)


def _reduced(loads: Sequence[Tensor], reduce: Reduce | None) -> Iterable[Tensor]:
    if reduce is None:
        return loads
    return reduce(torch.cat(list(loads))).split([len(load) for load in loads])


def _mean(values: Tensor, counted: Tensor | None) -> Tensor:
    """Over tokens that count; 0 if there are none."""
    if counted is None:
        return values.mean(dim=0)
    weights = counted.to(values.dtype).view(-1, *(1,) * (values.dim() - 1))
    return (values * weights).sum(0) / weights.sum().clamp(min=1)


def _kept(router: Router) -> Tensor:
    return _known(router.load_since_step)


def _known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
