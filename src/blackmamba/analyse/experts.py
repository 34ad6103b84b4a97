"""What experts do with text: who gets which tokens, and what the balanced choice of training costs.

Letters: t tokens, e experts, v vocabulary.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from blackmamba.errors import DataError, InputError
from blackmamba.model import BlackMamba, Trace

_POSITIONS = 16
"""Into so many parts a row is cut to see whether experts go by position."""


@dataclasses.dataclass(frozen=True)
class LayerUse:
    """One routed layer over all the text that it was shown, by the inference rule."""

    layer: int
    """Its index in the stack."""
    share: dict[str, tuple[float, ...]]
    """By domain, each expert's share of the choices."""
    entropy: float
    """Of the shares over all domains, in units of log(e): 1 is perfectly even."""
    token_information: float
    """Mutual information of expert and token id, in units of the entropy of the expert: 1 if the
    token alone decides. Biased up where tokens are rare; see `chance_information`."""
    chance_information: float
    """The same after the experts were shuffled over the tokens: what few samples alone give."""
    position_information: float
    """The same of expert and place in the row, in 16 parts."""
    favourites: tuple[tuple[int, ...], ...]
    """For each expert the token ids that it gets most beyond its share, most first."""
    agreement: float
    """Share of tokens whose expert is the same by training's rule (Sinkhorn over the batch)."""


@torch.inference_mode()
def expert_use(
    model: BlackMamba, domains: Mapping[str, Iterable[Tensor]], *, n_favourites: int = 8
) -> list[LayerUse]:
    """Look at every routed layer while the model reads.

    Args:
        model: comes back in the mode that it came in.
        domains: by name, batches of token ids (b, l) int64.
        n_favourites: how many tokens to name for each expert.
    Raises:
        InputError: no layer has experts.
        DataError: there is no token.
    """
    if not any(spec.feed_forward == "moe" for spec in model.config.layer_specs):
        raise InputError("this model has no layer with experts")
    seen: dict[str, list[dict[int, Tensor]]] = {}
    balanced: dict[int, list[float]] = {}
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    was_training = model.training
    try:
        for name, batches in domains.items():
            for batch in batches:
                seen.setdefault(name, []).append(_chosen(model, batch, training=False))
                for layer, expert_ids in _chosen(model, batch, training=True).items():
                    same = (expert_ids == seen[name][-1][layer]).any(1).double().mean()
                    balanced.setdefault(layer, []).append(float(same) * batch.numel())
                ids.append(batch.flatten().cpu())
                b, l = batch.shape
                positions.append((torch.arange(l) * _POSITIONS // l).repeat(b))
    finally:
        model.train(was_training)
    if not ids:
        raise DataError("no text: looking at experts needs at least one batch of tokens")
    all_ids, all_positions = torch.cat(ids), torch.cat(positions)
    specs = model.config.layer_specs
    return [
        _layer_use(
            layer,
            specs[layer].n_experts,
            {name: torch.cat([one[layer] for one in ones]) for name, ones in seen.items()},
            all_ids,
            all_positions,
            sum(balanced[layer]) / len(all_ids),
            n_favourites,
        )
        for layer in sorted(balanced)
    ]


@dataclasses.dataclass(frozen=True)
class RuleGap:
    """The same text predicted under two rules of routing."""

    inference_nats: float
    """Mean nats per token with the largest logit's expert."""
    training_nats: float
    """With the balanced choice over each batch, which sees tokens that come later."""

    @property
    def cost(self) -> float:
        """What the switch of rules costs: nats per token."""
        return self.inference_nats - self.training_nats


@torch.inference_mode()
def rule_gap(model: BlackMamba, batches: Iterable[tuple[Tensor, Tensor]]) -> RuleGap:
    """Mean loss of one set of weights under the inference rule and under the training rule.

    Args:
        model: comes back in the mode that it came in.
        batches: input_ids and labels, (b, l) int64; no label is -100.
    Raises:
        DataError: there is no batch.
    """
    totals, n_tokens = [0.0, 0.0], 0
    was_training = model.training
    try:
        for input_ids, labels in batches:
            n_tokens += labels.numel()
            for rule, training in enumerate((False, True)):
                model.train(training)
                trace = Trace()
                loss = model.loss(input_ids, labels, trace=trace)
                totals[rule] += float(loss) * labels.numel()
    finally:
        model.train(was_training)
        _forget_counts(model)
    if not n_tokens:
        raise DataError("no text: a loss needs at least one batch of tokens")
    return RuleGap(totals[0] / n_tokens, totals[1] / n_tokens)


def router_logits_of(model: BlackMamba, input_ids: Tensor) -> dict[int, Tensor]:
    """Logits (t, e) of each routed layer while the model reads (b, l) ids by the inference rule."""
    trace = Trace()
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            model(input_ids, trace=trace)
    finally:
        model.train(was_training)
    return {layer: routing.logits for layer, routing in trace.routing.items()}


def mutual_information(a: Tensor, b: Tensor) -> float:
    """Of two (t,) int64 of small numbers, in nats."""
    n_a, n_b = int(a.max()) + 1, int(b.max()) + 1
    joint = torch.bincount(a * n_b + b, minlength=n_a * n_b).view(n_a, n_b).double() / len(a)
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return float(torch.special.xlogy(joint, joint / apart.clamp(min=1e-300)).sum())


def _chosen(model: BlackMamba, batch: Tensor, *, training: bool) -> dict[int, Tensor]:
    """Expert ids (t, k) by layer."""
    model.train(training)
    trace = Trace()
    model(batch, trace=trace)
    _forget_counts(model)
    return {layer: routing.chosen.cpu() for layer, routing in trace.routing.items()}


def _forget_counts(model: BlackMamba) -> None:
    """Looking is not training: what routers counted must not move their biases."""
    for name, buffer in model.named_buffers():
        if name.endswith("load_since_step"):
            buffer.zero_()


def _layer_use(
    layer: int,
    n_experts: int,
    chosen: Mapping[str, Tensor],
    ids: Tensor,
    positions: Tensor,
    agreement: float,
    n_favourites: int,
) -> LayerUse:
    best = torch.cat(list(chosen.values()))[:, 0]
    load = torch.bincount(best, minlength=n_experts).double() / len(best)
    entropy = float(-torch.special.xlogy(load, load).sum())
    scale = entropy or 1.0
    shuffled = best[torch.randperm(len(best), generator=torch.Generator().manual_seed(0))]
    return LayerUse(
        layer=layer,
        share={name: _shares(ids_, n_experts) for name, ids_ in chosen.items()},
        entropy=entropy / float(torch.tensor(float(n_experts)).log()) if n_experts > 1 else 1.0,
        token_information=mutual_information(best, ids) / scale,
        chance_information=mutual_information(shuffled, ids) / scale,
        position_information=mutual_information(best, positions) / scale,
        favourites=_favourites(best, ids, n_experts, n_favourites),
        agreement=agreement,
    )


def _shares(chosen: Tensor, n_experts: int) -> tuple[float, ...]:
    load = torch.bincount(chosen.flatten(), minlength=n_experts).double()
    return tuple((load / load.sum()).tolist())


def _favourites(
    best: Tensor, ids: Tensor, n_experts: int, number: int
) -> tuple[tuple[int, ...], ...]:
    n_ids = int(ids.max()) + 1
    joint = torch.bincount(best * n_ids + ids, minlength=n_experts * n_ids).double()
    joint = joint.view(n_experts, n_ids)
    expected = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True) / len(ids)
    excess = joint - expected
    top: Sequence[Sequence[int]] = excess.topk(min(number, n_ids), dim=1).indices.tolist()
    return tuple(tuple(i for i in row if excess[expert, i] > 0) for expert, row in enumerate(top))
