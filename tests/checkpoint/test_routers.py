"""Models of every kind of router, saved, loaded, quantised and refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from blackmamba.checkpoint import load, save
from blackmamba.checkpoint.convert import convert
from blackmamba.checkpoint.released import write_config
from blackmamba.config import ModelConfig
from blackmamba.errors import ConfigError
from blackmamba.generate import generate
from blackmamba.generate.decoder import cannot_decode
from blackmamba.model import BlackMamba, balance_step, quantize

CONFIG = ModelConfig(
    layers=("mamba", "moe"), d_model=32, vocab_size=61, n_experts=5, d_expert=32,
    experts_per_token=2, router="sigmoid", selection_bias=True, d_shared_expert=40, mamba_norm=True,
)  # fmt: skip
IDS = torch.arange(12).view(2, 6)


def trained(config: ModelConfig = CONFIG) -> BlackMamba:
    torch.manual_seed(0)
    model = BlackMamba(config)
    model.loss(IDS, IDS)
    balance_step(model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name or "router" in name:
                tensor.add_(0.3 * torch.randn_like(tensor))
    return model.eval()


def test_saved_and_loaded_it_is_the_same(tmp_path: Path):
    model = trained()
    model.train().loss(IDS, IDS)  # what was counted since the last step is not saved
    save(model.eval(), tmp_path)
    loaded = load(tmp_path)
    assert loaded.config == CONFIG
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert any(n.endswith("selection_bias") for n in model.state_dict())
    assert torch.equal(loaded(IDS), model(IDS))
    before = {n: t.clone() for n, t in loaded.named_buffers()}
    balance_step(loaded)  # nothing was counted
    assert all(torch.equal(t, before[n]) for n, t in loaded.named_buffers())
    narrow = load(tmp_path, dtype=torch.bfloat16)
    biases = [t for n, t in narrow.named_buffers() if n.endswith("selection_bias")]
    assert [t.dtype for t in biases] == [torch.float32]


def test_a_config_from_before_these_routers_loads(tmp_path: Path):
    old = dataclasses.replace(
        CONFIG, router="sinkhorn", experts_per_token=1, selection_bias=False, d_shared_expert=0,
        mamba_norm=False,
    )  # fmt: skip
    save(BlackMamba(old), tmp_path)
    plain = json.loads((tmp_path / "config.json").read_text())
    known = ("router", "experts_per_token", "normalize_gates", "d_shared_expert", "balance_loss",
             "balance_scope", "router_z_loss", "selection_bias", "selection_bias_rate",
             "selection_bias_update", "sinkhorn_scope", "mamba_norm")  # fmt: skip
    for key in known:
        del plain["model"][key]
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert load(tmp_path).config == old


def test_quantised_experts(tmp_path: Path):
    model = trained()
    for what in ("experts", "all"):
        narrow = quantize(model, 8, what=what)
        assert (narrow(IDS) - model(IDS)).abs().max() < 0.05 * model(IDS).abs().max()
        assert torch.equal(*(dict(m.named_buffers())["layers.1.feed_forward.router.selection_bias"]
                             for m in (narrow, model)))  # fmt: skip
        save(narrow, tmp_path / what)
        assert torch.equal(load(tmp_path / what)(IDS), narrow(IDS))


def test_generation_is_that_of_the_steps():
    model = trained()
    found = generate(model, [[1, 2, 3], [4]], max_new_tokens=5, temperature=0)
    for prompt, new in zip([[1, 2, 3], [4]], found, strict=True):
        ids = list(prompt)
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert list(new)[-5:] == ids[-5:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 2}, "experts_per_token=2"),
        ({"router": "softmax"}, "router='softmax'"),
        ({"d_shared_expert": 8}, "d_shared_expert=8"),
        ({"router": "sigmoid", "selection_bias": True}, "selection_bias=True"),
        ({"mamba_norm": True}, "mamba_norm=True"),
    ],
)
def test_the_released_format_cannot_hold_them(changes, message: str, tmp_path: Path):
    paper = ModelConfig(layers=("mamba", "moe"), d_model=32, vocab_size=61, d_expert=32)
    write_config(paper)
    write_config(dataclasses.replace(paper, router="sigmoid", router_z_loss=0.1))
    config = dataclasses.replace(paper, **changes)
    save(BlackMamba(config), tmp_path / "ours")
    with pytest.raises(ConfigError, match=f"the released format cannot express {message}"):
        convert(tmp_path / "ours", tmp_path / "theirs", to="released")
    assert not (tmp_path / "theirs").exists()
    assert cannot_decode(BlackMamba(config)) is not None
