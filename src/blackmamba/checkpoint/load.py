"""Load a model from a folder in any format, told apart by content, or by its name on the hub."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch

from blackmamba.checkpoint import dense, native, released
from blackmamba.checkpoint.adapter import merge_adapter
from blackmamba.checkpoint.tensors import (
    Place,
    TensorFile,
    check_fit,
    open_shards,
    open_tensors,
)
from blackmamba.config import ModelConfig, QuantizationConfig
from blackmamba.errors import CheckpointError, ConfigError
from blackmamba.model import BlackMamba, keeps_float32
from blackmamba.model.balance import forget_load
from blackmamba.ops.native.pages import want_huge_pages

if TYPE_CHECKING:
    from blackmamba.data import Tokenizer

_FILES = (
    "config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json",
    "chat.json", "model.safetensors.index.json", "model-*-of-*.safetensors",
)  # fmt: skip
_Kind = Literal["native", "released", "dense"]


def load(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    expert_activation: Literal["silu", "gelu"] | None = None,
    adapter: str | Path | None = None,
) -> BlackMamba:
    """A model out of a folder, ready to generate (in evaluation mode); quantised if that is.

    Args:
        source: a folder of ours or in the released format, a training run's folder, or a hub name
            such as "Zyphra/BlackMamba-1.5B"; also a dense Mamba-1 as state-spaces/mamba or
            transformers store it.
        device: where to put it.
        dtype: of its parameters, whatever the file has; those that `blackmamba.model.keeps_float32`
            names are float32 or wider. Quantised ones stay as they are.
        compute_dtype: of the products' inputs; None: as `dtype`.
        expert_activation: None: as the folder says, which for the released format is exact GELU
            (docs/released-weights.md says why).
        adapter: folder of an adapter of this model, to be added to its weights.
    Raises:
        CheckpointError: the folder or a file is missing, damaged, or does not fit; all tensors that
            are missing, unexpected or of a wrong shape are named; the adapter is another model's.
        ConfigError: the configuration is wrong, or there is an adapter to a quantised model.
    """
    if expert_activation not in (None, "silu", "gelu"):
        raise ConfigError(f"expert_activation={expert_activation!r}: must be 'silu' or 'gelu'")
    folder = find_folder(source)
    opened = _open(folder)
    if expert_activation is not None:
        config = dataclasses.replace(opened.config, activation=expert_activation)
        opened = opened._replace(config=config)
    model = _filled(opened, dtype, device, compute_dtype)
    if adapter is not None:
        merge_adapter(model, fingerprint(folder), adapter, source)
    return model


def fingerprint(folder: Path) -> str:
    """Of a model folder's weights: SHA-256 of all of them in float32, whatever the format is.

    Raises: as `load`.
    """
    opened = _open(folder)
    places = opened.places(opened.empty(torch.float32))
    check_fit(opened.file, places)
    found = hashlib.sha256()
    for name, _ in sorted(places.items(), key=lambda item: (item[1].parameter, item[1].expert)):
        found.update(opened.file.get(name).to(torch.float32).contiguous().numpy().tobytes())
    return found.hexdigest()


def load_as_stored(folder: Path) -> BlackMamba:
    """A model in the narrowest dtype that holds every weight of its folder exactly.

    Raises: as `load`.
    """
    opened = _open(folder)
    file, places = opened.file, opened.places(opened.empty(torch.float32))
    check_fit(file, places)
    stored = {
        file.dtypes[name]
        for name, place in places.items()
        if place.dtype is None and not keeps_float32(place.parameter)
    }
    # parameters that stay float32 say nothing, unless they are wider still
    stored |= {file.dtypes[name] for name in places} & {torch.float64}
    return _filled(opened, functools.reduce(torch.promote_types, stored or {torch.float32}), "cpu")


class _Opened(NamedTuple):
    config: ModelConfig
    quantization: QuantizationConfig | None
    file: TensorFile
    kind: _Kind

    def empty(self, dtype: torch.dtype, compute_dtype: torch.dtype | None = None) -> BlackMamba:
        """The model without memory."""
        return BlackMamba(
            self.config,
            device="meta",
            dtype=dtype,
            compute_dtype=compute_dtype,
            quantization=self.quantization,
        )

    def places(self, model: BlackMamba) -> dict[str, Place]:
        if self.kind == "dense":
            return dense.places(model, self.file)
        return (native if self.kind == "native" else released).places(model)


def _open(folder: Path) -> _Opened:
    plain, kind = _read_json(folder)
    config = _config(folder, plain, kind)
    quantization = _quantization(folder, plain, kind)
    file = _open_weights(folder, kind)
    if kind == "released":
        config = released.untied(config, file)
        released.without_ignored(file, config)
    elif kind == "dense":
        config = dense.untied(config, file)
    return _Opened(config, quantization, file, kind)


def _filled(
    opened: _Opened,
    dtype: torch.dtype,
    device: torch.device | str,
    compute_dtype: torch.dtype | None = None,
) -> BlackMamba:
    model = opened.empty(dtype, compute_dtype)
    places = opened.places(model)
    check_fit(opened.file, places)
    model.to_empty(device=device)
    want_huge_pages((*model.parameters(), *model.buffers()))
    forget_load(model)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        for name, place in places.items():
            into = tensors[place.parameter]
            opened.file.copy(name, into if place.expert is None else into[place.expert])
    return model.eval()


def load_config(source: str | Path) -> ModelConfig:
    """The configuration of a model folder, without its weights.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: a value is wrong.
    """
    folder = find_folder(source)
    return _config(folder, *_read_json(folder))


def load_exact_config(source: str | Path) -> ModelConfig:
    """`load_config` as the weights say: with a head of its own where the file has one.

    Raises: as `load`.
    """
    return _open(find_folder(source)).config


def load_quantization(source: str | Path) -> QuantizationConfig | None:
    """How a model folder's weights are stored; None: not quantised.

    Raises: as `load_config`.
    """
    folder = find_folder(source)
    return _quantization(folder, *_read_json(folder))


def load_tokenizer(source: str | Path) -> "Tokenizer | None":
    """The tokenizer in a model folder; None if it has none.

    Raises:
        CheckpointError: there is no such folder.
        DataError: the file is damaged.
    """
    from blackmamba.data import Tokenizer

    path = find_folder(source) / "tokenizer.json"
    return Tokenizer.from_file(path) if path.exists() else None


def find_folder(source: str | Path) -> Path:
    """The folder with config.json: `source`, its model/, its newest checkpoint, or a download.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(source)
    if folder.is_dir():
        steps = sorted((folder / "checkpoints").glob("step-*"))
        for candidate in (folder, folder / "model", *reversed(steps)):
            if (candidate / "config.json").is_file():
                return candidate
        raise CheckpointError(f"{folder}: no config.json in this folder")
    looks_like_hub = len(folder.parts) == 2 and not folder.is_absolute() and "." not in folder.parts
    if folder.exists() or not looks_like_hub or ".." in folder.parts:
        problem = "a file, must be a model's folder" if folder.exists() else "no such folder"
        raise CheckpointError(f"{folder}: {problem}")
    return _download(str(source))


def max_sequence_length(folder: Path) -> int:
    """What the released format says, kept for the way back; it limits nothing."""
    value = _read_json(folder)[0].get("max_sequence_length", 2048)
    return value if type(value) is int else 2048


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise CheckpointError(
            f"{name}: no such folder, and the hub needs huggingface_hub; "
            "pip install 'blackmamba[hub]'"
        ) from None
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:  # no network, no such model, no valid name
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{name}: no such folder, and not to be had from the hub ({reason})"
        ) from None
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{name}: has no config.json on the hub")
    return folder


def _read_json(folder: Path) -> tuple[dict[str, Any], _Kind]:
    """config.json, and which format it is of."""
    path = folder / "config.json"
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if isinstance(plain, dict):
        plain = cast("dict[str, Any]", plain)
        if plain.get("format") == native.FORMAT:
            return plain, "native"
        if "mamba_moe_layers" in plain or "num_layers" in plain:
            return plain, "released"
        if dense.is_dense(plain):
            return plain, "dense"
    raise CheckpointError(
        f"{path}: neither ours (format: {native.FORMAT}), nor of the released format "
        "(mamba_moe_layers), nor a dense Mamba-1 (d_model and n_layer, or model_type: mamba)"
    )


def _config(folder: Path, plain: dict[str, Any], kind: _Kind) -> ModelConfig:
    formats = {"native": native, "released": released, "dense": dense}
    return formats[kind].read_config(plain, folder / "config.json")


def _quantization(folder: Path, plain: dict[str, Any], kind: _Kind) -> QuantizationConfig | None:
    return native.read_quantization(plain, folder / "config.json") if kind == "native" else None


def _open_weights(folder: Path, kind: _Kind) -> TensorFile:
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if kind == "dense" and not path.exists() and index.exists():
        return open_shards(index)
    pickled = folder / "pytorch_model.bin"
    if kind != "native" and pickled.exists():
        return open_tensors(pickled)
    if not path.exists():
        wanted = path.name if kind == "native" else f"{pickled.name} or {path.name}"
        raise CheckpointError(f"{folder}: has a config.json but no {wanted}")
    return open_tensors(path)
