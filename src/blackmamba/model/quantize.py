"""Which matrices of a model can be quantised, and the model that has them so.

Expert matrices are most of a model's memory; "all" adds every other large one. What stays as it
is, because it is small and errors in it do much: router, norms, convolution, dt_proj, A_log, D,
dt_bias. Embedding, head and x_proj are never narrower than 8 bits: docs/quantization.md has the
measurements.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from blackmamba.config import QuantizationConfig
from blackmamba.errors import ConfigError, InputError
from blackmamba.model.attention import Attention
from blackmamba.model.mamba import Mamba
from blackmamba.model.mlp import MLP
from blackmamba.model.moe import MoE
from blackmamba.model.quantized import QuantizedEmbedding, QuantizedLinear, QuantizedStorage
from blackmamba.ops.native.pages import want_huge_pages

if TYPE_CHECKING:
    from blackmamba.model.language_model import BlackMamba

_GROUP_SIZE = {8: 64, 4: 32}  # unless told
_SENSITIVE_BITS = 8


@torch.no_grad()
def quantize(
    model: "BlackMamba",
    bits: Literal[8, 4] = 8,
    *,
    what: Literal["experts", "all"] = "experts",
    group_size: Literal[32, 64, 128] | None = None,
) -> "BlackMamba":
    """A copy of `model` for inference that stores its large matrices in few bits.

    Args:
        model: left as it is; the copy is on the same device and shares no memory with it.
        bits: 8 or 4 for each number of them.
        what: "experts", or "all" large matrices; see `QuantizationConfig`.
        group_size: columns of a row that share a scale; None: 64 for 8 bits, 32 for 4.
    Raises:
        ConfigError: an argument is none of these, or "experts" of a model that has none.
        InputError: the model is quantised already, or a weight is NaN or infinite.
    """
    if model.quantization is not None:
        raise InputError(
            f"this model is quantised already, to {model.quantization.bits} bits: "
            "quantise the model that it was made from"
        )
    config = QuantizationConfig(
        bits=bits,
        group_size=group_size or _GROUP_SIZE.get(bits, 64),  # pyright: ignore[reportArgumentType]
        what=what,
    )
    dtype, device = model.embedding.weight.dtype, model.embedding.weight.device
    assert isinstance(dtype, torch.dtype)
    made = type(model)(
        model.config,
        device="meta",
        dtype=dtype,
        compute_dtype=model.compute_dtype,
        quantization=config,
    )
    made.to_empty(device=device)
    want_huge_pages((*made.parameters(), *made.buffers()))
    source = dict([*model.named_parameters(), *model.named_buffers()])
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        if name in source:
            tensor.copy_(source[name])
    for name, module in made.named_modules():
        if isinstance(module, QuantizedStorage):
            module.fill_from(source[name])
    return made


def store_quantized(model: "BlackMamba", config: QuantizationConfig) -> None:
    """Put quantised parameters in the place of those that `config` names, in `model` itself.

    Raises:
        ConfigError: there are none.
    """
    places = list(_places(model, config))
    if not places:
        raise ConfigError("what='experts': this model has no experts; use what='all'")
    for module, name, bits in places:
        old = getattr(module, name)
        weight = old if isinstance(old, Tensor) else old.weight
        storage = QuantizedStorage(
            tuple(weight.shape), bits, config.group_size, device=weight.device
        )
        if weight.device.type != "meta":
            storage.fill_from(weight.detach())
        delattr(module, name)
        if isinstance(old, nn.Embedding):
            setattr(module, name, QuantizedEmbedding(storage, weight.dtype))
        elif isinstance(old, nn.Linear):
            setattr(module, name, QuantizedLinear(storage, old.bias))
        else:
            setattr(module, name, storage)


def _places(
    model: "BlackMamba", config: QuantizationConfig
) -> Iterator[tuple[nn.Module, str, int]]:
    """Module, name of its parameter, linear layer or embedding, and bits."""
    for module in model.modules():
        for name, bits in _names(module, config).items():
            if getattr(module, name) is not None:
                yield module, name, bits


def _names(module: nn.Module, config: QuantizationConfig) -> dict[str, int]:
    bits = config.bits
    if isinstance(module, MoE):
        return {"fc1": bits, "fc2": bits}
    if config.what == "experts":
        return {}
    match module:
        case Mamba():
            return {"in_proj": bits, "x_proj": _SENSITIVE_BITS, "out_proj": bits}
        case Attention():
            return dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), bits)
        case MLP():
            return {"fc1": bits, "fc2": bits}
        case _ if hasattr(module, "embedding"):
            return {"embedding": _SENSITIVE_BITS, "head": _SENSITIVE_BITS}
        case _:
            return {}
