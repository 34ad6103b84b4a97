"""Closed formulas against built models, and the sizes in the released models' names."""

import dataclasses

import pytest
import torch

from blackmamba.config import LayerSpec, ModelConfig
from blackmamba.model import BlackMamba
from blackmamba.model.size import (
    flops_per_token,
    layer_flops,
    layer_parameters,
    parameters,
    prompt_flops,
    state_bytes,
    training_flops_per_token,
)
from blackmamba.presets import presets

ODD = ModelConfig(
    layers=("mamba+moe:3", "attention", "mlp", "moe", "attention+mlp", "mamba"),
    d_model=24,
    vocab_size=50,
    n_experts=5,
    d_expert=7,
    d_mlp=11,
    n_heads=4,
    n_kv_heads=2,
    d_head=6,
    linear_bias=True,
    head_bias=True,
    tie_embeddings=False,
    final_norm="rms_norm",
    gated=False,
)
ROUTED = dataclasses.replace(
    ODD, router="softmax", experts_per_token=3, d_shared_expert=13, mamba_norm=True,
    selection_bias=True,
)  # fmt: skip
OWN = {"odd": ODD, "routed": ROUTED}


def config_of(name: str) -> ModelConfig:
    return OWN[name] if name in OWN else presets[name]


@pytest.mark.parametrize("name", [*presets, *OWN])
def test_total_parameters_are_those_of_the_built_model(name: str):
    config = config_of(name)
    built = BlackMamba(config, device="meta")
    assert parameters(config).total == sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize("name", ["tiny", *OWN])
def test_active_parameters_leave_out_all_experts_but_the_chosen(name: str):
    config = config_of(name)
    built = BlackMamba(config, device="meta")
    idle = sum(
        p.numel() // p.shape[0] * (p.shape[0] - config.experts_per_token)
        for key, p in built.named_parameters()
        if key.rsplit(".", 1)[-1] in ("fc1", "fc2", "fc1_bias", "fc2_bias")
    )
    counted = parameters(config)
    assert counted.total - counted.active == idle


def test_released_sizes():
    # the released files' own counts; the paper calls the models 340M/1.5B and 630M/2.8B
    small, large = parameters(presets["blackmamba-1.5b"]), parameters(presets["blackmamba-2.8b"])
    assert (small.total, small.active) == (1_458_462_072, 343_694_712)
    assert (large.total, large.active) == (2_783_213_584, 628_770_832)


@pytest.mark.parametrize("size", ["1.5b", "2.8b", "demo", "tiny"])
def test_twins_have_about_the_same_active_parameters(size: str):
    ours = parameters(presets[f"blackmamba-{size}"]).active
    for kind in ("transformer", "moe-transformer", "mamba"):
        assert parameters(presets[f"{kind}-{size}"]).active == pytest.approx(ours, rel=0.12)


@pytest.mark.parametrize("name", ["tiny", "transformer-tiny", "odd"])
@pytest.mark.parametrize("context", [1, 9])
def test_state_bytes_are_those_of_a_state(name: str, context: int):
    config = config_of(name)
    model = BlackMamba(config).eval()
    _, state = model.prefill(torch.ones(3, context, dtype=torch.int64))
    assert state.nbytes == 3 * state_bytes(config, context)


def test_flops_agree_with_torch_counts_of_the_products(monkeypatch: pytest.MonkeyPatch):
    """torch counts matrix products only, so take the rest away from the closed formula."""
    monkeypatch.setenv("BLACKMAMBA_BACKEND", "reference")  # its scan has no products
    from torch.utils.flop_counter import FlopCounterMode

    config = dataclasses.replace(
        presets["tiny"], router="sigmoid", experts_per_token=3, d_shared_expert=40
    )
    model, n_tokens = BlackMamba(config).eval(), 8
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.ones(1, n_tokens, dtype=torch.int64))
    by_op = counter.get_flop_counts()["Global"]
    d, n, k = config.d_inner, config.d_state, config.d_conv
    elsewhere = config.layers.count("mamba") * (2 * k * d + 8 * d * n + 5 * d)
    assert sum(by_op.values()) == n_tokens * (flops_per_token(config, 0) - elsewhere)


def test_a_prompt_takes_what_its_memory_and_last_logits_need():
    config = dataclasses.replace(presets["tiny"], layers=("mamba", "moe", "mamba", "moe"))
    for name in ("tiny", "blackmamba-1.5b"):  # one token: all of it
        assert prompt_flops(presets[name], 1) == flops_per_token(presets[name], 0)
    one, more = prompt_flops(config, 1), prompt_flops(config, 11)
    m, d, n = config.d_model, config.d_inner, config.d_state
    pair = sum(layer_flops(config, spec, 0).total for spec in config.layer_specs[:2])
    of_mamba = layer_flops(config, config.layer_specs[2], 0).total
    left_out = 2 * m * d + 2 * d * n + 2 * d * m + 2 * d * n + 4 * d  # of z, C, out_proj, C h, gate
    assert more - one == 10 * (pair + of_mamba - left_out)


def test_training_takes_three_times_the_products_and_scans():
    config = presets["blackmamba-1.5b"]
    d, n = config.d_inner, config.d_state
    scans = 15 * 3 * (8 * d * n + 5 * d)
    found = training_flops_per_token(config, 2048)
    assert found == 6 * 343_694_712 + scans
    # the same within what formulas of products count beside parameters: norms, biases, convolution
    for name in presets:
        forward = flops_per_token(presets[name], 1023)  # the middle of a row of 2047
        ratio = training_flops_per_token(presets[name], 2047) / (3 * forward)
        assert ratio == pytest.approx(1, rel=0.01 if name.endswith("b") else 0.06), name
    untied = dataclasses.replace(config, tie_embeddings=False)
    assert training_flops_per_token(untied, 2048) == found


def test_a_mixer_without_a_size_is_no_mixer_of_size_0():
    spec = LayerSpec("other", "none", 0)  # pyright: ignore[reportArgumentType]
    for size in (layer_parameters, lambda c, s: layer_flops(c, s, 0)):
        with pytest.raises(AssertionError, match="other"):
            size(presets["tiny"], spec)
