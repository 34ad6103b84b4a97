"""What a run begins with: random weights or those of a model, and which of them are trained."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from blackmamba.checkpoint import (
    convert,
    load,
    load_exact_config,
    load_quantization,
    load_tokenizer,
)
from blackmamba.checkpoint.load import find_folder, fingerprint
from blackmamba.checkpoint.released import TOKENIZER
from blackmamba.config import ModelConfig, QuantizationConfig, from_mapping, to_mapping
from blackmamba.data import Tokenizer
from blackmamba.errors import CheckpointError, ConfigError
from blackmamba.model import BlackMamba, select
from blackmamba.model.lora import Adaptation, add_adapters
from blackmamba.train.config import RunConfig
from blackmamba.train.parallel.ranks import Ranks

BASE = "base"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def started(
    config: RunConfig, tokenizer: Tokenizer, out: Path, *, resumed: bool, ranks: Ranks | None = None
) -> BlackMamba:
    """The model of a run before its first step, on the CPU: so it is the same on every device.

    Args:
        config: of the run.
        tokenizer: of its data.
        out: its folder; a run that trains adapters keeps the model that they are of in its base/.
        resumed: a checkpoint's weights come in next, so that the first ones are not needed.
        ranks: all of them call it, and the first writes base/.
    Raises:
        ConfigError: the tokenizer has more tokens than the model; train.init names another model
            than `config` describes, or a quantised one; see `freeze` and `add_adapters`.
        CheckpointError: the model that train.init names cannot be read.
    """
    shape, settings = fit_vocabulary(config.model, tokenizer), config.train
    compute_dtype = DTYPES[settings.dtype]
    source = "" if resumed else settings.init
    if source:
        plain = source_config(source, for_adapters=config.lora.rank > 0)
        _check_same(source, config.model, to_mapping(plain))
    if config.lora.rank:
        if source:
            _keep_base(source, out / BASE, ranks or Ranks())
        source = str(out / BASE)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        if source:
            # What only concerns training, such as unused ids, is the run's; the weights are given.
            given = load(source)
            model = BlackMamba(
                shape, device="meta", compute_dtype=compute_dtype, quantization=given.quantization
            )
            model.load_state_dict(given.state_dict(), assign=True)
            for name, buffer in given.named_buffers():  # those that no state has, too
                path, _, last = name.rpartition(".")
                setattr(model.get_submodule(path), last, buffer)
        else:
            model = BlackMamba(shape, compute_dtype=compute_dtype)
        if config.lora.rank:
            add_adapters(model, Adaptation(config.lora, settings.init, fingerprint(out / BASE)))
            model.train()  # a quantised one was not
        else:
            freeze(model, settings.freeze)
    return model


def _keep_base(source: str, base: Path, ranks: Ranks) -> None:
    def write() -> None:
        convert(source, base)

    ranks.first(write)


def freeze(model: BlackMamba, patterns: tuple[str, ...]) -> None:
    """Let the parameters that a pattern matches (see `select`) need no gradient.

    Raises:
        ConfigError: a pattern matches none, or nothing is left to train.
    """
    frozen = select((n for n, _ in model.named_parameters()), patterns, "train.freeze")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"train.freeze={list(patterns)}: leaves nothing to train")


def trained_parameters(config: RunConfig) -> int:
    """How many numbers a run trains.

    Raises:
        ConfigError: a pattern of train.freeze or lora.targets matches nothing.
    """
    model = BlackMamba(config.model, device="meta", quantization=_quantization(config))
    if config.lora.rank:
        add_adapters(model, Adaptation(config.lora, "", ""))
    else:
        freeze(model, config.train.freeze)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _quantization(config: RunConfig) -> QuantizationConfig | None:
    """Of the model that adapters are of; None where it is gone, and the run goes on without it."""
    if not config.lora.rank:
        return None
    try:
        return load_quantization(config.train.init)
    except CheckpointError:
        return None


def fit_vocabulary(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """`config` with as many unused ids as the tokenizer leaves.

    Raises:
        ConfigError: the tokenizer has more tokens than the model.
    """
    unused = config.vocab_size - tokenizer.n_tokens
    if unused < 0:
        raise ConfigError(
            f"model.vocab_size={config.vocab_size}: the tokenizer has {tokenizer.n_tokens} tokens"
        )
    return dataclasses.replace(config, unused_vocab=unused)


def source_config(source: str, *, for_adapters: bool = False) -> ModelConfig:
    """The configuration of the model that train.init names.

    Args:
        source: a model folder, run folder or hub name.
        for_adapters: it stays as it is, so that its experts may be quantised.
    Raises:
        CheckpointError: there is none.
        ConfigError: it is quantised, and not its experts alone or not for adapters.
    """
    quantization = load_quantization(source)
    if quantization is not None and for_adapters and quantization.what != "experts":
        raise ConfigError(
            f"train.init={source}: what={quantization.what!r} is quantised, and adapters are of "
            "matrices that are not; begin with one of what='experts'"
        )
    if quantization is not None and not for_adapters:
        raise ConfigError(
            f"train.init={source}: quantised to {quantization.bits} bits and for inference only; "
            "begin with the model that it was made from"
        )
    return load_exact_config(source)


def with_source(
    recipe: Mapping[str, Any], source: str, recorded: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A recipe whose model section and tokenizer are those of the model that train.init names.

    Args:
        recipe: its model section may be missing, or agree with that model.
        source: a model folder, run folder or hub name.
        recorded: the whole recipe of the same run, which makes looking at `source` unnecessary.
    Raises:
        ConfigError: model section or tokenizer of the recipe are not that model's.
        CheckpointError: there is no such model.
        DataError: a tokenizer is missing or damaged.
    """
    if recorded is not None:
        plain = dict(recorded["model"])
    else:
        lora = recipe.get("lora")
        has_adapters = isinstance(lora, dict) and bool(cast("dict[str, Any]", lora).get("rank"))
        plain = to_mapping(source_config(source, for_adapters=has_adapters))
    given = recipe.get("model", {})
    if given:
        whole = plain | cast("dict[str, Any]", given) if isinstance(given, dict) else given
        _check_same(source, from_mapping(ModelConfig, whole, "model"), plain)
    data = recipe.get("data", {})
    if isinstance(data, dict):
        data = dict(cast("dict[str, Any]", data))
        if recorded is not None:
            data.setdefault("tokenizer", recorded["data"]["tokenizer"])
        else:
            data["tokenizer"] = _tokenizer(source, data.get("tokenizer"))
    return {**recipe, "model": plain, "data": data}


def _check_same(source: str, config: ModelConfig, plain: Mapping[str, Any]) -> None:
    """See that a run's model is the one that it begins with; unused ids are the tokenizer's."""
    other = from_mapping(ModelConfig, plain)
    differing = [
        f"model.{field.name} (here {ours!r}, there {theirs!r})"
        for field in dataclasses.fields(config)
        if field.name != "unused_vocab"
        and (ours := getattr(config, field.name)) != (theirs := getattr(other, field.name))
    ]
    if differing:
        raise ConfigError(
            f"train.init={source}: another model than the recipe's: {', '.join(differing)}; "
            "leave the recipe's model section out"
        )


def _tokenizer(source: str, given: object) -> str:
    """Where the tokenizer is: with the model, or as given where the model has none."""
    if given == "train":
        raise ConfigError(
            f"data.tokenizer='train': the model of train.init={source} has a tokenizer; "
            "leave this key out"
        )
    own = load_tokenizer(source)
    if given is None:
        return TOKENIZER if own is None else str(find_folder(source) / "tokenizer.json")
    if own is not None and Tokenizer.load(str(given)).fingerprint != own.fingerprint:
        raise ConfigError(
            f"data.tokenizer={given}: not the tokenizer that train.init={source} was trained with; "
            "leave this key out"
        )
    return str(given)
