"""The closed forms of FLOPs against torch's counter."""

import dataclasses
from typing import Any

import pytest

from blackmamba.analyse.flops import counted_flops
from blackmamba.config import ModelConfig
from blackmamba.model.size import Flops, flops_per_token, forward_flops, training_flops_per_token
from blackmamba.presets import presets


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("blackmamba-tiny", {}),
        ("mamba-tiny", {}),
        ("transformer-tiny", {}),
        ("moe-transformer-tiny", {}),
        ("blackmamba-tiny", {"layers": ("mamba+moe:3", "mamba", "moe:5"), "gated": False}),
        ("blackmamba-tiny", {"router": "softmax", "experts_per_token": 2, "d_shared_expert": 24}),
        ("transformer-tiny", {"n_kv_heads": 2, "tie_embeddings": False, "linear_bias": True}),
    ],
)
def test_products_are_counted_right(name: str, changes: dict[str, Any]):
    config: ModelConfig = dataclasses.replace(presets[name], **changes)
    counted = counted_flops(config, 2, 17)
    assert counted.forward == counted.expected_forward
    assert counted.training == 3 * counted.forward


def test_the_parts_are_the_whole():
    for name in presets:
        config = presets[name]
        flops = forward_flops(config, 100)
        assert flops.total == flops_per_token(config, 100)
        assert (flops.scan > 0) == ("mamba" in config.layers)
        assert (flops.scores > 0) == ("attention" in config.layers)
    assert Flops(1, 2, 3, 4) + Flops(1, 1, 1, 1) == Flops(2, 3, 4, 5)


def test_training_takes_at_least_three_times_the_products_and_the_scan():
    config = presets["blackmamba-1.5b"]
    forward = forward_flops(config, 0)
    least = training_flops_per_token(config, 2048)
    norms_and_rest = 6 * 1_000_000  # parameters that no product reads
    assert 0 <= least - 3 * (forward.products + forward.scan) < norms_and_rest
