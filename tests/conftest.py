"""What every test run sets up."""

import os
from typing import Any

import torch
from hypothesis import settings

from blackmamba.ops import gpu

# Times vary with the machine. HYPOTHESIS_PROFILE=small is for slow builds, such as sanitized ones.
settings.register_profile("usual", deadline=None)
settings.register_profile("small", deadline=None, max_examples=8)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "usual"))

# Triton's kernels run here too, step by step; it must be known before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _let_loops_run_over_tensors() -> None:
    """Triton 3.6's interpreter makes loop bounds numbers in a way that NumPy 2.4 does not allow."""
    from triton.runtime import interpreter

    patch: Any = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if gpu._INSTALLED and gpu.interpreted():
    _let_loops_run_over_tensors()

# The suite runs in one process a core: more threads would only wait for each other.
torch.set_num_threads(1)
