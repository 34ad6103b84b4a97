"""Recipes: YAML that fills a `RunConfig`. Shipped ones go by name, a user's own by path.

    model: {preset: demo, d_model: 192}      # a preset, and fields that differ from it
    data: {text: ["corpus:bible"], vocab_size: 2048}
    train: {steps: 500, batch_size: 16, seq_len: 256, lr: 3e-3}

Where data.tokenizer is "train" and model.vocab_size is not given, it is data.vocab_size. A recipe
with train.init needs no model section: model and tokenizer are those of the model that it names.
"""

import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from blackmamba.config import from_mapping, nearest, to_mapping
from blackmamba.errors import ConfigError
from blackmamba.files import write_text
from blackmamba.presets import presets
from blackmamba.train.config import RunConfig
from blackmamba.train.origin import origin
from blackmamba.train.start import with_source

_SUFFIXES = (".yaml", ".yml")


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    folder = importlib.resources.files("blackmamba") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name[-5:] == ".yaml")


def load_recipe(
    name_or_path: str | Path, overrides: Sequence[str] = (), *, begun: Path | None = None
) -> RunConfig:
    """The run that a recipe describes.

    Args:
        name_or_path: "demo", or the path of a YAML file.
        overrides: "train.lr=3e-4": a key's path and a value as YAML reads it.
        begun: folder of a run to go on with; where it began from the model that train.init names,
            what is needed of that one is read from its recipe.
    Raises:
        ConfigError: no such recipe, no valid YAML, or a wrong key or value (naming the nearest).
    """
    where = str(name_or_path)
    recipe = _parse(_read(name_or_path), where)
    if not isinstance(recipe, dict):
        raise ConfigError(f"{where}: must be a mapping with the keys model, data and train")
    data = recipe.get("data")
    if isinstance(data, dict) and {"mixture", "sources"} <= data.keys():
        raise ConfigError(f"{where}: data has both mixture and sources: give one of them")
    recipe = _with_mixture(cast("dict[str, Any]", recipe))
    for override in overrides:
        _override(recipe, override)
        recipe = _with_mixture(recipe)
    recipe = _with_preset(recipe)
    train = recipe.get("train")
    source = cast("dict[str, Any]", train).get("init", "") if isinstance(train, dict) else ""
    if source:
        recipe = with_source(recipe, str(source), _recorded(begun, source))
    return from_mapping(RunConfig, recipe)


def write_recipe(config: RunConfig, path: Path) -> None:
    """Write a run's whole configuration as a recipe that gives the same run again."""
    source = ", ".join(f"{key} {value}" for key, value in origin().items())
    text = yaml.safe_dump(to_mapping(config), sort_keys=False, default_flow_style=None, width=100)
    write_text(path, f"# blackmamba {source}\n{text}")


def _recorded(begun: Path | None, source: object) -> Mapping[str, Any] | None:
    """The whole recipe of a run that began from `source`; None if there is no such run."""
    path = None if begun is None else begun / "recipe.yaml"
    if path is None or not path.is_file():
        return None
    recipe = _parse(_read(path), str(path))
    try:
        return recipe if recipe["train"]["init"] == source else None
    except (KeyError, TypeError):
        return None


def _read(name_or_path: str | Path) -> str:
    names = recipe_names()
    name = str(name_or_path)
    try:
        if name in names:
            folder = importlib.resources.files("blackmamba") / "recipes"
            return (folder / f"{name}.yaml").read_text(encoding="utf-8")
        path = Path(name_or_path)
        if not path.exists():
            kind = "file" if path.suffix in _SUFFIXES or len(path.parts) > 1 else "recipe or file"
            raise ConfigError(f"{name}: no such {kind}; {nearest(name, names)}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{name}: not readable ({error.strerror})") from None


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}: not valid YAML ({reason})") from None


def _override(recipe: dict[str, Any], override: str) -> None:
    """Set one value in place."""
    path, equals, value = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: must look like train.lr=3e-4")
    target: Any = recipe
    for depth, key in enumerate(keys[:-1], 1):
        named = _by_name(target)
        if named:  # a list of sources: one of them
            if key not in named:
                raise ConfigError(f"override {override!r}: no {key!r}; {nearest(key, named)}")
            target = named[key]
        else:
            target = target.setdefault(key, {})
        if not isinstance(target, dict) and (depth + 1 == len(keys) or not _by_name(target)):
            raise ConfigError(f"override {override!r}: {'.'.join(keys[:depth])} is no mapping")
    target[keys[-1]] = _parse(value, f"override {override!r}")


def _by_name(items: Any) -> dict[str, dict[str, Any]]:
    """The mappings of a list by their `name`; empty for anything else."""
    if not isinstance(items, list):
        return {}
    mappings = [x for x in cast("list[Any]", items) if isinstance(x, dict)]
    return {str(x["name"]): x for x in mappings if "name" in x}


def _with_mixture(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with `data.mixture` replaced by the sources that it stands for."""
    data = recipe.get("data")
    if not isinstance(data, dict) or "mixture" not in data:
        return recipe
    data = cast("dict[str, Any]", data)
    name = str(data["mixture"])
    folder = importlib.resources.files("blackmamba") / "recipes" / "mixtures"
    names = sorted(f.name.removesuffix(".yaml") for f in folder.iterdir())
    if name in names:
        text = (folder / f"{name}.yaml").read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = _read(name)
    else:
        raise ConfigError(f"data.mixture={name!r}: no such file or mixture; {nearest(name, names)}")
    mixture = _parse(text, name)
    if not isinstance(mixture, dict) or set(mixture) != {"sources"}:
        raise ConfigError(f"{name}: must be a mapping with the key sources alone")
    own = {key: value for key, value in data.items() if key not in ("mixture", "sources")}
    return {**recipe, "data": {**mixture, **own}}


def _with_preset(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with `model.preset` replaced by what it stands for."""
    model, data = recipe.get("model"), recipe.get("data")
    if not isinstance(model, dict):
        return dict(recipe)
    model = dict(cast("dict[str, Any]", model))
    if isinstance(data, dict) and "vocab_size" not in model:
        data = cast("dict[str, Any]", data)
        if data.get("tokenizer", "train") == "train" and "vocab_size" in data:
            model["vocab_size"] = data["vocab_size"]
    if "preset" in model:
        model = to_mapping(presets[str(model.pop("preset"))]) | model
    return {**recipe, "model": model}
