"""Dense Mamba-1 models as others store them: read as models of `mamba` layers alone.

Two formats of the same network, told apart by their config.json:

    state-spaces/mamba    d_model, n_layer, ssm_cfg, ...; pytorch_model.bin
    transformers          model_type "mamba", hidden_size, ...; model.safetensors, also in shards

Source: mamba_ssm/models/config_mamba.py and mixer_seq_simple.py of state-spaces/mamba;
transformers/models/mamba of Hugging Face transformers (what `MambaForCausalLM` writes).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

from blackmamba.checkpoint.tensors import Place, TensorFile
from blackmamba.config import ModelConfig
from blackmamba.errors import CheckpointError
from blackmamba.model import BlackMamba

_NEOX_ROWS, _NEOX_TOKENS = 50_280, 50_277
_HEAD = "lm_head.weight"
_EMBEDDINGS = ("backbone.embedding.weight", "backbone.embeddings.weight")
_NAMES = {
    "norm.weight": "norm.weight",
    "mixer.conv_weight": "mixer.conv1d.weight",
    "mixer.conv_bias": "mixer.conv1d.bias",
    "mixer.dt_bias": "mixer.dt_proj.bias",
}
_CANNOT = "this version reads Mamba-1 of RMSNorm and SiLU, with a bias in the convolution"


def is_dense(plain: Mapping[str, Any]) -> bool:
    """Whether a config.json is of one of the two formats."""
    return plain.get("model_type") == "mamba" or {"d_model", "n_layer"} <= plain.keys()


def read_config(plain: Mapping[str, Any], path: object) -> ModelConfig:
    """The model that a config.json describes.

    Raises:
        CheckpointError: a key is missing or of a wrong kind, or the network is another one.
        ConfigError: a number is out of its range.
    """
    if plain.get("model_type") == "mamba":
        return _read_transformers(plain, path)
    return _read_state_spaces(plain, path)


def _read_state_spaces(plain: Mapping[str, Any], path: object) -> ModelConfig:
    ssm = plain.get("ssm_cfg") or {}
    if not isinstance(ssm, dict):
        raise CheckpointError(f"{path}: ssm_cfg={ssm!r}: must be a mapping")
    ssm = cast("dict[str, Any]", ssm)
    m, rows = _count(plain, "d_model", path), _count(plain, "vocab_size", path)
    multiple = _count(plain, "pad_vocab_size_multiple", path, 8)
    padded = math.ceil(rows / multiple) * multiple
    _refuse(path, {
        "rms_norm": (plain.get("rms_norm", True), True),
        "d_intermediate": (plain.get("d_intermediate", 0), 0),
        "attn_layer_idx": (plain.get("attn_layer_idx") or [], []),
        "ssm_cfg.layer": (ssm.get("layer", "Mamba1"), "Mamba1"),
        "ssm_cfg.conv_bias": (ssm.get("conv_bias", True), True),
        "ssm_cfg.dt_rank": _rank(ssm.get("dt_rank", "auto"), m),
    })  # fmt: skip
    return ModelConfig(
        layers=("mamba",) * _count(plain, "n_layer", path),
        d_model=m,
        vocab_size=padded,
        unused_vocab=padded - rows,
        expand=_count(ssm, "expand", path, 2),
        d_state=_count(ssm, "d_state", path, 16),
        d_conv=_count(ssm, "d_conv", path, 4),
        linear_bias=_flag(ssm, "bias", path, False),
        tie_embeddings=_flag(plain, "tie_embeddings", path, True),
        final_norm="rms_norm",
        residual_dtype=_residual(plain, path),
    )


def _read_transformers(plain: Mapping[str, Any], path: object) -> ModelConfig:
    m, expand = _count(plain, "hidden_size", path), _count(plain, "expand", path, 2)
    rows = _count(plain, "vocab_size", path)
    _refuse(path, {
        "hidden_act": (plain.get("hidden_act", "silu"), "silu"),
        "use_conv_bias": (plain.get("use_conv_bias", True), True),
        "intermediate_size": (plain.get("intermediate_size", expand * m), expand * m),
        "time_step_rank": _rank(plain.get("time_step_rank", "auto"), m),
    })  # fmt: skip
    eps = plain.get("layer_norm_epsilon", 1e-5)
    if not isinstance(eps, float):
        raise CheckpointError(f"{path}: layer_norm_epsilon={eps!r}: must be a number")
    return ModelConfig(
        layers=("mamba",) * _count(plain, "num_hidden_layers", path),
        d_model=m,
        vocab_size=rows,
        unused_vocab=_NEOX_ROWS - _NEOX_TOKENS if rows == _NEOX_ROWS else 0,
        expand=expand,
        d_state=_count(plain, "state_size", path, 16),
        d_conv=_count(plain, "conv_kernel", path, 4),
        linear_bias=_flag(plain, "use_bias", path, False),
        tie_embeddings=_flag(plain, "tie_word_embeddings", path, True),
        norm_eps=eps,
        final_norm="rms_norm",
        residual_dtype=_residual(plain, path),
    )


def places(model: BlackMamba, file: TensorFile) -> dict[str, Place]:
    """Name in `file` of every tensor that `model` needs, and where it goes."""
    found: dict[str, Place] = {}
    outer = {
        "embedding.weight": _embedding(file),
        "final_norm.weight": "backbone.norm_f.weight",
        "head.weight": _HEAD,
    }
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if name in outer:
            found[outer[name]] = Place(name, None, shape)
            continue
        _, index, part = name.split(".", 2)
        if part == "mixer.conv_weight":
            shape = (shape[0], 1, shape[1])
        found[f"backbone.layers.{index}.{_NAMES.get(part, part)}"] = Place(name, None, shape)
    return found


def untied(config: ModelConfig, file: TensorFile) -> ModelConfig:
    """`config` for a file that may hold a head: a copy of the embedding is taken for tied.

    Such a copy is dropped from what the file is seen to hold.
    """
    embedding = _embedding(file)
    if _HEAD not in file.shapes:
        return config
    comparable = (
        file.shapes[_HEAD] == file.shapes.get(embedding)
        and file.dtypes[_HEAD] == file.dtypes[embedding]
    )
    if not (comparable and file.same(_HEAD, embedding)):
        return dataclasses.replace(config, tie_embeddings=False)
    del file.shapes[_HEAD]
    return dataclasses.replace(config, tie_embeddings=True)


def _embedding(file: TensorFile) -> str:
    return next((name for name in _EMBEDDINGS if name in file.shapes), _EMBEDDINGS[0])


# ---- checks ---------------------------------------------------------------------------------


def _refuse(path: object, values: Mapping[str, tuple[object, object]]) -> None:
    """See that each value is the one that the network here has."""
    wrong = [f"{key}={value!r}" for key, (value, wanted) in values.items() if value != wanted]
    if wrong:
        raise CheckpointError(f"{path}: {', '.join(wrong)}: {_CANNOT}")


def _rank(value: object, d_model: int) -> tuple[object, object]:
    usual = math.ceil(d_model / 16)
    return usual if value == "auto" else value, usual


def _count(plain: Mapping[str, Any], key: str, path: object, default: int | None = None) -> int:
    if key not in plain and default is None:
        raise CheckpointError(f"{path}: missing {key}")
    value = plain.get(key, default)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{path}: {key}={value!r}: must be a whole number of at least 1")
    return value


def _flag(plain: Mapping[str, Any], key: str, path: object, default: bool) -> bool:
    value = plain.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{path}: {key}={value!r}: must be true or false")
    return value


def _residual(plain: Mapping[str, Any], path: object) -> Any:
    return "float32" if _flag(plain, "residual_in_fp32", path, True) else "compute"
