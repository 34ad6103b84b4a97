"""Which implementation of an operation runs, and why: the one place that decides.

An operation lists its implementations, fastest first, and "auto" takes the first. The environment
variable BLACKMAMBA_BACKEND stands in for "auto" in every operation that has an implementation of
that name; a backend named in a call runs or raises.
"""

import logging
import os
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar, get_args

from blackmamba.errors import BackendError

logger = logging.getLogger(__name__)

Backend = Literal["auto", "reference", "torch"]
"""reference: the definition. torch: faster, in plain PyTorch. Both run on any device."""

ENVIRONMENT_VARIABLE = "BLACKMAMBA_BACKEND"

F = TypeVar("F", bound=Callable[..., object])
_registered: dict[str, tuple[str, ...]] = {}
_logged: set[tuple[str, str]] = set()


class Implementations(Mapping[str, F]):
    """The implementations of one operation, fastest first.

    Args:
        operation: its name, for messages.
        functions: implementation by backend name; all take the same arguments.
    """

    def __init__(self, operation: str, functions: Mapping[str, F]):
        self.operation = operation
        self._functions = dict(functions)
        _registered[operation] = tuple(self._functions)

    def pick(self, backend: Backend) -> F:
        """The function that `backend` names on this machine.

        Raises:
            BackendError: no backend has this name, or this operation has no such implementation.
        """
        name = backend
        if name == "auto":
            name = forced_backend()
            if name not in self._functions:
                name = next(iter(self._functions))
            if (self.operation, name) not in _logged:
                _logged.add((self.operation, name))
                logger.info("%s runs as %s", self.operation, name)
        if name not in self._functions:
            raise BackendError(
                f"backend={backend!r}: {self.operation} has {', '.join(self._functions)}, or auto"
            )
        return self._functions[name]

    def __getitem__(self, name: str) -> F:
        return self._functions[name]

    def __iter__(self):
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)


def forced_backend() -> str:
    """What BLACKMAMBA_BACKEND asks for; "auto" if it is not set.

    Raises:
        BackendError: it names no backend.
    """
    name = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if name not in get_args(Backend):
        raise BackendError(
            f"{ENVIRONMENT_VARIABLE}={name!r}: must be one of {', '.join(get_args(Backend))}"
        )
    return name


def describe_backends() -> list[tuple[str, str]]:
    """Operation and a text such as "torch (of torch, reference)", for `blackmamba doctor`."""
    forced = forced_backend()
    rows: list[tuple[str, str]] = []
    for operation, names in sorted(_registered.items()):
        used = forced if forced in names else names[0]
        rows.append((operation, f"{used} (of {', '.join(names)})"))
    return rows
