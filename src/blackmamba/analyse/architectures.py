"""The paper's four networks at one size: equal active parameters, as nearly as whole layers allow.

Source: BlackMamba (arXiv 2402.01771), figure 1: dense transformer, MoE transformer, dense Mamba and
BlackMamba side by side.
"""

from collections.abc import Callable

from blackmamba.config import ModelConfig
from blackmamba.errors import ConfigError
from blackmamba.model.size import parameters

NAMES = ("transformer", "moe-transformer", "mamba", "blackmamba")


def four_architectures(
    d_model: int, pairs: int, vocab_size: int, *, n_experts: int = 8, unused_vocab: int = 0
) -> dict[str, ModelConfig]:
    """A BlackMamba of so many pairs of layers, and its three twins of about its active parameters.

    Experts and dense layers are 8/3 of d_model wide, as in the released models. Each twin has the
    depth whose active parameters are nearest; the transformers' width then takes up the rest.

    Args:
        d_model: a multiple of 32.
        pairs: Mamba and expert layers of the BlackMamba.
        vocab_size, unused_vocab: see `ModelConfig`.
        n_experts: of the two networks with experts.
    Raises:
        ConfigError: d_model is no multiple of 32.
    """
    if d_model % 32:
        raise ConfigError(f"d_model={d_model}: must be a multiple of 32")
    width = max(8, round(d_model * 8 / 3 / 8) * 8)
    head = 64 if d_model % 64 == 0 and d_model >= 256 else 32

    def network(layers: tuple[str, ...], width: int = width) -> ModelConfig:
        has_attention = "attention" in layers
        return ModelConfig(
            layers=layers,
            d_model=d_model,
            vocab_size=vocab_size,
            unused_vocab=unused_vocab,
            n_experts=n_experts,
            d_expert=width if "moe" in layers else 0,
            d_mlp=width if "mlp" in layers else 0,
            n_heads=d_model // head if has_attention else 0,
            n_kv_heads=d_model // head if has_attention else 0,
            d_head=head,
        )

    blackmamba = network(("mamba", "moe") * pairs)
    target = parameters(blackmamba).active
    found = {"blackmamba": blackmamba}
    found["mamba"] = _nearest(
        target, lambda depth: network(("mamba",) * depth), range(1, 8 * pairs)
    )
    for name, feed_forward in (("transformer", "mlp"), ("moe-transformer", "moe")):
        pattern = ("attention", feed_forward)
        depth = len(
            _nearest(target, lambda n, p=pattern: network(p * n), range(1, 4 * pairs)).layers
        )
        found[name] = _nearest(
            target,
            lambda w, p=pattern, n=depth: network(p * (n // 2), w),
            range(8, 3 * width, 8),
        )
    return {name: found[name] for name in NAMES}


def _nearest(target: int, build: Callable[[int], ModelConfig], choices: range) -> ModelConfig:
    return min(map(build, choices), key=lambda config: abs(parameters(config).active - target))
