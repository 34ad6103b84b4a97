"""Our model folders: config.json, model.safetensors, and tokenizer.json and chat.json if any."""

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from blackmamba.checkpoint.tensors import Place
from blackmamba.config import ModelConfig, QuantizationConfig, from_mapping, to_mapping
from blackmamba.errors import CheckpointError
from blackmamba.files import settle, sync
from blackmamba.model import BlackMamba
from blackmamba.model.lora import merged_tensors

if TYPE_CHECKING:
    from blackmamba.data import Tokenizer

FORMAT, VERSION = "blackmamba", 1


def save(model: BlackMamba, folder: str | Path, *, tokenizer: "Tokenizer | None" = None) -> None:
    """Write config.json, model.safetensors and, if given, tokenizer.json into `folder`.

    Other files there stay. All three are written under temporary names first; then, if the
    configuration or the tokenizer differs from the one there, the old config.json is removed; the
    weights take their name, and the new config.json comes last. A stop at any point leaves the old
    model, the new one, or no config.json: never a mixture.

    Args:
        model: on any device; parameters are written in their own dtypes, adapters added to them.
        folder: made if it is missing.
        tokenizer: the model's.
    Raises:
        CheckpointError: it cannot be written (a full disk, no permission); the old files are whole.
    """
    save_with(model, folder, tokenizer, {})


def save_with(
    model: BlackMamba,
    folder: str | Path,
    tokenizer: "Tokenizer | None",
    notes: Mapping[str, Any],
) -> None:
    """`save`, with further keys beside "model" in config.json that no model depends on."""
    plain = {"format": FORMAT, "format_version": VERSION, **notes}
    if model.quantization is not None:
        plain["quantization"] = to_mapping(model.quantization)
    plain["model"] = to_mapping(model.config)
    tensors = {name: t.detach().contiguous() for name, t in merged_tensors(model).items()}

    def write_weights(path: Path) -> None:
        save_file(tensors, path, metadata={"format": "pt"})

    write_folder(Path(folder), plain, ("model.safetensors", write_weights), tokenizer)


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    weights: tuple[str, Callable[[Path], None]],
    tokenizer: "Tokenizer | None",
) -> None:
    """Write the files of a model folder so that no stop leaves a mixture; see `save`.

    Args:
        folder: made if it is missing.
        config: of config.json.
        weights: the weight file's name, and what writes it to a path.
        tokenizer: for tokenizer.json and, if its model was trained on conversations, chat.json;
            None: such files are left as they are.
    Raises:
        CheckpointError: it cannot be written.
    """
    texts = {} if tokenizer is None else {"tokenizer.json": tokenizer.to_json()}
    if tokenizer is not None and tokenizer.chat is not None:
        texts["chat.json"] = tokenizer.chat.to_json()
    texts["config.json"] = json.dumps(config, indent=2) + "\n"
    files: dict[str, Callable[[Path], None]] = dict([weights])
    for name, text in texts.items():
        files[name] = functools.partial(_write, text=text)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: a file; a model is written into a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            ready: dict[str, Path] = {}
            for final, write in files.items():
                handle, temporary = tempfile.mkstemp(prefix=f".{final}.", suffix=".tmp", dir=folder)
                os.close(handle)
                ready[final] = Path(temporary)
                stack.callback(ready[final].unlink, missing_ok=True)
                write(ready[final])
                settle(ready[final])
            if any(_differs(folder / name, text) for name, text in texts.items()):
                (folder / "config.json").unlink(missing_ok=True)
            for final, temporary in ready.items():
                os.replace(temporary, folder / final)
            sync(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: the model cannot be written ({error})") from None


def read_config(plain: Mapping[str, Any], path: object) -> ModelConfig:
    """The model that our config.json describes.

    Raises:
        CheckpointError: it was written by a newer version.
        ConfigError: a key or value is wrong.
    """
    if plain.get("format_version") != VERSION:
        raise CheckpointError(
            f"{path}: format_version={plain.get('format_version')!r}: this version reads {VERSION}"
        )
    return from_mapping(ModelConfig, plain.get("model", {}), str(path))


def read_quantization(plain: Mapping[str, Any], path: object) -> QuantizationConfig | None:
    """How the weights beside our config.json are stored; None: as they are.

    Raises:
        ConfigError: a key or value is wrong.
    """
    if "quantization" not in plain:
        return None
    return from_mapping(QuantizationConfig, plain["quantization"], f"{path}: quantization")


def places(model: BlackMamba) -> dict[str, Place]:
    """Name of every tensor that `model` needs, and where it goes: to the one of that name."""
    found = {n: Place(n, None, tuple(p.shape)) for n, p in model.named_parameters()}
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():  # quantised, or a selection bias
        if name in saved:
            dtype = None if name.endswith("selection_bias") else buffer.dtype
            found[name] = Place(name, None, tuple(buffer.shape), dtype)
    return found


def _differs(path: Path, text: str) -> bool:
    return not path.exists() or path.read_bytes() != text.encode()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
