"""What the network promises, for all four architectures and both layer layouts."""

import dataclasses

import pytest
import torch
from numerics import largest_difference
from torch import nn

from blackmamba.config import ModelConfig
from blackmamba.errors import InputError
from blackmamba.model import BlackMamba, State, Trace, keeps_float32
from blackmamba.presets import presets

SMALL = {
    "d_model": 32,
    "vocab_size": 61,
    "n_experts": 4,
    "d_expert": 24,
    "d_mlp": 40,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_head": 8,
}
PATTERNS = {
    "blackmamba": ("mamba", "moe", "mamba", "moe"),
    "mamba": ("mamba", "mamba", "mamba"),
    "transformer": ("attention", "mlp", "attention", "mlp"),
    "moe-transformer": ("attention", "moe", "attention", "moe"),
    "parallel blackmamba": ("mamba+moe", "mamba+moe:3"),
    "parallel transformer": ("attention+mlp", "attention+mlp"),
}


def build(pattern: str, **changes: object) -> BlackMamba:
    torch.manual_seed(0)
    config = ModelConfig(layers=PATTERNS[pattern], **(SMALL | changes))  # pyright: ignore
    model = BlackMamba(config)
    with torch.no_grad():  # random enough that every part matters
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tokens(b: int, l: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 61, (b, l), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_prefill_and_steps_equal_one_forward_for_every_prompt_length(pattern: str):
    model, ids = build(pattern), tokens(2, 36)
    with torch.inference_mode():
        full = model(ids)
        for k in range(34):
            state = model.initial_state(2)
            if k:
                logits, state = model.prefill(ids[:, :k], state)
                assert largest_difference(logits, full[:, :k]) < 1e-4, k
            for t in range(k, min(k + 3, 36)):
                logits, state = model.step(ids[:, t], state)
                assert largest_difference(logits, full[:, t]) < 1e-4, (k, t)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_prefill_in_two_pieces_equals_one(pattern: str):
    model, ids = build(pattern), tokens(2, 33)
    with torch.inference_mode():
        full, whole = model.prefill(ids)
        for cut in (1, 2, 3, 4, 5, 16, 32):
            first, state = model.prefill(ids[:, :cut])
            second, state = model.prefill(ids[:, cut:], state)
            assert largest_difference(torch.cat((first, second), 1), full) < 1e-4, cut
            assert same_memory(state, whole), cut


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("training", [False, True])
@torch.inference_mode()
def test_of_the_last_logits_what_they_need(pattern: str, training: bool):
    model, ids, lengths = build(pattern).train(training), tokens(2, 9), torch.tensor([9, 4])
    expected, whole = model.prefill(ids, lengths=lengths)
    seen: list[int] = []

    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
        del module, output
        seen.append(inputs[0].shape[1])

    model.layers[-1].register_forward_hook(hook)
    last, state = model.prefill(ids, lengths=lengths, logits="last")
    assert largest_difference(last, expected[[0, 1], [8, 3]]) < 1e-4
    assert same_memory(state, whole)
    ends_early = PATTERNS[pattern][-1] in ("moe", "mlp") and not training
    assert seen == [1 if ends_early else 9]  # in training Sinkhorn's plan is of all tokens


@pytest.mark.parametrize("pattern", PATTERNS)
def test_padded_rows_equal_the_same_rows_alone(pattern: str):
    model, ids = build(pattern), tokens(4, 11)
    lengths = torch.tensor([1, 11, 3, 7])
    more, more_lengths = tokens(4, 5, seed=2), torch.tensor([5, 1, 0, 2])
    with torch.inference_mode():
        last, state = model.prefill(ids, lengths=lengths, logits="last")
        _, state = model.prefill(more, state, lengths=more_lengths)
        after, state = model.step(tokens(4, 1, seed=3)[:, 0], state)
        for row, (n, n_more) in enumerate(
            zip(lengths.tolist(), more_lengths.tolist(), strict=True)
        ):
            alone, memory = model.prefill(ids[row : row + 1, :n], logits="last")
            assert largest_difference(last[row], alone[0]) < 1e-4
            if n_more:
                _, memory = model.prefill(more[row : row + 1, :n_more], memory, logits="none")
            alone, memory = model.step(tokens(4, 1, seed=3)[row], memory)
            assert largest_difference(after[row], alone[0]) < 1e-4
            assert same_memory(state.select([row]), memory)


def same_memory(one: State, other: State) -> bool:
    """Equal within 1e-4; attention caches may have different room behind the last token."""
    for name, a in one.to_tensors().items():
        b = other.to_tensors()[name]
        if name.endswith(("keys", "values")):
            n = int(one.to_tensors()[name.split(".")[0] + ".lengths"].max())
            a, b = a[:, :, :n], b[:, :, :n]
        if largest_difference(a, b) >= 1e-4:
            return False
    return True


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_token_never_sees_what_follows_it(pattern: str):
    model, ids = build(pattern), tokens(1, 20)
    changed = ids.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 61
    with torch.inference_mode():
        before, after = model(ids), model(changed)
    # not bit for bit: an expert's product may group its rows otherwise when one token moves away
    assert largest_difference(before[:, :12], after[:, :12]) < 1e-5
    assert largest_difference(before[:, 12:], after[:, 12:]) > 1e-3


def test_state_given_to_step_and_prefill_is_left_as_it_is():
    for pattern in ("blackmamba", "transformer"):
        model, ids = build(pattern), tokens(2, 9)
        with torch.inference_mode():
            _, state = model.prefill(ids)
            kept = state.clone()
            model.step(ids[:, 0], state)
            model.prefill(ids, state)
        for name, tensor in state.to_tensors().items():
            assert torch.equal(tensor, kept.to_tensors()[name]), name


def test_mamba_memory_does_not_grow():
    model = build("blackmamba")
    with torch.inference_mode():
        _, few = model.prefill(tokens(2, 10))
        _, many = model.prefill(tokens(2, 500))
    assert few.nbytes == many.nbytes


def test_loss_is_the_mean_over_counted_labels():
    for changes in ({}, {"tie_embeddings": False, "head_bias": True}):
        model = build("blackmamba", **changes)
        ids, labels = tokens(2, 9), tokens(2, 9, seed=5)
        labels[0, :4] = -100
        expected = torch.nn.functional.cross_entropy(
            model(ids).flatten(0, 1).double(), labels.flatten(), ignore_index=-100
        )
        assert model.loss(ids, labels).item() == pytest.approx(expected.item(), rel=1e-6)


def test_training_balances_and_evaluation_takes_the_largest_logit():
    model, ids = build("blackmamba"), tokens(4, 64)
    trace = Trace(keep_hidden=True)
    with torch.inference_mode():
        model(ids, trace=trace)
        model.train()
        balanced = Trace()
        model(ids, trace=balanced)
    assert sorted(trace.hidden) == [0, 1, 2, 3]
    assert sorted(trace.routing) == [1, 3]
    assert not balanced.hidden
    for i, routing in trace.routing.items():
        assert torch.equal(routing.expert_ids, routing.logits.argmax(-1))
        chosen = routing.logits.gather(1, routing.expert_ids[:, None])[:, 0]
        assert torch.equal(routing.gate, chosen.sigmoid())
        stats, even = routing.statistics(), balanced.routing[i].statistics()
        assert stats.argmax_agreement == 1
        assert stats.dropped == 0
        assert int(stats.tokens_per_expert.sum()) == int(even.tokens_per_expert.sum()) == 256
        assert even.load_entropy > stats.load_entropy
        assert int(even.tokens_per_expert.max()) <= 2 * 64
        assert 0 < even.argmax_agreement < 1
        assert 0 < stats.router_entropy < torch.log(torch.tensor(4.0))


def test_the_router_learns_through_the_gate_alone():
    model, ids = build("blackmamba").train(), tokens(2, 16)
    model.loss(ids, ids).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_dtypes():
    config = presets["tiny"]
    for dtype in (torch.bfloat16, torch.float64):
        model = BlackMamba(config, dtype=dtype).eval()
        for name, parameter in model.named_parameters():
            wide = torch.promote_types(dtype, torch.float32)
            assert parameter.dtype == (wide if keeps_float32(name) else dtype), name
        assert model(tokens(1, 5)).dtype == dtype
        assert model.step(tokens(1, 1)[0], model.initial_state(1))[0].dtype == dtype
    mixed = BlackMamba(config, compute_dtype=torch.bfloat16)
    loss = mixed.loss(tokens(1, 5), tokens(1, 5))
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(
        p.dtype == p.grad.dtype == torch.float32 for p in mixed.parameters() if p.grad is not None
    )


def test_bfloat16_is_near_float32():
    torch.manual_seed(0)
    wide = BlackMamba(presets["mamba-tiny"]).eval()
    narrow = BlackMamba(presets["mamba-tiny"], dtype=torch.bfloat16).eval()
    narrow.load_state_dict(wide.state_dict())
    with torch.inference_mode():
        a, b = wide(tokens(2, 40)), narrow(tokens(2, 40)).float()
    # eight bits of mantissa through four layers: the logits' spread here is about 0.16
    assert largest_difference(a, b) < 0.05 * a.std().item() * 4


def test_residual_stream_in_the_compute_dtype():
    model = BlackMamba(
        ModelConfig(layers=PATTERNS["blackmamba"], residual_dtype="compute", **SMALL),  # pyright: ignore
        dtype=torch.bfloat16,
    )
    trace = Trace(keep_hidden=True)
    model(tokens(1, 4), trace=trace)
    assert {h.dtype for h in trace.hidden.values()} == {torch.bfloat16}


def test_same_seed_same_weights_and_sensible_first_loss():
    torch.manual_seed(3)
    one = BlackMamba(presets["tiny"])
    torch.manual_seed(3)
    two = BlackMamba(presets["tiny"])
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name
    ids = tokens(4, 32)
    loss = one.loss(ids, ids.roll(-1, 1)).item()
    assert loss == pytest.approx(torch.tensor(512.0).log().item(), abs=0.3)


def test_first_memory_spans():
    """softplus(dt_bias) lies within [1e-3, 1e-1] and A is -1 .. -n, as Mamba's authors begin."""
    model = BlackMamba(presets["tiny"])
    mixer = model.layers[0].mixer
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert dt.min() >= 0.99e-3
    assert dt.max() <= 1.01e-1
    assert torch.allclose(mixer.decay_rates()[0], -torch.arange(1.0, 17.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(4, dtype=torch.int64)), r"shape \(4,\)"),
        (lambda m: m(torch.zeros(1, 4)), "must be \\(batch, length\\), torch.int64"),
        (lambda m: m(torch.zeros(1, 0, dtype=torch.int64)), "at least one row and one token"),
        (lambda m: m(torch.zeros(0, 3, dtype=torch.int64)), "at least one row and one token"),
        (lambda m: m(torch.tensor([[3, 61]])), "holds 61: must be 0 .. 60"),
        (lambda m: m(torch.tensor([[3, -1]])), "holds -1"),
        (lambda m: m.loss(tokens(1, 3), tokens(1, 4)), "labels of shape"),
        (lambda m: m.loss(tokens(1, 1), torch.tensor([[99]])), "labels holds 99"),
        (lambda m: m.initial_state(0), "batch_size=0"),
        (
            lambda m: m.step(tokens(2, 1)[:, 0], m.initial_state(3)),
            "state of 3 rows: the input has 2",
        ),
        (lambda m: m.step(tokens(2, 1), m.initial_state(2)), r"next_ids of shape \(2, 1\)"),
        (lambda m: m.step(tokens(1, 1)[0], State(1, ())), "state of 0 layers: this model has 4"),
        (lambda m: m.prefill(tokens(2, 3), lengths=torch.tensor([3])), "lengths of shape"),
        (lambda m: m.prefill(tokens(2, 3), lengths=torch.tensor([3, 4])), r"lengths=\[3, 4\]"),
        (
            lambda m: m.prefill(tokens(2, 3), lengths=torch.tensor([3, 0]), logits="last"),
            r"lengths=\[3, 0\]",
        ),
        (lambda m: BlackMamba(m.config, dtype=torch.int32), "dtype=torch.int32"),
    ],
)
def test_bad_input_is_named(call, message: str):
    with pytest.raises(InputError, match=message):
        call(build("blackmamba"))


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated")  # torch's own tracing
@pytest.mark.parametrize("training", [False, True])
def test_compiles_to_one_graph(training: bool):
    torch.manual_seed(0)
    config = dataclasses.replace(
        presets["tiny"], layers=("mamba", "moe", "mamba+mlp", "attention"), d_mlp=40, n_heads=2,
        n_kv_heads=2, d_head=16,
    )  # fmt: skip
    model = BlackMamba(config).train(training)
    ids, labels = torch.randint(0, config.vocab_size, (2, 2, 33))
    expected = model.loss(ids, labels)
    compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True)(ids, labels)
    torch.testing.assert_close(compiled, expected)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(compiled, parameters), torch.autograd.grad(expected, parameters)
    )
