"""From one format to the other."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from blackmamba.checkpoint import released
from blackmamba.checkpoint.adapter import add_chat, merge_adapter
from blackmamba.checkpoint.load import (
    find_folder,
    fingerprint,
    load_as_stored,
    load_quantization,
    load_tokenizer,
    max_sequence_length,
)
from blackmamba.checkpoint.native import save_with, write_folder
from blackmamba.errors import ConfigError


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Literal["native", "released"] = "native",
    adapter: str | Path | None = None,
) -> None:
    """Read a model in either format and write it in the one that `to` names; every weight is kept.

    Args:
        source: a model folder or hub name.
        destination: the folder to write; a tokenizer.json is taken along.
        to: "native": config.json, model.safetensors; "released": config.json, pytorch_model.bin.
        adapter: folder of an adapter of this model, to be added to its weights.
    Raises:
        CheckpointError: the source cannot be read or the destination not written; the adapter is
            another model's.
        ConfigError: `to` is unknown, or the released format cannot express the model; it has no
            place for quantised weights.
    """
    if to not in ("native", "released"):
        raise ConfigError(f"to={to!r}: must be 'native' or 'released'")
    folder = find_folder(source)
    if to == "released" and load_quantization(folder) is not None:
        raise ConfigError(
            f"{source}: quantised, which the released format cannot express; "
            "convert the model that it was made from"
        )
    model, tokenizer = load_as_stored(folder), load_tokenizer(folder)
    if adapter is not None:
        merge_adapter(model, fingerprint(folder), adapter, source)
        add_chat(tokenizer, adapter)
    length = max_sequence_length(folder)
    if to == "native":
        save_with(model, destination, tokenizer, {"max_sequence_length": length})
        return
    config = released.write_config(model.config, length)
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    for name, place in released.places(model).items():
        whole = parameters[place.parameter].detach()
        part = whole if place.expert is None else whole[place.expert].clone()
        tensors[name] = part.view(place.shape)

    def write_weights(path: Path) -> None:
        content: dict[str, Any] = {"model": tensors}
        try:
            with path.open("wb") as file:
                torch.save(content, file)
        except RuntimeError as error:  # torch's zip writer hides that the disk is full
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    write_folder(Path(destination), config, ("pytorch_model.bin", write_weights), tokenizer)
