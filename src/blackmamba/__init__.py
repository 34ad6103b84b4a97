"""BlackMamba: language models that alternate Mamba state-space layers with routed experts.

    import blackmamba
    model = blackmamba.load("a-model-folder")
    ids = blackmamba.generate(model, [[1, 2, 3]], max_new_tokens=32)

Importing this package touches no GPU, reads no environment variable and compiles nothing.
"""

import contextlib
import sys

from blackmamba_program import importing

# `python -m blackmamba` imports this before it is a program, and is called "-m" until it is one
with importing() if sys.argv[:1] == ["-m"] else contextlib.nullcontext():
    from blackmamba.checkpoint import load, save
    from blackmamba.config import ModelConfig, QuantizationConfig
    from blackmamba.generate import generate
    from blackmamba.model import BlackMamba, State, quantize
    from blackmamba.presets import presets
    from blackmamba.version import __version__

__all__ = [
    "BlackMamba",
    "ModelConfig",
    "QuantizationConfig",
    "State",
    "__version__",
    "generate",
    "load",
    "presets",
    "quantize",
    "save",
]
