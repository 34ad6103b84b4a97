"""What every test run sets up."""

import os

import torch
import triton_on_cpu
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


if gpu._INSTALLED and gpu.interpreted():
    triton_on_cpu.prepare()

# The suite runs in one process a core: more threads would only wait for each other.
torch.set_num_threads(1)
