"""Which implementation of an operation runs, and why: the one place that decides.

An operation lists its implementations, fastest first, and "auto" takes the first that can run on
the input. The environment variable BLACKMAMBA_BACKEND stands in for "auto" in every operation that
has an implementation of that name; a backend that is named, there or in a call, runs or raises.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from typing import Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor

from blackmamba.errors import BackendError
from blackmamba.ops import gpu, native

logger = logging.getLogger(__name__)

Backend = Literal["auto", "reference", "torch", "native", "triton"]
"""reference: the definition. torch: faster, in plain PyTorch. Both run on any device.
native: C++ for the CPU, float32 and bfloat16, where the extension was built.
triton: kernels for the GPU, float32, bfloat16 and float16; "auto" takes them for tensors on one."""

ENVIRONMENT_VARIABLE = "BLACKMAMBA_BACKEND"

F = TypeVar("F", bound=Callable[..., object])
_registered: dict[str, tuple[Backend, ...]] = {}
_logged: set[tuple[str, str]] = set()
_forced = threading.local()  # torch.compile cannot trace a ContextVar


class Implementations(Generic[F]):
    """The implementations of one operation, fastest first.

    Args:
        operation: its name, for messages.
        functions: implementation by backend name; all take the same arguments.
        forward_only: those without a gradient, which take no input that needs one.
    """

    def __init__(
        self,
        operation: str,
        functions: Mapping[Backend, F],
        forward_only: Collection[Backend] = (),
    ):
        self._operation = operation
        self._functions: dict[Backend, F] = dict(functions)
        self._forward_only = frozenset(forward_only)
        _registered[operation] = tuple(self._functions)

    def pick(self, backend: Backend, *inputs: Tensor | None) -> F:
        """The function that `backend` names, for these inputs on this machine.

        Args:
            backend: a name, or "auto".
            inputs: the tensors whose device and dtype, and need of a gradient, decide.
        Raises:
            BackendError: no backend has this name, this operation has no such implementation, or
                it cannot take the inputs.
        """
        name: Backend = _named(self._operation) if backend == "auto" else backend
        if name == "auto":
            on_gpu = gpu.on_gpu(*inputs)
            name = next(n for n in _of(self._functions, on_gpu) if self._unfit(n, inputs) is None)
            _log(self._operation, name)
        elif name not in self._functions:
            raise BackendError(
                f"backend={backend!r}: {self._operation} has {', '.join(self._functions)}, or auto"
            )
        elif (reason := self._unfit(name, inputs)) is not None:
            raise BackendError(f"{self._operation}, backend={name!r}: {reason}")
        return self._functions[name]

    def _unfit(self, name: Backend, inputs: tuple[Tensor | None, ...]) -> str | None:
        if (
            name in self._forward_only
            and torch.is_grad_enabled()
            and any(t is not None and t.requires_grad for t in inputs)
        ):
            return "it has no gradient, and an input requires one; call it under torch.no_grad()"
        return _unfit(name, inputs)


def available_backends(operation: str) -> tuple[Backend, ...]:
    """The names that `operation` takes as `backend` on this machine besides "auto", fastest first.

    Raises:
        BackendError: no operation has this name.
    """
    if operation not in _registered:
        raise BackendError(
            f"operation={operation!r}: must be one of {', '.join(sorted(_registered))}"
        )
    names = _of(_registered[operation], torch.cuda.is_available())
    return tuple(name for name in names if _unfit(name, ()) is None)


def chosen_backend(operation: str) -> Backend:
    """What "auto" takes on this machine, for an input of any kind that it can take.

    Raises:
        BackendError: no operation has this name.
    """
    fastest = available_backends(operation)[0]
    forced = _named(operation)
    return fastest if forced == "auto" else forced


def describe_backends() -> list[tuple[str, str]]:
    """Operation and a text such as "torch (of torch, reference)", for `blackmamba doctor`."""
    rows: list[tuple[str, str]] = []
    for operation in sorted(_registered):
        names = available_backends(operation)
        rows.append((operation, f"{chosen_backend(operation)} (of {', '.join(names)})"))
    return rows


@contextlib.contextmanager
def forcing(backend: Backend) -> Generator[None]:
    """Inside, `backend` stands in for BLACKMAMBA_BACKEND; for this thread alone."""
    before = getattr(_forced, "backend", None)
    _forced.backend = backend
    try:
        yield
    finally:
        _forced.backend = before


def forced_backend() -> Backend:
    """What `forcing` or else BLACKMAMBA_BACKEND asks for; "auto" if neither is there.

    Raises:
        BackendError: it names no backend.
    """
    chosen: Backend | None = getattr(_forced, "backend", None)
    if chosen is not None:
        return chosen
    name = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    for backend in get_args(Backend):
        if name == backend:
            return backend
    raise BackendError(
        f"{ENVIRONMENT_VARIABLE}={name!r}: must be one of {', '.join(get_args(Backend))}"
    )


def _named(operation: str) -> Backend:
    """What BLACKMAMBA_BACKEND asks of this operation; "auto" if it has no such implementation."""
    forced = forced_backend()
    return forced if forced in _registered[operation] else "auto"


def _of(names: Iterable[Backend], on_gpu: bool) -> list[Backend]:
    """Without "triton" where there is no GPU: interpreted kernels run only when named."""
    return [name for name in names if on_gpu or name != "triton"]


def _unfit(name: Backend, inputs: tuple[Tensor | None, ...]) -> str | None:
    """Why this backend cannot take the inputs; None if it can."""
    if name == "native":
        return native.unfit(*inputs)
    return gpu.unfit(*inputs) if name == "triton" else None


def _log(operation: str, name: str) -> None:
    """A word in the log when the choice is new."""
    if not torch.compiler.is_compiling() and (operation, name) not in _logged:
        _logged.add((operation, name))
        logger.info("%s runs as %s", operation, name)
