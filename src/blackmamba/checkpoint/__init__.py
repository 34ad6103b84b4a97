"""Model folders: ours, the authors' released format, and the way between them."""

from blackmamba.checkpoint.adapter import save_adapter
from blackmamba.checkpoint.convert import convert
from blackmamba.checkpoint.load import (
    load,
    load_as_stored,
    load_config,
    load_exact_config,
    load_quantization,
    load_tokenizer,
)
from blackmamba.checkpoint.native import save

__all__ = [
    "convert",
    "load",
    "load_as_stored",
    "load_config",
    "load_exact_config",
    "load_quantization",
    "load_tokenizer",
    "save",
    "save_adapter",
]
