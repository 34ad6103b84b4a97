"""What experts do with text, on models whose routing is known."""

import math

import pytest
import torch
from torch.nn import functional as F

from blackmamba.analyse.experts import (
    expert_use,
    mutual_information,
    router_logits_of,
    rule_gap,
)
from blackmamba.errors import DataError, InputError
from blackmamba.model import BlackMamba, Trace
from blackmamba.presets import presets


@pytest.fixture
def model() -> BlackMamba:
    torch.manual_seed(0)
    return BlackMamba(presets["tiny"]).eval()


def batches(seed: int, n: int = 2) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(512, (3, 40), generator=random) for _ in range(n)]


def test_shares_are_those_of_the_routing(model: BlackMamba):
    domains = {"a": batches(0), "b": batches(1, 1)}
    found = expert_use(model, domains)
    assert [use.layer for use in found] == [1, 3]
    with torch.inference_mode():
        trace = Trace()
        model(domains["b"][0], trace=trace)
    for use in found:
        load = trace.routing[use.layer].statistics().tokens_per_expert.double() / 120
        assert use.share["b"] == pytest.approx(load.tolist())
        assert sum(use.share["a"]) == pytest.approx(1)
        assert 0 < use.entropy <= 1
        assert 0 < use.agreement <= 1
    assert not model.training


def test_a_router_that_goes_by_the_token_is_seen(model: BlackMamba):
    """Expert = token % 8, made by replacing what the router sees."""
    chosen_by: list[torch.Tensor] = []

    def by_token(_module: object, inputs: tuple[torch.Tensor], _output: object):
        ids = chosen_by[0].flatten()
        logits = F.one_hot(ids % 8, 8).float() * 9
        return type(_output)(ids % 8, torch.ones(len(ids)), logits)

    layer = model.layers[1].feed_forward
    layer.router.register_forward_hook(by_token)  # pyright: ignore
    batch = torch.arange(512).repeat(4).view(4, 512)
    chosen_by.append(batch)
    use = expert_use(model, {"all": [batch]})[0]
    assert use.token_information == pytest.approx(1)
    assert use.chance_information < 0.95
    assert use.position_information < 0.01
    assert use.entropy == pytest.approx(1)
    assert use.agreement == 1
    assert all(token % 8 == expert for expert, ids in enumerate(use.favourites) for token in ids)
    assert all(use.favourites)


def test_mutual_information():
    a = torch.arange(8).repeat(100)
    assert mutual_information(a, a) == pytest.approx(math.log(8))
    assert mutual_information(a, a // 4) == pytest.approx(math.log(2))
    assert mutual_information(a, torch.zeros_like(a)) == pytest.approx(0, abs=1e-12)


def test_the_two_rules_are_the_two_modes(model: BlackMamba):
    ids = torch.cat(batches(2))
    pairs = [(ids[:, :-1], ids[:, 1:]), (ids[:2, :-3], ids[:2, 1:-2])]
    gap = rule_gap(model, pairs)
    with torch.no_grad():
        losses = {
            mode: sum(float(model.train(mode).loss(i, l)) * l.numel() for i, l in pairs)
            / sum(l.numel() for _, l in pairs)
            for mode in (False, True)
        }
    assert gap.inference_nats == pytest.approx(losses[False], rel=1e-6)
    assert gap.training_nats == pytest.approx(losses[True], rel=1e-6)
    assert gap.cost == pytest.approx(losses[False] - losses[True], abs=1e-5)


def test_logits_are_those_of_the_routers(model: BlackMamba):
    [ids] = batches(3, 1)
    logits = router_logits_of(model.train(), ids)
    assert model.training
    assert {layer: tuple(t.shape) for layer, t in logits.items()} == {1: (120, 8), 3: (120, 8)}


def test_what_cannot_be_looked_at(model: BlackMamba):
    with pytest.raises(InputError, match="no layer with experts"):
        expert_use(BlackMamba(presets["mamba-tiny"]), {"a": batches(0)})
    with pytest.raises(DataError, match="no text"):
        expert_use(model, {})
    with pytest.raises(DataError, match="no text"):
        rule_gap(model, [])
