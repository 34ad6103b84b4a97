"""Models in the released format compute what the authors' own code computes."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from numerics import largest_difference

import blackmamba
from blackmamba.model import AttentionState, BlackMamba, MambaState, Trace

FIXTURES = Path(__file__).parent.parent / "fixtures"
Activation = Literal["gelu", "silu"]
pytestmark = [
    pytest.mark.parametrize("name", ["released-dev", "released-bias"]),
    pytest.mark.parametrize("activation", ["gelu", "silu"]),
]


def loaded(name: str, activation: Activation) -> tuple[BlackMamba, dict[str, torch.Tensor]]:
    model = blackmamba.load(FIXTURES / name, expert_activation=activation)
    with np.load(FIXTURES / name / "expected.npz") as file:
        golden = {k.removeprefix(activation + "/"): torch.from_numpy(v) for k, v in file.items()}
    return model, golden


@torch.inference_mode()
def test_logits_hidden_states_experts_and_gates(name: str, activation: Activation):
    model, golden = loaded(name, activation)
    ids, trace = golden["input_ids"], Trace(keep_hidden=True)
    assert largest_difference(model(ids, trace=trace), golden["logits"]) < 2e-4
    for i, hidden in trace.hidden.items():
        assert largest_difference(hidden, golden["residual_after_block"][i]) < 2e-4
    routed = [i for i, spec in enumerate(model.config.layer_specs) if spec.feed_forward == "moe"]
    assert sorted(trace.routing) == routed
    for i, routing in trace.routing.items():
        assert torch.equal(routing.expert_ids.view(ids.shape), golden[f"router_argmax_L{i}"].long())
        gates = golden[f"router_maxsig_L{i}"]
        assert largest_difference(routing.gate.view(ids.shape), gates) < 1e-5
        every = golden[f"router_sigmoid_L{i}"]
        assert largest_difference(routing.logits.sigmoid().view(every.shape), every) < 1e-5


@torch.inference_mode()
def test_states_after_prefill(name: str, activation: Activation):
    if activation == "silu":
        pytest.skip("the golden states are of the gelu run")
    model, golden = loaded(name, activation)
    _, state = model.prefill(golden["input_ids"])
    for i, layer in enumerate(state.layers):
        assert not isinstance(layer, AttentionState)
        if isinstance(layer, MambaState):
            assert largest_difference(layer.ssm, golden[f"prefill_ssm_state_key{i + 1}"]) < 1e-5
            # theirs has one more column, which no later token looks at
            tail = golden[f"prefill_conv_state_key{i + 1}"][:, :, 1:]
            assert largest_difference(layer.conv, tail) < 5e-5


@torch.inference_mode()
def test_greedy_continuations(name: str, activation: Activation):
    model, golden = loaded(name, activation)
    ids = golden["input_ids"]
    for key, length in [("greedy_tokens", ids.shape[1])] + [
        (f"short_prompt{k}_greedy_tokens", k) for k in (1, 2, 3)
    ]:
        prompts = ids[:, :length].tolist()
        expected = golden[key]
        got = blackmamba.generate(model, prompts, max_new_tokens=expected.shape[1])
        assert got == expected.tolist(), key


@torch.inference_mode()
def test_logits_of_the_last_greedy_step(name: str, activation: Activation):
    model, golden = loaded(name, activation)
    greedy = golden["greedy_tokens"]
    logits, state = model.prefill(golden["input_ids"], logits="last")
    for t in range(greedy.shape[1] - 1):
        logits, state = model.step(greedy[:, t], state)
    assert largest_difference(logits, golden["greedy_step_logits_last"]) < 2e-4
