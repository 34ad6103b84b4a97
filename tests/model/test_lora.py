"""Low-rank adapters: what they compute, what they train, and what they leave alone."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from blackmamba import generate
from blackmamba.config import ModelConfig
from blackmamba.errors import ConfigError
from blackmamba.model import BlackMamba
from blackmamba.model.lora import (
    Adaptation,
    LoRAConfig,
    adapter_tensors,
    adapters,
    add_adapters,
    draw_dropout,
    merge_adapters,
    merged_tensors,
)

CONFIG = ModelConfig(
    layers=("mamba", "moe", "attention", "mlp", "mamba+moe"), d_model=16, vocab_size=40, d_state=4,
    n_experts=3, d_expert=12, d_mlp=20, n_heads=2, n_kv_heads=1, d_head=8,
)  # fmt: skip
USUAL = {"in_proj", "x_proj", "out_proj", "q_proj", "k_proj", "v_proj", "fc1", "fc2"}


def ids() -> Tensor:
    return torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def adapted() -> Callable[..., BlackMamba]:
    """A model with adapters that do something; keyword arguments are of LoRAConfig."""

    def build(
        config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32, **lora: Any
    ) -> BlackMamba:
        torch.manual_seed(0)
        model = BlackMamba(config, dtype=dtype)
        add_adapters(model, Adaptation(LoRAConfig(**{"rank": 2, "alpha": 4.0} | lora), "x", "y"))
        for name, tensor in adapter_tensors(model).items():
            if name.endswith("lora_B"):
                tensor.normal_(std=0.1)
        return model

    return build


def names(model: BlackMamba) -> set[str]:
    return {name.removesuffix(".weight") for name, _ in adapters(model)}


def test_the_adapted_matrix_is_the_sum(adapted: Callable[..., BlackMamba]):
    model = adapted(dtype=torch.float64)
    tensors, merged = adapter_tensors(model), merged_tensors(model)
    plain = BlackMamba(CONFIG, dtype=torch.float64)
    assert merged.keys() == plain.state_dict().keys()
    torch.manual_seed(0)
    before = BlackMamba(CONFIG, dtype=torch.float64).state_dict()
    for name in before:
        if f"{name}.lora_A" not in tensors:
            assert torch.equal(merged[name], before[name]), name
            continue
        A, B = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
        change = 2.0 * torch.einsum("...or,...ri->...oi", B, A)  # alpha / rank
        torch.testing.assert_close(merged[name], before[name] + change)
        assert change.abs().max() > 1e-3


def test_merged_equals_adapted(adapted: Callable[..., BlackMamba]):
    """In float64, in one pass, token by token, and after both ways of merging."""
    model = adapted(dtype=torch.float64).eval()
    logits = model(ids())
    plain = BlackMamba(CONFIG, dtype=torch.float64).eval()
    plain.load_state_dict(merged_tensors(model))
    torch.testing.assert_close(plain(ids()), logits, rtol=0, atol=0)
    tokens = generate(model, ids().tolist(), 5)
    merge_adapters(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert type(model.layers[0].mixer.in_proj).__name__ == "Linear"  # pyright: ignore
    torch.testing.assert_close(model(ids()), logits, rtol=0, atol=0)
    assert generate(model, ids().tolist(), 5) == tokens


def test_new_adapters_change_nothing():
    torch.manual_seed(0)
    model = BlackMamba(CONFIG).eval()
    before = model(ids())
    add_adapters(model, Adaptation(LoRAConfig(rank=4), "", ""))
    assert torch.equal(model(ids()), before)


@pytest.mark.parametrize("backend", ["auto", "reference", "torch", "native", "triton"])
def test_gradients_reach_every_adapter_and_nothing_else(
    backend: str, adapted: Callable[..., BlackMamba], monkeypatch: pytest.MonkeyPatch
):
    """On every backend, and as large as in float64 on the reference."""
    config = CONFIG
    if backend == "triton":
        pytest.importorskip("triton")
        config = dataclasses.replace(CONFIG, layers=("mamba", "moe"))

    weights = adapted(config).state_dict()

    def gradients(dtype: torch.dtype) -> dict[str, Tensor]:
        model = adapted(config, dtype=dtype)
        model.load_state_dict(weights)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        model.loss(ids()[:, :-1], ids()[:, 1:]).backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
        for name, parameter in model.named_parameters():
            moved = not torch.equal(parameter, before[name])
            assert moved == (name.rpartition(".")[2] in ("lora_A", "lora_B")), name
        return found

    monkeypatch.setenv("BLACKMAMBA_BACKEND", "reference")
    exact = gradients(torch.float64)
    monkeypatch.setenv("BLACKMAMBA_BACKEND", backend)
    found = gradients(torch.float32)
    assert found.keys() == exact.keys()
    for name, gradient in found.items():
        assert gradient.any(), name
        # float32 against float64: about 1e-6 of the largest number, seen at these sizes
        torch.testing.assert_close(
            gradient.double(), exact[name], rtol=1e-3, atol=2e-5 * exact[name].abs().max().item(),
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def test_each_expert_has_its_own(adapted: Callable[..., BlackMamba]):
    tensors = adapter_tensors(adapted())
    assert tensors["layers.1.feed_forward.fc1.lora_A"].shape == (3, 2, 16)
    assert tensors["layers.1.feed_forward.fc1.lora_B"].shape == (3, 24, 2)
    assert tensors["layers.1.feed_forward.fc2.lora_A"].shape == (3, 2, 12)


def test_adapters_are_wide_in_a_narrow_model(adapted: Callable[..., BlackMamba]):
    model = adapted(dtype=torch.bfloat16)
    assert {t.dtype for t in adapter_tensors(model).values()} == {torch.float32}
    assert model.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16  # pyright: ignore


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["in_proj", "fc1"], {"layers.0.mixer.in_proj", "layers.1.feed_forward.fc1",
         "layers.3.feed_forward.fc1", "layers.4.mixer.in_proj", "layers.4.feed_forward.fc1"}),
        (["layers.0"], {f"layers.0.mixer.{n}" for n in ("in_proj", "x_proj", "out_proj")}),
        (["layers.1.feed_forward.*"], {f"layers.1.feed_forward.fc{n}" for n in (1, 2)}),
        (["dt_proj", "layers.1.*.router"], {"layers.0.mixer.dt_proj", "layers.4.mixer.dt_proj",
         "layers.1.feed_forward.router"}),
        (["embedding"], {"embedding"}),
        (["A_log", "conv_weight"], {f"layers.{i}.mixer.{n}" for i in (0, 4)
         for n in ("A_log", "conv_weight")}),
    ],
    ids=lambda value: " ".join(sorted(value)),
)  # fmt: skip
def test_targets(targets: list[str], expected: set[str], adapted: Callable[..., BlackMamba]):
    model = adapted(targets=tuple(targets))
    assert names(model) == expected
    model.loss(ids()[:, :-1], ids()[:, 1:]).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_all_usual_ones_and_no_other_unless_named(adapted: Callable[..., BlackMamba]):
    found = names(adapted())
    assert {name.rpartition(".")[2] for name in found} == USUAL
    assert len(found) == 2 * 3 + 4 + 3 * 2


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("in_porj", r"lora.targets: 'in_porj' matches nothing; did you mean 'in_proj'"),
        ("D", "'D' is a vector"),
        ("dt_bias", "'dt_bias' is a vector"),
        ("*.router.*", "reach no matrix that is usually adapted"),
    ],
)
def test_targets_that_cannot_be(target: str, message: str, adapted: Callable[..., BlackMamba]):
    with pytest.raises(ConfigError, match=message):
        adapted(targets=(target,))


@pytest.mark.parametrize(
    "wrong",
    [{"rank": -1}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": ()}],
    ids=str,
)
def test_settings_are_checked(wrong: dict[str, Any]):
    with pytest.raises(ConfigError, match=f"lora.{next(iter(wrong))}"):
        LoRAConfig(**wrong)


def test_dropout_is_of_training_alone_and_follows_from_the_step(
    adapted: Callable[..., BlackMamba],
):
    model = adapted(dropout=0.5)
    weight = copy.deepcopy(model).eval().layers[0].mixer.in_proj.weight  # pyright: ignore
    seen: list[Tensor] = []
    for step in (3, 3, 4):
        draw_dropout(model, 0, step)
        seen.append(model.layers[0].mixer.in_proj.weight.detach())  # pyright: ignore
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert torch.equal(model.eval().layers[0].mixer.in_proj.weight, weight)  # pyright: ignore
    assert torch.equal(merged_tensors(model.train())["layers.0.mixer.in_proj.weight"], weight)
    kept = torch.stack([added.kept for name, added in adapters(model) if name.endswith("fc1")])
    assert set(kept.unique().tolist()) == {0.0, 2.0}
