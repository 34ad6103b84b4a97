"""What every test run sets up."""

import os

import torch
from hypothesis import settings

# Times vary with the machine. HYPOTHESIS_PROFILE=small is for slow builds, such as sanitized ones.
settings.register_profile("usual", deadline=None)
settings.register_profile("small", deadline=None, max_examples=8)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "usual"))

# Triton's kernels run here too, step by step; it must be known before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The suite runs in one process a core: more threads would only wait for each other.
torch.set_num_threads(1)
