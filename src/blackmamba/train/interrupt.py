"""Ctrl-C and SIGTERM: leave at the end of the step, not in the middle of it."""

import logging
import signal
import threading
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_logger = logging.getLogger(__name__)


class StopRequest:
    """A context manager in which the first SIGINT or SIGTERM sets `requested`.

    The second raises KeyboardInterrupt at once. A signal that was ignored stays ignored. Outside
    the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        _logger.warning(
            "%s: finishing this step and saving; once more to leave at once",
            signal.Signals(number).name,
        )
