"""Every kind of router and what is built around it: one token at a time, in float64."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from numerics import relative_error
from torch import Tensor, nn

from blackmamba.checkpoint import released
from blackmamba.config import ModelConfig
from blackmamba.errors import ConfigError
from blackmamba.generate.decoder import beyond_the_paper
from blackmamba.model import BlackMamba, Trace, balance_step
from blackmamba.model.moe import MoE
from blackmamba.model.router import Router

BASE: dict[str, Any] = {
    "layers": ("mamba", "moe", "mamba", "moe:6"),
    "d_model": 16,
    "vocab_size": 61,
    "n_experts": 5,
    "d_expert": 7,
}
KINDS: dict[str, dict[str, Any]] = {
    "sinkhorn": {},
    "sinkhorn 2": {"experts_per_token": 2},
    "sinkhorn 2 normed": {"experts_per_token": 2, "normalize_gates": True, "router_z_loss": 0.1},
    "softmax": {"router": "softmax", "balance_loss": 0.1},
    "softmax 3": {"router": "softmax", "balance_loss": 0.1, "experts_per_token": 3},
    "softmax 2 biased": {
        "router": "softmax", "selection_bias": True, "experts_per_token": 2, "normalize_gates": True
    },
    "sigmoid": {"router": "sigmoid", "selection_bias": True},
    "sigmoid shared": {
        "router": "sigmoid", "selection_bias": True, "d_shared_expert": 9, "mamba_norm": True
    },
    "sigmoid 2 normed": {
        "router": "sigmoid", "experts_per_token": 2, "normalize_gates": True, "balance_loss": 0.1,
        "router_z_loss": 0.1,
    },
    "all 5 experts": {"router": "sigmoid", "experts_per_token": 5},
}  # fmt: skip


def config_of(kind: str, **changes: Any) -> ModelConfig:
    return ModelConfig(**(BASE | KINDS[kind] | changes))


def build(config: ModelConfig, dtype: torch.dtype = torch.float32) -> BlackMamba:
    torch.manual_seed(0)
    model = BlackMamba(config, dtype=dtype)
    with torch.no_grad():  # random enough that every part matters
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for router in routers(model):
            router.weight.mul_(10)
            if router.selection_bias is not None:
                router.selection_bias.normal_(std=0.2)
    return model


def routers(model: nn.Module) -> list[Router]:
    return [m for m in model.modules() if isinstance(m, Router)]


def tokens(b: int, l: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 61, (b, l), generator=torch.Generator().manual_seed(seed))


def naive(layer: MoE, x: Tensor, ids: Tensor) -> Tensor:
    """The routed layer, one token at a time and one expert at a time."""
    config, router = layer.router.config, layer.router

    def through(w1: Tensor, w2: Tensor, v: Tensor) -> Tensor:
        g, u = (w1 @ v).chunk(2)
        return w2 @ (torch.nn.functional.silu(g) * u)

    rows: list[Tensor] = []
    for v, chosen in zip(x, ids.view(len(x), -1).tolist(), strict=True):
        logits = [router.weight[j] @ v + router.bias[j] for j in range(len(router.weight))]
        if config.router == "softmax":
            total = sum(torch.exp(s) for s in logits)
            scores = [torch.exp(s) / total for s in logits]
        else:
            scores = [1 / (1 + torch.exp(-s)) for s in logits]
        gates = {j: scores[j] for j in chosen}
        if config.normalize_gates:
            gates = {j: g / sum(gates.values()) for j, g in gates.items()}
        y = torch.zeros_like(v)
        for j, gate in gates.items():
            y = y + gate * through(layer.fc1[j], layer.fc2[j], v)  # pyright: ignore
        if layer.shared is not None:
            y = y + through(layer.shared.fc1.weight, layer.shared.fc2.weight, v)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_a_loop_over_tokens(kind: str, training: bool):
    model = build(config_of(kind), torch.float64).train(training)
    layer = model.layers[1].feed_forward
    assert isinstance(layer, MoE)
    torch.manual_seed(3)
    x, g = torch.randn(2, 23, 16).double().unbind()
    x.requires_grad_()
    y, routing = layer(x)
    leaves = [x, *layer.parameters()]
    found = torch.autograd.grad(y, leaves, g)
    expected = naive(layer, x, routing.expert_ids)
    assert relative_error(y, expected) < 1e-12
    exact = torch.autograd.grad(expected, leaves, g, materialize_grads=True)
    for (name, _), a, b in zip([("x", x), *layer.named_parameters()], found, exact, strict=True):
        assert relative_error(a, b) < 1e-10, name
    if layer.router.config.router != "softmax" or training:
        assert routing.gate.min() > 0
    k = layer.router.config.experts_per_token
    assert routing.chosen.shape == (23, k)
    assert all(len(set(row)) == k for row in routing.chosen.tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_go_to_the_largest_scores(kind: str):
    """In inference; and in training too but for Sinkhorn's plan."""
    config = config_of(kind)
    router = routers(build(config))[0]
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    scores = torch.nn.functional.linear(x, router.weight, router.bias)
    if router.selection_bias is not None:
        scores = scores.softmax(-1) if config.router == "softmax" else scores.sigmoid()
        plain = scores.argmax(-1)
        scores = scores + router.selection_bias
        assert not torch.equal(plain, scores.argmax(-1))  # the bias matters
    expected = scores.topk(config.experts_per_token).indices
    assert torch.equal(router.eval()(x).chosen, expected)
    same = torch.equal(router.train()(x).chosen, expected)
    assert same == (config.router != "sinkhorn")


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_tokens_give_permuted_outputs(kind: str):
    layer = build(config_of(kind), torch.float64).layers[1].feed_forward
    assert isinstance(layer, MoE)
    x = torch.randn(31, 16, generator=torch.Generator().manual_seed(0)).double()
    order = torch.randperm(31, generator=torch.Generator().manual_seed(1))
    (y, routing), (moved, moved_routing) = layer(x), layer(x[order])
    assert torch.equal(moved_routing.chosen, routing.chosen[order])
    assert relative_error(moved, y[order]) < 1e-12


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "softmax 3", "sigmoid 2 normed"])
def test_all_tokens_in_the_same_experts(kind: str):
    model = build(config_of(kind), torch.float64)
    layer = model.layers[1].feed_forward
    assert isinstance(layer, MoE)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.bias.copy_(torch.arange(5.0))
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0)).double()
    y, routing = layer(x)
    k = layer.router.config.experts_per_token
    assert routing.chosen.tolist() == [[4, 3, 2, 1, 0][:k]] * 9
    assert relative_error(y, naive(layer, x, routing.expert_ids)) < 1e-12
    y.sum().backward()
    assert isinstance(layer.fc1, Tensor)
    assert layer.fc1.grad is not None
    busy = layer.fc1.grad.abs().sum((1, 2)) > 0
    assert busy.tolist() == [False] * (5 - k) + [True] * k
    empty, _ = layer(x[:0])
    assert empty.shape == (0, 16)
    stats = routing.statistics()
    assert stats.tokens_per_expert.tolist() == [0] * (5 - k) + [9] * k
    assert stats.max_violation.item() == pytest.approx(5 / k - 1)
    assert stats.argmax_agreement == 1


def test_the_balance_loss_is_the_papers():
    """Switch eq. 4 to 6, for k = 1 and more, over tokens that are no pads."""
    for kind in ("softmax", "softmax 3", "sigmoid 2 normed"):
        config = config_of(kind)
        model = build(config, torch.float64).train()
        ids = tokens(2, 11)
        seq_idx = torch.zeros(2, 11, dtype=torch.int64)
        seq_idx[1, 8:] = -1
        real = (seq_idx >= 0).flatten()
        trace = Trace()
        found = model.losses(ids, ids.roll(-1, 1), seq_idx=seq_idx, trace=trace)
        assert trace.losses is found
        balance = z = 0.0
        for routing in trace.routing.values():
            logits, k = routing.logits[real], config.experts_per_token
            t, e = logits.shape
            if config.router == "softmax":
                p = logits.softmax(-1)
            else:
                p = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
            for j in range(e):
                f = sum(int(j in row) for row in routing.chosen[real].tolist()) / t
                balance += e / k * f * p[:, j].mean().item()
            z += logits.exp().sum(-1).log().square().mean().item()
        assert found.balance is not None
        assert found.balance.item() == pytest.approx(0.1 * balance, rel=1e-9)
        total = found.cross_entropy + found.balance
        if config.router_z_loss:
            assert found.router_z is not None
            assert found.router_z.item() == pytest.approx(0.1 * z, rel=1e-9)
            total = total + found.router_z
        assert torch.equal(found.total, total)
        assert torch.equal(model.loss(ids, ids.roll(-1, 1), seq_idx=seq_idx), total)
        plain = model.eval().losses(ids, ids.roll(-1, 1))
        assert plain.balance is None
        assert plain.total is plain.cross_entropy


@pytest.mark.parametrize("kind", ["softmax 3", "sigmoid 2 normed"])
def test_gradcheck_of_the_router_losses(kind: str):
    model = build(config_of(kind, layers=("moe", "moe"), d_model=3), torch.float64).train()
    ids = tokens(1, 6)

    def loss(*_: Tensor) -> Tensor:
        found = model.losses(ids, ids)
        assert found.balance is not None
        return found.balance + (0 if found.router_z is None else found.router_z)

    weights = [router.weight for router in routers(model)]
    assert torch.autograd.gradcheck(loss, weights)


@pytest.mark.parametrize("update", ["sign", "error"])
def test_the_bias_moves_against_the_load_once_a_step(update: str):
    config = config_of("sigmoid", selection_bias_rate=0.01, selection_bias_update=update)
    model = build(config).train()
    before = [_bias(r).clone() for r in routers(model)]
    loads = [torch.zeros(len(b), dtype=torch.int64) for b in before]
    for seed in (1, 2):  # micro-batches
        trace = Trace()
        model.losses(tokens(2, 9, seed), tokens(2, 9), trace=trace)
        for load, routing in zip(loads, trace.routing.values(), strict=True):
            load += routing.statistics().tokens_per_expert
    with torch.no_grad():
        model.losses(tokens(2, 9), tokens(2, 9))  # counts nothing
    model.eval().losses(tokens(2, 9), tokens(2, 9))  # nor does this
    balance_step(model)
    for router, old, load in zip(routers(model), before, loads, strict=True):
        error = 1 - load / load.double().mean()
        step = error.sign() if update == "sign" else error
        assert torch.allclose(_bias(router), old + 0.01 * step.float(), atol=1e-7)
    after = [_bias(r).clone() for r in routers(model)]
    balance_step(model)  # nothing was counted since
    model.train().losses(tokens(2, 9), tokens(2, 9))
    balance_step(model, go=torch.tensor(False))
    balance_step(model)  # the skipped step's tokens are forgotten
    for router in routers(model):
        router.weight.requires_grad_(False)  # and so its bias belongs to what stays
    model.losses(tokens(2, 9), tokens(2, 9))
    balance_step(model)
    assert all(torch.equal(_bias(r), b) for r, b in zip(routers(model), after, strict=True))


def _bias(router: Router) -> Tensor:
    assert router.selection_bias is not None
    return router.selection_bias


def test_counts_of_several_ranks_are_summed_once_for_all_layers():
    config = config_of("sigmoid", selection_bias_rate=1.0, selection_bias_update="error")
    model = build(config).train()
    calls: list[Tensor] = []

    def reduce(load: Tensor) -> Tensor:
        calls.append(load)
        return load + torch.tensor([9, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0])

    before = [_bias(r).clone() for r in routers(model)]
    trace = Trace()
    model.losses(tokens(1, 9), tokens(1, 9), trace=trace)
    balance_step(model, reduce=reduce)
    assert len(calls) == 1
    for router, old, routing in zip(routers(model), before, trace.routing.values(), strict=True):
        load = routing.statistics().tokens_per_expert
        load[0] += 9
        expected = old + (1 - load / load.double().mean()).float()
        assert torch.allclose(_bias(router), expected, atol=1e-6)


def test_a_global_balance_loss_looks_at_all_ranks_and_micro_batches():
    config = config_of("softmax", balance_scope="global", layers=("moe",))
    model = build(config, torch.float64).train()
    trace = Trace()
    model.losses(tokens(1, 9, 1), tokens(1, 9), trace=trace)
    first = trace.routing[0].statistics().tokens_per_expert
    elsewhere = torch.tensor([0, 0, 18, 0, 0])
    model.reduce_load = lambda load: load + elsewhere
    found = model.losses(tokens(1, 9, 2), tokens(1, 9), trace=trace)
    routing = trace.routing[0]
    load = first + routing.statistics().tokens_per_expert + elsewhere
    expected = 0.1 * 5 * (load.double() / 36 * routing.logits.softmax(-1).mean(0)).sum()
    assert found.balance is not None
    assert found.balance.item() == pytest.approx(expected.item(), rel=1e-12)
    balance_step(model)
    assert routers(model)[0].load_since_step is not None
    assert int(routers(model)[0].load_since_step.sum()) == 0  # pyright: ignore


@pytest.mark.parametrize("recompute", ["cheap", "layers"])
@pytest.mark.parametrize("kind", ["sinkhorn 2", "softmax 3", "sigmoid shared"])
def test_recomputation_changes_no_gradient_and_counts_once(kind: str, recompute: Any):
    results: list[dict[str, Tensor]] = []
    for what in ("none", recompute):
        model = build(config_of(kind)).train()
        model.recompute = what
        model.loss(tokens(2, 9), tokens(2, 9, 2)).backward()
        for router in routers(model):
            if router.load_since_step is not None:
                assert router.load_since_step.sum() == 18 * router.config.experts_per_token
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_steps_equal_one_forward(kind: str):
    model, ids = build(config_of(kind)).eval(), tokens(2, 12)
    with torch.inference_mode():
        full = model(ids)
        logits, state = model.prefill(ids[:, :5])
        assert relative_error(logits, full[:, :5]) < 1e-5
        piece, state = model.prefill(ids[:, 5:8], state, lengths=torch.tensor([3, 3]))
        assert relative_error(piece, full[:, 5:8]) < 1e-5
        for t in range(8, 12):
            logits, state = model.step(ids[:, t], state)
            assert relative_error(logits, full[:, t]) < 1e-5
        changed = ids.clone()
        changed[:, 7] = (changed[:, 7] + 1) % 61
        again = model(changed)
    assert relative_error(again[:, :7], full[:, :7]) < 1e-5  # no token sees what follows it
    assert relative_error(again[:, 7:], full[:, 7:]) > 1e-3


@torch.inference_mode()
def test_norms_of_dt_b_and_c_take_their_scale_out():
    for part, rows in (("dt", slice(0, 1)), ("B", slice(1, 17)), ("C", slice(17, 33))):
        model = build(config_of("sigmoid shared", layers=("mamba",))).eval()
        mixer: Any = model.layers[0].mixer
        mixer.x_proj.weight.mul_(30)  # eps is small beside it
        before = model(tokens(2, 9))
        mixer.x_proj.weight[rows] *= 50
        assert relative_error(model(tokens(2, 9)), before) < 1e-3, part
        getattr(mixer, f"{part}_norm").weight.mul_(3)
        assert relative_error(model(tokens(2, 9)), before) > 1e-2, part


def test_sinkhorn_balances_two_experts_a_token_and_over_all_ranks():
    config = config_of("sinkhorn 2", sinkhorn_scope="global", sinkhorn_tolerance=1e-3)
    router = routers(build(config))[0].train()
    with torch.no_grad():
        router.bias.copy_(torch.arange(5.0) / 2)
    x = torch.randn(600, 16, generator=torch.Generator().manual_seed(0)) / 8
    whole = router(x)
    balanced, greedy = whole.statistics(), router.eval()(x).statistics()
    assert balanced.max_violation < 0.2 < 1 < greedy.max_violation
    assert balanced.tokens_per_expert.sum() == 1200
    assert balanced.argmax_agreement < greedy.argmax_agreement == 1
    router.train()
    ids: list[Tensor] = []
    for start in (0, 300):
        router.gather = lambda _, start=start: (whole.logits, start)
        ids.append(router(x[start : start + 300]).expert_ids)
    assert torch.equal(torch.cat(ids), whole.expert_ids)


def test_one_expert_of_each_token_is_what_it_always_was():
    """sigmoid without bias chooses as Sinkhorn does in inference, to the last bit."""
    ids = tokens(2, 9)
    one = build(config_of("sinkhorn")).eval()
    other = build(config_of("sinkhorn", router="sigmoid"))
    assert torch.equal(one(ids), other(ids))
    assert torch.equal(other(ids), other.eval()(ids))  # one rule for training and inference


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo
@pytest.mark.parametrize("kind", ["sinkhorn 2 normed", "softmax 2 biased"])
def test_compiles_in_one_graph(kind: str):
    config = config_of(kind, layers=("moe",), d_shared_expert=9)
    eager, compiled = build(config).train(), build(config).train()
    ids, labels = tokens(2, 9), tokens(2, 9, 2)
    expected = eager.loss(ids, labels)
    found = torch.compile(compiled.loss, fullgraph=True, backend="aot_eager")(ids, labels)
    assert torch.allclose(found, expected)
    expected.backward()
    found.backward()
    for (name, p), q in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        if p.grad is not None:
            assert q.grad is not None
            assert relative_error(q.grad, p.grad) < 1e-5, name
    for p, q in zip(routers(eager), routers(compiled), strict=True):
        if p.load_since_step is not None:
            assert q.load_since_step is not None
            assert torch.equal(p.load_since_step, q.load_since_step)


@pytest.mark.parametrize("kind", ["sinkhorn", "softmax 3", "sigmoid shared", "softmax 2 biased"])
def test_training_lowers_the_loss_and_evens_the_load(kind: str):
    rate = {"selection_bias_rate": 0.02} if "selection_bias" in KINDS[kind] else {}
    config = config_of(kind, n_experts=8, layers=("mamba", "moe"), **rate)
    torch.manual_seed(0)
    model = BlackMamba(config)
    with torch.no_grad():  # a bad start: two experts have nearly everything
        for router in routers(model):
            router.bias[:2] += 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses: list[float] = []
    uneven: list[float] = []
    for step in range(60):
        ids = _chain(8, 65, seed=step)
        trace = Trace()
        found = model.train().losses(ids[:, :-1], ids[:, 1:], trace=trace)
        optimizer.zero_grad()
        found.total.backward()
        optimizer.step()
        balance_step(model)
        losses.append(found.cross_entropy.item())
        uneven.append(trace.routing[1].statistics().max_violation.item())
    assert losses[0] == pytest.approx(math.log(61), abs=0.2)
    assert losses[-1] < 1.6  # of log 3 = 1.1 at best
    late = sum(uneven[-10:]) / 10
    # the plan is balanced from the first step on, but equal tokens, of 61 kinds, go together
    assert late < (0.6 if config.router == "sinkhorn" else 0.5 * uneven[0])


def _chain(b: int, l: int, seed: int) -> Tensor:
    """Each id is one of three that the one before it allows."""
    g = torch.Generator().manual_seed(seed)
    ids, noise = torch.randint(0, 61, (b, l), generator=g), torch.randint(0, 3, (b, l), generator=g)
    for t in range(1, l):
        ids[:, t] = (7 * ids[:, t - 1] + 20 * noise[:, t]) % 61
    return ids


def test_experts_of_any_number_and_width():
    for e, f in ((1, 3), (3, 5), (33, 2), (64, 1)):
        config = ModelConfig(
            layers=("mamba", "moe"), d_model=8, vocab_size=61, n_experts=e, d_expert=f
        )
        for router in ("sinkhorn", "softmax"):
            model = build(dataclasses.replace(config, router=router)).train()
            model.loss(tokens(2, 9), tokens(2, 9)).backward()
            model.eval().step(tokens(2, 1)[:, 0], model.initial_state(2))


def test_nothing_takes_another_gate_for_the_papers():
    """A router that is added to `Router` alone: fast paths and the released format refuse it."""
    config = config_of("sinkhorn", router="of another rule")
    (first, *_) = routers(BlackMamba(config))
    assert not first.is_plain
    assert beyond_the_paper(config) == "router 'of another rule'"
    with pytest.raises(ConfigError, match="router='of another rule'"):
        released.write_config(config)
