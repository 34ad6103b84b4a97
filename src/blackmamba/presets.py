"""Named model sizes. `presets["blackmamba-1.5b"]` is a `ModelConfig`.

Each BlackMamba size has three twins of about the same active parameters, the networks that the
paper compares with: `transformer-*` (attention + MLP), `moe-transformer-*` (attention + experts)
and `mamba-*` (dense Mamba). "demo" and "tiny" are short for "blackmamba-demo" and "-tiny".

Source: config.json of Zyphra/BlackMamba-1.5B and -2.8B (sizes); arXiv 2402.01771 (SwiGLU).
"""

import dataclasses
from collections.abc import Iterator, Mapping

from blackmamba.config import ModelConfig, nearest
from blackmamba.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class _Size:
    """One size and the depth of its four networks, chosen so that their active parameters agree."""

    d_model: int
    width: int  # of an expert and of the dense feed-forward
    vocab_size: int
    unused_vocab: int
    blackmamba_pairs: int
    transformer_pairs: int
    mamba_layers: int
    d_head: int = 64
    d_state: int = 16


_SIZES = {
    "1.5b": _Size(1152, 3072, 50_304, 27, 15, 18, 34),
    "2.8b": _Size(1472, 3872, 50_304, 27, 18, 22, 41),
    "demo": _Size(256, 512, 4_096, 0, 3, 4, 6, d_head=32),
    "tiny": _Size(64, 128, 512, 0, 2, 3, 4, d_head=16),
}


def _build(size: _Size, pattern: tuple[str, ...]) -> ModelConfig:
    has_attention = "attention" in pattern
    return ModelConfig(
        layers=pattern,
        d_model=size.d_model,
        vocab_size=size.vocab_size,
        unused_vocab=size.unused_vocab,
        d_state=size.d_state,
        d_expert=size.width if "moe" in pattern else 0,
        d_mlp=size.width if "mlp" in pattern else 0,
        n_heads=size.d_model // size.d_head if has_attention else 0,
        n_kv_heads=size.d_model // size.d_head if has_attention else 0,
        d_head=size.d_head if has_attention else 64,
    )


class Presets(Mapping[str, ModelConfig]):
    """Names to configurations, read-only; a name that is not there raises ConfigError."""

    def __init__(self) -> None:
        self._configs: dict[str, ModelConfig] = {}
        for name, size in _SIZES.items():
            full = f"blackmamba-{name}"
            self._configs[full] = _build(size, ("mamba", "moe") * size.blackmamba_pairs)
            self._configs[f"transformer-{name}"] = _build(
                size, ("attention", "mlp") * size.transformer_pairs
            )
            self._configs[f"moe-transformer-{name}"] = _build(
                size, ("attention", "moe") * size.transformer_pairs
            )
            self._configs[f"mamba-{name}"] = _build(size, ("mamba",) * size.mamba_layers)
        for short in ("demo", "tiny"):
            self._configs[short] = self._configs[f"blackmamba-{short}"]

    def __getitem__(self, name: str) -> ModelConfig:
        if name not in self._configs:
            raise ConfigError(f"unknown preset {name!r}; {nearest(name, self._configs)}")
        return self._configs[name]

    def __contains__(self, name: object) -> bool:
        return name in self._configs

    def __iter__(self) -> Iterator[str]:
        return iter(self._configs)

    def __len__(self) -> int:
        return len(self._configs)


presets = Presets()
