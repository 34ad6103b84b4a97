"""The installed program `blackmamba`: what runs before the package, whose import takes a second.

It is a package of its own, as nothing inside of `blackmamba` comes before `import blackmamba`.
"""

import contextlib
import os
import signal
from collections.abc import Generator


def main() -> None:
    """Import and run the command line. Ctrl-C during the import ends the process with 130."""
    with importing():
        from blackmamba.cli.main import entry_point
    entry_point()


@contextlib.contextmanager
def importing() -> Generator[None]:
    """Meanwhile Ctrl-C, unless it is ignored, ends the process with 130 and says nothing.

    There is nothing to clean up yet, and no library needs to cope with an exception.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(_signal: int, _frame: object) -> None:
    os._exit(130)
