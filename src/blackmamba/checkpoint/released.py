"""The authors' released format: config.json and pytorch_model.bin ({"model": tensors by name}).

The one place that knows its layer codes and names. Codes: "r" a Mamba layer, "1" a dense MLP, any
other number N a layer of N experts, "rN" and "r1" the parallel pairs.

Source: config.json and file of Zyphra/BlackMamba-1.5B; the authors' inference code, whose own
reading of N stops at 9 (it takes the last digit).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from blackmamba.checkpoint.tensors import Place, TensorFile
from blackmamba.config import ModelConfig, to_mapping
from blackmamba.errors import CheckpointError, ConfigError
from blackmamba.model import BlackMamba

TOKENIZER = "EleutherAI/gpt-neox-20b"
"""Of the released models, whose folders have none."""
TOKENIZER_SIZE = 50_277
"""Ids that it gives."""
_NEOX_ROWS = 50_304
_REQUIRED = (
    "num_layers",
    "hidden_size",
    "state_size",
    "conv_dimension",
    "vocab_size",
    "expansion_factor",
    "mamba_moe_layers",
)
_CODES = 'valid are "r", "1", a number of experts N, "rN" and "r1"'
_IGNORED = ("embedding.position_embeddings.weight",)  # popped by the authors' loader too
_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def read_config(plain: Mapping[str, Any], path: object) -> ModelConfig:
    """The model that a released config.json describes; its experts' activation is exact GELU.

    Args:
        plain: the parsed file.
        path: its name, for messages.
    Raises:
        CheckpointError: keys are missing (all are named), a value is of a wrong kind, a layer code
            is unknown, or num_layers disagrees with the list.
    """
    missing = [key for key in _REQUIRED if key not in plain]
    if missing:
        raise CheckpointError(f"{path}: missing {', '.join(missing)}")
    numbers = [k for k in (*_REQUIRED[:-1], "ffn_hidden_size") if k in plain]
    wrong = [f"{k}={plain[k]!r}" for k in numbers if type(plain[k]) is not int or plain[k] < 1]
    if wrong:
        raise CheckpointError(f"{path}: {', '.join(wrong)}: must be whole numbers of at least 1")
    flags = [k for k in ("add_bias_linear", "swiglu") if type(plain.get(k, False)) is not bool]
    if flags:
        wrong = [f"{k}={plain[k]!r}" for k in flags]
        raise CheckpointError(f"{path}: {', '.join(wrong)}: must be true or false")
    if not isinstance(plain["mamba_moe_layers"], list):
        raise CheckpointError(
            f"{path}: mamba_moe_layers={plain['mamba_moe_layers']!r}: must be a list of layer codes"
        )
    codes: list[object] = plain["mamba_moe_layers"] or ["r"] * plain["num_layers"]
    if len(codes) != plain["num_layers"]:
        raise CheckpointError(
            f"{path}: num_layers={plain['num_layers']}, "
            f"but mamba_moe_layers has {len(codes)} entries"
        )
    activation = plain.get("expert_activation", "gelu")
    if activation not in ("gelu", "silu"):
        raise CheckpointError(f"{path}: expert_activation={activation!r}: must be 'gelu' or 'silu'")
    biased = plain.get("add_bias_linear", False)
    vocab_size = plain["vocab_size"]
    unused = plain.get("unused_vocab", _unused(vocab_size))
    if type(unused) is not int:
        raise CheckpointError(f"{path}: unused_vocab={unused!r}: must be a whole number")
    width = plain.get("ffn_hidden_size", 4 * plain["hidden_size"])
    parts = [_split(i, str(code), path) for i, code in enumerate(codes)]
    usual = next((n for _, n in parts if n > 1), 8)
    return ModelConfig(
        layers=tuple(_layer(has_mixer, n, usual) for has_mixer, n in parts),
        n_experts=usual,
        d_model=plain["hidden_size"],
        vocab_size=vocab_size,
        unused_vocab=unused,
        expand=plain["expansion_factor"],
        d_state=plain["state_size"],
        d_conv=plain["conv_dimension"],
        d_expert=width if any(n > 1 for _, n in parts) else 0,
        d_mlp=width if any(n == 1 for _, n in parts) else 0,
        activation=activation,
        gated=plain.get("swiglu", True),
        linear_bias=biased,
        head_bias=biased,
    )


def write_config(config: ModelConfig, max_sequence_length: int = 2048) -> dict[str, Any]:
    """The released config.json of a model.

    "expert_activation" and, where vocab_size does not imply it, "unused_vocab" are our additions,
    as the format has no place for them; the original ignores them. What only training looks at
    (sinkhorn_*, balance and z-loss) is not written: router="sigmoid" with one expert a token and no
    selection bias infers what "sinkhorn" does, and comes back as that.

    Args:
        config: the model's.
        max_sequence_length: of the file that the model once came from; it limits nothing.
    Raises:
        ConfigError: names all that the format cannot express.
    """
    problems: list[str] = []
    specs = config.layer_specs
    plain = to_mapping(config)
    fixed = {
        "final_norm": "layer_norm",
        "norm_eps": 1e-5,
        "residual_dtype": "float32",
        "tie_embeddings": True,
        "head_bias": config.linear_bias,
        "mamba_norm": False,
    }
    if any(s.feed_forward == "moe" for s in specs):  # sigmoid of the largest logit, one expert
        fixed |= {"experts_per_token": 1, "d_shared_expert": 0, "selection_bias": False}
        if not config.gates_are_sigmoids:
            problems.append(f"router={config.router!r}")
    problems += [f"{k}={plain[k]!r}" for k, value in fixed.items() if plain[k] != value]
    others = {s.mixer for s in specs} - {"mamba", "none"}
    problems += [f"{mixer} layers" for mixer in sorted(others)]
    if any(s.n_experts == 1 for s in specs):
        problems.append("a routed layer of one expert")
    widths = {config.d_mlp for s in specs if s.feed_forward == "mlp"}
    widths |= {config.d_expert for s in specs if s.feed_forward == "moe"}
    if len(widths) > 1:
        problems.append(f"d_mlp={config.d_mlp} other than d_expert={config.d_expert}")
    if problems:
        raise ConfigError(f"the released format cannot express {', '.join(problems)}")
    codes: list[str] = []
    for spec in specs:
        experts = {"none": "", "mlp": "1", "moe": str(spec.n_experts)}[spec.feed_forward]
        codes.append(("r" if spec.mixer == "mamba" else "") + experts)
    written = {
        "num_layers": config.n_layers,
        "hidden_size": config.d_model,
        "state_size": config.d_state,
        "conv_dimension": config.d_conv,
        "vocab_size": config.vocab_size,
        "expansion_factor": config.expand,
        "mamba_moe_layers": codes,
        "ffn_hidden_size": max(widths, default=4 * config.d_model),
        "bias": config.linear_bias,
        "add_bias_linear": config.linear_bias,
        "swiglu": config.gated,
        "max_sequence_length": max_sequence_length,
        "expert_activation": config.activation,
    }
    if config.unused_vocab != _unused(config.vocab_size):
        written["unused_vocab"] = config.unused_vocab
    return written


def places(model: BlackMamba) -> dict[str, Place]:
    """Released name of every tensor that `model` needs, and where it goes."""
    found: dict[str, Place] = {}
    specs = model.config.layer_specs
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if not name.startswith("layers."):
            found[_OUTER[name]] = Place(name, None, shape)
            continue
        _, index, part = name.split(".", 2)
        spec = specs[int(index)]
        prefix = f"decoder.layers.{index}."
        if part in _NORMS:
            found[prefix + _NORMS[part]] = Place(name, None, shape)
        elif part.startswith("mixer."):
            inner = _MIXER.get(part, part)
            file_shape = (shape[0], 1, shape[1]) if part == "mixer.conv_weight" else shape
            found[prefix + inner] = Place(name, None, file_shape)
        else:
            inner = part.removeprefix("feed_forward.")
            room = prefix + ("mixer." if spec.mixer == "none" else "moe.")
            if spec.feed_forward == "mlp" or inner.startswith("router."):
                found[room + inner.replace("fc", "linear_fc")] = Place(name, None, shape)
                continue
            which, _, bias = inner.partition("_")
            for j in range(shape[0]):
                expert = f"{room}local_experts.{j}.linear_{which}.{bias or 'weight'}"
                found[expert] = Place(name, j, shape[1:])
    return found


def untied(config: ModelConfig, file: TensorFile) -> ModelConfig:
    """`config` for a file whose output layer may be one of its own.

    The authors' loader always ties it; a copy of the embedding is taken for tied.
    """
    if _HEAD not in file.shapes:
        return config
    shape = (config.vocab_size, config.d_model)
    comparable = (
        file.shapes[_HEAD] == file.shapes.get(_EMBEDDING) == shape
        and file.dtypes[_HEAD] == file.dtypes[_EMBEDDING]
    )
    if comparable and file.same(_HEAD, _EMBEDDING):
        return config
    return dataclasses.replace(config, tie_embeddings=False)


def without_ignored(file: TensorFile, config: ModelConfig) -> None:
    """Drop what a released file may hold and a model has no use for."""
    for name in (*_IGNORED, *((_HEAD,) if config.tie_embeddings else ())):
        file.shapes.pop(name, None)


_OUTER = {
    "embedding.weight": _EMBEDDING,
    "final_norm.weight": "decoder.final_layernorm.weight",
    "final_norm.bias": "decoder.final_layernorm.bias",
    "head.weight": _HEAD,
    "head_bias": "output_layer.bias",
}
_NORMS = {"norm.weight": "norm.weight", "feed_forward_norm.weight": "norm_moe.weight"}
_MIXER = {
    "mixer.conv_weight": "mixer.conv1d.weight",
    "mixer.conv_bias": "mixer.conv1d.bias",
    "mixer.dt_bias": "mixer.dt_proj.bias",
}


def _unused(vocab_size: int) -> int:
    """Rows without a token, as far as the number of rows tells: GPT-NeoX's table is padded."""
    return _NEOX_ROWS - TOKENIZER_SIZE if vocab_size == _NEOX_ROWS else 0


def _split(index: int, code: str, path: object) -> tuple[bool, int]:
    """Whether a layer has a Mamba part, and its experts: 0 none, 1 the dense MLP."""
    match = re.fullmatch(r"(r?)([1-9][0-9]*)?", code)
    if match is None or not code:
        raise CheckpointError(f"{path}: mamba_moe_layers[{index}]={code!r}: {_CODES}")
    return bool(match[1]), int(match[2] or 0)


def _layer(has_mixer: bool, n_experts: int, usual: int) -> str:
    """Our name of the layer; only an unusual number of experts is spelled out."""
    names = {0: "", 1: "mlp", usual: "moe"}
    feed_forward = names.get(n_experts, f"moe:{n_experts}")
    return "+".join(part for part in ("mamba" if has_mixer else "", feed_forward) if part)
