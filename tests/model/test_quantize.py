"""Quantised models: which parameters, how near, and that they are for inference."""

import dataclasses

import pytest
import torch
from numerics import largest_difference, relative_error

import blackmamba
from blackmamba.config import ModelConfig, QuantizationConfig
from blackmamba.errors import ConfigError, InputError
from blackmamba.model import BlackMamba, QuantizedStorage, quantize
from blackmamba.presets import presets

EVERY_KIND = ModelConfig(
    layers=("mamba", "attention", "mlp", "moe:5", "mamba+moe", "attention+mlp"),
    d_model=40,
    vocab_size=61,
    n_experts=3,
    d_expert=33,
    d_mlp=50,
    n_heads=4,
    n_kv_heads=2,
    d_head=10,
    tie_embeddings=False,
    head_bias=True,
    linear_bias=True,
)
CONFIGS = {"every kind": EVERY_KIND, **{n: presets[n] for n in ("tiny", "mamba-tiny")}}


def build(config: ModelConfig, **options: object) -> BlackMamba:
    torch.manual_seed(0)
    return BlackMamba(config, **options).eval()  # pyright: ignore


def tokens(b: int, l: int) -> torch.Tensor:
    return torch.randint(0, 61, (b, l), generator=torch.Generator().manual_seed(1))


def written_out(model: BlackMamba, quantised: BlackMamba) -> BlackMamba:
    """The unquantised model with the weights that the quantised one stands for."""
    twin = BlackMamba(model.config, dtype=torch.float64).eval()
    with torch.no_grad():
        stored = dict(quantised.named_modules())
        for name, parameter in twin.named_parameters():
            storage = stored.get(name)
            if isinstance(storage, QuantizedStorage):
                parameter.copy_(storage.whole(torch.float64))
            else:
                parameter.copy_(quantised.get_parameter(name))
    return twin


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("what", ["experts", "all"])
@pytest.mark.parametrize("name", CONFIGS)
def test_computes_what_the_written_out_model_computes(name: str, what: str, bits: int):
    if (name, what) == ("mamba-tiny", "experts"):
        pytest.skip("has no experts")
    model = build(CONFIGS[name])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quantised = quantize(model, bits, what=what)  # pyright: ignore
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    twin, ids = written_out(model, quantised), tokens(2, 20)
    with torch.no_grad():
        exact = twin(ids)
    logits = quantised(ids)  # needs no no_grad: nothing of it requires a gradient
    assert relative_error(logits, exact) < 1e-4
    last, state = quantised.prefill(ids[:, :12], logits="last")
    assert largest_difference(last, logits[:, 11]) < 1e-4
    for t in range(12, 20):
        last, state = quantised.step(ids[:, t], state)
        assert largest_difference(last, logits[:, t]) < 1e-4
    labels = ids.roll(-1, 1)
    assert relative_error(quantised.loss(ids, labels), twin.loss(ids, labels)) < 1e-5


def test_which_parameters():
    names = {
        what: {
            name: module.bits
            for name, module in quantize(build(EVERY_KIND), 4, what=what).named_modules()
            if isinstance(module, QuantizedStorage)
        }
        for what in ("experts", "all")
    }
    experts = [f"layers.{i}.feed_forward.fc{j}" for i in (3, 4) for j in (1, 2)]
    assert names["experts"] == dict.fromkeys(experts, 4)
    mamba = {"in_proj": 4, "x_proj": 8, "out_proj": 4}
    everything = dict.fromkeys(experts, 4) | {"embedding.weight": 8, "head.weight": 8}
    everything |= {f"layers.{i}.mixer.{n}.weight": b for i in (0, 4) for n, b in mamba.items()}
    for i in (1, 5):
        everything |= {f"layers.{i}.mixer.{n}_proj.weight": 4 for n in ("q", "k", "v", "out")}
    everything |= {f"layers.{i}.feed_forward.fc{j}.weight": 4 for i in (2, 5) for j in (1, 2)}
    assert names["all"] == everything


@pytest.mark.parametrize("what", ["experts", "all"])
def test_bfloat16(what: str):
    config = dataclasses.replace(presets["tiny"], n_experts=1)  # rounding changes no choice
    model = build(config, dtype=torch.bfloat16)
    quantised, ids = quantize(model, 8, what=what), tokens(2, 9)  # pyright: ignore
    logits = quantised(ids)
    assert logits.dtype == torch.bfloat16
    assert relative_error(logits, written_out(model, quantised)(ids)) < 0.05
    mixed = quantize(build(config, compute_dtype=torch.bfloat16), 8, what=what)  # pyright: ignore
    assert mixed(ids).dtype == torch.bfloat16
    assert mixed.get_parameter("layers.0.mixer.conv_weight").dtype == torch.float32


def test_random_weights_may_be_quantised_at_once():
    config = QuantizationConfig(bits=4, group_size=32, what="all")
    torch.manual_seed(0)
    model = BlackMamba(presets["tiny"], quantization=config)
    again = quantize(build(presets["tiny"]), 4, what="all")
    assert model.quantization == again.quantization == config
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


def test_generates():
    quantised = blackmamba.quantize(build(presets["tiny"]), 4, what="all")
    ids = blackmamba.generate(quantised, [[1, 2, 3], [4]], max_new_tokens=5, temperature=1.0)
    assert [len(row) for row in ids] == [5, 5]


def test_training_is_refused():
    quantised = quantize(build(presets["tiny"]), 8)
    assert not quantised.training
    assert not any(p.requires_grad for p in quantised.parameters())
    for train in (quantised.train, lambda: quantised.train(True)):
        with pytest.raises(InputError, match="quantised to 8 bits and for inference only"):
            train()
    assert quantised.train(False) is quantised.eval() is quantised
    quantised.requires_grad_()
    with pytest.raises(InputError, match="for inference only"):
        quantised.loss(tokens(1, 4), tokens(1, 4))


def test_scales_survive_a_change_of_dtype():
    quantised = quantize(build(presets["tiny"]), 8)
    before = {k: v.clone() for k, v in quantised.state_dict().items() if "fc" in k}
    quantised.to(torch.float64).half()
    for name, buffer in quantised.state_dict().items():
        if name in before:
            assert buffer.dtype == before[name].dtype
            assert torch.equal(buffer, before[name])


def test_wrong_arguments():
    model = build(presets["tiny"])
    with pytest.raises(ConfigError, match="bits=3: must be 8 or 4"):
        quantize(model, 3)  # pyright: ignore
    with pytest.raises(ConfigError, match="what='head': must be 'experts' or 'all'"):
        quantize(model, 8, what="head")  # pyright: ignore
    with pytest.raises(ConfigError, match="group_size=16: must be 32 or 64 or 128"):
        quantize(model, 8, group_size=16)  # pyright: ignore
    with pytest.raises(ConfigError, match="this model has no experts; use what='all'"):
        quantize(build(presets["mamba-tiny"]), 8)
    with pytest.raises(InputError, match="quantised already, to 8 bits"):
        quantize(quantize(model, 8), 4)
    with torch.no_grad():
        model.get_parameter("layers.1.feed_forward.fc1")[0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        quantize(model, 8)
