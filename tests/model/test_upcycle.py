"""A dense Mamba as the beginning of a BlackMamba."""

import dataclasses
from typing import Any

import pytest
import torch

from blackmamba.config import ModelConfig
from blackmamba.errors import ConfigError
from blackmamba.model import BlackMamba, upcycle
from blackmamba.model.mlp import MLP
from blackmamba.model.moe import MoE

DENSE = ModelConfig(
    layers=("mamba",) * 4, d_model=24, vocab_size=40, d_state=4, final_norm="rms_norm"
)
DONOR = dataclasses.replace(DENSE, layers=("attention", "mlp") * 2, d_mlp=20, n_heads=2,
                            n_kv_heads=1, d_head=8, activation="gelu")  # fmt: skip


@pytest.fixture
def dense() -> BlackMamba:
    torch.manual_seed(0)
    return BlackMamba(DENSE, dtype=torch.float64).eval()


def ids() -> torch.Tensor:
    return torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("every", [1, 2, 4])
def test_fresh_experts_change_nothing(dense: BlackMamba, every: int):
    model = upcycle(dense, n_experts=3, every=every)
    assert model.config.layers.count("moe") == 4 // every
    assert model.config.d_expert == 64
    torch.testing.assert_close(model(ids()), dense(ids()), rtol=0, atol=0)
    model.train()  # Sinkhorn's choice of an expert changes nothing either
    torch.testing.assert_close(model(ids()), dense(ids()), rtol=0, atol=0)


def test_fresh_experts_can_learn(dense: BlackMamba):
    model = upcycle(dense.float(), n_experts=2).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):  # the second product moves first, and then all of it has a gradient
        model.zero_grad()
        model.loss(ids()[:, :-1], ids()[:, 1:]).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_copied_experts_compute_what_the_mlp_did(dense: BlackMamba):
    """Each alone: with a gate of 1/2 it gives the MLP's output, up to the noise that is asked."""
    torch.manual_seed(1)
    donor = BlackMamba(DONOR, dtype=torch.float64)
    model = upcycle(dense, n_experts=3, mlps=donor)
    mlps = [m for m in donor.modules() if isinstance(m, MLP)]
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    x = torch.randn(7, 24, dtype=torch.float64)
    for layer, mlp in zip(layers, (mlps[0], mlps[0], mlps[1], mlps[1]), strict=True):
        layer.router.weight.data.zero_()
        torch.testing.assert_close(layer(x)[0], mlp(x))
    noisy = upcycle(dense, n_experts=3, mlps=donor, noise=0.1)
    fc1 = noisy.get_parameter("layers.1.feed_forward.fc1")
    off = fc1 - mlps[0].fc1.weight
    assert 0.08 < (off.std() / mlps[0].fc1.weight.std()).item() < 0.12
    assert not torch.equal(fc1[0], fc1[1])


def test_equal_seeds_give_equal_models(dense: BlackMamba):
    one, same, other = (upcycle(dense, n_experts=2, seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["layers.1.feed_forward.fc1"], other["layers.1.feed_forward.fc1"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_experts": 1}, "n_experts=1: must be at least 2"),
        ({"every": 3}, "every=3: must divide the number of layers, 4"),
        ({"d_expert": -1}, "d_expert=-1"),
        ({"noise": 0.1}, "noise=0.1: there is nothing to add it to"),
        ({"mlps": DENSE}, "has no mlp layers"),
        ({"mlps": dataclasses.replace(DONOR, d_model=16)}, "d_model=24: .* has 16"),
        ({"mlps": DONOR, "d_expert": 8}, "d_expert=8: the MLPs to copy have 20"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said(dense: BlackMamba, wrong: dict[str, Any], message: str):
    arguments = {k: BlackMamba(v) if k == "mlps" else v for k, v in wrong.items()}
    with pytest.raises(ConfigError, match=message):
        upcycle(dense, **arguments)


def test_only_a_dense_mamba_is_upcycled():
    with pytest.raises(ConfigError, match="has a layer 'moe'"):
        upcycle(BlackMamba(dataclasses.replace(DENSE, layers=("mamba", "moe"), d_expert=8)))
