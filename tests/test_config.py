"""Configurations: what they accept, what they refuse, and that they survive JSON and YAML."""

import dataclasses
import json
from typing import Any, Literal

import pytest
import yaml

from blackmamba.config import LayerSpec, ModelConfig, from_mapping, nearest, to_mapping
from blackmamba.errors import ConfigError
from blackmamba.presets import presets


def make(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "layers": ("mamba", "moe"),
        "d_model": 8,
        "vocab_size": 16,
        "d_expert": 4,
    }
    return ModelConfig(**(values | changes))


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("mamba", LayerSpec("mamba", "none", 0)),
        ("attention", LayerSpec("attention", "none", 0)),
        ("mlp", LayerSpec("none", "mlp", 0)),
        ("moe", LayerSpec("none", "moe", 8)),
        ("moe:16", LayerSpec("none", "moe", 16)),
        ("mamba+moe", LayerSpec("mamba", "moe", 8)),
        ("mamba+moe:3", LayerSpec("mamba", "moe", 3)),
        ("attention+mlp", LayerSpec("attention", "mlp", 0)),
    ],
)
def test_layer_kinds(text: str, spec: LayerSpec):
    config = make(layers=(text,), d_mlp=4, n_heads=2, n_kv_heads=1)
    assert config.layer_specs == (spec,)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "r",
        "mambamoe",
        "mamba+",
        "+moe",
        "moe+mamba",
        "mlp:3",
        "moe:0",
        "moe:x",
        "mamba+attention",
        "moe:9999999999",
    ],
)
def test_unknown_layer_is_named(text: str):
    with pytest.raises(ConfigError, match=r"layers\[1\]=.*parallel pair"):
        make(layers=("mamba", text), d_mlp=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 0}, "d_model=0: must be at least 1"),
        ({"expand": 2**30 + 1}, "expand=1073741825: must be at most 1073741824"),
        ({"d_state": -1}, "d_state=-1"),
        ({"norm_eps": 0.0}, "norm_eps=0.0: must be positive"),
        ({"sinkhorn_tolerance": float("nan")}, "sinkhorn_tolerance=nan"),
        ({"layers": ()}, "at least one layer"),
        ({"unused_vocab": 16}, "unused_vocab=16: must be 0 .. 15"),
        ({"d_expert": 0}, "d_expert=0"),
        ({"layers": ("mlp",)}, "d_mlp=0"),
        ({"layers": ("attention",)}, "n_heads=0"),
        ({"layers": ("attention",), "n_heads": 3, "n_kv_heads": 2}, "must divide n_heads"),
        ({"layers": ("attention",), "n_heads": 2, "n_kv_heads": 2, "d_head": 3}, "even head width"),
        ({"experts_per_token": 0}, "experts_per_token=0: must be at least 1"),
        ({"experts_per_token": 9}, "experts_per_token=9: layer 'moe' has 8 experts"),
        ({"layers": ("moe:2",), "experts_per_token": 3}, "layer 'moe:2' has 2 experts"),
        ({"d_shared_expert": -1}, "d_shared_expert=-1: must be finite and at least 0"),
        ({"router_z_loss": float("nan")}, "router_z_loss=nan: must be finite"),
        ({"balance_loss": 0.1}, "balance_loss=0.1: router='sinkhorn' balances by its plan"),
        ({"selection_bias": True}, "selection_bias=True: router='sinkhorn'"),
        ({"normalize_gates": True}, "normalize_gates=True: needs experts_per_token"),
        ({"router": "softmax", "sinkhorn_scope": "global"}, "router='softmax' has no plan"),
        ({"router": "softmax", "balance_scope": "global"}, "needs a balance_loss above 0"),
        ({"router": "sigmoid", "selection_bias_update": "error"}, "needs selection_bias=True"),
    ],
)
def test_wrong_values_are_named(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_derived_sizes():
    config = make(d_model=1472, unused_vocab=3)
    assert (config.d_inner, config.dt_rank, config.n_layers, config.n_tokens) == (2944, 92, 2, 13)


@pytest.mark.parametrize("name", list(presets))
def test_json_and_yaml_round_trip(name: str):
    plain = to_mapping(presets[name])
    assert from_mapping(ModelConfig, json.loads(json.dumps(plain))) == presets[name]
    assert from_mapping(ModelConfig, yaml.safe_load(yaml.safe_dump(plain))) == presets[name]


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = dataclasses.field(default_factory=Inner)
    on: bool = False
    count: int = 1


def test_numbers_written_as_text_are_numbers():
    got = from_mapping(
        Outer, {"name": "x", "inner": {"rate": "3e-4", "sizes": [1, 2]}, "count": "12"}
    )
    assert got == Outer("x", Inner(3e-4, "a", (1, 2)), False, 12)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"nam": "x"}, "unknown key 'nam'; did you mean 'name'"),
        ({"name": "x", "zzz": 1}, "valid are: name, inner, on, count"),
        ({}, "missing name"),
        ({"name": 3}, "name=3: must be text"),
        ({"name": "x", "on": "yes"}, "on='yes': must be true or false"),
        ({"name": "x", "count": 1.5}, "count=1.5: must be a whole number"),
        ({"name": "x", "count": 10**20}, r"count=10+: must be below 2\^63"),
        ({"name": "x", "count": "-1e19"}, r"count='-1e19': must be below 2\^63"),
        ({"name": "x", "count": 10**400}, "count: a number of 401 digits is too large"),
        ({"name": "x", "count": True}, "count=True: must be a number"),
        ({"name": "x", "count": "many"}, "count='many': must be a number"),
        ({"name": "x", "inner": {"kind": "c"}}, "inner.kind='c': must be one of 'a', 'b'"),
        ({"name": "x", "inner": {"sizes": "12"}}, "inner.sizes='12': must be a list"),
        ({"name": "x", "inner": 3}, "inner=3: must be a mapping"),
        ({"name": "x", "inner": {"rat": 1}}, "unknown key 'inner.rat'; did you mean 'rate'"),
    ],
)
def test_wrong_mappings_are_named(mapping: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        from_mapping(Outer, mapping)


def test_unknown_preset_names_its_nearest():
    with pytest.raises(ConfigError, match=r"did you mean 'blackmamba-2.8b'"):
        presets["blackmamba-2.8"]
    assert "nothing" not in presets
    assert len(presets) == len(list(presets))
    assert nearest("q", ["a", "b"]) == "valid are: a, b"
