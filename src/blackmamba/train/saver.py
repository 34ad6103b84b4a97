"""Checkpoints one at a time, written beside the training or while it waits."""

import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

_logger = logging.getLogger(__name__)


class Saver:
    """A context manager; when it ends, nothing is being written any more.

    Beside the training a thread writes what was copied for it. (torch's `async_save` is the same: a
    copy, and a thread that calls `save`. It would copy what is in the host's memory once more.)
    Ranks whose threads write together use a process group of their own, so that these collectives
    and the training's never meet.

    Args:
        is_async: whether to write beside the training.
        on_saved: is told the folder of each checkpoint that is whole, by the thread that trains.
    """

    def __init__(self, on_saved: Callable[[Path], None], *, is_async: bool):
        self.is_async = is_async
        self._on_saved = on_saved
        self._executor = ThreadPoolExecutor(1, "checkpoint") if is_async else None
        self._under_way: Future[Path] | None = None

    @property
    def has_failed(self) -> bool:
        """Whether a checkpoint could not be written, which `wait` will say."""
        future = self._under_way
        return future is not None and future.done() and future.exception() is not None

    def save(self, write: Callable[[], Path]) -> None:
        """Write one; `wait` is over.

        Args:
            write: gives the folder; called from another thread if `is_async`.
        Raises:
            CheckpointError: it cannot be written; told later if `is_async`.
        """
        assert self._under_way is None
        if self._executor is None:
            self._on_saved(write())
        else:
            self._under_way = self._executor.submit(write)

    def look(self) -> None:
        """Tell of a checkpoint that has become whole; waits for nothing."""
        if self._under_way is not None and self._under_way.done() and not self.has_failed:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            CheckpointError: it could not be written.
            PeerError: the same, where another rank says why.
        """
        future, self._under_way = self._under_way, None
        if future is not None:
            self._on_saved(future.result())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.wait()
            elif self._under_way is not None:
                with contextlib.suppress(BaseException):  # the other error is the one to tell
                    _logger.debug("wrote %s", self._under_way.result())
        finally:
            if self._executor is not None:
                self._executor.shutdown()
