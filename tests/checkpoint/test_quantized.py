"""Model folders of quantised models."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from lone import peak_of_loading
from many_ranks import alone
from safetensors.torch import load_file, save_file

import blackmamba
from blackmamba.checkpoint import (
    convert,
    load,
    load_config,
    load_quantization,
    load_tokenizer,
    save,
)
from blackmamba.config import QuantizationConfig
from blackmamba.data import Tokenizer
from blackmamba.errors import CheckpointError, ConfigError
from blackmamba.model import BlackMamba, quantize
from blackmamba.presets import presets


def build(name: str = "tiny", dtype: torch.dtype = torch.float32) -> BlackMamba:
    torch.manual_seed(0)
    return BlackMamba(presets[name], dtype=dtype).eval()


def same(one: BlackMamba, other: BlackMamba) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", ["tiny", "moe-transformer-tiny"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", ["experts", "all"])
@pytest.mark.parametrize("bits", [8, 4])
def test_saved_and_loaded_is_the_same(
    bits: int, what: str, dtype: torch.dtype, name: str, tmp_path: Path
):
    model = quantize(build(name, dtype), bits, what=what)  # pyright: ignore
    save(model, tmp_path)
    back = load(tmp_path, dtype=dtype)
    assert (back.config, back.quantization) == (model.config, model.quantization)
    assert load_config(tmp_path) == model.config
    assert load_quantization(tmp_path) == model.quantization
    assert not back.training
    assert not any(p.requires_grad for p in back.parameters())
    assert same(model, back)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids), back(ids))


def test_plain_names_and_the_rest_in_the_dtype_asked_for(tmp_path: Path):
    model = quantize(build(), 8, what="all")
    save(model, tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert names["layers.1.feed_forward.fc1.data"].dtype == torch.int8
    assert names["layers.0.mixer.in_proj.weight.scales"].dtype == torch.bfloat16
    assert "embedding.weight.data" in names
    plain = json.loads((tmp_path / "config.json").read_text())
    assert plain["quantization"] == {"bits": 8, "group_size": 64, "what": "all"}
    narrow = load(tmp_path, dtype=torch.bfloat16)
    assert narrow.get_parameter("layers.0.mixer.conv_weight").dtype == torch.bfloat16
    assert narrow.get_parameter("layers.0.mixer.A_log").dtype == torch.float32
    for name, buffer in model.named_buffers():
        assert torch.equal(narrow.get_buffer(name), buffer)
    ids = torch.tensor([[1, 2, 3]])
    assert narrow(ids).dtype == torch.bfloat16
    assert load(tmp_path, expert_activation="gelu").config.activation == "gelu"
    assert blackmamba.generate(narrow, [[1, 2]], max_new_tokens=3) != []


@pytest.mark.parametrize("name", ["tiny", "transformer-tiny"])
def test_conversion(name: str, tmp_path: Path):
    """transformer-tiny has no parameter left that says which dtype the rest has."""
    tokenizer = Tokenizer.train(["some words"], 260)
    model = quantize(build(name, torch.bfloat16), 4, what="all")
    save(model, tmp_path / "one", tokenizer=tokenizer)
    convert(tmp_path / "one", tmp_path / "two")
    assert same(load(tmp_path / "two", dtype=torch.bfloat16), model)
    assert load_tokenizer(tmp_path / "two") is not None
    with pytest.raises(ConfigError, match="quantised, which the released format cannot express"):
        convert(tmp_path / "one", tmp_path / "three", to="released")
    assert not (tmp_path / "three").exists()


def test_saving_over_another_kind(tmp_path: Path):
    model = build()
    save(model, tmp_path)
    save(quantize(model, 4), tmp_path)
    assert load_quantization(tmp_path) == QuantizationConfig(bits=4, group_size=32)
    save(model, tmp_path)
    assert load_quantization(tmp_path) is None
    assert same(load(tmp_path), model)


def test_files_that_do_not_fit(tmp_path: Path):
    save(quantize(build(), 8), tmp_path)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors, plain = load_file(path), json.loads(config.read_text())
    name = "layers.1.feed_forward.fc1.data"
    save_file(tensors | {name: tensors[name].float()}, path)
    with pytest.raises(CheckpointError, match=rf"wrong dtype: {name} torch.float32"):
        load(tmp_path)
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    with pytest.raises(CheckpointError, match=f"missing {name}"):
        load(tmp_path)
    save_file(tensors, path)
    config.write_text(json.dumps({k: v for k, v in plain.items() if k != "quantization"}))
    with pytest.raises(CheckpointError, match=r"unexpected layers.1.feed_forward.fc1.data"):
        load(tmp_path)
    for change, message in (
        ({"bits": 3}, "quantization.bits=3: must be one of 8, 4"),
        ({"bitz": 4}, "did you mean 'bits'"),
        ({"what": "head"}, "quantization.what='head'"),
    ):
        wrong = plain["quantization"] | change
        config.write_text(json.dumps(plain | {"quantization": wrong}))
        with pytest.raises(ConfigError, match=message):
            load(tmp_path)
    config.write_text(json.dumps(plain | {"quantization": None}))
    with pytest.raises(ConfigError, match="quantization"):
        load(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_loading_takes_little_more_memory_than_the_model(tmp_path: Path):
    config = dataclasses.replace(
        presets["demo"], d_model=768, d_expert=1536, layers=("mamba", "moe") * 2, vocab_size=8192
    )
    save(build(), tmp_path / "tiny")
    save(quantize(BlackMamba(config), 8, what="all"), tmp_path / "large")
    options = {"dtype": torch.bfloat16}
    assert alone(peak_of_loading, tmp_path / "tiny", tmp_path / "large", options) < 1.15
