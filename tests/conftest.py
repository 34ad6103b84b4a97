"""What every test run sets up."""

import os
import sys
from typing import Any

import torch
from hypothesis import settings

from blackmamba.ops import gpu

# Times vary with the machine, examples do not: what failed once fails again.
# HYPOTHESIS_PROFILE=small is for slow builds, such as sanitized ones; "search" draws new examples.
settings.register_profile("usual", deadline=None, derandomize=True)
settings.register_profile("small", deadline=None, derandomize=True, max_examples=8)
settings.register_profile("search", deadline=None, derandomize=False, max_examples=500)
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


def _trace_each_kind_of_launch_once() -> None:
    """For the coverage: of launches that differ in numbers alone, all but the first go untraced.

    They walk the same lines, and to trace the interpreter takes longer than it takes itself.
    """
    from triton.runtime import interpreter

    executor: Any = interpreter.GridExecutor
    launch = executor.__call__
    seen = set[object]()

    def launched(self: Any, *args: Any, **named: Any) -> None:
        kind = (self.fn, *map(_kind, args), *((name, _kind(named[name])) for name in sorted(named)))
        trace = sys.gettrace()
        if trace is None or kind not in seen:
            seen.add(kind)
            return launch(self, *args, **named)
        sys.settrace(None)
        try:
            return launch(self, *args, **named)
        finally:
            sys.settrace(trace)

    executor.__call__ = launched


def _kind(argument: object) -> object:
    if isinstance(argument, int | float) and not isinstance(argument, bool):
        return type(argument)
    return argument.dtype if isinstance(argument, torch.Tensor) else repr(argument)


if gpu._INSTALLED and gpu.interpreted():
    _let_loops_run_over_tensors()
    _trace_each_kind_of_launch_once()

# The suite runs in one process a core: more threads would only wait for each other.
torch.set_num_threads(1)
