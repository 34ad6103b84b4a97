"""Variants of a BlackMamba at equal active parameters: the paper's, and what may beat it."""

import dataclasses
from typing import Any

from blackmamba.config import ModelConfig
from blackmamba.train import TrainConfig

PAPER = "paper"
BETTER = "better"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One change to the paper's network."""

    name: str
    question: str
    """Which choice it belongs to."""
    config: ModelConfig


def variants(base: ModelConfig, experts: tuple[int, ...]) -> list[Variant]:
    """The paper's network first, then each change alone.

    Args:
        base: a BlackMamba of alternating layers.
        experts: numbers of experts to try beside the base's.
    """
    pairs = len(base.layers) // 2

    def with_(name: str, question: str, **changes: object) -> Variant:
        return Variant(name, question, dataclasses.replace(base, **changes))  # pyright: ignore[reportArgumentType]

    half = base.d_expert // 2
    found = [Variant(PAPER, "", base)]
    found.append(with_("parallel", "layers", layers=("mamba+moe",) * pairs))
    if pairs > 1:
        every_other = (("mamba", "moe", "mamba", "mlp") * pairs)[: 2 * pairs]
        found.append(with_("moe-every-other", "layers", layers=every_other, d_mlp=base.d_expert))
    found += [
        with_(f"experts-{n}", "number of experts", n_experts=n)
        for n in experts
        if n != base.n_experts
    ]
    found += [
        with_("softmax-loss", "router", router="softmax", balance_loss=0.01),
        with_("sigmoid-loss", "router", router="sigmoid", balance_loss=0.01),
        with_(
            "sigmoid-bias", "router",
            router="sigmoid", selection_bias=True, selection_bias_rate=1e-2,
        ),
        with_(
            "finer-top-2", "experts a token",
            n_experts=2 * base.n_experts, d_expert=half, experts_per_token=2,
        ),
        with_("shared-expert", "experts a token", d_expert=half, d_shared_expert=half),
        with_("gelu", "activation", activation="gelu"),
        with_("state-8", "state size", d_state=base.d_state // 2),
        with_("state-32", "state size", d_state=base.d_state * 2),
        with_("mamba-norm", "norms on dt, B and C", mamba_norm=True),
    ]  # fmt: skip
    return found


def better(base: ModelConfig) -> ModelConfig:
    """What was found to help, put together; docs/paper.md has the evidence.

    To be trained as `optimizer_of` says.
    """
    half = max(1, base.d_expert // 16) * 8  # rows of whole 16 bytes
    return dataclasses.replace(
        base,
        router="softmax",
        balance_loss=0.01,
        n_experts=4 * base.n_experts,
        d_expert=half,
        d_shared_expert=base.d_expert - half,
    )


def optimizer_of(name: str) -> dict[str, Any]:
    """What a recipe trains with that is not the scale's."""
    if name != BETTER:
        return {}
    to_zero = {"schedule": "wsd", "decay_fraction": 0.9, "decay_shape": "linear"}
    return {"optimizer": "muon", "min_lr_ratio": 0.0, **to_zero}


def with_fewer_steps(settings: TrainConfig, share: float, **changes: Any) -> TrainConfig:
    """The same training in a share of its steps, its schedule ended there, and other changes."""
    steps = max(1, round(settings.steps * share))
    warmup = max(1, round(settings.warmup_steps * share))
    return dataclasses.replace(settings, steps=steps, warmup_steps=warmup, **changes)
