"""Saving, loading and converting; every kind of damaged folder."""

import dataclasses
import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lone import load_from_cache, peak_of_loading
from many_ranks import alone
from numerics import largest_difference

import blackmamba
from blackmamba.checkpoint import convert, load, load_config, load_tokenizer, native, save
from blackmamba.checkpoint.released import read_config, write_config
from blackmamba.config import ModelConfig
from blackmamba.data import Tokenizer
from blackmamba.errors import BlackMambaError, CheckpointError, ConfigError, DataError
from blackmamba.model import BlackMamba, keeps_float32
from blackmamba.presets import presets

FIXTURES = Path(__file__).parent.parent / "fixtures"
EVERY_KIND = ModelConfig(
    layers=("mamba", "attention", "mlp", "moe:12", "mamba+moe", "attention+mlp"),
    d_model=16,
    vocab_size=40,
    n_experts=3,
    d_expert=8,
    d_mlp=12,
    n_heads=2,
    n_kv_heads=1,
    d_head=8,
    tie_embeddings=False,
    head_bias=True,
    linear_bias=True,
)


def build(config: ModelConfig, **options: Any) -> BlackMamba:
    torch.manual_seed(0)
    return BlackMamba(config, **options).eval()


def same(one: BlackMamba, other: BlackMamba) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("config", [presets["tiny"], EVERY_KIND], ids=["tiny", "every kind"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saved_and_loaded_is_the_same(config: ModelConfig, dtype: torch.dtype, tmp_path: Path):
    model = build(config, dtype=dtype)
    save(model, tmp_path / "model")
    back = load(tmp_path / "model", dtype=dtype)
    assert back.config == config
    assert not back.training
    assert same(model, back)
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"]


def test_dtype_is_converted_and_sensitive_parameters_stay_wide(tmp_path: Path):
    model = build(presets["tiny"])
    save(model, tmp_path)
    narrow = load(tmp_path, dtype=torch.bfloat16)
    for name, parameter in narrow.named_parameters():
        original = model.get_parameter(name)
        assert parameter.dtype == (torch.float32 if keeps_float32(name) else torch.bfloat16)
        assert torch.equal(parameter, original.to(parameter.dtype))


def test_tokenizer_and_other_files_stay(tmp_path: Path):
    tokenizer = Tokenizer.train(["some words, some more words"], 260)
    (tmp_path / "notes.txt").write_text("keep me")
    save(build(presets["tiny"]), tmp_path, tokenizer=tokenizer)
    save(build(presets["tiny"]), tmp_path)
    back = load_tokenizer(tmp_path)
    assert back is not None
    assert back.to_json() == tokenizer.to_json()
    assert (tmp_path / "notes.txt").read_text() == "keep me"
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(FIXTURES / "released-dev") is None


def test_run_folders(tmp_path: Path):
    first, second = build(presets["tiny"]), build(presets["tiny"], dtype=torch.bfloat16)
    save(first, tmp_path / "checkpoints" / "step-00000001")
    save(second, tmp_path / "checkpoints" / "step-00000002")
    assert same(load(tmp_path, dtype=torch.bfloat16), second)  # the newest checkpoint
    save(first, tmp_path / "model")
    assert same(load(tmp_path), first)  # the finished model


@pytest.mark.parametrize("name", ["released-dev", "released-bias"])
def test_conversion_there_and_back_is_exact(name: str, tmp_path: Path):
    original = load(FIXTURES / name)
    convert(FIXTURES / name, tmp_path / "ours")
    assert same(load(tmp_path / "ours"), original)
    assert load_config(tmp_path / "ours") == original.config
    convert(tmp_path / "ours", tmp_path / "theirs", to="released")
    assert same(load(tmp_path / "theirs"), original)
    theirs = torch.load(FIXTURES / name / "pytorch_model.bin", weights_only=True)["model"]
    ours = torch.load(tmp_path / "theirs" / "pytorch_model.bin", weights_only=True)["model"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    plain = json.loads((FIXTURES / name / "config.json").read_text())
    assert (
        json.loads((tmp_path / "theirs" / "config.json").read_text()).items()
        >= (plain | {"bias": plain["add_bias_linear"]}).items()
    )


def test_conversion_keeps_activation_tokenizer_and_dtype(tmp_path: Path):
    silu = dataclasses.replace(presets["tiny"], activation="silu")
    tokenizer = Tokenizer.train(["some words"], 260)
    save(build(silu, dtype=torch.bfloat16), tmp_path / "ours", tokenizer=tokenizer)
    convert(tmp_path / "ours", tmp_path / "theirs", to="released")
    assert load_config(tmp_path / "theirs").activation == "silu"
    assert load_tokenizer(tmp_path / "theirs") is not None
    stored = torch.load(tmp_path / "theirs" / "pytorch_model.bin", weights_only=True)["model"]
    assert stored["embedding.word_embeddings.weight"].dtype == torch.bfloat16


def test_released_default_is_gelu_and_can_be_overridden():
    assert load(FIXTURES / "released-dev").config.activation == "gelu"
    assert load(FIXTURES / "released-dev", expert_activation="silu").config.activation == "silu"
    with pytest.raises(ConfigError, match="expert_activation='relu'"):
        load(FIXTURES / "released-dev", expert_activation="relu")  # pyright: ignore


RELEASED = {
    "num_layers": 6,
    "hidden_size": 16,
    "state_size": 4,
    "conv_dimension": 3,
    "vocab_size": 50_304,
    "expansion_factor": 2,
    "mamba_moe_layers": ["r", "16", "1", "r12", "r1", "2"],
    "ffn_hidden_size": 8,
}


def test_layer_codes_and_defaults():
    config = read_config(RELEASED, "config.json")
    assert config.layers == ("mamba", "moe", "mlp", "mamba+moe:12", "mamba+mlp", "moe:2")
    assert config.n_experts == 16
    assert (config.unused_vocab, config.n_tokens) == (27, 50_277)
    assert (config.gated, config.linear_bias, config.activation) == (True, False, "gelu")
    assert write_config(config)["mamba_moe_layers"] == RELEASED["mamba_moe_layers"]
    assert read_config(RELEASED | {"mamba_moe_layers": []}, "x").layers == ("mamba",) * 6


@pytest.mark.parametrize("name", ["blackmamba-1.5b", "blackmamba-2.8b"])
def test_presets_are_the_released_models_but_for_the_activation(name: str):
    config = dataclasses.replace(presets[name], activation="gelu")
    assert read_config(write_config(config), "config.json") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0: must be whole numbers"),
        ({"mamba_moe_layers": ["r"]}, "num_layers=6, but mamba_moe_layers has 1"),
        ({"mamba_moe_layers": ["r"] * 5 + ["x"]}, r"mamba_moe_layers\[5\]='x': valid are"),
        ({"mamba_moe_layers": ["r"] * 5 + ["0"]}, r"mamba_moe_layers\[5\]='0'"),
        ({"expert_activation": "relu"}, "expert_activation='relu'"),
    ],
)
def test_wrong_released_configurations(change: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=message):
        read_config(RELEASED | change, "config.json")


def test_missing_keys_are_named_at_once():
    plain = {k: v for k, v in RELEASED.items() if k not in ("state_size", "vocab_size")}
    with pytest.raises(CheckpointError, match="missing state_size, vocab_size"):
        read_config(plain, "config.json")


def test_what_the_released_format_cannot_express():
    with pytest.raises(ConfigError, match="attention layers") as error:
        write_config(EVERY_KIND)
    for part in ("tie_embeddings=False", "d_mlp=12 other than d_expert=8"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="one expert"):
        write_config(dataclasses.replace(presets["tiny"], layers=("mamba", "moe:1")))
    with pytest.raises(ConfigError, match="to='other'"):
        convert(FIXTURES / "released-dev", "nowhere", to="other")  # pyright: ignore


def released_copy(folder: Path, change: Callable[[dict[str, Any]], Any] | None = None) -> Path:
    """The released fixture, with its tensors changed; `change` may return another content."""
    folder.mkdir()
    source = FIXTURES / "released-dev"
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = torch.load(source / "pytorch_model.bin", weights_only=True)["model"]
    content = change(tensors) if change else None
    torch.save(content if content is not None else {"model": tensors}, folder / "pytorch_model.bin")
    return folder


def test_other_shapes_of_released_files(tmp_path: Path):
    original = load(FIXTURES / "released-dev")
    flat = released_copy(tmp_path / "flat", lambda t: t)
    assert same(load(flat), original)

    def add_known(t: dict[str, Any]) -> None:
        t["embedding.position_embeddings.weight"] = torch.zeros(8, 72)
        t["output_layer.weight"] = t["embedding.word_embeddings.weight"]

    assert same(load(released_copy(tmp_path / "known", add_known)), original)

    def own_head(t: dict[str, Any]) -> None:
        t["output_layer.weight"] = t["embedding.word_embeddings.weight"] + 1

    untied = load(released_copy(tmp_path / "untied", own_head))
    assert not untied.config.tie_embeddings
    assert untied.head is not None
    assert torch.equal(untied.head.weight, original.embedding.weight + 1)

    legacy = released_copy(tmp_path / "legacy")
    tensors = torch.load(legacy / "pytorch_model.bin", weights_only=True)
    torch.save(tensors, legacy / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert same(load(legacy), original)

    converted = released_copy(tmp_path / "safetensors")
    tensors = torch.load(converted / "pytorch_model.bin", weights_only=True)["model"]
    from safetensors.torch import save_file

    save_file(tensors, converted / "model.safetensors")
    (converted / "pytorch_model.bin").unlink()
    assert same(load(converted), original)


def test_all_that_does_not_fit_is_named_at_once(tmp_path: Path):
    def damage(t: dict[str, Any]) -> None:
        del t["decoder.layers.0.mixer.D"]
        for j in range(9):
            t[f"odd.{j}"] = torch.zeros(1)
        t["decoder.final_layernorm.bias"] = torch.zeros(5)

    with pytest.raises(CheckpointError) as error:
        load(released_copy(tmp_path / "damaged", damage))
    message = str(error.value)
    assert "missing decoder.layers.0.mixer.D;" in message
    assert "unexpected odd.0, odd.1" in message
    assert "odd.7 and 1 more" in message
    assert "wrong shape: decoder.final_layernorm.bias (5,) instead of (72,)" in message
    assert "\n" not in message


class Exploit:
    """Unpickling it would run code."""

    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folder = released_copy(tmp_path / "evil", lambda t: {"model": t, "x": Exploit()})
    with pytest.raises(CheckpointError, match="holds code or objects other than tensors"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model": Exploit()}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "half", "empty", "garbage", "missing"])
def test_damaged_weight_files(file: str, damage: str, tmp_path: Path):
    folder = released_copy(tmp_path / "folder")
    if file == "model.safetensors":
        convert(folder, tmp_path / "ours")
        folder = tmp_path / "ours"
    path = folder / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"truncated": content[:-50], "half": content[: len(content) // 2], "empty": b"",
             "garbage": b"garbage " * 100}[damage]
        )  # fmt: skip
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert file in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "neither ours"),
        ("{}", "neither ours"),
        ('{"format": "blackmamba", "format_version": 9}', "format_version=9"),
        ('{"format": "blackmamba", "format_version": 1, "model": {"d_modell": 1}}', "d_modell"),
    ],
)
def test_damaged_configurations(text: str, message: str, tmp_path: Path):
    save(build(presets["tiny"]), tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BlackMambaError, match=message):
        load(tmp_path)


def test_folders_that_are_not_there(tmp_path: Path):
    for name in ("./nowhere", str(tmp_path / "nowhere"), "a/b/c", "word"):
        with pytest.raises(CheckpointError, match="no such folder"):
            load(name)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file: a file, must be a model's folder"):
        load(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"no config\.json in this folder"):
        load(tmp_path)


def test_hub_names(tmp_path: Path):
    """A local cache, laid out as the hub's client does, with the network off."""
    repository = tmp_path / "hub" / "models--Somebody--Model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    released_copy(repository / "snapshots" / ("0" * 40))
    width, said = alone(load_from_cache, tmp_path, "Somebody/Model", "Somebody/Else")
    assert width == 72
    assert said.startswith("Somebody/Else: no such folder, and not to be had from the hub")


@pytest.mark.parametrize("stop", ["while writing", "full disk"])
def test_a_failed_save_leaves_the_old_model(
    stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    old = build(presets["tiny"])
    save(old, tmp_path)
    before = sorted(os.listdir(tmp_path))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if stop == "full disk":
        monkeypatch.setattr(native, "save_file", fail)
    else:
        monkeypatch.setattr(native, "_write", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(build(presets["mamba-tiny"]), tmp_path)
    assert sorted(os.listdir(tmp_path)) == before
    assert same(load(tmp_path), old)


def test_a_stop_between_the_renames_never_leaves_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save(build(presets["tiny"]), tmp_path)

    def stop(*_: Any) -> None:
        raise OSError("stopped")

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(CheckpointError, match="stopped"):
        save(build(presets["mamba-tiny"]), tmp_path)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("stored", "wanted", "to"),
    [
        ("float32", "float32", "native"),
        ("bfloat16", "float32", "native"),
        ("float32", "bfloat16", "native"),
        ("float32", "bfloat16", "released"),
    ],
)
def test_loading_takes_little_more_memory_than_the_model(
    stored: str, wanted: str, to: str, tmp_path: Path
):
    config = dataclasses.replace(
        presets["demo"], d_model=512, d_expert=1024, layers=("mamba", "moe") * 2, vocab_size=8192
    )
    save(build(config, dtype=getattr(torch, stored)), tmp_path / "native")
    if to == "released":
        convert(tmp_path / "native", tmp_path / to, to="released")
    options = {"dtype": getattr(torch, wanted)}
    assert alone(peak_of_loading, FIXTURES / "released-dev", tmp_path / to, options) < 1.15


def test_load_and_save_are_the_packages_own():
    assert blackmamba.load is load
    assert blackmamba.save is save
    model = load(FIXTURES / "released-dev", dtype=torch.float64)
    ids = torch.tensor([[1, 2, 3]])
    narrow = load(FIXTURES / "released-dev")(ids)
    assert largest_difference(model(ids), narrow) < 1e-4
