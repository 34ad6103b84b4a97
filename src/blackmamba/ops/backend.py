"""Which implementation of an operation runs, and why: the one place that decides.

An operation lists its implementations, fastest first, and "auto" takes the first. The environment
variable BLACKMAMBA_BACKEND stands in for "auto" in every operation that has an implementation of
that name; a backend named in a call runs or raises.
"""

import logging
import os
from collections.abc import Callable, Mapping
from typing import Generic, Literal, TypeVar, get_args

import torch

from blackmamba.errors import BackendError

logger = logging.getLogger(__name__)

Backend = Literal["auto", "reference", "torch"]
"""reference: the definition. torch: faster, in plain PyTorch. Both run on any device."""

ENVIRONMENT_VARIABLE = "BLACKMAMBA_BACKEND"

F = TypeVar("F", bound=Callable[..., object])
_registered: dict[str, tuple[Backend, ...]] = {}
_logged: set[tuple[str, str]] = set()


class Implementations(Generic[F]):
    """The implementations of one operation, fastest first.

    Args:
        operation: its name, for messages.
        functions: implementation by backend name; all take the same arguments.
    """

    def __init__(self, operation: str, functions: Mapping[Backend, F]):
        self._operation = operation
        self._functions = dict(functions)
        _registered[operation] = tuple(self._functions)

    def pick(self, backend: Backend) -> F:
        """The function that `backend` names on this machine.

        Raises:
            BackendError: no backend has this name, or this operation has no such implementation.
        """
        name = _chosen(self._operation) if backend == "auto" else backend
        if name not in self._functions:
            raise BackendError(
                f"backend={backend!r}: {self._operation} has {', '.join(self._functions)}, or auto"
            )
        return self._functions[name]


def available_backends(operation: str) -> tuple[Backend, ...]:
    """The names that `operation` takes as `backend` on this machine besides "auto", fastest first.

    Raises:
        BackendError: no operation has this name.
    """
    if operation not in _registered:
        raise BackendError(
            f"operation={operation!r}: must be one of {', '.join(sorted(_registered))}"
        )
    return _registered[operation]


def describe_backends() -> list[tuple[str, str]]:
    """Operation and a text such as "torch (of torch, reference)", for `blackmamba doctor`."""
    return [
        (operation, f"{_automatic(operation)} (of {', '.join(names)})")
        for operation, names in sorted(_registered.items())
    ]


def forced_backend() -> Backend:
    """What BLACKMAMBA_BACKEND asks for; "auto" if it is not set.

    Raises:
        BackendError: it names no backend.
    """
    name = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    for backend in get_args(Backend):
        if name == backend:
            return backend
    raise BackendError(
        f"{ENVIRONMENT_VARIABLE}={name!r}: must be one of {', '.join(get_args(Backend))}"
    )


def _automatic(operation: str) -> Backend:
    """What "auto" means for this operation now."""
    names, forced = _registered[operation], forced_backend()
    return forced if forced in names else names[0]


def _chosen(operation: str) -> Backend:
    """`_automatic`, and a word in the log when it is new."""
    name = _automatic(operation)
    if not torch.compiler.is_compiling() and (operation, name) not in _logged:
        _logged.add((operation, name))
        logger.info("%s runs as %s", operation, name)
    return name
