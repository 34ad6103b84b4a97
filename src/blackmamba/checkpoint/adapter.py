"""Adapter folders: adapter.json and adapter.safetensors, a few per cent of the model's size.

The model that an adapter belongs to is told by a fingerprint of its weights, in whatever format or
folder they are.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from blackmamba.config import from_mapping, to_mapping
from blackmamba.data.chat import CHAT_FILE, ChatTemplate
from blackmamba.errors import CheckpointError, ConfigError
from blackmamba.files import settle, write_text
from blackmamba.model import BlackMamba
from blackmamba.model.lora import (
    Adaptation,
    LoRAConfig,
    adaptation,
    adapter_tensors,
    add_adapters,
    merge_adapters,
)

if TYPE_CHECKING:
    from blackmamba.data import Tokenizer

FORMAT, VERSION = "blackmamba-adapter", 1
_CONFIG, _WEIGHTS = "adapter.json", "adapter.safetensors"


def save_adapter(
    model: BlackMamba, folder: str | Path, tokenizer: "Tokenizer | None" = None
) -> None:
    """Write a model's adapters, and nothing else of it, into `folder`.

    The chat template that the tokenizer has, if any, lies beside them: the base may have none.

    Raises:
        CheckpointError: it cannot be written.
        ConfigError: the model has no adapters.
    """
    adapted = adaptation(model)
    if adapted is None:
        raise ConfigError("this model has no adapters to save")
    write_adapter(adapted, adapter_tensors(model), folder, tokenizer)


def write_adapter(
    adapted: Adaptation,
    tensors: Mapping[str, Tensor],
    folder: str | Path,
    tokenizer: "Tokenizer | None" = None,
) -> None:
    """`save_adapter` of these `adapter_tensors`.

    Raises:
        CheckpointError: it cannot be written.
    """
    folder = Path(folder)
    plain = {
        "format": FORMAT,
        "format_version": VERSION,
        "base": adapted.base,
        "base_fingerprint": adapted.fingerprint,
        "lora": to_mapping(adapted.config),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CONFIG).unlink(missing_ok=True)  # never one of these with the other's weights
        temporary = folder / f".{_WEIGHTS}.tmp"
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, temporary, metadata={"format": "pt"})
        settle(temporary)
        temporary.replace(folder / _WEIGHTS)
        if tokenizer is not None and tokenizer.chat is not None:
            write_text(folder / CHAT_FILE, tokenizer.chat.to_json())
        write_text(folder / _CONFIG, json.dumps(plain, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: the adapter cannot be written ({error})") from None


def read_adapter(folder: str | Path) -> Adaptation:
    """What an adapter folder's adapter.json says. A run folder's is in its adapter/.

    Raises:
        CheckpointError: there is none, it is damaged or of another version.
        ConfigError: a value is wrong.
    """
    path = _found(folder) / _CONFIG
    try:
        plain: Any = json.loads(path.read_text(encoding="utf-8"))
        if plain["format"] != FORMAT or plain["format_version"] != VERSION:
            raise CheckpointError(f"{path}: must be of format {FORMAT}, version {VERSION}")
        config = from_mapping(LoRAConfig, plain["lora"], f"{path}: lora")
        return Adaptation(config, str(plain["base"]), str(plain["base_fingerprint"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(f"{path}: no readable adapter ({error})") from None


@torch.no_grad()
def fill_adapters(model: BlackMamba, folder: str | Path) -> None:
    """Give a model's adapters the values of a folder's.

    Raises:
        CheckpointError: the file is missing or damaged, or is of other adapters.
    """
    path = _found(folder) / _WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error})") from None
    own = adapter_tensors(model)
    wrong = {n for n in own.keys() | tensors.keys()
             if n not in own or n not in tensors or own[n].shape != tensors[n].shape}  # fmt: skip
    if wrong:
        raise CheckpointError(
            f"{path}: does not fit its adapter.json or this model: {min(wrong)} and "
            f"{len(wrong) - 1} more"
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def merge_adapter(model: BlackMamba, fingerprint: str, folder: str | Path, name: object) -> None:
    """Add a folder's adapters to the weights of the model that they belong to, in place.

    Args:
        model: quantised only if the adapters were trained so; what they are of is not.
        fingerprint: of its weights as stored.
        folder: of the adapter.
        name: of the model, for messages.
    Raises:
        CheckpointError: the adapter is damaged, or belongs to another model.
        ConfigError: the model is quantised, and was not when they were trained.
    """
    adapted = read_adapter(folder)
    if model.quantization is not None and adapted.fingerprint != fingerprint:
        raise ConfigError(
            f"{name}: quantised, and an adapter is added to whole weights: take the model that it "
            "was made from, `blackmamba convert --adapter` that, then `blackmamba quantize`"
        )
    if adapted.fingerprint != fingerprint:
        raise CheckpointError(
            f"{folder}: an adapter of {adapted.base} (weights {adapted.fingerprint[:12]}...), not "
            f"of {name} ({fingerprint[:12]}...)"
        )
    add_adapters(model, dataclasses.replace(adapted, base=str(name)))
    fill_adapters(model, folder)
    merge_adapters(model)


def add_chat(tokenizer: "Tokenizer | None", folder: str | Path) -> None:
    """Give a tokenizer the chat template that an adapter was trained with, if it was with one.

    Raises:
        DataError: it is damaged.
    """
    if tokenizer is not None:
        tokenizer.chat = ChatTemplate.beside(_found(folder) / _CONFIG) or tokenizer.chat


def _found(folder: str | Path) -> Path:
    """`folder`, or its adapter/."""
    folder = Path(folder)
    return folder if (folder / _CONFIG).is_file() else folder / "adapter"
