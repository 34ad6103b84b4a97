"""Whether the Hugging Face hub answers, and its libraries without it.

`datasets` asks for each file six times with pauses between, half a minute in all, before it says
that there is no way to the hub, or looks into its cache.
"""

import contextlib
from collections.abc import Generator
from typing import Any

_PATIENCE_S = 5.0  # a hub on the other side of the world answers within one


def answers() -> bool:
    """Whether the hub (`HF_ENDPOINT`) answers one request, whatever it says."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE_S)
    except Exception:  # whatever the HTTP library of this version raises
        return False
    return True


@contextlib.contextmanager
def offline() -> Generator[None]:
    """Let `datasets` and `huggingface_hub` read their caches and ask for nothing."""
    import datasets.config
    from huggingface_hub import constants

    modules: tuple[Any, ...] = (constants, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
